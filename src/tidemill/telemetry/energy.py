"""Cumulative energy counters of this machine: NVML for devices, RAPL for processors.

A counter that cannot be read is left out, and what it would have measured is estimated and marked so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tidemill.model.events import Sampled
from tidemill.model.ids import NodeId
from tidemill.model.ledger import CPU_METER
from tidemill.telemetry.nvml import Nvml, text_of


class EnergyMeters:
    """Reads all counters of a node. RAPL's counters wrap around; what is returned only grows.

    ``cpu_reason`` says why the processors cannot be measured; empty when they are.
    """

    def __init__(
        self,
        node_id: NodeId,
        *,
        root: Path = Path("/"),
        nvml: Nvml | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._node_id = node_id
        self._nvml = nvml or Nvml()
        self._clock = clock
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        self._packages = [zone for zone in zones if zone.name.count(":") == 1]
        self._last_uj: dict[Path, int] = {}
        self._total_uj = 0
        self.cpu_reason = "this machine shows no RAPL counters" if not self._packages else ""

    def sample(self) -> Sampled | None:
        """All counters that can be read now, in mJ; None when there are none."""
        energy = self._device_counters()
        processors = self._processors_mj()
        if processors is not None:
            energy.append((CPU_METER, processors))
        if not energy:
            return None
        return Sampled(at_ns=self._clock(), node_id=self._node_id, energy_mj=tuple(energy))

    def _device_counters(self) -> list[tuple[str, int]]:
        counters = []
        module = self._nvml.module
        for _, handle in self._nvml.handles():
            try:
                used = int(module.nvmlDeviceGetTotalEnergyConsumption(handle))
                counters.append((text_of(module.nvmlDeviceGetUUID(handle)), used))
            except module.NVMLError:
                continue
        return counters

    def _processors_mj(self) -> int | None:
        for zone in self._packages:
            try:
                now = int((zone / "energy_uj").read_text())
                span = int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError) as error:
                self.cpu_reason = f"RAPL cannot be read ({error.__class__.__name__}: {error})"
                return None
            before = self._last_uj.get(zone, now)
            self._total_uj += now - before if now >= before else now + span - before
            self._last_uj[zone] = now
        if not self._packages:
            return None
        self.cpu_reason = ""
        return self._total_uj // 1000
