"""③ Hard constraints: on which nodes, and how many times on each, a worker's request fits.

What follows from the layout alone (labels, taints, models, memory sizes) is worked out once per shape and layout
(``Fitting``); the rest is a few vector operations over what is free.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from tidemill.core.fleetarrays import FleetArrays, Free, Ints
from tidemill.model.fleet import Level, Node, Site
from tidemill.model.mig import MEDIA
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import ANYWHERE, Territory
from tidemill.model.values import replace
from tidemill.units import MILLI

_SEPARATORS = re.compile(r"[^a-z0-9]+")
_NOWHERE = 1 << 40


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


class Shape(Struct, frozen=True, cache_hash=True, gc=False):
    """What makes two workers interchangeable to placement. Its hash is worked out once."""

    resources: Resources
    image: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[str, ...] = ()
    where: Territory = ANYWHERE
    machine: str = ""
    """The name of the one machine that has a volume or a data set of it; empty: any."""


class Fitting(Struct, frozen=True, eq=False, gc=False):
    """What the layout says about a shape: nodes and devices that could ever serve it, free or not.

    ``nodes`` (N,) bool; ``devices`` (N, D) bool; ``milli`` (N, D) is how much of each device one worker takes;
    ``starts`` (N, D, 9) bool is where a MIG profile may begin, ``size`` how many slices it takes (0: no profile);
    ``most`` is the largest ``milli`` of a device that will do, 0 when there is none; ``has_media`` is whether the
    profile takes the device's media engines, which are there once.
    """

    nodes: NDArray[np.bool_]
    devices: NDArray[np.bool_]
    milli: Ints
    starts: NDArray[np.bool_]
    size: int
    models: tuple[int, ...]
    most: int = 0
    has_media: bool = False

    def at(self, *rows: Any) -> Fitting:
        """Of some nodes, or of one device, what concerns their devices."""
        return replace(self, devices=self.devices[rows], milli=self.milli[rows], starts=self.starts[rows])


def fitting(fleet: FleetArrays, shape: Shape) -> Fitting:
    """The static part of a shape's constraints, from the fleet's cache."""
    known: Fitting | None = fleet.cache.get(shape)
    if known is None:
        known = fleet.cache[shape] = _work_out(fleet, shape)
    return known


def eligible_devices(fleet: FleetArrays, request: GpuRequest) -> NDArray[np.bool_]:
    """Which devices are of the model, memory and kind asked for, free or not. Shape (N, D)."""
    mask: NDArray[np.bool_] = fleet.model >= 0
    if request.model:
        answering = [
            index
            for index, name in enumerate(fleet.models)
            if model_matches(name, request.model) or (request.profile and _is_slice_of(name, request))
        ]
        mask &= np.isin(fleet.model, answering)
    if request.memory_min_bytes:
        mask &= fleet.gpu_memory >= request.memory_min_bytes
    if request.memory_max_bytes:
        mask &= fleet.gpu_memory <= request.memory_max_bytes
    if request.share_bytes:
        mask &= fleet.gpu_memory >= request.share_bytes
    if not request.profile:
        return mask & ~fleet.is_cut
    ready_made = [index for index, name in enumerate(fleet.models) if _is_slice_of(name, request)]
    can_be_cut = np.zeros_like(mask)
    for (row, column), geometry in fleet.geometry.items():
        can_be_cut[row, column] = geometry.profile(request.profile) is not None
    return mask & (np.isin(fleet.model, ready_made) | can_be_cut)


def _is_slice_of(model: str, request: GpuRequest) -> bool:
    """Whether a device is itself a fixed slice of the profile: ``MIG-1g.10gb-H100-SXM``."""
    if not model.upper().startswith("MIG-"):
        return False
    _, profile, whole = model.split("-", 2)
    return profile == request.profile and (not request.model or model_matches(whole, request.model))


def _work_out(fleet: FleetArrays, shape: Shape) -> Fitting:
    """A shape's fitting, put together of what it has in common with others: which nodes, and which devices."""
    allowed = (shape.resources.disk_bytes, shape.image, shape.labels, shape.tolerations, shape.where, shape.machine)
    nodes: NDArray[np.bool_] | None = fleet.cache.get(allowed)
    if nodes is None:
        nodes = fleet.cache[allowed] = _allowed_nodes(fleet, shape)
    request = shape.resources.gpus
    parts: tuple[NDArray[np.bool_], Ints, NDArray[np.bool_], int, int] | None = fleet.cache.get(("devices", request))
    if parts is None:
        parts = fleet.cache["devices", request] = _device_parts(fleet, request)
    devices, milli, starts, size, most = parts
    if request is None:
        return Fitting(nodes, devices, milli, starts, size, ())
    models: tuple[int, ...] | None = fleet.cache.get(("models", request, allowed))
    if models is None:
        models = fleet.cache["models", request, allowed] = _models(fleet, devices & nodes[:, None])
    has_media = bool(request.profile) and request.profile.endswith("+me")
    return Fitting(nodes, devices, milli, starts, size, models, most, has_media)


