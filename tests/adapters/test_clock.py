"""The control plane's clock follows the wall's, and never jumps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.core.history import START
from tidemill.control.clock import SteadyClock
from tidemill.units import HOUR_NS, SECOND_NS


class Clocks:
    """A wall clock that can be set, and one that cannot."""

    def __init__(self) -> None:
        self.off = 0
        self.passed = 0
        self.steady = SteadyClock(wall=lambda: START + self.passed + self.off, monotonic=lambda: self.passed)


def test_an_hour_ahead_or_back_is_made_up_for_slowly() -> None:
    for jump in (HOUR_NS, -HOUR_NS):
        clocks = Clocks()
        clocks.off = jump
        clocks.passed = 100 * SECOND_NS
        assert abs(clocks.steady() - START - 100 * SECOND_NS) == 2 * SECOND_NS
        for _ in range(10_000):
            clocks.passed += 60 * SECOND_NS
            clocks.steady()
        assert clocks.steady() == START + clocks.passed + jump


def test_it_begins_after_what_is_written_down() -> None:
    clocks = Clocks()
    clocks.steady.not_before(START + HOUR_NS)
    assert clocks.steady() == START + HOUR_NS
    clocks.steady.not_before(START)
    clocks.passed += SECOND_NS
    assert START + HOUR_NS < clocks.steady() < START + HOUR_NS + SECOND_NS


@given(st.lists(st.tuples(st.integers(0, 10 * HOUR_NS), st.integers(-24 * HOUR_NS, 24 * HOUR_NS)), max_size=30))
def test_it_never_goes_back_and_never_far(steps: list[tuple[int, int]]) -> None:
    clocks = Clocks()
    before = clocks.steady()
    for passed, off in steps:
        clocks.passed += passed
        clocks.off = off
        now = clocks.steady()
        assert passed - passed // 50 - 1 <= now - before <= passed + passed // 50 + 1
        before = now
