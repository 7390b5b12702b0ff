"""An engine without machines: workers that take as long as they are told to, on a clock that the caller moves.

Nothing runs beside the caller: no threads, no waiting, though several threads may call. Whatever has become due by the
clock's time happens when the engine is next asked anything; a launch and an exit cost the same however many there are.
What happens to a launch, unless something goes wrong:

    launch ── at once ──► Prepared ── start delay ──► Started ── its duration ──► Exited

The machines outlive the control plane: ``restarted()`` is the engine object that its successor would make. On
command, machines and workers are lost, and replies are lost before or after what they were about was done.
What no engine may see is in ``violations``: more held on a node or device than there is of it.

``fleet`` makes its machines from a line of text, and ``script`` reads from a worker's command how it ends and when.
"""

from __future__ import annotations

import heapq
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count
from typing import Final

from tidemill import catalog
from tidemill.core.feasible import model_matches
from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.events import Became, Exited, Fact, NodeJoined, NodeWentAway, Prepared, Started
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, LaunchId, NodeId, SiteId
from tidemill.model.job import Cause
from tidemill.model.plan import LaunchSpec, Observation, ObservedState, Sight
from tidemill.ports import EngineCapabilities
from tidemill.units import MILLI, SECOND_NS, parse_duration, parse_size

