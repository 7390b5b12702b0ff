"""What the gateway knows: keys and routes, as the control plane last told them, and which replica is next."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from tidemill.core import routing, tokens
from tidemill.core.routing import SHUT, SUSPECT, TRIAL, WELL, Budget, Ring, Wish
from tidemill.gateway.circuit import Circuit, State
from tidemill.gateway.guarding import Guarding, guarding_of
from tidemill.model.limits import Priority

_ALL_OPEN: Final = frozenset({"infer", "admin"})
_NEAR_NAMES: Final = 3
_CLOSED: Final = State.CLOSED
NORMAL_BAND: Final = Priority.NORMAL.band


class FeedError(ValueError):
    """The feed does not have the shape that was agreed; the last good one stays in use."""


class _Replica(msgspec.Struct):
    job: str
    endpoint: str
    is_leaving: bool = False
    variant: str = ""
    workload: str = ""
    health: str | None = None
    site: str = ""


class _Site(msgspec.Struct):
    country: str = ""
    links: dict[str, int] = {}


class _Timeouts(msgspec.Struct):
    connect: int = 5_000
    first_byte: int = 600_000
    between: int = 600_000
    whole: int = 0


class _Route(msgspec.Struct):
    project: str
    service: str
    replicas: list[_Replica]
    workload: str = ""
    health: str = ""
    concurrency: int = 0
    wait_ms: int = 0
    start_ms: int = 0
    guards: list[dict[str, Any]] = []
    weights: dict[str, int] = {}
    affinity: str = ""
    fallback: list[str] = []
    hedge_ms: int = 0
    timeouts_ms: _Timeouts = msgspec.field(default_factory=_Timeouts)
    is_open: bool = False
    price: tuple[int, int] = (0, 0)
    is_salted: bool = False


class _Key(msgspec.Struct):
    scopes: list[str]
    id: str = ""
    project: str = ""
    expires_ns: int = 0
    countries: list[str] = []
    models: list[str] = []
    limits: dict[str, int] = {}
    band: int = NORMAL_BAND
    label: str = ""


class _Project(msgspec.Struct):
    limits: dict[str, int] = {}


class _Feed(msgspec.Struct):
    version: int
    tokens: dict[str, _Key]
    routes: dict[str, _Route]
    sites: dict[str, _Site] = {}
    home: str = ""
    projects: dict[str, _Project] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a token opens. ``project`` empty means every project; ``expires_ns`` zero means never."""

    scopes: frozenset[str]
    project: str
    expires_ns: int
    id: str = ""
    """The token's, not its secret."""
    countries: frozenset[str] = frozenset()
    """Where its requests may be served, by ISO 3166 alpha-3; empty: anywhere."""
    models: frozenset[str] | None = None
    """Those of the models there are that it may ask; None: all of its holder's."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """What it may ask of models, by the limit's name, money in micro-USD."""
    band: int = NORMAL_BAND
    """Whose turn it is when requests wait; zero is first."""
    label: str = ""
    """What requests are booked under that do not say."""

    def is_expired(self, *, now: int) -> bool:
        """Whether it opens nothing any more at ``now`` (ns)."""
        return bool(self.expires_ns) and now >= self.expires_ns

    @property
    def may_infer(self) -> bool:
        """Whether it opens the services' endpoints."""
        return not _ALL_OPEN.isdisjoint(self.scopes)

    def may_use(self, route: Route) -> bool:
        """Whether that route exists for its holder."""
        if self.models is not None and route.model not in self.models:
            return False
        return not self.project or self.project == route.project


class UnderWay(Protocol):
    """A request that was sent to a replica and is not over."""

    def ejected(self, why: str) -> None:
        """The replica gets no more requests, and this one is not to wait for it."""


