"""The gateway's own answers, in the shapes that OpenAI clients know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import orjson

if TYPE_CHECKING:
    from tidemill.gateway.table import Route

_TYPES: Final = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. ``headers`` are those beyond Content-Type and Content-Length."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Sequence[tuple[bytes, bytes]] = ()
    code: str = ""
    """The error's, empty when it is none."""


def error_body(status: int, code: str, message: str, param: str | None = None, kind: str = "") -> bytes:
    """An error as OpenAI clients read it."""
    kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def refuse(
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
    kind: str = "",
) -> Answer:
    """An answer that says no, and what to do. ``kind`` is the error's type, when it is not what the status says."""
    return Answer(status=status, body=error_body(status, code, message, param, kind), headers=headers, code=code)


def overloaded(code: str, message: str, *, retry_after_s: int) -> Answer:
    """A 503 that says when to come back."""
    return refuse(503, code, message, headers=((b"Retry-After", b"%d" % retry_after_s),))


def moved(location: bytes) -> Answer:
    """A 308: the same request, there."""
    return Answer(status=308, body=b"", content_type=b"text/plain", headers=((b"Location", location),))


def unauthorized(message: str) -> Answer:
    """A 401 in OpenAI's words."""
    return refuse(401, "invalid_api_key", message, headers=((b"WWW-Authenticate", b"Bearer"),))


def model_not_found(model: str, near: Sequence[str]) -> Answer:
    """A 404 that offers the nearest names."""
    shown = model if len(model) <= 128 else model[:128] + "…"
    hint = f" Did you mean {' or '.join(near)}?" if near else " GET /v1/models lists the models you may use."
    return refuse(404, "model_not_found", f"The model '{shown}' does not exist for this key.{hint}", param="model")


def service_not_found(service: str, route: Route | None) -> Answer:
    """A 404; ``route`` is that of a service of that name whose paths are not open."""
    if route is None:
        message = f"The service '{service}' does not exist for this key. Names are as tidemill ps shows them."
    else:
        message = f"The service '{service}' is asked by its model, '{route.model}'; service.http: true opens its paths."
    return refuse(404, "service_not_found", message)


def model_list(routes: Sequence[Route]) -> Answer:
    """OpenAI's list of models."""
    return Answer(status=200, body=orjson.dumps({"object": "list", "data": [_model(route) for route in routes]}))


def model(route: Route) -> Answer:
    """OpenAI's description of one model."""
    return Answer(status=200, body=orjson.dumps(_model(route)))


def error_event(code: str, message: str, *, status: int = 502) -> bytes:
    """A server-sent event that tells of an error after the stream began, ending any event left half sent."""
    return b"\n\nevent: error\ndata: " + error_body(status, code, message) + b"\n\n"


def reason(status: int) -> bytes:
    """The phrase beside a status."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def _model(route: Route) -> dict[str, object]:
    return {"id": route.model, "object": "model", "created": 0, "owned_by": route.project}
