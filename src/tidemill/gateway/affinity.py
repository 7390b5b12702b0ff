"""What a request belongs together with: others that begin as it does, or others of its session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from tidemill.core.routing import Wish, key_of, prefix_of
from tidemill.gateway.journey import Asking
from tidemill.gateway.messages import Headers
from tidemill.gateway.table import Key

SESSION_HEADER: Final = b"x-session-id"
SESSION_COOKIE: Final = b"tidemill_session"
SESSION_FIELDS: Final = ("prompt_cache_key", "user")
"""What OpenAI's API has for requests that belong together, in order."""
_PROMPTED: Final = frozenset({b"/v1/completions", b"/v1/chat/completions", b"/v1/responses"})


def wish_of(asking: Asking, headers: Headers, path: bytes, key: Key, content: Mapping[str, Any]) -> Wish | None:
    """What the request asks; None when any replica will do. ``content`` is its body as far as it is JSON."""
    route, countries = asking.route, asking.countries
    if route.affinity == "session":
        session = session_of(headers, content)
        if session:
            return Wish(countries=countries, key=_own(key, b"session", session), is_session=True)
    elif route.affinity == "prefix" and path in _PROMPTED and len(route.replicas) > 1:
        prefix = prefix_of(content)
        if prefix:
            return Wish(countries=countries, key=_own(key, b"prefix", prefix.encode(errors="surrogatepass")))
    return Wish(countries=countries) if countries else None


def session_of(headers: Headers, content: Mapping[str, Any]) -> bytes:
    """What the request says that it belongs to: its header, its cookie, or a field of its body; empty: nothing."""
    cookie = b""
    for name, value in headers:
        if name == SESSION_HEADER and value:
            return value
        if name == b"cookie" and not cookie:
            cookie = cookie_in(value)
    if cookie:
        return cookie
    for field in SESSION_FIELDS:
        said = content.get(field)
        if isinstance(said, str) and said:
            return said.encode(errors="surrogatepass")
    return b""


def cookie_in(value: bytes) -> bytes:
    """The session in a header ``Cookie``; empty when there is none."""
    for part in value.split(b";"):
        name, _, text = part.strip().partition(b"=")
        if name == SESSION_COOKIE:
            return text
    return b""


def session_for(headers: Headers, path: bytes) -> tuple[Headers, bytes]:
    """The headers as if they had a new session, and the cookie by which a browser keeps it under that path."""
    session = os.urandom(16).hex().encode()
    cookie = b"%b=%b; Path=%b; HttpOnly; SameSite=Lax" % (SESSION_COOKIE, session, path)
    return [*headers, (SESSION_HEADER, session)], cookie


def _own(key: Key, kind: bytes, value: bytes) -> int:
    """A key that no other tenant's request has, whatever it says."""
    return key_of(kind, (key.project or key.id).encode(), value)
