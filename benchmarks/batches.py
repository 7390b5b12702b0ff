"""Many short jobs through a cloud that runs, and what its control plane took for them. For the halves of ``engine``."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.clouds import Home
from benchmarks.submit import call

BATCH = 250
_LIMIT_S = 300.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """What came of ``jobs`` jobs: seconds from the first request until the last was in the database as over, with the
    control plane's CPU seconds in that time and its greatest resident memory."""

    jobs: int
    wall_s: float
    submit_s: float
    cpu_s: float
    rss_mib: float

    @property
    def jobs_per_s(self) -> float:
        """Jobs a second."""
        return self.jobs / self.wall_s


class Watch:
    """The control plane's resident memory, looked at ten times a second in a thread of its own until ``close``."""

    def __init__(self, home: Home) -> None:
        self._process = psutil.Process(home.pid)
        self._began = self._process.cpu_times()
        self._closing = threading.Event()
        self.most_bytes = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def cpu_s(self) -> float:
        """CPU seconds since it began."""
        now = self._process.cpu_times()
        return now.user + now.system - self._began.user - self._began.system

    def close(self) -> None:
        """Look no more."""
        self._closing.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closing.wait(0.1):
            with contextlib.suppress(psutil.Error):
                self.most_bytes = max(self.most_bytes, self._process.memory_info().rss)


@contextlib.contextmanager
def watch(home: Home) -> Iterator[Watch]:
    """A watch over the control plane meanwhile."""
    made = Watch(home)
    try:
        yield made
    finally:
        made.close()


def submit(home: Home, jobs: int, spec: Mapping[str, Any]) -> None:
    """So many jobs are submitted and on the disk, in batches one after the other."""
    for start in range(0, jobs, BATCH):
        numbers = range(start, min(start + BATCH, jobs))
        specs = [{**spec, "name": f"{spec.get('name', 'job')}-{number}"} for number in numbers]
        call(home, "POST", "/v1/workloads:batch", {"specs": specs})


def states(home: Home) -> dict[str, int]:
    """How many jobs are in which state, from the cloud's own database file, which is only read."""
    with contextlib.closing(sqlite3.connect(f"file:{home.folder / 'control.db'}?mode=ro", uri=True)) as database:
        return dict(database.execute("SELECT state, count(*) FROM jobs GROUP BY state"))


def until(home: Home, reached: Callable[[dict[str, int]], bool], *, limit_s: float = _LIMIT_S) -> dict[str, int]:
    """The states once ``reached`` says so. Raises: RuntimeError when nothing changes any more."""
    last, changed_s = states(home), time.monotonic()
    while not reached(last):
        time.sleep(_POLL_S)
        now = states(home)
        if now != last:
            last, changed_s = now, time.monotonic()
        elif time.monotonic() - changed_s > limit_s:
            raise RuntimeError(f"nothing more happens: {json.dumps(last)}")
    return last


def put_through(home: Home, jobs: int, spec: Mapping[str, Any]) -> Through:
    """What came of so many jobs. Raises: RuntimeError when one did not end well, or took more than one attempt."""
    before = states(home).get("succeeded", 0)
    with watch(home) as seen:
        began = time.monotonic()
        submit(home, jobs, spec)
        submitted = time.monotonic()
        last = until(home, lambda now: sum(now.get(each, 0) for each in _OVER) - before >= jobs, limit_s=60.0)
        ended, cpu_s = time.monotonic(), seen.cpu_s()
    if last.get("succeeded", 0) - before != jobs or (again := _attempted_again(home)):
        raise RuntimeError(f"not all of {jobs} jobs ended well at the first attempt: {last}, {again}")
    return Through(
        jobs=jobs, wall_s=ended - began, submit_s=submitted - began, cpu_s=cpu_s, rss_mib=seen.most_bytes / 2**20
    )


_OVER = ("succeeded", "failed", "cancelled")


def _attempted_again(home: Home) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"file:{home.folder / 'control.db'}?mode=ro", uri=True)) as database:
        bodies = [json.loads(row[0]) for row in database.execute("SELECT body FROM jobs")]
    return [body["id"] for body in bodies if body["attempts"] > 1]
