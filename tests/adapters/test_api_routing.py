"""What the control plane tells gateways of where requests go, and what it does not take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.api_peer import Peer
from tidemill.gateway.table import read_feed


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    yield made
    made.close()


def service(name: str, **section: Any) -> dict[str, Any]:
    return {"name": name, "kind": "service", "run": "serve", "service": {"replicas": 1, **section}}


def test_a_services_ways_come_to_the_gateway_as_the_spec_says(peer: Peer) -> None:
    peer.submit(**service("c", model="big-c"))
    peer.submit(**service("b", fallback=["big-c"]))
    peer.submit(
        **service(
            "a",
            model="big-a",
            affinity="prefix",
            fallback=["b"],
            hedge="200ms",
            timeouts={"connect": "2s", "whole": "15m"},
        )
    )
    feed = peer.call("GET", "/v1/gateway/feed", token=peer.plane.directory.gateway_token)[1]
    told = feed["routes"]["big-a"]
    assert told["fallback"] == ["b", "big-c"], "also what those fall back to"
    assert (told["affinity"], told["hedge_ms"], told["is_open"]) == ("prefix", 200, False)
    assert told["timeouts_ms"] == {"connect": 2_000, "first_byte": 600_000, "between": 600_000, "whole": 900_000}
    assert feed["routes"]["b"]["is_open"]
    assert "affinity" not in feed["routes"]["b"]
    assert feed["home"] in feed["sites"]
    table = read_feed(json.dumps(feed).encode())
    route = table.routes["big-a"]
    assert (route.hedge_s, route.timeouts.whole, route.timeouts.connect, route.is_plain) == (0.2, 900.0, 2.0, False)
    assert list(table.services) == ["b"]


def test_a_replica_is_told_with_its_site(peer: Peer) -> None:
    _, launch = peer.running(**service("web"))
    assert peer.report(launch, {"type": "became", "ready": True, "endpoint": "127.0.0.1:8000"})[0] == 200
    token = peer.plane.directory.gateway_token
    feed = peer.call("GET", "/v1/gateway/feed", token=token)[1]
    [replica] = feed["routes"]["web"]["replicas"]
    assert replica["site"] == peer.plane.site.id
    table = read_feed(json.dumps(feed).encode())
    [known] = table.routes["web"].replicas
    assert (known.country, known.distance_ns) == (peer.plane.site.country, 0)


def test_models_that_would_answer_for_each_other_in_a_loop_are_refused(peer: Peer) -> None:
    peer.submit(**service("b", fallback=["c"]))
    peer.submit(**service("c", model="c", fallback=["a"]))
    status, problem = peer.call("POST", "/v1/workloads", {"spec": service("a", fallback=["x", "b"])})
    assert (status, problem["field"], problem["value"]) == (422, "service.fallback", "b")
    assert problem["detail"].startswith("Requests would go round in a loop: a → b → c → a.")
    assert "stop the service c" in problem["mend"]
    status, problem = peer.call("POST", "/v1/workloads", {"spec": service("a", fallback=["a"])})
    assert (status, problem["field"]) == (422, "service.fallback")
    peer.submit(**service("a", fallback=["x"]))


def test_a_project_is_kept_in_its_countries_with_its_work_and_its_requests(peer: Peer) -> None:
    status, made = peer.call("POST", "/v1/projects", {"name": "other", "countries": ["germany", "FRA"]})
    assert (status, made["countries"]) == (201, ["DEU", "FRA"])
    assert peer.call("POST", "/v1/projects", {"name": "other"})[1]["countries"] == ["DEU", "FRA"], "they stay"
    key = peer.call("POST", "/v1/tokens", {"name": "k", "scopes": ["infer"], "project": "other"})[1]
    feed = peer.call("GET", "/v1/gateway/feed", token=peer.plane.directory.gateway_token)[1]
    assert [one["countries"] for one in feed["tokens"].values() if one["id"] == key["id"]] == [["DEU", "FRA"]]
    assert all("countries" not in one for one in feed["tokens"].values() if one["project"] != "prj_one_other")
    spec = {"name": "t", "run": "true", "placement": {"countries": ["USA"]}}
    status, problem = peer.call("POST", "/v1/workloads", {"spec": spec, "project": "other"})
    assert (status, problem["field"], problem["value"]) == (422, "placement.countries", ["USA"])
    spec["placement"] = {"countries": ["FRA", "USA"]}
    status, problem = peer.call("POST", "/v1/workloads", {"spec": spec, "project": "other"})
    assert (status, problem["reason"]) == (422, "NoSiteAllowed"), problem
    assert peer.call("POST", "/v1/projects", {"name": "other", "countries": ["Atlantis"]})[1]["field"] == "countries"
    assert peer.call("POST", "/v1/projects", {"name": "other", "countries": []})[1]["countries"] == []
    assert peer.call("POST", "/v1/workloads", {"spec": {"name": "t", "run": "true"}, "project": "other"})[0] == 201
