"""⑤ How things end: a worker is released, an attempt ends when all its workers are gone, a job ends or queues again.

The decision to end an attempt stops its other workers; until the last is confirmed gone nothing starts in its
place. Then the attempt's cause decides about the job, by the spec's retry policy.
"""

from __future__ import annotations

from tidemill.core import waiting
from tidemill.core.lifecycle import ALLOCATION, ATTEMPT, JOB, apply, may
from tidemill.core.meter import meters_held
from tidemill.core.outcome import Outcome
from tidemill.core.world import World
from tidemill.model.ids import JobId
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Cause, Job, JobState
from tidemill.model.plan import Forget, Stop
from tidemill.model.policy import Policy
from tidemill.model.spec import RetryOn, WorkloadSpec

_RETRIED_AS = {
    Cause.NODE_LOST: RetryOn.NODE_LOST,
    Cause.PREEMPTED: RetryOn.PREEMPTED,
    Cause.ERROR: RetryOn.ERROR,
    Cause.OUT_OF_MEMORY: RetryOn.ERROR,
    Cause.NOT_READY: RetryOn.ERROR,
}


def release(
    world: World,
    held: Allocation,
    out: Outcome,
    *,
    exit_code: int | None,
    cause: Cause,
    detail: str,
    cpu_used_ns: int = 0,
    scheduler: tuple[tuple[str, str], ...] = (),
) -> None:
    """Close the books on a worker that is gone and free what it held."""
    out.cut(world, held.node_id, meters_held(held))
    after = world.update(
        world.allocations,
        held.id,
        held,
        state=apply(ALLOCATION, held.state, "released"),
        released_ns=out.now,
        exit_code=exit_code,
        cause=cause,
        detail=detail,
        cpu_used_ns=cpu_used_ns or held.cpu_used_ns,
        endpoint="",
        scheduler=scheduler,
    )
    world.let_go(held)
    if world.nodes[held.node_id].has_others:
        out.count_others(world, held.node_id)
    world.drop(world.allocations, held.id)
    out.note(
        "WorkerExited",
        world.jobs[held.job_id],
        rank=after.rank,
        exit_code=exit_code,
        cause=cause.value,
        detail=detail,
        **{f"scheduler_{name}": value for name, value in scheduler},
    )
    out.commands.append(Forget(launch_id=held.id, node_id=held.node_id))


def end_attempt(
    world: World,
    attempt: Attempt,
    cause: Cause,
    out: Outcome,
    *,
    detail: str = "",
    exit_code: int | None = None,
    until_ns: int = 0,
) -> None:
    """Decide that an attempt ends, for the first cause given, and stop the workers that are still there.

    They have their checkpoint grace, or what of it is left before ``until_ns``, when a machine of theirs goes.
    """
    if not may(ATTEMPT, attempt.state, "ending"):
        return
    world.update(
        world.attempts,
        attempt.job_id,
        attempt,
        state=apply(ATTEMPT, attempt.state, "ending"),
        cause=cause,
        detail=detail,
        exit_code=exit_code,
    )
    world.drop(world.growable, attempt.job_id)
    for worker in world.workers_of(attempt):
        drain(world, worker, out, until_ns=until_ns)


def drain(world: World, worker: Allocation, out: Outcome, *, until_ns: int = 0) -> None:
    """Ask one worker to stop within its checkpoint grace; it holds what it has until it is gone."""
    if not may(ALLOCATION, worker.state, "drained"):
        return
    grace = _grace(world, worker, out, until_ns)
    world.update(
        world.allocations,
        worker.id,
        worker,
        state=apply(ALLOCATION, worker.state, "drained"),
        drain_ns=out.now,
        endpoint="",
    )
    world.mark_row(worker.id, "gone", out.now + grace)
    out.commands.append(Stop(launch_id=worker.id, node_id=worker.node_id, grace_ns=grace))
    world.set_timer(out.now + grace + out.policy.stop_margin_ns, "stop_again", worker.id)


def hasten(world: World, attempt: Attempt, out: Outcome, *, until_ns: int) -> None:
    """Leave the workers of an attempt that are being stopped no longer a grace than until ``until_ns``."""
    for worker in world.workers_of(attempt):
        if worker.state is not AllocationState.DRAINING:
            continue
        grace = _grace(world, worker, out, until_ns)
        if out.now + grace < worker.drain_ns + _grace(world, worker, out, 0):
            world.mark_row(worker.id, "gone", out.now + grace)
            out.commands.append(Stop(launch_id=worker.id, node_id=worker.node_id, grace_ns=grace))


