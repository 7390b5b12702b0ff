"""① Whether a workload could ever run here; if not, the reason, before anything is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tidemill.core.feasible import (
    Fitting,
    Shape,
    fitting,
    is_met,
    is_within,
    places_for_slices,
    tolerates,
    workers_that_fit,
)
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Gang, fits, gang_of, stays_in_site
from tidemill.core.preempt import amounts_together
from tidemill.core.together import Member, Missing, as_one, missing_ever
from tidemill.core.world import World
from tidemill.model.fleet import Level, Site
from tidemill.model.ids import JobId, SiteId
from tidemill.model.job import Workload
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.resources import GpuRequest
from tidemill.model.spec import ANYWHERE, WorkloadSpec
from tidemill.units import MILLI, format_size


def why_never(fleet: FleetArrays, spec: WorkloadSpec) -> Reason | None:
    """Why no order of events short of new machines lets the workload run; None when it can."""
    return why_never_gang(fleet, gang_of(spec))


def why_refused(world: World, workload: Workload) -> Reason | None:
    """Why a workload is not let in: it could never run here, or never under its queue's limits; None when it may."""
    line = world.line_of_workload(workload)
    never = why_never_gang(world.fleet, line.gang)
    if never is not None:
        return never
    if not world.quota.is_limited(workload.project_id):
        return None
    amounts = world.amounts_of(line)
    return world.quota.over_limit(workload.project_id, amounts, 1, ever=True)


def why_never_together(world: World, workloads: Sequence[Workload]) -> Reason | None:
    """Why jobs of a group, one of each of these workloads, can never start together; None when they can."""
    lines = [world.line_of_workload(workload) for workload in workloads]
    members = [
        Member(job_id=JobId(str(at)), line=line, labels=workload.spec.labels)
        for at, (line, workload) in enumerate(zip(lines, workloads, strict=True))
    ]
    missing = missing_ever(world.fleet, members, score=world.score)
    if missing is not None:
        return _group_too_large(world.fleet, members, missing)
    project = workloads[0].project_id
    if not world.quota.is_limited(project):
        return None
    return world.quota.over_limit(project, amounts_together(world, lines), len(lines), ever=True)


def _group_too_large(fleet: FleetArrays, members: Sequence[Member], missing: Missing) -> Reason:
    gang, name = as_one(fleet, members), members[0].line.group
    if gang is not None:
        inner = _narrowest(fleet, gang)
        sentence = f"The {len(members)} jobs of group {name} start together. {inner.sentence}"
        return _never("GroupTooLarge", "group", inner.needed, inner.available, sentence)
    sentence = (
        f"The {len(members)} jobs of group {name} start together, and the whole fleet, empty, has room for "
        f"{missing.placed} of them at once."
    )
    return _never("GroupTooLarge", "group", f"{len(members)} jobs", f"room for {missing.placed}", sentence)


def why_never_gang(fleet: FleetArrays, gang: Gang) -> Reason | None:
    """Why a gang does not fit on the fleet even when nothing else runs; of several choices, why not the first."""
    if not fleet.nodes:
        return Reason(
            code="NoNodes",
            subject="fleet",
            needed="1 node",
            available="0 nodes",
            resolvable_by=ResolvableBy.CAPACITY,
            sentence="There is no machine in this cloud yet.",
        )
    key = ("never", gang)
    if key not in fleet.cache:
        fleet.cache[key] = None if fits(fleet, gang, free=fleet.empty(), all_ready=True) else _narrowest(fleet, gang)
    never: Reason | None = fleet.cache[key]
    return never


