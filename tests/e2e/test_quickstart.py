"""The main job as a new user runs it: a model trains as a gang, is served, answers, and is accounted for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud import eventually, free_port

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"step\s+\d+/\d+\s+loss (\d+\.\d+)")


def quickstart(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, in its own home on free ports."""
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "config.yaml").write_text(f"port: {free_port()}\ngateway_port: {free_port()}\n")
    command = [str(Path(sys.executable).parent / "tidemill"), "quickstart", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"TIDEMILL_HOME": str(home), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_running(home: Path) -> list[str]:
    """Command lines of processes that belong to that home, by argument or by environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
            belongs = str(home).encode() in line or str(home).encode() in (entry / "environ").read_bytes()
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        if belongs and line and stat.rpartition(")")[2].split()[0] != "Z":
            found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "home"


def test_it_trains_serves_answers_and_accounts(home: Path) -> None:
    process = quickstart(home)
    output, _ = process.communicate(timeout=420)
    assert process.returncode == 0, output[-4000:]
    losses = [float(loss) for loss in LINE.findall(output)]
    assert len(losses) >= 5
    assert losses[-1] < 0.6 * losses[0], "it did not learn"
    assert "def fibonacci(" in output
    for word in ("feasible", "queue wait", "run time", "cost", "energy", "carbon", "Try next"):
        assert word in output, word
    eventually(lambda: not left_running(home), within_s=10, what=f"nothing left: {left_running(home)}")


@pytest.mark.long
def test_its_outcome_is_one_json_document_the_second_time(home: Path) -> None:
    process = quickstart(home, "--json")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    outcome = json.loads(output)
    assert outcome["quote"]["feasible"] is True
    assert len(outcome["completion"]) > 40
    training, service = outcome["receipts"]
    assert training["amount_micro"] > 0
    assert training["energy_mj"] > 0
    assert training["carbon_mg"] > 0
    assert training["energy_evidence"] in ("measured", "estimated")
    assert service["run_ns"] > 0


@pytest.mark.parametrize(
    ("until", "number"), [("A cloud", signal.SIGINT), ("Training", signal.SIGINT), ("step", signal.SIGTERM)]
)
def test_interrupted_anywhere_it_leaves_nothing_running(home: Path, until: str, number: int) -> None:
    process = quickstart(home)
    assert process.stdout is not None
    for line in process.stdout:
        if until in line:
            break
    else:
        pytest.fail(f"it ended before {until!r}")
    os.kill(process.pid, number)
    process.communicate(timeout=180)
    assert process.returncode not in (0, None)
    eventually(lambda: not left_running(home), within_s=10, what=f"nothing left: {left_running(home)}")
