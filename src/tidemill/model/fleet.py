"""Sites, nodes and devices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.units import MILLI


class SiteKind(StrEnum):
    """Where a site's machines stand."""

    ONPREM = "onprem"
    CLOUD = "cloud"
    EDGE = "edge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place with one jurisdiction, one engine, one electricity tariff and one carbon profile.

    ``country`` is ISO 3166 alpha-3, empty when unknown; ``pue_milli`` is facility power over IT power in
    thousandths; ``carbon_mg_per_kwh`` is the grid's intensity and ``carbon_source`` says where it is from.
    """

    id: SiteId
    name: str
    kind: SiteKind
    engine: str
    country: str = ""
    pue_milli: int = 1_000
    carbon_mg_per_kwh: int = 0
    carbon_source: str = ""

    def __post_init__(self) -> None:
        if self.pue_milli < 1_000:
            raise ValueError("PUE is total power over IT power and cannot be below 1.0")
        if self.carbon_mg_per_kwh < 0:
            raise ValueError("carbon intensity cannot be below zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator. ``model`` is the catalog's name (``H100-SXM``), ``reported`` the driver's own.

    ``memory_bytes`` is the nominal size. ``idle_mw`` and ``busy_mw`` are milliwatts, used where power
    cannot be measured.
    """

    id: DeviceId
    index: int
    model: str
    reported: str
    memory_bytes: int
    idle_mw: int
    busy_mw: int


class NodeState(StrEnum):
    """What may be placed on a node; the transitions are in ``core.lifecycle``."""

    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: what it has in all, not what is free.

    ``cpu_milli`` is what jobs may hold. ``boot_id`` changes when the machine reboots. ``cpu_idle_mw`` and
    ``cpu_busy_mw`` are milliwatts per core, for when power cannot be measured. ``images`` says whether the
    node can run container images. ``address`` is how other nodes reach it.
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

    def __post_init__(self) -> None:
        if self.cpu_milli <= 0 or self.memory_bytes <= 0:
            raise ValueError("a node has some CPU and some memory")
        if len({device.id for device in self.devices}) != len(self.devices):
            raise ValueError("two devices of a node have the same id")

    @property
    def gpu_milli(self) -> int:
        """All GPUs of the node in thousandths."""
        return len(self.devices) * MILLI
