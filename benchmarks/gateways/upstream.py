"""An inference server that costs next to nothing, to measure what stands before it: raw asyncio, no model.

It answers any POST whose JSON has ``"stream": true`` with 20 events, the usage when it was asked for, and ``[DONE]``;
any other with one JSON of 390 bytes; any GET with ``{}``. ``"min_tokens": N`` makes it N events or tokens, ``"seed":
N`` is the pause between events, or before the one answer, in ms. ``--journal`` tells the truth about it: a line ``up``
with the time at which it listens, and one for each request when it is over: its id, the tokens that were sent, whether
it was whole, when it began and when it ended. Times are the monotonic clock's, in ns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import uvloop

EVENTS = 20
PROMPT = 120
"""Tokens of every request, whatever it says."""
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"transfer-encoding:\s*chunked", re.IGNORECASE)
_FLUSH_S = 0.05
_SEED = re.compile(rb'"seed":\s*(\d+)')
_TOKENS = re.compile(rb'"min_tokens":\s*(\d+)')
_ID = re.compile(rb"x-request-id:\s*(\S+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream":\s*true')
_USAGE = re.compile(rb'"include_usage":\s*true')


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": PROMPT, "completion_tokens": tokens, "total_tokens": PROMPT + tokens}


@lru_cache(maxsize=1024)
def _whole(tokens: int) -> bytes:
    message = {"role": "assistant", "content": "tide " * 26}
    body = {
        "id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": "mock",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": _usage(tokens),
    }  # fmt: skip
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data


def _event(delta: dict[str, Any], **more: Any) -> bytes:
    body = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": "mock"} | more
    body.setdefault("choices", [{"index": 0, "delta": delta, "finish_reason": None}])
    data = b"data: " + json.dumps(body).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


@lru_cache(maxsize=1024)
def _usage_event(tokens: int) -> bytes:
    return _event({}, choices=[], usage=_usage(tokens))


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = _event({"content": "tide "})
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Journal:
    """What was done, on its way into a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lines: list[tuple[str, int, bool, int, int]] = []

    def up(self) -> None:
        """It listens now."""
        self._file.write(f"up {time.monotonic_ns()}\n")
        self._file.flush()

    def over(self, name: str, tokens: int, *, is_whole: bool, began_ns: int) -> None:
        """A request is over."""
        self._lines.append((name, tokens, is_whole, began_ns, time.monotonic_ns()))

    def write(self) -> None:
        """Write what there is."""
        lines, self._lines = self._lines, []
        self._file.writelines(
            f"{name or '-'} {sent} {whole:d} {began} {end}\n" for name, sent, whole, began, end in lines
        )
        self._file.flush()

    async def keep(self) -> None:
        """Write for ever."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            self.write()


class Server(asyncio.Protocol):
    """One connection."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._id = ""
        self._sent = 0
        self._tokens = EVENTS
        self._began_ns = 0
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
        tokens = _TOKENS.search(body)
        self._tokens = int(tokens[1]) if tokens else EVENTS
        self._began_ns = time.monotonic_ns()
        self._is_answering, self._sent = True, 0
        if _STREAM.search(body):
            self._wants_usage = bool(_USAGE.search(body))
            if pause_s and self._tokens > 1:
                self._transport.write(HEAD + CHUNK)
                self._sent = 1
                self._timer = asyncio.get_running_loop().call_later(pause_s, self._go_on, pause_s)
                return
            self._transport.write(HEAD)
            for _ in range(self._tokens):  # one write for each, as servers of models do
                self._transport.write(CHUNK)
            self._sent = self._tokens
            self._finish()
        elif pause_s:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._answer_whole)
        else:
            self._answer_whole()

    def _answer_whole(self) -> None:
        self._transport.write(_whole(self._tokens))
        self._sent = self._tokens
        self._over(is_whole=True)

    def _go_on(self, pause_s: float) -> None:
        self._transport.write(CHUNK)
        self._sent += 1
        if self._sent == self._tokens:
            self._finish()
        else:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._go_on, pause_s)

    def _finish(self) -> None:
        self._transport.write((_usage_event(self._tokens) if self._wants_usage else b"") + DONE)
        self._over(is_whole=True)

    def _over(self, *, is_whole: bool) -> None:
        self._is_answering, self._timer = False, None
        if self._journal is not None:
            self._journal.over(self._id, self._sent, is_whole=is_whole, began_ns=self._began_ns)
        if is_whole:
            self._next()


async def serve(port: int, journal: Journal | None) -> None:
    """Answer until told to end."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    await loop.create_server(lambda: Server(journal), "127.0.0.1", port, backlog=4096)
    if journal is None:
        await ending.wait()
        return
    journal.up()
    keeping = loop.create_task(journal.keep())
    await ending.wait()
    keeping.cancel()
    journal.write()


def main() -> None:
    """Answer until told to end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path)
    given = parser.parse_args()
    uvloop.run(serve(given.port, Journal(given.journal) if given.journal else None))


if __name__ == "__main__":
    main()
