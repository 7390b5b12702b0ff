"""What a worker finds: its folder, inputs, secrets, environment, variables, ports; and what is said when it cannot."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.local_bench import launch_folder, local_bench, runner_pid
from tidemill.model.ids import JobId, ProjectId
from tidemill.model.plan import ObservedState
from tidemill.model.spec import Environment, Pace, Port, Service
from tidemill.runner.prepare import SetupFailed, _check, extract
from tidemill.testing.engine import BEGIN, EngineBench, eventually, state

SECOND_NS = 1_000_000_000


@pytest.fixture(params=["auto", "none"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path, sandbox=request.param) as made:
        yield made


def run(bench: EngineBench, script: str, **changes: Any) -> tuple[dict[str, Any], str]:
    """The exit event and the log of a worker that ran that script to its end."""
    engine = bench.make()
    spec = bench.spec(script, **changes)
    engine.launch(spec)
    exited = bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=90)
    engine.close()
    return exited, bytes(bench.control.record(spec.launch_id).log).decode()


def archive(bench: EngineBench, files: dict[str, str]) -> str:
    """The digest of an archive of those files that the control plane has."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content.encode()))
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    bench.control.blobs[digest] = buffer.getvalue()
    return digest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ---------------------------------------------------------------- files


def test_the_workdir_is_the_current_folder_and_can_be_written(bench: EngineBench) -> None:
    digest = archive(bench, {"go.sh": "echo went $1 > out; cat out", "deep/file": "x"})
    exited, log = run(bench, "./go.sh far; cat deep/file", workdir=digest)
    assert (exited["exit_code"], log) == (0, "went far\nx")


def test_inputs_are_read_only_and_fetched_once_for_a_project(bench: EngineBench) -> None:
    digest = archive(bench, {"weights.bin": "0101", "sub/config": "c"})
    script = "cat $TIDEMILL_INPUT_DIR/model/weights.bin; rm -rf $TIDEMILL_INPUT_DIR/model/weights.bin 2>/dev/null || echo kept"
    asked: list[str] = []

    def watch(_method: str, path: str) -> str:
        if "/blobs/" in path:
            asked.append(path)
        return ""

    bench.control.fault = watch
    _, first = run(bench, script, inputs=(("model", digest),))
    _, second = run(bench, "cat $TIDEMILL_INPUT_DIR/model/sub/config", inputs=(("model", digest),))
    assert first.startswith("0101")
    assert "kept" in first or os.geteuid() == 0
    assert second == "c"
    assert len(asked) == 1


def test_a_blob_that_arrives_damaged_is_fetched_again(bench: EngineBench) -> None:
    digest = archive(bench, {"a": "good"})
    good = bench.control.blobs[digest]
    bench.control.blobs[digest] = good[:-5] + b"xxxxx"
    asked = threading.Event()

    def fault(_method: str, path: str) -> str:
        if "/blobs/" in path:
            if asked.is_set():
                bench.control.blobs[digest] = good
            asked.set()
        return ""

    bench.control.fault = fault
    assert run(bench, "cat a", workdir=digest)[1] == "good"


def test_a_blob_that_is_not_there_fails_the_setup(bench: EngineBench) -> None:
    exited, _ = run(bench, "true", workdir="0" * 64)
    assert exited["cause"] == "setup_failed"
    assert "could not be fetched" in exited["detail"]


