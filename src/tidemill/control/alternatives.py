"""What else could be asked for: specs near to one that is quoted, and which of them are worth telling of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tidemill.catalog.devices import devices
from tidemill.core.choosing import candidates, in_order, weights_of
from tidemill.core.feasible import model_matches
from tidemill.core.world import World, line_of
from tidemill.model.fleet import HOURS_OF_DAY
from tidemill.model.job import Workload
from tidemill.model.plan import Option
from tidemill.model.policy import Policy
from tidemill.model.resources import GpuRequest
from tidemill.model.spec import Kind, Tier, WorkloadSpec
from tidemill.units import HOUR_NS
from tidemill.wire.scheduling import instant_text

MOST: Final = 3
_MOST_NODES: Final = 64
_WORTH: Final = 50
"""How much less something costs, or how much cleaner or sooner it is, to be told of: one part in so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A nearby spec: what differs, in the spec's own words, and how many times as long it takes."""

    change: str
    spec: WorkloadSpec
    slower: float = 1.0


def variants(
    world: World, workload: Workload, *, feasible: bool, starts_ns: int, lasts_ns: int, now: int, policy: Policy
) -> Iterator[Variant]:
    """Specs near to a workload's: other GPUs, fewer or more workers, room that may be taken back, a cleaner hour.

    ``starts_ns`` is when it would start as it is; zero: that is not known.
    """
    spec = workload.spec
    gpus = spec.resources.gpus
    if gpus is not None and gpus.model and gpus.is_whole:
        yield from _other_models(world, spec, gpus)
    if gpus is not None and gpus.is_whole and gpus.count > 1:
        yield from _other_counts(spec, gpus, feasible=feasible)
    if spec.nodes > 1 and spec.kind is not Kind.SERVICE:
        nodes = spec.nodes // 2
        fewer = replace(spec, nodes=nodes, nodes_min=min(spec.nodes_min, nodes))
        yield Variant(change=f"nodes: {nodes}", spec=fewer, slower=spec.nodes / nodes)
    if spec.tier is Tier.ON_DEMAND and spec.kind in (Kind.TASK, Kind.ARRAY):
        yield Variant(change="capacity: spot", spec=replace(spec, tier=Tier.SPOT))
    if feasible and starts_ns and spec.kind in (Kind.TASK, Kind.ARRAY):
        yield from _later(world, workload, starts_ns=starts_ns, lasts_ns=lasts_ns, now=now, policy=policy)


def worth_telling(options: Iterable[Option], *, asked: Option | None) -> tuple[Option, ...]:
    """The few options that are sooner, cheaper or cleaner than what was asked: the best in each, then the next soonest.

    ``asked`` is what was asked for, as an option; None: it cannot be had, and then all are better. An ``asked`` that
    never finishes, as far as is foreseen, has a ``finish_ns`` of zero.
    """
    better = [option for option in options if asked is None or _is_better(option, asked)]
    orders = (
        lambda option: (option.finish_ns, option.amount_micro, option.change),
        lambda option: (option.amount_micro, option.finish_ns, option.change),
        lambda option: (option.carbon_mg, option.finish_ns, option.change),
    )
    best = [min(better, key=order) for order in orders if better]
    chosen = list(dict.fromkeys([*best, *sorted(better, key=orders[0])]))[:MOST]
    return tuple(sorted(chosen, key=orders[0]))


def _is_better(option: Option, asked: Option) -> bool:
    return (
        (not asked.finish_ns or option.finish_ns < asked.finish_ns)
        or option.amount_micro < asked.amount_micro - asked.amount_micro // _WORTH
        or option.carbon_mg < asked.carbon_mg - asked.carbon_mg // _WORTH
    )


def _other_models(world: World, spec: WorkloadSpec, gpus: GpuRequest) -> Iterator[Variant]:
    """The same number of each other model of the fleet, as much slower as its peak is lower."""
    flops = {device.model: device.bf16_tflops for device in devices()}
    known = [speed for model, speed in flops.items() if model_matches(model, gpus.model)]
    here = [flops.get(model, 0.0) for model in world.fleet.models if model_matches(model, gpus.model)]
    mine = max(here, default=0.0) or max(known, default=0.0)
    for model in world.fleet.models:
        if not model_matches(model, gpus.model) and flops.get(model) and mine and not model.startswith("MIG-"):
            request = replace(gpus, model=model, memory_min_bytes=0, memory_max_bytes=0)
            other = replace(spec, resources=replace(spec.resources, gpus=request), any_of=())
            yield Variant(change=f"resources.gpus: {request}", spec=other, slower=mine / flops[model])


def _other_counts(spec: WorkloadSpec, gpus: GpuRequest, *, feasible: bool) -> Iterator[Variant]:
    """Half as many GPUs for each worker; where that many are in no machine, as many in all over more workers."""
    half = replace(gpus, count=gpus.count // 2)
    fewer = replace(spec, resources=replace(spec.resources, gpus=half), any_of=())
    yield Variant(change=f"resources.gpus: {half}", spec=fewer, slower=gpus.count / half.count)
    if feasible or spec.kind is Kind.SERVICE:
        return
    parts = 2
    while gpus.count % parts == 0 and spec.nodes * parts <= _MOST_NODES:
        each = replace(gpus, count=gpus.count // parts)
        nodes = spec.nodes * parts
        spread = replace(spec, nodes=nodes, nodes_min=nodes, resources=replace(spec.resources, gpus=each), any_of=())
        yield Variant(change=f"nodes: {nodes}, resources.gpus: {each}", spec=spread)
        parts *= 2


def _later(
    world: World, workload: Workload, *, starts_ns: int, lasts_ns: int, now: int, policy: Policy
) -> Iterator[Variant]:
    """The hour of the next day at which it would cause least carbon at the site that is best for it."""
    line = line_of(workload)
    there = candidates(world, line, line.gang.choices[0], now=now, policy=policy, lasts_ns=lasts_ns)
    order = in_order(there, weights_of(line))
    site = world.sites.get(order[0][0]) if order else next(iter(world.sites.values()), None)
    if site is None or not site.carbon_hours:
        return
    first = (starts_ns // HOUR_NS + 1) * HOUR_NS
    hours = [first + hour * HOUR_NS for hour in range(HOURS_OF_DAY)]
    if workload.spec.start_before_ns:
        hours = [at for at in hours if at < workload.spec.start_before_ns]
    if hours:
        at = min(hours, key=lambda at: (_intensity(site.carbon_hours, at, lasts_ns), at))
        yield Variant(change=f"start_after: {instant_text(at)}", spec=replace(workload.spec, start_after_ns=at))


def _intensity(by_hour: tuple[int, ...], from_ns: int, lasts_ns: int) -> int:
    """The mean carbon intensity from an hour's beginning on, of whole hours and at most a day."""
    hours = min(max(-(-lasts_ns // HOUR_NS), 1), HOURS_OF_DAY)
    first = from_ns // HOUR_NS
    return sum(by_hour[(first + hour) % HOURS_OF_DAY] for hour in range(hours)) // hours
