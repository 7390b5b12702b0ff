"""The order of the queue on small clusters: fairness, guarantees, ageing, undo; each promise with a planted bug."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_fairness import is_refuted
from tests.core.test_quota import project, queue
from tidemill.core import queueing
from tidemill.core.queueing import Line, WaitingLines
from tidemill.core.quota import QuotaTree
from tidemill.model.ids import JobId, PrincipalId, ProjectId, WorkloadId
from tidemill.model.job import Job, JobState
from tidemill.model.queue import Queue
from tidemill.units import DAY_NS, HOUR_NS, MINUTE_NS

Amounts = dict[str, int]


def job(number: int, owner: str, *, at: int = 0, priority: int = 0) -> Job:
    return Job(
        id=JobId(f"j{number:04d}"),
        workload_id=WorkloadId("w"),
        project_id=ProjectId(owner),
        index=0,
        state=JobState.QUEUED,
        version=1,
        priority=priority,
        submitted_ns=at,
    )


class Cluster:
    """A pool of resources without nodes: a job starts when what it needs is left. ``wants`` is what a line's jobs need."""

    def __init__(self, capacity: Mapping[str, int], queues: Iterable[Queue] = (), **more: Any) -> None:
        self.tree = QuotaTree(half_life_ns=more.pop("half_life_ns", 0))
        for one in queues:
            self.tree.set_queue(one)
        self.tree.set_capacity(capacity)
        self.left = dict(capacity)
        self.waiting: set[JobId] = set()
        self.jobs: dict[JobId, Job] = {}
        self.running: dict[JobId, Line] = {}
        self.when_refused: dict[ProjectId, dict[JobId, Line]] = {}
        """What ran when a job of a project was first refused; smaller jobs of others may still have started then."""
        self.queue = WaitingLines(self.waiting.__contains__, self.tree, amounts_of=lambda line: dict(line.gang), **more)

    def line(self, owner: str, wants: Amounts, user: str = "ann") -> Line:
        return Line(ProjectId(owner), gang=tuple(sorted(wants.items())), principal_id=PrincipalId(user))

    def submit(self, owner: str, wants: Amounts, *, user: str = "ann", at: int = 0, priority: int = 0) -> JobId:
        new = job(len(self.jobs), owner, at=at, priority=priority)
        self.jobs[new.id] = new
        self.waiting.add(new.id)
        self.queue.add(self.line(owner, wants, user), new)
        return new.id

    def turn(self, now: int | None = None) -> list[JobId]:
        """Start what fits, in order; the ids of what started."""
        self.queue.commit()
        self.tree.advance(now or 0)
        closed: set[Line] = set()
        started = []
        for line, job_id in self.queue.heads(closed.__contains__, now=now):
            wants = dict(line.gang)
            if any(self.left.get(name, 0) < amount for name, amount in wants.items()):
                closed.add(line)
                self.when_refused.setdefault(line.project_id, dict(self.running))
                continue
            self.queue.remove(line, job_id)
            self.waiting.discard(job_id)
            self.tree.hold(line.project_id, line.principal_id, wants, 1)
            for name, amount in wants.items():
                self.left[name] -= amount
            self.running[job_id] = line
            started.append(job_id)
        return started

    def end(self, job_id: JobId) -> None:
        line = self.running.pop(job_id)
        self.tree.release(line.project_id, line.principal_id, dict(line.gang), 1)
        for name, amount in line.gang:
            self.left[name] += amount

    def held(self, owner: str) -> int:
        return sum(1 for line in self.running.values() if line.project_id == owner)


def gpus(count: float) -> Amounts:
    return {"H100": int(count * 1_000)}


# -- fair order -----------------------------------------------------------------------------------------------------------


def test_projects_take_turns_by_weight() -> None:
    cluster = Cluster(gpus(9), (queue("a", owner="p", weight_milli=2_000), queue("b", owner="r")))
    for _ in range(9):
        cluster.submit("p", gpus(1))
    for _ in range(9):
        cluster.submit("r", gpus(1))
    cluster.turn()
    assert (cluster.held("p"), cluster.held("r")) == (6, 3)


