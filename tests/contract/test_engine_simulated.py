"""The simulated engine keeps the contract of engines on virtual time, and lets things go wrong on command."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.core.history import GB, PROJECTS, RATES, SITE
from tidemill.core.turn import turn
from tidemill.core.world import World
from tidemill.engines.simulated import Ending, Mishap, SimulatedEngine, fleet, script
from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.events import (
    Became,
    Exited,
    Fact,
    NeverLaunched,
    NodeJoined,
    NodeWentAway,
    Prepared,
    Started,
    Submitted,
    Vanished,
)
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, JobId, LaunchId, NodeId, OrganizationId, PrincipalId, ProjectId, WorkloadId
from tidemill.model.job import Allocation, Cause, Job, JobState, Workload
from tidemill.model.plan import Forget, Launch, LaunchSpec, ObservedState, Stop
from tidemill.model.policy import Policy
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, Port, RetryOn, RetryPolicy, Service, WorkloadSpec
from tidemill.model.values import replace
from tidemill.testing import engine as contract
from tidemill.testing.engine import EngineBench, observed, state
from tidemill.testing.peer import RecordingControlPlane
from tidemill.units import HOUR_NS, MILLI, MINUTE_NS, SECOND_NS

NEEDS_PROCESSES = {
    "check_launch_runs_once_and_reports_in_order",  # the output of a real script
    "check_stop_gives_the_grace",  # a program's own handler of SIGTERM
    "check_kill_reaches_everything",  # children that leave their session
    "check_a_worker_outlives_the_control_plane",  # a runner that keeps output for later
}
"""Checks of the shared contract that are about processes. The rest of each is in a test below, on virtual time."""


def node(index: int, *, gpus: int = 0, cpu_milli: int = 4_000) -> Node:
    devices = tuple(
        Device(id=DeviceId(f"n{index}g{g}"), index=g, model="H100-SXM", reported="H100", memory_bytes=80 * GB, idle_mw=1, busy_mw=2)
        for g in range(gpus)
    )  # fmt: skip
    return Node(
        id=NodeId(f"n{index}"), site_id=SITE.id, name=f"n{index}", state=NodeState.READY, version=1, boot_id="b0",
        address=f"10.0.0.{index}", cpu_milli=cpu_milli, memory_bytes=16 * GB, disk_bytes=GB, devices=devices,
    )  # fmt: skip


def launch_spec(name: str = "a", **changes: Any) -> LaunchSpec:
    base = LaunchSpec(
        launch_id=LaunchId(f"run_{name}-0-1-0"), job_id=JobId(f"job_{name}-0"), project_id=ProjectId("p0"), node_id="n0",
        fence=1, rank=0, world_size=1, setup="", run="true", environment=None, image="", environment_variables=(),
        secrets=(), workdir="", inputs=(), devices=(), cpu_milli=1_000, memory_bytes=0, disk_bytes=0, ports=(),
        service=None, rendezvous_port=0, max_duration_ns=0, grace_ns=SECOND_NS, api_url="", runner_token="", job_token="",
    )  # fmt: skip
    return replace(base, **changes)


class Bench:
    """One engine over two nodes, and the clock's hands."""

    def __init__(self, *, seconds: float = 10, **settings: Any) -> None:
        self.now = 1_000 * SECOND_NS
        self.engine = SimulatedEngine(
            [node(0, gpus=2), node(1)], clock=lambda: self.now, duration=lambda _: int(seconds * SECOND_NS), **settings
        )

    def after(self, seconds: float) -> tuple[Fact, ...]:
        """What is told once so much time has passed."""
        self.now += int(seconds * SECOND_NS)
        return self.engine.facts(self.now)


def kinds(facts: tuple[Fact, ...]) -> list[str]:
    return [type(fact).__name__ for fact in facts]


# ---------------------------------------------------------------------- the contract that all engines share


