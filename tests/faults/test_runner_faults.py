"""Launcher, runner and worker killed, the network and the control plane failing: nothing twice, nothing lost.

Ground truth is outside: a journal that each worker writes durably when it begins, the octets that arrived at
the control plane, and the process table.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.adapters.local_bench import launch_folder, local_bench, runner_pid
from tidemill.engines.local import LocalEngine
from tidemill.errors import Conflict, EngineLost
from tidemill.model.plan import ObservedState
from tidemill.runner.folders import read_json
from tidemill.runner.processes import marked_pids
from tidemill.testing.engine import BEGIN, EngineBench, eventually, observed, state

OVER = (ObservedState.EXITED, ObservedState.GONE)
SECOND_NS = 1_000_000_000


@pytest.fixture(params=["auto", "none"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path, sandbox=request.param) as made:
        yield made


@pytest.fixture
def engine(bench: EngineBench) -> Iterator[LocalEngine]:
    made = bench.make()
    assert isinstance(made, LocalEngine)
    yield made
    made.close()


def launcher_pid(engine: LocalEngine) -> int:
    return engine._launcher.pid


def is_over(engine: LocalEngine, launch_id: str) -> bool:
    return state(engine, launch_id) in OVER


def left(engine: LocalEngine, launch_id: str) -> list[int]:
    """Processes of a launch that are still there."""
    mark = engine.mark(launch_id)
    return marked_pids([mark])[mark]


# ---------------------------------------------------------------- killed processes


def test_a_killed_launcher_is_replaced_and_what_runs_runs_on(bench: EngineBench, engine: LocalEngine) -> None:
    first = bench.spec(BEGIN + "sleep 600")
    engine.launch(first)
    eventually(lambda: bench.starts(first) == 1)
    os.kill(launcher_pid(engine), signal.SIGKILL)
    second = bench.spec(BEGIN)
    engine.launch(second)
    bench.control.wait_for_event(second.launch_id, "exited")
    assert bench.starts(second) == 1
    assert state(engine, first.launch_id) is ObservedState.ALIVE


@pytest.mark.parametrize("seed", range(6))
def test_a_launcher_killed_at_any_moment_starts_nothing_twice(
    bench: EngineBench, engine: LocalEngine, seed: int
) -> None:
    chance = random.Random(seed)
    specs = [bench.spec(BEGIN) for _ in range(5)]

    def kill() -> None:
        for _ in range(4):
            time.sleep(chance.uniform(0.0, 0.03))
            pid = launcher_pid(engine)
            if pid:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    for spec in specs:
        for _ in range(10):
            with suppress(EngineLost):
                engine.launch(spec)
                break
    killer.join()
    for spec in specs:
        engine.launch(spec)
        eventually(partial(is_over, engine, spec.launch_id), what="it is over")
        assert bench.starts(spec) == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.01, 0.02, 0.05, 0.3])
def test_a_killed_runner_is_noticed_and_leaves_nothing(
    bench: EngineBench, engine: LocalEngine, tmp_path: Path, delay_s: float
) -> None:
    spec = bench.spec(
        BEGIN + "export J=$TIDEMILL_OUTPUT_DIR/j; (trap '' TERM; while :; do echo x >> $J; sleep 0.02; done) & "
        "setsid sh -c 'while :; do echo y >> $J; sleep 0.02; done' & sleep 600"
    )
    engine.launch(spec)
    pid = runner_pid(tmp_path, spec.launch_id)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    before = time.monotonic()
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE, timeout_s=5, what="gone is observed")
    assert time.monotonic() - before < 2.5
    assert left(engine, spec.launch_id) == []
    journal = bench.output(spec) / "j"
    size = journal.stat().st_size if journal.exists() else 0
    time.sleep(0.15)
    assert (journal.stat().st_size if journal.exists() else 0) == size
    engine.launch(spec)
    assert bench.starts(spec) <= 1
    assert state(engine, spec.launch_id) is ObservedState.GONE
    engine.forget(spec.launch_id, node_id=spec.node_id)
    assert observed(engine, spec.launch_id) is None


def test_a_killed_worker_is_reported(bench: EngineBench, engine: LocalEngine) -> None:
    spec = bench.spec(BEGIN + "kill -9 $$")
    engine.launch(spec)
    assert bench.control.wait_for_event(spec.launch_id, "exited")["exit_code"] == 137


def test_children_end_with_the_main_program(bench: EngineBench, engine: LocalEngine) -> None:
    spec = bench.spec(BEGIN + "setsid sleep 600 & sleep 600 & exit 3")
    engine.launch(spec)
    assert bench.control.wait_for_event(spec.launch_id, "exited")["exit_code"] == 3
    eventually(lambda: left(engine, spec.launch_id) == [])


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_at_any_moment_of_a_launch_ends_it(bench: EngineBench, engine: LocalEngine, seed: int) -> None:
    spec = bench.spec(BEGIN + "sleep 600")
    stopper = threading.Timer(
        random.Random(seed).uniform(0, 0.04),
        lambda: engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=SECOND_NS // 2),
    )
    stopper.start()
    engine.launch(spec)
    stopper.join()
    eventually(lambda: state(engine, spec.launch_id) in OVER, timeout_s=8, what="it is over")
    assert bench.starts(spec) <= 1
    assert left(engine, spec.launch_id) == []


def test_many_launches_of_one_id_at_once_start_one(bench: EngineBench) -> None:
    engines = [bench.make() for _ in range(3)]
    spec = bench.spec(BEGIN + "sleep 0.3")
    threads = [threading.Thread(target=engines[i % 3].launch, args=(spec,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.control.wait_for_event(spec.launch_id, "exited")
    assert bench.starts(spec) == 1
    for made in engines:
        made.close()


def test_a_launcher_that_is_asked_again_for_what_is_over_starts_nothing(
    bench: EngineBench, engine: LocalEngine, tmp_path: Path
) -> None:
    """The runner itself must find the claim: a request may be late, and the engine's own look too early."""
    spec = bench.spec(BEGIN)
    engine.launch(spec)
    eventually(partial(is_over, engine, spec.launch_id), what="it is over")
    for _ in range(3):
        assert engine._launcher.ask(os.fsencode(launch_folder(tmp_path, spec.launch_id).path)) == b"known"
    eventually(partial(is_over, engine, spec.launch_id), what="it is over still")
    assert bench.starts(spec) == 1


