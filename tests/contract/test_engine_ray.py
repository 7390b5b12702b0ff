"""The Ray engine keeps the contract of engines, on a real cluster: a head and a second machine, here on one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psutil
import pytest

from tests.cloud import free_port
from tidemill.engines.ray import RayEngine
from tidemill.errors import EngineLost
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.plan import GangPlace, ObservedState
from tidemill.outpost.config import OutpostConfig, write_config
from tidemill.outpost.ray import NodeAgent, head, member, new_token
from tidemill.testing.engine import BEGIN, CHECKS, EngineBench, eventually, state
from tidemill.testing.peer import RecordingControlPlane

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'tidemill[ray]'")
"""It is looked for and not imported: the first import decides which cluster's token this process presents."""
A, B = NodeId("node_aaaaaaaaaaaaaaaa"), NodeId("node_bbbbbbbbbbbbbbbb")


class Shared(RayEngine):
    """An engine whose driver stays when it is closed: a process can have one only."""

    def close(self) -> None: ...


@dataclass
class Cluster:
    """A cluster of two machines, each with its own home, and the peer of their runners."""

    folder: Path
    address: str
    token: str
    control: RecordingControlPlane
    numbers: Iterator[int] = field(default_factory=count)

    def engine(self) -> RayEngine:
        return Shared(self.address, NodeAgent, token=self.token)

    def bench(self, node_id: NodeId = A) -> EngineBench:
        volumes = self.folder / node_id / "local" / "volumes"
        return EngineBench(
            make=self.engine,
            control=self.control,
            output=lambda spec: volumes / spec.project_id / spec.job_id / "output",
            node_id=node_id,
            _numbers=self.numbers,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    control = RecordingControlPlane(folder / "endpoint.json")
    control.start()
    token, port = new_token(), str(free_port())
    one = OutpostConfig(
        control_url=control.url, key="a", node_id=A, name="a", engine="ray-head", address="127.0.0.1",
        settings=(("ray_port", port), ("ray_token", token)),
    )  # fmt: skip
    with ExitStack() as stack:
        write_config(folder / A, one)
        address = stack.enter_context(head(folder / A, one))
        made = Cluster(folder, address, token, control)
        eventually(lambda: _there(made) == {A}, timeout_s=60, what="the head is there")
        two = replace(one, node_id=B, name="b", engine="ray", settings=(("ray_address", address), ("ray_token", token)))
        write_config(folder / B, two)
        stack.enter_context(member(folder / B, two))
        eventually(lambda: _there(made) == {A, B}, timeout_s=60, what="both machines are there")
        for home in (folder / A, folder / B):
            (home / "endpoint.json").unlink()  # the peer of the runners comes back at another port
            (home / "endpoint.json").symlink_to(folder / "endpoint.json")
        yield made
        RayEngine.close(made.engine())
    control.stop()


def _there(cluster: Cluster) -> frozenset[NodeId]:
    try:
        return cluster.engine().observe().nodes
    except EngineLost:
        return frozenset()


def _is_over(engine: RayEngine, launch_id: LaunchId) -> bool:
    return state(engine, launch_id) is not ObservedState.ALIVE


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[EngineBench], None], cluster: Cluster) -> None:
    check(cluster.bench())


def test_each_machine_does_its_own(cluster: Cluster) -> None:
    engine = cluster.engine()
    assert {node.id for node in engine.nodes()} == {A, B}
    for node_id in (A, B):
        bench = cluster.bench(node_id)
        spec = bench.spec(BEGIN)
        engine.launch(spec)
        cluster.control.wait_for_event(spec.launch_id, "exited")
        assert bench.starts(spec) == 1


