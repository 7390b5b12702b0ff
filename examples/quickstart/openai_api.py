"""The OpenAI shapes of requests, answers, stream events and errors, for the two completion routes. No I/O."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from decode import Model, Sampling
from tokens import decode, encode

DEFAULT_MAX_TOKENS: Final = 160
LIMIT_TOKENS: Final = 4_096
LIMIT_CHOICES: Final = 8
LIMIT_STOPS: Final = 4
_UNSUPPORTED: Final = ("logprobs", "top_logprobs", "echo", "suffix", "logit_bias", "tools", "functions", "audio")
_JSON_TYPES: Final = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", dict: "an object"}


class RequestRefusedError(Exception):
    """A request that the caller must change, with the HTTP status and the fields of an OpenAI error."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A checked request of either route."""

    chat: bool
    model: str
    prompt: str
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]
    choices: int
    stream: bool
    include_usage: bool


def parse_request(body: bytes, *, chat: bool, served: str) -> CompletionRequest:
    """The request in ``body``. Raises: RequestRefusedError that names the parameter and what it takes."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefusedError(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestRefusedError("the body needs to be a JSON object")
    model = _take(fields, "model", str, "")
    if not model:
        raise RequestRefusedError("you must provide a model parameter", param="model")
    if model != served:
        message = f"the model {model!r} does not exist; this server has {served!r}"
        raise RequestRefusedError(message, status=404, param="model", code="model_not_found")
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise RequestRefusedError(f"{name} is not supported by this server", param=name)
    seed = _take(fields, "seed", int, None)
    max_tokens = _take(fields, "max_tokens", int, DEFAULT_MAX_TOKENS, low=1, high=LIMIT_TOKENS)
    if chat:
        max_tokens = _take(fields, "max_completion_tokens", int, max_tokens, low=1, high=LIMIT_TOKENS)
    return CompletionRequest(
        chat=chat,
        model=model,
        prompt=_chat_prompt(fields) if chat else _prompt(fields),
        sampling=Sampling(
            temperature=_take(fields, "temperature", float, Sampling().temperature, low=0, high=2),
            top_p=_take(fields, "top_p", float, Sampling().top_p, low=0, high=1),
            seed=seed if seed is None else seed % 2**64,
        ),
        max_tokens=max_tokens,
        stops=_stops(fields),
        choices=_take(fields, "n", int, 1, low=1, high=LIMIT_CHOICES),
        stream=_take(fields, "stream", bool, False),
        include_usage=_take(_take(fields, "stream_options", dict, {}), "include_usage", bool, False),
    )


class Choice:
    """One completion, made as it is iterated: whole characters, cut before a stop string.

    ``tokens`` (how many were made) and ``finish_reason`` are final once the iterator ends.
    """

    def __init__(self, model: Model, request: CompletionRequest, index: int) -> None:
        self._model, self._request, self.index = model, request, index
        self.tokens = 0
        self.finish_reason = "stop"

    def __iter__(self) -> Iterator[str]:
        request = self._request
        seed = request.sampling.seed
        sampling = Sampling(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            seed=None if seed is None else (seed + self.index) % 2**64,
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""
        for token in self._model.generate(request.prompt.encode(errors="replace"), sampling):
            self.tokens += 1
            held += decoder.decode(decode(bytes([token])))
            if (cut := _first_stop(held, request.stops)) is not None:
                yield held[:cut]
                return
            sure = len(held) - _possible_stop(held, request.stops)
            yield held[:sure]
            held = held[sure:]
            if self.tokens == request.max_tokens:
                self.finish_reason = "length"
                break
        yield held


class Envelope:
    """The parts of the answers to one request that stay the same: id, time, model, kind of object."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request
        self._id = f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: list[Choice], texts: list[str]) -> dict[str, Any]:
        """The answer to a request that did not ask for a stream."""
        rows = [
            {"index": choice.index, **self._content(text), "logprobs": None, "finish_reason": choice.finish_reason}
            for choice, text in zip(choices, texts, strict=True)
        ]
        return {**self._head(chunk=False), "choices": rows, "usage": self._usage(choices)}

    def event(self, index: int, text: str, *, first: bool = False, finish_reason: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        content: dict[str, Any] = {"text": text}
        if self._request.chat:
            content = {"delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text else {})}}
        row = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head(chunk=True), "choices": [row], **usage}

    def usage_event(self, choices: list[Choice]) -> dict[str, Any]:
        """The last event of a stream whose ``stream_options`` ask for usage."""
        return {**self._head(chunk=True), "choices": [], "usage": self._usage(choices)}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._request.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self._request.chat else {"text": text}

    def _usage(self, choices: list[Choice]) -> dict[str, int]:
        asked = len(encode(self._request.prompt.encode(errors="replace")))
        made = sum(choice.tokens for choice in choices)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def model_list(served: str, created: int) -> dict[str, Any]:
    """The answer of ``GET /v1/models``."""
    row = {"id": served, "object": "model", "created": created, "owned_by": "tidemill"}
    return {"object": "list", "data": [row]}


def _take(
    fields: dict[str, Any], name: str, kind: type, default: Any, *, low: float | None = None, high: float | None = None
) -> Any:
    """The value of a field, ``default`` where it is absent or null. Raises: RequestRefusedError."""
    value = fields.get(name)
    if value is None:
        return default
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise RequestRefusedError(f"{name} needs to be {_JSON_TYPES[kind]}", param=name, code="invalid_type")
    if low is not None and high is not None and not low <= value <= high:
        raise RequestRefusedError(f"{name} lies between {low} and {high}, got {value}", param=name, code="out_of_range")
    return value


def _prompt(fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        message = "prompt needs to be a string or a list of one string"
        raise RequestRefusedError(message, param="prompt", code="invalid_type")
    return prompt


def _chat_prompt(fields: dict[str, Any]) -> str:
    """The text to go on from. The model knows no roles: what the user said last is what it continues."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestRefusedError("messages needs to be a list of at least one message", param="messages")
    texts = []
    for place, message in enumerate(messages):
        param = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestRefusedError(f"{param} needs to be an object with a role", param=param)
        texts.append((message["role"], _message_text(message.get("content"), param)))
    return next((text for role, text in reversed(texts) if role == "user"), texts[-1][1])


def _message_text(content: Any, param: str) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RequestRefusedError(f"{param}.content needs to be text", param=f"{param}.content", code="invalid_type")
    return "".join(part["text"] for part in parts)


def _stops(fields: dict[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > LIMIT_STOPS or not all(isinstance(s, str) and s for s in stops):
        message = f"stop needs to be a string or a list of at most {LIMIT_STOPS} strings, none of them empty"
        raise RequestRefusedError(message, param="stop", code="invalid_type")
    return tuple(stops)


def _first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def _possible_stop(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop string."""
    lengths = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(lengths, default=0)
