"""② What a job waits for before it waits for room: a time, another workload, its array's turn, the rest of its group.

Such jobs are *parked*: they are queued, but in no line, so they cost nothing until what they wait for happens. Parked
jobs are unparked in the turn in which it does. A workload that ended is remembered for a while, because another may
have been submitted to follow it in the very turn in which it ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from tidemill.core.outcome import Outcome
from tidemill.core.world import World
from tidemill.model.ids import JobId, ProjectId, WorkloadId, job_id
from tidemill.model.job import AttemptState, Cause, Job, JobState, Workload
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.spec import DependsOn, Group
from tidemill.units import SECOND_NS

_REMEMBERED = 4_096
_RESTING = ("NotNeeded", "RolloutTurn")
"""Why a replica rests that may be wanted again."""


def enter(world: World, workload: Workload, jobs: list[Job], out: Outcome, *, live: int = 0) -> list[Job]:
    """Let the jobs of a workload wait for what they have to; returns those that can never start.

    ``live`` is how many of its jobs have started already and are not over. Those returned are the jobs of a workload
    whose dependency ended already, and not as it had to.
    """
    spec = workload.spec
    missing = []
    for dependency in spec.after:
        if dependency.workload_id in world.workloads:
            missing.append(dependency.workload_id)
        elif (well := world.outcomes.get(dependency.workload_id)) is not None and not _satisfies(dependency.on, well):
            return jobs
    for other in missing:
        world.set(world.dependents, other, (*world.dependents.get(other, ()), workload.id))
    for index, job in enumerate(jobs, live):
        if missing:
            _park(world, job, _after(world, missing), out)
        elif spec.array_parallel and index >= spec.array_parallel:
            _park(world, job, _array(spec.array_parallel), out)
        elif workload.id in world.updating:  # the rollout says how many there are
            _park(world, job, _turn(), out)
        elif spec.service is not None and index >= spec.service.smallest:
            _park(world, job, _spare(), out)
        else:
            ready(world, job, out)
    return []


def scale(world: World, jobs: list[Job], wanted: int, out: Outcome) -> bool:
    """Whether replicas began or ceased to wait for room, so that ``wanted`` of a service's jobs do, or run.

    Those that run are left alone, and do not count when they are being given up.
    """
    active = [job for job in jobs if job.id not in world.parked and not _is_given_up(world, job)]
    spare = [job for job in jobs if (why := world.parked.get(job.id)) is not None and why.code in _RESTING]
    for job in spare[: max(0, wanted - len(active))]:
        world.drop(world.parked, job.id)
        ready(world, job, out)
    idle = [job for job in active if job.state is JobState.QUEUED]
    leaving = idle[max(0, len(idle) - max(0, len(active) - wanted)) :]
    for job in leaving:
        rest(world, job, out)
    return bool(leaving) or (bool(spare) and wanted > len(active))


def rest(world: World, job: Job, out: Outcome) -> None:
    """Let a queued replica wait until it is needed again, in no line."""
    break_promise(world, job.id)
    plan = world.held_back
    if plan is not None and plan.job_id == job.id:
        world.hold_back(None)
    world.drop(world.delayed, job.id)
    world.queue.remove(world.line_of(job), job.id)
    _leave_group(world, job, out)
    _park(world, job, _turn() if job.workload_id in world.updating else _spare(), out)


def _is_given_up(world: World, job: Job) -> bool:
    """Whether it ends because fewer replicas are needed."""
    attempt = world.attempts.get(job.id)
    return attempt is not None and attempt.state is AttemptState.ENDING and attempt.cause is Cause.RESIZED


def ready(world: World, job: Job, out: Outcome) -> None:
    """Nothing but time, the job's group and room is in its way."""
    spec = world.workloads[job.workload_id].spec
    if spec.start_after_ns > out.now and not job.attempts:
        world.set(world.delayed, job.id, spec.start_after_ns)
        world.set_timer(spec.start_after_ns, "requeue", job.id)
        out.wait(world, job.id, not_yet(spec.start_after_ns))
    elif spec.group is not None and not job.attempts:  # who has started once, with the others, goes on alone
        _join_group(world, job, spec.group, out)
    else:
        world.queue_up(job)
        out.fresh.append(job.id)
    if spec.start_before_ns and not job.attempts:
        world.set_timer(spec.start_before_ns, "too_late", job.id)


