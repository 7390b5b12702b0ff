"""Default rates from listed prices, and a rate card with an installation's own rates over them."""

from __future__ import annotations

import csv
import hashlib
import statistics
from collections.abc import Mapping
from functools import cache
from importlib import resources

from tidemill.catalog.devices import devices, nearest_names
from tidemill.errors import InvalidSetting
from tidemill.model.ledger import CPU_METER, Rate, RateCard
from tidemill.units import USD_MICRO

_CPU_MICRO = 44_625
_CPU_SOURCE = "AWS c7i.large on demand, us-east-1, list price 0.08925 USD an hour for 2 vCPU"


@cache
def default_rates() -> tuple[Rate, ...]:
    """A rate for one hour of a CPU core and of each model with listed prices: the median of its listings."""
    listed: dict[str, list[float]] = {}
    with resources.files("tidemill.catalog").joinpath("data/gpu_prices_on_demand.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            listed.setdefault(row["model"], []).append(float(row["usd_per_gpu_hour"]))
    gpus = (
        Rate(
            resource=model,
            micro_per_hour=round(statistics.median(prices) * USD_MICRO),
            source=f"median of {len(prices)} listed on-demand prices, see catalog/data/SOURCES.md",
        )
        for model, prices in sorted(listed.items())
    )
    return (Rate(resource=CPU_METER, micro_per_hour=_CPU_MICRO, source=_CPU_SOURCE), *gpus)


def rate_card(overrides: Mapping[str, float]) -> RateCard:
    """The rates in force: ``overrides`` in USD for one unit-hour over the defaults. Its id follows its content.

    Raises: InvalidSetting for a resource that does not exist or a price below zero.
    """
    rates = {rate.resource: rate for rate in default_rates()}
    known = {CPU_METER} | {spec.model for spec in devices()}
    for resource, price in overrides.items():
        if resource not in known:
            near = ", ".join(nearest_names(resource)) or "cpu"
            detail = "There is no such resource to price."
            raise InvalidSetting(detail, field=f"rates.{resource}", value=price, mend=f"Near: {near}.")
        if price < 0:
            detail = "A price cannot be below zero."
            raise InvalidSetting(detail, field=f"rates.{resource}", value=price, mend="Write 0 or more.")
        rates[resource] = Rate(resource=resource, micro_per_hour=round(price * USD_MICRO), source="config.yaml")
    ordered = tuple(rates[resource] for resource in sorted(rates))
    content = "\n".join(f"{rate.resource} {rate.micro_per_hour}" for rate in ordered)
    return RateCard(id=f"rc_{hashlib.sha256(content.encode()).hexdigest()[:12]}", rates=ordered)
