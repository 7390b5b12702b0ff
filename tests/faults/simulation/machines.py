"""Machines as values, each with the runners on it, and a journal of what really ran: the truth that is audited.

A runner does what ``tidemill.runner.main`` does, as far as it can be seen from outside: it claims its launch once,
begins under a lease only when the control plane says that it holds it, ends itself when nobody answered for the lease,
gives a worker its grace, tells how it ended until somebody heard it, and goes at once when it is fenced. What an engine
keeps is on the machine's disk and outlives its reboot, as with ``tidemill.engines.local``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.events import Exited, Fact, Prepared, Started
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.job import Cause
from tidemill.model.plan import LaunchSpec, Observation, ObservedState, Sight
from tidemill.model.values import replace
from tidemill.ports import EngineCapabilities
from tidemill.units import HOUR_NS, MILLI, SECOND_NS

START: Final = 1_800_000_000 * SECOND_NS
"""When every history begins."""
TERMINATED, KILLED = 143, 137
QUIET_NS: Final = 10 * SECOND_NS
"""How long a runner that was told to stop waits for an answer before it goes without having told how it ended."""
LINGER_NS: Final = 24 * HOUR_NS
START_NS: Final = SECOND_NS
"""What preparing takes."""


@dataclass(frozen=True, slots=True)
class Fate:
    """How the workers of a workload behave, which is in its ``run``: kind, seconds, and seconds to stop."""

    kind: str
    seconds: int
    stop_takes_s: int

    @classmethod
    def of(cls, spec: LaunchSpec) -> Fate:
        kind, seconds, stop_takes_s = spec.run.rsplit(maxsplit=2)
        return cls(kind, int(seconds), int(stop_takes_s))

    def runs_ns(self, rank: int) -> int:
        """How long a worker of it runs when it is left alone."""
        if self.kind == "endless" or (self.kind == "one of the gang" and rank):
            return 100 * HOUR_NS
        return self.seconds * SECOND_NS

    def ending(self, fence: int) -> tuple[int, Cause]:
        """The exit status, and the cause where the status does not say it."""
        failing = self.kind in ("error", "oom") or (self.kind == "flaky" and fence == 1)
        return 3 if failing else 0, Cause.OUT_OF_MEMORY if self.kind == "oom" else Cause.NONE


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the journal: a worker began, or ended and nothing of it is left."""

    at_ns: int
    what: str
    launch_id: LaunchId
    node_id: NodeId
    boot_id: str
    fence: int
    devices: tuple[tuple[str, int], ...]
    cpu_milli: int
    memory_bytes: int
    why: str = ""


@dataclass(slots=True)
class Journal:
    """What really ran, written where it ran. ``live`` is what runs now, with its first line."""

    lines: list[Line] = field(default_factory=list)
    live: dict[LaunchId, Line] = field(default_factory=dict)
    starts: Counter[LaunchId] = field(default_factory=Counter)

    def write(self, at_ns: int, what: str, spec: LaunchSpec, boot_id: str, why: str = "") -> None:
        line = Line(
            at_ns, what, spec.launch_id, NodeId(spec.node_id), boot_id, spec.fence, spec.devices, spec.cpu_milli,
            spec.memory_bytes, why,
        )  # fmt: skip
        self.lines.append(line)
        if what == "start":
            self.live[spec.launch_id] = line
            self.starts[spec.launch_id] += 1
        else:
            self.live.pop(spec.launch_id, None)


class Phase(StrEnum):
    """Where a runner is."""

    PREPARING = "preparing"
    RUNNING = "running"
    LINGERING = "lingering"
    """Nothing of its worker is left; it is there until it has told so."""
    GONE = "gone"


