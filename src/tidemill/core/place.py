"""③ Places for a whole gang, or none: all or nothing is decided before anything is touched.

A gang names the shapes that would do, how many workers it wants and with how few it is content, and how they should lie
to each other. The steps: how many workers fit on each node (one vector operation); which *domain* of the topology takes
them, the smallest that can; in which order its nodes are filled, best score first; which devices on each.

A single worker of a shape that was asked for before takes a shorter way: its scores are kept for all nodes, only those
of nodes that changed since are worked out again, and the best is one ``argmax``. Both ways give the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from tidemill.core.feasible import (
    Fitting,
    Shape,
    fitting,
    free_starts,
    places_for_slices,
    take_slice,
    workers_that_fit,
    workers_that_fit_on,
)
from tidemill.core.fleetarrays import BITS, FleetArrays, Free, Ints
from tidemill.core.score import BLOCK_BITS, NEVER, TIE_BITS, Score, Tide, Want
from tidemill.model.fleet import SPOT_TAINT, Level
from tidemill.model.ids import NodeId
from tidemill.model.job import DeviceShare
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Tier, WorkloadSpec
from tidemill.model.values import replace
from tidemill.units import MILLI

Masks = Sequence[NDArray[np.bool_] | None]
_ALL_AT_ONCE: Final[Masks] = (None,)
_WIDER: Final = (Level.NVLINK, Level.HOST, Level.RACK, Level.BLOCK, Level.SITE)


class Gang(Struct, frozen=True, kw_only=True, cache_hash=True, gc=False):
    """What has to be placed together: ``workers`` of one of the shapes, or at least ``smallest`` of them.

    Its hash is worked out once: it is part of what waiting jobs are grouped by.
    """

    choices: tuple[Shape, ...]
    workers: int
    smallest: int
    within: Level | None = None
    prefer: Level | None = None
    spread: Level | None = None
    across: bool = False
    """Whether its workers may lie at several sites."""

    def part(self, choice: int, workers: int) -> Gang:
        """Up to so many workers of one of the choices, content with one; where they may be is for a mask to say."""
        return Gang(
            choices=(self.choices[choice],),
            workers=workers,
            smallest=1,
            within=None,
            prefer=self.prefer,
            spread=self.spread,
            across=self.across,
        )


class Place(Struct, frozen=True, kw_only=True, gc=False):
    """Where one worker goes."""

    node_id: NodeId
    devices: tuple[DeviceShare, ...]


class Placed(Struct, frozen=True, kw_only=True, gc=False):
    """Places for a gang, by rank, and which of its choices they are for."""

    choice: int
    places: tuple[Place, ...]


def gang_of(spec: WorkloadSpec) -> Gang:
    """What a job of the workload needs placed together."""
    where = spec.placement
    site, machine = spec.home
    territory = replace(where.where, sites=(str(site),)) if site else where.where
    tolerated = (*where.tolerations, SPOT_TAINT) if spec.tier is Tier.SPOT else where.tolerations
    return Gang(
        choices=tuple(
            Shape(resources, bool(spec.image), where.labels, tolerated, territory, machine)
            for resources in spec.choices
        ),
        workers=spec.nodes,
        smallest=spec.smallest,
        within=where.within,
        prefer=where.prefer,
        spread=where.spread,
        across=where.across_sites or where.spread is Level.SITE,
    )


def fits(
    fleet: FleetArrays,
    gang: Gang,
    *,
    free: Free | None = None,
    mask: NDArray[np.bool_] | None = None,
    all_ready: bool = False,
) -> bool:
    """Whether a gang could be placed, at its smallest; with ``all_ready``, if every node were ready."""
    for shape in gang.choices:
        room = _room(fleet, gang, shape, free, mask, all_ready=all_ready)
        if int(room.sum()) >= gang.smallest and _domain_rows(fleet, gang, room) is not None:
            return True
    return False


def place_gang(
    fleet: FleetArrays,
    gang: Gang,
    *,
    score: Score,
    mask: NDArray[np.bool_] | None = None,
    free: Free | None = None,
    take: bool = True,
    sites: Callable[[Shape], Masks] | None = None,
    all_ready: bool = False,
) -> Placed | None:
    """A place for each worker, by rank; None, and nothing taken, when not even the smallest gang fits.

    The first choice that fits is used, with as many workers as fit. With ``free``, or without ``take``, nothing is
    taken. ``sites`` says for each choice which nodes are tried one after the other; None: all nodes at once. With
    ``free`` and ``all_ready``, as if every node were ready.
    """
    for number, shape in enumerate(gang.choices):
        places: list[Place] = []
        for only in _ALL_AT_ONCE if sites is None else sites(shape):
            within = mask if only is None else only if mask is None else mask & only
            if (
                gang.workers == 1
                and free is None
                and gang.within in (None, Level.HOST, Level.RACK, Level.BLOCK, Level.SITE)
            ):
                places = _place_one(fleet, shape, score, within)
            else:
                places = _place_many(fleet, gang, shape, score, within, free, all_ready=all_ready)
            if places:
                break
        if not places:
            continue
        if take and free is None:
            resources = shape.resources
            for place in places:
                fleet.take(
                    place.node_id,
                    cpu_milli=resources.cpu_milli,
                    memory_bytes=resources.memory_bytes,
                    devices=place.devices,
                )
        return Placed(choice=number, places=tuple(places))
    return None


# -- one worker -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Table:
    """Scores of one shape on all nodes, as of ``seen`` entries of the fleet's touch log."""

    want: Want
    static: Fitting
    key: Ints
    column: Ints
    tops: Ints
    is_whole: bool
    version: int
    seen: int = -1
    answering: Ints | None = None


