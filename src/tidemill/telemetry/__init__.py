"""What a machine has and what it draws: discovery of nodes and devices, energy meters, and which GPUs fail."""

from tidemill.telemetry.energy import EnergyMeters
from tidemill.telemetry.health import HealthWatcher
from tidemill.telemetry.mig import SliceMaker
from tidemill.telemetry.node import discover_node, node_id, usable_cpu_milli, usable_memory_bytes
from tidemill.telemetry.nvml import Gpu, Nvml, why_no_gpu
from tidemill.telemetry.stats import DeviceStats, NodeStats, device_stats, node_stats

__all__ = [
    "DeviceStats",
    "EnergyMeters",
    "Gpu",
    "HealthWatcher",
    "NodeStats",
    "Nvml",
    "SliceMaker",
    "device_stats",
    "discover_node",
    "node_id",
    "node_stats",
    "usable_cpu_milli",
    "usable_memory_bytes",
    "why_no_gpu",
]
