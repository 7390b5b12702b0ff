"""Bugs on purpose: real code changed as somebody could have written it. The auditor has to find each within some seeds.

An auditor that objects to nothing is worth nothing. Each bug names the invariant by which it is expected to be found
first; another one may be broken by it as well. ``SEEDS`` remembers a seed that found it lately, which is tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from tests.faults.simulation.auditor import Broken
from tests.faults.simulation.history import broken_by, history
from tests.faults.simulation.machines import Machine
from tidemill.control import driver, leases, plane
from tidemill.control.clock import SteadyClock
from tidemill.control.enginework import EngineWork
from tidemill.control.leases import Leases
from tidemill.control.runners import Directive, Runners
from tidemill.control.turns import TurnLoop
from tidemill.core import ending
from tidemill.core.outcome import Outcome
from tidemill.core.world import World
from tidemill.errors import EngineLost, Fenced, NotFound, StorageFull, Unavailable
from tidemill.model.events import LaunchRefused, NodeFellSilent, NodeWentAway, Vanished
from tidemill.model.ids import LaunchId
from tidemill.model.job import Cause
from tidemill.model.plan import Command, Launch, ObservedState, Stop
from tidemill.outpost.link import Link
from tidemill.store.memory import MemoryStore

WITHIN: Final = 400
"""Seeds within which each has to be found."""


@dataclass
class Patch:
    """Changes attributes, and changes them back."""

    _before: list[tuple[Any, str, Any]] = field(default_factory=list)

    def __call__(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """As it was."""
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._before.clear()


Plant = Callable[[Patch], None]

# -- I1: two of one ---------------------------------------------------------------------------------------------------


def an_engine_starts_again_what_it_has(patch: Patch) -> None:
    launch = Machine.launch

    def launch_again(machine: Machine, spec: Any) -> None:
        known = machine.folders.pop(spec.launch_id, None)
        launch(machine, spec)
        if known is not None:
            machine.folders[LaunchId(f"{spec.launch_id}, again")] = known

    patch(Machine, "launch", launch_again)


def a_lost_reply_is_taken_for_a_failure(patch: Patch) -> None:
    carry_out = EngineWork._carry_out

    def and_gives_up(work: Any, command: Command) -> None:
        if not isinstance(command, Launch):
            carry_out(work, command)
            return
        try:
            work._engine.launch(work._build(command.launch_id))
        except NotFound:
            return
        except EngineLost:
            if (held := work._live().get(command.launch_id)) is not None:
                work._tell([LaunchRefused(at_ns=work._clock(), launch_id=held.id, fence=held.fence)])

    patch(EngineWork, "_carry_out", and_gives_up)


def silence_is_taken_for_a_loss(patch: Patch) -> None:
    """I cannot reach it, so it failed."""
    overdue = Leases.overdue

    def at_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        return [
            NodeWentAway(at_ns=fact.at_ns, node_id=fact.node_id) if isinstance(fact, NodeFellSilent) else fact
            for fact in overdue(self, *args, **kwargs)
        ]

    patch(Leases, "overdue", at_once)


def a_lease_ends_when_it_ends_here(patch: Patch) -> None:
    """Neither the worker's grace nor another clock's speed is thought of."""
    patch(leases, "MARGIN_NS", -20_000_000_000)
    patch(leases, "SILENT_AFTER_NS", 0)


def asking_to_stop_is_taken_for_having_stopped(patch: Patch) -> None:
    """What should be is deleted before what is, is known to be gone."""
    carry_out = EngineWork._carry_out

    def and_gone(work: Any, command: Command) -> None:
        carry_out(work, command)
        if isinstance(command, Stop) and (held := work._live().get(command.launch_id)) is not None:
            work._tell([Vanished(at_ns=work._clock(), launch_id=held.id, fence=held.fence)])

    patch(EngineWork, "_carry_out", and_gone)


def who_led_before_is_obeyed(patch: Patch) -> None:
    """A control plane that cannot be sure to lead grants leases and is asked for calls, whatever its epoch."""
    patch(plane.ControlPlane, "check_leads", lambda _: None)
    fetch = Link._fetch

    def forgetful(link: Any) -> None:
        link._epoch = 0
        fetch(link)

    patch(Link, "_fetch", forgetful)
    patch(MemoryStore, "_check", lambda *_: None)


# -- I2: more than there is ---------------------------------------------------------------------------------------------


def room_is_free_when_its_holder_is_asked_to_go(patch: Patch) -> None:
    drain = ending.drain

    def and_free(world: Any, worker: Any, out: Any, **kwargs: Any) -> None:
        drain(world, worker, out, **kwargs)
        world.fleet.give(
            worker.node_id, cpu_milli=worker.cpu_milli, memory_bytes=worker.memory_bytes, devices=worker.devices
        )

    patch(ending, "drain", and_free)


# -- I3: said and not done ----------------------------------------------------------------------------------------------


def what_is_not_stored_is_acknowledged(patch: Patch) -> None:
    store_plan = TurnLoop._store_plan

    def careless(loop: Any, *args: Any) -> None:
        try:
            store_plan(loop, *args)
        except (Unavailable, StorageFull):
            return

    patch(TurnLoop, "_store_plan", careless)


def a_key_is_not_kept_with_what_it_was_for(patch: Patch) -> None:
    store_plan = TurnLoop._store_plan
    patch(TurnLoop, "_store_plan", lambda loop, plan, _keys: store_plan(loop, plan, []))


# -- I4: nobody's -------------------------------------------------------------------------------------------------------


def what_was_released_and_runs_is_left_running(patch: Patch) -> None:
    """And a silent node's workers are given up, so that there is something to leave."""
    silence_is_taken_for_a_loss(patch)
    patch(leases, "SILENT_AFTER_NS", 3_000_000_000)
    clean_up = EngineWork._clean_up

    def only_the_dead(work: Any, seen: Any) -> None:
        if seen.state is not ObservedState.ALIVE:
            clean_up(work, seen)

    patch(EngineWork, "_clean_up", only_the_dead)
    patch(Runners, "_directive", lambda *_: Directive(stop=False, grace_ns=0))


