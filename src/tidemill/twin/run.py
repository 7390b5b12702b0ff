"""★ A run: the driver's turns over virtual time, from the first arrival until nothing is left to do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tidemill.model.events import Fact, NodeJoined, NodeMarked, NodeWentAway, ProjectOpened, QueueSet, Submitted
from tidemill.model.ids import JobId, PrincipalId, ProjectId, WorkloadId, job_id
from tidemill.model.job import Workload
from tidemill.model.plan import Plan
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.twin.arrivals import Arrival, Outside, Stream
from tidemill.twin.cloud import ORGANIZATION, Cloud, Conditions, beginning_of
from tidemill.twin.machines import Machines, Work
from tidemill.twin.measure import Measures, weights_in
from tidemill.units import DAY_NS

_RARELY: Final = (100_000, 50, 100)
_OF_THE_FLEET: Final = (NodeJoined, NodeWentAway, NodeMarked)
GIVE_UP_NS: Final = 30 * DAY_NS
"""How long nothing may start while nothing runs and nothing is to come, before a run is taken to be over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished run. ``left`` counts jobs that would wait for ever."""

    conditions: Conditions
    measures: Measures
    left: int


Watcher = Callable[[list[Fact], int, Plan], None]


def run(stream: Stream, conditions: Conditions, *, watch: Watcher | None = None, until_ns: int = 0) -> Result:
    """What comes of the stream under these conditions.

    ``watch`` sees every turn: its inbox, its instant and its plan. ``until_ns`` ends the run after so much virtual
    time; zero: when nothing is left to do. Times of the stream count from ``conditions.start_ns``.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(
        *_RARELY
    )  # what a run makes is freed by counting references; there are hardly any cycles to look for
    try:
        return _Run(stream, conditions, watch).play(conditions.start_ns + until_ns if until_ns else 0)
    finally:
        gc.set_threshold(*thresholds)


class _Run:
    def __init__(self, stream: Stream, conditions: Conditions, watch: Watcher | None) -> None:
        self.conditions = conditions
        self.start_ns = conditions.start_ns
        self.cloud = Cloud(beginning_of(conditions))
        self.machines = Machines(self.cloud, start_delay_ns=conditions.start_delay_ns)
        self._queues = {queue.id: queue for queue in conditions.queues}
        self.measures = Measures(self.cloud, now=self.start_ns, weights=weights_in(conditions.queues))
        for project in conditions.projects:
            self.measures.name(project.id, project.name)
        self._stream = stream
        self._next: Arrival | Outside | None = None
        self._watch = watch
        self._count = 0
        self._tenants: dict[JobId, tuple[str, int]] = {}

    def play(self, end_ns: int) -> Result:
        """Turn after turn, each at the next instant at which something happens."""
        now, wake = self.start_ns, 0
        self._advance()
        quiet_since = now
        while True:
            by_itself = self.machines.next_ns()
            arrives = self.start_ns + self._next.at_ns if self._next is not None else 0
            instants = [at for at in (by_itself, arrives, wake) if at]
            has_work = bool(by_itself) or self._next is not None
            if not instants or not (has_work or self.measures.live_jobs):
                break
            now = max(min(instants), now)
            if tick := self.conditions.tick_ns:
                now = self.start_ns - (self.start_ns - now) // tick * tick
            if end_ns and now > end_ns:
                now = end_ns
                break
            if has_work:
                quiet_since = now
            elif now - quiet_since > GIVE_UP_NS:
                break
            inbox = self.machines.facts(now)
            inbox += self._arriving(now)
            wake = self._turn(inbox, now).wake_ns
            if wake and wake <= now and not self._is_due(now):
                wake = now  # more of the same instant
        self.measures.advance(now)
        self.measures.took(self.cloud.close_books(now), now)
        self.measures.finish()
        return Result(conditions=self.conditions, measures=self.measures, left=self.measures.live_jobs)

    def _is_due(self, now: int) -> bool:
        return 0 < self.machines.next_ns() <= now

    def _turn(self, inbox: list[Fact], now: int) -> Plan:
        self.measures.advance(now)
        plan = self.cloud.step(inbox, now=now)
        for ended in self.measures.took(plan, now):
            work = self.machines.over(ended)
            tenant, milli = self._tenants.pop(ended)
            if work is not None and work.lost_ns:
                self.measures.lost(tenant, work.lost_ns * milli)
        self.machines.obey(plan.commands, now)
        if any(isinstance(fact, _OF_THE_FLEET) for fact in inbox):
            self.measures.fleet_changed()
        if self._watch is not None:
            self._watch(inbox, now, plan)
        return plan

    def _advance(self) -> None:
        self._next = next(self._stream, None)
        if self._next is None:
            self.measures.all_arrived()

    def _arriving(self, now: int) -> Iterator[Fact]:
        """What comes from outside by ``now``."""
        while (item := self._next) is not None and self.start_ns + item.at_ns <= now:
            if isinstance(item, Outside):
                yield from self._outside(item.fact, now)
            else:
                yield from self._submit(item, now)
            self._advance()

    def _outside(self, fact: Fact, now: int) -> Iterator[Fact]:
        if isinstance(fact, ProjectOpened):
            self.measures.name(fact.project.id, fact.project.name)
            yield from self.cloud.open_project(fact.project, now)
            return
        if isinstance(fact, QueueSet):
            self._queues[fact.queue.id] = fact.queue
            self.measures.weigh(weights_in(self._queues.values()))
        yield replace(fact, at_ns=now)

    def _submit(self, item: Arrival, now: int) -> Iterator[Fact]:
        tenant = ProjectId(item.tenant)
        if not self.cloud.knows(tenant):
            project = Project(id=tenant, organization_id=ORGANIZATION, name=item.tenant, created_ns=now)
            yield from self.cloud.open_project(project, now)
        self._count += 1
        workload = Workload(
            id=WorkloadId(item.name or f"wl_{self._count:09x}"),
            organization_id=self.cloud.organization_of(tenant),
            project_id=tenant,
            principal_id=PrincipalId(item.user),
            spec=item.spec,
            submitted_ns=now,
        )
        reason = self.cloud.refusal(workload)
        if reason is not None:
            self.measures.refuse(reason.code)
            return
        gpus = item.spec.resources.gpus
        milli = gpus.total_milli * item.spec.nodes if gpus is not None else 0
        for index in range(item.spec.job_count):
            job = job_id(workload.id, index)
            takes = item.durations_ns[index] if item.durations_ns else item.duration_ns
            self.machines.expect(
                job, Work(takes, item.checkpoint_ns, item.saves_on_stop, item.start_ns, item.restart_ns)
            )
            self.measures.submitted(job, item.tenant, item.spec, takes, now)
            self._tenants[job] = (item.tenant, milli)
        yield Submitted(at_ns=now, workload=workload)
