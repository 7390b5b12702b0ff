"""Rules as settings and workload files write them: a list of sections, each with its kind and that kind's options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tidemill.errors import InvalidRequest
from tidemill.guards.kinds import guard_of, kind_names
from tidemill.model.guard import MOST_RULES, Action, GuardRule, Stage

_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
_STAGES: Final = {"request": (Stage.REQUEST,), "response": (Stage.RESPONSE,), "both": (Stage.REQUEST, Stage.RESPONSE)}
_MOST_OPTIONS: Final = 1024 * 1024


def rules_of(told: object, *, field: str = "guards", is_general: bool = False) -> tuple[GuardRule, ...]:
    """The rules that a list of sections describes; ``is_general``: they may say for which projects and models they are.

    Raises: InvalidRequest that names the field, the value and the mend.

    >>> rules_of([{"kind": "pii", "action": "redact", "on": "both"}])[0].name
    'pii'
    >>> rules_of([{"kind": "words", "worsd": ["x"]}])
    Traceback (most recent call last):
    tidemill.errors.InvalidRequest: ...
    """
    if told is None:
        return ()
    if not isinstance(told, list | tuple):
        raise _wrong("It is a list of guardrails.", field, told, "Write for example: - {kind: pii, action: redact}.")
    if len(told) > MOST_RULES:
        raise _wrong(f"There are {len(told)} guardrails.", field, None, f"Write at most {MOST_RULES}.")
    rules: list[GuardRule] = []
    for place, one in enumerate(told):
        rules.append(_rule(one, f"{field}[{place}]", {rule.name for rule in rules}, is_general=is_general))
    return tuple(rules)


def written(rule: GuardRule) -> dict[str, Any]:
    """The section that describes a rule."""
    section: dict[str, Any] = {"name": rule.name, "kind": rule.kind, "action": rule.action.value}
    section["on"] = next(name for name, stages in _STAGES.items() if stages == rule.on)
    return (
        section
        | {name: list(value) for name, value in (("projects", rule.projects), ("models", rule.models)) if value}
        | dict(rule.options)
    )


def _rule(told: object, field: str, names: set[str], *, is_general: bool) -> GuardRule:
    if not isinstance(told, Mapping) or not all(isinstance(key, str) for key in told):
        raise _wrong("A guardrail is a section.", field, told, "Write for example: {kind: pii, action: redact}.")
    options = dict(told)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise _wrong("It does not say what kind it is.", f"{field}.kind", kind, f"Kinds are {', '.join(kind_names())}.")
    name = options.pop("name", None)
    if name is None:
        name = next(one for n in range(1, MOST_RULES + 2) if (one := kind if n == 1 else f"{kind}-{n}") not in names)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong("It is no name.", f"{field}.name", name, "Use up to 63 letters, digits, - _ or .")
    if name in names:
        raise _wrong("Another guardrail has that name.", f"{field}.name", name, "Give each its own.")
    action = options.pop("action", Action.REFUSE.value)
    if action not in {one.value for one in Action}:
        mend = f"Actions are {', '.join(one.value for one in Action)}."
        raise _wrong("There is no such action.", f"{field}.action", action, mend)
    stages = options.pop("on", "request")
    if isinstance(stages, list | tuple):
        both = {str(one) for one in stages} == {"request", "response"}
        stages = "both" if both else stages[0] if len(stages) == 1 else None
    if not isinstance(stages, str) or stages not in _STAGES:
        raise _wrong(
            "It looks at requests, responses or both.", f"{field}.on", told["on"], "Write request, response or both."
        )
    chosen = {}
    for which in ("projects", "models"):
        if which in options and is_general:
            chosen[which] = _names(options.pop(which), f"{field}.{which}")
    if len(msgspec.json.encode(options, enc_hook=str)) > _MOST_OPTIONS:
        raise _wrong("Its options are too long.", field, None, f"Keep them within {_MOST_OPTIONS} bytes.")
    rule = GuardRule(name=name, kind=kind, action=Action(action), on=_STAGES[stages], options=options, **chosen)
    guard_of(rule, field=field)
    return rule


def _names(told: object, field: str) -> tuple[str, ...]:
    names = [told] if isinstance(told, str) else told
    if not isinstance(names, list | tuple) or not names or not all(isinstance(one, str) and one for one in names):
        raise _wrong("It is a list of names.", field, told, "Write names, or leave it out for all.")
    return tuple(names)


def _wrong(detail: str, field: str, value: object, mend: str) -> InvalidRequest:
    shown = value if isinstance(value, str | int | float | bool) or value is None else repr(value)[:80]
    return InvalidRequest(detail, field=field, value=shown, mend=mend)
