"""③ Soft preferences: among nodes where a worker fits, which should take it first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tidemill.core.feasible import Shape
from tidemill.core.fleetarrays import FleetArrays


def best_fit(fleet: FleetArrays, shape: Shape) -> NDArray[np.float64]:
    """A score per node, higher is better, shape (N,): prefer the node with the least left over.

    GPU work fills nodes whose GPUs are already in use; CPU-only work stays away from nodes with free GPUs.
    Source: best fit by remaining normalised capacity. Ties break by the lowest node id.
    """
    cpu_total = np.array([max(node.cpu_milli, 1) for node in fleet.nodes], np.float64)
    cpu_left: NDArray[np.float64] = fleet.cpu_free / cpu_total
    if not fleet.gpu_free.size:
        return -cpu_left
    gpu_left: NDArray[np.float64] = np.maximum(fleet.gpu_free, 0).sum(axis=1) / np.maximum(
        (fleet.model >= 0).sum(axis=1) * 1000.0, 1.0
    )
    if shape.resources.gpus is None:
        spared: NDArray[np.float64] = -cpu_left - 4.0 * np.where((fleet.model >= 0).any(axis=1), gpu_left, 0.0)
        return spared
    score: NDArray[np.float64] = -gpu_left - 0.25 * cpu_left
    return score
