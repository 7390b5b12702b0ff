"""What must hold on every cluster, under every tree and order, in every history and after every fault; and for each
promise planted bugs that it catches.

The yard's own auditor looks after every turn: never over capacity, gangs whole, limits kept, sums that match. A
promise is tried with all that it is defined for, which its line in ``PROMISES`` says; half of the settings are plain
ones, of a few machines that are alike, in which jobs meet more often.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.core.test_place import machine
from tests.core.yard import CALM, GB, START, Yard, gpu_node, queue_of, spec
from tidemill.control.steering import why_group_never
from tidemill.core import preempt, reserve, scheduling, turn, waiting
from tidemill.core.admission import why_refused
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Kept, open_beside
from tidemill.core.queueing import WaitingLines
from tidemill.core.quota import QuotaTree
from tidemill.core.reserve import nodes_open_to, opens_at
from tidemill.core.scheduling import members_of, within_limit
from tidemill.core.together import fit_together
from tidemill.core.world import Promise, World
from tidemill.model.events import DeviceFailed, Marking, NodeJoined, NodeMarked, NodeWentAway, ReservationMade
from tidemill.model.fleet import Level, Node
from tidemill.model.ids import DeviceId, ProjectId, ReservationId
from tidemill.model.job import AttemptState, JobState
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.reservation import Reservation
from tidemill.model.resources import GpuRequest
from tidemill.model.spec import Group, Placement, Tier, WorkloadSpec
from tidemill.model.values import replace
from tidemill.units import SECOND_NS

LABEL = (("role", "db"),)
PLACEMENTS = {
    "": Placement(),
    "spread": Placement(spread=Level.HOST),
    "within": Placement(within=Level.RACK),
    "prefer": Placement(prefer=Level.RACK),
    "apart": Placement(apart=LABEL),
}


@dataclass(frozen=True)
class Ask:
    """One workload of a history; with ``group`` as many, that start together."""

    gpus: int
    nodes: int
    nodes_min: int
    runs_s: int
    limit_s: int
    tier: Tier
    priority: int
    project: str
    user: str
    at_s: int
    request: GpuRequest | None = None
    """What each worker asks for instead of so many whole GPUs."""
    placement: str = ""
    group: int = 0

    def specs(self, name: str) -> list[WorkloadSpec]:
        """The workload, or those of the group; the later ones of a group ask for less."""
        count = max(self.group, 1)
        group = Group(name=name, size=count) if self.group else None
        return [
            spec(
                self.request or max(self.gpus >> at, 1),
                nodes=self.nodes,
                nodes_min=0 if group else min(self.nodes_min, self.nodes),
                max_duration_ns=self.limit_s * SECOND_NS,
                tier=self.tier,
                reservation="own" if self.tier is Tier.RESERVED else "",
                priority=self.priority,
                placement=PLACEMENTS[self.placement],
                labels=LABEL if self.placement == "apart" else (),
                group=group,
            )
            for at in range(count)
        ]


@dataclass(frozen=True)
class Setting:
    """A cloud, what is asked of it, and what goes wrong."""

    kinds: tuple[str, ...]
    tree: tuple[Queue, ...]
    history: tuple[Ask, ...]
    order: str = "fair"
    lost: tuple[tuple[int, int], ...] = ()
    """Which node goes away when; it is back half a minute later."""
    loses: int = 0
    window: tuple[int, int, int, int] | None = None
    """A maintenance window: of which node, from when, how long, and how often it comes again."""
    own: tuple[int, int, int] | None = None
    """A reservation of p0: of how many of the first machines, from when, how long; it comes ten times, a minute apart."""

    def nodes(self) -> tuple[Node, ...]:
        """The machines, in racks of three."""
        large = {"cpus": 64}
        return tuple(
            gpu_node(f"n{at:02d}", rack=f"r{at // 3}", **large) if kind == "large" else machine(at, kind)
            for at, kind in enumerate(self.kinds)
        )

    def own_nodes(self) -> tuple[Node, ...]:
        """The machines that are p0's while a window of its reservation is open."""
        if self.own is None:
            return ()
        tended = self.window[0] % len(self.kinds) if self.window is not None else -1
        return tuple(node for at, node in enumerate(self.nodes()[: self.own[0]]) if at != tended)

    @property
    def whole_gpus(self) -> int:
        """How many GPUs are not cut into slices."""
        return sum({"large": 8, "small": 2, "none": 0, "cut": 2}.get(kind, 4) for kind in self.kinds)


