"""The folders behind the data sets and volumes of a launch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidemill.model.storage import DataMode, Manifest, read_manifest
from tidemill.runner.client import Channel, Closing, Refused, Unreachable
from tidemill.runner.datacache import DataCache
from tidemill.runner.datasource import ControlPlaneSource
from tidemill.runner.prepare import SetupFailed

_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder of this machine that a worker finds at ``at``; ``variable`` tells it so."""

    source: Path
    at: str
    variable: str
    is_writable: bool
    is_copy: bool = False
    """Whether it is in this machine's cache."""

    def check(self, own: Iterable[Path]) -> None:
        """Raises: SetupFailed when either would be in the way of Tidemill's own folders, or show them."""
        place, real = Path(self.at), self.source.resolve()
        for folder in own:
            if place.is_relative_to(folder) or folder.is_relative_to(place):
                raise SetupFailed(f"{self.at} is in the way of the worker's own folders here; choose another path")
            if not self.is_copy and (folder.is_relative_to(real) or real.is_relative_to(folder)):
                raise SetupFailed(f"{self.source} has folders of Tidemill in it on this machine, so it is not mounted")


def provide(
    mount: Mapping[str, Any], project: str, cache: DataCache, channel: Channel, *, stopping: threading.Event
) -> tuple[Path, bool]:
    """The folder with a data set, and whether it is a copy: its home is used where that is here and may be.

    Raises: SetupFailed, Closing when ``stopping``, OSError.
    """
    what = "model" if mount.get("model") else "data set"
    name, digest, mode = f"the {what} {mount['dataset']}", str(mount["digest"]), str(mount["mode"])
    manifest = _manifest(channel, digest, name, stopping)
    home = Path(str(mount.get("home") or "")) if mount.get("home") else None
    if mode != DataMode.COPY and home is not None and home.is_dir():
        _check_home(home, manifest, name)
        return home, False
    if mode == DataMode.MOUNT:
        where = home or "the folder that it comes from"
        raise SetupFailed(f"{name} is to be mounted, and this machine does not have {where}")

    def source() -> ControlPlaneSource:
        return ControlPlaneSource(channel.copy(), digest, name)

    return cache.hold(project, name, manifest, source, stopping=stopping).tree, True


def volume(mount: Mapping[str, Any]) -> Path:
    """The folder of a volume. Raises: SetupFailed when this machine does not have it."""
    path = Path(str(mount["path"]))
    if not path.is_dir():
        raise SetupFailed(f"the volume {mount['volume']} is {path}, and this machine has no such folder")
    return path


def _manifest(channel: Channel, digest: str, name: str, stopping: threading.Event) -> Manifest:
    while not stopping.is_set():
        try:
            content = channel.open("GET", f"/blobs/{digest}", timeout_s=_TIMEOUT_S).read()
            found = read_manifest(content)
            if found.digest == digest:
                return found
        except Refused as refusal:
            raise SetupFailed(f"the list of files of {name} could not be fetched: {refusal}") from refusal
        except (Unreachable, OSError, ValueError):
            channel.close()
        channel.rest(stopping)
    raise Closing


def _check_home(home: Path, manifest: Manifest, name: str) -> None:
    """Raises: SetupFailed when a file is gone from the data set's home, or has another size than it had."""
    for file in manifest.files:
        try:
            size = (home / file.path).stat().st_size
        except OSError:
            size = -1
        if size != file.size:
            what = "is gone" if size < 0 else f"has {size:,} bytes and had {file.size:,}"
            raise SetupFailed(
                f"{home / file.path} of {name} {what}; see tidemill dataset verify, and add its next version"
            )
