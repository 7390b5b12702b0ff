"""The OpenAPI document is complete, and no request made from it gives a 5xx."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case

from tests.adapters.api_peer import Peer
from tidemill.api.guard import GuardedRoute

_ENDLESS = {
    "list_events",
    "logs",
    "gateway_feed",
    "commands",
    "exec_output",
    "runner_exec_input",
    "record_turns",
    "outpost_calls",
}
"""May answer for as long as they are listened to; tested for themselves."""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    logging.getLogger("tidemill").setLevel(logging.ERROR)
    made = Peer(tmp_path_factory.mktemp("schema"))
    made.running(name="seen")
    yield made
    made.close()


@pytest.fixture(scope="module")
def document(peer: Peer) -> dict[str, Any]:
    status, found = peer.call("GET", "/v1/openapi.json", token="")
    assert status == 200
    return dict(found)


def test_every_route_is_described(peer: Peer, document: dict[str, Any]) -> None:
    ids = set()
    for route in peer.app.routes:
        assert isinstance(route, GuardedRoute)
        for method in route.methods or ():
            operation = document["paths"][route.path_format][method.lower()]
            ids.add(operation["operationId"])
            assert operation["summary"]
            assert operation["tags"]
            assert operation["security"] == ([{"token": []}] if route.policy else [])
            assert {"401", "404", "422", "503", "507"} <= set(operation["responses"])
            assert any(status.startswith("2") for status in operation["responses"])
            if route.body_model is not None:
                assert operation["requestBody"]["content"]
    assert len(ids) == sum(len(route.methods or ()) for route in peer.app.routes if isinstance(route, GuardedRoute))
    assert document["components"]["schemas"]["WorkloadSpec"]["properties"]["resources"]


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "$ref":
                    yield inner
                else:
                    yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_no_request_gives_a_5xx(document: dict[str, Any], peer: Peer) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{peer.port}")
    headers = {"Authorization": f"Bearer {peer.token()}"}
    tried: set[str] = set()
    seen: set[int] = set()
    for found in schema.exclude(operation_id=sorted(_ENDLESS)).get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(case=operation.as_strategy())
        def try_out(case: Case) -> None:
            response = case.call(headers=headers)
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            seen.add(response.status_code)
            if response.status_code >= 400 and case.method.upper() != "HEAD" and response.content:
                own = response.headers.get("content-type") == ["application/problem+json"]
                assert own or response.text == "Invalid HTTP request received.", response.text

        try_out()
        tried.add(operation.label)
    assert len(tried) == sum(len(methods) for methods in document["paths"].values()) - len(_ENDLESS)
    assert {200, 201, 404, 422} <= seen