REQUESTS = st.sampled_from(
    [
        GpuRequest(milli=300),
        GpuRequest(milli=700),
        GpuRequest(share_bytes=30 * GB),
        GpuRequest(model="A10", count=1),
        GpuRequest(model="H100", count=2),
        GpuRequest(profile="1g.10gb"),
        GpuRequest(profile="3g.40gb"),
    ]
)
TREES: st.SearchStrategy[tuple[Queue, ...]] = st.builds(
    lambda g0, g1, limit, weight, dept: (
        *((Queue(id="que_d", name="dept", guaranteed=(("gpu", g0 + g1),)),) if dept else ()),  # type: ignore[arg-type]
        queue_of("p0", guaranteed=(("gpu", g0),), parent_id="que_d" if dept else ""),
        queue_of("p1", guaranteed=(("gpu", g1),), parent_id="que_d" if dept else "", weight_milli=weight),
        queue_of("p2", limit=(("gpu", limit),)),
    ),
    g0=st.sampled_from([0, 4000, 8000]),
    g1=st.sampled_from([0, 4000, 8000]),
    limit=st.sampled_from([2000, 8000, 24000]),
    weight=st.sampled_from([500, 1000, 3000]),
    dept=st.booleans(),
)
ORDERS = ("fair", "fair", "fifo", "least-attained", "kin-gittins", "shortest-remaining")


@dataclass(frozen=True)
class Scope:
    """What a promise is defined for."""

    bounded: bool = False
    """Everybody says how long it takes, and has one tier and priority."""
    tenants: int = 4
    orders: tuple[str, ...] = ORDERS
    placements: tuple[str, ...] = tuple(PLACEMENTS)
    faults: bool = False
    windows: bool = False
    owners: bool = False
    """Some work is of a reservation."""
    groups: bool = True
    known: bool = False
    """Everybody says how long it takes."""

    def asks(self, *, plain: bool) -> st.SearchStrategy[list[Ask]]:
        """Histories within the scope."""
        limits = st.integers(130, 200) if self.bounded or self.known else st.sampled_from([0, 130, 300])
        tiers = [Tier.ON_DEMAND] if self.bounded else [Tier.ON_DEMAND, Tier.ON_DEMAND, Tier.SPOT]
        one = st.builds(
            Ask,
            gpus=st.sampled_from([1, 1, 2, 4, 8]),
            nodes=st.sampled_from([1, 1, 1, 2, 3]),
            nodes_min=st.sampled_from([0, 0, 1]),
            runs_s=st.integers(5, 120),
            limit_s=limits,
            tier=st.sampled_from(tiers + [Tier.RESERVED] * self.owners),
            priority=st.just(0) if self.bounded else st.sampled_from([0, 0, 10]),
            project=st.sampled_from([f"p{i}" for i in range(self.tenants)]),
            user=st.just("u") if self.bounded else st.sampled_from(["u", "v"]),
            at_s=st.integers(0, 150),
            request=st.none() if plain else st.one_of(st.none(), REQUESTS),
            placement=st.just("") if plain else st.sampled_from(("", "", *self.placements)),
            group=st.sampled_from([0, 0, 0, 2, 3]) if self.groups else st.just(0),
        )
        ours = one.map(lambda ask: replace(ask, project="p0") if ask.tier is Tier.RESERVED else ask)
        return st.lists(ours, min_size=1, max_size=14 if plain else 12)

    def settings(self) -> st.SearchStrategy[Setting]:
        """Clouds, plain ones and others, with such histories."""
        kinds = st.sampled_from(["large", "large", "whole", "small", "none", "cut", "mixed"])
        own = st.tuples(st.integers(1, 2), st.integers(0, 200), st.integers(100, 200)) if self.owners else st.none()
        plain = st.builds(
            Setting,
            own=own,
            kinds=st.integers(2, 4).map(lambda count: ("large",) * count),
            tree=TREES,
            history=self.asks(plain=True).map(tuple),
            order=st.just(self.orders[0]),
        )
        wide = st.builds(
            Setting,
            own=own,
            kinds=st.lists(kinds, min_size=2, max_size=6).map(tuple),
            tree=TREES,
            history=self.asks(plain=False).map(tuple),
            order=st.sampled_from(self.orders),
            lost=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200)), max_size=3).map(tuple)
            if self.faults
            else st.just(()),
            loses=st.sampled_from([0, 3, 5]) if self.faults else st.just(0),
            window=st.none() | st.tuples(st.integers(0, 5), st.integers(20, 200), st.integers(10, 60), st.just(0))
            if self.windows
            else st.none(),
        )
        return st.one_of(plain, wide)


