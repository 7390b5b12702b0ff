"""Which replica: bounds of load, keys that stay, weights that hold, countries that are never left, outliers, budgets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tidemill.core import routing
from tidemill.core.routing import (
    ANY,
    FAR_NS,
    SHUT,
    SUSPECT,
    TRIAL,
    WELL,
    Budget,
    Record,
    Ring,
    Wish,
    bound,
    choose,
    draw,
    drawn_by,
    fallbacks,
    key_of,
    least,
    loop_through,
    outliers,
    prefix_of,
)


@dataclass(eq=False)
class Mill:
    """A replica."""

    job: str
    outstanding: int = 0
    others: int = 0
    turn: int = 0
    standing: int = WELL
    variant: str = ""
    country: str = "DEU"
    distance_ns: int = 0
    served: list[int] = field(default_factory=list)

    @property
    def under_way(self) -> range:
        return range(self.outstanding)


Choose = Callable[..., Mill | None]


def mills(count: int) -> list[Mill]:
    return [Mill(f"j{number}") for number in range(count)]


RING = Ring(f"j{number}" for number in range(8))


def ring_of(replicas: Iterable[Mill]) -> Ring:
    return Ring(one.job for one in replicas)


@pytest.mark.parametrize(
    ("story", "replicas", "wish", "options", "chosen"),
    [
        ("the least busy", [Mill("a", 2), Mill("b", 1)], ANY, {}, "b"),
        ("what the engine says it has beside ours counts", [Mill("a", 2), Mill("b", 1, others=2)], ANY, {}, "a"),
        ("the one that waited longest for a turn", [Mill("a", turn=5), Mill("b", turn=4)], ANY, {}, "b"),
        ("one on trial first", [Mill("a"), Mill("b", 3, standing=TRIAL)], ANY, {}, "b"),
        ("suspects last", [Mill("a", standing=SUSPECT), Mill("b", 9)], ANY, {}, "b"),
        ("a suspect rather than none", [Mill("a", standing=SUSPECT), Mill("b", standing=SHUT)], ANY, {}, "a"),
        ("none that is full", [Mill("a", 2), Mill("b", 3, others=-2)], ANY, {"room": 2}, None),
        ("the nearest, however busy", [Mill("a", 7, distance_ns=0), Mill("b", distance_ns=9)], ANY, {}, "a"),
        ("the next site when that is full", [Mill("a", 2), Mill("b", distance_ns=9)], ANY, {"room": 2}, "b"),
        ("a site without a link last", [Mill("a", distance_ns=FAR_NS), Mill("b", distance_ns=9)], ANY, {}, "b"),
        (
            "the nearest of those in the countries",
            [Mill("a", country="USA"), Mill("b", distance_ns=9)],
            Wish(countries=frozenset({"DEU"})),
            {},
            "b",
        ),
        ("nowhere is in no country", [Mill("a", country="")], Wish(countries=frozenset({"DEU"})), {}, None),
        ("of the variant", [Mill("a"), Mill("b", 9, variant="canary")], ANY, {"variant": "canary"}, "b"),
        ("of the variant without a name", [Mill("a", 9), Mill("b", variant="canary")], ANY, {"variant": ""}, "a"),
    ],
)
def test_what_counts_comes_in_order(
    story: str, replicas: list[Mill], wish: Wish, options: dict[str, Any], chosen: str | None
) -> None:
    found = choose(replicas, wish, **options)
    assert (found.job if found else None) == chosen, story
    if wish is ANY and not any(one.distance_ns for one in replicas) and "variant" not in options:
        assert least(replicas, **options) is found, "the short way says the same"


def test_equal_keys_come_together_and_a_suspect_or_a_full_one_passes_them_on() -> None:
    replicas = mills(5)
    ring = ring_of(replicas)
    wish = Wish(key=key_of(b"prompt"), is_session=True)
    first = choose(replicas, wish, ring=ring)
    assert first is not None
    first.outstanding = 50
    assert choose(replicas, wish, ring=ring) is first, "a session stays"
    assert choose(replicas, replace(wish, is_session=False), ring=ring) is not first, "a prefix is passed on"
    second = choose(replicas, wish, ring=ring, room=50)
    assert second is not None
    assert second is not first
    first.outstanding, first.standing = 0, SUSPECT
    assert choose(replicas, wish, ring=ring) is second, "always to the same next one"
    first.standing = WELL
    assert choose(replicas, wish, ring=ring) is first
    trial = next(one for one in replicas if one not in (first, second))
    trial.standing = TRIAL
    assert choose(replicas, wish, ring=ring) is first, "a session is not tried out elsewhere"
    assert choose(replicas, replace(wish, is_session=False), ring=ring) is trial


# Bounded load

arrivals = st.lists(st.tuples(st.sampled_from(["come", "come", "go"]), st.integers(0, 6)), max_size=120)


def check_bound(choose: Choose) -> None:
    """However the keys are spread, no replica that is chosen has more than half as much again as the mean."""

    @settings(max_examples=200, deadline=None, report_multiple_bugs=False, phases=(Phase.generate,))
    @given(st.integers(2, 6), arrivals)
    def run(count: int, course: list[tuple[str, int]]) -> None:
        replicas = mills(count)
        ring = ring_of(replicas)
        for what, number in course:
            if what == "go":
                replicas[number % count].outstanding -= bool(replicas[number % count].outstanding)
                continue
            found = choose(replicas, Wish(key=key_of(b"%d" % (number % 2))), ring=ring)
            assert found is not None, "somebody always has room"
            found.outstanding += 1
            total = sum(one.outstanding for one in replicas)
            assert found.outstanding <= -(-3 * total // (2 * count))

    run()


def unbounded(replicas: list[Mill], wish: Wish, **options: Any) -> Mill | None:
    return choose(replicas, replace(wish, is_session=True), **options)


def test_no_replica_gets_more_than_its_bound() -> None:
    check_bound(choose)


def test_the_property_finds_a_ring_without_a_bound() -> None:
    with pytest.raises(AssertionError):
        check_bound(unbounded)


def test_the_bound_leaves_room_for_one_more_always() -> None:
    for count in range(1, 65):
        for total in range(400):
            assert bound(total, count) >= total // count + 1


# Consistent hashing


def moved(ring: Callable[[Collection[str]], Any]) -> tuple[int, int]:
    """Of 4,000 keys, how many move when one of ten replicas leaves, and how many of these were not its own."""
    names = [f"job-{number}" for number in range(10)]
    before, after = ring(names), ring(names[:-1])
    keys = [key_of(b"%d" % number) for number in range(4_000)]
    pairs = [(next(iter(before.owners(key))), next(iter(after.owners(key)))) for key in keys]
    changed = [pair for pair in pairs if pair[0] != pair[1]]
    return len(changed), sum(old != names[-1] for old, _ in changed)


class ByRemainder:
    """Spreads keys evenly, and moves nearly all when their number changes."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = list(names)

    def owners(self, key: int) -> list[str]:
        return [self.names[key % len(self.names)]]


