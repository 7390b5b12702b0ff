"""How quotes and receipts look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tidemill.cli.jobs import forecast_rows
from tidemill.cli.output import ESTIMATED, count, emit, facts, paint, resources, say, state, table, until
from tidemill.errors import ErrorKind
from tidemill.sdk.results import Option, Quote, Receipt, SiteOption
from tidemill.units import format_carbon, format_duration, format_energy, format_size, format_usd


def show_quote(quote: Quote, spec: Mapping[str, Any], *, is_json: bool) -> int:
    """The exit status of a quote: 0 when the fleet can run it, else that of an infeasible request."""
    status = 0 if quote.feasible else ErrorKind.INFEASIBLE.exit_status
    if is_json:
        emit(quote.to_json())
        return status
    nodes = spec.get("nodes") or 1
    each = resources(spec.get("resources"))
    size = (count(nodes, "worker") if isinstance(nodes, int) else f"{nodes} workers") + (f" × {each}" if each else "")
    say(f"{paint(str(spec.get('name') or 'quote'), 'bold')}  {paint(size, 'muted')}")
    facts(quote_rows(quote))
    show_sites(quote.sites)
    if quote.options:
        say(f"  {paint('or', 'muted')}")
        headings = ("  with", "starts", "finishes", "cost", "energy", "carbon")
        table(headings, [_option_row(option) for option in quote.options])
    return status


def show_sites(sites: Sequence[SiteOption]) -> None:
    """How it would be at each site, best first."""
    if not sites:
        return
    say(f"  {paint('at', 'muted')}")
    rows = [
        (
            f"    {one.site}",
            str(one.rank or "–"),
            _starts_there(one),
            format_usd(one.amount_micro) if one.rank else "",
            format_carbon(one.carbon_mg) if one.rank else "",
            f"{one.latency_ns / 1e6:g} ms" if one.latency_ns is not None and one.rank and has_latency else "",
            one.reason.sentence if one.reason is not None else "",
        )
        for has_latency in [any(one.latency_ns for one in sites)]
        for one in sites
    ]
    table(("    site", "tried", "starts", "cost", "carbon", "latency", "why not now"), rows, flexible=6)


def _starts_there(option: SiteOption) -> str:
    if not option.rank:
        return paint("never", "red")
    copying = f", {format_duration(option.copy_ns)} of copying" if option.copy_ns else ""
    if option.starts_at_ns:
        return (until(option.starts_at_ns) if option.reason or option.copy_ns else paint("now", "green")) + copying
    return "not foreseen"


def _option_row(option: Option) -> tuple[str, ...]:
    return (
        f"  {option.change}",
        until(option.starts_at_ns) if option.starts_at_ns else "",
        until(option.finish_at_ns) if option.finish_at_ns else "",
        format_usd(option.amount_micro),
        format_energy(option.energy_mj),
        format_carbon(option.carbon_mg),
    )


def quote_rows(quote: Quote) -> list[tuple[str, str]]:
    """A quote's names and values."""
    if not quote.feasible:
        return [
            ("feasible", paint("no", "red")),
            *(("because", reason.sentence) for reason in quote.reasons),
            *(("try", suggestion) for suggestion in quote.suggestions),
        ]
    where = ", ".join(f"{node} × {number}" if number > 1 else node for node, number in _placed(quote).items())
    wait = quote.reasons[0].sentence if quote.reasons else "when there is room"
    given = "at most, by max_duration" if quote.duration_known else "assumed; set max_duration for a better answer"
    mark = paint(ESTIMATED, "muted")
    copied = f"{format_size(quote.copy_bytes)} in {format_duration(quote.copy_ns)}"
    now = paint("now", "green") + (f", on {where}" if where else "")
    return [
        ("feasible", paint("yes", "green")),
        ("starts", now if quote.starts_now else f"later: {wait}"),
        *(("expected", text) for name, text in forecast_rows(quote.forecast) if name == "starts"),
        ("finishes", until(quote.finish_at_ns) if quote.finish_at_ns else ""),
        ("displaces", count(len(quote.displaces), "job") if quote.displaces else ""),
        ("copies", f"{copied}  {mark}" if quote.copy_ns else ""),
        ("runs", f"{format_duration(quote.duration_ns)}  {paint(given, 'muted')}"),
        ("cost", f"{format_usd(quote.amount_micro)}  {mark}"),
        ("energy", f"{format_energy(quote.energy_mj)}  {mark}"),
        ("carbon", f"{format_carbon(quote.carbon_mg)}  {mark}"),
        *(("hint", suggestion) for suggestion in quote.suggestions),
    ]


def _placed(quote: Quote) -> Counter[str]:
    nodes: Counter[str] = Counter()
    for place in quote.placement:
        nodes[str(place.get("node", "")) if isinstance(place, Mapping) else str(place[0])] += 1
    return nodes


def show_receipt(receipt: Receipt) -> None:
    """A receipt for people."""
    say(f"{paint(receipt.name, 'bold')}  {state(receipt.state)}  {paint(receipt.job, 'muted')}")
    facts(receipt_rows(receipt))


def receipt_rows(receipt: Receipt) -> list[tuple[str, str]]:
    """A receipt's names and values."""
    used = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in receipt.device_seconds.items())
    priced = f"rate card {receipt.rate_card}" if receipt.rate_card else ""
    return [
        ("queue wait", format_duration(receipt.queue_wait_ns)),
        ("preparing", format_duration(receipt.prepare_ns)),
        ("run time", format_duration(receipt.run_ns)),
        ("held", used),
        ("cost", f"{format_usd(receipt.amount_micro)}  {paint(priced, 'muted')}".rstrip()),
        ("energy", f"{format_energy(receipt.energy_mj)}  {paint(receipt.energy_evidence or ESTIMATED, 'muted')}"),
        ("carbon", f"{format_carbon(receipt.carbon_mg)}  {paint(receipt.carbon_source or ESTIMATED, 'muted')}"),
    ]
