"""What must hold on every cluster, under every tree, in every history; and for each promise a planted bug it catches.

The yard's own auditor looks after every turn: never over capacity, gangs whole, limits kept, sums that match.
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
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.core.yard import CALM, START, Yard, gpu_node, queue_of, spec
from tidemill.core import preempt, reserve, scheduling, turn, waiting
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Kept, fits
from tidemill.core.queueing import WaitingLines
from tidemill.core.quota import QuotaTree
from tidemill.core.world import World
from tidemill.model.events import DeviceFailed, Marking, NodeJoined, NodeMarked, NodeWentAway
from tidemill.model.ids import DeviceId, NodeId
from tidemill.model.job import JobState
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.spec import Tier, WorkloadSpec
from tidemill.model.values import replace
from tidemill.units import SECOND_NS


@dataclass(frozen=True)
class Ask:
    """One workload of a history."""

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

    def spec(self) -> WorkloadSpec:
        return spec(
            self.gpus,
            nodes=self.nodes,
            nodes_min=min(self.nodes_min, self.nodes),
            max_duration_ns=self.limit_s * SECOND_NS,
            tier=self.tier,
            priority=self.priority,
        )


def asks(*, bounded: bool = False, tenants: int = 4) -> st.SearchStrategy[list[Ask]]:
    one = st.builds(
        Ask,
        gpus=st.sampled_from([1, 1, 2, 4, 8]),
        nodes=st.sampled_from([1, 1, 1, 2, 3]),
        nodes_min=st.just(0) if bounded else st.sampled_from([0, 0, 1]),
        runs_s=st.integers(5, 120),
        limit_s=st.integers(130, 200) if bounded else st.sampled_from([0, 130, 300]),
        tier=st.just(Tier.ON_DEMAND) if bounded else st.sampled_from([Tier.ON_DEMAND, Tier.ON_DEMAND, Tier.SPOT]),
        priority=st.just(0) if bounded else st.sampled_from([0, 0, 10]),
        project=st.sampled_from([f"p{i}" for i in range(tenants)]),
        user=st.sampled_from(["u", "v"]),
        at_s=st.integers(0, 150),
    )
    return st.lists(one, min_size=1, max_size=14)


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
NODES = st.integers(2, 4)


def play(nodes: int, tree: tuple[Queue, ...], history: list[Ask], policy: Policy = CALM, *, grace_s: int = 0) -> Yard:
    """A history played to its end."""
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(nodes)), queues=tree, policy=policy)
    yard.grace_taken_ns = grace_s * SECOND_NS
    for ask in history:
        yard.submit(ask.spec(), runs_s=ask.runs_s, project=ask.project, user=ask.user, at_s=ask.at_s)
    yard.run()
    return yard


# -- the promises -----------------------------------------------------------------------------------------------------


def everything_ends_that_can(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    yard = play(nodes, tree, history, replace(CALM, min_run_ns=2 * SECOND_NS), grace_s=3)
    for number, ask in enumerate(sorted(history, key=lambda one: 0), 1):
        job = f"job_{number:05d}-0"
        smallest = ask.gpus * (min(ask.nodes_min, ask.nodes) or ask.nodes) * 1000
        limit = min((dict(q.limit).get("gpu", 1 << 60) for q in tree if q.project_id == ask.project), default=1 << 60)
        if smallest <= limit and ask.nodes * 1 <= nodes * (8 // ask.gpus):
            assert yard.state(job) in (JobState.SUCCEEDED, JobState.FAILED), f"{job} is {yard.state(job)}"
            assert job in yard.started


def whoever_is_displaced_is_displaced_for_somebody_who_starts(
    nodes: int, tree: tuple[Queue, ...], history: list[Ask]
) -> None:
    yard = play(nodes, tree, history, grace_s=5)
    for at, victim, body in yard.events("Preempted"):
        taker = body["by"].removeprefix("room for ")
        assert taker in yard.started, f"{victim} went for {taker}, which never started"
        after = [start for start in yard.started[taker] if start >= at]
        assert after, f"{victim} went for {taker}, which had started before"
        assert after[0] <= at + 5 * SECOND_NS, f"{taker} did not start when {victim} was gone"


def nobody_displaces_who_displaced_them(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    yard = play(nodes, tree, history)
    pairs = {(body["by"].removeprefix("room for "), victim) for _, victim, body in yard.events("Preempted")}
    assert not any((victim, taker) in pairs for taker, victim in pairs), "two jobs displace each other in turn"


def the_first_blocked_job_is_not_delayed(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    """In one project nothing goes before an earlier submission but by backfill, so the first plan is kept."""
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(nodes)), policy=replace(CALM, preemption=False))
    plans: dict[str, int] = {}
    turn_of = yard.turn

    def watched(facts: list[Any]) -> Any:
        plan = turn_of(facts)
        held_back = yard.world.held_back
        if held_back is not None:
            plans.setdefault(held_back.job_id, held_back.at_ns)
        return plan

    yard.turn = watched  # type: ignore[method-assign]
    for ask in history:
        yard.submit(ask.spec(), runs_s=ask.runs_s, at_s=ask.at_s)
    yard.run()
    for job, at in plans.items():
        assert yard.started[job][0] <= at, (
            f"{job} was to start at {at - START} and did at {yard.started[job][0] - START}"
        )


def guarantees_are_there_when_asked_for(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    """Single-GPU work of a project within its guarantee never waits while others borrow."""
    borrowed = [replace(ask, project="p3", tier=Tier.ON_DEMAND, nodes=1, at_s=0) for ask in history]
    yard = play(nodes, tree, [])
    for ask in borrowed:
        yard.submit(replace(ask, runs_s=1000).spec(), runs_s=1000, project="p3")
    yard.run(1)
    total = nodes * 8000
    for queue in tree:
        guaranteed = dict(queue.guaranteed).get("gpu", 0)
        if not queue.project_id or sum(dict(q.guaranteed).get("gpu", 0) for q in tree if q.project_id) > total:
            continue
        jobs = [yard.submit(spec(1), runs_s=500, project=queue.project_id) for _ in range(guaranteed // 1000)]
        assert all(yard.state(job) is not JobState.QUEUED or job in yard.world.promises for job in jobs), queue.name


def nothing_waits_beyond_patience(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    """A wide gang of a user who has had more than others still starts, though small work never stops coming."""
    policy = replace(CALM, patience_ns=100 * SECOND_NS, half_life_ns=10_000 * SECOND_NS)
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(nodes)), policy=policy)
    for _ in range(nodes):
        yard.submit(spec(8), runs_s=5_020, project="p0")
    yard.run(5_000)
    wide = yard.submit(spec(8, nodes=nodes, max_duration_ns=20 * SECOND_NS), runs_s=20, project="p0")
    for at in range(5_000, 6_000, 5):
        for _ in range(nodes):
            yard.submit(spec(4, max_duration_ns=30 * SECOND_NS), runs_s=29, project=f"p{1 + at % 3}", at_s=at)
    yard.run(1_000)
    assert wide in yard.started, "the wide gang starves"


def a_refused_turn_leaves_no_trace(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(nodes)), queues=tree)
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
    for ask in history:
        yard.submit(ask.spec(), runs_s=ask.runs_s, project=ask.project, user=ask.user, at_s=ask.at_s)
    yard.later(START + 60 * SECOND_NS, NodeWentAway(at_ns=0, node_id=NodeId("n0")))
    yard.later(START + 80 * SECOND_NS, NodeJoined(at_ns=0, node=gpu_node("n0", boot_id="again")))
    yard.later(START + 90 * SECOND_NS, NodeMarked(at_ns=0, node_id=NodeId("n1"), marking=Marking.DRAIN))
    yard.later(START + 99 * SECOND_NS, NodeMarked(at_ns=0, node_id=NodeId("n1"), marking=Marking.RESUME))
    yard.later(
        START + 50 * SECOND_NS, DeviceFailed(at_ns=0, node_id=NodeId("n1"), device_id=DeviceId("n1-0"), detail="x")
    )
    yard.run(400)


def fingerprint(world: World) -> tuple[object, ...]:
    free = world.fleet.free()
    return (
        dict(world.nodes), dict(world.jobs), dict(world.attempts), dict(world.allocations), dict(world.workers),
        free.cpu.tolist(), free.memory.tolist(), free.gpu.tolist(), sorted(world.queue.members()), dict(world.delayed),
        dict(world.parked), dict(world.promises), dict(world.reasons), dict(world.growable), world.held_back,
        {p: dict(world.quota.held(p)) for p in world.projects}, {n: dict(v) for n, v in world.by_node.items() if v},
        {n: dict(v) for n, v in world.ports.items() if v}, dict(world.dependents), dict(world.groups),
        sorted((launch, *(int(getattr(world.rows, c)[slot]) for c in ("node", "cpu", "since", "gone", "saved")))
               for launch, slot in world.rows.slot.items()),
    )  # fmt: skip


def the_order_of_nodes_does_not_matter(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    machines = tuple(gpu_node(f"n{at}") for at in range(nodes))
    seen = []
    for order in (machines, tuple(reversed(machines))):
        yard = Yard(nodes=order, queues=tree)
        for ask in history:
            yard.submit(ask.spec(), runs_s=ask.runs_s, project=ask.project, user=ask.user, at_s=ask.at_s)
        yard.run()
        seen.append((yard.started, sorted((a.id, a.node_id) for k, a in yard.stored.items() if k[0] == "Allocation")))
    assert seen[0] == seen[1]


def nobody_waits_while_there_is_room(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
    """After a turn no waiting job fits beside the plan, within its queue's limits."""
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(nodes)), queues=tree)
    turn_of, world = yard.turn, yard.world

    def looked_at(facts: list[Any]) -> Any:
        taken = turn_of(facts)
        plan = world.held_back
        if plan is not None:
            world.take_plan(plan)
        for line, job_id in world.queue.in_order():
            job = world.jobs[job_id]
            is_allowed = world.quota.over_limit(job.project_id, world.amounts_of(line), 1) is None
            is_first = plan is not None and plan.job_id == job_id
            assert is_first or not is_allowed or not fits(world.fleet, line.gang), f"{job_id} waits for nothing"
        if plan is not None:
            world.give_plan(plan)
        world.fleet.commit()
        return taken

    yard.turn = looked_at  # type: ignore[method-assign]
    for ask in history:
        yard.submit(ask.spec(), runs_s=ask.runs_s, project=ask.project, user=ask.user, at_s=ask.at_s)
    yard.run()


