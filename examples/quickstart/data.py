"""The corpus: the source text of the Python standard library of the machine that this runs on.

Real text that is already there, so nothing is downloaded. Byte 0 never occurs in source text and marks the start of
every file, so that a model can also be asked to begin one, and can end one.
"""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tokens import BOUNDARY, encode

HOLD_OUT_ONE_IN: Final = 20
SKIPPED_FOLDERS: Final = frozenset(
    ["test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data"]
)  # what is not library code, and two folders of tables and prose
MAX_FILE_BYTES: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training and validation tokens, split by file: no file is in both. ``size`` is the bytes of the files."""

    train: np.ndarray
    val: np.ndarray
    files: int
    size: int
    root: Path

    @property
    def tokens(self) -> int:
        """How many there are in both splits."""
        return len(self.train) + len(self.val)


def read_corpus(root: Path | None = None) -> Corpus:
    """The ``.py`` files below ``root`` (the standard library's folder when not given), in order of path.

    A file is held out when the CRC-32 of its path says so: the same files on every rank, every attempt and
    every machine with the same Python.

    Raises: FileNotFoundError when too little source text is found, as with a zipped standard library.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    size = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and (text := _read_source(path)):
            size += len(text)
            parts[is_held_out(name.as_posix())].append(bytes([BOUNDARY]) + encode(text))
    if not parts[True] or not parts[False]:
        raise FileNotFoundError(f"no Python source text to train on under {root}")
    return Corpus(
        train=np.frombuffer(b"".join(parts[False]), np.uint8),
        val=np.frombuffer(b"".join(parts[True]), np.uint8),
        files=len(parts[True]) + len(parts[False]),
        size=size,
        root=root,
    )


def is_held_out(name: str) -> bool:
    """Whether the file of this relative path belongs to the validation split."""
    return zlib.crc32(name.encode()) % HOLD_OUT_ONE_IN == 0


def train_batch(text: np.ndarray, *, seed: int, step: int, rows: int, context: int) -> np.ndarray:
    """Windows at random places, a function of (seed, step) alone: a resumed run reads what it would have.

    Shapes: (rows, context + 1); the last byte of a row is only ever a target.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - context, rows)
    return _windows(text, starts, context)


def val_batch(text: np.ndarray, *, rows: int, context: int) -> np.ndarray:
    """Windows spread evenly over the text. Shapes: (rows, context + 1)."""
    starts = np.linspace(0, len(text) - context - 1, rows).astype(np.int64)
    return _windows(text, starts, context)


def _windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def _read_source(path: Path) -> bytes:
    """The text of a source file; empty when it is unreadable, huge, or not text."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return b""
        text = path.read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if bytes([BOUNDARY]) in text else text.replace(b"\r\n", b"\n")
