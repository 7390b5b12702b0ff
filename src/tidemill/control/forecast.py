"""When would it start? The same turns, run forward on a copy of the world with what is known of how long work takes.

A copy is made the way a control plane starts: from what is live. On it commands are carried out in thought: what is
launched runs, what runs ends when it is expected to, what is told to stop stops. Nothing else arrives, so the answer
is about those who wait now; later submissions with a better claim would move it.

Where very many wait, only the first of them are foreseen one by one; those behind are taken to start at the pace at
which these do. What is foreseen of the present is shared by all who ask (``Foresight``).
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice

from tidemill.control.alternatives import variants, worth_telling
from tidemill.control.answers import Why, duration_of, explain, price, quote_of
from tidemill.control.driver import Driver, snapshot_of, world_from
from tidemill.control.siteoptions import at_site, site_options
from tidemill.control.turns import TurnLoop
from tidemill.core.copying import Copies
from tidemill.core.lifecycle import is_terminal
from tidemill.core.world import World, line_of
from tidemill.model.events import Exited, Fact, Started, Submitted
from tidemill.model.ids import JobId, LaunchId, NodeId, job_id
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Cause, Job, JobState, Workload
from tidemill.model.plan import Forecast, Forget, Launch, Option, Plan, Quote, SiteOption, Stop
from tidemill.model.policy import Policy
from tidemill.model.spec import WorkloadSpec
from tidemill.ports import JobRow, Snapshot
from tidemill.units import DAY_NS, HOUR_NS, SECOND_NS

HORIZON_NS = 30 * DAY_NS
_TURNS = 2_000
_MOST_SITES = 8
_MOST_SITES_BEHIND = 2
"""Of how many sites, and other specs, it is foreseen when work would start there, where very many wait."""
_LEAST_FORESEEN, _MOST_FORESEEN = 200, 600
"""Of those who wait as many are foreseen one by one as would take the place of what runs twice, within these."""
_SHARED_NS = 2 * SECOND_NS
_KEPT_NS = 60 * SECOND_NS
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
    """What a forecast starts from; taken between turns, used anywhere. ``behind`` counts those left out who wait."""

    snapshot: Snapshot
    world: World
    policy: Policy
    now: int
    copies: Mapping[tuple[str, ...], Copies]
    cached: Mapping[NodeId, frozenset[str]]
    behind: int = 0

    @property
    def enough(self) -> int:
        """After how many starts the pace is known at which those left out start."""
        return max(sum(job.state is JobState.QUEUED for job in self.snapshot.jobs) // 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What was foreseen: when jobs start, and how many had started by the instant of the last of them."""

    starts: Mapping[JobId, int]
    began_ns: int
    started: int
    at_ns: int

    def pace_ns(self, ahead: int) -> int | None:
        """When a job starts that ``ahead`` others go before, if all start at this pace; None when none is known."""
        if not self.started or self.at_ns <= self.began_ns:
            return None
        return self.began_ns + (self.at_ns - self.began_ns) * max(ahead + 1, self.started) // self.started


def copy_of(world: World, policy: Policy, *, now: int) -> Copy:
    """What a forecast needs of a world. The world is only read for what never changes: sites, projects, rates."""
    snapshot, behind = snapshot_of(world), 0
    foreseen = min(max(2 * len(world.attempts), _LEAST_FORESEEN), _MOST_FORESEEN)
    waiting = len(world.queue)
    if waiting > 2 * foreseen:
        snapshot, behind = _first_of(world, snapshot, foreseen, now=now), waiting - foreseen
    return Copy(
        snapshot=snapshot,
        world=world,
        policy=policy,
        now=now,
        copies=world.copies.copy(),
        cached=world.cached.copy(),
        behind=behind,
    )


def _first_of(world: World, snapshot: Snapshot, count: int, *, now: int) -> Snapshot:
    """What is live without those who wait behind the first ``count``, and without what waits for a workload to end."""
    first = {job_id for _, job_id in world.queue.in_order(count, now=now)}
    jobs = tuple(
        job
        for job in snapshot.jobs
        if job.state is not JobState.QUEUED or job.id in first or job.id in world.delayed or job.id in world.promises
    )
    workloads = {job.workload_id for job in jobs}
    return replace(
        snapshot, jobs=jobs, workloads=tuple(world.workloads[one] for one in workloads if one in world.workloads)
    )


