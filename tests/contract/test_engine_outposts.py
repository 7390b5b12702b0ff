"""A site's engine keeps the contract when its machines are behind outposts: every call goes through a mailbox and back."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.adapters.local_bench import local_bench
from tidemill.control.outposts import Mailbox, SiteEngine
from tidemill.errors import EngineLost, EngineRefused
from tidemill.model.fleet import Outpost
from tidemill.model.ids import NodeId, OutpostId, SiteId
from tidemill.model.plan import LaunchSpec
from tidemill.outpost.carrying import carry_out
from tidemill.outpost.link import Link
from tidemill.ports import Engine
from tidemill.runner.client import Channel
from tidemill.testing.engine import CHECKS, EngineBench
from tidemill.wire.outposts import EngineAnswer, EngineCall

SITE = SiteId("site_test")


def outpost(name: str = "a") -> Outpost:
    return Outpost(id=OutpostId(f"out_{name}"), site_id=SITE, name=name, engine="local", created_ns=0)


class Fetcher:
    """An outpost's side of a mailbox, in a thread of its own. Values go through JSON, as they do on the wire.

    ``lose`` is asked for each call whether its answer gets lost; then the call is fetched once more.
    """

    def __init__(self, box: Mailbox, engine: Engine, lose: Callable[[EngineCall], bool] = lambda _: False) -> None:
        self._box, self._engine, self._lose = box, engine, lose
        self._closing = False
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()

    async def _serve(self) -> None:
        lost: set[int] = set()
        while not self._closing:
            for call in await self._box.fetch(0, 0.05):
                read = msgspec.json.decode(msgspec.json.encode(call), type=EngineCall)
                answer = await asyncio.to_thread(carry_out, self._engine, read)
                if call.number not in lost and self._lose(call):
                    lost.add(call.number)
                    continue
                self._box.answer([msgspec.json.decode(msgspec.json.encode(answer), type=EngineAnswer)])

    def close(self) -> None:
        self._closing = True
        self.thread.join()


class Served(SiteEngine):
    """A site's engine with an outpost that serves it until it is closed."""

    def __init__(self, engine: Engine, lose: Callable[[EngineCall], bool]) -> None:
        super().__init__(SITE)
        self._engine = engine
        self._fetcher = Fetcher(self.add(outpost()), engine, lose)
        while not next(iter(self.boxes.values())).is_there:
            pass
        self.observe()

    def close(self) -> None:
        self._fetcher.close()
        self._engine.close()


@pytest.fixture(params=["answers arrive", "every answer is lost once"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineBench]:
    def lose(_: EngineCall) -> bool:
        return request.param != "answers arrive"

    with local_bench(tmp_path, sandbox="none") as made:
        yield EngineBench(make=lambda: Served(made.make(), lose), control=made.control, output=made.output)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[EngineBench], None], bench: EngineBench) -> None:
    check(bench)


def test_nothing_is_said_of_an_outpost_that_does_not_answer(tmp_path: Path) -> None:
    engine = SiteEngine(SITE, answer_s=0.05)
    box = engine.add(outpost())
    assert engine.observe().nodes == frozenset()
    box.answer([])  # it is there, and then does not answer
    assert engine.observe().nodes == frozenset()
    with pytest.raises(EngineLost):
        engine.forget(bench_launch(), node_id=NodeId("node_test"))


def bench_launch() -> Any:
    return "run_a-0-1-0"


class FullDisk:
    """An engine whose machine has no room to write a launch down; nothing else is asked of it."""

    def launch(self, spec: LaunchSpec) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"/launches/{spec.launch_id}")


def test_a_launch_that_a_full_disk_stops_may_be_tried_again_and_a_file_that_is_not_there_is_refused(
    tmp_path: Path,
) -> None:
    engine: Any = FullDisk()
    with local_bench(tmp_path) as bench:
        launched = carry_out(engine, EngineCall(number=1, method="launch", spec=bench.spec("true")))
    assert launched.outcome == EngineLost.code, launched
    assert "No space left" in launched.detail
    missing = tmp_path / "missing"
    read = carry_out(engine, EngineCall(number=2, method="read", path=str(missing), size=1))
    assert (read.outcome, read.detail) == (
        EngineRefused.code, f"{missing} cannot be read: No such file or directory",
    )  # fmt: skip


def test_an_outpost_speaks_for_its_own_machines_only() -> None:
    """Not for those of another site, of this process, or of another outpost that is there."""
    known = {NodeId("elsewhere"): SiteId("site_other"), NodeId("mine"): SITE}
    engine = SiteEngine(SITE, site_of=known.get)
    first, second = engine.add(outpost("a")), engine.add(outpost("b"))
    claim: Any = engine._claim
    first.answer([])
    assert not claim(NodeId("elsewhere"), first)
    assert claim(NodeId("mine"), first)
    assert not claim(NodeId("mine"), second)
    assert engine.nodes_of(OutpostId("out_a")) == (NodeId("mine"),)
    first.asked_s = float("-inf")  # it is gone: another may work its machine
    assert claim(NodeId("mine"), second)


def test_an_answer_that_broke_off_in_the_middle_is_asked_for_again(tmp_path: Path) -> None:
    """The outpost goes on: its connection was broken, and nothing else."""
    asked = threading.Semaphore(0)

    class Half(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.release()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"session": "s", "epo')

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    channel = Channel(
        api_url=f"http://127.0.0.1:{server.server_port}", endpoint_file=None, token="t", prefix="/v1/outposts/self"
    )
    with local_bench(tmp_path) as bench:
        link = Link(bench.make(), channel, api_url="http://b:7070")
        running = threading.Thread(target=link.run, daemon=True)
        running.start()
        assert all(asked.acquire(timeout=20) for _ in range(2))
        assert running.is_alive()
        link.close()
        running.join(timeout=20)
        assert not running.is_alive()
    server.shutdown()
    server.server_close()


def test_a_job_is_told_of_all_control_planes_as_they_are_from_here(tmp_path: Path) -> None:
    """The one that this outpost was told first comes first; what the job's owner set stays."""
    channel = Channel(api_url="http://b:7070", endpoint_file=None, token="t", prefix="")
    with local_bench(tmp_path) as bench:
        link: Any = Link(bench.make(), channel, api_url="http://b:7070")
        told = {"TIDEMILL_API_URL": "http://127.0.0.1:7070", "TIDEMILL_API_URLS": "http://127.0.0.1:7070"}
        spec = bench.spec("true", api_url=told["TIDEMILL_API_URL"], environment_variables=tuple(told.items()))
        assert dict(link._seen_from_here(spec).environment_variables) == dict.fromkeys(told, "http://b:7070")
        link._replicas = ("http://a:7070", "http://b:7070")
        seen = dict(link._seen_from_here(spec).environment_variables)
        assert seen == {"TIDEMILL_API_URL": "http://b:7070", "TIDEMILL_API_URLS": "http://b:7070,http://a:7070"}
        own = tuple((name, "http://elsewhere") for name in told)
        assert link._seen_from_here(replace(spec, environment_variables=own)).environment_variables == own
