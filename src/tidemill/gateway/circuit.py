"""Whether a replica may get requests: a circuit that opens on failure and closes by a trial.

Closed: requests flow. What cannot be reached, breaks connections for good or hangs opens it: the replica is ejected.
An open circuit waits, twice as long after each failure in a row up to a bound; then, once a probe was answered, it is
half open: one request at a time is a trial, whose first answered byte closes the circuit and whose failure opens it
again. A probe alone never closes it: what answers its health check may still fail at its work.

Instants and lengths are seconds of the event loop's clock. Nothing here waits or looks at a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 15.0


class State(Enum):
    """Where a circuit is."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


@dataclass(slots=True)
class Circuit:
    """One replica's. ``why`` is what opened it last, ``since`` when it last changed."""

    state: State = State.CLOSED
    is_suspect: bool = False
    """Something broke and it is not known yet whether the replica did; others go first until a probe tells."""
    on_trial: bool = False
    failures: int = 0
    """How often it opened in a row."""
    until: float = 0.0
    """Not half open before."""
    since: float = 0.0
    why: str = ""

    @property
    def allows(self) -> bool:
        """Whether a request may be sent now."""
        return self.state is State.CLOSED or (self.state is State.HALF_OPEN and not self.on_trial)

    @property
    def is_in_doubt(self) -> bool:
        """Whether something broke at this replica and it was not found well since."""
        return self.is_suspect or self.state is not State.CLOSED

    def begin(self) -> None:
        """A request is being sent, which is a trial when the circuit is half open."""
        self.on_trial = self.on_trial or self.state is State.HALF_OPEN

    def cancel(self) -> None:
        """A request ended without saying anything about the replica, such as by its client's going away."""
        self.on_trial = False

    def answered(self, *, now: float) -> None:
        """The first byte of a response came."""
        if self.state is State.HALF_OPEN and self.on_trial:
            self._enter(State.CLOSED, now=now)
            self.failures = 0

    def fail(self, why: str, *, now: float, pause_s: float = 0.0) -> bool:
        """Open, for ``pause_s`` at least; whether it was not open before."""
        before = self.state
        if before is State.OPEN:
            return False
        self.failures += 1
        usual_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.failures - 1, 16))
        self.until = now + max(pause_s, usual_s)
        self.why = why
        self._enter(State.OPEN, now=now)
        return True

    def probed(self, *, now: float) -> bool:
        """A probe was answered well; whether requests may be sent that could not be before."""
        self.is_suspect = False
        if self.state is not State.OPEN or now < self.until:
            return False
        self._enter(State.HALF_OPEN, now=now)
        return True

    def _enter(self, state: State, *, now: float) -> None:
        self.state = state
        self.since = now
        self.on_trial = False
        self.is_suspect = False