class VirtualPeer(RecordingControlPlane):
    """The peer of runners whose reports are the engine's facts: nothing is served."""

    def __init__(self, folder: Path, engine: SimulatedEngine, clock: Callable[[], int]) -> None:
        super().__init__(folder / "endpoint.json")
        self.endpoint_file.write_text(json.dumps({"api_url": "http://127.0.0.1:1"}))
        self._engine, self._time = engine, clock

    def wait_for_event(self, launch_id: str, kind: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
        """The event of that type; each look lets some virtual time pass."""
        for _ in range(1_000):
            for fact in self._engine.facts(self._time()):
                if isinstance(fact, Prepared | Started | Exited):
                    exit_code = fact.exit_code if isinstance(fact, Exited) else None
                    event = {"type": type(fact).__name__.lower(), "exit_code": exit_code}
                    self.record(fact.launch_id).events.append(event)
            if event := self.record(launch_id).event(kind) or {}:
                return event
        raise AssertionError(f"no {kind} of {launch_id}")


class VirtualBench(EngineBench):
    """The bench of the contract, where the truth about starts is the machines' own."""

    def starts(self, spec: LaunchSpec) -> int:
        """How many times the worker of that launch began."""
        engine = self.make()
        assert isinstance(engine, SimulatedEngine)
        return engine.starts(spec.launch_id)


@pytest.mark.parametrize(
    "check",
    [check for check in contract.CHECKS if check.__name__ not in NEEDS_PROCESSES],
    ids=lambda check: check.__name__,
)
def test_contract(check: Callable[[EngineBench], None], tmp_path: Path) -> None:
    ticks = count(1)

    def clock() -> int:
        """Each look at the clock takes a twentieth of a second, so whatever is waited for comes."""
        return next(ticks) * SECOND_NS // 20

    def duration(spec: LaunchSpec) -> int:
        return HOUR_NS if "sleep 600" in spec.run else SECOND_NS

    first = SimulatedEngine([replace(node(0), id=NodeId("node_test"))], clock=clock, duration=duration)
    check(VirtualBench(make=first.restarted, control=VirtualPeer(tmp_path, first, clock), output=lambda _: tmp_path))


def test_no_check_of_the_contract_is_forgotten() -> None:
    names = {check.__name__ for check in contract.CHECKS}
    assert names >= NEEDS_PROCESSES
    assert len(names - NEEDS_PROCESSES) >= 6


# ---------------------------------------------------------------------- the same cases, told by its own facts


def test_a_launch_runs_once_and_is_told_in_order() -> None:
    bench = Bench(seconds=10, start_delay_ns=3 * SECOND_NS, ending=lambda _: Ending(exit_code=7))
    spec, began = launch_spec(fence=4), bench.now
    bench.engine.launch(spec)
    assert bench.after(0) == (Prepared(at_ns=began, launch_id=spec.launch_id, fence=4),)
    assert bench.after(2) == ()
    assert kinds(bench.after(2)) == ["Started"]
    assert bench.engine.next_ns() == began + 13 * SECOND_NS
    (exited,) = bench.after(100)
    assert exited == Exited(
        at_ns=began + 13 * SECOND_NS, launch_id=spec.launch_id, fence=4, exit_code=7, cpu_used_ns=10 * SECOND_NS
    )
    seen = observed(bench.engine, spec.launch_id)
    assert seen is not None
    assert (seen.state, seen.exit_code, seen.ended_ns) == (ObservedState.EXITED, 7, began + 13 * SECOND_NS)
    assert bench.after(1) == (), "nothing is told twice"
    assert bench.engine.next_ns() == 0


def test_a_look_after_everything_is_over_still_tells_all_of_it() -> None:
    bench = Bench()
    for name in "ab":
        bench.engine.launch(launch_spec(name))
    facts = bench.after(1_000)
    assert kinds(facts) == ["Prepared"] * 2 + ["Started"] * 2 + ["Exited"] * 2
    assert [fact.at_ns for fact in facts] == sorted(fact.at_ns for fact in facts)


@pytest.mark.parametrize(
    ("needs_s", "grace_s", "ends_after_s", "exit_code"),
    [(0, 5, 0, 143), (2, 5, 2, 143), (5, 5, 5, 143), (60, 5, 5, 137), (60, 0, 0, 137)],
)
def test_a_stop_gives_the_grace_and_no_more(needs_s: int, grace_s: int, ends_after_s: int, exit_code: int) -> None:
    bench = Bench(seconds=1_000, ending=lambda _: Ending(stop_takes_ns=needs_s * SECOND_NS))
    spec = launch_spec()
    bench.engine.launch(spec)
    bench.after(5)
    bench.engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=grace_s * SECOND_NS)
    stopped = bench.now
    (exited,) = bench.after(500)
    assert isinstance(exited, Exited)
    assert (exited.at_ns, exited.exit_code, exited.cause) == (stopped + ends_after_s * SECOND_NS, exit_code, Cause.NONE)


