"""When machines are rented and given back, as tables; and what always holds, each with a planted bug that is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core import bursting
from tidemill.core.bursting import (
    BurstPolicy,
    Close,
    Decision,
    Phase,
    Release,
    Rented,
    WaitingJob,
    burst,
    cost_micro,
    month_of,
    spent_this_month,
    waiting_rate,
)
from tidemill.core.feasible import Shape
from tidemill.core.place import Gang
from tidemill.model.cloud import Billing, Market, Offer, Rental, RentalState
from tidemill.model.ids import JobId, RentalId, SiteId
from tidemill.model.resources import GpuRequest, Resources, parse_gpus
from tidemill.model.spec import Kind, WorkloadSpec
from tidemill.units import DAY_NS, HOUR_NS, MINUTE_NS, SECOND_NS, USD_MICRO

GB = 1024**3
NOW = 1_700_000_000 * SECOND_NS
"""In the middle of a month."""
BY_SECOND = Billing(granularity_ns=SECOND_NS, minimum_ns=MINUTE_NS)
BY_HOUR = Billing(granularity_ns=HOUR_NS)
RICH = BurstPolicy(max_instances=10, max_micro_per_hour=1_000 * USD_MICRO, max_micro_per_month=100_000 * USD_MICRO)


def offer(name: str = "g.1", *, usd: float = 1.0, gpus: int = 1, model: str = "T4", **more: Any) -> Offer:
    market = more.pop("market", Market.ON_DEMAND)
    known: dict[str, Any] = {
        "id": f"{name}/a/{market}",
        "instance_type": name,
        "region": "here-1",
        "zone": "here-1a",
        "market": market,
        "cpu_milli": 8_000,
        "memory_bytes": 32 * GB,
        "disk_bytes": 100 * GB,
        "price_micro_per_hour": int(usd * USD_MICRO),
        "most_micro_per_hour": int(usd * USD_MICRO),
        "gpu_model": model if gpus else "",
        "gpu_count": gpus,
        "gpu_memory_bytes": 16 * GB if gpus else 0,
        "labels": (("country", "IRL"), ("region", "here-1"), ("zone", "here-1a")),
    }
    return Offer(**(known | more))


def gang(gpus: str | float = 1, *, workers: int = 1, smallest: int = 0, **more: Any) -> Gang:
    labels = more.pop("labels", ())
    shape = Shape(Resources(gpus=parse_gpus(gpus), cpu_milli=more.pop("cpu_milli", 1_000), **more), False, labels, ())
    return Gang(choices=(shape,), workers=workers, smallest=smallest or workers)


def job(
    name: str = "j1", *, waits: int = 5 * HOUR_NS, usd: float = 3.0, of: Gang | None = None, **more: Any
) -> WaitingJob:
    """A job of an hour that would wait for 5 hours at 3 dollars each."""
    known: dict[str, Any] = {
        "id": JobId(name),
        "gang": of or gang(),
        "duration_ns": HOUR_NS,
        "forecast_ns": NOW + waits if waits else 0,
        "waiting_micro_per_hour": int(usd * USD_MICRO),
    }
    return WaitingJob(**(known | more))


def rented(name: str = "r1", *, phase: Phase = Phase.OPEN, of: Offer | None = None, **more: Any) -> Rented:
    return Rented(id=RentalId(name), offer=of or offer(), phase=phase, **more)


def decide(jobs: list[WaitingJob], offers: list[Offer], there: list[Rented] | None = None, **more: Any) -> Decision:
    known: dict[str, Any] = {"policy": RICH, "billing": BY_SECOND, "spent_micro": 0, "now": NOW}
    return burst(jobs, offers, there or [], **(known | more))


def why(decision: Decision, name: str = "j1") -> str:
    return dict(decision.refused)[JobId(name)].code


# -- renting ----------------------------------------------------------------------------------------------------------


def test_a_job_whose_waiting_costs_more_gets_the_cheapest_machine_that_fits() -> None:
    decision = decide([job()], [offer("big", usd=4, gpus=4), offer("none", usd=0.1, gpus=0), offer("small", usd=1)])
    assert [(one.offer.instance_type, one.jobs) for one in decision.rent] == [("small", ("j1",))]
    assert not decision.refused


def test_waiting_is_cheaper_when_it_is_short_or_costs_nothing() -> None:
    assert why(decide([job(usd=0)], [offer()])) == "WaitingIsCheaper"
    assert why(decide([job(waits=20 * MINUTE_NS)], [offer()])) == "WaitingIsCheaper"
    assert why(decide([job(waits=2 * MINUTE_NS, usd=1e6)], [offer(usd=0.01)])) == "WaitingIsCheaper"


def test_at_the_same_price_it_waits() -> None:
    one = job(waits=0, usd=1, duration_ns=HOUR_NS)
    needs = RICH.boot_ns + HOUR_NS + RICH.idle_ns
    price = cost_micro(USD_MICRO, needs, BY_SECOND) + USD_MICRO * RICH.boot_ns // HOUR_NS
    even = replace(RICH, horizon_ns=HOUR_NS)
    here = price - USD_MICRO
    assert why(decide([replace(one, here_micro=here)], [offer()], policy=even)) == "WaitingIsCheaper"
    assert decide([replace(one, here_micro=here + 1)], [offer()], policy=even).rent


def test_without_a_forecast_it_waits_for_the_horizon_at_least() -> None:
    assert decide([job(waits=0, usd=1)], [offer()]).rent
    assert why(decide([job(waits=0, usd=1)], [offer()], policy=replace(RICH, horizon_ns=HOUR_NS))) == "WaitingIsCheaper"


def test_what_running_here_costs_counts_against_renting() -> None:
    assert why(decide([job(usd=0.1)], [offer()])) == "WaitingIsCheaper"
    assert decide([job(usd=0.1, here_micro=2 * USD_MICRO)], [offer()]).rent


def test_a_deadline_is_met_for_whatever_waiting_costs() -> None:
    late = job(usd=0, start_before_ns=NOW + HOUR_NS)
    assert decide([late], [offer()]).rent
    assert why(decide([late], [offer()], policy=replace(RICH, deadlines=False))) == "WaitingIsCheaper"
    in_time = job(usd=0, start_before_ns=NOW + 6 * HOUR_NS)
    assert why(decide([in_time], [offer()])) == "WaitingIsCheaper"


def test_nothing_is_rented_for_a_deadline_that_no_machine_would_meet() -> None:
    late = job(usd=100, start_before_ns=NOW + MINUTE_NS)
    assert why(decide([late], [offer()])) == "NoOfferInTime"
    quick = decide([late], [offer(), offer("quick", usd=5)], boots={"quick": 30 * SECOND_NS})
    assert [one.offer.instance_type for one in quick.rent] == ["quick"]


def test_a_gang_gets_as_many_machines_as_it_needs_and_all_or_none() -> None:
    wide = job(of=gang(2, workers=4), usd=50)
    decision = decide([wide], [offer("two", gpus=4, usd=2)])
    assert [(one.offer.instance_type, one.jobs) for one in decision.rent] == [("two", ("j1",))] * 2
    assert (
        why(decide([wide], [offer("two", gpus=4, usd=2)], policy=replace(RICH, max_instances=1))) == "TooManyInstances"
    )


def test_an_elastic_gang_is_content_with_its_smallest() -> None:
    decision = decide([job(of=gang(1, workers=8, smallest=2), usd=50)], [offer("two", gpus=2)])
    assert len(decision.rent) == 1


def test_jobs_share_a_machine_that_is_coming_anyway() -> None:
    shares = [job(f"j{n}", of=gang(0.5)) for n in range(3)]
    decision = decide(shares, [offer(usd=1)])
    assert [one.jobs for one in decision.rent] == [("j0", "j1"), ("j2",)]


def test_a_job_goes_onto_an_idle_machine_first() -> None:
    decision = decide([job()], [offer()], [rented(idle_ns=HOUR_NS // 60)])
    assert decision == Decision()


def test_what_a_gang_still_lacks_is_rented_and_no_more() -> None:
    there = [
        rented("r1", phase=Phase.COMING, jobs=(JobId("j1"),)),
        rented("r2", phase=Phase.COMING, jobs=(JobId("j1"),)),
    ]
    decision = decide([job(of=gang(1, workers=3), usd=50)], [offer()], there)
    assert [one.jobs for one in decision.rent] == [("j1",)]


def test_spot_is_for_jobs_that_may_be_interrupted() -> None:
    spot = offer(usd=0.3, market=Market.SPOT)
    assert why(decide([job()], [spot])) == "OnlyInterruptible"
    either = job(markets=(Market.SPOT, Market.ON_DEMAND))
    assert [one.offer.market for one in decide([either], [offer(), spot]).rent] == [Market.SPOT]
    coming = [rented(phase=Phase.COMING, of=spot, jobs=(JobId("other"),))]
    assert len(decide([job()], [offer(), spot], coming).rent) == 1


def test_residency_is_kept() -> None:
    at_home = job(of=gang(labels=(("country", "DEU|FRA"),)))
    assert why(decide([at_home], [offer()])) == "ResidencyForbids"
    assert (
        decide([at_home], [offer(), offer("there", usd=2, labels=(("country", "FRA"),))]).rent[0].offer.instance_type
        == "there"
    )


@pytest.mark.parametrize(
    ("wants", "fits"),
    [
        (gang("T4:1"), True),
        (gang("H100:1"), False),
        (gang("24GB+"), False),
        (gang(2), False),
        (gang(1, memory_bytes=32 * GB), False),
        (gang(1, memory_bytes=29 * GB), True),
        (gang(1, disk_bytes=200 * GB), False),
        (gang(0, cpu_milli=9_000), False),
        (gang("share 8GB"), True),
    ],
)
def test_what_fits_an_offer_is_what_the_scheduler_would_place(wants: Gang, fits: bool) -> None:
    decision = decide([job(of=wants, usd=100)], [offer()])
    assert bool(decision.rent) == fits
    assert fits or why(decision) == "NoOfferFits"


def test_what_was_not_used_is_not_rented_for_the_same_job_again() -> None:
    useless = frozenset({(JobId("j1"), "g.1")})
    assert why(decide([job()], [offer()], useless=useless)) == "RentedInVain"
    decision = decide([job(), job("j2")], [offer(), offer("other", usd=2)], useless=useless)
    assert [(one.offer.instance_type, one.jobs) for one in decision.rent] == [("other", ("j1",)), ("g.1", ("j2",))]


# -- ceilings ---------------------------------------------------------------------------------------------------------


def test_each_ceiling_has_its_reason() -> None:
    jobs = [job("j1"), job("j2")]
    for ceiling, code in (
        ({"max_instances": 1}, "TooManyInstances"),
        ({"max_micro_per_hour": USD_MICRO}, "TooMuchPerHour"),
        ({"max_micro_per_month": 2 * USD_MICRO}, "TooMuchThisMonth"),
    ):
        decision = decide(jobs, [offer()], policy=replace(RICH, **ceiling))
        assert len(decision.rent) == 1
        assert why(decision, "j2") == code
    assert why(decide(jobs, [offer()], policy=BurstPolicy())) == "TooManyInstances"


def test_what_is_leaving_still_counts() -> None:
    there = [rented(phase=Phase.LEAVING)]
    assert why(decide([job()], [offer()], there, policy=replace(RICH, max_instances=1))) == "TooManyInstances"


def test_ceilings_count_what_a_machine_may_come_to_cost() -> None:
    spot = offer(usd=1, market=Market.SPOT, most_micro_per_hour=3 * USD_MICRO)
    one = job(markets=(Market.SPOT,))
    assert why(decide([one], [spot], policy=replace(RICH, max_micro_per_hour=2 * USD_MICRO))) == "TooMuchPerHour"


def test_a_dearer_offer_is_taken_when_the_cheaper_does_not_keep_the_ceiling() -> None:
    cheap = offer("cheap", usd=1, market=Market.SPOT, most_micro_per_hour=9 * USD_MICRO)
    either = job(markets=(Market.SPOT, Market.ON_DEMAND))
    decision = decide([either], [cheap, offer("dear", usd=2)], policy=replace(RICH, max_micro_per_hour=2 * USD_MICRO))
    assert [one.offer.instance_type for one in decision.rent] == ["dear"]


def test_machines_are_emptied_before_the_months_money_is_gone() -> None:
    busy = rented(running=2, busy_until_ns=NOW + DAY_NS)
    tight = replace(RICH, max_micro_per_month=10 * USD_MICRO)
    assert decide([], [], [busy], policy=tight, spent_micro=9 * USD_MICRO) == Decision()
    decision = decide([], [], [busy], policy=tight, spent_micro=9_800_000)
    assert [(one.displace, one.reason.code) for one in decision.close] == [(True, "MonthIsSpent")]
    assert not decision.release
    coming = decide([job()], [], [rented(phase=Phase.COMING, jobs=(JobId("j1"),))], policy=tight, spent_micro=9_800_000)
    assert [one.reason.code for one in coming.release] == ["MonthIsSpent"]


def test_what_a_month_cost_is_counted_from_its_beginning() -> None:
    begins, ends = month_of(NOW)
    assert begins < NOW < ends
    kept: dict[str, Any] = {"site_id": SiteId("s"), "scope": "c", "offer": offer(), "node_name": "n", "version": 1}
    rentals = [
        Rental(id=RentalId("a"), state=RentalState.OVER, created_ns=begins - 2 * HOUR_NS, expires_ns=0,
               launched_ns=begins - HOUR_NS, ended_ns=begins + HOUR_NS, **kept),
        Rental(id=RentalId("b"), state=RentalState.OVER, created_ns=begins, expires_ns=0, ended_ns=NOW, **kept),
        Rental(id=RentalId("c"), state=RentalState.WANTED, created_ns=NOW - HOUR_NS, expires_ns=0, **kept),
        Rental(id=RentalId("d"), state=RentalState.JOINED, created_ns=NOW + HOUR_NS, expires_ns=0, launched_ns=NOW + HOUR_NS, **kept),
    ]  # fmt: skip
    assert [spent_this_month([one], BY_SECOND, now=NOW) for one in rentals] == [USD_MICRO, 0, USD_MICRO, 16_667]


@pytest.mark.parametrize(("lasts_ns", "billing", "cost"), [
    (0, BY_SECOND, 60), (61 * SECOND_NS, BY_SECOND, 61), (61 * SECOND_NS + 1, BY_SECOND, 62), (1, BY_HOUR, 3_600),
])  # fmt: skip
def test_time_is_charged_in_whole_units(lasts_ns: int, billing: Billing, cost: int) -> None:
    assert cost_micro(3_600, lasts_ns, billing) == cost


def test_waiting_has_the_price_that_the_policy_declares() -> None:
    policy = BurstPolicy(waiting_job_micro_per_hour=10, waiting_gpu_micro_per_hour=100)
    spec = WorkloadSpec(kind=Kind.TASK, name="t", run="x", nodes=2, resources=Resources(gpus=GpuRequest(count=4)))
    assert waiting_rate(spec, policy) == 810
    assert waiting_rate(replace(spec, resources=Resources()), policy) == 10


# -- giving back ------------------------------------------------------------------------------------------------------


def test_an_idle_machine_is_closed_and_then_released() -> None:
    idle = rented(idle_ns=RICH.idle_ns)
    assert [(one.rental_id, one.displace) for one in decide([], [], [idle]).close] == [("r1", False)]
    assert decide([], [], [replace(idle, idle_ns=RICH.idle_ns - 1)]) == Decision()
    assert [one.rental_id for one in decide([], [], [replace(idle, phase=Phase.CLOSED)]).release] == ["r1"]
    assert decide([], [], [replace(idle, phase=Phase.CLOSED, running=1)]) == Decision()


def test_a_machine_paid_by_the_hour_is_kept_for_what_is_paid() -> None:
    idle = rented(idle_ns=HOUR_NS, paid_ns=HOUR_NS + 20 * MINUTE_NS)
    assert decide([], [], [idle], billing=BY_HOUR) == Decision()
    assert decide([], [], [replace(idle, paid_ns=HOUR_NS + 52 * MINUTE_NS)], billing=BY_HOUR).close


def test_a_machine_that_does_not_join_is_given_up_and_one_that_nobody_waits_for() -> None:
    coming = rented(phase=Phase.COMING, jobs=(JobId("j1"),), phase_ns=RICH.boot_limit_ns)
    assert decide([job()], [offer()], [coming]) == Decision()
    late = decide([job()], [offer()], [replace(coming, phase_ns=RICH.boot_limit_ns + 1)])
    assert [one.reason.code for one in late.release] == ["DidNotJoin"]
    assert [one.reason.code for one in decide([], [offer()], [coming]).release] == ["NobodyWaits"]


def test_an_idle_machine_is_kept_for_a_job_that_fits_but_not_for_ever() -> None:
    idle = rented(idle_ns=RICH.idle_ns)
    assert decide([job()], [offer()], [idle]) == Decision()
    assert decide([job(waits=SECOND_NS)], [offer()], [idle]).close == ()
    long = decide([job()], [offer()], [replace(idle, idle_ns=2 * RICH.idle_ns)])
    assert [one.reason.code for one in long.close] == ["IsNotUsed"]


# -- what always holds ------------------------------------------------------------------------------------------------

Case = tuple[list[WaitingJob], list[Offer], list[Rented], dict[str, Any]]

OFFERS = (
    offer("one", usd=1),
    offer("one", usd=0.25, market=Market.SPOT, most_micro_per_hour=600_000),
    offer("four", usd=3, gpus=4),
    offer("eight", usd=20, gpus=8, model="H100-SXM"),
    offer("cpu", usd=0.2, gpus=0),
    offer("away", usd=0.5, gpus=2, labels=(("country", "USA"),)),
)
GANGS = (
    gang(),
    gang(0.5),
    gang(0.3),
    gang(2),
    gang(4, workers=2),
    gang(1, workers=3, smallest=2),
    gang("H100:2"),
    gang(0, cpu_milli=6_000),
    gang(1, labels=(("country", "IRL"),)),
    gang(1, labels=(("country", "JPN"),)),
)
MARKETS = ((Market.ON_DEMAND,), (Market.SPOT, Market.ON_DEMAND), (Market.SPOT,))


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    jobs = [
        job(
            f"j{number}",
            of=draw(st.sampled_from(GANGS)),
            waits=draw(st.sampled_from((0, MINUTE_NS, HOUR_NS, 7 * HOUR_NS))),
            usd=draw(st.sampled_from((0.0, 0.4, 3.0, 40.0))),
            duration_ns=draw(st.sampled_from((MINUTE_NS, HOUR_NS, 9 * HOUR_NS))),
            start_before_ns=draw(st.sampled_from((0, 0, NOW + MINUTE_NS, NOW + 2 * HOUR_NS))),
            here_micro=draw(st.sampled_from((0, USD_MICRO))),
            markets=draw(st.sampled_from(MARKETS)),
        )
        for number in range(draw(st.integers(0, 5)))
    ]
    offers = draw(st.lists(st.sampled_from(OFFERS), unique=True, max_size=4))
    there = []
    for number in range(draw(st.integers(0, 4))):
        phase = draw(st.sampled_from(tuple(Phase)))
        placed = phase in (Phase.OPEN, Phase.CLOSED)
        running = draw(st.integers(0, 2)) if placed else 0
        there.append(
            rented(
                f"r{number}",
                phase=phase,
                of=draw(st.sampled_from(OFFERS)),
                phase_ns=draw(st.sampled_from((0, 11 * MINUTE_NS, HOUR_NS))),
                idle_ns=0 if running else draw(st.sampled_from((0, 11 * MINUTE_NS, HOUR_NS))),
                paid_ns=draw(st.sampled_from((0, 55 * MINUTE_NS))),
                running=running,
                busy_until_ns=NOW + HOUR_NS if running else 0,
                jobs=tuple(
                    draw(st.lists(st.sampled_from([JobId(f"j{n}") for n in range(5)]), max_size=2, unique=True))
                ),
            )
        )
    policy = replace(
        RICH,
        max_instances=draw(st.sampled_from((0, 2, 5, 50))),
        max_micro_per_hour=draw(st.sampled_from((USD_MICRO, 5 * USD_MICRO, 500 * USD_MICRO))),
        max_micro_per_month=draw(st.sampled_from((2 * USD_MICRO, 30 * USD_MICRO, 9_000 * USD_MICRO))),
    )
    spent = draw(st.sampled_from((0, USD_MICRO, 25 * USD_MICRO)))
    billing = draw(st.sampled_from((BY_SECOND, BY_HOUR)))
    return jobs, offers, there, {"policy": policy, "spent_micro": spent, "billing": billing}


def needs(one: WaitingJob, policy: BurstPolicy) -> int:
    return max(policy.boot_ns + one.duration_ns + policy.idle_ns, policy.wind_down_ns)


def keeps_every_ceiling(case: Case) -> None:
    jobs, offers, there, known = case
    policy, billing, left = known["policy"], known["billing"], month_of(NOW)[1] - NOW
    decision, by_id = decide(jobs, offers, there, **known), {one.id: one for one in jobs}
    if not decision.rent:
        return
    machines = [one.offer for one in there] + [one.offer for one in decision.rent]
    assert len(machines) <= policy.max_instances
    assert sum(one.most_micro_per_hour for one in machines) <= policy.max_micro_per_hour
    expected = sum(cost_micro(one.offer.most_micro_per_hour, policy.wind_down_ns, billing) for one in there)
    for new in decision.rent:
        lasts = max(needs(by_id[one], policy) for one in new.jobs)
        expected += cost_micro(new.offer.most_micro_per_hour, min(lasts, left), billing)
    assert known["spent_micro"] + expected <= policy.max_micro_per_month


def never_rents_when_waiting_is_cheaper(case: Case) -> None:
    jobs, offers, there, known = case
    policy, by_id = known["policy"], {one.id: one for one in jobs}
    decision = decide(jobs, offers, there, **known)
    for new in decision.rent:
        first = by_id[new.jobs[0]]
        count = sum(one.jobs[0] == first.id for one in decision.rent)
        rent = count * cost_micro(new.offer.price_micro_per_hour, needs(first, policy), known["billing"])
        starts = first.forecast_ns or NOW + policy.horizon_ns
        waiting = first.waiting_micro_per_hour * (starts - NOW) // HOUR_NS + first.here_micro
        too_late = 0 < first.start_before_ns < starts and NOW + policy.boot_ns <= first.start_before_ns
        assert rent < waiting or too_late
        assert new.offer.market in first.markets


def never_releases_what_runs_something(case: Case) -> None:
    jobs, offers, there, known = case
    by_id = {one.id: one for one in there}
    decision = decide(jobs, offers, there, **known)
    for one in decision.release:
        assert not by_id[one.rental_id].running
        assert by_id[one.rental_id].phase in (Phase.COMING, Phase.CLOSED)
    for closed in decision.close:
        assert not closed.displace or closed.reason.code == "MonthIsSpent"


def rents_nothing_twice(case: Case) -> None:
    jobs, offers, there, known = case
    first = decide(jobs, offers, there, **known)
    coming = [
        rented(f"s{number}", phase=Phase.COMING, of=new.offer, jobs=new.jobs) for number, new in enumerate(first.rent)
    ]
    again = decide(jobs, offers, [*there, *coming], **known)
    assert not again.rent, (first.rent, again.rent)


def says_why_for_every_job(case: Case) -> None:
    jobs, offers, there, known = case
    decision = decide(jobs, offers, there, **known)
    rented_for = {one for new in decision.rent for one in new.jobs}
    refused = [one for one, _ in decision.refused]
    assert len(set(refused)) == len(refused)
    assert not rented_for & set(refused)
    if not there:
        assert rented_for | set(refused) == {one.id for one in jobs}


PROMISES = (
    keeps_every_ceiling,
    never_rents_when_waiting_is_cheaper,
    never_releases_what_runs_something,
    rents_nothing_twice,
    says_why_for_every_job,
)


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_holds(promise: Callable[[Case], None]) -> None:
    @given(cases())
    @settings(max_examples=250, deadline=None)
    def holds(case: Case) -> None:
        promise(case)

    holds()


def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursting._Books, "_why_beyond", lambda *_: None)


def forgets_the_month(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursting._Books, "_why_beyond_month", lambda *_: None)


def counts_one_of_a_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    beyond = bursting._Books._why_beyond
    monkeypatch.setattr(bursting._Books, "_why_beyond", lambda self, job, offer, _count: beyond(self, job, offer, 1))


def everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursting._Books, "_why_not_worth", lambda *_: None)


def waits_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    worth = bursting._Books._why_not_worth
    monkeypatch.setattr(
        bursting._Books, "_why_not_worth", lambda self, job, offer, price: worth(self, job, offer, price // 2)
    )


def releases_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = bursting._give_back

    def at_once(there: Any, books: Any, waiting: Any) -> Any:
        close, release = give_back(there, books, waiting)
        return (), (*release, *(Release(rental_id=one.rental_id, reason=one.reason) for one in close))

    monkeypatch.setattr(bursting, "_give_back", at_once)


def displaces_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = bursting._give_back

    def displacing(there: Any, books: Any, waiting: Any) -> Any:
        close, release = give_back(there, books, waiting)
        return tuple(Close(rental_id=one.rental_id, displace=True, reason=one.reason) for one in close), release

    monkeypatch.setattr(bursting, "_give_back", displacing)


def forgets_what_is_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(self: Any, there: Any, waiting: Any) -> None:
        original(self, [one for one in there if one.phase is not Phase.COMING], waiting)

    original = bursting._Books.count
    monkeypatch.setattr(bursting._Books, "count", count)


def says_nothing_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = bursting._Books.serve

    def silent(self: Any, *given_: Any) -> Any:
        reason = serve(self, *given_)
        return None if reason is not None and reason.code == "NoOfferFits" else reason

    monkeypatch.setattr(bursting._Books, "serve", silent)


BUGS = (
    (no_ceiling, keeps_every_ceiling),
    (forgets_the_month, keeps_every_ceiling),
    (counts_one_of_a_gang, keeps_every_ceiling),
    (everything_is_worth_it, never_rents_when_waiting_is_cheaper),
    (waits_twice_as_long, never_rents_when_waiting_is_cheaper),
    (releases_at_once, never_releases_what_runs_something),
    (displaces_for_nothing, never_releases_what_runs_something),
    (forgets_what_is_coming, rents_nothing_twice),
    (says_nothing_of_some, says_why_for_every_job),
)


@pytest.mark.parametrize(("plant", "promise"), BUGS)
def test_each_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], promise: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    @given(cases())
    @settings(max_examples=500, deadline=None, derandomize=True, database=None, phases=[Stage.generate])
    def holds(case: Case) -> None:
        promise(case)

    with pytest.raises((AssertionError, ExceptionGroup)):
        holds()
