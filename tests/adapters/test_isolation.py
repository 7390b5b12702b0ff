"""What a worker is walled off from, what it may use, and what is said where that cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.adapters.local_bench import local_bench
from tidemill.engines.local import LocalEngine
from tidemill.runner import cgroup, sandbox
from tidemill.testing.engine import BEGIN, EngineBench, eventually

SOURCE = Path(sandbox.__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not sandbox.probe_isolation().bwrap, reason=f"no sandbox here: {sandbox.probe_isolation().supports[0].detail}"
)
needs_groups = pytest.mark.skipif(
    not cgroup.find_hierarchies().version, reason=f"no control groups here: {cgroup.find_hierarchies().reason}"
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path) as made:
        yield made


def run(bench: EngineBench, script: str, **changes: object) -> tuple[dict[str, object], str]:
    """The exit event and the log of a worker that ran that script to its end."""
    engine = bench.make()
    spec = bench.spec(script, **changes)
    engine.launch(spec)
    exited = bench.control.wait_for_event(spec.launch_id, "exited", timeout_s=30)
    engine.close()
    return exited, bytes(bench.control.record(spec.launch_id).log).decode()


def test_a_worker_sees_its_own_folders_and_the_system(bench: EngineBench, tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_text("pepper")
    (tmp_path / "local" / "volumes" / "project_other" / "job" / "output").mkdir(parents=True)
    (tmp_path / "local" / "volumes" / "project_other" / "job" / "output" / "model").write_text("theirs")
    exited, log = run(
        bench,
        f"ls -A {tmp_path}; ls -A {tmp_path}/local; ls {tmp_path}/local/volumes; ls {tmp_path}/local/launches | wc -l; "
        "touch $HOME/a $TIDEMILL_CHECKPOINT_DIR/b $TIDEMILL_OUTPUT_DIR/c $TIDEMILL_SCRATCH_DIR/d $XDG_CACHE_HOME/e f /tmp/g; "
        "test -e $HOME/.cache/e; echo wrote",
    )
    words = log.split()
    assert exited["exit_code"] == 0, log
    assert words[-1] == "wrote"
    assert "secret.key" not in words
    assert "project_other" not in words
    assert "1" in words


@pytest.mark.parametrize(
    "script",
    [
        "touch /usr/x", "touch /etc/x && cat /etc/shadow", "cat /etc/shadow", "ls /root/.ssh", "ls /home/*",
        "mkdir /sys/fs/cgroup/x", "echo 1 > /proc/sys/kernel/randomize_va_space", "mount -t tmpfs x /mnt",
        "mknod /tmp/disk b 254 0", "cat /dev/vda", "chroot / true", "touch $TIDEMILL_INPUT_DIR/x", "hostname other",
        "echo b > /proc/sysrq-trigger", "kill -0 {pid}", "cat /proc/{pid}/environ",
    ],
)  # fmt: skip
def test_a_worker_cannot(bench: EngineBench, script: str) -> None:
    exited, log = run(bench, f"exec 2>/dev/null; echo before; {script.format(pid=os.getpid())} >/dev/null; echo after")
    assert exited["exit_code"] != 0, script
    assert log == "before\n"


def test_a_worker_cannot_change_the_machine_s_devices(bench: EngineBench) -> None:
    before = Path("/dev/null").stat().st_mode
    run(bench, "head -c 5 /dev/zero > /dev/null; test $(head -c 5 /dev/urandom | wc -c) = 5; chmod 600 /dev/null")
    assert Path("/dev/null").stat().st_mode == before


def test_a_worker_has_no_rights_and_gets_none(bench: EngineBench) -> None:
    _, log = run(bench, "grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | tr '\\n' ' '")
    fields = dict(zip(log.split()[::2], log.split()[1::2], strict=True))
    assert int(fields["CapEff:"], 16) == 0
    assert fields["NoNewPrivs:"] == "1"


def test_a_preloaded_library_is_loaded_inside_only(bench: EngineBench, tmp_path: Path) -> None:
    """A tenant's LD_PRELOAD must not reach the sandbox program, which starts outside."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("there is no C compiler")
    source, evil = tmp_path / "evil.c", tmp_path / "evil.so"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void)"
        '{FILE *f = fopen("%s", "w"); if (f) fclose(f);}\n' % (tmp_path / "escaped")
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(evil), str(source)], check=True)
    run(bench, "true", environment_variables=(("LD_PRELOAD", str(evil)),))
    assert not (tmp_path / "escaped").exists()