def test_a_second_stop_can_only_shorten_it_and_a_worker_may_end_by_itself_before() -> None:
    bench = Bench(seconds=20, ending=lambda _: Ending(exit_code=3, stop_takes_ns=100 * SECOND_NS))
    long, short, own = (launch_spec(name) for name in ("long", "short", "own"))
    for spec in (long, short, own):
        bench.engine.launch(spec)
    bench.after(1)
    stopped = bench.now
    for spec in (long, short):
        bench.engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=10 * SECOND_NS)
    bench.engine.stop(own.launch_id, node_id=own.node_id, grace_ns=50 * SECOND_NS)
    bench.engine.stop(long.launch_id, node_id=long.node_id, grace_ns=60 * SECOND_NS)
    bench.engine.stop(short.launch_id, node_id=short.node_id, grace_ns=2 * SECOND_NS)
    ended = {fact.launch_id: fact for fact in bench.after(100) if isinstance(fact, Exited)}
    assert (ended[short.launch_id].at_ns - stopped, ended[short.launch_id].exit_code) == (2 * SECOND_NS, 137)
    assert (ended[long.launch_id].at_ns - stopped, ended[long.launch_id].exit_code) == (10 * SECOND_NS, 137)
    assert (ended[own.launch_id].at_ns - stopped, ended[own.launch_id].exit_code) == (20 * SECOND_NS, 3)


def test_a_worker_stopped_before_it_started_never_starts() -> None:
    bench = Bench(start_delay_ns=10 * SECOND_NS)
    spec = launch_spec()
    bench.engine.launch(spec)
    bench.engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=SECOND_NS)
    facts = bench.after(100)
    assert kinds(facts) == ["Prepared", "Exited"]
    assert isinstance(facts[1], Exited)
    assert (facts[1].exit_code, facts[1].cpu_used_ns) == (143, 0)


@pytest.mark.parametrize(("mishap", "starts"), [(Mishap.LOST_BEFORE, 0), (Mishap.LOST_AFTER, 1)])
def test_a_lost_reply_leaves_it_open_whether_it_was_done(mishap: Mishap, starts: int) -> None:
    bench = Bench()
    spec = launch_spec()
    bench.engine.mishap = lambda call, _: mishap if call == "launch" else Mishap.NONE
    with pytest.raises(EngineLost):
        bench.engine.launch(spec)
    assert bench.engine.starts(spec.launch_id) == starts
    assert (state(bench.engine, spec.launch_id) is ObservedState.ALIVE) is bool(starts)
    bench.engine.mishap = lambda _call, _id: Mishap.NONE
    bench.engine.launch(spec)
    assert bench.engine.starts(spec.launch_id) == 1
    assert kinds(bench.after(100)) == ["Prepared", "Started", "Exited"]


