"""A backup: one tar of everything that an installation is made of, with a manifest as its last member.

=============================  ======================================================================================
``database/<table>.jsonl``     all rows, as ``store.backup`` writes them
``home/<name>``                ``secret.key``, ``config.yaml``, ``admin.token``
``blobs/sha256/<xx>/<digest>`` uploaded folders and artifacts
``models/<project>/sha256/…``  files of models
``logs/<job>/<attempt>/…``     output of jobs, unless left out
``manifest.json``              version, schema, epoch, newest event, rows by table, SHA-256 and size of every member
=============================  ======================================================================================

It is written beside its place under another name, read back, tried out, and only then given its name: what has the name
is whole. The database is copied first and blobs after it: blobs never change, so every one that the rows name is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

from tidemill import __version__
from tidemill.errors import (
    Conflict,
    DamagedBackup,
    InvalidRequest,
    InvalidSetting,
    NotFound,
    StorageFull,
    TidemillError,
    Unavailable,
)
from tidemill.store.backup import DatabaseCopy, check_revision, export, load
from tidemill.store.schema import HEAD
from tidemill.store.sql import SqlStore

FORMAT: Final = 1
HOME_FILES: Final = ("secret.key", "config.yaml", "admin.token")
MANIFEST: Final = "manifest.json"
_BLOCK: Final = 1 << 20
_DRAFT: Final = ".tidemill-partial"
_MEMBER: Final = re.compile(
    r"manifest\.json|database/[a-z_0-9]+\.jsonl|home/(?:secret\.key|config\.yaml|admin\.token)"
    r"|(?:models/[A-Za-z0-9][A-Za-z0-9_-]{0,127}|blobs)/sha256/[0-9a-f]{2}/[0-9a-f]{64}|logs/[A-Za-z0-9][A-Za-z0-9_-]{0,127}/\d{1,19}/\d{1,9}\.(?:log|complete)",
    re.ASCII,
)
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a backup says of itself. ``files`` has the SHA-256 and the size in bytes of each member but this one.

    ``missing`` are blobs that rows name and the home did not have any more; found by trying it out, not written.
    """

    version: str
    made_ns: int
    database: DatabaseCopy
    logs: bool
    files: dict[str, tuple[str, int]]
    missing: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The bytes of all members."""
        return sum(size for _, size in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """As it is in the archive."""
        files = {name: {"sha256": digest, "size": size} for name, (digest, size) in self.files.items()}
        return {"format": FORMAT, "tidemill": self.version, "made_at_ns": self.made_ns, "logs": self.logs} | {
            "database": asdict(self.database),
            "files": files,
        }

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """The manifest behind that text. Raises: DamagedBackup, InvalidRequest when it is of a later format."""
        try:
            told = json.loads(content)
            if told["format"] > FORMAT:
                raise InvalidRequest(
                    f"The backup is of format {told['format']}, written by Tidemill {told['tidemill']}.",
                    field="backup",
                    mend="Upgrade Tidemill first: pip install -U tidemill.",
                )
            return cls(
                version=str(told["tidemill"]),
                made_ns=int(told["made_at_ns"]),
                database=DatabaseCopy(**told["database"]),
                logs=bool(told["logs"]),
                files={name: (str(item["sha256"]), int(item["size"])) for name, item in told["files"].items()},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedBackup(f"The manifest cannot be read: {error}.", field="member", value=MANIFEST) from error


def write_backup(home: Path, database_url: str, path: Path, *, logs: bool, now_ns: int) -> Manifest:
    """What is now in the file at ``path``, read back and tried out. The cloud in ``home`` goes on meanwhile.

    A name that ends in ``gz`` has it compressed. Raises: Conflict when there is such a file or somebody else writes
    it, NotFound when there is nothing to back up, StorageFull; then there is nothing at ``path``.
    """
    if path.exists():
        raise Conflict("There is a file of that name.", field="path", value=str(path), mend="Choose another name.")
    if not (home / "secret.key").exists():
        raise NotFound("There is no installation there.", field="home", value=str(home), mend="Set TIDEMILL_HOME.")
    draft = path.with_name(f".{path.name}{_DRAFT}")
    tables = _tables_of(draft)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with _claimed(draft, path) as file:
            try:
                tables.mkdir(mode=0o700)
                _write(file, home, database_url, tables, is_squeezed=path.name.endswith("gz"), logs=logs, now_ns=now_ns)
                file.flush()
                os.fsync(file.fileno())
                manifest = verify_backup(draft, scratch=tables)
                draft.rename(path)
                _sync(path.parent)
                return manifest
            finally:
                shutil.rmtree(tables, ignore_errors=True)
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise cannot(error, path) from error


def verify_backup(path: Path, *, scratch: Path | None = None) -> Manifest:
    """What the backup says of itself, now that every byte of it was read and its database tried out.

    Trying out is what a restoring does: all rows are put into a database, which is asked whether it is sound.
    ``scratch`` is where that database lies meanwhile. Raises: DamagedBackup that names what is wrong, NotFound,
    InvalidSetting when it is of a later version.
    """
    with tempfile.TemporaryDirectory(prefix=".tidemill-verify-", dir=scratch) as folder:
        manifest = unpack(path, Path(folder), only="database/")
        rebuild(Path(folder) / "database", manifest, Path(folder) / "control.db")
        return replace(manifest, missing=_missing_blobs(Path(folder) / "control.db", manifest))


def unpack(path: Path, folder: Path, *, only: str = "") -> Manifest:
    """The manifest, after every member was read and checked; those that begin with ``only`` are in ``folder`` then.

    Raises: as ``verify_backup``; OSError when ``folder`` cannot take it.
    """
    seen: dict[str, tuple[str, int]] = {}
    content, last = b"", "its beginning"
    try:
        for name, member in _members(path):
            last = name
            if content:
                raise DamagedBackup("Something comes after the manifest.", field="member", value=name)
            if name == MANIFEST:
                content = member.read()
                continue
            if name in seen:
                raise DamagedBackup(f"{name} is there twice.", field="member", value=name)
            seen[name] = _take(member, folder / name if name.startswith(only) else None)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedBackup(f"It cannot be read at or after {last}: {error}.", field="member", value=last) from error
    if not content:
        raise DamagedBackup(
            "It ends before its manifest: it was not written to its end.", field="member", value=MANIFEST
        )
    manifest = Manifest.from_json(content)
    _compare(manifest, seen)
    check_revision(manifest.database.revision, version=manifest.version)
    return manifest


def rebuild(tables: Path, manifest: Manifest, target: Path, *, now_ns: int | None = None) -> int:
    """The newest epoch of the SQLite database that is made of the rows, of this version's schema, and sound.

    With ``now_ns``, epochs and fences jump. Raises: DamagedBackup.
    """
    epoch = load(f"sqlite:///{target}", tables, manifest.database, now_ns=now_ns)
    check_sound(f"sqlite:///{target}")
    return epoch


def _missing_blobs(database: Path, manifest: Manifest) -> tuple[str, ...]:
    """Digests that rows of the SQLite file name and the backup has not."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        named = connection.execute(
            "SELECT json_extract(body, '$.spec.workdir') FROM workloads"
            " UNION SELECT json_extract(body, '$.digest') FROM artifacts"
            " UNION SELECT digest FROM model_versions WHERE deleted_ns = 0"
        )
        digests = {str(digest).removeprefix("sha256:") for (digest,) in named if digest}
    return tuple(sorted(one for one in digests if f"blobs/sha256/{one[:2]}/{one}" not in manifest.files))


