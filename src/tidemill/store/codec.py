"""Values as JSON text and back, strictly: what is read equals what was written, in value and type.

A field that a later version adds needs a default; then what an earlier version wrote can still be read.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_ENCODER = msgspec.json.Encoder()


def encode(value: object) -> str:
    """The JSON text of a model value.

    Raises: ValueError when a text in it cannot be written as UTF-8 (a lone surrogate).
    """
    return _ENCODER.encode(value).decode()


def decode(kind: type[T], text: str) -> T:
    """The value of that kind behind its JSON text; its own checks run again.

    Raises: ValueError when the text is not such a value.
    """
    it: Any = kind
    value: T = _decoder(it).decode(text)
    return value


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)
