"""Control groups of a worker: limits, accounting, and a sure way to kill all of it. Versions 1 and 2.

Version 1 has one hierarchy a controller (older machines and some virtual ones); version 2 has one for all.
In version 1 the groups are made at the top of each hierarchy, as container runtimes do. In version 2 they are
made at the top when we may, else in the part of the tree that systemd delegated to our user. Where neither
may be written there are no groups, and ``described`` says so: nothing here raises for want of rights.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidemill.runner.processes import kill_until_gone

PARENT: Final = "tidemill"
_V1: Final = ("memory", "cpu", "cpuacct", "pids")
_V2: Final = ("memory", "cpu", "pids")
_CPU_PERIOD_US: Final = 100_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker may use; zero means no limit. ``cpu_milli`` thousandths of a core."""

    memory_bytes: int = 0
    cpu_milli: int = 0
    pids: int = 0


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where control groups can be made on this machine: ``version`` 0 is nowhere, and ``reason`` says why."""

    version: int
    parents: Mapping[str, Path]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Groups:
    """The control groups of one worker, by controller; empty when there are none.

    ``described`` lists what the worker really has, as ``name=value`` words.
    """

    version: int
    paths: Mapping[str, Path]
    described: tuple[str, ...]

    def folders(self) -> tuple[Path, ...]:
        """Each folder once; version 2 has one for all controllers."""
        return tuple(dict.fromkeys(self.paths.values()))

    def join(self) -> None:
        """Put this process, and what it starts from now on, into the groups."""
        for folder in self.folders():
            fd = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"0")
            finally:
                os.close(fd)

    def pids(self) -> list[int]:
        """The processes in the groups, as this process names them."""
        found: dict[int, None] = {}
        for folder in self.folders():
            with contextlib.suppress(OSError):
                found.update(dict.fromkeys(int(line) for line in (folder / "cgroup.procs").read_text().split()))
        return [pid for pid in found if pid]

    def kill(self, *, within_s: float = 2.0) -> bool:
        """Whether no process is left in the groups, after killing them all."""
        for folder in self.folders():
            with contextlib.suppress(OSError):
                (folder / "cgroup.kill").write_text("1")
        return kill_until_gone(self.pids, within_s=within_s)

    def remove(self) -> bool:
        """Whether the groups are gone; they cannot go while a process is in them."""
        gone = True
        for folder in self.folders():
            gone = _remove(folder) and gone
        return gone

    def cpu_used_ns(self) -> int | None:
        """CPU time of everything that ever ran in the groups; None when nobody counts it."""
        if self.version == 2 and "cpu" in self.paths:
            usage_us = _keyed(self.paths["cpu"] / "cpu.stat").get("usage_usec")
            return None if usage_us is None else usage_us * 1_000
        return _number(self.paths["cpuacct"] / "cpuacct.usage") if "cpuacct" in self.paths else None

    def rss_bytes(self) -> int | None:
        """Memory that the processes hold now, without what the kernel merely keeps cached for them."""
        if "memory" not in self.paths:
            return None
        stat = _keyed(self.paths["memory"] / "memory.stat")
        return stat.get("anon") if self.version == 2 else stat.get("total_rss", stat.get("rss"))

    def peak_bytes(self) -> int | None:
        """The most memory that the groups ever held."""
        if "memory" not in self.paths:
            return None
        return _number(self.paths["memory"] / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"))

    def oom_kills(self) -> int:
        """How many processes the kernel killed because the groups reached their memory limit."""
        if "memory" not in self.paths:
            return 0
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return _keyed(self.paths["memory"] / name).get("oom_kill", 0)


def find_hierarchies(
    *, mounts: Path = Path("/proc/self/mountinfo"), membership: Path = Path("/proc/self/cgroup")
) -> Hierarchies:
    """Where this process may make control groups; looks, and makes only the common parent folders."""
    mounted = _mounted(mounts)
    own = _membership(membership)
    reasons: list[str] = []
    if "cgroup2" in mounted and (base := _v2_base(mounted["cgroup2"], own.get("", "/"))):
        if reason := _enable_v2(base):
            reasons.append(reason)
        else:
            return Hierarchies(2, dict.fromkeys(_V2, base / PARENT))
    parents: dict[str, Path] = {}
    for controller in _V1:
        if controller in mounted:
            parent = mounted[controller] / PARENT
            try:
                parent.mkdir(exist_ok=True)
                if not os.access(parent, os.W_OK):
                    raise PermissionError(errno.EACCES, "not writable", str(parent))
                parents[controller] = parent
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
    if parents:
        return Hierarchies(1, parents, "; ".join(reasons))
    return Hierarchies(0, {}, "; ".join(reasons) or "no control group hierarchy is mounted")


def plan(name: str, hierarchies: Hierarchies) -> dict[str, Any]:
    """Where the groups of that name will be, as plain values to write down before there are any."""
    paths = {controller: str(parent / name) for controller, parent in hierarchies.parents.items()}
    return {"version": hierarchies.version, "paths": paths, "reason": hierarchies.reason}


def create(planned: Mapping[str, Any], limits: Limits) -> Groups:
    """New control groups with those limits, or with as many of them as can be had; never raises OSError."""
    version, reason = int(planned.get("version", 0)), str(planned.get("reason", ""))
    paths: dict[str, Path] = {}
    notes: dict[str, str] = {}
    for controller, folder in from_json(planned).paths.items():
        try:
            folder.mkdir(exist_ok=True)
            paths[controller] = folder
        except OSError as error:
            notes[controller] = error.strerror or str(error)
    for controller, settings in _settings(version, limits).items():
        if controller in paths:
            try:
                for file, value in settings:
                    (paths[controller] / file).write_text(value)
            except OSError as error:
                notes[controller] = error.strerror or str(error)
    described = _describe(version, reason, limits, paths, notes)
    return Groups(version if paths else 0, paths, described)


def from_json(value: Mapping[str, Any]) -> Groups:
    """The groups that ``plan`` wrote down, whether they exist or not."""
    paths = {str(name): Path(path) for name, path in dict(value.get("paths", {})).items()}
    safe = {name: path for name, path in paths.items() if path.parent.name == PARENT}
    return Groups(int(value.get("version", 0)), safe, ())


def groups_of(pid: int) -> Groups:
    """The control groups that a process is in, whoever made them."""
    mounted, own = _mounted(Path("/proc/self/mountinfo")), _membership(Path(f"/proc/{pid}/cgroup"))
    if own.keys() & set(_V1):
        return Groups(
            1,
            {name: mounted[name] / own[name].lstrip("/") for name in _V1 if {name} <= own.keys() & mounted.keys()},
            (),
        )
    return Groups(
        2, {"cpu": mounted["cgroup2"] / own[""].lstrip("/")} if "cgroup2" in mounted and own.get("") else {}, ()
    )


def _settings(version: int, limits: Limits) -> dict[str, tuple[tuple[str, str], ...]]:
    quota = max(1_000, limits.cpu_milli * _CPU_PERIOD_US // 1_000)
    settings: dict[str, tuple[tuple[str, str], ...]] = {}
    if limits.memory_bytes:
        settings["memory"] = (
            (("memory.max", str(limits.memory_bytes)), ("memory.oom.group", "1"))
            if version == 2
            else (("memory.limit_in_bytes", str(limits.memory_bytes)),)
        )
    if limits.cpu_milli:
        settings["cpu"] = (
            (("cpu.max", f"{quota} {_CPU_PERIOD_US}"),)
            if version == 2
            else (("cpu.cfs_period_us", str(_CPU_PERIOD_US)), ("cpu.cfs_quota_us", str(quota)))
        )
    if limits.pids:
        settings["pids"] = (("pids.max", str(limits.pids)),)
    return settings


def _describe(
    version: int, reason: str, limits: Limits, paths: Mapping[str, Path], notes: Mapping[str, str]
) -> tuple[str, ...]:
    if not paths:
        why = reason or "; ".join(notes.values())
        return (f"cgroup=none ({why})", "memory=unlimited", "cpu=unlimited", "pids=unlimited")
    words = [f"cgroup=v{version}"]
    wanted = {
        "memory": _size(limits.memory_bytes) if limits.memory_bytes else "",
        "cpu": f"{limits.cpu_milli / 1_000:g}" if limits.cpu_milli else "",
        "pids": str(limits.pids) if limits.pids else "",
    }
    for controller, value in wanted.items():
        if not value:
            words.append(f"{controller}=unlimited")
        elif controller in paths and controller not in notes:
            words.append(f"{controller}={value}")
        else:
            words.append(f"{controller}=unlimited ({notes.get(controller, 'no such controller here')})")
    return tuple(words)


def _mounted(mounts: Path) -> dict[str, Path]:
    """Mount points: by controller for version 1, under ``cgroup2`` for version 2."""
    found: dict[str, Path] = {}
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        place, kind = before.split(" ")[4], after.split(" ")
        if kind[0] == "cgroup2":
            found["cgroup2"] = Path(place)
        elif kind[0] == "cgroup":
            found.update(dict.fromkeys((word for word in kind[-1].split(",") if word in _V1), Path(place)))
    return found


def _membership(membership: Path) -> dict[str, str]:
    """This process's group in each hierarchy, by controller; version 2 under the empty name."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _v2_base(mount: Path, own: str) -> Path | None:
    """The group in which ours can be made: the top of the tree, or what systemd gave to our user."""
    try:
        controllers = (mount / "cgroup.controllers").read_text().split()
    except OSError:
        return None
    if not set(_V2) & set(controllers):
        return None
    if os.geteuid() == 0:
        return mount
    parts = Path(own).parts
    for index, part in enumerate(parts):
        if part.startswith("user@") and part.endswith(".service"):
            return mount.joinpath(*parts[1 : index + 1])
    return mount / own.lstrip("/")


def _enable_v2(base: Path) -> str:
    """Why controllers cannot be given to groups below ``base``; empty when they are."""
    parent = base / PARENT
    try:
        parent.mkdir(exist_ok=True)
        wanted = [name for name in _V2 if name in (base / "cgroup.controllers").read_text().split()]
        for folder in (base, parent):
            enabled = (folder / "cgroup.subtree_control").read_text().split()
            if missing := [name for name in wanted if name not in enabled]:
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in missing))
        return "" if os.access(parent / "cgroup.procs", os.W_OK) else f"{parent} is not writable"
    except OSError as error:
        return f"{error.filename or parent}: {error.strerror}"


def _remove(folder: Path) -> bool:
    for _ in range(40):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            time.sleep(0.005)
        else:
            return True
    return False


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _keyed(path: Path) -> dict[str, int]:
    """The numbers of a file of ``name value`` lines."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if value.isdigit():
                found[name] = int(value)
    return found


def _size(size: int) -> str:
    return f"{size / 1e9:.4g}GB" if size >= 10**9 else f"{size / 1e6:.4g}MB"
