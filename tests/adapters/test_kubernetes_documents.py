"""What is written for Kubernetes is what its published schemas and its own client take; what it says is read rightly."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.test_engine_simulated import launch_spec
from tidemill.cli.sites import _kubernetes
from tidemill.engines import clusterview, pods
from tidemill.engines.kubernetes import ApiServer, KubernetesEngine
from tidemill.engines.pods import Chosen, KubernetesSettings
from tidemill.errors import EngineLost, EngineRefused, InvalidRequest, InvalidSetting
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.plan import GangPlace, LaunchSpec, ObservedState
from tidemill.model.spec import Port
from tidemill.runner import podstep
from tidemill.runner.folders import LaunchFolder, read_json
from tidemill.units import SECOND_NS

kubernetes = pytest.importorskip("kubernetes", reason="pip install 'tidemill[kubernetes]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="a test dependency")

SITE = "centre"
PLAIN = KubernetesSettings()
QUEUED = KubernetesSettings(queue="gpus", priority_class="high", runtime_class="nvidia", service_account="worker")
ON_HOST = KubernetesSettings(host_network=True, volumes="shared", image="registry.example.org/python:3.12")
PLACE = GangPlace(node_id=NodeId("node_centre_n1"), cpu_milli=1_000, gpu_milli=0, memory_bytes=0)
NODE = Chosen(name="n1", taints=(("gpu", "yes", "NoSchedule"), ("node.kubernetes.io/unschedulable", "", "NoSchedule")))


def spec_of(**changes: Any) -> LaunchSpec:
    base = launch_spec(
        launch_id=LaunchId("run_06bq-0-1-0"), node_id=NodeId("node_centre_n1"), runner_token="tm_run_secret",
        job_token="tm_job_secret", api_url="http://10.0.0.1:7070",
    )  # fmt: skip
    return replace(base, **changes)


def gpus(count: int) -> tuple[tuple[str, int], ...]:
    return tuple((f"n1/nvidia/NVIDIA-H100-80GB-HBM3/{number}", 1_000) for number in range(count))


SPECS = {
    "plain": spec_of(),
    "everything": spec_of(
        devices=gpus(2), memory_bytes=8 << 30, disk_bytes=1 << 30, cpu_milli=2_500, max_duration_ns=3600 * SECOND_NS,
        grace_ns=90 * SECOND_NS, rendezvous_port=29_500, gang=(PLACE, PLACE), world_size=2, image="pytorch:2",
        ports=(Port(name="a-port-with-a-long-name", number=8_000), Port(name="same", number=8_000)),
    ),
}  # fmt: skip
SETTINGS = {"plain": PLAIN, "queued": QUEUED, "on the host": ON_HOST}


def documents(spec: LaunchSpec, settings: KubernetesSettings) -> list[dict[str, Any]]:
    pod = pods.pod_of(spec, settings, SITE, None if settings.queue else NODE)
    made = {**pod, "metadata": {**pod["metadata"], "uid": "u-1"}}
    return [
        pod,
        pods.secret_of(spec, settings, SITE),
        pods.tombstone_of(spec.launch_id, settings, SITE, node_id="n", stop='{"grace_ns": 0}'),
        pods.service_of(spec, settings, SITE, owner=made),
        pods.runner_map(settings.namespace),
    ]


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("version", ["1.25", "1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_documents_keep_to_the_published_schemas(spec: LaunchSpec, settings: KubernetesSettings, version: str) -> None:
    for document in documents(spec, settings):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_catch_a_field_that_there_is_not() -> None:
    pod = pods.pod_of(spec_of(), PLAIN, SITE, NODE)
    pod["spec"]["terminationGracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.31", strict=True)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_official_clients_models_say_the_same_documents(spec: LaunchSpec, settings: KubernetesSettings) -> None:
    for document in documents(spec, settings):
        model = getattr(kubernetes.client, f"V1{document['kind']}")
        assert as_sent(model.from_dict(document)) == document


def as_sent(model: Any) -> dict[str, Any]:
    """A model of the official client as it is sent."""
    return dict(json.loads(json.dumps(kubernetes.client.ApiClient().sanitize_for_serialization(model))))


def test_the_example_of_rights_keeps_to_the_schemas_and_has_no_right_that_is_not_needed() -> None:
    example = Path(__file__).parents[2] / "examples" / "kubernetes" / "rbac.yaml"
    verbs: dict[tuple[str, str], list[str]] = {}
    for document in yaml.safe_load_all(example.read_text()):
        kubernetes_validate.validate(document, "1.31", strict=True)
        for rule in document.get("rules", ()):
            assert rule["apiGroups"] == [""]
            for resource in rule["resources"]:
                verbs[document["kind"], resource] = rule["verbs"]
    assert verbs == {
        ("Role", "pods"): ["get", "list", "create", "patch", "delete"],
        ("Role", "secrets"): ["get", "list", "create", "patch", "delete"],
        ("Role", "configmaps"): ["get", "create"],
        ("Role", "services"): ["create"],
        ("ClusterRole", "nodes"): ["get", "list"],
        ("ClusterRole", "pods"): ["list"],
    }


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_in_the_secret_only(settings: KubernetesSettings) -> None:
    pod, secret, *rest = documents(SPECS["everything"], settings)
    content = base64.b64decode(secret["data"]["spec.json"]).decode()
    for token in ("tm_run_secret", "tm_job_secret"):
        assert token in content
        assert token not in json.dumps([pod, *rest])


def test_a_pod_keeps_to_the_restricted_level() -> None:
    """Source: Kubernetes, "Pod Security Standards", the table of the restricted profile."""
    body = pods.pod_of(SPECS["everything"], PLAIN, SITE, NODE)["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & body.keys()
    assert body["securityContext"]["runAsNonRoot"] is True
    assert body["securityContext"]["runAsUser"] > 0
    assert body["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert body["automountServiceAccountToken"] is False
    allowed = {"configMap", "secret", "downwardAPI", "emptyDir", "persistentVolumeClaim"}
    assert {key for volume in body["volumes"] for key in volume} - {"name"} <= allowed
    for container in body["containers"]:
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert all("hostPort" not in port for port in container["ports"])


def test_what_is_asked_for_is_what_the_pod_asks_for() -> None:
    body = pods.pod_of(SPECS["everything"], PLAIN, SITE, NODE)["spec"]
    [container] = body["containers"]
    wanted = {
        "cpu": "2500m", "memory": str(8 << 30), "ephemeral-storage": str(1 << 30), "nvidia.com/gpu": "2",
    }  # fmt: skip
    assert container["resources"] == {"requests": wanted, "limits": wanted}
    assert container["image"] == "pytorch:2"
    assert [port["containerPort"] for port in container["ports"]] == [8_000]
    assert body["terminationGracePeriodSeconds"] >= 90
    assert body["activeDeadlineSeconds"] > 3_690
    [shm] = [volume for volume in body["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": str(4 << 30)}


def test_a_pod_is_pinned_to_the_chosen_node_and_puts_up_with_its_taints_but_not_with_cordons() -> None:
    body = pods.pod_of(spec_of(), PLAIN, SITE, NODE)["spec"]
    [term] = body["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}
    kept = {(each["key"], each["effect"]) for each in body["tolerations"]}
    assert ("gpu", "NoSchedule") in kept
    assert ("node.kubernetes.io/unreachable", "NoExecute") in kept
    assert not any(key == "node.kubernetes.io/unschedulable" for key, _ in kept)


def test_a_gang_is_one_pod_group_for_kueue_and_its_pods_are_alike() -> None:
    """Kueue counts pods of one shape as one role: what differs by rank is nothing that it looks at."""
    made = [
        pods.pod_of(
            spec_of(launch_id=LaunchId(f"run_a-0-1-{rank}"), rank=rank, gang=(PLACE, PLACE)), QUEUED, SITE, None
        )
        for rank in range(2)
    ]
    groups = {pod["metadata"]["labels"]["kueue.x-k8s.io/pod-group-name"] for pod in made}
    assert groups == {pods.gang_name("run_a-0-1-0")}
    for pod in made:
        assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        assert pod["metadata"]["annotations"]["kueue.x-k8s.io/pod-group-total-count"] == "2"
        assert "affinity" not in pod["spec"]
    shapes = [{key: value for key, value in pod["spec"].items() if key not in ("hostname", "volumes")} for pod in made]
    assert shapes[0] == shapes[1]


def test_what_kubernetes_cannot_give_is_refused_with_the_mend() -> None:
    with pytest.raises(EngineRefused, match="whole GPUs"):
        pods.refuse(spec_of(devices=(("n1/nvidia/x/0", 500),)))
    with pytest.raises(EngineRefused, match="one vendor"):
        pods.refuse(spec_of(devices=(("n1/nvidia/x/0", 1_000), ("n1/amd/y/0", 1_000))))
    for name in ("", "-a", "a" * 64, "a b", "ä"):
        with pytest.raises(EngineRefused, match="label"):
            pods.refuse(spec_of(launch_id=LaunchId(name)))


IDS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", fullmatch=True)


def check_names(name: Callable[[str], str], one: str, other: str) -> None:
    for each in (one, other):
        made = name(each)
        assert len(made) <= 63
        assert made[0].isalpha()
        assert made[-1].isalnum()
        assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert (name(one) == name(other)) == (one == other)


@given(IDS, IDS)
def test_names_are_names_of_hosts_and_no_two_launches_share_one(one: str, other: str) -> None:
    check_names(pods.object_name, one, other)


def test_the_property_catches_names_that_only_replace_letters() -> None:
    with pytest.raises(AssertionError):
        check_names(lambda text: text.lower().replace("_", "-"), "run_a", "run-a")


# ------------------------------------------------------------------ the runner


def test_the_runner_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    archive = tmp_path / "runner.pyz"
    archive.write_bytes(pods.runner_archive())
    code = f"import sys; sys.path.insert(0, {str(archive)!r}); import tidemill.runner.podstep as p; print(p.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.startswith(str(archive))
    assert len(pods.runner_map("x")["binaryData"]["runner.pyz"]) < 900_000, "a ConfigMap holds 1 MiB"
    pods.runner_archive.cache_clear()
    assert archive.read_bytes() == pods.runner_archive(), "the same bytes for the same code"


def test_the_script_of_the_container_finds_a_python_or_says_that_there_is_none(tmp_path: Path) -> None:
    script = pods.pod_of(spec_of(), PLAIN, SITE, NODE)["spec"]["containers"][0]["command"][2]
    word = tmp_path / "word"
    script = script.replace("/dev/termination-log", str(word)).replace("/usr/local/bin/python3", "/none")
    done = subprocess.run(["/bin/sh", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, check=False)
    assert done.returncode == 127
    told = json.loads(word.read_text())
    assert (told["exit_code"], told["cause"]) == (127, "setup_failed")
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo started "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(["/bin/sh", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, check=True)
    assert done.stdout == b"started -I /tidemill/runner/runner.pyz\n"


def test_a_launch_gets_what_the_pod_knows() -> None:
    secret = pods.secret_of(
        spec_of(
            devices=gpus(2), gang=(PLACE, PLACE), rank=1,
            environment_variables=(("MASTER_ADDR", "x"), ("TIDEMILL_NODES", "x,y"), ("MODE", "job")),
        ),
        PLAIN, SITE,
    )  # fmt: skip
    content = json.loads(base64.b64decode(secret["data"]["spec.json"]))
    pod = {
        "PATH": "/opt/conda/bin:/usr/bin", "MODE": "image", "HF_HOME": "/models", "HOSTNAME": "pod", "HOME": "/root",
        "KUBERNETES_SERVICE_HOST": "10.96.0.1", "POD_IP": "10.1.2.3",
        "NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b",
    }  # fmt: skip
    made = podstep.placed(content, pod)
    variables = dict(made["environment_variables"])
    assert variables["MODE"] == "job", "what the job sets wins over its image"
    assert (variables["HF_HOME"], variables["PATH"]) == ("/models", "/opt/conda/bin:/usr/bin")
    assert not {"HOME", "HOSTNAME", "KUBERNETES_SERVICE_HOST", "POD_IP"} & variables.keys()
    name = pods.gang_name("run_06bq-0-1-0")
    assert variables["MASTER_ADDR"] == f"rank-0.{name}.tidemill.svc"
    assert variables["TIDEMILL_NODES"] == f"rank-0.{name}.tidemill.svc,rank-1.{name}.tidemill.svc"
    assert made["devices"] == [["GPU-a", 1_000], ["GPU-b", 1_000]]
    assert made["runner"]["address"] == "10.1.2.3"


@pytest.mark.parametrize(
    ("count", "told", "names"),
    [
        (2, "GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
        (2, "void", ["0", "1"]),
        (1, "all", ["0"]),
        (1, "runtime.nvidia.com/gpu=0", ["0"]),
        (2, "", ["0", "1"]),
        (0, "GPU-a", []),
    ],
)
def test_devices_are_named_as_cuda_knows_them(count: int, told: str, names: list[str]) -> None:
    assert podstep.device_names(count, {"NVIDIA_VISIBLE_DEVICES": told}) == names


@given(st.text(max_size=20_000))
def test_what_is_left_as_last_word_is_never_cut(detail: str) -> None:
    word = podstep.word_of({"exit_code": 1, "cause": "error", "detail": detail, "cpu_used_ns": 1, "ended_ns": 2})
    assert len(word.encode()) <= 4_096
    assert json.loads(word)["exit_code"] == 1


def test_a_stop_of_the_pod_is_handed_to_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, folder, ended = tmp_path / "stop", LaunchFolder(tmp_path / "launch"), threading.Event()
    signals: list[int] = []

    def kill(_pid: int, number: int) -> None:
        signals.append(number)
        if len(signals) == 2:
            ended.set()
        told.write_text('{"grace_ns": 5, "at_ns": 1}')

    monkeypatch.setattr(os, "kill", kill)
    told.write_text('{"grace_ns": 7, "at_ns": 1}')
    podstep.watch_stop(told, folder, ended)
    assert len(signals) == 2
    assert (read_json(folder.stop) or {})["grace_ns"] == 5


# ------------------------------------------------------------------ what is read


def pod_with(
    state: dict[str, Any] | None = None, *, node: str = "n1", deleted: str = "", forced: bool = False,
    annotations: dict[str, str] | None = None, finalizers: tuple[str, ...] = (pods.FINALIZER,), **status: Any,
) -> dict[str, Any]:  # fmt: skip
    """A pod as the API server gives it, through the client's own models."""
    document = pods.pod_of(spec_of(), PLAIN, SITE, NODE)
    document["metadata"]["finalizers"] = list(finalizers)
    document["metadata"]["annotations"] |= annotations or {}
    if node:
        document["spec"]["nodeName"] = node
    if deleted:
        document["metadata"] |= {"deletionTimestamp": deleted, "deletionGracePeriodSeconds": 0 if forced else 30}
    if state is not None:
        status["containerStatuses"] = [
            {"name": "worker", "state": state, "image": "x", "imageID": "", "ready": False, "restartCount": 0}
        ]
    document["status"] = status
    return as_sent(kubernetes.client.V1Pod.from_dict(document))


