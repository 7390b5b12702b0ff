"""What is scheduled and what it holds: workload, job, attempt, allocation.

Each has a ``version`` that grows by one with every change; a change is stored only over the version that it
assumed. States say where a thing is in its life, causes say why it is there; the transitions are in
``core.lifecycle``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct

from tidemill.model.ids import (
    AttemptId,
    DeviceId,
    JobId,
    LaunchId,
    NodeId,
    OrganizationId,
    PrincipalId,
    ProjectId,
    WorkloadId,
)
from tidemill.model.spec import WorkloadSpec


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    STARTING = "starting"
    """Placed; workers are being started."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to end; workers are being stopped."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptState(StrEnum):
    """Where one try at running a job is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    """Decided to end; waiting until every worker is confirmed gone."""
    ENDED = "ended"


class AllocationState(StrEnum):
    """Where the lease of one worker's devices is in its life."""

    RESERVED = "reserved"
    """Committed to the worker; its runner has not reported yet."""
    PREPARING = "preparing"
    """The runner reported and prepares the environment."""
    ACTIVE = "active"
    """The worker's process runs."""
    DRAINING = "draining"
    """The worker was asked to stop; its devices are still taken."""
    RELEASED = "released"
    """The worker is confirmed gone."""


class Cause(StrEnum):
    """Why an attempt ended, or a job is where it is."""

    NONE = ""
    COMPLETED = "completed"
    ERROR = "error"
    """A worker exited with a status other than zero."""
    SETUP_FAILED = "setup_failed"
    """The environment, the workdir or the setup script failed; the same spec would fail again."""
    PORT_TAKEN = "port_taken"
    STORAGE_FULL = "storage_full"
    OUT_OF_MEMORY = "out_of_memory"
    NODE_LOST = "node_lost"
    """The runner, the machine or the engine's process of a worker was lost."""
    LAUNCH_FAILED = "launch_failed"
    """The engine refused to start a worker."""
    PREEMPTED = "preempted"
    TIMED_OUT = "timed_out"
    """``max_duration`` is over."""
    NOT_READY = "not_ready"
    """A service did not pass its readiness probe in time."""
    NOT_ALIVE = "not_alive"
    """A service that was ready stopped passing its liveness probe."""
    CANCELLED = "cancelled"
    RESIZED = "resized"
    """An elastic gang gave this worker up and went on with the others."""
    TOO_LATE = "too_late"
    """``start_before`` passed before there was room."""
    DEPENDENCY = "dependency"
    """A workload that had to end first did not end as it had to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a user submitted."""

    id: WorkloadId
    organization_id: OrganizationId
    project_id: ProjectId
    principal_id: PrincipalId
    spec: WorkloadSpec
    submitted_ns: int


class Job(Struct, frozen=True, kw_only=True, gc=False):
    """One schedulable unit: a gang that starts whole or not at all.

    ``attempts`` counts tries so far, ``retries`` those that followed another. ``exit_code`` is that of the
    first worker to fail, zero on success, None while unknown. ``reason`` is why it waits, as JSON of
    ``model.plan.Reason`` fields, empty when it does not wait. Zero instants mean "not yet".
    """

    id: JobId
    workload_id: WorkloadId
    project_id: ProjectId
    index: int
    state: JobState
    version: int
    priority: int
    submitted_ns: int
    cause: Cause = Cause.NONE
    detail: str = ""
    attempts: int = 0
    retries: int = 0
    first_started_ns: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    exit_code: int | None = None
    not_before_ns: int = 0
    stop_requested: bool = False
    served_ns: int = 0
    """GPU time (milli-GPU x ns / 1000) that earlier attempts had."""
    evictions: int = 0
    """How often it was displaced."""
    waiting_since_ns: int = 0
    """When it began to wait again after an attempt; zero: it has waited since it was submitted."""
    fence_base: int = 0
    """The number after which those of its attempts are counted: zero, and large after a backup was restored."""


class Attempt(Struct, frozen=True, kw_only=True, gc=False):
    """One try at running a job. ``number`` counts from 1 and is also the fencing token of its leases.

    ``cause`` is set when it is decided that the attempt ends, before its workers are gone.
    """

    id: AttemptId
    job_id: JobId
    number: int
    state: AttemptState
    version: int
    placed_ns: int
    workers: int
    rendezvous_port: int
    cause: Cause = Cause.NONE
    detail: str = ""
    exit_code: int | None = None
    started_ns: int = 0
    ready_ns: int = 0
    ended_ns: int = 0
    checkpoint_ns: int = 0
    """When it last reported a checkpoint; zero: never."""
    choice: int = 0
    """Which of the spec's ``choices`` it was given."""
    next_rank: int = 0
    """The rank that the next worker to join would get; ranks are never given twice."""


class DeviceShare(Struct, frozen=True, kw_only=True, gc=False):
    """Part or all of one device: ``milli`` thousandths of it; a MIG slice has its ``profile`` and first slice."""

    device_id: DeviceId
    milli: int
    profile: str = ""
    slice: int = 0


class Allocation(Struct, frozen=True, kw_only=True, gc=False):
    """What one worker of an attempt holds on one node, under a lease with a fencing token.

    ``ports`` maps port names to the numbers given. ``isolation`` says, as ``name=value`` words, what the
    worker really had (sandbox, memory limit, …). ``last_beat_ns`` lives in memory only and is not a change.
    ``endpoint`` is ``host:port`` of a ready service.
    """

    id: LaunchId
    attempt_id: AttemptId
    job_id: JobId
    project_id: ProjectId
    rank: int
    node_id: NodeId
    state: AllocationState
    version: int
    fence: int
    cpu_milli: int
    memory_bytes: int
    held_ns: int
    devices: tuple[DeviceShare, ...] = ()
    ports: tuple[tuple[str, int], ...] = ()
    started_ns: int = 0
    drain_ns: int = 0
    released_ns: int = 0
    exit_code: int | None = None
    cpu_used_ns: int = 0
    isolation: tuple[str, ...] = ()
    endpoint: str = ""
    cause: Cause = Cause.NONE
    detail: str = ""
    scheduler: tuple[tuple[str, str], ...] = ()
    """How it ended by the words of the site's own scheduler, where that was asked: ``state``, ``exit``, ``nodes``, …"""
