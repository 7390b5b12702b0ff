"""Tokens: how they are written, told from rubbish, derived and kept.

``tm_<kind>_<30 base62><6 base62>``: about 178 bits of secret, then the CRC-32 of everything before it, so that a
mistyped or foreign string is refused without a look-up and a leaked one can be found by scanners. Only the keyed
hash of a token is ever stored. Source: GitHub's token format, 2021.
"""

from __future__ import annotations

import hmac
import re
import zlib
from functools import lru_cache
from typing import Final

KINDS: Final = ("user", "run", "job", "gw")
"""People and service accounts; one launch's runner; one running job; the gateway."""

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH: Final = 30
_CHECK_LENGTH: Final = 6
_ENTROPY_BYTES: Final = 32
_FORMAT: Final = re.compile(r"(tm_(user|run|job|gw)_[0-9A-Za-z]{30})([0-9A-Za-z]{6})", re.ASCII)


def mint(kind: str, entropy: bytes) -> str:
    """A new token of ``kind`` made from at least 32 bytes of ``entropy``; the same entropy gives the same token.

    Raises: ValueError for an unknown kind or too little entropy.

    >>> mint("user", bytes(32))
    'tm_user_00000000000000000000000000000011IRbc'
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of token; use one of {', '.join(KINDS)}")
    if len(entropy) < _ENTROPY_BYTES:
        raise ValueError(f"{len(entropy)} bytes of entropy are too few for a token; give at least {_ENTROPY_BYTES}")
    body = f"tm_{kind}_{_base62(int.from_bytes(entropy, 'big') % 62**_SECRET_LENGTH, _SECRET_LENGTH)}"
    return body + checksum(body)


def parse(token: str) -> str | None:
    """The kind of a well-formed token whose checksum holds; None for anything else.

    >>> parse("tm_user_00000000000000000000000000000011IRbc"), parse("tm_user_00000000000000000000000000000011IRbd")
    ('user', None)
    """
    match = _FORMAT.fullmatch(token)
    return match[2] if match is not None and checksum(match[1]) == match[3] else None


def checksum(body: str) -> str:
    """The six base62 characters that end a token starting with ``body``."""
    return _base62(zlib.crc32(body.encode()), _CHECK_LENGTH)


def digest(token: str, pepper: bytes) -> str:
    """What is stored and looked up in place of a token: its HMAC-SHA256 under ``pepper``, in hex."""
    return _keyed_hash(pepper, token).hex()


def derive(kind: str, subject: str, pepper: bytes) -> str:
    """The one token of ``kind`` that belongs to ``subject``, for example a launch id; never needs to be stored."""
    return mint(kind, _keyed_hash(pepper, f"{kind}:{subject}"))


def _keyed_hash(key: bytes, text: str) -> bytes:
    """HMAC-SHA256, without letting go of the interpreter's lock, which a busy process takes 5 ms to get back."""
    keyed = _keyed(key).copy()
    keyed.update(text.encode())
    return keyed.digest()


@lru_cache(maxsize=8)
def _keyed(key: bytes) -> hmac.HMAC:
    return hmac.new(key, digestmod="sha256")


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
