"""An engine on virtual time: thousands of nodes in one process, without threads or processes of its own.

It keeps the same contract as the real ones. A launch comes alive after a start delay, ends after its duration, and can
be hurt: a reply lost before or after the deed, a worker that vanishes, a node that goes away. The same
calls at the same instants give the same observations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidemill.errors import Conflict, EngineLost
from tidemill.model.events import Exited, Fact, Prepared, Started
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.plan import LaunchSpec, Observation, ObservedState
from tidemill.ports import EngineCapabilities
from tidemill.units import SECOND_NS


@dataclass(slots=True)
class _Launch:
    """One launch: when its worker starts and ends, if it ends by itself, and whether it is there at all."""

    spec: LaunchSpec | None
    starts_ns: int
    ends_ns: int
    exit_code: int
    is_gone: bool = False
    told: int = 0


class SimulatedEngine:
    """An engine over ``nodes`` whose time is ``clock``. ``duration`` gives the length and exit status of a worker.

    Units: ns. ``start_delay_ns`` passes between a launch and its worker's start.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        clock: Callable[[], int],
        duration: Callable[[LaunchSpec], tuple[int, int]] = lambda _spec: (SECOND_NS, 0),
        start_delay_ns: int = 0,
    ) -> None:
        self._nodes = list(nodes)
        self._clock = clock
        self._duration = duration
        self._start_delay_ns = start_delay_ns
        self._launches: dict[LaunchId, _Launch] = {}
        self.started: list[LaunchId] = []
        """Every worker ever started, in order: the truth to audit against."""
        self.lose_next_before = 0
        """So many of the next calls are lost before anything is done."""
        self.lose_next_after = 0
        """So many of the next calls are carried out and their reply is lost."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What it can do."""
        return EngineCapabilities(name="simulated", images=True, exec=False, places=True)

    def nodes(self) -> tuple[Node, ...]:
        """The machines it has now."""
        return tuple(self._nodes)

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started, once."""
        self._lose_before()
        if spec.launch_id not in self._launches:
            length, exit_code = self._duration(spec)
            starts = self._clock() + self._start_delay_ns
            self._launches[spec.launch_id] = _Launch(spec, starts, starts + length, exit_code)
            self.started.append(spec.launch_id)
        self._lose_after()

    def stop(self, launch_id: LaunchId, *, grace_ns: int) -> None:
        """End that worker after its grace; remember the id when it is unknown."""
        self._lose_before()
        launch = self._launches.get(launch_id)
        if launch is None:
            self._launches[launch_id] = _Launch(None, 0, 0, 0, is_gone=True)
        elif not launch.is_gone and self._clock() < launch.ends_ns:
            launch.ends_ns = min(launch.ends_ns, self._clock() + grace_ns)
            launch.exit_code = 143
        self._lose_after()

    def observe(self) -> tuple[Observation, ...]:
        """Every launch that it has not forgotten."""
        return tuple(self._observation(launch_id, launch) for launch_id, launch in self._launches.items())

    def forget(self, launch_id: LaunchId) -> None:
        """Drop a launch that is over."""
        launch = self._launches.get(launch_id)
        if launch is not None and not launch.is_gone and self._clock() < launch.ends_ns:
            raise Conflict("The worker lives.", field="launch", value=launch_id)
        self._launches.pop(launch_id, None)

    def close(self) -> None:
        """Let go."""

    # -- what a simulation does to it -----------------------------------------------------------------------------

    def facts(self) -> tuple[Fact, ...]:
        """What its runners report since the last call, in order of launch."""
        now = self._clock()
        told: list[Fact] = []
        for launch_id, launch in self._launches.items():
            if launch.spec is None or launch.is_gone:
                continue
            fence = launch.spec.fence
            if launch.told == 0 and now >= launch.starts_ns:
                launch.told = 1
                told.append(Prepared(at_ns=launch.starts_ns, launch_id=launch_id, fence=fence))
                told.append(Started(at_ns=launch.starts_ns, launch_id=launch_id, fence=fence))
            if launch.told == 1 and now >= launch.ends_ns:
                launch.told = 2
                code = launch.exit_code
                told.append(Exited(at_ns=launch.ends_ns, launch_id=launch_id, fence=fence, exit_code=code))
        return tuple(told)

    def next_instant(self) -> int:
        """When one of its workers next starts or ends; zero when none will."""
        now = self._clock()
        instants = [
            instant
            for launch in self._launches.values()
            if not launch.is_gone
            for instant in (launch.starts_ns, launch.ends_ns)
            if instant > now
        ]
        return min(instants, default=0)

    def lose_worker(self, launch_id: LaunchId) -> None:
        """A worker and its runner vanish without a word."""
        self._launches[launch_id].is_gone = True

    def lose_node(self, node_id: NodeId) -> None:
        """A machine goes away with all that runs on it."""
        self._nodes = [node for node in self._nodes if node.id != node_id]
        for launch in self._launches.values():
            if launch.spec is not None and launch.spec.node_id == node_id:
                launch.is_gone = True

    def _observation(self, launch_id: LaunchId, launch: _Launch) -> Observation:
        now = self._clock()
        if launch.is_gone:
            return Observation(launch_id=launch_id, state=ObservedState.GONE)
        if now < launch.ends_ns:
            return Observation(launch_id=launch_id, state=ObservedState.ALIVE)
        return Observation(
            launch_id=launch_id,
            state=ObservedState.EXITED,
            exit_code=launch.exit_code,
            ended_ns=launch.ends_ns,
        )

    def _lose_before(self) -> None:
        if self.lose_next_before:
            self.lose_next_before -= 1
            raise EngineLost("The engine did not answer.")

    def _lose_after(self) -> None:
        if self.lose_next_after:
            self.lose_next_after -= 1
            raise EngineLost("The engine's answer was lost.")
