"""The gateway between real clients and real sockets: what passes, what is refused, and what happens when things break."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import uvloop

from tidemill.core import tokens
from tidemill.gateway.feed import Feed, load, save
from tidemill.gateway.server import Gateway, Limits
from tidemill.gateway.table import FeedError, Replica, Route, read_feed

PEPPER = bytes(range(32))
USER = tokens.mint("user", b"u" * 32)
ADMIN = tokens.mint("user", b"a" * 32)
OTHER = tokens.mint("user", b"o" * 32)
EXPIRED = tokens.mint("user", b"e" * 32)
READER = tokens.mint("user", b"r" * 32)
UNKNOWN = tokens.mint("user", b"x" * 32)
GATEWAY = tokens.derive("gw", "gateway", PEPPER)
EVENTS = [
    f'data: {{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{{"index":0,'
    f'"delta":{{"content":"w{i}"}},"finish_reason":null}}]}}\n\n'.encode()
    for i in range(5)
] + [b"data: [DONE]\n\n"]
COMPLETION = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "usage": None,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    }
).encode()


def feed_of(routes: dict[str, list[str]], *, version: int = 1, project: str = "p1") -> bytes:
    """A feed with this file's tokens and one service per model."""
    keys = {
        USER: {"project": "p1", "scopes": ["infer"], "expires_ns": 0},
        ADMIN: {"project": "", "scopes": ["admin"], "expires_ns": 0},
        OTHER: {"project": "p2", "scopes": ["infer"], "expires_ns": time.time_ns() + 10**12},
        EXPIRED: {"project": "p1", "scopes": ["infer"], "expires_ns": time.time_ns() - 1},
        READER: {"project": "p1", "scopes": ["read"], "expires_ns": 0},
    }
    return json.dumps(
        {
            "version": version,
            "tokens": {tokens.digest(token, PEPPER): key for token, key in keys.items()},
            "routes": {
                model: {
                    "project": project,
                    "service": model,
                    "replicas": [{"job": f"{model}-{i}", "endpoint": e} for i, e in enumerate(endpoints)],
                }
                for model, endpoints in routes.items()
            },
        }
    ).encode()


