"""The control plane's clock: it never jumps, never goes back, and follows the time of day slowly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidemill.control.clock import FOLLOWS, SteadyClock
from tidemill.units import HOUR_NS, SECOND_NS

STEPS = st.lists(st.tuples(st.integers(0, HOUR_NS), st.integers(-3 * HOUR_NS, 3 * HOUR_NS)), min_size=1, max_size=40)
"""How much time passes, and by how much somebody sets the time of day then."""


class Jumping:
    """Time that passes, and a time of day that is set."""

    def __init__(self) -> None:
        self.passed = 7
        self.day = 1_000_000 * SECOND_NS


def told(steps: list[tuple[int, int]], make: type[SteadyClock] = SteadyClock) -> list[tuple[int, int, int]]:
    """For each step how much time passed, how much the clock says, and how far it is off afterwards."""
    world = Jumping()
    clock = make(lambda: world.day, lambda: world.passed)
    found, before = [], clock()
    for passes, jump in steps:
        world.passed += passes
        world.day += passes + jump
        now = clock()
        found.append((passes, now - before, abs(world.day - now)))
        before = now
    return found


@given(STEPS)
def test_what_it_says_passed_did(steps: list[tuple[int, int]]) -> None:
    for passed, said, _ in told(steps):
        assert said >= 0
        assert abs(said - passed) <= passed // FOLLOWS


def test_a_clock_that_takes_the_time_of_day_is_found_out() -> None:
    class Planted(SteadyClock):
        def __call__(self) -> int:
            return self._day()

    assert [said for _, said, _ in told([(SECOND_NS, HOUR_NS), (SECOND_NS, -HOUR_NS)], Planted)] != [
        said for _, said, _ in told([(SECOND_NS, HOUR_NS), (SECOND_NS, -HOUR_NS)])
    ]


def test_small_corrections_are_followed_within_minutes() -> None:
    steps = [(SECOND_NS, SECOND_NS // 2), *[(SECOND_NS, 0)] * 120]
    off = [off for _, _, off in told(steps)]
    assert off[0] > SECOND_NS // 3
    assert off[-1] == 0
