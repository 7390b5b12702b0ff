"""The loop that takes turns: one thread, one world, group commit.

Everything that happens is put in its inbox. While one batch is being made durable, the next gathers, so the cost
of durability is paid per batch. An item's future completes when what it led to is stored; when the store
cannot take it, the world is rolled back and the future says so: the item never happened, and whoever sent it
may send it again. An item that breaks a turn is found by taking the items one at a time, and only it fails.
When the store knows more than the world does (``Stale``), or may do so because its answer did not come, no turn is
taken before the world is loaded again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from tidemill.control.driver import Driver
from tidemill.core.world import World
from tidemill.errors import Fenced, Stale, StorageFull, TidemillError, Unavailable
from tidemill.model.events import Fact
from tidemill.model.fleet import Site
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Command, Plan
from tidemill.model.policy import Policy
from tidemill.model.tenant import Project
from tidemill.ports import Batch, IdempotencyRecord, Snapshot, Store

log = logging.getLogger(__name__)
_LATELY_S: Final = 15.0
"""For how long what the database did not take speaks against it: longer than it waits for a lock."""
Answer = TypeVar("Answer")
_BATCH = 4_096


@dataclass(slots=True)
class _Item:
    """Facts that belong together, and who waits for them."""

    facts: Sequence[Fact]
    idempotency: Sequence[IdempotencyRecord] = ()
    future: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class _Question:
    """A what-if to be answered between turns; without ``facts``, a look at the world as it is."""

    facts: Sequence[Fact] | None
    look: Callable[..., Any]
    future: Future[Any] = field(default_factory=Future)


class Recorder(Protocol):
    """Is told of the world at first and of every turn; ``control.recording.Recording`` is one."""

    def begin(
        self,
        snapshot: Snapshot,
        *,
        sites: Iterable[Site],
        projects: Iterable[Project],
        rates: RateCard,
        policy: Policy,
        now: int,
    ) -> None:
        """A world was made of these, for the first time or anew."""
        ...

    def turn(self, inbox: Sequence[Fact], now: int, plan: Plan) -> None:
        """A turn was taken and stored."""
        ...


class TurnLoop:
    """Owns the driver. ``reload`` makes a world of what is stored, and tells the recorder that it is given of what.

    ``obey`` is given the commands of every stored plan, in order, and must not wait."""

    def __init__(
        self,
        driver: Driver,
        store: Store,
        *,
        epoch: int,
        last_seq: int,
        clock: Callable[[], int],
        obey: Callable[[Sequence[Command]], None],
        reload: Callable[[Recorder | None], World],
        on_fenced: Callable[[], None],
    ) -> None:
        self.driver = driver
        self.last_seq = last_seq
        self._store = store
        self._epoch = epoch
        self._clock = clock
        self._obey = obey
        self._reload = reload
        self._on_fenced = on_fenced
        self._inbox: deque[_Item | _Question] = deque()
        self._wake = threading.Condition()
        self._wake_ns = 0
        self._watchers: tuple[Callable[[int], None], ...] = ()
        self._closing = False
        self._is_stale = False
        self._not_stored: tuple[TidemillError, float] | None = None
        """Why the newest commit was not taken, and when that was, in s of a clock that never jumps."""
        self._recorder: Recorder | None = None
        self._asked_recorder: Recorder | None = None
        self._thread = threading.Thread(target=self._run, name="turns", daemon=True)

    @property
    def world(self) -> World:
        """The world, for reading only: it changes under the reader, one value at a time."""
        return self.driver.world

    def start(self) -> None:
        """Begin to take turns."""
        self._thread.start()

    def close(self) -> None:
        """Take what is in the inbox, then stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def check_stores(self) -> None:
        """Raises: Unavailable, StorageFull when the database took nothing lately."""
        found = self._not_stored
        if found is not None and time.monotonic() - found[1] < _LATELY_S:
            raise found[0]

    def put(self, facts: Sequence[Fact], idempotency: Sequence[IdempotencyRecord] = ()) -> Future[None]:
        """A future that completes when what follows from ``facts`` is durable."""
        item = _Item(facts, idempotency)
        self._enqueue(item, item.future)
        return item.future

    def ask(self, facts: Sequence[Fact], look: Callable[[Plan, World], Answer]) -> Future[Answer]:
        """A future of what ``look`` makes of the turn that would follow from ``facts``; nothing changes."""
        question = _Question(facts, look)
        self._enqueue(question, question.future)
        return question.future

    def look(self, look: Callable[[World], Answer]) -> Answer:
        """What ``look`` makes of the world, between turns."""
        question = _Question(None, look)
        self._enqueue(question, question.future)
        answer: Answer = question.future.result(timeout=30)
        return answer

    def watch(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Have ``callback`` called with the newest event's number after each commit; returns how to stop it."""
        self._watchers = (*self._watchers, callback)

        def unwatch() -> None:
            self._watchers = tuple(other for other in self._watchers if other is not callback)

        return unwatch

    def record(self, recorder: Recorder | None) -> Future[None]:
        """Have a recorder told of every turn from a world loaded anew on, or with None nobody any more.

        The future completes when it was told of the first. A recorder that raises is told nothing more.
        """
        with self._wake:
            self._asked_recorder = recorder
            if recorder is None:
                self._recorder = None
        return self.put(())

    def _enqueue(self, item: _Item | _Question, future: Future[Any]) -> None:
        with self._wake:
            if self._closing:
                future.set_exception(Unavailable("The control plane is shutting down.", mend="Try again in a moment."))
                return
            self._inbox.append(item)
            self._wake.notify()

    @property
    def wake_ns(self) -> int:
        """When a turn is due though nothing is in the inbox; zero when none is."""
        return self._wake_ns

    def take_turn(self) -> None:
        """Take one turn with what is in the inbox now, and answer what is asked there. Not after ``start``."""
        with self._wake:
            taken = [self._inbox.popleft() for _ in range(min(len(self._inbox), _BATCH))]
        wanted = [each for each in taken if each.future.set_running_or_notify_cancel()]
        items = [item for item in wanted if isinstance(item, _Item)]
        if items or not wanted:
            self._take(items)
        for question in wanted:
            if isinstance(question, _Question):
                self._answer(question)

    def _run(self) -> None:
        while self._wait():
            self.take_turn()

    def _wait(self) -> bool:
        """Whether to go on, once there is something to do."""
        with self._wake:
            while not self._inbox and not self._closing:
                left = (self._wake_ns - self._clock()) / 1e9 if self._wake_ns else None
                if left is not None and left <= 0:
                    break
                self._wake.wait(left)
            return bool(self._inbox) or not self._closing

    def _answer(self, question: _Question) -> None:
        try:
            if question.facts is None:
                question.future.set_result(question.look(self.driver.world))
            else:
                question.future.set_result(self.driver.what_if(question.facts, question.look, now=self._clock()))
        except Exception as error:  # noqa: BLE001 - whoever asked is told, the loop goes on
            question.future.set_exception(error)

    def _take(self, items: Sequence[_Item], *, again: bool = False) -> None:
        try:
            self._load_if_stale()
        except Exception as error:
            log.exception("the world could not be loaded again")
            self._wake_ns = self._clock() + 1_000_000_000
            _fail(items, error)
            return
        facts, now = [fact for item in items for fact in item.facts], self._clock()
        try:
            plan = self.driver.step(facts, now=now)
        except Exception as error:
            if len(items) > 1:
                for item in items:
                    self._take([item])
                return
            log.exception("a turn failed and was undone: %s", [type(f).__name__ for i in items for f in i.facts])
            self._wake_ns = self._clock() + 1_000_000_000
            _fail(items, error)
            return
        try:
            self._store_plan(plan, [record for item in items for record in item.idempotency])
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is stored and the loop goes on
            self.driver.refused()
            self._wake_ns = self._clock() + 500_000_000
            self._refused(items, error, again=again)
            return
        self.driver.accepted()
        self._write_down(facts, now, plan)
        self._wake_ns = plan.wake_ns
        self._obey(plan.commands)
        for item in items:
            item.future.set_result(None)
        for watcher in self._watchers:
            try:
                watcher(self.last_seq)
            except Exception:
                log.exception("a watcher of commits failed")

    def _load_if_stale(self) -> None:
        asked = self._asked_recorder
        if self._is_stale or asked is not None:
            recorder = asked or self._recorder
            self.driver.world = self._reload(recorder)
            self._is_stale = False
            with self._wake:
                if self._asked_recorder is asked:  # else it was called off, or replaced, meanwhile
                    self._recorder, self._asked_recorder = recorder, None

    def _write_down(self, facts: Sequence[Fact], now: int, plan: Plan) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        try:
            recorder.turn(facts, now, plan)
        except Exception:
            log.exception("a recorder failed and is told nothing more")
            self._recorder = None

    def _store_plan(self, plan: Plan, idempotency: Sequence[IdempotencyRecord]) -> None:
        """Commit what there is. Commands alone are a commit too: only who leads may give them."""
        if plan.changes or plan.log or plan.ledger or plan.waiting or plan.commands or idempotency:
            self.last_seq = self._store.commit(
                Batch(
                    epoch=self._epoch,
                    changes=plan.changes,
                    log=plan.log,
                    ledger=tuple(plan.ledger),
                    waiting=plan.waiting,
                    idempotency=idempotency,
                )
            )
            self._not_stored = None

    def _refused(self, items: Sequence[_Item], error: Exception, *, again: bool) -> None:
        if isinstance(error, Stale) and not again:
            log.warning("the world was not as stored and is loaded again: %s", error)
            self._is_stale = True
            for item in items:
                self._take([item], again=True)
            return
        if isinstance(error, TidemillError):
            log.error("a turn could not be stored and was undone: %s", error)
        else:
            log.error("a turn could not be stored and was undone", exc_info=error)
        if isinstance(error, (Unavailable, StorageFull)):
            self._not_stored = error, time.monotonic()
        self._is_stale = not isinstance(error, StorageFull)
        _fail(items, error)
        if isinstance(error, Fenced):
            self._on_fenced()


def _fail(items: Sequence[_Item], error: Exception) -> None:
    for item in items:
        item.future.set_exception(error)
