"""What the gateways tell: requests under way and waiting, what users felt over a while, engines' own figures.

A gateway counts what users felt since it began; how that was over a while is the difference to what it told then. So
reports may be lost, and gateways may come and go.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tidemill.core.buckets import Counts, quantile_ns, since, together
from tidemill.model.ids import JobId
from tidemill.units import MILLI

FRESH_S: Final = 3.0
"""A load that is older says nothing of how many requests there are."""
REMEMBERED_S: Final = 30.0
"""A gateway that was heard of since may have requests under way."""
_LOOKS: Final = 24
"""So many earlier reports of a gateway are kept over the longest window that anybody asks for."""
_ENOUGH: Final = 20
"""What 95 of 100 stay within is not known from fewer."""
_SHARE_MILLI: Final = 950


@dataclass(frozen=True, slots=True, kw_only=True)
class FeltCounts:
    """Since a gateway began: how long first bytes, whole answers and waits took, by bucket; tokens of answers."""

    ttft: Counts = field(default_factory=dict)
    latency: Counts = field(default_factory=dict)
    queue: Counts = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """Requests of one model under way on replicas and waiting for one; ``felt`` is not told every time."""

    in_flight: int = 0
    waiting: int = 0
    felt: FeltCounts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """Requests that a gateway has under way on a replica, whether it sends no more, and what its engine tells."""

    in_flight: int = 0
    is_leaving: bool = False
    queued: int | None = None
    running: int | None = None
    cache_milli: int | None = None
    first_token_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one gateway has, by model and by replica."""

    models: Mapping[str, ModelLoad] = field(default_factory=dict)
    replicas: Mapping[JobId, ReplicaLoad] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """How it was over a while, of all gateways: what 95 of 100 stayed within, and tokens a second.

    None: too few to say, or nothing was told for long enough.
    """

    ttft_ns: int | None = None
    latency_ns: int | None = None
    queue_ns: int | None = None
    tokens_milli: int | None = None


class Loads:
    """What gateways told lately. Thread-safe: what is kept is replaced whole.

    ``longest_s`` is the longest window that is asked for.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.longest_s = 60.0
        self._monotonic = monotonic
        self._loads: dict[str, tuple[float, Load]] = {}
        self._felt: dict[tuple[str, str], deque[tuple[float, FeltCounts]]] = {}

    def hear(self, worker: str, load: Load) -> None:
        """Note what a gateway has; ``worker`` is where it listens, ``/``, and its own id.

        One that listened there before is remembered only while it still tells.
        """
        now, place = self._monotonic(), worker.partition("/")[0]
        loads = {
            name: (at, one)
            for name, (at, one) in self._loads.items()
            if now - at < (FRESH_S if name.partition("/")[0] == place else REMEMBERED_S)
        }
        felt = {key: looks for key, looks in self._felt.items() if key[0] == worker or key[0] in loads}
        for model, one in load.models.items():
            if one.felt is not None:
                looks = felt.get((worker, model), deque())
                felt[worker, model] = self._kept(looks, one.felt, now)
        self._felt = felt
        self._loads = loads | {worker: (now, load)}

    @property
    def all(self) -> list[Load]:
        """What every gateway told last that was heard of lately."""
        now = self._monotonic()
        return [load for at, load in self._loads.values() if now - at < REMEMBERED_S]

    @property
    def is_whole(self) -> bool:
        """Whether there is a gateway, and each of which was heard lately tells still."""
        now = self._monotonic()
        ages = [now - at for at, _ in self._loads.values() if now - at < REMEMBERED_S]
        return bool(ages) and max(ages) < FRESH_S

    def of_model(self, model: str) -> tuple[int, int]:
        """Requests of a model under way and waiting."""
        found = [one for load in self.all if (one := load.models.get(model)) is not None]
        return sum(one.in_flight for one in found), sum(one.waiting for one in found)

    def of_replica(self, job: JobId) -> list[ReplicaLoad]:
        """What each gateway tells of a replica."""
        return [one for load in self.all if (one := load.replicas.get(job)) is not None]

    def felt(self, model: str, *, window_s: float) -> Felt:
        """How it was for users of a model over the last so many seconds."""
        now, parts, rate = self._monotonic(), [], 0
        has_rate = False
        for (_, name), looks in self._felt.items():
            if name != model or not looks or now - looks[-1][0] > FRESH_S:
                continue
            before_at, before = next((look for look in reversed(looks) if look[0] <= now - window_s), looks[0])
            at, last = looks[-1]
            parts.append((last, before))
            if at > before_at:
                has_rate = True
                rate += round(max(0, last.tokens - before.tokens) * MILLI / (at - before_at))
        return Felt(
            ttft_ns=_within(since(last.ttft, before.ttft) for last, before in parts),
            latency_ns=_within(since(last.latency, before.latency) for last, before in parts),
            queue_ns=_within(since(last.queue, before.queue) for last, before in parts),
            tokens_milli=rate if has_rate else None,
        )

    def _kept(
        self, looks: deque[tuple[float, FeltCounts]], felt: FeltCounts, now: float
    ) -> deque[tuple[float, FeltCounts]]:
        """The looks of late with this one; the newest two may be closer together than the rest."""
        apart = self.longest_s / _LOOKS
        kept = deque(looks)
        if len(kept) >= 2 and kept[-1][0] - kept[-2][0] < apart:
            kept.pop()
        kept.append((now, felt))
        while len(kept) > 2 and kept[1][0] <= now - self.longest_s:
            kept.popleft()
        return kept


def _within(counts: Iterable[Counts]) -> int | None:
    whole = together(*counts)
    return quantile_ns(whole, _SHARE_MILLI) if sum(whole.values()) >= _ENOUGH else None
