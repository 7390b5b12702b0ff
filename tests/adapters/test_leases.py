"""What follows from silence: nothing at first, and a second start only when the first is known to be over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.yard import Yard, gpu_node, spec
from tidemill.control import leases
from tidemill.control.leases import MARGIN_NS, SILENT_AFTER_NS, Leases
from tidemill.core.lifecycle import NODE, apply
from tidemill.model.events import Fact, NodeFellSilent, NodeWentAway
from tidemill.model.fleet import Node, NodeState, Site, SiteKind
from tidemill.model.ids import LaunchId, NodeId, SiteId
from tidemill.model.job import Allocation
from tidemill.testing.samples import a_node
from tidemill.units import MINUTE_NS, SECOND_NS

LEASE_NS = 10 * MINUTE_NS
GRACE_NS = 30 * SECOND_NS


@dataclass
class Place:
    """One site with one node on which one worker runs, and a clock."""

    lease_ns: int = LEASE_NS
    now: int = 0
    launch: LaunchId = LaunchId("run_a-0-1-0")
    node: Node = field(default_factory=lambda: replace(a_node("a"), site_id=SiteId("far")))

    def __post_init__(self) -> None:
        self.leases = Leases(lambda: self.now)
        self.site = Site(id=SiteId("far"), name="far", kind=SiteKind.EDGE, engine="local", lease_ns=self.lease_ns)

    def after(self, ns: int) -> list[Fact]:
        """What is told after that time."""
        self.now += ns
        worker: Any = _Held(self.launch, self.node.id)
        facts = self.leases.overdue(
            [self.node], {self.site.id: self.site}, {self.launch: worker}, lambda _: GRACE_NS, now=self.now
        )
        for fact in facts:
            event = "silenced" if isinstance(fact, NodeFellSilent) else "lost"
            self.node = replace(self.node, state=apply(NODE, self.node.state, event))
        return facts


@dataclass
class _Held:
    id: LaunchId
    node_id: NodeId


def test_a_short_silence_is_nothing() -> None:
    place = Place()
    place.leases.heard([place.node.id])
    assert place.after(SILENT_AFTER_NS) == []
    place.leases.heard([place.node.id])
    assert place.after(SILENT_AFTER_NS) == []


def test_silence_is_told_once_and_loss_only_after_the_lease() -> None:
    place = Place()
    place.leases.heard([place.node.id])
    [silent] = place.after(SILENT_AFTER_NS + 1)
    assert isinstance(silent, NodeFellSilent)
    assert place.after(LEASE_NS - SILENT_AFTER_NS) == []
    [lost] = place.after(GRACE_NS + LEASE_NS // 50 + GRACE_NS // 50 + MARGIN_NS)
    assert isinstance(lost, NodeWentAway)
    assert place.after(LEASE_NS) == []


def test_without_a_lease_nothing_is_ever_started_elsewhere() -> None:
    place = Place(lease_ns=0)
    assert [type(fact) for fact in place.after(SILENT_AFTER_NS + 1)] == [NodeFellSilent]
    assert place.after(1_000 * LEASE_NS) == []


def test_a_worker_that_is_heard_of_keeps_its_silent_node() -> None:
    place = Place()
    place.after(SILENT_AFTER_NS + 1)
    for _ in range(50):
        place.leases.answered(place.launch)
        assert place.after(LEASE_NS // 2) == []


def test_a_control_plane_that_was_away_counts_from_its_return() -> None:
    place = Place(now=5 * LEASE_NS)
    assert place.after(SILENT_AFTER_NS) == []
    assert [type(fact) for fact in place.after(1)] == [NodeFellSilent]
    assert place.after(LEASE_NS - SILENT_AFTER_NS) == []


@dataclass
class Runner:
    """A worker as the runner keeps it: it ends itself a lease and its grace after it last asked and was answered."""

    asked_ns: int
    speed_permille: int

    def is_over(self, now: int) -> bool:
        own = (now - self.asked_ns) * self.speed_permille // 1_000
        return own > LEASE_NS + GRACE_NS


def check_never_two(beats: list[tuple[int, int, bool]], speed_permille: int) -> None:
    """Beats come after a wait, take a while to arrive, and their answers may be lost."""
    place = Place()
    place.leases.heard([place.node.id])
    runner = Runner(asked_ns=0, speed_permille=speed_permille)
    for wait_ns, takes_ns, is_answered in beats:
        asked = place.now + wait_ns
        while place.now < asked + takes_ns:
            step = min(SECOND_NS * 7, asked + takes_ns - place.now)
            if any(isinstance(fact, NodeWentAway) for fact in place.after(step)):
                assert runner.is_over(place.now), "it was started elsewhere while it ran"
                return
        if runner.is_over(place.now):
            return
        place.leases.answered(place.launch)
        if is_answered:
            runner.asked_ns = asked
    while not any(isinstance(fact, NodeWentAway) for fact in place.after(7 * SECOND_NS)):
        assert place.now < 100 * LEASE_NS, "it is never started again"
    assert runner.is_over(place.now), "it was started elsewhere while it ran"


_BEATS = st.lists(st.tuples(st.integers(0, LEASE_NS), st.integers(0, LEASE_NS // 2), st.booleans()), max_size=8)


@settings(max_examples=300, deadline=None)
@given(_BEATS, st.integers(985, 1_015))
def test_never_two_at_once(beats: list[tuple[int, int, bool]], speed_permille: int) -> None:
    check_never_two(beats, speed_permille)


def beats_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leases, "answered", lambda self, launch: None)


def clocks_are_taken_to_agree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases, "DRIFT", 10**9)
    patch.setattr(leases, "MARGIN_NS", 0)


def the_grace_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    over = Leases._is_over

    def without(
        self: Leases, node: Node, lease_ns: int, workers: Iterable[Allocation], grace: Callable[[Allocation], int]
    ) -> bool:
        return over(self, node, lease_ns, workers, lambda _: 0)

    patch.setattr(Leases, "_is_over", without)


@pytest.mark.parametrize("plant", [beats_are_forgotten, clocks_are_taken_to_agree, the_grace_is_forgotten])
def test_the_property_can_fail(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(_BEATS, st.integers(985, 1_015))
    def check(beats: list[tuple[int, int, bool]], speed_permille: int) -> None:
        check_never_two(beats, speed_permille)

    with pytest.raises(AssertionError, match="while it ran"):
        check()


def test_a_silent_node_keeps_what_it_has_and_gets_nothing_new() -> None:
    yard = Yard((gpu_node("a", 1), gpu_node("b", 1)))
    first = yard.submit(spec(1))
    held = yard.world.allocations[next(iter(yard.world.allocations))]
    yard.turn([NodeFellSilent(at_ns=yard.now, node_id=held.node_id, detail="quiet")])
    assert yard.world.nodes[held.node_id].state is NodeState.SILENT
    assert yard.world.allocations[held.id].node_id == held.node_id
    second, third = yard.submit(spec(1)), yard.submit(spec(1))
    nodes = {worker.job_id: worker.node_id for worker in yard.world.allocations.values()}
    assert nodes[second] != held.node_id
    assert third not in nodes
    assert first in nodes
