"""``tidemill upgrade``: another version in the place of the one that runs, while jobs go on; and back if it fails.

1. The new version is asked who it is. 2. A backup is written and verified while the old one runs; verifying migrates
the copy, so a migration that fails ends it here. 3. The old control plane ends; runners go on and keep what they have
to say. 4. Its last state is copied. 5. The new one starts, migrates the database, answers, and hears of the runners.
When 5 fails, the copy of 4 is put back, with epochs and fences that the new one cannot have given, and the old version
is started, if it is still installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy import URL, create_engine

from tidemill import bootstrap
from tidemill.cli.output import emit, facts, note, paint, say
from tidemill.cli.parsing import Json
from tidemill.cli.ticker import Ticker
from tidemill.control.settings import load_settings
from tidemill.errors import Conflict, InvalidRequest, InvalidSetting, TidemillError, Unavailable
from tidemill.sdk import connection
from tidemill.sdk.client import Client
from tidemill.sdk.results import Status
from tidemill.store import backup

_WHO: Final = (
    "import json, tidemill; from tidemill.store import schema; print(json.dumps([tidemill.__version__, schema.HEAD]))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A Tidemill that is installed: how to run it, its version, and the newest schema that it knows."""

    python: str
    version: str
    head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgraded:
    """What was done. ``away_s`` is how long no control plane answered; ``unheard`` runners were not heard of yet."""

    before: str
    after: str
    revision: str
    backup: Path
    away_s: float
    workers: int
    unheard: int