# -- I5: our fault --------------------------------------------------------------------------------------------------------


def the_wall_clock_is_believed(patch: Patch) -> None:
    patch(SteadyClock, "__call__", lambda clock: clock._wall())
    patch(SteadyClock, "not_before", lambda *_: None)


def a_failed_commit_fences_the_runner(patch: Patch) -> None:
    """As it was written first: whatever keeps a report from being stored is said to be the runner's fault."""
    report = Runners.report

    def harsh(self: Any, *args: Any) -> Any:
        answer: Any = Future()

        def done(stored: Any) -> None:
            error = stored.exception()
            if error is None:
                answer.set_result(stored.result())
            else:
                answer.set_exception(Fenced("no"))

        report(self, *args).add_done_callback(done)
        return answer

    patch(Runners, "report", harsh)


# -- I6: the books --------------------------------------------------------------------------------------------------------


def a_restart_meters_from_now(patch: Patch) -> None:
    load = plane.world_from

    def forgetful(*args: Any, now: int, **kwargs: Any) -> World:
        world = load(*args, now=now, **kwargs)
        for meter in world.meters.values():
            meter.since_ns = now
        return world

    patch(plane, "world_from", forgetful)


# -- I7: the log ------------------------------------------------------------------------------------------------------------


def a_stop_of_what_waits_is_not_logged(patch: Patch) -> None:
    note = Outcome.note

    def silent(out: Any, event: str, *args: Any, **body: Any) -> None:
        if event != "Cancelled":
            note(out, event, *args, **body)

    patch(Outcome, "note", silent)


# -- I8: stuck --------------------------------------------------------------------------------------------------------------


def nothing_is_cleaned_up(patch: Patch) -> None:
    patch(EngineWork, "_clean_up", lambda *_: None)


def a_restart_forgets_what_is_due(patch: Patch) -> None:
    patch(driver, "_restore_timers", lambda *_args, **_kwargs: None)


