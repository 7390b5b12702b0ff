"""The client side: one connection reads one request at a time, and an exchange carries it to a replica and back.

The order in which a request is judged, each step before the next may cost anything: the head's form, the Host, the
key, the path, the size, then the body and its model. What follows a request on the same connection (pipelining)
stays unread bytes until the answer is out, so a client's going away is seen in every phase.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import unquote

import orjson

from tidemill.control.clock import SteadyClock
from tidemill.core import tokens
from tidemill.gateway import answers, services
from tidemill.gateway.affinity import session_for, session_of, wish_of
from tidemill.gateway.answers import Answer
from tidemill.gateway.books import Books, Refused
from tidemill.gateway.circuit import State
from tidemill.gateway.exchange import Exchange
from tidemill.gateway.felt import Felt
from tidemill.gateway.guarding import Guarding, Refusal, Who, at_once, check_request, gives_way
from tidemill.gateway.health import Prober
from tidemill.gateway.journey import Asking, Journey
from tidemill.gateway.messages import ChunkedBody, Malformed, RequestHead, cut_head, read_request, write_head
from tidemill.gateway.metering import prepared
from tidemill.gateway.metrics import OPERATIONS, Metrics
from tidemill.gateway.passage import Passage, Sender
from tidemill.gateway.peers import Peers
from tidemill.gateway.rations import Rations
from tidemill.gateway.scraping import FRESH_S, Scraper
from tidemill.gateway.siblings import Siblings
from tidemill.gateway.table import Key, Replica, Route, Table
from tidemill.gateway.tracing import Tracer
from tidemill.gateway.upstream import Pool, is_gone, tune
from tidemill.gateway.waiting import Line
from tidemill.gateway.wishes import Salts, read_wishes, user_of
from tidemill.model.guard import Stage

INFERENCE_PATHS: Final = frozenset(
    {b"/v1/completions", b"/v1/chat/completions", b"/v1/embeddings", b"/v1/responses", b"/v1/rerank"}
)
_MODELS_PATH: Final = b"/v1/models"
_READ_AHEAD: Final = 64 * 1024
_GUARDING_THREADS: Final = 4
_DRAINED_BODY: Final = 64 * 1024
_REQUESTS_PER_STEP: Final = 64
_USAGE_ON_REQUEST: Final = frozenset({b"/v1/completions", b"/v1/chat/completions"})
"""Where a stream tells of its usage only when it is asked to."""
_SALTED: Final = frozenset({b"/v1/completions", b"/v1/chat/completions", b"/v1/responses"})
"""What engines keep prefixes of."""
_REPEATABLE: Final = frozenset({b"/v1/embeddings", b"/v1/rerank"})
"""What may be asked of two replicas: it changes nothing, and costs what one answer costs."""
_log = logging.getLogger("tidemill.gateway")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may cost, in bytes and seconds."""

    body: int = 32 * 1024 * 1024
    bodies: int = 512 * 1024 * 1024
    """All request bodies held at one time."""
    connections: int = 8192
    idle_s: float = 75.0
    head_s: float = 10.0
    """From a head's first byte to its last."""
    body_s: float = 20.0
    """For a body, beyond what ``body_rate`` allows it."""
    body_rate: int = 64 * 1024
    """Bytes a second that a body must come with on average."""
    silence_s: float = 86_400.0
    """How long a replica may send nothing, whatever its service allows it."""
    stall_s: float = 60.0
    """How long a client may take nothing of an answer that waits for it."""
    linger_s: float = 2.0
    passed_rate: int = 1024
    """Bytes a second with which a body that is passed on has to come on average, beyond ``body_s``."""
    waiting: int = 1024
    """Requests of one model that may wait for a replica; one tenant's at most half of them."""
    longest_wait_s: float = 600.0


