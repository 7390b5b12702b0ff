"""Lengths of time counted in buckets, so that what several have measured can be put together.

Four buckets for each doubling, from a millisecond up to half an hour: a quantile is at most 19 % above the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

_PER_DOUBLING: Final = 4
_LEAST_NS: Final = 1_000_000
COUNT: Final = 84

Counts = Mapping[int, int]
"""How many were in each bucket that is not empty."""


def bucket_of(ns: float) -> int:
    """The bucket of a length of time.

    >>> bucket_of(0), bucket_of(1_000_000), bucket_of(1_100_000), bucket_of(2_000_000), bucket_of(10**18)
    (0, 0, 1, 4, 83)
    """
    if ns <= _LEAST_NS:
        return 0
    return min(COUNT - 1, math.ceil(math.log2(ns / _LEAST_NS) * _PER_DOUBLING - 1e-9))


def upper_ns(bucket: int) -> int:
    """The longest time that is in that bucket."""
    return int(_LEAST_NS * 2 ** (bucket / _PER_DOUBLING))


def quantile_ns(counts: Counts, share_milli: int) -> int | None:
    """What so many thousandths of those counted stay within; None when there are none.

    >>> quantile_ns({0: 95, 40: 5}, 950), quantile_ns({0: 94, 40: 6}, 950) == upper_ns(40), quantile_ns({}, 950)
    (1000000, True, None)
    """
    total = sum(counts.values())
    if not total:
        return None
    left = -(-total * share_milli // 1000)
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            return upper_ns(bucket)
    return upper_ns(max(counts))


def since(now: Counts, before: Counts) -> dict[int, int]:
    """What was counted between two looks at counts that only grow; all of it where they began anew."""
    if any(now.get(bucket, 0) < count for bucket, count in before.items()):
        return dict(now)
    return {bucket: more for bucket, count in now.items() if (more := count - before.get(bucket, 0))}


def together(*counts: Counts) -> dict[int, int]:
    """What several have counted."""
    found: dict[int, int] = {}
    for one in counts:
        for bucket, count in one.items():
            found[bucket] = found.get(bucket, 0) + count
    return found
