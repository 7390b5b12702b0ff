"""What the control plane and an outpost say to each other, as values that are sent as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tidemill.errors import Conflict, EngineLost, EngineRefused, InvalidRequest, TidemillError
from tidemill.model.events import Brought, DeviceFailed, DeviceRecovered, NodeMarked, Sampled
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.plan import LaunchSpec, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCall:
    """One call of an engine's method: ``launch`` has a spec, ``stop`` and ``forget`` the rest, the others nothing.

    ``read`` is the one that is no engine's: ``size`` octets of the file ``path`` of the outpost's machine.
    """

    number: int
    method: str
    spec: LaunchSpec | None = None
    launch_id: LaunchId = LaunchId("")
    node_id: NodeId = NodeId("")
    grace_ns: int = 0
    path: str = ""
    offset: int = 0
    size: int = 0
    replicas: tuple[str, ...] = ()
    """Where all control planes answer, told by a cluster's head to its machines with every call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAnswer:
    """What came of a call. ``outcome`` is ``done``, or the code of the error that the method raised.

    ``nodes`` answers ``nodes``; ``seen``, ``looked_at`` and ``cached`` answer ``observe``, ``content`` answers
    ``read``.
    """

    number: int
    outcome: str = "done"
    detail: str = ""
    field: str = ""
    mend: str = ""
    nodes: tuple[Node, ...] = ()
    seen: tuple[Observation, ...] = ()
    looked_at: tuple[NodeId, ...] = ()
    cached: tuple[tuple[NodeId, tuple[str, ...]], ...] = ()
    content: bytes = b""


def raise_for(answer: EngineAnswer) -> None:
    """Nothing, when it was done. Raises: EngineRefused, EngineLost or Conflict, as the engine did."""
    if answer.outcome != "done":
        raise _ERRORS.get(answer.outcome, EngineLost)(answer.detail, field=answer.field, mend=answer.mend)


_ERRORS: Final[dict[str, type[TidemillError]]] = {kind.code: kind for kind in (EngineRefused, EngineLost, Conflict)}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutpostReport:
    """What an outpost posts: answers to calls of one session, and facts about its machines.

    ``interrupted`` are drains of its own machines, which their cloud is about to take back. ``numbers`` are those of
    the facts, in the order of the fields; without any, each is taken whenever it comes. ``offer`` is what machines need
    to know that join the cluster which it heads.
    """

    session: str = ""
    answers: tuple[EngineAnswer, ...] = ()
    sampled: tuple[Sampled, ...] = ()
    failed: tuple[DeviceFailed, ...] = ()
    recovered: tuple[DeviceRecovered, ...] = ()
    interrupted: tuple[NodeMarked, ...] = ()
    numbers: tuple[int, ...] = ()
    offer: tuple[tuple[str, str], ...] = ()


def report_of(facts: Iterable[Brought], numbers: Iterable[int] = ()) -> OutpostReport:
    """A report of nothing but those facts, with their numbers if they have any."""
    facts, numbers = tuple(facts), tuple(numbers)
    places = [[at for at, fact in enumerate(facts) if isinstance(fact, kind)] for kind in _KINDS]
    return OutpostReport(
        sampled=tuple(fact for fact in facts if isinstance(fact, Sampled)),
        failed=tuple(fact for fact in facts if isinstance(fact, DeviceFailed)),
        recovered=tuple(fact for fact in facts if isinstance(fact, DeviceRecovered)),
        interrupted=tuple(fact for fact in facts if isinstance(fact, NodeMarked)),
        numbers=tuple(numbers[at] for found in places for at in found) if numbers else (),
    )


_KINDS: Final = (Sampled, DeviceFailed, DeviceRecovered, NodeMarked)


def facts_in(report: OutpostReport) -> tuple[Brought, ...]:
    """The facts of a report, in the order of its numbers.

    Raises: InvalidRequest when there are numbers, and not one for each.
    """
    facts: tuple[Brought, ...] = (*report.sampled, *report.failed, *report.recovered, *report.interrupted)
    if report.numbers and len(report.numbers) != len(facts):
        detail = f"There are {len(facts)} facts and {len(report.numbers)} numbers."
        raise InvalidRequest(detail, field="numbers", mend="Give each fact a number, or none.")
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTaken:
    """The answer to a report: up to which number the outpost's facts were taken. Zero: it has no numbers."""

    taken: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutpostCalls:
    """What an outpost fetches: calls that are not answered yet, oldest first. Numbers begin anew in each session.

    ``epoch`` is the control plane's, and ``replicas`` is where it and those that may lead next are reached.
    """

    session: str
    epoch: int = 0
    replicas: tuple[str, ...] = ()
    calls: tuple[EngineCall, ...] = ()
