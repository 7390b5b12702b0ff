"""A yard of simulated machines on virtual time: workloads with true durations, played through the real turn to the end.

After every turn an auditor, which keeps its own accounts from the plans alone, checks what must always hold. Tests
then ask about the whole history: who started when, who was displaced for whom, what was promised and kept.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from tidemill.core.turn import turn
from tidemill.core.world import World
from tidemill.model.events import Exited, Fact, NeverLaunched, NodeJoined, QueueSet, Started, Submitted
from tidemill.model.fleet import Device, Node, NodeState, Site, SiteKind
from tidemill.model.ids import (
    DeviceId,
    LaunchId,
    NodeId,
    OrganizationId,
    PrincipalId,
    ProjectId,
    QueueId,
    SiteId,
    WorkloadId,
)
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Cause, Job, JobState, Workload
from tidemill.model.ledger import Rate, RateCard
from tidemill.model.plan import Launch, Plan, Stop
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.units import HOUR_NS, MILLI, SECOND_NS

GB = 1024**3
START = 1_700_000_000 * SECOND_NS
SITE = Site(id=SiteId("s"), name="s", kind=SiteKind.ONPREM, engine="simulated")
RATES = RateCard(id="r", rates=(Rate(resource="cpu", micro_per_hour=1_000, source="test"),))
PROJECTS = tuple(
    Project(id=ProjectId(f"p{i}"), organization_id=OrganizationId("o"), name=f"p{i}", created_ns=0) for i in range(4)
)
CALM = Policy(meter_every_ns=1000 * HOUR_NS, min_run_ns=0, half_life_ns=0)
"""Decisions without the minutes of patience that a real cloud has."""


def gpu_node(name: str, gpus: int = 8, *, model: str = "H100-SXM", cpus: int = 64, **more: Any) -> Node:
    """A machine with that many GPUs."""
    devices = tuple(
        Device(
            id=DeviceId(f"{name}-{at}"),
            index=at,
            model=model,
            reported=model,
            memory_bytes=80 * GB,
            idle_mw=1,
            busy_mw=2,
        )
        for at in range(gpus)
    )
    known: dict[str, Any] = {
        "id": NodeId(name),
        "site_id": SITE.id,
        "name": name,
        "state": NodeState.READY,
        "version": 1,
        "boot_id": "b",
        "address": name,
        "cpu_milli": cpus * MILLI,
        "memory_bytes": 512 * GB,
        "disk_bytes": 1000 * GB,
        "devices": devices,
    }
    return Node(**(known | more))


def spec(gpus: int | GpuRequest | None = 1, **more: Any) -> WorkloadSpec:
    """A task whose workers ask for that many GPUs."""
    request = GpuRequest(count=gpus) if isinstance(gpus, int) and gpus else gpus or None
    known: dict[str, Any] = {
        "kind": Kind.TASK,
        "name": "w",
        "run": "true",
        "resources": Resources(gpus=request if isinstance(request, GpuRequest) else None),
        "checkpoint_grace_ns": 0,
    }
    return WorkloadSpec(**(known | more))


def queue_of(project: str, **more: Any) -> Queue:
    """The queue of a project."""
    known: dict[str, Any] = {"id": QueueId(f"que_{project}"), "name": project, "project_id": ProjectId(project)}
    return Queue(**(known | more))


@dataclass
class Yard:
    """One cloud, its true durations, and what happened."""

    nodes: tuple[Node, ...] = ()
    policy: Policy = CALM
    queues: tuple[Queue, ...] = ()
    sites: tuple[Site, ...] = (SITE,)
    now: int = START
    durations: dict[str, int] = field(default_factory=dict)
    """Of each workload, in ns, from its start with nothing kept."""
    keeps: bool = True
    """Whether displaced work goes on where it was."""
    grace_taken_ns: int = 0
    """How long a worker takes to stop when it is told to."""
    starting_ns: int = 0
    """How long a worker takes to start."""
    loses: int = 0
    """Every so many commands and reports one does not arrive, or arrives twice; zero: none."""
    done: dict[str, int] = field(default_factory=dict)
    stored: dict[tuple[str, str], Any] = field(default_factory=dict)
    plans: list[tuple[int, Plan]] = field(default_factory=list)
    started: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.world = World(sites=self.sites, projects=PROJECTS, rates=RATES, policy=self.policy)
        self._events: list[tuple[int, int, Any]] = []
        self._number = self._sent = 0
        self.turn(
            [
                *(NodeJoined(at_ns=self.now, node=node) for node in self.nodes),
                *(QueueSet(at_ns=self.now, queue=queue) for queue in self.queues),
            ]
        )

    # -- what tests say ---------------------------------------------------------------------------------------------

    def submit(
        self, what: WorkloadSpec, *, runs_s: float = 60, project: str = "p0", user: str = "u", at_s: float | None = None
    ) -> str:
        """The id of the (first) job of a workload submitted now, or ``at_s`` after the start."""
        self.count += 1
        at = self.now if at_s is None else START + int(at_s * SECOND_NS)
        workload = Workload(
            id=WorkloadId(f"wl_{self.count:05d}"),
            organization_id=OrganizationId("o"),
            project_id=ProjectId(project),
            principal_id=PrincipalId(user),
            spec=what,
            submitted_ns=at,
        )
        self.durations[workload.id] = int(runs_s * SECOND_NS)
        if at_s is None:
            self.turn([Submitted(at_ns=at, workload=workload)])
        else:
            self.later(at, Submitted(at_ns=at, workload=workload))
        return f"job_{self.count:05d}-0"

    def later(self, at: int, fact: Fact) -> None:
        """Have a fact happen at an instant."""
        self._push(at, fact)

    def run(self, seconds: float | None = None, *, turns: int = 4_000) -> None:
        """Let time pass until nothing more happens, or for so long."""
        until = None if seconds is None else self.now + int(seconds * SECOND_NS)
        idle = 0
        for _ in range(turns):
            idle = 0 if self._events else idle + 1
            upcoming = self._next() if idle < 60 else None
            if upcoming is None or (until is not None and upcoming > until):
                break
            self.now = max(self.now, upcoming)
            facts = []
            while self._events and self._events[0][0] <= self.now:
                facts.extend(self._happens(heapq.heappop(self._events)[2]))
            self.turn(facts)
        else:
            raise AssertionError("time does not pass")
        if until is not None:
            self.now = until
            self.turn([])

    def job(self, job_id: str) -> Job:
        """A job as stored."""
        job = self.stored["Job", job_id]
        assert isinstance(job, Job)
        return job

    def state(self, job_id: str) -> JobState:
        return self.job(job_id).state

    def nodes_of(self, job_id: str) -> list[str]:
        """Where the workers of a job are, by rank."""
        held = sorted((a for a in self.live() if a.job_id == job_id), key=lambda a: a.rank)
        return [a.node_id for a in held]

    def events(self, kind: str) -> list[tuple[int, str, dict[str, Any]]]:
        """(instant, job, body) of each event of a kind."""
        return [
            (at, entry.job_id, dict(entry.body)) for at, plan in self.plans for entry in plan.log if entry.type == kind
        ]

    def live(self) -> list[Allocation]:
        return [
            a for a in self.stored.values() if isinstance(a, Allocation) and a.state is not AllocationState.RELEASED
        ]

    # -- the machines -----------------------------------------------------------------------------------------------

    def turn(self, facts: list[Fact]) -> Plan:
        """One turn that the store accepts; then the machines obey, and the auditor looks."""
        plan = turn(self.world, facts, now=self.now, policy=self.policy)
        for change in plan.changes:
            key = (type(change.after).__name__, str(change.after.id))
            before = self.stored.get(key)
            assert getattr(before, "version", None) == change.assumed, f"{key}: wrong assumed version"
            self.stored[key] = change.after
        self.plans.append((self.now, plan))
        self.world.commit()
        for entry in plan.log:
            if entry.type == "Placed":
                self.started.setdefault(entry.job_id, []).append(self.now)
        for command in plan.commands:
            if isinstance(command, Launch) and self._is_lost():
                self._push(self.now + 10 * SECOND_NS, ("is missing", command.launch_id))
            elif isinstance(command, Launch):
                self._push(self.now + self.starting_ns, ("starts", command.launch_id))
            elif isinstance(command, Stop) and not self._is_lost():  # else it is told again
                self._push(self.now + self.grace_taken_ns, ("stops", command.launch_id))
        self.audit()
        return plan

    def _push(self, at: int, what: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, what))

    def _is_lost(self) -> bool:
        self._sent += 1
        return bool(self.loses) and self._sent % self.loses == 0

    def _next(self) -> int | None:
        instants = [self._events[0][0]] if self._events else []
        if self.plans[-1][1].wake_ns:
            instants.append(self.plans[-1][1].wake_ns)
        live = any(isinstance(j, Job) and j.state not in _OVER for j in self.stored.values())
        return min(instants, default=None) if self._events or live else None

    def _happens(self, what: Any) -> list[Fact]:
        if not isinstance(what, tuple):
            return [what]
        name, launch = what
        if name == "says again":
            return [launch]
        held = self.stored["Allocation", launch]
        if held.state is AllocationState.RELEASED:
            return []
        job = self.job(held.job_id)
        if name == "is missing":
            return [NeverLaunched(at_ns=self.now, launch_id=launch, fence=held.fence)]
        if name == "starts":
            left = self.durations[job.workload_id] - (self.done.get(job.id, 0) if self.keeps else 0)
            self._push(self.now + max(left, 0), ("ends", launch))
            return [Started(at_ns=self.now, launch_id=launch, fence=held.fence)]
        attempt = self.stored["Attempt", held.attempt_id]
        if name == "stops" and attempt.state is AttemptState.ENDING and held.rank == 0 and attempt.started_ns:
            self.done[job.id] = self.done.get(job.id, 0) + held.drain_ns - attempt.started_ns
        if name == "ends":
            self.ended[job.id] = self.now
        exited = Exited(
            at_ns=self.now,
            launch_id=LaunchId(launch),
            fence=held.fence,
            exit_code=0,
            cause=Cause.NONE if name == "ends" else Cause.PREEMPTED,
        )
        if self._is_lost():  # the answer to the report: it is told once more
            self._push(self.now + 3 * SECOND_NS, ("says again", exited))
        return [exited]

    # -- the auditor ------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """What must hold after every turn."""
        self._never_over_capacity()
        self._gangs_are_whole()
        self._limits_hold()
        self._sums_match()

    def _never_over_capacity(self) -> None:
        used: dict[tuple[str, str], int] = {}
        capacity: dict[tuple[str, str], int] = {}
        for node in self.world.nodes.values():
            capacity[node.id, "cpu"] = node.cpu_milli
            capacity[node.id, "memory"] = node.memory_bytes
            for device in node.devices:
                capacity[node.id, device.id] = MILLI
        for held in self.live():
            parts = [("cpu", held.cpu_milli), ("memory", held.memory_bytes)]
            parts += [(share.device_id, share.milli) for share in held.devices]
            for what, amount in parts:
                used[held.node_id, what] = used.get((held.node_id, what), 0) + amount
        for key, amount in used.items():
            assert amount <= capacity[key], f"{key} holds {amount} of {capacity[key]}"
        self._slices_do_not_overlap()

    def _slices_do_not_overlap(self) -> None:
        taken: dict[tuple[str, str], int] = {}
        for held in self.live():
            row = self.world.fleet.row.get(held.node_id)
            for share in held.devices if row is not None else ():
                column = self.world.fleet.column(row, share.device_id)
                bits = self.world.fleet.slice_bits(row, column, share)
                before = taken.get((held.node_id, share.device_id), 0)
                assert not before & bits, f"{share.device_id}: {share.profile} at {share.slice} is given twice"
                taken[held.node_id, share.device_id] = before | bits

    def _gangs_are_whole(self) -> None:
        workers: dict[str, int] = {}
        for held in self.stored.values():
            if isinstance(held, Allocation) and held.state is not AllocationState.DRAINING and held.cause not in _SHED:
                workers[held.attempt_id] = workers.get(held.attempt_id, 0) + 1
        for attempt in self.stored.values():
            if isinstance(attempt, Attempt) and attempt.state in (AttemptState.STARTING, AttemptState.RUNNING):
                what = self.stored["Workload", self.job(attempt.job_id).workload_id].spec
                assert what.smallest <= attempt.workers <= what.nodes, f"{attempt.id} has {attempt.workers} workers"
                assert workers.get(attempt.id, 0) == attempt.workers, f"{attempt.id} is not whole"

    def _limits_hold(self) -> None:
        for queue in self.queues:
            for name, limit in queue.limit:
                assert self.held_by(queue, name) <= limit, f"{queue.name} holds {self.held_by(queue, name)} of {name}"

    def held_by(self, queue: Queue, name: str) -> int:
        """What the projects at or under a queue hold of ``gpu``, ``cpu`` or ``memory``."""
        members = {queue.id}
        for _ in self.queues:
            members |= {other.id for other in self.queues if other.parent_id in members}
        projects = {other.project_id for other in self.queues if other.id in members}
        total = 0
        for held in self.live():
            if held.project_id in projects:
                total += {
                    "gpu": sum(share.milli for share in held.devices),
                    "cpu": held.cpu_milli,
                    "memory": held.memory_bytes,
                }[name]
        return total

    def _sums_match(self) -> None:
        """What the world counts is what is stored."""
        world = self.world
        assert set(world.allocations) == {a.id for a in self.live()}
        for project in PROJECTS:
            cpu = sum(a.cpu_milli for a in self.live() if a.project_id == project.id)
            for promise in world.promises.values():
                if promise.line.project_id == project.id:
                    shape = promise.line.gang.choices[promise.placed.choice]
                    cpu += shape.resources.cpu_milli * len(promise.placed.places)
            assert world.quota.held(project.id).get("cpu", 0) == cpu, f"{project.name} is counted wrongly"
        assert sorted(world.rows.slot) == sorted(world.allocations)


_OVER = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
_SHED = (Cause.RESIZED,)

__all__ = ["CALM", "GB", "START", "Yard", "gpu_node", "queue_of", "replace", "spec"]
