"""What Slurm writes of a job's end is read as it is meant: codes, signals, times, lists of nodes, other jobs' lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidemill.engines.slurmcommands import SlurmCommands
from tidemill.engines.slurmending import Ending, of_sacct, of_scontrol
from tidemill.errors import EngineLost
from tidemill.model.job import Cause

LINE = (
    "JobId=7 JobName=tidemill-run_a-0-1-0 UserId=root(0) JobState=NODE_FAIL Reason=NodeDown Dependency=(null) "
    "RunTime=1-00:00:09 TimeLimit=UNLIMITED ExitCode=0:0 NodeList=n[1-2] BatchHost=n1"
)


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "cause"),
    [
        ("FAILED", "3:0", 3, Cause.NODE_LOST),
        ("FAILED", "0:9", 137, Cause.NODE_LOST),
        ("CANCELLED", "0:15", 143, Cause.NODE_LOST),
        ("NODE_FAIL", "0:0", None, Cause.NODE_LOST),
        ("OUT_OF_MEMORY", "0:125", 137, Cause.OUT_OF_MEMORY),
        ("TIMEOUT", "0:15", 143, Cause.TIMED_OUT),
        ("PREEMPTED", "0:15", 143, Cause.PREEMPTED),
        ("COMPLETED", "0:0", None, Cause.NODE_LOST),
    ],
)
def test_an_end_has_the_exit_code_of_a_shell_and_a_cause(
    state: str, code: str, exit_code: int | None, cause: Cause
) -> None:
    ended = Ending(job="7", state=state, code=code)
    assert (ended.exit_code, ended.cause(is_limited=True)) == (exit_code, cause)
    assert dict(ended.words()) == {"name": "slurm", "job": "7", "state": state, "exit": code}


def test_a_limit_that_the_spec_did_not_set_is_no_fault_of_the_work() -> None:
    assert Ending(job="7", state="TIMEOUT", code="0:15").cause(is_limited=False) is Cause.NODE_LOST


def test_what_slurmctld_says_is_read() -> None:
    ended = of_scontrol(LINE, "tidemill-run_a-0-1-0")
    assert ended == Ending(job="7", state="NODE_FAIL", code="0:0", nodes="n[1-2]", reason="NodeDown", ran_s=86_409)
    assert str(ended) == "ended as node_fail with exit code 0:0 on n[1-2]: NodeDown"
    assert of_scontrol(LINE, "tidemill-run_b-0-1-0") is None, "the number was given anew"


def test_what_the_accounting_says_is_read() -> None:
    lines = "other|COMPLETED|0:0|9|00:01|n3\nwork|CANCELLED by 0|0:15|61|01:02.345|n[1-2]\n\nbad|line\n"
    ended = of_sacct(lines, "7", "work")
    assert ended == Ending(
        job="7", state="CANCELLED", code="0:15", nodes="n[1-2]", ran_s=61, cpu_used_ns=62_000_000_000
    )
    assert of_sacct(lines, "7", "nobody") is None
    never = of_sacct("work|CANCELLED by 0|0:0|0|00:00:00|None assigned", "7", "work")
    assert never is not None
    assert never.nodes == ""


def scancel(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have that be found as scancel from now on."""
    program = folder / "scancel"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    "script",
    ["exit 229", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1"],
    ids=["while Slurm clears up after it", "when it is known no more"],
)
def test_a_job_that_is_over_may_be_ended_again(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scancel 22.05 says when a job ended between the list and the signal."""
    scancel(tmp_path, script, monkeypatch)
    SlurmCommands().terminate("7")
    SlurmCommands().cancel("7")


@pytest.mark.parametrize(
    "script",
    [
        "echo 'scancel: error: Kill job error on job id 7: Job can not be altered now, try again later' >&2; exit 228",
        "echo 'scancel: error: Kill job error on job id 7: Unable to contact slurm controller' >&2; exit 1",
        "kill -9 $$",
    ],
    ids=["it is between two states", "nobody answers", "scancel itself was killed"],
)
def test_a_signal_that_did_not_arrive_is_told(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scancel(tmp_path, script, monkeypatch)
    with pytest.raises(EngineLost):
        SlurmCommands().terminate("7")
