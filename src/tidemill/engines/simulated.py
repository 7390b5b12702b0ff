"""An engine without machines: workers that take as long as they are told to, on a clock that the caller moves.

Nothing runs beside the caller: no threads, no waiting. Whatever has become due by the clock's time happens when the
engine is next asked anything. What happens to a launch, unless something goes wrong:

    launch ── at once ──► Prepared ── start delay ──► Started ── its duration ──► Exited

The machines outlive the control plane: ``restarted()`` is the engine object that its successor would make. On
command, machines and workers are lost, and replies are lost before or after what they were about was done.
What no engine may see is in ``violations``: more held on a node or device than there is of it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count
from typing import Final

from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.events import Became, Exited, Fact, NodeJoined, NodeWentAway, Prepared, Started
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.job import Cause
from tidemill.model.plan import LaunchSpec, Observation, ObservedState
from tidemill.ports import EngineCapabilities
from tidemill.units import MILLI, SECOND_NS

_TERMINATED: Final = 143
_KILLED: Final = 137


class Mishap(StrEnum):
    """What goes wrong with one call."""

    NONE = ""
    REFUSED = "refused"
    """The engine says no, for good."""
    LOST_BEFORE = "lost_before"
    """The call does not arrive."""
    LOST_AFTER = "lost_after"
    """The call is carried out, and its reply does not arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a worker ends when left alone. ``stop_takes_ns`` is what it needs between SIGTERM and its end."""

    exit_code: int = 0
    cause: Cause = Cause.NONE
    detail: str = ""
    stop_takes_ns: int = 0


class SimulatedEngine:
    """Starts workers that exist only as entries of a list. Keeps the contract of engines."""

    def __init__(
        self,
        nodes: Iterable[Node],
        *,
        clock: Callable[[], int],
        duration: Callable[[LaunchSpec], int],
        ending: Callable[[LaunchSpec], Ending] = lambda _: Ending(),
        start_delay_ns: int = SECOND_NS,
        mishap: Callable[[str, LaunchId], Mishap] = lambda _call, _launch: Mishap.NONE,
    ) -> None:
        """``duration`` is how long a worker runs, in ns, once it started.

        ``mishap`` is asked before each call, with the method's name and the launch id, what goes wrong with it;
        for ``observe`` the id is empty.
        """
        self._clock = clock
        self._machines = _Machines(nodes, duration=duration, ending=ending, start_delay_ns=start_delay_ns)
        self.mishap = mishap

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do: no commands inside workers, which have no inside."""
        return EngineCapabilities(name="simulated", images=True, exec=False, places=True)

    def nodes(self) -> tuple[Node, ...]:
        """The machines that are not lost."""
        return tuple(self._now().nodes.values())

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started; nothing more when its launch id was started before, even if it ended."""
        machines = self._now()
        after = self._before("launch", spec.launch_id)
        if spec.launch_id not in machines.workers and spec.node_id not in machines.nodes:
            raise EngineLost(f"{spec.node_id} does not answer")
        machines.launch(spec, self._clock())
        self._after(after)

    def stop(self, launch_id: LaunchId, *, grace_ns: int) -> None:
        """Have a worker end; remembered when it is unknown, so that a late launch of it is not started."""
        machines = self._now()
        after = self._before("stop", launch_id)
        machines.stop(launch_id, grace_ns, self._clock())
        self._after(after)

    def observe(self) -> tuple[Observation, ...]:
        """Every launch that is not forgotten."""
        machines = self._now()
        after = self._before("observe", LaunchId(""))
        seen = tuple(worker.observation() for worker in machines.workers.values())
        self._after(after)
        return seen

    def forget(self, launch_id: LaunchId) -> None:
        """Drop what is kept of a launch that is gone. Raises: Conflict while it lives."""
        machines = self._now()
        after = self._before("forget", launch_id)
        worker = machines.workers.get(launch_id)
        if worker is not None and worker.state is ObservedState.ALIVE:
            raise Conflict(f"{launch_id} still runs")
        machines.workers.pop(launch_id, None)
        self._after(after)

    def close(self) -> None:
        """Let go; the machines go on."""

    # ------------------------------------------------------------------ what an experiment does and sees

    def restarted(self) -> SimulatedEngine:
        """Another engine object over the same machines, as a restarted control plane makes it."""
        return copy(self)

    def facts(self, now: int) -> tuple[Fact, ...]:
        """What runners and nodes have to tell since they were last asked, by time; times are at most ``now``."""
        self._machines.advance(now)
        told, self._machines.facts = tuple(self._machines.facts), []
        return told

    def next_ns(self) -> int:
        """When something happens next by itself; zero when nothing does."""
        return self._machines.next_ns()

    def starts(self, launch_id: LaunchId) -> int:
        """How many times that worker was started: never more than once."""
        return self._now().starts[launch_id]

    def lose_worker(self, launch_id: LaunchId) -> None:
        """Kill a worker and its runner; nobody is told, the engine sees that it is gone."""
        self._now().lose(launch_id, "its runner was killed")

    def lose_node(self, node_id: NodeId) -> None:
        """Take a machine away with all that runs on it; the engine tells so."""
        self._now().lose_node(node_id, self._clock())

    def return_node(self, node_id: NodeId) -> None:
        """Bring a lost machine back, rebooted and empty."""
        self._now().return_node(node_id, self._clock())

    @property
    def violations(self) -> Sequence[str]:
        """Sentences about nodes or devices of which more was held than there is; a sound plan leaves none."""
        return tuple(self._machines.violations)

    def _now(self) -> _Machines:
        self._machines.advance(self._clock())
        return self._machines

    def _before(self, call: str, launch_id: LaunchId) -> Mishap:
        mishap = self.mishap(call, launch_id)
        if mishap is Mishap.REFUSED:
            raise EngineRefused(f"{call} was refused")
        if mishap is Mishap.LOST_BEFORE:
            raise EngineLost(f"{call} did not arrive")
        return mishap

    def _after(self, mishap: Mishap) -> None:
        if mishap is Mishap.LOST_AFTER:
            raise EngineLost("the reply was lost")


@dataclass(slots=True)
class _Worker:
    """One launch. ``spec`` None: it was stopped before it was launched."""

    launch_id: LaunchId
    spec: LaunchSpec | None
    state: ObservedState = ObservedState.ALIVE
    started_ns: int = 0
    ended_ns: int = 0
    end_ns: int = 0
    exit_code: int = 0
    cause: Cause = Cause.NONE
    detail: str = ""

    @property
    def cpu_used_ns(self) -> int:
        """All of its cores for all of its time."""
        if self.spec is None or not self.started_ns or self.state is not ObservedState.EXITED:
            return 0
        return (self.ended_ns - self.started_ns) * self.spec.cpu_milli // MILLI

    def observation(self) -> Observation:
        """As the engine's list shows it."""
        if self.state is not ObservedState.EXITED:
            return Observation(launch_id=self.launch_id, state=self.state, detail=self.detail)
        return Observation(
            launch_id=self.launch_id,
            state=self.state,
            exit_code=self.exit_code,
            cause=self.cause,
            detail=self.detail,
            cpu_used_ns=self.cpu_used_ns,
            ended_ns=self.ended_ns,
        )


