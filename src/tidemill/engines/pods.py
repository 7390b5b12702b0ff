"""What a launch is written as in Kubernetes: a Secret with what it runs, a Pod that runs it, a Service for a gang.

Documents are plain JSON, as the API takes them. Nothing here asks anybody anything.

The Pod is made once for a launch: its name follows from the launch's id, and our finalizer keeps the name taken, with
the last status, until the launch is forgotten, whoever deletes the pod before that. The Secret of the same name is made
first, and says whether there ever was a pod, and whether it is to be stopped; a stop that came first makes it too.

Source: Kubernetes 1.37 API reference; kueue.sigs.k8s.io, "Run Plain Pods".
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tidemill.errors import EngineRefused, InvalidSetting
from tidemill.model.ids import LaunchId
from tidemill.model.plan import LaunchSpec
from tidemill.units import MILLI, SECOND_NS

Document = dict[str, Any]
PREFIX: Final = "tidemill.dev"
FINALIZER: Final = f"{PREFIX}/until-forgotten"
SITE: Final = f"{PREFIX}/site"
LAUNCH: Final = f"{PREFIX}/launch"
NODE: Final = f"{PREFIX}/node"
DEVICES: Final = f"{PREFIX}/devices"
STOP: Final = f"{PREFIX}/stop"
STARTED: Final = f"{PREFIX}/started"
STOPPED: Final = f"{PREFIX}/stopped"
OWNER: Final = ("app.kubernetes.io/managed-by", "tidemill")
CONTAINER: Final = "worker"
GPU_RESOURCES: Final = ("nvidia.com/gpu", "amd.com/gpu")

_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_RANK: Final = f"{PREFIX}/rank"
_GANG: Final = f"{PREFIX}/gang"
_MOUNT: Final = "/tidemill"
_GRACE_MARGIN_S: Final = 15
_DEADLINE_MARGIN_S: Final = 1_800
"""Pulling an image counts towards a pod's deadline; the runner itself ends what takes too long."""
_PARTS: Final = ("__init__.py", "model/__init__.py", "model/ids.py", "model/storage.py", "runner")
_PACKAGE: Final = Path(__file__).parents[1]
_MAIN: Final = f"""import sys
import zipfile

zipfile.ZipFile(sys.argv[0]).extractall("{_MOUNT}/home/lib")
sys.path.insert(0, "{_MOUNT}/home/lib")

from tidemill.runner.podstep import main

main()
"""
_NO_PYTHON: Final = json.dumps(
    {
        "exit_code": 127,
        "cause": "setup_failed",
        "detail": "the image has no python3 of version 3.11 or newer, which the runner needs",
        "cpu_used_ns": 0,
        "ended_ns": 0,
    }
)
_START: Final = f"""for python in python3 python3.14 python3.13 python3.12 python3.11 /usr/local/bin/python3; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    exec "$python" -I {_MOUNT}/runner/runner.pyz
  fi
done
echo 'this image has no python3 of version 3.11 or newer' >&2
printf '%s' '{_NO_PYTHON}' > /dev/termination-log
exit 127
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """How launches become pods. Empty words are left to the cluster.

    ``queue`` is a Kueue LocalQueue: then Kueue and the cluster's scheduler choose, and the node that Tidemill chose is
    only a guess. ``image`` is what jobs without an image of their own run in. ``volumes`` is a PersistentVolumeClaim
    that all nodes can mount: checkpoints and outputs; without one they end with their pod. ``select`` selects nodes by
    their labels. ``host_network`` puts pods on their node's own network. ``user`` is whom workers run as.
    ``api_url`` is where pods reach the control plane, if not where the outpost does. ``kubeconfig`` and ``context`` say
    which cluster it is. ``linger_ns``, ``beat_ns`` and ``spool_cap_bytes`` are the
    runner's; ``look_ns`` is the least time between two looks.
    """

    namespace: str = "tidemill"
    queue: str = ""
    image: str = "docker.io/library/python:3.12"
    volumes: str = ""
    select: str = ""
    service_account: str = ""
    priority_class: str = ""
    runtime_class: str = ""
    kubeconfig: str = ""
    context: str = ""
    api_url: str = ""
    user: int = 1_000
    host_network: bool = False
    linger_ns: int = 24 * 3600 * SECOND_NS
    beat_ns: int = 2 * SECOND_NS
    look_ns: int = 2 * SECOND_NS
    spool_cap_bytes: int = 1 << 30


SETTINGS: Final = (
    "namespace", "queue", "image", "volumes", "select", "service_account", "priority_class", "runtime_class",
    "kubeconfig", "context", "api_url", "user", "host_network",
)  # fmt: skip
"""Those that a person sets."""


def settings_of(given: Mapping[str, str]) -> KubernetesSettings:
    """The settings from words. Raises: InvalidSetting that names the one that cannot be used."""
    for name, value in given.items():
        if name not in SETTINGS:
            mend = f"Settings are {', '.join(SETTINGS)}."
            raise InvalidSetting("Kubernetes sites have no such setting.", field=name, value=value, mend=mend)
    words: dict[str, Any] = {name: value for name, value in given.items() if name not in ("user", "host_network")}
    if "user" in given:
        if not given["user"].isdecimal() or not 0 < int(given["user"]) < 2**31:
            raise InvalidSetting(
                "Workers run as a user that is not root.", field="user", value=given["user"], mend="Write its number."
            )
        words["user"] = int(given["user"])
    if "host_network" in given:
        if given["host_network"] not in ("yes", "no"):
            raise InvalidSetting("This is yes or no.", field="host_network", value=given["host_network"])
        words["host_network"] = given["host_network"] == "yes"
    return KubernetesSettings(**words)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The node that a pod is pinned to, and its taints, which Tidemill took into account when it chose."""

    name: str
    taints: tuple[tuple[str, str, str], ...] = ()
    """Key, value and effect of each."""


