"""At which site: gangs stay together, nothing leaves where it may be, and no better site with room is passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.core.yard import CALM, START, Yard, gpu_node, spec
from tidemill.control.siteoptions import site_options
from tidemill.core import choosing, feasible, place, rating, scheduling
from tidemill.core.admission import why_never
from tidemill.core.choosing import FAR_NS, Candidate, candidates, in_order
from tidemill.core.copying import Copying
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import gang_of
from tidemill.model.events import NodeFellSilent, SiteSet
from tidemill.model.fleet import Level, Link, Node, Site, SiteKind
from tidemill.model.ids import NodeId, SiteId
from tidemill.model.job import JobState
from tidemill.model.spec import Placement, Territory, Weight, WorkloadSpec
from tidemill.model.values import replace
from tidemill.units import HOUR_NS, KILOWATT_HOUR_MJ, MINUTE_NS, SECOND_NS

H100 = "H100-SXM"


def site(name: str, *, price: int = 1_000_000, **more: Any) -> Site:
    """A site whose GPUs cost so many micro-USD an hour."""
    known: dict[str, Any] = {"kind": SiteKind.ONPREM, "engine": "simulated", "prices": ((H100, price),)}
    return Site(id=SiteId(name), name=name, **(known | more))


def at(name: str, where: str, gpus: int = 8, **more: Any) -> Node:
    return gpu_node(name, gpus, site_id=SiteId(where), **more)


def placed(**said: Any) -> Placement:
    where = Territory(*(tuple(said.pop(name, ())) for name in ("sites", "countries", "kinds")))
    return Placement(where=where, **said)


def site_of(yard: Yard, job: str) -> set[str]:
    return {yard.world.nodes[NodeId(node)].site_id for node in yard.nodes_of(job)}


# -- gangs ------------------------------------------------------------------------------------------------------------


def test_a_gang_stays_within_a_site_and_waits_for_one_that_has_room() -> None:
    yard = Yard(nodes=(at("a", "x"), at("b", "y")), sites=(site("x"), site("y")))
    half = [yard.submit(spec(4, placement=placed(sites=[one]))) for one in ("x", "y")]
    gang = yard.submit(spec(4, nodes=2), runs_s=10)
    assert yard.state(gang) is JobState.QUEUED
    reason = yard.world.reasons[yard.job(gang).id]
    assert (reason.code, reason.subject) == ("NoSiteWithRoom", "placement.across_sites")
    assert "but not within one site" in reason.sentence
    may_lie = spec(4, nodes=2, placement=Placement(across_sites=True), max_duration_ns=10 * SECOND_NS)
    across = yard.submit(may_lie, runs_s=10)
    assert site_of(yard, across) == {"x", "y"}
    yard.run()
    assert yard.state(gang) is JobState.SUCCEEDED
    assert all(yard.state(one) is JobState.SUCCEEDED for one in half)


def test_a_gang_larger_than_any_site_is_turned_away_at_the_door_unless_it_may_lie_across() -> None:
    yard = Yard(nodes=(at("a", "x"), at("b", "y"), at("c", "y")), sites=(site("x"), site("y")))
    never = why_never(yard.world.fleet, spec(8, nodes=3))
    assert never is not None
    assert (never.code, never.needed, never.available) == ("NoSiteLargeEnough", "3 workers", "2")
    assert "The largest, y," in never.sentence
    assert why_never(yard.world.fleet, spec(8, nodes=2)) is None
    assert why_never(yard.world.fleet, spec(8, nodes=3, placement=Placement(across_sites=True))) is None
    assert why_never(yard.world.fleet, spec(8, nodes=3, placement=Placement(spread=Level.HOST))) is not None
    assert why_never(yard.world.fleet, spec(8, nodes=2, placement=Placement(spread=Level.SITE))) is None


def test_an_elastic_gang_grows_where_it_is() -> None:
    yard = Yard(nodes=(at("a", "x", 4), at("b", "y", 8)), sites=(site("x", price=1), site("y", price=2)))
    small = yard.submit(spec(2, nodes=4, nodes_min=2, placement=placed(weigh=((Weight.PRICE, 1),))), runs_s=100)
    yard.run(5)
    assert yard.nodes_of(small) == ["a", "a"], "there is room for more at y, but that is another site"
    assert yard.world.attempts[yard.job(small).id].workers == 2


# -- residency --------------------------------------------------------------------------------------------------------


def test_where_work_may_be_is_a_hard_constraint_and_each_site_says_why_not() -> None:
    berlin = site("berlin", country="DEU", kind=SiteKind.EDGE)
    paris, nowhere = site("paris", country="FRA", price=1), site("nowhere", price=1)
    yard = Yard(nodes=(at("a", "berlin"), at("b", "paris"), at("c", "nowhere")), sites=(berlin, paris, nowhere))
    home = spec(8, placement=placed(countries=["DEU"]))
    first, second = yard.submit(home, runs_s=10), yard.submit(home, runs_s=10)
    assert site_of(yard, first) == {"berlin"}
    assert yard.state(second) is JobState.QUEUED, "paris is free and cheaper, and not in Germany"
    line = yard.world.line_of(yard.job(second))
    told = {one.site: one for one in site_options(yard.world, line, now=yard.now, policy=CALM)}
    assert [one.reason.code for one in told.values() if one.reason] == [
        "NotEnoughFreeGpus", "SiteNotAllowed", "SiteNotAllowed",
    ]  # fmt: skip
    assert (told["berlin"].rank, told["paris"].rank) == (1, 0)
    assert "paris (onprem, FRA)" in told["paris"].reason.sentence  # type: ignore[union-attr]
    assert "country not known" in told["nowhere"].reason.sentence  # type: ignore[union-attr]
    never = why_never(yard.world.fleet, spec(1, placement=placed(countries=["ISL"], kinds=[SiteKind.CLOUD])))
    assert never is not None
    assert never.code == "NoSiteAllowed"
    assert "countries: ISL; kinds: cloud" in never.sentence
    yard.run()
    assert yard.state(second) is JobState.SUCCEEDED


def test_a_site_that_is_described_anew_is_looked_at_anew() -> None:
    yard = Yard(nodes=(at("a", "x"), at("b", "y")), sites=(site("x"), site("y")))
    job = yard.submit(spec(1, nodes=1, placement=placed(sites=["y"], kinds=[SiteKind.EDGE])), runs_s=10)
    assert yard.state(job) is JobState.QUEUED
    yard.turn([SiteSet(at_ns=yard.now, site=site("y", kind=SiteKind.EDGE))])
    assert site_of(yard, job) == {"y"}


def test_nothing_is_placed_at_a_site_that_is_cut_off_and_that_is_said() -> None:
    yard = Yard(nodes=(at("a", "x"), at("b", "y")), sites=(site("x", price=9), site("y", price=1)))
    runs = yard.submit(spec(1, placement=placed(sites=["y"])), runs_s=1000)
    yard.turn([NodeFellSilent(at_ns=yard.now, node_id=NodeId("b"), detail="not heard of")])
    cheap = spec(1, placement=placed(weigh=((Weight.PRICE, 1),)))
    elsewhere = yard.submit(cheap)
    assert site_of(yard, elsewhere) == {"x"}
    assert site_of(yard, runs) == {"y"}, "it keeps what it has"
    told = {
        one.site: one
        for one in site_options(yard.world, yard.world.line_of(yard.job(elsewhere)), now=yard.now, policy=CALM)
    }
    assert told["y"].reason is not None
    assert told["y"].reason.code == "SiteCutOff"
    assert told["y"].starts_ns == 0


# -- the order of sites -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "where"),
    [
        (Placement(), "cheap"),
        (placed(weigh=((Weight.PRICE, 1),)), "cheap"),
        (placed(weigh=((Weight.CARBON, 1),)), "clean"),
        (placed(near="shop"), "shop"),
        (placed(near="shop", weigh=((Weight.PRICE, 1),)), "cheap"),
        (placed(near="clean"), "clean"),
        (placed(weigh=((Weight.PRICE, 1_000), (Weight.CARBON, 9_000))), "clean"),
        (placed(weigh=((Weight.PRICE, 9_000), (Weight.CARBON, 1_000))), "cheap"),
    ],
)
def test_a_job_goes_where_what_weighs_says(said: Placement, where: str) -> None:
    sites = (
        site("cheap", price=1_000, carbon_mg_per_kwh=900_000, links=(Link(to=SiteId("shop"), latency_ns=9_000),)),
        site("clean", price=3_000, carbon_mg_per_kwh=20_000),
        site("shop", price=5_000, carbon_mg_per_kwh=500_000, kind=SiteKind.EDGE),
    )
    hot = [replace(device, busy_mw=700_000) for device in at("a", "cheap").devices]
    nodes = tuple(replace(at(one.name, one.name), devices=tuple(hot)) for one in sites)
    for order in permutations(range(3)):
        yard = Yard(nodes=tuple(nodes[one] for one in order), sites=tuple(sites[one] for one in order))
        assert site_of(yard, yard.submit(spec(1, placement=said))) == {where}


def test_copying_counts_in_the_start_and_in_the_price_and_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidemill.core.world.data_key", lambda _spec: ("images",))
    yard = Yard(nodes=(at("a", "x"), at("b", "y")), sites=(site("x", price=10), site("y", price=20)))
    yard.world.copies["images",] = {SiteId("x"): Copying(copy_ns=10 * MINUTE_NS, cost_micro=7)}
    assert site_of(yard, yard.submit(spec(1))) == {"y"}, "it starts sooner where the data is"
    assert site_of(yard, yard.submit(spec(1, placement=placed(weigh=((Weight.PRICE, 1),))))) == {"x"}
    yard.world.copies["images",] = {SiteId("y"): Copying(refused="The data set images stays in its country.")}
    yard.world.copies_are_new()
    yard.turn([])
    for _ in range(8):
        job = yard.submit(spec(1))
    assert yard.state(job) is JobState.QUEUED, "y has room, and its data may not be there"
    told = site_options(yard.world, yard.world.line_of(yard.job(job)), now=yard.now, policy=CALM)
    assert [(one.site, one.rank, one.reason.code) for one in told if one.reason] == [
        ("x", 1, "NotEnoughFreeGpus"),
        ("y", 0, "DataMayNotBeThere"),
    ]


def test_carbon_by_the_hour_moves_work_with_the_sun() -> None:
    sun = tuple(50_000 if 9 <= hour < 16 else 600_000 for hour in range(24))
    sites = (site("solar", carbon_hours=sun, carbon_mg_per_kwh=600_000), site("hydro", carbon_mg_per_kwh=100_000))
    hot = tuple(replace(device, busy_mw=700_000) for device in at("a", "solar").devices)
    nodes = tuple(replace(at(one.name, one.name), devices=hot) for one in sites)
    asked = spec(1, placement=placed(weigh=((Weight.CARBON, 1),)), max_duration_ns=HOUR_NS)
    midnight = START // (24 * HOUR_NS) * 24 * HOUR_NS
    for hour, where in ((3, "hydro"), (10, "solar"), (20, "hydro")):
        yard = Yard(nodes=nodes, sites=sites, now=midnight + hour * HOUR_NS)
        assert site_of(yard, yard.submit(asked)) == {where}


def test_carbon_over_hours_is_their_mean_however_it_is_cut() -> None:
    hours = tuple(range(0, 24_000, 1_000))
    one = site("x", carbon_hours=hours)
    day = rating.carbon_over(KILOWATT_HOUR_MJ, one, 0, 24 * HOUR_NS)
    assert day == sum(hours) // 24
    assert rating.carbon_over(KILOWATT_HOUR_MJ, one, 0, 7 * 24 * HOUR_NS) == day
    assert rating.carbon_over(KILOWATT_HOUR_MJ, one, 5 * HOUR_NS, 6 * HOUR_NS) == hours[5]
    assert (
        rating.carbon_over(KILOWATT_HOUR_MJ, one, 23 * HOUR_NS + 30 * MINUTE_NS, 24 * HOUR_NS + 30 * MINUTE_NS)
        == 11_500
    )
    assert rating.carbon_over(KILOWATT_HOUR_MJ, one, 0, 0) == 0
    cut = sum(rating.carbon_over(KILOWATT_HOUR_MJ // 24, one, at * HOUR_NS, (at + 1) * HOUR_NS) for at in range(24))
    assert abs(cut - day) <= 24


# -- what is charged --------------------------------------------------------------------------------------------------


def test_a_site_charges_by_its_own_card_and_tariff_and_what_was_used_before_a_change_costs_what_it_did() -> None:
    x = site("x", price=3_600_000_000, tariff_micro_per_kwh=0)
    yard = Yard(nodes=(at("a", "x"), at("b", "y")), sites=(x, site("y", price=7_200_000_000)))
    yard.submit(spec(1, placement=placed(sites=["x"])), runs_s=100)
    yard.submit(spec(1, placement=placed(sites=["y"])), runs_s=100)
    yard.run(10)
    yard.turn([SiteSet(at_ns=yard.now, site=replace(x, prices=((H100, 36_000_000_000),)))])
    yard.run()
    paid: dict[tuple[str, str], int] = {}
    for _, plan in yard.plans:
        for line in plan.ledger:
            if line.usage.launch_id and line.usage.meter != "cpu":
                key = (line.usage.node_id, line.rate_card)
                paid[key] = paid.get(key, 0) + line.amount_micro
    assert sorted(paid.values()) == [10_000_000, 200_000_000, 900_000_000]
    assert len({card for _, card in paid}) == 3


def test_a_tariff_charges_the_electricity_of_what_is_held_and_not_of_what_is_idle() -> None:
    card = rating.card_of
    hot = tuple(replace(device, busy_mw=1_000_000) for device in at("a", "x", 2).devices)
    charging = site("x", price=0, tariff_micro_per_kwh=250_000, pue_milli=2_000)
    yard = Yard(nodes=(replace(at("a", "x", 2), devices=hot),), sites=(charging, site("y")))
    yard.submit(spec(1, placement=placed(sites=["x"])), runs_s=3600)
    yard.run()
    lines = [line for _, plan in yard.plans for line in plan.ledger]
    held = sum(line.amount_micro for line in lines if line.usage.launch_id)
    assert held == 500_000, "a kilowatt for an hour, twice over by PUE, at 0.25 USD"
    assert not any(line.amount_micro for line in lines if not line.usage.launch_id)
    assert card(yard.world.rates, charging).id == lines[0].rate_card != yard.world.rates.id


# -- the pure order ---------------------------------------------------------------------------------------------------

AMOUNTS = st.sampled_from([0, 0, 0, 1, 2, 1_999, 2_000, 10**15])
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        site_id=st.sampled_from([SiteId(name) for name in "abcdef"]),
        start_ns=AMOUNTS,
        price_micro=AMOUNTS,
        carbon_mg=AMOUNTS,
        latency_ns=AMOUNTS | st.just(FAR_NS),
    ),
    max_size=6,
    unique_by=lambda one: one.site_id,
)
WEIGHTS = st.lists(
    st.tuples(st.sampled_from([*Weight]), st.integers(1, 10**6)), max_size=4, unique_by=lambda one: one[0]
)
NAMES = {
    Weight.START: "start_ns",
    Weight.PRICE: "price_micro",
    Weight.CARBON: "carbon_mg",
    Weight.LATENCY: "latency_ns",
}


def look_at_an_order(found: list[Candidate], weigh: list[tuple[Weight, int]], seed: int) -> None:
    order = in_order(found, weigh)
    shuffled = [found[at] for at in np.random.default_rng(seed).permutation(len(found))]
    assert in_order(shuffled, weigh) == order, "the order in which sites are given does not matter"
    assert sorted(one for pool in order for one in pool) == sorted(one.site_id for one in found)
    number = {one: at for at, pool in enumerate(order) for one in pool}
    for one in found:
        for other in found:
            values = [(getattr(one, name), getattr(other, name)) for name in NAMES.values()]
            if all(mine <= theirs for mine, theirs in values):
                assert number[one.site_id] <= number[other.site_id], "what is no worse in anything is not after"
            if len(weigh) == 1 and getattr(one, NAMES[weigh[0][0]]) < getattr(other, NAMES[weigh[0][0]]):
                assert number[one.site_id] < number[other.site_id], "the one thing that weighs decides"


@given(CANDIDATES, WEIGHTS, st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_the_order_is_that_of_what_weighs_and_of_nothing_else(
    found: list[Candidate], weigh: list[tuple[Weight, int]], seed: int
) -> None:
    look_at_an_order(found, weigh, seed)


# -- whole histories --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A cloud of a few sites and what is submitted to it, one after the other."""

    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    asked: tuple[tuple[WorkloadSpec, float], ...] = field(repr=False)


