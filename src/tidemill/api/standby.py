"""What a control plane does that stands by: whoever connects to it is connected to the one that leads.

Bytes are handed on as they are, so streams, uploads and long polls work as they do at the leader. While nobody is
known to lead, a connection waits; it gets a 503 when that takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from tidemill.api.problems import problem
from tidemill.errors import Unavailable

_PATIENCE_S: Final = 10.0
_CONNECT_S: Final = 2.0
_RETRY_S: Final = 0.1
_BLOCK: Final = 64 * 1024
_BACKLOG: Final = 2048


class Standby:
    """Serves ``listener`` from a thread of its own. ``leader`` gives the leader's URL, empty when none is known.

    ``close`` ends the accepting alone: what is connected stays connected, and ``listener`` can be served by another.
    """

    def __init__(self, listener: socket.socket, leader: Callable[[], str]) -> None:
        self._listener = listener
        self._leader = leader
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None] | None, str] = {}
        """Who serves a connection, and to whom it leads. The loop itself would let go of one that waits for long."""
        self._watching: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="standby", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(timeout=10)

    def close(self) -> None:
        """Accept nobody any more; harmless twice."""
        if self._server is not None:
            server, self._server = self._server, None
            self._loop.call_soon_threadsafe(server.close)

    async def _listen(self) -> None:
        own = self._listener.dup()
        own.setblocking(False)
        self._server = await asyncio.start_server(self._serve, sock=own, backlog=_BACKLOG)
        self._watching = asyncio.ensure_future(self._watch())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        self._open[own] = ""
        try:
            there = await self._connect()
            if there is None:
                await _refuse(reader, writer)
            else:
                self._open[own] = there[2]
                await _hand_on(reader, writer, there[0], there[1])
        except asyncio.CancelledError:
            writer.transport.abort()  # another leads; asyncio's streams would log it as a mistake
        finally:
            del self._open[own]
            writer.close()

    async def _watch(self) -> None:
        """Break connections to one that does not lead any more: it may stand still, and never answer."""
        while True:
            await asyncio.sleep(_RETRY_S)
            leader = self._leader()
            for serving, url in list(self._open.items()):
                if leader and url and url != leader and serving is not None:
                    serving.cancel()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str] | None:
        """A connection to whoever leads, and its URL; None when nobody did in time."""
        until = self._loop.time() + _PATIENCE_S
        while self._loop.time() < until:
            leader = self._leader()
            parts = urlsplit(leader)
            if parts.hostname:
                with contextlib.suppress(OSError, TimeoutError):
                    opening = asyncio.open_connection(parts.hostname, parts.port)
                    return *await asyncio.wait_for(opening, _CONNECT_S), leader
            await asyncio.sleep(_RETRY_S)
        return None


async def _hand_on(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    there_reader: asyncio.StreamReader,
    there_writer: asyncio.StreamWriter,
) -> None:
    """Connect the two until the far one has said all; broken at both ends when cancelled."""
    sending = asyncio.ensure_future(_pump(reader, there_writer))
    try:
        await _pump(there_reader, writer)
    except asyncio.CancelledError:
        there_writer.transport.abort()
        raise
    finally:
        sending.cancel()
        there_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on what comes until it ends, in whatever way, and say so to the other end."""
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK):
            writer.write(block)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(reader.read(_BLOCK), _CONNECT_S)
        answer = problem(Unavailable("No control plane leads at the moment.", mend="Try again in a moment."))
        headers = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in answer.raw_headers)
        writer.write(f"HTTP/1.1 503 Service Unavailable\r\n{headers}connection: close\r\n\r\n".encode())
        writer.write(bytes(answer.body))
        await writer.drain()
