"""③ The fleet as columns: rows are nodes, and every change can be undone.

One structure of arrays answers "where does it fit" for all nodes at once. It is changed in place; an undo log
takes every change back to a checkpoint, so a turn can try things and a failed commit leaves no trace. Room may be taken
before it is free (it is *promised*, while somebody still holds it): then what is free is below zero for a while.

Shapes: N nodes, sorted by id; D the most devices that any node has. ``gpu_free`` is (N, D) milli-GPU, 0 where there
is no device that may be used; ``model`` (N, D) numbers ``models``, -1 there; ``island`` (N, D) is the NVLink domain;
``mig`` (N, D, 9) how often each MIG memory slice is taken, and the media engines (no third axis while no device is
cut); ``cpu_free`` (N,) milli-CPU, ``memory_free`` (N,) bytes; ``is_ready`` (N,) bool; ``seed_order`` (N,) one fixed
shuffle that breaks ties without favouring any node's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from tidemill.model.fleet import Level, Mig, Node, NodeState, Site
from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.model.job import DeviceShare
from tidemill.model.mig import POSITIONS, Geometry, geometry_of
from tidemill.units import MILLI

Ints = NDArray[np.int64]
NO_DEVICE: Final = -1
_FEW: Final = 32
BITS: Final = 1 << np.arange(POSITIONS)


class Free(NamedTuple):
    """What is free: the fleet's own columns, or a copy into which something was given back in thought."""

    cpu: Ints
    memory: Ints
    gpu: Ints
    mig: Ints

    def copy(self) -> Free:
        """Columns of one's own."""
        return Free(self.cpu.copy(), self.memory.copy(), self.gpu.copy(), self.mig.copy())


