"""The whole control plane over machines that only exist as values, stepped by hand on a virtual clock.

The plane, its turn loop, its hands on engines, its leases and mailboxes are the real ones; they are not started, so
nothing happens but what is stepped. What outlives a crash is the disk and the machines. Whoever plays chooses the order:
turns, commands, looks, reports, and what goes wrong. An auditor looks at the machines' journal, at the disk and at what
users were told, never at the plane.
"""

from __future__ import annotations

import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from tests.core.history import GB, PROJECTS, RATES, SITE, node
from tests.faults.simulation.auditor import Auditor, Broken
from tests.faults.simulation.disks import Disk, Killed, MemoryDisk, ShakySqlStore, ShakyStore
from tests.faults.simulation.machines import START, Journal, Machine, MachineEngine, Runner
from tests.faults.simulation.network import FATES, Gate, SteppedOutpost, Wire, wait_by_stepping
from tidemill.control.clock import SteadyClock
from tidemill.control.enginework import EngineWork
from tidemill.control.identity import Directory, Identity
from tidemill.control.plane import ControlPlane
from tidemill.control.replicas import STALLED_S, Candidate
from tidemill.control.runners import Directive
from tidemill.control.settings import Settings
from tidemill.control.vault import Vault
from tidemill.errors import Deposed, Fenced, TidemillError, Unauthorized, Unavailable
from tidemill.model.events import (
    Fact,
    Marking,
    NodeJoined,
    NodeMarked,
    NodeWentAway,
    StopRequested,
    Submitted,
)
from tidemill.model.fleet import NodeState, Outpost, Site, SiteKind
from tidemill.model.ids import (
    JobId,
    LaunchId,
    NodeId,
    OrganizationId,
    OutpostId,
    PrincipalId,
    ProjectId,
    ReplicaId,
    SiteId,
    TokenId,
    WorkloadId,
)
from tidemill.model.job import Workload
from tidemill.model.replica import Replica
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, Placement, RetryOn, RetryPolicy, WorkloadSpec
from tidemill.model.tenant import Principal, PrincipalKind, Scope, Token
from tidemill.model.values import replace
from tidemill.ports import JobFilter
from tidemill.units import HOUR_NS, SECOND_NS

PEPPER = bytes(range(32))
NODES = (node(0, 2), node(1, 0))
"""At the site of the control plane, worked by its own engine."""
EDGE = Site(id=SiteId("e"), name="e", kind=SiteKind.EDGE, engine="local", lease_ns=30 * SECOND_NS)
EDGE_NODES = tuple(replace(node(number, 1), site_id=EDGE.id) for number in (2, 3))
"""At a site whose outposts dial in, and whose workers hold leases."""
DRIFTS_PPM: Final = (0, 0, 9_000, -9_000)
USER = Identity(
    principal_id=PrincipalId("u"), organization_id=OrganizationId("o"), name="u", scopes=frozenset({Scope.ADMIN})
)
GIVES_UP_NS: Final = 15 * SECOND_NS
"""After so long without an answer a runner asks again."""
BEAT_NS: Final = 2 * SECOND_NS
MISHAPS: Final = (
    ["unavailable"], ["lost"], ["stale"], ["full"], ["bug"], ["stale", "unreadable"], ["unreadable"],
    ["lost", "unavailable"], ["unavailable"] * 4, ["lost", "unreadable"],
)  # fmt: skip

_LARGE: Final = frozenset({"crash", "look", "restore", "live", "long", "silence"})
"""What does not happen during a look."""

Op = tuple[str, int, int]
"""What is done, and two numbers that choose to what."""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tidemill-simulation-")


@cache
def _settings() -> Settings:
    return _Settings(
        home=Path(_folder().name), meter_every="7s", min_run="3s", retry_backoff_max="5s", flap_hold="30s", replan="7s"
    )


class _Settings(Settings):
    """Settings whose policy is read once."""

    @property
    def policy(self) -> Any:
        return _policy()


@cache
def _policy() -> Any:
    return Settings.policy.__get__(_settings())


@dataclass(eq=False)
class Control:
    """One process of the control plane."""

    number: int
    plane: ControlPlane
    store: ShakyStore | ShakySqlStore
    seam: Callable[[str], None]
    candidate: Candidate | None = None
    is_up: bool = True
    is_paused: bool = False
    flying: list[_Flight] = field(default_factory=list)
    """Requests of runners that are not answered yet."""

    @property
    def name(self) -> str:
        """How it is called among those that may lead."""
        return self.candidate.own_id if self.candidate is not None else ""

    def check_leads(self) -> None:
        """Raises: Unavailable when it is not sure to lead, where there may be others."""
        self.plane.check_leads()


