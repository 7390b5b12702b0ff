"""③ Soft preferences: among the nodes where a worker fits, which should take it.

A placement policy (:class:`Score`) is a plug-in: it sees free amounts and typical requests, and says how good each
node is. The default is :class:`Tide`; :class:`Fgd` and :class:`BestFit` are the published rivals it is measured
against. All are pure: same free amounts and same mix, same scores, on any machine.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tidemill.core.cutting import remainder_values
from tidemill.units import MILLI

Ints = NDArray[np.int64]
MOST_SHAPES: Final = 256
"""Typical requests that a policy keeps, by share; it does without the tail beyond them."""
_SETTLED: Final = 0.1
"""A new mix is ignored while it differs from the learned one by less than this share: scores stay cached."""
_CHANCE: Final = 1.5
_COUNTED: Final = 16
"""From what sum on the parts of a mix are counts of requests; below, they are shares."""
_OPENED: Final = 0.92
"""What the demand for a remainder is worth once it waits on an opened GPU: it may not come before the fleet is full."""
_SLACK: Final = (4, 3)
"""How far CPU and memory reach beyond what one typical request alone would take of them."""
_WEIGHT: Final = 1 << 16
"""The weights of typical requests add up to about this."""
TIE_BITS: Final = 20
NEVER: Final = -(1 << 63)
"""The key of a row where the worker does not fit."""
BLOCK_BITS: Final = 7
"""The best of so many rows (a power of two) is remembered, so that a search looks at few."""
_RATE_BITS: Final = 20
_PACKED: Final = 1 << 10
_ROWS_AT_ONCE: Final = 1024
LARGE: Final = 500
"""From how many nodes on the seconds that it takes to compile loops are soon won back."""
_MIB_BITS: Final = 20


@dataclass(frozen=True, slots=True)
class Want:
    """One worker's request, as far as scores care.

    ``count`` GPUs of ``milli`` each (1000, or less for one share of one GPU); no GPU is ``count`` 0. ``models`` are
    the fleet's model numbers that will do; none named means any.
    """

    cpu_milli: int
    memory_bytes: int
    count: int
    milli: int
    models: tuple[int, ...] = ()


class Columns(Protocol):
    """What a policy may read of a fleet: N nodes, D device columns. Free amounts below 0 count as 0.

    ``model`` is -1 where a column has no device; other numbers index ``models``.
    """

    @property
    def cpu_free(self) -> Ints: ...
    @property
    def memory_free(self) -> Ints: ...
    @property
    def cpu_total(self) -> Ints: ...
    @property
    def memory_total(self) -> Ints: ...
    @property
    def gpu_free(self) -> Ints: ...
    @property
    def model(self) -> Ints: ...
    @property
    def models(self) -> Sequence[str]: ...


class Score(Protocol):
    """A placement policy. Its scores may be cached until ``version`` changes or the node's free amounts do."""

    name: str
    version: int

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        """How good it is to place one worker on each row, higher is better, and the device column of a share.

        Every row fits one worker. Shapes (R,), (R,); the column is -1 for whole GPUs or none. Ties are broken by the
        engine: the lowest ``seed_order`` first.
        """
        ...

    def learn(self, mix: Sequence[tuple[Want, float]]) -> None:
        """Take these requests, with how often each was asked, or its share, as what will be asked for.

        Called rarely; bumps ``version`` when scores change.
        """
        ...


class Static(Protocol):
    """What the layout says about a shape: which nodes (N,) and devices (N, D) will do, and what it takes of each."""

    @property
    def nodes(self) -> NDArray[np.bool_]: ...
    @property
    def devices(self) -> NDArray[np.bool_]: ...
    @property
    def milli(self) -> Ints: ...


class Ranked(Columns, Protocol):
    """A fleet that tells which rows changed: ``touches`` of them so far, the last ones in ``recent``, a ring."""

    touches: int
    recent: Ints
    is_ready: NDArray[np.bool_]
    seed_order: Ints
    mark: Ints


class Table(Protocol):
    """Keys of one shape on all nodes, the highest first, as of ``seen`` changes; below 0 when nothing is known yet.

    A key is the score shifted by ``TIE_BITS``, less the seed order; ``NEVER`` where the worker does not fit. ``tops``
    has the highest key of each block of nodes.
    """

    seen: int
    answering: Ints | None
    is_whole: bool
    key: Ints
    column: Ints
    tops: Ints

    @property
    def static(self) -> Static: ...


