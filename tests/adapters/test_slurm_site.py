"""A centre with Slurm as a site: a real control plane, an outpost that joined with ``--slurm``, and a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_joining import Joined
from tests.cloud import LIVE, eventually, free_port
from tests.slurm import NODES, Slurm, slurm_cluster, why_no_tokens, why_not
from tidemill.outpost import joining

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
BEGIN = "echo begin $TIDEMILL_RANK >> $TIDEMILL_OUTPUT_DIR/journal; "


class Centre:
    """The cluster, the cloud, and the outpost that joined it from a folder that the nodes share.

    ``words`` are more of the outpost's settings; ``environment`` is how it finds the cluster, if not as Slurm's commands.
    """

    def __init__(
        self, folder: Path, slurm: Slurm, *words: str, environment: dict[str, str] | None = None, **settings: Any
    ) -> None:
        self.slurm = slurm
        self.environment = slurm.environment if environment is None else environment
        self.joined = Joined(folder, **settings)
        self.cloud = self.joined.cloud
        status, site = self.cloud.call("PUT", "/v1/sites/centre", {"engine": "slurm"})
        assert status == 200, site
        self.home = folder / "outpost"
        self.join(*words)
        for name in NODES:
            eventually(lambda name=name: self.joined.node(name).get("state") == "ready", within_s=60, what=name)  # type: ignore[misc]
        status, answer = self.cloud.call("POST", f"/v1/nodes/{os.uname().nodename}/mark", {"marking": "cordon"})
        assert status == 200, answer

    def join(self, *more: str) -> None:
        """Through the command line, as people do."""
        words = ["join", f"127.0.0.1:{self.cloud.port}", "--token", self.joined.token("centre"), "--name", "login"]
        words += ["--home", str(self.home), "--address", "127.0.0.1", "--slurm", "partition=main", *more]
        subprocess.run(
            [sys.executable, "-m", "tidemill.cli.main", *words], check=True, capture_output=True, text=True, timeout=60,
            env={**os.environ, **self.environment},
        )  # fmt: skip

    def tidemill(self, *words: str) -> bytes:
        """What a command prints. Raises: CalledProcessError."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
        return subprocess.run(
            [sys.executable, "-m", "tidemill.cli.main", *words], check=True, capture_output=True, timeout=60,
            env=environment | {"TIDEMILL_HOME": str(self.cloud.home)},
        ).stdout  # fmt: skip

    def submit(self, run: str, **spec: Any) -> str:
        given = {"name": "work", "resources": {"cpus": 1, "memory": "100MB"}, "run": run, **spec}
        return self.cloud.submit(given)

    def begun(self, job_id: str) -> list[str]:
        """The lines that the job's workers wrote when they began, in the folder that all nodes share."""
        journals = self.home.glob(f"slurm/volumes/*/{job_id}/output/journal")
        return sorted(line for journal in journals for line in journal.read_text().splitlines())

    def why(self, job_id: str) -> str:
        """The first line of ``tidemill why``."""
        return str(self.cloud.call("GET", f"/v1/jobs/{job_id}/why")[1]["lines"][0])

    def jobs(self, *options: str) -> list[str]:
        """Our jobs in Slurm's own list, as ``id state``."""
        lines = self.slurm.run("squeue", "-h", "-t", "all", "-o", "%A|%T|%j", *options).splitlines()
        return [line.rpartition("|")[0].replace("|", " ") for line in lines if "|tidemill-" in line]

    def close(self) -> None:
        self.cloud.down()
        joining.stop_outpost(self.home)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("cluster")
    with slurm_cluster(folder) as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield slurm


