"""Checkpoints and models on disk: NumPy archives with a JSON header, written whole or not at all. No pickle."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

KEPT: Final = 2
_HEADER: Final = "__header__"

Arrays = dict[str, np.ndarray]


class CheckpointDamagedError(Exception):
    """The file is not a whole checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint as it was saved."""

    header: dict[str, Any]
    arrays: Arrays
    path: Path


def save(folder: Path, step: int, header: Mapping[str, Any], arrays: Arrays) -> Path:
    """The path of the new checkpoint, written before others are removed: later steps (a damaged file that was
    passed over, which must not outlive its replacement) and all but the newest ``KEPT``.
    """
    path = folder / f"step-{step:08d}.npz"
    write_archive(path, header, arrays)
    files = _newest_first(folder)
    earlier = [file for file in files if file.name <= path.name][:KEPT]
    for file in files:
        if file not in earlier:
            file.unlink(missing_ok=True)
    return path


def restore(folder: Path) -> tuple[Saved | None, tuple[Path, ...]]:
    """The newest whole checkpoint (None: there is none), and the newer damaged files that were passed over."""
    damaged: list[Path] = []
    for path in _newest_first(folder):
        try:
            header, arrays = read_archive(path)
        except CheckpointDamagedError:
            damaged.append(path)
        else:
            return Saved(header=header, arrays=arrays, path=path), tuple(damaged)
    return None, tuple(damaged)


def write_archive(path: Path, header: Mapping[str, Any], arrays: Arrays) -> None:
    """Write to a temporary file, make it durable, rename it: a reader sees the old file or the whole new one."""
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    named: dict[str, Any] = {_HEADER: text, **arrays}
    write_atomically(path, lambda file: np.savez(file, **named))


def read_archive(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The header and the arrays. Raises: CheckpointDamagedError (the zip's CRC-32 covers every byte of both)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return json.loads(arrays.pop(_HEADER).tobytes()), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointDamagedError(f"{path}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document, whole or not at all."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and put it in place, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.npz"), reverse=True)
