"""Figures beside what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.clouds import table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure under its name in the last line. ``bar`` None: nothing is asked of it.

    It is to be at most ``bar``, or at least with ``is_least``. ``value`` None: it was not measured. ``why`` says what
    the table is to say of it beside.
    """

    name: str
    what: str
    value: float | None
    bar: float | None = None
    is_least: bool = False
    why: str = ""

    @classmethod
    def most(cls, name: str, what: str, value: float | None, bar: float) -> Figure:
        """One that is to be no more than that."""
        return cls(name=name, what=what, value=value, bar=bar)

    @classmethod
    def least(cls, name: str, what: str, value: float | None, bar: float, *, why: str = "") -> Figure:
        """One that is to be no less."""
        return cls(name=name, what=what, value=value, bar=bar, is_least=True, why=why)

    @property
    def is_met(self) -> bool | None:
        """Whether it is what is asked; None where nothing is, or nothing was measured."""
        if self.value is None or self.bar is None:
            return None
        return self.value >= self.bar if self.is_least else self.value <= self.bar


def tell(figures: Sequence[Figure]) -> None:
    """Print what is asked, and whether it is so."""
    rows = []
    for one in figures:
        if one.bar is not None:
            verdict = {None: "not measured", True: "ok", False: "missed"}[one.is_met]
            value = "" if one.value is None else f"{one.value:,.10g}"
            rows.append(
                (one.what, value, f"{'at least' if one.is_least else 'at most'} {one.bar:,.10g}", verdict, one.why)
            )
    if rows:
        print("\nWhat is asked")
        table(("", "figure", "bar", "", ""), rows)


def as_json(figures: Sequence[Figure]) -> dict[str, Any]:
    """Every figure by its name, and under ``bars`` what is asked of it and whether it is so."""
    told: dict[str, Any] = {one.name: one.value for one in figures}
    told["bars"] = {one.name: [one.bar, one.is_met] for one in figures if one.bar is not None}
    return told
