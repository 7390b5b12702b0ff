"""What a contender adds to the time to the first token, and to the gaps, of many streams with 50 ms between events."""

from __future__ import annotations

import asyncio
import time

import uvloop

from benchmarks.clouds import percentile, table
from benchmarks.gateways.asking import body_of, request_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.contenders import Contender


async def _paced(contender: Contender, streams: int, rounds: int) -> tuple[list[float], list[float]]:
    """Times to the first event and gaps between events (ms) of so many streams at once, again and again."""
    first: list[float] = []
    gaps: list[float] = []
    request = request_of(contender.port, contender.key, body_of(stream=True, pause_ms=50))

    async def one(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
        for _ in range(rounds):
            began = time.perf_counter()
            writer.write(request)
            last = 0.0
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                data = await reader.read(65536)
                if not data:
                    raise RuntimeError(f"{contender.name} broke off a stream")
                now = time.perf_counter()
                if b"tide" in data:
                    if last:
                        gaps.append(1000 * (now - last))
                    else:
                        first.append(1000 * (now - began))
                    last = now
                tail = (tail + data)[-16:]
        writer.close()

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(one(number * 1.0 / streams))
    return first, gaps


def measure(direct: Contender, contenders: list[Contender], *, streams: int, rounds: int) -> list[Figure]:
    """Figures of so many streams at once, beside the same without anything before the upstream."""
    found: dict[str, dict[str, float]] = {}
    for each in (direct, *contenders):
        each.pin(1)
        first, gaps = uvloop.run(_paced(each, streams, rounds))
        found[each.name] = {
            "ttft_p50": percentile(first, 50), "ttft_p99": percentile(first, 99),
            "gap_p50": percentile(gaps, 50), "gap_p99": percentile(gaps, 99), "streams": len(first),
        }  # fmt: skip
    return _told(found, direct.name)


def _told(found: dict[str, dict[str, float]], base: str) -> list[Figure]:
    direct, rows = found[base], []
    for name, each in found.items():
        added = [each[key] - direct[key] for key in ("ttft_p50", "ttft_p99", "gap_p99")]
        rows.append((name, *(f"{each[key]:.2f}" for key in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99")),
                     *(f"{value:+.2f}" for value in added), f"{each['streams']:,.0f}"))  # fmt: skip
    print("\nPaced streams, ms")
    table(("", "ttft p50", "p99", "gap p50", "p99", "+ttft p50", "p99", "+gap p99", "streams"), rows)
    ours = found["tidemill"]
    return [
        Figure.most(f"added_{key}_ms", f"paced streams: added {what} ms", round(ours[key] - direct[key], 2), bar)
        for key, what, bar in (("ttft_p50", "TTFT p50", 2), ("ttft_p99", "TTFT p99", 10), ("gap_p99", "gap p99", 10))
    ]