def _grace(world: World, worker: Allocation, out: Outcome, until_ns: int) -> int:
    """How long a worker has to save its work. Before a machine goes some of the time is left to tell how it ended."""
    grace = world.workloads[world.jobs[worker.job_id].workload_id].spec.checkpoint_grace_ns
    return min(grace, max(until_ns - out.now - out.policy.stop_margin_ns, 0)) if until_ns else grace


def displace(world: World, job_id: JobId, out: Outcome, *, by: str, until_ns: int = 0) -> None:
    """End a job's attempt so that its room can be given to somebody with a better claim; the job queues again.

    Nothing when it ends already.
    """
    attempt = world.attempts[job_id]
    if not may(ATTEMPT, attempt.state, "ending"):
        return
    job = world.jobs[job_id]
    lost = out.now - max(attempt.checkpoint_ns, attempt.started_ns) if attempt.started_ns else 0
    out.note("Preempted", job, attempt=attempt.number, by=by, since_checkpoint_s=lost // 1_000_000_000)
    end_attempt(world, attempt, Cause.PREEMPTED, out, detail=by, until_ns=until_ns)


def shed(world: World, worker: Allocation, out: Outcome, *, by: str) -> None:
    """Have an elastic gang go on without this worker."""
    attempt = world.attempts[worker.job_id]
    world.update(world.attempts, worker.job_id, attempt, workers=attempt.workers - 1)
    drain(world, worker, out)
    world.set(world.growable, worker.job_id, None)
    out.note("Shrunk", world.jobs[worker.job_id], attempt=attempt.number, workers=attempt.workers - 1, by=by)


def finish_if_gone(world: World, held: Allocation, out: Outcome) -> None:
    """When no worker of the attempt is left: end the attempt, and with it the job, or queue the job again."""
    job, attempt = world.jobs[held.job_id], world.attempts[held.job_id]
    if world.has_workers(job):
        return
    if attempt.state is not AttemptState.ENDING:
        attempt = world.update(
            world.attempts,
            job.id,
            attempt,
            state=apply(ATTEMPT, attempt.state, "ending"),
            cause=Cause.COMPLETED,
            exit_code=0,
        )
    world.update(world.attempts, job.id, attempt, state=apply(ATTEMPT, attempt.state, "ended"), ended_ns=out.now)
    world.drop(world.attempts, job.id)
    world.drop(world.workers, attempt.id)
    world.drop(world.unstarted, attempt.id)
    world.drop(world.growable, job.id)
    spec = world.workloads[job.workload_id].spec
    if attempt.started_ns:
        job = world.update(world.jobs, job.id, job, served_ns=job.served_ns + out.now - attempt.started_ns)
    out.note("AttemptEnded", job, attempt=attempt.number, cause=attempt.cause.value, detail=attempt.detail)
    if job.state is JobState.STOPPING:
        end_job(world, job, "cancelled", Cause.CANCELLED, out, detail=attempt.detail, exit_code=attempt.exit_code)
    elif attempt.cause is Cause.COMPLETED:
        end_job(world, job, "succeeded", Cause.COMPLETED, out, exit_code=0)
    elif attempt.cause is Cause.RESIZED and spec.service is not None:
        _rest(world, job, attempt, out)
    elif attempt.cause is Cause.PREEMPTED and should_retry(spec, attempt):
        _queue_after_displacing(world, job, attempt, out)
    elif should_retry(spec, attempt) and (retries := _retries_after(spec, job, attempt, out)) is not None:
        _queue_again(world, job, attempt, out, retries=retries)
    else:
        end_job(world, job, "failed", attempt.cause, out, detail=attempt.detail, exit_code=attempt.exit_code)


def should_retry(spec: WorkloadSpec, attempt: Attempt) -> bool:
    """Whether the spec wants another attempt after one that ended this way.

    A port that Tidemill chose itself and found taken is chosen anew without asking.
    """
    if attempt.cause is Cause.PORT_TAKEN:
        return not any(port.number for port in spec.ports)
    if attempt.cause is Cause.NOT_ALIVE:  # whoever asks for the probe asks for another replica
        return True
    if attempt.exit_code is not None and attempt.exit_code in spec.retry.exit_codes:
        return True
    return _RETRIED_AS.get(attempt.cause) in spec.retry.on


def backoff_ns(retries: int, policy: Policy) -> int:
    """How long a job waits before retry number ``retries`` (from 0): doubling, bounded."""
    return min(policy.retry_backoff_ns << min(retries, 30), policy.retry_backoff_max_ns)


def _retries_after(spec: WorkloadSpec, job: Job, attempt: Attempt, out: Outcome) -> int | None:
    """How many retries are counted with the one that follows this attempt; None when that would be too many.

    A service that was ready for long begins anew with all its retries, and that it stopped answering is not counted.
    """
    was_steady = bool(attempt.ready_ns) and out.now - attempt.ready_ns >= out.policy.retry_forget_ns
    if was_steady and attempt.cause is Cause.NOT_ALIVE:
        return 0
    retries = 0 if was_steady else job.retries
    return retries + 1 if retries < spec.retry.max else None


def _queue_again(world: World, job: Job, attempt: Attempt, out: Outcome, *, retries: int) -> None:
    not_before = out.now + backoff_ns(max(0, retries - 1), out.policy)
    world.update(
        world.jobs,
        job.id,
        job,
        state=apply(JOB, job.state, "requeued"),
        retries=retries,
        cause=attempt.cause,
        detail=attempt.detail,
        exit_code=attempt.exit_code,
        not_before_ns=not_before,
        waiting_since_ns=out.now,
        started_ns=0,
    )
    world.line_up(job.project_id, 1)
    world.set(world.delayed, job.id, not_before)
    world.set_timer(not_before, "requeue", job.id)
    out.note("Requeued", job, retry=retries, cause=attempt.cause.value, detail=attempt.detail)


def _rest(world: World, job: Job, attempt: Attempt, out: Outcome) -> None:
    """A replica that was given up waits until it is needed again."""
    after = world.update(
        world.jobs,
        job.id,
        job,
        state=apply(JOB, job.state, "requeued"),
        cause=attempt.cause,
        detail=attempt.detail,
        exit_code=attempt.exit_code,
        waiting_since_ns=out.now,
        started_ns=0,
    )
    world.line_up(job.project_id, 1)
    waiting.rest(world, after, out)
    out.note("Requeued", job, retry=job.retries, cause=attempt.cause.value, detail=attempt.detail)


def _queue_after_displacing(world: World, job: Job, attempt: Attempt, out: Outcome) -> None:
    """Being displaced is not the job's failure: it waits for room again at once, and no retry is counted."""
    after = world.update(
        world.jobs,
        job.id,
        job,
        state=apply(JOB, job.state, "requeued"),
        evictions=job.evictions + 1,
        cause=attempt.cause,
        detail=attempt.detail,
        exit_code=attempt.exit_code,
        waiting_since_ns=out.now,
        started_ns=0,
    )
    world.line_up(job.project_id, 1)
    world.note(after, now=out.now)
    world.queue_up(after)
    out.fresh.append(job.id)
    out.note("Requeued", job, retry=job.retries, cause=attempt.cause.value, detail=attempt.detail)


def end_job(
    world: World, job: Job, event: str, cause: Cause, out: Outcome, *, detail: str = "", exit_code: int | None = None
) -> None:
    """End a job for good."""
    after = world.update(
        world.jobs,
        job.id,
        job,
        state=apply(JOB, job.state, event),
        cause=cause,
        detail=detail,
        exit_code=exit_code,
        ended_ns=out.now,
    )
    out.note(event.capitalize(), job, cause=cause.value, detail=detail, exit_code=exit_code)
    if cause is Cause.COMPLETED:
        world.note(after, now=out.now, finished=True)
    else:
        world.note_gone(after)
    if job.state is JobState.QUEUED:
        world.line_up(job.project_id, -1)
    world.drop(world.jobs, job.id)
    world.drop(world.reasons, job.id)
    world.drop(world.delayed, job.id)
    waiting.left(world, after, out)
    left = world.live_jobs.get(after.workload_id, 1) - 1
    world.set(world.live_jobs, after.workload_id, left)
    if cause is not Cause.COMPLETED:
        world.set(world.unlucky, after.workload_id, world.unlucky.get(after.workload_id, 0) + 1)
    if left == 0:
        hopeless = waiting.ended(world, after.workload_id)
        world.forget(after.workload_id)
        for other in hopeless:
            if other.id in world.jobs:
                detail = f"{after.workload_id} did not end as it had to"
                end_job(world, other, "cancelled", Cause.DEPENDENCY, out, detail=detail)
        waiting.unpark_followers(world, after.workload_id, out)
