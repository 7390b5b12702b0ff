"""The whole control plane over a store and machines that only exist as values, stepped by hand on a virtual clock.

The plane, its turn loop and its hands on the engine are the real ones; they are not started, so nothing happens but
what is stepped. What outlives a crash is the store and the machines. Whoever plays chooses the order: turns, commands,
looks, reports, and what goes wrong. An auditor looks at the machines and at the store, never at the plane.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.core.history import GB, PROJECTS, RATES, SITE, START, node
from tidemill.control.enginework import EngineWork
from tidemill.control.identity import Directory
from tidemill.control.plane import ControlPlane
from tidemill.control.settings import Settings
from tidemill.control.vault import Vault
from tidemill.core.lifecycle import is_terminal
from tidemill.engines.simulated import Ending, Mishap, SimulatedEngine
from tidemill.errors import Fenced, Stale, StorageFull, TidemillError, Unavailable
from tidemill.model.events import Fact, NodeJoined, NodeWentAway, StopRequested, Submitted
from tidemill.model.ids import JobId, LaunchId, OrganizationId, PrincipalId, WorkloadId
from tidemill.model.job import Allocation, AllocationState, Cause, JobState, Workload
from tidemill.model.ledger import CPU_METER
from tidemill.model.plan import LaunchSpec, ObservedState, Sight
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, RetryOn, RetryPolicy, WorkloadSpec
from tidemill.model.values import replace
from tidemill.ports import Batch, JobFilter, Snapshot
from tidemill.store.memory import MemoryStore
from tidemill.units import HOUR_NS, MILLI, SECOND_NS

PEPPER = bytes(range(32))
NODES = (node(0, 2), node(1, 0))

Op = tuple[str, int, int]
"""What is done, and two numbers that choose to what."""

NAMES = (
    ["submit"] * 4 + ["hurry"] * 4 + ["turn"] * 8 + ["work"] * 8 + ["report"] * 6 + ["look"] * 6 + ["tick"] * 6 + ["stop"] * 2
    + ["crash"] * 2 + ["lose_worker", "lose_node", "return_node", "nodes", "store", "store", "store", "engine", "engine"]
)  # fmt: skip
OPS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=80)


class ShakyStore(MemoryStore):
    """A store of which the next calls fail as they are told to.

    ``lost``: stored, the answer does not arrive, and the next commit says Stale, as ``SqlStore`` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mishaps: deque[str] = deque()
        self._doubtful = False

    def commit(self, batch: Batch) -> int:
        mishap = self.mishaps.popleft() if self.mishaps else ""
        if mishap == "unavailable":
            raise Unavailable("The database does not answer.")
        if mishap == "full":
            raise StorageFull("There is no space left.")
        if mishap == "bug":
            raise RuntimeError("a store with a bug")
        doubtful, self._doubtful = self._doubtful, False
        if mishap == "stale" or doubtful:
            raise Stale("The state changed since it was read.")
        seq = super().commit(batch)
        if mishap == "lost":
            self._doubtful = True
            raise Unavailable("The answer was lost.")
        return seq

    def load(self) -> Snapshot:
        if self.mishaps and self.mishaps[0] == "unreadable":
            self.mishaps.popleft()
            raise Unavailable("The database does not answer.")
        return super().load()

    def allocation(self, launch_id: LaunchId) -> Allocation | None:
        if self.mishaps and self.mishaps[0] == "unreadable":
            self.mishaps.popleft()
            raise Unavailable("The database does not answer.")
        return super().allocation(launch_id)


def work_of(plane: ControlPlane) -> EngineWork:
    """The hands of a control plane that has one site only."""
    [work] = plane.sites.works.values()
    return work


