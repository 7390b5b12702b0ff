"""Integer units, and the only places where they are read from and written as text.

Time is nanoseconds, money micro-USD, energy millijoules, carbon milligrams of CO2e, GPU and CPU shares
thousandths, sizes bytes. Integers add up exactly; floats appear only where a person reads a figure.
"""

from __future__ import annotations

import re
from typing import Final

SECOND_NS: Final = 1_000_000_000
MINUTE_NS: Final = 60 * SECOND_NS
HOUR_NS: Final = 3_600 * SECOND_NS
DAY_NS: Final = 24 * HOUR_NS
MILLI: Final = 1_000
"""One whole GPU or one whole CPU core, in thousandths."""
USD_MICRO: Final = 1_000_000
MICRO_PICO: Final = 1_000_000
"""A micro-USD in pico-USD, in which tokens are priced: one alone costs less than a micro-USD."""
WATT_HOUR_MJ: Final = 3_600_000
KILOWATT_HOUR_MJ: Final = 1_000 * WATT_HOUR_MJ

_DURATION_UNITS: Final = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": SECOND_NS,
    "m": MINUTE_NS,
    "h": HOUR_NS,
    "d": DAY_NS,
    "w": 7 * DAY_NS,
}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h|d|w)")
_BANDWIDTH: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGTm]?)(?:bps|bit/s|b/s)")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?", re.IGNORECASE)
_SIZE_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def parse_duration(text: str | int) -> int:
    """The nanoseconds in a duration such as ``90s``, ``1h30m`` or ``2d``; a bare integer means seconds.

    Raises: ValueError with a sentence that says what is accepted.

    >>> parse_duration("1h30m") == 90 * MINUTE_NS
    True
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 15m, 2h or 1h30m")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is negative; a duration is zero or more")
        return text * SECOND_NS
    compact = text.strip().replace(" ", "")
    if compact.isdigit():
        return int(compact) * SECOND_NS
    parts = _DURATION_PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 15m, 2h or 1h30m")
    return sum(_scaled(number, _DURATION_UNITS[unit]) for number, unit in parts)


def parse_size(text: str | int) -> int:
    """The bytes in a size such as ``2GB``, ``512MiB`` or ``1.5T``; a bare integer means bytes.

    Sizes count in powers of 1024 with and without the ``i``, as GPU and memory sizes are quoted.
    Raises: ValueError with a sentence that says what is accepted.

    >>> parse_size("2GB") == 2 * 1024**3
    True
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"{text!r} is not a size; write for example 512MB, 16GB or 1.5TB")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is negative; a size is zero or more")
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 512MB, 16GB or 1.5TB")
    return _scaled(match[1], 1024 ** _SIZE_POWERS[match[2].upper()])


def parse_bandwidth(text: str) -> int:
    """The bits a second in a bandwidth such as ``1Gbps``, ``200Mbit/s`` or ``1.5Gb/s``.

    Raises: ValueError with a sentence that says what is accepted.

    >>> parse_bandwidth("1.5Gbps")
    1500000000
    """
    match = _BANDWIDTH.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a bandwidth; write for example 100Mbps or 10Gbps")
    return _scaled(match[1], 1000 ** "_kmgt".index(match[2].lower() or "_"))


def format_bandwidth(bits_per_s: int) -> str:
    """A bandwidth for people.

    >>> format_bandwidth(1_500_000_000)
    '1.5 Gbps'
    """
    value = float(bits_per_s)
    for unit in ("bps", "kbps", "Mbps", "Gbps"):
        if value < 1000:
            return f"{value:g} {unit}"
        value /= 1000
    return f"{value:g} Tbps"


def _scaled(number: str, factor: int) -> int:
    """``number * factor`` without passing through binary floating point."""
    whole, _, fraction = number.partition(".")
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def format_duration(ns: int) -> str:
    """A duration for people: two most significant units, down to tenths of a second.

    >>> format_duration(90 * SECOND_NS)
    '1m 30s'
    """
    if ns < 0:
        return "-" + format_duration(-ns)
    if ns < SECOND_NS:
        return f"{ns / 1e6:.0f} ms"
    if ns < MINUTE_NS:
        return f"{ns / 1e9:.1f} s"
    seconds = ns // SECOND_NS
    if ns < HOUR_NS:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if ns < DAY_NS:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def format_size(size: int) -> str:
    """A size for people, in the unit that keeps it under 1024.

    >>> format_size(80 * 1024**3)
    '80 GB'
    """
    value = float(size)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PB"


def format_usd(micro: int) -> str:
    """Money for people: cents from a dollar up, and enough places below that a price is never shown as zero.

    >>> format_usd(1_234_567)
    '$1.23'
    """
    sign = "-" if micro < 0 else ""
    value = abs(micro) / USD_MICRO
    if micro == 0:
        return "$0.00"
    return f"{sign}${value:,.2f}" if value >= 1 else f"{sign}${value:.6f}".rstrip("0")


def format_energy(mj: int) -> str:
    """Energy for people, in Wh or kWh.

    >>> format_energy(5 * WATT_HOUR_MJ)
    '5.00 Wh'
    """
    watt_hours = mj / WATT_HOUR_MJ
    if watt_hours >= 1000:
        return f"{watt_hours / 1000:,.2f} kWh"
    return f"{watt_hours:.2f} Wh" if watt_hours >= 1 else f"{watt_hours:.3g} Wh"


def format_carbon(mg: int) -> str:
    """Carbon for people, in grams or kilograms of CO2e.

    >>> format_carbon(2_500)
    '2.50 g CO2e'
    """
    grams = mg / 1000
    if grams >= 1000:
        return f"{grams / 1000:,.2f} kg CO2e"
    return f"{grams:.2f} g CO2e" if grams >= 1 else f"{grams:.3g} g CO2e"
