"""Job completion times by ordering policy: Muri's traces on 8 x 8 GPUs, Philly's two months pooled on 64 x 8.

Exclusive GPUs, rigid gangs, whole GPUs: of n GPUs, n // 8 are whole nodes and the rest is on one node. Work done is
kept on preemption; each start of a Muri job costs the seconds of the artifact's own table, each restart of a Philly
job 30 s. What schedules is the product's own turn, driven by the twin. A ratio above one is worse than published;
"to bound" is how far a mean lies above what no schedule can beat. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import machine, table
from tidemill.core.plugins import order_named
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, NodeId
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Plan
from tidemill.model.policy import Policy
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, WorkloadSpec
from tidemill.twin.arrivals import Arrival
from tidemill.twin.cloud import SITE, Conditions
from tidemill.twin.run import run
from tidemill.units import DAY_NS, SECOND_NS

DATA = Path(__file__).resolve().parent / "data"
MURI_TRACES = ("1", "3", "4", "1_pr", "3_pr", "4_pr")
PUBLISHED_UNKNOWN = {
    "1": ("Themis", 1823179.078),
    "1_pr": ("Themis", 3314303.178),
    "3": ("Tiresias", 347213.2481),
    "3_pr": ("Themis", 1502768.219),
    "4": ("Themis", 994970.736),
    "4_pr": ("Themis", 2271053.053),
}
"""The best of the published policies that share no GPU and know no durations: mean JCT, s."""
PUBLISHED_SRSF = {
    "1": 980140.5699,
    "1_pr": 1801859.995,
    "3": 185021.8802,
    "3_pr": 798057.6829,
    "4": 487167.1688,
    "4_pr": 1218501.968,
}
BOUNDS = {"1": 920141, "1_pr": 1777526, "3": 145010, "3_pr": 782425, "4": 460842, "4_pr": 1199388}
"""No schedule without sharing has a lower mean JCT, not even one that knows all that is to come (s).

Completion is at least mean busy time plus half the work; the least sum of mean busy times is a transportation problem,
solved with rate limits on a grid of time for 1, 3, 4, and greedily for one machine of 64 GPUs where all start at 0.
"""
PUBLISHED_PHILLY_BACKFILL_S = 35971.0
"""FIFO with greedy backfill on the same jobs and GPUs, measured once before with another program."""
_GIB = 1024**3
EFFICIENCY = 1.015
"""What the artifact multiplies every iteration time with."""
_MODELS = ("vgg16", "vgg19", "resnet18", "shufflenet_v2_x1_0", "bert", "gpt2", "a2c", "dqn")
_START_S = {
    1: (7, 7, 4, 4, 10, 10, 38, 5),
    2: (7, 7, 5, 4, 10, 10, 39, 5),
    4: (8, 8, 5, 5, 10, 10, 39, 6),
    8: (9, 9, 7, 5, 10, 10, 46, 6),
    16: (9, 10, 7, 7, 10, 10, 46, 8),
    32: (10, 10, 7, 8, 10, 10, 46, 8),
}
"""Seconds to start, by GPUs and model."""
_PHILLY_RESTART_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceJob:
    """One job of a trace. ``kin`` names those that may last alike; seconds."""

    submit_s: float
    gpus: int
    work_s: float
    start_s: float
    restart_s: float
    tenant: str
    kin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trace. Arrays are by job, in the order given."""

    jct_s: NDArray[np.float64]
    slowdown: NDArray[np.float64]
    makespan_s: float
    preemptions: int
    wall_s: float


def muri(trace: str) -> list[TraceJob]:
    """The jobs of one of Muri's traces, by submission."""
    jobs = []
    for row in _rows(DATA / "muri" / f"trace{trace}.csv.gz"):
        gpus = int(row["num_gpu"])
        start_s = float(_START_S[gpus][_MODELS.index(row["model_name"])])
        work_s = float(row["iterations"]) * float(row["iteration_time"]) / 1000 * EFFICIENCY
        submit_s = float(row["submit_time"]) / 1000
        jobs.append(
            TraceJob(submit_s=submit_s, gpus=gpus, work_s=work_s, start_s=start_s, restart_s=start_s, tenant="",
                     kin=str(gpus))
        )  # fmt: skip
    return sorted(jobs, key=lambda job: job.submit_s)


