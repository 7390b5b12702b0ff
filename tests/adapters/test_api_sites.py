"""Sites over the API: what they charge, how far they are, and how a job would be at each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.api_peer import Peer
from tidemill.core.facts import LEFT
from tidemill.model.events import NodeFellSilent, NodeJoined, NodeWentAway
from tidemill.model.fleet import Node, NodeState
from tidemill.model.ids import NodeId, SiteId

HOURS = [float(hour) for hour in range(24)]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    try:
        yield made
    finally:
        made.close()


def put(peer: Peer, name: str, **said: Any) -> dict[str, Any]:
    status, body = peer.call("PUT", f"/v1/sites/{name}", said)
    assert status == 200, body
    return dict(body)


def with_north(peer: Peer, **said: Any) -> Node:
    """A second site with one machine, of which the puppet engine knows nothing."""
    put(peer, "north", **said)
    node = Node(
        id=NodeId("node_n"), site_id=SiteId("north"), name="n", state=NodeState.READY, version=1, boot_id="b",
        address="127.0.0.1", cpu_milli=8_000, memory_bytes=32 << 30, disk_bytes=1 << 40,
    )  # fmt: skip
    peer.plane.tell([NodeJoined(at_ns=time.time_ns(), node=node)]).result(timeout=30)
    return node


def quoted(peer: Peer, **spec: Any) -> dict[str, Any]:
    status, body = peer.call("POST", "/v1/quotes", {"spec": {"name": "w", "run": "true"} | spec})
    assert status == 200, body
    return dict(body)


def told(answer: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Rank and reason by site."""
    return {one["site"]: (one["rank"], (one["reason"] or {"code": ""})["code"]) for one in answer["sites"]}


def test_a_machine_that_left_is_not_counted(peer: Peer) -> None:
    def seen() -> tuple[int, int]:
        status = peer.call("GET", "/v1/status")[1]
        return status["nodes"], status["cpu_milli"]

    nodes, cpu_milli = seen()
    node = with_north(peer)
    assert seen() == (nodes + 1, cpu_milli + node.cpu_milli)
    peer.plane.tell([NodeWentAway(at_ns=time.time_ns(), node_id=node.id, detail=LEFT)]).result(timeout=30)
    assert seen() == (nodes, cpu_milli)
    more = {"guaranteed": {"cpu": cpu_milli / 1000 + 1}}
    assert peer.call("PUT", "/v1/queues/all", more)[1]["field"] == "queues.all.guaranteed.cpu"


def test_a_site_is_described_piece_by_piece(peer: Peer) -> None:
    first = put(peer, "north", kind="edge", country="ISL", prices={"cpu": 0.01, "H100": 1.5}, tariff=0.08)
    assert (first["kind"], first["country"], first["tariff_micro_per_kwh"]) == ("edge", "ISL", 80_000)
    assert (first["prices"]["cpu"], first["prices"]["H100-SXM"]) == (10_000, 1_500_000)
    assert first["prices"]["MIG-1g.10gb-H100-SXM"] < 1_500_000, "slices follow the model that they are cut from"
    assert first["rate_card"] != "card"
    second = put(peer, "north", pue=1.3, carbon_by_hour=HOURS)
    assert second == first | {"pue": 1.3, "carbon_g_by_hour": HOURS}, "what is left out stays as it is"
    assert put(peer, "north", carbon_g_per_kwh=5)["carbon_source"] == "given"
    assert put(peer, "north", country="FRA")["carbon_g_per_kwh"] == 5, "what was given stays given"
    third = put(peer, "north", prices={}, carbon_by_hour=[])
    assert (third["prices"], third["rate_card"], third["carbon_g_by_hour"]) == ({}, "card", [])