def test_a_machine_learns_where_the_other_control_planes_are(cluster: Cluster, tmp_path: Path) -> None:
    engine, endpoint = cluster.engine(), cluster.folder / B / "endpoint.json"
    spec = cluster.bench(B).spec(BEGIN)
    other = RecordingControlPlane(tmp_path / "endpoint.json")
    other.start()
    cluster.control.stop()
    try:
        engine.replicas = (cluster.control.url, other.url)
        engine.observe()
        assert json.loads(endpoint.read_text())["others"] == [cluster.control.url, other.url]
        engine.launch(spec)
        other.wait_for_event(spec.launch_id, "exited")
    finally:
        engine.replicas = ()
        cluster.control.start()
        other.stop()
        endpoint.unlink()
        endpoint.symlink_to(cluster.folder / "endpoint.json")


def test_a_gang_holds_room_in_ray_until_it_is_forgotten(cluster: Cluster) -> None:
    from ray.util.placement_group import placement_group_table

    engine = cluster.engine()
    places = tuple(GangPlace(node_id=node, cpu_milli=1_000, gpu_milli=0, memory_bytes=0) for node in (A, B))
    specs = [
        cluster.bench(node).spec(
            BEGIN + "sleep 600", launch_id=LaunchId(f"run_gang-0-1-{rank}"), rank=rank, world_size=2, gang=places
        )
        for rank, node in enumerate((A, B))
    ]
    for spec in specs:
        engine.launch(spec)
    [held] = [group for group in placement_group_table().values() if group["name"] == "gang-run_gang-0-1"]
    assert held["state"] == "CREATED"
    assert sorted(key for bundle in held["bundles"].values() for key in bundle if key != "CPU") == [
        f"tidemill:{A}", f"tidemill:{B}",
    ]  # fmt: skip
    for spec in specs:
        engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
        eventually(partial(_is_over, engine, spec.launch_id), what="it is over")
        engine.forget(spec.launch_id, node_id=spec.node_id)
    left = [group for group in placement_group_table().values() if group["name"] == "gang-run_gang-0-1"]
    assert all(group["state"] == "REMOVED" for group in left)


def test_what_runs_outlives_its_agent_and_its_raylet(cluster: Cluster) -> None:
    """kill -9 of both: the worker runs on, is found again, and is started once."""
    engine, bench = cluster.engine(), cluster.bench(B)
    spec = bench.spec(BEGIN + "sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    for process in psutil.process_iter(["cmdline", "name"]):
        if "raylet" in process.info["name"] and B in " ".join(process.info["cmdline"] or ()):
            os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: B not in _there(cluster), timeout_s=60, what="the machine is out of sight")
    eventually(lambda: B in _there(cluster), timeout_s=90, what="the machine is back")
    assert state(engine, spec.launch_id) is ObservedState.ALIVE
    engine.launch(spec)
    time.sleep(0.3)
    assert bench.starts(spec) == 1
    engine.stop(spec.launch_id, node_id=B, grace_ns=0)
    eventually(partial(_is_over, engine, spec.launch_id), what="it is over")


def test_a_machine_that_is_not_there_is_no_failure(cluster: Cluster) -> None:
    with pytest.raises(EngineLost, match="not in the Ray cluster"):
        cluster.engine().forget(LaunchId("run_x-0-1-0"), node_id=NodeId("node_nowhere"))


@pytest.mark.long
@pytest.mark.parametrize("token", ["", new_token()], ids=["without a token", "with another's token"])
def test_whoever_has_not_the_token_is_no_part_of_the_cluster(cluster: Cluster, token: str) -> None:
    """Neither as a machine nor as a driver."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    environment = {**ours, **given, "HOME": str(cluster.folder / "nobody"), "RAY_USAGE_STATS_ENABLED": "0"}
    script = "import sys, ray; ray.init(address=sys.argv[1]); print('in')"
    before = len(_alive())
    machine = [
        str(Path(sys.executable).with_name("ray")), "start", "--address", cluster.address, "--node-ip-address",
        "127.0.0.1", "--num-cpus", "1", "--temp-dir", str(cluster.folder / "r"), "--block",
    ]  # fmt: skip
    for command in (machine, [sys.executable, "-c", script, cluster.address]):
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "in\n" not in done.stdout
        assert re.search("token|Unauthenticated|authenticat", done.stdout + done.stderr, re.IGNORECASE)
    assert len(_alive()) == before


def _alive() -> list[str]:
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]
