"""What a key or a project may ask of models: how much of what, in how long, and whose requests go first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tidemill.units import USD_MICRO

MAX_AMOUNT: Final = 10**15
"""More requests and tokens than anybody has."""
MAX_USD: Final = 10**6


class Measure(StrEnum):
    """What is counted. ``TOKENS`` are those in and out together."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    INPUT = "input_tokens"
    OUTPUT = "output_tokens"
    MONEY = "usd"
    CONCURRENCY = "concurrency"
    """Requests at the same time."""


class Window(StrEnum):
    """In how long. A minute is any minute, a day and a month are those of UTC."""

    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """At most so much in a window; without a window, at a time. Money is in micro-USD."""

    measure: Measure
    amount: int
    window: Window | None = None

    def __post_init__(self) -> None:
        if (self.window is None) is not (self.measure is Measure.CONCURRENCY):
            raise ValueError("concurrency has no window, and everything else has one")
        most = MAX_USD * USD_MICRO if self.measure is Measure.MONEY else MAX_AMOUNT
        if not 0 <= self.amount <= most:
            raise ValueError(f"a limit lies between 0 and {most}")

    @property
    def name(self) -> str:
        """How it is written: ``requests/minute``, ``usd/month``, ``concurrency``."""
        return self.measure.value if self.window is None else f"{self.measure.value}/{self.window.value}"

    @property
    def written(self) -> int | float:
        """The amount as it is written: dollars for money."""
        if self.measure is not Measure.MONEY:
            return self.amount
        return self.amount // USD_MICRO if self.amount % USD_MICRO == 0 else self.amount / USD_MICRO


LIMITS: Final = (
    *(f"{measure}/{window}" for measure in Measure if measure is not Measure.CONCURRENCY for window in Window),
    Measure.CONCURRENCY.value,
)
"""All names that a limit can have."""


def limit_of(name: str, amount: float) -> Limit:
    """The limit of that name. Raises: ValueError with a sentence that says what is accepted.

    >>> limit_of("usd/month", 12.5)
    Limit(measure=<Measure.MONEY: 'usd'>, amount=12500000, window=<Window.MONTH: 'month'>)
    """
    if name not in LIMITS:
        raise ValueError(f"{name[:100]!r} is not a limit; limits are {', '.join(LIMITS)}")
    measure, _, window = name.partition("/")
    most = MAX_USD if measure == Measure.MONEY else MAX_AMOUNT
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount <= most:
        raise ValueError(f"{amount!r} is not an amount for {name}; write a number from 0 to {most}")
    exact = round(amount * USD_MICRO) if measure == Measure.MONEY else int(amount)
    if measure != Measure.MONEY and exact != amount:
        raise ValueError(f"{amount!r} is not an amount for {name}; write a whole number")
    return Limit(measure=Measure(measure), amount=exact, window=Window(window) if window else None)


def limits_of(given: Mapping[str, float]) -> tuple[Limit, ...]:
    """The limits in a mapping of names, in the order of ``LIMITS``. Raises: ValueError as ``limit_of``."""
    found = {name: limit_of(name, amount) for name, amount in given.items()}
    return tuple(found[name] for name in LIMITS if name in found)


class Priority(StrEnum):
    """Whose requests go first when they have to wait for a replica."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def band(self) -> int:
        """Zero for the first."""
        return _BANDS[self]


_BANDS: Final = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}
