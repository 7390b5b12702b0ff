"""A cloud for measuring: its own home on free ports, gone without a trace afterwards. And the numbers' arithmetic."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True)
class Home:
    """A running cloud: where its files are, where it answers, and its administrator's token."""

    folder: Path
    url: str
    token: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which the command line talks to this cloud."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
        path = f"{PROGRAMS}:{own.get('PATH', '')}"
        return {**own, "PATH": path, "TIDEMILL_HOME": str(self.folder), "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def cloud(**settings: Any) -> Iterator[Home]:
    """A cloud with these settings. Afterwards it is killed with all that it started, and its folder is removed."""
    folder = Path(tempfile.mkdtemp(prefix="tidemill-bench-"))
    given = {"port": free_port(), "gateway_port": free_port()} | settings
    (folder / "config.yaml").write_text(json.dumps(given))
    environment = Home(folder, "", "", 0).environment
    try:
        started = subprocess.run(
            [PROGRAMS / "tidemill", "up"], env=environment, check=False, capture_output=True, text=True
        )
        if started.returncode:
            raise RuntimeError(f"the cloud does not start: {started.stderr}")
        endpoint = json.loads((folder / "endpoint.json").read_text())
        token = (folder / "admin.token").read_text().strip()
        yield Home(folder, endpoint["api_url"], token, int(endpoint["pid"]))
    except Exception:
        with contextlib.suppress(OSError):
            print("\n".join((folder / "control.log").read_text().splitlines()[-40:]), file=sys.stderr)
        raise
    finally:
        kill_all_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does, so that nothing it started is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def kill_all_of(folder: Path) -> None:
    """End every process that was started for this home: the daemon, the launcher, runners and workers."""
    for _ in range(3):
        found = [process for process in psutil.process_iter() if _belongs(process, folder)]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, timeout=5)
        if not found:
            return


def _belongs(process: psutil.Process, folder: Path) -> bool:
    name = str(folder)
    with contextlib.suppress(psutil.Error):
        if process.pid == os.getpid():
            return False
        if any(name in word for word in process.cmdline()):
            return True
        own = process.environ()
        return any(name in own.get(key, "") for key in ("TIDEMILL_HOME", "TIDEMILL_OUTPUT_DIR", "HOME"))
    return False


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: an observed value, never one in between."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows) if any(headings) else rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def machine() -> dict[str, Any]:
    """Where and when this is measured."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1024**3),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
