"""Replicas by what users feel and replicas bear: objectives, hours, the daily pattern, and that nothing flaps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tidemill.core import pattern, scaling
from tidemill.core.buckets import bucket_of, quantile_ns, since, together, upper_ns
from tidemill.core.pattern import Slot
from tidemill.core.scaling import Bounds, Decision, Memory, Signals, decide
from tidemill.model.scaling import PER_DAY, SLOT_NS, SLOTS, Hours, Pattern, Scaling
from tidemill.units import DAY_NS, HOUR_NS, MILLI, MINUTE_NS, SECOND_NS

Decide = Callable[..., tuple[Decision, Memory]]
QUICKLY = (Phase.generate,)
"""Where a planted mistake is looked for: that it is found is enough."""
MONDAY = 4 * DAY_NS + 1000 * 7 * DAY_NS
"""Midnight of one, in UTC."""
MS = SECOND_NS // 1000
TTFT = Scaling(ttft_ns=500 * MS)


def examples(usual: int, phases: Sequence[Phase]) -> int:
    """So many, or until a planted mistake is found."""
    return usual if tuple(phases) != QUICKLY else 4_000


def bounds(least: int = 1, most: int = 8, *, concurrency: int = 100, idle_s: int = 300, **objectives: object) -> Bounds:
    scaling_ = Scaling(**objectives)  # type: ignore[arg-type]
    return Bounds(least=least, most=most, concurrency=concurrency, idle_ns=idle_s * SECOND_NS, scaling=scaling_)


def steady(given_bounds: Bounds, signals: Signals, *, minutes: int = 2) -> Memory:
    """What is remembered after a while in which nothing changed and nothing was felt."""
    memory, calm = Memory(), replace(signals, ttft_ns=None, latency_ns=None, queue_ns=None, engine_queue=None)
    for step in range(minutes * 6 + 1):
        _, memory = decide(given_bounds, calm, memory, now=MONDAY + step * 10 * SECOND_NS)
    return memory


AFTER = MONDAY + 2 * MINUTE_NS


# What each objective asks for


@pytest.mark.parametrize(
    ("objectives", "seen", "asked"),
    [
        ({"ttft_ns": 500 * MS}, {"ttft_ns": 540 * MS}, {"requests": 1, "ttft": 4}),
        ({"ttft_ns": 500 * MS}, {"ttft_ns": 300 * MS}, {"requests": 1, "ttft": 3}),
        ({"ttft_ns": 500 * MS}, {"ttft_ns": 750 * MS}, {"requests": 1, "ttft": 6}),
        ({"ttft_ns": 500 * MS}, {"ttft_ns": 9_000 * MS}, {"requests": 1, "ttft": 8}),
        ({"latency_ns": 10 * SECOND_NS}, {"latency_ns": 12 * SECOND_NS}, {"requests": 1, "latency": 5}),
        ({"queue_ns": 100 * MS}, {"queue_ns": 150 * MS}, {"requests": 1, "queue": 6}),
        ({"engine_queue": 2}, {"engine_queue": 8}, {"requests": 1, "engine_queue": 4}),
        ({"engine_queue": 2}, {"engine_queue": 12}, {"requests": 1, "engine_queue": 6}),
        ({"in_flight": 10}, {}, {"requests": 1, "in_flight": 4}),
        ({"in_flight": 9}, {}, {"requests": 1, "in_flight": 5}),
        ({"tokens": 1000}, {"tokens_milli": 4_300 * MILLI}, {"requests": 1, "tokens": 4}),
        ({"tokens": 1000}, {"tokens_milli": 4_500 * MILLI}, {"requests": 1, "tokens": 5}),
        ({"tokens": 1000}, {"tokens_milli": 1_500 * MILLI}, {"requests": 1, "tokens": 2}),
        ({"gpu_milli": 800}, {"gpu_milli": 1000}, {"requests": 1, "gpu": 5}),
        ({"kv_cache_milli": 800}, {"kv_cache_milli": 850}, {"requests": 1, "kv_cache": 4}),
        ({"kv_cache_milli": 800}, {"kv_cache_milli": 300}, {"requests": 1, "kv_cache": 2}),
        ({"kv_cache_milli": 800, "gpu_milli": 500}, {"kv_cache_milli": 950, "gpu_milli": 100},
         {"requests": 1, "kv_cache": 5, "gpu": 1}),
    ],
)  # fmt: skip
def test_four_replicas_with_forty_requests_are_asked_to_be(
    objectives: dict[str, int], seen: dict[str, int], asked: dict[str, int]
) -> None:
    given_bounds = bounds(concurrency=40, **objectives)
    signals = Signals(in_flight=40, ready=4, **seen)
    memory = steady(given_bounds, signals)
    decision, _ = decide(given_bounds, signals, memory, now=AFTER + 10 * SECOND_NS)
    assert {ask.objective: ask.wants for ask in decision.asks} == asked
    assert decision.wanted == max(asked.values()), "the largest wins"


def test_an_objective_that_cannot_be_seen_asks_for_nothing() -> None:
    given_bounds = bounds(tokens=10, gpu_milli=500, kv_cache_milli=500, ttft_ns=MS, idle_s=0)
    decision, _ = decide(given_bounds, Signals(in_flight=1, ready=3), Memory(), now=MONDAY)
    assert [(ask.objective, ask.wants) for ask in decision.asks] == [("requests", 1), ("ttft", 0)]
    assert decision.wanted == 1


def test_what_was_missed_is_not_judged_again_before_all_replicas_are_there_for_a_while() -> None:
    given_bounds = bounds(ttft_ns=500 * MS)
    missed = Signals(in_flight=40, ready=4, ttft_ns=900 * MS)
    memory = steady(given_bounds, missed)
    first, memory = decide(given_bounds, missed, memory, now=AFTER)
    assert first.wanted == 8
    coming, memory = decide(given_bounds, replace(missed, ready=5, coming=3), memory, now=AFTER + MINUTE_NS)
    assert coming.wanted == 8
    assert coming.asks[1].wants == first.asks[1].wants, "what is still felt of before does not ask for more"


def test_it_does_not_go_down_to_what_failed_before() -> None:
    given_bounds = bounds(ttft_ns=500 * MS, idle_s=60)
    missed = Signals(in_flight=40, ready=4, ttft_ns=600 * MS)
    memory = steady(given_bounds, missed)
    now, wanted = AFTER, []
    decision, memory = decide(given_bounds, missed, memory, now=now)
    assert decision.wanted == 5
    for step in range(1, 50):
        now = AFTER + step * MINUTE_NS
        decision, memory = decide(given_bounds, replace(missed, ready=5, ttft_ns=200 * MS), memory, now=now)
        wanted.append(decision.wanted)
    assert set(wanted) == {5}, "a replica bears 8.3 requests, so four are not enough for forty"
    assert "a replica bears 8.3 requests" in decision.asks[1].target
    decision, memory = decide(
        given_bounds, replace(missed, in_flight=8, ready=5, ttft_ns=90 * MS), memory, now=now + 2 * MINUTE_NS
    )
    for step in range(3, 6):
        decision, memory = decide(
            given_bounds, replace(missed, in_flight=8, ready=5, ttft_ns=90 * MS), memory, now=now + step * MINUTE_NS
        )
    assert decision.wanted == 1, "fewer requests need fewer"


def test_what_a_replica_bears_is_forgotten_and_raised() -> None:
    given_bounds = bounds(ttft_ns=500 * MS, idle_s=60)
    missed = Signals(in_flight=40, ready=4, ttft_ns=600 * MS)
    memory = steady(given_bounds, missed)
    _, memory = decide(given_bounds, missed, memory, now=AFTER)
    assert [one.load_milli // 100 for one in memory.borne] == [83]
    for step in range(1, 4):
        more = Signals(in_flight=50, ready=5, ttft_ns=300 * MS)
        _, memory = decide(given_bounds, more, memory, now=AFTER + step * MINUTE_NS)
    assert [one.load_milli // 1000 for one in memory.borne] == [9], "it bears what it was seen to bear"
    _, memory = decide(given_bounds, replace(missed, ttft_ns=None), memory, now=AFTER + 2 * HOUR_NS)
    assert memory.borne == ()


def test_a_start_from_nothing_is_no_reason_for_more() -> None:
    given_bounds = bounds(least=0, ttft_ns=500 * MS)
    memory = Memory()
    for step in range(30):
        signals = Signals(waiting=5, coming=1 if step else 0, ttft_ns=30 * SECOND_NS, queue_ns=30 * SECOND_NS)
        decision, memory = decide(given_bounds, signals, memory, now=MONDAY + step * SECOND_NS)
        assert decision.wanted == 1


# How quickly


def test_more_come_only_after_they_were_needed_for_a_while_but_the_first_at_once() -> None:
    given_bounds = bounds(least=0, concurrency=1, up_after_ns=30 * SECOND_NS)
    decision, memory = decide(given_bounds, Signals(waiting=3), Memory(), now=MONDAY)
    assert decision.wanted == 1
    story = []
    for second, asked in [(10, 1), (11, 3), (20, 3), (21, 1), (22, 4), (40, 3), (51, 4), (52, 4), (80, 4), (90, 4)]:
        signals = Signals(in_flight=asked, ready=1)
        decision, memory = decide(given_bounds, signals, memory, now=MONDAY + second * SECOND_NS)
        story.append((second, decision.wanted))
    assert story[:6] == [(10, 1), (11, 1), (20, 1), (21, 1), (22, 1), (40, 1)]
    assert story[6:] == [(51, 3), (52, 3), (80, 4), (90, 4)], "as many as were needed at least in all of the last 30 s"


def test_so_many_start_at_a_time_and_so_many_are_given_up_in_a_while() -> None:
    given_bounds = bounds(concurrency=1, up_step=2, down_step=1, down_every_ns=MINUTE_NS, idle_s=0)
    decision, memory = decide(given_bounds, Signals(in_flight=1, waiting=7, ready=1), Memory(), now=MONDAY)
    assert decision.wanted == 3
    decision, memory = decide(given_bounds, Signals(in_flight=2, waiting=6, ready=2, coming=1), memory, now=MONDAY + 1)
    assert (decision.wanted, decision.why) == (4, "8 are needed, 2 start at a time")
    ready, story = 8, []
    for second in range(0, 200, 10):
        now = MONDAY + HOUR_NS + second * SECOND_NS
        decision, memory = decide(given_bounds, Signals(ready=ready), memory, now=now)
        if decision.wanted < ready:
            story.append((second, decision.wanted))
        ready = decision.wanted
    assert story == [(0, 7), (60, 6), (120, 5), (180, 4)]


def test_nothing_is_given_up_while_it_is_not_known_what_there_is() -> None:
    given_bounds = bounds(least=0, idle_s=0)
    decision, memory = decide(given_bounds, Signals(ready=5, is_blind=True), Memory(), now=MONDAY)
    assert (decision.wanted, decision.why) == (5, "no gateway was heard of late")
    decision, _ = decide(given_bounds, Signals(ready=5), memory, now=MONDAY + MINUTE_NS)
    assert decision.wanted == 0


# Hours


WORK = Hours(replicas=3, days=(0, 1, 2, 3, 4), from_s=8 * 3600, until_s=18 * 3600, zone="Europe/Berlin")


def berlin(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp()) * SECOND_NS


@pytest.mark.parametrize(
    ("at", "wanted"),
    [
        ("2027-01-04T07:54:59", 1),
        ("2027-01-04T07:55:00", 3),
        ("2027-01-04T08:00:00", 3),
        ("2027-01-04T17:59:59", 3),
        ("2027-01-04T18:00:00", 1),
        ("2027-01-09T12:00:00", 1),
        ("2027-07-05T08:00:00", 3),
    ],
)
def test_hours_have_their_replicas_ready_when_they_begin_winter_and_summer(at: str, wanted: int) -> None:
    given_bounds = bounds(idle_s=0, hours=(WORK,))
    memory = Memory(starts_ns=(60 * SECOND_NS, 300 * SECOND_NS, 120 * SECOND_NS))
    decision, _ = decide(given_bounds, Signals(ready=1), memory, now=berlin(at))
    assert decision.wanted == wanted


def check_hours(choose: Callable[..., int], phases: Sequence[Phase] = tuple(Phase)) -> None:
    @settings(max_examples=examples(100, phases), deadline=None, report_multiple_bugs=False, phases=phases)
    @given(
        st.sets(st.integers(0, 6), min_size=1),
        st.integers(0, 86_399),
        st.integers(0, 86_400),
        st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"]),
        st.integers(1_700_000_000, 1_900_000_000),
    )
    def run(days: set[int], begins: int, ends: int, zone: str, second: int) -> None:
        one = Hours(replicas=2, days=tuple(sorted(days)), from_s=begins, until_s=ends, zone=zone)
        local = datetime.fromtimestamp(second, ZoneInfo(zone))
        within = local.hour * 3600 + local.minute * 60 + local.second
        today, yesterday = local.weekday(), (local.weekday() - 1) % 7
        if begins < ends:
            is_open = today in days and begins <= within < ends
        else:
            is_open = (today in days and within >= begins) or (yesterday in days and within < ends)
        now = second * SECOND_NS
        assert choose((one,), now=now, until=now) == (2 if is_open else 0)

    run()


def test_hours_are_by_the_clock_on_the_wall_on_any_day() -> None:
    check_hours(scaling.scheduled)


def in_utc(hours: tuple[Hours, ...], *, now: int, until: int) -> int:
    return scaling.scheduled(tuple(replace(one, zone="UTC") for one in hours), now=now, until=until)


def until_midnight(hours: tuple[Hours, ...], *, now: int, until: int) -> int:
    cut = tuple(replace(one, until_s=86_400) if one.until_s <= one.from_s else one for one in hours)
    return scaling.scheduled(cut, now=now, until=until)


@pytest.mark.parametrize("wrong", [in_utc, until_midnight])
def test_the_check_of_hours_finds_one_that_goes(wrong: Callable[..., int]) -> None:
    with pytest.raises((AssertionError, ExceptionGroup)):
        check_hours(wrong, QUICKLY)


# Whatever happens


def optional(most: int) -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.integers(0, most))


scalings = st.builds(
    Scaling,
    ttft_ns=st.sampled_from([0, 500 * MS]),
    latency_ns=st.sampled_from([0, SECOND_NS]),
    queue_ns=st.sampled_from([0, 100 * MS]),
    engine_queue=st.sampled_from([0, 2]),
    in_flight=st.sampled_from([0, 3]),
    tokens=st.sampled_from([0, 100]),
    gpu_milli=st.sampled_from([0, 800]),
    kv_cache_milli=st.sampled_from([0, 800]),
    window_ns=st.just(5 * SECOND_NS),
    tolerance_milli=st.sampled_from([0, 100, 300]),
    up_after_ns=st.just(0),
    predicts=st.booleans(),
)
some_bounds = st.builds(
    lambda least, more, concurrency, idle, scaling_: Bounds(
        least=least, most=least + more, concurrency=concurrency, idle_ns=idle * SECOND_NS, scaling=scaling_
    ),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 30),
    scalings,
)
sights = st.builds(
    Signals,
    in_flight=st.integers(0, 40),
    waiting=st.sampled_from([0, 0, 5, 60]),
    ready=st.integers(1, 9),
    coming=st.sampled_from([0, 0, 1, 3]),
    is_blind=st.booleans(),
    ttft_ns=optional(2 * SECOND_NS),
    latency_ns=optional(4 * SECOND_NS),
    queue_ns=optional(SECOND_NS),
    engine_queue=optional(40),
    tokens_milli=optional(2_000 * MILLI),
    gpu_milli=optional(1000),
    kv_cache_milli=optional(1000),
)
KNOWN = Pattern(
    means_milli=tuple(4_000 if PER_DAY // 3 <= slot % PER_DAY < 2 * PER_DAY // 3 else 0 for slot in range(SLOTS)),
    days=(9,) * SLOTS, plain_milli=1_300, judged=5_000, error_milli=10, plain_error_milli=1_500,
)  # fmt: skip
POOR = replace(KNOWN, error_milli=1_400)


def check_any_course(choose: Decide, phases: Sequence[Phase] = tuple(Phase)) -> None:
    """Never above the most or below need; monotone; given up only when not blind and not needed of late."""

    @settings(max_examples=examples(80, phases), deadline=None, report_multiple_bugs=False, phases=phases)
    @given(
        some_bounds, st.lists(st.tuples(st.integers(0, 20), sights), min_size=1, max_size=6), st.sampled_from(MEMORIES)
    )
    def run(given_bounds: Bounds, course: list[tuple[int, Signals]], memory: Memory) -> None:
        now = MONDAY + 12 * HOUR_NS
        raises: list[int] = []
        for later, signals in course:
            now += later * SECOND_NS
            before = memory
            held = signals.ready + signals.coming
            decision, memory = choose(given_bounds, signals, before, now=now)
            needs = [ask.wants for ask in decision.asks]
            assert given_bounds.least <= decision.wanted <= given_bounds.most
            assert decision.wanted >= min(given_bounds.most, max(needs)), "less than an objective asks for"
            if signals.is_blind:
                assert decision.wanted >= min(held, given_bounds.most), "given up though nothing is known"
            if any(at > now - given_bounds.idle_ns for at in raises):
                assert decision.wanted >= min(held, given_bounds.most), "given up right after more were needed"
            if decision.wanted > held:
                raises.append(now)
            without, _ = choose(without_prediction(given_bounds), signals, before, now=now)
            usual = -(-max(before.pattern.means_milli) // MILLI)
            assert without.wanted <= decision.wanted, "prediction never takes away"
            assert decision.wanted <= max(without.wanted, usual, 1), "nor adds more than was ever usual"
            for more in louder(signals):
                up, _ = choose(given_bounds, more, before, now=now)
                assert up.wanted >= decision.wanted, f"fewer for more: {more}"

    run()


MEMORIES = (Memory(), Memory(pattern=KNOWN), Memory(pattern=POOR))


def without_prediction(given_bounds: Bounds) -> Bounds:
    return replace(given_bounds, scaling=replace(given_bounds.scaling, predicts=False))


def louder(signals: Signals) -> list[Signals]:
    """The same with more of one thing each time."""
    found = [replace(signals, in_flight=signals.in_flight + 3), replace(signals, waiting=signals.waiting + 7)]
    for name in ("ttft_ns", "latency_ns", "queue_ns", "engine_queue", "tokens_milli", "gpu_milli", "kv_cache_milli"):
        value = getattr(signals, name)
        if value is not None:
            found.append(replace(signals, **{name: min(value * 5 // 4, 1000 if "milli" in name[-6:-1] else 10**12)}))
    return [one for one in found if one != signals]


def test_any_course_is_followed_within_the_rules() -> None:
    check_any_course(decide)


def smallest_wins(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    decision, after = decide(given_bounds, signals, memory, now=now)
    least = min(ask.wants for ask in decision.asks)
    return replace(decision, wanted=min(given_bounds.most, max(given_bounds.least, least))), after


def trusts_the_pattern(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    decision, after = decide(given_bounds, signals, memory, now=now)
    usual = [ask.wants for ask in decision.asks if ask.objective == "pattern" and ask.wants]
    wanted = min(given_bounds.most, max(given_bounds.least, *usual)) if usual else decision.wanted
    return replace(decision, wanted=wanted), after


def sees_though_blind(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    return decide(given_bounds, replace(signals, is_blind=False), memory, now=now)


def forgets_peaks(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    return decide(given_bounds, signals, replace(memory, needed=()), now=now)


def shares_among_all(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    """More requests make each replica seem less busy."""
    busy = signals.gpu_milli
    less = None if busy is None else busy * 10 // (10 + signals.in_flight)
    return decide(given_bounds, replace(signals, gpu_milli=less), memory, now=now)


@pytest.mark.parametrize(
    "wrong", [smallest_wins, trusts_the_pattern, sees_though_blind, forgets_peaks, shares_among_all]
)
def test_the_check_of_courses_finds_one_that(wrong: Decide) -> None:
    with pytest.raises((AssertionError, ExceptionGroup)):
        check_any_course(wrong, QUICKLY)


# Nothing flaps


def check_noise(choose: Decide, *, seed: int = 3) -> None:
    """Demand that wavers within the tolerance changes the number of replicas once at most."""
    dice = random.Random(seed)
    for mean in (1_000, 1_950, 3_050, 5_400):
        given_bounds = bounds(least=1, most=9, tokens=1000, idle_s=20)
        ready, memory, changes = 1, Memory(), []
        for step in range(240):
            rate = round(mean * (1 + dice.uniform(-0.04, 0.04)))
            signals = Signals(in_flight=1, ready=ready, tokens_milli=rate * MILLI)
            decision, memory = choose(given_bounds, signals, memory, now=MONDAY + step * SECOND_NS)
            if decision.wanted != ready:
                changes.append((step, ready, decision.wanted))
            ready = decision.wanted
        assert len([one for one in changes if one[0] > 60]) == 0, f"{mean}: {changes}"


def check_feeling(choose: Decide) -> None:
    """A service whose first tokens come late as soon as a replica has more than ten requests is settled for good."""
    for demand in (12, 35, 61):
        given_bounds = bounds(least=1, most=9, ttft_ns=500 * MS, idle_s=60)
        ready, memory, changes = 1, Memory(), []
        for step in range(0, 3_300, 10):
            each = demand / ready
            ttft = round(100 * MS / max(0.02, 1 - each / 12.5)) if each < 12.5 else 5 * SECOND_NS
            signals = Signals(in_flight=demand, ready=ready, ttft_ns=ttft)
            decision, memory = choose(given_bounds, signals, memory, now=MONDAY + step * SECOND_NS)
            if decision.wanted != ready:
                changes.append((step, decision.wanted))
            ready = decision.wanted
        assert demand / ready <= 10.5, "users are content in the end"
        assert ready <= math.ceil(demand / 10) * 2, "and not at any price"
        assert all(before < after for (_, before), (_, after) in pairwise(changes)), f"{demand}: {changes}"


def test_noise_and_missed_objectives_do_not_make_it_flap() -> None:
    check_noise(decide)
    check_feeling(decide)


def has_no_tolerance(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    strict = replace(given_bounds, scaling=replace(given_bounds.scaling, tolerance_milli=0), idle_ns=0)
    return decide(strict, signals, memory, now=now)


def learns_nothing(given_bounds: Bounds, signals: Signals, memory: Memory, *, now: int) -> tuple[Decision, Memory]:
    decision, after = decide(given_bounds, signals, memory, now=now)
    return decision, replace(after, borne=())


def test_the_checks_find_one_that_is_too_strict_or_does_not_learn() -> None:
    with pytest.raises(AssertionError):
        check_noise(has_no_tolerance)
    with pytest.raises(AssertionError):
        check_feeling(learns_nothing)


# The daily pattern


def lived(days: int, need: Callable[[int, int], int], *, every_ns: int = SLOT_NS) -> Pattern:
    """The pattern after so many days of needs by day and second."""
    learned, slot = Pattern(), Slot()
    for step in range(days * DAY_NS // every_ns):
        now = MONDAY + step * every_ns
        day, second = divmod(step * every_ns // SECOND_NS, DAY_NS // SECOND_NS)
        learned, slot = pattern.observe(learned, slot, need(day, second), now=now)
    return learned


def office(day: int, second: int) -> int:
    return 0 if day % 7 >= 5 else 4_000 if 9 * 3600 <= second < 17 * 3600 else 200


def test_after_some_days_what_is_usual_is_there_before_it_is_needed() -> None:
    learned = lived(8, office)
    assert pattern.is_good(learned)
    monday = MONDAY + 7 * DAY_NS
    given_bounds = bounds(least=0, predicts=True, idle_s=60)
    memory = Memory(pattern=learned, starts_ns=(10 * MINUTE_NS,))

    def wanted(at: int, day: int = 1) -> int:
        return decide(given_bounds, Signals(ready=1), memory, now=monday + day * DAY_NS + at)[0].wanted

    assert [wanted(hour * HOUR_NS) for hour in (8, 10, 16)] == [1, 4, 4]
    assert wanted(9 * HOUR_NS - 10 * MINUTE_NS) == 4, "as long before as a replica takes to start"
    assert wanted(17 * HOUR_NS + MINUTE_NS) == 1
    assert wanted(12 * HOUR_NS, day=5) == 0, "weekends are days of their own"


def test_days_that_have_nothing_in_common_are_not_gone_by() -> None:
    dice = random.Random(1)
    noise = lived(8, lambda day, second: dice.choice([0, 0, 3_000, 6_000]))
    assert not pattern.is_good(noise)
    assert not pattern.is_good(lived(8, lambda day, second: 3_000)), "nor is there one in a flat day"
    assert not pattern.is_good(lived(1, office)), "nor after one day"
    decision, _ = decide(bounds(least=0, predicts=True, idle_s=0), Signals(ready=1), Memory(pattern=noise), now=MONDAY)
    assert decision.wanted == 0
    assert decision.asks[-1].seen == "the days have no pattern to go by"


def test_a_slot_that_was_hardly_seen_teaches_nothing() -> None:
    learned, slot = pattern.observe(Pattern(), Slot(), 5_000, now=MONDAY + SLOT_NS - MINUTE_NS)
    learned, slot = pattern.observe(learned, slot, 0, now=MONDAY + 3 * SLOT_NS)
    assert max(learned.days) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3 * MINUTE_NS, 20 * MINUTE_NS), st.integers(0, 9_000)), max_size=60))
def test_what_is_learned_lies_within_what_was_seen(course: list[tuple[int, int]]) -> None:
    learned, slot, now = Pattern(), Slot(), MONDAY
    for later, need in course:
        now += later
        learned, slot = pattern.observe(learned, slot, need, now=now)
        assert slot.seen_ns <= SLOT_NS
    assert max(learned.means_milli) <= max((need for _, need in course), default=0)


# Lengths of time in buckets


@given(st.lists(st.integers(0, 100 * SECOND_NS), min_size=1, max_size=80), st.integers(1, 1000))
def test_a_quantile_of_buckets_is_a_little_above_the_truth(times: list[int], share: int) -> None:
    counts: dict[int, int] = {}
    for one in times:
        counts[bucket_of(one)] = counts.get(bucket_of(one), 0) + 1
    found = quantile_ns(counts, share)
    truth = sorted(times)[-(-len(times) * share // 1000) - 1]
    assert found is not None
    assert max(truth, MS) <= found + 1 <= max(truth, MS) * 1.2 + 2
    assert bucket_of(upper_ns(bucket_of(times[0]))) == bucket_of(times[0])
    assert together(since(together(counts, counts), counts), {}) == counts
    assert since({0: 1}, {0: 5}) == {0: 1}, "whoever begins anew counts from nothing"
