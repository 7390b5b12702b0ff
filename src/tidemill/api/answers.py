"""Values of the model as the JSON that is answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tidemill.api.shapes.data import ArtifactOut
from tidemill.api.shapes.fleet import NodeOut
from tidemill.api.shapes.money import LedgerLineOut, ModelCostOut, TokenTotalsOut, TokenUsageOut, UsageOut
from tidemill.api.shapes.scheduling import QueuedOut, QueueOut, ReservationOut, ShareOut
from tidemill.api.shapes.work import (
    AttemptOut,
    EventOut,
    ForecastOut,
    HoldingOut,
    JobOut,
    QuoteOut,
    ReasonOut,
    ReplicasOut,
    SiteOptionOut,
    WorkerOut,
    WorkloadOut,
)
from tidemill.control.questions import Queued
from tidemill.control.replicating import Account
from tidemill.core.fairness import QueueShare
from tidemill.core.unitcosts import ModelCost
from tidemill.core.world import World
from tidemill.model.artifact import Artifact
from tidemill.model.fleet import Node
from tidemill.model.ids import JobId, NodeId
from tidemill.model.job import Allocation, AllocationState, Attempt, Job, JobState, Workload
from tidemill.model.ledger import Evidence, LedgerLine, LedgerTotals, TokenTotals, TokenUsage
from tidemill.model.plan import Forecast, Holding, Quote, Reason, SiteOption
from tidemill.model.queue import Queue
from tidemill.model.reservation import Reservation
from tidemill.model.spec import Kind
from tidemill.ports import StoredEvent
from tidemill.units import MICRO_PICO, MILLI, SECOND_NS
from tidemill.wire import resources_json, spec_to_json
from tidemill.wire.requests import amounts_json
from tidemill.wire.writing import milli_json

TERMINAL = frozenset((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED))


def reason_json(reason: Reason) -> ReasonOut:
    """A reason's fields."""
    return {
        "code": reason.code,
        "subject": reason.subject,
        "needed": reason.needed,
        "available": reason.available,
        "resolvable_by": reason.resolvable_by.value,
        "sentence": reason.sentence,
    }


def forecast_json(forecast: Forecast | None) -> ForecastOut | None:
    """A forecast's fields."""
    if forecast is None:
        return None
    return {
        "earliest_at_ns": forecast.earliest_ns,
        "likely_at_ns": forecast.likely_ns,
        "latest_at_ns": forecast.latest_ns,
        "basis": forecast.basis,
    }


def holding_json(holding: Holding, *, is_visible: bool) -> HoldingOut:
    """Who holds what; of what the caller may not see, only how much and until when."""
    return {
        "job": holding.job_id if is_visible else "",
        "name": holding.name if is_visible else "",
        "project": holding.project if is_visible else "",
        "amount": holding.amount,
        "ends_at_ns": holding.ends_ns,
    }


def replicas_json(account: Account | None) -> ReplicasOut | None:
    """The fields of how many replicas a service has, and why."""
    if account is None:
        return None
    return {
        "decided_at_ns": account.at_ns,
        "wanted": account.wanted,
        "ready": account.ready,
        "coming": account.coming,
        "leaving": account.leaving,
        "least": account.least,
        "most": account.most,
        "why": account.why,
        "asks": [
            {"objective": ask.objective, "wants": ask.wants, "seen": ask.seen, "target": ask.target}
            for ask in account.asks
        ],
        "lead_ns": account.lead_ns,
        "days": account.days,
        "has_pattern": account.has_pattern,
    }


def site_option_json(option: SiteOption) -> SiteOptionOut:
    """The fields of how a job would be at one site."""
    return {
        "site": option.site,
        "rank": option.rank,
        "reason": reason_json(option.reason) if option.reason is not None else None,
        "starts_at_ns": option.starts_ns,
        "copy_ns": option.copy_ns,
        "amount_micro": option.amount_micro,
        "energy_mj": option.energy_mj,
        "carbon_mg": option.carbon_mg,
        "latency_ns": option.latency_ns,
    }


