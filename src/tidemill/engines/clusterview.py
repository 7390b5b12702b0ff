"""What Kubernetes' lists say, read: pods as observations, nodes as nodes, the requests of others as capacity in use.

All take documents as the API gives them and ask nobody. A pod is over only when its node's kubelet said so of every
container, or when it cannot ever have begun: a phase may also be set by somebody who could not reach the node.

==========================================  ==============================================================
every container terminated, our word left   EXITED, as the runner wrote it down
every container terminated without it       EXITED when it was the worker's fault (memory, deadline), else GONE
waits, pulls, runs, is being ended          ALIVE, with Kubernetes' reason
deleted before it was given to a node       GONE
its node is not heard of                    nothing is said
==========================================  ==============================================================

Source: Kubernetes API conventions; "Pod Lifecycle".
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from tidemill import catalog
from tidemill.engines.pods import CONTAINER, DEVICES, FINALIZER, GPU_RESOURCES, LAUNCH, NODE, STARTED, STOP, STOPPED
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, LaunchId, NodeId, SiteId
from tidemill.model.plan import Observation, ObservedState
from tidemill.units import MILLI, SECOND_NS

_QUANTITY: Final = re.compile(r"(?P<number>[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)(?P<unit>[numkKMGTPE]?i?)")
_UNITS: Final[Mapping[str, Decimal]] = {
    "": Decimal(1), "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(1000),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("KMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}  # fmt: skip
_PRODUCTS: Final = {"nvidia.com/gpu": "nvidia.com/gpu.product", "amd.com/gpu": "amd.com/gpu.product-name"}
_MEMORIES: Final = {"nvidia.com/gpu": "nvidia.com/gpu.memory", "amd.com/gpu": "amd.com/gpu.vram"}
_RACKS: Final = (
    "topology.kubernetes.io/rack", "cloud.provider.com/topology-rack", "cloud.google.com/gce-topology-subblock",
    "topology.k8s.aws/network-node-layer-3",
)  # fmt: skip
_BLOCKS: Final = (
    "topology.kubernetes.io/block", "cloud.provider.com/topology-block", "cloud.google.com/gce-topology-block",
    "topology.k8s.aws/network-node-layer-2",
)  # fmt: skip
_DULL: Final = ("beta.kubernetes.io/", "feature.node.kubernetes.io/", "node.alpha.kubernetes.io/")
_HARMFUL: Final = ("NoSchedule", "NoExecute")
_SETTLED_S: Final = 60.0
"""A kubelet that is heard of for so long after a pod was deleted by force has heard of that, too."""
_TERMINAL: Final = ("Succeeded", "Failed")


# ------------------------------------------------------------------ launches


def observations(
    records: Iterable[Mapping[str, Any]],
    pods: Iterable[Mapping[str, Any]],
    heard: Callable[[str], bool | None],
    *,
    now_s: float,
) -> tuple[Observation, ...]:
    """What is seen of each launch. ``records`` are the Secrets, listed before the ``pods``.

    ``heard`` says of a node's name whether its kubelet is heard of, None when there is no such node.
    """
    seen: dict[str, Observation] = {}
    known: set[str] = set()
    for pod in pods:
        launch = _annotation(pod, LAUNCH)
        if is_over(pod, now_s=now_s) and FINALIZER not in (pod["metadata"].get("finalizers") or ()):
            continue  # forgotten; it goes when its node, or somebody else's finalizer, lets it
        known.add(launch)
        if launch and (found := observation(pod, heard, now_s=now_s)) is not None:
            seen[launch] = found
    for record in records:
        launch = _annotation(record, LAUNCH)
        labels = record["metadata"].get("labels") or {}
        if not launch or launch in known or not (labels.get(STARTED) or labels.get(STOPPED)):
            continue  # written down and not carried out
        why = "its pod was removed" if labels.get(STARTED) else "stopped before it was launched"
        seen[launch] = Observation(
            launch_id=LaunchId(launch),
            node_id=NodeId(_annotation(record, NODE)),
            state=ObservedState.GONE,
            detail=why,
        )
    return tuple(seen[launch] for launch in sorted(seen))


def observation(pod: Mapping[str, Any], heard: Callable[[str], bool | None], *, now_s: float) -> Observation | None:
    """What is seen of the launch of that pod; None when nothing can be said, because its node is not heard of."""
    launch_id, node_id = LaunchId(_annotation(pod, LAUNCH)), NodeId(_annotation(pod, NODE))
    on = str(pod["spec"].get("nodeName") or "")
    is_heard = heard(on) if on else True
    if is_over(pod, now_s=now_s):
        return _ended(launch_id, node_id, pod)
    if is_heard is None and (pod["metadata"].get("deletionTimestamp") or _phase(pod) in _TERMINAL):
        detail = f"its node {on} is not part of the cluster any more"
        return Observation(launch_id=launch_id, node_id=node_id, state=ObservedState.GONE, detail=detail)
    if not is_heard:
        return None
    return Observation(launch_id=launch_id, node_id=node_id, state=ObservedState.ALIVE, detail=waiting_for(pod))


def is_over(pod: Mapping[str, Any], *, now_s: float) -> bool:
    """Whether nothing of the pod runs, or ever will."""
    states = _states(pod)
    deleted = pod["metadata"].get("deletionTimestamp")
    if states and all("terminated" in state for state in states):
        return True
    if not pod["spec"].get("nodeName"):
        return bool(deleted) or _phase(pod) in _TERMINAL
    if any("running" in state or "terminated" in state for state in states):
        return False
    if _phase(pod) in _TERMINAL:  # its node refused it, or gave it up before it began
        return True
    forced = deleted and pod["metadata"].get("deletionGracePeriodSeconds") == 0
    return bool(forced) and now_s - moment_s(str(deleted)) > _SETTLED_S


def waiting_for(pod: Mapping[str, Any]) -> str:
    """What keeps the pod from running, in Kubernetes' words; empty when it runs."""
    if pod["metadata"].get("deletionTimestamp"):
        return "its pod is being ended"
    for state in _states(pod):
        waiting = state.get("waiting") or {}
        if reason := waiting.get("reason"):
            return _said(str(reason), str(waiting.get("message") or ""))
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _said(str(condition.get("reason") or "Unschedulable"), str(condition.get("message") or ""))
    gates = [str(gate.get("name")) for gate in pod["spec"].get("schedulingGates") or ()]
    if gates:
        return f"SchedulingGated: it waits for {', '.join(gates)}"
    return "" if _phase(pod) == "Running" else "its pod was not started yet"


