"""What users of a model felt, counted so that gateways can be put together: the control plane scales by it.

Counts only grow. Whoever reads them takes the difference of two looks, so that a report that is lost costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tidemill.core.buckets import COUNT, bucket_of
from tidemill.units import SECOND_NS


def _empty() -> list[int]:
    return [0] * COUNT


@dataclass(slots=True)
class Felt:
    """One model's: times to the first byte of a stream, to the last byte of an answer, in the line; tokens of answers.

    A request that came when no replica was there says nothing of how many replicas are enough. Its times count from
    when it was sent to one.
    """

    ttft: list[int] = field(default_factory=_empty)
    latency: list[int] = field(default_factory=_empty)
    queue: list[int] = field(default_factory=_empty)
    tokens: int = 0

    def waited(self, seconds: float) -> None:
        """A request was sent to a replica after so long in the line."""
        self.queue[bucket_of(seconds * SECOND_NS)] += 1

    def began(self, seconds: float) -> None:
        """A stream began so long after it was asked for."""
        self.ttft[bucket_of(seconds * SECOND_NS)] += 1

    def ended(self, seconds: float) -> None:
        """An answer was whole so long after it was asked for."""
        self.latency[bucket_of(seconds * SECOND_NS)] += 1

    def gave(self, tokens: int) -> None:
        """So many more tokens of answers came."""
        self.tokens += tokens

    def told(self) -> dict[str, Any]:
        """All counts for a report, without empty buckets."""
        return {
            "ttft": _filled(self.ttft),
            "latency": _filled(self.latency),
            "queue": _filled(self.queue),
            "tokens": self.tokens,
        }


def _filled(counts: list[int]) -> dict[str, int]:
    return {str(bucket): count for bucket, count in enumerate(counts) if count}
