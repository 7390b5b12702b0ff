"""A finished run as one HTML page that needs nothing else: figures and charts, drawn here as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from tidemill.twin.report import figures, rows
from tidemill.twin.run import Result
from tidemill.units import DAY_NS, HOUR_NS, MINUTE_NS, SECOND_NS, format_duration

_WIDTH, _HEIGHT = 760, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 34
_COLOURS: Final = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")
_TENANT_COLOURS: Final = (
    "#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#f08c00", "#1864ab", "#66a80f", "#862e9c", "#495057",
    "#d9480f", "#087f5b",
)  # fmt: skip
_MOST_TENANTS: Final = 11

Points = Sequence[tuple[float, float]]

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1c2a30;--muted:#66757d;--line:#d8dfe2;--page:#f6f8f8;--card:#fff;
--good:#2b8a3e;--bad:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#e3eaed;--muted:#93a3ab;--line:#35434a;--page:#12191c;--card:#1a2428;
--good:#69db7c;--bad:#ff8787}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1660px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 2px}h2{font-size:15px;margin:0 0 8px;font-weight:600}
p{margin:0 0 18px;color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:16px;align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;overflow-x:auto}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--muted);font:11px system-ui,sans-serif}
.axis{stroke:var(--line);stroke-width:1}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 0 0;color:var(--muted);font-size:13px}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:3px 0 3px 16px;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;color:var(--muted)}
th{font-weight:500;color:var(--muted);border-bottom:1px solid var(--line);font-size:13px}
.good{color:var(--good)}.bad{color:var(--bad)}
"""


def write_page(path: Path, results: Sequence[tuple[str, Result]], *, title: str) -> None:
    """Write the page of one run, or of several side by side."""
    path.write_text(page(results, title=title), encoding="utf-8")


def page(results: Sequence[tuple[str, Result]], *, title: str) -> str:
    """The page of one run, or of several side by side; ``results`` have the names that they are called by."""
    names = [name for name, _ in results]
    all_figures = [figures(result) for _, result in results]
    fleets = "; ".join(f"{name}: {found['fleet']}" for name, found in zip(names, all_figures, strict=True))
    cards = [
        card("Figures", table_of(names, rows(all_figures))),
        card("GPUs in use, % of all", key(names) + _over_time(results, _utilization, top=100.0)),
        card("Jobs waiting", key(names) + _over_time(results, lambda r: _series(r, "waiting_jobs"))),
        card("How long jobs wait: share of jobs that start within", key(names) + _waits(results)),
        card("Idle GPUs that the mix cannot use", key(names) + _over_time(results, lambda r: _series(r, "fragmented"))),
        *(card(f"GPUs by tenant: {name}", _tenants(result)) for name, result in results),
        *(card(f"Tenants: {name}", _tenant_table(found)) for name, found in zip(names, all_figures, strict=True)),
    ]
    return frame(title, fleets, cards)


def frame(title: str, below: str, cards: Sequence[str]) -> str:
    """A whole page of cards."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(below)}</p>"
        f'<div class="cards">{"".join(cards)}</div></main></body></html>\n'
    )


def card(title: str, body: str) -> str:
    """A part of a page."""
    return f'<section class="card"><h2>{escape(title)}</h2>{body}</section>'


def key(names: Sequence[str]) -> str:
    """Which colour is which run; nothing for one run."""
    if len(names) < 2:
        return ""
    items = (f'<span><i style="background:{_COLOURS[i % 4]}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="key">{"".join(items)}</div>'


def table_of(names: Sequence[str], lines: Sequence[tuple[str, list[str], str, int]]) -> str:
    """A table of figures, with the last run against the first."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names, *(["change"] if len(names) > 1 else [])))
    body = []
    for name, values, difference, verdict in lines:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        if len(names) > 1:
            colour = {1: ' class="good"', -1: ' class="bad"'}.get(verdict, "")
            cells += f"<td{colour}>{escape(difference)}</td>"
        body.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _tenant_table(found: dict[str, object]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("tenant", "weight", "jobs", "GPU-h", "share", "wait", "slowdown"))
    body = []
    tenants: dict[str, dict[str, object]] = found["tenants"]  # type: ignore[assignment]
    for name, who in list(tenants.items())[:40]:
        wait: dict[str, float] = who["wait_s"]  # type: ignore[assignment]
        slowdown: dict[str, float] = who["slowdown"]  # type: ignore[assignment]
        cells = (
            name, f"{who['weight']:g}", f"{who['submitted']:,}", f"{who['gpu_h']:,.0f}", f"{who['share']:.1%}",
            format_duration(round(wait["mean"] * SECOND_NS)), f"{slowdown['mean']:,.2f}",
        )  # fmt: skip
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


# --- charts ---


def _series(result: Result, name: str) -> Points:
    series = result.measures.series
    width = series.width_ns
    return [((index + 0.5) * width, value) for index, value in enumerate(series.values[name])]


def _utilization(result: Result) -> Points:
    held, capacity = _series(result, "held"), _series(result, "capacity")
    return [(at, 100 * used / of if of else 0.0) for (at, used), (_, of) in zip(held, capacity, strict=True)]


def _over_time(results: Sequence[tuple[str, Result]], find: Callable[[Result], Points], *, top: float = 0.0) -> str:
    return lines_over_time([find(result) for _, result in results], top=top)


