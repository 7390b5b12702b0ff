"""The commands: twin, record and replay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.twin.make_recording import RECORDED
from tidemill.cli import twinning
from tidemill.cli.main import status_of
from tidemill.cli.parsing import command_of
from tidemill.errors import Conflict, InvalidRequest, NotFound, TidemillError
from tidemill.twin.recording import read_recording
from tidemill.twin.replay import replay

_SMALL = ("--synthetic", "jobs=150,load=1.2,seed=2,sizes=1:70 4:20 8:10", "--nodes", "2xH100:8")


def call(name: str, *arguments: str) -> int:
    command: Any = command_of(name, getattr(twinning, f"{name}_command"))
    return status_of(command.main(args=list(arguments), prog_name=f"tidemill {name}", standalone_mode=False))


def test_twin_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("twin", *_SMALL) == 0
    shown = capsys.readouterr()
    for words in ("jobs", "wait, mean", "slowdown, mean", "GPUs in use", "preemptions", "cost", "carbon"):
        assert words in shown.out
    assert "CHANGE" not in shown.out
    assert "150 jobs in" in shown.err


def test_twin_compares(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    csv, html, turns = tmp_path / "a.csv", tmp_path / "a.html", tmp_path / "a.jsonl.gz"
    files = ("--csv", str(csv), "--html", str(html), "--record", str(turns))
    assert call("twin", *_SMALL, "--what-if", "nodes=+2xH100:8", "--what-if", "price.H100=1", *files, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what_if"] == ["nodes=+2xH100:8", "price.H100=1"]
    before, after = found["runs"]
    assert (before["name"], before["gpus"], after["name"], after["gpus"]) == ("as it is", 16, "what if", 32)
    work_before, work_after = (run["gpu_h"] - run["lost_gpu_h"] for run in (before, after))
    assert work_before == pytest.approx(work_after, rel=0.01), "the same work, whatever was displaced"
    assert after["cost_micro"] < before["cost_micro"]
    assert csv.read_text().count("\n") > 100
    assert html.read_text().startswith("<!doctype html>")
    assert replay(turns).is_same


def test_twin_sets_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--set",
        "start_delay=30s",
        "--set",
        "load=2",
        "--jobs",
        "40",
        "--until",
        "1d",
        "--country",
        "FRA",
        "--json",
    )
    assert call("twin", *_SMALL, *arguments) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert found["jobs"]["submitted"] <= 40
    assert found["virtual_s"] <= 86_400


def test_twin_of_a_shipped_trace_and_of_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("twin", "--trace", "openb", "--jobs", "200", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)["runs"][0]
    assert found["gpus"] == 6_212
    assert call("twin", "--recorded", str(RECORDED), "--what-if", "nodes=+1xH100:8") == 0
    assert "WHAT IF" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((), "--trace"),
        (("--nodes", "1xH100:8"), "--trace"),
        ((*_SMALL, "--trace", "muri"), "--synthetic"),
        (("--synthetic", "jobs=5"), "--nodes"),
        (("--synthetic", "jobs=five", "--nodes", "1xH100:8"), "--synthetic"),
        (("--trace", "helios", "--nodes", "1xH100:8"), "--trace"),
        (("--trace", "philly", "--nodes", "1xH100:8"), "--file"),
        (("--trace", "philly", "--nodes", "1xH100:8", "--file", "absent.csv"), "--file"),
        ((*_SMALL, "--file", "x.csv"), "--file"),
        ((*_SMALL, "--what-if", "x=1"), "--what-if"),
        ((*_SMALL, "--set", "x=1"), "--set"),
        ((*_SMALL, "--set", "nodes=-9xH100:8"), "--set"),
        ((*_SMALL, "--until", "soon"), "--until"),
        ((*_SMALL, "--country", "Atlantis"), "--country"),
        (("--recorded", "absent.gz"), "--recorded"),
        ((*_SMALL, "--html", "/absent/page.html"), "--html"),
        ((*_SMALL, "--csv", "/absent/run.csv"), "--csv"),
        ((*_SMALL, "--record", "/absent/turns.gz"), "--record"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(arguments: tuple[str, ...], field: str) -> None:
    with pytest.raises(TidemillError) as caught:
        call("twin", *arguments)
    assert caught.value.field == field
    assert caught.value.detail


def test_replay_says_whether_all_is_as_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("replay", str(RECORDED)) == 0
    assert "all as before" in capsys.readouterr().out
    from tidemill.core import ending

    monkeypatch.setattr(ending, "backoff_ns", lambda *_: 10**13)
    assert call("replay", str(RECORDED), "--limit", "120") == 1
    shown = capsys.readouterr()
    assert "changed" in shown.out
    assert "is placed" in shown.out
    assert "more; --limit" in shown.err
    assert call("replay", str(RECORDED), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["changed"][0]["what"]
    with pytest.raises(NotFound):
        call("replay", "absent")


# --- record: over the wire, from somebody who answers as the control plane does ---


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    import gzip

    lines = gzip.decompress(RECORDED.read_bytes()).splitlines(keepends=True)[:40]
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Authorization']}")
            self.send_response(200)
            self.end_headers()
            whole = b"".join(lines) + b"\n\n" + lines[-1][:20]
            for start in range(0, len(whole), 777):
                self.wfile.write(whole[start : start + 777])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TIDEMILL_API_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TIDEMILL_TOKEN", "secret")
    yield asked
    server.shutdown()


def test_record_keeps_whole_lines(server: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.jsonl.gz"
    assert call("record", str(path)) == 0
    assert "recorded 38 turns" in capsys.readouterr().out
    assert server == ["/v1/turns Bearer secret"]
    assert len(list(read_recording(path))) == 39
    assert replay(path).is_same
    with pytest.raises(Conflict):
        call("record", str(path))
    with pytest.raises(InvalidRequest):
        call("record", str(tmp_path / "other"), "--for", "ever")