# ---------------------------------------------------------------- every step, by strace

RUN = "import sys, pathlib; from tidemill.runner.main import run_launch; run_launch(pathlib.Path(sys.argv[1]), lambda: None)"
CALLS = ("openat", "write", "rename", "mkdir", "clone,clone3,vfork,fork", "sendto", "pwrite64", "unlink,rmdir", "fsync")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("call", CALLS)
def test_a_runner_killed_at_its_nth_system_call_leaves_nothing_half(tmp_path: Path, call: str) -> None:
    with local_bench(tmp_path) as bench:
        engine = bench.make()
        assert isinstance(engine, LocalEngine)
        total = _traced(engine, bench, tmp_path, call, when=0)
        if total == 0:
            return
        first = max(0, total - 60)  # the calls before are Python's own start
        for when in sorted({max(1, first + (total - first) * i // 4) for i in range(1, 5)}):
            _traced(engine, bench, tmp_path, call, when=when)
        engine.close()


def _traced(engine: LocalEngine, bench: EngineBench, tmp_path: Path, call: str, *, when: int) -> int:
    """Run a launch and kill it at that call; check what holds; how many such calls there were."""
    spec = bench.spec(BEGIN + "echo one; sleep 0.05; echo two", grace_ns=SECOND_NS // 2)
    folder = launch_folder(tmp_path, spec.launch_id)
    engine._write_spec(folder, spec)
    trace = tmp_path / f"trace-{when}"
    inject = ["-e", f"inject={call}:signal=SIGKILL:when={when}"] if when else []
    command = ["strace", "-o", str(trace), "-e", f"trace={call}", *inject, sys.executable, "-c", RUN, str(folder.path)]
    subprocess.run(command, check=False, capture_output=True, timeout=60)
    if folder.claimed.exists():
        eventually(lambda: state(engine, spec.launch_id) in OVER, timeout_s=8, what=f"over after {call} {when}")
    assert left(engine, spec.launch_id) == []
    started = bench.starts(spec)
    assert started <= 1
    engine.launch(spec)
    eventually(lambda: state(engine, spec.launch_id) in OVER, timeout_s=15, what=f"over, again, after {call} {when}")
    assert bench.starts(spec) <= 1
    eventually(lambda: not folder.is_owing, what=f"everything is told after {call} {when}")
    log = bytes(bench.control.record(spec.launch_id).log)
    assert b"started-here\none\ntwo\n".startswith(log), log
    assert log == (folder.output.read_bytes() if folder.output.exists() else b"")
    assert bench.control.record(spec.launch_id).gaps == 0
    if not when:
        assert (read_json(folder.exit) or {}).get("exit_code") == 0
    engine.forget(spec.launch_id, node_id=spec.node_id)
    return when or len(trace.read_text().splitlines())


# ---------------------------------------------------------------- the control plane failing

LINES = 300
NOISY = f"{BEGIN}for i in $(seq {LINES}); do echo line $i; sleep 0.005; done"
EXPECTED = b"started-here\n" + b"".join(b"line %d\n" % i for i in range(1, LINES + 1))


def check_delivered(
    bench: EngineBench, launch_id: str, *, kinds: tuple[str, ...] = ("prepared", "started", "exited")
) -> None:
    record = bench.control.record(launch_id)
    assert bytes(record.log) == EXPECTED, "the log has no gap and no repeat"
    assert record.kinds() == list(kinds)
    assert len(record.events) == len(kinds), "each report was the same when it was repeated"
    assert record.arrivals.index("log complete") < record.arrivals.index("exited")


@pytest.mark.parametrize("fault", ["error", "refuse", "lose"])
@pytest.mark.parametrize("seed", range(2))
def test_requests_that_fail_are_made_again(bench: EngineBench, engine: LocalEngine, fault: str, seed: int) -> None:
    chance = random.Random(seed)
    bench.control.fault = lambda _method, _path: fault if chance.random() < 0.3 else ""
    spec = bench.spec(NOISY)
    engine.launch(spec)
    bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=60)
    check_delivered(bench, spec.launch_id)


def test_a_control_plane_that_comes_and_goes(bench: EngineBench, engine: LocalEngine) -> None:
    spec = bench.spec(NOISY)
    engine.launch(spec)
    for pause_s in (0.3, 0.05, 0.4):
        time.sleep(0.2)
        bench.control.stop()
        time.sleep(pause_s)
        bench.control.start()
    bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=30)
    check_delivered(bench, spec.launch_id)


def test_a_slow_control_plane_does_not_slow_the_worker(bench: EngineBench, engine: LocalEngine) -> None:
    bench.control.delay_s = 0.3
    spec = bench.spec(f"{BEGIN}seq 100000; echo took $SECONDS")
    engine.launch(spec)
    bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=30)
    log = bytes(bench.control.record(spec.launch_id).log)
    assert log == b"started-here\n" + b"".join(b"%d\n" % i for i in range(1, 100_001)) + log[log.rindex(b"took") :]
    assert int(log.split()[-1]) <= 2


def test_a_control_plane_that_is_never_back_is_given_up(tmp_path: Path) -> None:
    with local_bench(tmp_path, linger_ns=SECOND_NS) as bench:
        engine = bench.make()
        bench.control.stop()
        spec = bench.spec(BEGIN + "exit 9")
        engine.launch(spec)
        eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED)
        seen = observed(engine, spec.launch_id)
        assert seen
        assert seen.exit_code == 9
        engine.close()


