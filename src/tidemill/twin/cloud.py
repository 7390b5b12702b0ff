"""The twin's only contact with the core: a cloud without a store, whose turns are the driver's.

Everything else in this package works on facts, plans and what this module answers, so a change of the core's inner
shape ends here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidemill.control.driver import Driver, world_from
from tidemill.control.recording import Beginning
from tidemill.core.admission import why_never, why_refused
from tidemill.core.feasible import fitting, workers_that_fit
from tidemill.core.place import gang_of
from tidemill.model.events import Fact, ProjectOpened
from tidemill.model.fleet import Node, Site, SiteKind
from tidemill.model.ids import JobId, LaunchId, OrganizationId, ProjectId, SiteId
from tidemill.model.job import Allocation, Attempt, Workload
from tidemill.model.ledger import CPU_METER, RateCard
from tidemill.model.plan import Plan, Reason
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.spec import Alternative, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.ports import Snapshot
from tidemill.units import DAY_NS, HOUR_NS, MILLI

ORGANIZATION = OrganizationId("org_twin")
SITE = Site(id=SiteId("site_twin"), name="twin", kind=SiteKind.ONPREM, engine="simulated", carbon_mg_per_kwh=0)
_MOST_KNOWN = 1_000
EPOCH_NS = 1_704_067_200_000_000_000
"""When virtual time begins unless said otherwise: 2024-01-01 00:00 UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a run is under, and what ``--what-if`` changes: machines, policy, prices, quotas.

    ``start_delay_ns`` is from a worker's launch until it runs. Turns are taken at multiples of ``tick_ns``, with all
    that happened since the last one, as a busy control plane does; zero: at each instant at which something happens.
    """

    nodes: tuple[Node, ...]
    rates: RateCard
    policy: Policy = field(default_factory=lambda: Policy(meter_every_ns=30 * DAY_NS, replan_ns=HOUR_NS))
    """What only bounds how soon the clock is looked at is rarer here than in a control plane that lives."""
    queues: tuple[Queue, ...] = ()
    projects: tuple[Project, ...] = ()
    """Those that are there at the start; a tenant of a trace becomes one, whose id is its name, with its first job."""
    sites: tuple[Site, ...] = (SITE,)
    """The first is where machines are of which nothing else is said."""
    start_ns: int = EPOCH_NS
    start_delay_ns: int = 0
    tick_ns: int = 0

    @property
    def gpu_milli(self) -> int:
        """All GPUs in thousandths."""
        return sum(node.gpu_milli for node in self.nodes)


class Idle(NamedTuple):
    """What one shape leaves unusable of what is idle, in milli-GPU."""

    idle: int
    unusable: int


def beginning_of(conditions: Conditions) -> Beginning:
    """What a world under these conditions is made of: machines and quotas, and nothing that runs or waits."""
    used = {CPU_METER, *(device.model for node in conditions.nodes for device in node.devices)}
    rates = tuple(rate for rate in conditions.rates.rates if rate.resource in used)
    return Beginning(
        now=conditions.start_ns,
        snapshot=Snapshot(nodes=conditions.nodes, queues=conditions.queues),
        sites=conditions.sites,
        projects=conditions.projects,
        rates=RateCard(id=conditions.rates.id, rates=rates),
        policy=conditions.policy,
    )


class Cloud:
    """A world and its driver; plans are accepted as soon as they are made."""

    def __init__(self, beginning: Beginning) -> None:
        world = world_from(
            beginning.snapshot,
            sites=beginning.sites,
            projects=beginning.projects,
            rates=beginning.rates,
            policy=beginning.policy,
            now=beginning.now,
        )
        self._driver = Driver(world, beginning.policy)
        self._nevers: dict[int, tuple[WorkloadSpec, Reason | None]] = {}
        """The door's answers by the spec's identity; specs are shared among jobs, and the table keeps them alive."""
        self._fleet_size = len(world.nodes)
        self._organizations = {project.id: project.organization_id for project in beginning.projects}

    def knows(self, tenant: ProjectId) -> bool:
        """Whether a tenant was there at the start or became known since."""
        return tenant in self._organizations

    def open_project(self, project: Project, now: int) -> list[Fact]:
        """The facts that make a tenant known; none when it is already."""
        if self.knows(project.id):
            return []
        self._organizations[project.id] = project.organization_id
        return [ProjectOpened(at_ns=now, project=project)]

    def organization_of(self, tenant: ProjectId) -> OrganizationId:
        """Who pays for a tenant."""
        return self._organizations.get(tenant, ORGANIZATION)

    def step(self, inbox: Sequence[Fact], *, now: int) -> Plan:
        """The plan of one turn, which is taken as stored."""
        plan = self._driver.step(inbox, now=now)
        self._driver.accepted()
        return plan

    def close_books(self, now: int) -> Plan:
        """One more turn that meters everything up to now, whatever the policy's rhythm."""
        policy = self._driver.policy
        self._driver.policy = replace(policy, meter_every_ns=0)
        try:
            return self.step([], now=now)
        finally:
            self._driver.policy = policy

    def refusal(self, workload: Workload) -> Reason | None:
        """Why the control plane's door would not let the workload in; None when it would."""
        world, spec = self._driver.world, workload.spec
        if world.quota.is_limited(workload.project_id):
            return why_refused(world, workload)
        if len(world.nodes) != self._fleet_size:
            self._fleet_size = len(world.nodes)
            self._nevers.clear()
        known = self._nevers.get(id(spec))
        if known is None:
            if len(self._nevers) > _MOST_KNOWN:
                self._nevers.clear()
            reason = why_never(world.fleet, spec)
            known = self._nevers[id(spec)] = (spec, reason)
        return known[1]

    def held(self, launch_id: LaunchId) -> Allocation | None:
        """The live allocation of a launch."""
        return self._driver.world.allocations.get(launch_id)

    def attempt(self, job_id: JobId) -> Attempt | None:
        """The live attempt of a job."""
        return self._driver.world.attempts.get(job_id)

    def spec(self, job_id: JobId) -> WorkloadSpec:
        """The spec of a job that is not over."""
        world = self._driver.world
        return world.workloads[world.jobs[job_id].workload_id].spec

    def gpu_capacity_milli(self) -> int:
        """GPUs of machines that are ready."""
        fleet = self._driver.world.fleet
        if not fleet.gpu_free.size:
            return 0
        return int((fleet.model[fleet.is_ready] >= 0).sum()) * MILLI

    def idle_for(self, specs: Sequence[WorkloadSpec]) -> list[Idle]:
        """For each spec, how much GPU is idle and how much of that one more of its workers could not use.

        Source: the fragmentation measure of FGD (Weng et al., USENIX ATC 2023): all that is idle on a node where the
        worker does not fit; else what is idle on devices with less left than it asks of one.
        """
        fleet = self._driver.world.fleet
        if not fleet.gpu_free.size:
            return [Idle(0, 0)] * len(specs)
        free: NDArray[np.int64] = np.where(
            fleet.is_ready[:, None] & (fleet.model >= 0), np.maximum(fleet.gpu_free, 0), 0
        )
        idle = int(free.sum())
        found = []
        for spec in specs:
            gpus = spec.resources.gpus
            if gpus is None:
                found.append(Idle(idle, idle))
                continue
            shape = gang_of(spec).choices[0]
            static = fitting(fleet, shape)
            fits = workers_that_fit(fleet, shape) > 0
            usable = np.where(static.devices & (free >= static.milli), free, 0)[fits]
            found.append(Idle(idle, idle - int(usable.sum())))
        return found


def speed_milli(spec: WorkloadSpec, choice: int) -> int:
    """How fast a job goes with the resources of that choice; 1000 is with those it names first."""
    if not spec.any_of:
        return MILLI
    all_of = (Alternative(resources=spec.resources), *spec.any_of)
    if spec.by_speed:
        all_of = tuple(sorted(all_of, key=lambda one: -one.speed_milli))
    return all_of[choice].speed_milli
