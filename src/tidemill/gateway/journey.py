"""A request's way to a replica: which one, waiting in line for it, reaching it, and once more before the first byte.

What is sent there and what comes back differs: ``exchange`` for what speaks OpenAI's API.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from tidemill.core import routing
from tidemill.core.routing import Wish
from tidemill.gateway import answers
from tidemill.gateway.answers import Answer
from tidemill.gateway.circuit import State
from tidemill.gateway.health import OWN_TROUBLE
from tidemill.gateway.hedging import Hedge
from tidemill.gateway.messages import RequestHead, ResponseHead, end_to_end
from tidemill.gateway.metering import Usage
from tidemill.gateway.metrics import ABORTED
from tidemill.gateway.table import NORMAL_BAND, Key, Replica, Route
from tidemill.gateway.upstream import Receiver, UpstreamConnection
from tidemill.gateway.waiting import Line, retry_after_s

if TYPE_CHECKING:
    from tidemill.gateway.rations import Charge
    from tidemill.gateway.server import Gateway
    from tidemill.gateway.tracing import Trace

_CLOSED: Final = State.CLOSED
CAUTION: Final = 1.25
"""A request that is refused at once is of more use than one that is refused when its time is over."""
_USUAL_START_S: Final = 5.0
"""How long a replica takes to start of which that is not known."""
_log = logging.getLogger("tidemill.gateway")


@dataclass(slots=True, kw_only=True)
class Asking:
    """What is asked of a model: by whom, of which route, in which words, and until when it may wait for a replica.

    ``wait_s`` None: as long as the route says. ``is_metered`` is false for what has no tokens. ``band`` is its
    priority when requests wait, ``user`` and ``label`` are what it is booked under. ``countries`` are those
    where it may be served, empty for anywhere; ``wish`` None: any replica will do. ``may_repeat`` is whether it does no
    harm to send it to two replicas.
    """

    route: Route
    body: bytes
    token: str = ""
    tenant: str = ""
    is_metered: bool = False
    hides_usage: bool = False
    wait_s: float | None = None
    flags: tuple[str, ...] = ()
    """The guardrails that found something in it, and let it pass."""
    band: int = NORMAL_BAND
    user: str = ""
    label: str = ""
    charge: Charge | None = None
    """What it takes of limits; None: nothing limits it."""
    key: Key | None = None
    """What it was asked with, for what else that opens."""
    countries: frozenset[str] = frozenset()
    wish: Wish | None = None
    may_repeat: bool = False
    operation: str = ""
    """What is asked for, as OpenTelemetry calls it; empty for what is no inference."""


class Client(Protocol):
    """Who asked."""

    @property
    def is_writable(self) -> bool:
        """Whether the client keeps up with what it is sent."""

    @property
    def closes(self) -> bool:
        """Whether the answer under way is the last on this connection."""

    def write(self, data: bytes) -> None:
        """Send part of the answer."""

    def release(self) -> None:
        """The request's body is needed no more."""

    def answer(self, answer: Answer, request_id: bytes) -> None:
        """Send an answer of the gateway's own in place of the replica's."""

    def ended(self, *, close: bool) -> None:
        """The answer is out."""

    def broke(self) -> None:
        """The answer cannot be completed; the client must not take it for whole."""


class _Nobody:
    """The client that has gone: an answer to it goes nowhere."""

    is_writable = True
    closes = True

    def write(self, data: bytes) -> None: ...

    def release(self) -> None: ...

    def answer(self, answer: Answer, request_id: bytes) -> None: ...

    def ended(self, *, close: bool) -> None: ...

    def broke(self) -> None: ...


_NOBODY: Final = _Nobody()


