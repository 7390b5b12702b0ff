"""⑥ Usage intervals that tile time: for each meter of a node, what is used plus what is idle is capacity x time.

A meter is one device, or the processors of a node. It remembers since when it is open and who holds how much.
Whenever that changes, and at least every so often, the stretch since then is cut off: one interval for each
holder, one for what work held that is not ours, and one for what nobody held. No instant is counted twice, none is
left out.

Energy of a stretch is the difference of the hardware's counter where it is known at both ends, shared out by
what each held, down to the last millijoule; else it is estimated from the device's idle and busy power. A machine that
is not heard of keeps its counters: its stretches stay open until it tells them, or what it has ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.job import Allocation
from tidemill.model.ledger import CPU_METER, Holder
from tidemill.units import MILLI, MINUTE_NS, SECOND_NS

_BLIND_NS: Final = MINUTE_NS
"""Counters are read every few seconds where they are read at all."""
_MILLI_SECOND: Final = MILLI * SECOND_NS
"""Milli-units x milliwatts x ns in a millijoule. Both ends of a stretch are divided by it, so that pieces add up."""


@dataclass(slots=True)
class Meter:
    """One meter of one node. ``counter_mj`` is the hardware's reading at ``since_ns``, None when not known;
    ``latest_mj`` is that of ``read_ns``.

    ``others_milli`` is what work holds of it that is not ours.
    """

    node_id: NodeId
    name: str
    resource: str
    capacity_milli: int
    idle_mw: int
    busy_mw: int
    since_ns: int
    holders: dict[LaunchId, Holder] = field(default_factory=dict)
    counter_mj: int | None = None
    latest_mj: int | None = None
    read_ns: int = 0
    others_milli: int = 0

    @property
    def held_milli(self) -> int:
        """What our workers hold of it."""
        return sum(holder.milli for holder in self.holders.values())

    def read(self, energy_mj: int, *, now: int) -> None:
        """Take note of the hardware's counter. A counter that went back was reset: its past is unknown."""
        self.read_ns = now
        if self.latest_mj is not None and energy_mj < self.latest_mj:
            self.counter_mj = None
        self.latest_mj = energy_mj
        if self.counter_mj is None and not self.holders:
            self.counter_mj = energy_mj

    def awaits_reading(self, now: int) -> bool:
        """Whether its counter was read before, and not for so long that nothing follows for the time since."""
        return self.counter_mj is not None and now - self.read_ns > _BLIND_NS

    def cut(self, now: int) -> Stretch | None:
        """The stretch from ``since_ns`` until ``now``, after which the meter is open from ``now``.

        None when no time has passed. What a counter that was not read for long says later is of this stretch and of
        the next one, nobody knows how much of which: both are estimated.
        """
        since, counter, latest = self.since_ns, self.counter_mj, self.latest_mj
        if now <= since:
            return None
        if self.awaits_reading(now):
            self.counter_mj = self.latest_mj = None
        self.since_ns = now
        measured = None
        if self.counter_mj is not None and self.latest_mj is not None and self.latest_mj >= self.counter_mj:
            measured = self.latest_mj - self.counter_mj
        self.counter_mj = self.latest_mj
        parts = self._parts(since, now, measured)
        return Stretch([self], since, now, measured is not None, parts, counter, latest)

    def _estimates(self) -> tuple[object, ...] | None:
        """All that its next stretch is estimated from; None when a counter has a say."""
        if self.latest_mj is not None or self.counter_mj is not None:
            return None
        power, holders = (self.capacity_milli, self.idle_mw, self.busy_mw), tuple(self.holders.values())
        return self.since_ns, holders, self.others_milli, self.resource, power

    def _parts(self, since: int, now: int, measured: int | None) -> list[Part]:
        parts: list[Part] = []
        left_mj, left_milli = measured or 0, self.capacity_milli
        for holder in self.holders.values():
            milli = holder.milli
            if measured is None:
                rate = self.busy_mw * milli
                energy = rate * now // _MILLI_SECOND - rate * since // _MILLI_SECOND
            else:
                energy = left_mj * milli // max(left_milli, 1)
                left_mj -= energy
            left_milli -= milli
            parts.append((holder, milli, energy, False))
        if left_milli <= 0:
            return parts
        theirs = max(0, min(self.others_milli, left_milli))
        for milli, is_others, power in ((theirs, True, self.busy_mw), (left_milli - theirs, False, self.idle_mw)):
            if milli <= 0:
                continue
            if measured is None:
                rate = power * milli
                energy = rate * now // _MILLI_SECOND - rate * since // _MILLI_SECOND
            else:
                energy = left_mj * milli // left_milli
                left_mj -= energy
            left_milli -= milli
            parts.append((None, milli, energy, is_others))
        return parts


