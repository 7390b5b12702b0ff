"""A rollout's decisions, and whole rollouts played through them with replicas that come up, fail and take their time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core import rollout as decisions
from tidemill.core.lifecycle import ROLLOUT, apply
from tidemill.core.rollout import Answers, Decision, Seen, Side, decide, judge
from tidemill.model.ids import ProjectId, RolloutId, WorkloadId
from tidemill.model.rollout import CanaryStep, Comparison, Rolling, Rollout, RolloutState
from tidemill.model.values import replace
from tidemill.units import MINUTE_NS, SECOND_NS

CANARY, ROLLING, RETURNING = RolloutState.CANARY, RolloutState.ROLLING, RolloutState.RETURNING


def rollout(state: RolloutState = ROLLING, **more: object) -> Rollout:
    made = Rollout(
        id=RolloutId("rol_2"),
        project_id=ProjectId("p"),
        name="chat",
        first_id=WorkloadId("wl_1"),
        before_id=WorkloadId("wl_1"),
        workload_id=WorkloadId("wl_2"),
        revision=2,
        state=state,
    )
    return replace(made, **more)


def side(kept: int, ready: int | None = None, **more: int) -> Side:
    known = {"kept": kept, "held": kept, "live": 4, "ready": kept if ready is None else ready}
    return Side(**(known | more))


@pytest.mark.parametrize(
    ("rolling", "old", "new", "then"),
    [
        (Rolling(), side(4), side(0), (4, 1)),
        (Rolling(surge=4), side(4), side(0), (4, 4)),
        (Rolling(), side(4), side(1, 0), (4, 1)),
        (Rolling(), side(4), side(1), (3, 1)),
        (Rolling(), side(3, held=4), side(1), (3, 1)),
        (Rolling(), side(3), side(1), (3, 2)),
        (Rolling(surge=0, unavailable=1), side(4), side(0), (3, 0)),
        (Rolling(surge=0, unavailable=1), side(3, held=4), side(0), (3, 0)),
        (Rolling(surge=0, unavailable=1), side(3), side(0), (3, 1)),
        (Rolling(surge=0, unavailable=4), side(4), side(0), (0, 0)),
    ],
)
def test_one_comes_before_one_goes(rolling: Rolling, old: Side, new: Side, then: tuple[int, int]) -> None:
    found = decide(rollout(), rolling, Seen(needed=4, old=old, new=new), now=1)
    assert (found.old, found.new, found.event) == (*then, "")


def test_it_is_complete_when_the_new_one_is_whole_and_nothing_of_the_old_one_is_left() -> None:
    assert decide(rollout(), Rolling(), Seen(needed=4, old=side(0, held=1), new=side(4)), now=1).event == ""
    assert decide(rollout(), Rolling(), Seen(needed=4, old=side(0), new=side(4)), now=1).event == "completed"
    assert decide(rollout(), Rolling(), Seen(needed=0, old=side(0), new=side(0)), now=1).event == "completed"


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (Seen(needed=2, old=side(2), new=side(0, live=0)), "it was stopped"),
        (Seen(needed=2, old=side(2), new=side(1, 0, lost=1)), "1 of its replicas failed for good"),
        (Seen(needed=2, old=side(2), new=side(1, 0, failures=3)), "its replicas failed 3 times"),
        (Seen(needed=2, old=side(2), new=side(1, 0), still_ns=30 * MINUTE_NS), "it came no further for 30m"),
        (
            Seen(
                needed=2, old=side(2), new=side(1), old_answers=Answers(requests=90),
                new_answers=Answers(requests=60, errors=9),
            ),
            "9 of 60 requests failed on it, and 0 of 90",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", [CANARY, ROLLING])
def test_a_bad_revision_is_taken_back_from_wherever_it_is(seen: Seen, why: str, state: RolloutState) -> None:
    found = decide(rollout(state), Rolling(steps=(CanaryStep(weight=10),)), seen, now=1)
    assert found.event == "reversed"
    assert found.why.startswith(why)


def test_what_is_taken_back_gets_no_more_requests_and_the_old_one_comes_up_first() -> None:
    found = decide(rollout(RETURNING), Rolling(), Seen(needed=4, old=side(1), new=side(3)), now=1)
    assert (found.old, found.new, found.weights) == (2, 3, (100, 0))
    assert decide(rollout(RETURNING), Rolling(), Seen(needed=4, old=side(2), new=side(3, 0)), now=1).new == 0
    over = Seen(needed=4, old=side(4), new=side(0))
    assert decide(rollout(RETURNING, detail="bad"), Rolling(), over, now=1).event == "reverted"


def test_a_canary_is_held_from_when_it_is_ready_and_goes_step_by_step() -> None:
    rolling = Rolling(steps=(CanaryStep(weight=10, hold_ns=MINUTE_NS), CanaryStep(weight=50)))
    there = rollout(CANARY)
    assert decide(there, rolling, Seen(needed=4, old=side(4), new=side(0)), now=1).weights == (100, 0)
    found = decide(there, rolling, Seen(needed=4, old=side(4), new=side(1)), now=1)
    assert (found.event, found.weights) == ("watched", (90, 10))
    watched = replace(there, watched_ns=SECOND_NS)
    seen = Seen(needed=4, old=side(4), new=side(1), still_ns=10**18)
    assert decide(watched, rolling, seen, now=MINUTE_NS).event == "", "a canary that is held is not stuck"
    assert decide(watched, rolling, seen, now=MINUTE_NS + SECOND_NS).event == "advanced"
    second = replace(watched, step=1, watched_ns=0)
    found = decide(second, rolling, Seen(needed=4, old=side(4), new=side(1)), now=2)
    assert (found.old, found.new, found.weights) == (3, 1, (50, 50)), "there is room for five"
    held = replace(second, watched_ns=1)
    assert decide(held, rolling, Seen(needed=4, old=side(2), new=side(2)), now=10**18).event == "", (
        "it waits for a word"
    )
    last = replace(watched, step=0)
    one = Rolling(steps=rolling.steps[:1])
    assert decide(last, one, seen, now=MINUTE_NS + SECOND_NS).event == "promoted"


@pytest.mark.parametrize(
    ("old", "new", "is_bad"),
    [
        (Answers(requests=1000, errors=100), Answers(requests=100, errors=15), False),
        (Answers(requests=1000, errors=100), Answers(requests=100, errors=16), True),
        (Answers(), Answers(requests=50, errors=3), True),
        (Answers(), Answers(requests=49, errors=49), False),
        (Answers(requests=100, slow_ns=100), Answers(requests=100, slow_ns=200), False),
        (Answers(requests=100, slow_ns=100), Answers(requests=100, slow_ns=201), True),
        (Answers(requests=49, slow_ns=100), Answers(requests=100, slow_ns=900), False),
    ],
)
def test_a_revision_is_compared_with_the_one_before(old: Answers, new: Answers, is_bad: bool) -> None:
    assert bool(judge(Comparison(slower_milli=2000), old, new)) is is_bad


@settings(max_examples=200, deadline=None)
@given(
    st.builds(Answers, requests=st.integers(0, 500), errors=st.integers(0, 500)),
    st.builds(Answers, requests=st.integers(0, 500), errors=st.integers(0, 500)),
    st.integers(0, 500),
)
def test_more_errors_never_speak_for_a_revision(old: Answers, new: Answers, more: int) -> None:
    if judge(Comparison(), old, new):
        assert judge(Comparison(), old, replace(new, errors=new.errors + more))


# Whole rollouts


@dataclass
class Pool:
    """The replicas of one revision: each is queued, starting, ready, or ending."""

    queued: int = 0
    starting: int = 0
    ready: int = 0
    ending: int = 0

    def side(self, live: int) -> Side:
        kept = self.queued + self.starting + self.ready
        return Side(kept=kept, held=kept + self.ending, ready=self.ready, live=live)

    def steer(self, wanted: int) -> None:
        """Have as many as are wanted; those that are ready go last."""
        kept = self.queued + self.starting + self.ready
        self.queued += max(0, wanted - kept)
        for _ in range(max(0, kept - wanted)):
            if self.queued:
                self.queued -= 1
            elif self.starting:
                self.starting, self.ending = self.starting - 1, self.ending + 1
            else:
                self.ready, self.ending = self.ready - 1, self.ending + 1

    def happens(self, what: int, room: int) -> None:
        """One replica moves on, where it can."""
        if what % 3 == 0 and self.queued and room:
            self.queued, self.starting = self.queued - 1, self.starting + 1
        elif what % 3 == 1 and self.starting:
            self.starting, self.ready = self.starting - 1, self.ready + 1
        elif self.ending:
            self.ending -= 1


@dataclass
class Play:
    """One rollout on a cloud with room for so many replicas."""

    rolling: Rolling
    needed: int
    room: int
    state: Rollout = field(default_factory=rollout)
    now: int = 1

    def __post_init__(self) -> None:
        self.old, self.new = Pool(ready=self.needed), Pool()
        if self.rolling.steps:
            self.state = rollout(CANARY)

    @property
    def seen(self) -> Seen:
        live = self.needed if not self.state.is_over else 0
        return Seen(needed=self.needed, old=self.old.side(max(live, 1)), new=self.new.side(max(live, 1)))

    def look(self) -> Decision:
        found = decide(self.state, self.rolling, self.seen, now=self.now)
        if found.event:
            self.move(found.event)
        else:
            self.old.steer(found.old)
            self.new.steer(found.new)
        return found

    def move(self, event: str) -> None:
        self.state = replace(
            self.state,
            state=apply(ROLLOUT, self.state.state, event),
            step=self.state.step + (event == "advanced"),
            watched_ns=self.now if event == "watched" else 0,
        )

    def check(self, found: Decision) -> None:
        held = sum(one.queued + one.starting + one.ready + one.ending for one in (self.old, self.new))
        assert held <= self.needed + self.rolling.surge, "there are more replicas than there may be"
        ready = self.old.ready + self.new.ready
        assert ready >= self.needed - self.rolling.unavailable, "fewer are ready than have to be"
        assert found.weights is None or sum(found.weights) == 100
        if found.weights is not None:
            assert not (found.weights[0] and not self.old.ready + self.old.ending), (
                "requests for a revision that is gone"
            )

    def finish(self) -> None:
        """Everything that has to happen does, in the end."""
        for turn in range(600):
            self.now += MINUTE_NS
            self.check(self.look())
            for pool in (self.old, self.new):
                for what in range(3):
                    pool.happens(what + turn, self.free)
            if self.state.is_over:
                return
        raise AssertionError(f"it never ends: {self.state.state}, {self.old}, {self.new}")

    @property
    def free(self) -> int:
        return self.room - sum(one.starting + one.ready + one.ending for one in (self.old, self.new))


def rollings() -> st.SearchStrategy[Rolling]:
    steps = st.lists(st.integers(1, 99), unique=True, max_size=3).map(
        lambda found: tuple(CanaryStep(weight=weight, hold_ns=MINUTE_NS) for weight in sorted(found))
    )
    pairs = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)
    return st.tuples(pairs, steps).map(lambda it: Rolling(surge=it[0][0], unavailable=it[0][1], steps=it[1]))


def check_any_rollout() -> None:
    """No rollout has too many replicas or too few ready, whenever it is reversed, and each comes to its end."""

    @settings(max_examples=150, deadline=None, report_multiple_bugs=False)
    @given(rollings(), st.integers(1, 5), st.lists(st.integers(0, 11), max_size=25), st.booleans())
    def check(rolling: Rolling, needed: int, course: list[int], is_reversed: bool) -> None:
        play = Play(rolling, needed, room=needed + rolling.surge)
        for what in course:
            play.now += SECOND_NS
            play.check(play.look())
            (play.old if what % 2 else play.new).happens(what // 2, play.free)
        if is_reversed and not play.state.is_over and play.state.state is not RETURNING:
            play.move("reversed")
        play.finish()
        left = play.old if play.state.state is RolloutState.REVERTED else play.new
        assert (left.ready, play.old.ready + play.new.ready) == (needed, needed)

    check()


def test_whatever_happens_a_rollout_keeps_enough_replicas_and_not_too_many_and_ends() -> None:
    check_any_rollout()


def test_the_check_finds_a_rollout_that_gives_up_replicas_before_others_are_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = decisions._exchange

    def counts_those_that_start(
        rolling: Rolling, needed: int, going: Side, coming: Side, **more: object
    ) -> tuple[int, int]:
        return right(rolling, needed, going, replace(coming, ready=coming.kept), **more)  # type: ignore[arg-type]

    monkeypatch.setattr(decisions, "_exchange", counts_those_that_start)
    with pytest.raises(AssertionError, match="fewer are ready"):
        check_any_rollout()
