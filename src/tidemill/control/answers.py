"""What the control plane answers when it is asked: why, quotes, receipts, the state of the cloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tidemill.control.siteoptions import site_options
from tidemill.core.admission import described, why_never_together, why_not_now, why_refused
from tidemill.core.choosing import candidates, in_order, weights_of
from tidemill.core.copying import copying_anywhere, copying_onto
from tidemill.core.fairness import covers
from tidemill.core.feasible import is_within, model_matches
from tidemill.core.place import fits
from tidemill.core.preempt import amounts_together
from tidemill.core.queueing import Line
from tidemill.core.rating import amount_micro, carbon_over, electricity_micro
from tidemill.core.reserve import meets_windows, nodes_open_to, why_not_open
from tidemill.core.scheduling import members_of
from tidemill.core.waiting import group_of, not_yet
from tidemill.core.world import World, line_of
from tidemill.model.fleet import Node, Site
from tidemill.model.ids import SiteId, job_id
from tidemill.model.job import Allocation, Job, JobState, Workload
from tidemill.model.ledger import CPU_METER, Evidence, LedgerTotals, RateCard
from tidemill.model.plan import Forecast, Holding, Plan, Quote, Reason, ResolvableBy, SiteOption
from tidemill.model.policy import Policy
from tidemill.model.queue import GPU, MEMORY
from tidemill.model.spec import WorkloadSpec
from tidemill.units import HOUR_NS, MILLI, SECOND_NS, format_size

ASSUMED_DURATION_NS = HOUR_NS
"""What a quote is for when the spec sets no ``max_duration``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a job is where it is: its state and cause, and while it waits each thing that stands in its way.

    ``position`` counts from 1 among the waiting jobs; zero when it does not wait. ``holdings`` are who holds what
    it needs, ``forecast`` when it would start; None when it does not wait or never will.
    """

    job_id: str
    state: str
    cause: str
    detail: str
    sentence: str
    position: int
    reasons: tuple[Reason, ...]
    holdings: tuple[Holding, ...] = ()
    forecast: Forecast | None = None
    sites: tuple[SiteOption, ...] = ()
    """While it waits, how it would be at each site; empty where there is one site only."""
    site: str = ""
    """Where it runs; several with commas between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a job took and cost so far. Times in ns, money in micro-USD, energy in mJ, carbon in mg.

    It waited ``queue_wait_ns`` for its place, ``prepare_ns`` for its environment, and ran ``run_ns``; its workers
    held what they had for ``held_ns`` together.
    """

    job: str
    name: str
    state: str
    queue_wait_ns: int
    prepare_ns: int
    run_ns: int
    held_ns: int
    device_seconds: tuple[tuple[str, float], ...]
    amount_micro: int
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    carbon_source: str
    rate_card: str
    unit_prices: tuple[tuple[str, int], ...]
    lines: int
    metered_until_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The cloud at a glance."""

    version: str
    site: Site
    nodes: tuple[Node, ...]
    cpu_milli: int
    free_cpu_milli: int
    gpu_milli: int
    free_gpu_milli: int
    jobs: tuple[tuple[str, int], ...]
    energy: str
    rate_card: str
    gateway_url: str
    strangers: int = 0
    """Launches that the engine has and the store has never heard of."""
    workers: int = 0
    heard: int = 0
    """Of the workers that run, those whose runner this control plane has heard of since it started."""


def explain(world: World, job: Job, workload: Workload, stored: Reason | None, *, now: int, policy: Policy) -> Why:
    """Why this job is in its state, computed from the world as it is now."""
    live = world.jobs.get(job.id, job)
    if live.state is not JobState.QUEUED or live.id not in world.jobs:
        return replace(_why(live, _state_sentence(live), 0, ()), site=_sites_of(world, live, workload))
    reasons = _reasons(world, live, workload, stored, now=now, policy=policy)
    position = world.queue.ahead_of(live, now=now) + 1 if world.is_waiting(live.id) else 0
    answer = _why(live, reasons[0].sentence, position, tuple(reasons), holdings_for(world, live))
    lasts = duration_of(workload.spec)
    return replace(answer, sites=site_options(world, world.line_of(live), now=now, policy=policy, lasts_ns=lasts))


