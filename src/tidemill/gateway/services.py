"""Paths of services that are no models, ``/services/NAME/…``: what is asked of which one, and what it is told.

The path goes on as it was sent, without ``/services/NAME``. What two readers could take for two paths (a dot segment,
a backslash, a control character) is refused, and so is OpenAI's API, which has its own paths here: by these it is
metered.
Source for WebSockets: RFC 6455, sections 4.1 and 4.2.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Final
from urllib.parse import unquote_to_bytes

from tidemill.gateway import answers
from tidemill.gateway.answers import Answer
from tidemill.gateway.messages import Headers, RequestHead, ResponseHead, end_to_end

PREFIX: Final = b"/services/"
IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
"""What may be sent again though a replica may have begun to work on it. Source: RFC 9110, section 9.2.2."""
HEDGED: Final = frozenset({b"GET", b"HEAD"})
_REFUSED: Final = frozenset({b"TRACE", b"CONNECT"})
_NAME: Final = re.compile(rb"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_PLAIN: Final = re.compile(rb"[!$-\[\]_a-z~|^`{}\"]*")
"""Visible ASCII without ``#`` and backslash."""
_SLASHES: Final = re.compile(rb"/+")
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_OURS: Final = frozenset(
    {
        b"authorization",
        b"content-length",
        b"expect",
        b"forwarded",
        b"host",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-real-ip",
        b"x-request-id",
    }
)
"""Headers that the gateway itself writes, or that are for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked of which service: a path that begins with ``/``, with its query."""

    service: str
    path: bytes


def target_of(head: RequestHead, *, closed: frozenset[bytes]) -> Target | Answer:
    """What a request asks of a service; or the answer that refuses it. ``closed`` are paths that have another way."""
    if head.method in _REFUSED:
        return answers.refuse(405, "method_not_allowed", f"{head.method.decode()} is not passed on.")
    name, slash, rest = head.target[len(PREFIX) :].partition(b"/")
    bare, mark, query = name.partition(b"?")
    if not slash and _NAME.fullmatch(bare):
        location = PREFIX + bare + b"/" + mark + query
        return answers.moved(location)
    path = (slash + rest).partition(b"?")[0]
    if not _NAME.fullmatch(name) or not _PLAIN.fullmatch(slash + rest):
        return answers.refuse(400, "invalid_target", "The path has characters that are not sent in a path.")
    decoded = unquote_to_bytes(path)
    if any(part in (b".", b"..") for part in re.split(rb"[/\\]", decoded)):
        return answers.refuse(400, "invalid_target", "The path has a segment . or .., which is not passed on.")
    if (_SLASHES.sub(b"/", decoded).rstrip(b"/") or b"/").lower() in closed:
        message = f"Ask {decoded.decode('ascii', 'replace')} of this gateway itself, with the model's name in the body."
        return answers.refuse(403, "use_the_model", message)
    return Target(service=name.decode(), path=slash + rest)


def headers_for(
    given: Sequence[tuple[bytes, bytes]], head: RequestHead, *, service: str, peer: str, is_trusted: bool
) -> list[tuple[bytes, bytes]]:
    """The headers that a service gets: its client's own, and who that is.

    ``given`` are those that concern no single connection. Of a peer that is ``trusted`` (a proxy on this machine) what
    it says of its own clients is kept.
    """
    said = dict(given) if is_trusted else {}
    kept = [pair for pair in given if pair[0] not in _OURS]
    before = said.get(b"x-forwarded-for")
    chain = b"%b, %b" % (before, peer.encode()) if before else peer.encode()
    return [
        *kept,
        (b"x-forwarded-for", chain),
        (b"x-forwarded-proto", said.get(b"x-forwarded-proto", b"http")),
        (b"x-forwarded-host", said.get(b"x-forwarded-host", head.host)),
        (b"x-forwarded-prefix", said.get(b"x-forwarded-prefix", b"") + PREFIX + service.encode()),
    ]


# WebSockets


def asks_upgrade(head: RequestHead) -> bool:
    """Whether the request asks for a WebSocket."""
    return any(name == b"upgrade" and value.lower() == b"websocket" for name, value in head.headers)


def check_upgrade(head: RequestHead) -> Answer | None:
    """The answer that refuses a request for a WebSocket; None when it is in order."""
    key, version = head.header(b"sec-websocket-key"), head.header(b"sec-websocket-version")
    if version != b"13":
        return answers.refuse(
            426,
            "websocket_version",
            "The version of WebSockets that is passed on is 13.",
            headers=((b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13")),
        )
    try:
        is_key = key is not None and len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        is_key = False
    connection = _tokens(head.headers, b"connection")
    if head.method != b"GET" or head.http_1_0 or head.length != 0 or b"upgrade" not in connection or not is_key:
        return answers.refuse(400, "invalid_handshake", "The request for a WebSocket is not as RFC 6455 has it.")
    return None


def why_no_upgrade(head: RequestHead, response: ResponseHead) -> str:
    """What is wrong with a replica's change to a WebSocket; empty when nothing is."""
    key = head.header(b"sec-websocket-key") or b""
    expected = base64.b64encode(sha1(key + _GUID, usedforsecurity=False).digest())
    found = [value for name, value in response.headers if name == b"sec-websocket-accept"]
    if found != [expected]:
        return "its key does not answer the client's"
    if _tokens(response.headers, b"upgrade") != [b"websocket"]:
        return "it is for another protocol"
    if b"upgrade" not in _tokens(response.headers, b"connection"):
        return "its header Connection does not say so"
    offered = _tokens(head.headers, b"sec-websocket-protocol", lower=False)
    chosen = _tokens(response.headers, b"sec-websocket-protocol", lower=False)
    if len(chosen) > 1 or not set(chosen) <= set(offered):
        return "it chose a subprotocol that was not offered"
    return ""


def _tokens(headers: Headers, name: bytes, *, lower: bool = True) -> list[bytes]:
    found = [part.strip() for key, value in headers if key == name for part in value.split(b",")]
    return [part.lower() if lower else part for part in found if part]


def passed_on(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers of a response that are for the client."""
    return end_to_end(headers, without=frozenset({b"content-length", b"x-request-id"}))
