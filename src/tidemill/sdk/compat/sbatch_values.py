"""Values of sbatch's options: times, sizes, GPUs, arrays, dependencies.

Source: the manual page of sbatch, Slurm 22.05 to 24.11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

from tidemill.sdk.compat.mapping import Refuse, shown
from tidemill.units import SECOND_NS, format_size

_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_MEMORY: Final = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_POWERS: Final = {"K": 1, "": 2, "M": 2, "G": 3, "T": 4}
_ENDLESS: Final = ("0", "UNLIMITED", "INFINITE", "-1")
_MEND_TIME: Final = "Write minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]."


def seconds_of(value: str) -> int:
    """Seconds of a time limit; zero: no limit. Raises: Refuse.

    >>> seconds_of("1-12"), seconds_of("90"), seconds_of("1:30:00")
    (129600, 5400, 5400)
    """
    if value.upper() in _ENDLESS:
        return 0
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise Refuse(f"{shown(value)} is not a time.", _MEND_TIME)
    days, *rest = match.groups()
    given = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
        return int(days) * 86_400 + hours * 3_600 + minutes * 60 + seconds
    if len(given) == 1:
        return given[0] * 60
    if len(given) == 2:
        return given[0] * 60 + given[1]
    return given[0] * 3_600 + given[1] * 60 + given[2]


def duration_text(seconds: int) -> str:
    """A duration as Tidemill writes it: ``1h30m``."""
    parts = (
        (seconds // 86_400, "d"),
        (seconds % 86_400 // 3_600, "h"),
        (seconds % 3_600 // 60, "m"),
        (seconds % 60, "s"),
    )
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def bytes_of(value: str) -> int:
    """Bytes of a size, which is in megabytes when it has no unit. Raises: Refuse."""
    match = _MEMORY.fullmatch(value.strip())
    if match is None:
        raise Refuse(f"{shown(value)} is not a size.", "Write for example 4000M or 16G.")
    factor: int = 1024 ** _POWERS[match[2].upper()]
    return int(match[1]) * factor


def size_text(size: int) -> str:
    """Bytes as Tidemill writes them, exactly: ``16GB``."""
    for unit, factor in (("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return format_size(size).replace(" ", "") if size == 0 else f"{size}B"


@dataclass(frozen=True, slots=True)
class Gpus:
    """So many GPUs, of a type when one is named."""

    model: str
    count: int


def gpus_of(value: str) -> Gpus:
    """GPUs written as ``4``, ``a100`` or ``a100:4``. Raises: Refuse."""
    parts = value.strip().split(":")
    model = "" if parts[0].isdecimal() else parts.pop(0)
    count = parts.pop(0) if parts else "1"
    if parts or not count.isdecimal() or "," in value:
        raise Refuse(f"{shown(value)} is not a number of GPUs.", "Write for example 4 or a100:4.")
    return Gpus(model, int(count))


@dataclass(frozen=True, slots=True)
class Indices:
    """Which tasks an array has: their ids in order, and how many run at a time (zero: no limit)."""

    ids: tuple[int, ...]
    parallel: int

    @property
    def step(self) -> int:
        """The distance between ids; zero when it is not always the same."""
        distances = {after - before for before, after in zip(self.ids, self.ids[1:], strict=False)}
        return 1 if not distances else distances.pop() if len(distances) == 1 else 0


def array_of(value: str) -> Indices:
    """The tasks of ``0-15``, ``0-15:4``, ``1,3,5-7`` and ``0-99%10``. Raises: Refuse."""
    from tidemill.model.spec import MAX_ARRAY

    spans, percent, limit = value.strip().partition("%")
    mend = "Write for example 0-15, 1-9:2, 1,3,5 or 0-99%10."
    if percent and not limit.isdecimal():
        raise Refuse(f"{shown(value)} is not an array.", mend)
    ids: dict[int, None] = {}
    for span in spans.strip("[]").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", span.strip())
        if match is None or match[3] == "0":
            raise Refuse(f"{shown(value)} is not an array.", mend)
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or (last - first) // step >= MAX_ARRAY:
            raise Refuse(f"{shown(value)} is not an array of up to {MAX_ARRAY:,} tasks.", mend)
        ids.update(dict.fromkeys(range(first, last + 1, step)))
    return Indices(tuple(sorted(ids)), int(limit or 0))


_AGO: Final = re.compile(r"now(?:\+(\d+)\s*(second|minute|hour|day|week)?s?)?", re.IGNORECASE)
_UNITS: Final = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800}
_CLOCK: Final = {"midnight": (0, 0), "noon": (12, 0), "fika": (15, 0), "teatime": (16, 0)}
_HOUR: Final = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(AM|PM)?", re.IGNORECASE)


def moment_of(value: str, *, now_ns: int, offset_s: int) -> str:
    """When ``--begin`` or ``--deadline`` is, as Tidemill writes instants. Raises: Refuse."""
    word = value.strip()
    if match := _AGO.fullmatch(word):
        return f"in {int(match[1] or 0) * _UNITS[(match[2] or 'second').lower()]}s"
    zone = timezone(timedelta(seconds=offset_s))
    now = datetime.fromtimestamp(now_ns // SECOND_NS, UTC).astimezone(zone)
    when = _instant(word, now)
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _instant(word: str, now: datetime) -> datetime:
    day, _, clock = word.partition("T")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", day):
        hour, minute, second = _clock(clock) if clock else (0, 0, 0)
        return _replaced(now, tuple(map(int, day.split("-"))), hour, minute, second)
    if match := re.fullmatch(r"(\d\d)[/.]?(\d\d)[/.]?(\d\d)", word):
        parts = (
            (int(match[3]), int(match[1]), int(match[2]))
            if "." not in word
            else (int(match[3]), int(match[2]), int(match[1]))
        )
        return _replaced(now, (2_000 + parts[0], *parts[1:]), 0, 0, 0)
    if word.lower() in ("today", "tomorrow"):
        return now + timedelta(days=word.lower() == "tomorrow")
    hour, minute, second = _clock(word)
    when = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
    return when if when > now else when + timedelta(days=1)


def _clock(word: str) -> tuple[int, int, int]:
    if word.lower() in _CLOCK:
        return (*_CLOCK[word.lower()], 0)
    match = _HOUR.fullmatch(word)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise Refuse(f"{shown(word)} is not a time.", "Write for example 2027-03-01T09:00, 16:00 or now+2hours.")
    hour = int(match[1]) % 12 + 12 * (match[4].upper() == "PM") if match[4] else int(match[1])
    return hour, int(match[2]), int(match[3] or 0)


def _replaced(now: datetime, day: tuple[int, ...], hour: int, minute: int, second: int) -> datetime:
    try:
        return datetime(day[0], day[1], day[2], hour, minute, second, tzinfo=now.tzinfo)
    except ValueError as error:
        raise Refuse("There is no such day.", "Write for example 2027-03-01T09:00.") from error
