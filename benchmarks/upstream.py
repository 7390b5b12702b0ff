"""An inference server that costs next to nothing, to measure what stands before it: raw asyncio, no model.

It answers any POST whose JSON has ``"stream": true`` with 20 events, the usage when it was asked for, and ``[DONE]``;
any other with one JSON of 390 bytes; any GET with ``{}``. ``"seed": N`` is the pause between events, or before the one
answer, in ms. Two files tell the truth about it: ``--journal`` gets one line for each request when it is over (its id,
the events that were sent, whether it was whole), ``--gone`` the time at which each connection was lost under an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import time
from pathlib import Path
from typing import IO, Any, cast

import uvloop

EVENTS = 20
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"transfer-encoding:\s*chunked", re.IGNORECASE)
_SEED = re.compile(rb'"seed":\s*(\d+)')
_ID = re.compile(rb"x-request-id:\s*(\S+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream":\s*true')
_USAGE = re.compile(rb'"include_usage":\s*true')


def _whole() -> bytes:
    usage = {"prompt_tokens": 120, "completion_tokens": EVENTS, "total_tokens": 120 + EVENTS}
    message = {"role": "assistant", "content": "tide " * 26}
    body = {
        "id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": "mock",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage,
    }  # fmt: skip
    return json.dumps(body).encode()


def _event(delta: dict[str, Any], **more: Any) -> bytes:
    body = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": "mock"} | more
    body.setdefault("choices", [{"index": 0, "delta": delta, "finish_reason": None}])
    data = b"data: " + json.dumps(body).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


BODY = _whole()
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = _event({"content": "tide "})
USAGE = _event({}, choices=[], usage={"prompt_tokens": 120, "completion_tokens": EVENTS, "total_tokens": 120 + EVENTS})
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Server(asyncio.Protocol):
    """One connection."""

    def __init__(self, journal: IO[str] | None, gone: IO[str] | None) -> None:
        self._journal = journal
        self._gone = gone
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._id = ""
        self._sent = 0
        self._is_answering = False
        self._wants_usage = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def connection_lost(self, _error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._is_answering:
            self._over(is_whole=False)

    def _next(self) -> None:
        while not self._is_answering:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end]
            found = _LENGTH.search(head)
            if _CHUNKED.search(head):
                last = self._buffer.find(b"0\r\n\r\n", end + 4)
                if last < 0:
                    return
                size = last + 5 - (end + 4)
            else:
                size = int(found[1]) if found else 0
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            if head.startswith(b"GET"):
                self._transport.write(EMPTY)
            else:
                self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        name = _ID.search(head)
        self._id = name[1].decode() if name else ""
        pace = _SEED.search(body)
        pause_s = int(pace[1]) / 1000 if pace else 0.0
        self._is_answering, self._sent = True, 0
        if _STREAM.search(body):
            self._wants_usage = bool(_USAGE.search(body))
            if pause_s:
                self._transport.write(HEAD + CHUNK)
                self._sent = 1
                self._timer = asyncio.get_running_loop().call_later(pause_s, self._go_on, pause_s)
                return
            self._transport.write(HEAD)
            for _ in range(EVENTS):  # one write for each, as servers of models do
                self._transport.write(CHUNK)
            self._sent = EVENTS
            self._finish()
        elif pause_s:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._answer_whole)
        else:
            self._answer_whole()

    def _answer_whole(self) -> None:
        self._transport.write(ANSWER)
        self._sent = EVENTS
        self._over(is_whole=True)

    def _go_on(self, pause_s: float) -> None:
        self._transport.write(CHUNK)
        self._sent += 1
        if self._sent == EVENTS:
            self._finish()
        else:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._go_on, pause_s)

    def _finish(self) -> None:
        self._transport.write((USAGE if self._wants_usage else b"") + DONE)
        self._over(is_whole=True)

    def _over(self, *, is_whole: bool) -> None:
        self._is_answering, self._timer = False, None
        if self._journal is not None:
            self._journal.write(f"{self._id} {self._sent} {int(is_whole)}\n")
        if self._gone is not None and not is_whole:
            self._gone.write(f"{self._id} {time.monotonic_ns()}\n")
        if is_whole:
            self._next()


async def serve(port: int, journal: IO[str] | None, gone: IO[str] | None) -> None:
    """Answer for ever."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(journal, gone), "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Answer until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", default="")
    parser.add_argument("--gone", default="")
    given = parser.parse_args()
    with contextlib.ExitStack() as files:
        journal, gone = (
            files.enter_context(Path(name).open("a", buffering=1)) if name else None
            for name in (given.journal, given.gone)
        )
        uvloop.run(serve(given.port, journal, gone))


if __name__ == "__main__":
    main()
