"""Backups and restorings under load, on a full disk, killed at any moment; what runs meanwhile goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_backup import COMMITS, fill, make_home, postgres
from tests.cloud import Cloud, eventually
from tests.faults.test_store_faults import PER_BATCH, environment, program, small_disk, strace
from tests.postgres import Postgres
from tidemill import bootstrap
from tidemill.cli.main import run
from tidemill.control.archive import verify_backup
from tidemill.control.restoring import finish
from tidemill.errors import StorageFull
from tidemill.runner import processes
from tidemill.runner.folders import LaunchFolder, read_json
from tidemill.store import backup
from tidemill.store.sql import SqlStore

__all__ = ["postgres", "small_disk", "strace"]

BACKUP = "import sys; from pathlib import Path; from tidemill import bootstrap; bootstrap.backup(Path(sys.argv[1]), Path(sys.argv[2]))"
RESTORE = (
    "import sys; from pathlib import Path; from tidemill import bootstrap;"
    " bootstrap.restore(Path(sys.argv[1]), Path(sys.argv[2]), is_replaced=True)"
)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "home")
    made.up()
    yield made
    made.down()


def task(command: str, **more: Any) -> dict[str, Any]:
    return {"kind": "task", "name": "witness", "run": command, "resources": {"cpus": 0.05}} | more


def journal_of(cloud: Cloud, job_id: str) -> list[str]:
    """What the job's workers wrote down themselves, whatever the control plane knows."""
    found = list((cloud.home / "local" / "volumes").glob(f"*/{job_id}/output/journal"))
    return found[0].read_text().splitlines() if found else []


WITNESS = (
    'echo "start $TIDEMILL_ATTEMPT" >> $TIDEMILL_OUTPUT_DIR/journal; '
    'until [ -e "$TIDEMILL_OUTPUT_DIR/go" ]; do sleep 0.05; done; '
    'echo "end $TIDEMILL_ATTEMPT" >> $TIDEMILL_OUTPUT_DIR/journal; echo done'
)
"""A worker that runs until it is let go, and says so in a file of its own."""


def let_go(cloud: Cloud, job_id: str) -> None:
    (next((cloud.home / "local" / "volumes").glob(f"*/{job_id}/output")) / "go").touch()


def lose(cloud: Cloud) -> None:
    """The control plane and all that it keeps are gone; what runs on the machine is not."""
    cloud.kill()
    for path in cloud.home.iterdir():
        if path.name != "local":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# Under load


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_under_load_all_that_was_acknowledged_before_is_in_it(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """The home is lost then: jobs that run are adopted, nobody's work is lost or done twice."""
    server = request.getfixturevalue("postgres") if kind == "postgresql" else None
    cloud = Cloud(tmp_path / "home", **({"database": server.url(server.database())} if server else {}))
    cloud.up()
    try:
        lose_under_load(cloud, tmp_path, server)
    finally:
        cloud.down()


def lose_under_load(cloud: Cloud, tmp_path: Path, server: Postgres | None) -> None:
    """Back up under load, lose all, restore, into another database where it is PostgreSQL, and look."""
    running = [cloud.submit(task(WITNESS, name=f"runs-{number}")) for number in range(3)]
    for job_id in running:
        cloud.wait(job_id, "running")
    acknowledged: list[str] = []
    stopping = threading.Event()

    def submit() -> None:
        while not stopping.is_set():
            acknowledged.append(cloud.submit(task("true", start_after="2099-01-01T00:00:00Z")))

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(acknowledged) > 50, within_s=20, what="load")
    before = list(acknowledged)
    made = bootstrap.backup(cloud.home, tmp_path / "b.tar.gz")
    after = len(acknowledged)
    stopping.set()
    for thread in threads:
        thread.join()
    assert after > len(before), "nothing was written while the backup was: the test shows nothing"

    epoch = made.database.epoch
    lose(cloud)
    given = {"database": server.url(server.database())} if server else {}
    began = time.monotonic()
    done = bootstrap.restore(tmp_path / "b.tar.gz", cloud.home, **given)
    cloud.settings |= given
    cloud.up()
    assert cloud.call("GET", "/v1/healthz")[0] == 200
    print(f"ready again after {time.monotonic() - began:.2f} s")
    assert done.epoch > epoch + backup.EPOCH_STRIDE // 2
    for job_id in before:
        assert cloud.job(job_id)["state"] == "queued"
    for job_id in running:
        job = cloud.job(job_id)
        assert (job["state"], job["attempts"]) == ("running", 1)
        let_go(cloud, job_id)
        job = cloud.wait(job_id)
        assert (job["state"], job["attempts"]) == ("succeeded", 1)
        assert journal_of(cloud, job_id) == ["start 1", "end 1"]
        assert cloud.logs(job_id) == b"done\n"
    assert cloud.call("GET", "/v1/strangers") == (200, {"items": [], "next_cursor": ""})


