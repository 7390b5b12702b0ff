"""Circuits and lines by themselves: properties over any order of what happens, each with a bug that it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.gateway.circuit import LONGEST_PAUSE_S, Circuit, State
from tidemill.gateway.table import Replica, Route
from tidemill.gateway.waiting import Line, retry_after_s

delays = st.sampled_from([0.0, 0.0, 0.1, 0.6, 3.0, 20.0])
events = st.lists(st.tuples(st.sampled_from(["send", "answered", "cancel", "fail", "probed"]), delays), max_size=60)


def check_circuit(make: Callable[[], Circuit]) -> None:
    """Nothing is sent before the pause is over and a probe was answered, then one request until one is answered."""

    @settings(max_examples=300, deadline=None, report_multiple_bugs=False)
    @given(events)
    def check(steps: list[tuple[str, float]]) -> None:
        circuit, now, under_way, may_try_at, was_probed, is_proven = make(), 0.0, 0, 0.0, True, True
        for what, later in steps:
            now += later
            if what == "send" and circuit.allows:
                assert now >= may_try_at, "sent in the pause"
                assert was_probed, "sent before a probe"
                assert is_proven or not under_way, "two trials at a time"
                under_way += 1
                circuit.begin()
            elif what == "answered" and under_way:
                circuit.answered(now=now)
                is_proven = True
            elif what == "cancel" and under_way:
                under_way -= 1
                circuit.cancel()
            elif what == "fail":
                if circuit.fail("it broke", now=now):
                    assert now < circuit.until <= now + LONGEST_PAUSE_S
                    may_try_at, was_probed, is_proven = circuit.until, False, False
                under_way = 0
            elif what == "probed":
                was_probed = was_probed or now >= may_try_at
                circuit.probed(now=now)

    check()


def test_an_open_circuit_closes_by_a_probe_and_then_a_trial() -> None:
    check_circuit(Circuit)
    circuit = Circuit()
    assert [circuit.fail("a", now=0.0), circuit.fail("a", now=0.1)] == [True, False]
    assert not circuit.probed(now=0.2)
    assert circuit.probed(now=0.6)
    circuit.begin()
    assert not circuit.allows
    assert circuit.fail("b", now=1.0)
    assert circuit.until == 2.0, "twice as long"
    circuit.probed(now=2.0)
    circuit.begin()
    circuit.answered(now=2.1)
    assert (circuit.state, circuit.failures, circuit.allows) == (State.CLOSED, 0, True)


@pytest.mark.parametrize("bug", ["closes by a probe alone", "forgets the pause", "tries with many"])
def test_the_check_of_circuits_finds(bug: str) -> None:
    class Wrong(Circuit):
        def probed(self, *, now: float) -> bool:
            if bug == "forgets the pause":
                self.until = 0.0
            may = super().probed(now=now)
            if may and bug == "closes by a probe alone":
                self.state = State.CLOSED
            return may

        def begin(self) -> None:
            if bug != "tries with many":
                super().begin()

    with pytest.raises((AssertionError, ExceptionGroup)):
        check_circuit(Wrong)


class Asker:
    """A request that notes when it went."""

    def __init__(
        self, tenant: str, number: int, line: Line, room: list[int], went: list[Asker], *, band: int = 1
    ) -> None:
        self.tenant, self.number, self.band = tenant, number, band
        self._line, self._room, self._went = line, room, went

    is_picky = False

    def go(self) -> bool:
        if not self._room[0]:
            return False
        self._room[0] -= 1
        self._line.leave(self, self.tenant, band=self.band)
        self._went.append(self)
        self._line.advance()  # as happens when a replica fails at once
        return True


def check_line(make: Callable[[], Line]) -> None:
    """All go, each tenant's in order, and no tenant twice while another that waits has not had a turn."""

    @settings(max_examples=200, deadline=None, report_multiple_bugs=False)
    @given(st.lists(st.one_of(st.sampled_from("abc"), st.integers(1, 4)), max_size=60))
    def check(steps: list[str | int]) -> None:
        line, room, went = make(), [0], list[Asker]()
        waiting: list[Asker] = []
        for number, step in enumerate([*steps, 60]):
            if isinstance(step, str):
                waiting.append(Asker(step, number, line, room, went))
                line.join(waiting[-1], step)
                continue
            before, tenants = len(went), {one.tenant for one in waiting}
            room[0] = step
            line.advance()
            room[0] = 0
            gone = went[before:]
            assert len(gone) == min(step, len(waiting))
            first = [one.tenant for one in gone[: len(tenants)]]
            assert len(set(first)) == len(first), "a tenant had two turns while others waited"
            waiting = [one for one in waiting if one not in gone]
            assert line.count == len(waiting)
        for tenant in "abc":
            own = [one.number for one in went if one.tenant == tenant]
            assert own == sorted(own)

    check()


