"""Cumulative energy counters of this machine: NVML for GPUs, RAPL for processors.

A counter that cannot be read is left out, and says why in ``unavailable``; what it would have measured is then
estimated, and marked so. What is returned for a meter never goes back while this object lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tidemill.model.events import Sampled
from tidemill.model.ids import NodeId
from tidemill.model.ledger import CPU_METER
from tidemill.telemetry.node import node_id, usable_cpu_milli
from tidemill.telemetry.nvml import Gpu, Nvml, the_nvml
from tidemill.units import MILLI, SECOND_NS

_ROOT: Final = Path("/")
_LONGEST_GAP_NS: Final = 60 * SECOND_NS
"""Two samples of power further apart say nothing about the time between them."""


class EnergyMeters:
    """Reads the energy counters of one node. ``cores`` is for tests: how many this process may use."""

    def __init__(
        self,
        node: NodeId | None = None,
        *,
        root: Path = _ROOT,
        nvml: Nvml | None = None,
        clock: Callable[[], int] = time.time_ns,
        cores: int | None = None,
    ) -> None:
        self._node_id = node or node_id(root=root)
        self._root = root
        self._nvml = nvml or the_nvml()
        self._clock = clock
        self._cores = cores
        self._counters: dict[str, _Counter] = {}
        self._powers: dict[str, _Integral] = {}
        self.unavailable: dict[str, str] = {}
        """For each meter that could not be read last time, the reason in a sentence."""

    def sample(self) -> Sampled | None:
        """All counters that can be read now, in mJ, and how busy GPUs are; None when there is none."""
        now = self._clock()
        self.unavailable = {}
        energy = [(gpu.uuid, mj) for gpu in self._nvml.gpus() if (mj := self._gpu_mj(gpu, now)) is not None]
        processors = self._processors_mj()
        if isinstance(processors, str):
            self.unavailable[CPU_METER] = processors
        else:
            energy.append((CPU_METER, processors))
        rates = [(gpu.uuid, self._nvml.ask("nvmlDeviceGetUtilizationRates", gpu.handle)) for gpu in self._nvml.gpus()]
        used = tuple((uuid, min(100, max(0, int(rate.gpu))) * 10) for uuid, rate in rates if rate is not None)
        if not energy and not used:
            return None
        return Sampled(at_ns=now, node_id=self._node_id, energy_mj=tuple(energy), use_milli=used)

    def _gpu_mj(self, gpu: Gpu, now: int) -> int | None:
        counted = self._nvml.ask("nvmlDeviceGetTotalEnergyConsumption", gpu.handle)
        if counted is not None:
            return self._counters.setdefault(gpu.uuid, _Counter()).read(int(counted))
        power = self._nvml.ask("nvmlDeviceGetPowerUsage", gpu.handle)
        if power is not None:
            return self._powers.setdefault(gpu.uuid, _Integral()).read(int(power), now)
        self.unavailable[gpu.uuid] = f"{gpu.name} tells neither its energy nor its power."
        return None

    def _processors_mj(self) -> int | str:
        """The processors' energy so far, or why it cannot be told."""
        packages = _packages(self._root)
        if not packages:
            return "This machine shows no counters of its processors (RAPL)."
        if part := self._part_of_machine():
            return part
        readings = []
        for zone in packages:
            try:
                span = int((zone / "max_energy_range_uj").read_text())
                readings.append((zone, int((zone / "energy_uj").read_text()), span))
            except PermissionError:
                mend = f"sudo chmod a+r {zone / 'energy_uj'}"
                return f"The processors' counters (RAPL) are for root only; {mend} opens them."
            except (OSError, ValueError) as error:
                return f"The processors' counters (RAPL) cannot be read: {error}."
        total_uj = sum(self._counters.setdefault(str(zone), _Counter()).read(uj, span) for zone, uj, span in readings)
        return total_uj // 1000

    def _part_of_machine(self) -> str:
        """Why the counters of whole processors would be too much, when only part of them is ours to use."""
        present = _present_cores(self._root)
        mine = usable_cpu_milli(root=self._root, cores=self._cores)
        if mine < present * MILLI:
            return f"The processors' counters are of all {present} cores, of which {mine / MILLI:g} are for use here."
        return ""


class _Counter:
    """A counter of hardware as one that only grows: it may wrap around at ``span``, or start again from zero."""

    def __init__(self) -> None:
        self._last = 0
        self._total = 0

    def read(self, value: int, span: int = 0) -> int:
        """The total after a reading of ``value``."""
        gone = value - self._last
        self._total += gone if gone >= 0 else gone + span if self._last <= span else value
        self._last = value
        return self._total


class _Integral:
    """Energy from samples of power, each pair of neighbours joined by a straight line."""

    def __init__(self) -> None:
        self._at_ns = 0
        self._power_mw = 0
        self._twice_pj = 0

    def read(self, power_mw: int, now: int) -> int:
        """Energy so far in mJ, with ``power_mw`` drawn now."""
        if self._at_ns and 0 < now - self._at_ns <= _LONGEST_GAP_NS:
            self._twice_pj += (power_mw + self._power_mw) * (now - self._at_ns)
        self._at_ns, self._power_mw = now, power_mw
        return self._twice_pj // (2 * SECOND_NS)


def _packages(root: Path) -> list[Path]:
    """The RAPL zones of whole processors; their parts and the whole machine (``psys``) would count twice."""
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    return [zone for zone in zones if zone.name.count(":") == 1 and _name(zone).startswith("package")]


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _present_cores(root: Path) -> int:
    """How many hardware threads are online in the machine; zero when it does not say."""
    try:
        text = (root / "sys/devices/system/cpu/online").read_text().strip()
        ranges = [part.partition("-") for part in text.split(",") if part]
        return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
    except (OSError, ValueError):
        return 0
