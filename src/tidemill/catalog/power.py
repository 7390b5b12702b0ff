"""Power of processors, for when it cannot be measured."""

from __future__ import annotations

import re
from typing import Final

_AVERAGE_MW: Final = (740, 3_500)
_ARCHITECTURES: Final = (
    (r"E5-\d+\w* v2\b", (3_037, 8_249)),  # Ivy Bridge
    (r"E5-\d+\w* v3\b", (1_901, 6_013)),  # Haswell
    (r"E5-\d+\w* v4\b", (713, 3_685)),  # Broadwell
    (r"(?:Platinum|Gold|Silver|Bronze) \d1\d\d", (645, 4_193)),  # Skylake
    (r"(?:Platinum|Gold|Silver|Bronze) \d2\d\d", (639, 3_967)),  # Cascade Lake
    (r"EPYC 7\w\w1\b", (823, 2_553)),  # first generation
    (r"EPYC 7\w\w2\b", (474, 1_693)),  # second generation
)


def cpu_power(cpu_model: str = "") -> tuple[int, int]:
    """Idle and busy power of one core (one hardware thread), in milliwatts, by the processor's name.

    Source: Cloud Carbon Footprint, Methodology, section Compute, and its coefficients by architecture; the
    average over servers where the architecture is not among them.
    """
    return next((power for pattern, power in _ARCHITECTURES if re.search(pattern, cpu_model)), _AVERAGE_MW)