def upgrade_command(
    python: Annotated[
        str | None,
        typer.Option(
            "--python", metavar="PATH", help="Of the environment with the new version; this one's unless given."
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", help="For the new version to come up, in seconds.")
    ] = 120.0,
    json: Json = False,
) -> None:
    """Put the installed version in the place of the one that runs. Jobs run on; on failure the old state comes back."""
    home = connection.home()
    with Ticker("looking at the new version", is_silent=json) as ticker:
        done = upgrade(home, python or sys.executable, timeout_s=timeout, tell=ticker.say)
    if json:
        told = {name: getattr(done, name) for name in ("before", "after", "revision", "workers", "unheard")}
        emit(told | {"backup": str(done.backup), "away_s": round(done.away_s, 3)})
        return
    say(paint(f"Tidemill {done.after} runs in the place of {done.before}", "green"))
    facts(
        [
            (
                "jobs",
                f"{done.workers - done.unheard} of {done.workers} workers adopted" if done.workers else "none ran",
            ),
            ("schema", done.revision),
            ("away", f"{done.away_s:.1f} s"),
            ("backup", str(done.backup)),
        ]
    )
    if done.unheard:
        note("  the runners of the others have not been heard of yet; they go on, and are waited for", "yellow")


def upgrade(home: Path, python: str, *, timeout_s: float, tell: Callable[[str], object] = lambda _: None) -> Upgraded:
    """What was done to the cloud in ``home``. ``tell`` takes what is being done now.

    Raises: TidemillError. Unless its ``data`` has ``went_back``, the old cloud was not touched.
    """
    old_python, overrides = bootstrap.command_of_daemon(home)
    after = who(python)
    before = _status(home)
    url = load_settings(home, overrides).database_url
    tell("writing a backup and migrating a copy of it")
    saved = _save(home, url, after)
    tell("stopping the old version; jobs run on")
    began = time.monotonic()
    with _last_state(home, url) as put_back:
        bootstrap.stop_daemon(home, stop_jobs=False)
        with bootstrap.locked(home):
            put_back.copy()
        tell("starting the new version")
        try:
            bootstrap.start_daemon(home, overrides, python=python, timeout_s=timeout_s)
            away_s = time.monotonic() - began
            tell("waiting for the runners")
            status = _wait_for_runners(home, after, timeout_s)
        except (TidemillError, OSError) as error:
            tell("it did not come up: going back")
            raise _went_back(home, overrides, old_python, before.version, put_back, saved, error) from error
    return Upgraded(
        before=before.version,
        after=after.version,
        revision=after.head,
        backup=saved,
        away_s=away_s,
        workers=status.workers,
        unheard=status.workers - status.heard,
    )


def who(python: str) -> Version:
    """Which Tidemill that python runs. Raises: InvalidRequest when it runs none."""
    try:
        done = subprocess.run([python, "-c", _WHO], capture_output=True, text=True, timeout=60, cwd="/", check=False)
        version, head = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise InvalidRequest(
            "There is no Tidemill that it could run.",
            field="--python",
            value=python,
            mend="Name the python of an environment in which it is installed, such as /opt/tidemill/bin/python.",
        ) from error
    return Version(python=python, version=str(version), head=str(head))


def _save(home: Path, url: str, after: Version) -> Path:
    """The verified backup, which the new version can migrate. Raises: InvalidSetting when that is an older one."""
    folder = home / "backups"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / time.strftime("before-upgrade-%Y%m%d-%H%M%S.tar.gz")
    made = bootstrap.backup(home, path, logs=False, database=url)
    if made.database.revision > after.head:
        path.unlink()
        raise InvalidSetting(
            f"Tidemill {after.version} knows schema {after.head}, and the database has {made.database.revision}.",
            field="--python",
            value=after.python,
            mend="An older version takes a backup of its own: tidemill restore.",
        )
    if after.python != sys.executable:
        done = subprocess.run(
            [after.python, "-m", "tidemill.cli.main", "backup", "verify", str(path)],
            capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        if done.returncode:
            raise Conflict(
                f"The new version cannot use a copy of this installation: {done.stderr.strip()[-500:]}",
                field="--python",
                value=after.python,
                mend=f"Nothing was changed. The copy is {path}.",
            )
    return path


class _LastState:
    """The database as the old version left it, to be put back."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._file = Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
        self._copied: backup.DatabaseCopy | None = None

    def copy(self) -> None:
        """Keep it as it is now."""
        if self._file is not None:
            backup.copy_pages(self._file, self._folder / "control.db")
        else:
            self._copied = backup.export(self._url, self._folder)

    def put_back(self) -> None:
        """Have the database as it was, but for epochs and fences, which jump: the new version may have given some."""
        now_ns = time.time_ns()
        if self._file is not None:
            kept = self._folder / "control.db"
            engine = create_engine(URL.create("sqlite+pysqlite", database=str(kept)))
            with engine.begin() as opened:
                backup.jump(opened, now_ns=now_ns)
            engine.dispose()
            with contextlib.closing(sqlite3.connect(kept)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            for tail in ("-wal", "-shm"):
                self._file.with_name(self._file.name + tail).unlink(missing_ok=True)
            with kept.open("rb") as file:
                os.fsync(file.fileno())
            kept.replace(self._file)
        elif self._copied is not None:
            aside = time.strftime("failed_upgrade_%Y%m%dT%H%M%S")
            backup.load(self._url, self._folder, self._copied, now_ns=now_ns, aside=aside, is_migrated=False)

    def remove(self) -> None:
        """Keep nothing."""
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()


@contextlib.contextmanager
def _last_state(home: Path, url: str) -> Any:
    for left in (home / "backups").glob(".last-state-*"):  # of one that was killed
        if not Path(f"/proc/{left.name.rpartition('-')[2]}").exists():
            _LastState(url, left).remove()
    folder = home / "backups" / f".last-state-{os.getpid()}"
    folder.mkdir(mode=0o700)
    state = _LastState(url, folder)
    try:
        yield state
    finally:
        state.remove()


def _status(home: Path) -> Status:
    path = home / "admin.token"
    token = path.read_text().strip() if path.exists() else None
    with Client(str(bootstrap.read_endpoint(home)["api_url"]), token, retry_for_s=5) as client:
        return client.status()


def _wait_for_runners(home: Path, after: Version, timeout_s: float) -> Status:
    """The state of the new cloud, once every runner was heard of, or most were. Raises: Unavailable, Conflict."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = _status(home)
        if status.version != after.version:
            raise Conflict(f"Version {status.version} answers, and not {after.version}.", field="version")
        if status.heard >= status.workers:
            return status
        if time.monotonic() > deadline:
            if status.heard:
                return status
            raise Unavailable(f"It heard of none of {status.workers} runners within {timeout_s:g} s.")
        time.sleep(0.1)


def _went_back(
    home: Path,
    overrides: Mapping[str, Any],
    old_python: str,
    old_version: str,
    state: _LastState,
    saved: Path,
    error: Exception,
) -> TidemillError:
    """The error to be raised, after the old state was put back and, if it can be, the old version was started."""
    what = error.detail if isinstance(error, TidemillError) else str(error)
    if bootstrap.is_running(home):
        with contextlib.suppress(TidemillError, ProcessLookupError):
            os.kill(int(bootstrap.read_endpoint(home)["pid"]), signal.SIGKILL)
        while bootstrap.is_running(home):
            time.sleep(0.02)
    with bootstrap.locked(home):
        state.put_back()
    told = f"The new version did not come up: {what.rstrip('.')}. The database is as it was"
    try:
        old = who(old_python)
        if old.version != old_version:
            raise InvalidRequest(f"{old_python} has version {old.version} now")
        bootstrap.start_daemon(home, overrides, python=old_python)
        mend = f"See {home / 'control.log'}; the backup is {saved}."
        return Unavailable(f"{told}, and version {old_version} runs again.", went_back=True, is_running=True, mend=mend)
    except (TidemillError, OSError) as failed:
        again = failed.detail if isinstance(failed, TidemillError) else str(failed)
        return Unavailable(
            f"{told}; version {old_version} could not be started again: {again.rstrip('.')}. Jobs run on.",
            went_back=True,
            is_running=False,
            mend=f"pip install tidemill=={old_version}, then tidemill up. The backup is {saved}.",
        )
