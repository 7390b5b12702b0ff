"""What a worker needs before it starts: its folder, its inputs, its Python environment.

Everything shared between launches is built beside its place under a lock and renamed into it, so there is
never half of it, whatever is killed when; the next launch builds it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tidemill.runner.client import Channel, Closing, Refused, Unreachable
from tidemill.runner.processes import wait_for_lock

_CHUNK: Final = 1 << 20
_PYTHON: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+@_-]{0,63}")
_TAIL: Final = 600


class SetupFailed(Exception):
    """The worker cannot be started as its spec says; ``cause`` and the message say why."""

    def __init__(self, message: str, *, cause: str = "setup_failed", code: int = 1) -> None:
        self.cause = cause
        self.code = code
        super().__init__(message)


def from_os_error(error: OSError) -> SetupFailed:
    """The failure behind a file operation that did not work."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SetupFailed(f"no space is left on the disk for {error.filename or 'its files'}", cause="storage_full")
    return SetupFailed(str(error))


def fetch(channel: Channel, digest: str, target: Path, *, stopping: threading.Event) -> None:
    """Put the blob of that SHA-256 there, after checking that it is what was asked for.

    Raises: SetupFailed when there is no such blob, Closing when ``stopping`` is set before it is there.
    """
    while not stopping.is_set():
        try:
            response = channel.open("GET", f"/blobs/{digest}", timeout_s=60.0)
            seen = hashlib.sha256()
            with target.open("wb") as file:
                while chunk := response.read(_CHUNK):
                    seen.update(chunk)
                    file.write(chunk)
        except Refused as refusal:
            raise SetupFailed(f"the archive {digest[:12]} could not be fetched: {refusal}") from refusal
        except Unreachable:
            channel.rest(stopping)
            continue
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            channel.close()
            channel.rest(stopping)
            continue
        if seen.hexdigest() == digest:
            return
        channel.close()
        channel.rest(stopping)
    raise Closing


def extract(archive: Path, target: Path) -> None:
    """Unpack an archive into a new folder; nothing of it lands outside. Raises: SetupFailed, OSError."""
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extract(member, target, filter="data")
                elif _check(member, target):
                    tar.extract(member, target)
    except (tarfile.TarError, EOFError) as error:
        raise SetupFailed(f"the archive cannot be unpacked: {error}") from error


def _check(member: tarfile.TarInfo, target: Path) -> bool:
    """Whether a member is a file, folder or link that stays inside; for Pythons older than 3.11.4."""
    root = target.resolve()
    place = (root / member.name).resolve()
    if not place.is_relative_to(root) or member.name.startswith("/"):
        raise SetupFailed(f"the archive names a file outside its folder: {member.name!r}")
    if member.issym() or member.islnk():
        base = place.parent if member.issym() else root
        if member.linkname.startswith("/") or not (base / member.linkname).resolve().is_relative_to(root):
            raise SetupFailed(f"the archive has a link to outside its folder: {member.name!r}")
    elif not (member.isfile() or member.isdir()):
        raise SetupFailed(f"the archive has something that is neither file nor folder: {member.name!r}")
    member.mode &= 0o755
    return True


def shared_folder(channel: Channel, digest: str, store: Path, *, stopping: threading.Event) -> Path:
    """The read-only folder with that archive's content, fetched once for all launches of a project."""
    target = store / digest
    if target.is_dir():
        return target
    store.mkdir(parents=True, exist_ok=True)
    lock = wait_for_lock(store / f".{digest}.lock")
    try:
        if not target.is_dir():
            staging, archive = store / f".{digest}.staging", store / f".{digest}.archive"
            _discard(staging)
            fetch(channel, digest, archive, stopping=stopping)
            extract(archive, staging)
            archive.unlink()
            _make_read_only(staging)
            staging.rename(target)
    finally:
        os.close(lock)
    return target


def _make_read_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) | stat.S_IRUSR)


def _discard(folder: Path) -> None:
    """Remove a folder, read-only parts included."""
    if not folder.exists():
        return
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        with contextlib.suppress(OSError):
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def environment_key(python: str, packages: tuple[str, ...], base_python: str) -> str:
    """The name of an environment, from all that decides what is in it."""
    content = [python, sorted(packages), platform.machine(), platform.libc_ver()[0], base_python if not python else ""]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


Run = Callable[[list[str], Path, Mapping[str, str], tuple[Path, ...], tuple[Path, ...]], tuple[int, str]]
"""Runs a command in a sandbox: command, cwd, variables, writable, readable; exit status and end of its output."""