class FleetArrays:
    """What is free, per node and device. ``released`` counts events that could make room, ``layouts`` rebuilds."""

    def __init__(self) -> None:
        self.released = 0
        self.layouts = 0
        self.touches = 0
        """How often a row changed since the last rebuild; caches read on from where they were."""
        self.recent: Ints = np.zeros(1, np.int64)
        """The rows that changed last, a ring: change ``t`` is at ``t & (len(recent) - 1)``."""
        self.last: Ints = np.zeros(0, np.int64)
        """Which change of each row was its last, (N,); below 0: none yet."""
        self.mark: Ints = np.zeros(1, np.int64)
        """Room for compiled loops to tick rows off in, (N + 1,); its last entry counts the loops."""
        self.cache: dict[Any, Any] = {}
        """What was worked out of the present layout; emptied by a rebuild."""
        self.sites: Mapping[SiteId, Site] = {}
        """What is known of the nodes' sites."""
        self._undo: list[tuple[int, int, int, list[tuple[int, int, int]], int]] = []
        self._lay([])

    def rebuild(self, nodes: list[Node], sites: Mapping[SiteId, Site] | None = None) -> None:
        """Lay the columns anew for these nodes at these sites, everything free. Forgets the undo log."""
        self.sites = sites or {}
        self._lay(nodes)
        self.released += 1
        self.layouts += 1

    def _lay(self, nodes: list[Node]) -> None:
        self.nodes = sorted(nodes, key=lambda node: node.id)
        self.row: dict[NodeId, int] = {node.id: index for index, node in enumerate(self.nodes)}
        self.site_ids = sorted({node.site_id for node in self.nodes})
        """The sites that have nodes; each one's place is its number in ``domains(Level.SITE)``."""
        width = max((len(node.devices) for node in self.nodes), default=0)
        shape = (len(self.nodes), width)
        self.models = sorted({device.model for node in self.nodes for device in node.devices})
        number = {name: index for index, name in enumerate(self.models)}
        self.cpu_total: Ints = np.array([node.cpu_milli for node in self.nodes], np.int64)
        self.memory_total: Ints = np.array([node.memory_bytes for node in self.nodes], np.int64)
        self.disk_total: Ints = np.array([node.disk_bytes for node in self.nodes], np.int64)
        self.cpu_free: Ints = self.cpu_total.copy()
        self.memory_free: Ints = self.memory_total.copy()
        self.others_cpu: Ints = np.zeros(len(self.nodes), np.int64)
        """What work holds on each node that is not ours, (N,); so are the next two."""
        self.others_memory: Ints = np.zeros(len(self.nodes), np.int64)
        self.others_gpus: Ints = np.zeros(len(self.nodes), np.int64)
        self.is_ready: NDArray[np.bool_] = np.array([node.state is NodeState.READY for node in self.nodes], np.bool_)
        self.has_images: NDArray[np.bool_] = np.array([node.images for node in self.nodes], np.bool_)
        self.gpu_free: Ints = np.zeros(shape, np.int64)
        self.gpu_memory: Ints = np.zeros(shape, np.int64)
        self.model: Ints = np.full(shape, NO_DEVICE, np.int64)
        self.island: Ints = np.zeros(shape, np.int64)
        self.is_cut: NDArray[np.bool_] = np.zeros(shape, np.bool_)
        """Devices in MIG mode: slices of them are given, never shares, never the whole."""
        self.geometry: dict[tuple[int, int], Geometry] = {}
        self._columns: list[dict[DeviceId, int]] = []
        """Of each row, which device is in which column."""
        for row, node in enumerate(self.nodes):
            failing = dict(node.failing)
            self._columns.append({device.id: column for column, device in enumerate(node.devices)})
            for column, device in enumerate(node.devices):
                if device.id in failing:
                    continue
                self.gpu_free[row, column] = MILLI
                self.gpu_memory[row, column] = device.memory_bytes
                self.model[row, column] = number[device.model]
                self.island[row, column] = device.island
                if device.mig is not Mig.OFF:
                    self.is_cut[row, column] = True
                    if (geometry := geometry_of(device.model, device.memory_bytes)) is not None:
                        self.geometry[row, column] = geometry
        self.mig: Ints = np.zeros((*shape, POSITIONS if self.is_cut.any() else 0), np.int64)
        self._free = Free(self.cpu_free, self.memory_free, self.gpu_free, self.mig)
        shuffled = sorted(range(len(self.nodes)), key=lambda at: (crc32(self.nodes[at].id.encode()), at))
        self.seed_order: Ints = np.zeros(len(self.nodes), np.int64)
        self.seed_order[shuffled] = np.arange(len(self.nodes))
        self.touches = 0
        self.last = np.full(len(self.nodes), -1, np.int64)
        self.mark = np.zeros(len(self.nodes) + 1, np.int64)
        self.recent = np.zeros(1 << max(4 * len(self.nodes) - 1, 1).bit_length(), np.int64)
        self.cache.clear()
        self._undo.clear()

    def free(self) -> Free:
        """What is free now; not a copy."""
        return self._free

    def empty(self) -> Free:
        """What would be free if nothing ran; read only."""
        known: Free | None = self.cache.get("empty")
        if known is None:
            whole = np.where(self.model >= 0, MILLI, 0)
            known = self.cache["empty"] = Free(self.cpu_total, self.memory_total, whole, np.zeros_like(self.mig))
        return known

    def touched_since(self, seen: int) -> Ints:
        """The rows that changed after the first ``seen`` changes, each once; all when that is too long ago."""
        missed, size = self.touches - seen, len(self.recent)
        if seen < 0 or missed >= len(self.nodes):
            return np.arange(len(self.nodes))
        if missed <= _FEW:
            return np.array(sorted({int(self.recent[at & (size - 1)]) for at in range(seen, self.touches)}), np.int64)
        return np.unique(self.recent[np.arange(seen, self.touches) & (size - 1)])

    def domains(self, level: Level) -> Ints:
        """The number of each node's domain of that level, shape (N,). Where it is not known a node is one by itself."""
        known: Ints | None = self.cache.get(level)
        if known is None:
            keys = [_domain(node, level) for node in self.nodes]
            number = {key: at for at, key in enumerate(sorted(set(keys)))}
            known = self.cache[level] = np.array([number[key] for key in keys], np.int64)
        return known

    def take(self, node: NodeId, *, cpu_milli: int, memory_bytes: int, devices: tuple[DeviceShare, ...]) -> None:
        """Take that much of a node. Whether it is free is the caller's to know."""
        row = self.row[node]
        columns = self.columns_of(row, devices)
        self._move(row, cpu_milli, memory_bytes, columns, 1)
        self._undo.append((row, cpu_milli, memory_bytes, columns, -1))

    def give(self, node: NodeId, *, cpu_milli: int, memory_bytes: int, devices: tuple[DeviceShare, ...]) -> None:
        """Give back what was taken. A device that is no longer there is passed over."""
        row = self.row.get(node)
        if row is None:
            return
        columns = self.columns_of(row, devices)
        self._move(row, cpu_milli, memory_bytes, columns, -1)
        self._undo.append((row, cpu_milli, memory_bytes, columns, 1))
        self.released += 1

    def leave_to_others(self, node: Node) -> None:
        """Take what work holds there that is not ours, as far as it is free: the devices of which nothing is taken."""
        row = self.row[node.id]
        self.others_cpu[row] = min(node.others_cpu_milli, max(0, self.cpu_free[row]))
        self.others_memory[row] = min(node.others_memory_bytes, max(0, self.memory_free[row]))
        self.cpu_free[row] -= self.others_cpu[row]
        self.memory_free[row] -= self.others_memory[row]
        whole = np.flatnonzero(self.gpu_free[row] == MILLI)[: node.others_gpus]
        self.gpu_free[row, whole] = 0
        self.others_gpus[row] = len(whole)

    def take_from(
        self, free: Free, node: NodeId, cpu_milli: int, memory_bytes: int, devices: tuple[DeviceShare, ...]
    ) -> None:
        """Take that much of a node in a copy of what is free, in place."""
        row = self.row[node]
        free.cpu[row] -= cpu_milli
        free.memory[row] -= memory_bytes
        for share in devices:
            column = self._columns[row][share.device_id]
            free.gpu[row, column] -= share.milli
            if bits := self.slice_bits(row, column, share):
                free.mig[row, column] += np.where(BITS & bits, 1, 0)

    def checkpoint(self) -> int:
        """A mark to roll back to."""
        return len(self._undo)

    def rollback(self, mark: int) -> None:
        """Undo everything since ``mark``."""
        while len(self._undo) > mark:
            self._move(*self._undo.pop())

    def commit(self) -> None:
        """Keep everything done so far."""
        self._undo.clear()

    def device_id(self, row: int, column: int) -> DeviceId:
        """The device in that place."""
        return self.nodes[row].devices[column].id

    def column(self, row: int, device: DeviceId) -> int:
        """The device's column; -1 when the node does not have it."""
        return self._columns[row].get(device, -1) if row >= 0 else -1

    def model_of(self, node: NodeId, device: DeviceId) -> str:
        """A device's model; empty when it is not there."""
        return next((one.model for one in self.nodes[self.row[node]].devices if one.id == device), "")

    def slice_bits(self, row: int, column: int, share: DeviceShare) -> int:
        """The positions that a share of a cut device takes, as bits; zero for any other share."""
        if not share.profile or (geometry := self.geometry.get((row, column))) is None:
            return 0
        profile = geometry.profile(share.profile)
        return profile.bits(share.slice) if profile is not None else 0

    def is_within(self, node: NodeId, devices: tuple[DeviceShare, ...]) -> bool:
        """Whether of a node's processors, its memory and these devices nothing is taken twice."""
        row = self.row[node]
        if self.cpu_free[row] < 0 or self.memory_free[row] < 0:
            return False
        return all(self.gpu_free[row, self.column(row, share.device_id)] >= 0 for share in devices)

    def can_serve(self, node: NodeId, devices: tuple[DeviceShare, ...]) -> bool:
        """Whether a node is ready, and these devices are there and do not fail."""
        row = self.row[node]
        columns = [self.column(row, share.device_id) for share in devices]
        return bool(self.is_ready[row]) and all(at >= 0 and self.model[row, at] >= 0 for at in columns)

    def columns_of(self, row: int, devices: tuple[DeviceShare, ...]) -> list[tuple[int, int, int]]:
        """Which columns these devices are, and of each how much is meant and which slices."""
        columns, known = [], self._columns[row]
        for share in devices:
            column = known.get(share.device_id)
            if column is not None:
                bits = self.slice_bits(row, column, share) if share.profile else 0
                columns.append((column, share.milli, bits))
        return columns

    def _move(
        self, row: int, cpu_milli: int, memory_bytes: int, columns: list[tuple[int, int, int]], sign: int
    ) -> None:
        """Take, or with a ``sign`` below zero give."""
        self.cpu_free[row] -= sign * cpu_milli
        self.memory_free[row] -= sign * memory_bytes
        for column, milli, bits in columns:
            self.gpu_free[row, column] -= sign * milli
            if bits:
                self.mig[row, column] += np.where(BITS & bits, sign, 0)
        self.recent[self.touches & (len(self.recent) - 1)] = row
        self.last[row] = self.touches
        self.touches += 1


def _domain(node: Node, level: Level) -> tuple[str, ...]:
    match level:
        case Level.SITE:
            return (node.site_id,)
        case Level.BLOCK:
            return (node.site_id, node.block) if node.block else (node.site_id, "", node.id)
        case Level.RACK:
            return (node.site_id, node.block, node.rack) if node.rack else (node.site_id, "", "", node.id)
        case _:
            return (node.site_id, "", "", node.id)
