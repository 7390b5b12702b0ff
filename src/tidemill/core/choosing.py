"""③ At which site: of those that may have a job, in which order they are tried.

What counts is how soon it can begin there, what it costs, what carbon it causes and how far that is from where it is
wanted. With nothing said the soonest is best, then the cheapest, then the cleanest; one thing that weighs goes before
these, and of several each counts with its part, as a share of the worst. Sites that are equally good are one pool, in
which the placement policy chooses freely; so a cloud of one site, or of sites that do not differ, is placed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tidemill.core.copying import copies_of, has_data
from tidemill.core.feasible import Shape, fitting
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Masks
from tidemill.core.rating import amount_micro, carbon_over, electricity_micro
from tidemill.model.fleet import Level, Site, link_between
from tidemill.model.ids import SiteId
from tidemill.model.ledger import CPU_METER
from tidemill.model.policy import Policy
from tidemill.model.spec import Weight
from tidemill.units import HOUR_NS, MILLI, SECOND_NS

if TYPE_CHECKING:
    from tidemill.core.queueing import Line
    from tidemill.core.world import World

FAR_NS: Final = 1 << 62
"""How far a site is to which no link is known."""
_USUAL: Final = (Weight.START, Weight.PRICE, Weight.CARBON)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A site that may have a job, and how it would be there: all of its workers, from beginning to end.

    ``start_ns`` is how long until it can begin, the copying of its data included.
    """

    site_id: SiteId
    start_ns: int = 0
    price_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0
    latency_ns: int = FAR_NS


def in_order(
    candidates: Iterable[Candidate], weigh: Sequence[tuple[Weight, int]] = ()
) -> tuple[tuple[SiteId, ...], ...]:
    """The sites, best first; those that are equally good are together, by id.

    >>> near, far = Candidate(site_id=SiteId("a"), price_micro=3), Candidate(site_id=SiteId("b"), price_micro=2)
    >>> in_order([near, far], [(Weight.PRICE, 1)])
    (('b',), ('a',))
    """
    known = list(candidates)
    worst = {
        what: max((_value(one, what) for one in known if _value(one, what) < FAR_NS), default=0) for what in Weight
    }
    pools: dict[tuple[int, ...], list[SiteId]] = {}
    for one in known:
        pools.setdefault(_rank(one, weigh, worst), []).append(one.site_id)
    return tuple(tuple(sorted(pools[rank])) for rank in sorted(pools))


def _rank(one: Candidate, weigh: Sequence[tuple[Weight, int]], worst: dict[Weight, int]) -> tuple[int, ...]:
    usual = tuple(_value(one, what) for what in _USUAL)
    if not weigh:
        return usual
    if len(weigh) == 1:  # exactly, not as a share
        return (_value(one, weigh[0][0]), *usual)
    return (sum(part * _share(_value(one, what), worst[what]) for what, part in weigh), *usual)


def _share(value: int, worst: int) -> int:
    """How bad a value is in thousandths of the worst that is known; one that is not known is twice as bad as that."""
    if value >= FAR_NS:
        return 2 * MILLI
    return value * MILLI // worst if worst else 0


def _value(one: Candidate, what: Weight) -> int:
    match what:
        case Weight.START:
            return one.start_ns
        case Weight.PRICE:
            return one.price_micro
        case Weight.CARBON:
            return one.carbon_mg
        case _:
            return one.latency_ns


def preferred(world: World, line: Line, *, now: int, policy: Policy) -> Callable[[Shape], Masks] | None:
    """For each shape, the pools of nodes to try one after the other; None where there is nothing to choose.

    A pool is a mask of shape (N,), or None for all nodes.
    """
    fleet = world.fleet
    if len(fleet.site_ids) < 2 and not line.data:
        return None

    def pools(shape: Shape) -> Masks:
        hours = now // HOUR_NS if any(site.carbon_hours for site in fleet.sites.values()) else 0
        stamp = (hours, world.copies_changed)
        key = ("sites", shape, line.gang.workers, line.duration_ns, line.weigh, line.near, line.data)
        known: tuple[tuple[int, int], Masks] | None = fleet.cache.get(key)
        if known is None or known[0] != stamp:
            found = candidates(world, line, shape, now=now, policy=policy)
            masks = _masks(fleet, in_order(found, weights_of(line)))
            known = fleet.cache[key] = (stamp, _with_data_first(masks, has_data(world, line)))
        return known[1]

    return pools


def weights_of(line: Line) -> tuple[tuple[Weight, int], ...]:
    """What weighs for a line; latency for one that says only where it wants to be."""
    return line.weigh or (((Weight.LATENCY, 1),) if line.near else ())


