"""③ What the data of a job takes to be brought to each site, as a value that the choice of a site looks at.

Whoever knows where data is and how fast it goes fills ``World.copies``; a line's ``data`` is the key, so that jobs
which need different data are not taken for interchangeable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tidemill.model.ids import SiteId
from tidemill.model.spec import WorkloadSpec

if TYPE_CHECKING:
    from tidemill.core.queueing import Line
    from tidemill.core.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """How long a job's data takes to be there, what that costs, and why it may not come there at all.

    ``copy_ns`` zero: all of it is there. ``refused`` not empty: the job is not put there, and this sentence says why.
    """

    copy_ns: int = 0
    cost_micro: int = 0
    refused: str = ""

    def __post_init__(self) -> None:
        if self.copy_ns < 0 or self.cost_micro < 0:
            raise ValueError("copying takes and costs zero or more")


Copies = Mapping[SiteId, Copying]
"""By site; a site that is not in it has all that is needed."""
NOTHING: Final[Copies] = {}


def data_key(_spec: WorkloadSpec) -> tuple[str, ...]:
    """What tells jobs apart that need different data; empty when they need none."""
    return ()


def copies_of(world: World, line: Line) -> Copies:
    """What the data of a job of the line takes to be brought to each site."""
    return world.copies.get(line.data, NOTHING) if line.data else NOTHING
