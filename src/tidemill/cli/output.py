"""What the terminal shows: muted colours, aligned columns, errors that say what to do. No import of rich.

Colours go to terminals only, and not when ``NO_COLOR`` is set. With ``--json`` nothing but JSON is on
standard output; notes and errors are always on standard error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from tidemill.errors import TidemillError
from tidemill.units import format_duration, format_size

_CODES = {"muted": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
STATE_COLOURS = {
    "queued": "yellow",
    "starting": "cyan",
    "running": "green",
    "stopping": "yellow",
    "succeeded": "muted",
    "failed": "red",
    "cancelled": "muted",
    "ready": "green",
    "cordoned": "yellow",
    "draining": "yellow",
    "suspect": "yellow",
    "lost": "red",
    "open": "green",
    "planned": "cyan",
}
ESTIMATED = "estimated"


def is_colourful(stream: TextIO) -> bool:
    """Whether colours belong on ``stream``."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and is_terminal(stream)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at ``stream``."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """``text`` in a colour, where colours belong."""
    if not text or colour not in _CODES or not is_colourful(stream or sys.stdout):
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def width() -> int:
    """The terminal's columns."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def say(text: str = "") -> None:
    """A line on standard output."""
    print(text)


def note(text: str, colour: str = "muted") -> None:
    """A line on standard error, apart from what the command is asked for."""
    print(paint(text, colour, sys.stderr), file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """One JSON document on standard output, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def emit_line(value: Any) -> None:
    """One line of JSON on standard output, at once."""
    print(json.dumps(value, separators=(",", ":"), ensure_ascii=False), flush=True)


def state(name: str) -> str:
    """A state, in its colour."""
    return paint(name, STATE_COLOURS.get(name, ""))


def cells(text: str) -> int:
    """How many columns ``text`` takes, colours not counted."""
    plain, inside = 0, False
    for character in text:
        if inside:
            inside = character != "m"
        elif character == "\x1b":
            inside = True
        elif not unicodedata.combining(character):
            plain += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return plain


def clip(text: str, columns: int) -> str:
    """``text`` on one line in at most ``columns``, with an ellipsis where something is left out."""
    line = " ".join(text.split())
    if cells(line) <= columns:
        return line
    while line and cells(line) > columns - 1:
        line = line[:-1]
    return line.rstrip() + "…"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, flexible: int = -1) -> None:
    """Aligned columns. On a terminal the ``flexible`` one gives way when they are too wide, and empty columns go."""
    kept = [list(row) for row in rows]
    columns = [i for i in range(len(headings)) if any(row[i] for row in kept)] or list(range(len(headings)))
    widths = {i: max([cells(headings[i]), *(cells(row[i]) for row in kept)]) for i in columns}
    if is_terminal(sys.stdout) and flexible in widths:
        over = sum(widths.values()) + 2 * (len(columns) - 1) - width()
        if over > 0:
            widths[flexible] = max(8, widths[flexible] - over)
    say(paint("  ".join(_pad(headings[i].upper(), widths[i]) for i in columns).rstrip(), "muted"))
    for row in kept:
        line = [_pad(clip(row[i], widths[i]) if i == flexible else row[i], widths[i]) for i in columns]
        say("  ".join(line).rstrip())


def facts(rows: Iterable[tuple[str, str]], *, indent: int = 2) -> None:
    """Names and values in two aligned columns; rows without a value are left out."""
    kept = [(name, value) for name, value in rows if value]
    left = max((cells(name) for name, _ in kept), default=0)
    for name, value in kept:
        first, *more = value.splitlines()
        say(f"{' ' * indent}{paint(_pad(name, left), 'muted')}  {first}")
        for line in more:
            say(f"{' ' * (indent + left + 2)}{line}")


def _pad(text: str, columns: int) -> str:
    return text + " " * (columns - cells(text))


def age(since_ns: int) -> str:
    """How long ago an instant was; empty when there is none."""
    return format_duration(max(0, time.time_ns() - since_ns)) if since_ns else ""


def clock(at_ns: int) -> str:
    """An instant in local time; empty when there is none."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ns / 1e9)) if at_ns else ""


def until(at_ns: int) -> str:
    """An instant to come, in how long and when: ``in 2h 10m (14:30:00)``; ``now`` when it is not to come."""
    left = at_ns - time.time_ns()
    if left <= 0:
        return "now"
    is_today = time.localtime(at_ns / 1e9)[:3] == time.localtime()[:3]
    return f"in {format_duration(left)} ({clock(at_ns)[11 if is_today else 0 :]})"


def resources(value: Any) -> str:
    """What a worker holds, in a few words: ``2×H100 80GB, 8 CPU, 64 GB``."""
    if not isinstance(value, dict):
        return ""
    parts = []
    gpus = value.get("gpus")
    if isinstance(gpus, dict):
        share = int(gpus.get("milli", 1000))
        count = f"{share / 1000:g}" if share < 1000 else str(gpus.get("count", 1))
        parts.append(f"{count}×{gpus.get('model') or 'GPU'}")
    elif gpus and str(gpus).lower() != "none":
        parts.append(f"GPU {gpus}")
    cpu_milli = value.get("cpu_milli")
    cpus = cpu_milli / 1000 if isinstance(cpu_milli, int) else value.get("cpus")
    if cpus:
        parts.append(f"{float(cpus):g} CPU")
    memory = value.get("memory_bytes", value.get("memory"))
    if memory:
        parts.append(format_size(memory) if isinstance(memory, int) else str(memory))
    return ", ".join(parts)


def count(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_error(error: TidemillError, *, lines: Any = None, source: str = "") -> None:
    """An error on standard error: what is wrong with which value, and how to mend it.

    ``lines`` finds the line of a field in the file ``source``, where the spec came from one.
    """
    source = source or str(error.data.get("source", ""))
    several = [item for item in error.data.get("errors") or () if isinstance(item, dict)]
    found = several or [{"field": error.field, "value": error.value, "detail": error.detail, "mend": error.mend}]
    for item in found:
        name = str(item.get("field") or "")
        line = item.get("line") or (lines(name) if lines is not None and name else 0)
        where = f"{source}:{line}: " if line else ""
        subject = f"{name}: " if name and name not in str(item.get("detail", ""))[: len(name) + 2] else ""
        value = item.get("value")
        is_told = value in (None, "") or str(value) in re.findall(r"[^\s'\"]+", str(item.get("detail", "")))
        got = "" if is_told else f" (got {clip(repr(value), 80)})"
        print(f"{paint('error:', 'red', sys.stderr)} {where}{subject}{item.get('detail', '')}{got}", file=sys.stderr)
        mend = item.get("mend")
        if mend:
            print(f"  {paint(str(mend), 'cyan', sys.stderr)}", file=sys.stderr)
    sys.stderr.flush()
