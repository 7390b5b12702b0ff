"""Usage on its way to the ledger: written to this machine's disk first, then handed to the control plane.

A worker of the gateway appends to files of its own. A stream is entered when it begins, its count of tokens while it
goes on, and every answer when it is settled; each at the next write, ``WRITE_EVERY_S`` apart. What was settled is
handed on from the files, in order, again until it is taken; the ids make that harmless. So a control plane that is away
costs disk and no memory, and a worker that was killed has lost at most what happened since its last write: the next
worker finds the files, because nobody holds their locks any more, and settles the streams that were open by what was
counted.

Lines: ``o`` and a usage when a stream began, ``n`` and counts by id, ``s`` and a usage that is settled, each as JSON. A
line without its end is not there. A file that is full is followed by another, which begins with what is open then, so
that a file can go as soon as all that is settled in it was taken, those before it gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from tidemill.gateway.metering import Usage

WRITE_EVERY_S: Final = 0.2
_LOOK_EVERY_S: Final = 2.0
_FULL: Final = 4 * 1024 * 1024
_BATCH: Final = 512 * 1024
_MOST_HELD: Final = 64 * 1024 * 1024
"""Bytes that wait for a disk that takes none."""
_NAME: Final = re.compile(r"([0-9a-f]+)-([0-9]{8})\.usage")
_encode: Final = msgspec.json.Encoder().encode
_log = logging.getLogger("tidemill.gateway")


class Refused(Exception):
    """The control plane will never take that."""


Send = Callable[[bytes], Awaitable[None]]
"""Hands usages on, in JSON. Raises: OSError when it is to be tried again, Refused when it is not."""


class Entry(Protocol):
    """What can be entered: a structure that JSON can hold, with an id of its own."""

    id: str


class _Entered(msgspec.Struct):
    id: str


class _Segment:
    """One file: how much of it is written, and how much of that was handed on."""

    def __init__(self, path: Path, descriptor: int, *, size: int = 0) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = size
        self.taken = 0

    def drop(self) -> None:
        """Delete it: nobody needs it any more."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


