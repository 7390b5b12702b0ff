"""Grams of CO2e for one kWh, by country."""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tidemill.errors import InvalidSetting

_SOURCE = "CodeCarbon / Our World in Data, Ember (CC BY 4.0)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CarbonIntensity:
    """The carbon intensity of a grid: mg CO2e for one kWh, of which year, from where."""

    mg_per_kwh: int
    year: int
    source: str


@dataclass(frozen=True, slots=True)
class _Row:
    country: str
    year: int
    mg_per_kwh: int
    total_twh: float


def carbon_intensity(country: str = "") -> CarbonIntensity:
    """The intensity of a country, by ISO 3166 alpha-3 code or English name; of the world when none is given.

    The world's is the mean of all countries, weighted by what they generate. Raises: InvalidSetting.
    """
    rows = _rows()
    if not country:
        total = sum(row.total_twh for row in rows.values())
        mean = sum(row.mg_per_kwh * row.total_twh for row in rows.values()) / total
        year = max(row.year for row in rows.values())
        return CarbonIntensity(
            mg_per_kwh=round(mean), year=year, source=f"world mean of {len(rows)} countries, {_SOURCE}"
        )
    row = rows.get(country.upper()) or next((r for r in rows.values() if r.country.lower() == country.lower()), None)
    if row is None:
        names = {name.lower(): name for name in (*rows, *(r.country for r in rows.values()))}
        near = ", ".join(names[one] for one in difflib.get_close_matches(country.lower(), names, 3))
        mend = f"Did you mean {near}?" if near else "Write an ISO 3166 alpha-3 code such as DEU."
        raise InvalidSetting("There is no such country in the catalog.", field="country", value=country, mend=mend)
    return CarbonIntensity(mg_per_kwh=row.mg_per_kwh, year=row.year, source=f"{row.country} {row.year}, {_SOURCE}")


@cache
def _rows() -> dict[str, _Row]:
    with (
        resources.files("tidemill.catalog").joinpath("data/country_carbon_intensity.csv").open(encoding="utf-8") as file
    ):
        return {
            row["iso3"]: _Row(
                row["country"],
                int(row["year"]),
                round(float(row["gco2e_per_kwh"]) * 1000),
                float(row["total_twh"] or 0),
            )
            for row in csv.DictReader(file)
            if row["gco2e_per_kwh"]
        }
