"""Many short jobs through Tidemill on Ray and on Slurm, beside the engines' own ways; and very many jobs at once.

On Ray: a cloud whose machines are four nodes of a Ray cluster, all on this one machine; each job is a command of its
own, with its own runner, log, exit status, usage and bill, and the clock runs from the first request until the last is
in the database as over. Beside it, on a cluster of as many nodes of plain Ray: ``ray job submit`` through its client,
of fewer jobs because it is slow, and Ray tasks that run the command, which have neither log nor record: once with
worker processes still to be started, once with them there. All ask for the same fraction of a core.

At once: so many jobs that sleep, on machines that joined through outposts, until all of them run at the same time;
then the control plane serves their heartbeats for a while. Runners and workers are real processes; as many are started
as this machine's memory holds. The control plane is measured alone: CPU and greatest resident memory. The last line is
JSON; null is what was not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil

from benchmarks.batches import Through, put_through, states, submit, until, watch
from benchmarks.clouds import PROGRAMS, Home, cloud, end_on_signals, free_port, machine, table
from benchmarks.rays import ray_cluster

NODES: Final = 4
SHORT: Final = {"name": "short", "run": "true", "resources": {"gpus": "none", "cpus": 0.25, "memory": "64MB"}}
_CPUS: Final = 0.25
_READY_S: Final = 120.0
_A_JOB: Final = 9 << 20
"""Memory that a runner with its sandbox and its worker takes, what the kernel keeps for them included."""
_SPARE: Final = 2 << 30


def members(home: Home, count: int) -> None:
    """So many machines join the cloud's site, each from a home of its own, and end with the cloud."""
    answer = _tidemill(home, "site", "token", "local", "--json")
    token = json.loads(answer)["token"]
    for number in range(count):
        folder = home.folder / f"machine-{number}"
        given = ["--home", str(folder), "--name", f"machine-{number}", "--address", "127.0.0.1"]
        _tidemill(home, "join", home.url, "--token", token, *given)


def until_ready(home: Home, count: int) -> None:
    """Return once so many machines are ready. Raises: RuntimeError when that takes long."""
    until_s = time.monotonic() + _READY_S
    while True:
        found = [node["state"] for node in json.loads(_tidemill(home, "nodes", "--json"))]
        if found.count("ready") >= count:
            return
        if time.monotonic() > until_s:
            raise RuntimeError(f"the machines do not join: {found}")
        time.sleep(0.5)


