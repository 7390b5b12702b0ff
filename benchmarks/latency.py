"""From submitting a command to the first line of its own output: Tidemill alone, on Ray and on Slurm, beside Ray jobs,
sbatch and a subprocess.

Each round runs every contender once, in turn, with the same command; what is measured ends when a line that is
exactly the command's marker can be read. ``cli`` rows start a command line (``tidemill run -- COMMAND``, ``ray job
submit -- COMMAND``) and read its standard output; ``sdk`` rows submit and read the log from a Python client that is
connected already. ``tidemill_ray`` is a cloud whose machine is a Ray cluster's (``engine: ray``); the other Ray is one
of its own, from an environment in ``.bench/ray``, installed on first use. ``tidemill_slurm`` is a cloud whose machines
are those of a Slurm cluster, ``sbatch`` that same cluster without us; its output is read from the file, every two
milliseconds. Slurm looks for what to start about once a second, so these begin at fractions of a second that are
evenly spread, and the same for each: else one would meet that moment more often. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.centre import cloud_on_slurm, cluster, why_not
from benchmarks.clouds import PROGRAMS, Home, cloud, end_on_signals, free_port, machine, median, percentile, table

RAY = "ray[default]==2.60.0"
RAY_FOLDER = Path(__file__).resolve().parents[1] / ".bench" / "ray"
_RAY_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
"""Which Ray would take from fixed numbers, where another Ray on this machine may be."""
_ANSI = re.compile(rb"\x1b\[[0-9;]*m")
_LIMIT_S = 120.0
_GOLDEN = 0.6180339887
"""Multiples of it, without their whole part, are spread evenly."""
_RAY_CLIENT = """
import asyncio, sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
async def first(job, marker):
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\\n")
        if marker in (line.strip() for line in lines):
            return time.perf_counter()
    raise SystemExit("the job ended without its line")
print("ready", flush=True)
for line in sys.stdin:
    marker, _, command = line.rstrip("\\n").partition(" ")
    began = time.perf_counter()
    at = asyncio.run(first(client.submit_job(entrypoint=command), marker))
    print(at - began, flush=True)
"""

Measure = Callable[[str, list[str]], float]


def first_line(command: list[str], marker: str, environment: dict[str, str] | None) -> float:
    """Seconds until ``command`` has written the line ``marker``; it is waited for afterwards.

    Raises: RuntimeError when it ended without that line.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    took = 0.0
    for line in process.stdout:
        if _ANSI.sub(b"", line).strip() == marker.encode():
            took = time.perf_counter() - began
            break
    process.stdout.read()
    process.wait(timeout=_LIMIT_S)
    if not took:
        raise RuntimeError(f"{command[0]} ended with {process.returncode} and without the line {marker}")
    return took


def tidemill_sdk(home: Home) -> Measure:
    """The measure of a connected Tidemill client."""
    from tidemill.sdk.client import Client
    from tidemill.sdk.results import LogChunk

    client = Client(home.url, home.token)

    def measure(marker: str, command: list[str]) -> float:
        began = time.perf_counter()
        job = client.submit({"name": "latency", "run": _shell(command)}).jobs[0]
        text = ""
        for part in client.logs(job.id):
            text += part.text if isinstance(part, LogChunk) else ""
            if marker in text.splitlines():
                took = time.perf_counter() - began
                client.wait(job.id)
                return took
        raise RuntimeError("the job ended without its line")

    return measure


@contextlib.contextmanager
def cloud_on_ray() -> Iterator[Home]:
    """A cloud whose one machine is a Ray cluster's, once that is there."""
    from tidemill.sdk.client import Client

    with cloud(engine="ray", ray_port=free_port()) as home:
        client = Client(home.url, home.token)
        deadline = time.monotonic() + _LIMIT_S
        while not any(node.state == "ready" for node in client.nodes()):
            if time.monotonic() > deadline:
                raise RuntimeError("the machines of the Ray cluster do not join")
            time.sleep(0.2)
        yield home