SPEAKS = BEGIN + "for i in $(seq 1 3000); do echo $i; done; exit 4"
SPOKEN = b"started-here\n" + b"".join(b"%d\n" % i for i in range(1, 3001))


def has_ended(folder: Path, launch_id: str) -> bool:
    return launch_folder(folder, launch_id).exit.exists()


def test_what_a_runner_did_not_tell_before_it_was_killed_is_told_once(
    bench: EngineBench, engine: LocalEngine, tmp_path: Path
) -> None:
    """The worker ended while nobody answered; whoever looks at the machine sees no end before all was told."""
    spec = bench.spec(SPEAKS)
    bench.control.stop()
    engine.launch(spec)
    eventually(partial(has_ended, tmp_path, spec.launch_id), what="it ended")
    os.kill(runner_pid(tmp_path, spec.launch_id), signal.SIGKILL)
    for _ in range(5):
        assert state(engine, spec.launch_id) is ObservedState.ALIVE
        time.sleep(0.05)
    engine.close()
    other = bench.make()
    bench.control.start()
    eventually(lambda: state(other, spec.launch_id) is ObservedState.EXITED, what="its end is seen")
    record = bench.control.record(spec.launch_id)
    assert (bytes(record.log), record.complete, record.gaps) == (SPOKEN, True, 0)
    assert record.kinds() == ["prepared", "started", "exited"]
    assert [event["exit_code"] for event in record.events if event["type"] == "exited"] == [4]
    assert bench.starts(spec) == 1
    other.forget(spec.launch_id, node_id=spec.node_id)
    assert observed(other, spec.launch_id) is None
    other.close()


