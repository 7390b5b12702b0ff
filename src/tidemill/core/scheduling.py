"""②③④ Which waiting jobs start now, where, and at whose expense.

Jobs are tried in order. One that fits starts. The first that does not fit may displace others if it is entitled to;
else it gets a plan, and those after it may start only if they do not delay that plan. A line whose first job does not
fit is closed until there is more room, so a turn looks at what can change, not at what waits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidemill.core import ending, preempt, waiting
from tidemill.core.admission import why_not_now
from tidemill.core.choosing import preferred, rows_at
from tidemill.core.outcome import Outcome
from tidemill.core.place import Gang, Placed, fits, has_room, place_gang, stays_in_site
from tidemill.core.queueing import Line
from tidemill.core.reserve import HeldBack, meets_windows, nodes_open_to, plan_start, why_not_open
from tidemill.core.starting import grow, start
from tidemill.core.world import RECONSIDER, Promise, World
from tidemill.model.ids import JobId
from tidemill.model.job import AttemptState, Job
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.units import SECOND_NS

_AFRESH: Final = 8
"""How many lines are tried afresh in one turn, whatever their chances: more would make it long."""


def schedule(world: World, out: Outcome) -> None:
    """Start what may start."""
    world.quota.advance(out.now)
    _compare_with_running(world, out)
    _keep_promises(world, out)
    _Pass(world, out).run()
    _grow_elastic(world, out)
    _explain(world, out)


def _compare_with_running(world: World, out: Outcome) -> None:
    """With an order plug-in that preempts, waiting jobs are every so often ranked anew and set against running ones."""
    order = world.order
    if order.preempts and world.has_learned:  # what ended in this turn is known to the plug-in from the next one on
        world.set_timer(out.now + max(order.quantum_ns, 1), "displace", "")
    if not order.preempts or out.now < world.compared_ns + max(order.quantum_ns, 1):
        return
    world.set_compared(out.now)
    for attempt in world.attempts.values():
        world.note(world.jobs[attempt.job_id], now=out.now)
    world.rerank()
    world.reopen()
    if order.drift_ns and world.compare_at_ns <= out.now and world.queue.members():
        world.compare_at_ns = out.now + order.drift_ns
        world.set_timer(world.compare_at_ns, "displace", "")


def _keep_promises(world: World, out: Outcome) -> None:
    """Start jobs whose places are free now, all of them."""
    for promise in list(world.promises.values()):
        if any(launch in world.allocations for launch in promise.waits_for):
            continue
        job, places = world.jobs[promise.job_id], promise.placed.places
        ready = all(world.fleet.can_serve(place.node_id, place.devices) for place in places)
        free = ready and all(world.fleet.is_within(place.node_id, place.devices) for place in places)
        if ready and not free and _is_waited_for_beside(world, promise):
            continue  # others are still going there, for another job
        world.unpromise(promise, give=not free)
        if free:
            start(world, job, promise.placed, out)
        else:  # the node was cordoned meanwhile, a device failed, or it was laid out anew
            world.queue_up(job)


def _is_waited_for_beside(world: World, promise: Promise) -> bool:
    """Whether another job was promised something on one of the same nodes, and waits for somebody to go."""
    mine = {place.node_id for place in promise.placed.places}
    others = (other for other in world.promises.values() if other is not promise)
    return any(
        any(place.node_id in mine for place in other.placed.places)
        and any(launch in world.allocations for launch in other.waits_for)
        for other in others
    )


class _Pass:
    """One pass over the heads of all open lines."""

    def __init__(self, world: World, out: Outcome) -> None:
        self._world, self._out = world, out
        self._closed: set[Line] = set()
        self._started = 0
        self._rooms: dict[tuple[Gang, bool], tuple[int, bool]] = {}
        self._claimed: HeldBack | None = None
        """The plan whose places are kept from those that follow."""

    def run(self) -> None:
        world, out = self._world, self._out
        if out.now >= world.reopened_ns + out.policy.replan_ns:  # shares have changed since, and who may displace whom
            world.reopened_ns = out.now
            world.overdue = list(world.blocked)
        if world.overdue:
            world.reopen_lines([world.overdue.pop() for _ in range(min(len(world.overdue), _AFRESH))])
            if world.overdue:
                world.set_timer(out.now, "more", "")
        if world.held_back is not None and not world.is_waiting(world.held_back.job_id):
            world.hold_back(None)
        if self._is_settled():
            return
        while not self._try_heads():
            continue
        self._claim(None)

    def _try_heads(self) -> bool:
        """Whether all open lines were tried; False when the plan changed on the way.

        Then lines that were passed over because of the old plan, without being tried, are to be looked at again, each
        in its place in the order.
        """
        world, out = self._world, self._out
        reopenings = world.reopenings
        for line, job_id in world.queue.heads(self._is_closed, now=out.now):
            if self._started >= out.policy.starts_per_turn:
                world.set_timer(out.now, "more", "")
                return True
            job = world.jobs[job_id]
            if self._is_still_blocked(line, job_id):
                self._claim(world.held_back)
                self._closed.add(line)
                continue
            if self._is_behind_still(line):
                world.blocked[line] = world.fleet.released
                self._closed.add(line)
                continue
            reason = self._try(line, job)
            if reason is not None:
                self._closed.add(line)
                world.line_reasons[line] = reason
                out.wait(world, job_id, reason)
            if world.reopenings != reopenings:
                return False
        world.settled = self._signs()
        return True

    def _signs(self) -> tuple[int, int, int]:
        world = self._world
        return world.fleet.released, world.queue.arrivals, world.reopenings

    def _is_settled(self) -> bool:
        """Whether every line was closed by an earlier pass, and nothing that could open one has happened since."""
        world, out = self._world, self._out
        plan = world.held_back
        if world.settled != self._signs() or (plan is not None and out.now >= plan.at_ns):
            return False
        return not world.queue.has_late(out.now)

    def _is_closed(self, line: Line) -> bool:
        if line in self._closed:
            return True
        plan, world = self._world.held_back, self._world
        if plan is not None and plan.line == line:
            return False
        tried = world.blocked.get(line)
        if tried == world.fleet.released:
            return True
        if tried is None or plan is None or self._has_room(line, plan):
            return False
        world.blocked[line] = world.fleet.released  # what was released does not help; looked at again with the plan
        return True

    def _has_room(self, line: Line, plan: HeldBack) -> bool:
        """Whether it is worth a try: there may be room for a line beside the plan, or for so long as the plan waits."""
        fleet = self._world.fleet
        is_short = self._claimed is not None or 0 < line.duration_ns <= plan.at_ns - self._out.now
        key = (line.gang, is_short)
        known = self._rooms.get(key)
        if known is None or known[0] != fleet.touches:
            room = has_room(fleet, line.gang) if is_short else self._world.kept_beside(plan).has_room(fleet, line.gang)
            known = self._rooms[key] = (fleet.touches, room)
        return known[1]

    def _is_still_blocked(self, line: Line, job_id: JobId) -> bool:
        """Whether this is the job with the plan, and what has changed since it was tried does not help it."""
        plan, world = self._world.held_back, self._world
        if plan is None or plan.job_id != job_id or self._claimed is not None or self._out.now >= plan.at_ns:
            return False
        tried = world.blocked.get(line, RECONSIDER)
        return tried == world.fleet.released or (tried != RECONSIDER and not has_room(world.fleet, line.gang))

    def _is_behind_still(self, line: Line) -> bool:
        """Whether a line that was tried before has no room beside the plan now, and what started before it."""
        plan, world = self._claimed, self._world
        if plan is None or line not in world.blocked:
            return False
        return not 0 < line.duration_ns <= plan.at_ns - self._out.now and not has_room(world.fleet, line.gang)

    def _try(self, line: Line, job: Job) -> Reason | None:
        """Start the job, or promise it places; else the reason why it waits."""
        world, out = self._world, self._out
        if (reason := self._over_limit(line, job)) is not None:
            return reason
        if (reason := why_not_open(world, line, now=out.now)) is not None:
            return reason
        if line.group:
            return self._try_group(line, job)
        mask = nodes_open_to(world, line, now=out.now, policy=out.policy)
        placed = self._place(line, mask)
        if placed is not None:
            within = within_limit(world, line, job, placed, jobs=1)
            if within is not None:
                world.give_beyond(line, placed, within)
                self._start(line, job, within)
                return None
            world.give_quietly(line, placed)
            return self._over_limit(line, job, placed)
        if self._displace(line, job, mask):
            return None
        world.blocked[line] = world.fleet.released
        reason = meets_windows(world, line, mask, now=out.now) or why_not_now(world.fleet, line.gang, mask=mask)
        if self._claimed is None and out.policy.backfill and not world.order.preempts:
            self._plan([line], job)
        elif self._claimed is not None and self._is_behind(line, mask, self._claimed):
            reason = _behind(world, self._claimed, job)
        return reason

    def _is_behind(self, line: Line, mask: NDArray[np.bool_] | None, plan: HeldBack) -> bool:
        """Whether the line would have room were it not for the plan; looked at once for each plan."""
        known = self._world.behind.get(line)
        if known is None or known[0] != plan.job_id or self._out.now >= known[2]:
            again = self._out.now + self._out.policy.replan_ns
            known = (plan.job_id, fits_without(self._world, line, mask, plan), again)
            self._world.behind[line] = known
        return known[1]

    def _over_limit(self, line: Line, job: Job, placed: Placed | None = None) -> Reason | None:
        if not self._world.quota.is_limited(job.project_id):
            return None
        amounts = self._world.amounts_of(line, placed)
        return self._world.quota.over_limit(job.project_id, amounts, 1)

    def _place(self, line: Line, mask: NDArray[np.bool_] | None) -> Placed | None:
        """Places clear of the plan's; or on them, when the job is over before the plan needs them."""
        world, out = self._world, self._out
        sites = preferred(world, line, now=out.now, policy=out.policy)
        placed = place_gang(world.fleet, line.gang, score=world.score, mask=mask, sites=sites)
        plan = self._claimed
        if placed is None and plan is not None and 0 < line.duration_ns <= plan.at_ns - out.now:
            world.give_plan(plan)
            placed = place_gang(world.fleet, line.gang, score=world.score, mask=mask, sites=sites)
            world.take_plan(plan)
        return placed

    def _start(self, line: Line, job: Job, placed: Placed) -> None:
        world = self._world
        self._leave_line(line, job)
        start(world, job, placed, self._out)
        self._started += 1
        if world.held_back is not None and world.held_back.job_id == job.id:
            world.hold_back(None)

    def _leave_line(self, line: Line, job: Job) -> None:
        self._world.queue.remove(line, job.id)

    def _displace(self, line: Line, job: Job, mask: NDArray[np.bool_] | None) -> bool:
        """Whether others were asked to go for this job, or are going already, and their room is promised to it."""
        world, out = self._world, self._out
        if not out.policy.preemption or not preempt.may_try(world, job, line, policy=out.policy):
            return False
        found = preempt.displace(
            world,
            job,
            line,
            mask,
            now=out.now,
            policy=out.policy,
            within=lambda placed: within_limit(world, line, job, placed, jobs=1),
        )
        if found is None:
            return False
        self._leave_line(line, job)
        for victim in found.jobs:
            ending.displace(world, victim, out, by=f"room for {job.id}")
        for launch in found.workers:
            ending.shed(world, world.allocations[launch], out, by=f"room for {job.id}")
        world.promise(Promise(job_id=job.id, line=line, placed=found.placed, waits_for=found.waits_for))
        out.wait(world, job.id, _promised(found))
        return True

    def _plan(self, lines: Sequence[Line], job: Job) -> None:
        """Give the first blocked job its plan, or keep the one it has while that holds.

        ``lines`` has its own, and those of the jobs that have to start with it.
        """
        world, out = self._world, self._out
        plan = world.held_back
        stands = (
            plan is not None
            and plan.job_id == job.id
            and out.now < plan.at_ns
            and out.now < plan.made_ns + out.policy.replan_ns
        )
        if not stands:
            plan = plan_start(world, job.id, lines, now=out.now, policy=out.policy)
            world.hold_back(plan)
            world.blocked[lines[0]] = world.fleet.released
            if plan is not None:
                soonest = out.now + SECOND_NS  # who should have ended, and has not, may do so at any moment
                at = max(min(plan.at_ns, out.now + out.policy.replan_ns), soonest)
                world.set_timer(at, "replan", job.id)
        self._claim(plan)

    def _claim(self, plan: HeldBack | None) -> None:
        """Keep a plan's places from those that follow, or let go of them."""
        if self._claimed is not None:
            self._world.give_plan(self._claimed)
        if plan is not None:
            self._world.take_plan(plan)
        self._claimed = plan

    def _try_group(self, line: Line, first: Job) -> Reason | None:
        """Start all jobs of a group, or none."""
        world, out = self._world, self._out
        jobs = [world.jobs[one] for one in waiting.group_of(world, first)]
        mark = world.fleet.checkpoint()
        found: list[tuple[Job, Line, Placed]] = []
        for job in jobs:
            its = world.line_of(job)
            placed = place_gang(
                world.fleet,
                its.gang,
                score=world.score,
                mask=nodes_open_to(world, its, now=out.now, policy=out.policy),
                sites=preferred(world, its, now=out.now, policy=out.policy),
            )
            if placed is None:
                world.fleet.rollback(mark)
                world.blocked[line] = world.fleet.released
                missing = why_not_now(world.fleet, _together(jobs, world))
                if self._claimed is None and out.policy.backfill and not world.order.preempts:
                    self._plan([line, *(world.line_of(one) for one in jobs[1:])], first)
                return missing
            found.append((job, its, placed))
        total: dict[str, int] = {}
        for _, its, placed in found:
            for name, amount in world.amounts_of(its, placed).items():
                total[name] = total.get(name, 0) + amount
        if (reason := world.quota.over_limit(first.project_id, total, len(jobs))) is not None:
            world.fleet.rollback(mark)
            return reason
        self._leave_line(line, first)
        for job, its, placed in found:
            name = its.group
            world.drop(world.parked, job.id)
            waiting.leave_group(world, job, name)
            start(world, job, placed, out)
        self._started += len(jobs)
        if world.held_back is not None and world.held_back.job_id == first.id:
            world.hold_back(None)
        return None


