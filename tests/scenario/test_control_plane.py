"""The control plane keeps its promises in whatever order things happen, and whatever of it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.core.history import GB, SITE
from tests.faults.simulation.cloud import NODES, SmallCloud
from tests.faults.simulation.machines import START
from tidemill.control.enginework import EngineWork
from tidemill.control.plane import ControlPlane
from tidemill.core.place import Place, Placed
from tidemill.core.world import Promise
from tidemill.errors import Fenced, InvalidSpec, Stale, StorageFull, Unavailable
from tidemill.model.events import NeverLaunched, Prepared, StopRequested, Vanished
from tidemill.model.fleet import NodeState
from tidemill.model.ids import JobId, LaunchId, NodeId
from tidemill.model.job import AllocationState, Cause, JobState
from tidemill.model.resources import Resources
from tidemill.model.values import replace
from tidemill.ports import JobFilter
from tidemill.units import SECOND_NS

PLAIN = 0, 8  # one worker that ends well after 9 s, without a GPU
JOB, LAUNCH = JobId("job_0001-0"), LaunchId("run_0001-0-1-0")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What goes wrong here is meant to; its tracebacks are not for reading."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# -- one thing at a time: what the histories found first, and what they do not reach -----------------------------------


def work_of(plane: ControlPlane) -> EngineWork:
    """The hands of a control plane on its own engine."""
    return plane.sites.works[SITE.id]


@pytest.fixture
def cloud() -> SmallCloud:
    """A cloud with a job that is placed and whose launch is commanded."""
    made = SmallCloud()
    made.turn()
    made.submit(*PLAIN)
    made.turn()
    return made


def held(cloud: SmallCloud, launch: LaunchId = LAUNCH) -> AllocationState:
    found = cloud.store.allocation(launch)
    assert found is not None
    return found.state


def test_a_look_that_is_overtaken_by_a_launch_ends_nothing(cloud: SmallCloud) -> None:
    cloud.engine_mishaps.append("lost")
    for lane in range(4):
        work_of(cloud.plane).work_off(lane)
    cloud.look()
    cloud.look([("hurry", 0, 0)])  # its list is made before the launch and read after the runner's report
    cloud.turn()
    assert held(cloud) is AllocationState.PREPARING
    cloud.now += SECOND_NS
    assert cloud.alive() == [LAUNCH]


def test_that_a_launch_was_never_seen_says_nothing_once_it_moved_on(cloud: SmallCloud) -> None:
    cloud.hurry()
    assert held(cloud) is AllocationState.PREPARING
    put = cloud.plane._turns.put
    put([NeverLaunched(at_ns=cloud.now, launch_id=LAUNCH, fence=1, state=AllocationState.RESERVED)])
    cloud.turn()
    assert held(cloud) is AllocationState.PREPARING
    put([NeverLaunched(at_ns=cloud.now, launch_id=LAUNCH, fence=1, state=AllocationState.PREPARING)])
    cloud.turn()
    assert held(cloud) is AllocationState.RELEASED


def test_a_crash_while_a_worker_saves_its_work_leaves_it_its_grace() -> None:
    cloud = SmallCloud()
    cloud.turn()
    cloud.submit(*PLAIN, run="endless 1 20", checkpoint_grace_ns=30 * SECOND_NS, max_duration_ns=0)
    cloud.hurry()
    cloud.now += 2 * SECOND_NS
    cloud.stop(0)
    cloud.hurry()
    cloud.crash()
    cloud.settle()
    stopped = cloud.store.allocation(LAUNCH)
    assert stopped is not None
    assert stopped.exit_code == 143, "it ended by itself and was not killed"
    assert stopped.released_ns - stopped.drain_ns >= 20 * SECOND_NS


def test_a_stop_is_acknowledged_only_when_it_is_stored() -> None:
    """The submission is stored, but its answer is lost: the world does not know the job that is to be stopped."""
    cloud = SmallCloud()
    cloud.turn()
    cloud.store.mishaps.append("lost")
    submitted = cloud.submit(*PLAIN)
    cloud.turn()
    assert isinstance(submitted.exception(), Unavailable)
    cloud.stop(0)
    cloud.turn()
    assert cloud.stopped
    cloud.settle()
    cloud.auditor.audit()


def test_a_stop_that_could_not_be_stored_leaves_the_job_in_the_queue() -> None:
    cloud = SmallCloud()
    cloud.turn()
    for place in NODES:
        cloud.lose_node(place.id)
    cloud.hurry()
    cloud.submit(*PLAIN)
    cloud.turn()
    cloud.stop(0)
    cloud.store.mishaps.append("full")
    cloud.turn()
    row = cloud.store.job(JOB)
    assert row is not None
    assert row.job.state is JobState.QUEUED
    cloud.settle()
    cloud.auditor.audit()


@pytest.mark.parametrize(
    ("mishap", "error"),
    [("unavailable", Unavailable), ("full", StorageFull), ("bug", RuntimeError), ("lost", Unavailable)],
)
def test_a_turn_that_is_not_stored_is_told_and_commands_nothing(mishap: str, error: type[Exception]) -> None:
    cloud = SmallCloud()
    cloud.turn()
    cloud.store.mishaps.append(mishap)
    submitted = cloud.submit(*PLAIN)
    cloud.turn()
    assert isinstance(submitted.exception(), error)
    assert not any(work_of(cloud.plane).work_off(lane) for lane in range(4))
    cloud.submit(*PLAIN)
    cloud.settle()
    cloud.auditor.audit()
    assert len(cloud.store.find_jobs(JobFilter()).items) == (2 if mishap == "lost" else 1)


@pytest.mark.parametrize("mishaps", [["stale"], ["stale", "unreadable"]])
def test_a_stale_world_is_loaded_again_before_anything_else(mishaps: list[str]) -> None:
    cloud = SmallCloud()
    cloud.turn()
    before = cloud.plane.world
    cloud.store.mishaps.extend(mishaps)
    first, second = cloud.submit(*PLAIN), cloud.submit(*PLAIN)
    cloud.turn()
    assert cloud.plane.world is not before
    told = [future.exception() for future in (first, second)]
    assert told == [None, None] if len(mishaps) == 1 else isinstance(told[0], Unavailable)
    cloud.settle()
    cloud.auditor.audit()


def test_what_is_stale_twice_is_told_to_who_asked() -> None:
    cloud = SmallCloud()
    cloud.turn()
    cloud.store.mishaps.extend(["stale", "stale"])
    submitted = cloud.submit(*PLAIN)
    cloud.turn()
    assert isinstance(submitted.exception(), Stale)


def test_who_does_not_lead_any_more_commands_nothing(cloud: SmallCloud) -> None:
    zombie = cloud.plane
    cloud._start()
    assert sum(work_of(zombie).work_off(lane) for lane in range(4)) == 1
    for machine in cloud.machines.values():
        machine.folders.clear()
    told = zombie._turns.put([NeverLaunched(at_ns=cloud.now, launch_id=LAUNCH, fence=1)])
    zombie._turns.take_turn()
    assert isinstance(told.exception(), Fenced)
    assert not any(work_of(zombie).work_off(lane) for lane in range(4))


def test_who_stopped_waiting_for_an_answer_does_not_stop_the_loop(cloud: SmallCloud) -> None:
    turn_loop = cloud.plane._turns
    gone = turn_loop.put([StopRequested(at_ns=cloud.now, job_id=JOB)])
    asked = turn_loop.ask([], lambda plan, _: plan)
    assert gone.cancel()
    assert asked.cancel()
    turn_loop.take_turn()
    row = cloud.store.job(JOB)
    assert row is not None
    assert not row.job.stop_requested, "what was taken back never happened"
    kept = turn_loop.put([StopRequested(at_ns=cloud.now, job_id=JOB)])
    turn_loop.take_turn()
    assert kept.result() is None


def test_a_watcher_that_fails_does_not_stop_the_loop(cloud: SmallCloud) -> None:
    seen: list[int] = []

    def broken(_: int) -> None:
        raise RuntimeError("the event loop is closed")

    turn_loop = cloud.plane._turns
    unwatch = [cloud.plane.watch(broken), cloud.plane.watch(seen.append)]
    cloud.submit(*PLAIN)
    cloud.turn()
    assert seen == [cloud.plane.last_seq]
    for stop in unwatch:
        stop()
    cloud.submit(*PLAIN)
    turn_loop.take_turn()
    assert len(seen) == 1


def test_an_item_that_breaks_a_turn_is_found_and_only_it_fails(cloud: SmallCloud) -> None:
    put = cloud.plane._turns.put
    first, broken, last = cloud.submit(*PLAIN), put(["no fact"]), cloud.submit(*PLAIN)
    cloud.turn()
    assert isinstance(broken.exception(), TypeError)
    assert first.exception() is last.exception() is None
    cloud.settle()
    cloud.auditor.audit()


def test_a_question_changes_nothing_and_its_failure_is_told(cloud: SmallCloud) -> None:
    turn_loop, before = cloud.plane._turns, cloud.store.load()
    answer = turn_loop.ask([StopRequested(at_ns=cloud.now, job_id=JOB)], lambda _, world: world.jobs[JOB].state)
    broken = turn_loop.ask([], lambda _, __: 1 / 0)
    turn_loop.take_turn()
    assert answer.result() is JobState.STOPPING
    assert isinstance(broken.exception(), ZeroDivisionError)
    assert cloud.store.load() == before
    assert cloud.plane.world.jobs[JOB].state is JobState.STARTING


def test_what_the_store_never_heard_of_is_left_alone(cloud: SmallCloud) -> None:
    """An older backup was restored: what runs may be somebody's work."""
    spec = cloud.plane.runners.build(LAUNCH)
    stranger = LaunchId("run_9999-0-1-0")
    cloud.machines[NodeId(spec.node_id)].launch(replace(spec, launch_id=stranger, run="endless 1 0"))
    for _ in range(30):
        cloud.now += SECOND_NS
        cloud.look()
        cloud.hurry()
    assert cloud.alive() == [stranger]


