"""Facts, in the past tense: what happened, when, to what. Times are ns since 1970.

The control plane's shells put them in the inbox of a turn; the turn applies them and adds what it decided.
What they led to is in the event log.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct

from tidemill.model.fleet import Node, Site
from tidemill.model.ids import DeviceId, JobId, LaunchId, NodeId, OutpostId, ReservationId, RolloutId, WorkloadId
from tidemill.model.job import AllocationState, Cause, Workload
from tidemill.model.queue import Queue
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout, RolloutState
from tidemill.model.tenant import Project


class Submitted(Struct, frozen=True, kw_only=True, gc=False):
    """A workload was submitted; its jobs follow from its spec."""

    at_ns: int
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """Somebody asked that a job end."""

    at_ns: int
    job_id: JobId
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A service was found to need ``wanted`` replicas; those in ``give_up`` have nothing under way and are to end."""

    at_ns: int
    workload_id: WorkloadId
    wanted: int
    why: str = ""
    give_up: tuple[JobId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBegan:
    """A service is to be brought to another revision, which is this workload."""

    at_ns: int
    rollout: Rollout
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutMoved:
    """Something happened to a rollout that is in this state and, of a canary, at this step: ``event`` of its table.

    ``by`` is who asked for it; empty: nobody had to.
    """

    at_ns: int
    rollout_id: RolloutId
    state: RolloutState
    step: int
    event: str
    detail: str = ""
    by: str = ""


class Prepared(Struct, frozen=True, kw_only=True, gc=False):
    """A launch's runner is there and prepares the worker's environment."""

    at_ns: int
    launch_id: LaunchId
    fence: int


class Started(Struct, frozen=True, kw_only=True, gc=False):
    """A worker's process runs. ``isolation`` lists what it really has, as ``name=value``."""

    at_ns: int
    launch_id: LaunchId
    fence: int
    isolation: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Became:
    """A service's worker became ready (or not) at ``endpoint``, ``host:port``."""

    at_ns: int
    launch_id: LaunchId
    fence: int
    ready: bool
    endpoint: str = ""


class Exited(Struct, frozen=True, kw_only=True, gc=False):
    """A worker ended and is gone. ``cause`` says why when it is not its own exit status.

    ``cpu_used_ns`` is the CPU time it used in all.
    """

    at_ns: int
    launch_id: LaunchId
    fence: int
    exit_code: int
    cause: Cause = Cause.NONE
    detail: str = ""
    cpu_used_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRefused:
    """The engine refused to start a worker; it does not run."""

    at_ns: int
    launch_id: LaunchId
    fence: int
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vanished:
    """The engine confirms that nothing of a launch is left, though no exit was reported.

    ``exit_code``, ``cause`` and ``scheduler`` are what the site's own scheduler says of its end, if it does.
    """

    at_ns: int
    launch_id: LaunchId
    fence: int
    detail: str = ""
    exit_code: int | None = None
    cause: Cause = Cause.NODE_LOST
    cpu_used_ns: int = 0
    scheduler: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NeverLaunched:
    """The engine's own list does not have a launch, and no command about it is on its way.

    ``state`` is the allocation's as it was when it was looked for; None: as it is when this is taken.
    """

    at_ns: int
    launch_id: LaunchId
    fence: int
    state: AllocationState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Cumulative energy counters of a node were read: ``(meter, mJ)``.

    A meter is a device id, or ``cpu`` for the processors. Meters that cannot be read are left out. ``use_milli`` is
    for how many thousandths of the last moments devices were busy, as far as they say.
    """

    at_ns: int
    node_id: NodeId
    energy_mj: tuple[tuple[str, int], ...]
    use_milli: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetersRead:
    """Somebody wants the books of a job to be up to date now."""

    at_ns: int
    job_id: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    """A machine is there, for the first time or again after a restart or with other devices."""

    at_ns: int
    node: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWentAway:
    """The engine lost a machine and knows that nothing of ours runs there any more."""

    at_ns: int
    node_id: NodeId
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFellSilent:
    """Nothing was heard of a machine for a while. Whether anything runs there is not known."""

    at_ns: int
    node_id: NodeId
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesSeen:
    """A node has copies of these data sets, as ``project/manifest``, and of no others."""

    at_ns: int
    node_id: NodeId
    cached: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSet:
    """A site is as given from now on."""

    at_ns: int
    site: Site


class Checkpointed(Struct, frozen=True, kw_only=True, gc=False):
    """A worker's job wrote a checkpoint: what it did until ``at_ns`` is not lost if it is displaced now."""

    at_ns: int
    launch_id: LaunchId
    fence: int
    detail: str = ""


class Marking(StrEnum):
    """What somebody wants of a node."""

    CORDON = "cordon"
    DRAIN = "drain"
    RESUME = "resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMarked:
    """Somebody cordoned, drained or resumed a node. Resuming also clears what its devices were failing of.

    ``until_ns`` is when the machine goes, whatever runs there then: a drain leaves no job a longer grace. Zero: it
    stays.
    """

    at_ns: int
    node_id: NodeId
    marking: Marking
    by: str = ""
    detail: str = ""
    until_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFailed:
    """A device fails (an XID, ECC errors, heat); nothing new is placed on it until it recovers."""

    at_ns: int
    node_id: NodeId
    device_id: DeviceId
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecovered:
    """A failing device passed its recheck."""

    at_ns: int
    node_id: NodeId
    device_id: DeviceId


Brought = Sampled | NodeMarked | DeviceFailed | DeviceRecovered
"""What an outpost has to tell of its machines by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """An outpost brought what it had kept until it could be told. Each fact has a number, and those up to the last
    one that was taken before are passed over.

    ``numbers`` are those of ``sampled``, then ``failed``, ``recovered`` and ``marked``. ``last`` is the highest that
    was brought, whatever became of it.
    """

    at_ns: int
    outpost_id: OutpostId
    last: int
    numbers: tuple[int, ...] = ()
    sampled: tuple[Sampled, ...] = ()
    failed: tuple[DeviceFailed, ...] = ()
    recovered: tuple[DeviceRecovered, ...] = ()
    marked: tuple[NodeMarked, ...] = ()

    def after(self, number: int) -> tuple[Brought, ...]:
        """The facts with higher numbers, by number."""
        facts: tuple[Brought, ...] = (*self.sampled, *self.failed, *self.recovered, *self.marked)
        numbered = sorted(zip(self.numbers, facts, strict=True), key=lambda each: each[0])
        return tuple(fact for at, fact in numbered if at > number)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSet:
    """A place in the quota tree is as given from now on; ``version`` is ignored."""

    at_ns: int
    queue: Queue


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectOpened:
    """A project exists."""

    at_ns: int
    project: Project


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPolicySet:
    """Somebody said what a project lets into its models."""

    at_ns: int
    project: Project
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationMade:
    """Nodes are reserved as given; ``version`` is ignored."""

    at_ns: int
    reservation: Reservation


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationCancelled:
    """A reservation does not stand any more."""

    at_ns: int
    reservation_id: ReservationId


Fact = (
    Submitted
    | StopRequested
    | Scaled
    | RolloutBegan
    | RolloutMoved
    | Prepared
    | Started
    | Became
    | Exited
    | LaunchRefused
    | Vanished
    | NeverLaunched
    | Sampled
    | MetersRead
    | NodeJoined
    | NodeWentAway
    | NodeFellSilent
    | SiteSet
    | CopiesSeen
    | Checkpointed
    | NodeMarked
    | DeviceFailed
    | DeviceRecovered
    | Delivered
    | QueueSet
    | ProjectOpened
    | ModelPolicySet
    | ReservationMade
    | ReservationCancelled
)


class LogEntry(Struct, frozen=True, kw_only=True, gc=False):
    """One line of the append-only event log, as the turn produces it; the store adds the sequence number.

    ``type`` is the event's name in past tense, ``body`` what there is to know, in plain JSON values.
    """

    at_ns: int
    type: str
    project_id: str = ""
    workload_id: WorkloadId = WorkloadId("")
    job_id: JobId = JobId("")
    body: tuple[tuple[str, str | int | bool | None], ...] = ()
