"""What a control plane does that stands by: whoever connects to it is connected to the one that leads.

Bytes are handed on as they are, so streams, uploads and long polls work as they do at the leader. While nobody is
known to lead, a connection waits; it gets a 503 when that takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from tidemill.api.problems import problem
from tidemill.api.tls import HELLO, PATIENCE_S, REFUSAL, Certificate, is_own
from tidemill.errors import Unavailable

_PATIENCE_S: Final = 10.0
_CONNECT_S: Final = 2.0
_RETRY_S: Final = 0.1
_BLOCK: Final = 64 * 1024
_BACKLOG: Final = 2048


class Standby:
    """Serves ``listener`` from a thread of its own. ``leader`` gives the leader's URL, empty when none is known.

    ``close`` ends the accepting alone: what is connected stays connected, and ``listener`` can be served by another.
    With a ``certificate``, TLS is handed on as it is, so the leader shows its own; this machine itself may speak HTTP,
    which is encrypted on its way to the leader, and others may not.
    """

    def __init__(
        self, listener: socket.socket, leader: Callable[[], str], *, certificate: Certificate | None = None
    ) -> None:
        self._listener = listener
        self._leader = leader
        self._certificate = certificate
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
            await self._serve_as(own, reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # another leads; asyncio's streams would log it as a mistake
        finally:
            del self._open[own]
            writer.close()

    async def _serve_as(
        self, own: asyncio.Task[None] | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        first = await self._first(reader, writer) if self._certificate is not None else b""
        if first is None:
            return
        there = await self._connect(is_tls=first[:1] == HELLO)
        if there is not None:
            self._open[own] = there[2]
            await _hand_on(reader, writer, there[0], there[1], first)
        elif first[:1] != HELLO:
            await _refuse(reader, writer, first)

    async def _watch(self) -> None:
        """Break connections to one that does not lead any more: it may stand still, and never answer."""
        while True:
            await asyncio.sleep(_RETRY_S)
            leader = self._leader()
            for serving, url in list(self._open.items()):
                if leader and url and url != leader and serving is not None:
                    serving.cancel()

    @property
    def _context(self) -> ssl.SSLContext:
        return self._certificate.client_context if self._certificate is not None else ssl.create_default_context()

    async def _first(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        """What a connection begins with; None when it is not to be served."""
        with contextlib.suppress(OSError, TimeoutError):
            first = await asyncio.wait_for(reader.read(_BLOCK), PATIENCE_S)
            if first[:1] == HELLO or is_own(writer.get_extra_info("peername"), writer.get_extra_info("sockname")):
                return first or None
            writer.write(REFUSAL if first else b"")
            await writer.drain()
        return None

    async def _connect(self, *, is_tls: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str] | None:
        """A connection to whoever leads, and its URL; None when nobody did in time."""
        until = self._loop.time() + _PATIENCE_S
        while self._loop.time() < until:
            leader = self._leader()
            parts = urlsplit(leader)
            if parts.hostname:
                with contextlib.suppress(OSError, TimeoutError):
                    secure = self._context if parts.scheme == "https" and not is_tls else None
                    opening = asyncio.open_connection(parts.hostname, parts.port, ssl=secure)
                    return *await asyncio.wait_for(opening, _CONNECT_S), leader
            await asyncio.sleep(_RETRY_S)
        return None


async def _hand_on(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    there_reader: asyncio.StreamReader,
    there_writer: asyncio.StreamWriter,
    first: bytes,
) -> None:
    """Connect the two, after ``first``, until the far one has said all; broken at both ends when cancelled."""
    sending = asyncio.ensure_future(_pump(reader, there_writer, first))
    try:
        await _pump(there_reader, writer)
    except asyncio.CancelledError:
        there_writer.transport.abort()
        raise
    finally:
        sending.cancel()
        there_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b"") -> None:
    """Hand on what comes, after ``first``, until it ends, in whatever way, and say so to the other end."""
    with contextlib.suppress(OSError):
        if first:
            writer.write(first)
        while block := await reader.read(_BLOCK):
            writer.write(block)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        if not first:
            await asyncio.wait_for(reader.read(_BLOCK), _CONNECT_S)
        answer = problem(Unavailable("No control plane leads at the moment.", mend="Try again in a moment."))
        headers = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in answer.raw_headers)
        writer.write(f"HTTP/1.1 503 Service Unavailable\r\n{headers}connection: close\r\n\r\n".encode())
        writer.write(bytes(answer.body))
        await writer.drain()