def test_two_workers_do_not_see_each_other(bench: EngineBench) -> None:
    engine = bench.make()
    first = bench.spec(BEGIN + "echo mine > /tmp/shared; sleep 600")
    engine.launch(first)
    eventually(lambda: bench.starts(first) == 1)
    engine.close()
    _, log = run(
        bench, "ls -A /tmp /dev/shm | grep -v pytest | grep shared || echo nothing; pgrep sleep || echo nobody"
    )
    assert log.split() == ["nothing", "nobody"]


@needs_groups
def test_the_memory_limit_is_kept_and_named(bench: EngineBench) -> None:
    exited, _ = run(bench, "python3 -c 'b = bytearray(400_000_000); print(len(b))'", memory_bytes=100_000_000)
    assert exited["cause"] == "out_of_memory", exited
    assert "100 MB" in str(exited["detail"])
    assert "resources.memory" in str(exited["detail"])


@needs_groups
def test_the_processor_limit_is_kept_and_its_use_counted(bench: EngineBench) -> None:
    exited, log = run(
        bench,
        'python3 -c "import time; a = time.monotonic()\nwhile time.monotonic() - a < 1.0: pass\nprint(time.process_time())"',
        cpu_milli=300,
    )
    assert float(log) < 0.7
    used = exited["cpu_used_ns"]
    assert isinstance(used, int)
    assert 100_000_000 < used < 900_000_000


def test_what_a_worker_has_is_reported_and_nothing_is_left_behind(bench: EngineBench) -> None:
    engine = bench.make()
    assert isinstance(engine, LocalEngine)
    spec = bench.spec("true", memory_bytes=10**9)
    engine.launch(spec)
    started = bench.control.wait_for_event(spec.launch_id, "started")
    words = dict(str(word).partition("=")[::2] for word in started["isolation"])
    assert words["sandbox"] == "bwrap"
    assert words["namespaces"] == "user,mnt,pid,ipc,uts"
    assert {"cgroup", "memory", "cpu", "pids", "network"} <= words.keys()
    bench.control.wait_for_event(spec.launch_id, "exited")
    for folder in cgroup.find_hierarchies().parents.values():
        assert not list(folder.glob(f"*{engine.mark(spec.launch_id)}"))
    engine.close()


# ---------------------------------------------------------------- where it cannot be had


def test_without_bubblewrap_the_reason_and_the_mend_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = sandbox.probe_isolation()
    assert found.bwrap == ""
    assert not found.supports[0].works
    assert "apt install bubblewrap" in found.supports[0].mend


def test_a_bubblewrap_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = sandbox.probe_isolation(tmp_path / "cache")
    assert found.bwrap == ""
    assert "No permissions to create a new namespace" in found.supports[0].detail
    assert not (tmp_path / "cache").exists()


def test_workers_run_without_a_sandbox_and_say_so(tmp_path: Path) -> None:
    with local_bench(tmp_path, sandbox="none") as bench:
        engine = bench.make()
        spec = bench.spec("true")
        engine.launch(spec)
        started = bench.control.wait_for_event(spec.launch_id, "started")
        assert "sandbox=none (turned off in the settings)" in started["isolation"]
        bench.control.wait_for_event(spec.launch_id, "exited")
        engine.close()


# ---------------------------------------------------------------- control groups of version 2, from their files


def a_v2_tree(root: Path, *, controllers: str = "cpuset cpu io memory pids") -> tuple[Path, Path]:
    """Files that look like a version 2 hierarchy, and the mount table that names it."""
    for folder in (root, root / cgroup.PARENT):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.controllers").write_text(controllers)
        (folder / "cgroup.subtree_control").write_text("")
        (folder / "cgroup.procs").write_text("")
    mounts, membership = root.with_name("mountinfo"), root.with_name("cgroup")
    mounts.write_text(f"30 23 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n")
    membership.write_text("0::/user.slice/user-1000.slice/session-3.scope\n")
    return mounts, membership


