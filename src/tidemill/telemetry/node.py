"""This machine as a node: what jobs may have of it, and how busy it is."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from tidemill import catalog
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.telemetry.nvml import Nvml, text_of
from tidemill.units import MILLI

_UNLIMITED = 1 << 60
_UNKNOWN_DEVICE_MW = (20_000, 250_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStats:
    """How busy a device is: percent, bytes, milliwatts, degrees Celsius; None where it does not say."""

    id: str
    model: str
    utilization: int | None
    memory_used: int | None
    memory_total: int
    power_mw: int | None
    temperature_c: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStats:
    """How busy this machine is."""

    cpu_percent: float
    memory_used: int
    memory_total: int
    devices: tuple[DeviceStats, ...]


def discover_node(site_id: SiteId, *, name: str = "", root: Path = Path("/"), nvml: Nvml | None = None) -> Node:
    """This machine. Its id stays the same across restarts; sizes are what processes here may really use."""
    host = name or socket.gethostname()
    idle_mw, busy_mw = catalog.cpu_power()
    disk = shutil.disk_usage(root)
    return Node(
        id=NodeId(f"node_{hashlib.sha256(_machine_id(root, host).encode()).hexdigest()[:12]}"),
        site_id=site_id,
        name=host,
        state=NodeState.READY,
        version=1,
        boot_id=_read(root / "proc/sys/kernel/random/boot_id"),
        address="127.0.0.1",
        cpu_milli=_usable_cpu_milli(root),
        memory_bytes=_usable_memory(root),
        disk_bytes=disk.total,
        cpu_model=_cpu_model(root),
        cpu_idle_mw=idle_mw,
        cpu_busy_mw=busy_mw,
        images=any(shutil.which(program) for program in ("podman", "docker")),
        devices=_devices(nvml or Nvml()),
    )


def why_no_gpu(nvml: Nvml | None = None) -> str:
    """Why this machine has no GPUs for jobs; empty when it has some."""
    asked = nvml or Nvml()
    return "" if list(asked.handles()) else asked.reason or "the driver's devices do not answer"


def node_stats(nvml: Nvml | None = None) -> NodeStats:
    """How busy this machine is now; processor use is that since the last call."""
    memory = psutil.virtual_memory()
    return NodeStats(
        cpu_percent=psutil.cpu_percent(),
        memory_used=memory.total - memory.available,
        memory_total=memory.total,
        devices=tuple(_stats(asked, handle) for asked in [nvml or Nvml()] for _, handle in asked.handles()),
    )


def _devices(nvml: Nvml) -> tuple[Device, ...]:
    found = []
    for index, handle in nvml.handles():
        name = text_of(nvml.module.nvmlDeviceGetName(handle))
        memory = int(nvml.module.nvmlDeviceGetMemoryInfo(handle).total)
        spec = catalog.match_device(name, memory)
        idle_mw, busy_mw = (spec.idle_mw, spec.busy_mw) if spec else _UNKNOWN_DEVICE_MW
        found.append(
            Device(
                id=DeviceId(text_of(nvml.module.nvmlDeviceGetUUID(handle))),
                index=index,
                model=spec.model if spec else name.removeprefix("NVIDIA ").replace(" ", "-"),
                reported=name,
                memory_bytes=spec.memory_bytes if spec else memory,
                idle_mw=idle_mw,
                busy_mw=busy_mw,
            )
        )
    return tuple(found)


def _stats(nvml: Nvml, handle: object) -> DeviceStats:
    module = nvml.module
    name = text_of(module.nvmlDeviceGetName(handle))
    total = int(module.nvmlDeviceGetMemoryInfo(handle).total)
    spec = catalog.match_device(name, total)

    def ask(function: str, *arguments: object) -> object | None:
        try:
            answer: object = getattr(module, function)(handle, *arguments)
            return answer
        except module.NVMLError:
            return None

    rates, memory = ask("nvmlDeviceGetUtilizationRates"), ask("nvmlDeviceGetMemoryInfo")
    power, heat = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetTemperature", 0)
    return DeviceStats(
        id=text_of(module.nvmlDeviceGetUUID(handle)),
        model=spec.model if spec else name,
        utilization=int(getattr(rates, "gpu", 0)) if rates is not None else None,
        memory_used=int(getattr(memory, "used", 0)) if memory is not None else None,
        memory_total=total,
        power_mw=int(str(power)) if power is not None else None,
        temperature_c=int(str(heat)) if heat is not None else None,
    )


def _usable_cpu_milli(root: Path) -> int:
    """Cores this process may run on, less what a cgroup's quota takes away."""
    cores = len(os.sched_getaffinity(0)) * MILLI
    quota = _UNLIMITED
    if (limit := _read(root / "sys/fs/cgroup/cpu.max").split())[:1] not in ([], ["max"]):
        quota = int(limit[0]) * MILLI // int(limit[1])
    elif (micros := _number(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")) > 0:
        quota = micros * MILLI // max(_number(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us"), 1)
    return max(100, min(cores, quota))


def _usable_memory(root: Path) -> int:
    files = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits = [limit for name in files if (limit := _number(root / name)) > 0]
    return min([int(psutil.virtual_memory().total), *limits])


def _cpu_model(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def _machine_id(root: Path, host: str) -> str:
    return f"{_read(root / 'etc/machine-id')}/{host}"


def _number(path: Path) -> int:
    text = _read(path)
    return int(text) if text.lstrip("-").isdigit() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