def test_a_department_does_not_get_ahead_by_opening_projects() -> None:
    queues = [queue("a"), queue("b"), queue("b0", "b", "r")] + [queue(f"a{n}", "a", f"p{n}") for n in range(4)]
    cluster = Cluster(gpus(8), queues)
    for number in range(8):
        cluster.submit(f"p{number % 4}", gpus(1))
        cluster.submit("r", gpus(1))
    cluster.turn()
    assert cluster.held("r") == 4


def test_who_holds_every_h100_still_has_its_turn_at_an_a100() -> None:
    """Neither its colleague in the department nor the project itself waits until others have as much of the A100s."""
    queues = [queue("a"), queue("ap", "a", "p"), queue("aq", "a", "q"), queue("b", owner="r")]
    cluster = Cluster({"H100": 2_000, "A100": 9_000}, queues)
    for _ in range(2):
        cluster.submit("p", gpus(1))
    cluster.turn()
    for _ in range(9):
        for owner in "pqr":
            cluster.submit(owner, {"A100": 1_000})
    cluster.turn()
    assert cluster.held("p") - 2 + cluster.held("q") in (4, 5)
    assert cluster.held("q") == 2


def test_users_of_a_project_take_turns_whoever_has_more_waiting() -> None:
    cluster = Cluster(gpus(4))
    for _ in range(8):
        cluster.submit("p", gpus(1))
    for _ in range(2):
        cluster.submit("p", gpus(1), user="bob", at=5)
    started = cluster.turn()
    assert sum(1 for one in started if cluster.running[one].principal_id == "bob") == 2


def test_who_took_much_lately_goes_last() -> None:
    cluster = Cluster(gpus(4), half_life_ns=DAY_NS)
    cluster.tree.advance(0)
    long = [cluster.submit("p", gpus(1)) for _ in range(4)]
    cluster.turn(0)
    cluster.tree.advance(DAY_NS)
    for one in long:
        cluster.end(one)
    first, second = cluster.submit("p", gpus(4), at=1), cluster.submit("r", gpus(4), at=2)
    assert cluster.turn(DAY_NS) == [second]
    assert first in cluster.waiting


def test_with_equal_shares_the_earlier_job_goes_first_and_then_the_id() -> None:
    cluster = Cluster(gpus(1))
    late, early = cluster.submit("a", gpus(1), at=7), cluster.submit("z", gpus(1), at=3)
    assert [one for _, one in cluster.queue.in_order()] == [early, late]
    same = Cluster(gpus(1))
    first = same.submit("z", gpus(1))
    same.submit("a", gpus(1))
    assert same.turn() == [first]


def test_priority_and_age_within_what_a_user_submits() -> None:
    cluster = Cluster(gpus(9), ageing_ns=15 * MINUTE_NS)
    old = cluster.submit("p", gpus(1), at=0)
    young = cluster.submit("p", gpus(1), at=HOUR_NS, priority=5)
    younger = cluster.submit("p", gpus(1), at=2 * HOUR_NS, priority=5)
    assert [one for _, one in cluster.queue.in_order()] == [young, old, younger]


def test_an_order_plug_in_may_rank() -> None:
    cluster = Cluster(gpus(9))
    slow, quick = job(1, "p"), job(2, "p", at=9)
    cluster.waiting.update((slow.id, quick.id))
    cluster.queue.add(cluster.line("p", gpus(1)), slow, 100.0)
    cluster.queue.add(cluster.line("p", gpus(2)), quick, 1.5)
    assert [one for _, one in cluster.queue.in_order()] == [quick.id, slow.id]


DEMANDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=4)
Filled = tuple[list[tuple[int, int]], int, int, random.Random]
FILLED = st.tuples(DEMANDS, st.integers(12, 40), st.integers(12, 40), st.randoms(use_true_random=False))


