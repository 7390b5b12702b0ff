"""What the control plane and an outpost say to each other, as values that are sent as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tidemill.errors import Conflict, EngineLost, EngineRefused, TidemillError
from tidemill.model.events import DeviceFailed, DeviceRecovered, Fact, NodeMarked, Sampled
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

    ``interrupted`` are drains of its own machines, which their cloud is about to take back. ``offer`` is what machines
    need to know that join the cluster which it heads.
    """

    session: str = ""
    answers: tuple[EngineAnswer, ...] = ()
    sampled: tuple[Sampled, ...] = ()
    failed: tuple[DeviceFailed, ...] = ()
    recovered: tuple[DeviceRecovered, ...] = ()
    interrupted: tuple[NodeMarked, ...] = ()
    offer: tuple[tuple[str, str], ...] = ()


def report_of(facts: Iterable[Fact]) -> OutpostReport:
    """A report of nothing but those facts; of kinds that an outpost has nothing to say of, none."""
    facts = tuple(facts)
    return OutpostReport(
        sampled=tuple(fact for fact in facts if isinstance(fact, Sampled)),
        failed=tuple(fact for fact in facts if isinstance(fact, DeviceFailed)),
        recovered=tuple(fact for fact in facts if isinstance(fact, DeviceRecovered)),
        interrupted=tuple(fact for fact in facts if isinstance(fact, NodeMarked)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutpostCalls:
    """What an outpost fetches: calls that are not answered yet, oldest first. Numbers begin anew in each session.

    ``epoch`` is the control plane's, and ``replicas`` is where it and those that may lead next are reached.
    """

    session: str
    epoch: int = 0
    replicas: tuple[str, ...] = ()
    calls: tuple[EngineCall, ...] = ()