def _place_one(fleet: FleetArrays, shape: Shape, score: Score, mask: NDArray[np.bool_] | None) -> list[Place]:
    if not fleet.nodes:
        return []
    table, row = _ranked(fleet, shape, score)
    if row is None or (mask is not None and row >= 0 and not mask[row]):
        key = table.key if mask is None else np.where(mask, table.key, NEVER)
        row = int(key.argmax())
        row = -1 if key[row] == NEVER else row
    if row < 0:
        return []
    devices = _choose_devices(fleet, fleet.free(), row, shape.resources.gpus, table.static, int(table.column[row]))
    return [Place(node_id=fleet.nodes[row].id, devices=devices)]


def _ranked(fleet: FleetArrays, shape: Shape, score: Score) -> tuple[_Table, int | None]:
    """The shape's table, brought up to date, and its best row where that is known already; -1 when there is none."""
    request = shape.resources.gpus
    table: _Table | None = fleet.cache.get((shape, score.name))
    if table is None or table.version != score.version:
        static, count = fitting(fleet, shape), len(fleet.nodes)
        table = fleet.cache[shape, score.name] = _Table(
            want=want_of(shape, static),
            static=static,
            key=np.full(count, NEVER, np.int64),
            column=np.full(count, -1, np.int64),
            tops=np.full(-(-count >> BLOCK_BITS), NEVER, np.int64),
            is_whole=request is not None and request.is_whole,
            version=score.version,
        )
    if isinstance(score, Tide) and not (request is not None and request.profile):
        row = score.best(fleet, table.want, table)
        if row is not None:
            return table, row
    if table.seen != fleet.touches:
        _score_rows(fleet, shape, score, table, fleet.touched_since(table.seen))
        table.seen = fleet.touches
    return table, None


def _score_rows(fleet: FleetArrays, shape: Shape, score: Score, table: _Table, rows: Ints) -> None:
    """Work out the keys of some rows."""
    fitting_rows = rows[_fits_on_rows(fleet, shape, table.static, rows)]
    table.key[rows] = NEVER
    if fitting_rows.size:
        scores, columns = score.scores(fleet, table.want, fitting_rows)
        table.key[fitting_rows] = (scores << TIE_BITS) - fleet.seed_order[fitting_rows]
        table.column[fitting_rows] = columns


def _fits_on_rows(fleet: FleetArrays, shape: Shape, static: Fitting, rows: Ints) -> NDArray[np.bool_]:
    """Whether one worker fits on each of these rows. Shape (R,)."""
    resources = shape.resources
    fits_there: NDArray[np.bool_] = fleet.is_ready[rows] & static.nodes[rows]
    fits_there &= (fleet.cpu_free[rows] >= resources.cpu_milli) & (fleet.memory_free[rows] >= resources.memory_bytes)
    request = resources.gpus
    if request is None:
        return fits_there
    free = fleet.gpu_free[rows]
    if request.profile:
        some = Free(fleet.cpu_free, fleet.memory_free, free, fleet.mig[rows])
        fits_there &= places_for_slices(some, static.at(rows)).sum(axis=1) >= request.count
    elif request.is_whole:
        fits_there &= (static.devices[rows] & (free == MILLI)).sum(axis=1) >= request.count
    else:
        fits_there &= (free >= static.milli[rows]).any(axis=1)
    return fits_there


