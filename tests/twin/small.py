"""Small fleets and streams for the twin's tests, and an auditor that keeps its own accounts of a run from its turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tidemill.model.events import Exited, Fact, NodeWentAway, Started, StopRequested, Submitted
from tidemill.model.ids import JobId, NodeId, WorkloadId, job_id
from tidemill.model.job import Allocation, AllocationState
from tidemill.model.ledger import Rate, RateCard
from tidemill.model.plan import Plan
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, RetryPolicy, WorkloadSpec
from tidemill.twin.arrivals import Arrival, Outside
from tidemill.twin.cloud import Conditions
from tidemill.twin.fleet import parse_fleet
from tidemill.twin.run import Result, run
from tidemill.units import MILLI, SECOND_NS

RATES = RateCard(
    id="r",
    rates=(
        Rate(resource="cpu", micro_per_hour=36_000, source="test"),
        Rate(resource="H100-SXM", micro_per_hour=3_600_000, source="test"),
    ),
)


def conditions(nodes: str = "1xH100:2", **more: Any) -> Conditions:
    return Conditions(nodes=parse_fleet(nodes), rates=RATES, **more)


def spec(gpus: float = 1, nodes: int = 1, **more: Any) -> WorkloadSpec:
    request = None
    if gpus:
        request = GpuRequest(count=int(gpus)) if gpus >= 1 else GpuRequest(milli=round(gpus * MILLI))
    return WorkloadSpec(
        kind=Kind.TASK, name="w", run="w", nodes=nodes, resources=Resources(gpus=request), **{"retry": RetryPolicy(max=99), **more}
    )  # fmt: skip


def job(at_s: float, seconds: float, gpus: float = 1, *, tenant: str = "t", nodes: int = 1, name: str = "", **more: Any) -> Arrival:  # fmt: skip
    keeps = {key: more.pop(key) for key in ("checkpoint_ns", "saves_on_stop") if key in more}
    return Arrival(
        round(at_s * SECOND_NS), tenant, "u", spec(gpus, nodes, **more), round(seconds * SECOND_NS), name=name, **keeps
    )  # fmt: skip


def stop(at_s: float, name: str) -> Outside:
    return Outside(round(at_s * SECOND_NS), StopRequested(at_ns=0, job_id=job_id(WorkloadId(name), 0), by="u"))


def away(at_s: float, node: str) -> Outside:
    return Outside(round(at_s * SECOND_NS), NodeWentAway(at_ns=0, node_id=NodeId(node), detail="gone"))


OPS = st.lists(
    st.tuples(st.integers(0, 3_000), st.integers(1, 2_000), st.sampled_from([0, 0.5, 1, 1, 2, 4]), st.integers(1, 3), st.integers(0, 9)),
    min_size=1,
    max_size=25,
)  # fmt: skip


def stream_of(ops: Iterable[tuple[int, int, float, int, int]]) -> list[Arrival | Outside]:
    """Jobs, some of which are stopped, and now and then a machine that is lost."""
    items: list[Arrival | Outside] = []
    lost: set[str] = set()
    for number, (at, seconds, gpus, nodes, luck) in enumerate(ops):
        name = f"wl_{number:04d}"
        items.append(job(at, seconds, gpus, tenant=f"t{luck % 3}", nodes=nodes, name=name, saves_on_stop=luck % 2 == 0))
        if luck == 9:
            items.append(stop(at + seconds / 2, name))
        if luck == 8 and not lost:
            lost.add("n00001")
            items.append(away(at + seconds / 3, "n00001"))
    return sorted(items, key=lambda item: item.at_ns)


@dataclass
class Auditor:
    """Keeps accounts of its own: what is held on each device, how long each attempt ran, what was billed."""

    capacity: dict[str, int]
    held: Counter[str] = field(default_factory=Counter)
    gpu_ns: int = 0
    holding: int = 0
    now: int = 0
    billed: int = 0
    ran_ns: Counter[JobId] = field(default_factory=Counter)
    started: dict[str, int] = field(default_factory=dict)
    exited: Counter[str] = field(default_factory=Counter)
    submitted: set[JobId] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def watch(self, inbox: list[Fact], now: int, plan: Plan) -> None:
        if now < self.now:
            self.wrong.append("time went back")
        self.gpu_ns += self.holding * (now - self.now)
        self.now = now
        for fact in inbox:
            if isinstance(fact, Submitted):
                self.submitted |= {job_id(fact.workload.id, i) for i in range(fact.workload.spec.job_count)}
            elif isinstance(fact, NodeWentAway):
                self.seen.add("node_lost")
            elif isinstance(fact, Started):
                self.started[fact.launch_id] = fact.at_ns
            elif isinstance(fact, Exited):
                self.exited[fact.launch_id] += 1
                if self.exited[fact.launch_id] > 1:
                    self.wrong.append(f"{fact.launch_id} exited twice")
        for change in plan.changes:
            after = change.after
            if isinstance(after, Allocation) and (change.assumed is None) != (after.state is AllocationState.RELEASED):
                if change.assumed is not None and after.state is not AllocationState.RELEASED:
                    continue
                sign = 1 if change.assumed is None else -1
                for share in after.devices:
                    self.held[share.device_id] += sign * share.milli
                    self.holding += sign * share.milli
                    if not 0 <= self.held[share.device_id] <= self.capacity.get(share.device_id, 0):
                        self.wrong.append(f"{share.device_id} is held {self.held[share.device_id]}")
            elif isinstance(after, Allocation) and after.state is AllocationState.RELEASED:
                self.wrong.append("placed and released in one turn")
        self.billed += sum(line.amount_micro for line in plan.ledger)


def audited(items: list[Arrival | Outside], setting: Conditions) -> tuple[Result, Auditor]:
    """A run and what its auditor noted; the auditor starts its clock with the run."""
    capacity = {device.id: MILLI for node in setting.nodes for device in node.devices}
    auditor = Auditor(capacity, now=setting.start_ns)  # type: ignore[arg-type]
    result = run(iter(items), setting, watch=auditor.watch)
    return result, auditor
