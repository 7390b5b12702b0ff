"""kill -9 of the control plane at every step of a launch: jobs run on, are adopted, logged, billed once.

The truth is kept outside the control plane: each worker appends to a journal, synced to disk, when it starts and when
it ends. An auditor then holds the journal, the database and the API's answers against each other.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, eventually

LINES = 40
WORKER = """
import os, sys, time
journal = os.open({journal!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(what):
    os.write(journal, f"{{what}} {{os.environ['TIDEMILL_JOB_ID']}} {{os.environ['TIDEMILL_ATTEMPT']}} {{os.environ['RANK']}}\\n".encode())
    os.fsync(journal)
note("start")
for number in range({lines}):
    print(f"line {{number}} of rank {{os.environ['RANK']}}", flush=True)
    time.sleep({pause})
note("end")
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "home")
    made.up()
    yield made
    made.down()


def worker(folder: Path, **values: Any) -> dict[str, Any]:
    """The spec of a worker that journals and prints numbered lines. The journal lies where sandboxes can write."""
    journal = folder / "journal"
    journal.touch()
    script = WORKER.format(journal="/proc/self/cwd/../journal", lines=LINES, pause=0.01).replace(
        repr("/proc/self/cwd/../journal"), 'os.environ["TIDEMILL_OUTPUT_DIR"] + "/journal"'
    )
    return {
        "kind": "task",
        "name": "witness",
        "run": f"python3 - <<'END'\n{script}\nEND",
        "resources": {"cpus": 0.5},
    } | values


def journal_of(cloud: Cloud, job: dict[str, Any]) -> list[str]:
    """What the job's workers wrote down themselves."""
    found = list((cloud.home / "local" / "volumes").glob(f"*/{job['id']}/output/journal"))
    return found[0].read_text().splitlines() if found else []


def expected_log(rank: int = 0) -> bytes:
    return "".join(f"line {number} of rank {rank}\n" for number in range(LINES)).encode()


def audit(cloud: Cloud, job: dict[str, Any], *, workers: int = 1, was_away: bool = False) -> None:
    """One start and one end of each worker, a log without gap or repeat, and books that tile time."""
    assert job["state"] == "succeeded", job
    assert job["attempts"] == 1, "it was started again though nothing happened to it"
    journal = journal_of(cloud, job)
    for rank in range(workers):
        assert journal.count(f"start {job['id']} 1 {rank}") == 1, journal
        assert journal.count(f"end {job['id']} 1 {rank}") == 1, journal
        assert cloud.logs(job["id"], rank) == expected_log(rank)
    audit_books(cloud, job["id"], workers=workers, was_away=was_away)
    assert cloud.integrity() == "ok"


def audit_books(cloud: Cloud, job_id: str, *, workers: int, was_away: bool) -> None:
    """No stretch of a meter is booked twice or left out, and the job paid for exactly what it held.

    Only a machine that left, when the cloud was shut down in order, may have a stretch without any booking.
    """
    lines = cloud.books()
    by_meter: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
    for node, meter, start, end, milli, launch in lines:
        by_meter.setdefault((node, meter), []).append((start, end, milli, launch))
    job = cloud.job(job_id)
    assert len(job["workers"]) == workers
    for (_, meter), stretches in by_meter.items():
        instants = sorted({instant for start, end, _, _ in stretches for instant in (start, end)})
        totals = {sum(milli for start, end, milli, _ in stretches if start <= at < end) for at in instants[:-1]}
        assert len(totals - ({0} if was_away else set())) == 1, (
            f"{meter}: between {instants[0]} and {instants[-1]} the books show {totals} milli"
        )
    mine = f"run_{job_id.partition('_')[2]}-"
    booked = sum(end - start for _, meter, start, end, _, one in lines if meter == "cpu" and one.startswith(mine))
    held = sum(one["released_at_ns"] - one["held_at_ns"] for one in job["workers"])
    assert booked == held


def submit_surely(cloud: Cloud, spec: dict[str, Any], key: str) -> str | None:
    """The job's id, or None when the answer was lost."""
    try:
        return cloud.submit(spec, key=key)
    except (OSError, http.client.HTTPException):
        return None


def test_without_faults_the_auditor_is_content(cloud: Cloud, tmp_path: Path) -> None:
    job = cloud.wait(cloud.submit(worker(tmp_path, nodes=2)))
    audit(cloud, job, workers=2)


def when_long(*values: int) -> list[Any]:
    """Parameters of which only ``make test-long`` and ``make faults`` take the time to try all."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


@pytest.mark.parametrize("delay_ms", [0, 60, *when_long(5, 15, 30, 150, 450)])
def test_killed_some_time_after_the_submission_was_acknowledged(tmp_path: Path, delay_ms: int) -> None:
    cloud = Cloud(tmp_path / "home")
    cloud.up()
    try:
        job_id = cloud.submit(worker(tmp_path))
        time.sleep(delay_ms / 1000)
        cloud.kill()
        cloud.up()
        audit(cloud, cloud.wait(job_id))
    finally:
        cloud.down()


@pytest.mark.long
def test_killed_again_and_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "home")
    cloud.up()
    try:
        job_id = cloud.submit(worker(tmp_path, nodes=2))
        for _ in range(4):
            cloud.kill()
            cloud.up()
        audit(cloud, cloud.wait(job_id), workers=2)
    finally:
        cloud.down()


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int synced, target, before, armed = -1;
static void arm(void) {
    char line[4096]; int file = open("/proc/self/cmdline", O_RDONLY); ssize_t size = read(file, line, sizeof line - 1);
    close(file); for (ssize_t i = 0; i < size; i++) if (!line[i]) line[i] = ' ';
    line[size > 0 ? size : 0] = 0;
    armed = strstr(line, "tidemill.bootstrap") != NULL && getenv("KILL_AT_SYNC") != NULL;
    if (armed) { target = abs(atoi(getenv("KILL_AT_SYNC"))); before = atoi(getenv("KILL_AT_SYNC")) < 0; }
}
int fdatasync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    if (armed < 0) arm();
    int now = armed && __sync_add_and_fetch(&synced, 1) == target;
    if (now && before) kill(getpid(), SIGKILL);
    int status = real(file);
    if (now) kill(getpid(), SIGKILL);
    return status;
}
"""
"""Kills the control plane, and nothing that it started, just before (negative) or after its nth sync to disk."""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the fault shim with (apt install gcc)")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(folder / "shim.so"), str(folder / "shim.c"), "-ldl"], check=True
    )
    return folder / "shim.so"


