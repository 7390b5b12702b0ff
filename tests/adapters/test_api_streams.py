"""Logs and events as they come: no gap, no repeat, resumable anywhere, and nothing left when a client goes."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.api_peer import Events, Peer, eventually
from tidemill.api.app import close_streams
from tidemill.api.joblogs import Position, Wanted, _events, format_position, next_chunks, parse_position, start_at
from tidemill.api.shapes.work import JobOut
from tidemill.control.logs import LogStore
from tidemill.model.ids import JobId

JOB = JobId("job_a-0")
TEXTS = ["plain\n", "ünïcödé ✓ 🦀\n", "line\n" * 50, "x" * 70_000, ""]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    made = Peer(tmp_path_factory.mktemp("streams"))
    yield made
    made.close()


def log_events(data: bytes) -> list[tuple[dict[str, Any], str]]:
    found = []
    for block in data.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if fields.get("event") == "log":
            found.append((json.loads(fields["data"]), fields["id"]))
    return found


def stream(logs: LogStore, position: Position) -> list[tuple[dict[str, Any], str]]:
    """All log events from a position on, of logs that are over."""
    found = []
    while chunks := next_chunks(logs, JOB, Wanted(), position, last=True):
        found += log_events(_events(chunks, position))
    return found


def texts(events: list[tuple[dict[str, Any], str]]) -> dict[tuple[int, int], str]:
    joined: dict[tuple[int, int], str] = {}
    for data, _ in events:
        joined[data["attempt"], data["rank"]] = joined.get((data["attempt"], data["rank"]), "") + data["text"]
    return joined


PIECES = st.lists(st.binary(max_size=40) | st.sampled_from(TEXTS).map(str.encode), max_size=4).map(b"".join)


@settings(max_examples=80, deadline=None)
@given(contents=st.dictionaries(st.tuples(st.integers(1, 2), st.integers(0, 2)), PIECES, max_size=4), data=st.data())
def test_a_stream_resumed_at_any_event_equals_the_whole(
    contents: dict[tuple[int, int], bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    logs = LogStore(tmp_path_factory.mktemp("logs"))
    for (attempt, rank), content in contents.items():
        logs.append(JOB, attempt, rank, 0, content)
    whole = stream(logs, {})
    wanted = {key: content.decode("utf-8", "replace") for key, content in contents.items() if content}
    assert texts(whole) == wanted
    assert all(len(event["text"].encode()) <= 65_536 * 3 for event, _ in whole)
    cut = data.draw(st.integers(0, len(whole)))
    position = parse_position(whole[cut - 1][1]) if cut else {}
    assert whole[:cut] + stream(logs, position) == whole
    logs.shut()


@settings(max_examples=60, deadline=None)
@given(content=PIECES, cuts=st.lists(st.integers(1, 30), max_size=30))
def test_text_that_grows_in_odd_pieces_is_the_same_text(
    content: bytes, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    logs = LogStore(tmp_path_factory.mktemp("logs"))
    position: Position = {}
    found: list[tuple[dict[str, Any], str]] = []
    place = 0
    for cut in [*cuts, len(content)]:
        piece = content[place : place + cut]
        logs.append(JOB, 1, 0, place, piece)
        place += len(piece)
        chunks = next_chunks(logs, JOB, Wanted(), position, last=False)
        for chunk in chunks:
            assert content[: chunk.end].decode("utf-8", "replace").endswith(chunk.text)
        found += log_events(_events(chunks, position))
        position = parse_position(format_position(position))
    found += stream(logs, position)
    assert texts(found).get((1, 0), "") == content.decode("utf-8", "replace")
    logs.shut()


def test_the_tail_is_of_the_newest_attempt(tmp_path: Path) -> None:
    logs = LogStore(tmp_path)
    logs.append(JOB, 1, 0, 0, b"old\n")
    logs.append(JOB, 2, 0, 0, b"a\nb\nc\n")
    logs.append(JOB, 2, 1, 0, b"x\ny\nz")
    assert texts(stream(logs, start_at(logs, JOB, Wanted(), 2))) == {(2, 0): "b\nc\n", (2, 1): "y\nz"}
    logs.shut()


def finish(peer: Peer, launch: Any, text: bytes, *, code: int = 0) -> None:
    peer.report(launch, {"type": "exited", "exit_code": code})
    size = len(text)
    assert peer.write_log(launch, 0, text, complete=True) == (200, {"offset": size})


def test_a_followed_job_tells_its_states_its_logs_and_its_end(peer: Peer) -> None:
    made = peer.submit(name="followed", nodes=2)
    job_id = made["jobs"][0]["id"]
    launches = [peer.launched(job_id, rank) for rank in range(2)]
    events = Events(peer, f"/v1/jobs/{job_id}/logs?follow=true")
    seen: list[tuple[str, Any, str]] = []
    reading = threading.Thread(target=lambda: seen.extend(events))
    reading.start()
    for launch in launches:
        peer.report(launch, {"type": "prepared"}, {"type": "started"})
    eventually(lambda: any(kind == "job" and data["state"] == "running" for kind, data, _ in seen), what="running")
    text = {0: "zero ✓\n" * 100, 1: "one 🦀\n" * 100}
    for rank, launch in enumerate(launches):
        octets = text[rank].encode()
        for start in range(0, len(octets), 37):
            assert peer.write_log(launch, start, octets[start : start + 37])[0] == 200
    for rank, launch in enumerate(launches):
        peer.report(launch, {"type": "exited", "exit_code": 0})
        assert peer.write_log(launch, len(text[rank].encode()), b"", complete=True)[0] == 200
    reading.join(timeout=10)
    assert not reading.is_alive()
    assert [kind for kind, _, _ in seen][-1] == "end"
    states = [data["state"] for kind, data, _ in seen if kind == "job"]
    assert states[-1] == "succeeded"
    assert states == sorted(set(states), key=states.index)
    found = texts([(data, identity) for kind, data, identity in seen if kind == "log"])
    assert found == {(1, 0): text[0], (1, 1): text[1]}
    ids = [identity for kind, _, identity in seen if kind == "log"]
    for identity in (ids[0], ids[len(ids) // 2], ids[-1]):
        rest = list(Events(peer, f"/v1/jobs/{job_id}/logs?follow=true", last_id=identity))
        index = next(place for place, (_, _, one) in enumerate(seen) if one == identity)
        before = texts([(data, one) for kind, data, one in seen[: index + 1] if kind == "log"])
        after = texts([(data, one) for kind, data, one in rest if kind == "log"])
        assert {rank: before.get((1, rank), "") + after.get((1, rank), "") for rank in (0, 1)} == text


def test_output_is_there_at_once(peer: Peer) -> None:
    job_id, launch = peer.running(name="quick")
    events = iter(Events(peer, f"/v1/jobs/{job_id}/logs?follow=true"))
    assert next(events)[0] == "job"
    latencies = []
    for index in range(20):
        began = time.perf_counter()
        peer.write_log(launch, index * 5, b"tick\n")
        kind, data, _ = next(events)
        assert (kind, data["text"]) == ("log", "tick\n")
        latencies.append(time.perf_counter() - began)
    assert sorted(latencies)[10] < 0.1


def test_raw_octets_of_one_rank(peer: Peer) -> None:
    job_id, launch = peer.running(name="raw")
    octets = bytes(range(256)) * 1_000
    finish(peer, launch, octets)
    assert peer.call("GET", f"/v1/jobs/{job_id}/logs")[1] == octets
    assert peer.call("GET", f"/v1/jobs/{job_id}/logs?follow=true")[1] == octets
    assert peer.call("GET", f"/v1/jobs/{job_id}/logs?tail=1")[1] == octets[octets.rindex(b"\n") + 1 :]
    assert peer.call("GET", f"/v1/jobs/{job_id}/logs?rank=7")[1] == b""
    assert peer.call("GET", f"/v1/jobs/{job_id}/logs?rank=-1")[0] == 422


def test_a_job_that_never_started_ends_at_once(peer: Peer) -> None:
    blocker = peer.submit(name="blocker", resources={"cpus": 512})
    made = peer.submit(name="never", resources={"cpus": 512})
    job_id = made["jobs"][0]["id"]
    assert peer.call("GET", f"/v1/jobs/{job_id}")[1]["state"] == "queued"
    peer.call("POST", f"/v1/jobs/{job_id}/stop")
    began = time.monotonic()
    assert [kind for kind, _, _ in Events(peer, f"/v1/jobs/{job_id}/logs?follow=true")] == ["job", "end"]
    assert time.monotonic() - began < 2
    peer.call("POST", f"/v1/workloads/{blocker['id']}/stop")


def test_a_stream_ends_though_the_runner_was_lost(peer: Peer) -> None:
    job_id, launch = peer.running(name="lost", retry=0)
    peer.write_log(launch, 0, b"half a line \xf0\x9f")
    events = Events(peer, f"/v1/jobs/{job_id}/logs?follow=true")
    peer.engine.lose(launch.launch_id)
    began = time.monotonic()
    seen = list(events)
    assert time.monotonic() - began < 9
    assert seen[-1][0] == "end"
    assert "".join(data["text"] for kind, data, _ in seen if kind == "log") == "half a line \ufffd"


def test_clients_that_hang_up_leave_nothing(peer: Peer) -> None:
    job_id, launch = peer.running(name="left")
    hub = peer.app.state.services.hub
    eventually(lambda: len(hub) == 0, what="followers of other tests to be gone")
    streams = [Events(peer, f"/v1/jobs/{job_id}/logs?follow=true") for _ in range(20)]
    streams += [Events(peer, "/v1/events?follow=true") for _ in range(5)]
    eventually(lambda: len(hub) == 25, what="25 followers")
    for one in streams:
        one.close()
    eventually(lambda: len(hub) == 0, what="nobody to follow")
    assert peer.write_log(launch, 0, b"still works\n")[0] == 200


def test_events_are_told_as_they_happen_and_can_be_resumed(peer: Peer) -> None:
    start = peer.plane.last_seq
    live = iter(Events(peer, f"/v1/events?after={start}&follow=true"))
    job_id, _ = peer.running(name="eventful")
    seen = [next(live) for _ in range(3)]
    assert any(data["job_id"] == job_id for _, data, _ in seen)
    listed = peer.call("GET", f"/v1/events?after={start}&limit=1000")[1]["items"]
    assert [(item["type"], str(item["seq"])) for item in listed][: len(seen)] == [(kind, one) for kind, _, one in seen]
    middle = seen[len(seen) // 2][2]
    resumed = iter(Events(peer, "/v1/events?follow=true", last_id=middle))
    assert next(resumed)[2] == str(int(middle) + 1)


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">cI", kind, len(payload)) + payload


def test_a_command_runs_over_streams_both_ways(peer: Peer) -> None:
    job_id, launch = peer.running(name="exec")
    runner = f"/v1/runners/{launch.launch_id}"
    with ThreadPoolExecutor(4) as pool:
        commands = pool.submit(peer.call, "GET", f"{runner}/commands?wait=20", token=launch.runner_token)
        status, made = peer.call(
            "POST", f"/v1/jobs/{job_id}/exec", {"command": ["cat"], "env": {"A": "b"}}, token=peer.token("executor")
        )
        assert status == 201
        (command,) = commands.result(timeout=5)[1]["commands"]
        assert command["type"] == "exec"
        assert command["exec_id"] == made["exec_id"]
        assert command["command"] == ["cat"]
        session = made["exec_id"]
        sent = frame(b"i", b"hello" * 200_000) + frame(b"c")
        client_in = pool.submit(peer.call, "POST", f"/v1/execs/{session}/input", raw=sent)
        client_out = pool.submit(peer.call, "GET", f"/v1/execs/{session}/output")
        got = peer.call("GET", f"{runner}/execs/{session}/input", token=launch.runner_token)[1]
        assert got == sent
        assert client_in.result(timeout=5)[0] == 200
        said = frame(b"o", b"hello" * 200_000) + frame(b"x", b"0")
        assert peer.call("POST", f"{runner}/execs/{session}/output", raw=said, token=launch.runner_token)[0] == 200
        assert client_out.result(timeout=5)[1] == said
    eventually(lambda: len(peer.plane.relay) == 0, what="the session to be over")
    assert peer.call("GET", f"/v1/execs/{session}/output")[0] == 404


def test_a_command_needs_a_running_worker(peer: Peer) -> None:
    made = peer.submit(name="starting")
    status, problem = peer.call("POST", f"/v1/jobs/{made['jobs'][0]['id']}/exec", {"command": ["ls"]})
    assert (status, problem["code"]) == (409, "conflict")
    job_id, _ = peer.running(name="running")
    assert peer.call("POST", f"/v1/jobs/{job_id}/exec", {"command": ["ls"], "rank": 3})[0] == 404
    assert peer.call("POST", f"/v1/jobs/{job_id}/exec", {"command": []})[0] == 422


def test_blobs_artifacts_and_outputs(peer: Peer) -> None:
    data = b"archive" * 500_000
    digest = hashlib.sha256(data).hexdigest()
    assert peer.call("HEAD", f"/v1/blobs/{digest}")[0] == 404
    assert peer.call("PUT", f"/v1/blobs/{digest}", raw=b"something else")[0] == 422
    assert peer.call("HEAD", f"/v1/blobs/{digest}")[0] == 404
    assert peer.call("PUT", f"/v1/blobs/{digest}", raw=data) == (201, {"digest": digest, "size": len(data)})
    assert peer.call("PUT", f"/v1/blobs/{digest}", raw=data) == (200, {"digest": digest, "size": len(data)})
    assert peer.call("HEAD", f"/v1/blobs/{digest}")[0] == 200
    assert peer.call("PUT", f"/v1/blobs/{digest}", raw=b"x", headers={"Content-Length": str(3 << 30)})[0] == 413
    assert peer.call("PUT", "/v1/blobs/nonsense", raw=data)[0] == 422
    job_id, launch = peer.running(name="maker", workdir=digest)
    fetched = f"/v1/runners/{launch.launch_id}/blobs/"
    assert peer.call("GET", fetched + digest, token=launch.runner_token)[1] == data
    assert peer.call("GET", fetched + "0" * 64, token=launch.runner_token)[0] == 404
    folder = peer.home / "local" / "volumes" / "prj_one_default" / job_id / "output"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"w" * 1_000)
    (folder / "out").symlink_to("/etc")
    body = {"name": "gpt", "job": job_id, "path": "model"}
    status, made = peer.call("POST", "/v1/artifacts", body, token=launch.job_token)
    assert (status, made["version"], made["job"]) == (201, 1, job_id)
    assert peer.call("POST", "/v1/artifacts", body)[1]["version"] == 2
    once = [
        peer.call("POST", "/v1/artifacts", body, headers={"Idempotency-Key": "art"})[1]["version"] for _ in range(3)
    ]
    assert once == [3, 3, 3]
    assert peer.call("GET", "/v1/artifacts/gpt:1")[1]["digest"] == made["digest"]
    assert [item["version"] for item in peer.call("GET", "/v1/artifacts")[1]["items"]] == [3, 2, 1]
    content = peer.call("GET", "/v1/artifacts/gpt/content")[1]
    assert hashlib.sha256(content).hexdigest() == made["digest"]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames() == ["weights"]
    with tarfile.open(fileobj=io.BytesIO(peer.call("GET", f"/v1/jobs/{job_id}/outputs?path=model")[1])) as archive:
        assert archive.getnames() == ["weights"]
    for path in ("../../../../../control.db", "/etc/passwd", "out/passwd", "..%2f..", "model%00"):
        assert peer.call("GET", f"/v1/jobs/{job_id}/outputs?path={path}")[0] == 422, path
        assert peer.call("POST", "/v1/artifacts", body | {"path": path.replace("%00", "\0")})[0] in (404, 422)
    assert peer.call("GET", f"/v1/jobs/{job_id}/outputs?path=nothing")[0] == 404


def test_states_are_told_once_each(peer: Peer) -> None:
    job_id, launch = peer.running(name="once")
    finish(peer, launch, b"done\n")
    jobs: list[JobOut] = [
        data for kind, data, _ in Events(peer, f"/v1/jobs/{job_id}/logs?follow=true") if kind == "job"
    ]
    assert [job["state"] for job in jobs] == ["succeeded"]


def test_what_goes_on_without_end_ends_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    peer = Peer(tmp_path)
    try:
        job_id, launch = peer.running(name="endless")
        with ThreadPoolExecutor(4) as pool:
            waiting = [
                pool.submit(lambda: list(Events(peer, f"/v1/jobs/{job_id}/logs?follow=true"))),
                pool.submit(lambda: list(Events(peer, "/v1/events?follow=true"))),
                pool.submit(
                    peer.call, "GET", f"/v1/runners/{launch.launch_id}/commands?wait=50", token=launch.runner_token
                ),
            ]
            eventually(lambda: len(peer.app.state.services.hub) == 2, what="two followers")
            close_streams(peer.app)
            for one in waiting:
                one.result(timeout=3)
    finally:
        peer.close()


@pytest.mark.parametrize("ahead_s", [3_600, -3_600])
def test_what_comes_late_is_waited_for_by_the_planes_clock(tmp_path: Path, ahead_s: int) -> None:
    """Not by the machine's, which somebody may have set an hour ahead of it, or back."""
    peer = Peer(tmp_path, clock=lambda: time.time_ns() - ahead_s * 1_000_000_000)
    try:
        job_id, launch = peer.running(name="late")
        peer.write_log(launch, 0, b"early\n")
        seen: list[tuple[str, Any, str]] = []
        events = Events(peer, f"/v1/jobs/{job_id}/logs?follow=true")
        reading = threading.Thread(target=lambda: seen.extend(events))
        reading.start()
        peer.report(launch, {"type": "exited", "exit_code": 0})
        eventually(lambda: any(k == "job" and data["state"] == "succeeded" for k, data, _ in seen), what="it is over")
        time.sleep(0.3)
        assert peer.write_log(launch, 6, b"late\n")[0] == 200
        reading.join(timeout=20)
        assert not reading.is_alive(), "it waits for an hour"
        assert seen[-1][:2] == ("end", {"state": "succeeded", "complete": True})
        assert texts([(data, one) for kind, data, one in seen if kind == "log"]) == {(1, 0): "early\nlate\n"}
    finally:
        peer.close()
