"""Kinds of guardrails by name: those that come along, and those that other packages add by entry point.

The group is ``tidemill.guard``; an entry point's value is called with a rule's options and gives a ``TextGuard`` or a
``RequestGuard``. ``tidemill.testing.check_guard`` says whether one keeps the rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from tidemill.errors import InvalidRequest
from tidemill.guards.classifier import Classifier
from tidemill.guards.limits import Limits
from tidemill.guards.looking import MOST_REACH, RequestGuard, TextGuard
from tidemill.guards.personal import Personal
from tidemill.guards.presidio import Presidio
from tidemill.guards.words import Injections, Patterns, Words
from tidemill.model.guard import Action, GuardRule, Stage

Guard = TextGuard | RequestGuard
GROUP: Final = "tidemill.guard"
_BUILT_IN: Final[Mapping[str, Callable[..., Guard]]] = {
    "limits": Limits,
    "words": Words,
    "patterns": Patterns,
    "pii": Personal,
    "presidio": Presidio,
    "injection": Injections,
    "classifier": Classifier,
}


def kind_names() -> tuple[str, ...]:
    """Every kind there is."""
    return (*_BUILT_IN, *sorted(_added()))


def guard_of(rule: GuardRule, *, field: str = "") -> Guard:
    """What looks for that rule.

    Raises: InvalidRequest, whose field is below ``field``, when there is no such kind, or its options are wrong.
    """
    make = _BUILT_IN.get(rule.kind) or _added().get(rule.kind)
    below = f"{field}." if field else ""
    if make is None:
        near = difflib.get_close_matches(rule.kind, kind_names(), 1)
        raise InvalidRequest(
            f"There is no guardrail of the kind {rule.kind!r}.",
            field=f"{below}kind",
            value=rule.kind,
            mend=f"Did you mean {near[0]}?" if near else f"Kinds are {', '.join(kind_names())}.",
        )
    try:
        guard = make(**rule.options)
    except (TypeError, ValueError) as error:
        name, _, told = str(error).partition(": ")
        told, _, mend = (told if name in rule.options else str(error)).partition(" Mend: ")
        value = rule.options.get(name)
        raise InvalidRequest(
            f"{told.removesuffix('.')}.",
            field=f"{below}{name}" if name in rule.options else field,
            value=value if isinstance(value, str | int | float) or value is None else repr(value)[:80],
            mend=f"{mend.removesuffix('.').capitalize()}." if mend else "",
        ) from error
    _check(rule, guard, below)
    return guard


def _check(rule: GuardRule, guard: Guard, below: str) -> None:
    """Raises: InvalidRequest when the rule asks of its plug-in what that cannot do."""
    if not isinstance(guard, TextGuard):
        if Stage.RESPONSE in rule.on:
            raise InvalidRequest(
                f"The kind {rule.kind} judges requests.",
                field=f"{below}on",
                value="response",
                mend="Write on: request.",
            )
        return
    if not guard.reach and Stage.RESPONSE in rule.on:
        mend = "Write on: request."
        raise InvalidRequest(
            f"The kind {rule.kind} has to see a text whole, which an answer that streams is not.",
            field=f"{below}on", value="response", mend=mend,
        )  # fmt: skip
    if guard.reach > MOST_REACH:
        raise InvalidRequest(
            f"The kind {rule.kind} looks {guard.reach} characters far; {MOST_REACH} are held back at most.",
            field=below.removesuffix("."), value=None, mend="Give it shorter words or expressions.",
        )  # fmt: skip
    if rule.action is Action.REDACT and not guard.reach and rule.kind != "injection":
        raise InvalidRequest(
            f"The kind {rule.kind} finds a text as a whole, of which nothing would be left.",
            field=f"{below}action", value="redact", mend="Write action: refuse, or flag.",
        )  # fmt: skip


def _added() -> dict[str, Callable[..., Guard]]:
    return {point.name: partial(_made, point) for point in entry_points(group=GROUP)}


def _made(point: EntryPoint, **options: Any) -> Guard:
    guard: Guard = point.load()(**options)
    return guard