@st.composite
def worlds(draw: st.DrawFn) -> Setting:
    names = ["p", "q", "r"][: draw(st.integers(2, 3))]
    sites = tuple(
        site(
            name,
            price=draw(st.sampled_from([1_000_000, 2_000_000, 3_000_000])),
            country=draw(st.sampled_from(["DEU", "FRA", ""])),
            kind=draw(st.sampled_from([*SiteKind])),
            carbon_mg_per_kwh=draw(st.sampled_from([0, 100_000])),
        )
        for name in names
    )
    nodes = tuple(
        at(f"{where}{number}", where, draw(st.sampled_from([1, 2, 4])), cpus=8)
        for where in names
        for number in range(draw(st.integers(1, 2)))
    )
    asked = []
    for _ in range(draw(st.integers(1, 8))):
        workers = draw(st.sampled_from([1, 1, 2, 3]))
        said = placed(
            countries=draw(st.sampled_from([(), ("DEU",), ("DEU", "FRA")])),
            kinds=draw(st.sampled_from([(), (), (SiteKind.EDGE, SiteKind.CLOUD)])),
            across_sites=draw(st.sampled_from([False, False, True])),
            weigh=draw(st.sampled_from([(), ((Weight.PRICE, 1),), ((Weight.CARBON, 1),)])),
        )
        elastic = draw(st.booleans())
        what = spec(
            draw(st.sampled_from([1, 1, 2])),
            nodes=workers,
            nodes_min=1 if elastic and workers > 1 else 0,
            placement=said,
        )
        asked.append((what, draw(st.sampled_from([30.0, 300.0]))))
    return Setting(sites=sites, nodes=nodes, asked=tuple(asked))


