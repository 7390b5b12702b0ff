"""Guardrails in the gateway: a request's texts and fields looked at before it goes anywhere, and answers as they come.

A stream is looked at through a window for each of its texts (an answer's content, a tool's arguments), so that what
spans events is found; each event passes on as much of its text as is certain, and what was held back comes in an event
of its own before the one that ends the text. What rules decided is counted and entered into books of its own.

A rule that fails (its plug-in breaks, its service is away) refuses what it cannot look at, unless it only notes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec
import orjson

from tidemill.errors import InvalidRequest
from tidemill.gateway import answers
from tidemill.gateway.answers import Answer
from tidemill.guards.kinds import guard_of
from tidemill.guards.looking import Found, RequestGuard, TextGuard, TextRule, Window
from tidemill.model.guard import Action, GuardRule, Stage

REFUSED: Final = "content_filter"
FAILED: Final = "guard_failed"
_SLICE: Final = 16 * 1024
"""Characters looked at before other requests have their turn."""
_AT_ONCE: Final = 64 * 1024
"""Bytes of a request that is looked at without giving way."""
_LONGEST_EVENT: Final = 1024 * 1024
_LONGEST_ANSWER: Final = 16 * 1024 * 1024
_NO_TEXT: Final = frozenset({"role", "type", "model", "id", "object", "detail", "format", "image_url", "input_audio"})
"""Names of fields that hold no text for a model, or what is no text at all."""
_TEXTS: Final = ("messages", "prompt", "input", "instructions", "system", "query", "documents", "suffix", "tools")
_OUTPUTS: Final = frozenset({"text", "arguments", "refusal", "content", "reasoning_content", "reasoning", "summary"})
_log = logging.getLogger("tidemill.gateway")
Value = TypeVar("Value")


class Ruling(msgspec.Struct, kw_only=True):
    """What one rule decided about one request, as it is told to the control plane."""

    id: str = ""
    at_ns: int
    request: str
    project: str
    token: str
    model: str
    rule: str
    kind: str
    stage: str
    action: str
    found: dict[str, int]


class Refusal(Exception):
    """A rule refuses, or could not look."""

    def __init__(self, rule: GuardRule, message: str, *, param: str | None = None, is_failure: bool = False) -> None:
        self.rule = rule
        self.message = message
        self.param = param
        self.is_failure = is_failure
        super().__init__(message)

    def noted_in(self, found: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """What was found, with the failure of the rule's plug-in when it is one."""
        if not self.is_failure or not self.rule.name:
            return found
        return {**found, self.rule.name: {**found.get(self.rule.name, {}), "FAILED": 1}}

    @property
    def answer(self) -> Answer:
        """What the client is told."""
        if self.is_failure:
            return answers.refuse(503, FAILED, self.message, headers=((b"Retry-After", b"5"),))
        return answers.refuse(400, REFUSED, self.message, param=self.param)


