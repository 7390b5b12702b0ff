"""Instances that a cloud rents out, and what is kept of those that were rented.

An *offer* is what could be rented, an *instance* what the cloud says is there, a *rental* what we wrote down about one
instance: first that it is wanted, before the cloud is asked. Money is micro-USD, time ns, memory bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tidemill.model.ids import JobId, NodeId, RentalId, SiteId


class Market(StrEnum):
    """On which terms an instance is rented."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"
    """Cheaper, and the cloud may take it back at any time, with a short notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A type of instance that can be rented in one zone on one market.

    ``gpu_model`` is the catalog's name, empty without GPUs; ``gpu_memory_bytes`` is that of one GPU.
    ``price_micro_per_hour`` is what it costs now, ``most_micro_per_hour`` what it may come to cost: ceilings count
    with the latter. ``labels`` are those that its machine would have as a node (``region``, ``zone``, ``country``, …).
    """

    id: str
    instance_type: str
    region: str
    zone: str
    market: Market
    cpu_milli: int
    memory_bytes: int
    price_micro_per_hour: int
    most_micro_per_hour: int
    gpu_model: str = ""
    gpu_count: int = 0
    gpu_memory_bytes: int = 0
    disk_bytes: int = 0
    labels: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.cpu_milli <= 0 or self.memory_bytes <= 0 or self.gpu_count < 0:
            raise ValueError("an offer has some CPU, some memory, and no GPUs or some")
        if not 0 < self.price_micro_per_hour <= self.most_micro_per_hour:
            raise ValueError("an offer has a price above zero, and the most that it may cost is no less")


@dataclass(frozen=True, slots=True, kw_only=True)
class Billing:
    """How time is charged: in whole units of ``granularity_ns``, and for ``minimum_ns`` at least."""

    granularity_ns: int
    minimum_ns: int = 0

    def __post_init__(self) -> None:
        if self.granularity_ns <= 0 or self.minimum_ns < 0:
            raise ValueError("time is charged in units longer than nothing, and a minimum is zero or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionRequest:
    """One instance to be rented. The same ``client_token`` always comes with the same request.

    ``tags`` are put on the instance beside those of the provisioner's own. ``user_data`` is the script that the machine
    runs when it boots; the only secret in it is a token for that one machine to join with.
    """

    client_token: str
    offer: Offer
    site: str
    node_name: str
    user_data: str
    tags: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        """Without the script, which has a token in it."""
        return f"ProvisionRequest({self.client_token}, {self.offer.id}, {self.site}/{self.node_name})"


class InstanceState(StrEnum):
    """Where an instance is in its life, as the cloud sees it."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"
    """It does not run, or soon will not, and still is there."""
    ENDING = "ending"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What the cloud's own list says of one instance that carries our installation's tag.

    ``client_token``, ``site`` and ``node_name`` are from its tags, empty when they are missing there. ``detail`` is
    what the cloud says of why it ended.
    """

    id: str
    state: InstanceState
    instance_type: str
    zone: str
    market: Market
    launched_ns: int
    client_token: str = ""
    site: str = ""
    node_name: str = ""
    address: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCapacity:
    """The cloud has none of these now: an expected "no", after which the next offer is tried."""

    offer_id: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterruptionNotice:
    """The cloud will take an instance back at ``ends_ns``."""

    instance_id: str
    ends_ns: int
    detail: str = ""


class RentalState(StrEnum):
    """Where a rental is in its life; the transitions are in ``core.lifecycle``."""

    WANTED = "wanted"
    """Written down; the cloud may or may not have been asked."""
    BOOTING = "booting"
    """The cloud has the instance; its machine has not joined."""
    JOINED = "joined"
    """Its machine is a node."""
    LEAVING = "leaving"
    """To be ended; the cloud is told until its list has it no more."""
    OVER = "over"
    """The cloud confirms that it is gone, or that there never was one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rental:
    """One instance that we wanted. Its ``id`` is the client token under which the cloud is asked for it.

    ``scope`` names the account and region that were asked. ``jobs`` are those that it was rented for. ``expires_ns`` is
    when the machine's token to join with ends. ``instance_id`` and ``launched_ns`` are empty until the cloud names
    them, ``node_id`` until the machine joined. ``cause`` says why it is to end, or ended; with one a joined machine
    gets nothing new. ``cost_micro`` is what it cost, once it is over.
    """

    id: RentalId
    site_id: SiteId
    scope: str
    offer: Offer
    node_name: str
    state: RentalState
    version: int
    created_ns: int
    expires_ns: int
    jobs: tuple[JobId, ...] = ()
    instance_id: str = ""
    launched_ns: int = 0
    node_id: NodeId = NodeId("")
    joined_ns: int = 0
    cause: str = ""
    ended_ns: int = 0
    cost_micro: int = 0
