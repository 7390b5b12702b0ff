"""Brings services from one revision to the next while it runs, by what gateways tell and what the world shows.

What is decided is ``core.rollout``; that a replica with a request on it stays until that is over, ``replicating``. All
that a rollout has reached is stored, so a control plane that comes after goes on from there; what was answered of late
it counts anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidemill.control.replicating import Scaler, active_jobs
from tidemill.core.buckets import quantile_ns, since, together
from tidemill.core.revising import live_jobs
from tidemill.core.rollout import Answers, Seen, Side, decide
from tidemill.core.world import World
from tidemill.model.events import Fact, RolloutMoved
from tidemill.model.ids import RolloutId, WorkloadId
from tidemill.model.job import Workload
from tidemill.model.rollout import Rolling, Rollout, RolloutState
from tidemill.model.values import replace
from tidemill.units import HOUR_NS, SECOND_NS

_SLOW_MILLI: Final = 950
_EVERY_NS: Final = SECOND_NS
"""How finely the window is cut in which requests are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What one gateway has counted of a variant since it started; ``slow`` are the times of answers in buckets."""

    requests: int = 0
    errors: int = 0
    slow: Mapping[int, int] = field(default_factory=dict)


Variant = tuple[str, str]
"""A model's name, and which revision."""


def variant_of(rollout: Rollout, workload: WorkloadId) -> str:
    """What gateways call a revision that is part of a rollout."""
    return f"r{rollout.revision if workload == rollout.workload_id else rollout.before_revision}"