def _narrowest(fleet: FleetArrays, gang: Gang) -> Reason:
    """The first single constraint that the empty fleet fails, most specific first."""
    shape = gang.choices[0]
    resources, nodes = shape.resources, fleet.nodes
    if (reason := _nowhere_allowed(fleet, shape)) is not None:
        return reason
    if resources.gpus is not None and (reason := _gpu_shortage(fleet, shape, resources.gpus, gang)) is not None:
        return reason
    for code, field, need, biggest, unit, what in (
        ("NoNodeWithCpu", "cpus", resources.cpu_milli, max(node.cpu_milli for node in nodes), _cores, "CPU"),
        (
            "NoNodeWithMemory",
            "memory",
            resources.memory_bytes,
            max(n.memory_bytes for n in nodes),
            format_size,
            "memory",
        ),
        ("NoNodeWithDisk", "disk", resources.disk_bytes, max(node.disk_bytes for node in nodes), format_size, "disk"),
    ):
        if need > biggest:
            sentence = f"The largest machine has {unit(biggest)} of {what}; {unit(need)} is asked for."
            return _never(code, f"resources.{field}", unit(need), unit(biggest), sentence)
    room = workers_that_fit(fleet, shape, empty=True)
    if gang.spread is not None:
        count = len(set(fleet.domains(gang.spread)[room > 0].tolist()))
        if count < gang.smallest:
            sentence = f"Its workers are to be spread over {gang.smallest} {gang.spread}s; {count} could take one."
            return _never("TooFewDomains", "placement.spread", f"{gang.smallest} {gang.spread}s", str(count), sentence)
    if gang.within is not None:
        level = Level.HOST if gang.within is Level.NVLINK else gang.within
        most = int(np.bincount(fleet.domains(level), weights=np.minimum(room, gang.workers)).max())
        if gang.within is Level.NVLINK or most < gang.smallest:
            what = "NVLink island" if gang.within is Level.NVLINK else str(gang.within)
            sentence = f"The largest {what}, empty, has no room for {gang.smallest} such workers together."
            return _never("NoDomainLargeEnough", "placement.within", f"{gang.smallest} workers", f"{most}", sentence)
    total = int(room.sum())
    if stays_in_site(fleet, gang) and total >= gang.smallest:
        inside = np.bincount(fleet.domains(Level.SITE), weights=np.minimum(room, gang.workers)).astype(np.int64)
        most, name = int(inside.max()), site_name(fleet, fleet.site_ids[int(inside.argmax())])
        sentence = (
            f"A job stays within one site. The largest, {name}, has room for {most} such workers when it is empty; the"
            f" gang has {gang.smallest}. With placement.across_sites it may lie across them: all have room for {total}."
        )
        return _never("NoSiteLargeEnough", "placement.across_sites", f"{gang.smallest} workers", f"{most}", sentence)
    sentence = f"The whole fleet, empty, has room for {total} such workers at once; the gang has {gang.smallest}."
    return _never("GangTooLarge", "nodes", f"{gang.smallest} workers", f"{total} workers", sentence)


def _nowhere_allowed(fleet: FleetArrays, shape: Shape) -> Reason | None:
    """Why no node may serve the shape at all, whatever it has."""
    if shape.image and not fleet.has_images.any():
        sentence = "No machine here can run container images; install podman, or use env instead of image."
        return _never("NoContainerRuntime", "image", "podman or docker on a node", "none", sentence)
    if shape.where != ANYWHERE and not any(is_within(shape.where, fleet.sites.get(site)) for site in fleet.site_ids):
        wanted = "; ".join(shape.where.words())
        have = ", ".join(described(fleet.sites[site]) for site in fleet.site_ids if site in fleet.sites) or "none"
        sentence = f"No site with machines is among those it may be put at ({wanted}); there is {have}."
        return replace(_never("NoSiteAllowed", "placement", wanted, have, sentence), resolvable_by=ResolvableBy.POLICY)
    for key, value in shape.labels:
        known = sorted({found for node in fleet.nodes for name, found in node.labels if name == key})
        if not any(is_met(has, value) for has in known):
            have = ", ".join(sorted({one for has in known for one in has.split("|")}))
            instead = f"there is {have}" if have else f"none has a label {key}"
            sentence = f"No machine has the label {key}={value}; {instead}."
            return _never("NoNodeWithLabel", f"placement.labels.{key}", value, have or "no such label", sentence)
    if shape.machine and not fitting(fleet, shape).nodes.any():
        sentence = f"What it mounts is on {shape.machine}, which is not there or may not have it."
        return _never("NoNodeWithVolume", "volumes", shape.machine, "none", sentence)
    if not any(all(tolerates(shape.tolerations, taint) for taint in node.taints) for node in fleet.nodes):
        taints = ", ".join(sorted({taint for node in fleet.nodes for taint in node.taints}))
        sentence = f"Every machine is tainted ({taints}), and the workload tolerates none of them all."
        return _never("NotTolerated", "placement.tolerations", "a toleration", taints, sentence)
    if not fitting(fleet, shape).nodes.any() and (shape.labels or shape.tolerations or shape.where != ANYWHERE):
        at = f", and is where it may run ({'; '.join(shape.where.words())})" if shape.where != ANYWHERE else ""
        sentence = f"No single machine has all the labels asked for and only taints that are tolerated{at}."
        return _never("NoNodeAllowed", "placement", "a machine that meets all of placement", "none", sentence)
    return None


