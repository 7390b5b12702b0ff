"""A synthetic year on the twin: a million jobs on 1,000 machines with 8 GPUs each, on one core, in flat memory.

The work is a seeded mix (``tidemill.twin.synthetic``): gangs of up to 128 GPUs, spot and on-demand, eight tenants,
days and weekends. Every submission, placement, start and end goes through the driver that the control plane uses,
ledger lines included; turns are taken at multiples of half a virtual minute. How busy the fleet is follows from
``--median``, the median duration in minutes: from about 150 on the peaks of weekdays do not fit, and turns with a
backlog, backfill and displacing cost more. Shown is how time and memory went along; the last line is JSON.
``--profile`` tells which functions took the time of a shorter run.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import table
from tidemill.catalog import rate_card
from tidemill.model.events import Fact
from tidemill.model.plan import Plan
from tidemill.twin.cloud import Conditions
from tidemill.twin.fleet import parse_fleet
from tidemill.twin.report import figures, rows
from tidemill.twin.run import Result, run
from tidemill.twin.synthetic import Synthetic, arrivals
from tidemill.units import DAY_NS, MINUTE_NS, SECOND_NS

YEAR_NS = 365 * DAY_NS
SIZES = "1:40 2:10 4:10 8:25 16:8 32:4 64:2 128:1"
WALL_TARGET_S, JOBS_TARGET = 600.0, 1_000_000
MARKS = 10
MEDIAN_MIN = 130
TICK_NS = 30 * SECOND_NS


def mix(jobs: int, seed: int, median_min: int = MEDIAN_MIN) -> Synthetic:
    """A year of it, or as much of a year as there are jobs."""
    return Synthetic(
        jobs=jobs,
        seed=seed,
        span_ns=YEAR_NS * jobs // JOBS_TARGET,
        median_ns=median_min * MINUTE_NS,
        sigma=1.4,
        longest_ns=7 * DAY_NS,
        sizes=SIZES,
        cores_per_gpu=8,
    )


def rss_mib() -> float:
    """What the process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Progress:
    """Notes time and memory ten times on the way; sees every turn."""

    def __init__(self, jobs: int, start_ns: int) -> None:
        self.marks: list[tuple[int, float, float, float]] = []
        self._jobs, self._start_ns = jobs, start_ns
        self._began = time.monotonic()
        self._submitted = 0

    def watch(self, inbox: list[Fact], now: int, _plan: Plan) -> None:
        """One turn."""
        for fact in inbox:
            self._submitted += type(fact).__name__ == "Submitted"
        if self._submitted * MARKS >= self._jobs * (len(self.marks) + 1):
            days = (now - self._start_ns) / DAY_NS
            mark = (self._submitted, days, time.monotonic() - self._began, rss_mib())
            self.marks.append(mark)
            print("  {:>9,} jobs  day {:5.1f}  {:6.1f} s  {:6.1f} MiB".format(*mark), flush=True)


def measure(jobs: int, nodes: int, seed: int, median_min: int = MEDIAN_MIN) -> tuple[Result, Progress, float]:
    """The run, how it went along, and how long it took."""
    conditions = Conditions(
        nodes=parse_fleet(f"{nodes}xH100:8"),
        rates=rate_card({}),
        start_delay_ns=30 * SECOND_NS,
        tick_ns=TICK_NS,
    )
    progress = Progress(jobs, conditions.start_ns)
    began = time.monotonic()
    stream = arrivals(mix(jobs, seed, median_min), gpus=8 * nodes, per_node=8)
    result = run(stream, conditions, watch=progress.watch)
    return result, progress, time.monotonic() - began


def profiled(jobs: int, nodes: int, seed: int) -> None:
    """Print which functions take the time."""
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(measure, jobs, nodes, seed)
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> int:
    """Run it; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=JOBS_TARGET)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--median", type=int, default=MEDIAN_MIN, help="median duration in minutes")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.profile:
        profiled(given.jobs, given.nodes, given.seed)
        return 0
    result, progress, wall_s = measure(given.jobs, given.nodes, given.seed, given.median)
    found = figures(result)
    table(("figure", "value"), [(name, values[0]) for name, values, _, _ in rows([found])])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    warm = progress.marks[1][3] if len(progress.marks) > 2 else peak
    growth = max((mark[3] for mark in progress.marks[2:]), default=warm) - warm
    print(
        f"\n{given.jobs:,} jobs in {wall_s:.1f} s: {wall_s / given.jobs * 1e6:.0f} us a job, {found['turns']:,} turns"
    )
    print(f"memory: {warm:.0f} MiB after a fifth, {growth:+.0f} MiB at most after that, peak {peak:.0f} MiB")
    print(
        json.dumps(
            {
                "jobs": given.jobs,
                "wall_s": round(wall_s, 1),
                "peak_rss_mib": round(peak, 1),
                "rss_growth_mib": round(growth, 1),
                "us_per_job": round(wall_s / given.jobs * 1e6, 1),
                "turns": found["turns"],
                "utilization": found["utilization"],
                "ledger_lines": found["ledger_lines"],
                "seed": given.seed,
            }
        )
    )
    return 0 if wall_s <= WALL_TARGET_S * max(given.jobs / JOBS_TARGET, 1e-9) else 1


if __name__ == "__main__":
    sys.exit(main())
