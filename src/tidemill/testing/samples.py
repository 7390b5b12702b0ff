"""Values to store in checks, and what checks say when a promise was not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from tidemill.errors import TidemillError
from tidemill.model.artifact import Artifact
from tidemill.model.cloud import Market, Offer, Rental, RentalState
from tidemill.model.events import LogEntry
from tidemill.model.fleet import DeliveryMark, Device, Node, NodeState
from tidemill.model.ids import (
    ArtifactId,
    DataSetId,
    DeviceId,
    JobId,
    ModelId,
    ModelVersionId,
    NodeId,
    OrganizationId,
    OutpostId,
    PrincipalId,
    ProjectId,
    RentalId,
    ReservationId,
    RolloutId,
    SiteId,
    VolumeId,
    WorkloadId,
    attempt_id,
    job_id,
    launch_id,
    queue_id,
    sortable_id,
)
from tidemill.model.job import (
    Allocation,
    AllocationState,
    Attempt,
    AttemptState,
    DeviceShare,
    Job,
    JobState,
    Workload,
)
from tidemill.model.ledger import CPU_METER, Evidence, LedgerLine, UsageInterval
from tidemill.model.plan import Change, Reason, ResolvableBy
from tidemill.model.queue import GPU, Queue, QueueUsage
from tidemill.model.registry import Lineage, Model, ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout, RolloutState
from tidemill.model.scaling import SLOTS, Habit, Pattern
from tidemill.model.spec import Environment, Kind, Port, RetryOn, RetryPolicy, Service, WorkloadSpec
from tidemill.model.storage import DataSet, DataSetState, Volume
from tidemill.model.values import replace
from tidemill.ports import IdempotencyRecord
from tidemill.units import DAY_NS, HOUR_NS, SECOND_NS

NOW: Final = 1_800_000_000 * SECOND_NS
RED: Final = ProjectId("prj_red")
BLUE: Final = ProjectId("prj_blue")
LARGE: Final = 2**63 - 1


def a_workload(number: int, *, project: ProjectId = RED, kind: Kind = Kind.TASK, name: str = "train") -> Workload:
    """A workload; the higher its number, the later it was submitted."""
    service = Service(port="http", model="m") if kind is Kind.SERVICE else None
    return Workload(
        id=WorkloadId(sortable_id("wl", now=NOW + number * SECOND_NS, entropy=number)),
        organization_id=OrganizationId("org_test"),
        project_id=project,
        principal_id=PrincipalId("usr_test"),
        spec=WorkloadSpec(
            kind=kind,
            name=name,
            run="python train.py --größe 1 # 数 \x00 \U0001f30a",
            environment=Environment(python="3.12", packages=("numpy==2.0", "jax")),
            envs=(("A", ""), ("B", "'\"\\\n")),
            ports=(Port(name="http"),),
            service=service,
            retry=RetryPolicy(on=(RetryOn.ERROR,), exit_codes=(33,), max=1),
            labels=(("team", "blå"),),
        ),
        submitted_ns=NOW + number * SECOND_NS,
    )


def a_job(workload: Workload, index: int = 0) -> Job:
    """A job of it that waits."""
    return Job(
        id=job_id(workload.id, index),
        workload_id=workload.id,
        project_id=workload.project_id,
        index=index,
        state=JobState.QUEUED,
        version=1,
        priority=-7,
        submitted_ns=workload.submitted_ns,
    )


def an_attempt(job: Job, number: int = 1) -> Attempt:
    """An attempt that is starting."""
    return Attempt(
        id=attempt_id(job.id, number),
        job_id=job.id,
        number=number,
        state=AttemptState.STARTING,
        version=1,
        placed_ns=NOW,
        workers=2,
        rendezvous_port=29_500,
    )


def an_allocation(attempt: Attempt, rank: int = 0) -> Allocation:
    """What a worker of it holds."""
    return Allocation(
        id=launch_id(attempt.id, rank),
        attempt_id=attempt.id,
        job_id=attempt.job_id,
        project_id=RED,
        rank=rank,
        node_id=NodeId("node_a"),
        state=AllocationState.RESERVED,
        version=1,
        fence=attempt.number,
        cpu_milli=1_500,
        memory_bytes=2**40,
        held_ns=NOW,
        devices=(DeviceShare(device_id=DeviceId("gpu-0"), milli=500),),
        ports=(("http", 8_080),),
        isolation=("sandbox=bubblewrap",),
    )


def a_node(name: str) -> Node:
    """A machine with a GPU."""
    device = Device(
        id=DeviceId(f"gpu-{name}"), index=0, model="H100-SXM", reported="NVIDIA H100 80GB HBM3",
        memory_bytes=80 * 1024**3, idle_mw=70_000, busy_mw=700_000,
    )  # fmt: skip
    return Node(
        id=NodeId(f"node_{name}"), site_id=SiteId("local"), name=name, state=NodeState.READY, version=1, boot_id="b",
        address="127.0.0.1", cpu_milli=64_000, memory_bytes=2**38, disk_bytes=2**42, devices=(device,),
        labels=(("zone", "a"),), joined_ns=NOW,
    )  # fmt: skip


def a_delivery_mark(outpost: str = "a", *, number: int = LARGE) -> DeliveryMark:
    """How far what an outpost brought was taken."""
    return DeliveryMark(id=OutpostId(f"out_{outpost}"), version=1, number=number)


def a_queue(project: ProjectId = RED, *, weight_milli: int = 1_000) -> Queue:
    """A project's place in the quota tree."""
    return Queue(
        id=queue_id(project), name=project, project_id=project, weight_milli=weight_milli,
        guaranteed=((GPU, 4_000), ("gpu:H100 SXM", 0)), limit=((GPU, LARGE),), max_running=7,
    )  # fmt: skip


