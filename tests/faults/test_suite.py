"""The auditor of the fault cases reports every promise that is broken on purpose; and two of the cases, as a proof that they run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.__main__ import Round, outcomes, seeds_by_store, status, together
from tests.faults.suite import journal
from tests.faults.suite.audit import Evidence, violations
from tests.faults.suite.bed import Beds
from tests.faults.suite.journal import Life
from tests.faults.suite.pytests import judged
from tests.faults.suite.registry import Case, Skipped
from tests.faults.suite.running import CASES, Done
from tests.faults.suite.writes import Record

SECOND = 1_000_000_000
HOME = Path("/home/machine")


def life(job: str = "a", *, attempt: int = 1, rank: int = 0, since: float = 0, until: float = 10, **more: Any) -> Life:
    """A life as a worker writes it down; times in s."""
    told = {
        "launch": f"run_{job}-{attempt}-{rank}", "job": f"job_{job}", "fence": attempt, "rank": rank, "milli": 1000,
        "gpu_milli": 1000, "devices": (f"GPU-{job}",), "home": HOME, "began_ns": round(since * SECOND), "last_ns": round(until * SECOND), "ended": True,
    }  # fmt: skip
    return Life(**(told | more))


def job(name: str = "a", state: str = "succeeded", *, attempts: int = 1) -> dict[str, Any]:
    """A job as the API shows it, whose worker held its place from 0 to 10 s."""
    worker = {
        "attempt": attempts, "rank": 0, "launch": f"run_{name}-{attempts}-0", "held_at_ns": 0, "released_at_ns": 10 * SECOND
    }  # fmt: skip
    return {"id": f"job_{name}", "name": name, "state": state, "attempts": attempts, "workers": [worker]}


def line(
    launch: str = "run_a-1-0", *, since: float = 0, until: float = 10, milli: int = 1000, meter: str = "cpu"
) -> tuple[str, str, int, int, int, str]:
    """A line of the books; times in s."""
    return ("node", meter, round(since * SECOND), round(until * SECOND), milli, launch)


def sound() -> Evidence:
    """What is found after a job that ran as it should, on a machine of one CPU."""
    return Evidence(
        lives=[life()],
        acknowledged={"job_a": "a"},
        witnesses=frozenset({"job_a"}),
        jobs={"job_a": job()},
        books=[line()],
        capacity=1000,
    )


def test_nothing_is_reported_where_nothing_is_wrong() -> None:
    assert violations(sound()) == []


PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "one launch that was started twice": ("I1", {"lives": [life(until=3), life(since=4)]}),
    "a second attempt that began while the first one lived": (
        "I1",
        {
            "lives": [
                life(milli=400, gpu_milli=400),
                life(attempt=2, since=9.9, until=10, milli=400, gpu_milli=400),
            ],
            "jobs": {"job_a": job(attempts=2)},
            "books": [line("run_a-2-0")],
            "may_restart": frozenset({"job_a"}),
        },
    ),
    "two that share a machine which has room for one": (
        "I2",
        {
            "lives": [life(), life("b")],
            "acknowledged": {"job_a": "a", "job_b": "b"},
            "jobs": {"job_a": job(), "job_b": job("b")},
            "books": [line(milli=500), line("run_b-1-0", milli=500)],
        },
    ),
    "an old token that came after a newer one": (
        "I1",
        {
            "lives": [life(attempt=2, until=3), life(since=4)],
            "jobs": {"job_a": job(attempts=2)},
            "books": [line("run_a-2-0")],
            "may_restart": frozenset({"job_a"}),
            "witnesses": frozenset(),
        },
    ),
    "two that share a GPU of which each was given the whole": (
        "I2",
        {
            "lives": [life(milli=400, devices=("GPU-0",)), life("b", milli=400, devices=("GPU-1", "GPU-0"))],
            "acknowledged": {"job_a": "a", "job_b": "b"},
            "jobs": {"job_a": job(), "job_b": job("b")},
            "books": [line(milli=500), line("run_b-1-0", milli=500)],
        },
    ),
    "a key that was acknowledged and is not there": ("I3", {"things": {("token", "tok_1"): {"name": "k"}}}),
    "a budget that is another than was acknowledged": (
        "I3",
        {
            "things": {("project", "prj_1"): {"limits": {"usd/month": 250.0}}},
            "there": {("project", "prj_1"): {"limits": {}}},
        },
    ),
    "a write that nobody can look for": ("I3", {"unknown": frozenset({"POST /v1/reservations"})}),
    "a submission that was acknowledged and is not there": ("I3", {"acknowledged": {"job_a": "a", "job_b": "b"}}),
    "a job that another one took the id of": ("I3", {"acknowledged": {"job_a": "other"}}),
    "a stop that was acknowledged and forgotten": (
        "I3",
        {"jobs": {"job_a": job(state="running")}, "stopped": frozenset({"job_a"}), "may_run": frozenset({"job_a"})},
    ),
    "a success that no worker knows of": ("I3", {"lives": []}),
    "a success of a worker that did not come to its end": ("I3", {"lives": [life(ended=False)]}),
    "a process of a job that is over": ("I4", {"running": frozenset({"run_a-1-0"})}),
    "a process of a job that nobody knows": ("I4", {"running": frozenset({"run_zz-1-0"})}),
    "a worker that wrote in the name of a job that nobody knows": (
        "I4",
        {"lives": [life(milli=500), life("zz", milli=500)]},
    ),
    "a healthy job that was started again": (
        "I5",
        {"lives": [life(attempt=2)], "jobs": {"job_a": job(attempts=2)}, "books": [line("run_a-2-0")]},
    ),
    "a job that lived twice, and the API says once": ("I5", {"lives": [life(until=3), life(attempt=2, since=4)]}),
    "a second that was paid for twice": (
        "I6",
        {"books": [line(), line(since=3, until=4)]},
    ),
    "a second that nobody paid for": ("I6", {"books": [line(until=4), line(since=5)]}),
    "a job that paid for less than it held": ("I6", {"books": [line(until=9)]}),
    "time that went backwards in the books": (
        "I6",
        {"books": [line(until=11), line(since=11, until=10), line("", since=10, until=10)]},
    ),
    "a database that says of itself that it is damaged": ("I7", {"unsound": ["event 7 is missing"]}),
    "a job that comes to no end": ("I8", {"jobs": {"job_a": job(state="queued")}, "lives": [], "books": []}),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_violation_is_reported(what: str) -> None:
    number, wrong = PLANTED[what]
    found = violations(replace(sound(), **wrong))
    assert {sentence.partition(":")[0] for sentence in found} == {number}, found


def test_every_promise_has_a_planted_violation() -> None:
    assert {number for number, _ in PLANTED.values()} == {f"I{number}" for number in range(1, 9)}


def test_what_may_be_is_not_reported() -> None:
    """A worker that was killed on purpose is started again, one that is to run on runs on."""
    again = replace(
        sound(),
        lives=[life(until=3, ended=False), life(attempt=2, since=4)],
        jobs={"job_a": job(attempts=2)},
        books=[line("run_a-2-0")],
        may_restart=frozenset({"job_a"}),
    )
    assert violations(again) == []
    runs = replace(
        sound(),
        jobs={"job_a": job(state="running")},
        running=frozenset({"run_a-1-0"}),
        may_run=frozenset({"job_a"}),
        books=[],
    )
    assert violations(runs) == []


def test_the_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A line that was cut off by kill -9 is no life; two starts of one launch are two lives."""
    folder = tmp_path / "local" / "volumes" / "project" / "job_a" / "output"
    folder.mkdir(parents=True)
    who = {
        "launch": "run_a-1-0", "job": "job_a", "fence": 1, "rank": 0, "milli": 100, "gpu_milli": 500, "devices": ["GPU-0"],
    }  # fmt: skip
    told = [{"what": what, "at_ns": at} for at, what in enumerate(("start", "alive", "alive"), 1)]
    told += [{"what": "start", "at_ns": 9}, {"what": "end", "at_ns": 12}]
    text = "".join(json.dumps(who | each) + "\n" for each in told)
    (folder / "journal-0").write_text(text + '{"launch": "run_a-1-0", "wh')
    found = journal.lives([tmp_path])
    assert [(each.began_ns, each.ended) for each in found] == [(1, True), (9, True)]
    assert {(each.fence, each.gpu_milli, each.devices) for each in found} == {(1, 500, ("GPU-0",))}
    assert {sentence[:2] for sentence in violations(replace(sound(), lives=found))} == {"I1"}


