"""Copies of data sets and models on this machine: each file once, by its SHA-256; right, or not there at all.

For each project, because who knows the SHA-256 of another's file is not to get it that way, below ``root/<project>``::

    files/<first two digits>/<sha256>   a file, read-only, whole and right
    parts/<sha256>                      one that is being fetched, or that a fetch left: it goes on where that ended
    sets/<manifest>/lock                shared by those who use a set, exclusive to who fetches or removes it
    sets/<manifest>/manifest            what is in it
    sets/<manifest>/tree/               its files at their paths, as hard links; it is there once it is complete
    sets/<manifest>/staging/            the same while it is not

Nothing is remembered elsewhere, so whatever is killed when, the next one finds out from the files and goes on. Locks
are the kernel's: they end with the process that holds them, and a worker ends with its runner.

Removed is what was not used for longest, whole sets at a time, and never one that is used or fetched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from tidemill.model.storage import DataFile, Manifest, read_manifest
from tidemill.runner.client import Closing, Unreachable
from tidemill.runner.prepare import SetupFailed

THREADS: Final = 8
_PIECE: Final = 1 << 20
_MARGIN: Final = 64 << 20
"""Octets of the disk that are never filled."""
_WAIT_S: Final = 0.05
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Source(Protocol):
    """Where files come from; each thread has its own. Raises, from ``open``: Unreachable, SetupFailed."""

    def open(self, file: DataFile, offset: int) -> BinaryIO:
        """What comes after ``offset``. Reading it may raise OSError, and then it is opened again."""

    def rest(self, until: threading.Event) -> bool:
        """Whether ``until`` was set while waiting a little, longer after each failure in a row."""


@dataclass(frozen=True, slots=True)
class Held:
    """A complete data set, which stays for as long as ``lock`` is open."""

    tree: Path
    lock: int

    def release(self) -> None:
        """It is not used any more."""
        os.close(self.lock)


class DataCache:
    """The copies below ``root``, of at most ``limit_bytes`` together (0: as much as the disk has). Many processes may
    use it at the same time."""

    def __init__(self, root: Path, *, limit_bytes: int = 0, margin_bytes: int = _MARGIN) -> None:
        self._root = root
        self._limit = limit_bytes
        self._margin = margin_bytes

    def hold(
        self, project: str, name: str, manifest: Manifest, source: Callable[[], Source], *, stopping: threading.Event
    ) -> Held:
        """The data set, fetched if it is not here; if somebody else fetches it, after waiting for that.

        ``name`` is what it is called when something is wrong, such as ``the data set images``.
        Raises: SetupFailed, Closing when ``stopping``, OSError.
        """
        place = _Place(self._root / project, manifest.digest)
        while True:
            lock = place.lock(fcntl.LOCK_SH, stopping)
            if place.tree.is_dir():
                _touch(lock)
                return Held(place.tree, lock)
            os.close(lock)
            try:
                lock = place.lock(fcntl.LOCK_EX, stopping, unless=place.tree.is_dir)
            except _NotNeeded:
                continue  # somebody fetched it, and may use it for as long as a job runs
            try:
                if not place.tree.is_dir():
                    self._fetch(place, name, manifest, source, stopping)
                _touch(lock)
            finally:
                os.close(lock)

    def present(self) -> tuple[str, ...]:
        """The complete data sets, as ``project/manifest``, sorted."""
        return tuple(sorted(f"{place.project.name}/{place.digest}" for place in self._places() if place.tree.is_dir()))

    # ------------------------------------------------------------------ fetching

    def _fetch(
        self,
        place: _Place,
        name: str,
        manifest: Manifest,
        source: Callable[[], Source],
        stopping: threading.Event,
    ) -> None:
        _write(place.manifest, manifest.content())
        self._make_room(place, name, manifest, stopping)
        for folder in (place.files, place.parts, place.staging):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._fetch_all(place, name, manifest, source, stopping)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            place.discard_staging()
            raise _no_space(name, manifest.size, place.project) from error
        for folder in _folders(place.staging):
            folder.chmod(0o555)
        place.staging.chmod(0o755)  # a folder that is renamed has to be writable
        place.staging.rename(place.tree)
        place.tree.chmod(0o555)

    def _fetch_all(
        self,
        place: _Place,
        name: str,
        manifest: Manifest,
        source: Callable[[], Source],
        stopping: threading.Event,
    ) -> None:
        own = threading.local()
        failed = threading.Event()

        def work(file: DataFile) -> None:
            if stopping.is_set() or failed.is_set():
                raise Closing
            if not hasattr(own, "source"):
                own.source = source()
            _fetch_file(place, file, name, own.source, stopping)
            _link(place.file(file.digest), place.staging / file.path)

        with ThreadPoolExecutor(THREADS, "data") as threads:
            running = set()
            for file in manifest.files:
                running.add(threads.submit(work, file))
                if len(running) >= 4 * THREADS:
                    done, running = wait(running, return_when="FIRST_COMPLETED")
                    if any(one.exception() for one in done):
                        running |= done
                        break
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            if any(one.exception() for one in done):
                failed.set()
        errors = [error for one in running if (error := one.exception()) is not None]
        errors.sort(key=lambda error: isinstance(error, Closing))
        if errors:
            raise errors[0]

    # ------------------------------------------------------------------ room

    def _make_room(self, wanted: _Place, name: str, manifest: Manifest, stopping: threading.Event) -> None:
        """Remove what nobody uses until the data set has room. Raises: SetupFailed when that is not enough."""
        if self._limit and manifest.size > self._limit:
            raise SetupFailed(
                f"{name} has {manifest.size:,} bytes, and copies on this machine may have {self._limit:,} "
                "together; raise the setting data_cache, or mount it",
                cause="storage_full",
            )
        lock = _locked(self._root / ".lock", fcntl.LOCK_EX, stopping)
        try:
            was_swept = False
            while True:
                known = {place: place.sizes() for place in self._places()}
                used = self._used(known)
                missing = sum(file.size for file in manifest.files if not wanted.file(file.digest).exists())
                free = shutil.disk_usage(self._root).free - self._margin
                if (not self._limit or used <= self._limit) and missing <= free:
                    return
                if was_swept and not self._remove_oldest(known, wanted):
                    break
                was_swept = True
                self._sweep()
            raise _no_space(name, manifest.size, self._root)
        finally:
            os.close(lock)

    @staticmethod
    def _used(known: Mapping[_Place, Mapping[str, int]]) -> int:
        """The bytes of all sets, those that are being fetched in full; a file in two sets of a project counts once."""
        by_project: dict[Path, dict[str, int]] = {}
        for place, sizes in known.items():
            by_project.setdefault(place.project, {}).update(sizes)
        return sum(sum(sizes.values()) for sizes in by_project.values())

    def _remove_oldest(self, known: Mapping[_Place, Mapping[str, int]], wanted: _Place) -> bool:
        """Whether there was a set that nobody uses; it is gone."""
        for place in sorted(known, key=_Place.used_ns):
            if place == wanted:
                continue
            with contextlib.suppress(OSError):
                lock = os.open(place.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    doomed = place.project / "doomed" / secrets.token_hex(8)
                    doomed.parent.mkdir(exist_ok=True, mode=0o700)
                    place.folder.rename(doomed)
                finally:
                    os.close(lock)
                return True
        return False

    def _sweep(self) -> None:
        """Remove what is in no set: files, parts, and the sets that were given up."""
        known = {place: place.sizes() for place in self._places()}
        for project in (path for path in self._root.iterdir() if path.is_dir()):
            for doomed in _entries(project / "doomed"):
                _remove_tree(doomed)
            needed = {digest for place, sizes in known.items() if place.project == project for digest in sizes}
            for folder in (*_entries(project / "files"), project / "parts"):
                for file in _entries(folder):
                    if file.name not in needed:
                        file.unlink(missing_ok=True)

    def _places(self) -> Iterator[_Place]:
        for project in _entries(self._root):
            if project.is_dir():
                for folder in _entries(project / "sets"):
                    yield _Place(project, folder.name)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a data set of a project is, or will be."""

    project: Path
    digest: str

    @property
    def folder(self) -> Path:
        return self.project / "sets" / self.digest

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest"

    @property
    def files(self) -> Path:
        return self.project / "files"

    @property
    def parts(self) -> Path:
        return self.project / "parts"

    def file(self, digest: str) -> Path:
        """Where a file with that content is, or will be."""
        return self.files / digest[:2] / digest

    def lock(self, kind: int, stopping: threading.Event, *, unless: Callable[[], bool] | None = None) -> int:
        """An open descriptor with the set's lock, of the folder that is there now. Raises: as ``_locked``."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                held = _locked(self.folder / "lock", kind, stopping, unless=unless)
                with contextlib.suppress(FileNotFoundError):
                    if _is_still(self.folder / "lock", held):
                        return held
                os.close(held)  # it was removed while we waited

    def sizes(self) -> Mapping[str, int]:
        """The size of each of its files by SHA-256, as far as it is known what is in it."""
        try:
            return {file.digest: file.size for file in read_manifest(self.manifest.read_bytes()).files}
        except (OSError, ValueError):
            return {}

    def used_ns(self) -> int:
        """When it was last used."""
        try:
            return (self.folder / "lock").stat().st_mtime_ns
        except OSError:
            return 0

    def discard_staging(self) -> None:
        """Give up what was fetched so far, so that others have the room."""
        _remove_tree(self.staging)
        for file in read_manifest(self.manifest.read_bytes()).files:
            with contextlib.suppress(OSError):  # another set may be fetching the same file
                part = os.open(self.parts / file.digest, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    (self.parts / file.digest).unlink()
                finally:
                    os.close(part)
            whole = self.file(file.digest)
            with contextlib.suppress(OSError):
                if whole.stat().st_nlink == 1:
                    whole.unlink()
        self.manifest.unlink(missing_ok=True)


def _fetch_file(place: _Place, file: DataFile, name: str, source: Source, stopping: threading.Event) -> None:
    """Have that file in ``files``. Raises: SetupFailed when what comes is not what was announced, Closing, OSError."""
    target, part = place.file(file.digest), place.parts / file.digest
    tries = 0
    while not target.exists():
        held = _locked(part, fcntl.LOCK_EX, stopping)
        try:
            if target.exists():
                return
            if not _is_still(part, held):
                continue
            if _complete(held, file, source, stopping):
                os.fsync(held)
                os.fchmod(held, 0o444)
                target.parent.mkdir(exist_ok=True, mode=0o700)
                part.rename(target)
                return
            os.ftruncate(held, 0)
            tries += 1
        finally:
            os.close(held)
        if tries > 1:
            raise SetupFailed(
                f"{file.path} of {name} is not what it was when that was added; have its files looked at, and add its "
                "next version",
                cause="setup_failed",
            )


def _complete(part: int, file: DataFile, source: Source, stopping: threading.Event) -> bool:
    """Whether the part has become the file, after fetching what was missing of it."""
    seen = hashlib.sha256()
    have = 0
    if os.fstat(part).st_size > file.size:
        os.ftruncate(part, 0)
    while octets := os.pread(part, _PIECE, have):
        seen.update(octets)
        have += len(octets)
    while have < file.size:
        if stopping.is_set():
            raise Closing
        try:
            stream = source.open(file, have)
        except Unreachable:
            if source.rest(stopping):
                raise Closing from None
            continue
        before = have
        while have < file.size:
            try:
                octets = stream.read(min(_PIECE, file.size - have))
            except (OSError, http.client.HTTPException):
                octets = b""  # the connection broke: it is made again
            if not octets or stopping.is_set():
                break
            _write_at(part, octets, have)
            seen.update(octets)
            have += len(octets)
        with contextlib.suppress(Exception):
            stream.close()
        if have == before and source.rest(stopping):
            raise Closing
    return seen.hexdigest() == file.digest


def _write_at(file: int, octets: bytes, offset: int) -> None:
    view = memoryview(octets)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _link(file: Path, path: Path) -> None:
    """Have the file at that path; a copy where it has as many links as a file can have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.hardlink_to(file)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        draft = path.with_name(f".{secrets.token_hex(8)}")
        shutil.copy(file, draft)
        draft.rename(path)


