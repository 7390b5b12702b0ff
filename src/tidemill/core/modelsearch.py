"""The filters and orders in which MLflow's clients search its registry, as functions of values. Pure.

A filter is comparisons joined by AND: ``name = 'x'``, ``name LIKE 'x%'``, ``tags.kind != 'y'``, ``version_number > 3``,
``run_id IN ('a', 'b')``. A name may be in backticks or quotes, and begin with ``attribute.``, ``tag.`` or ``tags.``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_TOKEN: Final = re.compile(
    r"""\s*(?:
      (?P<text>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.)*")
    | (?P<number>-?\d+)
    | (?P<op><=|>=|!=|=|<|>)
    | (?P<sign>[(),])
    | (?P<word>(?:(?:attribute|attributes|tag|tags)\.)?(?:`[^`]+`|[A-Za-z_][\w.-]*))
    )""",
    re.VERBOSE,
)
_NUMERIC: Final = frozenset(("creation_timestamp", "last_updated_timestamp", "version_number"))
_ATTRIBUTES: Final = frozenset(("name", "run_id", "source_path", "source", *_NUMERIC))
_FOR_TEXT: Final = ("=", "!=", "LIKE", "ILIKE", "IN", "NOT IN")
_FOR_NUMBERS: Final = ("=", "!=", "<", "<=", ">", ">=")
_PROMPT: Final = "mlflow.prompt.is_prompt"
"""A tag that models do not have, and clients ask for to leave prompts out."""
_MAX_FILTER: Final = 4_096


@dataclass(frozen=True, slots=True)
class Found:
    """What is searched: attributes by name, and tags."""

    attributes: Mapping[str, str | int]
    tags: Mapping[str, str]


Test = Callable[[Found], bool]


def filter_of(text: str) -> Test:
    """Whether a thing is what the filter asks for. Raises: ValueError that says what cannot be understood.

    >>> one = Found({"name": "tiny", "version_number": 3}, {"kind": "x"})
    >>> [filter_of(text)(one) for text in ("name ILIKE 'T%' AND tags.kind = 'x'", "version_number > 3", "")]
    [True, False, True]
    """
    tokens = _tokens(text)
    tests: list[Test] = []
    at = 0
    while at < len(tokens):
        if tests:
            if tokens[at] != ("word", "AND"):
                raise ValueError(f"AND is expected, and not {tokens[at][1]!r}")
            at += 1
        test, at = _comparison(tokens, at)
        tests.append(test)
    return lambda found: all(test(found) for test in tests)


def order_of(clauses: Sequence[str], known: Sequence[str]) -> Callable[[list[Found]], list[Found]]:
    """What puts things in the order that is asked for, such as ``["name ASC"]``. Raises: ValueError.

    >>> things = [Found({"name": name}, {}) for name in "bca"]
    >>> [str(one.attributes["name"]) for one in order_of(["name DESC"], ("name",))(things)]
    ['c', 'b', 'a']
    """
    keys: list[tuple[str, bool]] = []
    for clause in clauses:
        words = clause.replace("`", "").split()
        name = words[0].removeprefix("attribute.").removeprefix("attributes.") if words else ""
        way = words[1].upper() if len(words) == 2 else "ASC"
        if name not in known or way not in ("ASC", "DESC") or len(words) > 2:
            raise ValueError(f"{clause[:100]!r} is no order; use one of {', '.join(known)} and ASC or DESC")
        keys.append((name, way == "DESC"))

    def ordered(things: list[Found]) -> list[Found]:
        for name, is_reversed in reversed(keys):
            things = sorted(things, key=_key_of(name), reverse=is_reversed)
        return things

    return ordered


def _key_of(name: str) -> Callable[[Found], tuple[int, str]]:
    """What things are ordered by: a number, or a text."""

    def key(found: Found) -> tuple[int, str]:
        value = found.attributes[name]
        return (value, "") if isinstance(value, int) else (0, value)

    return key


def _tokens(text: str) -> list[tuple[str, str]]:
    if len(text) > _MAX_FILTER:
        raise ValueError(f"the filter has over {_MAX_FILTER:,} characters")
    found: list[tuple[str, str]] = []
    at, text = 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text[at : at + 40].strip()!r} cannot be understood")
        kind, value = str(match.lastgroup), match[str(match.lastgroup)]
        if kind == "word" and value.upper() in ("AND", "LIKE", "ILIKE", "IN", "NOT"):
            value = value.upper()
        found.append((kind, value))
        at = match.end()
    return found


def _comparison(tokens: list[tuple[str, str]], at: int) -> tuple[Test, int]:
    """The test of the comparison that begins there, and where it ends."""
    is_tag, name = _subject(*_take(tokens, at))
    kind, op = _take(tokens, at + 1)
    at += 2
    if (kind, op) == ("word", "NOT"):
        op, at = f"NOT {_take(tokens, at)[1]}", at + 1
    is_number = not is_tag and name in _NUMERIC
    allowed = _FOR_NUMBERS if is_number else _FOR_TEXT
    if op not in allowed:
        raise ValueError(f"{name} cannot be compared by {op!r}; use one of {', '.join(allowed)}")
    if op in ("IN", "NOT IN"):
        values, at = _list(tokens, at)
        return _within(name, is_tag, values, negated=op == "NOT IN"), at
    kind, value = _take(tokens, at)
    if kind != ("number" if is_number else "text"):
        raise ValueError(
            f"{name} is compared with {value!r}, which is no {'number' if is_number else 'text in quotes'}"
        )
    test = _numbers(name, op, int(value)) if is_number else _texts(name, is_tag, op, _unquoted(value))
    return test, at + 1


def _take(tokens: list[tuple[str, str]], at: int) -> tuple[str, str]:
    if at >= len(tokens):
        raise ValueError("the filter ends too early")
    return tokens[at]


def _subject(kind: str, word: str) -> tuple[bool, str]:
    """Whether a tag is meant, and its name or that of the attribute."""
    if kind == "text":
        word = _unquoted(word)
    elif kind != "word":
        raise ValueError(f"{word!r} is no name")
    place, dot, rest = word.partition(".")
    if dot and place in ("tag", "tags"):
        return True, rest.strip('`"')
    name = (rest if dot and place in ("attribute", "attributes") else word).strip('`"')
    if name not in _ATTRIBUTES:
        raise ValueError(f"{name[:100]!r} cannot be searched for; use {', '.join(sorted(_ATTRIBUTES))} or tags.NAME")
    return False, "source" if name == "source_path" else name


def _list(tokens: list[tuple[str, str]], at: int) -> tuple[frozenset[str], int]:
    if _take(tokens, at) != ("sign", "("):
        raise ValueError("IN is followed by texts in brackets")
    values = []
    while True:
        kind, value = _take(tokens, at + 1)
        if kind != "text":
            raise ValueError(f"{value!r} in brackets is no text in quotes")
        values.append(_unquoted(value))
        sign = _take(tokens, at + 2)
        at += 2
        if sign == ("sign", ")"):
            return frozenset(values), at + 1
        if sign != ("sign", ","):
            raise ValueError(f"{sign[1]!r} in brackets is no comma")


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    return re.sub(r"\\(.)", r"\1", inner.replace("''", "'") if text[0] == "'" else inner)


def _value(found: Found, name: str, is_tag: bool) -> str | None:
    if is_tag:
        return found.tags.get(name)
    value = found.attributes.get(name)
    return None if value is None else str(value)


def _within(name: str, is_tag: bool, values: frozenset[str], *, negated: bool) -> Test:
    def test(found: Found) -> bool:
        value = _value(found, name, is_tag)
        return value is not None and (value in values) is not negated

    return test


def _texts(name: str, is_tag: bool, op: str, wanted: str) -> Test:
    pattern = re.compile(
        "".join(".*" if sign == "%" else "." if sign == "_" else re.escape(sign) for sign in wanted),
        re.DOTALL | (re.IGNORECASE if op == "ILIKE" else re.NOFLAG),
    )

    def test(found: Found) -> bool:
        value = _value(found, name, is_tag)
        if value is None:
            return is_tag and name == _PROMPT and (op, wanted) in (("=", "false"), ("!=", "true"))
        if op in ("=", "!="):
            return (value == wanted) is (op == "=")
        return pattern.fullmatch(value) is not None

    return test


def _numbers(name: str, op: str, wanted: int) -> Test:
    def test(found: Found) -> bool:
        value = found.attributes.get(name)
        if not isinstance(value, int):
            return False
        return {
            "=": value == wanted,
            "!=": value != wanted,
            "<": value < wanted,
            "<=": value <= wanted,
            ">": value > wanted,
            ">=": value >= wanted,
        }[op]

    return test
