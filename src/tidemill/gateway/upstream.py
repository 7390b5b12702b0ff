"""Connections to replicas and to the control plane: HTTP/1.1 client side, pooled, one exchange at a time each."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final, Protocol, cast

from tidemill.gateway.messages import ChunkedBody, Malformed, ResponseHead, take_response, write_head

BUFFER_HIGH: Final = 256 * 1024
"""Bytes waiting to be sent on one connection above which its peer is no longer read."""
BUFFER_LOW: Final = 64 * 1024
_BEGINNING: Final = b"HTTP/1."
_IDLE_S: Final = 4.0
"""Shorter than the 5 s after which uvicorn, and so most engines, close an idle connection."""
_MOST_TAKEN: Final = 4 * 1024 * 1024
"""Bytes of a response whose client has gone that are looked at; more than what waits in a socket."""
_IDLE_PER_ADDRESS: Final = 256

_ESTABLISHED: Final = 1
"""The first byte of Linux's ``struct tcp_info``."""

Address = tuple[str, int]


class Receiver(Protocol):
    """Who gets a response. After ``response_ended`` or ``response_failed`` nothing more comes."""

    def response_started(self, head: ResponseHead) -> None: ...

    def response_data(self, data: bytes) -> None: ...

    def response_ended(self) -> None: ...

    def response_failed(self, reason: str, *, started: bool) -> None:
        """The connection broke; ``started`` tells whether any byte of the response had come."""


Whole = Callable[[ResponseHead, bytes], None]
"""Gets a response of which head and body came at once."""


class Sender(Protocol):
    """Who sends a request's body piece by piece."""

    def sending_changed(self) -> None:
        """Whether more is to be sent now has changed."""


