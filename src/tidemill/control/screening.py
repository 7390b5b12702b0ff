"""Looks at the files of a model before anybody loads them: are they what they say, and can they run code?

Pickles run code when they are loaded, so they are told by their names and by their content, also within archives and
compressed files. Whatever comes, what is read and unpacked is bounded; nothing is loaded, and no weights are read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickletools
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, cast

import yaml

from tidemill.core.weights import (
    GGUF_HEADER_MAX,
    GGUF_MAGIC,
    Truncated,
    Weights,
    read_gguf,
    read_safetensors,
    safetensors_header_size,
)
from tidemill.errors import InvalidRequest
from tidemill.model.registry import ModelCard
from tidemill.model.storage import is_plain_path

_HEAD: Final = 64 << 10
_TEXT_MAX: Final = 1 << 20
_GGUF_FIRST: Final = 1 << 20
_MAX_MEMBERS: Final = 20_000
_MAX_DEPTH: Final = 3
_UNPACKED_MAX: Final = 4 << 30
"""Octets that a compressed archive may have unpacked; what has more cannot be looked through."""
_DIRECTORY_MAX: Final = 64 << 20
"""Octets of a zip's list of members."""
_OPS: Final = 4_096
_BY_NAME: Final[Mapping[str, str]] = {
    ".bin": "PyTorch's older files", ".pt": "PyTorch's files", ".pth": "PyTorch's files", ".ckpt": "checkpoints",
    ".pkl": "pickles", ".pickle": "pickles", ".joblib": "joblib's files", ".dill": "dill's files",
    ".cloudpickle": "pickles", ".p": "pickles",
}  # fmt: skip
_RUNS: Final = frozenset(
    ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4")
)
_OBJECT_ARRAY: Final = re.compile(rb"""['"][|<>=]?O\d*['"]""")
_FRAMEWORKS: Final = {"pt": "pytorch", "tf": "tensorflow", "flax": "flax", "mlx": "mlx", "np": "numpy"}
SAFE: Final = "Save it as safetensors, which cannot run code."
_BROKEN_MEND: Final = "Write the file anew, and push it again."
_ZLIB: Final = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")


