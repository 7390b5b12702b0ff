"""Logs of workers, kept by offset: what arrives twice is there once, and nothing is left out in between.

A log is the file ``<job>/<attempt>/<rank>.log``; ``<rank>.complete`` beside it says that no more will come. The
size of the file is the offset from which the sender goes on. Over the cap, a note is written, and what comes
after is acknowledged and not kept: the file grows as a hole, so that offsets stay true and cost no space.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tidemill.errors import Conflict, NotFound, StorageFull, Unavailable

DEFAULT_CAP_BYTES: Final = 1 << 30
MAX_OFFSET: Final = 1 << 50
_OPEN_FILES: Final = 256
_BLOCK: Final = 65_536
_SAFE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)
_LOG: Final = re.compile(r"(\d{1,9})\.(?:log|complete)", re.ASCII)
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))

Key = tuple[str, int, int]
"""Job id, number of the attempt, rank."""


@dataclass(slots=True)
class _Open:
    """An open log. ``users`` counts who holds it; it is closed when nobody does and it was put out."""

    fd: int
    size: int
    complete: bool
    users: int = 0
    dropped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class LogStore:
    """All logs below one folder. Thread-safe; at most ``open_files`` of them are open at a time."""

    def __init__(self, root: Path, *, cap_bytes: int = DEFAULT_CAP_BYTES, open_files: int = _OPEN_FILES) -> None:
        self._root = root
        self._cap = cap_bytes
        self._limit = open_files
        self._note = b"\n[tidemill] this log reached its limit of %d bytes; what came after is not kept\n" % cap_bytes
        self._files: OrderedDict[Key, _Open] = OrderedDict()
        self._lock = threading.Lock()
        self._watchers: tuple[Callable[[str], None], ...] = ()
        root.mkdir(parents=True, exist_ok=True)

    def append(self, job_id: str, attempt: int, rank: int, offset: int, data: bytes) -> int:
        """The offset from which the log goes on, now that everything below it is kept.

        Bytes that it has already are skipped.
        Raises: Conflict with ``data["expected"]`` when bytes are missing before ``offset``; StorageFull, with
        nothing of this call kept.
        """
        key = (job_id, attempt, rank)
        opened = self._take(key, create=True)
        try:
            with opened.lock:
                if offset > opened.size:
                    raise Conflict(
                        f"The log is complete up to {opened.size}, not up to {offset}.",
                        field="offset",
                        value=offset,
                        mend="Go on from the expected offset.",
                        expected=opened.size,
                        offset=opened.size,
                    )
                fresh = memoryview(data)[opened.size - offset :]
                if not fresh:
                    return opened.size
                self._write(opened, fresh)
                size = opened.size
        finally:
            self._give(key, opened)
        self._tell(job_id)
        return size

    def read(self, job_id: str, attempt: int, rank: int, offset: int, limit: int) -> bytes:
        """Up to ``limit`` bytes from ``offset``; none when there are none yet."""
        key = (job_id, attempt, rank)
        try:
            opened = self._take(key, create=False)
        except NotFound:
            return b""
        try:
            end = min(opened.size, self._readable)
            return os.pread(opened.fd, min(limit, end - offset), offset) if offset < end else b""
        finally:
            self._give(key, opened)

    def size(self, job_id: str, attempt: int, rank: int) -> int:
        """The offset from which the sender goes on; zero for a log that is not there."""
        key = (job_id, attempt, rank)
        with self._lock:
            opened = self._files.get(key)
        if opened is not None:
            return opened.size
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return 0

    def end(self, job_id: str, attempt: int, rank: int) -> int:
        """The offset up to which the log can be read: its size, or a little more than the cap."""
        return min(self.size(job_id, attempt, rank), self._readable)

    def tail(self, job_id: str, attempt: int, rank: int, lines: int) -> int:
        """The offset at which the last ``lines`` lines begin; an unfinished line counts as one."""
        end = position = self.end(job_id, attempt, rank)
        if lines <= 0:
            return end
        wanted = lines
        while position > 0:
            start = max(0, position - _BLOCK)
            block = self.read(job_id, attempt, rank, start, position - start)
            stop = len(block) - 1 if position == end and block.endswith(b"\n") else len(block)
            while (found := block.rfind(b"\n", 0, stop)) >= 0:
                wanted -= 1
                if not wanted:
                    return start + found + 1
                stop = found
            position = start
        return 0

    def ranks(self, job_id: str) -> list[tuple[int, int]]:
        """(attempt, rank) of every log that a job has, in that order."""
        found: set[tuple[int, int]] = set()
        folder = self._root / _checked(job_id)
        try:
            for attempt in _names(folder):
                for name in _names(folder / attempt) if attempt.isdecimal() else ():
                    if match := _LOG.fullmatch(name):
                        found.add((int(attempt), int(match[1])))
        except FileNotFoundError:
            return []
        return sorted(found)

    def close(self, job_id: str, attempt: int, rank: int) -> None:
        """Record that no more will come. Raises: StorageFull."""
        key = (job_id, attempt, rank)
        opened = self._take(key, create=True)
        try:
            if not opened.complete:
                try:
                    self._path(key).with_suffix(".complete").touch()
                except OSError as error:
                    raise _broken(error) from error
                opened.complete = True
        finally:
            self._give(key, opened)
        self._tell(job_id)

    def is_complete(self, job_id: str, attempt: int, rank: int) -> bool:
        """Whether the sender said that no more will come."""
        key = (job_id, attempt, rank)
        with self._lock:
            opened = self._files.get(key)
        return opened.complete if opened is not None else self._path(key).with_suffix(".complete").exists()

    def watch(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Have ``callback`` called with the job's id after each addition, from any thread; returns how to stop it."""
        with self._lock:
            self._watchers = (*self._watchers, callback)

        def unwatch() -> None:
            with self._lock:
                self._watchers = tuple(other for other in self._watchers if other is not callback)

        return unwatch

    def shut(self) -> None:
        """Close every file; harmless twice."""
        with self._lock:
            for opened in self._files.values():
                opened.dropped = True
                if not opened.users:
                    os.close(opened.fd)
            self._files.clear()

    @property
    def _readable(self) -> int:
        return self._cap + len(self._note)

    def _tell(self, job_id: str) -> None:
        for watcher in self._watchers:
            watcher(job_id)

    def _write(self, opened: _Open, fresh: memoryview) -> None:
        """Keep all of it, or nothing: what was begun is cut off again."""
        after = opened.size + len(fresh)
        try:
            if after > MAX_OFFSET:
                raise OSError(errno.EFBIG, "the log is too long")
            kept = fresh[: max(0, self._cap - opened.size)]
            _write_all(opened.fd, kept, opened.size)
            if after > self._cap >= opened.size:
                _write_all(opened.fd, memoryview(self._note), self._cap)
            if after > self._cap:
                os.ftruncate(opened.fd, after)
        except OSError as error:
            os.ftruncate(opened.fd, opened.size)
            raise _broken(error) from error
        opened.size = after

    def _path(self, key: Key) -> Path:
        job_id, attempt, rank = key
        return self._root / _checked(job_id) / str(int(attempt)) / f"{int(rank)}.log"

    def _take(self, key: Key, *, create: bool) -> _Open:
        """The open log, held until it is given back. Raises: NotFound when it is not there and not to be made."""
        with self._lock:
            opened = self._files.get(key)
            if opened is None:
                opened = self._open(key, create=create)
                self._files[key] = opened
            self._files.move_to_end(key)
            opened.users += 1
            for other in list(self._files):
                if len(self._files) <= self._limit:
                    break
                if not self._files[other].users:
                    os.close(self._files.pop(other).fd)
            return opened

    def _give(self, key: Key, opened: _Open) -> None:
        with self._lock:
            opened.users -= 1
            if opened.dropped and not opened.users:
                os.close(opened.fd)
            elif not opened.dropped and len(self._files) > self._limit and not opened.users:
                os.close(self._files.pop(key).fd)

    def _open(self, key: Key, *, create: bool) -> _Open:
        path = self._path(key)
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError as error:
            raise NotFound("There is no such log.", field="rank", value=key[2]) from error
        except OSError as error:
            raise _broken(error) from error
        return _Open(fd, os.fstat(fd).st_size, path.with_suffix(".complete").exists())


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        offset += written
        data = data[written:]


def _broken(error: OSError) -> StorageFull | Unavailable:
    if error.errno in _FULL:
        return StorageFull("There is no space left for logs.", mend="Free space in the control plane's home folder.")
    return Unavailable(f"Logs cannot be written: {error.strerror}.")


def _checked(job_id: str) -> str:
    if not _SAFE.fullmatch(job_id):
        raise NotFound("There is no such job.", field="job", value=job_id)
    return job_id
