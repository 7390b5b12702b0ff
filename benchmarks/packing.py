"""How much of a GPU cluster gets used: Tidemill's placement against FGD and best fit, by FGD's published protocol.

Pods of a public production trace (17 workloads, 1,213 nodes, 6,212 GPUs) arrive one by one until 130 % of the GPUs have
been asked for; nothing leaves, nothing moves, a pod that fits is never refused and one that does not is dropped. What
counts is the mean share of GPUs in use over the moments whose arrived demand rounds to 100 %, over ten seeds.

The published values are printed beside our own runs of the same policies, and a ceiling that no online policy can
reach. Sources and licences are in ``benchmarks/data``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import machine, table
from tidemill.core.feasible import Shape
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Gang, place_gang
from tidemill.core.score import BestFit, Fgd, Score, Tide, Want
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.model.resources import GpuRequest, Resources

DATA = Path(__file__).parent / "data"
WORKLOADS = (
    "default",
    *(f"cpu{share}" for share in ("050", "100", "200", "250")),
    *(f"gpushare{share}" for share in (40, 60, 80, 100)),
    *(f"gpuspec{share}" for share in (10, 20, 25, 33)),
    *(f"multigpu{share}" for share in (20, 30, 40, 50)),
)
QUICK = ("default", "cpu250", "gpushare100", "gpuspec33", "multigpu50")
SEEDS = range(42, 52)
DEMAND = 1.3
_MIB = 1 << 20
_MODEL = "model"


@dataclass(frozen=True)
class Pod:
    """One request of the trace: a worker's want, and its GPU demand in milli."""

    want: Want

    @property
    def demand(self) -> int:
        return self.want.count * self.want.milli


@dataclass(frozen=True)
class Trace:
    """Nodes and pods of one workload, in the order of their names."""

    cpu: np.ndarray[Any, Any]
    memory: np.ndarray[Any, Any]
    gpus: np.ndarray[Any, Any]
    model: np.ndarray[Any, Any]
    models: tuple[str, ...]
    pods: tuple[Pod, ...]

    @property
    def capacity(self) -> int:
        """GPU-milli of all nodes."""
        return int(self.gpus.sum()) * 1000


@dataclass(frozen=True)
class Run:
    """One policy on one workload and seed: allocation in percent, and pods that did not fit."""

    at_100: float
    at_130: float
    failed_at_100: int
    placements: int
    seconds: float


def read(workload: str) -> Trace:
    """The published node list and the pods of one workload."""
    nodes = _rows("openb/openb_node_list_gpu_node.csv.gz")
    models = tuple(sorted({node["model"] for node in nodes}))
    pods = []
    for row in sorted(_rows(f"openb/openb_pod_list_{workload}.csv.gz"), key=lambda row: row["name"]):
        count = int(row["num_gpu"])
        wanted = [name for name in (row.get("gpu_spec") or "").split("|") if name] if count else []
        known = tuple(sorted(models.index(name) if name in models else len(models) for name in wanted))
        milli = min(int(row["gpu_milli"] or 0), 1000) if count else 0
        pods.append(Pod(Want(int(row["cpu_milli"]), int(row["memory_mib"]) * _MIB, count, milli, known)))
    return Trace(
        cpu=np.array([int(node["cpu_milli"]) for node in nodes], np.int64),
        memory=np.array([int(node["memory_mib"]) for node in nodes], np.int64) * _MIB,
        gpus=np.array([int(node["gpu"]) for node in nodes], np.int64),
        model=np.array([models.index(node["model"]) for node in nodes], np.int64),
        models=models,
        pods=tuple(pods),
    )


def arrivals(trace: Trace, seed: int) -> list[Pod]:
    """The pods, shuffled, then fewer or more of them until 130 % of the GPUs are asked for: the paper's tuning."""
    rng = random.Random(seed)
    order = list(trace.pods)
    rng.shuffle(order)
    demand, limit = sum(pod.demand for pod in order), DEMAND * trace.capacity
    if demand > limit:
        while demand > limit:
            demand -= order.pop(rng.randrange(len(order))).demand
        return order
    while demand + (pod := trace.pods[rng.randrange(len(trace.pods))]).want.milli <= limit:
        order.append(pod)
        demand += pod.demand
    return order


