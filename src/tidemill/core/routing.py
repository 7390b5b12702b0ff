"""Which replica: of those that could have a request, the one that is sent it; and which are left out for a while.

A request is never sent outside of the countries that it may be served in. Of the rest the variant is drawn first (by
weight), then the nearest site counts that has room, then what the request has an affinity to, then the least work.

*Affinity*: equal keys come to the same replica, by consistent hashing: each replica stands at many points of a ring, a
key belongs to the next point clockwise, so that a replica that comes or goes moves only its own share of the keys. A
key of a *prefix* is passed on to the next replica when its own has half as much again as the mean; a key of a *session*
stays where it is as long as there is room. Source: Karger et al. 1997; Mirrokni, Thorup, Zadimoghaddam 2018 (bounded
loads). *Weights*: smooth weighted round robin, which spreads the turns of each variant evenly, or for sessions by the
session's own key. Ties of work go to whoever waited longest for a turn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, Protocol, TypeVar

from tidemill.units import MILLI

TRIAL: Final = 0
"""The next request shows whether it works again."""
WELL: Final = 1
SUSPECT: Final = 2
"""Something broke, and it is not known yet whether it was the replica."""
SHUT: Final = 3
"""It gets no request: it is leaving, ejected, or on trial with one."""

BOUND_MILLI: Final = 1_500
"""The load of a prefix's own replica, over the mean, from which the next one takes it."""
PREFIX_CHARACTERS: Final = 2_048
"""About as many tokens as engines keep in 32 blocks."""
FAR_NS: Final = 1 << 62
"""How far a replica is when nobody knows."""
_POINTS: Final = 64
_WHOLE: Final = 1 << 64
_MIX: Final = 0x9E37_79B9_7F4A_7C15


