"""What must hold in every history, and for each such promise a planted bug that it catches."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.core.history import OPS, History, Op
from tidemill.core import ending, facts, rating, scheduling, starting, world
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.meter import Meter, Part, Stretch
from tidemill.core.queueing import WaitingLines
from tidemill.core.quota import QuotaTree
from tidemill.core.world import World
from tidemill.model.fleet import Site
from tidemill.model.ledger import Holder, Ledger, RateCard
from tidemill.model.values import replace


@given(OPS)
@settings(max_examples=300, deadline=None)
def test_every_promise_holds_in_every_history(ops: list[Op]) -> None:
    History().play(ops)


def found_in_histories(attempts: int = 400) -> bool:
    """Whether the auditor objects to some history."""

    @given(OPS)
    @settings(max_examples=attempts, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def play(ops: list[Op]) -> None:
        History().play(ops)

    try:
        play()
    except (AssertionError, KeyError, ExceptionGroup, HypothesisException):
        return True
    return False


def forgets_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    take = FleetArrays.take
    monkeypatch.setattr(FleetArrays, "take", lambda self, node, **kw: take(self, node, **(kw | {"devices": ()})))


def forgets_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    take = FleetArrays.take
    monkeypatch.setattr(FleetArrays, "take", lambda self, node, **kw: take(self, node, **(kw | {"memory_bytes": 0})))


def starts_half_gangs(monkeypatch: pytest.MonkeyPatch) -> None:
    place = scheduling.place_gang

    def half(fleet: FleetArrays, gang: Any, **how: Any) -> Any:
        placed = place(fleet, gang, **how)
        if placed is None or len(placed.places) < 2:
            return placed
        return replace(placed, places=placed.places[:-1])

    monkeypatch.setattr(scheduling, "place_gang", half)


def leaves_idle_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(self: Meter, since: int, now: int, measured: int | None) -> list[Part]:
        return [part for part in original(self, since, now, measured) if part[0] is not None or part[3]]

    original = Meter._parts
    monkeypatch.setattr(Meter, "_parts", parts)


def counts_a_stretch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Meter, now: int) -> Stretch | None:
        before = self.since_ns
        stretch = original(self, now)
        if self.holders:
            self.since_ns = before
        return stretch

    original = Meter.cut
    monkeypatch.setattr(Meter, "cut", cut)


def releases_without_cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "meters_held", lambda _held: ())


def frees_devices_before_the_worker_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    end = ending.end_attempt

    def too_early(world: World, attempt: Any, cause: Any, out: Any, **more: Any) -> None:
        end(world, attempt, cause, out, **more)
        for worker in world.workers_of(attempt):
            world.let_go(worker)

    monkeypatch.setattr(ending, "end_attempt", too_early)


def retries_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "end_job", _requeue_instead(ending.end_job, ending._queue_again))


def _requeue_instead(end_job: Callable[..., None], queue_again: Callable[..., None]) -> Callable[..., None]:
    def instead(world: World, job: Any, event: str, cause: Any, out: Any, **more: Any) -> None:
        if event == "failed":
            queue_again(world, job, replace(_last_attempt(job), cause=cause), out, retries=job.retries)
        else:
            end_job(world, job, event, cause, out, **more)

    return instead


def _last_attempt(job: Any) -> Any:
    from tidemill.model.job import Attempt, AttemptState

    return Attempt(
        id="a", job_id=job.id, number=1, state=AttemptState.ENDED, version=1, placed_ns=0, workers=1, rendezvous_port=0
    )  # type: ignore[arg-type]


def ignores_the_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_current", lambda world, launch, _fence: world.allocations.get(launch))


def ignores_project_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuotaTree, "over_limit", lambda self, *_of, **_how: None)


def forgets_to_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WaitingLines, "rollback", lambda self: self._journal.clear())


def forgets_the_fleet_when_undoing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetArrays, "rollback", lambda self, mark: None)


def does_not_bump_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps_version(value: Any, **changes: Any) -> Any:
        return replace(value, **{name: change for name, change in changes.items() if name != "version"})

    monkeypatch.setattr(world, "replace", keeps_version)


def starts_without_cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "meters_held", lambda _held: ())


BUGS = [
    forgets_devices,
    forgets_memory,
    starts_half_gangs,
    leaves_idle_time_out,
    counts_a_stretch_twice,
    releases_without_cutting,
    frees_devices_before_the_worker_is_gone,
    retries_for_ever,
    ignores_the_fence,
    forgets_to_undo,
    ignores_project_limits,
    forgets_the_fleet_when_undoing,
    does_not_bump_versions,
    starts_without_cutting,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert found_in_histories()


def test_without_a_bug_the_auditor_is_content() -> None:
    assert not found_in_histories(100)


# -- the same input gives the same turn ------------------------------------------------------------------------------

_PRINT_PLANS = """
import random, sys
from tests.core.history import History
random.seed(7)
names = ["submit"] * 5 + ["started"] * 4 + ["exit0"] * 3 + ["exit1", "stop", "vanish", "join", "tick"]
history = History()
history.play([(random.choice(names), random.randrange(50), random.randrange(50), random.randrange(12)) for _ in range(120)])
sys.stdout.write(repr(history.plans))
"""


def plans_under_hash_seed(seed: str) -> str:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", _PRINT_PLANS], env=environment, cwd=root, capture_output=True, text=True, check=True
    ).stdout


def test_the_same_input_gives_the_same_turns_under_two_hash_seeds() -> None:
    first, second = plans_under_hash_seed("1"), plans_under_hash_seed("2")
    assert len(first) > 10_000
    assert first == second


# -- money --------------------------------------------------------------------------------------------------------------

INSTANTS = st.lists(st.integers(0, 10**18), min_size=2, max_size=8, unique=True).map(sorted)


def total_of_pieces(rate: int, milli: int, instants: list[int], amount: Callable[[int, int, int, int], int]) -> bool:
    pieces = sum(amount(rate, milli, a, b) for a, b in itertools.pairwise(instants))
    return pieces == amount(rate, milli, instants[0], instants[-1])


@given(st.integers(0, 10**8), st.integers(1, 8000), INSTANTS)
def test_a_bill_is_the_same_however_time_is_cut(rate: int, milli: int, instants: list[int]) -> None:
    assert total_of_pieces(rate, milli, instants, rating.amount_micro)


def test_rounding_each_line_would_be_caught() -> None:
    def rounded(rate: int, milli: int, from_ns: int, to_ns: int) -> int:
        return round(rate * milli * (to_ns - from_ns) / (1000 * 3600 * 10**9))

    assert not total_of_pieces(2_990_001, 1000, [0, 10**9, 2 * 10**9, 3 * 10**9 + 1], rounded)


@given(
    st.integers(0, 10**9),
    st.lists(st.integers(1, 400), min_size=0, max_size=2),
    st.integers(0, 10**6),
)
def test_measured_energy_is_shared_out_to_the_last_millijoule(energy: int, shares: list[int], start: int) -> None:
    meter = Meter("n", "g", "H100-SXM", 1000, 1, 1, start)  # type: ignore[arg-type]
    meter.read(5, now=start)
    for index, milli in enumerate(shares):
        meter.holders[f"l{index}"] = _holder(milli)  # type: ignore[index]
    meter.read(5 + energy, now=start + 10)
    stretch = meter.cut(start + 10)
    assert stretch is not None
    assert sum(used for _, _, used, _ in stretch.parts) == energy


def _holder(milli: int) -> Any:
    return Holder(milli, "l", "a", "j", "p")  # type: ignore[arg-type]


def test_the_books_price_pue_and_carbon() -> None:
    site = Site(id="s", name="s", kind="onprem", engine="local", pue_milli=1500, carbon_mg_per_kwh=400_000)  # type: ignore[arg-type]
    meter = Meter("n", "cpu", "cpu", 2_000, 0, 500_000, 0)  # type: ignore[arg-type]
    meter.holders["l"] = _holder(2_000)  # type: ignore[index]
    stretch = meter.cut(3_600 * 10**9)
    assert stretch is not None
    from tidemill.model.ledger import Rate

    card = RateCard(id="r", rates=(Rate(resource="cpu", micro_per_hour=44_625, source=""),))
    entries = rating.rate_all([stretch], lambda _site: (card.id, card.by_resource()), lambda _node: site)
    [line] = Ledger(tuple(entries))
    assert (line.amount_micro, line.energy_mj, line.carbon_mg) == (89_250, 5_400_000_000, 600_000)
