"""The contract of order and placement policies, as a check that anybody can run against theirs: ``check_policy``.

The facts, fleets and mixes that a policy is asked about are found by Hypothesis: the same ones every time, and of
those that show what is wrong the simplest. A policy is asked through what ``core.ordering`` and ``core.score`` define.
"""

from __future__ import annotations

import copy
import datetime
import math
import pickle
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Final, NoReturn, cast

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from numpy.typing import NDArray

from tidemill.core.ordering import JobFacts, Learns, OrderPolicy, may_displace
from tidemill.core.score import TIE_BITS, UNLEARNED, Score, Want
from tidemill.units import HOUR_NS, MILLI, SECOND_NS

Ints = NDArray[np.int64]
MOST_SCORE: Final = 1 << (62 - TIE_BITS)
"""Scores stay within this, up and down: shifted by ``TIE_BITS`` they are still numbers, and never ``NEVER``."""
_CLOCKS: Final = (
    "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
    "process_time_ns", "thread_time", "thread_time_ns", "localtime", "gmtime",
)  # fmt: skip
_DICE: Final = ("random", "randint", "uniform", "choice", "randrange", "shuffle", "sample", "gauss")
_YEAR_NS: Final = 365 * 24 * HOUR_NS


def check_policy(make: Callable[[], OrderPolicy | Score], *, examples: int = 100) -> None:
    """Run every check of the contract against the policies that ``make`` gives, a new one each time.

    ``make`` is what the entry point of ``tidemill.order`` or ``tidemill.score`` names; ``examples`` is how many cases
    each check looks at.

    Raises: AssertionError that says what the policy did, what about, and what would mend it.

    >>> from tidemill.core.ordering import LeastAttained
    >>> check_policy(LeastAttained, examples=5)
    >>> check_policy(lambda: LeastAttained(margin=0.5), examples=5)
    Traceback (most recent call last):
    AssertionError: The order policy 'least-attained' has margin 0.5. Mend: make it 1 or more...
    """
    policy = make()
    if policy is make() and (callable(getattr(policy, "note", None)) or callable(getattr(policy, "learn", None))):
        _fail("", policy, "learns, and make() gives the same object twice", "let make() build a new one each time")
    if callable(getattr(policy, "rank", None)):
        for check_order in ORDER_CHECKS:
            check_order(cast("Callable[[], OrderPolicy]", make), examples)
    elif callable(getattr(policy, "scores", None)):
        for check_score in SCORE_CHECKS:
            check_score(cast("Callable[[], Score]", make), examples)
    else:
        _fail("", policy, "has neither rank nor scores", "give it the methods of OrderPolicy or of Score")


# -- order ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One thing that happens to a job, as a policy is told of it."""

    facts: JobFacts
    now: int
    finished: bool = False


def check_description(make: Callable[[], OrderPolicy], examples: int) -> None:  # noqa: ARG001
    """What a policy says of itself can be used: a name, times that are no less than nothing, a margin of at least 1."""
    policy = make()
    name: Any = policy.name
    if not isinstance(name, str) or not name:
        _fail("order", policy, f"has the name {name!r}", "give it a text by which settings can name it")
    for flag in ("knows_durations", "preempts"):
        if not isinstance(value := getattr(policy, flag, None), bool):
            _fail("order", policy, f"has {flag} {value!r}", "make it True or False")
    for span in ("quantum_ns", "drift_ns"):
        value = getattr(policy, span, None)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            _fail("order", policy, f"has {span} {value!r}", "make it an integer, nanoseconds, 0 or more")
    margin = getattr(policy, "margin", None)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 1:
        _fail(
            "order", policy, f"has margin {margin!r}",
            "make it 1 or more; below 1 two jobs take each other's place for ever",
        )  # fmt: skip


def check_ranks(make: Callable[[], OrderPolicy], examples: int) -> None:
    """Ranks are positive, finite numbers, whatever happened before."""

    def check(told: tuple[Told, ...]) -> None:
        _ranks(make(), told)

    _for_all(make, "order", check, histories(), examples=examples)


