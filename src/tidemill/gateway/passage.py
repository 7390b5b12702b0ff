"""One request to a service that is no model: any method, both bodies passed on as they come, and WebSockets.

Nothing is held but what comes before the replica is reached, up to a bound; then each side is read as fast as the other
one takes it. What was begun to be sent is not sent again, unless it has no body and its method allows it.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from tidemill.gateway import answers
from tidemill.gateway.journey import Asking, Client, Journey
from tidemill.gateway.messages import LAST_CHUNK, RequestHead, ResponseHead, chunk, write_head
from tidemill.gateway.services import IDEMPOTENT, Target, headers_for, passed_on, why_no_upgrade
from tidemill.gateway.table import Replica, Route
from tidemill.gateway.upstream import BUFFER_LOW, Receiver, UpstreamConnection

if TYPE_CHECKING:
    from tidemill.gateway.server import Gateway

_NONE: Final = frozenset[bytes]()
SWITCHED: Final = 101


class Sender(Client, Protocol):
    """A client whose request's body is passed on."""

    def want(self) -> None:
        """Whether more of the body can be taken has changed."""

    def switched(self) -> None:
        """What comes from now on is passed on as it is."""


class Passage(Journey):
    """One request and its response."""

    needs_open: ClassVar[bool] = True

    def __init__(
        self,
        gateway: Gateway,
        client: Sender,
        head: RequestHead,
        asking: Asking,
        *,
        target: Target,
        peer: str,
        is_upgrade: bool,
        cookie: bytes = b"",
        head_at: float = 0.0,
    ) -> None:
        """``cookie`` is a session that the client is to keep; empty: none."""
        super().__init__(gateway, client, head, asking, head_at=head_at)
        self._sender = client
        self._head = head
        self._path = target.path
        self._is_upgrade = is_upgrade
        self._cookie = cookie
        given = self._headers_for(head, without=_NONE)
        is_local = peer.startswith("127.") or peer == "::1"
        self._headers = headers_for(given, head, service=target.service, peer=peer, is_trusted=is_local)
        self._headers.append((b"x-request-id", self._request_id))
        if is_upgrade:
            self._headers += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
        elif head.length is None:
            self._headers.append((b"transfer-encoding", b"chunked"))
        elif head.length or head.header(b"content-length") is not None:
            self._headers.append((b"content-length", b"%d" % head.length))
        self._waiting: list[bytes] = []
        """Of the body, before there is a replica to send it to."""
        self._waiting_size = 0
        self._has_all = head.length == 0
        """Whether the body has come whole."""
        self._is_body_sent = False
        """Whether any of it went to a replica."""
        self.is_committed = False
        """Whether there is no other answer any more."""
        self._is_chunked = False
        self._does_close = False
        """Whether the connection ends with this answer."""
        self.is_raw = False
        """Whether it is a WebSocket now."""

    # What the client calls

    @property
    def is_hungry(self) -> bool:
        """Whether more of the request's body can be taken."""
        if self._upstream is None:
            return self._waiting_size < BUFFER_LOW and not self._is_over
        return self._upstream.is_writable

    def body_data(self, data: bytes) -> None:
        """Part of the request's body came, or of what the client says in a WebSocket."""
        if self._is_over or not data:
            return
        self._counts.request_bytes += len(data)
        self._heard_at = monotonic()
        if self._upstream is None:
            self._waiting.append(data)
            self._waiting_size += len(data)
            self._gateway.held += len(data)
        else:
            self._is_body_sent = True
            self._upstream.write(data if self.is_raw or self._head.length is not None else chunk(data))

    def body_ended(self) -> None:
        """The request is whole."""
        self._has_all = True
        if self._upstream is not None and not self._is_over:
            self._finish_body(self._upstream)

    def check(self, now: float) -> None:
        """End what takes too long; a WebSocket only when nobody says anything."""
        if not self.is_raw:
            super().check(now)
        elif now - self._heard_at > self._asking.route.timeouts.between:
            self._break("idle", "Nobody said anything for too long.")

    # What the upstream calls

    def sending_changed(self) -> None:
        """The replica takes more of the request now, or no more."""
        self._sender.want()

    def response_started(self, head: ResponseHead) -> None:
        self._begin(head)
        if head.status == SWITCHED:
            self._switch(head)
            return
        headers = passed_on(head.headers)
        headers.append((b"x-request-id", self._request_id))
        if self._cookie:
            headers.append((b"set-cookie", self._cookie))
        if self._head.method == b"HEAD" or head.status in (204, 304):
            headers += [pair for pair in head.headers if pair[0] == b"content-length"]
        elif head.length is not None:
            headers.append((b"content-length", b"%d" % head.length))
        elif not self._head.http_1_0:
            self._is_chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        self._does_close = self._head.http_1_0 or self._client.closes or not self._has_all
        if self._does_close:
            headers.append((b"connection", b"close"))
        self.is_committed = True
        self._counts.streams += head.is_event_stream
        self._client.write(write_head(b"HTTP/1.1 %d %b" % (head.status, head.reason), headers))

    def response_data(self, data: bytes) -> None:
        if not data or self._is_over:
            return
        self._hear(monotonic())
        if not self._first_at:
            self._first_at = self._heard_at
        self._counts.response_bytes += len(data)
        self._client.write(chunk(data) if self._is_chunked else data)

    def response_ended(self) -> None:
        if self._is_over:
            return
        if self._is_chunked:
            self._client.write(LAST_CHUNK)
        if self._response is not None and self._response.status >= 500:
            self._counts.errors += 1
            self._error = str(self._response.status)
        close = self.is_raw or self._does_close or not self._has_all
        self._upstream = None  # it is the pool's again, or closed
        if not self.is_raw:
            self._desk.line.served_in(monotonic() - self._taken_at)
        self._over()
        self._client.ended(close=close)

    def transmit(self, receiver: Receiver, upstream: UpstreamConnection, replica: Replica) -> None:
        first = b"%b %b%b HTTP/1.1\r\nhost: %b" % (self._head.method, replica.prefix, self._path, replica.authority)
        upstream.send(
            receiver,
            write_head(first, self._headers),
            sender=None if self._head.length == 0 and not self._is_upgrade else self,
            has_body=self._head.method != b"HEAD",
            may_switch=self._is_upgrade,
        )
        waiting, self._waiting = self._waiting, []
        self._gateway.held -= self._waiting_size
        self._waiting_size = 0
        for data in waiting:
            self._is_body_sent = True
            upstream.write(data if self._head.length is not None else chunk(data))
        if self._has_all and self._head.length != 0:
            self._finish_body(upstream)
        self._sender.want()

    # Hooks

    @property
    def _may_send_again(self) -> bool:
        return self._head.method in IDEMPOTENT and not self._is_body_sent

    def _moved(self, route: Route) -> None:
        """The path is the same there."""

    def _finish_body(self, upstream: UpstreamConnection) -> None:
        upstream.finish_sending(LAST_CHUNK if self._head.length is None else b"")

    def _switch(self, head: ResponseHead) -> None:
        wrong = why_no_upgrade(self._head, head)
        if wrong:
            self._break("invalid_handshake", f"The replica's change to a WebSocket is not valid: {wrong}.")
            return
        headers = [*passed_on(head.headers), (b"x-request-id", self._request_id)]
        headers += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
        if self._cookie:
            headers.append((b"set-cookie", self._cookie))
        self.is_committed = self.is_raw = True
        self._client.write(write_head(b"HTTP/1.1 101 Switching Protocols", headers))
        self._sender.switched()

    def _break(self, code: str, message: str, *, status: int = 502) -> None:
        self._counts.errors += 1
        self._error = code
        self._log(message)
        committed = self.is_committed
        self._over()
        if committed:
            self._client.broke()
        else:
            self._client.answer(answers.refuse(status, code, message), self._request_id)

    def _settle(self) -> None:
        """Nothing of it is metered; what waited to be sent is let go."""
        self._gateway.held -= self._waiting_size
        self._waiting, self._waiting_size = [], 0
        if self.is_raw and self._upstream is not None:  # what was said last may be on its way
            upstream, self._upstream = self._upstream, None
            upstream.close()
