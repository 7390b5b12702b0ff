"""The contract of guardrails, as a check that anybody can run against theirs: ``check_guard``.

Texts are found by Hypothesis, and made of what the guardrail is to find: the same ones every time, and of those that
show what is wrong the simplest.
"""

from __future__ import annotations

import copy
import gc
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tidemill.guards.looking import Breach, Found, RequestGuard, TextGuard, TextRule, Window, feed
from tidemill.model.guard import Action, GuardRule

_PIECES: Final = (
    " ", "  ", "\n", ".", ", ", "-", ": ", "a", "Z", "0", "42", "the mill", "@", "\u00e9", "\u00df", "\U0001f30a",
    "\u3000", "\0", "x" * 70,
)  # fmt: skip
_LONG: Final = ("a", "0 ", "x@", "a.b-c ")
"""What long texts are made of, beside what is to be found, to see how long it takes."""
_GROWTH: Final = 16
_LEAST_S: Final = 0.02
"""Below this nobody can say what a time grows like."""
_LOOKS: Final = 4
"""How often a time that has grown too much is taken before it is believed."""


def check_guard(
    make: Callable[[], TextGuard | RequestGuard], *, finds: Sequence[str] = (), examples: int = 100
) -> None:
    """Run every check of the contract against the guardrail that ``make`` gives.

    ``make`` is what the entry point of ``tidemill.guard`` names, called with options; ``finds`` are texts in each of
    which it has to find something; ``examples`` is how many cases each check looks at.

    Raises: AssertionError that says what the guardrail did, what about, and what would mend it.

    >>> from tidemill.guards.words import Words
    >>> check_guard(lambda: Words(words=["acme"]), finds=["ACME"], examples=5)
    >>> check_guard(lambda: Words(words=["acme"]), finds=["other"], examples=5)
    Traceback (most recent call last):
    AssertionError: The guardrail Words finds nothing in 'other'. Mend: find it, or say what it is for...
    """
    guard = make()
    if isinstance(guard, TextGuard):
        _check_text_guard(guard, tuple(finds), examples)
    elif isinstance(guard, RequestGuard):
        _check_request_guard(guard, examples)
    else:
        _fail(guard, "has neither find and open_from nor judge", "give it the methods of TextGuard or of RequestGuard")


def _check_text_guard(guard: TextGuard, finds: tuple[str, ...], examples: int) -> None:
    reach, is_slow = guard.reach, guard.is_slow
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
        _fail(guard, f"has reach {reach!r}", "make it a number of characters, 0 or more")
    if not isinstance(is_slow, bool):
        _fail(guard, f"has is_slow {is_slow!r}", "make it True or False")
    for text in finds:
        if not guard.find(text):
            _fail(guard, f"finds nothing in {text!r}", "find it, or say what it is for by other texts")
    texts = st.lists(st.sampled_from((*_PIECES, *finds, *finds)) | st.text(max_size=4), max_size=12).map("".join)

    @_explored(examples)
    @given(texts, st.sampled_from((0, 0, 0, 1, 2, 5, 20)))
    def pieces(text: str, start: int) -> None:
        found = guard.find(text, min(start, len(text)))
        if list(guard.find(text, min(start, len(text)))) != list(found):
            _fail(guard, f"finds in {text!r} once this and once that", "let it keep nothing of what it saw")
        _check_pieces(guard, text, min(start, len(text)), found)
        least = guard.open_from(text)
        if reach and not len(text) - reach <= least <= len(text):
            mend = f"let open_from be at least the text's length - {reach}, and at most its length"
            _fail(guard, f"says that {text!r} is open from {least}", mend)

    @_explored(examples)
    @given(texts, st.lists(st.integers(0, 200), max_size=6))
    def splits(text: str, places: list[int]) -> None:
        _check_split(guard, text, _cut(text, places))

    pieces()
    if reach:
        for text in finds:
            for at in range(1, len(text)):
                _check_split(guard, text, [text[:at], text[at:]])
        splits()
    if not is_slow:
        for text in (*finds[:2], *_LONG):
            _check_time(guard, text)


