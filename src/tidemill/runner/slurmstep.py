"""What Slurm starts on each node of an allocation: the runner of the rank that this node has got.

Slurm chose the node and the devices, so what depends on them is put into the launch here: the names of its devices, the
addresses of the gang's nodes by rank, and Slurm's own variables, with which ``srun`` and MPI work inside the job.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tidemill.runner.folders import LaunchFolder, read_json, write_json
from tidemill.runner.main import prepare_process, run_launch

_OWN: Final = ("SLURM_", "SLURMD_", "PMI_", "PMIX_")
_DEVICES: Final = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def placed(spec: Mapping[str, Any], slurm: Mapping[str, str], addresses: Sequence[str], rank: int) -> dict[str, Any]:
    """The launch with what Slurm decided. ``addresses`` are those of the gang's nodes, in the order of ranks."""
    given = {str(name): str(value) for name, value in spec.get("environment_variables") or ()}
    own = {name: value for name, value in slurm.items() if name.startswith(_OWN)}
    for name in ("SLURM_EXPORT_ENV", "SLURM_GET_USER_ENV"):  # how the runner was started, not how its job's steps are
        own.pop(name, None)
    own |= {"SLURM_OVERLAP": "1"}  # the runner's own step has the devices: steps inside the job share them with it
    found = addressed(given, addresses, rank)
    devices = next((slurm[name] for name in _DEVICES if slurm.get(name)), "")
    wanted = [[name, 1_000] for name in devices.split(",") if name] if spec.get("devices") else []
    return {**spec, "environment_variables": list({**given, **found, **own}.items()), "devices": wanted}


def addressed(given: Mapping[str, str], addresses: Sequence[str], rank: int) -> dict[str, str]:
    """Those of the ``given`` variables that say where a gang's nodes are, with where they really are, by rank."""
    where = {
        "MASTER_ADDR": addresses[0],
        "JAX_COORDINATOR_ADDRESS": f"{addresses[0]}:{given.get('MASTER_PORT', '0')}",
        "SKYPILOT_NODE_IPS": "\n".join(addresses),
        "DSTACK_MASTER_NODE_IP": addresses[0],
        "DSTACK_NODES_IPS": "\n".join(addresses),
        "TIDEMILL_NODES": ",".join(addresses),
        "TIDEMILL_NODE_RANK": str(rank),
    }
    return {name: value for name, value in where.items() if name in given}


def main() -> None:
    """Run the launch in the folder that is this node's, of those given in the order of ranks."""
    folders = [Path(name) for name in sys.argv[1:]]
    rank = int(os.environ.get("SLURM_NODEID", "0")) if len(folders) > 1 else 0
    folder = LaunchFolder(folders[rank])
    spec = read_json(folder.spec)
    if spec is None or folder.claimed.exists() or not _is_first(folders[0]):
        return
    addresses = _addresses() if len(folders) > 1 else [os.environ.get("SLURMD_NODENAME", "127.0.0.1")]
    write_json(folder.spec, placed(spec, os.environ, addresses, rank), durable=True)
    prepare_process(folder.diary)
    run_launch(folder.path, lambda: None)


def _is_first(folder: Path) -> bool:
    """Whether no other job of Slurm's began on this launch: all ranks of a gang are of one job."""
    own = os.environ.get("SLURM_JOB_ID", "")
    mine, first = folder / f"job-{own}", folder / "job"
    mine.write_text(own)
    with contextlib.suppress(FileExistsError):
        os.link(mine, first)
    return first.read_text() == own


def _addresses() -> list[str]:
    """Where the nodes of the allocation are reached, by rank: as Slurm itself reaches them."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    names = _scontrol("show", "hostnames", nodes).split()
    found = []
    for name in names:
        words = _scontrol("--oneliner", "show", "node", name).split()
        found.append(next((word[9:] for word in words if word.startswith("NodeAddr=")), name))
    return found


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


if __name__ == "__main__":
    main()
