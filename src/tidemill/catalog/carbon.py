"""Carbon intensity of electricity, by country and year."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Final

from tidemill.catalog.tables import rows
from tidemill.errors import InvalidSetting

_SOURCE: Final = "Our World in Data, Ember"
_WORLD: Final = frozenset({"", "world", "wld"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CarbonIntensity:
    """Milligrams of CO2e for one kWh from a country's grid, averaged over ``year``."""

    country: str
    mg_per_kwh: int
    year: int
    source: str


def carbon_intensity(country: str = "") -> CarbonIntensity:
    """The intensity of a country, by ISO 3166 alpha-3 code or English name; the world's when nothing is given.

    The world's is the mean of all countries, weighted by what they generate.
    Raises: InvalidSetting that names the nearest countries.

    >>> carbon_intensity("DEU") == carbon_intensity("germany")
    True
    """
    asked = " ".join(country.split()).casefold()
    if asked in _WORLD:
        return _world()
    found = _countries().get(asked)
    if found is None:
        near = [_countries()[name].country for name in difflib.get_close_matches(asked, _countries(), 3, 0.6)]
        hint = f"Did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
        raise InvalidSetting(
            f"No carbon intensity is known for {country!r}.",
            field="country",
            value=country,
            mend=f"{hint}Write an ISO 3166 alpha-3 code such as DEU, or leave it out for the world's average.",
        )
    return found


def country_codes(text: str) -> tuple[str, ...]:
    """The ISO 3166 alpha-3 codes of a country, by code or English name, or of the members of the EU (``EU``).

    Raises: InvalidSetting that names the nearest countries.

    >>> country_codes("germany"), len(country_codes("EU"))
    (('DEU',), 27)
    """
    if text.strip().casefold() == "eu":
        return _EU
    found = carbon_intensity(text) if text.strip() else _world()
    code = _codes().get(found.country, "")
    if not code:
        raise InvalidSetting(
            f"{text!r} is not a country.", field="country", value=text, mend="Write an ISO 3166 code such as DEU."
        )
    return (code,)


_EU: Final = (
    "AUT", "BEL", "BGR", "CYP", "CZE", "DEU", "DNK", "ESP", "EST", "FIN", "FRA", "GRC", "HRV", "HUN", "IRL", "ITA",
    "LTU", "LUX", "LVA", "MLT", "NLD", "POL", "PRT", "ROU", "SVK", "SVN", "SWE",
)  # fmt: skip


@cache
def _codes() -> dict[str, str]:
    """ISO codes by English name."""
    return {row["country"]: row["iso3"].upper() for row in rows("country_carbon_intensity.csv")}


@cache
def _countries() -> dict[str, CarbonIntensity]:
    """Intensities by code and by name, both in lower case."""
    found = {}
    for row in rows("country_carbon_intensity.csv"):
        intensity = CarbonIntensity(
            country=row["country"],
            mg_per_kwh=int(Decimal(row["gco2e_per_kwh"]) * 1000),
            year=int(row["year"]),
            source=f"{row['country']} {row['year']}, {_SOURCE}",
        )
        found[row["iso3"].casefold()] = found[row["country"].casefold()] = intensity
    return found


@cache
def _world() -> CarbonIntensity:
    table = rows("country_carbon_intensity.csv")
    generated = sum(Decimal(row["total_twh"]) for row in table)
    emitted = sum(Decimal(row["total_twh"]) * Decimal(row["gco2e_per_kwh"]) for row in table)
    year = min(int(row["year"]) for row in table if Decimal(row["total_twh"]) > 1000)
    return CarbonIntensity(
        country="world",
        mg_per_kwh=int(emitted / generated * 1000),
        year=year,
        source=f"world mean, {_SOURCE}",
    )
