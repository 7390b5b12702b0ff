"""⓪ What a rollout does to the world: a revision comes beside another, and one of both goes in the end.

How many replicas either has is told by ``Scaled``, as for any service.
"""

from __future__ import annotations

from tidemill.core import ending
from tidemill.core.lifecycle import JOB, ROLLOUT, apply, may
from tidemill.core.outcome import Outcome
from tidemill.core.world import World
from tidemill.model.events import RolloutBegan, RolloutMoved
from tidemill.model.ids import WorkloadId, job_id
from tidemill.model.job import Cause, Job, JobState
from tidemill.model.rollout import Rollout, RolloutState


def may_begin(world: World, fact: RolloutBegan) -> bool:
    """Whether the revision before is live, and not being exchanged by another rollout."""
    before = fact.rollout.before_id
    return before in world.live_jobs and before not in world.updating and fact.workload.id not in world.workloads


def begin(world: World, rollout: Rollout, out: Outcome) -> None:
    """The rollout is under way; the jobs of the new revision are still to be submitted."""
    world.add(world.rollouts, rollout.id, rollout)
    world.set(world.updating, rollout.before_id, rollout.id)
    world.set(world.updating, rollout.workload_id, rollout.id)
    first = next(iter(live_jobs(world, rollout.before_id)), None)
    out.note("RolloutBegan", first, revision=rollout.revision, to=rollout.workload_id, by=rollout.by)


def move(world: World, fact: RolloutMoved, out: Outcome) -> None:
    """Move a rollout on, unless it has moved since that was found."""
    rollout = world.rollouts.get(fact.rollout_id)
    if rollout is None or (rollout.state, rollout.step) != (fact.state, fact.step):
        return
    if not may(ROLLOUT, rollout.state, fact.event) or (fact.event == "watched" and rollout.watched_ns):
        return
    state = apply(ROLLOUT, rollout.state, fact.event)
    is_over = state in (RolloutState.COMPLETE, RolloutState.REVERTED)
    after = world.update(
        world.rollouts,
        rollout.id,
        rollout,
        state=state,
        step=rollout.step + (fact.event == "advanced"),
        watched_ns=out.now if fact.event == "watched" else 0,
        ended_ns=out.now if is_over else 0,
        detail=fact.detail,
        by=fact.by or rollout.by,
    )
    _note(world, after, fact, out)
    if is_over:
        _end(world, after, out)


def _note(world: World, rollout: Rollout, fact: RolloutMoved, out: Outcome) -> None:
    ids = (rollout.workload_id, rollout.before_id)
    job = next((one for workload in ids for one in live_jobs(world, workload)), None)
    revision, detail, by = rollout.revision, fact.detail, fact.by
    match fact.event:
        case "advanced" | "promoted":
            to, step = rollout.state.value, rollout.step
            out.note("RolloutAdvanced", job, revision=revision, to=to, step=step, detail=detail, by=by)
        case "reversed":
            out.note("RolloutReversed", job, revision=revision, detail=detail, by=by)
        case "completed":
            out.note("RolloutCompleted", job, revision=revision)
        case "reverted":
            out.note("RolloutReverted", job, revision=revision, detail=detail)


def live_jobs(world: World, workload_id: WorkloadId) -> list[Job]:
    """A workload's jobs that are not over, by index."""
    workload = world.workloads.get(workload_id)
    if workload is None:
        return []
    ids = (job_id(workload_id, index) for index in range(workload.spec.job_count))
    return [job for one in ids if (job := world.jobs.get(one)) is not None]


def _end(world: World, rollout: Rollout, out: Outcome) -> None:
    """One revision stays; the other one's jobs end."""
    world.drop(world.rollouts, rollout.id)
    world.drop(world.updating, rollout.before_id)
    world.drop(world.updating, rollout.workload_id)
    is_complete = rollout.state is RolloutState.COMPLETE
    goes = rollout.before_id if is_complete else rollout.workload_id
    detail = f"revision {rollout.revision} took its place" if is_complete else f"taken back: {rollout.detail}"
    for job in live_jobs(world, goes):
        if job.state is JobState.QUEUED:
            ending.end_job(world, job, "cancelled", Cause.CANCELLED, out, detail=detail)
        elif may(JOB, job.state, "stop_requested"):
            world.update(world.jobs, job.id, job, state=apply(JOB, job.state, "stop_requested"), stop_requested=True)
            ending.end_attempt(world, world.attempts[job.id], Cause.CANCELLED, out, detail=detail)