class Broken(Exception):
    """A file is not what it says, or cannot be looked through; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """What was found in the files of a model.

    ``broken`` are ``(path, what is wrong)``, ``pickles`` are ``(path, how that is known)``.
    """

    card: ModelCard = ModelCard()
    metrics: tuple[tuple[str, str], ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    pickles: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Found:
    """What has been learnt so far; what a file says goes before what a later one does."""

    facts: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    code: list[str] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)

    def learn(self, **told: object) -> None:
        for name, value in told.items():
            if isinstance(value, str) and value.strip() and name not in self.facts:
                self.facts[name] = value.strip()[:200]


def screen(files: Iterable[tuple[str, int, BinaryIO]]) -> Screened:
    """What is found in these files: the path of each, its size, and its content, which can be read at any place.

    The caller opens one when it is asked for, and may close it when the next is.
    """
    found = _Found()
    broken: list[tuple[str, str]] = []
    pickles: list[tuple[str, str]] = []
    for path, size, file in files:
        try:
            _look(path, size, file, found)
            if why := pickle_in(path, size, file):
                pickles.append((path, why))
                found.formats.add("pickle")
        except Broken as error:
            broken.append((path, str(error)))
    order = ("safetensors", "gguf", "onnx", "pickle")
    card = ModelCard(
        format=next((one for one in order if one in found.formats), ""),
        framework=found.facts.get("framework", ""),
        architecture=found.facts.get("architecture", ""),
        base_model=found.facts.get("base_model", ""),
        licence=found.facts.get("licence", ""),
        parameters=sum(found.counts.values()),
        precisions=tuple(sorted(found.counts.items(), key=lambda item: (-item[1], item[0]))),
        code=tuple(sorted(found.code)),
    )
    metrics = tuple(sorted(found.metrics.items()))
    return Screened(card=card, metrics=metrics, broken=tuple(broken), pickles=tuple(pickles))


def broken_error(found: Screened) -> InvalidRequest | None:
    """The error that names each file that is broken; None when none is."""
    return _error([(path, f"{path}: {why}.") for path, why in found.broken], _BROKEN_MEND)


def pickle_error(found: Screened) -> InvalidRequest | None:
    """The error that names each file that can run code; None when none can."""
    told = [(path, f"{path} can run code when it is loaded: {why}.") for path, why in found.pickles]
    return _error(told, f"{SAFE} If you trust it: --allow-pickle.")


def _error(told: list[tuple[str, str]], mend: str) -> InvalidRequest | None:
    if not told:
        return None
    errors = [{"field": "files", "value": path, "detail": detail, "mend": mend} for path, detail in told]
    more = f" ({len(told) - 1} more.)" if len(told) > 1 else ""
    return InvalidRequest(told[0][1] + more, field="files", value=told[0][0], mend=mend, errors=errors)


def weights_in(path: str, size: int, file: BinaryIO) -> Weights | None:
    """What a file of weights has; None when it is none. Raises: Broken when it is not what it says."""
    file.seek(0)
    first = file.read(8)
    try:
        if path.lower().endswith(".safetensors"):
            length = safetensors_header_size(first, size)
            header = file.read(length)
            if len(header) < length:
                raise Broken("it ends within its header")
            return read_safetensors(header, size - 8 - length)
        if path.lower().endswith(".gguf") or first.startswith(GGUF_MAGIC):
            for limit in (_GGUF_FIRST, GGUF_HEADER_MAX):
                file.seek(0)
                head = file.read(min(limit, size))
                try:
                    return read_gguf(head, size)
                except Truncated:
                    if len(head) >= size:
                        raise Broken("it ends within its header") from None
            raise Broken(f"its header has more than {GGUF_HEADER_MAX:,} bytes, which are all that is read")
    except ValueError as error:
        raise Broken(str(error)) from None
    return None


def pickle_in(path: str, size: int, file: BinaryIO) -> str:
    """How it is known that a file is a pickle or has one in it; empty when it is none.

    Raises: Broken for an archive that cannot be looked through, or whose members would leave their folder.
    """
    name = path.lower()
    if name.endswith((".safetensors", ".gguf")):
        return ""  # their headers account for every octet
    for ending, whose in _BY_NAME.items():
        if name.endswith(ending):
            return f"{ending} is the name of {whose}"
    file.seek(0)
    return _sniffed(file.read(_HEAD), file, size, depth=0)


def _sniffed(head: bytes, file: BinaryIO, size: int, *, depth: int) -> str:
    """How it is known that content is a pickle. ``file`` is at any place and can be moved."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _in_zip(file, size, depth=depth)
    if head[257:262] == b"ustar":
        file.seek(0)
        return _in_tar(file, depth=depth)
    if (opened := _unpacking(head, file)) is not None:
        if depth >= _MAX_DEPTH:
            raise Broken("it is packed within what is packed, too deeply to be looked through")
        return _in_packed(opened, depth=depth + 1)
    return _plainly(head)


def _plainly(head: bytes) -> str:
    """How it is known that octets that begin like that are a pickle, without any unpacking."""
    if head.startswith(b"\x93NUMPY"):
        return "it has Python objects in an array" if _OBJECT_ARRAY.search(head[:4_096]) else ""
    if is_pickle(head):
        return "its content is a pickle"
    return ""


def is_pickle(head: bytes) -> bool:
    """Whether octets that begin like that are a pickle, of any protocol.

    >>> import pickle
    >>> [is_pickle(pickle.dumps({"a": print}, protocol)) for protocol in range(6)]
    [True, True, True, True, True, True]
    >>> is_pickle(b'{"model_type": "llama"}'), is_pickle(b"# A model"), is_pickle(b"")
    (False, False, False)
    """
    is_marked = len(head) > 1 and head[0] == 0x80 and head[1] <= 5
    stream = io.BytesIO(head)
    ops = 0
    with suppress(Exception):  # whatever a wrong argument makes it raise: it is no pickle from there on
        for op, argument, _ in pickletools.genops(stream):
            ops += 1
            if op.name in _RUNS and (is_marked or _is_plausible(op.name, argument)):
                return True
            if op.name == "STOP":
                return is_marked or (ops > 2 and stream.tell() == len(head))
            if ops >= _OPS:
                return is_marked
    return is_marked and ops >= 3


