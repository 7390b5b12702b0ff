"""③ Places for a whole gang, or none: all or nothing is decided before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tidemill.core.feasible import Shape, eligible_devices, workers_that_fit
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.score import best_fit
from tidemill.model.ids import NodeId
from tidemill.model.job import DeviceShare
from tidemill.model.resources import GpuRequest
from tidemill.units import MILLI


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one worker goes."""

    node_id: NodeId
    devices: tuple[DeviceShare, ...]


def place_gang(fleet: FleetArrays, shape: Shape, workers: int) -> tuple[Place, ...]:
    """A place for each worker, by rank, taken from the fleet; empty and nothing taken when they do not all fit.

    Nodes are filled one after the other, best score first, so a gang is spread as little as can be.
    """
    fits = workers_that_fit(fleet, shape)
    if int(fits.sum()) < workers:
        return ()
    whole = np.flatnonzero(fits >= workers)
    candidates = whole if whole.size else np.flatnonzero(fits > 0)
    order = candidates[np.argsort(-best_fit(fleet, shape)[candidates], kind="stable")]
    places: list[Place] = []
    for row in order:
        for _ in range(min(int(fits[row]), workers - len(places))):
            devices = _choose_devices(fleet, int(row), shape.resources.gpus)
            node = fleet.nodes[row].id
            fleet.take(
                node, cpu_milli=shape.resources.cpu_milli, memory_bytes=shape.resources.memory_bytes, devices=devices
            )
            places.append(Place(node_id=node, devices=devices))
        if len(places) == workers:
            break
    return tuple(places)


def _choose_devices(fleet: FleetArrays, row: int, request: GpuRequest | None) -> tuple[DeviceShare, ...]:
    """Devices of one node for one worker: whole free ones, or for a share the fullest device that still fits it."""
    if request is None:
        return ()
    free = np.where(eligible_devices(fleet, request)[row], fleet.gpu_free[row], 0)
    if request.milli == MILLI:
        columns = np.flatnonzero(free == MILLI)[: request.count]
    else:
        fitting = np.flatnonzero(free >= request.milli)
        columns = fitting[[int(np.argmin(free[fitting]))]]
    return tuple(DeviceShare(device_id=fleet.device_id(row, int(column)), milli=request.milli) for column in columns)