def _models(fleet: FleetArrays, devices: NDArray[np.bool_]) -> tuple[int, ...]:
    """Of which models these devices are; empty when all models that are there are among them."""
    used = np.flatnonzero(np.bincount(fleet.model[devices], minlength=len(fleet.models)))
    present = list(range(len(fleet.models)))
    if (fleet.model < 0).any():  # the only device of a model may be failing
        present = np.flatnonzero(np.bincount(fleet.model[fleet.model >= 0], minlength=len(fleet.models))).tolist()
    return () if used.tolist() == present else tuple(used.tolist()) or (-1,)


def _allowed_nodes(fleet: FleetArrays, shape: Shape) -> NDArray[np.bool_]:
    """On which nodes labels, taints, disk and images let a shape go. Shape (N,); read only."""
    kinds: dict[tuple[Any, ...], list[int]] | None = fleet.cache.get("kinds")
    if kinds is None:
        kinds = fleet.cache["kinds"] = {}
        for row, node in enumerate(fleet.nodes):
            kinds.setdefault((node.labels, node.taints), []).append(row)
    nodes = np.zeros(len(fleet.nodes), np.bool_)
    for rows in kinds.values():
        if _is_allowed(fleet.nodes[rows[0]], shape):
            nodes[rows] = True
    if shape.resources.disk_bytes:
        nodes &= fleet.disk_total >= shape.resources.disk_bytes
    if shape.image:
        nodes &= fleet.has_images
    if shape.where != ANYWHERE:
        allowed = [
            number for number, site in enumerate(fleet.site_ids) if is_within(shape.where, fleet.sites.get(site))
        ]
        nodes &= np.isin(fleet.domains(Level.SITE), allowed)
    if shape.machine:
        nodes &= np.array([node.name == shape.machine for node in fleet.nodes], np.bool_)
    return nodes


def is_within(where: Territory, site: Site | None) -> bool:
    """Whether work that may be there only may be put at that site; a site that nothing is known of is nowhere."""
    if site is None:
        return where == ANYWHERE
    return (
        (not where.sites or site.name in where.sites or site.id in where.sites)
        and (not where.countries or site.country in where.countries)
        and (not where.kinds or site.kind in where.kinds)
    )