def fill(case: Filled) -> tuple[Cluster, list[Amounts]]:
    """A cluster filled by tenants of equal weight, each with one kind of job and more of them than ever fit."""
    demands, gpu, cpu, dice = case
    capacity = {"H100": gpu * 1_000, "cpu": cpu * 1_000}
    cluster = Cluster(capacity)
    wants = [{"H100": one * 1_000, "cpu": other * 1_000} for one, other in demands]
    order = [at for at in range(len(wants)) for _ in range(41)]
    dice.shuffle(order)
    for at in order:
        cluster.submit(f"t{at}", wants[at])
    cluster.turn()
    return cluster, wants


def dominant(wants: Amounts, capacity: Mapping[str, int]) -> float:
    return max(amount / capacity[name] for name, amount in wants.items())


def each_gets_its_part(case: Filled) -> bool:
    """Each of n gets 1/n of what it needs most, but for one job."""
    cluster, wants = fill(case)
    ones = [dominant(want, cluster.tree.capacity) for want in wants]
    gets = [cluster.held(f"t{at}") * one for at, one in enumerate(ones)]
    return all(part >= 1 / len(ones) - max(ones) - 1e-9 for part in gets)


def nobody_envies(case: Filled) -> bool:
    """When it is first refused, nobody could run more with what another has, but for one job of the other."""
    cluster, wants = fill(case)
    for mine, want in enumerate(wants):
        ran = [line.project_id for line in cluster.when_refused[ProjectId(f"t{mine}")].values()]
        for others, other in enumerate(wants):
            fitting = min(ran.count(ProjectId(f"t{others}")) * other[name] // want[name] for name in want)
            slack = dominant(other, cluster.tree.capacity) / dominant(want, cluster.tree.capacity)
            if fitting > ran.count(ProjectId(f"t{mine}")) + slack + 1e-9:
                return False
    return True


@given(FILLED)
@settings(max_examples=150, deadline=None)
def test_sharing_is_worth_it_for_everybody(case: Filled) -> None:
    assert each_gets_its_part(case)


@given(FILLED)
@settings(max_examples=150, deadline=None)
def test_nobody_envies_another_of_equal_weight(case: Filled) -> None:
    assert nobody_envies(case)


def compares_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuotaTree, "key", lambda *_: (False, 0.0))


def compares_one_resource(patch: pytest.MonkeyPatch) -> None:
    key = QuotaTree.key

    def only(self: QuotaTree, *args: Any) -> tuple[bool, float]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "_pools", {"cpu": ((), 0)})
            return key(self, *args)

    patch.setattr(QuotaTree, "key", only)


def keeps_the_first_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuotaTree, "hold", lambda *_: None)


def prefers_who_has_most(patch: pytest.MonkeyPatch) -> None:
    key = QuotaTree.key
    patch.setattr(QuotaTree, "key", lambda *args: (False, -key(*args)[1]))


