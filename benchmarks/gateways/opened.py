"""Ten thousand streams open at once on one process of the gateway: its memory, and that events reach each of them."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from typing import Final

import uvloop
from tests.cloud import eventually
from tests.faults.serving import metric, rss_of

from benchmarks.clouds import table
from benchmarks.gateways.asking import Asker, Connection, body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.ours import Ours, Service

WANTED: Final = 10_000
_OTHERS: Final = 160
"""Files that a gateway has open beside one for each client and one for each upstream, rather too many."""
_PAUSE_MS: Final = 3000
_TOKENS: Final = 1000
_HELD_S: Final = 10.0
_TOGETHER: Final = 200
_MIB: Final = 2**20


def raise_file_limit() -> None:
    """Let this process, and all that it starts, open as many files as are needed and allowed."""
    needed = 2 * WANTED + _OTHERS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        with contextlib.suppress(ValueError, OSError):  # only root may, and not in every container
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
            return
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(needed, hard) if hard < 0 else min(needed, hard), hard))


def most_streams(wanted: int) -> tuple[int, str]:
    """How many of the wanted streams the limit on open files allows, and which limit it is when not all."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= 2 * wanted + _OTHERS:
        return wanted, ""
    return (hard - _OTHERS) // 2, f"hard limit of open files is {hard:,}: raise ulimit -Hn to {2 * wanted + _OTHERS:,}"


async def _all(asker: Asker, model: str, streams: int, pid: int) -> tuple[int, int, int]:
    """Bytes of memory when all are open, and the most in a while after that; and how many got events in that while."""
    request = asker.request(body_of(model=model, stream=True, pause_ms=_PAUSE_MS, min_tokens=_TOKENS))
    connections: list[Connection] = []
    begun = []
    for start in range(0, streams, _TOGETHER):
        several = await asyncio.gather(*(Connection.to(asker.port) for _ in range(min(_TOGETHER, streams - start))))
        for one in several:
            one.ask(request)
            begun.append(asyncio.create_task(one.begun()))
        connections += several
        await asyncio.sleep(0.05)
    await asyncio.gather(*begun)
    received = [one.received for one in connections]
    when_open = most = rss_of(pid)
    until = time.monotonic() + _HELD_S
    while time.monotonic() < until:
        await asyncio.sleep(0.5)
        most = max(most, rss_of(pid))
    lively = sum(one.is_open and one.received > before for one, before in zip(connections, received, strict=True))
    for one in connections:
        one.leave()
    asker.close()
    return when_open, most, lively


def measure(ours: Ours, wide: Service, *, streams: int) -> list[Figure]:
    """Figures of so many open streams, or as many as the machine's limit on open files allows."""
    allowed, missing = most_streams(streams)
    pid = ours.contender.pid
    idle, began = rss_of(pid), time.monotonic()
    when_open, most, lively = uvloop.run(_all(ours.asker, wide.name, allowed, pid))
    opened_s = time.monotonic() - began - _HELD_S
    gone = "nothing is left of the streams"
    eventually(lambda: metric(ours.cloud, "in_flight", model=wide.name) == 0, within_s=30, what=gone)
    print("\nOpen streams, memory in MiB")
    table(("", "at once", "with events", "opened in s", "before", "open", "most", "KiB each"), [(
        "", f"{allowed:,}", f"{lively:,}", f"{opened_s:.1f}", *(f"{one / _MIB:.0f}" for one in (idle, when_open, most)),
        f"{(most - idle) / 1024 / allowed:.1f}",
    )])  # fmt: skip
    return [
        Figure.least("open_streams", "open streams on one process", lively, streams, why=missing),
        Figure.most("open_memory_mib", "memory meanwhile, MiB", round(most / _MIB), 1024),
    ]