def _device_parts(
    fleet: FleetArrays, request: GpuRequest | None
) -> tuple[NDArray[np.bool_], Ints, NDArray[np.bool_], int, int]:
    """``devices``, ``milli``, ``starts``, ``size`` and ``most`` of a fitting; read only."""
    starts = np.zeros((*fleet.model.shape, 0), np.bool_)
    if request is None:
        return np.zeros_like(fleet.model, np.bool_), np.zeros_like(fleet.model), starts, 0, 0
    devices = eligible_devices(fleet, request)
    size = 0
    if request.share_bytes:
        memory = np.maximum(fleet.gpu_memory, 1)
        milli = np.where(devices, -(-MILLI * request.share_bytes // memory), _NOWHERE)
    else:
        milli = np.where(devices, request.milli, _NOWHERE)
    if request.profile:
        starts = np.zeros((*fleet.model.shape, fleet.mig.shape[2]), np.bool_)
        for (row, column), geometry in fleet.geometry.items():
            profile = geometry.profile(request.profile)
            if devices[row, column] and profile is not None:
                size = profile.size
                starts[row, column, list(_starts_on(fleet, row, column, profile.name, profile.starts))] = True
                milli[row, column] = profile.milli
    return devices, milli, starts, size, int(milli[devices].max(initial=0))


def _starts_on(fleet: FleetArrays, row: int, column: int, profile: str, starts: tuple[int, ...]) -> tuple[int, ...]:
    """Where a profile may begin on a device: anywhere its geometry allows, or where its fixed slices are."""
    fixed = fleet.nodes[row].devices[column].slices
    return starts if not fixed else tuple(start for name, start, _ in fixed if name.lower() == profile)


def _is_allowed(node: Node, shape: Shape) -> bool:
    labels = dict(node.labels)
    if not all(key in labels and is_met(labels[key], value) for key, value in shape.labels):
        return False
    return all(tolerates(shape.tolerations, taint) for taint in node.taints)


def is_met(has: str, wanted: str) -> bool:
    """Whether a label that a node ``has`` is one that is ``wanted``. Either may name several: ``a|b``."""
    return not set(has.split("|")).isdisjoint(wanted.split("|"))


def tolerates(tolerations: tuple[str, ...], taint: str) -> bool:
    """Whether one of the tolerations, ``key`` or ``key=value``, puts up with a taint."""
    return any(taint == each or taint.partition("=")[0] == each for each in tolerations)


def workers_that_fit(
    fleet: FleetArrays,
    shape: Shape,
    *,
    empty: bool = False,
    free: Free | None = None,
    mask: NDArray[np.bool_] | None = None,
    all_ready: bool = False,
) -> Ints:
    """How many workers of a shape fit on each node. Shape (N,).

    With ``empty``, as if nothing ran and every node were ready: what the fleet could ever hold. ``free`` is what to
    look at instead of what is free now; ``mask`` leaves nodes out, ``all_ready`` leaves none out for its state.
    """
    resources, static = shape.resources, fitting(fleet, shape)
    if empty:
        free = fleet.empty()
    elif free is None:
        free = fleet.free()
    fits = np.maximum(free.cpu, 0) // resources.cpu_milli
    if resources.memory_bytes:
        fits = np.minimum(fits, np.maximum(free.memory, 0) // resources.memory_bytes)
    if resources.gpus is not None:
        if free is fleet.empty():
            by_gpu = _workers_by_gpu_at_most(fleet, static, resources.gpus)
        else:
            by_gpu = workers_by_gpu(free, static, resources.gpus)
        fits = np.minimum(fits, by_gpu)
    fits = np.where(static.nodes, fits, 0)
    if mask is not None:
        fits = np.where(mask, fits, 0)
    return fits if empty or all_ready else np.where(fleet.is_ready, fits, 0)


def workers_that_fit_on(fleet: FleetArrays, shape: Shape, rows: Ints, *, less: Free | None = None) -> Ints:
    """How many workers of a shape fit now on each of some nodes, or would with so much ``less`` there. Shape (R,)."""
    resources, static, free = shape.resources, fitting(fleet, shape), fleet.free()
    some = Free(free.cpu[rows], free.memory[rows], free.gpu[rows], free.mig[rows] if static.size else free.mig)
    if less is not None:
        some = Free(some.cpu - less.cpu, some.memory - less.memory, some.gpu - less.gpu, some.mig)
    fits: Ints = np.maximum(some.cpu, 0) // resources.cpu_milli
    if resources.memory_bytes:
        fits = np.minimum(fits, np.maximum(some.memory, 0) // resources.memory_bytes)
    if resources.gpus is not None:
        fits = np.minimum(fits, workers_by_gpu(some, static.at(rows), resources.gpus))
    return np.where(static.nodes[rows] & fleet.is_ready[rows], fits, 0)


def _workers_by_gpu_at_most(fleet: FleetArrays, static: Fitting, request: GpuRequest) -> Ints:
    """How many workers each node's GPUs alone would serve if nothing ran, whatever else a worker needs. Shape (N,)."""
    known: Ints | None = fleet.cache.get(("at most", request))
    if known is None:
        known = fleet.cache["at most", request] = workers_by_gpu(fleet.empty(), static, request)
    return known


def workers_by_gpu(free: Free, static: Fitting, request: GpuRequest) -> Ints:
    """How many workers each node's GPUs alone would serve. Shape (N,)."""
    if request.profile:
        slices: Ints = places_for_slices(free, static).sum(axis=1) // request.count
        return slices
    if request.is_whole:
        whole: Ints = (static.devices & (free.gpu == MILLI)).sum(axis=1) // request.count
        return whole
    shares: Ints = (np.maximum(free.gpu, 0) // static.milli).sum(axis=1)
    return shares


def places_for_slices(free: Free, static: Fitting) -> Ints:
    """How many slices of a profile each device still has room for. Shape (N, D)."""
    ready_made = static.devices & (free.gpu == MILLI) & ~static.starts.any(axis=2)
    places: Ints = ready_made.astype(np.int64)
    if static.size:
        cut = free_starts(free.mig, static).sum(axis=2)
        places += np.minimum(cut, 1) if static.has_media else cut
    return places


def free_starts(mig: Ints, static: Fitting) -> NDArray[np.bool_]:
    """Where a slice of the profile could begin now. Shape (..., 9)."""
    is_free: NDArray[np.bool_] = mig == 0
    room: NDArray[np.bool_] = is_free.copy()
    for step in range(1, static.size):
        room[..., :-step] &= is_free[..., step:]
        room[..., -step:] = False
    room &= static.starts
    if static.has_media:
        room &= is_free[..., MEDIA:]
    return room


def take_slice(mig: Ints, start: int, static: Fitting) -> None:
    """Take a slice of the profile on one device, in place. Shape (9,)."""
    mig[start : start + static.size] += 1
    if static.has_media:
        mig[MEDIA] += 1