class Journey(ABC):
    """One request until its response has begun, and what it holds until it is over.

    Until the first byte of a response another replica may be tried, once; while none can take it, it waits in line.
    """

    needs_open: ClassVar[bool] = False
    """Whether only services take it of which all paths are reached."""

    # What most requests never need

    _variant: str | None = None
    """Of which replica, since it was drawn; None: not drawn, or there is nothing to draw."""
    _left: Route | None = None
    """The route that it came by, when another model answers."""
    _hedging: asyncio.TimerHandle | None = None
    _hedge: Hedge | None = None
    _tried: tuple[Replica, ...] = ()
    """Those that it was sent to, and that broke off without an answer."""
    _why_refused = ""
    """Why a replica could not be reached."""
    _connecting: asyncio.Task[None] | None = None
    _line: Line | None = None
    """That in which it waits."""
    _deadline: asyncio.TimerHandle | None = None
    _until: float | None = None
    _is_cold = False
    """Whether it came when there was no replica."""
    _trace: Trace | None = None

    # How far it is

    _sent = 0
    """How often it was sent: a replica may have begun to work on each."""
    _had_a_turn = False
    _was_reused = False
    _replica: Replica | None = None
    _upstream: UpstreamConnection | None = None
    _response: ResponseHead | None = None
    _sent_at = 0.0
    """When it was sent last, where that is traced; zero: not yet."""
    _first_at = 0.0
    """When the first byte of the response's body came; zero: not yet."""
    _error = ""
    """What went wrong, as a code; empty: nothing."""
    _entered: Usage | None = None
    """What it took, once that is in the books."""
    _is_over = False

    def __init__(
        self, gateway: Gateway, client: Client, head: RequestHead, asking: Asking, *, head_at: float = 0.0
    ) -> None:
        """``head_at`` is when the request's head had come, by the loop's clock."""
        self._client = client
        self._gateway = gateway
        self._asking = asking
        self._request_id = gateway.request_id(head)
        route = asking.route
        self._fallbacks = route.fallback
        """Other models that have not been asked yet."""
        self._guards = route.guards
        """Those of the model that was asked for, also when another answers."""
        self._began_at = self._asked_at = self._heard_at = self._taken_at = now = monotonic()
        self._desk = desk = gateway.desk(route.model)
        self._felt = desk.felt
        self._counts = counts = desk.counts
        self._timings = desk.timings(asking.operation)
        counts.requests += 1
        counts.in_flight += 1
        route.course.budget.earn()
        if gateway.tracer is not None:
            self._trace = gateway.tracer.begin(head, head_at or now)

    @property
    def is_picky(self) -> bool:
        """Whether some replicas are not for it, that others could have meanwhile."""
        wish = self._asking.wish
        return bool(self._asking.route.weights) or (wish is not None and bool(wish.countries))

    def start(self) -> None:
        """Send it to the best replica, or wait in line for one, or say why not."""
        charge = self._asking.charge
        if charge is not None and not charge.is_admitted:
            charge.admit(self._admitted)
            return
        line = self._desk.line
        if (line.count and not self._had_a_turn) or not self.go():
            self._wait(line)

    def _admitted(self, refusal: Answer | None) -> None:
        """Go on within the limits, or end beyond them."""
        if refusal is not None:
            self._end_with(refusal)
        else:
            self.start()

    def go(self) -> bool:
        """Whether it does not wait any more."""
        asking, table = self._asking, self._gateway.table
        wish, route = asking.wish, asking.route
        if table is not None:
            route = table.routes.get(route.model, route)
        replica = self._choose_variant(route) if route.weights else route.choose(wish=wish, tried=self._tried)
        if replica is None and self._fallbacks and not route.takers(wish or routing.ANY, tried=self._tried):
            replica = self._fall_back()
        if replica is None:
            if not self._is_hopeless(route):
                return False
            self._leave_line()
            self._give_up()
            return True
        return self._go_to(replica)

    def _go_to(self, replica: Replica | None) -> bool:
        """Whether there is a replica; then it is sent there."""
        if replica is None:
            return False
        if self._line is not None:
            self._leave_line()
        self._taken_at = self._heard_at = monotonic()
        if self._had_a_turn:
            self._counts.retries += 1
        else:
            self._timings.queue.note(self._taken_at - self._began_at)
            if self._is_cold:
                self._asked_at = self._taken_at
            else:
                self._felt.waited(self._taken_at - self._asked_at)
        self._had_a_turn = True
        self._assign(replica)
        upstream = None
        if not self._sent and self._may_send_again:
            upstream = self._gateway.pool.take(replica.address)
        if upstream is not None:
            self._send(upstream, replica)
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(replica))
        return True

    def abandon(self) -> None:
        """The client went away: stop the replica's work at once."""
        if self._is_over:
            return
        self._counts.aborted += 1
        self._error = ABORTED
        self._client = _NOBODY
        if self._upstream is not None and self._asking.is_metered:  # what it has sent by now counts
            self._upstream.take_what_came()
        if not self._is_over:
            self._over()

    def ejected(self, why: str) -> None:
        """The replica is not waited for: what it has not begun to answer goes elsewhere, the rest ends."""
        if self._is_over:
            return
        self._note_variant(is_answered=False)
        if self._response is not None:
            self._break("replica_failed", f"The model's replica was given up: {why}.")
            return
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abandon()
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        self._elsewhere(is_known=True)

    def check(self, now: float) -> None:
        """End what takes a replica longer than the service allows it, in the phase that it is in."""
        if self._replica is None and self._hedge is None:
            return
        told, most = self._asking.route.timeouts, self._gateway.limits.silence_s
        quiet_s = now - self._heard_at
        if told.whole and now - self._taken_at > told.whole:
            self._time_out(f"did not finish within {told.whole:g} s")
        elif not self._client.is_writable:
            return
        elif self._response is None:
            if quiet_s > min(told.first_byte, most):
                self._time_out(f"did not begin to answer within {min(told.first_byte, most):g} s")
        elif quiet_s > min(told.between, most):
            self._time_out(f"sent nothing more for {min(told.between, most):g} s")

    def _time_out(self, what: str) -> None:
        self._note_variant(is_answered=False)
        self._break("replica_timeout", f"The replica of '{self._asking.route.model}' {what}.", status=504)

    def pause(self) -> None:
        """Read no more from the replica while the client does not keep up."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """Read on."""
        self._heard_at = monotonic()
        if self._upstream is not None:
            self._upstream.resume()

    # What the upstream calls

    def response_failed(self, reason: str, *, started: bool) -> None:
        if self._is_over or self._replica is None:
            return
        self._upstream = None
        self._note_variant(is_answered=False)
        is_known = self._replica.circuit.is_in_doubt
        self._blame(self._replica, reason)
        if started and (self._response is not None or self._hedge is None):
            self._break("replica_failed", "The model's replica broke off in the middle of the response.")
        else:
            self._elsewhere(is_known=is_known)

    # What differs

    @abstractmethod
    def response_started(self, head: ResponseHead) -> None:
        """The head of the response came."""

    @abstractmethod
    def response_data(self, data: bytes) -> None:
        """Part of its body came."""

    @abstractmethod
    def response_ended(self) -> None:
        """It is whole."""

    @abstractmethod
    def transmit(self, receiver: Receiver, upstream: UpstreamConnection, replica: Replica) -> None:
        """Send the request, the response to which goes to ``receiver``."""

    @property
    def _may_send_again(self) -> bool:
        """Whether it does no harm that a replica may have begun to work on it before."""
        return True

    @abstractmethod
    def _moved(self, route: Route) -> None:
        """It is for another model from now on."""

    @abstractmethod
    def _break(self, code: str, message: str, *, status: int = 502) -> None:
        """End a response that cannot be completed."""

    @abstractmethod
    def _settle(self) -> None:
        """Enter what it took, now that it is over."""

    def _reported(self) -> tuple[int, int] | None:
        """Prompt and completion tokens, as far as they were told of."""
        return None

    # Ways there

    def _headers_for(self, head: RequestHead, *, without: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
        """The request's headers that go on to a replica, with the trace that this is part of."""
        if self._trace is None:
            return end_to_end(head.headers, without=without)
        dropped = {b"traceparent"} if self._trace.parent_id else {b"traceparent", b"tracestate"}
        return [*end_to_end(head.headers, without=without | dropped), (b"traceparent", self._trace.header)]

    @property
    def _route(self) -> Route:
        """The model's route as it is now."""
        return self._gateway.route_now(self._asking.route)

    def _is_hopeless(self, route: Route) -> bool:
        """Whether no replica that comes, or comes again, would be sent to."""
        if self._sent >= 2 or not self._gateway.has_route(route):
            return True
        wish = self._asking.wish
        if wish is not None and wish.countries and route.replicas and not route.may_serve(wish):
            return True
        alive = [one for one in route.replicas if one.circuit.state is State.CLOSED and not one.circuit.is_suspect]
        return bool(alive) and all(one in self._tried for one in alive)

    def _choose_variant(self, route: Route) -> Replica | None:
        """A replica of the variant that was drawn; it is drawn anew only when there is none any more."""
        wish = self._asking.wish or routing.ANY
        if self._variant is None or all(one.variant != self._variant for one in route.takers(wish, tried=self._tried)):
            self._variant = route.draw(wish, tried=self._tried)
        if self._variant is None:
            return None
        return route.choose(wish=wish, variant=self._variant, tried=self._tried)

    def _fall_back(self) -> Replica | None:
        """A replica of the next model that can take it now; then it is for that one. None: no other can."""
        gateway, asking = self._gateway, self._asking
        for name in self._fallbacks:
            route = gateway.fallback(name, asking.key)
            if route is None or gateway.line(name).count or (self.needs_open and not route.is_open):
                continue
            if route.guards is not None and (self._guards is None or route.guards.raw != self._guards.raw):
                continue  # it was not looked at by that model's rules
            variant = route.draw(asking.wish or routing.ANY) if route.weights else None
            if route.weights and variant is None:
                continue
            replica = route.choose(wish=asking.wish, variant=variant)
            if replica is None:
                continue
            self._leave_line()
            self._fallbacks = self._fallbacks[self._fallbacks.index(name) + 1 :]
            self._move(route)
            self._variant, self._tried, self._sent = variant, (), 0
            return replica
        return None

    def _move(self, route: Route) -> None:
        """It is for another model from now on: that one's figures count it, while its own still needs a replica."""
        self._counts.in_flight -= 1
        if self._left is None:
            self._left = self._asking.route
            self._left.course.diverted += 1
        self._desk = self._gateway.desk(route.model)
        self._counts = self._desk.counts
        self._counts.requests += 1
        self._counts.in_flight += 1
        self._timings = self._desk.timings(self._asking.operation)
        self._asking = replace(self._asking, route=route)
        self._moved(route)

    def _wait(self, line: Line) -> None:
        """Wait in line for a replica, unless that would take too long."""
        route, asking = self._route, self._asking
        now = monotonic()
        if self._until is None:
            self._until = now + (route.wait_s if asking.wait_s is None else asking.wait_s)
        left = self._until - now
        if left <= 0:
            self._give_up()
            return
        expected = line.expected_s(route, asking.tenant, band=asking.band)
        most = self._gateway.limits.waiting
        if line.count >= most or line.of(asking.tenant) >= max(1, most // 2):
            self._refuse("queue_full", "Too many requests wait", expected or 1.0, is_own=line.count < most)
        elif expected * CAUTION > left:
            self._refuse("overloaded", "No replica will be free in time", expected)
        else:
            self._line = line
            self._is_cold = self._is_cold or not any(
                one.circuit.allows and not one.is_leaving for one in route.replicas
            )
            line.join(self, asking.tenant, band=asking.band, is_first=self._had_a_turn)
            self._counts.waiting += 1
            self._deadline = asyncio.get_running_loop().call_later(left, self._run_out)
            if line.picky and line.count > 1:  # those before may wait for what this one does not need
                line.advance()

    def _leave_line(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._line is not None:
            line, self._line = self._line, None
            self._counts.waiting -= 1
            line.leave(self, self._asking.tenant, band=self._asking.band)

    def _run_out(self) -> None:
        """The time is over in which it may wait."""
        self._leave_line()
        if not self._is_over:
            self._give_up()

    async def _connect(self, replica: Replica) -> None:
        try:
            upstream = await self._gateway.pool.connect(replica.address, within_s=self._asking.route.timeouts.connect)
        except (OSError, ValueError) as error:
            self._connecting = None
            if not self._is_over:
                if getattr(error, "errno", None) not in OWN_TROUBLE:
                    self._note_variant(is_answered=False)
                self._why_refused = str(error)
                self._unassign()
                if getattr(error, "errno", None) in OWN_TROUBLE:
                    self._refuse("overloaded", f"The gateway has no room ({error})", 1.0)
                    return
                self._gateway.eject(replica, f"it cannot be reached: {error}")
                self.start()
            return
        self._connecting = None
        if self._is_over:
            self._gateway.pool.give(upstream, replica.address)
        elif upstream.is_usable:
            replica.heard_at = self._heard_at = monotonic()
            self._send(upstream, replica)
        else:
            self._unassign()
            self.start()

    def _send(self, upstream: UpstreamConnection, replica: Replica) -> None:
        self._upstream = upstream
        self._was_reused = upstream.served > 0
        self._sent += 1
        if self._trace is not None:
            self._sent_at = monotonic()
            self._trace.step("connect", self._taken_at, self._sent_at)
        self.transmit(self, upstream, replica)
        if not self._client.is_writable:
            upstream.pause()
        asking = self._asking
        if asking.may_repeat and asking.route.hedge_s and self._hedge is None and self._hedging is None:
            self._hedging = asyncio.get_running_loop().call_later(asking.route.hedge_s, self._begin_hedge)

    def _elsewhere(self, *, is_known: bool) -> None:
        """Try another replica, after one that may have begun to work on this.

        ``is_known``: that replica had broken something before. All that it takes with it goes elsewhere once: only what
        shows first that something is wrong comes out of the budget.
        """
        replica = self._replica
        if replica is not None and not self._was_reused:  # else it may only have closed an idle connection meanwhile
            self._tried += (replica,)
        self._unassign()
        if self._hedge is not None:
            return  # it is with another one already
        if (
            self._sent >= 2
            or not self._may_send_again
            or not (self._was_reused or is_known or self._asking.route.course.budget.spend())
        ):
            self._give_up()
        else:
            self.start()

    def _blame(self, replica: Replica, reason: str) -> None:
        """It broke off: find out whether it is still there."""
        replica.answered += 1
        replica.failed += 1
        self._log(f"replica {replica.job} of {self._asking.route.model}: {reason}")
        self._gateway.suspect(replica, self._asking.route)

    def _assign(self, replica: Replica) -> None:
        self._replica = replica
        if replica.circuit.state is not _CLOSED:
            replica.circuit.begin()
        replica.under_way.add(self)
        replica.turn = self._gateway.next_turn()

    def _unassign(self) -> None:
        if self._replica is not None:
            replica, self._replica = self._replica, None
            replica.under_way.discard(self)
            if self._response is None:
                replica.circuit.cancel()

    def _begin(self, head: ResponseHead) -> None:
        """There is a response: no other replica is asked any more, and what this one does is noted."""
        self._response = head
        if self._hedging is not None or self._hedge is not None:
            self._end_hedge()
        replica, now = self._replica, monotonic()
        if replica is not None:
            replica.answered += 1
            replica.waited_s += now - self._taken_at
            if head.status >= 500:
                replica.failed += 1
                if replica.outlier_times and replica.circuit.state is State.HALF_OPEN:
                    self._gateway.peers.give_up(replica, "its trial was answered with an error", now)
        self._hear(now)

    def _hear(self, now: float) -> None:
        """Something of the response came."""
        self._heard_at = now
        replica = self._replica
        if replica is not None:
            replica.heard_at = now
            if replica.circuit.state is not _CLOSED:
                replica.circuit.answered(now=now)
                self._gateway.advance(self._asking.route.model)

    def _note_variant(self, *, is_answered: bool) -> None:
        """Count what a revision made of a request, while there is another one to compare it with."""
        replica = self._replica
        if replica is not None and replica.variant:
            took_s = monotonic() - self._taken_at if is_answered else None
            self._gateway.metrics.of_variant(self._asking.route.model, replica.variant).note(took_s)

    # A second replica at the same time

    def _begin_hedge(self) -> None:
        """Send it to another replica as well, since this one takes long."""
        self._hedging = None
        if self._is_over or self._response is not None or self._hedge is not None or self._replica is None:
            return
        route = self._route
        tried = [*self._tried, self._replica]
        other = route.choose(wish=self._asking.wish, variant=self._variant, tried=tried)
        if other is not None and route.course.budget.spend():
            self._counts.hedges += 1
            self._hedge = Hedge(self, self._gateway, other, connect_s=route.timeouts.connect)
            self._hedge.start()

    def overtaken(self, hedge: Hedge, upstream: UpstreamConnection, head: ResponseHead) -> None:
        """The second replica answers first: it is the one, and the first is to stop at once."""
        slower, self._upstream = self._upstream, upstream
        if slower is not None:
            slower.abandon()
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        self._unassign()
        self._hedge = None
        self._replica = hedge.replica
        hedge.replica.under_way.discard(hedge)
        hedge.replica.under_way.add(self)
        upstream.hand_over(self)
        self.response_started(head)

    def hedge_failed(self, reason: str, *, is_ejected: bool = False) -> None:
        """The second replica broke off, or cannot be reached."""
        hedge, self._hedge = self._hedge, None
        if hedge is None or self._is_over:
            return
        if not is_ejected:
            self._blame(hedge.replica, reason)
        self._tried += (hedge.replica,)
        if self._replica is None:  # the first one broke off before
            self._sent = 2
            self._give_up()

    def _end_hedge(self) -> None:
        """There is an answer, or none is wanted: a second replica is to stop at once."""
        if self._hedging is not None:
            self._hedging.cancel()
            self._hedging = None
        hedge, self._hedge = self._hedge, None
        if hedge is not None:
            hedge.cancel()

    # Ends

    def _give_up(self) -> None:
        """No replica is left to try, or none came in time."""
        if self._fallbacks and (not self._sent or self._may_send_again) and self._go_to(self._fall_back()):
            return
        name, wish = self._asking.route.model, self._asking.wish
        if wish is not None and wish.countries and not self._sent and not self._route.may_serve(wish):
            answer = answers.overloaded(
                "no_replica_in_countries",
                f"No replica of '{name}' is in {', '.join(sorted(wish.countries))}, where this may be served.",
                retry_after_s=5,
            )
        elif self._sent:
            answer = answers.refuse(502, "replica_failed", f"The replica of '{name}' broke off before it answered.")
        elif self._why_refused:
            why = f"No replica of '{name}' can be reached: {self._why_refused}."
            answer = answers.overloaded("replica_refused", why, retry_after_s=2)
        elif any(not one.is_leaving and one.circuit.allows for one in self._route.replicas):
            answer = answers.overloaded("overloaded", f"No replica of '{name}' was free in time.", retry_after_s=2)
        else:
            after = retry_after_s(self._route.start_s or _USUAL_START_S)
            answer = answers.overloaded(
                "no_ready_replica", f"No replica of '{name}' is ready yet.", retry_after_s=after
            )
        self._end_with(answer)

    def _refuse(self, code: str, why: str, expected_s: float, *, is_own: bool = False) -> None:
        """Say at once that there is no room: with 429 when it is the tenant's own requests that fill it."""
        if self._fallbacks and self._go_to(self._fall_back()):
            return
        message = f"{why} for '{self._asking.route.model}'. Come again in a while."
        after = retry_after_s(expected_s)
        if is_own:
            answer = answers.refuse(429, code, message, headers=((b"Retry-After", b"%d" % after),))
        else:
            answer = answers.overloaded(code, message, retry_after_s=after)
        self._end_with(answer)

    def _end_with(self, answer: Answer) -> None:
        self._counts.errors += 1
        self._error = answer.code
        self._over()
        self._client.answer(answer, self._request_id)

    def _over(self) -> None:
        self._is_over = True
        self._counts.in_flight -= 1
        if self._left is not None:
            self._left.course.diverted -= 1
        if self._line is not None:
            self._leave_line()
        if self._hedging is not None or self._hedge is not None:
            self._end_hedge()
        self._note_times()
        self._settle()
        if self._asking.charge is not None:
            self._asking.charge.settle(self._entered)
        self._unassign()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abandon()
        connecting, self._connecting = self._connecting, None
        if connecting is not None and connecting is not asyncio.current_task():
            connecting.cancel()
        if self._desk.line.count:
            self._desk.line.advance()

    # What is told of it

    def _log(self, text: str) -> None:
        _log.info("request %s: %s", self._request_id.decode(), text)

    def _note_times(self) -> None:
        now, first_at = monotonic(), self._first_at
        self._timings.over(self._error, now - self._began_at)
        if first_at and self._response is not None and self._response.is_event_stream:
            self._timings.first.note(first_at - self._began_at)
        if self._trace is not None:
            self._end_trace(now)

    def _end_trace(self, now: float) -> None:
        trace, tracer, asking = self._trace, self._gateway.tracer, self._asking
        if trace is None or tracer is None or not trace.is_sampled:
            return
        trace.step("admit", trace.began_at, self._began_at)
        if self._had_a_turn:
            trace.step("wait", self._began_at, self._taken_at)
        if self._sent_at:
            trace.step("first byte", self._sent_at, self._first_at or now)
        if self._first_at:
            trace.step("stream", self._first_at, now)
        trace.name = f"{asking.operation} {asking.route.model}".strip()
        trace.error = self._error
        trace.attributes = {
            "gen_ai.operation.name": asking.operation,
            "gen_ai.provider.name": "tidemill",
            "gen_ai.request.model": asking.route.model,
            "tidemill.request.id": self._request_id.decode(),
            "tidemill.project": asking.tenant or asking.route.project,
            "tidemill.key": asking.token,
            "tidemill.replica": self._replica.job if self._replica is not None else "",
            "tidemill.tries": self._sent,
        }
        if self._error:
            trace.attributes["error.type"] = self._error
        if self._response is not None:
            trace.attributes["http.response.status_code"] = self._response.status
        reported = self._reported()
        if reported is not None:
            trace.attributes |= {"gen_ai.usage.input_tokens": reported[0], "gen_ai.usage.output_tokens": reported[1]}
        tracer.end(trace, now)
