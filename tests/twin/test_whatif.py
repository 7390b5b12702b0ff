"""Changes in words, and fleets in words."""

from __future__ import annotations

import pytest

from tests.twin.small import conditions, job
from tidemill.errors import InvalidRequest
from tidemill.model.queue import Queue
from tidemill.twin.arrivals import Arrival
from tidemill.twin.fleet import describe, parse_fleet
from tidemill.twin.report import figures
from tidemill.twin.run import run
from tidemill.twin.whatif import apply, faster, parse_change
from tidemill.units import DAY_NS, SECOND_NS


def changed(*texts: str, nodes: str = "2xH100:8"):  # type: ignore[no-untyped-def]
    return apply([parse_change(text) for text in texts], conditions(nodes))


@pytest.mark.parametrize(
    ("text", "fleet"),
    [
        ("nodes=+2xH100:8", "4xH100-SXM:8"),
        ("nodes=+1xA100:4", "2xH100-SXM:8,1xA100-40GB-SXM:4"),
        ("nodes=-1xH100:8", "1xH100-SXM:8"),
        ("nodes=3xL4:2,1xcpu:64", "3xL4:2,1xcpu:64"),
    ],
)
def test_fleets_change(text: str, fleet: str) -> None:
    nodes = changed(text).nodes
    assert describe(nodes) == fleet
    assert len({node.id for node in nodes}) == len(nodes), "a machine that comes has a name of its own"


def test_policy_prices_and_delays_change() -> None:
    found = changed(
        "policy.half_life=1d", "policy.backfill=no", "policy.starts_per_turn=7", "order=least_attained", "start_delay=30s",
        "price.H100=1.5",
    )  # fmt: skip
    policy = found.policy
    assert (policy.half_life_ns, policy.backfill, policy.starts_per_turn, policy.order) == (
        DAY_NS, False, 7, "least_attained",
    )  # fmt: skip
    assert found.start_delay_ns == 30 * SECOND_NS
    assert found.rates.micro_per_hour("H100-SXM") == 1_500_000
    assert found.rates.micro_per_hour("cpu") == 36_000
    assert found.rates.id != conditions().rates.id


def test_a_site_is_added_and_described() -> None:
    before = conditions("2xH100:8")
    found = changed(
        "site.north.nodes=3xA100:4", "site.north.price.A100=0.5", "site.north.country=ISL", "site.north.kind=cloud"
    )
    [home, north] = found.sites
    assert home == before.sites[0]
    assert (north.name, north.kind, north.country, dict(north.prices)["A100-80GB-SXM"]) == (
        "north",
        "cloud",
        "ISL",
        500_000,
    )
    assert 0 < north.carbon_mg_per_kwh < 100_000
    assert describe(found.nodes) == "2xH100-SXM:8,3xA100-40GB-SXM:4"
    assert [node.site_id for node in found.nodes] == [home.id] * 2 + [north.id] * 3
    assert len({node.id for node in found.nodes}) == 5
    dearer = changed(
        "site.twin.price.H100=9", "site.twin.tariff=0.25", "site.twin.pue=1.5", "site.twin.carbon=30"
    ).sites[0]
    assert (dict(dearer.prices)["H100-SXM"], dearer.tariff_micro_per_kwh, dearer.pue_milli, dearer.carbon_mg_per_kwh) == (
        9_000_000, 250_000, 1_500, 30_000,
    )  # fmt: skip


def test_a_cheaper_site_takes_the_work_and_the_bill_is_its_own() -> None:
    def cost(*texts: str) -> float:
        found = figures(run(iter([job(0, 3_600, 8), job(0, 3_600, 8)]), changed(*texts, nodes="2xH100:8")))
        return float(found["cost_micro"])

    north = ("site.north.nodes=1xH100:8", "site.north.price.H100=1.8")
    assert cost(*north) == pytest.approx(cost() * 3 / 4, rel=1e-3), "one of the two goes where it costs half"
    assert cost(*north, "site.north.price.H100=5") == pytest.approx(cost(), rel=1e-3), (
        "neither goes where it costs more"
    )


def test_quotas_change() -> None:
    (queue,) = changed("quota.lab.limit=gpu:4+cpu:100", "quota.lab.weight=2.5", "quota.lab.guaranteed=gpu:2").queues
    assert isinstance(queue, Queue)
    assert (queue.project_id, queue.weight_milli) == ("lab", 2_500)
    assert dict(queue.limit) == {"gpu": 4_000, "cpu": 100_000}
    assert dict(queue.guaranteed) == {"gpu": 2_000}
    (queue,) = changed("quota.lab.limit=gpu:H100:4+memory:1TB", "quota.lab.max_running=3").queues
    assert dict(queue.limit) == {"gpu:H100": 4_000, "memory": 1024**4}
    assert queue.max_running == 3


def test_work_arrives_faster() -> None:
    items = list(faster(iter([job(0, 1), job(100, 1)]), parse_change("load=2").speeds))
    assert [item.at_ns // SECOND_NS for item in items] == [0, 50]
    assert all(isinstance(item, Arrival) for item in items)


def test_more_machines_and_another_price_make_a_difference() -> None:
    def found(*texts: str):  # type: ignore[no-untyped-def]
        return figures(run(iter([job(0, 100, 8), job(0, 100, 8), job(0, 100, 8)]), changed(*texts, nodes="1xH100:8")))

    assert (found()["makespan_s"], found("nodes=+2xH100:8")["makespan_s"]) == (300, 100)
    assert found("price.H100=1")["cost_micro"] * 3.6 == pytest.approx(found()["cost_micro"], rel=1e-4)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nodes", "NAME=VALUE"), ("colour=red", "colour"), ("nodes=-3xH100:8", "fewer than 3"), ("nodes=-2xH100:8", "No machine"),
        ("nodes=2xH1000:8", "H1000"), ("nodes=0xH100:8", "0 machines"), ("nodes=2xH100", "how many GPUs"), ("nodes=+", "'+'"),
        ("policy.speed=1", "speed"), ("policy.half_life=soon", "soon"), ("policy.backfill=maybe", "maybe"),
        ("policy.starts_per_turn=few", "few"), ("price.H1000=1", "H1000"), ("price.H100=free", "free"), ("load=0", "above zero"),
        ("site.north.colour=red", "colour"), ("site.north.price.H1000=1", "H1000"), ("site.north.tariff=-1", "0 or more"),
        ("site.north.kind=space", "space"), ("site.north.country=Mars", "Mars"), ("site.north.nodes=2", "'2'"),
        ("site.north=1", "site"), ("quota.lab.colour=1", "colour"), ("quota.lab.limit=64", "64"), ("quota.lab.limit=gpu:many", "many"),
        ("quota.lab.limit=tpu:1", "tpu"), ("quota.lab.weight=0", "weight"), ("policy.half_life=", "NAME=VALUE"),
    ],
)  # fmt: skip
def test_a_change_that_is_wrong_says_what(text: str, word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        changed(text)
    assert caught.value.field == "--what-if"
    assert word in str(caught.value)
    assert caught.value.mend


def test_fleets_in_words() -> None:
    nodes = parse_fleet("2xA100:4:96:1TB, 1xcpu:64")
    assert [(len(node.devices), node.cpu_milli, node.memory_bytes >> 30) for node in nodes] == [
        (4, 96_000, 1024), (4, 96_000, 1024), (0, 64_000, 256),
    ]  # fmt: skip
    assert parse_fleet("8xH100:8")[5].rack == "r00001"
