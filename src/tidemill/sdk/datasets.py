"""A folder as a data set: its manifest, and what is different from one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tidemill.control.datasets import differences
from tidemill.control.homes import Folder, read_all
from tidemill.errors import InvalidRequest
from tidemill.model.storage import DataFile, Manifest, manifest_of, read_manifest
from tidemill.sdk.workdir import Progress


def manifest_of_folder(folder: Path, *, progress: Progress | None = None) -> bytes:
    """The manifest of all files below a folder of this machine, each of which is read.

    ``progress`` gets bytes done and in all. Raises: NotFound, InvalidRequest, Unavailable.
    """
    return _read(folder, progress).content()


def changes_of_folder(folder: Path, known: bytes, *, progress: Progress | None = None) -> str:
    """What is different in a folder from the manifest ``known``, in a sentence; empty when nothing is."""
    return differences(read_manifest(known), _read(folder, progress))


def _read(folder: Path, progress: Progress | None) -> Manifest:
    home = Folder(folder)
    sizes = home.sizes()

    def counted() -> Iterator[DataFile]:
        done, total = 0, sum(sizes.values())
        for file in read_all(home, sizes):
            done += file.size
            if progress is not None:
                progress(done, total)
            yield file

    try:
        return manifest_of(counted())
    except ValueError as error:
        raise InvalidRequest(
            f"{folder} cannot be a data set: {error}.",
            field="home",
            value=str(folder),
            mend="Mend that first.",
        ) from error
