"""Turns as they were taken, in a file: what was there at first, then each turn's facts, instant and decisions.

The file is the lines of ``control.recording``, packed with gzip. A control plane that dies leaves a file that ends in
the middle of a line; what is whole before that is read.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, get_args

import msgspec

from tidemill.control.recording import FORMAT, Beginning, Decision
from tidemill.errors import Conflict, InvalidRequest, NotFound
from tidemill.model import events
from tidemill.model.events import Fact
from tidemill.store.codec import decode

_FLUSH_EVERY: Final = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: its facts, its instant, and what was decided."""

    now: int
    facts: tuple[Fact, ...]
    decided: tuple[Decision, ...]


class RecordingFile:
    """A new file for a ``Recording``; what is written reaches the system every so many lines, and when told."""

    def __init__(self, path: Path) -> None:
        """Raises: Conflict when there is such a file already."""
        try:
            self._raw = path.open("xb")
        except FileExistsError as error:
            raise Conflict(
                "There is such a file already.", field="FILE", value=str(path), mend="Name another file."
            ) from error
        except OSError as error:
            raise InvalidRequest(
                f"The file cannot be made: {error.strerror}.", field="FILE", value=str(path)
            ) from error
        self._file = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, mtime=0)
        self._lines = 0

    def write(self, line: bytes) -> None:
        """Append a line."""
        self._file.write(line)
        self._lines += 1
        if self._lines % _FLUSH_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        """Have the system keep what is written so far, whatever becomes of this process."""
        self._file.flush()
        self._raw.flush()

    def close(self) -> None:
        """Write what is left; harmless twice."""
        self._file.close()
        self._raw.close()

    def __enter__(self) -> RecordingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_recording(path: Path) -> Iterator[Beginning | Turn]:
    """What a file holds, in order; an unfinished end is left out.

    Raises: NotFound; InvalidRequest that names the line when it is no recording.
    """
    for number, text in enumerate((line for line in _lines(path) if line.strip()), 1):
        try:
            line = _line_decoder().decode(text)
            if number == 1 and line.recording != FORMAT:
                raise ValueError("it does not begin as one")
            if begin := bytes(line.begin):
                yield decode(Beginning, begin.decode())
            elif number > 1:
                facts = tuple(decode(_fact_types()[name], bytes(fact).decode()) for name, fact in line.facts)
                yield Turn(line.now, facts, tuple(Decision(*one) for one in line.decided))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{path.name} is not a recording that this version can read; line {number}: {error}.",
                field="FILE",
                value=str(path),
                mend="Make one with tidemill record.",
            ) from error


class _Line(msgspec.Struct):
    recording: int = 0
    begin: msgspec.Raw = msgspec.Raw()
    now: int = 0
    facts: list[tuple[str, msgspec.Raw]] = []
    decided: list[tuple[str, str, str]] = []


@cache
def _line_decoder() -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_Line)


@cache
def _fact_types() -> dict[str, type[Any]]:
    return {kind.__name__: kind for kind in get_args(events.Fact)}


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, packed or not; the last is left out when it does not end."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotFound("There is no such file.", field="FILE", value=str(path)) from error
    with file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        source: Iterable[bytes] = _unpacked(file) if packed else file
        for line in source:
            if not line.endswith(b"\n"):
                return
            yield line


def _unpacked(file: Any) -> Iterator[bytes]:
    """Lines out of gzip, as far as it goes."""
    rest = b""
    unpack = zlib.decompressobj(wbits=31)
    while piece := file.read(1 << 16):
        try:
            text = unpack.decompress(piece)
        except zlib.error:
            break
        *lines, rest = (rest + text).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest
