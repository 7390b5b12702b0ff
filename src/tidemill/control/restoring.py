"""A home folder out of a backup, in steps of which the last decides: before it the old home stands, after it the new.

Everything new is made ready, and checked, in ``restoring/new`` within the home. Then ``restoring/ready.json`` says, in
one durable step, what is to go where. From then on the home is the new one, and ``finish`` moves the pieces: whoever
comes next, a restoring or a start of the cloud, does what a killed one left. ``local/`` stays where it is, so that what
runs there goes on and is found again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from sqlalchemy import select

from tidemill.control.archive import Manifest, cannot, check_sound, rebuild, unpack
from tidemill.control.settings import load_settings
from tidemill.errors import Conflict
from tidemill.store import schema
from tidemill.store.backup import load, revision_of
from tidemill.store.connections import connect

_STAGE: Final = "restoring"
_READY: Final = "ready.json"
_KEPT: Final = ("local", "control.lock", "backups", _STAGE)
"""What of a home stays in its place. Upgrades put their backups into ``backups``."""
_HARMLESS: Final = ("endpoint.json", "control.log", "gateway.log", "gateway.token", "config.yaml")
"""What of a home may be there though it counts as empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored. ``aside`` is where the old home is, None when there was none; ``notes`` are for people."""

    manifest: Manifest
    epoch: int
    database: str
    aside: Path | None
    took_s: float
    notes: tuple[str, ...] = ()


def restore(path: Path, home: Path, *, database: str = "", is_replaced: bool = False, now_ns: int) -> Restored:
    """What is in ``home`` now, from the backup at ``path``. Whoever calls holds the home's lock.

    ``database`` is the address of a PostgreSQL to restore into, or ``sqlite``; empty: as the backup's ``config.yaml``
    says. With ``is_replaced``, what is in the home and in the database is kept under another name; without, it is
    refused. Raises: Conflict, DamagedBackup, InvalidSetting, NotFound, StorageFull; then nothing was changed.
    """
    began = time.monotonic()
    finish(home)
    old = [] if is_replaced else [name for name in _names(home) if name not in _HARMLESS]
    if old:
        raise Conflict(
            f"There is an installation in that home: {', '.join(old)}.",
            field="home",
            value=str(home),
            mend="Name an empty one by TIDEMILL_HOME, or add --replace: what is there is kept under another name.",
        )
    stage = home / _STAGE
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_ns // 1_000_000_000))
    try:
        (stage / "unpacked").mkdir(parents=True, mode=0o700)
        manifest = unpack(path, stage / "unpacked")
        new, tables = stage / "new", stage / "unpacked" / "database"
        new.mkdir(mode=0o700)
        for room in ("blobs", "models", "logs"):
            if (stage / "unpacked" / room).exists():
                (stage / "unpacked" / room).rename(new / room)
        for kept in (stage / "unpacked" / "home").iterdir():
            kept.rename(new / kept.name)
        url, notes = _choose_database(new, database)
        if url:
            rebuild(tables, manifest, stage / "tried.db")
        else:
            epoch = rebuild(tables, manifest, new / "control.db", now_ns=now_ns)
            _flush_database(new / "control.db")
        plan: dict[str, Any] = {"aside": "", "old": _names(home), "database": url, "epoch": 0}
        if plan["old"]:
            plan["aside"] = str(_place_aside(home, stamp))
        if url:
            # Once this is written, the database's epoch tells whether the rest is to be done.
            plan["epoch"] = now_ns // 1_000
            _write_ready(stage, plan)
            epoch = load(
                url, tables, manifest.database, now_ns=now_ns, aside=f"replaced_{stamp}" if is_replaced else ""
            )
            check_sound(url)
        else:
            _write_ready(stage, plan)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise cannot(error, home) from error
    except Exception:
        if not (stage / _READY).exists() or not _is_due(json.loads((stage / _READY).read_text())):
            shutil.rmtree(stage, ignore_errors=True)
        raise
    finish(home)
    return Restored(
        manifest=manifest,
        epoch=epoch,
        database=url or f"sqlite:///{home / 'control.db'}",
        aside=Path(plan["aside"]) if plan["aside"] else None,
        took_s=time.monotonic() - began,
        notes=notes,
    )


def finish(home: Path) -> bool:
    """Whether a restoring that was decided and not finished is finished now; one that was not is undone.

    Whoever calls holds the home's lock. Harmless at any time. Raises: Unavailable, StorageFull.
    """
    stage = home / _STAGE
    if not stage.exists():
        return False
    try:
        plan = json.loads((stage / _READY).read_text()) if (stage / _READY).exists() else None
        if plan is None or not _is_due(plan):
            shutil.rmtree(stage)
            return False
        _move(home, stage, plan)
        shutil.rmtree(stage)
        return True
    except OSError as error:
        raise cannot(error, home) from error


def _is_due(plan: dict[str, Any]) -> bool:
    """Whether the new home counts: always, with its database in it; else when the database was restored, too."""
    if not plan["database"]:
        return True
    database = connect(plan["database"], patience_s=10)
    try:
        with database.reading() as connection:
            epoch = connection.execute(select(schema.leadership.c.epoch)).scalar_one() if revision_of(connection) else 0
        return bool(epoch >= plan["epoch"])
    finally:
        database.close()


def _move(home: Path, stage: Path, plan: dict[str, Any]) -> None:
    """Old pieces aside, then new ones in. Each step may have been done before."""
    if plan["aside"]:
        aside = Path(plan["aside"])
        aside.mkdir(mode=0o700, exist_ok=True)
        for name in plan["old"]:
            if (home / name).exists() and not (aside / name).exists():
                (home / name).rename(aside / name)
        sync_folder(aside)
        sync_folder(aside.parent)
    for path in sorted((stage / "new").iterdir()):
        path.rename(home / path.name)
    sync_folder(home)


def _names(home: Path) -> list[str]:
    """What in a home belongs to its installation."""
    return sorted(
        path.name for path in home.iterdir() if path.name not in _KEPT and not path.name.startswith("replaced-")
    )


def _place_aside(home: Path, stamp: str) -> Path:
    """Where the old home goes: beside it, or into it where that is another file system."""
    beside = home.with_name(f"{home.name}.replaced-{stamp}")
    is_near = home.parent.stat().st_dev == home.stat().st_dev and os.access(home.parent, os.W_OK)
    return beside if is_near else home / f"replaced-{stamp}"


def _choose_database(new: Path, database: str) -> tuple[str, tuple[str, ...]]:
    """The address of a PostgreSQL, empty for the file in the home; and what was changed in ``config.yaml`` for it."""
    told = load_settings(new, {}).database
    wanted = "" if database == "sqlite" or (not database and told.startswith("sqlite:")) else database or told
    if wanted:
        connect(wanted, patience_s=1).close()
        if wanted.startswith("sqlite:"):
            raise Conflict(
                "A home's SQLite database is in the home.", field="database", value=database, mend="Write sqlite."
            )
    if wanted == told:
        return wanted, ()
    path = new / "config.yaml"
    settings = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    settings.pop("database", None)
    if wanted:
        settings["database"] = wanted
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    path.chmod(0o600)
    return wanted, ("config.yaml names the database that was restored into.",)


def _flush_database(path: Path) -> None:
    """Leave one durable file."""
    import sqlite3

    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _write_ready(stage: Path, plan: dict[str, Any]) -> None:
    draft = stage / "ready.new"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(plan, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(stage / _READY)
    sync_folder(stage)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
