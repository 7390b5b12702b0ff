"""Submitting, finding, stopping; errors as problem+json; nothing that is sent gives a 5xx."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.adapters.api_peer import Peer
from tidemill.errors import StorageFull, Unavailable


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    made = Peer(tmp_path_factory.mktemp("work"))
    yield made
    made.close()


def post(peer: Peer, spec: Any, key: str = "", **more: Any) -> tuple[int, Any]:
    headers = {"Idempotency-Key": key} if key else {}
    return peer.call("POST", "/v1/workloads", {"spec": spec} | more, headers=headers)


def test_a_submitted_workload_has_its_jobs_and_its_spec(peer: Peer) -> None:
    status, made = post(peer, {"name": "train", "run": "true", "array": 3, "labels": {"a": 1}})
    assert status == 201
    assert [job["index"] for job in made["jobs"]] == [0, 1, 2]
    assert made["spec"]["array"] == {"size": 3}
    assert made["jobs"][0]["labels"] == {"a": "1"}
    again = peer.call("GET", f"/v1/workloads/{made['id']}")[1]
    assert again["id"] == made["id"]
    assert again["job_count"] == 3
    job = peer.call("GET", f"/v1/jobs/{made['jobs'][1]['id']}")[1]
    assert job["spec"] == made["spec"]
    assert job["name"] == "train"


def test_references(peer: Peer) -> None:
    first = peer.submit(name="refs")
    second = peer.submit(name="refs")
    peer.submit(name="refs-and-more")
    newest = second["jobs"][0]["id"]
    assert peer.call("GET", "/v1/jobs/refs")[1]["id"] == newest
    assert peer.call("GET", "/v1/workloads/refs")[1]["id"] == second["id"]
    assert peer.call("GET", f"/v1/jobs/{second['id']}")[1]["id"] == newest
    for cut in (-2, -3):
        status, found = peer.call("GET", f"/v1/jobs/{newest[:cut]}")
        assert (status, found.get("id")) in ((200, newest), (409, None))
    common = first["jobs"][0]["id"][:10]
    status, problem = peer.call("GET", f"/v1/jobs/{common}")
    assert (status, problem["code"]) == (409, "conflict")
    assert peer.call("GET", "/v1/jobs/job_0")[0] == 404
    assert peer.call("GET", "/v1/jobs/ref")[0] == 404
    assert peer.call("GET", "/v1/jobs/refs?project=other")[0] == 404


def test_every_mistake_of_a_spec_is_in_the_answer(peer: Peer) -> None:
    status, problem = post(peer, {"nmae": "x", "resources": {"gpus": "H10", "memory": "2 parsecs"}})
    assert status == 422
    assert problem["code"] == "invalid_spec"
    assert {error["field"] for error in problem["errors"]} == {"nmae", "resources.gpus", "resources.memory", "run"}
    assert problem["field"] == problem["errors"][0]["field"]
    assert problem["mend"]


def test_what_the_fleet_can_never_run_is_refused_with_the_reason(peer: Peer) -> None:
    status, problem = post(peer, {"run": "x", "resources": {"cpus": 4096}})
    assert (status, problem["code"], problem["kind"]) == (422, "infeasible", "infeasible")


def test_things_that_are_not_there_are_named(peer: Peer) -> None:
    for fields, field in (
        ({"workdir": "0" * 64}, "workdir"),
        ({"secrets": ["NOPE"]}, "secrets"),
        ({"inputs": {"m": "nope"}}, "inputs"),
    ):
        status, problem = post(peer, {"run": "x"} | fields)
        assert status in (404, 422), problem
        assert problem["field"] == field


def test_the_project_may_stand_in_the_request_or_in_the_spec(peer: Peer) -> None:
    assert post(peer, {"run": "x"}, project="other")[1]["project"] == "other"
    assert post(peer, {"run": "x", "project": "other"})[1]["project"] == "other"
    assert post(peer, {"run": "x"}, project="nope")[0] == 404


def test_a_key_gives_the_same_workload_however_often_it_is_sent(peer: Peer) -> None:
    barrier = threading.Barrier(20)

    def send(_: int) -> tuple[int, Any]:
        barrier.wait()
        return post(peer, {"name": "once", "run": "x"}, key="k-once")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(send, range(20)))
    assert {status for status, _ in answers} == {201}
    assert len({answer["id"] for _, answer in answers}) == 1
    assert len(peer.call("GET", "/v1/jobs?name=once")[1]["items"]) == 1
    status, problem = post(peer, {"name": "once", "run": "y"}, key="k-once")
    assert (status, problem["code"]) == (422, "idempotency_mismatch")


def test_other_writes_with_a_key_happen_once(peer: Peer) -> None:
    def make(name: str) -> tuple[int, Any]:
        return peer.call(
            "POST", "/v1/tokens", {"name": name, "scopes": ["read"]}, headers={"Idempotency-Key": "k-token"}
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(make, ["a"] * 8))
    assert len({answer["token"] for _, answer in answers}) == 1
    assert make("b")[1]["code"] == "idempotency_mismatch"


def test_a_batch_is_taken_whole_or_not_at_all(peer: Peer) -> None:
    specs = [{"name": f"batch{index}", "run": "x"} for index in range(5)]
    status, made = peer.call("POST", "/v1/workloads:batch", {"specs": specs})
    assert status == 201
    assert [item["name"] for item in made["items"]] == [spec["name"] for spec in specs]
    broken = [{"name": "bad0", "run": "x"}, {"name": "bad1", "nodes": 0}, {"name": "bad2", "run": "x", "nmae": 1}]
    status, problem = peer.call("POST", "/v1/workloads:batch", {"specs": broken})
    assert status == 422
    assert [error["field"] for error in problem["errors"]] == ["specs.1.nodes", "specs.1.run", "specs.2.nmae"]
    assert peer.call("GET", "/v1/jobs?name=bad")[1]["items"] == []
    assert peer.call("POST", "/v1/workloads:batch", {"specs": []})[0] == 422
    assert peer.call("POST", "/v1/workloads:batch", {"specs": [{"run": "x"}] * 1001})[0] == 422


def test_lists_are_paged_and_filtered(peer: Peer) -> None:
    for index in range(5):
        peer.submit(name="page", labels={"n": index})
    seen: list[str] = []
    cursor = ""
    while True:
        page = peer.call("GET", f"/v1/jobs?name=page&limit=2&cursor={cursor}")[1]
        seen += [job["labels"]["n"] for job in page["items"]]
        cursor = page["next_cursor"]
        if not cursor:
            break
    assert seen == ["4", "3", "2", "1", "0"]
    assert peer.call("GET", "/v1/jobs?state=succeeded")[1]["items"] == []
    assert peer.call("GET", "/v1/jobs?state=nonsense")[0] == 422
    assert peer.call("GET", "/v1/jobs?limit=0")[0] == 422
    assert peer.call("GET", "/v1/jobs?cursor=nonsense")[0] < 500


def test_stopping_is_harmless_to_repeat(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, launch = peer.running(name="stopme")
    monkeypatch.setattr(peer.engine, "lingers", True)
    for _ in range(2):
        status, job = peer.call("POST", f"/v1/jobs/{job_id}/stop", {})
        assert status == 202
        assert job["state"] in ("stopping", "cancelled")
    assert peer.report(launch)[1]["directive"] == "stop"
    assert peer.call("POST", "/v1/workloads/stopme/stop")[0] == 202
    peer.engine.lose(launch.launch_id)


def test_a_quote_submits_nothing(peer: Peer) -> None:
    status, quote = peer.call("POST", "/v1/quotes", {"spec": {"name": "quoted", "run": "x"}})
    assert status == 200
    assert quote["currency"] == "USD"
    assert quote["estimated"] is True
    assert peer.call("GET", "/v1/jobs?name=quoted")[1]["items"] == []


DEEP = b'{"spec":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001
BODIES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"null", 400),
    (b"[]", 400),
    (b'"x"', 400),
    (b"\xff\xfe", 400),
    (b'{"spec": "\xff"}', 400),
    (b'{"spec": {"run": "\\ud800"}}', 400),
    (b'{"spec": {"run": NaN}}', 400),
    (DEEP, 400),
    (b'{"spec": {"run": "a\\u0000b"}}', 422),
    (b'{"spec": {"run": "x", "nodes": 1' + b"0" * 400 + b"}}", 400),
    (b'{"spec": {"run": "x", "nodes": 1e999}}', 400),
    (b'{"spec": {"run": "x", "priority": 18446744073709551615}}', 422),
    (b'{"spec": {"run": "x"}, "extra": 1}', 422),
    (b'{"spec": []}', 422),
    (b'{"spec": {"run": "x"}, "project": {}}', 422),
    (b'{"spec": {"run": "x"}, "project": "a\\u0000"}', 422),
    (b"{}", 422),
]


@pytest.mark.parametrize(("body", "wanted"), BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", ["/v1/workloads", "/v1/quotes"])
def test_bodies_that_make_no_sense_are_the_senders_fault(peer: Peer, path: str, body: bytes, wanted: int) -> None:
    status, headers, problem = peer.exchange("POST", path, raw=body)
    assert 400 <= status < 500, problem
    assert status in (wanted, 422)
    assert headers["content-type"] == "application/problem+json"
    assert set(problem) >= {"type", "title", "status", "code", "kind", "detail", "field", "value", "mend", "errors"}
    assert problem["status"] == status


def test_other_content_types_are_refused(peer: Peer) -> None:
    body = json.dumps({"spec": {"run": "x"}}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        status, problem = peer.call("POST", "/v1/workloads", raw=body, headers={"Content-Type": kind})
        assert (status, problem["code"]) == (415, "unsupported_media_type")
    fine = {"Content-Type": "application/json; charset=utf-8"}
    assert peer.call("POST", "/v1/workloads", raw=body, headers=fine)[0] == 201


def test_too_much_is_refused_with_and_without_a_length(peer: Peer) -> None:
    status, problem = peer.call("POST", "/v1/workloads", raw=b"{}", headers={"Content-Length": str(33 << 20)})
    assert (status, problem["code"]) == (413, "too_large")


def test_addresses_and_methods_that_there_are_not(peer: Peer) -> None:
    for path in (
        "/",
        "/v1",
        "/v1/",
        "/v1/jobs/",
        "/v1/nothing",
        "/v1/jobs/a/b/c",
        "/docs",
        "/openapi.json",
        "//v1/status",
    ):
        status, headers, problem = peer.exchange("GET", path)
        assert (status, headers["content-type"]) == (404, "application/problem+json"), path
        assert problem["code"] == "not_found"
    status, headers, problem = peer.exchange("PATCH", "/v1/jobs")
    assert (status, problem["code"]) == (405, "method_not_allowed")
    assert "GET" in headers["allow"]


@pytest.mark.parametrize(
    "path",
    ["/v1/jobs/%00", "/v1/jobs/%ff%fe", "/v1/jobs/..%2f..%2fetc", "/v1/jobs/" + "x" * 5_000, "/v1/jobs?name=%00",
     "/v1/jobs?cursor=%00", "/v1/events?after=99999999999999999999999", "/v1/events?cursor=x", "/v1/artifacts/%00",
     "/v1/artifacts/a:99999999999999999999", "/v1/jobs?project=%00", "/v1/ledger?cursor=nonsense", "/v1/jobs/job_%00aaaaaa",
     "/v1/usage?job=%00", "/v1/secrets?project=%00", "/v1/nodes?cursor=%00"],
)  # fmt: skip
def test_odd_addresses_are_the_senders_fault(peer: Peer, path: str) -> None:
    status, problem = peer.call("GET", path)
    assert status < 500, problem


def test_the_store_that_does_not_answer_is_503_and_a_full_disk_507(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(error: Exception) -> Any:
        def find(*_: Any, **__: Any) -> Any:
            raise error

        return find

    monkeypatch.setattr(peer.plane.store, "find_jobs", broken(Unavailable("The database is away.")))
    status, headers, problem = peer.exchange("GET", "/v1/jobs")
    assert (status, problem["code"], headers["retry-after"]) == (503, "unavailable", "1")
    monkeypatch.setattr(peer.plane.store, "find_jobs", broken(StorageFull()))
    assert peer.call("GET", "/v1/jobs")[0] == 507
    monkeypatch.setattr(peer.plane.store, "find_jobs", broken(RuntimeError("secret internals")))
    status, problem = peer.call("GET", "/v1/jobs")
    assert (status, problem["code"]) == (500, "internal")
    assert problem["id"]
    assert "secret" not in json.dumps(problem)


def test_secrets_are_written_and_never_read(peer: Peer) -> None:
    assert peer.call("PUT", "/v1/secrets/HF_TOKEN", {"value": "hf_canary"})[0] == 200
    listed = peer.call("GET", "/v1/secrets")[1]
    assert [secret["name"] for secret in listed["items"]] == ["HF_TOKEN"]
    assert "canary" not in str(listed)
    _, launch = peer.running(name="with-secret", secrets=["HF_TOKEN"])
    path = f"/v1/runners/{launch.launch_id}/secrets"
    assert peer.call("GET", path, token=launch.runner_token)[1] == {"HF_TOKEN": "hf_canary"}
    assert peer.call("PUT", "/v1/secrets/a-b", {"value": "x"})[0] == 422
    assert peer.call("DELETE", "/v1/secrets/HF_TOKEN")[0] == 204
    assert peer.call("DELETE", "/v1/secrets/HF_TOKEN")[0] == 404


def test_the_gateway_hears_of_a_new_token_soon(peer: Peer) -> None:
    token = peer.plane.directory.gateway_token
    first = peer.call("GET", "/v1/gateway/feed?since=-1&wait=5", token=token)[1]
    assert isinstance(first["version"], int)
    same = peer.call("GET", f"/v1/gateway/feed?since={first['version']}&wait=0.05", token=token)[1]
    assert same == first
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(peer.call, "GET", f"/v1/gateway/feed?since={first['version']}&wait=20", None, token=token)
        peer.call("POST", "/v1/tokens", {"name": "new", "scopes": ["infer"]})
        later = waiting.result(timeout=5)[1]
    assert len(later["tokens"]) == len(first["tokens"]) + 1