class Choice(Protocol):
    """A replica as routing sees it.

    ``under_way`` are the requests that it was sent, ``others`` how many its engine has beside them.
    """

    @property
    def job(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def country(self) -> str: ...
    @property
    def distance_ns(self) -> int: ...
    @property
    def turn(self) -> int: ...
    @property
    def standing(self) -> int: ...
    @property
    def under_way(self) -> Sized: ...
    @property
    def others(self) -> int: ...


R = TypeVar("R", bound=Choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks of its replica.

    ``countries`` empty: it may be served anywhere. ``key`` is what it has an affinity by, None: by nothing;
    ``is_session`` keeps it where its key belongs whatever the load is.
    """

    countries: frozenset[str] = frozenset()
    key: int | None = None
    is_session: bool = False


ANY: Final = Wish()


def least(replicas: Iterable[R], *, room: int = 0, tried: Collection[R] = ()) -> R | None:
    """The replica with the least work, None when none can take more.

    One that is on trial goes first, suspects last; those that are shut, in ``tried``, or have ``room`` requests never.
    """
    best: R | None = None
    rank = (SHUT, 0, 0)
    for one in replicas:
        standing = one.standing
        if standing > rank[0] or standing == SHUT:
            continue
        outstanding = len(one.under_way)
        if (room and outstanding >= room) or one in tried:
            continue
        mine = (standing, outstanding + one.others, one.turn)
        if best is None or mine < rank:
            best, rank = one, mine
    return best


def choose(
    replicas: Iterable[R],
    wish: Wish,
    *,
    room: int = 0,
    tried: Collection[R] = (),
    variant: str | None = None,
    ring: Ring | None = None,
) -> R | None:
    """The replica for a request with that wish, None when none can take it now.

    ``room`` is how many requests each takes at a time, zero for any number; ``variant`` None: whichever.
    """
    countries, nearest = wish.countries, FAR_NS
    able: list[R] = []
    for one in replicas:
        if (
            one.standing == SHUT
            or (variant is not None and one.variant != variant)
            or (countries and one.country not in countries)
            or (room and len(one.under_way) >= room)
            or one in tried
        ):
            continue
        distance = one.distance_ns
        if distance < nearest:
            able, nearest = [one], distance
        elif distance == nearest:
            able.append(one)
    if wish.key is None or ring is None or len(able) < 2:
        return least(able)
    if not wish.is_session:
        trial = next((one for one in able if one.standing == TRIAL), None)
        if trial is not None:
            return trial
    able = [one for one in able if one.standing != SUSPECT] or able
    limit = None if wish.is_session else bound(sum([_load(one) for one in able]), len(able))
    for job in ring.owners(wish.key):
        for one in able:
            if one.job == job and (limit is None or _load(one) < limit):
                return one
    return least(able)


def _load(replica: Choice) -> int:
    """The work on a replica."""
    return len(replica.under_way) + replica.others


def is_allowed(replica: Choice, wish: Wish) -> bool:
    """Whether a request with that wish may be served where the replica is; what is nowhere known is nowhere."""
    return not wish.countries or replica.country in wish.countries


def takers(replicas: Iterable[R], wish: Wish, *, weights: Mapping[str, int], tried: Collection[R] = ()) -> list[R]:
    """The replicas that take requests with that wish, be they full just now or not."""
    return [
        one
        for one in replicas
        if one.standing != SHUT
        and is_allowed(one, wish)
        and one not in tried
        and (not weights or weights.get(one.variant, 0) > 0)
    ]


def bound(total: int, count: int) -> int:
    """What the load of one of ``count`` replicas with ``total`` between them may come to with one request more.

    >>> bound(0, 3), bound(5, 3), bound(30, 3)
    (1, 3, 16)
    """
    return -(-BOUND_MILLI * (total + 1) // (MILLI * count))


class Ring:
    """Where keys belong, among ``names``."""

    def __init__(self, names: Iterable[str]) -> None:
        points = [(key_of(name.encode(), b"%d" % number), name) for name in set(names) for number in range(_POINTS)]
        points.sort()
        self._points = [point for point, _ in points]
        self._names = [name for _, name in points]

    def owners(self, key: int) -> Iterator[str]:
        """Whose the key is, then whose it would be without that one, and so on; each once."""
        names, start = self._names, bisect_right(self._points, key)
        seen: set[str] = set()
        for at in range(start, start + len(names)):
            name = names[at % len(names)]
            if name not in seen:
                seen.add(name)
                yield name


def key_of(*parts: bytes) -> int:
    """A number below 2**64 for these parts, the same everywhere."""
    whole = b"".join([b"%d:%b" % (len(part), part) for part in parts])
    return int.from_bytes(blake2b(whole, digest_size=8).digest(), "big")


def prefix_of(content: Mapping[str, Any]) -> str:
    """The beginning of what a request asks a model: what an engine may have kept from another request.

    Of a conversation all up to the first thing that the user says, so that its later turns have the same prefix.
    """
    prompt = content.get("prompt")
    if prompt is not None:
        return _text(prompt)[:PREFIX_CHARACTERS]
    said = content.get("messages", content.get("input"))
    parts = [_text(content["instructions"])] if "instructions" in content else []
    if not isinstance(said, list):
        parts.append(_text(said))
        return "\n".join(parts)[:PREFIX_CHARACTERS]
    size = len(parts[0]) if parts else 0
    for message in said:
        if not isinstance(message, dict):
            continue
        role, text = message.get("role"), _text(message.get("content"))
        parts += [str(role), text]
        size += len(text)
        if role == "user" or size >= PREFIX_CHARACTERS:
            break
    return "\n".join(parts)[:PREFIX_CHARACTERS]


def _text(said: object) -> str:
    """What is said, as far as it is text or tokens."""
    if isinstance(said, str):
        return said[:PREFIX_CHARACTERS]
    if isinstance(said, dict):
        return _text(said.get("text"))
    if isinstance(said, list):
        if said and isinstance(said[0], int):
            return repr(said[: PREFIX_CHARACTERS // 4])
        return "\n".join(_text(part) for part in said[:16])
    return ""


# Variants of one model


def draw(
    weights: Mapping[str, int], turns: Mapping[str, int], *, among: Collection[str]
) -> tuple[str | None, dict[str, int]]:
    """The variant whose turn it is, None when none of ``among`` has a weight; and the turns afterwards.

    >>> turns, drawn = {}, ""
    >>> for _ in range(6):
    ...     name, turns = draw({"a": 2, "b": 1}, turns, among={"a", "b"})
    ...     drawn += name or ""
    >>> drawn
    'abaaba'
    """
    open_to = [(name, weight) for name, weight in weights.items() if weight > 0 and name in among]
    if not open_to:
        return None, dict(turns)
    after = {name: turns.get(name, 0) + weight for name, weight in open_to}
    best = max(after, key=lambda name: after[name])
    after[best] -= sum(weight for _, weight in open_to)
    return best, {**turns, **after}


def drawn_by(weights: Mapping[str, int], key: int, *, among: Collection[str]) -> str | None:
    """The variant to which a session belongs, each for its share of all keys; None as with ``draw``."""
    open_to = sorted((name, weight) for name, weight in weights.items() if weight > 0 and name in among)
    place = (key * _MIX % _WHOLE) * sum(weight for _, weight in open_to) // _WHOLE
    for name, weight in open_to:
        if place < weight:
            return name
        place -= weight
    return None


# Other models


def fallbacks(model: str, chosen: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The models that may answer for ``model``: its own choice, then theirs; each once, itself never.

    >>> fallbacks("a", {"a": ["b", "c"], "b": ["d"], "d": ["a"]})
    ('b', 'c', 'd')
    """
    found = [model]
    for one in found:
        found += dict.fromkeys(name for name in chosen.get(one, ()) if name not in found)
    return tuple(found[1:])


def loop_through(model: str, chosen: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The way by which ``model`` would fall back to itself, itself at both ends; empty: there is none.

    >>> loop_through("a", {"a": ["b"], "b": ["c", "a"]})
    ('a', 'b', 'a')
    """
    ways: list[tuple[str, ...]] = [(model,)]
    seen: set[str] = set()
    for way in ways:
        for name in chosen.get(way[-1], ()):
            if name == model:
                return (*way, name)
            if name not in seen:
                seen.add(name)
                ways.append((*way, name))
    return ()


# Replicas that are far off their peers

_ENOUGH: Final = 20
"""Answers of a replica from which something can be told."""
_FAILS_MILLI: Final = 300
"""How many more of a thousand answers fail than those of its peers together."""
_LATE: Final = 3
"""How many times as late as its peers usually are,"""
_LATE_US: Final = 100_000
"""and by at least as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a replica did lately: answers, of these with a status of 500 or more, µs to their first bytes in all."""

    job: str
    answered: int
    failed: int
    waited_us: int


def outliers(records: Sequence[Record], *, out: int = 0) -> list[tuple[str, str]]:
    """The replicas that should get nothing for a while, worst first, and why in words.

    ``out`` more get nothing already; together never more than half of all.
    """
    known = [one for one in records if one.answered >= _ENOUGH]
    room = (len(records) + out) // 2 - out
    found: list[tuple[int, str, str]] = []
    for one in known:
        peers = [other for other in known if other is not one]
        if not peers:
            continue
        fails = MILLI * one.failed // one.answered
        usual = MILLI * sum(other.failed for other in peers) // sum(other.answered for other in peers)
        late, expected = one.waited_us // one.answered, _median([other.waited_us // other.answered for other in peers])
        if fails - usual >= _FAILS_MILLI:
            why = f"{fails / 10:g} % of its answers fail, {usual / 10:g} % of the others'"
            found.append((MILLI * (fails - usual), one.job, why))
        elif late >= _LATE * expected and late - expected >= _LATE_US:
            why = f"it takes {late // 1000} ms to begin an answer, the others {expected // 1000} ms"
            found.append((late // max(1, expected), one.job, why))
    found.sort(reverse=True)
    return [(job, why) for _, job, why in found[: max(0, room)]]


def _median(values: Sequence[int]) -> int:
    return sorted(values)[(len(values) - 1) // 2]


# Second tries


_EARNED: Final = MILLI // 10
_SAVED: Final = 10 * MILLI


@dataclass(slots=True)
class Budget:
    """How many requests may be sent a second time: a tenth of all, and a few that were saved up.

    What was at a replica when that was lost is not counted, but for the first.

    Units: thousandths of a request.
    """

    left: int = _SAVED

    def earn(self) -> None:
        """A request came."""
        if self.left < _SAVED:
            self.left += _EARNED

    def spend(self) -> bool:
        """Whether one more may be sent; then it is counted."""
        if self.left < MILLI:
            return False
        self.left -= MILLI
        return True
