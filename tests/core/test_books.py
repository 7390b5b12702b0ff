"""What is cut together is in the books as if each meter had been cut alone, and sums are those of the lines."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core.meter import Meter, Stretch, cut_together
from tidemill.core.rating import rate_all
from tidemill.model.fleet import Site
from tidemill.model.ids import AttemptId, JobId, LaunchId, NodeId, ProjectId
from tidemill.model.ledger import Holder, Ledger, Sums
from tidemill.units import MILLI, SECOND_NS

SITE = Site(id="s", name="s", kind="onprem", engine="local", pue_milli=1_370, carbon_mg_per_kwh=377_123, tariff_micro_per_kwh=230_000)  # type: ignore[arg-type]  # fmt: skip
PRICES = {"H100-SXM": 2_990_001, "L4": 440_003}
NOW = 1_704_067_200 * SECOND_NS


@dataclass(frozen=True)
class Device:
    """Few values of each, so that neighbours are often alike and often nearly."""

    resource: str
    since_ns: int
    held: tuple[int, ...]
    others: int
    idle_mw: int
    read_mj: tuple[int, ...]

    def meter(self, number: int) -> Meter:
        meter = Meter(NodeId("n"), f"gpu{number}", self.resource, MILLI, self.idle_mw, 700_001, NOW - self.since_ns)
        for energy in self.read_mj:
            meter.read(energy, now=NOW)
        for rank, milli in enumerate(self.held):
            launch = LaunchId(f"l{rank}")
            holder = Holder(milli, launch, AttemptId("a"), JobId("j"), ProjectId(f"p{rank}"), rank == 1)
            meter.holders[launch] = holder
        meter.others_milli = self.others
        return meter


DEVICES = st.lists(
    st.builds(
        Device,
        resource=st.sampled_from(list(PRICES)),
        since_ns=st.sampled_from([0, 1, 3_600 * SECOND_NS + 7]),
        held=st.sampled_from([(), (MILLI,), (MILLI,), (300, 333)]),
        others=st.sampled_from([0, 0, 250]),
        idle_mw=st.sampled_from([70_003, 70_003, 71_000]),
        read_mj=st.sampled_from([(), (), (5,), (5, 1_000_003)]),
    ),
    max_size=9,
)


def booked(stretches: list[Stretch]) -> Ledger:
    return Ledger(tuple(rate_all(stretches, lambda _site: ("card", PRICES), lambda _node: SITE)))


def check(devices: list[Device]) -> None:
    together = [device.meter(number) for number, device in enumerate(devices)]
    alone = [device.meter(number) for number, device in enumerate(devices)]
    stretches = cut_together(together, NOW)
    ledger = booked(stretches)
    assert list(ledger) == list(booked([stretch for meter in alone if (stretch := meter.cut(NOW)) is not None]))
    assert together == alone, "every meter goes on from now"
    assert len(ledger) == len(list(ledger))
    expected: dict[ProjectId, Sums] = {}
    for line in ledger:
        sums = expected.setdefault(line.usage.project_id, Sums())
        sums.lines += 1
        sums.amount_micro += line.amount_micro
        sums.energy_mj += line.energy_mj
        sums.carbon_mg += line.carbon_mg
    assert ledger.sums() == expected
    for stretch in stretches:
        stretch.join()
    assert together == [device.meter(number) for number, device in enumerate(devices)], "a cut can be taken back"


@given(DEVICES)
@settings(deadline=None)
def test_what_is_cut_together_is_in_the_books_as_if_it_were_cut_alone(devices: list[Device]) -> None:
    check(devices)


def test_devices_that_counted_the_same_have_one_entry() -> None:
    busy = Device("H100-SXM", SECOND_NS, (MILLI,), 0, 70_003, ())
    idle = Device("H100-SXM", SECOND_NS, (), 0, 70_003, ())
    meters = [device.meter(number) for number, device in enumerate([busy, busy, idle, idle, idle])]
    assert [len(entry.meters) for entry in booked(cut_together(meters, NOW)).entries] == [2, 3]


IDLE = Device("H100-SXM", SECOND_NS, (), 0, 70_003, ())
OTHERWISE = [
    replace(IDLE, since_ns=2 * SECOND_NS),
    replace(IDLE, held=(MILLI,)),
    replace(IDLE, others=250),
    replace(IDLE, resource="L4"),
    replace(IDLE, idle_mw=71_000),
]


@pytest.mark.parametrize(("forgotten", "other"), list(enumerate(OTHERWISE)))
def test_the_property_finds_what_is_forgotten_of_meters_that_differ(
    forgotten: int, other: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check([IDLE, other])

    def less(self: Meter) -> tuple[object, ...] | None:
        found = original(self)
        return None if found is None else found[:forgotten] + found[forgotten + 1 :]

    original = Meter._estimates
    monkeypatch.setattr(Meter, "_estimates", less)
    with pytest.raises(AssertionError):
        check([IDLE, other])
