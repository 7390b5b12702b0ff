"""The variables of a worker, in the names of the launchers and schedulers that programs were written for."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import pytest

from tidemill.core.environment import worker_environment
from tidemill.model.ids import JobId, job_id, job_number
from tidemill.model.spec import Kind
from tidemill.model.values import replace
from tidemill.testing import samples

GIB = 1 << 30


def variables(
    kind: Kind = Kind.TASK, *, rank: int = 1, index: int = 0, envs: dict[str, str] | None = None, **spec: Any
) -> dict[str, str]:
    """Those of one of two workers, each of which holds a GPU, two cores and a gigabyte."""
    workload = samples.a_workload(7, kind=kind)
    workload = replace(workload, spec=changed(workload.spec, envs=tuple((envs or {}).items()), **spec))
    job = samples.a_job(workload, index)
    attempt = replace(samples.an_attempt(job, 2), workers=2, rendezvous_port=4711)
    worker = replace(samples.an_allocation(attempt, rank), cpu_milli=2_000, memory_bytes=GIB)
    worker = replace(worker, node_id=samples.a_node("b" if rank else "a").id)
    nodes = [replace(samples.a_node(name), address=f"10.0.0.{number}") for number, name in enumerate(("a", "b"), 1)]
    return dict(worker_environment(workload, job, attempt, worker, nodes, api_url="http://x"))


def test_a_worker_finds_its_gang_in_the_words_of_each_tool():
    found = variables()
    gpus = found["SLURM_GPUS_ON_NODE"]
    assert gpus != "0"
    wanted = {
        "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus, "SKYPILOT_TASK_ID": found["TIDEMILL_JOB_ID"], "SKYPILOT_SETUP_NODE_RANK": "1",
        "DSTACK_NODE_RANK": "1", "DSTACK_NODES_NUM": "2", "DSTACK_NODES_IPS": "10.0.0.1\n10.0.0.2",
        "DSTACK_MASTER_NODE_IP": "10.0.0.1", "DSTACK_GPUS_PER_NODE": gpus, "DSTACK_GPUS_NUM": str(2 * int(gpus)),
        "DSTACK_RUN_NAME": "train",
        "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "10.0.0.1,10.0.0.2", "SLURM_LOCALID": "0", "SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "2",
        "SLURM_MEM_PER_NODE": "1024", "SLURM_JOB_NAME": "train", "SLURM_RESTART_COUNT": "1", "SLURM_GPUS_PER_NODE": gpus,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert "SLURM_ARRAY_TASK_ID" not in found
    assert "SKYPILOT_SERVE_REPLICA_ID" not in found


def test_a_rank_of_an_elastic_gang_may_be_beyond_its_size():
    found = variables(rank=2)
    assert (found["RANK"], found["WORLD_SIZE"], found["TIDEMILL_NODE_RANK"]) == ("2", "2", "1")


@pytest.mark.parametrize(
    "name", ["SLURM_JOBID", "SLURM_NODELIST", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"]
)
def test_names_by_which_programs_take_it_that_srun_started_them_are_not_there(name):
    assert name not in variables()


def test_a_job_of_an_array_finds_the_array():
    found = variables(Kind.ARRAY, index=3, array_size=5)
    wanted = {
        "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "4",
        "SLURM_ARRAY_TASK_STEP": "1",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert int(found["SLURM_JOB_ID"]) == int(found["SLURM_ARRAY_JOB_ID"]) + 3


def test_a_replica_finds_its_number():
    assert variables(Kind.SERVICE, index=1)["SKYPILOT_SERVE_REPLICA_ID"] == "2"


def test_what_the_user_sets_wins():
    assert variables(envs={"SLURM_NTASKS": "8"})["SLURM_NTASKS"] == "8"


def test_numbers_of_jobs_are_for_calculating():
    numbers = [job_number(job_id(samples.a_workload(number).id, 0)) for number in range(100)]
    assert numbers == sorted(set(numbers))
    assert all(0 < number < 1 << 63 for number in numbers)
    assert job_number(JobId("job_zzzzzzzzzzzzzzzzzz-99999")) < 1 << 63
    assert job_number(JobId("odd")) >= 0