PROMISES: list[Callable[[int, tuple[Queue, ...], list[Ask]], None]] = [
    everything_ends_that_can,
    whoever_is_displaced_is_displaced_for_somebody_who_starts,
    nobody_displaces_who_displaced_them,
    the_first_blocked_job_is_not_delayed,
    guarantees_are_there_when_asked_for,
    a_refused_turn_leaves_no_trace,
    the_order_of_nodes_does_not_matter,
    nobody_waits_while_there_is_room,
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_every_promise_holds(promise: Callable[[int, tuple[Queue, ...], list[Ask]], None]) -> None:
    bounded = promise is the_first_blocked_job_is_not_delayed

    @given(NODES, TREES, asks(bounded=bounded))
    @settings(max_examples=60, deadline=None)
    def check(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
        promise(nodes, tree, history)

    check()


@pytest.mark.parametrize("nodes", [2, 3])
def test_nothing_starves(nodes: int) -> None:
    nothing_waits_beyond_patience(nodes, (), [])


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


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[..., None]]] = [
    (keeps_no_places, the_first_blocked_job_is_not_delayed),
    (lets_everything_pass, the_first_blocked_job_is_not_delayed),
    (plans_too_early, the_first_blocked_job_is_not_delayed),
    (displaces_whoever_it_likes, nobody_displaces_who_displaced_them),
    (displaces_without_looking, whoever_is_displaced_is_displaced_for_somebody_who_starts),
    (forgets_promises, whoever_is_displaced_is_displaced_for_somebody_who_starts),
    (never_reclaims, guarantees_are_there_when_asked_for),
    (undoes_rows_badly, a_refused_turn_leaves_no_trace),
    (forgets_to_undo_the_quota, a_refused_turn_leaves_no_trace),
    (prefers_who_joined_first, the_order_of_nodes_does_not_matter),
    (takes_every_line_for_hopeless, nobody_waits_while_there_is_room),
    (overlooks_what_is_free_beside_the_plan, nobody_waits_while_there_is_room),
    (takes_everything_for_settled, nobody_waits_while_there_is_room),
    (remembers_no_release, nobody_waits_while_there_is_room),
]


