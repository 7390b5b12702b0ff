"""Errors as answers: RFC 9457 problem+json with a stable code, the field, its value and the mend."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any, Final

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tidemill.errors import ErrorKind, InvalidRequest, NotFound, TidemillError

log = logging.getLogger(__name__)
MEDIA_TYPE: Final = "application/problem+json"

_STATUS: Final = {
    ErrorKind.INVALID: 422,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.UNAUTHORIZED: 401,
    ErrorKind.FORBIDDEN: 403,
    ErrorKind.CONFLICT: 409,
    ErrorKind.INFEASIBLE: 422,
    ErrorKind.TOO_LARGE: 413,
    ErrorKind.UNAVAILABLE: 503,
    ErrorKind.STORAGE_FULL: 507,
    ErrorKind.INTERNAL: 500,
}
_RESERVED: Final = frozenset(
    ("type", "title", "status", "code", "kind", "detail", "field", "value", "mend", "errors", "id")
)


class Malformed(InvalidRequest):
    """The request's body is not what its type says."""

    code = "malformed_request"


class WrongMediaType(InvalidRequest):
    """The request's body is of another type than this address takes."""

    code = "unsupported_media_type"


class WrongMethod(InvalidRequest):
    """This address does not take that method."""

    code = "method_not_allowed"


class WrongHost(InvalidRequest):
    """The request is addressed to a host that this is not."""

    code = "host_not_allowed"


class WrongOrigin(InvalidRequest):
    """The request comes from a page of another origin."""

    code = "origin_not_allowed"


_STATUS_OF_CODE: Final = {
    Malformed.code: 400,
    WrongMediaType.code: 415,
    WrongMethod.code: 405,
    WrongHost.code: 421,
    WrongOrigin.code: 403,
}


def status_of(error: TidemillError) -> int:
    """The HTTP status of an error."""
    return _STATUS_OF_CODE.get(error.code) or _STATUS[error.kind]


def problem(error: TidemillError) -> Response:
    """The answer that an error is."""
    if error.kind is ErrorKind.INTERNAL:
        return internal(error)
    status = status_of(error)
    body: dict[str, Any] = {
        "type": f"https://tidemill.dev/errors/{error.code}",
        "title": (type(error).__doc__ or "").strip().splitlines()[0] if type(error).__doc__ else error.code,
        "status": status,
        "code": error.code,
        "kind": error.kind.value,
        "detail": error.detail,
        "field": error.field,
        "value": error.value,
        "mend": error.mend,
        "errors": error.data.get("errors", ()),
    }
    body |= {key: value for key, value in error.data.items() if key not in _RESERVED}
    return Response(_encoded(body), status, headers=_headers(status, error), media_type=MEDIA_TYPE)


def internal(error: BaseException) -> Response:
    """The answer to what should not happen: an id that is in the log beside what happened, and no more."""
    identity = secrets.token_hex(8)
    log.error("internal error %s", identity, exc_info=error)
    body = {
        "type": "https://tidemill.dev/errors/internal",
        "title": "Something went wrong in Tidemill.",
        "status": 500,
        "code": "internal",
        "kind": ErrorKind.INTERNAL.value,
        "detail": "Something went wrong in Tidemill.",
        "field": "",
        "value": None,
        "mend": f"Look for {identity} in the control plane's log.",
        "errors": (),
        "id": identity,
    }
    return Response(orjson.dumps(body), 500, media_type=MEDIA_TYPE)


def from_http(error: HTTPException) -> TidemillError:
    """The error behind an answer of the framework itself."""
    detail = str(error.detail)
    match error.status_code:
        case 404:
            return NotFound("There is nothing at this address.", mend="See /v1/openapi.json for all addresses.")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            return WrongMethod(mend=f"Use {allowed}." if allowed else "", allow=allowed)
        case 413:
            return _of_kind(ErrorKind.TOO_LARGE, detail)
        case 400:
            return Malformed(detail)
        case _:
            return InvalidRequest(detail)


def from_validation(errors: list[Any]) -> TidemillError:
    """The error behind parameters that the framework refused, all of them."""
    found = []
    for item in errors[:50]:
        place = [str(part) for part in item.get("loc", ())]
        field = ".".join(place[1:] if place and place[0] in ("path", "query", "header", "body") else place)
        value = item.get("input")
        shown = value if isinstance(value, str | int | float | bool) or value is None else repr(value)[:80]
        found.append({"field": field, "value": shown, "detail": f"{item.get('msg', 'It is wrong')}.", "mend": ""})
    first = found[0] if found else {"field": "", "value": None, "detail": "The request cannot be understood."}
    return InvalidRequest(str(first["detail"]), field=str(first["field"]), value=first["value"], errors=found)


async def on_tidemill_error(_: Request, error: Exception) -> Response:
    """For the framework: the answer to our own errors."""
    return problem(error) if isinstance(error, TidemillError) else internal(error)


async def on_http_error(_: Request, error: Exception) -> Response:
    """For the framework: the answer to its own errors."""
    if not isinstance(error, HTTPException):
        return internal(error)
    answer = problem(from_http(error))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


def _of_kind(kind: ErrorKind, detail: str) -> TidemillError:
    made = type("TidemillError", (TidemillError,), {"code": kind.value, "kind": kind, "__doc__": detail})
    error: TidemillError = made(detail)
    return error


def _headers(status: int, error: TidemillError) -> Mapping[str, str]:
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if status == 503:
        return {"Retry-After": str(max(1, round(float(error.data.get("retry_after_s", 1)))))}
    return {}


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, default=_shown)
    except (orjson.JSONEncodeError, UnicodeError):
        plain = {key: value for key, value in body.items() if key in ("type", "title", "status", "code", "kind")}
        text = {key: str(body[key]).encode("ascii", "backslashreplace").decode() for key in ("detail", "field", "mend")}
        return orjson.dumps({**plain, **text, "value": None, "errors": []})


def _shown(value: object) -> str:
    return repr(value)[:200]