def laid(setting: Setting, policy: Policy = CALM, *, grace_s: int = 0) -> Yard:
    """The cloud, with everything that is to go wrong."""
    yard = Yard(nodes=setting.nodes(), queues=setting.tree, policy=replace(policy, order=setting.order))
    yard.grace_taken_ns = grace_s * SECOND_NS
    yard.loses = setting.loses
    for at, when in setting.lost:
        node = yard.nodes[at % len(yard.nodes)]
        yard.later(START + when * SECOND_NS, NodeWentAway(at_ns=0, node_id=node.id))
        back = START + (when + 30) * SECOND_NS
        yard.later(back, NodeJoined(at_ns=0, node=replace(node, boot_id=f"b{when}")))
    if setting.window is not None:
        at, begins, lasts, every = setting.window
        starts = START + begins * SECOND_NS
        reservation = Reservation(
            id=ReservationId("res_w"),
            name="w",
            node_ids=(yard.nodes[at % len(yard.nodes)].id,),
            starts_ns=starts,
            ends_ns=starts + lasts * SECOND_NS,
            every_ns=every * SECOND_NS,
        )
        yard.turn([ReservationMade(at_ns=yard.now, reservation=reservation)])
    if setting.own is not None and (nodes := setting.own_nodes()):
        _, begins, lasts = setting.own
        starts = START + begins * SECOND_NS
        reservation = Reservation(
            id=ReservationId("res_own"),
            name="own",
            project_id=ProjectId("p0"),
            node_ids=tuple(node.id for node in nodes),
            starts_ns=starts,
            ends_ns=starts + lasts * SECOND_NS,
            every_ns=(lasts + 60) * SECOND_NS,
            until_ns=starts + 10 * (lasts + 60) * SECOND_NS,
        )
        yard.turn([ReservationMade(at_ns=yard.now, reservation=reservation)])
    return yard


def ask_all(yard: Yard, history: tuple[Ask, ...], **changes: Any) -> list[tuple[Ask, list[str]]]:
    """Submit a history; the jobs of each ask."""
    found = []
    for number, one in enumerate(history):
        ask = replace(one, **changes)
        jobs = [
            yard.submit(each, runs_s=ask.runs_s, project=ask.project, user=ask.user, at_s=ask.at_s)
            for each in ask.specs(f"g{number}")
        ]
        found.append((ask, jobs))
    return found


def play(setting: Setting, policy: Policy = CALM, *, grace_s: int = 0) -> Yard:
    """A history played to its end."""
    yard = laid(setting, policy, grace_s=grace_s)
    ask_all(yard, setting.history)
    yard.run()
    return yard


def watch(yard: Yard, look: Callable[[Yard], None]) -> None:
    """Have something looked at after every turn."""
    turn_of = yard.turn

    def watched(facts: list[Any]) -> Any:
        taken = turn_of(facts)
        look(yard)
        return taken

    yard.turn = watched  # type: ignore[method-assign]


# -- the promises -----------------------------------------------------------------------------------------------------


def everything_ends_that_can(setting: Setting) -> None:
    yard = laid(setting, replace(CALM, min_run_ns=2 * SECOND_NS), grace_s=3)
    asked = ask_all(yard, setting.history)
    yard.run()
    for ask, jobs in asked:
        known = [yard.stored["Workload", yard.job(job).workload_id] for job in jobs]
        never = [why_refused(yard.world, workload) for workload in known]
        if any(never) or (ask.group and why_group_never(yard.world, known) is not None):
            continue
        if ask.tier is Tier.RESERVED and not any(job in yard.started for job in jobs):
            continue  # it does not fit into what is reserved
        for job in jobs:
            assert yard.state(job) in (JobState.SUCCEEDED, JobState.FAILED), f"{job} is {yard.state(job)}"
            assert job in yard.started


def whoever_is_displaced_is_displaced_for_somebody_who_starts(setting: Setting) -> None:
    yard = play(setting, grace_s=5)
    for at, victim, body in yard.events("Preempted"):
        taker = body["by"].removeprefix("room for ")
        assert taker in yard.started, f"{victim} went for {taker}, which never started"
        after = [start for start in yard.started[taker] if start >= at]
        assert after, f"{victim} went for {taker}, which had started before"
        assert after[0] <= at + 5 * SECOND_NS, f"{taker} did not start when {victim} was gone"


