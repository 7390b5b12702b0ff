"""What we wrote down about rented instances, compared with what the cloud lists and which machines have joined.

A rental is stored before the cloud is asked for its instance, under the client token that is its id. So whatever is
interrupted where, the cloud's own list and the rentals together tell the rest: an instance whose token is a rental's
is that rental's, also when nobody wrote down that it was made; one with our tag and no rental is an orphan.

Nothing is concluded from silence. An instance that is not listed has to be missing for a while, for lists lag behind,
and its machine must not be heard of either; a machine that is not heard of is left alone; a list that could not be had
is no list. How long something has been so is measured by a clock that never jumps, from when this process first saw
it: after a restart it counts anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from tidemill.core.bursting import Phase, Rented, cost_micro
from tidemill.core.lifecycle import RENTAL, apply
from tidemill.model.cloud import Billing, Instance, InstanceState, InterruptionNotice, Rental, RentalState
from tidemill.model.events import LogEntry, Marking, NodeMarked, NodeWentAway
from tidemill.model.ids import NodeId, SiteId
from tidemill.model.plan import Change
from tidemill.units import MINUTE_NS

INTERRUPTED: Final = "Interrupted"
EMPTIED: Final = frozenset({INTERRUPTED, "MonthIsSpent"})
"""Causes for which what runs on a machine is stopped; for others it is only that nothing new is placed there."""
_HERE: Final = (InstanceState.PENDING, InstanceState.RUNNING, InstanceState.STOPPED)
_UP: Final = (InstanceState.PENDING, InstanceState.RUNNING)


class RentalEvent(StrEnum):
    """What the event log tells of rentals."""

    WANTED = "InstanceWanted"
    RENTED = "InstanceRented"
    REFUSED = "InstanceRefused"
    JOINED = "InstanceJoined"
    INTERRUPTED = "InstanceInterrupted"
    CLOSED = "InstanceClosed"
    GIVEN_UP = "InstanceGivenUp"
    ENDED = "InstanceEnded"


EVENT_BODY: Final = ("rental", "offer", "node", "instance", "cause", "detail")
"""What is told with each of them."""


class Presence(StrEnum):
    """Whether a machine is there, as the world knows."""

    THERE = "there"
    SILENT = "silent"
    """Nothing is heard of it; what runs there may run on."""
    LOST = "lost"
    """It is known that nothing runs there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node of the site. ``running`` counts workers that hold something there, ``busy_until_ns`` is when the last of
    them is expected to end; ``is_closed`` when nothing new is placed on it."""

    node_id: NodeId
    name: str
    presence: Presence = Presence.THERE
    is_closed: bool = False
    running: int = 0
    busy_until_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """For how long something has to be so before it is acted on, in ns.

    ``settle_ns``: an instance is missing from the list. ``orphan_ns``: an instance has our tag and no rental.
    ``lost_ns``: a machine is lost though its instance is there.
    """

    settle_ns: int = 5 * MINUTE_NS
    orphan_ns: int = 10 * MINUTE_NS
    lost_ns: int = 10 * MINUTE_NS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What was seen at one time: the cloud's list and notices for a scope, and the site's machines."""

    scope: str
    instances: tuple[Instance, ...]
    notices: tuple[InterruptionNotice, ...] = ()
    machines: tuple[Machine, ...] = ()


