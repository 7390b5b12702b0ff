"""Connections to SQLite and PostgreSQL, and what their failures mean for Tidemill.

One engine writes, over a single connection; another reads, each reader at one instant of the database. SQLite:
write-ahead log, every commit flushed to the disk before it is acknowledged.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from tidemill.errors import InvalidSetting, Stale, StorageFull, TidemillError, Unavailable

T = TypeVar("T")
_READERS: Final = 8
_NO_SPACE_BYTES: Final = 64 * 1024
_SMALL_LOG: Final = f"PRAGMA journal_size_limit={64 * 1024 * 1024}"
"""To what size the write-ahead log is cut back, after a long reader let it grow."""
_DUPLICATE: Final = {"SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_ROWID"}
_NO_ANSWER: Final = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_INTERRUPT,
}
_MEND_DISK: Final = "Free space where the database lies; nothing of what was stored before is lost."


@dataclass(frozen=True, slots=True)
class Database:
    """A database's engines, and the SQLite file's path (None: PostgreSQL)."""

    writer: Engine
    reader: Engine
    path: Path | None
    glancer: Engine | None = None
    """Where single statements are asked without a transaction around them; None: there is nothing to be won."""

    @property
    def is_sqlite(self) -> bool:
        """Whether it is SQLite; PostgreSQL otherwise."""
        return self.path is not None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one instant of the database. Raises: as ``Store`` says."""
        with failing_clearly(self.path), self.reader.begin() as connection:
            yield connection

    def glance(self, ask: Callable[[Connection], T]) -> T:
        """What ``ask`` finds in one statement: with PostgreSQL a single way there and back, instead of four.

        A connection that broke since it was last used is found out by using it, and then another is tried.
        Raises: as ``Store`` says.
        """
        if self.glancer is None:
            with self.reading() as connection:
                return ask(connection)
        with failing_clearly():
            try:
                with self.glancer.connect() as connection:
                    return ask(connection)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            with self.glancer.connect() as connection:
                return ask(connection)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction: committed at the end, rolled back when anything is raised. Raises: as ``Store`` says."""
        with failing_clearly(self.path), self.writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of all connections; harmless twice."""
        for engine in (self.reader, self.writer, self.glancer):
            if engine is not None:
                engine.dispose()


@contextmanager
def failing_clearly(path: Path | None = None) -> Iterator[None]:
    """Turn failures of PostgreSQL, or of the SQLite file at ``path``, into ours. Raises: as ``Store`` says."""
    try:
        yield
    except DBAPIError as error:
        meant = _sqlite_meaning(error, path) if path else _postgres_meaning(error)
        if meant is None:
            raise
        raise meant from error
    except PoolTimeout as error:
        raise _unavailable("all connections are in use") from error


def was_undone(error: TidemillError) -> bool:
    """Whether PostgreSQL undid the transaction for the sake of another: a deadlock, or an order that cannot be.

    Nothing of it is stored, and the same transaction may well be taken when it is tried again.
    """
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and getattr(cause.orig, "sqlstate", None) in ("40001", "40P01")


def connect(url: str, *, patience_s: float) -> Database:
    """The database at ``url``, not opened yet; ``patience_s`` is how long to wait for a lock.

    Raises: InvalidSetting when it is not an address of SQLite or PostgreSQL.
    """
    if url.startswith("sqlite:///"):
        return _sqlite(Path(url.removeprefix("sqlite:///")), patience_s)
    return _postgres(_postgres_address(url), patience_s)


