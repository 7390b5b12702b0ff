"""``tidemill top``: machines and jobs, live."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from tidemill.cli.cloud import node_row
from tidemill.cli.jobs import ACTIVE, brief
from tidemill.cli.output import age, emit, emit_line, resources, say
from tidemill.cli.parsing import InProject, Json
from tidemill.sdk.client import Client
from tidemill.sdk.results import Job, NodeInfo, Status
from tidemill.units import MILLI

_COLOURS = {"running": "green", "starting": "cyan", "queued": "yellow", "stopping": "yellow", "failed": "red"}
_ROWS = 20


def top_command(
    once: Annotated[bool, typer.Option("--once", help="Show it once.")] = False,
    interval: Annotated[float, typer.Option("--interval", metavar="S", min=0.2, help="Seconds between looks.")] = 1.0,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Machines and jobs, live. Ctrl-C ends it."""
    with Client(project=project) as client:
        if json:
            while True:
                status, nodes, jobs = _look(client)
                seen = {
                    "status": status.to_json(),
                    "nodes": [node.to_json() for node in nodes],
                    "jobs": [job.to_json() for job in jobs],
                }
                if once:
                    emit(seen)
                    return
                emit_line(seen)
                time.sleep(interval)
        _show(client, once=once, interval=interval)


def _look(client: Client) -> tuple[Status, tuple[NodeInfo, ...], list[Job]]:
    return client.status(), client.nodes(), list(client.jobs(state=ACTIVE, limit=_ROWS + 1))


def _show(client: Client, *, once: bool, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if once or not console.is_terminal:
        console.print(_screen(*_look(client)))
        return
    with Live(_screen(*_look(client)), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                live.update(_screen(*_look(client)), refresh=True)
        except KeyboardInterrupt:
            pass
    say()


def _screen(status: Status, nodes: tuple[NodeInfo, ...], jobs: list[Job]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tally = "   ".join(f"{number} {name}" for name, number in status.jobs.items() if number)
    head = Text.assemble(("tidemill", "bold"), f" {status.version}   ", (tally or "no jobs", "dim"))
    machines = _grid(Table, ("machine", "state", "gpus", "cpu", "memory", "in use"))
    for node in nodes:
        row = node_row(node)
        used = 1 - node.free_cpu_milli / node.cpu_milli if node.cpu_milli else 0.0
        machines.add_row(row[0], Text.from_ansi(row[1]), *row[2:5], _bar(used))
    work = _grid(Table, ("job", "id", "state", "for", "resources", "why"))
    for job in jobs[:_ROWS]:
        since = job.started_at_ns if job.state == "running" else job.submitted_at_ns
        work.add_row(
            job.name,
            Text(job.id, style="dim"),
            Text(job.state, style=_COLOURS.get(job.state, "")),
            age(since),
            resources(job.resources),
            Text(brief(job), style="dim", overflow="ellipsis", no_wrap=True),
        )
    parts: list[Any] = [head, Text(), machines, Text()]
    if jobs:
        parts.append(work)
    if len(jobs) > _ROWS:
        parts.append(Text("… more; tidemill ps lists all", style="dim"))
    free = f"{status.free_cpu_milli / MILLI:g} of {status.cpu_milli / MILLI:g} CPU free"
    parts += [Text(), Text(free, style="dim")]
    return Group(*parts)


def _grid(table: Any, headings: tuple[str, ...]) -> Any:
    made = table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading in headings:
        made.add_column(heading.upper())
    return made


def _bar(share: float, columns: int = 12) -> Any:
    from rich.text import Text

    full = round(share * columns)
    return Text.assemble(("━" * full, "green"), ("━" * (columns - full), "bright_black"), (f" {share:4.0%}", "dim"))
