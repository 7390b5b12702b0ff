"""The Kubernetes engine keeps the contract of engines, on the cluster that the tester has.

``KUBECONFIG`` says which, ``TIDEMILL_TEST_KUBERNETES`` has settings as ``tidemill join --kubernetes`` takes them: the
namespace, an image with python3 that nodes have or can pull, and the claim ``volumes``, whose content is seen here in the
folder ``TIDEMILL_TEST_KUBERNETES_FOLDER``. Pods reach this machine at ``TIDEMILL_TEST_KUBERNETES_ADDRESS``; on a cluster
of this one machine, ``host_network=yes`` and 127.0.0.1 do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cloud import Cloud, free_port
from tests.cloud import eventually as within
from tidemill.cli.sites import _kubernetes
from tidemill.engines import pods
from tidemill.engines.kubernetes import ApiRefused, ApiServer, KubernetesEngine
from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.plan import GangPlace, LaunchSpec, ObservedState
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig
from tidemill.ports import Engine
from tidemill.runner.execs import FrameReader, frame
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


def test_the_rights_of_the_example_are_enough(cluster: Cluster, tmp_path: Path) -> None:
    """A worker from its launch until it is forgotten, as the account of ``examples/kubernetes/rbac.yaml``."""
    engine = KubernetesEngine(_as_outpost(cluster, tmp_path), site_id=SITE, settings=cluster.settings)
    bench = cluster.bench
    assert cluster.node_id in {node.id for node in engine.nodes()}
    spec = bench.spec(BEGIN + "sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, timeout_s=30, what="it is over")
    engine.forget(spec.launch_id, node_id=spec.node_id)
    assert observed(engine, spec.launch_id) is None
    outside = KubernetesEngine(
        _as_outpost(cluster, tmp_path), site_id=SITE, settings=replace(cluster.settings, namespace="default")
    )
    with pytest.raises(EngineRefused, match="forbid"):
        outside.launch(bench.spec("true"))


def _as_outpost(cluster: Cluster, folder: Path) -> ApiServer:
    example = Path(__file__).parents[2] / "examples" / "kubernetes" / "rbac.yaml"
    namespace = cluster.settings.namespace
    text = example.read_text().replace("namespace: tidemill", f"namespace: {namespace}")
    for document in yaml.safe_load_all(text):
        kind, metadata = document["kind"], document["metadata"]
        where = f"namespaces/{metadata['namespace']}/" if "namespace" in metadata else ""
        api = "/apis" if "/" in document["apiVersion"] else "/api"
        plural = {"Namespace": "namespaces"}.get(kind, kind.lower() + "s")
        path = f"{api}/{document['apiVersion']}/{where}{plural}"
        if kind != "Namespace":
            with suppress(ApiRefused):
                cluster.api.ask("DELETE", f"{path}/{metadata['name']}")
            cluster.api.ask("POST", path, document)
    path = cluster.path("serviceaccounts", "tidemill-outpost/token")
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    token = cluster.api.ask("POST", path, request)[0]["status"]["token"]
    known = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    known["users"] = [{"name": user["name"], "user": {"token": token}} for user in known["users"]]
    (folder / "kubeconfig").write_text(yaml.safe_dump(known))
    return ApiServer(kubeconfig=str(folder / "kubeconfig"))


def test_a_pod_that_somebody_deletes_is_ended_with_its_grace_and_started_no_second_time(cluster: Cluster) -> None:
    engine, bench = cluster.engine(), cluster.bench
    spec = bench.spec(
        f"{BEGIN}trap 'echo saved; exit 0' TERM; echo armed; while :; do sleep 0.1; done", grace_ns=5 * SECOND_NS
    )
    engine.launch(spec)
    cluster.control.wait_for(lambda: b"armed" in cluster.control.record(spec.launch_id).log)
    eventually(lambda: cluster.pod(spec)["status"]["phase"] == "Running", what="its node has said so")
    cluster.api.ask("DELETE", cluster.path("pods", pods.object_name(spec.launch_id)))
    exited = cluster.control.wait_for_event(spec.launch_id, "exited", timeout_s=40)
    assert (exited["cause"], exited["detail"]) == ("node_lost", "Kubernetes ended the job that it ran in")
    assert b"saved" in cluster.control.record(spec.launch_id).log
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, timeout_s=40, what="it is over")
    engine.launch(spec)
    assert bench.starts(spec) == 1
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert seen.cause == "node_lost", "the termination message is there still"
    engine.forget(spec.launch_id, node_id=spec.node_id)
    assert observed(engine, spec.launch_id) is None
    eventually(lambda: cluster.api.find(cluster.path("pods", pods.object_name(spec.launch_id))) is None)


def test_a_launch_whose_pod_was_taken_away_is_gone_and_is_made_no_second_time(cluster: Cluster) -> None:
    """Also when somebody takes our finalizer off; for as long as the cluster keeps the Secret."""
    engine, bench = cluster.engine(), cluster.bench
    spec = bench.spec(BEGIN + "sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1, what="it runs")
    name = pods.object_name(spec.launch_id)
    cluster.api.ask("PATCH", cluster.path("secrets", name), {"metadata": {"ownerReferences": None}})
    cluster.api.ask("PATCH", cluster.path("pods", name), {"metadata": {"finalizers": None}})
    cluster.api.ask("DELETE", cluster.path("pods", name), {"gracePeriodSeconds": 1})
    eventually(lambda: cluster.api.find(cluster.path("pods", name)) is None, timeout_s=40, what="the pod is away")
    engine.launch(spec)
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.state, seen.detail) == (ObservedState.GONE, "its pod was removed")
    assert cluster.api.find(cluster.path("pods", name)) is None
    engine.forget(spec.launch_id, node_id=spec.node_id)


def test_what_cannot_begin_is_alive_with_kubernetes_reason_and_can_be_stopped(cluster: Cluster) -> None:
    engine, bench = cluster.engine(), cluster.bench
    image = bench.spec("true", image="localhost/there/is:none")
    room = bench.spec("true", memory_bytes=1 << 50)
    engine.launch(image)
    engine.launch(room)

    def why(spec: LaunchSpec) -> str:
        seen = observed(engine, spec.launch_id)
        return f"{seen.state}: {seen.detail}" if seen else ""

    eventually(lambda: why(image).startswith(("alive: ErrImagePull", "alive: ImagePullBackOff")), timeout_s=60)
    eventually(lambda: why(room).startswith("alive: Unschedulable: 0/"), timeout_s=30)
    for spec in (image, room):
        engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    eventually(lambda: why(room) == "gone: its pod was deleted before it began", timeout_s=5)
    eventually(lambda: why(image) == "gone: it was stopped before it began", timeout_s=60)
    for spec in (image, room):
        engine.forget(spec.launch_id, node_id=spec.node_id)


def test_work_that_needs_too_much_memory_is_told_so(cluster: Cluster) -> None:
    engine, bench = cluster.engine(), cluster.bench
    program = "x = bytearray(600 << 20)"
    spec = bench.spec(f"python3 -c '{program}'", memory_bytes=200 << 20)
    engine.launch(spec)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, timeout_s=40, what="it is over")
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.cause, seen.exit_code) == ("out_of_memory", 137)


def test_an_image_without_python_is_told_so(cluster: Cluster) -> None:
    """The environment of the image is there; where python3 is not found the container says so itself."""
    engine, bench = cluster.engine(), cluster.bench
    spec = bench.spec("true")
    document = pods.pod_of(spec, cluster.settings, SITE, engine._chosen(spec.node_id))
    command = document["spec"]["containers"][0]["command"]
    command[2] = command[2].replace("python3", "python-there-is-none")
    engine._have_runner()
    cluster.api.ask("POST", cluster.path("secrets"), pods.secret_of(spec, cluster.settings, SITE))
    cluster.api.ask("POST", cluster.path("pods"), document)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, timeout_s=40, what="it is over")
    seen = observed(engine, spec.launch_id)
    assert seen is not None
    assert (seen.cause, seen.exit_code) == ("setup_failed", 127)
    assert "no python-there-is-none" in seen.detail


def test_a_crash_between_the_steps_of_a_launch_is_made_good_by_the_next(cluster: Cluster) -> None:
    engine, bench = cluster.engine(), cluster.bench
    spec = bench.spec(BEGIN)
    cluster.api.ask("POST", cluster.path("secrets"), pods.secret_of(spec, cluster.settings, SITE))
    assert observed(engine, spec.launch_id) is None, "written down, and not carried out"
    engine.launch(spec)
    cluster.control.wait_for_event(spec.launch_id, "exited")
    name = pods.object_name(spec.launch_id)
    unmarked = {"metadata": {"labels": {pods.STARTED: None}}}
    cluster.api.ask("PATCH", cluster.path("secrets", name), unmarked)
    engine.launch(spec)
    assert bench.starts(spec) == 1
    secret = cluster.api.find(cluster.path("secrets", name))
    assert secret is not None
    assert secret["metadata"]["labels"][pods.STARTED] == "true"
    assert secret["metadata"]["ownerReferences"][0]["uid"] == cluster.pod(spec)["metadata"]["uid"]


def test_a_stop_that_comes_while_the_pod_is_made_ends_it(cluster: Cluster) -> None:
    engine, bench = cluster.engine(), cluster.bench
    spec = bench.spec(BEGIN + "sleep 600")
    cluster.api.ask("POST", cluster.path("secrets"), pods.secret_of(spec, cluster.settings, SITE))
    pod = pods.pod_of(spec, cluster.settings, SITE, engine._chosen(spec.node_id))
    cluster.api.ask("POST", cluster.path("pods"), pod)
    name = pods.object_name(spec.launch_id)
    stop = {"annotations": {pods.STOP: '{"grace_ns": 0, "at_ns": 1}'}}
    cluster.api.ask("PATCH", cluster.path("secrets", name), {"metadata": stop})
    engine.launch(spec)
    over = (ObservedState.EXITED, ObservedState.GONE)
    eventually(lambda: state(engine, spec.launch_id) in over, timeout_s=60, what="it is over")


def test_pods_of_others_are_capacity_in_use_and_cordoned_nodes_are_said_to_be(cluster: Cluster) -> None:
    engine = cluster.engine()
    before = engine.nodes()[0]
    stranger = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "stranger", "namespace": cluster.settings.namespace},
        "spec": {
            "nodeName": before.name, "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False,
            "containers": [{
                "name": "x", "image": "localhost/there/is:none",
                "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
            }],
        },
    }  # fmt: skip
    node = f"/api/v1/nodes/{before.name}"
    cluster.api.ask("POST", cluster.path("pods"), stranger)
    try:
        cluster.api.ask("PATCH", node, {"spec": {"unschedulable": True}})
        eventually(lambda: "kubernetes=cordoned" in engine.nodes()[0].taints, what="it is cordoned")
        after = engine.nodes()[0]
        assert (before.cpu_milli - after.cpu_milli, before.memory_bytes - after.memory_bytes) == (100, 64 << 20)
    finally:
        cluster.api.ask("PATCH", node, {"spec": {"unschedulable": None}})
        cluster.api.ask("DELETE", cluster.path("pods", "stranger"))


def test_lists_come_in_pages(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, bench = cluster.engine(), cluster.bench
    stopped = sorted(bench.spec("true").launch_id for _ in range(7))
    for launch_id in stopped:
        engine.stop(launch_id, node_id=cluster.node_id, grace_ns=0)
    monkeypatch.setattr("tidemill.engines.kubernetes._PAGE", 2)
    seen = {one.launch_id: one.detail for one in engine.observe().launches}
    assert {seen.get(launch_id) for launch_id in stopped} == {"stopped before it was launched"}
    for launch_id in stopped:
        engine.forget(launch_id, node_id=cluster.node_id)


def test_a_gang_runs_with_one_pod_for_each_rank(cluster: Cluster) -> None:
    engine, bench = cluster.engine(), cluster.bench
    place = GangPlace(node_id=cluster.node_id, cpu_milli=100, gpu_milli=0, memory_bytes=0)
    number = next(cluster.numbers)
    specs = [
        bench.spec(
            BEGIN + "echo rank $TIDEMILL_RANK at $TIDEMILL_NODES", launch_id=LaunchId(f"run_gang{number}-0-1-{rank}"),
            rank=rank, world_size=2, gang=(place, place), cpu_milli=100,
            environment_variables=(("TIDEMILL_RANK", str(rank)), ("TIDEMILL_NODES", "x,y")),
        )
        for rank in range(2)
    ]  # fmt: skip
    for spec in specs:
        engine.launch(spec)
    for rank, spec in enumerate(specs):
        cluster.control.wait_for_event(spec.launch_id, "exited")
        name = pods.gang_name(spec.launch_id)
        wanted = (
            "x,y"
            if cluster.settings.host_network
            else ",".join(f"rank-{at}.{name}.{cluster.settings.namespace}.svc" for at in range(2))
        )
        assert f"rank {rank} at {wanted}" in bytes(cluster.control.record(spec.launch_id).log).decode()


def test_names_in_dns_are_made_for_a_gang_that_has_no_addresses_yet(cluster: Cluster) -> None:
    engine, bench = cluster.engine(host_network=False, api_url="http://control.example.org"), cluster.bench
    place = GangPlace(node_id=cluster.node_id, cpu_milli=100, gpu_milli=0, memory_bytes=0)
    spec = bench.spec(
        "true", launch_id=LaunchId(f"run_named{next(cluster.numbers)}-0-1-0"), world_size=2, gang=(place, place),
        memory_bytes=1 << 50,
    )  # fmt: skip
    engine.launch(spec)
    name = pods.gang_name(spec.launch_id)
    service = cluster.api.find(cluster.path("services", name))
    assert service is not None
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["ownerReferences"][0]["name"] == pods.object_name(spec.launch_id)
    pod = cluster.pod(spec)
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("rank-0", name)
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    engine.forget(spec.launch_id, node_id=spec.node_id)
    eventually(lambda: cluster.api.find(cluster.path("services", name)) is None, timeout_s=60, what="it goes, too")


def test_what_kubernetes_refuses_is_refused_with_its_words(cluster: Cluster) -> None:
    bench = cluster.bench
    with pytest.raises(EngineRefused, match="not found"):
        cluster.engine(namespace="there-is-none").launch(bench.spec("true"))
    with pytest.raises(EngineRefused, match="image"):
        cluster.engine(image=" ").launch(bench.spec("true"))
    with pytest.raises(EngineLost, match="is not in the cluster"):
        cluster.engine().launch(bench.spec("true", node_id=NodeId("node_contract_elsewhere")))


def test_an_api_server_that_does_not_answer_is_no_failure(cluster: Cluster, tmp_path: Path) -> None:
    known = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    known["clusters"] = [
        {**one, "cluster": {"server": f"https://127.0.0.1:{free_port()}"}} for one in known["clusters"]
    ]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(known))
    engine = KubernetesEngine(
        ApiServer(kubeconfig=str(tmp_path / "kubeconfig")), site_id=SITE, settings=cluster.settings
    )
    for ask in (engine.observe, engine.nodes, lambda: engine.launch(cluster.bench.spec("true"))):
        with pytest.raises(EngineLost, match="does not answer"):
            ask()


def test_a_cluster_joins_and_runs_what_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    """Through the real control plane, a real outpost, and the command line's own steps."""
    cloud = Cloud(tmp_path / "head")
    cloud.up()
    home, site = tmp_path / "outpost", f"cluster{next(cluster.numbers)}"
    try:
        assert cloud.call("PUT", f"/v1/sites/{site}", {"engine": "kubernetes"})[0] == 200
        given = os.environ.get("TIDEMILL_TEST_KUBERNETES", "")
        asked = OutpostConfig(
            control_url=f"http://127.0.0.1:{cloud.port}", key="", node_id="", name="platform", address="127.0.0.1",
            settings=tuple(_kubernetes([given])),
        )  # fmt: skip
        joining.join(home, str(cloud.call("POST", f"/v1/sites/{site}/tokens", {})[1]["token"]), asked)
        joining.start_outpost(home)

        def there() -> list[dict[str, Any]]:
            nodes = cloud.call("GET", "/v1/nodes")[1]["items"]
            return [node for node in nodes if node["site"] == site and node["state"] == "ready"]

        node = within(there, within_s=60, what="the cluster's nodes are there")[0]
        spec = {
            "name": "in-a-pod",
            "run": "echo FROM_IMAGE=$FROM_IMAGE on $SLURMD_NODENAME; exit 3",
            "resources": {"cpus": 0.5, "memory": "256MB"},
            "placement": {
                "labels": {"kubernetes.io/hostname": dict(node["labels"])["kubernetes.io/hostname"]},
                "tolerations": [taint for taint in node["taints"] if "kubernetes" not in taint],
            },
        }
        job = cloud.wait(cloud.submit(spec), within_s=90)
        assert (job["state"], job["exit_code"]) == ("failed", 3)
        log = cloud.call("GET", f"/v1/jobs/{job['id']}/logs")[1]
        assert f"on {node['name']}".encode() in (log if isinstance(log, bytes) else str(log).encode())
        held = cloud.submit({**spec, "name": "held", "run": "sleep 600"})
        cloud.wait(held, "running", within_s=90)
        assert cloud.call("POST", f"/v1/jobs/{held}/stop", {})[0] in (200, 202)
        assert cloud.wait(held, within_s=60)["state"] == "cancelled"
        within(lambda: not _launches(cluster, site), within_s=60, what="nothing is left in the cluster")
    finally:
        cloud.down()
        joining.stop_outpost(home)


def _launches(cluster: Cluster, site_id: str) -> list[str]:
    found = cluster.api.everything(cluster.path("pods"))
    return [pod["metadata"]["name"] for pod in found if site_id in pod["metadata"].get("labels", {}).get(pods.SITE, "")]


def test_commands_run_inside_a_worker(cluster: Cluster) -> None:
    bench, engine = cluster.bench, cluster.engine()
    spec = bench.spec(BEGIN + "export SAID=yes; sleep 600")
    engine.launch(spec)
    cluster.control.wait_for_event(spec.launch_id, "started")
    request = {
        "type": "exec",
        "exec_id": f"exec_{spec.launch_id}",
        "command": ["sh", "-c", "echo in $TIDEMILL_LAUNCH_ID"],
    }
    record = cluster.control.command(spec.launch_id, request)
    cluster.control.feed(f"exec_{spec.launch_id}", frame(b"c"), close=True)
    assert cluster.control.wait_for(lambda: record.output_ended), bytes(record.output)
    frames = list(FrameReader().feed(bytes(record.output)))
    assert frames[0] == (b"o", f"in {spec.launch_id}\n".encode())
    assert frames[-1] == (b"x", b"0")
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, timeout_s=30, what="it is over")