def test_what_was_acknowledged_is_kept_as_it_was_answered() -> None:
    """Refusals and questions leave nothing; the last word on a thing counts; a write of a new sort is an error."""
    record = Record()
    queue = {
        "name": "q", "parent": "", "project": "", "weight": 1.0, "guaranteed": {}, "limit": {}, "max_running": 0,
        "max_queued": 0,
    }  # fmt: skip
    jobs = {"jobs": [{"id": "job_a"}, {"id": "job_b"}]}
    for method, path, sent, code, answer in (
        ("GET", "/v1/queues", None, 200, {"items": []}),
        ("PUT", "/v1/queues/other", {}, 503, {"code": "unavailable"}),
        ("PUT", "/v1/queues/q", {}, 200, queue),
        ("PUT", "/v1/queues/q", {"weight": 3}, 200, queue | {"weight": 3.0}),
        ("POST", "/v1/workloads", {"spec": {"name": "w"}}, 201, jobs),
        ("POST", "/v1/jobs/job_a/stop", None, 202, {}),
        ("POST", "/v1/quotes", {}, 200, {}),
        ("POST", "/v1/nodes/far/mark", {}, 200, {}),
    ):
        record.heard(method, path, sent, code, answer)
    assert {key: thing["weight"] for key, thing in record.things.items()} == {("queue", "q"): 3.0}
    assert (record.acknowledged, record.stopped) == ({"job_a": "w", "job_b": "w"}, {"job_a"})
    assert record.unknown == {"POST /v1/nodes/far/mark"}
    pages = {"": {"items": [queue], "next_cursor": "n"}, "n": {"items": [queue | {"name": "r"}], "next_cursor": ""}}
    found = record.found(lambda _, path: (200, pages[path.partition("cursor=")[2]]))
    assert {key: thing["weight"] for key, thing in found.items()} == {("queue", "q"): 1.0, ("queue", "r"): 1.0}


