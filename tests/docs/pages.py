"""The pages of the documentation as data: their blocks, what is said of them, and their links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[a-z]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
_FILE = re.compile(r"\A# (?P<name>[\w./-]+\.(?:ya?ml|py|sh))\n")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is where its fence is; ``not_run`` the reason given for not running it."""

    page: Path
    line: int
    language: str
    body: str
    not_run: str

    @property
    def file_name(self) -> str:
        """The file that the block is said to be by its first line, empty when it is none."""
        match = _FILE.match(self.body)
        return match["name"] if match else ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Step:
    """One command of a console block and the output that the page shows for it."""

    line: int
    command: str
    output: str


def all_pages() -> list[Path]:
    """Every page for people, in a fixed order."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, from the top."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        said = _NOT_RUN.search(before)
        indent = len(match["indent"])
        body = "".join(line[indent:] if line.strip() else "\n" for line in match["body"].splitlines(keepends=True))
        yield Block(page, before.count("\n") + 1, match["language"], body, said["reason"].strip() if said else "")


def steps_of(block: Block) -> Iterator[Step]:
    """The commands of a console block; lines that begin with ``> `` go on with the command above."""
    command: list[str] = []
    output: list[str] = []
    start = block.line
    for number, line in enumerate(block.body.splitlines(), block.line + 1):
        if line.startswith("$ "):
            if command:
                yield Step(start, "\n".join(command), "\n".join(output))
            command, output, start = [line[2:]], [], number
        elif line.startswith("> ") and command and not output:
            command.append(line[2:])
        elif command:
            output.append(line)
        elif line.strip():
            raise AssertionError(f"{block}: a console block begins with a command: $ …")
    if command:
        yield Step(start, "\n".join(command), "\n".join(output))


def links_of(page: Path) -> Iterator[str]:
    """The targets of links and images of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in _LINK.finditer(text):
        yield match["target"] or match["image"]


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
