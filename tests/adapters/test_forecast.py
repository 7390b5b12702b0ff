"""When work would start: exact while few wait; by the pace of the first, and still right, where very many do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from tests.core.history import PROJECTS, RATES, SITE
from tidemill.control import forecast as forecasts
from tidemill.control.driver import Driver, snapshot_of
from tidemill.control.forecast import Copy, Course, Foresight, Pace, copy_of, forecast, likely_starts
from tidemill.core.world import World
from tidemill.engines.simulated import fleet
from tidemill.model.events import NodeJoined, Submitted
from tidemill.model.ids import JobId, OrganizationId, PrincipalId, WorkloadId, job_id
from tidemill.model.job import Workload
from tidemill.model.policy import Policy
from tidemill.model.values import replace
from tidemill.units import SECOND_NS
from tidemill.wire import read_spec

NOW = 1_700_000_000 * SECOND_NS
POLICY = Policy()


def workload(number: int, **fields: Any) -> Workload:
    """The number is its place in order of submission; it takes from one to four minutes of one core."""
    spec = read_spec(
        {"name": "n", "run": "x", "max_duration": f"{number % 4 + 1}m", "resources": {"cpus": 1}} | fields,
        "task",
    )
    return Workload(
        id=WorkloadId(f"wl_{number:06d}"),
        organization_id=OrganizationId("o"),
        project_id=PROJECTS[0].id,
        principal_id=PrincipalId("u"),
        spec=spec,
        submitted_ns=NOW + number,
    )


def world_of(jobs: int, machines: str, fields: Callable[[int], dict[str, Any]] = lambda _: {}) -> World:
    """So many submitted to these machines; those that fit have started."""
    world = World(sites=[SITE], projects=PROJECTS, rates=RATES, policy=POLICY)
    driver = Driver(world, POLICY)
    for facts in (
        [NodeJoined(at_ns=NOW, node=node) for node in fleet(machines, site_id=SITE.id, boot_id="b")],
        [Submitted(at_ns=NOW, workload=workload(number, **fields(number))) for number in range(jobs)],
    ):
        driver.step(facts, now=NOW + SECOND_NS)
        driver.accepted()
    return world


@pytest.fixture(scope="module")
def crowd() -> World:
    return world_of(520, "2xcpu:10cpu")


def whole(world: World) -> Copy:
    """A copy of which nothing is left out."""
    return replace(copy_of(world, POLICY, now=NOW + SECOND_NS), snapshot=snapshot_of(world), behind=0)


def test_those_behind_start_at_the_pace_of_the_first(crowd: World) -> None:
    copy = copy_of(crowd, POLICY, now=NOW + SECOND_NS)
    assert copy.behind == 500 - 200
    assert sum(job.id not in crowd.attempts for job in copy.snapshot.jobs) == 200
    asked = workload(5_000)
    jobs = [job_id(asked.id, 0)]
    exact = forecast(whole(crowd), jobs, submitted=[asked], ahead=500)
    found = forecast(copy, jobs, submitted=[asked], ahead=500)
    assert exact is not None
    assert found is not None
    for name in ("earliest_ns", "likely_ns", "latest_ns"):
        waits, foreseen = getattr(exact, name) - NOW, getattr(found, name) - NOW
        assert abs(foreseen - waits) < waits // 8, name
    assert "of the 500 who wait, the first 200 one by one" in found.basis
    assert "one by one" not in exact.basis


def test_what_fits_beside_the_queue_is_not_put_behind_it() -> None:
    """The third core is free in a minute, and all who wait ask for two."""
    world = world_of(500, "1xcpu:3cpu", lambda number: {"resources": {"cpus": 2 if number else 1}})
    copy = copy_of(world, POLICY, now=NOW + SECOND_NS)
    short = workload(6_000, max_duration="1s")
    found = forecast(copy, [job_id(short.id, 0)], submitted=[short], ahead=498)
    assert found is not None
    assert found.likely_ns == NOW + 61 * SECOND_NS


def test_a_few_who_wait_are_foreseen_one_by_one() -> None:
    world = world_of(30, "1xcpu:2cpu")
    copy = copy_of(world, POLICY, now=NOW + SECOND_NS)
    assert copy.behind == 0
    assert len(likely_starts(copy, list(world.jobs))) == 30


def test_all_who_wait_get_an_instant_in_their_order(crowd: World) -> None:
    order = [one for _, one in crowd.queue.in_order(None, now=NOW + SECOND_NS)]
    starts = likely_starts(copy_of(crowd, POLICY, now=NOW + SECOND_NS), order)
    assert list(starts) == order
    exact = likely_starts(whole(crowd), order)
    behind = order[300:]
    assert [starts[one] for one in behind] == sorted(starts[one] for one in behind)
    assert all(abs(starts[one] - exact[one]) < (exact[one] - NOW) // 5 for one in behind)


def test_without_a_start_there_is_no_pace() -> None:
    assert Course(starts={}, began_ns=NOW, started=0, at_ns=NOW).pace_ns(5) is None
    assert Course(starts={}, began_ns=NOW, started=9, at_ns=NOW).pace_ns(50) is None
    paced = Course(starts={}, began_ns=NOW, started=10, at_ns=NOW + 100)
    assert [paced.pace_ns(ahead) for ahead in (0, 9, 19)] == [NOW + 100, NOW + 100, NOW + 200]


class Asked:
    """Turns whose world stands still, and which count how often they are looked at."""

    def __init__(self, world: World) -> None:
        self.world, self.last_seq, self.looks = world, 1, 0

    def look(self, look: Callable[[World], Any]) -> Any:
        self.looks += 1
        return look(self.world)

    def ask(self, *_: object) -> Future[Any]:
        raise AssertionError("no turn is needed")


@pytest.mark.parametrize(("jobs", "is_shared"), [(30, False), (500, True)])
def test_a_forecast_is_shared_until_something_changes(jobs: int, is_shared: bool) -> None:
    world = world_of(jobs, "1xcpu:2cpu")
    turns, clock = Asked(world), [0]
    foresight = Foresight(turns, POLICY, monotonic=lambda: clock[0])  # type: ignore[arg-type]
    order = [one for _, one in world.queue.in_order(None, now=NOW)]
    found = [foresight.forecast(one, ahead, now=NOW) for ahead, one in enumerate(order[-20:], len(order) - 20)]
    assert turns.looks == 1
    starts = [one.likely_ns for one in found if one is not None]
    assert starts == sorted(starts)
    assert len(starts) == 20
    turns.last_seq += 1
    foresight.forecast(order[-1], len(order) - 1, now=NOW)
    assert (turns.looks == 1) is is_shared
    clock[0] = 10 * SECOND_NS
    turns.last_seq += 1
    foresight.forecast(order[-1], len(order) - 1, now=NOW)
    assert turns.looks == (2 if is_shared else 3)


def test_a_pace_that_forgets_those_ahead_is_caught(crowd: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts.Course, "pace_ns", lambda self, _: self.at_ns)
    with pytest.raises(AssertionError):
        test_those_behind_start_at_the_pace_of_the_first(crowd)


def test_every_pace_is_in_the_shared_forecast() -> None:
    world = world_of(10, "1xcpu:2cpu")
    found = Foresight(Asked(world), POLICY).forecast(JobId("job_000009-0"), 7, now=NOW)  # type: ignore[arg-type]
    assert found is not None
    assert found.earliest_ns < found.likely_ns <= found.latest_ns
    assert len(Pace) == 3