class UpstreamConnection(asyncio.Protocol):
    """One connection. ``served`` counts the responses that it carried whole."""

    def __init__(self, pool: Pool, address: Address) -> None:
        self._pool = pool
        self._address = address
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._head: ResponseHead | None = None
        self._chunks: ChunkedBody | None = None
        self._remaining = 0
        self._buffer = b""
        self._has_bytes = False
        self._is_paused = False
        self._sender: Sender | None = None
        """Who sends a body that is not whole yet, or talks on after a switch of protocols."""
        self._has_body = True
        self._may_switch = False
        self._whole: Whole | None = None
        """Who gets a response that comes in one piece."""
        self._is_raw = False
        self.is_writable = True
        """Whether the peer takes what it is sent."""
        self.served = 0
        self.idle_since = 0.0

    def send(
        self,
        receiver: Receiver,
        *parts: bytes,
        sender: Sender | None = None,
        has_body: bool = True,
        may_switch: bool = False,
        whole: Whole | None = None,
    ) -> None:
        """Send a request whose response goes to ``receiver``.

        The rest of its body comes from ``sender``, None: there is none. ``has_body`` is false when the response has
        none whatever it says, ``may_switch`` true when it may be a switch to another protocol. ``whole`` is called in
        place of all of the receiver's methods when a response comes in one piece.
        """
        if self._transport is None or self._receiver is not None:
            raise RuntimeError("a request may be sent only on a usable connection")
        self._receiver = receiver
        self._head = None
        self._has_bytes = False
        self._sender, self._has_body, self._may_switch, self._whole = sender, has_body, may_switch, whole
        self._transport.writelines(parts)

    def write(self, data: bytes) -> None:
        """Send part of the request's body, or after a switch anything."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def finish_sending(self, data: bytes) -> None:
        """The request's body is whole with this."""
        if data:
            self.write(data)
        self._sender = None

    def close(self) -> None:
        """Send what waits, then close; the receiver hears nothing more."""
        self._receiver = self._sender = None
        if self._transport is not None:
            self._transport.close()

    def hand_over(self, receiver: Receiver) -> None:
        """What comes from now on goes to another one."""
        self._receiver = receiver

    def abandon(self) -> None:
        """Close at once; the receiver hears nothing more."""
        self._receiver = self._sender = None
        if self._transport is not None:
            self._transport.abort()

    def take_what_came(self) -> None:
        """Have the receiver hear what the peer has sent by now, also what the loop has not read yet."""
        transport = self._transport
        connected = transport.get_extra_info("socket") if transport is not None and not transport.is_closing() else None
        taken = 0
        while connected is not None and self._receiver is not None and taken < _MOST_TAKEN:
            try:
                data = os.read(connected.fileno(), BUFFER_HIGH)
            except OSError:  # there is no more
                return
            if not data:
                return
            taken += len(data)
            self.data_received(data)

    def pause(self) -> None:
        """Read no more for now, since the receiver's own peer is slow."""
        if self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self._is_paused:
            self._is_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    @property
    def is_usable(self) -> bool:
        """Whether a request may be sent now."""
        return self._transport is not None and not self._transport.is_closing() and self._receiver is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        tune(self._transport)

    def pause_writing(self) -> None:
        self.is_writable = False
        if self._sender is not None:
            self._sender.sending_changed()

    def resume_writing(self) -> None:
        self.is_writable = True
        if self._sender is not None:
            self._sender.sending_changed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.drop(self, self._address)
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        head = self._head
        if head is not None and (self._is_raw or (head.length is None and not head.chunked)) and exc is None:
            receiver.response_ended()
        else:
            receiver.response_failed(str(exc) if exc else "the connection was closed", started=self._has_bytes)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None:  # nobody asked: not a peer to reuse
            self.abandon()
            return
        self._has_bytes = True
        try:
            self._take(data)
        except Malformed as error:
            receiver, self._receiver = self._receiver, None
            self.abandon()
            if receiver is not None:
                receiver.response_failed(error.detail, started=True)

    def _take(self, data: bytes) -> None:
        if self._head is None:
            data = self._buffer + data if self._buffer else data
            if not data.startswith(_BEGINNING) and not _BEGINNING.startswith(data):
                raise Malformed(502, "The replica does not speak HTTP/1.")
            taken = take_response(data)
            while taken is not None:
                head, data = taken
                if head.status >= 200:
                    break
                if head.status == 101:
                    if not self._may_switch:
                        raise Malformed(502, "The replica changed protocols unasked.")
                    self._is_raw = True
                    break
                taken = take_response(data)
            if taken is None:
                self._buffer = data
                return
            self._buffer = b""
            self._head = head
            if self._whole is not None and data and head.length == len(data):
                self._finish_at_once(self._whole, head, data)
                return
            is_whole = not self._is_raw and (head.length == 0 or not self._has_body)
            self._chunks = ChunkedBody() if head.chunked else None
            self._remaining = head.length or 0
            self._tell_started(head)
            if is_whole:
                self._finish(data)
                return
            if not data:
                return
        self._take_body(data)

    def _take_body(self, data: bytes) -> None:
        head, receiver = self._head, self._receiver
        if head is None or receiver is None:  # abandoned from within a callback
            return
        if self._is_raw:
            receiver.response_data(data)
        elif self._chunks is not None:
            pieces = self._chunks.feed(data)
            if pieces:
                receiver.response_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            if self._chunks.rest is not None:
                self._finish(self._chunks.rest)
        elif head.length is None:
            receiver.response_data(data)
        else:
            surplus = b""
            if len(data) > self._remaining:
                data, surplus = data[: self._remaining], data[self._remaining :]
            self._remaining -= len(data)
            receiver.response_data(data)
            if not self._remaining:
                self._finish(surplus)

    def _finish_at_once(self, whole: Whole, head: ResponseHead, body: bytes) -> None:
        self._receiver = None
        self._free(b"", head)
        whole(head, body)

    def _tell_started(self, head: ResponseHead) -> None:
        if self._receiver is not None:
            self._receiver.response_started(head)

    def _finish(self, surplus: bytes) -> None:
        receiver, self._receiver = self._receiver, None
        head = self._head
        if receiver is None or head is None:
            return
        self._free(surplus, head)
        receiver.response_ended()

    def _free(self, surplus: bytes, head: ResponseHead) -> None:
        """The response is whole: the connection may carry another."""
        self.served += 1
        if self._is_paused:
            self.resume()
        if surplus or not head.keep_alive or self._sender is not None:
            self.abandon()
        else:
            self._pool.give(self, self._address)


