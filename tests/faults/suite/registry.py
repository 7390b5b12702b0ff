"""The cases by number: what goes wrong, and what has to hold then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.faults.suite.bed import Beds

BOTH: Final = ("sqlite", "postgres")


class Skipped(Exception):
    """This machine cannot show the case; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``run`` gives the figure in words, and raises AssertionError when the criterion does not hold."""

    number: int
    fault: str
    criterion: str
    stores: tuple[str, ...]
    is_alone: bool
    """It compares how quick something is, so nothing else may run beside it."""
    run: Callable[[Beds], str]


CASES: Final[dict[int, Case]] = {}


def case(
    number: int, fault: str, criterion: str, *, stores: tuple[str, ...] = BOTH, is_alone: bool = False
) -> Callable[[Callable[[Beds], str]], Callable[[Beds], str]]:
    """Register a function as the case of that number."""

    def registered(function: Callable[[Beds], str]) -> Callable[[Beds], str]:
        assert number not in CASES, f"case {number} is there twice"
        CASES[number] = Case(
            number=number, fault=fault, criterion=criterion, stores=stores, is_alone=is_alone, run=function
        )
        return function

    return registered