def want_of(shape: Shape, static: Fitting) -> Want:
    """A shape as scores see it. A share by memory counts as on the smallest device that will do."""
    request = shape.resources.gpus
    if request is None:
        return Want(shape.resources.cpu_milli, shape.resources.memory_bytes, 0, 0)
    if request.is_whole:
        milli, count = MILLI, request.count
    else:
        milli, count = static.most or request.milli, 1
    return Want(shape.resources.cpu_milli, shape.resources.memory_bytes, count, milli, static.models)


# -- many workers -----------------------------------------------------------------------------------------------------


def _room(
    fleet: FleetArrays,
    gang: Gang,
    shape: Shape,
    free: Free | None,
    mask: NDArray[np.bool_] | None,
    *,
    all_ready: bool = False,
) -> Ints:
    """How many workers of the gang each node could take, its own constraints on lying together left aside."""
    if free is None and not all_ready:
        room = _room_now(fleet, shape).room
        room = room if mask is None else np.where(mask, room, 0)
    else:
        room = workers_that_fit(fleet, shape, free=free, mask=mask, all_ready=all_ready)
    if gang.spread is not None:
        room = np.minimum(room, 1)
    if gang.within is Level.NVLINK and shape.resources.gpus is not None and shape.resources.gpus.is_whole:
        by_island = _workers_by_island(fleet, free or fleet.free(), fitting(fleet, shape), shape.resources.gpus.count)
        room = np.minimum(room, by_island.max(axis=1, initial=0))
    return np.minimum(room, gang.workers)


@dataclass(slots=True, eq=False)
class _RoomTable:
    """How many workers of one shape fit on each node and in all, as of ``seen`` changes of the fleet."""

    room: Ints
    total: int = 0
    seen: int = -1


def _room_now(fleet: FleetArrays, shape: Shape) -> _RoomTable:
    """How many workers of a shape fit on each node now; read only. Only what changed is worked out again."""
    table: _RoomTable | None = fleet.cache.get(("room", shape))
    if table is None:
        table = fleet.cache["room", shape] = _RoomTable(np.zeros(len(fleet.nodes), np.int64))
    if table.seen != fleet.touches:
        rows = fleet.touched_since(table.seen)
        now = workers_that_fit_on(fleet, shape, rows)
        table.total += int(now.sum()) - int(table.room[rows].sum())
        table.room[rows] = now
        table.seen = fleet.touches
    return table


def has_room(fleet: FleetArrays, gang: Gang) -> bool:
    """Whether all nodes together have room for a gang at its smallest; cheap, and may be wrong only by saying yes."""
    return any(_room_now(fleet, shape).total >= gang.smallest for shape in gang.choices)


class Kept:
    """Places that are kept for some gangs without being taken: how much room is left beside them."""

    def __init__(self, fleet: FleetArrays, parts: Sequence[tuple[Resources, Placed]]) -> None:
        self.layouts = fleet.layouts
        rows = sorted({fleet.row[place.node_id] for _, placed in parts for place in placed.places})
        at = {row: index for index, row in enumerate(rows)}
        self._rows: Ints = np.array(rows, np.int64)
        self._less = Free(
            np.zeros(len(rows), np.int64),
            np.zeros(len(rows), np.int64),
            np.zeros((len(rows), fleet.gpu_free.shape[1]), np.int64),
            np.zeros(0, np.int64),
        )
        for resources, place in ((resources, place) for resources, placed in parts for place in placed.places):
            row = fleet.row[place.node_id]
            self._less.cpu[at[row]] += resources.cpu_milli
            self._less.memory[at[row]] += resources.memory_bytes
            for share in place.devices:
                if (column := fleet.column(row, share.device_id)) >= 0:
                    self._less.gpu[at[row], column] += share.milli
        self._lost: dict[Shape, tuple[int, int]] = {}

    def has_room(self, fleet: FleetArrays, gang: Gang) -> bool:
        """Whether all nodes together have room beside these places; may be wrong only by saying yes."""
        return any(
            table.total >= gang.smallest and table.total - self._lost_to(fleet, shape, table) >= gang.smallest
            for shape in gang.choices
            for table in [_room_now(fleet, shape)]
        )

    def _lost_to(self, fleet: FleetArrays, shape: Shape, table: _RoomTable) -> int:
        """How many workers of a shape have no room because of these places; worked out when something changed there."""
        touched = int(fleet.last[self._rows].max(initial=-1))
        known = self._lost.get(shape)
        if known is not None and known[0] == touched:
            return known[1]
        profile = shape.resources.gpus.profile if shape.resources.gpus is not None else ""
        beside = 0 if profile else int(workers_that_fit_on(fleet, shape, self._rows, less=self._less).sum())
        lost = 0 if profile else int(table.room[self._rows].sum()) - beside
        self._lost[shape] = (touched, lost)
        return lost