def lines_over_time(lines: Sequence[Points], *, top: float = 0.0) -> str:
    """Lines by ns since the beginning."""
    right = max((at for line in lines for at, _ in line), default=1.0)
    high = top or max((value for line in lines for _, value in line), default=0.0) * 1.05 or 1.0
    drawn = []
    for index, line in enumerate(lines):
        points = [(_x(at / right), _y(value / high)) for at, value in line]
        colour = _COLOURS[index % 4]
        if len(lines) == 1 and points:
            closed = [(points[0][0], _y(0)), *points, (points[-1][0], _y(0))]
            drawn.append(f'<path d="{_path(closed)}Z" fill="{colour}" fill-opacity=".14"/>')
        drawn.append(f'<path d="{_path(points)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return _svg(_grid(high) + _time_axis(right) + "".join(drawn))


def _waits(results: Sequence[tuple[str, Result]]) -> str:
    """Cumulative distributions over a logarithmic axis from one second."""
    steps = [result.measures.wait.steps() for _, result in results]
    decades = max(1, math.ceil(math.log10(max((value for line in steps for value, _ in line), default=10) or 10)))
    drawn = []
    for index, line in enumerate(steps):
        points = [(_x(0), _y(next((share for value, share in reversed(line) if value <= 1), 0.0)))]
        for value, share in line:
            if value > 1:
                points += [
                    (_x(math.log10(value) / decades), points[-1][1]),
                    (_x(math.log10(value) / decades), _y(share)),
                ]
        points.append((_x(1), points[-1][1]))
        drawn.append(f'<path d="{_path(points)}" fill="none" stroke="{_COLOURS[index % 4]}" stroke-width="1.8"/>')
    marks = []
    for seconds in (1, 60, 600, 3_600, 6 * 3_600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400):
        place = math.log10(seconds) / decades
        if place <= 1:
            name = "1 s" if seconds == 1 else format_duration(seconds * SECOND_NS).split(" 0")[0].removesuffix(" 00m")
            marks.append(_mark_x(_x(place), name))
    return _svg(_grid(100.0, suffix=" %") + "".join(marks) + "".join(drawn))


def _tenants(result: Result) -> str:
    """What each tenant held, stacked: the largest first, the rest as one."""
    series = result.measures.series
    columns = sorted(result.measures.tenant_series.items(), key=lambda item: -sum(item[1]))
    layers = [(name, list(column)) for name, column in columns[:_MOST_TENANTS]]
    if rest := columns[_MOST_TENANTS:]:
        layers.append(
            (f"{len(rest)} others", [sum(values) for values in zip(*(column for _, column in rest), strict=True)])
        )
    capacity = list(series.values["capacity"])
    high = (
        max([*capacity, *(sum(values) for values in zip(*(c for _, c in layers), strict=True))], default=1.0) * 1.02
        or 1.0
    )
    count = len(capacity)
    right = max(count, 1) * series.width_ns
    floor = [0.0] * count
    drawn, key = [], []
    for index, (name, column) in enumerate(layers):
        ceiling = [low + value for low, value in zip(floor, column, strict=True)]
        up = [(_x((i + 0.5) / max(count, 1)), _y(value / high)) for i, value in enumerate(ceiling)]
        down = [(_x((i + 0.5) / max(count, 1)), _y(value / high)) for i, value in enumerate(floor)]
        colour = _TENANT_COLOURS[index % len(_TENANT_COLOURS)]
        if up:
            drawn.append(f'<path d="{_path([*up, *reversed(down)])}Z" fill="{colour}" fill-opacity=".82"/>')
        key.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
        floor = ceiling
    edge = [(_x((i + 0.5) / max(count, 1)), _y(value / high)) for i, value in enumerate(capacity)]
    drawn.append(f'<path d="{_path(edge)}" fill="none" class="axis" stroke-dasharray="4 3"/>')
    return _svg(_grid(high) + _time_axis(right) + "".join(drawn)) + f'<div class="key">{"".join(key)}</div>'


def _svg(inside: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{inside}</svg>'


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - min(max(share, 0.0), 1.0) * (_HEIGHT - _TOP - _BOTTOM)


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _grid(high: float, *, suffix: str = "") -> str:
    """Horizontal lines at round numbers."""
    step = 10 ** math.floor(math.log10(high / 3)) if high > 0 else 1.0
    step *= next(times for times in (1, 2, 5, 10) if high / (step * times) <= 5)
    lines = []
    for index in range(int(high / step + 1e-9) + 1):
        value, y = index * step, _y(index * step / high)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="axis"/>')
        label = f"{value:,.0f}" if step >= 1 else f"{value:.3g}"
        lines.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}{suffix}</text>')
    return "".join(lines)


def _time_axis(right_ns: float) -> str:
    """Instants since the beginning, in the largest unit that gives at least three marks."""
    unit, name = next(
        ((unit, name) for unit, name in ((DAY_NS, "d"), (HOUR_NS, "h"), (MINUTE_NS, "min")) if right_ns >= 3 * unit),
        (SECOND_NS, "s"),
    )
    total = right_ns / unit
    step = max(1, 10 ** math.floor(math.log10(max(total / 4, 1))))
    step *= next(times for times in (1, 2, 5, 10) if total / (step * times) <= 8)
    count = int(total / step)
    return "".join(_mark_x(_x(index * step / total), f"{index * step} {name}") for index in range(count + 1))


def _mark_x(x: float, label: str) -> str:
    low = _HEIGHT - _BOTTOM
    anchor = "end" if x > _WIDTH - _RIGHT - 20 else "middle"
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low}" y2="{low + 5}" class="axis"/>'
        f'<text x="{x:.1f}" y="{low + 19}" text-anchor="{anchor}">{escape(label)}</text>'
    )