def test_a_line_is_in_order_within_a_tenant_and_fair_among_tenants() -> None:
    check_line(Line)


def test_the_check_of_lines_finds_one_that_is_only_first_come_first_served() -> None:
    class Greedy(Line):
        __slots__ = ()

        def join(self, waiter: Any, _tenant: str, *, band: int = 1, is_first: bool = False) -> None:
            super().join(waiter, "all", band=band, is_first=is_first)

        def leave(self, waiter: Any, _tenant: str, *, band: int = 1) -> None:
            super().leave(waiter, "all", band=band)

    with pytest.raises((AssertionError, ExceptionGroup)):
        check_line(Greedy)


def check_bands(make: Callable[[], Line]) -> None:
    """Who waits in a band that is before another goes sooner; nobody is passed by for ever."""

    @settings(max_examples=150, deadline=None, report_multiple_bugs=False)
    @given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 2))
    def check(before: list[int], mine: int) -> None:
        line, room, went = make(), [0], list[Asker]()

        def ask(band: int, number: int) -> Asker:
            asker = Asker("a", number, line, room, went, band=band)
            line.join(asker, "a", band=band)
            return asker

        for number, band in enumerate(before):
            ask(band, number)
        own, turns, sooner = ask(mine, 99), 0, 0
        while own not in went:
            room[0] = 1
            line.advance()
            turns += 1
            sooner += went[-1].band > mine
            ask(0, 1000 + turns)  # somebody urgent comes all the time
            assert turns < 200 * len(before) + 200, "it is passed by for ever"
        assert sooner <= before.count(2) + before.count(1)
        if mine == 0:
            assert sooner <= 1 + len(before) // 8, "what is less urgent went before it"

    check()


def test_what_is_urgent_goes_first_and_nothing_is_passed_by_for_ever() -> None:
    check_bands(Line)


@pytest.mark.parametrize("bug", ["bands are not looked at", "only the first band"])
def test_the_check_of_bands_finds(bug: str) -> None:
    class Wrong(Line):
        __slots__ = ()

        def join(self, waiter: Any, tenant: str, *, band: int = 1, is_first: bool = False) -> None:
            super().join(waiter, tenant, band=1 if bug == "bands are not looked at" else band, is_first=is_first)

        def leave(self, waiter: Any, tenant: str, *, band: int = 1) -> None:
            super().leave(waiter, tenant, band=1 if bug == "bands are not looked at" else band)

        def _let_one_go(self) -> bool:
            if bug == "only the first band":
                for one in self._bands:
                    one.turn = 0
            return Line._let_one_go(self)

    with pytest.raises((AssertionError, ExceptionGroup)):
        check_bands(Wrong)


def test_what_is_to_be_expected_follows_from_slots_and_who_is_before() -> None:
    replicas = tuple(Replica(job=str(i), host="h", port=i, prefix=b"") for i in range(2))
    route = Route(model="m", project="p", service="m", replicas=replicas, concurrency=4)
    line, room, went = Line(), [0], list[Asker]()
    assert line.expected_s(route, "a") == 0
    line.served_in(2.0)
    for number in range(15):
        line.join(Asker("a", number, line, room, went), "a")
    assert line.expected_s(route, "a") == 4.0
    assert line.expected_s(route, "b") == 0.5, "another tenant's first is next but one"
    replicas[0].circuit.fail("gone", now=0.0)
    assert line.expected_s(route, "a") == 8.0
    assert [retry_after_s(expected) for expected in (0.0, 1.2, 1e9)] == [1, 2, 60]