@dataclass(slots=True)
class Runner:
    """One launch on one machine. Instants are of the simulation's own clock; ``lease_ns`` is by the machine's."""

    spec: LaunchSpec
    boot_id: str
    began_ns: int
    lease_ns: int
    phase: Phase = Phase.PREPARING
    granted_ns: int = -1
    """When the last request was sent that was answered; -1: none was."""
    answered_ns: int = 0
    asked_ns: int = 0
    end_ns: int = 0
    kill_ns: int = 0
    is_stopping: bool = False
    fault: tuple[Cause, str] | None = None
    exit_code: int = 0
    cause: Cause = Cause.NONE
    detail: str = ""
    ended_ns: int = 0
    has_exit: bool = False
    """Whether how it ended is written down."""
    outbox: list[Fact] = field(default_factory=list)
    is_asking: bool = False
    """Whether a request of it is on its way."""

    @property
    def is_there(self) -> bool:
        return self.phase is not Phase.GONE

    def next_ns(self) -> int:
        """When something happens to it by itself; zero: never."""
        if self.phase is Phase.LINGERING:
            linger = self.ended_ns + LINGER_NS
            return min(linger, max(self.answered_ns, self.ended_ns) + QUIET_NS + 1) if self.is_stopping else linger
        if self.phase is Phase.GONE:
            return 0
        if self.phase is Phase.PREPARING and self.lease_ns and self.granted_ns < 0:
            return self.began_ns + self.lease_ns
        at = self.began_ns + START_NS if self.phase is Phase.PREPARING else self.end_ns
        if self.kill_ns:
            at = min(at, self.kill_ns)
        if self.lease_ns and not self.is_stopping:
            at = min(at, self.granted_ns + self.lease_ns + 1)
        return at


@dataclass(slots=True)
class Folder:
    """What an engine has written down about a launch. Without a runner it was stopped before it was launched."""

    launch_id: LaunchId
    node_id: NodeId
    runner: Runner | None = None
    stop_ns: int = -1
    """The grace of a stop; -1: none was asked for."""


