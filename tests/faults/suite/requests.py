"""Cases 15, 18, 19, 20: what clients see when requests repeat, and when the database or the disk fails."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tests.cloud import eventually
from tests.faults.suite.bed import Bed, Beds, environment
from tests.faults.suite.killing import built
from tests.faults.suite.registry import Skipped, case
from tests.postgres import Postgres

BACK_S = 5.0
FULL_AWAY_S = 300.0


def ask(
    bed: Bed,
    method: str,
    path: str,
    body: Any = None,
    *,
    key: str = "",
    token: str | None = None,
    timeout_s: float = 30,
    port: int = 0,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, and body. Raises: OSError, HTTPException without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port or bed.cloud.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {bed.cloud.token if token is None else token}"}
    headers |= {"Idempotency-Key": key} if key else {}
    headers |= {"Content-Type": "application/json"} if body is not None else {}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        content = answer.read()
        told = {name.lower(): value for name, value in answer.getheaders()}
        found = json.loads(content) if content.startswith((b"{", b"[")) else content
        bed.record.heard(method, path, body, answer.status, found)
        return answer.status, told, found
    finally:
        connection.close()


@case(
    15,
    "100 submissions at once with one Idempotency-Key, half of them given up and repeated",
    "1 job, identical answers; another body: 422",
)
def one_key(beds: Beds) -> str:
    bed = beds.make()
    spec = bed.witness("once", lines=2)

    def submit(number: int) -> str:
        if number % 2:
            with contextlib.suppress(OSError, http.client.HTTPException):
                ask(bed, "POST", "/v1/workloads", {"spec": spec}, key="key", timeout_s=0.002)
        status, _, body = ask(bed, "POST", "/v1/workloads", {"spec": spec}, key="key")
        assert status == 201, body
        return json.dumps(body["jobs"][0]["id"]) + body["id"]

    with ThreadPoolExecutor(100) as pool:
        answers = set(pool.map(submit, range(100)))
    assert len(answers) == 1, answers
    listed = bed.cloud.call("GET", "/v1/jobs?name=once")[1]["items"]
    assert len(listed) == 1
    status, _, body = ask(bed, "POST", "/v1/workloads", {"spec": bed.witness("twice")}, key="key")
    assert (status, body["code"]) == (422, "idempotency_mismatch"), body
    bed.finish(listed[0]["id"])
    bed.audit()
    return "100 answers, 1 job; another body: 422"


class Load:
    """Questions and, a quarter of them, submissions, up to ``rate`` a second together, and what was answered.

    Meanwhile somebody asks the model ``model`` through the gateway.
    """

    def __init__(self, bed: Bed, rate: int, *, model: str, threads: int = 16) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.served: Counter[int | str] = Counter()
        """What the gateway answered."""
        self.without_hint = 0
        self._bed = bed
        self._model = model
        self._pause_s = threads / rate
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(at,)) for at in range(threads)]
        self._threads.append(threading.Thread(target=self._infer))
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> float:
        """How many answers a second there were."""
        took = time.monotonic() - self._began
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.statuses.total() / took

    def _run(self, at: int) -> None:
        number = 0
        while not self._stop.wait(self._pause_s):
            number += 1
            name = f"load-{at}-{number}"
            try:
                if number % 9 == 8:
                    status, headers, _ = ask(self._bed, "PUT", f"/v1/secrets/L_{at}_{number}", {"value": name})
                elif at % 4:
                    status, headers, _ = ask(self._bed, "GET", "/v1/jobs?limit=5")
                else:
                    spec = {"name": name, "run": "true", "resources": {"cpus": 0.01}}
                    status, headers, _ = ask(self._bed, "POST", "/v1/workloads", {"spec": spec}, key=name)
            except (OSError, http.client.HTTPException) as error:
                self.statuses[type(error).__name__] += 1
                continue
            self.statuses[status] += 1
            self.without_hint += status == 503 and "retry-after" not in headers

    def _infer(self) -> None:
        while not self._stop.wait(0.1):
            body = {"model": self._model, "stream": True, "prompt": "x"}
            try:
                status, _, told = ask(
                    self._bed, "POST", "/v1/completions", body, port=self._bed.cloud.gateway_port
                )  # fmt: skip
            except (OSError, http.client.HTTPException) as error:
                self.served[type(error).__name__] += 1
                continue
            self.served[status if b"[DONE]" in told else "broken"] += 1


def _shown(statuses: Counter[int | str]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items(), key=str))


def _back(bed: Bed, since: float) -> float:
    """Seconds from then until a submission is taken again."""

    def look() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            spec = bed.witness(f"back{time.monotonic_ns()}", lines=1, cpus=0.01)
            return ask(bed, "POST", "/v1/workloads", {"spec": spec})[0] == 201
        return False

    eventually(look, within_s=30, what="submissions are taken again")
    return time.monotonic() - since


@case(
    18,
    "kill -9 of PostgreSQL and all its processes under load, away for 20 s; SQLite's file locked for 22 s; --full: 5 min",
    "nothing acknowledged is lost; 503 with Retry-After, never 401 or 404; back <= 5 s; the gateway serves all the time",
    is_alone=True,
)
def database_away(beds: Beds) -> str:
    bed = beds.make()
    served = bed.submit(bed.service("served", chunks=1, pause=0.01))
    held = bed.submit(bed.witness("held", lines=800))
    bed.cloud.wait(held, "running")
    eventually(lambda: bed.cloud.job(served)["endpoint"], within_s=30, what="it is ready")
    eventually(lambda: is_served(bed, "served"), within_s=30, what="the gateway knows it")
    load = Load(bed, 200, model="served")
    time.sleep(3)
    began = time.monotonic()
    if beds.postgres is not None:
        beds.postgres.kill()
        time.sleep(FULL_AWAY_S if beds.is_full else 20)
        beds.postgres.start()
    else:
        with contextlib.closing(sqlite3.connect(bed.cloud.home / "control.db", isolation_level=None)) as locker:
            locker.execute("PRAGMA busy_timeout=10000")
            locker.execute("BEGIN EXCLUSIVE")
            time.sleep(
                FULL_AWAY_S if beds.is_full else 22
            )  # what comes first waits for 10 s, what gathers then for 10 more
            locker.execute("ROLLBACK")
    away = time.monotonic() - began
    took = _back(bed, time.monotonic())
    time.sleep(3)
    rate = load.stop()
    assert set(load.statuses) <= {200, 201, 503}, load.statuses
    assert load.statuses[200] > 100, load.statuses
    assert load.statuses[201] > 20, load.statuses
    assert load.statuses[503] > 0, load.statuses
    assert not load.without_hint, load.without_hint
    assert set(load.served) == {200}, load.served
    assert load.served[200] > away, load.served
    assert took <= BACK_S, took
    bed.stop(served)
    bed.finish(*bed.acknowledged, within_s=180)
    assert bed.cloud.job(held)["attempts"] == 1
    bed.audit()
    return (
        f"away for {away:.0f} s: {_shown(load.statuses)} at {rate:.0f}/s, each 503 with Retry-After; back after {took:.1f} s;"
        f" the gateway served {load.served[200]} of {load.served.total()}"
    )


def is_served(bed: Bed, model: str) -> bool:
    """Whether the gateway has a stream of that model for whoever asks."""
    body = {"model": model, "stream": True, "prompt": "x"}
    with contextlib.suppress(OSError, http.client.HTTPException):  # it may not listen yet
        return ask(bed, "POST", "/v1/completions", body, port=bed.cloud.gateway_port)[0] == 200
    return False


UNDO: Final = """
CREATE SEQUENCE tries;
CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE number bigint := nextval('tries');
BEGIN
    IF number % 4 = 1 THEN RAISE EXCEPTION 'an order that cannot be' USING ERRCODE = '40001'; END IF;
    IF number % 4 <> 0 THEN RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER undoing BEFORE UPDATE ON leadership FOR EACH ROW EXECUTE FUNCTION undo();
