"""A local engine with a recording control plane, for tests of the engine and its runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidemill.engines.local import LocalEngine, LocalSettings
from tidemill.model.fleet import Node, NodeState
from tidemill.model.ids import NodeId, SiteId
from tidemill.model.plan import ObservedState
from tidemill.runner.folders import LaunchFolder, read_json
from tidemill.testing.engine import EngineBench, eventually
from tidemill.testing.peer import RecordingControlPlane


def a_node() -> Node:
    """This machine, more or less."""
    return Node(
        id=NodeId("node_test"), site_id=SiteId("site_test"), name="here", state=NodeState.READY, version=0,
        boot_id="", address="127.0.0.1", cpu_milli=4_000, memory_bytes=8 * 10**9, disk_bytes=10**10,
    )  # fmt: skip


@contextmanager
def local_bench(folder: Path, *, sandbox: str = "auto", **settings: int) -> Iterator[EngineBench]:
    """A bench whose every launch is over when it is left."""
    control = RecordingControlPlane(folder / "endpoint.json")
    control.start()
    values = {"beat_ns": 200_000_000, "linger_ns": 30 * 10**9, **settings}

    def make() -> LocalEngine:
        return LocalEngine(
            folder / "local", endpoint_file=folder / "endpoint.json", node=a_node,
            settings=LocalSettings(sandbox=sandbox, **values),
        )  # fmt: skip

    volumes = folder / "local" / "volumes"
    yield EngineBench(
        make=make, control=control, output=lambda spec: volumes / spec.project_id / spec.job_id / "output"
    )
    if not control.serving:
        control.start()
    last = make()
    for seen in last.observe().launches:
        control.fenced.add(seen.launch_id)
        last.stop(seen.launch_id, node_id=last.node_id, grace_ns=0)
    eventually(
        lambda: all(seen.state is not ObservedState.ALIVE for seen in last.observe().launches), what="all is over"
    )
    last.close()
    control.stop()


def launch_folder(folder: Path, launch_id: str) -> LaunchFolder:
    """The folder of a launch of the bench in ``folder``."""
    return LaunchFolder(folder / "local" / "launches" / launch_id)


def runner_pid(folder: Path, launch_id: str) -> int:
    """The process id of a launch's runner, once it is there."""
    place = launch_folder(folder, launch_id).runner
    eventually(lambda: read_json(place) is not None, what="the runner is there")
    return int((read_json(place) or {})["pid"])