def ended(code: int = 1, *, reason: str = "Error", message: str = "") -> dict[str, Any]:
    terminated = {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-01-02T03:04:05Z"}
    return {"terminated": terminated}


RUNNING = {"running": {"startedAt": "2026-01-02T03:04:05Z"}}
WORD = json.dumps({"exit_code": 7, "cause": "error", "detail": "seven", "cpu_used_ns": 5, "ended_ns": 9})
DELETED = "2026-01-02T03:04:05Z"
NOW_S = clusterview.moment_s(DELETED)
UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
TABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "has no node yet": (pod_with(node="", phase="Pending"), "alive", "not started"),
    "finds no node": (pod_with(node="", phase="Pending", conditions=[UNSCHEDULABLE]), "alive", "Unschedulable: 0/3"),
    "waits for an image": (
        pod_with({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}, phase="Pending"),
        "alive", "ImagePullBackOff: no such image",
    ),
    "runs": (pod_with(RUNNING, phase="Running"), "alive", ""),
    "runs and is to end": (pod_with(RUNNING, phase="Running", deleted=DELETED), "alive", "is being ended"),
    "nobody knows": (pod_with(RUNNING, phase="Unknown"), "alive", "not started"),
    "is called failed by others while it runs": (pod_with(RUNNING, phase="Failed", reason="NodeLost"), "alive", ""),
    "ended with our word": (pod_with(ended(7, message=WORD), phase="Failed"), "exited", "seven"),
    "ended with our word, and then was evicted": (
        pod_with(ended(7, message=WORD), phase="Failed", reason="Evicted"), "exited", "seven",
    ),
    "ended without a word": (pod_with(ended(9), phase="Failed"), "gone", "status 9"),
    "is another's": (pod_with(ended(1, message='{"detail": "fenced"}'), phase="Failed"), "gone", "fenced"),
    "wanted too much memory": (pod_with(ended(137, reason="OOMKilled"), phase="Failed"), "exited", "memory limit"),
    "was evicted": (
        pod_with(ended(137), phase="Failed", reason="Evicted", message="The node was low on memory"),
        "gone", "Evicted: The node was low on memory",
    ),
    "was refused by its node": (
        pod_with(phase="Failed", reason="UnexpectedAdmissionError", message="no GPU"), "gone", "UnexpectedAdmissionError",
    ),
    "took too long": (pod_with(ended(137), phase="Failed", reason="DeadlineExceeded"), "exited", "DeadlineExceeded"),
    "did not end when it was stopped": (
        pod_with(ended(137), phase="Failed", reason="DeadlineExceeded", annotations={pods.STOP: "{}"}),
        "gone", "did not end by itself",
    ),
    "was deleted before it had a node": (pod_with(node="", phase="Pending", deleted=DELETED), "gone", "before it began"),
    "was deleted a moment ago on its node": (
        pod_with({"waiting": {"reason": "ContainerCreating"}}, phase="Pending", deleted=DELETED, forced=True),
        "alive", "is being ended",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pod", "state", "detail"), TABLE.values(), ids=TABLE)
def test_what_a_pod_says(pod: dict[str, Any], state: str, detail: str) -> None:
    seen = clusterview.observation(pod, lambda _: True, now_s=NOW_S)
    assert seen is not None
    assert seen.state.value == state
    assert detail in seen.detail
    assert (seen.launch_id, seen.node_id) == ("run_06bq-0-1-0", "node_centre_n1")


def test_how_it_ended_comes_from_the_runners_last_word() -> None:
    seen = clusterview.observation(TABLE["ended with our word"][0], lambda _: True, now_s=NOW_S)
    assert seen is not None
    assert (seen.exit_code, seen.cause, seen.cpu_used_ns, seen.ended_ns) == (7, "error", 5, 9)


def test_a_pod_that_an_older_kubelet_deleted_without_a_word_is_gone_after_a_while() -> None:
    pod = TABLE["was deleted a moment ago on its node"][0]
    seen = clusterview.observation(pod, lambda _: True, now_s=NOW_S + 61)
    assert seen is not None
    assert seen.state is ObservedState.GONE


@pytest.mark.parametrize(
    "name", ["runs", "runs and is to end", "nobody knows", "is called failed by others while it runs"]
)
def test_nothing_is_said_of_what_is_on_a_node_that_is_not_heard_of(name: str) -> None:
    assert clusterview.observation(TABLE[name][0], lambda _: False, now_s=NOW_S) is None


def test_what_was_on_a_node_that_left_the_cluster_is_gone_once_the_cluster_gave_it_up() -> None:
    assert clusterview.observation(TABLE["runs"][0], lambda _: None, now_s=NOW_S) is None
    seen = clusterview.observation(TABLE["runs and is to end"][0], lambda _: None, now_s=NOW_S)
    assert seen is not None
    assert seen.state is ObservedState.GONE


STATES = st.sampled_from([None, {}, RUNNING, {"waiting": {"reason": "ContainerCreating"}}, ended(1), ended(0)])


@st.composite
def any_pod(draw: st.DrawFn) -> dict[str, Any]:
    deleted = draw(st.sampled_from(["", DELETED]))
    return pod_with(
        draw(STATES), node=draw(st.sampled_from(["", "n1"])), deleted=deleted, forced=draw(st.booleans()),
        phase=draw(st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown"])),
        reason=draw(st.sampled_from(["", "Evicted", "NodeLost", "DeadlineExceeded"])),
    )  # fmt: skip


def check_running_is_not_over(is_over: Callable[..., bool], pod: dict[str, Any]) -> None:
    """A container that its kubelet last saw running may run still, whatever others wrote into the status."""
    states = [each["state"] for each in pod["status"].get("containerStatuses") or ()]
    if any("running" in state for state in states) and pod["spec"].get("nodeName"):
        assert not is_over(pod, now_s=NOW_S + 10**6)


@given(any_pod())
def test_what_its_kubelet_saw_running_is_never_over(pod: dict[str, Any]) -> None:
    check_running_is_not_over(clusterview.is_over, pod)


def test_the_property_catches_whoever_believes_in_phases() -> None:
    with pytest.raises(AssertionError):
        check_running_is_not_over(
            lambda pod, **_: pod["status"]["phase"] in ("Succeeded", "Failed"),
            TABLE["is called failed by others while it runs"][0],
        )


def record(*labels: str) -> dict[str, Any]:
    document = pods.secret_of(spec_of(), PLAIN, SITE)
    document["metadata"]["labels"] |= dict.fromkeys(labels, "true")
    return {"metadata": document["metadata"]}


@pytest.mark.parametrize(
    ("records", "listed", "said"),
    [
        ([record()], [], []),
        ([record(pods.STARTED)], [], [("gone", "its pod was removed")]),
        ([record(pods.STOPPED)], [], [("gone", "stopped before it was launched")]),
        ([record(pods.STARTED)], [TABLE["runs"][0]], [("alive", "")]),
        ([], [TABLE["runs"][0]], [("alive", "")]),
        ([], [pod_with(ended(0), phase="Succeeded", finalizers=("kueue.x-k8s.io/managed",))], []),
        ([], [pod_with(RUNNING, phase="Running", finalizers=())], [("alive", "")]),
    ],
    ids=[
        "written down only", "its pod was taken away", "stopped first", "runs", "its record was taken away",
        "forgotten, and held by another", "our finalizer was taken away",
    ],
)  # fmt: skip
def test_records_and_pods_together(records: Any, listed: Any, said: list[tuple[str, str]]) -> None:
    seen = clusterview.observations(records, listed, lambda _: True, now_s=NOW_S)
    assert [(one.state.value, one.detail) for one in seen] == said


# ------------------------------------------------------------------ nodes


def node_with(**changes: Any) -> dict[str, Any]:
    document = {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "n1", "labels": {
            "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81559",
            "topology.kubernetes.io/rack": "r7", "feature.node.kubernetes.io/cpu": "x", "pool": "gpu",
        }},
        "spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"},
                            {"key": "soft", "effect": "PreferNoSchedule"}]},
        "status": {
            "allocatable": {"cpu": "63500m", "memory": "500Gi", "nvidia.com/gpu": "4", "ephemeral-storage": "1Ti"},
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "10.0.0.7"}],
            "nodeInfo": {
                "bootID": "b", "machineID": "", "systemUUID": "", "kernelVersion": "", "osImage": "",
                "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "", "operatingSystem": "",
                "architecture": "",
            },
        },
    }  # fmt: skip
    return as_sent(kubernetes.client.V1Node.from_dict({**document, **changes}))


