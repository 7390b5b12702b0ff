"""How a training run looks while it runs: progress, loss curve, throughput; plain lines where no person looks.

Reads what rank 0 of the quickstart's example writes, such as
``step    120/600  loss 2.104  tokens/s 31200  elapsed 12.3s``, ``eval  loss 2.2`` and ``done …``.
"""

from __future__ import annotations

import os
import re
import sys
import time
from itertools import pairwise
from typing import Any, Self

from tidemill.cli.output import is_terminal, say, width
from tidemill.cli.running import waiting_text
from tidemill.sdk.results import Job, LogChunk
from tidemill.units import format_duration

STEP = re.compile(r"^step\s+(\d+)\s*/\s*(\d+)\b")
_FIGURE = re.compile(r"([A-Za-z][A-Za-z/_]*)\s+(-?\d[\d,]*(?:\.\d+)?)")
_PLAIN_EVERY_S = 5.0
_KEPT_LINES = 40
_BLOCKS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))


class TrainingView:
    """A live panel on a terminal, a line now and then elsewhere; use as a context manager."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.step, self.steps = 0, 0
        self.losses: list[tuple[int, float]] = []
        self.evals: list[tuple[int, float]] = []
        self.speed = 0.0
        self.last_lines: list[str] = []
        self._state = "submitting"
        self._line = ""
        self._done = ""
        self._rest: dict[tuple[int, int], str] = {}
        self._began = time.monotonic()
        self._spoke = 0.0
        self._is_quiet = is_quiet
        self._live: Any = None
        self._is_live = not is_quiet and is_terminal(sys.stdout) and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Self:
        if self._is_live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                get_renderable=self._panel, console=Console(highlight=False), refresh_per_second=8, transient=False
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None and not self._is_quiet and self.losses:
            say(f"  loss {sparkline([loss for _, loss in self.losses], 40)}")

    def job(self, job: Job) -> None:
        """Show how the job is."""
        text = waiting_text(job) or {"running": "running", "succeeded": "trained"}.get(job.state, job.state)
        if text != self._state:
            self._state = text
            self._speak(text)

    def log(self, chunk: LogChunk) -> None:
        """Read a piece of its log."""
        key = chunk.attempt, chunk.rank
        *lines, self._rest[key] = (self._rest.get(key, "") + chunk.text).split("\n")
        for line in lines:
            self.last_lines = [*self.last_lines[-_KEPT_LINES:], line]
            if chunk.rank == 0:
                self._read(line.rstrip())

    def _read(self, line: str) -> None:
        if match := STEP.match(line):
            self.step, self.steps = int(match[1]), int(match[2])
            figures = _figures(line)
            if "loss" in figures:
                self.losses.append((self.step, figures["loss"]))
            self.speed = figures.get("tokens/s", self.speed)
            self._line = ""
            if time.monotonic() - self._spoke > _PLAIN_EVERY_S or self.step == self.steps:
                self._speak(line)
        elif line.startswith("eval"):
            figures = _figures(line)
            loss = figures.get("loss", figures.get("val_loss"))
            if loss is not None:
                self.evals.append((int(figures.get("step", self.step)), loss))
            self._speak(line)
        elif line.startswith("done"):
            self._done = line
            self._speak(line)
        elif line and not self.losses:  # the environment being built, and what the program says first
            self._line = line
            self._speak(line)

    def _speak(self, line: str) -> None:
        if not self._is_live and not self._is_quiet:
            self._spoke = time.monotonic()
            say(f"  {line}")

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        columns = min(width() - 6, 72)
        passed = format_duration(int((time.monotonic() - self._began) * 1e9))
        rows: list[Any] = []
        if not self.losses:
            spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(time.monotonic() * 10) % 10]
            state = f"preparing ({self._state})" if self._line and self._state == "running" else self._state
            mark, colour = {"failed": ("✗", "red"), "cancelled": ("■", "yellow")}.get(self._state, (spinner, "cyan"))
            rows.append(Text.assemble((f"  {mark} ", colour), state, (f"  {passed}", "dim")))
            if self._line:
                rows.append(Text(f"    {self._line}", style="dim", no_wrap=True, overflow="ellipsis"))
            return Group(*rows)
        share = self.step / self.steps if self.steps else 0.0
        full = round(share * columns)
        rows.append(Text.assemble("  ", ("━" * full, "green"), ("━" * (columns - full), "bright_black")))
        last = self.losses[-1][1]
        facts = [f"step {self.step:,} of {self.steps:,}", f"loss {last:.3f}"]
        if self.evals:
            facts.append(f"eval {self.evals[-1][1]:.3f}")
        if self.speed:
            facts.append(f"{self.speed:,.0f} tokens/s")
        rows.append(Text.assemble("  ", "   ".join(facts), (f"   {passed}", "dim")))
        rows.append(Text())
        values = [loss for _, loss in self.losses]
        top, low = max(values), min(values)
        for number, line in enumerate(plot(values, round((columns - 8) * (share or 1.0)), 6)):
            label = f"{top:.2f}" if number == 0 else f"{low:.2f}" if number == 5 else ""
            rows.append(Text.assemble((f"  {label:>6} ", "dim"), (line, "cyan")))
        if self._done:
            rows.append(Text(f"  {self._done}", style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)


def _figures(line: str) -> dict[str, float]:
    """The names and numbers of a line such as ``loss 2.104  tokens/s 31200``."""
    return {name: float(number.replace(",", "")) for name, number in _FIGURE.findall(line)}


def sparkline(values: list[float], columns: int) -> str:
    """Values as one line of blocks.

    >>> sparkline([1.0, 2.0, 3.0], 3)
    '▁▅█'
    """
    shown = resampled(values, columns)
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * 7 + 1e-9)] for value in shown)


def plot(values: list[float], columns: int, rows: int) -> list[str]:
    """A curve in Braille dots, two across and four down in each character; the largest value is at the top."""
    columns = max(1, columns)
    low, span = min(values), (max(values) - min(values)) or 1.0
    grid = [[0] * columns for _ in range(rows)]
    before: int | None = None
    for place, value in enumerate(resampled(stretched(values, columns * 2), columns * 2)):
        height = round((value - low) / span * (rows * 4 - 1))
        start = height if before is None else before + (height > before) - (height < before)
        for dot in range(min(start, height), max(start, height) + 1):
            grid[rows - 1 - dot // 4][place // 2] |= _DOTS[place % 2][dot % 4]
        before = height
    return ["".join(chr(0x2800 + cell) for cell in row) for row in grid]


def stretched(values: list[float], size: int) -> list[float]:
    """At least ``size`` values, those between two given ones on the line between them."""
    if len(values) >= size or len(values) < 2:
        return list(values)
    made = []
    for place in range(size):
        where = place * (len(values) - 1) / (size - 1)
        left = min(int(where), len(values) - 2)
        made.append(values[left] + (values[left + 1] - values[left]) * (where - left))
    return made


def resampled(values: list[float], size: int) -> list[float]:
    """At most ``size`` values, each the mean of those that it stands for."""
    if len(values) <= size:
        return list(values)
    edges = [round(place * len(values) / size) for place in range(size + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