def test_what_was_released_and_runs_all_the_same_is_ended(cloud: SmallCloud) -> None:
    cloud.hurry()
    cloud.plane._turns.put([Vanished(at_ns=cloud.now, launch_id=LAUNCH, fence=1)])
    cloud.turn()
    assert held(cloud) is AllocationState.RELEASED
    for _ in range(15):
        cloud.now += SECOND_NS
        cloud.look()
        cloud.hurry()
    assert LAUNCH not in cloud.alive()


def test_a_runner_learns_whether_to_go_on(cloud: SmallCloud) -> None:
    cloud.hurry()
    assert not cloud.plane.runners.beat(LAUNCH, 1, cpu_used_ns=0, rss_bytes=0).stop
    with pytest.raises(Fenced, match="newer attempt"):
        cloud.plane.runners.beat(LAUNCH, 2, cpu_used_ns=0, rss_bytes=0)
    told = cloud.plane.runners.report(LAUNCH, 2, [Prepared(at_ns=cloud.now, launch_id=LAUNCH, fence=2)])
    assert isinstance(told.exception(), Fenced)
    cloud.stop(0)
    cloud.turn()
    directive = cloud.plane.runners.beat(LAUNCH, 1, cpu_used_ns=0, rss_bytes=0)
    assert (directive.stop, directive.grace_ns) == (True, 2 * SECOND_NS)
    cloud.settle()
    with pytest.raises(Fenced, match="over"):
        cloud.plane.runners.beat(LAUNCH, 1, cpu_used_ns=0, rss_bytes=0)


