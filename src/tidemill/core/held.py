"""③ Who holds what, as columns: a row for each worker, so that "and if these were gone?" is one vector operation.

Reservations ask when enough will have ended, preemption asks whose going would make room. Both give the rows of
some workers back to a copy of what is free (``give_back``) and look whether a gang fits then.

Shapes: S rows, D the fleet's device columns. Rows are reused; ``gang`` is -1 where a row is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidemill.core.fleetarrays import FleetArrays, Free
from tidemill.model.ids import JobId, LaunchId
from tidemill.model.job import Allocation
from tidemill.model.mig import POSITIONS

NEVER: Final = 1 << 62
"""An instant after all others."""
_FEW: Final = 32
_COLUMNS: Final = ("node", "cpu", "memory", "gang", "since", "limit", "gone", "saved", "tier", "priority", "surplus")


class HeldArrays:
    """Workers that hold something. Columns, in ns, milli-units and bytes:

    ``node`` the fleet's row; ``cpu``, ``memory``, ``gpu`` (S, D) what is held; ``slices`` (S, D) MIG memory slices as
    bits; ``gang`` a number for the attempt; ``since`` when the attempt started to run, 0 when it has not; ``limit``
    how long it may run at most, 0 when nothing bounds it; ``gone`` when a worker that drains is gone at the latest, 0
    when it does not; ``saved`` until when its work is safe in a checkpoint; ``tier`` and ``priority`` of its job;
    ``surplus`` 1 for a worker that an elastic gang can do without.

    Most turns add rows and look at none, so they are written when somebody looks: ``settle`` comes before that.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._lay()

    def _lay(self) -> None:
        self.jobs: list[JobId] = []
        """The job of each gang number."""
        self.slot: dict[LaunchId, int] = {}
        self.launch: list[LaunchId] = []
        self.width = 0
        self._free: list[int] = []
        self._gang_of: dict[JobId, int] = {}
        self._free_gangs: list[int] = []
        self._members: list[int] = []
        self._unwritten: list[tuple[int, tuple[int, ...], list[tuple[int, int, int]]]] = []
        """Rows that were given away and are not written yet: the slot, its columns, its devices."""
        self._set_table(np.zeros((len(_COLUMNS), 0), np.int64))
        self.gpu: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self.slices: NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def _set_table(self, table: NDArray[np.int64]) -> None:
        """Have the columns be those of the table, which writes a whole row at once."""
        self._table = table
        for name, column in zip(_COLUMNS, table, strict=True):
            setattr(self, name, column)

    node: NDArray[np.int64]
    cpu: NDArray[np.int64]
    memory: NDArray[np.int64]
    gang: NDArray[np.int64]
    since: NDArray[np.int64]
    limit: NDArray[np.int64]
    gone: NDArray[np.int64]
    saved: NDArray[np.int64]
    tier: NDArray[np.int64]
    priority: NDArray[np.int64]
    surplus: NDArray[np.int64]

    def add(
        self,
        held: Allocation,
        fleet: FleetArrays,
        *,
        since: int = 0,
        limit: int = 0,
        gone: int = 0,
        saved: int = 0,
        tier: int = 0,
        priority: int = 0,
        surplus: int = 0,
    ) -> int:
        """The row of a worker that begins to hold; the columns that the allocation does not know are told."""
        if not self._free:
            self._grow(max(64, 2 * len(self.launch)), fleet.gpu_free.shape[1] if fleet.gpu_free.ndim == 2 else 0)
        slot = self._free.pop()
        gang = self._gang_of.get(held.job_id)
        if gang is None:
            gang = self._new_gang(held.job_id)
        self._members[gang] += 1
        row = fleet.row.get(held.node_id, -1)
        own = (row, held.cpu_milli, held.memory_bytes, gang)
        values = (*own, since, limit, gone, saved, tier, priority, surplus)
        self._unwritten.append((slot, values, fleet.columns_of(row, held.devices) if row >= 0 else []))
        self.slot[held.id] = slot
        self.launch[slot] = held.id
        return slot

    def settle(self) -> None:
        """Write the rows of those that were added, all at once; to be called before columns are looked at."""
        if not self._unwritten:
            return
        slots = [slot for slot, _, _ in self._unwritten]
        self._table[:, slots] = np.array([values for _, values, _ in self._unwritten], np.int64).T
        self.gpu[slots] = 0
        self.slices[slots] = 0
        for slot, _, columns in self._unwritten:
            for column, milli, bits in columns:
                self.gpu[slot, column] += milli
                if bits:
                    self.slices[slot, column] |= bits
        self._unwritten.clear()

    def remove(self, launch: LaunchId) -> Callable[[], object] | None:
        """Take a worker's row away; returns how to put it back, None when it has none."""
        self.settle()
        slot = self.slot.pop(launch, None)
        if slot is None:
            return None
        gang = int(self.gang[slot])
        job = self.jobs[gang]
        values = self._table[:, slot].copy()
        gpu, slices = self.gpu[slot].copy(), self.slices[slot].copy()
        self.gang[slot] = -1
        self._free.append(slot)
        self._members[gang] -= 1
        if not self._members[gang]:
            del self._gang_of[job]
            self._free_gangs.append(gang)

        generation = self._generation

        def put_back() -> None:
            if generation != self._generation:
                return  # all rows were laid anew since, and will be again
            self._free.pop()
            if not self._members[gang]:
                self._free_gangs.pop()
                self._gang_of[job] = gang
                self.jobs[gang] = job
            self._members[gang] += 1
            self._table[:, slot] = values
            self.gpu[slot], self.slices[slot] = gpu, slices
            self.slot[launch] = slot
            self.launch[slot] = launch

        return put_back

    def has(self, job: JobId) -> bool:
        """Whether a worker of the job has a row."""
        return job in self._gang_of

    def mark(self, launch: LaunchId, column: str, value: int) -> Callable[[], object] | None:
        """Set one value of a worker's row; returns how to take it back."""
        self.settle()
        slot = self.slot.get(launch)
        if slot is None:
            return None
        values: NDArray[np.int64] = getattr(self, column)
        before, generation = int(values[slot]), self._generation
        values[slot] = value

        def unmark() -> None:
            if generation != self._generation:
                return
            values_now: NDArray[np.int64] = getattr(self, column)
            values_now[slot] = before

        return unmark

    def rows(self) -> NDArray[np.int64]:
        """The rows in use."""
        return np.flatnonzero(self.gang >= 0)

    def ends(self, *, now: int, assumed: int) -> NDArray[np.int64]:
        """When each row is expected to be free, shape (S,): by its limit, else as long again as it has run."""
        ran = np.maximum(now - np.where(self.since > 0, self.since, now), 0)
        unbounded = now + np.maximum(ran, assumed)
        bounded = np.where(self.since > 0, self.since, now) + self.limit
        ends = np.where(self.limit > 0, np.maximum(bounded, now), unbounded)
        ends = np.where(self.gone > 0, np.maximum(self.gone, now), ends)
        return np.where(self.gang >= 0, ends, NEVER)

    def give_back(self, free: Free, rows: NDArray[np.int64]) -> None:
        """Add what these rows hold to ``free``, a copy, in place."""
        rows = rows[self.node[rows] >= 0]
        if not rows.size:
            return
        nodes = self.node[rows]
        np.add.at(free.cpu, nodes, self.cpu[rows])
        np.add.at(free.memory, nodes, self.memory[rows])
        if free.gpu.size:
            if len(rows) <= _FEW:
                np.add.at(free.gpu, nodes, self.gpu[rows])
            else:  # the same, on one axis, where NumPy is faster
                width = free.gpu.shape[1]
                np.add.at(
                    free.gpu.reshape(-1), (nodes[:, None] * width + np.arange(width)).ravel(), self.gpu[rows].ravel()
                )
            bits = self.slices[rows]
            if bits.any():
                np.subtract.at(free.mig, nodes, (bits[:, :, None] >> np.arange(POSITIONS)) & 1)

    def clear(self) -> None:
        """Forget every row; the fleet's columns were laid anew."""
        self._generation += 1
        self._lay()

    def _new_gang(self, job: JobId) -> int:
        if self._free_gangs:
            gang = self._free_gangs.pop()
            self.jobs[gang] = job
            self._members[gang] = 0
        else:
            gang = len(self.jobs)
            self.jobs.append(job)
            self._members.append(0)
        self._gang_of[job] = gang
        return gang

    def _grow(self, size: int, width: int) -> None:
        old = len(self.launch)
        table = np.zeros((len(_COLUMNS), size), np.int64)
        table[:, :old] = self._table
        table[_COLUMNS.index("gang"), old:] = -1
        self._set_table(table)
        for name in ("gpu", "slices"):
            wide = np.zeros((size, width), np.int64)
            wide[:old] = getattr(self, name)[:, :width] if old else 0
            setattr(self, name, wide)
        self.launch.extend([LaunchId("")] * (size - old))
        self._free.extend(range(size - 1, old - 1, -1))