def test_a_replica_that_leaves_moves_only_its_own_keys() -> None:
    count, strangers = moved(Ring)
    assert strangers == 0
    assert 200 <= count <= 700, "about a tenth"
    assert moved(ByRemainder)[1] > 2_000, "the measure finds what is not consistent"


def test_keys_are_spread_over_all_replicas_and_each_owner_comes_once() -> None:
    ring = Ring([f"job-{number}" for number in range(8)])
    counts = Counter(next(iter(ring.owners(key_of(b"%d" % number)))) for number in range(8_000))
    assert min(counts.values()) > 600
    assert max(counts.values()) < 1_500
    assert sorted(ring.owners(7)) == sorted(f"job-{number}" for number in range(8))
    assert list(Ring([]).owners(7)) == []


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    assert len({key_of(b"ab", b"c"), key_of(b"a", b"bc"), key_of(b"abc"), key_of(b"", b"abc")}) == 4


# Countries

everywhere = st.lists(
    st.builds(
        Mill,
        job=st.just(""),
        outstanding=st.integers(0, 3),
        standing=st.sampled_from([TRIAL, WELL, SUSPECT, SHUT]),
        variant=st.sampled_from(["", "canary"]),
        country=st.sampled_from(["DEU", "FRA", "USA", ""]),
        distance_ns=st.sampled_from([0, 5, FAR_NS]),
    ),
    max_size=8,
)
wishes = st.builds(
    Wish,
    countries=st.frozensets(st.sampled_from(["DEU", "FRA"]), max_size=2),
    key=st.none() | st.integers(0, 2**64 - 1),
    is_session=st.booleans(),
)


def check_promises(choose: Choose) -> None:
    """What is chosen is always allowed, open, not full, not tried, of the variant; and something is when it can be."""

    @settings(max_examples=250, deadline=None, report_multiple_bugs=False, phases=(Phase.generate,))
    @given(everywhere, wishes, st.integers(0, 3), st.integers(0, 2), st.sampled_from([None, "", "canary"]))
    def run(replicas: list[Mill], wish: Wish, room: int, tries: int, variant: str | None) -> None:
        for number, one in enumerate(replicas):
            one.job = f"j{number}"
        tried = replicas[:tries]
        able = [
            one
            for one in replicas[tries:]
            if one.standing != SHUT
            and not (room and one.outstanding >= room)
            and (variant is None or one.variant == variant)
            and (not wish.countries or one.country in wish.countries)
        ]
        found = choose(replicas, wish, room=room, tried=tried, variant=variant, ring=RING)
        if not able:
            assert found is None
        else:
            assert found in able
            assert found.distance_ns == min(one.distance_ns for one in able)

    run()