@pytest.mark.parametrize(
    ("promise", "plant"),
    [
        (each_gets_its_part, compares_nothing),
        (each_gets_its_part, compares_one_resource),
        (each_gets_its_part, keeps_the_first_key),
        (each_gets_its_part, prefers_who_has_most),
        (nobody_envies, compares_nothing),
        (nobody_envies, keeps_the_first_key),
        (nobody_envies, prefers_who_has_most),
    ],
)
def test_an_unfair_order_is_caught(
    promise: Callable[[Any], bool], plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert is_refuted(FILLED, promise, 2_000)


MODELS = ("H100", "A100", "L4")
TASTES = st.tuples(
    st.lists(st.sets(st.sampled_from(MODELS), min_size=1), min_size=2, max_size=5),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.booleans(),
)


def each_model_is_shared_by_those_who_want_it(case: tuple[list[set[str]], tuple[int, int, int], bool]) -> bool:
    """Whoever wants a model gets its part of it, whatever it or its department holds of others."""
    tastes, counts, is_nested = case
    capacity = {model: count * 1_000 for model, count in zip(MODELS, counts, strict=True)}
    queues = [queue("a"), queue("b")] if is_nested else []
    above = ("b", "a") if is_nested else ("", "")
    queues += [queue(f"q{at}", above[at % 2], f"t{at}") for at in range(len(tastes))]
    cluster = Cluster(capacity, queues)
    for _ in range(max(counts)):
        for at, taste in enumerate(tastes):
            for model in sorted(taste):
                cluster.submit(f"t{at}", {model: 1_000})
    cluster.turn()
    for model, count in zip(MODELS, counts, strict=True):
        wanting = [at for at, taste in enumerate(tastes) if model in taste]
        for at in wanting:
            beside = sum(1 for other in wanting if other % 2 == at % 2) if is_nested else len(wanting)
            sides = len({other % 2 for other in wanting}) if is_nested else 1
            has = sum(1 for line in cluster.running.values() if line == cluster.line(f"t{at}", {model: 1_000}))
            if has < count // sides // beside:
                return False
    return True


@given(TASTES)
@settings(deadline=None)
def test_each_model_is_shared_by_those_who_want_it(case: tuple[list[set[str]], tuple[int, int, int], bool]) -> None:
    assert each_model_is_shared_by_those_who_want_it(case)


def test_comparing_what_the_next_job_does_not_need_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    key = QuotaTree.key
    monkeypatch.setattr(QuotaTree, "key", lambda self, party, _amounts, also: key(self, party, None, also))
    assert is_refuted(TASTES, each_model_is_shared_by_those_who_want_it)


def test_one_tree_for_all_kinds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing._Order, "_kinds", lambda self, lines: [""] * len(lines))
    assert is_refuted(TASTES, each_model_is_shared_by_those_who_want_it)


TREE = (
    queue("a", guaranteed=(("gpu", 5_000),)),
    queue("ap", "a", "p", guaranteed=(("gpu", 2_000),)),
    queue("aq", "a", "q", weight_milli=3_000),
    queue("br", owner="r", guaranteed=(("gpu", 3_000),)),
)
Mixed = list[tuple[tuple[str, str, str], int, int]]
OF_ALL_KINDS = [
    ("p", "ann", "H100"),
    ("p", "ann", "A100"),
    ("p", "ann", ""),
    ("q", "ann", "gpu"),
    ("q", "ann", ""),
    ("r", "ann", "gpu:H100"),
    ("r", "ann", "A100"),
    ("s", "ann", "H100"),
]
OF_ONE_KIND = [(owner, user, "H100") for owner in "pqrs" for user in ("ann", "bob")]
MIXED = st.one_of(
    st.tuples(
        st.just(queues),
        st.lists(st.tuples(st.sampled_from(kinds), st.integers(1, 4), st.integers(-2, 2)), min_size=1, max_size=25),
    )
    for queues, kinds in (((), OF_ALL_KINDS), (TREE, OF_ONE_KIND))
)


def is_as_if_ordered_anew(case: tuple[tuple[Queue, ...], Mixed]) -> bool:
    """One pass gives the order that looking at everything again after each start gives."""
    queues, jobs = case
    orders = []
    for starts_per_pass in (1, 100):
        cluster = Cluster({"H100": 90_000, "A100": 90_000, "cpu": 400_000}, queues, ageing_ns=1, half_life_ns=DAY_NS)
        for number, ((owner, user, kind), count, priority) in enumerate(jobs):
            wants = {"cpu": 1_000 * count} | ({kind: count * 1_000} if kind else {})
            cluster.submit(owner, wants, user=user, at=number // 3, priority=priority)
        orders.append(list(passes(cluster, starts_per_pass)))
    return orders[0] == orders[1]


def passes(cluster: Cluster, starts_per_pass: int) -> Iterable[JobId]:
    while len(cluster.queue):
        for count, (line, one) in enumerate(cluster.queue.heads(lambda _: False)):
            if count == starts_per_pass:
                break
            cluster.queue.remove(line, one)
            cluster.waiting.discard(one)
            wants = dict(line.gang)
            kind = next((name for name in wants if name != "cpu"), "cpu")
            wants["A100" if kind == "gpu" else kind.removeprefix("gpu:")] = wants.pop(kind)
            cluster.tree.hold(line.project_id, line.principal_id, wants, 1)
            yield one


@given(MIXED)
@settings(max_examples=200, deadline=None)
def test_one_pass_is_as_if_ordered_anew_after_each_start(case: tuple[tuple[Queue, ...], Mixed]) -> None:
    assert is_as_if_ordered_anew(case)


def does_not_look_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queueing._Order, "_has_moved", lambda *_: False)


