"""The driver, sans I/O: it owns the world, takes turns, and is told whether the store took them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tidemill.core import waiting
from tidemill.core.meter import others_on
from tidemill.core.outcome import Outcome
from tidemill.core.turn import turn
from tidemill.core.world import World
from tidemill.model.events import Fact
from tidemill.model.fleet import NodeState, Site
from tidemill.model.ids import WorkloadId
from tidemill.model.job import AllocationState, Attempt, AttemptState, Job, JobState
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Plan
from tidemill.model.policy import Policy
from tidemill.model.tenant import Project
from tidemill.ports import Snapshot

Answer = TypeVar("Answer")


class Driver:
    """Turns over one world. Between ``step`` and ``accepted`` or ``refused`` nothing else may be called."""

    def __init__(self, world: World, policy: Policy) -> None:
        self.world = world
        self.policy = policy

    def step(self, inbox: Sequence[Fact], *, now: int) -> Plan:
        """The plan of the next turn. Whatever goes wrong inside, the world is as it was before."""
        try:
            return turn(self.world, inbox, now=now, policy=self.policy)
        except BaseException:
            self.world.rollback()
            raise

    def accepted(self) -> None:
        """The store took the plan."""
        self.world.commit()

    def refused(self) -> None:
        """The store did not take the plan: it never happened."""
        self.world.rollback()

    def what_if(self, inbox: Sequence[Fact], look: Callable[[Plan, World], Answer], *, now: int) -> Answer:
        """What ``look`` makes of the turn that these facts would give; the world stays as it is."""
        plan = self.step(inbox, now=now)
        try:
            return look(plan, self.world)
        finally:
            self.world.rollback()


def world_from(
    snapshot: Snapshot,
    *,
    sites: Iterable[Site],
    projects: Iterable[Project],
    rates: RateCard,
    policy: Policy,
    now: int,
    metered: bool = True,
) -> World:
    """The world as the store last knew it: what waits waits again, what ran is held and metered on.

    Whether what ran still runs is for the engines' observations to say. ``metered`` False leaves the meters out.
    """
    world = World(sites=sites, projects=projects, rates=rates, policy=policy)
    world.nodes = {node.id: node for node in snapshot.nodes}
    for queue in snapshot.queues:
        world.queues[queue.id] = queue
        world.quota.set_queue(queue)
    world.usages = {usage.id: usage for usage in snapshot.queue_usages}
    world.deliveries = {mark.id: mark for mark in snapshot.deliveries}
    world.reservations = {one.id: one for one in snapshot.reservations if not one.cancelled_ns}
    for rollout in snapshot.rollouts:
        world.rollouts[rollout.id] = rollout
        world.updating |= {rollout.before_id: rollout.id, rollout.workload_id: rollout.id}
    world.workloads = {workload.id: workload for workload in snapshot.workloads}
    world.services = {one.id: None for one in snapshot.workloads if one.spec.service is not None}
    world.unlucky = dict(snapshot.unlucky)
    world.jobs = {job.id: job for job in snapshot.jobs}
    for job in snapshot.jobs:
        world.live_jobs[job.workload_id] = world.live_jobs.get(job.workload_id, 0) + 1
    world.attempts = {attempt.job_id: attempt for attempt in snapshot.attempts}
    for allocation in sorted(snapshot.allocations, key=lambda held: (held.attempt_id, held.rank)):
        world.allocations[allocation.id] = allocation
        world.workers[allocation.attempt_id] = (*world.workers.get(allocation.attempt_id, ()), allocation.id)
    world.reasons = {waiting.job_id: waiting.reason for waiting in snapshot.reasons}
    for node in snapshot.nodes:
        if metered and node.state is not NodeState.LOST:
            world.open_meters(node, now=node.joined_ns or now)
        if node.state is NodeState.SUSPECT:
            world.set_timer(node.held_until_ns, "recheck", node.id)
    for node_id, name, until in snapshot.metered_until:
        if (meter := world.meters.get((node_id, name))) is not None:
            meter.since_ns = max(meter.since_ns, until)
    world.rebuild_fleet()
    world.lay_fleet()
    for allocation in snapshot.allocations:
        world.account(allocation)
    for node in snapshot.nodes:
        for meter, milli in others_on(node, world.meters):
            meter.others_milli = milli
    world.quota.restore(snapshot.queue_usages)
    world.quota.advance(now)
    for reservation in world.reservations.values():
        if (window := reservation.window(after=now)) is not None:
            world.set_timer(max(window[0], now), "window", reservation.id)
    _let_wait_again(world, snapshot, policy, now=now)
    for job in snapshot.jobs:
        if (attempt := world.attempts.get(job.id)) is not None:
            _restore_timers(world, attempt, policy, now=now)
            spec = world.workloads[job.workload_id].spec
            if attempt.state is not AttemptState.ENDING and attempt.workers < spec.nodes:
                world.growable[job.id] = None
    world.metered_ns = now
    world.begin()
    return world


def snapshot_of(world: World) -> Snapshot:
    """All that is live in a world, as a store would give it."""
    return Snapshot(
        nodes=tuple(world.nodes.values()),
        workloads=tuple(world.workloads.values()),
        jobs=tuple(world.jobs.values()),
        attempts=tuple(world.attempts.values()),
        allocations=tuple(world.allocations.values()),
        queues=tuple(world.queues.values()),
        queue_usages=tuple(world.usages.values()),
        deliveries=tuple(world.deliveries.values()),
        reservations=tuple(world.reservations.values()),
        rollouts=tuple(world.rollouts.values()),
        unlucky=tuple(world.unlucky.items()),
    )


def _let_wait_again(world: World, snapshot: Snapshot, policy: Policy, *, now: int) -> None:
    """Queued jobs wait for what they waited for. A dependency that is not live any more was satisfied, for else what
    depends on it would have ended in the same turn."""
    out = Outcome(now, policy)
    by_workload: dict[WorkloadId, list[Job]] = {}
    for job in snapshot.jobs:
        by_workload.setdefault(job.workload_id, []).append(job)
    for workload_id, jobs in by_workload.items():
        live = sum(job.state is not JobState.QUEUED for job in jobs)
        queued = [job for job in jobs if job.state is JobState.QUEUED]
        world.quota.line_up(world.workloads[workload_id].project_id, len(queued))
        for job in queued:
            if job.not_before_ns > now:
                world.delayed[job.id] = job.not_before_ns
                world.set_timer(job.not_before_ns, "requeue", job.id)
        waiting.enter(
            world, world.workloads[workload_id], [j for j in queued if j.id not in world.delayed], out, live=live
        )


def _restore_timers(world: World, attempt: Attempt, policy: Policy, *, now: int) -> None:
    spec = world.workloads[world.jobs[attempt.job_id].workload_id].spec
    if attempt.started_ns and spec.max_duration_ns:
        world.set_timer(attempt.started_ns + spec.max_duration_ns, "expire", attempt.job_id)
    for worker in world.workers_of(attempt):
        if worker.state is AllocationState.DRAINING:
            ends = (worker.drain_ns or now) + spec.checkpoint_grace_ns + policy.stop_margin_ns
            world.set_timer(ends, "stop_again", worker.id)