def test_a_request_never_leaves_its_countries() -> None:
    check_promises(choose)


def test_the_property_finds_a_way_out_of_the_countries() -> None:
    def sends_abroad_when_there_is_nobody(replicas: list[Mill], wish: Wish, **options: Any) -> Mill | None:
        return choose(replicas, wish, **options) or choose(replicas, replace(wish, countries=frozenset()), **options)

    with pytest.raises(AssertionError):
        check_promises(sends_abroad_when_there_is_nobody)


# Weights


def check_weights(draw: Callable[..., tuple[str | None, dict[str, int]]]) -> None:
    """In any stretch of turns each variant has its share of them, give or take one for each other variant."""

    @settings(max_examples=100, deadline=None, report_multiple_bugs=False, phases=(Phase.generate,))
    @given(st.dictionaries(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 99), min_size=1), st.integers(0, 50))
    def run(weights: dict[str, int], start: int) -> None:
        total, turns = sum(weights.values()), {}
        drawn = []
        for _ in range(start + 200):
            name, turns = draw(weights, turns, among=weights.keys())
            drawn.append(name)
        if not total:
            assert set(drawn) == {None}
            return
        counts = Counter(drawn[start:])
        for name, weight in weights.items():
            assert abs(counts[name] - 200 * weight / total) <= len(weights)

    run()


def test_weights_hold_in_any_stretch_of_turns() -> None:
    check_weights(draw)


def test_the_property_finds_weights_that_come_in_runs() -> None:
    def in_runs(weights: dict[str, int], turns: dict[str, int], *, among: Collection[str]) -> Any:
        names = [name for name in weights for _ in range(weights[name]) if name in among]
        at = turns.get("at", 0)
        return (names[at % len(names)] if names else None), {"at": at + 1}

    with pytest.raises(AssertionError):
        check_weights(in_runs)


def test_a_variant_that_has_no_replica_gives_its_turns_to_the_others_and_none_is_kept_in_store() -> None:
    turns: dict[str, int] = {}
    for _ in range(100):
        name, turns = draw({"a": 90, "b": 10}, turns, among={"b"})
        assert name == "b"
    drawn = []
    for _ in range(100):
        name, turns = draw({"a": 90, "b": 10}, turns, among={"a", "b"})
        drawn.append(name)
    assert Counter(drawn) == {"a": 90, "b": 10}
    assert draw({"a": 1}, {}, among=set()) == (None, {})


def test_sessions_have_their_shares_too_and_few_move_when_these_change() -> None:
    keys = [key_of(b"%d" % number) for number in range(10_000)]
    before = [drawn_by({"": 95, "canary": 5}, key, among={"", "canary"}) for key in keys]
    after = [drawn_by({"": 80, "canary": 20}, key, among={"", "canary"}) for key in keys]
    assert 400 <= before.count("canary") <= 600
    assert 1_850 <= after.count("canary") <= 2_150
    assert all(new == "canary" for old, new in zip(before, after, strict=True) if old == "canary")
    assert drawn_by({"": 95, "canary": 5}, keys[0], among=set()) is None


# What a prompt begins with


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ({"prompt": "x" * 3_000 + "a"}, {"prompt": "x" * 3_000 + "b"}, True),
        ({"prompt": "a"}, {"prompt": "b"}, False),
        ({"prompt": [*range(600), 1]}, {"prompt": [*range(600), 2]}, True),
        ({"prompt": ["a", "b"]}, {"prompt": ["a", "c"]}, False),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            True,
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]},
            False,
        ),
        (
            {"messages": [{"role": "system", "content": "s" * 3_000}, {"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": "s" * 3_000}, {"role": "user", "content": "b"}]},
            True,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "ho"}]}]},
            False,
        ),
        ({"instructions": "be brief", "input": "a"}, {"instructions": "be long", "input": "a"}, False),
        ({"input": [{"role": "user", "content": "a"}]}, {"input": [{"role": "user", "content": "b"}]}, False),
    ],
)
def test_prompts_that_begin_alike_have_one_prefix(one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    assert (prefix_of(one) == prefix_of(other)) is alike


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "messages", "input", "instructions"]), json_values))
def test_no_body_is_too_odd_to_have_a_prefix(content: dict[str, Any]) -> None:
    assert len(prefix_of(content)) <= routing.PREFIX_CHARACTERS