def may_be(one: Site, where: Territory) -> bool:
    """What a spec says of sites, read once more and apart from the scheduler."""
    if where.countries and one.country not in where.countries:
        return False
    return not where.kinds or one.kind in where.kinds


def play(world: Setting, *, order: int = 1) -> list[tuple[str, ...]]:
    """Where each job was put first; audited after each turn."""
    yard = Yard(nodes=world.nodes[::order], sites=world.sites[::order])
    sites = {one.id: one for one in world.sites}
    specs: dict[str, WorkloadSpec] = {}
    first: dict[str, tuple[str, ...]] = {}
    for number, (what, runs_s) in enumerate(world.asked):
        free = {
            node.id: (int(yard.world.fleet.gpu_free[row].sum()) // 1000, int(yard.world.fleet.cpu_free[row]))
            for node, row in zip(yard.world.fleet.nodes, range(99), strict=False)
        }
        waits = any(yard.state(one) is JobState.QUEUED for one in specs)
        job = yard.submit(what, runs_s=runs_s)
        specs[job] = what
        for one, asked in specs.items():
            nodes = yard.nodes_of(one)
            there = {sites[yard.world.nodes[NodeId(node)].site_id] for node in nodes}
            assert all(may_be(each, asked.placement.where) for each in there), f"{one} is where it may not be"
            assert len(there) <= 1 or asked.placement.across_sites, f"{one} lies across sites"
            first.setdefault(one, tuple(nodes)) if nodes else None
        if what.nodes == 1 and not waits:
            gpus = what.resources.gpus.count if what.resources.gpus else 0
            roomy = {
                yard.world.nodes[NodeId(name)].site_id
                for name, (gpu, cpu) in free.items()
                if gpu >= gpus and cpu >= 1000
            }
            prices = {one: dict(sites[one].prices)[H100] for one in roomy if may_be(sites[one], what.placement.where)}
            if prices and what.placement.weigh != ((Weight.CARBON, 1),):
                [chosen] = site_of(yard, job) or {None}
                assert chosen is not None, "there is room where it may be"
                assert prices[SiteId(chosen)] == min(prices.values()), "a cheaper site with room was passed over"
        if number % 3 == 2:
            yard.run(40)
    return [first.get(one, ()) for one in specs]


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_nothing_leaves_where_it_may_be_and_no_cheaper_site_is_passed_over(world: Setting) -> None:
    assert play(world) == play(world, order=-1), "the order in which sites are known does not matter"


def countries_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    true = feasible.is_within
    monkeypatch.setattr(feasible, "is_within", lambda where, one: true(replace(where, countries=()), one))


def the_dearest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    true = choosing.in_order
    monkeypatch.setattr(choosing, "in_order", lambda found, weigh=(): true(found, weigh)[::-1])


def gangs_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "stays_in_site", lambda fleet, gang: False)