def _is_plausible(op: str, argument: object) -> bool:
    """Whether that can be an instruction, and not a text that happens to begin so."""
    if op in ("GLOBAL", "INST"):
        words = str(argument).split(" ")
        return len(words) == 2 and all(part.isidentifier() for word in words for part in word.split("."))
    return op in ("REDUCE", "BUILD", "OBJ", "EXT1", "EXT2", "EXT4")


# -- archives -------------------------------------------------------------------------------------------------------


def _in_zip(file: BinaryIO, size: int, *, depth: int) -> str:
    if depth >= _MAX_DEPTH:
        raise Broken("it is packed within what is packed, too deeply to be looked through")
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > _MAX_MEMBERS:
                raise Broken(f"it has {len(members):,} members; at most {_MAX_MEMBERS:,} are looked at")
            for member in members:
                _check_member(member.filename.rstrip("/"), is_link=stat.S_ISLNK(member.external_attr >> 16))
                if member.is_dir():
                    continue
                if why := _member_named(member.filename):
                    return why
                with archive.open(member) as content:
                    if why := _in_member(member.filename, cast("BinaryIO", content), depth=depth + 1):
                        return why
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError, zlib.error) as error:
        raise Broken(f"it is a zip that cannot be looked through: {error}") from None
    return ""


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raises: Broken when the zip's list of members is too long to be read."""
    file.seek(max(0, size - (64 << 10) - 22))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if length > _DIRECTORY_MAX and length != 0xFFFFFFFF:
        raise Broken(f"its list of members has {length:,} bytes; at most {_DIRECTORY_MAX:,} are read")


def _in_tar(stream: BinaryIO, *, depth: int) -> str:
    if depth >= _MAX_DEPTH:
        raise Broken("it is packed within what is packed, too deeply to be looked through")
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for number, member in enumerate(archive):
                if number >= _MAX_MEMBERS:
                    raise Broken(f"it has more than {_MAX_MEMBERS:,} members, which are all that is looked at")
                is_link = not (member.isreg() or member.isdir())
                _check_member(member.name.removeprefix("./").rstrip("/") or ".", is_link=is_link)
                if not member.isreg():
                    continue
                if why := _member_named(member.name):
                    return why
                content = archive.extractfile(member)
                if content is not None and (why := _in_member(member.name, cast("BinaryIO", content), depth=depth + 1)):
                    return why
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise Broken(f"it is an archive that cannot be looked through: {error}") from None
    return ""


def _check_member(name: str, *, is_link: bool) -> None:
    if is_link:
        raise Broken(f"its member {name[:200]!r} is a link or a device")
    if name != "." and (not is_plain_path(name) or "\\" in name):
        raise Broken(f"its member {name[:200]!r} would leave the folder that it is unpacked into")


def _member_named(name: str) -> str:
    for ending, whose in _BY_NAME.items():
        if name.lower().endswith(ending):
            return f"{name[-100:]} in it has the name of {whose}"
    return ""


def _in_member(name: str, content: BinaryIO, *, depth: int) -> str:
    """How it is known that a member is a pickle; what is packed again is looked into from its beginning only."""
    head = content.read(_HEAD)
    is_packed = head.startswith((b"PK\x03\x04", b"PK\x05\x06")) or head[257:262] == b"ustar"
    if is_packed or _unpacking(head, io.BytesIO(head)) is not None:
        if depth >= _MAX_DEPTH:
            raise Broken(f"{name[-100:]} in it is packed again, too deeply to be looked through")
        rest = content.read(_UNPACKED_MAX // 64)
        if content.read(1):
            raise Broken(f"{name[-100:]} in it is an archive that is too large to be looked through")
        whole = head + rest
        why = _sniffed(whole[:_HEAD], io.BytesIO(whole), len(whole), depth=depth)
    else:
        why = _plainly(head)
    return f"{name[-100:]} in it: {why}" if why else ""


def _unpacking(head: bytes, file: BinaryIO) -> BinaryIO | None:
    """What is in a compressed file, as a stream; None when it is not compressed."""
    file.seek(0)
    opened: Any = None
    if head.startswith(b"\x1f\x8b"):
        opened = gzip.GzipFile(fileobj=file)
    elif head.startswith(b"BZh"):
        opened = bz2.BZ2File(file)
    elif head.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        opened = lzma.LZMAFile(file)  # noqa: SIM115 - it is read by whoever asked for it
    elif head.startswith(_ZLIB):
        opened = _Zlib(file)
    return cast("BinaryIO | None", opened)


def _in_packed(opened: BinaryIO, *, depth: int) -> str:
    stream = _Bounded(opened)
    try:
        head = stream.read(_HEAD)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError):
        return ""  # it only began as if it were packed
    if head[257:262] == b"ustar":
        return _in_tar(cast("BinaryIO", _Again(head, stream)), depth=depth)
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")):
        raise Broken("what is packed in it is packed again; unpack it first")
    why = _plainly(head)
    return f"packed in it, {why}" if why else ""


