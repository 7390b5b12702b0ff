"""The rows of the data files in this package."""

from __future__ import annotations

import csv
from importlib import resources


def rows(file_name: str) -> tuple[dict[str, str], ...]:
    """Every row of a shipped CSV file, by column name."""
    with resources.files("tidemill.catalog").joinpath("data", file_name).open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))
