"""How a job would be at each site: what it costs there, and why it is not put there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tidemill.core.admission import described, site_name, why_never_gang, why_not_now
from tidemill.core.choosing import FAR_NS, Candidate, candidates, in_order, rows_at, weights_of
from tidemill.core.copying import Copying, copies_of
from tidemill.core.facts import has_left
from tidemill.core.feasible import fitting, is_within
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import fits
from tidemill.core.queueing import Line
from tidemill.core.reserve import nodes_open_to
from tidemill.core.world import World
from tidemill.model.fleet import Level, NodeState, Site
from tidemill.model.plan import Reason, ResolvableBy, SiteOption
from tidemill.model.policy import Policy
from tidemill.model.spec import Territory, WorkloadSpec

_CUT_OFF = (NodeState.SILENT, NodeState.LOST)


def site_options(
    world: World, line: Line, *, now: int, policy: Policy, lasts_ns: int = 0, jobs: int = 1
) -> tuple[SiteOption, ...]:
    """Every site with how so many jobs of a line would be there, in the order in which they are tried.

    Sites that it is never put at come last, by name. None at all where there is one site only.
    """
    if len(world.sites) < 2:
        return ()
    gang = line.gang
    workers = gang.workers * jobs
    known = {
        one.site_id: one
        for shape in reversed(gang.choices)
        for one in candidates(world, line, shape, now=now, policy=policy, workers=workers, lasts_ns=lasts_ns)
    }
    order = in_order(known.values(), weights_of(line))
    rank = {site: number for number, pool in enumerate(order, 1) for site in pool}
    copies = copies_of(world, line)
    found = [
        _option(site, known.get(site.id), rank.get(site.id, 0), reason, copies.get(site.id, Copying()), now)
        for site, reason in _reasons(world, line, now=now, policy=policy)
    ]
    return tuple(sorted(found, key=lambda one: (not one.rank, one.rank, one.site)))


def sites_open_to(world: World, line: Line) -> tuple[str, ...]:
    """The names of the sites with machines that may serve a line, free or not; none where there is one site only."""
    fleet = world.fleet
    if len(fleet.site_ids) < 2:
        return ()
    allowed = np.logical_or.reduce([fitting(fleet, shape).nodes for shape in line.gang.choices])
    numbers = np.unique(fleet.domains(Level.SITE)[allowed]).tolist()
    return tuple(sorted(site_name(fleet, fleet.site_ids[number]) for number in numbers))


def at_site(spec: WorkloadSpec, site: str) -> WorkloadSpec:
    """The spec, narrowed to one site."""
    return replace(spec, placement=replace(spec.placement, where=Territory((site,)), across_sites=False))


def _option(
    site: Site, candidate: Candidate | None, rank: int, reason: Reason | None, copying: Copying, now: int
) -> SiteOption:
    is_never = reason is not None and reason.resolvable_by is not ResolvableBy.TIME
    if candidate is None or is_never:
        return SiteOption(site=site.name, reason=reason)
    return SiteOption(
        site=site.name,
        rank=rank,
        reason=reason,
        starts_ns=0 if reason is not None else now + candidate.start_ns,
        copy_ns=copying.copy_ns,
        amount_micro=candidate.price_micro,
        energy_mj=candidate.energy_mj,
        carbon_mg=candidate.carbon_mg,
        latency_ns=candidate.latency_ns if candidate.latency_ns < FAR_NS else None,
    )


def _reasons(world: World, line: Line, *, now: int, policy: Policy) -> Iterator[tuple[Site, Reason | None]]:
    """Each site, and why a job of the line is not put there now."""
    fleet, gang, copies = world.fleet, line.gang, copies_of(world, line)
    mask = nodes_open_to(world, line, now=now, policy=policy)
    for site in world.sites.values():
        reason = _why_not_allowed(line, site, copies.get(site.id)) or _why_nothing_there(world, site)
        if reason is None:
            alone = FleetArrays()
            alone.rebuild([node for node in fleet.nodes if node.site_id == site.id], fleet.sites)
            reason = why_never_gang(alone, gang)
        if reason is None:
            here = rows_at(fleet, (site.id,)) if mask is None else mask & rows_at(fleet, (site.id,))
            reason = None if fits(fleet, gang, mask=here) else why_not_now(fleet, gang, mask=here)
        yield site, reason


def _why_not_allowed(line: Line, site: Site, copying: Copying | None) -> Reason | None:
    """Why the spec, or its data, keeps a job from a site whatever is free there."""
    where = line.gang.choices[0].where
    if not is_within(where, site):
        wanted = "; ".join(where.words())
        return Reason(
            code="SiteNotAllowed",
            subject="placement",
            needed=wanted,
            available=described(site),
            resolvable_by=ResolvableBy.POLICY,
            sentence=f"It may be put only where {wanted}; this is {described(site)}.",
        )
    if copying is not None and copying.refused:
        return Reason(
            code="DataMayNotBeThere",
            subject="data",
            needed="all of its data",
            available=copying.refused,
            resolvable_by=ResolvableBy.POLICY,
            sentence=copying.refused,
        )
    return None


def _why_nothing_there(world: World, site: Site) -> Reason | None:
    """Why no machine of a site can take anything: there is none, or none is heard of."""
    nodes = [node for node in world.nodes.values() if node.site_id == site.id and not has_left(node)]
    if not nodes:
        return Reason(
            code="SiteWithoutMachines",
            subject="site",
            needed="a machine",
            available="none",
            resolvable_by=ResolvableBy.CAPACITY,
            sentence="No machine has joined it.",
        )
    if all(node.state in _CUT_OFF for node in nodes):
        return Reason(
            code="SiteCutOff",
            subject="site",
            needed="that it can be reached",
            available=f"{len(nodes)} of {len(nodes)} machines silent",
            resolvable_by=ResolvableBy.TIME,
            sentence=(
                "It is cut off: none of its machines is heard of. What runs there goes on; nothing new is put there."
            ),
        )
    return None
