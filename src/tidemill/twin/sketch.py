"""Distributions in little memory: every quantile of a stream of numbers to within one percent."""

from __future__ import annotations

import math
from typing import Final

_GAMMA: Final = 1.02
_SCALE: Final = 1 / math.log(_GAMMA)


class Sketch:
    """Counts by powers of 1.02; the sum is exact.

    Source: DDSketch (Masson, Rim, Lee, VLDB 2019), without collapsing: twelve decades take 1,400 counts.

    >>> sketch = Sketch()
    >>> for number in range(1, 101):
    ...     sketch.add(number)
    >>> round(sketch.quantile(0.5)), sketch.mean
    (50, 50.5)
    """

    __slots__ = ("_counts", "count", "highest", "total", "zeros")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.zeros = 0
        self.count = 0
        self.total: float = 0
        self.highest: float = 0

    def add(self, value: float) -> None:
        """Count one number, zero or more."""
        self.count += 1
        self.total += value
        if value > self.highest:
            self.highest = value
        if value <= 0:
            self.zeros += 1
            return
        bucket = math.ceil(math.log(value) * _SCALE)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    @property
    def mean(self) -> float:
        """The mean; zero of nothing."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The number that this share of all numbers does not exceed, within one percent; zero of nothing."""
        wanted = math.ceil(share * self.count)
        if wanted <= self.zeros:
            return 0.0
        seen = self.zeros
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return min(2 * _GAMMA**bucket / (_GAMMA + 1), self.highest)
        return self.highest

    def steps(self) -> list[tuple[float, float]]:
        """The distribution as ``(number, share of numbers that do not exceed it)``."""
        found, seen = [], self.zeros
        if self.zeros:
            found.append((0.0, seen / self.count))
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            found.append((min(2 * _GAMMA**bucket / (_GAMMA + 1), self.highest), seen / self.count))
        return found