def test_the_output_of_a_worker_whose_runner_was_killed_arrives_and_is_not_dropped_before(
    bench: EngineBench, engine: LocalEngine, tmp_path: Path
) -> None:
    spec = bench.spec(SPEAKS.replace("exit 4", "sleep 600"))
    bench.control.stop()
    engine.launch(spec)
    output = launch_folder(tmp_path, spec.launch_id).output
    eventually(lambda: output.exists() and output.stat().st_size == len(SPOKEN), what="it has spoken")
    os.kill(runner_pid(tmp_path, spec.launch_id), signal.SIGKILL)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE, what="it is known to be gone at once")
    with pytest.raises(Conflict, match="not delivered yet"):
        engine.forget(spec.launch_id, node_id=spec.node_id)
    bench.control.start()
    record = bench.control.record(spec.launch_id)
    assert bench.control.wait_for(lambda: record.complete)
    assert bytes(record.log) == SPOKEN
    assert record.event("exited") is None, "how it ended nobody knows"
    eventually(lambda: not launch_folder(tmp_path, spec.launch_id).is_owing, what="nothing is owed")
    engine.forget(spec.launch_id, node_id=spec.node_id)
    assert observed(engine, spec.launch_id) is None


@pytest.mark.long
def test_output_that_nobody_takes_does_not_keep_a_launch_for_ever(tmp_path: Path) -> None:
    """Whoever drops the launch is told to wait for as long as it is tried, and no longer."""
    with local_bench(tmp_path) as bench:
        engine = bench.make()
        spec = bench.spec(SPEAKS.replace("exit 4", "sleep 600"))
        bench.control.fault = lambda _method, path: "error" if "/logs" in path else ""
        engine.launch(spec)
        bench.control.wait_for_event(spec.launch_id, "started")
        os.kill(runner_pid(tmp_path, spec.launch_id), signal.SIGKILL)
        eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE)
        with pytest.raises(Conflict, match="not delivered yet"):
            engine.forget(spec.launch_id, node_id=spec.node_id)
        eventually(lambda: not launch_folder(tmp_path, spec.launch_id).is_owing, timeout_s=15, what="it is given up")
        engine.forget(spec.launch_id, node_id=spec.node_id)
        assert observed(engine, spec.launch_id) is None
        engine.close()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("answers", [True, False])
def test_what_is_not_told_soon_is_kept_from_a_power_failure(tmp_path: Path, answers: bool) -> None:
    """First the output, then how it ended, then that there is such a file; where it was told, the disk is left alone."""
    with local_bench(tmp_path, linger_ns=2 * SECOND_NS) as bench:
        engine = bench.make()
        assert isinstance(engine, LocalEngine)
        spec = bench.spec(BEGIN)
        if not answers:
            bench.control.stop()
        folder = launch_folder(tmp_path, spec.launch_id)
        engine._write_spec(folder, spec)
        engine.close()
        trace = tmp_path / "trace"
        strace = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,sync_file_range", "-o", str(trace)]
        subprocess.run([*strace, sys.executable, "-c", RUN, str(folder.path)], check=True, timeout=60)
        synced = [line.split("<")[1].split(">")[0] for line in trace.read_text().splitlines() if "sync(" in line]
        mine = [Path(path).name for path in synced if path.startswith(str(folder.path))]
        assert mine == ([] if answers else [folder.output.name, folder.exit.name, folder.path.name])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_is_named_and_heals(tmp_path: Path) -> None:
    root = tmp_path / "local"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(root)], check=True)
    try:
        with local_bench(tmp_path) as bench:
            engine = bench.make()
            filler = root / "filler"
            spec = bench.spec(BEGIN + "head -c 20000000 /dev/zero > $TIDEMILL_OUTPUT_DIR/big")
            engine.launch(spec)
            exited = bench.control.wait_for_event(spec.launch_id, "exited")
            assert exited["cause"] == "storage_full", exited
            assert bench.control.record(spec.launch_id).complete
            eventually(lambda: state(engine, spec.launch_id) in OVER, what="its runner is gone and frees nothing more")
            with suppress(OSError):
                filler.write_bytes(bytes(10_000_000))
            late = bench.spec(BEGIN)
            with pytest.raises(EngineLost, match="No space left"):
                engine.launch(late)
            assert engine.observe().launches
            filler.unlink()
            (bench.output(spec) / "big").unlink()
            engine.launch(late)
            assert bench.control.wait_for_event(late.launch_id, "exited")["exit_code"] == 0
            assert bench.starts(late) == 1
            engine.close()
    finally:
        subprocess.run(["umount", "-l", str(root)], check=False)


