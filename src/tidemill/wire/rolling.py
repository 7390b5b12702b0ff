"""What each field of ``service.rollout`` takes, and how it is written."""

from __future__ import annotations

import re
from typing import Any, Final

from tidemill.model.rollout import MAX_SLOWER_MILLI, MAX_STEPS, CanaryStep, Comparison, Rolling
from tidemill.units import DAY_NS, HOUR_NS, MILLI, SECOND_NS
from tidemill.wire.checks import Refusal, duration_of, shown

_PERCENT: Final = re.compile(r"(\d{1,3}(?:\.\d)?)\s*%", re.ASCII)
_CANARY_MEND: Final = "Write for example 10%, or a list such as [{weight: 10, for: 5m}, {weight: 50, for: 10m}]."


def weight_of(value: object) -> int:
    """How many of a hundred requests, of ``10`` or ``10%``."""
    if type(value) is str and (match := _PERCENT.fullmatch(value.strip())) and "." not in match[1]:
        value = int(match[1])
    if type(value) is not int or not 1 <= value <= 99:
        raise Refusal(f"{shown(value)} is no part of the requests.", "Write 1 to 99, or for example 10%.")
    return value


def errors_of(value: object) -> int:
    """Thousandths, of ``5%`` or 0.05."""
    milli = -1
    if type(value) is str and (match := _PERCENT.fullmatch(value.strip())):
        milli = round(float(match[1]) * 10)
    elif (type(value) is int or type(value) is float) and 0 <= value <= 1:
        milli = round(value * MILLI)
    if not 0 <= milli <= MILLI:
        raise Refusal(f"{shown(value)} is no part of the requests.", "Write for example 5%, or 0.05.")
    return milli


def slower_of(value: object) -> int:
    """Thousandths of the time that answers take, of ``1.5``; 0 for no such bound."""
    milli = round(value * MILLI) if (type(value) is int or type(value) is float) and 0 <= value <= 1_000 else -1
    if milli and not MILLI <= milli <= MAX_SLOWER_MILLI:
        raise Refusal(f"{shown(value)} is not between 1 and 100.", "Write for example 1.5, or 0 for no bound.")
    return milli


def watch_of(value: object) -> int:
    """Nanoseconds over which requests are compared."""
    found = duration_of(value)
    if not 5 * SECOND_NS <= found <= HOUR_NS:
        raise Refusal(f"{shown(value)} is out of range.", "Write 5s to 1h.")
    return found


def hold_of(value: object) -> int:
    """Nanoseconds for which a canary is held; 0: until it is promoted."""
    found = duration_of(value)
    if found > 7 * DAY_NS:
        raise Refusal(f"{shown(value)} is longer than a week.", "Write for example 10m, or 0 to wait for a promotion.")
    return found


def progress_of(value: object) -> int:
    """Nanoseconds in which a rollout has to come further."""
    found = duration_of(value)
    if not SECOND_NS <= found <= 7 * DAY_NS:
        raise Refusal(f"{shown(value)} is not between 1s and 7d.", "Write for example 30m.")
    return found


def steps_of(value: object) -> object:
    """The steps of a canary as a list, also when there is one and only its weight is written."""
    if value is None:
        return []
    if type(value) in (int, str, dict):
        value = [value]
    if type(value) is not list:
        raise Refusal(f"{shown(value)} is no canary.", _CANARY_MEND)
    if len(value) > MAX_STEPS:
        raise Refusal(f"It has {len(value):,} steps.", f"Write at most {MAX_STEPS}.")
    return [{"weight": step} if type(step) in (int, str) else step for step in value]


def rollback_of(value: object) -> object:
    """A section, of ``true``; nothing, of ``false``."""
    return {} if value is True else None if value is False else value


def rolling_json(rolling: Rolling, duration: Any) -> dict[str, Any]:
    """The section, as it is read; ``duration`` writes a length of time."""
    written: dict[str, Any] = {
        "surge": rolling.surge,
        "unavailable": rolling.unavailable,
        "drain": duration(rolling.drain_ns),
        "progress": duration(rolling.progress_ns),
    }
    if rolling.steps:
        written["canary"] = [_step_json(step, duration) for step in rolling.steps]
    written["rollback"] = False if rolling.comparison is None else _rollback_json(rolling.comparison, duration)
    return written


def _step_json(step: CanaryStep, duration: Any) -> dict[str, Any]:
    return {"weight": step.weight} | ({"for": duration(step.hold_ns)} if step.hold_ns else {})


def _rollback_json(it: Comparison, duration: Any) -> dict[str, Any]:
    return {
        "errors": it.errors_milli / MILLI,
        "slower": it.slower_milli / MILLI,
        "requests": it.requests,
        "window": duration(it.window_ns),
    }
