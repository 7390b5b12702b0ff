"""Default prices, from public lists, and the card of rates that an installation charges by.

``data/SOURCES.md`` tells how a default is made from listed prices.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Final

from tidemill.catalog.devices import DeviceSpec, devices, matches_request, mig_device, nearest_names
from tidemill.catalog.tables import rows
from tidemill.errors import InvalidSetting
from tidemill.model.ledger import CPU_METER, Rate, RateCard
from tidemill.units import USD_MICRO

_CPU_MICRO_PER_HOUR: Final = 44_625
_CPU_SOURCE: Final = "AWS c7i.large, us-east-1, on demand: 0.08925 USD an hour for 2 vCPU"
_RECENT_YEAR: Final = 2025
_ENOUGH_PROVIDERS: Final = 3
_MOST_MICRO_PER_HOUR: Final = 1_000_000 * USD_MICRO


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    model: str
    memory_gb: str
    provider: str
    micro_per_hour: int
    year: int
    source: str


@cache
def default_rates() -> tuple[Rate, ...]:
    """Micro-USD for an hour of one CPU core, of each model with listed prices, and of the MIG slices of these."""
    whole = {spec.model: rate for spec in devices() if (rate := _listed_rate(spec)) is not None}
    return (
        Rate(resource=CPU_METER, micro_per_hour=_CPU_MICRO_PER_HOUR, source=_CPU_SOURCE),
        *whole.values(),
        *_slice_rates(whole),
    )


def rate_card(overrides: Mapping[str, str | float]) -> RateCard:
    """The default rates with an installation's own, in US dollars for a unit-hour, put over them.

    A resource is ``cpu``, a model, or several by the front of their names (``H100``); where two overrides name a
    model, the longer name wins. Slices follow the model they are cut from, unless named themselves.
    Raises: InvalidSetting that names the resource, and the nearest ones when there is none by that name.
    """
    defaults = {rate.resource: rate for rate in default_rates()}
    whole = {CPU_METER: defaults[CPU_METER]}
    whole |= {spec.model: defaults[spec.model] for spec in devices() if spec.model in defaults}
    slices, named = _slices(), _overridden(overrides)
    whole |= {model: rate for model, rate in named.items() if model not in slices}
    rates = whole | {rate.resource: rate for rate in _slice_rates(whole)} | named
    content = "\n".join(f"{resource} {rates[resource].micro_per_hour}" for resource in sorted(rates))
    return RateCard(id=f"rc_{hashlib.sha256(content.encode()).hexdigest()[:12]}", rates=tuple(rates.values()))


def own_prices(overrides: Mapping[str, str | float]) -> tuple[tuple[str, int], ...]:
    """The prices in micro-USD that these overrides set, by resource: of each model that they name, and of its slices.

    Raises: InvalidSetting, as ``rate_card``.
    """
    slices, named = _slices(), _overridden(overrides)
    whole = {model: rate for model, rate in named.items() if model not in slices}
    rates = {rate.resource: rate for rate in _slice_rates(whole)} | named
    return tuple(sorted((resource, rate.micro_per_hour) for resource, rate in rates.items()))


@cache
def _slices() -> frozenset[str]:
    return frozenset(mig_device(spec, profile).model for spec in devices() for profile in spec.mig_profiles)


def _overridden(overrides: Mapping[str, str | float]) -> dict[str, Rate]:
    """The rates of the resources that overrides name."""
    slices = _slices()
    named: dict[str, Rate] = {}
    for resource, price in sorted(overrides.items(), key=lambda item: len(item[0])):
        micro = _micro(resource, price)
        models = _named(resource, slices)
        if not models:
            near = ("cpu",) if resource.strip().lower().startswith(("cpu", "core", "vcpu")) else nearest_names(resource)
            raise InvalidSetting(
                f"There is no resource called {resource!r} to set a rate for.",
                field=f"rates.{resource}",
                value=price,
                mend=f"Did you mean {', '.join(near)}?" if near else "Name a GPU model such as H100-SXM, or cpu.",
            )
        named |= {model: Rate(resource=model, micro_per_hour=micro, source="config.yaml") for model in models}
    return named


def _named(resource: str, slices: frozenset[str]) -> list[str]:
    if resource.strip().lower() == CPU_METER:
        return [CPU_METER]
    models = [spec.model for spec in devices()] + sorted(slices)
    return [model for model in models if matches_request(model, resource)]


def _micro(resource: str, price: str | float) -> int:
    try:
        if isinstance(price, bool):
            raise InvalidOperation
        micro = Decimal(str(price).strip().removeprefix("$")) * USD_MICRO
        if not micro.is_finite() or not 0 <= micro <= _MOST_MICRO_PER_HOUR:
            raise InvalidOperation
    except InvalidOperation as error:
        raise InvalidSetting(
            f"{price!r} is not a rate.",
            field=f"rates.{resource}",
            value=price,
            mend="Write US dollars for one hour, zero or more, such as 2.50.",
        ) from error
    return int(micro.to_integral_value())


@cache
def _listings() -> tuple[_Listing, ...]:
    return tuple(
        _Listing(
            model=row["model"],
            memory_gb=row["memory_gb"],
            provider=row["provider"],
            micro_per_hour=int(Decimal(row["usd_per_gpu_hour"]) * USD_MICRO),
            year=int(row["year"]),
            source=row["source"],
        )
        for row in rows("prices.csv")
    )


def _listed_rate(spec: DeviceSpec) -> Rate | None:
    """The median over providers of each one's median, of recent rows where there are enough; None without any."""
    found = [each for each in _listings() if each.model == spec.model]
    if not found:
        size = str(spec.memory_bytes >> 30)
        found = [each for each in _listings() if each.memory_gb == size and matches_request(spec.model, each.model)]
    recent = [each for each in found if each.year >= _RECENT_YEAR]
    if len({each.provider for each in recent}) >= _ENOUGH_PROVIDERS:
        found = recent
    if not found:
        return None
    providers = {each.provider for each in found}
    medians = [statistics.median(row.micro_per_hour for row in found if row.provider == name) for name in providers]
    years = "-".join(str(year) for year in sorted({min(each.year for each in found), max(each.year for each in found)}))
    return Rate(
        resource=spec.model,
        micro_per_hour=round(statistics.median(medians)),
        source=f"median of {len(found)} on-demand list prices of {', '.join(sorted(providers))}, {years} "
        f"(from {', '.join(sorted({each.source for each in found}))})",
    )


def _slice_rates(whole: Mapping[str, Rate]) -> list[Rate]:
    """Rates of the slices of each priced model: its own price by their share of it."""
    found = []
    for spec in devices():
        for profile in spec.mig_profiles if spec.model in whole else ():
            part, rate = mig_device(spec, profile), whole[spec.model]
            micro = rate.micro_per_hour * part.slices // spec.slices
            source = f"{part.slices}/{spec.slices} of {spec.model}: {rate.source}"
            found.append(Rate(resource=part.model, micro_per_hour=micro, source=source))
    return found
