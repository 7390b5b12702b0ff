"""MLflow's registry API: its own client works unchanged, and requests as it sends them are answered as it expects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.adapters.api_peer import Peer
from tests.adapters.test_models import client, folder, member, output
from tests.adapters.test_screening import safetensors
from tidemill.core import modelsearch
from tidemill.core.modelsearch import Found, filter_of, order_of

CLIENT = "mlflow-skinny==3.17.2"
API = "/mlflow/api/2.0/mlflow"
FILES = "/mlflow/api/2.0/mlflow-artifacts/artifacts"


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    yield made
    made.close()


def python_with_client(root: Path) -> Path:
    """A Python that has MLflow's client: that of ``MLFLOW_PYTHON``, or one that is made."""
    if known := os.environ.get("MLFLOW_PYTHON"):
        return Path(known)
    made = root / "mlflow"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(made)], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(made / "bin/python"), CLIENT], check=True)
    return made / "bin/python"


@pytest.mark.long
def test_its_own_client_works_unchanged(peer: Peer, tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    (model / "sub").mkdir()
    (model / "sub" / "note.txt").write_text("a note")
    job_id, _ = peer.running(name="trains")
    folder(output(peer, job_id) / "model", 5)
    with client(peer) as one:
        one.push_model("of-job", folder(tmp_path / "other", 3))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{peer.port}/mlflow",
        "MLFLOW_TRACKING_TOKEN": member(peer),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "JOB": job_id,
    }
    script, python = Path(__file__).with_name("mlflow_client.py"), python_with_client(tmp_path)
    done = subprocess.run(
        [str(python), str(script), str(model), "other"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4_000:]
    told = json.loads(done.stdout.splitlines()[-1])
    names = ["config.json", "model.safetensors", "sub"]
    assert told["uploaded"] == told["listed"] == told["by stage"] == told["by alias"] == names
    assert told["below"] == [["sub/note.txt", False, 6]]
    assert told["made"] == ["with-client", 1, "READY", "None", {"kind": "first"}]
    assert (told["again"], told["one"]) == (2, "a note")
    assert told["got"] == {
        path: (model / path).read_bytes().hex() for path in ("config.json", "model.safetensors", "sub/note.txt")
    }
    assert told["stages"] == {"1": "Archived", "2": "Production"}
    assert told["latest"] == {"Archived": 1, "Production": 2}
    assert told["production"] == [2]
    assert (told["champion"], told["aliases"]) == (1, {"champion": "1"})
    assert told["second"] == [{"quality": "good"}, "the second", ""]
    assert told["first tags"] == {}
    assert told["model"] == [{"team": "a b"}, "a model", {}, [1, 2]]
    assert told["greek"] == ["alpha", "gamma"]
    assert told["like"] == ["gamma"]
    assert told["ordered"] == ["gamma", "beta", "alpha"]
    assert told["pages"] == [["alpha", "beta"], ["gamma"], ""]
    assert told["newer"] == [2]
    assert told["copied"] == ["copied", 1, "models:/with-client/2"]
    assert told["renamed"] == "delta"
    assert told["errors"] == {
        "taken": "RESOURCE_ALREADY_EXISTS",
        "missing": "RESOURCE_DOES_NOT_EXIST",
        "no version": "RESOURCE_DOES_NOT_EXIST",
        "filter": "INVALID_PARAMETER_VALUE",
        "source": "INVALID_PARAMETER_VALUE",
        "nothing there": "INVALID_PARAMETER_VALUE",
        "stage": "INVALID_PARAMETER_VALUE",
        "needed": "RESOURCE_CONFLICT",
        "name": "INVALID_PARAMETER_VALUE",
    }
    assert told["pickle"] == "INVALID_PARAMETER_VALUE"
    assert told["left"] == [2]
    assert told["names"] == ["alpha", "beta", "copied", "of-job", "with-client"]
    assert told["removed"] == told["elsewhere"] == []
    assert told["of job"] == [2, job_id]
    with client(peer) as one:
        assert [it.reference for it in one.job_models(job_id)] == ["of-job:2"]
        assert one.model_version("with-client:production").version == 2
    elsewhere = environment | {
        "MLFLOW_REGISTRY_URI": environment["MLFLOW_TRACKING_URI"],
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    only_registry = "import mlflow; print(mlflow.artifacts.download_artifacts('models:/with-client/2/sub/note.txt'))"
    done = subprocess.run(
        [str(python), "-c", only_registry],
        env=elsewhere,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    assert Path(done.stdout.splitlines()[-1]).read_text() == "a note"


def ask(peer: Peer, method: str, path: str, body: Any = None, *, role: str = "", **query: str) -> tuple[int, Any]:
    target = f"{API}/{path}" + (f"?{urlencode(query)}" if query else "")
    return peer.call(method, target, body, token=peer.token(role) if role else member(peer))


def upload(peer: Peer, path: str, content: bytes) -> int:
    headers = {"Content-Type": "text/plain"}
    return peer.call("PUT", f"{FILES}/{path}", raw=content, headers=headers, token=member(peer))[0]


def test_requests_as_the_client_sends_them_are_answered_as_it_expects(peer: Peer) -> None:
    assert ask(peer, "POST", "registered-models/create", {"name": "tiny", "later": 1})[0] == 200
    status, answer = ask(peer, "POST", "registered-models/create", {"name": "tiny"})
    assert (status, answer["error_code"]) == (409, "RESOURCE_ALREADY_EXISTS")
    assert "already" in answer["message"]
    content = safetensors(6)
    assert upload(peer, "run/model/model.safetensors", content) == 200
    assert upload(peer, "run/model/sub/a.txt", b"a") == 200
    source = "mlflow-artifacts:/run/model"
    status, answer = ask(peer, "POST", "model-versions/create", {"name": "tiny", "source": source, "run_id": "r1"})
    made = answer["model_version"]
    assert (status, made["version"], made["status"], made["run_id"]) == (200, "1", "READY", "r1")
    uri = ask(peer, "GET", "model-versions/get-download-uri", name="tiny", version="1")[1]["artifact_uri"]
    assert uri == f"http://127.0.0.1:{peer.port}{FILES}/models/tiny/1"
    listed = peer.call("GET", f"{FILES}?path=models/tiny/1", token=member(peer))[1]["files"]
    assert listed == [
        {"path": "model.safetensors", "is_dir": False, "file_size": len(content)},
        {"path": "sub", "is_dir": True},
    ]
    assert peer.call("GET", f"{FILES}/models/tiny/1/model.safetensors", token=member(peer))[1] == content
    part = peer.call(
        "GET", f"{FILES}/models/tiny/1/model.safetensors", headers={"Range": "bytes=8-"}, token=member(peer)
    )
    assert part == (206, content[8:])
    with client(peer) as one:
        assert one.model_version("tiny:1").parameters == 6


def test_files_stay_within_the_project_and_versions_do_not_change(peer: Peer) -> None:
    assert upload(peer, "mine/a.txt", b"a") == 200
    for path in ("../evil", "a/../../evil", "a//b", "a/%00b", ".upload-x", "models/tiny/1/x", ""):
        assert upload(peer, path, b"x") in (404, 405, 422), path
    assert upload(peer, "mine/a.txt/below", b"x") == 422, "a file is in the way"
    for token in (peer.token("admin", "two"), peer.token("other")):
        status, answer = peer.call("GET", f"{FILES}/mine/a.txt", token=token)
        assert (status, answer["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")
    status, answer = peer.call("GET", f"{API}/registered-models/search", token="nonsense")
    assert (status, answer["error_code"]) == (401, "UNAUTHENTICATED")
    status, answer = ask(peer, "POST", "registered-models/create", {"name": "x"}, role="reader")
    assert (status, answer["error_code"]) == (403, "PERMISSION_DENIED")
    headers = {"X-MLFLOW-WORKSPACE": "nowhere"}
    status, answer = peer.call("GET", f"{API}/registered-models/search", headers=headers, token=member(peer))
    assert (status, answer["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")


def test_what_is_asked_wrongly_is_named(peer: Peer) -> None:
    for method, path, body, query, told in (
        ("GET", "registered-models/get", None, {}, "name is needed"),
        ("GET", "model-versions/get", None, {"name": "x", "version": "one"}, "no version's number"),
        ("GET", "registered-models/search", None, {"max_results": "0"}, "not from 1"),
        ("GET", "registered-models/search", None, {"page_token": "x"}, "no number"),
        ("GET", "registered-models/search", None, {"order_by": "size"}, "no order"),
        ("GET", "registered-models/search", None, {"filter": "name = tiny"}, "no text in quotes"),
        ("POST", "registered-models/alias", {"name": "x", "alias": "a"}, {}, "which version"),
        ("POST", "registered-models/create", {"name": 7}, {}, "string"),
    ):
        status, answer = ask(peer, method, path, body, **query)
        assert (status, answer["error_code"]) == (422, "INVALID_PARAMETER_VALUE")
        assert told in answer["message"]


NAMES = st.sampled_from(["a", "b", "A", "ab", "a'b", "a%b", "", "ü"])
THINGS = st.lists(
    st.tuples(NAMES, st.integers(1, 9), st.dictionaries(st.sampled_from(["k", "l.m"]), NAMES)), max_size=6
)


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


CLAUSES = st.one_of(
    st.tuples(st.sampled_from(["name", "attribute.name"]), st.sampled_from(["=", "!="]), NAMES),
    st.tuples(st.just("version_number"), st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), st.integers(1, 9)),
    st.tuples(st.sampled_from(["tags.k", "tag.`l.m`"]), st.sampled_from(["=", "!="]), NAMES),
)
COMPARE: dict[str, Any] = {
    "=": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


def check_filters(things: list[Any], clauses: list[Any]) -> None:
    written = " AND ".join(
        f"{name} {op} {value if isinstance(value, int) else quoted(value)}" for name, op, value in clauses
    )

    def is_meant(thing: Any) -> bool:
        values = {"name": thing[0], "attribute.name": thing[0], "version_number": thing[1]}
        values |= {"tags.k": thing[2].get("k"), "tag.`l.m`": thing[2].get("l.m")}
        return all(values[name] is not None and COMPARE[op](values[name], value) for name, op, value in clauses)

    found = [Found({"name": name, "version_number": number}, tags) for name, number, tags in things]
    assert [filter_of(written)(one) for one in found] == [is_meant(thing) for thing in things]


@settings(max_examples=150, deadline=None)
@given(THINGS, st.lists(CLAUSES, max_size=3))
def test_filters_find_what_they_say(things: list[Any], clauses: list[Any]) -> None:
    check_filters(things, clauses)


def test_the_property_catches_a_filter_that_takes_what_has_no_such_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        modelsearch,
        "_value",
        lambda found, name, is_tag: found.tags.get(name, "") if is_tag else found.attributes[name],
    )

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(THINGS, st.lists(CLAUSES, max_size=3))
    def run(things: list[Any], clauses: list[Any]) -> None:
        check_filters(things, clauses)

    with pytest.raises(AssertionError):
        run()


def test_patterns_lists_and_orders() -> None:
    found = [Found({"name": name, "version_number": n}, {}) for n, name in enumerate(("tiny", "Tin", "other", "t_n"))]

    def names(text: str) -> list[Any]:
        return [one.attributes["name"] for one in found if filter_of(text)(one)]

    assert names("name LIKE 'T%'") == ["Tin"]
    assert names("name ILIKE 't%'") == ["tiny", "Tin", "t_n"]
    assert names("name LIKE 't_n'") == ["t_n"]
    assert names('name IN ("tiny", "other")') == ["tiny", "other"]
    assert names("name NOT IN ('tiny') AND version_number >= 2") == ["other", "t_n"]
    assert names("tags.`mlflow.prompt.is_prompt` = 'false'") == ["tiny", "Tin", "other", "t_n"]
    ordered = order_of(["version_number DESC", "name"], ("name", "version_number"))(found)
    assert [one.attributes["version_number"] for one in ordered] == [3, 2, 1, 0]


@given(st.text(max_size=60))
def test_filters_that_make_no_sense_are_refused_with_a_sentence(text: str) -> None:
    try:
        test = filter_of(text)
    except ValueError as error:
        told = str(error)
    else:
        told = "understood" if test(Found({"name": "x"}, {})) in (True, False) else ""
    assert told