class Stopwatch:
    """For how long things have been so without a break, by the instants of a clock that never jumps."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], int] = {}
        self._seen: set[tuple[str, str]] = set()

    def lasts_ns(self, what: str, whose: str, *, elapsed: int) -> int:
        """For how long that has been so; zero the first time, and after a round in which nobody asked."""
        self._seen.add((what, whose))
        return elapsed - self._since.setdefault((what, whose), elapsed)

    def next_round(self) -> None:
        """Forget what nobody asked about since the last round."""
        self._since = {key: since for key, since in self._since.items() if key in self._seen}
        self._seen.clear()


@dataclass(slots=True)
class Found:
    """What follows from a sighting.

    ``facts`` are to be told before ``rentals`` are stored: what depends on them is not repeated once they are stored.
    ``marks`` are to be told after. ``rentals`` are all that are not over, as they are now, with those that just ended;
    ``changes`` and ``log`` store what is new about them. ``end`` are instances to release.
    """

    rentals: dict[str, Rental] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    log: list[LogEntry] = field(default_factory=list)
    facts: list[NodeWentAway] = field(default_factory=list)
    marks: list[NodeMarked] = field(default_factory=list)
    rented: list[Rented] = field(default_factory=list)
    end: list[str] = field(default_factory=list)
    orphans: list[Instance] = field(default_factory=list)

    def move(self, rental: Rental, event: str, told: RentalEvent, *, now: int, **values: object) -> Rental:
        """The rental after an event of its life."""
        return self.change(rental, told, now=now, state=apply(RENTAL, rental.state, event), **values)

    def change(self, rental: Rental, told: RentalEvent, *, now: int, **values: object) -> Rental:
        """The rental with other values, as a change that is logged."""
        after: Rental = replace(rental, version=rental.version + 1, **values)  # type: ignore[arg-type]
        self.rentals[rental.id] = after
        self.changes.append(Change(assumed=rental.version, after=after))
        self.log.append(entry_of(told, after, now=now))
        return after


def compare(
    rentals: Iterable[Rental],
    seen: Sighting,
    watch: Stopwatch,
    *,
    site: SiteId,
    billing: Billing,
    patience: Patience,
    now: int,
    elapsed: int,
) -> Found:
    """What the rentals of a site that are not over are now. ``now`` is the time of day, ``elapsed`` never jumps."""
    found = Found()
    machines = {machine.name: machine for machine in seen.machines}
    instances, notices = _by_rental(seen.instances), {notice.instance_id: notice for notice in seen.notices}
    known: set[str] = set()
    for rental in sorted(rentals, key=lambda one: one.id):
        if rental.state is RentalState.OVER:
            continue
        found.rentals[rental.id] = rental
        if rental.scope != seen.scope:
            # Another account or region: this list says nothing about it, but it may cost.
            found.rented.append(Rented(id=rental.id, offer=rental.offer, phase=Phase.LEAVING))
            continue
        instance = instances.get(rental.instance_id) or instances.get(rental.id)
        machine = machines.get(rental.node_name)
        is_there = instance is not None or (machine is not None and machine.presence is Presence.THERE)
        missing = not is_there and watch.lasts_ns("missing", rental.id, elapsed=elapsed) >= patience.settle_ns
        if instance is not None:
            known.add(instance.id)
            rental = _meet(rental, instance, found, now=now)
        rental = _progress(rental, instance, machine, found, billing=billing, missing=missing, now=now)
        if instance is not None and rental.state is RentalState.JOINED:
            notice = notices.get(instance.id)
            rental = _look_after(rental, machine, notice, found, watch, patience, now=now, elapsed=elapsed)
        if rental.state is RentalState.LEAVING and instance is not None and instance.state in _HERE:
            _see_off(rental, instance, machine, found, now=now)
        if rental.state is not RentalState.OVER:
            found.rented.append(_rented(rental, machine, watch, now=now, elapsed=elapsed))
    for instance in seen.instances:
        if instance.id not in known and instance.site == site and instance.state in _HERE:
            _orphan(instance, machines.get(instance.node_name), found, watch, patience, elapsed=elapsed)
    return found


def entry_of(told: RentalEvent, rental: Rental, *, now: int, detail: str = "") -> LogEntry:
    """A line of the event log about a rental."""
    values = (rental.id, rental.offer.id, rental.node_name, rental.instance_id, rental.cause, detail)
    return LogEntry(at_ns=now, type=told.value, body=tuple(zip(EVENT_BODY, values, strict=True)))


def boots_of(rentals: Iterable[Rental]) -> Mapping[str, int]:
    """How long each type of instance took from being wanted to having joined: the middle of what is known."""
    took: dict[str, list[int]] = {}
    for rental in rentals:
        if rental.joined_ns > rental.created_ns:
            took.setdefault(rental.offer.instance_type, []).append(rental.joined_ns - rental.created_ns)
    return {name: sorted(times)[len(times) // 2] for name, times in sorted(took.items())}


def _by_rental(instances: Sequence[Instance]) -> dict[str, Instance]:
    """Instances by their own id and by their client token: of several with one token the oldest that is there."""
    found: dict[str, Instance] = {}
    for one in sorted(instances, key=lambda each: (each.state not in _HERE, each.launched_ns, each.id)):
        found[one.id] = one
        if one.client_token:
            found.setdefault(one.client_token, one)
    return found


def _meet(rental: Rental, instance: Instance, found: Found, *, now: int) -> Rental:
    """The rental with the cloud's name of its instance, when that was not written down."""
    named = {"instance_id": instance.id, "launched_ns": instance.launched_ns}
    if rental.state is RentalState.WANTED:
        return found.move(rental, "provisioned", RentalEvent.RENTED, now=now, **named)
    if rental.state is RentalState.LEAVING and not rental.instance_id:
        return found.move(rental, "found", RentalEvent.RENTED, now=now, **named)
    return rental


def _progress(
    rental: Rental,
    instance: Instance | None,
    machine: Machine | None,
    found: Found,
    *,
    billing: Billing,
    missing: bool,
    now: int,
) -> Rental:
    """The rental after what the cloud and the world say of it."""
    if rental.state is RentalState.WANTED:
        return rental
    is_gone = instance is not None and instance.state is InstanceState.GONE
    if is_gone or missing:
        cause = rental.cause or ("EndedByCloud" if is_gone else "NotListed")
        return _over(rental, machine, found, billing=billing, cause=cause, now=now)
    if instance is None or rental.state is RentalState.LEAVING:
        return rental
    if instance.state not in _UP:
        return found.move(rental, "given_up", RentalEvent.GIVEN_UP, now=now, cause=rental.cause or "EndedByCloud")
    if rental.state is RentalState.BOOTING and machine is not None and machine.presence is Presence.THERE:
        return found.move(rental, "joined", RentalEvent.JOINED, now=now, node_id=machine.node_id, joined_ns=now)
    return rental


