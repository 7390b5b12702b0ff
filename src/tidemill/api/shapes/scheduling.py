"""How the fleet is shared: queues, who has what, and reservations."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from tidemill.api.shapes.work import ReasonOut


class QueueOut(TypedDict):
    """A place in the quota tree, as it can be sent back: GPUs and cores as numbers, memory as a size."""

    name: str
    parent: str
    project: str
    weight: float
    guaranteed: dict[str, Any]
    limit: dict[str, Any]
    max_running: int
    max_queued: int


class ShareOut(TypedDict):
    """Who has what, by resource class, in milli-GPU, milli-CPU and bytes.

    ``borrowed`` is held above what is guaranteed, ``entitled`` what it could have now, ``models`` what it holds by
    device model. ``share`` is the largest part of the fleet that it holds, or lately held, of any resource.
    """

    name: str
    parent: str
    project: str
    depth: int
    weight: float
    guaranteed: dict[str, int]
    limit: dict[str, int]
    held: dict[str, int]
    borrowed: dict[str, int]
    entitled: dict[str, int]
    models: dict[str, int]
    share: float
    running: int
    queued: int


class QueuedOut(TypedDict):
    """A waiting job. ``position`` counts from 1 among all jobs, also those that the caller may not see.

    It is zero while something else than its turn is waited for. ``starts_by_at_ns`` is by when it starts at the latest,
    for the one job that others may not delay.
    """

    position: int
    job: str
    name: str
    kind: str
    project: str
    user: str
    nodes: int
    nodes_min: int
    resources: dict[str, Any]
    capacity: str
    priority: int
    submitted_at_ns: int
    waited_ns: int
    evictions: int
    starts_by_at_ns: int
    sites: list[str]
    reason: ReasonOut | None


class WindowOut(TypedDict):
    """One time during which a reservation holds."""

    from_ns: int
    to_ns: int


class ReservationOut(TypedDict):
    """Machines kept for a project, or for nobody without one. ``state`` is ``open``, ``planned`` or ``over``.

    ``window`` is the one that is open or comes next, null when none will.
    """

    id: str
    name: str
    project: str
    nodes: list[str]
    state: str
    window: WindowOut | None
    starts_at_ns: int
    ends_at_ns: int
    every_ns: int
    until_at_ns: int
    created_by: str