def check_sound(url: str) -> None:
    """Nothing, when the database is sound and what is not over in it can be read. Raises: DamagedBackup."""
    store = SqlStore(url)
    try:
        wrong = store.integrity()
        if wrong:
            raise DamagedBackup(f"The database is not sound: {' '.join(wrong)}", field="database")
        store.load()
    except (ValueError, LookupError) as error:
        raise DamagedBackup(f"A value in the database cannot be read: {error}.", field="database") from error
    finally:
        store.close()


def cannot(error: OSError, path: Path) -> TidemillError:
    """What it means that the disk did not do it."""
    if error.errno in _FULL:
        mend = "Free space, or name another place. Nothing was left there."
        return StorageFull("There is no space left.", field="path", value=str(path), mend=mend)
    return Unavailable(f"{error.filename or path}: {error.strerror or error}.", field="path", value=str(path))


# Writing


def _tables_of(draft: Path) -> Path:
    """The folder in which the rows lie while the draft is written."""
    return draft.with_suffix(".tidemill-tables")


def _sweep(folder: Path) -> None:
    """Remove drafts that killed ones left; nobody else holds those."""
    for draft in folder.glob(f".*{_DRAFT}"):
        with contextlib.suppress(OSError), draft.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(_tables_of(draft), ignore_errors=True)
            draft.unlink()


@contextlib.contextmanager
def _claimed(draft: Path, path: Path) -> Iterator[BinaryIO]:
    """The draft, empty, for us alone. Raises: Conflict."""
    with os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict("That backup is being written.", field="path", value=str(path)) from error
        os.fchmod(file.fileno(), 0o600)
        file.truncate(0)
        yield file


