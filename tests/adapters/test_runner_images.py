"""Workers in container images: the command line, the script, refusals, and real containers where podman works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.local_bench import local_bench, runner_pid
from tidemill.errors import EngineRefused
from tidemill.model.plan import LaunchSpec, ObservedState
from tidemill.model.values import replace
from tidemill.runner import images
from tidemill.runner.execs import FrameReader, frame
from tidemill.runner.sandbox import Support
from tidemill.testing.engine import BEGIN, CHECKS, EngineBench, eventually, state
from tidemill.units import SECOND_NS

IMAGE = "localhost/tidemill-test:busybox"
PODMAN = images.Runtime(Support("container", True), "podman", ("/bin/podman", "--x"), ("memory", "cpu", "pids"))
DOCKER = replace(PODMAN, kind="docker", prefix=("/bin/docker",))


def _box(tmp_path: Path) -> images.Box:
    return images.Box(
        image="docker.io/library/python:3.12", mark="m-run_1", cwd=tmp_path / "work", control=tmp_path / "container",
        writable=(tmp_path / "work", tmp_path / 'a,"b'), readable=(tmp_path / "inputs",), temporary=tmp_path / "tmp",
        devices=("GPU-a", "GPU-b"), memory_bytes=10**9, cpu_milli=1_500, pids=99,
    )  # fmt: skip


def _values(line: list[str], flag: str) -> list[str]:
    return [value for name, value in pairwise(line) if name == flag]


def test_the_command_line_limits_and_mounts(tmp_path: Path) -> None:
    line = images.arguments(PODMAN, _box(tmp_path))
    assert line[:4] == ["/bin/podman", "--x", "run", "--rm"]
    assert line[-2:] == ["docker.io/library/python:3.12", "-s"]
    for flag, value in {
        "--name": "tidemill-m-run_1", "--network": "host", "--pid": "private", "--pull": "missing", "--cap-drop": "all",
        "--security-opt": "no-new-privileges", "--memory": "1000000000", "--cpus": "1.5", "--pids-limit": "99",
        "--workdir": str(tmp_path / "work"), "--entrypoint": "/bin/sh", "--user": "0:0",
    }.items():  # fmt: skip
        assert _values(line, flag) == [value], flag
    assert _values(line, "--device") == ["nvidia.com/gpu=GPU-a", "nvidia.com/gpu=GPU-b"]
    mounts = _values(line, "--mount")
    assert f"type=bind,source={tmp_path}/tmp,destination=/tmp" in mounts
    assert f"type=bind,source={tmp_path}/inputs,destination={tmp_path}/inputs,readonly" in mounts
    assert f'type=bind,"source={tmp_path}/a,""b","destination={tmp_path}/a,""b"' in mounts
    assert _values(line, "--env") == ["TIDEMILL_LAUNCH_MARK=m-run_1"], "no other variable is on the command line"


def test_docker_is_spoken_to_in_its_words(tmp_path: Path) -> None:
    line = images.arguments(DOCKER, _box(tmp_path))
    assert _values(line, "--gpus") == ['"device=GPU-a,GPU-b"']
    assert _values(line, "--user") == [f"{os.geteuid()}:{os.getegid()}"]
    assert not {"--pid", "--device", "--http-proxy=false"} & set(line)


def test_limits_that_cannot_be_had_are_not_asked_for_and_not_claimed(tmp_path: Path) -> None:
    runtime, box = replace(PODMAN, limits=("pids",)), _box(tmp_path)
    assert not {"--memory", "--cpus"} & set(images.arguments(runtime, box))
    assert images.describe(runtime, box) == (
        "container=podman", "image=docker.io/library/python:3.12", "namespaces=mnt,pid,ipc", "network=host",
        "memory=unlimited", "cpu=unlimited", "pids=99", "devices=2",
    )  # fmt: skip


@pytest.mark.parametrize("setup", ["", "echo setting up; exit 4", "echo set up"])
def test_the_script_sets_up_then_runs(tmp_path: Path, setup: str) -> None:
    box = replace(_box(tmp_path), control=tmp_path)
    script = images.script_for(box, {"SECRET": "it's\ntwo lines"}, setup, 'echo "$SECRET"; cat; exit 3')
    done = subprocess.run(["/bin/sh", "-s"], input=script, capture_output=True, check=False, timeout=30)
    assert box.begun
    if "exit 4" in setup:
        assert (done.stdout, done.returncode, box.ready) == (b"setting up\n", 4, False)
    else:
        assert done.stdout.endswith(b"it's\ntwo lines\n"), done
        assert (done.returncode, box.ready) == (3, True)


@pytest.mark.parametrize(
    "image", ["dir:/etc", "oci-archive:/x.tar", "docker-daemon:x", "-v/:/x", "a b", "docker://x", ""]
)
def test_images_are_not_places_on_this_machine(image: str) -> None:
    assert images.refuse_image(image)


def test_usual_names_of_images_are_taken() -> None:
    for image in ("python", "python:3.12", "ghcr.io/a/b@sha256:" + "0" * 64, "localhost:5000/x:y", IMAGE):
        assert not images.refuse_image(image), image


def _program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_without_a_runtime_images_are_refused_with_reason_and_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "shutil", type("Nowhere", (), {"which": staticmethod(lambda _name: None)}))
    with local_bench(tmp_path) as bench:
        engine = bench.make()
        assert not engine.capabilities.images
        assert not engine.nodes()[0].images
        with pytest.raises(EngineRefused, match="podman is not installed") as why:
            engine.launch(bench.spec("true", image="python:3.12"))
        assert "apt install podman" in str(why.value.mend)
        engine.close()


def test_a_runtime_is_asked_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    answer = {"host": {"cgroupControllers": ["memory", "pids"], "cgroupVersion": "v2", "ociRuntime": {"name": "x"}}}
    _program(programs, "podman", f"echo x >> {tmp_path}/asked; echo '{json.dumps(answer)}'")
    found = [images.find_runtime(tmp_path / "cache") for _ in range(2)]
    assert [(r.works, r.kind, r.limits) for r in found] == [(True, "podman", ("memory", "pids"))] * 2
    assert (tmp_path / "asked").read_text() == "x\n"


def test_docker_is_used_where_podman_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _program(tmp_path, "podman", "echo no user namespaces >&2; exit 125")
    assert "no user namespaces" in images.find_runtime().support.detail
    _program(tmp_path, "docker", "echo 28.0")
    assert images.find_runtime().kind == "docker"
    monkeypatch.setattr(images, "_PROBE_S", 0.2)
    _program(tmp_path, "docker", "exec /bin/sleep 30")
    assert "no answer within 0.2 s" in images.find_runtime().support.detail


# ------------------------------------------------------------------ real containers


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> images.Runtime:
    """A podman that runs an image of busybox alone; skips with the reason where there is none."""
    runtime, busybox = images.find_runtime(), shutil.which("busybox")
    if runtime.kind != "podman" or not busybox:
        pytest.skip(f"no podman and busybox here: {runtime.support.detail}, {busybox}")
    folder = tmp_path_factory.mktemp("image")
    (folder / "bin").mkdir()
    shutil.copy(busybox, folder / "bin" / "busybox")
    for name in ("sh", "cat", "env", "grep", "id", "ls", "ps", "setsid", "sleep", "stty", "sync", "touch"):
        (folder / "bin" / name).symlink_to("busybox")
    with tarfile.open(folder / "image.tar", "w") as tar:
        tar.add(folder / "bin", "bin")
        for name in ("opt", "tmp", "etc", "proc", "dev", "sys"):
            tar.addfile(_folder(name))
    made = [*runtime.prefix, "import", "--change", "ENV FLAVOUR=busy", str(folder / "image.tar"), IMAGE]
    imported = subprocess.run(made, capture_output=True, check=False)
    if imported.returncode:
        pytest.skip(f"podman cannot import an image here: {imported.stderr.decode()[-300:]}")
    first = [*runtime.prefix, "run", "--rm", "--network", "host", "--ulimit", "nofile=64:64", "--ulimit", "nproc=64:64"]
    tried = subprocess.run([*first, IMAGE, "/bin/sh", "-c", ":"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"podman cannot run a container here: {tried.stderr.decode()[-300:]}")
    return runtime


def _folder(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    return entry


class ImageBench(EngineBench):
    """A bench whose launches are in the image."""

    def spec(self, run: str, **changes: Any) -> LaunchSpec:
        return super().spec(run, **{"image": IMAGE, **changes})


@pytest.fixture
def bench(podman: images.Runtime, tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path) as made:
        yield ImageBench(make=made.make, control=made.control, output=made.output)


def _containers(runtime: images.Runtime, launch_id: str) -> str:
    line = [*runtime.prefix, "ps", "--all", "--quiet", "--filter", f"name={launch_id}"]
    return subprocess.run(line, capture_output=True, check=True, text=True).stdout


def test_a_worker_runs_in_its_image(bench: EngineBench, podman: images.Runtime) -> None:
    engine = bench.make()
    assert engine.capabilities.images
    assert engine.nodes()[0].images
    spec = bench.spec(
        f"{BEGIN} echo $FLAVOUR $COLOUR; cat /opt/installed; pwd; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; "
        "echo oops >&2; exit 7",
        setup="echo by-setup > /opt/installed",
        environment_variables=(("COLOUR", "blue\nand red"),),
        memory_bytes=10**8,
    )
    engine.launch(spec)
    exited = bench.control.wait_for_event(spec.launch_id, "exited")
    record = bench.control.record(spec.launch_id)
    assert exited["exit_code"] == 7, (exited, bytes(record.log))
    words = bytes(record.log).decode().split()
    assert words[:6] == ["started-here", "busy", "blue", "and", "red", "by-setup"], words
    assert words[6].endswith("/work")
    assert words[7:] == ["CapEff:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2", "oops"]
    assert bench.starts(spec) == 1
    assert record.kinds() == ["prepared", "started", "exited"]
    started = bench.control.wait_for_event(spec.launch_id, "started")
    assert {"container=podman", f"image={IMAGE}", "network=host"} <= set(started["isolation"])
    assert not _containers(podman, spec.launch_id)
    engine.close()


def test_a_failed_setup_and_an_unknown_image_say_so(bench: EngineBench) -> None:
    engine = bench.make()
    spec = bench.spec(BEGIN, setup="echo hm; exit 9")
    missing = bench.spec(BEGIN, image="localhost:1/no/such:image")
    for one in (spec, missing):
        engine.launch(one)
    exited = bench.control.wait_for_event(spec.launch_id, "exited")
    assert (exited["cause"], exited["exit_code"]) == ("setup_failed", 9)
    exited = bench.control.wait_for_event(missing.launch_id, "exited", timeout_s=40.0)
    assert exited["cause"] == "setup_failed"
    assert "localhost:1" in exited["detail"], exited
    assert not bench.starts(spec)
    engine.close()


def test_a_stop_is_told_and_enforced(bench: EngineBench, podman: images.Runtime) -> None:
    engine = bench.make()
    polite = bench.spec(f"trap 'echo saved; exit 0' TERM\n{BEGIN}\nwhile :; do sleep 0.1; done")
    stubborn = bench.spec(f"trap '' TERM\n{BEGIN}\nwhile :; do sleep 1; done")
    for spec, grace_ns in ((polite, 20 * SECOND_NS), (stubborn, SECOND_NS // 5)):
        engine.launch(spec)
        eventually(lambda spec=spec: bench.starts(spec) > 0, what="it runs")  # type: ignore[misc]
        engine.stop(spec.launch_id, node_id=spec.node_id, grace_ns=grace_ns)
    exited = bench.control.wait_for_event(polite.launch_id, "exited")
    assert b"saved" in bytes(bench.control.record(polite.launch_id).log), exited
    exited = bench.control.wait_for_event(stubborn.launch_id, "exited")
    assert exited["exit_code"] == 137
    assert not _containers(podman, stubborn.launch_id)
    engine.close()


def test_a_killed_runner_leaves_no_container(bench: EngineBench, podman: images.Runtime, tmp_path: Path) -> None:
    engine = bench.make()
    spec = bench.spec(f"{BEGIN}\nwhile :; do sleep 0.05; echo x >> $TIDEMILL_OUTPUT_DIR/beat; done")
    engine.launch(spec)
    beat = bench.output(spec) / "beat"
    eventually(beat.exists, what="it runs")
    assert _containers(podman, spec.launch_id)
    os.kill(runner_pid(tmp_path, spec.launch_id), signal.SIGKILL)
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.GONE, what="it is seen as gone")
    assert not _containers(podman, spec.launch_id)
    size = beat.stat().st_size
    threading.Event().wait(0.3)
    assert beat.stat().st_size == size
    engine.close()


def test_the_memory_limit_holds_and_secrets_are_not_shown(bench: EngineBench, podman: images.Runtime) -> None:
    if "memory" not in podman.limits:
        pytest.skip("podman cannot limit memory here")
    engine = bench.make()
    spec = bench.spec(
        f"{BEGIN}until [ -e $TIDEMILL_OUTPUT_DIR/go ]; do sleep 0.05; done; x=abcdefgh; while :; do x=$x$x; done",
        environment_variables=(("PASSWORD", "open-sesame"),),
        memory_bytes=64 * 10**6,
    )
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) > 0, what="it runs")
    line = [*podman.prefix, "inspect", _containers(podman, spec.launch_id).strip()]
    shown = subprocess.run(line, capture_output=True, check=True, text=True).stdout
    assert "open-sesame" not in shown
    assert spec.launch_id in shown
    (bench.output(spec) / "go").touch()
    exited = bench.control.wait_for_event(spec.launch_id, "exited")
    assert (exited["exit_code"], exited["cause"]) == (137, "out_of_memory"), exited
    engine.close()


def test_commands_run_inside_the_container(bench: EngineBench) -> None:
    engine = bench.make()
    spec = bench.spec(
        f"{BEGIN}echo mine > /opt/here; while :; do sleep 1; done", environment_variables=(("COLOUR", "blue"),)
    )
    engine.launch(spec)
    eventually(lambda: b"started-here" in bench.control.record(spec.launch_id).log, what="it runs")
    script = "cat /opt/here; echo $COLOUR $FLAVOUR; pwd; grep -E 'Cap(Eff|Bnd)' /proc/self/status; exit 5"
    record = bench.control.command(spec.launch_id, {"type": "exec", "exec_id": "e1", "command": ["sh", "-c", script]})
    bench.control.feed("e1", frame(b"c"), close=True)
    assert bench.control.wait_for(lambda: record.output_ended), bytes(record.output)
    frames = list(FrameReader().feed(bytes(record.output)))
    words = b"".join(content for kind, content in frames if kind == b"o").decode().split()
    assert words[:3] == ["mine", "blue", "busy"], frames
    assert words[3].endswith("/work")
    assert words[4:8] in (["CapEff:", "0" * 16, "CapBnd:", "0" * 16], ["CapBnd:", "0" * 16, "CapEff:", "0" * 16])
    assert frames[-1] == (b"x", b"5")
    engine.close()


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if "grace" not in check.__name__], ids=lambda check: str(check.__name__)
)
def test_the_contract_of_engines_holds_in_containers(check: object, bench: EngineBench) -> None:
    assert callable(check)
    check(bench)
