"""How a worker is walled off: the bubblewrap command line, whether it works here, and how to get it if not.

A worker has its own user, mount, process, IPC and host-name namespaces and sees: system folders read-only, a
minimal ``/etc`` and ``/dev``, its own ``/proc`` and ``/tmp``, its devices, and its own folders at the paths
that they have outside. A worker of a Tidemill that runs as root is still root to the kernel, though without
rights: ``/proc`` is therefore read-only for it, and device files are its own copies. It does not see Tidemill's
folders, other launches or anybody's home. The network is the machine's own: isolating it is not done here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tidemill.runner import cgroup
from tidemill.runner.processes import boot_id

USER: Final = "worker"
UID: Final = 1_000
_SYSTEM: Final = ("/usr", "/opt/rocm", "/sys/devices/system/cpu", "/sys/devices/system/node")
_GPU_SYSTEM: Final = ("/sys/bus", "/sys/class", "/sys/dev", "/sys/devices", "/sys/module")
_USR_MERGED: Final = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC: Final = (
    "alternatives", "ca-certificates", "group", "host.conf", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "localtime", "mime.types", "nsswitch.conf", "nvidia", "OpenCL", "pki", "protocols", "resolv.conf", "services",
    "ssl", "terminfo", "timezone", "vulkan",
)  # fmt: skip
_SHARED_DEVICES: Final = (
    "nvidiactl",
    "nvidia-uvm",
    "nvidia-uvm-tools",
    "nvidia-modeset",
    "nvidia-caps",
    "nvidia-caps-imex-channels",
)
_DEV: Final = ("null", "zero", "full", "random", "urandom", "tty")
TMP: Final = str(Path(os.sep, "tmp"))
NAMESPACES: Final = ("user", "mnt", "pid", "ipc", "uts")


@dataclass(frozen=True, slots=True)
class View:
    """What a worker sees beside the system: folders it may write, read only, and devices as source and place.

    Paths are the same inside and outside but for ``placed``, files and folders put read-only elsewhere, ``volumes``,
    folders put elsewhere that it may write, and ``temporary``, the folder behind ``/tmp`` (None: in memory).
    """

    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    placed: tuple[tuple[Path, str], ...] = ()
    temporary: Path | None = None
    devices: tuple[tuple[Path, Path], ...] = ()
    volumes: tuple[tuple[Path, str], ...] = ()
    host: str = "tidemill"


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a means of isolation works here, why not, and what to do about it."""

    name: str
    works: bool
    detail: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What this machine offers to wall workers off; ``bwrap`` is the program, empty when it cannot be used."""

    bwrap: str
    supports: tuple[Support, ...] = field(default=())


def arguments(bwrap: str, view: View, *, cwd: Path, info_fd: int) -> list[str]:
    """The command line that runs, in a sandbox with that view, the command appended to it.

    ``info_fd`` gets JSON with ``child-pid``, the first process inside as seen from outside.
    """
    line = [
        bwrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent",
        "--new-session", "--uid", str(UID), "--gid", str(UID), "--hostname", view.host, "--info-fd", str(info_fd),
    ]  # fmt: skip
    for folder in (*_SYSTEM, *(_GPU_SYSTEM if any("nvidia" in place.name for _, place in view.devices) else ())):
        line += ["--ro-bind-try", folder, folder]
    for folder in _USR_MERGED:
        path = Path(folder)
        if path.is_symlink():
            line += ["--symlink", str(path.readlink()), folder]
        elif path.is_dir():
            line += ["--ro-bind", folder, folder]
    for name in _ETC:
        line += ["--ro-bind-try", str(Path("/etc", name)), f"/etc/{name}"]
    line += ["--proc", "/proc", "--dev", "/dev", "--dir", str(Path(os.sep, "var", "tmp")), "--dir", "/run"]
    line += ["--bind", str(view.temporary), TMP] if view.temporary else ["--tmpfs", TMP]
    for source, place in view.placed:
        line += ["--ro-bind", str(source), place]
    for source, place in view.volumes:
        line += ["--bind", str(source), place]
    for device, node in view.devices:
        line += ["--dev-bind-try", str(device), str(node)]
    for path, flag in _by_depth(view):
        line += [flag, str(path), str(path)]
    if os.geteuid() == 0:
        line += ["--remount-ro", "/proc"]
    return [*line, "--chdir", str(cwd), "--"]


def _by_depth(view: View) -> list[tuple[Path, str]]:
    """Mounts, outer folders first, so that none covers another."""
    mounts = dict.fromkeys(view.readable, "--ro-bind") | dict.fromkeys(view.writable, "--bind")
    covered = [Path(folder) for folder in (*_SYSTEM[:1], *_USR_MERGED)]
    needed = [
        (path, flag)
        for path, flag in mounts.items()
        if flag == "--bind" or not any(path.is_relative_to(folder) for folder in covered)
    ]
    return sorted(needed, key=lambda mount: len(mount[0].parts))


def device_nodes(
    devices: Iterable[str], *, root: Path = Path("/dev"), driver: Path = Path("/proc/driver/nvidia/gpus")
) -> tuple[Path, ...]:
    """The device files that a worker with those GPUs (UUIDs or numbers) needs; none for a worker without."""
    minors = _minors(driver)
    chosen = [root / f"nvidia{minors.get(device, device)}" for device in devices]
    return (*chosen, *(root / name for name in _SHARED_DEVICES if (root / name).exists())) if chosen else ()


def private_devices(places: Iterable[Path], folder: Path) -> tuple[tuple[Path, Path], ...]:
    """Device files for one worker, as source and place.

    Root's worker owns what root owns, and could change the permissions of a device file for the whole machine.
    It gets copies of them in ``folder``, where they can be made; anybody else gets the machine's own.
    """
    if os.geteuid():
        return tuple((place, place) for place in places)
    folder.mkdir(mode=0o700, exist_ok=True)
    return tuple(
        (_copy_device(place, folder / place.name), place) for place in (*(Path("/dev", name) for name in _DEV), *places)
    )


def _copy_device(device: Path, copy: Path) -> Path:
    try:
        found = device.stat()
        if not stat.S_ISCHR(found.st_mode):
            return device
        copy.unlink(missing_ok=True)
        os.mknod(copy, 0o666 | stat.S_IFCHR, found.st_rdev)
        copy.chmod(0o666)
        os.close(os.open(copy, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError as error:
        return copy if error.errno == errno.ENXIO else device
    return copy


def _minors(driver: Path) -> dict[str, str]:
    """The number in the device file's name by GPU UUID, from what the driver says."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for file in driver.glob("*/information"):
            fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
            found[fields.get("GPU UUID", "").strip()] = fields.get("Device Minor", "").strip()
    return found