def _write(file: BinaryIO, home: Path, url: str, tables: Path, *, is_squeezed: bool, logs: bool, now_ns: int) -> None:
    database = export(url, tables)
    if database.revision > HEAD:
        raise InvalidSetting(
            f"The database is of a later version of Tidemill (schema {database.revision}, this one knows {HEAD}).",
            field="database",
            mend="Use the tidemill of that version.",
        )
    files: dict[str, tuple[str, int]] = {}
    with contextlib.ExitStack() as stack:
        sink: Any = file
        if is_squeezed:
            sink = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0))
        archive = stack.enter_context(tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT))
        for name, source in _sources(home, tables, logs=logs):
            if (added := _add(archive, name, source, now_ns)) is not None:
                files[name] = added
        manifest = Manifest(version=__version__, made_ns=now_ns, database=database, logs=logs, files=files)
        content = json.dumps(manifest.to_json(), indent=1).encode()
        archive.addfile(_header(MANIFEST, len(content), now_ns), _Bytes(content))


def _sources(home: Path, tables: Path, *, logs: bool) -> Iterator[tuple[str, Path]]:
    for path in sorted(tables.glob("*.jsonl")):
        yield f"database/{path.name}", path
    for name in HOME_FILES:
        yield f"home/{name}", home / name
    for room in ("blobs", "logs") if logs else ("blobs",):
        yield from _kept(home, f"{room}/*/*/*")
    yield from _kept(home, "models/*/sha256/*/*")


def _kept(home: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """The files there that belong into a backup."""
    for path in sorted(home.glob(pattern)):
        name = path.relative_to(home).as_posix()
        if _MEMBER.fullmatch(name):
            yield name, path


def _add(archive: tarfile.TarFile, name: str, source: Path, now_ns: int) -> tuple[str, int] | None:
    """The digest and size of the member, as much of it as there was when it was opened; None: there is no such file."""
    try:
        file = source.open("rb")
    except FileNotFoundError:
        return None
    with file:
        size = os.fstat(file.fileno()).st_size
        reading = _Hashed(file)
        archive.addfile(_header(name, size, now_ns), reading)
        return reading.seen.hexdigest(), size


def _header(name: str, size: int, now_ns: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, now_ns // 1_000_000_000
    return member


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seen = hashlib.sha256()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.seen.update(block)
        return block


class _Bytes:
    """Bytes as a file."""

    def __init__(self, content: bytes) -> None:
        self._left = content

    def read(self, size: int = -1) -> bytes:
        size = len(self._left) if size < 0 else size
        block, self._left = self._left[:size], self._left[size:]
        return block


# Reading


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each member, in order. Raises: DamagedBackup, NotFound; reading a content, as ``tarfile``."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise NotFound("There is no such backup.", field="path", value=str(path)) from error
    except IsADirectoryError as error:
        raise InvalidRequest("That is a folder.", field="path", value=str(path), mend="Name the file.") from error
    with file:
        is_squeezed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        source: Any = gzip.GzipFile(fileobj=file) if is_squeezed else file
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or not _MEMBER.fullmatch(member.name):
                    raise DamagedBackup("This does not belong into a backup.", field="member", value=member.name)
                yield member.name, content
        while source.read(_BLOCK):  # the rest of it has a check of its own when it is compressed
            pass


def _take(member: IO[bytes], target: Path | None) -> tuple[str, int]:
    """Digest and size of the member, which is in the file ``target`` then, durably."""
    seen, size = hashlib.sha256(), 0
    with contextlib.ExitStack() as stack:
        file = None
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = stack.enter_context(os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"))
        while block := member.read(_BLOCK):
            seen.update(block)
            size += len(block)
            if file is not None:
                file.write(block)
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    return seen.hexdigest(), size


def _compare(manifest: Manifest, seen: dict[str, tuple[str, int]]) -> None:
    for name, (digest, size) in manifest.files.items():
        if name not in seen:
            raise DamagedBackup(f"{name} is missing.", field="member", value=name)
        if seen[name] != (digest, size):
            raise DamagedBackup(f"{name} is not as it was written.", field="member", value=name)
        if name.startswith(("blobs/", "models/")) and not name.endswith(digest):
            raise DamagedBackup(f"{name} has another content than its name says.", field="member", value=name)
    if more := sorted(set(seen) - set(manifest.files)):
        raise DamagedBackup(f"{more[0]} is not in the manifest.", field="member", value=more[0])
    if "home/secret.key" not in seen:
        raise DamagedBackup("home/secret.key is missing.", field="member", value="home/secret.key")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