class Books:
    """The usage of one worker, kept in ``folder``; or other things that are entered once each, called ``what``."""

    def __init__(self, folder: Path, *, what: str = "usages") -> None:
        folder.mkdir(mode=0o700, exist_ok=True, parents=True)
        self._folder = folder
        self._what = what.encode()
        self._worker = os.urandom(8).hex()
        self._numbers = itertools.count(1)
        self._files = itertools.count(1)
        self._open: dict[str, Usage] = {}
        self._fresh: set[str] = set()
        """Open, and not written."""
        self._counts: dict[str, int] = {}
        """What was written last of each open one."""
        self._settled: list[bytes] = []
        self._held = b""
        self._segments: deque[_Segment] = deque()
        self._own: _Segment | None = None
        self.lost = 0
        """Usages that no disk took."""
        self.on_entered: Callable[[list[Usage]], None] | None = None
        """Is told of usages of this worker that are in the ledger now."""

    def next_id(self) -> str:
        """An id that no other usage of any worker has."""
        return f"{self._worker}-{next(self._numbers):x}"

    def open(self, usage: Usage) -> None:
        """A stream began; its ``completion_tokens`` are looked at until it is settled."""
        self._open[usage.id] = usage
        self._fresh.add(usage.id)

    def settle(self, usage: Entry) -> None:
        """It is over, and this is what it took."""
        if self._open.pop(usage.id, None) is not None:
            self._fresh.discard(usage.id)
            self._counts.pop(usage.id, None)
        self._settled.append(b"s %b\n" % _encode(usage))

    async def keep(self, *, every_s: float = WRITE_EVERY_S) -> None:
        """Write for ever."""
        while True:
            await asyncio.sleep(every_s)
            if self.write() and self._own is not None:
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(os.fdatasync, self._own.descriptor)

    def write(self) -> bool:
        """Whether there was anything to write; it is with the system now, unless the disk took nothing."""
        lines = self._lines()
        if not lines:
            return False
        try:
            segment = self._segment()
            lines = self._held + lines
            self._held = b""
            done = lines.rfind(b"\n", 0, os.pwrite(segment.descriptor, lines, segment.size)) + 1
            segment.size += done
            if done < len(lines):
                self._hold(lines[done:])
        except OSError as error:
            _log.error("usage cannot be written and waits: %s", error)
            self._hold(lines)
        return True

    async def deliver(self, send: Send, *, every_s: float = 0.3) -> None:
        """Hand on what is settled, for ever, also what dead workers left."""
        loop = asyncio.get_running_loop()
        looked_at, pause_s, has_failed = float("-inf"), every_s, False
        while True:
            if loop.time() - looked_at >= _LOOK_EVERY_S:
                looked_at = loop.time()
                await asyncio.to_thread(self.adopt)
            try:
                while await self.hand_on(send):
                    pass
            except OSError as error:
                if not has_failed:
                    _log.warning("usage waits on disk, the control plane does not take it: %s", error)
                has_failed, pause_s = True, min(2.0, pause_s * 2)
            else:
                has_failed, pause_s = False, every_s
            await asyncio.sleep(pause_s)

    async def hand_on(self, send: Send) -> bool:
        """Whether some of what is settled was taken. Raises: OSError when it was not."""
        while self._segments:
            segment = self._segments[0]
            if segment.taken < segment.size:
                break
            if segment is self._own:
                if self._open or segment.size < _BATCH:
                    return False
                self._own = None
            self._segments.popleft().drop()
        if not self._segments:
            return False
        raw = os.pread(segment.descriptor, min(_BATCH, segment.size - segment.taken), segment.taken)
        end = raw.rfind(b"\n") + 1
        if not end:  # cannot be: lines are far shorter
            segment.taken = segment.size
            return True
        settled = [line[2:] for line in raw[:end].split(b"\n") if line.startswith(b"s ")]
        if settled:
            try:
                await send(b'{"%b":[%b]}' % (self._what, b",".join(settled)))
            except Refused as error:
                what = self._what.decode()
                _log.error("the control plane refuses %d %s, which are kept apart: %s", len(settled), what, error)
                with (self._folder / "refused.json").open("ab") as file:
                    file.write(b"\n".join(settled) + b"\n")
            self._tell_entered(settled)
        segment.taken += end
        return True

    def _tell_entered(self, settled: list[bytes]) -> None:
        if self.on_entered is not None:
            own = b'{"id":"%b-' % self._worker.encode()
            self.on_entered([msgspec.json.decode(one, type=Usage) for one in settled if one.startswith(own)])

    def adopt(self) -> int:
        """How many streams of dead workers were settled by what was counted; their files are handed on now."""
        groups: dict[str, list[Path]] = {}
        for path in sorted(self._folder.iterdir()):
            name = _NAME.fullmatch(path.name)
            if name and name[1] != self._worker:
                groups.setdefault(name[1], []).append(path)
        mine = {segment.path for segment in self._segments}
        return sum(self._adopt([path for path in paths if path not in mine]) for paths in groups.values())

    def close(self) -> None:
        """Write what is left; the files stay for the next worker."""
        for usage in list(self._open.values()):
            self.settle(usage)
        self.write()
        for segment in self._segments:
            os.close(segment.descriptor)
        self._segments.clear()
        self._own = None

    # Inside

    def _lines(self) -> bytes:
        """What happened since the last write."""
        opened = [b"o " + msgspec.json.encode(self._open[one]) + b"\n" for one in self._fresh]
        changed = {}
        for one, usage in self._open.items():
            count = usage.completion_tokens
            if one not in self._fresh and self._counts.get(one) != count:
                changed[one] = count
            self._counts[one] = count
        self._fresh.clear()
        counts = [b"n " + msgspec.json.encode(changed) + b"\n"] if changed else []
        settled, self._settled = self._settled, []
        return b"".join([*opened, *counts, *settled])

    def _hold(self, lines: bytes) -> None:
        self._held = lines
        while len(self._held) > _MOST_HELD:
            _, _, self._held = self._held.partition(b"\n")
            self.lost += 1

    def _segment(self) -> _Segment:
        """The file that is written to: the last one, or another with what is open, when that is full."""
        own = self._own
        if own is not None and own.size < _FULL:
            return own
        path = self._folder / f"{self._worker}-{next(self._files):08d}.usage"
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(path)
        segment = _Segment(path, descriptor)
        if own is not None:
            carried = b"".join(b"o " + msgspec.json.encode(usage) + b"\n" for usage in self._open.values())
            segment.size = os.pwrite(descriptor, carried, 0)
        self._segments.append(segment)
        self._own = segment
        return segment

    def _adopt(self, paths: list[Path]) -> int:
        """The same for one worker's files, unless it lives."""
        taken: list[_Segment] = []
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                for segment in taken:
                    os.close(segment.descriptor)
                return 0
            taken.append(_Segment(path, descriptor, size=os.fstat(descriptor).st_size))
        if not taken:
            return 0
        left: dict[str, Usage] = {}
        for segment in taken:
            segment.size = _read_into(left, segment)
        last = taken[-1]
        lines = b"".join(b"s " + msgspec.json.encode(usage) + b"\n" for usage in left.values())
        last.size += os.pwrite(last.descriptor, lines, last.size)
        os.ftruncate(last.descriptor, last.size)
        os.fdatasync(last.descriptor)
        self._segments.extendleft(reversed(taken))
        if left:
            _log.warning("%d streams of a gateway that ended were settled by what was counted", len(left))
        return len(left)


def _read_into(left: dict[str, Usage], segment: _Segment) -> int:
    """The bytes of a file that are whole lines; ``left`` is what is open after them, as far as it was counted."""
    raw = os.pread(segment.descriptor, segment.size, 0)
    end = raw.rfind(b"\n") + 1
    for line in raw[:end].splitlines():
        kind, body = line[:2], line[2:]
        try:
            if kind == b"o ":
                usage = msgspec.json.decode(body, type=Usage)
                left[usage.id] = usage
            elif kind == b"n ":
                for one, count in msgspec.json.decode(body, type=dict[str, int]).items():
                    if one in left:
                        left[one].completion_tokens = count
            elif kind == b"s ":
                left.pop(msgspec.json.decode(body, type=_Entered).id, None)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            _log.error("a line of %s is not read: %s", segment.path.name, error)
    return end
