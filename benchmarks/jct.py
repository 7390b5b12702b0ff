"""Job completion times by ordering policy: Muri's traces on 8 x 8 GPUs, Philly's two months pooled on 64 x 8.

Exclusive GPUs, rigid gangs, whole GPUs: of n GPUs, n // 8 are whole nodes and the rest is on one node. Work done is
kept on preemption; each start of a Muri job costs the seconds of the artifact's own table, each restart of a Philly
job 30 s. ``simulate`` is the only thing here that schedules. A ratio above one is worse than published; "to bound" is
how far a mean lies above what no schedule can beat. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import machine, table
from tidemill.core.ordering import (
    Fifo,
    JobFacts,
    KinGittins,
    Learns,
    LeastAttained,
    OrderPolicy,
    ShortestRemaining,
    may_displace,
)
from tidemill.units import SECOND_NS

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


def simulate(jobs: Sequence[TraceJob], nodes: int, gpus: int, order_policy: OrderPolicy) -> Outcome:
    """Run jobs, in order of submission, on ``nodes`` of ``gpus`` each until all have ended."""
    began = time.perf_counter()
    run = _Run(jobs, nodes, gpus, order_policy)
    run.play()
    jct = np.array(run.ended_s) - np.array([job.submit_s for job in jobs])
    return Outcome(
        jct_s=jct,
        slowdown=jct / np.array([job.work_s for job in jobs]),
        makespan_s=max(run.ended_s) - jobs[0].submit_s,
        preemptions=run.preemptions,
        wall_s=time.perf_counter() - began,
    )


@dataclass(slots=True)
class _State:
    """One job on its way. ``left_s`` is work; ``attained_s`` counts starting too."""

    number: int
    job: TraceJob
    left_s: float
    facts: JobFacts
    attained_s: float = 0.0
    started_s: float = 0.0
    starting_s: float = 0.0
    ends_s: float = 0.0
    starts: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)
    """Node and GPUs there, while it runs."""


class _Run:
    """A trace being played."""

    def __init__(self, jobs: Sequence[TraceJob], nodes: int, gpus: int, policy: OrderPolicy) -> None:
        self.jobs, self.gpus, self.policy = jobs, gpus, policy
        self.learner = policy if isinstance(policy, Learns) else None
        self.free = [gpus] * nodes
        self.on: list[dict[int, _State]] = [{} for _ in range(nodes)]
        self.waiting: dict[int, _State] = {}
        self.running: dict[int, _State] = {}
        self.ended_s = [0.0] * len(jobs)
        self.preemptions = 0
        self.now_s = 0.0
        self.compared_s = -1e18
        self.ranks: dict[int, float] = {}

    def play(self) -> None:
        """Until every job has ended."""
        coming, quantum, drift = 0, self.policy.quantum_ns / SECOND_NS, self.policy.drift_ns / SECOND_NS
        owed = False
        while coming < len(self.jobs) or self.waiting or self.running:
            next_s = self.jobs[coming].submit_s if coming < len(self.jobs) else 1e30
            next_s = min(next_s, min((state.ends_s for state in self.running.values()), default=1e30))
            if self.policy.preempts and self.waiting and self.running:
                if owed:
                    next_s = min(next_s, max(self.compared_s + quantum, self.now_s))
                elif drift:
                    next_s = min(next_s, max(self.compared_s + drift, self.now_s))
            self.now_s = next_s
            changed = self._end_due()
            while coming < len(self.jobs) and self.jobs[coming].submit_s <= self.now_s:
                self._submit(coming)
                coming += 1
                changed = True
            since = self.now_s - self.compared_s
            compare = self.policy.preempts and (
                ((changed or owed) and since >= quantum - 1e-6) or (drift > 0 and since >= drift - 1e-6)
            )
            if compare:
                self.compared_s = self.now_s
            owed = (owed or changed) and not compare
            if self.waiting and (changed or compare):
                self._schedule(compare)

    def _submit(self, number: int) -> None:
        job = self.jobs[number]
        facts = JobFacts(
            id=str(number), kin=job.kin, tenant=job.tenant, submitted_ns=int(job.submit_s * SECOND_NS),
            gpu_milli=job.gpus * 1000, attained_ns=0, running=False, since_ns=int(job.submit_s * SECOND_NS),
            expected_ns=int(job.work_s * SECOND_NS) if self.policy.knows_durations else None,
        )  # fmt: skip
        self.waiting[number] = _State(number, job, job.work_s, facts)
        if self.learner:
            self.learner.note(facts)

    def _end_due(self) -> bool:
        due = [state for state in self.running.values() if state.ends_s <= self.now_s]
        for state in due:
            self._free(state)
            self.ended_s[state.number] = self.now_s
            if self.learner:
                self.learner.note(self._facts(state), finished=True)
        return bool(due)

    def _schedule(self, compare: bool) -> None:
        now_ns = int(self.now_s * SECOND_NS)
        if compare:
            facts = {number: self._facts(state) for number, state in self.running.items()}
            if self.learner:
                for known in facts.values():
                    self.learner.note(known)
            self.ranks = {number: self.policy.rank(known, now=now_ns) for number, known in facts.items()}
        elif not any(self.free):
            return
        for number, state in self.waiting.items():
            self.ranks[number] = self.policy.rank(state.facts, now=now_ns)
        worst = max((self.ranks[number] for number in self.running), default=0.0) if compare else 0.0
        displaced = False
        misfits: set[int] = set()
        for number in self._in_order():
            state, wanted = self.waiting[number], self.waiting[number].job.gpus
            may = may_displace(self.policy, waiting=self.ranks[number], running=worst)
            if not may and not any(self.free):
                break
            places = None if wanted in misfits else self._fit(wanted)
            if places is None:
                misfits.add(wanted)
                if may and (places := self._make_room(state)) is not None:
                    displaced = True
                    misfits.clear()
            if places is not None:
                self._start(state, places)
        if displaced:
            self._backfill()

    def _backfill(self) -> None:
        misfits: set[int] = set()
        for number in self._in_order():
            if not any(self.free):
                break
            wanted = self.waiting[number].job.gpus
            if wanted not in misfits and (places := self._fit(wanted)) is not None:
                self._start(self.waiting[number], places)
            else:
                misfits.add(wanted)

    def _in_order(self) -> list[int]:
        return sorted(self.waiting, key=lambda number: (self.ranks[number], number))

    def _facts(self, state: _State) -> JobFacts:
        known = state.facts
        attained = state.attained_s + (self.now_s - state.started_s if state.places or state.ends_s else 0.0)
        return JobFacts(
            id=known.id, kin=known.kin, tenant=known.tenant, submitted_ns=known.submitted_ns,
            gpu_milli=known.gpu_milli, attained_ns=int(attained * SECOND_NS), running=True,
            since_ns=int(self.now_s * SECOND_NS),
            expected_ns=None if known.expected_ns is None else self._expected_ns(state, attained),
        )  # fmt: skip

    def _expected_ns(self, state: _State, attained_s: float) -> int:
        """Time run plus time left; starting anew adds to it."""
        return int((attained_s + max(state.ends_s - self.now_s, 0.0)) * SECOND_NS)

    def _fit(self, wanted: int) -> list[tuple[int, int]] | None:
        """Whole nodes first, the rest where least is left."""
        whole, rest = divmod(wanted, self.gpus)
        empty = [node for node, free in enumerate(self.free) if free == self.gpus] if whole else []
        if len(empty) < whole:
            return None
        places = [(node, self.gpus) for node in empty[:whole]]
        if rest:
            taken = set(empty[:whole])
            best, least = -1, self.gpus + 1
            for node, free in enumerate(self.free):
                if rest <= free < least and node not in taken:
                    best, least = node, free
            if best < 0:
                return None
            places.append((best, rest))
        return places

    def _make_room(self, state: _State) -> list[tuple[int, int]] | None:
        """Displace running jobs of least worth so that this one fits; None, and nothing done, where that cannot be."""
        whole, rest = divmod(state.job.gpus, self.gpus)
        rank = self.ranks[state.number]
        chosen: list[tuple[int, int]] = []
        victims: dict[int, _State] = {}
        for need, count in ((self.gpus, whole), (rest, 1 if rest else 0)):
            if not count:
                continue
            taken = {node for node, _ in chosen}
            options = [
                (worth, node, which)
                for node in range(len(self.free))
                if node not in taken and (option := self._victims(node, need, rank)) is not None
                for worth, which in (option,)
            ]
            if len(options) < count:
                return None
            for _, node, which in sorted(options, key=lambda option: option[:2])[:count]:
                chosen.append((node, need))
                victims |= {victim.number: victim for victim in which}
        for victim in victims.values():
            self._displace(victim)
        return chosen

    def _victims(self, node: int, need: int, rank: float) -> tuple[float, list[_State]] | None:
        """Which jobs of a node must go for ``need`` free GPUs, and what they are worth together."""
        free = self.free[node]
        if free >= need:
            return 0.0, []
        ranks = self.ranks
        which: list[tuple[_State, int]] = []
        for victim in sorted(self.on[node].values(), key=lambda victim: (-ranks[victim.number], -victim.number)):
            if free >= need:
                break
            if may_displace(self.policy, waiting=rank, running=ranks[victim.number]):
                held = next(gpus for place, gpus in victim.places if place == node)
                which.append((victim, held))
                free += held
        if free < need:
            return None
        for entry in reversed(list(which)):
            if free - entry[1] >= need:
                free -= entry[1]
                which.remove(entry)
        return sum(victim.job.gpus / ranks[victim.number] for victim, _ in which), [victim for victim, _ in which]

    def _start(self, state: _State, places: list[tuple[int, int]]) -> None:
        del self.waiting[state.number]
        state.places = places
        for node, gpus in places:
            self.free[node] -= gpus
            self.on[node][state.number] = state
        state.started_s = self.now_s
        state.starting_s = state.job.restart_s if state.starts else state.job.start_s
        state.starts += 1
        state.ends_s = self.now_s + state.starting_s + state.left_s
        self.running[state.number] = state
        self.ranks.setdefault(state.number, 0.0)

    def _free(self, state: _State) -> None:
        for node, gpus in state.places:
            self.free[node] += gpus
            del self.on[node][state.number]
        del self.running[state.number]

    def _displace(self, state: _State) -> None:
        self.preemptions += 1
        ran = self.now_s - state.started_s
        expected = None if state.facts.expected_ns is None else int(
            (state.attained_s + ran + state.left_s - max(ran - state.starting_s, 0.0)) * SECOND_NS
        )  # fmt: skip
        self._free(state)
        state.left_s -= max(ran - state.starting_s, 0.0)
        state.attained_s += ran
        state.places, state.ends_s = [], 0.0
        known = state.facts
        state.facts = JobFacts(
            id=known.id, kin=known.kin, tenant=known.tenant, submitted_ns=known.submitted_ns,
            gpu_milli=known.gpu_milli, attained_ns=int(state.attained_s * SECOND_NS), running=False,
            since_ns=int(self.now_s * SECOND_NS), expected_ns=expected,
        )  # fmt: skip
        self.waiting[state.number] = state
        if self.learner:
            self.learner.note(state.facts)


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
        rivals: tuple[tuple[str, OrderPolicy, str, float], ...] = (
            ("unknown", KinGittins(), *PUBLISHED_UNKNOWN[trace]),
            ("unknown", LeastAttained(), *PUBLISHED_UNKNOWN[trace]),
            ("known", ShortestRemaining(), "SRSF", PUBLISHED_SRSF[trace]),
            ("known", ShortestRemaining(gpu_exponent=1.0, name="srsf"), "SRSF", PUBLISHED_SRSF[trace]),
        )
        for kind, policy, rival, published in rivals:
            outcome = simulate(jobs, 8, 8, policy)
            mean = float(outcome.jct_s.mean())
            rows.append((
                trace.replace("_pr", "'"), kind, policy.name, f"{mean:,.0f}", f"{rival} {published:,.0f}",
                f"{mean / published:.3f}", f"{mean / BOUNDS[trace]:.3f}",
                f"{np.percentile(outcome.jct_s, 99):,.0f}", f"{outcome.makespan_s:,.0f}", f"{outcome.preemptions:,}",
                f"{outcome.wall_s:.0f} s",
            ))  # fmt: skip
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
            if policy.name in ("kin-gittins", "shortest-remaining"):
                figures[f"muri{trace.replace('_pr', '_t0')}_{kind}_s"] = round(mean)
    return rows


def _philly(nodes: int, figures: dict[str, float]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    jobs = philly()
    for policy in (Fifo(), LeastAttained(gpu_exponent=1.0, margin=2.0), KinGittins()):
        outcome = simulate(jobs, nodes, 8, policy)
        mean = float(outcome.jct_s.mean())
        tenants = by_tenant(jobs, outcome.slowdown)
        rows.append((
            policy.name, f"{mean:,.0f}", f"{mean / PUBLISHED_PHILLY_BACKFILL_S:.3f}",
            f"{np.percentile(outcome.jct_s, 99):,.0f}", f"{outcome.makespan_s:,.0f}", f"{outcome.preemptions:,}",
            f"{jain(tenants):.3f}", f"{jain(outcome.slowdown):.4f}", f"{tenants.max():.1f}", f"{outcome.wall_s:.0f} s",
        ))  # fmt: skip
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
        if policy.name == "fifo":
            figures |= {"philly_fifo_mean_jct_s": round(mean), "philly_fifo_jain": round(jain(tenants), 4)}
        if policy.name == "kin-gittins":
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