@dataclass(slots=True, eq=False)
class Replica:
    """One running copy of a service, with what is under way on it now; the same object as feeds come and go."""

    job: str
    host: str
    port: int
    prefix: bytes
    turn: int = 0
    heard_at: float = float("-inf")
    """When its last byte of any response came (s, the loop's clock)."""
    is_leaving: bool = False
    """It is to end: what is under way may finish, and nothing more is sent."""
    variant: str = ""
    """Which revision of the service it is of, while there are two; else empty."""
    workload: str = ""
    health: str | None = None
    """The path that tells whether it is well, where that may be another than the route's."""
    circuit: Circuit = field(default_factory=Circuit)
    under_way: set[UnderWay] = field(default_factory=set)
    country: str = ""
    """Where its site is; empty: nobody knows."""
    distance_ns: int = 0
    """How long it takes to its site and back."""
    others: int = 0
    """Requests that its engine has, as it says, beside those that are under way from here."""
    answered: int = 0
    """Answers that began lately, of these with a status of 500 or more, and s until then in all."""
    failed: int = 0
    waited_s: float = 0.0
    outlier_at: float = float("-inf")
    """When it was given up last for being far off its peers, and how often of late."""
    outlier_times: int = 0
    told_at: float = float("-inf")
    """When it told its own figures last (s, the loop's clock); those that follow are of then."""
    queued: int = 0
    """Requests that wait inside it, of whichever gateway."""
    running: int = 0
    address: tuple[str, int] = field(init=False)
    authority: bytes = field(init=False)
    """What the Host header says."""
    cache_milli: int | None = None
    """How full its KV cache is; None: it does not say."""
    first_token_s: float | None = None
    """Within what 95 of 100 first tokens came by its own clock between the last two looks; None: none did."""

    @property
    def outstanding(self) -> int:
        """How many requests are under way on it."""
        return len(self.under_way)

    @property
    def standing(self) -> int:
        """Whether it gets requests, as ``core.routing`` ranks it."""
        if self.is_leaving:
            return SHUT
        circuit = self.circuit
        if circuit.state is _CLOSED:
            return SUSPECT if circuit.is_suspect else WELL
        return TRIAL if circuit.allows else SHUT

    def __post_init__(self) -> None:
        self.address = (self.host, self.port)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = f"{host}:{self.port}".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a replica may take in each phase, in s; ``whole`` zero: as long as it takes."""

    connect: float = 5.0
    first_byte: float = 600.0
    between: float = 600.0
    whole: float = 0.0


@dataclass(slots=True, eq=False)
class Course:
    """What is remembered of a model's requests from one feed to the next."""

    budget: Budget = field(default_factory=Budget)
    """For sending some a second time."""
    turns: dict[str, int] = field(default_factory=dict)
    """Of its variants."""
    ring: Ring | None = None
    """Where prefixes and sessions belong, of replicas with these names."""
    names: frozenset[str] = frozenset()
    diverted: int = 0
    """Requests under way that other models answer, because none of its replicas could."""

    def seat(self, replicas: Sequence[Replica]) -> None:
        """Have a ring with these replicas."""
        names = frozenset(one.job for one in replicas)
        if self.ring is None or self.names != names:
            self.ring, self.names = Ring(names), names


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A model's name, whose it is, and the replicas that are ready.

    ``health`` is the path that tells whether a replica is well, empty when nothing was agreed. ``concurrency`` is how
    many requests a replica takes at a time, zero for any number; ``wait_s`` is how long one may wait for its turn.
    ``weights`` are the shares of its variants, empty when all replicas are alike. ``fallback`` are other models, in
    order. ``hedge_s`` zero: no request is sent to two replicas. ``is_open`` is whether all its paths are reached.
    """

    model: str
    project: str
    service: str
    replicas: tuple[Replica, ...]
    workload: str = ""
    health: str = ""
    concurrency: int = 0
    wait_s: float = 0.0
    start_s: float = 0.0
    """How long its replicas took to start of late; zero: not known."""
    guards: Guarding | None = None
    """What looks at its requests and answers; None: nothing."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """How many of a hundred requests go to each variant; empty: as there is room."""
    affinity: str = ""
    fallback: tuple[str, ...] = ()
    hedge_s: float = 0.0
    timeouts: Timeouts = Timeouts()
    is_open: bool = False
    is_plain: bool = True
    """Whether nothing but the work on them tells replicas apart, for a request that may be served anywhere."""
    course: Course = field(default_factory=Course)
    price: tuple[int, int] = (0, 0)
    """Micro-USD for a million tokens, in and out."""
    is_salted: bool = False
    """Whether its engine is told whose prefixes may be shared."""

    def choose(
        self, *, wish: Wish | None = None, variant: str | None = None, tried: Sequence[Replica] = ()
    ) -> Replica | None:
        """The replica to send a request to, one of ``tried`` never; None when none can take it. See ``core.routing``.

        ``wish`` None: none but that it be served.
        """
        if wish is None and self.is_plain:
            return routing.least(self.replicas, room=self.concurrency, tried=tried)
        return routing.choose(
            self.replicas,
            wish or routing.ANY,
            room=self.concurrency,
            tried=tried,
            variant=variant,
            ring=self.course.ring,
        )

    def draw(self, wish: Wish, *, tried: Sequence[Replica] = ()) -> str | None:
        """The variant whose turn it is, of those that have a replica for a request; None when there is none."""
        among = {one.variant for one in self.takers(wish, tried=tried)}
        if wish.key is not None and wish.is_session:
            return routing.drawn_by(self.weights, wish.key, among=among)
        drawn, self.course.turns = routing.draw(self.weights, self.course.turns, among=among)
        return drawn

    def takers(self, wish: Wish, *, tried: Sequence[Replica] = ()) -> list[Replica]:
        """The replicas that take requests with that wish, be they full just now or not."""
        return routing.takers(self.replicas, wish, weights=self.weights, tried=tried)

    def may_serve(self, wish: Wish) -> bool:
        """Whether a replica, taking requests now or not, is where a request may be served."""
        return any(routing.is_allowed(one, wish) for one in self.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One version of all keys and routes."""

    version: int
    keys: Mapping[str, Key]
    routes: Mapping[str, Route]
    services: Mapping[str, Sequence[Route]] = field(default_factory=dict)
    """Those of which all paths are reached, by the services' own names."""
    raw: bytes
    """The feed it was read from: hashes of tokens, never tokens."""
    project_limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What all keys of a project together may ask of models."""
    _opened: dict[str, Key] = field(default_factory=dict, repr=False, compare=False)
    """By token, in this version, those that came and are known: a keyed hash costs as much as a tenth of a request."""

    def key(self, token: str, pepper: bytes) -> Key | None:
        """What the token opens, expired or not; None for one that is malformed or unknown."""
        known = self._opened.get(token)
        if known is None and tokens.parse(token):
            known = self.keys.get(tokens.digest(token, pepper))
            if known is not None:
                self._opened[token] = known
        return known

    def route(self, model: str, key: Key) -> Route | None:
        """The route of that model, None when there is none for the key's holder."""
        route = self.routes.get(model)
        return route if route is not None and key.may_use(route) else None

    def service(self, name: str, key: Key) -> Route | None:
        """The route of the service of that name which the key's holder may use, None when there is none."""
        return next((route for route in self.services.get(name, ()) if key.may_use(route)), None)

    def closed(self, name: str, key: Key) -> Route | None:
        """The route of a service of that name which is asked by its model only, None when there is none."""
        routes = (route for route in self.routes.values() if route.service == name and not route.is_open)
        return next((route for route in routes if key.may_use(route)), None)

    def visible(self, key: Key) -> list[Route]:
        """The routes that exist for the key's holder, by name."""
        return sorted((route for route in self.routes.values() if key.may_use(route)), key=lambda route: route.model)

    def near(self, model: str, key: Key) -> list[str]:
        """Names like ``model`` that the key's holder may use, best first."""
        names = {route.model.lower(): route.model for route in self.visible(key)}
        close = difflib.get_close_matches(model[:128].lower(), names, n=_NEAR_NAMES, cutoff=0.5)
        return [names[name] for name in close]