def quote_json(quote: Quote, *, visible: Callable[[JobId], bool]) -> QuoteOut:
    """A quote's fields."""
    return {
        "feasible": quote.feasible,
        "starts_now": quote.starts_now,
        "duration_ns": quote.duration_ns,
        "duration_known": quote.duration_known,
        "amount_micro": quote.amount_micro,
        "energy_mj": quote.energy_mj,
        "carbon_mg": quote.carbon_mg,
        "placement": [list(place) for place in quote.placement],
        "reasons": [reason_json(reason) for reason in quote.reasons],
        "suggestions": list(quote.suggestions),
        "forecast": forecast_json(quote.forecast),
        "finish_at_ns": quote.finish_ns,
        "options": [
            {
                "change": option.change,
                "starts_at_ns": option.starts_ns,
                "finish_at_ns": option.finish_ns,
                "amount_micro": option.amount_micro,
                "energy_mj": option.energy_mj,
                "carbon_mg": option.carbon_mg,
            }
            for option in quote.options
        ],
        "displaces": [job if visible(job) else "" for job in quote.displaces],
        "copy_ns": quote.copy_ns,
        "copy_bytes": quote.copy_bytes,
        "estimated": True,
        "rate_card": quote.rate_card,
        "currency": "USD",
        "carbon_source": quote.carbon_source,
        "sites": [site_option_json(option) for option in quote.sites],
    }


def job_json(job: Job, workload: Workload, *, project: str, reason: Reason | None, endpoint: str = "") -> JobOut:
    """A job as lists show it."""
    spec = workload.spec
    return {
        "id": job.id,
        "workload_id": job.workload_id,
        "name": spec.name,
        "kind": spec.kind.value,
        "project": project,
        "index": job.index,
        "state": job.state.value,
        "cause": job.cause.value,
        "detail": job.detail,
        "exit_code": job.exit_code,
        "priority": job.priority,
        "submitted_at_ns": job.submitted_ns,
        "first_started_at_ns": job.first_started_ns,
        "started_at_ns": job.started_ns,
        "ended_at_ns": job.ended_ns,
        "attempts": job.attempts,
        "retries": job.retries,
        "evictions": job.evictions,
        "capacity": spec.tier.value,
        "nodes": spec.nodes,
        "nodes_min": spec.smallest,
        "resources": dict(resources_json(spec.resources)),
        "labels": dict(spec.labels),
        "reason": reason_json(reason) if reason is not None and job.state is JobState.QUEUED else None,
        "endpoint": endpoint,
    }


def whole_job_json(
    job: Job,
    workload: Workload,
    *,
    project: str,
    reason: Reason | None,
    attempts: Sequence[Attempt],
    workers: Sequence[Allocation],
    nodes: dict[NodeId, Node],
) -> JobOut:
    """A job with its spec, attempts and workers."""
    is_whole = job.state is JobState.RUNNING
    endpoint = next((held.endpoint for held in reversed(workers) if is_whole and held.endpoint and _is_live(held)), "")
    answer = job_json(job, workload, project=project, reason=reason, endpoint=endpoint)
    numbers = {attempt.id: attempt.number for attempt in attempts}
    answer["spec"] = spec_to_json(workload.spec)
    answer["attempt_list"] = [attempt_json(attempt) for attempt in attempts]
    answer["workers"] = [
        worker_json(held, numbers.get(held.attempt_id, 0), nodes.get(held.node_id)) for held in workers
    ]
    return answer


def _is_live(held: Allocation) -> bool:
    return held.state is not AllocationState.RELEASED


def attempt_json(attempt: Attempt) -> AttemptOut:
    """An attempt's fields."""
    return {
        "id": attempt.id,
        "number": attempt.number,
        "state": attempt.state.value,
        "cause": attempt.cause.value,
        "detail": attempt.detail,
        "exit_code": attempt.exit_code,
        "workers": attempt.workers,
        "placed_at_ns": attempt.placed_ns,
        "started_at_ns": attempt.started_ns,
        "ready_at_ns": attempt.ready_ns,
        "ended_at_ns": attempt.ended_ns,
        "checkpoint_at_ns": attempt.checkpoint_ns,
    }


