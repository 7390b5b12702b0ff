"""Replicas of a service that come and go with its requests: what a turn makes of the decision how many there are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.yard import CALM, PROJECTS, RATES, SITE, Yard, gpu_node, spec
from tidemill.control.driver import snapshot_of, world_from
from tidemill.core import waiting
from tidemill.core.outcome import Outcome
from tidemill.core.world import World
from tidemill.model.events import Became, Exited, Scaled, StopRequested
from tidemill.model.ids import JobId, WorkloadId
from tidemill.model.job import Cause, Job, JobState
from tidemill.model.spec import Kind, Port, RetryOn, RetryPolicy, Service

WORKLOAD = WorkloadId("wl_00001")
JOBS = [JobId(f"job_00001-{index}") for index in range(3)]


def yard(*, least: int = 0, gpus: int = 8) -> Yard:
    """Room for so many replicas, and a service of up to three."""
    made = Yard(nodes=(gpu_node("a", gpus),))
    service = Service(port="http", replicas=3, replicas_min=least)
    made.submit(spec(1, kind=Kind.SERVICE, service=service, ports=(Port(name="http"),)), runs_s=10**6)
    return made


def scale(made: Yard, wanted: int, *give_up: JobId) -> None:
    made.turn([Scaled(at_ns=made.now, workload_id=WORKLOAD, wanted=wanted, give_up=give_up)])
    made.run(1)


def states(made: Yard) -> list[str]:
    """Of each replica: whether it runs, waits for room, or is not needed."""
    return [
        "spare" if job in made.world.parked else {"running": "runs", "queued": "waits"}[made.state(job).value]
        for job in JOBS
    ]


def test_only_as_many_start_as_there_have_to_be() -> None:
    made = yard(least=1)
    made.run(1)
    assert states(made) == ["runs", "spare", "spare"]
    assert made.world.reasons[JOBS[1]].code == "NotNeeded"


def test_they_come_when_they_are_wanted_and_rest_when_they_are_given_up() -> None:
    made = yard()
    made.run(1)
    assert states(made) == ["spare"] * 3
    scale(made, 2)
    assert states(made) == ["runs", "runs", "spare"]
    scale(made, 2)
    assert len(made.events("Scaled")) == 1, "the same again is no event"
    scale(made, 1, JOBS[0])
    assert states(made) == ["spare", "runs", "spare"]
    scale(made, 3)
    assert states(made) == ["runs"] * 3
    assert [made.job(job).retries + made.job(job).evictions for job in JOBS] == [0, 0, 0]


def test_what_waits_for_room_leaves_the_line_when_it_is_not_needed() -> None:
    made = yard(gpus=1)
    scale(made, 3)
    assert states(made) == ["runs", "waits", "waits"]
    scale(made, 1)
    assert states(made) == ["runs", "spare", "spare"]
    other = made.submit(spec(1), runs_s=5)
    scale(made, 0, JOBS[0])
    made.run(10)
    assert made.state(other) is JobState.SUCCEEDED
    assert states(made) == ["spare"] * 3


def test_a_spare_replica_can_be_stopped_and_others_go_on() -> None:
    made = yard()
    scale(made, 1)
    made.turn([StopRequested(at_ns=made.now, job_id=JOBS[2])])
    assert made.state(JOBS[2]) is JobState.CANCELLED
    scale(made, 3)
    assert [made.state(job).value for job in JOBS] == ["running", "running", "cancelled"]
    made.turn([StopRequested(at_ns=made.now, job_id=job) for job in JOBS[:2]])
    made.run(1)
    assert not made.world.services


def became(made: Yard, rank: int, *, job: JobId = JOBS[0]) -> None:
    made.turn([
        Became(at_ns=made.now, launch_id=held.id, fence=held.fence, ready=True, endpoint=f"{held.node_id}:{rank}")
        for held in made.live()
        if held.job_id == job and held.rank == rank
    ])  # fmt: skip


def test_a_replica_over_two_machines_is_ready_when_its_first_worker_answers_and_all_run() -> None:
    made = Yard(nodes=(gpu_node("a", 1), gpu_node("b", 1), gpu_node("c", 2)))
    service = Service(port="http", replicas=2)
    made.submit(spec(1, kind=Kind.SERVICE, nodes=2, service=service, ports=(Port(name="http"),)), runs_s=10**6)
    made.run(1)
    assert {job: len(made.nodes_of(job)) for job in JOBS[:2]} == {JOBS[0]: 2, JOBS[1]: 2}
    became(made, 1)
    assert made.world.answering(made.world.attempts[JOBS[0]]) is None, "the second worker answers for nobody"
    became(made, 0)
    answering = made.world.answering(made.world.attempts[JOBS[0]])
    assert answering is not None
    assert (answering.rank, made.world.attempts[JOBS[0]].ready_ns) == (0, made.now)
    assert made.world.answering(made.world.attempts[JOBS[1]]) is None
    lost = next(held for held in made.live() if held.job_id == JOBS[0] and held.rank == 1)
    made.turn([Exited(at_ns=made.now, launch_id=lost.id, fence=lost.fence, exit_code=1, cause=Cause.NODE_LOST)])
    assert made.world.answering(made.world.attempts.get(JOBS[0])) is None, "the whole gang ends with one of it"
    made.run(5)
    assert len(made.nodes_of(JOBS[0])) == 2


@pytest.mark.parametrize(
    ("ready_s", "retries", "cause", "then"),
    [
        (600, 0, Cause.NOT_ALIVE, ("queued", 0)),
        (10, 0, Cause.NOT_ALIVE, ("failed", 0)),
        (10, 2, Cause.NOT_ALIVE, ("queued", 2)),
        (10, 1, Cause.NOT_ALIVE, ("failed", 1)),
        (600, 1, Cause.ERROR, ("queued", 1)),
        (599, 1, Cause.ERROR, ("failed", 1)),
    ],
)
def test_a_replica_that_worked_for_long_begins_anew_with_its_retries(
    ready_s: int, retries: int, cause: Cause, then: tuple[str, int]
) -> None:
    made = Yard(nodes=(gpu_node("a", 1),))
    retry = RetryPolicy(on=(RetryOn.ERROR,), max=retries)
    made.submit(
        spec(1, kind=Kind.SERVICE, service=Service(port="http"), ports=(Port(name="http"),), retry=retry),
        runs_s=10**6,
    )
    made.run(1)
    if then != ("queued", 0) and retries:  # one is spent already
        fail(made, Cause.ERROR)
        made.run(5)
    became(made, 0)
    made.run(ready_s)
    fail(made, cause)
    assert (made.state(JOBS[0]).value, made.job(JOBS[0]).retries) == then


def fail(made: Yard, cause: Cause) -> None:
    (held,) = made.live()
    made.turn([Exited(at_ns=made.now, launch_id=held.id, fence=held.fence, exit_code=1, cause=cause)])


def check_any_course() -> None:
    """No replica is lost or waits beyond what is wanted, and the next control plane sees the same."""

    @settings(max_examples=100, deadline=None, report_multiple_bugs=False)
    @given(st.lists(st.tuples(st.integers(0, 4), st.sets(st.sampled_from(JOBS), max_size=2)), max_size=12))
    def check(course: list[tuple[int, set[JobId]]]) -> None:
        made = yard(gpus=2)
        for wanted, leaving in course:
            scale(made, wanted, *(job for job in sorted(leaving) if job in made.world.attempts))
            scale(made, wanted)  # as is told again and again
            found = states(made)
            runs, waits = found.count("runs"), found.count("waits")
            assert not waits or runs + waits <= wanted, "one waits for room that is not wanted"
            assert runs + waits >= min(wanted, 3), "one that is wanted neither runs nor waits"
            assert runs == min(2, runs + waits), "there is room, and it is not used"
            again = world_from(
                snapshot_of(made.world), sites=[SITE], projects=PROJECTS, rates=RATES, policy=CALM, now=made.now
            )
            assert set(again.services) == set(made.world.services)
            assert set(again.attempts) == set(made.world.attempts)
            assert set(again.parked) >= set(made.world.parked)

    check()


def test_whatever_is_decided_no_replica_is_lost_or_waits_in_vain() -> None:
    check_any_course()


def test_the_check_finds_replicas_that_go_on_waiting_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_right = waiting.scale

    def only_up(world: World, jobs: list[Job], wanted: int, out: Outcome) -> bool:
        return scale_right(world, jobs, max(wanted, sum(job.id not in world.parked for job in jobs)), out)

    monkeypatch.setattr(waiting, "scale", only_up)
    with pytest.raises(AssertionError):
        check_any_course()