@pytest.mark.parametrize("nth", [-4, 3, *when_long(-6, -5, -3, -2, 2, 4, 5, 6)])
def test_killed_at_each_sync_to_disk(tmp_path: Path, shim: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Before and after each sync of the database, from becoming the leader to the end of the job."""
    cloud = Cloud(tmp_path / "home")
    cloud.up()
    cloud.down()
    spec, key = worker(tmp_path), f"key-{nth}"
    with monkeypatch.context() as patched:
        patched.setenv("LD_PRELOAD", str(shim))
        patched.setenv("KILL_AT_SYNC", str(nth))
        cloud.up()
    try:
        submit_surely(cloud, spec, key)
        assert cloud.process is not None
        assert cloud.process.wait(timeout=10) == -signal.SIGKILL, "the control plane was to die at that sync"
        cloud.up()
        job_id = cloud.submit(spec, key=key)
        status, body = cloud.call("GET", "/v1/jobs?name=witness")
        assert status == 200
        assert [one["id"] for one in body["items"]] == [job_id], "the key was honoured by one job only"
        audit(cloud, cloud.wait(job_id), was_away=True)
    finally:
        cloud.down()


def test_many_submissions_with_one_key_are_one_job(cloud: Cloud) -> None:
    spec = {"kind": "task", "name": "once", "run": "echo once", "resources": {"cpus": 0.5}}
    with ThreadPoolExecutor(48) as pool:
        answers = list(
            pool.map(lambda _: cloud.call("POST", "/v1/workloads", {"spec": spec}, key="one-key"), range(96))
        )
    assert {status for status, _ in answers} == {201}
    assert len({body["jobs"][0]["id"] for _, body in answers}) == 1
    other, body = cloud.call("POST", "/v1/workloads", {"spec": spec | {"run": "echo twice"}}, key="one-key")
    assert (other, body["code"]) == (422, "idempotency_mismatch")
    assert len(cloud.call("GET", "/v1/jobs?name=once")[1]["items"]) == 1


def test_a_killed_worker_ends_the_gang_which_is_retried(cloud: Cloud, tmp_path: Path) -> None:
    spec = worker(tmp_path, nodes=2, retry={"on": ["error"], "max": 1}, run="sleep 2; echo done", name="victim")
    job_id = cloud.submit(spec)
    cloud.wait(job_id, "running")
    began = time.monotonic()
    os.kill(a_process_of(job_id, 1, "sleep"), signal.SIGKILL)
    eventually(lambda: cloud.job(job_id)["attempts"] == 2, within_s=5, what="a second attempt")
    assert time.monotonic() - began < 5
    job = cloud.wait(job_id)
    assert (job["state"], job["retries"]) == ("succeeded", 1)


def test_a_killed_runner_is_seen_and_retried_as_a_lost_node(cloud: Cloud) -> None:
    job_id = cloud.submit(
        {"kind": "task", "name": "lost", "run": "sleep 3; echo done", "nodes": 2, "resources": {"cpus": 0.5}}
    )
    cloud.wait(job_id, "running")
    began = time.monotonic()
    os.kill(a_runner_of(cloud, job_id, 0), signal.SIGKILL)
    eventually(lambda: cloud.job(job_id)["attempts"] == 2, within_s=6, what="a second attempt")
    assert time.monotonic() - began < 6
    first = cloud.job(job_id)["attempt_list"][0]
    assert first["cause"] == "node_lost"
    assert not processes_of(f"{job_id.removeprefix('job_')}-1-"), "a process of the first attempt is left"
    assert cloud.wait(job_id)["state"] == "succeeded"


def test_a_killed_runner_fails_the_job_that_does_not_want_a_retry(cloud: Cloud) -> None:
    job_id = cloud.submit({"kind": "task", "name": "lost", "run": "sleep 30", "retry": {"max": 0}})
    cloud.wait(job_id, "running")
    os.kill(a_runner_of(cloud, job_id, 0), signal.SIGKILL)
    job = cloud.wait(job_id, within_s=6)
    assert (job["state"], job["cause"]) == ("failed", "node_lost")


def test_everything_killed_at_once_as_by_a_reboot(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "home")
    cloud.up()
    try:
        again = cloud.submit(
            {
                "kind": "task",
                "name": "again",
                "run": "sleep 1; echo attempt $TIDEMILL_ATTEMPT",
                "resources": {"cpus": 0.4},
            }
        )
        never = cloud.submit(
            {"kind": "task", "name": "never", "run": "sleep 60", "retry": {"max": 0}, "resources": {"cpus": 0.4}}
        )
        for job in (again, never):
            cloud.wait(job, "running")
        waiting = cloud.submit(
            {"kind": "task", "name": "waiting", "run": "echo ran", "resources": {"cpus": os.cpu_count() or 1}}
        )
        victims = [a_runner_of(cloud, again, 0), a_runner_of(cloud, never, 0)]
        cloud.kill()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        cloud.up()
        assert cloud.wait(never)["cause"] == "node_lost"
        job = cloud.wait(again)
        assert (job["state"], job["attempts"]) == ("succeeded", 2)
        assert cloud.logs(again, attempt=2) == b"attempt 2\n"
        assert cloud.wait(waiting)["state"] == "succeeded"
    finally:
        cloud.down()


def test_a_stop_is_not_forgotten_by_a_crash(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "home")
    cloud.up()
    try:
        job_id = cloud.submit(
            {
                "kind": "task",
                "name": "stubborn",
                "run": "trap '' TERM; sleep 60 & wait; sleep 60",
                "checkpoint": {"grace": "1s"},
            }
        )
        cloud.wait(job_id, "running")
        status, _ = cloud.call("POST", f"/v1/jobs/{job_id}/stop")
        assert status == 202
        cloud.kill()
        cloud.up()
        assert cloud.wait(job_id, within_s=20)["state"] == "cancelled"
        eventually(lambda: not processes_of(job_id.removeprefix("job_")), within_s=15, what="no process left")
    finally:
        cloud.down()


def processes_of(marker: str) -> list[int]:
    """Processes whose environment carries a launch id with ``marker`` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"TIDEMILL_LAUNCH_ID=run_" + marker.encode() in environment:
                found.append(int(entry.name))
    return found


def a_process_of(job_id: str, rank: int, name: str) -> int:
    """A process of that worker with that command name."""

    def look() -> int | None:
        for pid in processes_of(f"{job_id.removeprefix('job_')}-1-{rank}"):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return pid
        return None

    return int(eventually(look, within_s=5, what=f"a process {name} of rank {rank}"))


def a_runner_of(cloud: Cloud, job_id: str, rank: int) -> int:
    """The runner of that worker's first attempt, by the engine's own list."""
    launch = f"run_{job_id.removeprefix('job_')}-1-{rank}"
    for name in ("runner.json", "started.json", "pid"):
        path = cloud.home / "local" / "launches" / launch / name
        if path.exists():
            content = path.read_text()
            return int(json.loads(content)["pid"] if content.startswith("{") else content.split()[0])
    raise AssertionError(f"no runner of {launch} is noted")
