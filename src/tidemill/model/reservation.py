"""Nodes kept free for somebody, or for nobody, at a time that is known before."""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.model.ids import NodeId, ProjectId, ReservationId


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Whole nodes for one project from ``starts_ns`` until ``ends_ns``; for nobody (maintenance) without one.

    With ``every_ns`` the window comes again each such period, until ``until_ns`` (zero: for ever). Before a window
    opens only work that ends in time is placed on its nodes, or work that may be displaced; what is left there
    when it opens is stopped with its checkpoint grace and queues again. ``cancelled_ns`` zero: it stands.
    """

    id: ReservationId
    name: str
    version: int = 1
    project_id: ProjectId = ProjectId("")
    node_ids: tuple[NodeId, ...] = ()
    starts_ns: int
    ends_ns: int
    every_ns: int = 0
    until_ns: int = 0
    created_by: str = ""
    cancelled_ns: int = 0

    def __post_init__(self) -> None:
        if self.ends_ns <= self.starts_ns:
            raise ValueError("a reservation ends after it starts")
        if self.every_ns and self.every_ns < self.ends_ns - self.starts_ns:
            raise ValueError("a recurring window is shorter than its period")
        if not self.node_ids:
            raise ValueError("a reservation is for at least one node")

    def window(self, *, after: int) -> tuple[int, int] | None:
        """The first window, ``(from, to)`` in ns, that is not over at ``after``; None when none will come.

        >>> from tidemill.model.ids import NodeId
        >>> weekly = Reservation(
        ...     id=ReservationId("r"), name="w", node_ids=(NodeId("n"),), starts_ns=10, ends_ns=20, every_ns=100
        ... )
        >>> weekly.window(after=15), weekly.window(after=20), weekly.window(after=250)
        ((10, 20), (110, 120), (310, 320))
        """
        if self.cancelled_ns:
            return None
        rounds = 0
        if self.every_ns and after >= self.ends_ns:
            rounds = (after - self.ends_ns) // self.every_ns + 1
        start, end = self.starts_ns + rounds * self.every_ns, self.ends_ns + rounds * self.every_ns
        if after >= end or (self.until_ns and start >= self.until_ns):
            return None
        return start, end
