"""A cloud over several machines whose links are cut and mended: real Ray nodes, each in a network namespace of its own.

Ground truth is outside: a journal that each worker writes durably while it runs, with the time of a clock that all
share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests import namespaces
from tests.cloud import Cloud, eventually
from tests.namespaces import Network
from tidemill.outpost.config import read_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'tidemill[ray]'"),
    pytest.mark.skipif(bool(namespaces.why_not("iptables")), reason=namespaces.why_not("iptables")),
]
TICKING = (
    "echo $TIDEMILL_ATTEMPT begin $(cut -d' ' -f1 /proc/uptime) >> $TIDEMILL_OUTPUT_DIR/journal; sync; while true; do "
    "echo $TIDEMILL_ATTEMPT tick $(cut -d' ' -f1 /proc/uptime) >> $TIDEMILL_OUTPUT_DIR/journal; sleep 0.1; done"
)
GANG = """
import os, socket
rank, first = int(os.environ["TIDEMILL_RANK"]), os.environ["MASTER_ADDR"]
if rank == 0:
    server = socket.create_server((first, int(os.environ["MASTER_PORT"])))
    other, where = server.accept()
    print("rank 0 at", first, "heard", other.recv(100).decode(), "from", where[0], flush=True)
else:
    import time
    for _ in range(100):
        try:
            link = socket.create_connection((first, int(os.environ["MASTER_PORT"])), timeout=5)
            break
        except OSError:
            time.sleep(0.1)
    link.sendall(f"rank {rank}".encode())
    link.close()
