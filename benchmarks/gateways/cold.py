"""From no replica at all: how long after its replica listens, by its own clock, a held request is answered."""

from __future__ import annotations

import time
from typing import Final

import uvloop
from tests.cloud import eventually

from benchmarks.clouds import table
from benchmarks.gateways.asking import body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.ours import Ours, Service

SECTION: Final = {"replicas": "0..1", "idle": "1s", "wait": "60s"}


def _is_at_zero(ours: Ours, service: Service) -> bool:
    job = ours.cloud.job(service.job)
    return job["state"] == "queued" and job["reason"]["code"] == "NotNeeded" and ours.replicas(service.name) <= 0


def measure(ours: Ours, asleep: Service, *, trials: int) -> list[Figure]:
    """Figures of so many starts. Raises: RuntimeError, AssertionError when one is not answered, or it stays up."""
    rows, after_ms = [], []
    for number in range(trials):
        eventually(lambda: _is_at_zero(ours, asleep), within_s=60, what="nothing runs when nothing is asked")
        ups = len(asleep.ups())
        asker = ours.asker
        answer = uvloop.run(asker.ask(asker.request(body_of(model=asleep.name))))
        if answer.status != 200:
            raise RuntimeError(f"the held request was answered with {answer.status}: {answer.body[:200]!r}")
        listened = asleep.ups()[ups:]
        if len(listened) != 1:
            raise RuntimeError(f"{len(listened)} replicas were started for one request")
        after_ms.append(1000 * answer.ended - listened[0] / 1e6)
        rows.append((str(number + 1), f"{1000 * answer.took_s - after_ms[-1]:,.0f}", f"{after_ms[-1]:.1f}"))
        time.sleep(0.1)
    table(("\nCold start", "until it listens, ms", "until the answer, ms more"), rows)
    return [
        Figure.most("cold_added_ms", "cold start: answer after the replica is up, ms", round(max(after_ms), 1), 100)
    ]
