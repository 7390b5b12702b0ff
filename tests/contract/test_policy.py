"""Every order and placement policy keeps the contract of policies, and the contract catches those that do not."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime as moment
from time import monotonic
from typing import Any

import numpy as np
import pytest

from tidemill.core import plugins
from tidemill.core.ordering import JobFacts, KinGittins, LeastAttained, OrderPolicy, ShortestRemaining, Weighted
from tidemill.core.score import NEVER, BestFit, Columns, Fgd, Score, Tide, Want
from tidemill.testing import check_policy
from tidemill.testing.policy import Ints

ORDERS = plugins.order_names()
SCORES = plugins.score_names()


@pytest.mark.parametrize("name", ORDERS)
def test_order_policies_that_come_along_keep_the_contract(name: str) -> None:
    check_policy(lambda: plugins.order_named(name))


@pytest.mark.parametrize("inner", [KinGittins, LeastAttained, ShortestRemaining])
def test_weighted_policies_keep_the_contract(inner: Callable[[], OrderPolicy]) -> None:
    check_policy(lambda: Weighted(inner=inner()))


@pytest.mark.parametrize("name", SCORES)
def test_placement_policies_that_come_along_keep_the_contract(name: str) -> None:
    check_policy(lambda: plugins.score_named(name))


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is an optional accelerator")
@pytest.mark.parametrize("kind", [Tide, Fgd])
def test_compiled_placement_policies_keep_the_contract(kind: Callable[..., Score]) -> None:
    check_policy(lambda: kind(compiled=True))


def test_the_check_leaves_clocks_and_dice_as_they_were() -> None:
    before = (time.time, time.monotonic, monotonic, random.random, np.random.default_rng, moment, datetime.datetime)
    check_policy(LeastAttained, examples=3)
    check_policy(BestFit, examples=3)
    with pytest.raises(AssertionError):
        check_policy(ReadsAClock, examples=3)
    after = (time.time, time.monotonic, monotonic, random.random, np.random.default_rng, moment, datetime.datetime)
    assert all(one is other for one, other in zip(before, after, strict=True))


# Orders that break one rule


@dataclass(slots=True, kw_only=True)
class Plain:
    """Least attained, to be broken."""

    name: str = "plain"
    knows_durations: bool = False
    preempts: bool = True
    quantum_ns: int = 0
    drift_ns: int = 60
    margin: float = 2.0

    def rank(self, facts: JobFacts, *, now: int) -> float:
        return 1.0 + facts.attained_ns


class HasNoEnd(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) / (1.0 if facts.gpu_milli else float("inf")) or float("inf")


class IsNothing(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) - 1.0


class DividesByNothing(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) / facts.gpu_milli


class AnswersNothing(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> Any:
        return None if facts.weight > 1 else super().rank(facts, now=now)


class ThrowsDice(Plain):
    _dice = random.Random(3)

    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + self._dice.random()


class CountsQuestions(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def rank(self, facts: JobFacts, *, now: int) -> float:
        self.asked += 1
        return super().rank(facts, now=now) * (2 if self.asked > 5 else 1)


class ReadsAClock(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + (time.time() < 0)


class ReadsAnImportedClock(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + (monotonic() < 0)


class LooksAtTheCalendar(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + (moment.now(UTC).year < 1990)


class LooksAtTheWholeCalendar(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + (datetime.datetime.now(tz=UTC).year < 1990)


class ThrowsUnseenDice(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + (random.random() < 0)


class RunningComesLast(Plain):
    """What runs ranks after what waits: two jobs take turns."""

    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) * (1_000.0 if facts.running else 1.0)


class FreshlyRunningComesLast(Plain):
    """The same by what it was told: who was told of last as running ranks last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def note(self, facts: JobFacts, *, finished: bool = False) -> None:
        self.last = facts.id if facts.running else self.last

    def rank(self, facts: JobFacts, *, now: int) -> float:
        return 1_000.0 if facts.running or facts.id == self.last else 1.0


class ReadsDurations(Plain):
    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) + (facts.expected_ns or 0)


class WorsensUntold(Plain):
    def __init__(self) -> None:
        super().__init__(drift_ns=0)


