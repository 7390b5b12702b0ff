"""② The order in which waiting jobs are tried, at a cost that follows what can change, not what waits.

Jobs that ask for the same from the same project are interchangeable: when the first does not fit, none does. The
queue keeps one line per such group and merges the heads of the lines, so a turn looks at as many jobs as it
starts plus one per group. Order: higher priority first, then earlier submission, then id; there are no ties.
A line may be closed for the rest of a turn; jobs leave lines lazily, when they are no longer waiting.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tidemill.core.feasible import Shape
from tidemill.model.ids import JobId, ProjectId
from tidemill.model.job import Job


@dataclass(frozen=True, slots=True)
class Line:
    """What makes waiting jobs interchangeable."""

    project_id: ProjectId
    shape: Shape
    workers: int


Rank = tuple[int, int, str]


def rank_of(job: Job) -> Rank:
    """The sort key of a waiting job: smaller goes first."""
    return (-job.priority, job.submitted_ns, job.id)


class WaitingLines:
    """Waiting jobs, by line. ``is_waiting`` tells whether an entry still counts."""

    def __init__(self, is_waiting: Callable[[JobId], bool]) -> None:
        self._lines: dict[Line, list[tuple[Rank, JobId]]] = {}
        self._members: set[JobId] = set()
        self._is_waiting = is_waiting
        self._left: list[tuple[Line, tuple[Rank, JobId]]] = []
        """Entries taken out in this turn because their jobs were not waiting any more."""

    def add(self, line: Line, job: Job) -> None:
        """Let a job wait; harmless when it does already."""
        if job.id not in self._members:
            self._members.add(job.id)
            heapq.heappush(self._lines.setdefault(line, []), (rank_of(job), job.id))

    def remove(self, line: Line, job: JobId) -> None:
        """Take out the head of a line, which was started."""
        entries = self._lines[line]
        if entries and entries[0][1] == job:
            heapq.heappop(entries)
        self._members.discard(job)

    def commit(self) -> None:
        """Jobs that stopped waiting in this turn stay out."""
        self._left.clear()

    def rollback(self) -> None:
        """Let the jobs wait again that stopped waiting in this turn, which never happened."""
        for line, entry in self._left:
            if entry[1] not in self._members:
                self._members.add(entry[1])
                heapq.heappush(self._lines.setdefault(line, []), entry)
        self._left.clear()

    def heads(self, is_closed: Callable[[Line], bool]) -> Iterator[tuple[Line, JobId]]:
        """The first waiting job of all lines that are open, again and again until every line is empty or closed.

        The caller starts the job (and calls ``remove``) or closes its line before asking for the next.
        """
        heads: list[tuple[Rank, int, JobId, Line]] = []
        for number, line in enumerate(self._lines):
            if not is_closed(line) and (head := self._head(line)) is not None:
                heads.append((head[0], number, head[1], line))
        heapq.heapify(heads)
        while heads:
            _, number, job, line = heads[0]
            if is_closed(line):
                heapq.heappop(heads)
                continue
            yield line, job
            head = None if is_closed(line) else self._head(line)
            if head is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (head[0], number, head[1], line))
        for line in [line for line, entries in self._lines.items() if not entries]:
            del self._lines[line]

    def ahead_of(self, job: Job) -> int:
        """How many waiting jobs are tried before this one."""
        mine = rank_of(job)
        return sum(
            1
            for entries in self._lines.values()
            for rank, other in entries
            if rank < mine and other != job.id and self._is_waiting(other)
        )

    def __len__(self) -> int:
        return sum(1 for job in self._members if self._is_waiting(job))

    def _head(self, line: Line) -> tuple[Rank, JobId] | None:
        entries = self._lines[line]
        while entries and not self._is_waiting(entries[0][1]):
            entry = heapq.heappop(entries)
            self._members.discard(entry[1])
            self._left.append((line, entry))
        return entries[0] if entries else None