@dataclass(frozen=True, slots=True)
class Guarding:
    """The rules of one route, ready to look. ``raw`` is what they were made from."""

    raw: bytes
    rules: Mapping[str, GuardRule]
    judges: Sequence[tuple[GuardRule, RequestGuard]]
    on_request: Sequence[TextRule]
    on_response: Sequence[TextRule]
    broken: str = ""
    """Why it cannot look at anything: then nothing passes."""

    def flags(self, found: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
        """The rules that found something and say so to the client."""
        return tuple(name for name in found if self.rules[name].action is Action.FLAG)

    def rulings(
        self, who: Who, stage: Stage, found: Mapping[str, Mapping[str, int]], refused: str = ""
    ) -> Iterator[Ruling]:
        """What was decided, of each rule that found something; ``refused`` names the one that ended the request."""
        for name, counts in found.items():
            rule = self.rules[name]
            yield Ruling(
                at_ns=time.time_ns(), request=who.request, project=who.project, token=who.token, model=who.model,
                rule=name, kind=rule.kind, stage=stage.value, found=dict(counts),
                action=(Action.REFUSE if name == refused else rule.action).value,
            )  # fmt: skip

    def is_of(self, told: Sequence[Mapping[str, Any]]) -> bool:
        """Whether it was made from these rules, and could be."""
        return not self.broken and self.raw == _raw(told)

    @property
    def is_slow(self) -> bool:
        """Whether looking at a request waits for something."""
        return any(one.guard.is_slow for one in self.on_request)


def guarding_of(told: Sequence[Mapping[str, Any]]) -> Guarding | None:
    """The rules that the feed tells of; None for none. Rules that cannot be made let nothing pass."""
    if not told:
        return None
    raw = _raw(told)
    rules: dict[str, GuardRule] = {}
    judges: list[tuple[GuardRule, RequestGuard]] = []
    texts: dict[Stage, list[TextRule]] = {Stage.REQUEST: [], Stage.RESPONSE: []}
    try:
        for one in told:
            rule = msgspec.convert(one, GuardRule)
            guard = guard_of(rule)
            rules[rule.name] = rule
            if not isinstance(guard, TextGuard):
                judges.append((rule, guard))
                continue
            for stage in rule.on:
                texts[stage].append(TextRule(rule, guard))
    except (InvalidRequest, msgspec.ValidationError, ImportError) as error:
        _log.error("a guardrail cannot be made, and nothing passes: %s", error)
        return Guarding(raw, {}, (), (), (), broken=str(error))
    return Guarding(raw, rules, judges, texts[Stage.REQUEST], texts[Stage.RESPONSE])


def _raw(told: Sequence[Mapping[str, Any]]) -> bytes:
    return orjson.dumps(told, option=orjson.OPT_SORT_KEYS)


@dataclass(frozen=True, slots=True)
class Who:
    """Whose request it is that was ruled on."""

    request: str
    project: str
    token: str
    model: str


class Threads(Protocol):
    """Who has threads, made when they are first needed."""

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Where guardrails look that take long."""


# Requests


def gives_way(guarding: Guarding, size: int) -> bool:
    """Whether a request of that many bytes is looked at in steps, between which others have their turn."""
    return size > _AT_ONCE or guarding.is_slow


def at_once(steps: Coroutine[Any, Any, Value]) -> Value:
    """The outcome of steps that wait for nothing. Raises: what they raise."""
    try:
        steps.send(None)
    except StopIteration as ended:
        value: Value = ended.value
        return value
    steps.close()
    raise RuntimeError("steps that wait were to be done at once")


async def check_request(
    guarding: Guarding, content: dict[str, Any], *, size: int, path: bytes, threads: Threads,
    found: dict[str, dict[str, int]],
) -> bool:  # fmt: skip
    """Whether ``content`` was changed to what may be sent on; ``found`` is filled with what rules found.

    Raises: Refusal.
    """
    if guarding.broken:
        rule = GuardRule(name="", kind="")
        raise Refusal(rule, "A guardrail of this model cannot be used.", is_failure=True)
    changed = False
    for rule, judge in guarding.judges:
        changed |= _judge(rule, judge, content, size, path, found)
    if not guarding.on_request:
        return changed
    spots = [spot for name in _TEXTS if name in content for spot in _texts(content, name, content[name])]
    if not spots:
        return changed
    way = size > _AT_ONCE
    quick = [one for one in guarding.on_request if not one.guard.is_slow and one.guard.reach]
    if quick:
        for spot in spots:
            changed |= await _look(quick, spot, found, gives_way=way)
    for one in guarding.on_request:
        if one.guard.is_slow or not one.guard.reach:
            is_threaded = one.guard.is_slow or way
            changed |= await _look_whole(one, spots, found, threads if is_threaded else None)
    return changed


class _Spot(NamedTuple):
    holder: Any
    key: Any


def _texts(holder: Any, key: Any, value: Any) -> Iterator[_Spot]:
    """The places of all texts in a value, but of those that are no text for a model."""
    stack = [(holder, key, value)]
    while stack:
        holder, key, value = stack.pop()
        if isinstance(value, str):
            yield _Spot(holder, key)
        elif isinstance(value, dict):
            stack += [(value, name, one) for name, one in value.items() if name not in _NO_TEXT]
        elif isinstance(value, list) and not (value and isinstance(value[0], int | float)):
            stack += [(value, place, one) for place, one in enumerate(value)]


def _judge(
    rule: GuardRule,
    judge: RequestGuard,
    content: dict[str, Any],
    size: int,
    path: bytes,
    found: dict[str, dict[str, int]],
) -> bool:
    try:
        breaches = judge.judge(content, size=size)
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and nothing passes then
        return _failed(rule, error)
    changed = False
    for breach in breaches:
        if breach.is_absent:
            if (breach.param == "max_output_tokens") == (path == b"/v1/responses"):
                content[breach.param] = breach.within
                changed = True
            continue
        counts = found.setdefault(rule.name, {})
        counts[breach.label] = counts.get(breach.label, 0) + 1
        if rule.action is Action.REDACT and breach.within is not None:
            content[breach.param] = breach.within
            changed = True
        elif rule.action in (Action.REFUSE, Action.REDACT):
            raise Refusal(rule, breach.message, param=breach.param or None)
    return changed


async def _look(rules: Sequence[TextRule], spot: _Spot, found: dict[str, dict[str, int]], *, gives_way: bool) -> bool:
    text: str = spot.holder[spot.key]
    window = Window(rules)
    window.found = found
    parts = []
    for at in range(0, len(text) or 1, _SLICE):
        if gives_way:
            await asyncio.sleep(0)
        window.add(text[at : at + _SLICE])
        parts.append(window.take(_found(rules, window), is_last=at + _SLICE >= len(text)))
        if window.refused is not None:
            raise _refusal(window.refused)
    whole = "".join(parts)
    if whole == text:
        return False
    spot.holder[spot.key] = whole
    return True


async def _look_whole(
    one: TextRule, spots: Sequence[_Spot], found: dict[str, dict[str, int]], threads: Threads | None
) -> bool:
    """The same for a rule that is asked once, about all texts together."""
    texts = [str(spot.holder[spot.key]) for spot in spots]
    joined = "\n".join(texts)
    try:
        if threads is None:
            pieces = one.guard.find(joined)
        else:
            pieces = await asyncio.get_running_loop().run_in_executor(threads.threads, one.guard.find, joined)
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and nothing passes then
        return _failed(one.rule, error)
    if not pieces:
        return False
    counts = found.setdefault(one.rule.name, {})
    for piece in pieces:
        counts[piece.label] = counts.get(piece.label, 0) + 1
    if one.rule.action is Action.REFUSE:
        raise _refusal(one.rule)
    if one.rule.action is not Action.REDACT:
        return False
    begin = 0
    for spot, text in zip(spots, texts, strict=True):
        parts, at = [], 0
        for piece in pieces:
            first, end = max(0, piece.start - begin), min(len(text), piece.end - begin)
            if at <= first < end:
                parts += [text[at:first], f"[{piece.label}]"]
                at = end
        spot.holder[spot.key] = "".join([*parts, text[at:]])
        begin += len(text) + 1
    return True


def _found(rules: Sequence[TextRule], window: Window) -> list[Sequence[Found]]:
    seen, start = window.seen, window.start
    founds = []
    for one in rules:
        try:
            founds.append(one.guard.find(seen, start))
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and nothing passes then
            _failed(one.rule, error)
            founds.append(())
    return founds


def _failed(rule: GuardRule, error: Exception) -> bool:
    """A plug-in broke. Raises: Refusal unless the rule only notes."""
    _log.error("the guardrail %s failed: %s: %s", rule.name, type(error).__name__, error)
    if rule.action in (Action.REFUSE, Action.REDACT):
        message = f"The guardrail '{rule.name}' could not look at this. Come again in a while."
        raise Refusal(rule, message, is_failure=True) from None
    return False


def _refusal(rule: GuardRule) -> Refusal:
    return Refusal(rule, f"This was refused by the guardrail '{rule.name}'.")


# Answers


@dataclass(slots=True)
class Passing:
    """Where a response goes that was looked at."""

    pass_on: Callable[[bytes], None]
    pause: Callable[[], None]
    resume: Callable[[], None]
    refuse: Callable[[Refusal, bytes], None]
    """It ends here; a stream with those bytes."""


class Screen(ABC):
    """One response as rules see it. What is fed comes out at the other side in order, at once or a little later."""

    def __init__(self, guarding: Guarding, passing: Passing, threads: Threads, *, path: bytes) -> None:
        self._rules = guarding.on_response
        self._changes = any(one.rule.action in (Action.REDACT, Action.REFUSE) for one in self._rules)
        self._is_slow = any(one.guard.is_slow for one in self._rules)
        self._passing = passing
        self._threads = threads
        self._path = path
        self._queue: deque[bytes | Callable[[], None]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self.found: dict[str, dict[str, int]] = {}

    def feed(self, data: bytes) -> None:
        """More of the response."""
        self._put(data)

    def finish(self, then: Callable[[], None]) -> None:
        """The response is whole; ``then`` is called once all of it was passed on."""
        self._put(then)

    def close(self) -> None:
        """Look no further."""
        self._is_closed = True
        self._queue.clear()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _put(self, one: bytes | Callable[[], None]) -> None:
        self._queue.append(one)
        if not self._is_slow:
            at_once(self._work())
        elif self._task is None:
            self._passing.pause()
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._queue and not self._is_closed:
                one = self._queue.popleft()
                if isinstance(one, bytes):
                    passed = await self._take(one)
                    if passed and not self._is_closed:
                        self._passing.pass_on(passed)
                    continue
                passed = await self._last()
                if not self._is_closed:
                    if passed:
                        self._passing.pass_on(passed)
                    self._task = None
                    one()
        except Refusal as refusal:
            if not self._is_closed:
                self._is_closed = True
                self._passing.refuse(refusal, self._ending())
        finally:
            self._task = None
        if not self._is_closed and self._is_slow:
            self._passing.resume()

    @abstractmethod
    async def _take(self, data: bytes) -> bytes:
        """What can be passed on once this part has come. Raises: Refusal."""

    @abstractmethod
    async def _last(self) -> bytes:
        """What is left to be passed on now that all has come. Raises: Refusal."""

    def _ending(self) -> bytes:
        """How a stream ends that is refused."""
        return b""

    async def _look(self, window: Window, text: str, *, is_last: bool) -> str:
        """What can be passed on of one text. Raises: Refusal."""
        window.add(text)
        if not self._is_slow:
            founds = _found(self._rules, window)
        else:
            founds = await asyncio.get_running_loop().run_in_executor(
                self._threads.threads, _found, self._rules, window
            )
        passed = window.take(founds, is_last=is_last)
        if window.refused is not None:
            raise _refusal(window.refused)
        return passed

    def _window(self) -> Window:
        window = Window(self._rules)
        window.found = self.found
        return window


class WholeScreen(Screen):
    """An answer that is no stream: it comes out when all of it was seen."""

    def __init__(self, guarding: Guarding, passing: Passing, threads: Threads, *, path: bytes) -> None:
        super().__init__(guarding, passing, threads, path=path)
        self._parts: list[bytes] = []
        self._size = 0

    async def _take(self, data: bytes) -> bytes:
        self._parts.append(data)
        self._size += len(data)
        if self._size > _LONGEST_ANSWER:
            rule = self._rules[0].rule
            raise Refusal(rule, "The answer is too long for its guardrails.", is_failure=True)
        return b""

    async def _last(self) -> bytes:
        body = b"".join(self._parts)
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError:
            text = body.decode("utf-8", "replace")
            looked = await self._look(self._window(), text, is_last=True)
            return body if looked == text else looked.encode()
        changed = False
        spots = list(_outputs(content))
        for spot in spots:
            text = spot.holder[spot.key]
            looked = await self._look(self._window(), text, is_last=True)
            if looked != text:
                spot.holder[spot.key] = looked
                changed = True
        if not changed:
            return body
        if isinstance(content, dict):
            _drop_logprobs(content)
        return orjson.dumps(content)


@dataclass(slots=True)
class _Text:
    """One text of a stream: how it is looked at, and an event of it without text."""

    window: Window
    make: Callable[[str], dict[str, Any]]
    owner: object


@dataclass(slots=True)
class _Event:
    lines: list[bytes] = field(default_factory=list)
    """Those that are no data."""
    data: bytes = b""


class StreamScreen(Screen):
    """A stream of events."""

    def __init__(self, guarding: Guarding, passing: Passing, threads: Threads, *, path: bytes) -> None:
        super().__init__(guarding, passing, threads, path=path)
        self._rest = b""
        self._open: dict[object, _Text] = {}
        self._template: dict[str, Any] = {}

    async def _take(self, data: bytes) -> bytes:
        data = self._rest + data
        passed: list[bytes] = []
        while True:
            end, after = _end_of_event(data)
            if end < 0:
                break
            passed.append(await self._event(data[:after]))
            data = data[after:]
        self._rest = data
        if len(data) > _LONGEST_EVENT:
            raise Refusal(self._rules[0].rule, "An event is too long for its guardrails.", is_failure=True)
        return b"".join(passed)

    async def _last(self) -> bytes:
        rest, self._rest = self._rest, b""
        passed = await self._event(rest) if rest.strip() else rest
        return passed + await self._flush(lambda _: True)

    def _ending(self) -> bytes:
        if not self._template.get("choices"):
            return answers.error_event(REFUSED, "This answer was refused by a guardrail.", status=400)
        choices = []
        for one in self._template["choices"]:
            choice: dict[str, Any] = {"index": one.get("index", 0), "finish_reason": REFUSED}
            choice["delta" if "delta" in one else "text"] = {} if "delta" in one else ""
            choices.append(choice)
        return _written(_Event(), {**self._template, "choices": choices}) + b"data: [DONE]\n\n"

    async def _event(self, raw: bytes) -> bytes:
        """What is passed on for one event. Raises: Refusal."""
        event = _read_event(raw)
        data = event.data.strip()
        if not data:
            return raw
        if data == b"[DONE]":
            return await self._flush(lambda _: True) + raw
        try:
            content = orjson.loads(data)
        except orjson.JSONDecodeError:
            content = None
        if not isinstance(content, dict):
            text = data.decode("utf-8", "replace")
            looked = await self._look(self._window(), text, is_last=True)
            return raw if looked == text or not self._changes else _written_text(event, looked)
        before = b""
        choices = content.get("choices")
        if isinstance(choices, list):
            self._template = {
                **{k: v for k, v in content.items() if k != "usage"},
                "choices": choices or self._template.get("choices", []),
            }
            for choice in choices:
                if isinstance(choice, dict):
                    before += await self._choice(content, choice)
        else:
            before = await self._other(content)
        return before + _written(event, content) if self._changes else raw

    async def _choice(self, content: dict[str, Any], choice: dict[str, Any]) -> bytes:
        """Look at one answer's part of an event; what has to be passed on before it."""
        index = choice.get("index", 0)
        delta = choice.get("delta")
        for holder, key, name in _parts_of(choice, delta if isinstance(delta, dict) else {}):
            owner = (index, *name)
            known = self._open.get(owner)
            if known is None:
                known = self._open[owner] = _Text(self._window(), _maker(content, index, name), index)
            holder[key] = await self._look(known.window, holder[key], is_last=False)
        if choice.get("logprobs") is not None:
            choice["logprobs"] = None
        if choice.get("finish_reason") is not None:
            return await self._flush(lambda text: text.owner == index, into=choice)
        return b""

    async def _other(self, content: dict[str, Any]) -> bytes:
        """The same for events of the responses' kind, which say what they are."""
        kind = str(content.get("type", ""))
        owner = (
            kind.rpartition(".")[0],
            content.get("item_id"),
            content.get("output_index"),
            content.get("content_index"),
        )
        if kind.endswith(".delta") and isinstance(content.get("delta"), str):
            known = self._open.get(owner)
            if known is None:
                made = dict(content)
                known = self._open[owner] = _Text(self._window(), lambda text: {**made, "delta": text}, owner[1])
            content["delta"] = await self._look(known.window, content["delta"], is_last=False)
            if content.get("logprobs"):
                content["logprobs"] = []
            return b""
        before = b""
        if kind.endswith((".done", ".completed", ".incomplete", ".failed")):
            before = await self._flush(lambda _: True)
        for spot in list(_outputs(content)):
            window = Window(self._rules)  # of what was counted already
            spot.holder[spot.key] = await self._look(window, spot.holder[spot.key], is_last=True)
        if content.get("logprobs"):
            content["logprobs"] = []
        return before

    async def _flush(self, wanted: Callable[[_Text], bool], into: dict[str, Any] | None = None) -> bytes:
        """What was held back of texts that end: put into that choice's own event, or in events before it."""
        passed = []
        for owner, text in [(owner, text) for owner, text in self._open.items() if wanted(text)]:
            left = await self._look(text.window, "", is_last=True)
            del self._open[owner]
            if not left or not self._changes:
                continue
            if into is not None and _put_into(into, owner, left):
                continue
            made = text.make(left)
            kind = made.get("type")
            passed.append(_written(_Event([b"event: " + kind.encode()] if isinstance(kind, str) else []), made))
        return b"".join(passed)


def screen_of(guarding: Guarding, passing: Passing, threads: Threads, *, path: bytes, is_event_stream: bool) -> Screen:
    """What looks at a response."""
    kind = StreamScreen if is_event_stream else WholeScreen
    return kind(guarding, passing, threads, path=path)


def _parts_of(
    choice: dict[str, Any], delta: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], str, tuple[object, ...]]]:
    """The texts of an answer's part: who holds it, under which name, and which text it goes on with."""
    if isinstance(choice.get("text"), str):
        yield choice, "text", ("text",)
    for key in ("content", "reasoning_content", "reasoning", "refusal"):
        if isinstance(delta.get(key), str):
            yield delta, key, (key,)
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            yield function, "arguments", ("tool", call.get("index", 0))


