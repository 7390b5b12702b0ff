"""The quota tree, the queue's order, reservations and markings over REST, against a real control plane."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.api_peer import Peer, eventually
from tidemill.units import HOUR_NS


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    yield made
    made.close()


def refused(answer: tuple[int, Any], field: str, *words: str) -> None:
    """The answer refuses a field, says why and what to do."""
    status, problem = answer
    assert status in (404, 409, 422), problem
    assert problem["field"] == field, problem
    assert problem["mend"], problem
    for word in words:
        assert word in problem["detail"] + problem["mend"], problem


def tree(*queues: dict[str, Any]) -> dict[str, Any]:
    return {"queues": list(queues)}


GOOD = tree(
    {"name": "research", "weight": 2.5, "guaranteed": {"cpu": 300, "memory": "16GB"}, "limit": {"cpu": 400.5}},
    {"name": "vision", "parent": "research", "project": "default", "guaranteed": {"cpu": 200}, "max_queued": 3},
    {"name": "speech", "parent": "research", "project": "other", "max_running": 5},
)


def test_a_tree_is_set_and_comes_back_as_it_was_sent(peer: Peer) -> None:
    assert peer.call("PUT", "/v1/queues", GOOD)[0] == 200
    items = peer.call("GET", "/v1/queues", token=peer.token("reader"))[1]["items"]
    assert [item["name"] for item in items] == ["research", "speech", "vision"]
    sent = {queue["name"]: queue for queue in GOOD["queues"]}
    for item in items:
        assert item == {
            "parent": "", "project": "", "weight": 1, "guaranteed": {}, "limit": {}, "max_running": 0, "max_queued": 0,
        } | sent[item["name"]]  # fmt: skip
    assert peer.call("PUT", "/v1/queues", {"queues": items})[0] == 200
    shares = {row["name"]: row for row in peer.call("GET", "/v1/share", token=peer.token("reader"))[1]["items"]}
    assert shares["vision"]["parent"] == "research"
    assert shares["vision"]["depth"] == 1
    assert shares["research"]["guaranteed"]["cpu"] == 300_000
    assert shares["vision"]["project"] == "default"


def test_what_another_organization_has_is_neither_seen_nor_changed(peer: Peer) -> None:
    assert peer.call("PUT", "/v1/queues", GOOD)[0] == 200
    other = peer.token("admin", "two")
    for path in ("/v1/queues", "/v1/share"):
        assert "research" not in str(peer.call("GET", path, token=other)[1])
        assert "vision" not in str(peer.call("GET", path, token=other)[1])
    assert peer.call("PUT", "/v1/queues/research", {"weight": 9}, token=other)[0] == 200
    assert peer.call("GET", "/v1/queues")[1]["items"][0]["weight"] == 2.5
    too_much = peer.call("PUT", "/v1/queues/mine", {"guaranteed": {"cpu": 300}}, token=other)
    refused(too_much, "queues.mine.guaranteed.cpu", "another-1", "the whole fleet has 512")
    assert "research" not in too_much[1]["detail"]
    bound = peer.call("POST", "/v1/tokens", {"name": "x", "scopes": ["admin"], "project": "default"})[1]["token"]
    assert peer.call("PUT", "/v1/queues/vision", {"project": "default"}, token=bound)[0] == 403
    assert [item["name"] for item in peer.call("GET", "/v1/queues", token=bound)[1]["items"]] == ["vision"]


@pytest.mark.parametrize(
    ("queue", "field", "words"),
    [
        ({"name": "q", "weight": 0}, "queues.0.weight", ["above zero"]),
        ({"name": "q", "weight": "2"}, "queues.0.weight", ["above zero"]),
        ({"name": "q q"}, "queues.0.name", ["letters"]),
        ({"weight": 2}, "queues.0.name", ["needed"]),
        ({"name": "q", "wieght": 2}, "queues.0.wieght", ["weight"]),
        ({"name": "q", "guaranteed": {"gpus": 2}}, "queues.0.guaranteed", ["gpu:MODEL"]),
        ({"name": "q", "guaranteed": {"gpu:H10": 2}}, "queues.0.guaranteed", ["H100"]),
        ({"name": "q", "guaranteed": {"gpu": -1}}, "queues.0.guaranteed", ["0.5"]),
        ({"name": "q", "guaranteed": {"memory": "lots"}}, "queues.0.guaranteed", ["16GB"]),
        ({"name": "q", "limit": ["gpu"]}, "queues.0.limit", ["gpu: 8"]),
        ({"name": "q", "max_running": -1}, "queues.0.max_running", ["0 to"]),
        ({"name": "q", "guaranteed": {"cpu": 2}, "limit": {"cpu": 1}}, "queues.q.guaranteed.cpu", ["raise the limit"]),
        ({"name": "q", "parent": "nowhere"}, "queues.q.parent", ["nowhere"]),
        ({"name": "q", "parent": "q"}, "queues.q", ["own parent"]),
        ({"name": "q", "project": "nothing"}, "queues.q.project", ["default"]),
        ({"name": "q", "guaranteed": {"cpu": 513}}, "queues.q.guaranteed.cpu", ["512", "tidemill nodes"]),
        ({"name": "q", "guaranteed": {"gpu": 1}}, "queues.q.guaranteed.gpu", ["0"]),
        ("q", "queues.0", ["mapping"]),
    ],
)
def test_a_bad_place_in_the_tree_is_refused_by_field_value_and_mend(
    peer: Peer, queue: Any, field: str, words: list[str]
) -> None:
    refused(peer.call("PUT", "/v1/queues", {"queues": [queue]}), field, *words)
    assert peer.call("GET", "/v1/queues")[1]["items"] == []


def test_a_bad_tree_changes_nothing(peer: Peer) -> None:
    assert peer.call("PUT", "/v1/queues", GOOD)[0] == 200
    before = peer.call("GET", "/v1/queues")[1]
    a, b = {"name": "a", "parent": "b"}, {"name": "b", "parent": "a"}
    refused(peer.call("PUT", "/v1/queues", tree({"name": "fine"}, a, b)), "queues.a.parent", "below the next")
    refused(peer.call("PUT", "/v1/queues", tree(a, a)), "queues.a.name", "twice")
    under = {"name": "under", "parent": "vision"}
    refused(peer.call("PUT", "/v1/queues", tree(under)), "queues.under.parent", "cannot have queues below it")
    more = {"name": "vision", "project": "default", "parent": "research", "guaranteed": {"cpu": 301}}
    refused(peer.call("PUT", "/v1/queues/vision", more), "queues.research.guaranteed.cpu", "300")
    refused(peer.call("PUT", "/v1/queues/vision", {}), "queues.vision.project", "project")
    refused(peer.call("PUT", "/v1/queues/vision", {"project": "other"}), "queues.vision.project", "otherwise")
    refused(peer.call("PUT", "/v1/queues/x", {"name": "y"}), "name", "x")
    refused(peer.call("PUT", "/v1/queues", {}), "queues", "needed")
    assert peer.call("GET", "/v1/queues")[1] == before


def test_a_projects_limits_are_those_of_its_queue(peer: Peer) -> None:
    made = peer.call("POST", "/v1/projects", {"name": "vision", "limit_gpu_milli": 2_500, "limit_cpu_milli": 8_000})
    assert made[0] == 201
    assert made[1]["limit_gpu_milli"] == 2_500
    assert peer.call("GET", "/v1/queues")[1]["items"][0] == {
        "name": "vision", "parent": "", "project": "vision", "weight": 1, "guaranteed": {}, "limit": {"cpu": 8, "gpu": 2.5},
        "max_running": 0, "max_queued": 0,
    }  # fmt: skip
    more = {"project": "vision", "weight": 3, "limit": {"gpu": 4, "memory": "1TB"}}
    assert peer.call("PUT", "/v1/queues/vision", more)[0] == 200
    assert peer.call("POST", "/v1/projects", {"name": "vision", "limit_cpu_milli": 1_000})[1]["limit_gpu_milli"] == 0
    queue = peer.call("GET", "/v1/queues")[1]["items"][0]
    assert (queue["weight"], queue["limit"]) == (3, {"cpu": 1, "memory": "1TB"})
    assert peer.call("POST", "/v1/projects", {"name": "free"})[0] == 201
    assert len(peer.call("GET", "/v1/queues")[1]["items"]) == 1
    status, submitted = peer.call("POST", "/v1/workloads", {"spec": {"run": "x"}, "project": "free"})
    assert status == 201, submitted


def test_too_many_waiting_jobs_are_refused_at_the_door(peer: Peer) -> None:
    assert peer.call("PUT", "/v1/queues/default", {"project": "default", "max_queued": 2})[0] == 200
    peer.running(name="holder", resources={"cpus": 512})
    for name in ("one", "two"):
        peer.submit(name=name)
    status, problem = peer.call("POST", "/v1/workloads", {"spec": {"run": "x"}})
    assert (status, problem["reason"]) == (409, "TooManyQueued")
    assert "--max-queued" in problem["mend"]
    assert peer.call("POST", "/v1/workloads", {"spec": {"run": "x"}, "project": "other"})[0] == 201


def test_the_queue_lists_waiting_jobs_in_order_with_why(peer: Peer) -> None:
    peer.running(name="holder", resources={"cpus": 512})
    peer.submit(name="later")
    peer.submit(name="first", priority="high", nodes="2..4", spot=True)
    peer.submit(name="tomorrow", start_after="1d")
    peer.submit(name="third", after=["later"])
    peer.submit("two", name="theirs")
    items = peer.call("GET", "/v1/queue", token=peer.token("reader"))[1]["items"]
    positions = [item["position"] for item in items]
    assert [item["name"] for item in items] == ["first", "later", "tomorrow", "third"]
    assert 0 < positions[0] < positions[1] <= 3  # the one of others is counted, not shown
    assert positions[2:] == [0, 0]
    first = items[0]
    assert (first["nodes_min"], first["nodes"], first["capacity"], first["priority"]) == (2, 4, "spot", 100)
    assert (first["project"], first["user"]) == ("default", "one")
    assert first["reason"]["code"] == "NotEnoughFreeCpus"
    assert 0 <= first["waited_ns"] < HOUR_NS
    assert len(peer.call("GET", "/v1/queue?limit=1")[1]["items"]) == 1
    assert peer.call("GET", "/v1/queue?project=other")[1]["items"] == []
    assert peer.call("GET", "/v1/queue?limit=0")[0] == 422


NIGHT = {"name": "night", "nodes": 1, "start": "in 2h", "duration": "4h", "every": "1d"}


def test_a_reservation_is_made_listed_and_cancelled(peer: Peer) -> None:
    status, made = peer.call("POST", "/v1/reservations", NIGHT)
    assert status == 201, made
    assert (made["nodes"], made["project"], made["state"]) == (["a"], "default", "planned")
    assert made["window"] == {"from_ns": made["starts_at_ns"], "to_ns": made["starts_at_ns"] + 4 * HOUR_NS}
    assert abs(made["starts_at_ns"] - time.time_ns() - 2 * HOUR_NS) < HOUR_NS
    listed = peer.call("GET", "/v1/reservations", token=peer.token("reader"))[1]["items"]
    assert [one["name"] for one in listed] == ["night"]
    assert peer.call("GET", "/v1/reservations", token=peer.token("reader", "two"))[1]["items"] == []
    assert peer.call("DELETE", "/v1/reservations/night", token=peer.token("admin", "two"))[0] == 404
    key = {"Idempotency-Key": "k1"}
    assert peer.call("DELETE", "/v1/reservations/night", headers=key)[1]["state"] == "over"
    assert peer.call("DELETE", "/v1/reservations/night", headers=key)[0] == 200
    refused(peer.call("DELETE", "/v1/reservations/night"), "reservation", "reserve list")
    again = peer.call("POST", "/v1/reservations", NIGHT, headers={"Idempotency-Key": "k2"})
    assert again[0] == 201
    assert peer.call("POST", "/v1/reservations", NIGHT, headers={"Idempotency-Key": "k2"}) == again


def test_maintenance_concerns_all(peer: Peer) -> None:
    fix = {"name": "fix", "node": ["a"], "start": "now", "duration": "1h", "maintenance": True}
    status, made = peer.call("POST", "/v1/reservations", fix)
    assert (status, made["project"], made["state"]) == (201, "", "open")
    for organization in ("one", "two"):
        listed = peer.call("GET", "/v1/reservations", token=peer.token("reader", organization))[1]["items"]
        assert [one["name"] for one in listed] == ["fix"]
    refused(peer.call("POST", "/v1/reservations", fix | {"project": "other", "name": "y"}), "project", "Leave one")


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"name": "night"}, "name", ["stands"]),
        ({"start": "in 5h"}, "nodes", ["0 of the 1", "night"]),
        ({"nodes": 0, "node": ["a"], "start": "in 1d"}, "node", ["night has a", "another time"]),
        ({"nodes": 0, "node": ["b"]}, "node", ["no node b"]),
        ({"nodes": 0, "node": ["a", "node_a"]}, "node", ["twice"]),
        ({"nodes": 0}, "nodes", ["which nodes"]),
        ({"nodes": 2, "node": ["a"]}, "nodes", ["number of nodes or their names"]),
        ({"nodes": 0, "node": ["a"], "gpus": "H100:8"}, "gpus", ["not chosen"]),
        ({"nodes": 2, "start": "in 10h", "duration": "1h"}, "nodes", ["1 of the 1"]),
        ({"gpus": "H100:8", "start": "in 10h", "duration": "1h"}, "nodes", ["0 of the 1"]),
        ({"labels": {"zone": "a"}, "start": "in 10h", "duration": "1h"}, "nodes", ["0 of the 1"]),
        ({"start": "2020-01-01T00:00:00Z"}, "start", ["ago", "now"]),
        ({"start": "2027-01-01T00:00:00"}, "start", ["zone"]),
        ({"every": "1h"}, "every", ["4h"]),
        ({"every": 0}, "every", ["1h30m"]),
        ({"until": "in 8h"}, "until", ["comes again"]),
        ({"until": "in 1h", "every": "1d"}, "until", ["before it starts"]),
        ({"duration": "0s"}, "duration", ["length"]),
        ({"project": "nothing"}, "project", ["Projects:"]),
        ({"nodess": 1}, "nodess", ["nodes"]),
        ({"maintenance": "yes"}, "maintenance", ["true or false"]),
        ({"name": ""}, "name", ["letters"]),
    ],
)
def test_a_reservation_that_cannot_be_is_refused(
    peer: Peer, changes: dict[str, Any], field: str, words: list[str]
) -> None:
    assert peer.call("POST", "/v1/reservations", NIGHT)[0] == 201
    asked = {"name": "new", "nodes": 1, "start": "in 3h", "duration": "4h"} | changes
    refused(
        peer.call(
            "POST", "/v1/reservations", {key: value for key, value in asked.items() if value != 0 or key == "every"}
        ),
        field,
        *words,
    )
    assert len(peer.call("GET", "/v1/reservations")[1]["items"]) == 1


def test_anothers_reservation_is_in_the_way_without_its_name(peer: Peer) -> None:
    assert peer.call("POST", "/v1/reservations", NIGHT, token=peer.token("admin", "two"))[0] == 201
    by_name = peer.call("POST", "/v1/reservations", {"name": "n", "node": ["a"], "start": "3h", "duration": "1h"})
    by_number = peer.call("POST", "/v1/reservations", {"name": "n", "nodes": 1, "start": "3h", "duration": "1h"})
    for answer in (by_name, by_number):
        assert answer[0] == 422
        assert "night" not in str(answer[1])
    assert (
        peer.call("POST", "/v1/reservations", {"name": "night", "nodes": 1, "start": "7h", "duration": "1h"})[0] == 201
    )


def test_a_machine_is_cordoned_drained_and_resumed(peer: Peer) -> None:
    assert peer.call("POST", "/v1/nodes/a/mark", {"marking": "cordon", "reason": "disk"})[1]["state"] == "cordoned"
    node = peer.call("GET", "/v1/nodes")[1]["items"][0]
    assert (node["state"], node["marking"], node["workers"]) == ("cordoned", "cordon", 0)
    assert "disk" in node["state_cause"]
    assert peer.call("POST", "/v1/nodes/node_a/mark", {"marking": "drain"})[1]["state"] == "draining"
    assert peer.call("POST", "/v1/nodes/a/mark", {"marking": "resume"})[1]["state"] == "ready"
    refused(peer.call("POST", "/v1/nodes/b/mark", {"marking": "drain"}), "node", "tidemill nodes")
    refused(peer.call("POST", "/v1/nodes/a/mark", {"marking": "explode"}), "marking", "cordon, drain or resume")
    refused(peer.call("POST", "/v1/nodes/a/mark", {}), "marking", "needed")


def submitted(peer: Peer, **spec: Any) -> tuple[int, Any]:
    return peer.call("POST", "/v1/workloads", {"spec": {"run": "x", "name": "w"} | spec})


def test_dependencies_are_named_and_become_ids(peer: Peer) -> None:
    old = peer.submit(name="prepare")
    new = peer.submit(name="prepare")
    status, made = submitted(peer, after={"any": ["prepare"], "failed": [old["id"]]})
    assert status == 201
    assert made["spec"]["after"] == {"any": [new["id"]], "failed": [old["id"]]}
    refused(submitted(peer, after=["nothing"]), "after", "no workload nothing")
    theirs = peer.submit("two", name="theirs")
    refused(submitted(peer, after=[theirs["id"]]), "after", theirs["id"])
    refused(submitted(peer, after=["theirs"]), "after", "theirs")
    specs = [{"run": "x", "name": "a"}, {"run": "x", "name": "b", "after": ["a"]}]
    status, made = peer.call("POST", "/v1/workloads:batch", {"specs": specs})
    assert status == 201
    assert made["items"][1]["spec"]["after"] == {"ok": [made["items"][0]["id"]]}
    assert peer.call("POST", "/v1/workloads:batch", {"specs": specs[::-1]})[0] == 201  # the a of before
    backwards = [{"run": "x", "name": "c", "after": ["d"]}, {"run": "x", "name": "d", "after": ["c"]}]
    refused(peer.call("POST", "/v1/workloads:batch", {"specs": backwards}), "after", "no workload d")


def test_what_ended_otherwise_already_is_not_waited_for(peer: Peer) -> None:
    job, launch = peer.running(name="prepare")
    peer.report(launch, {"type": "exited", "exit_code": 0})
    eventually(lambda: peer.call("GET", f"/v1/jobs/{job}")[1]["state"] == "succeeded")
    assert submitted(peer, after=["prepare"])[0] == 201
    refused(submitted(peer, after={"failed": ["prepare"]}), "after", "ended well")
    job, launch = peer.running(name="broken", retry=0)
    peer.report(launch, {"type": "exited", "exit_code": 3})
    eventually(lambda: peer.call("GET", f"/v1/jobs/{job}")[1]["state"] == "failed")
    refused(submitted(peer, after=["broken"]), "after", "did not end well")
    assert submitted(peer, after={"any": ["broken"]})[0] == 201


def test_what_waits_for_what_will_not_come_is_refused_at_the_door(peer: Peer) -> None:
    refused(submitted(peer, start_before="2020-01-01T00:00:00Z"), "start_before", "over")
    refused(submitted(peer, reservation="night"), "reservation", "reserve list")
    assert peer.call("POST", "/v1/reservations", NIGHT)[0] == 201
    assert submitted(peer, reservation="night", max_duration="4h")[0] == 201
    refused(submitted(peer, reservation="night", max_duration="5h"), "max_duration", "4h")
    status, problem = peer.call(
        "POST", "/v1/workloads", {"spec": {"run": "x", "reservation": "night"}, "project": "other"}
    )
    assert (status, problem["field"]) == (422, "reservation")
    assert submitted(peer, group={"name": "g", "size": 3})[0] == 201
    refused(submitted(peer, group={"name": "g", "size": 2}), "group.size", "3 jobs")
    quote = {"spec": {"run": "x", "reservation": "nothing"}}
    refused(peer.call("POST", "/v1/quotes", quote), "reservation", "reserve list")


def test_a_group_that_could_never_start_is_refused_at_the_door(peer: Peer) -> None:
    large = {"group": {"name": "g", "size": 3}, "resources": {"cpus": 200}}
    assert submitted(peer, **large)[0] == 201
    assert submitted(peer, **large)[0] == 201
    refused(submitted(peer, **large), "group", "3 jobs of group g start together", "room for 2")
    quote = peer.call("POST", "/v1/quotes", {"spec": {"run": "x", "name": "w"} | large})[1]
    assert quote["feasible"] is False
    assert quote["reasons"][0]["code"] == "GroupTooLarge"
    assert submitted(peer, **large | {"resources": {"cpus": 100}})[0] == 201, "the third may be smaller"
    batch = [{"run": "x", "name": f"w{at}", **large, "group": {"name": "h", "size": 3}} for at in range(3)]
    refused(peer.call("POST", "/v1/workloads:batch", {"specs": batch}), "group", "group h")
    differ = [{"run": "x", "name": f"w{at}", "group": {"name": "i", "size": at + 2}} for at in range(2)]
    refused(peer.call("POST", "/v1/workloads:batch", {"specs": differ}), "group.size", "group i has 2 jobs")
    assert peer.call("PUT", "/v1/queues/vision", {"project": "default", "limit": {"cpu": 300}})[0] == 200
    limited = [{"run": "x", "name": f"w{at}", **large, "group": {"name": "j", "size": 2}} for at in range(2)]
    refused(peer.call("POST", "/v1/workloads:batch", {"specs": limited}), "vision", "300", "400")


def test_a_job_tells_of_its_checkpoints_with_its_own_token_only(peer: Peer) -> None:
    job, launch = peer.running(name="trains")
    path = f"/v1/jobs/{job}/checkpoint"
    assert peer.call("POST", path, {}, token=peer.token())[0] == 403
    _, other = peer.running(name="other")
    assert peer.call("POST", path, {}, token=other.job_token)[0] == 403
    before = time.time_ns()
    status, answer = peer.call("POST", path, {"detail": "step 100"}, token=launch.job_token)
    assert status == 202, answer
    assert answer["attempt_list"][0]["checkpoint_at_ns"] >= before
    refused(peer.call("POST", path, {"step": 1}, token=launch.job_token), "step", "detail")
    peer.report(launch, {"type": "exited", "exit_code": 0})
    assert peer.call("POST", path, {}, token=launch.job_token)[0] in (401, 404, 409)


def test_why_and_quote_have_all_their_fields(peer: Peer) -> None:
    peer.running(name="holder", resources={"cpus": 512})
    job = peer.submit(name="waits")["jobs"][0]["id"]
    why = peer.call("GET", f"/v1/jobs/{job}/why")[1]
    assert {"holdings", "forecast", "position", "ahead", "reasons", "lines"} <= set(why)
    quote = peer.call("POST", "/v1/quotes", {"spec": {"run": "x"}})[1]
    assert {"forecast", "finish_at_ns", "options", "displaces", "suggestions"} <= set(quote)
