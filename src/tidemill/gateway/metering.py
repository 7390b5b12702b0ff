"""What a response says it took: tokens from its usage, or counted while it streams.

A stream tells of its usage only when asked for it, in one more event before the last. Where the client did not ask, the
gateway does, and takes that event out again. A stream that breaks off before it is settled by the number of its events,
each of which carries about one token; such a figure is marked as estimated.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec
import orjson
from msgspec import Meta

_USAGE: Final = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_HAS_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
_DONE: Final = b"data: [DONE]"
_ASK: Final = b'"stream_options":{"include_usage":true},'
_LONGEST_EVENT: Final = 256 * 1024
_SEEN: Final = 16 * 1024
"""Bytes at both ends of a long answer in which its usage is looked for."""
_BYTES_PER_TOKEN: Final = 4
MOST_TOKENS: Final = 2**31 - 1


class Usage(msgspec.Struct, kw_only=True):
    """One request's tokens. ``id`` is the gateway's own: a request id that clients choose could come twice."""

    id: str
    at_ns: int
    project: str
    """Who pays."""
    token: str
    """The id of the key."""
    model: str
    workload: str
    job: str
    """The replica that answered."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False
    user: str = ""
    label: str = ""
    price: tuple[int, int] = (0, 0)
    """Micro-USD for a million tokens, in and out, when it was asked."""


class Asked(msgspec.Struct, kw_only=True, frozen=True):
    """A request's body as it is sent on, and what of its answer the client does not expect."""

    body: bytes
    hides_usage: bool


def prepared(body: bytes, content: dict[str, Any], *, asks_usage: bool, salt: str = "") -> Asked:
    """The body of a request as an engine gets it; all else in it is the same, byte for byte.

    With ``asks_usage`` a stream is asked for its usage, and ``salt`` replaces what the client may have said of it.
    """
    added, hides_usage = b"", False
    replaced: dict[str, msgspec.Raw] = {}
    if salt:
        if "cache_salt" in content:
            replaced["cache_salt"] = msgspec.Raw(b'"%b"' % salt.encode())
        else:
            added = b'"cache_salt":"%b",' % salt.encode()
    if asks_usage:
        options = content.get("stream_options")  # of another type: the engine says what is wrong with it
        if "stream_options" not in content:
            added, hides_usage = added + _ASK, True
        elif options is None or (isinstance(options, dict) and options.get("include_usage") is not True):
            replaced["stream_options"] = msgspec.Raw(orjson.dumps({**(options or {}), "include_usage": True}))
            hides_usage = True
    if replaced:
        body = msgspec.json.encode(msgspec.json.decode(body, type=dict[str, msgspec.Raw]) | replaced)
    if added:
        at = body.index(b"{") + 1
        body = b"%b%b%b" % (body[:at], added, body[at:])
    return Asked(body=body, hides_usage=hides_usage)


def ask_model(body: bytes, model: str, *, salt: str) -> bytes:
    """The body of a request with another model asked for, whose engine is told that salt; else it says the same."""
    parts = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    parts["model"] = msgspec.Raw(orjson.dumps(model))
    parts.pop("cache_salt", None)
    if salt:
        parts["cache_salt"] = msgspec.Raw(orjson.dumps(salt))
    return msgspec.json.encode(parts)


def tokens_in(usage: object) -> tuple[int, int] | None:
    """Prompt and completion tokens of a usage object, None when it is none."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if prompt is None:
        prompt = usage.get("input_tokens", 0)
    if completion is None:
        completion = usage.get("output_tokens", 0)
    prompt, completion = 0 if prompt is None else prompt, 0 if completion is None else completion
    if type(prompt) is not int or type(completion) is not int:
        return None
    return (prompt, completion) if 0 <= prompt <= MOST_TOKENS and 0 <= completion <= MOST_TOKENS else None


class _Details(msgspec.Struct):
    cached_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] | None = None


class _Told(msgspec.Struct):
    """A usage as engines tell it, in the words of either of OpenAI's APIs."""

    prompt_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] | None = None
    completion_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] | None = None
    input_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] | None = None
    output_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


_read_told: Final = msgspec.json.Decoder(_Told).decode


def _counts_in(usage: bytes) -> tuple[int, int, int] | None:
    """Prompt, completion and cached tokens of a usage in JSON, None when it is none."""
    try:
        told = _read_told(usage)
    except (msgspec.DecodeError, UnicodeDecodeError):  # in a shape that is not usual
        return _counts_of(usage)
    prompt, completion = told.prompt_tokens, told.completion_tokens
    if prompt is None:
        prompt = told.input_tokens or 0
    if completion is None:
        completion = told.output_tokens or 0
    details = told.prompt_tokens_details or told.input_tokens_details
    return prompt, completion, (details.cached_tokens or 0) if details is not None else 0


def _counts_of(usage: bytes) -> tuple[int, int, int] | None:
    try:
        told = orjson.loads(usage)
    except orjson.JSONDecodeError:
        return None
    tokens = tokens_in(told)
    return None if tokens is None else (*tokens, cached_in(told))


def cached_in(usage: object) -> int:
    """How many of a usage's prompt tokens the replica had in its prefix cache, as far as it tells."""
    if isinstance(usage, dict):
        for name in ("prompt_tokens_details", "input_tokens_details"):
            details = usage.get(name)
            value = details.get("cached_tokens") if isinstance(details, dict) else None
            if type(value) is int and 0 <= value <= MOST_TOKENS:
                return value
    return 0


