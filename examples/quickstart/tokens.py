"""Tokens are bytes of UTF-8, except that a run of 4, 8, ... 32 spaces is one token (the bytes 1 to 8).

A sixth of Python source is indentation. As one token it costs one step, and the model need not learn to count.
"""

from __future__ import annotations

import re
from typing import Final

BOUNDARY: Final = 0  # starts every file; never occurs in source text
_INDENT: Final = re.compile(rb"(?: {4}){1,8}")
_BYTES: Final = tuple(b" " * 4 * token if 1 <= token <= 8 else bytes([token]) for token in range(256))


def encode(text: bytes) -> bytes:
    """The tokens of a text, one byte each."""
    return _INDENT.sub(lambda run: bytes([len(run[0]) // 4]), text)


def decode(tokens: bytes) -> bytes:
    """The text of tokens: what was encoded, where that had no control characters from 1 to 8."""
    return b"".join(_BYTES[token] for token in tokens)
