"""② The order in which waiting jobs are tried, at a cost that follows what can change, not what waits.

Jobs of one user that ask for the same are interchangeable: when the first does not fit, none does. The queue keeps
one *line* per such group and merges the heads of the lines that are open, so a turn looks at as many jobs as it
starts plus one per open line.

Down the quota tree, from the fleet to the user, the child goes first that would stay within its guarantee, then the
one with the smaller share (``core.fairness``), then the one whose next job ranks first. Each kind of GPU has such a
tree of its own. Among a user's own jobs of one kind the rank decides: what an order plug-in says, else the instant of
submission less ``ageing_ns`` for each step of priority; then earlier submission, then id, so there are no ties. A job
that has waited for ``patience_ns`` goes before all that have not. After a start only the shares on its path are
looked at again, and others when they come to the top.

A line may be closed for the rest of a turn; jobs leave lines lazily, when they are no longer waiting.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from msgspec import Struct

from tidemill.core.fairness import Party, covers
from tidemill.core.place import Gang
from tidemill.core.quota import QuotaTree
from tidemill.model.ids import JobId, PrincipalId, ProjectId
from tidemill.model.job import Job
from tidemill.model.queue import CPU, MEMORY
from tidemill.model.spec import Tier, Weight


class Line(Struct, frozen=True, cache_hash=True, gc=False):
    """What makes waiting jobs interchangeable. Its hash is worked out once."""

    project_id: ProjectId
    gang: Gang
    principal_id: PrincipalId = PrincipalId("")
    tier: Tier = Tier.ON_DEMAND
    duration_ns: int = 0
    """How long a job of it runs at most; zero: not known."""
    reservation: str = ""
    apart: tuple[tuple[str, str], ...] = ()
    group: str = ""
    data: tuple[str, ...] = ()
    """What tells apart jobs that need different data."""
    weigh: tuple[tuple[Weight, int], ...] = ()
    near: str = ""


class _Entry(NamedTuple):
    """A job in its line, sorted by rank. ``mark`` tells it from an earlier stay of the same job."""

    rank: float
    submitted_ns: int
    job_id: JobId
    mark: int
    since_ns: int


class _Lane:
    """One line with its jobs: all of them by rank, and those that waited too long by age. Heaps."""

    __slots__ = ("entries", "late", "line")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.entries: list[_Entry] = []
        self.late: list[tuple[int, JobId, _Entry]] = []


class WaitingLines:
    """Waiting jobs, by line. ``is_waiting`` tells whether an entry still counts.

    Without a quota tree all jobs are ranked together. ``amounts_of`` is what a job of a line would hold, by resource,
    with ``gpu`` or ``gpu:NAME`` where the device model is open; without it shares of everything are compared, and no
    order can be foreseen. ``ageing_ns`` None: higher priority always
    goes first. ``patience_ns`` zero: no job is ever late.
    """

    def __init__(
        self,
        is_waiting: Callable[[JobId], bool],
        quota: QuotaTree | None = None,
        *,
        amounts_of: Callable[[Line], Mapping[str, int]] | None = None,
        ageing_ns: int | None = None,
        patience_ns: int = 0,
    ) -> None:
        self.quota = quota
        self.ageing_ns = ageing_ns
        self.patience_ns = patience_ns
        self._amounts_of = amounts_of
        self._is_waiting = is_waiting
        self._lanes: dict[Line, _Lane] = {}
        self._members: dict[JobId, tuple[Line, _Entry]] = {}
        self._ageing: list[tuple[int, JobId, int]] = []
        """A heap of (since, job, mark) of those that are not late yet."""
        self.arrivals = 0
        """How many entries there have been so far, those that came again included."""
        self._journal: list[tuple[bool, Line, _Entry]] = []
        """What happened since ``commit``, newest last: whether the entry came, its line, the entry."""

    # -- changing -----------------------------------------------------------------------------------------------

    def add(self, line: Line, job: Job, rank: float | None = None, *, since_ns: int | None = None) -> None:
        """Let a job wait; harmless when it does already. ``since_ns``: from when its patience counts."""
        if job.id in self._members:
            return
        if rank is None:
            rank = -job.priority if self.ageing_ns is None else job.submitted_ns - job.priority * self.ageing_ns
        since = job.submitted_ns if since_ns is None else since_ns
        entry = self._insert(line, rank, job.submitted_ns, job.id, since)
        self._journal.append((True, line, entry))

    def remove(self, line: Line, job: JobId) -> None:
        """Take out a job, which was started; harmless when it does not wait."""
        member = self._members.pop(job, None)
        if member is None:
            return
        self._journal.append((False, *member))
        entries = self._lanes[line].entries
        if entries and entries[0] is member[1]:
            heapq.heappop(entries)

    def commit(self) -> None:
        """What came and went in this turn stays so."""
        self._journal.clear()

    def rollback(self) -> None:
        """Take back what came and went in this turn, which never happened."""
        while self._journal:
            came, line, entry = self._journal.pop()
            if not came:
                self._insert(line, entry.rank, entry.submitted_ns, entry.job_id, entry.since_ns)
            else:
                self._members.pop(entry.job_id, None)

    # -- reading ------------------------------------------------------------------------------------------------

    def heads(self, is_closed: Callable[[Line], bool], *, now: int | None = None) -> Iterator[tuple[Line, JobId]]:
        """The next job of all lines that are open, again and again until every line is empty or closed.

        The caller starts the job (and calls ``remove``) or closes its line before asking for the next. With ``now``,
        jobs that have waited too long come first, oldest first.
        """
        if now is not None and self.patience_ns:
            yield from self._late_heads(is_closed, now)
        order = _Order(self.quota, self._amounts_of)
        empty: list[_Lane] = []
        for lane in self._lanes.values():
            if is_closed(lane.line):
                continue
            if (head := self._head(lane)) is not None:
                order.add(lane, head)
            elif not lane.entries:
                empty.append(lane)
        for lane in empty:
            del self._lanes[lane.line]
        while (found := order.first()) is not None:
            lane, entry = found
            yield lane.line, entry.job_id
            order.replace_first(None if is_closed(lane.line) else self._head(lane))

    def in_order(self, limit: int | None = None, *, now: int | None = None) -> tuple[tuple[Line, JobId], ...]:
        """Waiting jobs in the order in which they would be tried if each were started in its turn."""
        return tuple(islice(self._foreseen(now), limit))

    def ahead_of(self, job: Job, *, now: int | None = None, limit: int | None = None) -> int:
        """How many waiting jobs would be tried before this one, counted up to ``limit``."""
        if self.quota is None:
            member = self._members.get(job.id)
            if member is None:
                return 0
            return sum(1 for _, entry in self._waiting() if entry < member[1])
        return next((at for at, (_, other) in enumerate(self._foreseen(now)) if at == limit or other == job.id), 0)

    def has(self, line: Line) -> bool:
        """Whether anything may wait in a line."""
        return line in self._lanes

    def head(self, line: Line) -> JobId | None:
        """The first waiting job of a line; None when none waits there."""
        lane = self._lanes.get(line)
        entry = self._head(lane) if lane is not None else None
        return entry.job_id if entry is not None else None

    def has_late(self, now: int) -> bool:
        """Whether there is a job whose patience ends by now and that was not found late before."""
        return bool(self.patience_ns and self._ageing and self._ageing[0][0] + self.patience_ns <= now)

    def is_in_line(self, job: JobId) -> bool:
        """Whether a job is in a line, and was not taken out."""
        return job in self._members

    def is_late(self, job: JobId, now: int) -> bool:
        """Whether a job that waits has waited too long."""
        member = self._members.get(job)
        return member is not None and bool(self.patience_ns) and member[1].since_ns + self.patience_ns <= now

    def members(self) -> list[JobId]:
        """The jobs that wait."""
        return [job for job in self._members if self._is_waiting(job)]

    def __len__(self) -> int:
        return sum(1 for job in self._members if self._is_waiting(job))

    # -- inside -------------------------------------------------------------------------------------------------

    def _insert(self, line: Line, rank: float, submitted_ns: int, job: JobId, since_ns: int) -> _Entry:
        self.arrivals += 1
        lane = self._lanes.get(line)
        if lane is None:
            lane = self._lanes[line] = _Lane(line)
        entry = _Entry(rank, submitted_ns, job, self.arrivals, since_ns)
        self._members[job] = (lane.line, entry)
        heapq.heappush(lane.entries, entry)
        if self.patience_ns:
            heapq.heappush(self._ageing, (since_ns, job, entry.mark))
            if len(self._ageing) > 2 * len(self._members) + 1_000:
                self._ageing = [(e.since_ns, e.job_id, e.mark) for _, e in self._members.values()]
                heapq.heapify(self._ageing)
        return entry

    def _is_current(self, entry: _Entry) -> bool:
        """Whether the entry's job still waits, and not in another entry; one that does not wait any more is let go."""
        member = self._members.get(entry.job_id)
        if member is None or member[1].mark != entry.mark:
            return False
        if self._is_waiting(entry.job_id):
            return True
        del self._members[entry.job_id]
        self._journal.append((False, *member))
        return False

    def _head(self, lane: _Lane) -> _Entry | None:
        entries = lane.entries
        while entries and not self._is_current(entries[0]):
            heapq.heappop(entries)
        return entries[0] if entries else None

    def _late_heads(self, is_closed: Callable[[Line], bool], now: int) -> Iterator[tuple[Line, JobId]]:
        while self._ageing and self._ageing[0][0] + self.patience_ns <= now:
            since, job, mark = heapq.heappop(self._ageing)
            member = self._members.get(job)
            if member is not None and member[1].mark == mark:
                heapq.heappush(self._lanes[member[0]].late, (since, job, member[1]))
        heads = [
            (head.since_ns, head.job_id, lane)
            for lane in self._lanes.values()
            if lane.late and not is_closed(lane.line) and (head := self._late_head(lane)) is not None
        ]
        heapq.heapify(heads)
        while heads:
            _, job, lane = heads[0]
            yield lane.line, job
            head = None if is_closed(lane.line) else self._late_head(lane)
            if head is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (head.since_ns, head.job_id, lane))

    def _late_head(self, lane: _Lane) -> _Entry | None:
        while lane.late and not self._is_current(lane.late[0][2]):
            heapq.heappop(lane.late)
        return lane.late[0][2] if lane.late else None

    def _waiting(self) -> Iterator[tuple[Line, _Entry]]:
        return ((line, entry) for line, entry in self._members.values() if self._is_waiting(entry.job_id))

    def _foreseen(self, now: int | None) -> Iterator[tuple[Line, JobId]]:
        """All waiting jobs as they would be tried; nothing is changed."""
        by_line: dict[Line, list[_Entry]] = {}
        late: list[tuple[int, JobId, Line]] = []
        for line, entry in self._waiting():
            if now is not None and self.patience_ns and entry.since_ns + self.patience_ns <= now:
                late.append((entry.since_ns, entry.job_id, line))
            else:
                by_line.setdefault(line, []).append(entry)
        order = _Order(self.quota, self._amounts_of)
        for _, job, line in sorted(late):
            order.charge(line)
            yield line, job
        for line, entries in by_line.items():
            entries.sort(reverse=True)
            order.add(_Lane(line), entries[-1])
        while (found := order.first()) is not None:
            lane, entry = found
            entries = by_line[lane.line]
            entries.pop()
            order.charge(lane.line)
            order.replace_first(entries[-1] if entries else None)
            yield lane.line, entry.job_id


