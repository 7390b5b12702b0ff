"""What a request says of itself beside its words: how long it may wait, how urgent it is, where it may be
served, and for whom it is booked.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from tidemill.core import tokens
from tidemill.gateway import answers
from tidemill.gateway.answers import Answer
from tidemill.gateway.journey import Asking
from tidemill.gateway.messages import RequestHead
from tidemill.model.limits import Priority

WAIT_HEADER: Final = b"x-tidemill-wait"
PRIORITY_HEADER: Final = b"x-tidemill-priority"
COUNTRIES_HEADER: Final = b"x-tidemill-countries"
LABEL_HEADER: Final = b"x-tidemill-label"
_LABEL_IN_BODY: Final = "tidemill_label"
_BANDS: Final = {priority.value.encode(): priority.band for priority in Priority}
_COUNTRY: Final = re.compile(r"[A-Z]{3}")
_LABEL: Final = re.compile(r"[^\x00-\x1f\x7f]{1,100}")
_LONGEST_USER: Final = 256


def read_wishes(asking: Asking, head: RequestHead, content: dict[str, Any], *, longest_wait_s: float) -> Answer | None:
    """Nothing, when all wishes are in ``asking`` now; else the answer that says what is wrong with one.

    A request may go later than its key's others, never sooner.
    """
    metadata = content.get("metadata")
    if metadata is not None and isinstance(metadata, dict) and _LABEL_IN_BODY in metadata:
        refusal = _label(asking, metadata[_LABEL_IN_BODY], f"metadata.{_LABEL_IN_BODY}")
        if refusal is not None:
            return refusal
    for name, value in head.own:
        if name == WAIT_HEADER:
            try:
                wait_s = float(value)
            except ValueError:
                wait_s = -1.0
            if not 0 <= wait_s <= longest_wait_s or asking.wait_s is not None:
                message = f"X-Tidemill-Wait is one number of seconds from 0 to {longest_wait_s:g}."
                return answers.refuse(400, "invalid_wait", message, param="X-Tidemill-Wait")
            asking.wait_s = wait_s
        elif name == PRIORITY_HEADER:
            band = _BANDS.get(value.lower())
            if band is None:
                message = f"X-Tidemill-Priority is {', '.join(Priority)}, and lowers the key's own only."
                return answers.refuse(400, "invalid_priority", message, param="X-Tidemill-Priority")
            asking.band = max(asking.band, band)
        elif name == COUNTRIES_HEADER:
            refusal = _within(asking, value)
            if refusal is not None:
                return refusal
        elif name == LABEL_HEADER:
            refusal = _label(asking, value.decode("utf-8", "replace"), "X-Tidemill-Label")
            if refusal is not None:
                return refusal
    return None


def user_of(content: dict[str, Any]) -> str:
    """Who asks, in the words of the client's own service; empty when it does not say."""
    user = content.get("user") or content.get("safety_identifier")
    return user[:_LONGEST_USER].replace("\0", "") if isinstance(user, str) else ""


class Salts:
    """What each tenant's prefixes are kept apart by in engines, which nobody can guess without ``secret``."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._known: dict[str, str] = {}

    def of(self, tenant: str) -> str:
        """The salt of that tenant; the same in every process of the installation."""
        salt = self._known.get(tenant)
        if salt is None:
            salt = self._known[tenant] = tokens.digest(f"cache_salt:{tenant}", self._secret)[:43]
        return salt


@lru_cache(maxsize=256)
def _countries_in(value: bytes) -> frozenset[str] | None:
    """The codes in a list with commas; None when it is none."""
    codes = [part.strip() for part in value.decode("latin-1").split(",")]
    return frozenset(codes) if all(_COUNTRY.fullmatch(code) for code in codes) else None


def _within(asking: Asking, value: bytes) -> Answer | None:
    """Keep the request in some of the countries that it may be served in."""
    named = _countries_in(value)
    if named is None:
        message = "X-Tidemill-Countries lists ISO 3166 alpha-3 codes, such as DEU, FRA."
        return answers.refuse(400, "invalid_countries", message, param="X-Tidemill-Countries")
    allowed = named & asking.countries if asking.countries else named
    if not allowed:
        message = f"This key's requests are served in {', '.join(sorted(asking.countries))} only."
        return answers.refuse(403, "country_not_allowed", message, param="X-Tidemill-Countries")
    asking.countries = allowed
    return None


def _label(asking: Asking, value: object, param: str) -> Answer | None:
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        message = f"{param} is a text of up to 100 characters."
        return answers.refuse(400, "invalid_label", message, param=param)
    asking.label = value
    return None