class LeaderLock:
    """The database's lock, of which one session has hold, and the beats of who leads: as ``store.standing`` sees them."""

    def __init__(self, cloud: SmallCloud) -> None:
        self.holder = ""
        self.beat_ns = START
        self.own_id = ReplicaId("")
        self._cloud = cloud
        self._count = 0

    def candidate(self) -> Candidate:
        """One that takes the lock, which is free."""
        self._count += 1
        standing = _Standing(self, ReplicaId(f"control-{self._count}"), self._cloud)
        candidate = Candidate(standing, on_deposed=lambda: None, now=lambda: self._cloud.now / SECOND_NS)
        self.holder = ""
        candidate._try()
        return candidate


class _Standing:
    """One replica's place among the control planes of a disk."""

    def __init__(self, lock: LeaderLock, own_id: ReplicaId, cloud: SmallCloud) -> None:
        self.own_id = own_id
        self._lock = lock
        self._cloud = cloud

    def try_to_lead(self) -> bool:
        self._lock.holder = self._lock.holder or self.own_id
        return self._lock.holder == self.own_id

    def epoch(self) -> int:
        return self._cloud.disk.epoch()

    def beat(self) -> tuple[Replica, ...]:
        self._lock.beat_ns = self._cloud.now
        return (Replica(id=self.own_id, api_url="http://control", beats=1, leads=True, quiet_ms=0),)

    def end_holder(self) -> None:
        self._lock.holder = ""

    def leave(self) -> None:
        """Nobody looks for it."""

    def sweep(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        if self._lock.holder == self.own_id:
            self._lock.holder = ""


@dataclass(eq=False)
class _Flight:
    """A request of a runner. ``is_echo``: nobody waits for its answer."""

    machine: Machine
    runner: Runner
    told: int
    sent_ns: int
    answer: Future[Directive]
    fate: str = ""
    is_echo: bool = False


@dataclass(eq=False)
class Asked:
    """Something that a user wants and asks for until it is done. ``what``: ``submit …`` or ``stop …``."""

    what: str
    future: Future[Any]


@dataclass(eq=False)
class Order:
    """A submission with an idempotency key, which a user repeats until it is acknowledged."""

    key: str
    spec: WorkloadSpec
    futures: list[Future[tuple[Workload, ...]]] = field(default_factory=list)
    got: set[tuple[WorkloadId, ...]] = field(default_factory=set)
    """The different answers that came."""
    is_given_up: bool = False


class SmallCloud:
    """One installation with two machines of its own, two at another site, and what its users were told."""

    def __init__(self, disk: Disk | None = None, *, is_shared: bool = False) -> None:
        """With ``is_shared`` several control planes may lead, none has an engine of its own, and all machines dial in."""
        self.now = START
        self.is_shared = is_shared
        self.site = replace(SITE, lease_ns=EDGE.lease_ns) if is_shared else SITE
        self.wall_ns = 0
        """By how much the control plane's wall clock is off."""
        self.has_leapt = False
        """Whether a control plane began with a wall clock ahead of the last one's: then what is limited ends early."""
        self._wall_at_start_ns = 0
        self.disk: Disk = disk or MemoryDisk()
        self.journal = Journal()
        drifts = iter(DRIFTS_PPM)
        self.machines = {
            one.id: Machine(one, self.journal, lambda: self.now, drift_ppm=next(drifts))
            for one in (*NODES, *EDGE_NODES)
        }
        self.wires = {one: Wire() for one in self.machines}
        self.engine_mishaps: deque[str] = deque()
        self.outposts = [
            SteppedOutpost(
                self,
                Outpost(
                    id=OutpostId(f"out_{one.id}"), site_id=one.site_id, name=one.name, engine="local", created_ns=START
                ),
                self.machines[one.id],
            )
            for one in (EDGE_NODES if not is_shared else (*EDGE_NODES, *NODES))
        ]
        self.fenced = 0
        self.told: list[Fact] = []
        """What the engine of this site has to tell of its machines, in order."""
        self._telling: tuple[int, Future[None]] | None = None
        self.asked: list[Asked] = []
        self.orders: list[Order] = []
        self.submitted: set[WorkloadId] = set()
        self.stopped: set[JobId] = set()
        self.backups: list[tuple[Any, int, set[WorkloadId], set[JobId]]] = []
        self.count = 0
        self.fuse = 0
        """How many seams are left until the control plane is killed; zero: it is not."""
        self.controls: list[Control] = []
        self.lock = LeaderLock(self)
        self.hurt: set[NodeId] = set()
        """Machines that were off, cut off, or out of reach for another reason that is not the control plane's."""
        self._later: list[tuple[int, Callable[[], None]]] = []
        self._meanwhile: list[Op] = []
        self._steps = 0
        self._dice = random.Random(1)
        self.diary: list[tuple[int, str]] = []
        """What was done, for reading."""
        for project in PROJECTS:
            self.disk.look.put_project(project)
        self.disk.look.put_site(EDGE)
        for outpost in self.outposts:
            self.disk.look.put_outpost(outpost.outpost)
        self.auditor = Auditor(self)
        self._start()

    # -- processes of the control plane ---------------------------------------------------------------------------

    @property
    def control(self) -> Control:
        """The one that leads, which is up."""
        return self.controls[-1]

    @property
    def plane(self) -> ControlPlane:
        return self.control.plane

    @property
    def store(self) -> Any:
        """The store of the control plane that leads."""
        return self.control.store

    def acting(self) -> list[EngineWork]:
        """The hands of the control plane that leads, unless it stands still."""
        return [] if self.control.is_paused else self.works

    @property
    def works(self) -> list[EngineWork]:
        """The hands of the control plane that leads."""
        return list(self.plane.sites.works.values())

    def _start(self) -> None:
        store = self.disk.connect()
        candidate = self.lock.candidate() if self.is_shared else None
        control = Control(len(self.controls), None, store, lambda _: None, candidate)  # type: ignore[arg-type]
        engine: Any = (
            None if self.is_shared else Gate(MachineEngine([self.machines[one.id] for one in NODES]), self, control)
        )
        plane = ControlPlane(
            settings=_settings(),
            store=store,
            engine=engine,
            site=self.site,
            rates=RATES,
            directory=Directory(PEPPER, principals=(_PRINCIPAL,), known=(_TOKEN,)),
            vault=Vault(PEPPER),
            clock=SteadyClock(wall=lambda: self.now + self.wall_ns, monotonic=lambda: self.now),
            on_fenced=lambda: self._on_fenced(control),
            monotonic=lambda: self.now,
            entropy=self._dice.randbytes,
            candidate=candidate,
        )
        control.plane = plane
        for site_engine in plane.sites._engines.values():
            site_engine._wait = wait_by_stepping(self, control)
        sites: Any = plane.sites
        tell = sites._tell
        sites._tell = lambda facts: _Taken(tell(facts), plane)
        control.seam = store.seam = lambda name: self._burn(control, name)
        self.controls.append(control)
        self._telling = None
        self.has_leapt |= self.wall_ns > self._wall_at_start_ns
        self._wall_at_start_ns = self.wall_ns
        self._join()

    def _on_fenced(self, control: Control) -> None:
        self.fenced += 1
        if control.candidate is not None:
            control.is_up = False  # its process begins anew

    def _join(self) -> None:
        """What a starting control plane does with its own engine."""
        if self.is_shared:
            return
        nodes = MachineEngine([self.machines[one.id] for one in NODES]).nodes()
        self.plane._turns.put([NodeJoined(at_ns=self.plane._clock(), node=one) for one in nodes])

    def _burn(self, control: Control, name: str) -> None:
        if not control.is_up:
            raise Killed
        if self.fuse and control is self.control:
            self.fuse -= 1
            if not self.fuse:
                self.note(f"the control plane is killed {name}")
                raise Killed

    @contextmanager
    def running(self, control: Control | None = None) -> Iterator[None]:
        """Control plane code runs; when it is killed, another process takes over before anything else happens."""
        control = control or self.control
        try:
            yield
        except Killed:
            if control is self.control:
                self.crash()

    def crash(self) -> None:
        """The control plane is gone with all that it had not stored; another takes over."""
        self.fuse = 0
        self._bury()
        self._start()

    def _bury(self) -> None:
        self.control.is_up = False
        self._meanwhile = []
        self.asked.clear()
        for order in self.orders:
            order.futures.clear()
        for flight in self.control.flying:
            flight.runner.is_asking = False
        self.control.flying.clear()

    def dialled(self, wire: Wire) -> Control | None:
        """Which control plane a machine reaches."""
        old = self.old
        control = old[-1] if wire.dials_old and old else self.control
        return control if control.is_up and not control.is_paused else None

    # -- who leads, where several may ----------------------------------------------------------------------------------

    @property
    def old(self) -> list[Control]:
        """Those that led before, and have not heard yet that they do not."""
        return [one for one in self.controls[:-1] if one.is_up]

    def depose(self, *, is_paused: bool) -> None:
        """The leader stands still, or its session with the database breaks and it goes on for a while."""
        if not self.is_shared or self.control.is_paused:
            return
        self.control.is_paused = is_paused
        if not is_paused:
            self.lock.holder = ""
            self._take_over()

    def look_for_leader(self) -> None:
        """What standing by and leading come to: a leader that stands still is replaced, one that leads is sure of it."""
        control = self.control
        if control.is_paused and self.now - self.lock.beat_ns > STALLED_S * SECOND_NS:
            self.lock.holder = ""
            self._take_over()
        elif control.candidate is not None and control.is_up and not control.is_paused:
            with suppress(TidemillError):
                control.candidate._confirm()

    def _take_over(self) -> None:
        before = self.control
        self.asked.clear()
        for order in self.orders:
            order.futures.clear()
        self.fuse = 0
        self._start()
        self.note(f"control plane {self.control.number} leads instead of {before.number}")

    def step_old(self, a: int) -> None:
        """One that does not lead any more goes on as if it did: a turn, its commands, or a look."""
        if not (old := [one for one in self.old if not one.is_paused]):
            return
        before, control = self.disk.look.load(), old[a % len(old)]
        with suppress(Killed, TidemillError, RuntimeError):
            match a // 2 % 4:
                case 0:
                    control.plane._turns.take_turn()
                case 1:
                    for work in control.plane.sites.works.values():
                        for lane in range(4):
                            work.work_off(lane)
                case 2:
                    for work in control.plane.sites.works.values():
                        work.watch()
                case _:
                    control.plane.sites.look_after()
        if a // 2 % 4 == 0 and self.disk.look.load() != before:
            raise Broken("I3", "who does not lead any more stored something")

    # -- what can be done -------------------------------------------------------------------------------------------

    def play(self, ops: list[Op]) -> None:
        """Do all that, looking at the machines after each step; what follows a look may happen during it."""
        left = iter(ops)
        for op in left:
            self.do(op, left)
            self.auditor.audit_machines()

    def do(self, op: Op, left: Iterator[Op] = iter(())) -> None:
        """One step."""
        name, a, b = op
        self.note(f"{name} {a} {b}")
        self._do_what_is_late()
        match name:
            case "submit":
                self.order(a, b)
            case "again":
                self.order_again(a, b)
            case "turn":
                self.turn()
            case "work":
                self.work(a, b)
            case "hurry":
                self.hurry()
            case "report":
                self.report()
            case "look":
                self.look([op for op, _ in zip(left, range(b % 8), strict=False)])
            case "tick":
                self.now += (1 + a) * SECOND_NS // 4
            case "live":
                self.live((1 + a) * SECOND_NS // 2, stride_ns=3 * SECOND_NS // 2)
            case "long":
                self.live((5 + a) * 2 * SECOND_NS, stride_ns=4 * SECOND_NS)
            case "stop":
                self.stop(a)
            case "crash":
                self.crash()
            case "kill":
                self.fuse = 1 + a % 9
            case "nodes":
                self._join()
            case "store":
                self.store.mishaps.extend(MISHAPS[a % len(MISHAPS)])
            case "engine":
                self.engine_mishaps.extend([("lost", "unanswered", "twice")[a % 3]] * (1 + b % 3))
            case "wire":
                self._wire(a).fates.extend([FATES[b % 4]] * (1 + b // 8))
            case "cut":
                wire = self._wire(a)
                wire.is_cut_out, wire.is_cut_in = b % 3 != 1, b % 3 != 0
            case "silence":
                wire = self._wire(2 + a % 2)
                wire.is_cut_out = wire.is_cut_in = True
                self.live((18 + b) * SECOND_NS, stride_ns=2 * SECOND_NS)
            case "heal":
                self._wire(a).heal()
            case "hold":
                self._wire(2 + a % 2).holds += 1 + b % 5
            case "restart_outpost":
                self.outposts[a % 2].restart()
            case "lose_worker":
                if alive := sorted(self.alive()):
                    launch = alive[a % len(alive)]
                    self._machine_of(launch).lose_worker(launch)
            case "lose_node":
                self.lose_node(NodeId(f"n{a % 4}"))
            case "return_node":
                self.return_node(NodeId(f"n{a % 4}"))
            case "reboot":
                self.lose_node(NodeId(f"n{a % 4}"))
                self.return_node(NodeId(f"n{a % 4}"))
            case "mark":
                self.mark(a, b)
            case "wall":
                self.wall_ns += (HOUR_NS, -HOUR_NS, 90 * SECOND_NS, -90 * SECOND_NS)[a % 4]
            case "machine_wall":
                self.machines[NodeId(f"n{a % 4}")].jump_ns += (HOUR_NS, -HOUR_NS)[b % 2]
            case "backup":
                self.backup()
            case "restore":
                self.restore(a)
            case "end_stranger":
                self.end_strangers()
            case "pause":
                self.depose(is_paused=a % 2 == 0)
            case "resume":
                for control in self.controls:
                    control.is_paused = False
            case "dial_old":
                self._wire(a).dials_old = b % 4 != 0
            case "step_old":
                self.step_old(a)
            case _:
                raise AssertionError(name)
        self._steps += 1

    def live(self, length_ns: int, *, stride_ns: int = SECOND_NS) -> None:
        """Time passes, and all that happens by itself happens."""
        until = self.now + length_ns
        while self.now < until:
            self.now = min(until, self.now + stride_ns)
            self.breathe()

    def breathe(self) -> None:
        """All loops of all processes go round once."""
        self._do_what_is_late()
        self.look_for_leader()
        for outpost in self.outposts:
            outpost.step()
        self.hurry(turns=False)
        self.watch()
        self.look_after()
        self.hurry(turns=False)
        self.auditor.audit_machines()

    def hurry(self, *, turns: bool = True) -> None:
        """All that waits for nobody happens: reports, a turn, its commands, and what they lead to at once."""
        self.report()
        self.turn(only_if_due=not turns)
        for work in self.acting():
            for lane, waiting in enumerate(work._lanes):
                while not waiting.empty() and self.control.is_up:
                    with self.running():
                        work.work_off(lane)
        self.report()
        self.turn(only_if_due=not turns)

    def work(self, a: int, b: int) -> None:
        """Two lanes get round to a command each."""
        with self.running():
            for work in self.acting():
                for lane in (a % 4, b % 4):
                    work.work_off(lane)

    def submit(self, a: int, b: int, **changes: Any) -> Future[None]:
        """A small workload of some shape and fate, without an idempotency key."""
        self.count += 1
        workload = Workload(
            id=WorkloadId(f"wl_{self.count:04d}"), organization_id=OrganizationId("o"), project_id=PROJECTS[0].id,
            principal_id=PrincipalId("u"), spec=replace(_spec(a, b), **changes), submitted_ns=self.plane._clock(),
        )  # fmt: skip
        future = self.plane._turns.put([Submitted(at_ns=self.plane._clock(), workload=workload)])
        self.asked.append(Asked(f"submit {workload.id}", future))
        return future

    def order(self, a: int, b: int) -> Order:
        """A small workload of some shape and fate, which its user wants until it is acknowledged."""
        order = Order(f"key-{len(self.orders)}", _spec(a, b))
        self.orders.append(order)
        self._place(order)
        return order

    def order_again(self, a: int, b: int) -> None:
        """A user who has an answer, or waits for one, sends the same request again, some times."""
        if self.orders:
            for _ in range(1 + b):
                self._place(self.orders[a % len(self.orders)])

    def _place(self, order: Order) -> None:
        if self.control.is_paused or order.is_given_up:
            return
        try:
            order.futures.append(
                self.plane.jobs.submit(
                    USER, PROJECTS[0], [order.spec], idempotency_key=order.key, request_digest=order.key
                )
            )
        except Unavailable:
            return
        except TidemillError:
            order.is_given_up = not order.got

    def stop(self, a: int) -> None:
        """Ask that some job end."""
        jobs = [row.job.id for row in self.disk.look.find_jobs(JobFilter(), limit=1_000).items]
        if jobs:
            job = jobs[a % len(jobs)]
            fact = StopRequested(at_ns=self.plane._clock(), job_id=job)
            self.asked.append(Asked(f"stop {job}", self.plane._turns.put([fact])))

    def mark(self, a: int, b: int) -> None:
        """Cordon, drain or resume a node; or have its cloud say that it takes it back soon."""
        marking = (Marking.DRAIN, Marking.RESUME, Marking.CORDON, Marking.DRAIN)[b % 4]
        until = self.plane._clock() + 10 * SECOND_NS if b % 4 == 3 else 0
        fact = NodeMarked(
            at_ns=self.plane._clock(), node_id=NodeId(f"n{a % 4}"), marking=marking, by="u", until_ns=until
        )
        self.plane._turns.put([fact])

    def turn(self, *, only_if_due: bool = False) -> None:
        """One turn; whoever waited for it learns how it went."""
        turns = self.plane._turns
        if self.control.is_paused:
            return
        if not only_if_due or turns._inbox or 0 < turns.wake_ns <= self.plane._clock():
            with self.running():
                turns.take_turn()
        self._hear()

    def _hear(self) -> None:
        """Answers arrive at users, runners and machines."""
        if self.asked:
            for one in self.asked:
                if one.future.done() and one.future.exception() is None:
                    self.auditor.promised(*one.what.split())
            self.asked = [one for one in self.asked if not one.future.done()]
        for order in [order for order in self.orders if order.futures]:
            for future in order.futures:
                if future.done() and future.exception() is None:
                    self.auditor.acknowledged(order, tuple(one.id for one in future.result()))
            order.futures = [future for future in order.futures if not future.done()]
        if self._telling is not None and self._telling[1].done():
            count, future = self._telling
            self._telling = None
            if future.exception() is None:
                del self.told[:count]
        for control in self.controls[-2:]:
            flying = control.flying
            if flying and (landed := [flight for flight in flying if flight.answer.done()]):
                control.flying = [flight for flight in flying if not flight.answer.done()]
                for flight in landed:
                    self._land(flight)

    def report(self) -> None:
        """Every runner and the machines send what they have to tell, if their last report was answered."""
        if self.told and self._telling is None:
            self._telling = (len(self.told), self.plane._turns.put(list(self.told)))
        for machine in self.machines.values():
            if not machine.is_on or not machine.folders:
                continue
            machine.advance()
            for runner in list(machine.runners()):
                if runner.is_asking and self.now - runner.asked_ns > GIVES_UP_NS:
                    runner.is_asking = False
                if not runner.is_asking and (runner.outbox or self.now - runner.asked_ns >= BEAT_NS):
                    self._ask(machine, runner)
        self._hear()

    def _ask(self, machine: Machine, runner: Runner) -> None:
        """A runner reports, or beats when it has nothing to report."""
        wire = self.wires[machine.node.id]
        fate = wire.next_fate()
        control = self.dialled(wire)
        facts = list(runner.outbox)
        runner.asked_ns = self.now
        if control is None or wire.is_cut_out or fate == "lost":
            return
        if fate == "late":
            self.later(lambda: self._serve(control, machine, runner, facts, self.now, "", is_echo=True))
            return
        self._serve(control, machine, runner, facts, self.now, fate, is_echo=False)
        if fate == "twice":
            sent = self.now
            self.later(lambda: self._serve(control, machine, runner, facts, sent, "", is_echo=True))

    def _serve(
        self,
        control: Control,
        machine: Machine,
        runner: Runner,
        facts: list[Fact],
        sent: int,
        fate: str,
        *,
        is_echo: bool,
    ) -> None:
        """As ``POST /v1/runners/…/report`` and ``…/beat`` do."""
        if not control.is_up:
            return
        spec, answer = runner.spec, Future[Directive]()
        try:
            control.plane.directory.authenticate(spec.runner_token, now=self.now)
            control.check_leads()
            if facts:
                answer = control.plane.runners.report(spec.launch_id, spec.fence, facts)
            else:
                answer.set_result(control.plane.runners.beat(spec.launch_id, spec.fence, cpu_used_ns=0, rss_bytes=0))
        except (TidemillError, Unauthorized) as error:
            answer.set_exception(error)
        runner.is_asking = runner.is_asking or not is_echo
        control.flying.append(_Flight(machine, runner, len(facts), sent, answer, fate, is_echo))

    def _land(self, flight: _Flight) -> None:
        """A runner gets an answer, or not."""
        wire = self.wires[flight.machine.node.id]
        if flight.is_echo:
            return
        flight.runner.is_asking = False
        if wire.is_cut_in or flight.fate == "unanswered" or not flight.machine.is_on:
            return
        error = flight.answer.exception()
        if error is None:
            told = flight.answer.result()
            flight.machine.answered(
                flight.runner, sent_ns=flight.sent_ns, told=flight.told, stop=told.stop, grace_ns=told.grace_ns
            )
        elif isinstance(error, Fenced) and not isinstance(error, Deposed):
            flight.machine.fenced(flight.runner)

    def look(self, meanwhile: list[Op] | None = None) -> None:
        """Compare with the engines' lists; ``meanwhile`` happens while the first is made."""
        self._meanwhile = [op for op in meanwhile or [] if op[0] not in _LARGE]
        for work in self.acting():
            with self.running(), suppress(TidemillError):
                work.look()
        self._meanwhile = []

    def happen_meanwhile(self, control: Control) -> None:
        """What happens between an engine's look and its answer."""
        ops, self._meanwhile = self._meanwhile, []
        for op in ops:
            self.do(op)
        if not control.is_up:
            raise Killed

    def watch(self) -> None:
        """Every site is looked at, and its nodes join."""
        for work in self.acting():
            with self.running(), suppress(TidemillError, RuntimeError):
                work.watch()

    def look_after(self) -> None:
        """What follows from silence is told."""
        if self.control.is_paused:
            return
        with self.running(), suppress(TidemillError, RuntimeError):
            self.plane.sites.look_after()
        self._hear()

    def lose_node(self, node_id: NodeId) -> None:
        """A machine loses power; the engine of this site knows when it was one of its own."""
        machine = self.machines[node_id]
        if machine.is_on:
            machine.turn_off()
            self.hurt.add(node_id)
            if not self.is_shared and node_id in {one.id for one in NODES}:
                self.told.append(NodeWentAway(at_ns=self.now, node_id=node_id, detail="the machine was lost"))

    def return_node(self, node_id: NodeId) -> None:
        """It boots, once whoever has to was told that it went: no engine tells so of a machine that is back."""
        machine = self.machines[node_id]
        if not machine.is_on and not any(isinstance(one, NodeWentAway) and one.node_id == node_id for one in self.told):
            machine.turn_on()
            for outpost in self.outposts:
                if outpost.machine is machine:
                    outpost.restart()
            if not self.is_shared and node_id in {one.id for one in NODES}:
                self.told.append(NodeJoined(at_ns=self.now, node=machine.node))

    def backup(self) -> None:
        """Somebody makes a backup."""
        self.backups.append((self.disk.backup(), self.now, set(self.submitted), set(self.stopped)))

    def restore(self, a: int) -> None:
        """The control plane ends, and another begins over an older state."""
        if not self.backups:
            return
        copy, _, submitted, stopped = self.backups[a % len(self.backups)]
        self._bury()
        self.now += 5 * SECOND_NS
        self.fuse = 0
        self.disk.restore(copy, now_ns=self.now + self.wall_ns)
        self.submitted, self.stopped = set(submitted), set(stopped)
        self.auditor.restored()
        for order in self.orders:
            order.got.clear()
        self._start()

    def end_strangers(self) -> None:
        """Somebody ends what an older state does not know."""
        for stranger in self.plane.sites.strangers():
            with self.running(), suppress(TidemillError):
                self.plane.sites.end_stranger(stranger.launch_id, grace_ns=0)

    def later(self, do: Callable[[], None]) -> None:
        """Have it happen some steps later."""
        self._later.append((self._steps + 3, do))

    def _do_what_is_late(self) -> None:
        due = [do for at, do in self._later if at <= self._steps]
        self._later = [(at, do) for at, do in self._later if at > self._steps]
        for do in due:
            with self.running():
                do()

    def alive(self) -> list[LaunchId]:
        """What runs, by the machines themselves."""
        for machine in self.machines.values():
            machine.advance()
        return list(self.journal.live)

    def note(self, what: str) -> None:
        """Write into the diary."""
        self.diary.append((self.now, what))

    def told_story(self) -> list[str]:
        """What was done, what really ran, and what the event log has, by time."""
        lines = [(at, f"       {what}") for at, what in self.diary]
        lines += [
            (line.at_ns, f"RAN    {line.what} {line.launch_id} on {line.node_id} {line.why}")
            for line in self.journal.lines
        ]
        for event in self.disk.look.events(limit=100_000):
            entry = event.entry
            body = " ".join(f"{name}={value}" for name, value in entry.body if value not in ("", None))
            lines.append((entry.at_ns, f"LOG    {entry.type} {entry.job_id} {body}"))
        return [f"{(at - START) / SECOND_NS:9.2f} s  {what}" for at, what in sorted(lines, key=lambda line: line[0])]

    # -- until nothing is left to do -----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Nothing goes wrong any more, and time passes until nothing is left to do, which it has to be in time."""
        self.end_faults()
        for _ in range(400):
            for node_id in self.machines:
                self.return_node(node_id)
            self.breathe()
            self._want_again()
            self._resume()
            self.end_strangers()
            if self.is_quiet():
                return
            self.auditor.audit_orphans()
            self.now = max(self.now + SECOND_NS // 4, min(self._next_ns(), self.now + 2 * SECOND_NS))
            self._steps += 1
        self.auditor.stuck()

    def end_faults(self) -> None:
        """From now on nothing goes wrong."""
        self.fuse = 0
        for control in self.controls:
            control.is_paused = False
            control.is_up = control.is_up and control is self.control
        self.lock.holder = self.control.name
        self.store.mishaps.clear()
        self.engine_mishaps.clear()
        for wire in self.wires.values():
            wire.heal()
        self.auditor.faults_end_ns = self.now

    def is_quiet(self) -> bool:
        """Whether nothing is left to do, by the disk and by the machines."""
        if self.told or self.asked or self._later or any(order.futures for order in self.orders):
            return False
        if any(machine.folders for machine in self.machines.values()):
            return False
        found = self.disk.look.load()
        return not found.jobs and all(one.state is NodeState.READY for one in found.nodes)

    def _want_again(self) -> None:
        for order in self.orders:
            if not order.got and not order.futures:
                self._place(order)

    def _resume(self) -> None:
        for one in self.disk.look.nodes():
            if one.marking:
                self.plane._turns.put([NodeMarked(at_ns=self.plane._clock(), node_id=one.id, marking=Marking.RESUME)])

    def _next_ns(self) -> int:
        wake = self.plane._turns.wake_ns
        due = [self.now + wake - self.plane._clock()] if wake else []
        found = [machine.next_ns() for machine in self.machines.values()] + due
        return min((at for at in found if at), default=0)

    def _wire(self, a: int) -> Wire:
        self.hurt.add(NodeId(f"n{a % 4}"))
        return self.wires[NodeId(f"n{a % 4}")]

    def _machine_of(self, launch: LaunchId) -> Machine:
        return self.machines[self.journal.live[launch].node_id]


class _Taken:
    """A future of the turn loop for whoever waits for it in the simulation's only thread: a turn is taken."""

    def __init__(self, future: Future[None], plane: ControlPlane) -> None:
        self._future = future
        self._plane = plane

    def result(self, timeout: float | None = None) -> None:
        del timeout
        while not self._future.done():
            self._plane._turns.take_turn()
        self._future.result()


_PRINCIPAL = Principal(
    id=PrincipalId("u"), organization_id=OrganizationId("o"), kind=PrincipalKind.USER, name="u", created_ns=START
)
_TOKEN = Token(
    id=TokenId("t"), principal_id=PrincipalId("u"), organization_id=OrganizationId("o"), name="t", hash="h", display="t",
    scopes=(Scope.ADMIN,), project_id=ProjectId(""), created_ns=START,
)  # fmt: skip


def _spec(a: int, b: int) -> WorkloadSpec:
    """A workload of some shape and fate."""
    fate = ["ok", "ok", "ok", "error", "flaky", "oom", "refused", "endless"][a % 8]
    gpus = [None, GpuRequest(count=1), GpuRequest(milli=500), GpuRequest(count=2)][b % 4]
    nodes = 1 + (a + b) % 2 + (b % 7 == 3)
    return WorkloadSpec(
        kind=Kind.ARRAY if b % 5 == 0 else Kind.TASK,
        name="w",
        run=f"{fate} {(1 + (a + b) % 12) * (5 if (a + b) % 8 == 3 else 1)} {b % 4}",
        nodes=nodes,
        nodes_min=1 if a % 4 == 1 and nodes > 1 else 0,
        placement=Placement(across_sites=nodes > 1 and a % 2 == 1),
        array_size=2 if b % 5 == 0 else 1,
        resources=Resources(gpus=gpus if (a + b) % 2 == 0 else None, cpu_milli=1_000, memory_bytes=GB),
        priority=(0, 0, 0, 5)[a // 8 % 4],
        retry=RetryPolicy(
            on=(RetryOn.NODE_LOST, RetryOn.PREEMPTED, *((RetryOn.ERROR,) if fate == "flaky" else ())), max=80
        ),
        max_duration_ns=30 * SECOND_NS if fate == "endless" else 0,
        checkpoint_grace_ns=2 * SECOND_NS,
    )


LEADERS: Final = frozenset({"pause", "resume", "dial_old", "step_old"})
"""What can happen only where several control planes may lead."""


def begun(ops: list[Op], disk: Disk | None = None) -> SmallCloud:
    """A cloud in which that history can happen."""
    cloud = SmallCloud(disk, is_shared=any(name in LEADERS for name, _, _ in ops))
    cloud.live(2 * SECOND_NS)
    return cloud


def played(ops: list[Op], disk: Disk | None = None) -> SmallCloud:
    """A cloud after that history and until nothing is left to do, audited all the while."""
    cloud = begun(ops, disk)
    cloud.play(ops)
    cloud.settle()
    cloud.auditor.audit()
    return cloud
