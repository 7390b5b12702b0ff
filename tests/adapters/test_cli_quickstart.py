"""The quickstart: what it shows, and that nothing of it is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.adapters.sdk_peer import JOB_ID, TOKEN, LogScript, Peer, running_peer
from tidemill.cli.training import TrainingView, plot, resampled, sparkline, stretched
from tidemill.sdk import Job, LogChunk

LOG = """Installed 12 packages in 40ms
resume  step-00000020.npz  step 20  elapsed 1.0s
step     40/600  loss 4.104  tokens/s 31200  elapsed 2.3s
step     80/590  loss 3.5  tokens/s 31,300  elapsed 4.1s
eval  step 80  val_loss 3.612
done  steps 80  val_loss 3.612  tokens 81920
"""


@pytest.fixture
def peer(tmp_path) -> Iterator[Peer]:
    with running_peer() as running:
        running.log = LogScript({0: LOG, 1: "quiet\n"}, piece=11)
        yield running


def environment(peer: Peer, tmp_path, **more: str) -> dict[str, str]:
    found = {**os.environ, "TIDEMILL_API_URL": peer.url, "TIDEMILL_TOKEN": TOKEN, "TIDEMILL_HOME": str(tmp_path)}
    return {**found, "NO_COLOR": "1", **more}


def start(peer: Peer, tmp_path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tidemill.cli.main", "quickstart", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(peer, tmp_path), **pipes)


def test_training_is_read_from_what_rank_0_says(capsys):
    with TrainingView() as view:
        view.job(Job(name="train", state="running"))
        for start_ in range(0, len(LOG), 9):
            view.log(LogChunk(rank=0, attempt=1, text=LOG[start_ : start_ + 9]))
            view.log(LogChunk(rank=1, attempt=1, text="step 1/2 loss 9"))
    assert (view.step, view.steps, view.speed) == (80, 590, 31300.0)
    assert view.losses == [(40, 4.104), (80, 3.5)]
    assert view.evals == [(80, 3.612)]
    out = capsys.readouterr().out
    assert "Installed 12 packages" in out
    assert "done  steps 80" in out


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300), st.integers(1, 90), st.integers(1, 8))
def test_curves_fit_their_place(values, columns, rows):
    lines = plot(values, columns, rows)
    assert [len(line) for line in lines] == [columns] * rows
    assert len(sparkline(values, columns)) <= columns
    assert len(resampled(values, columns)) <= columns
    assert len(stretched(values, columns)) >= min(len(values), columns)


def test_the_whole_tour(peer, tmp_path):
    tour = start(peer, tmp_path)
    out, err = tour.communicate(timeout=180)
    assert tour.returncode == 0, err
    steps = [line for line in out.splitlines() if line[:3] in ("1/5", "2/5", "3/5", "4/5", "5/5")]
    assert len(steps) == 5
    for word in ("estimated", "gpt:2", "def fibonacci(n):", "queue wait", "Try next"):
        assert word in out
    assert [spec["name"] for spec in peer.submitted] == ["quickstart-train", "quickstart-gpt"]
    assert peer.sent("POST", f"/v1/jobs/{JOB_ID}/stop")
    assert "Traceback" not in err


def test_its_outcome_as_json(peer, tmp_path):
    tour = start(peer, tmp_path, "--json")
    out, err = tour.communicate(timeout=180)
    outcome = json.loads(out)
    assert (tour.returncode, outcome["completion"]) == (0, "n):")
    assert len(outcome["receipts"]) == 2
    assert err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ending_it_stops_what_it_submitted(peer, tmp_path, number):
    peer.log.cuts = [700] * 1000
    tour = start(peer, tmp_path)
    assert tour.stdout is not None
    for line in tour.stdout:
        if line.startswith("3/5"):
            break
    for line in tour.stdout:
        if "Installed" in line or "running" in line:
            break
    tour.send_signal(number)
    _, err = tour.communicate(timeout=180)
    assert tour.returncode == 130
    assert peer.sent("POST", f"/v1/jobs/{JOB_ID}/stop")
    assert "Traceback" not in err


def test_a_training_that_fails_shows_its_last_lines(peer, tmp_path):
    failed = {"state": "failed", "exit_code": 1, "cause": "error", "ended_at_ns": 3_000_000_000}
    peer.log = LogScript({0: "ImportError: no jax\n"}, end_state=failed)
    tour = start(peer, tmp_path)
    _, err = tour.communicate(timeout=180)
    assert tour.returncode == 70
    assert "ImportError: no jax" in err
    assert "tidemill why" in err


def test_two_at_a_time_are_told_apart(peer, tmp_path):
    peer.log.cuts = [700] * 1000
    first = start(peer, tmp_path)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("3/5"):
            break
    second = start(peer, tmp_path)
    _, err = second.communicate(timeout=180)
    assert second.returncode == 5
    assert "another quickstart runs" in err
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=180)