@dataclass(order=True, slots=True)
class _Due:
    """Something that happens to a worker at an instant, unless it ended before. An end is only ever brought forward."""

    at_ns: int
    order: int
    worker: _Worker = field(compare=False)
    is_end: bool = field(compare=False)


class _Machines:
    """The machines and what runs on them; outlives the engine objects that look at it."""

    def __init__(
        self,
        nodes: Iterable[Node],
        *,
        duration: Callable[[LaunchSpec], int],
        ending: Callable[[LaunchSpec], Ending],
        start_delay_ns: int,
    ) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.away: dict[NodeId, Node] = {}
        self.workers: dict[LaunchId, _Worker] = {}
        self.starts: Counter[LaunchId] = Counter()
        self.facts: list[Fact] = []
        self.violations: list[str] = []
        self._duration = duration
        self._ending = ending
        self._start_delay_ns = start_delay_ns
        self._due: list[_Due] = []
        self._order = count()
        self._held: Counter[tuple[str, str]] = Counter()

    def advance(self, now: int) -> None:
        """Let everything happen that is due by ``now``."""
        while self._due and self._due[0].at_ns <= now:
            due = heapq.heappop(self._due)
            if due.worker.state is ObservedState.ALIVE:
                (self._end if due.is_end else self._start)(due.worker, due.at_ns)

    def next_ns(self) -> int:
        """When something is due; zero when nothing is."""
        while self._due and self._due[0].worker.state is not ObservedState.ALIVE:
            heapq.heappop(self._due)
        return self._due[0].at_ns if self._due else 0

    def launch(self, spec: LaunchSpec, now: int) -> None:
        """Have a worker, if its id is new."""
        if spec.launch_id in self.workers:
            return
        worker = self.workers[spec.launch_id] = _Worker(spec.launch_id, spec)
        self.starts[spec.launch_id] += 1
        self._hold(spec, +1)
        self.facts.append(Prepared(at_ns=now, launch_id=spec.launch_id, fence=spec.fence))
        self._plan(worker, now + self._start_delay_ns, is_end=False)

    def stop(self, launch_id: LaunchId, grace_ns: int, now: int) -> None:
        """Have it end within the grace; not later than an earlier stop, or the worker itself, would have it."""
        worker = self.workers.get(launch_id)
        if worker is None:
            gone = "stopped before it was launched"
            self.workers[launch_id] = _Worker(launch_id, None, state=ObservedState.GONE, detail=gone)
        elif worker.state is ObservedState.ALIVE and worker.spec is not None:
            needs = self._ending(worker.spec).stop_takes_ns if worker.started_ns else 0
            ends = now + min(needs, grace_ns)
            if not worker.end_ns or ends < worker.end_ns:
                worker.exit_code = _TERMINATED if needs <= grace_ns else _KILLED
                worker.cause, worker.detail = Cause.NONE, "stopped"
                self._plan(worker, ends, is_end=True)

    def lose(self, launch_id: LaunchId, detail: str) -> None:
        """Have nothing left of it, without a word."""
        worker = self.workers.get(launch_id)
        if worker is not None and worker.state is ObservedState.ALIVE and worker.spec is not None:
            worker.state, worker.detail = ObservedState.GONE, detail
            self._hold(worker.spec, -1)

    def lose_node(self, node_id: NodeId, now: int) -> None:
        """Have the machine and all on it gone."""
        if (node := self.nodes.pop(node_id, None)) is None:
            return
        self.away[node_id] = node
        for worker in self.workers.values():
            if worker.spec is not None and worker.spec.node_id == node_id:
                self.lose(worker.launch_id, "its machine was lost")
        self.facts.append(NodeWentAway(at_ns=now, node_id=node_id, detail="the machine was lost"))

    def return_node(self, node_id: NodeId, now: int) -> None:
        """Have the machine back with another boot id."""
        if (node := self.away.pop(node_id, None)) is not None:
            self.nodes[node_id] = replace(node, boot_id=f"{node.boot_id}+")
            self.facts.append(NodeJoined(at_ns=now, node=self.nodes[node_id]))

    def _plan(self, worker: _Worker, at_ns: int, *, is_end: bool) -> None:
        if is_end:
            worker.end_ns = at_ns
        heapq.heappush(self._due, _Due(at_ns, next(self._order), worker, is_end))

    def _start(self, worker: _Worker, now: int) -> None:
        spec = worker.spec
        if spec is None:
            return
        worker.started_ns = now
        self.facts.append(Started(at_ns=now, launch_id=spec.launch_id, fence=spec.fence, isolation=("simulated=yes",)))
        if spec.service is not None:
            endpoint = next(
                (f"{spec.node_id}:{port.number}" for port in spec.ports if port.name == spec.service.port), ""
            )
            self.facts.append(
                Became(at_ns=now, launch_id=spec.launch_id, fence=spec.fence, ready=True, endpoint=endpoint)
            )
        ending = self._ending(spec)
        worker.exit_code, worker.cause, worker.detail = ending.exit_code, ending.cause, ending.detail
        self._plan(worker, now + max(self._duration(spec), 0), is_end=True)

    def _end(self, worker: _Worker, now: int) -> None:
        spec = worker.spec
        if spec is None:
            return
        worker.state, worker.ended_ns = ObservedState.EXITED, now
        self._hold(spec, -1)
        self.facts.append(
            Exited(
                at_ns=now,
                launch_id=spec.launch_id,
                fence=spec.fence,
                exit_code=worker.exit_code,
                cause=worker.cause,
                detail=worker.detail,
                cpu_used_ns=worker.cpu_used_ns,
            )
        )

    def _hold(self, spec: LaunchSpec, sign: int) -> None:
        """Count what a worker holds, and note what is then over capacity."""
        amounts = {"cpu": spec.cpu_milli, "memory": spec.memory_bytes, **dict(spec.devices)}
        node = self.nodes.get(NodeId(spec.node_id))
        capacity = {"cpu": node.cpu_milli, "memory": node.memory_bytes} if node else {}
        capacity |= {device.id: MILLI for device in node.devices} if node else {}
        for what, amount in amounts.items():
            held = self._held[spec.node_id, what] = self._held[spec.node_id, what] + sign * amount
            if sign > 0 and held > capacity.get(what, 0):
                self.violations.append(
                    f"{spec.launch_id}: {held} of {capacity.get(what, 0)} {what} of {spec.node_id} are held"
                )
