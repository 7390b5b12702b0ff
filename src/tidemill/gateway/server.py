"""What all connections of a gateway share, and the rules of who may ask what of which model.

The order in which a request is judged, each step before the next may cost anything: the head's form, the Host, the
key, the path, the size, then the body and its model.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import orjson

from tidemill.control.clock import SteadyClock
from tidemill.core import tokens
from tidemill.gateway import answers, services
from tidemill.gateway.affinity import session_for, session_of, wish_of
from tidemill.gateway.answers import Answer
from tidemill.gateway.books import Books, Refused
from tidemill.gateway.circuit import State
from tidemill.gateway.connection import Connection
from tidemill.gateway.felt import Felt
from tidemill.gateway.guarding import Guarding, Refusal, Who, at_once, check_request, gives_way
from tidemill.gateway.health import Prober
from tidemill.gateway.journey import Asking
from tidemill.gateway.messages import Headers, RequestHead
from tidemill.gateway.metering import prepared
from tidemill.gateway.metrics import OPERATIONS, Metrics, ModelCounts, OperationCounts
from tidemill.gateway.passage import Passage, Sender
from tidemill.gateway.peers import Peers
from tidemill.gateway.rations import Rations
from tidemill.gateway.scraping import FRESH_S, Scraper
from tidemill.gateway.siblings import Siblings
from tidemill.gateway.table import Key, Replica, Route, Table
from tidemill.gateway.tracing import Tracer
from tidemill.gateway.upstream import Pool
from tidemill.gateway.waiting import Line
from tidemill.gateway.wishes import Salts, read_wishes, user_of
from tidemill.model.guard import Stage

INFERENCE_PATHS: Final = frozenset(
    {b"/v1/completions", b"/v1/chat/completions", b"/v1/embeddings", b"/v1/responses", b"/v1/rerank"}
)
_MODELS_PATH: Final = b"/v1/models"
_GUARDING_THREADS: Final = 4
_USAGE_ON_REQUEST: Final = frozenset({b"/v1/completions", b"/v1/chat/completions"})
"""Where a stream tells of its usage only when it is asked to."""
_SALTED: Final = frozenset({b"/v1/completions", b"/v1/chat/completions", b"/v1/responses"})
"""What engines keep prefixes of."""
_REPEATABLE: Final = frozenset({b"/v1/embeddings", b"/v1/rerank"})
"""What may be asked of two replicas: it changes nothing, and costs what one answer costs."""
_log = logging.getLogger("tidemill.gateway")


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


@dataclass(slots=True)
class Desk:
    """What is kept of one model here: its figures, what its users felt, and who waits for it."""

    counts: ModelCounts
    felt: Felt = field(default_factory=Felt)
    line: Line = field(default_factory=Line)

    def timings(self, operation: str) -> OperationCounts:
        """The times of one kind of request."""
        return self.counts.operations.get(operation) or self.counts.of(operation)


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
        self._desks: dict[str, Desk] = {}
        """What is kept of each model that was asked for and is served."""
        self._own_token = own_token
        self._salts = Salts(pepper)
        self._feed_age_s = feed_age_s
        self._turns = itertools.count(1)
        own = os.urandom(6).hex()
        self._request_prefix = f"req_{own}".encode()
        self._name = f"{place}/{own}"
        self.rations = Rations(self._name, workers=workers, clock=self._clock, copy=limits_copy)
        if books is not None:
            books.on_entered = self.rations.booked
        self._request_numbers = itertools.count(1)

    def adopt(self, table: Table) -> None:
        """Use another table from the next request on, also for those that wait."""
        self.table = table
        self.rations.adopt(table)
        for line in [desk.line for desk in self._desks.values() if desk.line.count]:
            line.advance()

    def desk(self, model: str) -> Desk:
        """What is kept of a routed model."""
        desk = self._desks.get(model)
        if desk is None:
            desk = self._desks[model] = Desk(counts=self.metrics.of(model))
        return desk

    def line(self, model: str) -> Line:
        """Where requests wait for that model."""
        return self.desk(model).line

    def advance(self, model: str) -> None:
        """There may be room for a request that waits."""
        desk = self._desks.get(model)
        if desk is not None and desk.line.count:
            desk.line.advance()

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
            counts, desk = self.metrics.models.get(model), self._desks.get(model)
            has_felt = with_felt and desk is not None
            diverted = route.course.diverted
            if counts is not None and (counts.in_flight or diverted or has_felt):
                waiting = counts.waiting + diverted
                models[model] = {"in_flight": counts.in_flight - counts.waiting, "waiting": waiting}
                if has_felt and desk is not None:
                    models[model]["felt"] = desk.felt.told()
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
        path = head.path
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
            head.request_id = head.given_id or b"%b%08x" % (self._request_prefix, next(self._request_numbers))
        return head.request_id

    def admit(self, head: RequestHead, *, is_loopback: bool) -> Key | Answer | None:
        """The key of a request whose body may now be read, None for an open path, or the answer that refuses it."""
        if not head.target.startswith(b"/"):
            return answers.refuse(400, "invalid_target", "The request's target must be a path.")
        if not self._is_host(head):
            return answers.refuse(421, "host_not_allowed", "This gateway does not answer to that Host.")
        path = head.path
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
        path = head.path
        table = self.table
        if key is not None and table is not None and path in INFERENCE_PATHS:
            return self._inference(head, key, body, table)
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
        name = unquote(path[len(_MODELS_PATH) + 1 :].decode("ascii"))
        route = table.route(name, key)
        return answers.model(route) if route else answers.model_not_found(name, table.near(name, key))

    def _inference(
        self, head: RequestHead, key: Key, body: bytes, table: Table
    ) -> Answer | Asking | Coroutine[Any, Any, Answer | Asking]:
        """The same for a request to a model."""
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
        path = head.path
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
        if head.own or "metadata" in content:
            refusal = read_wishes(asking, head, content, longest_wait_s=self.limits.longest_wait_s)
            if refusal is not None:
                return refusal
        if not route.is_plain or asking.countries:
            asking.wish = wish_of(asking, head.headers, path, key, content)
        asks_usage = self.books is not None and path in _USAGE_ON_REQUEST and content.get("stream") is True
        salt = self.salt(route, path, key.project) if route.is_salted else ""
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
        headers: Headers = head.headers
        cookie = b""
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