_Key = tuple[bool, float, _Entry]
_User = tuple[ProjectId, PrincipalId]


class _Node:
    """A party with the heap of those below it that have something open; ``heap`` pairs keys with nodes or lanes."""

    __slots__ = ("children", "compared", "heap", "party")

    def __init__(self, party: Party | None) -> None:
        self.party = party
        self.children: dict[str, _Node] = {}
        self.heap: list[tuple[_Key, _Node | _Lane]] = []
        self.compared: tuple[int, Mapping[str, int] | None, tuple[bool, float]] | None = None
        """What the party was last compared by: as of which change of the tree, and for what need."""


class _Order:
    """Those who have something open, as trees with the children of each node by key; ``first`` goes along the tops.

    There is a tree for each kind of GPU that is asked for, so that a job in need of what its owners have much of does
    not stand before their jobs in need of something else. What one user asks for of overlapping kinds stays together.
    """

    def __init__(self, quota: QuotaTree | None, amounts_of: Callable[[Line], Mapping[str, int]] | None) -> None:
        self._quota, self._amounts_of = quota, amounts_of
        self._known: dict[Line, Mapping[str, int]] = {}
        self._added: dict[_User, list[tuple[_Lane, _Entry]]] = {}
        self._roots: dict[str, _Node] = {}
        self._first: list[_Node] = []
        self._also: dict[Party, dict[str, int]] = {}
        """What is counted on top of what a party holds, when the order is foreseen."""

    def add(self, lane: _Lane, head: _Entry) -> None:
        """Let an open line take part; all of them before the first is asked for."""
        self._added.setdefault((lane.line.project_id, lane.line.principal_id), []).append((lane, head))

    def charge(self, line: Line) -> None:
        """Count one job of the line as if it were held by those above it."""
        amounts = self._amounts(line)
        if amounts is None or self._quota is None:
            return
        for party in self._quota.path(line.project_id, line.principal_id):
            also = self._also.setdefault(party, {})
            for resource, amount in amounts.items():
                also[resource] = also.get(resource, 0) + amount

    def first(self) -> tuple[_Lane, _Entry] | None:
        """The line whose head goes first, and that head."""
        if self._added:
            self._plant()
        while True:
            root: _Node | None = None
            for other in self._roots.values():
                if other.heap and (root is None or other.heap[0][0] < root.heap[0][0]):
                    root = other
            if root is None:
                return None
            way: list[_Node] = []
            below: _Node | _Lane = root
            while isinstance(below, _Node):
                way.append(below)
                key, below = below.heap[0]
            if len(self._roots) == 1 or not self._has_moved(way):
                self._first = way
                return below, key[2]

    def replace_first(self, head: _Entry | None) -> None:
        """Go on after the first line's head was dealt with: it has another, or None when it takes no more part."""
        below: _Node | _Lane = self._first[-1].heap[0][1]
        for node in reversed(self._first):
            if head is None:
                heapq.heappop(node.heap)
            elif isinstance(below, _Lane):
                heapq.heapreplace(node.heap, ((False, 0.0, head), below))
            elif self._is_alone(node):
                node.heap[0] = ((False, 0.0, head), below)
            else:
                heapq.heapreplace(node.heap, (self._key(below), below))
            below = node
            head = node.heap[0][0][2] if node.heap else None

    # -- inside -------------------------------------------------------------------------------------------------

    def _plant(self) -> None:
        for user, lanes in self._added.items():
            path = self._quota.path(*user) if self._quota is not None else ()
            for (lane, head), kind in zip(lanes, self._kinds([lane.line for lane, _ in lanes]), strict=True):
                node = self._roots.setdefault(kind, _Node(None))
                for party in path:
                    below = node.children.get(party.id)
                    if below is None:
                        below = node.children[party.id] = _Node(party)
                    node = below
                node.heap.append(((False, 0.0, head), lane))
        self._added.clear()
        for root in self._roots.values():
            self._heapify(root)

    def _heapify(self, node: _Node) -> None:
        for child in node.children.values():
            self._heapify(child)
        is_alone = len(node.children) == 1 and (node.party is not None or len(self._roots) == 1)
        for child in node.children.values():
            node.heap.append(((False, 0.0, child.heap[0][0][2]) if is_alone else self._key(child), child))
        heapq.heapify(node.heap)

    def _kinds(self, lines: list[Line]) -> list[str]:
        """For lines of one user, what kind of GPU each is for: of those that overlap, the widest."""
        if self._quota is None:
            return [""] * len(lines)
        asked = [next((name for name in self._amounts(line) or () if name not in (CPU, MEMORY)), "") for line in lines]
        kinds = set(asked)
        if len(kinds) > 1:
            wide = sorted(one for one in kinds if one and not any(o != one and covers(o, one) for o in kinds if o))
            return [next((one for one in wide if name and covers(one, name)), name) for name in asked]
        return asked

    def _has_moved(self, way: list[_Node]) -> bool:
        """Whether a start in another tree changed keys on the way; they are put right, and another may be first."""
        has_moved = False
        for node, below in zip(way[-2::-1], way[:0:-1], strict=True):
            if not self._is_alone(node) and (key := self._key(below)) != node.heap[0][0]:
                heapq.heapreplace(node.heap, (key, below))
                has_moved = True
        return has_moved

    def _is_alone(self, node: _Node) -> bool:
        """Whether the only one below a node has nobody to be compared with."""
        return len(node.heap) == 1 and (node.party is not None or len(self._roots) == 1)

    def _key(self, node: _Node) -> _Key:
        key: _Key = node.heap[0][0]
        if node.party is None or self._quota is None:
            return key
        below: _Node | _Lane = node
        while isinstance(below, _Node):
            below = below.heap[0][1]
        amounts, changes = self._amounts(below.line), self._quota.changes
        known = node.compared
        if self._also or known is None or known[0] != changes or known[1] != amounts:
            known = (changes, amounts, self._quota.key(node.party, amounts, self._also.get(node.party)))
            node.compared = known
        return (*known[2], key[2])

    def _amounts(self, line: Line) -> Mapping[str, int] | None:
        """What a job of the line would hold; None when nobody says."""
        if self._amounts_of is None:
            return None
        found = self._known.get(line)
        if found is None:
            found = self._known[line] = self._amounts_of(line)
        return found
