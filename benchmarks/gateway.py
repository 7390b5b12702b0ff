"""What the gateway costs and keeps to, beside nginx, vllm-router, sglang-router and LiteLLM, on the same two cores.

Every contender is one worker on one core; the load and the upstream have the other. ``cpu``: wrk asks in a closed loop,
whole answers and streams of 20 events; user and system time of the contender's processes for 1,000 requests, the median
of rounds in which contenders take turns. ``paced``: what is added to the time to the first token and to the gaps.
``gone``: a client goes away while its request waits in line, before the first byte, in a stream, and under a whole
answer; how long until that is known where the work is. ``overload``: ten times what can be answered. ``metering``: the
ledger beside the upstream's journal, with clients that leave, and with the gateway killed. ``limits``: how far a limit
is overshot. ``open``: memory with ten thousand streams open. ``cold``: the answer from no replica at all.

Tidemill's gateway is that of a cloud, with all it does: keys, metering, routing, circuits; its upstream is a service of
that cloud. vllm-router, sglang-router and LiteLLM are installed into ``.bench/`` on first use; nginx and wrk are
Debian's. Without ``--full`` the parts are short. A table says what is asked of each figure; the last line is JSON, in
which null is what was not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import end_on_signals, machine
from benchmarks.gateways import bars, cold, cost, gone, limits, metering, opened, overload, paced
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.contenders import RIVALS, Contender
from benchmarks.gateways.ours import Ours, Service, ours

PARTS: Final = ("cpu", "paced", "gone", "overload", "metering", "limits", "open", "cold")
_SLOTS: Final = 16
"""Of the service that is overloaded, and before which requests wait in line."""
_MOST_SLOTS: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of each part: rounds and seconds of load, streams at once and turns of these, clients that leave,
    seconds of overload, requests that are metered, streams open at once, starts from nothing.
    """

    rounds: int = 5
    seconds: float = 4.0
    streams: int = 256
    turns: int = 5
    trials: int = 200
    overload: float = 15.0
    requests: int = 10_000
    open: int = opened.WANTED // 5
    starts: int = 3


FULL: Final = Sizes(trials=1000, overload=60.0, requests=100_000, open=opened.WANTED, starts=10)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--full", action="store_true", help="as much of each part as what is asked of it speaks of")
    parser.add_argument("--rounds", type=int, help="cpu: rounds")
    parser.add_argument("--seconds", type=float, help="cpu: of load, each")
    parser.add_argument("--streams", type=int, help="paced: at once")
    parser.add_argument("--turns", type=int, help="paced: of each contender")
    parser.add_argument("--trials", type=int, help="gone: clients, in all phases together")
    parser.add_argument("--overload", type=float, help="overload: seconds")
    parser.add_argument("--requests", type=int, help="metering: requests")
    parser.add_argument("--open", type=int, help="open: streams at once")
    parser.add_argument("--starts", type=int, help="cold: starts from nothing")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    given = parser.parse_args()
    chosen = {name: value for name in Sizes.__slots__ if (value := getattr(given, name)) is not None}
    sizes = replace(FULL if given.full else Sizes(), **chosen)
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    end_on_signals()
    for program, package in (("wrk", "wrk"), ("taskset", "util-linux")):
        if "cpu" in wanted and shutil.which(program) is None:
            sys.exit(f"{program} is needed: apt-get install {package}")
    print(json.dumps(machine()), flush=True)
    os.sched_setaffinity(0, {0})
    opened.raise_file_limit()
    figures: list[Figure] = []
    with ours() as cloud, cloud.service("mock", concurrency=_MOST_SLOTS) as wide:
        wide.contender().pin(0)
        for part in PARTS:
            if part in wanted:
                began = time.monotonic()
                cloud.contender.pin(1)
                figures += _measured(part, cloud, wide, sizes, given.rivals)
                print(f"{part} took {time.monotonic() - began:.0f} s", flush=True)
    bars.tell(figures)
    print(json.dumps(bars.as_json(figures)))


def _measured(part: str, cloud: Ours, wide: Service, sizes: Sizes, rivals: str) -> list[Figure]:
    """The figures of one part."""
    match part:
        case "cpu":
            with _contenders(cloud, wide, rivals) as all_of_them:
                return cost.measure(all_of_them, cloud.folder, rounds=sizes.rounds, seconds=sizes.seconds)
        case "paced":
            quick = ",".join(name for name in rivals.split(",") if name != "litellm")
            with _contenders(cloud, wide, quick) as all_of_them:
                direct = replace(wide.contender(), name="direct", pid=0)
                return paced.measure(direct, all_of_them, streams=sizes.streams, turns=sizes.turns)
        case "gone":
            with cloud.service("narrow", concurrency=_SLOTS) as narrow:
                return gone.measure(cloud, wide, narrow, slots=_SLOTS, trials=sizes.trials)
        case "overload":
            with cloud.service("narrow", concurrency=_SLOTS) as narrow:
                return overload.measure(cloud, narrow, slots=_SLOTS, seconds=sizes.overload)
        case "metering":
            return metering.measure(cloud, wide, requests=sizes.requests)
        case "limits":
            return limits.measure(cloud, wide, requests=1000)
        case "open":
            return opened.measure(cloud, wide, streams=sizes.open)
        case _:
            with cloud.service("asleep", is_asleep=True, **cold.SECTION) as asleep:
                return cold.measure(cloud, asleep, trials=sizes.starts)


@contextlib.contextmanager
def _contenders(cloud: Ours, wide: Service, rivals: str) -> Iterator[list[Contender]]:
    """The gateway, and those of the rivals that can be started, before the same upstream."""
    with contextlib.ExitStack() as stack:
        found = [cloud.contender]
        for name in filter(None, rivals.split(",")):
            try:
                found.append(stack.enter_context(RIVALS[name](cloud.folder, wide.contender().port)))
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name}: {error}", file=sys.stderr)
        yield found


if __name__ == "__main__":
    main()
