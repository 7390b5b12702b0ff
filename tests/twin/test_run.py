"""The twin itself: small runs whose figures are known, and promises that hold in every run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisException

from tests.twin.small import OPS, Auditor, audited, away, conditions, job, spec, stop, stream_of
from tidemill.model.events import NodeJoined
from tidemill.model.ids import ProjectId, QueueId
from tidemill.model.queue import Queue
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Alternative
from tidemill.model.values import replace
from tidemill.twin import machines as machines_module
from tidemill.twin import measure as measure_module
from tidemill.twin.arrivals import Arrival, Outside
from tidemill.twin.machines import Machines
from tidemill.twin.measure import Measures, Series, jain, share_error
from tidemill.twin.report import figures
from tidemill.twin.run import Result, run
from tidemill.units import MILLI, SECOND_NS

HOUR = 3_600.0
DELAY_NS = 3 * SECOND_NS


def test_two_jobs_that_cannot_run_together_follow_each_other() -> None:
    result, auditor = audited([job(0, 100, 2), job(10, 50, 1)], conditions())
    found = figures(result)
    assert found["makespan_s"] == 150
    assert (found["wait_s"]["mean"], found["wait_s"]["max"]) == (45, 90)
    assert (found["jct_s"]["mean"], found["jct_s"]["max"]) == (120, 140)
    assert found["slowdown"]["mean"] == pytest.approx((1 + 140 / 50) / 2, abs=1e-3)
    assert found["utilization"] == pytest.approx((2 * 100 + 50) / (2 * 150), abs=1e-4)
    assert found["cost_micro"] == auditor.billed == 250 * 1_000
    assert found["gpu_h"] == pytest.approx(250 / 3_600, abs=1e-3)
    assert result.left == 0


def test_a_start_takes_its_delay_and_counts_as_held_not_as_waiting() -> None:
    found = figures(run(iter([job(0, 100, 1)]), conditions(start_delay_ns=20 * SECOND_NS)))
    assert (found["wait_s"]["mean"], found["jct_s"]["mean"], found["cost_micro"]) == (0, 120, 120 * 1_000)


def test_what_a_limit_never_allows_is_refused_at_the_door_too() -> None:
    queue = Queue(id=QueueId("q"), name="t", project_id=ProjectId("t"), limit=(("gpu", 1_000),))
    result = run(iter([job(0, 1, 2), job(0, 1, 1), job(1, 1, 2, tenant="u")]), conditions(queues=(queue,)))
    assert dict(result.measures.refused) == {"QueueLimit": 1}
    assert result.measures.states == {"succeeded": 2}


def test_what_the_fleet_can_never_run_is_refused_at_the_door() -> None:
    result = run(iter([job(0, 1, 64), job(0, 1, 1)]), conditions())
    assert dict(result.measures.refused) == {"NoNodeWithEnoughGpus": 1}
    assert result.measures.states == {"succeeded": 1}


def test_a_user_stops_what_runs_and_what_waits() -> None:
    items = [job(0, 500, 2, name="wl_a"), job(1, 500, 2, name="wl_b"), stop(10, "wl_b"), stop(100, "wl_a")]
    result = run(iter(items), conditions())
    assert result.measures.states == {"cancelled": 2}
    assert figures(result)["jct_s"]["mean"] == 0, "only what ended well has a completion time"


def lost_machine(**more: object) -> Result:
    setting = conditions("1xH100:8")
    again = NodeJoined(at_ns=0, node=replace(setting.nodes[0], boot_id="again"))
    return run(iter([job(0, 1_000, 8, **more), away(600, "n00000"), Outside(610 * SECOND_NS, again)]), setting)


def test_a_lost_machine_costs_all_work_since_the_last_checkpoint() -> None:
    found = figures(lost_machine())
    assert found["requeues"] == {"node_lost": 1}
    assert found["lost_gpu_h"] == pytest.approx(8 * 600 / HOUR, abs=1e-3)
    assert found["jct_s"]["mean"] == 610 + 1_000, "it began anew"


def test_a_stop_with_grace_saves_and_one_without_does_not() -> None:
    """Stopped by its time limit, since that is a stop that any policy gives; what it did is kept or lost."""
    for saves, lost in ((True, 0.0), (False, 300 / HOUR)):
        limited = job(0, 1_000, 1, max_duration_ns=300 * SECOND_NS, saves_on_stop=saves)
        result = run(iter([limited]), conditions())
        assert result.measures.states == {"failed": 1}
        assert figures(result)["lost_gpu_h"] == pytest.approx(lost, abs=1e-3)


def test_slower_resources_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines_module, "speed_milli", lambda _spec, _choice: 500)
    assert figures(run(iter([job(0, 100, 1)]), conditions()))["jct_s"]["mean"] == 200


def test_the_speed_of_a_choice_is_its_own() -> None:
    from tidemill.twin.cloud import speed_milli

    slow = Alternative(resources=Resources(gpus=GpuRequest(model="T4")), speed_milli=250)
    fast = Alternative(resources=Resources(gpus=GpuRequest(model="B200")), speed_milli=2_000)
    assert [speed_milli(spec(any_of=(slow, fast)), choice) for choice in range(3)] == [1_000, 250, 2_000]
    assert [speed_milli(spec(any_of=(slow, fast), by_speed=True), choice) for choice in range(3)] == [2_000, 1_000, 250]
    assert speed_milli(spec(), 0) == MILLI


def test_a_run_can_end_before_its_work_does() -> None:
    result = run(iter([job(0, 1_000), job(5_000, 10)]), conditions(), until_ns=500 * SECOND_NS)
    assert (figures(result)["virtual_s"], result.left) == (500, 1)
    assert result.measures.gpu_ns == 500 * SECOND_NS * MILLI
    assert result.measures.amount_micro == 500 * 1_000, "the books are closed at the end"


def test_an_empty_stream_is_a_run() -> None:
    found = figures(run(iter([]), conditions()))
    assert (found["turns"], found["jobs"]["submitted"], found["utilization"]) == (1, 0, 0)


def test_idle_gpus_that_no_worker_of_the_mix_can_use_are_fragments() -> None:
    """One of two GPUs is taken for an hour while the mix asks for two at a time."""
    items = [job(0, 1 * HOUR, 1), *(job(1, 60, 2) for _ in range(99))]
    found = figures(run(iter(items), conditions()))
    assert found["fragmentation"] > 0.9


# --- promises ---


def check(result: Result, auditor: Auditor) -> None:
    measures = result.measures
    assert not auditor.wrong, auditor.wrong
    assert result.left == 0 or "node_lost" in auditor.seen, "only a gang that no longer fits waits for ever"
    assert sum(measures.states.values()) + result.left == measures.submitted_jobs == len(auditor.submitted)
    assert measures.gpu_ns == auditor.gpu_ns + auditor.holding * (measures.now - auditor.now)
    assert measures.gpu_ns == sum(who.gpu_ns for who in measures.tenants.values())
    assert sum(who.amount_micro for who in measures.tenants.values()) == measures.amount_micro >= auditor.billed
    assert measures.jct.total >= measures.wait.total
    assert measures.held_milli == measures.running_jobs == 0
    assert measures.waiting_jobs == result.left
    assert measures.waiting_milli == sum(who.wants_milli for who in measures.tenants.values())
    assert result.left or not measures.waiting_milli
    assert all(who.held_milli == 0 for who in measures.tenants.values())
    series = measures.series
    assert (
        sum(series.values["held"]) * series.width_ns * MILLI >= measures.gpu_ns * (1 - 1e-6)
        or len(series.values["held"]) == 1
    )
    assert measures.slowdown.count == 0 or measures.slowdown.mean >= 1


def all_did_their_work(result: Result, items: list[Arrival | Outside]) -> bool:
    """Whether all GPU time is explained, where nothing was stopped or lost: each job's start and its work."""
    measures = result.measures
    if measures.states.keys() != {"succeeded"} or measures.requeues or measures.refused or result.left:
        return True
    arrived = [item for item in items if isinstance(item, Arrival)]
    milli = [
        one.spec.nodes * (one.spec.resources.gpus.total_milli if one.spec.resources.gpus else 0) for one in arrived
    ]
    wanted = sum((one.duration_ns + DELAY_NS) * size for one, size in zip(arrived, milli, strict=True))
    return measures.gpu_ns == wanted