def gangs_grow_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "open_beside", lambda fleet, gang, rows: None)


def the_site_that_is_known_first(monkeypatch: pytest.MonkeyPatch) -> None:
    true = choosing.preferred

    def first(world: Any, line: Any, **how: Any) -> Any:
        known = [one for one in world.sites if one in world.fleet.site_ids]
        pools = tuple(choosing.rows_at(world.fleet, (one,)) for one in known)
        return (lambda _shape: pools) if true(world, line, **how) is not None else None

    monkeypatch.setattr(scheduling, "preferred", first)


HISTORY_BUGS = (
    countries_do_not_count,
    the_dearest_first,
    gangs_lie_anywhere,
    gangs_grow_anywhere,
    the_site_that_is_known_first,
)


@pytest.mark.parametrize("plant", HISTORY_BUGS, ids=lambda one: one.__name__)
def test_a_planted_bug_in_a_history_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    @given(worlds())
    @settings(max_examples=2_000, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    def caught(world: Setting) -> None:
        assert play(world) == play(world, order=-1)

    with pytest.raises((AssertionError, HypothesisException, ExceptionGroup)):
        caught()


def shares_round_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_share", lambda value, worst: -value)


def one_thing_is_only_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    true = choosing._rank
    monkeypatch.setattr(choosing, "_rank", lambda one, weigh, worst: true(one, (*weigh, *weigh), worst))


def ties_by_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(10**9))
    true = choosing._rank
    monkeypatch.setattr(choosing, "_rank", lambda *args: (*true(*args), next(count)))


