"""The control plane keeps its promises in whatever order things happen, and whatever of it fails."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.core.history import START
from tests.scenario.small_cloud import NAMES, NODES, OPS, Op, ShakyStore, SmallCloud, played
from tidemill.control import driver, plane, turns
from tidemill.control.enginework import EngineWork
from tidemill.control.turns import TurnLoop
from tidemill.core.queueing import WaitingLines
from tidemill.core.world import World
from tidemill.engines import simulated
from tidemill.engines.simulated import Mishap
from tidemill.errors import EngineLost, Fenced, NotFound, Stale, StorageFull, Unavailable
from tidemill.model.events import LaunchRefused, NeverLaunched, Prepared, StopRequested, Vanished
from tidemill.model.ids import JobId, LaunchId
from tidemill.model.job import AllocationState, Cause, JobState
from tidemill.model.plan import Command, Launch, Stop
from tidemill.ports import JobFilter
from tidemill.units import SECOND_NS

PLAIN = 1, 0  # one worker that ends well after 2 s, with no GPU
JOB, LAUNCH = JobId("job_0001-0"), LaunchId("run_0001-0-1-0")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What goes wrong here is meant to; its tracebacks are not for reading."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# -- whatever happens ----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPS)
def test_whatever_happens_the_promises_are_kept(ops: list[Op]) -> None:
    played(ops)


def histories(count: int) -> Iterator[list[Op]]:
    """Histories longer than Hypothesis likes to make, the same each time."""
    for seed in range(count):
        chance = random.Random(seed)
        length = chance.randrange(20, 160)
        yield [(chance.choice(NAMES), chance.randrange(31), chance.randrange(31)) for _ in range(length)]


def is_caught(count: int) -> bool:
    """Whether the auditor objects to one of so many histories."""
    for ops in histories(count):
        try:
            played(ops)
        except AssertionError:
            return True
    return False


def test_long_histories_are_kept_too_and_reach_every_end() -> None:
    ends: set[tuple[JobState, Cause]] = set()
    attempts = set()
    for ops in histories(150):
        for row in played(ops).store.find_jobs(JobFilter(), limit=1_000).items:
            ends.add((row.job.state, row.job.cause))
            attempts.add(row.job.attempts)
    assert {cause for _, cause in ends} == {
        Cause.COMPLETED, Cause.CANCELLED, Cause.ERROR, Cause.OUT_OF_MEMORY, Cause.LAUNCH_FAILED, Cause.TIMED_OUT
    }  # fmt: skip
    assert {0, 1, 2, 3} <= attempts


# -- planted bugs ----------------------------------------------------------------------------------------------------


def an_engine_starts_again_what_it_has(patch: pytest.MonkeyPatch) -> None:
    launch = simulated._Machines.launch

    def launch_again(machines: Any, spec: Any, now: int) -> None:
        machines.workers.pop(spec.launch_id, None)
        launch(machines, spec, now)

    patch.setattr(simulated._Machines, "launch", launch_again)


def a_lost_reply_is_taken_for_a_failure(patch: pytest.MonkeyPatch) -> None:
    def carry_out(work: Any, command: Command) -> None:
        try:
            if isinstance(command, Launch):
                work._engine.launch(work._build(command.launch_id))
            elif isinstance(command, Stop):
                work._engine.stop(command.launch_id, grace_ns=command.grace_ns)
            else:
                work._engine.forget(command.launch_id)
        except NotFound:
            return
        except EngineLost:
            if isinstance(command, Launch) and (held := work._live().get(command.launch_id)) is not None:
                work._tell([LaunchRefused(at_ns=work._clock(), launch_id=held.id, fence=held.fence)])

    patch.setattr(EngineWork, "_carry_out", carry_out)


def what_should_be_is_read_after_looking(patch: pytest.MonkeyPatch) -> None:
    def look(work: Any) -> None:
        observed = {seen.launch_id: seen for seen in work._engine.observe()}
        live = work._live()
        busy = set(work._in_flight)
        facts = [fact for launch, held in live.items() if launch not in busy and (fact := work._compare(held, observed.get(launch)))]
        work._tell(facts)
        for launch, seen in observed.items():
            if launch not in live and launch not in busy:
                work._clean_up(seen)

    patch.setattr(EngineWork, "look", look)


def a_look_forgets_what_was_commanded_meanwhile(patch: pytest.MonkeyPatch) -> None:
    """As it was written first: only what was on its way when the look began is left alone."""

    def look(work: Any) -> None:
        live = work._live()
        busy = set(work._in_flight)
        observed = {seen.launch_id: seen for seen in work._engine.observe()}
        facts = [fact for launch, held in live.items() if launch not in busy and (fact := work._compare(held, observed.get(launch)))]
        work._tell([replace(fact, state=None) if isinstance(fact, NeverLaunched) else fact for fact in facts])
        for launch, seen in observed.items():
            if launch not in live and launch not in busy:
                work._clean_up(seen)

    patch.setattr(EngineWork, "look", look)


def asking_to_stop_is_taken_for_having_stopped(patch: pytest.MonkeyPatch) -> None:
    carry_out = EngineWork._carry_out

    def and_gone(work: Any, command: Command) -> None:
        carry_out(work, command)
        if isinstance(command, Stop) and (held := work._live().get(command.launch_id)) is not None:
            work._tell([Vanished(at_ns=work._clock(), launch_id=held.id, fence=held.fence)])

    patch.setattr(EngineWork, "_carry_out", and_gone)


def nothing_is_cleaned_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineWork, "_clean_up", lambda *_: None)


def a_restart_meters_from_now(patch: pytest.MonkeyPatch) -> None:
    load = plane.world_from

    def forgetful(*args: Any, now: int, **kwargs: Any) -> World:
        world = load(*args, now=now, **kwargs)
        for meter in world.meters.values():
            meter.since_ns = now
        return world

    patch.setattr(plane, "world_from", forgetful)


def a_restart_forgets_what_is_due(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(driver, "_restore_timers", lambda *_args, **_kwargs: None)


def a_restart_forgets_who_waits(patch: pytest.MonkeyPatch) -> None:
    load = plane.world_from

    def forgetful(*args: Any, **kwargs: Any) -> World:
        world = load(*args, **kwargs)
        world.delayed.clear()
        world.timers.clear()
        return world

    patch.setattr(plane, "world_from", forgetful)


def the_world_is_trusted_though_the_store_knows_more(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TurnLoop, "_load_if_stale", lambda _: None)


def what_is_not_stored_is_acknowledged(patch: pytest.MonkeyPatch) -> None:
    store_plan = TurnLoop._store_plan

    def careless(loop: Any, *args: Any) -> None:
        try:
            store_plan(loop, *args)
        except (Unavailable, StorageFull):
            return

    patch.setattr(TurnLoop, "_store_plan", careless)


def an_undone_turn_takes_jobs_out_of_the_queue(patch: pytest.MonkeyPatch) -> None:
    """As it was written first."""
    patch.setattr(WaitingLines, "rollback", WaitingLines.commit)


def an_undone_turn_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(World, "rollback", World.commit)


@pytest.mark.parametrize(
    "plant",
    [
        an_engine_starts_again_what_it_has,
        a_lost_reply_is_taken_for_a_failure,
        what_should_be_is_read_after_looking,
        a_look_forgets_what_was_commanded_meanwhile,
        asking_to_stop_is_taken_for_having_stopped,
        nothing_is_cleaned_up,
        a_restart_meters_from_now,
        a_restart_forgets_what_is_due,
        a_restart_forgets_who_waits,
        the_world_is_trusted_though_the_store_knows_more,
        what_is_not_stored_is_acknowledged,
        an_undone_turn_takes_jobs_out_of_the_queue,
        an_undone_turn_is_kept,
    ],
    ids=lambda bug: bug.__name__,
)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert is_caught(2_000)
