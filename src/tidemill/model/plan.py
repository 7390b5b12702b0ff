"""What a turn returns: changes, commands, usage, reasons, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct

from tidemill.model.cloud import Rental
from tidemill.model.events import LogEntry
from tidemill.model.fleet import DeliveryMark, Node
from tidemill.model.ids import JobId, LaunchId, NodeId, ProjectId
from tidemill.model.job import Allocation, Attempt, Job, Workload
from tidemill.model.ledger import Ledger
from tidemill.model.queue import Queue, QueueUsage
from tidemill.model.registry import Model, ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.model.spec import Environment, Port, Service
from tidemill.model.storage import DataMount, VolumeMount


class ResolvableBy(StrEnum):
    """What would turn a "no" into a "yes"."""

    PREEMPTION = "preemption"
    TIME = "time"
    CAPACITY = "capacity"
    POLICY = "policy"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """An expected "no" as a value: what is missing, how much is needed, how much there is.

    ``code`` is a why-not phrase (``NotEnoughFreeGpus``), ``subject`` what it is about, ``sentence`` what a
    person reads. ``needed`` and ``available`` are text with units.
    """

    code: str
    subject: str
    needed: str
    available: str
    resolvable_by: ResolvableBy
    sentence: str


class Change(Struct, frozen=True, kw_only=True, gc=False):
    """A new value of one thing, and the version of it that the turn assumed (None: it did not exist)."""

    assumed: int | None
    after: (
        Workload
        | Job
        | Attempt
        | Allocation
        | Node
        | DeliveryMark
        | Queue
        | QueueUsage
        | Reservation
        | Rental
        | Rollout
        | Model
        | ModelVersion
    )


class Launch(Struct, frozen=True, kw_only=True, gc=False):
    """Start a worker on its node; the shell makes the engine's ``LaunchSpec`` from the stored values."""

    launch_id: LaunchId
    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Stop a worker: signal, wait for ``grace_ns``, kill. Nothing to do when it is gone already."""

    launch_id: LaunchId
    node_id: NodeId
    grace_ns: int


class Forget(Struct, frozen=True, kw_only=True, gc=False):
    """Clean up after a launch that is recorded as released: nothing of it may run."""

    launch_id: LaunchId
    node_id: NodeId


Command = Launch | Stop | Forget


class Waiting(Struct, frozen=True, kw_only=True, gc=False):
    """Why a job waits."""

    job_id: JobId
    reason: Reason


class Plan(Struct, frozen=True, kw_only=True, gc=False):
    """All that one turn decided. ``wake_ns`` is when something could change by itself; zero: never.

    ``waiting`` lists only jobs whose reason changed; jobs that stopped waiting are not in it.
    """

    changes: tuple[Change, ...] = ()
    log: tuple[LogEntry, ...] = ()
    ledger: Ledger = Ledger()
    waiting: tuple[Waiting, ...] = ()
    commands: tuple[Command, ...] = ()
    wake_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GangPlace:
    """What one worker of a gang holds, and where."""

    node_id: NodeId
    cpu_milli: int
    gpu_milli: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """All that an engine and a runner need to start one worker; the id makes it idempotent.

    ``environment_variables`` are complete but for what only the machine knows (folders, CUDA_VISIBLE_DEVICES
    names). ``workdir`` and ``inputs`` are SHA-256 digests of stored archives. ``secrets`` are names; the
    runner asks the control plane for the values, so they are on no disk. Ports are already chosen.
    Tokens: ``runner_token`` reports, ``job_token`` is given to the worker. ``lease_ns`` is how long the worker runs on
    without a word from the control plane; zero: for ever. ``gang`` is what each rank holds and where, for a gang only.
    ``data`` has a ``home`` only where that is a folder of this very node. ``slurm`` is what Slurm is told when it is
    submitted there: ``partition``, ``account``, ``qos``.
    """

    launch_id: LaunchId
    job_id: JobId
    project_id: ProjectId
    node_id: NodeId
    fence: int
    rank: int
    world_size: int
    setup: str
    run: str
    environment: Environment | None
    image: str
    environment_variables: tuple[tuple[str, str], ...]
    secrets: tuple[str, ...]
    workdir: str
    inputs: tuple[tuple[str, str], ...]
    devices: tuple[tuple[str, int], ...]
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    ports: tuple[Port, ...]
    service: Service | None
    rendezvous_port: int
    max_duration_ns: int
    grace_ns: int
    api_url: str
    runner_token: str
    job_token: str
    lease_ns: int = 0
    gang: tuple[GangPlace, ...] = ()
    data: tuple[DataMount, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    slurm: tuple[tuple[str, str], ...] = ()


class ObservedState(StrEnum):
    """What an engine sees of a launch."""

    ALIVE = "alive"
    """The runner or some process of the worker is there."""
    EXITED = "exited"
    """All is gone, and the runner wrote down how the worker ended."""
    GONE = "gone"
    """All is gone, without a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an engine's own list says of one launch on that node."""

    launch_id: LaunchId
    node_id: NodeId
    state: ObservedState
    exit_code: int | None = None
    cause: str = ""
    detail: str = ""
    cpu_used_ns: int = 0
    ended_ns: int = 0
    scheduler: tuple[tuple[str, str], ...] = ()
    """How it ended by the words of the site's own scheduler: ``state``, ``exit``, ``nodes``, … as far as told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What an engine sees when it looks: the launches on the nodes that it could look at.

    Of a node that is not in ``nodes`` nothing is said, and nothing may be concluded: it could not be reached.
    """

    nodes: frozenset[NodeId]
    launches: tuple[Observation, ...] = ()
    cached: tuple[tuple[NodeId, tuple[str, ...]], ...] = ()
    """The data sets of which a node has a copy, as ``project/manifest``, of nodes that tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """When a waiting job would start, in ns, found by running the same turns forward on a copy of the world.

    ``likely_ns`` is with what jobs say, and assumed, about how long they take; ``earliest_ns`` when those that do not
    say end soon, ``latest_ns`` when all take as long as they may. Zero: not within the horizon. ``basis`` says in words
    what it rests on.
    """

    earliest_ns: int
    likely_ns: int
    latest_ns: int
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Who holds what a waiting job needs. ``ends_ns`` is when at the latest, zero when nothing bounds it."""

    job_id: JobId
    name: str
    project: str
    amount: str
    ends_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A nearby spec and what it would give. ``change`` says in the spec's own words what is different."""

    change: str
    starts_ns: int
    finish_ns: int
    amount_micro: int
    energy_mj: int
    carbon_mg: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOption:
    """How a job would be at one site. ``reason`` is why it is not put there now; None: nothing stands in its way.

    ``rank`` counts from 1 in the order in which sites are tried, equally good ones alike; zero: it is never put there.
    ``starts_ns`` zero: not known. ``latency_ns`` is from the site that the spec is near to; None: not asked, or no link
    is known.
    """

    site: str
    rank: int = 0
    reason: Reason | None = None
    starts_ns: int = 0
    copy_ns: int = 0
    amount_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0
    latency_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The answer before submitting. Amounts are for ``duration_ns`` of running, and are estimates.

    ``forecast`` is None when it starts now or never would. ``finish_ns`` zero: not known.
    """

    feasible: bool
    starts_now: bool
    duration_ns: int
    duration_known: bool
    amount_micro: int
    energy_mj: int
    carbon_mg: int
    placement: tuple[tuple[str, str], ...] = ()
    """For each worker: node and what it would hold there."""
    reasons: tuple[Reason, ...] = ()
    suggestions: tuple[str, ...] = ()
    forecast: Forecast | None = None
    finish_ns: int = 0
    options: tuple[Option, ...] = ()
    displaces: tuple[JobId, ...] = ()
    """Jobs that would be displaced for it."""
    copy_ns: int = 0
    """How long its data takes to be copied to where it would be; with what it costs to hold machines meanwhile, and
    what is paid for data that leaves its home, this is in the amount, and in ``finish_ns``."""
    copy_bytes: int = 0
    sites: tuple[SiteOption, ...] = ()
    """How it would be at each site, best first; empty where there is one site only."""
    rate_card: str = ""
    carbon_source: str = ""
