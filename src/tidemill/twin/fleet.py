"""Fleets in a few words: ``64xH100:8,4xcpu:64``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tidemill.catalog import DeviceSpec, cpu_power, derived_device, devices, matches_request, nearest_names
from tidemill.errors import InvalidRequest
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.twin.cloud import SITE
from tidemill.units import MILLI, parse_size

GIB: Final = 1024**3
MEND: Final = (
    "Write COUNTxMODEL:GPUS[:CORES[:MEMORY]] such as 64xH100:8 or 8xA100:4:96:1TB, COUNTxcpu:CORES for machines without"
    " GPUs, several separated by commas."
)
CORES_PER_GPU: Final = 16
MEMORY_PER_GPU: Final = 128 * GIB
"""What a machine has for each of its GPUs when nothing else is said."""
NODES_PER_RACK: Final = 4
RACKS_PER_BLOCK: Final = 16
_KIND: Final = re.compile(
    r"(?P<count>\d+)\s*x\s*(?P<model>[A-Za-z][\w .-]*?)(?::(?P<size>\d+))?"
    r"(?::(?P<cores>\d+))?(?::(?P<memory>[\d.]+\s*[KMGTP]i?B?))?",
    re.IGNORECASE,
)
_MOST: Final = 200_000


def parse_fleet(text: str, *, field: str = "--nodes", first: int = 0) -> tuple[Node, ...]:
    """The machines in words such as ``64xH100:8``; numbered from ``first``, four to a rack.

    Raises: InvalidRequest that names ``field``, the value and what is accepted.

    >>> [len(node.devices) for node in parse_fleet("2xH100:8,1xcpu:64")]
    [8, 8, 0]
    """
    nodes: list[Node] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _KIND.fullmatch(part)
        if match is None:
            raise InvalidRequest(f"{part!r} is not a group of machines.", field=field, value=text, mend=MEND)
        count, size = int(match["count"]), int(match["size"] or 0)
        if not 1 <= count <= _MOST:
            raise InvalidRequest(f"{count} machines cannot be had.", field=field, value=text, mend=f"1 to {_MOST}.")
        is_cpu = match["model"].lower() == "cpu"
        if not size or (not is_cpu and size > 64):
            what = "cores" if is_cpu else "GPUs"
            raise InvalidRequest(f"{part!r} does not say how many {what} each has.", field=field, value=text, mend=MEND)
        device = None if is_cpu else _device(match["model"], field, text)
        gpus = 0 if is_cpu else size
        cores = size if is_cpu else int(match["cores"] or CORES_PER_GPU * gpus)
        memory = (
            parse_size(match["memory"]) if match["memory"] else (4 * GIB * cores if is_cpu else MEMORY_PER_GPU * gpus)
        )
        start = first + len(nodes)
        nodes += (
            make_node(start + index, device, gpus, cpu_milli=cores * MILLI, memory_bytes=memory)
            for index in range(count)
        )
    if not nodes:
        raise InvalidRequest("There are no machines.", field=field, value=text, mend=MEND)
    return tuple(nodes)


def make_node(
    index: int, device: DeviceSpec | None, gpus: int, *, cpu_milli: int, memory_bytes: int, name: str = ""
) -> Node:
    """One machine with so many of a device."""
    idle_mw, busy_mw = cpu_power()
    identity = name or f"n{index:05d}"
    rack = index // NODES_PER_RACK
    return Node(
        id=NodeId(identity),
        site_id=SiteId(SITE.id),
        name=identity,
        state=NodeState.READY,
        version=1,
        boot_id="twin",
        address=identity,
        cpu_milli=cpu_milli,
        memory_bytes=memory_bytes,
        disk_bytes=1 << 50,
        cpu_idle_mw=idle_mw,
        cpu_busy_mw=busy_mw,
        images=True,
        rack=f"r{rack:05d}",
        block=f"b{rack // RACKS_PER_BLOCK:04d}",
        devices=tuple(
            Device(
                id=DeviceId(f"{identity}-g{number}"),
                index=number,
                model=device.model,
                reported=device.model,
                memory_bytes=device.memory_bytes,
                idle_mw=device.idle_mw,
                busy_mw=device.busy_mw,
            )
            for number in range(gpus if device is not None else 0)
            if device is not None
        ),
    )


def find_device(name: str) -> DeviceSpec | None:
    """The catalog's first model that answers to a name; None when none does."""
    return next((spec for spec in devices() if matches_request(spec.model, name)), None)


def unknown_device(name: str) -> DeviceSpec:
    """A model that the catalog does not have: 24 GB is assumed, power and price are not known."""
    return derived_device(name, 24 * GIB)


def describe(nodes: Iterable[Node]) -> str:
    """A fleet in the words that ``parse_fleet`` reads."""
    groups: dict[str, int] = {}
    for node in nodes:
        kind = f"{node.devices[0].model}:{len(node.devices)}" if node.devices else f"cpu:{node.cpu_milli // MILLI}"
        groups[kind] = groups.get(kind, 0) + 1
    return ",".join(f"{count}x{kind}" for kind, count in groups.items())


def _device(name: str, field: str, text: str) -> DeviceSpec:
    found = find_device(name)
    if found is None:
        near = nearest_names(name)
        hint = f"Did you mean {', '.join(near)}? " if near else ""
        raise InvalidRequest(f"There is no GPU model {name!r}.", field=field, value=text, mend=hint + MEND)
    return found