def check_same_facts_same_rank(make: Callable[[], OrderPolicy], examples: int) -> None:
    """A rank follows from facts and ``now``: asked again, in another order, or of a new policy, it is the same."""

    def check(told: tuple[Told, ...]) -> None:
        first, second = make(), make()
        one, other = _ranks(first, told), _ranks(second, told)
        for (asked, rank), (_, again) in zip(one, other, strict=True):
            if rank != again:
                _fail(
                    "order", first,
                    f"gives {asked.facts} the rank {rank!r} and, newly made and told the same, {again!r}",
                    "keep what it learns in the object, not in its class or module, and use no dice",
                )  # fmt: skip
        live = _live(told)
        now = told[-1].now
        forwards = {at.id: _rank(first, at, now) for at in live}
        backwards = {at.id: _rank(first, at, now) for at in reversed(live)}
        for at in live:
            if forwards[at.id] != backwards[at.id]:
                _fail(
                    "order", first,
                    f"gives {at} the rank {forwards[at.id]!r} and, asked again, {backwards[at.id]!r}",
                    "let a rank depend on facts, now and what note() was told; asking changes nothing",
                )  # fmt: skip

    _for_all(make, "order", check, histories(), examples=examples)


def check_no_clock(make: Callable[[], OrderPolicy], examples: int) -> None:
    """A policy looks at no clock and throws no dice: time is ``now``."""

    def check(told: tuple[Told, ...]) -> None:
        policy = make()
        with _watched(policy) as seen:
            _ranks(policy, told)
        if seen:
            _fail("order", policy, f"uses {seen[0]}()", "use now, which rank() is given, and no dice")

    _for_all(make, "order", check, histories(), examples=min(examples, 20))


def check_no_two_jobs_displace_each_other(make: Callable[[], OrderPolicy], examples: int) -> None:
    """Of any two jobs, one may take the other's place, and the other may not take it back at once."""

    def check(told: tuple[Told, ...]) -> None:
        policy = make()
        _ranks(policy, told)
        live, now = _live(told), told[-1].now
        for waiting in live:
            for running in live:
                if waiting.id == running.id or not _may(policy, waiting, running, now):
                    continue
                after = copy.deepcopy(policy) if isinstance(policy, Learns) else policy
                for facts in (_as(running, is_running=False, now=now), _as(waiting, is_running=True, now=now)):
                    _note(after, facts, now=now)
                if _may(after, running, waiting, now):
                    _fail(
                        "order", policy,
                        f"lets {waiting.id} take the place of {running.id} and lets it take it back at once: {waiting},"
                        f" {running}",
                        "let ranks not get worse by starting to run, nor better by waiting, beyond the margin",
                    )  # fmt: skip

    _for_all(make, "order", check, histories(), examples=examples)


def check_what_it_reads_is_what_it_says(make: Callable[[], OrderPolicy], examples: int) -> None:
    """Without ``knows_durations`` it reads none; without ``drift_ns`` no rank gets worse while its job runs."""

    def check_durations(told: tuple[Told, ...], expected_ns: int | None) -> None:
        policy = make()
        if policy.knows_durations:
            return
        changed = tuple(replace(at, facts=replace(at.facts, expected_ns=expected_ns)) for at in told)
        for (at, rank), (_, otherwise) in zip(_ranks(policy, told), _ranks(make(), changed), strict=True):
            if rank != otherwise:
                _fail(
                    "order", policy,
                    f"says knows_durations=False, and gives {at.facts} another rank when it lasts {expected_ns} ns",
                    "say knows_durations=True, or leave expected_ns alone",
                )  # fmt: skip

    def check_drift(told: tuple[Told, ...], ran_ns: int) -> None:
        policy = make()
        _ranks(policy, told)
        now = told[-1].now
        if not policy.preempts or policy.drift_ns:
            return
        for facts in _live(told):
            if policy.knows_durations and facts.expected_ns is None:
                continue
            running = _as(facts, is_running=True, now=now)
            later = replace(running, attained_ns=running.attained_ns + ran_ns, since_ns=now + ran_ns)
            before, after = _rank(policy, running, now), _rank(policy, later, now + ran_ns)
            if after > before:
                _fail(
                    "order", policy,
                    f"says drift_ns=0, and the rank of a running job gets worse, from {before!r} to {after!r} in"
                    f" {ran_ns} ns: {running}",
                    "say in drift_ns how often running jobs are to be looked at again",
                )  # fmt: skip

    times = st.integers(SECOND_NS, _YEAR_NS)
    _for_all(make, "order", check_durations, histories(), st.one_of(st.none(), times), examples=examples)
    _for_all(make, "order", check_drift, histories(), times, examples=examples)