def test_a_node_is_what_others_leave_of_it() -> None:
    others = {"cpu": 3_500, "memory": 100 << 30, "nvidia.com/gpu": 2}
    held = {"n1/nvidia/NVIDIA-H100-80GB-HBM3/3"}
    node = clusterview.node_of(node_with(), "centre", others, held)  # type: ignore[arg-type]
    assert node is not None
    assert (node.cpu_milli, node.memory_bytes, node.address, node.rack) == (60_000, 400 << 30, "10.0.0.7", "r7")
    assert [device.id.rpartition("/")[2] for device in node.devices] == ["0", "3"], "what is ours stays"
    assert {device.model for device in node.devices} == {"H100-SXM"}
    assert node.taints == ("gpu=yes",)
    assert ("pool", "gpu") in node.labels
    assert not any(name.startswith("feature.node") for name, _ in node.labels)
    assert clusterview.node_of(node_with(), "centre", {"cpu": 63_500}) is None  # type: ignore[arg-type]


def test_cordoned_nodes_and_nodes_that_are_not_heard_of() -> None:
    cordoned = clusterview.node_of(node_with(spec={"unschedulable": True}), "centre", {})  # type: ignore[arg-type]
    assert cordoned is not None
    assert cordoned.taints == ("kubernetes=cordoned",)
    for status, heard in (("True", True), ("False", True), ("Unknown", False)):
        made = node_with(status={"conditions": [{"type": "Ready", "status": status}]})
        assert clusterview.is_heard(made) is heard
    assert not clusterview.is_heard(node_with(status={}))


