"""Services that are no models: any method, bodies as they come in both directions, WebSockets; and what is refused."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from tests.adapters.test_gateway import (
    GATEWAY,
    OTHER,
    PEPPER,
    READER,
    USER,
    error_of,
    eventually,
    feed_of,
    parse,
)
from tidemill.gateway.server import Gateway, Limits
from tidemill.gateway.table import read_feed

AUTH = f"Host: localhost\r\nAuthorization: Bearer {USER}\r\n"
KEY = base64.b64encode(b"k" * 16).decode()
ACCEPT = base64.b64encode(hashlib.sha1(KEY.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()
UPGRADE = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n"


class App:
    """A web application that says what it got, or does what the path says."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.got = 0
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.accept = ACCEPT
        self.server: asyncio.Server | None = None

    async def listen(self) -> str:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**16)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._serve(reader, writer):
                await writer.drain()
        self.left.set()
        writer.close()

    async def _body(self, head: bytes, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        if b"transfer-encoding: chunked" in head.lower():
            while size := int(await reader.readuntil(b"\r\n"), 16):
                yield await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
            return
        length = re.search(rb"content-length: (\d+)", head.lower())
        left = int(length[1]) if length else 0
        while left:
            piece = await reader.read(min(left, 65536))
            if not piece:
                raise ConnectionError
            left -= len(piece)
            yield piece

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        method, target, _ = head.split(b"\r\n")[0].split(b" ")
        path = target.partition(b"?")[0]
        if b"sec-websocket-key" in head.lower() and path == b"/socket":
            accept = self.accept.encode()
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\nSec-WebSocket-Protocol: chat\r\n\r\nhello"
            )
            while data := await reader.read(65536):
                self.got += len(data)
                if data == b"bye":
                    break
                writer.write(data[::-1])
                await writer.drain()
            return False
        if path == b"/early":
            writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\n\r\nmuch")
            await writer.drain()
            await self.go_on.wait()
            return False
        if path == b"/stuck":
            await self.go_on.wait()
        body = b""
        async for piece in self._body(head, reader):
            self.got += len(piece)
            if path not in (b"/sink", b"/stuck"):
                body += piece
        self.bodies.append(body)
        if path == b"/dies":
            return False
        if path == b"/waits":
            await self.go_on.wait()
        if path == b"/flood":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(2048):
                writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                await writer.drain()
                self.got += 0x4000
            writer.write(b"0\r\n\r\n")
        elif path == b"/drip":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
            await writer.drain()
            await self.go_on.wait()
            writer.write(b"2\r\ncd\r\n0\r\n\r\n")
        elif path == b"/head":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: x\r\n\r\n")
        elif path == b"/nothing":
            writer.write(b"HTTP/1.1 204 No Content\r\nX-Kept: 1\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\r\n")
        elif path == b"/fails":
            writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 3\r\n\r\nbad")
        else:
            said = json.dumps({"method": method.decode(), "target": target.decode(), "size": len(body)}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
                b"Content-Length: %d\r\n\r\n" % len(said) + said
            )
        return True

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Stage:
    """A gateway before applications."""

    def __init__(self, gateway: Gateway, port: int, apps: list[App], endpoints: list[str]) -> None:
        self.gateway, self.port, self.apps, self.endpoints = gateway, port, apps, endpoints

    @property
    def app(self) -> App:
        return self.apps[0]

    def adopt(self, *, version: int = 1, **options: Any) -> None:
        feed = json.loads(feed_of({"web": self.endpoints, "llm": self.endpoints}, version=version))
        feed["routes"]["web"] |= {"is_open": True, "wait_ms": 5000, **options}
        self.gateway.adopt(read_feed(json.dumps(feed).encode(), self.gateway.table))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**16)

    async def raw(self, data: bytes) -> bytes:
        reader, writer = await self.connect()
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    async def ask(
        self, method: str, path: str, headers: str = "", body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\n{AUTH}{headers}{length}Connection: close\r\n\r\n"
        return parse(await self.raw(head.encode() + body))

    def outstanding(self) -> int:
        assert self.gateway.table is not None
        return sum(one.outstanding for one in self.gateway.table.routes["web"].replicas)


def staged(
    *, apps: int = 1, limits: Limits | None = None
) -> Callable[[Callable[[Stage], Awaitable[None]]], Callable[[], None]]:
    """Run a test on uvloop against a fresh gateway, and see that nothing leaked or went wrong unseen."""

    def decorate(test: Callable[[Stage], Awaitable[None]]) -> Callable[[], None]:
        async def scene() -> None:
            mills = [App() for _ in range(apps)]
            endpoints = [await mill.listen() for mill in mills]
            gateway = Gateway(
                pepper=PEPPER, own_token=lambda: GATEWAY, hosts=frozenset({b"localhost", b"127.0.0.1"}), limits=limits
            )
            loop = asyncio.get_running_loop()
            broken: list[dict[str, Any]] = []
            loop.set_exception_handler(lambda _, context: broken.append(context))
            server = await loop.create_server(gateway.connection, "127.0.0.1", 0)
            sweep = loop.create_task(gateway.sweep(every_s=0.01))
            stage = Stage(gateway, server.sockets[0].getsockname()[1], mills, endpoints)
            stage.adopt()
            try:
                async with asyncio.timeout(30):
                    await test(stage)
            finally:
                server.close()
                sweep.cancel()
                await gateway.drain(within_s=0.5)
                for mill in mills:
                    await mill.close()
            assert not broken
            assert gateway.held == 0
            assert stage.outstanding() == 0
            assert all(counts.in_flight == 0 for counts in gateway.metrics.models.values())

        def run() -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(scene())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# What passes


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_any_method_passes_with_its_path_query_and_body(method: str) -> None:
    @staged()
    async def scene(stage: Stage) -> None:
        body = b"b" * 100 if method != "GET" else b""
        status, headers, answer = await stage.ask(method, "/services/web/a%2Fb//c?x=1&y=/../z", body=body)
        assert status == 200
        assert json.loads(answer) == {"method": method, "target": "/a%2Fb//c?x=1&y=/../z", "size": len(body)}
        assert headers["x-request-id"].startswith("req_")

    scene()


@staged()
async def test_the_application_learns_who_asks_and_never_with_which_key(stage: Stage) -> None:
    headers = "X-Forwarded-For: 10.1.2.3\r\nX-Forwarded-Proto: https\r\nCookie: a=b\r\nX-Tag: t\r\nTE: trailers\r\n"
    status, _, answer = await stage.ask("GET", "/services/web/", headers)
    head = stage.app.heads[0]
    for kept in (
        b"x-forwarded-for: 10.1.2.3, 127.0.0.1\r\n",
        b"x-forwarded-proto: https\r\n",
        b"x-forwarded-host: localhost\r\n",
        b"x-forwarded-prefix: /services/web\r\n",
        b"cookie: a=b\r\n",
        b"x-tag: t\r\n",
    ):
        assert kept in head
    assert b"tm_user" not in head
    assert b"te:" not in head.lower()
    assert (status, json.loads(answer)["target"]) == (200, "/")
    reader, writer = await stage.connect()
    writer.write(f"GET /services/web/ HTTP/1.1\r\n{AUTH}Connection: close\r\n\r\n".encode())
    assert (await reader.read()).count(b"set-cookie: ") == 2
    writer.close()


@staged()
async def test_bodies_without_content_are_told_apart_and_the_connection_goes_on(stage: Stage) -> None:
    reader, writer = await stage.connect()
    for method, path, status, length in (
        ("HEAD", "/services/web/head", 200, b"content-length: 1000"),
        ("GET", "/services/web/nothing", 204, b"x-kept: 1"),
        ("GET", "/services/web/fails", 500, b"content-length: 3"),
    ):
        writer.write(f"{method} {path} HTTP/1.1\r\n{AUTH}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert parse(head)[0] == status
        assert length in head
        assert b"x-hop" not in head
    assert await reader.readexactly(3) == b"bad"
    writer.close()
    assert stage.gateway.metrics.of("web").errors == 1
    status, headers, _ = await stage.ask("GET", "/services/web?x=1")
    assert (status, headers["location"]) == (308, "/services/web/?x=1")


@staged()
async def test_a_chunked_upload_arrives_as_it_comes_and_its_answer_before_it_is_whole(stage: Stage) -> None:
    reader, writer = await stage.connect()
    writer.write(
        f"POST /services/web/sink HTTP/1.1\r\n{AUTH}Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n".encode()
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    for number in range(1, 4):
        writer.write(b"4;ext=1\r\nabcd\r\n")
        await eventually(lambda number=number: stage.app.got == 4 * number)  # type: ignore[misc]
    writer.write(b"0\r\nTrailer: x\r\n\r\n" + f"GET /services/web/nothing HTTP/1.1\r\n{AUTH}\r\n".encode())
    assert parse(await reader.readuntil(b"\r\n\r\n"))[0] == 200
    assert (await reader.readuntil(b"204 No Content")).startswith(b"{")
    writer.close()
    assert b"expect" not in stage.app.heads[0].lower()


@staged()
async def test_a_response_is_passed_on_as_it_comes(stage: Stage) -> None:
    reader, writer = await stage.connect()
    writer.write(f"GET /services/web/drip HTTP/1.1\r\n{AUTH}\r\n".encode())
    assert await reader.readuntil(b"2\r\nab\r\n")
    stage.app.go_on.set()
    assert await reader.readuntil(b"0\r\n\r\n") == b"2\r\ncd\r\n0\r\n\r\n"
    writer.close()


@staged()
async def test_a_slow_application_holds_the_upload_back_instead_of_filling_memory(stage: Stage) -> None:
    size = 48 * 2**20
    reader, writer = await stage.connect()
    writer.write(f"PUT /services/web/stuck HTTP/1.1\r\n{AUTH}Content-Length: {size}\r\n\r\n".encode())
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(size // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    sending = asyncio.create_task(send())
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.3)
    assert sent < 24 * 2**20, "it is held back"
    assert stage.gateway.held == 0
    stage.app.go_on.set()
    await sending
    assert parse(await reader.readuntil(b"\r\n\r\n"))[0] == 200
    assert stage.app.got == size
    writer.close()


@staged()
async def test_a_slow_reader_holds_the_application_back(stage: Stage) -> None:
    reader, writer = await stage.connect()
    writer.write(f"GET /services/web/flood HTTP/1.1\r\n{AUTH}Connection: close\r\n\r\n".encode())
    before = -1
    while before != stage.app.got or not before:
        before = stage.app.got
        await asyncio.sleep(0.3)
    assert before < 24 * 2**20
    total = 0
    while part := await reader.read(1 << 20):
        total += len(part)
    assert total > 32 * 2**20
    writer.close()


@staged()
async def test_an_answer_that_comes_before_the_upload_is_whole_ends_the_connection(stage: Stage) -> None:
    reader, writer = await stage.connect()
    writer.write(f"POST /services/web/early HTTP/1.1\r\n{AUTH}Content-Length: 1000000\r\n\r\nabc".encode())
    status, headers, body = parse(await reader.read())
    assert (status, headers["connection"], body) == (413, "close", b"much")
    await eventually(lambda: stage.outstanding() == 0)
    stage.app.go_on.set()
    writer.close()


# Who may, and what is refused


@pytest.mark.parametrize(
    ("line", "headers", "status", "code"),
    [
        ("GET /services/none/ HTTP/1.1", AUTH, 404, "service_not_found"),
        ("GET /services/llm/ HTTP/1.1", AUTH, 404, "service_not_found"),
        ("GET /services/web/ HTTP/1.1", "Host: localhost\r\n", 401, "invalid_api_key"),
        (
            "GET /services/web/ HTTP/1.1",
            f"Host: localhost\r\nAuthorization: Bearer {READER}\r\n",
            403,
            "insufficient_scope",
        ),
        (
            "GET /services/web/ HTTP/1.1",
            f"Host: localhost\r\nAuthorization: Bearer {OTHER}\r\n",
            404,
            "service_not_found",
        ),
        ("GET /services/web/ HTTP/1.1", AUTH.replace("localhost", "evil"), 421, "host_not_allowed"),
        ("GET /services/ HTTP/1.1", AUTH, 400, "invalid_target"),
        ("GET /services//x HTTP/1.1", AUTH, 400, "invalid_target"),
        ("GET /services/web/../llm/ HTTP/1.1", AUTH, 400, "invalid_target"),
        ("GET /services/web/%2e%2e/llm/ HTTP/1.1", AUTH, 400, "invalid_target"),
        ("GET /services/web/.%2E%2fllm/ HTTP/1.1", AUTH, 400, "invalid_target"),
        ("GET /services/web/a\\b HTTP/1.1", AUTH, 400, "invalid_target"),
        ("GET /services/web/a#b HTTP/1.1", AUTH, 400, "invalid_target"),
        ("TRACE /services/web/ HTTP/1.1", AUTH, 405, "method_not_allowed"),
        ("POST /services/web/v1/chat/completions HTTP/1.1", AUTH, 403, "use_the_model"),
        ("POST /services/web//v1/%63hat//completions/ HTTP/1.1", AUTH, 403, "use_the_model"),
        ("POST /services/web/V1/Embeddings HTTP/1.1", AUTH, 403, "use_the_model"),
        (
            "POST /services/web/ HTTP/1.1",
            AUTH + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
            400,
            "bad_request",
        ),
        ("POST /services/web/ HTTP/1.1", AUTH + "Content-Length: 4\r\nContent-Length: 5\r\n", 400, "bad_request"),
        ("POST /services/web/ HTTP/1.1", AUTH + "Transfer-Encoding: gzip, chunked\r\n", 400, "bad_request"),
        ("POST /services/web/ HTTP/1.0", AUTH + "Transfer-Encoding: chunked\r\n", 400, "bad_request"),
        ("GET /services/web/ HTTP/1.1", AUTH + "X: a\r\n b\r\n", 400, "bad_request"),
        ("GET /services/web/ HTTP/1.1", AUTH + "X-Tidemill-Wait: soon\r\n", 400, "invalid_wait"),
        ("GET /services/web/socket HTTP/1.1", AUTH + UPGRADE.replace(": 13", ": 8"), 426, "websocket_version"),
        ("GET /services/web/socket HTTP/1.1", AUTH + UPGRADE.replace(KEY, "c2hvcnQ="), 400, "invalid_handshake"),
        (
            "GET /services/web/socket HTTP/1.1",
            AUTH + UPGRADE.replace("Connection: Upgrade\r\n", ""),
            400,
            "invalid_handshake",
        ),
        ("POST /services/web/socket HTTP/1.1", AUTH + UPGRADE, 400, "invalid_handshake"),
        ("GET /services/web/socket HTTP/1.1", AUTH + UPGRADE + "Content-Length: 2\r\n", 400, "invalid_handshake"),
    ],
)
def test_what_is_refused_reaches_no_application(line: str, headers: str, status: int, code: str) -> None:
    @staged()
    async def scene(stage: Stage) -> None:
        ending = "" if "onnection: Upgrade" in headers else "Connection: close\r\n"
        reader, writer = await stage.connect()
        writer.write(f"{line}\r\n{headers}{ending}\r\n".encode() + b"ab" * headers.endswith("Content-Length: 2\r\n"))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        body = await reader.readexactly(int(parse(head)[1]["content-length"]))
        writer.close()
        assert (parse(head)[0], error_of(body)["code"]) == (status, code)
        assert stage.app.heads == []

    scene()


@pytest.mark.parametrize("chunk", [b"0x1\r\na\r\n", b"1\r\nab\r\n0\r\n\r\n", b"1\na\n"])
def test_a_malformed_chunk_ends_the_request_and_the_applications_work_on_it(chunk: bytes) -> None:
    @staged()
    async def scene(stage: Stage) -> None:
        head = f"POST /services/web/sink HTTP/1.1\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n"
        reader, writer = await stage.connect()
        writer.write(head.encode() + b"3\r\nabc\r\n")
        await eventually(lambda: stage.app.got == 3)
        writer.write(chunk)
        assert parse(await reader.read())[0] == 400
        writer.close()
        await asyncio.wait_for(stage.app.left.wait(), 5)
        assert stage.app.bodies == [], "it never looked whole"

    scene()


@staged(limits=Limits(body_s=0.15, passed_rate=10**9, head_s=0.2))
async def test_slow_uploads_are_ended_and_free_their_replica(stage: Stage) -> None:
    reader, writer = await stage.connect()
    writer.write(f"POST /services/web/sink HTTP/1.1\r\n{AUTH}Content-Length: 100000\r\n\r\n".encode())
    for _ in range(200):  # one byte at a time does not help
        writer.write(b"x")
        await asyncio.sleep(0.005)
        if stage.app.left.is_set():
            break
    assert parse(await reader.read())[0] == 408
    await asyncio.wait_for(stage.app.left.wait(), 5)
    assert parse(await stage.raw(f"GET /services/web/ HTTP/1.1\r\n{AUTH}X: ".encode()))[0] == 408
    writer.close()


@staged(limits=Limits(body_s=0.15, passed_rate=10**9))
async def test_an_upload_that_the_application_does_not_take_is_not_the_clients_fault(stage: Stage) -> None:
    reader, writer = await stage.connect()
    writer.write(f"POST /services/web/stuck HTTP/1.1\r\n{AUTH}Content-Length: {16 * 2**20}\r\n\r\n".encode())
    writer.write(b"x" * 16 * 2**20)
    await asyncio.sleep(0.6)
    stage.app.go_on.set()
    assert parse(await reader.readuntil(b"\r\n\r\n"))[0] == 200
    writer.close()


# Who goes away, and what breaks


@pytest.mark.parametrize("phase", ["queued", "uploading", "held back", "before the first byte", "in the response"])
def test_a_client_that_leaves_ends_the_work_in_every_phase(phase: str) -> None:
    @staged()
    async def scene(stage: Stage) -> None:
        path = {"before the first byte": "waits", "in the response": "flood", "held back": "stuck"}.get(phase, "sink")
        size = {"uploading": 100, "held back": 64 * 2**20}.get(phase, 0)
        if phase == "queued":
            stage.endpoints.clear()
            stage.adopt(version=2)
        reader, writer = await stage.connect()
        length = f"Content-Length: {size}\r\n" if size else ""
        writer.write(
            f"POST /services/web/{path} HTTP/1.1\r\n{AUTH}{length}\r\n".encode()
            + b"x" * min(size, 32 * 2**20 if size > 100 else 10)
        )
        counts = stage.gateway.metrics.of("web")
        if phase == "queued":
            await eventually(lambda: counts.waiting == 1)
        else:
            await eventually(lambda: bool(stage.app.heads))
        if phase == "held back":
            await eventually(lambda: any(not one._is_reading for one in stage.gateway.connections))
        if phase == "in the response":
            await reader.readuntil(b"xxxx")
        if phase == "held back":  # else the end waits in the client's own socket, behind what is not taken
            connected = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await eventually(lambda: counts.in_flight == 0, within_s=5)
        assert counts.aborted == 1
        stage.app.go_on.set()
        if phase != "queued":
            await asyncio.wait_for(stage.app.left.wait(), 5)

    scene()


@staged(apps=2)
async def test_what_may_have_been_done_is_not_done_again(stage: Stage) -> None:
    status, _, body = await stage.ask("POST", "/services/web/dies", body=b"x")
    assert (status, error_of(body)["code"]) == (502, "replica_failed")
    assert [len(app.heads) for app in stage.apps] == [1, 0]
    status, _, _ = await stage.ask("PUT", "/services/web/dies", body=b"x")
    assert status == 502
    assert sum(len(app.heads) for app in stage.apps) == 2
    status, _, _ = await stage.ask("GET", "/services/web/dies")
    assert status == 502
    assert sum(len(app.heads) for app in stage.apps) == 4, "what changes nothing is tried once more"


@staged()
async def test_uploads_wait_for_a_replica_with_little_of_them_held(stage: Stage) -> None:
    endpoints = list(stage.endpoints)
    stage.endpoints.clear()
    stage.adopt(version=2)
    size = 8 * 2**20
    reader, writer = await stage.connect()
    writer.write(f"POST /services/web/sink HTTP/1.1\r\n{AUTH}Content-Length: {size}\r\n\r\n".encode() + b"x" * size)
    await eventually(lambda: stage.gateway.held > 0)
    await asyncio.sleep(0.1)
    assert stage.gateway.held < 2**20
    stage.endpoints.extend(endpoints)
    stage.adopt(version=3)
    assert parse(await reader.readuntil(b"\r\n\r\n"))[0] == 200
    assert stage.app.got == size
    writer.close()


@staged(apps=2)
async def test_a_browser_keeps_its_session_by_a_cookie(stage: Stage) -> None:
    stage.adopt(version=2, affinity="session")
    _, headers, _ = await stage.ask("GET", "/services/web/")
    cookie = headers["set-cookie"]
    assert re.fullmatch(r"tidemill_session=[0-9a-f]{32}; Path=/services/web; HttpOnly; SameSite=Lax", cookie)
    before = [len(app.heads) for app in stage.apps]
    for _ in range(6):
        _, headers, _ = await stage.ask("GET", "/services/web/", f"Cookie: {cookie.partition(';')[0]}\r\n")
        assert not headers["set-cookie"].startswith("tidemill")
    assert sorted(len(app.heads) - one for app, one in zip(stage.apps, before, strict=True)) == [0, 6]
    [at] = [i for i, app in enumerate(stage.apps) if len(app.heads) > before[i]]
    assert before[at] == 1, "also the first request, which had none yet"


# WebSockets


async def open_socket(stage: Stage, headers: str = "Sec-WebSocket-Protocol: other, chat\r\n") -> Any:
    reader, writer = await stage.connect()
    writer.write(f"GET /services/web/socket?x=1 HTTP/1.1\r\n{AUTH}{UPGRADE}{headers}\r\n".encode())
    return reader, writer, await reader.readuntil(b"\r\n\r\n")


@staged()
async def test_a_websocket_passes_bytes_both_ways_and_counts_as_under_way(stage: Stage) -> None:
    reader, writer, head = await open_socket(stage)
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    for line in (
        f"sec-websocket-accept: {ACCEPT}",
        "upgrade: websocket",
        "connection: Upgrade",
        "sec-websocket-protocol: chat",
    ):
        assert line.encode() in head
    assert b"connection: Upgrade\r\nupgrade: websocket" in stage.app.heads[0]
    assert b"GET /socket?x=1 " in stage.app.heads[0]
    assert b"tm_user" not in stage.app.heads[0]
    assert await reader.readexactly(5) == b"hello"
    for data in (b"abc", b"\x81\x05\x00\xffGET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 4096):
        writer.write(data)
        assert sorted(await reader.readexactly(len(data))) == sorted(data)
    load = json.loads(stage.gateway.load(with_felt=False))
    assert load["models"]["web"] == {"in_flight": 1, "waiting": 0}
    assert load["replicas"]["web-0"]["in_flight"] == 1
    writer.write(b"bye")
    assert await reader.read() == b""
    writer.close()
    await eventually(lambda: stage.outstanding() == 0)


@staged()
async def test_what_a_websockets_client_said_last_arrives_when_it_leaves(stage: Stage) -> None:
    for abort in (False, True):
        stage.app.left.clear()
        stage.app.got = 0
        reader, writer, _ = await open_socket(stage)
        await reader.readexactly(5)
        writer.write(b"last words")
        if not abort:
            writer.close()
        else:
            await reader.readexactly(10)
            writer.transport.abort()
        await asyncio.wait_for(stage.app.left.wait(), 5)
        assert stage.app.got == 10
        await eventually(lambda: stage.outstanding() == 0)


@staged()
async def test_a_replica_that_changes_protocols_wrongly_or_unasked_is_a_502(stage: Stage) -> None:
    stage.app.accept = "bm90IHRoaXM="
    reader, writer, head = await open_socket(stage)
    assert parse(head)[0] == 502
    assert error_of(await reader.readexactly(int(parse(head)[1]["content-length"])))["code"] == "invalid_handshake"
    writer.close()
    stage.app.accept = ACCEPT
    _, writer, head = await open_socket(stage, "Sec-WebSocket-Protocol: another\r\n")
    assert parse(head)[0] == 502
    writer.close()
    status, _, _ = await stage.ask("GET", "/services/web/socket", f"Sec-WebSocket-Key: {KEY}\r\n")
    assert status == 502
    _, writer, head = await open_socket(stage)
    assert parse(head)[0] == 101
    writer.close()


@staged()
async def test_a_websocket_that_nobody_uses_is_closed_and_one_that_is_used_is_not(stage: Stage) -> None:
    stage.adopt(version=2, timeouts_ms={"between": 300, "whole": 100})
    reader, writer, _ = await open_socket(stage)
    await reader.readexactly(5)
    for _ in range(8):
        writer.write(b"x")
        await reader.readexactly(1)
        await asyncio.sleep(0.06)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()


@staged()
async def test_draining_lets_a_websocket_go_on_for_a_while_and_ends_it_then(stage: Stage) -> None:
    reader, writer, _ = await open_socket(stage)
    await reader.readexactly(5)
    draining = asyncio.create_task(stage.gateway.drain(within_s=0.5))
    await asyncio.sleep(0.1)
    writer.write(b"on")
    assert await reader.readexactly(2) == b"no"
    await draining
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    await asyncio.wait_for(stage.app.left.wait(), 5)
    writer.close()


# Sockets


@staged()
async def test_no_connection_of_the_data_path_waits_for_more_to_send(stage: Stage) -> None:
    reader, writer, _ = await open_socket(stage)
    await reader.readexactly(5)
    await stage.ask("GET", "/services/web/")
    sides = [one._transport for one in stage.gateway.connections]
    sides += [one._transport for idle in stage.gateway.pool._idle.values() for one in idle]
    assert len(sides) >= 2
    passage = next(iter(stage.gateway.table.routes["web"].replicas[0].under_way))  # type: ignore[union-attr]
    sides.append(passage._upstream._transport)  # type: ignore[attr-defined]
    for transport in sides:
        assert transport is not None
        connected = transport.get_extra_info("socket")
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    writer.close()
