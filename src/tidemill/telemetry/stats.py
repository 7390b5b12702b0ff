"""How busy this machine and its GPUs are right now, for people to look at."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from tidemill import catalog
from tidemill.telemetry.nvml import Gpu, Nvml, the_nvml

_CORE_TEMPERATURE = 0
"""NVML_TEMPERATURE_GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStats:
    """How busy one GPU is: percent, bytes, milliwatts, degrees Celsius; None where it does not say."""

    id: str
    index: int
    model: str
    utilization: int | None
    memory_used: int | None
    memory_total: int
    power_mw: int | None
    temperature_c: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStats:
    """How busy the machine is: percent of all cores since the last look, runnable processes, bytes."""

    cpu_percent: float
    load_1m: float
    memory_used: int
    memory_total: int
    devices: tuple[DeviceStats, ...]


def node_stats(nvml: Nvml | None = None) -> NodeStats:
    """How busy this machine is now."""
    memory = psutil.virtual_memory()
    return NodeStats(
        cpu_percent=psutil.cpu_percent(),
        load_1m=os.getloadavg()[0],
        memory_used=memory.total - memory.available,
        memory_total=memory.total,
        devices=device_stats(nvml),
    )


def device_stats(nvml: Nvml | None = None) -> tuple[DeviceStats, ...]:
    """How busy each GPU is now, in the driver's order."""
    library = nvml or the_nvml()
    return tuple(_stats(library, gpu) for gpu in library.gpus())


def _stats(library: Nvml, gpu: Gpu) -> DeviceStats:
    rates = library.ask("nvmlDeviceGetUtilizationRates", gpu.handle)
    memory = library.ask("nvmlDeviceGetMemoryInfo", gpu.handle)
    spec = catalog.match_device(gpu.name, gpu.memory_bytes)
    return DeviceStats(
        id=gpu.uuid,
        index=gpu.index,
        model=spec.model if spec else gpu.name,
        utilization=None if rates is None else int(rates.gpu),
        memory_used=None if memory is None else int(memory.used),
        memory_total=gpu.memory_bytes,
        power_mw=library.ask("nvmlDeviceGetPowerUsage", gpu.handle),
        temperature_c=library.ask("nvmlDeviceGetTemperature", gpu.handle, _CORE_TEMPERATURE),
    )