class Gateway:
    """What all connections share: the table, the pool, the figures, and the rules of who may do what."""

    def __init__(
        self,
        *,
        pepper: bytes,
        own_token: Callable[[], str],
        hosts: frozenset[bytes],
        limits: Limits | None = None,
        feed_age_s: Callable[[], float] = lambda: 0.0,
        books: Books | None = None,
        place: str = "",
        clock: Callable[[], int] | None = None,
        workers: int = 1,
        limits_copy: Path | None = None,
        rulings: Books | None = None,
    ) -> None:
        """``books`` is where usage is entered; None: tokens are not metered. ``place`` is where this one listens.

        ``workers`` is how many share the limits, as long as the control plane does not say; what is left of those is
        written to ``limits_copy``. ``rulings`` is where is entered what guardrails decided; None: it is only counted.

        ``clock`` gives ns since 1970, and does not jump when the machine's time of day is set.
        """
        self._clock = clock or SteadyClock()
        self.pepper = pepper
        self.hosts = hosts
        self.limits = limits or Limits()
        self.table: Table | None = None
        self.pool = Pool()
        self.metrics = Metrics()
        self.connections: set[Connection] = set()
        self.held = 0
        """Bytes of request bodies held now."""
        self.is_draining = False
        self.books = books
        self.siblings: Siblings | None = None
        """Those that listen at the same address, where there are some."""
        self.rulings = rulings
        self._threads: ThreadPoolExecutor | None = None
        self.tracer: Tracer | None = None
        """What traces go to, where there is a collector."""
        self.peers = Peers(self.eject)
        """What compares the replicas of a model."""
        self.prober: Prober | None = None
        """What looks at replicas from outside, while it runs."""
        self.felt: dict[str, Felt] = {}
        """What users felt, by model that was asked for and is served."""
        self._lines: dict[str, Line] = {}
        self._own_token = own_token
        self._salts = Salts(pepper)
        self._feed_age_s = feed_age_s
        self._turns = itertools.count(1)
        self._request_prefix = os.urandom(6).hex()
        self._name = f"{place}/{self._request_prefix}"
        self.rations = Rations(self._name, workers=workers, clock=self._clock, copy=limits_copy)
        if books is not None:
            books.on_entered = self.rations.booked
        self._request_numbers = itertools.count(1)

    def adopt(self, table: Table) -> None:
        """Use another table from the next request on, also for those that wait."""
        self.table = table
        self.rations.adopt(table)
        for model in [model for model, line in self._lines.items() if line.count]:
            self._lines[model].advance()

    def line(self, model: str) -> Line:
        """Where requests wait for that model."""
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = Line()
        return line

    def advance(self, model: str) -> None:
        """There may be room for a request that waits."""
        line = self._lines.get(model)
        if line is not None and line.count:
            line.advance()

    def has_route(self, route: Route) -> bool:
        """Whether the model is still served."""
        return self.table is not None and route.model in self.table.routes

    def route_now(self, route: Route) -> Route:
        """The route of the same model as it is now."""
        return self.table.routes.get(route.model, route) if self.table is not None else route

    def fallback(self, model: str, key: Key | None) -> Route | None:
        """The route of another model that may answer instead; None when there is none for the key's holder."""
        route = self.table.routes.get(model) if self.table is not None else None
        return route if route is not None and (key is None or key.may_use(route)) else None

    # Replicas that fail

    def watch_replicas(self) -> Prober:
        """What probes all replicas while it runs, from now on also those of which something broke."""
        self.prober = Prober(
            lambda: self.table.routes.values() if self.table is not None else (),
            hung=self._hung,
            gone=self.eject,
            well=self._well,
        )
        return self.prober

    def eject(self, replica: Replica, why: str, pause_s: float = 0.0) -> None:
        """Send nothing more to a replica until it is well again, for ``pause_s`` at least."""
        if not replica.circuit.fail(why, now=asyncio.get_running_loop().time(), pause_s=pause_s):
            return
        self.pool.forget(replica.address)
        for route in self._routes_of(replica):
            self.metrics.of(route.model).ejections += 1
            _log.warning("replica %s of %s is ejected: %s", replica.job, route.model, why)
            self.advance(route.model)

    def suspect(self, replica: Replica, route: Route) -> None:
        """Find out at once whether a replica that broke something is still there; meanwhile others go first."""
        if self.prober is not None:
            replica.circuit.is_suspect = True
            self.prober.look(replica, route.health)

    def _hung(self, replica: Replica, why: str) -> None:
        self.eject(replica, why)
        for one in list(replica.under_way):
            one.ejected(why)

    def _well(self, replica: Replica) -> None:
        was_suspect = replica.circuit.is_suspect
        if replica.circuit.probed(now=asyncio.get_running_loop().time()) or was_suspect:
            for route in self._routes_of(replica):
                self.advance(route.model)

    def felt_of(self, model: str) -> Felt:
        """Where what users of a model feel is counted."""
        felt = self.felt.get(model)
        if felt is None:
            felt = self.felt[model] = Felt()
        return felt

    def scrape_replicas(self) -> Scraper:
        """What asks all replicas for their engine's own figures while it runs."""
        return Scraper(lambda: self.table.routes.values() if self.table is not None else ())

    def load(self, *, with_felt: bool = True) -> bytes:
        """What the control plane follows with the number of replicas, as JSON; without what was felt it is short."""
        routes = self.table.routes if self.table is not None else {}
        now = asyncio.get_running_loop().time()
        models: dict[str, dict[str, Any]] = {}
        replicas: dict[str, dict[str, Any]] = {}
        for model, route in routes.items():
            counts, felt = self.metrics.models.get(model), self.felt.get(model)
            has_felt = with_felt and felt is not None
            diverted = route.course.diverted
            if counts is not None and (counts.in_flight or diverted or has_felt):
                waiting = counts.waiting + diverted
                models[model] = {"in_flight": counts.in_flight - counts.waiting, "waiting": waiting}
                if has_felt and felt is not None:
                    models[model]["felt"] = felt.told()
            for replica in route.replicas:
                replicas[replica.job] = told = {"in_flight": replica.outstanding, "is_leaving": replica.is_leaving}
                if now - replica.told_at < FRESH_S:
                    told |= {"queued": replica.queued, "running": replica.running}
                    if replica.cache_milli is not None:
                        told["cache_milli"] = replica.cache_milli
                    if replica.first_token_s is not None:
                        told["first_token_ms"] = round(replica.first_token_s * 1000)
        load = {"worker": self._name, "models": models, "replicas": replicas}
        if variants := self._variants():
            load["variants"] = variants
        return orjson.dumps(load)

    def _variants(self) -> dict[str, dict[str, Any]]:
        """What became of requests to each revision of those models that are served by two."""
        routes = self.table.routes if self.table is not None else {}
        return {
            model: {
                name: {
                    "requests": one.requests,
                    "errors": one.errors,
                    "slow": {str(bucket): count for bucket, count in one.slow.items()},
                }
                for name, one in counts.items()
            }
            for model, counts in self.metrics.variants.items()
            if model in routes and any(replica.variant for replica in routes[model].replicas)
        }

    def metrics_text(self) -> bytes:
        """This process's figures, as Prometheus text."""
        return self.metrics.text(
            connections=len(self.connections),
            feed_version=self.table.version if self.table is not None else -1,
            feed_age_s=self._feed_age_s(),
            replicas=self._states(),
        )

    async def tell_load(
        self, tell: Callable[[bytes], Awaitable[None]], *, every_s: float = 0.1, at_least_every_s: float = 1.0
    ) -> None:
        """Tell the load for ever, when it changes and every while; what was felt goes with it only every while."""
        loop, told, told_at = asyncio.get_running_loop(), b"", float("-inf")
        felt_at = float("-inf")
        while True:
            await asyncio.sleep(every_s)
            load, now = self.load(with_felt=False), loop.time()
            if load != told or now - told_at >= at_least_every_s:
                told, told_at = load, now
                with_felt = now - felt_at >= at_least_every_s
                felt_at = now if with_felt else felt_at
                try:
                    await tell(self.load() if with_felt else load)
                except (OSError, Refused) as error:
                    _log.debug("the load was not heard: %s", error)
                    told = b""

    def _states(self) -> dict[tuple[str, str], int]:
        """How many replicas of each model have their circuit in each state."""
        routes = self.table.routes if self.table is not None else {}
        found = {(model, state.value): 0 for model in routes for state in State}
        for model, route in routes.items():
            for replica in route.replicas:
                found[model, replica.circuit.state.value] += 1
        return found

    def _routes_of(self, replica: Replica) -> list[Route]:
        routes = self.table.routes.values() if self.table is not None else ()
        return [route for route in routes if replica in route.replicas]

    def connection(self) -> Connection:
        """The protocol of a new client."""
        return Connection(self)

    async def sweep(self, *, every_s: float = 0.25) -> None:
        """End what takes longer than the limits, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every_s)
            now = loop.time()
            for connection in list(self.connections):
                connection.check(now)
            self.pool.sweep(now)
            if self.table is not None:
                self.peers.look(self.table.routes.values(), now)

    async def drain(self, *, within_s: float) -> None:
        """Let what is under way end, for at most ``within_s``, then close everything."""
        self.is_draining = True
        for connection in list(self.connections):
            connection.close_when_idle()
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while self.connections and loop.time() < until:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()
        self.pool.close()

    # Guardrails

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Where guardrails look that take long."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_GUARDING_THREADS, "guard")
        return self._threads

    def rule(
        self, guards: Guarding, who: Who, stage: Stage, found: Mapping[str, Mapping[str, int]], refused: str = ""
    ) -> None:
        """Count and enter what guardrails decided about a request; ``refused`` names the one that ended it."""
        counts = self.metrics.decisions
        for ruling in guards.rulings(who, stage, found, refused):
            key = (ruling.model, ruling.rule, ruling.action)
            counts[key] = counts.get(key, 0) + 1
            if self.rulings is not None:
                ruling.id = self.rulings.next_id()
                self.rulings.settle(ruling)

    async def _guarded(
        self, guards: Guarding, head: RequestHead, key: Key, content: dict[str, Any], body: bytes, route: Route
    ) -> Answer | Asking:  # fmt: skip
        """What is asked for, as far as the guardrails let it pass."""
        found: dict[str, dict[str, int]] = {}
        who = Who(self.request_id(head).decode(), key.project or route.project, key.id, route.model)
        path = head.target.partition(b"?")[0]
        try:
            if await check_request(guards, content, size=len(body), path=path, threads=self, found=found):
                body = orjson.dumps(content)
        except Refusal as refusal:
            self.rule(guards, who, Stage.REQUEST, refusal.noted_in(found), refusal.rule.name)
            return refusal.answer
        self.rule(guards, who, Stage.REQUEST, found)
        return self._asked(head, key, content, body, route, flags=guards.flags(found))

    def next_turn(self) -> int:
        """A number larger than any before."""
        return next(self._turns)

    def request_id(self, head: RequestHead) -> bytes:
        """The client's request id when it gave an acceptable one, else a new one; the same however often asked."""
        if not head.request_id:
            given = (value for name, value in head.headers if name == b"x-request-id" and _REQUEST_ID.fullmatch(value))
            new = b"req_%b%08x" % (self._request_prefix.encode(), next(self._request_numbers))
            head.request_id = next(given, new)
        return head.request_id

    def admit(self, head: RequestHead, *, is_loopback: bool) -> Key | Answer | None:
        """The key of a request whose body may now be read, None for an open path, or the answer that refuses it."""
        if not head.target.startswith(b"/"):
            return answers.refuse(400, "invalid_target", "The request's target must be a path.")
        if not self._is_host(head):
            return answers.refuse(421, "host_not_allowed", "This gateway does not answer to that Host.")
        path = head.target.partition(b"?")[0]
        if path == b"/health":
            return None if head.method in (b"GET", b"HEAD") else _wrong_method(b"GET, HEAD")
        secret = _bearer(head)
        if isinstance(secret, Answer):
            return secret
        if path == b"/metrics" and is_loopback and self._is_own(secret):
            return Key(scopes=frozenset({"gateway"}), project="", expires_ns=0)
        table = self.table
        if table is None:
            return _starting()
        key = table.key(secret, self.pepper)
        if key is None:
            return answers.unauthorized("Incorrect API key provided. Tidemill's keys begin with tm_user_.")
        if key.expires_ns and key.is_expired(now=self._clock()):
            return answers.unauthorized("This API key has expired.")
        if path == b"/metrics":
            if not is_loopback or "admin" not in key.scopes or key.project:
                return answers.refuse(403, "insufficient_scope", "Metrics need the scope admin, on this machine.")
            return key if head.method == b"GET" else _wrong_method(b"GET")
        if not key.may_infer:
            return answers.refuse(403, "insufficient_scope", "This API key lacks the scope infer.")
        if path in INFERENCE_PATHS:
            return key if head.method == b"POST" else _wrong_method(b"POST")
        if path == _MODELS_PATH or path.startswith(_MODELS_PATH + b"/"):
            return key if head.method == b"GET" else _wrong_method(b"GET")
        if path.startswith(services.PREFIX):
            return key
        return answers.refuse(404, "unknown_url", f"There is no {path[:256].decode('ascii', 'replace')} here.")

    def answer(
        self, head: RequestHead, key: Key | None, body: bytes
    ) -> Answer | Asking | Coroutine[Any, Any, Answer | Asking]:
        """The answer to a whole request, or what is to be asked of a replica; or steps to it that take a while."""
        path = head.target.partition(b"?")[0]
        table = self.table
        if key is None:
            if table is None:
                return Answer(status=503, body=b'{"status":"starting"}', headers=((b"Retry-After", b"2"),))
            return Answer(status=200, body=b'{"status":"ok"}')
        if path == b"/metrics":
            text = self.metrics_text() if self.siblings is None else self.siblings.text()
            return Answer(status=200, body=text, content_type=b"text/plain; version=0.0.4; charset=utf-8")
        if table is None:
            return _starting()
        if path == _MODELS_PATH:
            return answers.model_list(table.visible(key))
        if path not in INFERENCE_PATHS:
            name = unquote(path[len(_MODELS_PATH) + 1 :].decode("ascii"))
            route = table.route(name, key)
            return answers.model(route) if route else answers.model_not_found(name, table.near(name, key))
        content = _content(body)
        if isinstance(content, Answer):
            return content
        model: str = content["model"]
        route = table.route(model, key)
        if route is None:
            return answers.model_not_found(model, table.near(model, key))
        if route.guards is None:
            return self._asked(head, key, content, body, route)
        steps = self._guarded(route.guards, head, key, content, body, route)
        return steps if gives_way(route.guards, len(body)) else at_once(steps)

    def _asked(
        self, head: RequestHead, key: Key, content: dict[str, Any], body: bytes, route: Route,
        *, flags: tuple[str, ...] = (),
    ) -> Asking | Answer:  # fmt: skip
        """What is to be asked of a replica, or why not."""
        path = head.target.partition(b"?")[0]
        asking = Asking(
            route=route,
            body=body,
            token=key.id,
            tenant=key.project,
            is_metered=self.books is not None,
            band=key.band,
            user=user_of(content),
            label=key.label,
            operation=OPERATIONS.get(path, ""),
            flags=flags,
            key=key,
            countries=key.countries,
            may_repeat=path in _REPEATABLE,
        )
        refusal = read_wishes(asking, head, content, longest_wait_s=self.limits.longest_wait_s)
        if refusal is not None:
            return refusal
        if not route.is_plain or asking.countries:
            asking.wish = wish_of(asking, head.headers, path, key, content)
        asks_usage = self.books is not None and path in _USAGE_ON_REQUEST and content.get("stream") is True
        salt = self.salt(route, path, key.project)
        if asks_usage or salt:
            asked = prepared(body, content, asks_usage=asks_usage, salt=salt)
            asking.body, asking.hides_usage = asked.body, asked.hides_usage
        asking.charge = self.rations.charge(key, route, content, len(body), has_output=path in _SALTED)
        return asking

    def passage(
        self, client: Sender, head: RequestHead, key: Key, *, peer: str, head_at: float = 0.0
    ) -> Passage | Answer:
        """A request to a service that is no model, on its way; or the answer that refuses it."""
        table = self.table
        if table is None:
            return _starting()
        target = services.target_of(head, closed=INFERENCE_PATHS)
        if isinstance(target, Answer):
            return target
        route = table.service(target.service, key)
        if route is None:
            return answers.service_not_found(target.service, table.closed(target.service, key))
        is_upgrade = services.asks_upgrade(head)
        refusal = services.check_upgrade(head) if is_upgrade else None
        if refusal is None and self.held > self.limits.bodies:
            refusal = answers.overloaded("too_many_bodies", "Too much is being sent at once.", retry_after_s=1)
        asking = Asking(
            route=route,
            body=b"",
            token=key.id,
            tenant=key.project,
            band=key.band,
            label=key.label,
            key=key,
            countries=key.countries,
            may_repeat=head.method in services.HEDGED and head.length == 0 and not is_upgrade,
            charge=self.rations.charge(key, route, {}, 0, has_output=False),
        )
        refusal = refusal or read_wishes(asking, head, {}, longest_wait_s=self.limits.longest_wait_s)
        if refusal is not None:
            return refusal
        headers, cookie = head.headers, b""
        if route.affinity == "session" and not session_of(headers, {}):
            headers, cookie = session_for(headers, services.PREFIX + target.service.encode())
        if not route.is_plain or asking.countries:
            asking.wish = wish_of(asking, headers, b"", key, {})
        return Passage(
            self, client, head, asking, target=target, peer=peer, is_upgrade=is_upgrade, cookie=cookie, head_at=head_at
        )

    def salt(self, route: Route, path: bytes, project: str) -> str:
        """What that project's prefixes are kept apart by in the route's engines; empty where there are none."""
        return self._salts.of(project) if route.is_salted and path in _SALTED else ""

    def _is_own(self, secret: str) -> bool:
        return tokens.parse(secret) == "gw" and hmac.compare_digest(secret, self._own_token())

    def _is_host(self, head: RequestHead) -> bool:
        if head.http_1_0 and not head.host:
            return True
        name = head.host.lower()
        if not name.endswith(b"]"):
            bare, colon, port = name.rpartition(b":")
            if colon:
                if port and not port.isdigit():
                    return False
                name = bare
        return name in self.hosts


