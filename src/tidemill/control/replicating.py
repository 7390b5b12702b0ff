"""Has as many replicas of each service as its requests need: listens to the gateways, decides, and tells the turn.

A replica that is not needed any more is *leaving* first: the gateways send it nothing more. It is given up once every
gateway has said that it knows that, and that nothing of it is under way there; so none is ever ended with a stream on
it. When it is needed again before, it stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final, Protocol

from tidemill.control.loads import Load, Loads, ReplicaLoad
from tidemill.core.pattern import is_good
from tidemill.core.scaling import Ask, Bounds, Decision, Memory, Signals, decide, lead_ns
from tidemill.core.world import World
from tidemill.errors import TidemillError
from tidemill.model.events import Fact, Scaled
from tidemill.model.ids import AttemptId, JobId, ProjectId, WorkloadId, job_id
from tidemill.model.job import Allocation, AttemptState, Cause, Job, Workload
from tidemill.model.scaling import Habit
from tidemill.model.spec import Service
from tidemill.units import SECOND_NS

log = logging.getLogger(__name__)
_EVERY_S: Final = 0.1
_LISTEN_FIRST_S: Final = 5.0
"""After so long each gateway that there is has told what it has, and not before may anything be given up."""
_USE_FRESH_NS: Final = 30 * SECOND_NS


class Habits(Protocol):
    """Where what is remembered of services outlives a control plane."""

    def habits(self) -> tuple[Habit, ...]:
        """What is remembered. Raises: Unavailable."""

    def put_habit(self, habit: Habit) -> None:
        """Remember it. Raises: Unavailable, StorageFull."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """How many replicas a service has, how many it is to have, and which objective asked for how many.

    ``leaving`` have something under way still. ``lead_ns`` is how long before they are needed replicas are launched;
    ``days`` is of how many days the pattern of what is usually needed is, and ``has_pattern`` whether it is gone by.
    """

    at_ns: int
    wanted: int
    ready: int
    coming: int
    leaving: int
    least: int
    most: int
    why: str
    asks: tuple[Ask, ...] = ()
    lead_ns: int = 0
    days: int = 0
    has_pattern: bool = False


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
        habits: Habits,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loads = Loads(monotonic=monotonic)
        self._world = world
        self._tell = tell
        self._clock = clock
        self._habits = habits
        self._monotonic = monotonic
        self._began_s = monotonic()
        self._known: dict[tuple[ProjectId, str], Habit] | None = None
        self._memories: dict[WorkloadId, Memory] = {}
        self._started: dict[WorkloadId, frozenset[AttemptId]] = {}
        self._accounts: dict[WorkloadId, Account] = {}
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
        """Note what a gateway has; ``worker`` is where it listens, ``/``, and its own id."""
        self.loads.hear(worker, load)

    def account(self, workload_id: WorkloadId) -> Account | None:
        """What was decided of a service last; None when its replicas are always as many, or it is not looked at yet."""
        return self._accounts.get(workload_id)

    def facts(self) -> list[Fact]:
        """What is to change now."""
        if self._known is None:
            self._known = {(habit.project_id, habit.service): habit for habit in self._habits.habits()}
        world, found, longest_s = self._world(), list[Fact](), 60.0
        services = world.services.copy()
        for workload_id in services:
            workload = world.workloads.get(workload_id)
            if workload is None or workload.spec.service is None or not workload.spec.service.is_scaled:
                continue
            longest_s = max(longest_s, workload.spec.service.scaling.window_ns / SECOND_NS)
            if workload_id not in world.updating and (scaled := self._look(world, workload)) is not None:
                found.append(scaled)
        for look in self.also:
            found += look(world)
        self.loads.longest_s = longest_s
        for kept in (self._memories, self._accounts, self._started):
            for gone in kept.keys() - services:
                del kept[gone]
        self.leaving = frozenset(job for job in self.leaving if job in world.attempts)
        self._left_at = {job: at for job, at in self._left_at.items() if job in self.leaving}
        return found

    def needed(self, world: World, workload: Workload, active: Sequence[Job]) -> int:
        """How many replicas a service needs now, whichever revision of it ``active`` are of."""
        service = workload.spec.service
        if service is None or not service.is_scaled:
            return service.replicas if service is not None else 0
        last = self._accounts.get(workload.id)
        if last is not None:  # what there is beyond that is there only for the exchange
            there = sorted(active, key=lambda job: world.answering(world.attempts.get(job.id)) is None)
            active = there[: last.wanted]
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
        signals = self._signals(world, workload, service, kept, ready)
        bounds = bounds_of(service)
        before = self._memories.get(workload.id) or self._recalled(workload, len(active), now=now)
        decision, memory = decide(bounds, signals, before, now=now)
        self._memories[workload.id] = memory
        self._keep(workload, before, memory)
        self._accounts[workload.id] = Account(
            at_ns=now,
            wanted=decision.wanted,
            ready=signals.ready,
            coming=signals.coming,
            leaving=len(active) - len(kept),
            least=bounds.least,
            most=bounds.most,
            why=decision.why,
            asks=decision.asks,
            lead_ns=lead_ns(memory),
            days=max(memory.pattern.days),
            has_pattern=is_good(memory.pattern),
        )
        return decision

    def _signals(
        self, world: World, workload: Workload, service: Service, kept: Sequence[Job], ready: set[JobId]
    ) -> Signals:
        model = service.model or workload.spec.name
        in_flight, waiting = self.loads.of_model(model)
        felt = self.loads.felt(model, window_s=service.scaling.window_ns / SECOND_NS)
        coming = [job for job in kept if job.id not in ready]
        there = [job.id for job in kept if job.id in ready]
        told = [one for job in there if (one := _newest(self.loads.of_replica(job))) is not None]
        queued = [one.queued for one in told if one.queued is not None]
        caches = [one.cache_milli for one in told if one.cache_milli is not None]
        return Signals(
            in_flight=in_flight,
            waiting=waiting,
            ready=len(there),
            coming=len(coming),
            is_failing=any(job.retries and not _was_ready(world, job) for job in coming),
            is_blind=not self.loads.is_whole or self._monotonic() - self._began_s < _LISTEN_FIRST_S,
            ttft_ns=felt.ttft_ns,
            latency_ns=felt.latency_ns,
            queue_ns=felt.queue_ns,
            tokens_milli=felt.tokens_milli,
            engine_queue=sum(queued) if queued else None,
            kv_cache_milli=sum(caches) // len(caches) if caches else None,
            gpu_milli=_gpu_use(world, there, now=self._clock()),
            starts_ns=self._newly_started(world, workload, there),
        )

    def _newly_started(self, world: World, workload: Workload, there: Sequence[JobId]) -> tuple[int, ...]:
        """How long those replicas took to start that were not ready when this was asked last."""
        attempts = [one for job in there if (one := world.attempts.get(job)) is not None and one.ready_ns]
        known = self._started.get(workload.id, frozenset())
        self._started[workload.id] = frozenset(one.id for one in attempts)
        fresh = sorted((one.ready_ns, one.ready_ns - one.placed_ns) for one in attempts if one.id not in known)
        return tuple(max(0, took) for _, took in fresh)

    def _recalled(self, workload: Workload, active: int, *, now: int) -> Memory:
        """What is remembered of a service that was not looked at yet: what there is was needed lately, for all we know.

        Its replicas' starts are seen again with those that are ready.
        """
        habit = (self._known or {}).get((workload.project_id, workload.spec.name))
        memory = Memory(needed=((now, active),))
        return memory if habit is None else replace(memory, pattern=habit.pattern, starts_ns=habit.starts_ns)

    def _keep(self, workload: Workload, before: Memory, memory: Memory) -> None:
        """Store what was learned, once in a slot of the day."""
        if memory.pattern is before.pattern or memory.pattern == before.pattern:
            return
        habit = Habit(
            project_id=workload.project_id,
            service=workload.spec.name,
            pattern=memory.pattern,
            starts_ns=memory.starts_ns,
        )
        if self._known is not None:
            self._known[habit.project_id, habit.service] = habit
        try:
            self._habits.put_habit(habit)
        except TidemillError as error:
            log.warning("what %s usually needs is stored later: %s", workload.spec.name, error)

    def _under_way(self, job: JobId) -> int:
        """How many requests the gateways have under way on a replica."""
        return sum(one.in_flight for one in self.loads.of_replica(job))

    def _is_free(self, job: JobId) -> bool:
        """Whether every gateway knows that a replica is leaving, and has nothing under way on it."""
        heard = [load.replicas.get(job) for load in self.loads.all]
        return bool(heard) and all(one is not None and one.is_leaving and not one.in_flight for one in heard)

    def _is_drained(self, job: JobId, drain_s: float) -> bool:
        """Whether a replica had all the time to finish that it gets."""
        return self._monotonic() - self._left_at.get(job, float("inf")) >= drain_s


def bounds_of(service: Service) -> Bounds:
    """What the owner of a service says of its replicas."""
    return Bounds(
        least=service.smallest,
        most=service.replicas,
        concurrency=service.concurrency,
        idle_ns=service.idle_ns,
        scaling=service.scaling,
    )


def _newest(told: Sequence[ReplicaLoad]) -> ReplicaLoad | None:
    """What an engine tells, by whichever gateway asked it: the one that saw most in its queue."""
    found = [one for one in told if one.queued is not None or one.cache_milli is not None]
    return max(found, key=lambda one: one.queued or 0, default=None)


def _gpu_use(world: World, jobs: Sequence[JobId], *, now: int) -> int | None:
    """How busy the devices of these replicas are on average, in thousandths; None when none says."""
    found = []
    for job in jobs:
        attempt = world.attempts.get(job)
        for held in world.workers_of(attempt) if attempt is not None else ():
            for share in held.devices:
                at, milli = world.uses.get((held.node_id, share.device_id), (0, 0))
                if at and now - at < _USE_FRESH_NS:
                    found.append(milli)
    return sum(found) // len(found) if found else None


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
