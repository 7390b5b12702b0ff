"""A link between two processes that can be cut, one way or both, and broken: what a network does, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Final

_BLOCK: Final = 64 * 1024


class Link:
    """A TCP proxy on a port of its own, to ``target`` on this machine. Bytes of a cut direction are held back."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._up.set()
        self._down.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    @property
    def url(self) -> str:
        """Where to connect to instead."""
        return f"http://127.0.0.1:{self.port}"

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """Hold back what is sent to the target (up), what it answers (down), or both; nothing is closed."""
        self._loop.call_soon_threadsafe(self._set, not up, not down)

    def heal(self) -> None:
        """Let everything through, as it was held back."""
        self.cut(up=False, down=False)

    def reset(self) -> None:
        """Break every connection."""
        self._loop.call_soon_threadsafe(self._abort)

    def close(self) -> None:
        """End it, and return when nothing of it is left."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _set(self, up: bool, down: bool) -> None:
        for event, is_open in ((self._up, up), (self._down, down)):
            if is_open:
                event.set()
            else:
                event.clear()

    def _abort(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        there_writer: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, asyncio.CancelledError):  # only the end of the link cancels it
            await self._up.wait()
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._open.add(there_writer)
            sending = asyncio.ensure_future(_pump(reader, there_writer, self._up))
            await _pump(there_reader, writer, self._down)
            sending.cancel()
        for one in (writer, there_writer):
            if one is not None:
                self._open.discard(one)
                one.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK):
            await passes.wait()
            writer.write(block)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
