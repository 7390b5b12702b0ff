"""Limits that gateways share: never more than there is however many there are, and nearly all of it when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tidemill.core.limits import Kind, Pot, Report, Share, lacking, window_of
from tidemill.model.limits import Limit, Window, limit_of, limits_of
from tidemill.units import DAY_NS, MINUTE_NS, SECOND_NS

TICK_NS = SECOND_NS // 5
NOW = 1_764_500_000 * SECOND_NS


@dataclass
class Fleet:
    """Gateways that share one limit, their control plane, and the ledger, on a clock of their own."""

    limit: Limit
    count: int
    make_pot: Callable[[Limit, int, int], Pot] = lambda limit, booked, now: Pot.opened(limit, booked=booked, now=now)
    now: int = NOW
    ledger: int = 0
    used: int = 0
    under_way: int = 0
    is_cut_off: bool = False
    shares: list[Share] = field(default_factory=list)
    took: list[list[int]] = field(default_factory=list)
    """Of each gateway, what it took and is not in the ledger."""

    def __post_init__(self) -> None:
        self.shares = [Share("tok", self.limit) for _ in range(self.count)]
        self.took = [[] for _ in range(self.count)]
        self.pot = self.make_pot(self.limit, 0, self.now)

    def ask(self, number: int, amount: int = 1) -> bool:
        """Whether a request of that size is let in, when it can wait for a moment."""
        share, needs = self.shares[number], [amount] * 6
        for _ in range(4):
            if lacking([share], needs, now=self.now) is None:
                share.take(amount)
                self.used += amount
                self.under_way += amount
                self.took[number].append(amount)
                return True
            if self.is_cut_off:
                share.be_alone(among=self.count, now=self.now)
            else:
                self.tell(number, needed=amount)
                for other in range(self.count):  # their next tick
                    if other != number and share.is_short:
                        self.tell(other)
        return False

    def tell(self, number: int, *, needed: int = 0, loses_answer: bool = False) -> None:
        share = self.shares[number]
        hoped = share.tick(waited_for=needed, length_ns=TICK_NS)
        lacks = max(0, needed - share.balance)
        report = Report(
            held=share.balance,
            pending=share.pending,
            spent=share.spent,
            recent=share.recent,
            least=lacks,
            needed=lacks,
            hoped=hoped,
        )
        name = str(number)
        self.pot.hear(name, report, now=self.now)
        granted = self.pot.grant(name, report, now=self.now)
        if not loses_answer:
            share.told(
                granted,
                self.pot.free(now=self.now),
                self.pot.elsewhere(name),
                is_short=self.pot.is_short(now=self.now),
                now=self.now,
            )

    def enter(self, number: int) -> None:
        """What a gateway took gets into the ledger."""
        for amount in self.took[number]:
            self.ledger += amount
            self.under_way -= amount
            if self.pot.kind is Kind.QUOTA:
                self.pot.booked += amount
            self.shares[number].books(amount, self.now)
        self.took[number] = []

    def end(self, number: int) -> None:
        """What a gateway took is over; of a gauge it comes back."""
        if self.pot.kind is Kind.GAUGE:
            for amount in self.took[number]:
                self.shares[number].give_back(amount, taken_ns=self.now)
                self.used -= amount
            self.took[number] = []
        else:
            self.enter(number)

    def restart(self) -> None:
        """The control plane begins anew; what it knew is in the ledger, or gone."""
        booked = self.ledger if self.pot.kind is not Kind.RATE else self.used
        self.pot = self.make_pot(self.limit, booked, self.now)

    def most(self) -> int:
        """What may have been taken until now."""
        if self.pot.kind is not Kind.RATE:
            return self.pot.amount
        return self.pot.amount + self.pot.amount * (self.now - NOW) // MINUTE_NS


names = st.sampled_from(["tokens/minute", "requests/day", "tokens/month", "concurrency"])
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "tell", "lose answer", "end", "pass", "restart"]),
        st.integers(0, 3),
        st.integers(1, 30),
    ),
    max_size=50,
)


def check_never_more(
    make: Callable[[Limit, int, int], Pot], *, restarts: bool = True, phases: tuple[Phase, ...] = tuple(Phase)
) -> None:
    """All gateways together never take more than the limit, whatever is lost and whoever begins anew."""

    @settings(max_examples=120, deadline=None, report_multiple_bugs=False, phases=phases)
    @given(names, st.integers(0, 100), st.integers(1, 4), steps)
    def check(name: str, amount: int, count: int, what: list[tuple[str, int, int]]) -> None:
        fleet = Fleet(limit_of(name, amount), count, make)
        for step, number, size in what:
            gateway = number % count
            if step == "ask":
                fleet.ask(gateway, size)
            elif step in ("tell", "lose answer"):
                fleet.tell(gateway, needed=size, loses_answer=step == "lose answer")
            elif step == "end":
                fleet.end(gateway)
            elif step == "pass":
                fleet.now += size * SECOND_NS // 10
            elif step == "restart" and restarts:
                fleet.restart()
                for one in range(count):  # all of them tell before the new one gives anything ahead
                    share = fleet.shares[one]
                    fleet.pot.hear(
                        str(one),
                        Report(held=share.balance, pending=share.pending, spent=share.spent, recent=share.recent),
                        now=fleet.now,
                    )
            assert fleet.used <= fleet.most(), (step, fleet.used)

    check()


def test_gateways_never_take_more_than_the_limit_together() -> None:
    check_never_more(lambda limit, booked, now: Pot.opened(limit, booked=booked, now=now))


class _GivesTooMuch(Pot):
    def grant(self, gateway: str, report: Report, *, is_new: bool = False, now: int) -> int:
        return report.needed + report.hoped


class _ForgetsPending(Pot):
    def free(self, *, now: int) -> int:
        return super().free(now=now) + sum(one.pending for one in self.holdings.values())


class _ReturnsLostTwice(Pot):
    def hear(self, gateway: str, report: Report, *, now: int) -> None:
        super().hear(gateway, report, now=now)
        self.level += report.spent * MINUTE_NS


@pytest.mark.parametrize("wrong", [_GivesTooMuch, _ForgetsPending, _ReturnsLostTwice])
def test_the_check_of_limits_finds(wrong: type[Pot]) -> None:
    def make(limit: Limit, booked: int, now: int) -> Pot:
        pot = Pot.opened(limit, booked=booked, now=now)
        made = wrong(limit)
        for name in ("amount", "kind", "begins_ns", "ends_ns", "booked", "level", "filled_ns"):
            setattr(made, name, getattr(pot, name))
        return made

    with pytest.raises((AssertionError, ExceptionGroup)):
        check_never_more(make, restarts=False, phases=(Phase.generate,))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", ["requests/minute", "tokens/day"])
def test_what_is_wanted_is_had_within_two_percent_by_any_number_of_gateways(
    name: str, count: int, uneven: bool
) -> None:
    """Twice as much is asked as there is, of all gateways or nearly all of one: 98 of 100 parts are had, and no more."""
    amount, minutes, chance = 600, 1, Random(count)
    fleet = Fleet(limit_of(name, amount), count)
    ticks = minutes * 60 * 5
    each = -(-fleet.pot.amount * (minutes + 1) * 2 // ticks)
    for _ in range(ticks):
        fleet.now += TICK_NS
        for _ in range(each):
            number = 0 if uneven and chance.random() < 0.9 else chance.randrange(count)
            fleet.ask(number)
        for number in range(count):
            fleet.tell(number)
            fleet.end(number)
        if fleet.pot.kind is Kind.QUOTA and fleet.used == amount:
            break
    most = fleet.most()
    assert most * 0.98 <= fleet.used <= most, (fleet.used, most)


@pytest.mark.parametrize("name", ["requests/minute", "tokens/day", "concurrency"])
@pytest.mark.parametrize("known", [False, True])
def test_gateways_that_are_cut_off_go_on_and_stay_within_the_limit(name: str, known: bool) -> None:
    fleet, chance = Fleet(limit_of(name, 1_000), 4), Random(7)
    if known:
        for number in range(4):
            fleet.ask(number, 50)
        for number in range(4):
            fleet.tell(number)
    fleet.is_cut_off = True
    before = fleet.used
    for _ in range(1_500):
        fleet.now += SECOND_NS // 10
        fleet.ask(chance.randrange(4))
    assert fleet.used > before + 500, "they serve on"
    assert fleet.used <= fleet.most() * 1.02
    fleet.is_cut_off = False
    for number in range(4):
        fleet.tell(number)
    assert fleet.pot.free(now=fleet.now) <= max(0, fleet.most() - fleet.used) + 60


def test_what_is_held_by_one_that_needs_it_no_more_comes_to_one_that_does() -> None:
    fleet = Fleet(limit_of("tokens/minute", 1_000), 2)
    assert fleet.ask(0, 400)
    fleet.shares[0].give_back(390, taken_ns=fleet.now)  # it took much less than it said
    fleet.used -= 390
    assert fleet.shares[0].balance == 390
    assert fleet.ask(1, 900), "as soon as the other has heard that it is short"


def test_windows_are_days_and_months_of_utc() -> None:
    leap = 1_709_164_800 * SECOND_NS
    begins, ends = window_of(Window.MONTH, now=leap + 5)
    assert (begins, ends) == (1_706_745_600 * SECOND_NS, 1_709_251_200 * SECOND_NS)
    assert window_of(Window.DAY, now=leap + 5) == (leap, leap + DAY_NS)
    december = 1_767_139_200 * SECOND_NS
    assert window_of(Window.MONTH, now=december)[1] == 1_767_225_600 * SECOND_NS
    share = Share("tok", limit_of("usd/month", 1))
    share.roll(now=leap)
    share.told(500, 0, 0, is_short=False, now=leap)
    share.take(400)
    assert lacking([share], [100] * 6, now=share.ends_ns - 1) is None
    assert lacking([share], [100] * 6, now=share.ends_ns) is share, "what was held was of the old month"
    share.give_back(300, taken_ns=leap)
    assert (share.balance, share.pending) == (0, 0), "and so is what comes back of it"


def test_limits_are_read_and_written_by_name() -> None:
    found = limits_of({"usd/month": 12.5, "requests/minute": 60, "concurrency": 0})
    assert {limit.name: limit.written for limit in found} == {
        "requests/minute": 60,
        "usd/month": 12.5,
        "concurrency": 0,
    }
    for name, amount in (
        ("requests/hour", 1),
        ("concurrency/day", 1),
        ("tokens/day", 0.5),
        ("usd/day", -1),
        ("usd/day", 1e9),
    ):
        with pytest.raises(ValueError, match="is not"):
            limit_of(name, amount)