UNLEARNED: Final[tuple[tuple[Want, float], ...]] = (
    (Want(2_000, 8 << 30, 1, 250), 1.0),
    (Want(4_000, 16 << 30, 1, 500), 1.0),
    (Want(6_000, 32 << 30, 1, MILLI), 4.0),
    (Want(12_000, 64 << 30, 2, MILLI), 1.0),
    (Want(24_000, 128 << 30, 4, MILLI), 1.0),
    (Want(48_000, 256 << 30, 8, MILLI), 1.0),
)
"""The mix that is assumed until one is learned: mostly one GPU, some shares and some of every larger size."""


class Tide:
    """Keep what is left usable for what will be asked: the default policy.

    The *usable room* of a node is an expectation over the typical requests m::

        room(node) = sum_m weight_m * min(V_m, 4/3 * cpu / (cpu of m per GPU), 4/3 * memory / (memory of m per GPU))

    where V_m adds up, over the node's GPUs that m may use, what is left of each, valued by the best way to cut GPUs
    into the shares in demand (:func:`tidemill.core.cutting.remainder_values`; a whole free GPU is worth 1000, an
    opened one 8 % less than its cut). The term of m is nothing when not one m fits. CPU and memory may run a quarter
    short before they count, because thrifty requests make up for hungry ones. ``weight_m`` is m's share of the
    requests, times the root of its GPU count, divided by the share of the fleet's GPUs on nodes that could ever hold
    m: hardware that few nodes offer and many requests insist on is kept for them, and so are whole nodes. The score
    of a placement is the room that stays minus the room that was; among equals the node with the least left wins.

    All arithmetic is in integers, so the NumPy code and the compiled loops (which need numba) agree bit for bit.
    ``compiled`` None: loops are compiled where numba is installed, once a fleet is so large that it pays.
    """

    name = "tide"

    def __init__(self, *, compiled: bool | None = None) -> None:
        self.version = 0
        self._mix: dict[Want, float] = _normal(UNLEARNED)
        self._loop: Any = None
        self._rank: Any = None
        self._may_compile = compiled is None
        if compiled:
            self._compile()
        self._laid: Ints | None = None
        self._room = _Room.empty()

    def learn(self, mix: Sequence[tuple[Want, float]]) -> None:
        """Take these requests as typical.

        Nothing changes when the mix is less than a tenth away from the present one, or no further than so few requests,
        when they were counted, differ by chance.
        """
        normal = _normal(mix)
        settled = max(_SETTLED, _CHANCE * _expected_distance(normal, math.fsum(part for _, part in mix)))
        if not normal or _distance(normal, self._mix) < settled:
            return
        self._mix = normal
        self._laid = None
        self.version += 1

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        """The change of usable room, times 1024, less how much the node has left (0 to 1023)."""
        if not fleet.models:
            left = (np.maximum(fleet.cpu_free[rows], 0) - want.cpu_milli) * 511
            return -(left // np.maximum(fleet.cpu_total[rows], 1)), np.full(len(rows), -1, np.int64)
        room = self._room_of(fleet)
        answering = _answering(want, len(fleet.models))
        if self._loop is not None:
            score, column = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
            self._loop(
                rows, fleet.cpu_free, fleet.memory_free, fleet.cpu_total, fleet.gpu_free, fleet.model,
                want.cpu_milli, want.memory_bytes, want.count, want.milli, answering,
                room.value, *room.laid, room.first, score, column,
            )  # fmt: skip
            return score, column
        parts = [
            _tide_rows(fleet, want, rows[at : at + _ROWS_AT_ONCE], answering, room)
            for at in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def best(self, fleet: Ranked, want: Want, table: Table) -> int | None:
        """The best row of a table that was brought up to date by one compiled call; None where nothing is compiled.

        -1 when the worker fits nowhere. The same keys as from ``scores``.
        """
        if not fleet.models:
            return None
        room = self._room_of(fleet)
        if self._rank is None:
            return None
        if table.answering is None:
            table.answering = _answering(want, len(fleet.models))
        static = table.static
        row: int = self._rank(
            fleet.recent, table.seen, fleet.touches, fleet.mark, fleet.is_ready, static.nodes, static.devices,
            static.milli, table.is_whole, fleet.seed_order, table.key, table.column, table.tops,
            fleet.cpu_free, fleet.memory_free, fleet.cpu_total, fleet.gpu_free, fleet.model,
            want.cpu_milli, want.memory_bytes, want.count, want.milli, table.answering,
            room.value, *room.laid, room.first,
        )  # fmt: skip
        table.seen = fleet.touches
        return row

    def _room_of(self, fleet: Columns) -> _Room:
        if self._laid is not fleet.model:
            self._room = _Room.of(fleet, self._mix)
            self._laid = fleet.model
            if self._may_compile and len(fleet.model) >= LARGE and find_spec("numba") is not None:
                self._compile()
        return self._room

    def _compile(self) -> None:
        self._may_compile = False
        self._loop, self._rank = _compiled(_tide_loop), _compiled(_tide_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """The typical requests as columns (M,), by falling weight; ``allowed`` (M, K) says which models will do.

    ``value`` (1001,) is the worth of what is left of a GPU; ``whole`` how many whole GPUs a request of several needs;
    rates are milli-GPU per milli-CPU and per MiB, slack included, times 2**20. ``laid`` is the same for the loops: all
    columns but ``value``, once for all requests and then once for each model k with the requests it may serve, which
    are rows ``first[k + 1]`` to ``first[k + 2]``.
    """

    value: Ints
    weight: Ints
    cpu: Ints
    cpu_rate: Ints
    memory: Ints
    memory_rate: Ints
    whole: Ints
    allowed: Ints
    first: Ints
    laid: tuple[Ints, ...]

    @staticmethod
    def empty() -> _Room:
        nothing = np.zeros(0, np.int64)
        return _Room(
            value=np.zeros(MILLI + 1, np.int64), weight=nothing, cpu=nothing, cpu_rate=nothing, memory=nothing,
            memory_rate=nothing, whole=nothing, allowed=np.zeros((0, 0), np.int64), first=np.zeros(2, np.int64),
            laid=(),
        )  # fmt: skip

    @staticmethod
    def of(fleet: Columns, mix: dict[Want, float]) -> _Room:
        """The mix, weighed by how scarce the hardware is that each request can use."""
        models = len(fleet.models)
        devices = _count_models(fleet.model, models)
        kinds, members = np.unique(
            np.column_stack([fleet.cpu_total, fleet.memory_total, devices]), axis=0, return_counts=True
        )
        gpus = kinds[:, 2:].sum(axis=1) * members
        wants = [want for want in mix if want.count]
        allowed = np.array([_answering(want, models) for want in wants], np.int64).reshape(len(wants), models)
        weights = []
        for want, answering in zip(wants, allowed, strict=True):
            holds = (kinds[:, 0] >= want.cpu_milli) & (kinds[:, 1] >= want.memory_bytes)
            holds &= (kinds[:, 2:] * answering).sum(axis=1) >= want.count
            capacity = int(gpus[holds].sum())
            weights.append(mix[want] * math.sqrt(want.count) * int(gpus.sum()) / capacity if capacity else 0.0)
        total = math.fsum(weights)
        weight = np.array([round(_WEIGHT * each / total) if total else 0 for each in weights], np.int64)
        reach = (np.array([want.count * want.milli for want in wants], np.int64) << _RATE_BITS) * _SLACK[0] // _SLACK[1]
        cpu = np.array([want.cpu_milli for want in wants], np.int64)
        memory = np.array([-(-want.memory_bytes >> _MIB_BITS) for want in wants], np.int64)
        demand: dict[int, float] = {}
        for want in wants:
            if want.milli < MILLI:
                demand[want.milli] = demand.get(want.milli, 0.0) + mix[want]
        value = np.rint(_OPENED * MILLI * remainder_values(demand)).astype(np.int64)
        value[MILLI] = MILLI
        cpu_rate, memory_rate = reach // np.maximum(cpu, 1), reach // np.maximum(memory, 1)
        whole = np.array([want.count if want.count > 1 else 0 for want in wants], np.int64)
        blocks = [np.arange(len(wants)), *(np.flatnonzero(allowed[:, model] * weight) for model in range(models))]
        laid = (weight, cpu, cpu_rate, memory, memory_rate, whole, allowed)
        return _Room(
            value=value,
            weight=weight,
            cpu=cpu,
            cpu_rate=cpu_rate,
            memory=memory,
            memory_rate=memory_rate,
            whole=whole,
            allowed=allowed,
            first=np.cumsum([0, *map(len, blocks)]).astype(np.int64),
            laid=tuple(np.ascontiguousarray(column[np.concatenate(blocks)]) for column in laid),
        )

    def reach(self, cpu: Ints, mib: Ints) -> Ints:
        """How much GPU the CPU and memory of some rows could go with, by request; 0 where not one fits. (R, M)."""
        by_cpu = (cpu[:, None] * self.cpu_rate) >> _RATE_BITS
        by_memory = (mib[:, None] * self.memory_rate) >> _RATE_BITS
        limit: Ints = np.minimum(by_cpu, by_memory)
        limit *= (cpu[:, None] >= self.cpu) & (mib[:, None] >= self.memory)
        return limit

    def usable(self, values: Ints, wholes: Ints, limit: Ints) -> Ints:
        """The weighted usable room (R,) of rows with these values, whole GPUs and limits by request (R, M)."""
        usable: Ints = (np.minimum(values, limit) * (wholes >= self.whole)) @ self.weight
        return usable


def _tide_rows(fleet: Columns, want: Want, rows: Ints, answering: Ints, room: _Room) -> tuple[Ints, Ints]:
    """Scores and columns of some rows, vectorised. Shapes (R,), (R,)."""
    model = fleet.model[rows]
    left = np.where(model >= 0, np.clip(fleet.gpu_free[rows], 0, MILLI), 0)
    cpu = np.maximum(fleet.cpu_free[rows], 0)
    memory = np.maximum(fleet.memory_free[rows], 0)
    serves = np.vstack([room.allowed.T, np.zeros_like(room.allowed[:, 0])])
    kind = model.max(axis=1, initial=-1)
    if ((model < 0) | (model == kind[:, None])).all():
        by_device = [serves[kind]] * model.shape[1]
    else:
        by_device = list(np.moveaxis(serves[model], 1, 0))

    def by_request(amounts: Ints) -> Ints:
        """The sum of (R, D) amounts over the devices that each request may use, shape (R, M)."""
        total: Ints = np.zeros_like(serves[kind])
        if model.shape[1] and by_device[0] is by_device[-1]:
            total += amounts.sum(axis=1)[:, None] * by_device[0]
            return total
        for at, there in enumerate(by_device):
            total += amounts[:, [at]] * there
        return total

    values, wholes = by_request(room.value[left]), by_request((left == MILLI).astype(np.int64))
    before = room.usable(values, wholes, room.reach(cpu, memory >> _MIB_BITS))
    cpu_left = cpu - want.cpu_milli
    limit = room.reach(cpu_left, (memory - want.memory_bytes) >> _MIB_BITS)
    may = np.append(answering, 0)[model] > 0
    column = np.full(len(rows), -1, np.int64)
    if want.count == 0 or want.milli == MILLI:
        free = may & (left == MILLI)
        taken = free & (np.cumsum(free, axis=1) <= want.count)
        gone = by_request(taken.astype(np.int64))
        after = room.usable(values - MILLI * gone, wholes - gone, limit)
    else:
        after = np.full(len(rows), np.iinfo(np.int64).min, np.int64)
        for device in range(model.shape[1]):
            fits = may[:, device] & (left[:, device] >= want.milli)
            if not fits.any():
                continue
            rest = np.where(fits, left[:, device] - want.milli, left[:, device])
            lost = room.value[left[:, device]] - room.value[rest]
            opened = (left[:, device] == MILLI).astype(np.int64)
            there = by_device[device]
            then = room.usable(values - lost[:, None] * there, wholes - opened[:, None] * there, limit)
            is_better = fits & (then > after)
            after = np.where(is_better, then, after)
            column = np.where(is_better, device, column)
        after = np.where(column < 0, 0, after)
    gpu_left = left.sum(axis=1) - want.count * want.milli
    gpu_total = np.maximum((model >= 0).sum(axis=1) * MILLI, 1)
    packed = (512 * gpu_left) // gpu_total + (511 * cpu_left) // np.maximum(fleet.cpu_total[rows], 1)
    return (after - before) * _PACKED - packed, column


def _tide_loop(jit: Callable[[Any], Any]) -> Any:
    """What :func:`_tide_rows` computes, as plain loops for a compiler. Same integers, same order of choices."""

    @jit
    def reach(
        low: int, high: int, cpu: int, mib: int, need_cpu: Any, cpu_rate: Any, need_mib: Any, mib_rate: Any, limit: Any
    ) -> None:
        for at in range(low, high):
            limit[at] = 0
            if cpu >= need_cpu[at] and mib >= need_mib[at]:
                limit[at] = min((cpu * cpu_rate[at]) >> _RATE_BITS, (mib * mib_rate[at]) >> _RATE_BITS)

    @jit
    def usable(
        kind: int, low: int, high: int, values: Any, wholes: Any, limit: Any, weight: Any, need_whole: Any, allowed: Any
    ) -> Any:
        total = 0
        if kind >= 0:
            value, whole = values[kind], wholes[kind]
            for at in range(low, high):
                if whole >= need_whole[at]:
                    total += min(value, limit[at]) * weight[at]
            return total
        for at in range(low, high):
            value, whole = 0, 0
            for k in range(len(values)):
                value += values[k] * allowed[at, k]
                whole += wholes[k] * allowed[at, k]
            if whole >= need_whole[at]:
                total += min(value, limit[at]) * weight[at]
        return total

    @jit
    def loop(
        rows: Any, cpu_free: Any, memory_free: Any, cpu_total: Any, gpu_free: Any, model: Any,
        want_cpu: int, want_memory: int, count: int, milli: int, answering: Any,
        value: Any, weight: Any, need_cpu: Any, cpu_rate: Any, need_mib: Any, mib_rate: Any, need_whole: Any,
        allowed: Any, first: Any, score: Any, column: Any,
    ) -> None:  # fmt: skip
        devices = model.shape[1]
        values, wholes = np.zeros(len(answering), np.int64), np.zeros(len(answering), np.int64)
        left, limit = np.zeros(devices, np.int64), np.zeros(len(weight), np.int64)
        for i in range(len(rows)):
            row = rows[i]
            cpu, memory = max(cpu_free[row], 0), max(memory_free[row], 0)
            if i:
                last = rows[i - 1]
                is_same = max(cpu_free[last], 0) == cpu and max(memory_free[last], 0) == memory
                is_same = is_same and cpu_total[last] == cpu_total[row]
                for d in range(devices):
                    is_same = is_same and gpu_free[last, d] == gpu_free[row, d] and model[last, d] == model[row, d]
                if is_same:
                    score[i], column[i] = score[i - 1], column[i - 1]
                    continue
            cpu_left, mib_left = cpu - want_cpu, (memory - want_memory) >> _MIB_BITS
            values[:] = 0
            wholes[:] = 0
            kind, present, gpu_left = -2, 0, 0
            for d in range(devices):
                k = model[row, d]
                left[d] = 0
                if k >= 0:
                    left[d] = min(max(gpu_free[row, d], 0), MILLI)
                    present += 1
                    gpu_left += left[d]
                    values[k] += value[left[d]]
                    wholes[k] += left[d] == MILLI
                    kind = k if kind in (-2, k) else -1
            best, chosen, before, low, high = 0, -1, 0, 0, 0
            if present:
                low, high = first[kind + 1], first[kind + 2]
                reach(low, high, cpu, memory >> _MIB_BITS, need_cpu, cpu_rate, need_mib, mib_rate, limit)
                before = usable(kind, low, high, values, wholes, limit, weight, need_whole, allowed)
                reach(low, high, cpu_left, mib_left, need_cpu, cpu_rate, need_mib, mib_rate, limit)
            if count == 0 or milli == MILLI:
                taken = 0
                for d in range(devices):
                    k = model[row, d]
                    if taken < count and k >= 0 and answering[k] and left[d] == MILLI:
                        taken += 1
                        values[k] -= MILLI
                        wholes[k] -= 1
                if present:
                    best = usable(kind, low, high, values, wholes, limit, weight, need_whole, allowed)
            else:
                for d in range(devices):
                    k = model[row, d]
                    if k < 0 or not answering[k] or left[d] < milli:
                        continue
                    is_seen = False
                    for other in range(d):
                        is_seen = is_seen or (left[other] == left[d] and model[row, other] == k)
                    if is_seen:
                        continue
                    lost, opened = value[left[d]] - value[left[d] - milli], int(left[d] == MILLI)
                    values[k] -= lost
                    wholes[k] -= opened
                    then = usable(kind, low, high, values, wholes, limit, weight, need_whole, allowed)
                    values[k] += lost
                    wholes[k] += opened
                    if chosen < 0 or then > best:
                        best, chosen = then, d
            gpu_left -= count * milli
            packed = (512 * gpu_left) // max(present * MILLI, 1) + (511 * cpu_left) // max(cpu_total[row], 1)
            score[i] = (best - before) * _PACKED - packed
            column[i] = chosen

    return loop


def _tide_rank(jit: Callable[[Any], Any]) -> Any:
    """Bring the keys of the rows that changed up to date, and find the best row, as plain loops for a compiler."""
    score_rows = _tide_loop(jit)

    @jit
    def rank(
        recent: Any, seen: int, touches: int, mark: Any, is_ready: Any, nodes: Any, devices: Any, device_milli: Any,
        is_whole: bool, seed_order: Any, key: Any, column: Any, tops: Any,
        cpu_free: Any, memory_free: Any, cpu_total: Any, gpu_free: Any, model: Any,
        want_cpu: int, want_memory: int, count: int, milli: int, answering: Any,
        value: Any, weight: Any, need_cpu: Any, cpu_rate: Any, need_mib: Any, mib_rate: Any, need_whole: Any,
        allowed: Any, first: Any,
    ) -> int:  # fmt: skip
        total, width = len(key), model.shape[1]
        is_all = seen < 0 or touches - seen > len(recent)
        steps = total if is_all else touches - seen
        if steps:
            mark[total] += 1
            turn = mark[total]
            size = min(steps, total)
            rows, fitting = np.empty(size, np.int64), 0
            stale = np.zeros(len(tops), np.int64)
            for at in range(steps):
                row = at if is_all else recent[(seen + at) & (len(recent) - 1)]
                if mark[row] == turn:
                    continue
                mark[row] = turn
                stale[row >> BLOCK_BITS] = 1
                key[row] = NEVER
                if not is_ready[row] or not nodes[row] or cpu_free[row] < want_cpu or memory_free[row] < want_memory:
                    continue
                found = 0
                if count:
                    for d in range(width):
                        if is_whole:
                            found += devices[row, d] and gpu_free[row, d] == MILLI
                        else:
                            found += gpu_free[row, d] >= device_milli[row, d]
                if found >= count:
                    rows[fitting] = row
                    fitting += 1
            score, chosen = np.empty(fitting, np.int64), np.empty(fitting, np.int64)
            score_rows(
                rows[:fitting], cpu_free, memory_free, cpu_total, gpu_free, model,
                want_cpu, want_memory, count, milli, answering,
                value, weight, need_cpu, cpu_rate, need_mib, mib_rate, need_whole, allowed, first, score, chosen,
            )  # fmt: skip
            for at in range(fitting):
                row = rows[at]
                key[row] = (score[at] << TIE_BITS) - seed_order[row]
                column[row] = chosen[at]
            for block in range(len(tops)):
                if stale[block]:
                    top = NEVER
                    for row in range(block << BLOCK_BITS, min((block + 1) << BLOCK_BITS, total)):
                        top = max(top, key[row])
                    tops[block] = top
        best, at = NEVER, -1
        for block in range(len(tops)):
            if tops[block] > best:
                best, at = tops[block], block
        if at < 0:
            return -1
        row = at << BLOCK_BITS
        while key[row] != best:
            row += 1
        return row

    return rank


class Fgd:
    """Fragmentation gradient descent: the published rival, scored exactly as its authors' simulator does.

    A node's fragment, in expectation over the typical requests, is the idle GPU that the request could not use; the
    score is ``int(100 * sigmoid(fragment before - fragment after, in GPUs))``. Memory is not looked at.

    Source: Q. Weng et al., "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient
    Descent" (USENIX ATC 2023). Typical requests are the most common ones that make up 95 % of the mix.
    """

    name = "fgd"
    typical: Final = 0.95

    def __init__(self, *, compiled: bool = False) -> None:
        self.version = 0
        self._loop = _compiled(_fgd_loop) if compiled else _fgd_loop(_as_it_is)
        self._typical: list[tuple[Want, int]] = []
        self.learn(UNLEARNED)

    def learn(self, mix: Sequence[tuple[Want, float]]) -> None:
        """Take the most common of these requests as typical, memory aside."""
        share: dict[Want, float] = {}
        for want, part in mix:
            kind = Want(want.cpu_milli, 0, want.count, want.milli if want.count else 0, want.models)
            share[kind] = share.get(kind, 0.0) + part
        total = math.fsum(share.values())
        self._typical, covered = [], 0.0
        for want, part in sorted(share.items(), key=lambda item: -item[1]):
            self._typical.append((want, round(part / total * _WEIGHT * _WEIGHT)))
            covered += part
            if covered >= self.typical * total:
                break
        self.version += 1

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        """The published score, 0 to 99, and for a share the GPU that gives the best one."""
        weights = np.array([weight for _, weight in self._typical], np.int64)
        steps = np.array([1000.0 * math.log(step / (100 - step)) for step in range(1, 100)])
        models = len(fleet.models)
        score, column = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        self._loop(
            rows, fleet.cpu_free, fleet.gpu_free, fleet.model, want.cpu_milli, want.count, want.milli,
            _answering(want, models), np.array([want.cpu_milli for want, _ in self._typical], np.int64),
            np.array([want.count for want, _ in self._typical], np.int64),
            np.array([want.milli for want, _ in self._typical], np.int64), weights,
            np.array([_answering(want, models) for want, _ in self._typical], np.int64),
            np.ceil(steps * float(weights.sum())).astype(np.int64), score, column,
        )  # fmt: skip
        return score, column


def _fgd_loop(jit: Callable[[Any], Any]) -> Any:
    @jit
    def fragment(
        left: Any, model: Any, row: int, cpu: int, need_cpu: Any, counts: Any, millis: Any, weights: Any, allowed: Any
    ) -> Any:
        idle, total = 0, 0
        for d in range(len(left)):
            idle += left[d]
        for m in range(len(weights)):
            usable, fitting = 0, 0
            for d in range(len(left)):
                if model[row, d] >= 0 and allowed[m, model[row, d]] and left[d] >= millis[m]:
                    fitting += 1
                    usable += left[d]
            is_fragment = counts[m] == 0 or cpu < need_cpu[m] or fitting < counts[m]
            total += weights[m] * (idle if is_fragment else idle - usable)
        return total

    @jit
    def loop(
        rows: Any, cpu_free: Any, gpu_free: Any, model: Any, want_cpu: int, count: int, milli: int, answering: Any,
        need_cpu: Any, counts: Any, millis: Any, weights: Any, allowed: Any, steps: Any, score: Any, column: Any,
    ) -> None:  # fmt: skip
        devices = model.shape[1]
        left = np.zeros(devices, np.int64)
        for i in range(len(rows)):
            row = rows[i]
            cpu = max(cpu_free[row], 0)
            for d in range(devices):
                left[d] = min(max(gpu_free[row, d], 0), MILLI) if model[row, d] >= 0 else 0
            before = fragment(left, model, row, cpu, need_cpu, counts, millis, weights, allowed)
            best, chosen = -1, -1
            if count == 0 or milli == MILLI:
                taken = 0
                for d in range(devices):
                    if taken < count and model[row, d] >= 0 and answering[model[row, d]] and left[d] == MILLI:
                        taken += 1
                        left[d] = 0
                after = fragment(left, model, row, cpu - want_cpu, need_cpu, counts, millis, weights, allowed)
                best = np.searchsorted(steps, before - after, side="right")
            else:
                for d in range(devices):
                    if model[row, d] < 0 or not answering[model[row, d]] or left[d] < milli:
                        continue
                    is_seen = False
                    for other in range(d):
                        is_seen = is_seen or (left[other] == left[d] and model[row, other] == model[row, d])
                    if is_seen:
                        continue
                    left[d] -= milli
                    after = fragment(left, model, row, cpu - want_cpu, need_cpu, counts, millis, weights, allowed)
                    left[d] += milli
                    then = np.searchsorted(steps, before - after, side="right")
                    if then > best:
                        best, chosen = then, d
            score[i] = best
            column[i] = chosen

    return loop


class BestFit:
    """The least left over, of CPU and GPU, by the published rival's weights; a share goes to the fullest GPU.

    Source: the simulator of the FGD paper: ``int(100 * (1 - 0.5 * (cpu left / 128000 + gpu left / 8000)))``.
    """

    name = "best_fit"
    version = 0

    def learn(self, mix: Sequence[tuple[Want, float]]) -> None:
        """Best fit expects nothing."""

    def scores(self, fleet: Columns, want: Want, rows: Ints) -> tuple[Ints, Ints]:
        """The published score, 100 or less, and for a share the GPU with the least left that fits it."""
        model = fleet.model[rows]
        left = np.where(model >= 0, np.clip(fleet.gpu_free[rows], 0, MILLI), 0)
        cpu_left = np.maximum(fleet.cpu_free[rows], 0) - want.cpu_milli
        gpu_left = left.sum(axis=1) - want.count * want.milli
        score = 100 - -(-(cpu_left * 50 * 8_000 + gpu_left * 50 * 128_000) // (128_000 * 8_000))
        column = np.full(len(rows), -1, np.int64)
        if want.count and want.milli < MILLI and model.size:
            may = np.append(_answering(want, len(fleet.models)), 0)[model] > 0
            column = np.argmin(np.where(may & (left >= want.milli), left, MILLI + 1), axis=1)
        return score, column


BUILT_IN: Final[dict[str, Callable[[], Score]]] = {Tide.name: Tide, Fgd.name: Fgd, BestFit.name: BestFit}
"""The policies that come along, by name; the first is the default."""


def _answering(want: Want, models: int) -> Ints:
    """Which models will do, shape (K,), as 0 and 1."""
    if not want.models:
        return np.ones(models, np.int64)
    mask = np.zeros(models, np.int64)
    mask[[model for model in want.models if 0 <= model < models]] = 1
    return mask


def _count_models(model: Ints, models: int) -> Ints:
    """How many devices of each model every node has, shape (N, K)."""
    return np.stack([(model == k).sum(axis=1) for k in range(models)], axis=1) if models else model[:, :0]


def _normal(mix: Sequence[tuple[Want, float]]) -> dict[Want, float]:
    """The most common requests and their shares, which add up to one."""
    share: dict[Want, float] = {}
    for want, part in mix:
        if part > 0:
            share[want] = share.get(want, 0.0) + part
    common = sorted(share, key=lambda want: (-share[want], _order(want)))[:MOST_SHAPES]
    total = math.fsum(share[want] for want in common)
    return {want: share[want] / total for want in common}


def _order(want: Want) -> tuple[int, int, int, int, tuple[int, ...]]:
    return want.cpu_milli, want.memory_bytes, want.count, want.milli, want.models


def _distance(one: dict[Want, float], other: dict[Want, float]) -> float:
    """The share of requests by which two mixes differ, 0 to 1."""
    return math.fsum(abs(one.get(want, 0.0) - other.get(want, 0.0)) for want in {*one, *other}) / 2


def _expected_distance(mix: dict[Want, float], count: float) -> float:
    """By how much a mix counted over so many requests is away from the true one, by chance; 0 for mere shares.

    The mean absolute deviation of a binomial share, ``sqrt(2 p (1 - p) / (pi n))``, halved and summed.
    """
    if count < _COUNTED:
        return 0.0
    return math.fsum(math.sqrt(share * (1 - share)) for share in mix.values()) / math.sqrt(2 * math.pi * count)


def _as_it_is(function: Any) -> Any:
    return function


@lru_cache(maxsize=4)
def _compiled(loop: Callable[[Callable[[Any], Any]], Any]) -> Any:
    """The loop through numba, once per process. Raises ImportError where numba is not installed."""
    return loop(importlib.import_module("numba").njit)
