"""A synthetic mix of work: seeded, so the same numbers give the same jobs; every number can be set."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from tidemill.errors import InvalidRequest
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Kind, RetryPolicy, Tier, WorkloadSpec
from tidemill.twin.arrivals import Arrival, Stream
from tidemill.twin.traces import gang_of
from tidemill.units import DAY_NS, HOUR_NS, MILLI, MINUTE_NS, SECOND_NS, parse_duration

_CHUNK: Final = 8_192
_LIMITS_H: Final = (1, 2, 4, 8, 12, 24, 48, 96, 168, 336)
"""What people write into max_duration, in hours."""
_WEEKEND: Final = 5
_SIZES: Final = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """The numbers of a mix.

    ``jobs`` arrive over ``span_ns``; zero: as long as gives the fleet the ``load`` (1: as much work as it can do).
    Arrivals are a Poisson process whose rate swings by ``diurnal`` (0 to 1) around its mean over a day, and is
    ``weekend`` times as high on Saturdays and Sundays. Durations are log-normal with that median and ``sigma``,
    between ``shortest_ns`` and ``longest_ns``. ``sizes`` are GPUs of a whole job with their weights; below 1 it is a
    share of one GPU. Tenants are chosen by Zipf's law with exponent ``skew``; each has ``users``. ``spot`` is the share
    of jobs that may be displaced at any time, ``limited`` the share that says how long it takes at most, ``cpu_only``
    the share without GPUs. ``saving`` is the share that writes a checkpoint when told to stop, ``checkpoint_ns`` the
    time between checkpoints of these (zero: none but that).
    """

    jobs: int = 10_000
    seed: int = 1
    span_ns: int = 0
    load: float = 0.8
    diurnal: float = 0.5
    weekend: float = 0.6
    median_ns: int = HOUR_NS
    sigma: float = 1.5
    shortest_ns: int = 30 * SECOND_NS
    longest_ns: int = 7 * DAY_NS
    sizes: str = "1:60 2:12 4:12 8:12 16:2.5 32:1 64:0.5"
    tenants: int = 8
    users: int = 4
    skew: float = 0.8
    spot: float = 0.3
    limited: float = 0.7
    cpu_only: float = 0.05
    saving: float = 0.7
    checkpoint_ns: int = 0
    cores_per_gpu: float = 8.0

    def __post_init__(self) -> None:
        for name in ("diurnal", "spot", "limited", "cpu_only", "saving"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1")
        for name in ("jobs", "tenants", "users", "median_ns", "shortest_ns", "longest_ns"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name.removesuffix('_ns')} is above zero")
        if self.load <= 0 or self.weekend < 0 or self.sigma < 0 or self.cores_per_gpu <= 0:
            raise ValueError("load and cores_per_gpu are above zero, weekend and sigma are zero or more")
        if self.longest_ns < self.shortest_ns:
            raise ValueError("longest is not below shortest")
        _sizes(self.sizes)


def parse_synthetic(text: str, *, field: str = "--synthetic") -> Synthetic:
    """The mix in ``jobs=10000,seed=1,median=2h,sizes=1:50 8:50``; what is left out has its default.

    Raises: InvalidRequest that names the option, the value and what is accepted.
    """
    known = {item.name.removesuffix("_ns"): item for item in fields(Synthetic)}
    values: dict[str, int | float | str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        item = known.get(name.strip())
        if item is None or not equals:
            raise InvalidRequest(
                f"{part!r} sets nothing of the mix.",
                field=field,
                value=text,
                mend=f"Set {', '.join(known)} with name=value.",
            )
        try:
            if item.name.endswith("_ns"):
                values[item.name] = parse_duration(value.strip())
            elif item.type == "str":
                values[item.name] = value.strip()
            else:
                values[item.name] = int(value) if item.type == "int" else float(value)
        except ValueError as error:
            what = "a time such as 90s or 2h" if item.name.endswith("_ns") else f"a number such as {item.default}"
            raise InvalidRequest(
                f"{value!r} is not a value of {name}.", field=field, value=text, mend=f"Write {what}."
            ) from error
    try:
        return Synthetic(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise InvalidRequest(f"{error}.", field=field, value=text, mend="See docs/twin.md for each number.") from error


def arrivals(mix: Synthetic, *, gpus: int, per_node: int) -> Stream:
    """The jobs of a mix for a fleet of ``gpus`` with ``per_node`` on a machine, made as they are asked for."""
    dice = np.random.default_rng(mix.seed)
    sizes, weights = _sizes(mix.sizes)
    span = mix.span_ns or _span(mix, sizes, weights, gpus)
    odds = np.arange(1, mix.tenants + 1, dtype=np.float64) ** -mix.skew
    odds /= odds.sum()
    names = [f"tenant-{number + 1:0{len(str(mix.tenants))}d}" for number in range(mix.tenants)]
    specs: dict[tuple[float, int, bool], WorkloadSpec] = {}
    left = mix.jobs
    at: Iterator[int] = _instants(mix, dice, span)
    while left > 0:
        many = min(left, _CHUNK)
        left -= many
        duration = np.clip(
            dice.lognormal(math.log(mix.median_ns), mix.sigma, many), mix.shortest_ns, mix.longest_ns
        ).astype(np.int64)
        size = np.where(dice.random(many) < mix.cpu_only, 0.0, dice.choice(sizes, many, p=weights))
        tenant = dice.choice(mix.tenants, many, p=odds)
        user = dice.integers(mix.users, size=many)
        spot, limited, saving = (dice.random(many) < share for share in (mix.spot, mix.limited, mix.saving))
        for row in range(many):
            takes = int(duration[row])
            limit = next((hours for hours in _LIMITS_H if hours * HOUR_NS > takes), 0) if limited[row] else 0
            key = (float(size[row]), limit, bool(spot[row]))
            spec = specs.get(key)
            if spec is None:
                spec = specs[key] = _spec(*key, mix=mix, per_node=per_node)
            who = int(tenant[row])
            yield Arrival(
                next(at),
                names[who],
                f"user-{who + 1}-{int(user[row]) + 1}",
                spec,
                takes,
                mix.checkpoint_ns if saving[row] else 0,
                bool(saving[row]),
            )


def _spec(size: float, limit_h: int, is_spot: bool, *, mix: Synthetic, per_node: int) -> WorkloadSpec:
    workers, each = gang_of(int(size), per_node) if size >= 1 else (1, 0)
    cores = mix.cores_per_gpu * (each or size or 1)
    gpus = GpuRequest(count=each) if each else GpuRequest(milli=round(size * MILLI)) if size else None
    return WorkloadSpec(
        kind=Kind.TASK,
        name="synthetic",
        run="synthetic",
        nodes=workers,
        resources=Resources(gpus=gpus, cpu_milli=max(round(cores * MILLI), 1)),
        max_duration_ns=limit_h * HOUR_NS,
        tier=Tier.SPOT if is_spot else Tier.ON_DEMAND,
        retry=RetryPolicy(max=1_000),
    )


def _sizes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and their shares in ``1:60 8:40``."""
    found = [(float(size), float(weight)) for size, weight in _SIZES.findall(text)]
    if not found or " ".join(text.split()) != " ".join(match[0] for match in _SIZES.finditer(" ".join(text.split()))):
        raise ValueError(f"sizes is {text!r}, not GPUs:WEIGHT pairs with blanks between, such as 1:60 8:40")
    if any(size <= 0 or (size > 1 and size != int(size)) or weight <= 0 for size, weight in found):
        raise ValueError("sizes are whole GPUs or a share below 1, and weights are above zero")
    weights = np.array([weight for _, weight in found])
    return np.array([size for size, _ in found]), weights / weights.sum()


