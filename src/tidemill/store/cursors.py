"""Cursors of paged lists: where a page ended, as text that means something only here."""

from __future__ import annotations

import base64
from typing import TypeVar

import msgspec

from tidemill.errors import InvalidRequest

T = TypeVar("T")


def to_cursor(place: object) -> str:
    """The cursor of a place in a list."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def from_cursor(cursor: str, kind: type[T]) -> T:
    """The place behind a cursor. Raises: InvalidRequest when it is not one of this list."""
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor.encode()), type=kind)
    except ValueError as error:
        raise InvalidRequest(
            "This cursor is not one that was given out.", field="cursor", value=cursor, mend="Begin again without one."
        ) from error