def _gpu_shortage(fleet: FleetArrays, shape: Shape, request: GpuRequest, gang: Gang) -> Reason | None:
    static = fitting(fleet, shape)
    eligible = static.devices & static.nodes[:, None]
    field = "resources.gpus"
    have = ", ".join(fleet.models) or "no GPUs"
    if not eligible.any():
        if request.profile:
            sentence = f"No GPU here can be cut into {request.profile} slices; the fleet has {have}."
            return _never("NoMigProfile", field, str(request), have, sentence)
        if request.share_bytes and (fleet.model >= 0).any():
            most = int(fleet.gpu_memory.max())
            if request.share_bytes > most:
                asked = format_size(request.share_bytes)
                sentence = f"The largest GPU has {format_size(most)}; {asked} of one is asked for."
                return _never("ShareTooLarge", field, str(request), format_size(most), sentence)
        sentence = f"No machine here has a GPU that answers to {request}; the fleet has {have}."
        return _never("NoNodeWithGpu", field, str(request), have, sentence)
    if not request.is_whole:
        return None
    per_node = eligible.sum(axis=1)
    total, most = int(per_node.sum()), int(per_node.max())
    need = request.total_milli * gang.smallest / MILLI
    if request.count > most:
        sentence = f"The largest machine has {most} such GPUs; one worker asks for {request.count}."
        return _never("NoNodeWithEnoughGpus", field, f"{request.count} GPUs on one machine", f"{most}", sentence)
    if need > total:
        sentence = f"The fleet has {total} such GPUs in all; the gang asks for {need:g}."
        return _never("NotEnoughGpus", field, f"{need:g} GPUs", f"{total} GPUs", sentence)
    return None