class Machine:
    """One machine: its disk, its runners, its clocks. ``now`` is the simulation's clock.

    ``drift_ppm`` is by how much its clock that never jumps runs too fast, ``jump_ns`` by how much its wall clock is off.
    """

    def __init__(self, node: Node, journal: Journal, now: Callable[[], int], *, drift_ppm: int = 0) -> None:
        self.node = node
        self.is_on = True
        self.jump_ns = 0
        self.folders: dict[LaunchId, Folder] = {}
        self.journal = journal
        self._now = now
        self._drift_ppm = drift_ppm

    # ------------------------------------------------------------------ what an engine does

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started, if its id is new here."""
        self.advance()
        if Fate.of(spec).kind == "refused":
            raise EngineRefused("there is no such thing here")
        if spec.launch_id in self.folders:
            return
        now = self._now()
        lease_ns = spec.lease_ns * 1_000_000 // (1_000_000 + self._drift_ppm)
        runner = Runner(spec, self.node.boot_id, now, lease_ns, answered_ns=now)
        self.folders[spec.launch_id] = Folder(spec.launch_id, self.node.id, runner)
        self._tell(runner, Prepared(at_ns=self._wall(), launch_id=spec.launch_id, fence=spec.fence))

    def stop(self, launch_id: LaunchId, grace_ns: int) -> None:
        """Have a worker end within the grace; remembered when it is unknown."""
        self.advance()
        folder = self.folders.setdefault(launch_id, Folder(launch_id, self.node.id))
        if folder.stop_ns < 0 or grace_ns < folder.stop_ns:
            folder.stop_ns = grace_ns
        if folder.runner is not None and folder.runner.is_there:
            self._stop(folder.runner, folder.stop_ns, "stopped")
            self.advance()

    def forget(self, launch_id: LaunchId) -> None:
        """Drop what is kept of a launch that is gone. Raises: Conflict while it lives."""
        self.advance()
        folder = self.folders.get(launch_id)
        if folder is not None and folder.runner is not None and folder.runner.is_there:
            raise Conflict(f"{launch_id} still runs")
        self.folders.pop(launch_id, None)

    def observe(self) -> list[Observation]:
        """Every launch that is not forgotten."""
        self.advance()
        return [self._seen(folder) for folder in self.folders.values()]

    def _seen(self, folder: Folder) -> Observation:
        runner = folder.runner
        if runner is None:
            gone = "stopped before it was launched"
            return Observation(
                launch_id=folder.launch_id, node_id=folder.node_id, state=ObservedState.GONE, detail=gone
            )
        is_over = not runner.is_there and runner.has_exit
        state = ObservedState.ALIVE if runner.is_there else ObservedState.EXITED if is_over else ObservedState.GONE
        return Observation(
            launch_id=folder.launch_id,
            node_id=folder.node_id,
            state=state,
            exit_code=runner.exit_code if is_over else None,
            cause=runner.cause if is_over else "",
            detail=runner.detail if not runner.is_there else "",
            ended_ns=runner.ended_ns + self.jump_ns if is_over else 0,
        )

    # ------------------------------------------------------------------ what runners hear

    def runners(self) -> Iterable[Runner]:
        """Those that are there, in the order in which they came."""
        return [one.runner for one in self.folders.values() if one.runner is not None and one.runner.is_there]

    def answered(self, runner: Runner, *, sent_ns: int, told: int, stop: bool, grace_ns: int) -> None:
        """A request of a runner, with the first ``told`` of its facts, was answered."""
        if not runner.is_there:
            return
        del runner.outbox[:told]
        runner.granted_ns = max(runner.granted_ns, sent_ns)
        runner.answered_ns = self._now()
        if stop:
            self._stop(runner, grace_ns, "stopped")
        self.advance()
        if runner.phase is Phase.LINGERING and not runner.outbox:
            runner.phase = Phase.GONE

    def fenced(self, runner: Runner) -> None:
        """A runner hears that the lease is another's: it leaves nothing running, and goes without a word."""
        self.advance()
        if runner.phase in (Phase.PREPARING, Phase.RUNNING):
            self._end(runner, self._now(), why="fenced", has_exit=False)
        runner.phase = Phase.GONE

    # ------------------------------------------------------------------ what happens to it

    def advance(self) -> None:
        """Let everything happen that is due by now."""
        now = self._now()
        while found := self._due():
            at, runner = min(found, key=lambda due: due[0])
            if at > now:
                return
            self._happen(runner, at)

    def next_ns(self) -> int:
        """When something happens here by itself; zero: never."""
        return min((at for at, _ in self._due()), default=0)

    def lose_worker(self, launch_id: LaunchId) -> None:
        """Kill a worker with its runner: nobody is told."""
        self.advance()
        folder = self.folders.get(launch_id)
        if folder is not None and folder.runner is not None and folder.runner.is_there:
            self._die(folder.runner, "its runner was killed")

    def turn_off(self) -> None:
        """Take the power away."""
        self.advance()
        self.is_on = False
        for runner in self.runners():
            self._die(runner, "its machine lost power")

    def turn_on(self) -> None:
        """Have it boot, with what is on its disk."""
        if not self.is_on:
            self.is_on = True
            self.node = replace(self.node, boot_id=f"{self.node.boot_id}+")

    def _due(self) -> list[tuple[int, Runner]]:
        if not self.folders:
            return []
        there = [one.runner for one in self.folders.values() if one.runner is not None and one.runner.is_there]
        return [(at, runner) for runner in there if (at := runner.next_ns())]

    def _happen(self, runner: Runner, at: int) -> None:
        if runner.phase is Phase.LINGERING:
            runner.phase = Phase.GONE
        elif runner.lease_ns and runner.granted_ns < 0 and at >= runner.began_ns + runner.lease_ns:
            self._fault(runner, at)
            self._end(runner, at, why="no answer for the length of the lease")
        elif runner.lease_ns and not runner.is_stopping and 0 <= runner.granted_ns < at - runner.lease_ns:
            self._fault(runner, at)
            self._stop(runner, runner.spec.grace_ns, "lease", at=at)
        elif runner.phase is Phase.PREPARING:
            self._start(runner, at)
        else:
            if runner.kill_ns and at >= runner.kill_ns and not (runner.end_ns and runner.end_ns <= at):
                runner.exit_code = KILLED
            self._end(
                runner, at, why=(runner.fault[1] if runner.fault else "stopped") if runner.is_stopping else "by itself"
            )

    def _fault(self, runner: Runner, _at: int) -> None:
        runner.fault = (Cause.NODE_LOST, "the control plane did not answer for the length of the lease")
        runner.exit_code = TERMINATED

    def _start(self, runner: Runner, at: int) -> None:
        fate = Fate.of(runner.spec)
        runner.phase = Phase.RUNNING
        runner.exit_code, runner.cause = fate.ending(runner.spec.fence)
        runner.end_ns = at + fate.runs_ns(runner.spec.rank)
        self.journal.write(at, "start", runner.spec, runner.boot_id)
        self._tell(runner, Started(at_ns=self._wall(at), launch_id=runner.spec.launch_id, fence=runner.spec.fence))

    def _stop(self, runner: Runner, grace_ns: int, detail: str, *, at: int = 0) -> None:
        """Signal it; a later stop may shorten the grace, and never makes it longer."""
        at = at or self._now()
        kill_ns = at + grace_ns
        if runner.is_stopping:
            runner.kill_ns = min(runner.kill_ns or kill_ns, kill_ns)
            return
        runner.is_stopping = True
        if runner.phase is Phase.PREPARING:
            runner.exit_code, runner.detail = TERMINATED, "stopped before it started"
            self._end(runner, at, why="stopped")
        elif runner.phase is Phase.RUNNING:
            takes_ns = Fate.of(runner.spec).stop_takes_s * SECOND_NS
            runner.exit_code, runner.cause, runner.detail = TERMINATED, Cause.NONE, detail
            runner.end_ns, runner.kill_ns = min(runner.end_ns, at + takes_ns), kill_ns

    def _end(self, runner: Runner, at: int, *, why: str, has_exit: bool = True) -> None:
        """Nothing of its worker is left; how it ended is written down and waits to be told."""
        if runner.phase is Phase.RUNNING:
            self.journal.write(at, "stop", runner.spec, runner.boot_id, why)
        runner.phase, runner.ended_ns, runner.has_exit = Phase.LINGERING, at, has_exit
        if runner.fault is not None:
            runner.cause, runner.detail = runner.fault
        if has_exit:
            self._tell(
                runner,
                Exited(
                    at_ns=self._wall(at),
                    launch_id=runner.spec.launch_id,
                    fence=runner.spec.fence,
                    exit_code=runner.exit_code,
                    cause=runner.cause,
                    detail=runner.detail,
                ),
            )

    def _die(self, runner: Runner, why: str) -> None:
        if runner.phase is Phase.RUNNING:
            self.journal.write(self._now(), "stop", runner.spec, runner.boot_id, why)
        runner.phase, runner.detail = Phase.GONE, why

    def _tell(self, runner: Runner, fact: Fact) -> None:
        runner.outbox.append(fact)

    def _wall(self, at: int = 0) -> int:
        return (at or self._now()) + self.jump_ns