def _check_split(guard: TextGuard, text: str, pieces: list[str]) -> None:
    """A text comes out the same however it comes in."""
    whole, parts = _redacted(guard, [text]), _redacted(guard, pieces)
    if whole != parts:
        mend = "let open_from begin before all that may yet be found, and find look back at one character at most"
        _fail(guard, f"makes of {text!r} {whole!r}, and of {pieces} {parts!r}", mend)


def _check_request_guard(guard: RequestGuard, examples: int) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-10, 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    names = st.sampled_from(
        [
            "messages",
            "max_tokens",
            "n",
            "temperature",
            "top_p",
            "tools",
            "functions",
            "stream",
            "prompt",
            "input",
            "stop",
        ]
    )

    @_explored(examples)
    @given(st.dictionaries(names | st.text(max_size=6), values, max_size=6), st.integers(2, 10**8))
    def requests(request: dict[str, Any], size: int) -> None:
        before = copy.deepcopy(request)
        breaches = list(guard.judge(request, size=size))
        if request != before:
            _fail(guard, f"changes the request {before!r}", "tell what would be within limits, and change nothing")
        if list(guard.judge(request, size=size)) != breaches:
            _fail(guard, f"judges {request!r} once this way and once that", "let it keep nothing of what it saw")
        for one in breaches:
            if not isinstance(one, Breach) or not _is_label(one.label):
                _fail(guard, f"gives {one!r}", "give Breach, with a label of capitals, such as MAX_TOKENS")

    requests()


def _check_pieces(guard: TextGuard, text: str, start: int, found: Sequence[Found]) -> None:
    after = start
    for one in found:
        if not isinstance(one, Found) or not _is_label(one.label):
            _fail(guard, f"finds {one!r}", "give Found, with a label of capitals, such as EMAIL")
        if not after <= one.start < one.end <= len(text):
            mend = f"give pieces of text from {start} on, in order, none within another, none empty"
            _fail(guard, f"finds {list(found)} in {text!r} from {start}", mend)
        if guard.reach and one.end - one.start > guard.reach:
            _fail(guard, f"finds {one!r}, which is longer than its reach {guard.reach}", "make the reach as long")
        after = one.end


def _check_time(guard: TextGuard, unit: str) -> None:
    """Time grows with the text, not with its square."""
    size = 1 << 11
    while size < 1 << 16:
        few = min(_time_of(guard, unit, size) for _ in range(3))
        if few >= _LEAST_S / _GROWTH:
            many, seen = _time_of(guard, unit, size * _GROWTH), 1
            while many > _LEAST_S and many > few * _GROWTH * 4 and seen < _LOOKS:  # or was the machine busy?
                few = max(few, _time_of(guard, unit, size))
                many, seen = min(many, _time_of(guard, unit, size * _GROWTH)), seen + 1
            if seen == _LOOKS:
                _fail(
                    guard,
                    f"takes {many:.2f} s for {size * _GROWTH} characters of {unit[:40]!r}, and {few:.3f} s for {size}",
                    "read each character a bounded number of times",
                )
            return
        size *= 4


def _time_of(guard: TextGuard, unit: str, size: int) -> float:
    text = unit * (size // len(unit) + 1)
    collects = gc.isenabled()
    gc.disable()  # what else the process holds is not the guard's to pay for
    try:
        began = time.thread_time()
        guard.find(text)
        return time.thread_time() - began
    finally:
        if collects:
            gc.enable()


def _redacted(guard: TextGuard, parts: Sequence[str]) -> str:
    rules = [TextRule(GuardRule(name="checked", kind="checked", action=Action.REDACT), guard)]
    window = Window(rules)
    return "".join(feed(window, rules, part, is_last=place == len(parts) - 1) for place, part in enumerate(parts))


def _cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    return [text[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def _is_label(label: object) -> bool:
    return isinstance(label, str) and re.fullmatch(r"[A-Z][A-Z0-9_]{0,30}", label) is not None


def _explored(examples: int) -> Callable[[Callable[..., None]], Callable[[], None]]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )  # fmt: skip


def _fail(guard: object, did: str, mend: str) -> NoReturn:
    raise AssertionError(f"The guardrail {type(guard).__name__} {did}. Mend: {mend}.")
