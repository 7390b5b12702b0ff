"""Questions about work and machines, answered from the world between turns and from the store."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

from tidemill import __version__
from tidemill.control.acceptance import Acceptance
from tidemill.control.answers import Receipt, Status, Why, receipt_of, with_word
from tidemill.control.forecast import Foresight, quote, why
from tidemill.control.identity import Directory, Identity
from tidemill.control.projects import Projects
from tidemill.control.runners import Runners
from tidemill.control.settings import Settings
from tidemill.control.siteoptions import sites_open_to
from tidemill.control.sites import Sites
from tidemill.control.turns import TurnLoop
from tidemill.core.facts import has_left
from tidemill.core.world import World
from tidemill.errors import NotFound
from tidemill.model.events import MetersRead
from tidemill.model.ids import JobId, ProjectId, WorkloadId, sortable_id
from tidemill.model.job import AllocationState, Job, JobState, Workload
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Quote, Reason
from tidemill.model.spec import WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.ports import Engine, Store


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


class Questions:
    """Answers about work and machines. Thread-safe."""

    def __init__(
        self,
        store: Store,
        turns: TurnLoop,
        projects: Projects,
        acceptance: Acceptance,
        runners: Runners,
        sites: Sites,
        *,
        settings: Settings,
        engine: Engine | None,
        rates: RateCard,
        directory: Directory,
        energy_evidence: str,
        clock: Callable[[], int],
    ) -> None:
        self._store = store
        self._turns = turns
        self._projects = projects
        self._acceptance = acceptance
        self._runners = runners
        self._sites = sites
        self._settings = settings
        self._foresight = Foresight(turns, settings.policy)
        self._engine = engine
        self._rates = rates
        self._directory = directory
        self._energy_evidence = energy_evidence
        self._clock = clock

    def quote(self, project: Project, spec: WorkloadSpec) -> Quote:
        """What would happen if it were submitted now: the next turn, taken and undone."""
        now = self._clock()
        spec = self._acceptance.pin(spec, project)
        if spec.after:
            [spec] = self._acceptance.follow([spec], [WorkloadId("")], project)
        self._acceptance.check_times(spec, project, now=now)
        workload = Workload(
            id=WorkloadId(sortable_id("wl", now=now, entropy=secrets.randbits(40))),
            organization_id=project.organization_id,
            project_id=project.id,
            principal_id=next(iter(self._directory.all())).principal_id,
            spec=spec,
            submitted_ns=now,
        )
        return quote(self._turns, workload, self._settings.policy, now=now)

    def why(self, job_id: JobId) -> Why:
        """Why a job is where it is. Raises: NotFound."""
        row = self._store.job(job_id)
        if row is None:
            raise NotFound("There is no such job.", field="job", value=job_id)
        answer = why(self._turns, self._foresight, row, self._settings.policy, now=self._clock())
        if answer.state != JobState.STARTING.value:
            return answer
        attempt = self._turns.world.attempts.get(job_id)
        workers = self._turns.world.workers_of(attempt) if attempt is not None else ()
        return with_word(answer, self._sites.word_of(worker.id for worker in workers))

    def receipt(self, job_id: JobId) -> Receipt:
        """What a job took and cost, as far as it is metered. Raises: NotFound."""
        row = self._store.job(job_id)
        if row is None:
            raise NotFound("There is no such job.", field="job", value=job_id)
        now = self._clock()
        if job_id in self._turns.world.jobs:
            self._turns.put([MetersRead(at_ns=now, job_id=job_id)]).result(timeout=30)
        held = self._store.allocations(job_id)
        nodes, sites = self._turns.world.nodes, self._turns.world.sites
        at = dict.fromkeys(nodes[worker.node_id].site_id for worker in held if worker.node_id in nodes)
        ran_at = [sites[site_id] for site_id in at] or [self._sites.home]
        return receipt_of(
            row.job,
            row.workload,
            self._store.ledger_totals(job_id=job_id),
            cards=[self._turns.world.card_of(site.id) for site in ran_at],
            sites=ran_at,
            held_ns=sum((worker.released_ns or now) - worker.held_ns for worker in held),
            placed_ns=min((worker.held_ns for worker in held), default=0),
            now=now,
        )

    def status(self) -> Status:
        """The cloud at a glance."""
        world = self._turns.world
        counts: dict[str, int] = {}
        for job in world.jobs.copy().values():
            counts[job.state.value] = counts.get(job.state.value, 0) + 1
        fleet = world.fleet
        nodes = tuple(node for node in world.nodes.copy().values() if not has_left(node))
        runs = [one.id for one in world.allocations.copy().values() if one.state is AllocationState.ACTIVE]
        has_runners = self._engine is None or self._engine.capabilities.name != "simulated"
        free_gpu = int(fleet.gpu_free.clip(min=0).sum()) if fleet.gpu_free.size else 0
        return Status(
            version=__version__,
            site=self._sites.home,
            nodes=nodes,
            cpu_milli=sum(node.cpu_milli for node in nodes),
            free_cpu_milli=int(fleet.cpu_free.clip(min=0).sum()),
            gpu_milli=sum(node.gpu_milli for node in nodes),
            free_gpu_milli=free_gpu,
            jobs=tuple(sorted(counts.items())),
            energy=self._energy_evidence,
            rate_card=self._rates.id,
            gateway_url=self._settings.gateway_url,
            strangers=len(self._sites.strangers()),
            workers=len(runs),
            heard=sum(launch in self._runners.beats for launch in runs) if has_runners else len(runs),
        )

    def waiting(self, identity: Identity, *, project: ProjectId = ProjectId(""), limit: int) -> tuple[Queued, ...]:
        """Waiting jobs that the identity may see, in the order in which they would be tried; then those that wait for
        something else than their turn, oldest first."""
        own = {one.id for one in self._projects.of(identity) if project in ("", one.id)}
        now, enough = self._clock(), limit if len(own) == len(self._projects.by_id) else None

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

        return self._turns.look(look)

    def copies_on(self, project_id: ProjectId, digest: str) -> tuple[str, ...]:
        """The names of the machines that have a copy of a project's data set, by the digest of its manifest."""
        world, wanted = self._turns.world, f"{project_id}/{digest}"
        cached = world.cached.copy()
        return tuple(sorted(world.nodes[one].name for one, sets in cached.items() if wanted in sets))