@pytest.mark.parametrize("mishap", [Mishap.LOST_BEFORE, Mishap.LOST_AFTER])
@pytest.mark.parametrize("call", ["stop", "observe", "forget"])
def test_every_call_can_lose_its_reply(call: str, mishap: Mishap) -> None:
    bench = Bench(seconds=1 if call == "forget" else 1_000)
    spec = launch_spec()
    bench.engine.launch(spec)
    bench.after(10)
    bench.engine.mishap = lambda called, _: mishap if called == call else Mishap.NONE
    deeds: dict[str, Callable[[], object]] = {
        "stop": lambda: bench.engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0),
        "observe": bench.engine.observe,
        "forget": lambda: bench.engine.forget(spec.launch_id, node_id=spec.node_id),
    }
    with pytest.raises(EngineLost):
        deeds[call]()
    bench.engine.mishap = lambda _called, _: Mishap.NONE
    done = {"stop": ObservedState.EXITED, "observe": ObservedState.ALIVE, "forget": None}[call]
    open_still = ObservedState.EXITED if call == "forget" else ObservedState.ALIVE
    bench.after(1)
    assert state(bench.engine, spec.launch_id) is (done if mishap is Mishap.LOST_AFTER else open_still)


def test_a_refused_launch_does_nothing() -> None:
    bench = Bench(mishap=lambda call, _: Mishap.REFUSED if call == "launch" else Mishap.NONE)
    with pytest.raises(EngineRefused):
        bench.engine.launch(launch_spec())
    assert bench.engine.observe().launches == ()
    assert bench.after(100) == ()


def test_a_lost_worker_is_gone_without_a_word() -> None:
    bench = Bench()
    spec = launch_spec()
    bench.engine.launch(spec)
    bench.after(5)
    bench.engine.lose_worker(spec.launch_id)
    assert bench.after(100) == ()
    assert state(bench.engine, spec.launch_id) is ObservedState.GONE
    bench.engine.launch(spec)
    bench.engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    assert bench.engine.starts(spec.launch_id) == 1
    bench.engine.forget(spec.launch_id, node_id=spec.node_id)
    assert bench.engine.observe().launches == ()


def test_a_lost_node_takes_its_workers_and_nobody_elses() -> None:
    bench = Bench()
    here, there = launch_spec("here"), launch_spec("there", node_id="n1")
    bench.engine.launch(here)
    bench.engine.launch(there)
    bench.after(5)
    bench.engine.lose_node(NodeId("n0"))
    assert bench.after(0) == (NodeWentAway(at_ns=bench.now, node_id=NodeId("n0"), detail="the machine was lost"),)
    assert [each.id for each in bench.engine.nodes()] == ["n1"]
    assert state(bench.engine, here.launch_id) is ObservedState.GONE
    with pytest.raises(EngineLost, match="n0"):
        bench.engine.launch(launch_spec("next"))
    bench.engine.launch(here)  # known already: harmless, wherever its machine is
    assert [fact.launch_id for fact in bench.after(100) if isinstance(fact, Exited)] == [there.launch_id]
    bench.engine.return_node(NodeId("n0"))
    (joined,) = bench.after(0)
    assert isinstance(joined, NodeJoined)
    assert joined.node.boot_id != "b0"
    assert {each.id for each in bench.engine.nodes()} == {"n0", "n1"}
    bench.engine.launch(launch_spec("next"))
    assert bench.engine.violations == ()


