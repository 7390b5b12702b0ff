"""Reservations that overlap, nodes that are chosen for them, and trees that are refused with their field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.control.steering import Wanted, choose_nodes, overlaps
from tidemill.core.world import World
from tidemill.errors import InvalidRequest
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import (
    AttemptId,
    DeviceId,
    JobId,
    LaunchId,
    NodeId,
    OrganizationId,
    PrincipalId,
    ProjectId,
    ReservationId,
    SiteId,
    WorkloadId,
)
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Job, JobState, Workload
from tidemill.model.ledger import RateCard
from tidemill.model.reservation import Reservation
from tidemill.model.resources import parse_gpus
from tidemill.model.spec import Kind, WorkloadSpec
from tidemill.model.values import replace

FAR = 400


def windows(reservation: Reservation, horizon: int) -> list[tuple[int, int]]:
    """Its windows that begin before the horizon, by the model's own ``window``."""
    found: list[tuple[int, int]] = []
    at = 0
    while (window := reservation.window(after=at)) is not None and window[0] < horizon:
        found.append(window)
        at = window[1]
    return found


def tried(one: Reservation, other: Reservation) -> bool:
    """Whether they overlap, by trying all windows up to where both have come round together."""
    horizon = 2 * FAR + (one.every_ns or 1) * (other.every_ns or 1)
    return any(a[0] < b[1] and b[0] < a[1] for a in windows(one, horizon) for b in windows(other, horizon))


@st.composite
def reservations(draw: st.DrawFn) -> Reservation:
    start, length = draw(st.integers(0, 60)), draw(st.integers(1, 8))
    every = draw(st.just(0) | st.integers(length, 24))
    return Reservation(
        id=ReservationId("r"),
        name="r",
        node_ids=(NodeId("n"),),
        starts_ns=start,
        ends_ns=start + length,
        every_ns=every,
        until_ns=draw(st.just(0) | st.integers(1, FAR)) if every else 0,
        cancelled_ns=draw(st.sampled_from([0, 0, 0, 1])),
    )


@settings(max_examples=600, deadline=None)
@given(one=reservations(), other=reservations())
def test_they_overlap_exactly_when_some_windows_do(one: Reservation, other: Reservation) -> None:
    assert overlaps(one, other) == tried(one, other)
    assert overlaps(other, one) == overlaps(one, other)


def only_the_first_windows(one: Reservation, other: Reservation) -> bool:
    return one.starts_ns < other.ends_ns and other.starts_ns < one.ends_ns


def as_if_for_ever(one: Reservation, other: Reservation) -> bool:
    return overlaps(replace(one, until_ns=0), replace(other, until_ns=0))


def touching_too(one: Reservation, other: Reservation) -> bool:
    return overlaps(replace(one, ends_ns=one.ends_ns + (not one.every_ns)), other)


@pytest.mark.parametrize("planted", [only_the_first_windows, as_if_for_ever, touching_too])
def test_planted_bugs_are_caught(planted: Callable[[Reservation, Reservation], bool]) -> None:
    @settings(max_examples=1_000, deadline=None, database=None, derandomize=True)
    @given(one=reservations(), other=reservations())
    def check(one: Reservation, other: Reservation) -> None:
        assert planted(one, other) == tried(one, other)

    with pytest.raises(AssertionError):
        check()


