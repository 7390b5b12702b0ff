"""Jobs a second through the whole of Tidemill, with durable state: submitted over REST, admitted, placed, started,
finished and billed, on PostgreSQL.

The machines are simulated, so that thousands fit on one: the engine takes a launch and tells of its start and end as
runners do, after as long as the job's command says, in real time. All else is the product as it is installed. Clients
in a process of their own send batches over keep-alive connections. The clock runs from the first request until the
last job is in the database as ended and billed; then all of it is checked from the database: every acknowledged job
ended well and once, no device or core ever held twice, each job's ledger lines add up to what it held.

Beside it run the generators of Kueue's published performance test, with their creation intervals and run times, each
workload a request of its own, for the same number of queues with the same quotas. Kueue's figures are its own, from
machines of its project's choice, and count quota only; here each workload also gets a place on a machine. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil

from benchmarks.clouds import Home, cloud, end_on_signals, machine, table
from benchmarks.submit import call, postgres

JOBS, NODES, BATCH, CLIENTS = 50_000, 5_000, 200, 6
QUEUE_CLIENTS: Final = 256
"""Connections of a generator; Kueue's creates from as many threads as there are queues and sorts."""
SHAPES: Final = (("H100:1", 8), ("H100:2", 4), ("H100:4", 4), ("H100:8", 8), ("0.5", 2), ("none", 1))
"""What the jobs of the first measurement ask for in turn: GPUs and cores."""
RUN: Final = "sleep 1"
TARGET: Final = 1_000
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_POLL_S: Final = 0.25


@dataclass(frozen=True)
class Sort:
    """One set of workloads of each queue: how many, how far apart, for how long, with how many cores."""

    name: str
    count: int
    every_ms: int
    run_ms: int
    priority: int
    cpus: int


@dataclass(frozen=True)
class Generator:
    """A generator of Kueue's performance test. Each queue has ``quota`` cores and may borrow ``borrow`` in its cohort.

    ``published_s`` is how long Kueue took, ``admission_s`` how long workloads of each sort waited on average.
    """

    key: str
    cohorts: int
    queues: int
    sorts: tuple[Sort, ...]
    published_s: float
    admission_s: tuple[tuple[str, float], ...]
    quota: int = 20
    borrow: int = 100

    @property
    def workloads(self) -> int:
        """How many there are in all."""
        return self.cohorts * self.queues * sum(sort.count for sort in self.sorts)


KUEUE: Final = (
    Generator(
        "kueue_baseline",
        5,
        6,
        (
            Sort("small", 350, 100, 200, 50, 1),
            Sort("medium", 100, 500, 500, 100, 5),
            Sort("large", 50, 1_200, 1_000, 200, 20),
        ),
        351.116,
        (("large", 6.666), ("medium", 76.768), ("small", 215.468)),
    ),
    Generator(
        "kueue_large",
        10,
        100,
        (Sort("small", 35, 60, 150, 50, 1), Sort("medium", 11, 300, 350, 100, 5), Sort("large", 4, 700, 700, 200, 20)),
        1_179.0,
        (("large", 106.0), ("medium", 256.0), ("small", 700.0)),
    ),
)
"""Source: kubernetes-sigs/kueue, test/performance/scheduler/configs/{baseline,large-scale}/generator.yaml and
rangespec.yaml (averages of the project's own runs). The large one is the version with 1,000 queues."""


# --- the clients: a process of their own ---


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def post(self, head: str, body: bytes) -> None:
        """Nothing, when the answer says that it is stored. Raises: RuntimeError otherwise."""
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(answer)
        content = await self.reader.readexactly(int(length[1])) if length else b""
        if not answer.startswith(b"HTTP/1.1 201"):
            raise RuntimeError(f"refused: {answer[:60]!r} {content[:500]!r}")


