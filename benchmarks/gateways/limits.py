"""How far a limit is overshot when 100 ask at once: what reached the upstream, by its own journal."""

from __future__ import annotations

import asyncio
import math
from typing import Final

import uvloop

from benchmarks.clouds import table
from benchmarks.gateways.asking import Asker, body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.ours import Line, Ours, Service

_AT_ONCE: Final = 100
_REFUSED: Final = 4
"""How often each is refused before it stops."""
_TOKENS: Final = 20
_SLOTS: Final = 10


async def _ask_all(asker: Asker, model: str, name: str, *, requests: int) -> int:
    """How many were answered of at most so many, 100 at once, each until it was refused a few times."""
    numbers = iter(range(requests))
    answered = 0

    async def again_and_again() -> None:
        nonlocal answered
        refused = 0
        for number in numbers:
            body = body_of(model=model, pause_ms=5, max_tokens=_TOKENS, min_tokens=_TOKENS)
            answer = await asker.ask(asker.request(body, X_Request_Id=f"limit-{name}-{number}"))
            answered += answer.status == 200
            refused += answer.status == 429
            if answer.status not in (200, 429):
                raise RuntimeError(f"limit {name}: a request was answered with {answer.status}: {answer.body[:200]!r}")
            if refused == _REFUSED:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(again_and_again())
    asker.close()
    return answered


def _most_at_once(lines: list[Line]) -> int:
    """The most requests that were under way at one time."""
    steps = sorted([(line.began_ns, 1) for line in lines] + [(line.ended_ns, -1) for line in lines])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


def measure(ours: Ours, wide: Service, *, requests: int) -> list[Figure]:
    """Figures of limits on requests, on tokens and on concurrency; the first two let so many requests pass."""
    rows, over = [], {}
    for name, limits in (
        ("requests", {"requests_per_day": requests}),
        ("tokens", {"output_tokens_per_day": requests * _TOKENS + _TOKENS // 2}),
        ("concurrency", {"concurrency": _SLOTS}),
    ):
        key = ours.key(f"limit-{name}", **limits)
        answered = uvloop.run(_ask_all(Asker(ours.cloud.gateway_port, key), wide.name, name, requests=3 * requests))
        lines = wide.lines(f"limit-{name}-")
        if name == "concurrency":
            reached, limit = _most_at_once(lines), _SLOTS
        else:
            reached, limit = len(lines), requests
        over[name] = max(0, reached - limit)
        rows.append((name, str(limit), str(reached), str(answered), str(over[name])))
        if not math.isclose(reached, limit, rel_tol=0.2):
            raise RuntimeError(
                f"limit {name}: {reached} of {limit} reached the upstream, so it was not put to the test"
            )
    print(f"\nLimits, {_AT_ONCE} at once, requests")
    table(("", "limit", "reached the upstream", "answered", "over"), rows)
    return [Figure.most("limit_overshoot", "limits: requests beyond one, most", max(over.values()), 1)]