def check_learning_is_a_fold(make: Callable[[], OrderPolicy], examples: int) -> None:
    """What is learned is all in the object: a copy, or one that was pickled, goes on as the first would have."""

    def check(told: tuple[Told, ...], share: int) -> None:
        at = len(told) * share // 100
        policy = make()
        if not isinstance(policy, Learns):
            return
        _ranks(policy, told[:at])
        ways: tuple[tuple[str, Callable[[Any], Any]], ...] = (
            ("copied", copy.deepcopy),
            ("pickled", lambda it: pickle.loads(pickle.dumps(it))),  # noqa: S301 - our own bytes
        )
        copies: list[tuple[str, OrderPolicy]] = []
        for way, made in ways:
            try:
                copies.append((way, made(policy)))
            except Exception as error:  # noqa: BLE001 - whatever a foreign class raises
                _fail(
                    "order", policy, f"cannot be {way}: {error!r}",
                    "keep plain values in it; no locks, files or functions without a name", error,
                )  # fmt: skip
        expected = _ranks(policy, told[at:], live=_live(told[:at]))
        for way, each in copies:
            found = _ranks(each, told[at:], live=_live(told[:at]))
            for (what, rank), (_, other) in zip(expected, found, strict=True):
                if rank != other:
                    _fail(
                        "order", policy,
                        f"gives {what.facts} the rank {rank!r} and, {way} before and told the same, {other!r}",
                        "keep all that it learns in the object, and let copies share none of it",
                    )  # fmt: skip

    _for_all(make, "order", check, histories(), st.integers(0, 100), examples=examples)


ORDER_CHECKS: Final[tuple[Callable[[Callable[[], OrderPolicy], int], None], ...]] = (
    check_description,
    check_ranks,
    check_same_facts_same_rank,
    check_no_clock,
    check_learning_is_a_fold,
    check_no_two_jobs_displace_each_other,
    check_what_it_reads_is_what_it_says,
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Told, ...]:
    """What a cloud tells of a few jobs: each submitted once, then run, displaced and ended; time goes on."""
    spans = st.one_of(st.integers(0, HOUR_NS), st.integers(0, 10 * _YEAR_NS))
    jobs: list[JobFacts] = []
    now = draw(st.integers(0, 60 * _YEAR_NS))
    told: list[Told] = []
    for number in range(draw(st.integers(2, 6))):
        now += draw(st.integers(0, HOUR_NS))
        kin, expected_ns = draw(st.sampled_from("ab")), draw(st.one_of(st.none(), st.integers(1, _YEAR_NS)))
        facts = JobFacts(
            id=f"job_{number}", kin=kin, tenant=kin, submitted_ns=now,
            gpu_milli=draw(st.sampled_from((0, 1, 250, 1_000, 2_000, 8_000, 512_000, 100_000_000))), attained_ns=0,
            running=False, since_ns=now, expected_ns=expected_ns, weight=draw(st.sampled_from((1.0, 0.001, 3.0, 1e3))),
        )  # fmt: skip
        jobs.append(facts)
        told.append(Told(facts=facts, now=now))
    ended: set[int] = set()
    moves = st.tuples(st.integers(0, len(jobs) - 1), spans, st.sampled_from(("runs", "waits", "ends")))
    for at, ran_ns, what in draw(st.lists(moves, max_size=12)):
        if at in ended or (what == "ends" and len(ended) == len(jobs) - 2):
            continue
        now += ran_ns
        jobs[at] = replace(jobs[at], attained_ns=jobs[at].attained_ns + ran_ns, running=what == "runs", since_ns=now)
        told.append(Told(facts=jobs[at], now=now, finished=what == "ends"))
        if what == "ends":
            ended.add(at)
    return tuple(told)


