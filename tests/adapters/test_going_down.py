"""A cloud goes down with all its work over, however much waits, or says what is not and stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, eventually, free_port
from tidemill import bootstrap
from tidemill.errors import Conflict, Unavailable

GRACE_S = 120


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("down") / "home")
    yield made
    made.down()


@pytest.fixture
def cloud(home: Cloud) -> Cloud:
    """One that runs and takes work."""
    if not bootstrap.is_running(home.home):
        home.up()
    return home


def of_home(home: Path) -> list[int]:
    """Processes that were started for that home, whoever started them."""
    mark, found = str(home).encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                seen = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if mark in seen and not is_dead:
                found.append(int(entry.name))
    return found


def states(cloud: Cloud) -> dict[str, int]:
    found: dict[str, int] = cloud.call("GET", "/v1/status")[1]["jobs"]
    return found


def stubborn(cloud: Cloud, until: int) -> str:
    """A job that does not care for signals, and ends only once somebody listens on a port."""
    ends = f"until (exec 3<>/dev/tcp/127.0.0.1/{until}) 2>/dev/null; do sleep 0.1; done"
    spec = {"name": "stubborn", "run": f"exec bash -c \"trap '' TERM INT; echo stays; {ends}\""}
    job = cloud.submit(spec | {"checkpoint": {"grace": f"{GRACE_S}s"}})
    eventually(lambda: b"stays" in cloud.logs(job), within_s=60, what="it runs")
    return job


def test_ending_everything_has_to_be_said(cloud: Cloud) -> None:
    for body in ({}, {"all": False}, {"all": 1}, {"al": True}):
        status, problem = cloud.call("POST", "/v1/jobs/stop", body)
        assert status == 422, (body, problem)
    assert cloud.call("POST", "/v1/workloads", {"spec": {"run": "true"}})[0] == 201


def test_what_does_not_end_in_time_is_named_and_the_cloud_stays(cloud: Cloud) -> None:
    port = free_port()
    job = stubborn(cloud, port)
    with pytest.raises(Conflict, match=rf"stubborn \({job}, stopping\)") as caught:
        bootstrap.stop_daemon(cloud.home, stop_jobs=True, timeout_s=0.5)
    assert caught.value.value == 1
    assert bootstrap.is_running(cloud.home)
    command = [str(Path(sys.executable).parent / "tidemill"), "down", "--timeout", "0.1", "--json"]
    ended = subprocess.run(
        command, env=os.environ | {"TIDEMILL_HOME": str(cloud.home)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 5, ended.stderr
    assert job in ended.stderr
    status, problem = cloud.call("POST", "/v1/workloads", {"spec": {"run": "true"}})
    assert (status, problem["code"]) == (503, "unavailable"), problem
    with socket.create_server(("127.0.0.1", port)):
        assert bootstrap.stop_daemon(cloud.home, stop_jobs=True, timeout_s=60)
    assert not bootstrap.is_running(cloud.home)


def test_nothing_of_a_long_queue_starts_while_the_cloud_goes_down(cloud: Cloud) -> None:
    """Short jobs, so that room is made all the time that it takes to end them."""
    start = listed(cloud, "/v1/events?")[-1]["seq"]
    status, body = cloud.call(
        "POST",
        "/v1/workloads",
        {"spec": {"name": "many", "array": 600, "run": "sleep 0.3"}},
    )
    assert status == 201, body
    eventually(lambda: states(cloud).get("running"), within_s=60, what="some run")
    assert states(cloud)["queued"] > 500
    assert bootstrap.stop_daemon(cloud.home, stop_jobs=True, timeout_s=60)
    eventually(lambda: not of_home(cloud.home), within_s=5, what="nothing of it is left")
    cloud.up()
    after = [event["type"] for event in listed(cloud, "/v1/events?") if event["seq"] > start]
    asked = after.index("StopRequested")
    assert after[asked:].count("Placed") == 0
    assert after[asked:].count("StopRequested") > 500
    jobs = listed(cloud, "/v1/jobs?name=many&")
    assert len(jobs) == 600
    assert {job["state"] for job in jobs} <= {"cancelled", "succeeded"}


def listed(cloud: Cloud, path: str) -> list[dict[str, Any]]:
    """All items of a list."""
    cursor, found = "", list[dict[str, Any]]()
    while True:
        page = cloud.call("GET", f"{path}limit=1000&cursor={cursor}")[1]
        found += page["items"]
        cursor = page["next_cursor"]
        if not cursor:
            return found


def test_a_control_plane_that_does_not_answer_is_left_as_it_is(cloud: Cloud) -> None:
    os.kill(cloud.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="could not be asked"):
            bootstrap.stop_daemon(cloud.home, stop_jobs=True, timeout_s=0.5)
        assert time.monotonic() - began < 20
        assert bootstrap.is_running(cloud.home)
    finally:
        os.kill(cloud.pid, signal.SIGCONT)
