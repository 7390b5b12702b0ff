"""What the gateway knows: keys and routes, as the control plane last told them, and which replica is next."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec

from tidemill.core import tokens
from tidemill.gateway.circuit import Circuit, State
from tidemill.model.limits import Priority

_ALL_OPEN: Final = frozenset({"infer", "admin"})
_NEAR_NAMES: Final = 3
NORMAL_BAND: Final = Priority.NORMAL.band


class FeedError(ValueError):
    """The feed does not have the shape that was agreed; the last good one stays in use."""


class _Replica(msgspec.Struct):
    job: str
    endpoint: str
    is_leaving: bool = False


class _Route(msgspec.Struct):
    project: str
    service: str
    replicas: list[_Replica]
    workload: str = ""
    health: str = ""
    concurrency: int = 0
    wait_ms: int = 0
    price: tuple[int, int] = (0, 0)
    is_salted: bool = False


class _Key(msgspec.Struct):
    scopes: list[str]
    id: str = ""
    project: str = ""
    expires_ns: int = 0
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
    projects: dict[str, _Project] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a token opens. ``project`` empty means every project; ``expires_ns`` zero means never."""

    scopes: frozenset[str]
    project: str
    expires_ns: int
    id: str = ""
    """The token's, not its secret."""
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
    circuit: Circuit = field(default_factory=Circuit)
    under_way: set[UnderWay] = field(default_factory=set)
    told_at: float = float("-inf")
    """When it told its own figures last (s, the loop's clock); those that follow are of then."""
    queued: int = 0
    """Requests that wait inside it, of whichever gateway."""
    running: int = 0
    cache_milli: int | None = None
    """How full its KV cache is; None: it does not say."""
    first_token_s: float | None = None
    """Within what 95 of 100 first tokens came by its own clock between the last two looks; None: none did."""

    @property
    def outstanding(self) -> int:
        """How many requests are under way on it."""
        return len(self.under_way)

    @property
    def address(self) -> tuple[str, int]:
        return (self.host, self.port)

    @property
    def authority(self) -> bytes:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A model's name, whose it is, and the replicas that are ready.

    ``health`` is the path that tells whether a replica is well, empty when nothing was agreed. ``concurrency`` is how
    many requests a replica takes at a time, zero for any number; ``wait_s`` is how long one may wait for its turn.
    """

    model: str
    project: str
    service: str
    replicas: tuple[Replica, ...]
    workload: str = ""
    health: str = ""
    concurrency: int = 0
    wait_s: float = 0.0
    price: tuple[int, int] = (0, 0)
    """Micro-USD for a million tokens, in and out."""
    is_salted: bool = False
    """Whether its engine is told whose prefixes may be shared."""

    def choose(self, *, tried: Sequence[Replica] = ()) -> Replica | None:
        """The replica with the fewest requests under way; ties go to the one that waited longest for a turn.

        One that is on trial gets the next request there is, suspects come last, those that are full, ejected, leaving
        or in ``tried`` never; None when none is left.
        """
        best: Replica | None = None
        rank: tuple[bool, bool, int, int] = (True, True, 0, 0)
        for replica in self.replicas:
            circuit, outstanding = replica.circuit, len(replica.under_way)
            if replica.is_leaving or not circuit.allows or (self.concurrency and outstanding >= self.concurrency):
                continue
            if replica in tried:
                continue
            mine = (circuit.state is State.CLOSED, circuit.is_suspect, outstanding, replica.turn)
            if best is None or mine < rank:
                best, rank = replica, mine
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One version of all keys and routes."""

    version: int
    keys: Mapping[str, Key]
    routes: Mapping[str, Route]
    raw: bytes
    """The feed it was read from: hashes of tokens, never tokens."""
    project_limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What all keys of a project together may ask of models."""

    def key(self, token: str, pepper: bytes) -> Key | None:
        """What the token opens, expired or not; None for one that is malformed or unknown."""
        return self.keys.get(tokens.digest(token, pepper)) if tokens.parse(token) else None

    def route(self, model: str, key: Key) -> Route | None:
        """The route of that model, None when there is none for the key's holder."""
        route = self.routes.get(model)
        return route if route is not None and key.may_use(route) else None

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
    routes = {}
    for model, route in feed.routes.items():
        replicas = []
        for each in route.replicas:
            replica = _replica(each)
            identity = (replica.job, replica.host, replica.port, replica.prefix)
            same = known.setdefault(identity, replica)
            same.is_leaving = each.is_leaving
            replicas.append(same)
        routes[model] = Route(
            model=model,
            project=route.project,
            service=route.service,
            replicas=tuple(replicas),
            workload=route.workload,
            health=route.health,
            concurrency=route.concurrency,
            wait_s=route.wait_ms / 1000,
            price=route.price,
            is_salted=route.is_salted,
        )
    open_to = lru_cache(maxsize=None)(partial(_matching, tuple(routes)))
    keys = {
        digest: Key(
            scopes=frozenset(key.scopes),
            project=key.project,
            expires_ns=key.expires_ns,
            id=key.id,
            models=open_to(tuple(key.models)) if key.models else None,
            limits=key.limits,
            band=key.band,
            label=key.label,
        )
        for digest, key in feed.tokens.items()
    }
    limits = {project: told.limits for project, told in feed.projects.items()}
    return Table(version=feed.version, keys=keys, routes=routes, raw=raw, project_limits=limits)


def _matching(models: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """The models that one of the patterns names."""
    return frozenset(model for model in models if any(fnmatchcase(model, pattern) for pattern in patterns))


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
