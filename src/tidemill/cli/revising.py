"""Services that are updated while they run: ``update``, ``revisions``, ``promote``, ``abort``, ``rollback``."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from tidemill.cli.output import clock, count, emit, note, paint, say, show_error, table
from tidemill.cli.parsing import InProject, Json
from tidemill.cli.running import INTERRUPTED, RunOptions, read_request
from tidemill.cli.ticker import Ticker
from tidemill.errors import TidemillError
from tidemill.sdk.client import Client
from tidemill.sdk.results import Revision, Revisions
from tidemill.units import format_duration

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The service's name.")]
_Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return at once; it goes on by itself.")]
_POLL_S = 0.25


def update_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A workload file of the service; - for standard input.")],
    canary: Annotated[
        str | None, typer.Option("--canary", metavar="PART", help="Only for 10% of the requests, until it is promoted.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Exchange its replicas though nothing is different.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Set a variable; repeatable.")
    ] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", metavar="FOLDER", help="Folder to take along.")] = None,
    detach: _Detach = False,
    project: InProject = None,
    json: Json = False,
) -> int:
    """Update a service that runs: its replicas are exchanged one after the other, and no request fails.

    Examples: tidemill update chat.yaml; tidemill update chat.yaml --canary 10%
    """
    request = read_request(RunOptions(file=file, env=tuple(env or ()), workdir=workdir))
    if canary is not None:
        service = request.spec.get("service")
        section = dict(service) if isinstance(service, dict) else {}
        rollout = section.get("rollout")
        steps = {"canary": int(canary) if canary.isdigit() else canary}
        section["rollout"] = {**(rollout if isinstance(rollout, dict) else {}), **steps}
        request.spec["service"] = section
    name = str(request.spec["name"])
    try:
        with Client(project=project) as client:
            client.update(name, request.spec, workdir=request.workdir, restart=restart)
            return _follow(client, name, is_detached=detach, is_json=json)
    except TidemillError as error:
        if request.source is None or not (error.field or error.data.get("errors")):
            raise
        show_error(error, lines=request.source.line_of, source=request.source.source)
        return error.kind.exit_status


def revisions_command(name: _Name, project: InProject = None, json: Json = False) -> None:
    """The revisions of a service, and how far the exchange of its replicas is."""
    with Client(project=project) as client:
        found = client.revisions(name)
    if json:
        emit(found.to_json())
        return
    headings = ("revision", "state", "ready", "requests", "submitted", "by", "detail")
    table(headings, [_row(one) for one in found.items], flexible=6)
    if found.rollout is not None:
        note(_told(found))


def promote_command(
    name: _Name,
    everything: Annotated[bool, typer.Option("--all", help="Skip the other steps of the canary.")] = False,
    detach: _Detach = False,
    project: InProject = None,
    json: Json = False,
) -> int:
    """Let a canary have its next part of the requests; after the last step, all of them."""
    with Client(project=project) as client:
        client.promote(name, everything=everything)
        return _follow(client, name, is_detached=detach, is_json=json)


def abort_command(name: _Name, detach: _Detach = False, project: InProject = None, json: Json = False) -> int:
    """Take a revision back that is being rolled out: the one before takes its place again."""
    with Client(project=project) as client:
        client.abort(name)
        return _follow(client, name, is_detached=detach, is_json=json, wants="reverted")


def rollback_command(
    name: _Name,
    revision: Annotated[int, typer.Option("--to", metavar="REVISION", min=0, help="Which; the one before.")] = 0,
    detach: _Detach = False,
    project: InProject = None,
    json: Json = False,
) -> int:
    """Go back to an earlier revision of a service, without a canary; what is being rolled out is aborted."""
    with Client(project=project) as client:
        before = client.revisions(name)
        is_abort = before.rollout is not None and not revision
        client.rollback(name, revision)
        return _follow(client, name, is_detached=detach, is_json=json, wants="reverted" if is_abort else "complete")


def _row(one: Revision) -> tuple[str, ...]:
    back = f"as revision {one.back_to}" if one.back_to else ""
    return (
        str(one.revision),
        one.state,
        str(one.ready) if one.state in ("running", "coming", "going") else "",
        f"{one.weight} %" if one.weight is not None else "",
        clock(one.submitted_ns),
        one.by,
        "; ".join(part for part in (back, one.detail) if part),
    )


def _told(found: Revisions) -> str:
    """How far a rollout is, in a line."""
    rollout = found.rollout
    if rollout is None:
        return ""
    there = f"{rollout.ready_new} of revision {rollout.revision} and {rollout.ready_old} of {rollout.before} ready"
    if rollout.state == "canary" and rollout.step < len(rollout.steps):
        step = rollout.steps[rollout.step]
        lasts = f"for {format_duration(step['for_ns'])}" if step["for_ns"] else f"until tidemill promote {found.name}"
        return f"revision {rollout.revision} gets {step['weight']} % of the requests {lasts}: {there}"
    if rollout.state == "returning":
        return f"revision {rollout.revision} is taken back ({rollout.detail}): {there}"
    return f"revision {rollout.revision} takes the place of {rollout.before}: {there}"


def _follow(client: Client, name: str, *, is_detached: bool, is_json: bool, wants: str = "complete") -> int:
    """0 once the rollout came to the end that was wanted, or waits for somebody; 1 when it came to the other."""
    found = client.revisions(name)
    if not is_detached:
        with Ticker(is_silent=is_json or not sys.stderr.isatty()) as ticker:
            try:
                while found.rollout is not None and not _waits(found):
                    ticker.say(_told(found))
                    time.sleep(_POLL_S)
                    found = client.revisions(name)
            except KeyboardInterrupt:
                ticker.close()
                note(f"\nit goes on by itself: tidemill revisions {name}, tidemill abort {name}")
                return INTERRUPTED
    if is_json:
        emit(found.to_json())
    elif found.rollout is not None:
        say(_told(found))
        note(f"  tidemill revisions {name}   tidemill promote {name}   tidemill abort {name}")
    newest = max(found.items, key=lambda one: one.revision)
    is_back = newest.state == "taken back"
    if found.rollout is None and not is_json:
        running = next((one for one in found.items if one.state == "running"), None)
        if running is not None:
            ready = count(running.ready, "replica")
            say(f"{paint('running', 'green')} {name} revision {running.revision}, {ready} ready")
        if is_back:
            note(
                f"revision {newest.revision} was taken back: {newest.detail}",
                "yellow" if wants == "reverted" else "red",
            )
    return int(found.rollout is None and is_back and wants == "complete")


def _waits(found: Revisions) -> bool:
    """Whether nothing happens until somebody promotes or aborts."""
    rollout = found.rollout
    if rollout is None or rollout.state != "canary" or not rollout.watched_ns or rollout.step >= len(rollout.steps):
        return False
    return not rollout.steps[rollout.step]["for_ns"]
