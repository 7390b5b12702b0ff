"""What the shells implement: the store and the engines, as protocols, with the values that cross them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tidemill.model.artifact import Artifact
from tidemill.model.cloud import (
    Billing,
    Instance,
    InterruptionNotice,
    NoCapacity,
    Offer,
    ProvisionRequest,
    Rental,
)
from tidemill.model.events import LogEntry
from tidemill.model.fleet import DeliveryMark, Node, Outpost, Site
from tidemill.model.guard import Decision
from tidemill.model.ids import (
    ArtifactId,
    DataSetId,
    JobId,
    LaunchId,
    ModelId,
    NodeId,
    PrincipalId,
    ProjectId,
    TokenId,
    WorkloadId,
)
from tidemill.model.job import Allocation, Attempt, Job, JobState, Workload
from tidemill.model.ledger import LedgerLine, LedgerTotals, ServedTotals, TokenTotals, TokenUsage
from tidemill.model.plan import Change, LaunchSpec, Reason, Sight, Waiting
from tidemill.model.queue import Queue, QueueUsage
from tidemill.model.registry import Model, ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.model.scaling import Habit
from tidemill.model.spec import Kind
from tidemill.model.storage import DataSet, Volume
from tidemill.model.tenant import Organization, Principal, Project, Secret, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyRecord:
    """The answer given to a write that carried an Idempotency-Key, kept with the write itself.

    ``request_digest`` tells whether a repeated key comes with the same request.
    """

    principal_id: PrincipalId
    key: str
    request_digest: str
    response: str
    created_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Everything that one commit makes durable, whole or not at all. ``epoch`` is the leader's."""

    epoch: int
    changes: Sequence[Change] = ()
    log: Sequence[LogEntry] = ()
    ledger: Sequence[LedgerLine] = ()
    waiting: Sequence[Waiting] = ()
    idempotency: Sequence[IdempotencyRecord] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """A line of the event log with its place in it."""

    seq: int
    entry: LogEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job as lists show it: itself, its workload, and the stored reason while it waits."""

    job: Job
    workload: Workload
    reason: Reason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs to list, newest first. Empty fields do not filter.

    ``name`` is a workload's whole name; ``text`` is the beginning of one, ``id_prefix`` that of a job's id.
    """

    project_ids: tuple[ProjectId, ...] = ()
    states: tuple[JobState, ...] = ()
    kinds: tuple[Kind, ...] = ()
    workload_id: WorkloadId = WorkloadId("")
    name: str = ""
    text: str = ""
    id_prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a control plane needs to go on: everything that is not over, and how far metering got.

    ``jobs`` are those not terminal, with their ``workloads``; ``attempts`` and ``allocations`` those not ended
    or released. ``metered_until`` maps (node, meter) to ns. ``last_seq`` is the newest event's. ``queues``,
    ``queue_usages`` and ``deliveries`` are all of them, ``reservations`` those not cancelled, also when their windows
    are over, ``rollouts`` those that are not over.
    ``unlucky`` counts, for workloads that are not over, the jobs that ended other than well; those without are not in
    it.
    """

    nodes: tuple[Node, ...] = ()
    workloads: tuple[Workload, ...] = ()
    jobs: tuple[Job, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    allocations: tuple[Allocation, ...] = ()
    reasons: tuple[Waiting, ...] = ()
    metered_until: tuple[tuple[NodeId, str, int], ...] = ()
    last_seq: int = 0
    queues: tuple[Queue, ...] = ()
    queue_usages: tuple[QueueUsage, ...] = ()
    deliveries: tuple[DeliveryMark, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    rollouts: tuple[Rollout, ...] = ()
    unlucky: tuple[tuple[WorkloadId, int], ...] = ()


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Part of a list; ``next_cursor`` empty means that this was the last."""

    items: tuple[T, ...] = field(default=())
    next_cursor: str = ""