class Foresight:
    """What is foreseen of the present, once for all who ask until something changes. Thread-safe."""

    def __init__(self, turns: TurnLoop, policy: Policy, *, monotonic: Callable[[], int] = time.monotonic_ns) -> None:
        self._turns = turns
        self._policy = policy
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int, Copy, dict[Pace, Course]] | None = None
        """As of which event, when it was made and how long that took, of what, and what came out."""

    def forecast(self, job_id: JobId, ahead: int, *, now: int) -> Forecast | None:
        """When a waiting job will start that ``ahead`` others go before; None when it never does, whatever ends."""
        with self._lock:  # whoever comes while it is made waits for it
            seen = self._seen
            if seen is None or not self._still_holds(seen, job_id):
                seen = self._seen = self._look(now=now)
        copy, courses = seen[3], seen[4]
        return _told(copy, {pace: _when(copy, course, [job_id], ahead) for pace, course in courses.items()})

    def _look(self, *, now: int) -> tuple[int, int, int, Copy, dict[Pace, Course]]:
        began, seq = self._monotonic(), self._turns.last_seq
        copy = self._turns.look(lambda world: copy_of(world, self._policy, now=now))
        courses = {pace: _course(copy, None, (), pace, HORIZON_NS) for pace in Pace}
        ended = self._monotonic()
        return seq, ended, ended - began, copy, courses

    def _still_holds(self, seen: tuple[int, int, int, Copy, dict[Pace, Course]], job_id: JobId) -> bool:
        """Whether nothing changed since. Where very many wait, what changes in a moment is of no account."""
        seq, made, took, copy, courses = seen
        age = self._monotonic() - made
        if seq == self._turns.last_seq:
            return age < _KEPT_NS
        return bool(copy.behind) and age < _SHARED_NS + 4 * took and job_id not in courses[Pace.LIKELY].starts


def why(turns: TurnLoop, foresight: Foresight, row: JobRow, policy: Policy, *, now: int) -> Why:
    """Why a job is where it is and, while it waits, when it would start."""

    def look(world: World) -> tuple[Why, bool]:
        answer = explain(world, row.job, row.workload, row.reason, now=now, policy=policy)
        return answer, row.job.id in world.jobs and world.jobs[row.job.id].state is JobState.QUEUED

    answer, is_queued = turns.look(look)
    if not is_queued:
        return answer
    return replace(answer, forecast=foresight.forecast(row.job.id, max(answer.position - 1, 0), now=now))


def quote(turns: TurnLoop, workload: Workload, policy: Policy, *, now: int) -> Quote:
    """What would happen if it were submitted now, and with a few nearby specs."""
    jobs = [job_id(workload.id, index) for index in range(workload.spec.job_count)]

    def look(plan: Plan, world: World) -> tuple[Quote, int]:
        answer = quote_of(plan, world, workload, now=now)
        last = world.jobs.get(jobs[-1])
        is_late = answer.feasible and not answer.starts_now and last is not None and world.is_waiting(last.id)
        return answer, world.queue.ahead_of(last, now=now) if is_late and last is not None else 0

    answer, ahead = turns.ask([Submitted(at_ns=now, workload=workload)], look).result(timeout=30)
    lasts = duration_of(workload.spec)

    def copied(world: World) -> tuple[Copy, tuple[SiteOption, ...]]:
        line, count = line_of(workload), workload.spec.job_count
        sites = site_options(world, line, now=now, policy=policy, lasts_ns=lasts, jobs=count)
        return copy_of(world, policy, now=now), sites

    copy, sites = turns.look(copied)
    starts = now if answer.starts_now else 0
    if answer.feasible and not answer.starts_now:
        found = forecast(copy, jobs, submitted=[workload], ahead=ahead)
        answer = replace(answer, forecast=found)
        starts = found.likely_ns if found is not None else 0
    finish = starts + answer.copy_ns + answer.duration_ns if starts else 0
    best = next((one for one in sites if one.rank), None)
    if best is not None and answer.feasible and not answer.placement:
        amounts = {name: getattr(best, name) for name in ("amount_micro", "energy_mj", "carbon_mg")}
        answer = replace(answer, **amounts)
    answer = replace(answer, finish_ns=finish, options=options_for(copy, workload, answer, starts, ahead))
    return replace(answer, sites=_foreseen(copy, workload, sites, ahead))


def _foreseen(copy: Copy, workload: Workload, sites: tuple[SiteOption, ...], ahead: int) -> tuple[SiteOption, ...]:
    """The options at the sites, each with when it would start there; of many only the best are looked into."""
    found = list(sites)
    for at, option in enumerate(found[: _MOST_SITES_BEHIND if copy.behind else _MOST_SITES]):
        if not option.rank or option.starts_ns or (option.reason is not None and option.reason.code == "SiteCutOff"):
            continue
        there = replace(workload, spec=at_site(workload.spec, option.site))
        jobs = [job_id(workload.id, index) for index in range(workload.spec.job_count)]
        starts = likely_start(copy, jobs, submitted=[there], ahead=ahead)
        found[at] = replace(option, starts_ns=starts + option.copy_ns if starts is not None else 0)
    return tuple(found)


def options_for(copy: Copy, workload: Workload, answer: Quote, starts: int, ahead: int = 0) -> tuple[Option, ...]:
    """The nearest other specs that would end sooner, cost less or cause less carbon; three at most.

    ``ahead`` is how many wait before the last of its jobs.
    """
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
    for one in islice(near, _MOST_SITES_BEHIND if copy.behind else None):
        other = replace(workload, spec=one.spec)
        jobs = [job_id(workload.id, index) for index in range(one.spec.job_count)]
        at = likely_start(copy, jobs, submitted=[other], ahead=ahead)
        if at is not None:
            at = max(at, one.spec.start_after_ns)
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


