"""Public facts that the product ships: devices, list prices, carbon intensity. Overridable, with their sources.

Data is read from the package when it is first asked for. ``data/SOURCES.md`` says where each file is from.
"""

from tidemill.catalog.carbon import CarbonIntensity, carbon_intensity, country_codes
from tidemill.catalog.devices import (
    DeviceSpec,
    derived_device,
    devices,
    known_model,
    match_device,
    matches_request,
    mig_device,
    nearest_names,
)
from tidemill.catalog.power import cpu_power
from tidemill.catalog.prices import default_rates, own_prices, rate_card

__all__ = [
    "CarbonIntensity",
    "DeviceSpec",
    "carbon_intensity",
    "country_codes",
    "cpu_power",
    "default_rates",
    "derived_device",
    "devices",
    "known_model",
    "match_device",
    "matches_request",
    "mig_device",
    "nearest_names",
    "own_prices",
    "rate_card",
]