"""
"""Three of four commits are undone, in turn, as PostgreSQL itself undoes them."""


@case(
    19,
    "no connection to the database is left; what every commit takes is locked, for long and again and again; commits are undone",
    "503, not ready but alive; back <= 5 s; undone ones tried <= 3 times more, all answered 2xx; no line of the books lost",
)
def contended(beds: Beds) -> str:
    return _contended_sqlite(beds) if beds.postgres is None else _contended_postgres(beds, beds.postgres)


def _contended_sqlite(beds: Beds) -> str:
    """The write lock, which is SQLite's one connection that counts, is somebody else's."""
    bed = beds.make()
    held = bed.submit(bed.witness("held", lines=900))
    bed.cloud.wait(held, "running")
    statuses: Counter[int | str] = Counter()
    with contextlib.closing(sqlite3.connect(bed.cloud.home / "control.db", isolation_level=None)) as locker:
        locker.execute("PRAGMA busy_timeout=10000")
        locker.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(
                    ask, bed, "POST", "/v1/workloads", {"spec": bed.witness(f"none{number}", lines=1)}, timeout_s=60
                )
                for number in range(4)
            ]
            for each in asked:
                statuses[each.result()[0]] += 1
            readiness, liveness = ask(bed, "GET", "/v1/readyz", timeout_s=60)[0], ask(bed, "GET", "/v1/healthz")[0]
        locker.execute("ROLLBACK")
        locked_s = _back(bed, time.monotonic())
        assert set(statuses) == {503}, statuses
        assert (readiness, liveness) == (503, 200), (readiness, liveness)
        assert locked_s <= BACK_S, locked_s
        over, locks = threading.Event(), 0
        with ThreadPoolExecutor(1) as pool:
            under = pool.submit(
                lambda: [bed.submit(bed.witness(f"between{at}", lines=2, cpus=0.05)) for at in range(20)]
            )
            under.add_done_callback(lambda _: over.set())
            while not over.is_set():
                locker.execute("BEGIN IMMEDIATE")
                time.sleep(0.4)
                locker.execute("ROLLBACK")
                locks += 1
                time.sleep(0.05)
    bed.finish(*under.result(), within_s=90)
    for item in bed.cloud.call("GET", "/v1/jobs?limit=100")[1]["items"]:
        bed.finish(item["id"], within_s=120)
    assert bed.cloud.job(held)["attempts"] == 1
    assert locks >= 3, locks
    bed.audit()
    return (
        f"locked: {_shown(statuses)}, ready {readiness}, alive {liveness}, back after {locked_s:.1f} s; locked {locks} times more"
        f" for 0.4 s: {len(under.result())} of {len(under.result())} answered 2xx"
    )


def _contended_postgres(beds: Beds, server: Postgres) -> str:
    import psycopg

    bed = beds.make()
    held = bed.submit(bed.witness("held", lines=900))
    bed.cloud.wait(held, "running")
    database = bed.url.replace("postgresql+psycopg://", "postgresql://")
    statuses: Counter[int | str] = Counter()
    with _no_connections(server.url("postgres"), database) as taken:
        for number in range(5):
            spec = bed.witness(f"none{number}", lines=1)
            statuses[ask(bed, "POST", "/v1/workloads", {"spec": spec}, timeout_s=60)[0]] += 1
        readiness, liveness = ask(bed, "GET", "/v1/readyz", timeout_s=60)[0], ask(bed, "GET", "/v1/healthz")[0]
    exhausted_s = _back(bed, time.monotonic())
    assert set(statuses) == {503}, statuses
    assert (readiness, liveness) == (503, 200), (readiness, liveness)
    with psycopg.connect(database) as locker:
        locker.execute("SELECT * FROM leadership FOR UPDATE")
        blocked = ask(bed, "POST", "/v1/workloads", {"spec": bed.witness("blocked", lines=1)}, timeout_s=60)[0]
        locker.rollback()
    locked_s = _back(bed, time.monotonic())
    assert blocked == 503, blocked
    assert max(exhausted_s, locked_s) <= BACK_S, (exhausted_s, locked_s)
    with psycopg.connect(database, autocommit=True) as boss:
        boss.execute(UNDO.encode())
        under = [bed.submit(bed.witness(f"undone{at}", lines=2, cpus=0.05)) for at in range(20)]
        bed.finish(*under, within_s=90)
        boss.execute("DROP TRIGGER undoing ON leadership")
        found = boss.execute("SELECT last_value FROM tries").fetchone()
        assert found is not None
    undone = int(found[0]) * 3 // 4
    assert undone >= 3 * len(under), undone
    for item in bed.cloud.call("GET", "/v1/jobs?limit=100")[1]["items"]:
        bed.finish(item["id"], within_s=120)
    assert bed.cloud.job(held)["attempts"] == 1
    bed.audit()
    return (
        f"{taken} connections taken: {_shown(statuses)}, ready {readiness}, alive {liveness}; back after {exhausted_s:.1f} s,"
        f" {locked_s:.1f} s after the lock; {undone} commits undone, {len(under)} of {len(under)} answered 2xx"
    )


@contextlib.contextmanager
def _no_connections(url: str, database: str) -> Iterator[int]:
    """Within, there is no connection to the server left, and the control plane has none: how many were taken."""
    import psycopg

    with contextlib.ExitStack() as stack:
        boss = stack.enter_context(psycopg.connect(url, autocommit=True))
        mine = [boss.info.backend_pid]

        def take() -> None:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    made = stack.enter_context(psycopg.connect(database, connect_timeout=5))
                    mine.append(made.info.backend_pid)

        def are_all_mine() -> bool:
            take()
            ended = boss.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND NOT pid = ANY(%s)",
                [mine],
            ).rowcount
            return not ended

        eventually(are_all_mine, within_s=30, what="all connections are taken")
        yield len(mine)


BROKEN_DISK: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
static int is_mine(void) {
    static int mine = -1;
    if (mine < 0) {
        char line[4096]; int file = open("/proc/self/cmdline", O_RDONLY); ssize_t size = read(file, line, sizeof line - 1);
        close(file); for (ssize_t i = 0; i < size; i++) if (!line[i]) line[i] = ' ';
        line[size > 0 ? size : 0] = 0;
        mine = getenv("BROKEN_WHEN") && getenv("BROKEN_UNDER") && getenv("BROKEN_PROGRAM") && strstr(line, getenv("BROKEN_PROGRAM"));
    }
    return mine;
}
/* While the one file is there, nothing is written under the other, by that program. */
static int is_broken(int file) {
    if (!is_mine() || access(getenv("BROKEN_WHEN"), F_OK)) return 0;
    char link[64], path[4096]; snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return !strncmp(path, getenv("BROKEN_UNDER"), strlen(getenv("BROKEN_UNDER")));
}
#define BREAKS(type, name, taken, given) \
    type name taken { \
        static type (*real) taken; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (is_broken(file)) { errno = EIO; return -1; } \
        return real given; \
    }
BREAKS(int, fsync, (int file), (file))
BREAKS(int, fdatasync, (int file), (file))
BREAKS(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
BREAKS(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
BREAKS(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
"""
"""Makes the disk under a program fail, with EIO, as long as a file is there."""