class _NotNeeded(Exception):
    """What a lock was wanted for has come about while waiting for it."""


def _locked(path: Path, kind: int, stopping: threading.Event, *, unless: Callable[[], bool] | None = None) -> int:
    """An open descriptor with the lock of that file. Raises: Closing; _NotNeeded once ``unless`` is true."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        path.chmod(0o600)  # a part that was about to become a file
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(held, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(held)
                raise
        else:
            return held
        if unless is not None and unless():
            os.close(held)
            raise _NotNeeded
        if stopping.wait(_WAIT_S):
            os.close(held)
            raise Closing


def _touch(lock: int) -> None:
    """Note that it is used now; finer than the kernel's own idea of now."""
    now = time.time_ns()
    os.utime(lock, ns=(now, now))


def _is_still(path: Path, held: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino == os.fstat(held).st_ino
    return False


def _write(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".new")
    draft.write_bytes(content)
    draft.rename(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _folders(root: Path) -> list[Path]:
    return [Path(place, name) for place, names, _ in os.walk(root) for name in names]


def _remove_tree(folder: Path) -> None:
    if folder.is_dir():
        for each in (folder, *_folders(folder)):
            each.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


def _no_space(name: str, size: int, root: Path) -> SetupFailed:
    free = shutil.disk_usage(root).free
    return SetupFailed(
        f"there is no room for {name} of {size:,} bytes: {free:,} bytes of the disk are free, and the "
        "other copies on this machine are in use",
        cause="storage_full",
    )
