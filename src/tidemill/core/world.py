"""The world that a turn works on: everything that is not over, changed in place, every change undoable.

The driver owns one world. A turn changes it and returns what to store; when the store takes it, ``commit`` keeps
the changes, else ``rollback`` takes the world back to where it was. Versions grow by one per thing and turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from tidemill.core.copying import Copies, data_key
from tidemill.core.feasible import Shape, fitting
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.held import HeldArrays
from tidemill.core.meter import Meter, meters_held, meters_of, shares_of
from tidemill.core.ordering import Forgets, JobFacts, Learns, OrderPolicy
from tidemill.core.place import Kept, Placed, gang_of, want_of
from tidemill.core.plugins import FAIR, order_named, score_named
from tidemill.core.preempt import TIERS
from tidemill.core.queueing import Line, WaitingLines
from tidemill.core.quota import QuotaTree
from tidemill.core.rating import card_of
from tidemill.core.reserve import HeldBack
from tidemill.core.score import Score
from tidemill.model.fleet import DeliveryMark, Device, Node, NodeState, Site
from tidemill.model.ids import (
    AttemptId,
    DeviceId,
    JobId,
    LaunchId,
    NodeId,
    OutpostId,
    PrincipalId,
    ProjectId,
    QueueId,
    ReservationId,
    RolloutId,
    SiteId,
    WorkloadId,
)
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Job, JobState, Workload
from tidemill.model.ledger import Holder, RateCard
from tidemill.model.plan import Change, Reason
from tidemill.model.policy import Policy
from tidemill.model.queue import CPU, GPU, MEMORY, Queue, QueueUsage
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.units import MILLI

_ABSENT: Final = object()
RECONSIDER: Final = -1
"""In ``World.blocked``: the line did not fit, but the plan that others were kept clear of is another one now."""
_MIX_FIRST: Final = 512
_MIX_EVERY: Final = 4_096
"""After how many requests the placement policy is told of the mix: soon at first, each time after twice as many."""
_MIX_HALF: Final = 5_000
"""After how many requests older ones count for half: less memory would let noise pass for change."""
_MIX_LEAST: Final = 0.01
Entity = TypeVar("Entity", Job, Attempt, Allocation, Node, DeliveryMark, Queue, QueueUsage, Reservation, Rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Places taken for a job that waits until the workers in ``waits_for`` are gone.

    ``together`` are the jobs that start at the same moment, itself among them: each has its promise, or none has.
    """

    job_id: JobId
    line: Line
    placed: Placed
    waits_for: tuple[LaunchId, ...]
    together: tuple[JobId, ...]


def _restore(readings: list[tuple[Meter, int, int | None, int | None, int, int]]) -> None:
    for meter, since, counter, latest, read, others in readings:
        meter.since_ns, meter.counter_mj, meter.latest_mj, meter.read_ns = since, counter, latest, read
        meter.others_milli = others


def line_of(workload: Workload) -> Line:
    """The line that the jobs of a workload wait in: they are interchangeable with all others there."""
    spec = workload.spec
    return Line(
        project_id=workload.project_id,
        principal_id=workload.principal_id,
        gang=gang_of(spec),
        tier=spec.tier,
        duration_ns=spec.max_duration_ns,
        reservation=spec.reservation,
        apart=spec.placement.apart,
        group=spec.group.name if spec.group else "",
        data=data_key(spec),
        weigh=spec.placement.weigh,
        near=spec.placement.near,
    )


