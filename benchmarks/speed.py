"""How fast the scheduler decides, on one core: placements, whole turns, gangs, reclaim, and how cost grows with nodes.

Only the decision is timed: no store, no network, no runner. Requests are those of a public production trace, drawn at
random with a fixed seed; the placement policy was told of their mix beforehand, as it would have learned. A *turn* is
all that a control plane does with a batch of facts: admission, order by fair share, places, leases, launches. Loops
are compiled on a small fleet before the clock runs. With numba (``tidemill[fast]``) the default policy's
loops are compiled; without, or with ``--plain``, they are NumPy's. Either way the places are the same.

The published figures of others are printed beside ours, from machines of their projects' choice; most of theirs
include an API server. Sources are in ``docs/benchmarks.md``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import gc
import gzip
import importlib.util
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.clouds import machine, table
from tidemill.core.feasible import Shape, fitting
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Gang, place_gang, want_of
from tidemill.core.score import Tide
from tidemill.core.turn import turn
from tidemill.core.world import World
from tidemill.model.events import Exited, Fact, NodeJoined, QueueSet, Started, Submitted
from tidemill.model.fleet import Device, Node, NodeState, Site, SiteKind
from tidemill.model.ids import DeviceId, NodeId, OrganizationId, PrincipalId, ProjectId, QueueId, SiteId, WorkloadId
from tidemill.model.job import Workload
from tidemill.model.ledger import Rate, RateCard
from tidemill.model.plan import Launch, Plan
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.units import HOUR_NS, MILLI, MINUTE_NS, SECOND_NS

PODS: Final = Path(__file__).parent / "data" / "openb" / "openb_pod_list_default.csv.gz"
PLOT: Final = Path(__file__).resolve().parents[1] / "docs" / "images" / "speed.svg"
NODES, GPUS, CORES, MEMORY = 12_500, 8, 128, 1 << 40
FULL: Final = 0.95
SEED: Final = 42
SIZES: Final = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
START: Final = 1_700_000_000 * SECOND_NS
OWNER, BORROWER = ProjectId("owner"), ProjectId("borrower")
POLICY: Final = Policy(starts_per_turn=10_000, meter_every_ns=1_000 * HOUR_NS)
"""Meters are cut together at intervals, for billing; that is not a part of the decision and is left out."""
_SITE: Final = Site(id=SiteId("s"), name="s", kind=SiteKind.ONPREM, engine="simulated")
_RATES: Final = RateCard(id="r", rates=(Rate(resource="cpu", micro_per_hour=1_000, source="benchmark"),))
_MIB: Final = 1 << 20


# -- the fleet and what is asked of it --------------------------------------------------------------------------------


def node(at: int) -> Node:
    """One machine of the fleet."""
    name = f"n{at:06d}"
    return Node(
        id=NodeId(name),
        site_id=_SITE.id,
        name=name,
        state=NodeState.READY,
        version=1,
        boot_id="b",
        address=name,
        cpu_milli=CORES * MILLI,
        memory_bytes=MEMORY,
        disk_bytes=1 << 42,
        rack=f"r{at // 32}",
        block=f"b{at // 512}",
        devices=tuple(
            Device(
                id=DeviceId(f"{name}-{index}"),
                index=index,
                model="H100-SXM",
                reported="H100-SXM",
                memory_bytes=80 << 30,
                idle_mw=1,
                busy_mw=2,
            )
            for index in range(GPUS)
        ),
    )


def requests() -> list[Resources]:
    """What each pod of the trace asks for."""
    with gzip.open(PODS, "rt") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        count, milli = int(row["num_gpu"]), min(int(row["gpu_milli"] or 0), MILLI)
        gpus = GpuRequest(count=count, milli=milli if count == 1 else MILLI) if count else None
        cpu, memory = max(int(row["cpu_milli"]), 1), int(row["memory_mib"]) * _MIB
        found.append(Resources(gpus=gpus, cpu_milli=cpu, memory_bytes=memory))
    return found


def gang(resources: Resources, workers: int = 1) -> Gang:
    """That many workers, all or none."""
    return Gang(choices=(Shape(resources),), workers=workers, smallest=workers)


def policy(fleet: FleetArrays, asked: Sequence[Resources], *, compiled: bool) -> Tide:
    """The default placement policy that knows the mix."""
    score = Tide(compiled=compiled)
    counts = Counter(asked)
    score.learn([(want_of(shape, fitting(fleet, shape)), n) for each, n in counts.items() for shape in [Shape(each)]])
    return score


def fleet_of(count: int) -> FleetArrays:
    """That many free nodes."""
    fleet = FleetArrays()
    fleet.rebuild([node(at) for at in range(count)])
    return fleet


class Cloud:
    """A world with nodes, and turns that are timed."""

    def __init__(self, nodes: int, *, score: Tide | None, queues: Sequence[Queue] = ()) -> None:
        projects = [
            Project(id=each, organization_id=OrganizationId("o"), name=each, created_ns=0) for each in (OWNER, BORROWER)
        ]
        self.world = World(sites=[_SITE], projects=projects, rates=_RATES, policy=POLICY)
        if score is not None:
            self.world.score = score
        self.now = START
        self.count = 0
        joined: list[Fact] = [NodeJoined(at_ns=self.now, node=node(at)) for at in range(nodes)]
        self.turn([*joined, *(QueueSet(at_ns=self.now, queue=queue) for queue in queues)])

    def turn(self, facts: Sequence[Fact]) -> tuple[Plan, float]:
        """One turn that is stored at once, and how long it took, in seconds."""
        self.now += SECOND_NS
        begun = time.perf_counter()
        plan = turn(self.world, facts, now=self.now, policy=POLICY)
        took = time.perf_counter() - begun
        self.world.commit()
        return plan, took

    def submitted(self, resources: Resources, *, workers: int = 1, project: ProjectId = OWNER) -> Submitted:
        """The fact that somebody submits a job."""
        self.count += 1
        workload = Workload(
            id=WorkloadId(f"wl_{self.count:07d}"),
            organization_id=OrganizationId("o"),
            project_id=project,
            principal_id=PrincipalId("u"),
            spec=WorkloadSpec(kind=Kind.TASK, name="w", run="true", resources=resources, nodes=workers),
            submitted_ns=self.now,
        )
        return Submitted(at_ns=self.now, workload=workload)

    def started(self, plan: Plan) -> list[Fact]:
        """The facts that what the plan launches runs."""
        launched = [each.launch_id for each in plan.commands if isinstance(each, Launch)]
        held = [self.world.allocations[launch] for launch in launched]
        return [Started(at_ns=self.now, launch_id=each.id, fence=each.fence) for each in held]


# -- what is measured -------------------------------------------------------------------------------------------------


def warm_up(*, compiled: bool) -> float:
    """Compile what will be compiled, on a small fleet; how long that took, in seconds."""
    begun = time.perf_counter()
    fleet, asked = fleet_of(10), requests()
    score = policy(fleet, asked, compiled=compiled)
    for each in (Resources(gpus=GpuRequest(count=1)), Resources(gpus=GpuRequest(milli=500)), Resources()):
        place_gang(fleet, gang(each), score=score)
        place_gang(fleet, gang(each, 2), score=score)
    return time.perf_counter() - begun


def fill(count: int, *, compiled: bool, most: int | None = None, full: float = FULL) -> dict[str, float]:
    """Place requests one by one until so much of all GPUs is taken."""
    fleet, asked = fleet_of(count), requests()
    score = policy(fleet, asked, compiled=compiled)
    gangs = {each: gang(each) for each in asked}
    draw = random.Random(SEED)
    drawn = [gangs[each] for each in draw.choices(asked, k=most or int(count * GPUS * 3))]
    used, placed, failed, goal = 0, 0, 0, int(full * count * GPUS * MILLI)
    gc.collect()
    begun = time.perf_counter()
    for each in drawn:
        found = place_gang(fleet, each, score=score)
        if found is None:
            failed += 1
            continue
        placed += 1
        request = each.choices[0].resources.gpus
        used += request.total_milli if request is not None else 0
        if used >= goal:
            break
    took = time.perf_counter() - begun
    return {"per_s": placed / took, "placed": placed, "failed": failed, "used": used / (count * GPUS * MILLI)}


def fill_by_turns(count: int, arrivals: int, *, compiled: bool, full: float = FULL) -> dict[str, float]:
    """The same through whole turns with so many arrivals each."""
    asked = requests()
    cloud = Cloud(count, score=policy(fleet_of(10), asked, compiled=compiled))
    draw = random.Random(SEED)
    goal, used, placed = int(full * count * GPUS * MILLI), 0, 0
    times: list[float] = []
    gc.collect()
    gc.freeze()
    while used < goal and len(times) < 10_000:
        facts = [cloud.submitted(each) for each in draw.choices(asked, k=arrivals)]
        plan, took = cloud.turn(facts)
        times.append(took)
        for launch in (each.launch_id for each in plan.commands if isinstance(each, Launch)):
            used += sum(share.milli for share in cloud.world.allocations[launch].devices)
            placed += 1
    gc.unfreeze()
    return spread(times) | {"turns": len(times), "per_s": placed / sum(times), "used": used / (count * GPUS * MILLI)}


def blocked(*, pending: int, shapes: int, nodes: int, compiled: bool) -> dict[str, float]:
    """Turns with one arrival each, when so many jobs wait and nothing is free."""
    sizes = [
        Resources(gpus=GpuRequest(count=1 + at % 8), cpu_milli=1_000 + 100 * (at // 8), memory_bytes=1 << 30)
        for at in range(shapes)
    ]
    cloud = Cloud(nodes, score=Tide(compiled=compiled))
    whole = Resources(gpus=GpuRequest(count=GPUS), cpu_milli=1_000)
    plan, _ = cloud.turn([cloud.submitted(whole) for _ in range(nodes)])
    cloud.turn(cloud.started(plan))
    for at in range(0, pending, 1_000):
        cloud.turn([cloud.submitted(sizes[each % shapes]) for each in range(at, min(at + 1_000, pending))])
    draw = random.Random(SEED)
    gc.collect()
    gc.freeze()
    times = [cloud.turn([cloud.submitted(draw.choice(sizes))])[1] for _ in range(300)]
    gc.unfreeze()
    return spread(times)


GANGS: Final = ((3_000, 3), (9, 1_000), (10, 5_000))


def gangs_placed(count: int, workers: int, nodes: int, *, compiled: bool) -> dict[str, float]:
    """Gangs of so many workers of one GPU (half of one where whole ones do not suffice): workers a second.

    Of whole turns each starts gangs of some 10,000 workers together; how long it takes to take in that all workers of
    the last turn started, and that they ended, is told too, in microseconds a worker.
    """
    resources = _of_gang(count * workers, nodes)
    fleet = fleet_of(nodes)
    score, each = Tide(compiled=compiled), gang(resources, workers)
    begun = time.perf_counter()
    placed = sum(place_gang(fleet, each, score=score) is not None for _ in range(count))
    asked, took = count * workers, time.perf_counter() - begun
    if placed < count:
        raise RuntimeError(f"only {placed} of {count} gangs fit")
    cloud = Cloud(nodes, score=Tide(compiled=compiled))
    size = max(1, min(100, count, 10_000 // workers))
    by_turns, started = 0.0, 0
    for at in range(0, count, size):
        facts = [cloud.submitted(resources, workers=workers) for _ in range(at, min(at + size, count))]
        plan, one = cloud.turn(facts)
        by_turns += one
        launched = sum(isinstance(command, Launch) for command in plan.commands)
        if launched < len(facts) * workers:
            raise RuntimeError(f"a turn started {launched} of {len(facts) * workers} workers")
        started += launched
    facts_of_starts = cloud.started(plan)
    running = cloud.turn(facts_of_starts)[1] / len(facts_of_starts)
    ends: list[Fact] = [
        Exited(at_ns=cloud.now, launch_id=each.launch_id, fence=each.fence, exit_code=0)
        for each in facts_of_starts
        if isinstance(each, Started)
    ]
    ended = cloud.turn(ends)[1] / len(ends)
    speeds = {"per_s": asked / took, "turns_per_s": started / by_turns}
    return speeds | {"started_us": 1e6 * running, "ended_us": 1e6 * ended}


def _of_gang(workers: int, nodes: int) -> Resources:
    is_enough = workers <= nodes * GPUS
    gpus = GpuRequest(count=1) if is_enough else GpuRequest(milli=500)
    return Resources(gpus=gpus, cpu_milli=4_000, memory_bytes=16 << 30)


def reclaim(nodes: int, *, compiled: bool) -> float:
    """Half the cluster is the owner's and lent to a borrower who has filled all: one turn in which the owner comes."""
    half = (("gpu", nodes * GPUS * MILLI // 2),)
    queues = [
        Queue(id=QueueId(f"que_{each}"), name=each, project_id=each, guaranteed=half) for each in (OWNER, BORROWER)
    ]
    cloud = Cloud(nodes, score=Tide(compiled=compiled), queues=queues)
    small = [Resources(gpus=GpuRequest(count=1), cpu_milli=4_000)] * (nodes // 2 * GPUS)
    large = [Resources(gpus=GpuRequest(count=GPUS), cpu_milli=32_000)] * (nodes - nodes // 2)
    plan, _ = cloud.turn([cloud.submitted(each, project=BORROWER) for each in (*small, *large)])
    cloud.turn(cloud.started(plan))
    cloud.now += HOUR_NS + MINUTE_NS
    cloud.turn([])
    whole = Resources(gpus=GpuRequest(count=GPUS), cpu_milli=32_000)
    plan, took = cloud.turn([cloud.submitted(whole, workers=nodes // 2)])
    if not cloud.world.promises:
        raise RuntimeError("nothing was reclaimed")
    return took


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and the longest, in ms."""
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": 1e3 * statistics.median(ordered), "p99_ms": 1e3 * p99, "max_ms": 1e3 * ordered[-1]}


# -- how cost grows ---------------------------------------------------------------------------------------------------


def growth(*, compiled: bool) -> list[tuple[int, float]]:
    """The mean microseconds of a placement by nodes, up to 75 % of the GPUs or so many requests; none is left out.

    The first look of each shape at every node is included: with many nodes and few requests it is most of the cost.
    """
    found = []
    for size in SIZES if compiled else SIZES[:5]:
        result = fill(size, compiled=compiled, most=200_000 if compiled else 10_000, full=0.75)
        found.append((size, 1e6 / result["per_s"]))
    return found


def draw_growth(lines: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """A plot of microseconds over nodes, both logarithmic, as SVG that suits light and dark pages."""
    width, height, left, right, top, bottom = 640, 360, 64, 150, 24, 48
    values = [value for points in lines.values() for _, value in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    first, last = math.log10(SIZES[0]), math.log10(SIZES[-1])

    def x(nodes: float) -> float:
        return left + (math.log10(nodes) - first) / (last - first) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (math.log10(value) - low) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12" fill="#777">',
        "<style>text{font-family:system-ui,sans-serif}</style>",
        "<title>Microseconds per placement, by number of nodes</title>",
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left} {at:.1f}H{width - right}" stroke="#7774"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g} µs</text>')
    below = height - bottom + 18
    parts.extend(f'<text x="{x(size):.1f}" y="{below}" text-anchor="middle">{size:,}</text>' for size in SIZES)
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">nodes of {GPUS} GPUs</text>')
    for colour, (name, points) in zip(("#2a78d6", "#eb6834"), lines.items(), strict=False):
        path_of = "L".join(f"{x(nodes):.1f} {y(value):.1f}" for nodes, value in points)
        parts.append(f'<path d="M{path_of}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour}"/>' for n, v in points)
        end = points[-1]
        parts.append(f'<text x="{x(end[0]) + 10:.1f}" y="{y(end[1]) + 4:.1f}">{name}, {end[1]:.0f} µs</text>')
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n")


# -- the report -------------------------------------------------------------------------------------------------------

PEERS: Final = {
    "placements": (("Godel, many shards", 5_000.0), ("Nomad C1M", 3_750.0), ("kube-scheduler floor", 810.0)),
    "reclaim": (("KAI-Scheduler", 8.97),),
}


def has_numba() -> bool:
    """Whether loops can be compiled here."""
    return importlib.util.find_spec("numba") is not None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="fill,turns,blocked,gangs,reclaim,growth", help="which, by commas")
    parser.add_argument("--plain", action="store_true", help="without compiled loops, even if numba is there")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the nodes of each part")
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.set_threshold(10_000, 500, 100)  # as the control plane does
    compiled = has_numba() and not options.plain
    parts = options.parts.split(",")
    result: dict[str, Any] = {"compiled": compiled, "load": os.getloadavg()[0], **machine()}
    result["warm_up_s"] = round(warm_up(compiled=compiled), 2)
    for name in parts:
        gc.collect()
        _PARTS[name](result, options.scale, compiled)
    print(json.dumps(result))


def _fill(result: dict[str, Any], scale: float, compiled: bool) -> None:
    got = fill(int(NODES * scale), compiled=compiled)
    result["placements_per_s"] = round(got["per_s"])
    rows = [("placements/s", f"{got['per_s']:,.0f}", "")]
    rows += [(name, f"{value:,.0f}", f"{got['per_s'] / value:.1f}x") for name, value in PEERS["placements"]]
    print(f"\nfill to {100 * got['used']:.1f} % of GPUs: {got['placed']:,.0f} placed, {got['failed']:,.0f} did not fit")
    table(("", "", "ratio"), rows)


def _turns(result: dict[str, Any], scale: float, compiled: bool) -> None:
    got = fill_by_turns(int(NODES * scale), 100, compiled=compiled)
    result["turn_p50_ms"], result["turn_p99_ms"] = round(got["p50_ms"], 2), round(got["p99_ms"], 2)
    result["turn_jobs_per_s"] = round(got["per_s"])
    print(f"\nfill to {100 * got['used']:.1f} % of GPUs by {got['turns']:,.0f} turns with 100 arrivals")
    _print_turns(got)


def _blocked(result: dict[str, Any], scale: float, compiled: bool) -> None:
    got = blocked(pending=int(50_000 * scale), shapes=200, nodes=max(int(1_000 * scale), 10), compiled=compiled)
    result["blocked_turn_ms"], result["blocked_turn_p99_ms"] = round(got["p50_ms"], 2), round(got["p99_ms"], 2)
    print(f"\n{50_000 * scale:,.0f} jobs of 200 shapes wait, nothing is free: a turn with one arrival")
    _print_turns(got)


def _gangs(result: dict[str, Any], scale: float, compiled: bool) -> None:
    rows, slowest = [], float("inf")
    for count, workers in GANGS:
        got = gangs_placed(max(int(count * scale), 1), workers, int(5_000 * max(scale, 0.2)), compiled=compiled)
        name = f"{count:,} x {workers:,}"
        speeds = (got["per_s"], got["turns_per_s"], got["started_us"], got["ended_us"])
        rows.append((name, *(f"{value:,.0f}" for value in speeds)))
        slowest = min(slowest, got["per_s"])
        result[f"gang_{count}x{workers}_turn_workers_per_s"] = round(got["turns_per_s"])
        result[f"gang_{count}x{workers}_workers_per_s"] = round(got["per_s"])
    result["gang_workers_per_s"] = round(slowest)
    print("\ngangs on 5,000 nodes: workers a second")
    table(("gangs x workers", "places", "whole turns", "µs to take in a start", "and an end"), rows)


def _reclaim(result: dict[str, Any], scale: float, compiled: bool) -> None:
    took = reclaim(int(500 * max(scale, 0.1)), compiled=compiled)
    result["reclaim_s"] = round(took, 3)
    name, theirs = PEERS["reclaim"][0]
    print("\nreclaim of half of 500 nodes, one whole turn, s")
    table(("", "", "ratio"), [("this", f"{took:.3f}", ""), (name, f"{theirs:.2f}", f"{theirs / took:.0f}x")])


def _growth(result: dict[str, Any], _scale: float, compiled: bool) -> None:
    lines = {("compiled" if compiled else "NumPy"): growth(compiled=compiled)}
    if compiled:
        lines["NumPy"] = growth(compiled=False)
    result["placement_us_by_nodes"] = {
        name: {str(nodes): round(value, 1) for nodes, value in points} for name, points in lines.items()
    }
    draw_growth(lines, PLOT)
    print(f"\nmicroseconds per placement by nodes, drawn in {PLOT.name}")
    table(
        ("nodes", *lines),
        [
            (f"{size:,}", *(f"{points[at][1]:.1f}" if at < len(points) else "" for points in lines.values()))
            for at, size in enumerate(SIZES)
        ],
    )


def _print_turns(got: dict[str, float]) -> None:
    rows = [("median", f"{got['p50_ms']:.2f}"), ("99 %", f"{got['p99_ms']:.2f}"), ("longest", f"{got['max_ms']:.2f}")]
    table(("turn", "ms"), rows)


_PARTS: Final[dict[str, Callable[[dict[str, Any], float, bool], None]]] = {
    "fill": _fill,
    "turns": _turns,
    "blocked": _blocked,
    "gangs": _gangs,
    "reclaim": _reclaim,
    "growth": _growth,
}

if __name__ == "__main__":
    main()
