"""How many replicas a service needs: enough for what is asked of it now, fewer once that was so for a while.

Up at once, down late. What is under way and what waits, over what a replica takes at a time, is needed now; as many as
were needed at most in the last ``idle_ns`` are kept, so a service follows its peaks and does not flap between them.
While none is ready, and while the newest one fails, there is one launch at a time: a model that does not come up is not
tried eight times over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the service's owner says: replicas at least and at most, requests that one takes, time without need."""

    least: int
    most: int
    concurrency: int
    idle_ns: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError("the least number of replicas is not above the most")
        if self.concurrency < 1 or self.idle_ns < 0:
            raise ValueError("a replica takes at least one request, and time is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is there: requests under way and waiting, replicas ready and coming, whether the newest one fails."""

    in_flight: int = 0
    waiting: int = 0
    ready: int = 0
    coming: int = 0
    is_failing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered from one decision to the next. ``needed`` are the peaks of late, as instant and replicas."""

    needed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """``wanted`` replicas, ready and coming, and why in words."""

    wanted: int
    why: str


def decide(bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    """How many replicas there should be, and what to remember.

    Units: ns. Never below ``least`` or above ``most``; at least one while anything is asked; at most one more than are
    ready while none is, or while the newest fails.
    """
    asked = signals.in_flight + signals.waiting
    needed = min(bounds.most, max(bounds.least, -(-asked // bounds.concurrency)))
    memory = _remember(memory, needed, since=now - bounds.idle_ns, now=now)
    kept = max((count for _, count in memory.needed), default=needed)
    held = min(bounds.most, max(bounds.least, signals.ready + signals.coming))
    wanted = max(needed, min(kept, held))
    why = f"{asked} requests, {bounds.concurrency} at a time each"
    if wanted > needed:
        why = f"{kept} were needed lately"
    if (signals.is_failing or not signals.ready) and wanted > signals.ready + 1:
        wanted = max(signals.ready + 1, bounds.least if not signals.is_failing else 0)
        why = "the newest replica fails" if signals.is_failing else "none is ready yet"
    return Decision(wanted=wanted, why=why), memory


def _remember(memory: Memory, needed: int, *, since: int, now: int) -> Memory:
    """The peaks since then: an earlier one counts as long as no later one is as high."""
    kept = [(at, count) for at, count in memory.needed if at > since and count > needed]
    return replace(memory, needed=(*kept, (now, needed)))
