"""What the number of a service's replicas follows: what users are to feel, what a replica bears, times of day."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidemill.model.ids import ProjectId
from tidemill.units import DAY_NS, MILLI, MINUTE_NS, SECOND_NS

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_S: Final = DAY_NS // SECOND_NS
MAX_WINDOWS: Final = 64
MAX_TOLERANCE_MILLI: Final = 500
SLOT_NS: Final = 5 * MINUTE_NS
PER_DAY: Final = DAY_NS // SLOT_NS
SLOTS: Final = 2 * PER_DAY
"""Those of a weekday, then those of a day of the weekend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """So many replicas at least, on these days (Monday is 0) between these seconds of the day in that time zone.

    Hours that end before they begin, or when they begin, go on to the next day.
    """

    replicas: int
    days: tuple[int, ...] = tuple(range(7))
    from_s: int = 0
    until_s: int = DAY_S
    zone: str = "UTC"

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError("hours have one replica at least")
        if not self.days or any(not 0 <= day < len(DAYS) for day in self.days):
            raise ValueError("hours are on at least one day of the week")
        if not 0 <= self.from_s < DAY_S or not 0 <= self.until_s <= DAY_S:
            raise ValueError("hours lie within a day")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Objectives of which the one that needs most replicas wins; zero: none of that kind.

    ``ttft_ns``, ``latency_ns`` and ``queue_ns`` are what 95 of 100 requests of the last ``window_ns`` are to stay
    below: the time to the first byte of a stream, to the last byte, and in the gateway's line. ``engine_queue`` is how
    many requests may wait inside a replica. ``in_flight``, ``tokens`` (of answers, a second), ``gpu_milli`` and
    ``kv_cache_milli`` are what a replica is to have on average. Within ``tolerance_milli`` of an objective the number
    stays. A need counts once it was there for ``up_after_ns``; at most ``up_step`` replicas start at a time, and
    ``down_step`` are given up in ``down_every_ns`` (zero: any number). ``predicts``: what was needed at this time of
    day is there before it is needed again.
    """

    ttft_ns: int = 0
    latency_ns: int = 0
    queue_ns: int = 0
    engine_queue: int = 0
    in_flight: int = 0
    tokens: int = 0
    gpu_milli: int = 0
    kv_cache_milli: int = 0
    window_ns: int = MINUTE_NS
    tolerance_milli: int = 100
    up_after_ns: int = 0
    up_step: int = 0
    down_step: int = 0
    down_every_ns: int = MINUTE_NS
    predicts: bool = False
    hours: tuple[Hours, ...] = ()

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} is not negative")
        if self.gpu_milli > MILLI or self.kv_cache_milli > MILLI:
            raise ValueError("no more can be used than there is")
        if not 5 * SECOND_NS <= self.window_ns <= 3_600 * SECOND_NS:
            raise ValueError("the window lies between 5 seconds and an hour")
        if self.tolerance_milli > MAX_TOLERANCE_MILLI:
            raise ValueError("the tolerance is half of an objective at most")
        if max(self.up_after_ns, self.down_every_ns) > DAY_NS:
            raise ValueError("the number of replicas is decided within a day")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What is needed by time of day in thousandths of a replica; ``days`` is how many days of each slot were seen.

    ``judged`` slots were compared; ``error_milli`` and ``plain_error_milli`` are by how much the pattern and the plain
    mean of all slots were wrong of late.
    """

    means_milli: tuple[int, ...] = (0,) * SLOTS
    days: tuple[int, ...] = (0,) * SLOTS
    plain_milli: int = 0
    judged: int = 0
    error_milli: int = 0
    plain_error_milli: int = 0

    def __post_init__(self) -> None:
        if len(self.means_milli) != SLOTS or len(self.days) != SLOTS:
            raise ValueError(f"a pattern has {SLOTS} slots")
        if min(self.means_milli) < 0 or min(self.days) < 0:
            raise ValueError("needs and days are not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """What is remembered of a project's service of that name, also when it is submitted anew."""

    project_id: ProjectId
    service: str
    pattern: Pattern = Pattern()
    starts_ns: tuple[int, ...] = ()
    """How long its latest replicas took from their place to being ready."""
