"""What requests to models took and were decided on: ``usage``, ``guards``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from tidemill.cli.output import ESTIMATED, age, emit, note, paint, say, table
from tidemill.cli.parsing import InProject, Json
from tidemill.sdk.client import Client
from tidemill.units import USD_MICRO, format_energy, format_usd

_COLOURS = {"refuse": "red", "redact": "yellow", "flag": "cyan", "allow": "muted"}


def usage_command(
    by: Annotated[
        str, typer.Option("--by", metavar="WHAT", help="model, key, user or label; several with commas.")
    ] = "model",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Tokens by model, key, user or label; and what a thousand tokens of each model took in money and energy."""
    with Client(project=project) as client:
        totals = client.usage(by=[part for part in by.split(",") if part])
        costs = client.model_costs()
    if json:
        emit({**totals, "models": costs})
        return
    if not totals["tokens"] and not costs:
        say("no requests to models yet")
        return
    names = [name for name in ("model", "token_id", "user", "label") if any(one[name] for one in totals["tokens"])]
    table(
        [*("key" if name == "token_id" else name for name in names), "requests", "tokens in", "tokens out", "charged"],
        [_total_row(one, names) for one in totals["tokens"]],
        flexible=0,
    )
    if costs:
        say()
        table(
            ("model", "tokens", "machines", "energy", "per 1k tokens", "energy per 1k"),
            [_cost_row(one) for one in costs],
            flexible=0,
        )
        note("machines and energy are those of the replicas from their start on, idle time among it")


def guards_command(
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Only of that model.")] = "",
    rule: Annotated[str, typer.Option("--rule", metavar="NAME", help="Only of that rule.")] = "",
    action: Annotated[str, typer.Option("--action", metavar="WHAT", help="allow, flag, redact or refuse.")] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="How many, newest first.")] = 20,
    project: InProject = None,
    json: Json = False,
) -> None:
    """What guardrails decided about requests to models, newest first. No words of them are kept."""
    with Client(project=project) as client:
        decisions = client.decisions(model=model, rule=rule, action=action, limit=limit)
    if json:
        emit([one.to_json() for one in decisions])
        return
    if not decisions:
        say("no decisions yet")
        return
    rows = [
        (
            age(one.at_ns),
            one.model,
            one.rule,
            one.stage,
            paint(one.action, _COLOURS.get(one.action, "")),
            ", ".join(f"{label} ×{count}" if count > 1 else label for label, count in one.found.items()),
            one.token_id,
            one.request_id,
        )
        for one in decisions
    ]
    table(("age", "model", "rule", "on", "action", "found", "key", "request"), rows, flexible=5)


def _total_row(one: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    requests = f"{one['requests']:,}" + (f" ({one['estimated']:,} {ESTIMATED})" if one["estimated"] else "")
    charged = format_usd(one["amount_micro"]) if one["amount_micro"] else ""
    tokens = (f"{one['prompt_tokens']:,}", f"{one['completion_tokens']:,}")
    return (*(one[name] for name in names), requests, *tokens, charged)


def _cost_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    mark = f" ({ESTIMATED})" if one["energy_evidence"] == ESTIMATED else ""
    return (
        one["model"],
        f"{one['prompt_tokens'] + one['completion_tokens']:,}",
        format_usd(one["amount_micro"]),
        format_energy(one["energy_mj"]) + mark,
        f"${one['amount_micro_per_1k_tokens'] / USD_MICRO:.6f}",
        format_energy(one["energy_mj_per_1k_tokens"]),
    )
