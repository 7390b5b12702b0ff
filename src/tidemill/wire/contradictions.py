"""What is wrong between fields that are each right by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tidemill.model.fleet import Level
from tidemill.model.spec import Kind, Tier
from tidemill.model.storage import mount_variable
from tidemill.wire.checks import PORT_NAME, shown
from tidemill.wire.fields import PORT_MEND
from tidemill.wire.parts import (
    DataIn,
    ModelIn,
    ResourcesIn,
    VolumeIn,
    default_data_path,
    default_model_path,
    default_volume_path,
)
from tidemill.wire.placement import PlacementIn, impossible_sites
from tidemill.wire.scheduling import Moment, Span
from tidemill.wire.section import problem
from tidemill.wire.service import RolloutIn, ServiceIn, impossible_rollouts, impossible_scaling


def implied_kind(has_array: bool, has_service: bool) -> Kind:
    """The kind of a workload that says none."""
    return Kind.ARRAY if has_array else Kind.SERVICE if has_service else Kind.TASK


def contradictions(given: set[str], spec: Any, now: int) -> Iterator[dict[str, Any]]:
    """What is wrong between fields. ``spec`` has the fields as attributes; of a wrong one, only that it is given."""
    kind = spec.kind or implied_kind(spec.array is not None, spec.service is not None)
    if spec.env is not None and spec.image:
        yield problem("image", spec.image, "A job has an env or an image, not both.", "Leave one of them out.")
    if kind != "dev" and ("run" not in given or (type(spec.run) is str and not spec.run.strip())):
        yield problem("run", "", f"A workload of kind {kind} needs run.", "Write the command to execute.")
    if spec.array is not None and kind != "array":
        yield problem("array", None, f"A workload of kind {kind} has no array.", "Write kind: array.")
    if spec.array is None and kind == "array":
        yield problem("array", None, "An array needs its size.", "Write for example array: 10.")
    if spec.service is not None and kind != "service":
        yield problem("service", None, f"A workload of kind {kind} has no service.", "Write kind: service.")
    if isinstance(spec.service, ServiceIn) and type(spec.ports) is tuple:
        wanted = spec.service.port
        known = [port.name for port in spec.ports] + [port.number for port in spec.ports if port.number]
        if known and wanted is not None and wanted not in known:
            names = ", ".join(str(port.name) for port in spec.ports)
            yield problem("service.port", wanted, f"{shown(wanted)} is not among ports.", f"Ports are {names}.")
        elif not known and isinstance(wanted, str) and not PORT_NAME.fullmatch(wanted):
            yield problem("service.port", wanted, f"{shown(wanted)} is not a name of a port.", PORT_MEND)
    if isinstance(spec.service, ServiceIn) and isinstance(spec.service.rollout, RolloutIn):
        yield from impossible_rollouts(spec.service.rollout)
    if isinstance(spec.service, ServiceIn):
        if spec.service.guards and spec.service.http is True:
            mend = "Leave one of them out."
            yield problem("service.http", True, "Guardrails look at requests to its model, not at all paths.", mend)
        own = spec.service.model or spec.name
        if own and own in spec.service.fallback:
            yield problem("service.fallback", own, "It would fall back to itself.", "Leave that one out.")
        yield from impossible_scaling(spec.service)
    yield from _clashing_mounts(spec)
    yield from _impossible_schedules(spec, kind, now)


def _clashing_mounts(spec: Any) -> Iterator[dict[str, Any]]:
    """Paths that are within each other, and names that would have the same variable."""
    data = [one for one in spec.data if isinstance(one, DataIn)] if type(spec.data) is list else []
    volumes = [one for one in spec.volumes if isinstance(one, VolumeIn)] if type(spec.volumes) is list else []
    mounts = [("data", one.at or default_data_path(one.dataset)) for one in data]
    if isinstance(spec.model, ModelIn):
        mounts.append(("model", spec.model.at or default_model_path(spec.model.reference)))
    mounts += [("volumes", one.at or default_volume_path(one.name)) for one in volumes]
    for index, (field, path) in enumerate(mounts):
        for _, other in mounts[:index]:
            if path == other or path.startswith(other + "/") or other.startswith(path + "/"):
                mend = "Give each a path that is not within another's."
                yield problem(field, path, f"{path} and {other} are in each other's way.", mend)
    named = [("data", mount_variable("DATA", one.dataset.partition(":")[0])) for one in data]
    named += [("volumes", mount_variable("VOLUME", one.name)) for one in volumes]
    for index, (field, variable) in enumerate(named):
        if (field, variable) in named[:index]:
            mend = "Leave one of them out, or submit another workload with it."
            yield problem(field, variable, f"Two would have their paths in {variable}.", mend)


def _impossible_schedules(spec: Any, kind: str, now: int) -> Iterator[dict[str, Any]]:
    nodes, placement = spec.nodes, spec.placement
    if isinstance(nodes, Span) and nodes.smallest < nodes.largest and (spec.group is not None or kind == "service"):
        what = "service" if kind == "service" else "gang in a group"
        yield problem(
            "nodes", f"{nodes.smallest}..{nodes.largest}", f"A {what} cannot be elastic.", f"Write {nodes.largest}."
        )
    after, before = spec.start_after, spec.start_before
    if isinstance(after, Moment) and isinstance(before, Moment) and before.ns and before.at(now) <= after.at(now):
        yield problem("start_before", None, "It is not after start_after.", "Write a later time.")
    if spec.spot is True and spec.capacity not in (None, Tier.SPOT):
        yield problem("spot", True, f"It is spot, and capacity is {spec.capacity}.", "Leave one of them out.")
    if spec.reservation and (spec.spot is True or spec.capacity not in (None, Tier.RESERVED)):
        mend = "Leave capacity and spot out: what names a reservation is reserved."
        yield problem(
            "reservation", spec.reservation, "What runs in a reservation is neither spot nor on_demand.", mend
        )
    if spec.capacity == Tier.RESERVED and not spec.reservation:
        mend = "Write reservation: NAME; see tidemill reserve list."
        yield problem("capacity", "reserved", "It does not say in which reservation.", mend)
    if isinstance(spec.resources, ResourcesIn) and spec.resources.prefer and not spec.resources.any_of:
        mend = "Add any_of, or leave prefer out."
        yield problem("resources.prefer", "speed", "There is nothing to choose from.", mend)
    if isinstance(placement, PlacementIn):
        yield from impossible_sites(placement)
    if isinstance(placement, PlacementIn) and placement.within and placement.spread:
        order = [*Level]
        if order.index(placement.spread) <= order.index(placement.within):
            yield problem(
                "placement.spread",
                placement.spread.value,
                f"Workers cannot stay within one {placement.within} and be spread over several {placement.spread}s.",
                "Spread them over a narrower level, or leave within out.",
            )