def within_limit(world: World, line: Line, job: Job, placed: Placed, *, jobs: int) -> Placed | None:
    """The places, or as many of them as the queue's limits allow if the gang is content with those; else None."""

    def is_over(count: int) -> bool:
        part = placed if count == len(placed.places) else replace(placed, places=placed.places[:count])
        return world.quota.over_limit(job.project_id, world.amounts_of(line, part), jobs) is not None

    count, least = len(placed.places), line.gang.smallest if jobs else 1
    if not world.quota.is_limited(job.project_id) or not is_over(count):
        return placed
    allowed = bisect_left(range(least, count), True, key=is_over) + least - 1
    return replace(placed, places=placed.places[:allowed]) if allowed >= least else None


def _together(jobs: list[Job], world: World) -> Gang:
    """The largest gang of a group, to say what is missing."""
    return max((world.line_of(job).gang for job in jobs), key=lambda gang: gang.workers)


def fits_without(world: World, line: Line, mask: NDArray[np.bool_] | None, plan: HeldBack) -> bool:
    """Whether a gang would fit if a plan's places were not kept for it."""
    world.give_plan(plan)
    answer = fits(world.fleet, line.gang, mask=mask)
    world.take_plan(plan)
    return answer


def _grow_elastic(world: World, out: Outcome) -> None:
    """Give running elastic gangs what nobody who waits could use."""
    if not world.growable or world.fleet.released == world.grown_at:
        return
    world.set_grown(world.fleet.released)
    plan = world.held_back
    if plan is not None:
        world.take_plan(plan)
    for job_id in list(world.growable):
        job, attempt = world.jobs[job_id], world.attempts[job_id]
        if attempt.state is not AttemptState.RUNNING:
            continue
        line = world.line_of(job)
        missing = line.gang.workers - attempt.workers
        if missing <= 0:
            continue
        more: Gang = line.gang.part(attempt.choice, missing)
        mask = nodes_open_to(world, line, now=out.now, policy=out.policy)
        if stays_in_site(world.fleet, line.gang):
            here = rows_at(world.fleet, {world.nodes[held.node_id].site_id for held in world.workers_of(attempt)})
            mask = here if mask is None else mask & here
        placed = place_gang(world.fleet, more, score=world.score, mask=mask)
        if placed is None:
            continue
        within = within_limit(world, line, job, placed, jobs=0)
        if within is None:
            world.give_quietly(line, placed)
            continue
        world.give_beyond(line, placed, within)
        grow(world, job, attempt, within.places, out)
    if plan is not None:
        world.give_plan(plan)


