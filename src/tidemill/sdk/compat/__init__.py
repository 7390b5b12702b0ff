"""Files of other tools, read as Tidemill specs: SkyPilot task files, dstack configurations, sbatch scripts.

``load`` finds out whose file it is and reads it. Every field is mapped, noted because leaving it out cannot change
results, or refused by name with the reason and the nearest equivalent; nothing is dropped in silence.
"""

from __future__ import annotations

from tidemill.sdk.compat.mapping import TITLES, Mapped, Refused, Surroundings, Tool, Translation, leaves
from tidemill.sdk.compat.reading import Reading, load, parse, tables

__all__ = [
    "TITLES",
    "Mapped",
    "Reading",
    "Refused",
    "Surroundings",
    "Tool",
    "Translation",
    "leaves",
    "load",
    "parse",
    "tables",
]
