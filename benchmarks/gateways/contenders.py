"""What the gateway is measured beside, each before the same upstream: nginx, vllm-router, sglang-router, LiteLLM."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.clouds import PROGRAMS, free_port
from benchmarks.gateways.asking import until_answers

BENCH: Final = Path(__file__).resolve().parents[2] / ".bench"
ROUTERS: Final = ("vllm-router==0.1.17", "sglang-router==0.3.2")
LITELLM: Final = "litellm[proxy]==1.106.2"


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


@contextlib.contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Contender]:
    """nginx as a reverse proxy that passes streams on as they come.

    It has a folder of its own: what it keeps bodies in is given to its worker's user, and closed to all others.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise FileNotFoundError("nginx is not installed: apt-get install nginx-light")
    port, folder = free_port(), folder / "nginx"
    folder.mkdir(exist_ok=True)
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
        until_answers(port, "", "nginx", folder / "nginx.err", pid=pid)
        yield Contender("nginx", port, "", pid)


@contextlib.contextmanager
def _router(name: str, folder: Path, *command: str, upstream: int, level: str) -> Iterator[Contender]:
    """A router in Rust, round robin: both have the same options."""
    port = free_port()
    options = [
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--host", "127.0.0.1",
        "--port", str(port), "--prometheus-port", str(free_port()), "--log-level", level,
    ]  # fmt: skip
    log = folder / f"{name}.log"
    with started([str(installed("routers", *ROUTERS) / command[0]), *command[1:], *options], log) as pid:
        until_answers(port, "", name, log, pid=pid)
        yield Contender(name, port, "", pid)


def vllm_router(folder: Path, upstream: int) -> contextlib.AbstractContextManager[Contender]:
    """vLLM's router."""
    return _router("vllm_router", folder, "vllm-router", upstream=upstream, level="warning")


def sglang_router(folder: Path, upstream: int) -> contextlib.AbstractContextManager[Contender]:
    """SGLang's router."""
    command = ("python", "-m", "sglang_router.launch_router")
    return _router("sglang_router", folder, *command, upstream=upstream, level="warn")


@contextlib.contextmanager
def litellm(folder: Path, upstream: int) -> Iterator[Contender]:
    """LiteLLM's proxy with a master key, one worker, no database."""
    port, key = free_port(), f"sk-{secrets.token_hex(24)}"
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
        until_answers(port, key, "LiteLLM", folder / "litellm.log", pid=pid)
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
