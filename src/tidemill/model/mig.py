"""How a device can be cut into MIG slices: profiles, their sizes, and where each may begin.

A device has eight slices of memory (some have four); a profile takes ``size`` of them from one of its ``starts`` on.
Positions say it all: the seven slices of compute never run out before the positions do. The media engines are one
position more, after the slices: a profile with ``+me`` takes it too, so a device has one of those at a time.

Source: NVIDIA, Multi-Instance GPU User Guide, "Supported MIG Profiles", and the placements that
``nvidia-smi mig -lgipp`` lists for each profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

from tidemill.units import MILLI

_GIB: Final = 1024**3
SLICES: Final = 8
"""The most slices of memory of any device."""
MEDIA: Final = SLICES
"""The position of the media engines."""
POSITIONS: Final = SLICES + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A kind of slice. ``size`` and ``starts`` count slices of memory; ``milli`` is its part of the device."""

    name: str
    size: int
    starts: tuple[int, ...]
    milli: int

    @property
    def has_media(self) -> bool:
        """Whether it takes the device's media engines."""
        return self.name.endswith("+me")

    def bits(self, start: int) -> int:
        """The positions it takes from ``start`` on, as a bit mask."""
        return ((1 << self.size) - 1) << start | self.has_media << MEDIA


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """All profiles of one device model."""

    profiles: tuple[Profile, ...]
    slices: int = SLICES

    def profile(self, name: str) -> Profile | None:
        """The profile of that name, in any case of letters."""
        return next((one for one in self.profiles if one.name == name.lower()), None)


def _geometry(slices: int, *rows: tuple[str, int, tuple[int, ...]]) -> Geometry:
    profiles = tuple(
        Profile(name=name, size=size, starts=starts, milli=-(-MILLI * size // slices)) for name, size, starts in rows
    )
    return Geometry(profiles=profiles, slices=slices)


def _seven(one: str, wide: str, two: str, three: str, four: str, seven: str) -> Geometry:
    """The layout of devices with seven slices of compute; names are the profiles' memory."""
    return _geometry(
        8,
        (f"1g.{one}gb", 1, (0, 1, 2, 3, 4, 5, 6)),
        (f"1g.{one}gb+me", 1, (0, 1, 2, 3, 4, 5, 6)),
        (f"1g.{wide}gb", 2, (0, 2, 4, 6)),
        (f"2g.{two}gb", 2, (0, 2, 4)),
        (f"3g.{three}gb", 4, (0, 4)),
        (f"4g.{four}gb", 4, (0,)),
        (f"7g.{seven}gb", 8, (0,)),
    )


_TABLE: Final[tuple[tuple[str, int, Geometry], ...]] = (
    (
        "A30",
        24,
        _geometry(
            4,
            ("1g.6gb", 1, (0, 1, 2, 3)),
            ("1g.6gb+me", 1, (0, 1, 2, 3)),
            ("2g.12gb", 2, (0, 2)),
            ("2g.12gb+me", 2, (0, 2)),
            ("4g.24gb", 4, (0,)),
        ),
    ),
    ("A100", 40, _seven("5", "10", "10", "20", "20", "40")),
    ("A100", 80, _seven("10", "20", "20", "40", "40", "80")),
    ("H100", 80, _seven("10", "20", "20", "40", "40", "80")),
    ("H100", 94, _seven("12", "24", "24", "47", "47", "94")),
    ("H100", 96, _seven("12", "24", "24", "48", "48", "96")),
    ("GH200", 96, _seven("12", "24", "24", "48", "48", "96")),
    ("H200", 141, _seven("18", "35", "35", "71", "71", "141")),
    (
        "RTX-PRO-6000",
        96,
        _geometry(
            4,
            ("1g.24gb", 1, (0, 1, 2, 3)),
            ("1g.24gb+me", 1, (0, 1, 2, 3)),
            ("2g.48gb", 2, (0, 2)),
            ("4g.96gb", 4, (0,)),
        ),
    ),
    ("B200", 180, _seven("23", "45", "45", "90", "90", "180")),
    ("GB200", 186, _seven("23", "47", "47", "93", "93", "186")),
    ("B300", 288, _seven("34", "67", "67", "135", "135", "269")),
)  # fmt: skip
_TOLERANCE: Final = 0.12


@cache
def geometry_of(model: str, memory_bytes: int) -> Geometry | None:
    """How a device of that model and memory is cut; None when it cannot be, or nothing is known of it.

    >>> [profile.name for profile in geometry_of("H100-SXM", 80 * 1024**3).profiles if profile.size == 4]
    ['3g.40gb', '4g.40gb']
    """
    name = model.upper() + "-"
    size = memory_bytes / _GIB
    near = [
        (abs(gib - size), geometry)
        for prefix, gib, geometry in _TABLE
        if name.startswith(prefix + "-") and abs(gib - size) <= _TOLERANCE * gib
    ]
    return min(near, key=lambda pair: pair[0])[1] if near else None
