"""④ Whose going makes room for a job that is entitled to it: least lost work, fewest jobs, decided before any signal.

Who may displace whom is a relation without cycles, so nothing displaces and is displaced in turn. A reservation that
has begun displaces what is still on its nodes. Else nothing displaces work of a later tier, and

* a later tier displaces spot;
* a project within what it is guaranteed displaces those beyond theirs (at the level where the two part in the tree);
* a higher priority displaces a lower one in its own project;
* an order plug-in that preempts may say that one job ranks after another by its margin, where neither priority nor
  guarantee speaks for the one that runs.

Nothing is displaced before it has run ``min_run_ns``, nor in its own reservation while that lasts. Workers that an
elastic gang can do without go first. Jobs that start together displace together, whom the least entitled of them could.
Victims are found by giving back what they hold to a copy of what is free: first the shortest prefix, cheapest first,
with which all fit; then exact places; then everybody is spared whose going those places do not need. When the whole
list would not make room, nobody goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidemill.core.fleetarrays import Free
from tidemill.core.held import HeldArrays
from tidemill.core.ordering import may_displace
from tidemill.core.place import Placed
from tidemill.core.queueing import Line
from tidemill.core.reserve import is_for
from tidemill.core.together import Member, Opens, fit_together, place_together
from tidemill.model.ids import JobId, LaunchId, ProjectId, QueueId
from tidemill.model.job import AttemptState, Job
from tidemill.model.policy import Policy
from tidemill.model.spec import Tier
from tidemill.units import SECOND_NS

if TYPE_CHECKING:
    from tidemill.core.world import World

TIERS = {Tier.SPOT: 0, Tier.ON_DEMAND: 1, Tier.RESERVED: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Displacement:
    """Who goes so that some jobs, which start together, fit in ``placed``: whole jobs, and single workers of elastic
    gangs.

    ``waits_for`` are all workers, draining already or about to, whose going the places need.
    """

    placed: tuple[Placed, ...]
    jobs: tuple[JobId, ...]
    workers: tuple[LaunchId, ...]
    waits_for: tuple[LaunchId, ...]


class _Claim(Enum):
    """By what right a job may displace another."""

    NONE = 0
    RANK = 1
    """A later tier, a higher priority, an open reservation, an order plug-in: whatever else goes."""
    GUARANTEE = 2
    """Only as long as the other side holds more than it is guaranteed."""


class _Unit(NamedTuple):
    """What goes together: the rows of a whole gang, or one worker that its gang can do without."""

    job_id: JobId
    rows: NDArray[np.int64]
    is_whole: bool
    claim: _Claim


def may_try(world: World, members: Sequence[Member], *, policy: Policy) -> bool:
    """Whether there is anybody at all whom the jobs could displace, or who makes room already; cheap, and may be wrong
    only by saying yes."""
    first = members[0]
    project = first.line.project_id
    if world.order.preempts or first.line.reservation or world.quota.has_guarantee(project):
        return True
    held = world.rows
    used = held.rows()
    if first.line.tier is not Tier.SPOT and bool((held.tier[used] == TIERS[Tier.SPOT]).any()):
        return True
    return policy.displace_in_project and bool((held.priority[used] < world.jobs[first.job_id].priority).any())


def displace(
    world: World,
    members: Sequence[Member],
    opens: Opens,
    *,
    now: int,
    policy: Policy,
    within: Callable[[tuple[Placed, ...]], tuple[Placed, ...] | None],
) -> Displacement | None:
    """Who has to go so that the jobs fit, all of them; None when nobody may, or when even all would not make room.

    ``within`` says how many of the places found the jobs may have.
    """
    held, fleet = world.rows, world.fleet
    used = held.rows()
    draining = used[held.gone[used] > 0]
    free = fleet.free().copy()
    held.give_back(free, draining)
    units: list[_Unit] = []

    def do_fit(trial: Free) -> bool:
        return fit_together(fleet, members, opens, score=world.score, free=trial)

    if not do_fit(free):
        units = _who_may_go(world, members, do_fit, free, used, now=now, policy=policy)
        chosen = _shortest_prefix(world, do_fit, free, units)
        if chosen is None:
            return None
        units = units[:chosen]
        for unit in units:
            held.give_back(free, unit.rows)
    placed = place_together(fleet, members, opens, score=world.score, free=free)
    placed = within(placed) if placed is not None else None
    if placed is None:
        return None
    units = _spare(world, members, placed, draining, units)
    jobs = tuple(dict.fromkeys(unit.job_id for unit in units if unit.is_whole))
    workers = tuple(
        held.launch[int(row)] for unit in units if not unit.is_whole and unit.job_id not in jobs for row in unit.rows
    )
    nodes = {fleet.row[place.node_id] for each in placed for place in each.places}
    going = np.concatenate([draining, *(unit.rows for unit in units)]) if units or draining.size else draining
    waits = tuple(held.launch[int(row)] for row in going if int(held.node[row]) in nodes)
    return Displacement(placed=placed, jobs=jobs, workers=workers, waits_for=waits)


def _who_may_go(
    world: World,
    members: Sequence[Member],
    do_fit: Callable[[Free], bool],
    free: Free,
    used: NDArray[np.int64],
    *,
    now: int,
    policy: Policy,
) -> list[_Unit]:
    """Everything that may go for these jobs, cheapest first: spot before others, then least lost work, then largest.

    Nothing when not even all of it would make room.
    """
    held = world.rows
    running = used[held.gone[used] == 0]
    relation = _Relation(world, members, now=now, policy=policy)
    running = running[relation.is_conceivable(running)]
    old_enough = (held.since[running] > 0) & (held.since[running] + policy.min_run_ns <= now)
    _look_again(world, members[0].line, running[~old_enough], policy)
    candidates = running[old_enough]
    if not candidates.size:
        return []
    all_gone = free.copy()
    held.give_back(all_gone, candidates)
    if not do_fit(all_gone):
        return []
    candidates = candidates[np.argsort(held.gang[candidates], kind="stable")]
    starts = np.flatnonzero(np.diff(held.gang[candidates], prepend=-1))
    gpu, tiers = held.gpu[candidates].sum(axis=1), held.tier[candidates[starts]]
    sizes = np.add.reduceat(gpu, starts) + np.add.reduceat(held.cpu[candidates], starts) // 16
    worths = np.add.reduceat(_lost(held, candidates, now) * (gpu + held.cpu[candidates] // 16), starts)
    by_rank = relation.has_rank_over(candidates, starts)
    others = [held.jobs[gang] for gang in held.gang[candidates[starts]].tolist()]
    surplus = held.surplus[candidates] > 0
    is_elastic = np.logical_or.reduceat(surplus, starts).tolist()
    units: list[tuple[tuple[int, int, int, int, str], _Unit]] = []
    parts = zip(others, np.split(candidates, starts[1:]), tiers.tolist(), sizes.tolist(), worths.tolist(), strict=True)
    for at, (other, rows, tier, size, worth) in enumerate(parts):
        claim = _Claim.RANK if by_rank[at] else relation.claim_on(other, rows)
        if claim is _Claim.NONE:
            continue
        cost = relation.cost_of(other, rows) if world.order.preempts else (worth // SECOND_NS).bit_length()
        if is_elastic[at]:
            spare = held.surplus[rows] > 0
            units.extend(
                ((tier, 0, 0, -row, other), _Unit(other, np.array([row]), False, claim)) for row in rows[spare].tolist()
            )
            rows = rows[~spare]
        units.append(((tier, 1, cost, -size, other), _Unit(other, rows, True, claim)))
    units.sort(key=_first)
    return [unit for _, unit in units if unit.claim is not _Claim.GUARANTEE or relation.may_reclaim(unit)]


def _first(pair: tuple[tuple[int, int, int, int, str], _Unit]) -> tuple[int, int, int, int, str]:
    return pair[0]


def _lost(held: HeldArrays, rows: NDArray[np.int64], now: int) -> NDArray[np.int64]:
    """How much of the work of these rows no checkpoint has, in ns."""
    lost: NDArray[np.int64] = np.maximum(now - np.maximum(held.saved[rows], held.since[rows]), 0)
    return lost


def _look_again(world: World, line: Line, young: NDArray[np.int64], policy: Policy) -> None:
    """Those that have not run long enough, or not begun to, may go later."""
    if not young.size:
        return
    world.eyeing[line] = None
    since = world.rows.since[young]
    if (since > 0).any():
        world.set_timer(int(since[since > 0].min()) + policy.min_run_ns, "displace", "")


class _Relation:
    """Whether one job may displace another. Several that start together may when each of them might, for all."""

    def __init__(self, world: World, members: Sequence[Member], *, now: int, policy: Policy) -> None:
        self._world, self._now, self._policy = world, now, policy
        jobs = [world.jobs[member.job_id] for member in members]
        lines = [member.line for member in members]
        self._ids = {job.id for job in jobs}
        self._project_id = jobs[0].project_id
        self._priority = min(job.priority for job in jobs)
        self._tier = min(TIERS[line.tier] for line in lines)
        self._amounts = amounts_together(world, lines)
        self._reclaims: dict[ProjectId, bool] = {}
        self._gone: dict[QueueId, dict[str, int]] = {}
        self._mine = set.intersection(*(self._rows_of(line) for line in set(lines)))
        self._order = world.order
        ranks = (self._order.rank(world.job_facts(job, now=now), now=now) for job in jobs)
        self._rank = max(ranks) if self._order.preempts else 0.0

    def _rows_of(self, line: Line) -> set[int]:
        """The nodes that are reserved for the line now."""
        rows: set[int] = set()
        for reservation in self._world.reservations.values():
            if is_for(reservation, line) and (window := reservation.window(after=self._now)) and window[0] <= self._now:
                rows.update(self._world.fleet.row[one] for one in reservation.node_ids if one in self._world.fleet.row)
        return rows

    def claim_on(self, other_id: JobId, rows: NDArray[np.int64]) -> _Claim:
        """By what right this job may displace another, if by any."""
        world, other = self._world, self._world.jobs.get(other_id)
        attempt = world.attempts.get(other_id)
        if other is None or attempt is None or attempt.state is not AttemptState.RUNNING or other_id in self._ids:
            return _Claim.NONE
        spec = world.workloads[other.workload_id].spec
        if spec.tier is Tier.RESERVED and world.is_in_window(other, now=self._now):
            return _Claim.NONE
        if self._mine and self._mine.issuperset(world.rows.node[rows].tolist()):
            return _Claim.RANK
        if self._tier < TIERS[spec.tier]:
            return _Claim.NONE
        if spec.tier is Tier.SPOT and self._tier > TIERS[Tier.SPOT]:
            return _Claim.RANK
        if other.project_id == self._project_id:
            if self._policy.displace_in_project and self._priority != other.priority:
                return _Claim.RANK if self._priority > other.priority else _Claim.NONE
        elif self._beyond(other.project_id):
            return _Claim.GUARANTEE
        elif self._world.quota.is_guaranteed(other.project_id, self._amounts, self._project_id):
            return _Claim.NONE
        if self._order.preempts and may_displace(self._order, waiting=self._rank, running=self.rank_of(other)):
            return _Claim.RANK
        return _Claim.NONE

    def _beyond(self, project: ProjectId) -> bool:
        """Whether a project's side held more than its guarantee before anything of this goes; asked once a project."""
        may = self._reclaims.get(project)
        if may is None:
            may = self._reclaims[project] = self._world.quota.may_reclaim(
                self._project_id, self._amounts, project, gone=self._gone_of(project)
            )
        return may

    def may_reclaim(self, unit: _Unit) -> bool:
        """Whether the unit's side is still beyond its guarantee when those before it are gone; then it goes too."""
        project = self._world.jobs[unit.job_id].project_id
        gone = self._gone_of(project)
        if not self._world.quota.may_reclaim(self._project_id, self._amounts, project, gone=gone):
            return False
        for row in unit.rows.tolist():
            held = self._world.allocations[self._world.rows.launch[row]]
            for name, amount in self._world.amounts_held(held).items():
                gone[name] = gone.get(name, 0) + amount
        return True

    def _gone_of(self, project: ProjectId) -> dict[str, int]:
        """What the project's side has lost already: to those who drain, and to what this job takes."""
        sides = self._world.quota.sides(self._project_id, project)
        side = sides[1] if sides is not None else QueueId("")
        if not self._gone:
            rows = self._world.rows
            for row in rows.rows()[rows.gone[rows.rows()] > 0].tolist():
                held = self._world.allocations[rows.launch[row]]
                parted = self._world.quota.sides(self._project_id, held.project_id)
                if parted is not None:
                    lost = self._gone.setdefault(parted[1], {})
                    for name, amount in self._world.amounts_held(held).items():
                        lost[name] = lost.get(name, 0) + amount
            self._gone.setdefault(QueueId(""), {})
        return self._gone.setdefault(side, {})

    def rank_of(self, other: Job) -> float:
        """What the order plug-in thinks of a running job."""
        return self._world.running_rank(other, now=self._now)

    def is_conceivable(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows ``claim_on`` could be about to allow, by what the columns tell. Shape (R,)."""
        held, mine = self._world.rows, self._tier
        if self._mine:
            return np.ones(len(rows), np.bool_)
        same_or_earlier: NDArray[np.bool_] = held.tier[rows] <= mine
        if self._world.quota.has_guarantee(self._project_id):
            return same_or_earlier
        later: NDArray[np.bool_] = (held.tier[rows] == TIERS[Tier.SPOT]) & (mine > TIERS[Tier.SPOT])
        if self._policy.displace_in_project:
            later |= held.priority[rows] < self._priority
        if self._order.preempts:
            ranks = self._world.running_ranks(self._now)
            later |= ranks[held.gang[rows]] > self._order.margin * self._rank
        later &= same_or_earlier
        return later

    def has_rank_over(self, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> list[bool]:
        """Of which gangs, whose rows begin at ``starts``, ``claim_on`` says RANK for their tier alone. Shape (G,)."""
        if self._mine or self._tier == TIERS[Tier.SPOT]:
            return [False] * len(starts)
        is_spot: list[bool] = (self._world.rows.tier[rows[starts]] == TIERS[Tier.SPOT]).tolist()
        return is_spot

    def cost_of(self, other_id: JobId, rows: NDArray[np.int64]) -> int:
        """What an order plug-in thinks is lost when it goes: GPUs per rank."""
        rank = self.rank_of(self._world.jobs[other_id])
        return int(1e9 * float(self._world.rows.gpu[rows].sum()) / max(rank, 1e-9))


def amounts_together(world: World, lines: Iterable[Line], placed: Iterable[Placed] | None = None) -> dict[str, int]:
    """What jobs of these lines take together at their smallest, or in these places, as ``World.amounts_of`` says."""
    total: dict[str, int] = {}
    for line, each in zip(lines, repeat(None) if placed is None else placed, strict=False):
        for name, amount in world.amounts_of(line, each).items():
            total[name] = total.get(name, 0) + amount
    return total


def _shortest_prefix(world: World, do_fit: Callable[[Free], bool], free: Free, units: list[_Unit]) -> int | None:
    """How many units, from the front, have to go for all to fit; None when all of them are not enough."""

    def without(count: int) -> Free:
        trial = before.copy()
        world.rows.give_back(trial, np.concatenate([unit.rows for unit in units[gone:count]]))
        return trial

    before, gone = free, 0
    if not units or not do_fit(without(len(units))):
        return None
    low, high = 1, len(units)
    while low < high:
        middle = (low + high) // 2
        trial = without(middle)
        if do_fit(trial):
            high = middle
        else:
            low, before, gone = middle + 1, trial, middle
    return low


def _spare(
    world: World,
    members: Sequence[Member],
    placed: Sequence[Placed],
    draining: NDArray[np.int64],
    units: list[_Unit],
) -> list[_Unit]:
    """The units without those whose going the places do not need, dearest spared first."""
    held, fleet = world.rows, world.fleet
    mark = fleet.checkpoint()
    for member, each in zip(members, placed, strict=True):
        world.take(member.line, each)
    left = fleet.free().copy()
    fleet.rollback(mark)
    rows = {fleet.row[place.node_id] for each in placed for place in each.places}
    held.give_back(left, draining)
    for unit in units:
        held.give_back(left, unit.rows)
    kept: list[_Unit] = []
    for unit in reversed(units):
        touching = unit.rows[np.isin(held.node[unit.rows], list(rows))]
        if not touching.size:
            continue
        nodes, at = np.unique(held.node[touching], return_inverse=True)
        cpu, memory, gpu = left.cpu[nodes], left.memory[nodes], left.gpu[nodes]
        np.subtract.at(cpu, at, held.cpu[touching])
        np.subtract.at(memory, at, held.memory[touching])
        np.subtract.at(gpu, at, held.gpu[touching])
        needed = (cpu < 0).any() or (memory < 0).any() or ((gpu < 0) & (left.gpu[nodes] >= 0)).any()
        if needed or held.slices[touching].any():
            kept.append(unit)
        else:
            left.cpu[nodes], left.memory[nodes], left.gpu[nodes] = cpu, memory, gpu
    kept.reverse()
    return kept
