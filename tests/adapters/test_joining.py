"""Machines that join: everything through the real processes, the real protocol, and the command line's own steps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, eventually
from tidemill.errors import Conflict, InvalidRequest, NotFound, Unauthorized, Unavailable
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig, read_config
from tidemill.outpost.main import running_pid

HOLD = "echo begin $TIDEMILL_RANK >> $TIDEMILL_OUTPUT_DIR/journal; sync; sleep 600 & wait"


TICKING = "while true; do echo $TIDEMILL_ATTEMPT $(cut -d' ' -f1 /proc/uptime) >> $TIDEMILL_OUTPUT_DIR/journal; sleep 0.1; done"


class Joined:
    """A cloud and the machines that joined it, all of them this one, each with its own home."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.cloud = Cloud(folder / "head", **settings)
        self.cloud.up()
        self.homes: list[Path] = []

    def token(self, site: str = "local") -> str:
        status, made = self.cloud.call("POST", f"/v1/sites/{site}/tokens", {})
        assert status == 201, made
        return str(made["token"])

    def join(self, name: str, *, site: str = "local", **described: Any) -> Path:
        home = self.folder / name
        asked = OutpostConfig(
            control_url=f"http://127.0.0.1:{self.cloud.port}", key="", node_id="", name=name, address="127.0.0.1",
            **described,
        )  # fmt: skip
        joining.join(home, self.token(site), asked)
        joining.start_outpost(home)
        self.homes.append(home)
        eventually(lambda: self.node(name).get("state") == "ready", within_s=60, what=f"{name} is ready")
        return home

    def node(self, name: str) -> dict[str, Any]:
        nodes = self.cloud.call("GET", "/v1/nodes")[1]["items"]
        return next((dict(node) for node in nodes if node["name"] == name), {})

    def kill(self, home: Path) -> None:
        """kill -9 of an outpost, and of nothing else."""
        os.kill(running_pid(home), signal.SIGKILL)
        eventually(lambda: not running_pid(home), within_s=30, what="it is gone")

    def begun(self, job_id: str) -> list[str]:
        """The lines that the job's workers wrote when they began, on whichever machine."""
        journals = self.folder.glob(f"*/local/volumes/*/{job_id}/output/journal")
        return [line for journal in journals for line in journal.read_text().splitlines()]

    def close(self) -> None:
        self.cloud.down()
        for home in self.homes:
            joining.stop_outpost(home)


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    made = Joined(tmp_path)
    try:
        yield made
    finally:
        made.close()


def cpus(joined: Joined) -> int:
    return int(joined.node("second")["cpu_milli"]) // 1_000


def test_a_gang_runs_on_machines_that_joined_and_they_leave_again(joined: Joined) -> None:
    home = joined.join("second", labels=(("disk", "nvme"),))
    assert joined.node("second")["labels"] == {"disk": "nvme"}
    spec = {"name": "gang", "nodes": 2, "resources": {"cpus": cpus(joined)}, "run": HOLD}
    job = joined.cloud.submit(spec)
    joined.cloud.wait(job, "running")
    eventually(lambda: sorted(joined.begun(job)) == ["begin 0", "begin 1"], within_s=30, what="both began")
    assert joining.leave(home, patience_s=60).name == "second"
    assert joined.cloud.job(job)["state"] == "queued"
    assert not running_pid(home)
    assert joined.node("second") == {}
    with pytest.raises(NotFound):
        read_config(home)
    joined.join("second")
    joined.cloud.wait(job, "running")
    twice = ["begin 0", "begin 0", "begin 1", "begin 1"]
    eventually(lambda: sorted(joined.begun(job)) == twice, within_s=30, what="both began again")


def test_workers_outlive_outpost_and_control_plane(joined: Joined) -> None:
    home = joined.join("second")
    jobs = [joined.cloud.submit({"name": f"j{at}", "resources": {"cpus": cpus(joined)}, "run": HOLD}) for at in (0, 1)]
    for job in jobs:
        joined.cloud.wait(job, "running")
    joined.kill(home)
    joined.cloud.kill()
    joining.start_outpost(home)
    joined.cloud.up()
    time.sleep(2)
    for job in jobs:
        assert joined.cloud.job(job)["state"] == "running"
        joined.cloud.call("POST", f"/v1/jobs/{job}/stop")
    for job in jobs:
        assert joined.cloud.wait(job)["state"] == "cancelled"
        assert joined.begun(job) == ["begin 0"]


