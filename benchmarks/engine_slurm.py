"""The Slurm half of ``engine``: many short jobs through Tidemill on a Slurm cluster, beside an ``sbatch`` array there.

Each job through Tidemill is an ``sbatch`` job of its own with its own runner, log, exit status, usage and bill. A task
of the array is what the same cluster does by itself: it runs the command, and that is all. Both ask for one core of
the same three nodes, which say that they have more than this machine: what is measured is starting and ending.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.slurm import Slurm

from benchmarks.batches import Through, put_through
from benchmarks.centre import cloud_on_slurm, cluster
from benchmarks.centre import why_not as why_not

SHORT: Final = {"name": "short", "run": "true", "resources": {"gpus": "none", "cpus": 1, "memory": "64MB"}}
_CPUS: Final = 16
_LIMIT_S: Final = 600.0


def measure(jobs: int) -> tuple[Through, dict[str, float]]:
    """What came of so many jobs through Tidemill, and jobs a second of Slurm's own way."""
    with cluster(cpus=_CPUS, scheduler="batch_sched_delay=0,default_queue_depth=10000") as slurm:
        by_array(slurm, 20)
        rival = by_array(slurm, jobs)
        with cloud_on_slurm(slurm) as home:
            put_through(home, 20, {**SHORT, "name": "warm"})
            ours = put_through(home, jobs, SHORT)
    return ours, {"sbatch --array": rival}


def by_array(slurm: Slurm, jobs: int) -> float:
    """Tasks a second of an array, from ``sbatch`` until Slurm has none of it any more."""
    began = time.monotonic()
    words = ["--parsable", f"--array=0-{jobs - 1}", "--mem=64M", "--output=/dev/null", "--wrap=true"]
    number = slurm.run("sbatch", *words).strip()
    while slurm.run("squeue", "-h", "-t", "pending,running,completing", "-o", "%A", "-j", number):
        if time.monotonic() - began > _LIMIT_S:
            raise RuntimeError("the array does not end")
        time.sleep(0.2)
    took = time.monotonic() - began
    ended = slurm.run("squeue", "-h", "-r", "-t", "completed", "-o", "%T", "-j", number).splitlines()
    if len(ended) != jobs:
        raise RuntimeError(f"only {len(ended)} of {jobs} tasks ended well")
    return jobs / took
