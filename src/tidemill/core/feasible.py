"""③ Hard constraints: on which nodes, and how many times on each, a worker's request fits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tidemill.core.fleetarrays import FleetArrays
from tidemill.model.resources import GpuRequest, Resources
from tidemill.units import MILLI

_SEPARATORS = re.compile(r"[^a-z0-9]+")
_PLENTY = 1 << 40


@lru_cache(maxsize=4096)
def model_matches(model: str, requested: str) -> bool:
    """Whether a device model answers to a requested name: ``H100`` is any H100, ``H100-SXM`` only that one.

    Case and separators do not count; a name matches whole words from the front.

    >>> model_matches("H100-SXM", "h100"), model_matches("L40", "L4"), model_matches("RTX-4090", "rtx4090")
    (True, False, True)
    """
    wanted = _SEPARATORS.sub("", requested.lower())
    prefix = ""
    for word in _SEPARATORS.split(model.lower()):
        prefix += word
        if prefix == wanted:
            return True
    return not wanted


@dataclass(frozen=True, slots=True)
class Shape:
    """What makes two workers interchangeable to the scheduler."""

    resources: Resources
    image: bool = False


def eligible_devices(fleet: FleetArrays, request: GpuRequest) -> NDArray[np.bool_]:
    """Which devices are of the model and memory asked for, free or not. Shape (N, D)."""
    mask: NDArray[np.bool_] = (
        fleet.gpu_free > -_PLENTY if fleet.gpu_free.size else np.zeros_like(fleet.gpu_free, np.bool_)
    )
    mask &= fleet.model >= 0
    if request.model:
        answering = [index for index, name in enumerate(fleet.models) if model_matches(name, request.model)]
        mask &= np.isin(fleet.model, answering)
    if request.memory_min_bytes:
        mask &= fleet.gpu_memory >= request.memory_min_bytes
    if request.memory_max_bytes:
        mask &= fleet.gpu_memory <= request.memory_max_bytes
    return mask


def workers_that_fit(fleet: FleetArrays, shape: Shape, *, empty: bool = False) -> NDArray[np.int64]:
    """How many workers of a shape fit on each node. Shape (N,).

    With ``empty``, as if nothing ran and every node were ready: what the fleet could ever hold.
    """
    resources = shape.resources
    if empty:
        cpu = np.array([node.cpu_milli for node in fleet.nodes], np.int64)
        memory = np.array([node.memory_bytes for node in fleet.nodes], np.int64)
        gpu = np.where(fleet.model >= 0, MILLI, -1)
    else:
        cpu, memory, gpu = fleet.cpu_free, fleet.memory_free, fleet.gpu_free
    fits = np.maximum(cpu, 0) // resources.cpu_milli
    if resources.memory_bytes:
        fits = np.minimum(fits, np.maximum(memory, 0) // resources.memory_bytes)
    if resources.gpus is not None:
        usable = np.where(eligible_devices(fleet, resources.gpus), gpu, 0)
        if resources.gpus.milli == MILLI:
            by_gpu = (usable == MILLI).sum(axis=1) // resources.gpus.count
        else:
            by_gpu = (usable // resources.gpus.milli).sum(axis=1)
        fits = np.minimum(fits, by_gpu)
    if resources.disk_bytes:
        disk = np.array([node.disk_bytes for node in fleet.nodes], np.int64)
        fits = np.where(disk >= resources.disk_bytes, fits, 0)
    if shape.image:
        fits = np.where(np.array([node.images for node in fleet.nodes], np.bool_), fits, 0)
    return fits if empty else np.where(fleet.is_ready, fits, 0)
