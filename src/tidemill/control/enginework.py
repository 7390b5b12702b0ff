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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from tidemill.errors import Conflict, EngineLost, EngineRefused, InvalidSpec, NotFound, TidemillError
from tidemill.model.events import Exited, Fact, LaunchRefused, NeverLaunched, NodeJoined, Vanished
from tidemill.model.ids import JobId, LaunchId, NodeId, job_of_launch
from tidemill.model.job import Allocation, AllocationState, Cause
from tidemill.model.plan import Command, Forget, Launch, LaunchSpec, Observation, ObservedState, Sight, Stop
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
    node_id: NodeId
    state: ObservedState
    seen_ns: int


class EngineWork:
    """The hands of the control plane on one engine.

    ``live`` gives the allocations that are not released, ``build`` the launch spec of one of them (raising
    NotFound when it is over), ``tell`` takes facts, ``met`` each stranger once. ``is_news`` is told of every look, and
    says whether it is time to ask for the nodes. ``elsewhere`` gives the strangers of other engines.
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
        is_news: Callable[[Sight], bool] = lambda _: False,
        met: Callable[[Stranger], object] = lambda _: None,
        elsewhere: Callable[[], Iterable[Stranger]] = tuple,
        observe_every_s: float = 0.5,
        nodes_every_s: float = 30.0,
    ) -> None:
        self._engine = engine
        self._store = store
        self._clock = clock
        self._live = live
        self._build = build
        self._tell = tell
        self._is_news = is_news
        self._met = met
        self._elsewhere = elsewhere
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
        self._words: dict[LaunchId, str] = {}
        self._strays: set[LaunchId] = set()
        """What the engine knew at the last look and the world did not: the turn that ends it may not be stored yet."""
        self._refresh_ns = 0
        """When the nodes are asked for next, though no look shows anything new."""
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
            if thread.is_alive():
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

    def word_of(self, launch: LaunchId) -> str:
        """What the engine said of a launch that is alive, at the last look; empty when it said nothing."""
        return self._words.get(launch, "")

    def end_stranger(self, launch: LaunchId, *, grace_ns: int) -> Stranger:
        """The stranger, which is stopped, and forgotten once it is gone. Raises: NotFound."""
        found = self._strangers.get(launch)
        if found is None:
            raise NotFound(
                "No such launch is unknown here.", field="launch", value=launch, mend="See tidemill strangers list."
            )
        self._unwanted.add(launch)
        if found.state is ObservedState.ALIVE:
            self.obey([Stop(launch_id=launch, node_id=found.node_id, grace_ns=grace_ns)])
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

    def look(self) -> Sight:
        """What the engine sees, compared with what should be.

        What should be is read first: what comes to be after that is not missed, and what ends after that is over for
        the turn that is told. A launch about which a command was on its way meanwhile is left to the next look.
        """
        live = self._live()
        with self._lock:
            self._begun = {launch for launch, count in self._in_flight.items() if count > 0}
        sight = self._observe(live)
        observed = {observation.launch_id: observation for observation in sight.launches}
        with self._lock:
            busy = self._begun.copy()
        facts = [
            fact
            for launch, held in live.items()
            if launch not in busy
            and held.node_id in sight.nodes
            and (fact := self._compare(held, observed.get(launch))) is not None
        ]
        if facts:
            self._tell(facts)
        strays = {launch for launch in observed if launch not in live and launch not in busy}
        quiet = self._strangers.keys() - self._unwanted
        for launch in sorted((strays & self._strays) - quiet)[:_CLEANED_AT_ONCE]:
            self._clean_up(observed[launch])
        self._strays = strays
        return sight

    def _observe(self, live: Mapping[LaunchId, Allocation]) -> Sight:
        """What the engine has; strangers among it are found at the first look, and kept up to date."""
        sight = self._engine.observe()
        observed = {observation.launch_id: observation for observation in sight.launches}
        alive = (seen for seen in sight.launches if seen.detail and seen.state is ObservedState.ALIVE)
        self._words = {seen.launch_id: seen.detail for seen in alive}
        for launch, known in list(self._strangers.items()):
            seen = observed.get(launch)
            if seen is None and known.node_id in sight.nodes:
                del self._strangers[launch]
                self._unwanted.discard(launch)
            elif seen is not None and known.state is not seen.state:
                self._strangers[launch] = replace(known, state=seen.state)
        if not self._has_looked:
            for launch in [launch for launch in observed if launch not in live]:
                if self._store.allocation(launch) is None:
                    self._meet(observed[launch])
            self._has_looked = True
        return sight

    def _meet(self, seen: Observation) -> None:
        job = job_of_launch(seen.launch_id)
        stranger = Stranger(
            launch_id=seen.launch_id,
            job_id=job,
            is_job_known=self._store.job(job) is not None,
            node_id=seen.node_id,
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
            return Vanished(
                at_ns=now,
                launch_id=held.id,
                fence=held.fence,
                detail=seen.detail,
                exit_code=seen.exit_code,
                cause=Cause(seen.cause) if seen.cause and seen.cause in Cause._value2member_map_ else Cause.NODE_LOST,
                cpu_used_ns=seen.cpu_used_ns,
                scheduler=seen.scheduler,
            )
        return None

    def _clean_up(self, seen: Observation) -> None:
        """A launch that nobody holds: forgotten when it is over, ended when it was released, else left alone.

        One that the store has never heard of belongs to a newer state than the store's (an old backup was
        restored): it is reported and not touched, until somebody has it ended.
        """
        launch = seen.launch_id
        if launch in self._strangers:
            if launch in self._unwanted and seen.state is not ObservedState.ALIVE:
                self.obey([Forget(launch_id=launch, node_id=seen.node_id)])
            return
        stored = self._store.allocation(launch)
        if stored is None:
            self._meet(seen)
        elif stored.state is AllocationState.RELEASED:
            if seen.state is not ObservedState.ALIVE:
                self.obey([Forget(launch_id=launch, node_id=stored.node_id)])
            elif self._clock() - stored.released_ns > 10_000_000_000:
                self.obey([Stop(launch_id=launch, node_id=stored.node_id, grace_ns=0)])

    def watch(self) -> None:
        """Look once, and ask for the nodes when it is time."""
        is_news = self._is_news(self.look())
        if is_news or self._clock() >= self._refresh_ns:
            self._refresh_ns = self._clock() + int(self._nodes_every_s * 1e9)
            self._tell([NodeJoined(at_ns=self._clock(), node=node) for node in self._engine.nodes()])

    def _watch(self) -> None:
        while not self._closing.is_set():
            try:
                self.watch()
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
        strangers = (*self._strangers.copy().values(), *self._elsewhere())
        if not strangers:
            return False
        job = job_of_launch(launch)
        return any(one.job_id == job and one.state is ObservedState.ALIVE for one in strangers)

    def _carry_out(self, command: Command) -> None:
        try:
            match command:
                case Launch() if self._is_held_back(command.launch_id):
                    log.debug("%s: an older launch of its job is not gone yet", command)
                case Launch():
                    self._engine.launch(self._build(command.launch_id))
                case Stop():
                    self._engine.stop(command.launch_id, node_id=command.node_id, grace_ns=command.grace_ns)
                case Forget():
                    self._engine.forget(command.launch_id, node_id=command.node_id)
        except NotFound:
            log.debug("%s: it is over already", command)
        except (EngineRefused, InvalidSpec) as error:  # refused there, or not to be described here
            if isinstance(command, Launch) and (held := self._live().get(command.launch_id)) is not None:
                self._tell([LaunchRefused(at_ns=self._clock(), launch_id=held.id, fence=held.fence, detail=str(error))])
        except (EngineLost, Conflict) as error:
            log.debug("%s: %s", command, error)
