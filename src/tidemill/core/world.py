"""The world that a turn works on: everything that is not over, changed in place, every change undoable.

The driver owns one world. A turn changes it and returns what to store; when the store takes it, ``commit`` keeps
the changes, else ``rollback`` takes the world back to where it was. Versions grow by one per thing and turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from tidemill.core.admission import shape_of
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.meter import Meter, meters_of, shares_of
from tidemill.core.queueing import Line, WaitingLines
from tidemill.core.quota import Held
from tidemill.model.fleet import Node, NodeState, Site
from tidemill.model.ids import AttemptId, JobId, LaunchId, NodeId, ProjectId, WorkloadId
from tidemill.model.job import Allocation, AllocationState, Attempt, Job, JobState, Workload
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Change, Reason
from tidemill.model.tenant import Project

_ABSENT: Final = object()
Entity = TypeVar("Entity", Job, Attempt, Allocation, Node)


class World:
    """State of mind of one control plane: nodes, what waits, what runs, who holds what, what is metered."""

    def __init__(self, *, sites: Iterable[Site], projects: Iterable[Project], rates: RateCard) -> None:
        self.sites = {site.id: site for site in sites}
        self.projects: dict[ProjectId, Project] = {project.id: project for project in projects}
        self.rates = rates
        self.nodes: dict[NodeId, Node] = {}
        self.workloads: dict[WorkloadId, Workload] = {}
        self.jobs: dict[JobId, Job] = {}
        self.live_jobs: dict[WorkloadId, int] = {}
        self.attempts: dict[JobId, Attempt] = {}
        """The live attempt of each job that has one."""
        self.workers: dict[AttemptId, tuple[LaunchId, ...]] = {}
        self.allocations: dict[LaunchId, Allocation] = {}
        self.held: dict[ProjectId, Held] = {}
        self.meters: dict[tuple[NodeId, str], Meter] = {}
        self.fleet = FleetArrays()
        self.queue = WaitingLines(self.is_waiting)
        self.delayed: dict[JobId, int] = {}
        """Jobs that wait for an instant before they queue again."""
        self.timers: list[tuple[int, str, str]] = []
        """A heap of (instant, what, id); what is no longer true when its time comes is passed over."""
        self.metered_ns = 0
        """When all meters were last cut together."""
        self.blocked: dict[Line, int] = {}
        """Lines that did not fit, with the fleet's ``released`` count at that time."""
        self.line_reasons: dict[Line, Reason] = {}
        """Why the head of each line did not start when it was last tried."""
        self.reasons: dict[JobId, Reason] = {}
        self._undo: list[Callable[[], object] | tuple[dict[Any, Any], Any, Any]] = []
        """What to call, or the value that a table had under a key, to take changes back, newest last."""
        self._touched: dict[tuple[str, str], int | None] = {}
        self._latest: dict[tuple[str, str], Any] = {}
        self._fleet_mark = 0
        self._fleet_rebuilt = False

    # -- reading ------------------------------------------------------------------------------------------------

    def is_waiting(self, job_id: JobId) -> bool:
        """Whether a job is queued and may start now."""
        job = self.jobs.get(job_id)
        return job is not None and job.state is JobState.QUEUED and job_id not in self.delayed

    def line_of(self, job: Job) -> Line:
        """The line that a job waits in."""
        spec = self.workloads[job.workload_id].spec
        return Line(job.project_id, shape_of(spec), spec.nodes)

    def workers_of(self, attempt: Attempt) -> tuple[Allocation, ...]:
        """The workers of an attempt that are not confirmed gone."""
        return tuple(
            self.allocations[launch] for launch in self.workers.get(attempt.id, ()) if launch in self.allocations
        )

    def ports_in_use(self, node_id: NodeId) -> set[int]:
        """Ports given to live workers of a node."""
        return {port for held in self.allocations.values() if held.node_id == node_id for _, port in held.ports}

    # -- changing -----------------------------------------------------------------------------------------------

    def update(self, table: dict[Any, Entity], key: Any, entity: Entity, **values: Any) -> Entity:
        """The entity with new values and version, in the world."""
        after = replace(entity, version=self._next_version(entity), **values)
        self._put(table, key, after)
        return after

    def add(self, table: dict[Any, Any], key: Any, entity: Any) -> None:
        """A new entity in the world."""
        mark = (type(entity).__name__, str(entity.id))
        if mark not in self._touched:
            self._touched[mark] = None
        self._put(table, key, entity)

    def set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """A value that is not stored by itself, undoable."""
        self._put(table, key, value)

    def drop(self, table: dict[Any, Any], key: Any) -> None:
        """Take something out of the world, undoable; harmless when it is not there."""
        if key in table:
            self._undo.append((table, key, table.pop(key)))

    def on_undo(self, action: Callable[[], object]) -> None:
        """Remember how to take back a change made elsewhere."""
        self._undo.append(action)

    def set_timer(self, at_ns: int, what: str, identity: str) -> None:
        """Have ``what`` looked at when its time comes. A timer too many is harmless, so none is taken back."""
        heapq.heappush(self.timers, (at_ns, what, identity))

    def due(self, now: int) -> list[tuple[str, str]]:
        """The timers whose time has come, taken off."""
        taken: list[tuple[int, str, str]] = []
        while self.timers and self.timers[0][0] <= now:
            taken.append(heapq.heappop(self.timers))
        if taken:
            self._undo.append(partial(self._set_again, taken))
        return [(what, identity) for _, what, identity in taken]

    # -- one turn -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start recording."""
        self._undo.clear()
        self._touched.clear()
        self._latest.clear()
        self._fleet_mark = self.fleet.checkpoint()
        self._fleet_rebuilt = False
        self.queue.commit()

    def changes(self) -> tuple[Change, ...]:
        """Everything that changed since ``begin``, with the versions assumed, in the order of first change."""
        return tuple(Change(assumed=assumed, after=self._latest[mark]) for mark, assumed in self._touched.items())

    def commit(self) -> None:
        """Keep what changed since ``begin``."""
        self._undo.clear()
        self._touched.clear()
        self.fleet.commit()
        self.queue.commit()

    def rollback(self) -> None:
        """Take back what changed since ``begin``."""
        while self._undo:
            undone = self._undo.pop()
            if callable(undone):
                undone()
                continue
            table, key, before = undone
            if before is _ABSENT:
                table.pop(key, None)
            else:
                table[key] = before
        self._touched.clear()
        self.queue.rollback()
        if self._fleet_rebuilt:
            self.rebuild_fleet()
        else:
            self.fleet.rollback(self._fleet_mark)
        self.blocked.clear()

    # -- holding and releasing ----------------------------------------------------------------------------------

    def hold(self, allocation: Allocation) -> None:
        """Count an allocation whose room is taken from the fleet already, against its project and on its meters."""
        held = self.held.setdefault(allocation.project_id, Held())
        gpu = sum(share.milli for share in allocation.devices)
        held.gpu_milli += gpu
        held.cpu_milli += allocation.cpu_milli
        self._undo.append(lambda: self._unhold(held, gpu, allocation.cpu_milli))
        for name, holder in shares_of(allocation):
            meter = self.meters.get((allocation.node_id, name))
            if meter is not None:
                meter.holders[allocation.id] = holder
                self._undo.append(partial(meter.holders.pop, allocation.id, None))

    def let_go(self, allocation: Allocation) -> None:
        """The reverse of ``hold``, and the room given back to the fleet."""
        held = self.held.setdefault(allocation.project_id, Held())
        gpu = sum(share.milli for share in allocation.devices)
        self._unhold(held, gpu, allocation.cpu_milli)
        self._undo.append(lambda: self._unhold(held, -gpu, -allocation.cpu_milli))
        for name, _ in shares_of(allocation):
            meter = self.meters.get((allocation.node_id, name))
            if meter is not None and allocation.id in meter.holders:
                holder = meter.holders.pop(allocation.id)
                self._undo.append(partial(meter.holders.__setitem__, allocation.id, holder))
        self.fleet.give(
            allocation.node_id,
            cpu_milli=allocation.cpu_milli,
            memory_bytes=allocation.memory_bytes,
            devices=allocation.devices,
        )

    def metered(self, now: int) -> None:
        """Note that all meters are cut together now."""
        before = self.metered_ns
        self._undo.append(lambda: setattr(self, "metered_ns", before))
        self.metered_ns = now

    def watch_meter(self, meter: Meter) -> None:
        """Remember a meter as it is before it is cut or read."""
        since, counter, latest = meter.since_ns, meter.counter_mj, meter.latest_mj

        def restore() -> None:
            meter.since_ns, meter.counter_mj, meter.latest_mj = since, counter, latest

        self._undo.append(restore)

    def rebuild_fleet(self) -> None:
        """Lay the fleet's columns anew from the nodes and what is held; a rollback does so again."""
        self.fleet.rebuild([node for node in self.nodes.values() if node.state is not NodeState.LOST])
        for allocation in self.allocations.values():
            if allocation.node_id in self.fleet.row:
                self.fleet.take(
                    allocation.node_id,
                    cpu_milli=allocation.cpu_milli,
                    memory_bytes=allocation.memory_bytes,
                    devices=tuple(
                        share
                        for share in allocation.devices
                        if share.device_id in {device.id for device in self.nodes[allocation.node_id].devices}
                    ),
                )
        self.fleet.commit()
        self._fleet_mark = 0
        self._fleet_rebuilt = True
        self.blocked.clear()

    def open_meters(self, node: Node, *, now: int) -> None:
        """Meters for a node that joined, with their holders; those it has already stay as they are."""
        for meter in meters_of(node, now=now):
            key = (node.id, meter.name)
            if key not in self.meters:
                self._put(self.meters, key, meter)
        for allocation in self.allocations.values():
            if allocation.node_id == node.id and allocation.state is not AllocationState.RELEASED:
                for name, holder in shares_of(allocation):
                    existing = self.meters.get((node.id, name))
                    if existing is not None and allocation.id not in existing.holders:
                        existing.holders[allocation.id] = holder

    # -- inside -------------------------------------------------------------------------------------------------

    def _next_version(self, entity: Job | Attempt | Allocation | Node) -> int:
        mark = (type(entity).__name__, str(entity.id))
        if mark not in self._touched:
            self._touched[mark] = entity.version
        assumed = self._touched[mark]
        return 1 if assumed is None else assumed + 1

    def _put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self._undo.append((table, key, table.get(key, _ABSENT)))
        table[key] = value
        identity = getattr(value, "id", None)
        if isinstance(identity, str):
            mark = (type(value).__name__, identity)
            if mark in self._touched:
                self._latest[mark] = value

    def _set_again(self, timers: list[tuple[int, str, str]]) -> None:
        for timer in timers:
            heapq.heappush(self.timers, timer)

    @staticmethod
    def _unhold(held: Held, gpu_milli: int, cpu_milli: int) -> None:
        held.gpu_milli -= gpu_milli
        held.cpu_milli -= cpu_milli