class MachineEngine:
    """An engine over machines that it reaches, without a memory of its own. Keeps the contract of engines."""

    def __init__(self, machines: Iterable[Machine]) -> None:
        self._machines = {machine.node.id: machine for machine in machines}

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(name="machines", images=True, exec=True, places=True)

    def nodes(self) -> tuple[Node, ...]:
        return tuple(machine.node for machine in self._machines.values() if machine.is_on)

    def launch(self, spec: LaunchSpec) -> None:
        self._of(NodeId(spec.node_id)).launch(spec)

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        self._of(node_id).stop(launch_id, grace_ns)

    def observe(self) -> Sight:
        there = [machine for machine in self._machines.values() if machine.is_on]
        seen = tuple(one for machine in there for one in machine.observe())
        return Sight(nodes=frozenset(machine.node.id for machine in there), launches=seen)

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:
        self._of(node_id).forget(launch_id)

    def close(self) -> None:
        """Nothing: what runs goes on."""

    def _of(self, node_id: NodeId) -> Machine:
        machine = self._machines.get(node_id)
        if machine is None or not machine.is_on:
            raise EngineLost(f"{node_id} does not answer")
        return machine


CAPACITY: Final = ("cpu", "memory")


def capacity_of(node: Node) -> dict[str, int]:
    """What a machine has: milli-CPUs, bytes of memory, and each device in thousandths."""
    return {"cpu": node.cpu_milli, "memory": node.memory_bytes, **{device.id: MILLI for device in node.devices}}
