"""Control planes that share a database: one leads, the others stand by."""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.model.ids import ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One of the control planes of an installation, as the database knows it.

    ``api_url`` is where the others and the machines reach it. ``beats`` grows as long as it lives; ``quiet_ms`` is how
    long ago it did last, by the database's clock. ``leads`` is whether the newest epoch is its.
    """

    id: ReplicaId
    api_url: str
    beats: int
    quiet_ms: int
    leads: bool