@case(
    20,
    "no space on the disk of the database, of logs and of blobs; then the disk fails",
    "507 or 503, reads go on, what runs runs on; sound; back <= 5 s without a restart",
)
def full_disk(beds: Beds) -> str:
    if os.geteuid() != 0:
        raise Skipped("needs root, to mount a small disk")
    with contextlib.ExitStack() as stack:
        bed = beds.make(starts=False)
        home, broken = bed.cloud.home, bed.folder / "broken"
        disks = [stack.enter_context(_small_disk(home))]
        if beds.postgres is not None:
            disks.append(stack.enter_context(_small_disk(beds.postgres.folder / "small", like=beds.postgres.data)))
            beds.postgres.sql(f"CREATE TABLESPACE small LOCATION '{disks[1]}'")
            name = urlsplit(bed.url).path.removeprefix("/")
            beds.postgres.sql(f"ALTER DATABASE {name} SET TABLESPACE small")
        stack.callback(bed.close)
        shim = _breaking(broken, home, "tidemill.bootstrap")
        bed.up(env=shim)
        first = bed.submit(bed.witness("first", lines=3))
        bed.finish(first)
        runs = bed.submit(bed.witness("runs", lines=800))
        eventually(lambda: bed.lives(runs), within_s=30, what="it began")
        fills = [disk / "fill" for disk in disks]
        for fill in fills:
            _fill(fill)
        full, reads = _refused(bed, "full", first)
        for fill in fills:
            fill.unlink()
        space_s = _back(bed, time.monotonic())
        assert reads == [200] * 4, reads
        assert full[507] >= 2, full
        assert set(full) <= {201, 503, 507}, full
        broken.touch()
        failed, reads = _refused(bed, "broken", first)
        broken.unlink()
        mended_s = _back(bed, time.monotonic())
        assert reads == [200] * 4, reads
        assert failed[503] >= 1, failed
        assert set(failed) <= {201, 503}, failed
        assert max(space_s, mended_s) <= BACK_S, (space_s, mended_s)
        server = _broken_server(bed, beds.postgres, first) if beds.postgres is not None else ""
        bed.finish(*bed.acknowledged, within_s=90)
        job = bed.cloud.job(runs)
        assert (job["state"], job["attempts"]) == ("succeeded", 1), job
        lines = bed.cloud.logs(runs).decode().splitlines()
        assert lines == [f"line {at} of rank 0" for at in range(800)], f"{len(lines)} lines of 800"
        bed.audit()
        return (
            f"full: {_shown(full)}, back {space_s:.1f} s after there was space; failing: {_shown(failed)}, back"
            f" {mended_s:.1f} s after; reads 200, no restart, the log of a running job whole{server}"
        )


