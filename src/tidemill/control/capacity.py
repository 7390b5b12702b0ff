"""Keeps the machines of one cloud site: rents what pays, closes and gives back what does not, leaves no orphan.

Each round goes: ask the cloud for its list, compare it with what was written down (``core.rentals``), decide
(``core.bursting``), **store**, and only then ask the cloud for anything. What a round was not told by the cloud it
does not know: when the cloud cannot be reached the round is left out, and nothing follows from that.

Everything is stored under the leader's epoch, so a control plane that leads no more rents nothing more.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tidemill.control.answers import duration_of
from tidemill.control.forecast import copy_of, likely_starts
from tidemill.control.turns import TurnLoop
from tidemill.core.bursting import (
    BurstPolicy,
    Decision,
    Rent,
    WaitingJob,
    burst,
    month_of,
    spent_this_month,
    waiting_rate,
)
from tidemill.core.place import gang_of
from tidemill.core.rentals import (
    Found,
    Machine,
    Patience,
    Presence,
    RentalEvent,
    Sighting,
    Stopwatch,
    boots_of,
    compare,
    entry_of,
    mark,
)
from tidemill.core.world import World
from tidemill.errors import CloudLost, CloudRefused, Fenced, TidemillError
from tidemill.model.cloud import (
    Instance,
    Market,
    NoCapacity,
    Offer,
    ProvisionRequest,
    Rental,
    RentalState,
)
from tidemill.model.events import Fact, LogEntry, NodeMarked
from tidemill.model.fleet import NodeState, Site
from tidemill.model.ids import JobId, RentalId, SiteId, sortable_id
from tidemill.model.plan import Change, Plan, Reason
from tidemill.model.policy import Policy
from tidemill.model.spec import Tier
from tidemill.ports import Batch, Provisioner, Store
from tidemill.units import DAY_NS, HOUR_NS, MINUTE_NS

log = logging.getLogger(__name__)
WAITING_LIMIT: Final = 200
"""How many waiting jobs a round looks at, from the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the world says of a site: what it is, its machines, and the jobs that wait, in their order."""

    machines: tuple[Machine, ...] = ()
    waiting: tuple[WaitingJob, ...] = ()
    site: Site | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacitySettings:
    """How one site rents. ``name_prefix`` begins the names of its machines; ``token_ns`` is how long one has to join.

    An offer without capacity is left out for ``no_capacity_ns``, one that was refused, or whose machine did not join,
    for ``refused_ns``. Prices are asked for every ``offers_every_ns``.
    """

    site: SiteId
    policy: BurstPolicy
    patience: Patience = Patience()
    name_prefix: str = "rented"
    token_ns: int = 30 * MINUTE_NS
    no_capacity_ns: int = 10 * MINUTE_NS
    refused_ns: int = HOUR_NS
    offers_every_ns: int = 10 * MINUTE_NS


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityStatus:
    """How a site's renting stands, for people: ``refused`` says why nothing is rented for a job."""

    rentals: tuple[Rental, ...] = ()
    spent_micro: int = 0
    refused: tuple[tuple[JobId, Reason], ...] = ()
    orphans: tuple[Instance, ...] = ()
    problem: str = ""