@pytest.mark.skipif(os.geteuid() != 0, reason="the top of the tree is for root")
def test_version_2_limits_are_written_where_the_kernel_reads_them(tmp_path: Path) -> None:
    mounts, membership = a_v2_tree(tmp_path / "v2")
    found = cgroup.find_hierarchies(mounts=mounts, membership=membership)
    assert found.version == 2
    assert (tmp_path / "v2" / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    limits = cgroup.Limits(memory_bytes=2 * 10**9, cpu_milli=1_500, pids=99)
    groups = cgroup.create(cgroup.plan("run_1", found), limits)
    folder = tmp_path / "v2" / cgroup.PARENT / "run_1"
    assert groups.folders() == (folder,)
    assert (folder / "memory.max").read_text() == "2000000000"
    assert (folder / "cpu.max").read_text() == "150000 100000"
    assert (folder / "pids.max").read_text() == "99"
    assert groups.described == ("cgroup=v2", "memory=2GB", "cpu=1.5", "pids=99")
    (folder / "cpu.stat").write_text("usage_usec 1234\nuser_usec 1000\n")
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    (folder / "memory.stat").write_text("anon 4096\nfile 100\n")
    assert (groups.cpu_used_ns(), groups.oom_kills(), groups.rss_bytes()) == (1_234_000, 2, 4_096)


def test_a_tree_that_was_not_delegated_is_said_so(tmp_path: Path) -> None:
    mounts, membership = a_v2_tree(tmp_path / "v2", controllers="")
    found = cgroup.find_hierarchies(mounts=mounts, membership=membership)
    assert found.version == 0
    groups = cgroup.create(cgroup.plan("run_1", found), cgroup.Limits(memory_bytes=1))
    assert groups.described[0].startswith("cgroup=none (")
    assert groups.paths == {}


# ---------------------------------------------------------------- as an ordinary user

AS_NOBODY = """
import sys, tempfile
from pathlib import Path
from tests.adapters.local_bench import local_bench
from tidemill.testing.engine import CHECKS, BEGIN
from tidemill.runner.execs import FrameReader, frame
with tempfile.TemporaryDirectory() as name, local_bench(Path(name)) as bench:
    for check in CHECKS:
        check(bench)
    engine = bench.make()
    assert engine.isolation.bwrap
    spec = bench.spec(BEGIN + "id -u; sleep 600")
    engine.launch(spec)
    started = bench.control.wait_for_event(spec.launch_id, "started")
    assert "sandbox=bwrap" in started["isolation"]
    words = "id -u; readlink /proc/self/ns/pid /proc/1/ns/pid; grep -c ^CapEff:.*0000000000000000 /proc/self/status"
    record = bench.control.command(spec.launch_id, {"type": "exec", "exec_id": "x", "command": ["sh", "-c", words]})
    bench.control.feed("x", frame(b"c"), close=True)
    assert bench.control.wait_for(lambda: record.output_ended)
    frames = list(FrameReader().feed(bytes(record.output)))
    out = b"".join(content for kind, content in frames if kind == b"o").split()
    assert frames[-1] == (b"x", b"0") and out[0] == b"1000" and out[1] == out[2] and out[3] == b"1", frames
    engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=0)
    bench.control.wait_for_event(spec.launch_id, "exited")
    engine.close()
print("kept")
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become somebody else")
def test_an_ordinary_user_has_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"  # what is compiled for ours runs in no other
    python = next((path for path in (f"/usr/bin/{own}", sys.executable) if Path(path).exists()), sys.executable)
    packages = Path(msgspec.__file__).parent.parent
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-c", AS_NOBODY],
        env={"PYTHONPATH": f"{SOURCE}:{SOURCE.parent}:{packages}", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        cwd="/", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "kept", done.stderr[-3000:]
