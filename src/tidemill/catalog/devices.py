"""Accelerators: what is known of each model, and by which names drivers and people call it.

A model's name is words from the general to the special: ``A100-80GB-SXM``. A request names it by any number of
them from the front (``A100``, ``a100 80gb``). A slice of a GPU is ``MIG-1g.10gb-H100-SXM``, so that a request for
an ``H100`` is never answered with a slice of one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from tidemill.catalog.tables import rows
from tidemill.core.feasible import model_matches

_GIB: Final = 1024**3
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
_MAKERS: Final = re.compile(r"^(?:(?:NVIDIA|AMD|Intel|Tesla|GeForce|Instinct)\s+)+", re.IGNORECASE)
_MEMORY: Final = re.compile(r"\b\d+\s?(?:GB|GiB)?(?:\s?HBM\de?)?$", re.IGNORECASE)
_SLICE: Final = re.compile(r"(?:\d+c\.)?(\d+)g\.(\d+)gb")
_IDLE_SHARE: Final = 10
"""Idle power is taken as one part in so many of the TDP: a rough guess, see SOURCES.md."""
_MEMORY_TOLERANCE: Final = 0.12
"""How far what a driver reports may be below the nominal size (ECC, firmware) or rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One model of accelerator: bytes of nominal memory, dense TFLOPS, milliwatts. Zero and empty: not known.

    ``slices`` is how many MIG slices a whole one has, zero when it cannot be cut.
    """

    model: str
    vendor: str
    arch: str = ""
    memory_bytes: int
    bf16_tflops: float = 0.0
    tdp_mw: int = 0
    interconnect: str = ""
    slices: int = 0
    mig_profiles: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def idle_mw(self) -> int:
        """Power of an idle one, estimated."""
        return self.tdp_mw // _IDLE_SHARE

    @property
    def busy_mw(self) -> int:
        """Power of a busy one, estimated by its TDP."""
        return self.tdp_mw


@cache
def devices() -> tuple[DeviceSpec, ...]:
    """Every model of the catalog."""
    return tuple(
        DeviceSpec(
            model=row["model"],
            vendor=row["vendor"],
            arch=row["arch"],
            memory_bytes=int(row["memory_gb"]) * _GIB,
            bf16_tflops=float(row["bf16_dense_tflops"] or 0),
            tdp_mw=int(row["tdp_w"] or 0) * 1000,
            interconnect=row["interconnect"],
            slices=int(row["mig_max_instances"] or 0),
            mig_profiles=tuple(filter(None, row["mig_profiles"].split(";"))),
            aliases=tuple(filter(None, row["aliases"].split(";"))),
        )
        for row in rows("devices.csv")
    )


def match_device(reported_name: str, memory_bytes: int) -> DeviceSpec | None:
    """The model behind a driver's name for it, with the memory that this one has; None when it is unknown.

    >>> match_device("NVIDIA H100 80GB HBM3", 85_520_809_984).model
    'H100-SXM'
    """
    name = _MAKERS.sub("", reported_name.strip())
    candidates = _by_name().get(_plain(name)) or _by_name().get(_plain(_MEMORY.sub("", name)))
    if not candidates:
        return None
    spec = min(candidates, key=lambda each: abs(each.memory_bytes - memory_bytes))
    if abs(spec.memory_bytes - memory_bytes) > _MEMORY_TOLERANCE * spec.memory_bytes:
        return replace(spec, memory_bytes=_nominal(memory_bytes))
    return spec


def derived_device(reported_name: str, memory_bytes: int, *, power_mw: int = 0) -> DeviceSpec:
    """What can be said of a model that is not in the catalog: its driver's words, and no price.

    >>> derived_device("NVIDIA TITAN V", 12_652_838_912).model
    'TITAN-V'
    """
    words = re.sub(r"[^A-Za-z0-9.]+", "-", _MAKERS.sub("", reported_name.strip())).strip("-")
    model = words if words[:1].isalpha() else f"GPU-{words}".rstrip("-")
    return DeviceSpec(model=model, vendor="", memory_bytes=_nominal(memory_bytes), tdp_mw=power_mw)


def mig_device(whole: DeviceSpec, profile: str) -> DeviceSpec:
    """One MIG slice of a device as a device of its own. Raises: ValueError when that is no profile's name.

    >>> h100 = match_device("NVIDIA H100 PCIe", 80 * 1024**3)
    >>> mig_device(h100, "1g.10gb").model
    'MIG-1g.10gb-H100-PCIe'
    """
    match = _SLICE.match(profile)
    if match is None:
        raise ValueError(f"{profile!r} is not the name of a MIG profile such as 1g.10gb")
    part, of = int(match[1]), whole.slices or 7
    return replace(
        whole,
        model=f"MIG-{profile}-{whole.model}",
        memory_bytes=int(match[2]) * _GIB,
        bf16_tflops=whole.bf16_tflops * part / of,
        tdp_mw=whole.tdp_mw * part // of,
        slices=part,
        mig_profiles=(),
        aliases=(),
    )


def matches_request(spec_model: str, request_model: str) -> bool:
    """Whether a device of that model answers to a requested name; the scheduler asks the same.

    >>> matches_request("H100-SXM", "H100"), matches_request("H100-PCIe", "h100-sxm")
    (True, False)
    """
    return bool(_plain(request_model)) and model_matches(spec_model, request_model)


def known_model(name: str) -> bool:
    """Whether a request by that name could ever be answered by a model of the catalog or a slice of one."""
    return any(matches_request(model, name) for model in _models())


def nearest_names(name: str, n: int = 3) -> tuple[str, ...]:
    """Up to ``n`` names that can be requested and look like ``name``, best first; empty when none does.

    >>> nearest_names("H1000")
    ('H100', 'H200')
    """
    plain = _plain(name)
    scored = [
        (difflib.SequenceMatcher(None, plain, candidate).ratio(), candidate[:1] == plain[:1], canonical)
        for candidate, canonical in _requestable().items()
    ]
    close = sorted(
        (entry for entry in scored if entry[0] >= 0.6), key=lambda entry: (-entry[0], not entry[1], entry[2])
    )
    if any(same for _, same, _ in close):
        close = [entry for entry in close if entry[1]]
    found: list[str] = []
    for ratio, _, canonical in close:
        covered = any(matches_request(canonical, kept) or matches_request(kept, canonical) for kept in found)
        if ratio == close[0][0] or not covered:
            found.append(canonical)
    return tuple(dict.fromkeys(found))[:n]


def _plain(name: str) -> str:
    return _SEPARATORS.sub("", name.lower())


def _nominal(memory_bytes: int) -> int:
    """Whole GiB, as sizes are sold; drivers report somewhat less."""
    return -(-memory_bytes // _GIB) * _GIB


@cache
def _models() -> tuple[str, ...]:
    slices = {mig_device(spec, profile).model for spec in devices() for profile in spec.mig_profiles}
    return (*(spec.model for spec in devices()), *sorted(slices))


@cache
def _by_name() -> dict[str, tuple[DeviceSpec, ...]]:
    """Models by the plain form of each of their whole names."""
    found: dict[str, tuple[DeviceSpec, ...]] = {}
    for spec in devices():
        for plain in dict.fromkeys(_plain(name) for name in (spec.model, *spec.aliases)):
            found[plain] = (*found.get(plain, ()), spec)
    return found


@cache
def _requestable() -> dict[str, str]:
    """Plain forms of all that can be requested or is often said, and the name to request it by."""
    found: dict[str, str] = {}
    for spec in devices():
        words = spec.model.split("-")
        for count in range(1, len(words) + 1):
            name = "-".join(words[:count])
            if name.lower() not in ("rtx", "gtx", "quadro", "tpu", "rtx-pro"):
                found.setdefault(_plain(name), name)
        for alias in spec.aliases:
            found.setdefault(_plain(alias), spec.model)
    return found