@dataclass(slots=True)
class _Memory:
    """What a restart may forget."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    held_until: dict[str, int] = field(default_factory=dict)
    """Offers that are left out, until an instant of the clock that never jumps."""
    offers: tuple[Offer, ...] = ()
    offers_at: int = -1
    strangers: set[str] = field(default_factory=set)


class Capacity:
    """The renting of one site, round by round.

    ``view`` gives what the world says, ``tell`` takes facts and comes back when they are stored. ``script`` makes what
    a rented machine runs when it boots; it must give the same text for the same rental, for a request is repeated
    word for word. ``ended`` is told of each rental that is over. ``clock`` gives the time of day, ``elapsed`` a clock
    that never jumps, both in ns; ``entropy`` gives random numbers.
    """

    def __init__(
        self,
        provisioner: Provisioner,
        store: Store,
        settings: CapacitySettings,
        *,
        epoch: int,
        view: Callable[[], View],
        tell: Callable[[Sequence[Fact]], object],
        script: Callable[[Rental], str],
        clock: Callable[[], int],
        elapsed: Callable[[], int],
        entropy: Callable[[], int],
        ended: Callable[[Rental], object] = lambda _: None,
        every_s: float = 10.0,
    ) -> None:
        self._provisioner = provisioner
        self._store = store
        self._settings = settings
        self._epoch = epoch
        self._view = view
        self._tell = tell
        self._script = script
        self._clock = clock
        self._elapsed = elapsed
        self._entropy = entropy
        self._ended = ended
        self._every_s = every_s
        self._memory = _Memory()
        self._status = CapacityStatus()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capacity", daemon=True)

    @property
    def status(self) -> CapacityStatus:
        """As of the last round."""
        return self._status

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking; whatever is rented stays."""
        self._closing.set()
        self._thread.join(timeout=90)

    def round(self) -> None:
        """Look once, decide, and do. Raises: CloudLost, CloudRefused, what the store raises; nothing is lost then."""
        elapsed = self._elapsed()
        seen = Sighting(
            scope=self._provisioner.scope(),
            instances=self._provisioner.instances(),
            notices=self._provisioner.interruptions(),
        )
        now, view = self._clock(), self._view()
        rentals = self._rentals(now)
        found = compare(
            rentals,
            Sighting(scope=seen.scope, instances=seen.instances, notices=seen.notices, machines=view.machines),
            self._memory.watch,
            site=self._settings.site,
            billing=self._provisioner.capabilities.billing,
            patience=self._settings.patience,
            now=now,
            elapsed=elapsed,
        )
        self._memory.watch.next_round()
        self._tell_of_strangers(found, seen.scope)
        decision, spent = self._decide(rentals, found, view, now=now, elapsed=elapsed)
        wanted = [self._wish(rent, seen.scope, now=now) for rent in decision.rent]
        marks = self._apply(found, decision, now=now, elapsed=elapsed)
        if found.facts:
            self._tell(found.facts)
        self._commit(
            [*found.changes, *(Change(assumed=None, after=rental) for rental in wanted)],
            [*found.log, *(entry_of(RentalEvent.WANTED, rental, now=now) for rental in wanted)],
        )
        kept: dict[str, Rental] = found.rentals | {str(rental.id): rental for rental in wanted}
        self._status = CapacityStatus(
            rentals=tuple(kept.values()), spent_micro=spent, refused=decision.refused, orphans=tuple(found.orphans)
        )
        for rental in found.rentals.values():
            if rental.state is RentalState.OVER:
                self._ended(rental)
        if marks:
            self._tell(marks)
        self._end(found)
        for rental in kept.values():
            if rental.state is RentalState.WANTED and rental.scope == seen.scope:
                self._rent(rental, is_first=rental.id not in found.rentals)

    def _tell_of_strangers(self, found: Found, scope: str) -> None:
        """Log once what was rented in another account or region: it is left alone, and may cost."""
        for rental in found.rentals.values():
            if rental.scope != scope and rental.id not in self._memory.strangers:
                self._memory.strangers.add(rental.id)
                log.warning("%s was rented in %s and this is %s; it is left alone", rental.id, rental.scope, scope)

    # What to do

    def _rentals(self, now: int) -> tuple[Rental, ...]:
        """This site's, with those that ended this month or within a day."""
        since = min(month_of(now)[0], now - DAY_NS)
        return tuple(one for one in self._store.rentals(since_ns=since) if one.site_id == self._settings.site)

    def _decide(
        self, rentals: Sequence[Rental], found: Found, view: View, *, now: int, elapsed: int
    ) -> tuple[Decision, int]:
        """What to rent and to give back, and what this month cost so far."""
        billing = self._provisioner.capabilities.billing
        over = [one for one in rentals if one.state is RentalState.OVER]
        spent = spent_this_month([*over, *found.rentals.values()], billing, now=now)
        useless = frozenset(
            (job, one.offer.instance_type) for one in over if one.cause == "IsNotUsed" for job in one.jobs
        )
        held = self._memory.held_until
        offers = self._offers(elapsed) if view.waiting else ()
        decision = burst(
            view.waiting,
            [offer for offer in offers if held.get(offer.id, elapsed) <= elapsed],
            found.rented,
            policy=self._settings.policy,
            billing=billing,
            spent_micro=spent,
            now=now,
            boots=boots_of([*over, *found.rentals.values()]),
            useless=useless,
            site=view.site,
        )
        return decision, spent

    def _offers(self, elapsed: int) -> tuple[Offer, ...]:
        memory = self._memory
        if memory.offers_at < 0 or elapsed - memory.offers_at >= self._settings.offers_every_ns:
            memory.offers, memory.offers_at = self._provisioner.offers(), elapsed
        return memory.offers

    def _wish(self, rent: Rent, scope: str, *, now: int) -> Rental:
        """A rental that is wanted, under a new id that is also the client token."""
        made = RentalId(sortable_id("ren", now=now, entropy=self._entropy()))
        return Rental(
            id=made,
            site_id=self._settings.site,
            scope=scope,
            offer=rent.offer,
            node_name=f"{self._settings.name_prefix}-{made.partition('_')[2]}",
            state=RentalState.WANTED,
            version=1,
            created_ns=now,
            expires_ns=now + self._settings.token_ns,
            jobs=rent.jobs,
        )

    def _apply(self, found: Found, decision: Decision, *, now: int, elapsed: int) -> list[NodeMarked]:
        """Take the decision over into what is stored; the marks that are to be told after that."""
        marks = list(found.marks)
        for close in decision.close:
            rental = found.rentals[close.rental_id]
            if rental.state is RentalState.JOINED and not rental.cause:
                rental = found.change(rental, RentalEvent.CLOSED, now=now, cause=close.reason.code)
                marks.append(mark(rental, now=now))
        for release in decision.release:
            rental = found.rentals[release.rental_id]
            if release.reason.code == "DidNotJoin":
                self._memory.held_until[rental.offer.id] = elapsed + self._settings.refused_ns
            cause = rental.cause or release.reason.code
            if rental.state in (RentalState.WANTED, RentalState.BOOTING, RentalState.JOINED):
                rental = found.move(rental, "given_up", RentalEvent.GIVEN_UP, now=now, cause=cause)
                found.end += [rental.instance_id] if rental.instance_id else []
        return marks

    # Doing it

    def _commit(self, changes: Sequence[Change], entries: Sequence[LogEntry]) -> None:
        if changes:
            self._store.commit(Batch(epoch=self._epoch, changes=changes, log=entries))

    def _end(self, found: Found) -> None:
        """Have instances ended. What fails is done again in the next round, for they are listed until they are gone."""
        for orphan in found.orphans:
            log.warning("%s (%s) has our tag and belongs to no rental; it is ended", orphan.id, orphan.node_name)
        for instance_id in dict.fromkeys(found.end):
            try:
                self._provisioner.release(instance_id)
            except (CloudLost, CloudRefused) as error:
                log.warning("%s could not be ended and is tried again: %s", instance_id, error)

    def _rent(self, rental: Rental, *, is_first: bool) -> None:
        """Ask for the instance of a rental that is stored; when the answer is lost, it is asked for again."""
        settings, elapsed = self._settings, self._elapsed()
        request = ProvisionRequest(
            client_token=rental.id,
            offer=rental.offer,
            site=settings.site,
            node_name=rental.node_name,
            user_data=self._script(rental),
        )
        try:
            answer = self._provisioner.provision(request)
        except CloudLost as error:
            log.warning("%s: %s", rental.id, error)
        except CloudRefused as error:
            log.error("%s cannot be rented: %s", rental.offer.id, error)
            self._memory.held_until[rental.offer.id] = elapsed + settings.refused_ns
            self._give_up(rental, "Refused", str(error), is_first=is_first)
        else:
            if isinstance(answer, NoCapacity):
                self._memory.held_until[rental.offer.id] = elapsed + settings.no_capacity_ns
                self._give_up(rental, "NoCapacity", answer.detail, is_first=is_first)
            else:
                found, now = Found(), self._clock()
                named = {"instance_id": answer.id, "launched_ns": answer.launched_ns}
                found.move(rental, "provisioned", RentalEvent.RENTED, now=now, **named)
                self._commit(found.changes, found.log)

    def _give_up(self, rental: Rental, cause: str, detail: str, *, is_first: bool) -> None:
        """Write down that a rental was refused. When it was asked for before, that time may have made an instance:
        then it is over only once the list has had none for a while."""
        found, now = Found(), self._clock()
        if is_first:
            after = found.move(rental, "refused", RentalEvent.REFUSED, now=now, cause=cause, ended_ns=max(now, 1))
        else:
            after = found.move(rental, "given_up", RentalEvent.REFUSED, now=now, cause=cause)
        self._commit(found.changes, [entry_of(RentalEvent.REFUSED, after, now=now, detail=detail)])
        if is_first:
            self._ended(after)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self.round()
            except Fenced:
                log.warning("another control plane leads; nothing more is rented here")
                return
            except TidemillError as error:
                self._status = CapacityStatus(problem=str(error), rentals=self._status.rentals)
                log.warning("the cloud's machines could not be looked after: %s", error)
            except Exception:
                log.exception("looking after the cloud's machines failed")
            self._closing.wait(self._every_s)


