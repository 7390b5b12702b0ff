"""The quota tree: organization, departments, projects; what each is guaranteed, its limit and its weight.

Amounts are per *resource class*: ``gpu`` (any GPU), ``gpu:H100`` (every model that answers to that name), ``cpu``
and ``memory``. Units: milli-GPU, milli-CPU, bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tidemill.model.ids import ProjectId, QueueId
from tidemill.units import MILLI

Amounts = tuple[tuple[str, int], ...]
"""``(resource class, amount)`` pairs, by class, without repeats."""

CPU: Final = "cpu"
MEMORY: Final = "memory"
GPU: Final = "gpu"
_CLASS: Final = re.compile(r"cpu|memory|gpu(:[A-Za-z0-9][A-Za-z0-9 ._-]*)?")
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A place in the quota tree. ``parent_id`` empty: directly under the root, which is the whole fleet.

    Only a leaf has a ``project_id``. ``guaranteed`` can be reclaimed from those who borrowed it; ``limit`` is never
    exceeded, and a class that it leaves out has none. ``weight_milli`` decides how siblings share what is not
    guaranteed. ``max_running`` and ``max_queued`` count jobs; zero means no cap.
    """

    id: QueueId
    name: str
    version: int = 1
    parent_id: QueueId = QueueId("")
    project_id: ProjectId = ProjectId("")
    weight_milli: int = MILLI
    guaranteed: Amounts = ()
    limit: Amounts = ()
    max_running: int = 0
    max_queued: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"queue name {self.name!r} needs to be 1 to 63 letters, digits, - _ or .")
        if self.weight_milli <= 0:
            raise ValueError("a weight is above zero; leave the queue out, or limit it, to give it nothing")
        if self.parent_id == self.id:
            raise ValueError(f"queue {self.name} cannot be its own parent")
        for what, amounts in (("guaranteed", self.guaranteed), ("limit", self.limit)):
            names = [name for name, _ in amounts]
            if len(set(names)) != len(names):
                raise ValueError(f"{what} names a resource class twice")
            for name, amount in amounts:
                if not _CLASS.fullmatch(name):
                    raise ValueError(f"{what}: {name!r} is not a resource class; use gpu, gpu:MODEL, cpu or memory")
                if amount < 0:
                    raise ValueError(f"{what}: an amount is zero or more")
        limits = dict(self.limit)
        for name, amount in self.guaranteed:
            if name in limits and amount > limits[name]:
                raise ValueError(f"{name}: more is guaranteed than the limit allows")
        if self.max_running < 0 or self.max_queued < 0:
            raise ValueError("a cap on jobs is zero (no cap) or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueUsage:
    """How much one user of a project took lately, so that fair share outlives a restart.

    ``taken`` are exponentially weighted averages of what was held, per device model (or ``cpu``, ``memory``), in
    milli-GPU, milli-CPU and bytes, as they stood at ``at_ns``.
    """

    id: str
    """``project/principal``."""
    version: int
    at_ns: int
    taken: tuple[tuple[str, float], ...] = ()