@pytest.mark.parametrize(
    "plant", [shares_round_up, one_thing_is_only_a_share, ties_by_the_order_given], ids=lambda one: one.__name__
)
def test_a_planted_bug_in_the_order_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    @given(CANDIDATES, WEIGHTS, st.integers(0, 99))
    @settings(max_examples=2_000, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    def caught(found: list[Candidate], weigh: list[tuple[Weight, int]], seed: int) -> None:
        look_at_an_order(found, weigh, seed)

    with pytest.raises((AssertionError, HypothesisException, ExceptionGroup)):
        caught()


# -- one site ---------------------------------------------------------------------------------------------------------


def test_with_one_site_nothing_is_chosen_and_nothing_is_worked_out() -> None:
    yard = Yard(nodes=(at("a", "s"), at("b", "s")))
    asked = spec(1, nodes=2, placement=placed(weigh=((Weight.PRICE, 1),), near="s"))
    job = yard.submit(asked)
    line = yard.world.line_of(yard.job(job))
    assert choosing.preferred(yard.world, line, now=yard.now, policy=CALM) is None
    assert not any(key[0] == "sites" for key in yard.world.fleet.cache if isinstance(key, tuple))
    assert site_options(yard.world, line, now=yard.now, policy=CALM) == ()


def test_sites_that_do_not_differ_are_one_pool() -> None:
    yard = Yard(nodes=(at("a", "x", cpus=8), at("b", "y", cpus=8)), sites=(site("x"), site("y")))
    job = yard.submit(spec(1))
    pools = choosing.preferred(yard.world, yard.world.line_of(yard.job(job)), now=yard.now, policy=CALM)
    assert pools is not None
    assert pools(gang_of(spec(1)).choices[0]) == (None,)


def test_candidates_are_integers_and_price_what_a_gang_takes_there() -> None:
    yard = Yard(nodes=(at("a", "x"), at("b", "y")), sites=(site("x", price=10), site("y", price=20, pue_milli=1_500)))
    line = yard.world.line_of(yard.job(yard.submit(spec(2, nodes=3, max_duration_ns=2 * HOUR_NS))))
    found = candidates(yard.world, line, line.gang.choices[0], now=yard.now, policy=CALM)
    assert [(one.site_id, one.price_micro) for one in found] == [("x", 10 * 2 * 3 * 2), ("y", 20 * 2 * 3 * 2)]
    assert found[1].energy_mj == 3 * 2 * 2 * 7_200 * 1_500 // 1_000


def test_fleets_without_sites_are_as_before() -> None:
    fleet = FleetArrays()
    fleet.rebuild([at("a", "x"), at("b", "x")])
    assert fleet.site_ids == ["x"]
    assert why_never(fleet, spec(8, nodes=2)) is None