def does_not_go_up_to_the_root(patch: pytest.MonkeyPatch) -> None:
    replace_first = queueing._Order.replace_first

    def careless(self: Any, head: Any) -> None:
        if head is not None and len(self._first) > 2:
            self._first = self._first[-2:]
        replace_first(self, head)

    patch.setattr(queueing._Order, "replace_first", careless)


def does_not_notice_changes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuotaTree, "changes", property(lambda _: 0, lambda *_: None), raising=False)


@pytest.mark.parametrize("plant", [does_not_look_again, does_not_go_up_to_the_root, does_not_notice_changes])
def test_an_order_that_is_not_kept_up_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert is_refuted(MIXED, is_as_if_ordered_anew)


def test_a_user_decides_by_priority_between_jobs_that_compete() -> None:
    cluster = Cluster({"H100": 9_000, "A100": 9_000}, ageing_ns=MINUTE_NS)
    cluster.tree.hold(ProjectId("p"), PrincipalId("ann"), {"A100": 9_000})
    low = cluster.submit("p", gpus(1))
    high = cluster.submit("p", {"gpu": 1_000}, priority=9)
    assert [one for _, one in cluster.queue.in_order()] == [high, low]


# -- guarantees -----------------------------------------------------------------------------------------------------------

GUARANTEES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 9), st.sampled_from([200, 1_000, 9_000])), min_size=2, max_size=5
)


def guarantees_are_kept(tenants: list[tuple[int, int, int]]) -> bool:
    """In a fleet that covers them, each gets what is guaranteed to it as far as it wants it, whatever others ask."""
    queues = [queue("a", guaranteed=(("gpu", sum(sure for sure, *_ in tenants[1:]) * 1_000),))]
    for at, (sure, _, weight) in enumerate(tenants):
        queues.append(
            queue(f"q{at}", "a" if at else "", f"t{at}", weight_milli=weight, guaranteed=(("gpu", sure * 1_000),))
        )
    cluster = Cluster(gpus(sum(sure for sure, *_ in tenants)), queues)
    for at, (_, wanted, _) in enumerate(tenants):
        for _ in range(wanted):
            cluster.submit(f"t{at}", gpus(1))
    cluster.turn()
    return all(cluster.held(f"t{at}") >= min(sure, wanted) for at, (sure, wanted, _) in enumerate(tenants))


@given(GUARANTEES)
@settings(deadline=None)
def test_what_is_guaranteed_is_given(tenants: list[tuple[int, int, int]]) -> None:
    assert guarantees_are_kept(tenants)


def test_an_order_without_guarantees_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    key = QuotaTree.key
    monkeypatch.setattr(QuotaTree, "key", lambda *args: (False, key(*args)[1]))
    assert is_refuted(GUARANTEES, guarantees_are_kept)


# -- nothing starves --------------------------------------------------------------------------------------------------------

RIVALS = st.tuples(st.integers(-20, 0), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 5))