def a_node(name: str, *, model: str = "H100-SXM", gpus: int = 8, **changes: object) -> Node:
    devices = tuple(
        Device(
            id=DeviceId(f"{name}-{at}"),
            index=at,
            model=model,
            reported=model,
            memory_bytes=80 << 30,
            idle_mw=1,
            busy_mw=2,
        )
        for at in range(gpus)
    )
    made = Node(
        id=NodeId(f"node_{name}"), site_id=SiteId("s"), name=name, state=NodeState.READY, version=1, boot_id="b", address="",
        cpu_milli=64_000, memory_bytes=1 << 40, disk_bytes=1 << 40, devices=devices,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def a_world(*nodes: Node) -> World:
    world = World(sites=[], projects=[], rates=RateCard(id="r", rates=()))
    world.nodes = {node.id: node for node in nodes}
    return world


def busy(world: World, node: str, *, max_duration_ns: int, started_ns: int = 1) -> None:
    """Something runs on a node."""
    workload_id, job, launch = WorkloadId(f"wl_{node}"), JobId(f"job_{node}-0"), LaunchId(f"run_{node}-0-1-0")
    spec = WorkloadSpec(kind=Kind.TASK, name="x", run="x", max_duration_ns=max_duration_ns)
    world.workloads[workload_id] = Workload(
        id=workload_id, organization_id=OrganizationId("o"), project_id=ProjectId("p"), principal_id=PrincipalId("u"), spec=spec,
        submitted_ns=1,
    )  # fmt: skip
    world.jobs[job] = Job(
        id=job, workload_id=workload_id, project_id=ProjectId("p"), index=0, state=JobState.RUNNING, version=1, priority=0,
        submitted_ns=1,
    )  # fmt: skip
    attempt = AttemptId(f"att_{node}-0-1")
    world.attempts[job] = Attempt(
        id=attempt, job_id=job, number=1, state=AttemptState.RUNNING, version=1, placed_ns=1, workers=1, rendezvous_port=1,
        started_ns=started_ns,
    )  # fmt: skip
    world.allocations[launch] = Allocation(
        id=launch, attempt_id=attempt, job_id=job, project_id=ProjectId("p"), rank=0, node_id=NodeId(f"node_{node}"),
        state=AllocationState.ACTIVE, version=1, fence=1, cpu_milli=1_000, memory_bytes=0, held_ns=1,
    )  # fmt: skip


def a_plan(start: int, end: int, *nodes: str, every: int = 0, name: str = "plan") -> Reservation:
    return Reservation(
        id=ReservationId(f"rsv_{name}"), name=name, node_ids=tuple(NodeId(f"node_{node}") for node in nodes or ("*",)),
        starts_ns=start, ends_ns=end, every_ns=every,
    )  # fmt: skip


def chosen(world: World, plan: Reservation, **wanted: object) -> list[str]:
    found = choose_nodes(world, plan, Wanted(**wanted), visible=set(world.reservations), now=10)  # type: ignore[arg-type]
    return [world.nodes[node].name for node in found]


def test_nodes_whose_work_is_over_by_then_are_chosen_first() -> None:
    world = a_world(a_node("a"), a_node("b"), a_node("c"), a_node("d", state=NodeState.CORDONED))
    busy(world, "a", max_duration_ns=0)
    busy(world, "b", max_duration_ns=500)
    assert chosen(world, a_plan(1_000, 2_000), count=1) == ["b"]
    assert chosen(world, a_plan(1_000, 2_000), count=3) == ["b", "c", "d"]
    assert chosen(world, a_plan(400, 2_000), count=2) == ["c", "d"]
    assert chosen(world, a_plan(1_000, 2_000), count=4) == ["a", "b", "c", "d"]


def test_the_order_of_nodes_does_not_matter() -> None:
    nodes = [a_node(name) for name in "edcba"]
    assert {tuple(chosen(a_world(*order), a_plan(20, 30), count=3)) for order in (nodes, nodes[::-1])} == {
        ("a", "b", "c")
    }


def test_a_node_that_does_not_fit_is_not_chosen() -> None:
    failing = replace(a_node("a"), failing=((DeviceId("a-0"), "XID 79"),))
    world = a_world(
        failing,
        a_node("b", model="A100"),
        a_node("c", gpus=4),
        a_node("d", labels=(("zone", "x"),)),
        a_node("e", state=NodeState.LOST),
        a_node("f"),
    )
    assert chosen(world, a_plan(20, 30), count=2, gpus=parse_gpus("H100:8")) == ["d", "f"]
    assert chosen(world, a_plan(20, 30), count=1, labels=(("zone", "x"),)) == ["d"]
    with pytest.raises(InvalidRequest, match="2 of the 6"):
        chosen(world, a_plan(20, 30), count=3, gpus=parse_gpus("H100:8"))


def test_a_node_that_is_reserved_at_some_time_to_come_is_not_chosen() -> None:
    world = a_world(a_node("a"), a_node("b"))
    weekly = a_plan(1_000, 1_010, "a", every=100, name="weekly")
    world.reservations[weekly.id] = weekly
    assert chosen(world, a_plan(1_050, 1_060), count=2) == ["a", "b"]
    assert chosen(world, a_plan(1_050, 1_060, every=70), count=1) == ["b"]
    with pytest.raises(InvalidRequest, match="weekly") as refused:
        chosen(world, a_plan(1_050, 1_060, every=70), names=("a",))
    assert refused.value.field == "node"
    with pytest.raises(InvalidRequest) as hidden:
        choose_nodes(world, a_plan(1_005, 1_006), Wanted(count=2), visible=(), now=10)
    assert "weekly" not in hidden.value.detail


@settings(max_examples=200, deadline=None)
@given(plans=st.lists(st.tuples(reservations(), st.integers(1, 3)), max_size=8))
def test_no_two_reservations_ever_have_a_node_at_the_same_time(plans: list[tuple[Reservation, int]]) -> None:
    assert not doubly_reserved(plans, choose_nodes)


def doubly_reserved(plans: list[tuple[Reservation, int]], choose: Callable[..., tuple[NodeId, ...]]) -> bool:
    """Whether reservations that were made one after the other give a node away twice."""
    world = a_world(*(a_node(name, gpus=0) for name in "abc"))
    for number, (plan, count) in enumerate(plans):
        made = replace(plan, id=ReservationId(f"r{number}"), cancelled_ns=0)
        try:
            nodes = choose(world, made, Wanted(count=count), visible=(), now=0)
        except InvalidRequest:
            continue
        world.reservations[made.id] = replace(made, node_ids=nodes)
    kept = list(world.reservations.values())
    return any(
        set(one.node_ids) & set(other.node_ids) and tried(one, other)
        for at, one in enumerate(kept)
        for other in kept[:at]
    )


def test_the_planted_bug_of_looking_at_first_windows_only_is_caught() -> None:
    def careless(world: World, plan: Reservation, wanted: Wanted, **named: Any) -> tuple[NodeId, ...]:
        free = [
            node for node in world.nodes
            if not any(node in other.node_ids and only_the_first_windows(plan, other) for other in world.reservations.values())
        ]  # fmt: skip
        if len(free) < wanted.count:
            raise InvalidRequest("too few")
        return tuple(free[: wanted.count])

    often = replace(a_plan(0, 2, every=5), id=ReservationId("x"))
    assert doubly_reserved([(often, 3), (replace(often, starts_ns=6, ends_ns=7, every_ns=0), 3)], careless)
