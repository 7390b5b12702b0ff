"""Requests that wait for a replica: by band, tenants in turn within it, in order within a tenant; and for how long.

Waiting happens here and not in an engine, because what was sent to a replica cannot be moved to another one. A request
that would wait longer than it may is refused at once, while that is still of use to whoever sent it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

from tidemill.gateway.table import NORMAL_BAND, Route

_WEIGHT: Final = 0.1
"""Of the newest observation in the mean."""
_LONGEST_RETRY_S: Final = 60
_STEPS: Final = (1, 8, 64)
"""How far a turn puts the next one of its band off: a band gets one for eight of the band before it."""
_PASSED: Final = 16
"""How many of a tenant that wait for other replicas others of it may pass."""


class Waiter(Protocol):
    """A request that waits."""

    @property
    def is_picky(self) -> bool:
        """Whether some replicas are not for it, that others could have meanwhile."""

    def go(self) -> bool:
        """Whether it has left the line: it was sent to a replica, or there is nothing left to wait for."""


@dataclass(slots=True)
class _Band:
    """Those of one priority, by tenant; the first tenant's turn is next."""

    tenants: dict[str, deque[Waiter]] = field(default_factory=dict)
    turn: int = 0
    """Bands go in the order of their turns, each of which puts the next one further off."""


@dataclass(slots=True)
class Line:
    """The line of one model. ``count`` is how many wait; ``mean_s`` how long a replica is taken by one of them.

    A band that waits gets one turn for every ``_STEPS`` of the bands before it: so what is urgent goes first nearly
    always, and what is not still goes. Source: stride scheduling, Waldspurger and Weihl, 1995; ties go to the first.
    """

    count: int = 0
    picky: int = 0
    """Of these, how many cannot go to every replica."""
    mean_s: float = 0.0
    _bands: tuple[_Band, ...] = field(default_factory=lambda: tuple(_Band() for _ in _STEPS))
    _is_advancing: bool = False
    _is_called_again: bool = False

    def join(self, waiter: Waiter, tenant: str, *, band: int = NORMAL_BAND, is_first: bool = False) -> None:
        """Wait behind the others of the tenant, or before them when it had its turn already."""
        mine = self._bands[band]
        if not mine.tenants:  # what it did not use while nobody of it waited is gone
            now = min((one.turn for one in self._bands if one.tenants), default=0)
            mine.turn = max(mine.turn, now + _STEPS[band])
        own = mine.tenants.setdefault(tenant, deque())
        if is_first:
            own.appendleft(waiter)
        else:
            own.append(waiter)
        self.count += 1
        self.picky += waiter.is_picky

    def leave(self, waiter: Waiter, tenant: str, *, band: int = NORMAL_BAND) -> None:
        """Wait no more."""
        tenants = self._bands[band].tenants
        own = tenants.get(tenant)
        if own is not None and waiter in own:
            own.remove(waiter)
            self.count -= 1
            self.picky -= waiter.is_picky
            if not own:
                del tenants[tenant]
            if not self.count:
                for one in self._bands:
                    one.turn = 0

    def of(self, tenant: str) -> int:
        """How many of that tenant wait."""
        return sum(len(one.tenants.get(tenant, ())) for one in self._bands)

    def advance(self) -> None:
        """Let the first of each tenant go, bands and tenants in turn, until none can."""
        self._is_called_again = True
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while self._is_called_again and self.count:
                self._is_called_again = False
                while self._let_one_go():
                    self._is_called_again = True
        finally:
            self._is_advancing = False

    def _let_one_go(self) -> bool:
        """Whether one could, of the band and the tenant whose turn it is or the next that can."""
        for band, step in sorted(zip(self._bands, _STEPS, strict=True), key=_turn_of):
            for tenant in list(band.tenants):
                own = band.tenants.get(tenant)
                if own and _goes(own):
                    if self.count:
                        band.turn += step
                    if tenant in band.tenants:
                        band.tenants[tenant] = band.tenants.pop(tenant)  # last in turn
                    return True
        return False

    def served_in(self, taken_s: float) -> None:
        """A replica was taken by a request for that long."""
        self.mean_s = taken_s if not self.mean_s else self.mean_s + _WEIGHT * (taken_s - self.mean_s)

    def expected_s(self, route: Route, tenant: str, *, band: int = NORMAL_BAND) -> float:
        """How long a request that joins now will wait; zero while nothing is known."""
        slots = route.concurrency * sum(not one.is_leaving and one.circuit.allows for one in route.replicas)
        if not slots or not self.mean_s:
            return 0.0
        mine = self._bands[band].tenants
        within = sum(len(own) for own in mine.values())
        turns = len(mine) + (tenant not in mine)
        ahead = min(within, (len(mine.get(tenant, ())) + 1) * turns - 1)
        before = sum(len(own) for one in self._bands[:band] for own in one.tenants.values())
        return (ahead + before + 1) * self.mean_s / slots


def _goes(own: deque[Waiter]) -> bool:
    """Whether one of a tenant's goes: its first, or behind one that waits for other replicas another one."""
    if not own[0].is_picky:
        return own[0].go()
    for waiter in list(islice(own, _PASSED)):
        if waiter.go():
            return True
        if not waiter.is_picky:
            break
    return False


def _turn_of(one: tuple[_Band, int]) -> int:
    return one[0].turn


def retry_after_s(expected_s: float) -> int:
    """Whole seconds after which coming again is of use."""
    return min(_LONGEST_RETRY_S, max(1, math.ceil(expected_s)))
