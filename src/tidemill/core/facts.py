"""⓪ What happened, applied to the world: each fact moves things along their life, or changes nothing.

Facts may come late, twice or out of order. A fact about something that is over, or held under an older fencing
token, is passed over; that is how a repeated report stays harmless.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial, singledispatch
from typing import Final

from tidemill.core import ending, revising, waiting
from tidemill.core.admission import why_refused
from tidemill.core.lifecycle import ALLOCATION, ATTEMPT, JOB, NODE, apply, may
from tidemill.core.meter import meters_held
from tidemill.core.outcome import Outcome, rate_so_far
from tidemill.core.world import World
from tidemill.model.events import (
    Became,
    Checkpointed,
    CopiesSeen,
    Delivered,
    DeviceFailed,
    DeviceRecovered,
    Exited,
    Fact,
    LaunchRefused,
    Marking,
    MetersRead,
    ModelPolicySet,
    NeverLaunched,
    NodeFellSilent,
    NodeJoined,
    NodeMarked,
    NodeWentAway,
    Prepared,
    ProjectOpened,
    QueueSet,
    ReservationCancelled,
    ReservationMade,
    RolloutBegan,
    RolloutMoved,
    Sampled,
    Scaled,
    SiteSet,
    Started,
    StopRequested,
    Submitted,
    Vanished,
)
from tidemill.model.fleet import DeliveryMark, Node, NodeState
from tidemill.model.ids import JobId, LaunchId, NodeId, job_id
from tidemill.model.job import Allocation, AllocationState, AttemptState, Cause, Job, JobState
from tidemill.model.plan import Launch
from tidemill.model.spec import Kind

LEFT: Final = "left"
"""What a machine that left its cloud went away for, in ``NodeWentAway`` and in its ``state_cause``."""


def has_left(node: Node) -> bool:
    """Whether a machine was taken out of its cloud for good."""
    return node.state is NodeState.LOST and node.state_cause == LEFT


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
    world.lay_fleet()
    spec = workload.spec
    world.add(world.workloads, workload.id, workload)
    world.set(world.live_jobs, workload.id, spec.job_count)
    if spec.service is not None:
        world.set(world.services, workload.id, None)
    jobs = []
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
        jobs.append(job)
        world.note(job, now=out.now)
    world.ask(workload)
    world.line_up(workload.project_id, len(jobs))
    out.note("Submitted", jobs[0], name=spec.name, kind=spec.kind.value, jobs=spec.job_count)
    for job in waiting.enter(world, workload, jobs, out):
        detail = "what it was to follow did not end as it had to"
        ending.end_job(world, job, "cancelled", Cause.DEPENDENCY, out, detail=detail)
    if (reason := why_refused(world, workload)) is not None:
        for job in jobs:
            if world.is_waiting(job.id):
                out.wait(world, job.id, reason)


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
def _scaled(fact: Scaled, world: World, out: Outcome) -> None:
    workload = world.workloads.get(fact.workload_id)
    if workload is None or workload.spec.service is None:
        return
    if not workload.spec.service.is_scaled and workload.id not in world.updating:
        return
    jobs = [
        world.jobs[one] for index in range(workload.spec.job_count) if (one := job_id(workload.id, index)) in world.jobs
    ]
    leaving = [job for job in jobs if job.id in fact.give_up and job.id in world.attempts]
    for job in leaving:
        ending.end_attempt(world, world.attempts[job.id], Cause.RESIZED, out, detail="fewer replicas are needed")
    changed = waiting.scale(world, jobs, fact.wanted, out)
    if jobs and (changed or leaving):
        out.note("Scaled", jobs[0], wanted=fact.wanted, detail=fact.why)


@_take.register
def _rollout_began(fact: RolloutBegan, world: World, out: Outcome) -> None:
    if revising.may_begin(world, fact):
        revising.begin(world, fact.rollout, out)
        _submitted(Submitted(at_ns=fact.at_ns, workload=fact.workload), world, out)


@_take.register
def _rollout_moved(fact: RolloutMoved, world: World, out: Outcome) -> None:
    revising.move(world, fact, out)


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
    if attempt.state is AttemptState.RUNNING:  # it joined an elastic gang
        world.mark_row(held.id, "since", attempt.started_ns)
    if attempt.state is AttemptState.STARTING and world.all_started(attempt):
        world.update(
            world.attempts, job.id, attempt, state=apply(ATTEMPT, attempt.state, "started"), started_ns=out.now
        )
        for worker in world.workers_of(attempt):
            world.mark_row(worker.id, "since", out.now)
        _answers_when_whole(world, job.id, out)
        if world.eyeing:  # somebody may be about to displace it as soon as that is allowed
            world.set_timer(out.now + out.policy.min_run_ns, "displace", "")
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
    if held is None or held.rank:  # the first of a gang answers for all
        return
    endpoint = fact.endpoint if fact.ready else ""
    if held.endpoint == endpoint or held.state is AllocationState.DRAINING:
        return
    world.update(world.allocations, held.id, held, endpoint=endpoint)
    out.note("BecameReady" if fact.ready else "BecameUnready", world.jobs[held.job_id], rank=0, endpoint=fact.endpoint)
    _answers_when_whole(world, held.job_id, out)


def _answers_when_whole(world: World, job: JobId, out: Outcome) -> None:
    """Note since when a service's replica is ready: its first worker is, and all others run."""
    attempt = world.attempts[job]
    if not attempt.ready_ns and world.answering(attempt) is not None:
        world.update(world.attempts, job, attempt, ready_ns=out.now)


