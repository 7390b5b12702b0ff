"""What lies between the control plane and its machines: engines whose calls go wrong, links, and outposts that dial in.

An outpost is the real ``outpost.link.Link`` over a channel that leads to the control plane of the simulation, and the
real mailbox at the other end; they are stepped, not started. What a message's fate is stands in its link's ``fates``:

==============  ======================================================================================
lost            it does not arrive
unanswered      it arrives and is acted upon, the answer does not come
late            it arrives a few steps later, when its sender has given up
twice           it arrives, and once more a few steps later
==============  ======================================================================================
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tests.faults.simulation.machines import Machine, MachineEngine
from tidemill.control.identity import Identity
from tidemill.errors import EngineLost, NotFound, TidemillError
from tidemill.model.fleet import Outpost
from tidemill.model.ids import LaunchId, NodeId, OrganizationId, PrincipalId
from tidemill.model.plan import LaunchSpec, Sight
from tidemill.model.tenant import Scope
from tidemill.outpost.link import Link
from tidemill.runner.client import Refused, Unreachable
from tidemill.wire.outposts import EngineAnswer, OutpostCalls, OutpostReport

if TYPE_CHECKING:
    from tests.faults.simulation.cloud import Control, SmallCloud

FATES: Final = ("lost", "unanswered", "late", "twice")
_CALLS: Final = msgspec.json.Encoder()
_REPORT: Final = msgspec.json.Decoder(OutpostReport)


@dataclass(slots=True)
class Wire:
    """One machine's way to the control plane."""

    fates: deque[str] = field(default_factory=deque)
    """Of its next messages; those after them are fine."""
    is_cut_out: bool = False
    """Nothing that the machine sends arrives."""
    is_cut_in: bool = False
    """No answer arrives at the machine."""
    holds: int = 0
    """For how many steps its outpost does not get round to what it was told."""
    dials_old: bool = False
    """It still dials the control plane that led before."""

    def heal(self) -> None:
        """Be as a wire should."""
        self.fates.clear()
        self.is_cut_out = self.is_cut_in = self.dials_old = False
        self.holds = 0

    def next_fate(self) -> str:
        """What becomes of the next message."""
        return self.fates.popleft() if self.fates else ""


class Gate:
    """An engine in the control plane's own process, whose calls can be lost, repeated, or the last thing that it did."""

    def __init__(self, engine: MachineEngine, cloud: SmallCloud, control: Control) -> None:
        self._engine = engine
        self._cloud = cloud
        self._control = control

    @property
    def capabilities(self) -> Any:
        return self._engine.capabilities

    def nodes(self) -> Any:
        return self._engine.nodes()

    def launch(self, spec: LaunchSpec) -> None:
        self._call(lambda: self._engine.launch(spec), f"launch {spec.launch_id}")

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        self._call(lambda: self._engine.stop(launch_id, node_id=node_id, grace_ns=grace_ns), f"stop {launch_id}")

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:
        self._call(lambda: self._engine.forget(launch_id, node_id=node_id), f"forget {launch_id}")

    def observe(self) -> Sight:
        seen: list[Sight] = []
        self._call(lambda: seen.append(self._engine.observe()), "observe")
        self._cloud.happen_meanwhile(self._control)
        return seen[0]

    def close(self) -> None:
        """Nothing."""

    def _call(self, do: Callable[[], None], what: str) -> None:
        self._control.seam(f"before {what}")
        mishaps = self._cloud.engine_mishaps
        fate = mishaps.popleft() if mishaps else ""
        if fate in ("lost", "late"):
            raise EngineLost(f"{what} did not arrive")
        do()
        if fate == "twice":
            with suppress(TidemillError):
                do()
        self._control.seam(f"after {what}")
        if fate == "unanswered":
            raise EngineLost("the reply was lost")


