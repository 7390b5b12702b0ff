"""Who may do what: every route has a policy, and what is another's is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.adapters.api_peer import PEPPER, ROLES, Peer
from tidemill.api.app import App, create_app, policies
from tidemill.api.guard import GuardedRoute
from tidemill.core import tokens
from tidemill.model.tenant import Scope

OPEN = {("GET", "/v1/healthz"), ("GET", "/v1/readyz"), ("GET", "/v1/openapi.json")}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    made = Peer(tmp_path_factory.mktemp("access"))
    yield made
    made.close()


def unplugged() -> App:
    settings = SimpleNamespace(host="127.0.0.1", hosts=(), is_open=False)
    plane: Any = SimpleNamespace(settings=settings)
    app = create_app(plane)
    assert isinstance(app, App)
    return app


def unguarded(app: Any) -> list[str]:
    """The routes that have no policy, or an empty one without being known to be open."""
    return [
        str(route)
        for route in app.routes
        if not isinstance(route, GuardedRoute)
        or any(not route.policy and (method, route.path) not in OPEN for method in route.methods or ())
    ]


def test_every_route_has_a_policy() -> None:
    assert unguarded(unplugged()) == []


def test_a_planted_route_without_a_policy_is_found() -> None:
    app = unplugged()

    @app.get("/v1/planted")
    async def planted() -> str:
        return ""

    assert len(unguarded(app)) == 1


def test_the_policies_are_these() -> None:
    """A change of who may do what shows here."""
    by_scope: dict[str, set[str]] = {}
    for (method, path), scopes in policies(unplugged()).items():
        by_scope.setdefault("|".join(scopes), set()).add(f"{method} {path}")
    assert {scopes: len(routes) for scopes, routes in by_scope.items()} == {
        "": 3,
        "submit": 37,
        "submit|read": 1,
        "read|job": 9,
        "submit|job": 5,
        "job": 1,
        "read": 42,
        "exec": 3,
        "runner": 9,
        "admin": 24,
        "gateway": 5,
        "join": 2,
        "outpost": 3,
    }
    assert by_scope["admin"] == {
        "POST /v1/projects", "GET /v1/tokens", "POST /v1/tokens", "DELETE /v1/tokens/{token_id}",
        "PUT /v1/tokens/{token_id}",
        "PUT /v1/queues", "PUT /v1/queues/{name}", "POST /v1/reservations", "DELETE /v1/reservations/{name}",
        "POST /v1/nodes/{node}/mark", "GET /v1/turns", "PUT /v1/sites/{name}",
        "PUT /v1/sites/{name}/links/{other}", "DELETE /v1/sites/{name}/links/{other}", "POST /v1/sites/{name}/tokens",
        "POST /v1/nodes/{name}/lost", "DELETE /v1/outposts/{outpost_id}",
        "POST /v1/volumes", "DELETE /v1/volumes/{name}",
        "GET /v1/strangers", "GET /v1/rentals", "PUT /v1/model-policy", "POST /v1/strangers/{launch_id}/stop",
        "POST /v1/jobs/stop",
    }  # fmt: skip


def _mistyped(token: str) -> str:
    return token[:-1] + ("y" if token.endswith("x") else "x")


def concrete(path: str, **names: str) -> str:
    return re.sub(r"{(\w+)}", lambda match: names.get(match[1], "nothing"), path)


ROUTES = [(method, path, scopes) for (method, path), scopes in policies(unplugged()).items()]


@pytest.mark.parametrize(("method", "path", "scopes"), ROUTES, ids=[f"{m} {p}" for m, p, _ in ROUTES])
def test_scope_by_route(peer: Peer, method: str, path: str, scopes: tuple[str, ...]) -> None:
    target = concrete(path) + ("?offset=0" if path.endswith("/logs") else "?wait=0" if "wait" in path else "")
    target += "?for_s=0.1" if path == "/v1/turns" else ""
    for role, granted in ROLES.items():
        status, answer = peer.call(
            method, target, raw=b"{}" if method in ("POST", "PUT") else None, token=peer.token(role)
        )
        may = not scopes or any(
            scope in granted
            or (Scope.ADMIN in granted and scope not in ("job", "runner", "gateway", "join", "outpost"))
            for scope in scopes
        )
        if may:
            assert status not in (401, 403), (role, answer)
        else:
            assert status == 403, (role, status, answer)
            assert method == "HEAD" or answer["code"] == "forbidden"
    for token in ("", "tm_user_nonsense", _mistyped(peer.token()), "Basic abc"):
        status, answer = peer.call(method, target, raw=b"{}" if method in ("POST", "PUT") else None, token=token)
        assert (status in (200, 503)) if not scopes else (status == 401), (token, status)
        if scopes and method != "HEAD":
            assert answer["code"] == "unauthorized"


def test_what_is_anothers_is_not_there(peer: Peer, tmp_path: Path) -> None:
    job_id, launch = peer.running(name="private", organization="two")
    workload_id = peer.call("GET", f"/v1/jobs/{job_id}", token=peer.token("reader", "two"))[1]["workload_id"]
    output = peer.home / "local" / "volumes" / "prj_two_default" / job_id / "output"
    output.mkdir(parents=True)
    (output / "model").write_text("weights")
    made = {"name": "gpt", "job": job_id, "path": "model"}
    assert peer.call("POST", "/v1/artifacts", made, token=peer.token("submitter", "two"))[0] == 201
    assert peer.call("PUT", "/v1/secrets/KEY", {"value": "x"}, token=peer.token("submitter", "two"))[0] == 200
    status, session = peer.call(
        "POST", f"/v1/jobs/{job_id}/exec", {"command": ["ls"]}, token=peer.token("executor", "two")
    )
    assert status == 201
    known = peer.call("GET", "/v1/tokens", token=peer.token("admin", "two"))[1]["items"][0]["id"]
    names = {
        "token_id": known, "exec_id": session["exec_id"], "launch_id": launch.launch_id, "name": "KEY", "sha256": "0" * 64,
    }  # fmt: skip
    references = [job_id, job_id[:-3], "private", workload_id, workload_id[:-2]]
    outsiders = [peer.token("admin", "one"), peer.token("other", "two"), peer.token("other", "one")]
    tried = 0
    for method, path in policies(peer.app):
        if (
            "{" not in path
            or (method, path) in OPEN
            or (path.startswith(("/v1/secrets", "/v1/queues", "/v1/sites", "/mlflow")) and method == "PUT")
        ):
            continue
        for reference in references if "{reference}" in path else [""]:
            target = concrete(path, reference="gpt" if "artifacts" in path else reference, **names)
            target += "?offset=0" if path.endswith("/{launch_id}/logs") else ""
            for token in outsiders:
                body = {"command": ["ls"]} if path.endswith("exec") else {"value": "x"} if "secrets" in path else {}
                status, answer = peer.call(
                    method, target, body if method in ("POST", "PUT", "PATCH") else None, token=token
                )
                assert status in (403, 404, 422), (method, target, status, answer)
                assert "weights" not in str(answer)
                tried += 1
    assert tried > 100
    for path in ("/v1/jobs", "/v1/artifacts", "/v1/secrets", "/v1/events", "/v1/ledger", "/v1/usage"):
        answer = peer.call("GET", path, token=peer.token("reader", "one"))[1]
        assert "private" not in str(answer)
        assert job_id not in str(answer)
        assert "KEY" not in str(answer)
    for token in outsiders[:1]:
        assert peer.call("POST", "/v1/artifacts", made, token=token)[0] == 404
    assert peer.call("GET", f"/v1/jobs/{job_id}", token=peer.token("reader", "two"))[1]["state"] == "running"


def test_a_jobs_own_token_opens_that_job_only(peer: Peer) -> None:
    job_id, launch = peer.running(name="own")
    other, _ = peer.running(name="neighbour")
    assert peer.call("GET", f"/v1/jobs/{job_id}", token=launch.job_token)[0] == 200
    assert peer.call("GET", "/v1/workloads/own", token=launch.job_token)[0] == 200
    assert peer.call("GET", f"/v1/jobs/{other}", token=launch.job_token)[0] == 403
    assert peer.call("GET", "/v1/workloads/neighbour", token=launch.job_token)[0] == 403
    assert peer.call("POST", "/v1/artifacts", {"name": "x", "job": other}, token=launch.job_token)[0] == 403
    assert peer.call("POST", "/v1/workloads", {"spec": {"run": "x"}}, token=launch.job_token)[0] == 403
    assert peer.call("GET", "/v1/jobs", token=launch.job_token)[0] == 403


def test_a_runners_token_opens_its_launch_only(peer: Peer) -> None:
    _, mine = peer.running(name="mine")
    _, other = peer.running(name="others")
    path = f"/v1/runners/{other.launch_id}/beat"
    assert peer.call("POST", path, {"fence": 1}, token=mine.runner_token)[0] == 404
    assert peer.call("POST", path, {"fence": 1}, token=other.runner_token)[0] == 200
    assert peer.call("POST", path, {"fence": 1}, token=other.job_token)[0] == 403
    assert peer.call("POST", path, {"fence": 7}, token=other.runner_token)[1]["code"] == "fenced"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_other_hosts_and_origins_are_refused_whatever_the_method(peer: Peer, method: str) -> None:
    for path in ("/v1/healthz", "/v1/jobs", "/nowhere"):
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1:7070@evil",
            "localhost/#@x",
            "",
            "[::1",
            "127.0.0.1:x",
        ):
            assert peer.call(method, path, headers={"Host": host})[0] in (400, 421), host
        for origin in ("https://evil.example", "null", "http://127.0.0.1", f"file://127.0.0.1:{peer.port}"):
            assert peer.call(method, path, headers={"Origin": origin})[0] == 403, origin


def test_own_names_and_pages_are_let_in(peer: Peer) -> None:
    for host in (f"127.0.0.1:{peer.port}", "localhost", "LOCALHOST:80", "[::1]:7070", "[::1]"):
        assert peer.call("GET", "/v1/status", headers={"Host": host})[0] == 200
    own = {"Host": f"localhost:{peer.port}", "Origin": f"http://localhost:{peer.port}"}
    assert peer.call("GET", "/v1/status", headers=own)[0] == 200


def test_a_token_gets_no_more_than_its_maker(peer: Peer) -> None:
    for scopes in (["runner"], ["gateway"], ["job"], ["admin", "runner"]):
        assert peer.call("POST", "/v1/tokens", {"name": "x", "scopes": scopes})[0] == 403
    status, made = peer.call("POST", "/v1/tokens", {"name": "x", "scopes": ["read"], "project": "other"})
    assert status == 201
    assert peer.call("GET", "/v1/projects", token=made["token"])[1]["items"][0]["name"] == "other"
    assert made["expires_at_ns"] > 0
    assert "token" not in str(peer.call("GET", "/v1/tokens")[1]["items"][0].keys())
    assert peer.call("DELETE", f"/v1/tokens/{made['id']}")[0] == 200
    assert peer.call("GET", "/v1/projects", token=made["token"])[0] == 401
    assert peer.call("POST", "/v1/tokens", {"name": "x", "scopes": ["read"], "role": "admin"})[0] == 422


def test_what_a_key_may_ask_of_models_is_said_changed_and_told_to_the_gateway(peer: Peer) -> None:
    said = {
        "models": ["llama-*"],
        "limits": {"requests/minute": 60, "usd/month": 12.5},
        "priority": "low",
        "label": "nightly",
    }
    status, made = peer.call("POST", "/v1/tokens", {"name": "key", "scopes": ["infer"], **said})
    assert status == 201, made
    assert {name: made[name] for name in said} == said
    status, changed = peer.call("PUT", f"/v1/tokens/{made['id']}", {"limits": {"concurrency": 4}, "priority": "high"})
    assert (status, changed["limits"], changed["priority"]) == (200, {"concurrency": 4}, "high")
    assert (changed["models"], changed["label"]) == (["llama-*"], "nightly"), "what was left out stays"
    assert peer.call("POST", "/v1/projects", {"name": "other", "limits": {"tokens/day": 1000}})[0] == 201
    assert peer.call("POST", "/v1/projects", {"name": "other"})[1]["limits"] == {"tokens/day": 1000}
    feed = peer.plane.serving.feed()[1]
    [key] = [key for key in feed["tokens"].values() if key["id"] == made["id"]]
    assert {name: key[name] for name in ("models", "limits", "band", "label")} == {
        "models": ["llama-*"],
        "limits": {"concurrency": 4},
        "band": 0,
        "label": "nightly",
    }
    assert feed["projects"]["prj_one_other"] == {"limits": {"tokens/day": 1000}}
    peer.call("DELETE", f"/v1/tokens/{made['id']}")
    assert peer.call("PUT", f"/v1/tokens/{made['id']}", {"label": "x"})[1]["revoked_at_ns"] > 0, "it stays revoked"


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"requests/hour": 1}, "'requests/hour' is not a limit"),
        ({"tokens/day": 1.5}, "write a whole number"),
        ({"usd/month": -1}, "is not an amount for usd/month"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_its_name(peer: Peer, limits: dict[str, float], says: str) -> None:
    status, answer = peer.call("POST", "/v1/tokens", {"name": "key", "scopes": ["infer"], "limits": limits})
    assert (status, answer["field"]) == (422, "limits"), answer
    assert says in answer["detail"]
    assert answer["mend"]


def test_usage_adds_up_by_model_key_user_and_label_with_its_price(peer: Peer) -> None:
    token = tokens.derive("gw", "gateway", PEPPER)
    usages = [
        {
            "id": f"ab-{number:x}",
            "at_ns": 10 + number,
            "project": "prj_one_default",
            "token": "tok_1",
            "model": "m",
            "workload": "wl",
            "job": "job",
            "prompt_tokens": 1000,
            "completion_tokens": number,
            "is_estimated": False,
            "user": f"user {number % 2}",
            "label": "nightly",
            "price": [150_000, 2_000_001],
        }
        for number in range(4)
    ]
    for entered in (4, 0):
        assert peer.call("POST", "/v1/gateway/usage", {"usages": usages}, token=token) == (200, {"entered": entered})
    answer = peer.call("GET", "/v1/usage?project=default&by=user,label")[1]
    assert [(one["user"], one["label"], one["requests"], one["completion_tokens"]) for one in answer["tokens"]] == [
        ("user 0", "nightly", 2, 2),
        ("user 1", "nightly", 2, 4),
    ]
    assert answer["tokens_amount_micro"] == (4 * 1000 * 150_000 + 6 * 2_000_001) // 1_000_000
    [since] = peer.call("GET", "/v1/usage?project=default&by=&since_ns=12")[1]["tokens"]
    assert (since["requests"], since["model"], since["token_id"]) == (2, "", "")
    assert peer.call("GET", "/v1/usage?by=colour")[1]["field"] == "by"
    [first] = peer.call("GET", "/v1/ledger/tokens?project=default&limit=1")[1]["items"]
    assert (first["user"], first["label"], first["amount_pico"]) == ("user 0", "nightly", 150_000_000)
