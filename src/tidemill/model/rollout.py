"""How a service is brought from one revision of its spec to the next, and how far that is.

A workload never changes: each revision of a service is a workload of its own. A rollout leads from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tidemill.model.ids import ProjectId, RolloutId, WorkloadId
from tidemill.units import DAY_NS, MILLI, MINUTE_NS

MAX_STEPS: Final = 16
MAX_REQUESTS: Final = 1_000_000
MAX_SLOWER_MILLI: Final = 100 * MILLI
MAX_SURGE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryStep:
    """So many of a hundred requests go to the new revision for ``hold_ns``; zero: until somebody promotes it."""

    weight: int
    hold_ns: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.weight <= 99:
            raise ValueError("a canary gets between 1 and 99 of 100 requests")
        if not 0 <= self.hold_ns <= 7 * DAY_NS:
            raise ValueError("a canary is held for a week at most")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """When a new revision is taken back by itself: compared with the old one, over the requests of ``window_ns``.

    It may have ``errors_milli`` more errors in 1000 requests. 95 of 100 of its answers may take ``slower_milli``
    thousandths of what they take from the old one; zero: however long. Below ``requests`` of them nothing is said.
    """

    errors_milli: int = 50
    slower_milli: int = 0
    requests: int = 50
    window_ns: int = MINUTE_NS

    def __post_init__(self) -> None:
        if not 0 <= self.errors_milli <= MILLI:
            raise ValueError("errors are between none and all of the requests")
        if self.slower_milli and not MILLI <= self.slower_milli <= MAX_SLOWER_MILLI:
            raise ValueError("a new revision may be between 1 and 100 times as slow as the old one")
        if not 1 <= self.requests <= MAX_REQUESTS:
            raise ValueError(f"a revision is judged by between 1 and {MAX_REQUESTS} requests")
        if not MINUTE_NS // 12 <= self.window_ns <= DAY_NS // 24:
            raise ValueError("a revision is judged by between 5 seconds and an hour")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolling:
    """How a service's replicas are exchanged for those of a new revision.

    There are at most ``surge`` more than it needs, and at most ``unavailable`` fewer are ready. One that leaves has
    ``drain_ns`` to finish what is under way on it. ``steps`` are gone through first. ``comparison`` None: it is not
    taken back for what it answers. ``progress_ns`` is how long it may come no further before it is taken back.
    """

    surge: int = 1
    unavailable: int = 0
    drain_ns: int = 10 * MINUTE_NS
    progress_ns: int = 30 * MINUTE_NS
    steps: tuple[CanaryStep, ...] = ()
    comparison: Comparison | None = Comparison()

    def __post_init__(self) -> None:
        if not 0 <= self.surge <= MAX_SURGE or not 0 <= self.unavailable <= MAX_SURGE:
            raise ValueError(f"surge and unavailable lie between 0 and {MAX_SURGE}")
        if not self.surge and not self.unavailable:
            raise ValueError("with neither surge nor unavailable no replica can be exchanged")
        if not 0 <= self.drain_ns <= DAY_NS or not MINUTE_NS // 60 <= self.progress_ns <= 7 * DAY_NS:
            raise ValueError("a replica drains for a day at most, and progress is awaited for 1 s to a week")
        if len(self.steps) > MAX_STEPS:
            raise ValueError(f"a canary has {MAX_STEPS} steps at most")
        weights = [step.weight for step in self.steps]
        if weights != sorted(set(weights)):
            raise ValueError("each step of a canary has a larger weight than the one before")


class RolloutState(StrEnum):
    """Where a rollout is."""

    CANARY = "canary"
    """A part of the requests goes to the new revision, and it is looked at what becomes of them."""
    ROLLING = "rolling"
    """Replicas of the new revision take the place of the old one's."""
    RETURNING = "returning"
    """Replicas of the old revision take their place again."""
    COMPLETE = "complete"
    REVERTED = "reverted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The way of a service from the workload ``before_id``, its revision ``before_revision``, to ``workload_id``.

    ``first_id`` is its first revision, by which all of them are found. ``step`` is that of the canary, whose replicas
    were all ready at ``watched_ns`` (zero: not yet). ``detail`` says why it is where it is. Zero instants mean "not
    yet".
    """

    id: RolloutId
    project_id: ProjectId
    name: str
    first_id: WorkloadId
    before_id: WorkloadId
    workload_id: WorkloadId
    revision: int
    before_revision: int = 1
    state: RolloutState
    version: int = 1
    step: int = 0
    watched_ns: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    back_to: int = 0
    """The revision whose spec this one has, when somebody went back to it: it has proved itself, and is not tried."""
    by: str = ""
    detail: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it came to an end, one or the other."""
        return self.state in (RolloutState.COMPLETE, RolloutState.REVERTED)
