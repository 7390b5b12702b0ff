"""Workload files: strict YAML, with errors that show where.

Three traps of YAML are closed: the same key twice is refused; only ``true`` and ``false`` are booleans, so
``retry: {on: …}`` means what it says; and under ``envs`` and ``python`` text stays as written (``3.10``).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from re import compile as pattern
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tidemill.errors import InvalidSpec, NotFound, TooLarge

MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000
_AS_WRITTEN = frozenset(("python",))


@dataclass(frozen=True)
class SpecFile:
    """A workload file: its ``spec``, what it was read from, and the line of every field (``resources.gpus``)."""

    spec: dict[str, Any]
    source: str
    folder: Path
    lines: dict[str, int] = field(default_factory=dict)

    def line_of(self, name: str) -> int:
        """The line of a field, or of the nearest one around it; zero when none is known."""
        parts = name.replace("[", ".").replace("]", "").split(".")
        while parts:
            if line := self.lines.get(".".join(parts)):
                return line
            parts.pop()
        return 0


def load(path: Path) -> SpecFile:
    """The workload in a file. Raises: NotFound, TooLarge, InvalidSpec with line, column and the line itself."""
    return parse(octets_of(path), source=str(path), folder=path.parent)


def octets_of(path: Path) -> bytes:
    """What is in a file. Raises: NotFound, InvalidSpec."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise InvalidSpec(f"{path} is a folder", mend="Name the workload file in it.") from error
    except OSError as error:
        raise InvalidSpec(f"cannot read {path}: {error.strerror}") from error


def parse(octets: bytes, *, source: str, folder: Path) -> SpecFile:
    """The workload in the octets of a file. Raises: as ``load``."""
    if len(octets) > MAX_BYTES:
        raise TooLarge(f"{source} has {len(octets)} bytes; a workload file has at most {MAX_BYTES}")
    try:
        text = octets.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise InvalidSpec(f"{source} is not a text file (UTF-8): line {line} holds other octets") from error
    if "\x00" in text:
        raise InvalidSpec(f"{source} is not a text file: it holds NUL octets")
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        shown = repr(text[error.position : error.position + 1])
        raise InvalidSpec(f"{source}:{line}: YAML does not allow the character {shown}") from error
    try:
        node = loader.get_single_node()
        if node is None:
            raise InvalidSpec(f"{source} is empty", mend='The least that it needs is a line such as "run: echo hello".')
        if not isinstance(node, MappingNode):
            raise _at(source, text, node.start_mark, "a workload is a mapping of names to values, such as run: echo hi")
        lines: dict[str, int] = {}
        _locate(node, "", lines, set())
        spec = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = (error.problem or error.context or "is not YAML").replace("found character '\\t'", "found a tab")
        raise _at(source, text, mark, problem) from error
    except RecursionError as error:
        raise InvalidSpec(f"{source} is nested too deeply") from error
    finally:
        loader.dispose()
    _count(spec, source, [_MAX_VALUES], ())
    return SpecFile(spec, source, folder, lines)


def _at(source: str, text: str, mark: Any, problem: str) -> InvalidSpec:
    if mark is None:
        return InvalidSpec(f"{source}: {problem}")
    line = (text.splitlines() or [""])[min(mark.line, max(len(text.splitlines()) - 1, 0))].expandtabs(1)
    number = f"{mark.line + 1}"
    shown, column = line, mark.column
    if len(line) > 100:
        start = max(0, column - 60)
        shown, column = line[start : start + 100], column - start
    return InvalidSpec(
        f"{source}:{mark.line + 1}:{mark.column + 1}: {problem}\n"
        f"  {number} | {shown}\n  {' ' * len(number)} | {' ' * column}^",
        line=mark.line + 1,
        column=mark.column + 1,
    )


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without its traps; see the module's docstring."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a name is text here, not a list or a mapping", key.start_mark)
            if key.value in own:
                first = own[key.value] + 1
                raise ConstructorError(
                    None, None, f"{key.value!r} is given twice; first in line {first}", key.start_mark
                )
            own[key.value] = key.start_mark.line
            if isinstance(value, ScalarNode) and key.value in _AS_WRITTEN:
                value.tag = "tag:yaml.org,2002:str"
            if isinstance(value, MappingNode) and key.value in ("env", "envs"):
                for _, inner in value.value:
                    if isinstance(inner, ScalarNode) and inner.tag != "tag:yaml.org,2002:null":
                        inner.tag = "tag:yaml.org,2002:str"
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _regexp, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _firsts = [*_first.replace("\0", ""), *([""] if "\0" in _first else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", pattern(f"^(?:{_regexp})$"), _firsts)


_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)
)


def _locate(node: Node, name: str, lines: dict[str, int], above: set[int]) -> None:
    """Note the line of every field below ``node``."""
    if id(node) in above or len(lines) > _MAX_VALUES:
        return
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                inner = f"{name}.{key.value}" if name else key.value
                lines[inner] = key.start_mark.line + 1
                _locate(value, inner, lines, above | {id(node)})
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{name}.{index}"] = value.start_mark.line + 1
            _locate(value, f"{name}.{index}", lines, above | {id(node)})


def _count(value: Any, source: str, left: list[int], above: tuple[int, ...]) -> None:
    """Raises: InvalidSpec when aliases make the file endless, or far larger than it looks."""
    left[0] -= 1
    if left[0] < 0 or id(value) in above:
        raise InvalidSpec(f"{source} repeats parts of itself too often (YAML aliases)")
    if isinstance(value, dict):
        for inner in value.values():
            _count(inner, source, left, (*above, id(value)))
    elif isinstance(value, list):
        for inner in value:
            _count(inner, source, left, (*above, id(value)))
