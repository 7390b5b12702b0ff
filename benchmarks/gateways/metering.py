"""What was metered beside what the upstream wrote down itself, request by request; and after kill -9 of the gateway.

Every request is booked under a label of its own, which is its id in the upstream's journal as well. What is compared
are prompt and completion tokens where the answer was whole, and completion tokens where its client went away, for which
one more or less may have been on its way.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from benchmarks.clouds import table
from benchmarks.gateways.asking import Asker, Connection, body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.ours import Line, Ours, Service
from benchmarks.gateways.upstream import PROMPT

_AT_ONCE: Final = 64
_MOST_TOKENS: Final = 40
_EVERY_MS: Final = 50
"""Between the events of what is left; about one more may be sent until the upstream knows."""
_STREAMS: Final = 64
_STREAM_MS: Final = 50
_STREAM_TOKENS: Final = 1000
_QUICK: Final = 8
_BEFORE_KILL_S: Final = 3.0
_AGAIN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Difference:
    """Of many requests: tokens in all, and where ledger and journal differ."""

    requests: int
    tokens: int
    entered: int
    missing: int
    """Requests that the journal has with tokens, and the ledger has not."""
    twice: int
    """Requests that the ledger has more than once."""
    tokens_off: int
    """Of whole answers, the sum of all differences."""
    left_off: int
    """Of those that were left, the same."""
    most_off: int
    """Of those, the largest difference in chunks: a whole answer comes in one."""


def compared(lines: Iterable[Line], usages: Iterable[Mapping[str, Any]]) -> Difference:
    """The difference between the upstream's journal and the ledger."""
    entered: dict[str, Mapping[str, Any]] = {}
    counts: Counter[str] = Counter()
    for usage in usages:
        entered[usage["label"]] = usage
        counts[usage["label"]] += 1
    journal = {line.name: line for line in lines}
    missing = tokens_off = left_off = most_off = 0
    for name, line in journal.items():
        usage = entered.get(name, {})
        off = abs(line.tokens - int(usage.get("completion_tokens", 0)))
        if _is_left(name):
            left_off += off
            most_off = max(most_off, off if name.startswith("left-s") or not line.is_whole else off // line.tokens)
        else:
            missing += not usage
            tokens_off += off + abs(PROMPT - int(usage.get("prompt_tokens", 0)))
    extra = [usage for name, usage in entered.items() if name not in journal]
    tokens_off += sum(int(usage["completion_tokens"]) for usage in extra)
    return Difference(
        requests=len(journal),
        tokens=sum(line.tokens for line in journal.values()),
        entered=sum(int(usage["completion_tokens"]) for usage in entered.values()),
        missing=missing,
        twice=sum(count - 1 for count in counts.values()),
        tokens_off=tokens_off,
        left_off=left_off,
        most_off=most_off,
    )


def _is_left(name: str) -> bool:
    return name.startswith("left-")


async def _ask_all(asker: Asker, model: str, requests: int) -> None:
    """So many requests, ``_AT_ONCE`` under way: whole answers and streams. Beside these, every tenth, which is left."""
    drawn = random.Random(1)
    numbers = iter(range(requests))

    async def one(number: int) -> None:
        stream, tokens = drawn.random() < 0.5, drawn.randint(1, _MOST_TOKENS)
        name = f"whole-{number}"
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream and number % 2 else {}
        body = body_of(model=model, stream=stream, min_tokens=tokens, **more)
        answer = await asker.ask(asker.request(body, X_Request_Id=name, X_Tidemill_Label=name))
        if answer.status != 200:
            raise RuntimeError(f"request {name} was answered with {answer.status}: {answer.body[:200]!r}")

    async def left(number: int) -> None:
        stream, tokens = drawn.random() < 0.5, drawn.randint(1, _MOST_TOKENS)
        name = f"left-{'s' if stream else 'w'}-{number}"
        body = body_of(model=model, stream=stream, min_tokens=tokens, pause_ms=_EVERY_MS)
        connection = await Connection.to(asker.port)
        connection.ask(asker.request(body, X_Request_Id=name, X_Tidemill_Label=name))
        await asyncio.sleep(drawn.random() * _EVERY_MS / 1000 * (tokens if stream else 1))
        connection.leave()

    async with asyncio.TaskGroup() as group:

        async def again_and_again() -> None:
            for number in numbers:
                if number % 10:
                    await one(number)
                else:
                    group.create_task(left(number))

        for _ in range(_AT_ONCE):
            group.create_task(again_and_again())
    asker.close()


async def _ask_until_killed(ours: Ours, model: str) -> tuple[int, list[str]]:
    """When the gateway was killed, in the middle of streams and of short requests (ns); and what was answered whole."""
    asker, numbers, answered = ours.asker, itertools.count(), list[str]()
    paced = body_of(model=model, stream=True, pause_ms=_STREAM_MS, min_tokens=_STREAM_TOKENS)
    streams = []
    for number in range(_STREAMS):
        connection = await Connection.to(asker.port)
        name = f"killed-s-{number}"
        streams.append(connection.ask(asker.request(paced, X_Request_Id=name, X_Tidemill_Label=name)))
    has_ended = False

    async def again_and_again(*, stream: bool) -> None:
        while not has_ended:
            name = f"killed-q-{next(numbers)}"
            body = body_of(model=model, stream=stream, pause_ms=2, min_tokens=5)
            answer = await asker.ask(asker.request(body, X_Request_Id=name, X_Tidemill_Label=name))
            if answer.status != 200:
                return
            answered.append(name)

    quick = [asyncio.create_task(again_and_again(stream=bool(number % 2))) for number in range(_QUICK)]
    await asyncio.sleep(_BEFORE_KILL_S)
    os.kill(ours.contender.pid, signal.SIGKILL)
    killed_ns = time.monotonic_ns()
    has_ended = True
    await asyncio.gather(*streams, *quick)
    asker.close()
    return killed_ns, answered


def measure(ours: Ours, wide: Service, *, requests: int) -> list[Figure]:
    """Figures of so many requests, and of a gateway that is killed."""
    before = ours.usage(wide.name)
    began = time.monotonic()
    uvloop.run(_ask_all(ours.asker, wide.name, requests))
    asked_s = time.monotonic() - began
    time.sleep(0.5)
    lines = wide.lines("whole-", "left-")
    usages = ours.usages(wide.name, "whole-", "left-")
    found = compared(lines, usages)
    told = ours.usage(wide.name)
    summed = told["completion_tokens"] - before["completion_tokens"]
    print("\nMetering, the upstream's journal beside the ledger")
    left = sum(_is_left(line.name) for line in lines)
    headings = ("requests", "left", "s", "tokens upstream", "ledger", "usage", "missing", "twice", "off", "of the left")
    table(headings, [(
        f"{found.requests:,}", f"{left:,}", f"{asked_s:.0f}", f"{found.tokens:,}", f"{found.entered:,}",
        f"{summed:,}", str(found.missing), str(found.twice), str(found.tokens_off), f"{found.left_off:,}",
    )])  # fmt: skip
    off = found.tokens_off + abs(summed - found.entered)
    figures = [
        Figure(name="metering_requests", what="metering: requests compared", value=found.requests),
        Figure.most("metering_tokens_off", "metering: tokens of whole answers that differ", off, 0),
        Figure(name="metering_left_tokens_off", what="metering: tokens of left answers", value=found.left_off),
        Figure.most("metering_left_chunks_off", "metering: chunks of a left answer that differ", found.most_off, 1),
        Figure.most("metering_twice", "metering: requests entered twice", found.twice, 0),
    ]
    return figures + _killed(ours, wide)


def _killed(ours: Ours, wide: Service) -> list[Figure]:
    """Figures of a gateway that is killed with streams open, and serves again."""
    killed_ns, answered = uvloop.run(_ask_until_killed(ours, wide.name))
    until = time.monotonic() + _AGAIN_S
    while ours.replicas(wide.name) < 1 and time.monotonic() < until:
        time.sleep(0.02)
    again_s = time.monotonic() - killed_ns / 1e9
    usages = {one["label"]: one for one in ours.usages(wide.name, "killed-")}
    lines = {line.name: line for line in wide.lines("killed-")}
    lost_s = 0.0
    lost = unmarked = beyond = 0
    for name, line in lines.items():
        usage = usages.get(name, {})
        entered = int(usage.get("completion_tokens", 0))
        beyond += max(0, entered - line.tokens)
        if name.startswith("killed-s-"):
            unmarked += not usage.get("estimated", False)
        if entered >= line.tokens:
            continue
        lost += line.tokens - entered
        if name.startswith("killed-s-"):
            since_s = (line.tokens - entered) * _STREAM_MS / 1000
        else:
            since_s = (killed_ns - line.began_ns) / 1e9
        lost_s = max(lost_s, since_s)
    sent = sum(line.tokens for line in lines.values())
    print("\nkill -9 of the gateway")
    table(("", "open streams", "answered before", "tokens upstream", "lost", "of the last s", "back after s"), [
        ("", str(_STREAMS), f"{len(answered):,}", f"{sent:,}", str(lost), f"{lost_s:.2f}", f"{again_s:.1f}"),
    ])  # fmt: skip
    return [
        Figure.most("metering_killed_lost_s", "gateway killed: tokens lost, of the last s", round(lost_s, 2), 1),
        Figure.most("metering_killed_unmarked", "gateway killed: streams not settled as estimated", unmarked, 0),
        Figure.most("metering_killed_beyond", "gateway killed: tokens entered that were not sent", beyond, 0),
    ]
