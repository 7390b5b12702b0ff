"""Files out of and into jobs.

A path of a job is one of three: ``model/x.bin`` lies in the job's output folder, which outlives the job;
``./x`` lies in the working folder of a running worker; ``/x`` is absolute inside a running worker.
"""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tidemill.errors import InvalidRequest, NotFound, TidemillError

if TYPE_CHECKING:
    from tidemill.sdk.client import Client


def copy_from(client: Client, ref: str, path: str, to: Path, *, rank: int = 0) -> list[Path]:
    """The files written. An existing folder ``to`` gets what is copied inside it; otherwise ``to`` is its new name.

    Raises: NotFound when there is nothing at ``path``.
    """
    name = PurePosixPath(path).name or "output"
    target = to / name if to.is_dir() else to
    if not path.startswith(("/", "./")):
        alone = "" if _is_there(client, ref, f"{path}/{name}") else name
        return extract(client.outputs(ref, path), target, alone=alone)
    where = PurePosixPath(path)
    script = f"cd -- {shlex.quote(str(where.parent))} && exec tar -cf - -- {shlex.quote(where.name or '.')}"
    errors: list[bytes] = []
    with client.exec_session(ref, ["sh", "-c", script], rank=rank) as session:
        session.end_input()

        def pieces() -> Iterator[bytes]:
            for kind, octets in session:
                if kind == b"o":
                    yield octets
                else:
                    errors.append(octets)

        try:
            written = extract(pieces(), target, prefix=where.name)
        except TidemillError:
            if session.exit_code:
                raise NotFound(f"{ref}:{path}: {b''.join(errors).decode('utf-8', 'replace').strip()}") from None
            raise
        return written


def copy_to(client: Client, ref: str, source: Path, path: str, *, rank: int = 0) -> None:
    """Put a file or folder into a running worker. A ``path`` that ends with ``/`` is a folder to put it in.

    Raises: NotFound when there is no ``source``; InvalidRequest with what tar said when it cannot be written.
    """
    if not source.exists():
        raise NotFound(f"there is no {source} on this machine")
    base = '"$TIDEMILL_OUTPUT_DIR"' if not path.startswith(("/", "./")) else "."
    where = PurePosixPath(path)
    keep_name = path in ("", ".", "./", "/") or path.endswith("/")
    folder, name = (where, source.name) if keep_name else (where.parent, where.name)
    inner = shlex.quote(str(folder))
    script = f"cd -- {base} && mkdir -p -- {inner} && exec tar -xf - -C {inner}"
    result = client.exec(ref, ["sh", "-c", script], rank=rank, stdin=_archive(source, name))
    if result.exit_code:
        said = result.stderr.decode("utf-8", "replace").strip()
        raise InvalidRequest(f"cannot write {ref}:{path}: {said or f'tar ended with {result.exit_code}'}")


def _is_there(client: Client, ref: str, path: str) -> bool:
    """Whether the job's output has something there: what tells a folder ``x`` with a file ``x`` from a file ``x``."""
    try:
        found = client.outputs(ref, path)
    except NotFound:
        return False
    _close(found)
    return True


def extract(pieces: Iterable[bytes], target: Path, *, prefix: str = "", alone: str = "") -> list[Path]:
    """The files written from a tar archive (plain or gzip) into the folder ``target``.

    ``prefix`` is the folder in the archive that becomes ``target``, or the file; a file called ``alone`` becomes
    ``target`` too. Nothing is written elsewhere: links that lead out and device files are refused.
    Raises: InvalidRequest when the archive is broken or would write elsewhere.
    """
    written: list[Path] = []
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Pieces(pieces)), mode="r|*") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if parts[:1] == (prefix,) or (parts == (alone,) and member.isfile()):
                    parts = parts[1:]
                if not parts and not member.isdir():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    archive.extract(member.replace(name=target.name, deep=False), target.parent, filter="data")
                    written.append(target)
                    continue
                target.mkdir(parents=True, exist_ok=True)
                inner = PurePosixPath(*parts)
                if parts:
                    archive.extract(member.replace(name=str(inner), deep=False), target, filter="data")
                if member.isfile():
                    written.append(target / inner)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidRequest(f"the archive cannot be unpacked: {error}") from error
    finally:
        _close(pieces)
    return written


def _close(pieces: Iterable[bytes]) -> None:
    close = getattr(pieces, "close", None)
    if close is not None:
        close()


class _Pieces(io.RawIOBase):
    """Octets that come in pieces, as a file to read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _archive(source: Path, name: str) -> Iterator[bytes]:
    """The tar archive of a file or folder under another name, in pieces."""
    spool = _Drain()
    with tarfile.open(fileobj=spool, mode="w|") as archive:
        for path in [source, *(sorted(source.rglob("*")) if source.is_dir() and not source.is_symlink() else [])]:
            inner = PurePosixPath(name, *path.relative_to(source).parts)
            archive.add(path, arcname=str(inner), recursive=False)
            yield spool.take()
    yield spool.take()


class _Drain(io.RawIOBase):
    """A file to write to, from which what was written is taken."""

    def __init__(self) -> None:
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, octets: Any) -> int:
        self._held += octets
        return len(octets)

    def take(self) -> bytes:
        """What was written since the last time."""
        taken = bytes(self._held)
        self._held.clear()
        return taken