def _sites_of(world: World, job: Job, workload: Workload) -> str:
    """The sites at which a job runs, each with what its spec asks about; empty where there is one site only."""
    attempt = world.attempts.get(job.id)
    if attempt is None or len(world.sites) < 2:
        return ""
    sites = {world.sites[world.nodes[held.node_id].site_id] for held in world.workers_of(attempt)}
    asked = "; ".join(workload.spec.placement.where.words())
    return ", ".join(sorted(described(site) for site in sites)) + (f", as asked: {asked}" if asked else "")


def with_word(answer: Why, word: str) -> Why:
    """The answer for a job that starts, with what the engine that is to start it says: another scheduler's reason."""
    if not word:
        return answer
    reason = Reason(
        code="WaitsInEngine",
        subject="engine",
        needed="its workers started",
        available=word,
        resolvable_by=ResolvableBy.TIME,
        sentence=f"It has its place here, and waits at its site: {word}.",
    )
    return replace(answer, sentence=reason.sentence, reasons=(reason,))


def _reasons(
    world: World, job: Job, workload: Workload, stored: Reason | None, *, now: int, policy: Policy
) -> list[Reason]:
    """Each constraint that is not met, the most decisive first."""
    if (never := why_refused(world, workload) or _why_group_refused(world, job)) is not None:
        return [never]
    if job.id in world.promises:
        return [world.reasons[job.id]] if job.id in world.reasons else [_next_turn()]
    if job.id in world.parked:
        return [world.parked[job.id]]
    if job.id in world.delayed:
        return [_not_yet(job, workload)]
    line = world.line_of(job)
    reasons = [
        reason
        for reason in (
            world.quota.over_limit(job.project_id, world.amounts_of(line), 1),
            why_not_open(world, line, now=now),
        )
        if reason is not None
    ]
    current = world.line_reasons.get(line) if line in world.blocked else None
    if current is not None and current not in reasons:
        reasons.append(current)
    mask = nodes_open_to(world, line, now=now, policy=policy)
    if not fits(world.fleet, line.gang, mask=mask):
        room = meets_windows(world, line, mask, now=now) or why_not_now(world.fleet, line.gang, mask=mask)
        if all(room.code != reason.code for reason in reasons):
            reasons.append(room)
    elif not reasons and stored is not None:
        reasons.append(stored)
    return reasons or [_next_turn()]


def _why_group_refused(world: World, job: Job) -> Reason | None:
    """Why a job's group, as far as it is submitted, can never start; machines may have gone since it was let in."""
    group = [world.workloads[world.jobs[one].workload_id] for one in group_of(world, job)]
    return why_never_together(world, group) if len(group) > 1 else None


def holdings_for(world: World, job: Job, limit: int = 10) -> tuple[Holding, ...]:
    """Who holds most of what the job asks for, largest first; where a limit is in its way, of those whom it is for."""
    members = members_of(world, job)
    lines = [member.line for member in members]
    shared = world.quota.who_shares_limit(job.project_id, amounts_together(world, lines), len(members))
    projects, resource = shared if shared is not None else (None, GPU)
    models = _models_asked_for(world, lines)
    if shared is not None:
        models = {model for model in world.fleet.models if not resource or covers(resource, model)}
    found: list[tuple[int, Holding]] = []
    for attempt in world.attempts.values():
        holder = world.jobs[attempt.job_id]
        if projects is not None and holder.project_id not in projects:
            continue
        workers = world.workers_of(attempt)
        gpus: dict[str, int] = {}
        for held in workers:
            for share in held.devices:
                model = world.fleet.model_of(held.node_id, share.device_id)
                if model in models:
                    gpus[model] = gpus.get(model, 0) + share.milli
        if resource and models and not gpus:
            continue
        workload = world.workloads[holder.workload_id]
        project = world.projects.get(holder.project_id)
        limit_ns = workload.spec.max_duration_ns
        cpu, memory = sum(held.cpu_milli for held in workers), sum(held.memory_bytes for held in workers)
        amount = ", ".join(f"{milli / MILLI:g} x {model}" for model, milli in gpus.items()) or f"{cpu / MILLI:g} CPU"
        holding = Holding(
            job_id=holder.id,
            name=workload.spec.name,
            project=project.name if project is not None else holder.project_id,
            amount=format_size(memory) if resource == MEMORY else amount,
            ends_ns=attempt.started_ns + limit_ns if attempt.started_ns and limit_ns else 0,
        )
        found.append((memory if resource == MEMORY else sum(gpus.values()) if models else cpu, holding))
    found.sort(key=lambda pair: (-pair[0], pair[1].job_id))
    return tuple(holding for _, holding in found[:limit])


