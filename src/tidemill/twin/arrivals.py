"""What happens whatever is decided: work that arrives, and everything else from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import Struct

from tidemill.model.events import Fact
from tidemill.model.spec import WorkloadSpec


class Arrival(Struct, frozen=True, gc=False):
    """A workload at the door. Times in ns, ``at_ns`` since the run began.

    ``duration_ns`` is how long each of its jobs truly runs with all its workers, at the speed of its first choice;
    only the simulated machines know it. A job that is stopped keeps what it did until its last checkpoint: one every
    ``checkpoint_ns`` (zero: none), and with ``saves_on_stop`` one within its grace when it is told to stop.
    ``tenant`` is a project's id. ``name`` is the workload's id where it has one already, as in a recording;
    ``durations_ns`` are then those of its jobs by index.
    """

    at_ns: int
    tenant: str
    user: str
    spec: WorkloadSpec
    duration_ns: int
    checkpoint_ns: int = 0
    saves_on_stop: bool = True
    start_ns: int = 0
    """How long its first start takes before it works, beside the delay that all launches have."""
    restart_ns: int = 0
    """How long each later start takes."""
    name: str = ""
    durations_ns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outside:
    """Anything else that comes from outside: a machine that is lost, a user's stop, a queue that is set."""

    at_ns: int
    fact: Fact


Stream = Iterator[Arrival | Outside]
"""By time."""