def nobody_displaces_who_displaced_them(setting: Setting) -> None:
    yard = play(setting)
    pairs = {(body["by"].removeprefix("room for "), victim) for _, victim, body in yard.events("Preempted")}
    assert not any((victim, taker) in pairs for taker, victim in pairs), "two jobs displace each other in turn"


def the_first_blocked_job_is_not_delayed(setting: Setting) -> None:
    """In one project nothing goes before an earlier submission but by backfill, so the first plan is kept."""
    yard = laid(replace(setting, tree=()), replace(CALM, preemption=False))
    plans: dict[str, int] = {}

    def look(yard: Yard) -> None:
        if (plan := yard.world.held_back) is not None:
            plans.setdefault(plan.job_id, plan.at_ns)

    watch(yard, look)
    ask_all(yard, setting.history, project="p0")
    yard.run()
    for job, at in plans.items():
        assert yard.started[job][0] <= at, (
            f"{job} was to start at {at - START} and did at {yard.started[job][0] - START}"
        )


def a_reservation_is_free_for_its_owner(setting: Setting) -> None:
    """Work that takes all of what is reserved starts when the window opens, and stays while that lasts."""
    nodes = setting.own_nodes()
    if setting.own is None or not nodes or set(setting.kinds[: setting.own[0]]) != {"large"}:
        return
    _, begins, lasts = setting.own
    yard = laid(setting, grace_s=5)
    owner = yard.submit(
        spec(8, nodes=len(nodes), tier=Tier.RESERVED, reservation="own"), runs_s=lasts + 30, project="p0"
    )
    ask_all(yard, tuple(ask for ask in setting.history if ask.tier is not Tier.RESERVED))  # those may come before it
    yard.run()
    opens = START + begins * SECOND_NS
    assert opens <= yard.started[owner][0] <= opens + 5 * SECOND_NS
    gone = [at for at, victim, _ in yard.events("Preempted") if victim == owner]
    assert all(at >= opens + lasts * SECOND_NS for at in gone), "it was displaced in its own reservation"


def guarantees_are_there_when_asked_for(setting: Setting) -> None:
    """Single-GPU work of a project within its guarantee never waits while others borrow."""
    yard = laid(setting)
    ask_all(yard, setting.history, project="p3", at_s=0, runs_s=1000)
    yard.run(1)
    tree = setting.tree
    if sum(dict(q.guaranteed).get("gpu", 0) for q in tree if q.project_id) > setting.whole_gpus * 1000:
        return
    for queue in tree:
        guaranteed = dict(queue.guaranteed).get("gpu", 0)
        if queue.project_id:
            jobs = [yard.submit(spec(1), runs_s=500, project=queue.project_id) for _ in range(guaranteed // 1000)]
            yard.run(1)  # who started in between is displaced when it runs
            assert all(yard.state(job) is not JobState.QUEUED or job in yard.world.promises for job in jobs), queue.name


def nothing_waits_beyond_patience(nodes: int, order: str, group: bool, small_s: int) -> None:
    """A wide gang, or group, of a user who has had more than others still starts, though small work never stops
    coming."""
    policy = replace(CALM, order=order, patience_ns=100 * SECOND_NS, half_life_ns=10_000 * SECOND_NS)
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(nodes)), policy=policy)
    for _ in range(nodes):
        yard.submit(spec(8), runs_s=5_020, project="p0")
    yard.run(5_000)
    what = spec(8, nodes=1 if group else nodes, max_duration_ns=20 * SECOND_NS)
    each = replace(what, group=Group(name="g", size=nodes)) if group else what
    wide = [yard.submit(each, runs_s=20, project="p0") for _ in range(nodes if group else 1)]
    for at in range(5_000, 5_600, 5):
        for _ in range(nodes):
            limit = spec(4, max_duration_ns=(small_s + 1) * SECOND_NS)
            yard.submit(limit, runs_s=small_s, project=f"p{1 + at % 3}", at_s=at)
    yard.run(600)
    assert all(job in yard.started for job in wide), "the wide gang starves"


