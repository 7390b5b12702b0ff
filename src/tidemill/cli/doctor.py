"""``tidemill doctor``: what this machine offers to jobs, and how to get the rest. Works without a control plane."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tidemill import __version__
from tidemill.cli.output import count, emit, paint, say
from tidemill.cli.parsing import Json
from tidemill.errors import TidemillError
from tidemill.sdk import connection
from tidemill.units import format_size

LEAST_FREE_BYTES = 5 * 1024**3
_MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "broken": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``broken`` keeps Tidemill from working, ``note`` costs something only."""

    name: str
    verdict: Literal["ok", "note", "broken"]
    detail: str
    mend: str = ""


def doctor_command(json: Json = False) -> int:
    """What this machine offers, and how to get the rest. Fails only when something needed is broken."""
    findings: list[Finding] = []
    for look in (_python, _uv, _devices, _isolation, _energy, _home, _disk, _control_plane):
        try:
            findings.extend(look())
        except (TidemillError, OSError, ImportError, ValueError, AttributeError) as error:
            findings.append(Finding(look.__name__.strip("_"), "note", f"could not be looked at: {error}"))
    broken = sum(finding.verdict == "broken" for finding in findings)
    if json:
        emit({"healthy": not broken, "findings": [asdict(finding) for finding in findings]})
        return 1 if broken else 0
    left = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, colour = _MARKS[finding.verdict]
        say(f"{paint(mark, colour)} {finding.name.ljust(left)}  {finding.detail}")
        if finding.mend:
            say(f"  {' ' * left}  {paint(finding.mend, 'muted')}")
    notes = sum(finding.verdict == "note" for finding in findings)
    say()
    if broken:
        say(paint(f"{count(broken, 'thing')} to mend before Tidemill works here", "red"))
    else:
        say("all that is needed is here" + (f"; {count(notes, 'thing')} could be better" if notes else ""))
    return 1 if broken else 0


Look = Callable[[], Iterator[Finding]]


def _python() -> Iterator[Finding]:
    version = f"Tidemill {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    yield Finding("tidemill", "ok" if sys.platform == "linux" else "note", version)


def _uv() -> Iterator[Finding]:
    found = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if found:
        yield Finding("uv", "ok", found)
    else:
        yield Finding("uv", "broken", "not found; it builds the environments of jobs", "pip install uv")


def _devices() -> Iterator[Finding]:
    from tidemill import telemetry
    from tidemill.model.ids import SiteId

    node = telemetry.discover_node(SiteId("local"))
    size = f"{node.cpu_milli / 1000:g} cores, {format_size(node.memory_bytes)}"
    yield Finding("machine", "ok", f"{node.name}: {node.cpu_model or 'unknown processor'}, {size}")
    if node.devices:
        listed = ", ".join(f"{device.model} {format_size(device.memory_bytes)}" for device in node.devices)
        yield Finding("GPUs", "ok", listed)
    else:
        yield Finding(
            "GPUs",
            "note",
            "no GPU found: jobs run on CPU slots",
            "If there is one: is its driver loaded? nvidia-smi has to list it.",
        )


def _isolation() -> Iterator[Finding]:
    from tidemill.runner.images import find_runtime
    from tidemill.runner.sandbox import probe_isolation

    containers = find_runtime().support
    detail = containers.detail or "images of jobs can be run"
    yield Finding("containers", "ok" if containers.works else "note", detail, containers.mend)
    for support in probe_isolation().supports:
        detail = (
            "limits of memory, CPU and processes hold" if support.name == "cgroup" and support.works else support.detail
        )
        yield Finding(support.name, "ok" if support.works else "note", detail, support.mend)


def _energy() -> Iterator[Finding]:
    counters = list(Path("/sys/class/powercap").glob("*/energy_uj"))
    readable = [path for path in counters if os.access(path, os.R_OK)]
    if readable:
        yield Finding("energy", "ok", "measured by the processor's counters (RAPL)")
    elif counters:
        yield Finding(
            "energy",
            "note",
            "estimated from time and load: the processor's counters are for root only",
            "sudo chmod a+r /sys/class/powercap/*/energy_uj",
        )
    else:
        yield Finding("energy", "note", "estimated from time and load: this machine shows no energy counters")


def _home() -> Iterator[Finding]:
    home = connection.home()
    near = next((folder for folder in (home, *home.parents) if folder.exists()), Path("/"))
    if os.access(near, os.W_OK):
        yield Finding("home", "ok", f"{home}" + ("" if home.exists() else " (made by the first tidemill up)"))
    else:
        yield Finding("home", "broken", f"{near} cannot be written", f"Choose another: {connection.HOME_VARIABLE}=…")


def _disk() -> Iterator[Finding]:
    home = connection.home()
    near = next((folder for folder in (home, *home.parents) if folder.exists()), Path("/"))
    free = shutil.disk_usage(near).free
    scarce = free < LEAST_FREE_BYTES
    mend = "Environments, logs and models go there." if scarce else ""
    yield Finding("disk", "note" if scarce else "ok", f"{format_size(free)} free under {near}", mend)


def _control_plane() -> Iterator[Finding]:
    from tidemill.sdk.client import Client

    if connection.endpoint(connection.home()) is None and not os.environ.get(connection.URL_VARIABLE):
        yield Finding("cloud", "ok", "not running; tidemill up starts it")
        return
    try:
        with Client(retry_for_s=1) as client:
            status = client.status()
    except TidemillError as error:
        yield Finding("cloud", "broken", error.detail, error.mend)
    else:
        yield Finding("cloud", "ok", f"{client.url}, version {status.version}")
        if status.strangers:
            detail = (
                f"{status.strangers} on the engine that the database has never heard of (an old backup was restored)"
            )
            yield Finding(
                "strangers", "note", detail, "tidemill strangers list shows them, tidemill strangers end ends them"
            )
