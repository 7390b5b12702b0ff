"""The gateway's reading of bytes, against random ones: never a crash, and never dependent on how they were split."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidemill.core import tokens
from tidemill.gateway import connection, messages
from tidemill.gateway.connection import Connection
from tidemill.gateway.messages import (
    ChunkedBody,
    Malformed,
    Repeated,
    chunk,
    cut_head,
    end_to_end,
    read_request,
    read_response,
    take_response,
)
from tidemill.gateway.server import Gateway
from tidemill.gateway.table import read_feed

PEPPER = bytes(32)
TOKEN = tokens.mint("user", b"u" * 32)
FEED = (
    f'{{"version":1,"tokens":{{"{tokens.digest(TOKEN, PEPPER)}":{{"project":"","scopes":["infer"],"expires_ns":0}}}},'
    '"routes":{"empty":{"project":"p","service":"s","replicas":[]}}}'
).encode()


class Wire(asyncio.Transport):
    """A transport in memory: keeps what is written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.is_closed = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


def answers(pieces: list[bytes]) -> bytes:
    """All that a client gets for ``pieces``, with everything that may time out timed out at the end."""

    async def scene() -> bytes:
        gateway = Gateway(pepper=PEPPER, own_token=str, hosts=frozenset({b"localhost"}))
        gateway.adopt(read_feed(FEED))
        connection = Connection(gateway)
        wire = Wire()
        connection.connection_made(wire)
        for piece in pieces:
            if piece and not wire.is_closed:
                connection.data_received(piece)
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        connection.check(asyncio.get_running_loop().time() + 10**9)
        connection.connection_lost(None)
        assert gateway.held == 0
        assert not gateway.connections
        return re.sub(rb"req_[0-9a-f]{12}", b"req_", wire.written)

    return asyncio.run(scene())


_SAID = (
    b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-LENGTH: \t17\r\nX-Request-Id: a\r\nCookie: content-length: 5\r\n\r\n"
)


@pytest.mark.parametrize(
    "data",
    [
        _SAID + b"body",
        _SAID.replace(b"17", b"5") + b"body",
        _SAID.replace(b"17", b"999999999999999"),
        _SAID.replace(b"17", b"1234567890123456"),
        _SAID.replace(b"17", b"1x"),
        _SAID.replace(b"17", b"-1"),
        _SAID.replace(b"17", b""),
        _SAID.replace(b"17", b"17\r\nContent-Length: 18"),
        _SAID.replace(b"17", b"17,18"),
        _SAID.replace(b"h\r", b"g\r"),
        _SAID[:-2],
        _SAID[:30],
        b"",
    ],
)
def test_a_head_that_comes_again_is_read_as_if_it_was_new_or_not_known(data: bytes) -> None:
    again = Repeated(_SAID, read_request(_SAID))
    end = again.end_in(data)
    if end:
        head, rest = cut_head(data) or (b"", b"")
        assert data[end:] == rest
        assert again.head == read_request(head)
    else:
        assert not re.fullmatch(re.escape(_SAID).replace(b"17", rb"[0-9]{1,15}") + b"body", data), "it is the same"


def test_heads_of_answers_are_read_once_unless_they_hold_what_is_one_clients_own() -> None:
    for header, is_kept in (
        (b"Content-Type: text/plain", True),
        (b"Set-Cookie: a=b", False),
        (b"X: " + b"y" * 4000, False),
    ):
        said = b"HTTP/1.1 200 OK\r\n%b\r\nContent-Length: 2\r\n\r\nok" % header
        one, other = take_response(said), take_response(said)
        assert one is not None
        assert other is not None
        assert one == other
        assert one[1] == b"ok"
        assert (one[0] is other[0]) is is_kept


def split(data: bytes, places: list[int]) -> list[bytes]:
    cuts = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


_LINES = st.sampled_from(
    [
        b"GET /health HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n", b"GET /v1/models HTTP/1.0\r\n",
        b"HEAD /health HTTP/1.1\r\n", b"POST /v1/responses?x=1 HTTP/1.1\r\n", b"\r\n", b"\n", b"\r", b"\r\n\r\n",
        b"Host: localhost\r\n", b"Host: evil\r\n", b"Host: localhost:99\r\n\r\n", b"X: y\r\n", b" folded\r\n",
        f"Authorization: Bearer {TOKEN}\r\n".encode(), b"Content-Length: 5\r\n", b"Content-Length: 17\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"5\r\nhello\r\n",
        b'11\r\n{"model":"empty"}\r\n', b"0\r\n\r\n", b'{"model":"empty"}', b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
        f"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode(), b"X: " + b"a" * 33_000,
        b"ffffffff\r\n", b"Content-Length: 70000\r\n\r\n", b"X" * 70_000,
    ]
)  # fmt: skip
_STREAMS = st.lists(_LINES | st.binary(max_size=40), max_size=14).map(b"".join)
_GOOD = (
    f"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 17\r\n\r\n"
    '{"model":"empty"}'
).encode()


