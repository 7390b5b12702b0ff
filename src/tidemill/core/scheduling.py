"""②③④ Which waiting jobs start now, where, and at whose expense.

Jobs are tried in order. One that fits starts. The first that does not fit may displace others if it is entitled to;
else it gets a plan, and those after it may start only if they do not delay that plan. A line whose first job does not
fit is closed until there is more room, so a turn looks at what can change, not at what waits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidemill.core import ending, preempt, waiting
from tidemill.core.admission import why_not_now
from tidemill.core.choosing import preferred
from tidemill.core.held import NEVER
from tidemill.core.outcome import Outcome
from tidemill.core.place import Gang, Place, Placed, fits, has_room, open_beside, place_gang
from tidemill.core.queueing import Line
from tidemill.core.reserve import HeldBack, meets_windows, nodes_open_to, opens_at, plan_start, why_not_open
from tidemill.core.starting import grow, start
from tidemill.core.together import Member, Missing, Open, Opens, as_one, missing_now, place_together
from tidemill.core.world import RECONSIDER, Promise, World
from tidemill.model.ids import JobId
from tidemill.model.job import Attempt, AttemptState, Job
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.spec import Tier
from tidemill.model.values import replace
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
    """Start jobs whose places are free now, all of them, and those of whoever starts with them."""
    for promise in list(world.promises.values()):
        if promise.together[0] != promise.job_id or any(launch in world.allocations for launch in promise.waits_for):
            continue
        promises = [world.promises[one] for one in promise.together]
        places = [place for one in promises for place in one.placed.places]
        ready = all(world.fleet.can_serve(place.node_id, place.devices) for place in places)
        free = ready and all(world.fleet.is_within(place.node_id, place.devices) for place in places)
        if ready and not free and _is_waited_for_beside(world, promise, places):
            continue  # others are still going there, for another job
        if not free:  # the node was cordoned meanwhile, a device failed, or it was laid out anew
            waiting.withdraw(world, promise.job_id)
            continue
        for one in promises:
            world.unpromise(one, give=False)
        _start_all(world, [(world.jobs[one.job_id], one.placed) for one in promises], out)


def _start_all(world: World, found: Sequence[tuple[Job, Placed]], out: Outcome) -> None:
    """Start jobs that start together, whose room is taken already."""
    if len(found) > 1:
        waiting.group_started(world, found[0][0], out)
    for job, placed in found:
        start(world, job, placed, out)


def _is_waited_for_beside(world: World, promise: Promise, places: Sequence[Place]) -> bool:
    """Whether another job was promised something on one of the same nodes, and waits for somebody to go."""
    mine = {place.node_id for place in places}
    others = (other for other in world.promises.values() if other.job_id not in promise.together)
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
                self._start(line, [(job, within)])
                return None
            world.give_quietly(line, placed)
            return self._over_limit(line, job, placed)
        members = (Member(job_id=job.id, line=line),)
        if self._displace(members, {line: Open(mask, preferred(world, line, now=out.now, policy=out.policy))}):
            return None
        world.blocked[line] = world.fleet.released
        reason = meets_windows(world, line, mask, now=out.now) or why_not_now(world.fleet, line.gang, mask=mask)
        if self._may_plan(line, job):
            self._plan(members)
        elif self._claimed is not None and self._is_behind(line, mask, self._claimed):
            reason = _behind(world, self._claimed, job)
        return reason

    def _try_group(self, line: Line, first: Job) -> Reason | None:
        """Start all jobs of a group, or promise them places, or none; else the reason why they wait."""
        world, out = self._world, self._out
        members = members_of(world, first)
        lines = [member.line for member in members]
        if (reason := self._over_limits(first, preempt.amounts_together(world, lines), len(members))) is not None:
            return reason
        for one in dict.fromkeys(lines):
            if (reason := why_not_open(world, one, now=out.now)) is not None:
                return reason
        opens = opens_at(world, members, now=out.now, policy=out.policy)
        placed = self._place_all(members, opens)
        if placed is not None:
            amounts = preempt.amounts_together(world, lines, placed)
            reason = self._over_limits(first, amounts, len(members))
            if reason is None:
                jobs = [world.jobs[member.job_id] for member in members]
                self._start(line, list(zip(jobs, placed, strict=True)))
                return None
            for one, each in zip(lines, placed, strict=True):
                world.give_quietly(one, each)
            return reason
        if self._displace(members, opens):
            return None
        world.blocked[line] = world.fleet.released
        reason = why_group_not_now(world, members, opens)
        if self._may_plan(line, first):
            self._plan(members)
        return reason

    def _may_plan(self, line: Line, job: Job) -> bool:
        """Whether a blocked job gets the plan: the first, unless the order displaces instead, and it is not late.

        Spot work does not take it from others.
        """
        plan, world = self._world.held_back, self._world
        if self._claimed is not None or not self._out.policy.backfill:
            return False
        if line.tier is Tier.SPOT and plan is not None and plan.line.tier is not Tier.SPOT:
            return False
        return not world.order.preempts or world.queue.is_late(job.id, self._out.now)

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
        return self._over_limits(job, self._world.amounts_of(line, placed), 1)

    def _over_limits(self, job: Job, amounts: Mapping[str, int], jobs: int) -> Reason | None:
        return self._world.quota.over_limit(job.project_id, amounts, jobs)

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
        if placed is None and self._is_overruled([line]):
            self._overrule()
            placed = place_gang(world.fleet, line.gang, score=world.score, mask=mask, sites=sites)
        return placed

    def _place_all(self, members: Sequence[Member], opens: Opens) -> tuple[Placed, ...] | None:
        """The same for jobs that start together."""
        world, out = self._world, self._out
        placed = place_together(world.fleet, members, opens, score=world.score)
        plan = self._claimed
        if placed is None and plan is not None:
            longest = max(member.line.duration_ns or NEVER for member in members)
            if longest <= plan.at_ns - out.now:
                world.give_plan(plan)
                placed = place_together(world.fleet, members, opens, score=world.score)
                world.take_plan(plan)
        if placed is None and self._is_overruled([member.line for member in members]):
            self._overrule()
            placed = place_together(world.fleet, members, opens, score=world.score)
        return placed

    def _is_overruled(self, lines: Sequence[Line]) -> bool:
        """Whether the plan is one of spot work, and jobs of these lines, which may displace that, need not heed it."""
        plan = self._claimed
        if plan is None or not self._out.policy.preemption or plan.line.tier is not Tier.SPOT:
            return False
        return all(line.tier is not Tier.SPOT for line in lines)

    def _overrule(self) -> None:
        """Drop the plan; its job is tried again in its turn."""
        if self._claimed is not None:
            self._closed.discard(self._claimed.line)
        self._claim(None)
        self._world.hold_back(None)

    def _start(self, line: Line, found: Sequence[tuple[Job, Placed]]) -> None:
        """Start the job that stands in the line, and those that start with it."""
        world, first = self._world, found[0][0]
        self._leave_line(line, first)
        _start_all(world, found, self._out)
        self._started += len(found)
        if world.held_back is not None and world.held_back.job_id == first.id:
            world.hold_back(None)

    def _leave_line(self, line: Line, job: Job) -> None:
        self._world.queue.remove(line, job.id)

    def _displace(self, members: Sequence[Member], opens: Opens) -> bool:
        """Whether others were asked to go for these jobs, or are going already, and their room is promised to them."""
        world, out = self._world, self._out
        if not out.policy.preemption or not preempt.may_try(world, members, policy=out.policy):
            return False
        first = world.jobs[members[0].job_id]

        def within(placed: tuple[Placed, ...]) -> tuple[Placed, ...] | None:
            if len(placed) == 1:
                only = within_limit(world, members[0].line, first, placed[0], jobs=1)
                return None if only is None else (only,)
            amounts = preempt.amounts_together(world, (member.line for member in members), placed)
            return placed if self._over_limits(first, amounts, len(placed)) is None else None

        found = preempt.displace(world, members, opens, now=out.now, policy=out.policy, within=within)
        if found is None:
            return False
        self._leave_line(members[0].line, first)
        for victim in found.jobs:
            ending.displace(world, victim, out, by=f"room for {first.id}")
        for launch in found.workers:
            ending.shed(world, world.allocations[launch], out, by=f"room for {first.id}")
        together = tuple(member.job_id for member in members)
        for member, placed in zip(members, found.placed, strict=True):
            world.promise(
                Promise(
                    job_id=member.job_id,
                    line=member.line,
                    placed=placed,
                    waits_for=found.waits_for,
                    together=together,
                )
            )
            out.wait(world, member.job_id, _promised(found))
        return True

    def _plan(self, members: Sequence[Member]) -> None:
        """Give the first blocked job, and those that start with it, its plan, or keep the one it has while that
        holds."""
        world, out = self._world, self._out
        plan, first = world.held_back, members[0]
        stands = (
            plan is not None
            and plan.job_id == first.job_id
            and out.now < plan.at_ns
            and out.now < plan.made_ns + out.policy.replan_ns
        )
        if not stands:
            plan = plan_start(world, members, now=out.now, policy=out.policy)
            world.hold_back(plan)
            world.blocked[first.line] = world.fleet.released
            if plan is not None:
                soonest = out.now + SECOND_NS  # who should have ended, and has not, may do so at any moment
                at = max(min(plan.at_ns, out.now + out.policy.replan_ns), soonest)
                world.set_timer(at, "replan", first.job_id)
        self._claim(plan)

    def _claim(self, plan: HeldBack | None) -> None:
        """Keep a plan's places from those that follow, or let go of them."""
        if self._claimed is not None:
            self._world.give_plan(self._claimed)
        if plan is not None:
            self._world.take_plan(plan)
        self._claimed = plan