def _models_asked_for(world: World, lines: Sequence[Line]) -> set[str]:
    """The device models that would do; none for work without GPUs."""
    requests = [shape.resources.gpus for line in lines for shape in line.gang.choices]
    return {
        model
        for request in requests
        if request is not None
        for model in world.fleet.models
        if not request.model or model_matches(model, request.model)
    }


def _next_turn() -> Reason:
    return Reason(
        code="NextTurn",
        subject="queue",
        needed="one more turn",
        available="it is about to be taken",
        resolvable_by=ResolvableBy.TIME,
        sentence="Nothing stands in its way; it is about to be placed.",
    )


def _not_yet(job: Job, workload: Workload) -> Reason:
    return _backing_off(job) if job.attempts else not_yet(workload.spec.start_after_ns)


def _why(
    job: Job, sentence: str, position: int, reasons: tuple[Reason, ...], holdings: tuple[Holding, ...] = ()
) -> Why:
    return Why(
        job_id=job.id,
        state=job.state.value,
        cause=job.cause.value,
        detail=job.detail,
        sentence=sentence,
        position=position,
        reasons=reasons,
        holdings=holdings,
    )


def _state_sentence(job: Job) -> str:
    detail = f": {job.detail}" if job.detail else ""
    match job.state:
        case JobState.STARTING:
            return "It has its place; its workers are being prepared and started."
        case JobState.RUNNING:
            return "It runs."
        case JobState.STOPPING:
            return f"It was asked to end and its workers have their grace period{detail}."
        case JobState.SUCCEEDED:
            return "It ended well."
        case JobState.CANCELLED:
            return f"It was stopped{detail}."
        case _:
            return f"It failed ({job.cause.value.replace('_', ' ')}){detail}."


def _backing_off(job: Job) -> Reason:
    return Reason(
        code="BackingOff",
        subject="retry",
        needed=f"retry {job.retries}",
        available="later",
        resolvable_by=ResolvableBy.TIME,
        sentence=f"Attempt {job.attempts} ended ({job.cause.value.replace('_', ' ')}); the next one is due shortly.",
    )


def duration_of(spec: WorkloadSpec) -> int:
    """How long a quote takes a workload to run."""
    return spec.expected_duration_ns or spec.max_duration_ns or ASSUMED_DURATION_NS


def quote_of(plan: Plan, world: World, workload: Workload, *, now: int) -> Quote:
    """The quote for a workload whose submission gave ``plan`` in a turn that is not kept."""
    spec = workload.spec
    duration = duration_of(spec)
    first = world.jobs.get(job_id(workload.id, 0))
    never = why_refused(world, workload) or (_why_group_refused(world, first) if first is not None else None)
    if never is not None:
        return _priced(world, spec, (), duration, feasible=False, starts_now=False, reasons=(never,), now=now)
    stem = f"job_{workload.id.partition('_')[2]}-"
    placed = [
        change.after
        for change in plan.changes
        if isinstance(change.after, Allocation) and change.assumed is None and change.after.job_id.startswith(stem)
    ]
    waiting = tuple(item.reason for item in plan.waiting if item.job_id.startswith(stem))
    displaces = tuple(
        entry.job_id for entry in plan.log if entry.type == "Preempted" and f"room for {stem}" in str(dict(entry.body))
    )
    jobs = {held.job_id for held in placed}
    starts_now = len(jobs) == spec.job_count
    reasons = waiting[:1]
    line = world.line_of_workload(workload)
    nodes = [world.nodes[node_id] for node_id in dict.fromkeys(held.node_id for held in placed)]
    copying = copying_onto(world, line, nodes) if placed else copying_anywhere(world, line)
    quote = _priced(
        world, spec, tuple(placed), duration + copying.time_ns, feasible=True, starts_now=starts_now, reasons=reasons,
        now=now,
    )  # fmt: skip
    return replace(
        quote,
        duration_ns=duration,
        amount_micro=quote.amount_micro + copying.cost_micro,
        copy_ns=copying.time_ns,
        copy_bytes=copying.size,
        displaces=displaces,
    )