def a_usage(project: ProjectId = RED, *, user: str = "usr_test", taken: float = 1 / 3) -> QueueUsage:
    """What a user of a project took lately."""
    return QueueUsage(id=f"{project}/{user}", version=1, at_ns=NOW, taken=(("H100-SXM", taken), ("cpu", 1e300)))


def a_reservation(number: int) -> Reservation:
    """A weekly window of two nodes."""
    return Reservation(
        id=ReservationId(f"res_{number}"), name="weekly", project_id=RED, node_ids=(NodeId("node_a"), NodeId("b")),
        starts_ns=NOW, ends_ns=NOW + HOUR_NS, every_ns=7 * DAY_NS, created_by="usr_test",
    )  # fmt: skip


def a_line(
    from_ns: int,
    to_ns: int,
    *,
    job: Job | None = None,
    node: str = "node_a",
    resource: str = CPU_METER,
    milli: int = 1_000,
    amount_micro: int = 5,
    energy_mj: int = 7,
    carbon_mg: int = 11,
    evidence: Evidence = Evidence.MEASURED,
    others: bool = False,
) -> LedgerLine:
    """A priced interval of one meter; idle time when there is no job, unless it is held by ``others``."""
    usage = UsageInterval(
        node_id=NodeId(node),
        meter=resource,
        resource=resource,
        from_ns=from_ns,
        to_ns=to_ns,
        milli=milli,
        energy_mj=energy_mj,
        evidence=evidence,
        others=others,
    )
    if job is not None:
        attempt = attempt_id(job.id, 1)
        usage = replace(
            usage, launch_id=launch_id(attempt, 0), attempt_id=attempt, job_id=job.id, project_id=job.project_id
        )
    return LedgerLine(
        id=usage.id, usage=usage, rate_card="r1", amount_micro=amount_micro, energy_mj=energy_mj, carbon_mg=carbon_mg
    )


def a_reason(code: str = "NotEnoughFreeGpus") -> Reason:
    """Why a job waits."""
    return Reason(
        code=code, subject="site local", needed="8 GPUs", available="2 GPUs", resolvable_by=ResolvableBy.TIME,
        sentence="8 GPUs are needed – 2 are free.",
    )  # fmt: skip


def a_note(job: Job | None = None, name: str = "Submitted", **body: str | int | bool | None) -> LogEntry:
    """A line of the event log."""
    if job is None:
        return LogEntry(at_ns=NOW, type=name, body=tuple(body.items()))
    return LogEntry(
        at_ns=NOW, type=name, project_id=job.project_id, workload_id=job.workload_id, job_id=job.id,
        body=tuple(body.items()),
    )  # fmt: skip