def test_a_service_tells_where_it_is_reached() -> None:
    bench = Bench()
    spec = launch_spec(ports=(Port(name="http", number=8_000),), service=Service(port="http"))
    bench.engine.launch(spec)
    facts = bench.after(2)
    assert kinds(facts) == ["Prepared", "Started", "Became"]
    assert isinstance(facts[2], Became)
    assert (facts[2].ready, facts[2].endpoint) == (True, "n0:8000")


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("2xH100:8", [("H100-SXM", 8, 128, 1 << 40)] * 2),
        ("1xA100-80GB:4:64cpu:512GB", [("A100-80GB-SXM", 4, 64, 512 << 30)]),
        ("1xL4, 2xcpu:20cpus", [("L4", 1, 16, 128 << 30), ("", 0, 20, 80 << 30), ("", 0, 20, 80 << 30)]),
        ("1xcpu", [("", 0, 16, 64 << 30)]),
    ],
)
def test_a_fleet_is_made_from_a_line(description: str, expected: list[tuple[str, int, int, int]]) -> None:
    nodes = fleet(description, site_id=SITE.id)
    assert expected == [
        (each.devices[0].model if each.devices else "", len(each.devices), each.cpu_milli // MILLI, each.memory_bytes)
        for each in nodes
    ]
    ids = [each.id for each in nodes] + [device.id for each in nodes for device in each.devices]
    assert len(set(ids)) == len(ids)


def test_a_large_fleet_stands_in_racks_and_blocks() -> None:
    nodes = fleet("600xH100:8", site_id=SITE.id)
    assert {each.rack for each in nodes[:16]} == {"rack-0"}
    assert nodes[16].rack == "rack-1"
    assert [nodes[number].block for number in (0, 255, 256, 599)] == ["block-0", "block-0", "block-1", "block-2"]
    assert {len({n.block for n in nodes if n.rack == rack}) for rack in {each.rack for each in nodes}} == {1}


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("", "some machines"), ("H100:8", "some machines"), ("5xH100:8,", "some machines"), ("2xH900:8", "catalog"),
        ("1xH100:99", "at most 16"), ("1xH100:8:many", "size"), ("1xcpu:0cpu:5000cpu", "at most"), ("1xcpu:9999cpu", "4096"),
    ],
)  # fmt: skip
def test_a_fleet_that_cannot_be_read_is_named(description: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fleet(description, site_id=SITE.id)


@pytest.mark.parametrize(
    ("command", "seconds", "exit_code"),
    [
        ("sleep 2", 2, 0), ("sleep 0.5; exit 3", 0.5, 3), ("sleep 2m", 120, 0), ("echo hello && sleep 1h", 3_600, 0),
        ("true", 0, 0), ("false", 0, 1), ("python train.py", 60, 0), ("python train.py; exit 7 ", 60, 7), ("", 60, 0),
    ],
)  # fmt: skip
def test_a_command_says_how_long_it_takes_and_how_it_ends(command: str, seconds: float, exit_code: int) -> None:
    assert script(launch_spec(run=command), default_ns=MINUTE_NS) == (int(seconds * SECOND_NS), exit_code)


def test_many_threads_may_call_at_once() -> None:
    bench = Bench(seconds=0, start_delay_ns=0)
    told: list[Fact] = []

    def launch(first: int) -> None:
        for number in range(first, 400, 4):
            bench.engine.launch(launch_spec(f"w{number}", cpu_milli=1))
            told.extend(bench.engine.facts(bench.now))
            bench.engine.observe()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(launch, range(4)))
    told.extend(bench.engine.facts(bench.now))
    assert Counter(type(fact).__name__ for fact in told) == {"Prepared": 400, "Started": 400, "Exited": 400}
    assert len(bench.engine.observe().launches) == 400
    assert bench.engine.violations == ()


@pytest.mark.parametrize("tells_first", [False, True])
def test_an_end_can_be_told_before_it_is_seen(tells_first: bool) -> None:
    bench = Bench(seconds=5, tells_first=tells_first)
    spec = launch_spec()
    bench.engine.launch(spec)
    bench.now += 100 * SECOND_NS
    assert (state(bench.engine, spec.launch_id) is ObservedState.ALIVE) is tells_first
    assert kinds(bench.after(0))[-1] == "Exited"
    assert (state(bench.engine, spec.launch_id) is ObservedState.ALIVE) is tells_first, "it may still be on its way"
    assert bench.after(0) == ()
    assert state(bench.engine, spec.launch_id) is ObservedState.EXITED


