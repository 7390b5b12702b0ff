"""What came of a run, counted as it goes: from plans alone, in memory that does not grow with the number of jobs."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidemill.core.lifecycle import is_terminal
from tidemill.model.ids import JobId, QueueId
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Cause, Job, JobState
from tidemill.model.plan import Plan
from tidemill.model.queue import Queue
from tidemill.model.resources import Resources
from tidemill.model.spec import WorkloadSpec
from tidemill.twin.cloud import Cloud
from tidemill.twin.sketch import Sketch
from tidemill.units import MILLI, MINUTE_NS, SECOND_NS

MOST_BUCKETS: Final = 384
SLOWDOWN_BOUND_NS: Final = 10 * SECOND_NS
"""Shorter jobs count as this long in their slowdown, as is usual (Feitelson et al., 1997)."""
_MIX: Final = 24
"""How many kinds of workers stand for the mix when fragmentation is measured."""
_MIX_KINDS: Final = 4_096
_MIX_HALVES: Final = 65_536
"""After so many arrivals the counts of the mix are halved, so that it follows the work."""


@dataclass(slots=True)
class Tenant:
    """One tenant's part. GPU time in milli-GPU x ns; ``wants_milli`` is what it holds and waits for now."""

    name: str
    weight_milli: int = MILLI
    wait: Sketch = field(default_factory=Sketch)
    slowdown: Sketch = field(default_factory=Sketch)
    jct: Sketch = field(default_factory=Sketch)
    submitted: int = 0
    ended: int = 0
    preempted: int = 0
    held_milli: int = 0
    wants_milli: int = 0
    gpu_ns: int = 0
    lost_ns: int = 0
    amount_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0
    since_ns: int = 0


@dataclass(slots=True)
class _Live:
    """A job that is not over."""

    tenant: Tenant
    submitted_ns: int
    duration_ns: int
    gpu_milli: int
    waits: bool = True
    waited_ns: int = -1


class Series:
    """Means over equal stretches of time, from running totals of level x ns.

    When there are too many stretches, each two become one of twice the length.
    """

    def __init__(self, names: Sequence[str], start_ns: int, width_ns: int = MINUTE_NS) -> None:
        self.names = tuple(names)
        self.start_ns = start_ns
        self.width_ns = width_ns
        self.began_ns = start_ns
        self.ends_ns = start_ns + width_ns
        """The open stretch."""
        self.values = {name: array("d") for name in names}
        self._totals = dict.fromkeys(names, 0.0)

    def close(self, until_ns: int, totals: Sequence[float]) -> None:
        """End the open stretch with the totals at its end, in order of the names; the last one may be shorter."""
        elapsed = max(until_ns - self.began_ns, 1)
        for name, total in zip(self.names, totals, strict=True):
            self.values[name].append((total - self._totals[name]) / elapsed)
            self._totals[name] = total
        if len(self.values[self.names[0]]) >= MOST_BUCKETS:
            for name, column in self.values.items():
                self.values[name] = halved(column)
            self.width_ns *= 2
        self.began_ns = until_ns
        self.ends_ns = until_ns + self.width_ns


def halved(column: array[float]) -> array[float]:
    """The means of each two values."""
    return array("d", ((a + b) / 2 for a, b in zip(column[::2], column[1::2], strict=True)))


LEVELS: Final = ("held", "capacity", "waiting_jobs", "waiting_gpus", "running_jobs", "fragmented", "share_error")


