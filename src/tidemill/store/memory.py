"""The store in memory: the same behaviour as the databases, for tests, for quotes and for the twin; gone at the end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

from tidemill.core.lifecycle import is_terminal
from tidemill.errors import Deposed, Stale
from tidemill.model.artifact import Artifact
from tidemill.model.cloud import Rental
from tidemill.model.fleet import DeliveryMark, Node, Outpost, Site
from tidemill.model.guard import Decision
from tidemill.model.ids import (
    ArtifactId,
    DataSetId,
    JobId,
    LaunchId,
    ModelId,
    NodeId,
    OrganizationId,
    OutpostId,
    PrincipalId,
    ProjectId,
    SiteId,
    TokenId,
    WorkloadId,
)
from tidemill.model.job import Allocation, Attempt, Job, JobState, Workload
from tidemill.model.ledger import (
    TOKEN_GROUPS,
    Evidence,
    LedgerLine,
    LedgerTotals,
    ServedTotals,
    TokenTotals,
    TokenUsage,
)
from tidemill.model.plan import Reason, Waiting
from tidemill.model.queue import Queue, QueueUsage
from tidemill.model.registry import Model, ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.model.scaling import Habit
from tidemill.model.storage import DataSet, DataSetState, Volume
from tidemill.model.tenant import Organization, Principal, Project, Secret, Token
from tidemill.ports import Batch, IdempotencyRecord, JobFilter, JobRow, Page, Snapshot, StoredEvent
from tidemill.store.cursors import from_cursor, to_cursor
from tidemill.store.rows import THINGS, Thing, marks, net_changes, version_of

_UNLUCKY: Final = (JobState.FAILED, JobState.CANCELLED)


class _Comparable(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...


V = TypeVar("V")


@dataclass(slots=True)
class _Contents:
    epoch: int = 0
    holder: str = ""
    things: dict[Any, dict[Any, Any]] = field(default_factory=lambda: {kind: {} for kind in THINGS})
    reasons: dict[JobId, Reason] = field(default_factory=dict)
    events: list[StoredEvent] = field(default_factory=list)
    ledger: dict[str, LedgerLine] = field(default_factory=dict)
    token_usages: dict[str, TokenUsage] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    marks: dict[tuple[NodeId, str], int] = field(default_factory=dict)
    idempotency: dict[tuple[PrincipalId, str], IdempotencyRecord] = field(default_factory=dict)
    organizations: dict[OrganizationId, Organization] = field(default_factory=dict)
    projects: dict[ProjectId, Project] = field(default_factory=dict)
    principals: dict[PrincipalId, Principal] = field(default_factory=dict)
    sites: dict[SiteId, Site] = field(default_factory=dict)
    outposts: dict[OutpostId, Outpost] = field(default_factory=dict)
    tokens: dict[TokenId, Token] = field(default_factory=dict)
    secrets: dict[tuple[ProjectId, str], Secret] = field(default_factory=dict)
    artifacts: dict[ArtifactId, Artifact] = field(default_factory=dict)
    volumes: dict[tuple[ProjectId, str], Volume] = field(default_factory=dict)
    habits: dict[tuple[ProjectId, str], Habit] = field(default_factory=dict)
    datasets: dict[DataSetId, DataSet] = field(default_factory=dict)


class MemoryStore:
    """``ports.Store`` without a database. Closing it loses nothing as long as the object lives."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._all = _Contents()

    def migrate(self) -> None:
        """Nothing: there is no schema."""

    def close(self) -> None:
        """Nothing: there are no connections."""

    # Commits

    def lead(self, *, holder: str) -> int:
        """A new epoch, larger than any before, that makes ``holder`` the only one whose commits are taken."""
        with self._lock:
            self._all.epoch, self._all.holder = self._all.epoch + 1, holder
            return self._all.epoch

    def commit(self, batch: Batch) -> int:
        """The sequence number of the newest event after all of ``batch`` is stored. Raises: Stale, Fenced."""
        with self._lock:
            changes = list(net_changes(batch.changes))
            self._check(batch, changes)
            for kind, _, after in changes:
                self._all.things[kind][after.id] = after
                if isinstance(after, Job) and after.state is not JobState.QUEUED:
                    self._all.reasons.pop(after.id, None)
            for waiting in batch.waiting:
                job = self._of(Job).get(waiting.job_id)
                if job is not None and job.state is JobState.QUEUED:
                    self._all.reasons[waiting.job_id] = waiting.reason
            for entry in batch.log:
                self._all.events.append(StoredEvent(seq=len(self._all.events) + 1, entry=entry))
            for line in batch.ledger:
                self._all.ledger.setdefault(line.id, line)
            for key, until in marks(batch.ledger):
                self._all.marks[key] = max(self._all.marks.get(key, until), until)
            self._all.idempotency.update({(record.principal_id, record.key): record for record in batch.idempotency})
            return len(self._all.events)

    def _check(self, batch: Batch, changes: Iterable[tuple[type[Thing], int | None, Thing]]) -> None:
        if batch.epoch != self._all.epoch:
            raise Deposed("Another control plane leads.", epoch=batch.epoch, leads=self._all.epoch)
        for kind, assumed, after in changes:
            stored = self._all.things[kind].get(after.id)
            if (None if stored is None else version_of(stored)) != assumed:
                raise Stale("The state changed since it was read.", field="id", value=after.id)
        ends: dict[str, int] = {}
        for line in batch.ledger:
            end = self._all.ledger[line.id].usage.to_ns if line.id in self._all.ledger else line.usage.to_ns
            if ends.setdefault(line.id, end) != line.usage.to_ns:
                raise Stale("This usage is in the books with another end.", field="ledger", value=line.id)
        keys = [(record.principal_id, record.key) for record in batch.idempotency]
        if len(set(keys)) != len(keys) or any(key in self._all.idempotency for key in keys):
            raise Stale("It exists already.")

    # What is not over

    def load(self) -> Snapshot:
        """All that is not over, at one instant."""
        with self._lock:
            jobs = self._sorted(
                Job, lambda job: not is_terminal(job.state), key=lambda job: (job.workload_id, job.index)
            )
            owners = {job.workload_id for job in jobs}
            unlucky = Counter(
                job.workload_id
                for job in self._sorted(Job, lambda job: job.state in _UNLUCKY, key=lambda job: job.workload_id)
                if job.workload_id in owners
            )
            return Snapshot(
                nodes=self.nodes(),
                workloads=self._sorted(Workload, lambda it: it.id in owners, key=lambda it: it.id),
                jobs=jobs,
                attempts=self._sorted(
                    Attempt, lambda it: not is_terminal(it.state), key=lambda it: (it.job_id, it.number)
                ),
                allocations=self._sorted(
                    Allocation, lambda it: not is_terminal(it.state), key=lambda it: (it.job_id, it.fence, it.rank)
                ),
                reasons=tuple(
                    Waiting(job_id=job.id, reason=self._all.reasons[job.id])
                    for job in jobs
                    if job.id in self._all.reasons
                ),
                metered_until=tuple((node, meter, until) for (node, meter), until in sorted(self._all.marks.items())),
                last_seq=len(self._all.events),
                queues=self._sorted(Queue, lambda _: True, key=lambda it: it.id),
                queue_usages=self._sorted(QueueUsage, lambda _: True, key=lambda it: it.id),
                deliveries=self._sorted(DeliveryMark, lambda _: True, key=lambda it: it.id),
                reservations=self._sorted(Reservation, lambda it: not it.cancelled_ns, key=lambda it: it.id),
                rollouts=self._sorted(Rollout, lambda it: not it.ended_ns, key=lambda it: it.id),
                unlucky=tuple(sorted(unlucky.items())),
            )

    # Workloads, jobs and what they held

    def workload(self, workload_id: WorkloadId) -> Workload | None:
        return self._of(Workload).get(workload_id)

    def jobs_of(self, workload_id: WorkloadId) -> tuple[Job, ...]:
        """A workload's jobs by index."""
        return self._sorted(Job, lambda job: job.workload_id == workload_id, key=lambda job: job.index)

    def job(self, job_id: JobId) -> JobRow | None:
        with self._lock:
            job = self._of(Job).get(job_id)
            return None if job is None else self._row(job)

    def find_jobs(self, where: JobFilter, *, cursor: str = "", limit: int = 50) -> Page[JobRow]:
        """Jobs, newest submission first; stable under concurrent writes. Raises: InvalidRequest for a bad cursor."""
        before = from_cursor(cursor, tuple[int, str, int]) if cursor else None
        with self._lock:
            rows = sorted((self._row(job) for job in self._of(Job).values()), key=_place, reverse=True)
        found = [row for row in rows if _matches(row, where) and (before is None or _place(row) < before)]
        more = len(found) > limit
        return Page(items=tuple(found[:limit]), next_cursor=to_cursor(_place(found[limit - 1])) if more else "")

    def attempts(self, job_id: JobId) -> tuple[Attempt, ...]:
        """A job's attempts by number."""
        return self._sorted(Attempt, lambda it: it.job_id == job_id, key=lambda it: it.number)

    def allocations(self, job_id: JobId) -> tuple[Allocation, ...]:
        """What the job's workers held and hold, by attempt and rank."""
        return self._sorted(Allocation, lambda it: it.job_id == job_id, key=lambda it: (it.fence, it.rank, it.id))

    def allocation(self, launch_id: LaunchId) -> Allocation | None:
        return self._of(Allocation).get(launch_id)

    def nodes(self) -> tuple[Node, ...]:
        """Every node ever joined, by name."""
        return self._sorted(Node, lambda _: True, key=lambda node: (node.name, node.id))

    # The event log and the books

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
        with self._lock:
            later = self._all.events[max(after, 0) :]
        found = (
            event
            for event in later
            if (not job_id or event.entry.job_id == job_id)
            and (not workload_id or event.entry.workload_id == workload_id)
            and (not project_ids or event.entry.project_id in project_ids)
        )
        return tuple(event for event, _ in zip(found, range(limit), strict=False))

    def ledger(
        self, *, job_id: JobId = JobId(""), project_id: ProjectId = ProjectId(""), cursor: str = "", limit: int = 100
    ) -> Page[LedgerLine]:
        """Ledger lines in the order in which they were stored. Raises: InvalidRequest for a bad cursor."""
        after = from_cursor(cursor, int) if cursor else 0
        with self._lock:
            numbered = list(enumerate(self._all.ledger.values(), 1))
        found = [(n, line) for n, line in numbered if n > after and _belongs(line, job_id, project_id)]
        return Page(
            items=tuple(line for _, line in found[:limit]),
            next_cursor=to_cursor(found[limit - 1][0]) if len(found) > limit else "",
        )

    def ledger_totals(
        self,
        *,
        job_id: JobId = JobId(""),
        project_id: ProjectId = ProjectId(""),
        workload_id: WorkloadId = WorkloadId(""),
        idle: bool = False,
    ) -> LedgerTotals:
        """Exact sums of a job's, a workload's or a project's lines, or of idle time when ``idle``; of all otherwise."""
        with self._lock:
            stored = tuple(self._all.ledger.values())
            if workload_id:
                jobs = {job.id for job in self._all.things[Job].values() if job.workload_id == workload_id}
                stored = tuple(line for line in stored if line.usage.job_id in jobs)
        lines = [it for it in stored if _belongs(it, job_id, project_id) and (it.usage.is_idle or not idle)]
        held: dict[str, int] = {}
        for line in lines:
            usage = line.usage
            held[usage.resource] = held.get(usage.resource, 0) + usage.milli * (usage.to_ns - usage.from_ns)
        all_measured = bool(lines) and all(line.usage.evidence is Evidence.MEASURED for line in lines)
        return LedgerTotals(
            held_milli_ns=tuple(sorted(held.items())),
            amount_micro=sum(line.amount_micro for line in lines),
            energy_mj=sum(line.energy_mj for line in lines),
            carbon_mg=sum(line.carbon_mg for line in lines),
            evidence=Evidence.MEASURED if all_measured else Evidence.ESTIMATED,
            lines=len(lines),
        )

    def put_token_usages(self, usages: Sequence[TokenUsage]) -> tuple[TokenUsage, ...]:
        """Those of these that were not in the books before; all are there now, each once."""
        with self._lock:
            stored = self._all.token_usages
            found = tuple({usage.id: usage for usage in usages if usage.id not in stored}.values())
            stored.update({usage.id: usage for usage in found})
            return found

    def token_usages(
        self, *, project_id: ProjectId = ProjectId(""), cursor: str = "", limit: int = 100
    ) -> Page[TokenUsage]:
        """What requests took, in the order in which they were stored. Raises: InvalidRequest for a bad cursor."""
        after = from_cursor(cursor, int) if cursor else 0
        with self._lock:
            numbered = list(enumerate(self._all.token_usages.values(), 1))
        found = [(n, usage) for n, usage in numbered if n > after and project_id in ("", usage.project_id)]
        return Page(
            items=tuple(usage for _, usage in found[:limit]),
            next_cursor=to_cursor(found[limit - 1][0]) if len(found) > limit else "",
        )

    def put_decisions(self, decisions: Sequence[Decision]) -> int:
        """How many of these were not in the books before; all are there now, each once."""
        with self._lock:
            before = len(self._all.decisions)
            for decision in decisions:
                self._all.decisions.setdefault(decision.id, decision)
            return len(self._all.decisions) - before

    def decisions(
        self, *, project_ids: Sequence[ProjectId] = (), model: str = "", rule: str = "", action: str = "",
        cursor: str = "", limit: int = 100,
    ) -> Page[Decision]:  # fmt: skip
        """What guardrails decided, newest first. Raises: InvalidRequest for a bad cursor."""
        before = from_cursor(cursor, int) if cursor else 1 << 62
        with self._lock:
            numbered = list(enumerate(self._all.decisions.values(), 1))[::-1]
        found = [
            (n, one) for n, one in numbered
            if n < before and (not project_ids or one.project_id in project_ids)
            and model in ("", one.model) and rule in ("", one.rule) and action in ("", one.action)
        ]  # fmt: skip
        return Page(
            items=tuple(one for _, one in found[:limit]),
            next_cursor=to_cursor(found[limit - 1][0]) if len(found) > limit else "",
        )

    def served(self, *, project_id: ProjectId) -> tuple[ServedTotals, ...]:
        """What the services of a project answered, by service and model, in order; whoever asked."""
        with self._lock:
            mine = {one.id for one in self._all.things[Workload].values() if one.project_id == project_id}
            of_job = {job.id: job.workload_id for job in self._all.things[Job].values() if job.workload_id in mine}
            stored = [one for one in self._all.token_usages.values() if one.job_id in of_job]
        groups: dict[tuple[WorkloadId, str], list[TokenUsage]] = {}
        for usage in stored:
            groups.setdefault((of_job[usage.job_id], usage.model), []).append(usage)
        return tuple(
            ServedTotals(
                workload_id=workload_id,
                model=model,
                requests=len(usages),
                prompt_tokens=sum(one.prompt_tokens for one in usages),
                completion_tokens=sum(one.completion_tokens for one in usages),
            )
            for (workload_id, model), usages in sorted(groups.items())
        )

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
        with self._lock:
            stored = tuple(self._all.token_usages.values())
        groups: dict[tuple[str, ...], list[TokenUsage]] = {}
        for usage in stored:
            if (
                job_id in ("", usage.job_id)
                and project_id in ("", usage.project_id)
                and token_id in ("", usage.token_id)
                and usage.at_ns >= since_ns
            ):
                whole = {"model": usage.model, "key": usage.token_id, "user": usage.user, "label": usage.label}
                groups.setdefault(tuple(whole[one] if one in by else "" for one in TOKEN_GROUPS), []).append(usage)
        return tuple(
            TokenTotals(
                model=model,
                token_id=TokenId(token),
                user=user,
                label=label,
                requests=len(usages),
                estimated=sum(usage.is_estimated for usage in usages),
                prompt_tokens=sum(usage.prompt_tokens for usage in usages),
                completion_tokens=sum(usage.completion_tokens for usage in usages),
                amount_pico=sum(usage.amount_pico for usage in usages),
            )
            for (model, token, user, label), usages in sorted(groups.items())
        )

    def rentals(self, *, since_ns: int = 0) -> tuple[Rental, ...]:
        """Rented instances that are not over, and those that ended at ``since_ns`` or later, by id."""
        return self._sorted(Rental, lambda it: not it.ended_ns or it.ended_ns >= since_ns, key=lambda it: it.id)

    def revisions(self, workload_id: WorkloadId) -> tuple[Rollout, ...]:
        """All rollouts of the service of which a workload is a revision, by revision; none: it was never updated."""
        of_it = self._sorted(Rollout, lambda it: workload_id in (it.first_id, it.workload_id), key=lambda it: it.id)
        firsts = {it.first_id for it in of_it}
        return self._sorted(Rollout, lambda it: it.first_id in firsts, key=lambda it: it.revision)

    def idempotent(self, principal_id: PrincipalId, key: str) -> IdempotencyRecord | None:
        return self._all.idempotency.get((principal_id, key))

    # Tenants, secrets and artifacts

    def put_organization(self, organization: Organization) -> None:
        with self._lock:
            self._all.organizations[organization.id] = organization

    def put_project(self, project: Project) -> None:
        with self._lock:
            self._all.projects[project.id] = project

    def put_principal(self, principal: Principal) -> None:
        with self._lock:
            self._all.principals[principal.id] = principal

    def put_token(self, token: Token) -> None:
        with self._lock:
            self._all.tokens[token.id] = token

    def put_site(self, site: Site) -> None:
        with self._lock:
            self._all.sites[site.id] = site

    def put_outpost(self, outpost: Outpost) -> None:
        with self._lock:
            self._all.outposts[outpost.id] = outpost

    def put_secret(self, secret: Secret) -> None:
        with self._lock:
            self._all.secrets[secret.project_id, secret.name] = secret

    def delete_secret(self, project_id: ProjectId, name: str) -> bool:
        """Whether there was one."""
        with self._lock:
            return self._all.secrets.pop((project_id, name), None) is not None

    def put_artifact(self, artifact: Artifact) -> Artifact:
        """The artifact with the next free version of its name; its own ``version`` is ignored."""
        with self._lock:
            if artifact.id in self._all.artifacts:
                raise Stale("It exists already.")
            newest = self.find_artifact(artifact.project_id, artifact.name)
            stored = replace(artifact, version=newest.version + 1 if newest else 1)
            self._all.artifacts[stored.id] = stored
            return stored

    def put_volume(self, volume: Volume) -> None:
        with self._lock:
            self._all.volumes[volume.project_id, volume.name] = volume

    def delete_volume(self, project_id: ProjectId, name: str) -> bool:
        """Whether there was one."""
        with self._lock:
            return self._all.volumes.pop((project_id, name), None) is not None

    def put_habit(self, habit: Habit) -> None:
        with self._lock:
            self._all.habits[habit.project_id, habit.service] = habit

    def add_dataset(self, dataset: DataSet) -> DataSet:
        """The data set with the next version of its name that was never given; its own ``version`` is ignored."""
        with self._lock:
            if dataset.id in self._all.datasets:
                raise Stale("It exists already.")
            given = (
                one.version
                for one in self._all.datasets.values()
                if (one.project_id, one.name) == (dataset.project_id, dataset.name)
            )
            stored = replace(dataset, version=max(given, default=0) + 1)
            self._all.datasets[stored.id] = stored
            return stored

    def put_dataset(self, dataset: DataSet) -> None:
        """Replace the one of that id, whose name and version stay."""
        with self._lock:
            if dataset.id in self._all.datasets:
                self._all.datasets[dataset.id] = dataset

    def organizations(self) -> tuple[Organization, ...]:
        return self._by_key(self._all.organizations)

    def projects(self) -> tuple[Project, ...]:
        return self._by_key(self._all.projects)

    def sites(self) -> tuple[Site, ...]:
        return self._by_key(self._all.sites)

    def outposts(self) -> tuple[Outpost, ...]:
        return self._by_key(self._all.outposts)

    def principals(self) -> tuple[Principal, ...]:
        return self._by_key(self._all.principals)

    def tokens(self) -> tuple[Token, ...]:
        return self._by_key(self._all.tokens)

    def token(self, token_id: TokenId) -> Token | None:
        return self._all.tokens.get(token_id)

    def secret(self, project_id: ProjectId, name: str) -> Secret | None:
        return self._all.secrets.get((project_id, name))

    def secrets(self, project_id: ProjectId) -> tuple[Secret, ...]:
        """A project's secrets, by name."""
        return tuple(secret for secret in self._by_key(self._all.secrets) if secret.project_id == project_id)

    def artifact(self, artifact_id: ArtifactId) -> Artifact | None:
        return self._all.artifacts.get(artifact_id)

    def find_artifact(self, project_id: ProjectId, name: str, version: int = 0) -> Artifact | None:
        """That version of the named artifact, or the newest when ``version`` is zero."""
        found = (it for it in self.artifacts(project_id) if it.name == name and version in (0, it.version))
        return next(found, None)

    def artifacts(self, project_id: ProjectId) -> tuple[Artifact, ...]:
        """A project's artifacts, by name, newest version first."""
        with self._lock:
            found = [artifact for artifact in self._all.artifacts.values() if artifact.project_id == project_id]
        return tuple(sorted(found, key=lambda artifact: (artifact.name, -artifact.version)))

    def volume(self, project_id: ProjectId, name: str) -> Volume | None:
        return self._all.volumes.get((project_id, name))

    def volumes(self, project_id: ProjectId) -> tuple[Volume, ...]:
        """A project's volumes, by name."""
        return tuple(volume for volume in self._by_key(self._all.volumes) if volume.project_id == project_id)

    def habits(self) -> tuple[Habit, ...]:
        """What is remembered of services, by project and name."""
        return self._by_key(self._all.habits)

    def dataset(self, dataset_id: DataSetId) -> DataSet | None:
        return self._all.datasets.get(dataset_id)

    def find_dataset(self, project_id: ProjectId, name: str, version: int = 0) -> DataSet | None:
        """That version of the named data set, or the newest when ``version`` is zero; none that was deleted."""
        found = (it for it in self.datasets(project_id) if it.name == name and version in (0, it.version))
        return next(found, None)

    def datasets(self, project_id: ProjectId) -> tuple[DataSet, ...]:
        """A project's data sets that were not deleted, by name, newest version first."""
        with self._lock:
            found = [one for one in self._all.datasets.values() if one.project_id == project_id and not one.deleted_ns]
        return tuple(sorted(found, key=lambda dataset: (dataset.name, -dataset.version)))

    def unscanned_datasets(self) -> tuple[DataSet, ...]:
        """Those of all projects whose files are still to be read, by id."""
        return tuple(
            one for one in self._by_key(self._all.datasets) if one.state is DataSetState.SCANNING and not one.deleted_ns
        )

    def model(self, project_id: ProjectId, name: str) -> Model | None:
        """The model of that name, also one that was deleted."""
        return next((one for one in self.models(project_id) if one.name == name), None)

    def models(self, project_id: ProjectId) -> tuple[Model, ...]:
        """A project's models, by name, those that were deleted among them."""
        return self._sorted(Model, lambda it: it.project_id == project_id, key=lambda it: it.name)

    def model_versions(self, model_id: ModelId) -> tuple[ModelVersion, ...]:
        """A model's versions, newest first, those that were deleted among them."""
        return self._sorted(ModelVersion, lambda it: it.model_id == model_id, key=lambda it: -it.number)

    def project_model_versions(self, project_id: ProjectId, *, digest: str = "") -> tuple[ModelVersion, ...]:
        """The versions of all models of a project that were not deleted, oldest first; with ``digest``, of that."""

        def wanted(it: ModelVersion) -> bool:
            return it.project_id == project_id and not it.deleted_ns and digest in ("", it.digest)

        return self._sorted(ModelVersion, wanted, key=lambda it: it.id)

    def model_versions_of(self, job_ids: Sequence[JobId]) -> tuple[ModelVersion, ...]:
        """What these jobs made that was not deleted, oldest first."""
        return self._sorted(
            ModelVersion, lambda it: it.lineage.job_id in job_ids and not it.deleted_ns, key=lambda it: it.id
        )

    # Whether it is sound

    def integrity(self) -> tuple[str, ...]:
        """What is wrong, in sentences; there is no way for anything to be."""
        return ()

    # Looking into the contents

    def _of(self, kind: type[V]) -> dict[Any, V]:
        things: dict[Any, V] = self._all.things[kind]
        return things

    def _sorted(self, kind: type[V], keep: Callable[[V], bool], *, key: Callable[[V], _Comparable]) -> tuple[V, ...]:
        with self._lock:
            return tuple(sorted((thing for thing in self._of(kind).values() if keep(thing)), key=key))

    def _by_key(self, values: dict[Any, V]) -> tuple[V, ...]:
        with self._lock:
            return tuple(value for _, value in sorted(values.items(), key=lambda item: item[0]))

    def _row(self, job: Job) -> JobRow:
        workload = self._of(Workload)[job.workload_id]
        return JobRow(job=job, workload=workload, reason=self._all.reasons.get(job.id))


def _place(row: JobRow) -> tuple[int, str, int]:
    return row.workload.submitted_ns, row.workload.id, row.job.index


def _matches(row: JobRow, where: JobFilter) -> bool:
    workload, job = row.workload, row.job
    return (
        (not where.project_ids or workload.project_id in where.project_ids)
        and (not where.states or job.state in where.states)
        and (not where.kinds or workload.spec.kind in where.kinds)
        and (not where.workload_id or job.workload_id == where.workload_id)
        and (not where.name or workload.spec.name == where.name)
        and workload.spec.name.startswith(where.text)
        and job.id.startswith(where.id_prefix)
    )


def _belongs(line: LedgerLine, job_id: JobId, project_id: ProjectId) -> bool:
    return (not job_id or line.usage.job_id == job_id) and (not project_id or line.usage.project_id == project_id)