def _ended(launch_id: LaunchId, node_id: NodeId, pod: Mapping[str, Any]) -> Observation:
    """How a pod ended that is over."""
    status = pod.get("status") or {}
    terminated: Mapping[str, Any] = next((state["terminated"] for state in _states(pod) if "terminated" in state), {})
    ended_ns = _moment_ns(str(terminated.get("finishedAt") or ""))
    word = _word(str(terminated.get("message") or ""))
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "")
    code = int(terminated.get("exitCode") or 0)

    def seen(state: ObservedState, **more: Any) -> Observation:
        return Observation(launch_id=launch_id, node_id=node_id, state=state, **{"ended_ns": ended_ns, **more})

    if word is not None and "exit_code" in word:
        return seen(
            ObservedState.EXITED,
            exit_code=int(word["exit_code"]),
            cause=str(word.get("cause") or ""),
            detail=str(word.get("detail") or ""),
            cpu_used_ns=int(word.get("cpu_used_ns") or 0),
            ended_ns=int(word.get("ended_ns") or 0) or ended_ns,
        )
    if reason == "DeadlineExceeded" and _annotation(pod, STOP):
        how = "it was stopped, and did not end by itself" if terminated else "it was stopped before it began"
        return seen(ObservedState.GONE, detail=how)
    if reason == "DeadlineExceeded":
        return seen(ObservedState.EXITED, exit_code=code or 143, cause="timed_out", detail=_said(reason, message))
    if terminated.get("reason") == "OOMKilled" and not reason:
        detail = "OOMKilled: it needed more than its memory limit; ask for more in resources.memory"
        return seen(ObservedState.EXITED, exit_code=code or 137, cause="out_of_memory", detail=detail)
    if reason:
        return seen(ObservedState.GONE, detail=_said(reason, message))
    if not terminated:
        return seen(ObservedState.GONE, detail="its pod was deleted before it began")
    how = str(terminated.get("reason") or "")
    said = str((word or {}).get("detail") or terminated.get("message") or "") or (
        f"its container ended with status {code}" + (f" ({how})" if how not in ("", "Error", "Completed") else "")
    )
    return seen(ObservedState.GONE, detail=said[:2_000])