class Store(Protocol):
    """Durable state. Every write is one transaction; no method waits on anything but the database.

    Raises, from any method: ``Unavailable`` when the database does not answer or stays locked,
    ``StorageFull`` when it cannot grow. After either, nothing of the call is stored.
    """

    def migrate(self) -> None:
        """Bring the schema to this version's; harmless when it is there already, whole or not at all."""

    def close(self) -> None:
        """Release connections; harmless twice."""

    def lead(self, *, holder: str) -> int:
        """A new epoch, larger than any before, that makes ``holder`` the only one whose commits are taken."""

    def commit(self, batch: Batch) -> int:
        """The sequence number of the newest event after all of ``batch`` is durable.

        A change with ``assumed`` None inserts, any other updates the row whose version is ``assumed``.
        Ledger lines whose id is stored already are skipped. Meter marks follow the ledger lines.
        Raises: Stale when an assumed version does not hold or a new thing exists; Fenced when a later
        epoch leads. Then nothing of the batch is stored.
        """

    def load(self) -> Snapshot:
        """All that is not over, at one instant."""

    def workload(self, workload_id: WorkloadId) -> Workload | None: ...

    def jobs_of(self, workload_id: WorkloadId) -> tuple[Job, ...]:
        """A workload's jobs by index."""

    def job(self, job_id: JobId) -> JobRow | None: ...

    def find_jobs(self, where: JobFilter, *, cursor: str = "", limit: int = 50) -> Page[JobRow]:
        """Jobs, newest submission first; stable under concurrent writes."""

    def attempts(self, job_id: JobId) -> tuple[Attempt, ...]:
        """A job's attempts by number."""

    def allocations(self, job_id: JobId) -> tuple[Allocation, ...]:
        """What the job's workers held and hold, by attempt and rank."""

    def allocation(self, launch_id: LaunchId) -> Allocation | None: ...

    def nodes(self) -> tuple[Node, ...]:
        """Every node ever joined, by name."""

    def events(
        self,
        *,
        after: int = 0,
        limit: int = 100,
        job_id: JobId = JobId(""),
        workload_id: WorkloadId = WorkloadId(""),
        project_ids: tuple[ProjectId, ...] = (),
    ) -> tuple[StoredEvent, ...]:
        """Events with a sequence number above ``after``, oldest first."""

    def ledger(
        self, *, job_id: JobId = JobId(""), project_id: ProjectId = ProjectId(""), cursor: str = "", limit: int = 100
    ) -> Page[LedgerLine]:
        """Ledger lines, oldest first; of everything, idle time included, when nothing filters."""

    def ledger_totals(
        self,
        *,
        job_id: JobId = JobId(""),
        project_id: ProjectId = ProjectId(""),
        workload_id: WorkloadId = WorkloadId(""),
        idle: bool = False,
    ) -> LedgerTotals:
        """Exact sums of a job's, a workload's or a project's lines, or of idle time when ``idle``; of all otherwise."""

    def put_token_usages(self, usages: Sequence[TokenUsage]) -> tuple[TokenUsage, ...]:
        """Those of these that were not in the books before; all are there now, each once, or none."""

    def token_usages(
        self, *, project_id: ProjectId = ProjectId(""), cursor: str = "", limit: int = 100
    ) -> Page[TokenUsage]:
        """What requests took, in the order in which they were stored."""

    def put_decisions(self, decisions: Sequence[Decision]) -> int:
        """How many of these were not in the books before; all are there now, each once, or none."""

    def decisions(
        self, *, project_ids: Sequence[ProjectId] = (), model: str = "", rule: str = "", action: str = "",
        cursor: str = "", limit: int = 100,
    ) -> Page[Decision]:  # fmt: skip
        """What guardrails decided, newest first; empty arguments: whatever it is."""

    def served(self, *, project_id: ProjectId) -> tuple[ServedTotals, ...]:
        """What the services of a project answered, by service and model, in order; whoever asked."""

    def token_totals(
        self,
        *,
        job_id: JobId = JobId(""),
        project_id: ProjectId = ProjectId(""),
        token_id: TokenId = TokenId(""),
        since_ns: int = 0,
        by: Sequence[str] = ("model", "key"),
    ) -> tuple[TokenTotals, ...]:
        """Sums of a replica's, a project's or a key's requests since then, else of all, by some of ``TOKEN_GROUPS``."""

    def rentals(self, *, since_ns: int = 0) -> tuple[Rental, ...]:
        """Rented instances that are not over, and those that ended at ``since_ns`` or later, by id."""

    def revisions(self, workload_id: WorkloadId) -> tuple[Rollout, ...]:
        """All rollouts of the service of which a workload is a revision, by revision; none: it was never updated."""

    def idempotent(self, principal_id: PrincipalId, key: str) -> IdempotencyRecord | None: ...

    def put_organization(self, organization: Organization) -> None:
        """Store it, or replace the one of that id; likewise the other ``put_`` methods."""

    def put_project(self, project: Project) -> None: ...

    def put_principal(self, principal: Principal) -> None: ...

    def put_token(self, token: Token) -> None: ...

    def put_secret(self, secret: Secret) -> None: ...

    def delete_secret(self, project_id: ProjectId, name: str) -> bool:
        """Whether there was one."""

    def put_site(self, site: Site) -> None: ...

    def put_outpost(self, outpost: Outpost) -> None: ...

    def put_artifact(self, artifact: Artifact) -> Artifact:
        """The artifact with the next free version of its name; its own ``version`` is ignored."""

    def put_volume(self, volume: Volume) -> None:
        """Store it, or replace the one of that project and name."""

    def delete_volume(self, project_id: ProjectId, name: str) -> bool:
        """Whether there was one."""

    def put_habit(self, habit: Habit) -> None:
        """Store it, or replace the one of that project and service."""

    def add_dataset(self, dataset: DataSet) -> DataSet:
        """The data set with the next version of its name that was never given; its own ``version`` is ignored."""

    def put_dataset(self, dataset: DataSet) -> None:
        """Replace the one of that id, whose name and version stay."""

    def organizations(self) -> tuple[Organization, ...]: ...

    def projects(self) -> tuple[Project, ...]: ...

    def sites(self) -> tuple[Site, ...]:
        """The sites that were added, by id."""

    def outposts(self) -> tuple[Outpost, ...]:
        """Every outpost ever made, by id."""

    def principals(self) -> tuple[Principal, ...]: ...

    def tokens(self) -> tuple[Token, ...]: ...

    def token(self, token_id: TokenId) -> Token | None: ...

    def secret(self, project_id: ProjectId, name: str) -> Secret | None: ...

    def secrets(self, project_id: ProjectId) -> tuple[Secret, ...]: ...

    def artifact(self, artifact_id: ArtifactId) -> Artifact | None: ...

    def find_artifact(self, project_id: ProjectId, name: str, version: int = 0) -> Artifact | None:
        """That version of the named artifact, or the newest when ``version`` is zero."""

    def artifacts(self, project_id: ProjectId) -> tuple[Artifact, ...]:
        """A project's artifacts, by name, newest version first."""

    def volume(self, project_id: ProjectId, name: str) -> Volume | None: ...

    def volumes(self, project_id: ProjectId) -> tuple[Volume, ...]:
        """A project's volumes, by name."""

    def habits(self) -> tuple[Habit, ...]:
        """What is remembered of services, by project and name."""

    def dataset(self, dataset_id: DataSetId) -> DataSet | None: ...

    def find_dataset(self, project_id: ProjectId, name: str, version: int = 0) -> DataSet | None:
        """That version of the named data set, or the newest when ``version`` is zero; none that was deleted."""

    def datasets(self, project_id: ProjectId) -> tuple[DataSet, ...]:
        """A project's data sets that were not deleted, by name, newest version first."""

    def unscanned_datasets(self) -> tuple[DataSet, ...]:
        """Those of all projects whose files are still to be read, by id."""

    def model(self, project_id: ProjectId, name: str) -> Model | None:
        """The model of that name, also one that was deleted."""

    def models(self, project_id: ProjectId) -> tuple[Model, ...]:
        """A project's models, by name, those that were deleted among them."""

    def model_versions(self, model_id: ModelId) -> tuple[ModelVersion, ...]:
        """A model's versions, newest first, those that were deleted among them."""

    def project_model_versions(self, project_id: ProjectId, *, digest: str = "") -> tuple[ModelVersion, ...]:
        """The versions of all models of a project that were not deleted, oldest first; with ``digest``, of that."""

    def model_versions_of(self, job_ids: Sequence[JobId]) -> tuple[ModelVersion, ...]:
        """What these jobs made that was not deleted, oldest first."""

    def integrity(self) -> tuple[str, ...]:
        """What is wrong with the database, in sentences; empty when it is sound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do. ``images`` runs containers, ``exec`` lets commands run inside a worker."""

    name: str
    images: bool
    exec: bool
    places: bool
    """Whether Tidemill chooses nodes and devices (False: delegated to the engine's own scheduler)."""