_TERMINATED: Final = 143
_KILLED: Final = 137
_PART: Final = re.compile(r"(\d+)x([A-Za-z][\w. -]*?)((?::[^:]+)*)")
_CPUS: Final = re.compile(r"(\d+)\s*cpus?")
_CPUS_A_GPU, _CPU_MEMORY, _GPU_MEMORY = 16, 4 << 30, 128 << 30
_NODES_A_RACK, _RACKS_A_BLOCK = 16, 16
_CPU_IDLE_MW, _CPU_BUSY_MW = 1_000, 4_000
_SLEEP: Final = re.compile(r"\bsleep\s+(\d+(?:\.\d+)?)([smhd]?)")
_EXIT: Final = re.compile(r"\bexit\s+(\d{1,3})\s*$")


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
        tells_first: bool = False,
    ) -> None:
        """``duration`` is how long a worker runs, in ns, once it started. With ``tells_first`` the engine's list shows
        that a worker ended only when whoever asks for ``facts`` was told so and came back for more, as a runner that
        waits for the answer to its last report is there until then.

        ``mishap`` is asked before each call, with the method's name and the launch id, what goes wrong with it;
        for ``observe`` the id is empty.
        """
        self._clock = clock
        self._machines = _Machines(
            nodes, duration=duration, ending=ending, start_delay_ns=start_delay_ns, tells_first=tells_first
        )
        self.mishap = mishap

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do: no commands inside workers, which have no inside."""
        return EngineCapabilities(name="simulated", images=True, exec=False, places=True)

    def nodes(self) -> tuple[Node, ...]:
        """The machines that are not lost."""
        with self._machines.lock:
            return tuple(self._now().nodes.values())

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started; nothing more when its launch id was started before, even if it ended."""
        with self._machines.lock:
            machines = self._now()
            after = self._before("launch", spec.launch_id)
            if spec.launch_id not in machines.workers and spec.node_id not in machines.nodes:
                raise EngineLost(f"{spec.node_id} does not answer")
            machines.launch(spec, self._clock())
            self._after(after)

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        """Have a worker end; remembered when it is unknown, so that a late launch of it is not started."""
        with self._machines.lock:
            machines = self._now()
            after = self._before("stop", launch_id)
            machines.stop(launch_id, node_id, grace_ns, self._clock())
            self._after(after)

    def observe(self) -> Sight:
        """Every launch that is not forgotten."""
        with self._machines.lock:
            machines = self._now()
            after = self._before("observe", LaunchId(""))
            seen = tuple([worker.seen for worker in machines.workers.values()])
            sight = Sight(nodes=frozenset(machines.nodes) | frozenset(machines.away), launches=seen)
            self._after(after)
        return sight

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:  # noqa: ARG002 - ids are enough
        """Drop what is kept of a launch that is gone. Raises: Conflict while it lives."""
        with self._machines.lock:
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
        with self._machines.lock:
            self._machines.advance(now)
            return self._machines.tell()

    def next_ns(self) -> int:
        """When something happens next by itself; zero when nothing does."""
        with self._machines.lock:
            return self._machines.next_ns()

    def starts(self, launch_id: LaunchId) -> int:
        """How many times that worker was started: never more than once."""
        with self._machines.lock:
            return self._now().starts[launch_id]

    def lose_worker(self, launch_id: LaunchId) -> None:
        """Kill a worker and its runner; nobody is told, the engine sees that it is gone."""
        with self._machines.lock:
            self._now().lose(launch_id, "its runner was killed")

    def lose_node(self, node_id: NodeId) -> None:
        """Take a machine away with all that runs on it; the engine tells so."""
        with self._machines.lock:
            self._now().lose_node(node_id, self._clock())

    def return_node(self, node_id: NodeId) -> None:
        """Bring a lost machine back, rebooted and empty."""
        with self._machines.lock:
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
    """One launch. ``spec`` None: it was stopped before it was launched. ``seen`` is as the engine's list shows it."""

    launch_id: LaunchId
    node_id: NodeId
    spec: LaunchSpec | None
    state: ObservedState = ObservedState.ALIVE
    started_ns: int = 0
    ended_ns: int = 0
    end_ns: int = 0
    exit_code: int = 0
    cause: Cause = Cause.NONE
    detail: str = ""
    seen: Observation = field(init=False)

    def __post_init__(self) -> None:
        self.look()

    @property
    def cpu_used_ns(self) -> int:
        """All of its cores for all of its time."""
        if self.spec is None or not self.started_ns or self.state is not ObservedState.EXITED:
            return 0
        return (self.ended_ns - self.started_ns) * self.spec.cpu_milli // MILLI

    def look(self) -> None:
        """See it again, because its state is another: so that a look at all of them makes nothing."""
        is_over = self.state is ObservedState.EXITED
        self.seen = Observation(
            launch_id=self.launch_id,
            node_id=self.node_id,
            state=self.state,
            exit_code=self.exit_code if is_over else None,
            cause=self.cause if is_over else "",
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
        tells_first: bool,
    ) -> None:
        self.lock = threading.RLock()
        self.nodes = {node.id: node for node in nodes}
        self.away: dict[NodeId, Node] = {}
        self.workers: dict[LaunchId, _Worker] = {}
        self.starts: Counter[LaunchId] = Counter()
        self.facts: list[Fact] = []
        self.violations: list[str] = []
        self._duration = duration
        self._ending = ending
        self._start_delay_ns = start_delay_ns
        self._tells_first = tells_first
        self._ended: list[_Worker] = []
        self._told: list[_Worker] = []
        self._due: list[_Due] = []
        self._order = count()
        self._held: Counter[tuple[str, str]] = Counter()

    def advance(self, now: int) -> None:
        """Let everything happen that is due by ``now``."""
        while self._due and self._due[0].at_ns <= now:
            due = heapq.heappop(self._due)
            if due.worker.state is ObservedState.ALIVE:
                (self._end if due.is_end else self._start)(due.worker, due.at_ns)

    def tell(self) -> tuple[Fact, ...]:
        """What there is to tell, once; from now on the list shows the ends that were told before."""
        for worker in self._told:
            worker.look()
        self._told, self._ended = self._ended, []
        told, self.facts = tuple(self.facts), []
        return told

    def next_ns(self) -> int:
        """When something is due; zero when nothing is."""
        while self._due and self._due[0].worker.state is not ObservedState.ALIVE:
            heapq.heappop(self._due)
        return self._due[0].at_ns if self._due else 0

    def launch(self, spec: LaunchSpec, now: int) -> None:
        """Have a worker, if its id is new."""
        if spec.launch_id in self.workers:
            return
        worker = self.workers[spec.launch_id] = _Worker(spec.launch_id, spec.node_id, spec)
        self.starts[spec.launch_id] += 1
        self._hold(spec, +1)
        self.facts.append(Prepared(at_ns=now, launch_id=spec.launch_id, fence=spec.fence))
        self._plan(worker, now + self._start_delay_ns, is_end=False)

    def stop(self, launch_id: LaunchId, node_id: NodeId, grace_ns: int, now: int) -> None:
        """Have it end within the grace; not later than an earlier stop, or the worker itself, would have it."""
        worker = self.workers.get(launch_id)
        if worker is None:
            gone = "stopped before it was launched"
            self.workers[launch_id] = _Worker(launch_id, node_id, None, state=ObservedState.GONE, detail=gone)
        elif worker.state is ObservedState.ALIVE and worker.spec is not None:
            needs = self._ending(worker.spec).stop_takes_ns if worker.started_ns else 0
            ends = now + min(needs, grace_ns)
            if not worker.end_ns or ends < worker.end_ns:
                worker.exit_code = _TERMINATED if needs <= grace_ns else _KILLED
                worker.cause, worker.detail = Cause.NONE, "stopped"
                worker.look()
                self._plan(worker, ends, is_end=True)

    def lose(self, launch_id: LaunchId, detail: str) -> None:
        """Have nothing left of it, without a word."""
        worker = self.workers.get(launch_id)
        if worker is not None and worker.state is ObservedState.ALIVE and worker.spec is not None:
            worker.state, worker.detail = ObservedState.GONE, detail
            worker.look()
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
        if self._tells_first:
            self._ended.append(worker)
        else:
            worker.look()
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
        amounts = Counter({"cpu": spec.cpu_milli, "memory": spec.memory_bytes})
        for device, milli in spec.devices:
            amounts[device.partition("/")[0]] += milli
        node = self.nodes.get(NodeId(spec.node_id))
        capacity = {"cpu": node.cpu_milli, "memory": node.memory_bytes} if node else {}
        capacity |= {device.id: MILLI for device in node.devices} if node else {}
        for what, amount in amounts.items():
            held = self._held[spec.node_id, what] = self._held[spec.node_id, what] + sign * amount
            if sign > 0 and held > capacity.get(what, 0):
                self.violations.append(
                    f"{spec.launch_id}: {held} of {capacity.get(what, 0)} {what} of {spec.node_id} are held"
                )