def a_refused_turn_leaves_no_trace(setting: Setting) -> None:
    yard = laid(setting)
    take = yard.turn

    def twice(facts: list[Any]) -> Any:
        before = fingerprint(yard.world)
        turn.turn(yard.world, facts, now=yard.now, policy=yard.policy)
        yard.world.rollback()
        after = fingerprint(yard.world)
        assert after == before, (
            f"a refused turn left traces: {[pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]}"
        )
        return take(facts)

    yard.turn = twice  # type: ignore[method-assign]
    ask_all(yard, setting.history)
    first, second = yard.nodes[0], yard.nodes[1]
    yard.later(START + 60 * SECOND_NS, NodeWentAway(at_ns=0, node_id=first.id))
    yard.later(START + 80 * SECOND_NS, NodeJoined(at_ns=0, node=replace(first, boot_id="again")))
    yard.later(START + 90 * SECOND_NS, NodeMarked(at_ns=0, node_id=second.id, marking=Marking.DRAIN))
    yard.later(START + 99 * SECOND_NS, NodeMarked(at_ns=0, node_id=second.id, marking=Marking.RESUME))
    failing = DeviceId(f"{second.id}-0")
    yard.later(START + 50 * SECOND_NS, DeviceFailed(at_ns=0, node_id=second.id, device_id=failing, detail="x"))
    yard.run(400)


def fingerprint(world: World) -> tuple[object, ...]:
    free = world.fleet.free()
    return (
        dict(world.nodes), dict(world.jobs), dict(world.attempts), dict(world.allocations), dict(world.workers),
        free.cpu.tolist(), free.memory.tolist(), free.gpu.tolist(), free.mig.tolist(),
        sorted(world.queue.members()), dict(world.delayed), dict(world.unstarted),
        dict(world.parked), dict(world.promises), dict(world.reasons), dict(world.growable), world.held_back,
        {p: dict(world.quota.held(p)) for p in world.projects}, {n: dict(v) for n, v in world.by_node.items() if v},
        {n: dict(v) for n, v in world.ports.items() if v}, dict(world.dependents), dict(world.groups),
        sorted((launch, *(int(getattr(world.rows, c)[slot]) for c in ("node", "cpu", "since", "gone", "saved")))
               for launch, slot in world.rows.slot.items()),
    )  # fmt: skip


def the_order_of_nodes_does_not_matter(setting: Setting) -> None:
    seen = []
    for order in (1, -1):
        yard = Yard(nodes=setting.nodes()[::order], queues=setting.tree, policy=replace(CALM, order=setting.order))
        ask_all(yard, setting.history)
        yard.run()
        seen.append((yard.started, sorted((a.id, a.node_id) for k, a in yard.stored.items() if k[0] == "Allocation")))
    assert seen[0] == seen[1]


def nobody_waits_while_there_is_room(setting: Setting) -> None:
    """After a turn no waiting job, nor group, fits beside the plan, within its queue's limits."""
    yard = laid(setting)

    def look(yard: Yard) -> None:
        world = yard.world
        plan = world.held_back
        if plan is not None:
            world.take_plan(plan)
        for line, job_id in world.queue.in_order(now=yard.now):
            members = members_of(world, world.jobs[job_id])
            amounts = preempt.amounts_together(world, [member.line for member in members])
            is_allowed = world.quota.over_limit(line.project_id, amounts, len(members)) is None
            if not is_allowed or (plan is not None and plan.job_id == job_id):
                continue
            opens = opens_at(world, members, now=yard.now, policy=yard.policy)
            is_room = fit_together(world.fleet, members, opens, score=world.score, free=world.fleet.free())
            assert not is_room, f"{job_id} waits for nothing"
        if plan is not None:
            world.give_plan(plan)
        world.fleet.commit()

    watch(yard, look)
    ask_all(yard, setting.history)
    yard.run()


def an_elastic_gang_does_not_stay_small_beside_idle_room(setting: Setting) -> None:
    """After a turn no running gang that is smaller than it could be has room beside the plan, within its limits."""
    yard = laid(setting)
    yard.starting_ns = 7 * SECOND_NS

    def look(yard: Yard) -> None:
        world, plan = yard.world, yard.world.held_back
        if plan is not None:
            world.take_plan(plan)
        for job_id, attempt in world.attempts.items():
            job = world.jobs[job_id]
            line = world.line_of(job)
            missing = line.gang.workers - attempt.workers
            if attempt.state is not AttemptState.RUNNING or missing <= 0:
                continue
            mask = nodes_open_to(world, line, now=yard.now, policy=yard.policy)
            here = [world.fleet.row[held.node_id] for held in world.workers_of(attempt)]
            beside = open_beside(world.fleet, line.gang, here)
            mask = beside if mask is None else mask if beside is None else mask & beside
            more = line.gang.part(attempt.choice, 1)
            placed = scheduling.place_gang(world.fleet, more, score=world.score, mask=mask)
            if placed is not None:
                is_allowed = within_limit(world, line, job, placed, jobs=0) is not None
                world.give_quietly(line, placed)
                assert not is_allowed, f"{job_id} stays small for nothing"
        if plan is not None:
            world.give_plan(plan)
        world.fleet.commit()

    watch(yard, look)
    ask_all(yard, setting.history)
    yard.run()