def _explain(world: World, out: Outcome) -> None:
    """Every job that began to wait in this turn and did not start says why."""
    for job_id in out.fresh:
        if world.is_waiting(job_id) and job_id not in world.reasons:
            job = world.jobs[job_id]
            line = world.line_of(job)
            reason = world.line_reasons.get(line)
            if reason is None:
                reason = world.line_reasons[line] = why_not_now(world.fleet, line.gang)
            out.wait(world, job_id, reason)


def _behind(world: World, plan: HeldBack, job: Job) -> Reason:
    first = world.jobs[plan.job_id]
    is_kin = first.project_id == job.project_id  # another tenant's work is nobody's business
    name = f"{world.workloads[first.workload_id].spec.name} ({first.id})" if is_kin else "the first job in the queue"
    return Reason(
        code="WouldDelayFirst",
        subject="max_duration",
        needed="to be over before the first in line starts",
        available="not certain",
        resolvable_by=ResolvableBy.TIME,
        sentence=(
            f"There is room, but it is kept for {name}, which is first in line for it; work that says with "
            "max_duration that it is over before that starts may pass."
        ),
    )


def _promised(found: preempt.Displacement) -> Reason:
    count = len(found.waits_for)
    return Reason(
        code="WaitsForDisplaced",
        subject="room",
        needed="its promised places",
        available=f"{count} workers are stopping",
        resolvable_by=ResolvableBy.TIME,
        sentence=f"Its places are kept for it; {count} workers there have their checkpoint grace first.",
    )