class _Zlib:
    """A zlib stream, unpacked as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._unpack = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size and not self._unpack.eof:
            packed = self._unpack.unconsumed_tail or self._file.read(16 << 10)
            if not packed:
                break
            found += self._unpack.decompress(packed, size - len(found))
        return bytes(found)


class _Bounded:
    """A stream of which only so much is unpacked. Raises: Broken beyond that."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = _UNPACKED_MAX

    def read(self, size: int) -> bytes:
        octets = self._stream.read(min(size, 1 << 20))
        self._left -= len(octets)
        if self._left < 0:
            raise Broken(f"it unpacks to more than {_UNPACKED_MAX:,} bytes, which are all that is looked through")
        return octets


class _Again:
    """A stream whose beginning was read already."""

    def __init__(self, head: bytes, stream: _Bounded) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int) -> bytes:
        if self._head:
            taken, self._head = self._head[:size], self._head[size:]
            return taken
        return self._stream.read(size)


# -- what the files say ---------------------------------------------------------------------------------------------


def _look(path: str, size: int, file: BinaryIO, found: _Found) -> None:
    """Learn from one file. Raises: Broken when it is not what it says."""
    weights = weights_in(path, size, file)
    name = path.rpartition("/")[2].lower()
    if weights is not None:
        found.formats.add(weights.format)
        for dtype, count in weights.precisions.items():
            found.counts[dtype] = found.counts.get(dtype, 0) + count
        said = weights.metadata
        if weights.format == "gguf":
            found.learn(
                architecture=said.get("general.architecture"),
                licence=said.get("general.license"),
                base_model=said.get("general.base_model.0.name"),
            )
        else:
            found.learn(framework=_FRAMEWORKS.get(said.get("format", "")))
    elif name.endswith(".onnx"):
        found.formats.add("onnx")
    elif name.endswith(".py"):
        found.code.append(path)
    elif name in _SPEAKING and size <= _TEXT_MAX:
        file.seek(0)
        with suppress(ValueError, RecursionError, yaml.YAMLError, TypeError, AttributeError):
            _SPEAKING[name](file.read(_TEXT_MAX).decode(), found)


def _config(text: str, found: _Found) -> None:
    told = json.loads(text)
    architectures = told.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    found.learn(architecture=first or told.get("model_type"), base_model=told.get("base_model_name_or_path"))


def _adapter(text: str, found: _Found) -> None:
    told = json.loads(text)
    found.learn(framework="peft", base_model=told.get("base_model_name_or_path"))


def _readme(text: str, found: _Found) -> None:
    if not text.startswith("---\n"):
        return
    told = yaml.safe_load(text[4:].partition("\n---")[0])
    base = told.get("base_model")
    found.learn(
        licence=told.get("license"),
        framework=told.get("library_name"),
        base_model=base[0] if isinstance(base, list) and base else base,
    )


def _mlmodel(text: str, found: _Found) -> None:
    flavors = [one for one in yaml.safe_load(text).get("flavors", {}) if one != "python_function"]
    found.learn(framework=flavors[0] if flavors else "python_function")


def _metrics(text: str, found: _Found) -> None:
    for name, value in _numbers(json.loads(text)):
        found.metrics.setdefault(name, value)


def _numbers(told: object) -> Iterator[tuple[str, str]]:
    if isinstance(told, dict):
        for name, value in list(told.items())[:200]:
            if type(value) in (int, float):
                yield str(name)[:100], repr(value)


_SPEAKING: Final = {
    "config.json": _config,
    "adapter_config.json": _adapter,
    "readme.md": _readme,
    "mlmodel": _mlmodel,
    "metrics.json": _metrics,
}