@pytest.fixture(scope="module")
def centre(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    made = Centre(tmp_path_factory.mktemp("site"), slurm)
    try:
        yield made
    finally:
        made.close()


def test_a_task_runs_on_a_node_of_slurm_and_its_log_comes_back(centre: Centre) -> None:
    job = centre.submit("echo on $SLURMD_NODENAME in $SLURM_JOB_ID")
    assert centre.cloud.wait(job)["state"] == "succeeded"
    assert centre.cloud.logs(job).startswith(b"on n")


def test_a_job_that_fails_has_its_exit_code(centre: Centre) -> None:
    job = centre.submit("echo alas; exit 42")
    ended = centre.cloud.wait(job)
    assert (ended["state"], ended["exit_code"]) == ("failed", 42)
    assert centre.cloud.logs(job) == b"alas\n"


def test_a_gang_is_one_job_of_slurm(centre: Centre) -> None:
    job = centre.submit("echo rank $TIDEMILL_RANK on $SLURMD_NODENAME of $SLURM_JOB_NODELIST", nodes=2)
    assert centre.cloud.wait(job)["state"] == "succeeded"
    logs = [centre.cloud.logs(job, rank).decode() for rank in (0, 1)]
    assert [log.split(" on ")[0] for log in logs] == ["rank 0", "rank 1"]
    assert len({log.split()[3] for log in logs}) == 2


def test_a_script_goes_to_the_partition_that_it_names(centre: Centre, tmp_path: Path) -> None:
    labels = {name: centre.joined.node(name)["labels"] for name in NODES}
    assert labels == {"n1": {"partition": "main"}, "n2": {"partition": "main|few"}, "n3": {"partition": "main|few"}}
    script = tmp_path / "work.sh"
    lines = (
        "#!/bin/bash",
        "#SBATCH --partition=few",
        "#SBATCH --job-name=few",
        "echo on $SLURM_JOB_PARTITION $SLURMD_NODENAME",
    )
    script.write_text("\n".join(lines) + "\n")
    said = centre.tidemill("run", str(script))
    assert b"on few n" in said, said
    assert b"n1" not in said
    nowhere = {"run": "x", "placement": {"labels": {"partition": "fev"}}}
    status, problem = centre.cloud.call("POST", "/v1/workloads", {"spec": nowhere})
    assert status == 422
    assert "there is few, main" in problem["detail"]


def test_gpus_are_those_that_slurm_gives(centre: Centre) -> None:
    job = centre.submit("echo devices $CUDA_VISIBLE_DEVICES", resources={"cpus": 1, "gpus": "H100:2"})
    assert centre.cloud.wait(job)["state"] == "succeeded"
    assert centre.cloud.logs(job) == b"devices 0,1\n"
    shared = centre.submit("true", resources={"gpus": 0.5})
    assert centre.cloud.wait(shared)["state"] == "succeeded"


def test_a_job_that_is_stopped_is_cancelled_and_gone_in_slurm(centre: Centre) -> None:
    job = centre.submit("trap 'echo bye; exit 0' TERM; echo here; sleep 600 & wait")
    centre.cloud.wait(job, "running")
    eventually(lambda: b"here" in centre.cloud.logs(job), within_s=20, what="it began")
    centre.cloud.call("POST", f"/v1/jobs/{job}/stop")
    assert centre.cloud.wait(job)["state"] == "cancelled"
    assert centre.cloud.logs(job) == b"here\nbye\n"
    eventually(lambda: not centre.jobs("-t", "running,pending"), within_s=20, what="Slurm has it no more")


def test_a_job_has_no_longer_than_it_may(centre: Centre) -> None:
    job = centre.submit("sleep 600", max_duration="1s", checkpoint={"grace": "1s"})
    ended = centre.cloud.wait(job)
    assert (ended["state"], ended["cause"]) == ("failed", "timed_out")


def test_of_a_worker_that_slurm_lost_the_job_says_slurms_state_and_exit_code(centre: Centre) -> None:
    job = centre.submit("echo here; sleep 600 & wait", retry={"on": []})
    centre.cloud.wait(job, "running")
    (number,) = [line.split()[0] for line in centre.jobs("-t", "running")]
    centre.slurm.run("scancel", "--batch", "--signal=KILL", number)
    ended = centre.cloud.wait(job)
    assert (ended["state"], ended["cause"], ended["exit_code"]) == ("failed", "node_lost", 137)
    assert ended["detail"].startswith("its Slurm job ended as failed with exit code 0:9 on n")
    (worker,) = ended["workers"]
    words = worker["scheduler"]
    assert (words["job"], words["state"], words["exit"], worker["exit_code"]) == (number, "FAILED", "0:9", 137)
    assert words["nodes"] in NODES
    told = centre.cloud.call("GET", f"/v1/events?job={job}")[1]["items"]
    (event,) = [event["data"] for event in told if event["type"] == "WorkerExited"]
    assert (event["scheduler_state"], event["scheduler_exit"]) == ("FAILED", "0:9")


def test_an_array_becomes_jobs_of_slurm_one_by_one(centre: Centre) -> None:
    spec = {"name": "sweep", "array": {"size": 4, "parallel": 2}, "run": "echo index $TIDEMILL_ARRAY_INDEX; sleep 1"}
    status, made = centre.cloud.call("POST", "/v1/workloads", {"spec": {**spec, "resources": {"cpus": 1}}})
    assert status == 201, made
    jobs = [job["id"] for job in made["jobs"]]
    most = 0
    while any(centre.cloud.job(job)["state"] in LIVE for job in jobs):
        most = max(most, len(centre.jobs("-t", "running")))
    assert [centre.cloud.job(job)["state"] for job in jobs] == ["succeeded"] * 4
    assert [centre.cloud.logs(job) for job in jobs] == [f"index {at}\n".encode() for at in range(4)]
    assert most <= 2, "array.parallel holds in Slurm too"


def test_what_waits_in_slurm_says_what_slurm_says(centre: Centre) -> None:
    centre.slurm.run("scontrol", "update", "partitionname=main", "state=down")
    try:
        job = centre.submit("echo here")
        centre.cloud.wait(job, "starting")
        eventually(lambda: "is pending (PartitionDown)" in centre.why(job), within_s=20, what="why")
        assert centre.why(job).startswith("It has its place here, and waits at its site: Slurm job ")
    finally:
        centre.slurm.run("scontrol", "update", "partitionname=main", "state=up")
    assert centre.cloud.wait(job)["state"] == "succeeded"


def test_nodes_full_of_others_jobs_are_not_chosen_and_why_says_so(centre: Centre) -> None:
    hold = ("--parsable", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    others = [centre.slurm.run("sbatch", *hold).strip() for _ in NODES]
    try:

        def held() -> list[int]:
            return [centre.joined.node(name)["others_cpu_milli"] for name in NODES]

        eventually(lambda: held() == [4_000] * 3, within_s=30, what="it is seen that others hold all")
        job = centre.submit("echo here")
        assert centre.cloud.job(job)["state"] == "queued"
        expected = "1 core needed, 0 cores free now; work of others that is not this cloud's holds 12 cores."
        assert centre.why(job) == expected
        centre.slurm.run("scancel", others.pop())
        assert centre.cloud.wait(job)["state"] == "succeeded"
    finally:
        centre.slurm.run("scancel", *others)
    eventually(lambda: held() == [0] * 3, within_s=30, what="they are gone")


def test_jobs_outlive_control_plane_and_outpost_and_are_adopted(centre: Centre) -> None:
    hold = "echo here; sleep 600 & wait"
    running = [centre.submit(BEGIN + hold), centre.submit(BEGIN + hold, nodes=2)]
    for job in running:
        centre.cloud.wait(job, "running")
    short = centre.submit(BEGIN + "sleep 8; echo end; exit 7")
    centre.cloud.wait(short, "running")
    centre.slurm.await_saved()
    centre.joined.kill(centre.home)
    centre.cloud.kill()
    centre.slurm.kill_controller()
    try:
        centre.cloud.up()
    finally:
        centre.slurm.start_controller()
    joining.start_outpost(centre.home)
    ended = centre.cloud.wait(short)
    assert (ended["exit_code"], centre.cloud.logs(short)) == (7, b"end\n")
    for job in running:
        assert centre.cloud.job(job)["state"] == "running"
    late = centre.submit("echo after")
    assert centre.cloud.wait(late)["state"] == "succeeded", "and new work runs"
    for job in running:
        centre.cloud.call("POST", f"/v1/jobs/{job}/stop")
    assert [centre.cloud.wait(job)["state"] for job in running] == ["cancelled", "cancelled"]
    assert [centre.begun(job) for job in (*running, short)] == [["begin 0"], ["begin 0", "begin 1"], ["begin 0"]]
    eventually(lambda: not centre.jobs("-t", "running,pending"), within_s=20, what="nothing is left in Slurm")


@pytest.mark.long
def test_a_killed_control_plane_in_the_midst_of_submitting_doubles_nothing(centre: Centre) -> None:
    jobs = []
    for _ in range(2):
        jobs += [centre.submit(BEGIN + "sleep 1; echo end") for _ in range(3)]
        centre.cloud.kill()
        centre.joined.kill(centre.home)
        joining.start_outpost(centre.home)
        centre.cloud.up()
    for job in jobs:
        assert centre.cloud.wait(job, within_s=60)["state"] == "succeeded"
        assert centre.begun(job) == ["begin 0"]


@pytest.mark.long
@pytest.mark.skipif(bool(why_no_tokens()), reason=why_no_tokens() or "-")
def test_a_centre_is_worked_through_slurmrestd_alone(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the outpost is, Slurm's commands do not know the cluster."""
    token = tmp_path / "token"
    token.write_text(slurm.token())
    address = slurm.start_rest("v0.0.38", port=free_port())
    monkeypatch.delenv("SLURM_CONF")
    assert subprocess.run(["squeue"], check=False, capture_output=True).returncode, "they do not"
    centre = Centre(tmp_path, slurm, "--slurm", f"rest={address}", "--slurm", f"rest_token={token}", environment={})
    try:
        failing, gang = centre.submit("exit 42"), centre.submit(BEGIN + "true", nodes=3)
        waiting = centre.submit("echo here; sleep 600 & wait")
        assert centre.cloud.wait(failing)["exit_code"] == 42
        assert centre.cloud.wait(gang)["state"] == "succeeded"
        assert centre.begun(gang) == ["begin 0", "begin 1", "begin 2"]
        centre.cloud.wait(waiting, "running")
        centre.cloud.call("POST", f"/v1/jobs/{waiting}/stop")
        assert centre.cloud.wait(waiting)["state"] == "cancelled"
        eventually(lambda: not centre.jobs("-t", "running,pending"), within_s=20, what="Slurm has it no more")
    finally:
        centre.close()
