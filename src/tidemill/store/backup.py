"""A database as neutral rows: out of SQLite or PostgreSQL at one instant, and into either of them.

A table is the file ``<table>.jsonl``: a line with the names of its columns, then a line for each row, JSON arrays
both, in the order of the primary key. Nothing in it is of one database, so a copy of either goes into the other.
``DatabaseCopy`` says of which schema the rows are; an older one is loaded as it was and migrated then.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, MetaData, Table, bindparam, delete, func, insert, inspect, select, text, update

from tidemill.core.lifecycle import is_terminal
from tidemill.errors import DamagedBackup, InvalidSetting, NotFound
from tidemill.model.job import Job, JobState
from tidemill.model.values import replace
from tidemill.store import schema
from tidemill.store.codec import decode, encode
from tidemill.store.connections import Database, connect
from tidemill.store.sql import upgrade

EPOCH_STRIDE: Final = 1 << 20
"""By how much at least epochs lie above the copy's after a restoring: more leaders than there can have been since. Far
less than an hour of microseconds, so that a later restoring of an older copy gives later epochs nevertheless."""
FENCES_FROM_S: Final = 1_767_225_600
"""The instant, 2026-01-01 in seconds, from which the seconds are counted at which fences go on after a restoring."""
FENCE_STRIDE: Final = 1_000_000
"""By how much at least a job's fences lie above those of the copy, whatever the clock says."""
_PATIENCE_S: Final = 60.0
_PAGES_AT_ONCE: Final = 4_096
_ROWS_AT_ONCE: Final = 2_000
_VERSIONS: Final = "alembic_version"
_LIVE: Final = [state.value for state in JobState if not is_terminal(state)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseCopy:
    """What a copy is of: its kind of database, schema, newest epoch and event, and the number of rows by table."""

    kind: str
    revision: str
    epoch: int
    last_seq: int
    tables: dict[str, int]


def export(url: str, folder: Path) -> DatabaseCopy:
    """What was copied, at one instant, of the database at ``url`` into the empty ``folder``. Whoever writes goes on.

    Raises: NotFound when there is none, InvalidSetting when it is not Tidemill's, Unavailable, StorageFull, OSError.
    """
    if url.startswith("sqlite:///"):
        pages = folder / "pages.db"
        copy_pages(Path(url.removeprefix("sqlite:///")), pages)
        try:
            return _export(f"sqlite:///{pages}", folder)
        finally:
            for left in folder.glob("pages.db*"):
                left.unlink()
    return _export(url, folder)


def copy_pages(source: Path, target: Path) -> None:
    """Copy a SQLite file while others write to it; ``target`` is whole then. Raises: NotFound, InvalidSetting, OSError.

    A reader's transaction around all steps holds one instant, so that commits do not make the copy start again.
    """
    if not source.exists():
        raise NotFound(
            "There is no database there.", field="database", value=str(source), mend="Name it with --database URL."
        )
    try:
        with (
            contextlib.closing(sqlite3.connect(source, timeout=_PATIENCE_S, isolation_level=None)) as reader,
            contextlib.closing(sqlite3.connect(target, isolation_level=None)) as writer,
        ):
            target.chmod(0o600)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
            reader.backup(writer, pages=_PAGES_AT_ONCE, sleep=0)
            reader.execute("ROLLBACK")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise OSError(28, "No space left on device, or it fails", str(target)) from error
        raise InvalidSetting(f"The database cannot be copied: {error}.", field="database", value=str(source)) from error


def _export(url: str, folder: Path) -> DatabaseCopy:
    database = connect(url, patience_s=_PATIENCE_S)
    try:
        with database.reading() as connection:
            revision = revision_of(connection)
            if not revision:
                raise InvalidSetting(
                    "There is nothing of Tidemill in that database.", field="database", mend="Start the cloud once."
                )
            leads = connection.execute(select(schema.leadership.c.epoch, schema.leadership.c.last_seq)).one()
            counts = {name: _write(connection, name, folder / f"{name}.jsonl") for name in tables_of(connection)}
            kind = "sqlite" if database.is_sqlite else "postgresql"
            return DatabaseCopy(kind=kind, revision=revision, epoch=leads.epoch, last_seq=leads.last_seq, tables=counts)
    finally:
        database.close()


def _write(connection: Connection, name: str, path: Path) -> int:
    """The number of rows of the table, now in that file."""
    table = Table(name, MetaData(), autoload_with=connection)
    encoder, count = msgspec.json.Encoder(), 0
    rows = connection.execute(
        select(table).order_by(*table.primary_key.columns),
        execution_options={"stream_results": True, "yield_per": _ROWS_AT_ONCE},
    )
    with path.open("xb") as file:
        file.write(encoder.encode([str(column.name) for column in table.columns]) + b"\n")
        for part in rows.partitions():
            file.write(encoder.encode_lines([tuple(row) for row in part]))
            count += len(part)
    return count


def revision_of(connection: Connection) -> str:
    """The schema's revision; empty when nothing of Tidemill is there."""
    if not inspect(connection).has_table(_VERSIONS):
        return ""
    return str(connection.execute(text(f"SELECT version_num FROM {_VERSIONS}")).scalar() or "")  # noqa: S608 - ours


def tables_of(connection: Connection) -> list[str]:
    """The names of all tables of the database, by name."""
    return sorted(name for name in inspect(connection).get_table_names() if name != _VERSIONS)


def check_revision(revision: str, *, version: str) -> None:
    """Nothing, when this version can read a copy of that schema. Raises: InvalidSetting."""
    if revision > schema.HEAD:
        raise InvalidSetting(
            f"The backup is of a later version, Tidemill {version} (schema {revision}; this one knows {schema.HEAD}).",
            field="backup",
            value=version,
            mend="Upgrade Tidemill first: pip install -U tidemill.",
        )


def load(
    url: str, folder: Path, copy: DatabaseCopy, *, now_ns: int | None, aside: str = "", is_migrated: bool = True
) -> int:
    """The newest epoch of the database at ``url``, which is now that of the copy, migrated unless said otherwise.

    All in one transaction. With ``now_ns`` epochs and fences jump (``jump``). ``aside`` is the schema of PostgreSQL
    into which tables that are there already are moved; without it they are refused.
    Raises: Conflict as said, DamagedBackup when rows are missing or cannot be, StorageFull, Unavailable.
    """
    database = connect(url, patience_s=_PATIENCE_S)
    try:
        with database.writing() as connection:
            before = _make_room(connection, database, aside)
            upgrade(connection, copy.revision)
            for name in tables_of(connection):
                _read(connection, name, folder / f"{name}.jsonl", copy.tables.get(name, -1))
            if not database.is_sqlite:
                _set_counters(connection)
            if is_migrated:
                upgrade(connection)
            if now_ns is not None:
                return jump(connection, now_ns=now_ns, above=before)
            return copy.epoch
    finally:
        database.close()


def _make_room(connection: Connection, database: Database, aside: str) -> int:
    """The newest epoch of what was there, zero when nothing was. Raises: Conflict."""
    from tidemill.errors import Conflict

    if not revision_of(connection):
        return 0
    if database.is_sqlite or not aside:
        raise Conflict(
            "There is a Tidemill in that database already.",
            field="database",
            mend="Name an empty one, or add --replace: what is there is kept under another name.",
        )
    epoch = connection.execute(select(schema.leadership.c.epoch)).scalar_one()
    connection.execute(text(f'CREATE SCHEMA "{aside}"'))
    for name in (*tables_of(connection), _VERSIONS):
        connection.execute(text(f'ALTER TABLE "{name}" SET SCHEMA "{aside}"'))
    return int(epoch)


def _read(connection: Connection, name: str, path: Path, expected: int) -> None:
    table = Table(name, MetaData(), autoload_with=connection)
    connection.execute(delete(table))
    if not path.exists():
        raise DamagedBackup("A table is missing in the backup.", field="table", value=name)
    count = 0
    try:
        with path.open("rb") as file:
            columns: list[str] = msgspec.json.decode(file.readline(), type=list[str])
            if set(columns) != set(table.columns.keys()):
                raise DamagedBackup(f"The table {name} has other columns.", field="table", value=name)
            for part in _parts(file):
                connection.execute(insert(table), [dict(zip(columns, row, strict=True)) for row in part])
                count += len(part)
    except (msgspec.DecodeError, ValueError) as error:
        raise DamagedBackup(f"A row of {name} cannot be read: {error}.", field="table", value=name) from error
    if count != expected:
        raise DamagedBackup(f"The table {name} has {count} rows and not {expected}.", field="table", value=name)


def _parts(lines: Any) -> Iterator[Sequence[list[Any]]]:
    decoder = msgspec.json.Decoder(list[Any])
    part: list[list[Any]] = []
    for line in lines:
        part.append(decoder.decode(line))
        if len(part) == _ROWS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _set_counters(connection: Connection) -> None:
    """Let PostgreSQL number new rows after those that were put in with their numbers."""
    for name in tables_of(connection):
        table = Table(name, MetaData(), autoload_with=connection)
        for column in table.primary_key.columns:
            counter = select(func.pg_get_serial_sequence(f'"{name}"', column.name))
            if (found := connection.execute(counter).scalar()) is not None:
                newest = connection.execute(select(func.max(column))).scalar()
                connection.execute(select(func.setval(found, newest or 1, newest is not None)))


def jump(connection: Connection, *, now_ns: int, above: int = 0) -> int:
    """The newest epoch, after epochs and fences were moved past all that anybody can have given since the copy.

    The epoch becomes the instant in us, at least ``EPOCH_STRIDE`` above the copy's and ``above``: so restoring one copy
    twice gives two ranges. Numbers of attempts, which are the fences of leases and part of the names of launches, go
    on from the instant in seconds since 2026, for each job that is not over; no other job can be tried again.
    """
    leads = schema.leadership.c
    known: int = connection.execute(select(leads.epoch)).scalar_one()
    epoch = max(known + EPOCH_STRIDE, above + EPOCH_STRIDE, now_ns // 1_000)
    connection.execute(update(schema.leadership).values(epoch=epoch, holder="restored"))
    jobs = schema.jobs.c
    live = connection.execute(select(jobs.id, jobs.body).where(jobs.state.in_(_LIVE))).all()
    fence = now_ns // 1_000_000_000 - FENCES_FROM_S
    rows = []
    for job_id, body in live:
        job = decode(Job, body)
        moved = replace(job, fence_base=max(fence, job.fence_base + FENCE_STRIDE))
        rows.append({"key": job_id, "body": encode(moved)})
    if rows:
        connection.execute(update(schema.jobs).where(jobs.id == bindparam("key")).values(body=bindparam("body")), rows)
    return epoch