def fleet_of(trace: Trace, seed: int) -> FleetArrays:
    """The product's own columns, all free. The seed goes into the names, and those decide how ties break."""
    nodes = []
    for row, (cpu, memory, gpus, model) in enumerate(
        zip(trace.cpu.tolist(), trace.memory.tolist(), trace.gpus.tolist(), trace.model.tolist(), strict=True)
    ):
        name = trace.models[model]
        devices = tuple(
            Device(
                id=DeviceId(f"{seed}-{row}-{at}"), index=at, model=name, reported=name, memory_bytes=_MIB, idle_mw=0,
                busy_mw=0,
            )
            for at in range(gpus)
        )  # fmt: skip
        nodes.append(
            Node(
                id=NodeId(f"{seed}-{row}"), site_id=SiteId("openb"), name=f"{seed}-{row}", state=NodeState.READY,
                version=1, boot_id="", address="", cpu_milli=cpu, memory_bytes=memory, disk_bytes=0, devices=devices,
                labels=((_MODEL, name),),
            )
        )  # fmt: skip
    fleet = FleetArrays()
    fleet.rebuild(nodes)
    return fleet


def gang_of(want: Want, models: Sequence[str]) -> Gang:
    """A pod as the placement engine takes it: a gang of one. The models that will do are a label of the nodes."""
    gpus = GpuRequest(count=want.count, milli=want.milli) if want.count else None
    resources = Resources(cpu_milli=max(want.cpu_milli, 1), memory_bytes=want.memory_bytes, gpus=gpus)
    named = "|".join(models[model] for model in want.models if model < len(models))
    shape = Shape(resources, labels=((_MODEL, named),) if want.models else ())
    return Gang(choices=(shape,), workers=1, smallest=1)


def play(trace: Trace, seed: int, score: Score) -> Run:
    """One run of the protocol."""
    began = time.perf_counter()
    mix = Counter(pod.want for pod in trace.pods)
    score.learn([(want, number / len(trace.pods)) for want, number in mix.items()])
    fleet = fleet_of(trace, seed)
    gangs = {want: gang_of(want, trace.models) for want in mix}
    arrived = used = failed = failed_at_100 = placements = 0
    seen: dict[int, list[float]] = defaultdict(list)
    percent = trace.capacity / 100
    for pod in arrivals(trace, seed):
        arrived += pod.demand
        if place_gang(fleet, gangs[pod.want], score=score) is not None:
            fleet.commit()
            used += pod.demand
            placements += 1
        else:
            failed += 1
        at = int(arrived / percent + 0.5)
        seen[at].append(round(used / percent, 2))
        if arrived <= trace.capacity:
            failed_at_100 = failed
    return Run(
        at_100=statistics.fmean(seen[100]),
        at_130=statistics.fmean(seen[130]),
        failed_at_100=failed_at_100,
        placements=placements,
        seconds=time.perf_counter() - began,
    )


def published(policy: str) -> dict[str, tuple[float, float]]:
    """The means over seeds that the paper's authors got, at 100 and 130 percent."""
    values: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in _rows("fgd_expected/analysis_allo_discrete.csv.gz"):
        if row["sc_policy"] == policy and row["tune"] == "1.3":
            values[row["workload"].removeprefix("openb_pod_list_")].append((float(row["100"]), float(row["130"])))
    return {name: _means(runs) for name, runs in values.items()}


def ceilings() -> dict[str, float]:
    """What the linear relaxation could use of the pods that arrived up to 100 percent."""
    with (DATA / "fgd_expected" / "ceiling.csv").open() as file:
        return {row["workload"]: float(row["at_100"]) for row in csv.DictReader(file)}