class SlowEngine(SimulatedEngine):
    """A simulated engine during whose looks other things happen: ``meanwhile`` after it saw, before it answers."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def observe(self) -> Sight:
        seen = super().observe()
        self.meanwhile()
        return seen


@dataclass(frozen=True)
class Fate:
    """How the workers of a workload behave, which is in its ``run``."""

    kind: str
    seconds: int
    stop_takes_s: int

    @classmethod
    def of(cls, spec: LaunchSpec) -> Fate:
        kind, seconds, stop_takes_s = spec.run.split()
        return cls(kind, int(seconds), int(stop_takes_s))


def duration(spec: LaunchSpec) -> int:
    fate = Fate.of(spec)
    if fate.kind == "endless" or (fate.kind == "one of the gang" and spec.rank):
        return HOUR_NS
    return fate.seconds * SECOND_NS


def ending(spec: LaunchSpec) -> Ending:
    fate = Fate.of(spec)
    failing = fate.kind in ("error", "oom") or (fate.kind == "flaky" and spec.fence == 1)
    return Ending(
        exit_code=3 if failing else 0,
        cause=Cause.OUT_OF_MEMORY if fate.kind == "oom" else Cause.NONE,
        stop_takes_ns=fate.stop_takes_s * SECOND_NS,
    )


EXPECTED = {
    "ok": (JobState.SUCCEEDED, Cause.COMPLETED),
    "flaky": (JobState.SUCCEEDED, Cause.COMPLETED),
    "error": (JobState.FAILED, Cause.ERROR),
    "oom": (JobState.FAILED, Cause.OUT_OF_MEMORY),
    "refused": (JobState.FAILED, Cause.LAUNCH_FAILED),
    "endless": (JobState.FAILED, Cause.TIMED_OUT),
}
"""How a job of each fate ends, whatever goes wrong around it, unless it is stopped."""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tidemill-scenario-")


@dataclass
class SmallCloud:
    """One installation with two machines, and what its users were told."""

    now: int = START
    store: ShakyStore = field(default_factory=ShakyStore)
    engine: SlowEngine = field(init=False)
    plane: ControlPlane = field(init=False)
    fenced: int = 0
    told: dict[str, list[Fact]] = field(default_factory=dict)
    """What runners (by launch) and machines (under "") have yet to report, in order."""
    flying: dict[str, tuple[int, Future[Any]]] = field(default_factory=dict)
    """Reports not yet answered, and how many facts they hold."""
    asked: list[tuple[str, Future[None]]] = field(default_factory=list)
    """Submissions and stops not yet answered: ``submit …`` or ``stop …``."""
    submitted: set[WorkloadId] = field(default_factory=set)
    stopped: set[JobId] = field(default_factory=set)
    engine_mishaps: deque[Mishap] = field(default_factory=deque)
    count: int = 0

    def __post_init__(self) -> None:
        for project in PROJECTS:
            self.store.put_project(project)
        self.engine = SlowEngine(NODES, clock=lambda: self.now, duration=duration, ending=ending, mishap=self._mishap)
        self._start()

    def _start(self) -> None:
        self.plane = ControlPlane(
            settings=Settings(home=Path(_folder().name), meter_every="7s"),
            store=self.store,
            engine=self.engine,
            site=SITE,
            rates=RATES,
            directory=Directory(PEPPER, principals=(), known=()),
            vault=Vault(PEPPER),
            clock=lambda: self.now,
            on_fenced=self._on_fenced,
        )
        self._join()

    def _on_fenced(self) -> None:
        self.fenced += 1

    def _join(self) -> None:
        self.plane._turns.put([NodeJoined(at_ns=self.now, node=node) for node in self.engine.nodes()])

    def _mishap(self, call: str, launch_id: LaunchId) -> Mishap:
        worker = self.engine._machines.workers.get(launch_id)
        if call == "launch" and worker is None and self._fate_of(launch_id) == "refused":
            return Mishap.REFUSED
        return self.engine_mishaps.popleft() if self.engine_mishaps else Mishap.NONE

    def _fate_of(self, launch_id: LaunchId) -> str:
        held = MemoryStore.allocation(self.store, launch_id)
        job = self.store.job(held.job_id) if held is not None else None
        return job.workload.spec.run.split()[0] if job is not None else ""

    # -- what can be done -------------------------------------------------------------------------------------------

    def play(self, ops: list[Op]) -> None:
        """Do all that, looking at the machines after each step; what follows a look may happen during it."""
        left = iter(ops)
        for op in left:
            self.do(op, left)
            self.audit_machines()

    def do(self, op: Op, left: Iterator[Op] = iter(())) -> None:
        """One step."""
        name, a, b = op
        match name:
            case "submit":
                self.submit(a, b)
            case "turn":
                self.turn()
            case "work":
                for lane in (a % 4, b % 4):
                    work_of(self.plane).work_off(lane)
            case "hurry":
                self.hurry()
            case "report":
                self.report()
            case "look":
                self.look([op for op, _ in zip(left, range(b % 8), strict=False)])
            case "tick":
                self.now += (1 + a) * SECOND_NS // 4
            case "stop":
                self.stop(a)
            case "crash":
                self.crash()
            case "nodes":
                self._join()
            case "store":
                self.store.mishaps.extend(
                    [["unavailable"], ["lost"], ["stale"], ["full"], ["bug"], ["stale", "unreadable"], ["unreadable"]][
                        a % 7
                    ]
                )
            case "engine":
                self.engine_mishaps.extend([(Mishap.LOST_BEFORE, Mishap.LOST_AFTER)[a % 2]] * (1 + b % 3))
            case "lose_worker":
                if alive := self.alive():
                    self.engine.lose_worker(alive[a % len(alive)])
            case "lose_node":
                self.engine.lose_node(NODES[a % 2].id)
            case "return_node":  # a machine that is back before anybody was told that it went is not a new one
                self.fetch()
                if not any(isinstance(fact, NodeWentAway) for fact in self.told.get("", ())):
                    self.engine.return_node(NODES[a % 2].id)
            case _:
                raise AssertionError(name)

    def hurry(self) -> None:
        """All that waits for nobody happens: reports, a turn, its commands, and what they lead to at once."""
        self.report()
        self.turn()
        for lane in range(4):
            while work_of(self.plane).work_off(lane):
                pass
        self.report()
        self.turn()

    def submit(self, a: int, b: int, **changes: Any) -> Future[None]:
        """A small workload of some shape and fate."""
        self.count += 1
        fate = ["ok", "ok", "ok", "error", "flaky", "oom", "refused", "endless"][a % 8]
        gpus = [None, GpuRequest(count=1), GpuRequest(milli=500), GpuRequest(count=2)][b % 4]
        spec = WorkloadSpec(
            kind=Kind.ARRAY if b % 5 == 0 else Kind.TASK,
            name="w",
            run=f"{fate} {1 + (a + b) % 12} {b % 4}",
            nodes=1 + (a + b) % 2,
            array_size=2 if b % 5 == 0 else 1,
            resources=Resources(gpus=gpus if (a + b) % 2 == 0 else None, cpu_milli=1_000, memory_bytes=GB),
            retry=RetryPolicy(on=(RetryOn.NODE_LOST, *((RetryOn.ERROR,) if fate == "flaky" else ())), max=80),
            max_duration_ns=30 * SECOND_NS if fate == "endless" else 0,
            checkpoint_grace_ns=2 * SECOND_NS,
        )
        workload = Workload(
            id=WorkloadId(f"wl_{self.count:04d}"), organization_id=OrganizationId("o"), project_id=PROJECTS[0].id,
            principal_id=PrincipalId("u"), spec=spec, submitted_ns=self.now,
        )  # fmt: skip
        workload = replace(workload, spec=replace(spec, **changes))
        future = self.plane._turns.put([Submitted(at_ns=self.now, workload=workload)])
        self.asked.append((f"submit {workload.id}", future))
        return future

    def stop(self, a: int) -> None:
        """Ask that some job end."""
        jobs = [row.job.id for row in self.store.find_jobs(JobFilter(), limit=1_000).items]
        if jobs:
            job = jobs[a % len(jobs)]
            self.asked.append((f"stop {job}", self.plane._turns.put([StopRequested(at_ns=self.now, job_id=job)])))

    def turn(self) -> None:
        """One turn; whoever waited for it learns how it went."""
        self.plane._turns.take_turn()
        for what, future in self.asked:
            if future.done() and future.exception() is None:
                self._promised(*what.split())
        self.asked = [(what, future) for what, future in self.asked if not future.done()]
        for who, (count, future) in list(self.flying.items()):
            if future.done():
                del self.flying[who]
                error = future.exception()
                if error is None:
                    del self.told[who][:count]
                elif isinstance(error, Fenced):
                    self.told[who].clear()

    def _promised(self, verb: str, thing: str) -> None:
        """A user was told that it is done: from now on it has to be so."""
        if verb == "submit":
            assert self.store.workload(WorkloadId(thing)) is not None, f"{thing} was acknowledged and is not stored"
            self.submitted.add(WorkloadId(thing))
        else:
            row = self.store.job(JobId(thing))
            assert row is not None
            assert is_terminal(row.job.state) or row.job.state is JobState.STOPPING, (
                f"the stop of {thing} is not stored"
            )
            if row.job.state in (JobState.STOPPING, JobState.CANCELLED):
                self.stopped.add(JobId(thing))

    def fetch(self) -> None:
        """Hear what runners and machines have to tell."""
        for fact in self.engine.facts(self.now):
            self.told.setdefault(getattr(fact, "launch_id", ""), []).append(fact)

    def report(self) -> None:
        """Every runner and the machines send what they have to tell, if their last report was answered."""
        self.fetch()
        for who, facts in self.told.items():
            if not facts or who in self.flying:
                continue
            sent = list(facts)
            if who == "":
                self.flying[who] = (len(sent), self.plane._turns.put(sent))
            else:
                with suppress(Unavailable):
                    self.flying[who] = (len(sent), self.plane.report(LaunchId(who), sent[0].fence, sent))

    def look(self, meanwhile: list[Op] | None = None) -> None:
        """Compare with the engine's list; ``meanwhile`` happens while it is made."""

        def happen() -> None:
            self.engine.meanwhile = lambda: None
            for op in meanwhile or []:
                if op[0] not in ("crash", "look"):
                    self.do(op)

        self.engine.meanwhile = happen
        try:
            work_of(self.plane).look()
        except TidemillError:
            pass
        finally:
            self.engine.meanwhile = lambda: None

    def crash(self) -> None:
        """The control plane is gone with all that it had not stored; another takes over."""
        self.store.mishaps.clear()
        self.asked.clear()
        self.flying.clear()
        zombie = self.plane
        self.engine = self.engine.restarted()
        self._start()
        fenced, before = self.fenced, self.store.load()
        stop = zombie._turns.put([StopRequested(at_ns=self.now, job_id=job.id) for job in before.jobs])
        zombie._turns.take_turn()
        assert self.store.load() == before, "who does not lead any more stored something"
        if before.jobs and any(not job.stop_requested for job in zombie.world.jobs.values()):
            assert isinstance(stop.exception(), Fenced)
            assert self.fenced > fenced

    def alive(self) -> list[LaunchId]:
        """What runs, by the machines themselves."""
        workers = self.engine._now().workers.values()
        return [worker.launch_id for worker in workers if worker.state is ObservedState.ALIVE]

    def settle(self) -> None:
        """Nothing goes wrong any more, and time passes until nothing is left to do."""
        self.store.mishaps.clear()
        self.engine_mishaps.clear()
        for step in range(400):
            for place in NODES:
                self.do(("return_node", NODES.index(place), 0))
            self.hurry()
            if step % 3 == 0:
                self.look()
                self.turn()
            self.audit_machines()
            if not self.store.load().jobs and not self.engine.observe().launches and not any(self.told.values()):
                return
            due = [at for at in (self.engine.next_ns(), self.plane._turns.wake_ns) if at]
            self.now = max(self.now + SECOND_NS // 10, min(min(due, default=0), self.now + 2 * SECOND_NS))
        live = [(job.id, job.state) for job in self.store.load().jobs]
        raise AssertionError(f"not over: {live}; the engine has {self.engine.observe().launches}; to tell: {self.told}")

    # -- the auditor --------------------------------------------------------------------------------------------------

    def audit_machines(self) -> None:
        """At no instant does anything run that must not."""
        starts = {launch: count for launch, count in self.engine._machines.starts.items() if count > 1}
        assert not starts, f"started more than once: {starts}"
        attempts: dict[str, set[str]] = {}
        for launch in self.alive():
            run, attempt, _ = launch.rsplit("-", 2)
            attempts.setdefault(run, set()).add(attempt)
        overlapping = {run: found for run, found in attempts.items() if len(found) > 1}
        assert not overlapping, f"two attempts of a job run at the same time: {overlapping}"
        assert not self.engine.violations, self.engine.violations

    def audit(self) -> None:
        """After all is over: every promise about jobs and books."""
        rows = self.store.find_jobs(JobFilter(), limit=1_000).items
        assert self.submitted <= {row.workload.id for row in rows}
        for row in rows:
            job, fate = row.job, row.workload.spec.run.split()[0]
            wanted = {EXPECTED[fate]}
            if job.stop_requested or job.cause is Cause.CANCELLED:
                wanted.add((JobState.CANCELLED, Cause.CANCELLED))
            if job.id in self.stopped:
                wanted = {(JobState.CANCELLED, Cause.CANCELLED)}
            assert (job.state, job.cause) in wanted, (
                f"{job.id} is to be {wanted} and is {job.state}: {job.cause} {job.detail}"
            )
            if job.cause is Cause.ERROR:
                assert job.exit_code == 3
        held = [held for row in rows for held in self.store.allocations(row.job.id)]
        assert all(one.state is AllocationState.RELEASED for one in held)
        self.audit_books(held)
        assert not self.plane.world.jobs
        assert not self.plane.world.allocations

    def audit_books(self, held: list[Allocation]) -> None:
        """usage + idle = capacity at each instant that a machine was there, and who held pays for all of it."""
        lines = self.store.ledger(limit=100_000).items
        paid: dict[tuple[str, str], int] = {}
        edges: dict[tuple[str, str], dict[int, int]] = {}
        for line in lines:
            use = line.usage
            edge = edges.setdefault((use.node_id, use.meter), {})
            edge[use.from_ns] = edge.get(use.from_ns, 0) + use.milli
            edge[use.to_ns] = edge.get(use.to_ns, 0) - use.milli
            key = (use.launch_id, use.meter)
            paid[key] = paid.get(key, 0) + use.milli * (use.to_ns - use.from_ns)
        for place in NODES:
            there = self._presence(place.name)
            for meter, capacity in [(CPU_METER, place.cpu_milli), *((str(gpu.id), MILLI) for gpu in place.devices)]:
                booked = edges.get((place.id, meter), {})
                level, tiles = 0, []
                for at in sorted(booked):
                    before, level = level, level + booked[at]
                    assert level in (0, capacity), (
                        f"{meter} of {place.name}: {level} of {capacity} booked at {at - START}"
                    )
                    if before == 0 and level:
                        tiles.append([at, at])
                    if before and not level:
                        tiles[-1][1] = at
                until = tiles[-1][1] if tiles else 0
                wanted = [(since, min(end or until, until)) for since, end in there if since < until and since != end]
                assert [tuple(tile) for tile in tiles] == wanted, f"{meter} of {place.name} has gaps"
        for one in held:
            for name, milli in [(CPU_METER, one.cpu_milli), *((share.device_id, share.milli) for share in one.devices)]:
                due = milli * (one.released_ns - one.held_ns)
                assert paid.get((one.id, str(name)), 0) == due, (
                    f"{one.id} pays {paid.get((one.id, str(name)), 0)} of {due}"
                )

    def _presence(self, name: str) -> list[tuple[int, int]]:
        """When a machine was there, by the event log: from, until (zero: still)."""
        found: list[tuple[int, int]] = []
        for event in self.store.events(limit=100_000):
            entry, body = event.entry, dict(event.entry.body)
            if body.get("node") == name and entry.type == "NodeJoined" and not (found and not found[-1][1]):
                if found and found[-1][1] == entry.at_ns:
                    found[-1] = (found[-1][0], 0)
                else:
                    found.append((entry.at_ns, 0))
            elif body.get("node") == name and entry.type == "NodeLost":
                found[-1] = (found[-1][0], entry.at_ns)
        return found


def played(ops: list[Op]) -> SmallCloud:
    """A cloud after that history and until nothing is left to do, audited all the while."""
    cloud = SmallCloud()
    cloud.turn()
    cloud.play(ops)
    cloud.settle()
    cloud.audit()
    return cloud
