"""One request of OpenAI's API on its way to a replica, and its response on the way back."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from tidemill.gateway import answers
from tidemill.gateway.journey import Asking, Client, Journey
from tidemill.gateway.messages import LAST_CHUNK, RequestHead, ResponseHead, chunk, end_to_end, write_head
from tidemill.gateway.metering import StreamMeter, Usage, WholeMeter, estimated_prompt
from tidemill.gateway.table import Replica
from tidemill.gateway.upstream import BUFFER_HIGH, UpstreamConnection

if TYPE_CHECKING:
    from tidemill.gateway.server import Gateway

_NOT_FORWARDED: Final = frozenset({b"authorization", b"content-length", b"cookie", b"expect", b"host", b"x-request-id"})


class Exchange(Journey):
    """One request and its response.

    A response that is no event stream is held, up to a bound, until it is whole, so that a replica's death in the
    middle of it is an honest 502.
    """

    def __init__(
        self, gateway: Gateway, client: Client, head: RequestHead, asking: Asking, *, head_at: float = 0.0
    ) -> None:
        super().__init__(gateway, client, head, asking, head_at=head_at)
        self._http_1_0 = head.http_1_0
        self._target = head.target
        headers = self._headers_for(head, without=_NOT_FORWARDED)
        headers += [(b"content-length", b"%d" % len(asking.body)), (b"x-request-id", self._request_id)]
        self._headers = write_head(b"", headers)
        self._body = asking.body
        self._size = len(asking.body)
        self._counts.request_bytes += self._size
        self._held: list[bytes] = []
        self._held_size = 0
        self._is_committed = False
        self._is_chunked = False
        self._meter: StreamMeter | WholeMeter | None = None
        self._usage: Usage | None = None
        self._is_whole = False
        self._tokens = 0
        """Of its answer, as they were counted for what the model gives a second."""

    def response_started(self, head: ResponseHead) -> None:
        self._response = head
        self._hear()
        self._body = b""
        self._client.release()
        if self._asking.is_metered and head.status == 200:
            self._begin_metering(head)
        if head.is_event_stream:
            self._counts.streams += 1
            self._commit(None if self._asking.hides_usage else head.length)
        elif head.length is not None and head.length > BUFFER_HIGH:
            self._commit(head.length)

    def response_data(self, data: bytes) -> None:
        if not data or self._is_over:
            return
        self._hear()
        if not self._first_at:
            self._first_at = self._heard_at
            if self._response is not None and self._response.is_event_stream and self._response.status == 200:
                self._felt.began(self._heard_at - self._asked_at)
        if self._meter is not None:
            data = self._meter.feed(data)
            if self._usage is not None:
                self._usage.completion_tokens = self._meter.counted
                self._count_tokens(self._meter.counted)
        self._pass_on(data)

    def response_ended(self) -> None:
        if self._is_over:
            return
        if self._meter is not None:
            self._pass_on(self._meter.finish())
        if not self._is_committed:
            self._commit(self._held_size)
        if self._is_chunked:
            self._client.write(LAST_CHUNK)
        if self._response is not None and self._response.status >= 400:
            self._error = str(self._response.status)
            self._counts.errors += self._response.status >= 500
        close = self._http_1_0
        self._is_whole = True
        self._upstream = None  # it is the pool's again
        line = self._gateway.line(self._asking.route.model)
        now = asyncio.get_running_loop().time()
        line.served_in(now - self._taken_at)
        if self._response is not None and self._response.status == 200:
            self._felt.ended(now - self._asked_at)
        self._over()
        self._client.ended(close=close)

    # Ways there

    def _transmit(self, upstream: UpstreamConnection, replica: Replica) -> None:
        first = b"POST %b%b HTTP/1.1\r\nhost: %b" % (replica.prefix, self._target, replica.authority)
        upstream.send(self, first + self._headers, self._body)

    # Ways back

    def _pass_on(self, data: bytes) -> None:
        if not data:
            return
        self._counts.response_bytes += len(data)
        if self._is_committed:
            self._client.write(chunk(data) if self._is_chunked else data)
            return
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > BUFFER_HIGH and self._response is not None:
            self._commit(self._response.length)

    def _commit(self, length: int | None) -> None:
        """Send the response's head and what is held; from here on there is no other answer."""
        response = self._response
        if response is None:
            return
        self._is_committed = True
        headers = end_to_end(response.headers, without=frozenset({b"content-length", b"x-request-id"}))
        headers.append((b"x-request-id", self._request_id))
        if self._asking.charge is not None:
            headers += self._asking.charge.headers()
        if response.status in (204, 304):
            pass
        elif length is not None:
            headers.append((b"content-length", b"%d" % length))
        elif not self._http_1_0:
            self._is_chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        if self._http_1_0 or self._client.closes:
            headers.append((b"connection", b"close"))
        first = write_head(b"HTTP/1.1 %d %b" % (response.status, response.reason), headers)
        held = b"".join(self._held)
        self._held = []
        self._client.write(first + (chunk(held) if held and self._is_chunked else held))

    def _break(self, code: str, message: str, *, status: int = 502) -> None:
        """End a response that cannot be completed."""
        self._counts.errors += 1
        self._error = code
        self._log(message)
        response = self._response
        committed, streaming = self._is_committed, response is not None and response.is_event_stream
        self._over()
        if not committed:
            self._client.answer(answers.refuse(status, code, message), self._request_id)
            return
        if streaming and (self._is_chunked or self._http_1_0):
            event = answers.error_event(code, message)
            self._client.write(chunk(event) if self._is_chunked else event)
        self._client.broke()

    # What it took

    def _reported(self) -> tuple[int, int] | None:
        return self._meter.reported if self._meter is not None else None

    def _begin_metering(self, head: ResponseHead) -> None:
        books, asking = self._gateway.books, self._asking
        if books is None or self._replica is None:
            return
        self._meter = StreamMeter(hides_usage=asking.hides_usage) if head.is_event_stream else WholeMeter()
        self._usage = Usage(
            id=books.next_id(),
            at_ns=time.time_ns(),
            project=asking.tenant or asking.route.project,
            token=asking.token,
            model=asking.route.model,
            workload=asking.route.workload,
            job=self._replica.job,
            prompt_tokens=estimated_prompt(self._size),
            is_estimated=True,
            user=asking.user,
            label=asking.label,
            price=asking.route.price,
        )
        if head.is_event_stream:
            books.open(self._usage)

    def _settle(self) -> None:
        """Enter what it took into the books: as it was told, or what was counted."""
        usage, self._usage = self._usage, None
        meter, self._meter = self._meter, None
        books = self._gateway.books
        if usage is None or meter is None or books is None:
            return
        if meter.reported is not None:
            usage.prompt_tokens, usage.completion_tokens = meter.reported
            usage.is_estimated = False
        elif isinstance(meter, WholeMeter):
            if not self._is_whole:
                return  # no tokens were told of, and nothing of it can be counted
            usage.prompt_tokens = 0
        self._count_tokens(usage.completion_tokens)
        self._counts.prompt_tokens += usage.prompt_tokens
        self._counts.completion_tokens += usage.completion_tokens
        self._counts.cached_tokens += meter.cached
        timings = self._timings
        timings.input_tokens.note(usage.prompt_tokens)
        timings.output_tokens.note(usage.completion_tokens)
        if isinstance(meter, StreamMeter) and usage.completion_tokens > 1 and self._first_at:
            timings.gap.note((self._heard_at - self._first_at) / (usage.completion_tokens - 1))
        books.settle(usage)
        self._entered = usage

    def _count_tokens(self, total: int) -> None:
        """The answer has so many tokens so far; what was counted too much of it is not taken back."""
        if total > self._tokens:
            self._felt.gave(total - self._tokens)
            self._tokens = total
