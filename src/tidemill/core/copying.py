"""③ What the data of a job takes to be brought to each site, as a value that the choice of a site looks at.

Whoever knows where data is and how fast it goes fills ``World.copies``; a line's ``data`` is the key, so that jobs
which need different data are not taken for interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tidemill.core.transfers import EGRESS, Need, Transfer, have_all, need_of, needs_of, transfer, way
from tidemill.model.fleet import Node
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


def data_key(spec: WorkloadSpec) -> tuple[str, ...]:
    """What tells jobs apart that need different data; empty when they need none."""
    return tuple(need.written() for need in needs_of(spec)) if spec.data else ()


def copies_of(world: World, line: Line) -> Copies:
    """What the data of a job of the line takes to be brought to each site."""
    if not line.data:
        return NOTHING
    filled = world.copies.get(line.data)
    if filled is not None:
        return filled
    key = ("copies", line.data, line.gang.workers, line.project_id)
    known: tuple[int, Copies] | None = world.fleet.cache.get(key)
    if known is None or known[0] != world.copies_changed:
        known = world.fleet.cache[key] = (world.copies_changed, _worked_out(world, line))
    return known[1]


def has_data(world: World, line: Line) -> NDArray[np.bool_] | None:
    """Which nodes have all data of a job of the line, and copy nothing. Shape (N,); None when it needs none."""
    if not line.data or line.data in world.copies:
        return None
    return have_all([need_of(one) for one in line.data], world.fleet.nodes, world.cached, line.project_id)


def copying_onto(world: World, line: Line, nodes: Sequence[Node]) -> Transfer:
    """What a job of the line copies when its workers are put on these nodes, each once; sites copy side by side."""
    has = has_data(world, line)
    if has is None:
        return Transfer()
    row = world.fleet.row
    lacking = [node for node in nodes if node.id in row and not has[row[node.id]]]
    parts = [
        _transfer(world, line, site_id, sum(node.site_id == site_id for node in lacking), lambda _: False)
        for site_id in sorted({node.site_id for node in lacking})
    ]
    return Transfer(
        size=sum(part.size for part in parts),
        time_ns=max((part.time_ns for part in parts), default=0),
        cost_micro=sum(part.cost_micro for part in parts),
    )


def copying_anywhere(world: World, line: Line) -> Transfer:
    """What a job of the line copies at the site where that takes least time; its size is of all that it needs."""
    copies = copies_of(world, line)
    sites = [copies.get(site_id, Copying()) for site_id in world.fleet.site_ids]
    best = min(
        (one for one in sites if not one.refused), key=lambda one: (one.copy_ns, one.cost_micro), default=Copying()
    )
    size = sum(need_of(one).size for one in line.data) * line.gang.workers if best.copy_ns else 0
    return Transfer(size=size, time_ns=best.copy_ns, cost_micro=best.cost_micro)


def _worked_out(world: World, line: Line) -> Copies:
    found: dict[SiteId, Copying] = {}
    for site_id in world.fleet.site_ids:
        here = [node for node in world.fleet.nodes if node.site_id == site_id]

        def is_cached(need: Need, here: Sequence[Node] = here) -> bool:
            return bool(have_all([need], here, world.cached, line.project_id).any())

        needed = _transfer(world, line, site_id, line.gang.workers, is_cached)
        if needed.time_ns or needed.cost_micro:
            found[site_id] = Copying(copy_ns=needed.time_ns, cost_micro=needed.cost_micro)
    return found


def _transfer(world: World, line: Line, site_id: SiteId, machines: int, is_cached: Callable[[Need], bool]) -> Transfer:
    def egress_micro(home: SiteId) -> int:
        prices = world.prices_at(home) if home in world.sites else world.rates.by_resource()
        return prices.get(EGRESS, 0)

    return transfer(
        [need_of(one) for one in line.data],
        site_id,
        machines=machines,
        is_cached=is_cached,
        link=partial(way, world.sites, site=site_id),
        egress_micro=egress_micro,
    )
