"""The files of models, out of this machine's folders and into them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from tidemill.control.homes import Folder
from tidemill.control.screening import broken_error, pickle_error, screen
from tidemill.errors import InvalidRequest, NotFound, Unavailable
from tidemill.model.storage import DataFile, manifest_of, read_manifest
from tidemill.sdk.results import ModelVersionInfo
from tidemill.sdk.transport import Transport, segment
from tidemill.sdk.workdir import Progress

_PIECE: Final = 1 << 20
_SENDING_S: Final = 600.0


def send_files(
    http: Transport, source: Path, project: str, *, allow_pickles: bool, progress: Progress | None
) -> list[dict[str, Any]]:
    """The list of the files of a model, all of which the project has then.

    Raises: NotFound, InvalidRequest that names each file that is broken, or a pickle that is not allowed.
    """
    places = _places(source)
    found = screen(_opened(places))
    error = broken_error(found) or (None if allow_pickles else pickle_error(found))
    if error is not None:
        raise error
    total, done = sum(place.stat().st_size for place in places.values()), 0
    files = []
    for path, place in places.items():
        size, digest = _read(place)
        _send(http, place, size, digest, project)
        files.append(DataFile(path, size, digest))
        done += size
        if progress is not None:
            progress(done, total)
    try:
        listed = manifest_of(files).files
    except ValueError as wrong:
        raise InvalidRequest(f"{source} cannot be a model: {wrong}.", field="path", value=str(source)) from wrong
    return [{"path": file.path, "size": file.size, "sha256": file.digest} for file in listed]


def fetch_files(
    http: Transport, version: ModelVersionInfo, target: Path, project: str, *, progress: Progress | None
) -> list[Path]:
    """The files of a version below ``target``, each whole and checked. Raises: Unavailable when they stop to come."""
    base = f"/v1/models/{segment(version.name)}/versions/{version.version}"
    manifest = read_manifest(http.call("GET", f"{base}/manifest", query={"project": project}).content)
    done, written = 0, []
    for file in manifest.files:
        place = target / file.path
        if not _has(place, file):
            place.parent.mkdir(parents=True, exist_ok=True)
            _fetch(http, f"{base}/files/{file.digest}", project, file, place)
        written.append(place)
        done += file.size
        if progress is not None:
            progress(done, manifest.size)
    return written


def _places(source: Path) -> dict[str, Path]:
    source = source.expanduser()
    if source.is_file():
        return {source.name: source}
    if not source.is_dir():
        mend = "Name a file or a folder of this machine."
        raise NotFound(f"There is no {source} here.", field="path", value=str(source), mend=mend)
    folder = Folder(source.absolute())
    return {path: folder.path(path) for path in sorted(folder.sizes())}


def _opened(places: dict[str, Path]) -> Iterator[tuple[str, int, BinaryIO]]:
    with ExitStack() as stack:
        for path, place in places.items():
            stack.close()
            yield path, place.stat().st_size, stack.enter_context(place.open("rb"))


def _read(place: Path) -> tuple[int, str]:
    seen, size = hashlib.sha256(), 0
    with place.open("rb") as file:
        while piece := file.read(_PIECE):
            seen.update(piece)
            size += len(piece)
    return size, seen.hexdigest()


def _send(http: Transport, place: Path, size: int, digest: str, project: str) -> None:
    path = f"/v1/model-files/{digest}"
    try:
        http.call("HEAD", path, query={"project": project})
    except NotFound:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        http.call(
            "PUT",
            path,
            query={"project": project},
            content=lambda: place.open("rb"),
            headers=headers,
            timeout_s=_SENDING_S,
        )


def _has(place: Path, file: DataFile) -> bool:
    return place.is_file() and place.stat().st_size == file.size and _read(place)[1] == file.digest


def _fetch(http: Transport, path: str, project: str, file: DataFile, place: Path) -> None:
    part = place.with_name(f".{place.name}.{file.digest[:12]}.part")
    with part.open("a+b") as out:
        out.seek(0)
        seen, have = hashlib.sha256(), 0
        while piece := out.read(_PIECE):
            seen.update(piece)
            have += len(piece)
        while have < file.size:
            before = have
            broke: Unavailable | None = None
            headers = {"Range": f"bytes={have}-"} if have else {}
            try:
                with http.open("GET", path, query={"project": project}, headers=headers) as stream:
                    for piece in stream:
                        out.write(piece)
                        seen.update(piece)
                        have += len(piece)
            except Unavailable as error:
                broke = error
            if have == before:
                raise broke or Unavailable(f"{file.path} stopped to come.", mend="Try again: it goes on from there.")
        out.flush()
    if have != file.size or seen.hexdigest() != file.digest:
        with suppress(OSError):
            part.unlink()
        raise InvalidRequest(f"{file.path} is not what it was.", field="sha256", value=file.digest, mend="Try again.")
    part.replace(place)
