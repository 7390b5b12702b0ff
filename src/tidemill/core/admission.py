"""① Whether a workload could ever run here; if not, the reason, before anything is stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tidemill.core.feasible import Shape, eligible_devices, workers_that_fit
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.quota import exceeds_limit
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.resources import GpuRequest
from tidemill.model.spec import WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.units import MILLI, format_size


def shape_of(spec: WorkloadSpec) -> Shape:
    """What the scheduler needs to know of one worker of the workload."""
    return Shape(spec.resources, image=bool(spec.image))


def why_never(fleet: FleetArrays, spec: WorkloadSpec, project: Project) -> Reason | None:
    """Why no order of events short of new machines or new limits lets the workload run; None when it can."""
    if (reason := exceeds_limit(project, spec.resources, spec.nodes)) is not None:
        return reason
    if not fleet.nodes:
        return Reason(
            code="NoNodes",
            subject="fleet",
            needed="1 node",
            available="0 nodes",
            resolvable_by=ResolvableBy.CAPACITY,
            sentence="There is no machine in this cloud yet.",
        )
    shape = shape_of(spec)
    fits = workers_that_fit(fleet, shape, empty=True)
    if int(fits.sum()) >= spec.nodes:
        return None
    return _narrowest(fleet, shape, spec.nodes, int(fits.sum()))


def _narrowest(fleet: FleetArrays, shape: Shape, workers: int, fitting: int) -> Reason:
    """The first single constraint that the empty fleet fails, most specific first."""
    resources = shape.resources
    if shape.image and not any(node.images for node in fleet.nodes):
        sentence = "No machine here can run container images; install podman, or use env instead of image."
        return _never("NoContainerRuntime", "image", "podman or docker on a node", "none", sentence)
    if resources.gpus is not None and (reason := _gpu_shortage(fleet, resources.gpus, workers)) is not None:
        return reason
    nodes = fleet.nodes
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
    sentence = f"The whole fleet, empty, has room for {fitting} such workers at once; the gang has {workers}."
    return _never("GangTooLarge", "nodes", f"{workers} workers", f"{fitting} workers", sentence)


def _gpu_shortage(fleet: FleetArrays, request: GpuRequest, workers: int) -> Reason | None:
    eligible = eligible_devices(fleet, request)
    per_node = eligible.sum(axis=1) if eligible.size else np.zeros(len(fleet.nodes), np.int64)
    total, most, need = int(per_node.sum()), int(per_node.max()), request.total_milli * workers / MILLI
    field = "resources.gpus"
    if total == 0:
        have = ", ".join(fleet.models) or "no GPUs"
        sentence = f"No machine here has a GPU that answers to {request}; the fleet has {have}."
        return _never("NoNodeWithGpu", field, str(request), have, sentence)
    if request.count > most:
        sentence = f"The largest machine has {most} such GPUs; one worker asks for {request.count}."
        return _never("NoNodeWithEnoughGpus", field, f"{request.count} GPUs on one machine", f"{most}", sentence)
    if need > total:
        sentence = f"The fleet has {total} such GPUs in all; the gang asks for {need:g}."
        return _never("NotEnoughGpus", field, f"{need:g} GPUs", f"{total} GPUs", sentence)
    return None


def why_not_now(fleet: FleetArrays, shape: Shape, workers: int) -> Reason:
    """Why a gang that could run on the empty fleet does not fit at this moment."""
    resources, ready = shape.resources, fleet.is_ready
    if resources.gpus is not None:
        free = np.where(eligible_devices(fleet, resources.gpus), np.maximum(fleet.gpu_free, 0), 0)
        reason = _short(
            "Gpus", "gpus", resources.gpus.total_milli * workers, int(free.sum()), _gpus, resources.gpus.model
        )
        if reason is not None:
            return reason
    for name, subject, need, column, unit in (
        ("Cpus", "cpus", resources.cpu_milli, fleet.cpu_free, _cores),
        ("Memory", "memory", resources.memory_bytes, fleet.memory_free, format_size),
    ):
        left = int(np.where(ready, np.maximum(column, 0), 0).sum())
        if (reason := _short(name, subject, need * workers, left, unit)) is not None:
            return reason
    fits = int(workers_that_fit(fleet, shape).sum())
    sentence = f"What is free is spread over machines: {fits} of {workers} workers fit now."
    return _busy("NoNodeWithRoom", "nodes", f"{workers} workers", f"room for {fits}", sentence)


def _short(name: str, subject: str, need: int, free: int, unit: Callable[[int], str], model: str = "") -> Reason | None:
    if free >= need:
        return None
    what = f" of {subject}" if subject == "memory" else f" ({model})" if model else ""
    sentence = f"{unit(need)}{what} needed, {unit(free)} free now."
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
