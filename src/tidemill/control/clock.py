"""The control plane's clock: it says what the wall says, and never jumps.

Leases of devices, time limits, backoffs, reservations and bills all hang on it. If it followed a wall clock that jumps
an hour ahead, every limited job would time out at once; an hour back, nothing that is due would happen for an hour, and
what was held would have ended before it began. So it goes on by a clock that never jumps, and makes up for what it is
off by going a little faster or slower.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from tidemill.ports import Snapshot, Store
from tidemill.units import SECOND_NS

log = logging.getLogger(__name__)
_SLEW: Final = 50
"""One part in so many is made up for: an hour in about two days."""
_JUMP_NS: Final = 60 * SECOND_NS
"""What the wall clock is off when somebody should hear of it."""


def _uptime_ns() -> int:
    """Time since the machine booted, also while it slept."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SteadyClock:
    """Instants in ns since 1970, none before the last one. ``wall`` may jump, ``monotonic`` never does. Thread-safe."""

    def __init__(self, *, wall: Callable[[], int] = time.time_ns, monotonic: Callable[[], int] = _uptime_ns) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._read_ns = monotonic()
        self._now_ns = wall()
        self._is_off = False

    def __call__(self) -> int:
        """The instant now."""
        with self._lock:
            read_ns = self._monotonic()
            passed = read_ns - self._read_ns
            if passed <= 0:
                return self._now_ns
            self._read_ns = read_ns
            off = self._wall() - self._now_ns - passed
            most = passed // _SLEW
            self._now_ns += passed + max(-most, min(off, most))
            self._note(off)
            return self._now_ns

    def not_before(self, instant_ns: int) -> None:
        """Say nothing earlier than that from now on: somebody wrote it down already."""
        with self._lock:
            self._now_ns = max(self._now_ns, instant_ns)

    def _note(self, off: int) -> None:
        is_off = abs(off) > _JUMP_NS
        if is_off and not self._is_off:
            log.warning(
                "the wall clock is %s s %s; the control plane's goes there slowly, or at once when it is started again",
                abs(off) // SECOND_NS,
                "ahead" if off > 0 else "behind",
            )
        self._is_off = is_off


def newest_instant(store: Store, stored: Snapshot) -> int:
    """The latest instant that is written down: of the newest event, or until when something was metered."""
    events = store.events(after=max(stored.last_seq - 1, 0), limit=1)
    metered = (until for _, _, until in stored.metered_until)
    return max((*(event.entry.at_ns for event in events), *metered), default=0)