def forecast(
    copy: Copy, jobs: Sequence[JobId], *, submitted: Sequence[Workload] = (), ahead: int = 0
) -> Forecast | None:
    """When all of these jobs will have started; None when they never do, whatever ends.

    ``ahead`` is how many wait before the last of them, those left out of the copy among them.
    """
    return _told(copy, {pace: _run(copy, jobs, submitted, pace, ahead) for pace in Pace})


def _told(copy: Copy, starts: Mapping[Pace, int | None]) -> Forecast | None:
    if starts[Pace.LIKELY] is None and starts[Pace.SHORT] is None:
        return None
    basis = _BASIS
    if copy.behind:
        alone = sum(job.state is JobState.QUEUED for job in copy.snapshot.jobs)
        basis += (
            f"; of the {alone + copy.behind:,} who wait, the first {alone:,} one by one, and those behind at the pace "
            "at which these start"
        )
    return Forecast(
        earliest_ns=starts[Pace.SHORT] or 0,
        likely_ns=starts[Pace.LIKELY] or 0,
        latest_ns=starts[Pace.LONG] or 0,
        basis=basis,
    )


def likely_start(
    copy: Copy, jobs: Sequence[JobId], *, submitted: Sequence[Workload] = (), ahead: int = 0
) -> int | None:
    """The likely instant at which all of these jobs have started; None when not within the horizon."""
    return _run(copy, jobs, submitted, Pace.LIKELY, ahead)


def likely_starts(copy: Copy, jobs: Sequence[JobId], *, horizon_ns: int = HORIZON_NS) -> dict[JobId, int]:
    """The likely instant at which each of these jobs starts; those not within the horizon are not in it.

    Where some were left out of the copy, those that were not come to start after the others, in the order given.
    """
    course = _course(copy, jobs, (), Pace.LIKELY, horizon_ns)
    found, ahead = dict[JobId, int](), course.started
    for one in jobs:
        at = course.starts.get(one)
        if at is None and copy.behind:
            at, ahead = course.pace_ns(ahead), ahead + 1
        if at is not None and at <= copy.now + horizon_ns:
            found[one] = at
    return found


def _run(copy: Copy, jobs: Sequence[JobId], submitted: Sequence[Workload], pace: Pace, ahead: int) -> int | None:
    return _when(copy, _course(copy, jobs, submitted, pace, HORIZON_NS), jobs, ahead)


def _when(copy: Copy, course: Course, jobs: Sequence[JobId], ahead: int) -> int | None:
    """When the last of these jobs starts; behind those who were foreseen, by their pace."""
    if all(job in course.starts for job in jobs):
        return max((course.starts[job] for job in jobs), default=copy.now)
    return course.pace_ns(ahead) if copy.behind else None


def _course(
    copy: Copy, jobs: Sequence[JobId] | None, submitted: Sequence[Workload], pace: Pace, horizon_ns: int
) -> Course:
    """When jobs start, until all of ``jobs`` have, or without any all who wait; those that do not are left out.

    Where some were left out of the copy, it ends when the pace is known.
    """
    policy = replace(copy.policy, replan_ns=max(copy.policy.replan_ns, HOUR_NS))  # plans stand until something happens
    world = world_from(
        copy.snapshot,
        sites=copy.world.sites.values(),
        projects=list(copy.world.projects.values()),
        rates=copy.world.rates,
        policy=policy,
        now=copy.now,
        metered=False,
    )
    world.copies.update(copy.copies)
    world.cached.update(copy.cached)
    driver = Driver(world, policy)
    thought = _Thought(world, policy, pace, copy.now)
    facts: list[Fact] = [Submitted(at_ns=copy.now, workload=workload) for workload in submitted]
    queued = [job.id for job in copy.snapshot.jobs if job.state is JobState.QUEUED]
    waiting, starts = set(queued if jobs is None else jobs), dict[JobId, int]()
    now = at_ns = copy.now
    started, enough = 0, copy.enough if copy.behind else 0
    for at in range(_TURNS):
        plan = driver.step(facts, now=now)
        driver.accepted()
        begun = {one.after.job_id for one in plan.changes if isinstance(one.after, Attempt) and one.assumed is None}
        over = {one.after.id for one in plan.changes if isinstance(one.after, Job) and is_terminal(one.after.state)}
        if not at:  # some ran before, or will never wait
            begun |= waiting & world.attempts.keys()
            over |= waiting - world.jobs.keys()
        if begun:
            started, at_ns = started + len(begun), now
        starts.update((one, now) for one in begun if one in waiting)
        waiting.difference_update(begun, over)
        if not waiting or (enough and started >= enough and now > copy.now):
            break
        thought.obey(plan, now)
        upcoming = thought.next_ns(plan.wake_ns)
        if upcoming is None or upcoming > copy.now + horizon_ns:
            break
        now = max(now, upcoming)
        facts = thought.happens(now)
    return Course(starts=starts, began_ns=copy.now, started=started, at_ns=at_ns)


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