def price(world: World, workload: Workload, *, now: int, policy: Policy) -> Quote:
    """What a workload would cost at the site that is best for it."""
    spec, lasts = workload.spec, duration_of(workload.spec)
    found = _priced(world, spec, (), lasts, feasible=True, starts_now=False, reasons=(), now=now)
    if len(world.fleet.site_ids) < 2:
        return found
    line, workers = line_of(workload), spec.nodes * spec.job_count
    shape = line.gang.choices[0]
    there = candidates(world, line, shape, now=now, policy=policy, workers=workers, lasts_ns=lasts)
    order = in_order(there, weights_of(line))
    best = next((one for one in there if order and one.site_id in order[0]), None)
    if best is None:
        return found
    return replace(found, amount_micro=best.price_micro, energy_mj=best.energy_mj, carbon_mg=best.carbon_mg)


def _priced(
    world: World,
    spec: WorkloadSpec,
    placed: tuple[Allocation, ...],
    duration: int,
    *,
    feasible: bool,
    starts_now: bool,
    reasons: tuple[Reason, ...],
    now: int,
) -> Quote:
    by_site: dict[SiteId, list[tuple[str, int, int, bool]]] = {}
    for site_id, resource, milli, power_mw, is_free in _units(world, spec, placed):
        by_site.setdefault(site_id, []).append((resource, milli, power_mw, is_free))
    amount = total = carbon = 0
    sites = [world.sites[site_id] for site_id in by_site] or [next(iter(world.sites.values()))]
    for site_id, units in by_site.items():
        site, prices, energy = world.sites[site_id], world.prices_at(site_id), 0
        share = 1 if placed else spec.nodes * spec.job_count
        for resource, milli, power_mw, is_free in units:
            if not is_free:
                amount += amount_micro(prices.get(resource, 0), milli, 0, duration) * share
            energy += power_mw * milli * duration // (MILLI * SECOND_NS)
        energy = energy * share * site.pue_milli // MILLI
        amount += electricity_micro(energy, site)
        carbon += carbon_over(energy, site, now, now + duration)
        total += energy
    placement = tuple((world.nodes[held.node_id].name, _holding(world, held)) for held in placed)
    return Quote(
        feasible=feasible,
        starts_now=starts_now,
        duration_ns=duration,
        duration_known=bool(spec.max_duration_ns),
        amount_micro=amount if feasible else 0,
        energy_mj=total if feasible else 0,
        carbon_mg=carbon if feasible else 0,
        placement=placement,
        reasons=reasons,
        suggestions=_suggestions(reasons),
        rate_card=", ".join(dict.fromkeys(world.card_of(site.id).id for site in sites)),
        carbon_source=", ".join(dict.fromkeys(site.carbon_source for site in sites)),
    )


def _units(
    world: World, spec: WorkloadSpec, placed: tuple[Allocation, ...]
) -> list[tuple[SiteId, str, int, int, bool]]:
    """(site, resource, milli, mW a unit, is free) for what is held: of the real places, or of one typical worker."""
    units: list[tuple[SiteId, str, int, int, bool]] = []
    for held in placed:
        node = world.nodes[held.node_id]
        units.append((node.site_id, CPU_METER, held.cpu_milli, node.cpu_busy_mw, bool(held.devices)))
        devices = {device.id: device for device in node.devices}
        units.extend(
            (node.site_id, devices[share.device_id].model, share.milli, devices[share.device_id].busy_mw, False)
            for share in held.devices
        )
    where = spec.placement.where
    nodes = [node for node in world.nodes.values() if is_within(where, world.sites[node.site_id])]
    if not placed and nodes:
        gpus = spec.resources.gpus
        site_id = nodes[0].site_id
        units.append((site_id, CPU_METER, spec.resources.cpu_milli, nodes[0].cpu_busy_mw, gpus is not None))
        if gpus is not None:
            device = next(
                (device for node in nodes for device in node.devices if not gpus.model or gpus.model in device.model),
                None,
            )
            if device is not None:
                site_id = next(node.site_id for node in nodes if device in node.devices)
                units.append((site_id, device.model, gpus.total_milli, device.busy_mw, False))
    return units