def members_of(world: World, first: Job) -> tuple[Member, ...]:
    """The jobs that start with this one, itself first."""
    jobs = [world.jobs[one] for one in waiting.group_of(world, first)]
    return tuple(
        Member(job_id=job.id, line=world.line_of(job), labels=world.workloads[job.workload_id].spec.labels)
        for job in jobs
    )


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


def why_group_not_now(world: World, members: Sequence[Member], opens: Opens) -> Reason:
    """What is missing for all jobs of a group: of what they need together, or where those before have their places."""
    first = members[0]
    gang = as_one(world.fleet, members)
    if gang is not None:
        return why_not_now(world.fleet, gang, mask=opens[first.line].mask)

    def look(missing: Missing) -> Reason:
        line = missing.member.line
        reason = why_not_now(world.fleet, line.gang, mask=opens[line].mask)
        there = f"{missing.placed} of the {len(members)} jobs of group {first.line.group} have room now"
        return replace(reason, sentence=f"They start together, and {there}; for the next: {reason.sentence}")

    found = missing_now(world.fleet, members, opens, score=world.score, look=look)
    return found or why_not_now(world.fleet, first.line.gang, mask=opens[first.line].mask)


def fits_without(world: World, line: Line, mask: NDArray[np.bool_] | None, plan: HeldBack) -> bool:
    """Whether a gang would fit if a plan's places were not kept for it."""
    world.give_plan(plan)
    answer = fits(world.fleet, line.gang, mask=mask)
    world.take_plan(plan)
    return answer


