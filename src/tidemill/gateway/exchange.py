"""One request of OpenAI's API on its way to a replica, and its response on the way back."""

from __future__ import annotations

import time
from time import monotonic
from typing import TYPE_CHECKING, Final

from tidemill.gateway import answers
from tidemill.gateway.guarding import FAILED, Passing, Refusal, Screen, Who, screen_of
from tidemill.gateway.journey import Asking, Client, Journey
from tidemill.gateway.messages import (
    LAST_CHUNK,
    RequestHead,
    ResponseHead,
    chunk,
    header_value,
    write_lines,
)
from tidemill.gateway.metering import StreamMeter, Usage, WholeMeter, ask_model, estimated_prompt
from tidemill.gateway.table import Replica, Route
from tidemill.gateway.upstream import BUFFER_HIGH, Receiver, UpstreamConnection
from tidemill.model.guard import Stage

if TYPE_CHECKING:
    from tidemill.gateway.server import Gateway

_NOT_FORWARDED: Final = frozenset({b"authorization", b"content-length", b"cookie", b"expect", b"host", b"x-request-id"})


_HEAD: Final = b"POST %b%b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n"
_ANSWERED: Final = b"HTTP/1.1 %d %b\r\n%bx-request-id: %b\r\n%b\r\n"
_PLAIN: Final = _NOT_FORWARDED | {b"accept-encoding"}
_NOT_PASSED_BACK: Final = frozenset({b"content-length", b"x-request-id", b"x-tidemill-model"})


