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
from tidemill.model.events import Scaled, StopRequested
from tidemill.model.ids import JobId, WorkloadId
from tidemill.model.job import Job, JobState
from tidemill.model.spec import Kind, Port, Service

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