def test_slices_count_against_their_gpu() -> None:
    bench = Bench()
    for name, start in (("a", 0), ("b", 4)):
        bench.engine.launch(launch_spec(name, cpu_milli=100, devices=((f"n0g0/3g.40gb@{start}", 500),)))
    assert bench.engine.violations == ()
    bench.engine.launch(launch_spec("c", cpu_milli=100, devices=(("n0g0/1g.10gb@0", 125),)))
    assert len(bench.engine.violations) == 1


def test_more_than_there_is_does_not_go_unseen() -> None:
    bench = Bench()
    share = {"devices": (("n0g0", 600),), "cpu_milli": 1_000}
    bench.engine.launch(launch_spec("a", **share))
    assert bench.engine.violations == ()
    bench.engine.launch(launch_spec("b", **share))
    assert bench.engine.violations == ("run_b-0-1-0: 1200 of 1000 n0g0 of n0 are held",)
    bench.after(100)
    bench.engine.launch(launch_spec("c", **share))
    bench.engine.launch(launch_spec("d", cpu_milli=3_500))
    bench.engine.launch(launch_spec("e", devices=(("n1g0", MILLI),)))
    assert [sentence.split(":")[0] for sentence in bench.engine.violations] == [
        "run_b-0-1-0",
        "run_d-0-1-0",
        "run_e-0-1-0",
        "run_e-0-1-0",
    ]


def test_what_lives_is_not_forgotten() -> None:
    bench = Bench()
    spec = launch_spec()
    bench.engine.launch(spec)
    with pytest.raises(Conflict):
        bench.engine.forget(spec.launch_id, node_id=spec.node_id)
    bench.after(100)
    bench.engine.forget(spec.launch_id, node_id=spec.node_id)
    bench.engine.forget(spec.launch_id, node_id=spec.node_id)


# ---------------------------------------------------------------------- the real turn over thousands of nodes