def object_name(launch_id: str) -> str:
    """What the Pod and the Secret of a launch are called. Raises: EngineRefused for an id that is no label's value.

    >>> object_name("run_06bq-0-1-0")
    'run-06bq-0-1-0-8d6fd31a'
    """
    if not _NAME.fullmatch(launch_id):
        raise EngineRefused(
            f"{launch_id[:80]!r} cannot be the value of a label.", field="launch_id", value=launch_id[:80],
            mend="Ids have 1 to 63 letters, digits, dots, dashes and underscores.",
        )  # fmt: skip
    return _named(launch_id)


def gang_name(launch_id: str) -> str:
    """What the Service and the pod group of a launch's gang are called."""
    return _named(launch_id.rpartition("-")[0] or launch_id)


def _named(text: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "launch"
    slug = slug if slug[0].isalpha() else f"l-{slug}"
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def selector(site_id: str) -> str:
    """The labels by which a site finds what is its own."""
    return f"{OWNER[0]}={OWNER[1]},{SITE}={site_id}"


# ------------------------------------------------------------------ the runner


@functools.cache
def runner_archive() -> bytes:
    """The runner as a zip application, the same bytes for the same code. It needs Python's standard library only."""
    sources = {f"tidemill/{path.relative_to(_PACKAGE).as_posix()}": path for path in _sources()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted({name: path.read_bytes() for name, path in sources.items()}.items()):
            archive.writestr(_member(name), content)
        archive.writestr(_member("__main__.py"), _MAIN)
    return buffer.getvalue()


@functools.cache
def runner_name() -> str:
    """What the ConfigMap is called that holds this version of the runner."""
    return f"tidemill-runner-{hashlib.sha256(runner_archive()).hexdigest()[:12]}"


def runner_map(namespace: str) -> Document:
    """The ConfigMap that holds the runner."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": runner_name(), "namespace": namespace, "labels": dict([OWNER])},
        "immutable": True,
        "binaryData": {"runner.pyz": base64.b64encode(runner_archive()).decode()},
    }


def _sources() -> Iterable[Path]:
    for part in _PARTS:
        path = _PACKAGE / part
        yield from sorted(path.glob("*.py")) if path.is_dir() else (path,)


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
    member.compress_type = zipfile.ZIP_DEFLATED
    member.external_attr = 0o644 << 16
    return member


# ------------------------------------------------------------------ one launch


def secret_of(spec: LaunchSpec, settings: KubernetesSettings, site_id: str) -> Document:
    """What the launch runs, with its tokens: the record that it was asked for."""
    content = {**dataclasses.asdict(spec), "runner": _runner_settings(spec, settings)}
    secret = _secret(spec.launch_id, settings, site_id, node_id=spec.node_id)
    secret["data"] = {"spec.json": base64.b64encode(json.dumps(content, separators=(",", ":")).encode()).decode()}
    return secret


def tombstone_of(
    launch_id: LaunchId, settings: KubernetesSettings, site_id: str, *, node_id: str, stop: str
) -> Document:
    """The record of a launch that was stopped before it came."""
    secret = _secret(launch_id, settings, site_id, node_id=node_id)
    secret["metadata"]["labels"][STOPPED] = "true"
    secret["metadata"]["annotations"][STOP] = stop
    return secret


def service_of(spec: LaunchSpec, settings: KubernetesSettings, site_id: str, *, owner: Mapping[str, Any]) -> Document:
    """The Service that gives the pods of a gang names in DNS. ``owner`` is the pod whose end is its own."""
    name = gang_name(spec.launch_id)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": settings.namespace,
            "labels": {**_labels(spec.launch_id, site_id), _GANG: name},
            "ownerReferences": [owner_of(owner)],
        },
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {SITE: site_id, _GANG: name}},
    }


def owner_of(pod: Mapping[str, Any]) -> Document:
    """How another object says that it goes when that pod has gone."""
    metadata = pod["metadata"]
    return {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}


def needs_service(spec: LaunchSpec, settings: KubernetesSettings) -> bool:
    """Whether the ranks of a gang find each other by names of their own: they have no address before they start."""
    return bool(spec.gang) and not (settings.host_network and not settings.queue)


def pod_of(spec: LaunchSpec, settings: KubernetesSettings, site_id: str, chosen: Chosen | None) -> Document:
    """The pod that runs the launch: pinned to that node, or, with None, where Kueue and the scheduler put it."""
    name = object_name(spec.launch_id)
    body: Document = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(spec.grace_ns / SECOND_NS) + _GRACE_MARGIN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user,
            "runAsGroup": settings.user,
            "fsGroup": settings.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(chosen),
        "containers": [_container(spec, settings)],
        "volumes": _volumes(spec, settings, name),
    }
    if spec.max_duration_ns:
        body["activeDeadlineSeconds"] = (
            math.ceil((spec.max_duration_ns + spec.grace_ns) / SECOND_NS) + _DEADLINE_MARGIN_S
        )
    if chosen is not None:
        body["affinity"] = {"nodeAffinity": _only_on(chosen.name)}
    if settings.host_network:
        body |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if needs_service(spec, settings):
        body |= {"hostname": f"rank-{spec.rank}", "subdomain": gang_name(spec.launch_id)}
    for field, value in (
        ("serviceAccountName", settings.service_account),
        ("priorityClassName", settings.priority_class),
        ("runtimeClassName", settings.runtime_class),
    ):
        if value:
            body[field] = value
    labels, annotations = _group(spec, settings)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": settings.namespace,
            "labels": {**_labels(spec.launch_id, site_id), **labels},
            "annotations": {
                LAUNCH: spec.launch_id,
                NODE: spec.node_id,
                DEVICES: json.dumps([device for device, _ in spec.devices]),
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
                **annotations,
            },
            "finalizers": [FINALIZER],
        },
        "spec": body,
    }


def refuse(spec: LaunchSpec) -> None:
    """Nothing, when it can be written as a pod. Raises: EngineRefused."""
    object_name(spec.launch_id)
    if any(milli != MILLI for _, milli in spec.devices):
        raise EngineRefused(
            "Kubernetes gives whole GPUs only.", field="resources.gpus", value=str(dict(spec.devices)),
            mend="Ask for whole GPUs, or have it run on another site.",
        )  # fmt: skip
    if len(kinds := {_gpu_resource(device) for device, _ in spec.devices}) > 1:
        raise EngineRefused(
            "A pod gets GPUs of one vendor only.", field="resources.gpus", value=", ".join(sorted(kinds)),
            mend="Ask for one model of GPU.",
        )  # fmt: skip


def _runner_settings(spec: LaunchSpec, settings: KubernetesSettings) -> Document:
    """What the runner needs to know; limits and walls are Kubernetes' own."""
    name = gang_name(spec.launch_id)
    ranks = range(len(spec.gang)) if needs_service(spec, settings) else ()
    return {
        "boot_id": "",
        "root": f"{_MOUNT}/home",
        "endpoint_file": "",
        "uv": "",
        "python": "",
        "bwrap": "",
        "scheduler": "Kubernetes",
        "sandbox_reason": "Kubernetes' own walls hold",
        "container": None,
        "groups": {},
        "mark": f"kubernetes-{spec.launch_id}",
        "pids": 0,
        "volumes": f"{_MOUNT}/volumes",
        "spool_cap_bytes": settings.spool_cap_bytes,
        "linger_s": settings.linger_ns / SECOND_NS,
        "beat_s": settings.beat_ns / SECOND_NS,
        "addresses": [f"rank-{rank}.{name}.{settings.namespace}.svc" for rank in ranks],
    }


def _secret(launch_id: LaunchId, settings: KubernetesSettings, site_id: str, *, node_id: str) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": f"{PREFIX}/launch",
        "metadata": {
            "name": object_name(launch_id),
            "namespace": settings.namespace,
            "labels": _labels(launch_id, site_id),
            "annotations": {LAUNCH: launch_id, NODE: node_id},
        },
    }


def _labels(launch_id: str, site_id: str) -> dict[str, str]:
    return {OWNER[0]: OWNER[1], SITE: site_id, LAUNCH: launch_id}


def _group(spec: LaunchSpec, settings: KubernetesSettings) -> tuple[dict[str, str], dict[str, str]]:
    """The labels and annotations by which pods are one gang, for Kueue too if it chooses."""
    labels = {_RANK: str(spec.rank)}
    annotations: dict[str, str] = {}
    name = gang_name(spec.launch_id)
    if spec.gang:
        labels[_GANG] = name
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    if settings.queue and spec.gang:
        labels["kueue.x-k8s.io/pod-group-name"] = name
        annotations |= {
            "kueue.x-k8s.io/pod-group-total-count": str(len(spec.gang)),
            "kueue.x-k8s.io/retriable-in-group": "false",
        }
    return labels, annotations


def _only_on(node: str) -> Document:
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}