def _ranks(policy: OrderPolicy, told: Sequence[Told], live: Sequence[JobFacts] = ()) -> list[tuple[Told, float]]:
    """Tell a policy all that, and ask after each for the job's rank, and at the end for those of all."""
    found = []
    for at in told:
        _note(policy, at.facts, now=at.now, finished=at.finished)
        if not at.finished:
            found.append((at, _rank(policy, at.facts, at.now)))
    if told:
        now = told[-1].now
        found += [(Told(facts=facts, now=now), _rank(policy, facts, now)) for facts in _live(told, live)]
    return found


def _live(told: Sequence[Told], before: Sequence[JobFacts] = ()) -> list[JobFacts]:
    """The jobs that have not ended, as they are at the end."""
    live = {facts.id: facts for facts in before}
    for at in told:
        live[at.facts.id] = at.facts
    for at in told:
        if at.finished:
            del live[at.facts.id]
    return list(live.values())


def _as(facts: JobFacts, *, is_running: bool, now: int) -> JobFacts:
    return replace(facts, running=is_running, since_ns=now)


def _may(policy: OrderPolicy, waiting: JobFacts, running: JobFacts, now: int) -> bool:
    first = _rank(policy, _as(waiting, is_running=False, now=now), now)
    return may_displace(policy, waiting=first, running=_rank(policy, _as(running, is_running=True, now=now), now))


def _note(policy: OrderPolicy, facts: JobFacts, *, now: int, finished: bool = False) -> None:
    if not isinstance(policy, Learns):
        return
    try:
        policy.note(facts, finished=finished)
    except Exception as error:  # noqa: BLE001 - whatever a foreign policy raises
        _fail(
            "order", policy, f"raises {error!r} when told of {facts} at {now}",
            "let note() take any job: new ones, displaced ones and, with finished=True, ones that ended", error,
        )  # fmt: skip


def _rank(policy: OrderPolicy, facts: JobFacts, now: int) -> float:
    try:
        rank: Any = policy.rank(facts, now=now)
    except Exception as error:  # noqa: BLE001 - whatever a foreign policy raises
        _fail("order", policy, f"raises {error!r} for {facts} at {now}", "let rank() answer for every job", error)
    is_number = isinstance(rank, int | float | np.integer | np.floating) and not isinstance(rank, bool)
    if not is_number or not math.isfinite(rank) or rank <= 0:
        _fail(
            "order", policy, f"gives {facts} at {now} the rank {rank!r}",
            "give a finite number above 0; jobs may have run for no time, for years, without GPUs, with many",
        )  # fmt: skip
    return float(rank)


# -- placement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """What a placement policy may read of a fleet (``score.Columns``), and nothing else."""

    cpu_free: Ints
    memory_free: Ints
    cpu_total: Ints
    memory_total: Ints
    gpu_free: Ints
    model: Ints
    models: list[str]

    def fitting(self, want: Want) -> Ints:
        """The rows where one worker fits. Shape (R,)."""
        fits = (self.cpu_free >= want.cpu_milli) & (self.memory_free >= want.memory_bytes)
        if want.count:
            fits &= self.serving(want).sum(axis=1) >= want.count
        return np.flatnonzero(fits)

    def serving(self, want: Want) -> NDArray[np.bool_]:
        """Which devices could give what one worker asks of each, shape (N, D)."""
        serves: NDArray[np.bool_] = (self.model >= 0) & (self.gpu_free >= want.milli)
        if want.models:
            serves &= np.isin(self.model, want.models)
        return serves


