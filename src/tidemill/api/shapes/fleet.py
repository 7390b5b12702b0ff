"""The cloud as it stands: machines, their devices, and the work that is on them."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict


class StatusOut(TypedDict):
    """The cloud at a glance.

    ``workers`` run; of ``heard`` of them the runner was heard of since the control plane started. ``strangers`` are
    launches that the database has never heard of.
    """

    version: str
    state: str
    site: str
    nodes: int
    devices: list[dict[str, Any]]
    cpu_milli: int
    free_cpu_milli: int
    gpu_milli: int
    free_gpu_milli: int
    jobs: dict[str, int]
    gateway_url: str
    energy: str
    rate_card: str
    strangers: int
    workers: int
    heard: int


class ReplicaOut(TypedDict):
    """A control plane of this installation; ``quiet_ms`` is how long ago it last said that it is there."""

    id: str
    api_url: str
    leads: bool
    quiet_ms: int


class StrangerOut(TypedDict):
    """A launch that runs, or ran, and that the database has never heard of: it is newer than the backup restored.

    With ``job_known`` it ends by itself when a newer attempt of that job gets the lease; else it is left alone.
    """

    launch: str
    job: str
    job_known: bool
    state: str
    seen_at_ns: int


class FailingOut(TypedDict):
    """A device that nothing is placed on, and what it fails of."""

    device: str
    detail: str


class NodeOut(TypedDict):
    """A machine: what it has, what of it is free, and what is wrong with it.

    ``marking`` is the cordon or drain that stands; ``workers`` counts those that hold something there. ``others_`` is
    what work holds there that another scheduler than ours started.
    """

    id: str
    name: str
    site: str
    state: str
    state_cause: str
    marking: str
    failing: list[FailingOut]
    taints: list[str]
    block: str
    rack: str
    workers: int
    held_until_at_ns: int
    cpu_model: str
    cpu_milli: int
    free_cpu_milli: int
    memory_bytes: int
    free_memory_bytes: int
    disk_bytes: int
    others_cpu_milli: int
    others_memory_bytes: int
    others_gpus: int
    devices: list[dict[str, Any]]
    images: bool
    labels: dict[str, str]
    joined_at_ns: int
