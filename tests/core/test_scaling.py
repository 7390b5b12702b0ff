"""How many replicas are wanted: bounds, need, hysteresis and one launch at a time, over any course of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core import scaling
from tidemill.core.scaling import Bounds, Decision, Memory, Signals, decide
from tidemill.units import SECOND_NS

Decide = Callable[..., tuple[Decision, Memory]]
BOUNDS = Bounds(least=0, most=8, concurrency=4, idle_ns=10 * SECOND_NS)
steps = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from([0, 0, 1, 3, 4, 5, 20, 100]),
        st.sampled_from(["ready", "fail", "slow", "gone"]),
    ),
    max_size=40,
)
bounds = st.builds(
    lambda least, more, concurrency, idle: Bounds(
        least=least, most=least + more, concurrency=concurrency, idle_ns=idle * SECOND_NS
    ),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 12),
)


def check(choose: Decide) -> None:
    """What a decision may never do, whatever was asked and whatever came of the launches."""

    @settings(max_examples=400, deadline=None, report_multiple_bugs=False)
    @given(bounds, steps)
    def run(given_bounds: Bounds, course: list[tuple[int, int, str]]) -> None:
        now, ready, coming, is_failing, memory = 0, 0, 0, False, Memory()
        needs: list[tuple[int, int]] = []
        for later, asked, what in course:
            now += later * SECOND_NS
            if what == "ready" and coming:
                ready, coming, is_failing = ready + 1, coming - 1, False
            elif what == "fail" and coming:
                is_failing = True
            elif what == "gone" and ready:
                ready, coming = ready - 1, coming + 1
            signals = Signals(in_flight=asked // 2, waiting=asked - asked // 2, ready=ready, coming=coming)
            signals = replace(signals, is_failing=is_failing)
            decision, memory = choose(given_bounds, signals, memory, now=now)
            need = min(given_bounds.most, max(given_bounds.least, -(-asked // given_bounds.concurrency)))
            needs.append((now, need))
            lately = max([need, *(count for at, count in needs if at > now - given_bounds.idle_ns)])
            one_at_a_time = is_failing or not ready
            assert decision.wanted <= given_bounds.most
            assert decision.wanted >= min(need, 1), "nothing runs though something is asked"
            if is_failing:
                assert decision.wanted <= ready + 1, "several launches after a failure"
            elif not ready:
                assert decision.wanted <= max(1, given_bounds.least), "several launches before one is ready"
            if not one_at_a_time:
                assert decision.wanted >= need, "less than is needed"
                assert decision.wanted >= min(lately, ready + coming), "a replica is given up that was needed lately"
            assert decision.wanted <= max(need, lately), "more than was ever needed of late"
            assert len(memory.needed) <= given_bounds.most + 1, "what is remembered is bounded"
            coming = max(0, decision.wanted - ready)
            ready = min(ready, decision.wanted)

    run()


def test_any_course_of_requests_is_followed_within_the_rules() -> None:
    check(decide)


def forgets_peaks(bounds: Bounds, signals: Signals, _: Memory, *, now: int) -> tuple[Decision, Memory]:
    return decide(bounds, signals, Memory(), now=now)


def never_gives_up(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    decision, memory = decide(bounds, signals, memory, now=now)
    return replace(decision, wanted=max(decision.wanted, signals.ready)), memory


def launches_all_at_once(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    return decide(bounds, replace(signals, is_failing=False, ready=max(1, signals.ready)), memory, now=now)


def rounds_down(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    fewer = (signals.in_flight + signals.waiting) // bounds.concurrency * bounds.concurrency
    return decide(bounds, replace(signals, in_flight=fewer, waiting=0), memory, now=now)


@pytest.mark.parametrize("wrong", [forgets_peaks, never_gives_up, launches_all_at_once, rounds_down])
def test_the_check_finds_one_that(wrong: Decide) -> None:
    with pytest.raises((AssertionError, ExceptionGroup)):
        check(wrong)


def test_a_day_of_a_service_that_goes_to_zero() -> None:
    memory, story = Memory(), []
    for at, asked, ready, coming in (
        (0, 0, 0, 0),
        (1, 200, 0, 0),
        (2, 200, 0, 1),
        (3, 200, 1, 0),
        (4, 10, 1, 7),
        (12, 10, 8, 0),
        (14, 0, 8, 0),
        (25, 0, 8, 0),
    ):
        signals = Signals(waiting=asked, ready=ready, coming=coming)
        decision, memory = decide(BOUNDS, signals, memory, now=at * SECOND_NS)
        story.append((decision.wanted, decision.why))
    assert story == [
        (0, "0 requests, 4 at a time each"),
        (1, "none is ready yet"),
        (1, "none is ready yet"),
        (8, "200 requests, 4 at a time each"),
        (8, "8 were needed lately"),
        (8, "8 were needed lately"),
        (3, "3 were needed lately"),
        (0, "0 requests, 4 at a time each"),
    ]


def test_bounds_that_cannot_be_are_refused() -> None:
    for wrong in ({"least": 3, "most": 2}, {"least": -1}, {"concurrency": 0}, {"idle_ns": -1}):
        with pytest.raises(ValueError, match=r"replica|time"):
            scaling.Bounds(**{"least": 0, "most": 2, "concurrency": 1, "idle_ns": 0, **wrong})