def groups_start_at_one_instant(setting: Setting) -> None:
    """All of a group, or none of it, whatever is displaced for it and whatever is lost meanwhile."""
    yard = laid(setting, grace_s=5)
    asked = ask_all(yard, setting.history)
    yard.run()
    for ask, jobs in asked:
        first = {yard.started[job][0] if job in yard.started else 0 for job in jobs}
        assert not ask.group or len(first) == 1, f"{jobs} started at {[at - START for at in first]}"


def the_sums_match_whatever_is_lost(setting: Setting) -> None:
    """What the auditor looks at after every turn, with nodes that go and come and messages that do not arrive."""
    play(setting, grace_s=4)


Keeps = Callable[[Setting], None]
PROMISES: dict[Keeps, Scope] = {
    everything_ends_that_can: Scope(faults=True, windows=True, owners=True),
    a_reservation_is_free_for_its_owner: Scope(owners=True),
    whoever_is_displaced_is_displaced_for_somebody_who_starts: Scope(),
    nobody_displaces_who_displaced_them: Scope(orders=("fair", "fifo", "shortest-remaining"), known=True),
    the_first_blocked_job_is_not_delayed: Scope(bounded=True, orders=("fair", "fifo")),
    guarantees_are_there_when_asked_for: Scope(),
    a_refused_turn_leaves_no_trace: Scope(faults=True, windows=True, owners=True),
    the_order_of_nodes_does_not_matter: Scope(),
    nobody_waits_while_there_is_room: Scope(windows=True, owners=True),
    an_elastic_gang_does_not_stay_small_beside_idle_room: Scope(windows=True, owners=True),
    groups_start_at_one_instant: Scope(faults=True, windows=True),
    the_sums_match_whatever_is_lost: Scope(faults=True, windows=True, owners=True),
}


def keep(promise: Keeps, examples: int) -> None:
    """Try a promise with so many settings of its scope."""

    @given(PROMISES[promise].settings())
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(setting: Setting) -> None:
        promise(setting)

    check()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_promise_holds(promise: Keeps) -> None:
    keep(promise, 25)


@pytest.mark.long
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_promise_holds_in_many_settings(promise: Keeps) -> None:
    keep(promise, 1_000)


@pytest.mark.parametrize(
    ("order", "group", "small_s"), [("fair", False, 29), ("fair", True, 29), ("least-attained", True, 23)]
)
def test_nothing_starves(order: str, group: bool, small_s: int) -> None:
    nothing_waits_beyond_patience(2, order, group, small_s)


@pytest.mark.long
@pytest.mark.parametrize("order", dict.fromkeys(ORDERS))
def test_nothing_starves_under_any_order(order: str) -> None:
    @given(st.integers(2, 4), st.booleans(), st.integers(7, 60))
    @settings(max_examples=25, deadline=None)
    def check(nodes: int, group: bool, small_s: int) -> None:
        nothing_waits_beyond_patience(nodes, order, group, small_s)

    check()


# -- planted bugs -----------------------------------------------------------------------------------------------------


def keeps_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling._Pass, "_claim", lambda self, plan: setattr(self, "_claimed", None))


def lets_everything_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    place = scheduling._Pass._place
    monkeypatch.setattr(
        scheduling._Pass, "_place", lambda self, line, mask: place(self, replace(line, duration_ns=1), mask)
    )


def displaces_whoever_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = preempt._Relation.claim_on
    rank = preempt._Claim.RANK

    def any_claim(self: Any, other: Any, rows: Any) -> Any:
        return rank if other != self._job.id and claim(self, other, rows) is not None else preempt._Claim.NONE

    monkeypatch.setattr(preempt._Relation, "claim_on", any_claim)


def displaces_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preempt, "_shortest_prefix", lambda world, do_fit, free, units: 1 if units else None)
    found = preempt.place_together

    def anywhere(fleet: FleetArrays, members: Any, opens: Any, *, score: Any, free: Any) -> Any:
        roomy = free.copy()
        roomy.gpu[:] = 1000
        placed = found(fleet, members, opens, score=score, free=free.copy())
        return placed or found(fleet, members, opens, score=score, free=roomy)

    monkeypatch.setattr(preempt, "place_together", anywhere)