def a_rental(number: int) -> Rental:
    """An instance that is wanted for a job."""
    offer = Offer(
        id="g/a/spot", instance_type="g", region="r", zone="a", market=Market.SPOT, cpu_milli=4_000,
        memory_bytes=1 << 34,
        price_micro_per_hour=5, most_micro_per_hour=7, gpu_model="T4", gpu_count=1, gpu_memory_bytes=1 << 34,
        labels=(("region", "r"),),
    )  # fmt: skip
    return Rental(
        id=RentalId(f"ren_{number}"), site_id=SiteId("burst"), scope="c/1/r", offer=offer, node_name=f"burst-{number}",
        state=RentalState.WANTED, version=1, created_ns=NOW, expires_ns=NOW + HOUR_NS, jobs=(JobId("job_1"),),
    )  # fmt: skip


def a_rollout(number: int, *, first: int = 1) -> Rollout:
    """A rollout to a workload of that number, of the service whose first revision is ``first``."""
    return Rollout(
        id=RolloutId(f"rol_{number}"), project_id=RED, name="chat", first_id=WorkloadId(f"wl_{first}"),
        before_id=WorkloadId(f"wl_{number - 1}"), workload_id=WorkloadId(f"wl_{number}"), revision=number,
        state=RolloutState.CANARY, began_ns=NOW,
    )  # fmt: skip


def a_model(number: int, project: ProjectId = RED) -> Model:
    """A model without versions."""
    return Model(id=ModelId(f"mdl_{number}"), project_id=project, name=f"model-{number}", created_ns=NOW)


def a_model_version(number: int, model: Model, *, job: str = "") -> ModelVersion:
    """A version of a model, which that job made."""
    return ModelVersion(
        id=ModelVersionId(f"mdv_{model.id}_{number}"), model_id=model.id, project_id=model.project_id, number=number,
        digest=f"{number:064x}", size=number, files=1, lineage=Lineage(job_id=JobId(job)), created_ns=NOW,
    )  # fmt: skip


def new(
    *things: Workload
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
    | ModelVersion,
) -> tuple[Change, ...]:
    """Changes that insert these."""
    return tuple(Change(assumed=None, after=thing) for thing in things)


def moved(job: Job, state: JobState) -> Change:
    """A change that brings a job as it is to another state."""
    return Change(assumed=job.version, after=replace(job, state=state, version=job.version + 1))


def a_record(key: str) -> IdempotencyRecord:
    return IdempotencyRecord(
        principal_id=PrincipalId("usr_test"), key=key, request_digest="d", response='["wl_1"]', created_ns=NOW
    )


def an_artifact(number: int, *, name: str = "model") -> Artifact:
    return Artifact(
        id=ArtifactId(f"art_{number}"), project_id=RED, name=name, version=99, digest="ab", size=2**50, created_ns=NOW,
        metadata=(("f1", "0,9"),),
    )  # fmt: skip


def a_volume(name: str = "scratch") -> Volume:
    return Volume(
        id=VolumeId(f"vol_{name}"), project_id=RED, name=name, site_id=SiteId("north"), path="/mnt/é", created_ns=NOW
    )


def a_habit(service: str = "chat", *, milli: int = 1_500) -> Habit:
    pattern = Pattern(means_milli=(milli,) * SLOTS, days=(3,) * SLOTS, plain_milli=700, judged=500, error_milli=20)
    return Habit(project_id=RED, service=service, pattern=pattern, starts_ns=(90 * SECOND_NS, 2**62))


def a_dataset(number: int, *, name: str = "images") -> DataSet:
    return DataSet(
        id=DataSetId(f"set_{number:03}"), project_id=RED, name=name, version=99, home="s3://bucket/prefix",
        state=DataSetState.SCANNING, size=2**50, created_ns=NOW,
    )  # fmt: skip


# Promises


def same(found: object, expected: object, what: str) -> None:
    """Raises: AssertionError when they differ."""
    if found != expected:
        raise AssertionError(f"{what}: found {_short(found)}, expected {_short(expected)}")


def _short(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str) and (text := repr(value)) and len(text) > 2_000:
        return text[:2_000] + " …"
    return repr(value)


def holds(kept: bool, what: str) -> None:
    if not kept:
        raise AssertionError(what)


def raises(kind: type[TidemillError], call: Callable[..., object], *given: Any, **named: Any) -> None:
    """Raises: AssertionError when the call does not raise that."""
    try:
        answer = call(*given, **named)
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was expected, and the answer was {_short(answer)}")