async def _drive(settings: dict[str, Any]) -> None:
    """Send every request of ``settings`` when it is due, over so many connections; print what became of them."""
    url, token = settings["url"], settings["token"]
    host, port = url.removeprefix("http://").split(":")
    common = f"Host: {host}:{port}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    requests = list(_requests(settings))
    waiting = iter(enumerate(requests))
    connections = [_Connection(*await asyncio.open_connection(host, int(port))) for _ in range(settings["clients"])]
    began = time.time()
    late = [0.0]

    async def send(connection: _Connection) -> None:
        for number, (due_s, path, body) in waiting:
            ahead = began + due_s - time.time()
            if ahead > 0:
                await asyncio.sleep(ahead)
            late[0] = max(late[0], -ahead)
            key = f"Idempotency-Key: {settings['name']}-{number}\r\n"
            await connection.post(f"POST {path} HTTP/1.1\r\n{common}{key}", body)
        connection.writer.close()

    await asyncio.gather(*map(send, connections))
    print(json.dumps({"began": began, "ended": time.time(), "requests": len(requests), "late_s": late[0]}))


def _requests(settings: dict[str, Any]) -> Iterator[tuple[float, str, bytes]]:
    """When each request is due, in seconds from the beginning, its path and its body; in that order."""
    if settings["generator"] is None:
        for start in range(0, settings["jobs"], BATCH):
            specs = [_spec(number) for number in range(start, min(start + BATCH, settings["jobs"]))]
            yield 0.0, "/v1/workloads:batch", json.dumps({"specs": specs}).encode()
        return
    generator = KUEUE[settings["generator"]]
    due = [
        ((one + 1) * sort.every_ms / 1000, queue, sort, one)
        for queue in range(generator.cohorts * generator.queues)
        for sort in generator.sorts
        for one in range(sort.count)
    ]
    for due_s, queue, sort, one in sorted(due, key=lambda each: (each[0], each[3], each[1])):
        spec = {
            "name": f"{sort.name}-{one}",
            "run": f"sleep {sort.run_ms / 1000:g}",
            "priority": sort.priority,
            "resources": {"cpus": sort.cpus},
        }
        yield due_s, "/v1/workloads", json.dumps({"spec": spec, "project": _queue_name(generator, queue)}).encode()


def _spec(number: int) -> dict[str, Any]:
    gpus, cpus = SHAPES[number % len(SHAPES)]
    return {"name": f"job-{number}", "run": RUN, "resources": {"gpus": gpus, "cpus": cpus, "memory": "8GB"}}


def _queue_name(generator: Generator, queue: int) -> str:
    return f"cq-{queue % generator.queues}-cohort-{queue // generator.queues}"


# --- one measurement ---


def measure(database: str, *, generator: int | None, jobs: int, nodes: int, clients: int) -> dict[str, Any]:
    """How long it took until all was billed, and what the database then says."""
    chosen = None if generator is None else KUEUE[generator]
    fleet = f"{chosen.cohorts * chosen.queues}xcpu:{chosen.quota}cpu" if chosen else f"{nodes}xH100:8"
    total = chosen.workloads if chosen else jobs
    with cloud(database=database, engine="simulated", simulated=fleet) as home:
        if chosen:
            _make_queues(home, chosen)
        settings = {
            "url": home.url,
            "token": home.token,
            "jobs": jobs,
            "clients": clients,
            "generator": generator,
            "name": f"bench-{time.time_ns()}",
        }
        process = subprocess.Popen(
            [sys.executable, __file__, "--drive", json.dumps(settings)], stdout=subprocess.PIPE, text=True
        )
        before = psutil.Process(home.pid).cpu_times()
        over = _wait_until_over(database, total, process)
        after = psutil.Process(home.pid).cpu_times()
        told = json.loads(process.communicate()[0])
    found = check(database, total)
    return {
        "jobs": total,
        "wall_s": over - told["began"],
        "submit_s": told["ended"] - told["began"],
        "late_s": told["late_s"],
        "cpu_ms": (after.user + after.system - before.user - before.system) * 1000 / total,
        **found,
    }


def _make_queues(home: Home, generator: Generator) -> None:
    """A project for each queue, with its quota and what it may borrow as its limit."""
    for queue in range(generator.cohorts * generator.queues):
        body = {
            "name": _queue_name(generator, queue),
            "limit_cpu_milli": (generator.quota + generator.borrow) * 1000,
        }
        call(home, "POST", "/v1/projects", body)


