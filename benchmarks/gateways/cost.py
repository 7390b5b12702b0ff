"""CPU for 1,000 requests: wrk asks in a closed loop, with 32 connections, whole answers and streams of 20 events."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.clouds import median, table
from benchmarks.gateways.asking import body_of
from benchmarks.gateways.bars import Figure
from benchmarks.gateways.contenders import RIVALS, Contender

_NAMES: Final = {"whole": "cpu_s_per_1k", "stream": "stream_cpu_s_per_1k"}
_MOST_TIMES: Final = {"nginx": 5.0, "vllm_router": 1.0, "sglang_router": 1.0, "litellm": 0.0167}
_LUA: Final = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
KEY
wrk.body = [==[BODY]==]
"""


def load(contender: Contender, folder: Path, *, stream: bool, seconds: float, connections: int) -> tuple[int, float]:
    """How many requests were answered well, and the contender's CPU meanwhile (s). Raises: RuntimeError."""
    key = f'wrk.headers["Authorization"] = "Bearer {contender.key}"' if contender.key else ""
    script = folder / "load.lua"
    script.write_text(_LUA.replace("KEY", key).replace("BODY", body_of(stream=stream).decode()))
    before = contender.cpu_s()
    command = [
        "taskset", "-c", "0", "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s",
        "-s", str(script), f"http://127.0.0.1:{contender.port}",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used = contender.cpu_s() - before
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)", done.stdout)
    if bad:
        raise RuntimeError(f"{contender.name}: {bad[0]}")
    requests = re.search(r"(\d+) requests in", done.stdout)
    if requests is None or not int(requests[1]):
        raise RuntimeError(f"{contender.name} answered nothing: {done.stdout}")
    return int(requests[1]), used


def measure(contenders: list[Contender], folder: Path, *, rounds: int, seconds: float) -> list[Figure]:
    """Figures of so many rounds, in which contenders take turns. Raises: RuntimeError."""
    found: dict[str, dict[str, Any]] = {each.name: {"whole": [], "stream": [], "rps": []} for each in contenders}
    for _ in range(rounds):
        for stream in (False, True):
            for each in contenders:
                each.pin(1)
                for_s = seconds if each.name != "litellm" else max(8.0, 2 * seconds)
                requests, used = load(each, folder, stream=stream, seconds=for_s, connections=32)
                found[each.name]["stream" if stream else "whole"].append(1000 * used / requests)
                if not stream:
                    found[each.name]["rps"].append(requests / for_s)
    return _told(found)


def _told(found: dict[str, dict[str, Any]]) -> list[Figure]:
    rows = []
    mine = {kind: median(found["tidemill"][kind]) for kind in ("whole", "stream")}
    costs: dict[str, float | None] = {f"{name}_{kind}": None for name in RIVALS for kind in _NAMES}
    for name, each in found.items():
        whole, stream = median(each["whole"]), median(each["stream"])
        costs |= {f"{name}_whole": round(whole, 4), f"{name}_stream": round(stream, 4)}
        ratios = (f"{whole / mine['whole']:.2f}", f"{stream / mine['stream']:.2f}")
        least = (f"{min(each['whole']):.3f}", f"{min(each['stream']):.3f}")
        rows.append((name, f"{whole:.3f}", least[0], ratios[0], f"{stream:.3f}", least[1], ratios[1],
                     f"{median(each['rps']):,.0f}"))  # fmt: skip
    print("\nCPU s for 1,000 requests, 32 connections (median, least, beside ours)")
    table(("", "whole", "least", "ratio", "stream", "least", "ratio", "requests/s"), rows)
    return [figure for kind, name in _NAMES.items() for figure in _beside(costs, kind, name)]


def _beside(costs: dict[str, float | None], kind: str, name: str) -> Iterator[Figure]:
    """Our cost and everybody's for one kind of answers, and what is asked of it beside theirs."""
    mine = costs[f"tidemill_{kind}"] or 0.0
    yield Figure(name=name, what=f"CPU s for 1,000, {kind}", value=mine)
    for rival in RIVALS:
        theirs = costs[f"{rival}_{kind}"]
        yield Figure(name=f"{rival}_{name}", what=f"{rival}: CPU s for 1,000, {kind}", value=theirs)
        times = round(mine / theirs, 4) if theirs else None
        yield Figure.most(f"{name}_by_{rival}", f"CPU, {kind}: times that of {rival}", times, _MOST_TIMES[rival])