def forgets_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scheduling,
        "_keep_promises",
        lambda world, out: [waiting.break_promise(world, job) for job in [*world.promises]],
    )


def never_reclaims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuotaTree, "may_reclaim", lambda self, *of, **how: False)


def undoes_rows_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidemill.core.held import HeldArrays

    monkeypatch.setattr(HeldArrays, "mark", lambda self, launch, column, value: None if launch not in self.slot else (
        getattr(self, column).__setitem__(self.slot[launch], value)))  # fmt: skip


def forgets_to_undo_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    count = World._count

    def only_forward(self: World, allocation: Any, sign: int) -> None:
        if sys._getframe(1).f_code.co_name not in ("_unhold", "_hold_again"):
            count(self, allocation, sign)

    monkeypatch.setattr(World, "_count", only_forward)


def plans_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = reserve.plan_start

    def hopeful(*of: Any, **how: Any) -> Any:
        plan = ends(*of, **how)
        return replace(plan, at_ns=plan.at_ns - 60 * SECOND_NS) if plan is not None else None

    monkeypatch.setattr(scheduling, "plan_start", hopeful)


def prefers_who_joined_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = FleetArrays.rebuild

    def in_order_of_joining(self: FleetArrays, nodes: list[Any], sites: Any = None) -> None:
        rebuild(self, nodes, sites)
        at = {node.id: -index for index, node in enumerate(nodes)}
        self.seed_order = self.seed_order * 0 + [at[node.id] + len(nodes) for node in self.nodes]

    monkeypatch.setattr(FleetArrays, "rebuild", in_order_of_joining)


def takes_every_line_for_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling._Pass, "_has_room", lambda self, line, plan: False)


def overlooks_what_is_free_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "_lost_to", lambda self, fleet, shape, table: 10**6)


def takes_everything_for_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = scheduling._Pass._signs
    monkeypatch.setattr(scheduling._Pass, "_signs", lambda self: (0, *signs(self)[1:]))


def remembers_no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling._Pass, "_is_behind_still", lambda self, line: line in self._world.blocked)


def offers_room_to_gangs_that_cannot_take_it_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = scheduling._grow_elastic

    def once(world: World, out: Any) -> None:
        grow(world, out)
        for job in world.growable:
            world.set(world.growable, job, (world.fleet.released, world.reopenings))

    monkeypatch.setattr(scheduling, "_grow_elastic", once)


def forgets_who_was_displaced(monkeypatch: pytest.MonkeyPatch) -> None:
    queue_up = World.queue_up
    monkeypatch.setattr(World, "queue_up", lambda self, job: None if job.evictions else queue_up(self, job))


def keeps_promises_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    give = World.promise

    def alone(self: World, promise: Promise) -> None:
        waits = tuple(
            launch
            for launch in promise.waits_for
            if self.allocations[launch].node_id in {place.node_id for place in promise.placed.places}
        )
        give(self, replace(promise, together=(promise.job_id,), waits_for=waits))

    monkeypatch.setattr(World, "promise", alone)


def lets_an_incomplete_group_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "group_of", lambda world, job: (job.id,))


def counts_what_a_lost_node_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    count = World._count

    def forgetful(self: World, allocation: Any, sign: int) -> None:
        if sign > 0 or self.nodes[allocation.node_id].boot_id == "b" or allocation.rank:
            count(self, allocation, sign)

    monkeypatch.setattr(World, "_count", forgetful)


def opens_a_reservation_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "_outside_windows", lambda world, line, *, now, policy: None)


def clears_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "_open_window", lambda world, reservation, out: None)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], Keeps]] = [
    (keeps_no_places, the_first_blocked_job_is_not_delayed),
    (lets_everything_pass, the_first_blocked_job_is_not_delayed),
    (plans_too_early, the_first_blocked_job_is_not_delayed),
    (displaces_whoever_it_likes, nobody_displaces_who_displaced_them),
    (displaces_without_looking, whoever_is_displaced_is_displaced_for_somebody_who_starts),
    (forgets_promises, whoever_is_displaced_is_displaced_for_somebody_who_starts),
    (opens_a_reservation_to_everybody, a_reservation_is_free_for_its_owner),
    (clears_no_window, a_reservation_is_free_for_its_owner),
    (never_reclaims, guarantees_are_there_when_asked_for),
    (undoes_rows_badly, a_refused_turn_leaves_no_trace),
    (forgets_to_undo_the_quota, a_refused_turn_leaves_no_trace),
    (prefers_who_joined_first, the_order_of_nodes_does_not_matter),
    (takes_every_line_for_hopeless, nobody_waits_while_there_is_room),
    (overlooks_what_is_free_beside_the_plan, nobody_waits_while_there_is_room),
    (takes_everything_for_settled, nobody_waits_while_there_is_room),
    (remembers_no_release, nobody_waits_while_there_is_room),
    (offers_room_to_gangs_that_cannot_take_it_yet, an_elastic_gang_does_not_stay_small_beside_idle_room),
    (forgets_who_was_displaced, everything_ends_that_can),
    (keeps_promises_one_by_one, groups_start_at_one_instant),
    (lets_an_incomplete_group_start, groups_start_at_one_instant),
    (counts_what_a_lost_node_held_for_ever, the_sums_match_whatever_is_lost),
]


