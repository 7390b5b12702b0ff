"""Asks engines for their own figures: what runs and waits inside them, how full their cache is, their times.

vLLM, SGLang, TGI and llama.cpp tell them at ``/metrics`` as Prometheus text, under names of their own. A replica that
has none of these is asked ever more seldom. What comes from an engine is not trusted: it is bounded in size and time,
and what is no sensible number is as if it were not there.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tidemill.gateway.table import Replica, Route
from tidemill.gateway.upstream import Pool, fetch

PATH: Final = "/metrics"
FRESH_S: Final = 10.0
"""Figures that are older say nothing."""
_RUNNING: Final = (
    b"vllm:num_requests_running", b"sglang:num_running_reqs", b"tgi_batch_current_size", b"llamacpp:requests_processing"
)  # fmt: skip
_QUEUED: Final = (
    b"vllm:num_requests_waiting", b"sglang:num_queue_reqs", b"tgi_queue_size", b"llamacpp:requests_deferred"
)  # fmt: skip
_CACHE: Final = (
    b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc", b"sglang:token_usage", b"llamacpp:kv_cache_usage_ratio"
)  # fmt: skip
_FIRST_TOKEN: Final = (b"vllm:time_to_first_token_seconds_bucket", b"sglang:time_to_first_token_seconds_bucket")
_NAMES: Final = (*_RUNNING, *_QUEUED, *_CACHE, *_FIRST_TOKEN)
_LINE: Final = re.compile(
    rb"^(" + b"|".join(map(re.escape, _NAMES)) + rb")(\{[^\n]{0,4000}\})?[ \t]+([^\s]{1,64})", re.MULTILINE
)
_BOUND: Final = re.compile(rb'[{,]\s*le="([^"]{1,64})"')
_MOST_REQUESTS: Final = 1_000_000
_MOST_BOUNDS: Final = 200
_LIMIT: Final = 2 * 1024 * 1024
_ENOUGH_MILLI: Final = 950


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What an engine tells; None: it does not. ``first_token`` counts requests by the longest time they took, in s."""

    running: int | None = None
    queued: int | None = None
    cache_milli: int | None = None
    first_token: Mapping[float, int] = field(default_factory=dict)

    @property
    def is_engine(self) -> bool:
        """Whether it told anything at all."""
        return self.running is not None or self.queued is not None or self.cache_milli is not None


def read_figures(text: bytes) -> Figures:
    """What is to be found in an engine's metrics, whatever else is in them.

    Several lines of one name, of several ranks or models, are added up; of the cache the fullest counts.

    >>> read_figures(b'vllm:num_requests_waiting{model_name="m"} 3.0\\nvllm:kv_cache_usage_perc{engine="0"} 0.25\\n')
    Figures(running=None, queued=3, cache_milli=250, first_token={})
    """
    running: int | None = None
    queued: int | None = None
    cache: int | None = None
    first: dict[float, int] = {}
    for name, labels, written in _LINE.findall(text[:_LIMIT]):
        value = _number(written)
        if value is None:
            continue
        if name in _CACHE:
            if value <= 1.0:
                cache = max(cache or 0, round(value * 1000))
        elif name in _FIRST_TOKEN:
            bound = _number(found[1].replace(b"+Inf", b"1e9")) if (found := _BOUND.search(labels)) else None
            if bound is not None and (bound in first or len(first) < _MOST_BOUNDS):
                first[bound] = first.get(bound, 0) + round(value)
        elif value <= _MOST_REQUESTS and name in _RUNNING:
            running = (running or 0) + round(value)
        elif value <= _MOST_REQUESTS and name in _QUEUED:
            queued = (queued or 0) + round(value)
    return Figures(running=running, queued=queued, cache_milli=cache, first_token=first)


def _number(written: bytes) -> float | None:
    try:
        value = float(written)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= 1e15 else None


def first_token_s(now: Mapping[float, int], before: Mapping[float, int]) -> float | None:
    """Within what 95 of 100 first tokens came between two looks; None where none did, or the counts began anew.

    >>> first_token_s({0.1: 100, 0.5: 119, 1e9: 120}, {0.1: 10, 0.5: 19, 1e9: 20})
    0.5
    """
    grown = [(bound, count - before.get(bound, 0)) for bound, count in sorted(now.items())]
    if not grown or grown[-1][1] <= 0 or any(more < 0 for _, more in grown):
        return None
    enough = -(-grown[-1][1] * _ENOUGH_MILLI // 1000)
    return next((bound for bound, more in grown if more >= enough), None)


class Scraper:
    """Keeps the figures of all replicas, in ``Replica.queued`` and its neighbours, for as long as ``run`` runs."""

    def __init__(
        self,
        routes: Callable[[], Iterable[Route]],
        *,
        every_s: float = 2.0,
        patience_s: float = 2.0,
        longest_pause_s: float = 60.0,
    ) -> None:
        self._routes = routes
        self._every_s = every_s
        self._patience_s = patience_s
        self._longest_pause_s = longest_pause_s
        self._pool = Pool(connect_timeout_s=patience_s)
        self._due: dict[Replica, float] = {}
        self._pause: dict[Replica, float] = {}
        self._first: dict[Replica, Mapping[float, int]] = {}
        self._asking: dict[Replica, asyncio.Task[None]] = {}

    async def run(self, *, step_s: float = 0.25) -> None:
        """Ask for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(step_s)
            now = loop.time()
            present = {replica for route in self._routes() for replica in route.replicas}
            for replica in present:
                if replica not in self._asking and now >= self._due.get(replica, 0.0):
                    task = self._asking[replica] = loop.create_task(self._ask(replica))
                    task.add_done_callback(lambda _, one=replica: self._asking.pop(one, None))  # type: ignore[misc]
            for gone in self._due.keys() - present - self._asking.keys():
                del self._due[gone]
                self._pause.pop(gone, None)
                self._first.pop(gone, None)

    async def _ask(self, replica: Replica) -> None:
        loop = asyncio.get_running_loop()
        try:
            status, body = await fetch(
                self._pool,
                replica.address,
                replica.prefix.decode("ascii") + PATH,
                headers={"Accept": "text/plain"},
                timeout_s=self._patience_s,
                limit=_LIMIT,
            )
            figures = read_figures(body) if status == 200 else Figures()
        except OSError:  # time-outs among them
            figures = Figures()
        if figures.is_engine:
            self._pause[replica] = self._every_s
            self._note(replica, figures, loop.time())
        else:
            replica.others = 0
            self._pause[replica] = min(self._longest_pause_s, 2 * self._pause.get(replica, self._every_s))
        self._due[replica] = loop.time() + self._pause[replica]

    def _note(self, replica: Replica, figures: Figures, now: float) -> None:
        replica.told_at = now
        replica.queued = figures.queued or 0
        replica.running = figures.running or 0
        replica.others = max(0, replica.queued + replica.running - replica.outstanding)
        replica.cache_milli = figures.cache_milli
        if figures.first_token:
            before = self._first.get(replica)
            if before is not None:
                replica.first_token_s = first_token_s(figures.first_token, before)
            self._first[replica] = figures.first_token