class Channel:
    """What a ``Link`` takes for its connection to the control plane."""

    def __init__(self, cloud: SmallCloud, outpost: Outpost, node_id: NodeId) -> None:
        self._cloud = cloud
        self._node_id = node_id
        self._outpost = outpost
        self._identity = Identity(
            principal_id=PrincipalId(outpost.id),
            organization_id=OrganizationId("o"),
            name=outpost.name,
            scopes=frozenset({Scope.OUTPOST}),
        )

    def copy(self) -> Channel:
        return self

    def open(self, _method: str, path: str, _body: bytes | None = None, **_: Any) -> _Content:
        after = int(path.partition("after=")[2].partition("&")[0])
        return _Content(self._exchange(lambda control: self._calls(control, after)))

    def call(self, _method: str, _path: str, body: bytes | None = None, **_: Any) -> dict[str, Any]:
        self._exchange(lambda control: self._report(control, body or b""))
        return {}

    def close(self) -> None:
        """Nothing."""

    def rest(self, _giving_up: object) -> None:
        """Nothing: whoever steps decides when the next try is."""

    def abort(self) -> None:
        """Nothing."""

    def _exchange(self, serve: Callable[[Control], bytes]) -> bytes:
        cloud, wire = self._cloud, self._cloud.wires[self._node_id]
        fate = wire.next_fate()
        control = cloud.dialled(wire)
        if wire.is_cut_out or fate == "lost" or control is None:
            raise Unreachable("it does not arrive")
        if fate == "late":
            cloud.later(lambda: _harmless(serve, control))
            raise Unreachable("no answer in time")
        answer = self._served(serve, control)
        if fate == "twice":
            cloud.later(lambda: _harmless(serve, control))
        if wire.is_cut_in or fate == "unanswered":
            raise Unreachable("no answer")
        return answer

    @staticmethod
    def _served(serve: Callable[[Control], bytes], control: Control) -> bytes:
        try:
            return serve(control)
        except NotFound as error:
            raise Refused(404, {"code": error.code}) from error
        except TidemillError as error:
            raise Unreachable(str(error)) from error

    def _calls(self, control: Control, after: int) -> bytes:
        """As ``GET /v1/outposts/self/calls`` answers when nobody waits."""
        sites = control.plane.sites
        box = sites.box(self._identity)
        box.asked_s = self._cloud.now / 1e9
        control.check_leads()
        return _CALLS.encode(OutpostCalls(session=sites.session, epoch=sites.epoch, calls=box._after(after)))

    def _report(self, control: Control, body: bytes) -> bytes:
        """As ``POST /v1/outposts/self/report`` does; nobody here waits for facts to be stored."""
        sites = control.plane.sites
        box = sites.box(self._identity)
        control.check_leads()
        report = _REPORT.decode(body)
        if report.session == sites.session:
            box.answer(report.answers)
        facts = sites.facts_of(box.outpost, report)
        if facts:
            control.plane.tell(facts)
        return b"{}"


def _harmless(serve: Callable[[Control], bytes], control: Control) -> None:
    if control.is_up:
        with suppress(TidemillError):
            serve(control)


@dataclass(slots=True)
class _Content:
    content: bytes

    def read(self) -> bytes:
        return self.content


class SteppedOutpost:
    """An outpost of one machine: its process, and where it dials."""

    def __init__(self, cloud: SmallCloud, outpost: Outpost, machine: Machine) -> None:
        self.machine = machine
        self.outpost = outpost
        self._cloud = cloud
        self._engine = MachineEngine([machine])
        self.restart()

    def restart(self) -> None:
        """Its process begins anew: what it had been told and did not do is not done."""
        channel: Any = Channel(self._cloud, self.outpost, self.machine.node.id)
        self.link = Link(self._engine, channel, api_url="http://control")

    def step(self) -> None:
        """Fetch what there is to do, do it unless it is held up, and post the answers."""
        wire = self._cloud.wires[self.machine.node.id]
        if not self.machine.is_on:
            return
        with suppress(Unreachable):
            self.link._fetch()
        if wire.holds:
            wire.holds -= 1
            return
        for lane in self.link._lanes:
            if not lane.empty():
                lane.put(None)
                self.link._work(lane)
        answers = list(self.link._answers)
        if answers:
            with suppress(Unreachable):
                self.link._post(answers, [])
                del self.link._answers[: len(answers)]


def wait_by_stepping(cloud: SmallCloud, control: Control) -> Callable[[Future[EngineAnswer], float], EngineAnswer]:
    """How a control plane waits for an outpost's answer: the outposts are stepped, and what else happens meanwhile."""

    def wait(answer: Future[EngineAnswer], _within_s: float) -> EngineAnswer:
        control.seam("while an outpost is asked")
        for _ in range(2):
            if answer.done():
                break
            boxes = {key: box for engine in control.plane.sites._engines.values() for key, box in engine.boxes.items()}
            for outpost in cloud.outposts:
                if (box := boxes.get(outpost.outpost.id)) is not None and box._waiting:
                    outpost.step()
        control.seam("after an outpost was asked")
        if not answer.done():
            raise TimeoutError
        return answer.result(0)

    return wait