def read_feed(raw: bytes, before: Table | None = None) -> Table:
    """The table in a feed; replicas that were in ``before`` stay the same objects, with their counts.

    Raises: FeedError.
    """
    try:
        feed = msgspec.json.decode(raw, type=_Feed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FeedError(f"The feed cannot be read: {error}") from None
    known = {} if before is None else _replicas(before)
    routes: dict[str, Route] = {}
    services: dict[str, list[Route]] = {}
    for model, route in feed.routes.items():
        replicas = []
        for each in route.replicas:
            replica = _replica(each)
            identity = (replica.job, replica.host, replica.port, replica.prefix)
            same = known.setdefault(identity, replica)
            same.is_leaving, same.variant = each.is_leaving, each.variant
            same.workload, same.health = each.workload, each.health
            same.country, same.distance_ns = _where(each.site, feed)
            replicas.append(same)
        earlier = before.routes.get(model) if before is not None else None
        is_alike = len({one.distance_ns for one in replicas}) < 2
        timeouts = route.timeouts_ms
        made = routes[model] = Route(
            model=model,
            project=route.project,
            service=route.service,
            replicas=tuple(replicas),
            workload=route.workload,
            health=route.health,
            concurrency=route.concurrency,
            wait_s=route.wait_ms / 1000,
            start_s=route.start_ms / 1000,
            guards=_guarding(route.guards, before.routes.get(model) if before is not None else None),
            weights=route.weights,
            affinity=route.affinity,
            fallback=tuple(route.fallback),
            hedge_s=route.hedge_ms / 1000,
            timeouts=Timeouts(
                connect=timeouts.connect / 1000,
                first_byte=timeouts.first_byte / 1000,
                between=timeouts.between / 1000,
                whole=timeouts.whole / 1000,
            ),
            is_open=route.is_open,
            is_plain=is_alike and not route.weights and route.affinity not in ("prefix", "session"),
            price=route.price,
            is_salted=route.is_salted,
            course=earlier.course if earlier is not None else Course(),
        )
        if route.affinity in ("prefix", "session"):
            made.course.seat(replicas)
        if made.is_open:
            services.setdefault(made.service, []).append(made)
    open_to = lru_cache(maxsize=None)(partial(_matching, tuple(routes)))
    keys = {
        digest: Key(
            scopes=frozenset(key.scopes),
            project=key.project,
            expires_ns=key.expires_ns,
            id=key.id,
            countries=frozenset(key.countries),
            models=open_to(tuple(key.models)) if key.models else None,
            limits=key.limits,
            band=key.band,
            label=key.label,
        )
        for digest, key in feed.tokens.items()
    }
    limits = {project: told.limits for project, told in feed.projects.items()}
    return Table(version=feed.version, keys=keys, routes=routes, services=services, raw=raw, project_limits=limits)


def _matching(models: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """The models that one of the patterns names."""
    return frozenset(model for model in models if any(fnmatchcase(model, pattern) for pattern in patterns))


def _guarding(told: list[dict[str, Any]], before: Route | None) -> Guarding | None:
    """What looks at a model's requests; the same object while the rules are the same."""
    known = before.guards if before is not None else None
    return known if known is not None and known.is_of(told) else guarding_of(told)


def _where(site: str, feed: _Feed) -> tuple[str, int]:
    """The country of a site, and how far it is from here; one that no link is known to is far."""
    told = feed.sites.get(site)
    if told is None:
        return "", 0 if site == feed.home else routing.FAR_NS
    return told.country, 0 if site == feed.home else told.links.get(feed.home, routing.FAR_NS)


def _replicas(table: Table) -> dict[tuple[str, str, int, bytes], Replica]:
    return {
        (replica.job, replica.host, replica.port, replica.prefix): replica
        for route in table.routes.values()
        for replica in route.replicas
    }


def _replica(told: _Replica) -> Replica:
    parts = urlsplit(told.endpoint if "://" in told.endpoint else f"http://{told.endpoint}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or not parts.hostname or port is None:
        raise FeedError(f"{told.endpoint!r} of {told.job} is not an endpoint; it should be like http://127.0.0.1:8000")
    prefix = parts.path.rstrip("/")
    if not prefix.isascii() or any(character <= " " for character in prefix):
        raise FeedError(f"{told.endpoint!r} of {told.job} has a path that cannot be sent")
    return Replica(job=told.job, host=parts.hostname, port=port, prefix=prefix.encode())
