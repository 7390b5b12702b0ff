"""Ten times the requests that the service can answer: how many it still answers, and how soon the others are told.

They are sent at their rate whatever comes back, over connections that are used again.
"""

from __future__ import annotations

import asyncio
import time

import uvloop
from tests.faults.serving import rss_of

from benchmarks.clouds import percentile, table
from benchmarks.gateways.asking import Answer, Asker, body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.ours import Ours, Service

_PAUSE_MS = 200
_WAIT_S = "1"


async def _closed(asker: Asker, request: bytes, *, slots: int, seconds: float) -> float:
    """Answers a second when each slot is asked again as soon as it is free."""
    began = time.monotonic()
    answered = 0

    async def again_and_again() -> None:
        nonlocal answered
        while time.monotonic() < began + seconds:
            answer = await asker.ask(request)
            answered += answer.status == 200

    await asyncio.gather(*(again_and_again() for _ in range(slots)))
    return answered / (time.monotonic() - began)


async def _open(asker: Asker, request: bytes, *, rate: float, seconds: float) -> tuple[list[Answer], float]:
    """What came back at that rate, and how long it took."""
    answers: list[Answer] = []
    under_way: set[asyncio.Task[None]] = set()

    async def one() -> None:
        answers.append(await asker.ask(request))

    began = time.monotonic()
    for number in range(round(rate * seconds)):
        if (early_s := began + number / rate - time.monotonic()) > 0:
            await asyncio.sleep(early_s)
        task = asyncio.create_task(one())
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    return answers, time.monotonic() - began


def measure(ours: Ours, narrow: Service, *, slots: int, seconds: float) -> list[Figure]:
    """Figures of so long an overload of a service with so many slots. Raises: RuntimeError when answers are missing."""
    asker, pid = ours.asker, ours.contender.pid
    request = asker.request(body_of(model=narrow.name, pause_ms=_PAUSE_MS), X_Tidemill_Wait=_WAIT_S)
    most = 0

    async def sample() -> None:
        nonlocal most
        while True:
            most = max(most, rss_of(pid))
            await asyncio.sleep(0.2)

    async def both() -> tuple[float, int, list[Answer], float, tuple[float, float]]:
        capacity = await _closed(asker, request, slots=slots, seconds=min(5.0, seconds))
        before = rss_of(pid)
        sampling, used_s = asyncio.create_task(sample()), (ours.contender.cpu_s(), time.process_time())
        answers, took_s = await _open(asker, request, rate=10 * capacity, seconds=seconds)
        sampling.cancel()
        asker.close()
        busy = (ours.contender.cpu_s() - used_s[0]) / took_s, (time.process_time() - used_s[1]) / took_s
        return capacity, before, answers, took_s, busy

    capacity, before, answers, took_s, busy = uvloop.run(both())
    good = sum(one.status == 200 for one in answers)
    refused = [one for one in answers if one.status in (429, 503)]
    silent = sum(one.retry_after is None for one in refused)
    if good + len(refused) != len(answers):
        raise RuntimeError(f"answers were {sorted({one.status for one in answers})}, of which 0 is a lost connection")
    took_ms = [1000 * one.took_s for one in refused] or [0.0]
    p99_ms = percentile(took_ms, 99)
    print("\nOverload, requests a second, ms, MiB, and how busy the gateway and the load generator were")
    headings = ("offered", "answered", "of capacity", "refused p50", "p99", "most", "memory", "most", "gateway", "load")
    table(headings, [(
        f"{len(answers) / took_s:,.0f}", f"{good / took_s:,.1f}", f"{capacity:,.1f}",
        *(f"{one:.1f}" for one in (percentile(took_ms, 50), p99_ms, max(took_ms))),
        *(f"{one / 2**20:.0f}" for one in (before, most)),
        *(f"{one:.0%}" for one in busy),
    )])  # fmt: skip
    goodput, offered = good / took_s / capacity, len(answers) / took_s / capacity
    return [
        Figure.least("overload_goodput", "overload: answered, share of capacity", round(goodput, 3), 0.9),
        Figure.least("overload_offered", "overload: offered, times capacity", round(offered, 2), 9.5),
        Figure.most("overload_refusal_p99_ms", "overload: refusals, p99 ms", round(p99_ms, 1), 50),
        Figure.most("overload_without_retry_after", "overload: refusals without Retry-After", silent, 0),
        Figure.most("overload_memory", "overload: memory, times that before", round(most / before, 2), 2),
    ]
