"""What each field of ``service.scaling`` takes, and how it is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tidemill.model.scaling import DAY_S, DAYS, MAX_TOLERANCE_MILLI, Hours, Scaling
from tidemill.units import HOUR_NS, MILLI, SECOND_NS
from tidemill.wire.checks import Refusal, duration_of, list_of, shown, text_of

_TIME: Final = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?", re.ASCII)
_SHARE: Final = re.compile(r"(\d{1,3}(?:\.\d{1,3})?)\s*%", re.ASCII)
_DAYS_MEND: Final = "Write for example mon-fri, sat, or [mon, wed, fri]."


def objective_of(value: object) -> int:
    """Nanoseconds that requests are to stay below; 0 for no such objective."""
    found = duration_of(value)
    if found > HOUR_NS:
        raise Refusal(f"{shown(value)} is longer than an hour.", "Write for example 500ms or 2s.")
    return found


def window_of(value: object) -> int:
    """Nanoseconds over which is looked at what users felt."""
    found = duration_of(value)
    if not 5 * SECOND_NS <= found <= HOUR_NS:
        raise Refusal(f"{shown(value)} is out of range.", "Write 5s to 1h.")
    return found


def share_of(value: object) -> int:
    """Thousandths, of ``80%`` or 0.8."""
    milli = -1
    if type(value) is str and (match := _SHARE.fullmatch(value.strip())):
        milli = round(float(match[1]) * 10)
    elif type(value) in (int, float):
        milli = round(float(value) * MILLI) if 0 <= float(value) <= 1 else -1  # type: ignore[arg-type]
    if not 0 <= milli <= MILLI:
        raise Refusal(f"{shown(value)} is not a share.", "Write for example 80%, or 0.8.")
    return milli


def tolerance_of(value: object) -> int:
    """Thousandths of an objective."""
    milli = share_of(value)
    if milli > MAX_TOLERANCE_MILLI:
        raise Refusal(f"{shown(value)} is too much.", "Write 0% to 50%.")
    return milli


def days_of(value: object) -> tuple[int, ...]:
    """Days of the week, Monday being 0."""
    found: set[int] = set()
    for text in list_of(lambda item: text_of(item, limit=100), "days")([value] if type(value) is str else value):
        for part in text.lower().replace(",", " ").split():
            first, dash, last = (piece.strip()[:3] for piece in part.partition("-"))
            if first not in DAYS or (dash and last not in DAYS):
                raise Refusal(f"{shown(part)} is not a day.", _DAYS_MEND)
            begin, end = DAYS.index(first), DAYS.index(last) if dash else DAYS.index(first)
            found.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    if not found:
        raise Refusal(f"{shown(value)} names no day.", _DAYS_MEND)
    return tuple(sorted(found))


def time_of(value: object) -> int:
    """Seconds since midnight. YAML reads 18:00 without quotes as the number 1080, which is taken for what was meant."""
    if type(value) is int and 0 <= value <= DAY_S // 60:
        return value * 60
    match = _TIME.fullmatch(value.strip()) if type(value) is str else None
    seconds = (
        sum(int(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else -1
    )
    if not 0 <= seconds <= DAY_S:
        raise Refusal(f"{shown(value)} is not a time of day.", 'Write for example "08:30".')
    return seconds


def zone_of(value: object) -> str:
    """The name of a time zone."""
    text = text_of(value, limit=64)
    if not _is_zone(text):
        raise Refusal(f"{shown(text)} is not a time zone.", "Write for example Europe/Berlin, or UTC.")
    return text


@cache
def _is_zone(text: str) -> bool:
    try:
        return bool(text) and bool(ZoneInfo(text))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False


_USUAL: Final = Scaling()
_NAMES: Final = {
    "ttft": "ttft_ns",
    "latency": "latency_ns",
    "queue": "queue_ns",
    "engine_queue": "engine_queue",
    "in_flight": "in_flight",
    "tokens": "tokens",
    "gpu": "gpu_milli",
    "kv_cache": "kv_cache_milli",
    "window": "window_ns",
    "tolerance": "tolerance_milli",
    "up_after": "up_after_ns",
    "up_step": "up_step",
    "down_step": "down_step",
    "down_every": "down_every_ns",
    "predict": "predicts",
}
"""Fields of the section, and where they are in the model."""


def scaling_json(scaling: Scaling, duration_json: Callable[[int], str | int]) -> dict[str, Any]:
    """The section as somebody could have written it; what is at its default is left out."""
    written: dict[str, Any] = {}
    for name, field in _NAMES.items():
        value = getattr(scaling, field)
        if value == getattr(_USUAL, field):
            continue
        if field.endswith("_ns"):
            value = duration_json(value)
        elif field.endswith("_milli"):
            value = f"{value / 10:g}%"
        written[name] = value
    if scaling.hours:
        written["schedule"] = [_hours_json(one) for one in scaling.hours]
    return written


def _hours_json(one: Hours) -> dict[str, Any]:
    return {
        "days": [DAYS[day] for day in one.days],
        "starts": clock_text(one.from_s),
        "ends": clock_text(one.until_s),
        "zone": one.zone,
        "replicas": one.replicas,
    }


def clock_text(seconds: int) -> str:
    """A time of day.

    >>> clock_text(8 * 3600 + 1800)
    '08:30'
    """
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}" + (f":{rest:02}" if rest else "")
