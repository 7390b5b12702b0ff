"""Clients that go away: how soon what their requests hold is free again, in each phase, and that no slot is lost.

While a request waits in line there is nothing upstream: what counts is when it has left the line, and that the upstream
never hears of it. In the other phases it is when the upstream's connection is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

import uvloop

from benchmarks.clouds import median, percentile, table
from benchmarks.gateways.asking import Asker, Connection, body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.ours import Ours, Service

QUEUED: Final = "queued"
PHASES: Final = ("before the first byte", "in a stream", "whole answer")
_AT_ONCE: Final = 16
_PAUSE_MS: Final = {"before the first byte": 2000, "in a stream": 50, "whole answer": 400}


async def _leave(asker: Asker, model: str, phase: str, number: int) -> tuple[str, int]:
    """The request's id, and when its client closed (ns)."""
    name = f"leave-{phase.split()[0]}-{number}"
    body = body_of(model=model, stream=phase == "in a stream", pause_ms=_PAUSE_MS[phase])
    connection = await Connection.to(asker.port)
    connection.ask(asker.request(body, X_Request_Id=name))
    if phase == "in a stream":
        await connection.begun()
    await asyncio.sleep(0.03 + (number % 7) * 0.01)
    return name, connection.leave()


async def _leave_all(asker: Asker, model: str, trials: int) -> dict[str, tuple[str, int]]:
    left: dict[str, tuple[str, int]] = {}
    for phase in PHASES:
        for start in range(0, trials, _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, trials))
            for name, at in await asyncio.gather(*(_leave(asker, model, phase, number) for number in numbers)):
                left[name] = (phase, at)
    return left


async def _leave_the_line(asker: Asker, model: str, slots: int, trials: int) -> list[float]:
    """How long until each had left the line (ms), while requests that go on for long have all the slots."""
    long = body_of(model=model, stream=True, pause_ms=5000)
    holders = [await Connection.to(asker.port) for _ in range(slots)]
    for one in holders:
        one.ask(asker.request(long))
    await asyncio.gather(*(one.begun() for one in holders))
    took: list[float] = []
    while len(took) < trials:
        waiters = [await Connection.to(asker.port) for _ in range(min(_AT_ONCE, trials - len(took)))]
        for number, one in enumerate(waiters, len(took)):
            one.ask(asker.request(body_of(model=model), X_Request_Id=f"leave-queued-{number}", X_Tidemill_Wait="60"))
        async with asyncio.timeout(10):
            while await asker.figure("waiting", model) < len(waiters):
                await asyncio.sleep(0.005)
            for left, one in reversed(list(enumerate(waiters))):
                at = one.leave()
                while await asker.figure("waiting", model) > left:
                    await asyncio.sleep(0.001)
                took.append((time.monotonic_ns() - at) / 1e6)
    for one in holders:
        one.leave()
    return took


async def _leaked(asker: Asker, models: Mapping[str, int]) -> int:
    """Slots that stay taken when nobody asks any more: by the gateway's figures, and by asking for all of them."""
    until, held = time.monotonic() + 2.0, -1
    while held and time.monotonic() < until:
        held = 0
        for model in models:
            held += max(await asker.figure("in_flight", model), await asker.figure("waiting", model))
        await asyncio.sleep(0.05)
    for model, slots in models.items():
        request = asker.request(body_of(model=model, pause_ms=300), X_Tidemill_Wait="0")
        answers = await asyncio.gather(*(asker.ask(request) for _ in range(slots)))
        held += sum(answer.status != 200 for answer in answers)
    return held


def measure(ours: Ours, wide: Service, narrow: Service, *, slots: int, trials: int) -> list[Figure]:
    """Figures of so many clients that leave in all; ``narrow`` has so many slots. Raises: RuntimeError."""
    each = -(-trials // (len(PHASES) + 1))
    asker = ours.asker

    async def leave() -> tuple[dict[str, tuple[str, int]], list[float], int]:
        left = await _leave_all(asker, wide.name, each)
        queued = await _leave_the_line(asker, narrow.name, slots, each)
        return left, queued, await _leaked(asker, {wide.name: 0, narrow.name: slots})

    left, queued, leaked = uvloop.run(leave())
    time.sleep(0.5)
    seen = {line.name: line.ended_ns for line in wide.lines("leave-") if not line.is_whole}
    if missing := sorted(left.keys() - seen.keys()):
        raise RuntimeError(f"{len(missing)} of {len(left)} were answered to nobody: {missing[:5]}")
    if called := narrow.lines("leave-queued-"):
        raise RuntimeError(f"{len(called)} were sent on after their clients had left the line: {called[0].name}")
    found: dict[str, list[float]] = {QUEUED: queued} | {phase: [] for phase in PHASES}
    for name, (phase, at) in left.items():
        found[phase].append((seen[name] - at) / 1e6)
    return _told(found, leaked)


def _told(found: Mapping[str, Sequence[float]], leaked: int) -> list[Figure]:
    print("\nFrom a client's going away to its slot's being free, ms")
    table(("", "p50", "p99", "most", "trials"), [
        (phase, f"{median(each):.1f}", f"{percentile(each, 99):.1f}", f"{max(each):.1f}", str(len(each)))
        for phase, each in found.items()
    ])  # fmt: skip
    p99 = max(percentile(each, 99) for each in found.values())
    return [
        Figure.most("gone_p99_ms", "client gone until it is known, p99 ms", round(p99, 1), 200),
        Figure.most("gone_leaked_slots", "client gone: slots not free afterwards", leaked, 0),
    ]