class _Phase(Enum):
    IDLE = "between requests"
    HEAD = "reading a head"
    BODY = "reading a body"
    RELAY = "passing a body on"
    ANSWER = "answering"
    LINGER = "closing"


_BUSY: Final = frozenset({_Phase.RELAY, _Phase.ANSWER, _Phase.LINGER})


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._now = asyncio.get_running_loop().time
        self._transport: asyncio.Transport | None = None
        self._phase = _Phase.IDLE
        self._since = 0.0
        """When the phase began."""
        self._head_at = 0.0
        """When the head was whole."""
        self._buffer = b""
        self._head: RequestHead | None = None
        self._said = b""
        self._last: RequestHead | None = None
        """The last head as it came, and as it was read."""
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
        self._enter(_Phase.IDLE)
        if len(self.gateway.connections) > self.gateway.limits.connections:
            self._must_close = True
            self._reply(answers.overloaded("too_many_connections", "Too many connections are open.", retry_after_s=1))

    def data_received(self, data: bytes) -> None:
        if self._phase is _Phase.LINGER:
            return
        if self._phase is _Phase.RELAY:
            self._take_passed(data)
            return
        if self._phase is _Phase.BODY:
            self._take_body(data)
        else:
            self._buffer = self._buffer + data if self._buffer else data
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
        elif self._phase is _Phase.IDLE and age > limits.idle_s:
            self._close()
        elif self._phase is _Phase.HEAD and age > limits.head_s:
            self._fail(408, "The header took too long.")
        elif self._phase is _Phase.BODY and age > limits.body_s + self._received / limits.body_rate:
            self._fail(408, "The body took too long.")
        elif self._phase is _Phase.LINGER and age > limits.linger_s:
            self.abort()
        elif self._phase is _Phase.RELAY and self._is_late(now):
            self._cut_off(408, "The body took too long.")
        elif self._exchange is not None:
            if not self._is_reading and self._transport is not None and is_gone(self._transport):
                self.abort()
            else:
                self._exchange.check(now)

    def close_when_idle(self) -> None:
        """Take no further request."""
        self._must_close = True
        if self._phase is _Phase.IDLE:
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
        if self._phase is _Phase.RELAY and self._passage is not None:
            self._read(self._passage.is_hungry)

    def switched(self) -> None:
        """What comes from now on is passed on as it is, also what came already."""
        self._enter(_Phase.RELAY)
        data, self._buffer = self._buffer, b""
        self._take_passed(data)

    def ended(self, *, close: bool) -> None:
        """The answer is out."""
        self._exchange = None
        self._must_close = self._must_close or close
        self._end_request()
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
            if self._phase in _BUSY or not self._is_writable or not self._step():
                break
        else:
            if not self._has_more:
                self._has_more = True
                asyncio.get_running_loop().call_soon(self._advance_later)
        self._is_advancing = False
        if self._phase is not _Phase.RELAY:
            self._read(len(self._buffer) <= _READ_AHEAD or self._phase is _Phase.LINGER)

    def _advance_later(self) -> None:
        self._has_more = False
        if self._transport is not None and not self._transport.is_closing():
            self._advance()

    def _step(self) -> bool:
        """Whether a step was taken: from no request to its head, from its head to its body, to its answer."""
        try:
            if self._phase is _Phase.BODY:
                return self._finish_body()
            if not self._buffer:
                return False
            if self._phase is _Phase.IDLE:
                self._enter(_Phase.HEAD)
                self._ate_empty_line = False
            return self._take_head()
        except Malformed as error:
            self._fail(error.status, error.detail)
            return False

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
        said, last = self._said, self._last
        if last is not None and self._buffer.startswith(said):
            self._buffer = self._buffer[len(said) :]
            return last.again()
        cut = cut_head(self._buffer)
        if cut is None:
            return None
        self._last = None
        self._said, self._buffer = cut
        self._last = read_request(self._said)
        return self._last.again()

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
        if head.expects_continue and head.length != 0:
            self.write(_CONTINUE)
        self._chunks = ChunkedBody() if head.length is None else None
        self._received = 0
        self._enter(_Phase.BODY)
        data, self._buffer = self._buffer, b""
        self._take_body(data)

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
        self._enter(_Phase.ANSWER if head.length == 0 else _Phase.RELAY)
        self._exchange = self._passage = passage
        passage.start()
        if self._phase is _Phase.RELAY and self._passage is passage:
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
            self._enter(_Phase.ANSWER)
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
        self._enter(_Phase.ANSWER)
        outcome = self._refusal or self.gateway.answer(head, self._key, body)
        if isinstance(outcome, Asking | Answer):
            return self._go_on(head, outcome)
        self._checking = asyncio.get_running_loop().create_task(self._checked(head, outcome))
        return True

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

    def _go_on(self, head: RequestHead, outcome: Answer | Asking) -> bool:
        if isinstance(outcome, Answer):
            self._reply(outcome)
            return True
        self._exchange = Exchange(self.gateway, self, head, outcome, head_at=self._head_at)
        self._exchange.start()
        return True

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
        self.release()
        self._head = self._key = self._refusal = self._chunks = self._passage = None
        self._pieces = []
        if self.closes:
            self._close()
        else:
            self._enter(_Phase.IDLE)

    def _close(self) -> None:
        """Send what waits, then close; what still comes is read and dropped, or it would cost the client the answer."""
        if self._transport is None or self._phase is _Phase.LINGER:
            return
        self._buffer = b""
        self._enter(_Phase.LINGER)
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


