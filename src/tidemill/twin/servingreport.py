"""Services under traffic as figures: one value for programs, rows for people, CSV for spreadsheets, a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tidemill.core.scaling import short_time
from tidemill.twin import page
from tidemill.twin.report import Figures, Line, compared
from tidemill.twin.serving import Result, bins
from tidemill.twin.sketch import Sketch
from tidemill.units import HOUR_NS, SECOND_NS, format_energy, format_usd

Runs = Sequence[tuple[str, Sequence[Result]]]
_COLUMNS: Final = ("requests_per_s", "replicas", "waiting", "ttft_p95_s")


def figures(result: Result) -> Figures:
    """Everything that was measured of one service, in plain JSON values; keys say their units."""
    span = max(result.span_ns, 1)
    return {
        "service": result.name,
        "replicas": f"{result.service.smallest}..{result.service.replicas}",
        "requests": result.requests,
        "answered": result.answered,
        "refused": result.refused,
        "refused_share": round(result.refused / result.requests, 6) if result.requests else 0.0,
        "ttft_s": _spread(result.ttft),
        "latency_s": _spread(result.latency),
        "wait_s": _spread(result.wait),
        "ttft_objective_ms": result.objective_ns * 1000 // SECOND_NS,
        "ttft_met_share": round(result.met / result.answered, 6) if result.answered else 0.0,
        "completion_tokens": result.tokens,
        "replica_h": round(result.replica_ns / HOUR_NS, 3),
        "replicas_mean": round(result.replica_ns / span, 3),
        "replicas_most": result.most,
        "busy_share": round(result.busy_ns / result.ready_ns, 4) if result.ready_ns else 0.0,
        "launches": result.launches,
        "changes": result.changes,
        "cost_micro": result.cost_micro,
        "cost_per_million_tokens_micro": result.cost_micro * 1_000_000 // result.tokens if result.tokens else 0,
        "energy_mj": result.energy_mj,
        "virtual_s": round(span / SECOND_NS, 3),
    }


def _spread(sketch: Sketch) -> dict[str, float]:
    quantiles = {f"p{share * 100:g}": round(sketch.quantile(share), 4) for share in (0.5, 0.9, 0.95, 0.99)}
    return {"mean": round(sketch.mean, 4), **quantiles, "max": round(sketch.highest, 4)}


def _seconds(value: float) -> str:
    return short_time(round(value * SECOND_NS)) if value else "0s"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.2%}"


LINES: Final = (
    Line("requests", lambda f: f["requests"], _count),
    Line("refused", lambda f: f["refused_share"], _share, -1),
    Line("first token, half", lambda f: f["ttft_s"]["p50"], _seconds, -1),
    Line("first token, 95 %", lambda f: f["ttft_s"]["p95"], _seconds, -1),
    Line("first token, 99 %", lambda f: f["ttft_s"]["p99"], _seconds, -1),
    Line("within the objective", lambda f: f["ttft_met_share"] if f["ttft_objective_ms"] else 0.0, _share, 1),
    Line("whole answer, half", lambda f: f["latency_s"]["p50"], _seconds, -1),
    Line("whole answer, 95 %", lambda f: f["latency_s"]["p95"], _seconds, -1),
    Line("wait for a replica, 95 %", lambda f: f["wait_s"]["p95"], _seconds, -1),
    Line("replica-hours", lambda f: f["replica_h"], lambda value: f"{value:,.1f}", -1),
    Line("replicas, mean", lambda f: f["replicas_mean"], lambda value: f"{value:,.2f}"),
    Line("replicas, most", lambda f: f["replicas_most"], _count),
    Line("launches", lambda f: f["launches"], _count, -1),
    Line("busy while ready", lambda f: f["busy_share"], _share),
    Line("cost", lambda f: f["cost_micro"], lambda micro: format_usd(round(micro)), -1),
    Line("cost of a million tokens", lambda f: f["cost_per_million_tokens_micro"],
         lambda micro: format_usd(round(micro)), -1),
    Line("energy", lambda f: f["energy_mj"], lambda mj: format_energy(round(mj)), -1),
)  # fmt: skip
_SILENT_AT_ZERO: Final = ("refused", "within the objective", "wait for a replica, 95 %")


def rows(runs: Sequence[Figures]) -> list[tuple[str, list[str], str, int]]:
    """As ``twin.report.rows``, of one service."""
    return compared(LINES, runs, silent_at_zero=_SILENT_AT_ZERO)


def write_csv(path: Path, runs: Runs) -> None:
    """The series and the figures of each run, in one long table: ``run,service,name,from_s,value``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("run", "service", "name", "from_s", "value"))
        for name, results in runs:
            for result in results:
                for at, *values in bins(result):
                    for column, value in zip(_COLUMNS, values, strict=True):
                        table.writerow((name, result.name, column, f"{at:g}", f"{value:.6g}"))
                for key, value in figures(result).items():
                    parts = value.items() if isinstance(value, dict) else [("", value)]
                    for part, number in parts:
                        table.writerow((name, result.name, f"{key}.{part}" if part else key, "0", number))


def write_page(path: Path, runs: Runs, *, title: str) -> None:
    """Write the page of one run, or of several side by side."""
    names = [name for name, _ in runs]
    cards = []
    for number, first in enumerate(runs[0][1]):
        results = [results[number] for _, results in runs]
        found = [figures(result) for result in results]
        told = [f"{names[index]}: replicas {one['replicas']}" for index, one in enumerate(found)]
        cards.append(page.card(f"{first.name}: figures ({'; '.join(told)})", page.table_of(names, rows(found))))
        for heading, column in (
            ("requests a second", 1), ("replicas", 2), ("requests that wait", 3), ("first token, 95 %, s", 4)
        ):  # fmt: skip
            lines = [[(at_s[0] * SECOND_NS, at_s[column]) for at_s in bins(result)] for result in results]
            drawn = lines[:1] if column == 1 else lines
            cards.append(page.card(f"{first.name}: {heading}", page.key(names) + page.lines_over_time(drawn)))
    path.write_text(page.frame(title, "Services under traffic on virtual time", cards), encoding="utf-8")
