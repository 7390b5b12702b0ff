"""Ordering policies: what each puts first, and promises that hold for all, each with a bug that it catches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from benchmarks import jct
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tidemill.core import ordering
from tidemill.core.ordering import (
    Fifo,
    JobFacts,
    KinGittins,
    Learns,
    LeastAttained,
    OrderPolicy,
    ShortestRemaining,
    Weighted,
    advanced,
    may_displace,
)
from tidemill.units import HOUR_NS, MINUTE_NS, SECOND_NS

POLICIES: tuple[Callable[[], OrderPolicy], ...] = (
    Fifo,
    LeastAttained,
    ShortestRemaining,
    KinGittins,
    lambda: Weighted(inner=KinGittins()),
)


def facts(name: str = "a", **more: object) -> JobFacts:
    known = JobFacts(
        id=name, kin="p/1", tenant="p", submitted_ns=0, gpu_milli=1000, attained_ns=0, running=False, since_ns=0
    )
    return replace(known, **more)  # type: ignore[arg-type]


FACTS = st.builds(
    facts,
    name=st.sampled_from("abcdef"),
    submitted_ns=st.integers(0, 10**17),
    gpu_milli=st.sampled_from([0, 250, 1000, 4000, 8000, 128_000]),
    attained_ns=st.integers(0, 10**17),
    expected_ns=st.none() | st.integers(0, 10**17),
    weight=st.floats(0.01, 100),
)


def test_fifo_asks_only_who_came_first() -> None:
    early, late = facts(submitted_ns=5 * SECOND_NS, attained_ns=HOUR_NS), facts(submitted_ns=6 * SECOND_NS)
    assert Fifo().rank(early, now=0) < Fifo().rank(late, now=0)
    assert not may_displace(Fifo(), waiting=1.0, running=1e9)


def test_least_attained_lets_the_fresh_and_the_narrow_go_first() -> None:
    policy = LeastAttained()
    fresh, old, wide = facts(), facts(attained_ns=HOUR_NS), facts(attained_ns=HOUR_NS, gpu_milli=8000)
    assert policy.rank(fresh, now=0) < policy.rank(old, now=0) < policy.rank(wide, now=0)


@pytest.mark.parametrize(
    ("left", "right", "exponent"),
    [
        pytest.param((HOUR_NS, 1), (2 * HOUR_NS, 1), 1.0, id="less left goes first"),
        pytest.param((HOUR_NS, 1), (HOUR_NS, 8), 1.0, id="less service goes first"),
        pytest.param((HOUR_NS, 8), (2 * HOUR_NS, 1), 0.0, id="without an exponent only time counts"),
        pytest.param((HOUR_NS, 8), (7 * HOUR_NS, 1), 0.85, id="a wide job passes a narrow one of almost its service"),
    ],
)
def test_shortest_remaining(left: tuple[int, int], right: tuple[int, int], exponent: float) -> None:
    policy = ShortestRemaining(gpu_exponent=exponent)
    ranks = [policy.rank(facts(expected_ns=ns, gpu_milli=gpus * 1000), now=0) for ns, gpus in (left, right)]
    assert ranks[0] < ranks[1]


def test_a_job_without_a_duration_is_taken_to_need_as_long_again() -> None:
    policy = ShortestRemaining(gpu_exponent=1.0)
    assert policy.rank(facts(attained_ns=5 * HOUR_NS), now=0) == 5 * 3600
    assert policy.rank(facts(), now=0) == 3600
    assert policy.rank(facts(attained_ns=4 * HOUR_NS, expected_ns=5 * HOUR_NS), now=0) == 3600
    assert policy.rank(facts(attained_ns=6 * HOUR_NS, expected_ns=5 * HOUR_NS), now=0) == 1


def burst(policy: KinGittins, kin: str, count: int, *, ended_ns: int, attained_ns: int = 0) -> list[JobFacts]:
    """Tell of ``count`` jobs of one burst; all but the last two run to their end, in ``ended_ns`` each."""
    jobs = [facts(f"{kin}{number}", kin=kin, submitted_ns=number * SECOND_NS) for number in range(count)]
    for job in jobs:
        policy.note(job)
    for job in jobs[:-2]:
        policy.note(replace(job, attained_ns=ended_ns), finished=True)
    rest = [replace(job, attained_ns=attained_ns) for job in jobs[-2:]]
    for job in rest:
        policy.note(job)
    return rest


def test_relatives_of_short_jobs_go_before_relatives_of_long_ones() -> None:
    policy = KinGittins()
    short = burst(policy, "short", 8, ended_ns=2 * HOUR_NS, attained_ns=HOUR_NS)
    long = burst(policy, "long", 8, ended_ns=100 * HOUR_NS, attained_ns=HOUR_NS)
    assert 5 * policy.rank(short[0], now=0) < policy.rank(long[0], now=0)


def test_a_job_close_to_where_its_relatives_ended_is_nearly_done() -> None:
    policy = KinGittins()
    burst(policy, "x", 8, ended_ns=100 * HOUR_NS)
    far = facts("x6", kin="x", attained_ns=HOUR_NS)
    near = facts("x7", kin="x", attained_ns=90 * HOUR_NS)
    for job in (far, near):
        policy.note(job)
    assert policy.rank(near, now=0) < policy.rank(far, now=0) / 3


def test_a_relative_that_runs_on_and_on_makes_the_others_look_long() -> None:
    def rank_beside(attained_ns: int) -> float:
        policy = KinGittins()
        for name in "ab":
            policy.note(facts(name))
        policy.note(facts("a", attained_ns=attained_ns, running=True))
        return policy.rank(facts("b", attained_ns=31 * MINUTE_NS), now=0)

    assert rank_beside(1000 * HOUR_NS) > 2 * rank_beside(31 * MINUTE_NS)


def test_the_first_of_a_burst_runs_ahead_so_that_the_others_are_known() -> None:
    policy = KinGittins()
    jobs = [facts(f"{number}", attained_ns=HOUR_NS) for number in range(6)]
    for job in jobs:
        policy.note(job)
    ranks = [policy.rank(job, now=0) for job in jobs]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_a_fresh_job_never_waits_behind_a_wrong_guess() -> None:
    policy = KinGittins()
    rest = burst(policy, "long", 20, ended_ns=10_000 * HOUR_NS)
    assert policy.rank(rest[0], now=0) <= 60
    assert policy.rank(replace(rest[0], attained_ns=HOUR_NS), now=0) > 1000


def test_what_was_learned_is_bounded() -> None:
    policy = KinGittins(keep=32)
    for number in range(1000):
        policy.note(facts(str(number)))
        policy.note(facts(str(number), attained_ns=HOUR_NS), finished=True)
    assert len(policy._kin["p/1"].ids) <= 64
    assert not policy._live
    assert not policy._where
    assert not policy._known
    policy.note(facts("last"))
    assert policy.rank(facts("last", attained_ns=HOUR_NS - 1), now=0) > 0


def test_unknown_jobs_have_a_rank_and_their_end_is_no_news() -> None:
    policy = KinGittins()
    policy.note(facts("ghost"), finished=True)
    assert policy.rank(facts("ghost", attained_ns=HOUR_NS), now=0) > 0


def test_weights_divide_ranks_and_learning_goes_on_inside() -> None:
    inner = KinGittins()
    policy = Weighted(inner=inner)
    assert isinstance(policy, Learns)
    policy.note(facts("a"))
    assert "a" in inner._where
    heavy = facts("a", weight=2.0)
    assert policy.rank(heavy, now=0) == inner.rank(heavy, now=0) / 2


def test_facts_are_brought_up_to_now() -> None:
    running = facts(running=True, attained_ns=5, since_ns=100)
    assert advanced(running, now=130) == facts(running=True, attained_ns=35, since_ns=130)
    assert advanced(facts(since_ns=100), now=130) == facts(since_ns=100)
    assert facts(attained_ns=HOUR_NS, expected_ns=HOUR_NS).remaining_ns == SECOND_NS
    with pytest.raises(ValueError, match="weight"):
        facts(weight=0)
    with pytest.raises(ValueError, match="less than nothing"):
        facts(attained_ns=-1)


CAUGHT = (AssertionError, ExceptionGroup)
ALL = (Phase.explicit, Phase.generate, Phase.shrink)
FIRST = (Phase.generate,)
"""For planted bugs: found is enough."""

# Promises that hold for every policy. Each takes how a rank is found, so that a planted bug can stand in for it.

Rank = Callable[[OrderPolicy, JobFacts, int], float]


def honest(policy: OrderPolicy, known: JobFacts, now: int) -> float:
    return policy.rank(known, now=now)


def told(make: Callable[[], OrderPolicy], seen: Sequence[tuple[JobFacts, bool]]) -> OrderPolicy:
    policy = make()
    if isinstance(policy, Learns):
        for known, finished in seen:
            policy.note(known, finished=finished)
    return policy


def ranks_are_positive_and_repeatable(rank: Rank, phases: Sequence[Phase] = ALL) -> None:
    @given(st.sampled_from(POLICIES), st.lists(st.tuples(FACTS, st.booleans()), max_size=30), FACTS)
    @settings(max_examples=200, phases=phases, deadline=None, derandomize=True, database=None)
    def check(make: Callable[[], OrderPolicy], seen: list[tuple[JobFacts, bool]], known: JobFacts) -> None:
        one, other = told(make, seen), told(make, seen)
        first = rank(one, known, 0)
        assert 0 < first < float("inf")
        assert first == rank(one, known, 0) == rank(other, known, 0)

    check()


def unknowing_policies_do_not_peek(rank: Rank, phases: Sequence[Phase] = ALL) -> None:
    @given(st.sampled_from(POLICIES), FACTS, st.integers(0, 10**17))
    @settings(max_examples=100, phases=phases, deadline=None, derandomize=True, database=None)
    def check(make: Callable[[], OrderPolicy], known: JobFacts, expected_ns: int) -> None:
        policy = make()
        if not policy.knows_durations:
            assert rank(policy, known, 0) == rank(policy, replace(known, expected_ns=expected_ns), 0)

    check()


def nobody_displaces_in_turns(displace: Callable[..., bool], phases: Sequence[Phase] = ALL) -> None:
    ranks = st.floats(1e-3, 1e12)

    @given(st.sampled_from(POLICIES), ranks, ranks)
    @settings(max_examples=200, phases=phases, deadline=None, derandomize=True, database=None)
    def check(make: Callable[[], OrderPolicy], one: float, other: float) -> None:
        policy = make()
        assert policy.margin >= 1
        assert not (displace(policy, waiting=one, running=other) and displace(policy, waiting=other, running=one))
        assert not displace(policy, waiting=one, running=one)

    check()


def test_ranks_are_positive_and_repeatable() -> None:
    ranks_are_positive_and_repeatable(honest)


def test_unknowing_policies_do_not_peek() -> None:
    unknowing_policies_do_not_peek(honest)


def test_nobody_displaces_in_turns() -> None:
    nobody_displaces_in_turns(may_displace)


def test_planted_a_rank_that_depends_on_how_often_it_was_asked() -> None:
    asked = itertools.count()
    with pytest.raises(CAUGHT):
        ranks_are_positive_and_repeatable(lambda policy, known, now: policy.rank(known, now=now) + next(asked), FIRST)


def test_planted_no_service_divides_by_nothing() -> None:
    with pytest.raises(CAUGHT):
        ranks_are_positive_and_repeatable(lambda _policy, known, _now: known.service_s, FIRST)


def test_planted_a_policy_that_reads_the_duration() -> None:
    with pytest.raises(CAUGHT):
        unknowing_policies_do_not_peek(lambda _policy, known, now: ShortestRemaining().rank(known, now=now), FIRST)


def test_planted_displacement_of_equals() -> None:
    with pytest.raises(CAUGHT):
        nobody_displaces_in_turns(lambda _policy, *, waiting, running: running >= waiting, FIRST)


# The benchmark's small simulator, while it stands in for the twin.


@dataclass(frozen=True, slots=True)
class Load:
    """Some jobs and how many nodes of eight GPUs."""

    jobs: tuple[jct.TraceJob, ...]
    nodes: int


LOADS = st.builds(
    lambda rows, nodes: Load(
        tuple(
            jct.TraceJob(
                submit_s=float(at), gpus=gpus, work_s=float(work), start_s=2.0, restart_s=5.0, tenant=f"{gpus}", kin="k"
            )
            for at, gpus, work in sorted(rows)
        ),
        nodes,
    ),
    st.lists(
        st.tuples(st.integers(0, 40_000), st.sampled_from([1, 2, 4, 8, 12, 16]), st.integers(1, 50_000)),
        min_size=1,
        max_size=25,
    ),
    st.integers(2, 4),
)


def test_srsf_on_one_node_by_hand() -> None:
    def job(submit_s: float, gpus: int, work_s: float) -> jct.TraceJob:
        return jct.TraceJob(
            submit_s=submit_s, gpus=gpus, work_s=work_s, start_s=0.0, restart_s=10.0, tenant="", kin="k"
        )

    jobs = [job(0, 8, 1000), job(100, 4, 200), job(100, 4, 300), job(100, 1, 5000)]
    outcome = jct.play(jobs, 1, 8, "srsf")
    assert outcome.preemptions == 1
    assert outcome.jct_s.round().tolist() == [6210, 200, 300, 5200]
    assert round(outcome.makespan_s) == 6210


def test_two_runs_of_one_trace_are_equal() -> None:
    jobs = jct.muri("3")[:80]
    runs = [jct.play(jobs, 8, 8, "kin-gittins") for _ in range(2)]
    assert (runs[0].jct_s == runs[1].jct_s).all()


def test_learning_beats_ignorance_and_knowing_beats_learning() -> None:
    jobs = jct.muri("3")[:300]
    orders = ("shortest-remaining", "kin-gittins", "fifo")
    means = [float(jct.play(jobs, 8, 8, order).jct_s.mean()) for order in orders]
    assert means == sorted(means)


def test_the_pool_row_comes_after_all_size_classes() -> None:
    assert [ordering._size_class(gpus) for gpus in (0.1, 1, 2, 3, 8, 1e6)] == [0, 0, 1, 1, 3, 7]
    assert [ordering._bucket(seconds) for seconds in (0, 1, 1.2, 1e9, 1e30)] == [0, 0, 1, 127, 127]


def test_a_job_that_is_gone_leaves_nothing_behind() -> None:
    policy = KinGittins(keep=4)
    for at in range(40):
        policy.note(facts(id=f"j{at}", kin="k", attained_ns=HOUR_NS))
        policy.rank(facts(id=f"j{at}", kin="k", attained_ns=HOUR_NS), now=0)
        policy.forget(f"j{at}")
        policy.forget(f"j{at}")
    assert (policy._where, policy._live, policy._known) == ({}, {}, {})
    assert len(policy._kin["k"].ids) <= 9
    policy.forget("never heard of")


def test_relatives_that_are_gone_are_not_waited_for() -> None:
    def index(*, gone: bool) -> float:
        policy = KinGittins()
        for at in range(6):
            policy.note(facts(id=f"j{at}", kin="k", attained_ns=0))
        for at in range(1, 6):
            if gone:
                policy.forget(f"j{at}")
        return policy.rank(facts(id="j0", kin="k", attained_ns=HOUR_NS), now=0)

    assert index(gone=False) < index(gone=True), "nobody is curious for the sake of those who are gone"