def told_in(body: bytes) -> tuple[int, int, int] | None:
    """Prompt, completion and cached tokens that a whole answer, or both ends of a long one, tell of; None: of none."""
    end = len(body)
    while (at := body.rfind(b'"usage"', 0, end)) >= 0:
        end, found = at, _USAGE.match(body, at)
        counts = _counts_in(found[1]) if found is not None else None
        if counts is not None:
            return counts
    return None


def estimated_prompt(size: int) -> int:
    """About how many tokens a request of that many bytes holds."""
    return size // _BYTES_PER_TOKEN


class WholeMeter:
    """Reads the usage of an answer that is no stream."""

    def __init__(self) -> None:
        self._first = b""
        self._last = b""
        self._has_gap = False
        self.cached = 0
        """Prompt tokens from the prefix cache, known once ``reported`` is."""

    def feed(self, data: bytes) -> bytes:
        """The data, to be passed on."""
        if len(self._first) < _SEEN:
            self._first += data
        else:
            last = self._last + data
            self._has_gap = self._has_gap or len(last) > _SEEN
            self._last = last[-_SEEN:]
        return data

    def finish(self) -> bytes:
        """Nothing was held back."""
        return b""

    @property
    def reported(self) -> tuple[int, int] | None:
        """What the answer says."""
        ends = (self._last, self._first) if self._has_gap else (self._first + self._last,)
        told = next(filter(None, map(told_in, ends)), None)
        if told is None:
            return None
        self.cached = told[2]
        return told[:2]


class StreamMeter:
    """Reads the usage of a stream of events, counts them, and takes out the event that was not asked for.

    With ``hides_usage`` an event that has begun is passed on once it is whole.
    """

    def __init__(self, *, hides_usage: bool) -> None:
        self._hides = hides_usage
        self._rest = b""
        self._separator = b""
        self._events = 0
        self._has_role_event = False
        self.reported: tuple[int, int] | None = None
        self.cached = 0

    @property
    def counted(self) -> int:
        """Events so far that carry a part of the answer."""
        return max(0, self._events - self._has_role_event)

    def feed(self, data: bytes) -> bytes:
        """What is to be passed on now."""
        separator = self._separator
        if separator and not self._rest and data.endswith(separator) and b'"usage"' not in data:
            self._count(data)
            return data
        whole = self._rest + data if self._rest else data
        if not separator:
            separator = self._separator = _separator_in(whole)
        end = whole.rfind(separator) + len(separator) if separator else 0
        if separator and end < len(separator):
            end = 0
        complete, self._rest = whole[:end], whole[end:]
        given_up = b""
        if len(self._rest) > _LONGEST_EVENT:
            given_up, self._rest = self._rest, b""
        passed = self._take(complete) if complete else b""
        return passed + given_up if self._hides else data

    def finish(self) -> bytes:
        """What was held back and is the end of the stream."""
        rest, self._rest = self._rest, b""
        if not rest:
            return b""
        passed = self._take(rest)
        return passed if self._hides else b""

    def _take(self, complete: bytes) -> bytes:
        if not self._events:
            first = complete.partition(self._separator)[0] if self._separator else complete
            self._has_role_event = b'"role"' in first and not re.search(rb'"content"\s*:\s*"[^"]', first)
        found = _HAS_USAGE.search(complete)
        if not found:
            self._count(complete)
            return complete
        before = complete.rfind(self._separator, 0, found.start()) if self._separator else -1
        start = before + len(self._separator) if before >= 0 else 0
        kept = [complete[:start]] if start else []
        if start:
            self._count(complete[:start])
        for event in _split(complete[start:], self._separator):
            if not self._is_usage(event):
                self._count(event)
                kept.append(event)
        return b"".join(kept)

    def _is_usage(self, event: bytes) -> bool:
        """Whether the event is the one that the gateway asked for itself; its usage is noted whoever asked."""
        if not _HAS_USAGE.search(event):
            return False
        try:
            content = orjson.loads(event.strip().removeprefix(b"data:"))
        except orjson.JSONDecodeError:
            return False
        if not isinstance(content, dict):
            return False
        nested = content.get("response")
        usage = content.get("usage")
        if tokens_in(usage) is None:
            usage = nested.get("usage") if isinstance(nested, dict) else None
        tokens = tokens_in(usage)
        if tokens is None:
            return False
        self.reported = tokens
        self.cached = cached_in(usage)
        return self._hides and content.get("choices") == []

    def _count(self, events: bytes) -> None:
        separator = self._separator or b"\n\n"
        is_done = events.startswith(_DONE) or separator + _DONE in events
        self._events += events.count(separator) - is_done - events.startswith(b":")


def _separator_in(data: bytes) -> bytes:
    """What ends the first event in ``data``; empty when none has ended."""
    end, first = data.find(b"\n\n"), b"\n\n"
    for other in (b"\r\n\r\n", b"\r\r"):
        at = data.find(other, 0, end + 1) if end >= 0 else data.find(other)
        if at >= 0:
            end, first = at, other
    return first if end >= 0 else b""


def _split(complete: bytes, separator: bytes) -> list[bytes]:
    """The events, each with what ends it."""
    if not separator:
        return [complete]
    parts = complete.split(separator)
    events = [part + separator for part in parts[:-1]]
    return [*events, parts[-1]] if parts[-1] else events
