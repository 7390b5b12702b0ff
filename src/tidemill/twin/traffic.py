"""Requests to models: from a file that was recorded, or made by dice with a day's swing and bursts.

A file is JSON lines or CSV, packed with gzip or not, with a request a row: when it came, its tokens, its model. The
names of a recording of this installation and those of public traces are understood: Azure's (``TIMESTAMP``,
``ContextTokens``, ``GeneratedTokens``), BurstGPT's (``Timestamp``, ``Request tokens``, ``Response tokens``) and
Mooncake's (``timestamp`` in ms, ``input_length``, ``output_length``). A row that cannot be read is an error that names
its line.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np

from tidemill.errors import InvalidRequest, NotFound
from tidemill.units import DAY_NS, SECOND_NS, parse_duration

FIELD: Final = "--traffic"
MOST_TOKENS: Final = 10_000_000
_CHUNK: Final = 65_536
_ARRIVALS: Final[Mapping[str, Callable[[Any], float]]] = {
    "at_ns": lambda value: float(value) / SECOND_NS,
    "at": lambda value: _instant(value),
    "arrival": lambda value: _instant(value),
    "arrived_at": lambda value: _instant(value),
    "TIMESTAMP": lambda value: _instant(value),
    "Timestamp": lambda value: _instant(value),
    "timestamp": lambda value: float(value) / 1000,
}  # fmt: skip
_PROMPTS: Final = ("prompt_tokens", "input_tokens", "ContextTokens", "Request tokens", "input_length")
_COMPLETIONS: Final = ("completion_tokens", "output_tokens", "GeneratedTokens", "Response tokens", "output_length")
_MODELS: Final = ("model", "Model")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes, of which model, its tokens and those of its answer, and whose it is."""

    at_ns: int
    model: str
    prompt: int
    completion: int
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Traffic by dice: ``rate`` requests a second on average over ``span_ns``, more by day and in bursts.

    ``diurnal`` is how much the rate swings over a day, ``weekend`` the weekend's part of a weekday's. ``burst`` is how
    many times as much comes in one minute of twenty. Tokens are log-normal around ``prompt`` and ``completion``.
    """

    rate: float = 2.0
    span_ns: int = DAY_NS
    seed: int = 1
    diurnal: float = 0.8
    weekend: float = 0.5
    burst: float = 1.0
    prompt: int = 600
    completion: int = 200
    sigma: float = 0.8
    tenants: int = 4
    model: str = "model"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 10_000 or self.span_ns <= 0 or self.rate * self.span_ns / SECOND_NS > 50_000_000:
            raise ValueError("rate and span are above zero, and make 50 million requests at most")
        if not 0 <= self.diurnal <= 1 or not 0 <= self.weekend <= 1 or self.burst < 1 or not 0 <= self.sigma <= 3:
            raise ValueError("diurnal and weekend lie between 0 and 1, burst is 1 or more, sigma between 0 and 3")
        if min(self.prompt, self.completion, self.tenants) < 1 or not self.model:
            raise ValueError("tokens and tenants are 1 or more, and the model has a name")


def parse_mix(text: str) -> Mix:
    """The mix in ``rate=5,span=2d,burst=3``; what is left out has its default. Raises: InvalidRequest."""
    known = {item.name.removesuffix("_ns"): item for item in fields(Mix)}
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        item = known.get(name.strip())
        if item is None or not equals:
            raise _wrong(text, f"{part!r} sets nothing of the traffic.", f"Set {', '.join(known)} with name=value.")
        try:
            if item.name.endswith("_ns"):
                values[item.name] = parse_duration(value.strip())
            else:
                values[item.name] = {"int": int, "float": float, "str": str}[str(item.type)](value.strip())
        except ValueError as error:
            raise _wrong(text, f"{value!r} is not a value of {name}.", f"Write such as {item.default}.") from error
    try:
        return Mix(**values)
    except ValueError as error:
        raise _wrong(text, f"{error}.", "See docs/twin.md for each number.") from error


def made(mix: Mix) -> Iterator[Request]:
    """The requests of a mix, in order. Time 0 is a Monday's midnight."""
    dice = np.random.default_rng(mix.seed)
    peak = mix.rate * (1 + mix.diurnal) * mix.burst
    now = 0.0
    while now < mix.span_ns:
        instants = now + np.cumsum(dice.exponential(SECOND_NS / peak, _CHUNK))
        now = float(instants[-1])
        days = instants / DAY_NS
        rate = mix.rate * (1 + mix.diurnal * np.sin(2 * np.pi * (days - 9 / 24)))
        rate = np.where(days.astype(np.int64) % 7 >= 5, rate * mix.weekend, rate)
        is_burst = (instants // (60 * SECOND_NS)).astype(np.int64) * 7_919 % 20 == 3
        rate = np.where(is_burst, rate * mix.burst, rate)
        kept = instants[(dice.random(_CHUNK) * peak < rate) & (instants < mix.span_ns)].astype(np.int64)
        prompts = np.clip(dice.lognormal(math.log(mix.prompt), mix.sigma, len(kept)), 1, MOST_TOKENS).astype(np.int64)
        answers = np.clip(dice.lognormal(math.log(mix.completion), mix.sigma, len(kept)), 1, MOST_TOKENS)
        tenants = dice.integers(mix.tenants, size=len(kept))
        for at, prompt, answer, tenant in zip(
            kept.tolist(), prompts.tolist(), answers.astype(np.int64).tolist(), tenants.tolist(), strict=True
        ):
            yield Request(at, mix.model, prompt, answer, f"tenant-{tenant + 1}")


def read_traffic(path: Path, *, limit: int = 0) -> list[Request]:
    """The requests in a file by time, the first at zero. Raises: NotFound, InvalidRequest that names the line."""
    if not path.is_file():
        raise NotFound("There is no such file.", field=FIELD, value=str(path), mend="Name a file, or synthetic.")
    found: list[Request] = []
    try:
        with _open(path) as text:
            first = text.readline()
            text.seek(0)
            rows = _json_rows(text) if first.lstrip().startswith("{") else enumerate(csv.DictReader(text), 2)
            for line, row in rows:
                found.append(_request(path, line, row))
                if limit and len(found) >= limit:
                    break
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise _wrong(str(path), f"{path.name} cannot be read: {error}.") from error
    if not found:
        raise _wrong(str(path), f"{path.name} has no request.", "See docs/twin.md for what a row has.")
    found.sort(key=lambda one: one.at_ns)
    begun = found[0].at_ns // DAY_NS * DAY_NS
    return [Request(one.at_ns - begun, one.model, one.prompt, one.completion, one.tenant) for one in found]


def _open(path: Path) -> Any:
    with path.open("rb") as start:
        packed = start.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8", newline="") if packed else path.open(encoding="utf-8", newline="")


def _json_rows(text: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, written in enumerate(text, 1):
        if written.strip():
            try:
                row = json.loads(written)
            except ValueError:
                row = None
            yield line, row if isinstance(row, dict) else {}


def _request(path: Path, line: int, row: Mapping[str, Any]) -> Request:
    def wrong(what: str) -> InvalidRequest:
        return _wrong(str(path), f"{path.name}, line {line}: {what}.", "Mend or leave out that line.")

    arrival = next((name for name in _ARRIVALS if row.get(name) not in (None, "")), None)
    if arrival is None:
        raise wrong("it does not say when the request came (arrival, in s or ISO 8601, or at_ns)")
    try:
        at = _ARRIVALS[arrival](row[arrival])
    except (ValueError, TypeError):
        at = math.nan
    if not math.isfinite(at) or not 0 <= at < 1e11:
        raise wrong(f"{str(row[arrival])[:40]!r} is not an instant")
    amounts = []
    for names in (_PROMPTS, _COMPLETIONS):
        name = next((one for one in names if row.get(one) not in (None, "")), None)
        if name is None:
            raise wrong(f"it has no {names[0]}")
        try:
            amount = float(row[name])
        except (ValueError, TypeError):
            amount = -1.0
        if not 0 <= amount <= MOST_TOKENS or amount != int(amount):
            raise wrong(f"{str(row[name])[:40]!r} is not a number of tokens")
        amounts.append(int(amount))
    model = next((str(row[name]) for name in _MODELS if row.get(name)), "model")
    return Request(round(at * SECOND_NS), model[:200], amounts[0], amounts[1], str(row.get("tenant") or "")[:200])


def _instant(value: Any) -> float:
    """Seconds, of a number or of a text in ISO 8601 (in UTC where it says no zone)."""
    if not isinstance(value, str):
        return float(value)
    try:
        return float(value)
    except ValueError:
        text = value.strip().replace(" ", "T")
        head, dot, rest = text.partition(".")
        if dot:  # more digits than Python reads
            digits = len(rest) - len(rest.lstrip("0123456789"))
            text = f"{head}.{rest[: min(digits, 6)]}{rest[digits:]}"
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp()  # noqa: UP017


def _wrong(value: str, what: str, mend: str = "") -> InvalidRequest:
    return InvalidRequest(what, field=FIELD, value=value, mend=mend)