def ended(world: World, workload_id: WorkloadId) -> list[Job]:
    """Note how a workload ended, unpark what waited for that; returns the jobs that can never start now."""
    well = not world.unlucky.get(workload_id, 0)
    world.set(world.outcomes, workload_id, well)
    if len(world.outcomes) > _REMEMBERED:
        world.drop(world.outcomes, next(iter(world.outcomes)))
    hopeless: list[Job] = []
    for follower in world.dependents.get(workload_id, ()):
        workload = world.workloads.get(follower)
        if workload is None:
            continue
        on = next(one.on for one in workload.spec.after if one.workload_id == workload_id)
        jobs = [world.jobs[one] for one in _parked_of(world, workload)]
        if not _satisfies(on, well):
            hopeless.extend(jobs)
    return hopeless


def left(world: World, job: Job, out: Outcome) -> None:
    """A job is over: its array's next may come, and its group and what was promised to it are not held any more."""
    world.drop(world.parked, job.id)
    break_promise(world, job.id)
    plan = world.held_back
    if plan is not None and plan.job_id == job.id:
        world.hold_back(None)
    workload = world.workloads[job.workload_id]
    _leave_group(world, job, out)
    if workload.spec.array_parallel:
        following = next(_parked_of(world, workload), None)
        if following is not None and not _is_blocked(world, workload):
            world.drop(world.parked, following)
            ready(world, world.jobs[following], out)


def unpark_followers(world: World, workload_id: WorkloadId, out: Outcome) -> None:
    """Let the jobs go on that waited for a workload that is over, where nothing else is in their way."""
    for follower in world.dependents.get(workload_id, ()):
        workload = world.workloads.get(follower)
        if workload is None or _is_blocked(world, workload):
            continue
        for index, one in enumerate(list(_parked_of(world, workload))):
            job = world.jobs[one]
            if workload.spec.array_parallel and index >= workload.spec.array_parallel:
                _park(world, job, _array(workload.spec.array_parallel), out)
            else:
                world.drop(world.parked, one)
                ready(world, job, out)
    world.drop(world.dependents, workload_id)


def break_promise(world: World, job: JobId) -> None:
    """Give back the places that were promised to a job, and to those that start with it."""
    promise = world.promises.get(job)
    if promise is not None:
        for one in promise.together:
            world.unpromise(world.promises[one], give=True)


def withdraw(world: World, job: JobId) -> None:
    """Break what was promised to a job, and have it, or the first of its group for all, wait in line again."""
    first = world.promises[job].together[0]
    break_promise(world, job)
    world.queue_up(world.jobs[first])


def group_of(world: World, job: Job) -> tuple[JobId, ...]:
    """The jobs that have to start with this one, itself among them, in order of submission."""
    group = world.workloads[job.workload_id].spec.group
    if group is None or job.attempts:
        return (job.id,)
    return world.groups.get((job.project_id, group.name), (job.id,))[: group.size]


def group_started(world: World, first: Job, out: Outcome) -> None:
    """The jobs of a group are about to start; if there are as many of its name once more, those are next."""
    group = world.workloads[first.workload_id].spec.group
    if group is None:
        return
    key = (first.project_id, group.name)
    members = world.groups[key]
    for one in members[: group.size]:
        world.drop(world.parked, one)
    _set_members(world, key, members[group.size :])
    _line_up(world, key, group, out)


def _join_group(world: World, job: Job, group: Group, out: Outcome) -> None:
    """The first of a group stands in line for all, once all are there."""
    key = (job.project_id, group.name)
    _set_members(world, key, (*world.groups.get(key, ()), job.id))
    _line_up(world, key, group, out)


def _leave_group(world: World, job: Job, out: Outcome) -> None:
    """A job that has not started is no longer one of its group."""
    group = world.workloads[job.workload_id].spec.group
    key = (job.project_id, group.name) if group is not None else None
    if group is None or key is None or job.id not in world.groups.get(key, ()):
        return
    members = world.groups[key]
    if (plan := world.held_back) is not None and plan.job_id == members[0]:
        world.hold_back(None)
    world.queue.remove(world.line_of(job), job.id)
    _set_members(world, key, tuple(one for one in members if one != job.id))
    _line_up(world, key, group, out)


