"""Reading what a request carries, with a limit, and strictly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tidemill.api.problems import Malformed, WrongMediaType, from_validation
from tidemill.control.blobs import Draft
from tidemill.errors import TooLarge
from tidemill.units import format_size

JSON_LIMIT: Final = 32 << 20
_BATCH: Final = 1 << 20
Model = TypeVar("Model", bound=BaseModel)


def json_answer(content: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, media_type="application/json")


async def octets(request: Request, limit: int = JSON_LIMIT) -> bytes:
    """The whole body. Raises: TooLarge, Malformed when it breaks off."""
    check_length(request, limit)
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Malformed("The request broke off.")
        if piece := message.get("body", b""):
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def stream(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in pieces. Raises: TooLarge, Malformed when it breaks off."""
    check_length(request, limit)
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            if piece:
                yield piece
    except ClientDisconnect as error:
        raise Malformed("The request broke off.") from error


async def write_draft(request: Request, draft: Draft, limit: int) -> int:
    """The number of octets received, all of them written, in large steps. Raises: as ``stream``, StorageFull."""
    waiting = bytearray()
    async for piece in stream(request, limit):
        waiting += piece
        if len(waiting) >= _BATCH:
            await run_in_threadpool(draft.write, bytes(waiting))
            waiting.clear()
    if waiting:
        await run_in_threadpool(draft.write, bytes(waiting))
    return draft.size


async def json_object(request: Request) -> tuple[dict[str, Any], bytes]:
    """The body's JSON object and its octets. Raises: TooLarge, Malformed, WrongMediaType."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise WrongMediaType(
            "The body is not declared as JSON.",
            field="Content-Type",
            value=kind[:100],
            mend="Send the header Content-Type: application/json.",
        )
    raw = await octets(request)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body is not JSON: {error}.", mend="Send one JSON object in UTF-8.") from None
    if type(value) is not dict:
        raise Malformed("The body is not a JSON object.", mend='Send an object such as {"spec": {…}}.')
    return value, raw


async def body_of(request: Request, model: type[Model]) -> Model:
    """The body as ``model``. Raises: as ``json_object``, InvalidRequest that lists every mistake."""
    value, _ = await json_object(request)
    return checked(value, model)


def checked(value: dict[str, Any], model: type[Model]) -> Model:
    """The value as ``model``. Raises: InvalidRequest that lists every mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from None


def check_length(request: Request, limit: int) -> None:
    """Raises: TooLarge when the declared length is over the limit."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is over {format_size(limit)}.", field="body", mend="Send less, or raise the limit.")