@pytest.mark.long
def test_a_machine_that_is_cut_off_is_silent_and_its_job_is_left_alone(joined: Joined) -> None:
    """Without a lease nothing is started elsewhere until somebody says that the machine is gone for good."""
    home = joined.join("second")
    blocker = joined.cloud.submit({"name": "blocker", "resources": {"cpus": cpus(joined)}, "run": HOLD})
    job = joined.cloud.submit({"name": "kept", "resources": {"cpus": cpus(joined)}, "run": HOLD, "retry": 1})
    for each in (blocker, job):
        joined.cloud.wait(each, "running")
    there = next(each for each in (blocker, job) if joined.cloud.job(each)["workers"][0]["node"] == "second")
    os.kill(running_pid(home), signal.SIGSTOP)
    try:
        eventually(lambda: joined.node("second")["state"] == "silent", within_s=60, what="it is silent")
        assert joined.cloud.job(there)["state"] == "running"
        assert joined.cloud.call("POST", "/v1/nodes/vm-that-is-not/lost", {})[0] == 404
    finally:
        os.kill(running_pid(home), signal.SIGCONT)
    eventually(lambda: joined.node("second")["state"] == "ready", within_s=60, what="it is back")
    assert joined.cloud.job(there)["state"] == "running"
    assert joined.begun(there) == ["begin 0"]
    status, answer = joined.cloud.call("POST", "/v1/nodes/second/lost", {})
    assert (status, answer["code"]) == (409, "conflict")


@pytest.mark.long
def test_a_worker_without_its_control_plane_ends_when_its_lease_does(tmp_path: Path) -> None:
    joined = Joined(tmp_path, lease="2s")
    try:
        joined.join("second")
        jobs = [
            joined.cloud.submit({"name": f"j{at}", "resources": {"cpus": cpus(joined)}, "run": HOLD, "retry": 3})
            for at in (0, 1)
        ]
        for job in jobs:
            joined.cloud.wait(job, "running")
        there = next(job for job in jobs if joined.cloud.job(job)["workers"][0]["node"] == "second")
        here = next(job for job in jobs if job != there)
        eventually(lambda: joined.begun(there) == ["begin 0"], within_s=30, what="it began")
        joined.cloud.kill()
        time.sleep(6)
        joined.cloud.up()
        eventually(lambda: joined.cloud.job(there)["attempts"] == 2, within_s=60, what="it was tried again")
        joined.cloud.wait(there, "running")
        attempts = joined.cloud.job(there)["attempt_list"]
        assert attempts[0]["cause"] == "node_lost"
        assert "lease" in attempts[0]["detail"]
        assert joined.cloud.job(here)["attempts"] == 1  # this machine shares the control plane's fate: no lease
    finally:
        joined.close()


@pytest.mark.long
def test_a_runner_that_stands_still_beyond_its_lease_does_not_keep_its_worker(tmp_path: Path) -> None:
    """Nobody but the machine itself can end that worker, and it does so before anything is started elsewhere."""
    joined = Joined(tmp_path, lease="2s")
    try:
        home = joined.join("second")
        jobs = [
            joined.cloud.submit({"name": f"j{at}", "resources": {"cpus": cpus(joined)}, "run": TICKING, "retry": 3})
            for at in (0, 1)
        ]
        for job in jobs:
            joined.cloud.wait(job, "running")
        there = next(job for job in jobs if joined.cloud.job(job)["workers"][0]["node"] == "second")
        launch = f"run_{there.removeprefix('job_')}-1-0"
        runner = json.loads((home / "local" / "launches" / launch / "runner.json").read_text())["pid"]
        eventually(lambda: len(joined.begun(there)) > 2, within_s=30, what="it ticks")
        os.kill(runner, signal.SIGSTOP)
        eventually(lambda: joined.cloud.job(there)["attempts"] == 2, within_s=60, what="it was tried again")
        joined.cloud.wait(there, "running")
        eventually(
            lambda: any(line.startswith("2 ") for line in joined.begun(there)), within_s=30, what="it ticks again"
        )
        ticks = [(int(attempt), float(at)) for attempt, at in (line.split() for line in joined.begun(there))]
        assert max(at for attempt, at in ticks if attempt == 1) < min(at for attempt, at in ticks if attempt == 2)
        assert f"stood still beyond their leases: {launch}" in (home / "outpost.log").read_text()
    finally:
        joined.close()