class World:
    """State of mind of one control plane: nodes, what waits, what runs, who holds what, what is metered."""

    def __init__(
        self, *, sites: Iterable[Site], projects: Iterable[Project], rates: RateCard, policy: Policy | None = None
    ) -> None:
        policy = policy or Policy()
        self.sites = {site.id: site for site in sites}
        self.projects: dict[ProjectId, Project] = {project.id: project for project in projects}
        self.rates = rates
        self._cards: dict[SiteId, tuple[Site, RateCard, dict[str, int]]] = {}
        """The rate card of each site, as it is described now."""
        self.nodes: dict[NodeId, Node] = {}
        self.workloads: dict[WorkloadId, Workload] = {}
        self.jobs: dict[JobId, Job] = {}
        self.live_jobs: dict[WorkloadId, int] = {}
        self.attempts: dict[JobId, Attempt] = {}
        """The live attempt of each job that has one."""
        self.workers: dict[AttemptId, tuple[LaunchId, ...]] = {}
        self.unstarted: dict[AttemptId, int] = {}
        """Of the workers of an attempt that starts, as many from the first on have started, or are past that."""
        self.allocations: dict[LaunchId, Allocation] = {}
        self.by_node: dict[NodeId, dict[LaunchId, None]] = {}
        self.queues: dict[QueueId, Queue] = {}
        self.usages: dict[str, QueueUsage] = {}
        self.deliveries: dict[OutpostId, DeliveryMark] = {}
        self.reservations: dict[ReservationId, Reservation] = {}
        """Those that were not cancelled."""
        self.quota = QuotaTree(half_life_ns=policy.half_life_ns)
        for project in self.projects.values():
            self.quota.open_project(project)
        self.order: OrderPolicy = order_named(policy.order)
        self._learner = self.order if isinstance(self.order, Learns) else None
        self._forgetter = self.order if isinstance(self.order, Forgets) else None
        self.score: Score = score_named(policy.score)
        self.meters: dict[tuple[NodeId, str], Meter] = {}
        self.fleet = FleetArrays()
        self._is_laid = True
        self._rows = HeldArrays()
        self.queue = WaitingLines(
            self.is_waiting,
            self.quota if self.order is FAIR else None,  # an order plug-in ranks all together
            amounts_of=self.amounts_of,
            ageing_ns=policy.ageing_ns,
            patience_ns=policy.patience_ns,
        )
        self.delayed: dict[JobId, int] = {}
        """Jobs that wait for an instant before they queue again."""
        self.parked: dict[JobId, Reason] = {}
        """Jobs that wait for something else than room: another workload, the rest of their array or group."""
        self.services: dict[WorkloadId, None] = {}
        self.rollouts: dict[RolloutId, Rollout] = {}
        """Those that are not over."""
        self.updating: dict[WorkloadId, RolloutId] = {}
        """The rollout that says how many replicas a revision of a service has, of both that it is about."""
        self.promises: dict[JobId, Promise] = {}
        self.held_back: HeldBack | None = None
        """The plan of the first blocked job."""
        self._kept: tuple[tuple[tuple[Line, Placed], ...], Kept] | None = None
        self._models: dict[NodeId, tuple[tuple[Device, ...], dict[DeviceId, str]]] = {}
        self.groups: dict[tuple[ProjectId, str], tuple[JobId, ...]] = {}
        """Queued jobs of each group, in order of submission."""
        self.dependents: dict[WorkloadId, tuple[WorkloadId, ...]] = {}
        self.outcomes: dict[WorkloadId, bool] = {}
        """Whether workloads that ended lately ended well."""
        self.unlucky: dict[WorkloadId, int] = {}
        """How many jobs of a live workload ended other than well."""
        self.compared_ns = 0
        self.growable: dict[JobId, tuple[int, int] | None] = {}
        """Elastic gangs that are smaller than they could be, with the signs (how much was released, how often lines
        were opened otherwise) by which each was last offered more; None when it never was."""
        self.timers: list[tuple[int, str, str]] = []
        """A heap of (instant, what, id); what is no longer true when its time comes is passed over."""
        self._set_timers: set[tuple[int, str, str]] = set()
        self.compare_at_ns = 0
        """When an order plug-in's ranks are compared next though nothing happens."""
        self.uses: dict[tuple[NodeId, str], tuple[int, int]] = {}
        """How busy devices were of late: when that was seen, and thousandths of the time."""
        self.metered_ns = 0
        """When all meters were last cut together."""
        self.blocked: dict[Line, int] = {}
        """Lines that did not fit, with the fleet's ``released`` count at that time."""
        self.reopened_ns = 0
        """When every line was last tried again whatever its chances."""
        self.overdue: list[Line] = []
        """Lines that were not tried for a while and are next."""
        self.reopenings = 0
        """How often lines were opened for another reason than room."""
        self.settled = (-1, -1, -1)
        """The signs that the last pass went by which closed every line: nothing opens while they stay the same."""
        self.eyeing: dict[Line, None] = {}
        """Lines that may displace somebody who has not run long enough yet."""
        self.copies: dict[tuple[str, ...], Copies] = {}
        """What data takes to be brought to each site, by ``Line.data``."""
        self.cached: dict[NodeId, frozenset[str]] = {}
        """The data sets of which a node has a copy, as ``project/manifest``."""
        self.copies_changed = 0
        """How often what ``copies_of`` says may have changed."""
        self.ports: dict[NodeId, dict[int, int]] = {}
        """How often each port of a node is given to live workers."""
        self.behind: dict[Line, tuple[JobId, bool, int]] = {}
        """Whether each line waits only for the plan of that job, and until when that is taken to hold."""
        self.line_reasons: dict[Line, Reason] = {}
        """Why the head of each line did not start when it was last tried."""
        self.reasons: dict[JobId, Reason] = {}
        self._undo: list[Callable[[], object] | tuple[dict[Any, Any], Any, Any]] = []
        """What to call, or the value that a table had under a key, to take changes back, newest last."""
        self._lines: dict[WorkloadId, Line] = {}
        self._noted: list[tuple[JobFacts, bool]] = []
        """What an order plug-in that learns is told when this turn is stored."""
        self._ranks: dict[JobId, float] = {}
        self._gang_ranks: NDArray[np.float64] = np.zeros(0)
        self._gone: list[JobId] = []
        self._asked: list[tuple[Shape, int]] = []
        """What the workloads of this turn ask for, and how often."""
        self._mix: dict[Shape, float] = {}
        self._mix_count = 0
        self._mix_due = _MIX_FIRST
        self._changed: dict[tuple[type, str], tuple[int | None, Any]] = {}
        """What changed in this turn: the version that the change assumes, None of something new, and what it is now."""
        self._fleet_mark = 0
        self._fleet_rebuilt = False

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> HeldArrays:
        """Who holds what, as columns."""
        self._rows.settle()
        return self._rows

    def is_waiting(self, job_id: JobId) -> bool:
        """Whether a job is queued and may start now."""
        job = self.jobs.get(job_id)
        return (
            job is not None
            and job.state is JobState.QUEUED
            and job_id not in self.delayed
            and job_id not in self.parked
            and job_id not in self.promises
        )

    def line_of(self, job: Job) -> Line:
        """The line that a job waits in."""
        line = self._lines.get(job.workload_id)
        if line is None:
            line = self.line_of_workload(self.workloads[job.workload_id])
        return replace(line, group="") if line.group and job.attempts else line  # later attempts are made alone

    def line_of_workload(self, workload: Workload) -> Line:
        """The line that the jobs of a workload wait in."""
        line = self._lines.get(workload.id)
        if line is None:
            line = line_of(workload)
            if workload.id in self.workloads:
                self._lines[workload.id] = line
        return line

    def queue_up(self, job: Job) -> None:
        """Let a job wait for room."""
        rank = None if self.order is FAIR else self.order.rank(self.job_facts(job, now=0), now=0)
        line = self.line_of(job)
        self.queue.add(line, job, rank, since_ns=job.waiting_since_ns or job.submitted_ns)
        if line in self.blocked and self.queue.head(line) == job.id:
            del self.blocked[line]  # it may be entitled to what the one before it was not

    def workers_of(self, attempt: Attempt) -> tuple[Allocation, ...]:
        """The workers of an attempt that are not confirmed gone."""
        return tuple(
            self.allocations[launch] for launch in self.workers.get(attempt.id, ()) if launch in self.allocations
        )

    def answering(self, attempt: Attempt | None) -> Allocation | None:
        """The worker that answers for a replica of a service; None while not all of its workers run and it is ready."""
        if attempt is None or attempt.state is not AttemptState.RUNNING:
            return None
        workers = (self.allocations.get(launch) for launch in self.workers.get(attempt.id, ()))
        return next((worker for worker in workers if worker is not None and worker.endpoint), None)

    def has_workers(self, job: Job) -> bool:
        """Whether a worker of the job's attempt is not confirmed gone."""
        return self._rows.has(job.id)

    def all_started(self, attempt: Attempt) -> bool:
        """Whether no worker of an attempt is still to start; each is looked at once while they start in any order."""
        launches = self.workers.get(attempt.id, ())
        first = at = self.unstarted.get(attempt.id, 0)
        pending = (AllocationState.RESERVED, AllocationState.PREPARING)
        while at < len(launches) and (
            (held := self.allocations.get(launches[at])) is None or held.state not in pending
        ):
            at += 1
        if at != first:
            self.set(self.unstarted, attempt.id, at)
        return at == len(launches)

    def amounts_of(self, line: Line, placed: Placed | None = None) -> dict[str, int]:
        """What a gang of the line takes at its smallest, or in these places, per device model, ``cpu`` and ``memory``.

        Before it has places, GPUs count under the name asked for; any GPU under the empty name.
        """
        gang = line.gang
        workers = gang.smallest if placed is None else len(placed.places)
        resources = gang.choices[0 if placed is None else placed.choice].resources
        amounts = {CPU: resources.cpu_milli * workers, MEMORY: resources.memory_bytes * workers}
        if placed is None:
            if resources.gpus is not None:
                request = resources.gpus
                amounts[f"{GPU}:{request.model}" if request.model else GPU] = request.total_milli * workers
            return amounts
        for place in placed.places:
            for share in place.devices:
                model = self._models_on(place.node_id).get(share.device_id, "")
                amounts[model] = amounts.get(model, 0) + share.milli
        return amounts

    def amounts_held(self, allocation: Allocation) -> dict[str, int]:
        """What one worker holds, per device model, ``cpu`` and ``memory``."""
        amounts = {CPU: allocation.cpu_milli, MEMORY: allocation.memory_bytes}
        if allocation.devices and allocation.node_id in self.nodes:
            models = self._models_on(allocation.node_id)
            for share in allocation.devices:
                model = models.get(share.device_id, "")
                amounts[model] = amounts.get(model, 0) + share.milli
        return amounts

    def _models_on(self, node_id: NodeId) -> dict[DeviceId, str]:
        """The model of each device of a node."""
        devices = self.nodes[node_id].devices
        known = self._models.get(node_id)
        if known is None or known[0] is not devices:
            known = self._models[node_id] = (devices, {device.id: device.model for device in devices})
        return known[1]

    def card_of(self, site_id: SiteId) -> RateCard:
        """The rate card of a site; the installation's for one that is not known."""
        return self._card(self.sites[site_id])[1] if site_id in self.sites else self.rates

    def prices_at(self, site_id: SiteId) -> dict[str, int]:
        """The price of a unit-hour of each resource at a site, in micro-USD."""
        return self._card(self.sites[site_id])[2]

    def card_and_prices(self, site: Site) -> tuple[str, dict[str, int]]:
        """The id of a site's rate card, and its prices."""
        _, card, prices = self._card(site)
        return card.id, prices

    def _card(self, site: Site) -> tuple[Site, RateCard, dict[str, int]]:
        known = self._cards.get(site.id)
        if known is None or known[0] is not site:
            card = card_of(self.rates, site)
            known = self._cards[site.id] = (site, card, card.by_resource())
        return known

    def job_facts(self, job: Job, *, now: int) -> JobFacts:
        """What an order plug-in may know of a job."""
        workload = self.workloads[job.workload_id]
        spec = workload.spec
        attempt = self.attempts.get(job.id)
        running = attempt is not None and attempt.started_ns > 0
        gpus = spec.resources.gpus.total_milli * spec.nodes if spec.resources.gpus else 0
        ran = now - attempt.started_ns if attempt is not None and running else 0
        party = self.quota.queue_of(job.project_id)
        return JobFacts(
            id=job.id,
            kin=f"{workload.principal_id}/{spec.name}/{gpus}",
            tenant=job.project_id,
            submitted_ns=job.submitted_ns,
            gpu_milli=gpus,
            attained_ns=max(job.served_ns + ran, 0),
            running=running,
            since_ns=attempt.started_ns
            if attempt is not None and running
            else job.waiting_since_ns or job.submitted_ns,
            expected_ns=spec.expected_duration_ns or spec.max_duration_ns or None,
            weight=party.weight_milli / MILLI if party is not None else 1.0,
        )

    def running_rank(self, job: Job, *, now: int) -> float:
        """What the order plug-in thinks of a running job; asked once a turn, for it learns only between turns."""
        rank = self._ranks.get(job.id)
        if rank is None:
            rank = self._ranks[job.id] = self.order.rank(self.job_facts(job, now=now), now=now)
        return rank

    def running_ranks(self, now: int) -> NDArray[np.float64]:
        """The same for whoever runs, by number of the gang in ``rows``, shape (G,); 0 for those that do not."""
        if len(self._gang_ranks) != len(self.rows.jobs):
            jobs, attempts = self.jobs, self.attempts
            self._gang_ranks = np.array([
                self.running_rank(jobs[one], now=now)
                if one in jobs and (attempt := attempts.get(one)) is not None and attempt.started_ns
                else 0.0
                for one in self.rows.jobs
            ])  # fmt: skip
        return self._gang_ranks

    def is_in_window(self, job: Job, *, now: int) -> bool:
        """Whether a job runs in its own reservation while that lasts."""
        spec = self.workloads[job.workload_id].spec
        return any(
            (reservation.name, reservation.project_id) == (spec.reservation, job.project_id)
            and (window := reservation.window(after=now)) is not None
            and window[0] <= now
            for reservation in self.reservations.values()
        )

    # -- changing -----------------------------------------------------------------------------------------------

    def update(self, table: dict[Any, Entity], key: Any, entity: Entity, **values: Any) -> Entity:
        """The entity with new values and version, in the world."""
        mark = (type(entity), entity.id)
        changed = self._changed.get(mark)
        assumed = changed[0] if changed is not None else entity.version
        after = replace(entity, version=1 if assumed is None else assumed + 1, **values)
        self._changed[mark] = (assumed, after)
        self.set(table, key, after)
        return after

    def add(self, table: dict[Any, Any], key: Any, entity: Any) -> None:
        """A new entity in the world."""
        mark = (type(entity), entity.id)
        changed = self._changed.get(mark)
        self._changed[mark] = (changed[0] if changed is not None else None, entity)
        self.set(table, key, entity)

    def set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """A value that is not stored by itself, undoable."""
        self._undo.append((table, key, table.get(key, _ABSENT)))
        table[key] = value

    def drop(self, table: dict[Any, Any], key: Any) -> None:
        """Take something out of the world, undoable; harmless when it is not there."""
        if key in table:
            self._undo.append((table, key, table.pop(key)))

    def on_undo(self, action: Callable[[], object]) -> None:
        """Remember how to take back a change made elsewhere."""
        self._undo.append(action)

    def forget(self, workload_id: WorkloadId) -> None:
        """Drop a workload that is over."""
        self.drop(self.live_jobs, workload_id)
        self.drop(self.services, workload_id)
        self.drop(self.workloads, workload_id)
        self.drop(self.unlucky, workload_id)
        line = self._lines.pop(workload_id, None)
        if line is not None and not self.queue.has(line):
            self.line_reasons.pop(line, None)
            self.behind.pop(line, None)
            self.blocked.pop(line, None)

    def note(self, job: Job, *, now: int, finished: bool = False) -> None:
        """Have an order plug-in that learns told of a job, when this turn is stored."""
        if self._learner is not None:
            self._noted.append((self.job_facts(job, now=now), finished))

    def note_gone(self, job: Job) -> None:
        """Have an order plug-in told, when this turn is stored, of a job that will not end by itself."""
        if self._forgetter is not None:
            self._gone.append(job.id)

    def ask(self, workload: Workload) -> None:
        """Count what a workload asks for among what is typically asked, when this turn is stored."""
        spec = workload.spec
        shape = self.line_of_workload(workload).gang.choices[0]
        self._asked.append((shape, spec.nodes * spec.job_count))

    def _learn_mix(self) -> None:
        """Tell the placement policy what is typically asked for; older requests count for less each time."""
        fleet = self.fleet
        self.score.learn([(want_of(shape, fitting(fleet, shape)), count) for shape, count in self._mix.items()])
        fade = 0.5 ** (self._mix_count / _MIX_HALF)
        self._mix = {shape: faded for shape, count in self._mix.items() if (faded := count * fade) >= _MIX_LEAST}
        self._mix_count = 0
        self._mix_due = min(2 * self._mix_due, _MIX_EVERY)

    @property
    def has_learned(self) -> bool:
        """Whether an order plug-in will learn from a job that ended in this turn."""
        return any(finished for _, finished in self._noted)

    def rerank(self) -> None:
        """Rank waiting jobs anew, by what an order plug-in has learned since."""
        for job_id in self.queue.members():
            job = self.jobs[job_id]
            self.queue.remove(self.line_of(job), job_id)
            self.queue_up(job)

    def set_timer(self, at_ns: int, what: str, identity: str) -> None:
        """Have ``what`` looked at when its time comes. A timer too many is harmless, so none is taken back."""
        timer = (at_ns, what, identity)
        if timer not in self._set_timers:
            self._set_timers.add(timer)
            heapq.heappush(self.timers, timer)

    def due(self, now: int) -> list[tuple[str, str]]:
        """The timers whose time has come, taken off."""
        taken: list[tuple[int, str, str]] = []
        while self.timers and self.timers[0][0] <= now:
            taken.append(heapq.heappop(self.timers))
        if taken:
            self._set_timers.difference_update(taken)
            self._undo.append(partial(self._set_again, taken))
        return [(what, identity) for _, what, identity in taken]

    # -- one turn -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start recording."""
        self._undo.clear()
        self._noted.clear()
        self._gone.clear()
        self._ranks.clear()
        self._gang_ranks = np.zeros(0)
        self._asked.clear()
        self._changed.clear()
        self._fleet_mark = self.fleet.checkpoint()
        self._fleet_rebuilt = False
        self.queue.commit()

    def changes(self) -> tuple[Change, ...]:
        """Everything that changed since ``begin``, with the versions assumed, in the order of first change."""
        return tuple([Change(assumed=assumed, after=after) for assumed, after in self._changed.values()])

    def commit(self) -> None:
        """Keep what changed since ``begin``, and let an order plug-in that learns know of it."""
        if self._learner is not None:
            for facts, finished in self._noted:
                self._learner.note(facts, finished=finished)
        if self._forgetter is not None:
            for job_id in self._gone:
                self._forgetter.forget(job_id)
        for shape, count in self._asked:
            self._mix[shape] = self._mix.get(shape, 0.0) + count
            self._mix_count += count
        if self._mix_count >= self._mix_due:
            self._learn_mix()
        self._undo.clear()
        self._changed.clear()
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
        self._changed.clear()
        self.queue.rollback()
        if self._fleet_rebuilt:
            self.rebuild_fleet()
            self.lay_fleet()
        else:
            self.fleet.rollback(self._fleet_mark)
        self.behind.clear()
        self.line_reasons.clear()
        self.reopen()

    # -- holding and releasing ----------------------------------------------------------------------------------

    def hold(self, allocation: Allocation) -> None:
        """Count an allocation whose room is taken from the fleet already, against its queue and on its meters."""
        self.account(allocation)
        self._rows.add(allocation, self.fleet, **self._row_values(allocation))
        self._undo.append(partial(self._unhold, allocation))

    def account(self, allocation: Allocation) -> None:
        """As ``hold``, for one that has its row since the fleet was laid. Not undone."""
        self._count(allocation, 1)
        node_id, launch, meters = allocation.node_id, allocation.id, self.meters
        for name, holder in shares_of(allocation):
            meter = meters.get((node_id, name))
            if meter is not None:
                meter.holders[launch] = holder

    def _unhold(self, allocation: Allocation) -> None:
        self._rows.remove(allocation.id)
        for name in meters_held(allocation):
            meter = self.meters.get((allocation.node_id, name))
            if meter is not None:
                meter.holders.pop(allocation.id, None)
        self._count(allocation, -1)

    def let_go(self, allocation: Allocation) -> None:
        """The reverse of ``hold``, and the room given back to the fleet."""
        self._count(allocation, -1)
        node_id, launch = allocation.node_id, allocation.id
        let_go: list[tuple[dict[LaunchId, Holder], Holder]] = []
        for name in meters_held(allocation):
            meter = self.meters.get((node_id, name))
            if meter is not None and (holder := meter.holders.pop(launch, None)) is not None:
                let_go.append((meter.holders, holder))
        self._undo.append(partial(self._hold_again, allocation, let_go, self._rows.remove(launch)))
        self.fleet.give(
            allocation.node_id,
            cpu_milli=allocation.cpu_milli,
            memory_bytes=allocation.memory_bytes,
            devices=allocation.devices,
        )

    def _hold_again(
        self,
        allocation: Allocation,
        let_go: list[tuple[dict[LaunchId, Holder], Holder]],
        put_back: Callable[[], object] | None,
    ) -> None:
        if put_back is not None:
            put_back()
        for holders, holder in let_go:
            holders[allocation.id] = holder
        self._count(allocation, 1)

    def promise(self, promise: Promise) -> None:
        """Take places for a job before they are free, and count them against its queue."""
        self.take(promise.line, promise.placed)
        self._count_promise(promise, 1)
        self._undo.append(partial(self._count_promise, promise, -1))
        self.set(self.promises, promise.job_id, promise)

    def unpromise(self, promise: Promise, *, give: bool) -> None:
        """The reverse of ``promise``; without ``give`` the room stays taken, for who it was promised to starts."""
        self.drop(self.promises, promise.job_id)
        self._count_promise(promise, -1)
        self._undo.append(partial(self._count_promise, promise, 1))
        if give:
            self.give(promise.line, promise.placed)

    def _count_promise(self, promise: Promise, sign: int) -> None:
        amounts = self.amounts_of(promise.line, promise.placed)
        change = self.quota.hold if sign > 0 else self.quota.release
        change(promise.line.project_id, promise.line.principal_id, amounts, 1)

    def line_up(self, project_id: ProjectId, jobs: int) -> None:
        """Count jobs that begin (or, below zero, cease) to be queued, against their queue."""
        self.quota.line_up(project_id, jobs)
        self._undo.append(partial(self.quota.line_up, project_id, -jobs))

    def mark_row(self, launch: LaunchId, column: str, value: int) -> None:
        """Note something about a worker that holds, undoable."""
        if (unmark := self._rows.mark(launch, column, value)) is not None:
            self._undo.append(unmark)

    def take(self, line: Line, placed: Placed) -> None:
        """Take the room of places from the fleet, whether it is free already or will be."""
        resources = line.gang.choices[placed.choice].resources
        for place in placed.places:
            self.fleet.take(
                place.node_id, cpu_milli=resources.cpu_milli, memory_bytes=resources.memory_bytes, devices=place.devices
            )

    def give(self, line: Line, placed: Placed) -> None:
        """The reverse of ``take``."""
        resources = line.gang.choices[placed.choice].resources
        for place in placed.places:
            self.fleet.give(
                place.node_id, cpu_milli=resources.cpu_milli, memory_bytes=resources.memory_bytes, devices=place.devices
            )

    def give_quietly(self, line: Line, placed: Placed) -> None:
        """Give back what was taken in this turn, or only kept: no room was made by it."""
        released = self.fleet.released
        self.give(line, placed)
        self.fleet.released = released

    def give_beyond(self, line: Line, placed: Placed, within: Placed) -> None:
        """Give back those of the places taken in this turn that are not among the first, which are kept."""
        if within is not placed:
            self.give_quietly(line, replace(placed, places=placed.places[len(within.places) :]))

    def reopen(self) -> None:
        """Have every line tried again: something other than room changed."""
        self.blocked.clear()
        self.eyeing.clear()
        self.overdue.clear()
        self.reopenings += 1

    def reopen_eyeing(self) -> None:
        """Have those lines tried again that may displace somebody who had not run long enough."""
        self.reopen_lines(self.eyeing)
        self.eyeing.clear()

    def reopen_lines(self, lines: Iterable[Line]) -> None:
        """Have these lines tried again."""
        for line in lines:
            self.blocked.pop(line, None)
        self.reopenings += 1

    def reconsider(self) -> None:
        """Have every line looked at again, and tried if there may be room for it."""
        self.blocked.update(dict.fromkeys(self.blocked, RECONSIDER))
        self.reopenings += 1

    def refresh_readiness(self) -> None:
        """Nodes were marked: what may be placed where has changed."""
        self.rebuild_fleet()

    def copies_are_new(self) -> None:
        """What data takes to be brought somewhere may have changed: every line is tried again."""
        self.copies_changed += 1
        self.reopen()

    def set_compared(self, now: int) -> None:
        """Note when an order plug-in last compared waiting jobs with running ones."""
        before = self.compared_ns
        self._undo.append(lambda: setattr(self, "compared_ns", before))
        self.compared_ns = now

    def keep_usages(self) -> None:
        """Have what fair share remembers stored, as it stands now."""
        for usage in self.quota.usages():
            known = self.usages.get(usage.id)
            if known is None:
                self.add(self.usages, usage.id, replace(usage, version=1))
            elif known.taken != usage.taken:
                self.update(self.usages, usage.id, known, at_ns=usage.at_ns, taken=usage.taken)

    def hold_back(self, plan: HeldBack | None) -> None:
        """Remember the plan of the first blocked job. What was closed under another plan is looked at again."""
        before = self.held_back
        self._undo.append(lambda: setattr(self, "held_back", before))
        self.held_back = plan
        if (before.parts if before else None) != (plan.parts if plan else None):
            self.reconsider()

    def kept_beside(self, plan: HeldBack) -> Kept:
        """The places of a plan as something to look past."""
        known = self._kept
        if known is None or known[0] is not plan.parts or known[1].layouts != self.fleet.layouts:
            parts = [(line.gang.choices[placed.choice].resources, placed) for line, placed in plan.parts]
            known = self._kept = (plan.parts, Kept(self.fleet, parts))
        return known[1]

    def take_plan(self, plan: HeldBack) -> None:
        """Keep the places of a plan from others, for a part of a turn."""
        for line, placed in plan.parts:
            self.take(line, placed)

    def give_plan(self, plan: HeldBack) -> None:
        """The reverse of ``take_plan``."""
        for line, placed in plan.parts:
            self.give_quietly(line, placed)

    def _count(self, allocation: Allocation, sign: int) -> None:
        """Count what is held: against the queue and its user, on the node, at its ports."""
        job = self.jobs.get(allocation.job_id)
        principal = self.workloads[job.workload_id].principal_id if job is not None else PrincipalId("")
        amounts = self.amounts_held(allocation)
        jobs = 1 if allocation.rank == 0 else 0
        if sign > 0:
            self.quota.hold(allocation.project_id, principal, amounts, jobs)
            self.by_node.setdefault(allocation.node_id, {})[allocation.id] = None
        else:
            self.quota.release(allocation.project_id, principal, amounts, jobs)
            self.by_node[allocation.node_id].pop(allocation.id, None)
        for _, port in allocation.ports:
            ports = self.ports.setdefault(allocation.node_id, {})
            ports[port] = ports.get(port, 0) + sign
            if not ports[port]:
                del ports[port]

    def _row_values(self, allocation: Allocation) -> dict[str, int]:
        """What ``rows`` remembers of a worker beside what the allocation says."""
        job = self.jobs.get(allocation.job_id)
        attempt = self.attempts.get(allocation.job_id)
        if job is None or attempt is None:
            return {}
        spec = self.workloads[job.workload_id].spec
        drains = allocation.state is AllocationState.DRAINING
        return {
            "since": attempt.started_ns if attempt.state is not AttemptState.STARTING else 0,
            "limit": spec.max_duration_ns,
            "gone": allocation.drain_ns + spec.checkpoint_grace_ns if drains else 0,
            "saved": attempt.checkpoint_ns,
            "tier": TIERS[spec.tier],
            "priority": job.priority,
            "surplus": int(allocation.rank >= spec.smallest and spec.is_elastic),
        }

    def metered(self, now: int) -> None:
        """Note that all meters are cut together now."""
        before = self.metered_ns
        self._undo.append(lambda: setattr(self, "metered_ns", before))
        self.metered_ns = now

    def watch_meters(self, meters: list[Meter]) -> None:
        """Remember some meters as they are before they are read or noted on."""
        readings = [
            (meter, meter.since_ns, meter.counter_mj, meter.latest_mj, meter.read_ns, meter.others_milli)
            for meter in meters
        ]
        self._undo.append(partial(_restore, readings))

    def rebuild_fleet(self) -> None:
        """Nodes changed: have ``lay_fleet`` lay the fleet's columns anew, once for all that happened in a turn."""
        self._is_laid = False
        self._fleet_rebuilt = True

    def lay_fleet(self) -> None:
        """Lay the fleet's columns from the nodes and what is held, unless they are; a rollback does so again.

        Whoever looks from outside the turns has the old columns or the new ones, never half of each.
        """
        if self._is_laid:
            return
        self._is_laid = True
        fleet = FleetArrays()
        fleet.released, fleet.layouts = self.fleet.released, self.fleet.layouts
        fleet.rebuild([node for node in self.nodes.values() if node.state is not NodeState.LOST], self.sites.copy())
        for allocation in self.allocations.values():
            if allocation.node_id in fleet.row:
                fleet.take(
                    allocation.node_id,
                    cpu_milli=allocation.cpu_milli,
                    memory_bytes=allocation.memory_bytes,
                    devices=tuple(
                        share
                        for share in allocation.devices
                        if share.device_id in {device.id for device in self.nodes[allocation.node_id].devices}
                    ),
                )
        for node in fleet.nodes:
            if node.has_others:
                fleet.leave_to_others(node)
        self.fleet = fleet
        self._rows.clear()
        for allocation in self.allocations.values():
            self._rows.add(allocation, self.fleet, **self._row_values(allocation))
        for promise in self.promises.values():
            self.take(promise.line, promise.placed)
        plan = self.held_back
        if plan is not None and not plan.node_ids <= self.fleet.row.keys():
            self.hold_back(None)
        self.quota.set_capacity(self._capacity())
        self.fleet.commit()
        self._fleet_mark = 0
        self.blocked.clear()

    def open_meters(self, node: Node, *, now: int) -> None:
        """Meters for a node that joined, with their holders; those it has already stay as they are."""
        for meter in meters_of(node, now=now):
            key = (node.id, meter.name)
            if key not in self.meters:
                self.set(self.meters, key, meter)
        for launch in self.by_node.get(node.id, ()):
            allocation = self.allocations.get(launch)
            if allocation is not None:
                for name, holder in shares_of(allocation):
                    existing = self.meters.get((node.id, name))
                    if existing is not None and allocation.id not in existing.holders:
                        existing.holders[allocation.id] = holder

    # -- inside -------------------------------------------------------------------------------------------------

    def _set_again(self, timers: list[tuple[int, str, str]]) -> None:
        for at_ns, what, identity in timers:
            self.set_timer(at_ns, what, identity)

    def _capacity(self) -> dict[str, int]:
        """What the nodes that are there have in all, per device model, ``cpu`` and ``memory``."""
        total = {CPU: 0, MEMORY: 0}
        for node in self.fleet.nodes:
            total[CPU] += node.cpu_milli
            total[MEMORY] += node.memory_bytes
            for device in node.devices:
                total[device.model] = total.get(device.model, 0) + MILLI
        return total
