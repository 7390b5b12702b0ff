"""Who was heard of when, and what follows: a node falls silent, and later, perhaps, is known to run nothing any more.

Not being reached is no failure. A node that is silent keeps what it has, and nothing of it is started elsewhere
until that is known to be over: when its site gives leases, a worker that had no answer from the control plane for the
lease ends itself, within its grace. Its clock began when it *asked*, ours when we *answered*, so ours is the later one;
``MARGIN`` is for clocks that run at different speed. All times here are of a clock that never jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from tidemill.model.events import Fact, NodeFellSilent, NodeWentAway
from tidemill.model.fleet import Node, NodeState, Site
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.job import Allocation
from tidemill.units import SECOND_NS

SILENT_AFTER_NS: Final = 20 * SECOND_NS
MARGIN_NS: Final = 10 * SECOND_NS
DRIFT: Final = 50
"""Clocks are taken to differ by at most one part in this many."""


class Leases:
    """What was heard, since this object was made: before that nothing is known, so everything counts from then.

    ``clock`` gives ns of a clock that never jumps. Thread-safe as far as single dictionary operations are.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._began_ns = clock()
        self._nodes: dict[NodeId, int] = {}
        self._launches: dict[LaunchId, int] = {}

    def heard(self, nodes: Iterable[NodeId]) -> None:
        """These nodes answered just now."""
        now = self._clock()
        for node in nodes:
            self._nodes[node] = now

    def answered(self, launch: LaunchId) -> None:
        """The runner of a launch is about to get an answer: its lease runs anew."""
        self._launches[launch] = self._clock()

    def keep(self, held: Mapping[LaunchId, Allocation]) -> None:
        """Forget the launches that are over."""
        for launch in [launch for launch in self._launches.copy() if launch not in held]:
            self._launches.pop(launch, None)

    def quiet_ns(self, node: NodeId) -> int:
        """For how long nothing was heard of a node."""
        return self._clock() - self._nodes.get(node, self._began_ns)

    def overdue(
        self,
        nodes: Iterable[Node],
        sites: Mapping[SiteId, Site],
        held: Mapping[LaunchId, Allocation],
        grace: Callable[[Allocation], int],
        *,
        now: int,
    ) -> list[Fact]:
        """The facts that follow from silence at ``now``, a wall-clock time for the facts. ``grace`` is in ns."""
        by_node: dict[NodeId, list[Allocation]] = {}
        for worker in held.values():
            by_node.setdefault(worker.node_id, []).append(worker)
        facts: list[Fact] = []
        for node in nodes:
            quiet = self.quiet_ns(node.id)
            if node.state is NodeState.LOST or quiet <= SILENT_AFTER_NS:
                continue
            if node.state is not NodeState.SILENT:
                detail = f"nothing was heard of it for {quiet // SECOND_NS} s"
                facts.append(NodeFellSilent(at_ns=now, node_id=node.id, detail=detail))
            elif self._is_over(node, sites[node.site_id].lease_ns, by_node.get(node.id, ()), grace):
                detail = f"nothing was heard of it for {quiet // SECOND_NS} s, and the leases of its workers are over"
                facts.append(NodeWentAway(at_ns=now, node_id=node.id, detail=detail))
        return facts

    def _is_over(
        self, node: Node, lease_ns: int, workers: Iterable[Allocation], grace: Callable[[Allocation], int]
    ) -> bool:
        """Whether everything on a node has ended itself by now, if it was there at all."""
        if not lease_ns:
            return False
        needs_ns = lease_ns + max((grace(worker) for worker in workers), default=0)
        last = max(
            self._nodes.get(node.id, self._began_ns),
            *(self._launches.get(worker.id, self._began_ns) for worker in workers),
            self._began_ns,
        )
        return self._clock() - last > needs_ns + needs_ns // DRIFT + MARGIN_NS
