"""The Slurm engine keeps the contract of engines, on a real cluster of three nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest

from tests.slurm import NODES, Slurm, slurm_cluster, why_no_rest, why_not
from tidemill.engines.slurm import SlurmEngine, SlurmSettings
from tidemill.errors import EngineLost, EngineRefused
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.plan import GangPlace, ObservedState
from tidemill.runner.folders import read_json
from tidemill.testing.engine import BEGIN, CHECKS, EngineBench, eventually, observed, state
from tidemill.testing.peer import RecordingControlPlane
from tidemill.units import SECOND_NS

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
SITE = SiteId("centre")


@dataclass
class Centre:
    """The cluster, the engine's folder, and the peer of its runners."""

    slurm: Slurm
    folder: Path
    control: RecordingControlPlane
    numbers: Iterator[int] = field(default_factory=count)
    rest: str = ""

    def engine(self, **settings: str) -> SlurmEngine:
        settings.setdefault("rest", self.rest)
        return SlurmEngine(
            self.folder / "engine", site_id=SITE, endpoint_file=self.folder / "endpoint.json",
            settings=SlurmSettings(beat_ns=SECOND_NS // 5, linger_ns=30 * SECOND_NS, **settings),
        )  # fmt: skip

    def through(self, rest: str) -> Centre:
        """The same, through slurmrestd at that address; through Slurm's commands without one."""
        return replace(self, rest=rest)

    @property
    def bench(self) -> EngineBench:
        volumes = self.folder / "engine" / "volumes"
        return EngineBench(
            make=self.engine, control=self.control, node_id=NodeId("node_centre_n1"), _numbers=self.numbers,
            output=lambda spec: volumes / spec.project_id / spec.job_id / "output",
        )  # fmt: skip


COMMANDS = pytest.param("commands")
REST = pytest.param("rest", marks=pytest.mark.skipif(bool(why_no_rest()), reason=why_no_rest() or "-"))
SLOW_REST = pytest.param("rest", marks=[*REST.marks, pytest.mark.long])


@contextmanager
def own_centre(folder: Path) -> Iterator[Centre]:
    """A centre in an empty folder, whose cluster is the one that Slurm's commands mean meanwhile."""
    (folder / "c").mkdir()
    control = RecordingControlPlane(folder / "endpoint.json")
    control.start()
    with slurm_cluster(folder / "c") as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield Centre(slurm, folder, control)
    control.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    """Through Slurm's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "cluster").mkdir()
    control = RecordingControlPlane(folder / "endpoint.json")
    control.start()
    with slurm_cluster(folder / "cluster") as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield Centre(slurm, folder, control)
    control.stop()


@pytest.fixture(scope="module")
def rest(cluster: Centre) -> str:
    """The address of a slurmrestd on a socket, as this user."""
    return cluster.slurm.start_rest("v0.0.37", "v0.0.38")


@pytest.fixture(scope="module", params=[REST, COMMANDS])
def centre(cluster: Centre, request: pytest.FixtureRequest) -> Centre:
    """The cluster, each way."""
    return cluster if request.param == "commands" else cluster.through(request.getfixturevalue("rest"))


@pytest.fixture(autouse=True)
def _nothing_is_left(cluster: Centre) -> Iterator[None]:
    """A test that fails leaves its jobs to no other."""
    yield
    cluster.slurm.run("scancel", "--quiet", "--user=root")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[EngineBench], None], centre: Centre) -> None:
    check(centre.bench)


def test_nodes_are_those_of_the_cluster_with_their_gpus(centre: Centre) -> None:
    nodes = centre.engine().nodes()
    assert [node.name for node in nodes] == list(NODES)
    assert {node.cpu_milli for node in nodes} == {4_000}
    assert [len(node.devices) for node in nodes] == [2, 2, 2]
    assert all(device.model.startswith("H100") for node in nodes for device in node.devices)
    centre.slurm.run("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    taints = {node.name: node.taints for node in centre.engine().nodes()}
    assert taints == {"n1": (), "n2": (), "n3": ("slurm=down",)}
    assert len(centre.engine().observe().nodes) == 3, "what ran there is known still: Slurm says so"
    centre.slurm.run("scontrol", "update", "nodename=n3", "state=resume")


def test_a_gang_is_one_job_whose_ranks_are_slurms_nodes(centre: Centre) -> None:
    engine, bench, name = centre.engine(), centre.bench, f"run_gang{next(centre.numbers)}"
    places = tuple(
        GangPlace(node_id=NodeId(f"node_centre_n{at}"), cpu_milli=1_000, gpu_milli=0, memory_bytes=0)
        for at in (1, 2, 3)
    )
    script = (
        BEGIN
        + "echo rank $TIDEMILL_RANK node $SLURMD_NODENAME of $SLURM_JOB_NODELIST at $TIDEMILL_NODES\n"
        + "[ $TIDEMILL_RANK != 0 ] || srun -n 3 -N 3 sh -c 'echo task $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME'"
    )
    variables = (("TIDEMILL_NODES", "x,y,z"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1"))
    specs = [
        bench.spec(
            script, launch_id=LaunchId(f"{name}-0-1-{rank}"),
            rank=rank, world_size=3, gang=places,
            environment_variables=(*variables, ("TIDEMILL_RANK", str(rank))),
        )
        for rank in range(3)
    ]  # fmt: skip
    for spec in specs[:2]:
        engine.launch(spec)
    names = centre.slurm.run("squeue", "-h", "-o", "%j").split()
    assert f"tidemill-{specs[0].launch_id}" not in names, "all or nothing: it is submitted when all are there"
    engine.launch(specs[2])
    nodes = set()
    for rank, spec in enumerate(specs):
        centre.control.wait_for_event(spec.launch_id, "exited")
        log = bytes(centre.control.record(spec.launch_id).log).decode()
        assert f"rank {rank} node " in log
        assert "of n[1-3] at 127.0.0.1,127.0.0.1,127.0.0.1" in log
        nodes.add(log.split("node ")[1].split()[0])
    assert nodes == set(NODES)
    first = bytes(centre.control.record(specs[0].launch_id).log).decode()
    assert sorted(line for line in first.splitlines() if line.startswith("task")) == [
        f"task {at} of 3 on n{at + 1}" for at in range(3)
    ]


@pytest.mark.parametrize("centre", [SLOW_REST, COMMANDS], indirect=True)
def test_devices_are_those_that_slurm_gives(centre: Centre) -> None:
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec("echo devices $CUDA_VISIBLE_DEVICES", devices=(("n1/h100/0", 1_000), ("n1/h100/1", 1_000)))
    engine.launch(spec)
    centre.control.wait_for_event(spec.launch_id, "exited")
    assert bytes(centre.control.record(spec.launch_id).log).strip() == b"devices 0,1"


def test_what_others_hold_is_told_apart_from_what_we_do(centre: Centre) -> None:
    engine, bench = centre.engine(), centre.bench
    wrap = "--wrap=sleep 600"
    others = ("--nodelist=n1", "--cpus-per-task=1", "--gres=gpu:h100:1", "--mem=300M", "--output=/dev/null", wrap)
    theirs = centre.slurm.run("sbatch", "--parsable", *others).strip()
    spec = bench.spec("sleep 600", devices=(("n1/h100/0", 1_000),), cpu_milli=2_000, memory_bytes=400 << 20)
    engine.launch(spec)

    def held() -> dict[str, tuple[int, int, int]]:
        nodes = engine.nodes()
        return {one.name: (one.others_cpu_milli, one.others_memory_bytes >> 20, one.others_gpus) for one in nodes}

    both = lambda: centre.slurm.run("squeue", "-h", "-t", "running", "-o", "%j").split()  # noqa: E731
    eventually(lambda: len(both()) == 2, what="both run")
    theirs_only = {"n1": (1_000, 300, 1), "n2": (0, 0, 0), "n3": (0, 0, 0)}
    eventually(lambda: held() == theirs_only, what="what others hold is told apart")  # jobs may be completing yet
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    centre.slurm.run("scancel", theirs)
    eventually(lambda: not any(map(any, held().values())), what="nobody holds anything")


@pytest.mark.parametrize("centre", [SLOW_REST, COMMANDS], indirect=True)
def test_what_somebody_else_cancels_is_gone_with_slurms_word_for_it(centre: Centre) -> None:
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec(BEGIN + "sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    centre.slurm.run("scancel", f"--name=tidemill-{spec.launch_id}")
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, what="it is gone")
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.cause, seen.detail) == ("node_lost", "Slurm ended the job that it ran in")
    engine.forget(spec.launch_id, node_id=spec.node_id)


@pytest.mark.parametrize("centre", [SLOW_REST, COMMANDS], indirect=True)
def test_of_a_runner_that_was_killed_slurm_says_how_and_where(centre: Centre) -> None:
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec(BEGIN + "sleep 60")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    listed = ("squeue", "-h", f"--name=tidemill-{spec.launch_id}", "-o", "%A %N")
    number, node = centre.slurm.run(*listed).split()
    runner = read_json(centre.folder / "engine" / "launches" / spec.launch_id / "runner.json")
    assert runner is not None
    os.kill(int(runner["pid"]), signal.SIGKILL)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE, what="it is gone")
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.exit_code, seen.cause) == (137, "node_lost")
    code = "137:0" if centre.rest else "0:9"  # of srun, or of the batch script that is the runner
    assert seen.detail.startswith(f"its Slurm job ended as failed with exit code {code} on {node}")
    words = dict(seen.scheduler)
    assert (words["name"], words["job"], words["state"], words["exit"], words["nodes"]) == (
        "slurm", number, "FAILED", code, node,
    )  # fmt: skip
    assert observed(centre.engine(), spec.launch_id) == seen, "it is written down"
    engine.forget(spec.launch_id, node_id=spec.node_id)


@pytest.mark.long  # Slurm looks at time limits every half minute
def test_slurms_own_time_limit_leaves_the_grace(centre: Centre) -> None:
    """The limit is Slurm's, not the spec's: somebody shortened the job. Slurm warns as long before as the grace is."""
    engine, bench = centre.engine(), centre.bench
    script = BEGIN + "trap 'echo saved; exit 0' TERM; sleep 600 & wait"
    spec = bench.spec(script, max_duration_ns=3_600 * SECOND_NS, grace_ns=50 * SECOND_NS)
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    number = centre.slurm.run("squeue", "-h", f"--name=tidemill-{spec.launch_id}", "-o", "%A").strip()
    centre.slurm.run("scontrol", "update", f"jobid={number}", "timelimit=1")
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, timeout_s=90, what="it is over")
    assert bytes(centre.control.record(spec.launch_id).log) == b"started-here\nsaved\n"
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.cause, seen.detail) == ("node_lost", "Slurm ended the job that it ran in")


def test_work_that_waits_in_slurm_is_alive_with_slurms_reason(centre: Centre) -> None:
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec("true", cpu_milli=4_000)
    holders = [
        centre.slurm.run("sbatch", "--parsable", "--exclusive", "--output=/dev/null", "--wrap=sleep 600").strip()
        for _ in NODES
    ]
    eventually(lambda: centre.slurm.run("squeue", "-h", "-t", "running", "-o", "%A").split() != [], what="others run")
    engine.launch(spec)
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.state, "pending" in seen.detail) == (ObservedState.ALIVE, True)
    full = lambda: {node.others_cpu_milli for node in engine.nodes()} == {4_000}  # noqa: E731
    eventually(full, what="what others hold is seen")
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE, what="it is gone")
    centre.slurm.run("scancel", *holders)


@pytest.mark.parametrize("centre", [SLOW_REST, COMMANDS], indirect=True)
def test_jobs_run_on_while_the_controller_is_away_and_nothing_is_concluded(centre: Centre) -> None:
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec(BEGIN + "sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    if (
        centre.rest
    ):  # other tests come after: the next controller would give numbers anew, and drain nodes that know them
        centre.slurm.await_saved()
    centre.slurm.kill_controller()
    try:
        with pytest.raises(EngineLost):
            engine.observe()
    finally:
        centre.slurm.start_controller()
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.ALIVE, timeout_s=30, what="it is found again")
    engine.launch(spec)
    time.sleep(0.5)
    assert bench.starts(spec) == 1
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    eventually(lambda: state(engine, spec.launch_id) is not ObservedState.ALIVE, what="it is over")


@pytest.mark.parametrize("centre", [COMMANDS], indirect=True)
def test_a_lost_answer_of_sbatch_makes_no_second_job(
    centre: Centre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch submits, and its answer never comes: the job is found by its name."""
    real = subprocess.run(["which", "sbatch"], check=True, capture_output=True, text=True).stdout.strip()
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(f'#!/bin/sh\n{real} "$@" > /dev/null\necho "sbatch: error: Socket timed out" >&2\nexit 1\n')
    wrapper.chmod(0o755)
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec(BEGIN)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path), prepend=":")
        with pytest.raises(EngineLost):
            engine.launch(spec)
    engine.launch(spec)
    centre.control.wait_for_event(spec.launch_id, "exited")
    assert bench.starts(spec) == 1
    names = centre.slurm.run("squeue", "-h", "-t", "all", "-o", "%j").split()
    assert names.count(f"tidemill-{spec.launch_id}") == 1


def test_what_slurm_refuses_is_refused_with_its_words(centre: Centre) -> None:
    with pytest.raises(EngineRefused, match="partition"):
        centre.engine(partition="nowhere").launch(centre.bench.spec("true"))
    with pytest.raises(EngineRefused, match="container images"):
        centre.engine().launch(centre.bench.spec("true", image="python:3.12"))
