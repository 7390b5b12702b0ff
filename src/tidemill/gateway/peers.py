"""Gives up replicas for a while that are far off their peers: more of their answers fail, or they are much later.

What is judged is ``core.routing.outliers``, over the answers of late: counts are halved every ``HALVED_S``. A replica
that is given up gets no new requests; what is under way on it goes on. It comes back as any that was ejected: after a
pause, longer each time, and a trial that has to be answered without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from tidemill.core.routing import Record, outliers
from tidemill.gateway.circuit import State
from tidemill.gateway.table import Replica, Route

JUDGED_S: Final = 1.0
HALVED_S: Final = 10.0
FIRST_PAUSE_S: Final = 5.0
LONGEST_PAUSE_S: Final = 120.0
FORGOTTEN_S: Final = 300.0
"""After so long without another one, earlier times are forgotten."""


class Peers:
    """Compares the replicas of each route. ``eject`` gives one up: why, and for how long in s."""

    def __init__(self, eject: Callable[[Replica, str, float], None]) -> None:
        self._eject = eject
        self._judged_at = self._halved_at = 0.0

    def look(self, routes: Iterable[Route], now: float) -> None:
        """Judge all routes, when it is time."""
        if now - self._judged_at < JUDGED_S:
            return
        self._judged_at = now
        is_halving = now - self._halved_at >= HALVED_S
        if is_halving:
            self._halved_at = now
        for route in routes:
            if len(route.replicas) > 1:
                self._judge(route, now)
            if is_halving:
                for one in route.replicas:
                    one.answered, one.failed, one.waited_s = one.answered // 2, one.failed // 2, one.waited_s / 2

    def give_up(self, replica: Replica, why: str, now: float) -> None:
        """It is far off its peers, or still is."""
        if now - replica.outlier_at > FORGOTTEN_S:
            replica.outlier_times = 0
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(replica.outlier_times, 16))
        replica.outlier_at, replica.outlier_times = now, replica.outlier_times + 1
        replica.answered, replica.failed, replica.waited_s = 0, 0, 0.0
        self._eject(replica, why, pause_s)

    def _judge(self, route: Route, now: float) -> None:
        well = {one.job: one for one in route.replicas if one.circuit.state is State.CLOSED and not one.is_leaving}
        records = [
            Record(job=one.job, answered=one.answered, failed=one.failed, waited_us=int(one.waited_s * 1_000_000))
            for one in well.values()
        ]
        for job, why in outliers(records, out=len(route.replicas) - len(well)):
            self.give_up(well[job], why, now)
