"""How a service gets from one revision to the next: which revision has how many replicas, and when it is taken back.

Two numbers keep a rollout from failing a request: there are at most ``surge`` replicas more than are needed, whatever
is still ending, and at most ``unavailable`` fewer are ready. Replicas that leave finish what is under way on them
(``control.replicating``); here it is only said how many of each revision stay.

A canary first gets a part of the requests, step by step; the new revision is compared with the old one all the time
that both answer. Taking back is the same exchange in the other direction, and can begin at any moment. All of it
follows from what is stored and what is seen now, so another control plane goes on where one was killed.

Source: the two bounds are those of Kubernetes' rolling update; unlike there, a replica counts as there until its
devices are free, for GPUs are rarely spare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidemill.model.rollout import CanaryStep, Comparison, Rolling, Rollout, RolloutState
from tidemill.units import MILLI, format_duration

_HUNDRED: Final = 100
FAILURES: Final = 3
"""So often in a row may replicas of a new revision fail that was never ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One revision's replicas. ``kept`` run or are to; ``held`` are those, and those that leave or end."""

    kept: int = 0
    held: int = 0
    ready: int = 0
    """Of those kept."""
    live: int = 0
    """Jobs that are not over."""
    lost: int = 0
    """Jobs that ended for good."""
    failures: int = 0
    """How often in a row one of those kept failed that was never ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What became of the requests to one revision of late; ``slow_ns``: 95 of 100 took no longer. None: not known."""

    requests: int = 0
    errors: int = 0
    slow_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What there is. ``needed`` replicas would do now; nothing has changed since ``still_ns``."""

    needed: int
    old: Side
    new: Side
    old_answers: Answers = Answers()
    new_answers: Answers = Answers()
    still_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """``old`` and ``new`` are how many replicas to keep. ``event`` moves the rollout on first; empty: it stays.

    ``weights`` are how many of a hundred requests go to either; None: as their replicas have room.
    """

    old: int
    new: int
    event: str = ""
    why: str = ""
    weights: tuple[int, int] | None = None


def decide(rollout: Rollout, rolling: Rolling, seen: Seen, *, now: int) -> Decision:
    """What to do about a rollout now. Units: ns.

    Never more than ``needed + surge`` replicas by its own doing, and never one fewer ready than ``needed -
    unavailable``, unless replicas fail.
    """
    event, why = _event(rollout, rolling, seen, now=now)
    weights = _weights(rollout, rolling, seen)
    if event or rollout.is_over:
        return Decision(old=seen.old.kept, new=seen.new.kept, event=event, why=why, weights=weights)
    if rollout.state is RolloutState.RETURNING:
        new, old = _exchange(rolling, seen.needed, seen.new, seen.old, keeps=0, grows_to=seen.needed, is_bad=True)
    elif rollout.state is RolloutState.CANARY:
        goal = _canary_goal(rolling, rollout, seen)
        keeps = min(seen.needed, max(seen.needed - goal, seen.needed + rolling.surge - goal))
        old, new = _exchange(rolling, seen.needed, seen.old, seen.new, keeps=keeps, grows_to=goal)
    else:
        old, new = _exchange(rolling, seen.needed, seen.old, seen.new, keeps=0, grows_to=seen.needed)
    return Decision(old=old, new=new, why=_progress(rollout, seen), weights=weights)


def judge(comparison: Comparison, old: Answers, new: Answers) -> str:
    """Why a new revision is not as good as the old one; empty while nothing speaks against it.

    >>> judge(Comparison(), Answers(requests=1000, errors=10), Answers(requests=50, errors=4))
    '4 of 50 requests failed on it, and 10 of 1000 on the one before'
    >>> judge(Comparison(), Answers(requests=1000, errors=10), Answers(requests=49, errors=49))
    ''
    """
    if new.requests < comparison.requests:
        return ""
    before = f"{old.errors} of {old.requests} on the one before"
    share_new, share_old = new.errors * max(1, old.requests), old.errors * new.requests
    if (share_new - share_old) * MILLI > comparison.errors_milli * new.requests * max(1, old.requests):
        return f"{new.errors} of {new.requests} requests failed on it, and {before}"
    if not comparison.slower_milli or old.requests < comparison.requests or old.slow_ns is None or new.slow_ns is None:
        return ""
    if new.slow_ns * MILLI <= old.slow_ns * comparison.slower_milli:
        return ""
    took = f"{format_duration(new.slow_ns)} on it, and {format_duration(old.slow_ns)} on the one before"
    return f"95 of 100 answers took up to {took}"


# What moves it on


def _event(rollout: Rollout, rolling: Rolling, seen: Seen, *, now: int) -> tuple[str, str]:
    """What happens to the rollout now, and why."""
    old, new = seen.old, seen.new
    if rollout.is_over:
        return "", ""
    if rollout.state is RolloutState.RETURNING:
        is_back = old.ready >= min(seen.needed, old.live) and not new.held
        return ("reverted", rollout.detail) if is_back or not old.live else ("", "")
    if bad := _is_bad(rolling, rollout, seen):
        return "reversed", bad
    if rollout.state is RolloutState.CANARY:
        return _canary_event(rollout, rolling, seen, now=now)
    is_there = new.ready >= seen.needed and new.kept >= seen.needed
    return ("completed", "") if is_there and not old.held else ("", "")


def _is_bad(rolling: Rolling, rollout: Rollout, seen: Seen) -> str:
    """Why the new revision cannot take the place of the old one; empty while it can."""
    new = seen.new
    if not new.live:
        return "it was stopped, or its replicas ended"
    if new.lost:
        return f"{new.lost} of its replicas failed for good"
    if not new.ready and new.failures >= FAILURES:
        return f"its replicas failed {new.failures} times before one was ready"
    if rolling.comparison is not None and (worse := judge(rolling.comparison, seen.old_answers, seen.new_answers)):
        return worse
    if seen.still_ns >= rolling.progress_ns and not rollout.watched_ns:
        return f"it came no further for {format_duration(rolling.progress_ns)}"
    return ""


def _canary_event(rollout: Rollout, rolling: Rolling, seen: Seen, *, now: int) -> tuple[str, str]:
    if rollout.step >= len(rolling.steps) or not seen.old.live:
        return "promoted", ""
    if not rollout.watched_ns:
        return ("watched", "") if seen.new.ready >= _canary_goal(rolling, rollout, seen) else ("", "")
    step = rolling.steps[rollout.step]
    if not step.hold_ns or now - rollout.watched_ns < step.hold_ns:
        return "", ""
    is_last = rollout.step + 1 == len(rolling.steps)
    return ("promoted" if is_last else "advanced"), f"{step.weight} % for {format_duration(step.hold_ns)}"


# How many


def _exchange(
    rolling: Rolling, needed: int, going: Side, coming: Side, *, keeps: int, grows_to: int, is_bad: bool = False
) -> tuple[int, int]:
    """How many of the revision that goes, and of the one that comes, are kept now.

    Of one that is bad only those that are ready are of any use.
    """
    floor = max(keeps, needed - rolling.unavailable - coming.ready)
    room = needed + rolling.surge - going.held
    ending = coming.held - coming.kept
    use = going.ready if is_bad else going.kept
    return max(0, min(going.kept, use, floor)), min(grows_to, max(coming.kept, room - ending))


def _canary_goal(rolling: Rolling, rollout: Rollout, seen: Seen) -> int:
    """How many replicas a canary has: its part of those needed, at least one, and not more than there is room for."""
    step = rolling.steps[rollout.step] if rollout.step < len(rolling.steps) else CanaryStep(weight=99)
    part = -(-seen.needed * step.weight // _HUNDRED)
    return max(1, min(part, max(seen.needed, 1)))


def _weights(rollout: Rollout, rolling: Rolling, seen: Seen) -> tuple[int, int] | None:
    """How many of a hundred requests each gets; one that has nothing ready gets none."""
    if not seen.old.ready or rollout.is_over:
        return None
    if rollout.state is RolloutState.RETURNING:
        return _HUNDRED, 0
    if rollout.state is RolloutState.CANARY and rollout.step < len(rolling.steps):
        weight = rolling.steps[rollout.step].weight if seen.new.ready else 0
        return _HUNDRED - weight, weight
    return None


def _progress(rollout: Rollout, seen: Seen) -> str:
    return f"{rollout.state}: {seen.new.ready} of revision {rollout.revision} ready, {seen.old.ready} of the one before"
