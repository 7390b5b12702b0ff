"""⓪ What happened, applied to the world: each fact moves things along their life, or changes nothing.

Facts may come late, twice or out of order. A fact about something that is over, or held under an older fencing
token, is passed over; that is how a repeated report stays harmless.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from tidemill.core import ending
from tidemill.core.admission import why_never
from tidemill.core.lifecycle import ALLOCATION, ATTEMPT, JOB, NODE, apply, may
from tidemill.core.meter import shares_of
from tidemill.core.outcome import Outcome
from tidemill.core.world import World
from tidemill.model.events import (
    Became,
    Exited,
    Fact,
    LaunchRefused,
    MetersRead,
    NeverLaunched,
    NodeJoined,
    NodeWentAway,
    Prepared,
    Sampled,
    Started,
    StopRequested,
    Submitted,
    Vanished,
)
from tidemill.model.fleet import Node, NodeState
from tidemill.model.ids import LaunchId, job_id
from tidemill.model.job import Allocation, AllocationState, AttemptState, Cause, Job, JobState
from tidemill.model.plan import Launch
from tidemill.model.spec import Kind


def take(world: World, fact: Fact, out: Outcome) -> None:
    """Apply one fact."""
    _take(fact, world, out)


@singledispatch
def _take(fact: object, _world: World, _out: Outcome) -> None:
    raise TypeError(f"{type(fact).__name__} is not a fact")


@_take.register
def _submitted(fact: Submitted, world: World, out: Outcome) -> None:
    workload = fact.workload
    if workload.id in world.workloads:
        return
    spec = workload.spec
    world.add(world.workloads, workload.id, workload)
    world.set(world.live_jobs, workload.id, spec.job_count)
    for index in range(spec.job_count):
        job = Job(
            id=job_id(workload.id, index),
            workload_id=workload.id,
            project_id=workload.project_id,
            index=index,
            state=JobState.QUEUED,
            version=1,
            priority=spec.priority,
            submitted_ns=workload.submitted_ns,
        )
        world.add(world.jobs, job.id, job)
        world.queue.add(world.line_of(job), job)
        out.fresh.append(job.id)
        if index == 0:
            out.note("Submitted", job, name=spec.name, kind=spec.kind.value, jobs=spec.job_count)
    project = world.projects.get(workload.project_id)
    if project is not None and (reason := why_never(world.fleet, spec, project)) is not None:
        for index in range(spec.job_count):
            out.wait(world, job_id(workload.id, index), reason)


@_take.register
def _stop_requested(fact: StopRequested, world: World, out: Outcome) -> None:
    job = world.jobs.get(fact.job_id)
    if job is None or job.stop_requested:
        return
    out.note("StopRequested", job, by=fact.by)
    if may(JOB, job.state, "cancelled") and job.state is JobState.QUEUED:
        ending.end_job(world, job, "cancelled", Cause.CANCELLED, out, detail=f"stopped by {fact.by}" if fact.by else "")
    elif may(JOB, job.state, "stop_requested"):
        world.update(world.jobs, job.id, job, state=apply(JOB, job.state, "stop_requested"), stop_requested=True)
        detail = f"stopped by {fact.by}" if fact.by else ""
        ending.end_attempt(world, world.attempts[job.id], Cause.CANCELLED, out, detail=detail)


@_take.register
def _prepared(fact: Prepared, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is not None and may(ALLOCATION, held.state, "prepared"):
        world.update(world.allocations, held.id, held, state=apply(ALLOCATION, held.state, "prepared"))
        out.note("WorkerPreparing", world.jobs[held.job_id], rank=held.rank, node=held.node_id)


@_take.register
def _started(fact: Started, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None or not may(ALLOCATION, held.state, "started"):
        return
    world.update(
        world.allocations,
        held.id,
        held,
        state=apply(ALLOCATION, held.state, "started"),
        started_ns=out.now,
        isolation=fact.isolation,
    )
    job, attempt = world.jobs[held.job_id], world.attempts[held.job_id]
    out.note("WorkerStarted", job, rank=held.rank, attempt=attempt.number, node=held.node_id)
    pending = (AllocationState.RESERVED, AllocationState.PREPARING)
    if attempt.state is AttemptState.STARTING and not any(w.state in pending for w in world.workers_of(attempt)):
        world.update(
            world.attempts, job.id, attempt, state=apply(ATTEMPT, attempt.state, "started"), started_ns=out.now
        )
        if may(JOB, job.state, "started"):
            world.update(
                world.jobs,
                job.id,
                job,
                state=apply(JOB, job.state, "started"),
                started_ns=out.now,
                first_started_ns=job.first_started_ns or out.now,
            )
            out.note("Started", job, attempt=attempt.number, workers=attempt.workers)
        limit = world.workloads[job.workload_id].spec.max_duration_ns
        if limit:
            world.set_timer(out.now + limit, "expire", job.id)


@_take.register
def _became(fact: Became, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None:
        return
    endpoint = fact.endpoint if fact.ready else ""
    if held.endpoint == endpoint:
        return
    world.update(world.allocations, held.id, held, endpoint=endpoint)
    job, attempt = world.jobs[held.job_id], world.attempts[held.job_id]
    if fact.ready and not attempt.ready_ns:
        world.update(world.attempts, job.id, attempt, ready_ns=out.now)
    out.note("BecameReady" if fact.ready else "BecameUnready", job, rank=held.rank, endpoint=fact.endpoint)


@_take.register
def _exited(fact: Exited, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None:
        return
    attempt = world.attempts[held.job_id]
    kind = world.workloads[world.jobs[held.job_id].workload_id].spec.kind
    cause, detail = fact.cause, fact.detail
    if cause is Cause.NONE:
        if fact.exit_code:
            cause, detail = Cause.ERROR, detail or f"worker {held.rank} exited with status {fact.exit_code}"
        elif kind is Kind.SERVICE and attempt.state is not AttemptState.ENDING:
            cause, detail = Cause.ERROR, "the service's process ended, though a service runs until it is stopped"
        else:
            cause = Cause.COMPLETED
    ending.release(world, held, out, exit_code=fact.exit_code, cause=cause, detail=detail, cpu_used_ns=fact.cpu_used_ns)
    if cause is not Cause.COMPLETED:
        ending.end_attempt(world, world.attempts[held.job_id], cause, out, detail=detail, exit_code=fact.exit_code)
    ending.finish_if_gone(world, held, out)


@_take.register
def _launch_refused(fact: LaunchRefused, world: World, out: Outcome) -> None:
    _lose(world, fact.launch_id, fact.fence, Cause.LAUNCH_FAILED, fact.detail, out)


@_take.register
def _vanished(fact: Vanished, world: World, out: Outcome) -> None:
    detail = fact.detail or "the worker's runner is gone without a word"
    _lose(world, fact.launch_id, fact.fence, Cause.NODE_LOST, detail, out)


@_take.register
def _never_launched(fact: NeverLaunched, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None or fact.state not in (None, held.state):  # it moved on since: the next look will tell
        return
    if held.state is AllocationState.RESERVED:
        out.commands.append(Launch(launch_id=held.id))
    else:
        _lose(world, held.id, held.fence, Cause.NODE_LOST, "the engine does not know this worker", out)


@_take.register
def _sampled(fact: Sampled, world: World, _out: Outcome) -> None:
    for name, energy in fact.energy_mj:
        meter = world.meters.get((fact.node_id, name))
        if meter is not None:
            world.watch_meter(meter)
            meter.read(energy)


@_take.register
def _meters_read(fact: MetersRead, world: World, out: Outcome) -> None:
    for held in world.allocations.values():
        if held.job_id == fact.job_id:
            for name, _ in shares_of(held):
                out.cut(world, held.node_id, name)


@_take.register
def _node_joined(fact: NodeJoined, world: World, out: Outcome) -> None:
    node = fact.node
    known = world.nodes.get(node.id)
    if known is None:
        fresh = _as_joined(node, NodeState.READY, version=1, joined_ns=out.now)
        world.add(world.nodes, node.id, fresh)
        out.note("NodeJoined", node=node.name, cpus=node.cpu_milli // 1000, gpus=len(node.devices))
    else:
        state = apply(NODE, known.state, "joined")
        same = _as_joined(node, state, version=known.version, joined_ns=known.joined_ns) == known
        if same and (node.id, "cpu") in world.meters and node.id in world.fleet.row:
            return
        absent = known.boot_id != node.boot_id or known.state is NodeState.LOST
        for meter in [meter for key, meter in world.meters.items() if key[0] == node.id]:
            world.watch_meter(meter)
            if absent:
                meter.since_ns = max(meter.since_ns, out.now)
            elif meter.name not in {device.id for device in node.devices} | {"cpu"}:
                out.cut(world, node.id, meter.name)
                world.drop(world.meters, (node.id, meter.name))
        if not same:
            joined = _as_joined(node, state, version=known.version, joined_ns=out.now if absent else known.joined_ns)
            world.update(
                world.nodes,
                node.id,
                joined,
                state=state,
            )
            out.note("NodeJoined", node=node.name, cpus=node.cpu_milli // 1000, gpus=len(node.devices))
    world.open_meters(node, now=out.now)
    world.rebuild_fleet()


@_take.register
def _node_went_away(fact: NodeWentAway, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    if node is None or node.state is NodeState.LOST:
        return
    for held in [held for held in world.allocations.values() if held.node_id == node.id]:
        _lose(world, held.id, held.fence, Cause.NODE_LOST, fact.detail or "the machine went away", out)
    for key in [key for key in world.meters if key[0] == node.id]:
        out.cut(world, *key)
        world.drop(world.meters, key)
    world.update(world.nodes, node.id, node, state=apply(NODE, node.state, "lost"))
    out.note("NodeLost", node=node.name, detail=fact.detail)
    world.rebuild_fleet()


def _as_joined(node: Node, state: NodeState, *, version: int, joined_ns: int) -> Node:
    return replace(node, state=state, version=version, joined_ns=joined_ns)


def _lose(world: World, launch: LaunchId, fence: int, cause: Cause, detail: str, out: Outcome) -> None:
    """A worker is gone without having ended by itself."""
    held = _current(world, launch, fence)
    if held is None:
        return
    ending.release(world, held, out, exit_code=None, cause=cause, detail=detail)
    ending.end_attempt(world, world.attempts[held.job_id], cause, out, detail=detail)
    ending.finish_if_gone(world, held, out)


def _current(world: World, launch: LaunchId, fence: int) -> Allocation | None:
    """The live allocation under that fencing token."""
    held = world.allocations.get(launch)
    return held if held is not None and held.fence == fence else None
