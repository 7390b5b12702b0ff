"""A batch as rows, made before the database is touched: what to insert, what to update over which version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tidemill.errors import Stale
from tidemill.model.cloud import Rental
from tidemill.model.fleet import DeliveryMark, Node
from tidemill.model.ids import NodeId
from tidemill.model.job import Allocation, Attempt, Job, Workload
from tidemill.model.ledger import LedgerLine
from tidemill.model.plan import Change
from tidemill.model.queue import Queue, QueueUsage
from tidemill.model.registry import Model, ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.ports import Batch
from tidemill.store.codec import encode

Row = dict[str, Any]
OTHERS: Final = "others"
"""In the ledger's column of launches, in which nothing means idle: no launch of ours, and yet it was held."""
Thing = (
    Workload
    | Job
    | Attempt
    | Allocation
    | Node
    | DeliveryMark
    | Queue
    | QueueUsage
    | Reservation
    | Rental
    | Rollout
    | Model
    | ModelVersion
)
THINGS: Final[tuple[type[Thing], ...]] = (
    Workload,
    Job,
    Attempt,
    Allocation,
    Node,
    DeliveryMark,
    Queue,
    QueueUsage,
    Reservation,
    Rental,
    Rollout,
    Model,
    ModelVersion,
)
LOW_BITS: Final = 32
LOW_MASK: Final = (1 << LOW_BITS) - 1


@dataclass(slots=True)
class Rows:
    """What one commit writes. Inserts and updates are by the type of thing; an update has ``assumed`` and
    ``key`` beside its new values. ``reasons`` are those of jobs that the batch does not insert."""

    inserts: dict[type[Thing], list[Row]] = field(default_factory=dict)
    updates: dict[type[Thing], list[Row]] = field(default_factory=dict)
    reasons: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    ledger: list[Row] = field(default_factory=list)
    marks: list[Row] = field(default_factory=list)
    idempotency: list[Row] = field(default_factory=list)


def rows_of(batch: Batch) -> Rows:
    """The rows of a batch. Raises: Stale when its own changes contradict each other."""
    rows = Rows()
    reasons = {waiting.job_id: encode(waiting.reason) for waiting in batch.waiting}
    for kind, assumed, after in net_changes(batch.changes):
        row = _ROWS[kind](after)
        if assumed is None:
            if kind is Job:
                row["reason"] = reasons.pop(row["id"], None) if row["state"] == "queued" else None
            rows.inserts.setdefault(kind, []).append(row)
        else:
            row["key"], row["assumed"] = row.pop("id"), assumed
            rows.updates.setdefault(kind, []).append(row)
    rows.reasons = [{"key": job_id, "reason": reason} for job_id, reason in reasons.items()]
    rows.events = [
        {
            "project_id": entry.project_id,
            "workload_id": entry.workload_id,
            "job_id": entry.job_id,
            "body": encode(entry),
        }
        for entry in batch.log
    ]
    rows.ledger = [_ledger(line) for line in batch.ledger]
    rows.marks = [
        {"node_id": node_id, "meter": meter, "until_ns": until} for (node_id, meter), until in marks(batch.ledger)
    ]
    rows.idempotency = [
        {"principal_id": record.principal_id, "key": record.key, "body": encode(record)} for record in batch.idempotency
    ]
    return rows


def net_changes(changes: Sequence[Change]) -> Iterable[tuple[type[Thing], int | None, Thing]]:
    """One change for each thing: from the version that the first assumed to the value that the last gives.

    Raises: Stale when a change of a thing does not follow from the one before it.
    """
    net: dict[tuple[type[Thing], str], tuple[int | None, Thing]] = {}
    for change in changes:
        after = change.after
        key = (type(after), after.id)
        assumed = change.assumed
        if isinstance(after, Workload) and assumed is not None:
            raise ValueError("a workload never changes")
        if key in net:
            first, before = net[key]
            if assumed is None or assumed != version_of(before):
                raise Stale("Two changes of one batch contradict each other.", field="id", value=after.id)
            assumed = first
        net[key] = assumed, after
    for (kind, _), (assumed, after) in net.items():
        yield kind, assumed, after