class Twin:
    """The smallest control plane: the real turn, and an engine on whose clock whatever is due next comes next."""

    def __init__(
        self, nodes: int, *, mishap: Callable[[str, LaunchId], Mishap] = lambda _call, _id: Mishap.NONE
    ) -> None:
        self.now = 1_700_000_000 * SECOND_NS
        self.world = World(sites=[SITE], projects=PROJECTS, rates=RATES)
        self.engine = SimulatedEngine(
            [node(index, gpus=1) for index in range(nodes)],
            clock=lambda: self.now,
            duration=lambda spec: (1 + int(spec.job_id.rpartition("_")[2].partition("-")[0]) % 7) * MINUTE_NS,
            mishap=mishap,
        )
        self.finished: dict[JobId, Job] = {}
        self.launched: list[LaunchId] = []
        self.wakes: list[int] = []
        self.take(*(NodeJoined(at_ns=self.now, node=each) for each in self.engine.nodes()))

    def take(self, *facts: Fact) -> None:
        """One turn, and what it commands."""
        plan = turn(self.world, facts, now=self.now, policy=Policy(meter_every_ns=HOUR_NS))
        self.world.commit()
        for change in plan.changes:
            if isinstance(change.after, Job) and change.after.ended_ns:
                self.finished[change.after.id] = change.after
        if plan.wake_ns:
            heapq.heappush(self.wakes, plan.wake_ns)
        for command in plan.commands:
            try:
                match command:
                    case Launch():
                        self.engine.launch(self.spec_of(self.world.allocations[command.launch_id]))
                        self.launched.append(command.launch_id)
                    case Stop():
                        self.engine.stop(command.launch_id, node_id=command.node_id, grace_ns=command.grace_ns)
                    case Forget():
                        self.engine.forget(command.launch_id, node_id=command.node_id)
            except (EngineLost, Conflict):
                continue

    def spec_of(self, held: Allocation) -> LaunchSpec:
        return launch_spec(
            launch_id=held.id, job_id=held.job_id, node_id=held.node_id, fence=held.fence, rank=held.rank,
            cpu_milli=held.cpu_milli, memory_bytes=held.memory_bytes,
            devices=tuple((share.device_id, share.milli) for share in held.devices),
        )  # fmt: skip

    def look(self) -> None:
        """Compare with the engine's list, as the live shell does."""
        seen = {each.launch_id: each.state for each in self.engine.observe().launches}
        facts: list[Fact] = []
        for held in self.world.allocations.values():
            if held.id not in seen:
                facts.append(NeverLaunched(at_ns=self.now, launch_id=held.id, fence=held.fence))
            elif seen[held.id] is ObservedState.GONE:
                facts.append(Vanished(at_ns=self.now, launch_id=held.id, fence=held.fence))
        if facts:
            self.take(*facts)

    def run(self, *, looking: bool = True, turns: int = 20_000) -> None:
        """Let time pass until all is over, ``looking`` at the engine's list all the while."""
        for _ in range(turns):
            if not self.world.jobs:
                return
            due = [instant for instant in (self.engine.next_ns(), self.wakes[0] if self.wakes else 0) if instant]
            self.now = max(self.now + SECOND_NS // 10, min(due, default=self.now + SECOND_NS))
            while self.wakes and self.wakes[0] <= self.now:
                heapq.heappop(self.wakes)
            self.take(*self.engine.facts(self.now))
            if looking:
                self.look()
        raise AssertionError(f"{len(self.world.jobs)} jobs are not over")

    def submit(self, jobs: int, *, workers: int = 1) -> None:
        """So many jobs, each of so many workers with a GPU."""
        facts = []
        for number in range(jobs):
            spec = WorkloadSpec(
                kind=Kind.TASK, name="w", run="true", nodes=workers, resources=Resources(gpus=GpuRequest(), cpu_milli=500),
                retry=RetryPolicy(on=(RetryOn.NODE_LOST,), max=20),
            )  # fmt: skip
            workload = Workload(
                id=WorkloadId(f"wl_{number:05d}"), organization_id=OrganizationId("o"), project_id=PROJECTS[0].id,
                principal_id=PrincipalId("u"), spec=spec, submitted_ns=self.now,
            )  # fmt: skip
            facts.append(Submitted(at_ns=self.now, workload=workload))
        self.take(*facts)

    def check(self, jobs: int) -> None:
        """Every job succeeded, nothing was started twice, nothing was ever over capacity, nothing is left."""
        assert len(self.finished) == jobs
        assert {job.state for job in self.finished.values()} == {JobState.SUCCEEDED}
        assert self.engine.violations == ()
        assert all(self.engine.starts(launch) == 1 for launch in self.launched)
        assert not any(each.state is ObservedState.ALIVE for each in self.engine.observe().launches)


def test_two_thousand_nodes_run_a_queue_to_its_end() -> None:
    twin = Twin(2_000)
    twin.submit(750, workers=4)
    twin.run(looking=False)
    twin.check(750)


def test_lost_replies_workers_and_nodes_cost_time_and_nothing_else() -> None:
    calls = count()

    def mishap(call: str, _: LaunchId) -> Mishap:
        if call not in ("launch", "stop", "forget"):
            return Mishap.NONE
        number = next(calls)
        return Mishap.LOST_AFTER if number % 5 == 1 else Mishap.LOST_BEFORE if number % 7 == 2 else Mishap.NONE

    twin = Twin(40, mishap=mishap)
    twin.submit(120, workers=2)
    for step in range(30):
        twin.now += 10 * SECOND_NS
        twin.take(*twin.engine.facts(twin.now))
        running = [held.id for held in twin.world.allocations.values() if held.started_ns]
        if running:
            twin.engine.lose_worker(running[step % len(running)])
        if step % 10 == 3:
            twin.engine.lose_node(NodeId(f"n{step}"))
        if step % 10 == 8:
            twin.engine.return_node(NodeId(f"n{step - 5}"))
        twin.take(*twin.engine.facts(twin.now))
        twin.look()
    twin.run()
    twin.check(120)
    assert any(job.retries for job in twin.finished.values()), "something was lost at all"
