"""The quota tree: limits, guarantees and reclaim as tables; random histories under an auditor, with planted bugs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_fairness import is_refuted
from tidemill.core import fairness, quota
from tidemill.core.fairness import Party, covers
from tidemill.core.quota import QuotaTree, why_not_tree
from tidemill.model.ids import OrganizationId, PrincipalId, ProjectId, QueueId
from tidemill.model.plan import ResolvableBy
from tidemill.model.queue import Amounts, Queue
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.units import DAY_NS, HOUR_NS

CAPACITY = {"H100-SXM": 16_000, "A100": 8_000, "cpu": 400_000, "memory": 1 << 40}
ANN, BOB = PrincipalId("ann"), PrincipalId("bob")


def project(name: str) -> Project:
    return Project(id=ProjectId(name), organization_id=OrganizationId("o"), name=name, created_ns=0)


def queue(name: str, parent: str = "", owner: str = "", **more: Any) -> Queue:
    return Queue(id=QueueId(name), name=name, parent_id=QueueId(parent), project_id=ProjectId(owner), **more)


def tree(*queues: Queue, half_life_ns: int = 0, projects: tuple[Project, ...] = ()) -> QuotaTree:
    found = QuotaTree(half_life_ns=half_life_ns)
    for one in queues:
        found.set_queue(one)
    for project_ in projects:
        found.open_project(project_)
    found.set_capacity(CAPACITY)
    return found


def gpus(count: float, model: str = "H100-SXM", cpu: int = 0) -> dict[str, int]:
    return {model: int(count * 1_000)} | ({"cpu": cpu * 1_000} if cpu else {})


@pytest.mark.parametrize(
    ("name", "resource", "counts"),
    [
        ("gpu", "H100-SXM", True),
        ("gpu", "gpu", True),
        ("gpu", "cpu", False),
        ("gpu:H100", "H100-SXM", True),
        ("gpu:H100", "gpu:H100", True),
        ("gpu:H100", "gpu:H100-SXM", True),
        ("gpu:H100-SXM", "gpu:H100", False),
        ("gpu:H100", "A100", False),
        ("gpu:H100", "gpu", False),
        ("cpu", "cpu", True),
        ("cpu", "memory", False),
        ("memory", "H100-SXM", False),
    ],
)
def test_what_counts_in_which_class(name: str, resource: str, counts: bool) -> None:
    assert covers(name, resource) is counts


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_limit_says_whose_it_is_what_is_in_use_and_what_is_asked() -> None:
    it = tree(queue("lab", limit=(("gpu:H100", 8_000),)), queue("vision", "lab", "p"))
    it.hold(ProjectId("p"), ANN, gpus(6), 1)
    reason = it.over_limit(ProjectId("p"), gpus(4))
    assert reason is not None
    assert (reason.code, reason.subject, reason.resolvable_by) == ("QueueLimit", "lab", ResolvableBy.TIME)
    assert reason.sentence == "Queue lab may hold 8 H100 GPUs at once, 6 in use; 4 are asked for."
    assert (reason.needed, reason.available) == ("4 H100 GPUs", "2 of 8")
    assert it.over_limit(ProjectId("p"), gpus(2)) is None
    assert it.over_limit(ProjectId("p"), gpus(4), ever=True) is None
    never = it.over_limit(ProjectId("p"), gpus(9), ever=True)
    assert never is not None
    assert never.resolvable_by is ResolvableBy.POLICY
    assert never.sentence == "Queue lab may hold 8 H100 GPUs at once; 9 are asked for."


def test_caps_on_jobs() -> None:
    it = tree(queue("lab", max_running=2, max_queued=3), queue("q", "lab", "p"))
    it.hold(ProjectId("p"), ANN, gpus(1), 2)
    reason = it.over_limit(ProjectId("p"), gpus(1))
    assert reason is not None
    assert (reason.code, reason.resolvable_by) == ("TooManyRunning", ResolvableBy.TIME)
    assert reason.sentence == "Queue lab may run 2 jobs at once, and 2 run."
    it.release(ProjectId("p"), ANN, gpus(1), 1)
    assert it.over_limit(ProjectId("p"), gpus(1)) is None
    it.line_up(ProjectId("p"), 3)
    full = it.too_many_queued(ProjectId("p"))
    assert full is not None
    assert (full.code, full.subject) == ("TooManyQueued", "lab")
    it.line_up(ProjectId("p"), -1)
    assert it.too_many_queued(ProjectId("p")) is None


def test_which_models_a_project_may_still_get() -> None:
    it = tree(queue("lab", limit=(("gpu:H100", 8_000),)), queue("q", "lab", "p"), projects=(project("r"),))
    p = ProjectId("p")
    assert it.allowed_models(p, 8_000) is None
    it.hold(p, ANN, gpus(6))
    assert it.allowed_models(p, 4_000) == ("A100",)
    assert it.allowed_models(p, 2_000) is None
    assert it.allowed_models(ProjectId("r"), 16_000) is None


# -- reclaim ------------------------------------------------------------------------------------------------------------

GUARANTEED: Amounts = (("gpu", 8_000),)


def lab() -> QuotaTree:
    """Two departments of 8 guaranteed GPUs each; under a: p (4 guaranteed) and r (4); under b: s."""
    return tree(
        queue("a", guaranteed=GUARANTEED),
        queue("b", guaranteed=GUARANTEED),
        queue("ap", "a", "p", guaranteed=(("gpu", 4_000),)),
        queue("ar", "a", "r", guaranteed=(("gpu", 4_000),)),
        queue("bs", "b", "s"),
    )


@pytest.mark.parametrize(
    ("held", "taker", "amounts", "victim", "may"),
    [
        ({"s": 12, "p": 2}, "p", gpus(4), "s", True),  # a is within 8, b beyond its 8
        ({"s": 12, "p": 2}, "p", gpus(7), "s", False),  # a would be beyond
        ({"s": 8, "p": 2}, "p", gpus(4), "s", False),  # b is within
        ({"r": 6, "p": 2}, "p", gpus(2), "r", True),  # in one department its children are compared
        ({"r": 6, "p": 2}, "p", gpus(3), "r", False),
        ({"r": 6}, "s", gpus(4), "r", False),  # a is within, whatever r is
        ({"r": 6, "p": 6}, "s", gpus(4), "r", True),  # and r may lose though p borrows as much
        ({"s": 12}, "p", gpus(1), "p", False),  # never from oneself
        ({"x": 3}, "p", gpus(4), "x", True),  # x has no guarantee at all
        ({"s": 12}, "x", gpus(1), "s", False),  # nor can it take any
        ({"s": 12}, "p", {"cpu": 1_000}, "s", False),  # no CPU is guaranteed
        ({"s": 12}, "p", gpus(4, cpu=64), "s", True),  # with GPUs, what is not mentioned does not matter
        ({"s": 12}, "p", {}, "s", False),
    ],
)
def test_who_may_take_back_from_whom(
    held: Mapping[str, int], taker: str, amounts: dict[str, int], victim: str, may: bool
) -> None:
    it = lab()
    for owner, count in held.items():
        it.hold(ProjectId(owner), ANN, gpus(count))
    assert it.may_reclaim(ProjectId(taker), amounts, ProjectId(victim)) is may


def test_a_victims_side_is_not_pushed_far_below_its_guarantee() -> None:
    it = lab()
    it.hold(ProjectId("s"), ANN, gpus(10))
    p, s = ProjectId("p"), ProjectId("s")
    assert it.sides(p, s) == ("a", "b")
    assert it.may_reclaim(p, gpus(4), s, gone=gpus(1))
    assert not it.may_reclaim(p, gpus(4), s, gone=gpus(2))


def test_a_guarantee_of_one_model_protects_only_that_model() -> None:
    it = tree(
        queue("a", owner="p", guaranteed=(("gpu:A100", 4_000),)),
        queue("b", owner="s", guaranteed=(("gpu:A100", 4_000),)),
        queue("c", owner="t", guaranteed=(("gpu", 4_000),)),
    )
    it.hold(ProjectId("s"), ANN, gpus(6, "A100"))
    it.hold(ProjectId("t"), ANN, gpus(4, "A100"))
    assert it.may_reclaim(ProjectId("p"), gpus(1, "A100"), ProjectId("s"))
    assert not it.may_reclaim(ProjectId("p"), gpus(1), ProjectId("s"))
    assert not it.may_reclaim(ProjectId("p"), gpus(1, "A100"), ProjectId("t"))


HOLDINGS = st.fixed_dictionaries({name: st.integers(0, 10) for name in "prsx"})


def reclaim_has_no_circle(case: tuple[dict[str, int], str, str, int, int]) -> bool:
    """Who could take from another has not what the other could take back at the same time."""
    held, one, other, need, back = case
    it = lab()
    for owner, count in held.items():
        it.hold(ProjectId(owner), ANN, gpus(count))
    taken = it.may_reclaim(ProjectId(one), gpus(need), ProjectId(other))
    return not (taken and it.may_reclaim(ProjectId(other), gpus(back), ProjectId(one)))


CASES = st.tuples(HOLDINGS, st.sampled_from("prsx"), st.sampled_from("prsx"), st.integers(1, 8), st.integers(1, 8))


@given(CASES)
def test_nobody_takes_back_what_was_rightly_taken(case: tuple[dict[str, int], str, str, int, int]) -> None:
    assert reclaim_has_no_circle(case)


def test_reclaim_from_those_within_their_guarantee_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "_is_beyond", lambda *_: True)
    assert is_refuted(CASES, reclaim_has_no_circle)


# -- shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "also", "share"),
    [
        ({"H100-SXM": 1_000}, {}, 1.0),  # twice what is held: it is its average too
        ({"A100": 1_000}, {}, 0.0),
        ({"gpu": 1_000}, {}, 16 / 24),
        ({"gpu:H100": 1_000}, {}, 1.0),
        ({"gpu:A100": 1_000}, {"gpu:A100": 2_000}, 0.25),
        ({"A100": 1_000, "cpu": 1_000}, {}, 0.2),
        ({"A100": 1_000, "cpu": 1_000}, {"A100": 4_000}, 0.5),
        ({"cpu": 1_000}, {"cpu": 40_000}, 0.3),
        (None, {}, 1.0),
        ({"TPU": 1_000}, {}, 0.0),
    ],
)
def test_only_what_the_next_job_needs_is_compared(
    needs: dict[str, int] | None, also: dict[str, int], share: float
) -> None:
    it = tree()
    it.hold(ProjectId("p"), ANN, gpus(8, cpu=40))
    party = it.path(ProjectId("p"), ANN)[0]
    assert it.key(party, needs, also) == (True, pytest.approx(share))


# -- what cannot be a tree ----------------------------------------------------------------------------------------------

PROJECTS = (project("p"), project("r"))


@pytest.mark.parametrize(
    ("queues", "code", "field", "words"),
    [
        ((queue("a", "b"), queue("b", "c"), queue("c", "a")), "QueueCycle", "queues.a.parent", "a, b, c, a"),
        ((queue("x", "a"), queue("a", "b"), queue("b", "a")), "QueueCycle", "queues.a.parent", "a, b, a"),
        ((queue("a", "gone"),), "UnknownParentQueue", "queues.a.parent", "below gone"),
        ((queue("a", owner="zz"),), "UnknownProject", "queues.a.project", "project zz"),
        ((queue("a", owner="p"), queue("b", owner="p")), "ProjectHasTwoQueues", "queues.b.project", "a and b"),
        ((queue("a", owner="p"), queue("b", "a")), "ProjectQueueHasChildren", "queues.b.parent", "beside it"),
        ((queue("a"), replace(queue("b"), name="a")), "QueueNameTaken", "queues.a.name", "called a"),
        (
            (queue("a", guaranteed=GUARANTEED), queue("b", "a", guaranteed=(("gpu", 9_000),))),
            "GuaranteesAboveParent",
            "queues.a.guaranteed.gpu",
            "9 GPUs together, and a is guaranteed 8 GPUs",
        ),
        (
            (
                queue("a", guaranteed=GUARANTEED),
                queue("b", "a", guaranteed=(("gpu:H100", 5_000), ("gpu:A100", 4_000))),
            ),
            "GuaranteesAboveParent",
            "queues.a.guaranteed.gpu",
            "9 GPUs together",
        ),
        (
            (queue("a"), queue("b", "a", guaranteed=(("cpu", 1_000),))),
            "GuaranteesAboveParent",
            "queues.b.guaranteed.cpu",
            "guaranteed none",
        ),
        (
            (
                queue("a", guaranteed=GUARANTEED, limit=(("gpu:H100", 4_000), ("gpu", 8_000))),
                queue("b", "a", guaranteed=(("gpu:H100", 3_000),)),
                queue("c", "a", guaranteed=(("gpu:H100", 3_000),)),
            ),
            "GuaranteesAboveParent",
            "queues.a.limit.gpu:H100",
            "limited to 4 H100 GPUs",
        ),
        (
            (queue("a", guaranteed=(("gpu", 20_000),)), queue("b", guaranteed=(("gpu", 8_000),))),
            "GuaranteesAboveFleet",
            "queues.a.guaranteed.gpu",
            "28 GPUs are guaranteed to a, b, and the whole fleet has 24.",
        ),
        ((queue("a", guaranteed=(("gpu:H200", 1_000),)),), "GuaranteesAboveFleet", "queues.a.guaranteed.gpu:H200", "0"),
    ],
)
def test_what_is_wrong_with_a_tree_names_the_field(
    queues: tuple[Queue, ...], code: str, field: str, words: str
) -> None:
    reason = why_not_tree(queues, PROJECTS, CAPACITY)
    assert reason is not None
    assert (reason.code, reason.subject) == (code, field)
    assert words in reason.sentence


def test_a_sound_tree_passes() -> None:
    queues = (
        queue("a", guaranteed=(("gpu", 12_000), ("cpu", 64_000))),
        queue("b", "a", "p", guaranteed=(("gpu:H100", 8_000), ("cpu", 64_000)), limit=(("gpu", 99_000),)),
        queue("c", "a", "r", guaranteed=(("gpu:A100", 4_000),)),
    )
    assert why_not_tree(queues, PROJECTS, CAPACITY) is None
    assert why_not_tree((queue("a", guaranteed=(("gpu", 99_000),)),), PROJECTS) is None


# -- what people see ------------------------------------------------------------------------------------------------------


def test_the_report_says_who_has_is_entitled_to_and_borrowed_what() -> None:
    it = lab()
    it.hold(ProjectId("s"), ANN, gpus(12), 3)
    it.hold(ProjectId("p"), ANN, gpus(2, "A100"), 1)
    it.line_up(ProjectId("s"), 5)
    rows = {row.name: row for row in it.report()}
    assert [row.name for row in it.report()] == ["a", "ap", "ar", "b", "bs"]
    assert [row.depth for row in it.report()] == [0, 1, 1, 0, 1]
    b = rows["b"]
    assert (dict(b.held)["gpu"], dict(b.borrowed)["gpu"], b.running, b.queued) == (12_000, 4_000, 3, 5)
    assert dict(b.entitled)["gpu"] == 22_000  # all but what a holds
    assert dict(rows["a"].entitled)["gpu"] == 12_000  # its 8, and half of the 8 that nobody is guaranteed
    assert dict(rows["ar"].entitled)["gpu"] == 10_000
    assert rows["a"].models == (("A100", 2_000),)
    assert rows["a"].share == pytest.approx(0.25)
    assert (rows["bs"].parent, rows["bs"].project_id) == ("b", "s")


def test_averages_outlive_a_restart() -> None:
    it = tree(queue("a"), queue("ap", "a", "p"), half_life_ns=DAY_NS)
    it.advance(HOUR_NS)
    it.hold(ProjectId("p"), ANN, gpus(8))
    it.hold(ProjectId("p"), BOB, gpus(2))
    it.advance(DAY_NS)
    it.release(ProjectId("p"), BOB, gpus(2))
    stored = it.usages()
    assert [(one.id, one.version, one.at_ns) for one in stored] == [("p/ann", 1, DAY_NS), ("p/bob", 1, DAY_NS)]
    again = tree(queue("a"), queue("ap", "a", "p"), half_life_ns=DAY_NS)
    again.hold(ProjectId("p"), ANN, gpus(8))
    again.restore(stored)
    for one in (it, again):
        one.advance(2 * DAY_NS)
    assert [row.share for row in again.report()] == pytest.approx([row.share for row in it.report()])
    assert [one.version for one in again.usages()] == [2, 2]


# -- random histories under an auditor --------------------------------------------------------------------------------------

MODELS = ("H100-SXM", "A100", "cpu")
NAMES = ("k", "l", "m", "n")
LIMITS = st.dictionaries(st.sampled_from(["gpu", "gpu:H100", "cpu"]), st.integers(1, 9), max_size=2)
TREES = st.lists(
    st.tuples(st.integers(0, 7), LIMITS, st.sampled_from([0, 0, 1, 3]), st.booleans()), min_size=1, max_size=6
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "hold", "hold", "release", "undo", "move", "pass"]),
        st.integers(0, 30),
        st.sampled_from(MODELS),
        st.integers(1, 5),
    ),
    max_size=40,
)
Case = tuple[list[tuple[int, dict[str, int], int, bool]], list[tuple[str, int, str, int]]]


def queues_of(shape: list[tuple[int, dict[str, int], int, bool]]) -> dict[QueueId, Queue]:
    """A random tree: each queue is under an earlier one or the fleet; leaves that say so have a project."""
    above = [at % (number + 1) - 1 for number, (at, *_) in enumerate(shape)]
    owners = iter(NAMES)
    found = [
        queue(
            f"q{number}",
            f"q{above[number]}" if above[number] >= 0 else "",
            next(owners, "") if has_project and number not in above else "",
            limit=tuple(sorted((name, amount * 1_000) for name, amount in limits.items())),
            max_running=cap,
        )
        for number, (_, limits, cap, has_project) in enumerate(shape)
    ]
    return {one.id: one for one in found}


class Auditor:
    """What was held, as a list; everything the tree says is worked out again from it."""

    def __init__(self, shape: list[tuple[int, dict[str, int], int, bool]]) -> None:
        self.queues = queues_of(shape)
        self.tree = tree(*self.queues.values(), half_life_ns=DAY_NS, projects=tuple(project(one) for one in NAMES))
        self.held: list[tuple[ProjectId, PrincipalId, dict[str, int]]] = []
        self.now = 0

    def play(self, steps: list[tuple[str, int, str, int]]) -> None:
        for what, at, model, amount in steps:
            who, user, amounts = ProjectId(NAMES[at % 4]), (ANN, BOB)[at % 2], {model: amount * 1_000}
            if what == "hold" and self.tree.over_limit(who, amounts) is None:
                self.tree.hold(who, user, amounts, 1)
                self.held.append((who, user, amounts))
            elif what == "release" and self.held:
                self.tree.release(*self.held.pop(at % len(self.held)), 1)
            elif what == "undo":
                before = self.state()
                self.tree.hold(who, user, amounts, 1)
                self.tree.release(who, user, amounts, 1)
                assert self.state() == before, "an undone start left traces"
            elif what == "move":
                self.move(at)
            elif what == "pass":
                self.now += amount * HOUR_NS
                self.tree.advance(self.now)
            self.audit(bounded=what == "hold")

    def move(self, at: int) -> None:
        """Put a queue right under the fleet, and back again."""
        identity = sorted(self.queues)[at % len(self.queues)]
        before = self.state()
        self.tree.set_queue(replace(self.queues[identity], parent_id=QueueId("")))
        self.audit_sums({**self.queues, identity: replace(self.queues[identity], parent_id=QueueId(""))})
        self.tree.set_queue(self.queues[identity])
        assert self.state() == before, "a queue that came back is not as it was"

    def state(self) -> object:
        return [(row.name, row.parent, row.held, row.running) for row in self.tree.report()]

    def audit(self, *, bounded: bool) -> None:
        self.audit_sums(self.queues)
        for one in self.queues.values() if bounded else ():
            mine = self.under(one.id, self.queues)
            assert not one.max_running or len(mine) <= one.max_running, f"{one.name} runs too many"
            for name, limit in one.limit:
                total = sum(amount for amounts in mine for key, amount in amounts.items() if counts(name, key))
                assert total <= limit, f"{one.name} holds {total} of {limit} {name}"

    def audit_sums(self, queues: Mapping[QueueId, Queue]) -> None:
        rows = {row.id: row for row in self.tree.report()}
        for identity in queues:
            mine = self.under(identity, queues)
            gpu = sum(amount for amounts in mine for key, amount in amounts.items() if key != "cpu")
            assert dict(rows[identity].held)["gpu"] == gpu, f"{identity}: sums differ"
            assert rows[identity].running == len(mine)

    def under(self, identity: QueueId, queues: Mapping[QueueId, Queue]) -> list[dict[str, int]]:
        owners = {one.project_id: one for one in queues.values() if one.project_id}
        found = []
        for who, _, amounts in self.held:
            one = owners.get(who)
            while one is not None:
                if one.id == identity:
                    found.append(amounts)
                one = queues.get(one.parent_id)
        return found


def counts(name: str, key: str) -> bool:
    return key != "cpu" if name == "gpu" else key == {"gpu:H100": "H100-SXM", "cpu": "cpu"}[name]


def is_content(case: Case) -> bool:
    shape, steps = case
    Auditor(shape).play(steps)
    return True


@given(st.tuples(TREES, STEPS))
@settings(max_examples=200, deadline=None)
def test_limits_hold_and_sums_match_in_every_history(case: Case) -> None:
    assert is_content(case)


def looks_at_the_project_only(patch: pytest.MonkeyPatch) -> None:
    over = QuotaTree.over_limit
    upwards = Party.upwards

    def alone(self: QuotaTree, *args: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Party, "upwards", lambda party: list(upwards(party))[:1])
            return over(self, *args, **more)

    patch.setattr(QuotaTree, "over_limit", alone)


def counts_only_what_is_called_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fairness, "covers", lambda name, resource: name == resource)


def forgets_what_is_held(patch: pytest.MonkeyPatch) -> None:
    over = QuotaTree.over_limit
    patch.setattr(QuotaTree, "over_limit", lambda self, who, amounts: over(self, who, amounts, ever=True))


def forgets_the_way_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Party, "upwards", lambda party: iter([party]))


def forgets_jobs_that_end(patch: pytest.MonkeyPatch) -> None:
    release = QuotaTree.release
    patch.setattr(QuotaTree, "release", lambda self, who, user, amounts, jobs=0: release(self, who, user, amounts, 0))


def does_not_sum_up_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QuotaTree, "_move", lambda self, user, leaf: leaf.children.__setitem__(user.id, user))


BUGS = [
    looks_at_the_project_only,
    counts_only_what_is_called_the_same,
    forgets_what_is_held,
    forgets_the_way_up,
    forgets_jobs_that_end,
    does_not_sum_up_again,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert is_refuted(st.tuples(TREES, STEPS), is_content)
