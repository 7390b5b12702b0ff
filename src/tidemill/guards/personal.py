"""Personal data that has a form: e-mail addresses, telephone and card numbers, IBANs, IP addresses.

What has check digits is checked by them. Every expression here reads a character a bounded number of times. Sources:
ISO/IEC 7812-1 (Luhn), ISO 13616 (IBAN), ITU-T E.164 (lengths of telephone numbers), RFC 5321 (lengths of addresses).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Final

from tidemill.guards.looking import Found

_LOCAL: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]")
_DOMAIN: Final = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])")
_CARD: Final = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?!\d)")
_IBAN: Final = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_PHONE: Final = re.compile(r"(?<![\w+./-])(?:\+|\(\+?)?\d[\d ()./-]{5,22}\d(?!\w)")
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}")
_IPV4: Final = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?![\w:])")
_DIGIT: Final = re.compile(r"\d")
_OF_GROUPS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ()+./-")
"""What numbers in groups are written with."""
_REACH: Final = 320
_LONGEST_LOCAL: Final = 64


class Personal:
    """Finds personal data. ``kinds`` are those of ``DETECTORS``; none given means all.

    >>> Personal().find("Write to ada@example.org or +44 20 7946 0958.")
    [Found(start=9, end=24, label='EMAIL'), Found(start=28, end=44, label='PHONE')]
    """

    reach: int = _REACH
    is_slow: bool = False

    def __init__(self, *, kinds: Sequence[str] = ()) -> None:
        wanted = [kinds] if isinstance(kinds, str) else list(kinds)
        unknown = [one for one in wanted if one not in DETECTORS]
        if unknown:
            raise ValueError(f"kinds: {unknown[0]!r} is none of {', '.join(DETECTORS)}")
        self._detectors = [DETECTORS[one] for one in wanted or DETECTORS]

    def find(self, text: str, start: int = 0) -> list[Found]:
        """The pieces, the longer before the shorter where two overlap."""
        every = sorted(
            (found for detect in self._detectors for found in detect(text, start)),
            key=lambda one: (one.start, -one.end),
        )
        kept: list[Found] = []
        for one in every:
            if not kept or one.start >= kept[-1].end:
                kept.append(one)
        return kept

    def open_from(self, text: str) -> int:
        """Where the last word begins, or what may be groups of a number that goes on."""
        least = at = max(0, len(text) - self.reach)
        for at in range(len(text), least, -1):
            if text[at - 1].isspace():
                break
        else:
            at = least
        group = len(text)
        while group > least and text[group - 1] in _OF_GROUPS:
            group -= 1
        return min(at, group)


def _emails(text: str, start: int) -> Iterator[Found]:
    at = text.find("@", start)
    while at >= 0:
        first = at
        while first > start and at - first < _LONGEST_LOCAL and _LOCAL.match(text[first - 1]):
            first -= 1
        while first < at and text[first] in ".'*/":
            first += 1
        domain = _DOMAIN.match(text, at + 1)
        if first < at and text[at - 1] != "." and domain is not None:
            yield Found(first, domain.end(), "EMAIL")
            at = domain.end() - 1
        at = text.find("@", at + 1)


def _cards(text: str, start: int) -> Iterator[Found]:
    for match in _CARD.finditer(text, start) if _DIGIT.search(text, start) else ():
        digits = [int(one) for one in match[0] if one.isdigit()]
        doubled = [one if place % 2 == 0 else one * 2 - 9 * (one > 4) for place, one in enumerate(reversed(digits))]
        if sum(doubled) % 10 == 0 and len(set(digits)) > 1:
            yield Found(match.start(), match.end(), "CARD")


def _ibans(text: str, start: int) -> Iterator[Found]:
    for match in _IBAN.finditer(text, start) if _DIGIT.search(text, start) else ():
        letters = match[0].replace(" ", "")
        moved = letters[4:] + letters[:4]
        if 15 <= len(letters) <= 34 and int("".join(str(int(one, 36)) for one in moved)) % 97 == 1:
            yield Found(match.start(), match.end(), "IBAN")


def _phones(text: str, start: int) -> Iterator[Found]:
    for match in _PHONE.finditer(text, start) if _DIGIT.search(text, start) else ():
        number = match[0]
        digits = sum(map(str.isdigit, number))
        groups = len(re.findall(r"\d+", number))
        is_international = number.startswith(("+", "(+", "00"))
        if not 8 <= digits <= 15 or _DATE.match(number) or _IPV4.match(number):
            continue
        if is_international or (number.startswith(("0", "(")) and digits >= 9) or (groups == 3 and digits == 10):
            yield Found(match.start(), match.end(), "PHONE")


def _addresses(text: str, start: int) -> Iterator[Found]:
    for pattern in (_IPV4, _IPV6) if ":" in text else (_IPV4,):
        for match in pattern.finditer(text, start):
            if pattern is _IPV6 and match[0].count(":") < 2:
                continue
            try:
                ip_address(match[0])
            except ValueError:
                continue
            if match[0] != "::":
                yield Found(match.start(), match.end(), "IP")


DETECTORS: Final[Mapping[str, Callable[[str, int], Iterator[Found]]]] = {
    "email": _emails,
    "phone": _phones,
    "card": _cards,
    "iban": _ibans,
    "ip": _addresses,
}
"""By the name that options use."""