def policies(*, compiled: bool) -> dict[str, Callable[[], Score]]:
    """The rivals and ours."""
    return {
        "fgd": lambda: Fgd(compiled=compiled),
        "best_fit": BestFit,
        "tide": lambda: Tide(compiled=compiled),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five workloads and two seeds")
    parser.add_argument("--policies", default="fgd,best_fit,tide", help="which to run")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    options = parser.parse_args(arguments)
    workloads, seeds = (QUICK, SEEDS[:2]) if options.quick else (WORKLOADS, SEEDS)
    names = options.policies.split(",")
    if unknown := sorted(set(names) - set(policies(compiled=False))):
        parser.error(f"--policies: {', '.join(unknown)} is none of {', '.join(policies(compiled=False))}")
    jobs = [(name, workload, seed) for workload in workloads for name in names for seed in seeds]
    began = time.perf_counter()
    results: dict[tuple[str, str], list[Run]] = defaultdict(list)
    with ProcessPoolExecutor(options.workers) as pool:
        for (name, workload, _), run in zip(jobs, pool.map(_one, jobs, chunksize=len(seeds)), strict=True):
            results[name, workload].append(run)
    report(results, workloads, names, seconds=time.perf_counter() - began)


def report(
    results: dict[tuple[str, str], list[Run]], workloads: Sequence[str], names: Sequence[str], *, seconds: float
) -> None:
    """The table per workload and the last line."""
    fgd, best_fit, ceiling = published("06-FGD"), published("05-BestFit"), ceilings()
    at_100 = {
        (name, workload): statistics.fmean(run.at_100 for run in results[name, workload])
        for name in names
        for workload in workloads
    }
    failed = {key: statistics.fmean(run.failed_at_100 for run in results[key]) for key in at_100}
    rows: list[list[float | None]] = []
    for workload in workloads:
        ours = at_100.get(("tide", workload))
        rival, most = fgd[workload][0], ceiling[workload]
        gain = None if ours is None else ours - rival
        rows.append([
            best_fit[workload][0], at_100.get(("best_fit", workload)), rival, at_100.get(("fgd", workload)), ours, most,
            gain, None if gain is None else 100 * gain / (most - rival),
            *(failed.get((name, workload)) for name in ("best_fit", "fgd", "tide")),
        ])  # fmt: skip
    rows.append([
        None if None in column else statistics.fmean(value for value in column if value is not None)
        for column in zip(*rows, strict=True)
    ])  # fmt: skip
    formats = [".2f"] * 6 + ["+.2f"] + [".0f"] * 4
    print("GPUs in use, percent, when 100 % have been asked for (mean of seeds); pods that did not fit by then\n")
    table(
        (
            "workload", "best fit, published", "ours", "FGD, published", "ours", "Tidemill", "ceiling", "gain",
            "gap closed, %", "failed best fit", "FGD", "Tidemill",
        ),
        [
            [name, *("-" if value is None else format(value, how) for value, how in zip(row, formats, strict=True))]
            for name, row in zip((*workloads, "mean"), rows, strict=True)
        ],
    )  # fmt: skip
    placements = sum(run.placements for runs in results.values() for run in runs)
    spent = sum(run.seconds for runs in results.values() for run in runs)
    print(
        f"\n{sum(map(len, results.values()))} runs in {seconds:.0f} s; {1e6 * spent / placements:.0f} us per placement"
    )
    worst = min(at_100["tide", workload] - fgd[workload][0] for workload in workloads) if "tide" in names else None
    print(
        json.dumps(
            {
                "default_at_100": _rounded(at_100.get(("tide", "default"))),
                "mean17_at_100": _mean_of(at_100, "tide", workloads),
                "worst_minus_fgd": _rounded(worst),
                "fgd_default_at_100": _rounded(at_100.get(("fgd", "default"))),
                "fgd_mean17_at_100": _mean_of(at_100, "fgd", workloads),
                "workloads": len(workloads),
                "machine": machine(),
            }
        )
    )


def _one(job: tuple[str, str, int]) -> Run:
    name, workload, seed = job
    return play(read(workload), seed, policies(compiled=_has_numba())[name]())


def _has_numba() -> bool:
    import importlib.util

    return importlib.util.find_spec("numba") is not None


def _rows(path: str) -> list[dict[str, str]]:
    with gzip.open(DATA / path, "rt") as file:
        return list(csv.DictReader(file))


def _means(runs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(run[0] for run in runs), statistics.fmean(run[1] for run in runs)


def _mean_of(at_100: dict[tuple[str, str], float], name: str, workloads: Sequence[str]) -> float | None:
    values = [at_100[name, workload] for workload in workloads if (name, workload) in at_100]
    return _rounded(statistics.fmean(values)) if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


if __name__ == "__main__":
    main()