def play(ops: list[tuple[int, int, float, int, int]]) -> None:
    items = stream_of(ops)
    result, auditor = audited(items, conditions("2xH100:4,1xH100:4:64", start_delay_ns=DELAY_NS))
    check(result, auditor)
    assert all_did_their_work(result, items)


@given(OPS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_run_keeps_its_promises(ops: list[tuple[int, int, float, int, int]]) -> None:
    play(ops)


def found_in_runs(attempts: int = 150) -> bool:
    @given(OPS)
    @settings(max_examples=attempts, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def look(ops: list[tuple[int, int, float, int, int]]) -> None:
        play(ops)

    try:
        look()
    except (AssertionError, KeyError, ExceptionGroup, HypothesisException):
        return True
    return False


def ends_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = Machines._go_on

    def hurried(self: Machines, gang: object, now: int) -> None:
        gang.done_ns += 1_000_000_000  # type: ignore[attr-defined]
        go_on(self, gang, now)  # type: ignore[arg-type]

    monkeypatch.setattr(Machines, "_go_on", hurried)


def forgets_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = Measures._allocated
    monkeypatch.setattr(
        Measures, "_allocated", lambda self, held, is_new: allocated(self, held, is_new=is_new) if is_new else None
    )


def counts_held_time_late(monkeypatch: pytest.MonkeyPatch) -> None:
    took = Measures.took

    def late(self: Measures, plan: object, now: int) -> object:
        ended = took(self, plan, now)  # type: ignore[arg-type]
        self.now = max(self.start_ns, self.now - 1_000_000)
        return ended

    monkeypatch.setattr(Measures, "took", late)


def forgets_who_was_cancelled_while_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "is_terminal", lambda state: state.value in ("succeeded", "failed"))


BUGS = [
    ends_too_early,
    forgets_releases,
    counts_held_time_late,
    forgets_who_was_cancelled_while_it_waited,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert found_in_runs()


# --- measures ---


def test_a_series_halves_itself_and_keeps_its_means() -> None:
    series = Series(("x",), 0, width_ns=10)
    total = 0.0
    for index in range(1_000):
        now = (index + 1) * 10
        total += 10.0 * index
        if now == series.ends_ns:
            series.close(now, (total,))
    column = series.values["x"]
    assert len(column) < measure_module.MOST_BUCKETS
    assert sum(column) / len(column) == pytest.approx((len(column) * series.width_ns / 10 - 1) / 2)


def test_fairness_figures() -> None:
    assert jain([]) == jain([5.0]) == 1.0
    assert share_error([], 8) == 0.0
    assert share_error([(2, 2, 1), (6, 10, 1)], 8) == 0.0, "who wants less leaves the rest to others"
    assert share_error([(8, 8, 1), (0, 24, 3)], 8) == 0.75
    assert share_error([(2, 8, 1), (6, 24, 3)], 8) == 0.0


def test_ticks_gather_what_happens() -> None:
    items = [job(at, 45 + at % 7, 1 + at % 2) for at in range(0, 3_000, 9)]
    exact, coarse = (run(iter(items), conditions(tick_ns=tick)) for tick in (0, 20 * SECOND_NS))
    assert coarse.measures.turns < exact.measures.turns * 0.8
    assert coarse.measures.states == exact.measures.states
    assert coarse.measures.jct.count == len(items)
    assert figures(coarse)["makespan_s"] % 20 == 0
    found, _ = audited([job(0, 100, 2), job(10, 50, 1)], conditions(tick_ns=60 * SECOND_NS))
    assert figures(found)["wait_s"]["max"] == 60, "submitted at 60 s, placed at 120 s, when the first was seen to end"


def test_memory_does_not_grow_with_the_number_of_jobs() -> None:
    """After warm-up, what the run keeps is the same however many jobs went through it."""
    kinds = [job(0, 45 + number, 1 + number % 2, tenant=f"t{number % 3}") for number in range(30)]

    def kept(jobs: int) -> int:
        seen: list[int] = []

        def stream() -> Iterator[Arrival]:
            for number in range(jobs):
                if number == jobs - 1:
                    gc.collect()
                    seen.append(len(gc.get_objects()))
                yield replace(kinds[number % 30], at_ns=number * 60 * SECOND_NS)

        run(stream(), conditions("2xH100:4"))
        return seen[0]

    kept(100)
    assert kept(900) < kept(300) + 200
