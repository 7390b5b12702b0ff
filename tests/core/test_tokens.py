"""Tokens: written, checked, derived, and never taken for what they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.core import tokens

_KINDS = st.sampled_from(tokens.KINDS)


@given(_KINDS, st.binary(min_size=32, max_size=64))
def test_a_minted_token_is_recognised_by_its_kind(kind: str, entropy: bytes) -> None:
    token = tokens.mint(kind, entropy)
    assert tokens.parse(token) == kind
    assert len(token) == len(f"tm_{kind}_") + 36


@given(_KINDS, st.binary(min_size=32, max_size=32), st.integers(0, 60), st.characters())
def test_one_wrong_character_is_always_noticed(kind: str, entropy: bytes, place: int, character: str) -> None:
    token = tokens.mint(kind, entropy)
    place %= len(token)
    changed = token[:place] + character + token[place + 1 :]
    assert changed == token or tokens.parse(changed) is None


@given(st.text())
def test_any_text_is_told_from_a_token(text: str) -> None:
    assert tokens.parse(text) is None


def test_a_line_feed_after_a_token_is_not_a_token() -> None:
    assert tokens.parse(tokens.mint("user", bytes(32)) + "\n") is None


def test_derived_tokens_differ_by_subject_kind_and_pepper_and_repeat() -> None:
    made = {
        tokens.derive(*each)
        for each in (("run", "a", b"p"), ("run", "b", b"p"), ("job", "a", b"p"), ("run", "a", b"q"))
    }
    assert len(made) == 4
    assert tokens.derive("run", "a", b"p") in made


def test_a_digest_is_keyed() -> None:
    token = tokens.mint("user", bytes(32))
    assert tokens.digest(token, b"p") != tokens.digest(token, b"q")
    assert token not in tokens.digest(token, b"p")


@pytest.mark.parametrize(("kind", "entropy"), [("root", bytes(32)), ("user", bytes(31))])
def test_a_weak_or_unknown_token_is_not_minted(kind: str, entropy: bytes) -> None:
    with pytest.raises(ValueError, match=r"token|entropy"):
        tokens.mint(kind, entropy)
