"""What a machine has and what it draws: discovery of nodes and devices, and cumulative energy meters."""

from tidemill.telemetry.energy import EnergyMeters
from tidemill.telemetry.node import DeviceStats, NodeStats, discover_node, node_stats, why_no_gpu

__all__ = ["DeviceStats", "EnergyMeters", "NodeStats", "discover_node", "node_stats", "why_no_gpu"]