class Stretch(Struct, frozen=True, gc=False):
    """What a meter counted between two cuts, in parts that are all of it. Several ``meters`` counted the same, each."""

    meters: list[Meter]
    from_ns: int
    to_ns: int
    is_measured: bool
    parts: list[Part]
    counter_mj: int | None
    """What ``counter_mj`` and ``latest_mj`` were before the cut."""
    latest_mj: int | None

    def join(self) -> None:
        """Have the meters open as they were before the cut."""
        for meter in self.meters:
            meter.since_ns, meter.counter_mj, meter.latest_mj = self.from_ns, self.counter_mj, self.latest_mj


Part = tuple[Holder | None, int, int, bool]
"""Who held it (None: none of ours), how much of the meter in thousandths, its energy in mJ, whether others held it."""


def cut_together(meters: Iterable[Meter], now: int) -> list[Stretch]:
    """The stretches of some meters of a node until ``now``; meters next to each other that counted the same have one.

    The devices of a gang's worker are most often alike, so what follows is worked out once for all of them.
    """
    stretches: list[Stretch] = []
    before: tuple[object, ...] | None = None
    for meter in meters:
        estimates = meter._estimates()
        if estimates is not None and estimates == before:
            meter.since_ns = now
            stretches[-1].meters.append(meter)
        elif (stretch := meter.cut(now)) is not None:
            stretches.append(stretch)
            before = estimates
    return stretches


def meters_of(node: Node, *, now: int) -> tuple[Meter, ...]:
    """A meter for the node's processors and one for each device, open from ``now``."""
    cpu = Meter(node.id, CPU_METER, CPU_METER, node.cpu_milli, node.cpu_idle_mw, node.cpu_busy_mw, now)
    gpus = (
        Meter(node.id, device.id, device.model, MILLI, device.idle_mw, device.busy_mw, now) for device in node.devices
    )
    return (cpu, *gpus)


def others_on(node: Node, meters: Mapping[tuple[NodeId, str], Meter]) -> list[tuple[Meter, int]]:
    """The meters of a node on which others hold another amount than was noted, each with what they hold of it now.

    Which devices they are is not told, only how many: those stay theirs that were, as long as no worker of ours has
    any of it, and the first free ones are next.
    """
    wanted: list[tuple[Meter, int]] = []
    cpu = meters.get((node.id, CPU_METER))
    if cpu is not None:
        wanted.append((cpu, max(0, min(node.others_cpu_milli, cpu.capacity_milli - cpu.held_milli))))
    devices = [meter for device in node.devices if (meter := meters.get((node.id, device.id))) is not None]
    free = sorted((meter for meter in devices if not meter.holders), key=lambda meter: not meter.others_milli)
    theirs = {meter.name for meter in free[: node.others_gpus]}
    wanted += [(meter, meter.capacity_milli if meter.name in theirs else 0) for meter in devices]
    return [(meter, milli) for meter, milli in wanted if milli != meter.others_milli]


def meters_held(allocation: Allocation) -> tuple[str, ...]:
    """Which meters of its node an allocation holds a part of; several slices of one device are one part of it."""
    return (CPU_METER, *dict.fromkeys([share.device_id for share in allocation.devices]))


def shares_of(allocation: Allocation) -> list[tuple[str, Holder]]:
    """Which meters of its node an allocation holds, and how much of each.

    The processors that come with a GPU are included in the GPU's price; alone, they are paid for.
    """
    launch, attempt, job, project = allocation.id, allocation.attempt_id, allocation.job_id, allocation.project_id
    of_device: dict[str, int] = {}
    for share in allocation.devices:
        of_device[share.device_id] = of_device.get(share.device_id, 0) + share.milli
    shares = [(CPU_METER, Holder(allocation.cpu_milli, launch, attempt, job, project, bool(of_device)))]
    alike = {milli: Holder(milli, launch, attempt, job, project) for milli in set(of_device.values())}
    shares += [(device, alike[milli]) for device, milli in of_device.items()]
    return shares