class Engine(Protocol):
    """What starts workers. Launching is all it does: no retries, no status logic, no memory of its own.

    Raises, from ``launch`` and ``stop``: ``EngineRefused`` when the same call would be refused again,
    ``EngineLost`` when it is not known whether it was carried out; then call again, it is idempotent.
    """

    @property
    def capabilities(self) -> EngineCapabilities: ...

    def nodes(self) -> tuple[Node, ...]:
        """The machines it has now, with their devices; ``state``, ``version`` and ``joined_ns`` are ignored."""

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started; nothing more when its launch id was started before, even if it ended."""

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        """Have a worker signalled, and killed with all it started after the grace; harmless when unknown, and
        then remembered, so that a launch of that id arriving late is not started."""

    def observe(self) -> Sight:
        """Every launch that it has not forgotten, from its own list; never from what it was told.

        It is about the nodes that answered: one that cannot be reached now is left out with all that is on it.
        """

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:
        """Drop what is kept of a launch that is gone; refused while anything of it lives; harmless twice."""

    def close(self) -> None:
        """Let go without touching what runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionerCapabilities:
    """What a cloud can do. ``notices`` says whether ``interruptions`` ever has any."""

    name: str
    spot: bool
    notices: bool
    billing: Billing


class Provisioner(Protocol):
    """Where machines are rented. Renting and ending is all it does: no retries, no waiting, no memory of its own.

    Raises, from any method: ``CloudRefused`` when the same call would be refused again (it names the field and the
    mend), ``CloudLost`` when it is not known whether it was carried out, or the cloud puts us off; then call again.
    """

    @property
    def capabilities(self) -> ProvisionerCapabilities: ...

    def scope(self) -> str:
        """The account and place that it rents in, in one word: lists of two scopes say nothing about each other."""

    def offers(self) -> tuple[Offer, ...]:
        """All that could be rented, with its price now; what has no known price is left out."""

    def provision(self, request: ProvisionRequest) -> Instance | NoCapacity:
        """The instance of that client token: rented now, or before, also when it has ended since."""

    def release(self, instance_id: str) -> None:
        """Have an instance ended, its disks with it; harmless twice, and when it is unknown."""

    def instances(self) -> tuple[Instance, ...]:
        """Every instance with our installation's tag, from the cloud's own list; never from what it was told."""

    def interruptions(self) -> tuple[InterruptionNotice, ...]:
        """Which of our instances the cloud is about to take back, as far as it tells."""
