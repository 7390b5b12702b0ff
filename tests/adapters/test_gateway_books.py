"""What requests took: read from answers cut anywhere, written down, handed on once whatever is killed in between."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import orjson
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.gateway.books import Books, Refused
from tidemill.gateway.metering import StreamMeter, Usage, WholeMeter, prepared, tokens_in, told_in
from tidemill.gateway.server import Gateway
from tidemill.gateway.table import read_feed

from .test_gateway import PEPPER, feed_of, request

USAGE = '"usage":{"prompt_tokens":7,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":4}}'


def stream_of(texts: list[str], *, separator: str, null_usage: bool) -> tuple[bytes, bytes]:
    """A stream with its usage at the end, and the same without that event."""
    null = ',"usage":null' if null_usage else ""
    events = [
        "data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})[:-1] + null + "}"
        for text in texts
    ]
    usage = 'data: {"id":"c","choices":[],' + USAGE % len(texts) + "}"
    with_usage = separator.join([*events, usage, "data: [DONE]", ""])
    return with_usage.encode(), separator.join([*events, "data: [DONE]", ""]).encode()


def fed(meter: StreamMeter, data: bytes, cuts: list[int]) -> bytes:
    """What passes of data that comes in pieces."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    passed = [meter.feed(data[a:b]) for a, b in pairwise(places)]
    return b"".join(passed) + meter.finish()


texts = st.lists(st.sampled_from(["a", "\n\n", '"usage":{', '"usage"', "data: [DONE]", "é", "\r\n\r\n"]), min_size=1)
cuts = st.lists(st.integers(0, 10_000), max_size=12)
separators = st.sampled_from(["\n\n", "\r\n\r\n", "\r\r"])


def check_stream(make: Callable[[bool], StreamMeter]) -> None:
    """The client's stream is the engine's without the usage it did not ask for, however the bytes came in pieces."""

    @settings(max_examples=300, deadline=None)
    @given(texts, cuts, separators, st.booleans(), st.booleans())
    def check(parts: list[str], where: list[int], separator: str, hides: bool, null_usage: bool) -> None:
        whole, without = stream_of(parts, separator=separator, null_usage=null_usage)
        meter = make(hides)
        assert fed(meter, whole, where) == (without if hides else whole)
        assert meter.reported == (7, len(parts))
        assert meter.counted in (len(parts), len(parts) + 1)

    check()


def test_a_stream_passes_without_what_its_client_did_not_ask_for() -> None:
    check_stream(lambda hides: StreamMeter(hides_usage=hides))


def test_the_check_of_streams_finds_a_meter_that_forgets_what_has_no_end_yet() -> None:
    class NoRest(StreamMeter):
        def feed(self, data: bytes) -> bytes:
            passed = super().feed(data)
            self._rest = b""  # the planted bug: what has no end yet is forgotten
            return passed

    with pytest.raises((AssertionError, ExceptionGroup)):
        check_stream(lambda hides: NoRest(hides_usage=hides))


@pytest.mark.parametrize("salt", ["", "s4lt"])
@pytest.mark.parametrize("own", ["", '"cache_salt":"mine",', '"cache\\u005fsalt":"mine", "cache_salt": null,'])
def test_the_usage_is_asked_for_the_salt_is_ours_and_nothing_else_is_changed(salt: str, own: str) -> None:
    for options, hides in (
        ("", True),
        (',"stream_options":{"other":1}', True),
        (',"stream_options":null', True),
        (',"stream_options":{"include_usage":true}', False),
        (',"stream_options":7', False),
    ):
        body = b'{ %b"model":"m", "n":1e0, "big":123456789012345678901234567890 %b}' % (own.encode(), options.encode())
        content = orjson.loads(body)
        asked = prepared(body, content, asks_usage=True, salt=salt)
        assert asked.hides_usage is hides
        if not hides and not salt:
            assert asked.body == body
        before, after = json.loads(body), json.loads(asked.body)
        if hides:
            assert after.pop("stream_options") == {**(before.pop("stream_options", None) or {}), "include_usage": True}
        if salt:
            assert after.pop("cache_salt") == salt
            before.pop("cache_salt", None)
            assert b"mine" not in asked.body
        assert after == before
        assert b"123456789012345678901234567890" in asked.body, "numbers pass digit by digit"
        assert b"1e0" in asked.body
        unasked = prepared(body, content, asks_usage=False, salt=salt)
        assert unasked.hides_usage is False
        assert salt or unasked.body == body


