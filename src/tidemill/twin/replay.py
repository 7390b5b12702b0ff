"""A recording's turns taken again with the present code, and every decision that came out otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tidemill.control.recording import Beginning, Decision, decisions
from tidemill.model.events import Fact
from tidemill.model.ids import JobId, LaunchId
from tidemill.twin.cloud import Cloud
from tidemill.twin.recording import Turn, read_recording


@dataclass(frozen=True, slots=True)
class Outcome:
    """How something was decided, and in which turn."""

    at_ns: int
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """One decision that came out otherwise. None: it was not, or is not any more, decided at all."""

    job_id: JobId
    what: str
    before: Outcome | None
    after: Outcome | None

    @property
    def at_ns(self) -> int:
        """When it first differs."""
        return min(one.at_ns for one in (self.before, self.after) if one is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a replay. ``begun_ns`` is when the recording begins."""

    turns: int
    decisions: int
    begun_ns: int
    changed: tuple[Changed, ...]

    @property
    def is_same(self) -> bool:
        """Whether all was decided as before."""
        return not self.changed


def replay(path: Path) -> Replayed:
    """Take all turns of a file again."""
    return replay_turns(read_recording(path))


def replay_turns(parts: Iterable[Beginning | Turn]) -> Replayed:
    """Take turns again. Facts about a worker that is not yet there, since it is placed later now, wait for it.

    The turns' instants stay as they were, so a decision is made at most as late as the next turn after it could be.
    """
    run: _Replay | None = None
    turns = made = begun = 0
    changed: list[Changed] = []
    for part in parts:
        if isinstance(part, Beginning):
            changed += run.finish() if run is not None else ()
            run = _Replay(part)
            begun = begun or part.now
        elif run is not None:
            turns += 1
            made += len(part.decided)
            changed += run.take(part)
    changed += run.finish() if run is not None else ()
    changed.sort(key=lambda one: (one.at_ns, one.job_id, one.what))
    return Replayed(turns=turns, decisions=made, begun_ns=begun, changed=tuple(changed))


@dataclass(slots=True)
class _Waiting:
    """A fact about a worker that is not there yet; it came ``after_ns`` after the worker's placement."""

    fact: Fact
    attempt: tuple[str, str]
    after_ns: int


@dataclass(slots=True)
class _Side:
    """What one side decided and the other has not yet, and how often each thing was decided."""

    open: dict[tuple[JobId, str, int], Outcome] = field(default_factory=dict)
    counts: Counter[tuple[JobId, str]] = field(default_factory=Counter)


class _Replay:
    """One world, from its beginning to the next."""

    def __init__(self, beginning: Beginning) -> None:
        self._cloud = Cloud(beginning)
        self._before, self._after = _Side(), _Side()
        self._placed_before: dict[tuple[str, str], int] = {}
        self._placed_after: dict[tuple[str, str], int] = {}
        self._waiting: list[_Waiting] = []
        self._differs = False

    def take(self, turn: Turn) -> list[Changed]:
        """One turn; what is now known to be different."""
        plan = self._cloud.step([*self._ripe(turn.now), *self._present(turn)], now=turn.now)
        decided = list(decisions(plan))
        _note_placed(self._placed_before, turn.decided, turn.now)
        _note_placed(self._placed_after, decided, turn.now)
        return [
            *self._compare(self._before, self._after, turn.decided, turn.now, is_before=True),
            *self._compare(self._after, self._before, decided, turn.now, is_before=False),
            *self._books(turn, decided),
        ]

    def finish(self) -> list[Changed]:
        """What was decided on one side only."""
        found = []
        for (job_id, what, _), outcome in self._before.open.items():
            found.append(Changed(job_id=job_id, what=what, before=outcome, after=None))
        for (job_id, what, _), outcome in self._after.open.items():
            found.append(Changed(job_id=job_id, what=what, before=None, after=outcome))
        return found

    def _compare(
        self, mine: _Side, other: _Side, decided: Iterable[Decision], now: int, *, is_before: bool
    ) -> Iterator[Changed]:
        for one in decided:
            if not one.job_id:
                continue
            number = mine.counts[one.job_id, one.what]
            mine.counts[one.job_id, one.what] += 1
            key = (one.job_id, one.what, number)
            outcome, counterpart = Outcome(now, one.value), other.open.pop(key, None)
            if counterpart is None:
                mine.open[key] = outcome
            elif counterpart != outcome:
                self._differs = True
                before, after = (outcome, counterpart) if is_before else (counterpart, outcome)
                yield Changed(job_id=one.job_id, what=one.what, before=before, after=after)

    def _books(self, turn: Turn, decided: Iterable[Decision]) -> Iterator[Changed]:
        """The first turn that bills otherwise though all was decided as before; what follows from it is not told."""
        if self._differs or self._before.open or self._after.open:
            self._differs = True
            return
        before = next((one.value for one in turn.decided if not one.job_id), "")
        after = next((one.value for one in decided if not one.job_id), "")
        if before != after:
            self._differs = True
            yield Changed(
                job_id=JobId(""), what="books", before=Outcome(turn.now, before), after=Outcome(turn.now, after)
            )

    def _present(self, turn: Turn) -> Iterator[Fact]:
        """The turn's facts that can be told now; others are put aside."""
        for fact in turn.facts:
            attempt = _attempt_of(getattr(fact, "launch_id", LaunchId("")))
            before = self._placed_before.get(attempt)
            if before is None or self._is_due(attempt, turn.now - before, turn.now):
                yield fact
            else:
                self._waiting.append(_Waiting(fact, attempt, turn.now - before))

    def _ripe(self, now: int) -> list[Fact]:
        ripe = [one for one in self._waiting if self._is_due(one.attempt, one.after_ns, now)]
        if ripe:
            self._waiting = [one for one in self._waiting if one not in ripe]
        return [one.fact for one in ripe]

    def _is_due(self, attempt: tuple[str, str], after_ns: int, now: int) -> bool:
        placed = self._placed_after.get(attempt)
        return placed is not None and now - placed >= after_ns


def _attempt_of(launch_id: LaunchId) -> tuple[str, str]:
    """A launch's job and attempt number, by its id."""
    rest = launch_id.partition("_")[2]
    job, number, _ = rest.rsplit("-", 2) if rest.count("-") >= 2 else ("", "", "")
    return f"job_{job}", number


def _note_placed(placed: dict[tuple[str, str], int], decided: Iterable[Decision], now: int) -> None:
    for one in decided:
        if one.what.endswith(" is placed"):
            placed.setdefault((one.job_id, one.what.split()[1]), now)