def philly(first: str = "2017-10-01", end: str = "2017-12-01") -> list[TraceJob]:
    """Philly's jobs submitted from ``first`` and before ``end``, by submission; tenants are virtual clusters."""
    rows = [row for row in _rows(DATA / "philly" / "philly.csv.gz") if first <= row["timestamp"] < end]
    rows.sort(key=lambda row: row["timestamp"])
    zero = datetime.fromisoformat(rows[0]["timestamp"])
    return [
        TraceJob(
            submit_s=(datetime.fromisoformat(row["timestamp"]) - zero).total_seconds(), gpus=int(row["num_gpus"]),
            work_s=float(row["duration"]), start_s=0.0, restart_s=_PHILLY_RESTART_S, tenant=row["cluster"],
            kin=f"{row['cluster']}/{row['num_gpus']}",
        )
        for row in rows
    ]  # fmt: skip


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        yield from csv.DictReader(file)


def play(jobs: Sequence[TraceJob], nodes: int, gpus: int, order: str) -> Outcome:
    """What comes of the jobs under an order policy: the product's own turns, over virtual time.

    Jobs that do not fit are skipped (greedy backfill). A duration is told only to a policy that knows durations.
    """
    began = time.perf_counter()
    told = order_named(order).knows_durations
    policy = Policy(
        order=order, backfill=False, min_run_ns=0, half_life_ns=0, displace_in_project=False, patience_ns=0,
        meter_every_ns=10_000 * DAY_NS, starts_per_turn=100_000,
    )  # fmt: skip
    conditions = Conditions(
        nodes=tuple(_node(f"node-{at:03d}", gpus) for at in range(nodes)), rates=RateCard(id="none", rates=()),
        policy=policy,
    )  # fmt: skip
    submitted: dict[str, int] = {}
    ended: dict[str, int] = {}
    moved = 0

    def watch(_: object, now: int, plan: Plan) -> None:
        nonlocal moved
        for entry in plan.log:
            if entry.type == "Submitted":
                submitted[entry.job_id] = now
            elif entry.type == "Succeeded":
                ended[entry.job_id] = now
            moved += entry.type == "Preempted"

    run(_arrivals(jobs, gpus, told=told), conditions, watch=watch)
    if len(ended) != len(jobs):
        raise SystemExit(f"{len(jobs) - len(ended)} of {len(jobs)} jobs did not end under {order}")
    names = [f"job_{at:06d}-0" for at in range(len(jobs))]
    jct_s = np.array([(ended[name] - submitted[name]) / SECOND_NS for name in names])
    work_s = np.array([max(job.start_s + job.work_s, 1.0) for job in jobs])
    first = min(submitted.values(), default=0)
    return Outcome(
        jct_s=jct_s,
        slowdown=np.maximum(jct_s / work_s, 1.0),
        makespan_s=(max(ended.values(), default=first) - first) / SECOND_NS,
        preemptions=moved,
        wall_s=time.perf_counter() - began,
    )


