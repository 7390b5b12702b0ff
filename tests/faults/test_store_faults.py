"""Faults under the store: the process killed at any moment, the disk full, the database locked by somebody else.

What was acknowledged stays, nothing is there by half, and when the fault is over everything goes on.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidemill.errors import StorageFull, TidemillError, Unavailable
from tidemill.model.job import JobState
from tidemill.model.plan import Change
from tidemill.model.values import replace
from tidemill.ports import Batch, JobFilter
from tidemill.store.sql import SqlStore
from tidemill.testing.samples import a_job, a_line, a_note, a_workload, moved, new

SRC = str(Path(__file__).parents[2] / "src")
PER_BATCH = 3

WRITER = """
import os, sys
from tests.faults.test_store_faults import batch
from tidemill.store.sql import SqlStore
store = SqlStore("sqlite:///" + sys.argv[1])
store.migrate()
epoch = store.lead(holder="writer")
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    seq = store.commit(batch(epoch, number))
    os.write(1, b"%d\\n" % number)
"""

MIGRATOR = """
import sys
from tidemill.store.sql import SqlStore
SqlStore("sqlite:///" + sys.argv[1]).migrate()
"""


def batch(epoch: int, number: int) -> Batch:
    """Commit ``number``: workloads with jobs, events, a ledger line; the jobs of the commit before change."""
    workloads = [a_workload(number * PER_BATCH + index) for index in range(PER_BATCH)]
    jobs = [a_job(workload) for workload in workloads]
    changes: list[Change] = [*new(*workloads, *jobs)]
    if number:
        before = [a_job(a_workload((number - 1) * PER_BATCH + index)) for index in range(PER_BATCH)]
        changes += [moved(job, JobState.STARTING) for job in before]
    return Batch(
        epoch=epoch,
        changes=changes,
        log=[a_note(job, f"Commit{number}") for job in jobs],
        ledger=[a_line(number, number + 1, job=jobs[0])],
    )


def program(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", text, *(str(argument) for argument in arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([SRC, str(Path(SRC).parent)])}


def check_whole(path: Path, acknowledged: int) -> int:
    """How many commits are stored: all that were acknowledged, at most one more, and each of them whole."""
    store = SqlStore(f"sqlite:///{path}")
    try:
        assert store.integrity() == ()
        found = store.load()
        commits, rest = divmod(found.last_seq, PER_BATCH)
        assert rest == 0, "half of a batch's events"
        assert acknowledged <= commits <= acknowledged + 1
        assert len(found.workloads) == len(found.jobs) == commits * PER_BATCH
        assert sum(job.version == 2 for job in found.jobs) == max(commits - 1, 0) * PER_BATCH
        assert store.ledger_totals().lines == commits
        assert [until for *_, until in found.metered_until] == ([commits] if commits else [])
        events = store.events(limit=10_000)
        assert [event.entry.type for event in events] == [
            f"Commit{n}" for n in range(commits) for _ in range(PER_BATCH)
        ]
        return commits
    finally:
        store.close()


# Killed


def test_a_writer_killed_after_any_commit_loses_nothing(tmp_path: Path) -> None:
    """One database, whose writer is killed again and again, each time somewhere in its next commits."""
    path = tmp_path / "control.db"
    commits = 0
    for kill_after in (1, 2, 5, 9, 23, 47):
        command = program(WRITER, path, commits, commits + 1_000)
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(kill_after)]
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.readlines()
        acknowledged = int([line for line in said if line.endswith(b"\n")][-1]) + 1
        commits = check_whole(path, acknowledged)
    assert commits >= 80


@pytest.fixture(scope="session")
def strace() -> str:
    """A way to kill a program at a system call."""
    found = shutil.which("strace")
    if (
        found is None
        or subprocess.run([found, "-e", "trace=none", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("strace is not here, or not allowed to trace")
    return found


def run_killed(strace: str, at: str, number: int, command: list[str]) -> subprocess.CompletedProcess[bytes]:
    inject = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={at}", "-e", f"inject={at}:signal=SIGKILL:when={number}"]
    return subprocess.run([strace, *inject, *command], capture_output=True, env=environment(), check=False, timeout=60)


@pytest.mark.parametrize("system_call", ["fdatasync", "pwrite64"])
def test_a_writer_killed_at_any_write_loses_nothing(tmp_path: Path, strace: str, system_call: str) -> None:
    """At each flush to the disk, and at writes in between, which are many more: there at every 14th."""
    fresh = tmp_path / "fresh.db"
    subprocess.run(program(WRITER, fresh, 0, 0), env=environment(), check=True)
    indexes = range(1, 9) if system_call == "fdatasync" else range(1, 100, 14)
    killed = 0
    for number in indexes:
        path = tmp_path / f"{number}.db"
        shutil.copy(fresh, path)
        done = run_killed(strace, system_call, number, program(WRITER, path, 0, 5))
        said = done.stdout.splitlines()
        killed += len(said) < 5
        check_whole(path, len(said))
        assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    assert killed >= 4, "the writer was hardly ever killed: the test shows nothing"


def test_a_migration_killed_at_any_write_is_done_or_not_begun(tmp_path: Path, strace: str) -> None:
    killed = 0
    for number in (1, 2, 3, 5, 8, 20, 40):
        path = tmp_path / f"{number}.db"
        killed += run_killed(strace, "pwrite64", number, program(MIGRATOR, path)).returncode != 0
        with sqlite3.connect(path) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert len(tables) in (0, 18), f"a part of the schema: {tables}"
        store = SqlStore(f"sqlite:///{path}")
        store.migrate()
        assert store.integrity() == ()
        assert store.commit(batch(store.lead(holder="test"), 0)) == PER_BATCH
        store.close()
    assert killed >= 4


# Full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    if os.geteuid() != 0 or mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only; the limit of the database's pages is tested")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(store: SqlStore, epoch: int, *, at_most: int = 5_000) -> int:
    """How many commits fit. Raises: AssertionError when it never gets full."""
    for number in range(at_most):
        try:
            store.commit(batch(epoch, number))
        except StorageFull:
            return number
    raise AssertionError("the disk was never full")


def test_a_full_disk_is_said_and_nothing_is_lost(small_disk: Path) -> None:
    path = small_disk / "control.db"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4_000_000))
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    epoch = store.lead(holder="test")
    fitted = fill(store, epoch)
    assert fitted > 0
    for _ in range(3):
        with pytest.raises(StorageFull):
            store.commit(replace(batch(epoch, fitted), log=[a_note()] * 1_500))
    assert store.load().last_seq == fitted * PER_BATCH
    assert len(store.find_jobs(JobFilter(), limit=10).items) == 10
    ballast.unlink()
    for number in range(fitted, fitted + 20):
        store.commit(batch(epoch, number))
    store.close()
    assert check_whole(path, fitted + 20) == fitted + 20


def test_a_full_disk_while_migrating_leaves_nothing_by_half(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8_388_608 - 8_192))
    store = SqlStore(f"sqlite:///{small_disk / 'control.db'}")
    with pytest.raises(StorageFull):
        store.migrate()
    ballast.unlink()
    store.migrate()
    assert store.commit(batch(store.lead(holder="test"), 0)) == PER_BATCH
    assert store.integrity() == ()
    store.close()


def test_a_database_at_its_limit_says_that_it_is_full(tmp_path: Path) -> None:
    """As a full disk, where none can be mounted: SQLite's own limit of pages gives the same error."""
    path = tmp_path / "control.db"
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    epoch = store.lead(holder="test")
    with store._database.writer.connect() as connection:
        raw = connection.connection.dbapi_connection
        assert isinstance(raw, sqlite3.Connection)
    raw.execute("PRAGMA max_page_count = 150")
    fitted = fill(store, epoch)
    assert fitted > 0
    assert store.load().last_seq == fitted * PER_BATCH
    raw.execute("PRAGMA max_page_count = 1000000")
    store.commit(batch(epoch, fitted))
    store.close()
    assert check_whole(path, fitted + 1) == fitted + 1


