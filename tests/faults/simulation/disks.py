"""Where the state is durable: in memory, in SQLite files, in PostgreSQL; each can fail, be backed up and be restored.

A disk outlives every control plane. ``connect`` gives a control plane its store, whose next calls fail as they are told:

==============  =========================================================================================
unavailable     the database does not answer, and nothing is stored
full            there is no space
bug             something that nobody thought of is raised
stale           what was assumed does not hold
lost            it is stored, but neither the answer arrives nor the one to the question whether it is
unreadable      reading fails
==============  =========================================================================================
"""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from dataclasses import replace as altered
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.pool import NullPool

from tidemill.core.lifecycle import is_terminal
from tidemill.errors import Stale, StorageFull, Unavailable
from tidemill.model.ids import LaunchId
from tidemill.model.job import Allocation, Job
from tidemill.model.values import replace
from tidemill.ports import Batch, Snapshot, Store
from tidemill.store import backup, memory, schema
from tidemill.store.backup import EPOCH_STRIDE, FENCE_STRIDE, FENCES_FROM_S
from tidemill.store.memory import MemoryStore
from tidemill.store.sql import SqlStore
from tidemill.units import SECOND_NS


class Killed(BaseException):
    """The control plane that does this is killed here."""


class _Shaky:
    """What fails of a store. ``seam`` is called between any two steps of a commit, and may raise ``Killed``."""

    mishaps: deque[str]
    seam: Callable[[str], None]

    def _fail(self, mishap: str) -> None:
        if mishap == "unavailable":
            raise Unavailable("The database does not answer.")
        if mishap == "full":
            raise StorageFull("There is no space left.")
        if mishap == "bug":
            raise RuntimeError("a store with a bug")

    def _next_of_commit(self) -> str:
        if self.mishaps and self.mishaps[0] != "unreadable":
            return self.mishaps.popleft()
        return ""

    def _read(self) -> None:
        if self.mishaps and self.mishaps[0] == "unreadable":
            self.mishaps.popleft()
            raise Unavailable("The database does not answer.")


class ShakyStore(_Shaky, MemoryStore):
    """The store in memory. After a commit whose answer is lost the next one says Stale, as ``SqlStore`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.mishaps = deque()
        self.seam = lambda _: None
        self._doubtful = False

    def commit(self, batch: Batch) -> int:
        self.seam("before a commit")
        mishap = self._next_of_commit()
        self._fail(mishap)
        doubtful = self._doubtful
        if mishap == "stale":
            raise Stale("The state changed since it was read.")
        if doubtful and batch.epoch == self._all.epoch:
            self._doubtful = False
            raise Stale("A commit whose answer was lost is stored.")
        seq = super().commit(batch)
        self.seam("after a commit")
        if mishap == "lost":
            self._doubtful = True
            raise Unavailable("The answer was lost.")
        return seq

    def load(self) -> Snapshot:
        self._read()
        return super().load()

    def allocation(self, launch_id: LaunchId) -> Allocation | None:
        self._read()
        return super().allocation(launch_id)


class ShakySqlStore(_Shaky, SqlStore):
    """A database. A lost answer is lost where it would be: between the database's commit and ours."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.mishaps = deque()
        self.seam = lambda _: None
        self._mishap = ""

    def commit(self, batch: Batch) -> int:
        self.seam("before a commit")
        mishap = self._next_of_commit()
        self._fail(mishap)
        if mishap == "stale":
            raise Stale("The state changed since it was read.")
        self._mishap = mishap
        try:
            seq = super().commit(batch)
        finally:
            self._mishap = ""
        self.seam("after a commit")
        return seq

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        if self._mishap == "asked":
            raise Unavailable("The database does not answer.")
        with super()._writing() as connection:
            yield connection
        if self._mishap == "lost":
            self._mishap = "asked"
            raise Unavailable("The answer was lost.")

    def load(self) -> Snapshot:
        self._read()
        return super().load()

    def allocation(self, launch_id: LaunchId) -> Allocation | None:
        self._read()
        return super().allocation(launch_id)


class Disk(Protocol):
    """What outlives every control plane. ``look`` is a store for whoever only looks, and never fails."""

    look: Store

    def connect(self) -> ShakyStore | ShakySqlStore:
        """A store as a control plane that starts now has it."""
        ...

    def epoch(self) -> int:
        """The newest epoch."""
        ...

    def backup(self) -> Any:
        """All that is stored now."""
        ...

    def restore(self, copy: Any, *, now_ns: int) -> None:
        """Have that stored, with epochs and fences past all that were ever given. Nobody is connected."""
        ...

    def close(self) -> None:
        """Nothing is needed any more."""
        ...


