"""The control plane as the API sees it: commands that become facts, questions that get answers. Thread-safe."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tidemill import __version__
from tidemill.control.answers import Receipt, Status, Why, mend_for, receipt_of, with_word
from tidemill.control.blobs import BlobStore
from tidemill.control.clock import SteadyClock, newest_instant
from tidemill.control.cloudsettings import CloudSettings
from tidemill.control.datasets import DataSets
from tidemill.control.driver import Driver, world_from
from tidemill.control.enginework import Stranger
from tidemill.control.forecast import quote, why
from tidemill.control.identity import Directory, Identity
from tidemill.control.launching import build_launch, find_input
from tidemill.control.logs import LogStore
from tidemill.control.relay import Relay
from tidemill.control.renting import Renting
from tidemill.control.replicas import Candidate
from tidemill.control.replicating import Scaler
from tidemill.control.serving import Serving
from tidemill.control.settings import Settings
from tidemill.control.siteoptions import sites_open_to
from tidemill.control.sites import Sites
from tidemill.control.steering import (
    Wanted,
    check_dependency,
    check_group,
    check_reservation,
    check_tree,
    choose_nodes,
    find_node,
    is_of,
    limits_told,
    planned_reservation,
    queues_from,
    standing,
    with_limits,
)
from tidemill.control.turns import Recorder, TurnLoop
from tidemill.control.vault import Vault
from tidemill.core.admission import why_refused
from tidemill.core.fairness import QueueShare
from tidemill.core.world import World
from tidemill.errors import (
    Conflict,
    Fenced,
    Forbidden,
    IdempotencyMismatch,
    Infeasible,
    InvalidRequest,
    InvalidSpec,
    NotFound,
    Unavailable,
)
from tidemill.model.artifact import Artifact
from tidemill.model.events import (
    Checkpointed,
    Fact,
    Marking,
    MetersRead,
    NodeJoined,
    NodeMarked,
    NodeWentAway,
    ProjectOpened,
    QueueSet,
    ReservationCancelled,
    ReservationMade,
    Sampled,
    StopRequested,
    Submitted,
)
from tidemill.model.fleet import Node, Site
from tidemill.model.ids import (
    ArtifactId,
    JobId,
    LaunchId,
    PrincipalId,
    ProjectId,
    ReservationId,
    TokenId,
    WorkloadId,
    job_of_launch,
    queue_id,
    sortable_id,
)
from tidemill.model.job import Allocation, AllocationState, Attempt, Cause, Job, JobState, Workload
from tidemill.model.ledger import RateCard
from tidemill.model.plan import LaunchSpec, Quote, Reason
from tidemill.model.queue import Queue
from tidemill.model.replica import Replica
from tidemill.model.reservation import Reservation
from tidemill.model.spec import SECRET_NAME, Dependency, WorkloadSpec
from tidemill.model.tenant import Project, Scope, Token
from tidemill.ports import Engine, IdempotencyRecord, JobFilter, Provisioner, Store
from tidemill.wire import instant_text
from tidemill.wire.requests import QueueIn, ReservationIn

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)
_RECORDING_BEGINS_S: Final = 30.0
RECORDED_RESPONSE = msgspec.json.Decoder(list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """What a runner should do: go on, or stop its worker with that grace."""

    stop: bool
    grace_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """A waiting job. ``position`` counts from 1 in the order in which jobs would be tried.

    It is zero while something else than its turn is waited for. ``starts_by_ns`` is by when it starts at the latest,
    for the one job that others may not delay; zero for the rest.
    """

    position: int
    job: Job
    workload: Workload
    reason: Reason | None
    starts_by_ns: int = 0
    sites: tuple[str, ...] = ()
    """Where it may be put, by name; empty where there is one site only."""


class ControlPlane:
    """One installation's control plane. ``start`` begins to act; ``close`` lets go, and what runs goes on."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        engine: Engine | None,
        site: Site,
        rates: RateCard,
        directory: Directory,
        vault: Vault,
        clock: Callable[[], int],
        sample: Callable[[], Sampled | None] = lambda: None,
        energy_evidence: str = "estimated",
        on_fenced: Callable[[], None] = lambda: None,
        holder: str = "",
        candidate: Candidate | None = None,
        monotonic: Callable[[], int] = time.monotonic_ns,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``candidate`` is what makes sure that this one leads, where others may; ``holder`` is its name.

        ``clock`` gives instants and ``monotonic`` lengths of time, both in ns; ids are made of ``entropy``, which is
        told how many bytes of it. A ``SteadyClock`` says nothing earlier than what is stored.
        """
        self.settings = settings
        self.store = store
        self.site = site
        self.directory = directory
        self.logs = LogStore(settings.common / "logs")
        self.blobs = BlobStore(settings.common / "blobs")
        self.relay = Relay()
        self._vault = vault
        self._clock = clock
        self._entropy = entropy
        self._sample = sample
        self._engine = engine
        self._rates = rates
        self._energy_evidence = energy_evidence
        self._projects: dict[ProjectId, Project] = {project.id: project for project in store.projects()}
        epoch = store.lead(holder=holder or secrets.token_hex(8))
        self._candidate = candidate
        if candidate is not None:
            candidate.lead(epoch)
        stored = store.load()
        if isinstance(clock, SteadyClock):
            clock.not_before(newest_instant(store, stored))
        self._turns = TurnLoop(
            Driver(self._load_world(), settings.policy),
            store,
            epoch=epoch,
            last_seq=stored.last_seq,
            clock=clock,
            obey=lambda commands: self.sites.obey(commands),
            reload=self._load_world,
            on_fenced=on_fenced,
        )
        self.sites = Sites(
            site,
            engine,
            store,
            directory,
            clock=clock,
            world=lambda: self.world,
            build=self._build_launch,
            tell=self._turns.put,
            met=self._let_stranger_in,
            epoch=epoch,
            monotonic=monotonic,
        )
        self.data = DataSets(
            store,
            self.blobs,
            vault,
            folder=settings.home,
            home=site.id,
            clock=clock,
            sites=self.sites.all,
            workloads=lambda: tuple(self.world.workloads.copy().values()),
            elsewhere=self.sites.read_file,
        )
        self.serving = Serving(
            store,
            directory,
            world=lambda: self.world,
            projects=lambda: self._projects,
            scaler=Scaler(world=lambda: self.world, tell=self._turns.put, clock=clock),
        )
        self.renting: Renting | None = None
        """What rents machines, when this installation does."""
        self._epoch = epoch
        self._recorder: Recorder | None = None
        self._in_flight: dict[tuple[str, str], tuple[str, Future[tuple[Workload, ...]]]] = {}
        self._lock = threading.Lock()
        self._steering = threading.Lock()
        """Held while a change of the quota tree or of reservations is checked and made, one at a time."""
        self.beats: dict[LaunchId, tuple[int, int, int]] = {}
        """The last beat of each launch: when, CPU time used (ns), resident memory (bytes)."""
        self._closing = threading.Event()
        self._sampler = threading.Thread(target=self._sample_forever, name="sample", daemon=True)
        self._remember_launches()

    @property
    def world(self) -> World:
        """The world, for reading only: it changes under the reader, one value at a time."""
        return self._turns.driver.world

    @property
    def last_seq(self) -> int:
        """The number of the newest event."""
        return self._turns.last_seq

    def now(self) -> int:
        """The time of day in ns since 1970, as this control plane keeps it."""
        return self._clock()

    def start(self) -> None:
        """Join the engine's machines and begin to take turns and act on them."""
        self._turns.start()
        now = self._clock()
        if self._engine is not None:
            nodes = self._engine.nodes()
            self._turns.put([NodeJoined(at_ns=now, node=node) for node in nodes]).result(timeout=60)
        self.sites.start()
        self.data.start()
        if self.renting is not None:
            self.renting.start()
        self.serving.scaler.start()
        self._sampler.start()

    def close(self) -> None:
        """Stop acting. With nothing running, the machines leave, so that no time counts while they are away."""
        self._closing.set()
        self.serving.scaler.close()
        if self.renting is not None:
            self.renting.close()
        self.data.close()
        self.sites.close()
        world = self.world
        if not world.allocations:
            gone = [NodeWentAway(at_ns=self._clock(), node_id=node, detail="shut down") for node in list(world.nodes)]
            try:
                self._turns.put(gone).result(timeout=10)
            except (Unavailable, TimeoutError, Fenced):
                self._closing.set()
        self._turns.close()
        self.logs.shut()

    def rent(self, provisioner: Provisioner, settings: CloudSettings) -> None:
        """Have machines rented from there, from ``start`` on."""
        self.renting = Renting(
            provisioner,
            settings,
            store=self.store,
            turns=self._turns,
            sites=self.sites,
            policy=self.settings.policy,
            epoch=self._epoch,
            clock=self._clock,
        )

    def replicas(self) -> tuple[Replica, ...]:
        """The control planes of this installation, the leader among them; none where it has only one."""
        return self._candidate.replicas if self._candidate is not None else ()

    def check_leads(self) -> None:
        """Raises: Unavailable when another control plane may lead by now, and this one's answers may be old."""
        if self._candidate is not None and not self._candidate.is_sure():
            raise Unavailable("The database does not confirm that this control plane leads.", mend="Try again.")

    def check_serves(self) -> None:
        """Raises: Unavailable when requests cannot be served at the moment."""
        self.check_leads()
        self.store.organizations()

    def watch(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Have ``callback`` called with the newest event's number after each commit; returns how to stop it."""
        return self._turns.watch(callback)

    # -- who ------------------------------------------------------------------------------------------------------

    def authenticate(self, token: str) -> Identity:
        """Whose token this is. Raises: Unauthorized."""
        return self.directory.authenticate(token, now=self._clock())

    def project(self, identity: Identity, name: str = "") -> Project:
        """The project of that name or id that the identity may see; without a name its only one, or ``default``.

        Raises: NotFound.
        """
        visible = [
            project
            for project in self._projects.values()
            if project.organization_id == identity.organization_id and identity.may_see(project.id)
        ]
        wanted = name or (visible[0].name if len(visible) == 1 else "default")
        for project in visible:
            if wanted in (project.name, project.id):
                return project
        names = ", ".join(sorted(project.name for project in visible)) or "none"
        raise NotFound(f"There is no project {wanted}.", field="project", value=wanted, mend=f"Projects: {names}.")

    def projects(self, identity: Identity) -> tuple[Project, ...]:
        """The projects that the identity may see."""
        return tuple(
            project
            for project in self._projects.values()
            if project.organization_id == identity.organization_id and identity.may_see(project.id)
        )

    def create_project(
        self, identity: Identity, name: str, *, limit_gpu_milli: int = 0, limit_cpu_milli: int = 0
    ) -> Project:
        """A new project, or the one of that name; its queue has these limits from now on, zero being none.

        Raises: Forbidden, InvalidRequest when another queue has that name.
        """
        identity.require(Scope.ADMIN)
        with self._steering:
            known = next((p for p in self.projects(identity) if p.name == name), None)
            now = self._clock()
            project = known or Project(
                id=ProjectId(sortable_id("prj", now=now, entropy=secrets.randbits(40))),
                organization_id=identity.organization_id,
                name=name,
                created_ns=now,
            )
            facts: list[Fact] = [ProjectOpened(at_ns=now, project=project)] if known is None else []
            queue = self.world.queues.get(queue_id(project.id))
            if queue is not None or limit_gpu_milli or limit_cpu_milli:
                before = queue or Queue(id=queue_id(project.id), name=name, project_id=project.id)
                limited = with_limits(before, gpu_milli=limit_gpu_milli, cpu_milli=limit_cpu_milli)
                self._check_tree(identity, [limited], [project])
                facts.append(QueueSet(at_ns=now, queue=limited))
            if known is None:
                self.store.put_project(project)
                self._projects[project.id] = project
            if facts:
                self._turns.put(facts).result(timeout=30)
        return project

    def create_token(
        self, identity: Identity, *, name: str, scopes: tuple[Scope, ...], project: ProjectId, expires_ns: int
    ) -> tuple[Token, str]:
        """A new token of the same principal and its secret, shown this once. Raises: Forbidden."""
        principal = self.directory.principal(identity.principal_id)
        if principal is None:
            raise NotFound("This token's principal is not known.", field="principal", value=identity.principal_id)
        token, secret = self.directory.mint(
            identity,
            principal,
            name=name,
            scopes=scopes,
            project=project,
            expires_ns=expires_ns,
            now=self._clock(),
        )
        self.store.put_token(token)
        self.directory.remember(token, principal)
        return token, secret

    def revoke_token(self, identity: Identity, token_id: TokenId) -> None:
        """Nothing; the token opens nothing from now on. Raises: NotFound."""
        identity.require(Scope.ADMIN)
        token = self.directory.revoked(token_id, identity.organization_id, now=self._clock())
        principal = self.directory.principal(token.principal_id)
        self.store.put_token(token)
        if principal is not None:
            self.directory.remember(token, principal)

    def put_secret(self, project: Project, name: str, value: str) -> None:
        """Nothing; the secret is stored sealed. Raises: InvalidRequest for a name that no variable could have."""
        if not SECRET_NAME.fullmatch(name):
            raise InvalidRequest(
                "A secret's name is letters, digits and _, not beginning with a digit.", field="name", value=name
            )
        self.store.put_secret(self._vault.seal(project.id, name, value, now=self._clock()))

    def secret_values(self, launch_id: LaunchId) -> dict[str, str]:
        """The values of the secrets that a live launch's spec names. Raises: NotFound."""
        _, _, job, workload = self.launch(launch_id)
        values = {}
        for name in workload.spec.secrets:
            secret = self.store.secret(job.project_id, name)
            if secret is None:
                raise NotFound(f"There is no secret {name}.", field="secrets", value=name)
            values[name] = self._vault.open(secret)
        return values

    # -- work -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        identity: Identity,
        project: Project,
        specs: Sequence[WorkloadSpec],
        *,
        idempotency_key: str = "",
        request_digest: str = "",
    ) -> Future[tuple[Workload, ...]]:
        """The stored workloads, all or none, when they are durable.

        Raises, from the call: Infeasible, InvalidSpec, IdempotencyMismatch. Through the future: Unavailable, …
        """
        if not idempotency_key:
            return self._submit(identity, project, specs, Future())
        answer: Future[tuple[Workload, ...]] = Future()
        key = (str(identity.principal_id), idempotency_key)
        with self._lock:  # whoever comes while this one is on its way gets the same answer
            if key in self._in_flight:
                return self._same(self._in_flight[key], idempotency_key, request_digest)
            self._in_flight[key] = (request_digest, answer)
        answer.add_done_callback(lambda _: self._landed(key))
        try:
            known = self._recorded(identity, idempotency_key, request_digest)
            if known is not None:
                answer.set_result(known)
                return answer
            record = IdempotencyRecord(
                principal_id=identity.principal_id,
                key=idempotency_key,
                request_digest=request_digest,
                response="",
                created_ns=self._clock(),
            )
            return self._submit(identity, project, specs, answer, record)
        except Exception as error:
            answer.set_exception(error)
            raise

    def _submit(
        self,
        identity: Identity,
        project: Project,
        specs: Sequence[WorkloadSpec],
        answer: Future[tuple[Workload, ...]],
        record: IdempotencyRecord | None = None,
    ) -> Future[tuple[Workload, ...]]:
        """``answer``, which is given when the workloads, and ``record`` with their ids, are durable."""
        now = self._clock()
        specs = [self._checked(spec, project, now=now) for spec in specs]
        self._check_room(project, sum(spec.job_count for spec in specs))
        entropy = self._entropy(5 * len(specs))
        ids = [
            WorkloadId(sortable_id("wl", now=now, entropy=int.from_bytes(entropy[at : at + 5], "big")))
            for at in range(0, len(entropy), 5)
        ]
        if any(spec.after for spec in specs):
            specs = self._follow(specs, ids, project)
        workloads = tuple(
            Workload(
                id=own_id,
                organization_id=project.organization_id,
                project_id=project.id,
                principal_id=identity.principal_id,
                spec=spec,
                submitted_ns=now,
            )
            for own_id, spec in zip(ids, specs, strict=True)
        )

        def done(stored: Future[None]) -> None:
            if (error := stored.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(workloads)

        records = []
        if record is not None:
            records.append(replace(record, response=msgspec.json.encode(ids).decode()))
        facts = [Submitted(at_ns=now, workload=workload) for workload in workloads]
        self._turns.put(facts, records).add_done_callback(done)
        return answer

    def _landed(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._in_flight.pop(key, None)

    def stop(self, identity: Identity, job_ids: Sequence[JobId]) -> Future[None]:
        """Nothing, when it is recorded that these jobs are to end."""
        now = self._clock()
        return self._turns.put([StopRequested(at_ns=now, job_id=job, by=identity.name) for job in job_ids])

    def must_look(self, project: Project, specs: Sequence[WorkloadSpec]) -> bool:
        """Whether submitting these waits for the store or for a turn, so that it is not for an event loop."""
        return (
            self.renting is not None
            or self._is_capped(project)
            or any(spec.inputs or spec.secrets or spec.workdir or spec.after or spec.group for spec in specs)
            or any(spec.data or spec.volumes for spec in specs)
        )

    def checkpointed(self, identity: Identity, job_id: JobId, detail: str) -> Future[None]:
        """Nothing, when it is recorded that the job's work up to now is safe.

        Raises: NotFound when nothing of it runs, Fenced for a token of an earlier attempt.
        """
        attempt = self.world.attempts.get(job_id)
        held = self.world.workers_of(attempt) if attempt is not None else ()
        if not held:
            raise NotFound("Nothing of that job runs.", field="job", value=job_id)
        if identity.launch_id and identity.launch_id not in {worker.id for worker in held}:
            raise Fenced("A newer attempt of the job runs.", field="job", value=job_id)
        first = min(held, key=lambda worker: worker.rank)
        fact = Checkpointed(at_ns=self._clock(), launch_id=first.id, fence=first.fence, detail=detail)
        return self._turns.put([fact])

    def administer(self, identity: Identity) -> None:
        """Nothing. Raises: Forbidden when the identity may not change what all projects share."""
        administer(identity)

    def tell(self, facts: Sequence[Fact]) -> Future[None]:
        """Nothing, when what follows from these facts is stored."""
        return self._turns.put(facts)

    def quote(self, project: Project, spec: WorkloadSpec) -> Quote:
        """What would happen if it were submitted now: the next turn, taken and undone."""
        now = self._clock()
        spec = self._resolve_inputs(spec, project)
        if spec.data or spec.volumes:
            spec = self.data.resolve(spec, project)
        if spec.after:
            [spec] = self._follow([spec], [WorkloadId("")], project)
        self._check_times(spec, project, now=now)
        workload = Workload(
            id=WorkloadId(sortable_id("wl", now=now, entropy=secrets.randbits(40))),
            organization_id=project.organization_id,
            project_id=project.id,
            principal_id=next(iter(self.directory.all())).principal_id,
            spec=spec,
            submitted_ns=now,
        )
        return quote(self._turns, workload, self.settings.policy, now=now)

    def why(self, job_id: JobId) -> Why:
        """Why a job is where it is. Raises: NotFound."""
        row = self.store.job(job_id)
        if row is None:
            raise NotFound("There is no such job.", field="job", value=job_id)
        answer = why(self._turns, row, self.settings.policy, now=self._clock())
        if answer.state != JobState.STARTING.value:
            return answer
        attempt = self.world.attempts.get(job_id)
        workers = self.world.workers_of(attempt) if attempt is not None else ()
        return with_word(answer, self.sites.word_of(worker.id for worker in workers))

    def receipt(self, job_id: JobId) -> Receipt:
        """What a job took and cost, as far as it is metered. Raises: NotFound."""
        row = self.store.job(job_id)
        if row is None:
            raise NotFound("There is no such job.", field="job", value=job_id)
        now = self._clock()
        if job_id in self.world.jobs:
            self._turns.put([MetersRead(at_ns=now, job_id=job_id)]).result(timeout=30)
        held = self.store.allocations(job_id)
        nodes, sites = self.world.nodes, self.world.sites
        at = dict.fromkeys(nodes[worker.node_id].site_id for worker in held if worker.node_id in nodes)
        ran_at = [sites[site_id] for site_id in at] or [self.site]
        return receipt_of(
            row.job,
            row.workload,
            self.store.ledger_totals(job_id=job_id),
            cards=[self.world.card_of(site.id) for site in ran_at],
            sites=ran_at,
            held_ns=sum((worker.released_ns or now) - worker.held_ns for worker in held),
            placed_ns=min((worker.held_ns for worker in held), default=0),
            now=now,
        )

    def status(self) -> Status:
        """The cloud at a glance."""
        world = self.world
        counts: dict[str, int] = {}
        for job in world.jobs.copy().values():
            counts[job.state.value] = counts.get(job.state.value, 0) + 1
        fleet = world.fleet
        nodes = tuple(world.nodes.copy().values())
        runs = [one.id for one in world.allocations.copy().values() if one.state is AllocationState.ACTIVE]
        has_runners = self._engine is None or self._engine.capabilities.name != "simulated"
        free_gpu = int(fleet.gpu_free.clip(min=0).sum()) if fleet.gpu_free.size else 0
        return Status(
            version=__version__,
            site=self.site,
            nodes=nodes,
            cpu_milli=sum(node.cpu_milli for node in nodes),
            free_cpu_milli=int(fleet.cpu_free.clip(min=0).sum()),
            gpu_milli=sum(node.gpu_milli for node in nodes),
            free_gpu_milli=free_gpu,
            jobs=tuple(sorted(counts.items())),
            energy=self._energy_evidence,
            rate_card=self._rates.id,
            gateway_url=self.settings.gateway_url,
            strangers=len(self.sites.strangers()),
            workers=len(runs),
            heard=sum(launch in self.beats for launch in runs) if has_runners else len(runs),
        )

    def waiting(self, identity: Identity, *, project: ProjectId = ProjectId(""), limit: int) -> tuple[Queued, ...]:
        """Waiting jobs that the identity may see, in the order in which they would be tried; then those that wait for
        something else than their turn, oldest first."""
        own = {one.id for one in self.projects(identity) if project in ("", one.id)}
        now, enough = self._clock(), limit if len(own) == len(self._projects) else None

        def look(world: World) -> tuple[Queued, ...]:
            order = enumerate(world.queue.in_order(enough, now=now), 1)
            tried = ((position, world.jobs[job_id]) for position, (_, job_id) in order)
            apart = (world.jobs[job_id] for job_id in {**world.promises, **world.delayed, **world.parked})
            later = ((0, job) for job in sorted(apart, key=lambda job: (job.submitted_ns, job.id)))
            seen = ((position, job) for position, job in chain(tried, later) if job.project_id in own)
            plan = world.held_back
            return tuple(
                Queued(
                    position=position,
                    job=job,
                    workload=world.workloads[job.workload_id],
                    reason=world.reasons.get(job.id),
                    starts_by_ns=plan.at_ns if plan is not None and plan.job_id == job.id else 0,
                    sites=sites_open_to(world, world.line_of(job)),
                )
                for position, job in islice(seen, limit)
            )

        return self._look(look)

    # -- steering: the quota tree, times, machines ----------------------------------------------------------------

    def queues(self, identity: Identity) -> tuple[Queue, ...]:
        """The queues of the identity's organization, by name; those of its projects when it is bound to some."""
        mine = [queue for queue in self.world.queues.copy().values() if self._is_mine(identity, queue)]
        return tuple(sorted(mine, key=lambda queue: (queue.name, queue.id)))

    def share(self, identity: Identity) -> tuple[QueueShare, ...]:
        """Who has what, a row for each queue and project that the identity may see, parents before children."""
        projects = {project.id for project in self.projects(identity)}
        mine = {queue.id for queue in self.queues(identity)}
        rows = self._look(lambda world: world.quota.report())
        return tuple(row for row in rows if row.id in mine or row.project_id in projects)

    def set_queues(self, identity: Identity, given: Sequence[QueueIn]) -> tuple[Queue, ...]:
        """The organization's queues after these were added, or replaced those of their names: all or none.

        Raises: InvalidRequest that names the field, its value and the mend.
        """
        administer(identity)
        with self._steering:
            made = queues_from(
                given,
                known=self.queues(identity),
                projects=self.projects(identity),
                organization=identity.organization_id,
            )
            self._check_tree(identity, made, [])
            now = self._clock()
            self._turns.put([QueueSet(at_ns=now, queue=queue) for queue in made]).result(timeout=30)
        return self.queues(identity)

    def reserve(self, identity: Identity, project: Project | None, given: ReservationIn) -> Reservation:
        """A new reservation, for nobody without a project. Raises: InvalidRequest that names the field."""
        administer(identity)
        with self._steering:
            now, world = self._clock(), self.world
            if standing(self.reservations(identity), given.name, now=now) is not None:
                mend = "Choose another name, or cancel that one: tidemill reserve cancel."
                raise InvalidRequest("A reservation of that name stands.", field="name", value=given.name, mend=mend)
            planned = planned_reservation(
                given,
                identity=ReservationId(sortable_id("rsv", now=now, entropy=secrets.randbits(40))),
                project=project.id if project is not None else ProjectId(""),
                by=identity.name,
                now=now,
            )
            wanted = Wanted(count=given.nodes, names=given.node, gpus=given.gpus, labels=given.labels)
            mine = {one.id for one in self.reservations(identity)}
            made = replace(planned, node_ids=choose_nodes(world, planned, wanted, visible=mine, now=now))
            self._turns.put([ReservationMade(at_ns=now, reservation=made)]).result(timeout=30)
        return made

    def reservations(self, identity: Identity) -> tuple[Reservation, ...]:
        """Reservations with a window to come that the identity may see: those for nobody concern all."""
        now, visible = self._clock(), {project.id for project in self.projects(identity)}
        found = [
            one
            for one in self.world.reservations.copy().values()
            if (not one.project_id or one.project_id in visible) and one.window(after=now) is not None
        ]
        return tuple(sorted(found, key=lambda one: (one.starts_ns, one.name, one.id)))

    def cancel_reservation(self, identity: Identity, name: str) -> Reservation:
        """The reservation of that name or id as it was, which does not stand any more. Raises: NotFound."""
        administer(identity)
        now = self._clock()
        found = standing(self.reservations(identity), name, now=now)
        if found is None:
            raise NotFound(
                f"There is no reservation {name[:100]}.",
                field="reservation",
                value=name[:100],
                mend="See tidemill reserve list.",
            )
        self._turns.put([ReservationCancelled(at_ns=now, reservation_id=found.id)]).result(timeout=30)
        return replace(found, cancelled_ns=now)

    def mark(self, identity: Identity, name: str, marking: Marking, detail: str) -> Node:
        """The node after it was cordoned, drained or resumed. Raises: NotFound."""
        administer(identity)
        node = find_node(self.world, name)
        fact = NodeMarked(at_ns=self._clock(), node_id=node.id, marking=marking, by=identity.name, detail=detail)
        self._turns.put([fact]).result(timeout=30)
        return self.world.nodes.get(node.id, node)

    # -- runners --------------------------------------------------------------------------------------------------

    def launch(self, launch_id: LaunchId) -> tuple[Allocation, Attempt, Job, Workload]:
        """A live launch and what it belongs to. Raises: NotFound when it is over or was never."""
        world = self.world
        held = world.allocations.get(launch_id)
        if held is not None:
            attempt, job = world.attempts.get(held.job_id), world.jobs.get(held.job_id)
            workload = world.workloads.get(job.workload_id) if job is not None else None
            if attempt is not None and job is not None and workload is not None and attempt.id == held.attempt_id:
                return held, attempt, job, workload
        raise NotFound("That launch is over.", field="launch", value=launch_id)

    def report(self, launch_id: LaunchId, fence: int, facts: Sequence[Fact]) -> Future[Directive]:
        """What the runner should do, when what it reported is durable. Raises through the future: Fenced."""
        answer: Future[Directive] = Future()
        self.sites.leases.answered(launch_id)

        def done(stored: Future[None]) -> None:
            try:
                stored.result()
                answer.set_result(self._directive(launch_id, fence))
            except Exception as error:  # noqa: BLE001 - handed on to whoever asked
                answer.set_exception(error)

        try:
            self._directive(launch_id, fence)
        except Fenced as error:
            answer.set_exception(error)
            return answer
        self._turns.put(facts).add_done_callback(done)
        return answer

    def beat(self, launch_id: LaunchId, fence: int, *, cpu_used_ns: int, rss_bytes: int) -> Directive:
        """What the runner should do. Raises: Fenced when a newer attempt holds the lease."""
        self.beats[launch_id] = (self._clock(), cpu_used_ns, rss_bytes)
        self.sites.leases.answered(launch_id)
        return self._directive(launch_id, fence)

    def _directive(self, launch_id: LaunchId, fence: int) -> Directive:
        held = self.world.allocations.get(launch_id)
        if held is None:
            stored = self.store.allocation(launch_id)
            if stored is None:
                self._check_superseded(launch_id, fence)
            elif stored.fence == fence and stored.cause is Cause.COMPLETED:
                return Directive(stop=True, grace_ns=0)
            raise Fenced("This launch is over.", field="launch", value=launch_id)
        if held.fence != fence:
            raise Fenced("A newer attempt holds the lease.", field="fence", value=fence)
        if held.state is not AllocationState.DRAINING:
            return Directive(stop=False, grace_ns=0)
        job = self.world.jobs.get(held.job_id)
        workload = self.world.workloads.get(job.workload_id) if job is not None else None
        return Directive(stop=True, grace_ns=workload.spec.checkpoint_grace_ns if workload else 0)

    def _check_superseded(self, launch_id: LaunchId, fence: int) -> None:
        """Raises: Unavailable for a stranger, which is to go on, unless a newer attempt of its job has the lease."""
        attempt = self.world.attempts.get(job_of_launch(launch_id))
        if attempt is None or attempt.number <= fence:
            raise Unavailable("This launch is not known here.", field="launch", value=launch_id)

    def _let_stranger_in(self, stranger: Stranger) -> None:
        """Let the runner of a known job's launch ask what to do: it is told when a newer attempt has the lease."""
        row = self.store.job(stranger.job_id)
        if row is not None:
            self.directory.launch_tokens(
                stranger.launch_id,
                organization=row.workload.organization_id,
                project=row.workload.project_id,
                principal=row.workload.principal_id,
            )

    def strangers(self, identity: Identity) -> tuple[Stranger, ...]:
        """What the engine has and the store has never heard of. Raises: Forbidden."""
        administer(identity)
        return self.sites.strangers()

    def end_stranger(self, identity: Identity, launch_id: LaunchId, *, grace_ns: int) -> Stranger:
        """The stranger, which is stopped and then forgotten. Raises: Forbidden, NotFound."""
        administer(identity)
        return self.sites.end_stranger(launch_id, grace_ns=grace_ns)

    def copies_on(self, project_id: ProjectId, digest: str) -> tuple[str, ...]:
        """The names of the machines that have a copy of a project's data set, by the digest of its manifest."""
        world, wanted = self.world, f"{project_id}/{digest}"
        cached = world.cached.copy()
        return tuple(sorted(world.nodes[one].name for one, sets in cached.items() if wanted in sets))

    # -- artifacts and the gateway --------------------------------------------------------------------------------

    def output_folder(self, job: Job) -> Path:
        """Where a job's output folder is on this machine."""
        return self.settings.volume_root / job.project_id / job.id / "output"

    def create_artifact(self, project: Project, name: str, job: Job, path: str) -> Artifact:
        """A new version of the artifact, packed from ``path`` in the job's output folder.

        Raises: NotFound when there is nothing there, InvalidRequest when the path leaves the folder.
        """
        root = self.output_folder(job).resolve()
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise InvalidRequest("The path leaves the job's output folder.", field="path", value=path)
        if not folder.exists():
            raise NotFound(
                "The job's output folder has nothing there.", field="path", value=path, mend=self.where_output_is(job)
            )
        digest, size = self.blobs.pack(folder)
        now = self._clock()
        return self.store.put_artifact(
            Artifact(
                id=ArtifactId(sortable_id("art", now=now, entropy=secrets.randbits(40))),
                project_id=project.id,
                name=name,
                version=0,
                digest=digest,
                size=size,
                created_ns=now,
                job_id=job.id,
            )
        )

    def where_output_is(self, job: Job) -> str:
        """What to do when an output is not found here: it may be on the machine on which the job ran."""
        ran_on = {worker.node_id for worker in self.store.allocations(job.id)}
        names = sorted(
            self.world.nodes[one].name for one in ran_on if one in self.world.nodes and self.sites.is_leased(one)
        )
        if names and not self.settings.volumes:
            shared = "Have machines share a folder for outputs: the setting volumes, and tidemill join --volumes."
            return f"It ran on {', '.join(names)}, whose folders are not seen from here. {shared}"
        return "Write to $TIDEMILL_OUTPUT_DIR in the job; see tidemill cp JOB:. for what it has."

    def gateway_feed(self) -> tuple[str, dict[str, Any]]:
        """Everything the gateway needs: token hashes and where each model's ready replicas are, and its version."""
        return self.serving.feed()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _look(self, look: Callable[[World], Answer]) -> Answer:
        """What ``look`` makes of the world, between turns."""
        return self._turns.ask([], lambda _, world: look(world)).result(timeout=30)

    def _is_mine(self, identity: Identity, queue: Queue) -> bool:
        projects = self.projects(identity)
        if identity.project_ids and not queue.project_id:
            return False
        return is_of(queue, identity.organization_id, projects)

    def _check_tree(self, identity: Identity, changed: Sequence[Queue], opened: Sequence[Project]) -> None:
        """Raises: InvalidRequest when the tree cannot be used with the changed queues in it."""
        world, new = self.world, {queue.id for queue in changed}
        rest = [queue for queue in world.queues.copy().values() if queue.id not in new]
        mine = [queue for queue in rest if self._is_mine(identity, queue)]
        others = [queue for queue in rest if queue not in mine]
        projects = [*self._projects.values(), *(one for one in opened if one.id not in self._projects)]
        check_tree([*mine, *changed], others, projects, world.nodes.copy().values())

    def record(self, recorder: Recorder) -> Callable[[], None]:
        """Have a recorder told of every turn from here on; returns how to stop.

        Raises: Conflict while another is.
        """
        with self._lock:
            if self._recorder is not None:
                raise Conflict("Turns are being recorded already.", mend="Wait until the other recording is over.")
            self._recorder = recorder

        def stop() -> None:
            with self._lock:
                if self._recorder is not recorder:
                    return
                self._recorder = None
            self._turns.record(None)

        try:
            self._turns.record(recorder).result(_RECORDING_BEGINS_S)
        except BaseException:
            stop()
            raise
        return stop

    def _load_world(self, recorder: Recorder | None = None) -> World:
        snapshot, now = self.store.load(), self._clock()
        sites, projects, policy = self._all_sites(), tuple(self._projects.values()), self.settings.policy
        if recorder is not None:
            try:
                recorder.begin(snapshot, sites=sites, projects=projects, rates=self._rates, policy=policy, now=now)
            except Exception:
                log.exception("a recorder failed at its beginning")
        return world_from(snapshot, sites=sites, projects=projects, rates=self._rates, policy=policy, now=now)

    def _all_sites(self) -> list[Site]:
        return [self.site, *(site for site in self.store.sites() if site.id != self.site.id)]

    def _build_launch(self, launch_id: LaunchId) -> LaunchSpec:
        return build_launch(
            launch_id,
            world=self.world,
            store=self.store,
            directory=self.directory,
            api_url=self.settings.api_url,
            is_leased=self.sites.is_leased,
        )

    def _remember_launches(self) -> None:
        """Let the runners that outlived the last control plane in: their tokens follow from their launch ids."""
        for held in self.world.allocations.values():
            workload = self.world.workloads[self.world.jobs[held.job_id].workload_id]
            self.directory.launch_tokens(
                held.id,
                organization=workload.organization_id,
                project=workload.project_id,
                principal=workload.principal_id,
            )

    def _checked(self, spec: WorkloadSpec, project: Project, *, now: int) -> WorkloadSpec:
        """The spec with its inputs pinned to versions. Raises: Infeasible, InvalidSpec."""
        if spec.inputs:
            spec = self._resolve_inputs(spec, project)
        if spec.data or spec.volumes:
            spec = self.data.resolve(spec, project)
        self._check_times(spec, project, now=now)
        if spec.workdir and not self.blobs.exists(spec.workdir):
            raise InvalidSpec(
                "The workdir was not uploaded.", field="workdir", value=spec.workdir, mend="Upload it first."
            )
        for name in spec.secrets:
            if self.store.secret(project.id, name) is None:
                raise InvalidSpec(
                    f"Project {project.name} has no secret {name}.",
                    field="secrets",
                    value=name,
                    mend=f"Set it: tidemill secret set {name}.",
                )
        asked = Workload(
            id=WorkloadId(""),
            organization_id=project.organization_id,
            project_id=project.id,
            principal_id=PrincipalId(""),
            spec=spec,
            submitted_ns=now,
        )
        never = why_refused(self.world, asked)
        if never is not None and not (self.renting is not None and self.renting.may_serve(spec)):
            raise Infeasible(
                never.sentence, field=never.subject, value=never.needed, mend=mend_for(never), reason=never.code
            )
        return spec

    def _check_times(self, spec: WorkloadSpec, project: Project, *, now: int) -> None:
        """Raises: InvalidSpec for what waits for a time, a window or a group that will not come."""
        if spec.start_before_ns and spec.start_before_ns <= now:
            raise InvalidSpec(
                "That time is over.",
                field="start_before",
                value=instant_text(spec.start_before_ns),
                mend="Write a time to come, such as 2h.",
            )
        if spec.reservation:
            check_reservation(spec, project, self.world.reservations.copy().values(), now=now)
        if spec.group is not None:
            check_group(spec.group, project, self.world.workloads.copy().values())

    def _check_room(self, project: Project, jobs: int) -> None:
        """Raises: Conflict when a queue of the project has as many jobs waiting as it may."""
        if not self._is_capped(project):
            return
        reason = self._look(lambda world: world.quota.too_many_queued(project.id, jobs))
        if reason is not None:
            raise Conflict(
                reason.sentence, field="project", value=project.name, mend=limits_told(reason), reason=reason.code
            )

    def _is_capped(self, project: Project) -> bool:
        queues = self.world.queues
        at = queues.get(queue_id(project.id))
        for _ in range(len(queues)):
            if at is None or at.max_queued:
                break
            at = queues.get(at.parent_id)
        return at is not None and bool(at.max_queued)

    def _follow(self, specs: Sequence[WorkloadSpec], ids: Sequence[WorkloadId], project: Project) -> list[WorkloadSpec]:
        """The specs with the ids of the workloads that they come after; earlier ones of a batch count.

        Raises: InvalidSpec for one that there is not, or that has ended otherwise already.
        """
        found: list[WorkloadSpec] = []
        batch: dict[str, WorkloadId] = {}
        for own_id, spec in zip(ids, specs, strict=True):
            after = tuple(
                replace(one, workload_id=batch.get(one.workload_id) or self._before(one, project)) for one in spec.after
            )
            found.append(replace(spec, after=after) if after else spec)
            batch[spec.name] = own_id
        return found

    def _before(self, dependency: Dependency, project: Project) -> WorkloadId:
        """The id of the workload that is meant by its id, or by a name that is its project's newest of that name."""
        named = str(dependency.workload_id)
        workload = self.store.workload(dependency.workload_id) if named.startswith("wl_") else None
        if workload is None:
            rows = self.store.find_jobs(JobFilter(project_ids=(project.id,), name=named), limit=1).items
            workload = rows[0].workload if rows else None
        if workload is None or workload.project_id != project.id:
            raise InvalidSpec(
                f"Project {project.name} has no workload {named}.",
                field="after",
                value=named,
                mend="Submit that one first, and name it as tidemill ps shows it.",
            )
        check_dependency(dependency, workload, self.store.jobs_of(workload.id))
        return workload.id

    def _resolve_inputs(self, spec: WorkloadSpec, project: Project) -> WorkloadSpec:
        pinned = []
        for name, reference in spec.inputs:
            artifact = find_input(self.store, project.id, reference)
            pinned.append((name, f"{artifact.name}:{artifact.version}"))
        return replace(spec, inputs=tuple(pinned))

    def _recorded(self, identity: Identity, key: str, digest: str) -> tuple[Workload, ...] | None:
        """What was stored for that key before; None when nothing was. Raises: IdempotencyMismatch."""
        record = self.store.idempotent(identity.principal_id, key)
        if record is None:
            return None
        if record.request_digest != digest:
            raise _mismatch(key)
        stored = [self.store.workload(WorkloadId(one)) for one in RECORDED_RESPONSE.decode(record.response)]
        return tuple(workload for workload in stored if workload is not None)

    @staticmethod
    def _same(flying: tuple[str, Future[tuple[Workload, ...]]], key: str, digest: str) -> Future[tuple[Workload, ...]]:
        if flying[0] != digest:
            raise _mismatch(key)
        return flying[1]

    def _sample_forever(self) -> None:
        while not self._closing.wait(5.0):
            sampled = self._sample()
            if sampled is not None:
                self._turns.put([sampled])


def administer(identity: Identity) -> None:
    """Raises: Forbidden when the identity may not change what all projects share."""
    identity.require(Scope.ADMIN)
    if identity.project_ids:
        raise Forbidden(
            "A token of one project cannot change what all share.",
            field="project",
            value=identity.project_ids[0],
            mend="Use an administrator's token that is not bound to a project.",
        )


def _mismatch(key: str) -> IdempotencyMismatch:
    return IdempotencyMismatch(
        "This Idempotency-Key came with another request before.",
        field="Idempotency-Key",
        value=key,
        mend="Use a new key for a new request.",
    )