def view_of(turns: TurnLoop, site: SiteId, policy: Policy, burst_policy: BurstPolicy, *, now: int) -> View:
    """What the world says of a site now. Forecasts are of all sites together: a job may start anywhere."""

    def look(_: Plan, world: World) -> tuple[View, Any, list[tuple[JobId, WaitingJob]]]:
        waiting = [
            (job_id, _waiting(world, job_id, burst_policy))
            for _, job_id in world.queue.in_order(WAITING_LIMIT, now=now)
            if world.workloads[world.jobs[job_id].workload_id].spec.tier is not Tier.RESERVED
        ]
        view = View(machines=_machines(world, site, now=now), site=world.sites.get(site))
        return view, copy_of(world, policy, now=now), waiting

    view, copy, waiting = turns.ask((), look).result(timeout=30)
    if not waiting:
        return view
    starts = likely_starts(copy, [job_id for job_id, _ in waiting], horizon_ns=burst_policy.horizon_ns)
    jobs = tuple(_with_forecast(job, starts.get(job_id, 0)) for job_id, job in waiting)
    return View(machines=view.machines, waiting=jobs, site=view.site)


def _with_forecast(job: WaitingJob, forecast_ns: int) -> WaitingJob:
    return WaitingJob(
        id=job.id,
        gang=job.gang,
        duration_ns=job.duration_ns,
        forecast_ns=forecast_ns,
        waiting_micro_per_hour=job.waiting_micro_per_hour,
        start_before_ns=job.start_before_ns,
        markets=job.markets,
    )