def version_of(thing: Thing) -> int:
    """The version of a thing; a workload never changes and has version 1."""
    return 1 if isinstance(thing, Workload) else thing.version


def marks(lines: Iterable[LedgerLine]) -> Iterable[tuple[tuple[NodeId, str], int]]:
    """How far these lines meter each meter of each node, in ns."""
    until: dict[tuple[NodeId, str], int] = {}
    for line in lines:
        key = (line.usage.node_id, line.usage.meter)
        until[key] = max(until.get(key, line.usage.to_ns), line.usage.to_ns)
    return until.items()


def _workload(it: Workload) -> Row:
    return {
        "id": it.id,
        "project_id": it.project_id,
        "kind": it.spec.kind.value,
        "name": it.spec.name,
        "submitted_ns": it.submitted_ns,
        "body": encode(it),
    }


def _job(it: Job) -> Row:
    return {
        "id": it.id,
        "workload_id": it.workload_id,
        "position": it.index,
        "state": it.state.value,
        "version": it.version,
        "body": encode(it),
    }


def _attempt(it: Attempt) -> Row:
    return {
        "id": it.id,
        "job_id": it.job_id,
        "number": it.number,
        "state": it.state.value,
        "version": it.version,
        "body": encode(it),
    }


def _allocation(it: Allocation) -> Row:
    return {
        "id": it.id,
        "attempt_id": it.attempt_id,
        "job_id": it.job_id,
        "fence": it.fence,
        "rank": it.rank,
        "state": it.state.value,
        "version": it.version,
        "body": encode(it),
    }


def _node(it: Node) -> Row:
    return {"id": it.id, "name": it.name, "version": it.version, "body": encode(it)}


def _plain(it: DeliveryMark | Queue | QueueUsage) -> Row:
    return {"id": it.id, "version": it.version, "body": encode(it)}


def _reservation(it: Reservation) -> Row:
    return {"id": it.id, "cancelled_ns": it.cancelled_ns, "version": it.version, "body": encode(it)}


def _rental(it: Rental) -> Row:
    return {"id": it.id, "state": it.state.value, "ended_ns": it.ended_ns, "version": it.version, "body": encode(it)}


def _rollout(it: Rollout) -> Row:
    return {
        "id": it.id,
        "first_id": it.first_id,
        "workload_id": it.workload_id,
        "ended_ns": it.ended_ns,
        "version": it.version,
        "body": encode(it),
    }


def _model(it: Model) -> Row:
    return {
        "id": it.id,
        "project_id": it.project_id,
        "name": it.name,
        "version": it.version,
        "body": encode(it),
    }


def _model_version(it: ModelVersion) -> Row:
    return {
        "id": it.id,
        "model_id": it.model_id,
        "project_id": it.project_id,
        "number": it.number,
        "job_id": it.lineage.job_id,
        "digest": it.digest,
        "deleted_ns": it.deleted_ns,
        "version": it.version,
        "body": encode(it),
    }


_ROWS: Final[dict[type[Thing], Callable[[Any], Row]]] = {
    Workload: _workload,
    Job: _job,
    Attempt: _attempt,
    Allocation: _allocation,
    Node: _node,
    DeliveryMark: _plain,
    Queue: _plain,
    QueueUsage: _plain,
    Reservation: _reservation,
    Rental: _rental,
    Rollout: _rollout,
    Model: _model,
    ModelVersion: _model_version,
}


def _ledger(line: LedgerLine) -> Row:
    usage = line.usage
    held = usage.milli * (usage.to_ns - usage.from_ns)
    return {
        "id": line.id,
        "project_id": usage.project_id,
        "job_id": usage.job_id,
        "launch_id": usage.launch_id or ("" if usage.is_idle else OTHERS),
        "resource": usage.resource,
        "to_ns": usage.to_ns,
        "held_high": held >> LOW_BITS,
        "held_low": held & LOW_MASK,
        "amount_micro": line.amount_micro,
        "energy_mj": line.energy_mj,
        "carbon_mg": line.carbon_mg,
        "evidence": usage.evidence.value,
        "body": encode(line),
    }
