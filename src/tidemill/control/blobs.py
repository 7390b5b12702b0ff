"""Content by its SHA-256: uploaded folders and artifacts. A blob is there whole and right, or not at all.

A blob is the file ``sha256/<first two digits>/<digest>``. It is written beside its place, checked, made durable
and renamed into it. Packing reads folders that belong to tenants and may change meanwhile, so no symbolic link
is followed on the way: every step is taken from an open folder.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import re
import secrets
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Self

from tidemill.errors import Conflict, InvalidRequest, NotFound, StorageFull, Unavailable

_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_DEPTH: Final = 64


class BlobStore:
    """All blobs below one folder, which only this process writes. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._drafts = root / "drafts"
        self._drafts.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._drafts.iterdir():
            left.unlink(missing_ok=True)

    def put(self, digest: str, chunks: Iterable[bytes]) -> int:
        """The size of the blob, now stored. Raises: as ``Draft.commit``."""
        with self.draft(digest) as draft:
            for chunk in chunks:
                draft.write(chunk)
            return draft.commit()

    def draft(self, digest: str = "") -> Draft:
        """A blob to be written in pieces; left without ``commit``, nothing stays. Without a digest, any content."""
        return Draft(self._drafts / secrets.token_hex(16), self, _checked(digest) if digest else "")

    def exists(self, digest: str) -> bool:
        """Whether it is stored."""
        return self.path(digest).is_file()

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be. Raises: InvalidRequest when that is no SHA-256."""
        digest = _checked(digest)
        return self._root / "sha256" / digest[:2] / digest

    def size(self, digest: str) -> int:
        """Its bytes. Raises: NotFound."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError as error:
            raise _missing(digest) from error

    def open(self, digest: str) -> BinaryIO:
        """The blob, to be read and closed. Raises: NotFound."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError as error:
            raise _missing(digest) from error

    def touch(self, digest: str) -> None:
        """Nothing; a blob that is there counts as written now, for ``older_than``."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(digest))

    def older_than(self, instant_s: float) -> Iterator[str]:
        """The digests of blobs that were written, or touched, before that time of day."""
        for path in sorted((self._root / "sha256").glob("??/*")):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < instant_s:
                    yield path.name

    def remove(self, digest: str) -> bool:
        """Whether there was one; it is gone."""
        try:
            self.path(digest).unlink()
        except FileNotFoundError:
            return False
        return True

    def pack(self, folder: Path) -> tuple[str, int]:
        """Digest and size of the stored archive (tar.gz) of a folder, or of one file; the same for the same content.

        ``folder`` is absolute and resolved; a link put in its way since is refused. Owners and times are left out.
        Raises: NotFound, InvalidRequest for what cannot be packed, Conflict when it changes meanwhile, StorageFull.
        """
        with self.draft() as draft:
            with (
                gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=_sink(draft), mtime=0) as squeezed,
                tarfile.open(fileobj=squeezed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
            ):
                for member, content in walk(folder):
                    add(archive, member, content)
            size = draft.commit()
            return draft.digest, size