def _tidemill(home: Home, *words: str) -> str:
    command = [str(PROGRAMS / "tidemill"), *words]
    done = subprocess.run(command, env=home.environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"tidemill {words[0]} ended with {done.returncode}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def cloud_on_ray(nodes: int) -> Iterator[Home]:
    """A cloud of so many machines, which are nodes of one Ray cluster."""
    with cloud(engine="ray", ray_port=free_port()) as home:
        until_ready(home, 1)
        members(home, nodes - 1)
        until_ready(home, nodes)
        yield home


def measure_ray(jobs: int, ray_jobs: int) -> tuple[Through, dict[str, float]]:
    """What came of the jobs through Tidemill, and jobs a second of Ray's own ways."""
    with cloud_on_ray(NODES) as home:
        put_through(home, 20, {**SHORT, "name": "warm"})
        ours = put_through(home, jobs, SHORT)
    rivals: dict[str, float] = {}
    with ray_cluster(nodes=NODES, cores=len(os.sched_getaffinity(0))) as ray:
        if ray_jobs:
            ray.submit_jobs(2, "true", cpus=_CPUS)
            rivals["ray job submit"] = _rate(ray_jobs, ray.submit_jobs(ray_jobs, "true", cpus=_CPUS))
        found = ray.run_tasks(jobs, "true", cpus=_CPUS)
        rivals |= {f"ray tasks, {name}": _rate(jobs, each) for name, each in found.items()}
    return ours, rivals


def _rate(jobs: int, found: dict[str, Any]) -> float:
    if found["well"] != jobs:
        raise RuntimeError(f"only {found['well']} of {jobs} ended well")
    return jobs / float(found["took_s"])


def that_fit(jobs: int) -> int:
    """So many jobs, or as many as this machine's free memory holds."""
    fit = max(0, psutil.virtual_memory().available - _SPARE) // _A_JOB
    if fit < jobs:
        print(f"running: {fit:,} of {jobs:,} jobs fit into this machine's free memory", file=sys.stderr)
    return min(jobs, fit)


def measure_running(jobs: int, machines: int, hold_s: float) -> dict[str, float]:
    """What it took to have so many jobs run at once, and to serve them for ``hold_s``."""
    spec = {"name": "many", "run": "sleep 3600", "resources": {"gpus": "none", "cpus": 0.001, "memory": "16MB"}}
    with cloud(engine="none") as home:
        members(home, machines)
        until_ready(home, machines)
        with watch(home) as seen:
            began = time.monotonic()
            submit(home, jobs, spec)
            until(home, lambda now: now.get("running", 0) >= jobs, limit_s=60.0)
            up_s, cpu_up_s = time.monotonic() - began, seen.cpu_s()
            time.sleep(hold_s)
            held_cpu_s = seen.cpu_s() - cpu_up_s
            running = states(home).get("running", 0)
        return {
            "jobs": running, "up_s": up_s, "cpu_up_s": cpu_up_s, "cores_held": held_cpu_s / hold_s,
            "rss_mib": seen.most_bytes / 2**20,
        }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--ray-jobs", type=int, default=24, help="through ray job submit")
    parser.add_argument("--running", type=int, default=2_000, help="at once")
    parser.add_argument("--machines", type=int, default=8, help="on which they run at once")
    parser.add_argument("--hold", type=float, default=20.0, help="seconds for which they run")
    parser.add_argument("--only", choices=("ray", "slurm", "running"))
    given = parser.parse_args()
    end_on_signals()
    result: dict[str, Any] = dict.fromkeys(
        ("ray_jobs_per_s", "slurm_jobs_per_s", "running_jobs", "control_plane_rss_mib")
    )
    rows: list[tuple[str, ...]] = []
    for name, measure in _halves(given.only, given.jobs, given.ray_jobs).items():
        ours, rivals = measure()
        result[f"{name}_jobs_per_s"] = round(ours.jobs_per_s, 1)
        rows += _rows(name, ours, rivals)
    about = machine()
    if rows:
        print(f"\n{given.jobs:,} short jobs, from the first request until the last is in the database as over")
        print(f"{about['cpu']}, {about['cores']} cores, {about['date']}\n")
        table(("", "jobs/s", "beside Tidemill", "control plane", ""), rows)
    if given.only in (None, "running"):
        found = measure_running(that_fit(given.running), given.machines, given.hold)
        result |= {"running_jobs": int(found["jobs"]), "control_plane_rss_mib": round(found["rss_mib"])}
        print(
            f"\n{found['jobs']:,.0f} jobs at once after {found['up_s']:.1f} s; the control plane took"
            f" {found['cpu_up_s']:.1f} s of CPU for that and {found['cores_held']:.2f} cores while they ran, and"
            f" {found['rss_mib']:.0f} MiB at most"
        )
    print(json.dumps({**result, "machine": about}))


def _halves(only: str | None, jobs: int, ray_jobs: int) -> dict[str, Callable[[], tuple[Through, dict[str, float]]]]:
    """What is measured of the two engines. A half that cannot be is left out with its reason."""
    halves: dict[str, Callable[[], tuple[Through, dict[str, float]]]] = {}
    if only in (None, "ray"):
        halves["ray"] = lambda: measure_ray(jobs, ray_jobs)
    if only in (None, "slurm"):
        try:
            engine_slurm = importlib.import_module("benchmarks.engine_slurm")
        except ModuleNotFoundError as error:
            print(f"slurm: {error}", file=sys.stderr)
        else:
            if reason := engine_slurm.why_not():
                print(f"slurm: {reason}", file=sys.stderr)
            else:
                halves["slurm"] = lambda: engine_slurm.measure(jobs)
    return halves


def _rows(name: str, ours: Through, rivals: dict[str, float]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (f"Tidemill on {name}", f"{ours.jobs_per_s:.1f}", "", f"{ours.cpu_s:.1f} s CPU", f"{ours.rss_mib:.0f} MiB")
    ]
    for rival, rate in rivals.items():
        rows.append((rival, f"{rate:.1f}", f"{rate / ours.jobs_per_s:.2f} x", "", ""))
    return rows


if __name__ == "__main__":
    main()
