"""With slurmdbd: what slurmctld has forgotten is known still, and jobs are on the account and QOS that were given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.contract.test_engine_slurm import COMMANDS, REST, Centre
from tests.slurm import slurm_cluster, why_no_accounting
from tidemill.errors import EngineRefused
from tidemill.model.plan import ObservedState
from tidemill.testing.engine import BEGIN, eventually, observed, state
from tidemill.testing.peer import RecordingControlPlane

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(why_no_accounting()), reason=why_no_accounting() or "-"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    folder = tmp_path_factory.mktemp("accounts")
    (folder / "c").mkdir()
    control = RecordingControlPlane(folder / "endpoint.json")
    control.start()
    with (
        slurm_cluster(folder / "c", accounting=True, min_job_age_s=2) as slurm,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield Centre(slurm, folder, control)
    control.stop()


@pytest.fixture(scope="module", params=[COMMANDS, REST])
def centre(cluster: Centre, request: pytest.FixtureRequest) -> Centre:
    """The cluster, each way."""
    if request.param == "commands":
        return cluster
    return cluster.through(cluster.slurm.start_rest("v0.0.38", "dbv0.0.38"))


def test_jobs_are_on_the_account_and_qos_given(centre: Centre) -> None:
    engine, bench = centre.engine(account="ai", qos="fast"), centre.bench
    spec = bench.spec("echo $SLURM_JOB_ACCOUNT $SLURM_JOB_QOS")
    engine.launch(spec)
    centre.control.wait_for_event(spec.launch_id, "exited")
    assert bytes(centre.control.record(spec.launch_id).log) == b"ai fast\n"
    words = ("sacct", "-X", "-n", "-P", f"--name=tidemill-{spec.launch_id}", "--format=Account,QOS,State")
    eventually(lambda: centre.slurm.run(*words).strip() == "ai|fast|COMPLETED", what="it is accounted")
    for wrong in ({"account": "nobody"}, {"account": "ai", "qos": "slow"}):
        with pytest.raises(EngineRefused, match="Slurm refused it"):
            centre.engine(**wrong).launch(bench.spec("true"))


def test_a_job_chooses_its_partition_account_and_qos(centre: Centre) -> None:
    """Over what the site is set to, and as Slurm allows."""
    engine, bench = centre.engine(account="nobody", qos="slow", partition="main"), centre.bench
    asked = (("account", "ai"), ("qos", "fast"), ("partition", "few"))
    spec = replace(bench.spec("echo $SLURM_JOB_PARTITION $SLURM_JOB_ACCOUNT $SLURM_JOB_QOS"), slurm=asked)
    engine.launch(spec)
    centre.control.wait_for_event(spec.launch_id, "exited")
    assert bytes(centre.control.record(spec.launch_id).log) == b"few ai fast\n"


def test_how_it_ended_is_known_after_slurmctld_has_forgotten(centre: Centre) -> None:
    engine, bench = centre.engine(account="ai"), centre.bench
    killed, waiting = bench.spec(BEGIN + "sleep 600"), bench.spec("true")
    engine.launch(killed)
    eventually(lambda: bench.starts(killed) == 1, what="it runs")
    engine.launch(waiting)
    number = centre.slurm.run("squeue", "-h", f"--name=tidemill-{killed.launch_id}", "-o", "%A").strip()
    nodes = centre.slurm.run("squeue", "-h", f"--name=tidemill-{killed.launch_id}", "-o", "%N").strip()
    centre.slurm.run("scancel", "--batch", "--signal=KILL", number)  # the runner too: nobody says how it ended
    listed = ("squeue", "-h", "-t", "all", f"--name=tidemill-{killed.launch_id}", "-o", "%T")
    eventually(lambda: not centre.slurm.run(*listed), timeout_s=120, what="slurmctld has forgotten it")
    eventually(lambda: state(engine, killed.launch_id) is ObservedState.GONE, what="it is gone")
    seen = observed(engine, killed.launch_id)
    assert seen is not None
    assert seen.detail == f"its Slurm job ended as failed with exit code 0:9 on {nodes}"
    assert (seen.exit_code, seen.cause) == (137, "node_lost")
    words = dict(seen.scheduler)
    assert (words["job"], words["state"], words["exit"], words["nodes"]) == (number, "FAILED", "0:9", nodes)
    again = centre.engine(account="ai")
    assert observed(again, killed.launch_id) == seen, "and it is not asked again"
    again.launch(killed)
    assert bench.starts(killed) == 1
    again.forget(killed.launch_id, node_id=killed.node_id)
    centre.control.wait_for_event(waiting.launch_id, "exited")