def _workers_by_island(fleet: FleetArrays, free: Free, static: Fitting, count: int) -> Ints:
    """How many workers of so many whole GPUs each NVLink island takes. Shape (N, islands)."""
    islands = int(fleet.island.max(initial=0)) + 1
    whole = static.devices & (free.gpu == MILLI)
    return np.stack([(whole & (fleet.island == at)).sum(axis=1) // count for at in range(islands)], axis=1)


def _domain_rows(fleet: FleetArrays, gang: Gang, room: Ints) -> Ints | None:
    """The nodes to fill, in no order yet: those of the domain that the gang is to be in. None when none has room."""
    rows: Ints = np.flatnonzero(room)
    if gang.spread is not None:
        rows = _one_per_domain(fleet, gang.spread, rows)
        if len(rows) < gang.smallest:
            return None
    if gang.within is not None:
        return _smallest_domain(fleet, _known(gang.within), gang, room, rows)
    if int(room[rows].sum()) < gang.smallest:
        return None
    is_bound = stays_in_site(fleet, gang)
    if gang.prefer is None:
        return _smallest_domain(fleet, Level.SITE, gang, room, rows) if is_bound else rows
    for level in _WIDER[_WIDER.index(_known(gang.prefer)) :]:
        inside = _smallest_domain(fleet, level, gang, room, rows, whole=True)
        if inside is not None:
            return inside
    if is_bound:
        inside = _smallest_domain(fleet, Level.SITE, gang, room, rows)
        if inside is None:
            return None
        rows = inside
    return _fewest_domains(fleet, _known(gang.prefer), gang, room, rows)


def stays_in_site(fleet: FleetArrays, gang: Gang) -> bool:
    """Whether there are several sites, of which the gang has to keep to one."""
    return len(fleet.site_ids) > 1 and not gang.across and gang.workers > 1


def open_beside(fleet: FleetArrays, gang: Gang, rows: Sequence[int]) -> NDArray[np.bool_] | None:
    """The nodes that more workers of a gang may be put on, some of which are on ``rows``; None when that is all.

    A gang that is to be within one NVLink island gets no more.
    """
    mask = np.ones(len(fleet.nodes), np.bool_)
    if gang.within is Level.NVLINK:
        mask[:] = False
    level = gang.within or (Level.SITE if stays_in_site(fleet, gang) else None)
    if level is not None:
        domains = fleet.domains(_known(level))
        mask &= np.isin(domains, domains[list(rows)])
    if gang.spread is not None:
        domains = fleet.domains(gang.spread)
        mask &= ~np.isin(domains, domains[list(rows)])
    return None if mask.all() else mask


def _known(level: Level) -> Level:
    """The level at which nodes are told apart; an NVLink island is looked for inside its host."""
    return Level.HOST if level is Level.NVLINK else level


def _smallest_domain(
    fleet: FleetArrays, level: Level, gang: Gang, room: Ints, rows: Ints, *, whole: bool = False
) -> Ints | None:
    """The nodes of the domain with the least room that takes the gang (all of it, if any domain does)."""
    if not rows.size:
        return None
    domains = fleet.domains(level)[rows]
    capacity = np.bincount(domains, weights=room[rows]).astype(np.int64)
    taken = np.minimum(capacity, gang.workers)
    most = int(taken.max())
    if most < (gang.workers if whole else gang.smallest):
        return None
    fitting_domains = np.flatnonzero(taken == most)
    least = fitting_domains[np.argmin(capacity[fitting_domains])]
    inside: Ints = rows[domains == least]
    return inside


def _fewest_domains(fleet: FleetArrays, level: Level, gang: Gang, room: Ints, rows: Ints) -> Ints:
    """The nodes of as few domains as hold the gang."""
    domains = fleet.domains(level)[rows]
    capacity = np.bincount(domains, weights=room[rows]).astype(np.int64)
    order = np.argsort(-capacity, kind="stable")
    enough = int(np.searchsorted(np.cumsum(capacity[order]), gang.workers)) + 1
    inside: Ints = rows[np.isin(domains, order[:enough])]
    return inside


def _one_per_domain(fleet: FleetArrays, level: Level, rows: Ints) -> Ints:
    """Of each domain of the level that workers are spread over, the node that comes first in the fixed shuffle."""
    domains = fleet.domains(level)[rows]
    order = np.lexsort((fleet.seed_order[rows], domains))
    first = np.concatenate([[True], domains[order][1:] != domains[order][:-1]]) if len(order) else np.zeros(0, bool)
    return np.sort(rows[order[first]])


def _place_many(
    fleet: FleetArrays,
    gang: Gang,
    shape: Shape,
    score: Score,
    mask: NDArray[np.bool_] | None,
    free: Free | None,
    *,
    all_ready: bool = False,
) -> list[Place]:
    room = _room(fleet, gang, shape, free, mask, all_ready=all_ready)
    rows = _one_node(fleet, gang, shape, score, room) if free is None else None
    if rows is None:
        rows = _domain_rows(fleet, gang, room)
    if rows is None or not rows.size:
        return []
    own = free is not None
    view = free.copy() if free is not None else fleet.free()
    static = fitting(fleet, shape)
    order = _filling_order(fleet, shape, score, rows, room, view if own else None)
    counts = room[order]
    upto = np.cumsum(counts)
    last = min(int(np.searchsorted(upto, gang.workers)), len(order) - 1)
    chosen = order[: last + 1]
    request = shape.resources.gpus
    places: list[Place] = []
    for row in sorted(chosen.tolist(), key=lambda at: _nearness(fleet, at)):
        wanted = min(int(room[row]), gang.workers - len(places))
        if row == chosen[-1]:
            before = int(upto[last - 1]) if last else 0
            wanted = min(int(room[row]), gang.workers - before)
        node_id = fleet.nodes[row].id
        if request is None:
            places.extend(Place(node_id=node_id, devices=()) for _ in range(wanted))
            continue
        kept = static
        if gang.within is Level.NVLINK and request.is_whole:
            kept = _one_island(fleet, view, row, request.count * wanted, static)
        places.extend(
            Place(node_id=node_id, devices=devices) for devices in _devices_for(fleet, view, row, request, kept, wanted)
        )
    return places


def _one_node(fleet: FleetArrays, gang: Gang, shape: Shape, score: Score, room: Ints) -> Ints | None:
    """The best node that takes a whole gang which may lie anywhere; None when there is none. First in any order."""
    if gang.within is not None or gang.prefer is not None or gang.spread is not None:
        return None
    rows = np.flatnonzero(room == gang.workers)
    if not rows.size:
        return None
    best = int(np.argmax(_ranked(fleet, shape, score)[0].key[rows]))
    return rows[best : best + 1]


def _nearness(fleet: FleetArrays, row: int) -> tuple[str, str, int]:
    node = fleet.nodes[row]
    return node.block, node.rack, row


def _filling_order(fleet: FleetArrays, shape: Shape, score: Score, rows: Ints, room: Ints, free: Free | None) -> Ints:
    """Nodes that take most workers first, so that a gang touches few; then by score; then by the fixed shuffle."""
    if free is None:
        keys = _ranked(fleet, shape, score)[0].key[rows]
    else:
        gpu = np.maximum(free.gpu[rows], 0).sum(axis=1) if free.gpu.size else np.zeros(len(rows), np.int64)
        keys = -gpu * (1 << TIE_BITS) - fleet.seed_order[rows]
    return rows[np.lexsort((-keys, -room[rows]))]


def _one_island(fleet: FleetArrays, view: Free, row: int, gpus: int, static: Fitting) -> Fitting:
    """The fitting with only those devices of a node left that are in the fullest NVLink island with so many free."""
    free = static.devices[row] & (view.gpu[row] == MILLI)
    islands, sizes = np.unique(fleet.island[row][free], return_counts=True)
    roomy = np.flatnonzero(sizes >= gpus)
    devices = static.devices.copy()
    devices[row] &= fleet.island[row] == islands[roomy[int(np.argmin(sizes[roomy]))]]
    return replace(static, devices=devices)


# -- devices ----------------------------------------------------------------------------------------------------------


def _devices_for(
    fleet: FleetArrays,
    view: Free,
    row: int,
    request: GpuRequest,
    static: Fitting,
    workers: int,
) -> list[tuple[DeviceShare, ...]]:
    """Devices of one node for some workers, taken one after the other; what is free there is as before afterwards."""
    if workers == 1:
        return [_choose_devices(fleet, view, row, request, static, -1)]
    gpu, mig = view.gpu, view.mig
    before = gpu[row].copy(), mig[row].copy()
    found: list[tuple[DeviceShare, ...]] = []
    for _ in range(workers):
        devices = _choose_devices(fleet, view, row, request, static, -1)
        for share in devices:
            column = fleet.column(row, share.device_id)
            gpu[row, column] -= share.milli
            if share.profile and static.size and static.starts[row, column].any():
                take_slice(mig[row, column], share.slice, static)
        found.append(devices)
    gpu[row], mig[row] = before
    return found


def _choose_devices(
    fleet: FleetArrays, view: Free, row: int, request: GpuRequest | None, static: Fitting, column: int
) -> tuple[DeviceShare, ...]:
    """Devices of one node for one worker.

    Whole ones come from one NVLink island if one has enough, the island with the fewest that does. A share goes to
    ``column`` if the score chose one, else to the fullest device that fits it. A slice goes where it spoils least.
    """
    if request is None:
        return ()
    if request.profile:
        return _choose_slices(fleet, view, row, request, static)
    free = view.gpu[row]
    if request.is_whole:
        whole = (static.devices[row] & (free == MILLI)).nonzero()[0]
        columns = _whole_devices(fleet.island[row], whole, request.count)
        nodes = fleet.nodes[row].devices
        return tuple([DeviceShare(device_id=nodes[at].id, milli=MILLI) for at in columns])
    if column < 0 or free[column] < static.milli[row, column]:
        fitting_columns = np.flatnonzero(free >= static.milli[row])
        column = int(fitting_columns[int(np.argmin(free[fitting_columns]))])
    return (DeviceShare(device_id=fleet.device_id(row, column), milli=int(static.milli[row, column])),)


def _whole_devices(island: Ints, columns: Ints, count: int) -> list[int]:
    """So many of these columns, from one island where that is possible."""
    if count > 1 and len(columns) > count:
        islands, sizes = np.unique(island[columns], return_counts=True)
        roomy = np.flatnonzero(sizes >= count)
        if roomy.size:
            best = islands[roomy[int(np.argmin(sizes[roomy]))]]
            columns = columns[island[columns] == best]
        else:
            order = np.argsort(-sizes, kind="stable")
            rank = {int(islands[at]): number for number, at in enumerate(order)}
            columns = np.array(sorted(columns.tolist(), key=lambda at: (rank[int(island[at])], at)))
    picked: list[int] = columns[:count].tolist()
    return picked


def _choose_slices(
    fleet: FleetArrays, view: Free, row: int, request: GpuRequest, static: Fitting
) -> tuple[DeviceShare, ...]:
    """Slices for one worker: each on the device, and at the start, after which most other slices still fit."""
    found: list[DeviceShare] = []
    mig, gpu = view.mig[row].copy(), view.gpu[row].copy()
    for _ in range(request.count):
        best: tuple[tuple[int, int, int], int, int] | None = None
        for column in np.flatnonzero(static.devices[row]).tolist():
            geometry = fleet.geometry.get((row, column))
            if geometry is None:
                if gpu[column] == MILLI:  # a fixed slice, a device by itself
                    best = min(best, ((-1, column, 0), column, -1)) if best else ((-1, column, 0), column, -1)
                continue
            for start in np.flatnonzero(free_starts(mig[column], static.at(row, column))).tolist():
                after = mig[column].copy()
                take_slice(after, start, static)
                taken = int((after > 0) @ BITS)
                spoiled = -sum(
                    profile.size
                    for profile in geometry.profiles
                    for begin in profile.starts
                    if not taken & profile.bits(begin)
                )
                is_fresh = int(not mig[column].any())
                candidate = ((is_fresh, spoiled, column * 8 + start), column, start)
                best = candidate if best is None else min(best, candidate)
        if best is None:
            raise RuntimeError("a slice was counted that is not there")
        _, column, start = best
        device = fleet.device_id(row, column)
        if start < 0:
            gpu[column] = 0
            found.append(DeviceShare(device_id=device, milli=MILLI))
        else:
            take_slice(mig[column], start, static)
            milli = int(static.milli[row, column])
            found.append(DeviceShare(device_id=device, milli=milli, profile=request.profile, slice=start))
    return tuple(found)
