"""What a request may ask for beside its text: how long it is, how much of an answer, with which tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidemill.guards.looking import Breach

_BYTES_PER_TOKEN: Final = 4
_ANSWERS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""The names under which a request says how long its answer may be."""


class Limits:
    """Judges sizes and parameters.

    ``prompt_bytes`` and ``prompt_tokens`` (estimated, four bytes each) are of the whole request. ``max_tokens`` bounds
    the answer: a request that does not say gets it. ``n`` is how many answers, ``temperature`` and ``top_p`` two
    numbers, ``tools`` the names of those functions that may be offered to the model; none: no tools at all.

    >>> Limits(max_tokens=100).judge({"max_tokens": 500}, size=20)[0].message
    'max_tokens is 500; at most 100 are allowed here.'
    """

    def __init__(
        self,
        *,
        prompt_bytes: int | None = None,
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        n: int | None = None,
        temperature: Sequence[float] | None = None,
        top_p: Sequence[float] | None = None,
        tools: Sequence[str] | None = None,
    ) -> None:
        for name, value in (
            ("prompt_bytes", prompt_bytes), ("prompt_tokens", prompt_tokens), ("max_tokens", max_tokens), ("n", n)
        ):  # fmt: skip
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: {value!r} is no whole number from 1 on")
        for name, given in (("temperature", temperature), ("top_p", top_p)):
            if given is not None and not (
                isinstance(given, list | tuple) and len(given) == 2 and all(map(_is_number, given))
                and given[0] <= given[1]
            ):  # fmt: skip
                raise ValueError(f"{name}: {given!r} is not two numbers, the smaller first, such as [0, 1]")
        if tools is not None and (isinstance(tools, str) or not all(isinstance(one, str) for one in tools)):
            raise ValueError(f"tools: {tools!r} is no list of names")
        self._bytes, self._tokens, self._answer, self._n = prompt_bytes, prompt_tokens, max_tokens, n
        self._ranges = {"temperature": temperature, "top_p": top_p}
        self._tools = None if tools is None else frozenset(tools)
        if all(one is None for one in (prompt_bytes, prompt_tokens, max_tokens, n, temperature, top_p, tools)):
            raise ValueError("limits: there is none. Mend: give one, such as max_tokens: 1000")

    def judge(self, request: Mapping[str, Any], *, size: int) -> list[Breach]:
        """What is more than allowed."""
        breaches = []
        if self._bytes is not None and size > self._bytes:
            breaches.append(_too_long("PROMPT_BYTES", size, "bytes", self._bytes))
        if self._tokens is not None and size // _BYTES_PER_TOKEN > self._tokens:
            breaches.append(_too_long("PROMPT_TOKENS", size // _BYTES_PER_TOKEN, "tokens", self._tokens))
        if self._answer is not None:
            breaches += self._of_answer(request, self._answer)
        if self._n is not None:
            breaches += [
                _over(name, request[name], self._n) for name in ("n", "best_of") if _over_by(request, name, self._n)
            ]
        for name, bounds in self._ranges.items():
            value = request.get(name)
            if bounds is not None and value is not None and not (_is_number(value) and bounds[0] <= value <= bounds[1]):
                message = f"{name} is {_shown(value)}; {bounds[0]:g} to {bounds[1]:g} are allowed here."
                within = min(max(value, bounds[0]), bounds[1]) if _is_number(value) else bounds[0]
                breaches.append(Breach(name.upper(), name, message, within))
        if self._tools is not None:
            breaches += self._of_tools(request, self._tools)
        return breaches

    @staticmethod
    def _of_answer(request: Mapping[str, Any], most: int) -> list[Breach]:
        given = [name for name in _ANSWERS if request.get(name) is not None]
        if not given:
            if "messages" not in request and "prompt" not in request:
                return [Breach("MAX_TOKENS", "max_output_tokens", "", most, True)] if "input" in request else []
            return [Breach("MAX_TOKENS", "max_tokens", "", most, True)]
        return [_over(name, request[name], most) for name in given if _over_by(request, name, most)]

    @staticmethod
    def _of_tools(request: Mapping[str, Any], allowed: frozenset[str]) -> list[Breach]:
        breaches = []
        for field in ("tools", "functions"):
            offered = request.get(field)
            if not offered:
                continue
            names = [_tool_name(one) for one in offered] if isinstance(offered, list) else [""]
            wrong = [name for name in names if name not in allowed]
            if wrong:
                which = f"the tool {wrong[0]!r}" if wrong[0] else "a tool without a name"
                mend = f"Allowed are {', '.join(sorted(allowed))}." if allowed else "No tools are allowed."
                breaches.append(Breach("TOOLS", field, f"This model is not to be offered {which} here. {mend}"))
        return breaches


def _tool_name(tool: object) -> str:
    if not isinstance(tool, dict):
        return ""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else str(tool.get("type") or "")


def _too_long(label: str, size: int, unit: str, most: int) -> Breach:
    return Breach(label, "", f"The request has {size} {unit}; at most {most} are allowed here.")


def _over(name: str, value: Any, most: int) -> Breach:
    label = "MAX_TOKENS" if name in _ANSWERS else "N"
    return Breach(label, name, f"{name} is {_shown(value)}; at most {most} are allowed here.", most)


def _over_by(request: Mapping[str, Any], name: str, most: int) -> bool:
    value = request.get(name)
    return value is not None and not (_is_number(value) and value <= most)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return repr(value)[:40]