def python_prefixes(*interpreters: Path) -> tuple[Path, ...]:
    """The folders that Python interpreters need to see of themselves, with links resolved."""
    found: dict[Path, None] = {}
    for interpreter in interpreters:
        with contextlib.suppress(OSError):
            real = interpreter.resolve(strict=True)
            if real.parent.name == "bin":
                found[real.parent.parent] = None
    return tuple(path for path in found if path != Path("/usr") and path != Path("/"))


def probe_isolation(cache: Path | None = None) -> Isolation:
    """What works here, found by trying it. ``cache`` keeps the answer about bubblewrap until the next reboot."""
    found = shutil.which("bwrap") or ""
    bubblewrap = _probe_bwrap(found, cache)
    hierarchies = cgroup.find_hierarchies()
    groups = cgroup.create(cgroup.plan(f"probe-{os.getpid()}", hierarchies), cgroup.Limits(64 << 20, 1_000, 64))
    groups.remove()
    missing = [word for word in groups.described if "unlimited" in word or "none" in word]
    control = Support(
        name="cgroup",
        works=not missing,
        detail=", ".join(groups.described),
        mend="" if not missing else _CGROUP_MEND,
    )
    return Isolation(found if bubblewrap.works else "", (bubblewrap, control))


_CGROUP_MEND: Final = (
    "Run Tidemill as a systemd user service with delegation: loginctl enable-linger $USER, then "
    "systemd-run --user --unit=tidemill -p Delegate=yes tidemill up. Or run it as root."
)


def _probe_bwrap(bwrap: str, cache: Path | None) -> Support:
    if not bwrap:
        return Support(
            "bubblewrap", False, "bwrap is not installed", "apt install bubblewrap (or dnf install bubblewrap)"
        )
    key = f"{bwrap} {boot_id()} {os.geteuid()}"
    with contextlib.suppress(OSError):
        if cache and cache.read_text() == key:
            return Support("bubblewrap", True, bwrap)
    failure = _try_bwrap(bwrap)
    if failure:
        return Support("bubblewrap", False, f"bwrap does not work: {failure}", _bwrap_mend())
    if cache:
        with contextlib.suppress(OSError):
            cache.write_text(key)
    return Support("bubblewrap", True, bwrap)


def _try_bwrap(bwrap: str) -> str:
    """Why bubblewrap does not work here; empty when it does."""
    with tempfile.TemporaryDirectory(prefix="tidemill-probe-") as name, tempfile.TemporaryFile() as info:
        os.set_inheritable(info.fileno(), True)
        command = arguments(bwrap, View(writable=(Path(name),)), cwd=Path(name), info_fd=info.fileno())
        try:
            done = subprocess.run(
                [*command, "/bin/sh", "-c", "test -d /proc/1 && : > here"],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=10, pass_fds=(info.fileno(),), check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            return done.stderr.decode(errors="replace").strip()[-300:] or f"exit status {done.returncode}"
        return "" if Path(name, "here").exists() else "it ran, but its folder was not writable"


_SYSCTLS: Final[Mapping[str, tuple[str, str]]] = {
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        (
            "AppArmor forbids unprivileged user namespaces (Ubuntu 24.04 and later): give bwrap a profile that "
            "allows userns, or sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        ),
    ),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
    "/proc/sys/user/max_user_namespaces": ("0", "sudo sysctl user.max_user_namespaces=15000"),
}


def _bwrap_mend() -> str:
    mends = []
    for name, (bad, mend) in _SYSCTLS.items():
        with contextlib.suppress(OSError):
            if Path(name).read_text().strip() == bad:
                mends.append(mend)
    return "; ".join(mends) or "In a container, allow user namespaces (for Docker: --security-opt seccomp=unconfined)."


def describe(isolation_bwrap: str, reason: str, groups: cgroup.Groups, devices: int) -> tuple[str, ...]:
    """What a worker really has, as ``name=value`` words."""
    sandbox = (
        ("sandbox=bwrap", f"namespaces={','.join(NAMESPACES)}", "network=host")
        if isolation_bwrap
        else (f"sandbox=none ({reason})", "namespaces=none", "network=host")
    )
    return (*sandbox, *groups.described, f"devices={devices}")