def _word(message: str) -> dict[str, Any] | None:
    """What the runner left in the container's termination message."""
    try:
        value = json.loads(message)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _states(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The state of our container, which others put beside it cannot change; without one that of all."""
    status = pod.get("status") or {}
    known = [
        (str(each.get("name")), {name: value for name, value in (each.get("state") or {}).items() if value is not None})
        for each in status.get("containerStatuses") or ()
    ]
    return [state for name, state in known if name == CONTAINER] or [state for _, state in known]


def _phase(pod: Mapping[str, Any]) -> str:
    return str((pod.get("status") or {}).get("phase") or "")


def _annotation(document: Mapping[str, Any], name: str) -> str:
    return str((document["metadata"].get("annotations") or {}).get(name) or "")


def _said(reason: str, message: str) -> str:
    return (f"{reason}: {message}" if message else reason)[:2_000]


def moment_s(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time; zero for what is none."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


def _moment_ns(text: str) -> int:
    return int(moment_s(text)) * SECOND_NS


# ------------------------------------------------------------------ nodes


def node_of(
    document: Mapping[str, Any], site_id: SiteId, others: Mapping[str, int], held: Collection[str] = ()
) -> Node | None:
    """A node, less what pods of others request on it (``others``: cpu in thousandths, the rest in units).

    ``held`` are ids of devices that pods of ours have: the devices that others use are not among those. None for a
    node on which there is no room at all.
    """
    metadata, status = document["metadata"], document.get("status") or {}
    name = str(metadata["name"])
    labels = {str(key): str(value) for key, value in (metadata.get("labels") or {}).items()}
    room = status.get("allocatable") or status.get("capacity") or {}
    cpu_milli = quantity_milli(str(room.get("cpu", "0"))) - others.get("cpu", 0)
    memory = quantity(str(room.get("memory", "0"))) - others.get("memory", 0)
    if cpu_milli <= 0 or memory <= 0:
        return None
    info = status.get("nodeInfo") or {}
    addresses = {each.get("type"): str(each.get("address")) for each in status.get("addresses") or ()}
    return Node(
        id=node_id_of(site_id, name),
        site_id=site_id,
        name=name,
        state=NodeState.READY,
        version=1,
        boot_id=str(info.get("bootID") or ""),
        address=addresses.get("InternalIP") or addresses.get("Hostname") or name,
        cpu_milli=cpu_milli,
        memory_bytes=memory,
        disk_bytes=max(0, quantity(str(room.get("ephemeral-storage", "0"))) - others.get("ephemeral-storage", 0)),
        images=True,
        devices=tuple(_devices(name, labels, room, others, held)),
        labels=tuple(sorted((key, value) for key, value in labels.items() if not key.startswith(_DULL))),
        rack=next((labels[key] for key in _RACKS if labels.get(key)), ""),
        block=next((labels[key] for key in _BLOCKS if labels.get(key)), ""),
        taints=tuple(sorted(_taints(document))),
    )


def node_id_of(site_id: str, name: str) -> NodeId:
    """The id of the node of that name."""
    return NodeId(f"node_{site_id}_{name}")


def node_name_of(site_id: str, node_id: str) -> str:
    """The name of the node with that id; empty for one of another site."""
    prefix = f"node_{site_id}_"
    return node_id.removeprefix(prefix) if node_id.startswith(prefix) else ""


def is_heard(document: Mapping[str, Any]) -> bool:
    """Whether the node's kubelet tells of it, be it good or bad."""
    conditions = (document.get("status") or {}).get("conditions") or ()
    return any(each.get("type") == "Ready" and each.get("status") in ("True", "False") for each in conditions)


def taints_of(document: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Key, value and effect of each taint that keeps pods away."""
    return tuple(
        (str(each.get("key")), str(each.get("value") or ""), str(each.get("effect")))
        for each in (document.get("spec") or {}).get("taints") or ()
        if each.get("effect") in _HARMFUL
    )


def used_by(pods: Iterable[Mapping[str, Any]], is_ours: Callable[[Mapping[str, Any]], bool]) -> dict[str, Counter[str]]:
    """What pods of others request on each node, by its name; those that are over hold nothing."""
    used: dict[str, Counter[str]] = {}
    for pod in pods:
        on = str(pod["spec"].get("nodeName") or "")
        if on and _phase(pod) not in _TERMINAL and not is_ours(pod):
            used.setdefault(on, Counter()).update(requests_of(pod))
    return used


def devices_held(pods: Iterable[Mapping[str, Any]]) -> set[str]:
    """The ids of the devices that these pods of ours were given."""
    return {str(name) for pod in pods for name in json.loads(_annotation(pod, DEVICES) or "[]")}


def requests_of(pod: Mapping[str, Any]) -> Counter[str]:
    """What the scheduler reserves for a pod: cpu in thousandths, the rest in units.

    The sum of its containers, at least what its largest init container needs, and what its runtime takes on top. Init
    containers that go on beside the others are added to them.
    """
    spec = pod["spec"]
    wanted: Counter[str] = Counter()
    for container in spec.get("containers") or ():
        wanted.update(_requested(container))
    first: Counter[str] = Counter()
    for container in spec.get("initContainers") or ():
        if container.get("restartPolicy") == "Always":
            wanted.update(_requested(container))
        else:
            first |= _requested(container)
    wanted |= first
    wanted.update(_amounts(spec.get("overhead") or {}))
    return wanted


def _requested(container: Mapping[str, Any]) -> Counter[str]:
    resources = container.get("resources") or {}
    return _amounts({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def _amounts(given: Mapping[str, Any]) -> Counter[str]:
    return Counter(
        {
            str(name): quantity_milli(str(amount)) if name == "cpu" else quantity(str(amount))
            for name, amount in given.items()
        }
    )


def _devices(
    node: str, labels: Mapping[str, str], room: Mapping[str, Any], others: Mapping[str, int], held: Collection[str]
) -> Iterable[Device]:
    """The GPUs that are not others'. Which ones those use is not told: of ours, none."""
    index = 0
    for resource in GPU_RESOURCES:
        count = quantity(str(room.get(resource, "0")))
        product = labels.get(_PRODUCTS[resource], "")
        spec = _catalogued(product, labels.get(_MEMORIES[resource], ""))
        vendor = resource.partition(".")[0]
        ids = [f"{node}/{vendor}/{product}/{number}" for number in range(count)]
        for name in _without(ids, others.get(resource, 0), held):
            yield Device(
                id=DeviceId(name),
                index=index,
                model=spec.model,
                reported=product,
                memory_bytes=spec.memory_bytes,
                idle_mw=spec.idle_mw,
                busy_mw=spec.busy_mw,
            )
            index += 1


def _without(ids: Sequence[str], count: int, held: Collection[str]) -> list[str]:
    free = [name for name in ids if name not in held]
    taken = set(free[len(free) - count :] if count else ())
    return [name for name in ids if name not in taken]


def _catalogued(product: str, memory: str) -> catalog.DeviceSpec:
    """The model that a product label stands for. ``memory`` is in MiB, as NVIDIA's labels have it, or with a unit."""
    name = product.removesuffix("-SHARED").replace("-", " ")
    size = quantity(memory)
    size = size * 2**20 if size < 2**30 else size
    found = catalog.match_device(name, size)
    if found is not None and not size:
        found = next(spec for spec in catalog.devices() if spec.model == found.model)
    return found or catalog.derived_device(product or "gpu", size)


def _taints(document: Mapping[str, Any]) -> Iterable[str]:
    for key, value, _ in taints_of(document):
        if key != "node.kubernetes.io/unschedulable":
            yield f"{key}={value}" if value else key
    if (document.get("spec") or {}).get("unschedulable"):
        yield "kubernetes=cordoned"


# ------------------------------------------------------------------ quantities


def quantity(text: str) -> int:
    """A quantity in whole units, rounded up; zero for what is none.

    >>> quantity("1Gi"), quantity("500M"), quantity("1500m"), quantity("2e3"), quantity("many")
    (1073741824, 500000000, 2, 2000, 0)
    """
    return math.ceil(_number(text))


def quantity_milli(text: str) -> int:
    """A quantity in thousandths, rounded up.

    >>> quantity_milli("2"), quantity_milli("250m"), quantity_milli("0.5"), quantity_milli("100n")
    (2000, 250, 500, 1)
    """
    return math.ceil(_number(text) * MILLI)


def _number(text: str) -> Decimal:
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found["unit"] not in _UNITS:
        return Decimal(0)
    try:
        return Decimal(found["number"]) * _UNITS[found["unit"]]
    except InvalidOperation:
        return Decimal(0)