@settings(max_examples=400, deadline=2000)
@given(_STREAMS, st.lists(st.integers(0, 2**20), max_size=12))
@example(_GOOD * 3 + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", [1, 50, 51, 200])
@example(_GOOD * 300, [7, 20_000])
@example(
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b" " * 32_000 + b"a\r\n\r\n" + _GOOD, [100, 31_000, 32_767]
)
def test_the_answers_do_not_depend_on_how_the_bytes_arrive(data: bytes, places: list[int]) -> None:
    whole = answers([data])
    assert answers(split(data, places)) == whole
    assert whole.count(b"HTTP/1.1 408") <= 1


def test_the_property_above_notices_a_reader_that_depends_on_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes) -> tuple[bytes, bytes] | None:
        head, ending, rest = data.partition(b"\r\n\r\n")
        if len(data) > messages.HEAD_LIMIT:  # counts what came with the head, too
            raise Malformed(431, "The header is too large.")
        return (head + ending, rest) if ending else None

    monkeypatch.setattr(connection, "cut_head", careless)
    with pytest.raises(AssertionError):
        test_the_answers_do_not_depend_on_how_the_bytes_arrive()


@settings(max_examples=60, deadline=2000)
@given(_STREAMS.filter(lambda data: len(data) < 600))
def test_the_answers_are_the_same_byte_by_byte(data: bytes) -> None:
    assert answers([data[i : i + 1] for i in range(len(data))]) == answers([data])


@settings(max_examples=300)
@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.binary(max_size=20), st.lists(st.integers(0, 9999))
)
def test_a_chunked_body_is_read_whole_and_not_a_byte_further(
    payloads: list[bytes], surplus: bytes, places: list[int]
) -> None:
    body = ChunkedBody()
    got = b""
    after = b""
    for piece in split(b"".join(map(chunk, payloads)) + messages.LAST_CHUNK + surplus, places):
        if body.rest is None:
            got += b"".join(body.feed(piece))
        else:
            after += piece
    assert body.rest is not None
    assert (got, body.rest + after) == (b"".join(payloads), surplus)


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from(
            [b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"3;x=y\r\nabc\r\n", b"\r\n", b"\n", b"a"]
        )
        | st.binary(max_size=6),
        max_size=6,
    ).map(b"".join),
    st.lists(st.integers(0, 9999), max_size=6),
)
def test_chunks_are_never_read_more_kindly_than_by_httptools(data: bytes, places: list[int]) -> None:
    def read(pieces: list[bytes]) -> tuple[str, bytes]:
        body, got = ChunkedBody(), b""
        try:
            for piece in pieces:
                if body.rest is None:
                    got += b"".join(body.feed(piece))
        except Malformed as error:
            return error.detail, b""
        return ("whole" if body.rest is not None else "partial"), got

    mine = read([data])
    assert read(split(data, places)) == mine

    class Sink:
        body = b""
        is_whole = False

        def on_body(self, data: bytes) -> None:
            self.body += b"" if self.is_whole else data

        def on_message_complete(self) -> None:
            self.is_whole = True

    sink = Sink()
    parser = httptools.HttpRequestParser(sink)
    parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    try:
        parser.feed_data(data)
    except httptools.HttpParserError:
        if not sink.is_whole:
            assert mine[0] != "whole" or b"\r\n\r\n" in data  # a trailer of free form is dropped, not judged
            return
    if mine[0] == "whole":
        assert (sink.is_whole, sink.body) == (True, mine[1])


@settings(max_examples=500)
@given(st.binary(max_size=200) | _STREAMS)
def test_any_head_is_read_or_refused(data: bytes) -> None:
    for read in (read_request, read_response):
        cut, status = None, 0
        try:
            cut = cut_head(data)
            if cut is not None:
                status = 200 if cut[0] + cut[1] == data else 0
                read(cut[0])
        except Malformed as refused:
            status = refused.status
        assert cut is None or status in (200, 400, 417, 431, 505)


@pytest.mark.parametrize(
    ("read", "head", "status"),
    [
        (read_response, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (read_response, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (read_response, b"nonsense\r\n\r\n", 400),
        (read_request, b"GET / HTTP/0.9\r\n\r\n", 505),
        (read_request, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    ],
)
def test_heads_that_are_refused(read: Callable[[bytes], object], head: bytes, status: int) -> None:
    with pytest.raises(Malformed) as refused:
        read(head)
    assert refused.value.status == status


def test_headers_named_in_connection_go_no_further() -> None:
    headers = [(b"connection", b"X-One , keep-alive"), (b"x-one", b"1"), (b"x-two", b"2"), (b"te", b"trailers")]
    assert end_to_end(headers, without=frozenset()) == [(b"x-two", b"2")]


def test_reading_a_head_that_grows_byte_by_byte_stays_cheap() -> None:
    data = b"GET / HTTP/1.1\r\nX: " + b"a" * 32_000
    began = time.process_time()
    answers([data[i : i + 1] for i in range(8_000)])
    assert time.process_time() - began < 2