"""
TIDEMILL = str(Path(sys.executable).with_name("tidemill"))
READY_S = 150.0


class Machines:
    """The machines of one cloud: ``head`` with the control plane and Ray's head, and those that joined."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network()
        self.driver = namespaces.standin_driver(folder / "driver")
        self.address = self.network.add("head")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.cloud = Cloud(
            folder / "head", engine="ray", host="0.0.0.0", address=self.address, site="rack",
        )  # fmt: skip

    def up(self) -> None:
        """Start the control plane and Ray's head; this thread is on the head from now on."""
        with self._as("head"):
            self.cloud.up()

    def join(self, name: str, address: str, *more: str, site: str = "rack") -> None:
        """Have a machine join with the command line, as an administrator does there, and stay until it is ended."""
        status, made = self.cloud.call("POST", f"/v1/sites/{site}/tokens", {})
        assert status == 201, made
        command = [
            TIDEMILL, "join", f"{self.address}:{self.cloud.port}",
            "--home", str(self.folder / name), "--name", name, "--address", address, "--foreground", *more,
        ]  # fmt: skip
        with self._as(name), self.network.inside(name), (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, env={**os.environ, "TIDEMILL_JOIN_TOKEN": made["token"]}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @contextlib.contextmanager
    def _as(self, name: str) -> Iterator[None]:
        """What is started meanwhile sees two GPUs that bear the machine's name."""
        given = {"LD_LIBRARY_PATH": self.driver, "STANDIN_GPUS": "2", "STANDIN_NAME": name} if self.driver else {}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in given.items():
                patch.setenv(key, value)
            yield

    def states(self) -> dict[str, str]:
        found = self.cloud.call("GET", "/v1/nodes")[1]["items"]
        return {node["name"]: node["state"] for node in found}

    def node(self, name: str) -> dict[str, Any]:
        found = self.cloud.call("GET", "/v1/nodes")[1]["items"]
        return next((dict(node) for node in found if node["name"] == name), {})

    def until(self, name: str, state: str, *, within_s: float = READY_S) -> None:
        eventually(lambda: self.states().get(name) == state, within_s=within_s, what=f"{name} is {state}")

    def where(self, job: str) -> list[str]:
        return [str(worker["node"]) for worker in self.cloud.job(job)["workers"]]

    def journal(self, job: str) -> list[tuple[str, int, str, float]]:
        """Machine, attempt, what, and when, of every line that the job's workers wrote."""
        found = []
        for path in self.folder.glob(f"*/**/volumes/*/{job}/output/journal"):
            name = path.relative_to(self.folder).parts[0]
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last one may be half written
                    attempt, what, at = line.split()
                    found.append((name, int(attempt), what, float(at)))
        return sorted(found, key=lambda each: each[3])

    def close(self) -> None:
        self.cloud.down()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self.network.close()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    made = Machines(tmp_path_factory.mktemp("machines"))
    with made.network.inside("head"):
        try:
            made.up()
            eventually(made.states, within_s=READY_S, what="the head's machine is there")
            for name in ("one", "two"):
                made.join(name, made.network.add(name))
            for name in ("one", "two"):
                made.until(name, "ready")
            yield made
        finally:
            made.close()


@pytest.fixture
def pair(machines: Machines) -> Iterator[Machines]:
    """The same, with the head's own machine left out, so that work goes to the two that can be cut off."""
    own = next(name for name in machines.states() if name not in ("one", "two", "edge"))
    assert machines.cloud.call("POST", f"/v1/nodes/{own}/mark", {"marking": "cordon"})[0] == 200
    yield machines
    machines.cloud.call("POST", f"/v1/nodes/{own}/mark", {"marking": "resume"})
    for name in ("one", "two"):
        machines.network.mend(name)
        machines.until(name, "ready")


def lease(machines: Machines, length: str) -> None:
    """Start the control plane again, with that lease for what is started from now on."""
    machines.cloud.kill()
    machines.cloud.settings["lease"] = length
    machines.up()
    for name in ("one", "two"):
        machines.until(name, "ready")


def end(machines: Machines, job: str) -> None:
    machines.cloud.call("POST", f"/v1/jobs/{job}/stop")
    machines.cloud.wait(job, within_s=60)


def test_machines_join_across_networks_with_what_they_have(machines: Machines) -> None:
    for name, address in (("one", "10.77.0.2"), ("two", "10.77.0.3")):
        assert read_config(machines.folder / name).address == address
        if machines.driver:
            devices = machines.node(name)["devices"]
            assert [device["id"] for device in devices] == [f"GPU-{name}-0", f"GPU-{name}-1"]


def test_a_gang_over_two_machines_talks_and_each_rank_has_its_own_devices(pair: Machines) -> None:
    gpus = "2" if pair.driver else "none"
    job = pair.cloud.submit(
        {
            "name": "gang", "nodes": 2, "resources": {"cpus": 0.5, "gpus": gpus},
            "run": f"echo devices $CUDA_VISIBLE_DEVICES; python3 - <<'END'\n{GANG}\nEND",
        }
    )  # fmt: skip
    ended = pair.cloud.wait(job, within_s=90)
    logs = {rank: pair.cloud.logs(job, rank).decode() for rank in (0, 1)}
    assert ended["state"] == "succeeded", logs
    names = [worker["node"] for worker in sorted(ended["workers"], key=lambda worker: worker["rank"])]
    assert sorted(names) == ["one", "two"]
    addresses = [read_config(pair.folder / name).address for name in names]
    assert f"rank 0 at {addresses[0]} heard rank 1 from {addresses[1]}" in logs[0]
    for rank, name in enumerate(names):
        assert not pair.driver or f"devices GPU-{name}-0,GPU-{name}-1" in logs[rank]


def test_a_cut_shorter_than_the_lease_changes_nothing(pair: Machines) -> None:
    """For long enough that Ray gives the machine up and it is silent; its worker runs on, and is the only one."""
    lease(pair, "3m")
    job = pair.cloud.submit({"name": "kept", "run": TICKING, "resources": {"cpus": 0.2}, "retry": 3})
    pair.cloud.wait(job, "running", within_s=60)
    [where] = pair.where(job)
    eventually(lambda: pair.journal(job), within_s=30, what="it begins")
    pair.network.cut(where)
    pair.until(where, "silent", within_s=90)
    other = "two" if where == "one" else "one"
    beside = pair.cloud.submit({"name": "beside", "run": "true", "resources": {"cpus": 0.2}})
    assert pair.cloud.wait(beside, within_s=60)["state"] == "succeeded"
    assert pair.where(beside) == [other]
    time.sleep(max(0.0, 45.0 - (pair.journal(job)[-1][3] - pair.journal(job)[0][3])))
    at_mending = time.clock_gettime(time.CLOCK_BOOTTIME)
    pair.network.mend(where)
    pair.until(where, "ready", within_s=120)
    eventually(lambda: pair.journal(job)[-1][3] > at_mending + 3, within_s=30, what="it ticks on")
    journal = pair.journal(job)
    assert [(name, attempt) for name, attempt, what, _ in journal if what == "begin"] == [(where, 1)]
    assert max(later[3] - sooner[3] for sooner, later in itertools.pairwise(journal)) < 5
    assert (pair.cloud.job(job)["state"], pair.cloud.job(job)["attempts"]) == ("running", 1)
    end(pair, job)


def test_a_cut_longer_than_the_lease_moves_the_job_and_nothing_runs_twice(pair: Machines) -> None:
    lease(pair, "8s")
    job = pair.cloud.submit(
        {"name": "moved", "run": TICKING, "resources": {"cpus": 0.2}, "retry": 3, "checkpoint": {"grace": "2s"}}
    )
    pair.cloud.wait(job, "running", within_s=60)
    [where] = pair.where(job)
    eventually(lambda: pair.journal(job), within_s=30, what="it begins")
    pair.network.cut(where)
    eventually(lambda: pair.cloud.job(job)["attempts"] == 2, within_s=120, what="it is tried again")
    pair.cloud.wait(job, "running", within_s=60)
    eventually(lambda: pair.journal(job)[-1][1] == 2, within_s=30, what="it runs elsewhere")
    pair.network.mend(where)
    pair.until(where, "ready", within_s=120)
    time.sleep(3)
    begun = [(name, attempt) for name, attempt, what, _ in pair.journal(job) if what == "begin"]
    other = "two" if where == "one" else "one"
    assert begun == [(where, 1), (other, 2)]
    first, second = ([at for _, number, _, at in pair.journal(job) if number == attempt] for attempt in (1, 2))
    assert max(first) < min(second)
    assert pair.cloud.job(job)["attempt_list"][0]["cause"] == "node_lost"
    assert pair.cloud.job(job)["state"] == "running"
    end(pair, job)


def test_a_machine_behind_a_router_that_lets_nobody_in_does_its_work(machines: Machines) -> None:
    """Its outpost and its runners only dial out: jobs run, logs arrive, commands reach the worker, stops too."""
    machines.network.add("router")
    address = machines.network.add_behind("router", "edge")
    machines.network.refuse_inbound("edge")
    assert machines.cloud.call("PUT", "/v1/sites/field", {"kind": "edge", "lease": "1h"})[0] in (200, 201)
    machines.join("edge", address, "--label", "where=field", site="field")
    machines.until("edge", "ready")
    with machines.network.inside("edge"):
        server = socket.create_server(("", 0))
    for there in (address, "10.77.0.4"):
        with pytest.raises(OSError, match=r"timed out|unreachable"):
            socket.create_connection((there, server.getsockname()[1]), timeout=1.0)
    server.close()
    spec = {"name": "edge", "resources": {"cpus": 0.1}, "placement": {"labels": {"where": "field"}}}
    said = machines.cloud.submit({**spec, "run": "echo hello from $(hostname)"})
    assert machines.cloud.wait(said, within_s=60)["state"] == "succeeded"
    assert machines.cloud.logs(said).startswith(b"hello from ")
    assert machines.where(said) == ["edge"]
    job = machines.cloud.submit({**spec, "run": TICKING})
    machines.cloud.wait(job, "running", within_s=60)
    command = [TIDEMILL, "exec", job, "--", "echo", "in", "the", "worker"]
    environment = {
        **os.environ, "TIDEMILL_API_URL": f"http://127.0.0.1:{machines.cloud.port}",
        "TIDEMILL_TOKEN": machines.cloud.token,
    }  # fmt: skip
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "in the worker\n"), done.stderr
    end(machines, job)
