"""Which GPUs of this machine fail, from what their driver says of them.

A GPU fails when the driver tells of a critical error (an XID) that no program of a user can cause by itself, when it
counted memory errors that it could not correct, when rows of its memory wait to be replaced or could not be, or when
heat slowed it for longer than it should. After a while without any of that it is well again; each time that it failed
before makes that while twice as long, up to 64 times.

Sources: NVIDIA, "XID Errors" (which codes come from applications) and the list of those that NVIDIA's device plugin for
Kubernetes passes over; NVIDIA, "GPU Memory Error Management" (row remapping).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from tidemill.model.events import DeviceFailed, DeviceRecovered
from tidemill.model.ids import DeviceId, NodeId
from tidemill.telemetry.node import node_id
from tidemill.telemetry.nvml import Gpu, Nvml, the_nvml
from tidemill.units import MINUTE_NS, format_duration

_FROM_PROGRAMS: Final = frozenset({13, 31, 43, 45, 68, 109})
"""Critical errors that a faulty program brings about on a sound GPU."""
_UNCORRECTED, _VOLATILE = 1, 0
"""NVML_MEMORY_ERROR_TYPE_UNCORRECTED; NVML_VOLATILE_ECC, since the driver was loaded."""
_HOT: Final = 0x20 | 0x40
"""nvmlClocksEventReasonSwThermalSlowdown, nvmlClocksEventReasonHwThermalSlowdown."""
_MOST_DOUBLINGS: Final = 6


@dataclass(slots=True)
class _Health:
    """What is known of one GPU. Instants are ns; zero: never, or not now."""

    uncorrected: int = 0
    """Memory errors that were told of already."""
    hot_since_ns: int = 0
    bad_ns: int = 0
    """When there was last something wrong with it."""
    is_failing: bool = False
    failures: int = 0


class HealthWatcher:
    """Watches the GPUs of one node. ``recheck_ns`` is how long a failing one has to be without fault to be well again,
    ``hot_ns`` how long heat may slow one before it fails."""

    def __init__(
        self,
        node: NodeId | None = None,
        *,
        nvml: Nvml | None = None,
        recheck_ns: int = 10 * MINUTE_NS,
        hot_ns: int = 2 * MINUTE_NS,
        known: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """``known`` is what an earlier one of this machine knew."""
        self._node_id = node or node_id()
        self._nvml = nvml or the_nvml()
        self._recheck_ns = recheck_ns
        self._hot_ns = hot_ns
        self._known: dict[str, _Health] = {}
        for uuid, told in (known or {}).items():
            health = self._known[uuid] = _Health()
            for name in _Health.__slots__:
                setattr(health, name, int(told.get(name, 0)))
            health.is_failing = bool(health.is_failing)

    @property
    def known(self) -> dict[str, dict[str, int]]:
        """What it knows of each GPU, for one that goes on where it was."""
        return {uuid: {name: int(value) for name, value in asdict(one).items()} for uuid, one in self._known.items()}

    def health_facts(self, now: int) -> list[DeviceFailed | DeviceRecovered]:
        """What changed since this was last asked: each fault once, and that a GPU is well again once."""
        gpus = self._nvml.gpus()
        errors: dict[str, list[int]] = {}
        for alarm in self._nvml.alarms(gpus):
            if alarm.xid not in _FROM_PROGRAMS:
                errors.setdefault(alarm.uuid, []).append(alarm.xid)
        facts: list[DeviceFailed | DeviceRecovered] = []
        for gpu in gpus:
            health = self._known.setdefault(gpu.uuid, _Health())
            fresh, lasting = self._faults(gpu, health, errors.get(gpu.uuid, ()), now)
            device = DeviceId(gpu.uuid)
            if fresh or lasting:
                health.bad_ns = now
            if fresh or (lasting and not health.is_failing):
                health.failures += not health.is_failing
                health.is_failing = True
                detail = "; ".join([*fresh, *lasting])
                facts.append(DeviceFailed(at_ns=now, node_id=self._node_id, device_id=device, detail=detail))
            elif health.is_failing and now - health.bad_ns >= self._patience(health):
                health.is_failing = False
                facts.append(DeviceRecovered(at_ns=now, node_id=self._node_id, device_id=device))
        return facts

    def _faults(self, gpu: Gpu, health: _Health, errors: Sequence[int], now: int) -> tuple[list[str], list[str]]:
        """Sentences about what happened since the last look, and about what is wrong as long as it is."""
        fresh = [f"XID {xid}" for xid in dict.fromkeys(errors)]
        counted = self._nvml.ask("nvmlDeviceGetTotalEccErrors", gpu.handle, _UNCORRECTED, _VOLATILE)
        if counted is not None:
            if counted > health.uncorrected:
                fresh.append(f"{counted - health.uncorrected} memory errors could not be corrected")
            health.uncorrected = counted
        lasting = []
        rows = self._nvml.ask("nvmlDeviceGetRemappedRows", gpu.handle)
        if rows is not None and rows[3]:
            lasting.append("rows of its memory could not be replaced")
        elif rows is not None and rows[2]:
            lasting.append("rows of its memory are replaced at the next reset")
        reasons = self._nvml.ask("nvmlDeviceGetCurrentClocksEventReasons", gpu.handle) or 0
        health.hot_since_ns = (health.hot_since_ns or now) if reasons & _HOT else 0
        if health.hot_since_ns and now - health.hot_since_ns >= self._hot_ns:
            lasting.append(f"slowed by heat for {format_duration(now - health.hot_since_ns)}")
        return fresh, lasting

    def _patience(self, health: _Health) -> int:
        return self._recheck_ns << min(health.failures - 1, _MOST_DOUBLINGS)