def worker_json(held: Allocation, attempt: int, node: Node | None) -> WorkerOut:
    """A worker of attempt number ``attempt``."""
    devices = {device.id: device for device in node.devices} if node is not None else {}
    return {
        "rank": held.rank,
        "attempt": attempt,
        "node": node.name if node is not None else held.node_id,
        "devices": [
            {
                "id": share.device_id,
                "milli": share.milli,
                "model": devices[share.device_id].model if share.device_id in devices else "",
                "index": devices[share.device_id].index if share.device_id in devices else -1,
                "profile": share.profile,
                "slice": share.slice,
            }
            for share in held.devices
        ],
        "cpu_milli": held.cpu_milli,
        "memory_bytes": held.memory_bytes,
        "state": held.state.value,
        "exit_code": held.exit_code,
        "isolation": list(held.isolation),
        "ports": dict(held.ports),
        "endpoint": held.endpoint,
        "cause": held.cause.value,
        "detail": held.detail,
        "scheduler": dict(held.scheduler),
        "cpu_used_ns": held.cpu_used_ns,
        "held_at_ns": held.held_ns,
        "started_at_ns": held.started_ns,
        "released_at_ns": held.released_ns,
    }


def workload_json(workload: Workload, jobs: Sequence[Job], world: World, *, project: str) -> WorkloadOut:
    """A workload with its jobs; reasons and endpoints are the world's."""
    spec = workload.spec
    return {
        "id": workload.id,
        "name": spec.name,
        "kind": spec.kind.value,
        "project": project,
        "submitted_at_ns": workload.submitted_ns,
        "state": _state_of(jobs),
        "spec": spec_to_json(spec),
        "jobs": [
            job_json(
                job,
                workload,
                project=project,
                reason=world.reasons.get(job.id),
                endpoint=endpoint_of(world, workload, job),
            )
            for job in jobs[:1_000]
        ],
        "job_count": spec.job_count,
    }


def endpoint_of(world: World, workload: Workload, job: Job) -> str:
    """Where a service's job answers now, empty when it does not."""
    if workload.spec.kind is not Kind.SERVICE:
        return ""
    worker = world.answering(world.attempts.get(job.id))
    return worker.endpoint if worker is not None else ""


def _state_of(jobs: Sequence[Job]) -> str:
    """One word for all jobs: the furthest from the end counts while any is not over, the worst afterwards."""
    states = {job.state for job in jobs}
    for state in (JobState.RUNNING, JobState.STARTING, JobState.STOPPING, JobState.QUEUED):
        if state in states:
            return state.value
    for state in (JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED):
        if state in states:
            return state.value
    return JobState.QUEUED.value


def node_json(node: Node, world: World) -> NodeOut:
    """A machine with what is free of it."""
    fleet = world.fleet
    row = fleet.row.get(node.id)
    has_free = row is not None and row < len(fleet.cpu_free) and bool(fleet.is_ready[row])
    return {
        "id": node.id,
        "name": node.name,
        "site": node.site_id,
        "state": node.state.value,
        "state_cause": node.state_cause,
        "marking": node.marking,
        "failing": [{"device": device, "detail": detail} for device, detail in node.failing],
        "taints": list(node.taints),
        "block": node.block,
        "rack": node.rack,
        "workers": len(world.by_node.get(node.id, ())),
        "held_until_at_ns": node.held_until_ns,
        "cpu_model": node.cpu_model,
        "cpu_milli": node.cpu_milli,
        "free_cpu_milli": max(0, int(fleet.cpu_free[row])) if has_free else 0,
        "memory_bytes": node.memory_bytes,
        "free_memory_bytes": max(0, int(fleet.memory_free[row])) if has_free else 0,
        "disk_bytes": node.disk_bytes,
        "others_cpu_milli": node.others_cpu_milli,
        "others_memory_bytes": node.others_memory_bytes,
        "others_gpus": node.others_gpus,
        "devices": [
            {
                "id": device.id,
                "index": device.index,
                "model": device.model,
                "reported": device.reported,
                "memory_bytes": device.memory_bytes,
                "island": device.island,
                "mig": device.mig.value,
                "slices": [profile for profile, _, _ in device.slices],
                "free_milli": max(0, int(fleet.gpu_free[row, column])) if has_free else 0,
            }
            for column, device in enumerate(node.devices)
        ],
        "images": node.images,
        "labels": dict(node.labels),
        "joined_at_ns": node.joined_ns,
    }


