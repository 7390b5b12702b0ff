"""Limits of requests that several gateways share: one pot for each limit, and a share of it in each gateway.

A gateway takes from its share alone, without asking anybody, and asks for more before it is empty. The pot never gives
more than there is: what is free, what shares hold, what is under way and what is in the ledger add up to the limit, so
no number of gateways gets past it. Three kinds of limit differ in what comes back, and when:

- a *rate*, for a minute: a bucket that is full at first and fills up evenly, in a minute from empty to full;
- a *quota*, for a day or a month of UTC: all at its beginning. What is in the ledger is taken; what a gateway took and
  is not there yet is *pending*. So a control plane that begins anew reads what was used, and nothing counts twice;
- a *gauge*, at a time: what is pending comes back when it is over.

A gateway that cannot ask goes on with what it holds and then with an equal part of what was left when it last heard:
so all together stay within the limit, but for what others were given since it last heard, a fifth of a second before.

Amounts are whole numbers, money in pico-USD, instants and lengths in ns. Source: token buckets as in Turner, 1986;
shares of a counter as in O'Neil's escrow method, 1986.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

from tidemill.model.limits import Limit, Measure, Window
from tidemill.units import DAY_NS, MICRO_PICO, MINUTE_NS, SECOND_NS

MEASURES: Final = tuple(Measure)
"""The order in which amounts of a request stand."""
_FOREVER_NS: Final = 2**63
_KEPT_TICKS: Final = 3
"""A share keeps what was taken in so many ticks."""
_HOPED_PART: Final = 100
"""At most such a part of a limit is given to a share for what nobody waits for yet."""


class Kind(IntEnum):
    """What comes back of what was taken, and when."""

    RATE = 0
    QUOTA = 1
    GAUGE = 2


def kind_of(limit: Limit) -> Kind:
    """The kind of a limit."""
    if limit.window is None:
        return Kind.GAUGE
    return Kind.RATE if limit.window is Window.MINUTE else Kind.QUOTA


def exact_amount(limit: Limit) -> int:
    """The amount that is counted with: pico-USD for money."""
    return limit.amount * MICRO_PICO if limit.measure is Measure.MONEY else limit.amount


def window_of(window: Window | None, *, now: int) -> tuple[int, int]:
    """When the window that ``now`` lies in begins and ends; for a minute and for no window all of time.

    >>> begins, ends = window_of(Window.MONTH, now=1_709_164_800 * SECOND_NS)  # the 29th of February 2024
    >>> (ends - begins) // DAY_NS
    29
    """
    if window is Window.DAY:
        begins = now - now % DAY_NS
        return begins, begins + DAY_NS
    if window is Window.MONTH:
        day = datetime.fromtimestamp(now // SECOND_NS, UTC)
        begins = now - now % DAY_NS - (day.day - 1) * DAY_NS
        following = datetime(day.year + day.month // 12, day.month % 12 + 1, 1, tzinfo=UTC)
        return begins, int(following.timestamp()) * SECOND_NS
    return 0, _FOREVER_NS


def amounts_of(prompt_tokens: int, completion_tokens: int, price: tuple[int, int]) -> list[int]:
    """What a request takes of each of ``MEASURES``; a price is micro-USD for a million tokens, in and out.

    >>> amounts_of(100, 10, (150_000, 600_000))
    [1, 110, 100, 10, 21000000, 1]
    """
    money = price[0] * prompt_tokens + price[1] * completion_tokens
    return [1, prompt_tokens + completion_tokens, prompt_tokens, completion_tokens, money, 1]


# In a gateway


@dataclass(slots=True, eq=False)
class Share:
    """What one gateway has of one limit of ``subject``, a key or a project."""

    subject: str
    limit: Limit
    amount: int = 0
    kind: Kind = Kind.RATE
    measure: int = 0
    balance: int = 0
    """What may be taken now; below zero when requests took more than they had said."""
    pending: int = 0
    """Taken, and not given back or in the ledger; of a rate nothing, since it comes back by itself."""
    spent: int = 0
    """Taken in all and not given back; only its changes mean something."""
    recent: int = 0
    """Of a rate: about what was taken and has not come back by itself."""
    begins_ns: int = 0
    ends_ns: int = 0
    left: int | None = None
    """What nobody held when it was last told; None: never."""
    elsewhere: int = 0
    """What other gateways held then."""
    is_short: bool = False
    """Whether others waited for some of it then: nothing is kept that is not needed now."""
    told_ns: int = -_FOREVER_NS
    demand: int = 0
    """What is taken in a tick, lately."""
    taken: int = 0
    """Since the last tick."""
    alone_ns: int = 0
    """Since when, or until when, a gateway that cannot ask has given itself its part; zero: it can ask."""

    def __post_init__(self) -> None:
        self.kind = kind_of(self.limit)
        self.amount = exact_amount(self.limit)
        self.measure = MEASURES.index(self.limit.measure)

    def roll(self, *, now: int) -> None:
        """Begin the window that ``now`` lies in."""
        self.begins_ns, self.ends_ns = window_of(self.limit.window, now=now)
        if self.kind is Kind.QUOTA:
            self.balance = self.pending = 0
            self.left, self.told_ns, self.alone_ns = None, -_FOREVER_NS, 0

    def take(self, amount: int) -> None:
        """Take from the balance."""
        self.balance -= amount
        if self.kind is not Kind.RATE:
            self.pending += amount
        self.spent += amount
        self.taken += amount

    def give_back(self, amount: int, *, taken_ns: int) -> None:
        """What was taken too much then, or below zero what was taken besides."""
        if taken_ns < self.begins_ns:
            return
        self.balance += amount
        if self.kind is not Kind.RATE:
            self.pending -= amount
        self.spent -= amount

    def books(self, amount: int, at_ns: int) -> None:
        """So much that was taken is in the ledger now."""
        if self.kind is Kind.QUOTA and at_ns >= self.begins_ns:
            self.pending = max(0, self.pending - amount)

    def free(self, *, now: int) -> int:
        """About how much there is: here, elsewhere, and where nobody holds it."""
        if self.alone_ns:
            return self.balance
        left = self.left if self.left is not None else self.amount
        if self.kind is Kind.RATE and self.told_ns >= 0:
            left = min(self.amount, left + self.amount * max(0, now - self.told_ns) // MINUTE_NS)
        return min(self.amount, self.balance + left + self.elsewhere)

    def tick(self, *, waited_for: int, length_ns: int) -> int:
        """What it would like to hold more than it does, after it has let go of what it does not need.

        ``waited_for`` is what requests wait for, beside which the rest is for what may come.
        """
        self.recent = max(0, self.recent - self.amount * length_ns // MINUTE_NS) + self.taken
        self.demand = max(self.taken, (self.demand * 7 + self.taken) // 8)
        self.taken = 0
        kept = 0 if self.is_short else min(self.amount, self.demand * _KEPT_TICKS)
        self.balance = min(self.balance, max(kept, waited_for))
        return max(0, kept - self.balance)

    def be_alone(self, *, among: int, now: int) -> None:
        """Have the part of a gateway that cannot ask, one ``among`` so many."""
        if self.kind is Kind.RATE:
            if not self.alone_ns:
                self.alone_ns = max(self.told_ns, now - MINUTE_NS) if self.left is not None else now - MINUTE_NS
            grown = self.amount * (now - self.alone_ns) // (MINUTE_NS * among)
            if grown > 0:
                self.alone_ns += grown * MINUTE_NS * among // self.amount
                self.balance = min(max(self.balance, -(-self.amount // among)), self.balance + grown)
        elif not self.alone_ns:
            self.alone_ns = now
            self.balance += max(0, (self.amount if self.left is None else self.left)) // among

    def told(self, granted: int, left: int, elsewhere: int, *, is_short: bool, now: int) -> None:
        """The pot answered."""
        self.balance += granted
        self.left, self.elsewhere, self.is_short = left, elsewhere, is_short
        self.told_ns, self.alone_ns = now, 0


def lacking(shares: Sequence[Share], needs: Sequence[int], *, now: int) -> Share | None:
    """The first share with less than a request needs, None when all have enough."""
    for share in shares:
        if now >= share.ends_ns:
            share.roll(now=now)
        if share.balance < needs[share.measure]:
            return share
    return None


# In the control plane


@dataclass(slots=True, kw_only=True)
class Holding:
    """What a gateway said last that it has of a pot, and what it was given then."""

    held: int
    pending: int
    spent: int
    seen_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a gateway says of its share. ``needed`` is for requests that wait, ``least`` for one of them."""

    held: int
    pending: int = 0
    spent: int = 0
    recent: int = 0
    least: int = 0
    needed: int = 0
    hoped: int = 0