@pytest.mark.parametrize(
    ("plant", "promise"),
    [pytest.param(*bug, marks=pytest.mark.long if bug[0] is displaces_whoever_it_likes else []) for bug in BUGS],
    ids=lambda each: each.__name__,
)
def test_the_promise_catches_the_planted_bug(
    plant: Callable[[pytest.MonkeyPatch], None],
    promise: Callable[[int, tuple[Queue, ...], list[Ask]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounded = promise is the_first_blocked_job_is_not_delayed
    plant(monkeypatch)

    @given(NODES, TREES, asks(bounded=bounded))
    @settings(max_examples=300, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def check(nodes: int, tree: tuple[Queue, ...], history: list[Ask]) -> None:
        promise(nodes, tree, history)

    with pytest.raises((AssertionError, KeyError, ExceptionGroup, HypothesisException, RecursionError)):
        check()


def test_without_patience_the_wide_gang_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WaitingLines, "_late_heads", lambda self, is_closed, now: iter(()))
    with pytest.raises(AssertionError, match="starves"):
        nothing_waits_beyond_patience(2, (), [])


def test_the_same_history_gives_the_same_plans_under_two_hash_seeds() -> None:
    program = (
        "from tests.core.test_scheduling_properties import *\n"
        "history=[Ask(1+(i*7)%4,1+i%3,0,20+i,[0,130][i%2],[Tier.ON_DEMAND,Tier.SPOT][i%3==0],i%2,f'p{i%4}','u',i*3) for i in range(30)]\n"
        "yard=play(3,(queue_of('p0',guaranteed=(('gpu',8000),)),),history)\n"
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
    nobody_waits_while_there_is_room(2, tree, history)
