"""How soon it is noticed that a service has become ready, and how often it is asked until then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cloud import free_port
from tidemill.runner.readiness import Probe, watch_readiness


class _Pauses(threading.Event):
    """An event that comes after as many pauses as there are steps, each of which is taken at once."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self._steps = list(steps)
        self.paused: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        if not timeout:
            return self.is_set()
        self.paused.append(timeout)
        if not self._steps:
            return True
        self._steps.pop(0)()
        return False


class _Engine(ThreadingHTTPServer):
    daemon_threads = True
    status = 503


class _Answers(BaseHTTPRequestHandler):
    server: _Engine

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _engines() -> Iterator[Callable[[int], _Engine]]:
    """Starts one that listens on a port and still loads."""
    started: list[_Engine] = []

    def start(port: int) -> _Engine:
        engine = _Engine(("127.0.0.1", port), _Answers)
        started.append(engine)
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        return engine

    yield start
    for engine in started:
        engine.shutdown()
        engine.server_close()


def _nothing() -> None:
    pass


@pytest.mark.parametrize("path", ["", "/health"])
def test_a_port_that_nothing_listens_on_is_tried_as_often_after_long_as_at_first(path: str) -> None:
    port, became = free_port(), list[bool]()
    with _engines() as start:
        loading = _Pauses(*[_nothing] * 200, lambda: setattr(start(port), "status", 200))
        watch_readiness(Probe(port, path), timeout_s=60, became=became.append, failed=pytest.fail, ending=loading)
    assert became == [True]
    assert max(loading.paused[:-1]) <= 0.05, "a start that takes long is noticed as soon as a quick one"
    assert loading.paused[-1] == 2.0, "then it is asked now and then"


def test_a_service_that_says_it_is_loading_is_asked_ever_more_seldom() -> None:
    port, became = free_port(), list[bool]()
    with _engines() as start:
        engine = start(port)
        loading = _Pauses(*[_nothing] * 10, lambda: setattr(engine, "status", 200))
        watch_readiness(Probe(port, "/health"), timeout_s=60, became=became.append, failed=pytest.fail, ending=loading)
    asked = loading.paused[:-1]
    assert became == [True]
    assert asked == sorted(asked)
    assert (asked[0], asked[-1]) == (0.05, 0.25)


def test_what_never_listens_fails_at_its_time() -> None:
    told: list[str] = []
    watch_readiness(
        Probe(free_port(), "/health"), timeout_s=-1, became=pytest.fail, failed=told.append, ending=_Pauses()
    )
    assert "GET /health did not answer with a 2xx status" in told[0]
    assert "service.readiness" in told[0]
