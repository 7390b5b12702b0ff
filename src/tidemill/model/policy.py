"""Numbers that steer decisions; all have defaults, all can be set."""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.units import DAY_NS, HOUR_NS, MINUTE_NS, SECOND_NS


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How the turn behaves.

    ``meter_every_ns`` bounds the length of a usage interval, unless its energy is to be read behind a cut link.
    ``retry_backoff_ns`` doubles with each retry, up to ``retry_backoff_max_ns``. A worker that outlives its grace by
    ``stop_margin_ns`` is stopped again, every ``stop_retry_ns``. ``starts_per_turn`` bounds how many jobs one turn
    starts. A service that was ready for ``retry_forget_ns`` has all its retries again.

    ``order`` and ``score`` name the plug-ins that order waiting jobs and choose among nodes. Past usage counts for half
    after ``half_life_ns`` (zero: only what is held now counts). One step of priority is worth ``ageing_ns`` of
    waiting, so nothing is passed for ever; a job that has waited ``patience_ns`` goes before all that have not,
    whatever its queue's share. ``backfill`` lets jobs pass the first blocked one when they do not delay it; a job
    that does not say how long it takes is assumed to go on for as long as it has run, at least
    ``assumed_duration_ns``, and a plan for the blocked job is looked over every ``replan_ns``.

    ``preemption`` allows displacing at all. Nothing is displaced before it has run ``min_run_ns``.
    ``displace_in_project`` lets a job of higher priority displace one of lower priority in its own project. A node
    that was lost ``flap_losses`` times within ``flap_window_ns`` is held back for ``flap_hold_ns`` after it returns.
    """

    meter_every_ns: int = MINUTE_NS
    retry_backoff_ns: int = SECOND_NS // 2
    retry_backoff_max_ns: int = MINUTE_NS
    retry_forget_ns: int = 10 * MINUTE_NS
    stop_retry_ns: int = 5 * SECOND_NS
    stop_margin_ns: int = 5 * SECOND_NS
    starts_per_turn: int = 512
    order: str = "fair"
    score: str = "tide"
    half_life_ns: int = DAY_NS
    ageing_ns: int = 15 * MINUTE_NS
    patience_ns: int = DAY_NS
    backfill: bool = True
    assumed_duration_ns: int = HOUR_NS
    replan_ns: int = 30 * SECOND_NS
    preemption: bool = True
    min_run_ns: int = 5 * MINUTE_NS
    displace_in_project: bool = True
    flap_losses: int = 3
    flap_window_ns: int = HOUR_NS
    flap_hold_ns: int = 10 * MINUTE_NS
