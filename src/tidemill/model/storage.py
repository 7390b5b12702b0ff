"""Where work finds its files: volumes, which are folders of a site, and data sets, whose files are known by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from tidemill.model.ids import DataSetId, ProjectId, SiteId, VolumeId

MAX_FILES: Final = 2_000_000
_MAX_PATH: Final = 4_096
_MAX_PART: Final = 255
_HEX: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A folder of a site that jobs of a project may have mounted; what they write there is kept.

    ``path`` is where it is on the site's machines; ``node`` is the name of the one machine that has it, empty when
    all have it at that path, as with a shared file system. ``read_only``: nobody may write.
    """

    id: VolumeId
    project_id: ProjectId
    name: str
    site_id: SiteId
    path: str
    node: str = ""
    read_only: bool = False
    created_ns: int = 0
    created_by: str = ""


class DataSetState(StrEnum):
    """Whether a version of a data set can be used."""

    SCANNING = "scanning"
    """Its files are being read for the first time, to know their content."""
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One version of a named data set of a project: files that are known by their content.

    ``home`` is where they are: an absolute path on machines of ``site_id`` (of the machine called ``node`` only, unless
    that is empty), or ``s3://bucket/prefix``, which is of no site. ``endpoint`` and ``region`` say which S3, empty:
    Amazon's; ``secret`` names the project's secret with ``KEY_ID:SECRET_KEY[:SESSION_TOKEN]``, empty: none is needed.

    ``digest`` is the SHA-256 of its manifest, ``size`` the bytes of all its ``files``; both unknown until it was
    scanned. ``detail`` says what came of the last look at its home, which was at ``checked_ns``. ``deleted_ns`` not
    zero: its name and version stay taken, and nothing else is left of it.
    """

    id: DataSetId
    project_id: ProjectId
    name: str
    version: int
    home: str
    site_id: SiteId = SiteId("")
    node: str = ""
    endpoint: str = ""
    region: str = ""
    secret: str = ""
    state: DataSetState = DataSetState.READY
    digest: str = ""
    size: int = 0
    files: int = 0
    detail: str = ""
    checked_ns: int = 0
    created_ns: int = 0
    created_by: str = ""
    deleted_ns: int = 0

    @property
    def is_object_store(self) -> bool:
        """Whether its home is S3 and not a folder."""
        return self.home.startswith("s3://")

    @property
    def reference(self) -> str:
        """``name:version``."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, slots=True, order=True)
class DataFile:
    """A file of a data set: its path below the home, its size in bytes, its SHA-256."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one version of a data set, by path. Two with the same files are the same octets."""

    files: tuple[DataFile, ...]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """The SHA-256 of ``content``."""
        return hashlib.sha256(self.content()).hexdigest()

    def content(self) -> bytes:
        """The manifest as it is stored and sent.

        >>> Manifest((DataFile("a", 0, "0" * 64),)).content()[:27]
        b'{"files":[["a",0,"000000000'
        """
        rows = [[file.path, file.size, file.digest] for file in self.files]
        return json.dumps({"files": rows}, ensure_ascii=False, separators=(",", ":")).encode()


def manifest_of(files: Iterable[DataFile]) -> Manifest:
    """The manifest of these files. Raises: ValueError that names the file when they cannot be a data set."""
    rows = tuple(sorted(files))
    if not rows:
        raise ValueError("there is no file")
    if len(rows) > MAX_FILES:
        raise ValueError(f"there are {len(rows):,} files, and a data set has at most {MAX_FILES:,}; pack small ones")
    for problem in _problems(rows):
        raise ValueError(problem)
    return Manifest(rows)


def read_manifest(content: bytes) -> Manifest:
    """The manifest behind its octets. Raises: ValueError when they are not one, or not in its one form."""
    try:
        written: Any = json.loads(content)
        rows = [DataFile(str(path), int(size), str(digest)) for path, size, digest in written["files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"it is not a manifest: {error}") from error
    found = manifest_of(rows)
    if found.content() != content:
        raise ValueError("it is not written as manifests are: sorted by path, without spaces")
    return found


def is_plain_path(path: str) -> bool:
    """Whether a path stays below the folder it is in, and can be that of a file.

    >>> is_plain_path("a/b.txt"), is_plain_path("../a"), is_plain_path("/a"), is_plain_path("a//b")
    (True, False, False, False)
    """
    try:
        octets = path.encode()
    except UnicodeEncodeError:
        return False
    parts = octets.split(b"/")
    fits = len(octets) <= _MAX_PATH and all(0 < len(part) <= _MAX_PART for part in parts)
    return fits and b"\0" not in octets and not {b".", b".."} & set(parts)


def _problems(rows: tuple[DataFile, ...]) -> Iterator[str]:
    folders: set[str] = set()
    for file in rows:
        if not is_plain_path(file.path):
            yield f"{file.path[:200]!r} cannot be the path of a file"
        if file.size < 0 or len(file.digest) != 64 or not _HEX.issuperset(file.digest):
            yield f"{file.path!r} has no size or no SHA-256"
        above = file.path
        while (above := above.rpartition("/")[0]) and above not in folders:
            folders.add(above)
    before = ""
    for file in rows:
        if file.path == before:
            yield f"{file.path!r} is there twice"
        if file.path in folders:
            yield f"{file.path!r} is a file and a folder"
        before = file.path


def mount_variable(kind: str, name: str) -> str:
    """The environment variable that tells a worker where something is; ``kind`` is ``DATA`` or ``VOLUME``.

    >>> mount_variable("DATA", "image-net.v2")
    'TIDEMILL_DATA_IMAGE_NET_V2'
    """
    return f"TIDEMILL_{kind}_" + "".join(letter if letter.isalnum() else "_" for letter in name.upper())


class DataMode(StrEnum):
    """How a job gets a data set."""

    AUTO = "auto"
    """Its home is mounted where a machine has it; elsewhere it is copied."""
    COPY = "copy"
    """From a copy on the machine's own disk, whose every file was checked."""
    MOUNT = "mount"
    """From its home itself, which binds the job to where that is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataMount:
    """A data set that a job finds, read-only, at ``at``. ``dataset`` is ``name`` or ``name:version``.

    The rest is filled in when it is submitted: ``digest``, ``size`` and ``files`` of the version that is meant, its
    ``home`` with ``site_id`` and ``node``.

    ``model`` not empty: it is a model of the registry, and that is how it was named; ``dataset`` is then its name and
    version, once it is submitted.
    """

    dataset: str
    at: str
    mode: DataMode = DataMode.AUTO
    dataset_id: DataSetId = DataSetId("")
    digest: str = ""
    size: int = 0
    files: int = 0
    home: str = ""
    site_id: SiteId = SiteId("")
    node: str = ""
    model: str = ""

    @property
    def called(self) -> str:
        """What it is, in words."""
        return f"the model {self.dataset or self.model}" if self.model else f"the data set {self.dataset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMount:
    """A volume that a job finds at ``at``. ``path``, ``site_id`` and ``node`` are filled in when it is submitted."""

    volume: str
    at: str
    read_only: bool = False
    path: str = ""
    site_id: SiteId = SiteId("")
    node: str = ""
