"""Standing by until this control plane leads, and making sure of it as long as it does.

A leader that the database does not confirm for ``SURE_FOR_S`` says nothing any more that machines act upon: neither
answers that prolong leases nor calls of engines. Whoever leads next counts leases from its own beginning, with a
margin that is longer (``control.leases``), so nothing is started twice. What an old leader writes is refused anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from tidemill.errors import Deposed, Unavailable
from tidemill.model.ids import ReplicaId
from tidemill.model.replica import Replica

log = logging.getLogger(__name__)
TRY_S: Final = 0.25
BEAT_S: Final = 1.0
SURE_FOR_S: Final = 4.0
STALLED_S: Final = 8.0
"""After so long without a beat of the leader, while the database answers, its session is ended."""


class Standing(Protocol):
    """What ``store.standing.Standing`` does."""

    own_id: ReplicaId

    def try_to_lead(self) -> bool:
        """Whether the lock is ours, from now on or still. Raises: Unavailable."""
        ...

    def epoch(self) -> int:
        """The newest epoch. Raises: Unavailable."""
        ...

    def beat(self) -> tuple[Replica, ...]:
        """All replicas, this one among them, which says so by this. Raises: Unavailable."""
        ...

    def end_holder(self) -> None:
        """End the session that has the lock. Raises: Unavailable."""
        ...

    def leave(self) -> None:
        """The others need not look for this one any more. Raises: Unavailable."""
        ...

    def sweep(self) -> None:
        """Forget replicas that were not there for a day. Raises: Unavailable."""
        ...

    def close(self) -> None:
        """Let go of the lock; harmless twice."""
        ...


class Candidate:
    """A control plane that leads or stands by. ``now`` is a clock in s that never jumps.

    ``on_deposed`` is called once, from any thread, when another one leads instead.
    """

    def __init__(
        self, standing: Standing, *, on_deposed: Callable[[], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.replicas: tuple[Replica, ...] = ()
        """Those that were there lately, as this one last heard."""
        self._standing = standing
        self._on_deposed = on_deposed
        self._now = now
        self._watched: tuple[ReplicaId, int] = (ReplicaId(""), 0)
        self._watched_s = now()
        self._beat_s = -BEAT_S
        self._sure_s = -SURE_FOR_S
        self._epoch = 0
        self._problem = ""
        self._is_deposed = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lead", daemon=True)

    @property
    def own_id(self) -> ReplicaId:
        """The name of this one."""
        return self._standing.own_id

    @property
    def leader_url(self) -> str:
        """Where the leader is reached; empty when none is known."""
        return next((one.api_url for one in self.replicas if one.leads), "")

    def stand(self, stop: threading.Event, *, look: Callable[[], None] = lambda: None) -> bool:
        """Whether this one leads now; False: it was told to stop. ``look`` is called after each try."""
        while not stop.is_set():
            try:
                if self._try():
                    self._thread.start()
                    return True
                self._note("")
            except Unavailable as error:
                self._watched_s = self._now()  # who cannot ask cannot know that nobody beats
                self._note(f"the database says nothing about who leads: {error}")
            look()
            stop.wait(TRY_S)
        return False

    def lead(self, epoch: int) -> None:
        """The lead is taken under that epoch: from now on another one deposes this one."""
        self._epoch = epoch

    def depose(self) -> None:
        """Somebody found out that another one leads. Harmless to repeat."""
        with self._lock:
            if not self._is_deposed:
                self._is_deposed = True
                self._on_deposed()

    def is_sure(self) -> bool:
        """Whether the database confirmed lately that this one leads."""
        return self._now() - self._sure_s < SURE_FOR_S

    def close(self) -> None:
        """Stand for nothing any more, so that another one leads at once."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            self._standing.leave()
        except Unavailable as error:
            log.debug("the others were not told: %s", error)
        self._standing.close()

    def _try(self) -> bool:
        """Whether the lock was free, or is after its holder was found to be stalled."""
        asked = self._now()
        if self._standing.try_to_lead():
            self._sure_s = asked
            return True
        if asked - self._beat_s >= BEAT_S:
            self._beat_s = asked
            self.replicas = self._standing.beat()
            self._watch(asked)
        return False

    def _watch(self, now: float) -> None:
        leader = next(((one.id, one.beats) for one in self.replicas if one.leads), self._watched)
        if leader != self._watched:
            self._watched, self._watched_s = leader, now
        elif now - self._watched_s > STALLED_S:
            log.warning("the leader %s did not say anything for %s s; its session is ended", leader[0], STALLED_S)
            self._standing.end_holder()
            self._watched_s = now

    def _keep(self) -> None:
        while not self._closing.is_set():
            try:
                self._confirm()
                self._note("")
            except Deposed as error:
                log.warning("%s", error)
                self.depose()
                return
            except Unavailable as error:
                self._note(f"the database does not confirm that this control plane leads: {error}")
            except Exception:
                log.exception("whether this control plane leads cannot be confirmed")
            self._closing.wait(BEAT_S)

    def _confirm(self) -> None:
        """Raises: Deposed when another one led since, Unavailable when nobody knows."""
        asked = self._now()
        holds = self._standing.try_to_lead()
        if self._epoch and self._standing.epoch() != self._epoch:
            raise Deposed("Another control plane leads.", epoch=self._epoch)
        if not holds:
            raise Unavailable("an older session has the lock")
        self._sure_s = asked
        self.replicas = self._standing.beat()

    def _note(self, problem: str) -> None:
        """Say once what is wrong."""
        if problem and not self._problem:
            log.warning("%s", problem)
        self._problem = problem