def queue_json(queue: Queue, *, parent: str, project: str) -> QueueOut:
    """A place in the quota tree, as it can be sent back."""
    return {
        "name": queue.name,
        "parent": parent,
        "project": project,
        "weight": milli_json(queue.weight_milli),
        "guaranteed": amounts_json(queue.guaranteed),
        "limit": amounts_json(queue.limit),
        "max_running": queue.max_running,
        "max_queued": queue.max_queued,
    }


def share_json(row: QueueShare, *, project: str) -> ShareOut:
    """Who has what."""
    return {
        "name": row.name,
        "parent": row.parent,
        "project": project,
        "depth": row.depth,
        "weight": milli_json(row.weight_milli),
        "guaranteed": dict(row.guaranteed),
        "limit": dict(row.limit),
        "held": dict(row.held),
        "borrowed": dict(row.borrowed),
        "entitled": dict(row.entitled),
        "models": dict(row.models),
        "share": row.share,
        "running": row.running,
        "queued": row.queued,
    }


def queued_json(queued: Queued, *, project: str, user: str, now: int) -> QueuedOut:
    """A waiting job."""
    job, spec = queued.job, queued.workload.spec
    return {
        "position": queued.position,
        "job": job.id,
        "name": spec.name,
        "kind": spec.kind.value,
        "project": project,
        "user": user,
        "nodes": spec.nodes,
        "nodes_min": spec.smallest,
        "resources": dict(resources_json(spec.resources)),
        "capacity": spec.tier.value,
        "priority": job.priority,
        "submitted_at_ns": job.submitted_ns,
        "waited_ns": max(0, now - job.submitted_ns),
        "evictions": job.evictions,
        "starts_by_at_ns": queued.starts_by_ns,
        "sites": list(queued.sites),
        "reason": reason_json(queued.reason) if queued.reason is not None else None,
    }


def reservation_json(reservation: Reservation, *, project: str, nodes: list[str], now: int) -> ReservationOut:
    """A reservation with the window that is open or comes next."""
    window = reservation.window(after=now)
    return {
        "id": reservation.id,
        "name": reservation.name,
        "project": project,
        "nodes": nodes,
        "state": "over" if window is None else "open" if window[0] <= now else "planned",
        "window": {"from_ns": window[0], "to_ns": window[1]} if window is not None else None,
        "starts_at_ns": reservation.starts_ns,
        "ends_at_ns": reservation.ends_ns,
        "every_ns": reservation.every_ns,
        "until_at_ns": reservation.until_ns,
        "created_by": reservation.created_by,
    }


def event_json(event: StoredEvent) -> EventOut:
    """An event with what there is to know about it."""
    return {"seq": event.seq, "type": event.entry.type, "data": event_data(event)}


def event_data(event: StoredEvent) -> dict[str, Any]:
    """What there is to know about an event."""
    entry = event.entry
    return {
        "seq": event.seq,
        "at_ns": entry.at_ns,
        "project_id": entry.project_id,
        "workload_id": entry.workload_id,
        "job_id": entry.job_id,
        **dict(entry.body),
    }


def ledger_json(line: LedgerLine) -> LedgerLineOut:
    """A ledger line's fields."""
    usage = line.usage
    return {
        "id": line.id,
        "node_id": usage.node_id,
        "meter": usage.meter,
        "resource": usage.resource,
        "from_ns": usage.from_ns,
        "to_ns": usage.to_ns,
        "milli": usage.milli,
        "amount_micro": line.amount_micro,
        "energy_mj": line.energy_mj,
        "energy_evidence": usage.evidence.value,
        "carbon_mg": line.carbon_mg,
        "rate_card": line.rate_card,
        "included": usage.included,
        "others": usage.others,
        "launch_id": usage.launch_id,
        "attempt_id": usage.attempt_id,
        "job_id": usage.job_id,
        "project_id": usage.project_id,
    }


