"""How many replicas a service needs: enough for all that is expected of it now, fewer once that was so for a while.

Each objective asks for a number, and the largest wins. There are two sorts.

*Levels* are what a replica bears: requests at a time, tokens a second, use of its GPUs or its cache. The need is what
there is over what one bears; between an objective less and more its tolerance the number stays as it is.

*Feelings* are what users or an engine suffer: time to the first token, to the last, in a line. They do not grow in
proportion with the load, so they cannot be divided. When one is not met while the number of replicas stood still, the
load that each had is more than it bears, and how much more is known by how far it was missed, up to twice. From then
on that is a level too: no replica gets more. So a service does not go down to what failed before and up again. What
was learned is forgotten after an hour, and raised when a replica bears more. While one is met, fewer are tried as far
as it would still be if it grew with what each gets; beyond that by one, after a while in which nothing changed.

Up at once, down late: as many as were needed at most in the last ``idle_ns`` are kept, so a service follows its peaks
and does not flap between them. While none is ready, and while the newest one fails, there is one launch at a time: a
model that does not come up is not tried eight times over. What hours and the daily pattern say is a floor, looked up
as far ahead as replicas take to start; nothing that is needed now is ever left out for it. While no gateway has been
heard, nothing is given up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Final
from zoneinfo import ZoneInfo

from tidemill.core import pattern
from tidemill.core.pattern import Slot
from tidemill.model.scaling import DAY_S, Hours, Pattern, Scaling
from tidemill.units import DAY_NS, HOUR_NS, MILLI, SECOND_NS, format_duration

_FORGOTTEN_NS: Final = HOUR_NS
"""Engines, prompts and models change; what was more than a replica bears is tried again after so long."""
_WORST: Final = 2
"""A feeling that is missed by more says no more than that twice as many are needed, for now."""
_SMOOTHED_OVER: Final = 4
"""The load that feelings are put beside is averaged over this part of their window."""
_LONGEST_LEAD_NS: Final = HOUR_NS
_STARTS: Final = 5
"""How many of the latest starts tell how long one takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the service's owner says: replicas at least and at most, requests that one takes, time without need."""

    least: int
    most: int
    concurrency: int
    idle_ns: int
    scaling: Scaling = Scaling()

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError("the least number of replicas is not above the most")
        if self.concurrency < 1 or self.idle_ns < 0:
            raise ValueError("a replica takes at least one request, and time is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is there: requests under way and waiting, replicas ready and coming, whether the newest one fails.

    ``ttft_ns``, ``latency_ns`` and ``queue_ns`` are what 95 of 100 requests stayed within; ``engine_queue`` waits in
    all replicas together; ``tokens_milli`` are thousandths of a token of answers a second; ``gpu_milli`` and
    ``kv_cache_milli`` are means of the ready ones. None: not known. ``is_blind``: it is not known what there is.
    ``starts_ns`` is how long those took that became ready since the last time.
    """

    in_flight: int = 0
    waiting: int = 0
    ready: int = 0
    coming: int = 0
    is_failing: bool = False
    is_blind: bool = False
    ttft_ns: int | None = None
    latency_ns: int | None = None
    queue_ns: int | None = None
    engine_queue: int | None = None
    tokens_milli: int | None = None
    gpu_milli: int | None = None
    kv_cache_milli: int | None = None
    starts_ns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Borne:
    """More than this load, in thousandths of a request, made a replica miss an objective, found at ``at_ns``."""

    objective: str
    load_milli: int
    at_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered from one decision to the next.

    ``needed`` are the peaks of late, ``waited`` the valleys of late, as instant and replicas. ``load_milli`` is the
    smoothed number of requests, as of ``looked_ns``. ``ready`` replicas are there since ``since_ns``. ``lowered_ns``
    is when some were given up last. ``pattern`` with ``slot``, and ``starts_ns``, outlive a control plane.
    """

    needed: tuple[tuple[int, int], ...] = ()
    waited: tuple[tuple[int, int], ...] = ()
    borne: tuple[Borne, ...] = ()
    load_milli: int = 0
    looked_ns: int = 0
    ready: int = 0
    since_ns: int = 0
    lowered_ns: int = 0
    starts_ns: tuple[int, ...] = ()
    pattern: Pattern = Pattern()
    slot: Slot = Slot()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one objective asks for: ``wants`` replicas, since it is at ``seen`` where ``target`` is meant, in words."""

    objective: str
    wants: int
    seen: str = ""
    target: str = ""
    need_milli: int = 0
    """The same in thousandths, before it is rounded or kept within the bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """``wanted`` replicas, ready and coming, and why in words; ``asks`` is what each objective asked for."""

    wanted: int
    why: str
    asks: tuple[Ask, ...] = ()


def decide(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    """How many replicas there should be, and what to remember.

    Units: ns. Never below ``least`` or above ``most``; at least one while anything is asked; at most one more than are
    ready while none is, or while the newest fails.
    """
    scaling, asked = bounds.scaling, signals.in_flight + signals.waiting
    held = min(bounds.most, max(bounds.least, signals.ready + signals.coming))
    # 1. what is there, and what is known of it
    memory = _looked(bounds, signals, memory, now=now)
    memory = replace(memory, borne=tuple(_borne(scaling, signals, memory, now=now)))
    # 2. what is needed now, and what usually will be
    asks = [*_levels(bounds, signals, held), *_feelings(bounds, signals, memory, now=now)]
    load_milli = min(max((ask.need_milli for ask in asks), default=0), bounds.most * MILLI)
    learned, slot = pattern.observe(memory.pattern, memory.slot, load_milli, now=now)
    memory = replace(memory, pattern=learned, slot=slot)
    floors = list(_floors(bounds, memory, now=now))
    floor = min(bounds.most, max([bounds.least, *(ask.wants for ask in floors)]))
    decisive = max(asks, key=lambda ask: ask.wants)
    needed = min(bounds.most, max(bounds.least, decisive.wants))
    # 3. more of them only once that was so for a while
    memory, needed = _steady(memory, needed, held, for_ns=scaling.up_after_ns, now=now)
    why = _why(decisive, bounds, asked)
    if floor > needed:
        why = max(floors, key=lambda ask: ask.wants).seen if floors else why
    needed = max(needed, floor)
    # 4. fewer only after a while, and not all at once
    memory = replace(memory, needed=_peaks(memory.needed, needed, since=now - bounds.idle_ns, now=now))
    kept = max((count for _, count in memory.needed), default=needed)
    wanted = max(needed, min(kept, held))
    if wanted > needed:
        why = f"{kept} were needed lately"
    if wanted < held and signals.is_blind:
        wanted, why = held, "no gateway was heard of late"
    if wanted < held and scaling.down_step:
        is_due = now - memory.lowered_ns >= scaling.down_every_ns
        wanted = max(wanted, held - scaling.down_step) if is_due else held
        why = f"{needed} are needed; up to {scaling.down_step} fewer each {format_duration(scaling.down_every_ns)}"
    if wanted < held:
        memory = replace(memory, lowered_ns=now)
    # 5. not more launches at a time than make sense
    if scaling.up_step and wanted > max(held, signals.ready + scaling.up_step):
        wanted = max(held, signals.ready + scaling.up_step)
        why = f"{needed} are needed, {scaling.up_step} start at a time"
    if (signals.is_failing or not signals.ready) and wanted > signals.ready + 1:
        wanted = max(signals.ready + 1, min(wanted, floor) if not signals.is_failing else 0)
        why = "the newest replica fails" if signals.is_failing else "none is ready yet" if wanted < needed else why
    return Decision(wanted=wanted, why=why, asks=(*asks, *floors)), memory


def lead_ns(memory: Memory) -> int:
    """How long before they are needed replicas have to be launched: as long as the slowest of late took."""
    return min(max(memory.starts_ns, default=0), _LONGEST_LEAD_NS)


def scheduled(hours: tuple[Hours, ...], *, now: int, until: int) -> int:
    """How many replicas hours that are open between two instants have at least.

    >>> night = Hours(replicas=2, from_s=22 * 3600, until_s=6 * 3600)
    >>> scheduled((night,), now=3 * HOUR_NS, until=3 * HOUR_NS), scheduled((night,), now=7 * HOUR_NS, until=7 * HOUR_NS)
    (2, 0)
    """
    return max((one.replicas for one in hours if _is_open(one, now=now, until=until)), default=0)


# 1. What is there


def _looked(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> Memory:
    """The memory with the smoothed load, how long the ready replicas have been as many, and their starts."""
    gone = max(0, now - memory.looked_ns) if memory.looked_ns else 0
    asked_milli = (signals.in_flight + signals.waiting) * MILLI
    over = max(1, bounds.scaling.window_ns // _SMOOTHED_OVER)
    load = memory.load_milli + (asked_milli - memory.load_milli) * gone // (over + gone)
    is_same = signals.ready == memory.ready and memory.looked_ns
    return replace(
        memory,
        load_milli=load if memory.looked_ns else asked_milli,
        looked_ns=now,
        ready=signals.ready,
        since_ns=memory.since_ns if is_same else now,
        starts_ns=(*memory.starts_ns, *signals.starts_ns)[-_STARTS:],
    )


_FELT: Final = ("ttft", "latency", "queue", "engine_queue")


def _felt(scaling: Scaling, signals: Signals, objective: str) -> tuple[int | None, int]:
    """What is felt and what is meant, each for one replica; a target of zero: no such objective."""
    if objective == "engine_queue":
        waits = signals.engine_queue
        each = None if waits is None else waits * MILLI // max(1, signals.ready)
        return each, scaling.engine_queue * MILLI
    return getattr(signals, f"{objective}_ns"), getattr(scaling, f"{objective}_ns")


def _borne(scaling: Scaling, signals: Signals, memory: Memory, *, now: int) -> Iterator[Borne]:
    """What is known of how much a replica bears, by objective."""
    known = {one.objective: one for one in memory.borne if now - one.at_ns < _FORGOTTEN_NS}
    stands = signals.ready and not signals.coming and now - memory.since_ns >= scaling.window_ns
    each = memory.load_milli // max(1, signals.ready)
    for objective in _FELT:
        seen, target = _felt(scaling, signals, objective)
        before = known.get(objective)
        if not target:
            continue
        if stands and each and seen is not None and seen * MILLI > target * (MILLI + scaling.tolerance_milli):
            bears = max(1, -(-each * target // min(seen, target * _WORST)))
            if before is None or bears < before.load_milli:
                before = Borne(objective=objective, load_milli=bears, at_ns=now)
            else:  # it failed again with less than was thought
                before = replace(before, at_ns=now)
        elif stands and before is not None and seen is not None and seen <= target and each > before.load_milli:
            before = replace(before, load_milli=each)
        if before is not None:
            yield before


# 2. What is needed


def _levels(bounds: Bounds, signals: Signals, held: int) -> Iterator[Ask]:
    """What each level asks for; that of the requests comes first and is always there."""
    scaling, asked = bounds.scaling, signals.in_flight + signals.waiting
    yield Ask(
        objective="requests",
        wants=-(-asked // bounds.concurrency),
        seen=f"{asked}",
        target=f"{bounds.concurrency} at a time each",
        need_milli=-(-asked * MILLI // bounds.concurrency),
    )
    if scaling.in_flight:
        yield _level("in_flight", asked * MILLI, scaling.in_flight * MILLI, f"{asked}", f"{scaling.in_flight} each",
                     held, scaling)  # fmt: skip
    if scaling.tokens and signals.tokens_milli is not None:
        rate = signals.tokens_milli
        yield _level("tokens", rate, scaling.tokens * MILLI, f"{rate // MILLI}/s", f"{scaling.tokens}/s each", held,
                     scaling)  # fmt: skip
    for name in ("gpu", "kv_cache"):
        used, target = getattr(signals, f"{name}_milli"), getattr(scaling, f"{name}_milli")
        if target and used is not None and signals.ready:
            yield _level(name, used * signals.ready, target, _percent(used), _percent(target), held, scaling)


def _level(objective: str, there: int, each: int, seen: str, target: str, held: int, scaling: Scaling) -> Ask:
    """As many as bear what is there; as many as there are, as long as that is so within the tolerance."""
    fewest = -(-there * MILLI // (each * (MILLI + scaling.tolerance_milli)))
    most = -(-there * MILLI // (each * (MILLI - scaling.tolerance_milli)))
    wants = max(fewest, min(held, most))
    return Ask(objective=objective, wants=wants, seen=seen, target=target, need_milli=-(-there * MILLI // each))


def _feelings(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> Iterator[Ask]:
    """What each feeling asks for: as many as bear the load, and for now not far fewer than it is met with."""
    borne = {one.objective: one.load_milli for one in memory.borne}
    is_settled = now - memory.since_ns >= bounds.idle_ns
    for objective in _FELT:
        seen, target = _felt(bounds.scaling, signals, objective)
        if not target:
            continue
        bears, stay = borne.get(objective, 0), 0
        if seen is not None:
            stay = min(signals.ready, -(-signals.ready * seen // target))
            if stay == signals.ready and seen <= target and is_settled:
                stay -= 1
        need_milli = -(-memory.load_milli * MILLI // bears) if bears else 0
        more = f"; a replica bears {bears / MILLI:.1f} requests" if bears else ""
        yield Ask(
            objective=objective,
            wants=max(-(-need_milli // MILLI), stay),
            seen=_amount(objective, seen) if seen is not None else "too few to say",
            target=_amount(objective, target) + more,
            need_milli=need_milli,
        )


def _floors(bounds: Bounds, memory: Memory, *, now: int) -> Iterator[Ask]:
    """What hours and the daily pattern ask for."""
    until = now + lead_ns(memory)
    if hours := scheduled(bounds.scaling.hours, now=now, until=until):
        yield Ask(objective="schedule", wants=hours, seen=f"{hours} are scheduled", need_milli=hours * MILLI)
    if bounds.scaling.predicts:
        usual = pattern.expected_milli(memory.pattern, now=now, until=until)
        count = min(bounds.most, -(-usual // (MILLI + bounds.scaling.tolerance_milli)))
        seen = f"{count} are usual at this time" if count else "the days have no pattern to go by"
        if pattern.is_good(memory.pattern) and not count:
            seen = "none is usual at this time"
        yield Ask(objective="pattern", wants=count, seen=seen, need_milli=usual)


def _is_open(one: Hours, *, now: int, until: int) -> bool:
    """Whether hours are open at some time between two instants; those of the day before may go on into this one."""
    zone = _zone(one.zone)
    first = datetime.fromtimestamp(now / SECOND_NS, zone).date()
    long_s = one.until_s - one.from_s if one.until_s > one.from_s else one.until_s - one.from_s + DAY_S
    for day in range(-1, (until - now) // DAY_NS + 2):
        date = first + timedelta(days=day)
        if date.weekday() not in one.days:
            continue
        midnight = datetime(date.year, date.month, date.day, tzinfo=zone)
        opens = round((midnight + timedelta(seconds=one.from_s)).timestamp()) * SECOND_NS
        closes = round((midnight + timedelta(seconds=one.from_s + long_s)).timestamp()) * SECOND_NS
        if opens <= until and now < closes:
            return True
    return False


@cache
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


# 3. and 4. How quickly


def _steady(memory: Memory, needed: int, held: int, *, for_ns: int, now: int) -> tuple[Memory, int]:
    """More than there are only as far as that was needed all the time of late; the first replica comes at once."""
    if not for_ns:
        return memory, needed
    before = memory.waited or ((now, held),)
    waited = (*((at, count) for at, count in before if at > now - for_ns and count < needed), (now, needed))
    least = waited[0][1]  # a valley that a later one is not below
    return replace(memory, waited=waited), min(needed, max(held, least, 1))


def _peaks(peaks: tuple[tuple[int, int], ...], needed: int, *, since: int, now: int) -> tuple[tuple[int, int], ...]:
    """The peaks since then: an earlier one counts as long as no later one is as high."""
    return (*((at, count) for at, count in peaks if at > since and count > needed), (now, needed))


# In words


def _why(ask: Ask, bounds: Bounds, asked: int) -> str:
    if ask.objective == "requests" or not ask.wants:
        return f"{asked} requests, {bounds.concurrency} at a time each"
    return f"{ask.objective} is at {ask.seen}, meant is {ask.target}"


def _amount(objective: str, value: int) -> str:
    return f"{value / MILLI:g} each" if objective == "engine_queue" else short_time(value)


def short_time(ns: int) -> str:
    """A length of time with three figures.

    >>> short_time(1_234_000_000), short_time(45_600_000)
    ('1.23s', '45.6ms')
    """
    return f"{ns / SECOND_NS:.3g}s" if ns >= SECOND_NS else f"{ns * 1000 / SECOND_NS:.3g}ms"


def _percent(milli: int) -> str:
    return f"{milli / 10:.3g}%"