class MemoryDisk:
    """Contents in memory, which all stores share."""

    def __init__(self) -> None:
        self.look: Store = MemoryStore()

    def connect(self) -> ShakyStore:
        """A store as a control plane that starts now has it."""
        store = ShakyStore()
        store._all, store._lock = self._contents, self.look._lock  # type: ignore[attr-defined]
        return store

    def epoch(self) -> int:
        """The newest epoch."""
        return int(self._contents.epoch)

    def backup(self) -> Any:
        """All that is stored now: of values that never change, in tables of our own."""
        return _copied(self._contents)

    def restore(self, copy: Any, *, now_ns: int) -> None:
        """As ``store.backup.jump`` does it in databases."""
        contents = _copied(copy)
        contents.epoch = max(contents.epoch + EPOCH_STRIDE, now_ns // 1_000)
        fence = now_ns // SECOND_NS - FENCES_FROM_S
        jobs = contents.things[Job]
        for job in [job for job in jobs.values() if not is_terminal(job.state)]:
            jobs[job.id] = replace(job, fence_base=max(fence, job.fence_base + FENCE_STRIDE))
        self.look._all = contents  # type: ignore[attr-defined]

    def close(self) -> None:
        """Nothing."""

    @property
    def _contents(self) -> Any:
        return self.look._all  # type: ignore[attr-defined]


def _copied(contents: Any) -> Any:
    values = {}
    for item in fields(memory._Contents):
        value = getattr(contents, item.name)
        values[item.name] = value.copy() if isinstance(value, dict | list) else value
    values["things"] = {kind: things.copy() for kind, things in contents.things.items()}
    return altered(contents, **values)


class _SqlDisk:
    """A database, a new one after each restoring. ``folder`` is for copies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._open: list[SqlStore] = []
        self._url = self._next()
        self.look: Store = self._keep(SqlStore(self._url))
        self.look.migrate()

    def connect(self) -> ShakySqlStore:
        """A store as a control plane that starts now has it."""
        store = ShakySqlStore(self._url)
        self._keep(store)
        store.migrate()
        return store

    def epoch(self) -> int:
        """The newest epoch."""
        store: Any = self.look
        with store._database.reading() as connection:
            return int(connection.execute(select(schema.leadership.c.epoch)).scalar_one())

    def backup(self) -> Any:
        """The rows, in a folder."""
        rows = self._folder / f"backup-{next(self._numbers)}"
        rows.mkdir()
        return rows, backup.export(self._url, rows)

    def restore(self, copy: Any, *, now_ns: int) -> None:
        """As ``tidemill restore`` does it."""
        rows, manifest = copy
        self._let_go()
        self._url = self._next(is_empty=True)
        backup.load(self._url, rows, manifest, now_ns=now_ns)
        self.look = self._keep(SqlStore(self._url))

    def close(self) -> None:
        """Let go of all of it."""
        self._let_go()

    def _let_go(self) -> None:
        for store in self._open:
            store.close()
        self._open.clear()

    def _next(self, *, is_empty: bool = False) -> str:
        """The address of another database."""
        raise NotImplementedError

    def _keep(self, store: Any) -> Any:
        self._open.append(store)
        return store


class SqliteDisk(_SqlDisk):
    """Files in ``folder``."""

    def _next(self, *, is_empty: bool = False) -> str:
        path = self._folder / f"control-{next(self._numbers)}.db"
        if not is_empty:
            shutil.copyfile(_migrated(), path)
        return f"sqlite:///{path}"


@cache
def _migrated() -> Path:
    """A database of this version's schema with nothing in it: making one takes as long as ten seeds."""
    path = Path(_kept_folder().name) / "empty.db"
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    return path


@cache
def _kept_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tidemill-simulation-")


class PostgresDisk(_SqlDisk):
    """Databases of our own on the server of that address, whose user may make some."""

    def __init__(self, folder: Path, server: str) -> None:
        self._server = make_url(server).set(drivername="postgresql+psycopg")
        self._made: list[str] = []
        super().__init__(folder)

    def close(self) -> None:
        """Let go of all of it, and drop it."""
        super().close()
        with self._commands() as connection:
            for name in self._made:
                connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))

    def _next(self, *, is_empty: bool = False) -> str:
        del is_empty
        name = f"tidemill_simulation_{os.getpid()}_{next(_DATABASES)}"
        with self._commands() as connection:
            connection.execute(text(f'CREATE DATABASE "{name}"'))
        self._made.append(name)
        address = self._server.set(database=name, drivername="postgresql")
        return address.render_as_string(hide_password=False)

    @contextmanager
    def _commands(self) -> Iterator[Any]:
        engine = create_engine(self._server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            yield connection


_DATABASES = itertools.count()