@pytest.mark.parametrize("name", ["../evil", "/tmp/tidemill-evil", "ok/../../evil"])
def test_archives_cannot_write_outside(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(SetupFailed), tarfile.open(tmp_path / "bad.tar") as tar:
        [_check(member, tmp_path / "target" / "here") for member in tar]
    with contextlib.suppress(SetupFailed):
        extract(tmp_path / "bad.tar", tmp_path / "target" / "here")
    assert not (tmp_path / "target" / "evil").exists()
    assert not Path("/tmp/tidemill-evil").exists()


def test_links_in_archives_cannot_lead_outside(tmp_path: Path) -> None:
    for kind, target in (
        (tarfile.SYMTYPE, "../../etc"),
        (tarfile.SYMTYPE, "/etc"),
        (tarfile.LNKTYPE, "../x"),
        (tarfile.CHRTYPE, ""),
    ):
        with tarfile.open(tmp_path / "bad.tar", "w") as tar:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = kind, target
            tar.addfile(member)
        with tarfile.open(tmp_path / "bad.tar") as tar, pytest.raises(SetupFailed):
            [_check(member, tmp_path / "here") for member in tar]
        with pytest.raises(SetupFailed):
            extract(tmp_path / "bad.tar", tmp_path / "here")


def test_checkpoints_and_outputs_outlive_the_launch_and_scratch_does_not(bench: EngineBench, tmp_path: Path) -> None:
    engine = bench.make()
    same = {"job_id": JobId("job_same-0"), "project_id": ProjectId("project_a")}
    first = bench.spec(
        "echo 1 > $TIDEMILL_CHECKPOINT_DIR/step; echo s > $TIDEMILL_SCRATCH_DIR/s; echo c > $XDG_CACHE_HOME/c", **same
    )
    engine.launch(first)
    bench.control.wait_for_event(first.launch_id, "exited")
    eventually(lambda: state(engine, first.launch_id) is ObservedState.EXITED)
    engine.forget(first.launch_id, node_id=first.node_id)
    assert not launch_folder(tmp_path, first.launch_id).path.exists()
    _, log = run(bench, "cat $TIDEMILL_CHECKPOINT_DIR/step $XDG_CACHE_HOME/c; ls -A $TIDEMILL_SCRATCH_DIR", **same)
    assert log == "1\nc\n"
    engine.close()


# ---------------------------------------------------------------- variables


def test_the_variables_of_the_contract(bench: EngineBench) -> None:
    bench.control.secrets = {"API_KEY": "hush"}
    port, other = free_port(), free_port()
    _, log = run(
        bench, "env; pwd",
        environment_variables=(("RANK", "0"), ("CUDA_VISIBLE_DEVICES", "all"), ("HOME", "/root"), ("MINE", "a b=c")),
        secrets=("API_KEY",), cpu_milli=2_500, devices=(("GPU-1", 1_000), ("GPU-2", 1_000)),
        ports=(Port(name="http", number=port), Port(name="side-car", number=other)),
    )  # fmt: skip
    found = dict(line.partition("=")[::2] for line in log.splitlines())
    assert found["RANK"] == "0"
    assert found["MINE"] == "a b=c"
    assert found["API_KEY"] == "hush"
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["PORT"] == found["TIDEMILL_PORT_HTTP"] == str(port)
    assert found["TIDEMILL_PORT_SIDE_CAR"] == str(other)
    assert found["TIDEMILL_TOKEN"] == "tm_job_0"
    assert found["HOME"] != "/root"
    assert found["PATH"].startswith("/usr/local/sbin:")
    assert {
        "TIDEMILL_CHECKPOINT_DIR",
        "TIDEMILL_OUTPUT_DIR",
        "TIDEMILL_SCRATCH_DIR",
        "TIDEMILL_INPUT_DIR",
    } <= found.keys()


def test_secrets_are_on_no_disk(bench: EngineBench, tmp_path: Path) -> None:
    bench.control.secrets = {"API_KEY": "hush-canary-7"}
    engine = bench.make()
    spec = bench.spec(f'test "${{API_KEY#hush-}}" = canary-7; {BEGIN} sleep 600', secrets=("API_KEY",))
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1)
    content = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert content
    assert not [text for text in content if b"hush-canary-7" in text]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [text for text in commands if b"API_KEY\0hush-canary-7" in text]
    engine.close()