# Other models


def test_fallbacks_are_followed_without_going_round() -> None:
    chosen = {"a": ("b", "c"), "b": ("d", "a"), "c": ("d",), "d": ("d", "c")}
    assert fallbacks("a", chosen) == ("b", "c", "d")
    assert fallbacks("x", chosen) == ()
    assert loop_through("a", chosen) == ("a", "b", "a")
    assert loop_through("d", chosen) == ("d", "d")
    assert loop_through("x", chosen) == ()
    assert loop_through("new", {"new": ("a",), "a": ("new",)}) == ("new", "a", "new")


graphs = st.dictionaries(st.sampled_from("abcde"), st.lists(st.sampled_from("abcdef"), max_size=4), max_size=5)


@settings(max_examples=150, deadline=None)
@given(graphs)
def test_what_can_be_reached_is_there_once_and_a_loop_is_found_exactly_when_there_is_one(graph: dict[str, Any]) -> None:
    for start in "abcdef":
        reached: set[str] = set()
        edge = list(graph.get(start, ()))
        while edge:
            name = edge.pop()
            if name not in reached:
                reached.add(name)
                edge += graph.get(name, ())
        found = fallbacks(start, graph)
        assert set(found) == reached - {start}
        assert len(set(found)) == len(found)
        loop = loop_through(start, graph)
        assert bool(loop) is (start in reached)
        assert all(later in graph[earlier] for earlier, later in itertools.pairwise(loop))


# Outliers


def record(job: str, *, answered: int = 100, failed: int = 0, late_ms: int = 50) -> Record:
    return Record(job=job, answered=answered, failed=failed, waited_us=answered * late_ms * 1_000)


@pytest.mark.parametrize(
    ("story", "records", "out", "found"),
    [
        ("nothing is wrong", [record("a"), record("b"), record("c", late_ms=80)], 0, []),
        ("one fails", [record("a", failed=60), record("b", failed=2), record("c")], 0, ["a"]),
        ("all fail alike, and so it is not them", [record("a", failed=60), record("b", failed=55)], 0, []),
        ("one is late", [record("a", late_ms=400), record("b"), record("c")], 0, ["a"]),
        ("late, but only little", [record("a", late_ms=90), record("b", late_ms=1), record("c", late_ms=1)], 0, []),
        ("too little is known of it", [record("a", answered=10, failed=10), record("b")], 0, []),
        ("never the only one", [record("a", failed=100)], 0, []),
        ("never more than half", [record("a", failed=99), record("b", failed=98), record("c")], 0, ["a"]),
        ("half of all are out already", [record("a", failed=99), record("b")], 2, []),
        ("the worst first", [record("a", failed=50), record("b", failed=90), *map(record, "cdefg")], 0, ["b", "a"]),
    ],
)
def test_who_is_far_off_its_peers(story: str, records: list[Record], out: int, found: list[str]) -> None:
    assert [job for job, _ in outliers(records, out=out)] == found, story


def test_why_it_is_out_is_said_in_figures() -> None:
    [(_, fails)] = outliers([record("a", failed=60), record("b", failed=2)])
    assert fails == "60 % of its answers fail, 2 % of the others'"
    [(_, late)] = outliers([record("a", late_ms=400), record("b")])
    assert late == "it takes 400 ms to begin an answer, the others 50 ms"


def check_half(outliers: Callable[..., list[tuple[str, str]]]) -> None:
    """Never more than half of all replicas are out, whatever they do."""

    @settings(max_examples=200, deadline=None, report_multiple_bugs=False, phases=(Phase.generate,))
    @given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9_000)), max_size=8), st.data())
    def run(rows: list[tuple[int, int, int]], data: st.DataObject) -> None:
        records = [
            record(f"j{number}", answered=answered, failed=min(answered, failed), late_ms=late)
            for number, (answered, failed, late) in enumerate(rows)
        ]
        out = data.draw(st.integers(0, 4))
        found = outliers(records, out=out)
        assert len(found) + out <= max(out, (len(records) + out) // 2)

    run()


def test_never_more_than_half_are_out() -> None:
    check_half(outliers)


def test_the_property_finds_an_ejection_of_nearly_all() -> None:
    with pytest.raises(AssertionError):
        check_half(lambda records, out: outliers(records, out=0))


# Second tries


def test_second_tries_are_a_tenth_of_all_and_a_few_that_were_saved_up() -> None:
    budget = Budget()
    saved = sum(budget.spend() for _ in range(100))
    assert saved == 10
    given_out = 0
    for _ in range(1_000):
        budget.earn()
        given_out += budget.spend()
    assert given_out == 100
    for _ in range(10_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10, "no more is saved up than there was"
