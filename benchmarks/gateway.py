"""What the gateway costs, beside nginx, vllm-router, sglang-router and LiteLLM: the same upstream, load and cores.

Every contender is one worker on one core; the load and the upstream (``upstream.py``) have the other. ``cpu``: wrk with
32 connections asks in a closed loop, whole answers and streams of 20 events; what counts is user and system time of the
contender's processes for 1,000 requests, the median of the rounds, in which contenders take turns. ``paced``: 256
streams with 50 ms between events; what a contender adds to the time to the first token and to the gaps. ``gone``: a
client goes away while its request waits in line, before the first byte, in a stream, and under a whole answer; how long
until the upstream's connection is closed.

Tidemill's gateway is that of a cloud, with all it does: keys, metering, routing, circuits; its upstream is a service of
that cloud. vllm-router, sglang-router and LiteLLM are installed into ``.bench/`` on first use; nginx and wrk are
Debian's. The last line is JSON; null is what was not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil
import uvloop

from benchmarks.clouds import (
    PROGRAMS,
    cloud,
    end_on_signals,
    free_port,
    kill_all_of,
    machine,
    median,
    percentile,
    table,
)

BENCH: Final = Path(__file__).resolve().parents[1] / ".bench"
ROUTERS: Final = ("vllm-router==0.1.17", "sglang-router==0.3.2")
LITELLM: Final = "litellm[proxy]==1.106.2"
_UPSTREAM: Final = Path(__file__).resolve().with_name("upstream.py")
_TEXT: Final = "The tide comes in and the mill wheel turns; when it goes out the wheel turns again. " * 5
_READY_S: Final = 90.0
_REQUEST_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that stands before the upstream: where it answers, to which key, and its processes."""

    name: str
    port: int
    key: str
    pid: int

    def cpu_s(self) -> float:
        """User and system time of its processes so far."""
        if not self.pid:
            return 0.0
        top = psutil.Process(self.pid)
        times = [each.cpu_times() for each in (top, *top.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def pin(self, core: int) -> None:
        """Keep all its threads on one core."""
        if self.pid:
            top = psutil.Process(self.pid)
            for each in (top, *top.children(recursive=True)):
                for thread in each.threads():
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(thread.id, {core})


# ------------------------------------------------------------------ contenders


@contextlib.contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[int]:
    """A process of its own group, ended with all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until_answers(port: int, key: str, what: str, log: Path | None = None) -> None:
    """Return once a request is answered. Raises: RuntimeError when that takes long."""
    until_s = time.monotonic() + _READY_S
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            if asyncio.run(ask(port, key, _body())) == 200:
                return
        if time.monotonic() > until_s:
            raise RuntimeError(f"{what} does not answer: {log.read_text()[-2000:] if log else ''}")
        time.sleep(0.2)


@contextlib.contextmanager
def tidemill(folder: Path) -> Iterator[tuple[Contender, Contender, Path]]:
    """The gateway of a cloud, its service's replica, which is everybody's upstream, and what that one noted as gone."""
    with cloud() as home:
        spec = {
            "name": "mock", "kind": "service", "workdir": str(_UPSTREAM.parent), "ports": [{"name": "http"}],
            "run": "exec python3 upstream.py --port $PORT --gone $TIDEMILL_OUTPUT_DIR/gone",
            "env": {"packages": [f"uvloop=={uvloop.__version__}"]},
            "resources": {"gpus": "none", "cpus": 0.1, "memory": "256MB"}, "service": {"port": "http"},
        }  # fmt: skip
        file = folder / "mock.json"
        file.write_text(json.dumps(spec))
        command = [str(PROGRAMS / "tidemill"), "run", "-d", str(file)]
        done = subprocess.run(command, env=home.environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the service is not taken: {done.stderr}")
        gateway = next(each for each in psutil.process_iter() if _is_gateway(each, home.folder))
        port = int(json.loads((home.folder / "endpoint.json").read_text())["gateway_url"].rsplit(":", 1)[1])
        until_answers(port, home.token, "Tidemill's gateway")
        upstream = next(each for each in psutil.process_iter() if _is_upstream(each, home.folder))
        listens = int(upstream.cmdline()[upstream.cmdline().index("--port") + 1])
        gone = next(home.folder.glob("local/volumes/*/*/output/gone"))
        yield (
            Contender("tidemill", port, home.token, gateway.pid),
            Contender("upstream", listens, "", upstream.pid),
            gone,
        )


def _is_gateway(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "tidemill.gateway" in words and any(str(folder) in word for word in words)
    return False


def _is_upstream(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        is_it = _UPSTREAM.name in words and "python" in words[0]
        return is_it and process.environ().get("TIDEMILL_OUTPUT_DIR", "").startswith(str(folder))
    return False


@contextlib.contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Contender]:
    """nginx as a reverse proxy that passes streams on as they come."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise FileNotFoundError("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    (folder / "nginx.conf").write_text(f"""
        daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
        events {{ worker_connections 4096; }}
        http {{
            access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
            fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
            keepalive_requests 10000000;
            upstream mock {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 10000000; }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                location / {{
                    proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_buffering off;
                }}
            }}
        }}
    """)
    with started([program, "-e", f"{folder}/nginx.err", "-c", f"{folder}/nginx.conf"], folder / "nginx.log") as pid:
        until_answers(port, "", "nginx", folder / "nginx.err")
        yield Contender("nginx", port, "", pid)


@contextlib.contextmanager
def vllm_router(folder: Path, upstream: int) -> Iterator[Contender]:
    """vLLM's router, round robin."""
    port = free_port()
    command = [
        str(installed("routers", *ROUTERS) / "vllm-router"), "--worker-urls", f"http://127.0.0.1:{upstream}",
        "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()),
        "--log-level", "warning",
    ]  # fmt: skip
    with started(command, folder / "vllm.log") as pid:
        until_answers(port, "", "vllm-router", folder / "vllm.log")
        yield Contender("vllm_router", port, "", pid)


@contextlib.contextmanager
def sglang_router(folder: Path, upstream: int) -> Iterator[Contender]:
    """SGLang's router, round robin."""
    port = free_port()
    command = [
        str(installed("routers", *ROUTERS) / "python"), "-m", "sglang_router.launch_router", "--worker-urls",
        f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-port", str(free_port()), "--log-level", "warn",
    ]  # fmt: skip
    with started(command, folder / "sglang.log") as pid:
        until_answers(port, "", "sglang-router", folder / "sglang.log")
        yield Contender("sglang_router", port, "", pid)


@contextlib.contextmanager
def litellm(folder: Path, upstream: int) -> Iterator[Contender]:
    """LiteLLM's proxy with a master key, one worker, no database."""
    port, key = free_port(), "sk-1234"
    (folder / "litellm.yaml").write_text(json.dumps({
        "model_list": [{"model_name": "mock", "litellm_params": {
            "model": "openai/mock", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}}],
        "general_settings": {"master_key": key},
    }))  # fmt: skip
    command = [
        str(installed("litellm", LITELLM) / "litellm"), "--config", str(folder / "litellm.yaml"),
        "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False",
    ]  # fmt: skip
    with started(command, folder / "litellm.log", LITELLM_LOG="ERROR", LITELLM_LOCAL_MODEL_COST_MAP="True") as pid:
        until_answers(port, key, "LiteLLM", folder / "litellm.log")
        yield Contender("litellm", port, key, pid)


def installed(name: str, *what: str) -> Path:
    """The programs of an environment in ``.bench``, made on first use."""
    programs = BENCH / name / "bin"
    if not (BENCH / name / "ready").exists():
        print(f"installing {', '.join(what)} into {BENCH / name}", file=sys.stderr)
        uv = str(PROGRAMS / "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", str(BENCH / name)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(programs / "python"), *what], check=True)
        (BENCH / name / "ready").touch()
    return programs


RIVALS: Final[dict[str, Callable[[Path, int], contextlib.AbstractContextManager[Contender]]]] = {
    "nginx": nginx, "vllm_router": vllm_router, "sglang_router": sglang_router, "litellm": litellm,
}  # fmt: skip


# ------------------------------------------------------------------ asking


def _body(*, stream: bool = False, pause_ms: int = 0) -> bytes:
    content: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": _TEXT}], "max_tokens": 64}
    if stream:
        content["stream"] = True
    if pause_ms:
        content["seed"] = pause_ms
    return json.dumps(content).encode()


def _request(port: int, key: str, body: bytes) -> bytes:
    bearer = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{bearer}Content-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def ask(port: int, key: str, body: bytes) -> int:
    """The status of one answer, which is read to its end."""
    async with asyncio.timeout(_REQUEST_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_request(port, key, body))
            head = await reader.readuntil(b"\r\n\r\n")
            if (length := re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)) is not None:
                await reader.readexactly(int(length[1]))
            else:
                await reader.readuntil(b"0\r\n\r\n")
            return int(head.split(b" ", 2)[1])
        finally:
            writer.close()


