"""Ray by itself, for measuring beside: a cluster of several nodes on this machine, and its two ways to run commands.

It is installed into ``.bench/ray`` on first use, as the latency benchmark's is, and shares nothing with Tidemill's Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.clouds import free_port
from benchmarks.latency import RAY_FOLDER, end_group, install_ray

_LIMIT_S = 120.0
_PROGRAMS = RAY_FOLDER / "bin"
_JOBS = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from ray.job_submission import JobSubmissionClient
client, count, command, cpus = JobSubmissionClient(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
began = time.perf_counter()
with ThreadPoolExecutor(8) as pool:
    submit = lambda _: client.submit_job(entrypoint=command, entrypoint_num_cpus=cpus)
    waiting = set(pool.map(submit, range(count)))
ended = {}
while waiting:
    time.sleep(0.1)
    over = {job.submission_id: str(job.status.value) for job in client.list_jobs() if job.status.is_terminal()}
    ended |= {job: over[job] for job in waiting & over.keys()}
    waiting -= over.keys()
took = time.perf_counter() - began
print(json.dumps({"took_s": took, "well": sum(status == "SUCCEEDED" for status in ended.values())}))
"""
_TASKS = """
import json, shlex, subprocess, sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
count, command, cpus = int(sys.argv[2]), shlex.split(sys.argv[3]), float(sys.argv[4])
@ray.remote(num_cpus=cpus, max_retries=0)
def run(command):
    return subprocess.run(command).returncode
def measure():
    began = time.perf_counter()
    well = ray.get([run.remote(command) for _ in range(count)]).count(0)
    return {"took_s": time.perf_counter() - began, "well": well}
cold = measure()
print(json.dumps({"cold": cold, "warm": measure()}))
"""
_NODES = """
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
until_s = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    if time.monotonic() > until_s:
        sys.exit(1)
    time.sleep(0.2)
"""


class Ray:
    """A cluster: ``jobs`` is where its job interface answers, ``address`` where drivers connect."""

    def __init__(self, jobs: str, address: str, environment: Mapping[str, str]) -> None:
        self._jobs = jobs
        self._address = address
        self._environment = environment

    def submit_jobs(self, count: int, command: str, *, cpus: float) -> dict[str, Any]:
        """``took_s`` until so many jobs, submitted through Ray's client side by side, ended, and how many ``well``."""
        return self._python(_JOBS, self._jobs, str(count), command, str(cpus))

    def run_tasks(self, count: int, command: str, *, cpus: float) -> dict[str, Any]:
        """The same of tasks that run the command: ``cold``, worker processes included, and ``warm``."""
        return self._python(_TASKS, self._address, str(count), command, str(cpus))

    def _python(self, script: str, *given: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(_PROGRAMS / "python"), "-c", script, *given],
            env=self._environment, check=False, capture_output=True, text=True, timeout=420,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"Ray's own way failed: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


@contextlib.contextmanager
def ray_cluster(*, nodes: int, cores: int) -> Iterator[Ray]:
    """A cluster of so many nodes with so many cores each, all on this machine."""
    install_ray()
    folder = tempfile.mkdtemp(prefix="ray-bench-")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VIRTUAL_ENV"))}
    environment = own | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{_PROGRAMS}:{own.get('PATH', '')}",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    dashboard, port = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    head = ["--head", "--port", str(port), "--temp-dir", folder, "--dashboard-host", "127.0.0.1"]
    head += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(free_port())]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for number in range(nodes):
            _start_node(stack, head if number == 0 else ["--address", address], cores, environment)
            _until_nodes(address, number + 1, environment)  # started side by side, some give up on a busy machine
        yield Ray(f"http://127.0.0.1:{dashboard}", address, environment)


def _start_node(stack: contextlib.ExitStack, role: list[str], cores: int, environment: Mapping[str, str]) -> None:
    ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    process = subprocess.Popen(
        [str(_PROGRAMS / "ray"), "start", "--block", *role, "--node-ip-address", "127.0.0.1", "--num-cpus", str(cores),
         "--disable-usage-stats", "--object-store-memory", str(100 << 20), "--min-worker-port", "0",
         "--max-worker-port", "0", "--metrics-export-port", str(free_port()),
         *(word for name in ports for word in (f"--{name}", str(free_port())))],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    stack.callback(end_group, process)


def _until_nodes(address: str, count: int, environment: Mapping[str, str]) -> None:
    """Return once so many nodes are alive. Raises: RuntimeError when that takes long."""
    until_s = time.monotonic() + _LIMIT_S
    command = [str(_PROGRAMS / "python"), "-c", _NODES, address, str(count)]
    while subprocess.run(command, env=environment, capture_output=True, check=False, timeout=_LIMIT_S).returncode:
        if time.monotonic() > until_s:
            raise RuntimeError(f"the {count} nodes of the Ray cluster do not come up")
        time.sleep(0.5)
