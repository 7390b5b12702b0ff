"""Commands inside a running worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.local_bench import local_bench
from tidemill.runner.execs import FrameReader, frame
from tidemill.testing.engine import BEGIN, EngineBench, eventually
from tidemill.testing.peer import ExecRecord


@pytest.fixture(params=["auto", "none"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path, sandbox=request.param) as made:
        yield made


PLACE = "(cd /proc/self/ns; for n in user mnt pid ipc uts; do readlink $n; done); cat /proc/self/cgroup"


class Shell:
    """A worker that idles, and commands in it."""

    def __init__(self, bench: EngineBench) -> None:
        self.bench = bench
        engine = bench.make()
        self.spec = bench.spec(
            f"{BEGIN}{PLACE}; id -u; grep CapEff /proc/self/status; echo mine > here; sleep 600",
            environment_variables=(("COLOUR", "blue"),),
            memory_bytes=10**9,
        )
        engine.launch(self.spec)
        eventually(lambda: b"CapEff" in bench.control.record(self.spec.launch_id).log)
        engine.close()
        self.count = 0

    def start(self, *command: str, **fields: object) -> ExecRecord:
        self.count += 1
        request = {"type": "exec", "exec_id": f"exec_{self.count}", "command": list(command), **fields}
        return self.bench.control.command(self.spec.launch_id, request)

    def finish(self, record: ExecRecord) -> tuple[bytes, bytes, int]:
        assert self.bench.control.wait_for(lambda: record.output_ended), bytes(record.output)
        frames = list(FrameReader().feed(bytes(record.output)))
        out = b"".join(content for kind, content in frames if kind == b"o")
        err = b"".join(content for kind, content in frames if kind == b"e")
        assert frames[-1][0] == b"x", frames
        return out, err, int(frames[-1][1])

    def __call__(self, *command: str, **fields: object) -> tuple[bytes, bytes, int]:
        record = self.start(*command, **fields)
        self.bench.control.feed(f"exec_{self.count}", frame(b"c"), close=True)
        return self.finish(record)


def test_a_command_sees_what_the_worker_sees(bench: EngineBench) -> None:
    run = Shell(bench)
    out, err, code = run("sh", "-c", "cat here; echo $COLOUR $TIDEMILL_LAUNCH_ID; echo oops >&2; exit 5")
    assert out.decode().split() == ["mine", "blue", run.spec.launch_id]
    assert err == b"oops\n"
    assert code == 5


def test_a_command_is_where_the_worker_is(bench: EngineBench) -> None:
    run = Shell(bench)
    out, err, code = run("sh", "-c", f"{PLACE}; id -u; grep CapEff /proc/self/status")
    assert code == 0, err
    log = bytes(bench.control.record(run.spec.launch_id).log)
    assert out.splitlines() == log.splitlines()[1:], "namespaces, control groups, user and rights are the worker's"


def test_input_is_passed_on_until_its_end(bench: EngineBench) -> None:
    run = Shell(bench)
    record = run.start("cat")
    data = bytes(range(256)) * 4_000
    for start in range(0, len(data), 10_000):
        run.bench.control.feed("exec_1", frame(b"i", data[start : start + 10_000]))
    run.bench.control.feed("exec_1", frame(b"c"), close=True)
    out, _, code = run.finish(record)
    assert out == data
    assert code == 0


def test_a_terminal_has_a_size_that_changes(bench: EngineBench) -> None:
    run = Shell(bench)
    record = run.start(
        "sh", "-c", "test -t 0 && stty size; read line; stty size; echo got $line", tty=True, rows=30, cols=100
    )
    assert bench.control.wait_for(lambda: b"30 100" in record.output), bytes(record.output)
    bench.control.feed("exec_1", frame(b"w", b"40 120") + frame(b"i", b"hey\n"))
    out, _, code = run.finish(record)
    assert b"40 120" in out
    assert b"got hey" in out
    assert code == 0


def test_what_cannot_be_started_says_so(bench: EngineBench) -> None:
    out, err, code = Shell(bench)("no-such-program")
    assert (out, code) == (b"", 127)
    assert b"no-such-program: No such file" in err


def test_a_command_whose_client_is_gone_is_ended(bench: EngineBench) -> None:
    run = Shell(bench)
    record = run.start("sh", "-c", "echo up; sleep 500")
    assert bench.control.wait_for(lambda: b"up" in record.output)
    bench.control.feed("exec_1", b"", close=True)
    *_, code = run.finish(record)
    assert code == 137
