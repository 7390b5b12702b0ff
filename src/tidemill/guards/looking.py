"""What a guardrail is, and how text is looked at that comes in pieces.

A ``TextGuard`` finds pieces of text, a ``RequestGuard`` judges what is asked for beside the text. Those that come along
and those that other packages add (``guards.kinds``) are the same to all that use them;
``tidemill.testing.check_guard`` says whether one keeps the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tidemill.model.guard import Action, GuardRule

MOST_REACH = 4096
"""Characters of a stream that may be held back."""


class Found(NamedTuple):
    """A piece of text, from its first character to just before ``end``, and what it is: a word in capitals."""

    start: int
    end: int
    label: str


class Breach(NamedTuple):
    """A field of a request that is not within limits. ``within`` is what would be; None: nothing would.

    ``is_absent``: the field is not there, and is to be set to ``within`` whatever the rule's action is.
    """

    label: str
    param: str
    message: str
    within: Any = None
    is_absent: bool = False


@runtime_checkable
class TextGuard(Protocol):
    """Finds pieces of text. Made once, asked from many requests; keeps nothing of what it saw."""

    reach: int
    """The most characters that one piece has; zero: it has to see a text whole, so it cannot look at responses."""
    is_slow: bool
    """Whether it waits for something or takes long: then it is asked in a thread."""

    def find(self, text: str, start: int = 0) -> Sequence[Found]:
        """The pieces that begin at ``start`` or later, in order, none within another. Takes time linear in the text."""

    def open_from(self, text: str) -> int:
        """From where on a piece may begin, or end further on, once more text comes: at least its length - ``reach``."""


@runtime_checkable
class RequestGuard(Protocol):
    """Judges the fields of a request."""

    def judge(self, request: Mapping[str, Any], *, size: int) -> Sequence[Breach]:
        """What is not within limits in a request whose body has ``size`` bytes."""


@dataclass(frozen=True, slots=True)
class TextRule:
    """A rule whose plug-in finds text."""

    rule: GuardRule
    guard: TextGuard


class Window:
    """One text that comes in pieces, as several rules see it: what is passed on lags behind by what may yet be found.

    ``found`` counts by the rule's name and label; ``refused`` is the rule that ends it, None while there is none.
    """

    __slots__ = ("_before", "_pending", "_rules", "found", "refused")

    def __init__(self, rules: Sequence[TextRule]) -> None:
        self._rules = rules
        self._pending = ""
        self._before = ""
        """The last character that was passed on, which tells where words begin."""
        self.found: dict[str, dict[str, int]] = {}
        self.refused: GuardRule | None = None

    @property
    def seen(self) -> str:
        """What the rules are to look at, after ``add``."""
        return self._before + self._pending

    @property
    def start(self) -> int:
        """Where in ``seen`` there is text that was not passed on."""
        return len(self._before)

    def add(self, text: str) -> None:
        """More of the text."""
        self._pending += text

    def take(self, founds: Sequence[Sequence[Found]], *, is_last: bool) -> str:
        """What can be passed on now, redacted; ``founds`` is what each rule's guard found in ``seen``.

        With ``refused`` set there is nothing to pass on from there.
        """
        seen, start = self.seen, self.start
        cut = len(seen) if is_last else min([len(seen), *(one.guard.open_from(seen) for one in self._rules)])
        cut = max(cut, start)
        moved = not is_last
        while moved:  # what is found over the cut waits as a whole
            moved = False
            for found in founds:
                for piece in found:
                    if start <= piece.start < cut < piece.end:
                        cut, moved = piece.start, True
        replaced: list[Found] = []
        for one, found in zip(self._rules, founds, strict=True):
            for piece in found:
                if start <= piece.start and piece.end <= cut:
                    counts = self.found.setdefault(one.rule.name, {})
                    counts[piece.label] = counts.get(piece.label, 0) + 1
                    if one.rule.action is Action.REFUSE and self.refused is None:
                        self.refused = one.rule
                    elif one.rule.action is Action.REDACT:
                        replaced.append(piece)
        passed = _replaced(seen, start, cut, replaced)
        self._pending = seen[cut:]
        self._before = seen[cut - 1 : cut] if cut else ""
        return passed


def feed(window: Window, rules: Sequence[TextRule], text: str, *, is_last: bool) -> str:
    """What can be passed on of a text that goes on with ``text``, when none of the rules is slow."""
    window.add(text)
    seen, start = window.seen, window.start
    return window.take([one.guard.find(seen, start) for one in rules], is_last=is_last)


def _replaced(text: str, start: int, end: int, pieces: Sequence[Found]) -> str:
    """The text from ``start`` to ``end`` with each piece replaced by its label; of those that overlap, the first."""
    if not pieces:
        return text[start:end]
    parts = []
    for piece in sorted(pieces, key=lambda one: (one.start, -one.end)):
        if piece.end <= start:
            continue
        if piece.start >= start:
            parts += [text[start : piece.start], f"[{piece.label}]"]
        start = piece.end
    return "".join([*parts, text[start:end]])
