"""Shares with a memory, and what a queue could have: tables, promises, and for each promise a planted bug."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tidemill.core import fairness
from tidemill.core.fairness import Claim, Party, could_have
from tidemill.units import DAY_NS, HOUR_NS

CAPACITY = {"H100": 80_000, "A100": 40_000, "cpu": 1_000_000, "memory": 1 << 40}


def share(party: Party, now: int = 0, half_life_ns: int = DAY_NS) -> float:
    return party.share(CAPACITY, now=now, half_life_ns=half_life_ns)


def holding(amounts: dict[str, int], weight_milli: int = 1_000) -> Party:
    party = Party("q", "q")
    party.weight_milli = weight_milli
    party.change(amounts, 1, now=0, half_life_ns=DAY_NS)
    return party


@pytest.mark.parametrize(
    ("amounts", "weight_milli", "dominant"),
    [
        ({"H100": 8_000}, 1_000, 0.1),
        ({"H100": 8_000}, 2_000, 0.05),
        ({"H100": 8_000, "A100": 10_000}, 1_000, 0.25),
        ({"H100": 8_000, "cpu": 500_000}, 1_000, 0.5),
        ({"TPU": 8_000}, 1_000, 0.0),
        ({}, 1_000, 0.0),
    ],
)
def test_a_share_is_the_largest_part_of_anything_for_the_weight(
    amounts: dict[str, int], weight_milli: int, dominant: float
) -> None:
    assert share(holding(amounts, weight_milli)) == pytest.approx(dominant)


def test_what_was_held_counts_for_half_after_its_half_life() -> None:
    party = holding({"H100": 8_000})
    assert share(party, DAY_NS) == pytest.approx(0.1 + 0.05)
    party.change({"H100": 8_000}, -1, now=DAY_NS, half_life_ns=DAY_NS)
    assert share(party, DAY_NS) == pytest.approx(0.05)
    assert share(party, 2 * DAY_NS) == pytest.approx(0.025)
    assert share(party, 90 * DAY_NS) == pytest.approx(0, abs=1e-9)


def test_without_a_half_life_there_is_no_memory() -> None:
    party = Party("q", "q")
    party.change({"H100": 8_000}, 1, now=5, half_life_ns=0)
    assert share(party, 5, 0) == share(party, DAY_NS, 0) == pytest.approx(0.2)
    party.change({"H100": 8_000}, -1, now=6, half_life_ns=0)
    assert (party.held, party.taken) == ({}, {})


def test_looking_changes_nothing() -> None:
    party = holding({"H100": 8_000})
    before = (dict(party.held), dict(party.taken), party.at_ns)
    share(party, DAY_NS)
    party.taken_at(DAY_NS, DAY_NS)
    assert (party.held, party.taken, party.at_ns) == before


# -- a queue's average is the sum of its children's -------------------------------------------------------------------

MOVES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["H100", "cpu"]), st.integers(1, 9), st.integers(0, 5 * HOUR_NS)),
    min_size=2,
    max_size=25,
)


def sums_match(moves: list[tuple[int, str, int, int]]) -> bool:
    """Play holds and, every third time, a release of three children at growing instants; compare with their parent."""
    parent, children, now = Party("p", "p"), [Party(str(at), str(at)) for at in range(3)], 0
    held: list[tuple[Party, dict[str, int]]] = []
    for number, (at, resource, amount, passed) in enumerate(moves):
        now += passed
        who, amounts, sign = children[at], {resource: amount * 1_000}, 1
        if number % 3 == 2:
            who, amounts = held.pop(at % len(held))
            sign = -1
        else:
            held.append((who, amounts))
        for party in (who, parent):
            party.change(amounts, sign, now=now, half_life_ns=DAY_NS)
    now += HOUR_NS
    of_children = [child.taken_at(now, DAY_NS) for child in children]
    mine = parent.taken_at(now, DAY_NS)
    return all(
        mine.get(resource, 0) == pytest.approx(sum(one.get(resource, 0) for one in of_children), rel=1e-9, abs=1e-3)
        and parent.held.get(resource, 0) == sum(child.held.get(resource, 0) for child in children)
        for resource in ("H100", "cpu")
    )


@given(MOVES)
def test_the_average_of_a_queue_is_the_sum_of_its_children(moves: list[tuple[int, str, int, int]]) -> None:
    assert sums_match(moves)


def test_an_average_that_is_not_brought_up_to_date_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    change = Party.change

    def late(self: Party, amounts: dict[str, int], sign: int, *, now: int, half_life_ns: int) -> None:
        change(self, amounts, sign, now=self.at_ns, half_life_ns=half_life_ns)
        self.at_ns = now

    monkeypatch.setattr(Party, "change", late)
    assert is_refuted(MOVES, sums_match)


@given(MOVES)
def test_the_reverse_takes_a_change_back(moves: list[tuple[int, str, int, int]]) -> None:
    party, now = Party("p", "p"), 0
    for _, resource, amount, passed in moves:
        now += passed
        party.change({resource: amount}, 1, now=now, half_life_ns=DAY_NS)
    held, taken = dict(party.held), party.taken_at(now, DAY_NS)
    for sign in (1, -1):
        party.change({"H100": 7, "A100": 3}, sign, now=now, half_life_ns=DAY_NS)
    assert party.held == held
    assert party.taken_at(now, DAY_NS) == pytest.approx(taken, rel=1e-12)


# -- what each could have -----------------------------------------------------------------------------------------------

CLAIMS = st.lists(
    st.builds(
        Claim,
        guaranteed=st.integers(0, 8),
        weight_milli=st.sampled_from([500, 1_000, 3_000]),
        wants=st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=6,
)


def poured(total: int, claims: Sequence[Claim]) -> list[Fraction]:
    """Drop by drop, as it is told: first what is guaranteed and wanted, then by weight to whoever wants more."""
    gets = [Fraction(c.guaranteed if c.wants is None else min(c.guaranteed, c.wants)) for c in claims]
    if sum(gets) >= total:
        return [part * total / sum(gets) if part else part for part in gets]
    left = Fraction(total) - sum(gets)
    while left > 0:
        open_ = [at for at, c in enumerate(claims) if c.wants is None or gets[at] < c.wants]
        if not open_:
            break
        weight = sum(claims[at].weight_milli for at in open_)
        step = left / weight
        for at in open_:
            if (wants := claims[at].wants) is not None:
                step = min(step, (wants - gets[at]) / claims[at].weight_milli)
        for at in open_:
            gets[at] += step * claims[at].weight_milli
        left -= step * weight
    return gets


def is_as_poured(case: tuple[int, list[Claim]]) -> bool:
    total, claims = case
    found = fairness.could_have(total, claims, [None] * len(claims))
    for at, claim in enumerate(claims):
        thirsty = Claim(guaranteed=claim.guaranteed, weight_milli=claim.weight_milli)
        exact = poured(total, [*claims[:at], thirsty, *claims[at + 1 :]])[at]
        if not exact - 1 < found[at] <= exact + Fraction(1, 1000):
            return False
    return True


@given(st.tuples(st.integers(0, 40), CLAIMS))
@settings(max_examples=400)
def test_what_each_could_have_is_as_if_poured_drop_by_drop(case: tuple[int, list[Claim]]) -> None:
    assert is_as_poured(case)


def test_a_guarantee_given_to_those_that_do_not_want_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def generous(total: int, claims: Sequence[Claim], limits: Sequence[int | None]) -> tuple[int, ...]:
        wanting = [
            Claim(guaranteed=c.guaranteed, weight_milli=c.weight_milli, wants=c.wants and max(c.wants, c.guaranteed))
            for c in claims
        ]
        return could_have(total, wanting, limits)

    monkeypatch.setattr(fairness, "could_have", generous)
    assert is_refuted(st.tuples(st.integers(0, 40), CLAIMS), is_as_poured)


def test_nobody_could_have_more_than_its_limit() -> None:
    assert could_have(10, [Claim(), Claim()], [2, None]) == (2, 5)


def is_refuted(strategy: st.SearchStrategy[Any], holds: Callable[[Any], bool], attempts: int = 400) -> bool:
    """Whether a promise is broken in some of many cases."""

    @given(strategy)
    @settings(max_examples=attempts, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def play(case: Any) -> None:
        assert holds(case)

    try:
        play()
    except (AssertionError, ExceptionGroup, HypothesisException):
        return True
    return False