def _holding(world: World, held: Allocation) -> str:
    models = {device.id: device.model for device in world.nodes[held.node_id].devices}
    gpus = ", ".join(f"{share.milli / MILLI:g} x {models[share.device_id]}" for share in held.devices)
    cpus = f"{held.cpu_milli / MILLI:g} CPU"
    return f"{gpus}, {cpus}" if gpus else cpus


def _suggestions(reasons: tuple[Reason, ...]) -> tuple[str, ...]:
    mends = {
        "NoNodeWithGpu": "Ask for a GPU that the fleet has, or leave resources.gpus out to run on CPUs.",
        "NoNodeWithEnoughGpus": "Ask for fewer GPUs a worker and more workers (nodes).",
        "NotEnoughGpus": "Ask for fewer GPUs or fewer workers.",
        "NoNodeWithCpu": "Ask for fewer CPUs a worker.",
        "NoNodeWithMemory": "Ask for less memory a worker.",
        "NoNodeWithDisk": "Ask for less disk a worker.",
        "GangTooLarge": "Ask for fewer workers (nodes), or for less for each.",
        "GroupTooLarge": "Let fewer jobs start together (group.size), or ask for less for each.",
        "NoSiteLargeEnough": "Ask for fewer workers, or write placement: {across_sites: true}.",
        "NoSiteAllowed": "Widen placement.sites, countries or kinds; see tidemill site list.",
        "QueueLimit": "Ask for less, or have the queue's limit raised: tidemill share set.",
        "NoContainerRuntime": "Use env: {python, packages} instead of image, or install podman on a machine.",
        "NoNodes": "Have a machine join: tidemill site token local says how.",
    }
    return tuple(mends[reason.code] for reason in reasons if reason.code in mends)


def mend_for(reason: Reason) -> str:
    """What to do about a reason that nothing but another spec or another fleet resolves."""
    return next(iter(_suggestions((reason,))), "")


def receipt_of(
    job: Job,
    workload: Workload,
    totals: LedgerTotals,
    *,
    cards: Sequence[RateCard],
    sites: Sequence[Site],
    held_ns: int,
    placed_ns: int,
    now: int,
) -> Receipt:
    """The receipt of a job from the sums of its ledger lines; ``placed_ns`` is when it first had a place, or 0.

    ``sites`` are those where it ran, the first first, and ``cards`` their rate cards.
    """
    end = job.ended_ns or now
    first = job.first_started_ns
    used = {resource for resource, _ in totals.held_milli_ns}
    return Receipt(
        job=job.id,
        name=workload.spec.name,
        state=job.state.value,
        queue_wait_ns=(placed_ns or end) - job.submitted_ns,
        prepare_ns=(first or end) - placed_ns if placed_ns else 0,
        run_ns=end - first if first else 0,
        held_ns=held_ns,
        device_seconds=tuple((name, amount / (MILLI * SECOND_NS)) for name, amount in totals.held_milli_ns),
        amount_micro=totals.amount_micro,
        energy_mj=totals.energy_mj,
        energy_evidence=(totals.evidence if totals.lines else Evidence.ESTIMATED).value,
        carbon_mg=totals.carbon_mg,
        carbon_source=", ".join(dict.fromkeys(site.carbon_source for site in sites)),
        rate_card=", ".join(dict.fromkeys(card.id for card in cards)),
        unit_prices=tuple((rate.resource, rate.micro_per_hour) for rate in cards[0].rates if rate.resource in used),
        lines=totals.lines,
        metered_until_ns=end,
    )
