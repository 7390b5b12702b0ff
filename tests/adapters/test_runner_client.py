"""How a runner asks again: soon at first, then ever more seldom, most of all when it is told no."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tidemill.runner.client import Channel, Refused, Unreachable

STATUS = {"now": 200}


class Handler(BaseHTTPRequestHandler):
    """Answers with the status that is asked for now."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(STATUS["now"])
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Noted(threading.Event):
    """An event that does not wait, and notes for how long it was to."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return False


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def pauses(channel: Channel, status: int, tries: int) -> list[float]:
    STATUS["now"] = status
    noted = Noted()
    for _ in range(tries):
        with pytest.raises((Refused, Unreachable)):
            channel.call("GET", "/commands")
        channel.rest(noted)
    return noted.waits


@pytest.mark.parametrize(("status", "longest_s"), [(401, 15.0), (404, 15.0), (503, 2.0)])
def test_who_fails_again_and_again_asks_ever_more_seldom(url: str, status: int, longest_s: float) -> None:
    channel = Channel(api_url=url, endpoint_file=None, token="t", prefix="/v1/runners/run_a")
    waits = pauses(channel, status, 12)
    assert waits[0] <= 0.02
    assert all(0.75 * longest_s <= wait <= longest_s for wait in waits[-3:])
    assert sum(waits) > longest_s
    channel.close()


def test_one_good_answer_and_it_asks_soon_again(url: str) -> None:
    channel = Channel(api_url=url, endpoint_file=None, token="t", prefix="")
    pauses(channel, 401, 12)
    STATUS["now"] = 200
    assert channel.call("GET", "/commands") == {}
    assert pauses(channel, 401, 1)[0] <= 0.02
    channel.close()


def test_not_all_come_back_at_the_same_time(url: str) -> None:
    channels = [Channel(api_url=url, endpoint_file=None, token="t", prefix="") for _ in range(8)]
    assert len({pauses(channel, 503, 9)[-1] for channel in channels}) == 8
    for channel in channels:
        channel.close()


@pytest.fixture
def deaf() -> Iterator[str]:
    """One that takes connections and never answers, as a process that was stopped."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=16)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def test_when_one_is_silent_all_channels_of_the_process_ask_the_other(url: str, deaf: str, tmp_path: Path) -> None:
    """Also the one that still waits for it: else a machine would be as long without work as its longest poll."""
    STATUS["now"] = 200
    file = tmp_path / "endpoint.json"
    file.write_text(json.dumps({"api_url": deaf, "others": [deaf, url, url, deaf]}))
    polls = Channel(api_url=deaf, endpoint_file=file, token="t", prefix="")
    posts = polls.copy()
    outcome: list[str] = []

    def poll() -> None:
        try:
            polls.call("GET", "/calls", timeout_s=60)
        except Unreachable as error:
            outcome.append(str(error))

    polling = threading.Thread(target=poll)
    polling.start()
    while not (polls._connection and polls._connection.sock):
        time.sleep(0.001)
    with pytest.raises(Unreachable):
        posts.call("GET", "/report", timeout_s=0.2)
    polling.join(10)
    assert outcome, "it waits for the silent one"
    assert polls.call("GET", "/calls") == posts.call("GET", "/report") == {}
    assert polls.asks == posts.asks == url
    polls.close()
    posts.close()


def test_one_that_is_alone_is_asked_again(deaf: str, url: str, tmp_path: Path) -> None:
    """And where it went, says the file."""
    file = tmp_path / "endpoint.json"
    file.write_text(json.dumps({"api_url": deaf}))
    channel = Channel(api_url=deaf, endpoint_file=file, token="t", prefix="")
    with pytest.raises(Unreachable):
        channel.call("GET", "/calls", timeout_s=0.1)
    file.write_text(json.dumps({"api_url": url}))
    STATUS["now"] = 200
    assert channel.call("GET", "/calls") == {}
    channel.close()