# ------------------------------------------------------------------ CPU


_LUA: Final = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
KEY
wrk.body = [==[BODY]==]
"""


def load(contender: Contender, folder: Path, *, stream: bool, seconds: float, connections: int) -> tuple[int, float]:
    """How many requests were answered well, and the contender's CPU meanwhile (s). Raises: RuntimeError."""
    key = f'wrk.headers["Authorization"] = "Bearer {contender.key}"' if contender.key else ""
    script = folder / "load.lua"
    script.write_text(_LUA.replace("KEY", key).replace("BODY", _body(stream=stream).decode()))
    before = contender.cpu_s()
    command = [
        "taskset", "-c", "0", "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s",
        "-s", str(script), f"http://127.0.0.1:{contender.port}",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used = contender.cpu_s() - before
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)", done.stdout)
    if bad:
        raise RuntimeError(f"{contender.name}: {bad[0]}")
    requests = re.search(r"(\d+) requests in", done.stdout)
    if requests is None or not int(requests[1]):
        raise RuntimeError(f"{contender.name} answered nothing: {done.stdout}")
    return int(requests[1]), used


def measure_cpu(contenders: list[Contender], folder: Path, *, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """By contender: CPU seconds for 1,000 requests, ``whole`` and ``stream``, each round's."""
    found: dict[str, dict[str, Any]] = {each.name: {"whole": [], "stream": [], "rps": []} for each in contenders}
    for _ in range(rounds):
        for stream in (False, True):
            for each in contenders:
                each.pin(1)
                for_s = seconds if each.name != "litellm" else 2 * seconds
                requests, used = load(each, folder, stream=stream, seconds=for_s, connections=32)
                found[each.name]["stream" if stream else "whole"].append(1000 * used / requests)
                if not stream:
                    found[each.name]["rps"].append(requests / for_s)
    return found


# ------------------------------------------------------------------ paced streams


async def _paced(contender: Contender, streams: int, rounds: int) -> tuple[list[float], list[float]]:
    """Times to the first event and gaps between events (ms) of so many streams at once, again and again."""
    first: list[float] = []
    gaps: list[float] = []
    request = _request(contender.port, contender.key, _body(stream=True, pause_ms=50))

    async def one(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
        for _ in range(rounds):
            began = time.perf_counter()
            writer.write(request)
            last = 0.0
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                data = await reader.read(65536)
                if not data:
                    raise RuntimeError(f"{contender.name} broke off a stream")
                now = time.perf_counter()
                if b"tide" in data:
                    if last:
                        gaps.append(1000 * (now - last))
                    else:
                        first.append(1000 * (now - began))
                    last = now
                tail = (tail + data)[-16:]
        writer.close()

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(one(number * 1.0 / streams))
    return first, gaps


def measure_paced(contenders: list[Contender], *, streams: int, rounds: int) -> dict[str, dict[str, float]]:
    """By contender: time to the first token and gap between events (ms), p50 and p99."""
    found = {}
    for each in contenders:
        each.pin(1)
        first, gaps = uvloop.run(_paced(each, streams, rounds))
        found[each.name] = {
            "ttft_p50": percentile(first, 50), "ttft_p99": percentile(first, 99),
            "gap_p50": percentile(gaps, 50), "gap_p99": percentile(gaps, 99), "streams": len(first),
        }  # fmt: skip
    return found


# ------------------------------------------------------------------ clients that go away

PHASES: Final = ("before the first byte", "in a stream", "whole answer")


async def _leave(contender: Contender, phase: str, number: int) -> tuple[str, int]:
    """The request's id, and when its client closed (ns)."""
    name = f"leave-{phase.split()[0]}-{number}"
    body = _body(stream=phase != "whole answer", pause_ms=50 if phase == "in a stream" else 400)
    if phase == "before the first byte":
        body = _body(pause_ms=2000)
    head, _, rest = _request(contender.port, contender.key, body).partition(b"\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
    writer.write(head + b"\r\nX-Request-Id: %b\r\n" % name.encode() + rest)
    if phase == "in a stream":
        await reader.readuntil(b"tide")
    await asyncio.sleep(0.03 + (number % 7) * 0.01)
    writer.transport.abort()
    return name, time.monotonic_ns()


async def _leave_all(contender: Contender, trials: int) -> dict[str, tuple[str, int]]:
    left: dict[str, tuple[str, int]] = {}
    for phase in PHASES:
        for start in range(0, trials, 16):
            numbers = range(start, min(start + 16, trials))
            for name, at in await asyncio.gather(*(_leave(contender, phase, number) for number in numbers)):
                left[name] = (phase, at)
    return left


def measure_gone(contender: Contender, trials: int, gone: Path) -> dict[str, list[float]]:
    """By phase: ms from a client's going away to the upstream's knowing. Raises: RuntimeError when one never knew."""
    gone.write_text("")
    left = uvloop.run(_leave_all(contender, trials))
    time.sleep(2.5)
    seen = dict(line.split() for line in gone.read_text().splitlines() if line.startswith("leave-"))
    missing = sorted(left.keys() - seen.keys())
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(left)} were answered to nobody: {missing[:5]}")
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for name, (phase, at) in left.items():
        found[phase].append((int(seen[name]) - at) / 1e6)
    return found


# ------------------------------------------------------------------ all of it


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, each")
    parser.add_argument("--streams", type=int, default=256, help="paced ones at once")
    parser.add_argument("--trials", type=int, default=334, help="clients that go away, in each phase")
    parser.add_argument("--only", default="cpu,paced,gone")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    given = parser.parse_args()
    end_on_signals()
    for program, package in (("wrk", "wrk"), ("taskset", "util-linux")):
        if shutil.which(program) is None:
            sys.exit(f"{program} is needed: apt-get install {package}")
    print(json.dumps(machine()))
    os.sched_setaffinity(0, {0})
    folder = Path(tempfile.mkdtemp(prefix="tidemill-bench-gateway-"))
    result: dict[str, Any] = {}
    try:
        with contextlib.ExitStack() as stack:
            ours, upstream, gone = stack.enter_context(tidemill(folder))
            direct = Contender("direct", upstream.port, "", 0)
            upstream.pin(0)
            contenders = [ours]
            for name in filter(None, given.rivals.split(",")):
                try:
                    contenders.append(stack.enter_context(RIVALS[name](folder, upstream.port)))
                except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{name}: {error}", file=sys.stderr)
            wanted = given.only.split(",")
            if "cpu" in wanted:
                result |= _told_cpu(measure_cpu(contenders, folder, rounds=given.rounds, seconds=given.seconds))
            if "paced" in wanted:
                quick = [direct, *(each for each in contenders if each.name != "litellm")]
                result |= _told_paced(measure_paced(quick, streams=given.streams, rounds=6))
            if "gone" in wanted:
                result |= _told_gone(measure_gone(ours, given.trials, gone))
    finally:
        kill_all_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


def _told_cpu(found: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    rows, told = [], {}
    mine = found["tidemill"]
    for name, each in found.items():
        whole, stream = median(each["whole"]), median(each["stream"])
        prefix = "" if name == "tidemill" else f"{name}_"
        told |= {f"{prefix}cpu_s_per_1k": round(whole, 4), f"{prefix}stream_cpu_s_per_1k": round(stream, 4)}
        ratios = (f"{whole / median(mine['whole']):.2f}", f"{stream / median(mine['stream']):.2f}")
        least = (f"{min(each['whole']):.3f}", f"{min(each['stream']):.3f}")
        rows.append((name, f"{whole:.3f}", least[0], ratios[0], f"{stream:.3f}", least[1], ratios[1],
                     f"{median(each['rps']):,.0f}"))  # fmt: skip
    print("\nCPU s for 1,000 requests, 32 connections (median, least, beside ours)")
    table(("", "whole", "least", "ratio", "stream", "least", "ratio", "requests/s"), rows)
    missing = {f"{name}_{kind}": None for name in RIVALS for kind in ("cpu_s_per_1k", "stream_cpu_s_per_1k")}
    return missing | told


def _told_paced(found: dict[str, dict[str, float]]) -> dict[str, float]:
    direct, rows = found["direct"], []
    for name, each in found.items():
        added = [each[key] - direct[key] for key in ("ttft_p50", "ttft_p99", "gap_p99")]
        rows.append((name, *(f"{each[key]:.2f}" for key in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99")),
                     *(f"{value:+.2f}" for value in added), f"{each['streams']:,.0f}"))  # fmt: skip
    print("\nPaced streams, ms")
    table(("", "ttft p50", "p99", "gap p50", "p99", "+ttft p50", "p99", "+gap p99", "streams"), rows)
    ours = found["tidemill"]
    return {
        "added_ttft_p50_ms": round(ours["ttft_p50"] - direct["ttft_p50"], 2),
        "added_ttft_p99_ms": round(ours["ttft_p99"] - direct["ttft_p99"], 2),
        "added_gap_p99_ms": round(ours["gap_p99"] - direct["gap_p99"], 2),
    }


def _told_gone(found: dict[str, list[float]]) -> dict[str, float]:
    print("\nFrom a client's going away to the upstream's knowing, ms")
    table(("", "p50", "p99", "most", "trials"), [
        (phase, f"{median(each):.1f}", f"{percentile(each, 99):.1f}", f"{max(each):.1f}", str(len(each)))
        for phase, each in found.items()
    ])  # fmt: skip
    return {"gone_p99_ms": round(max(percentile(each, 99) for each in found.values()), 1)}


if __name__ == "__main__":
    main()
