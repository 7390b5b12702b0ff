"""The time of day as the control plane keeps it: it never jumps, so that nothing is paid for that did not pass.

A clock that somebody sets, or that is corrected after a pause of the machine, is followed slowly. Until then times are
those that they would have been. A start takes the time of day as it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from tidemill.units import SECOND_NS, format_duration

log = logging.getLogger(__name__)
FOLLOWS: Final = 200
"""The time of day is followed by at most one part in so many of the time that passes."""
_NOTED_NS: Final = SECOND_NS


class SteadyClock:
    """Called, it gives ns since 1970. ``elapsed`` is a clock in ns that never jumps and counts while a machine sleeps.

    Thread-safe; never goes back.
    """

    def __init__(
        self,
        day: Callable[[], int] = time.time_ns,
        elapsed: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    ) -> None:
        self._day = day
        self._elapsed = elapsed
        self._lock = threading.Lock()
        self._at = elapsed()
        self._now = day()
        self._is_off = False

    def __call__(self) -> int:
        """The time now."""
        with self._lock:
            at, day = self._elapsed(), self._day()
            passed = max(0, at - self._at)
            self._at = at
            self._now += passed
            most = passed // FOLLOWS
            self._now += max(-most, min(most, day - self._now))
            self._note(day - self._now)
            return self._now

    def _note(self, off_ns: int) -> None:
        is_off = abs(off_ns) > _NOTED_NS
        if is_off and not self._is_off:
            way = "ahead of" if off_ns > 0 else "behind"
            log.warning("the time of day is %s %s ours now; it is followed slowly", format_duration(abs(off_ns)), way)
        self._is_off = is_off