def test_a_site_of_its_own(joined: Joined) -> None:
    described = {"kind": "edge", "country": "DEU", "pue": 1.4, "lease": "1h"}
    status, site = joined.cloud.call("PUT", "/v1/sites/berlin", described)
    assert status == 200, site
    assert (site["kind"], site["lease_ns"], site["nodes"]) == ("edge", 3_600 * 10**9, 0)
    joined.join("far", site="berlin")
    sites = {one["name"]: one for one in joined.cloud.call("GET", "/v1/sites")[1]["items"]}
    assert [outpost["is_there"] for outpost in sites["berlin"]["outposts"]] == [True]
    assert (sites["local"]["nodes"], sites["berlin"]["nodes"]) == (1, 1)
    assert joined.node("far")["site"] == "berlin"
    blocker = joined.cloud.submit({"name": "a", "resources": {"cpus": 1}, "run": "echo here; sleep 1"})
    job = joined.cloud.submit({"name": "b", "nodes": 2, "resources": {"cpus": 1}, "run": "echo rank $TIDEMILL_RANK"})
    assert joined.cloud.wait(blocker)["state"] == "succeeded"
    assert joined.cloud.wait(job)["state"] == "succeeded"
    joined.cloud.kill()
    joined.cloud.up()
    eventually(lambda: joined.node("far").get("state") == "ready", within_s=60, what="it is there again")
    assert joined.cloud.call("PUT", "/v1/sites/local", {})[0] == 409
    assert joined.cloud.call("PUT", "/v1/sites/no%20name", {})[0] == 422


def test_outputs_are_found_where_machines_share_a_folder_and_else_it_is_said_where_they_are(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for volumes in ("", str(shared)):
        folder = tmp_path / ("shares" if volumes else "alone")
        folder.mkdir()
        joined = Joined(folder, **({"volumes": volumes} if volumes else {}))
        try:
            joined.join("second", volumes=volumes)
            spec = {"resources": {"cpus": cpus(joined)}, "run": "echo weights > $TIDEMILL_OUTPUT_DIR/model; sleep 1"}
            jobs = [joined.cloud.submit({"name": f"j{at}", **spec}) for at in (0, 1)]
            for job in jobs:
                joined.cloud.wait(job)
            [there] = [job for job in jobs if joined.cloud.job(job)["workers"][0]["node"] == "second"]
            body = {"name": "gpt", "job": there, "path": "model"}
            status, answer = joined.cloud.call("POST", "/v1/artifacts", body)
            if volumes:
                assert (status, answer["version"]) == (201, 1)
            else:
                assert status == 404
                assert "It ran on second, whose folders are not seen from here." in answer["mend"]
        finally:
            joined.close()


def test_joining_again_is_the_same_machine_and_another_cloud_is_refused(joined: Joined) -> None:
    home = joined.join("second")
    before = read_config(home)
    config = joining.join(home, joined.token(), replace(before, name="renamed"))
    assert (config.node_id, config.outpost_id, config.name) == (before.node_id, before.outpost_id, "renamed")
    assert config.token != before.token
    assert before.key not in str(joined.cloud.call("GET", "/v1/sites")[1]), "whoever reads ids learns no keys"
    joined.cloud.call("PUT", "/v1/sites/other", {})
    with pytest.raises(Conflict, match="belongs to site local"):
        joining.join(home, joined.token("other"), before)
    with pytest.raises(Conflict, match="part of the cloud"):
        joining.join(home, joined.token(), replace(before, control_url="http://127.0.0.1:9"))
    with pytest.raises(Unauthorized):
        joining.join(joined.folder / "x", "tm_user_nonsense", replace(before, key="", token=""))
    with pytest.raises(Conflict, match="has an outpost renamed already"):
        joining.join(joined.folder / "y", joined.token(), replace(config, key="", token=""))


@pytest.mark.parametrize("text", ["", "two words", "ftp://x", "http://x/path", "host:notaport", "http://"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        joining.url_of(text)


def test_an_address_without_a_way_there_says_so() -> None:
    with contextlib.suppress(Unavailable):
        assert joining.own_address("http://192.0.2.1")
    with pytest.raises(Unavailable, match=r"no way to"):
        joining.own_address("http://nowhere.invalid:1")