class Measures:
    """Adds up what plans say. Call ``advance`` and ``submitted`` before a turn and ``took`` after it."""

    def __init__(self, cloud: Cloud, *, now: int, weights: Mapping[str, int] | None = None) -> None:
        self._cloud = cloud
        self._weights = weights or {}
        self._names: dict[str, str] = {}
        self.tenants: dict[str, Tenant] = {}
        self.start_ns = self.now = now
        self.wait, self.slowdown, self.jct = Sketch(), Sketch(), Sketch()
        self.refused: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.preemptions = self.submitted_jobs = self.turns = self.lost_ns = 0
        self.requeues: Counter[str] = Counter()
        self.amount_micro = self.energy_mj = self.idle_energy_mj = self.carbon_mg = self.ledger_lines = 0
        self.held_milli = self.waiting_jobs = self.running_jobs = 0
        self.waiting_milli = 0
        self.capacity_milli = cloud.gpu_capacity_milli()
        self.gpu_ns = self.capacity_ns = self.idle_ns = self.running_ns = self.waiting_ns = self.waiting_gpu_ns = 0
        self.fragmented_ns = 0.0
        self.busy_gpu_ns = self.busy_capacity_ns = 0
        self.share_error_ns = 0.0
        self.contended_ns = 0
        self.series = Series(LEVELS, now)
        self.tenant_series: dict[str, array[float]] = {}
        self.last_end_ns = now
        self._jobs: dict[JobId, _Live] = {}
        self._mix: Counter[Resources] = Counter()
        self._kinds: dict[Resources, WorkloadSpec] = {}
        self._mix_count = 0
        self._fragmented = 0.0
        self._share_error = 0.0
        self._looked_at = 0
        self._tenant_held: dict[str, int] = {}

    @property
    def live_jobs(self) -> int:
        """How many jobs are not over."""
        return len(self._jobs)

    def tenant(self, tenant_id: str) -> Tenant:
        """A tenant's part so far."""
        found = self.tenants.get(tenant_id)
        if found is None:
            name, weight = self._names.get(tenant_id, tenant_id), self._weights.get(tenant_id, MILLI)
            found = self.tenants[tenant_id] = Tenant(name, weight, since_ns=self.now)
        return found

    def name(self, tenant_id: str, name: str) -> None:
        """People call a tenant so; by its id too, where another one is called the same."""
        self._names[tenant_id] = f"{name} ({tenant_id})" if name in self._names.values() else name

    def weigh(self, weights: Mapping[str, int]) -> None:
        """Tenants have other weights from now on."""
        self._weights = weights
        for tenant_id, who in self.tenants.items():
            who.weight_milli = weights.get(tenant_id, MILLI)

    def submitted(self, job_id: JobId, tenant: str, spec: WorkloadSpec, duration_ns: int, now: int) -> None:
        """A job is at the door."""
        gpus = spec.resources.gpus
        milli = gpus.total_milli * spec.nodes if gpus is not None else 0
        who = self.tenant(tenant)
        who.submitted += 1
        who.wants_milli += milli
        self.submitted_jobs += 1
        self._jobs[job_id] = _Live(who, now, duration_ns, milli)
        self.waiting_jobs += 1
        self.waiting_milli += milli
        self._mix[spec.resources] += 1
        self._mix_count += 1
        self._kinds.setdefault(spec.resources, spec)
        if self._mix_count >= _MIX_HALVES or len(self._mix) > _MIX_KINDS:
            self._mix = Counter({kind: count // 2 for kind, count in self._mix.most_common(1_024) if count > 1})
            self._kinds = {kind: self._kinds[kind] for kind in self._mix}
            self._mix_count //= 2

    def all_arrived(self) -> None:
        """Nothing more is to come; what is left is the end of the run."""
        self.busy_gpu_ns, self.busy_capacity_ns = self.gpu_ns, self.capacity_ns

    def refuse(self, code: str) -> None:
        """A workload was not let in."""
        self.refused[code] += 1

    def took(self, plan: Plan, now: int) -> list[JobId]:
        """A turn was taken; returns the jobs that ended in it."""
        self.turns += 1
        ended: list[JobId] = []
        for change in plan.changes:
            after = change.after
            kind = type(after)
            if kind is Allocation:
                self._allocated(after, is_new=change.assumed is None)  # type: ignore[arg-type]
            elif kind is Job:
                self._moved(after, now, ended)  # type: ignore[arg-type]
            elif kind is Attempt and after.state is AttemptState.ENDING and after.cause is Cause.PREEMPTED:  # type: ignore[union-attr]
                self.preemptions += 1
                self._jobs[after.job_id].tenant.preempted += 1  # type: ignore[union-attr]
        for project, sums in plan.ledger.sums().items():
            self.ledger_lines += sums.lines
            self.energy_mj += sums.energy_mj
            self.carbon_mg += sums.carbon_mg
            if not project:
                self.idle_energy_mj += sums.energy_mj
                continue
            self.amount_micro += sums.amount_micro
            who = self.tenant(project)
            who.amount_micro += sums.amount_micro
            who.energy_mj += sums.energy_mj
            who.carbon_mg += sums.carbon_mg
        return ended

    def fleet_changed(self) -> None:
        """Machines came or went."""
        self.capacity_milli = self._cloud.gpu_capacity_milli()

    def lost(self, tenant: str, gpu_ns: int) -> None:
        """GPU time of work that was done in vain."""
        self.lost_ns += gpu_ns
        self.tenant(tenant).lost_ns += gpu_ns

    def advance(self, now: int) -> None:
        """Time passed until ``now``, and nothing changed."""
        while now > self.now:
            until = min(now, self.series.ends_ns)
            elapsed = until - self.now
            held, capacity = self.held_milli, self.capacity_milli
            self.gpu_ns += held * elapsed
            self.capacity_ns += capacity * elapsed
            self.running_ns += self.running_jobs * elapsed
            if capacity > held:
                self.idle_ns += (capacity - held) * elapsed
                self.fragmented_ns += self._fragmented * elapsed
            if self.waiting_jobs:
                self.waiting_ns += self.waiting_jobs * elapsed
                self.waiting_gpu_ns += self.waiting_milli * elapsed
            if self.waiting_milli:
                self.contended_ns += elapsed
                self.share_error_ns += self._share_error * elapsed
            self.now = until
            if until == self.series.ends_ns:
                self._close()

    def finish(self) -> None:
        """Close the last stretch."""
        if self.now > self.series.began_ns:
            self._close()

    def _close(self) -> None:
        now, width = self.now, self.series.width_ns
        elapsed = max(now - self.series.began_ns, 1)
        buckets = len(self.series.values["held"])
        for tenant in self.tenants.values():
            name = tenant.name
            tenant.gpu_ns += tenant.held_milli * (now - tenant.since_ns)
            tenant.since_ns = now
            column = self.tenant_series.setdefault(name, array("d", bytes(8 * buckets)))
            column.append((tenant.gpu_ns - self._tenant_held.get(name, 0)) / elapsed / MILLI)
            self._tenant_held[name] = tenant.gpu_ns
        totals = (
            self.gpu_ns / MILLI,
            self.capacity_ns / MILLI,
            self.waiting_ns,
            self.waiting_gpu_ns / MILLI,
            self.running_ns,
            self.fragmented_ns / MILLI,
            self.share_error_ns,
        )
        self.series.close(now, totals)
        if self.series.width_ns != width:
            self.tenant_series = {name: halved(column) for name, column in self.tenant_series.items()}
        self._look()

    def _look(self) -> None:
        """What can only be seen by looking at the whole fleet is looked at once a stretch, if anything happened."""
        if self._looked_at == self.turns:
            return
        self._looked_at = self.turns
        mix = self._mix.most_common(_MIX)
        total = sum(count for _, count in mix)
        if total:
            found = self._cloud.idle_for([self._kinds[kind] for kind, _ in mix])
            self._fragmented = sum(idle.unusable * count for idle, (_, count) in zip(found, mix, strict=True)) / total
        self._share_error = share_error(
            [(who.held_milli, who.wants_milli, who.weight_milli) for who in self.tenants.values()], self.capacity_milli
        )

    def _allocated(self, held: Allocation, *, is_new: bool) -> None:
        is_gone = held.state is AllocationState.RELEASED
        if is_new == is_gone or not (is_new or is_gone):
            return
        milli = sum(share.milli for share in held.devices)
        milli = milli if is_new else -milli
        self.held_milli += milli
        who = self.tenant(held.project_id)
        who.gpu_ns += who.held_milli * (self.now - who.since_ns)
        who.since_ns = self.now
        who.held_milli += milli

    def _moved(self, job: Job, now: int, ended: list[JobId]) -> None:
        live = self._jobs.get(job.id)
        if live is None:
            return
        waits = job.state is JobState.QUEUED
        if waits != live.waits:
            sign = 1 if waits else -1
            live.waits = waits
            self.waiting_jobs += sign
            self.waiting_milli += sign * live.gpu_milli
            self.running_jobs -= sign
            if waits:
                self.requeues[job.cause.value] += 1
            elif live.waited_ns < 0 and job.attempts:
                live.waited_ns = now - live.submitted_ns
        if not is_terminal(job.state):
            return
        ended.append(job.id)
        del self._jobs[job.id]
        who = live.tenant
        who.wants_milli -= live.gpu_milli
        self.running_jobs -= 1
        self.states[job.state.value] += 1
        self.last_end_ns = now
        if job.state is JobState.SUCCEEDED:
            wait, jct = live.waited_ns / SECOND_NS, (now - live.submitted_ns) / SECOND_NS
            slowdown = max((now - live.submitted_ns) / max(live.duration_ns, SLOWDOWN_BOUND_NS), 1.0)
            for each in (self, who):
                each.wait.add(wait)
                each.jct.add(jct)
                each.slowdown.add(slowdown)
            who.ended += 1


def jain(values: Sequence[float]) -> float:
    """How even values are: 1 when all are the same, one n-th when one has all; 1 of nothing.

    Source: Jain, Chiu, Hawe (1984).

    >>> jain([3, 3, 3]), jain([1, 0, 0, 0])
    (1.0, 0.25)
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def weights_in(queues: Iterable[Queue]) -> dict[str, int]:
    """What each tenant weighs beside all others, by its id, in thousandths.

    Below a department it is the tenant's part of the department's weight, as if all of its tenants had work.
    """
    by_id = {queue.id: queue for queue in queues}
    together: dict[QueueId, int] = {}
    for queue in by_id.values():
        together[queue.parent_id] = together.get(queue.parent_id, 0) + queue.weight_milli

    def weight(queue: Queue) -> int:
        above = by_id.get(queue.parent_id)
        if above is None:
            return queue.weight_milli
        return max(1, weight(above) * queue.weight_milli // together[queue.parent_id])

    return {queue.project_id: weight(queue) for queue in by_id.values() if queue.project_id}


def share_error(tenants: Sequence[tuple[int, int, int]], capacity: int) -> float:
    """Which part of the capacity in use is with another tenant than weights would have it.

    Each tenant is ``(held, wanted in all, weight)``. Entitled is what filling the capacity in proportion to weights
    gives, nobody getting more than it wants (max-min fairness).

    >>> share_error([(8, 8, 1), (0, 8, 1)], 8), share_error([(4, 8, 1), (4, 8, 1)], 8)
    (0.5, 0.0)
    """
    active = [(held, wanted, weight) for held, wanted, weight in tenants if wanted > 0]
    left, open_ = float(capacity), sorted(active, key=lambda one: one[1] / one[2])
    weights = float(sum(weight for _, _, weight in open_))
    wrong = 0.0
    given = 0.0
    for held, wanted, weight in open_:
        entitled = min(wanted, left * weight / weights) if weights else 0.0
        left -= entitled
        weights -= weight
        given += entitled
        wrong += abs(held - entitled)
    return wrong / 2 / given if given else 0.0