def session_of(url: str, *, patience_ms: int) -> Engine:
    """Of whose connections each is a session of its own with the PostgreSQL at ``url``, statement by statement.

    A session whose other end is gone is noticed from both ends within seconds. ``patience_ms`` is for one statement.
    Raises: InvalidSetting.
    """
    address = _postgres_address(url)
    seconds = max(2, patience_ms // 1000)
    arguments: dict[str, Any] = {
        "keepalives_idle": 2, "keepalives_interval": 1, "keepalives_count": 3, "tcp_user_timeout": 2 * patience_ms,
    }  # fmt: skip
    if "connect_timeout" not in address.query:
        arguments["connect_timeout"] = seconds
    if "options" not in address.query:
        arguments["options"] = (
            f"-c statement_timeout={patience_ms} -c lock_timeout={patience_ms} -c tcp_keepalives_idle=2"
            f" -c tcp_keepalives_interval=1 -c tcp_keepalives_count=3 -c tcp_user_timeout={2 * patience_ms}"
        )
    with _needing_psycopg():
        return create_engine(address, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=arguments)


def _postgres_address(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise _not_an_address(url) from error
    if address.drivername in ("postgres", "postgresql", "postgresql+psycopg") and address.database:
        return address.set(drivername="postgresql+psycopg")
    raise _not_an_address(address.render_as_string(hide_password=True))


@contextmanager
def _needing_psycopg() -> Iterator[None]:
    try:
        yield
    except (ImportError, NoSuchModuleError) as error:
        raise InvalidSetting(
            "PostgreSQL needs the package psycopg.", field="database", mend='pip install "tidemill[postgres]"'
        ) from error


def _not_an_address(url: str) -> InvalidSetting:
    return InvalidSetting(
        "This is not the address of a database that Tidemill can use.",
        field="database",
        value=url,
        mend="Write sqlite:////absolute/path.db or postgresql://user:password@host/name.",
    )


def _sqlite(path: Path, patience_s: float) -> Database:
    if path.name in ("", ":memory:"):
        raise _not_an_address(f"sqlite:///{path}")
    url = URL.create("sqlite+pysqlite", database=str(path))
    arguments = {"timeout": patience_s, "check_same_thread": False}
    writer = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=patience_s, connect_args=arguments)
    reader = create_engine(url, pool_size=_READERS, max_overflow=0, pool_timeout=patience_s, connect_args=arguments)
    _on_connect(writer, "PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", _SMALL_LOG, path=path)
    _on_connect(reader, "PRAGMA query_only=ON", path=path)
    event.listen(writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    event.listen(reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return Database(writer, reader, path)


def _on_connect(engine: Engine, *pragmas: str, path: Path) -> None:
    def own_file(*_: Any) -> None:
        """The file is its owner's alone; SQLite gives its log files the same mode."""
        if path.parent.is_dir() and not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))

    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(pragma).close()

    event.listen(engine, "do_connect", own_file)
    event.listen(engine, "connect", prepare)


def _postgres(url: URL, patience_s: float) -> Database:
    arguments: dict[str, Any] = {}
    if "connect_timeout" not in url.query:
        arguments["connect_timeout"] = max(2, int(patience_s))
    if "options" not in url.query:
        arguments["options"] = f"-c lock_timeout={int(patience_s * 1000)}"
    make: Callable[..., Engine] = create_engine
    common: dict[str, Any] = {"connect_args": arguments, "pool_pre_ping": True, "pool_timeout": patience_s}
    with _needing_psycopg():
        writer = make(url, pool_size=1, max_overflow=0, isolation_level="READ COMMITTED", **common)
        reader = make(url, pool_size=_READERS, max_overflow=0, isolation_level="REPEATABLE READ", **common)
        common["pool_pre_ping"] = False
        glancer = make(url, pool_size=_READERS, max_overflow=0, isolation_level="AUTOCOMMIT", **common)
    return Database(writer, reader, None, glancer)


def _sqlite_meaning(error: DBAPIError, path: Path) -> TidemillError | None:
    """What a failure of SQLite means to a caller; None when it is a bug or damage, to be seen as it is."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is None:
        return None
    if error.orig is not None and getattr(error.orig, "sqlite_errorname", "") in _DUPLICATE:
        return Stale("It exists already.")
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_FULL or (primary == sqlite3.SQLITE_IOERR and _is_full(path)):
        return StorageFull("There is no space left for the database.", mend=_MEND_DISK)
    return _unavailable(str(error.orig)) if primary in _NO_ANSWER else None


def _is_full(path: Path) -> bool:
    try:
        free = os.statvfs(path.parent)
    except OSError:
        return False
    return free.f_bavail * free.f_frsize < _NO_SPACE_BYTES


def _postgres_meaning(error: DBAPIError) -> TidemillError | None:
    """As ``_sqlite_meaning``. Codes: PostgreSQL's appendix A, SQLSTATE."""
    code = getattr(error.orig, "sqlstate", None) or ""
    if code == "23505":
        return Stale("It exists already.")
    if code == "53100":
        return StorageFull("There is no space left for the database.", mend=_MEND_DISK)
    lost = error.connection_invalidated or (not code and type(error).__name__ in ("OperationalError", "InterfaceError"))
    if lost or code[:2] in ("08", "25", "40", "53", "55", "57", "58"):
        return _unavailable(str(error.orig).strip())
    return None


def _unavailable(what: str) -> Unavailable:
    return Unavailable(f"The database does not answer: {what}.", mend="Try again in a moment.")