def _bearer(head: RequestHead) -> str | Answer:
    value = head.header(b"authorization")
    if value is None:
        return answers.unauthorized("You did not provide an API key. Send it as: Authorization: Bearer tm_user_…")
    scheme, _, secret = value.partition(b" ")
    if scheme.lower() != b"bearer" or not secret.isascii():
        return answers.unauthorized("The API key must be sent as: Authorization: Bearer tm_user_…")
    return secret.strip().decode("ascii")


def _content(body: bytes) -> dict[str, Any] | Answer:
    """A request's body, which names a model, or the answer that says what is wrong with it."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return answers.refuse(400, "invalid_json", f"The body is not valid JSON in UTF-8: {error}.")
    if not isinstance(content, dict):
        return answers.refuse(400, "invalid_json", "The body must be a JSON object.")
    model = content.get("model")
    if not isinstance(model, str) or not model:
        return answers.refuse(400, "model_required", "The body must name a model.", param="model")
    return content


def _starting() -> Answer:
    return answers.overloaded("starting", "The gateway has not heard from the control plane yet.", retry_after_s=2)


def _wrong_method(allowed: bytes) -> Answer:
    message = f"Use {allowed.decode()} here."
    return answers.refuse(405, "method_not_allowed", message, headers=((b"Allow", allowed),))


def _too_large(limit: int) -> Answer:
    return answers.refuse(413, "too_large", f"The body is larger than {limit} bytes.")
