"""Reservations that overlap, nodes that are chosen for them, and trees that are refused with their field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.control.steering import overlaps
from tidemill.model.ids import NodeId, ReservationId
from tidemill.model.reservation import Reservation

FAR = 400


def windows(reservation: Reservation, horizon: int) -> list[tuple[int, int]]:
    """Its windows that begin before the horizon, by the model's own ``window``."""
    found: list[tuple[int, int]] = []
    at = 0
    while (window := reservation.window(after=at)) is not None and window[0] < horizon:
        found.append(window)
        at = window[1]
    return found


def tried(one: Reservation, other: Reservation) -> bool:
    """Whether they overlap, by trying all windows up to where both have come round together."""
    horizon = 2 * FAR + (one.every_ns or 1) * (other.every_ns or 1)
    return any(a[0] < b[1] and b[0] < a[1] for a in windows(one, horizon) for b in windows(other, horizon))


@st.composite
def reservations(draw: st.DrawFn) -> Reservation:
    start, length = draw(st.integers(0, 60)), draw(st.integers(1, 8))
    every = draw(st.just(0) | st.integers(length, 24))
    return Reservation(
        id=ReservationId("r"),
        name="r",
        node_ids=(NodeId("n"),),
        starts_ns=start,
        ends_ns=start + length,
        every_ns=every,
        until_ns=draw(st.just(0) | st.integers(1, FAR)) if every else 0,
        cancelled_ns=draw(st.sampled_from([0, 0, 0, 1])),
    )


@settings(max_examples=1_500, deadline=None)
@given(one=reservations(), other=reservations())
def test_they_overlap_exactly_when_some_windows_do(one: Reservation, other: Reservation) -> None:
    assert overlaps(one, other) == tried(one, other)
    assert overlaps(other, one) == overlaps(one, other)


def only_the_first_windows(one: Reservation, other: Reservation) -> bool:
    return one.starts_ns < other.ends_ns and other.starts_ns < one.ends_ns


def as_if_for_ever(one: Reservation, other: Reservation) -> bool:
    from dataclasses import replace

    return overlaps(replace(one, until_ns=0), replace(other, until_ns=0))


def touching_too(one: Reservation, other: Reservation) -> bool:
    from dataclasses import replace

    return overlaps(replace(one, ends_ns=one.ends_ns + (not one.every_ns)), other)


@pytest.mark.parametrize("planted", [only_the_first_windows, as_if_for_ever, touching_too])
def test_planted_bugs_are_caught(planted: Callable[[Reservation, Reservation], bool]) -> None:
    @settings(max_examples=2_000, deadline=None, database=None, derandomize=True)
    @given(one=reservations(), other=reservations())
    def check(one: Reservation, other: Reservation) -> None:
        assert planted(one, other) == tried(one, other)

    with pytest.raises(AssertionError):
        check()
