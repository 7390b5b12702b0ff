"""A conversation with a model over the gateway, with nothing but the standard library: ``Chat``.

Programs that want more than this use the ``openai`` client, with the gateway's address and a token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from tidemill.errors import Forbidden, InvalidRequest, NotFound, TidemillError, Unauthorized, Unavailable

_MOST_ERROR = 64 * 1024
_KINDS: Mapping[int, type[TidemillError]] = {
    400: InvalidRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 413: InvalidRequest, 429: Unavailable,
    503: Unavailable,
}  # fmt: skip


@dataclass(kw_only=True)
class Reply:
    """What a model answered; times in seconds. ``finish`` is why it ended, empty when it was stopped."""

    text: str = ""
    thoughts: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    request_id: str = ""
    first_s: float = 0.0
    whole_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "content": self.text,
            **({"reasoning": self.thoughts} if self.thoughts else {}),
            "finish_reason": self.finish,
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens},
            "request_id": self.request_id,
            "time_to_first_token_s": round(self.first_s, 4),
            "duration_s": round(self.whole_s, 4),
        }


@dataclass(kw_only=True)
class Chat:
    """Messages with one model, at ``url`` without ``/v1``. ``options`` go with each request, such as ``max_tokens``."""

    url: str
    token: str
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    reply: Reply = field(default_factory=Reply)
    """The last one, also while it comes."""

    @property
    def system(self) -> str:
        """What the model is told before all else."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = self.messages[1:] if self.system else self.messages
        self.messages[:] = [*([{"role": "system", "content": text}] if text else []), *rest]

    def clear(self) -> None:
        """Forget what was said, but not what the model is told before."""
        self.system, self.messages[:] = self.system, self.messages[:1] if self.system else []

    def models(self) -> tuple[str, ...]:
        """The models that the token opens. Raises: TidemillError."""
        connection = self._connection(10.0)
        try:
            connection.request("GET", f"{urlsplit(self.url).path.rstrip('/')}/v1/models", headers=self._headers())
            answer = connection.getresponse()
            if answer.status != 200:
                raise error_of(answer.status, answer.read(_MOST_ERROR))
            return tuple(str(one["id"]) for one in json.loads(answer.read())["data"])
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise self._away(error) from error
        finally:
            connection.close()

    def ask(self, text: str) -> Generator[str, None, None]:
        """What the model says to that, in pieces as they come; both are in ``messages`` then.

        Who closes the iterator stops the model; what it said until then is kept. After an error nothing is.
        Raises: TidemillError.
        """
        began = time.monotonic()
        self.reply = reply = Reply()
        self.messages.append({"role": "user", "content": text})
        connection = self._connection(self.timeout_s)
        try:
            for kind, piece in self._stream(connection):
                reply.first_s = reply.first_s or time.monotonic() - began
                if kind == "content":
                    reply.text += piece
                    yield piece
                else:
                    reply.thoughts += piece
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(reply, began)
            raise
        except (OSError, HTTPException, ValueError) as error:
            self.messages.pop()
            raise self._away(error) from error
        except TidemillError:
            self.messages.pop()
            raise
        else:
            self._keep(reply, began)
        finally:
            connection.close()

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"model": self.model, "messages": self.messages, **self.options}

    def _keep(self, reply: Reply, began: float) -> None:
        reply.whole_s = time.monotonic() - began
        if reply.text:
            self.messages.append({"role": "assistant", "content": reply.text})
        else:
            self.messages.pop()

    def _stream(self, connection: HTTPConnection) -> Iterator[tuple[str, str]]:
        body = {**self.body(), "stream": True, "stream_options": {"include_usage": True}}
        path = f"{urlsplit(self.url).path.rstrip('/')}/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), self._headers() | {"Content-Type": "application/json"})
        answer = connection.getresponse()
        self.reply.request_id = answer.headers.get("X-Request-Id", "")
        if answer.status != 200:
            raise error_of(answer.status, answer.read(_MOST_ERROR))
        for event in _events(answer):
            if "error" in event:
                raise error_of(502, json.dumps(event).encode())
            usage = event.get("usage")
            if isinstance(usage, dict):
                self.reply.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                self.reply.completion_tokens = int(usage.get("completion_tokens") or 0)
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                self.reply.finish = choice.get("finish_reason") or self.reply.finish
                thought = delta.get("reasoning_content") or delta.get("reasoning")
                if thought:
                    yield "thought", str(thought)
                if delta.get("content"):
                    yield "content", str(delta["content"])

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Connection": "close"}

    def _connection(self, timeout_s: float) -> HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            mend = "Write for example http://127.0.0.1:7071."
            raise InvalidRequest("It is not the gateway's address.", field="url", value=self.url, mend=mend)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(parts.hostname, parts.port, timeout=timeout_s)

    def _away(self, error: Exception) -> TidemillError:
        return Unavailable(f"The gateway at {self.url} does not answer: {error}.", mend="See tidemill status.")


def error_of(status: int, body: bytes) -> TidemillError:
    """The error in an answer of the gateway or of a model."""
    try:
        told = json.loads(body)["error"]
        message, param, code = str(told["message"]), str(told.get("param") or ""), str(told.get("code") or "")
    except (ValueError, KeyError, TypeError):
        message, param, code = body[:300].decode(errors="replace") or f"It answered {status}.", "", ""
    return _KINDS.get(status, TidemillError)(message, field=param, reason=code)


def _events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises: ValueError for one that is none, OSError when it ends too early."""
    for line in answer:
        data = line.strip()
        if not data.startswith(b"data:"):
            continue
        data = data[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if isinstance(event, dict):
            yield event
    raise ConnectionError("the answer ended too early")
