"""Sites, nodes and devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tidemill.model.ids import DeviceId, NodeId, OutpostId, SiteId
from tidemill.units import MILLI

HOURS_OF_DAY: Final = 24
SPOT_TAINT: Final = "market=spot"
"""Of rented machines that the cloud may take back: only work tolerates it that may be displaced."""


class SiteKind(StrEnum):
    """Where a site's machines stand."""

    ONPREM = "onprem"
    CLOUD = "cloud"
    EDGE = "edge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way from one site to another, and back: how long a packet takes there and back, and how much gets through.

    ``bits_per_s`` zero: not known.
    """

    to: SiteId
    latency_ns: int
    bits_per_s: int = 0

    def __post_init__(self) -> None:
        if self.latency_ns < 0 or self.bits_per_s < 0:
            raise ValueError("a link's latency and bandwidth are zero or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place with one jurisdiction, one engine, one electricity tariff and one carbon profile.

    ``country`` is ISO 3166 alpha-3, empty when unknown; ``pue_milli`` is facility power over IT power in
    thousandths; ``carbon_mg_per_kwh`` is the grid's intensity and ``carbon_source`` says where it is from.

    ``lease_ns`` is how long a worker there runs on without a word from the control plane, and then ends itself, so that
    it may be started elsewhere. Zero: for ever, and then nothing of a site that cannot be reached is started again.

    ``prices`` are micro-USD for an hour of a resource where they differ from the installation's rate card, and
    ``tariff_micro_per_kwh`` is charged on top for the electricity that work takes; zero: it is in the prices.
    ``carbon_hours`` are 24 intensities, by hour of the day in UTC; empty: it is ``carbon_mg_per_kwh`` all day.
    """

    id: SiteId
    name: str
    kind: SiteKind
    engine: str
    country: str = ""
    pue_milli: int = 1_000
    carbon_mg_per_kwh: int = 0
    carbon_source: str = ""
    lease_ns: int = 0
    prices: tuple[tuple[str, int], ...] = ()
    tariff_micro_per_kwh: int = 0
    carbon_hours: tuple[int, ...] = ()
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if self.tariff_micro_per_kwh < 0 or any(micro < 0 for _, micro in self.prices):
            raise ValueError("prices and tariffs are zero or more")
        if len(self.carbon_hours) not in (0, HOURS_OF_DAY) or any(each < 0 for each in self.carbon_hours):
            raise ValueError("carbon by the hour is 24 intensities, each zero or more")
        if len({link.to for link in self.links}) != len(self.links) or any(link.to == self.id for link in self.links):
            raise ValueError("a site has one link at most to each other site")
        if self.lease_ns < 0:
            raise ValueError("a lease cannot be shorter than nothing")
        if self.pue_milli < 1_000:
            raise ValueError("PUE is total power over IT power and cannot be below 1.0")
        if self.carbon_mg_per_kwh < 0:
            raise ValueError("carbon intensity cannot be below zero")


def link_between(sites: Mapping[SiteId, Site], one: SiteId, other: SiteId) -> Link | None:
    """The link between two sites, whichever of them has it; None when none is known."""
    for here, there in ((one, other), (other, one)):
        site = sites.get(here)
        for link in site.links if site is not None else ():
            if link.to == there:
                return link
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outpost:
    """A process at a site that dials out to the control plane and works an engine there for it.

    ``removed_ns`` zero: it belongs to the cloud.
    """

    id: OutpostId
    site_id: SiteId
    name: str
    engine: str
    created_ns: int
    removed_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryMark:
    """Up to which number what an outpost brought was taken; stored with what followed from it."""

    id: OutpostId
    version: int
    number: int


class Mig(StrEnum):
    """How a device is cut into slices."""

    OFF = "off"
    FIXED = "fixed"
    """It has the slices that it has."""
    DYNAMIC = "dynamic"
    """Slices may be made and unmade, as far as the device's geometry allows."""


class Level(StrEnum):
    """Levels of topology, widest first."""

    SITE = "site"
    BLOCK = "block"
    RACK = "rack"
    HOST = "host"
    NVLINK = "nvlink"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator. ``model`` is the catalog's name (``H100-SXM``), ``reported`` the driver's own.

    ``memory_bytes`` is the nominal size. ``idle_mw`` and ``busy_mw`` are milliwatts, used where power
    cannot be measured. ``island`` numbers the NVLink domain in its node; devices of one island reach each other
    fast. ``mig`` says whether it is cut into MIG slices; ``slices`` are those it has when they are fixed, as
    ``(profile, first memory slice, the driver's name)``.
    """

    id: DeviceId
    index: int
    model: str
    reported: str
    memory_bytes: int
    idle_mw: int
    busy_mw: int
    island: int = 0
    mig: Mig = Mig.OFF
    slices: tuple[tuple[str, int, str], ...] = ()


class NodeState(StrEnum):
    """What may be placed on a node; the transitions are in ``core.lifecycle``."""

    READY = "ready"
    CORDONED = "cordoned"
    """What runs goes on, nothing new is placed."""
    DRAINING = "draining"
    """What runs is stopped with its checkpoint grace and queues again; nothing new is placed."""
    SUSPECT = "suspect"
    """It came back after it was lost too often; nothing is placed until ``held_until_ns``."""
    SILENT = "silent"
    """Nothing is heard of it. What runs there may run on; nothing new is placed, and nothing is started elsewhere."""
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: what it has in all, not what is free.

    ``cpu_milli`` is what jobs may hold. ``boot_id`` changes when the machine reboots. ``cpu_idle_mw`` and
    ``cpu_busy_mw`` are milliwatts per core, for when power cannot be measured. ``images`` says whether the
    node can run container images. ``address`` is how other nodes reach it.

    ``block`` and ``rack`` say where it stands; empty: not known, and then it is a block or rack of its own.
    ``taints`` keep work away that does not tolerate them. ``failing`` lists devices that nothing is placed on, with
    what they fail of. ``state_cause`` says why the node is in its state; ``marking`` is the ``cordon`` or ``drain``
    that stands, also while the node is lost. ``lost_at_ns`` remembers when it was lost lately, ``held_until_ns``
    until when it is held back for that. ``others_`` is what work holds there that another scheduler than ours started.
    """

    id: NodeId
    site_id: SiteId
    name: str
    state: NodeState
    version: int
    boot_id: str
    address: str
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    cpu_model: str = ""
    cpu_idle_mw: int = 0
    cpu_busy_mw: int = 0
    images: bool = False
    devices: tuple[Device, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    joined_ns: int = 0
    block: str = ""
    rack: str = ""
    taints: tuple[str, ...] = ()
    failing: tuple[tuple[DeviceId, str], ...] = ()
    state_cause: str = ""
    marking: str = ""
    lost_at_ns: tuple[int, ...] = ()
    held_until_ns: int = 0
    others_cpu_milli: int = 0
    others_memory_bytes: int = 0
    others_gpus: int = 0

    def __post_init__(self) -> None:
        if self.cpu_milli <= 0 or self.memory_bytes <= 0:
            raise ValueError("a node has some CPU and some memory")
        if len({device.id for device in self.devices}) != len(self.devices):
            raise ValueError("two devices of a node have the same id")

    @property
    def gpu_milli(self) -> int:
        """All GPUs of the node in thousandths."""
        return len(self.devices) * MILLI

    @property
    def has_others(self) -> bool:
        """Whether work that is not this cloud's holds something there."""
        return bool(self.others_cpu_milli or self.others_memory_bytes or self.others_gpus)
