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

from tidemill.catalog.devices import devices
from tidemill.control.answers import Why, duration_of, explain, price, quote_of
from tidemill.control.driver import Driver, snapshot_of, world_from
from tidemill.control.siteoptions import at_site, site_options
from tidemill.control.turns import TurnLoop
from tidemill.core.copying import Copies
from tidemill.core.feasible import model_matches
from tidemill.core.world import World, line_of
from tidemill.model.events import Exited, Fact, Started, Submitted
from tidemill.model.ids import JobId, LaunchId, NodeId, job_id
from tidemill.model.job import Allocation, AllocationState, AttemptState, Cause, JobState, Workload
from tidemill.model.plan import Forecast, Forget, Launch, Option, Plan, Quote, SiteOption, Stop
from tidemill.model.policy import Policy
from tidemill.model.spec import Kind, Tier, WorkloadSpec
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
    answer = replace(answer, finish_ns=finish, options=_options(copy, workload, answer, starts))
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


def _options(copy: Copy, workload: Workload, answer: Quote, starts: int) -> tuple[Option, ...]:
    """The nearest other specs that would start, or cost less, soonest first; three at most."""
    found: list[Option] = []
    for change, spec, slower in _variants(copy.world, workload.spec):
        other = replace(workload, spec=spec)
        duration = int(duration_of(workload.spec) * slower)
        trial = replace(spec, expected_duration_ns=duration, max_duration_ns=0)
        jobs = [job_id(workload.id, index) for index in range(spec.job_count)]
        at = likely_start(copy, jobs, submitted=[other])
        if at is None or (answer.feasible and starts and at >= starts and spec.tier is workload.spec.tier):
            continue
        priced = price(copy.world, replace(workload, spec=trial), now=copy.now, policy=copy.policy)
        found.append(
            Option(
                change=change,
                starts_ns=at,
                finish_ns=at + duration,
                amount_micro=priced.amount_micro,
                energy_mj=priced.energy_mj,
                carbon_mg=priced.carbon_mg,
            )
        )
    found.sort(key=lambda option: (option.finish_ns, option.amount_micro, option.change))
    return tuple(found[:3])


def _variants(world: World, spec: WorkloadSpec) -> list[tuple[str, WorkloadSpec, float]]:
    """Nearby specs: what is different in the spec's own words, the spec, how many times as long it would take."""
    variants: list[tuple[str, WorkloadSpec, float]] = []
    gpus = spec.resources.gpus
    if gpus is not None and gpus.model and gpus.is_whole:
        flops = {device.model: device.bf16_tflops for device in devices()}
        known = [speed for model, speed in flops.items() if model_matches(model, gpus.model)]
        here = [flops.get(model, 0.0) for model in world.fleet.models if model_matches(model, gpus.model)]
        mine = max(here, default=0.0) or max(known, default=0.0)
        for model in world.fleet.models:
            if not model_matches(model, gpus.model) and flops.get(model) and mine and not model.startswith("MIG-"):
                request = replace(gpus, model=model, memory_min_bytes=0, memory_max_bytes=0)
                other = replace(spec, resources=replace(spec.resources, gpus=request), any_of=())
                variants.append((f"resources.gpus: {request}", other, mine / flops[model]))
    if spec.nodes > 1 and spec.kind is not Kind.SERVICE:
        nodes = spec.nodes // 2
        fewer = replace(spec, nodes=nodes, nodes_min=min(spec.nodes_min, nodes))
        variants.append((f"nodes: {nodes}", fewer, spec.nodes / nodes))
    if spec.tier is Tier.ON_DEMAND and spec.kind in (Kind.TASK, Kind.ARRAY):
        variants.append(("capacity: spot", replace(spec, tier=Tier.SPOT), 1.0))
    return variants


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