def the_lowest_gets_its_turn(case: tuple[int, list[int], int]) -> bool:
    """One GPU, a job each minute, and others of higher priority keep coming."""
    mine, rivals, backlog = case
    cluster = Cluster(gpus(1), ageing_ns=MINUTE_NS)
    for _ in range(backlog):
        cluster.submit("p", gpus(1), priority=20)
    lowest = cluster.submit("p", gpus(1), priority=mine)
    for minute in range(20 - mine + backlog + 3):
        cluster.submit("p", gpus(1), at=minute * MINUTE_NS, priority=rivals[minute % len(rivals)])
        for one in cluster.turn(minute * MINUTE_NS):
            cluster.end(one)
        if lowest not in cluster.waiting:
            return True
    return False


@given(RIVALS)
@settings(deadline=None)
def test_nothing_is_passed_for_ever(case: tuple[int, list[int], int]) -> None:
    assert the_lowest_gets_its_turn(case)


def test_strict_priority_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    init = WaitingLines.__init__
    monkeypatch.setattr(
        WaitingLines, "__init__", lambda self, *args, **more: init(self, *args, **(more | {"ageing_ns": None}))
    )
    assert is_refuted(RIVALS, the_lowest_gets_its_turn)


def patient(rivals: int, *, looks_at_the_clock: bool = True) -> bool:
    """Whether a job of a heavily used project starts within its patience though light ones keep coming."""
    cluster = Cluster(gpus(1), half_life_ns=DAY_NS, patience_ns=HOUR_NS)
    cluster.tree.hold(ProjectId("heavy"), PrincipalId("ann"), {"H100": 900})
    cluster.left["H100"] = 100
    mine = cluster.submit("heavy", {"H100": 100})
    for minute in range(61):
        for number in range(rivals):
            cluster.submit(f"light{number}", {"H100": 100}, at=minute * MINUTE_NS)
        for one in cluster.turn(minute * MINUTE_NS if looks_at_the_clock else None):
            cluster.end(one)
    return mine not in cluster.waiting


def test_a_job_that_has_waited_too_long_goes_before_all_others() -> None:
    assert patient(2)


def test_without_patience_it_would_starve() -> None:
    assert not patient(2, looks_at_the_clock=False)


def test_late_jobs_go_oldest_first_though_others_of_their_line_rank_before_them() -> None:
    cluster = Cluster(gpus(9), ageing_ns=DAY_NS, patience_ns=HOUR_NS)
    cluster.submit("p", gpus(1), at=HOUR_NS, priority=9)
    late = [cluster.submit("p", gpus(1), at=minute) for minute in (3, 1, 2)]
    assert [one for _, one in cluster.queue.in_order(3, now=2 * HOUR_NS - 1)] == [late[1], late[2], late[0]]
    assert cluster.turn(2 * HOUR_NS - 1)[:3] == [late[1], late[2], late[0]]


def test_patience_may_count_from_a_later_instant_than_submission() -> None:
    cluster = Cluster(gpus(9), patience_ns=HOUR_NS)
    displaced, other = job(1, "p"), job(2, "r", at=-1)
    cluster.waiting.update((displaced.id, other.id))
    cluster.queue.add(cluster.line("p", gpus(1)), displaced, since_ns=HOUR_NS)
    cluster.queue.add(cluster.line("r", gpus(1)), other, since_ns=2 * HOUR_NS)
    assert [one for _, one in cluster.queue.in_order(now=HOUR_NS)] == [other.id, displaced.id]
    assert [one for _, one in cluster.queue.in_order(now=2 * HOUR_NS)] == [displaced.id, other.id]


# -- the order is foreseen, deterministic and undone exactly -------------------------------------------------------------

SUBMITTED = st.lists(
    st.tuples(
        st.sampled_from("pqrs"),
        st.sampled_from([1, 1, 2, 3]),
        st.sampled_from(["ann", "bob"]),
        st.integers(0, 3),
        st.integers(-2, 2),
    ),
    min_size=1,
    max_size=25,
)
Submitted = list[tuple[str, int, str, int, int]]