def test_links_lead_both_ways_and_to_the_site_of_config_yaml(peer: Peer) -> None:
    put(peer, "north")
    put(peer, "south")
    link = {"latency": "20ms", "bandwidth": "1.5Gbps"}
    for one, other in (("north", "south"), ("here", "north")):
        status, body = peer.call("PUT", f"/v1/sites/{one}/links/{other}", link)
        assert status == 200, body
        assert {"site": other, "latency_ns": 20_000_000, "bits_per_s": 1_500_000_000} in body["links"]
    sites = {one["name"]: one for one in peer.call("GET", "/v1/sites")[1]["items"]}
    assert [{link["site"] for link in sites[name]["links"]} for name in ("here", "north", "south")] == [
        {"north"}, {"here", "south"}, {"north"},
    ]  # fmt: skip
    peer.call("PUT", "/v1/sites/south/links/north", {"latency": "30ms"})
    sites = {one["name"]: one for one in peer.call("GET", "/v1/sites")[1]["items"]}
    assert sites["north"]["links"] == [
        {"site": "here", "latency_ns": 20_000_000, "bits_per_s": 1_500_000_000},
        {"site": "south", "latency_ns": 30_000_000, "bits_per_s": 0},
    ]
    status, body = peer.call("DELETE", "/v1/sites/north/links/here")
    assert (status, [link["site"] for link in body["links"]]) == (200, ["south"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "word"),
    [
        ("PUT", "north", {"prices": {"H1000": 1}}, 422, "H1000"),
        ("PUT", "north", {"prices": {"cpu": -1}}, 422, "prices"),
        ("PUT", "north", {"carbon_by_hour": [1, 2]}, 422, "24"),
        ("PUT", "north", {"country": "GER"}, 422, "country"),
        ("PUT", "here", {"pue": 1.1}, 409, "config.yaml"),
        ("PUT", "north/links/north", {}, 409, "itself"),
        ("PUT", "north/links/south", {"bandwidth": "fast"}, 422, "bandwidth"),
        ("PUT", "north/links/nowhere", {}, 404, "nowhere"),
    ],
)
def test_what_is_wrong_with_a_site_is_told(
    peer: Peer, method: str, path: str, body: dict[str, Any], status: int, word: str
) -> None:
    put(peer, "north")
    put(peer, "south")
    got, answer = peer.call(method, f"/v1/sites/{path}", body)
    assert (got, word in str(answer)) == (status, True), (got, answer)


def test_a_quote_and_why_say_how_it_would_be_at_each_site(peer: Peer) -> None:
    alone = quoted(peer)
    assert alone["sites"] == []
    node = with_north(peer, country="ISL", prices={"cpu": 0.02})
    both = quoted(peer, resources={"cpus": 2}, max_duration="1h")
    assert told(both) == {"north": (1, ""), "here": (2, "")}
    assert [(one["amount_micro"]) for one in both["sites"]] == [2 * 20_000, 2 * 40_000]
    assert (both["amount_micro"], both["starts_now"], both["placement"][0][0]) == (40_000, True, "n")
    assert both["rate_card"] == next(
        one["rate_card"] for one in peer.call("GET", "/v1/sites")[1]["items"] if one["name"] == "north"
    )
    kept = quoted(peer, placement={"countries": ["DEU", "ISL"]})
    assert told(kept) == {"north": (1, ""), "here": (0, "SiteNotAllowed")}
    gang = quoted(peer, nodes=65, resources={"cpus": 8})
    assert (gang["feasible"], gang["reasons"][0]["code"]) == (False, "NoSiteLargeEnough")
    assert "across_sites" in gang["suggestions"][0]

    held = peer.submit(resources={"cpus": 8}, placement={"sites": ["north"]})["jobs"][0]["id"]
    waits = peer.submit(resources={"cpus": 8}, placement={"sites": ["north"]}, name="waits")["jobs"][0]["id"]
    why = peer.call("GET", f"/v1/jobs/{waits}/why")[1]
    assert (why["state"], told(why)) == ("queued", {"north": (1, "NotEnoughFreeCpus"), "here": (0, "SiteNotAllowed")})
    assert peer.call("GET", f"/v1/jobs/{held}/why")[1]["site"] == "north (onprem, ISL), as asked: sites: north"
    assert peer.call("GET", "/v1/queue")[1]["items"][0]["sites"] == ["north"]
    events = peer.call("GET", f"/v1/events?job={held}")[1]["items"]
    assert [one["data"]["sites"] for one in events if one["type"] == "Placed"] == ["north"]

    later = quoted(peer, resources={"cpus": 8}, placement={"sites": ["north"]}, max_duration="1h")
    assert later["amount_micro"] == 8 * 20_000, "at the price of where it would be"
    assert later["sites"][0]["starts_at_ns"] > time.time_ns()
    peer.plane.tell([NodeFellSilent(at_ns=time.time_ns(), node_id=node.id, detail="cut")]).result(timeout=30)
    assert told(quoted(peer)) == {"here": (2, ""), "north": (1, "SiteCutOff")}
    assert quoted(peer)["placement"][0][0] == "a"
