"""When would it start? The same turns, run forward on a copy of the world with what is known of how long work takes.

A copy is made the way a control plane starts: from what is live. On it commands are carried out in thought: what is
launched runs, what runs ends when it is expected to, what is told to stop stops. Nothing else arrives, so the answer
is about those who wait now; later submissions with a better claim would move it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from tidemill.control.alternatives import variants, worth_telling
from tidemill.control.answers import Why, duration_of, explain, price, quote_of
from tidemill.control.driver import Driver, snapshot_of, world_from
from tidemill.control.siteoptions import at_site, site_options
from tidemill.control.turns import TurnLoop
from tidemill.core.copying import Copies
from tidemill.core.world import World, line_of
from tidemill.model.events import Exited, Fact, Started, Submitted
from tidemill.model.ids import JobId, LaunchId, NodeId, job_id
from tidemill.model.job import Allocation, AllocationState, AttemptState, Cause, JobState, Workload
from tidemill.model.plan import Forecast, Forget, Launch, Option, Plan, Quote, SiteOption, Stop
from tidemill.model.policy import Policy
from tidemill.model.spec import WorkloadSpec
from tidemill.ports import JobRow, Snapshot
from tidemill.units import DAY_NS, SECOND_NS

HORIZON_NS = 30 * DAY_NS
_TURNS = 4_000
_MOST_SITES = 8
_BASIS = (
    "those who wait and run now; likely: they take what they say they expect, else their max_duration, else as long "
    "again as they have run; earliest: half of that; latest: their max_duration, else four times as long"
)


class Pace(Enum):
    """How long work is taken to last."""

    SHORT = "short"
    LIKELY = "likely"
    LONG = "long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """What a forecast starts from; taken between turns, used anywhere."""

    snapshot: Snapshot
    world: World
    policy: Policy
    now: int
    copies: Mapping[tuple[str, ...], Copies]
    cached: Mapping[NodeId, frozenset[str]]


def copy_of(world: World, policy: Policy, *, now: int) -> Copy:
    """What a forecast needs of a world. The world is only read for what never changes: sites, projects, rates."""
    return Copy(
        snapshot=snapshot_of(world),
        world=world,
        policy=policy,
        now=now,
        copies=world.copies.copy(),
        cached=world.cached.copy(),
    )


def why(turns: TurnLoop, row: JobRow, policy: Policy, *, now: int) -> Why:
    """Why a job is where it is and, while it waits, when it would start."""

    def look(_: Plan, world: World) -> tuple[Why, Copy | None]:
        answer = explain(world, row.job, row.workload, row.reason, now=now, policy=policy)
        is_queued = row.job.id in world.jobs and world.jobs[row.job.id].state is JobState.QUEUED
        return answer, copy_of(world, policy, now=now) if is_queued else None

    answer, copy = turns.ask((), look).result(timeout=30)
    return answer if copy is None else replace(answer, forecast=forecast(copy, [row.job.id]))


def quote(turns: TurnLoop, workload: Workload, policy: Policy, *, now: int) -> Quote:
    """What would happen if it were submitted now, and with a few nearby specs."""

    def look(plan: Plan, world: World) -> Quote:
        return quote_of(plan, world, workload, now=now)

    answer = turns.ask([Submitted(at_ns=now, workload=workload)], look).result(timeout=30)
    lasts = duration_of(workload.spec)

    def copied(_: Plan, world: World) -> tuple[Copy, tuple[SiteOption, ...]]:
        line, count = line_of(workload), workload.spec.job_count
        sites = site_options(world, line, now=now, policy=policy, lasts_ns=lasts, jobs=count)
        return copy_of(world, policy, now=now), sites

    copy, sites = turns.ask((), copied).result(timeout=30)
    jobs = [job_id(workload.id, index) for index in range(workload.spec.job_count)]
    starts = now if answer.starts_now else 0
    if answer.feasible and not answer.starts_now:
        found = forecast(copy, jobs, submitted=[workload])
        answer = replace(answer, forecast=found)
        starts = found.likely_ns if found is not None else 0
    finish = starts + answer.copy_ns + answer.duration_ns if starts else 0
    best = next((one for one in sites if one.rank), None)
    if best is not None and answer.feasible and not answer.placement:
        amounts = {name: getattr(best, name) for name in ("amount_micro", "energy_mj", "carbon_mg")}
        answer = replace(answer, **amounts)
    answer = replace(answer, finish_ns=finish, options=options_for(copy, workload, answer, starts))
    return replace(answer, sites=_foreseen(copy, workload, sites))


def _foreseen(copy: Copy, workload: Workload, sites: tuple[SiteOption, ...]) -> tuple[SiteOption, ...]:
    """The options at the sites, each with when it would start there; of many only the best are looked into."""
    found = list(sites)
    for at, option in enumerate(found[:_MOST_SITES]):
        if not option.rank or option.starts_ns or (option.reason is not None and option.reason.code == "SiteCutOff"):
            continue
        there = replace(workload, spec=at_site(workload.spec, option.site))
        jobs = [job_id(workload.id, index) for index in range(workload.spec.job_count)]
        starts = likely_start(copy, jobs, submitted=[there])
        found[at] = replace(option, starts_ns=starts + option.copy_ns if starts is not None else 0)
    return tuple(found)


def options_for(copy: Copy, workload: Workload, answer: Quote, starts: int) -> tuple[Option, ...]:
    """The nearest other specs that would end sooner, cost less or cause less carbon; three at most."""
    lasts = duration_of(workload.spec)
    near = variants(
        copy.world,
        workload,
        feasible=answer.feasible,
        starts_ns=starts,
        lasts_ns=lasts,
        now=copy.now,
        policy=copy.policy,
    )
    found: list[Option] = []
    for one in near:
        other = replace(workload, spec=one.spec)
        jobs = [job_id(workload.id, index) for index in range(one.spec.job_count)]
        at = likely_start(copy, jobs, submitted=[other])
        if at is not None:
            found.append(_option(copy, other, one.change, int(lasts * one.slower), at))
    asked = _option(copy, workload, "", lasts, starts) if answer.feasible else None
    return worth_telling(found, asked=asked)


def _option(copy: Copy, workload: Workload, change: str, lasts_ns: int, starts_ns: int) -> Option:
    """What a spec would give that starts then; ``starts_ns`` zero: nobody knows when."""
    trial = replace(workload.spec, expected_duration_ns=lasts_ns, max_duration_ns=0)
    at = max(starts_ns, copy.now)
    priced = price(copy.world, replace(workload, spec=trial), now=at, policy=copy.policy)
    return Option(
        change=change,
        starts_ns=starts_ns,
        finish_ns=starts_ns + lasts_ns if starts_ns else 0,
        amount_micro=priced.amount_micro,
        energy_mj=priced.energy_mj,
        carbon_mg=priced.carbon_mg,
    )


def forecast(copy: Copy, jobs: Sequence[JobId], *, submitted: Sequence[Workload] = ()) -> Forecast | None:
    """When all of these jobs will have started; None when they never do, whatever ends."""
    starts = {pace: _run(copy, jobs, submitted, pace) for pace in Pace}
    if starts[Pace.LIKELY] is None and starts[Pace.SHORT] is None:
        return None
    return Forecast(
        earliest_ns=starts[Pace.SHORT] or 0,
        likely_ns=starts[Pace.LIKELY] or 0,
        latest_ns=starts[Pace.LONG] or 0,
        basis=_BASIS,
    )


def likely_start(copy: Copy, jobs: Sequence[JobId], *, submitted: Sequence[Workload] = ()) -> int | None:
    """The likely instant at which all of these jobs have started; None when not within the horizon."""
    return _run(copy, jobs, submitted, Pace.LIKELY)


def likely_starts(copy: Copy, jobs: Sequence[JobId], *, horizon_ns: int = HORIZON_NS) -> dict[JobId, int]:
    """The likely instant at which each of these jobs starts; those not within the horizon are not in it."""
    return _starts(copy, jobs, (), Pace.LIKELY, horizon_ns)


def _run(copy: Copy, jobs: Sequence[JobId], submitted: Sequence[Workload], pace: Pace) -> int | None:
    starts = _starts(copy, jobs, submitted, pace, HORIZON_NS)
    return max(starts.values(), default=copy.now) if len(starts) == len(set(jobs)) else None


def _starts(
    copy: Copy, jobs: Sequence[JobId], submitted: Sequence[Workload], pace: Pace, horizon_ns: int
) -> dict[JobId, int]:
    """When jobs start, until all have; those that ended without, or do not within the horizon, are left out."""
    world = world_from(
        copy.snapshot,
        sites=copy.world.sites.values(),
        projects=list(copy.world.projects.values()),
        rates=copy.world.rates,
        policy=copy.policy,
        now=copy.now,
        metered=False,
    )
    world.copies.update(copy.copies)
    world.cached.update(copy.cached)
    driver = Driver(world, copy.policy)
    thought = _Thought(world, copy.policy, pace, copy.now)
    facts: list[Fact] = [Submitted(at_ns=copy.now, workload=workload) for workload in submitted]
    waiting, starts = set(jobs), dict[JobId, int]()
    now = copy.now
    for _ in range(_TURNS):
        plan = driver.step(facts, now=now)
        driver.accepted()
        for one in list(waiting):
            job = world.jobs.get(one)
            if job is None or job.state is not JobState.QUEUED:
                waiting.discard(one)
                if job is not None:
                    starts[one] = now
        if not waiting:
            break
        thought.obey(plan, now)
        upcoming = thought.next_ns(plan.wake_ns)
        if upcoming is None or upcoming > copy.now + horizon_ns:
            break
        now = max(now, upcoming)
        facts = thought.happens(now)
    return starts


class _Thought:
    """Machines that are only thought of: they start at once and end when work is expected to."""

    def __init__(self, world: World, policy: Policy, pace: Pace, now: int) -> None:
        self._world, self._policy, self._pace = world, policy, pace
        self._events: list[tuple[int, int, LaunchId, int, str]] = []
        self._count = 0
        for held in world.allocations.values():
            if held.state is AllocationState.DRAINING:
                self._stops(held, now, self._grace(held))
            elif held.state is AllocationState.ACTIVE:
                self._at(now + self._left(held, now), held, "ends")
            else:
                self._at(now, held, "starts")

    def obey(self, plan: Plan, now: int) -> None:
        """Carry out commands in thought."""
        for command in plan.commands:
            held = None if isinstance(command, Forget) else self._world.allocations.get(command.launch_id)
            if held is None:
                continue
            if isinstance(command, Launch):
                self._at(now, held, "starts")
            elif isinstance(command, Stop):
                self._stops(held, now, command.grace_ns)

    def next_ns(self, wake_ns: int) -> int | None:
        """When something happens next; None when nothing ever will."""
        instants = [self._events[0][0]] if self._events else []
        if wake_ns:
            instants.append(wake_ns)
        return min(instants, default=None)

    def happens(self, now: int) -> list[Fact]:
        """What has happened by ``now``."""
        facts: list[Fact] = []
        while self._events and self._events[0][0] <= now:
            at, _, launch, fence, what = heapq.heappop(self._events)
            held = self._world.allocations.get(launch)
            if held is None or held.fence != fence:
                continue
            if what == "starts":
                facts.append(Started(at_ns=at, launch_id=launch, fence=fence))
                self._at(at + self._left(held, at), held, "ends")
            else:
                attempt = self._world.attempts[held.job_id]
                stopped = attempt.state is AttemptState.ENDING or held.state is AllocationState.DRAINING
                cause = Cause.PREEMPTED if stopped else Cause.NONE
                facts.append(Exited(at_ns=at, launch_id=launch, fence=fence, exit_code=0, cause=cause))
        return facts

    def _at(self, at: int, held: Allocation, what: str) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, held.id, held.fence, what))

    def _stops(self, held: Allocation, now: int, grace_ns: int) -> None:
        self._at(now + (grace_ns if self._pace is Pace.LONG else min(grace_ns, SECOND_NS)), held, "stops")

    def _grace(self, held: Allocation) -> int:
        return self._spec(held).checkpoint_grace_ns

    def _left(self, held: Allocation, now: int) -> int:
        """How much longer a worker is taken to run."""
        spec, attempt = self._spec(held), self._world.attempts[held.job_id]
        ran = now - attempt.started_ns if attempt.started_ns else 0
        assumed = max(ran, self._policy.assumed_duration_ns)
        limit = spec.max_duration_ns - ran if spec.max_duration_ns else None
        said = spec.expected_duration_ns - self._world.jobs[held.job_id].served_ns - ran
        if spec.expected_duration_ns and said > 0:
            likely = said if limit is None else min(said, limit)
        else:
            likely = limit if limit is not None else assumed
        match self._pace:
            case Pace.SHORT:
                return max(likely // 2, 0)
            case Pace.LIKELY:
                return max(likely, 0)
            case _:
                return max(limit if limit is not None else 4 * assumed, 0)

    def _spec(self, held: Allocation) -> WorkloadSpec:
        return self._world.workloads[self._world.jobs[held.job_id].workload_id].spec