def submitted(jobs: Submitted, order: Iterable[int] | None = None) -> Cluster:
    cluster = Cluster(gpus(100), TREE, ageing_ns=1, patience_ns=HOUR_NS, half_life_ns=DAY_NS)
    cluster.tree.open_project(project("s"))
    cluster.tree.hold(ProjectId("q"), PrincipalId("bob"), gpus(4))
    for number in order or range(len(jobs)):
        owner, count, user, at, priority = jobs[number]
        new = job(number, owner, at=at * HOUR_NS // 2, priority=priority)
        cluster.jobs[new.id] = new
        cluster.waiting.add(new.id)
        cluster.queue.add(cluster.line(owner, gpus(count), user), new)
    return cluster


def order_of(cluster: Cluster, now: int = HOUR_NS) -> list[JobId]:
    return [one for _, one in cluster.queue.in_order(now=now)]


def is_foreseen(jobs: Submitted) -> bool:
    cluster = submitted(jobs)
    cluster.tree.advance(HOUR_NS)
    foreseen = order_of(cluster)
    ahead = [cluster.queue.ahead_of(cluster.jobs[one], now=HOUR_NS) for one in foreseen]
    return foreseen == cluster.turn(HOUR_NS) and ahead == list(range(len(foreseen)))


@given(SUBMITTED)
@settings(max_examples=200, deadline=None)
def test_what_is_foreseen_happens_when_everything_fits(jobs: Submitted) -> None:
    assert is_foreseen(jobs)


def test_a_forecast_that_counts_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing._Order, "charge", lambda *_: None)
    assert is_refuted(SUBMITTED, is_foreseen)


SHUFFLED = st.tuples(SUBMITTED, st.randoms(use_true_random=False))


def is_the_same_however_it_came(case: tuple[Submitted, random.Random]) -> bool:
    jobs, dice = case
    other = list(range(len(jobs)))
    dice.shuffle(other)
    one, two = submitted(jobs), submitted(jobs, other)
    return order_of(one) == order_of(two) and one.turn(HOUR_NS) == two.turn(HOUR_NS)


@given(SHUFFLED)
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_depend_on_how_jobs_came(case: tuple[Submitted, random.Random]) -> None:
    assert is_the_same_however_it_came(case)


def test_ties_left_to_chance_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    insert = WaitingLines._insert

    def careless(self: WaitingLines, line: Line, rank: float, submitted_ns: int, job_id: JobId, since: int) -> Any:
        return insert(self, line, len(self._members), submitted_ns, job_id, since)

    monkeypatch.setattr(WaitingLines, "_insert", careless)
    assert is_refuted(SHUFFLED, is_the_same_however_it_came)


UNDONE = st.tuples(SUBMITTED, st.lists(st.tuples(st.integers(0, 24), st.sampled_from("rcna")), max_size=12))


def is_undone(case: tuple[Submitted, list[tuple[int, str]]]) -> bool:
    """A turn in which jobs start, are cancelled, come and come back, and which then never happened."""
    jobs, steps = case
    cluster = submitted(jobs)
    cluster.tree.advance(HOUR_NS)
    cluster.queue.commit()
    waiting, before = set(cluster.waiting), order_of(cluster)
    for at, what in steps:
        members = sorted(cluster.waiting)
        if what == "n":
            cluster.submit("p", gpus(1), at=at)
        elif not members:
            continue
        elif what == "c":
            cluster.waiting.discard(members[at % len(members)])
        else:
            line, one = next((line, one) for line, one in cluster.queue.in_order() if one == members[at % len(members)])
            cluster.queue.remove(line, one)
            if what == "a":
                cluster.queue.add(line, cluster.jobs[one], -1e30)
            else:
                cluster.waiting.discard(one)
        look(cluster)
    cluster.waiting.clear()
    cluster.waiting.update(waiting)
    cluster.queue.rollback()
    after = order_of(cluster)
    return after == before and len(cluster.queue) == len(waiting) and cluster.turn(HOUR_NS) == before


