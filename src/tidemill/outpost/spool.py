"""What an outpost has to tell by itself, kept on its disk until the control plane has taken it.

Each fact is a line of a file and has a number; that everything up to a number was taken is a line too. A line is on the
disk before its fact is told. Numbers are instants in ns that only grow, so they go on growing where the file is lost.
A line that a crash cut off is left out. Energy counters are cumulative: where they take too much room, the last of each
machine says what those before it did, which go. Nothing else does. On a full disk, what is new waits in memory.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tidemill.errors import Conflict
from tidemill.model.events import Brought, DeviceFailed, DeviceRecovered, NodeMarked, Sampled
from tidemill.model.ids import NodeId
from tidemill.runner.folders import sync_folder

log = logging.getLogger(__name__)
CAP_BYTES: Final = 64 << 20
_USED_BYTES: Final = 1 << 20
"""So much may have been taken of what is in the file, before it is written anew without that."""
_MOST_UNWRITTEN: Final = 10_000
"""Facts that wait in memory for room on the disk, before counters are thinned out."""
_KINDS: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    kind.__name__: msgspec.json.Decoder(kind) for kind in (Sampled, DeviceFailed, DeviceRecovered, NodeMarked)
}
_LINES: Final = msgspec.json.Encoder()


class _Line(msgspec.Struct, omit_defaults=True):
    """A fact, or without a kind: that everything up to ``number`` was taken."""

    number: int
    kind: str = ""
    fact: msgspec.Raw = msgspec.Raw(b"null")


_READ: Final = msgspec.json.Decoder(_Line)


@dataclass(slots=True)
class Kept:
    """A fact that waits to be taken. ``is_written``: it is on the disk."""

    number: int
    fact: Brought
    is_written: bool = False


class Spool:
    """The facts in the file ``path``, which this process alone has. ``clock`` gives ns. Thread-safe.

    Raises: Conflict when another process has it, OSError.
    """

    def __init__(self, path: Path, *, clock: Callable[[], int] = time.time_ns, cap_bytes: int = CAP_BYTES) -> None:
        self._path = path
        self._clock = clock
        self._cap = cap_bytes
        self._lock = threading.Lock()
        self._waiting: deque[Kept] = deque()
        self._is_full = False
        self._fd = _open(path)
        self._last = self._size = 0
        self._read()
        self._found = self._last
        """The highest number that was there; what is noted from here on has a higher one."""

    def __len__(self) -> int:
        """How many facts wait to be taken."""
        return len(self._waiting)

    def append(self, facts: Iterable[Brought]) -> None:
        """Keep these: they are on the disk now, or in memory while that is full."""
        with self._lock:
            for fact in facts:
                self._last = max(self._last + 1, self._clock())
                self._waiting.append(Kept(self._last, fact))
            self._write_waiting()
            if self._size > self._cap or sum(not one.is_written for one in self._waiting) > _MOST_UNWRITTEN:
                self._thin_out()

    def first(self, limit: int) -> list[Kept]:
        """The oldest of those that wait, at most so many."""
        with self._lock:
            return [one for one, _ in zip(self._waiting, range(limit), strict=False)]

    def taken(self, number: int) -> None:
        """Everything up to that number was taken, and is not kept any more.

        When it is higher than any that was ever given, this file is older than what was told from it, or was lost and
        the clock went back: then what was noted since it was opened gets higher numbers, for it was passed over.
        """
        with self._lock:
            passed_over = [one for one in self._waiting if one.number > self._found] if number > self._last else []
            before = len(self._waiting)
            while self._waiting and self._waiting[0].number <= number:
                self._waiting.popleft()
            self._last = max(self._last, number)
            for one in passed_over:
                self._last += 1
                self._waiting.append(Kept(self._last, one.fact))
            if passed_over:
                log.warning("%d facts have new numbers, because the control plane knew higher ones", len(passed_over))
                self._write_anew()
            elif len(self._waiting) < before:
                self._write(_LINES.encode(_Line(number)) + b"\n", is_synced=False)
                if self._size > _USED_BYTES and not self._waiting:
                    self._write_anew()

    def drop(self, one: Kept) -> None:
        """Forget a fact that will never be taken."""
        with self._lock:
            self._waiting.remove(one)
            self._write_anew()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    # ------------------------------------------------------------------ inside

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: its last line was cut off, and is left out", self._path)
            os.ftruncate(self._fd, whole)
        self._size = whole
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                read = _READ.decode(line)
                fact = _KINDS[read.kind].decode(read.fact) if read.kind else None
            except (msgspec.MsgspecError, KeyError) as error:
                log.error("%s: line %d is damaged and left out: %s", self._path, number, error)
                continue
            self._last = max(self._last, read.number)
            if fact is not None:
                self._waiting.append(Kept(read.number, fact, is_written=True))
            while fact is None and self._waiting and self._waiting[0].number <= read.number:
                self._waiting.popleft()

    def _write_waiting(self) -> None:
        new = [one for one in self._waiting if not one.is_written]
        if new and self._write(b"".join(map(_line, new)), is_synced=True):
            for one in new:
                one.is_written = True

    def _write(self, content: bytes, *, is_synced: bool) -> bool:
        """Whether it is in the file; when not, nothing of it is."""
        try:
            at, rest = self._size, memoryview(content)
            while rest:
                done = os.pwrite(self._fd, rest, at)
                at, rest = at + done, rest[done:]
            if is_synced:
                os.fdatasync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            if not self._is_full:
                log.error("%s cannot be written, what is new waits in memory: %s", self._path, error.strerror)
            self._is_full = True
            return False
        if self._is_full:
            log.warning("%s can be written again", self._path)
        self._is_full = False
        self._size = at
        return True

    def _thin_out(self) -> None:
        """Drop counters that later ones of the same machine include, and write the file anew."""
        newest: dict[NodeId, int] = {one.fact.node_id: one.number for one in self._waiting if _is_counter(one)}
        before = len(self._waiting)
        self._waiting = deque(
            one for one in self._waiting if not _is_counter(one) or newest[one.fact.node_id] == one.number
        )
        log.warning("%s: %d readings of counters go, later ones include them", self._path, before - len(self._waiting))
        self._write_anew()

    def _write_anew(self) -> None:
        """The file with nothing in it but what waits, in one step; as it was when there is no room for that."""
        draft = self._path.with_suffix(".new")
        content = _LINES.encode(_Line(min([self._last, *(one.number - 1 for one in self._waiting)]))) + b"\n"
        content += b"".join(map(_line, self._waiting))
        try:
            descriptor = _open(draft)
        except OSError as error:
            log.error("%s cannot be written anew: %s", self._path, error.strerror)
            return
        try:
            os.ftruncate(descriptor, 0)
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
            draft.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            log.error("%s cannot be written anew: %s", self._path, error.strerror)
            return
        os.close(self._fd)
        self._fd, self._size = descriptor, len(content)
        for one in self._waiting:
            one.is_written = True


def _open(path: Path) -> int:
    """A descriptor of a file that this process alone has. Raises: Conflict, OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(
            "Another process keeps there what this machine has to tell.",
            field="home",
            value=str(path),
            mend="See that only one outpost runs in that home.",
        ) from None
    return descriptor


def _line(one: Kept) -> bytes:
    fact = msgspec.Raw(_LINES.encode(one.fact))
    return _LINES.encode(_Line(one.number, type(one.fact).__name__, fact)) + b"\n"


def _is_counter(one: Kept) -> bool:
    return isinstance(one.fact, Sampled)
