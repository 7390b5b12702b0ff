"""What people do about a service that runs: update it, promote or abort what is under way, go back to a revision."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from tidemill.control.acceptance import Acceptance
from tidemill.control.identity import Identity
from tidemill.control.jobs import Jobs
from tidemill.control.rollouts import Rollouts, asked, rolling_of
from tidemill.control.turns import TurnLoop
from tidemill.core.lifecycle import ROLLOUT, may
from tidemill.core.rollout import Seen
from tidemill.errors import Conflict, InvalidRequest, InvalidSpec, NotFound
from tidemill.model.events import Fact, RolloutBegan
from tidemill.model.ids import WorkloadId, rollout_id
from tidemill.model.job import Workload
from tidemill.model.rollout import Rolling, Rollout, RolloutState
from tidemill.model.spec import Kind, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.ports import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One revision of a service, with the rollout that led to it; None for the first one.

    ``is_live``: it has replicas, or would have. ``weight`` is how many of a hundred requests it gets, where that is
    told. ``ready`` are its replicas that are.
    """

    number: int
    workload: Workload
    rollout: Rollout | None
    is_live: bool
    ready: int = 0
    weight: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A rollout under way, what it is to do, and what was last seen of it."""

    rollout: Rollout
    rolling: Rolling
    seen: Seen | None


class Revisions:
    """The revisions of services. Thread-safe."""

    def __init__(
        self,
        store: Store,
        turns: TurnLoop,
        jobs: Jobs,
        acceptance: Acceptance,
        rollouts: Rollouts,
        *,
        clock: Callable[[], int],
    ) -> None:
        self._store = store
        self._turns = turns
        self._jobs = jobs
        self._acceptance = acceptance
        self._rollouts = rollouts
        self._clock = clock
        self._updating = threading.Lock()
        """Held while an update is checked and begun, one at a time."""

    def update(
        self,
        identity: Identity,
        project: Project,
        before: Workload,
        spec: WorkloadSpec,
        *,
        restarts: bool = False,
        back_to: int = 0,
        idempotency_key: str = "",
        request_digest: str = "",
    ) -> Workload:
        """The new revision of a service that runs, once it is durable that it is to take the other one's place.

        ``restarts`` allows one that is no different; ``back_to`` is the revision whose spec it is.
        Raises: Conflict, InvalidSpec, and what a submission raises.
        """
        if idempotency_key and (known := self._jobs.recorded(identity, idempotency_key, request_digest)):
            return known[0]
        with self._updating:
            self._check(before, spec, project, restarts=restarts)
            past = self._store.revisions(before.id)
            number = next((one.revision for one in past if one.workload_id == before.id), 1)
            begins = partial(
                _began,
                before=before,
                first_id=past[0].first_id if past else before.id,
                revision=max([1, *(one.revision for one in past)]) + 1,
                before_revision=number,
                back_to=back_to,
                by=identity.name,
            )
            made = self._jobs.submit(
                identity,
                project,
                [spec],
                idempotency_key=idempotency_key,
                request_digest=request_digest,
                as_fact=begins,
            ).result(timeout=60)
            if not made or (made[0].id not in self._turns.world.workloads and self._store.workload(made[0].id) is None):
                raise Conflict(f"{before.spec.name} ended, or is being updated by somebody else.")
        return made[0]

    def listing(self, workload: Workload) -> tuple[tuple[Revision, ...], Standing | None]:
        """All revisions of a service, oldest first, and the rollout under way, both as of one instant."""
        return self._turns.look(lambda _: (self.of(workload), self.standing(workload)))

    def of(self, workload: Workload) -> tuple[Revision, ...]:
        """All revisions of a service, oldest first. Raises: InvalidRequest for what is no service."""
        if workload.spec.service is None:
            raise InvalidRequest(f"{workload.spec.name} is a {workload.spec.kind}; only services have revisions.")
        past = self._store.revisions(workload.id)
        first_id = past[0].first_id if past else workload.id
        found = [
            self._revision(1, first_id, None),
            *(self._revision(one.revision, one.workload_id, one) for one in past),
        ]
        return tuple(one for one in found if one is not None)

    def standing(self, workload: Workload) -> Standing | None:
        """The rollout under way that a workload is part of."""
        world = self._turns.world
        id_ = world.updating.get(workload.id)
        rollout = world.rollouts.get(id_) if id_ is not None else None
        if rollout is None:
            return None
        rolling = rolling_of(world.workloads.get(rollout.workload_id), rollout)
        return Standing(rollout=rollout, rolling=rolling, seen=self._rollouts.seen.get(rollout.id))

    def promote(self, identity: Identity, workload: Workload, *, to_all: bool) -> Future[None]:
        """Nothing, when the canary is at its next step, or with ``to_all`` takes all. Raises: Conflict."""
        there = self._under_way(workload)
        rollout = there.rollout
        if not may(ROLLOUT, rollout.state, "promoted"):
            raise Conflict(f"Revision {rollout.revision} of {rollout.name} is {rollout.state}; there is no canary.")
        is_last = rollout.step + 1 >= len(there.rolling.steps)
        event = "promoted" if to_all or is_last else "advanced"
        return self._tell(rollout, event, "promoted", identity)

    def abort(self, identity: Identity, workload: Workload) -> Future[None]:
        """Nothing, when the revision before takes its place again. Raises: Conflict."""
        rollout = self._under_way(workload).rollout
        if not may(ROLLOUT, rollout.state, "reversed"):
            raise Conflict(f"Revision {rollout.revision} of {rollout.name} is being taken back already.")
        return self._tell(rollout, "reversed", f"aborted by {identity.name}", identity)

    def spec_of(self, workload: Workload, number: int) -> tuple[int, WorkloadSpec]:
        """The number and spec of the revision to go back to: that one, or with 0 the one before.

        Raises: NotFound, Conflict.
        """
        found = {one.number: one for one in self.of(workload)}
        current = next(one for one in found.values() if one.workload.id == workload.id)
        if not number:
            if current.rollout is None:
                raise Conflict(f"{workload.spec.name} has one revision only; there is none to go back to.")
            number = current.rollout.back_to or current.rollout.before_revision
            number = current.rollout.before_revision if number == current.number else number
        if number not in found:
            known = ", ".join(str(one) for one in found)
            raise NotFound(
                f"{workload.spec.name} has no revision {number}.",
                field="revision",
                value=number,
                mend=f"It has {known}.",
            )
        if found[number].workload.spec == workload.spec:
            raise Conflict(f"Revision {number} of {workload.spec.name} is what runs.", field="revision", value=number)
        return number, found[number].workload.spec

    def _under_way(self, workload: Workload) -> Standing:
        there = self.standing(workload)
        if there is None:
            raise Conflict(
                f"{workload.spec.name} is not being updated.", mend=f"See tidemill revisions {workload.spec.name}."
            )
        return there

    def _tell(self, rollout: Rollout, event: str, why: str, identity: Identity) -> Future[None]:
        return self._turns.put(asked(rollout, event, why, at_ns=self._clock(), by=identity.name))

    def _check(self, before: Workload, spec: WorkloadSpec, project: Project, *, restarts: bool) -> None:
        world, name = self._turns.world, before.spec.name
        if before.spec.service is None:
            raise Conflict(f"{name} is a {before.spec.kind}; only services are updated.", mend=f"tidemill stop {name}")
        if before.id not in world.live_jobs:
            raise Conflict(f"{name} does not run any more.", mend="Run it: tidemill run FILE.")
        if (there := self.standing(before)) is not None:
            raise Conflict(
                f"Revision {there.rollout.revision} of {name} is being rolled out ({there.rollout.state}).",
                mend=f"tidemill promote {name}, tidemill abort {name}, or wait for it.",
            )
        if spec.kind is not Kind.SERVICE:
            raise InvalidSpec(f"{name} is a service, and this is a {spec.kind}.", field="kind", value=spec.kind.value)
        if spec.name != name:
            raise InvalidSpec(
                f"{name} cannot be updated to a service of another name.",
                field="name",
                value=spec.name,
                mend=f"Write name: {name}, or run it beside: tidemill run FILE.",
            )
        if spec.after or spec.start_after_ns or spec.start_before_ns or spec.group is not None:
            field = "after" if spec.after else "group" if spec.group is not None else "start_after"
            raise InvalidSpec("A revision comes when it is its turn.", field=field, mend=f"Leave {field} out.")
        if not restarts and self._acceptance.pin(spec, project) == before.spec:
            raise Conflict(
                f"Nothing about {name} is different.", mend="To exchange its replicas all the same: --restart."
            )

    def _revision(self, number: int, workload_id: WorkloadId, rollout: Rollout | None) -> Revision | None:
        world = self._turns.world
        workload = world.workloads.get(workload_id) or self._store.workload(workload_id)
        if workload is None:
            return None
        weight = None
        id_ = world.updating.get(workload_id)
        if id_ is not None and (weights := self._rollouts.weights.get(id_)) is not None:
            weight = weights[world.rollouts[id_].workload_id == workload_id] if id_ in world.rollouts else None
        ready = sum(
            world.answering(attempt) is not None
            for attempt in list(world.attempts.values())
            if attempt.job_id.startswith(f"job_{workload_id.partition('_')[2]}-")
        )
        is_live = workload_id in world.live_jobs
        return Revision(number=number, workload=workload, rollout=rollout, is_live=is_live, ready=ready, weight=weight)


def _began(
    workload: Workload,
    *,
    before: Workload,
    first_id: WorkloadId,
    revision: int,
    before_revision: int,
    back_to: int,
    by: str,
) -> Fact:
    rolling = rolling_of(workload)
    rollout = Rollout(
        id=rollout_id(workload.id),
        project_id=workload.project_id,
        name=workload.spec.name,
        first_id=first_id,
        before_id=before.id,
        workload_id=workload.id,
        revision=revision,
        before_revision=before_revision,
        state=RolloutState.CANARY if rolling.steps and not back_to else RolloutState.ROLLING,
        began_ns=workload.submitted_ns,
        back_to=back_to,
        by=by,
    )
    return RolloutBegan(at_ns=workload.submitted_ns, rollout=rollout, workload=workload)
