"""This machine as a node: what jobs may have of it. The same answer each time, unless the machine changed."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from tidemill import catalog
from tidemill.model.fleet import Device, Mig, Node, NodeState
from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.telemetry.nvml import Gpu, Nvml, the_nvml
from tidemill.units import MILLI

_ROOT: Final = Path("/")
_LEAST_MILLI: Final = 100


def discover_node(
    site_id: SiteId,
    *,
    identity: NodeId | None = None,
    name: str | None = None,
    root: Path = _ROOT,
    nvml: Nvml | None = None,
    disk: Path | None = None,
    address: str = "127.0.0.1",
    reserve_cpu_milli: int = 0,
    labels: tuple[tuple[str, str], ...] = (),
    taints: tuple[str, ...] = (),
    rack: str = "",
    block: str = "",
    mig_dynamic: Sequence[str] = (),
) -> Node:
    """This machine. Sizes are what a process here may really use, of CPUs, memory and the disk under ``disk``.

    ``reserve_cpu_milli`` of the processors are kept from jobs. ``mig_dynamic`` lists the GPUs in MIG mode, by number or
    UUID, whose slices may be made and unmade, or has ``all``; of others only the slices that are there are used. Its id
    follows from the machine's own, and stays the same across restarts of anything, unless ``identity`` is given.
    """
    cpu_model = _cpu_model(root)
    idle_mw, busy_mw = catalog.cpu_power(cpu_model)
    return Node(
        id=identity or node_id(root=root),
        site_id=site_id,
        name=name or socket.gethostname(),
        state=NodeState.READY,
        version=1,
        boot_id=_read(root / "proc/sys/kernel/random/boot_id"),
        address=address,
        cpu_milli=max(usable_cpu_milli(root=root) - reserve_cpu_milli, _LEAST_MILLI),
        memory_bytes=usable_memory_bytes(root=root),
        disk_bytes=_disk_bytes(disk or Path.home()),
        cpu_model=cpu_model,
        cpu_idle_mw=idle_mw,
        cpu_busy_mw=busy_mw,
        images=_can_run_images(root, os.environ),
        devices=tuple(_device(gpu, mig_dynamic) for gpu in (nvml or the_nvml()).gpus()),
        labels=labels,
        taints=taints,
        rack=rack,
        block=block,
    )


def node_id(*, root: Path = _ROOT) -> NodeId:
    """The id of this machine as a node: a hash of its machine id, which is itself not to be shown around."""
    for place in ("etc/machine-id", "var/lib/dbus/machine-id"):
        if (text := _read(root / place)) and text != "uninitialized":
            break
    else:
        text = f"host {socket.gethostname()}"
    return NodeId(f"node_{hashlib.sha256(f'tidemill {text}'.encode()).hexdigest()[:16]}")


def usable_cpu_milli(*, root: Path = _ROOT, cores: int | None = None) -> int:
    """Thousandths of cores that this process may use: its affinity (or ``cores``), less by a cgroup's quota."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([cores * MILLI, *_cpu_quotas(root)]), _LEAST_MILLI)


def usable_memory_bytes(*, root: Path = _ROOT) -> int:
    """Memory of this machine, or of the cgroup that this process is in when that is less."""
    return min([_memory_total(root), *_memory_limits(root)])


def _device(gpu: Gpu, mig_dynamic: Sequence[str]) -> Device:
    spec = catalog.match_device(gpu.name, gpu.memory_bytes)
    if spec is None:
        spec = catalog.derived_device(gpu.name, gpu.memory_bytes, power_mw=gpu.limit_mw)
    busy_mw = min(gpu.limit_mw, spec.busy_mw) if gpu.limit_mw and spec.busy_mw else gpu.limit_mw or spec.busy_mw
    is_dynamic = any(word in ("all", str(gpu.index)) or gpu.uuid.startswith(word) for word in mig_dynamic if word)
    mig = Mig.OFF if not gpu.is_cut else Mig.DYNAMIC if is_dynamic else Mig.FIXED
    return Device(
        id=DeviceId(gpu.uuid),
        index=gpu.index,
        model=spec.model,
        reported=gpu.name,
        memory_bytes=spec.memory_bytes,
        idle_mw=min(spec.idle_mw, busy_mw),
        busy_mw=busy_mw,
        island=gpu.island,
        mig=mig,
        slices=tuple((part.profile, part.start, part.uuid) for part in gpu.slices) if mig is Mig.FIXED else (),
    )


def _cpu_quotas(root: Path) -> Iterator[int]:
    for folder in _cgroup_folders(root, ""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) * MILLI // int(period)
    for folder in _cgroup_folders(root, "cpu"):
        old_quota, old_period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if old_quota.isdigit() and old_period.isdigit() and int(old_quota) and int(old_period):
            yield int(old_quota) * MILLI // int(old_period)


def _memory_limits(root: Path) -> Iterator[int]:
    files = [folder / "memory.max" for folder in _cgroup_folders(root, "")]
    files += [folder / "memory.limit_in_bytes" for folder in _cgroup_folders(root, "memory")]
    for file in files:
        if (limit := _read(file)).isdigit() and int(limit):
            yield int(limit)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and all above it, in version 2 or in a controller of version 1.

    Where the path is one of the host's that is not mounted here, what is mounted is at the top.
    """
    mount, path = root / "sys/fs/cgroup", ""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, where = line.split(":", 2)
        if controller in controllers.split(","):
            mount = mount / controllers if (mount / controllers).is_dir() else mount / controller
            path = where.strip("/")
            break
    else:
        if controller:
            return
    folder = mount / path
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _memory_total(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return int(psutil.virtual_memory().total)


def _disk_bytes(folder: Path) -> int:
    near = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    return shutil.disk_usage(near).total


def _cpu_model(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _can_run_images(root: Path, environment: Mapping[str, str]) -> bool:
    """Whether this user can run containers: docker's daemon lets them in, or podman works for them."""
    path = environment.get("PATH")
    if shutil.which("docker", path=path) and _listens(root / "var/run/docker.sock"):
        return True
    if not shutil.which("podman", path=path):
        return False
    return os.geteuid() == 0 or (shutil.which("newuidmap", path=path) is not None and bool(_read(root / "etc/subuid")))


def _listens(path: Path) -> bool:
    """Whether somebody behind that socket takes calls from this user."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(0.2)
        try:
            caller.connect(str(path))
        except OSError:
            return False
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