class Learning(Plain):
    """Ranks by how many of the kin ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, int] = {}

    def note(self, facts: JobFacts, *, finished: bool = False) -> None:
        self.ended[facts.kin] = self.ended.get(facts.kin, 0) + finished

    def rank(self, facts: JobFacts, *, now: int) -> float:
        return super().rank(facts, now=now) / (1 + self.ended[facts.kin])


class LearnsForAll(Learning):
    _of_all: dict[str, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.ended = self._of_all


class CopiesForget(Learning):
    def __getstate__(self) -> Any:
        return ()

    def __setstate__(self, state: Any) -> None:
        Learning.__init__(self)

    def rank(self, facts: JobFacts, *, now: int) -> float:
        return Plain.rank(self, facts, now=now) / (1 + self.ended.get(facts.kin, 0))


class CopiesShare(Learning):
    def __deepcopy__(self, memo: Any) -> CopiesShare:
        other = CopiesShare()
        other.ended = self.ended
        return other


class CannotBeCopied(Learning):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class EndsAreAnError(Learning):
    def note(self, facts: JobFacts, *, finished: bool = False) -> None:
        if finished:
            raise KeyError(facts.id)
        super().note(facts)


BROKEN_ORDERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Plain(name=""), "has the name ''"),
    (lambda: Plain(preempts=None), "has preempts None"),  # type: ignore[arg-type]
    (lambda: Plain(quantum_ns=-1), "has quantum_ns -1"),
    (lambda: Plain(drift_ns=1.5), "has drift_ns 1.5"),  # type: ignore[arg-type]
    (lambda: Plain(margin=0.9), "has margin 0.9"),
    (lambda: Plain(margin=float("nan")), "has margin nan"),
    (HasNoEnd, "the rank inf"),
    (IsNothing, "the rank 0.0"),
    (DividesByNothing, "raises ZeroDivisionError"),
    (AnswersNothing, "the rank None"),
    (ThrowsDice, "newly made and told the same"),
    (CountsQuestions, "asked again"),
    (ReadsAClock, "uses time.time()"),
    (ReadsAnImportedClock, "uses time.monotonic()"),
    (LooksAtTheCalendar, "uses datetime.now()"),
    (LooksAtTheWholeCalendar, "uses datetime.now()"),
    (ThrowsUnseenDice, "uses random.random()"),
    (RunningComesLast, "take it back at once"),
    (FreshlyRunningComesLast, "take it back at once"),
    (ReadsDurations, "says knows_durations=False"),
    (WorsensUntold, "says drift_ns=0"),
    (LearnsForAll, "newly made and told the same"),
    (CopiesForget, "copied before and told the same"),
    (CopiesShare, "copied before and told the same"),
    (CannotBeCopied, "cannot be copied"),
    (EndsAreAnError, "raises KeyError"),
]


@pytest.mark.parametrize("make", [Plain, Learning])
def test_what_is_broken_below_was_whole(make: Callable[[], Any]) -> None:
    check_policy(make)


@pytest.mark.parametrize(("make", "says"), BROKEN_ORDERS, ids=lambda it: it if isinstance(it, str) else None)
def test_the_check_catches_an_order_that(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_policy(make, examples=50)
    told = str(caught.value)
    assert told.startswith("The order policy ")
    assert says in told
    assert ". Mend: " in told


# Placement policies that break one rule


class Emptiest:
    """The node with most CPU free, and of its GPUs the first that fits; to be broken."""

    name = "emptiest"

    def __init__(self) -> None:
        self.version = 0
        self.weight = 1

    def learn(self, mix: Any) -> None:
        self.weight = len(mix)
        self.version += 1

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        column = np.full(len(rows), -1, np.int64)
        if want.count and want.milli < 1_000:
            may = (fleet.model[rows] >= 0) & (fleet.gpu_free[rows] >= want.milli)
            if want.models:
                may &= np.isin(fleet.model[rows], want.models)
            column = may.argmax(axis=1)
        return self.weight * np.maximum(fleet.cpu_free[rows], 0) // 1_000, column


class _Changed(Emptiest):
    """What else the scores are."""

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> Any:
        score, column = super().scores(fleet, want, rows)
        return self.changed(fleet, rows, score, column)

    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        raise NotImplementedError


class ScoresAllNodes(Emptiest):
    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        return super().scores(fleet, want, np.arange(len(fleet.cpu_free)))


class ScoresInFractions(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score / 2, column


class ScoresInHalfWords(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score, column.astype(np.int32)


class GivesScoresAlone(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score


class Refuses(_Changed):
    """Says never to a nearly full node where the worker fits."""

    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return np.where(fleet.memory_free[rows] < fleet.memory_total[rows] // 2, NEVER, score), column


class Boasts(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score << 40, column


class ChoosesTheFirst(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score, np.where(column >= 0, 0, column)


class ChoosesForWholes(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score, np.maximum(column, 0)


class ForgetsModels(Emptiest):
    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        return super().scores(fleet, Want(want.cpu_milli, want.memory_bytes, want.count, want.milli), rows)


class RemembersQuestions(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        self.weight += 1
        return score, column


class LearnsBetweenObjects(Emptiest):
    numbers = itertools.count()

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        score, column = super().scores(fleet, want, rows)
        return score + next(self.numbers), column


class TellsTheTime(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score + (monotonic() < 0), column


class ComparesWithTheOthers(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score - score.min(initial=1 << 30), column


class ComparesWithTheFleet(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score - fleet.cpu_free.sum() // 1_000, column


class TakesInPlace(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        fleet.gpu_free[rows] -= 1
        return score, column


class SortsTheRows(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        rows.sort()
        return score, column


class SortsTheMix(Emptiest):
    def learn(self, mix: Any) -> None:
        super().learn(mix)
        if isinstance(mix, list):
            mix.clear()


class LearnsInSilence(Emptiest):
    def learn(self, mix: Any) -> None:
        self.weight = len(mix)


class UsesVersionsAgain(Emptiest):
    def learn(self, mix: Any) -> None:
        self.weight += len(mix)
        self.version = 1 - self.version


class NeedsGpus(_Changed):
    def changed(self, fleet: Columns, rows: Ints, score: Ints, column: Ints) -> Any:
        return score + fleet.gpu_free[rows][:, 0], column


class LooksFurther(_Changed):
    def changed(self, fleet: Any, rows: Ints, score: Ints, column: Ints) -> Any:
        return score + len(fleet.nodes[rows[0]].labels), column


class HasNoVersion(Emptiest):
    def __init__(self) -> None:
        super().__init__()
        self.version = "1"  # type: ignore[assignment]


class HasNoName(Emptiest):
    name = ""


BROKEN_SCORES: list[tuple[Callable[[], Any], str]] = [
    (HasNoName, "has the name ''"),
    (HasNoVersion, "has version '1'"),
    (ScoresAllNodes, "for 1 rows"),
    (ScoresInFractions, "scores of type float64"),
    (ScoresInHalfWords, "columns of type int32"),
    (GivesScoresAlone, "give two arrays"),
    (Refuses, "a pod that fits may be refused"),
    (Boasts, "a pod that fits may be refused"),
    (ChoosesTheFirst, "chooses column 0"),
    (ChoosesForWholes, "which asks for no share"),
    (ForgetsModels, "chooses column"),
    (RemembersQuestions, "to the same question"),
    (LearnsBetweenObjects, "to the same question"),
    (TellsTheTime, "uses time.monotonic()"),
    (ComparesWithTheOthers, "alone"),
    (ComparesWithTheFleet, "when only row"),
    (TakesInPlace, "changes gpu_free of the fleet"),
    (SortsTheRows, "changes the rows"),
    (SortsTheMix, "changes the mix"),
    (LearnsInSilence, "at the same version"),
    (UsesVersionsAgain, "at the same version"),
    (NeedsGpus, "raises IndexError"),
    (LooksFurther, "raises AttributeError"),
]


def test_the_placement_policy_that_is_broken_below_was_whole() -> None:
    check_policy(Emptiest)


@pytest.mark.parametrize(("make", "says"), BROKEN_SCORES, ids=lambda it: it if isinstance(it, str) else None)
def test_the_check_catches_a_placement_policy_that(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_policy(make, examples=50)
    told = str(caught.value)
    assert told.startswith("The score policy ")
    assert says in told
    assert ". Mend: " in told


# What is no policy


def test_what_is_no_policy_is_told_so() -> None:
    with pytest.raises(AssertionError, match="has neither rank nor scores"):
        check_policy(object)  # type: ignore[arg-type]


@pytest.mark.parametrize("one", [KinGittins(), Tide()])
def test_what_learns_is_made_anew(one: Any) -> None:
    with pytest.raises(AssertionError, match="gives the same object twice"):
        check_policy(lambda: one)
