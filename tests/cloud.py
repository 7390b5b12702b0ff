"""A real cloud for tests: the daemon in its own home on free ports, to be talked to, killed and started again."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIVE = ("queued", "starting", "running", "stopping")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(look: Callable[[], Any], *, within_s: float, what: str) -> Any:
    """The first true answer of ``look``. Raises: AssertionError that says what did not happen."""
    deadline = time.monotonic() + within_s
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.02)


class Cloud:
    """One home folder and the daemon that may or may not run in it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.port = free_port()
        self.gateway_port = free_port()
        self.settings = {"port": self.port, "gateway_port": self.gateway_port} | settings
        self.process: subprocess.Popen[bytes] | None = None
        self.heard: Callable[[str, str, Any, int, Any], None] = lambda *_: None
        """Is called with method, path, body, status and answer of each request that was answered."""
        self.gpus = ""
        """What services of the fault cases ask for of its GPUs, where it has some."""
        self.environment: dict[str, str] = {}
        """What the daemon is started with besides the environment of the tests, each time."""

    def up(self, *, under: tuple[str, ...] = ()) -> None:
        """Start the daemon, under another program when given, and wait until it answers or ended."""
        reading, writing = os.pipe()
        command = [
            *under,
            sys.executable,
            "-m",
            "tidemill.bootstrap",
            str(self.home),
            json.dumps(self.settings),
            str(writing),
        ]
        self.home.mkdir(exist_ok=True, mode=0o700)
        with (self.home / "control.log").open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, pass_fds=(writing,), start_new_session=True,
                env=os.environ | self.environment,
            )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            pipe.read()

    def kill(self) -> None:
        """kill -9 of the control plane, and of nothing else."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    @property
    def pid(self) -> int:
        """The daemon's process id, from its own endpoint file."""
        return int(json.loads((self.home / "endpoint.json").read_text())["pid"])

    def down(self) -> None:
        """End every job and the daemon, whatever state they are in."""
        from tidemill.bootstrap import is_running, stop_daemon
        from tidemill.errors import Conflict, Unavailable

        if not is_running(self.home):
            self.up()
        try:
            stop_daemon(self.home, stop_jobs=True, timeout_s=30)
        except (Conflict, Unavailable):  # what is cut off cannot end
            stop_daemon(self.home, stop_jobs=False)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)

    @property
    def token(self) -> str:
        """The first administrator's token."""
        return (self.home / "admin.token").read_text().strip()

    def call(
        self, method: str, path: str, body: Any = None, *, key: str = "", token: str | None = None
    ) -> tuple[int, Any]:
        """Status and decoded body of one request. Raises: OSError, HTTPException when there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {
            "Authorization": f"Bearer {self.token if token is None else token}",
            "Content-Type": "application/json",
        }
        if key:
            headers["Idempotency-Key"] = key
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            content = json.loads(content)
        self.heard(method, path, body, answer.status, content)
        return answer.status, content

    def submit(self, spec: dict[str, Any], *, key: str = "") -> str:
        """The id of the first job of a new workload."""
        status, body = self.call("POST", "/v1/workloads", {"spec": spec}, key=key)
        assert status == 201, body
        return str(body["jobs"][0]["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as the API shows it."""
        status, body = self.call("GET", f"/v1/jobs/{job_id}")
        assert status == 200, body
        return dict(body)

    def wait(self, job_id: str, *states: str, within_s: float = 30) -> dict[str, Any]:
        """The job once it is in one of ``states``; without any, once it is over."""

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if (job["state"] in states if states else job["state"] not in LIVE) else None

        return dict(eventually(look, within_s=within_s, what=f"{job_id} {states or 'over'}"))

    def logs(self, job_id: str, rank: int = 0, attempt: int | None = None) -> bytes:
        """All bytes of one worker's log."""
        tail = f"&attempt={attempt}" if attempt else ""
        status, body = self.call("GET", f"/v1/jobs/{job_id}/logs?rank={rank}{tail}")
        assert status == 200, body
        return body if isinstance(body, bytes) else str(body).encode()

    def books(self) -> list[tuple[str, str, int, int, int, str]]:
        """(node, meter, from, to, milli, launch) of every ledger line, read from the database file itself."""
        status, body = self.call("GET", "/v1/ledger?limit=1000")
        assert status == 200, body
        items = list(body["items"])
        while body["next_cursor"]:
            _, body = self.call("GET", f"/v1/ledger?limit=1000&cursor={body['next_cursor']}")
            items += body["items"]
        lines = [item.get("usage", item) for item in items]
        return [(u["node_id"], u["meter"], u["from_ns"], u["to_ns"], u["milli"], u["launch_id"]) for u in lines]

    def integrity(self) -> str:
        """What SQLite says of the database file."""
        with contextlib.closing(sqlite3.connect(self.home / "control.db")) as database:
            return str(database.execute("PRAGMA integrity_check").fetchone()[0])