def test_a_disk_that_fails_is_unavailable_and_nothing_is_by_half(tmp_path: Path, strace: str) -> None:
    """The disk refuses one flush: that commit fails, or is stored whole; the next ones go on."""
    fresh = tmp_path / "fresh.db"
    subprocess.run(program(WRITER, fresh, 0, 0), env=environment(), check=True)
    failed = 0
    for number in range(1, 7):
        path = tmp_path / f"{number}.db"
        shutil.copy(fresh, path)
        inject = [
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=fdatasync",
            "-e",
            f"inject=fdatasync:error=EIO:when={number}",
        ]
        done = subprocess.run(
            [strace, *inject, *program(WRITER, path, 0, 5)],
            capture_output=True,
            env=environment(),
            check=False,
            timeout=60,
        )
        if done.returncode:
            failed += 1
            assert b"Unavailable: The database does not answer: disk I/O error." in done.stderr
        check_whole(path, len(done.stdout.splitlines()))
    assert failed >= 3


# Locked


def lock(path: Path) -> sqlite3.Connection:
    """What another process would hold while it writes."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    return other


def test_a_lock_that_is_let_go_in_time_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    store = SqlStore(f"sqlite:///{path}", patience_s=20)
    store.migrate()
    epoch = store.lead(holder="test")
    other = lock(path)
    timer = threading.Timer(0.5, other.rollback)
    timer.start()
    assert store.load().last_seq == 0, "readers do not wait for writers"
    store.commit(batch(epoch, 0))
    timer.join()
    other.close()
    store.close()
    assert check_whole(path, 1) == 1


def test_a_lock_that_is_kept_is_unavailable_and_nothing_is_done(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    store = SqlStore(f"sqlite:///{path}", patience_s=0.2)
    store.migrate()
    epoch = store.lead(holder="test")
    store.commit(batch(epoch, 0))
    other = lock(path)
    with pytest.raises(Unavailable):
        store.commit(batch(epoch, 1))
    with pytest.raises(Unavailable):
        store.lead(holder="another")
    assert store.load().last_seq == PER_BATCH
    other.rollback()
    other.close()
    store.commit(batch(epoch, 1))
    store.close()
    assert check_whole(path, 2) == 2


def test_writers_that_queue_too_long_are_told(tmp_path: Path) -> None:
    """Threads of one process wait for each other no longer than for another process."""
    path = tmp_path / "control.db"
    store = SqlStore(f"sqlite:///{path}", patience_s=0.2)
    store.migrate()
    epoch = store.lead(holder="test")
    other = lock(path)
    failures: list[str] = []

    def commit(number: int) -> None:
        try:
            store.commit(batch(epoch, number))
        except TidemillError as error:
            failures.append(type(error).__name__)

    threads = [threading.Thread(target=commit, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    other.rollback()
    other.close()
    assert failures == ["Unavailable"] * 4
    store.commit(batch(epoch, 0))
    store.close()
    assert check_whole(path, 1) == 1


def test_damage_is_said(tmp_path: Path) -> None:
    """A file that is not whole any more is named as such by ``integrity``."""
    path = tmp_path / "control.db"
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    epoch = store.lead(holder="test")
    for number in range(60):
        store.commit(batch(epoch, number))
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("DELETE FROM workloads WHERE id = (SELECT max(id) FROM workloads)")
        connection.execute("DELETE FROM events WHERE seq = 7")
    store = SqlStore(f"sqlite:///{path}")
    assert store.integrity() == ("1 jobs belong to no workload.", "The event log has 179 events from 1 to 180.")
    store.close()
    with path.open("r+b") as file:
        file.seek(4096 * 20)
        file.write(b"\xff" * 4096 * 5)
    store = SqlStore(f"sqlite:///{path}")
    assert any("SQLite" in line or "cannot be read" in line for line in store.integrity())
    store.close()