@_take.register
def _exited(fact: Exited, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None:
        return
    attempt = world.attempts[held.job_id]
    kind = world.workloads[world.jobs[held.job_id].workload_id].spec.kind
    cause, detail = fact.cause, fact.detail
    if held.state is AllocationState.DRAINING and attempt.state is not AttemptState.ENDING:
        cause, detail = Cause.RESIZED, detail or "the gang goes on without it"
    elif cause is Cause.NONE:
        if fact.exit_code:
            cause, detail = Cause.ERROR, detail or f"worker {held.rank} exited with status {fact.exit_code}"
        elif kind is Kind.SERVICE and attempt.state is not AttemptState.ENDING:
            cause, detail = Cause.ERROR, "the service's process ended, though a service runs until it is stopped"
        else:
            cause = Cause.COMPLETED
    ending.release(world, held, out, exit_code=fact.exit_code, cause=cause, detail=detail, cpu_used_ns=fact.cpu_used_ns)
    if cause not in (Cause.COMPLETED, Cause.RESIZED):
        ending.end_attempt(world, world.attempts[held.job_id], cause, out, detail=detail, exit_code=fact.exit_code)
    ending.finish_if_gone(world, held, out)


@_take.register
def _launch_refused(fact: LaunchRefused, world: World, out: Outcome) -> None:
    _lose(world, fact.launch_id, fact.fence, Cause.LAUNCH_FAILED, fact.detail, out)


@_take.register
def _vanished(fact: Vanished, world: World, out: Outcome) -> None:
    detail = fact.detail or "the worker's runner is gone without a word"
    _lose(world, fact.launch_id, fact.fence, fact.cause, detail, out, said=fact)


@_take.register
def _never_launched(fact: NeverLaunched, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None or fact.state not in (None, held.state):  # it moved on since: the next look will tell
        return
    if held.state is AllocationState.RESERVED:
        out.commands.append(Launch(launch_id=held.id, node_id=held.node_id))
    else:
        _lose(world, held.id, held.fence, Cause.NODE_LOST, "the engine does not know this worker", out)


@_take.register
def _sampled(fact: Sampled, world: World, out: Outcome) -> None:
    for name, energy in fact.energy_mj:
        meter = world.meters.get((fact.node_id, name))
        if meter is not None:
            world.watch_meters([meter])
            meter.read(energy, now=out.now)
    for name, milli in fact.use_milli:
        if (fact.node_id, name) in world.meters:
            world.set(world.uses, (fact.node_id, name), (fact.at_ns, milli))


def _continues(world: World, fact: Sampled) -> bool:
    """Whether one of the counters was read before in the stretch that its meter is in."""
    meters = (world.meters.get((fact.node_id, name)) for name, _ in fact.energy_mj)
    return any(meter is not None and meter.counter_mj is not None for meter in meters)


@_take.register
def _meters_read(fact: MetersRead, world: World, out: Outcome) -> None:
    attempt = world.attempts.get(fact.job_id)
    for held in world.workers_of(attempt) if attempt is not None else ():
        out.cut(world, held.node_id, meters_held(held))


@_take.register
def _node_joined(fact: NodeJoined, world: World, out: Outcome) -> None:
    node = fact.node
    known = world.nodes.get(node.id)
    if known is not None and has_left(known):  # seen once more while it goes; one that comes again is another node
        return
    if known is None:
        fresh = replace(node, state=NodeState.READY, version=1, joined_ns=out.now)
        world.add(world.nodes, node.id, fresh)
        out.note("NodeJoined", node=node.name, cpus=node.cpu_milli // 1000, gpus=len(node.devices))
    else:
        after = _rejoined(known, node, out)
        same = replace(after, joined_ns=known.joined_ns) == known
        if same and (node.id, "cpu") in world.meters and node.id in world.fleet.row:
            return
        absent = known.boot_id != node.boot_id or known.state is NodeState.LOST
        names = ("cpu", *(device.id for device in known.devices))
        for meter in [world.meters[node.id, name] for name in names if (node.id, name) in world.meters]:
            world.watch_meters([meter])
            if absent:
                meter.since_ns = max(meter.since_ns, out.now)
            elif meter.name not in {device.id for device in node.devices} | {"cpu"}:
                out.cut(world, node.id, [meter.name])
                world.drop(world.meters, (node.id, meter.name))
                world.drop(world.uses, (node.id, meter.name))
        if not same:
            joined_ns = out.now if absent else known.joined_ns
            _change_node(world, known, replace(after, joined_ns=joined_ns))
        if not _is_same_machine(after, known):
            out.note("NodeJoined", node=node.name, cpus=node.cpu_milli // 1000, gpus=len(node.devices))
            if after.state is NodeState.SUSPECT:
                world.set_timer(after.held_until_ns, "recheck", node.id)
                out.note("NodeSuspected", node=node.name, losses=len(after.lost_at_ns))
    world.open_meters(node, now=out.now)
    out.count_others(world, node.id)
    world.rebuild_fleet()


def _is_same_machine(after: Node, before: Node) -> bool:
    """Whether nothing but what others hold there, and when it joined, is different."""
    held = {name: getattr(before, name) for name in ("others_cpu_milli", "others_memory_bytes", "others_gpus")}
    return replace(after, joined_ns=before.joined_ns, version=before.version, **held) == before


def _rejoined(known: Node, node: Node, out: Outcome) -> Node:
    """The node as it joined again; what was decided about it stands."""
    event, cause, lately, until = "joined", known.state_cause, known.lost_at_ns, known.held_until_ns
    if known.state in (NodeState.LOST, NodeState.SILENT):
        policy = out.policy
        lately = tuple(at for at in known.lost_at_ns if at + policy.flap_window_ns > out.now)
        if known.marking:
            event = {Marking.CORDON: "cordoned", Marking.DRAIN: "drained"}[Marking(known.marking)]
        elif policy.flap_losses and len(lately) >= policy.flap_losses:
            event = "suspected"
            until = out.now + policy.flap_hold_ns
            cause = f"lost {len(lately)} times lately"
        else:
            cause = ""
    return replace(
        node,
        state=apply(NODE, known.state, event),
        version=known.version,
        joined_ns=known.joined_ns,
        marking=known.marking,
        failing=known.failing,
        lost_at_ns=lately,
        held_until_ns=until,
        state_cause=cause,
    )


def _change_node(world: World, before: Node, after: Node) -> None:
    """The node as it is now, in place of what it was."""
    values = {name: getattr(after, name) for name in after.__dataclass_fields__ if name not in ("id", "version")}
    world.update(world.nodes, before.id, before, **values)


@_take.register
def _node_went_away(fact: NodeWentAway, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    if node is None:
        return
    if node.state is NodeState.LOST:
        if fact.detail == LEFT and node.state_cause != LEFT:
            world.update(world.nodes, node.id, node, marking="", state_cause=LEFT)
        return
    for launch in list(world.by_node.get(node.id, ())):
        held = world.allocations[launch]
        _lose(world, held.id, held.fence, Cause.NODE_LOST, fact.detail or "the machine went away", out)
    for promise in [p for p in world.promises.values() if any(place.node_id == node.id for place in p.placed.places)]:
        if promise.job_id in world.promises:  # it may have gone with that of another of its group
            waiting.withdraw(world, promise.job_id)
    for name in ("cpu", *(device.id for device in node.devices)):
        out.cut(world, node.id, [name])
        world.drop(world.meters, (node.id, name))
        world.drop(world.uses, (node.id, name))
    lost_at = (*node.lost_at_ns, out.now)[-64:] if not _is_shutdown(fact) else node.lost_at_ns
    state = apply(NODE, node.state, "lost")
    has_left = fact.detail == LEFT
    marking, cause = ("", LEFT) if has_left else (node.marking, node.state_cause)
    world.update(world.nodes, node.id, node, state=state, lost_at_ns=lost_at, marking=marking, state_cause=cause)
    out.note("NodeLost", node=node.name, detail=fact.detail)
    world.rebuild_fleet()


@_take.register
def _node_fell_silent(fact: NodeFellSilent, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    if node is None or not may(NODE, node.state, "silenced"):
        return
    state = apply(NODE, node.state, "silenced")
    world.update(world.nodes, node.id, node, state=state, state_cause=fact.detail)
    out.note("NodeFellSilent", node=node.name, detail=fact.detail)
    world.refresh_readiness()


@_take.register
def _copies_seen(fact: CopiesSeen, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    cached = frozenset(fact.cached)
    before = world.cached.get(fact.node_id, frozenset())
    if node is None or cached == before:
        return
    world.set(world.cached, fact.node_id, cached)
    world.copies_are_new()
    out.note("CopiesSeen", node=node.name, copies=len(cached), new=len(cached - before), gone=len(before - cached))


@_take.register
def _site_set(fact: SiteSet, world: World, out: Outcome) -> None:
    before = world.sites.get(fact.site.id)
    if before == fact.site:
        return
    if before is not None:  # what was used so far costs what it cost so far
        names: dict[NodeId, list[str]] = {}
        for node_id, name in world.meters:
            if world.nodes[node_id].site_id == before.id:
                names.setdefault(node_id, []).append(name)
        for node_id, meters in names.items():
            out.cut(world, node_id, meters)
        rate_so_far(world, out)
    world.set(world.sites, fact.site.id, fact.site)
    world.rebuild_fleet()
    world.reopen()
    out.note("SiteSet", site=fact.site.name)


def _is_shutdown(fact: NodeWentAway) -> bool:
    """Whether the machine went because it was asked to, which is no failure."""
    return fact.detail in ("shut down", LEFT)


@_take.register
def _node_marked(fact: NodeMarked, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    if node is None:
        return
    event = {Marking.CORDON: "cordoned", Marking.DRAIN: "drained", Marking.RESUME: "resumed"}[fact.marking]
    by = f"{fact.marking} by {fact.by}" if fact.by else fact.marking.value
    cause = f"{by}: {fact.detail}" if fact.detail else by
    if fact.marking is Marking.RESUME:
        if not node.marking and not node.failing and node.state is not NodeState.SUSPECT:
            return
        state = apply(NODE, node.state, event) if may(NODE, node.state, event) else node.state
        world.update(
            world.nodes,
            node.id,
            node,
            state=state,
            marking="",
            failing=(),
            lost_at_ns=(),
            held_until_ns=0,
            state_cause="",
        )
        out.note("NodeResumed", node=node.name, by=fact.by)
    elif node.marking == fact.marking.value:
        if fact.until_ns and fact.marking is Marking.DRAIN:
            _clear_node(world, node, out, by=cause, until_ns=fact.until_ns)
        return
    else:
        state = node.state
        if state not in (NodeState.LOST, NodeState.SILENT) and may(NODE, state, event):
            state = apply(NODE, state, event)
        world.update(world.nodes, node.id, node, state=state, marking=fact.marking.value, state_cause=cause)
        out.note("NodeCordoned" if fact.marking is Marking.CORDON else "NodeDrained", node=node.name, detail=cause)
    world.refresh_readiness()
    if fact.marking is Marking.DRAIN:
        _clear_node(world, node, out, by=cause, until_ns=fact.until_ns)


def _clear_node(world: World, node: Node, out: Outcome, *, by: str, until_ns: int = 0) -> None:
    """Displace everything that runs on a node, in time for ``until_ns`` unless that is zero."""
    for job in dict.fromkeys(world.allocations[launch].job_id for launch in world.by_node.get(node.id, ())):
        if until_ns:
            ending.hasten(world, world.attempts[job], out, until_ns=until_ns)
            if world.attempts[job].state is AttemptState.ENDING:
                continue
        ending.displace(world, job, out, by=by, until_ns=until_ns)


@_take.register
def _device_failed(fact: DeviceFailed, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    known = dict(node.failing) if node is not None else {}
    if node is None or fact.device_id in known or fact.device_id not in {device.id for device in node.devices}:
        return
    world.update(world.nodes, node.id, node, failing=(*node.failing, (fact.device_id, fact.detail)))
    out.note("DeviceFailed", node=node.name, device=fact.device_id, detail=fact.detail)
    world.rebuild_fleet()


@_take.register
def _device_recovered(fact: DeviceRecovered, world: World, out: Outcome) -> None:
    node = world.nodes.get(fact.node_id)
    if node is None or fact.device_id not in dict(node.failing):
        return
    world.update(world.nodes, node.id, node, failing=tuple(one for one in node.failing if one[0] != fact.device_id))
    out.note("DeviceRecovered", node=node.name, device=fact.device_id)
    world.rebuild_fleet()


@_take.register
def _delivered(fact: Delivered, world: World, out: Outcome) -> None:
    known = world.deliveries.get(fact.outpost_id)
    taken = known.number if known is not None else 0
    if fact.last <= taken:
        return
    news = fact.after(taken)
    newest = {one.node_id: one for one in news if isinstance(one, Sampled)}
    for one in news:
        if isinstance(one, Sampled) and newest[one.node_id] is not one and not _continues(world, one):
            continue  # the time between two readings of the past is in nobody's stretch
        take(world, one, out)
    if known is None:
        world.add(world.deliveries, fact.outpost_id, DeliveryMark(id=fact.outpost_id, version=1, number=fact.last))
    else:
        world.update(world.deliveries, known.id, known, number=fact.last)


@_take.register
def _checkpointed(fact: Checkpointed, world: World, out: Outcome) -> None:
    held = _current(world, fact.launch_id, fact.fence)
    if held is None:
        return
    job, attempt = world.jobs[held.job_id], world.attempts[held.job_id]
    if fact.at_ns <= attempt.checkpoint_ns:
        return
    world.update(world.attempts, job.id, attempt, checkpoint_ns=min(fact.at_ns, out.now))
    for worker in world.workers_of(attempt):
        world.mark_row(worker.id, "saved", min(fact.at_ns, out.now))
    out.note("Checkpointed", job, attempt=attempt.number, detail=fact.detail)


@_take.register
def _project_opened(fact: ProjectOpened, world: World, _out: Outcome) -> None:
    if fact.project.id not in world.projects:
        world.set(world.projects, fact.project.id, fact.project)
        world.quota.open_project(fact.project)


@_take.register
def _queue_set(fact: QueueSet, world: World, out: Outcome) -> None:
    known = world.queues.get(fact.queue.id)
    if known is not None and replace(fact.queue, version=known.version) == known:
        return
    if known is None:
        world.add(world.queues, fact.queue.id, replace(fact.queue, version=1))
    else:
        names = ("name", "parent_id", "project_id", "weight_milli", "guaranteed", "limit", "max_running", "max_queued")
        world.update(world.queues, known.id, known, **{name: getattr(fact.queue, name) for name in names})
    world.on_undo(partial(world.quota.replace_queue, fact.queue.id, known))
    world.quota.set_queue(world.queues[fact.queue.id])
    world.reopen()
    out.note("QueueSet", queue=fact.queue.name)


@_take.register
def _model_policy_set(fact: ModelPolicySet, _world: World, out: Outcome) -> None:
    pickles = "allow" if fact.project.allows_pickles else "refuse"
    out.note("ModelPolicySet", project=fact.project.name, pickles=pickles, by=fact.by)


@_take.register
def _reservation_made(fact: ReservationMade, world: World, out: Outcome) -> None:
    made = replace(fact.reservation, version=1)
    if made.id in world.reservations:
        return
    world.add(world.reservations, made.id, made)
    out.note("ReservationMade", reservation=made.name, nodes=len(made.node_ids), starts_ns=made.starts_ns)
    window = made.window(after=out.now)
    if window is not None:
        world.set_timer(max(window[0], out.now), "window", made.id)
    world.reopen()


@_take.register
def _reservation_cancelled(fact: ReservationCancelled, world: World, out: Outcome) -> None:
    known = world.reservations.get(fact.reservation_id)
    if known is not None:
        world.update(world.reservations, known.id, known, cancelled_ns=out.now)
        world.drop(world.reservations, known.id)
        out.note("ReservationCancelled", reservation=known.name)
        world.reopen()


def _lose(
    world: World, launch: LaunchId, fence: int, cause: Cause, detail: str, out: Outcome, said: Vanished | None = None
) -> None:
    """A worker is gone without having ended by itself. ``said`` is what is known of its end all the same."""
    held = _current(world, launch, fence)
    if held is None:
        return
    attempt = world.attempts[held.job_id]
    code = said.exit_code if said is not None else None
    used, words = (said.cpu_used_ns, said.scheduler) if said is not None else (0, ())
    is_resized = held.state is AllocationState.DRAINING and attempt.state is not AttemptState.ENDING
    why = Cause.RESIZED if is_resized else cause
    ending.release(world, held, out, exit_code=code, cause=why, detail=detail, cpu_used_ns=used, scheduler=words)
    if not is_resized:
        ending.end_attempt(world, attempt, cause, out, detail=detail, exit_code=code)
    ending.finish_if_gone(world, held, out)


def _current(world: World, launch: LaunchId, fence: int) -> Allocation | None:
    """The live allocation under that fencing token."""
    held = world.allocations.get(launch)
    return held if held is not None and held.fence == fence else None