# ---------------------------------------------------------------- environments


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that uv uses instead of the network's."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for version in ("1.0", "2.0"):
        info = f"tidy_words-{version}.dist-info"
        with zipfile.ZipFile(folder / f"tidy_words-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tidy_words.py", f"def main():\n    print('tidy', '{version}')\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tidy-words\nVersion: {version}\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\ntidy = tidy_words:main\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    return folder


def environments(tmp_path: Path) -> list[Path]:
    """The finished environments of the test project."""
    return [path for path in (tmp_path / "local" / "envs" / "project_test").glob("*") if not path.name.startswith(".")]


def test_an_environment_is_built_once_and_comes_first(bench: EngineBench, packages: Path, tmp_path: Path) -> None:
    environment = Environment(packages=("tidy-words==1.0",))
    script = (
        "tidy; python -c 'import tidy_words; tidy_words.main()'; test $(command -v python) = $VIRTUAL_ENV/bin/python"
    )
    exited, log = run(bench, script, environment=environment)
    assert exited["exit_code"] == 0, log
    assert log.count("tidy 1.0\n") == 2
    before = environments(tmp_path)[0].stat().st_ino
    _, again = run(bench, script, environment=environment)
    assert again == "tidy 1.0\n" * 2, "nothing was built, so nothing else is in the log"
    assert [path.stat().st_ino for path in environments(tmp_path)] == [before]


def test_two_ranks_build_one_environment(bench: EngineBench, packages: Path, tmp_path: Path) -> None:
    engine = bench.make()
    environment = Environment(packages=("tidy-words",))
    specs = [bench.spec("tidy", environment=environment, rank=rank) for rank in range(3)]
    for spec in specs:
        engine.launch(spec)
    for spec in specs:
        assert bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=60)["exit_code"] == 0
        assert bytes(bench.control.record(spec.launch_id).log).endswith(b"tidy 2.0\n")
    logs = [bytes(bench.control.record(spec.launch_id).log) for spec in specs]
    assert sum(b"tidy-words==2.0" in log for log in logs) == 1, logs
    assert len(environments(tmp_path)) == 1
    engine.close()


def test_an_environment_that_cannot_be_built_says_why(bench: EngineBench, packages: Path, tmp_path: Path) -> None:
    exited, log = run(bench, "true", environment=Environment(packages=("no-such-thing==9",)))
    assert exited["cause"] == "setup_failed"
    assert "no-such-thing" in exited["detail"]
    assert "no-such-thing" in log
    assert environments(tmp_path) == []


def test_options_are_not_packages(bench: EngineBench, packages: Path) -> None:
    exited, _ = run(bench, "true", environment=Environment(packages=("--index-url=http://evil",)))
    assert exited["cause"] == "setup_failed"
    assert "is an option" in exited["detail"]


@pytest.mark.parametrize("delay_s", [0.05, 0.1, 0.2, 0.3])
def test_a_build_that_is_killed_leaves_no_half_environment(
    bench: EngineBench, packages: Path, tmp_path: Path, delay_s: float
) -> None:
    engine = bench.make()
    environment = Environment(packages=("tidy-words==1.0",))
    spec = bench.spec("tidy", environment=environment)
    engine.launch(spec)
    pid = runner_pid(tmp_path, spec.launch_id)
    time.sleep(delay_s)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        assert delay_s > 0.1
    eventually(lambda: state(engine, spec.launch_id) is not ObservedState.ALIVE)
    for path in environments(tmp_path):
        assert (path / "bin" / "tidy").exists(), "what is there is whole"
    exited, log = run(bench, "tidy", environment=environment)
    assert exited["exit_code"] == 0, log
    assert log.endswith("tidy 1.0\n")
    engine.close()


def test_setup_runs_before_run_and_its_failure_is_named(bench: EngineBench) -> None:
    _, log = run(bench, "cat made", setup="echo setting up; echo x > made")
    assert log == "setting up\nx\n"
    exited, log = run(bench, "echo never", setup="echo trouble; exit 4")
    assert (exited["cause"], exited["exit_code"]) == ("setup_failed", 4)
    assert "setup script exited with status 4" in exited["detail"]
    assert log == "trouble\n"


def test_a_stop_while_preparing_ends_it(bench: EngineBench) -> None:
    engine = bench.make()
    bench.control.fault = lambda _method, path: "error" if "/blobs/" in path else ""
    spec = bench.spec(BEGIN, workdir="1" * 64)
    engine.launch(spec)
    bench.control.wait_for_event(spec.launch_id, "prepared")
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=SECOND_NS)
    assert bench.control.wait_for_event(spec.launch_id, "exited")["exit_code"] == 143
    assert bench.starts(spec) == 0
    engine.close()