def test_a_fenced_runner_ends_its_worker_and_says_no_more(bench: EngineBench, engine: LocalEngine) -> None:
    spec = bench.spec(BEGIN + "sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1)
    bench.control.fenced.add(spec.launch_id)
    eventually(lambda: state(engine, spec.launch_id) in OVER, timeout_s=8)
    assert left(engine, spec.launch_id) == []
    assert bench.control.record(spec.launch_id).event("exited") is None


LEASE_S = 0.8


def test_a_runner_that_stands_still_is_killed_by_the_kernel_with_its_worker(
    tmp_path: Path, bench: EngineBench, engine: LocalEngine
) -> None:
    """Nobody guards the machine: neither the agent nor the runner does anything more."""
    spec = bench.spec(BEGIN + "exec sleep 600", lease_ns=round(LEASE_S * SECOND_NS), grace_ns=0)
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1)
    os.kill(runner_pid(tmp_path, spec.launch_id), signal.SIGSTOP)
    time.sleep(LEASE_S)
    assert left(engine, spec.launch_id), "within its lease it lives"
    eventually(lambda: left(engine, spec.launch_id) == [], timeout_s=4, what="it is gone")
    eventually(lambda: state(engine, spec.launch_id) in OVER, timeout_s=4, what="that is seen")


def test_a_runner_whose_worker_ended_with_its_lease_lives_to_tell(
    tmp_path: Path, bench: EngineBench, engine: LocalEngine
) -> None:
    spec = bench.spec(BEGIN + "exec sleep 600", lease_ns=round(LEASE_S * SECOND_NS), grace_ns=0)
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1)
    bench.control.stop()
    eventually(lambda: left(engine, spec.launch_id) == [], timeout_s=8, what="its worker is gone")
    time.sleep(LEASE_S + 2.5)
    bench.control.start()
    assert bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=15)["cause"] == "node_lost"


def test_the_directive_to_stop_is_obeyed(bench: EngineBench, engine: LocalEngine) -> None:
    spec = bench.spec(BEGIN + "trap '' TERM; sleep 600; sleep 600")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) == 1)
    bench.control.directives[spec.launch_id] = SECOND_NS // 2
    assert bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=8)["exit_code"] in (137, 143)


# ---------------------------------------------------------------- output of every kind


def test_output_over_the_cap_is_counted_where_it_is_missing(tmp_path: Path) -> None:
    with local_bench(tmp_path, spool_cap_bytes=1_000_000) as bench:
        engine = bench.make()
        bench.control.fault = lambda _method, path: "refuse" if "/logs" in path else ""
        spec = bench.spec(
            BEGIN + "head -c 5000000 /dev/zero | tr '\\0' x; touch $TIDEMILL_OUTPUT_DIR/written; sleep 600"
        )
        engine.launch(spec)
        eventually(lambda: (bench.output(spec) / "written").exists())
        bench.control.fault = lambda _method, _path: ""
        engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=SECOND_NS)
        bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=30)
        log = bytes(bench.control.record(spec.launch_id).log)
        note = log[log.index(b"[tidemill] ") :].split(b" ")
        assert log.count(b"x") + int(note[1]) - note.count(b"x") in range(4_999_990, 5_000_020), note
        engine.close()


def test_octets_and_a_very_long_line_pass_in_bounded_memory(
    bench: EngineBench, engine: LocalEngine, tmp_path: Path
) -> None:
    spec = bench.spec(
        'python3 -c "import sys; b = sys.stdout.buffer; b.write(bytes(range(256)) * 200_000); b.flush(); '
        'sys.stdin.read()"; sleep 2'
    )
    engine.launch(spec)
    pid = runner_pid(tmp_path, spec.launch_id)
    peak_kb = 0
    record = bench.control.record(spec.launch_id)
    while not record.complete and state(engine, spec.launch_id) is ObservedState.ALIVE:
        status = Path(f"/proc/{pid}/status")
        if status.exists():
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            peak_kb = max(peak_kb, *(int(line.split()[1]) for line in lines), 0)
        time.sleep(0.02)
    bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=30)
    assert bytes(record.log) == bytes(range(256)) * 200_000
    assert 0 < peak_kb < 64_000
