"""Requests for the upstream, and a client that costs little: raw asyncio, connections that are used again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import psutil
import uvloop

TEXT: Final = "The tide comes in and the mill wheel turns; when it goes out the wheel turns again. " * 5
_READY_S: Final = 90.0
_REQUEST_S: Final = 30.0
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY: Final = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_END: Final = b"0\r\n\r\n"


def body_of(*, stream: bool = False, pause_ms: int = 0, model: str = "mock", **more: Any) -> bytes:
    """The body of a request; ``more`` is further fields of it."""
    content: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 64}
    if stream:
        content["stream"] = True
    if pause_ms:
        content["seed"] = pause_ms
    return json.dumps(content | more).encode()


def request_of(port: int, key: str, body: bytes, **headers: str) -> bytes:
    """The bytes of a request; ``headers`` with underscores for hyphens."""
    if key:
        headers["Authorization"] = f"Bearer {key}"
    told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{told}Content-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


@dataclass(slots=True)
class Answer:
    """What came back; instants by the monotonic clock, in s. ``status`` 0: the connection broke before the end."""

    began: float
    first: float = 0.0
    ended: float = 0.0
    status: int = 0
    retry_after: int | None = None
    body: bytes = b""

    @property
    def took_s(self) -> float:
        """From the request to the end of its answer."""
        return self.ended - self.began


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._body_at = 0
        self._size: int | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._first: asyncio.Future[None] | None = None
        self.is_open = False

    @classmethod
    async def to(cls, port: int) -> Connection:
        """A new one. Raises: OSError."""
        _, made = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        """The answer, once it is whole or the connection is lost."""
        loop = asyncio.get_running_loop()
        self._buffer.clear()
        self._body_at, self._size = 0, None
        self._done, self._first = loop.create_future(), loop.create_future()
        self._answer = Answer(began=time.monotonic())
        self._transport.write(request)
        return self._done

    async def begun(self) -> None:
        """Return once something of the answer's body came, or nothing will."""
        if self._first is not None:
            await self._first

    @property
    def received(self) -> int:
        """Bytes of the answer under way."""
        return len(self._buffer)

    def leave(self) -> int:
        """Go away, with a reset where something is still to come; when that was (ns)."""
        self.is_open = False
        self._transport.abort()
        return time.monotonic_ns()

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        self._buffer += data
        if not self._body_at:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body_at = end + 4
            head = bytes(self._buffer[:end])
            answer.status = int(head[9:12])
            length, retry = _LENGTH.search(head), _RETRY.search(head)
            self._size = int(length[1]) if length else None
            answer.retry_after = int(retry[1]) if retry else None
            if _CLOSE.search(head):
                self.is_open = False
        if len(self._buffer) > self._body_at and not answer.first:
            answer.first = time.monotonic()
            if self._first is not None and not self._first.done():
                self._first.set_result(None)
        is_whole = (
            self._buffer.endswith(_END) if self._size is None else len(self._buffer) >= self._body_at + self._size
        )
        if is_whole:
            self._over(answer)

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None:
            self._answer.status = 0
            self._over(self._answer)

    def _over(self, answer: Answer) -> None:
        answer.ended, answer.body = time.monotonic(), bytes(self._buffer[self._body_at :])
        self._answer = None
        for one in (self._first, self._done):
            if one is not None and not one.done():
                one.set_result(cast("Any", answer if one is self._done else None))
        if not self.is_open:
            self._transport.close()


class Asker:
    """Asks one port with one key, on connections that are used again."""

    def __init__(self, port: int, key: str) -> None:
        self.port = port
        self.key = key
        self._idle: list[Connection] = []

    def request(self, body: bytes, **headers: str) -> bytes:
        """The bytes of a request to it."""
        return request_of(self.port, self.key, body, **headers)

    async def ask(self, request: bytes) -> Answer:
        """The answer; status 0 when there is none."""
        connection = None
        while self._idle and connection is None:
            connection = self._idle.pop()
            connection = connection if connection.is_open else None
        try:
            connection = connection or await Connection.to(self.port)
        except OSError:
            now = time.monotonic()
            return Answer(began=now, ended=now)
        answer = await connection.ask(request)
        if connection.is_open:
            self._idle.append(connection)
        return answer

    async def figures(self) -> str:
        """The gateway's own figures, as Prometheus text."""
        head = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {self.key}\r\n\r\n"
        return (await self.ask(head.encode())).body.decode()

    async def figure(self, name: str, model: str) -> int:
        """One of them for a model; 0 where there is none."""
        start = f'tidemill_gateway_{name}{{model="{model}"}} '
        lines = [line for line in (await self.figures()).splitlines() if line.startswith(start)]
        return int(float(lines[0].rpartition(" ")[2])) if lines else 0

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().leave()


async def _status(port: int, key: str, body: bytes) -> int:
    asker = Asker(port, key)
    try:
        async with asyncio.timeout(_REQUEST_S):
            return (await asker.ask(asker.request(body))).status
    finally:
        asker.close()


def until_answers(
    port: int, key: str, what: str, log: Path | None = None, *, model: str = "mock", pid: int = 0
) -> None:
    """Return once a request is answered. Raises: RuntimeError when that takes long, or process ``pid`` has ended."""
    until_s = time.monotonic() + _READY_S
    while True:
        with contextlib.suppress(OSError, TimeoutError):
            if uvloop.run(_status(port, key, body_of(model=model))) == 200:
                return
        has_ended = pid and psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        if has_ended or time.monotonic() > until_s:
            raise RuntimeError(f"{what} does not answer: {log.read_text()[-2000:] if log else ''}")
        time.sleep(0.2)
