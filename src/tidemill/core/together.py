"""③ Places for several gangs that start together, those of a group's jobs: for all of them, or none is taken.

They are placed one after the other, those that ask most of a machine first, so that small ones do not sit where only
large ones could. Gangs that are alike are placed as one where that comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tidemill.core.feasible import Shape
from tidemill.core.fleetarrays import FleetArrays, Free
from tidemill.core.place import Gang, Masks, Placed, fits, place_gang
from tidemill.core.queueing import Line
from tidemill.core.score import Score
from tidemill.model.ids import JobId
from tidemill.model.values import replace

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A job that starts together with others, or alone."""

    job_id: JobId
    line: Line
    labels: tuple[tuple[str, str], ...] = ()
    """What others may want to be apart from."""


class Open(NamedTuple):
    """The nodes that jobs of a line may be put on, and in which order their sites are tried; None: all, any."""

    mask: NDArray[np.bool_] | None
    sites: Callable[[Shape], Masks] | None


class Missing(NamedTuple):
    """The first member without a place, and how many have one."""

    member: Member
    placed: int


Opens = Mapping[Line, Open]
ANYWHERE: Final = Open(None, None)


def place_together(
    fleet: FleetArrays, members: Sequence[Member], opens: Opens, *, score: Score, free: Free | None = None
) -> tuple[Placed, ...] | None:
    """Places for each member, in their order; None, and nothing taken, when one has none.

    They are taken from the fleet; or from ``free``, which is then not to be used any more when one has none.
    """
    mark = fleet.checkpoint()
    found = _place_all(fleet, members, opens, score, free)
    if isinstance(found, Missing):
        fleet.rollback(mark)
        return None
    return found


def fit_together(fleet: FleetArrays, members: Sequence[Member], opens: Opens, *, score: Score, free: Free) -> bool:
    """Whether all could be placed in what is ``free``, which stays as it is."""
    gang = as_one(fleet, members)
    if gang is not None:
        return fits(fleet, gang, free=free, mask=opens[members[0].line].mask)
    return place_together(fleet, members, opens, score=score, free=free.copy()) is not None


def missing_now(
    fleet: FleetArrays,
    members: Sequence[Member],
    opens: Opens,
    *,
    score: Score,
    look: Callable[[Missing], Answer],
) -> Answer | None:
    """What ``look`` says of the first without a place, asked while those before it have theirs; None when all fit."""
    mark = fleet.checkpoint()
    found = _place_all(fleet, members, opens, score, None)
    answer = look(found) if isinstance(found, Missing) else None
    fleet.rollback(mark)
    return answer


def missing_ever(fleet: FleetArrays, members: Sequence[Member], *, score: Score) -> Missing | None:
    """The first without a place if nothing ran and every node were ready; None when all fit."""
    opens = dict.fromkeys((member.line for member in members), ANYWHERE)
    found = _place_all(fleet, members, opens, score, fleet.empty().copy(), all_ready=True)
    return found if isinstance(found, Missing) else None


def as_one(fleet: FleetArrays, members: Sequence[Member]) -> Gang | None:
    """All members as the one gang that they come to; None when they differ, or each lies in its own way."""
    return _times(members[0].line.gang, len(members)) if len(_parts(fleet, members)) == 1 else None


def _place_all(
    fleet: FleetArrays,
    members: Sequence[Member],
    opens: Opens,
    score: Score,
    free: Free | None,
    *,
    all_ready: bool = False,
) -> tuple[Placed, ...] | Missing:
    """Places for each, taken; or the first for which there is none."""
    places: dict[JobId, Placed] = {}
    is_apart = len(members) > 1 and any(member.line.apart for member in members)
    for part in _parts(fleet, members):
        first, line = part[0], part[0].line
        mask, sites = opens[line]
        if is_apart:
            mask = _apart_from_each_other(fleet, first, members, places, mask)
        gang = _times(line.gang, len(part))
        placed = place_gang(fleet, gang, score=score, free=free, mask=mask, sites=sites, all_ready=all_ready)
        if placed is None:
            return Missing(first, len(places))
        if free is not None:
            resources = line.gang.choices[placed.choice].resources
            for place in placed.places:
                fleet.take_from(free, place.node_id, resources.cpu_milli, resources.memory_bytes, place.devices)
        if len(part) == 1:
            places[first.job_id] = placed
            continue
        each = line.gang.workers
        for at, member in enumerate(part):
            places[member.job_id] = replace(placed, places=placed.places[at * each : (at + 1) * each])
    return tuple(places[member.job_id] for member in members)


def _parts(fleet: FleetArrays, members: Sequence[Member]) -> list[list[Member]]:
    """The members in the order in which they are placed, those together that can be placed as one gang."""
    if len(members) == 1:
        return [[members[0]]]
    by_line: dict[Line, list[Member]] = {}
    for member in members:
        by_line.setdefault(member.line, []).append(member)
    is_plain = len(fleet.site_ids) < 2 and not any(line.apart for line in by_line)
    parts: list[list[Member]] = []
    for line in sorted(by_line, key=_demand, reverse=True):
        gang, alike = line.gang, by_line[line]
        if is_plain and len(gang.choices) == 1 and not line.data and gang.smallest == gang.workers and _is_free(gang):
            parts.append(alike)
        else:
            parts.extend([member] for member in alike)
    return parts


def _is_free(gang: Gang) -> bool:
    """Whether it does not matter how its workers lie to each other."""
    return gang.within is None and gang.prefer is None and gang.spread is None


def _demand(line: Line) -> tuple[bool, int, int, int, int]:
    """How much a gang asks of a machine: what is hard to place is larger."""
    gang, resources = line.gang, line.gang.choices[0].resources
    gpus = resources.gpus.total_milli if resources.gpus is not None else 0
    return gang.within is not None or gang.spread is not None, gpus, resources.cpu_milli, gang.workers, len(line.apart)


def _times(gang: Gang, count: int) -> Gang:
    """So many gangs that are alike as one."""
    if count == 1:
        return gang
    return Gang(
        choices=gang.choices,
        workers=count * gang.workers,
        smallest=count * gang.smallest,
        within=gang.within,
        prefer=gang.prefer,
        spread=gang.spread,
        across=gang.across,
    )


def _apart_from_each_other(
    fleet: FleetArrays,
    member: Member,
    members: Sequence[Member],
    places: Mapping[JobId, Placed],
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.bool_] | None:
    """The mask without nodes of members placed before that this one is to be apart from, or that from it."""
    rows = [
        fleet.row[place.node_id]
        for other in members
        if other.job_id in places and (_avoids(member, other) or _avoids(other, member))
        for place in places[other.job_id].places
    ]
    if not rows:
        return mask
    left = np.ones(len(fleet.nodes), np.bool_) if mask is None else mask.copy()
    left[rows] = False
    return left


def _avoids(one: Member, other: Member) -> bool:
    return any(label in one.line.apart for label in other.labels)
