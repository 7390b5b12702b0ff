"""A cloud on either store, machines that joined it, and a record of everything that it acknowledged."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import namespaces
from tests.cloud import Cloud, eventually
from tests.faults.suite import audit, journal
from tests.faults.suite.writes import Record
from tests.postgres import Postgres
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig
from tidemill.runner import processes
from tidemill.runner.folders import read_json
from tidemill.store.sql import SqlStore

GONE_WITHIN_S = 30.0
GPUS = 8
"""How many a machine has: stand-ins, which the driver in ``nvml_standin.c`` shows."""


class Bed:
    """One cloud under test. Whatever is submitted or stopped through it has to be there in the end."""

    def __init__(self, folder: Path, store: str, url: str, **settings: Any) -> None:
        self.folder = folder
        self.store = store
        self.url = url or f"sqlite:///{folder / 'head' / 'control.db'}"
        self.cloud = Cloud(folder / "head", **({"database": url} if url else {}), **settings)
        self.record = Record()
        """All that was acknowledged, to be found again by the audit."""
        self.cloud.heard = lambda *told: self.record.heard(*told)
        self._driver = namespaces.standin_driver(folder / "driver")
        self.cloud.gpus = "0.1" if self._driver else ""
        self.cloud.environment = self.devices("head")
        self.machines: dict[str, Path] = {}
        self.killed: set[str] = set()
        """Jobs of which something was killed on purpose, which so may be tried again."""
        self.forgotten: set[str] = set()
        """Jobs that a backup which was restored does not know."""
        self._witnesses: set[str] = set()
        """The names of jobs that write into the journal."""

    @property
    def acknowledged(self) -> dict[str, str]:
        """The names of the jobs that were taken."""
        return self.record.acknowledged

    @property
    def stopped(self) -> set[str]:
        """The jobs whose stop was acknowledged."""
        return self.record.stopped

    # Doing things

    def up(self, *, env: dict[str, str] | None = None, under: tuple[str, ...] = ()) -> float:
        """Start the control plane; how many seconds that took."""
        began = time.monotonic()
        with environment(env or {}):
            self.cloud.up(under=under)
        return time.monotonic() - began

    def devices(self, name: str) -> dict[str, str]:
        """The environment in which a machine shows GPUs that bear its name."""
        if not self._driver:
            return {}
        return {"LD_LIBRARY_PATH": self._driver, "STANDIN_GPUS": str(GPUS), "STANDIN_NAME": name}

    def govern(self, tag: str, *, env: dict[str, str] | None = None, within_s: float = 60) -> None:
        """Have the API take one of each that governs: a budget, a key with a limit, a secret, a place in the quota tree.

        Each is asked for until it is answered, with the control plane started again where it ended.
        """
        for method, path, body in (
            ("POST", "/v1/projects", {"name": f"p-{tag}", "limits": {"usd/month": 250.0}}),
            ("POST", "/v1/tokens", {"name": f"t-{tag}", "scopes": ["infer"], "limits": {"requests/minute": 60}}),
            ("PUT", f"/v1/secrets/S_{tag.upper().replace('-', '_')}", {"value": tag}),
            ("PUT", f"/v1/queues/q-{tag}", {"weight": 3, "limit": {"gpu": 2}}),
        ):
            self._ask_surely(method, path, body, key=f"{path} {tag}", env=env, within_s=within_s)

    def _ask_surely(
        self, method: str, path: str, body: Any, *, key: str, env: dict[str, str] | None, within_s: float
    ) -> Any:
        """The answer with 2xx to a request that may be asked again, with the control plane started again meanwhile."""
        until = time.monotonic() + within_s
        while True:
            try:
                status, answer = self.cloud.call(method, path, body, key=key)
                if 200 <= status < 300:
                    return answer
                assert status == 503, (status, answer)
            except (OSError, http.client.HTTPException):
                self.revive(env=env)
            assert time.monotonic() < until, f"{method} {path} was not taken"

    def witness(
        self, name: str, *, lines: int = 20, pause: float = 0.05, cpus: float = 0.1, gpus: float = 0.1, **more: Any
    ) -> dict[str, Any]:
        """The spec of a job that writes down when it lives and what it holds, and prints numbered lines."""
        body = journal.LINES.format(lines=lines, pause=pause)
        return self._spec(name, body, cpus, gpus) | more

    def service(
        self, name: str, *, chunks: int = 40, pause: float = 0.1, cpus: float = 0.1, gpus: float = 0.1, **more: Any
    ) -> dict[str, Any]:
        """The spec of a service whose answers are streams."""
        body = journal.SERVE.format(chunks=chunks, pause=pause)
        return self._spec(name, body, cpus, gpus) | {
            "ports": [{"name": "http"}], "service": {"port": "http", "readiness": {"path": "/"}}, **more,
        }  # fmt: skip

    def _spec(self, name: str, body: str, cpus: float, gpus: float) -> dict[str, Any]:
        self._witnesses.add(name)
        script = journal.witness(body, cpus=cpus, gpus=gpus)
        held = {"cpus": cpus} | ({"gpus": f"{gpus:g}"} if self._driver else {})
        return {"name": name, "run": f"exec python3 - <<'END'\n{script}\nEND", "resources": held}

    def submit(self, spec: dict[str, Any], *, key: str = "") -> str:
        """The id of the job, which was acknowledged. Raises: OSError, HTTPException when no answer came."""
        return self.cloud.submit(spec, key=key)

    def submit_surely(
        self, spec: dict[str, Any], *, key: str, env: dict[str, str] | None = None, within_s: float = 60
    ) -> str:
        """As ``submit``, asked again with the same key, with the control plane started again, until it answers."""
        answer = self._ask_surely("POST", "/v1/workloads", {"spec": spec}, key=key, env=env, within_s=within_s)
        return str(answer["jobs"][0]["id"])

    def stop(self, job_id: str) -> bool:
        """Whether the stop of a job was acknowledged."""
        try:
            status, _ = self.cloud.call("POST", f"/v1/jobs/{job_id}/stop")
        except (OSError, http.client.HTTPException):
            return False
        return status == 202

    def revive(self, *, env: dict[str, str] | None = None) -> bool:
        """Whether the control plane had ended, and was started again."""
        process = self.cloud.process
        if process is None or process.poll() is None:
            return False
        self.up(env=env)
        return True

    def join(
        self, name: str, *, through: str = "", site: str = "local", env: dict[str, str] | None = None, **described: Any
    ) -> Path:
        """The home of a machine that joined, ready; ``through`` is another address of the control plane."""
        status, made = self.cloud.call("POST", f"/v1/sites/{site}/tokens", {})
        assert status == 201, made
        home = self.folder / name
        asked = OutpostConfig(
            control_url=through or f"http://127.0.0.1:{self.cloud.port}", key="", node_id="", name=name,
            address="127.0.0.1", **described,
        )  # fmt: skip
        joining.join(home, made["token"], asked)
        self.start_agent(home, env=env)
        self.machines[name] = home
        self.await_ready(name, within_s=60)
        self.record.add("node", self.node(name))
        return home

    def start_agent(self, home: Path, *, env: dict[str, str] | None = None) -> None:
        """Start the agent of a machine that joined."""
        with environment(self.devices(home.name) | (env or {})):
            joining.start_outpost(home)

    # Looking

    def node(self, name: str) -> dict[str, Any]:
        nodes = self.cloud.call("GET", "/v1/nodes")[1]["items"]
        return next((dict(node) for node in nodes if node["name"] == name), {})

    def lives(self, job_id: str = "") -> list[journal.Life]:
        """What workers wrote down, of one job or of all."""
        found = journal.lives([self.cloud.home, *self.machines.values()])
        return [life for life in found if life.job == job_id or not job_id]

    def begun(self, job_id: str, *, times: int = 1, within_s: float = 20) -> list[journal.Life]:
        """What workers wrote down of a job, once it began so many times."""
        found: list[journal.Life] = []

        def look() -> bool:
            found[:] = self.lives(job_id)
            return len(found) >= times

        eventually(look, within_s=within_s, what=f"{job_id} began {times} times")
        return found

    def await_ready(self, name: str, *, within_s: float = 40) -> None:
        """Wait until that machine is ready."""
        eventually(lambda: self.node(name).get("state") == "ready", within_s=within_s, what=f"{name} is ready")

    def finish(self, *job_ids: str, within_s: float = 60) -> None:
        """Wait until those jobs are over."""
        for job_id in job_ids:
            self.cloud.wait(job_id, within_s=within_s)

    def audit(self, *, may_run: Sequence[str] = ()) -> None:
        """Raises: AssertionError with every promise that is broken."""
        jobs = self._jobs()
        over = {job_id for job_id, job in jobs.items() if job["state"] in audit.TERMINAL}
        until = time.monotonic() + GONE_WITHIN_S
        while any(_job_of(launch) not in jobs or _job_of(launch) in over for launch in self.running()):
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        store = SqlStore(self.url)
        try:
            unsound = store.integrity()
        finally:
            store.close()
        found = audit.violations(
            audit.Evidence(
                lives=self.lives(), acknowledged=self.acknowledged, stopped=frozenset(self.stopped), jobs=jobs,
                things=self.record.things, there=self.record.found(self.cloud.call), unknown=frozenset(self.record.unknown),
                books=self.cloud.books(), running=frozenset(self.running()), capacity=(os.cpu_count() or 1) * 1000,
                witnesses=frozenset(job_id for job_id, name in self.acknowledged.items() if name in self._witnesses),
                unsound=unsound, may_restart=frozenset(self.killed), may_run=frozenset(may_run),
                forgotten=frozenset(self.forgotten),
            )
        )  # fmt: skip
        assert not found, "; ".join(found)

    def running(self) -> list[str]:
        """The launches of which a process lives on this machine, and that are of this bed."""
        roots = [str(home).encode() for home in (self.cloud.home, *self.machines.values())]
        found: set[str] = set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                variables = dict(
                    part.split(b"=", 1) for part in (entry / "environ").read_bytes().split(b"\0") if b"=" in part
                )
                launch = variables.get(b"TIDEMILL_LAUNCH_ID")
                if launch and any(root in value for value in variables.values() for root in roots):
                    found.add(launch.decode())
        return sorted(found)

    def _jobs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        cursor = ""
        while True:
            status, page = self.cloud.call("GET", f"/v1/jobs?limit=500&cursor={cursor}")
            assert status == 200, page
            for item in page["items"]:
                job = self.cloud.job(item["id"])
                stem = job["id"].removeprefix("job_")
                for worker in job["workers"]:
                    worker["launch"] = f"run_{stem}-{worker['attempt']}-{worker['rank']}"
                found[job["id"]] = job
            cursor = page["next_cursor"]
            if not cursor:
                return found

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(Exception):
            self.cloud.down()
        for home in self.machines.values():
            joining.stop_outpost(home)
        for home in (self.cloud.home, *self.machines.values()):
            _end_runners(home)


class Beds:
    """Makes beds on one store, and clears them away.

    ``nth_round`` chooses what is not tried in full, ``is_full`` has everything tried, however long it takes.
    """

    def __init__(
        self, store: str, postgres: Postgres | None = None, *, nth_round: int = 1, is_full: bool = False
    ) -> None:
        self.store = store
        self.nth_round = nth_round
        self.is_full = is_full
        self.postgres = postgres
        self._folder = Path(tempfile.mkdtemp(prefix="tm-faults-"))
        self._made: list[Bed] = []

    def make(self, *, starts: bool = True, **settings: Any) -> Bed:
        """A new cloud, which runs unless told otherwise."""
        folder = self._folder / str(len(self._made))
        folder.mkdir()
        url = self.postgres.url(self.postgres.database()) if self.postgres is not None else ""
        bed = Bed(folder, self.store, url, **settings)
        self._made.append(bed)
        if starts:
            bed.up()
            bed.govern("first")
        return bed

    def folder(self, name: str) -> Path:
        """A folder for whatever else a case needs."""
        made = self._folder / name
        made.mkdir()
        return made

    def logs(self) -> str:
        """How control planes ended, and the last lines that they and machines said."""
        ends = [f"-- control plane ended: {bed.cloud.process.poll()}" for bed in self._made if bed.cloud.process]
        paths = [path for bed in self._made for path in sorted(bed.folder.glob("*/*.log"))]
        return "\n".join([*ends, *("\n".join([f"-- {path}", *path.read_text().splitlines()[-12:]]) for path in paths)])

    def close(self) -> None:
        """End everything and leave nothing."""
        for bed in self._made:
            bed.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _end_runners(home: Path) -> None:
    """Kill the runners that would go on for a day: those that an old backup does not know, and so are never told to end."""
    for path in home.glob("local/launches/*/runner.json"):
        runner = read_json(path)
        if runner is not None and processes.start_ticks(runner["pid"]) == runner["start_ticks"]:
            processes.send(runner["pid"], signal.SIGKILL)


def _job_of(launch: str) -> str:
    return "job_" + launch.removeprefix("run_").rsplit("-", 2)[0]


@contextlib.contextmanager
def environment(given: dict[str, str]) -> Iterator[None]:
    """Within, processes are started with these variables too."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def told(value: object) -> str:
    """JSON in one line, for figures."""
    return json.dumps(value, separators=(", ", ": "))
