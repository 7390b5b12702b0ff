"""Numbers that steer decisions; all have defaults, all can be set."""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.units import MINUTE_NS, SECOND_NS


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How the turn behaves. ``meter_every_ns`` bounds the length of a usage interval. ``retry_backoff_ns`` doubles
    with each retry, up to ``retry_backoff_max_ns``. A worker that outlives its grace by ``stop_margin_ns`` is
    stopped again, every ``stop_retry_ns``. ``starts_per_turn`` bounds how many jobs one turn starts.
    """

    meter_every_ns: int = MINUTE_NS
    retry_backoff_ns: int = SECOND_NS // 2
    retry_backoff_max_ns: int = MINUTE_NS
    stop_retry_ns: int = 5 * SECOND_NS
    stop_margin_ns: int = 5 * SECOND_NS
    starts_per_turn: int = 512
