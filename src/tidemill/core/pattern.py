"""What a service usually needs at a time of day, and how far that can be relied on.

A day has slots of five minutes, weekdays and weekends their own (in UTC). Of each slot the mean of late days is kept,
the newest counting most. Before a slot is learned it is compared: what the pattern said, and what the plain mean of
all slots said. Only while the pattern was wrong by less than half as much as the mean is it relied on; a service whose
days have nothing in common is followed by what it needs now, and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from tidemill.model.scaling import PER_DAY, SLOT_NS, Pattern
from tidemill.units import DAY_NS

_WEEKEND_BEGINS: Final = 2
"""1970 began on a Thursday, so days 2 and 3 of each seven are Saturday and Sunday."""
_ENOUGH_DAYS: Final = 2
JUDGED_SLOTS: Final = PER_DAY // 2
"""So many have to have been compared before a pattern is relied on."""
_NEWEST: Final = 3
"""The newest day is this part of a slot's mean, once there were as many days."""
_ERROR_WEIGHT: Final = 64
_LEAST_MILLI: Final = 100
"""Less than a tenth of a replica is nothing to have one there for."""
_MOST_MILLI: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The slot that is under way: need x time so far, and how much of it was seen."""

    number: int = -1
    milli_ns: int = 0
    seen_ns: int = 0
    at_ns: int = 0
    need_milli: int = 0


def is_good(pattern: Pattern) -> bool:
    """Whether it was of use lately."""
    return pattern.judged >= JUDGED_SLOTS and 2 * pattern.error_milli < pattern.plain_error_milli


def slot_of(now: int) -> int:
    """The place of an instant in the week's two sorts of days.

    >>> slot_of(0), slot_of(6 * MINUTE_NS), slot_of(2 * DAY_NS) - PER_DAY, slot_of(4 * DAY_NS)
    (0, 1, 0, 0)
    """
    day, within = divmod(now, DAY_NS)
    return within // SLOT_NS + (PER_DAY if day % 7 in (_WEEKEND_BEGINS, _WEEKEND_BEGINS + 1) else 0)


def observe(pattern: Pattern, slot: Slot, need_milli: int, *, now: int) -> tuple[Pattern, Slot]:
    """The pattern and the slot under way after a need was seen, which holds until the next look."""
    need_milli = min(max(need_milli, 0), _MOST_MILLI)
    number = now // SLOT_NS
    fresh = Slot(number=number, at_ns=now, need_milli=need_milli)
    if slot.number < 0 or now < slot.at_ns:
        return pattern, fresh
    ends = (slot.number + 1) * SLOT_NS
    lasted = min(now, ends) - slot.at_ns
    milli_ns, seen = slot.milli_ns + lasted * slot.need_milli, slot.seen_ns + lasted
    if number == slot.number:
        return pattern, replace(slot, milli_ns=milli_ns, seen_ns=seen, at_ns=now, need_milli=need_milli)
    if 2 * seen >= SLOT_NS:
        pattern = learn(pattern, milli_ns // seen, at=slot.number * SLOT_NS)
    if number == slot.number + 1:
        fresh = replace(fresh, milli_ns=(now - ends) * slot.need_milli, seen_ns=now - ends)
    return pattern, fresh


def learn(pattern: Pattern, need_milli: int, *, at: int) -> Pattern:
    """The pattern with what was needed in the slot at that instant."""
    index = slot_of(at)
    days, mean = pattern.days[index], pattern.means_milli[index]
    changed = pattern
    if days:
        judged = pattern.judged + 1
        weight = min(judged, _ERROR_WEIGHT)
        changed = replace(
            pattern,
            judged=min(judged, 1_000_000),
            error_milli=_toward(pattern.error_milli, abs(need_milli - mean), weight),
            plain_error_milli=_toward(pattern.plain_error_milli, abs(need_milli - pattern.plain_milli), weight),
        )
    mean = _toward(mean, need_milli, min(days + 1, _NEWEST))
    seen = min(sum(1 for one in pattern.days if one) + 1, PER_DAY)
    return replace(
        changed,
        means_milli=(*pattern.means_milli[:index], mean, *pattern.means_milli[index + 1 :]),
        days=(*pattern.days[:index], min(days + 1, 1_000), *pattern.days[index + 1 :]),
        plain_milli=_toward(pattern.plain_milli, need_milli, seen),
    )


def expected_milli(pattern: Pattern, *, now: int, until: int) -> int:
    """What is usually needed at most between two instants, both included; zero where nothing can be relied on."""
    if not is_good(pattern):
        return 0
    most = 0
    for number in range(now // SLOT_NS, min(until, now + DAY_NS) // SLOT_NS + 1):
        index = slot_of(number * SLOT_NS)
        if pattern.days[index] >= _ENOUGH_DAYS:
            most = max(most, pattern.means_milli[index])
    return most if most >= _LEAST_MILLI else 0


def _toward(mean: int, value: int, weight: int) -> int:
    """The mean moved to a value by one part in ``weight``."""
    return mean + (value - mean + weight // 2) // weight