# An old backup


def test_an_old_backup_leaves_newer_launches_alone(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a job that the backup does not know: it runs to its end, is shown, and is ended by hand only."""
    bootstrap.backup(cloud.home, tmp_path / "b.tar")
    lost = [cloud.submit(task(WITNESS, name=f"newer-{number}")) for number in range(2)]
    for job_id in lost:
        cloud.wait(job_id, "running")
        eventually(lambda job_id=job_id: journal_of(cloud, job_id), within_s=10, what="it runs")  # type: ignore[misc]
    cloud.kill()
    bootstrap.restore(tmp_path / "b.tar", cloud.home, is_replaced=True)
    cloud.up()

    def strangers() -> list[dict[str, Any]]:
        return list(cloud.call("GET", "/v1/strangers")[1]["items"])

    eventually(lambda: len(strangers()) == len(lost), within_s=20, what="strangers are seen")
    found = strangers()
    assert sorted(one["job"] for one in found) == sorted(lost)
    assert {one["job_known"] for one in found} == {False}
    assert {one["state"] for one in found} == {"alive"}
    assert cloud.call("GET", "/v1/status")[1]["strangers"] == 2
    assert cloud.call("GET", f"/v1/jobs/{lost[0]}")[0] == 404
    other = cloud.wait(cloud.submit(task("echo beside")))
    assert other["state"] == "succeeded", "others are not kept waiting"
    time.sleep(4)  # two heartbeats of the strangers' runners
    assert {one["state"] for one in strangers()} == {"alive"}
    let_go(cloud, lost[0])
    eventually(lambda: journal_of(cloud, lost[0]) == ["start 1", "end 1"], within_s=10, what="it ran to its end")
    assert journal_of(cloud, lost[1]) == ["start 1"]

    assert cloud.call("POST", "/v1/strangers/run_nobody-1-0/stop", {})[0] == 404
    assert cloud.call("GET", "/v1/strangers", token="tm_user_nobody")[0] == 401
    monkeypatch.setenv("TIDEMILL_HOME", str(cloud.home))
    for words, wanted in (
        (["status"], "2 unknown here"),
        (["doctor"], "2 on the engine that the database has never heard of"),
        (["strangers", "list"], "is left alone until somebody ends it"),
    ):
        run(words)
        assert wanted in capsys.readouterr().out
    assert run(["strangers", "end"]) == 2
    assert run(["strangers", "end", "--all", "--grace", "0"]) == 0
    assert "is stopped" in capsys.readouterr().out
    eventually(lambda: not strangers(), within_s=20, what="they are gone and forgotten")
    assert journal_of(cloud, lost[1]) == ["start 1"]


def test_a_job_is_not_started_again_while_its_lost_attempt_runs(cloud: Cloud, tmp_path: Path) -> None:
    """The backup has it waiting; it ran then. The newer lease fences the old runner, and only then it starts."""
    gate = cloud.submit(task(WITNESS, name="gate"))
    cloud.wait(gate, "running")
    job_id = cloud.submit(task(WITNESS, name="later", after=["gate"]))
    assert cloud.job(job_id)["state"] == "queued"
    bootstrap.backup(cloud.home, tmp_path / "b.tar")
    let_go(cloud, gate)
    cloud.wait(gate)
    cloud.wait(job_id, "running")
    eventually(lambda: journal_of(cloud, job_id) == ["start 1"], within_s=10, what="it runs")
    cloud.kill()
    first = LaunchFolder(cloud.home / "local" / "launches" / f"run_{job_id.removeprefix('job_')}-1-0")
    runner = int((read_json(first.runner) or {})["pid"])
    os.kill(runner, signal.SIGSTOP)  # it hears nothing of a newer lease
    try:
        bootstrap.restore(tmp_path / "b.tar", cloud.home, is_replaced=True)
        cloud.up()
        cloud.wait(gate)  # its end is told again, to a control plane that knows only that it runs
        cloud.wait(job_id, "starting")
        time.sleep(3)  # looks at the engine, each of which has the launch asked for again
        assert cloud.job(job_id)["state"] == "starting"
        assert journal_of(cloud, job_id) == ["start 1"], "two of one job run at a time"
    finally:
        os.kill(runner, signal.SIGCONT)
    eventually(lambda: len(journal_of(cloud, job_id)) > 1, within_s=30, what="it was started again")
    one, two = journal_of(cloud, job_id)[:2]
    assert one == "start 1"
    number = int(two.removeprefix("start "))
    assert number > backup.FENCE_STRIDE
    assert not any(line.startswith("end 1") for line in journal_of(cloud, job_id))
    assert not processes.is_locked(first.lock), "two of one job ran at a time"
    let_go(cloud, job_id)
    job = cloud.wait(job_id)
    assert (job["state"], job["attempts"]) == ("succeeded", 1)
    assert journal_of(cloud, job_id)[-1] == f"end {number}"


# PostgreSQL: the database and the home are two, and change together

PG_RESTORE = """
import os, sys
from pathlib import Path
from tidemill import bootstrap
from tidemill.control import restoring
load, when = restoring.load, sys.argv[4]
def killed(*arguments, **options):
    if when == "before":
        os._exit(9)
    epoch = load(*arguments, **options)
    os._exit(9)
restoring.load = killed
bootstrap.restore(Path(sys.argv[1]), Path(sys.argv[2]), database=sys.argv[3], is_replaced=True)
"""


@pytest.mark.postgres
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_a_restoring_into_postgresql_killed_around_its_commit(
    postgres: Postgres, tmp_path: Path, when: str, is_empty: bool
) -> None:
    url = postgres.url(postgres.database())
    make_home(tmp_path / "source")
    bootstrap.backup(tmp_path / "source", tmp_path / "b.tar")
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.yaml").write_text("pue: 3\n")
    if not is_empty:
        fill(url)
    done = subprocess.run(
        program(PG_RESTORE, tmp_path / "b.tar", home, url, when), env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 9, done.stderr
    with bootstrap.locked(home):
        assert finish(home) == (when == "after")
    assert (home / "secret.key").exists() == (when == "after")
    assert not (home / "restoring").exists()
    store = SqlStore(url)
    if when == "after" or not is_empty:
        assert store.integrity() == ()
        assert (store.load().jobs[0].fence_base > 0) == (when == "after")
    store.close()


# No space


def test_a_full_disk_leaves_no_backup_and_says_so(small_disk: Path, tmp_path: Path) -> None:
    home = tmp_path / "old"
    make_home(home)
    for size in (8_388_608 - 4_096, 8_388_608 - 65_536, 8_388_608 - 200_000):
        (small_disk / "ballast").write_bytes(bytes(size))
        with pytest.raises(StorageFull):
            bootstrap.backup(home, small_disk / "b.tar")
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    bootstrap.backup(home, small_disk / "b.tar")


def test_a_full_disk_while_restoring_leaves_the_old_home(small_disk: Path, tmp_path: Path) -> None:
    home = tmp_path / "old"
    make_home(home)
    bootstrap.backup(home, tmp_path / "b.tar")
    new = small_disk / "home"
    new.mkdir()
    (new / "config.yaml").write_text("pue: 3\n")
    for size in (8_388_608 - 8_192, 8_388_608 - 100_000, 8_388_608 - 400_000):
        (small_disk / "ballast").write_bytes(bytes(size - 8_192))
        with pytest.raises(StorageFull):
            bootstrap.restore(tmp_path / "b.tar", new, is_replaced=True)
        assert sorted(path.name for path in new.iterdir()) == ["config.yaml", "control.lock"]
        assert (new / "config.yaml").read_text() == "pue: 3\n"
    (small_disk / "ballast").unlink()
    bootstrap.restore(tmp_path / "b.tar", new, is_replaced=True)
    assert (new / "config.yaml").read_text() == "pue: 1.25\n"


# Killed


def killed_at(strace: str, system_call: str, number: int, command: list[str]) -> bool:
    """Whether the program was killed at that call of it and its children."""
    inject = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={system_call}", "-e"]
    done = subprocess.run(
        [strace, *inject, f"inject={system_call}:signal=SIGKILL:when={number}", *command],
        capture_output=True, env=environment(), check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize(
    ("system_call", "numbers"), [("fsync", (1,)), ("rename", (1,)), ("fdatasync", (1, 2)), ("write", (20, 50, 90))]
)
def test_a_backup_killed_anywhere_is_whole_or_not_there(
    tmp_path: Path, strace: str, system_call: str, numbers: tuple[int, ...]
) -> None:
    home = tmp_path / "old"
    make_home(home)
    killed = 0
    for number in numbers:
        path = tmp_path / f"{number}.tar"
        killed += killed_at(strace, system_call, number, program(BACKUP, home, path))
        if path.exists():
            assert verify_backup(path).database.last_seq == COMMITS * PER_BATCH
    bootstrap.backup(home, tmp_path / "next.tar")
    left = [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]
    assert left == [], "what a killed one left goes with the next"
    assert killed


@pytest.mark.long
def test_a_restoring_killed_at_any_step_is_the_old_home_or_the_new(tmp_path: Path, strace: str) -> None:
    """At each rename, and at every third fsync: the next restoring, or the next start, goes on where it was killed or begins again."""
    source = tmp_path / "source"
    make_home(source)
    bootstrap.backup(source, tmp_path / "b.tar")
    outcomes = {"old": 0, "new": 0, "finished": 0}
    for system_call, every in (("rename", 1), ("fsync", 3)):
        for number in range(1, 60, every):
            home = tmp_path / f"{system_call}{number}"
            make_home(home)
            (home / "config.yaml").write_text("pue: 3\n")
            (home / "local").mkdir()
            if not killed_at(strace, system_call, number, program(RESTORE, tmp_path / "b.tar", home)):
                break
            is_decided = (home / "restoring" / "ready.json").exists()
            with bootstrap.locked(home):
                finished = finish(home)
            assert finished == is_decided
            outcomes["finished"] += finished
            check_one_or_the_other(home, outcomes)
            shutil.rmtree(home)
        else:
            raise AssertionError("it was killed at each of 60 calls: it never ends")
    assert outcomes["old"] > 10
    assert outcomes["finished"] > 5


def check_one_or_the_other(home: Path, outcomes: dict[str, int]) -> None:
    """The old home whole, with nothing aside; or the new one whole, with the old one whole aside."""
    assert not (home / "restoring").exists()
    assert (home / "local").is_dir()
    store = SqlStore(f"sqlite:///{home / 'control.db'}")
    assert store.integrity() == ()
    is_new = store.load().jobs[0].fence_base > 0
    store.close()
    outcomes["new" if is_new else "old"] += 1
    assert (home / "config.yaml").read_text() == ("pue: 1.25\n" if is_new else "pue: 3\n")
    aside = list(home.parent.glob(f"{home.name}.replaced-*"))
    assert len(aside) == is_new
    for folder in (home, *aside):
        assert {"secret.key", "admin.token", "config.yaml", "blobs", "logs"} <= {one.name for one in folder.iterdir()}
        assert len(list(folder.glob("blobs/sha256/*/*"))) == 1
    for folder in aside:
        assert (folder / "config.yaml").read_text() == "pue: 3\n"
        shutil.rmtree(folder)


def test_a_start_finishes_what_a_killed_restoring_decided(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_home(source)
    bootstrap.backup(source, tmp_path / "b.tar")
    bootstrap.restore(tmp_path / "b.tar", tmp_path / "made")
    home = tmp_path / "home"
    stage = home / "restoring" / "new"
    stage.mkdir(parents=True)
    for path in (tmp_path / "made").iterdir():
        if path.name != "control.lock":
            path.rename(stage / path.name)
    (stage.parent / "ready.json").write_text(json.dumps({"aside": "", "old": [], "database": "", "epoch": 0}))
    cloud = Cloud(home)
    cloud.up()
    try:
        assert not (home / "restoring").exists()
        status = subprocess.run(
            program("import sys; from tidemill.cli.main import run; sys.exit(run(['doctor']))"),
            env=environment() | {"TIDEMILL_HOME": str(home)}, capture_output=True, check=False,
        )  # fmt: skip
        assert b"cloud" in status.stdout
        assert (home / "endpoint.json").exists()
    finally:
        bootstrap.stop_daemon(home, stop_jobs=False)