def _grow_elastic(world: World, out: Outcome) -> None:
    """Give running elastic gangs what nobody who waits could use: each is offered more once after every change."""
    signs = (world.fleet.released, world.reopenings)
    running = [
        job_id
        for job_id, offered in world.growable.items()
        if offered != signs and world.attempts[job_id].state is AttemptState.RUNNING
    ]
    if not running:
        return
    plan = world.held_back
    if plan is not None:
        world.take_plan(plan)
    for job_id in running:
        _offer_more(world, world.jobs[job_id], world.attempts[job_id], out)
        if job_id in world.growable:
            world.set(world.growable, job_id, signs)
    if plan is not None:
        world.give_plan(plan)


def _offer_more(world: World, job: Job, attempt: Attempt, out: Outcome) -> None:
    """Let one elastic gang have as many of the workers that it lacks as there is room for."""
    line = world.line_of(job)
    missing = line.gang.workers - attempt.workers
    if missing <= 0:
        return
    mask = nodes_open_to(world, line, now=out.now, policy=out.policy)
    here = [held.node_id for held in world.workers_of(attempt) if held.node_id in world.fleet.row]
    beside = open_beside(world.fleet, line.gang, [world.fleet.row[node_id] for node_id in here])
    if beside is not None:
        mask = beside if mask is None else mask & beside
    placed = place_gang(world.fleet, line.gang.part(attempt.choice, missing), score=world.score, mask=mask)
    if placed is None:
        return
    within = within_limit(world, line, job, placed, jobs=0)
    if within is None:
        world.give_quietly(line, placed)
        return
    world.give_beyond(line, placed, within)
    grow(world, job, attempt, within.places, out)


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