def _breaking(broken: Path, under: Path, program: str) -> dict[str, str]:
    """The environment in which the disk of a program fails under a folder, as long as the file ``broken`` is there."""
    return {
        "LD_PRELOAD": str(built(BROKEN_DISK)), "BROKEN_WHEN": str(broken), "BROKEN_UNDER": str(under),
        "BROKEN_PROGRAM": program,
    }  # fmt: skip


def _broken_server(bed: Bed, server: Postgres, known: str) -> str:
    """The figure of a disk that fails under PostgreSQL, which then panics; whoever runs it starts it again."""
    broken = server.folder / "broken"
    server.stop("fast")
    with environment(_breaking(broken, server.data, "postgres")):
        server.start()
    _back(bed, time.monotonic())
    broken.touch()
    failed, reads = _refused(bed, "server", known)
    broken.unlink()
    time.sleep(1)
    if not server.answers:  # it may wait for its own processes for ever
        server.kill()
        server.start()
    took = _back(bed, time.monotonic())
    assert set(failed) <= {201, 503}, failed
    assert failed[503] >= 5, failed
    assert set(reads) <= {200, 503}, reads
    assert took <= BACK_S, took
    return f"; PostgreSQL's disk failing: {_shown(failed)}, back {took:.1f} s after it was"