Mix = tuple[tuple[Want, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A fleet, a worker's request, the rows where it fits, in any order, and mixes to learn before."""

    fleet: Fleet
    want: Want
    rows: Ints
    mixes: tuple[Mix, ...]


def check_score_description(make: Callable[[], Score], examples: int) -> None:  # noqa: ARG001
    """A placement policy has a name and a version, which is an integer."""
    policy = make()
    name: Any = getattr(policy, "name", None)
    if not isinstance(name, str) or not name:
        _fail("score", policy, f"has the name {name!r}", "give it a text by which settings can name it")
    version: Any = getattr(policy, "version", None)
    if isinstance(version, bool) or not isinstance(version, int):
        _fail("score", policy, f"has version {version!r}", "make it an integer that learn() raises")


def check_shapes(make: Callable[[], Score], examples: int) -> None:
    """Scores are one 64-bit integer for each row given, small enough to be keys, and so are columns."""

    def check(asked: Question) -> None:
        policy = make()
        for mix in ((), *asked.mixes):
            _learn(policy, mix)
            _scores(policy, asked.fleet, asked.want, asked.rows)

    _for_all(make, "score", check, questions(), examples=examples)


def check_columns_are_feasible(make: Callable[[], Score], examples: int) -> None:
    """The device chosen for a share has room for it and is of a model that will do; for anything else it is -1."""

    def check(asked: Question) -> None:
        policy, want = make(), asked.want
        _, columns = _scores(policy, asked.fleet, want, asked.rows)
        serving = asked.fleet.serving(want)
        for row, column in zip(asked.rows.tolist(), columns.tolist(), strict=True):
            if want.count == 0 or want.milli == MILLI:
                if column != -1:
                    _fail(
                        "score", policy, f"chooses column {column} for {want}, which asks for no share",
                        "give column -1 for whole GPUs and for none",
                    )  # fmt: skip
            elif not 0 <= column < serving.shape[1] or not serving[row, column]:
                _fail(
                    "score", policy,
                    f"chooses column {column} for {want} on a node with GPUs of models"
                    f" {asked.fleet.model[row].tolist()} and {asked.fleet.gpu_free[row].tolist()} milli free",
                    "choose a column whose model will do and whose gpu_free is at least want.milli",
                )  # fmt: skip

    _for_all(make, "score", check, questions(), examples=examples)


def check_same_question_same_scores(make: Callable[[], Score], examples: int) -> None:
    """Asked again, after other questions, or of a new policy that learned the same, it says the same."""

    def check(asked: Question, other: Question) -> None:
        first, second = make(), make()
        for mix in ((), *asked.mixes):
            _learn(first, mix)
            _learn(second, mix)
            one = _scores(first, asked.fleet, asked.want, asked.rows)
            _scores(first, other.fleet, other.want, other.rows)
            for again in (_scores(second, asked.fleet, asked.want, asked.rows), _scores(first, *_of(asked))):
                if not _same(one, again):
                    _fail(
                        "score", first,
                        f"says {_told(one)} and then {_told(again)} to the same question: {_said(asked)}",
                        "let scores follow from free amounts and the mix learned; no dice, no memory of questions",
                    )  # fmt: skip

    _for_all(make, "score", check, questions(), questions(), examples=examples)


def check_scores_use_no_clock(make: Callable[[], Score], examples: int) -> None:
    """A placement policy looks at no clock and throws no dice."""

    def check(asked: Question) -> None:
        policy = make()
        with _watched(policy) as seen:
            for mix in ((), *asked.mixes):
                _learn(policy, mix)
                _scores(policy, asked.fleet, asked.want, asked.rows)
        if seen:
            _fail("score", policy, f"uses {seen[0]}()", "let scores follow from free amounts and the mix learned")

    _for_all(make, "score", check, questions(), examples=min(examples, 20))


def check_rows_do_not_matter_to_each_other(make: Callable[[], Score], examples: int) -> None:
    """A node's score depends on its own free amounts: not on which others are asked about, nor on how full they are."""

    def check(asked: Question, data: int) -> None:
        policy, fleet, rows = make(), asked.fleet, asked.rows
        score, column = _scores(policy, fleet, asked.want, rows)
        for at in range(len(rows)):
            alone = _scores(policy, fleet, asked.want, rows[at : at + 1])
            if not _same((score[at : at + 1], column[at : at + 1]), alone):
                _fail(
                    "score", policy,
                    f"says {_told((score, column))} of rows {rows.tolist()} and {_told(alone)} of row {rows[at]} alone",
                    "look only at the row itself; scores are cached one by one",
                )  # fmt: skip
        other = data % len(fleet.cpu_free)
        version = policy.version
        for field in ("cpu_free", "memory_free", "gpu_free"):
            getattr(fleet, field)[other] //= 2
        stay = rows != other
        if not stay.any():
            return
        later = _scores(policy, fleet, asked.want, rows[stay])
        if policy.version == version and not _same((score[stay], column[stay]), later):
            _fail(
                "score", policy,
                f"says {_told((score[stay], column[stay]))} of rows {rows[stay].tolist()} and, when only row {other} is"
                f" fuller, {_told(later)}",
                "look only at the row itself; a score stays cached until the node's own free amounts change",
            )  # fmt: skip

    _for_all(make, "score", check, questions(), st.integers(0, 7), examples=examples)


def check_the_fleet_is_only_read(make: Callable[[], Score], examples: int) -> None:
    """Neither the fleet, nor the rows, nor the mix is changed."""

    def check(asked: Question) -> None:
        policy = make()
        for mix in ((), *asked.mixes):
            kept = list(mix)
            if mix:
                _guarded(policy, "learn", partial(policy.learn, kept))
            if kept != list(mix):
                _fail("score", policy, "changes the mix that learn() is given", "work on a copy")
            fleet, rows = copy.deepcopy(asked.fleet), asked.rows.copy()
            _scores(policy, fleet, asked.want, rows)
            if not np.array_equal(rows, asked.rows):
                _fail("score", policy, "changes the rows that it is given", "work on a copy of rows")
            for field in fields(Fleet):
                if not np.array_equal(getattr(fleet, field.name), getattr(asked.fleet, field.name)):
                    _fail(
                        "score", policy, f"changes {field.name} of the fleet",
                        "work on copies: fleet.cpu_free[rows] is one, fleet.cpu_free is the fleet's own",
                    )  # fmt: skip

    _for_all(make, "score", check, questions(), examples=examples)


def check_learning_shows_in_the_version(make: Callable[[], Score], examples: int) -> None:
    """While ``version`` stays, scores stay; and a version is not used again for other scores."""

    def check(asked: Question) -> None:
        policy = make()
        known = {policy.version: _scores(policy, *_of(asked))}
        for mix in asked.mixes:
            _learn(policy, mix)
            found = _scores(policy, *_of(asked))
            before = known.setdefault(policy.version, found)
            if not _same(before, found):
                _fail(
                    "score", policy,
                    f"says {_told(before)} at version {policy.version} and, after it learned {mix}, {_told(found)} at"
                    f" the same version: {_said(asked)}",
                    "raise version by one in learn() whenever scores may change",
                )  # fmt: skip

    _for_all(make, "score", check, questions(), examples=examples)


SCORE_CHECKS: Final[tuple[Callable[[Callable[[], Score], int], None], ...]] = (
    check_score_description,
    check_shapes,
    check_the_fleet_is_only_read,
    check_columns_are_feasible,
    check_same_question_same_scores,
    check_scores_use_no_clock,
    check_rows_do_not_matter_to_each_other,
    check_learning_shows_in_the_version,
)

_WANTS: Final = (
    *(want for want, _ in UNLEARNED),
    Want(4_000, 16 << 30, 1, 500, (0,)),
    Want(4_000, 16 << 30, 1, 300, (1,)),
    Want(6_000, 32 << 30, 1, MILLI, (1,)),
    Want(1_000, 1 << 30, 0, 0),
    Want(16_000, 4 << 30, 0, 0),
    Want(100, 1 << 20, 1, 1),
    Want(100, 1 << 20, 1, 999, (0, 1)),
)
_TAKEN: Final = (1, 190, 250, 500, 530, 1_000, 1_200)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """Small fleets of few kinds of nodes, some in use, with a request that fits on one row or more."""
    shares = tuple(want for want in _WANTS if 0 < want.milli < MILLI and want.models)
    want = draw(st.one_of(st.sampled_from(_WANTS), st.sampled_from(shares)))
    nodes, width = draw(st.integers(1, 6)), draw(st.integers(want.count, 8 if want.count else 4))
    kinds = draw(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 3)), min_size=nodes, max_size=nodes))
    model = np.array([[kind] * width for kind, _ in kinds], np.int64).reshape(nodes, width)
    sure = draw(st.integers(0, nodes - 1))
    if want.count:
        model[sure] = draw(st.sampled_from(want.models or (0, 1)))
    cpu_total = np.array([(want.cpu_milli + 1_000) << size for _, size in kinds], np.int64)
    memory_total = np.array([(want.memory_bytes + (1 << 30)) << size for _, size in kinds], np.int64)
    used = np.array(draw(st.lists(st.sampled_from((0, 0, 30, 60, 90, 110)), min_size=nodes, max_size=nodes)), np.int64)
    used[sure] = 0
    cpu_free, memory_free = cpu_total - cpu_total * used // 100, memory_total - memory_total * used // 100
    gpu_free = np.full((nodes, width), MILLI, np.int64)
    if width:
        cells = st.tuples(st.integers(0, nodes - 1), st.integers(0, width - 1))
        others = cells.filter(lambda cell: cell[0] != sure or cell[1] < width - want.count)
        if nodes > 1 or width > want.count:
            for cell, milli in draw(st.lists(st.tuples(others, st.sampled_from(_TAKEN)), max_size=8)):
                gpu_free[cell] -= milli
            for cell in draw(st.lists(others, max_size=8)):
                model[cell] = 1 - abs(model[cell])
            for cell in draw(st.lists(others, max_size=2)):
                model[cell] = -1
    gpu_free[model < 0] = 0
    fleet = Fleet(cpu_free, memory_free, cpu_total, memory_total, gpu_free, model, ["A100", "H100"] if width else [])
    rows = draw(st.permutations(fleet.fitting(want).tolist()))
    mixes = st.lists(st.tuples(st.sampled_from(_WANTS), st.sampled_from((1.0, 0.5, 20.0))), min_size=1, max_size=4)
    return Question(
        fleet=fleet, want=want, rows=np.array(rows, np.int64), mixes=tuple(draw(st.lists(mixes.map(tuple), max_size=3)))
    )


