"""Narratives of scheduling: what a tenant would see, played on a yard of simulated machines."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.yard import CALM, START, Yard, gpu_node, queue_of, spec
from tidemill.control.answers import Why, explain
from tidemill.control.steering import why_group_never
from tidemill.model.events import (
    Checkpointed,
    DeviceFailed,
    DeviceRecovered,
    Marking,
    NodeJoined,
    NodeMarked,
    NodeWentAway,
    ReservationMade,
    StopRequested,
)
from tidemill.model.fleet import Level, NodeState
from tidemill.model.ids import (
    DeviceId,
    JobId,
    LaunchId,
    NodeId,
    OrganizationId,
    PrincipalId,
    ProjectId,
    QueueId,
    ReservationId,
    WorkloadId,
)
from tidemill.model.job import Cause, JobState, Workload
from tidemill.model.queue import Queue
from tidemill.model.reservation import Reservation
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Dependency, DependsOn, Group, Kind, Placement, RetryOn, RetryPolicy, Tier
from tidemill.model.values import replace
from tidemill.units import HOUR_NS, SECOND_NS


def seconds(at: int) -> float:
    return (at - START) / SECOND_NS


# -- backfill ---------------------------------------------------------------------------------------------------------


def test_a_blocked_gang_is_not_passed_by_work_that_would_delay_it() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    first = yard.submit(spec(8, max_duration_ns=100 * SECOND_NS), runs_s=100)
    gang = yard.submit(spec(8, nodes=2, max_duration_ns=50 * SECOND_NS), runs_s=50)
    long = yard.submit(spec(1, max_duration_ns=200 * SECOND_NS), runs_s=200)
    short = yard.submit(spec(1, max_duration_ns=90 * SECOND_NS), runs_s=90)
    assert yard.state(short) is JobState.STARTING, "it is over before the gang can start, so it may pass"
    assert yard.state(long) is JobState.QUEUED
    assert yard.world.reasons[yard.job(long).id].code == "WouldDelayFirst"
    yard.run()
    assert seconds(yard.started[gang][0]) == 100
    assert yard.started[first][0] == START
    assert seconds(yard.started[long][0]) == 150


def test_without_backfill_policy_the_gang_starves_behind_small_work() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), policy=replace(CALM, backfill=False))
    yard.submit(spec(8, max_duration_ns=100 * SECOND_NS), runs_s=100)
    gang = yard.submit(spec(8, nodes=2), runs_s=50)
    for at in range(1, 40):
        yard.submit(spec(8, max_duration_ns=60 * SECOND_NS), runs_s=60, at_s=at * 30)
    yard.run(1000)
    assert gang not in yard.started, "nothing keeps room for it: this is what the plan is for"


def test_work_that_does_not_say_how_long_it_takes_never_passes_on_the_plans_places() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    yard.submit(spec(8, max_duration_ns=100 * SECOND_NS), runs_s=100)
    yard.submit(spec(8, nodes=2), runs_s=50)
    unbounded = yard.submit(spec(1), runs_s=1)
    assert yard.state(unbounded) is JobState.QUEUED


# -- quota and displacing ---------------------------------------------------------------------------------------------


def test_idle_guarantees_are_lent_and_reclaimed_with_the_least_lost_work() -> None:
    queues = (queue_of("p0", guaranteed=(("gpu", 8000),)), queue_of("p1", guaranteed=(("gpu", 8000),)))
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), queues=queues)
    old = yard.submit(spec(8), runs_s=1000, project="p1")
    yard.run(50)
    young = yard.submit(spec(8), runs_s=1000, project="p1")
    yard.run(10)
    assert yard.state(young) is JobState.RUNNING, "p1 borrows what p0 leaves idle"
    owner = yard.submit(spec(8), runs_s=10, project="p0")
    yard.run(1)
    assert yard.state(owner) is JobState.RUNNING
    assert yard.state(young) is JobState.QUEUED, "the one with less work to lose went"
    assert yard.state(old) is JobState.RUNNING
    assert [job for _, job, _ in yard.events("Preempted")] == [young]
    yard.run()
    assert yard.state(young) is JobState.SUCCEEDED
    assert len(yard.started[young]) == 2


def test_a_checkpoint_makes_a_long_run_the_cheaper_victim() -> None:
    queues = (queue_of("p0", guaranteed=(("gpu", 8000),)), queue_of("p1"))
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), queues=queues)
    old = yard.submit(spec(8), runs_s=1000, project="p1")
    yard.run(500)
    young = yard.submit(spec(8), runs_s=1000, project="p1")
    yard.run(300)
    launch = LaunchId(f"run_{old.partition('_')[2]}-1-0")
    yard.turn([Checkpointed(at_ns=yard.now, launch_id=launch, fence=1)])
    yard.run(1)
    yard.submit(spec(8), runs_s=10, project="p0")
    assert [job for _, job, _ in yard.events("Preempted")] == [old], "it saved its work a second ago"
    assert yard.state(young) is JobState.RUNNING


def test_nobody_is_displaced_for_a_gang_that_would_not_fit_anyway() -> None:
    queues = (
        queue_of("p0", guaranteed=(("gpu", 16_000),)),
        queue_of("p1"),
        queue_of("p2", guaranteed=(("gpu", 8000),)),
    )
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b"), gpu_node("c")), queues=queues)
    yard.submit(spec(8), runs_s=1000, project="p1")
    yard.submit(spec(8), runs_s=1000, project="p2")
    yard.submit(spec(8), runs_s=1000, project="p0")
    yard.run(10)
    wide = yard.submit(spec(8, nodes=2), runs_s=10, project="p0")
    assert yard.state(wide) is JobState.QUEUED
    assert yard.events("Preempted") == [], "with p2 in its right only one node could be freed"


def test_spot_gives_way_to_on_demand_after_its_grace_and_comes_back() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    yard.grace_taken_ns = 20 * SECOND_NS
    spot = yard.submit(spec(8, tier=Tier.SPOT, checkpoint_grace_ns=30 * SECOND_NS), runs_s=100)
    yard.run(10)
    asked = yard.submit(spec(4), runs_s=50)
    assert yard.world.reasons[yard.job(asked).id].code == "WaitsForDisplaced"
    sneaky = yard.submit(spec(4, priority=100), runs_s=50)
    yard.run(10)
    assert asked not in yard.started, "the spot worker still has its grace"
    yard.run(11)
    assert seconds(yard.started[asked][0]) == 30, "its places were kept for it"
    assert seconds(yard.started[sneaky][0]) >= 30
    yard.run()
    assert yard.state(spot) is JobState.SUCCEEDED
    assert yard.job(spot).retries == 0
    assert yard.job(spot).evictions == 1


def test_minimum_run_time_protects_from_being_displaced_and_then_does_not() -> None:
    yard = Yard(nodes=(gpu_node("a"),), policy=replace(CALM, min_run_ns=60 * SECOND_NS))
    spot = yard.submit(spec(8, tier=Tier.SPOT), runs_s=1000)
    yard.run(10)
    asked = yard.submit(spec(8), runs_s=10)
    assert yard.state(spot) is JobState.RUNNING
    yard.run(60)
    assert seconds(yard.started[asked][0]) == 60


def test_priority_displaces_in_its_own_project_only() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    low = yard.submit(spec(8), runs_s=1000)
    yard.run(1)
    other = yard.submit(spec(8, priority=500), runs_s=10, project="p1")
    yard.run(1)
    assert yard.state(low) is JobState.RUNNING
    assert yard.state(other) is JobState.QUEUED
    own = Yard(nodes=(gpu_node("a"),))
    low = own.submit(spec(8), runs_s=1000)
    own.run(1)
    high = own.submit(spec(8, priority=500), runs_s=10)
    own.run(1)
    assert own.state(high) is JobState.RUNNING
    assert own.state(low) is JobState.QUEUED


def test_limits_hold_and_say_so() -> None:
    yard = Yard(nodes=(gpu_node("a"),), queues=(queue_of("p0", limit=(("gpu", 2000),), max_running=2),))
    jobs = [yard.submit(spec(1), runs_s=10) for _ in range(4)]
    assert [yard.state(job) for job in jobs] == [JobState.STARTING] * 2 + [JobState.QUEUED] * 2
    yard.run()
    assert all(yard.state(job) is JobState.SUCCEEDED for job in jobs)


# -- elastic gangs ----------------------------------------------------------------------------------------------------


def test_an_elastic_gang_starts_small_grows_and_shrinks_before_it_is_displaced() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b"), gpu_node("c")))
    blocker = yard.submit(spec(8), runs_s=100, project="p1")
    elastic = yard.submit(spec(8, nodes=3, nodes_min=1, tier=Tier.SPOT), runs_s=1000)
    assert len(yard.nodes_of(elastic)) == 2
    yard.run(101)
    assert yard.state(blocker) is JobState.SUCCEEDED
    assert len(yard.nodes_of(elastic)) == 3, "it grew into what the other left"
    yard.run(10)
    asked = yard.submit(spec(8), runs_s=50, project="p1")
    yard.run(1)
    assert yard.state(asked) is JobState.RUNNING
    assert len(yard.nodes_of(elastic)) == 2
    assert yard.state(elastic) is JobState.RUNNING
    assert yard.events("Preempted") == []
    yard.run()
    assert yard.state(elastic) is JobState.SUCCEEDED
    assert len(yard.started[elastic]) == 1


# -- what jobs wait for beside room -----------------------------------------------------------------------------------


def test_room_that_comes_while_an_elastic_gang_starts_is_offered_when_it_runs() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    yard.submit(spec(8), runs_s=5, project="p1")
    yard.starting_ns = 20 * SECOND_NS
    elastic = yard.submit(spec(8, nodes=2, nodes_min=1), runs_s=1000)
    yard.run(60)
    assert len(yard.nodes_of(elastic)) == 2


@pytest.mark.parametrize("level", ["within", "spread", ""])
def test_an_elastic_gang_grows_only_where_its_placement_allows(level: str) -> None:
    nodes = tuple(gpu_node(f"{rack}{at}", rack=rack) for rack in "ab" for at in range(3))
    yard = Yard(nodes=nodes)
    fillers = [yard.submit(spec(8), runs_s=5 if at else 400) for at in range(5)]
    placement = {"within": Placement(within=Level.RACK), "spread": Placement(spread=Level.RACK)}.get(level, Placement())
    elastic = yard.submit(spec(8, nodes=4, nodes_min=1, placement=placement), runs_s=1000)
    assert len(yard.nodes_of(elastic)) == 1
    yard.run(100)
    held = sorted(yard.nodes_of(elastic))
    racks = {node[0] for node in held}
    busy = {node for job in fillers for node in yard.nodes_of(job)}
    if level == "within":
        assert (len(racks), len(held)) == (1, 3 - sum(node[0] in racks for node in busy))
    elif level == "spread":
        assert (len(racks), len(held)) == (2, 2)
    else:
        assert len(held) == 4


def test_dependencies_start_what_follows_and_end_what_cannot() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    first = yard.submit(spec(1), runs_s=10)
    after = (Dependency(workload_id=WorkloadId("wl_00001")),)
    on_failure = (Dependency(workload_id=WorkloadId("wl_00001"), on=DependsOn.FAILED),)
    follows = yard.submit(spec(1, after=after), runs_s=10)
    rescue = yard.submit(spec(1, after=on_failure), runs_s=10)
    assert yard.world.reasons[yard.job(follows).id].code == "WaitsForWorkload"
    yard.run()
    assert yard.state(first) is JobState.SUCCEEDED
    assert seconds(yard.started[follows][0]) == 10
    assert yard.state(rescue) is JobState.CANCELLED
    assert yard.job(rescue).cause is Cause.DEPENDENCY


def test_an_array_runs_so_many_at_a_time() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    yard.submit(spec(1, kind=Kind.ARRAY, array_size=6, array_parallel=2), runs_s=10)
    most = 0
    for _ in range(12):
        most = max(most, len(yard.live()))
        yard.run(5)
    assert most == 2
    assert all(yard.state(f"job_00001-{at}") is JobState.SUCCEEDED for at in range(6))


def test_a_group_starts_together_or_not_at_all() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    blocker = yard.submit(spec(8), runs_s=100)
    group = Group(name="g", size=2)
    one = yard.submit(spec(8, group=group), runs_s=10)
    assert yard.world.reasons[yard.job(one).id].code == "GroupIncomplete"
    two = yard.submit(spec(4, group=group), runs_s=10)
    yard.run(50)
    assert one not in yard.started
    assert two not in yard.started
    yard.run()
    assert yard.started[one] == yard.started[two]
    assert yard.started[one][0] >= yard.ended[blocker]


def test_start_times_are_kept() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    yard.submit(spec(8), runs_s=100)
    late = yard.submit(spec(8, start_before_ns=START + 50 * SECOND_NS), runs_s=10)
    later = yard.submit(spec(8, start_after_ns=START + 300 * SECOND_NS), runs_s=10)
    yard.run()
    assert yard.job(late).cause is Cause.TOO_LATE
    assert seconds(yard.started[later][0]) == 300


# -- reservations -----------------------------------------------------------------------------------------------------


def reserve(yard: Yard, node: str, start_s: float, end_s: float, project: str = "", **more: int) -> None:
    yard.turn(
        [
            ReservationMade(
                at_ns=yard.now,
                reservation=Reservation(
                    id=ReservationId(f"res_{node}"),
                    name=f"r-{node}",
                    project_id=ProjectId(project),
                    node_ids=(NodeId(node),),
                    starts_ns=START + int(start_s * SECOND_NS),
                    ends_ns=START + int(end_s * SECOND_NS),
                    **more,
                ),
            )
        ]
    )


def test_nothing_that_would_overrun_is_placed_before_a_window_and_its_owner_finds_it_free() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    reserve(yard, "a", 100, 200, "p1")
    fits = yard.submit(spec(8, max_duration_ns=90 * SECOND_NS), runs_s=90)
    overruns = yard.submit(spec(8, max_duration_ns=110 * SECOND_NS), runs_s=110)
    owner = yard.submit(
        spec(8, tier=Tier.RESERVED, reservation="r-a", max_duration_ns=80 * SECOND_NS), runs_s=80, project="p1"
    )
    assert yard.world.reasons[yard.job(owner).id].code == "ReservationNotOpen"
    yard.run()
    assert seconds(yard.started[fits][0]) == 0
    assert seconds(yard.started[owner][0]) == 100
    assert seconds(yard.started[overruns][0]) == 200


def test_work_that_a_reservation_holds_up_says_so() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    reserve(yard, "a", 100, 200)
    overruns = yard.submit(spec(8, max_duration_ns=110 * SECOND_NS), runs_s=110)
    assert yard.world.reasons[yard.job(overruns).id].code == "BeforeReservation"


def test_a_plan_does_not_keep_what_is_reserved_from_its_owner() -> None:
    """The first blocked job has its plan there, after the window, and the owner does not say how long it takes."""
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    reserve(yard, "a", 100, 200, "p1")
    yard.submit(spec(8), runs_s=500, project="p1")
    blocked = yard.submit(spec(8), runs_s=50, at_s=75, project="p2")
    owner = yard.submit(spec(8, tier=Tier.RESERVED, reservation="r-a"), runs_s=150, project="p1")
    yard.run(400)
    assert seconds(yard.started[owner][0]) == 100
    assert seconds(yard.started[blocked][0]) == 250


def test_a_gang_on_a_reserved_node_is_sent_away_once() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    gang = yard.submit(spec(4, nodes=2, tier=Tier.SPOT), runs_s=500)
    reserve(yard, yard.nodes_of(gang)[0], 100, 200)
    yard.run(150)
    assert [job for _, job, _ in yard.events("Preempted")] == [gang]


def test_a_recurring_maintenance_window_clears_its_node_each_time() -> None:
    yard = Yard(nodes=(gpu_node("a"),), policy=replace(CALM, assumed_duration_ns=10 * SECOND_NS))
    reserve(yard, "a", 100, 150, every_ns=1000 * SECOND_NS)
    spot = yard.submit(spec(8, tier=Tier.SPOT), runs_s=1500)
    yard.run(120)
    assert yard.state(spot) is JobState.QUEUED
    yard.run(100)
    assert yard.state(spot) is JobState.RUNNING
    yard.run(900)
    assert yard.state(spot) is JobState.QUEUED, "the window came again"


# -- health -----------------------------------------------------------------------------------------------------------


def test_cordon_lets_work_end_drain_displaces_it_and_resume_opens() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    one = yard.submit(spec(8, nodes=2), runs_s=100)
    yard.run(1)
    yard.turn([NodeMarked(at_ns=yard.now, node_id=NodeId("a"), marking=Marking.CORDON, by="ada")])
    waits = yard.submit(spec(8), runs_s=10)
    yard.run(1)
    assert yard.state(one) is JobState.RUNNING
    yard.turn([NodeMarked(at_ns=yard.now, node_id=NodeId("b"), marking=Marking.DRAIN, by="ada", detail="fan")])
    yard.run(1)
    assert yard.state(one) is JobState.QUEUED
    assert yard.state(waits) is JobState.QUEUED
    for name in "ab":
        yard.turn([NodeMarked(at_ns=yard.now, node_id=NodeId(name), marking=Marking.RESUME, by="ada")])
    yard.run()
    assert yard.state(one) is JobState.SUCCEEDED
    assert yard.state(waits) is JobState.SUCCEEDED


def test_a_failing_device_is_left_out_until_it_recovers() -> None:
    yard = Yard(nodes=(gpu_node("a", 2),))
    yard.turn([DeviceFailed(at_ns=yard.now, node_id=NodeId("a"), device_id=DeviceId("a-0"), detail="XID 79")])
    one, two = yard.submit(spec(1), runs_s=100), yard.submit(spec(1), runs_s=100)
    assert yard.state(one) is JobState.STARTING
    assert yard.state(two) is JobState.QUEUED
    assert next(a for a in yard.live()).devices[0].device_id == "a-1"
    yard.turn([DeviceRecovered(at_ns=yard.now, node_id=NodeId("a"), device_id=DeviceId("a-0"))])
    assert yard.state(two) is JobState.STARTING


def test_a_node_that_flaps_is_held_back_for_a_while() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    for at in range(3):
        yard.turn([NodeWentAway(at_ns=yard.now, node_id=NodeId("a"))])
        yard.now += SECOND_NS
        yard.turn([NodeJoined(at_ns=yard.now, node=gpu_node("a", boot_id=f"b{at}"))])
    assert yard.world.nodes[NodeId("a")].state is NodeState.SUSPECT
    job = yard.submit(spec(1), runs_s=10)
    assert yard.state(job) is JobState.QUEUED
    yard.run()
    assert yard.state(job) is JobState.SUCCEEDED
    assert seconds(yard.started[job][0]) >= CALM.flap_hold_ns / SECOND_NS


def test_a_cordon_outlives_the_loss_of_the_node() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    yard.turn([NodeMarked(at_ns=yard.now, node_id=NodeId("a"), marking=Marking.CORDON)])
    yard.turn([NodeWentAway(at_ns=yard.now, node_id=NodeId("a"))])
    yard.turn([NodeJoined(at_ns=yard.now, node=gpu_node("a", boot_id="b2"))])
    assert yard.world.nodes[NodeId("a")].state is NodeState.CORDONED


def test_waiting_costs_nothing_when_nothing_can_change() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    yard.submit(spec(8), runs_s=10 * HOUR_NS / SECOND_NS)
    for _ in range(30):
        yard.submit(spec(8), runs_s=10)
    plan = yard.turn([])
    assert not plan.changes
    assert not plan.waiting


def test_an_elastic_gang_takes_no_more_than_its_queue_may_have() -> None:
    yard = Yard(nodes=(gpu_node("a"),), queues=(queue_of("p0", limit=(("gpu", 2000),)),))
    elastic = yard.submit(spec(1, nodes=4, nodes_min=1), runs_s=100)
    assert len(yard.nodes_of(elastic)) == 2, "the limit allows two workers, and it is content with one"
    other = yard.submit(spec(1, nodes=4, nodes_min=3), runs_s=100, user="v")
    yard.run(1)
    assert yard.state(other) is JobState.QUEUED
    assert len(yard.nodes_of(elastic)) == 2


def test_a_failing_device_does_not_break_what_is_promised_on_others_of_its_node() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    yard.submit(spec(1), runs_s=1000)
    spot = yard.submit(spec(7, tier=Tier.SPOT, checkpoint_grace_ns=30 * SECOND_NS), runs_s=1000)
    yard.grace_taken_ns = 10 * SECOND_NS
    yard.run(1)
    held = next(a for a in yard.live() if a.job_id != spot).devices[0].device_id
    yard.later(yard.now, DeviceFailed(at_ns=yard.now, node_id=NodeId("a"), device_id=held, detail="XID 79"))
    yard.run(1)
    wanted = yard.submit(spec(4), runs_s=10, project="p1")
    yard.run(15)
    assert yard.started[wanted], "its places are free as soon as the spot job is gone"
    assert len(yard.events("Preempted")) == 1


def test_two_promises_on_one_node_are_each_kept() -> None:
    yard = Yard(nodes=(gpu_node("a"),))
    for _ in range(2):
        yard.submit(spec(4, tier=Tier.SPOT, checkpoint_grace_ns=30 * SECOND_NS), runs_s=1000)
    yard.grace_taken_ns = 10 * SECOND_NS
    yard.run(1)
    first, second = (yard.submit(spec(4), runs_s=10, project="p1", user=user) for user in "uv")
    yard.run(15)
    assert yard.started[first]
    assert yard.started[second]
    assert len(yard.events("Preempted")) == 2


def test_a_blocked_group_has_a_plan_that_small_work_does_not_delay() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b"), gpu_node("c")))
    for _ in range(2):
        yard.submit(spec(8, max_duration_ns=100 * SECOND_NS), runs_s=100)
    members = [
        yard.submit(spec(8, group=Group(name="g", size=3), max_duration_ns=50 * SECOND_NS), runs_s=50) for _ in range(3)
    ]
    for at in range(1, 30):
        yard.submit(spec(8, max_duration_ns=60 * SECOND_NS), runs_s=60, at_s=at * 5)
    short = yard.submit(spec(4, max_duration_ns=90 * SECOND_NS), runs_s=90)
    assert yard.state(short) is JobState.STARTING, "it is over before the group can start"
    plan = yard.world.held_back
    assert plan is not None
    assert (plan.job_id, len(plan.parts)) == (members[0], 3)
    yard.run()
    assert {seconds(yard.started[one][0]) for one in members} == {100.0}
    assert all(yard.state(one) is JobState.SUCCEEDED for one in members)


def group_of(yard: Yard, size: int, gpus: int = 8, *, runs_s: float = 50, **more: Any) -> list[str]:
    group = Group(name="g", size=size)
    project = more.pop("project", "p0")
    return [yard.submit(spec(gpus, group=group, **more), runs_s=runs_s, project=project) for _ in range(size)]


def test_a_group_displaces_spot_and_starts_at_one_instant_when_all_of_it_is_gone() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b"), gpu_node("c")))
    yard.grace_taken_ns = 5 * SECOND_NS
    spot = [yard.submit(spec(8, tier=Tier.SPOT, checkpoint_grace_ns=30 * SECOND_NS), runs_s=5000) for _ in range(3)]
    yard.run(10)
    members = group_of(yard, 2)
    assert {yard.world.reasons[yard.job(one).id].code for one in members} == {"WaitsForDisplaced"}
    assert len(yard.world.promises) == 2
    yard.run(10)
    assert {tuple(map(seconds, yard.started[one])) for one in members} == {(15.0,)}
    assert sorted(victim in {job for _, job, _ in yard.events("Preempted")} for victim in spot) == [False, True, True]
    yard.run()
    assert all(yard.state(one) is JobState.SUCCEEDED for one in [*members, *spot])


def test_a_group_is_given_back_what_is_guaranteed_to_its_project_and_no_more_than_that() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), queues=(queue_of("p0", guaranteed=(("gpu", 16_000),)),))
    yard.submit(spec(8, nodes=2), runs_s=5000, project="p1")
    yard.run(10)
    within = group_of(yard, 2)
    yard.run(1)
    assert all(one in yard.started for one in within)
    less = Yard(nodes=(gpu_node("a"), gpu_node("b")), queues=(queue_of("p0", guaranteed=(("gpu", 8_000),)),))
    less.submit(spec(8, nodes=2), runs_s=5000, project="p1")
    less.run(10)
    beyond = group_of(less, 2)
    less.run(1)
    assert not less.events("Preempted"), "two of eight are more than is guaranteed, and one alone does not start"
    assert not any(one in less.started for one in beyond)


def test_a_group_displaces_only_whom_the_least_of_its_jobs_may_displace() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    low = [yard.submit(spec(8, priority=10), runs_s=5000) for _ in range(2)]
    yard.run(10)
    group = Group(name="g", size=2)
    members = [yard.submit(spec(8, group=group, priority=priority), runs_s=50) for priority in (100, 0)]
    yard.run(10)
    assert not yard.events("Preempted")
    assert not any(one in yard.started for one in members)
    assert all(yard.state(one) is JobState.RUNNING for one in low)


def test_nobody_is_displaced_for_a_group_of_which_not_all_would_fit() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    yard.submit(spec(8), runs_s=500, project="p1")
    yard.submit(spec(8, tier=Tier.SPOT), runs_s=5000, project="p1")
    yard.run(10)
    members = group_of(yard, 2)
    yard.run(100)
    assert not yard.events("Preempted")
    assert not any(one in yard.started for one in members)


def test_what_is_promised_to_a_group_is_given_up_whole_when_one_of_its_nodes_is_lost() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b"), gpu_node("c")))
    yard.grace_taken_ns = 20 * SECOND_NS
    for _ in range(3):
        yard.submit(spec(8, tier=Tier.SPOT, checkpoint_grace_ns=30 * SECOND_NS), runs_s=5000)
    yard.run(10)
    members = group_of(yard, 2)
    lost = next(iter(yard.world.promises.values())).placed.places[0].node_id
    yard.later(yard.now + 5 * SECOND_NS, NodeWentAway(at_ns=0, node_id=lost))
    yard.run(100)
    assert len({tuple(yard.started[one]) for one in members}) == 1
    assert lost not in {node for one in members for node in yard.nodes_of(one)}


def test_a_plan_of_spot_work_does_not_hold_up_those_who_may_displace_spot() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    yard.submit(spec(8, max_duration_ns=50 * SECOND_NS), runs_s=50)
    yard.submit(spec(8, tier=Tier.SPOT), runs_s=500)
    waits = yard.submit(spec(8, nodes=2, tier=Tier.SPOT), runs_s=50)
    assert yard.world.held_back is not None
    wanted = yard.submit(spec(8), runs_s=20)
    yard.run(5)
    assert wanted in yard.started
    yard.run()
    assert yard.state(waits) is JobState.SUCCEEDED


def test_a_share_by_memory_waits_when_no_machine_has_such_a_device_any_more() -> None:
    yard = Yard(nodes=(gpu_node("a", 1), gpu_node("b", 0)))
    yard.submit(spec(1), runs_s=500)
    waits = yard.submit(spec(GpuRequest(share_bytes=30 << 30)), runs_s=10)
    yard.turn([NodeWentAway(at_ns=yard.now, node_id=NodeId("a"))])
    more = yard.submit(spec(GpuRequest(share_bytes=30 << 30), tier=Tier.SPOT), runs_s=10)
    assert yard.state(waits) is yard.state(more) is JobState.QUEUED


def test_work_that_still_starts_is_displaced_when_it_may_be() -> None:
    yard = Yard(nodes=(gpu_node("a"),), policy=replace(CALM, min_run_ns=30 * SECOND_NS))
    spot = yard.submit(spec(8, tier=Tier.SPOT), runs_s=500)
    wanted = yard.submit(spec(8), runs_s=20, project="p1")
    assert yard.state(spot) is JobState.STARTING
    yard.run(100)
    assert seconds(yard.started[wanted][0]) == 30


def test_a_group_that_loses_a_member_before_it_starts_waits_for_another() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    yard.submit(spec(8, nodes=2), runs_s=100)
    first, second, third = (yard.submit(spec(8, group=Group(name="g", size=3)), runs_s=10) for _ in range(3))
    yard.turn([StopRequested(at_ns=yard.now, job_id=JobId(first), by="u")])
    yard.run(200)
    assert not {second, third} & set(yard.started), "two of three would have started"
    assert yard.world.reasons[JobId(second)].code == "GroupIncomplete"
    fourth = yard.submit(spec(8, group=Group(name="g", size=3)), runs_s=10)
    yard.turn([NodeJoined(at_ns=yard.now, node=gpu_node("c"))])
    yard.run(1)
    assert all(one in yard.started for one in (second, third, fourth))


def test_a_second_group_of_the_same_name_follows_the_first() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    members = [*group_of(yard, 2), *group_of(yard, 2)]
    yard.run()
    assert [seconds(yard.started[one][0]) for one in members] == [0, 0, 50, 50]


def test_a_job_of_a_group_that_is_tried_again_does_not_wait_for_a_new_group() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    retry = RetryPolicy(max=3, on=(RetryOn.NODE_LOST,))
    members = group_of(yard, 2, retry=retry)
    yard.run(10)
    yard.turn([NodeWentAway(at_ns=yard.now, node_id=NodeId(yard.nodes_of(members[0])[0]))])
    yard.turn([NodeJoined(at_ns=yard.now, node=gpu_node("c"))])
    yard.run(30)
    assert len(yard.started[members[0]]) == 2
    assert len(yard.started[members[1]]) == 1


def test_jobs_of_a_group_that_keep_apart_do_so_from_each_other() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    apart = Placement(apart=(("role", "db"),))
    members = group_of(yard, 2, 1, placement=apart, labels=(("role", "db"),))
    yard.run(1)
    assert sorted(yard.nodes_of(one)[0] for one in members) == ["a", "b"]


@pytest.mark.parametrize("order", ["least-attained", "fifo"])
def test_patience_holds_under_every_order_also_for_a_group(order: str) -> None:
    policy = replace(CALM, order=order, patience_ns=100 * SECOND_NS)
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), policy=policy)
    for at in range(0, 1000, 5):
        for _ in range(3):
            yard.submit(spec(4, max_duration_ns=30 * SECOND_NS), runs_s=29, project="p1", at_s=at)
    yard.run(20)
    members = group_of(yard, 2, runs_s=20, max_duration_ns=20 * SECOND_NS)
    yard.run(300)
    assert all(one in yard.started for one in members), "the group starves"


def test_a_group_is_measured_whole_against_the_empty_fleet_and_its_limit() -> None:
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(4)), queues=(queue_of("p1", limit=(("gpu", 24_000),)),))
    yard.submit(spec(8, nodes=4), runs_s=1000)  # what runs does not count

    def asked(gpus: int, size: int, project: str = "p0", **more: Any) -> Workload:
        return Workload(
            id=WorkloadId(f"wl_{gpus}"), organization_id=OrganizationId("o"), project_id=ProjectId(project),
            principal_id=PrincipalId("u"), spec=spec(gpus, group=Group(name="g", size=size), **more), submitted_ns=0,
        )  # fmt: skip

    def code(*workloads: Workload) -> str:
        reason = why_group_never(yard.world, workloads)
        return reason.code if reason is not None else ""

    assert code(*[asked(8, 4)] * 4) == ""
    assert code(*[asked(8, 5)] * 5) == "GroupTooLarge"
    assert code(*[asked(5, 5)] * 5) == "GroupTooLarge", "eight of 32 GPUs are left, and no machine has five of them"
    assert code(asked(3, 8), *[asked(5, 8)] * 4, *[asked(3, 8)] * 3) == "", "small ones leave room to large ones"
    assert code(*[asked(8, 3, "p1")] * 3) == ""
    assert code(*[asked(8, 4, "p1")] * 4) == "QueueLimit"
    assert code(*[asked(8, 4)] * 8) == "", "they are two groups, one after the other"
    assert code(asked(1, 10, kind=Kind.ARRAY, array_size=10)) == ""
    assert code(asked(8, 10, kind=Kind.ARRAY, array_size=10)) == "GroupTooLarge"
    spread = Placement(spread=Level.HOST)
    assert code(*[asked(8, 2, nodes=2, placement=spread)] * 2) == ""
    assert code(*[asked(5, 3, nodes=2, placement=spread)] * 3) == "GroupTooLarge"
    apart = {"placement": Placement(apart=(("role", "db"),)), "labels": (("role", "db"),)}
    assert code(*[asked(1, 4, **apart)] * 4) == ""
    assert code(*[asked(1, 5, **apart)] * 5) == "GroupTooLarge"
    yard.turn([NodeMarked(at_ns=yard.now, node_id=NodeId("n0"), marking=Marking.CORDON)])
    assert code(*[asked(8, 4)] * 4) == "", "a cordon passes"


def test_what_a_group_waits_for_is_what_all_of_it_needs() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    yard.submit(spec(4), runs_s=100)
    alike = group_of(yard, 2)
    reason = yard.world.reasons[JobId(alike[0])]
    assert (reason.code, reason.needed, reason.available) == ("NotEnoughFreeGpus", "16 GPUs", "12 GPUs free")
    other = Yard(nodes=(gpu_node("a"), gpu_node("b")))
    other.submit(spec(4), runs_s=100)
    group = Group(name="g", size=2)
    large, _ = other.submit(spec(8, group=group)), other.submit(spec(6, group=group))
    assert "1 of the 2 jobs of group g have room now" in other.world.reasons[JobId(large)].sentence


def test_without_a_plan_the_group_would_wait_behind_small_work() -> None:
    yard = Yard(nodes=(gpu_node("a"), gpu_node("b")), policy=replace(CALM, backfill=False))
    yard.submit(spec(8, max_duration_ns=100 * SECOND_NS), runs_s=100)
    members = [yard.submit(spec(8, group=Group(name="g", size=2)), runs_s=50) for _ in range(2)]
    for at in range(1, 60):
        yard.submit(spec(8, max_duration_ns=60 * SECOND_NS), runs_s=60, at_s=at * 20)
    yard.run(1000)
    assert not any(one in yard.started for one in members)


@pytest.mark.parametrize("right", ["priority", "guarantee"])
def test_an_order_that_preempts_does_not_take_back_what_priority_or_a_guarantee_took(right: str) -> None:
    tree = (queue_of("p0", guaranteed=(("gpu", 8_000),)),) if right == "guarantee" else ()
    yard = Yard(nodes=(gpu_node("a"),), queues=tree, policy=replace(CALM, order="shortest-remaining"))
    project, priority = ("p1", 0) if right == "guarantee" else ("p0", 50)
    short = yard.submit(spec(8, max_duration_ns=100 * SECOND_NS), runs_s=90, project=project)
    yard.run(5)
    entitled = yard.submit(spec(8, priority=priority, max_duration_ns=900 * SECOND_NS), runs_s=800)
    for at in range(6, 300, 5):  # something happens all the time
        yard.submit(spec(None), runs_s=1, project="p3", at_s=at)
    yard.run(300)
    assert [job for _, job, _ in yard.events("Preempted")] == [short]
    assert yard.state(entitled) is JobState.RUNNING


# -- answers ----------------------------------------------------------------------------------------------------------


def why(yard: Yard, job: str) -> Why:
    found = yard.job(job)
    workload = yard.stored["Workload", found.workload_id]
    return explain(yard.world, found, workload, None, now=yard.now, policy=yard.policy)


def test_why_and_the_queue_agree_about_the_position_of_a_job_that_is_late() -> None:
    policy = replace(CALM, ageing_ns=SECOND_NS, patience_ns=100 * SECOND_NS)
    yard = Yard(nodes=(gpu_node("a"),), policy=policy)
    yard.submit(spec(8), runs_s=5000, project="p3")
    old = yard.submit(spec(8), runs_s=5)
    yard.run(150)
    first = yard.submit(spec(8, priority=1000), runs_s=5)
    order = [job for _, job in yard.world.queue.in_order(now=yard.now)]
    assert order == [old, first]
    assert [why(yard, job).position for job in order] == [1, 2]


def test_where_a_limit_is_in_the_way_those_are_named_who_share_it() -> None:
    tree = (
        Queue(id=QueueId("que_d"), name="dept", limit=(("gpu", 8_000),)),
        queue_of("p0", parent_id="que_d"),
        queue_of("p1", parent_id="que_d"),
        queue_of("p2", limit=(("cpu", 4_000),)),
    )
    yard = Yard(nodes=tuple(gpu_node(f"n{at}") for at in range(3)), queues=tree)
    yard.submit(spec(8), runs_s=1000, project="p3")
    shares = yard.submit(spec(6), runs_s=1000, project="p1")
    yard.submit(spec(None), runs_s=1000, project="p1")
    waits = yard.submit(spec(4), runs_s=10)
    answer = why(yard, waits)
    assert answer.reasons[0].code == "QueueLimit"
    assert [(one.job_id, one.amount) for one in answer.holdings] == [(shares, "6 x H100-SXM")]
    mine = yard.submit(spec(1, resources=Resources(cpu_milli=3_000)), runs_s=1000, project="p2")
    more = yard.submit(spec(1, resources=Resources(cpu_milli=2_000)), runs_s=1000, project="p2")
    assert [(one.job_id, one.amount) for one in why(yard, more).holdings] == [(mine, "3 CPU")]
    grouped = group_of(yard, 2, 4)
    assert [one.job_id for one in why(yard, grouped[0]).holdings] == [shares]
