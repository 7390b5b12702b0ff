"""What the control plane makes of reports: how many replicas, before and after a restart, and what outlives it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

from tests.core.test_replicas import JOBS, WORKLOAD, yard
from tests.core.yard import Yard, gpu_node, spec
from tidemill.control.loads import Load, ModelLoad
from tidemill.control.replicating import Scaler, _gpu_use
from tidemill.model.events import Sampled
from tidemill.model.ids import NodeId
from tidemill.model.scaling import SLOT_NS, Habit
from tidemill.model.spec import Kind, Port, Service
from tidemill.store.memory import MemoryStore
from tidemill.units import SECOND_NS


class Watch:
    """Both clocks of a control plane, set by hand."""

    def __init__(self) -> None:
        self.now = 10 * SLOT_NS

    def monotonic(self) -> float:
        return self.now / SECOND_NS

    def clock(self) -> int:
        return self.now

    def later(self, seconds: float) -> None:
        self.now += round(seconds * SECOND_NS)


def scaler(made: Yard, watch: Watch, store: MemoryStore) -> Scaler:
    done: Future[None] = Future()
    done.set_result(None)
    return Scaler(
        world=lambda: made.world,
        tell=lambda facts: done,
        clock=watch.clock,
        habits=store,
        monotonic=watch.monotonic,
    )


def asked(made: Yard, count: int) -> Load:
    """A report of so many requests that wait for the yard's service."""
    name = made.world.workloads[WORKLOAD].spec.name
    return Load(models={name: ModelLoad(in_flight=0, waiting=count)})


def impatient() -> Yard:
    """A service that gives up what it does not need at once."""
    made = Yard(nodes=(gpu_node("a", 8),))
    service = Service(port="http", replicas=3, replicas_min=0, idle_ns=0)
    made.submit(spec(1, kind=Kind.SERVICE, service=service, ports=(Port(name="http"),)), runs_s=10**6)
    made.run(1)
    return made


def test_requests_bring_replicas_and_a_restart_takes_none_away_before_all_gateways_were_heard() -> None:
    made, watch, store = impatient(), Watch(), MemoryStore()
    first = scaler(made, watch, store)
    assert first.facts() == [], "nobody asks"
    first.hear("here:1/a", asked(made, 600))
    [scaled] = first.facts()
    assert (scaled.wanted, scaled.why) == (1, "none is ready yet")
    made.turn([scaled])
    made.run(1)
    after = scaler(made, watch, store)
    story = []
    for second in range(12):
        watch.later(1)
        if second >= 3:
            after.hear("here:1/a", asked(made, 600 if second < 8 else 0))
        facts = after.facts()
        account = after.account(WORKLOAD)
        assert account is not None
        story.append((second, account.wanted, len(facts)))
    assert [one for one in story if one[0] < 8] == [(second, 1, 0) for second in range(8)]
    assert story[8][1:] == (0, 1), "once all were heard and nobody asks, it goes"
    assert after.account(WORKLOAD).why == "0 requests, 256 at a time each"  # type: ignore[union-attr]


def test_a_gateway_that_is_silent_keeps_what_it_may_need() -> None:
    made, watch, store = impatient(), Watch(), MemoryStore()
    watched = scaler(made, watch, store)
    watch.later(10)
    watched.hear("here:1/a", asked(made, 1))
    [scaled] = watched.facts()
    made.turn([scaled])
    made.run(1)
    watched.hear("there:1/b", asked(made, 0))
    for _ in range(5):
        watch.later(1)
        watched.hear("there:1/b", asked(made, 0))
        assert watched.facts() == []
    watched.hear("here:1/a", asked(made, 0))
    [gone] = watched.facts()
    assert (gone.wanted, gone.give_up) == (0, (JOBS[0],))


def test_what_is_learned_of_a_day_is_stored_and_known_after_a_restart() -> None:
    made, watch, store = yard(), Watch(), MemoryStore()
    made.run(1)
    first = scaler(made, watch, store)
    for _ in range(0, 330, 10):
        first.hear("here:1/a", asked(made, 512))
        first.facts()
        watch.later(10)
    [habit] = store.habits()
    spec = made.world.workloads[WORKLOAD].spec
    assert (habit.service, max(habit.pattern.days), max(habit.pattern.means_milli)) == (spec.name, 1, 2_000)
    known = replace(habit.pattern, days=(5,) * len(habit.pattern.days))
    store.put_habit(Habit(project_id=habit.project_id, service=spec.name, pattern=known, starts_ns=(90 * SECOND_NS,)))
    after = scaler(made, watch, store)
    after.facts()
    account = after.account(WORKLOAD)
    assert account is not None
    assert (account.days, account.lead_ns, account.has_pattern) == (5, 90 * SECOND_NS, False)


def test_how_busy_gpus_are_is_of_the_devices_that_a_replica_holds_and_of_now() -> None:
    made = yard(least=1)
    made.run(1)
    attempt = made.world.attempts[JOBS[0]]
    [held] = made.world.workers_of(attempt)
    mine = [share.device_id for share in held.devices]
    others = [device.id for device in made.world.nodes[held.node_id].devices if device.id not in mine]
    use = tuple((str(one), 900) for one in mine) + tuple((str(one), 100) for one in others)
    made.turn([Sampled(at_ns=made.now, node_id=held.node_id, energy_mj=(), use_milli=use)])
    made.turn([Sampled(at_ns=made.now, node_id=NodeId("unknown"), energy_mj=(), use_milli=(("gpu", 5),))])
    assert _gpu_use(made.world, JOBS[:1], now=made.now) == 900
    assert _gpu_use(made.world, JOBS[1:], now=made.now) is None
    assert _gpu_use(made.world, JOBS[:1], now=made.now + 60 * SECOND_NS) is None, "that was long ago"