def _set_members(world: World, key: tuple[ProjectId, str], members: tuple[JobId, ...]) -> None:
    if members:
        world.set(world.groups, key, members)
    else:
        world.drop(world.groups, key)


def _line_up(world: World, key: tuple[ProjectId, str], group: Group, out: Outcome) -> None:
    """Have the first of a group that is complete wait in line, unless it does or has its promise; others are parked."""
    members = world.groups.get(key, ())
    is_complete = len(members) >= group.size
    for at, one in enumerate(members):
        job = world.jobs[one]
        if is_complete and at == 0:
            if one not in world.promises and not world.queue.is_in_line(one):
                world.drop(world.parked, one)
                world.queue_up(job)
                world.reopen_lines(())  # lines may be gone through right now
                out.fresh.append(one)
            continue
        in_batch = len(members) if not is_complete else group.size if at < group.size else len(members) - group.size
        reason = _group(group.name, in_batch, group.size)
        if not is_complete and at == 0:
            world.queue.remove(world.line_of(job), one)
        if world.parked.get(one) != reason:
            _park(world, job, reason, out)


def _park(world: World, job: Job, reason: Reason, out: Outcome) -> None:
    world.set(world.parked, job.id, reason)
    out.wait(world, job.id, reason)


def _parked_of(world: World, workload: Workload) -> Iterator[JobId]:
    return (
        one
        for index in range(workload.spec.job_count)
        if (one := job_id(workload.id, index)) in world.parked and world.jobs[one].state is JobState.QUEUED
    )


def _is_blocked(world: World, workload: Workload) -> bool:
    """Whether the workload still waits for another one."""
    return any(dependency.workload_id in world.live_jobs for dependency in workload.spec.after)


def _satisfies(on: DependsOn, well: bool) -> bool:
    return on is DependsOn.ANY or (on is DependsOn.OK) == well


def not_yet(start_after_ns: int) -> Reason:
    """Why a job waits that is to start later."""
    when = datetime.fromtimestamp(start_after_ns // SECOND_NS, UTC).isoformat(sep=" ")
    return Reason(
        code="NotYet",
        subject="start_after",
        needed=when,
        available="not reached",
        resolvable_by=ResolvableBy.TIME,
        sentence=f"It is not to start before {when}.",
    )


def _after(world: World, missing: list[WorkloadId]) -> Reason:
    names = ", ".join(world.workloads[one].spec.name for one in missing)
    return Reason(
        code="WaitsForWorkload",
        subject="after",
        needed=f"the end of {names}",
        available="not over",
        resolvable_by=ResolvableBy.TIME,
        sentence=f"It starts after {names}, which {'are' if len(missing) > 1 else 'is'} not over.",
    )


def _array(parallel: int) -> Reason:
    return Reason(
        code="ArrayLimit",
        subject="array.parallel",
        needed="its array's turn",
        available=f"{parallel} at a time",
        resolvable_by=ResolvableBy.TIME,
        sentence=f"Its array runs {parallel} jobs at a time, and others are before it.",
    )


def _spare() -> Reason:
    return Reason(
        code="NotNeeded",
        subject="service.replicas",
        needed="more requests",
        available="the replicas that there are",
        resolvable_by=ResolvableBy.TIME,
        sentence="Fewer replicas are enough for the requests there are; it starts when they are not.",
    )


def _turn() -> Reason:
    return Reason(
        code="RolloutTurn",
        subject="service.rollout",
        needed="its turn in the rollout",
        available="the replicas of both revisions that there are",
        resolvable_by=ResolvableBy.TIME,
        sentence="Its service is being brought from one revision to another, and it is not this replica's turn.",
    )


def _group(name: str, members: int, size: int) -> Reason:
    if members >= size:
        return Reason(
            code="GroupWaits",
            subject="group",
            needed=f"room for all {size} jobs",
            available="the first of the group stands in line for all",
            resolvable_by=ResolvableBy.TIME,
            sentence=f"Group {name} starts together; its first job says what it waits for.",
        )
    return Reason(
        code="GroupIncomplete",
        subject="group",
        needed=f"{size} jobs",
        available=f"{members} submitted",
        resolvable_by=ResolvableBy.POLICY,
        sentence=f"Group {name} starts together, and {members} of its {size} jobs are submitted.",
    )