def _of(asked: Question) -> tuple[Fleet, Want, Ints]:
    return asked.fleet, asked.want, asked.rows


def _scores(policy: Score, fleet: Fleet, want: Want, rows: Ints) -> tuple[Ints, Ints]:
    """What a policy says, where it is of the right form."""
    found: Any = _guarded(policy, "scores", lambda: policy.scores(fleet, want, rows))
    if not isinstance(found, tuple) or len(found) != 2:
        _fail("score", policy, f"gives {found!r}", "give two arrays, scores and columns")
    for what, array in zip(("scores", "columns"), found, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != np.int64:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            _fail("score", policy, f"gives {what} of type {kind}", "give arrays of numpy.int64")
        if array.shape != rows.shape:
            _fail(
                "score", policy, f"gives {what} of shape {array.shape} for {len(rows)} rows",
                "give one for each of the rows given, in their order, not for all nodes",
            )  # fmt: skip
    scores, columns = found
    beyond = np.flatnonzero((scores > MOST_SCORE) | (scores < -MOST_SCORE))
    if beyond.size:
        _fail(
            "score", policy,
            f"gives row {rows[beyond[0]]} the score {scores[beyond[0]]} for {want}, which fits there; beyond"
            f" {MOST_SCORE} a key is no longer in order, and a pod that fits may be refused",
            f"keep scores within {MOST_SCORE} up and down; a node that should come last gets a low score, never NEVER",
        )  # fmt: skip
    return scores.copy(), columns.copy()


def _learn(policy: Score, mix: Mix) -> None:
    if mix:
        _guarded(policy, "learn", lambda: policy.learn(mix))


def _guarded(policy: Score, what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever a foreign policy raises
        _fail(
            "score", policy, f"raises {error!r} in {what}()",
            "let it answer for every fleet, with what Columns has: nodes without GPUs, models that nobody asks for",
            error,
        )  # fmt: skip


def _same(one: tuple[Ints, Ints], other: tuple[Ints, Ints]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _told(found: tuple[Ints, Ints]) -> str:
    return f"scores {found[0].tolist()} and columns {found[1].tolist()}"


def _said(asked: Question) -> str:
    return f"{asked.want} on rows {asked.rows.tolist()} of {asked.fleet}"


# -- what the checks are written with ---------------------------------------------------------------------------------


def _fail(kind: str, policy: Any, did: str, mend: str, cause: BaseException | None = None) -> NoReturn:
    name = getattr(policy, "name", None) or type(policy).__name__
    what = f"{kind} policy" if kind else "policy"
    raise AssertionError(f"The {what} {name!r} {did}. Mend: {mend}.") from cause


def _for_all(
    make: Callable[[], Any], kind: str, check: Callable[..., None], *given_by: st.SearchStrategy[Any], examples: int
) -> None:
    """Try a check on that many cases, the same ones every time. Raises: AssertionError of the simplest that fails."""
    quiet = settings(
        max_examples=examples, database=None, deadline=None, derandomize=True, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def tried(case: tuple[Any, ...]) -> None:
        check(*case)

    try:
        quiet(given(st.tuples(*given_by))(tried))()
    except Flaky as error:
        seen = [each for each in getattr(error, "exceptions", ()) if isinstance(each, AssertionError)]
        if seen:
            raise seen[0] from None
        _fail(
            kind, make(), "fails in one run and passes in the next, for the same case",
            "keep no state outside the object, and use no clock and no dice", error,
        )  # fmt: skip


@contextmanager
def _watched(policy: object) -> Iterator[list[str]]:
    """Gives the clocks and dice that this thread uses meanwhile, also those that the policy's modules imported."""
    seen: list[str] = []
    us = threading.get_ident()

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == us:
                seen.append(name)
            return function(*args, **kwargs)

        return watched

    def calendar(kind: type[Any], *names: str) -> type[Any]:
        asks = {name: staticmethod(watch(f"{kind.__name__}.{name}", getattr(kind, name))) for name in names}
        return type(kind.__name__, (kind,), asks)

    sources: Mapping[Any, tuple[str, ...]] = {time: _CLOCKS, random: _DICE, np.random: (*_DICE, "default_rng", "rand")}
    watches: dict[int, Any] = {
        id(function): watch(f"{source.__name__}.{name}", function)
        for source, names in sources.items()
        for name in names
        if (function := getattr(source, name, None)) is not None
    }
    moment, day = calendar(datetime.datetime, "now", "utcnow", "today"), calendar(datetime.date, "today")
    watches |= {
        id(datetime.datetime): moment,
        id(datetime.date): day,
        id(datetime): types.SimpleNamespace(**{**vars(datetime), "datetime": moment, "date": day}),
    }
    own = {sys.modules[kind.__module__] for kind in type(policy).__mro__ if kind.__module__ != "builtins"}
    changed: list[tuple[Any, str, Any]] = []
    for module in {*sources, *own}:
        for name, value in list(vars(module).items()):
            if id(value) in watches:
                changed.append((module, name, value))
    try:
        for module, name, value in changed:
            setattr(module, name, watches[id(value)])
        yield seen
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