def test_tokens_are_read_from_every_shape_and_from_both_ends_of_long_answers() -> None:
    assert tokens_in({"input_tokens": 3, "output_tokens": 4}) == (3, 4)
    assert tokens_in({"prompt_tokens": 3, "total_tokens": 3}) == (3, 0)
    for wrong in (
        None,
        7,
        {"prompt_tokens": -1},
        {"prompt_tokens": "3"},
        {"prompt_tokens": 2**40},
        {"prompt_tokens": True},
    ):
        assert tokens_in(wrong) is None
    usage = (USAGE % 5).encode()
    text = b'{"choices":[{"text":"' + b'\\"usage\\":{}' * 10 + b'"}],%b}'
    assert told_in(text % usage) == (7, 5, 4)
    for filled in (b"{%b," % usage + b'"x":"' + b"y" * 90_000 + b'"}', b'{"x":"' + b"y" * 90_000 + b'",%b}' % usage):
        for size in (1_000, 16_384, 50_000):
            meter = WholeMeter()
            assert b"".join(meter.feed(filled[at : at + size]) for at in range(0, len(filled), size)) == filled
            assert meter.reported == (7, 5)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_a_replica_has_sent_is_metered_when_the_client_goes_also_what_nobody_has_read(
    tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    event = b'data: {"choices":[{"delta":{"content":"w"}}]}\n\n'
    piece = b"%x\r\n%b\r\n" % (len(event), event)

    async def scene() -> list[Usage]:
        loop, entered = asyncio.get_running_loop(), list[Usage]()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            books = Books(tmp_path)
            gateway = Gateway(pepper=PEPPER, own_token=str, hosts=frozenset({b"localhost"}), books=books)
            gateway.adopt(read_feed(feed_of({"m": [f"http://127.0.0.1:{listener.getsockname()[1]}"]})))
            server = await loop.create_server(gateway.connection, "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(request({"model": "m", "stream": True}))
            replica, _ = await loop.sock_accept(listener)
            with replica:
                replica.setblocking(False)
                await loop.sock_recv(replica, 65536)
                head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                await loop.sock_sendall(replica, head + piece)
                await reader.readuntil(event)
                replica.send(piece * 3)  # it is in the gateway's socket now, and no turn of the loop has come since
                next(iter(gateway.connections)).abort()
            writer.close()
            server.close()
            books.write()
            books.on_entered = entered.extend
            ledger = Ledger()
            await ledger.take_all(books)
        return entered

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        (usage,) = runner.run(scene())
    assert (usage.completion_tokens, usage.is_estimated) == (4, True)


# The books


class Ledger:
    """The control plane's side: what it took, and whether its answer arrives."""

    def __init__(self) -> None:
        self.entered: dict[str, Usage] = {}
        self.lines = 0
        self.answers = True

    async def send(self, body: bytes) -> None:
        usages = msgspec.convert(json.loads(body)["usages"], list[Usage])
        self.lines += len(usages)
        for usage in usages:
            self.entered.setdefault(usage.id, usage)
        if not self.answers:
            raise ConnectionError("the answer was lost")

    async def take_all(self, books: Books) -> None:
        while await books.hand_on(self.send):
            pass


def usage_of(books: Books, tokens: int = 0) -> Usage:
    return Usage(
        id=books.next_id(),
        at_ns=1,
        project="p",
        token="t",
        model="m",
        workload="w",
        job="j",
        prompt_tokens=3,
        completion_tokens=tokens,
        is_estimated=True,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["open", "count", "settle", "write", "hand on", "lose answer", "die"]), max_size=60))
