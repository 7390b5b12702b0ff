"""Turns as they are taken, for whoever keeps them: ``tidemill record`` writes them to a file, ``replay`` reads it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Final

from fastapi import Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tidemill.api.follow import PING_S, Streamed
from tidemill.api.guard import Call, Caller, Routes
from tidemill.control.recording import Recording
from tidemill.model.tenant import Scope

routes = Routes("turns")
_MOST: Final = 10_000
"""Lines that a reader may be behind."""
_LOOK_S: Final = 0.5


class _Lines:
    """Lines on their way from the thread that takes turns to the event loop; closed when the reader falls behind."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(_MOST)
        self.is_behind = False

    def write(self, line: bytes) -> None:
        """Take a line, from any thread. Raises: RuntimeError once the reader is too far behind."""
        if self.is_behind:
            raise RuntimeError("the reader of a recording is too far behind")
        self._loop.call_soon_threadsafe(self._put, line)

    def _put(self, line: bytes) -> None:
        try:
            self.queue.put_nowait(line)
        except asyncio.QueueFull:
            self.is_behind = True


@routes.get("/v1/turns", allow=Scope.ADMIN, media=("application/x-ndjson",))
async def record_turns(
    call: Caller,
    for_s: Annotated[float, Query(ge=0, description="End after so many seconds; 0: when the client hangs up.")] = 0,
) -> Response:
    """Stream the turns that the scheduler takes, one line of JSON each, until the client hangs up.

    The first line says what this is, the second what there was at first; empty lines only keep the connection. One
    recording goes on at a time. The stream ends when its reader falls too far behind.
    """
    lines = _Lines(asyncio.get_running_loop())
    stop = await run_in_threadpool(lambda: call.plane.record(Recording(lines.write)))
    return Streamed(_recorded(call, lines, stop, for_s), media_type="application/x-ndjson")


async def _recorded(call: Call, lines: _Lines, stop: Callable[[], None], for_s: float) -> AsyncIterator[bytes]:
    hub, quiet_s, began = call.services.hub, 0.0, time.monotonic()
    try:
        while not hub.closed and (not for_s or time.monotonic() < began + for_s):
            if lines.is_behind and lines.queue.empty():
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    first = await lines.queue.get()
                rest = [lines.queue.get_nowait() for _ in range(lines.queue.qsize())]
                quiet_s = 0.0
                yield b"".join([first, *rest])
                continue
            quiet_s += _LOOK_S
            if quiet_s >= PING_S:
                quiet_s = 0.0
                yield b"\n"
    finally:
        await run_in_threadpool(stop)
