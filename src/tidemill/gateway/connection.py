"""One client's connection: it reads one request at a time, has it judged, and sends the answer.

What follows a request on the same connection (pipelining) stays unread bytes until the answer is out, so a client's
going away is seen in every phase.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, cast

from tidemill.gateway import answers, services
from tidemill.gateway.answers import Answer
from tidemill.gateway.exchange import Exchange
from tidemill.gateway.journey import Asking, Journey
from tidemill.gateway.messages import ChunkedBody, Malformed, Repeated, RequestHead, cut_head, read_request, write_head
from tidemill.gateway.passage import Passage
from tidemill.gateway.table import Key
from tidemill.gateway.upstream import is_gone, tune

if TYPE_CHECKING:
    from tidemill.gateway.server import Gateway
    from tidemill.gateway.table import Table

_READ_AHEAD: Final = 64 * 1024
_DRAINED_BODY: Final = 64 * 1024
_REQUESTS_PER_STEP: Final = 64
_REMEMBERED_HEAD: Final = 8 * 1024
"""Bytes of the longest head that is read once when it comes again."""
_DECIDED: Final = (Asking, Answer)
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_log = logging.getLogger("tidemill.gateway")


class _Phase(Enum):
    IDLE = "between requests"
    HEAD = "reading a head"
    BODY = "reading a body"
    RELAY = "passing a body on"
    ANSWER = "answering"
    LINGER = "closing"


_IDLE: Final = _Phase.IDLE
_HEAD: Final = _Phase.HEAD
_BODY: Final = _Phase.BODY
_RELAY: Final = _Phase.RELAY
_ANSWER: Final = _Phase.ANSWER
_LINGER: Final = _Phase.LINGER


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._now = asyncio.get_running_loop().time
        self._transport: asyncio.Transport | None = None
        self._phase = _IDLE
        self._since = 0.0
        """When the phase began."""
        self._head_at = 0.0
        """When the head was whole."""
        self._buffer = b""
        self._head: RequestHead | None = None
        self._last: Repeated | None = None
        """The last head that was read, for when it comes again."""
        self._opened: tuple[Table, Key] | None = None
        """What that head opened, where it asked a model, and in which table: until then it opens the same."""
        self._key: Key | None = None
        self._refusal: Answer | None = None
        self._pieces: list[bytes] = []
        self._received = 0
        self._chunks: ChunkedBody | None = None
        self._held = 0
        self._exchange: Journey | None = None
        self._checking: asyncio.Task[None] | None = None
        """Guardrails that look at the request."""
        self._must_close = False
        self._is_reading = True
        self._is_writable = True
        self._stalled: tuple[float, int] = (0.0, 0)
        self._is_loopback = False
        self._peer = ""
        self._passage: Passage | None = None
        """The exchange, when it is one that takes the body as it comes."""
        self._read_since, self._read_s = 0.0, 0.0
        """Since when such a body is read, and for how long it was before."""
        self._ate_empty_line = False
        self._has_more = False
        self._is_advancing = False

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        tune(self._transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        self._is_loopback = self._peer.startswith("127.") or self._peer == "::1"
        self.gateway.connections.add(self)
        self._enter(_IDLE)
        if len(self.gateway.connections) > self.gateway.limits.connections:
            self._must_close = True
            self._reply(answers.overloaded("too_many_connections", "Too many connections are open.", retry_after_s=1))

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase is _LINGER:
            return
        if phase is _RELAY:
            self._take_passed(data)
            return
        if phase is _BODY:
            self._take_body(data)
        elif self._buffer:
            self._buffer += data
        else:
            self._buffer = data
            if phase is _IDLE and self._opened is not None and self._is_writable and self._takes_same():
                if self._buffer:
                    self._advance()
                return
        self._advance()

    def eof_received(self) -> None:
        self._abandon()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.gateway.connections.discard(self)
        self._abandon()
        self._transport = None

    def pause_writing(self) -> None:
        self._is_writable = False
        self._stalled = (self._now(), self._waiting_to_be_sent())
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._is_writable = True
        if self._exchange is not None:
            self._exchange.resume()
        else:
            self._advance()

    # What the gateway calls

    def check(self, now: float) -> None:
        """End what has taken longer than the limits."""
        limits, age = self.gateway.limits, now - self._since
        if self._stalls(now):
            self.abort()
        elif self._phase is _IDLE and age > limits.idle_s:
            self._close()
        elif self._phase is _HEAD and age > limits.head_s:
            self._fail(408, "The header took too long.")
        elif self._phase is _BODY and age > limits.body_s + self._received / limits.body_rate:
            self._fail(408, "The body took too long.")
        elif self._phase is _LINGER and age > limits.linger_s:
            self.abort()
        elif self._phase is _RELAY and self._is_late(now):
            self._cut_off(408, "The body took too long.")
        elif self._exchange is not None:
            if not self._is_reading and self._transport is not None and is_gone(self._transport):
                self.abort()
            else:
                self._exchange.check(now)

    def close_when_idle(self) -> None:
        """Take no further request."""
        self._must_close = True
        if self._phase is _IDLE:
            self._close()

    def abort(self) -> None:
        """Drop the client, and what runs for it."""
        self._abandon()
        if self._transport is not None:
            self._transport.abort()

    # What the exchange calls

    @property
    def is_writable(self) -> bool:
        """Whether the client keeps up with what it is sent."""
        return self._is_writable

    @property
    def closes(self) -> bool:
        """Whether the answer under way is the last on this connection."""
        return self._must_close or self.gateway.is_draining

    def write(self, data: bytes) -> None:
        """Send part of the answer."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def release(self) -> None:
        """The request's body is needed no more."""
        self.gateway.held -= self._held
        self._held = 0

    def answer(self, answer: Answer, request_id: bytes) -> None:
        """Send an answer of the gateway's own in place of the replica's."""
        self._exchange = None
        self._reply(answer, request_id)
        self._advance()

    def want(self) -> None:
        """Whether more of a body that is passed on can be taken has changed."""
        if self._phase is _RELAY and self._passage is not None:
            self._read(self._passage.is_hungry)

    def switched(self) -> None:
        """What comes from now on is passed on as it is, also what came already."""
        self._enter(_RELAY)
        data, self._buffer = self._buffer, b""
        self._take_passed(data)

    def ended(self, *, close: bool) -> None:
        """The answer is out."""
        self._exchange = None
        if close:
            self._must_close = True
        self._end_request()
        if self._buffer or not self._is_reading:
            self._advance()

    def broke(self) -> None:
        """The answer cannot be completed; the client must not take it for whole."""
        self._exchange = None
        self._must_close = True
        self._end_request()

    # One request after another

    def _advance(self) -> None:
        """Go as far as the bytes and the client's own reading allow."""
        if self._is_advancing:
            return
        self._is_advancing = True
        for _ in range(_REQUESTS_PER_STEP):
            phase = self._phase
            if phase is _ANSWER or phase is _RELAY or phase is _LINGER or not self._is_writable or not self._step():
                break
        else:
            if not self._has_more:
                self._has_more = True
                asyncio.get_running_loop().call_soon(self._advance_later)
        self._is_advancing = False
        if self._phase is not _RELAY:
            wanted = len(self._buffer) <= _READ_AHEAD or self._phase is _LINGER
            if wanted is not self._is_reading:
                self._read(wanted)

    def _advance_later(self) -> None:
        self._has_more = False
        if self._transport is not None and not self._transport.is_closing():
            self._advance()

    def _step(self) -> bool:
        """Whether a step was taken: from no request to its head, from its head to its body, to its answer."""
        try:
            if self._phase is _BODY:
                return self._finish_body()
            if not self._buffer:
                return False
            if self._opened is not None and self._takes_same():
                return True
            if self._phase is _IDLE:
                self._enter(_HEAD)
                self._ate_empty_line = False
            return self._take_head()
        except Malformed as error:
            self._fail(error.status, error.detail)
            return False

    def _takes_same(self) -> bool:
        """Whether the next request has the last one's head, opens what that opened, and is all here: then it is taken.

        This is how most requests come, and all that was found out from the head holds for them.
        """
        opened, last, gateway = self._opened, self._last, self.gateway
        if opened is None or last is None or opened[0] is not gateway.table:
            return False
        data = self._buffer
        end = last.end_in(data)
        if not end:
            return False
        head, limits = last.head, gateway.limits
        size = head.length or 0
        whole = end + size
        if len(data) < whole or size > limits.body or gateway.held + size > limits.bodies:
            return False
        gateway.held += size
        self._held = size
        self._head, self._key = head, opened[1]
        self._phase = _ANSWER
        self._since = self._head_at = self._now()
        self._buffer = data[whole:]
        self._ask(head, data[end:whole])
        return True

    def _take_head(self) -> bool:
        if not self._ate_empty_line and self._buffer[:1] == b"\r":
            if len(self._buffer) < 2:
                return False
            if self._buffer[:2] == b"\r\n":
                self._ate_empty_line = True
                self._buffer = self._buffer[2:]
                if not self._buffer:
                    return False
        if not 0x41 <= self._buffer[0] <= 0x5A:
            raise Malformed(400, "This is not an HTTP request.")
        head = self._read_head()
        if head is None:
            return False
        self._head = head
        self._head_at = self._now()
        self._must_close = self._must_close or not head.keep_alive
        self._judge(head)
        return True

    def _read_head(self) -> RequestHead | None:
        """The head that the buffer begins with, which is taken out of it; None while it is not whole.

        Most clients say the same in each request: then it is read once. Raises: Malformed.
        """
        if self._last is not None and (end := self._last.end_in(self._buffer)):
            self._buffer = self._buffer[end:]
            return self._last.head
        cut = cut_head(self._buffer)
        if cut is None:
            return None
        self._last = self._opened = None
        said, self._buffer = cut
        head = read_request(said)
        self._last = Repeated(said, head) if len(said) <= _REMEMBERED_HEAD else None
        return head

    def _judge(self, head: RequestHead) -> None:
        """Decide from the head alone whether and how the body is read."""
        limits = self.gateway.limits
        verdict = self.gateway.admit(head, is_loopback=self._is_loopback)
        limit = limits.body if head.method == b"POST" else _DRAINED_BODY
        if isinstance(verdict, Key) and head.target.startswith(services.PREFIX):
            passage = self.gateway.passage(self, head, verdict, peer=self._peer, head_at=self._head_at)
            if isinstance(passage, Passage):
                self._pass(head, passage)
                return
            verdict = passage
        if not isinstance(verdict, Answer):
            self._key = verdict
            if head.header(b"content-encoding") not in (None, b"identity"):
                verdict = answers.refuse(415, "unsupported_encoding", "Send the body without Content-Encoding.")
            elif head.length is not None and head.length > limit:
                verdict = _too_large(limit)
            elif not self._hold(head.length or 0):
                verdict = answers.overloaded("too_many_bodies", "Too much is being sent at once.", retry_after_s=1)
        if isinstance(verdict, Answer):
            if head.length is None or head.length > _DRAINED_BODY or (head.length and head.expects_continue):
                self._must_close = True
                self._reply(verdict)
                return
            self._refusal = verdict
        elif verdict is not None and self.gateway.table is not None and self._may_come_again(head, verdict):
            self._opened = self.gateway.table, verdict
        if head.expects_continue and head.length != 0:
            self.write(_CONTINUE)
        self._chunks = ChunkedBody() if head.length is None else None
        self._received = 0
        self._enter(_BODY)
        data, self._buffer = self._buffer, b""
        self._take_body(data)

    def _may_come_again(self, head: RequestHead, key: Key) -> bool:
        """Whether all requests with this head open the same, as long as the table is."""
        return (
            self._last is not None
            and self._last.head is head
            and not key.expires_ns
            and head.length is not None
            and head.method == b"POST"
            and not head.expects_continue
            and head.keep_alive
        )

    def _take_body(self, data: bytes) -> None:
        head = self._head
        if head is None:
            return
        if self._chunks is None:
            missing = (head.length or 0) - self._received
            if len(data) > missing:
                data, self._buffer = data[:missing], self._buffer + data[missing:]
            self._received += len(data)
            if data and self._refusal is None:
                self._pieces.append(data)
            return
        if self._chunks.rest is not None:
            self._buffer += data
            return
        try:
            pieces = self._chunks.feed(data)
        except Malformed as error:
            self._fail(error.status, error.detail)
            return
        self._received += sum(map(len, pieces))
        limit = self.gateway.limits.body if head.method == b"POST" else _DRAINED_BODY
        if self._received > limit:
            self._must_close = True
            self._reply(_too_large(limit))
        elif not self._hold(self._received - self._held):
            self._must_close = True
            self._reply(answers.overloaded("too_many_bodies", "Too much is being sent at once.", retry_after_s=1))
        else:
            self._pieces += pieces
            if self._chunks.rest is not None:
                self._buffer = self._chunks.rest

    # A body that is passed on

    def _pass(self, head: RequestHead, passage: Passage) -> None:
        if head.expects_continue and head.length != 0:
            self.write(_CONTINUE)
        self._chunks = ChunkedBody() if head.length is None else None
        self._received = 0
        self._read_since, self._read_s = self._now(), 0.0
        self._enter(_ANSWER if head.length == 0 else _RELAY)
        self._exchange = self._passage = passage
        passage.start()
        if self._phase is _RELAY and self._passage is passage:
            data, self._buffer = self._buffer, b""
            self._take_passed(data)

    def _take_passed(self, data: bytes) -> None:
        head, passage = self._head, self._passage
        if head is None or passage is None:
            return
        if passage.is_raw:
            passage.body_data(data)
        elif self._chunks is None:
            missing = (head.length or 0) - self._received
            if len(data) > missing:
                data, self._buffer = data[:missing], self._buffer + data[missing:]
            self._received += len(data)
            passage.body_data(data)
        else:
            try:
                pieces = self._chunks.feed(data)
            except Malformed as error:
                self._cut_off(error.status, error.detail)
                return
            for piece in pieces:
                self._received += len(piece)
                passage.body_data(piece)
            self._buffer = self._chunks.rest or b""
        if not passage.is_raw and (
            self._chunks.rest is not None if self._chunks is not None else self._received == head.length
        ):
            self._enter(_ANSWER)
            passage.body_ended()
            self._advance()
        else:
            self.want()

    def _is_late(self, now: float) -> bool:
        """Whether a body that is passed on comes too slowly, as far as it was asked for."""
        if self._passage is None or self._passage.is_raw:
            return False
        read_s = self._read_s + (now - self._read_since if self._is_reading else 0.0)
        return read_s > self.gateway.limits.body_s + self._received / self.gateway.limits.passed_rate

    def _cut_off(self, status: int, detail: str) -> None:
        """End a request whose body cannot be passed on to its end, and the replica's work on it."""
        passage, self._exchange = self._passage, None
        if passage is None or passage.is_committed:
            self._exchange = passage
            self.abort()
            return
        passage.abandon()
        self._fail(status, detail)

    def _finish_body(self) -> bool:
        head = self._head
        if head is None:
            return False
        if self._chunks.rest is None if self._chunks is not None else self._received < (head.length or 0):
            return False
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        self._enter(_ANSWER)
        if self._refusal is not None:
            self._reply(self._refusal)
        else:
            self._ask(head, body)
        return True

    def _ask(self, head: RequestHead, body: bytes) -> None:
        """Have a whole request answered, now or once its guardrails have looked at it."""
        outcome = self.gateway.answer(head, self._key, body)
        if isinstance(outcome, _DECIDED):
            self._go_on(head, outcome)
        else:
            self._checking = asyncio.get_running_loop().create_task(self._checked(head, outcome))

    async def _checked(self, head: RequestHead, steps: Coroutine[Any, Any, Answer | Asking]) -> None:
        """Go on with a request once its guardrails have looked at it."""
        try:
            outcome = await steps
        except Exception:  # noqa: BLE001 - whatever broke, the client is to hear of it
            _log.exception("request %s could not be looked at", self.gateway.request_id(head).decode())
            outcome = answers.refuse(500, "internal", "Something went wrong in the gateway.")
        self._checking = None
        if self._head is head:
            self._go_on(head, outcome)
            self._advance()

    def _go_on(self, head: RequestHead, outcome: Answer | Asking) -> None:
        if isinstance(outcome, Answer):
            self._reply(outcome)
            return
        self._exchange = exchange = Exchange(self.gateway, self, head, outcome, head_at=self._head_at)
        exchange.start()

    def _hold(self, size: int) -> bool:
        """Whether there is room for ``size`` more bytes of bodies; then they are counted."""
        if self.gateway.held + size > self.gateway.limits.bodies:
            return False
        self.gateway.held += size
        self._held += size
        return True

    # Ends

    def _reply(self, answer: Answer, request_id: bytes = b"") -> None:
        head = self._head
        if answer.status >= 400:
            self.gateway.metrics.refuse(answer.status, answer.code)
        if not request_id and head is not None:
            request_id = self.gateway.request_id(head)
        headers = [
            (b"Content-Type", answer.content_type),
            (b"Content-Length", b"%d" % len(answer.body)),
            *answer.headers,
        ]
        if request_id:
            headers.append((b"X-Request-Id", request_id))
        if self.closes:
            headers.append((b"Connection", b"close"))
        line = b"HTTP/1.1 %d %b" % (answer.status, answers.reason(answer.status))
        body = b"" if head is not None and head.method == b"HEAD" else answer.body
        self.write(write_head(line, headers) + body)
        self._end_request()

    def _fail(self, status: int, detail: str) -> None:
        """Refuse what cannot be read on; the connection ends with it, since nobody knows where the next would begin."""
        self._must_close = True
        code = {408: "timeout", 413: "too_large", 431: "header_too_large"}.get(status, "bad_request")
        self._reply(answers.refuse(status, code, detail))

    def _end_request(self) -> None:
        if self._held:
            self.release()
        self._head = self._key = self._refusal = self._chunks = self._passage = None
        if self._pieces:
            self._pieces = []
        if self._must_close or self.gateway.is_draining:
            self._close()
        else:
            self._enter(_IDLE)

    def _close(self) -> None:
        """Send what waits, then close; what still comes is read and dropped, or it would cost the client the answer."""
        if self._transport is None or self._phase is _LINGER:
            return
        self._buffer = b""
        self._enter(_LINGER)
        self._read(True)
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _abandon(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._passage = None
        if exchange is not None:
            exchange.abandon()
        checking, self._checking = self._checking, None
        if checking is not None:
            checking.cancel()
        self.release()
        self._pieces = []
        self._buffer = b""

    def _read(self, wanted: bool) -> None:
        if self._transport is None or self._transport.is_closing() or wanted is self._is_reading:
            return
        self._is_reading = wanted
        if wanted:
            self._read_since = self._now()
            self._transport.resume_reading()
        else:
            self._read_s += self._now() - self._read_since
            self._transport.pause_reading()

    def _stalls(self, now: float) -> bool:
        """Whether the client has taken nothing for too long while an answer waits for it."""
        if self._is_writable:
            return False
        since, waiting = self._stalled
        left = self._waiting_to_be_sent()
        if left != waiting:
            self._stalled = (now, left)
            return False
        return now - since > self.gateway.limits.stall_s

    def _waiting_to_be_sent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._since = self._now()


def _too_large(limit: int) -> Answer:
    return answers.refuse(413, "too_large", f"The body is larger than {limit} bytes.")
