"""Keeping an installation safe: ``backup``, ``backup verify``, ``restore``, ``strangers``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tidemill.cli.output import clock, count, emit, facts, note, paint, say, table
from tidemill.cli.parsing import Json, group_of
from tidemill.cli.ticker import Ticker
from tidemill.control.archive import Manifest
from tidemill.errors import InvalidRequest
from tidemill.sdk import connection
from tidemill.sdk.client import Client
from tidemill.sdk.results import Stranger
from tidemill.units import format_size


def backup_command(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[verify] [PATH]",
            help="The file to write, compressed when its name ends in gz; or the one to check.",
            show_default=False,
        ),
    ] = None,
    logs: Annotated[bool, typer.Option("--logs/--no-logs", help="With the output of jobs.")] = True,
    database: Annotated[
        str | None, typer.Option("--database", metavar="URL", help="As the cloud was started with.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a verified backup while the cloud runs; or check one that was written."""
    from tidemill import bootstrap
    from tidemill.control.archive import verify_backup

    words = what or [time.strftime("tidemill-%Y%m%d-%H%M%S.tar.gz")]
    if words[0] == "verify" and len(words) == 2:
        path, verb = Path(words[1]).absolute(), "whole and sound"
        with Ticker("reading it and trying its database out", is_silent=json):
            manifest = verify_backup(path)
    elif len(words) == 1 and words[0] != "verify":
        path, verb = Path(words[0]).absolute(), "written and verified"
        with Ticker("backing up", is_silent=json):
            manifest = bootstrap.backup(connection.home(), path, logs=logs, database=database or "")
    else:
        raise InvalidRequest("that is not one file", field="PATH", value=" ".join(words), mend="tidemill backup --help")
    if json:
        told = manifest.to_json()
        emit(
            {"path": str(path)} | {name: told[name] for name in told if name != "files"} | {"files": len(told["files"])}
        )
        return
    say(paint(f"{path.name} is {verb}", "green"))
    facts([("path", str(path)), *_rows(manifest), ("size", format_size(path.stat().st_size))])
    if manifest.missing:
        note(
            f"  {count(len(manifest.missing), 'blob')} that work names was not in the home: {manifest.missing[0]}",
            "yellow",
        )
    if verb.startswith("written"):
        note("  it holds the key behind all tokens and secrets: keep it where nobody else reads it")


def restore_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The backup.", show_default=False)],
    replace: Annotated[
        bool, typer.Option("--replace", help="Keep what is there under another name, and put the backup in its place.")
    ] = False,
    database: Annotated[
        str | None,
        typer.Option("--database", metavar="URL", help="Restore into this PostgreSQL; or sqlite, for the home's file."),
    ] = None,
    json: Json = False,
) -> None:
    """Put a backup into an empty home, or with --replace into a stopped one. Everything is checked first."""
    from tidemill import bootstrap

    home = connection.home()
    with Ticker("checking the backup and restoring it", is_silent=json):
        done = bootstrap.restore(path.absolute(), home, database=database or "", is_replaced=replace)
    if json:
        emit(
            {
                "home": str(home),
                "made_at_ns": done.manifest.made_ns,
                "events": done.manifest.database.last_seq,
                "epoch": done.epoch,
                "kept": str(done.aside) if done.aside else None,
                "took_s": round(done.took_s, 3),
                "notes": list(done.notes),
            }
        )
        return
    say(paint(f"restored into {home}", "green"))
    facts(
        [
            *_rows(done.manifest),
            ("epoch", f"{done.epoch}  {paint('above all that was given before', 'muted')}"),
            ("kept", str(done.aside) if done.aside else ""),
        ]
    )
    for line in done.notes:
        note(f"  {line}")
    note("  tidemill up adopts the jobs that run on; tidemill strangers list shows what it has never heard of")


def strangers_list(json: Json = False) -> None:
    """Launches that are on the engine and that the database has never heard of."""
    with Client() as client:
        found = client.strangers()
    if json:
        emit([one.to_json() for one in found])
    elif not found:
        say("no strangers")
    else:
        rows = [(one.launch, one.state, _fate(one), clock(one.seen_at_ns)) for one in found]
        table(("launch", "state", "what becomes of it", "seen"), rows)
        note("  tidemill strangers end LAUNCH ends one")


def strangers_end(
    launches: Annotated[
        list[str] | None, typer.Argument(metavar="LAUNCH…", help="Which to end.", show_default=False)
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    grace: Annotated[float, typer.Option("--grace", metavar="S", help="Before they are killed, in seconds.")] = 30.0,
    json: Json = False,
) -> None:
    """End launches that the database has never heard of; what they wrote stays in their job's folders."""
    if bool(launches) is everyone:
        raise InvalidRequest("name launches, or all", field="LAUNCH", mend="tidemill strangers list shows them.")
    with Client() as client:
        named = [one.launch for one in client.strangers()] if everyone else launches or []
        ended = [client.end_stranger(launch, grace_s=grace) for launch in named]
    if json:
        emit([one.to_json() for one in ended])
    for one in () if json else ended:
        say(f"{one.launch} is stopped" if one.state == "alive" else f"{one.launch} is forgotten")


def _fate(one: Stranger) -> str:
    if one.state != "alive":
        return "nothing of it runs; kept until it is ended"
    return "ends when its job is started again" if one.job_known else "is left alone until somebody ends it"


strangers_app = group_of(
    "Launches that are newer than the backup that was restored.", list=strangers_list, end=strangers_end
)


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What a backup is of."""
    database = manifest.database
    jobs = database.tables.get("jobs", 0)
    return [
        ("of", clock(manifest.made_ns)),
        ("version", f"{manifest.version}, schema {database.revision}, {database.kind}"),
        ("holds", f"{count(jobs, 'job')}, {count(database.last_seq, 'event')}, {count(len(manifest.files), 'file')}"),
    ]