def why_not_now(fleet: FleetArrays, gang: Gang, *, mask: NDArray[np.bool_] | None = None) -> Reason:
    """Why a gang that could run on the empty fleet does not fit now; of several choices, why not the first."""
    shape = gang.choices[0]
    resources, static = shape.resources, fitting(fleet, shape)
    ready = fleet.is_ready & static.nodes
    if mask is not None:
        ready &= mask
    if not ready.any() and static.nodes.any():
        closed = "reserved or " if mask is not None else ""
        sentence = f"Every machine that could take it is {closed}cordoned, draining or held back now."
        return _busy("NoNodeReady", "nodes", "a machine that is ready", "none", sentence)
    request = resources.gpus
    if request is not None and not request.profile:
        free = np.where(static.devices & ready[:, None], np.maximum(fleet.gpu_free, 0), 0)
        need = _least_milli(static) if request.share_bytes else request.total_milli
        others = int(fleet.others_gpus[ready].sum()) * MILLI
        reason = _short("Gpus", "gpus", need * gang.smallest, int(free.sum()), _gpus, request.model, others=others)
        if reason is not None:
            return reason
    elif request is not None:
        slices = int(np.where(ready[:, None], places_for_slices(fleet.free(), static), 0).sum())
        if slices < request.count * gang.smallest:
            need_text = f"{request.count * gang.smallest} x {request.profile}"
            sentence = f"{need_text} needed, room for {slices} now."
            return _busy("NotEnoughFreeSlices", "gpus", need_text, f"{slices} free", sentence)
    for name, subject, need, column, held, unit in (
        ("Cpus", "cpus", resources.cpu_milli, fleet.cpu_free, fleet.others_cpu, _cores),
        ("Memory", "memory", resources.memory_bytes, fleet.memory_free, fleet.others_memory, format_size),
    ):
        left = int(np.where(ready, np.maximum(column, 0), 0).sum())
        reason = _short(name, subject, need * gang.smallest, left, unit, others=int(held[ready].sum()))
        if reason is not None:
            return reason
    room = int(workers_that_fit(fleet, shape, mask=mask).sum())
    if gang.within is not None and room >= gang.smallest:
        sentence = f"There is room, but not within one {gang.within}."
        return _busy(
            "NoDomainWithRoom", "placement.within", f"{gang.smallest} workers in one {gang.within}", "", sentence
        )
    if gang.spread is None and stays_in_site(fleet, gang) and room >= gang.smallest:
        sentence = f"There is room for {room} such workers, but not within one site, and a job stays within one."
        return _busy("NoSiteWithRoom", "placement.across_sites", f"{gang.smallest} workers at one site", "", sentence)
    if gang.spread is not None and room >= gang.smallest:
        sentence = f"There is room, but not on {gang.smallest} different {gang.spread}s."
        return _busy("NoDomainWithRoom", "placement.spread", f"{gang.smallest} {gang.spread}s", "", sentence)
    sentence = f"What is free is spread over machines: {room} of {gang.smallest} workers fit now."
    if others := int(np.count_nonzero(fleet.others_cpu[ready] + fleet.others_gpus[ready])):
        sentence += f" On {others} of them, work of others that is not this cloud's holds part."
    return _busy("NoNodeWithRoom", "nodes", f"{gang.smallest} workers", f"room for {room}", sentence)


def site_name(fleet: FleetArrays, site_id: SiteId) -> str:
    """The name of a site; its id when nothing else is known of it."""
    site = fleet.sites.get(site_id)
    return site.name if site is not None else site_id


def described(site: Site) -> str:
    """A site with what placement asks about: ``berlin (edge, DEU)``."""
    return f"{site.name} ({site.kind}, {site.country or 'country not known'})"


def _least_milli(static: Fitting) -> int:
    """The least of a device that a share by memory could be; all of one where there is no such device now."""
    return int(static.milli[static.devices].min(initial=MILLI))


def _short(
    name: str, subject: str, need: int, free: int, unit: Callable[[int], str], model: str = "", *, others: int = 0
) -> Reason | None:
    if free >= need:
        return None
    what = f" of {subject}" if subject == "memory" else f" ({model})" if model else ""
    sentence = f"{unit(need)}{what} needed, {unit(free)} free now."
    if others:
        sentence = f"{sentence[:-1]}; work of others that is not this cloud's holds {unit(others)}."
    return _busy(f"NotEnoughFree{name}", subject, unit(need), f"{unit(free)} free", sentence)


def _cores(milli: int) -> str:
    return f"{milli / MILLI:g} cores" if milli != MILLI else "1 core"


def _gpus(milli: int) -> str:
    return f"{milli / MILLI:g} GPUs" if milli != MILLI else "1 GPU"


def _never(code: str, subject: str, needed: str, available: str, sentence: str) -> Reason:
    return Reason(
        code=code,
        subject=subject,
        needed=needed,
        available=available,
        resolvable_by=ResolvableBy.CAPACITY,
        sentence=sentence,
    )


def _busy(code: str, subject: str, needed: str, available: str, sentence: str) -> Reason:
    return Reason(
        code=code,
        subject=subject,
        needed=needed,
        available=available,
        resolvable_by=ResolvableBy.TIME,
        sentence=sentence,
    )
