"""Has as many replicas of each service as its requests need: listens to the gateways, decides, and tells the turn.

A replica that is not needed any more is *leaving* first: the gateways send it nothing more. It is given up once every
gateway has said that it knows that, and that nothing of it is under way there; so none is ever ended with a stream on
it. When it is needed again before, it stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from tidemill.core.scaling import Bounds, Decision, Memory, Signals, decide
from tidemill.core.world import World
from tidemill.errors import TidemillError
from tidemill.model.events import Fact, Scaled
from tidemill.model.ids import JobId, WorkloadId, job_id
from tidemill.model.job import Allocation, AttemptState, Cause, Job, Workload

log = logging.getLogger(__name__)
_EVERY_S: Final = 0.1
_FRESH_S: Final = 3.0
"""A load that is older says nothing of how many requests there are."""
_REMEMBERED_S: Final = 30.0
"""A gateway that was heard of since may have requests under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one gateway has: requests under way and waiting by model; under way, and whether leaving, by replica."""

    models: Mapping[str, tuple[int, int]]
    replicas: Mapping[JobId, tuple[int, bool]]


def endpoints(world: World, workload: Workload) -> list[Allocation]:
    """Where the replicas of a service answer that are ready, by job."""
    found = []
    for index in range(workload.spec.job_count):
        worker = world.answering(world.attempts.get(job_id(workload.id, index)))
        if worker is not None:
            found.append(worker)
    return found


class Scaler:
    """Keeps the number of replicas, while it runs. Thread-safe."""

    def __init__(
        self,
        *,
        world: Callable[[], World],
        tell: Callable[[Sequence[Fact]], Future[None]],
        clock: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world = world
        self._tell = tell
        self._clock = clock
        self._monotonic = monotonic
        self._loads: dict[str, tuple[float, Load]] = {}
        self._memories: dict[WorkloadId, Memory] = {}
        self.leaving: frozenset[JobId] = frozenset()
        """Replicas that get no more requests."""
        self._left_at: dict[JobId, float] = {}
        self.also: list[Callable[[World], Sequence[Fact]]] = []
        """What else looks at services, one after the other with this: rollouts."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scale", daemon=True)

    def start(self) -> None:
        """Begin to scale."""
        self._thread.start()

    def close(self) -> None:
        """Stop scaling; the replicas stay."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def hear(self, worker: str, load: Load) -> None:
        """Note what a gateway has; ``worker`` is where it listens, ``/``, and its own id.

        One that listened there before is remembered only while it still tells.
        """
        now, place = self._monotonic(), worker.partition("/")[0]
        loads = {
            name: (at, one)
            for name, (at, one) in self._loads.items()
            if now - at < (_FRESH_S if name.partition("/")[0] == place else _REMEMBERED_S)
        }
        self._loads = loads | {worker: (now, load)}

    def facts(self) -> list[Fact]:
        """What is to change now."""
        world, found = self._world(), list[Fact]()
        services = world.services.copy()
        for workload_id in services:
            workload = world.workloads.get(workload_id)
            if workload is None or workload.spec.service is None or workload_id in world.updating:
                continue
            if workload.spec.service.is_scaled and (scaled := self._look(world, workload)) is not None:
                found.append(scaled)
        for look in self.also:
            found += look(world)
        self._memories = {one: memory for one, memory in self._memories.items() if one in services}
        self.leaving = frozenset(job for job in self.leaving if job in world.attempts)
        self._left_at = {job: at for job, at in self._left_at.items() if job in self.leaving}
        return found

    def needed(self, world: World, workload: Workload, active: Sequence[Job]) -> int:
        """How many replicas a service needs now, whichever revision of it ``active`` are of."""
        service = workload.spec.service
        if service is None or not service.is_scaled:
            return service.replicas if service is not None else 0
        return self._decide(world, workload, active).wanted

    def steer(
        self, world: World, workload: Workload, wanted: int, why: str, *, drain_s: float = float("inf")
    ) -> Scaled | None:
        """What is to be told so that so many replicas of a workload are kept; None when that is so.

        One with requests under way leaves first, for ``drain_s`` at most.
        """
        now, active = self._clock(), active_jobs(world, workload)
        ready = {held.job_id for held in endpoints(world, workload)}
        leaving = [job.id for job in active if job.id in self.leaving]
        kept = [job for job in active if job.id not in self.leaving]
        for _ in range(min(wanted - len(kept), len(leaving))):
            self.leaving -= {leaving.pop()}
        spare = max(0, len(kept) - wanted) if leaving or wanted < len(kept) else 0
        unborn = [job.id for job in kept if job.id not in ready and job.id in world.attempts]
        queued = [job.id for job in kept if job.id not in world.attempts]
        spare -= len(dropped := queued[max(0, len(queued) - spare) :])
        given_up = unborn[max(0, len(unborn) - spare) :] if spare else []
        spare -= len(given_up)
        if spare:
            gone = sorted((job.id for job in kept if job.id in ready), key=self._under_way)[:spare]
            self.leaving |= set(gone)
            self._left_at |= dict.fromkeys(gone, self._monotonic())
        given_up += [one for one in leaving if self._is_free(one) or self._is_drained(one, drain_s)]
        going = [one for one in leaving if one not in given_up]
        told = wanted + len(going) + max(0, spare)
        if not given_up and not dropped and told <= len(active):
            return None
        return Scaled(at_ns=now, workload_id=workload.id, wanted=told, why=why, give_up=tuple(sorted(given_up)))

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            try:
                facts = self.facts()
                if facts:
                    self._tell(facts).result(timeout=30)
            except (TidemillError, TimeoutError) as error:
                log.warning("services are not scaled for now: %s", error)
                self._closing.wait(1.0)
            except Exception:
                log.exception("services cannot be scaled")
                self._closing.wait(5.0)

    def _look(self, world: World, workload: Workload) -> Scaled | None:
        """What is to change about one service."""
        decision = self._decide(world, workload, active_jobs(world, workload))
        return self.steer(world, workload, decision.wanted, decision.why)

    def _decide(self, world: World, workload: Workload, active: Sequence[Job]) -> Decision:
        """How many replicas a scaled service needs, when these run or are to."""
        service = workload.spec.service
        if service is None:
            return Decision(wanted=0, why="")
        now = self._clock()
        kept = [job for job in active if job.id not in self.leaving]
        ready = {job.id for job in kept if world.answering(world.attempts.get(job.id)) is not None}
        signals = self._signals(world, service.model or workload.spec.name, kept, ready)
        bounds = Bounds(
            least=service.smallest, most=service.replicas, concurrency=service.concurrency, idle_ns=service.idle_ns
        )
        memory = self._memories.get(workload.id)
        if memory is None:  # what there is was needed lately, as far as anybody knows
            memory = Memory(needed=((now, len(active)),))
        decision, self._memories[workload.id] = decide(bounds, signals, memory, now=now)
        return decision

    def _signals(self, world: World, model: str, kept: Sequence[Job], ready: set[JobId]) -> Signals:
        fresh = [load for at, load in self._loads.values() if self._monotonic() - at < _FRESH_S]
        counts = [load.models.get(model, (0, 0)) for load in fresh]
        coming = [job for job in kept if job.id not in ready]
        return Signals(
            in_flight=sum(under_way for under_way, _ in counts),
            waiting=sum(waiting for _, waiting in counts),
            ready=len(kept) - len(coming),
            coming=len(coming),
            is_failing=any(job.retries and not _was_ready(world, job) for job in coming),
        )

    def _under_way(self, job: JobId) -> int:
        """How many requests the gateways have under way on a replica."""
        return sum(load.replicas.get(job, (0, False))[0] for _, load in self._loads.values())

    def _is_free(self, job: JobId) -> bool:
        """Whether every gateway knows that a replica is leaving, and has nothing under way on it."""
        now = self._monotonic()
        heard = [load for at, load in self._loads.values() if now - at < _REMEMBERED_S]
        return bool(heard) and all(load.replicas.get(job) == (0, True) for load in heard)

    def _is_drained(self, job: JobId, drain_s: float) -> bool:
        """Whether a replica had all the time to finish that it gets."""
        return self._monotonic() - self._left_at.get(job, float("inf")) >= drain_s


def active_jobs(world: World, workload: Workload) -> list[Job]:
    """The replicas that run, or are to: neither parked nor being given up."""
    found = []
    for index in range(workload.spec.job_count):
        job = world.jobs.get(job_id(workload.id, index))
        if job is None or job.id in world.parked:
            continue
        attempt = world.attempts.get(job.id)
        if attempt is None or attempt.state is not AttemptState.ENDING or attempt.cause is not Cause.RESIZED:
            found.append(job)
    return found


def _was_ready(world: World, job: Job) -> bool:
    attempt = world.attempts.get(job.id)
    return attempt is not None and bool(attempt.ready_ns)