def token_usage_json(usage: TokenUsage) -> TokenUsageOut:
    """A request's fields."""
    return {
        "id": usage.id,
        "at_ns": usage.at_ns,
        "project_id": usage.project_id,
        "token_id": usage.token_id,
        "model": usage.model,
        "workload_id": usage.workload_id,
        "job_id": usage.job_id,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "estimated": usage.is_estimated,
        "user": usage.user,
        "label": usage.label,
        "amount_pico": usage.amount_pico,
    }


def usage_json(totals: Sequence[LedgerTotals], tokens: Sequence[TokenTotals]) -> UsageOut:
    """The sum of sums."""
    held: dict[str, int] = {}
    for one in totals:
        for resource, amount in one.held_milli_ns:
            held[resource] = held.get(resource, 0) + amount
    measured = bool(totals) and all(one.evidence is Evidence.MEASURED for one in totals if one.lines)
    lines = sum(one.lines for one in totals)
    return {
        "held_milli_ns": held,
        "device_seconds": {resource: amount / (MILLI * SECOND_NS) for resource, amount in held.items()},
        "amount_micro": sum(one.amount_micro for one in totals),
        "currency": "USD",
        "energy_mj": sum(one.energy_mj for one in totals),
        "energy_evidence": (Evidence.MEASURED if measured and lines else Evidence.ESTIMATED).value,
        "carbon_mg": sum(one.carbon_mg for one in totals),
        "lines": lines,
        "tokens": [_token_totals_json(named, group) for named, group in sorted(_grouped(tokens).items())],
        "tokens_amount_micro": sum(one.amount_pico for one in tokens) // MICRO_PICO,
    }


def model_cost_json(cost: ModelCost) -> ModelCostOut:
    """A model's fields."""
    return {
        "model": cost.model,
        "requests": cost.requests,
        "prompt_tokens": cost.prompt_tokens,
        "completion_tokens": cost.completion_tokens,
        "amount_micro": cost.amount_micro,
        "energy_mj": cost.energy_mj,
        "energy_evidence": cost.energy_evidence.value,
        "carbon_mg": cost.carbon_mg,
        "amount_micro_per_1k_tokens": cost.per_thousand(cost.amount_micro),
        "energy_mj_per_1k_tokens": cost.per_thousand(cost.energy_mj),
        "carbon_mg_per_1k_tokens": cost.per_thousand(cost.carbon_mg),
    }


def _grouped(tokens: Sequence[TokenTotals]) -> dict[tuple[str, str, str, str], list[TokenTotals]]:
    """Sums of several projects by what they are grouped by."""
    groups: dict[tuple[str, str, str, str], list[TokenTotals]] = {}
    for one in tokens:
        groups.setdefault((one.model, one.token_id, one.user, one.label), []).append(one)
    return groups


def _token_totals_json(named: tuple[str, str, str, str], group: Sequence[TokenTotals]) -> TokenTotalsOut:
    return {
        "model": named[0],
        "token_id": named[1],
        "user": named[2],
        "label": named[3],
        "requests": sum(one.requests for one in group),
        "estimated": sum(one.estimated for one in group),
        "prompt_tokens": sum(one.prompt_tokens for one in group),
        "completion_tokens": sum(one.completion_tokens for one in group),
        "amount_micro": sum(one.amount_pico for one in group) // MICRO_PICO,
    }


def artifact_json(artifact: Artifact, *, project: str) -> ArtifactOut:
    """An artifact's fields."""
    return {
        "id": artifact.id,
        "name": artifact.name,
        "version": artifact.version,
        "project": project,
        "digest": artifact.digest,
        "size": artifact.size,
        "created_at_ns": artifact.created_ns,
        "job": artifact.job_id,
        "metadata": dict(artifact.metadata),
    }
