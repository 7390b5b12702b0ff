"""Requests that wait for a replica: in order within a tenant, tenants in turn, and how long it will take.

Waiting happens here and not in an engine, because what was sent to a replica cannot be moved to another one. A request
that would wait longer than it may is refused at once, while that is still of use to whoever sent it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Protocol

from tidemill.gateway.table import Route

_WEIGHT: Final = 0.1
"""Of the newest observation in the mean."""
_LONGEST_RETRY_S: Final = 60


class Waiter(Protocol):
    """A request that waits."""

    def go(self) -> bool:
        """Whether it has left the line: it was sent to a replica, or there is nothing left to wait for."""


@dataclass(slots=True)
class Line:
    """The line of one model. ``count`` is how many wait; ``mean_s`` how long a replica is taken by one of them."""

    count: int = 0
    mean_s: float = 0.0
    _tenants: dict[str, deque[Waiter]] = field(default_factory=dict)
    """By whose turn it is."""
    _is_advancing: bool = False
    _is_called_again: bool = False

    def join(self, waiter: Waiter, tenant: str, *, is_first: bool = False) -> None:
        """Wait behind the others of the tenant, or before them when it had its turn already."""
        own = self._tenants.setdefault(tenant, deque())
        if is_first:
            own.appendleft(waiter)
        else:
            own.append(waiter)
        self.count += 1

    def leave(self, waiter: Waiter, tenant: str) -> None:
        """Wait no more."""
        own = self._tenants.get(tenant)
        if own is not None and waiter in own:
            own.remove(waiter)
            self.count -= 1
            if not own:
                del self._tenants[tenant]

    def of(self, tenant: str) -> int:
        """How many of that tenant wait."""
        return len(self._tenants.get(tenant, ()))

    def advance(self) -> None:
        """Let the first of each tenant go, tenants in turn, until none can."""
        self._is_called_again = True
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while self._is_called_again and self._tenants:
                self._is_called_again = False
                for tenant in list(self._tenants):
                    own = self._tenants.get(tenant)
                    if own and own[0].go():
                        self._is_called_again = True
                        if tenant in self._tenants:
                            self._tenants[tenant] = self._tenants.pop(tenant)  # last in turn
        finally:
            self._is_advancing = False

    def served_in(self, taken_s: float) -> None:
        """A replica was taken by a request for that long."""
        self.mean_s = taken_s if not self.mean_s else self.mean_s + _WEIGHT * (taken_s - self.mean_s)

    def expected_s(self, route: Route, tenant: str) -> float:
        """How long a request that joins now will wait; zero while nothing is known."""
        slots = route.concurrency * sum(not one.is_leaving and one.circuit.allows for one in route.replicas)
        if not slots or not self.mean_s:
            return 0.0
        turns = len(self._tenants) + (tenant not in self._tenants)
        ahead = min(self.count, (self.of(tenant) + 1) * turns - 1)
        return (ahead + 1) * self.mean_s / slots


def retry_after_s(expected_s: float) -> int:
    """Whole seconds after which coming again is of use."""
    return min(_LONGEST_RETRY_S, max(1, math.ceil(expected_s)))
