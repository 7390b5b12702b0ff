"""When to rent machines from a cloud, for which jobs, and when to give them back.

A job is worth renting for when waiting for room on what is there costs more than renting: an hour of waiting has a
declared price, and a job that would miss its ``start_before`` cannot wait at all. Whether it fits an offer is asked of
the scheduler's own placement, on machines as they would be. Jobs are looked at in the order in which they are given;
each is put first where room is coming anyway, then on the offer that is cheapest for it.

Two ceilings bound what is there at any time (instances, money an hour), one bounds the month. What counts against the
month is what was spent, and what everything rented is expected to cost until it is idle again or the month is over.
When work lasts longer than expected, machines are emptied before the month's money is gone.

The same inputs again, with what was rented now booting, rent nothing more: a job for which an instance is on its way
is taken care of. An instance on which something runs is never released: it is closed first (nothing new is placed
there), and released once it is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import numpy as np

from tidemill.core.feasible import Shape, workers_that_fit
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Gang, Placed, place_gang
from tidemill.core.score import Score, Tide
from tidemill.model.cloud import Billing, Market, Offer, Rental, RentalState
from tidemill.model.fleet import Device, Node, NodeState, Site
from tidemill.model.ids import DeviceId, JobId, NodeId, RentalId, SiteId
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.spec import WorkloadSpec
from tidemill.units import DAY_NS, HOUR_NS, MILLI, MINUTE_NS, SECOND_NS, format_duration, format_usd

MEMORY_MILLI: Final = 920
"""How much of an instance's nominal memory jobs are counted on to get; the kernel and the agent have the rest."""
_PLACE_LABELS: Final = frozenset({"country", "region", "zone", "site"})
_FRESH: Final = "~new-"
"""How the machines of this decision are called: after every id of a rental."""
_LAST_PART: Final = 6
"""An idle machine that is charged by long units is kept until the last such part of the unit that is paid for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstPolicy:
    """What renting is worth, and what it may cost at most. Money in micro-USD, time in ns.

    An hour of waiting costs ``waiting_job_micro_per_hour`` for each job and ``waiting_gpu_micro_per_hour`` for each GPU
    that it asks for. With ``deadlines``, a job that would miss its ``start_before`` is rented for whatever waiting
    costs. Zero instances or zero money: nothing is rented.

    ``boot_ns`` is how long a machine is expected to take until it has joined, where that is not known better;
    one that takes longer than ``boot_limit_ns`` is given up. One that was idle for ``idle_ns`` is given back.
    ``wind_down_ns`` before the month's money is gone machines are emptied. ``horizon_ns`` is how far forecasts look: a
    job without a forecast waits for that long at least.
    """

    waiting_job_micro_per_hour: int = 0
    waiting_gpu_micro_per_hour: int = 0
    deadlines: bool = True
    max_instances: int = 0
    max_micro_per_hour: int = 0
    max_micro_per_month: int = 0
    boot_ns: int = 5 * MINUTE_NS
    boot_limit_ns: int = 15 * MINUTE_NS
    idle_ns: int = 10 * MINUTE_NS
    wind_down_ns: int = 15 * MINUTE_NS
    horizon_ns: int = DAY_NS

    def __post_init__(self) -> None:
        for name in ("waiting_job_micro_per_hour", "waiting_gpu_micro_per_hour", "max_instances", "max_micro_per_hour",
                     "max_micro_per_month", "idle_ns", "wind_down_ns"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is zero or more")
        if min(self.boot_ns, self.boot_limit_ns, self.horizon_ns) <= 0:
            raise ValueError("booting and the horizon take longer than nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """A job that waits, with what the quote says of it.

    ``forecast_ns`` is when it would start on what is there, zero: not within the horizon. ``here_micro`` is what
    running there would cost; zero where machines of one's own are paid for anyway. ``markets`` are those whose
    instances it may be given.
    """

    id: JobId
    gang: Gang
    duration_ns: int
    forecast_ns: int
    waiting_micro_per_hour: int
    start_before_ns: int = 0
    here_micro: int = 0
    markets: tuple[Market, ...] = (Market.ON_DEMAND,)


class Phase(StrEnum):
    """What a rented instance is to the decision."""

    COMING = "coming"
    """Wanted or booting."""
    OPEN = "open"
    """A node that work is placed on."""
    CLOSED = "closed"
    """A node that nothing new is placed on."""
    LEAVING = "leaving"
    """To be ended; it may still cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rented:
    """An instance that is rented, as it is now.

    ``phase_ns`` is for how long it has been in its phase, ``idle_ns`` for how long nothing has run on it (both by a
    clock that does not jump), ``paid_ns`` for how long it has been charged. ``running`` counts the workers that hold
    something there, ``busy_until_ns`` is when the last of them is expected to end. ``jobs`` are those for which
    it was rented.
    """

    id: RentalId
    offer: Offer
    phase: Phase
    phase_ns: int = 0
    idle_ns: int = 0
    paid_ns: int = 0
    running: int = 0
    busy_until_ns: int = 0
    jobs: tuple[JobId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rent:
    """Rent one instance of an offer, for these jobs."""

    offer: Offer
    jobs: tuple[JobId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Place nothing more on an instance; with ``displace`` have what runs there stopped and queued again."""

    rental_id: RentalId
    displace: bool
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """End an instance, on which nothing runs."""

    rental_id: RentalId
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to rent, close and release now; ``refused`` says for each other waiting job why nothing is rented for it."""

    rent: tuple[Rent, ...] = ()
    close: tuple[Close, ...] = ()
    release: tuple[Release, ...] = ()
    refused: tuple[tuple[JobId, Reason], ...] = ()


def burst(
    waiting: Sequence[WaitingJob],
    offers: Iterable[Offer],
    rented: Sequence[Rented],
    *,
    policy: BurstPolicy,
    billing: Billing,
    spent_micro: int,
    now: int,
    boots: Mapping[str, int] | None = None,
    useless: frozenset[tuple[JobId, str]] = frozenset(),
    score: Score | None = None,
    site: Site | None = None,
) -> Decision:
    """What to do now about rented machines. ``waiting`` is in the order in which jobs would be placed.

    ``spent_micro`` is what this month cost so far, with what is rented now. ``boots`` are the times that types of
    instance are known to take to boot. ``useless`` are jobs with types of instance that were rented for them and that
    the scheduler then did not use. ``site`` is where rented machines are, for work that may not be everywhere.
    """
    books = _Books(policy, billing, spent_micro, now, boots or {}, score or Tide(compiled=False), site)
    books.count(rented, {job.id: job for job in waiting})
    kept = sorted(offers, key=lambda offer: (offer.price_micro_per_hour, offer.id))
    rent: list[_New] = []
    served = {job.id for job in waiting if books.settle(job)}
    reasons = [(job.id, books.serve(job, kept, rent, useless)) for job in waiting if job.id not in served]
    close, release = _give_back(rented, books, {job.id for job in waiting})
    return Decision(
        rent=tuple(Rent(offer=new.offer, jobs=tuple(new.jobs)) for new in rent),
        close=close,
        release=release,
        refused=tuple((job, reason) for job, reason in reasons if reason is not None),
    )


def waiting_rate(spec: WorkloadSpec, policy: BurstPolicy) -> int:
    """What an hour of a job's waiting costs, in micro-USD, by what it asks for first."""
    gpus = spec.resources.gpus
    milli = gpus.total_milli * spec.nodes if gpus is not None else 0
    return policy.waiting_job_micro_per_hour + policy.waiting_gpu_micro_per_hour * milli // MILLI


def cost_micro(micro_per_hour: int, lasts_ns: int, billing: Billing) -> int:
    """What an instance costs that is there for so long, rounded up.

    >>> cost_micro(3_600, 61 * SECOND_NS, Billing(granularity_ns=SECOND_NS, minimum_ns=MINUTE_NS))
    61
    """
    units = -(-max(lasts_ns, billing.minimum_ns) // billing.granularity_ns)
    return -(-micro_per_hour * units * billing.granularity_ns // HOUR_NS)


def month_of(now: int) -> tuple[int, int]:
    """When the calendar month of that instant begins and ends, in UTC, in ns.

    >>> [instant // DAY_NS for instant in month_of(40 * DAY_NS)]
    [31, 59]
    """
    date = datetime.fromtimestamp(now // SECOND_NS, UTC)
    begins = datetime(date.year, date.month, 1, tzinfo=UTC)
    ends = datetime(date.year + date.month // 12, date.month % 12 + 1, 1, tzinfo=UTC)
    return int(begins.timestamp()) * SECOND_NS, int(ends.timestamp()) * SECOND_NS


def spent_this_month(rentals: Iterable[Rental], billing: Billing, *, now: int) -> int:
    """What rentals cost since the month of ``now`` began, at the most that each may cost, in micro-USD.

    Each counts from when it was wanted, so that one clock counts all of it; one that never was costs nothing.
    """
    begins, _ = month_of(now)
    spent = 0
    for rental in rentals:
        if rental.state is RentalState.OVER and not rental.launched_ns:
            continue
        since = rental.created_ns
        until = rental.ended_ns if rental.state is RentalState.OVER else max(now, since)
        if until > begins:
            spent += cost_micro(rental.offer.most_micro_per_hour, until - max(since, begins), billing)
    return spent


def machine_of(offer: Offer, name: str, *, site: SiteId = SiteId("")) -> Node:
    """An instance of that offer as the node that it would be."""
    return Node(
        id=NodeId(name),
        site_id=site,
        name=name,
        state=NodeState.READY,
        version=1,
        boot_id="",
        address="",
        cpu_milli=offer.cpu_milli,
        memory_bytes=offer.memory_bytes * MEMORY_MILLI // MILLI,
        disk_bytes=offer.disk_bytes,
        images=True,
        labels=offer.labels,
        devices=tuple(
            Device(
                id=DeviceId(f"{name}-{index}"),
                index=index,
                model=offer.gpu_model,
                reported=offer.gpu_model,
                memory_bytes=offer.gpu_memory_bytes,
                idle_mw=0,
                busy_mw=0,
            )
            for index in range(offer.gpu_count)
        ),
    )


# -- the room that is coming, and the money ---------------------------------------------------------------------------


@dataclass(slots=True)
class _New:
    """A machine that this decision rents."""

    name: str
    offer: Offer
    jobs: list[JobId] = field(default_factory=list)


@dataclass(slots=True)
class _Machine:
    """A machine that counts: how long it is still needed, and what it may cost an hour."""

    offer: Offer
    needed_ns: int


class _Books:
    """What is rented and what it may come to, as this decision goes on."""

    def __init__(
        self,
        policy: BurstPolicy,
        billing: Billing,
        spent_micro: int,
        now: int,
        boots: Mapping[str, int],
        score: Score,
        site: Site | None,
    ) -> None:
        self.policy = policy
        self._site = site.id if site is not None else SiteId("")
        self._sites = {site.id: site} if site is not None else {}
        self.now = now
        self._billing = billing
        self._spent_micro = spent_micro
        self._boots = boots
        self._score = score
        self._left_ns = month_of(now)[1] - now
        self._machines: dict[str, _Machine] = {}
        self._open: dict[str, Node] = {}
        self._coming: dict[str, Node] = {}
        self._for: dict[JobId, list[str]] = {}
        """Which machines that are coming were rented for a job."""
        self._held: list[tuple[Gang, Placed]] = []
        self._fleet: FleetArrays | None = None
        self._each: dict[tuple[Gang, str], int] = {}
        self._counts: dict[tuple[Gang, str], int] = {}
        self.used: set[str] = set()
        """Machines, coming or there, that some waiting job was put on."""

    def count(self, rented: Sequence[Rented], waiting: Mapping[JobId, WaitingJob]) -> None:
        """Take down what is rented: all of it costs, and what is coming or idle has room."""
        for one in rented:
            needed = self.policy.wind_down_ns
            if one.phase is Phase.COMING:
                jobs = [waiting[job] for job in one.jobs if job in waiting]
                needed = max([self._needs(job, one.offer) for job in jobs], default=needed)
            elif one.running:
                needed = max(one.busy_until_ns - self.now, needed)
            self._machines[one.id] = _Machine(one.offer, needed)
            if one.phase is Phase.COMING:
                self._coming[one.id] = machine_of(one.offer, one.id, site=self._site)
                for job_id in one.jobs:
                    self._for.setdefault(job_id, []).append(one.id)
            elif one.phase is Phase.OPEN and not one.running:
                self._open[one.id] = machine_of(one.offer, one.id, site=self._site)

    @property
    def is_month_over(self) -> bool:
        """Whether the month's money would be gone before all that is rented could be wound down."""
        hours = sum(machine.offer.most_micro_per_hour for machine in self._machines.values())
        burning = -(-hours * min(self.policy.wind_down_ns, self._left_ns) // HOUR_NS)
        return bool(self._machines) and self._spent_micro + burning > self.policy.max_micro_per_month

    def is_paid_up(self, one: Rented) -> bool:
        """Whether keeping an instance on would soon cost anew: what is paid for is nearly used."""
        unit = self._billing.granularity_ns
        return unit <= MINUTE_NS or unit - one.paid_ns % unit <= unit // _LAST_PART

    def settle(self, job: WaitingJob) -> bool:
        """Whether the room that was rented for a job is on its way; then the job is put there."""
        names = self._for.get(job.id, ())
        return self._put(job, names)

    def serve(
        self, job: WaitingJob, offers: Sequence[Offer], rent: list[_New], useless: frozenset[tuple[JobId, str]]
    ) -> Reason | None:
        """Put a job where room is coming, or rent for it what is cheapest; else why not."""
        if job.forecast_ns and job.forecast_ns <= self.now + self._soonest(offers):
            self._put(job, tuple(self._open))
            return _reason("WaitingIsCheaper", job.id, "", "", ResolvableBy.TIME,
                           "It starts on what is there before a rented machine could have booted.")  # fmt: skip
        if self._join(job, rent):
            return None
        fitting = [(offer, count) for offer in offers if (count := self._count_for(job, offer))]
        if not fitting:
            return self._why_nothing_fits(job, offers)
        fresh = [(offer, count) for offer, count in fitting if (job.id, offer.instance_type) not in useless]
        priced = sorted((self._price(job, offer, count), offer.id, offer, count) for offer, count in fresh)
        first: Reason | None = None
        for price, _, offer, count in priced:
            reason = self._why_not_worth(job, offer, price) or self._why_beyond(job, offer, count)
            if reason is None:
                self._rent(job, offer, count, rent)
                return None
            first = first or reason
        return first or _reason("RentedInVain", job.id, "", "", ResolvableBy.NOTHING,
                                "Machines that were rented for it were not used by it.")  # fmt: skip

    # Whether it is worth it

    def _boot(self, offer: Offer) -> int:
        return self._boots.get(offer.instance_type, self.policy.boot_ns)

    def _soonest(self, offers: Sequence[Offer]) -> int:
        return min((self._boot(offer) for offer in offers), default=0)

    def _needs(self, job: WaitingJob, offer: Offer) -> int:
        """For how long an instance is rented for a job: booting, running, and idle until it is given back."""
        return max(self._boot(offer) + job.duration_ns + self.policy.idle_ns, self.policy.wind_down_ns)

    def _price(self, job: WaitingJob, offer: Offer, count: int) -> int:
        """What renting costs in all, with the waiting until the machines have booted."""
        rent = count * cost_micro(offer.price_micro_per_hour, self._needs(job, offer), self._billing)
        return rent + job.waiting_micro_per_hour * self._boot(offer) // HOUR_NS

    def _why_not_worth(self, job: WaitingJob, offer: Offer, price: int) -> Reason | None:
        waits = job.forecast_ns - self.now if job.forecast_ns else self.policy.horizon_ns
        starts = self.now + waits
        if job.start_before_ns and starts > job.start_before_ns and self.policy.deadlines:
            ready = self.now + self._boot(offer)
            if ready <= job.start_before_ns:
                return None
            return _reason(
                "NoOfferInTime", job.id, f"within {format_duration(max(job.start_before_ns - self.now, 0))}",
                f"boots in {format_duration(self._boot(offer))}", ResolvableBy.NOTHING,
                "No machine that can be rented would have booted before it has to start.",
            )  # fmt: skip
        waiting = job.waiting_micro_per_hour * waits // HOUR_NS + job.here_micro
        if price < waiting:
            return None
        return _reason(
            "WaitingIsCheaper", job.id, format_usd(price), format_usd(waiting), ResolvableBy.POLICY,
            f"Renting {offer.instance_type} for it would cost {format_usd(price)}, and waiting {format_usd(waiting)}.",
        )  # fmt: skip

    # Whether it may be

    def _why_beyond(self, job: WaitingJob, offer: Offer, count: int) -> Reason | None:
        policy = self.policy
        if len(self._machines) + count > policy.max_instances:
            return _reason(
                "TooManyInstances", job.id, str(len(self._machines) + count), str(policy.max_instances),
                ResolvableBy.POLICY, f"{len(self._machines)} of {policy.max_instances} instances are rented.",
            )  # fmt: skip
        hourly = sum(machine.offer.most_micro_per_hour for machine in self._machines.values())
        wanted = hourly + count * offer.most_micro_per_hour
        if wanted > policy.max_micro_per_hour:
            most = f"{format_usd(policy.max_micro_per_hour)} an hour"
            return _reason(
                "TooMuchPerHour", job.id, f"{format_usd(wanted)} an hour", most, ResolvableBy.POLICY,
                f"With {offer.instance_type} rented machines could cost {format_usd(wanted)} an hour, above {most}.",
            )  # fmt: skip
        return self._why_beyond_month(job.id, count * self._expected(offer, self._needs(job, offer)))

    def _why_beyond_month(self, job: JobId, more: int) -> Reason | None:
        most = self.policy.max_micro_per_month
        wanted = self._spent_micro + self._committed() + more
        if wanted <= most and not self.is_month_over:
            return None
        return _reason(
            "TooMuchThisMonth", job, format_usd(wanted), format_usd(most), ResolvableBy.POLICY,
            f"{format_usd(self._spent_micro)} of this month's {format_usd(most)} are spent, and with this machine"
            f" {format_usd(wanted)} would be expected.",
        )  # fmt: skip

    def _expected(self, offer: Offer, needed_ns: int) -> int:
        """What an instance may cost this month, needed for so long from now on."""
        return cost_micro(offer.most_micro_per_hour, min(needed_ns, self._left_ns), self._billing)

    def _committed(self) -> int:
        return sum(self._expected(machine.offer, machine.needed_ns) for machine in self._machines.values())

    # Where it goes

    def _count_for(self, job: WaitingJob, offer: Offer) -> int:
        """How many instances of an offer the job needs beside those coming for it, zero: it cannot run there."""
        if offer.market not in job.markets:
            return 0
        if job.id in self._for:
            return self._missing(job, offer)
        key = job.gang, offer.id
        if key not in self._counts:
            self._counts[key] = self._missing(job, offer)
        return self._counts[key]

    def _missing(self, job: WaitingJob, offer: Offer) -> int:
        each, smallest = self._workers_on(job.gang, offer), job.gang.smallest
        if not each:
            return 0
        there = self._for.get(job.id, ())
        least = 1 if there else -(-smallest // each)
        for count in range(least, min(smallest, max(self.policy.max_instances, least)) + 1):
            names = [f"{_FRESH}would-be-{number:05d}" for number in range(count)]
            fresh = [machine_of(offer, name, site=self._site) for name in names]
            fleet = self._laid([self._coming[name] for name in there] + fresh)
            if place_gang(fleet, job.gang, score=self._score, take=False) is not None:
                return count
        return 0

    def _join(self, job: WaitingJob, rent: list[_New]) -> bool:
        """Whether the job fits where room is coming anyway, for money that the month has; then it is put there."""
        for names in (tuple(self._open), tuple(self._coming)):
            placed = self._try(job, names)
            if placed is not None:
                break
        else:
            return False
        on = sorted({str(place.node_id) for place in placed.places})
        machines = {name: self._machines[name] for name in on}
        longer = {name: max(one.needed_ns, self._needs(job, one.offer)) for name, one in machines.items()}
        more = sum(
            self._expected(one.offer, longer[name]) - self._expected(one.offer, one.needed_ns)
            for name, one in machines.items()
        )
        if more and self._why_beyond_month(job.id, more) is not None:
            return False
        self._take(job, placed)
        for name, one in machines.items():
            one.needed_ns = longer[name]
        for new in rent:
            if new.name in machines:
                new.jobs.append(job.id)
        return True

    def _rent(self, job: WaitingJob, offer: Offer, count: int, rent: list[_New]) -> None:
        added = [_New(f"{_FRESH}{len(rent) + number:05d}", offer, [job.id]) for number in range(count)]
        for new in added:
            self._machines[new.name] = _Machine(offer, self._needs(job, offer))
            self._coming[new.name] = machine_of(offer, new.name, site=self._site)
        rent += added
        self._fleet = None
        self._put(job, [*self._for.get(job.id, ()), *(new.name for new in added)])

    def _put(self, job: WaitingJob, names: Sequence[str]) -> bool:
        """Whether a job fits on those machines; then it takes the room."""
        placed = self._try(job, names)
        if placed is not None:
            self._take(job, placed)
        return placed is not None

    def _take(self, job: WaitingJob, placed: Placed) -> None:
        self._held.append((job.gang, placed))
        self.used.update(place.node_id for place in placed.places)
        self._fleet = None

    def _try(self, job: WaitingJob, names: Sequence[str]) -> Placed | None:
        fleet = self._fleet = self._fleet or self._laid([*self._open.values(), *self._coming.values()])
        mask = np.zeros(len(fleet.nodes), np.bool_)
        for name in names:
            mask[fleet.row[NodeId(name)]] = self._machines[name].offer.market in job.markets
        return place_gang(fleet, job.gang, score=self._score, mask=mask, take=False) if mask.any() else None

    def _laid(self, nodes: Sequence[Node]) -> FleetArrays:
        """Those machines, less what was put on them."""
        fleet = FleetArrays()
        fleet.rebuild(list(nodes), self._sites)
        for gang, placed in self._held:
            resources = gang.choices[placed.choice].resources
            for place in placed.places:
                if place.node_id in fleet.row:
                    fleet.take(
                        place.node_id,
                        cpu_milli=resources.cpu_milli,
                        memory_bytes=resources.memory_bytes,
                        devices=place.devices,
                    )
        return fleet

    def _workers_on(self, gang: Gang, offer: Offer) -> int:
        """How many workers one instance would run, of the choice that fits best."""
        key = gang, offer.id
        if key not in self._each:
            fleet = FleetArrays()
            fleet.rebuild([machine_of(offer, _FRESH, site=self._site)], self._sites)
            self._each[key] = max(int(workers_that_fit(fleet, shape)[0]) for shape in gang.choices)
        return self._each[key]

    def _why_nothing_fits(self, job: WaitingJob, offers: Sequence[Offer]) -> Reason:
        """Whether it is its place, its market or its size that keeps a job from everything on offer."""
        anywhere = _anywhere(job.gang)
        by_size = [offer for offer in offers if self._workers_on(anywhere, offer)]
        by_place = [offer for offer in by_size if self._workers_on(job.gang, offer)]
        if by_size and not by_place:
            shape = job.gang.choices[0]
            wanted = ", ".join((*(f"{key}={value}" for key, value in shape.labels), *shape.where.words()))
            return _reason(
                "ResidencyForbids", job.id, wanted, f"{len(by_size)} offers elsewhere", ResolvableBy.POLICY,
                f"Machines that would do are on offer only where it may not run; it asks for {wanted}.",
            )  # fmt: skip
        if by_place and not any(offer.market in job.markets for offer in by_place):
            return _reason(
                "OnlyInterruptible", job.id, "on demand", "spot", ResolvableBy.POLICY,
                "What would do is on offer only on terms on which it can be taken back at any time.",
            )  # fmt: skip
        return _reason(
            "NoOfferFits", job.id, f"{job.gang.smallest} workers", f"{len(by_place)} of {len(offers)} offers have room",
            ResolvableBy.CAPACITY, "No type of machine that can be rented now could run it.",
        )  # fmt: skip


def _anywhere(gang: Gang) -> Gang:
    """The gang without saying in which place it has to run."""
    choices = tuple(
        Shape(
            shape.resources,
            shape.image,
            tuple(label for label in shape.labels if label[0] not in _PLACE_LABELS),
            shape.tolerations,
        )
        for shape in gang.choices
    )
    return Gang(
        choices=choices,
        workers=gang.workers,
        smallest=gang.smallest,
        within=gang.within,
        prefer=gang.prefer,
        spread=gang.spread,
    )


# -- giving back ------------------------------------------------------------------------------------------------------


def _give_back(
    rented: Sequence[Rented], books: _Books, waiting: set[JobId]
) -> tuple[tuple[Close, ...], tuple[Release, ...]]:
    close: list[Close] = []
    release: list[Release] = []
    over = books.is_month_over
    for one in rented:
        reason = _why_give_back(one, books, over=over, wanted=not waiting.isdisjoint(one.jobs))
        if reason is None or one.phase is Phase.LEAVING:
            continue
        if one.phase is Phase.OPEN:
            close.append(Close(rental_id=one.id, displace=one.running > 0, reason=reason))
        elif not one.running:
            release.append(Release(rental_id=one.id, reason=reason))
    return tuple(close), tuple(release)


def _why_give_back(one: Rented, books: _Books, *, over: bool, wanted: bool) -> Reason | None:
    """Why an instance should go, None when it should stay. Only the month's end is a reason to empty one."""
    policy = books.policy
    if one.phase is Phase.CLOSED:
        return _reason("IsEmpty", one.id, "", "", ResolvableBy.NOTHING, "Nothing runs on it, and nothing will.")
    if over:
        return _reason(
            "MonthIsSpent", one.id, "", format_usd(policy.max_micro_per_month), ResolvableBy.POLICY,
            f"This month's {format_usd(policy.max_micro_per_month)} are as good as spent.",
        )  # fmt: skip
    if one.phase is Phase.COMING:
        if one.phase_ns > policy.boot_limit_ns:
            limit = format_duration(policy.boot_limit_ns)
            return _reason("DidNotJoin", one.id, limit, format_duration(one.phase_ns), ResolvableBy.NOTHING,
                           f"Its machine did not join within {limit}.")  # fmt: skip
        if not wanted and one.phase_ns >= policy.idle_ns and one.id not in books.used:
            return _reason("NobodyWaits", one.id, "", "", ResolvableBy.NOTHING, "Nothing waits for it any more.")
        return None
    if one.running or one.idle_ns < policy.idle_ns or not books.is_paid_up(one):
        return None
    if one.id not in books.used:
        idle = format_duration(one.idle_ns)
        return _reason("IsIdle", one.id, format_duration(policy.idle_ns), idle, ResolvableBy.NOTHING,
                       f"Nothing has run on it for {idle}.")  # fmt: skip
    if one.idle_ns >= 2 * policy.idle_ns:
        return _reason("IsNotUsed", one.id, "", "", ResolvableBy.NOTHING,
                       "Jobs wait that would fit, and the scheduler does not place them there.")  # fmt: skip
    return None


def _reason(code: str, subject: str, needed: str, available: str, by: ResolvableBy, sentence: str) -> Reason:
    return Reason(code=code, subject=subject, needed=needed, available=available, resolvable_by=by, sentence=sentence)