class Tally:
    """What became of the requests to each variant, of all gateways together, over the last hour at most."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, Variant], Counted] = {}
        self._slices: dict[Variant, deque[tuple[int, Counted]]] = {}

    def hear(self, worker: str, counts: Mapping[Variant, Counted], *, now: int) -> None:
        """Take what a gateway has counted since it started."""
        for variant, counted in counts.items():
            before = self._last.get((worker, variant), Counted())
            if counted.requests < before.requests or counted.errors < before.errors:
                before = Counted()
            self._last[worker, variant] = counted
            more = Counted(
                requests=counted.requests - before.requests,
                errors=counted.errors - before.errors,
                slow=since(counted.slow, before.slow),
            )
            if more.requests or more.errors:
                self._add(variant, more, now)

    def answers(self, variant: Variant, *, since_ns: int) -> Answers:
        """What became of the requests from that instant on."""
        found = [counted for at, counted in self._slices.get(variant, ()) if at >= since_ns]
        slow = together(*(counted.slow for counted in found))
        return Answers(
            requests=sum(counted.requests for counted in found),
            errors=sum(counted.errors for counted in found),
            slow_ns=quantile_ns(slow, _SLOW_MILLI),
        )

    def keep(self, variants: set[Variant]) -> None:
        """Forget all others."""
        self._slices = {variant: slices for variant, slices in self._slices.items() if variant in variants}
        self._last = {key: counted for key, counted in self._last.items() if key[1] in variants}

    def _add(self, variant: Variant, more: Counted, now: int) -> None:
        slices = self._slices.setdefault(variant, deque())
        if slices and now - slices[-1][0] < _EVERY_NS:
            at, there = slices.pop()
            more = Counted(
                requests=there.requests + more.requests,
                errors=there.errors + more.errors,
                slow=together(there.slow, more.slow),
            )
            slices.append((at, more))
        else:
            slices.append((now, more))
        while slices[0][0] < now - HOUR_NS:
            slices.popleft()


class Rollouts:
    """Looks at all rollouts, in the scaler's thread. ``hear`` may be called from any."""

    def __init__(
        self, scaler: Scaler, *, clock: Callable[[], int], monotonic: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._scaler = scaler
        self._clock = clock
        self._monotonic = monotonic
        self._heard: deque[tuple[str, Mapping[Variant, Counted]]] = deque(maxlen=10_000)
        self._tally = Tally()
        self._still: dict[RolloutId, tuple[tuple[object, ...], int]] = {}
        self.weights: Mapping[RolloutId, tuple[int, int]] = {}
        """How many of a hundred requests go to the old and to the new revision, where that is not by their room."""
        self.seen: Mapping[RolloutId, Seen] = {}
        """What was last seen of each."""
        scaler.also.append(self.look)

    def hear(self, worker: str, counts: Mapping[Variant, Counted]) -> None:
        """Note what became of requests, as a gateway tells of those since it started."""
        if counts:
            self._heard.append((worker, counts))

    def look(self, world: World) -> list[Fact]:
        """What is to change now."""
        facts: list[Fact] = []
        now = self._monotonic()
        while self._heard:
            worker, counts = self._heard.popleft()
            self._tally.hear(worker, counts, now=now)
        weights, seen_now, variants = {}, {}, set[Variant]()
        for rollout in world.rollouts.copy().values():
            old, new = world.workloads.get(rollout.before_id), world.workloads.get(rollout.workload_id)
            rolling = rolling_of(new, rollout)
            seen = seen_now[rollout.id] = self._see(world, rollout, rolling, old, new, now)
            variants |= {(model_of(one), variant_of(rollout, one.id)) for one in (old, new) if one is not None}
            decision = decide(rollout, rolling, seen, now=self._clock())
            if decision.weights is not None:
                weights[rollout.id] = decision.weights
            if decision.event:
                facts.append(_moved(rollout, decision.event, decision.why, at_ns=self._clock()))
                continue
            drain_s = rolling.drain_ns / SECOND_NS
            for workload, wanted in ((old, decision.old), (new, decision.new)):
                if workload is not None:
                    scaled = self._scaler.steer(world, workload, wanted, decision.why, drain_s=drain_s)
                    facts += [scaled] if scaled is not None else []
        self._tally.keep(variants)
        self._still = {one: still for one, still in self._still.items() if one in seen_now}
        self.weights, self.seen = weights, seen_now
        return facts

    def _see(
        self, world: World, rollout: Rollout, rolling: Rolling, old: Workload | None, new: Workload | None, now: int
    ) -> Seen:
        lasting = old if rollout.state is RolloutState.RETURNING else new
        active = [job for one in (old, new) if one is not None for job in active_jobs(world, one)]
        sides = self._side(world, rollout.before_id), self._side(world, rollout.workload_id)
        window = now - (rolling.comparison.window_ns if rolling.comparison is not None else 0)
        answers = [
            self._tally.answers((model_of(one), variant_of(rollout, one.id)), since_ns=window)
            if one is not None
            else Answers()
            for one in (old, new)
        ]
        mark = (rollout.state, rollout.step, sides[1].ready, sides[0].held)
        known = self._still.get(rollout.id)
        if known is None or known[0] != mark:
            known = self._still[rollout.id] = (mark, now)
        return Seen(
            needed=self._scaler.needed(world, lasting, active) if lasting is not None else 0,
            old=sides[0],
            new=sides[1],
            old_answers=answers[0],
            new_answers=answers[1],
            still_ns=now - known[1],
        )

    def _side(self, world: World, workload_id: WorkloadId) -> Side:
        workload = world.workloads.get(workload_id)
        if workload is None:
            return Side()
        live = live_jobs(world, workload_id)
        kept = [job for job in active_jobs(world, workload) if job.id not in self._scaler.leaving]
        ready = {job.id for job in kept if world.answering(world.attempts.get(job.id)) is not None}
        return Side(
            kept=len(kept),
            held=sum(job.id not in world.parked for job in live),
            ready=len(ready),
            live=len(live),
            lost=workload.spec.job_count - len(live),
            failures=max((job.retries for job in kept if job.id not in ready), default=0),
        )


def rolling_of(workload: Workload | None, rollout: Rollout | None = None) -> Rolling:
    """How a revision takes the place of the one before; one that somebody went back to is not tried."""
    service = workload.spec.service if workload is not None else None
    rolling = service.rollout if service is not None else Rolling()
    return replace(rolling, steps=(), comparison=None) if rollout is not None and rollout.back_to else rolling


def model_of(workload: Workload) -> str:
    """The name under which gateways serve a service."""
    service = workload.spec.service
    return (service.model if service is not None else "") or workload.spec.name


def _moved(rollout: Rollout, event: str, why: str, *, at_ns: int, by: str = "") -> RolloutMoved:
    return RolloutMoved(
        at_ns=at_ns, rollout_id=rollout.id, state=rollout.state, step=rollout.step, event=event, detail=why, by=by
    )


def asked(rollout: Rollout, event: str, why: str, *, at_ns: int, by: str) -> Sequence[Fact]:
    """What is to be told so that a rollout moves on because somebody wants that."""
    return [_moved(rollout, event, why, at_ns=at_ns, by=by)]
