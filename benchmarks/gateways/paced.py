"""What a contender adds to the time to the first token, and to the gaps, of many streams with 50 ms between events.

The client shares its core with the upstream, so it does as little as it can for each event, and contenders take turns:
a figure is the median of those of the turns, which a disturbance of one does not move.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Final, cast

import uvloop

from benchmarks.clouds import median, percentile, table
from benchmarks.gateways.asking import body_of, request_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.contenders import Contender

_PAUSE_MS: Final = 50
_EACH: Final = 2
"""Streams that one client asks for in a turn, one after another."""
_BEGIN_WITHIN_S: Final = 1.0
_LONGEST_S: Final = 60.0
_KEYS: Final = ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99")


class _Client(asyncio.Protocol):
    """One connection that asks for one stream after another, and notes when events come (s)."""

    def __init__(self, request: bytes, first: list[float], gaps: list[float]) -> None:
        self._request = request
        self._first = first
        self._gaps = gaps
        self._left = _EACH
        self._began = self._last = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def _ask(self) -> None:
        self._left -= 1
        self._last, self._began = 0.0, perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if b"tide" in data:
            if self._last:
                self._gaps.append(now - self._last)
            else:
                self._first.append(now - self._began)
            self._last = now
        if data.endswith(b"0\r\n\r\n"):
            if self._left:
                self._ask()
            else:
                self._transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(not self._left)


async def _paced(contender: Contender, streams: int) -> tuple[list[float], list[float]]:
    """Times to the first event and gaps between events (s) of so many streams at once. Raises: RuntimeError."""
    first: list[float] = []
    gaps: list[float] = []
    request = request_of(contender.port, contender.key, body_of(stream=True, pause_ms=_PAUSE_MS))
    loop = asyncio.get_running_loop()

    async def one(delay_s: float) -> bool:
        await asyncio.sleep(delay_s)
        _, client = await loop.create_connection(lambda: _Client(request, first, gaps), "127.0.0.1", contender.port)
        return bool(await client.done)

    async with asyncio.timeout(_LONGEST_S):
        whole = await asyncio.gather(*(one(number * _BEGIN_WITHIN_S / streams) for number in range(streams)))
    if not all(whole) or len(first) != _EACH * streams:
        raise RuntimeError(f"{contender.name} broke off a stream")
    return first, gaps


def measure(direct: Contender, contenders: list[Contender], *, streams: int, turns: int) -> list[Figure]:
    """Figures of so many streams at once, beside the same without anything before the upstream."""
    found: dict[str, list[dict[str, float]]] = {each.name: [] for each in (direct, *contenders)}
    for _ in range(turns):
        for each in (direct, *contenders):
            each.pin(1)
            first, gaps = uvloop.run(_paced(each, streams))
            values = (percentile(times, share) * 1000 for times in (first, gaps) for share in (50, 99))
            found[each.name].append(dict(zip(_KEYS, values, strict=True)))
    medians = {name: {key: median([turn[key] for turn in all_of]) for key in _KEYS} for name, all_of in found.items()}
    return _told(medians, direct.name, _EACH * streams * turns)


def _told(found: dict[str, dict[str, float]], base: str, streams: int) -> list[Figure]:
    direct, rows = found[base], []
    for name, each in found.items():
        added = [each[key] - direct[key] for key in ("ttft_p50", "ttft_p99", "gap_p99")]
        rows.append((name, *(f"{each[key]:.2f}" for key in _KEYS), *(f"{value:+.2f}" for value in added),
                     f"{streams:,}"))  # fmt: skip
    print("\nPaced streams, ms (medians of turns)")
    table(("", "ttft p50", "p99", "gap p50", "p99", "+ttft p50", "p99", "+gap p99", "streams"), rows)
    ours = found["tidemill"]
    return [
        Figure.most(f"added_{key}_ms", f"paced streams: added {what} ms", round(ours[key] - direct[key], 2), bar)
        for key, what, bar in (("ttft_p50", "TTFT p50", 2), ("ttft_p99", "TTFT p99", 10), ("gap_p99", "gap p99", 10))
    ]