def test_every_answer_is_entered_once_and_open_streams_as_counted_at_the_last_write(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        ledger, books, folder = Ledger(), Books(Path(name)), Path(name)
        under_way: list[Usage] = []
        written: dict[str, int] = {}
        settled: dict[str, int] = {}
        durable: dict[str, int] = {}

        async def scene() -> None:
            nonlocal books
            for step in [*steps, "write", "die"]:
                if step == "open":
                    under_way.append(usage_of(books))
                    books.open(under_way[-1])
                elif step == "count":
                    for usage in under_way:
                        usage.completion_tokens += 1
                elif step == "settle" and under_way:
                    usage = under_way.pop(0)
                    usage.completion_tokens += 2
                    books.settle(usage)
                    settled[usage.id] = usage.completion_tokens
                elif step == "write":
                    books.write()
                    durable.update(settled)
                    written.clear()
                    written.update({usage.id: usage.completion_tokens for usage in under_way})
                elif step in ("hand on", "lose answer"):
                    ledger.answers = step == "hand on"
                    try:
                        await ledger.take_all(books)
                    except ConnectionError:
                        assert not ledger.answers
                elif step == "die":  # kill -9: locks go, what was not written is gone
                    for segment in books._segments:
                        os.close(segment.descriptor)
                    durable.update(written)
                    written.clear()
                    settled.clear()
                    under_way.clear()
                    books = Books(folder)
                    books.adopt()
            ledger.answers = True
            await ledger.take_all(books)

        asyncio.run(scene())
        assert {one: usage.completion_tokens for one, usage in ledger.entered.items()} == durable
        assert not list(folder.glob("*.usage")), "files that were taken are gone"


def test_a_line_that_was_cut_off_and_files_of_the_living_are_left_alone(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tests.adapters.test_gateway_books import Books, usage_of;"
        "b = Books(Path(sys.argv[1])); b.open(usage_of(b, 5)); b.settle(usage_of(b, 6)); b.write(); print('x', flush=True);"
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.read(1)
    books, ledger = Books(tmp_path), Ledger()
    assert books.adopt() == 0, "its worker lives"
    other.kill()
    other.wait()
    other.stdout.close()
    [path] = tmp_path.glob("*.usage")
    with path.open("ab") as file:
        file.write(b's {"id":"cut')
    assert books.adopt() == 1
    asyncio.run(ledger.take_all(books))
    assert sorted(usage.completion_tokens for usage in ledger.entered.values()) == [5, 6]


def test_files_follow_each_other_carry_what_is_open_and_go_when_they_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidemill.gateway.books._FULL", 4_000)
    books, ledger = Books(tmp_path), Ledger()
    still_open = usage_of(books)
    books.open(still_open)
    for number in range(200):
        still_open.completion_tokens = number
        books.settle(usage_of(books, 1))
        books.write()
    assert len(list(tmp_path.glob("*.usage"))) > 5
    asyncio.run(ledger.take_all(books))
    assert len(list(tmp_path.glob("*.usage"))) == 1
    for segment in books._segments:
        os.close(segment.descriptor)
    after = Books(tmp_path)
    assert after.adopt() == 1
    asyncio.run(ledger.take_all(after))
    assert ledger.entered[still_open.id].completion_tokens == 199
    assert len(ledger.entered) == 201


def test_what_is_refused_for_good_is_kept_apart_and_holds_nothing_up(tmp_path: Path) -> None:
    async def refuse(_: bytes) -> None:
        raise Refused("no such thing")

    books, ledger = Books(tmp_path), Ledger()
    books.settle(usage_of(books, 1))
    books.write()
    asyncio.run(books.hand_on(refuse))
    assert b'"completion_tokens":1' in (tmp_path / "refused.json").read_bytes()
    books.settle(usage_of(books, 2))
    books.write()
    asyncio.run(ledger.take_all(books))
    assert [usage.completion_tokens for usage in ledger.entered.values()] == [2]


def test_a_full_disk_costs_nothing_that_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    books, ledger = Books(tmp_path), Ledger()
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        for _ in range(10):
            books.settle(usage_of(books, 1))
            books.write()
    books.settle(usage_of(books, 1))
    books.write()
    asyncio.run(ledger.take_all(books))
    assert len(ledger.entered) == 11