def a_restart_forgets_who_waits(patch: Patch) -> None:
    load = plane.world_from

    def forgetful(*args: Any, **kwargs: Any) -> World:
        world = load(*args, **kwargs)
        world.delayed.clear()
        world.timers.clear()
        return world

    patch(plane, "world_from", forgetful)


def the_world_is_trusted_though_the_store_knows_more(patch: Patch) -> None:
    patch(TurnLoop, "_load_if_stale", lambda _: None)


def an_undone_turn_is_kept(patch: Patch) -> None:
    patch(World, "rollback", World.commit)


def a_lost_node_is_the_jobs_failure(patch: Patch) -> None:
    patch(ending, "should_retry", lambda _spec, attempt: attempt.cause is not Cause.NODE_LOST)


PLANTED: Final[tuple[tuple[str, Plant], ...]] = (
    ("I1", an_engine_starts_again_what_it_has),
    ("I1", a_lost_reply_is_taken_for_a_failure),
    ("I1", silence_is_taken_for_a_loss),
    ("I1", a_lease_ends_when_it_ends_here),
    ("I1", asking_to_stop_is_taken_for_having_stopped),
    ("I1", who_led_before_is_obeyed),
    ("I2", room_is_free_when_its_holder_is_asked_to_go),
    ("I3", what_is_not_stored_is_acknowledged),
    ("I3", a_key_is_not_kept_with_what_it_was_for),
    ("I4", what_was_released_and_runs_is_left_running),
    ("I5", the_wall_clock_is_believed),
    ("I5", a_failed_commit_fences_the_runner),
    ("I5", a_lost_node_is_the_jobs_failure),
    ("I6", a_restart_meters_from_now),
    ("I7", a_stop_of_what_waits_is_not_logged),
    ("I8", nothing_is_cleaned_up),
    ("I8", a_restart_forgets_what_is_due),
    ("I8", a_restart_forgets_who_waits),
    ("I8", the_world_is_trusted_though_the_store_knows_more),
    ("I8", an_undone_turn_is_kept),
)

SEEDS: Final[dict[str, int]] = {
    "an_engine_starts_again_what_it_has": 8,
    "a_lost_reply_is_taken_for_a_failure": 0,
    "silence_is_taken_for_a_loss": 36,
    "a_lease_ends_when_it_ends_here": 36,
    "asking_to_stop_is_taken_for_having_stopped": 112,
    "who_led_before_is_obeyed": 29,
    "room_is_free_when_its_holder_is_asked_to_go": 0,
    "what_is_not_stored_is_acknowledged": 0,
    "a_key_is_not_kept_with_what_it_was_for": 0,
    "what_was_released_and_runs_is_left_running": 1,
    "the_wall_clock_is_believed": 3,
    "a_failed_commit_fences_the_runner": 34,
    "a_lost_node_is_the_jobs_failure": 0,
    "a_restart_meters_from_now": 0,
    "a_stop_of_what_waits_is_not_logged": 9,
    "nothing_is_cleaned_up": 0,
    "a_restart_forgets_what_is_due": 27,
    "a_restart_forgets_who_waits": 42,
    "the_world_is_trusted_though_the_store_knows_more": 26,
    "an_undone_turn_is_kept": 8,
}


def found(plant: Plant, *, within: int = WITHIN) -> tuple[int, Broken] | None:
    """The seed by which a planted bug is found, and what it breaks; None when it is not."""
    patch = Patch()
    plant(patch)
    try:
        for seed in _seeds(plant, within):
            if (broken := _broken_by(seed)) is not None:
                return seed, broken
    finally:
        patch.undo()
    return None


def _broken_by(seed: int) -> Broken | None:
    try:
        return broken_by(history(seed))
    except (AssertionError, LookupError, ValueError) as error:  # a bug may also break the code that it is in
        return Broken("I8", f"{type(error).__name__}: {error}")


def _seeds(plant: Plant, within: int) -> Iterator[int]:
    known = SEEDS.get(plant.__name__)
    if known is not None:
        yield known
    yield from range(within)