@dataclass(slots=True, eq=False)
class Pot:
    """All that there is of one limit; what the shares do not hold is given on request."""

    limit: Limit
    amount: int = 0
    kind: Kind = Kind.RATE
    begins_ns: int = 0
    ends_ns: int = 0
    booked: int = 0
    """Of a quota: what is in the ledger since the window began; of a rate: what was, in the last minute at first."""
    level: int = 0
    """Of a rate: what nobody holds, times a minute."""
    filled_ns: int = 0
    recent: int = 0
    """Of a rate: what gateways said at first that they had taken lately."""
    holdings: dict[str, Holding] = field(default_factory=dict)
    short_ns: int = -_FOREVER_NS
    """When a gateway last got less than its requests wait for."""

    @staticmethod
    def opened(limit: Limit, *, booked: int, now: int) -> Pot:
        """A pot of which so much is used, in this window or in the last minute."""
        pot = Pot(limit, amount=exact_amount(limit), kind=kind_of(limit), booked=booked, filled_ns=now)
        pot.begins_ns, pot.ends_ns = window_of(limit.window, now=now)
        pot.level = max(0, pot.amount - booked) * MINUTE_NS
        return pot

    def free(self, *, now: int) -> int:
        """What nobody holds."""
        if self.kind is Kind.RATE:
            self._fill(now)
            return self.level // MINUTE_NS
        return self.amount - self.booked - sum(one.pending + one.held for one in self.holdings.values())

    def hear(self, gateway: str, report: Report, *, now: int) -> None:
        """Note what a gateway has; what it had been given and does not hold any more is free again."""
        before = self.holdings.get(gateway)
        if self.kind is Kind.RATE:
            self._fill(now)
            if before is not None:
                self.level += (before.held - (report.spent - before.spent) - report.held) * MINUTE_NS
            else:
                known = max(self.booked, self.recent)
                self.recent += report.recent
                self.level -= (max(self.booked, self.recent) - known + report.held) * MINUTE_NS
            self.level = max(self.level, -self.amount * MINUTE_NS)
        self.holdings[gateway] = Holding(held=report.held, pending=report.pending, spent=report.spent, seen_ns=now)
        if self.kind is Kind.RATE:
            self._fill(now)

    def grant(self, gateway: str, report: Report, *, is_new: bool = False, now: int) -> int:
        """What it gets, of what nobody holds: what its requests wait for, or one of them, and a little for the next.

        While this control plane ``is_new``, and may not have heard of all gateways, nothing is given ahead.
        """
        free, holding = max(0, self.free(now=now)), self.holdings[gateway]
        fair = -(-free // max(1, len(self.holdings)))
        given = min(report.needed, max(fair, report.least)) if report.least <= free else 0
        if not is_new:
            given += max(0, min(report.hoped, fair - given, max(1, self.amount // _HOPED_PART)))
        given = min(given, free)
        if given < report.needed:
            self.short_ns = now
        holding.held += given
        if self.kind is Kind.RATE:
            self.level -= given * MINUTE_NS
        return given

    def is_short(self, *, now: int) -> bool:
        """Whether a gateway got less than it needs just now."""
        return now - self.short_ns < SECOND_NS

    def elsewhere(self, gateway: str) -> int:
        """What the other gateways hold and have not taken."""
        return sum(max(0, one.held) for name, one in self.holdings.items() if name != gateway)

    def forget(self, *, before_ns: int) -> None:
        """Leave out gateways that were not heard of since."""
        for gateway in [name for name, one in self.holdings.items() if one.seen_ns < before_ns]:
            del self.holdings[gateway]

    def _fill(self, now: int) -> None:
        if now > self.filled_ns:
            self.level += self.amount * (now - self.filled_ns)
            self.filled_ns = now
        held = sum(max(0, one.held) for one in self.holdings.values())
        self.level = min(self.level, (self.amount - held) * MINUTE_NS)
