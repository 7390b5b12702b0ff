"""Keeping an installation safe: ``backup``, ``backup verify``, ``restore``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tidemill.cli.output import clock, count, emit, facts, note, paint, say
from tidemill.cli.parsing import Json
from tidemill.cli.ticker import Ticker
from tidemill.control.archive import Manifest
from tidemill.errors import InvalidRequest
from tidemill.sdk import connection
from tidemill.units import format_size


def backup_command(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH | verify PATH]",
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
    note("  tidemill up adopts the jobs that run on; tidemill strangers shows what it has never heard of")


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What a backup is of."""
    database = manifest.database
    jobs = database.tables.get("jobs", 0)
    return [
        ("of", clock(manifest.made_ns)),
        ("version", f"{manifest.version}, schema {database.revision}, {database.kind}"),
        ("holds", f"{count(jobs, 'job')}, {count(database.last_seq, 'event')}, {count(len(manifest.files), 'file')}"),
    ]
