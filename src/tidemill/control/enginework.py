"""Commands carried out on an engine, and what the engine then sees, as facts.

Commands of one launch are carried out in order; those of different launches side by side. What is not known to have
been carried out is not repeated here: the next look at the engine's own list tells what is missing, and a turn
decides. A worker counts as lost only when the engine itself says that nothing of it is left.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from tidemill.errors import Conflict, EngineLost, EngineRefused, NotFound, TidemillError
from tidemill.model.events import Exited, Fact, LaunchRefused, NeverLaunched, NodeJoined, Vanished
from tidemill.model.ids import JobId, LaunchId, job_of_launch
from tidemill.model.job import Allocation, AllocationState, Cause
from tidemill.model.plan import Command, Forget, Launch, LaunchSpec, Observation, ObservedState, Stop
from tidemill.ports import Engine, Store

log = logging.getLogger(__name__)
_LANES = 4
_CLEANED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A launch that the engine has and the store has never heard of: a restored backup is older than it is.

    ``is_job_known`` says that its job is known; then it ends when a newer attempt of that job gets the lease.
    """

    launch_id: LaunchId
    job_id: JobId
    is_job_known: bool
    state: ObservedState
    seen_ns: int


class EngineWork:
    """The hands of the control plane on one engine.

    ``live`` gives the allocations that are not released, ``build`` the launch spec of one of them (raising
    NotFound when it is over), ``tell`` takes facts, ``met`` each stranger once.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        clock: Callable[[], int],
        live: Callable[[], dict[LaunchId, Allocation]],
        build: Callable[[LaunchId], LaunchSpec],
        tell: Callable[[Sequence[Fact]], object],
        met: Callable[[Stranger], object] = lambda _: None,
        observe_every_s: float = 0.5,
        nodes_every_s: float = 30.0,
    ) -> None:
        self._engine = engine
        self._store = store
        self._clock = clock
        self._live = live
        self._build = build
        self._tell = tell
        self._met = met
        self._observe_every_s = observe_every_s
        self._nodes_every_s = nodes_every_s
        self._lanes: list[queue.SimpleQueue[Command | None]] = [queue.SimpleQueue() for _ in range(_LANES)]
        self._in_flight: Counter[LaunchId] = Counter()
        self._begun: set[LaunchId] = set()
        self._lock = threading.Lock()
        self._strangers: dict[LaunchId, Stranger] = {}
        self._unwanted: set[LaunchId] = set()
        """Strangers that somebody had ended."""
        self._has_looked = False
        self._strays: set[LaunchId] = set()
        """What the engine knew at the last look and the world did not: the turn that ends it may not be stored yet."""
        self._closing = threading.Event()
        self._threads = [
            *(threading.Thread(target=self._work, args=(lane,), name="engine", daemon=True) for lane in self._lanes),
            threading.Thread(target=self._watch, name="observe", daemon=True),
        ]

    def start(self) -> None:
        """Begin to work and to watch."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Finish what was begun and stop watching; whatever runs goes on."""
        self._closing.set()
        for lane in self._lanes:
            lane.put(None)
        for thread in self._threads:
            thread.join(timeout=10)

    def obey(self, commands: Sequence[Command]) -> None:
        """Have the commands carried out, soon."""
        with self._lock:
            for command in commands:
                self._in_flight[command.launch_id] += 1
                self._begun.add(command.launch_id)
        for command in commands:
            self._lanes[crc32(command.launch_id.encode()) % _LANES].put(command)

    @property
    def strangers(self) -> tuple[Stranger, ...]:
        """What the engine had at the last look and the store has never heard of, by launch."""
        return tuple(sorted(self._strangers.copy().values(), key=lambda one: one.launch_id))

    def end_stranger(self, launch: LaunchId, *, grace_ns: int) -> Stranger:
        """The stranger, which is stopped, and forgotten once it is gone. Raises: NotFound."""
        found = self._strangers.get(launch)
        if found is None:
            raise NotFound(
                "No such launch is unknown here.", field="launch", value=launch, mend="See tidemill strangers list."
            )
        self._unwanted.add(launch)
        if found.state is ObservedState.ALIVE:
            self.obey([Stop(launch_id=launch, grace_ns=grace_ns)])
        return found

    def work_off(self, lane: int) -> bool:
        """Whether a command waited in that lane, which is then carried out. Not after ``start``."""
        try:
            command = self._lanes[lane % _LANES].get_nowait()
        except queue.Empty:
            return False
        if command is not None:
            self._do(command)
        return command is not None

    def look(self) -> None:
        """Compare what should be with what the engine sees, once.

        What should be is read first: what comes to be after that is not missed, and what ends after that is over for
        the turn that is told. A launch about which a command was on its way meanwhile is left to the next look.
        """
        live = self._live()
        with self._lock:
            self._begun = {launch for launch, count in self._in_flight.items() if count > 0}
        observed = self._observe(live)
        with self._lock:
            busy = self._begun.copy()
        facts = [
            fact
            for launch, held in live.items()
            if launch not in busy and (fact := self._compare(held, observed.get(launch))) is not None
        ]
        if facts:
            self._tell(facts)
        strays = {launch for launch in observed if launch not in live and launch not in busy}
        quiet = self._strangers.keys() - self._unwanted
        for launch in sorted((strays & self._strays) - quiet)[:_CLEANED_AT_ONCE]:
            self._clean_up(observed[launch])
        self._strays = strays

    def _observe(self, live: Mapping[LaunchId, Allocation]) -> dict[LaunchId, Observation]:
        """What the engine has; strangers among it are found at the first look, and kept up to date."""
        observed = {observation.launch_id: observation for observation in self._engine.observe()}
        for launch in [launch for launch in self._strangers if launch not in observed]:
            del self._strangers[launch]
            self._unwanted.discard(launch)
        for launch, known in list(self._strangers.items()):
            if known.state is not observed[launch].state:
                self._strangers[launch] = replace(known, state=observed[launch].state)
        if not self._has_looked:
            for launch in [launch for launch in observed if launch not in live]:
                if self._store.allocation(launch) is None:
                    self._meet(observed[launch])
            self._has_looked = True
        return observed

    def _meet(self, seen: Observation) -> None:
        job = job_of_launch(seen.launch_id)
        stranger = Stranger(
            launch_id=seen.launch_id,
            job_id=job,
            is_job_known=self._store.job(job) is not None,
            state=seen.state,
            seen_ns=self._clock(),
        )
        self._strangers[stranger.launch_id] = stranger
        log.warning("%s is on the engine and unknown here; it is left alone", stranger.launch_id)
        self._met(stranger)

    def _compare(self, held: Allocation, seen: Observation | None) -> Fact | None:
        now = self._clock()
        if seen is None:
            return NeverLaunched(at_ns=now, launch_id=held.id, fence=held.fence, state=held.state)
        if seen.state is ObservedState.EXITED:
            return Exited(
                at_ns=seen.ended_ns or now,
                launch_id=held.id,
                fence=held.fence,
                exit_code=seen.exit_code if seen.exit_code is not None else 1,
                cause=Cause(seen.cause) if seen.cause in Cause._value2member_map_ else Cause.ERROR,
                detail=seen.detail,
                cpu_used_ns=seen.cpu_used_ns,
            )
        if seen.state is ObservedState.GONE:
            return Vanished(at_ns=now, launch_id=held.id, fence=held.fence, detail=seen.detail)
        return None

    def _clean_up(self, seen: Observation) -> None:
        """A launch that nobody holds: forgotten when it is over, ended when it was released, else left alone.

        One that the store has never heard of belongs to a newer state than the store's (an old backup was
        restored): it is reported and not touched, until somebody has it ended.
        """
        launch = seen.launch_id
        if launch in self._strangers:
            if launch in self._unwanted and seen.state is not ObservedState.ALIVE:
                self.obey([Forget(launch_id=launch)])
            return
        stored = self._store.allocation(launch)
        if stored is None:
            self._meet(seen)
        elif stored.state is AllocationState.RELEASED:
            if seen.state is not ObservedState.ALIVE:
                self.obey([Forget(launch_id=launch)])
            elif self._clock() - stored.released_ns > 10_000_000_000:
                self.obey([Stop(launch_id=launch, grace_ns=0)])

    def _watch(self) -> None:
        refresh_ns = 0
        while not self._closing.is_set():
            try:
                self.look()
                if self._clock() >= refresh_ns:
                    refresh_ns = self._clock() + int(self._nodes_every_s * 1e9)
                    self._tell([NodeJoined(at_ns=self._clock(), node=node) for node in self._engine.nodes()])
            except TidemillError as error:
                log.warning("the engine could not be observed: %s", error)
            except Exception:
                log.exception("observing the engine failed")
            self._closing.wait(self._observe_every_s)

    def _work(self, lane: queue.SimpleQueue[Command | None]) -> None:
        while (command := lane.get()) is not None:
            self._do(command)

    def _do(self, command: Command) -> None:
        try:
            self._carry_out(command)
        except Exception:
            log.exception("%s failed", command)
        finally:
            with self._lock:
                self._in_flight[command.launch_id] -= 1
                if self._in_flight[command.launch_id] <= 0:
                    del self._in_flight[command.launch_id]

    def _is_held_back(self, launch: LaunchId) -> bool:
        """Whether a stranger of the same job is alive: it has to be gone first, so that no work runs twice."""
        if not self._has_looked:
            self._observe(self._live())
        if not self._strangers:
            return False
        job = job_of_launch(launch)
        alive = ObservedState.ALIVE
        return any(one.job_id == job and one.state is alive for one in self._strangers.copy().values())

    def _carry_out(self, command: Command) -> None:
        try:
            match command:
                case Launch() if self._is_held_back(command.launch_id):
                    log.debug("%s: an older launch of its job is not gone yet", command)
                case Launch():
                    self._engine.launch(self._build(command.launch_id))
                case Stop():
                    self._engine.stop(command.launch_id, grace_ns=command.grace_ns)
                case Forget():
                    self._engine.forget(command.launch_id)
        except NotFound:
            log.debug("%s: it is over already", command)
        except EngineRefused as error:
            if isinstance(command, Launch) and (held := self._live().get(command.launch_id)) is not None:
                self._tell([LaunchRefused(at_ns=self._clock(), launch_id=held.id, fence=held.fence, detail=str(error))])
        except (EngineLost, Conflict) as error:
            log.debug("%s: %s", command, error)
