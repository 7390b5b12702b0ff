"""A finished run as figures: one value for programs, rows for people, CSV for spreadsheets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidemill.twin.fleet import describe
from tidemill.twin.measure import jain
from tidemill.twin.run import Result
from tidemill.twin.sketch import Sketch
from tidemill.units import (
    HOUR_NS,
    MILLI,
    SECOND_NS,
    format_carbon,
    format_duration,
    format_energy,
    format_usd,
)

Figures = dict[str, Any]


def figures(result: Result) -> Figures:
    """Everything that was measured, in plain JSON values; keys say their units."""
    m = result.measures
    elapsed = max(m.last_end_ns - m.start_ns, 1)
    tenants = [who for who in m.tenants.values() if who.submitted]
    return {
        "fleet": describe(result.conditions.nodes),
        "gpus": result.conditions.gpu_milli // MILLI,
        "virtual_s": round((m.now - m.start_ns) / SECOND_NS, 3),
        "makespan_s": round(elapsed / SECOND_NS, 3),
        "turns": m.turns,
        "jobs": {
            "submitted": m.submitted_jobs,
            **{state: m.states[state] for state in sorted(m.states)},
            "left": result.left,
            "refused": dict(sorted(m.refused.items())),
        },
        "wait_s": _spread(m.wait),
        "jct_s": _spread(m.jct),
        "slowdown": _spread(m.slowdown),
        "utilization": _share(m.gpu_ns, m.capacity_ns),
        "utilization_while_work_arrives": _share(m.busy_gpu_ns, m.busy_capacity_ns),
        "fragmentation": _share(m.fragmented_ns, m.idle_ns),
        "fragmented_gpus": round(m.fragmented_ns / max(m.now - m.start_ns, 1) / MILLI, 3),
        "jain_slowdown": round(jain([who.slowdown.mean for who in tenants if who.ended]), 4),
        "jain_share": round(jain([who.gpu_ns / who.weight_milli for who in tenants]), 4),
        "share_error": round(m.share_error_ns / m.contended_ns, 4) if m.contended_ns else 0.0,
        "preemptions": m.preemptions,
        "requeues": dict(sorted(m.requeues.items())),
        "lost_gpu_h": round(m.lost_ns / MILLI / HOUR_NS, 3),
        "gpu_h": round(m.gpu_ns / MILLI / HOUR_NS, 3),
        "cost_micro": m.amount_micro,
        "energy_mj": m.energy_mj,
        "idle_energy_mj": m.idle_energy_mj,
        "carbon_mg": m.carbon_mg,
        "ledger_lines": m.ledger_lines,
        "tenants": {
            who.name: {
                "weight": who.weight_milli / MILLI,
                "submitted": who.submitted,
                "ended": who.ended,
                "gpu_h": round(who.gpu_ns / MILLI / HOUR_NS, 3),
                "share": _share(who.gpu_ns, m.gpu_ns),
                "wait_s": _spread(who.wait),
                "jct_s": _spread(who.jct),
                "slowdown": _spread(who.slowdown),
                "preempted": who.preempted,
                "lost_gpu_h": round(who.lost_ns / MILLI / HOUR_NS, 3),
                "cost_micro": who.amount_micro,
                "energy_mj": who.energy_mj,
                "carbon_mg": who.carbon_mg,
            }
            for who in sorted(tenants, key=lambda who: (-who.gpu_ns, who.name))
        },
    }


def _spread(sketch: Sketch) -> dict[str, float]:
    return {
        "mean": round(sketch.mean, 3),
        "p50": round(sketch.quantile(0.5), 3),
        "p95": round(sketch.quantile(0.95), 3),
        "p99": round(sketch.quantile(0.99), 3),
        "max": round(sketch.highest, 3),
    }


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


# --- for people ---


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: what it is, how to find and to write it, and whether less (-1) or more (1) is better."""

    name: str
    find: Callable[[Figures], float]
    write: Callable[[float], str]
    better: int = 0


def _time(seconds: float) -> str:
    return format_duration(round(seconds * SECOND_NS))


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _hours(value: float) -> str:
    return f"{value:,.1f} GPU-h"


def _ratio(value: float) -> str:
    return f"{value:,.2f}"