def _arrivals(jobs: Sequence[TraceJob], gpus: int, *, told: bool) -> Iterator[Arrival]:
    for at, job in enumerate(jobs):
        work_ns = round(job.work_s * SECOND_NS)
        spec = WorkloadSpec(
            kind=Kind.TASK, name="train", run="train", nodes=max(1, job.gpus // gpus),
            resources=Resources(gpus=GpuRequest(count=min(job.gpus, gpus))), checkpoint_grace_ns=1,
            expected_duration_ns=work_ns if told else 0,
        )  # fmt: skip
        yield Arrival(
            at_ns=round(job.submit_s * SECOND_NS), tenant=job.tenant or "all", user=job.kin.replace("/", "-"),
            spec=spec, duration_ns=work_ns, start_ns=round(job.start_s * SECOND_NS),
            restart_ns=round(job.restart_s * SECOND_NS), name=f"wl_{at:06d}",
        )  # fmt: skip


def _node(name: str, gpus: int) -> Node:
    devices = tuple(
        Device(
            id=DeviceId(f"{name}-{at}"), index=at, model="V100-32GB", reported="V100", memory_bytes=32 * _GIB,
            idle_mw=0, busy_mw=0,
        )
        for at in range(gpus)
    )  # fmt: skip
    return Node(
        id=NodeId(name), site_id=SITE.id, name=name, state=NodeState.READY, version=1, boot_id="b", address=name,
        cpu_milli=1_000_000, memory_bytes=1024 * _GIB, disk_bytes=1024 * _GIB, devices=devices,
    )  # fmt: skip


def jain(values: NDArray[np.float64]) -> float:
    """Jain's index: one where all are equal, 1/n where one has all."""
    return float(values.sum() ** 2 / (len(values) * (values**2).sum()))


def by_tenant(jobs: Sequence[TraceJob], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of ``values`` for each tenant, by name."""
    tenants = sorted({job.tenant for job in jobs})
    return np.array([np.mean([v for v, job in zip(values, jobs, strict=True) if job.tenant == t]) for t in tenants])


def _muri(traces: Sequence[str], figures: dict[str, float]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for trace in traces:
        jobs = muri(trace)
        rivals: tuple[tuple[str, str, str, float], ...] = (
            ("unknown", "kin-gittins", *PUBLISHED_UNKNOWN[trace]),
            ("unknown", "least-attained", *PUBLISHED_UNKNOWN[trace]),
            ("known", "shortest-remaining", "SRSF", PUBLISHED_SRSF[trace]),
            ("known", "srsf", "SRSF", PUBLISHED_SRSF[trace]),
        )
        for kind, policy, rival, published in rivals:
            outcome = play(jobs, 8, 8, policy)
            mean = float(outcome.jct_s.mean())
            rows.append((
                trace.replace("_pr", "'"), kind, policy, f"{mean:,.0f}", f"{rival} {published:,.0f}",
                f"{mean / published:.3f}", f"{mean / BOUNDS[trace]:.3f}",
                f"{np.percentile(outcome.jct_s, 99):,.0f}", f"{outcome.makespan_s:,.0f}", f"{outcome.preemptions:,}",
                f"{outcome.wall_s:.0f} s",
            ))  # fmt: skip
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
            if policy in ("kin-gittins", "shortest-remaining"):
                figures[f"muri{trace.replace('_pr', '_t0')}_{kind}_s"] = round(mean)
    return rows


def _philly(nodes: int, figures: dict[str, float]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    jobs = philly()
    for policy in ("fifo", "least-service"):
        outcome = play(jobs, nodes, 8, policy)
        mean = float(outcome.jct_s.mean())
        tenants = by_tenant(jobs, outcome.slowdown)
        rows.append((
            policy, f"{mean:,.0f}", f"{mean / PUBLISHED_PHILLY_BACKFILL_S:.3f}",
            f"{np.percentile(outcome.jct_s, 99):,.0f}", f"{outcome.makespan_s:,.0f}", f"{outcome.preemptions:,}",
            f"{jain(tenants):.3f}", f"{jain(outcome.slowdown):.4f}", f"{tenants.max():.1f}", f"{outcome.wall_s:.0f} s",
        ))  # fmt: skip
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
        if policy == "fifo":
            figures |= {"philly_fifo_mean_jct_s": round(mean), "philly_fifo_jain": round(jain(tenants), 4)}
        if policy == "least-service":
            figures |= {"philly_mean_jct_s": round(mean), "philly_jain": round(jain(tenants), 4)}
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", nargs="*", default=list(MURI_TRACES), choices=MURI_TRACES)
    parser.add_argument("--no-philly", action="store_true")
    parser.add_argument("--philly-nodes", type=int, default=64)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    muri_rows = _muri(given.traces, figures)
    philly_rows = [] if given.no_philly else _philly(given.philly_nodes, figures)
    about = machine()
    print(f"\nMean job completion time in seconds; {about['cpu']}, {about['date']}\n")
    header = ("trace", "durations", "policy", "mean", "published", "ratio", "to bound", "p99", "makespan", "moved", "")
    table(header, muri_rows)
    if philly_rows:
        print(f"\nPhilly, October and November 2017, {given.philly_nodes} nodes of 8, durations unknown\n")
        table(("policy", "mean", "to 35,971", "p99", "makespan", "moved", "Jain by VC", "by job", "worst VC", ""),
              philly_rows)  # fmt: skip
    print(json.dumps({**figures, "machine": about}))


if __name__ == "__main__":
    main()
