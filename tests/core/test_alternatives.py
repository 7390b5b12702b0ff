"""What a quote offers beside what was asked: sooner, cheaper or cleaner, and never what is no better."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.yard import CALM, PROJECTS, SITE, Yard, gpu_node, spec
from tidemill.control import alternatives
from tidemill.control.alternatives import worth_telling
from tidemill.control.answers import price
from tidemill.control.forecast import copy_of, likely_start, options_for
from tidemill.model.fleet import SPOT_TAINT
from tidemill.model.ids import OrganizationId, PrincipalId, WorkloadId, job_id
from tidemill.model.job import Workload
from tidemill.model.plan import Option
from tidemill.model.resources import GpuRequest
from tidemill.model.spec import WorkloadSpec
from tidemill.model.values import replace
from tidemill.units import HOUR_NS

PRICED = replace(SITE, prices=(("A100-80GB-SXM", 1_000_000), ("H100-SXM", 4_000_000)))


def offered(yard: Yard, wanted: WorkloadSpec, *, feasible: bool = True) -> dict[str, Option]:
    """The options beside a workload that would be submitted now, by what is different."""
    workload = Workload(
        id=WorkloadId("wl_asked"), organization_id=OrganizationId("o"), project_id=PROJECTS[0].id,
        principal_id=PrincipalId("u"), spec=wanted, submitted_ns=yard.now,
    )  # fmt: skip
    copy = copy_of(yard.world, CALM, now=yard.now)
    starts = likely_start(copy, [job_id(workload.id, 0)], submitted=[workload]) if feasible else None
    answer = replace(price(yard.world, workload, now=yard.now, policy=CALM), feasible=feasible)
    return {one.change: one for one in options_for(copy, workload, answer, starts or 0)}


def hours(count: float) -> dict[str, int]:
    return {"max_duration_ns": round(count * HOUR_NS)}


def test_another_gpu_that_is_cheaper_is_offered_though_it_starts_no_sooner() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b", model="A100-80GB-SXM")), sites=(PRICED,))
    found = offered(yard, spec(GpuRequest(model="H100", count=1), **hours(1)))
    other = found["resources.gpus: A100-80GB-SXM:1"]
    assert other.starts_ns == yard.now
    assert other.finish_ns > yard.now + 2 * HOUR_NS, "it is slower"
    assert other.amount_micro < 4_000_000
    assert "capacity: spot" not in found, "it would start at the same time for the same price"


def test_capacity_that_may_be_taken_back_is_offered_where_it_starts_sooner() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b", taints=(SPOT_TAINT,))), sites=(PRICED,))
    yard.submit(spec(8, **hours(5)), runs_s=18_000, project="p1")
    yard.run(10)
    found = offered(yard, spec(8, **hours(1)))
    assert found.keys() >= {"capacity: spot"}
    assert found["capacity: spot"].starts_ns == yard.now


def test_more_gpus_than_a_machine_has_are_offered_over_more_machines() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), sites=(PRICED,))
    found = offered(yard, spec(GpuRequest(model="H100", count=16), **hours(1)), feasible=False)
    assert "nodes: 2, resources.gpus: H100:8" in found
    assert found["nodes: 2, resources.gpus: H100:8"].finish_ns == yard.now + HOUR_NS


def test_a_cleaner_hour_is_offered_and_only_before_the_job_has_to_start() -> None:
    at_night = (30_000,) * 6 + (400_000,) * 18  # mg CO2e a kWh, by hour of the day
    yard = Yard(nodes=(gpu_node("a"),), sites=(replace(PRICED, carbon_hours=at_night),))
    assert yard.now // HOUR_NS % 24 == 22
    found = offered(yard, spec(8, **hours(2)))
    [later] = [one for change, one in found.items() if change == "start_after: 2023-11-15T00:00:00Z"]
    assert later.starts_ns == (yard.now // HOUR_NS + 2) * HOUR_NS
    as_asked = price(yard.world, yard_workload(yard, spec(8, **hours(2))), now=yard.now, policy=CALM)
    assert later.carbon_mg * 10 < as_asked.carbon_mg
    soon = spec(8, start_before_ns=yard.now + HOUR_NS // 2, **hours(2))
    assert not [change for change in offered(yard, soon) if change.startswith("start_after")]


def yard_workload(yard: Yard, wanted: WorkloadSpec) -> Workload:
    return Workload(
        id=WorkloadId("wl_x"), organization_id=OrganizationId("o"), project_id=PROJECTS[0].id,
        principal_id=PrincipalId("u"), spec=wanted, submitted_ns=yard.now,
    )  # fmt: skip


OPTIONS = st.builds(
    lambda name, finish, amount, carbon: Option(
        change=f"o{name}", starts_ns=1, finish_ns=finish, amount_micro=amount, energy_mj=0, carbon_mg=carbon
    ),
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(0, 900),
    st.integers(0, 900),
)


def check_offers(found: list[Option], asked: Option | None) -> None:
    """Three at most, each better in something, and the soonest, the cheapest and the cleanest of the better ones."""
    told = worth_telling(found, asked=asked)
    assert len(told) <= 3
    assert [one.finish_ns for one in told] == sorted(one.finish_ns for one in told)
    better = [
        one
        for one in found
        if asked is None
        or one.finish_ns < asked.finish_ns
        or one.amount_micro < asked.amount_micro - asked.amount_micro // 50
        or one.carbon_mg < asked.carbon_mg - asked.carbon_mg // 50
    ]
    assert set(told) <= set(better)
    if better:
        assert min(one.finish_ns for one in told) == min(one.finish_ns for one in better)
        assert min(one.amount_micro for one in told) == min(one.amount_micro for one in better)
        assert min(one.carbon_mg for one in told) == min(one.carbon_mg for one in better)


@given(found=st.lists(OPTIONS, max_size=8), asked=st.none() | OPTIONS)
@settings(max_examples=200, deadline=None)
def test_what_is_told_is_better_in_something(found: list[Option], asked: Option | None) -> None:
    check_offers(found, asked)


def test_an_offer_that_is_no_better_is_found_out(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(alternatives, "_is_better", lambda *_: True)
    same = Option(change="o", starts_ns=1, finish_ns=2, amount_micro=3, energy_mj=0, carbon_mg=4)
    try:
        check_offers([same], same)
    except AssertionError:
        return
    raise AssertionError("the planted bug was not found")