@contextlib.contextmanager
def _small_disk(path: Path, *, like: Path | None = None) -> Iterator[Path]:
    """A folder that is a disk of 48 MiB, of the owner of another folder. Raises: Skipped."""
    path.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise Skipped(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        if like is not None:
            os.chown(path, like.stat().st_uid, like.stat().st_gid)
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def _fill(path: Path) -> None:
    """Leave no byte."""
    for size in (1 << 20, 512):
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(size))


def _refused(bed: Bed, name: str, known: str) -> tuple[Counter[int | str], list[int]]:
    """What submissions and an upload are answered, until pages with room in them are full, and what reading is."""
    statuses: Counter[int | str] = Counter()
    for number in range(40):
        spec = bed.witness(f"{name}{number}", lines=1, cpus=0.01, envs={"PAD": os.urandom(3000).hex()})
        status = ask(bed, "POST", "/v1/workloads", {"spec": spec})[0]
        statuses[status] += 1
        statuses[ask(bed, "POST", "/v1/tokens", {"name": spec["name"], "scopes": ["infer"]})[0]] += 1
        if status != 201 and statuses[status] >= 5:
            break
    statuses[_upload(bed)] += 1
    return statuses, [ask(bed, "GET", at)[0] for at in ("/v1/jobs", f"/v1/jobs/{known}", "/v1/healthz", "/v1/nodes")]


def _upload(bed: Bed) -> int:
    """The status of sending a blob of 4 MiB, as a work folder is sent."""
    content = os.urandom(4 << 20)
    connection = http.client.HTTPConnection("127.0.0.1", bed.cloud.port, timeout=30)
    with contextlib.suppress(OSError):  # it hung up in the middle of what it could not take; what it said is read then
        connection.request(
            "PUT", f"/v1/blobs/sha256:{hashlib.sha256(content).hexdigest()}", content,
            {"Authorization": f"Bearer {bed.cloud.token}", "Content-Type": "application/octet-stream"},
        )  # fmt: skip
    try:
        return connection.getresponse().status
    finally:
        connection.close()