def _over(rental: Rental, machine: Machine | None, found: Found, *, billing: Billing, cause: str, now: int) -> Rental:
    """The rental, which is over: what it cost is known, and that nothing runs on its machine."""
    if machine is not None and machine.presence is not Presence.LOST:
        # One that was asked to go, and had nothing to do, has not failed.
        detail = "shut down" if cause != "EndedByCloud" else f"the cloud ended {rental.instance_id}"
        found.facts.append(NodeWentAway(at_ns=now, node_id=machine.node_id, detail=detail))
    lasted = max(now - rental.created_ns, 0)
    cost = cost_micro(rental.offer.most_micro_per_hour, lasted, billing) if rental.launched_ns else 0
    return found.move(rental, "gone", RentalEvent.ENDED, now=now, cause=cause, ended_ns=max(now, 1), cost_micro=cost)


def _look_after(
    rental: Rental,
    machine: Machine | None,
    notice: InterruptionNotice | None,
    found: Found,
    watch: Stopwatch,
    patience: Patience,
    *,
    now: int,
    elapsed: int,
) -> Rental:
    """A machine that joined: emptied when the cloud wants it back, closed when it is to go, given up when lost."""
    if notice is not None and rental.cause not in EMPTIED:
        rental = found.change(rental, RentalEvent.INTERRUPTED, now=now, cause=INTERRUPTED)
        found.marks.append(mark(rental, now=now, until_ns=notice.ends_ns))
    elif rental.cause and machine is not None and machine.presence is Presence.THERE and not machine.is_closed:
        found.marks.append(mark(rental, now=now, until_ns=notice.ends_ns if notice is not None else 0))
    is_lost = machine is not None and machine.presence is Presence.LOST
    if is_lost and watch.lasts_ns("lost", rental.id, elapsed=elapsed) >= patience.lost_ns:
        return found.move(rental, "given_up", RentalEvent.GIVEN_UP, now=now, cause=rental.cause or "MachineLost")
    return rental


def _see_off(rental: Rental, instance: Instance, machine: Machine | None, found: Found, *, now: int) -> None:
    """Have the instance of a rental that was given up ended. Its machine may have joined all the same, and work."""
    if machine is None or machine.presence is Presence.LOST:
        found.end.append(instance.id)
    elif not machine.is_closed:
        found.marks.append(replace(mark(rental, now=now), node_id=machine.node_id))
    elif not machine.running:
        found.end.append(instance.id)


def mark(rental: Rental, *, now: int, until_ns: int = 0) -> NodeMarked:
    """That nothing new is to be placed on a rental's machine; for some causes, that it is to be emptied."""
    marking = Marking.DRAIN if rental.cause in EMPTIED else Marking.CORDON
    return NodeMarked(
        at_ns=now, node_id=rental.node_id, marking=marking, by="the cloud", detail=rental.cause, until_ns=until_ns
    )


def _rented(rental: Rental, machine: Machine | None, watch: Stopwatch, *, now: int, elapsed: int) -> Rented:
    """The rental as the decision sees it. What is in between two phases is left to the next look."""
    running = machine.running if machine is not None else 0
    phase = Phase.LEAVING
    if rental.state in (RentalState.WANTED, RentalState.BOOTING):
        phase = Phase.COMING
    elif rental.state is RentalState.JOINED and machine is not None and machine.presence is Presence.THERE:
        if not rental.cause:
            phase = Phase.OPEN
        elif machine.is_closed:
            phase = Phase.CLOSED
    idle = watch.lasts_ns("idle", rental.id, elapsed=elapsed) if phase is Phase.OPEN and not running else 0
    return Rented(
        id=rental.id,
        offer=rental.offer,
        phase=phase,
        phase_ns=watch.lasts_ns(phase.value, rental.id, elapsed=elapsed),
        idle_ns=idle,
        paid_ns=max(now - rental.created_ns, 0),
        running=running,
        busy_until_ns=machine.busy_until_ns if machine is not None else 0,
        jobs=rental.jobs,
    )


def _orphan(
    instance: Instance, machine: Machine | None, found: Found, watch: Stopwatch, patience: Patience, *, elapsed: int
) -> None:
    """An instance that carries our tag and belongs to no rental: ended after a while, unless its machine is at work.

    That is so when an older state of the store was restored: then people have to look.
    """
    lasts = watch.lasts_ns("orphan", instance.id, elapsed=elapsed)
    if machine is not None and machine.presence is not Presence.LOST and machine.running:
        return
    if lasts >= patience.orphan_ns:
        found.orphans.append(instance)
        found.end.append(instance.id)