class EnvironmentBuilder:
    """Makes Python environments with uv, each once for a project."""

    def __init__(self, *, root: Path, project: str, uv: str, base_python: str, run: Run) -> None:
        self._home = root / "envs" / project
        self._pythons = root / "pythons"
        self._uv = uv
        self._base_python = base_python
        self._run = run

    def path(self, spec: Mapping[str, Any]) -> Path:
        """Where the environment of that spec is, or will be."""
        packages = tuple(str(package) for package in spec.get("packages") or ())
        return self._home / environment_key(str(spec.get("python") or ""), packages, self._base_python)

    def build(self, spec: Mapping[str, Any]) -> Path:
        """The folder of the environment, there already or made now. Raises: SetupFailed, OSError."""
        target = self.path(spec)
        if target.is_dir():
            return target
        building = self._home / ".build"
        building.mkdir(parents=True, exist_ok=True)
        lock = wait_for_lock(building / f"{target.name}.lock")
        try:
            if not target.is_dir():
                staging = building / target.name
                _discard(staging)
                self._make(spec, staging, building)
                staging.rename(target)
        finally:
            os.close(lock)
        return target

    def _make(self, spec: Mapping[str, Any], staging: Path, building: Path) -> None:
        packages = [str(package) for package in spec.get("packages") or ()]
        if flags := [package for package in packages if package.lstrip().startswith("-")]:
            raise SetupFailed(f"{flags[0]!r} is an option, not a package")
        python = self._find_python(str(spec.get("python") or ""), building)
        variables = self._variables(building)
        prefix = python.resolve().parent.parent
        readable = (Path(self._uv), prefix, *_local_indexes(_operators_variables()))
        command = [self._uv, "venv", "--quiet", "--no-config", "--relocatable", "--python", str(python), str(staging)]
        self._step(command, building, variables, readable)
        if packages:
            command = [
                self._uv, "pip", "install", "--no-config", "--compile-bytecode", "--python",
                str(staging / "bin" / "python"), "--", *packages,
            ]  # fmt: skip
            self._step(command, building, variables, readable)

    def _step(
        self, command: list[str], building: Path, variables: Mapping[str, str], readable: tuple[Path, ...]
    ) -> None:
        code, output = self._run(command, building, variables, (building,), readable)
        if code:
            full = "No space left on device" in output or "os error 28" in output
            raise SetupFailed(
                f"the environment could not be built: {tool_message(output)}",
                cause="storage_full" if full else "setup_failed",
                code=code,
            )

    def _find_python(self, wanted: str, building: Path) -> Path:
        base = Path(self._base_python)
        if not wanted or wanted == platform.python_version() or wanted == ".".join(platform.python_version_tuple()[:2]):
            return base
        if not _PYTHON.fullmatch(wanted):
            raise SetupFailed(f"python {wanted!r} is not a version; write for example 3.12")
        variables = self._variables(building) | {"PATH": os.environ.get("PATH", ""), "HOME": str(Path.home())}
        for install in (False, True):
            if install:
                self._uv_alone([self._uv, "python", "install", "--quiet", wanted], variables)
            code, output = self._uv_alone([self._uv, "python", "find", "--no-project", wanted], variables)
            if not code:
                return Path(output.strip().splitlines()[-1])
        raise SetupFailed(f"python {wanted} is not on this machine and cannot be installed: {tool_message(output)}")

    def _uv_alone(self, command: list[str], variables: Mapping[str, str]) -> tuple[int, str]:
        """Run uv outside the sandbox, for what has nothing of the tenant's in it but a version."""
        done = subprocess.run(
            command, env={**variables, "UV_NO_CONFIG": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False, timeout=900,
        )  # fmt: skip
        return done.returncode, done.stdout.decode(errors="replace")

    def _variables(self, building: Path) -> dict[str, str]:
        """What uv is told by variables: its folders, and the operator's own index, proxy and certificates."""
        return _operators_variables() | {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(building),
            "LANG": "C.UTF-8",
            "UV_CACHE_DIR": str(building / "cache"),
            "UV_PYTHON_INSTALL_DIR": str(self._pythons),
            "UV_NO_PROGRESS": "1",
        }


def _operators_variables() -> dict[str, str]:
    """Where packages come from, as the operator set it for this machine."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
    ours = ("UV_CACHE_DIR", "UV_PYTHON_INSTALL_DIR", "UV_PROJECT")
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper() in names or (name.startswith("UV_") and not name.startswith(ours))
    }


def _local_indexes(variables: Mapping[str, str]) -> tuple[Path, ...]:
    """Folders of packages that uv was pointed at."""
    words = [word for name, value in variables.items() if name.startswith("UV_") for word in value.split()]
    paths = [Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))]
    certificates = [Path(variables[name]) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in variables]
    return tuple(path for path in (*paths, *certificates) if path.exists() and not str(path).startswith("/etc/ssl"))


def tool_message(output: str) -> str:
    """The end of a tool's output, which says what went wrong."""
    text = " ".join(line.strip() for line in output.strip().splitlines() if line.strip())
    return text if len(text) <= _TAIL else "… " + text[-_TAIL:]
