"""④ Time: whose nodes are whose when, and when the first blocked job will start at the latest.

Advance reservations and maintenance windows close nodes to work that would still run when they open. EASY backfill
gives the first blocked job a plan: the earliest instant at which enough will have ended, and exact places then. Others
may pass it when they are over by that instant or stay clear of those places, so passing never delays it.
Source: Lifka, "The ANL/IBM SP scheduling system" (1995); ties break by fleet row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tidemill.core.choosing import preferred, rows_at
from tidemill.core.copying import copies_of
from tidemill.core.fleetarrays import Free
from tidemill.core.held import NEVER
from tidemill.core.place import Placed, fits
from tidemill.core.queueing import Line
from tidemill.core.together import Member, Open, Opens, fit_together, place_together
from tidemill.model.ids import JobId, NodeId
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.policy import Policy
from tidemill.model.reservation import Reservation
from tidemill.model.spec import Tier
from tidemill.units import SECOND_NS

if TYPE_CHECKING:
    from tidemill.core.world import World

_PROBES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBack:
    """The plan for a blocked job, or for the group it stands in line for: at ``at_ns`` at the latest it starts.

    ``parts`` are the places, one gang each; they were chosen at ``made_ns``.
    """

    job_id: JobId
    line: Line
    at_ns: int
    parts: tuple[tuple[Line, Placed], ...]
    made_ns: int

    @property
    def node_ids(self) -> set[NodeId]:
        """Where it will start."""
        return {place.node_id for _, placed in self.parts for place in placed.places}


def nodes_open_to(world: World, line: Line, *, now: int, policy: Policy) -> NDArray[np.bool_] | None:
    """Which nodes a job of the line may be put on if it starts at ``now``; None when that is all. Shape (N,)."""
    mask: NDArray[np.bool_] | None = None
    if world.reservations or line.reservation:
        mask = _outside_windows(world, line, now=now, policy=policy)
    if line.apart:
        mask = np.ones(len(world.fleet.nodes), np.bool_) if mask is None else mask
        for held in world.allocations.values():
            if held.project_id == line.project_id and held.node_id in world.fleet.row:
                labels = world.workloads[world.jobs[held.job_id].workload_id].spec.labels
                if any(label in line.apart for label in labels):
                    mask[world.fleet.row[held.node_id]] = False
    refused = [site for site, copying in copies_of(world, line).items() if copying.refused] if line.data else []
    if refused:
        mask = np.ones(len(world.fleet.nodes), np.bool_) if mask is None else mask
        mask &= ~rows_at(world.fleet, refused)
    return mask


def _outside_windows(world: World, line: Line, *, now: int, policy: Policy) -> NDArray[np.bool_]:
    count = len(world.fleet.nodes)
    mask = np.zeros(count, np.bool_) if line.reservation else np.ones(count, np.bool_)
    ends = now + (line.duration_ns or policy.assumed_duration_ns)
    mine = None
    for reservation in world.reservations.values():
        window = reservation.window(after=now)
        if window is None:
            continue
        rows = [world.fleet.row[node] for node in reservation.node_ids if node in world.fleet.row]
        if is_for(reservation, line):
            if window[0] <= now and (not line.duration_ns or ends <= window[1]):
                mask[rows] = True
            mine = rows
        elif window[0] <= now or (ends > window[0] and line.tier is not Tier.SPOT):
            mask[rows] = False
    if line.reservation and mine is None:
        mask[:] = False
    return mask


def is_for(reservation: Reservation, line: Line) -> bool:
    """Whether jobs of the line may run in the reservation."""
    return bool(line.reservation) and (reservation.name, reservation.project_id) == (line.reservation, line.project_id)


def why_not_open(world: World, line: Line, *, now: int) -> Reason | None:
    """Why a line's reservation does not let it start now; None when it does, or when it names none."""
    if not line.reservation:
        return None
    for reservation in world.reservations.values():
        if is_for(reservation, line) and (window := reservation.window(after=now)) is not None:
            if window[0] > now:
                opens = datetime.fromtimestamp(window[0] // SECOND_NS, UTC).isoformat(sep=" ")
                return _closed(line, "ReservationNotOpen", "that its window is open", f"it opens {opens}")
            if line.duration_ns and now + line.duration_ns > window[1]:
                return _closed(
                    line,
                    "ReservationTooShort",
                    f"{line.duration_ns / 1e9:g} s",
                    f"{(window[1] - now) / 1e9:g} s until it ends",
                )
            return None
    return Reason(
        code="NoReservation",
        subject="reservation",
        needed=line.reservation,
        available="none of that name",
        resolvable_by=ResolvableBy.POLICY,
        sentence=f"The project has no reservation {line.reservation} that stands and has a window to come.",
    )


def meets_windows(world: World, line: Line, mask: NDArray[np.bool_] | None, *, now: int) -> Reason | None:
    """Why a line that would fit does not start: only reserved nodes have the room. None when that is not why."""
    if mask is None or line.reservation or not fits(world.fleet, line.gang):
        return None
    windows = (reservation.window(after=now) for reservation in world.reservations.values())
    starts = [window[0] for window in windows if window is not None]
    if not starts:
        return None
    first = datetime.fromtimestamp(max(min(starts), now) // SECOND_NS, UTC).isoformat(sep=" ")
    return Reason(
        code="BeforeReservation",
        subject="max_duration",
        needed="to be over before the reservation begins",
        available=f"it begins {first}",
        resolvable_by=ResolvableBy.TIME,
        sentence=(
            f"There is room, but on machines that are reserved from {first}; work that says with max_duration that it "
            "is over before that may start."
        ),
    )


def _closed(line: Line, code: str, needed: str, available: str) -> Reason:
    return Reason(
        code=code,
        subject=f"reservation {line.reservation}",
        needed=needed,
        available=available,
        resolvable_by=ResolvableBy.TIME,
        sentence=f"It runs in reservation {line.reservation}: needed is {needed}, and {available}.",
    )


def opens_at(world: World, members: Sequence[Member], *, now: int, policy: Policy) -> Opens:
    """Where each of some jobs may be put if they start at ``now``."""
    return {
        line: Open(nodes_open_to(world, line, now=now, policy=policy), preferred(world, line, now=now, policy=policy))
        for line in dict.fromkeys(member.line for member in members)
    }


def plan_start(world: World, members: Sequence[Member], *, now: int, policy: Policy) -> HeldBack | None:
    """The earliest start that what runs allows, as it is expected to end; None when it never makes enough room.

    ``members`` are the job itself and those that have to start with it.
    """
    held = world.rows
    ends = held.ends(now=now, assumed=policy.assumed_duration_ns)
    rows = held.rows()
    rows = rows[np.argsort(ends[rows], kind="stable")]
    instants = np.unique(np.concatenate([ends[rows], _openings(world, now)]))
    instants = instants[(instants >= now) & (instants < NEVER)]
    if not instants.size:
        return None
    if world.reservations:
        found = _first_of_few(world, members, rows, ends, instants, policy)
    else:
        found = _first_by_halving(world, members, rows, ends, instants, policy)
    if found is None:
        return None
    at, free = found
    opens = opens_at(world, members, now=at, policy=policy)
    placed = place_together(world.fleet, members, opens, score=world.score, free=free)
    if placed is None:
        return None
    first = members[0]
    parts = tuple((member.line, each) for member, each in zip(members, placed, strict=True))
    return HeldBack(job_id=first.job_id, line=first.line, at_ns=at, parts=parts, made_ns=now)


def _do_fit(world: World, members: Sequence[Member], free: Free, at: int, policy: Policy) -> bool:
    if len(members) == 1:
        line = members[0].line
        return fits(world.fleet, line.gang, free=free, mask=nodes_open_to(world, line, now=at, policy=policy))
    opens = opens_at(world, members, now=at, policy=policy)
    return fit_together(world.fleet, members, opens, score=world.score, free=free)


def _openings(world: World, now: int) -> NDArray[np.int64]:
    windows = (reservation.window(after=now) for reservation in world.reservations.values())
    return np.array([edge for window in windows if window is not None for edge in window], np.int64)


def _first_by_halving(
    world: World,
    members: Sequence[Member],
    rows: NDArray[np.int64],
    ends: NDArray[np.int64],
    instants: NDArray[np.int64],
    policy: Policy,
) -> tuple[int, Free] | None:
    """More has ended at each later instant, so if it fits at one it fits at all that follow. Also what is free then."""
    ended = np.searchsorted(ends[rows], instants, side="right")

    def free_at(index: int) -> Free:
        then = before.copy()
        world.rows.give_back(then, rows[given : ended[index]])
        return then

    before, given = world.fleet.free(), 0
    low, high, at_high = 0, len(instants) - 1, free_at(len(instants) - 1)
    if not _do_fit(world, members, at_high, int(instants[-1]), policy):
        return None
    while low < high:
        middle = (low + high) // 2
        then = free_at(middle)
        if _do_fit(world, members, then, int(instants[middle]), policy):
            high, at_high = middle, then
        else:
            low, before, given = middle + 1, then, int(ended[middle])
    return int(instants[low]), at_high


def _first_of_few(
    world: World,
    members: Sequence[Member],
    rows: NDArray[np.int64],
    ends: NDArray[np.int64],
    instants: NDArray[np.int64],
    policy: Policy,
) -> tuple[int, Free] | None:
    """Windows close nodes again, so instants are tried one after the other, evenly chosen when there are many."""
    if len(instants) > _PROBES:
        instants = instants[np.unique(np.linspace(0, len(instants) - 1, _PROBES).astype(np.int64))]
    for at in instants.tolist():
        free = world.fleet.free().copy()
        world.rows.give_back(free, rows[ends[rows] <= at])
        if _do_fit(world, members, free, at, policy):
            return at, free
    return None