def test_what_pods_of_others_hold() -> None:
    def container(**wanted: str) -> dict[str, Any]:
        return {"name": "c", "resources": {"requests": wanted}}

    pod = {
        "metadata": {"name": "x"},
        "status": {"phase": "Running"},
        "spec": {
            "nodeName": "n1",
            "containers": [container(cpu="100m", memory="1Gi"), {"name": "l", "resources": {"limits": {"cpu": "1"}}}],
            "initContainers": [container(cpu="3"), {**container(memory="1Mi"), "restartPolicy": "Always"}],
            "overhead": {"memory": "2Mi"},
        },
    }
    over = {**pod, "status": {"phase": "Succeeded"}}
    used = clusterview.used_by([pod, over], lambda _: False)
    assert used == {"n1": {"cpu": 3_000, "memory": (1 << 30) + (3 << 20)}}
    assert clusterview.used_by([pod], lambda _: True) == {}


@given(
    st.decimals(min_value=0, max_value=10**9, places=3),
    st.sampled_from(["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"]),
)
def test_quantities_are_read_as_the_official_client_reads_them(number: Any, unit: str) -> None:
    from kubernetes.utils.quantity import parse_quantity

    text = f"{number}{unit}"
    exact = parse_quantity(text)
    assert clusterview.quantity(text) == math.ceil(exact)
    assert clusterview.quantity_milli(text) == math.ceil(exact * 1_000)