def _wait_until_over(database: str, total: int, clients: subprocess.Popen[str]) -> float:
    """When the last job was in the database as ended. Raises: RuntimeError when nothing more happens."""
    import psycopg

    last, changed = -1, time.monotonic()
    with psycopg.connect(database.replace("postgresql+psycopg", "postgresql"), autocommit=True) as connection:
        while True:
            row = connection.execute(
                "SELECT count(*) FROM jobs WHERE state IN ('succeeded', 'failed', 'cancelled')"
            ).fetchone()
            now, over = time.time(), int(row[0]) if row else 0
            if over != last:
                last, changed = over, time.monotonic()
            if over >= total:
                return now
            if time.monotonic() - changed > 120 or clients.poll() not in (None, 0):
                raise RuntimeError(f"{over} of {total} jobs ended, and no more do")
            time.sleep(_POLL_S)


# --- what the database says afterwards ---


def check(database: str, total: int) -> dict[str, Any]:
    """Counts and sums from the database. Raises: RuntimeError that names what does not hold."""
    import psycopg

    with psycopg.connect(database.replace("postgresql+psycopg", "postgresql")) as connection:
        jobs = [row[0] for row in connection.execute("SELECT body::json FROM jobs")]
        held = [row[0] for row in connection.execute("SELECT body::json FROM allocations")]
        names = dict(connection.execute("SELECT id, name FROM workloads").fetchall())
        capacity = _capacity([row[0] for row in connection.execute("SELECT body::json FROM nodes")])
        billed = {
            (row[0], row[1]): (int(row[2]), int(row[3]))
            for row in connection.execute(
                "SELECT launch_id, body::json->'usage'->>'meter', sum(held_high * 4294967296::numeric + held_low),"
                " sum(amount_micro) FROM ledger WHERE launch_id <> '' GROUP BY 1, 2"
            )
        }
        size = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    wrong = [
        f"{len(jobs)} jobs instead of {total}" if len(jobs) != total else "",
        *(f"{job['id']} {job['state']}" for job in jobs if job["state"] != "succeeded"),
        *(f"{job['id']} took {job['attempts']} attempts" for job in jobs if job["attempts"] != 1),
        f"{len(held)} workers for {total} jobs" if len(held) != total else "",
        *(f"{one['id']} is {one['state']}" for one in held if one["state"] != "released"),
        *_over_capacity(held, capacity),
        *_wrongly_billed(held, billed),
    ]
    if wrong := [each for each in wrong if each]:
        raise RuntimeError(f"{len(wrong)} things do not hold: {'; '.join(wrong[:10])}")
    placed = {one["job_id"]: one["held_ns"] for one in held}
    waits: dict[str, list[float]] = {}
    for job in jobs:
        name = names[job["workload_id"]].partition("-")[0]
        waits.setdefault(name, []).append((placed[job["id"]] - job["submitted_ns"]) / 1e9)
    return {
        "admission_s": {name: sum(each) / len(each) for name, each in sorted(waits.items())},
        "billed_micro": sum(amount for _, amount in billed.values()),
        "database_mb": round(size[0] / 2**20) if size else 0,
    }