def fleet(description: str, *, site_id: SiteId, boot_id: str = "simulated") -> tuple[Node, ...]:
    """The machines of a line such as ``5000xH100:8``, ``100xA100-80GB:4:64cpu:1TB, 30xcpu:20cpu``.

    A part is how many machines, what they have, how many GPUs each, its CPUs and its memory; ``cpu`` has no GPUs.
    Without more it has 16 cores and 128 GB for each GPU, or 16 cores, and 4 GB for each core. Every 16 machines are a
    rack, every 16 racks a block. Raises: ValueError that names what cannot be read.

    >>> [node.gpu_milli for node in fleet("2xH100:8, 1xcpu:20cpu", site_id=SiteId("lab"))]
    [8000, 8000, 0]
    """
    nodes: list[Node] = []
    for part in description.split(","):
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{part.strip()!r} is not some machines; write for example 100xH100:8 or 30xcpu:20cpu")
        spec = _spec_of(found[2].strip())
        gpus, cores, memory = _sizes(found[3].split(":")[1:], part, has_gpus=spec is not None)
        nodes += [
            _machine(len(nodes) + number, spec, gpus, cores * MILLI, memory, site_id, boot_id)
            for number in range(int(found[1]))
        ]
    return tuple(nodes)


def script(spec: LaunchSpec, *, default_ns: int) -> tuple[int, int]:
    """How long a worker runs, in ns, and with what status it exits, from its command: ``sleep 0.5; exit 3``.

    The first ``sleep`` in it counts; without one it takes ``default_ns``, and ``true`` and ``false`` take no time.
    """
    command = spec.run.strip()
    if command in ("true", "false"):
        return 0, int(command == "false")
    ends = _EXIT.search(command)
    if (found := _SLEEP.search(command)) is not None:
        return parse_duration(found[1] + (found[2] or "s")), int(ends[1]) if ends else 0
    return default_ns, int(ends[1]) if ends else 0


def _spec_of(name: str) -> catalog.DeviceSpec | None:
    """The first device of the catalog that answers to that name; None for machines without GPUs."""
    if name.lower() == "cpu":
        return None
    named = [spec for spec in catalog.devices() if model_matches(spec.model, name)]
    if not named:
        near = ", ".join(catalog.nearest_names(name)) or "H100, A100 and cpu"
        raise ValueError(f"{name!r} is not a GPU of the catalog; names are for example {near}")
    return named[0]


def _sizes(words: list[str], part: str, *, has_gpus: bool) -> tuple[int, int, int]:
    """GPUs, cores and bytes of memory of a machine."""
    gpus, cores, memory = int(has_gpus), 0, 0
    for word in words:
        if word.isdigit() and has_gpus and not cores:
            gpus = int(word)
        elif found := _CPUS.fullmatch(word.strip()):
            cores = int(found[1])
        else:
            memory = parse_size(word)
    cores = cores or _CPUS_A_GPU * max(gpus, 1)
    if gpus > 16 or not 0 < cores <= 4_096:
        raise ValueError(f"{part.strip()!r}: a machine has at most 16 GPUs, and between 1 and 4096 cores")
    return gpus, cores, memory or (gpus * _GPU_MEMORY if gpus else cores * _CPU_MEMORY)


def _machine(
    number: int, spec: catalog.DeviceSpec | None, gpus: int, cpu_milli: int, memory: int, site_id: SiteId, boot_id: str
) -> Node:
    rack = number // _NODES_A_RACK
    devices = () if spec is None else tuple(
        Device(
            id=DeviceId(f"GPU-sim-{number}-{index}"),
            index=index,
            model=spec.model,
            reported=f"simulated {spec.model}",
            memory_bytes=spec.memory_bytes,
            idle_mw=spec.idle_mw,
            busy_mw=spec.busy_mw,
        )
        for index in range(gpus)
    )  # fmt: skip
    return Node(
        id=NodeId(f"node_sim-{number}"),
        site_id=site_id,
        name=f"sim-{number}",
        state=NodeState.READY,
        version=1,
        boot_id=boot_id,
        address="127.0.0.1",
        cpu_milli=cpu_milli,
        memory_bytes=memory,
        disk_bytes=1 << 42,
        cpu_model="simulated",
        cpu_idle_mw=_CPU_IDLE_MW,
        cpu_busy_mw=_CPU_BUSY_MW,
        images=True,
        devices=devices,
        block=f"block-{rack // _RACKS_A_BLOCK}",
        rack=f"rack-{rack}",
    )