class Engine:
    """A model server that does what the request's ``mode`` says and keeps a journal of what reached it."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.started = asyncio.Event()
        self.left_at = 0.0
        self.left = asyncio.Event()
        self.sent = 0
        self.go_on = asyncio.Event()
        self.is_hung = False
        """It answers no probe."""
        self.status = 200
        """Of whole answers."""
        self.usage: dict[str, int] = {}
        """What ``late`` answers say they took."""
        self.server: asyncio.Server | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> str:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    while self.is_hung:
                        await asyncio.sleep(0.01)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                length = re.search(rb"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                self.heads.append(head)
                self.bodies.append(body)
                watch = asyncio.create_task(self._watch(reader))
                self.started.set()
                try:
                    if not await self._answer(json.loads(body), reader, writer):
                        break
                except ConnectionError:
                    self._notice()
                finally:
                    watch.cancel()
        writer.transport.abort()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.002)
        self._notice()

    def _notice(self) -> None:
        self.left_at = time.monotonic()
        self.left.set()

    async def _answer(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        mode = body.get("mode", "stream" if body.get("stream") else "whole")
        sse = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        if mode == "hang":
            await self.go_on.wait()
        if mode == "late":
            await asyncio.sleep(0.02)
            content = json.dumps({"data": [], "usage": self.usage}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
                + content
            )
        if mode in ("whole", "hang"):
            writer.write(
                b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nConnection: keep-alive, X-Private\r\n"
                b"X-Private: 1\r\nX-Kept: 2\r\nContent-Length: %d\r\n\r\n" % (self.status, len(COMPLETION)) + COMPLETION
            )
        elif mode == "chunked whole":
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"%x;ext=1\r\n%b\r\n0\r\nTrailer: 1\r\n\r\n" % (len(COMPLETION), COMPLETION)
            )
        elif mode == "until close":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + COMPLETION)
            await writer.drain()
            writer.close()
            return False
        elif mode == "refuses":
            error = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
            writer.write(
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(error)
                + error
            )
        elif mode == "die":
            return False
        elif mode == "die in body":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
            await writer.drain()
            return False
        elif mode == "surplus":
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
                b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
            )
        elif mode == "two lengths":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        elif mode in ("stream", "die in stream", "hang in stream"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + sse)
            for number, event in enumerate(EVENTS):
                if number == 2 and mode != "stream":
                    await writer.drain()
                    if mode == "hang in stream":
                        await self.go_on.wait()
                    return False
                half = len(event) // 2
                writer.write(b"%x\r\n%b\r\n%x\r\n%b\r\n" % (half, event[:half], len(event) - half, event[half:]))
                await asyncio.sleep(0.005)
            writer.write(b"0\r\n\r\n")
        elif mode == "slow flood":
            writer.write(sse)
            for _ in range(60):
                writer.write(b"9\r\ndata: x\n\n\r\n")
                await asyncio.sleep(0.01)
            writer.write(b"0\r\n\r\n")
        elif mode == "flood":
            writer.transport.set_write_buffer_limits(high=65536)
            writer.write(sse)
            piece = b"data: " + b"x" * 16376 + b"\n\n"
            for _ in range(4096):
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                self.sent += len(piece)
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Rig:
    """A gateway and engines in one loop."""

    def __init__(self, gateway: Gateway, port: int, engines: list[Engine], endpoints: list[str]) -> None:
        self.gateway = gateway
        self.port = port
        self.engines = engines
        self.endpoints = endpoints

    @property
    def engine(self) -> Engine:
        return self.engines[0]

    def openai(self, token: str = USER) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0, timeout=10)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def raw(self, data: bytes) -> bytes:
        """All that comes back for ``data`` until the gateway closes."""
        reader, writer = await self.connect()
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    async def post(self, body: dict[str, Any], token: str = USER) -> tuple[int, dict[str, str], bytes]:
        answer = await self.raw(request(body, token=token, headers="Connection: close\r\n"))
        return parse(answer)


def request(body: Any, *, token: str = USER, path: str = "/v1/chat/completions", headers: str = "") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{headers}"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def get(path: str, *, token: str = USER, close: bool = True) -> bytes:
    ending = "Connection: close\r\n" if close else ""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{ending}\r\n".encode()


def parse(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, "it did not come to hold"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(*, engines: int = 1, limits: Limits | None = None) -> AsyncIterator[Rig]:
    mills = [Engine() for _ in range(engines)]
    endpoints = [await mill.listen() for mill in mills]
    gateway = Gateway(
        pepper=PEPPER, own_token=lambda: GATEWAY, hosts=frozenset({b"localhost", b"127.0.0.1"}), limits=limits
    )
    gateway.adopt(read_feed(feed_of({"m": endpoints, "empty": []})))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(gateway.connection, "127.0.0.1", 0)
    sweep = loop.create_task(gateway.sweep(every_s=0.01))
    broken: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: broken.append(context))
    rig = Rig(gateway, server.sockets[0].getsockname()[1], mills, endpoints)
    try:
        yield rig
    finally:
        server.close()
        sweep.cancel()
        await gateway.drain(within_s=0.5)
        for mill in mills:
            await mill.close()
    assert not broken
    assert gateway.held == 0
    assert all(counts.in_flight == 0 for counts in gateway.metrics.models.values())
    assert all(r.outstanding == 0 for route in gateway.table.routes.values() for r in route.replicas)


def live(**options: Any) -> Callable[[Callable[[Rig], Awaitable[None]]], Callable[[], None]]:
    """Run a test on uvloop against a fresh gateway, and see that nothing leaked or went wrong unseen."""

    def decorate(test: Callable[[Rig], Awaitable[None]]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            async def scene() -> None:
                async with asyncio.timeout(30), running(**options) as rig:
                    await test(rig)

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(scene())

        del run.__wrapped__  # or pytest looks for fixtures in the scene's arguments
        return run

    return decorate


# What passes


@live()
async def test_the_openai_client_gets_whole_answers_and_streams(rig: Rig) -> None:
    async with rig.openai() as client:
        whole = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        assert whole.choices[0].message.content == "hello"
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert [part.choices[0].delta.content async for part in stream] == ["w0", "w1", "w2", "w3", "w4"]
        assert [model.id for model in (await client.models.list()).data] == ["empty", "m"]
        assert (await client.models.retrieve("m")).id == "m"
    counts = rig.gateway.metrics.of("m")
    assert (counts.requests, counts.streams, counts.errors) == (2, 1, 0)


@live()
async def test_bytes_of_body_and_stream_pass_unchanged(rig: Rig) -> None:
    body = b'{ "stream":true,"model" : "m", "unknown_field": [1.0, "\xc3\xa9\\u00e9"],"n":1e0 }'
    reader, writer = await rig.connect()
    writer.write(
        request(body, headers="Connection: close\r\nX-Request-Id: mine-1\r\nCookie: a=b\r\nX-Tag: t\r\nTE: x\r\n")
    )
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    payload = b"".join(re.findall(rb"[0-9a-f]+\r\n(.*?)\r\n(?=[0-9a-f]+\r\n)", rest, re.DOTALL))
    assert payload == b"".join(EVENTS)
    assert rest.endswith(b"0\r\n\r\n")
    assert b"x-request-id: mine-1" in head
    assert rig.engine.bodies == [body]
    received = rig.engine.heads[0]
    for kept in (b"POST /v1/chat/completions HTTP/1.1\r\n", b"x-tag: t", b"x-request-id: mine-1", b"host: 127.0.0.1:"):
        assert kept in received
    for dropped in (b"authorization", b"tm_user", b"cookie", b"te: ", b"connection"):
        assert dropped not in received.lower()


@live()
async def test_hop_by_hop_headers_of_the_replica_are_dropped(rig: Rig) -> None:
    status, headers, body = await rig.post({"model": "m"})
    assert (status, body) == (200, COMPLETION)
    assert headers["x-kept"] == "2"
    assert "x-private" not in headers
    assert headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("mode", ["whole", "chunked whole", "until close"])
def test_every_framing_of_a_replica_arrives_whole(mode: str) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        status, headers, body = await rig.post({"model": "m", "mode": mode})
        assert (status, headers["content-length"], body) == (200, str(len(COMPLETION)), COMPLETION)

    scene()


@live()
async def test_connections_are_kept_on_both_sides(rig: Rig) -> None:
    reader, writer = await rig.connect()
    for _ in range(20):
        writer.write(request({"model": "m"}))
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(parse(head)[1]["content-length"]))
    writer.close()
    assert rig.engine.connections == 1
    assert len(rig.engine.bodies) == 20


@live()
async def test_pipelined_requests_are_answered_in_order_one_at_a_time(rig: Rig) -> None:
    answer = await rig.raw(
        request({"model": "m", "n": 1})
        + get("/health", close=False)
        + request({"model": "m", "stream": True})
        + request({"model": "gone"})
        + request({"model": "empty"})
        + get("/health")
    )
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"200", b"404", b"503", b"200"]
    assert [json.loads(body).get("n") for body in rig.engine.bodies] == [1, None]


@live()
async def test_a_thousand_pipelined_refusals_neither_recurse_nor_stall(rig: Rig) -> None:
    answer = await rig.raw(request({"model": "empty"}) * 1000 + get("/health"))
    assert answer.count(b"HTTP/1.1 503") == 1000
    assert answer.endswith(b'{"status":"ok"}')


@live()
async def test_a_chunked_body_and_an_expectation_are_understood(rig: Rig) -> None:
    body = b'{"model":"m"}'
    reader, writer = await rig.connect()
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {USER}\r\nExpect: 100-continue"
        "\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"5;x=y\r\n" + body[:5] + b"\r\n" + b"8\r\n" + body[5:] + b"\r\n0\r\nT: 1\r\n\r\n")
    assert parse(await reader.read())[2] == COMPLETION
    writer.close()
    assert rig.engine.bodies == [body]
    assert b"content-length: 13" in rig.engine.heads[0]
    assert b"expect" not in rig.engine.heads[0].lower()


@live()
async def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection(rig: Rig) -> None:
    body = b'{"model":"m","stream":true}'
    answer = await rig.raw(
        f"POST /v1/completions HTTP/1.0\r\nAuthorization: Bearer {USER}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    status, headers, stream = parse(answer)
    assert (status, stream) == (200, b"".join(EVENTS))
    assert "transfer-encoding" not in headers


@live(engines=3)
async def test_the_least_busy_replica_is_chosen(rig: Rig) -> None:
    waiting = [asyncio.create_task(rig.post({"model": "m", "mode": "hang"})) for _ in range(6)]
    await eventually(lambda: sum(len(engine.bodies) for engine in rig.engines) == 6)
    assert [len(engine.bodies) for engine in rig.engines] == [2, 2, 2]
    rig.engines[1].go_on.set()
    await eventually(lambda: sum(r.outstanding for r in rig.gateway.table.routes["m"].replicas) <= 4)
    for task in waiting:
        task.cancel()


# Who may


@pytest.mark.parametrize(
    ("token", "status", "code"),
    [
        ("", 401, "invalid_api_key"),
        ("tm_user_short", 401, "invalid_api_key"),
        (USER[:-1] + "~", 401, "invalid_api_key"),
        (USER[:-1] + ("0" if USER[-1] != "0" else "1"), 401, "invalid_api_key"),
        (UNKNOWN, 401, "invalid_api_key"),
        (EXPIRED, 401, "invalid_api_key"),
        (READER, 403, "insufficient_scope"),
        (GATEWAY, 401, "invalid_api_key"),
        (OTHER, 404, "model_not_found"),
        ("\u00e9", 401, "invalid_api_key"),
        (ADMIN, 200, ""),
        (USER, 200, ""),
    ],
)
def test_what_a_token_opens(token: str, status: int, code: str) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        got, _, body = await rig.post({"model": "m"}, token=token)
        assert got == status
        assert status == 200 or error_of(body)["code"] == code
        assert len(rig.engine.bodies) == (status == 200)

    scene()


@live()
async def test_a_token_of_one_project_sees_nothing_of_another(rig: Rig) -> None:
    assert json.loads(parse(await rig.raw(get("/v1/models", token=OTHER)))[2])["data"] == []
    assert parse(await rig.raw(get("/v1/models/m", token=OTHER)))[0] == 404
    _, _, body = await rig.post({"model": "mm"}, token=OTHER)
    assert "Did you mean" not in error_of(body)["message"]
    _, _, body = await rig.post({"model": "mm"})
    assert "Did you mean m?" in error_of(body)["message"]


@live()
async def test_the_openai_client_raises_its_own_errors(rig: Rig) -> None:
    async with rig.openai(UNKNOWN) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.models.list()
        assert refused.value.code == "invalid_api_key"
    async with rig.openai() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="nope", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.InternalServerError) as empty:
            await client.completions.create(model="empty", prompt="x")
        assert (empty.value.status_code, empty.value.code) == (503, "no_ready_replica")
        assert empty.value.response.headers["retry-after"] == "5"
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="m", prompt="x", extra_body={"mode": "refuses"})
        stream = await client.completions.create(
            model="m", prompt="x", stream=True, extra_body={"mode": "die in stream"}
        )
        with pytest.raises(openai.APIError) as broken:
            _ = [part async for part in stream]
        assert "broke off" in broken.value.message


@live()
async def test_metrics_need_a_token_and_show_counts(rig: Rig) -> None:
    await rig.post({"model": "m"})
    assert parse(await rig.raw(get("/metrics", token=USER)))[0] == 403
    assert parse(await rig.raw(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))[0] == 401
    for token in (ADMIN, GATEWAY):
        _, _, text = parse(await rig.raw(get("/metrics", token=token)))
        assert b'tidemill_gateway_requests_total{model="m"} 1\n' in text
        assert b'tidemill_gateway_in_flight{model="m"} 0\n' in text
        assert b"tm_" not in text


@live()
async def test_before_the_first_feed_nobody_is_told_that_a_key_is_wrong(rig: Rig) -> None:
    table, rig.gateway.table = rig.gateway.table, None
    status, headers, body = await rig.post({"model": "m"})
    assert (status, headers["retry-after"], error_of(body)["code"]) == (503, "2", "starting")
    assert parse(await rig.raw(get("/health")))[0] == 503
    rig.gateway.table = table
    assert parse(await rig.raw(get("/health", token="")))[0] == 200


# What is refused

AUTH = f"Host: localhost\r\nAuthorization: Bearer {USER}\r\n".encode()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (
            b"POST /v1/completions HTTP/1.1\r\n"
            + AUTH
            + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\n"
            + AUTH
            + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: +4\r\n\r\nabcd", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: 0x4\r\n\r\nabcd", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: 4, 4\r\n\r\nabcd", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length : 4\r\n\r\nabcd", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\n"
            + AUTH
            + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.0\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 300, 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"X: a\r\n folded\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"X: a\nY: b\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"X: a\rY: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"X: a\x00b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 421),
        (b"GET /health HTTP/1.1\r\nHost: localhost/#@x\r\nConnection: close\r\n\r\n", 421),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000, 431),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: 99999999\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Length: 5\r\nExpect: tea\r\n\r\nabcde", 417),
        (b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n", 415),
        (b"GET /v1/completions HTTP/1.1\r\n" + AUTH + b"Connection: close\r\n\r\n", 405),
        (b"POST /v1/nothing HTTP/1.1\r\n" + AUTH + b"Connection: close\r\n\r\n", 404),
        (b"POST /v1/%63ompletions HTTP/1.1\r\n" + AUTH + b"Connection: close\r\n\r\n", 404),
        (b"POST //v1/completions HTTP/1.1\r\n" + AUTH + b"Connection: close\r\n\r\n", 404),
    ],
)
def test_ambiguous_and_malformed_requests_are_refused_and_reach_no_replica(data: bytes, status: int) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        answer = await rig.raw(data)
        assert parse(answer)[0] == status, answer
        assert len(re.findall(rb"HTTP/1\.1 \d", answer)) == 1
        error_of(parse(answer)[2])
        assert rig.engine.heads == []

    scene()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model":"m\xff"}', "invalid_json"),
        (b'{"model":"m","x":"\xff"}', "invalid_json"),
        (b"{}", "model_required"),
        (b'{"model":1}', "model_required"),
        (b'{"model":""}', "model_required"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model":"m"} {"model":"m"}', "invalid_json"),
    ],
)
def test_bad_bodies_are_named_and_the_connection_goes_on(body: bytes, code: str) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        first, second = (await rig.raw(request(body) + get("/health"))).split(b"HTTP/1.1 ")[1:]
        status, _, content = parse(b"HTTP/1.1 " + first)
        assert (status, error_of(content)["code"]) == (400, code)
        assert second.endswith(b'{"status":"ok"}')

    scene()


@live(limits=Limits(body=100_000))
async def test_a_body_over_the_cap_is_refused_by_its_length_and_by_its_chunks(rig: Rig) -> None:
    assert parse(await rig.raw(request(b"x" * 100_001)))[0] == 413
    chunked = b"POST /v1/completions HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n"
    assert parse(await rig.raw(chunked + b"18000\r\n" + b"x" * 0x18000 + b"\r\n2000\r\n" + b"x" * 0x2000))[0] == 413
    assert rig.gateway.held == 0


@live(limits=Limits(bodies=1000))
async def test_bodies_together_are_bounded(rig: Rig) -> None:
    reader, writer = await rig.connect()
    writer.write(request(b"x" * 900)[:-1])
    await eventually(lambda: rig.gateway.held == 900)
    status, headers, _ = parse(await rig.raw(request(b"x" * 200, headers="Connection: close\r\n")))
    assert (status, headers["retry-after"]) == (503, "1")
    writer.close()
    await eventually(lambda: rig.gateway.held == 0)
    del reader


@live(limits=Limits(head_s=0.1, body_s=0.1, idle_s=0.1, body_rate=10**9))
async def test_slow_requests_are_ended_and_idle_connections_closed(rig: Rig) -> None:
    assert parse(await rig.raw(b"GET /health HT"))[0] == 408
    assert parse(await rig.raw(request({"model": "m"})[:-3]))[0] == 408
    assert await rig.raw(b"") == b""
    reader, writer = await rig.connect()  # one byte at a time does not help
    for byte in request({"model": "m"}):
        writer.write(bytes([byte]))
        await asyncio.sleep(0.005)
        if reader.at_eof():
            break
    assert parse(await reader.read())[0] == 408
    assert rig.engine.heads == []


@live(limits=Limits(connections=3))
async def test_connections_are_bounded(rig: Rig) -> None:
    held = [await rig.connect() for _ in range(3)]
    status, headers, _ = parse(await rig.raw(b""))
    assert (status, headers["retry-after"]) == (503, "1")
    for _, writer in held:
        writer.close()


# Who goes away


@pytest.mark.parametrize("phase", ["before first byte", "mid-stream", "non-stream", "pipelined"])
def test_a_client_that_leaves_ends_the_replicas_work_at_once(phase: str) -> None:
    mode = "hang in stream" if phase == "mid-stream" else "hang"

    @live()
    async def scene(rig: Rig) -> None:
        for abort in (False, True):
            engine = rig.engine
            engine.started.clear()
            engine.left.clear()
            reader, writer = await rig.connect()
            body = {"model": "m", "mode": mode, "stream": phase not in ("non-stream", "pipelined")}
            writer.write(request(body) * (2 if phase == "pipelined" else 1))
            await asyncio.wait_for(engine.started.wait(), 5)
            if phase == "mid-stream":
                await reader.readuntil(b"w1")
            left_at = time.monotonic()
            if abort:
                writer.transport.abort()
            else:
                writer.close()
            await asyncio.wait_for(engine.left.wait(), 5)
            assert engine.left_at - left_at < 0.2
        assert rig.gateway.metrics.of("m").aborted == 2

    scene()


@live()
async def test_a_client_that_leaves_while_the_replica_is_being_reached_leaves_nothing(rig: Rig) -> None:
    full = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0, backlog=1, start_serving=False)
    port = full.sockets[0].getsockname()[1]
    full.sockets[0].dup().listen(0)
    # fill the backlog, so that a connection hangs in connecting
    held = [asyncio.create_task(asyncio.open_connection("127.0.0.1", port)) for _ in range(3)]
    await asyncio.sleep(0.05)
    rig.gateway.adopt(read_feed(feed_of({"m": [f"127.0.0.1:{port}"]})))
    _, writer = await rig.connect()
    writer.write(request({"model": "m"}))
    await eventually(lambda: rig.gateway.metrics.of("m").in_flight == 1)
    writer.transport.abort()
    await eventually(lambda: rig.gateway.metrics.of("m").in_flight == 0, within_s=0.2)
    for task in held:
        task.cancel()
    full.close()


@live()
async def test_a_slow_reader_holds_the_replica_back_instead_of_filling_memory(rig: Rig) -> None:
    reader, writer = await rig.connect()
    writer.write(request({"model": "m", "mode": "flood"}, headers="Connection: close\r\n"))
    reader._limit = 1024  # the test's own reading stops early, so the socket fills
    sizes = []
    await eventually(lambda: rig.engine.sent > 0)
    for _ in range(50):
        await asyncio.sleep(0.01)
        sizes.append(rig.engine.sent)
    assert sizes[-1] == sizes[-10], "the replica was not held back"
    assert sizes[-1] < 24 * 2**20  # kernel buffers of two connections and 256 KiB here, of 64 MiB in all
    waiting = sum(connection._waiting_to_be_sent() for connection in rig.gateway.connections)
    assert waiting < 1024 * 1024
    total = 0
    while part := await reader.read(1 << 20):
        total += len(part)
    assert total > 64 * 2**20
    writer.close()


@live(limits=Limits(stall_s=0.1))
async def test_a_client_that_stops_reading_for_good_is_dropped_with_its_replica_slot(rig: Rig) -> None:
    reader, writer = await rig.connect()
    reader._limit = 1024
    writer.write(request({"model": "m", "mode": "flood"}))
    await asyncio.wait_for(rig.engine.left.wait(), 10)
    writer.close()


# What breaks


@live(engines=3)
async def test_refused_connections_are_tried_elsewhere_and_then_avoided(rig: Rig) -> None:
    for engine in rig.engines[:2]:
        await engine.close()
    for _ in range(4):
        assert (await rig.post({"model": "m"}))[0] == 200
    assert rig.gateway.metrics.of("m").retries <= 2
    await rig.engines[2].close()
    rig.gateway.pool.close()
    status, headers, body = await rig.post({"model": "m"})
    assert (status, headers["retry-after"], error_of(body)["code"]) == (503, "2", "replica_refused")


@live(engines=2)
async def test_a_replica_that_dies_before_the_first_byte_is_replaced_and_in_the_end_a_502(rig: Rig) -> None:
    status, _, body = await rig.post({"model": "m", "mode": "die"})
    assert (status, error_of(body)["code"]) == (502, "replica_failed")
    assert [len(engine.bodies) for engine in rig.engines] == [1, 1]


@live(engines=2)
async def test_a_replica_that_dies_in_a_whole_answer_is_a_502_and_not_tried_again(rig: Rig) -> None:
    status, _, body = await rig.post({"model": "m", "mode": "die in body"})
    assert (status, error_of(body)["code"]) == (502, "replica_failed")
    assert sum(len(engine.bodies) for engine in rig.engines) == 1


@live()
async def test_a_stream_that_breaks_ends_in_an_error_event_and_never_looks_whole(rig: Rig) -> None:
    answer = await rig.raw(request({"model": "m", "mode": "die in stream"}))
    assert b"w1" in answer
    assert b'event: error\ndata: {"error":{"message":"The model\'s replica broke off' in answer
    assert not answer.endswith(b"0\r\n\r\n")


@live()
async def test_an_idle_connection_that_the_replica_closed_costs_the_client_nothing(rig: Rig) -> None:
    for _ in range(5):
        assert (await rig.post({"model": "m"}))[0] == 200
        for task in list(rig.engine.tasks):
            task.cancel()
        rig.engine.tasks.clear()
    assert rig.gateway.metrics.of("m").errors == 0


@live()
async def test_a_replica_cannot_smuggle_a_second_response(rig: Rig) -> None:
    reader, writer = await rig.connect()
    writer.write(request({"model": "m", "mode": "surplus"}) + request({"model": "m"}, headers="Connection: close\r\n"))
    answer = await reader.read()
    writer.close()
    assert b"evil" not in answer
    assert answer.endswith(COMPLETION)
    assert rig.engine.connections == 2
    assert (await rig.post({"model": "m", "mode": "two lengths"}))[0] == 502


@live(limits=Limits(silence_s=0.1))
async def test_a_silent_replica_is_given_up(rig: Rig) -> None:
    status, _, body = await rig.post({"model": "m", "mode": "hang"})
    assert (status, error_of(body)["code"]) == (504, "replica_timeout")
    await asyncio.wait_for(rig.engine.left.wait(), 1)


@live()
async def test_draining_finishes_what_is_under_way_and_takes_no_more(rig: Rig) -> None:
    reader, writer = await rig.connect()
    idle_reader, idle_writer = await rig.connect()
    writer.write(request({"model": "m", "stream": True}))
    await reader.readuntil(b"w0")
    await rig.gateway.drain(within_s=5)
    assert (await reader.read()).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert await idle_reader.read() == b""
    writer.close()
    idle_writer.close()


@live()
async def test_many_requests_leave_no_objects_behind(rig: Rig) -> None:
    async with rig.openai() as client:
        for _ in range(50):
            await client.completions.create(model="m", prompt="x")
    gc.collect()
    assert sum(type(thing).__name__ == "Exchange" for thing in gc.get_objects()) <= 1


# Waiting for a replica


def held_feed(routes: dict[str, list[str]], *, version: int, concurrency: int = 0, wait_s: float = 5.0) -> bytes:
    """A feed in which requests may wait."""
    feed = json.loads(feed_of(routes, version=version))
    for route in feed["routes"].values():
        route |= {"wait_ms": int(wait_s * 1000), "concurrency": concurrency}
    return json.dumps(feed).encode()


@live()
async def test_a_request_waits_for_a_replica_in_order_and_no_longer_than_it_may(rig: Rig) -> None:
    rig.gateway.adopt(read_feed(held_feed({"m": []}, version=2)))
    waiting = [asyncio.create_task(rig.post({"model": "m", "n": n})) for n in range(3)]
    for number in range(3):
        await eventually(lambda number=number: rig.gateway.metrics.of("m").waiting > number)  # type: ignore[misc]
    answer = await rig.raw(request({"model": "m"}, headers="Connection: close\r\nX-Tidemill-Wait: 0.05\r\n"))
    status, headers, body = parse(answer)
    assert (status, headers["retry-after"], error_of(body)["code"]) == (503, "5", "no_ready_replica")
    slow = json.loads(held_feed({"m": []}, version=2))
    slow["routes"]["m"]["start_ms"] = 41_000
    rig.gateway.adopt(read_feed(json.dumps(slow).encode(), rig.gateway.table))
    answer = await rig.raw(request({"model": "m"}, headers="Connection: close\r\nX-Tidemill-Wait: 0.05\r\n"))
    assert parse(answer)[1]["retry-after"] == "41", "as long as its replicas take to start"
    rig.gateway.adopt(read_feed(held_feed({"m": rig.endpoints}, version=3, concurrency=1), rig.gateway.table))
    assert [(await task)[0] for task in waiting] == [200, 200, 200]
    assert [json.loads(body)["n"] for body in rig.engine.bodies] == [0, 1, 2]
    for wrong in ("soon", "-1", "601", "nan"):
        answer = await rig.raw(request({"model": "m"}, headers=f"Connection: close\r\nX-Tidemill-Wait: {wrong}\r\n"))
        assert error_of(parse(answer)[2])["code"] == "invalid_wait"


@live(limits=Limits(waiting=4))
async def test_a_full_line_is_said_at_once_and_whose_it_is(rig: Rig) -> None:
    rig.gateway.adopt(read_feed(held_feed({"m": []}, version=2, wait_s=0.5)))
    waiting = [asyncio.create_task(rig.post({"model": "m"})) for _ in range(2)]
    await eventually(lambda: rig.gateway.metrics.of("m").waiting == 2)
    status, headers, body = await rig.post({"model": "m"})
    assert (status, error_of(body)["code"]) == (429, "queue_full"), "half of the line is this tenant's own"
    assert headers["retry-after"] == "1"
    waiting += [asyncio.create_task(rig.post({"model": "m"}, token=ADMIN)) for _ in range(2)]
    await eventually(lambda: rig.gateway.metrics.of("m").waiting == 4)
    status, _, body = await rig.post({"model": "m"}, token=ADMIN)
    assert (status, error_of(body)["code"]) == (503, "queue_full")
    assert [(await task)[0] for task in waiting] == [503] * 4


@live()
async def test_a_client_that_leaves_the_line_leaves_nothing(rig: Rig) -> None:
    rig.gateway.adopt(read_feed(held_feed({"m": []}, version=2)))
    _, writer = await rig.connect()
    writer.write(request({"model": "m"}))
    await eventually(lambda: rig.gateway.metrics.of("m").waiting == 1)
    writer.transport.abort()
    await eventually(lambda: rig.gateway.line("m").count == 0)
    assert rig.gateway.metrics.of("m").in_flight == 0


# Replicas that hang


@live(engines=2)
async def test_a_hung_replica_is_given_up_and_is_tried_again_once_it_answers(rig: Rig) -> None:
    prober = rig.gateway.watch_replicas()
    prober._every_s, prober._patience_s = 0.05, 0.05
    watching = asyncio.create_task(prober.run(step_s=0.01))
    assert rig.gateway.table is not None
    replicas = rig.gateway.table.routes["m"].replicas
    hung = rig.engines[0]
    reader, writer = await rig.connect()
    writer.write(request({"model": "m", "mode": "hang in stream"}))
    await reader.readuntil(b"w1")
    [mine] = [one for one in replicas if one.under_way]
    hung = rig.engines[replicas.index(mine)]
    hung.is_hung = True
    assert b"event: error" in await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert not mine.circuit.allows
    for _ in range(4):
        assert (await rig.post({"model": "m"}))[0] == 200
    hung.is_hung = False
    await eventually(lambda: mine.circuit.allows)
    assert (await rig.post({"model": "m"}))[0] == 200
    assert (mine.circuit.state.value, rig.gateway.metrics.of("m").ejections) == ("closed", 1)
    watching.cancel()


@live(engines=1)
async def test_a_busy_replica_that_leaves_probes_unanswered_but_streams_on_is_kept(rig: Rig) -> None:
    prober = rig.gateway.watch_replicas()
    prober._every_s, prober._patience_s = 0.05, 0.05
    rig.engine.is_hung = True  # to probes only: the flood goes on
    watching = asyncio.create_task(prober.run(step_s=0.01))
    reader, writer = await rig.connect()
    writer.write(request({"model": "m", "mode": "slow flood"}, headers="Connection: close\r\n"))
    assert (await reader.read()).endswith(b"0\r\n\r\n")
    writer.close()
    watching.cancel()


# The feed


class Control:
    """A control plane that answers long polls from what it is told, and can be away."""

    def __init__(self) -> None:
        self.body = b""
        self.version = 0
        self.status = 200
        self.changed = asyncio.Event()
        self.polls: list[bytes] = []
        self.server: asyncio.Server | None = None
        self.port = 0

    def tell(self, body: bytes) -> None:
        self.body = body
        self.version += 1
        self.changed.set()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.polls.append(head)
            since = int(re.search(rb"since=(-?\d+)", head)[1])
            while self.status == 200 and self.body and json.loads(self.body)["version"] == since:
                self.changed.clear()
                await self.changed.wait()
            writer.write(
                b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"%x\r\n%b\r\n0\r\n\r\n" % (self.status, len(self.body), self.body)
            )
            await writer.drain()
        writer.close()


def follow(scene: Callable[[Control, Gateway], Awaitable[None]], folder: Path) -> None:
    async def run() -> None:
        control = Control()
        await control.start()
        (folder / "token").write_text(GATEWAY)
        gateway = Gateway(pepper=PEPPER, own_token=lambda: GATEWAY, hosts=frozenset())
        feed = Feed(
            control=f"http://127.0.0.1:{control.port}",
            token_file=folder / "token",
            copy=folder / "feed.json",
            adopt=gateway.adopt,
            pause_s=0.02,
        )
        task = asyncio.create_task(feed.follow())
        try:
            async with asyncio.timeout(20):
                await scene(control, gateway)
        finally:
            task.cancel()
            assert control.server is not None
            control.server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def test_a_change_is_followed_and_a_revoked_token_is_gone(tmp_path: Path) -> None:
    async def scene(control: Control, gateway: Gateway) -> None:
        control.tell(feed_of({"m": ["127.0.0.1:1"]}))
        await eventually(lambda: gateway.table is not None)
        assert gateway.table is not None
        assert gateway.table.key(USER, PEPPER) is not None
        replica = gateway.table.routes["m"].replicas[0]
        replica.circuit.is_suspect = True
        changed = json.loads(feed_of({"m": ["127.0.0.1:1", "127.0.0.1:2"]}, version=2))
        del changed["tokens"][tokens.digest(USER, PEPPER)]
        told_at = time.monotonic()
        control.tell(json.dumps(changed).encode())
        await eventually(lambda: gateway.table is not None and gateway.table.version == 2)
        assert time.monotonic() - told_at < 1
        assert gateway.table.key(USER, PEPPER) is None
        assert gateway.table.routes["m"].replicas[0] is replica, "what is known of it stays"
        assert b"Authorization: Bearer " + GATEWAY.encode() in control.polls[0]
        await eventually(lambda: load(tmp_path / "feed.json") is not None)

    follow(scene, tmp_path)


def test_a_bad_feed_is_never_adopted_and_losing_the_control_plane_changes_nothing(tmp_path: Path) -> None:
    async def scene(control: Control, gateway: Gateway) -> None:
        control.tell(feed_of({"m": ["127.0.0.1:1"]}))
        await eventually(lambda: (tmp_path / "feed.json").exists())
        table = gateway.table
        for body, status in ((b'{"version":9}', 200), (b"not json", 200), (b"{}", 401), (b"{}", 503)):
            control.status = status
            seen = len(control.polls)
            control.tell(body)
            await eventually(lambda seen=seen: len(control.polls) >= seen + 2)
        assert gateway.table is table
        assert control.server is not None
        control.server.close()
        await asyncio.sleep(0.1)
        assert gateway.table is table
        control.status = 200
        control.tell(feed_of({}, version=7))
        await control.start()
        await eventually(lambda: gateway.table is not table)

    follow(scene, tmp_path)


def test_the_kept_copy_is_private_whole_and_holds_no_token(tmp_path: Path) -> None:
    copy = tmp_path / "feed.json"
    assert load(copy) is None
    save(copy, feed_of({"m": ["127.0.0.1:1"]}))
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert b"tm_" not in copy.read_bytes()
    assert load(copy) is not None
    copy.write_bytes(copy.read_bytes()[:-10])
    assert load(copy) is None
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("endpoint", ["", "https://h:1", "127.0.0.1", "http://h:x", "http://h:99999", "http://h:1/a b"])
def test_an_endpoint_that_cannot_be_reached_by_its_name_is_a_bad_feed(endpoint: str) -> None:
    with pytest.raises(FeedError):
        read_feed(feed_of({"m": [endpoint]}))


def test_the_choice_of_a_replica_is_the_least_busy_then_the_longest_idle_and_suspects_last() -> None:
    replicas = tuple(Replica(job=str(i), host="h", port=i, prefix=b"") for i in range(3))
    route = Route(model="m", project="p", service="m", replicas=replicas)
    busy: Any = object()
    replicas[0].under_way.add(busy)
    replicas[1].turn, replicas[2].turn = 9, 4
    assert route.choose() is replicas[2]
    replicas[2].circuit.is_suspect = True
    assert route.choose() is replicas[1]
    replicas[2].circuit.is_suspect = False
    replicas[2].circuit.fail("it is gone", now=0.0)
    assert route.choose() is replicas[1]
    assert route.choose(tried=replicas[1:]) is replicas[0]
    assert route.choose(tried=replicas) is None
    replicas[2].circuit.probed(now=1.0)
    assert route.choose() is replicas[2], "a trial takes the next request there is"
    replicas[2].circuit.begin()
    assert route.choose() is replicas[1], "one trial at a time"
    full = Route(model="m", project="p", service="m", replicas=replicas[:1], concurrency=1)
    assert full.choose() is None


# The process


def test_the_process_serves_from_its_copy_when_the_control_plane_is_away(tmp_path: Path) -> None:
    async def scene() -> None:
        engine = Engine()
        endpoint = await engine.listen()
        (tmp_path / "gateway.token").write_text(GATEWAY)
        key = tmp_path / "secret.key"
        key.write_text(PEPPER.hex())
        key.chmod(0o600)
        save(tmp_path / "gateway-feed.json", feed_of({"m": [endpoint]}))
        command = [
            sys.executable,
            "-m",
            "tidemill.gateway",
            "--listen",
            "127.0.0.1:0",
            "--control",
            "http://127.0.0.1:1",
            "--token-file",
            str(tmp_path / "gateway.token"),
            "--pepper-file",
            str(key),
            "--home",
            str(tmp_path),
        ]
        process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        assert process.stderr is not None
        line = b""
        while b"serving on" not in line:
            line = await asyncio.wait_for(process.stderr.readline(), 20)
        port = int(line.strip().rpartition(b":")[2])
        loaded = await asyncio.to_thread(Path(f"/proc/{process.pid}/maps").read_text)
        assert not re.search(r"sqlalchemy|pydantic|numpy", loaded)
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=USER, max_retries=0)
        stream = await client.completions.create(model="m", prompt="x", stream=True)
        parts = [part async for part in stream]
        assert len(parts) == 5
        await client.close()
        second = await asyncio.create_subprocess_exec(
            *command[:4], f"127.0.0.1:{port}", *command[5:], stderr=subprocess.PIPE
        )
        _, complaint = await asyncio.wait_for(second.communicate(), 20)
        assert (second.returncode, b"is taken" in complaint) == (98, True)
        process.terminate()
        _, log = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0, log
        assert b"tm_" not in log
        await engine.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "secret.key"
    key.write_text(PEPPER.hex())
    key.chmod(0o644)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tidemill.gateway",
            "--token-file",
            str(key),
            "--pepper-file",
            str(key),
            "--home",
            os.fspath(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2
    assert "chmod 600" in done.stderr