class Draft:
    """A blob that is being written."""

    def __init__(self, place: Path, store: BlobStore, expected: str) -> None:
        self.digest = expected
        self.size = 0
        self._place = place
        self._store = store
        self._seen = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._file = self._place.open("xb", buffering=0)
        except OSError as error:
            raise _broken(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._place.unlink(missing_ok=True)

    def write(self, chunk: bytes | memoryview) -> int:
        """The number of bytes, all taken. Raises: StorageFull."""
        view = memoryview(chunk)
        self._seen.update(view)
        self.size += len(view)
        try:
            while view:
                view = view[self._opened.write(view) :]
        except OSError as error:
            raise _broken(error) from error
        return len(chunk)

    def commit(self) -> int:
        """Its size, now that it is durable. Raises: InvalidRequest when the content has another digest, StorageFull."""
        self.digest = self.verify()
        target = self._store.path(self.digest)
        try:
            os.fsync(self._opened.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            self._place.replace(target)
            for folder in (target.parent, target.parent.parent):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise _broken(error) from error
        return self.size

    def verify(self) -> str:
        """The digest of what was written. Raises: InvalidRequest when another was announced."""
        found = self._seen.hexdigest()
        if self.digest and found != self.digest:
            raise InvalidRequest(
                f"The content's SHA-256 is {found}.", field="sha256", value=self.digest, mend="Send it again."
            )
        return found

    @property
    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError("a draft is written inside its with block")
        return self._file


def walk(folder: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]:
    """What is below a resolved, absolute folder (or a single file), sorted, each with its open content if it is a file.

    The caller reads the content before it asks for the next; it is closed then.
    Raises: NotFound, InvalidRequest for a link that leaves the folder and for what is neither file, folder nor link.
    """
    above = _descend(folder.parent)
    try:
        kind = _lstat(folder.name or ".", above)
        if stat.S_ISREG(kind.st_mode):
            yield from _members(above, "", [folder.name], 0)
        elif stat.S_ISDIR(kind.st_mode):
            descriptor = os.open(folder.name or ".", _FOLDER, dir_fd=above)
            try:
                yield from _members(descriptor, "", _names(descriptor), 0)
            finally:
                os.close(descriptor)
        else:
            raise InvalidRequest("That is neither a file nor a folder.", field="path", value=folder.name)
    except FileNotFoundError as error:
        raise NotFound("There is nothing there.", field="path", value=folder.name) from error
    except OSError as error:
        raise _changed(error) from error
    finally:
        os.close(above)


def add(archive: tarfile.TarFile, member: tarfile.TarInfo, content: BinaryIO | None) -> None:
    """Nothing; the member is in the archive. Raises: Conflict when its content got shorter meanwhile."""
    try:
        archive.addfile(member, content)
    except OSError as error:
        if error.errno is None:
            raise Conflict(f"{member.name} changed while it was read.", field="path", value=member.name) from error
        raise _broken(error) from error


def _descend(folder: Path) -> int:
    """An open folder, reached without following a link."""
    descriptor = os.open(folder.anchor, _FOLDER)
    for part in folder.parts[1:]:
        try:
            below = os.open(part, _FOLDER, dir_fd=descriptor)
        except FileNotFoundError as error:
            raise NotFound("There is nothing there.", field="path", value=part) from error
        except OSError as error:
            raise _changed(error) from error
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _lstat(name: str, within: int) -> os.stat_result:
    return os.stat(name, dir_fd=within, follow_symlinks=False)


def _members(
    within: int, prefix: str, names: list[str], depth: int
) -> Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]:
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"Folders are nested more than {_MAX_DEPTH} deep.", field="path", value=prefix)
    for name in names:
        path = prefix + name
        kind = _lstat(name, within).st_mode
        member = tarfile.TarInfo(path)
        if stat.S_ISLNK(kind):
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=within)
            _check_link(path, member.linkname)
            yield member, None
        elif stat.S_ISDIR(kind):
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            yield member, None
            below = os.open(name, _FOLDER, dir_fd=within)
            try:
                yield from _members(below, path + "/", _names(below), depth + 1)
            finally:
                os.close(below)
        elif stat.S_ISREG(kind):
            with os.fdopen(os.open(name, _FILE, dir_fd=within), "rb") as content:
                found = os.fstat(content.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise Conflict(f"{path} changed while it was read.", field="path", value=path)
                member.size = found.st_size
                member.mode = 0o755 if found.st_mode & stat.S_IXUSR else 0o644
                yield member, content
        else:
            raise InvalidRequest(
                f"{path} is neither a file, a folder nor a link.", field="path", value=path, mend="Remove it first."
            )


def _check_link(path: str, target: str) -> None:
    """Raises: InvalidRequest when a link points out of the folder that is packed."""
    place = os.path.normpath("/".join((*path.split("/")[:-1], target)))
    if target.startswith("/") or place == ".." or place.startswith("../"):
        raise InvalidRequest(
            f"{path} is a link to outside of the folder.", field="path", value=path, mend="Copy what it points to."
        )


def _sink(draft: Draft) -> Any:
    return draft


def _changed(error: OSError) -> Conflict | StorageFull | Unavailable | InvalidRequest:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return InvalidRequest("A link or a file is in the way of that path.", field="path", value=error.filename)
    if error.errno == errno.ENOENT:
        return Conflict("The folder changed while it was read.", field="path", value=error.filename)
    return _broken(error)


def _broken(error: OSError) -> StorageFull | Unavailable:
    if error.errno in _FULL:
        return StorageFull("There is no space left for blobs.", mend="Free space in the control plane's home folder.")
    return Unavailable(f"Blobs cannot be read or written: {error.strerror}.")


def _missing(digest: str) -> NotFound:
    return NotFound("There is no such blob.", field="sha256", value=digest, mend="Upload it first.")


def _checked(digest: str) -> str:
    digest = digest.removeprefix("sha256:")
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(
            "That is not a SHA-256.", field="sha256", value=digest[:80], mend="Write it as 64 digits 0-9 and a-f."
        )
    return digest