def look(cluster: Cluster) -> None:
    """Every line is tried once, late jobs first, and nothing fits."""
    closed: set[Line] = set()
    for line, _ in cluster.queue.heads(closed.__contains__, now=HOUR_NS):
        closed.add(line)


@given(UNDONE)
@settings(max_examples=200, deadline=None)
def test_an_undone_turn_leaves_no_trace(case: tuple[Submitted, list[tuple[int, str]]]) -> None:
    assert is_undone(case)


def keeps_what_was_undone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WaitingLines, "rollback", WaitingLines.commit)


def forgets_the_rank(patch: pytest.MonkeyPatch) -> None:
    rollback = WaitingLines.rollback

    def careless(self: WaitingLines) -> None:
        self._journal[:] = [(came, line, entry._replace(rank=0)) for came, line, entry in self._journal]
        rollback(self)

    patch.setattr(WaitingLines, "rollback", careless)


def undoes_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    rollback = WaitingLines.rollback

    def careless(self: WaitingLines) -> None:
        self._journal.reverse()
        rollback(self)

    patch.setattr(WaitingLines, "rollback", careless)


@pytest.mark.parametrize("plant", [keeps_what_was_undone, forgets_the_rank, undoes_in_the_wrong_order])
def test_an_undo_that_leaves_traces_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert is_refuted(UNDONE, is_undone)


# -- cost and the rest ----------------------------------------------------------------------------------------------------


def test_only_lines_that_are_open_are_touched() -> None:
    cluster = Cluster(gpus(1))
    for number in range(300):
        cluster.submit(f"p{number % 30}", gpus(1 + number % 3))
    looked_at: list[JobId] = []
    queue_ = cluster.queue
    queue_._is_waiting = lambda one: bool(looked_at.append(one)) or one in cluster.waiting
    assert list(queue_.heads(lambda _: True)) == []
    assert looked_at == []
    open_ = cluster.line("p7", gpus(2))
    next(queue_.heads(lambda line: line != open_))
    assert len(looked_at) == 1


def test_a_job_that_came_back_is_tried_once() -> None:
    cluster = Cluster(gpus(9), patience_ns=1)
    one = cluster.submit("p", gpus(1))
    line = cluster.line("p", gpus(1))
    for _ in range(3):
        cluster.queue.remove(line, one)
        cluster.queue.add(line, cluster.jobs[one])
        cluster.queue.add(line, cluster.jobs[one])
    assert len(cluster.queue) == 1
    assert cluster.turn(HOUR_NS) == [one]
    assert order_of(cluster) == []


def test_lines_without_jobs_are_forgotten() -> None:
    cluster = Cluster(gpus(99))
    for number in range(20):
        cluster.submit(f"p{number}", gpus(1))
    cluster.turn()
    cluster.turn()
    assert cluster.queue._lanes == {}


def test_a_line_is_equal_to_its_copies_wherever_they_are_made() -> None:
    line = Line(ProjectId("p"), gang=("g", 1), principal_id=PrincipalId("ann"))
    again = Line(ProjectId("p"), gang=("g", 1), principal_id=PrincipalId("ann"))
    for other in (copy.deepcopy(line), pickle.loads(pickle.dumps(line)), again):
        assert other == line
        assert hash(other) == hash(line)
    assert line != Line(ProjectId("p"), gang=("g", 2), principal_id=PrincipalId("ann"))


def test_without_a_tree_all_jobs_are_ranked_together() -> None:
    waiting = {JobId(f"j{number:04d}") for number in range(4)}
    lines = WaitingLines(waiting.__contains__)
    for number, priority in enumerate((0, 5, 0, 5)):
        lines.add(Line(ProjectId(f"p{number % 2}"), gang=number), job(number, "p", at=-number, priority=priority))
    tried = []
    for line, one in lines.heads(lambda _: False):
        lines.remove(line, one)
        tried.append(one)
    assert tried == ["j0003", "j0001", "j0002", "j0000"]