def _masks(fleet: FleetArrays, order: Sequence[Sequence[SiteId]]) -> Masks:
    if len(order) < 2:
        return (None,)
    return tuple(rows_at(fleet, sites) for sites in order)


def _with_data_first(masks: Masks, has: NDArray[np.bool_] | None) -> Masks:
    """Of each pool the nodes that have the data before all of it, where that is a difference."""
    if has is None or has.all() or not has.any():
        return masks
    found: list[NDArray[np.bool_] | None] = []
    for mask in masks:
        first = has if mask is None else has & mask
        found += [first, mask] if first.any() else [mask]
    return tuple(found)


def rows_at(fleet: FleetArrays, sites: Iterable[SiteId]) -> NDArray[np.bool_]:
    """Which nodes are at one of these sites. Shape (N,)."""
    number = {site: at for at, site in enumerate(fleet.site_ids)}
    mask: NDArray[np.bool_] = np.isin(fleet.domains(Level.SITE), [number[site] for site in sites if site in number])
    return mask


def candidates(
    world: World, line: Line, shape: Shape, *, now: int, policy: Policy, workers: int = 0, lasts_ns: int = 0
) -> tuple[Candidate, ...]:
    """The sites with nodes that may serve a shape, by id, and how a gang of the line would be there from ``now`` on.

    Sites where the gang's data may not be are left out. ``workers`` instead of as many as the gang has, ``lasts_ns``
    instead of as long as it may take.
    """
    fleet = world.fleet
    allowed = fitting(fleet, shape).nodes
    copies = copies_of(world, line)
    lasts = lasts_ns or line.duration_ns or policy.assumed_duration_ns
    found = []
    for site_id in fleet.site_ids:
        at = rows_at(fleet, (site_id,)) & allowed
        site = fleet.sites.get(site_id)
        copying = copies.get(site_id)
        if site is None or not at.any() or (copying is not None and copying.refused):
            continue
        delay = copying.copy_ns if copying is not None else 0
        price, energy = _cost(world, shape, site, at, (workers or line.gang.workers), delay + lasts)
        found.append(
            Candidate(
                site_id=site_id,
                start_ns=delay,
                price_micro=price + (copying.cost_micro if copying is not None else 0),
                energy_mj=energy,
                carbon_mg=carbon_over(energy, site, now, now + delay + lasts),
                latency_ns=_latency(world, site_id, line.near),
            )
        )
    return tuple(found)


def _latency(world: World, site_id: SiteId, near: str) -> int:
    if not near or site_id == near:
        return 0
    link = link_between(world.sites, site_id, SiteId(near))
    return link.latency_ns if link is not None else FAR_NS


def _cost(
    world: World, shape: Shape, site: Site, rows: NDArray[np.bool_], workers: int, lasts_ns: int
) -> tuple[int, int]:
    """What so many workers cost at a site for so long at most, in micro-USD, and what energy they take, in mJ."""
    fleet, prices, resources = world.fleet, world.prices_at(site.id), shape.resources
    power = power_of(fleet)
    milli, mw = resources.cpu_milli, power.get((site.id, CPU_METER), 0)
    amount = 0 if resources.gpus is not None else amount_micro(prices.get(CPU_METER, 0), milli, 0, lasts_ns)
    energy = mw * milli * lasts_ns // (MILLI * SECOND_NS)
    if resources.gpus is not None:
        static = fitting(fleet, shape)
        there = static.devices & rows[:, None]
        dearest, most = 0, 0
        for model in np.unique(fleet.model[there]).tolist():
            name = fleet.models[model]
            share = int(static.milli[there & (fleet.model == model)].max()) * resources.gpus.count
            dearest = max(dearest, amount_micro(prices.get(name, 0), share, 0, lasts_ns))
            most = max(most, power.get((site.id, name), 0) * share * lasts_ns // (MILLI * SECOND_NS))
        amount, energy = amount + dearest, energy + most
    energy = energy * workers * site.pue_milli // MILLI
    return amount * workers + electricity_micro(energy, site), energy


def power_of(fleet: FleetArrays) -> dict[tuple[SiteId, str], int]:
    """How many milliwatts a unit of each device model, and of ``cpu``, takes at each site when it is busy, at most."""
    known: dict[tuple[SiteId, str], int] | None = fleet.cache.get("power")
    if known is None:
        known = fleet.cache["power"] = {}
        for node in fleet.nodes:
            for name, mw in ((CPU_METER, node.cpu_busy_mw), *((one.model, one.busy_mw) for one in node.devices)):
                key = (node.site_id, name)
                known[key] = max(known.get(key, 0), mw)
    return known