def test_the_loop_in_its_thread_takes_what_it_is_given_and_nothing_after_its_end() -> None:
    cloud = SmallCloud()
    turn_loop = cloud.plane._turns
    turn_loop.start()
    assert turn_loop.put([]).result(timeout=30) is None
    submitted = cloud.submit(*PLAIN)
    turn_loop.close()
    assert submitted.result(timeout=30) is None
    assert isinstance(turn_loop.put([]).exception(), Unavailable)
    assert cloud.store.job(JOB) is not None


def test_a_meter_that_was_never_cut_begins_when_its_machine_joined() -> None:
    cloud = SmallCloud()
    cloud.turn()
    cloud.now += 3 * SECOND_NS
    cloud.crash()
    assert {meter.since_ns for meter in cloud.plane.world.meters.values()} == {START}


def test_a_restart_counts_every_worker_once(cloud: SmallCloud) -> None:
    cloud.hurry()
    assert len(cloud.plane.world.rows.rows()) == 1
    cloud.crash()
    assert len(cloud.plane.world.rows.rows()) == 1


def test_promises_that_cannot_both_be_kept_do_not_wait_for_each_other() -> None:
    """As after a machine came back with fewer processors than were promised of it."""
    cloud = SmallCloud()
    cloud.turn()
    for at, place in enumerate(NODES):
        cloud.do(("mark", at, 2))
        cloud.turn()
        assert cloud.plane.world.nodes[place.id].state is NodeState.CORDONED
    for _ in range(2):
        cloud.submit(*PLAIN, resources=Resources(cpu_milli=3_000, memory_bytes=GB))
    cloud.turn()
    world = cloud.plane.world
    world.begin()
    for job in list(world.jobs.values()):
        line = world.line_of(job)
        world.queue.remove(line, job.id)
        placed = Placed(choice=0, places=(Place(node_id=NODES[1].id, devices=()),))
        world.promise(Promise(job_id=job.id, line=line, placed=placed, waits_for=(), together=(job.id,)))
    world.commit()
    cloud.do(("mark", 1, 1))
    cloud.turn()
    assert sorted(job.state for job in world.jobs.values()) == [JobState.QUEUED, JobState.STARTING]
    assert not world.promises
    cloud.settle()
    cloud.auditor.audit()


def test_a_launch_that_cannot_be_described_is_not_tried_for_ever(
    cloud: SmallCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact that it names is gone, for example."""

    def gone(_: LaunchId) -> None:
        raise InvalidSpec("There is no artifact data:3.", field="inputs", value="data:3")

    monkeypatch.setattr(work_of(cloud.plane), "_build", gone)
    cloud.hurry()
    row = cloud.store.job(JOB)
    assert row is not None
    assert (row.job.state, row.job.cause) == (JobState.FAILED, Cause.LAUNCH_FAILED)
    assert "no artifact data:3" in row.job.detail