def _waiting(world: World, job_id: JobId, policy: BurstPolicy) -> WaitingJob:
    workload = world.workloads[world.jobs[job_id].workload_id]
    spec = workload.spec
    may_go = spec.tier is Tier.SPOT
    return WaitingJob(
        id=job_id,
        gang=gang_of(spec),
        duration_ns=duration_of(spec),
        forecast_ns=0,
        waiting_micro_per_hour=waiting_rate(spec, policy),
        start_before_ns=spec.start_before_ns,
        markets=(Market.SPOT, Market.ON_DEMAND) if may_go else (Market.ON_DEMAND,),
    )


def _machines(world: World, site: SiteId, *, now: int) -> tuple[Machine, ...]:
    found = []
    for node in world.nodes.values():
        if node.site_id != site:
            continue
        held = [world.allocations[launch] for launch in world.by_node.get(node.id, ())]
        ends = [
            (one.started_ns or now) + duration_of(world.workloads[world.jobs[one.job_id].workload_id].spec)
            for one in held
        ]
        found.append(
            Machine(
                node_id=node.id,
                name=node.name,
                presence=_presence(node.state),
                is_closed=bool(node.marking),
                running=len(held),
                busy_until_ns=max(ends, default=0),
            )
        )
    return tuple(found)


def _presence(state: NodeState) -> Presence:
    if state is NodeState.LOST:
        return Presence.LOST
    return Presence.SILENT if state.value == "silent" else Presence.THERE