def row(case: Case) -> str:
    """A case as the page on faults lists it."""
    criterion = case.criterion.replace("<=", "≤").replace(">=", "≥").replace("+-", "±")
    fault = case.fault.replace("<=", "≤")
    return f"| {case.number} | {fault} | {criterion} |"


def test_all_cases_are_there_and_the_page_tells_of_each() -> None:
    assert sorted(CASES) == list(range(1, 27))
    told = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\| [0-9]+ \| .* \|) ([^|]+) \|$", told, re.MULTILINE)
    assert [row(case) for _, case in sorted(CASES.items())] == [beginning for beginning, _ in rows]
    assert all(figure for _, figure in rows)


def done(number: int, outcome: str) -> Done:
    """A case that went so on one store."""
    return Done(number=number, outcome=outcome, text="", figure="", detail="")


def a_round(*all_done: Done, failed_seeds: int = 0) -> Round:
    """A round in which the cases went so."""
    failed, skipped = outcomes(all_done)
    chosen = frozenset(each.number for each in all_done)
    return Round(
        chosen=chosen, failed=failed, skipped=skipped - failed, seeds=100, failed_seeds=failed_seeds, took_s=60.0
    )


def test_a_case_has_passed_that_passed_on_every_store_in_every_round() -> None:
    good = a_round(done(1, "pass"), done(1, "pass"), done(2, "pass"), done(3, "pass"))
    assert good.told() == {
        "passed": 3, "failed": 0, "skipped": 0, "seeds": 100, "failed_seeds": 0, "seconds": 60,
    }  # fmt: skip
    bad = a_round(done(1, "pass"), done(1, "skip"), done(2, "FAIL"), done(2, "skip"), done(3, "pass"), failed_seeds=1)
    assert bad.told() == {
        "passed": 1, "failed": 1, "skipped": 1, "seeds": 100, "failed_seeds": 1, "seconds": 60,
    }  # fmt: skip
    assert together([good, bad, good]).told() == {
        "passed": 1, "failed": 1, "skipped": 1, "seeds": 300, "failed_seeds": 1, "seconds": 180,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "is_skipping_allowed", "code"),
    [
        (a_round(done(1, "pass")), False, 0),
        (a_round(done(1, "skip")), False, 2),
        (a_round(done(1, "skip")), True, 0),
        (a_round(done(1, "FAIL")), True, 1),
        (a_round(done(1, "FAIL"), done(2, "skip")), False, 1),
        (a_round(done(1, "pass"), failed_seeds=1), True, 1),
    ],
)
def test_what_could_not_be_shown_is_no_success_unless_that_is_allowed(
    whole: Round, is_skipping_allowed: bool, code: int
) -> None:
    assert status(whole, is_skipping_allowed=is_skipping_allowed) == code


def test_seeds_are_written_by_store() -> None:
    assert seeds_by_store("2000") == {"memory": 2000}
    assert seeds_by_store("0") == {}
    assert seeds_by_store("memory=10,sqlite=5,postgres=0") == {"memory": 10, "sqlite": 5}
    for wrong in ("many", "disk=3", "sqlite=", "sqlite=-1"):
        with pytest.raises(ValueError, match="write a number, or memory="):
            seeds_by_store(wrong)


SKIPPED_IN_PART = """..s                                                        [100%]
SKIPPED [1] tests/contract/test_migrations.py:20: no PostgreSQL can be started here
2 passed, 1 skipped in 0.10s
"""


def test_tests_have_passed_when_all_of_them_did_at_once() -> None:
    assert judged("those", 0, "...\n3 passed, 2 deselected in 0.10s") == "3 tests of those passed"
    for code, output, reason in (
        (0, SKIPPED_IN_PART, "1 tests of those were skipped: no PostgreSQL can be started here"),
        (0, "2 skipped in 0.1s", "2 tests of those were skipped: 2 skipped in 0.1s"),
        (5, "3 deselected in 0.1s", "those: 3 deselected in 0.1s"),
    ):
        with pytest.raises(Skipped, match=reason):
            judged("those", code, output)
    for code, output in ((1, "1 failed, 2 passed in 0.1s"), (0, "2 passed, 1 rerun in 0.1s"), (4, "no such file")):
        with pytest.raises(AssertionError):
            judged("those", code, output)


@pytest.fixture
def beds() -> Iterator[Beds]:
    made = Beds("sqlite")
    yield made
    made.close()


@pytest.mark.parametrize("number", [1, 15])
def test_a_case_runs(beds: Beds, number: int) -> None:
    assert CASES[number].run(beds)
