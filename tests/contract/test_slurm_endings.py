"""What only Slurm can tell of: runners that could not report, because their node died or Slurm ended them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest

from tests.contract.test_engine_slurm import COMMANDS, REST, Centre, own_centre
from tests.slurm import why_not
from tidemill.model.plan import LaunchSpec, Observation, ObservedState
from tidemill.runner.folders import read_json
from tidemill.testing.engine import BEGIN, eventually, observed, state
from tidemill.units import SECOND_NS

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    with own_centre(tmp_path_factory.mktemp("endings")) as made:
        yield made


@pytest.fixture(scope="module", params=[COMMANDS, REST])
def centre(cluster: Centre, request: pytest.FixtureRequest) -> Centre:
    """The cluster, each way."""
    if request.param == "commands":
        return cluster
    return cluster.through(cluster.slurm.start_rest("v0.0.38"))


def begin(centre: Centre, script: str, **more: object) -> LaunchSpec:
    """A worker that has begun."""
    engine, bench = centre.engine(), centre.bench
    spec = bench.spec(BEGIN + script, **more)
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    return spec


def job_of(centre: Centre, spec: LaunchSpec) -> tuple[str, str]:
    """Slurm's number of the job, and the node that it is on."""
    number, node = centre.slurm.run("squeue", "-h", f"--name=tidemill-{spec.launch_id}", "-o", "%A %N").split()
    return number, node


def runner_of(centre: Centre, spec: LaunchSpec) -> psutil.Process:
    runner = read_json(centre.folder / "engine" / "launches" / spec.launch_id / "runner.json")
    assert runner is not None
    return psutil.Process(int(runner["pid"]))


def ended(centre: Centre, spec: LaunchSpec) -> Observation:
    engine = centre.engine()
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE, timeout_s=150, what="it is gone")
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    engine.forget(spec.launch_id, node_id=spec.node_id)
    return seen


def test_work_that_does_not_heed_slurms_limit_timed_out(centre: Centre) -> None:
    """It takes no notice of Slurm's warning, its grace is longer than Slurm's, and Slurm kills the runner, too."""
    script = "trap '' TERM; while true; do sleep 1; done"
    spec = begin(centre, script, max_duration_ns=3_600 * SECOND_NS, grace_ns=600 * SECOND_NS)
    number, node = job_of(centre, spec)
    centre.slurm.run("scontrol", "update", f"jobid={number}", "timelimit=1")
    seen = ended(centre, spec)
    words = dict(seen.scheduler)
    assert (words["job"], words["state"], words["nodes"]) == (number, "TIMEOUT", node)
    assert seen.cause == "timed_out"
    assert seen.detail.startswith("its Slurm job ended as timeout with exit code ")


def test_a_node_that_died_is_named_with_slurms_state(centre: Centre) -> None:
    spec = begin(centre, "sleep 600")
    number, node = job_of(centre, spec)
    die(centre, spec, node)
    centre.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=died")
    seen = ended(centre, spec)
    words = dict(seen.scheduler)
    assert (words["job"], words["state"], words["nodes"]) == (number, "NODE_FAIL", node)
    assert (seen.cause, seen.exit_code) == ("node_lost", None)


def die(centre: Centre, spec: LaunchSpec, node: str) -> None:
    """kill -9 of the node's slurmd, of its steps, of the runner, and of all that it started: as when power fails."""
    runner = runner_of(centre, spec)
    doomed = [*runner.children(recursive=True), runner, *runner.parents()]
    daemon = psutil.Process(int((centre.slurm.folder / f"slurmd-{node}.pid").read_text()))
    step = [each for each in doomed if each.name() in ("slurmstepd", "sh", "srun") or each.pid == runner.pid]
    for each in (daemon, *step, *runner.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.pid != 1:
                each.kill()
