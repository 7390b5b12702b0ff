"""Accelerators as the catalog knows them, and the names that drivers and people use for them."""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tidemill.core.feasible import model_matches

_GIB = 1024**3
_NOISE = frozenset({"nvidia", "geforce", "tesla", "amd", "instinct", "graphics", "generation", "gpu", "hbm"})
_ALSO = {"a10g": "a10"}
"""Drivers' names of models that the catalog knows under another."""
_IDLE_SHARE = 10
"""Idle power in hundredths of the TDP, where it is not known better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One model of accelerator. Bytes, milliwatts; ``bf16_tflops`` is dense. Zero means not known."""

    model: str
    vendor: str
    arch: str
    memory_bytes: int
    bf16_tflops: float
    idle_mw: int
    busy_mw: int
    interconnect: str
    mig_profiles: tuple[str, ...]


@cache
def devices() -> tuple[DeviceSpec, ...]:
    """Every accelerator of the catalog."""
    with resources.files("tidemill.catalog").joinpath("data/gpu_specs.csv").open(encoding="utf-8") as file:
        return tuple(_spec(row) for row in csv.DictReader(file))


def _spec(row: dict[str, str]) -> DeviceSpec:
    busy = round(float(row["tdp_w"] or 0) * 1000)
    return DeviceSpec(
        model=row["gpu"].removesuffix(" (per GPU)"),
        vendor=row["vendor"],
        arch=row["arch"],
        memory_bytes=int(row["mem_gb"].split("/")[0]) * _GIB,
        bf16_tflops=float(row["bf16_dense_tflops"] or 0),
        idle_mw=busy * _IDLE_SHARE // 100,
        busy_mw=busy,
        interconnect=row["interconnect"],
        mig_profiles=tuple(profile for profile in row["mig_profiles"].split(";") if profile and profile != "..."),
    )


def match_device(reported_name: str, memory_bytes: int) -> DeviceSpec | None:
    """The catalog's entry for what a driver reports, by name and then nearest memory; None when it is unknown.

    >>> match_device("NVIDIA H100 80GB HBM3", 80 * 1024**3).model
    'H100-SXM'
    """
    said = _words(reported_name)
    best: tuple[float, DeviceSpec] | None = None
    for spec in devices():
        family, *form = _words(spec.model)
        if not _names_family(said, family, form):
            continue
        extra = [word for word in form if not word.endswith("gb")]
        spelled = sum(1 for word in extra if word in said)
        memory_off = abs(spec.memory_bytes - memory_bytes) / max(spec.memory_bytes, 1)
        likely = 0.25 if _default_form(spec.model) and not any(word in said for word in ("pcie", "nvl")) else 0.0
        score = spelled - 0.5 * (len(extra) - spelled) + likely - 4 * memory_off
        if best is None or score > best[0]:
            best = (score, spec)
    return best[1] if best is not None else None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _NOISE]


def _names_family(said: list[str], family: str, form: list[str]) -> bool:
    if family == "rtx":
        return {"rtx", form[0]} <= set(said) and all((word in form) == (word in said) for word in ("ada", "pro"))
    return family in said or bool(said and family == _ALSO.get(said[0]))


def _default_form(model: str) -> bool:
    return "SXM" in model or model.count("-") == 0


def known_model(name: str) -> bool:
    """Whether some accelerator of the catalog answers to that name."""
    return any(model_matches(spec.model, name) for spec in devices())


def matches_request(spec_model: str, request_model: str) -> bool:
    """Whether a model answers to a requested name; see ``core.feasible.model_matches``."""
    return model_matches(spec_model, request_model)


def nearest_names(name: str, n: int = 3) -> tuple[str, ...]:
    """The catalog's names most like ``name``, best first: families (``H100``) and full models.

    >>> nearest_names("H1000", 1)
    ('H100',)
    """
    names: dict[str, str] = {}
    for spec in devices():
        family = spec.model.split("-")[0]
        short = spec.model if family in ("RTX", "TPU") else family
        names.setdefault(_plain(short), short)
        names.setdefault(_plain(spec.model), spec.model)
    found = difflib.get_close_matches(_plain(name), names, n, cutoff=0.5)
    return tuple(names[one] for one in found)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
