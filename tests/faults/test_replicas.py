"""Several control planes over one PostgreSQL: any answers, one leads, and losing it loses and doubles nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, eventually
from tests.postgres import NoPostgres, Postgres
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig

pytestmark = pytest.mark.postgres
FAIL_OVER_S = 5.0
STALLED_FAIL_OVER_S = 20.0
WORKER = """
import os, time
journal = os.open(os.environ["TIDEMILL_OUTPUT_DIR"] + "/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(what):
    os.write(journal, f"{{what}} {{os.environ['TIDEMILL_ATTEMPT']}}\\n".encode())
    os.fsync(journal)
note("start")
for number in range({lines}):
    print(f"line {{number}}", flush=True)
    time.sleep({pause})
note("end")
"""


class Replicas:
    """Two control planes of one installation, and a machine that joined through the first."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        (folder / "shared").mkdir()
        self.clouds = [
            Cloud(folder / name, database=url, shared=str(folder / "shared"), engine="none") for name in ("one", "two")
        ]
        for cloud in self.clouds:
            cloud.up()
        self.machine = folder / "machine"
        token = self.clouds[0].call("POST", "/v1/sites/local/tokens", {})[1]["token"]
        joining.join(
            self.machine,
            token,
            OutpostConfig(
                control_url=f"http://127.0.0.1:{self.clouds[0].port}", key="", node_id="", name="machine",
                address="127.0.0.1",
            ),
        )  # fmt: skip
        joining.start_outpost(self.machine)
        eventually(
            lambda: [node["state"] for node in self.clouds[1].call("GET", "/v1/nodes")[1]["items"]] == ["ready"],
            within_s=60, what="the machine is ready",
        )  # fmt: skip

    def leader(self) -> tuple[Cloud, Cloud]:
        """The control plane that leads, and the other."""
        found = self.clouds[0].call("GET", "/v1/replicas")[1]["items"]
        at = next(one["api_url"] for one in found if one["leads"])
        first, second = self.clouds
        return (first, second) if at.endswith(f":{first.port}") else (second, first)

    def journal(self, job_id: str) -> list[str]:
        found = list((self.machine / "local" / "volumes").glob(f"*/{job_id}/output/journal"))
        return found[0].read_text().splitlines() if found else []

    def close(self) -> None:
        for cloud in self.clouds:
            cloud.down()
        joining.stop_outpost(self.machine)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except NoPostgres as error:
        pytest.skip(f"no PostgreSQL can be started here: {error}")
    yield server
    server.remove()


@pytest.fixture(scope="module")
def replicas(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    made = Replicas(tmp_path_factory.mktemp("replicas"), postgres.url(postgres.database()))
    try:
        yield made
    finally:
        made.close()


def worker(name: str, *, lines: int, pause: float) -> dict[str, Any]:
    script = WORKER.format(lines=lines, pause=pause)
    return {"name": name, "run": f"python3 - <<'END'\n{script}\nEND", "resources": {"cpus": 0.05}}


def submitted(cloud: Cloud, spec: dict[str, Any], key: str, until_s: float) -> str:
    """The id of the job, as a client gets it that asks again with the same key until it is answered."""
    while time.monotonic() < until_s:
        try:
            status, body = cloud.call("POST", "/v1/workloads", {"spec": spec}, key=key)
        except OSError:
            time.sleep(0.05)
            continue
        if status == 201:
            return str(body["jobs"][0]["id"])
        assert status == 503, (status, body)
        time.sleep(0.05)
    raise AssertionError(f"{key} was not taken in time")


def answers(cloud: Cloud) -> bool:
    try:
        return bool(cloud.call("GET", "/v1/status")[0] == 200)
    except OSError:
        return False


def audit(replicas: Replicas, cloud: Cloud, jobs: list[str], *, lines: int) -> None:
    """Each job was started once and ended once, its log is whole, and it paid for what it held, once."""
    for job_id in jobs:
        job = cloud.job(job_id)
        assert (job["state"], job["attempts"]) == ("succeeded", 1), job
        assert replicas.journal(job_id) == ["start 1", "end 1"]
        assert cloud.logs(job_id) == "".join(f"line {at}\n" for at in range(lines)).encode()
    booked: Counter[str] = Counter()
    for _, meter, start, end, _, launch in cloud.books():
        if meter == "cpu" and launch:
            booked[launch.rsplit("-", 2)[0]] += end - start
    for job_id in jobs:
        held = sum(one["released_at_ns"] - one["held_at_ns"] for one in cloud.job(job_id)["workers"])
        paid = sum(amount for launch, amount in booked.items() if job_id.removeprefix("job_") in launch)
        assert paid == held, (job_id, booked)


def test_whoever_is_asked_answers(replicas: Replicas) -> None:
    leads, other = replicas.leader()
    found = other.call("GET", "/v1/replicas")[1]["items"]
    assert [one["leads"] for one in found] == [True, False]
    assert found == leads.call("GET", "/v1/replicas")[1]["items"] or len(found) == 2
    job = other.submit(worker("there", lines=3, pause=0.01), key="k")
    assert leads.submit(worker("there", lines=3, pause=0.01), key="k") == job
    assert other.wait(job)["state"] == "succeeded"
    assert other.logs(job) == leads.logs(job) == b"line 0\nline 1\nline 2\n"


def test_the_leader_is_killed_and_nothing_is_lost_or_doubled(replicas: Replicas) -> None:
    """Two fail-overs under submissions: every one that was answered is there, and everything ran once."""
    lines = 120
    until_s = time.monotonic() + 90
    jobs: dict[str, str] = {}
    stop = threading.Event()

    def submit(at: int) -> None:
        number = 0
        while not stop.is_set() and number < 12:
            key = f"{at}-{number}"
            jobs[key] = submitted(replicas.clouds[at], worker(f"w{key}", lines=lines, pause=0.05), key, until_s)
            number += 1
            stop.wait(0.4)

    submitting = [threading.Thread(target=submit, args=(at,)) for at in (0, 1)]
    for thread in submitting:
        thread.start()
    took: list[float] = []
    for _ in range(2):
        time.sleep(1.5)
        leads, other = replicas.leader()
        began = time.monotonic()
        leads.kill()
        eventually(partial(answers, other), within_s=30, what="the other one leads")
        took.append(time.monotonic() - began)
        leads.up()
    for thread in submitting:
        thread.join(timeout=60)
    stop.set()
    assert len(jobs) == 24
    cloud = replicas.clouds[0]
    for key, job in jobs.items():
        assert cloud.wait(job, within_s=60)["name"] == f"w{key}"
    audit(replicas, cloud, list(jobs.values()), lines=lines)
    assert len(set(jobs.values())) == 24
    listed = cloud.call("GET", "/v1/jobs?limit=1000")[1]["items"]
    assert {job["id"] for job in listed if job["name"].startswith("w")} == set(jobs.values()), "nothing twice"
    assert max(took) < FAIL_OVER_S, took


@pytest.mark.long
def test_a_leader_that_stood_still_is_followed_and_writes_nothing_when_it_wakes(replicas: Replicas) -> None:
    lines = 400
    leads, other = replicas.leader()
    running = leads.submit(worker("running", lines=lines, pause=0.05), key="running")
    leads.wait(running, "running")
    os.kill(leads.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        while True:
            assert time.monotonic() - began < STALLED_FAIL_OVER_S, "nobody took over"
            try:
                if other.call("GET", "/v1/replicas")[1]["items"][0]["api_url"].endswith(f":{other.port}"):
                    break
            except OSError:
                time.sleep(0.1)
        stopped = other.submit(worker("stopped", lines=lines, pause=0.05), key="stopped")
        other.wait(stopped, "running", within_s=60)
        other.call("POST", f"/v1/jobs/{stopped}/stop")
        assert other.wait(stopped, within_s=60)["state"] == "cancelled"
    finally:
        os.kill(leads.pid, signal.SIGCONT)
    eventually(lambda: answers(leads), within_s=20, what="it stands by")
    assert leads.call("GET", "/v1/replicas")[1]["items"][0]["api_url"].endswith(f":{other.port}")
    assert "Another control plane leads" in (leads.home / "control.log").read_text()
    assert leads.job(stopped)["state"] == "cancelled"
    assert leads.wait(running, within_s=60)["attempts"] == 1
    audit(replicas, leads, [running], lines=lines)
    assert replicas.journal(stopped) == ["start 1"]
