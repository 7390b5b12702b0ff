"""Random histories of a small cloud, played through the real turn, and an auditor that checks the books after each.

The auditor keeps its own accounts from the plans alone: it knows nothing of the world's arrays or meters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from tidemill.core.lifecycle import is_terminal
from tidemill.core.turn import turn
from tidemill.core.world import World
from tidemill.model.events import (
    Exited,
    Fact,
    LaunchRefused,
    NeverLaunched,
    NodeJoined,
    NodeWentAway,
    Prepared,
    QueueSet,
    Sampled,
    Started,
    StopRequested,
    Submitted,
    Vanished,
)
from tidemill.model.fleet import Device, Node, NodeState, Site, SiteKind
from tidemill.model.ids import (
    DeviceId,
    JobId,
    LaunchId,
    NodeId,
    OrganizationId,
    PrincipalId,
    ProjectId,
    QueueId,
    SiteId,
    WorkloadId,
)
from tidemill.model.job import Allocation, AllocationState, Attempt, Job, JobState, Workload
from tidemill.model.ledger import LedgerLine, Rate, RateCard
from tidemill.model.plan import Plan
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, RetryOn, RetryPolicy, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.units import MILLI, SECOND_NS

GB = 1024**3
SITE = Site(
    id=SiteId("s"), name="s", kind=SiteKind.ONPREM, engine="simulated", pue_milli=1250, carbon_mg_per_kwh=400_000
)
PROJECTS = (
    Project(id=ProjectId("p0"), organization_id=OrganizationId("o"), name="free", created_ns=0),
    Project(id=ProjectId("p1"), organization_id=OrganizationId("o"), name="tight", created_ns=0),
)
LIMITS = {"p1": 3000}
"""What each project may hold of CPU, in milli."""
TIGHT = Queue(id=QueueId("que_p1"), name="tight", project_id=ProjectId("p1"), limit=(("cpu", LIMITS["p1"]),))
RATES = RateCard(
    id="r",
    rates=(
        Rate(resource="cpu", micro_per_hour=44_625, source="test"),
        Rate(resource="H100-SXM", micro_per_hour=2_990_001, source="test"),
    ),
)
POLICY = Policy(meter_every_ns=7 * SECOND_NS, retry_backoff_ns=SECOND_NS)
START = 1_700_000_000 * SECOND_NS


def node(index: int, gpus: int, boot: str = "b0") -> Node:
    """A small machine."""
    devices = tuple(
        Device(id=DeviceId(f"n{index}g{g}"), index=g, model="H100-SXM", reported="H100", memory_bytes=80 * GB, idle_mw=70_000, busy_mw=700_000)
        for g in range(gpus)
    )  # fmt: skip
    return Node(
        id=NodeId(f"n{index}"), site_id=SITE.id, name=f"n{index}", state=NodeState.READY, version=1, boot_id=boot,
        address=f"10.0.0.{index}", cpu_milli=4000, memory_bytes=16 * GB, disk_bytes=100 * GB, cpu_idle_mw=740,
        cpu_busy_mw=3500, devices=devices,
    )  # fmt: skip


def new_world() -> World:
    """A world without machines."""
    return World(sites=[SITE], projects=PROJECTS, rates=RATES)


Op = tuple[str, int, int, int]
OPS = st.lists(
    st.tuples(
        st.sampled_from(["submit"] * 5 + ["started"] * 4 + ["exit0"] * 3 + ["exit1", "stop", "vanish", "never"] + ["refuse", "sample", "join", "away", "reboot", "tick", "tick", "prepared", "storefail"]),
        st.integers(0, 50),
        st.integers(0, 50),
        st.integers(0, 12),
    ),
    min_size=1,
    max_size=60,
)  # fmt: skip


@dataclass
class History:
    """One cloud, what was ever stored of it, and what its auditor found."""

    world: World = field(default_factory=new_world)
    now: int = START
    stored: dict[tuple[str, str], object] = field(default_factory=dict)
    ledger: list[LedgerLine] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    capacity: dict[tuple[str, str], int] = field(default_factory=dict)
    present_since: dict[tuple[str, str], int] = field(default_factory=dict)
    present_for: dict[tuple[str, str], int] = field(default_factory=dict)
    rebooted: set[str] = field(default_factory=set)
    count: int = 0

    def play(self, ops: list[Op]) -> None:
        """Play operations; after each turn the auditor looks at everything."""
        joined = [NodeJoined(at_ns=self.now, node=node(0, 2)), NodeJoined(at_ns=self.now, node=node(1, 0))]
        self.take([*joined, QueueSet(at_ns=self.now, queue=TIGHT)])
        for name, a, b, seconds in ops:
            self.now += seconds * SECOND_NS // 4
            if name == "storefail":
                self.refused(self.facts(["submit", "exit0", "exit1", "stop"][b % 4], a, b))
            else:
                facts = self.facts(name, a, b)
                before = self.world.allocations.copy()
                self.take(facts)
                for fact in facts:
                    held = before.get(getattr(fact, "launch_id", LaunchId("")))
                    if held is not None and getattr(fact, "fence", 0) != held.fence:
                        after = self.stored["Allocation", held.id]
                        assert isinstance(after, Allocation)
                        assert after.exit_code is None, "an old fencing token had its way"
                        assert held.started_ns or not after.started_ns, "an old fencing token had its way"

    def take(self, facts: list[Fact]) -> Plan:
        """One turn that the store accepts."""
        self.note_presence(facts)
        plan = turn(self.world, facts, now=self.now, policy=POLICY)
        self.store(plan)
        self.world.commit()
        self.audit()
        return plan

    def refused(self, facts: list[Fact]) -> None:
        """One turn that the store refuses: the world must be as before."""
        before = self.fingerprint()
        turn(self.world, facts, now=self.now, policy=POLICY)
        self.world.rollback()
        assert self.fingerprint() == before, "a refused turn left traces"

    def facts(self, name: str, a: int, b: int) -> list[Fact]:
        """The facts of one operation, about some live thing chosen by ``a`` and ``b``; none when there is none."""
        if name == "submit":
            self.count += 1
            return [Submitted(at_ns=self.now, workload=self.workload(a, b))]
        if name == "sample":
            reading = (self.now - START) // SECOND_NS * (a + 1) * 1000
            return [Sampled(at_ns=self.now, node_id=NodeId("n0"), energy_mj=(("n0g0", reading), ("cpu", reading // 2)))]
        if name in ("join", "reboot"):
            boot = f"b{self.count}" if name == "reboot" else self.world.nodes[NodeId("n0")].boot_id
            joined = NodeJoined(at_ns=self.now, node=node(a % 3, 2 if a % 3 == 0 else 0, boot))
            gone = [h for h in self.world.allocations.values() if h.node_id == joined.node.id and name == "reboot"]
            return [joined, *(Vanished(at_ns=self.now, launch_id=h.id, fence=h.fence) for h in gone)]
        if name == "away":
            return [NodeWentAway(at_ns=self.now, node_id=NodeId(f"n{1 + a % 2}"))]
        if name == "stop":
            jobs = list(self.world.jobs)
            return [StopRequested(at_ns=self.now, job_id=jobs[a % len(jobs)])] if jobs else []
        held = list(self.world.allocations.values())
        if name == "tick" or not held:
            return []
        one = held[a % len(held)]
        launch, fence = one.id, one.fence if b % 7 else one.fence + 1
        match name:
            case "prepared":
                return [Prepared(at_ns=self.now, launch_id=launch, fence=fence)]
            case "started":
                return [Started(at_ns=self.now, launch_id=launch, fence=fence)] * (1 + b % 2)
            case "exit0" | "exit1":
                return [Exited(at_ns=self.now, launch_id=launch, fence=fence, exit_code=int(name[-1]))] * (1 + b % 2)
            case "vanish":
                return [Vanished(at_ns=self.now, launch_id=launch, fence=fence)]
            case "never":
                return [NeverLaunched(at_ns=self.now, launch_id=launch, fence=fence)]
            case _:
                return [LaunchRefused(at_ns=self.now, launch_id=launch, fence=fence)]

    def workload(self, a: int, b: int) -> Workload:
        """A small workload of some shape."""
        gpus = [None, None, GpuRequest(count=1), GpuRequest(milli=300), GpuRequest(count=2)][a % 5]
        spec = WorkloadSpec(
            kind=Kind.ARRAY if b % 5 == 0 else Kind.TASK,
            name="w",
            run="true",
            nodes=1 + b % 3,
            array_size=1 + a % 3 if b % 5 == 0 else 1,
            resources=Resources(gpus=gpus, cpu_milli=500 + 500 * (a % 3), memory_bytes=(b % 4) * 2 * GB),
            retry=RetryPolicy(on=(RetryOn.NODE_LOST, RetryOn.ERROR) if b % 2 else (), max=1 + a % 2),
            max_duration_ns=(b % 3) * 5 * SECOND_NS,
            priority=a % 3,
        )
        return Workload(
            id=WorkloadId(f"wl_{self.count:04d}"), organization_id=OrganizationId("o"), project_id=PROJECTS[a % 2].id,
            principal_id=PrincipalId("u"), spec=spec, submitted_ns=self.now,
        )  # fmt: skip

    def store(self, plan: Plan) -> None:
        """What a store would do, with the version guard."""
        for change in plan.changes:
            thing = change.after
            key = (type(thing).__name__, str(thing.id))
            before = self.stored.get(key)
            assert getattr(before, "version", None) == change.assumed, f"{key}: wrong assumed version"
            assert getattr(change.after, "version", 1) == (change.assumed or 0) + 1, f"{key}: its version does not grow"
            if before is not None and hasattr(before, "state"):
                assert not is_terminal(before.state), f"{key} changed after its end"
            self.stored[key] = thing
        self.ledger.extend(plan.ledger)
        self.plans.append(plan)

    # -- the auditor ----------------------------------------------------------------------------------------------

    def things(self, kind: type) -> list[object]:
        return [thing for (name, _), thing in self.stored.items() if name == kind.__name__]

    def audit(self) -> None:
        """Every standing promise, from what is stored."""
        self.never_over_capacity()
        self.gangs_are_whole()
        self.books_tile_time()
        self.holders_pay_for_what_they_held()
        self.retries_are_bounded()
        self.projects_stay_within_limits()
        self.nothing_is_forgotten()

    def live(self) -> list[Allocation]:
        return [
            a for a in self.things(Allocation) if isinstance(a, Allocation) and a.state is not AllocationState.RELEASED
        ]

    def never_over_capacity(self) -> None:
        used: dict[tuple[str, str], int] = {}
        for held in self.live():
            for share in held.devices:
                used[held.node_id, share.device_id] = used.get((held.node_id, share.device_id), 0) + share.milli
            used[held.node_id, "cpu"] = used.get((held.node_id, "cpu"), 0) + held.cpu_milli
            used[held.node_id, "memory"] = used.get((held.node_id, "memory"), 0) + held.memory_bytes
        for (node_id, what), amount in used.items():
            limit = {"cpu": 4000, "memory": 16 * GB}.get(what, MILLI)
            assert amount <= limit, f"{node_id} {what} holds {amount} of {limit}"

    def gangs_are_whole(self) -> None:
        for attempt in self.things(Attempt):
            assert isinstance(attempt, Attempt)
            workers = [a for a in self.things(Allocation) if isinstance(a, Allocation) and a.attempt_id == attempt.id]
            assert len(workers) == attempt.workers, f"{attempt.id} has {len(workers)} of {attempt.workers} workers"
            job = self.stored["Job", attempt.job_id]
            assert isinstance(job, Job)
            workload = self.stored["Workload", job.workload_id]
            assert isinstance(workload, Workload)
            assert attempt.workers == workload.spec.nodes
        by_job: dict[str, set[str]] = {}
        for held in self.live():
            by_job.setdefault(held.job_id, set()).add(held.attempt_id)
        assert all(len(attempts) == 1 for attempts in by_job.values()), "two attempts of a job hold devices"

    def retries_are_bounded(self) -> None:
        for job in self.things(Job):
            assert isinstance(job, Job)
            workload = self.stored["Workload", job.workload_id]
            assert isinstance(workload, Workload)
            assert job.retries <= workload.spec.retry.max
            assert job.attempts <= job.retries + 1

    def projects_stay_within_limits(self) -> None:
        for project in PROJECTS:
            held = sum(a.cpu_milli for a in self.live() if a.project_id == project.id)
            assert held <= LIMITS.get(project.id, held), f"{project.name} holds {held}"

    def nothing_is_forgotten(self) -> None:
        """A live job is in the world, and a job with an attempt has workers there."""
        for job in self.things(Job):
            assert isinstance(job, Job)
            assert is_terminal(job.state) == (job.id not in self.world.jobs), job
            if job.state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING):
                assert any(held.job_id == job.id for held in self.live()), f"{job.id} is {job.state} without workers"

    def note_presence(self, facts: list[Fact]) -> None:
        """Keep account of when each meter existed: from joining until leaving, less the time of a reboot."""
        for fact in facts:
            if isinstance(fact, NodeJoined):
                known = self.world.nodes.get(fact.node.id)
                for name, milli in [("cpu", fact.node.cpu_milli), *((d.id, MILLI) for d in fact.node.devices)]:
                    key = (str(fact.node.id), str(name))
                    self.capacity[key] = milli
                    if known is not None and known.boot_id != fact.node.boot_id and key in self.present_since:
                        self.rebooted.add(key[0])
                        metered = self.world.meters[fact.node.id, key[1]].since_ns
                        self.present_for[key] = self.present_for.get(key, 0) + metered - self.present_since[key]
                        self.present_since[key] = self.now
                    self.present_since.setdefault(key, self.now)
            elif isinstance(fact, NodeWentAway):
                for key in [key for key in self.present_since if key[0] == fact.node_id]:
                    self.present_for[key] = self.present_for.get(key, 0) + self.now - self.present_since.pop(key)

    def books_tile_time(self) -> None:
        """usage + idle = capacity x time, for every meter, up to where it was last cut; no stretch twice."""
        assert len({line.id for line in self.ledger}) == len(self.ledger), "a line was written twice"
        booked: dict[tuple[str, str], int] = {}
        for line in self.ledger:
            key = (str(line.usage.node_id), line.usage.meter)
            booked[key] = booked.get(key, 0) + line.usage.milli * (line.usage.to_ns - line.usage.from_ns)
        for key, milli in self.capacity.items():
            meter = self.world.meters.get((NodeId(key[0]), key[1]))
            until = meter.since_ns if meter is not None else 0
            span = self.present_for.get(key, 0) + (until - self.present_since[key] if key in self.present_since else 0)
            assert booked.get(key, 0) == milli * span, f"{key}: booked {booked.get(key, 0)} of {milli * span}"

    def holders_pay_for_what_they_held(self) -> None:
        """Every worker that is gone is booked from when it was given its devices until it gave them back."""
        booked: dict[str, int] = {}
        for line in self.ledger:
            if line.usage.meter == "cpu" and not line.usage.is_idle:
                span = line.usage.milli * (line.usage.to_ns - line.usage.from_ns)
                booked[line.usage.launch_id] = booked.get(line.usage.launch_id, 0) + span
        for held in self.things(Allocation):
            assert isinstance(held, Allocation)
            if held.state is AllocationState.RELEASED and held.node_id not in self.rebooted:
                span = held.cpu_milli * (held.released_ns - held.held_ns)
                assert booked.get(held.id, 0) == span, f"{held.id}: booked {booked.get(held.id, 0)} of {span}"

    def fingerprint(self) -> object:
        world = self.world
        return (
            dict(world.nodes), dict(world.jobs), dict(world.attempts), dict(world.allocations), dict(world.workloads),
            world.fleet.cpu_free.tolist(), world.fleet.gpu_free.tolist(), world.fleet.memory_free.tolist(),
            {key: (m.since_ns, m.counter_mj, m.latest_mj, dict(m.holders)) for key, m in world.meters.items()},
            {project.id: dict(world.quota.held(project.id)) for project in PROJECTS},
            len(world.queue), dict(world.delayed), dict(world.reasons), world.metered_ns,
        )  # fmt: skip


__all__ = ["OPS", "History", "JobId", "LaunchId", "Op"]
