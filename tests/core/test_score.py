"""Which node should take a worker: what a policy promises, and for each promise a planted bug that the test catches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tidemill.core import cutting, score
from tidemill.core.cutting import remainder_values
from tidemill.core.score import BUILT_IN, UNLEARNED, BestFit, Fgd, Score, Tide, Want

GIB = 1 << 30
MODELS = ("A10", "H100", "T4")


@dataclass
class Fleet:
    """Nodes as a policy sees them: (milli-CPU, bytes, {column: (model, free milli)}), free and total the same."""

    cpu_free: Any
    memory_free: Any
    cpu_total: Any
    memory_total: Any
    gpu_free: Any
    model: Any
    models: tuple[str, ...] = field(default=MODELS)

    @staticmethod
    def of(*nodes: tuple[int, int, list[tuple[int, int]]]) -> Fleet:
        width = max((len(devices) for _, _, devices in nodes), default=0)
        gpu_free, model = np.zeros((len(nodes), width), np.int64), np.full((len(nodes), width), -1, np.int64)
        for row, (_, _, devices) in enumerate(nodes):
            for column, (kind, milli) in enumerate(devices):
                gpu_free[row, column], model[row, column] = milli, kind
        cpu = np.array([node[0] for node in nodes], np.int64)
        memory = np.array([node[1] for node in nodes], np.int64)
        return Fleet(cpu, memory, np.maximum(cpu, 64_000), np.maximum(memory, 256 * GIB), gpu_free, model)

    def fitting(self, want: Want) -> Any:
        """Rows with room for one worker."""
        may = (self.model >= 0) & (np.isin(self.model, want.models) | (not want.models))
        room = (may & (self.gpu_free >= want.milli)).sum(axis=1) >= want.count
        return np.flatnonzero((self.cpu_free >= want.cpu_milli) & (self.memory_free >= want.memory_bytes) & room)

    def permuted(self, order: list[int]) -> Fleet:
        return replace(
            self,
            **{
                name: getattr(self, name)[order]
                for name in ("cpu_free", "memory_free", "cpu_total", "memory_total", "gpu_free", "model")
            },
        )


DEVICES = st.lists(st.tuples(st.integers(-1, 2), st.sampled_from([-500, 0, 60, 190, 530, 810, 1000, 1000])), max_size=8)
UNIFORM = st.tuples(st.integers(0, 2), st.lists(st.sampled_from([0, 190, 470, 530, 1000, 1000]), max_size=8)).map(
    lambda drawn: [(drawn[0], milli) for milli in drawn[1]]
)
NODES = st.tuples(st.integers(-4_000, 128_000), st.integers(-GIB, 512 * GIB), st.one_of(UNIFORM, DEVICES))
FLEETS = st.lists(NODES, min_size=1, max_size=8).map(lambda nodes: Fleet.of(*nodes))
WANTS = st.builds(
    lambda cpu, memory, size, models: Want(cpu, memory, *size, tuple(sorted(models)) if size[0] else ()),
    st.integers(1, 40_000),
    st.integers(0, 64 * GIB),
    st.sampled_from([(0, 0), (1, 190), (1, 470), (1, 500), (1, 810), (1, 1000), (1, 1000), (2, 1000), (8, 1000)]),
    st.sets(st.integers(0, 2), max_size=2),
)
MIXES = st.lists(st.tuples(WANTS, st.floats(0.1, 9.0)), max_size=6)


def learned(policy: Score, mix: list[tuple[Want, float]]) -> Score:
    policy.learn(mix)
    return policy


def plain_loops() -> Tide:
    """The default policy through its loops, as the interpreter runs them."""
    policy = Tide()
    policy._loop = score._tide_loop(score._as_it_is)
    return policy


# The same integers from NumPy and from the loops, whatever the fleet.


def agree(fleet: Fleet, want: Want, mix: list[tuple[Want, float]], *policies: Score) -> None:
    rows = fleet.fitting(want)
    outcomes = [learned(policy, mix).scores(fleet, want, rows) for policy in policies]
    for (scores, columns), (others, other_columns) in itertools.pairwise(outcomes):
        assert scores.tolist() == others.tolist()
        assert columns.tolist() == other_columns.tolist()


@given(FLEETS, WANTS, MIXES)
@settings(max_examples=300, deadline=None)
def test_numpy_and_the_loops_give_the_same_integers(fleet: Fleet, want: Want, mix: list[tuple[Want, float]]) -> None:
    agree(fleet, want, mix, Tide(), plain_loops())


def test_compiled_loops_give_the_same_integers() -> None:
    pytest.importorskip("numba")
    numpy, compiled = Tide(), Tide(compiled=True)

    @given(FLEETS, WANTS, MIXES)
    @settings(max_examples=200, deadline=None)
    def same(fleet: Fleet, want: Want, mix: list[tuple[Want, float]]) -> None:
        agree(fleet, want, mix, numpy, compiled)

    same()


def test_compiling_without_the_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    score._compiled.cache_clear()
    monkeypatch.setattr(score.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="numba"):
        Tide(compiled=True)


# What every policy promises.


def check_policy(make: Callable[[], Score], fleet: Fleet, want: Want, mix: list[tuple[Want, float]]) -> None:
    """Pure, independent of the other rows and of their order, and a share goes to a device that can hold it."""
    policy = learned(make(), mix)
    rows = fleet.fitting(want)
    before = [getattr(fleet, name).copy() for name in ("cpu_free", "memory_free", "gpu_free", "model")]
    scores, columns = policy.scores(fleet, want, rows)
    after = [getattr(fleet, name) for name in ("cpu_free", "memory_free", "gpu_free", "model")]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True)), "reads only"
    assert scores.shape == columns.shape == rows.shape
    assert scores.dtype == columns.dtype == np.int64
    for row, column in zip(rows, columns, strict=True):
        if want.count and want.milli < 1000:
            assert fleet.gpu_free[row, column] >= want.milli, "the share fits its device"
            assert not want.models or fleet.model[row, column] in want.models, "the device is of a model that will do"
            assert fleet.model[row, column] >= 0
        else:
            assert column == -1
    alone = [int(policy.scores(fleet, want, rows[[at]])[0][0]) for at in range(len(rows))]
    assert scores.tolist() == alone, "no row changes another's score"
    order = list(reversed(range(len(fleet.cpu_free))))
    turned = fleet.permuted(order)
    moved = learned(make(), mix).scores(turned, want, turned.fitting(want))[0]
    assert scores.tolist() == moved.tolist()[::-1], "the order of nodes does not matter"


@pytest.mark.parametrize("name", BUILT_IN)
@given(fleet=FLEETS, want=WANTS, mix=MIXES)
@settings(max_examples=100, deadline=None)
def test_every_policy_keeps_its_promises(name: str, fleet: Fleet, want: Want, mix: list[tuple[Want, float]]) -> None:
    check_policy(BUILT_IN[name], fleet, want, mix)


class Forgetful(Tide):
    """Places shares on the first device, whether they fit or not."""

    def scores(self, fleet: Any, want: Want, rows: Any) -> Any:
        scores, columns = super().scores(fleet, want, rows)
        return scores, np.minimum(columns, 0)


class Relative(Tide):
    """Scores a row by what the others have."""

    def scores(self, fleet: Any, want: Want, rows: Any) -> Any:
        scores, columns = super().scores(fleet, want, rows)
        return scores - scores.min(initial=0), columns


class Partial(Tide):
    """Prefers early rows."""

    def scores(self, fleet: Any, want: Want, rows: Any) -> Any:
        scores, columns = super().scores(fleet, want, rows)
        return scores - rows, columns


class Grabby(Tide):
    """Takes what it looks at."""

    def scores(self, fleet: Any, want: Want, rows: Any) -> Any:
        answer = super().scores(fleet, want, rows)
        fleet.cpu_free[rows] -= want.cpu_milli
        return answer


def is_caught(check: Callable[..., None], *drawn: st.SearchStrategy[Any], attempts: int = 300) -> bool:
    """Whether some example breaks the promise."""

    @given(st.tuples(*drawn))
    @settings(max_examples=attempts, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def play(values: tuple[Any, ...]) -> None:
        check(*values)

    try:
        play()
    except (AssertionError, IndexError, ExceptionGroup, HypothesisException):
        return True
    return False


@pytest.mark.parametrize("bug", [Forgetful, Relative, Partial, Grabby])
def test_a_policy_that_breaks_a_promise_is_caught(bug: Callable[[], Score]) -> None:
    assert is_caught(lambda fleet, want, mix: check_policy(bug, fleet, want, mix), FLEETS, WANTS, MIXES)


def halves_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    reach = score._Room.reach
    monkeypatch.setattr(score._Room, "reach", lambda self, cpu, mib: reach(self, cpu // 2, mib))


def rounds_memory_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reach = score._Room.reach
    monkeypatch.setattr(score._Room, "reach", lambda self, cpu, mib: reach(self, cpu, mib + 1))


def doubles_whole_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = score._Room.usable
    monkeypatch.setattr(
        score._Room, "usable", lambda self, values, wholes, limit: usable(self, values, wholes * 2, limit)
    )


@pytest.mark.parametrize("plant", [halves_cpu, rounds_memory_up, doubles_whole_gpus])
def test_loops_that_drift_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert is_caught(
        lambda fleet, want, mix: agree(fleet, want, mix, Tide(), plain_loops()), FLEETS, WANTS, MIXES, attempts=5000
    )


# What the default policy prefers: stories.

ONE = Want(8_000, 16 * GIB, 1, 1000)
FULL_A10 = [(0, 1000)] * 2
PLAIN = [(ONE, 1.0)]


def best(policy: Score, fleet: Fleet, want: Want) -> tuple[int, int]:
    """The row that takes the worker, ties to the first, and the column."""
    rows = fleet.fitting(want)
    scores, columns = policy.scores(fleet, want, rows)
    at = int(np.argmax(scores))
    return int(rows[at]), int(columns[at])


SHARES = [(Want(4_000, 8 * GIB, 1, milli), share) for milli, share in ((810, 2.0), (470, 2.0), (160, 1.0))]
MULTI = [(ONE, 1.0), (Want(64_000, 64 * GIB, 8, 1000), 0.2)]
T4_ONLY = [(ONE, 3.0), (Want(8_000, 16 * GIB, 1, 1000, (2,)), 1.0)]
CPU_ONLY = Want(16_000, 16 * GIB, 0, 0)
STORIES: dict[str, tuple[list[tuple[Want, float]], Fleet, Want, tuple[int, int]]] = {
    "a small share fills the hole that a large one left, not the one that a second half needs": (
        SHARES,
        Fleet.of((64_000, 256 * GIB, [(0, 530), (0, 190)])),
        Want(1_000, GIB, 1, 160),
        (0, 1),
    ),
    "the second half joins the first": (
        SHARES,
        Fleet.of((64_000, 256 * GIB, [(0, 1000)]), (64_000, 256 * GIB, [(0, 530)])),
        Want(4_000, 8 * GIB, 1, 470),
        (1, 0),
    ),
    "a GPU that anyone can use is taken before one that some insist on": (
        T4_ONLY,
        Fleet.of((64_000, 256 * GIB, [(2, 1000)] * 2), (64_000, 256 * GIB, [(0, 1000)] * 2), *[(64_000, 256 * GIB, FULL_A10)] * 3),
        ONE,
        (1, -1),
    ),
    "one GPU comes from a node that is open already, so a whole node stays whole": (
        MULTI,
        Fleet.of((64_000, 256 * GIB, [(0, 1000)] * 8), (64_000, 256 * GIB, [(0, 0)] * 4 + [(0, 1000)] * 4)),
        ONE,
        (1, -1),
    ),
    "work without GPUs goes where CPUs are left over": (
        PLAIN,
        Fleet.of((64_000, 256 * GIB, [(0, 1000)] * 8), (64_000, 256 * GIB, [(0, 0)] * 8), (20_000, 256 * GIB, [(0, 1000)] * 2)),
        CPU_ONLY,
        (1, -1),
    ),
    "work without GPUs goes to the node without GPUs, and there to the tightest": (
        PLAIN,
        Fleet.of((64_000, 256 * GIB, [(0, 1000)] * 4), (64_000, 256 * GIB, []), (32_000, 256 * GIB, [])),
        CPU_ONLY,
        (2, -1),
    ),
    "a request that needs much CPU goes where CPUs per GPU are many": (
        PLAIN,
        Fleet.of((32_000, 256 * GIB, [(0, 1000)] * 4), (64_000, 256 * GIB, [(0, 1000)] * 4)),
        Want(24_000, 16 * GIB, 1, 1000),
        (1, -1),
    ),
    "a request that needs much memory goes where memory per GPU is much": (
        PLAIN,
        Fleet.of((64_000, 64 * GIB, [(0, 1000)] * 4), (64_000, 256 * GIB, [(0, 1000)] * 4)),
        Want(1_000, 48 * GIB, 1, 1000),
        (1, -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_the_default_policy_prefers(story: str) -> None:
    mix, fleet, want, expected = STORIES[story]
    for policy in (Tide(), plain_loops()):
        assert best(learned(policy, mix), fleet, want) == expected


def test_an_exact_score_by_hand() -> None:
    """Two A10 of which one is taken: the room falls from 2000 to 1000, the node is left half full of GPUs and 56/64 of CPUs."""
    fleet = Fleet.of((64_000, 256 * GIB, FULL_A10))
    policy = learned(Tide(), PLAIN)
    scores, columns = policy.scores(fleet, ONE, np.array([0]))
    assert scores.tolist() == [-1000 * (1 << 16) * 1024 - (256 + 511 * 56_000 // 64_000)]
    assert columns.tolist() == [-1]


def test_columns_that_are_owed_count_as_nothing() -> None:
    owed = Fleet.of((64_000, 256 * GIB, [(0, 1000), (0, -1000)]))
    none = Fleet.of((64_000, 256 * GIB, [(0, 1000), (0, 0)]))
    for name, make in BUILT_IN.items():
        scores = [make().scores(fleet, ONE, np.array([0]))[0].tolist() for fleet in (owed, none)]
        assert scores[0] == scores[1], name


def test_a_fleet_without_devices_or_nodes_is_scored() -> None:
    for make in BUILT_IN.values():
        assert make().scores(Fleet.of((8_000, GIB, [])), CPU_ONLY, np.array([0]))[0].shape == (1,)
        assert make().scores(Fleet.of((8_000, GIB, [])), CPU_ONLY, np.zeros(0, np.int64))[0].shape == (0,)


# Learning.


def test_the_version_moves_only_when_the_mix_does() -> None:
    policy = Tide()
    policy.learn(UNLEARNED)
    assert policy.version == 0, "what it assumed anyway"
    policy.learn([])
    assert policy.version == 0, "nothing learned from nothing"
    policy.learn(PLAIN)
    assert policy.version == 1
    policy.learn([(ONE, 98.0), (CPU_ONLY, 2.0)])
    assert policy.version == 1, "two percent are no news"
    policy.learn([(ONE, 80.0), (CPU_ONLY, 20.0)])
    assert policy.version == 2


def test_equal_requests_add_up_and_the_tail_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "MOST_SHAPES", 2)
    mix = score._normal([(ONE, 1.0), (CPU_ONLY, 3.0), (ONE, 1.0), (SHARES[0][0], 1.0), (SHARES[1][0], 0.0)])
    assert mix == {CPU_ONLY: 0.6, ONE: 0.4}


def test_a_new_layout_is_weighed_anew() -> None:
    """T4 are scarce in the second fleet only: the cached weights of the first must not be used for it."""
    plenty = Fleet.of(*[(64_000, 256 * GIB, [(2, 1000)] * 2)] * 4, (64_000, 256 * GIB, FULL_A10))
    scarce = STORIES["a GPU that anyone can use is taken before one that some insist on"][1]
    policy = learned(Tide(), T4_ONLY)
    policy.scores(plenty, ONE, plenty.fitting(ONE))
    fresh = learned(Tide(), T4_ONLY)
    rows = scarce.fitting(ONE)
    assert policy.scores(scarce, ONE, rows)[0].tolist() == fresh.scores(scarce, ONE, rows)[0].tolist()


# The published rivals.


def test_fgd_scores_like_the_paper() -> None:
    """One typical request of a whole GPU: taking half a GPU makes 500 milli useless, sigmoid(-0.5) = 0.3775."""
    fleet = Fleet.of((64_000, 256 * GIB, [(0, 1000)]), (64_000, 256 * GIB, [(0, 600), (0, 1000)]))
    policy = learned(Fgd(), PLAIN)
    half = Want(1_000, GIB, 1, 500)
    scores, columns = policy.scores(fleet, half, np.array([0, 1]))
    assert scores.tolist() == [37, 62], "on the second node half of what was useless anyway gets used: sigmoid(0.5)"
    assert columns.tolist() == [0, 0]


def test_fgd_takes_the_most_common_95_percent() -> None:
    policy = Fgd()
    policy.learn([(ONE, 96.0), (CPU_ONLY, 4.0)])
    assert [want.count for want, _ in policy._typical] == [1]


def test_best_fit_scores_like_the_paper() -> None:
    fleet = Fleet.of((64_000, 256 * GIB, [(0, 500), (0, 700)]))
    scores, columns = BestFit().scores(fleet, Want(1_000, GIB, 1, 500), np.array([0]))
    assert scores.tolist() == [int(100 * (1 - 0.5 * (63_000 / 128_000 + 700 / 8_000)))]
    assert columns.tolist() == [0]


# The worth of what is left of a GPU.

DEMANDS = st.dictionaries(st.integers(1, 999), st.floats(0.01, 100.0), max_size=6)


def check_values(values: Any, demand: dict[int, float]) -> None:
    """Rising, superadditive, a whole GPU worth one: then no set of shares is worth more than the room it takes."""
    assert values.shape == (1001,)
    assert values[0] == 0.0
    assert values[1000] == pytest.approx(1.0)
    assert (np.diff(values) >= -1e-9).all()
    for one, other in itertools.combinations_with_replacement([*demand, 190, 333], 2):
        if one + other <= 1000:
            assert values[one] + values[other] <= values[one + other] + 1e-6
    smallest = min(demand, default=1000)
    assert (values[:smallest] < 1e-9).all(), "what nobody asks for is worth nothing"


@given(DEMANDS)
@settings(max_examples=150, deadline=None)
def test_remainders_are_worth_what_fits_into_them(demand: dict[int, float]) -> None:
    check_values(remainder_values(demand), demand)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("worth their size", lambda demand: np.arange(1001) / 1000),
        ("a whole GPU is worth less", lambda demand: 0.9 * remainder_values(demand)),
        ("two halves are worth more than one GPU", lambda demand: np.minimum(1.0, 1.2 * remainder_values(demand))),
    ],
)
def test_wrong_values_are_caught(name: str, bug: Callable[[dict[int, float]], Any]) -> None:
    assert is_caught(lambda demand: check_values(bug(demand), demand), DEMANDS), name


def test_prices_reach_the_best_cut() -> None:
    """810 + 160, 470 + 470: two thirds of the requests fill GPUs in pairs; the bound is the dual's value."""
    demand = {810: 1.0, 470: 2.0, 160: 1.0}
    values = remainder_values(demand)
    assert sum(values[size] * count for size, count in demand.items()) == pytest.approx(2.0)
    assert sum(cutting._bundles(999)) == 999


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7, 100, 999])
def test_bundles_reach_every_count(most: int) -> None:
    sums = {0}
    for bundle in cutting._bundles(most):
        sums |= {bundle + total for total in sums}
    assert sums == set(range(most + 1))