# ---------------------------------------------------------------- ports and services


def test_a_taken_port_is_named_with_the_mend(bench: EngineBench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        exited, _ = run(bench, BEGIN, ports=(Port(name="http", number=port),))
        assert exited["cause"] == "port_taken"
        assert f"port {port} (http)" in exited["detail"]
        assert "leave the number out" in exited["detail"]
        rank_1, log = run(bench, "echo ran", rendezvous_port=port, rank=1)
        assert (rank_1["exit_code"], log) == (0, "ran\n"), "only rank 0 listens at the rendezvous"
        rank_0, _ = run(bench, "echo ran", rendezvous_port=port, rank=0)
        assert rank_0["cause"] == "port_taken"


SERVER = """
import http.server, os, sys, threading, time
ready = time.monotonic() + float(sys.argv[1])
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > ready and self.path == "/health" and not os.path.exists("sick") else 503)
        self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), H).serve_forever()
"""


def test_a_service_becomes_ready_and_stops_being_so(bench: EngineBench, tmp_path: Path) -> None:
    engine = bench.make()
    port = free_port()
    spec = bench.spec(
        "python3 server.py 0.6",
        workdir=archive(bench, {"server.py": SERVER}),
        ports=(Port(name="http", number=port),),
        service=Service(port="http", readiness_path="/health", readiness_timeout_ns=20 * SECOND_NS),
    )
    engine.launch(spec)
    became = bench.control.wait_for_event(spec.launch_id, "became")
    started = bench.control.wait_for_event(spec.launch_id, "started")
    assert became["ready"] is True
    assert became["endpoint"] == f"127.0.0.1:{port}"
    assert became["at_ns"] - started["at_ns"] > SECOND_NS // 2
    (launch_folder(tmp_path, spec.launch_id).work / "sick").touch()
    record = bench.control.record(spec.launch_id)
    assert bench.control.wait_for(lambda: any(e.get("ready") is False for e in record.events), timeout_s=20)
    engine.close()


def test_a_service_that_hangs_is_ended_for_not_being_alive_but_not_while_it_loads(
    bench: EngineBench, tmp_path: Path
) -> None:
    engine = bench.make()
    port = free_port()
    spec = bench.spec(
        "python3 server.py 0.8",
        workdir=archive(bench, {"server.py": SERVER}),
        ports=(Port(name="http", number=port),),
        service=Service(
            port="http",
            readiness_path="/health",
            readiness_timeout_ns=20 * SECOND_NS,
            liveness_path="/health",
            liveness_pace=Pace(every_ns=SECOND_NS // 10, answer_ns=SECOND_NS, failures=2),
        ),
    )
    engine.launch(spec)
    bench.control.wait_for_event(spec.launch_id, "became")
    (launch_folder(tmp_path, spec.launch_id).work / "sick").touch()
    exited = bench.control.wait_for_event(spec.launch_id, "exited")
    assert exited["cause"] == "not_alive"
    assert exited["detail"].startswith(f"GET /health did not answer with a 2xx status on port {port}, 2 times in a row")
    engine.close()


def test_of_a_gang_only_the_first_worker_is_asked(bench: EngineBench) -> None:
    exited, _ = run(
        bench, "sleep 0.5", rank=1, world_size=2, ports=(Port(name="http", number=free_port()),),
        service=Service(port="http", readiness_timeout_ns=SECOND_NS // 10),
    )  # fmt: skip
    assert (exited["exit_code"], exited["cause"]) == (0, ""), "it never listened, and is none the worse"


def test_a_service_that_is_never_ready_is_ended_with_the_reason(bench: EngineBench) -> None:
    port = free_port()
    exited, _ = run(
        bench, "sleep 600", ports=(Port(name="http", number=port),),
        service=Service(port="http", readiness_path="/health", readiness_timeout_ns=SECOND_NS),
    )  # fmt: skip
    assert exited["cause"] == "not_ready"
    assert f"port {port}" in exited["detail"]
