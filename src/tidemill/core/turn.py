"""★ The spine: one turn takes what happened and returns everything that follows from it.

The live control plane, the quote and the twin call this function and nothing else. It reads no clock, throws no
dice, does no I/O; it works on the world in place, under an undo log, so its cost follows what changed. The same
world, inbox and instant give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidemill.core import waiting
from tidemill.core.ending import displace, end_attempt, end_job
from tidemill.core.facts import take
from tidemill.core.outcome import Outcome, rate_so_far
from tidemill.core.reserve import is_for
from tidemill.core.scheduling import schedule
from tidemill.core.world import World
from tidemill.model.events import Fact
from tidemill.model.fleet import NodeState
from tidemill.model.ids import JobId, LaunchId, NodeId, ReservationId
from tidemill.model.job import AllocationState, Cause, JobState
from tidemill.model.ledger import Ledger
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
    world.lay_fleet()
    schedule(world, out)  # ② order ③ places ④ backfill, displacing
    _cut_long_stretches(world, out)  # ⑥ usage
    rate_so_far(world, out)  # ⑦ prices
    return Plan(
        changes=world.changes(),
        log=tuple(out.log),
        ledger=Ledger(tuple(out.ledger)),
        waiting=tuple(out.waiting),
        commands=tuple(out.commands),  # ⑤ launch, stop, forget
        wake_ns=_next_wake(world, policy),
    )


def _timers(world: World, out: Outcome) -> None:
    """Time alone did this. What is no longer true when its time comes is passed over."""
    for what, identity in world.due(out.now):
        if what == "requeue" and world.delayed.get(JobId(identity), out.now + 1) <= out.now:
            job = world.jobs[JobId(identity)]
            world.drop(world.delayed, job.id)
            waiting.ready(world, job, out)
        elif what == "expire" and (attempt := world.attempts.get(JobId(identity))) is not None and attempt.started_ns:
            limit = world.workloads[world.jobs[attempt.job_id].workload_id].spec.max_duration_ns
            if out.now - attempt.started_ns >= limit > 0:
                end_attempt(world, attempt, Cause.TIMED_OUT, out, detail="max_duration is over")
        elif what == "stop_again":
            held = world.allocations.get(LaunchId(identity))
            if held is not None and held.state is AllocationState.DRAINING:
                out.commands.append(Stop(launch_id=held.id, node_id=held.node_id, grace_ns=0))
                world.set_timer(out.now + out.policy.stop_retry_ns, "stop_again", held.id)
        elif what == "too_late":
            late = world.jobs.get(JobId(identity))
            if late is not None and late.state is JobState.QUEUED and not late.attempts:
                end_job(world, late, "cancelled", Cause.TOO_LATE, out, detail="there was no room before start_before")
        elif what == "recheck":
            _release_suspect(world, NodeId(identity), out)
        elif what == "window":
            _open_window(world, ReservationId(identity), out)
        elif what == "displace" and world.order.preempts:
            world.reopen()
        elif what == "displace":
            world.reopen_eyeing()
        elif what == "replan" and world.held_back and world.held_back.job_id == identity:
            world.reconsider()


def _release_suspect(world: World, node_id: NodeId, out: Outcome) -> None:
    """A node that was held back for being lost too often, and stayed, may be used again."""
    node = world.nodes.get(node_id)
    if node is not None and node.state is NodeState.SUSPECT and node.held_until_ns <= out.now:
        world.update(world.nodes, node.id, node, state=NodeState.READY, held_until_ns=0, lost_at_ns=(), state_cause="")
        out.note("NodeResumed", node=node.name, by="")
        world.refresh_readiness()


def _open_window(world: World, reservation_id: ReservationId, out: Outcome) -> None:
    """A reservation's window opens: what is on its nodes and not of it has to go; or it is over, and they are open to
    all. Then its next edge is awaited."""
    reservation = world.reservations.get(reservation_id)
    if reservation is None:
        return
    world.reopen()
    window = reservation.window(after=out.now)
    if window is None:
        return
    if window[0] <= out.now:
        for node in reservation.node_ids:
            for launch in list(world.by_node.get(node, ())):
                job = world.jobs[world.allocations[launch].job_id]
                if not is_for(reservation, world.line_of(job)):
                    displace(world, job.id, out, by=f"reservation {reservation.name} begins")
        out.note("ReservationOpened", reservation=reservation.name, until_ns=window[1])
        world.set_timer(window[1], "window", reservation.id)
    else:
        world.set_timer(window[0], "window", reservation.id)


def _cut_long_stretches(world: World, out: Outcome) -> None:
    """Bound how much unbilled usage a crash could leave to the next turn, and keep what fair share remembers."""
    if out.now - world.metered_ns < out.policy.meter_every_ns:
        return
    world.metered(out.now)
    for (node_id, name), meter in list(world.meters.items()):
        if world.nodes[node_id].state is not NodeState.SILENT or not meter.awaits_reading(out.now):
            out.cut(world, node_id, [name])
    world.keep_usages()


def _next_wake(world: World, policy: Policy) -> int:
    instants = [world.timers[0][0]] if world.timers else []
    if world.meters:
        instants.append(world.metered_ns + policy.meter_every_ns)
    return min(instants, default=0)
