"""The client against a peer that speaks the contract: retries, errors, uploads, commands inside workers, files."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.sdk_peer import JOB_ID, TOKEN, Peer, _tar, job_json, running_peer
from tidemill.errors import (
    ErrorKind,
    Fenced,
    IdempotencyMismatch,
    InvalidRequest,
    InvalidSpec,
    NotFound,
    TidemillError,
    Unauthorized,
    Unavailable,
)
from tidemill.sdk import Client, Job, Status, checkpointed
from tidemill.sdk.transport import Transport, error_from


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running_peer() as running:
        yield running


@pytest.fixture
def client(peer: Peer) -> Iterator[Client]:
    with Client(peer.url, TOKEN) as made:
        yield made


def test_unknown_fields_are_ignored_and_missing_ones_take_their_default():
    job = Job.from_json(job_json(reason={"code": "X", "sentence": "s", "new": 1}, workers=[{"rank": 1, "new": 2}]))
    assert job.reason is not None
    assert (job.reason.sentence, job.workers[0].rank, job.workers[0].node) == ("s", 1, "")
    assert Job.from_json(job.to_json()) == job
    assert Status.from_json({"jobs": [["running", 2]]}).jobs == {"running": 2}


@pytest.mark.parametrize(
    ("state", "exit_code", "status"),
    [
        ("succeeded", 0, 0),
        ("failed", 3, 3),
        ("failed", None, 1),
        ("failed", 0, 1),
        ("cancelled", None, 1),
        ("failed", -9, 137),
    ],
)
def test_a_job_stands_for_an_exit_status(state, exit_code, status):
    assert Job(state=state, exit_code=exit_code).exit_status == status


def test_connections_are_kept(peer: Peer, client: Client):
    for _ in range(5):
        client.status()
    assert peer.connections == 1


def test_a_write_that_was_cut_off_is_sent_again_with_the_same_key(peer: Peer, client: Client):
    peer.failures = ["reset", "503", "reset"]
    client.submit({"run": "echo hi"})
    keys = {headers["Idempotency-Key"] for headers, _ in peer.sent("POST", "/v1/workloads")}
    assert len(peer.sent("POST", "/v1/workloads")) == 4
    assert len(keys) == 1
    client.submit({"run": "echo hi"})
    assert len({headers["Idempotency-Key"] for headers, _ in peer.sent("POST", "/v1/workloads")}) == 2


def test_retries_end_in_time_and_tell_of_each(peer: Peer):
    told: list[TidemillError] = []
    with Client(peer.url, TOKEN, retry_for_s=0.3, on_retry=told.append) as client:
        peer.failures = ["503"] * 100
        with pytest.raises(Unavailable, match="busy"):
            client.status()
    assert told


def test_a_refused_connection_says_where_it_was_tried():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with (
            Client(url, TOKEN, retry_for_s=0.1) as client,
            pytest.raises(Unavailable, match="refuses connections") as error,
        ):
            client.status()
    assert url in error.value.detail


@pytest.mark.parametrize(
    ("status", "body", "kind", "raised"),
    [
        (
            422,
            {"code": "invalid_spec", "kind": "invalid", "detail": "d", "field": "nodes", "value": 0},
            "invalid",
            InvalidSpec,
        ),
        (422, {"code": "idempotency_mismatch", "kind": "invalid", "detail": "d"}, "invalid", IdempotencyMismatch),
        (409, {"code": "fenced", "kind": "conflict", "detail": "d"}, "conflict", Fenced),
        (429, {"code": "brand_new", "kind": "infeasible", "detail": "d"}, "infeasible", TidemillError),
        (404, b"<html>no</html>", "not_found", NotFound),
        (400, b"", "invalid", InvalidRequest),
        (418, {"detail": [{"loc": ["body"]}]}, "invalid", InvalidRequest),
        (500, b"\xff", "internal", TidemillError),
        (503, {"code": "other", "kind": "nonsense"}, "unavailable", Unavailable),
    ],
)
def test_errors_are_rebuilt_by_code_then_kind_then_status(status, body, kind, raised):
    error = error_from(status, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert isinstance(error, raised)
    assert error.kind is ErrorKind(kind)
    assert error.detail


def test_every_mistake_in_a_spec_is_there(peer: Peer, client: Client):
    problem = {
        "code": "invalid_spec",
        "kind": "invalid",
        "detail": "2 mistakes",
        "errors": [{"field": "a"}, {"field": "b"}],
    }
    peer.routes["POST", "/v1/workloads.*"] = lambda *_, **__: (422, problem)
    with pytest.raises(InvalidSpec) as error:
        client.submit({"nodes": 0})
    assert [item["field"] for item in error.value.data["errors"]] == ["a", "b"]


def test_a_wrong_token_is_told_from_a_missing_thing(peer: Peer):
    with Client(peer.url, "wrong") as client, pytest.raises(Unauthorized):
        client.status()
    with Client(peer.url, TOKEN) as client, pytest.raises(NotFound):
        client.job("nobody")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:b", "http://127.0.0.1:99999999"])
def test_a_wrong_address_is_refused(url):
    with pytest.raises(InvalidRequest):
        Transport(url, "t")


def test_the_admin_token_goes_to_the_own_control_plane_only(peer: Peer, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TIDEMILL_HOME", str(tmp_path))
    for name in ("TIDEMILL_API_URL", "TIDEMILL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unavailable, match="not running"):
        Client()
    (tmp_path / "endpoint.json").write_text(json.dumps({"api_url": peer.url, "pid": 2**22 + 1}))
    (tmp_path / "admin.token").write_text(TOKEN + "\n")
    with pytest.raises(Unavailable, match="not running"):
        Client()
    (tmp_path / "endpoint.json").write_text(json.dumps({"api_url": peer.url, "pid": 1}))
    with Client() as client:
        assert client.status().version == "0.1.0"
    monkeypatch.setenv("TIDEMILL_API_URL", "http://elsewhere.example")
    with pytest.raises(Unauthorized):
        Client()


def test_a_folder_is_sent_once(peer: Peer, client: Client, tmp_path: Path):
    (tmp_path / "a.py").write_text("print(1)")
    seen: list[tuple[int, int]] = []
    first = client.upload_workdir(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert client.upload_workdir(tmp_path) == first
    assert len(peer.sent("PUT", f"/v1/blobs/{first}")) == 1
    assert seen[-1] == (8, 8)
    (tmp_path / "a.py").write_text("print(2)")
    peer.failures = ["", "503"]
    assert client.upload_workdir(tmp_path) != first


def test_a_spec_file_takes_its_own_folder_along(peer: Peer, client: Client, tmp_path: Path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("print(1)")
    (tmp_path / "w.yaml").write_text("run: python a.py\nworkdir: code\n")
    client.submit(tmp_path / "w.yaml")
    spec = json.loads(peer.sent("POST", "/v1/workloads")[0][1])["spec"]
    assert spec["workdir"] in peer.blobs


def test_a_command_inside_a_worker(peer: Peer, client: Client):
    result = client.exec("hello", ["cat"], stdin=b"words")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out", b"err")


def test_a_command_that_cannot_be_run_says_why(peer: Peer, client: Client):
    peer.exec_output = [(b"r", b"no such file")]
    with pytest.raises(TidemillError, match="no such file"):
        client.exec("hello", ["nope"])


def test_a_worker_that_is_cut_off_is_not_taken_for_a_success(peer: Peer, client: Client):
    peer.exec_output = [(b"o", b"part")]
    with pytest.raises(Unavailable):
        client.exec("hello", ["cat"])


def test_files_come_out_of_a_job(client: Client, tmp_path: Path):
    written = client.copy_from("hello", "model", tmp_path / "here")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in written) == ["here/sub/a.txt", "here/weights.bin"]
    (tmp_path / "into").mkdir()
    client.copy_from("hello", "model", tmp_path / "into")
    assert (tmp_path / "into" / "model" / "sub" / "a.txt").read_text() == "a"


def test_a_file_is_told_from_a_folder_of_its_name(peer: Peer, client: Client, tmp_path: Path):
    peer.outputs = _tar({"model": b"w"})
    assert client.copy_from("hello", "model", tmp_path / "file") == [tmp_path / "file"]
    peer.there = {"model", "model/model"}
    assert client.copy_from("hello", "model", tmp_path / "folder") == [tmp_path / "folder" / "model"]


def test_files_come_out_of_a_running_worker(peer: Peer, client: Client, tmp_path: Path):
    peer.exec_output = [(b"o", _tar({"data/x": b"1", "data/data/y": b"2"})), (b"x", b"0")]
    client.copy_from("hello", "/srv/data", tmp_path / "here")
    assert ((tmp_path / "here" / "x").read_text(), (tmp_path / "here" / "data" / "y").read_text()) == ("1", "2")
    peer.exec_output = [(b"e", b"cd: /nope: No such file"), (b"x", b"2")]
    with pytest.raises(NotFound, match="No such file"):
        client.copy_from("hello", "/nope/x", tmp_path / "there")


def test_files_go_into_a_running_worker(peer: Peer, client: Client, tmp_path: Path):
    peer.exec_output = [(b"x", b"0")]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("words")
    client.copy_to("hello", tmp_path / "d", "sets/")
    command = json.loads(peer.sent("POST", "/v1/jobs/hello/exec")[0][1])["command"]
    assert command[-1] == 'cd -- "$TIDEMILL_OUTPUT_DIR" && mkdir -p -- sets && exec tar -xf - -C sets'
    peer.exec_output = [(b"e", b"tar: read-only"), (b"x", b"2")]
    with pytest.raises(InvalidRequest, match="read-only"):
        client.copy_to("hello", tmp_path / "d", "/etc/")


def test_an_archive_cannot_write_elsewhere(peer: Peer, client: Client, tmp_path: Path):
    peer.outputs = _tar({"../evil": b"x"})
    with pytest.raises(InvalidRequest):
        client.copy_from("hello", "model", tmp_path / "here")
    assert not (tmp_path / "evil").exists()


def test_lists_go_on_over_pages(peer: Peer, client: Client):
    pages = {"": ("job_1", "c1"), "c1": ("job_2", "c2"), "c2": ("job_3", "")}

    def page(*_, query, **__):
        name, cursor = pages[query.get("cursor", "")]
        return 200, {"items": [job_json(id=name)], "next_cursor": cursor}

    peer.routes["GET", "/v1/jobs"] = page
    assert [job.id for job in client.jobs()] == ["job_1", "job_2", "job_3"]
    assert [job.id for job in client.jobs(limit=2)] == ["job_1", "job_2"]


def test_names_stay_one_segment_of_the_path(peer: Peer, client: Client):
    for ref in ("..", ".", "a/b", "a?b", "ü"):
        with pytest.raises(NotFound):
            client.job(ref)
    assert all("/v1/jobs/" in path and path.count("/") == 3 for _, path, _, _ in peer.requests)
    assert client.job(JOB_ID).id == JOB_ID


def test_what_is_shared_reads_back_as_it_is_written(client: Client):
    queued, share, queue, reservation = (
        client.queue()[0],
        client.share()[0],
        client.queues()[0],
        client.reservations()[0],
    )
    assert (queued.nodes_min, queued.nodes, queued.capacity) == (2, 8, "spot")
    assert queued.reason is not None
    assert queued.reason.code == "NotEnoughFreeGpus"
    assert share.borrowed == {"gpu": 1000}
    assert queue.guaranteed == {"gpu": 8, "memory": "512GB"}
    assert reservation.window == {"from_ns": 2 * 10**18, "to_ns": 2 * 10**18 + 14_400 * 10**9}
    for value in (queued, share, queue, reservation):
        assert type(value).from_json(json.loads(json.dumps(value.to_json()))) == value


def test_why_and_quote_carry_what_they_are_made_of(peer: Peer, client: Client):
    why = client.why("hello")
    assert why.forecast is not None
    assert why.forecast.likely_at_ns == 2 * 10**18
    assert [holding.amount for holding in why.holdings] == ["8 H100", "1 H100"]
    option = {"change": "resources.gpus: A100", "starts_at_ns": 5, "amount_micro": 7}
    peer.routes["POST", "/v1/quotes"] = lambda *_, **__: (
        200,
        {"feasible": True, "options": [option], "forecast": None},
    )
    quote = client.quote({"run": "x"})
    assert (quote.options[0].change, quote.options[0].amount_micro, quote.forecast) == ("resources.gpus: A100", 7, None)


def test_changing_a_queue_keeps_the_rest_of_it(peer: Peer, client: Client):
    client.set_queue("research", weight=3)
    client.set_queue("fresh", project="vision", limit={"gpu": 1})
    sent = [json.loads(body) for path in ("research", "fresh") for _, body in peer.sent("PUT", f"/v1/queues/{path}")]
    assert (sent[0]["weight"], sent[0]["guaranteed"]) == (3, {"gpu": 8, "memory": "512GB"})
    assert sent[1] == {"name": "fresh", "project": "vision", "limit": {"gpu": 1}}


def test_reserving_names_machines_or_counts_them(peer: Peer):
    with Client(peer.url, TOKEN, project="vision") as client:
        client.reserve("a", start="2h", duration="4h", nodes=2, gpus="H100:8", labels={"zone": "x"})
        client.reserve("b", start="now", duration=3600, nodes=["box"], maintenance=True)
    bodies = [json.loads(body) for _, body in peer.sent("POST", "/v1/reservations")]
    assert bodies == [
        {"name": "a", "start": "2h", "duration": "4h", "nodes": 2, "gpus": "H100:8", "labels": {"zone": "x"}, "project": "vision"},
        {"name": "b", "start": "now", "duration": 3600, "node": ["box"], "maintenance": True},
    ]  # fmt: skip


def test_machines_are_marked_by_name(peer: Peer, client: Client):
    assert client.drain("box", "disk").marking == "drain"
    client.cordon("box")
    client.resume("box")
    bodies = [
        json.loads(body) for method, path, _, body in peer.requests if method == "POST" and path.endswith("/mark")
    ]
    assert [body["marking"] for body in bodies] == ["drain", "cordon", "resume"]
    assert bodies[0]["reason"] == "disk"


def test_a_program_in_a_job_tells_of_its_checkpoint(peer: Peer, monkeypatch):
    monkeypatch.delenv("TIDEMILL_JOB_ID", raising=False)
    with pytest.raises(InvalidRequest):
        checkpointed()
    monkeypatch.setenv("TIDEMILL_JOB_ID", JOB_ID)
    monkeypatch.setenv("TIDEMILL_API_URL", peer.url)
    monkeypatch.setenv("TIDEMILL_TOKEN", TOKEN)
    checkpointed("step 7")
    headers, body = peer.sent("POST", f"/v1/jobs/{JOB_ID}/checkpoint")[0]
    assert json.loads(body) == {"detail": "step 7"}
    assert headers["Idempotency-Key"]


def dead_url() -> str:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def several(monkeypatch: pytest.MonkeyPatch, *urls: str, first: str = "") -> None:
    monkeypatch.setenv("TIDEMILL_API_URLS", ", ".join(urls))
    monkeypatch.setenv("TIDEMILL_API_URL", first or urls[0])
    monkeypatch.setenv("TIDEMILL_TOKEN", TOKEN)


def test_the_next_control_plane_is_asked_when_the_first_is_dead(peer: Peer, monkeypatch):
    several(monkeypatch, dead_url(), f"{peer.url}/")
    with Client(retry_for_s=0) as client:
        client.submit({"run": "true"})
        assert client.url == peer.url  # and from now on it is asked first
        assert client.exec("hello", ["cat"], stdin=b"words").exit_code == 7
    assert len(peer.sent("POST", "/v1/workloads")) == 1


def test_what_broke_halfway_is_asked_of_the_next_one_with_the_same_key(peer: Peer, monkeypatch):
    with running_peer() as other:
        several(monkeypatch, other.url, peer.url)
        other.failures = ["reset"]
        with Client() as client:
            client.submit({"run": "true"})
        [(sent, _)], [(again, _)] = other.sent("POST", "/v1/workloads"), peer.sent("POST", "/v1/workloads")
        assert sent["Idempotency-Key"] == again["Idempotency-Key"]


def test_a_token_for_another_cloud_is_not_sent_to_the_own_one(peer: Peer, monkeypatch):
    several(monkeypatch, peer.url, first=dead_url())
    with Client(retry_for_s=0) as client, pytest.raises(Unavailable, match="refuses connections"):
        client.status()
    assert not peer.requests
    with pytest.raises(InvalidRequest):
        Transport(peer.url, "t", others=["ftp://x"])


def test_without_an_address_the_first_of_several_is_used(peer: Peer, monkeypatch):
    several(monkeypatch, peer.url, dead_url())
    monkeypatch.delenv("TIDEMILL_API_URL")
    with Client() as client:
        assert (client.url, client.status().version) == (peer.url, "0.1.0")
