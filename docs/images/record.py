"""Takes the picture of the README: runs a command in a terminal of its own and draws what is on it at the end.

``python docs/images/record.py [--out FILE.svg] [COMMAND …]``; without a command, `make quickstart`. What the command
draws over itself (progress, spinners) is followed as a terminal would, so the picture is the terminal's last state.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import unicodedata
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 100, 60
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07|\x1b[=>78]|[\x00-\x1f\x7f]|[^\x00-\x1f\x7f]")
_FONT = re.compile(r"\s*@font-face \{[^}]*\}")


class Screen:
    """What has been written, line by line: characters with the colours that they were written in."""

    def __init__(self) -> None:
        self.lines: list[list[tuple[str, str]]] = [[]]
        self._row = self._column = 0
        self._style = ""

    def feed(self, text: str) -> None:
        """Write ``text`` as a terminal would, as far as command lines need it."""
        for token in _TOKEN.finditer(text):
            whole = token[0]
            if token[2]:
                self._control(token[1], token[2])
            elif whole == "\n":
                self._row += 1
            elif whole == "\r":
                self._column = 0
            elif whole == "\b":
                self._column = max(0, self._column - 1)
            elif not whole.startswith("\x1b") and ord(whole) >= 32 and ord(whole) != 127:
                self._put(whole)

    def _control(self, numbers: str, letter: str) -> None:
        first = int(numbers.split(";")[0] or 0) if numbers.replace(";", "").isdigit() or not numbers else 0
        line = self._line()
        match letter:
            case "m":
                self._style = "" if numbers in ("", "0") else f"{self._style}\x1b[{numbers}m"
            case "A":
                self._row = max(0, self._row - max(1, first))
            case "B":
                self._row += max(1, first)
            case "C":
                self._column += max(1, first)
            case "D":
                self._column = max(0, self._column - max(1, first))
            case "G":
                self._column = max(1, first) - 1
            case "K" if first == 0:
                del line[self._column :]
            case "K":
                line.clear()
            case "J":
                del line[self._column :]
                del self.lines[self._row + 1 :]

    def _put(self, character: str) -> None:
        if unicodedata.combining(character):
            return
        wide = unicodedata.east_asian_width(character) in "WF"
        if self._column + wide >= COLUMNS:
            self._row, self._column = self._row + 1, 0
        line = self._line()
        line.extend((" ", "") for _ in range(self._column + 1 - len(line)))
        line[self._column] = (character, self._style)
        self._column += 1

    def _line(self) -> list[tuple[str, str]]:
        while len(self.lines) <= self._row:
            self.lines.append([])
        return self.lines[self._row]

    def ansi(self) -> str:
        """The final state, as text with colours."""
        drawn = [
            "".join(f"{style}{''.join(c for c, _ in run)}\x1b[0m" for style, run in groupby(line, lambda cell: cell[1]))
            for line in self.lines
        ]
        return "\n".join(line.rstrip() for line in drawn).strip("\n")


def record(command: list[str]) -> tuple[int, str]:
    """The exit status of ``command`` and its terminal's last state, with colours."""
    screen, decoder = Screen(), codecs.getincrementaldecoder("utf-8")("replace")
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")
        }
        os.execvpe(command[0], command, environment | {"TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while True:
        try:
            piece = os.read(terminal, 65_536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        text = decoder.decode(piece)
        screen.feed(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen.ansi()


def draw(text: str, title: str) -> str:
    """An SVG of a terminal with that text."""
    width = max((len(Text.from_ansi(line)) for line in text.splitlines()), default=40) + 2
    with Path(os.devnull).open("w") as nowhere:
        console = Console(
            record=True, width=max(60, width), file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(Text.from_ansi(text), no_wrap=True, overflow="ignore", crop=False)
        picture = console.export_svg(title=title, unique_id="tidemill")
    return _FONT.sub("", picture)  # nothing is fetched from elsewhere when somebody looks at it


def main() -> int:
    """Record, draw, and exit as the command did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("quickstart.svg"))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    command = [word for word in given.command if word != "--"] or ["make", "quickstart"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    status, text = record(command)
    if status == 0:
        given.out.write_text(draw(f"$ {' '.join(command)}\n{text}", " ".join(command)), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
