"""Answers that go on: waking when something happens, sending as it comes, and stopping when the client hangs up.

The hub listens once, to the commits and to the logs, and wakes those whom it concerns through the event loop; so
nobody polls, and a thousand followers cost one reader of the event log. While nobody follows, it reads nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Final

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from tidemill.errors import TidemillError
from tidemill.model.ids import JobId

if TYPE_CHECKING:
    from tidemill.control.plane import ControlPlane

log = logging.getLogger(__name__)
PING_S: Final = 10.0
PING: Final = b": ping\n\n"
_GATHER_S: Final = 0.002
"""Commits that follow each other within this are looked at together."""
_PAGE: Final = 1_000


class Hub:
    """Wakes followers. Made outside the event loop, used in it; callbacks may come from any thread."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: list[object] = []
        self._jobs: dict[str, set[asyncio.Event]] = {}
        self._all: set[asyncio.Event] = set()
        self._seq = 0
        self._told = False
        self._reading: asyncio.Task[None] | None = None
        self.closed = False

    def __len__(self) -> int:
        """How many follow something."""
        return len(self._all) + sum(len(bells) for bells in self._jobs.values())

    @contextlib.contextmanager
    def job(self, job_id: JobId) -> Iterator[asyncio.Event]:
        """An event that is set whenever something happened to the job or came into its logs."""
        self._listen()
        if not self._jobs:
            self._seq = self._plane.last_seq
        bell = asyncio.Event()
        self._jobs.setdefault(job_id, set()).add(bell)
        try:
            yield bell
        finally:
            bells = self._jobs[job_id]
            bells.discard(bell)
            if not bells:
                del self._jobs[job_id]

    @contextlib.contextmanager
    def commits(self) -> Iterator[asyncio.Event]:
        """An event that is set after each commit."""
        self._listen()
        bell = asyncio.Event()
        self._all.add(bell)
        try:
            yield bell
        finally:
            self._all.discard(bell)

    def close(self) -> None:
        """End all that goes on, from any thread; harmless twice."""
        self.closed = True
        loop, self._loop = self._loop, None
        for stop in self._stop:
            if callable(stop):
                stop()
        self._stop = []
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._ring_all)

    def _listen(self) -> None:
        if self._loop is None and not self.closed:
            self._loop = asyncio.get_running_loop()
            self._stop = [self._plane.watch(self._committed), self._plane.logs.watch(self._logged)]

    def _committed(self, _seq: int) -> None:
        if (self._all or self._jobs) and not self._told and (loop := self._loop) is not None:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody follows any more
                loop.call_soon_threadsafe(self._look)

    def _logged(self, job_id: str) -> None:
        if job_id in self._jobs and (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ring, job_id)

    def _ring(self, job_id: str) -> None:
        for bell in self._jobs.get(job_id, ()):
            bell.set()

    def _ring_all(self) -> None:
        for bell in (*self._all, *(bell for bells in self._jobs.values() for bell in bells)):
            bell.set()

    def _look(self) -> None:
        self._told = False
        for bell in self._all:
            bell.set()
        if self._jobs and (self._reading is None or self._reading.done()):
            self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        """Ring for every job that the new events are about."""
        try:
            while self._jobs and self._seq < self._plane.last_seq and not self.closed:
                events = await run_in_threadpool(self._plane.store.events, after=self._seq, limit=_PAGE)
                if not events:
                    break
                self._seq = events[-1].seq
                for job_id in {event.entry.job_id for event in events}:
                    self._ring(job_id)
                await asyncio.sleep(_GATHER_S)
        except TidemillError as error:
            log.warning("events cannot be read: %s", error)
            self._ring_all()
        except Exception:
            log.exception("reading events failed")
            self._ring_all()


async def rung(bell: asyncio.Event, timeout_s: float) -> bool:
    """Whether the bell rang within that time; it is silent again."""
    try:
        async with asyncio.timeout(timeout_s):
            await bell.wait()
    except TimeoutError:
        return False
    bell.clear()
    return True


def sse(kind: str, data: object, *, identity: str = "") -> bytes:
    """A server-sent event."""
    named = f"id: {identity}\n" if identity else ""
    return b"event: %b\ndata: %b\n%b\n" % (kind.encode(), orjson.dumps(data), named.encode())


class Streamed(Response):
    """An answer in pieces, each sent when it is there; its source is closed when the client hangs up."""

    def __init__(self, pieces: AsyncIterator[bytes], *, media_type: str) -> None:
        self.pieces = pieces
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or until the client hangs up."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        pieces = self.pieces
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event_stream(pieces: AsyncIterator[bytes]) -> Streamed:
    """Server-sent events."""
    return Streamed(pieces, media_type="text/event-stream")


async def in_threads(pieces: Iterator[bytes], first: bytes = b"") -> AsyncIterator[bytes]:
    """The pieces of an iterator that may wait, taken in threads; it is closed at the end."""
    try:
        if first:
            yield first
        while (piece := await run_in_threadpool(next, pieces, None)) is not None:
            yield piece
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            await run_in_threadpool(close)
