"""The variables that every worker finds, in the names that launchers and libraries expect.

A worker sees only its own devices, so its local rank is always 0. Folders, ``PATH`` and the devices' names are
added by the runner, which alone knows the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidemill.model.fleet import Node
from tidemill.model.ids import job_id, job_number
from tidemill.model.job import Allocation, Attempt, Job, Workload
from tidemill.model.spec import Kind
from tidemill.units import MILLI

_LONGEST: Final = 96 << 10
"""No variable is longer; Linux starts no program with one of 128 KiB."""
_LISTS: Final = (
    "TIDEMILL_NODES",
    "SLURM_JOB_NODELIST",
    "SKYPILOT_NODE_IPS",
    "SKYPILOT_SETUP_NODE_IPS",
    "DSTACK_NODES_IPS",
)


def worker_environment(
    workload: Workload, job: Job, attempt: Attempt, worker: Allocation, nodes: Sequence[Node], *, api_url: str
) -> tuple[tuple[str, str], ...]:
    """Names and values for one worker; ``nodes`` are those of all workers, in the order of their ranks, which in an
    elastic gang have gaps.

    What the user sets in ``envs`` comes last and wins. Lists of addresses that are too long for a variable, of some
    thousand machines, are left out; the first is ``MASTER_ADDR``.
    """
    spec = workload.spec
    size, rank = str(attempt.workers), str(worker.rank)
    here = next(node for node in nodes if node.id == worker.node_id)
    node_rank = str(list(dict.fromkeys(node.id for node in nodes)).index(here.id))
    master, port = nodes[0].address, str(attempt.rendezvous_port)
    addresses = [node.address for node in nodes]
    cpus = str(max(1, worker.cpu_milli // MILLI))
    gpus = str(len(worker.devices))
    variables = {
        # torchrun and torch.distributed
        "MASTER_ADDR": master,
        "MASTER_PORT": port,
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": rank,
        "GROUP_RANK": rank,
        # JAX
        "JAX_COORDINATOR_ADDRESS": f"{master}:{port}",
        "JAX_NUM_PROCESSES": size,
        "JAX_PROCESS_ID": rank,
        # MPI
        "OMPI_COMM_WORLD_RANK": rank,
        "OMPI_COMM_WORLD_SIZE": size,
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "PMI_RANK": rank,
        "PMI_SIZE": size,
        # SkyPilot
        "SKYPILOT_NODE_RANK": rank,
        "SKYPILOT_NODE_IPS": "\n".join(addresses),
        "SKYPILOT_NUM_NODES": size,
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        "SKYPILOT_TASK_ID": job.id,
        "SKYPILOT_SETUP_NODE_RANK": rank,
        "SKYPILOT_SETUP_NODE_IPS": "\n".join(addresses),
        "SKYPILOT_SETUP_NUM_GPUS_PER_NODE": gpus,
        # dstack
        "DSTACK_RUN_NAME": spec.name,
        "DSTACK_NODES_NUM": size,
        "DSTACK_NODE_RANK": rank,
        "DSTACK_NODES_IPS": "\n".join(addresses),
        "DSTACK_MASTER_NODE_IP": master,
        "DSTACK_GPUS_PER_NODE": gpus,
        "DSTACK_GPUS_NUM": str(len(worker.devices) * attempt.workers),
        # Slurm; not its older names (SLURM_JOBID), by which MPI would take it that srun starts its processes
        "SLURM_JOB_ID": str(job_number(job.id)),
        "SLURM_JOB_NAME": spec.name,
        "SLURM_CLUSTER_NAME": "tidemill",
        "SLURM_JOB_NUM_NODES": size,
        "SLURM_CPUS_PER_TASK": cpus,
        "SLURM_JOB_CPUS_PER_NODE": cpus,
        "SLURMD_NODENAME": here.name,
        "SLURM_PROCID": rank,
        "SLURM_NTASKS": size,
        "SLURM_NNODES": size,
        "SLURM_NODEID": rank,
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": ",".join(addresses),
        "SLURM_CPUS_ON_NODE": cpus,
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_RESTART_COUNT": str(attempt.number - job.fence_base - 1),
        # Tidemill
        "TIDEMILL_WORKLOAD_ID": workload.id,
        "TIDEMILL_JOB_ID": job.id,
        "TIDEMILL_JOB_NAME": spec.name,
        "TIDEMILL_PROJECT": workload.project_id,
        "TIDEMILL_ATTEMPT": str(attempt.number),
        "TIDEMILL_RANK": rank,
        "TIDEMILL_WORLD_SIZE": size,
        "TIDEMILL_NODE_RANK": node_rank,
        "TIDEMILL_NODES": ",".join(addresses),
        "TIDEMILL_API_URL": api_url,
        "TIDEMILL_API_URLS": api_url,
    }
    if sum(map(len, addresses)) + len(addresses) > _LONGEST:
        variables = {name: value for name, value in variables.items() if name not in _LISTS}
    if worker.devices:
        variables |= {"SLURM_GPUS_PER_NODE": gpus, "SLURM_JOB_GPUS": ",".join(map(str, range(len(worker.devices))))}
    if worker.memory_bytes:
        variables["SLURM_MEM_PER_NODE"] = str(worker.memory_bytes >> 20)
    if spec.kind is Kind.SERVICE:
        variables["SKYPILOT_SERVE_REPLICA_ID"] = str(job.index + 1)
    if spec.kind is Kind.ARRAY:
        index, last = str(job.index), str(spec.array_size - 1)
        variables |= {
            "TIDEMILL_ARRAY_INDEX": index,
            "TIDEMILL_ARRAY_SIZE": str(spec.array_size),
            "SLURM_ARRAY_JOB_ID": str(job_number(job_id(workload.id, 0))),
            "SLURM_ARRAY_TASK_ID": index,
            "SLURM_ARRAY_TASK_COUNT": str(spec.array_size),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": last,
            "SLURM_ARRAY_TASK_STEP": "1",
        }
    for mount in spec.data:
        if mount.model:
            variables |= {"TIDEMILL_MODEL": mount.dataset, "TIDEMILL_MODEL_DIGEST": mount.digest}
    return tuple((variables | dict(spec.envs)).items())
