"""What a worker asks for, and the GPU mini-language in which people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tidemill.units import MILLI, format_size, parse_size

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9 ._/-]*")
_COUNT: Final = re.compile(r"\d+")
_FRACTION: Final = re.compile(r"0*\.\d+")
_PROFILE: Final = re.compile(r"\d+g\.\d+gb(\+me)?", re.IGNORECASE)
_SHARE: Final = re.compile(r"share\s+(\d+(?:\.\d+)?\s*[KMGT]i?B)", re.IGNORECASE)
_MEMORY: Final = re.compile(r"\d+(?:\.\d+)?\s*[KMGT]i?B(?:\+|\.\.(?:\d+(?:\.\d+)?\s*[KMGT]i?B)?)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """GPUs for one worker: ``count`` whole ones, or a share of one (``milli`` under 1000, then ``count`` is 1).

    ``model`` empty means any. ``memory_max_bytes`` zero means no upper bound. ``share_bytes`` asks for that much of one
    GPU's memory, and so for as many thousandths of it as that is there; ``milli`` is then an upper bound only.
    ``profile`` asks for ``count`` MIG slices of that kind (``1g.10gb``). Units: milli-GPU, bytes.
    """

    count: int = 1
    milli: int = MILLI
    model: str = ""
    memory_min_bytes: int = 0
    memory_max_bytes: int = 0
    share_bytes: int = 0
    profile: str = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.count} GPUs cannot be asked for; leave gpus out, or write none, for no GPU")
        if not 0 < self.milli <= MILLI:
            raise ValueError("a share of a GPU lies between 0.001 and 1")
        if self.milli < MILLI and self.count != 1:
            raise ValueError("a share is of one GPU; ask for whole GPUs to have several")
        if self.memory_max_bytes and self.memory_max_bytes < self.memory_min_bytes:
            raise ValueError("the memory range ends before it begins; write the smaller size first")
        if self.share_bytes and (self.count != 1 or self.milli != MILLI or self.profile):
            raise ValueError("a share by memory is of one GPU, without a count, a share or a MIG profile beside it")
        if self.profile and self.milli != MILLI:
            raise ValueError("a MIG slice is whole; ask for a smaller profile instead of a share of one")

    @property
    def is_whole(self) -> bool:
        """Whether it is for whole GPUs."""
        return self.milli == MILLI and not self.share_bytes and not self.profile

    @property
    def total_milli(self) -> int:
        """All of the request in thousandths of a GPU."""
        return self.count * self.milli

    def __str__(self) -> str:
        parts = [self.model] if self.model else []
        if self.memory_max_bytes == self.memory_min_bytes and self.memory_min_bytes:
            parts.append(_compact(self.memory_min_bytes))
        elif self.memory_max_bytes:
            parts.append(f"{_compact(self.memory_min_bytes)}..{_compact(self.memory_max_bytes)}")
        elif self.memory_min_bytes:
            parts.append(f"{_compact(self.memory_min_bytes)}+")
        if self.profile:
            parts.append(self.profile)
        if self.share_bytes:
            parts.append(f"share {_compact(self.share_bytes)}")
        else:
            parts.append(str(self.count) if self.milli == MILLI else f"{self.milli / MILLI:g}")
        return ":".join(parts)


def _compact(size: int) -> str:
    return format_size(size).replace(" ", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one worker holds: GPUs or none, milli-CPU, bytes of memory and of scratch disk."""

    gpus: GpuRequest | None = None
    cpu_milli: int = MILLI
    memory_bytes: int = 0
    disk_bytes: int = 0

    def __post_init__(self) -> None:
        if self.cpu_milli <= 0:
            raise ValueError("a worker needs some CPU; write for example cpus: 1 or cpus: 0.5")
        if self.memory_bytes < 0 or self.disk_bytes < 0:
            raise ValueError("memory and disk are zero or more")


def parse_gpus(text: str | int | float | None) -> GpuRequest | None:
    """The request behind ``H100:80GB:8``, ``24GB+:2``, ``24GB..40GB``, ``A100``, ``0.5``, ``4`` or ``none``.

    Parts are separated by colons: a model, a memory size or range, a MIG profile (``1g.10gb``), and a count, a share
    of one GPU, or ``share 10GB`` of one GPU's memory; each may be left out. A size alone asks for that much or more
    when it has a ``+`` or stands without a model, exactly that size when it follows a model (``A100:80GB``).
    Raises: ValueError with a sentence that names the part that is wrong.

    >>> str(parse_gpus("H100:80GB:8"))
    'H100:80GB:8'
    """
    if text is None or (isinstance(text, str) and text.strip().lower() in ("none", "0", "")):
        return None
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"{text!r} is not a GPU request; {_GRAMMAR}")
    if text == 0:
        return None
    model, memory_min, memory_max, count, milli = "", 0, 0, None, MILLI
    profile, share = "", 0
    for part in (piece.strip() for piece in str(text).split(":")):
        if _PROFILE.fullmatch(part) and not profile:
            profile = part.lower()
        elif (match := _SHARE.fullmatch(part)) and not share:
            share = parse_size(match[1])
        elif _MEMORY.fullmatch(part) and not memory_min and not memory_max:
            memory_min, memory_max = _memory_range(part, exact=bool(model))
        elif (_COUNT.fullmatch(part) or _FRACTION.fullmatch(part)) and count is None:
            count, milli = _count_or_share(part)
        elif _NAME.fullmatch(part) and not model:
            model = part
        else:
            raise ValueError(f"{part!r} in {str(text)!r} is not a GPU model, memory size or count; {_GRAMMAR}")
    return GpuRequest(
        count=1 if count is None else count,
        milli=milli,
        model=model,
        memory_min_bytes=memory_min,
        memory_max_bytes=memory_max,
        share_bytes=share,
        profile=profile,
    )


_GRAMMAR: Final = "write for example H100:80GB:8, 24GB+:2, A100:4, 0.5, share 10GB, 1g.10gb or none"


def _memory_range(part: str, *, exact: bool) -> tuple[int, int]:
    if part.endswith("+"):
        return parse_size(part[:-1]), 0
    low, dots, high = part.partition("..")
    if dots:
        return parse_size(low), parse_size(high) if high else 0
    size = parse_size(low)
    return size, size if exact else 0


def _count_or_share(part: str) -> tuple[int, int]:
    if _COUNT.fullmatch(part):
        return int(part), MILLI
    milli = round(float(part) * MILLI)
    if milli == 0:
        raise ValueError(f"a share of {part} GPU is too small; the smallest is 0.001")
    return 1, milli