@contextlib.contextmanager
def ray_head(cores: int) -> Iterator[tuple[Measure, Measure]]:
    """A Ray head of our own, and its two measures: command line and client."""
    install_ray()
    temporary = tempfile.mkdtemp(prefix="ray-bench-")
    dashboard = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VIRTUAL_ENV"))}
    environment |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{RAY_FOLDER / 'bin'}:{environment.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    ray = str(RAY_FOLDER / "bin" / "ray")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--port", str(free_port()), "--num-cpus", str(cores),
         "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--ray-client-server-port",
         str(free_port()), "--temp-dir", temporary, "--disable-usage-stats",
         *(word for name in _RAY_PORTS for word in (f"--{name}", str(free_port())))],
        env={name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    helper: subprocess.Popen[str] | None = None
    try:
        _until_ray_answers(ray, environment, head)
        helper = subprocess.Popen(
            [str(RAY_FOLDER / "bin" / "python"), "-c", _RAY_CLIENT, environment["RAY_ADDRESS"]],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert helper.stdout is not None
        if helper.stdout.readline().strip() != "ready":
            raise RuntimeError("Ray's client does not start")

        def by_client(marker: str, command: list[str]) -> float:
            assert helper is not None
            assert helper.stdin is not None
            assert helper.stdout is not None
            helper.stdin.write(f"{marker} {_shell(command)}\n")
            helper.stdin.flush()
            return float(helper.stdout.readline())

        def by_cli(marker: str, command: list[str]) -> float:
            return first_line([ray, "job", "submit", "--", *command], marker, environment)

        yield by_cli, by_client
    finally:
        if helper is not None:
            helper.kill()
        end_group(head)
        shutil.rmtree(temporary, ignore_errors=True)


def install_ray() -> None:
    """Nothing; Ray is in its environment afterwards."""
    if (RAY_FOLDER / "bin" / "ray").exists():
        return
    print(f"installing {RAY} into {RAY_FOLDER}", file=sys.stderr)
    uv = str(PROGRAMS / "uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(RAY_FOLDER)], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(RAY_FOLDER / "bin" / "python"), RAY], check=True)


def _until_ray_answers(ray: str, environment: dict[str, str], head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while subprocess.run([ray, "job", "list"], env=environment, capture_output=True, check=False).returncode:
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("Ray's head does not start")
        time.sleep(0.5)


def end_group(head: subprocess.Popen[bytes]) -> None:
    """End the head and all that it started, which are in its session."""
    import psutil

    with contextlib.suppress(psutil.Error):
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        head.send_signal(signal.SIGTERM)
        for process in psutil.wait_procs(family, timeout=10)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
    head.wait(timeout=20)


def by_sbatch(folder: Path) -> Measure:
    """The measure of ``sbatch``, whose jobs write into that folder."""

    def measure(marker: str, command: list[str]) -> float:
        output = folder / marker
        submit = ["sbatch", "--parsable", f"--output={output}", f"--wrap={_shell(command)}"]
        began = time.perf_counter()
        subprocess.run(submit, check=True, capture_output=True)
        while marker not in (output.read_text().splitlines() if output.exists() else ()):
            if time.perf_counter() - began > _LIMIT_S:
                raise RuntimeError("the job did not write its line")
            time.sleep(0.002)
        return time.perf_counter() - began

    return measure


def at_all_times(measure: Measure) -> Measure:
    """The same, begun each time at another fraction of a second, evenly spread."""
    calls = itertools.count(1)

    def after_a_pause(marker: str, command: list[str]) -> float:
        time.sleep((next(calls) * _GOLDEN - time.time()) % 1.0)
        return measure(marker, command)

    return after_a_pause


def _shell(command: list[str]) -> str:
    import shlex

    return shlex.join(command)


def _command(kind: str, marker: str) -> list[str]:
    return ["echo", marker] if kind == "echo" else ["/usr/bin/python3", "-c", f"print('{marker}')"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="of echo; of Python a third")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true", help="only Tidemill and the bare subprocess")
    parser.add_argument("--no-slurm", action="store_true", help="without Slurm")
    given = parser.parse_args()
    end_on_signals()
    kinds = ["echo", *(["python"] if Path("/usr/bin/python3").exists() else [])]
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(cloud())
        contenders: dict[str, Measure] = {
            "tidemill cli": lambda marker, command: first_line(
                [str(PROGRAMS / "tidemill"), "run", "--", *command], marker, home.environment
            ),
        }
        sdk: dict[str, Measure] = {"tidemill sdk": tidemill_sdk(home)}
        if not given.no_ray:
            on_ray = stack.enter_context(cloud_on_ray())
            contenders["tidemill_ray cli"] = lambda marker, command: first_line(
                [str(PROGRAMS / "tidemill"), "run", "--", *command], marker, on_ray.environment
            )
            sdk["tidemill_ray sdk"] = tidemill_sdk(on_ray)
            contenders["ray cli"], sdk["ray sdk"] = stack.enter_context(ray_head(cores))
        if given.no_slurm or why_not():
            print(why_not() or "without Slurm", file=sys.stderr)
        else:
            slurm = stack.enter_context(cluster())
            on_slurm = stack.enter_context(cloud_on_slurm(slurm))
            contenders["tidemill_slurm cli"] = at_all_times(
                lambda marker, command: first_line(
                    [str(PROGRAMS / "tidemill"), "run", "--", *command], marker, on_slurm.environment
                )
            )
            sdk["tidemill_slurm sdk"] = at_all_times(tidemill_sdk(on_slurm))
            contenders["sbatch"] = at_all_times(by_sbatch(slurm.folder))
        contenders |= {"bare": lambda marker, command: first_line(command, marker, None), **sdk}
        taken: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in kinds for name in contenders}
        for number in range(-given.warmup, given.runs):
            for kind in kinds if number < given.runs // 3 else kinds[:1]:
                for name, measure in contenders.items():
                    marker = f"line-{uuid.uuid4().hex}"
                    took = measure(marker, _command(kind, marker))
                    if number >= 0:
                        taken[kind, name].append(took)
    _report({contender: values for contender, values in taken.items() if values}, given.runs)


def _report(taken: dict[tuple[str, str], list[float]], runs: int) -> None:
    about = machine()
    print(f"\nSubmit to first line of output, {runs} runs (of Python {runs // 3}), interleaved, warm")
    print(f"{about['cpu']}, {about['cores']} cores, {about['date']}\n")
    rows, result = [], {}
    for (kind, name), values in taken.items():
        middle, worst = median(values), percentile(values, 99)
        rival = taken.get((kind, f"tidemill_{name}")) if name.startswith("ray") else None
        times = f"{middle / median(rival):.1f} x tidemill on ray" if rival else ""
        if name.startswith("tidemill_slurm"):
            times = f"{(middle - median(taken[kind, 'sbatch'])) * 1000:+.0f} ms to sbatch"
        rows.append((f"{kind}: {name}", f"{middle * 1000:.1f} ms", f"{worst * 1000:.1f} ms", times))
        prefix = ("" if kind == "echo" else f"{kind}_") + name.replace(" cli", "").replace(" ", "_")
        result |= {f"{prefix}_p50_s": round(middle, 5), f"{prefix}_p99_s": round(worst, 5)}
    table(("", "median", "p99", ""), rows)
    result |= {"ray_job_p50_s": result["ray_p50_s"]} if "ray_p50_s" in result else {}
    figures: dict[str, Any] = {**result, "runs": runs, "ray": RAY.partition("==")[2], "machine": about}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