def _capacity(nodes: Sequence[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """What there is, by node and by device or ``cpu`` or ``memory``."""
    found: dict[tuple[str, str], int] = {}
    for node in nodes:
        found[node["id"], "cpu"], found[node["id"], "memory"] = node["cpu_milli"], node["memory_bytes"]
        found |= {(node["id"], device["id"]): 1_000 for device in node["devices"]}
    return found


def _over_capacity(held: Sequence[dict[str, Any]], capacity: dict[tuple[str, str], int]) -> Iterator[str]:
    """Of what more was held at some instant than there is."""
    moves: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for one in held:
        amounts = [("cpu", one["cpu_milli"]), ("memory", one["memory_bytes"])]
        amounts += [(share["device_id"], share["milli"]) for share in one["devices"]]
        for what, amount in amounts:
            moves.setdefault((one["node_id"], what), []).extend(
                ((one["held_ns"], amount), (one["released_ns"], -amount))
            )
    for key, steps in moves.items():
        most = now = 0
        for _, amount in sorted(steps):
            now += amount
            most = max(most, now)
        if most > capacity.get(key, 0):
            yield f"{most} of {capacity.get(key, 0)} of {key} were held"


def _wrongly_billed(held: Sequence[dict[str, Any]], billed: dict[tuple[str, str], tuple[int, int]]) -> Iterator[str]:
    """Workers whose ledger lines do not add up to what they held, for as long as they did."""
    for one in held:
        length = one["released_ns"] - one["held_ns"]
        amounts = [("cpu", one["cpu_milli"])]
        amounts += [(share["device_id"], share["milli"]) for share in one["devices"]]
        for meter, milli in amounts:
            lines = billed.get((one["id"], meter), (0, 0))[0]
            if lines != milli * length:
                yield f"{one['id']} held {milli * length} of {meter} and is billed for {lines}"


def main() -> int:
    """Measure and print; fails when something does not hold, or is too slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--only", choices=("api", "baseline", "large"))
    parser.add_argument("--drive", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    end_on_signals()
    if given.drive:
        asyncio.run(_drive(given.drive))
        return 0
    found: dict[str, dict[str, Any]] = {}
    for name, generator in (("api", None), ("baseline", 0), ("large", 1)):
        if given.only in (None, name):
            with postgres() as url:
                found[name] = measure(
                    url.replace("postgresql:", "postgresql+psycopg:"),
                    generator=generator,
                    jobs=given.jobs,
                    nodes=given.nodes,
                    clients=given.clients if generator is None else QUEUE_CLIENTS,
                )
            print(f"{name}: {found[name]['jobs']:,} jobs in {found[name]['wall_s']:.1f} s", file=sys.stderr)
    return _report(found, given.nodes)


def _report(found: dict[str, dict[str, Any]], nodes: int) -> int:
    about = machine()
    result: dict[str, Any] = {}
    print("\nJobs through REST to the last ledger line, on PostgreSQL, with simulated machines")
    print(f"{about['cpu']}, {about['cores']} cores, {about['date']}\n")
    rows = []
    if "api" in found:
        figures = found["api"]
        rate = figures["jobs"] / figures["wall_s"]
        result["jobs_per_s"] = round(rate, 1)
        rows.append(
            (
                f"{figures['jobs']:,} jobs on {nodes:,} nodes",
                f"{figures['wall_s']:.1f} s",
                f"{rate:,.0f}/s",
                f"{rate / TARGET:.2f} x {TARGET:,}/s",
            )
        )
    for name, generator in (("baseline", KUEUE[0]), ("large", KUEUE[1])):
        if name in found:
            figures = found[name]
            result[f"{generator.key}_s"] = round(figures["wall_s"], 1)
            what = (
                f"Kueue's {name}: {generator.workloads:,} workloads in {generator.cohorts * generator.queues:,} queues"
            )
            times = generator.published_s / figures["wall_s"]
            rate = figures["jobs"] / figures["wall_s"]
            rows.append(
                (
                    what,
                    f"{figures['wall_s']:.1f} s",
                    f"{rate:,.0f}/s",
                    f"{times:.1f} x Kueue's {generator.published_s:,.0f} s",
                )
            )
            for sort, published in generator.admission_s:
                wait = figures["admission_s"][sort]
                rows.append((f"  mean wait of the {sort} ones", f"{wait:.1f} s", "", f"Kueue {published:,.1f} s"))
                result[f"{generator.key}_{sort}_wait_s"] = round(wait, 2)
    table(("", "", "", ""), rows)
    for name, figures in found.items():
        print(
            f"\n{name}: submitted in {figures['submit_s']:.1f} s, requests up to {figures['late_s']:.1f} s late, billed"
            f" {figures['billed_micro'] / 1e6:,.2f} USD, database {figures['database_mb']} MB,"
            f" {figures['cpu_ms']:.2f} ms of the control plane's CPU for each job; counts and sums hold"
        )
    print(json.dumps({**result, "machine": about}))
    return 0 if result.get("jobs_per_s", TARGET) >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
