"""Places for gangs: what every placement promises, and for each promise a planted bug that the test catches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.core.yard import GB, gpu_node
from tidemill.core import place, score
from tidemill.core.feasible import Shape, workers_that_fit
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import Gang, Place, Placed, fits, place_gang
from tidemill.core.score import Tide
from tidemill.model.fleet import Level, Mig, Node
from tidemill.model.mig import MEDIA, Profile
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.values import replace
from tidemill.units import MILLI

REQUESTS = (
    None,
    GpuRequest(count=1),
    GpuRequest(count=2),
    GpuRequest(count=4),
    GpuRequest(milli=300),
    GpuRequest(milli=700),
    GpuRequest(share_bytes=30 * GB),
    GpuRequest(model="A10", count=1),
    GpuRequest(profile="1g.10gb"),
    GpuRequest(profile="3g.40gb"),
    GpuRequest(profile="1g.10gb+me"),
)


def machine(at: int, kind: str) -> Node:
    """A node of one of four kinds, in a rack of three."""
    name = f"n{at:02d}"
    where = {"rack": f"r{at // 3}", "block": f"b{at // 6}"}
    if kind == "small":
        return gpu_node(name, 2, model="A10", cpus=8, **where)
    if kind == "none":
        return gpu_node(name, 0, cpus=16, **where)
    node = gpu_node(name, 4, cpus=32, **where)
    devices = [replace(device, island=device.index // 2) for device in node.devices]
    if kind == "cut":
        devices = [replace(device, mig=Mig.DYNAMIC) if device.index < 2 else device for device in devices]
    if kind == "mixed":
        devices[3] = replace(devices[3], memory_bytes=40 * GB)
    return replace(node, devices=tuple(devices))


@dataclass(frozen=True)
class Ask:
    """A gang to place, or (``back``) one of those that are placed to give back."""

    gang: Gang
    back: int | None = None


KINDS = st.lists(st.sampled_from(["whole", "small", "none", "cut", "mixed"]), min_size=1, max_size=9)
LEVELS = st.sampled_from([None, None, None, Level.HOST, Level.RACK, Level.BLOCK])
GANGS = st.builds(
    lambda request, cpus, workers, elastic, within, prefer, spread: Gang(
        choices=(Shape(Resources(gpus=request, cpu_milli=cpus * MILLI, memory_bytes=cpus * GB)),),
        workers=workers,
        smallest=max(1, workers // 2) if elastic else workers,
        within=within,
        prefer=prefer if within is None else None,
        spread=spread if within is None else None,
    ),
    st.sampled_from(REQUESTS),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 1, 1, 2, 3, 6]),
    st.booleans(),
    LEVELS,
    LEVELS,
    LEVELS,
)
ASKS = st.lists(st.builds(Ask, GANGS, st.sampled_from([None, None, None, 0, 1, 2])), min_size=1, max_size=12)


def laid(kinds: list[str], order: int = 1) -> FleetArrays:
    fleet = FleetArrays()
    fleet.rebuild([machine(at, kind) for at, kind in enumerate(kinds)][::order])
    return fleet


def give(fleet: FleetArrays, gang: Gang, placed: Placed) -> None:
    resources = gang.choices[placed.choice].resources
    for each in placed.places:
        fleet.give(
            each.node_id, cpu_milli=resources.cpu_milli, memory_bytes=resources.memory_bytes, devices=each.devices
        )


def play(
    fleet: FleetArrays,
    asks: list[Ask],
    *,
    policy: Tide | None = None,
    check: Callable[[FleetArrays, Gang, Placed | None, dict[int, tuple[Gang, Placed]]], None] | None = None,
    forget: bool = False,
) -> list[Placed | None]:
    """Place and give back as asked; with ``forget``, nothing that was worked out earlier is used."""
    policy = policy or Tide()
    live: dict[int, tuple[Gang, Placed]] = {}
    found: list[Placed | None] = []
    for number, ask in enumerate(asks):
        if forget:
            fleet.cache.clear()
        if ask.back is not None and live:
            gang, placed = live.pop(list(live)[ask.back % len(live)])
            give(fleet, gang, placed)
            continue
        answer = place_gang(fleet, ask.gang, score=policy)
        if answer is not None:
            live[number] = ask.gang, answer
        found.append(answer)
        if check is not None:
            check(fleet, ask.gang, answer, live)
    return found


# -- the promises -----------------------------------------------------------------------------------------------------


def never_over_capacity(
    fleet: FleetArrays, _gang: Gang, _placed: Placed | None, live: dict[int, tuple[Gang, Placed]]
) -> None:
    """Counted from the places alone: no core, byte or device is given twice, and no MIG slice."""
    cpu: dict[str, int] = {}
    devices: dict[str, int] = {}
    slices: dict[tuple[str, int], int] = {}
    for gang, placed in live.values():
        resources = gang.choices[placed.choice].resources
        for each in placed.places:
            cpu[each.node_id] = cpu.get(each.node_id, 0) + resources.cpu_milli
            row = fleet.row[each.node_id]
            assert len({(share.device_id, share.slice) for share in each.devices}) == len(each.devices)
            for share in each.devices:
                column = fleet.column(row, share.device_id)
                assert column >= 0, "the device is the node's"
                devices[share.device_id] = devices.get(share.device_id, 0) + share.milli
                assert bool(share.profile) == bool(fleet.is_cut[row, column]), "slices of cut devices, nothing else"
                if share.profile:
                    profile = fleet.geometry[row, column].profile(share.profile)
                    assert profile is not None
                    assert share.slice in profile.starts, "a start that the geometry allows"
                    media = [MEDIA] if share.profile.endswith("+me") else []
                    for at in [*range(share.slice, share.slice + profile.size), *media]:
                        key = share.device_id, at
                        slices[key] = slices.get(key, 0) + 1
    assert all(amount <= fleet.cpu_total[fleet.row[node]] for node, amount in cpu.items())  # type: ignore[index]
    assert all(amount <= MILLI for amount in devices.values())
    assert all(count == 1 for count in slices.values())


def all_or_nothing(
    fleet: FleetArrays, gang: Gang, placed: Placed | None, _live: dict[int, tuple[Gang, Placed]]
) -> None:
    """From the smallest gang to all of it, each worker with what it asked for; a refusal only where it does not fit."""
    if placed is None:
        assert not fits(fleet, gang)
        return
    assert gang.smallest <= len(placed.places) <= gang.workers
    request = gang.choices[placed.choice].resources.gpus
    for each in placed.places:
        row = fleet.row[each.node_id]
        assert len(each.devices) == (request.count if request is not None else 0)
        for share in each.devices:
            column = fleet.column(row, share.device_id)
            if request is not None and request.share_bytes:
                memory = int(fleet.gpu_memory[row, column])
                assert (share.milli - 1) * memory < MILLI * request.share_bytes <= share.milli * memory
            elif request is not None and not request.profile:
                assert share.milli == request.milli


def lies_as_asked(fleet: FleetArrays, gang: Gang, placed: Placed | None, _live: dict[int, tuple[Gang, Placed]]) -> None:
    """Within one domain, or one worker in each."""
    if placed is None:
        return
    rows = [fleet.row[each.node_id] for each in placed.places]
    if gang.within is not None:
        assert len(set(fleet.domains(gang.within)[rows].tolist())) == 1
    if gang.spread is not None:
        assert len(set(fleet.domains(gang.spread)[rows].tolist())) == len(rows)


def remembers_rightly(
    fleet: FleetArrays, gang: Gang, _placed: Placed | None, _live: dict[int, tuple[Gang, Placed]]
) -> None:
    """What is remembered of a shape is what would be worked out now."""
    shape, policy = gang.choices[0], Tide()
    place._ranked(fleet, shape, policy)
    table, room = fleet.cache[shape, policy.name], place._room_now(fleet, shape).room.copy()
    key = table.key.copy()
    kept = dict(fleet.cache)
    fleet.cache.clear()
    fresh = place._ranked(fleet, shape, policy)[0]
    assert key.tolist() == fresh.key.tolist()
    assert room.tolist() == workers_that_fit(fleet, shape).tolist()
    assert place._room_now(fleet, shape).total == room.sum()
    assert ((room > 0) == (key != score.NEVER)).all(), "one fits exactly where some fit"
    fleet.cache.clear()
    fleet.cache.update(kept)


def same_without_memory(kinds: list[str], asks: list[Ask]) -> None:
    assert play(laid(kinds), asks) == play(laid(kinds), asks, forget=True)


def same_in_any_order(kinds: list[str], asks: list[Ask]) -> None:
    assert play(laid(kinds), asks) == play(laid(kinds, -1), asks)


def rolls_back_exactly(kinds: list[str], asks: list[Ask]) -> None:
    """After a rollback the columns, and what follows from them, are as if it had never happened."""
    fleet, policy = laid(kinds), Tide()
    half = len(asks) // 2
    play(fleet, asks[:half], policy=policy)
    before, mark = fleet.free().copy(), fleet.checkpoint()
    play(fleet, asks[half:], policy=policy)
    fleet.rollback(mark)
    assert all((one == other).all() for one, other in zip(before, fleet.free(), strict=True))
    twin = laid(kinds)
    play(twin, asks[:half])
    assert play(fleet, asks[half:], policy=policy) == play(twin, asks[half:], forget=True)


def plain_loops() -> Tide:
    """The default policy through its loops, as the interpreter runs them."""
    policy = Tide()
    policy._loop, policy._rank = score._tide_loop(score._as_it_is), score._tide_rank(score._as_it_is)
    return policy


def same_through_loops(kinds: list[str], asks: list[Ask]) -> None:
    assert play(laid(kinds), asks) == play(laid(kinds), asks, policy=plain_loops())


CHECKS = [never_over_capacity, all_or_nothing, lies_as_asked, remembers_rightly]
TWINS = [same_without_memory, same_in_any_order, rolls_back_exactly, same_through_loops]


@pytest.mark.parametrize("check", CHECKS)
@given(kinds=KINDS, asks=ASKS)
@settings(max_examples=150, deadline=None)
def test_every_placement_keeps(check: Any, kinds: list[str], asks: list[Ask]) -> None:
    play(laid(kinds), asks, check=check)


@pytest.mark.parametrize("check", TWINS)
@given(kinds=KINDS, asks=ASKS)
@settings(max_examples=100, deadline=None)
def test_two_ways_give_the_same_places(check: Any, kinds: list[str], asks: list[Ask]) -> None:
    check(kinds, asks)


def test_compiled_loops_give_the_same_places() -> None:
    pytest.importorskip("numba")
    compiled = Tide(compiled=True)

    @given(kinds=KINDS, asks=ASKS)
    @settings(max_examples=150, deadline=None)
    def same(kinds: list[str], asks: list[Ask]) -> None:
        assert play(laid(kinds), asks) == play(laid(kinds), asks, policy=compiled)

    same()


# -- the planted bugs -------------------------------------------------------------------------------------------------


def takes_half_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    take = FleetArrays.take
    monkeypatch.setattr(
        FleetArrays, "take", lambda self, node, **kw: take(self, node, **(kw | {"devices": kw["devices"][1:]}))
    )


def forgets_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetArrays, "slice_bits", lambda *_: 0)


def forgets_media_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Profile, "has_media", property(lambda _: False))


def drops_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    many = place._place_many
    monkeypatch.setattr(place, "_place_many", lambda *args, **how: many(*args, **how)[:-1])


def leaves_the_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_smallest_domain", lambda _fleet, _level, _gang, _room, rows, **_: rows)


def crowds_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_one_per_domain", lambda _fleet, _level, rows: rows)


def misses_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    since = FleetArrays.touched_since
    monkeypatch.setattr(
        FleetArrays, "touched_since", lambda self, seen: since(self, seen)[:1] if seen > 0 else since(self, seen)
    )


def prefers_early_names(monkeypatch: pytest.MonkeyPatch) -> None:
    lay = FleetArrays._lay

    def in_given_order(self: FleetArrays, nodes: list[Node]) -> None:
        lay(self, nodes)
        if nodes and nodes[0].id != self.nodes[0].id:
            self.seed_order = self.seed_order[::-1].copy()

    monkeypatch.setattr(FleetArrays, "_lay", in_given_order)


def undoes_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    rollback = FleetArrays.rollback

    def silently(self: FleetArrays, mark: int) -> None:
        touches = self.touches
        rollback(self, mark)
        self.touches = touches

    monkeypatch.setattr(FleetArrays, "rollback", silently)


def skips_memory_in_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    of = score.Tide.best

    def best(self: Tide, fleet: Any, want: Any, table: Any) -> int | None:
        return of(self, fleet, replace(want, cpu_milli=1), table)

    monkeypatch.setattr(score.Tide, "best", best)


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (takes_half_of_devices, never_over_capacity),
        (forgets_slices, never_over_capacity),
        (forgets_media_engines, never_over_capacity),
        (drops_a_worker, all_or_nothing),
        (leaves_the_domain, lies_as_asked),
        (crowds_together, lies_as_asked),
        (misses_what_changed, remembers_rightly),
        (misses_what_changed, same_without_memory),
        (prefers_early_names, same_in_any_order),
        (undoes_in_silence, rolls_back_exactly),
        (skips_memory_in_loops, same_through_loops),
    ],
)
def test_planted_bugs_are_caught(plant: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    @given(kinds=KINDS, asks=ASKS)
    @settings(max_examples=500, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def found(kinds: list[str], asks: list[Ask]) -> None:
        if check in TWINS:
            check(kinds, asks)
        else:
            play(laid(kinds), asks, check=check)

    with pytest.raises((AssertionError, IndexError, ValueError, RuntimeError, ExceptionGroup, HypothesisException)):
        found()


# -- stories ----------------------------------------------------------------------------------------------------------


def test_a_gang_whose_workers_one_node_holds_is_not_scattered() -> None:
    fleet = laid(["whole"] * 6)
    placed = place_gang(
        fleet, Gang(choices=(Shape(Resources(gpus=GpuRequest(count=1))),), workers=4, smallest=4), score=Tide()
    )
    assert placed is not None
    assert len({each.node_id for each in placed.places}) == 1
    assert isinstance(placed.places[0], Place)


def test_changes_older_than_the_ring_are_not_missed() -> None:
    """The ring of changes is short: who has not looked for long looks at every node again."""
    fleet, policy = laid(["whole"] * 3), plain_loops()
    one = Gang(choices=(Shape(Resources(gpus=GpuRequest(milli=300))),), workers=1, smallest=1)
    other = Gang(choices=(Shape(Resources(gpus=GpuRequest(milli=700))),), workers=1, smallest=1)
    for _ in range(3):
        assert place_gang(fleet, one, score=policy) is not None
        for _ in range(len(fleet.recent) + 3):
            placed = place_gang(fleet, other, score=policy)
            assert placed is not None
            give(fleet, other, placed)
    table = fleet.cache[one.choices[0], policy.name]
    place._ranked(fleet, one.choices[0], policy)
    fresh = laid(["whole"] * 3)
    for column in ("cpu_free", "memory_free", "gpu_free"):
        getattr(fresh, column)[:] = getattr(fleet, column)
    assert table.key.tolist() == place._ranked(fresh, one.choices[0], Tide())[0].key.tolist()
    assert np.max(table.key) > score.NEVER


@pytest.mark.parametrize(
    ("model", "gib", "profile", "most"),
    [("H100-SXM", 80, "1g.10gb", 7), ("H100-SXM", 80, "1g.10gb+me", 1), ("H100-SXM", 80, "1g.20gb", 4), ("A30", 24, "2g.12gb", 2),
     ("A30", 24, "2g.12gb+me", 1), ("B300-SXM", 288, "3g.135gb", 2), ("RTX-PRO-6000-Blackwell", 96, "1g.24gb", 4)],
)  # fmt: skip
def test_a_device_has_as_many_slices_as_its_maker_says(model: str, gib: int, profile: str, most: int) -> None:
    node = gpu_node("a", 1, model=model, cpus=64)
    device = replace(node.devices[0], memory_bytes=gib * 1024**3, mig=Mig.DYNAMIC)
    fleet = FleetArrays()
    fleet.rebuild([replace(node, devices=(device,))])
    resources = Resources(gpus=GpuRequest(profile=profile), cpu_milli=MILLI, memory_bytes=GB)
    one = Gang(choices=(Shape(resources),), workers=1, smallest=1)
    placed = list(itertools.takewhile(bool, (place_gang(fleet, one, score=Tide()) for _ in range(9))))
    assert len(placed) == most
