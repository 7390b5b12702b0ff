"""Where data sets come from: folders, and buckets of S3 through fsspec (``pip install tidemill[data]``).

Only what a data set's own secret gives is used for S3, or nothing at all for public buckets: never the credentials of
the machine that the control plane runs on, which its tenants have no right to.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol
from urllib.parse import urlsplit

from tidemill.errors import InvalidRequest, NotFound, Unavailable
from tidemill.model.storage import DataFile, is_plain_path

PIECE_BYTES: Final = 4 << 20
_SIGNED_S: Final = 3_600
_THREADS: Final = 8


class Home(Protocol):
    """The place that a data set's files come from. Raises, from any method: NotFound, Unavailable, InvalidRequest."""

    def sizes(self) -> dict[str, int]:
        """The size of each file, by its path below the home."""

    def open(self, path: str) -> BinaryIO:
        """One file, to be read and closed."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine. Links in it count as what they point to, which has to be in it too."""

    root: Path

    def sizes(self) -> dict[str, int]:
        """The size of each file, by its path below the folder."""
        if not self.root.is_dir():
            raise NotFound("There is no such folder on this machine.", field="path", value=str(self.root))
        return dict(self._walk())

    def path(self, path: str) -> Path:
        """The whole path of one of its files. Raises: NotFound also for what is elsewhere."""
        found = (self.root / path).resolve()
        if not is_plain_path(path) or not found.is_relative_to(self.root.resolve()) or not found.is_file():
            raise NotFound("The data set's folder does not have that file any more.", field="path", value=path)
        return found

    def open(self, path: str) -> BinaryIO:
        """One file, to be read and closed."""
        try:
            return self.path(path).open("rb")
        except OSError as error:
            raise Unavailable(f"{path} cannot be read: {error.strerror}.") from error

    def _walk(self) -> Iterator[tuple[str, int]]:
        real = self.root.resolve()

        def refuse(error: OSError) -> None:
            raise Unavailable(f"{error.filename} cannot be read: {error.strerror}.") from error

        for place, folders, names in os.walk(self.root, onerror=refuse):
            for name in folders + names:
                path = Path(place, name)
                below = str(path.relative_to(self.root))
                if path.is_symlink() and (name in folders or not path.resolve().is_relative_to(real)):
                    mend = "Copy what it points to, or take it out."
                    what = "is a link to a folder" if name in folders else "is a link to outside of the folder"
                    raise InvalidRequest(f"{below} {what}.", field="path", value=below, mend=mend)
            for name in names:
                path = Path(place, name)
                below = str(path.relative_to(self.root))
                found = path.stat()
                if not stat.S_ISREG(found.st_mode):
                    raise InvalidRequest(f"{below} is not a file.", field="path", value=below, mend="Take it out.")
                yield below, found.st_size


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Place:
    """A prefix of a bucket of some S3, and what opens it."""

    url: str
    endpoint: str = ""
    region: str = ""
    credentials: str = ""
    """``KEY_ID:SECRET_KEY[:SESSION_TOKEN]``; empty for a public bucket."""

    @property
    def root(self) -> str:
        """``bucket/prefix``."""
        return self.url.removeprefix("s3://").rstrip("/")


class Bucket:
    """A prefix of a bucket."""

    def __init__(self, place: S3Place) -> None:
        self._root = place.root
        self._files = _connect(place)

    def sizes(self) -> dict[str, int]:
        """The size of each object, by its key below the prefix; markers of folders are left out."""
        found: dict[str, Any] = _asked(self._files.find, self._root, detail=True)
        if not found:
            raise NotFound("There is nothing below that address.", field="home", value=f"s3://{self._root}")
        sizes: dict[str, int] = {}
        for key, info in found.items():
            path = key.removeprefix(self._root).lstrip("/") or key.rpartition("/")[2]
            if not (key.endswith("/") and not info["size"]):
                sizes[path] = int(info["size"])
        return sizes

    def open(self, path: str) -> BinaryIO:
        """One object, to be read and closed."""
        opened: BinaryIO = _asked(self._files.open, self._key(path), "rb", block_size=16 << 20, cache_type="readahead")
        return opened

    def read(self, path: str, start: int, end: int) -> bytes:
        """Part of an object, from ``start`` to before ``end``."""
        content: bytes = _asked(self._files.cat_file, self._key(path), start=start, end=end)
        return content

    def signed(self, path: str) -> str:
        """An address from which anybody gets that object, for an hour."""
        address: str = _asked(self._files.sign, self._key(path), expiration=_SIGNED_S)
        return address

    def _key(self, path: str) -> str:
        return self._root if path == self._root.rpartition("/")[2] and self._is_file() else f"{self._root}/{path}"

    def _is_file(self) -> bool:
        return bool(_asked(self._files.isfile, self._root))


def read_all(home: Home, sizes: dict[str, int]) -> Iterator[DataFile]:
    """Each file with its SHA-256, in no order, a few read at a time."""

    def look(path: str) -> DataFile:
        seen, size = hashlib.sha256(), 0
        with home.open(path) as file:
            while piece := _asked(file.read, PIECE_BYTES):
                seen.update(piece)
                size += len(piece)
        return DataFile(path, size, seen.hexdigest())

    with ThreadPoolExecutor(_THREADS, "scan") as threads:
        yield from threads.map(look, sizes)


def check_s3(url: str, endpoint: str) -> None:
    """Raises: InvalidRequest when that is no address of a bucket, or the endpoint none of a server."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    if not 3 <= len(bucket) <= 63 or not all(one.isalnum() or one in "-." for one in bucket) or "\0" in url:
        raise InvalidRequest("That is not a place in S3.", field="home", value=url, mend="Write s3://bucket/prefix.")
    try:
        parts = urlsplit(endpoint)
        good = not endpoint or (parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query)
    except ValueError:
        good = False
    if not good:
        raise InvalidRequest(
            "That is not the address of a server.", field="endpoint", value=endpoint, mend="Write https://host:port."
        )


def _connect(place: S3Place) -> Any:
    try:
        import fsspec
        import s3fs  # noqa: F401 - fsspec finds it by the protocol's name
    except ImportError as error:
        raise Unavailable(
            "fsspec and s3fs are needed to read data sets from S3.", mend="pip install 'tidemill[data]'"
        ) from error
    key, _, rest = place.credentials.partition(":")
    secret, _, token = rest.partition(":")
    options: dict[str, Any] = {"anon": not place.credentials, "use_listings_cache": False, "skip_instance_cache": True}
    if place.credentials:
        options |= {"key": key, "secret": secret, "token": token or None}
    client = {"region_name": place.region or "us-east-1"}
    if place.endpoint:
        client["endpoint_url"] = place.endpoint
    return fsspec.filesystem("s3", client_kwargs=client, **options)


def _asked(call: Any, *given: Any, **named: Any) -> Any:
    """What a call gives that reads a home. Raises: NotFound, Unavailable with what it says."""
    try:
        return call(*given, **named)
    except FileNotFoundError as error:
        raise NotFound(f"The data set's home does not have that: {error}.", field="home") from error
    except PermissionError as error:
        raise InvalidRequest(
            f"The data set's home does not let us in: {error}.",
            field="secret",
            mend="Check the secret that it names.",
        ) from error
    except Exception as error:
        raise Unavailable(f"The data set's home cannot be read: {type(error).__name__}: {error}.") from error