LINES: Final = (
    Line("jobs", lambda f: f["jobs"]["submitted"], _count),
    Line("ended well", lambda f: f["jobs"].get("succeeded", 0), _count, 1),
    Line("refused at the door", lambda f: sum(f["jobs"]["refused"].values()), _count, -1),
    Line("still waiting", lambda f: f["jobs"]["left"], _count, -1),
    Line("makespan", lambda f: f["makespan_s"], _time, -1),
    Line("wait, mean", lambda f: f["wait_s"]["mean"], _time, -1),
    Line("wait, half of all", lambda f: f["wait_s"]["p50"], _time, -1),
    Line("wait, 95 %", lambda f: f["wait_s"]["p95"], _time, -1),
    Line("wait, 99 %", lambda f: f["wait_s"]["p99"], _time, -1),
    Line("JCT, mean", lambda f: f["jct_s"]["mean"], _time, -1),
    Line("JCT, 95 %", lambda f: f["jct_s"]["p95"], _time, -1),
    Line("slowdown, mean", lambda f: f["slowdown"]["mean"], _ratio, -1),
    Line("slowdown, 95 %", lambda f: f["slowdown"]["p95"], _ratio, -1),
    Line("GPUs in use", lambda f: f["utilization"], _percent, 1),
    Line("GPUs in use while work arrives", lambda f: f["utilization_while_work_arrives"], _percent, 1),
    Line("idle that no job could use", lambda f: f["fragmentation"], _percent, -1),
    Line("fairness of slowdown (Jain)", lambda f: f["jain_slowdown"], _ratio, 1),
    Line("share with the wrong tenant", lambda f: f["share_error"], _percent, -1),
    Line("preemptions", lambda f: f["preemptions"], _count, -1),
    Line("work lost", lambda f: f["lost_gpu_h"], _hours, -1),
    Line("work done", lambda f: f["gpu_h"], _hours),
    Line("cost", lambda f: f["cost_micro"], lambda micro: format_usd(round(micro)), -1),
    Line("energy", lambda f: f["energy_mj"], lambda mj: format_energy(round(mj)), -1),
    Line("carbon", lambda f: f["carbon_mg"], lambda mg: format_carbon(round(mg)), -1),
)


def rows(runs: Sequence[Figures]) -> list[tuple[str, list[str], str, int]]:
    """``(name, a value for each run, the last against the first, is it better: 1, worse: -1, neither: 0)``."""
    return compared(LINES, runs, silent_at_zero=("refused at the door", "still waiting"))


def compared(
    lines: Iterable[Line], runs: Sequence[Figures], *, silent_at_zero: Sequence[str] = ()
) -> list[tuple[str, list[str], str, int]]:
    """The same of other lines; those ``silent_at_zero`` are left out where all runs have zero."""
    found = []
    for line in lines:
        values = [float(line.find(run)) for run in runs]
        if line.name in silent_at_zero and not any(values):
            continue
        difference, verdict = "", 0
        if len(values) > 1 and values[0] != values[-1]:
            change = values[-1] - values[0]
            sign = "+" if change > 0 else "-"
            difference = f"{change / abs(values[0]):+.1%}" if values[0] else f"{sign}{line.write(abs(change))}"
            verdict = line.better * (1 if change > 0 else -1)
            if difference in ("+0.0%", "-0.0%"):
                difference, verdict = "", 0
        found.append((line.name, [line.write(value) for value in values], difference, verdict))
    return found


# --- for spreadsheets ---


def write_csv(path: Path, results: Iterable[tuple[str, Result]]) -> None:
    """The series and the tenants of each run, in one long table: ``run,kind,name,from_s,to_s,value``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("run", "kind", "name", "from_s", "to_s", "value"))
        for name, result in results:
            series = result.measures.series
            width = series.width_ns / SECOND_NS
            columns = [("series", key, column) for key, column in series.values.items()]
            columns += [("tenant_gpus", key, column) for key, column in result.measures.tenant_series.items()]
            for kind, key, column in columns:
                for index, value in enumerate(column):
                    table.writerow((name, kind, key, f"{index * width:g}", f"{(index + 1) * width:g}", f"{value:.6g}"))
            total = figures(result)
            for tenant, values in total["tenants"].items():
                for key, value in values.items():
                    parts = value.items() if isinstance(value, dict) else [("", value)]
                    for part, number in parts:
                        what = f"{tenant}.{key}.{part}" if part else f"{tenant}.{key}"
                        table.writerow((name, "tenant", what, "0", f"{total['virtual_s']:g}", number))