def _span(mix: Synthetic, sizes: np.ndarray, weights: np.ndarray, gpus: int) -> int:
    """How long the arrivals are spread for the fleet to have that load. The mean duration is integrated numerically."""
    grid = np.linspace(-5, 5, 20_001)
    density = np.exp(-(grid**2) / 2)
    takes = np.clip(mix.median_ns * np.exp(mix.sigma * grid), mix.shortest_ns, mix.longest_ns)
    mean = float((takes * density).sum() / density.sum())
    work = mean * float((sizes * weights).sum()) * (1 - mix.cpu_only) * mix.jobs
    return max(int(work / (max(gpus, 1) * mix.load)), MINUTE_NS)


def _instants(mix: Synthetic, dice: np.random.Generator, span: int) -> Iterator[int]:
    """Arrival times without end: a Poisson process thinned to its rate at each instant. Time 0 is a Monday's."""
    peak = (1 + mix.diurnal) * max(1.0, mix.weekend)
    week = (_WEEKEND + 2 * mix.weekend) / 7
    gap = span * week / (mix.jobs * peak)
    now = 0.0
    while True:
        instants = now + np.cumsum(dice.exponential(gap, _CHUNK))
        days = instants / DAY_NS
        rate = 1 + mix.diurnal * np.sin(2 * np.pi * (days - 9 / 24))
        rate = np.where(days.astype(np.int64) % 7 >= _WEEKEND, rate * mix.weekend, rate)
        yield from instants[dice.random(_CHUNK) * peak < rate].astype(np.int64).tolist()
        now = float(instants[-1])