def _tolerations(chosen: Chosen | None) -> list[Document]:
    """A node that cannot be reached is no reason to delete its pods; the taints of the chosen node were known."""
    always = [
        {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute"}
        for what in ("not-ready", "unreachable")
    ]
    known = [
        {"key": key, "operator": "Equal", "value": value, "effect": effect}
        for key, value, effect in (chosen.taints if chosen is not None else ())
        if not key.startswith("node.kubernetes.io/")
    ]
    return always + known


def _container(spec: LaunchSpec, settings: KubernetesSettings) -> Document:
    numbers = dict.fromkeys(port.number for port in spec.ports if port.number)
    if settings.host_network and spec.rank == 0 and spec.rendezvous_port:
        numbers[spec.rendezvous_port] = None
    resources = _resources(spec)
    container: Document = {
        "name": CONTAINER,
        "image": spec.image or settings.image,
        "command": ["/bin/sh", "-c", _START],
        "workingDir": "/",
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "volumeMounts": [
            {"name": "runner", "mountPath": f"{_MOUNT}/runner", "readOnly": True},
            {"name": "launch", "mountPath": f"{_MOUNT}/launch", "readOnly": True},
            {"name": "pod", "mountPath": f"{_MOUNT}/pod", "readOnly": True},
            {"name": "home", "mountPath": f"{_MOUNT}/home"},
            {"name": "volumes", "mountPath": f"{_MOUNT}/volumes"},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - it is the mount of shared memory
        ],
    }
    if numbers:
        container["ports"] = [{"containerPort": number, "protocol": "TCP"} for number in numbers]
    return container


def _resources(spec: LaunchSpec) -> dict[str, str]:
    wanted = {"cpu": f"{max(1, spec.cpu_milli)}m"}
    if spec.memory_bytes:
        wanted["memory"] = str(spec.memory_bytes)
    if spec.disk_bytes:
        wanted["ephemeral-storage"] = str(spec.disk_bytes)
    for device, _ in spec.devices[:1]:
        wanted[_gpu_resource(device)] = str(len(spec.devices))
    return wanted


def _gpu_resource(device: str) -> str:
    """The resource that a device of ours is counted in: ids are NODE/VENDOR/MODEL/NUMBER."""
    vendor = device.split("/")[1] if device.count("/") == 3 else ""
    return f"{vendor or 'nvidia'}.com/gpu"


def _volumes(spec: LaunchSpec, settings: KubernetesSettings, name: str) -> list[Document]:
    room = {"sizeLimit": str(spec.disk_bytes)} if spec.disk_bytes else {}
    shared = {"sizeLimit": str(spec.memory_bytes // 2)} if spec.memory_bytes else {}
    kept: Document = (
        {"persistentVolumeClaim": {"claimName": settings.volumes}} if settings.volumes else {"emptyDir": dict(room)}
    )
    stop = {"path": "stop", "fieldRef": {"fieldPath": f"metadata.annotations['{STOP}']"}}
    return [
        {"name": "runner", "configMap": {"name": runner_name()}},
        {"name": "launch", "secret": {"secretName": name, "defaultMode": 0o440}},
        {"name": "pod", "downwardAPI": {"items": [stop]}},
        {"name": "home", "emptyDir": room},
        {"name": "volumes", **kept},
        {"name": "shm", "emptyDir": {"medium": "Memory", **shared}},
    ]