def _maker(content: dict[str, Any], index: object, name: tuple[object, ...]) -> Callable[[str], dict[str, Any]]:
    """Makes an event that has nothing but more of that text."""
    base = {key: value for key, value in content.items() if key not in ("choices", "usage")}

    def make(text: str) -> dict[str, Any]:
        if name == ("text",):
            return {**base, "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": None}]}
        if name[0] == "tool":
            delta: dict[str, Any] = {"tool_calls": [{"index": name[1], "function": {"arguments": text}}]}
        else:
            delta = {str(name[0]): text}
        return {**base, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}

    return make


def _put_into(choice: dict[str, Any], owner: object, text: str) -> bool:
    """Whether the text could go into the last part of the answer itself."""
    if not isinstance(owner, tuple) or owner[1:] != ("text",) or not isinstance(choice.get("text"), str):
        return False
    choice["text"] += text
    return True


def _outputs(value: Any) -> Iterator[_Spot]:
    """The places of all texts of an answer."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            for key, held in one.items():
                if isinstance(held, str):
                    if key in _OUTPUTS:
                        yield _Spot(one, key)
                elif key not in ("usage", "embedding", "logprobs"):
                    stack.append(held)
        elif isinstance(one, list) and not (one and isinstance(one[0], int | float)):
            stack += one


def _drop_logprobs(content: dict[str, Any]) -> None:
    for choice in content.get("choices") or ():
        if isinstance(choice, dict) and choice.get("logprobs") is not None:
            choice["logprobs"] = None


def _end_of_event(data: bytes) -> tuple[int, int]:
    """Where the first event in ``data`` ends, without and with its empty line; -1 when it has not ended."""
    best = (-1, -1)
    for separator in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        at = data.find(separator, 0, best[0] if best[0] >= 0 else len(data))
        if at >= 0:
            best = (at, at + len(separator))
    return best


def _read_event(raw: bytes) -> _Event:
    event = _Event()
    parts = []
    for line in raw.splitlines():
        if line.startswith(b"data:"):
            parts.append(line[5:].removeprefix(b" "))
        elif line:
            event.lines.append(line)
    event.data = b"\n".join(parts)
    return event


def _written(event: _Event, content: dict[str, Any]) -> bytes:
    return b"".join(line + b"\n" for line in event.lines) + b"data: " + orjson.dumps(content) + b"\n\n"


def _written_text(event: _Event, text: str) -> bytes:
    lines = [b"data: " + line.encode() for line in text.split("\n")]
    return b"\n".join([*event.lines, *lines]) + b"\n\n"
