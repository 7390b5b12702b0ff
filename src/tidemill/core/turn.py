"""★ The spine: one turn takes what happened and returns everything that follows from it.

The live control plane, the quote and the twin call this function and nothing else. It reads no clock, throws no
dice, does no I/O; it works on the world in place, under an undo log, so its cost follows what changed. The same
world, inbox and instant give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tidemill.core.admission import why_not_now
from tidemill.core.ending import end_attempt
from tidemill.core.facts import take
from tidemill.core.outcome import Outcome
from tidemill.core.place import place_gang
from tidemill.core.queueing import Line
from tidemill.core.quota import exceeds_limit
from tidemill.core.rating import rate_usage
from tidemill.core.starting import start
from tidemill.core.world import World
from tidemill.model.events import Fact
from tidemill.model.ids import JobId, LaunchId
from tidemill.model.job import AllocationState, Cause
from tidemill.model.plan import Plan, Stop
from tidemill.model.policy import Policy


def turn(world: World, inbox: Sequence[Fact], *, now: int, policy: Policy) -> Plan:
    """What to store, what to do and when to look again, after ``inbox`` happened; ``world`` is left changed.

    The caller stores the plan and then calls ``world.commit()``, or ``world.rollback()`` when it could not.
    """
    world.begin()
    out = Outcome(now, policy)
    for fact in inbox:  # ⓪ facts move things along; ① what is submitted is admitted
        take(world, fact, out)
    _timers(world, out)
    _start_what_fits(world, out)  # ② order ③ places ④ leases
    _explain(world, out)
    _cut_long_stretches(world, out)  # ⑥ usage
    ledger = tuple(  # ⑦ prices
        rate_usage(usage, world.rates, world.sites[world.nodes[usage.node_id].site_id]) for usage in out.usage
    )
    return Plan(
        changes=world.changes(),
        log=tuple(out.log),
        ledger=ledger,
        waiting=tuple(out.waiting),
        commands=tuple(out.commands),  # ⑤ launch, stop, forget
        wake_ns=_next_wake(world, policy),
    )


def _timers(world: World, out: Outcome) -> None:
    """Time alone did this: a retry's wait is over, a job ran its full time, a worker outlived its grace."""
    for what, identity in world.due(out.now):
        if what == "requeue" and world.delayed.get(JobId(identity), out.now + 1) <= out.now:
            job = world.jobs[JobId(identity)]
            world.drop(world.delayed, job.id)
            world.queue.add(world.line_of(job), job)
            out.fresh.append(job.id)
        elif what == "expire" and (attempt := world.attempts.get(JobId(identity))) is not None and attempt.started_ns:
            limit = world.workloads[world.jobs[attempt.job_id].workload_id].spec.max_duration_ns
            if out.now - attempt.started_ns >= limit > 0:
                end_attempt(world, attempt, Cause.TIMED_OUT, out, detail="max_duration is over")
        elif what == "stop_again":
            held = world.allocations.get(LaunchId(identity))
            if held is not None and held.state is AllocationState.DRAINING:
                out.commands.append(Stop(launch_id=held.id, grace_ns=0))
                world.set_timer(out.now + out.policy.stop_retry_ns, "stop_again", held.id)


def _start_what_fits(world: World, out: Outcome) -> None:
    """Start waiting jobs in order; a line whose first job does not fit is closed until there is more room."""
    closed: set[Line] = set()
    started = 0

    def is_closed(line: Line) -> bool:
        return line in closed or world.blocked.get(line) == world.fleet.released

    for line, job_id in world.queue.heads(is_closed):
        if started >= out.policy.starts_per_turn:
            world.set_timer(out.now, "more", "")
            break
        job = world.jobs[job_id]
        project = world.projects.get(line.project_id)
        reason = None
        if project is not None:
            reason = exceeds_limit(project, line.shape.resources, line.workers, world.held.get(line.project_id))
        places = () if reason else place_gang(world.fleet, line.shape, line.workers)
        if places:
            world.queue.remove(line, job_id)
            world.on_undo(partial(world.queue.add, line, job))
            start(world, job, places, out)
            started += 1
            continue
        if reason is None:
            world.blocked[line] = world.fleet.released
            reason = why_not_now(world.fleet, line.shape, line.workers)
        closed.add(line)
        world.line_reasons[line] = reason
        out.wait(world, job_id, reason)


def _explain(world: World, out: Outcome) -> None:
    """Every job that began to wait in this turn and did not start says why."""
    for job_id in out.fresh:
        if world.is_waiting(job_id) and job_id not in world.reasons:
            job = world.jobs[job_id]
            line = world.line_of(job)
            reason = world.line_reasons.get(line) or why_not_now(world.fleet, line.shape, line.workers)
            out.wait(world, job_id, reason)


def _cut_long_stretches(world: World, out: Outcome) -> None:
    """Bound how much unbilled usage a crash could leave to the next turn."""
    if out.now - world.metered_ns < out.policy.meter_every_ns:
        return
    world.metered(out.now)
    for node_id, name in list(world.meters):
        out.cut(world, node_id, name)


def _next_wake(world: World, policy: Policy) -> int:
    instants = [world.timers[0][0]] if world.timers else []
    if world.meters:
        instants.append(world.metered_ns + policy.meter_every_ns)
    return min(instants, default=0)
