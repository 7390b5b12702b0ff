"""The Kubernetes engine keeps the contract of engines, on the cluster that the tester has.

``KUBECONFIG`` says which, ``TIDEMILL_TEST_KUBERNETES`` has settings as ``tidemill join --kubernetes`` takes them: the
namespace, an image with python3 that nodes have or can pull, and the claim ``volumes``, whose content is seen here in the
folder ``TIDEMILL_TEST_KUBERNETES_FOLDER``. Pods reach this machine at ``TIDEMILL_TEST_KUBERNETES_ADDRESS``; on a cluster
of this one machine, ``host_network=yes`` and 127.0.0.1 do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import free_port
from tidemill.engines import pods
from tidemill.engines.kubernetes import ApiRefused, ApiServer, KubernetesEngine
from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.plan import GangPlace, LaunchSpec, ObservedState
from tidemill.ports import Engine
from tidemill.testing.engine import BEGIN, CHECKS, EngineBench, eventually, observed, state
from tidemill.testing.peer import RecordingControlPlane
from tidemill.units import SECOND_NS

SITE = SiteId("contract")
_WANTED = ("KUBECONFIG", "TIDEMILL_TEST_KUBERNETES_FOLDER")


def why_not() -> str:
    """Why there is no cluster to test against; empty when there is one."""
    if find_spec("kubernetes") is None:
        return "the client is not installed: pip install 'tidemill[kubernetes]'"
    missing = [name for name in _WANTED if not os.environ.get(name)]
    return f"there is no Kubernetes cluster to test against: {' and '.join(missing)} not set" if missing else ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@dataclass
class Cluster:
    """The API server, the peer of the pods' runners, and where the claim's content is."""

    api: ApiServer
    settings: pods.KubernetesSettings
    control: RecordingControlPlane
    folder: Path
    node_id: NodeId = NodeId("")
    numbers: Iterator[int] = field(default_factory=lambda: count(int(time.time()) % 10**6 * 100))

    def engine(self, **changes: Any) -> KubernetesEngine:
        return KubernetesEngine(ApiServer(), site_id=SITE, settings=replace(self.settings, **changes))

    @property
    def bench(self) -> EngineBench:
        return EngineBench(
            make=self.engine,
            control=self.control,
            output=lambda spec: self.folder / spec.project_id / spec.job_id / "output",
            node_id=self.node_id,
            _numbers=self.numbers,
        )

    def path(self, kind: str, name: str = "") -> str:
        return f"/api/v1/namespaces/{self.settings.namespace}/{kind}/{name}".rstrip("/")

    def pod(self, spec: LaunchSpec) -> dict[str, Any]:
        found = self.api.find(self.path("pods", pods.object_name(spec.launch_id)))
        assert found is not None
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("kubernetes")
    given = os.environ.get("TIDEMILL_TEST_KUBERNETES", "")
    settings = pods.settings_of(dict(each.split("=", 1) for each in given.split(",") if each))
    address = os.environ.get("TIDEMILL_TEST_KUBERNETES_ADDRESS", "127.0.0.1")
    control = RecordingControlPlane(folder / "endpoint.json", host=address, port=free_port())
    control.start()
    settings = replace(settings, look_ns=0, linger_ns=60 * SECOND_NS)
    made = Cluster(ApiServer(), settings, control, Path(os.environ["TIDEMILL_TEST_KUBERNETES_FOLDER"]))
    engine = made.engine()
    _clean(engine)
    made.node_id = engine.nodes()[0].id
    yield made
    _clean(engine)
    control.stop()


def _clean(engine: Engine) -> None:
    for seen in engine.observe().launches:
        engine.stop(seen.launch_id, node_id=seen.node_id, grace_ns=0)
    eventually(lambda: not _left(engine), timeout_s=90, what="nothing is left")


def _left(engine: Engine) -> tuple[LaunchId, ...]:
    for seen in engine.observe().launches:
        try:
            engine.forget(seen.launch_id, node_id=seen.node_id)
        except (Conflict, EngineLost):
            engine.stop(seen.launch_id, node_id=seen.node_id, grace_ns=0)
    return tuple(seen.launch_id for seen in engine.observe().launches)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[EngineBench], None], cluster: Cluster) -> None:
    check(cluster.bench)
