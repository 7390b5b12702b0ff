"""A notice of the cloud, read from a metadata service on loopback, empties the node in time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from tests.core.yard import START, Yard, gpu_node, spec
from tidemill.model.events import Marking, NodeMarked
from tidemill.model.ids import NodeId
from tidemill.model.job import JobState
from tidemill.model.plan import Stop
from tidemill.telemetry.interruption import InterruptionWatcher
from tidemill.units import MINUTE_NS, SECOND_NS

NODE = NodeId("a")


class Metadata:
    """A metadata service, version 2: without its token it answers nothing."""

    def __init__(self) -> None:
        self.notice: str | None = None
        self.tokens: list[str] = []
        self.valid: set[str] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                if not 0 < int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21_600:
                    self._answer(400, "")
                    return
                token = f"token-{len(service.tokens)}"
                service.tokens.append(token)
                service.valid.add(token)
                self._answer(200, token)

            def do_GET(self) -> None:
                if self.headers.get("X-aws-ec2-metadata-token") not in service.valid:
                    self._answer(401, "")
                elif self.path != "/latest/meta-data/spot/instance-action" or service.notice is None:
                    self._answer(404, "")
                else:
                    self._answer(200, service.notice)

            def _answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.close()


def test_a_notice_becomes_a_drain_with_an_end_and_is_told_once(metadata: Metadata) -> None:
    watcher = InterruptionWatcher(NODE, base_url=metadata.url)
    assert watcher.interruption_facts(1) == []
    metadata.notice = json.dumps({"action": "terminate", "time": "2030-09-18T08:22:00Z"})
    (fact,) = watcher.interruption_facts(2)
    assert (fact.node_id, fact.marking, fact.at_ns, fact.until_ns) == (
        NODE,
        Marking.DRAIN,
        2,
        1_915_950_120 * SECOND_NS,
    )
    assert watcher.interruption_facts(3) == []
    metadata.notice = json.dumps({"action": "stop", "time": "2030-09-18T08:25:00Z"})
    assert len(watcher.interruption_facts(4)) == 1
    assert metadata.tokens == ["token-0"], "one token does for hours"


def test_a_token_that_ran_out_is_renewed(metadata: Metadata) -> None:
    watcher = InterruptionWatcher(NODE, base_url=metadata.url)
    watcher.interruption_facts(1)
    metadata.valid.clear()
    metadata.notice = json.dumps({"action": "terminate", "time": "2030-09-18T08:22:00Z"})
    assert len(watcher.interruption_facts(2)) == 1
    assert metadata.tokens == ["token-0", "token-1"]


def test_a_service_that_only_ever_refuses_is_asked_twice_and_left(metadata: Metadata) -> None:
    metadata.valid = type("Nothing", (set,), {"add": lambda *_: None})()
    assert InterruptionWatcher(NODE, base_url=metadata.url).interruption_facts(1) == []
    assert len(metadata.tokens) == 2


@pytest.mark.parametrize("said", ["", "nonsense", "[]", "{}", '"terminate"', "\x00", '{"action": ""}'])
def test_nonsense_is_no_notice(metadata: Metadata, said: str) -> None:
    metadata.notice = said
    assert InterruptionWatcher(NODE, base_url=metadata.url).interruption_facts(1) == []


def test_an_instant_that_cannot_be_read_is_taken_to_be_now(metadata: Metadata) -> None:
    metadata.notice = json.dumps({"action": "terminate", "time": "soon"})
    (fact,) = InterruptionWatcher(NODE, base_url=metadata.url).interruption_facts(7)
    assert fact.until_ns == 7


def test_where_nobody_answers_there_is_no_notice(monkeypatch: pytest.MonkeyPatch, metadata: Metadata) -> None:
    assert InterruptionWatcher(NODE, base_url="http://127.0.0.1:9").interruption_facts(1) == []
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    metadata.notice = json.dumps({"action": "terminate", "time": "2030-09-18T08:22:00Z"})
    assert InterruptionWatcher(NODE, base_url=metadata.url).interruption_facts(1), "a proxy is not asked"


def test_motos_metadata_service_has_no_notice() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        assert InterruptionWatcher(NODE, base_url=f"http://{host}:{port}").interruption_facts(1) == []
    finally:
        server.stop()


# -- what the core makes of it ----------------------------------------------------------------------------------------


def graces(yard: Yard) -> list[int]:
    return [one.grace_ns for _, plan in yard.plans for one in plan.commands if isinstance(one, Stop)]


def drain(yard: Yard, *, seconds: int = 0) -> NodeMarked:
    until = yard.now + seconds * SECOND_NS if seconds else 0
    return NodeMarked(at_ns=yard.now, node_id=NODE, marking=Marking.DRAIN, by="the cloud", until_ns=until)


@pytest.mark.parametrize(("wants_s", "seconds", "gets_s"), [(600, 120, 115), (30, 120, 30), (600, 3, 0), (600, 0, 600)])
def test_no_job_has_a_longer_grace_than_the_machine(wants_s: int, seconds: int, gets_s: int) -> None:
    yard = Yard(nodes=(gpu_node("a", 2), gpu_node("b", 2)))
    job = yard.submit(spec(2, checkpoint_grace_ns=wants_s * SECOND_NS), runs_s=10_000)
    yard.run(10)
    node = yard.nodes_of(job)[0]
    until = yard.now + seconds * SECOND_NS if seconds else 0
    yard.turn([NodeMarked(at_ns=yard.now, node_id=NodeId(node), marking=Marking.DRAIN, until_ns=until)])
    assert graces(yard)[:1] == [gets_s * SECOND_NS]
    assert yard.now > START
    yard.run(MINUTE_NS // SECOND_NS)
    assert yard.state(job) is JobState.RUNNING
    assert yard.nodes_of(job) != [node], "it runs on elsewhere"


def test_a_drain_that_goes_on_is_hastened_when_the_end_becomes_known() -> None:
    yard = Yard(nodes=(gpu_node("a", 2),))
    yard.grace_taken_ns = 500 * SECOND_NS
    job = yard.submit(spec(2, checkpoint_grace_ns=600 * SECOND_NS), runs_s=10_000)
    yard.run(10)
    yard.turn([drain(yard)])
    yard.turn([drain(yard)])
    assert graces(yard) == [600 * SECOND_NS], "a drain that stands is not told again"
    yard.turn([drain(yard, seconds=65)])
    assert graces(yard) == [600 * SECOND_NS, 60 * SECOND_NS]
    assert len(yard.events("Preempted")) == 1
    assert yard.state(job) is JobState.RUNNING
