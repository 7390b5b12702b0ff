"""A cloud on Ray whose head is killed: what runs runs on, and is adopted, with Redis behind the head and without."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cloud import Cloud, eventually, free_port
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'tidemill[ray]'"),
]
TICKING = (
    "echo begin >> $TIDEMILL_OUTPUT_DIR/journal; sync; "
    "while true; do cut -d' ' -f1 /proc/uptime >> $TIDEMILL_OUTPUT_DIR/journal; sleep 0.1; done"
)
READY_S = 150.0


class Rack:
    """A cloud on Ray of two machines, both of them this one: the head's, and ``second``."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.cloud = Cloud(folder / "head", engine="ray", ray_port=free_port(), **settings)
        self.cloud.up()
        eventually(lambda: self.states() == ["ready"], within_s=READY_S, what="the head is ready")
        self.first = self.nodes()[0]["name"]
        self.second = folder / "second"
        token = self.cloud.call("POST", "/v1/sites/local/tokens", {})[1]["token"]
        asked = OutpostConfig(
            control_url=f"http://127.0.0.1:{self.cloud.port}", key="", node_id="", name="second", address="127.0.0.1"
        )
        joining.join(self.second, token, asked)
        joining.start_outpost(self.second)
        eventually(lambda: self.states() == ["ready", "ready"], within_s=READY_S, what="both are ready")

    def nodes(self) -> list[dict[str, Any]]:
        return list(self.cloud.call("GET", "/v1/nodes")[1]["items"])

    def states(self) -> list[str]:
        return [node["state"] for node in self.nodes()]

    def on(self, name: str, run: str) -> str:
        """A job that runs on that machine: nothing is placed on the other one while it is placed."""
        other = next(node["name"] for node in self.nodes() if node["name"] != name)
        assert self.cloud.call("POST", f"/v1/nodes/{other}/mark", {"marking": "cordon"})[0] == 200
        job = self.cloud.submit({"name": "tick", "run": run, "resources": {"cpus": 0.1}, "retry": 3})
        eventually(lambda: self.cloud.job(job)["state"] != "queued", within_s=60, what="it is placed")
        assert self.cloud.call("POST", f"/v1/nodes/{other}/mark", {"marking": "resume"})[0] == 200
        return job

    def journal(self, job: str) -> list[str]:
        found = list(self.folder.glob(f"*/**/volumes/*/{job}/output/journal"))
        return found[0].read_text().split() if found else []

    def ticks(self, job: str) -> bool:
        """Whether it writes into its journal, again and again."""
        return len(self.journal(job)) > 3

    def agent(self) -> int:
        """The process id of the second machine's agent; zero when there is none."""
        for process in psutil.process_iter(["name", "cmdline"]):
            with contextlib.suppress(psutil.Error):
                if "NodeAgent" in " ".join(process.info["cmdline"] or ()) and self._is_second(process):
                    return process.pid
        return 0

    def _is_second(self, process: psutil.Process) -> bool:
        return process.environ().get("TIDEMILL_OUTPOST_HOME") == str(self.second)

    def kill_head(self) -> set[int]:
        """kill -9 of what is on the head only, all at once: Ray's control store and the head's raylet."""
        folder = (self.folder / "head" / "outpost").resolve()
        found = set()
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                own = process.environ().get("TIDEMILL_OUTPOST_HOME")
                if process.info["name"] in ("gcs_server", "raylet") and own == str(folder):
                    found.add(process.pid)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return found

    def close(self) -> None:
        self.cloud.down()
        joining.stop_outpost(self.second)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis of its own."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed: apt install redis-server")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


def check_that_work_outlives_the_head(rack: Rack, *, stays: bool) -> None:
    """``stays``: whether the agents of the other machines are the same afterwards."""
    jobs = {name: rack.on(name, TICKING) for name in (rack.first, "second")}
    for job in jobs.values():
        rack.cloud.wait(job, "running", within_s=60)
        eventually(partial(rack.ticks, job), within_s=30, what="it ticks")
    agent = rack.agent()
    assert agent
    assert len(rack.kill_head()) == 2
    for name in jobs:
        told = rack.on(name, "echo back")
        assert rack.cloud.wait(told, within_s=READY_S)["state"] == "succeeded"
        assert [worker["node"] for worker in rack.cloud.job(told)["workers"]] == [name]
    eventually(lambda: rack.states() == ["ready", "ready"], within_s=READY_S, what="both are ready")
    assert (rack.agent() == agent) is stays
    time.sleep(1)
    for name, job in jobs.items():
        found = rack.cloud.job(job)
        assert (found["state"], found["attempts"], found["workers"][0]["node"]) == ("running", 1, name)
        begin, *ticks = rack.journal(job)
        assert begin == "begin"
        times = [float(tick) for tick in ticks]
        assert max(later - sooner for sooner, later in itertools.pairwise(times)) < 5
        rack.cloud.call("POST", f"/v1/jobs/{job}/stop")
        assert rack.cloud.wait(job, within_s=60)["state"] == "cancelled"


def test_with_redis_a_killed_head_comes_back_to_its_cluster(tmp_path: Path, redis: str) -> None:
    rack = Rack(tmp_path, ray_redis=redis)
    try:
        check_that_work_outlives_the_head(rack, stays=True)
    finally:
        rack.close()


def test_without_redis_a_killed_head_forms_its_cluster_anew(tmp_path: Path) -> None:
    rack = Rack(tmp_path)
    try:
        check_that_work_outlives_the_head(rack, stays=False)
    finally:
        rack.close()
