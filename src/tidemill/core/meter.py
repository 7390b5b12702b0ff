"""⑥ Usage intervals that tile time: for each meter of a node, what is used plus what is idle is capacity x time.

A meter is one device, or the processors of a node. It remembers since when it is open and who holds how much.
Whenever that changes, and at least every so often, the stretch since then is cut off: one interval for each
holder and one for what nobody held. No instant is counted twice, none is left out.

Energy of a stretch is the difference of the hardware's counter where it is known at both ends, shared out by
what each held, down to the last millijoule; else it is estimated from the device's idle and busy power.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tidemill.model.fleet import Node
from tidemill.model.ids import AttemptId, JobId, LaunchId, NodeId, ProjectId
from tidemill.model.job import Allocation
from tidemill.model.ledger import CPU_METER, Evidence, UsageInterval
from tidemill.units import MILLI, SECOND_NS


class Holder(NamedTuple):
    """Who holds part of a meter."""

    milli: int
    attempt_id: AttemptId
    job_id: JobId
    project_id: ProjectId
    included: bool


@dataclass(slots=True)
class Meter:
    """One meter of one node. ``counter_mj`` is the hardware's reading at ``since_ns``, None when not known."""

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

    def read(self, energy_mj: int) -> None:
        """Take note of the hardware's counter. A counter that went back was reset: its past is unknown."""
        if self.latest_mj is not None and energy_mj < self.latest_mj:
            self.counter_mj = None
        self.latest_mj = energy_mj
        if self.counter_mj is None and not self.holders:
            self.counter_mj = energy_mj

    def cut(self, now: int) -> list[UsageInterval]:
        """The intervals from ``since_ns`` until ``now``, after which the meter is open from ``now``.

        Nothing when no time has passed.
        """
        since = self.since_ns
        if now <= since:
            return []
        measured = None
        if self.counter_mj is not None and self.latest_mj is not None and self.latest_mj >= self.counter_mj:
            measured = self.latest_mj - self.counter_mj
        evidence = Evidence.ESTIMATED if measured is None else Evidence.MEASURED
        intervals, left_mj, left_milli = [], measured or 0, self.capacity_milli
        for launch, holder in self.holders.items():
            if measured is None:
                energy = _telescoped(self.busy_mw * holder.milli, MILLI * SECOND_NS, since, now)
            else:
                energy = left_mj * holder.milli // max(left_milli, 1)
                left_mj -= energy
            left_milli -= holder.milli
            intervals.append(
                UsageInterval(
                    node_id=self.node_id,
                    meter=self.name,
                    resource=self.resource,
                    from_ns=since,
                    to_ns=now,
                    milli=holder.milli,
                    energy_mj=energy,
                    evidence=evidence,
                    launch_id=launch,
                    attempt_id=holder.attempt_id,
                    job_id=holder.job_id,
                    project_id=holder.project_id,
                    included=holder.included,
                )
            )
        if left_milli > 0:
            if measured is None:
                left_mj = _telescoped(self.idle_mw * left_milli, MILLI * SECOND_NS, since, now)
            intervals.append(
                UsageInterval(
                    node_id=self.node_id,
                    meter=self.name,
                    resource=self.resource,
                    from_ns=since,
                    to_ns=now,
                    milli=left_milli,
                    energy_mj=left_mj,
                    evidence=evidence,
                )
            )
        self.since_ns = now
        self.counter_mj = self.latest_mj
        return intervals


def _telescoped(rate: int, divisor: int, from_ns: int, to_ns: int) -> int:
    """``rate * (to - from) / divisor`` in integers that add up the same wherever a stretch is cut."""
    return rate * to_ns // divisor - rate * from_ns // divisor


def meters_of(node: Node, *, now: int) -> tuple[Meter, ...]:
    """A meter for the node's processors and one for each device, open from ``now``."""
    cpu = Meter(node.id, CPU_METER, CPU_METER, node.cpu_milli, node.cpu_idle_mw, node.cpu_busy_mw, now)
    gpus = (
        Meter(node.id, device.id, device.model, MILLI, device.idle_mw, device.busy_mw, now) for device in node.devices
    )
    return (cpu, *gpus)


def meters_held(allocation: Allocation) -> tuple[str, ...]:
    """Which meters of its node an allocation holds a part of; several slices of one device are one part of it."""
    return (CPU_METER, *dict.fromkeys([share.device_id for share in allocation.devices]))


def shares_of(allocation: Allocation) -> list[tuple[str, Holder]]:
    """Which meters of its node an allocation holds, and how much of each.

    The processors that come with a GPU are included in the GPU's price; alone, they are paid for.
    """
    attempt, job, project = allocation.attempt_id, allocation.job_id, allocation.project_id
    of_device: dict[str, int] = {}
    for share in allocation.devices:
        of_device[share.device_id] = of_device.get(share.device_id, 0) + share.milli
    shares = [(CPU_METER, Holder(allocation.cpu_milli, attempt, job, project, bool(of_device)))]
    shares += [(device, Holder(milli, attempt, job, project, False)) for device, milli in of_device.items()]
    return shares