class Pool:
    """Idle connections by address, newest first, and the way to new ones."""

    def __init__(self, *, connect_timeout_s: float = 5.0) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[Address, list[UpstreamConnection]] = {}

    def take(self, address: Address) -> UpstreamConnection | None:
        """An idle connection, now the caller's; None when there is none."""
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.is_usable:
                return connection
        return None

    async def connect(self, address: Address, *, within_s: float = 0.0) -> UpstreamConnection:
        """A new connection, the caller's. Raises: OSError, also when it takes too long; zero: longer than usual."""
        within_s = within_s or self._connect_timeout_s
        try:
            async with asyncio.timeout(within_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: UpstreamConnection(self, address), *address
                )
        except TimeoutError:
            raise TimeoutError(f"no connection within {within_s:g} s") from None
        return connection

    def give(self, connection: UpstreamConnection, address: Address) -> None:
        """Take back a connection on which nothing is under way."""
        idle = self._idle.get(address)
        if idle is None:
            idle = self._idle[address] = []
        if len(idle) >= _IDLE_PER_ADDRESS:
            connection.abandon()
            return
        connection.idle_since = monotonic()
        idle.append(connection)

    def drop(self, connection: UpstreamConnection, address: Address) -> None:
        """Forget a connection that was lost."""
        idle = self._idle.get(address)
        if idle and connection in idle:
            idle.remove(connection)

    def forget(self, address: Address) -> None:
        """Close the idle connections to that address."""
        for connection in self._idle.pop(address, []):
            connection.abandon()

    def sweep(self, now: float) -> None:
        """Close what has been idle too long, so that a replica's own time limit is not met halfway."""
        for address, idle in list(self._idle.items()):
            old = [connection for connection in idle if now - connection.idle_since > _IDLE_S]
            self._idle[address] = [connection for connection in idle if now - connection.idle_since <= _IDLE_S]
            for connection in old:
                connection.abandon()
            if not self._idle[address]:
                del self._idle[address]

    def close(self) -> None:
        """Close every idle connection."""
        for idle in self._idle.values():
            for connection in list(idle):
                connection.abandon()
        self._idle.clear()


async def fetch(
    pool: Pool,
    address: Address,
    target: str,
    *,
    headers: Mapping[str, str],
    timeout_s: float,
    limit: int,
    body: bytes | None = None,
) -> tuple[int, bytes]:
    """The status and body of one GET, or of one POST of ``body``, on a connection of its own.

    Raises: OSError when the peer cannot be reached, breaks off, takes too long or answers more than ``limit`` bytes.
    """
    async with asyncio.timeout(timeout_s):
        connection = await pool.connect(address)
        collector = _Collector(limit)
        request = [(b"Host", f"{address[0]}:{address[1]}".encode()), (b"Connection", b"close")]
        request += [(name.encode(), value.encode()) for name, value in headers.items()]
        method = "GET" if body is None else "POST"
        if body is not None:
            request.append((b"Content-Length", b"%d" % len(body)))
        try:
            head = write_head(f"{method} {target} HTTP/1.1".encode(), request)
            connection.send(collector, head, body or b"")
            return await collector.whole
        finally:
            connection.abandon()


class _Collector:
    """Keeps a response until it is whole."""

    def __init__(self, limit: int) -> None:
        self.whole: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._limit = limit
        self._status = 0
        self._body = bytearray()

    def response_started(self, head: ResponseHead) -> None:
        self._status = head.status

    def response_data(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > self._limit and not self.whole.done():
            self.whole.set_exception(ConnectionError("the answer is too large"))

    def response_ended(self) -> None:
        if not self.whole.done():
            self.whole.set_result((self._status, bytes(self._body)))

    def response_failed(self, reason: str, *, started: bool) -> None:
        if not self.whole.done():
            self.whole.set_exception(ConnectionError(f"{reason} ({'mid-answer' if started else 'before an answer'})"))


def tune(transport: asyncio.Transport) -> None:
    """Set what every connection of the data path has: no Nagle, probes for dead peers, bounded write buffer."""
    connected = transport.get_extra_info("socket")
    if connected is not None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    transport.set_write_buffer_limits(high=BUFFER_HIGH, low=BUFFER_LOW)


def is_gone(transport: asyncio.Transport) -> bool:
    """Whether the peer has closed its side, which is not noticed otherwise while nothing is read."""
    connected = transport.get_extra_info("socket")
    if connected is None:
        return True
    state: bytes = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state[0] != _ESTABLISHED