class Exchange(Journey):
    """One request and its response.

    A response that is no event stream is held, up to a bound, until it is whole, so that a replica's death in the
    middle of it is an honest 502.
    """

    _held_size = 0
    _is_committed = False
    _is_chunked = False
    _is_whole = False
    _meter: StreamMeter | WholeMeter | None = None
    _usage: Usage | None = None
    _screen: Screen | None = None
    """What looks at the response before it is passed on."""
    _tokens = 0
    """Of its answer, as they were counted for what the model gives a second."""

    def __init__(
        self, gateway: Gateway, client: Client, head: RequestHead, asking: Asking, *, head_at: float = 0.0
    ) -> None:
        super().__init__(gateway, client, head, asking, head_at=head_at)
        self._http_1_0 = head.http_1_0
        self._target = head.target
        guards = self._guards
        without = _PLAIN if guards is not None and guards.on_response else _NOT_FORWARDED
        if self._trace is None:
            self._given = head.lines(without=without)
        else:
            self._given = write_lines(self._headers_for(head, without=without))
        self._body = asking.body
        self._size = len(asking.body)
        self._counts.request_bytes += self._size
        self._held: list[bytes] = []

    def response_started(self, head: ResponseHead) -> None:
        self._begin(head)
        self._body = b""
        self._client.release()
        if self._asking.is_metered and head.status == 200:
            self._begin_metering(head)
        guards = self._guards
        if guards is not None and guards.on_response and head.status == 200 and not self._begin_screening(head):
            return
        if head.is_event_stream:
            self._counts.streams += 1
            self._commit(None if self._asking.hides_usage or self._screen is not None else head.length)
        elif head.length is not None and head.length > BUFFER_HIGH and self._screen is None:
            self._commit(head.length)

    def response_data(self, data: bytes) -> None:
        if not data or self._is_over:
            return
        now = monotonic()
        self._hear(now)
        if not self._first_at:
            self._first_at = now
            if self._response is not None and self._response.is_event_stream and self._response.status == 200:
                self._felt.began(now - self._asked_at)
        meter = self._meter
        if meter is not None:
            data = meter.feed(data)
            if self._usage is not None and isinstance(meter, StreamMeter):
                self._usage.completion_tokens = counted = meter.counted
                self._count_tokens(counted)
        if not data:
            return
        if self._screen is None:
            self._pass_on(data)
        else:
            self._screen.feed(data)

    def response_ended(self) -> None:
        if self._is_over:
            return
        self._upstream = None  # it is the pool's again
        rest = self._meter.finish() if self._meter is not None else b""
        if self._screen is None:
            if rest:
                self._pass_on(rest)
            self._complete()
            return
        if rest:
            self._screen.feed(rest)
        self._screen.finish(self._complete)

    def _response_whole(self, head: ResponseHead, body: bytes) -> None:
        """The response came in one piece, as most do that are no streams."""
        if self._is_over:
            return
        self._upstream = None  # it is the pool's again
        if head.is_event_stream or self._guards is not None:
            self.response_started(head)
            self.response_data(body)
            self.response_ended()
            return
        self._begin(head)
        self._first_at = self._heard_at
        self._body = b""
        self._client.release()
        self._counts.response_bytes += len(body)
        if self._asking.is_metered and head.status == 200:
            self._begin_metering(head)
            if self._meter is not None:
                self._meter.feed(body)
        self._held, self._held_size = [body], len(body)
        self._complete()

    def _complete(self) -> None:
        """All that the replica sent was passed on."""
        if self._is_over:
            return
        if not self._is_committed:
            self._commit(self._held_size)
        if self._is_chunked:
            self._client.write(LAST_CHUNK)
        status = self._response.status if self._response is not None else 0
        is_failure = status >= 500
        if status >= 400:
            self._error = str(status)
            self._counts.errors += is_failure
        if self._replica is not None and self._replica.variant:
            self._note_variant(is_answered=not is_failure)
        self._is_whole = True
        now = monotonic()
        self._desk.line.served_in(now - self._taken_at)
        if status == 200:
            self._felt.ended(now - self._asked_at)
        self._over()
        self._client.ended(close=self._http_1_0)

    # Ways there

    def transmit(self, receiver: Receiver, upstream: UpstreamConnection, replica: Replica) -> None:
        own = (replica.prefix, self._target, replica.authority, self._given, len(self._body), self._request_id)
        upstream.send(receiver, _HEAD % own, self._body, whole=self._response_whole if receiver is self else None)

    def _moved(self, route: Route) -> None:
        self._body = ask_model(
            self._body,
            route.model,
            salt=self._gateway.salt(route, self._target.partition(b"?")[0], self._asking.tenant),
        )

    # Ways back

    def _pass_on(self, data: bytes) -> None:
        self._counts.response_bytes += len(data)
        if self._is_committed:
            self._client.write(chunk(data) if self._is_chunked else data)
            return
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > BUFFER_HIGH and self._response is not None:
            self._commit(self._response.length if self._screen is None else None)

    def _commit(self, length: int | None) -> None:
        """Send the response's head and what is held; from here on there is no other answer."""
        response = self._response
        if response is None:
            return
        self._is_committed = True
        more = b""
        if self._asking.charge is not None:
            more = write_lines(self._asking.charge.headers())
        if self._asking.flags:
            more += b"x-tidemill-guard: %b\r\n" % ", ".join(self._asking.flags).encode()
        if self._left is not None:
            more += b"x-tidemill-model: %b\r\n" % header_value(self._asking.route.model)
        if response.status in (204, 304):
            pass
        elif length is not None:
            more += b"content-length: %d\r\n" % length
        elif not self._http_1_0:
            self._is_chunked = True
            more += b"transfer-encoding: chunked\r\n"
        if self._http_1_0 or self._client.closes:
            more += b"connection: close\r\n"
        passed = response.lines(without=_NOT_PASSED_BACK)
        first = _ANSWERED % (response.status, response.reason, passed, self._request_id, more)
        held = self._held[0] if len(self._held) == 1 else b"".join(self._held)
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

    # Guardrails

    def _begin_screening(self, head: ResponseHead) -> bool:
        """Whether the response can be looked at."""
        guards = self._guards
        if guards is None:
            return True
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in head.headers):
            self._break(FAILED, "The model's answer is encoded, so its guardrails cannot look at it.")
            return False
        passing = Passing(pass_on=self._pass_on, pause=self.pause, resume=self._read_on, refuse=self._end_screened)
        self._screen = screen_of(
            guards, passing, self._gateway, path=self._target, is_event_stream=head.is_event_stream
        )
        return True

    def _read_on(self) -> None:
        if self._client.is_writable:
            self.resume()

    def _end_screened(self, refusal: Refusal, ending: bytes) -> None:
        """A rule lets no more of the response pass."""
        if self._is_over:
            return
        guards, screen = self._guards, self._screen
        if guards is not None and screen is not None:
            screen.found = refusal.noted_in(screen.found)
            self._gateway.rule(guards, self._who, Stage.RESPONSE, screen.found, refusal.rule.name)
            self._screen = None
        answer = refusal.answer
        if not self._is_committed:
            self._end_with(answer)
            return
        self._error = answer.code
        self._log(f"its answer was ended: {refusal.message}")
        if self._is_chunked:
            ending = (chunk(ending) if ending else b"") + LAST_CHUNK
        self._client.write(ending)
        self._over()
        self._client.ended(close=self._http_1_0)

    @property
    def _who(self) -> Who:
        asking = self._asking
        project = asking.tenant or asking.route.project
        return Who(self._request_id.decode(), project, asking.token, asking.route.model)

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
            workload=self._replica.workload or asking.route.workload,
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
        """Enter what it took into the books: as it was told, or what was counted; and what guardrails decided."""
        screen, self._screen = self._screen, None
        if screen is not None and self._guards is not None:
            screen.close()
            self._gateway.rule(self._guards, self._who, Stage.RESPONSE, screen.found)
        usage, self._usage = self._usage, None
        meter, self._meter = self._meter, None
        books = self._gateway.books
        if usage is None or meter is None or books is None:
            return
        if (reported := meter.reported) is not None:
            usage.prompt_tokens, usage.completion_tokens = reported
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
