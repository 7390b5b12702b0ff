"""③ The fleet as columns: rows are nodes, and every change can be undone.

One structure of arrays answers "where does it fit" for all nodes at once. It is changed in place; an undo log
takes every change back to a checkpoint, so a turn can try things and a failed commit leaves no trace.

Shapes: N nodes, D the most devices that any node has. ``gpu_free`` is (N, D) milli-GPU, -1 where there is no
device; ``cpu_free`` (N,) milli-CPU; ``memory_free`` (N,) bytes; ``is_ready`` (N,) bool.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tidemill.model.fleet import Node, NodeState
from tidemill.model.ids import DeviceId, NodeId
from tidemill.model.job import DeviceShare
from tidemill.units import MILLI

NO_DEVICE = -1


class FleetArrays:
    """What is free, per node and device. ``released`` counts events that could make room."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.row: dict[NodeId, int] = {}
        self.cpu_free: NDArray[np.int64] = np.zeros(0, np.int64)
        self.memory_free: NDArray[np.int64] = np.zeros(0, np.int64)
        self.is_ready: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.gpu_free: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self.gpu_memory: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self.model: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self.models: list[str] = []
        self.released = 0
        self._undo: list[tuple[int, int, int, tuple[tuple[int, int], ...]]] = []
        self._column: dict[tuple[int, DeviceId], int] = {}

    def rebuild(self, nodes: list[Node]) -> None:
        """Lay the columns anew for these nodes, everything free. Forgets the undo log."""
        self.nodes = sorted(nodes, key=lambda node: node.id)
        self.row = {node.id: index for index, node in enumerate(self.nodes)}
        width = max((len(node.devices) for node in self.nodes), default=0)
        shape = (len(self.nodes), width)
        self.models = sorted({device.model for node in self.nodes for device in node.devices})
        number = {name: index for index, name in enumerate(self.models)}
        self.cpu_free = np.array([node.cpu_milli for node in self.nodes], np.int64)
        self.memory_free = np.array([node.memory_bytes for node in self.nodes], np.int64)
        self.is_ready = np.array([node.state is NodeState.READY for node in self.nodes], np.bool_)
        self.gpu_free = np.full(shape, NO_DEVICE, np.int64)
        self.gpu_memory = np.zeros(shape, np.int64)
        self.model = np.full(shape, NO_DEVICE, np.int64)
        self._column = {}
        for row, node in enumerate(self.nodes):
            for column, device in enumerate(node.devices):
                self.gpu_free[row, column] = MILLI
                self.gpu_memory[row, column] = device.memory_bytes
                self.model[row, column] = number[device.model]
                self._column[row, device.id] = column
        self.released += 1
        self._undo.clear()

    def take(self, node: NodeId, *, cpu_milli: int, memory_bytes: int, devices: tuple[DeviceShare, ...]) -> None:
        """Take that much of a node. Whether it is free is the caller's to know."""
        row = self.row[node]
        columns = tuple((self._column[row, share.device_id], share.milli) for share in devices)
        self._move(row, cpu_milli, memory_bytes, columns)
        self._undo.append((row, -cpu_milli, -memory_bytes, tuple((column, -milli) for column, milli in columns)))

    def give(self, node: NodeId, *, cpu_milli: int, memory_bytes: int, devices: tuple[DeviceShare, ...]) -> None:
        """Give back what was taken. A device that is no longer there is passed over."""
        row = self.row.get(node)
        if row is None:
            return
        columns = tuple(
            (self._column[row, share.device_id], -share.milli)
            for share in devices
            if (row, share.device_id) in self._column
        )
        self._move(row, -cpu_milli, -memory_bytes, columns)
        self._undo.append((row, cpu_milli, memory_bytes, tuple((column, -milli) for column, milli in columns)))
        self.released += 1

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

    def _move(self, row: int, cpu_milli: int, memory_bytes: int, columns: tuple[tuple[int, int], ...]) -> None:
        self.cpu_free[row] -= cpu_milli
        self.memory_free[row] -= memory_bytes
        for column, milli in columns:
            self.gpu_free[row, column] -= milli