@pytest.mark.parametrize(
    ("plant", "promise"),
    [pytest.param(*bug, marks=pytest.mark.long if bug[0] is displaces_whoever_it_likes else []) for bug in BUGS],
    ids=lambda each: each.__name__,
)
def test_the_promise_catches_the_planted_bug(
    plant: Callable[[pytest.MonkeyPatch], None],
    promise: Keeps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)

    @given(PROMISES[promise].settings())
    @settings(
        max_examples=2_500, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    def check(setting: Setting) -> None:
        promise(setting)

    with pytest.raises((AssertionError, KeyError, ExceptionGroup, HypothesisException, RecursionError)):
        check()


def test_without_patience_the_wide_gang_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WaitingLines, "_late_heads", lambda self, is_closed, now: iter(()))
    with pytest.raises(AssertionError, match="starves"):
        nothing_waits_beyond_patience(2, "fair", False, 29)


def test_the_same_history_gives_the_same_plans_under_two_hash_seeds() -> None:
    program = (
        "from tests.core.test_scheduling_properties import *\n"
        "history=[Ask(1+(i*7)%4,1+i%3,0,20+i,[0,130][i%2],[Tier.ON_DEMAND,Tier.SPOT][i%3==0],i%2,f'p{i%4}','u',i*3) for i in range(30)]\n"
        "tree=(queue_of('p0',guaranteed=(('gpu',8000),)),)\n"
        "yard=play(Setting(('large',)*3,tree,tuple(history)))\n"
        "print(hash_of(yard))\n"
    )
    seen = set()
    for seed in ("1", "2"):
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True, timeout=120,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        seen.add(done.stdout)
    assert len(seen) == 1


def hash_of(yard: Yard) -> str:
    """A digest of every plan."""
    from hashlib import sha256

    return sha256(repr(yard.plans).encode()).hexdigest()


def test_lines_passed_over_under_an_old_plan_are_tried_under_the_new_one() -> None:
    """A displaced job takes the plan over in the turn in which its room comes free; the others fit beside it."""
    tree = (
        queue_of("p0", guaranteed=(("gpu", 0),)),
        queue_of("p1", guaranteed=(("gpu", 0),), weight_milli=500),
        queue_of("p2", limit=(("gpu", 2_000),)),
    )

    def ask(gpus: int, at_s: int, *, user: str = "u", **more: Any) -> Ask:
        known: dict[str, Any] = {
            "nodes": 1, "nodes_min": 0, "runs_s": 5, "limit_s": 0, "tier": Tier.ON_DEMAND, "priority": 0, "project": "p0",
        }  # fmt: skip
        return Ask(gpus=gpus, at_s=at_s, user=user, **(known | more))

    history = [
        *(ask(1, 0) for _ in range(4)),
        *(ask(1, 6) for _ in range(6)),
        ask(4, 1, limit_s=130, tier=Tier.SPOT),
        ask(4, 0, user="v", runs_s=7),
        ask(2, 1),
        ask(8, 0, runs_s=7),
    ]
    nobody_waits_while_there_is_room(Setting(("large",) * 2, tree, tuple(history)))


def test_whoever_waited_for_the_last_window_is_tried_when_it_is_over() -> None:
    known: dict[str, Any] = {"priority": 0, "user": "u"}
    waits = Ask(gpus=1, nodes=2, nodes_min=0, runs_s=38, limit_s=0, tier=Tier.ON_DEMAND, project="p0", at_s=25, **known)
    late = Ask(gpus=8, nodes=3, nodes_min=1, runs_s=92, limit_s=130, tier=Tier.SPOT, project="p1", at_s=138, **known)
    setting = Setting(("large",), (), (waits, late), order="least-attained", window=(0, 84, 55, 0))
    nobody_waits_while_there_is_room(setting)
