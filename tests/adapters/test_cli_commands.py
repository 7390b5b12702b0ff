"""The command line against a peer that speaks the contract: output for people and programs, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.sdk_peer import JOB_ID, TOKEN, LogScript, Peer, job_json, running_peer
from tidemill.cli import main
from tidemill.errors import ErrorKind


@pytest.fixture
def peer(monkeypatch, tmp_path) -> Iterator[Peer]:
    with running_peer() as running:
        monkeypatch.setenv("TIDEMILL_API_URL", running.url)
        monkeypatch.setenv("TIDEMILL_TOKEN", TOKEN)
        monkeypatch.setenv("TIDEMILL_HOME", str(tmp_path / "home"))
        for name in ("TIDEMILL_PROJECT", "TIDEMILL_DEBUG", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        yield running


def tidemill(*arguments: str) -> int:
    return main.run(list(arguments))


TREE = "queues:\n  - {name: research, weight: 2}\n  - name: vision\n    parent: research\n    weight: 1\n"
AS_JSON = [
    "status", "nodes", "top --once", "ps", "ps --all", "show hello", "why hello", "receipt hello", "stop hello",
    "quote -- echo hi", "run --dry-run -- echo hi", "run -d -- echo hi", "exec hello -- id", "secret list",
    "secret rm HF_TOKEN", "token create ci", "token list", "token revoke tok_1", "token show tok_1", "token set tok_1", "project create vision",
    "project list", "artifact list", "artifact show gpt", "artifact create gpt --job hello --path model", "schema",
    "cp hello:model {tmp}/out", "artifact get gpt {tmp}/gpt", "queue", "share", "share set research --weight 2 --limit gpu=",
    "share apply {tmp}/tree.yaml", "reserve list", "reserve create night --nodes 2 --start 2h --for 4h --every 7d",
    "reserve cancel night", "compat {tmp}/tree.yaml", "cordon box", "drain box --wait --reason disk", "resume box",
]  # fmt: skip


@pytest.mark.parametrize("line", AS_JSON)
def test_json_is_one_document_without_colours(peer, capsys, tmp_path, line, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    (tmp_path / "tree.yaml").write_text(TREE)
    head, dashes, tail = line.format(tmp=tmp_path).partition(" -- ")
    arguments = [*head.split(), "--json", *(["--", *tail.split()] if dashes else [])]
    status = tidemill(*arguments)
    out = capsys.readouterr().out
    json.loads(out)
    assert "\x1b" not in out
    assert status == (7 if line.startswith("exec") else 0)


@pytest.mark.parametrize("line", ["run --json -- echo hi", "logs hello --json", "logs -f hello --json"])
def test_streams_are_lines_of_json(peer, capsys, line):
    assert tidemill(*line.split()) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(item["text"] for item in lines if item["type"] == "log") == "hello\n"


PEOPLE = [line for line in AS_JSON if line.split()[0] not in ("exec", "schema")]


@pytest.mark.parametrize("line", PEOPLE)
def test_people_see_words_in_a_narrow_place_too(peer, capsys, tmp_path, line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "tree.yaml").write_text(TREE)
    head, dashes, tail = line.format(tmp=tmp_path).partition(" -- ")
    assert tidemill(*head.split(), *(["--", *tail.split()] if dashes else [])) == 0
    out = capsys.readouterr().out
    assert out.strip()
    assert "\x1b" not in out


def all_commands() -> list[list[str]]:
    groups = {
        "secret": ("set", "list", "rm"),
        "token": ("create", "list", "show", "set", "revoke"),
        "project": ("create", "list"),
        "artifact": ("create", "list", "show", "get"),
        "share": ("apply", "set"),
        "reserve": ("create", "list", "cancel"),
    }
    names = [[name] for name in main.names()]
    return [[], *names, *([name, inner] for name, inners in groups.items() for inner in inners)]


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_explains_itself(command, capsys):
    assert tidemill(*command, "--help") == 0
    out = capsys.readouterr().out
    assert "Usage: tidemill" in out
    assert "list[str]" not in out


def test_a_mistake_in_a_tree_is_shown_with_its_line(peer, capsys, tmp_path):
    (tmp_path / "tree.yaml").write_text(TREE.replace("weight: 1", "weight: 0"))
    assert tidemill("share", "apply", str(tmp_path / "tree.yaml")) == 2
    told = capsys.readouterr().err
    assert "tree.yaml:5: queues.vision.weight: 0 is not a weight." in told
    assert "Write a number above zero." in told


def test_setting_a_share_keeps_what_is_not_given(peer, capsys):
    line = "share set research --weight 2.5 --guarantee gpu:H100=4 --guarantee memory= --limit gpu=0.5 --max-queued 9"
    assert tidemill(*line.split()) == 0
    assert json.loads(peer.sent("PUT", "/v1/queues/research")[0][1]) == {
        "name": "research", "parent": "", "project": "", "weight": 2.5, "guaranteed": {"gpu": 8, "gpu:H100": 4},
        "limit": {"gpu": 0.5}, "max_running": 0, "max_queued": 9,
    }  # fmt: skip


def test_a_new_queue_with_a_projects_name_is_that_projects(peer):
    for name, project in (("vision", "vision"), ("speech", None)):
        assert tidemill("share", "set", name, "--max-running", "2") == 0
        assert json.loads(peer.sent("PUT", f"/v1/queues/{name}")[0][1]).get("project") == project


def test_reserving_sends_what_was_said(peer, capsys):
    line = "reserve create fix --node a --node b --start 2027-03-01T09:00:00Z --for 4h --every 7d --until 52w --maintenance"
    assert tidemill(*line.split()) == 0
    assert json.loads(peer.sent("POST", "/v1/reservations")[0][1]) == {
        "name": "fix", "start": "2027-03-01T09:00:00Z", "duration": "4h", "node": ["a", "b"], "every": "7d", "until": "52w",
        "maintenance": True,
    }  # fmt: skip


def test_run_flags_of_the_scheduler_become_fields(peer, capsys):
    line = "run -d --nodes 2..8 --spot --after prepare --after clean --start-after 1h --start-before 2h --within rack"
    assert tidemill(*line.split(), "--expected-duration", "3h", "--priority", "high", "--", "x") == 0
    assert peer.submitted[-1] == {
        "run": "x", "name": "x", "nodes": "2..8", "spot": True, "after": ["prepare", "clean"], "start_after": "1h",
        "start_before": "2h", "placement": {"within": "rack"}, "expected_duration": "3h", "priority": "high",
    }  # fmt: skip
    assert tidemill("run", "-d", "--nodes", "4", "--priority", "-5", "--reservation", "night", "--", "x") == 0
    assert peer.submitted[-1] == {"run": "x", "name": "x", "nodes": 4, "priority": -5, "reservation": "night"}


def test_why_tells_who_holds_it_and_when_it_would_start(peer, capsys):
    assert tidemill("why", "hello") == 0
    told = capsys.readouterr().out
    for words in (
        "needed",
        "available",
        "resolved by",
        "held by",
        "another's job",
        "8 H100",
        "likely in",
        "two jobs end",
    ):
        assert words in told, words


def test_a_run_shows_the_output_and_nothing_else_on_standard_output(peer, capsys):
    assert tidemill("run", "--", "echo", "it's", "a b") == 0
    assert capsys.readouterr().out == "hello\n"
    spec = json.loads(peer.sent("POST", "/v1/workloads")[0][1])["spec"]
    assert spec == {"run": "echo 'it'\"'\"'s' 'a b'", "name": "echo"}


def test_one_word_is_a_shell_line(peer):
    assert tidemill("run", "--", "make && make test") == 0
    assert json.loads(peer.sent("POST", "/v1/workloads")[0][1])["spec"]["run"] == "make && make test"


def test_flags_go_over_the_file(peer, tmp_path):
    path = tmp_path / "train-it.yaml"
    path.write_text("run: python t.py\nresources: {gpus: none, memory: 1GB}\nenvs: {A: 1}\nenv: {packages: [a]}\n")
    line = "--gpus A100:2 --cpus 1.5 --nodes 2 --env B=2 --secret S --python 3.12 --with b --retry 1 --max-duration 5m"
    assert tidemill("run", str(path), *line.split(), "-d") == 0
    spec = json.loads(peer.sent("POST", "/v1/workloads")[0][1])["spec"]
    assert spec == {
        "name": "train-it",
        "run": "python t.py",
        "resources": {"gpus": "A100:2", "memory": "1GB", "cpus": 1.5},
        "envs": {"A": "1", "B": "2"},
        "env": {"packages": ["a", "b"], "python": "3.12"},
        "nodes": 2,
        "secrets": ["S"],
        "max_duration": "5m",
        "retry": {"on": ["node_lost", "preempted", "error"], "max": 1},
    }


def test_lines_of_several_workers_have_their_rank_before_them(peer, capsys):
    peer.log = LogScript({0: "a1\na2\n", 1: "b1\nno end"}, piece=2)
    assert tidemill("run", "--nodes", "2", "--", "x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("0")] == ["0 │ a1", "0 │ a2"]
    assert [line for line in lines if line.startswith("1")] == ["1 │ b1", "1 │ no end"]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ({"state": "succeeded", "exit_code": 0}, 0),
        ({"state": "failed", "exit_code": 42, "cause": "error"}, 42),
        ({"state": "failed", "cause": "node_lost"}, 1),
        ({"state": "cancelled"}, 1),
    ],
)
def test_a_run_exits_as_its_job_did(peer, capsys, end, status):
    peer.log = LogScript({0: "x\n"}, end_state={"ended_at_ns": 3_000_000_000, **end})
    assert tidemill("run", "--", "x") == status
    told = capsys.readouterr().err
    assert ("failed" in told) == (end["state"] == "failed")


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_each_kind_of_error_has_its_exit_status(peer, capsys, kind):
    problem = {
        "code": "made_up",
        "kind": kind.value,
        "detail": "It is so.",
        "field": "f",
        "value": "v",
        "mend": "Do it.",
    }
    peer.routes["GET", "/v1/status"] = lambda *_, **__: (418, problem)
    assert tidemill("status") == kind.exit_status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: f: It is so. (got 'v')\n  Do it.\n"


def test_every_mistake_is_told_with_its_line_in_the_file(peer, capsys, tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("name: a\nrun: x\nresources:\n  gpus: H1000\nnodes: 0\n")
    mistakes = [
        {"field": "resources.gpus", "value": "H1000", "detail": "There is no such GPU.", "mend": "Did you mean H100?"},
        {"field": "nodes", "value": 0, "detail": "nodes lies between 1 and 4096", "mend": ""},
    ]
    problem = {"code": "invalid_spec", "kind": "invalid", "detail": "2 mistakes", "errors": mistakes}
    peer.routes["POST", "/v1/workloads"] = lambda *_, **__: (422, problem)
    assert tidemill("run", str(path)) == 2
    err = capsys.readouterr().err
    assert f"error: {path}:4: resources.gpus: There is no such GPU. (got 'H1000')\n  Did you mean H100?\n" in err
    assert f"error: {path}:5: nodes lies between 1 and 4096 (got 0)\n" in err


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        ("rnu", 2, "did you mean run?"),
        ("run", 2, "nothing to run"),
        ("run python", 2, "tidemill run -- python"),
        ("run nope.yaml", 3, "no file nope.yaml"),
        ("run --nodes many -- x", 2, "--nodes"),
        ("run --bogus", 2, "--bogus"),
        ("run --priority urgent -- x", 2, "low, normal, high"),
        ("share set q --limit gpu", 2, "gpu=8"),
        ("share set q --guarantee gpu=many", 2, "gpu=8"),
        ("share apply nope.yaml", 3, "no file nope.yaml"),
        ("reserve create r --start now --for 1h", 2, "--node"),
        ("reserve create r --start now --for 1h --nodes 1 --label zone", 2, "--label zone=a"),
        ("show", 2, "job"),
        ("show nobody", 3, "there is no"),
        ("stop", 2, "--all"),
        ("exec hello", 2, "no command"),
        ("attach hello", 2, "terminal"),
        ("cp a b", 2, "job:path"),
        ("run --env NOT_SET_HERE -- x", 2, "not_set_here"),
    ],
)
def test_mistakes_are_answered_in_a_line_or_two(peer, capsys, line, status, told):
    assert tidemill(*line.split()) == status
    err = capsys.readouterr().err
    assert told in err.lower()
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


def test_without_a_cloud_it_is_said_how_to_get_one(capsys, monkeypatch, tmp_path):
    for name in ("TIDEMILL_API_URL", "TIDEMILL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIDEMILL_HOME", str(tmp_path))
    assert tidemill("ps") == 7
    assert "tidemill up" in capsys.readouterr().err


def test_a_secret_is_never_on_the_command_line_or_the_screen(peer, capsys, tmp_path):
    (tmp_path / "s").write_text("hunter2")
    assert tidemill("secret", "set", "PASS", "--from-file", str(tmp_path / "s")) == 0
    assert json.loads(peer.sent("PUT", "/v1/secrets/PASS")[0][1]) == {"value": "hunter2"}
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
    assert tidemill("secret", "set", "PASS", "hunter2") == 2


def test_tables_have_columns(peer, capsys):
    assert tidemill("ps") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "ID", "KIND", "STATE", "WHY", "AGE", "RESOURCES"]
    assert all(row[head.index("KIND") :].startswith("task") for row in rows)


def environment(peer: Peer, **more: str) -> dict[str, str]:
    return {**os.environ, "TIDEMILL_API_URL": peer.url, "TIDEMILL_TOKEN": TOKEN, **more}


def start(peer: Peer, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tidemill.cli.main", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(peer), **pipes)


def test_ctrl_c_stops_the_job_and_the_run_says_so(peer):
    peer.log = LogScript({0: "working\n"}, end_state={"state": "cancelled", "ended_at_ns": 3_000_000_000})
    whole = peer.log.octets("")
    peer.log.cuts = [whole.index(b"event: job", 10)]
    stopped = peer._stop

    def logs(request, ref, **more):
        if peer.log.answers:  # the rest of the log comes once the stop was asked for
            for _ in range(500):
                if peer.sent("POST", f"/v1/jobs/{JOB_ID}/stop"):
                    break
                peer_wait.wait(0.01)
        return peer._logs(request, ref, **more)

    import threading

    peer_wait = threading.Event()
    peer.routes["GET", "/v1/jobs/([^/]+)/logs"] = logs
    peer.routes["POST", "/v1/jobs/([^/]+)/stop"] = stopped
    run = start(peer, "run", "--", "sleep 100")
    assert run.stdout is not None
    assert run.stdout.readline() == "working\n"
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert (run.returncode, out) == (130, "")
    assert "stopping" in err
    assert "Traceback" not in err
    assert len(peer.sent("POST", f"/v1/jobs/{JOB_ID}/stop")) == 1


def test_a_reader_that_leaves_is_no_error(peer):
    peer.log = LogScript({0: "line\n" * 20_000}, piece=1000)
    run = start(peer, "run", "--", "yes")
    assert run.stdout is not None
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr is not None
    told = run.stderr.read()
    assert run.wait(20) == 128 + signal.SIGPIPE
    assert "Traceback" not in told
    assert "BrokenPipe" not in told


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (("run", "--", "echo hi"), ("typer", "rich", "yaml", "pathspec", "pydantic", "fastapi", "sqlalchemy", "httpx", "numpy")),
        (("run", "--name", "x", "--", "echo hi"), ("rich.console", "yaml", "pathspec", "fastapi", "sqlalchemy", "httpx", "numpy")),
        (("ps",), ("rich.console", "yaml", "fastapi", "sqlalchemy", "httpx", "numpy")),
        (("--help",), ("rich.console", "yaml", "fastapi", "sqlalchemy", "http.client", "tidemill.sdk.client")),
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported(peer, arguments, forbidden):
    program = (
        "import sys\nfrom tidemill.cli import main\n"
        f"status = main.run({list(arguments)!r})\n"
        f"print('LOADED', [name for name in {list(forbidden)!r} if name in sys.modules], status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(peer), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED [] 0", done.stderr


def test_completion_offers_commands_and_jobs(peer):
    def offered(*words: str) -> list[str]:
        variables = {
            "_TIDEMILL_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("tidemill", *words)),
            "COMP_CWORD": str(len(words)),
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "tidemill.cli.main"],
            env=environment(peer, **variables),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split()

    assert offered("rec") == ["receipt", "record"]
    assert offered("show", "he") == ["hello"]


def test_doctor_needs_no_cloud(capsys, monkeypatch, tmp_path):
    for name in ("TIDEMILL_API_URL", "TIDEMILL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIDEMILL_HOME", str(tmp_path))
    assert tidemill("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert {"tidemill", "uv", "disk", "cloud"} <= {finding["name"] for finding in found["findings"]}


def test_jobs_that_wait_say_why(peer, capsys):
    peer.job = job_json(state="queued", reason={"sentence": "No GPU is free."})
    assert tidemill("ps") == 0
    assert "No GPU is free." in capsys.readouterr().out


def test_the_schema_is_one(capsys):
    assert tidemill("schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["run"]


def test_version_and_debug(capsys, monkeypatch, tmp_path):
    assert tidemill("--version") == 0
    assert capsys.readouterr().out.startswith("tidemill ")
    with pytest.raises(Exception, match="no file"):
        tidemill("--debug", "run", str(Path(tmp_path, "none.yaml")))
