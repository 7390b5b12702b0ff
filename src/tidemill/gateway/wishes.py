"""What a request asks of its replica: where it may be served, and what it belongs together with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from tidemill.core.routing import Wish, key_of, prefix_of
from tidemill.gateway import answers
from tidemill.gateway.answers import Answer
from tidemill.gateway.messages import Headers, RequestHead
from tidemill.gateway.table import Key, Route

COUNTRIES_HEADER: Final = b"x-tidemill-countries"
SESSION_HEADER: Final = b"x-session-id"
SESSION_COOKIE: Final = b"tidemill_session"
SESSION_FIELDS: Final = ("prompt_cache_key", "user")
"""What OpenAI's API has for requests that belong together, in order."""
_PROMPTED: Final = frozenset({b"/v1/completions", b"/v1/chat/completions", b"/v1/responses"})
_COUNTRY: Final = re.compile(r"[A-Z]{3}")


def wish_of(
    head: RequestHead, path: bytes, route: Route, key: Key, *, asked: bytes | None, content: Mapping[str, Any]
) -> Wish | Answer | None:
    """What the request asks; None when any replica will do; or the answer that refuses it.

    ``asked`` is the value of ``X-Tidemill-Countries``, ``content`` the body as far as it is JSON.
    """
    countries = key.countries
    if asked is not None:
        named = countries_in(asked)
        if named is None:
            message = "X-Tidemill-Countries lists ISO 3166 alpha-3 codes, such as DEU, FRA."
            return answers.refuse(400, "invalid_countries", message, param="X-Tidemill-Countries")
        countries = named & countries if countries else named
        if not countries:
            message = f"This key's requests are served in {', '.join(sorted(key.countries))} only."
            return answers.refuse(403, "country_not_allowed", message, param="X-Tidemill-Countries")
    if route.affinity == "session":
        session = session_of(head.headers, content)
        if session:
            return Wish(countries=countries, key=_own(key, b"session", session), is_session=True)
    elif route.affinity == "prefix" and path in _PROMPTED and len(route.replicas) > 1:
        prefix = prefix_of(content)
        if prefix:
            return Wish(countries=countries, key=_own(key, b"prefix", prefix.encode(errors="surrogatepass")))
    return Wish(countries=countries) if countries else None


@lru_cache(maxsize=256)
def countries_in(value: bytes) -> frozenset[str] | None:
    """The codes in a list with commas; None when it is none."""
    codes = [part.strip() for part in value.decode("latin-1").split(",")]
    return frozenset(codes) if all(_COUNTRY.fullmatch(code) for code in codes) else None


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


def _own(key: Key, kind: bytes, value: bytes) -> int:
    """A key that no other tenant's request has, whatever it says."""
    return key_of(kind, (key.project or key.id).encode(), value)