# ------------------------------------------------------------------ settings


def test_settings_are_read_and_what_is_wrong_is_named() -> None:
    given = dict(_kubernetes(["namespace=ai,queue=gpus", "select=pool=gpu,zone in (a,b),user=2000,host_network=yes"]))
    assert given["select"] == "pool=gpu,zone in (a,b)"
    settings = pods.settings_of(given)
    assert (settings.namespace, settings.queue, settings.user, settings.host_network) == ("ai", "gpus", 2_000, True)
    with pytest.raises(InvalidRequest, match="NAME=VALUE"):
        _kubernetes(["namespace"])
    for wrong in ("colour=blue", "user=0", "user=me", "host_network=maybe"):
        with pytest.raises(InvalidSetting) as caught:
            _kubernetes([wrong])
        assert caught.value.field == wrong.partition("=")[0]


def test_without_the_client_it_is_said_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(InvalidSetting, match=r"pip install 'tidemill\[kubernetes\]'"):
        ApiServer()


def test_without_a_cluster_it_is_said_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(InvalidSetting, match="KUBECONFIG") as caught:
        ApiServer()
    assert caught.value.field == "kubeconfig"


def test_pods_are_not_given_an_address_that_they_cannot_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked of the cluster, which is not even there."""
    cluster = {"clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}], "current-context": "c"}
    whole = cluster | {"users": [{"name": "u", "user": {"token": "t"}}]}
    whole |= {"contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]}
    (tmp_path / "config").write_text(yaml.safe_dump(whole))
    api = ApiServer(kubeconfig=str(tmp_path / "config"))
    spec = spec_of(api_url="http://127.0.0.1:7070")
    with pytest.raises(EngineRefused, match="cannot reach"):
        KubernetesEngine(api, site_id=SiteId(SITE), settings=PLAIN).launch(spec)
    for settings in (ON_HOST, replace(PLAIN, api_url="http://10.0.0.1:7070")):
        with pytest.raises(EngineLost, match="does not answer"):
            KubernetesEngine(api, site_id=SiteId(SITE), settings=settings).launch(spec)
