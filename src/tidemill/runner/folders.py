"""Where things are: one launch's folder, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """Put ``value`` there, whole or not at all, readable by the owner only; on the disk when ``durable``.

    Raises: OSError, and then what was there before still is.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, json.dumps(value, separators=(",", ":")).encode())
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        staging.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_file(path: Path) -> None:
    """Have what a file says on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> dict[str, Any] | None:
    """What is there, None when there is nothing or nothing that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class LaunchFolder:
    """The files of one launch.

    ``claimed`` is made once by whoever decides about the launch: the runner that runs it, or the engine that
    gives it up; after that nobody starts it. ``lock`` is held by the runner for as long as it lives.
    """

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def claimed(self) -> Path:
        return self.path / "claimed"

    @property
    def runner(self) -> Path:
        """Who the runner is (pid, start time, boot) and which control groups its worker is in."""
        return self.path / "runner.json"

    @property
    def granted(self) -> Path:
        """When the runner's lease last began to run anew, in ns of the machine's monotonic clock."""
        return self.path / "granted"

    @property
    def stop(self) -> Path:
        """That the worker shall end, and with how much grace."""
        return self.path / "stop.json"

    @property
    def exit(self) -> Path:
        """How the worker ended; written when nothing of it is left."""
        return self.path / "exit.json"

    @property
    def gone(self) -> Path:
        """That the engine found nothing left of a launch whose runner was lost."""
        return self.path / "gone.json"

    @property
    def output(self) -> Path:
        return self.path / "output.log"

    @property
    def reports(self) -> Path:
        """What the control plane is to be told; removed when it was told everything, or wants to hear no more."""
        return self.path / "reports.jsonl"

    @property
    def diary(self) -> Path:
        """The runner's own notes, for people who look for a fault in it."""
        return self.path / "runner.log"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs"

    @property
    def is_decided(self) -> bool:
        """Whether nothing is to be started any more: it was claimed, given up, or stopped before it was launched."""
        return self.claimed.exists() or self.gone.exists() or (self.stop.exists() and not self.spec.exists())

    @property
    def is_owing(self) -> bool:
        """Whether the worker is over, and its runner was lost before it had told everything."""
        is_over = self.exit.exists() or self.gone.exists()
        return is_over and self.spec.exists() and self.reports.exists()

    def write_spec(self, content: Mapping[str, Any]) -> None:
        """Have the launch written down on the disk, in a folder that is made for it. Raises: OSError."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        write_json(self.spec, content, durable=True)
        sync_folder(self.path.parent)

    def write_stop(self, grace_ns: int) -> None:
        """Have it on the disk that the worker shall end; a later stop never extends the grace. Raises: OSError."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        before = read_json(self.stop)
        if before is None or grace_ns < before["grace_ns"]:
            write_json(self.stop, {"grace_ns": grace_ns, "at_ns": time.time_ns()}, durable=True)
            sync_folder(self.path.parent)

    def claim(self) -> bool:
        """Whether the caller is the first and only one to decide about this launch."""
        try:
            os.close(os.open(self.claimed, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        return True
