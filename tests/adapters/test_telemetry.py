"""A machine is described as it is, and its meters only grow: over trees of files and a library that stand for it.

``FakeNvml`` stands for the module ``pynvml`` of nvidia-ml-py over an NVIDIA driver: its functions have the names,
arguments, units and errors of the real one, and its error classes are the real module's. The trees stand for
``/proc``, ``/sys`` and ``/etc`` of Linux.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pynvml
import pytest

from tidemill import catalog, telemetry
from tidemill.errors import EngineRefused
from tidemill.model.events import DeviceFailed, Sampled
from tidemill.model.fleet import Mig, Node
from tidemill.model.ids import NodeId, SiteId
from tidemill.telemetry import EnergyMeters, HealthWatcher, Nvml, SliceMaker
from tidemill.units import SECOND_NS

MIB, GIB = 1024**2, 1024**3
SITE = SiteId("site")


@dataclass
class Info:
    """What a call of NVML answers with several numbers."""

    total: int = 0
    used: int = 0
    gpu: int = 0


@dataclass
class Card:
    """One GPU of the fake driver. ``energy_mj`` None: its driver does not count energy, as before Volta."""

    name: str
    uuid: str
    mib: int
    energy_mj: int | None = 0
    power_mw: int | None = 100_000
    limit_mw: int = 700_000
    mig: bool = False
    slices: list[Card] = field(default_factory=list)
    lost: bool = False
    links: tuple[str, ...] | None = None
    """The UUIDs that it reaches over NVLink; None: its driver does not tell."""
    start: int | None = None
    """Of a slice: where it begins; None: only root may know."""
    uncorrected: int | None = 0
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Rows replaced after corrected and uncorrected errors, and whether some wait and whether one failed."""
    slowed: int = 0
    """The reasons for which its clocks are low."""


class FakeNvml:
    """``pynvml`` with some cards. ``broken`` is the error of ``nvmlInit``; ``dead`` a driver that was unloaded."""

    def __init__(self, *cards: Card, broken: int = 0) -> None:
        self.cards = list(cards)
        self.broken = broken
        self.dead = False
        self.inits = 0
        self.event_sets: list[list[tuple[str, int]]] = []
        self.xids: list[tuple[Card, int]] = []
        self._functions: dict[str, Callable[..., Any]] = {
            "nvmlInit": self._init,
            "nvmlDeviceGetCount": self._count,
            "nvmlDeviceGetHandleByIndex": lambda index: self._alive(self.cards[index]),
            "nvmlDeviceGetUUID": lambda card: self._alive(card).uuid,
            "nvmlDeviceGetName": lambda card: self._alive(card).name,
            "nvmlDeviceGetMemoryInfo": lambda card: Info(total=self._alive(card).mib * MIB, used=3 * GIB),
            "nvmlDeviceGetPowerManagementLimit": lambda card: self._alive(card).limit_mw,
            "nvmlDeviceGetMigMode": self._mig_mode,
            "nvmlDeviceGetMaxMigDeviceCount": lambda _: 7,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._slice,
            "nvmlDeviceGetTotalEnergyConsumption": lambda card: self._some(self._alive(card).energy_mj),
            "nvmlDeviceGetPowerUsage": lambda card: self._some(self._alive(card).power_mw),
            "nvmlDeviceGetUtilizationRates": self._rates,
            "nvmlDeviceGetGpuInstanceId": lambda card: self._some(card.start),
            "nvmlDeviceGetGpuInstanceById": lambda card, number: number,
            "nvmlGpuInstanceGetInfo": lambda number: SimpleNamespace(placement=SimpleNamespace(start=number)),
            "nvmlDeviceGetP2PStatus": self._linked,
            "nvmlDeviceGetTotalEccErrors": self._ecc,
            "nvmlDeviceGetRemappedRows": lambda card: self._alive(card).rows,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda card: self._alive(card).slowed,
            "nvmlDeviceGetSupportedEventTypes": lambda _: pynvml.nvmlEventTypeXidCriticalError | 1,
            "nvmlEventSetCreate": self._event_set,
            "nvmlEventSetFree": self.event_sets.remove,
            "nvmlDeviceRegisterEvents": lambda card, types, events: events.append((card.uuid, types)),
            "nvmlEventSetWait_v2": self._next_event,
            "nvmlDeviceGetTemperature": lambda card, sensor: self._some(
                61 if sensor == pynvml.NVML_TEMPERATURE_GPU else None
            ),
        }
        assert all(hasattr(pynvml, name) for name in self._functions), "the real module has all of them"

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVMLError", "NVML_", "nvmlEventType")):
            return getattr(pynvml, name)
        return self._functions[name]

    def _init(self) -> None:
        if self.broken:
            raise pynvml.NVMLError(self.broken)
        self.dead = False
        self.inits += 1

    def _count(self) -> int:
        if self.dead:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return len(self.cards)

    def _alive(self, card: Card) -> Card:
        if card.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return card

    def _some(self, value: Any) -> Any:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _mig_mode(self, card: Card) -> list[int]:
        if "A100" not in card.name:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(card.mig), int(card.mig)]

    def _slice(self, card: Card, index: int) -> Card:
        if index >= len(card.slices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return card.slices[index]

    def _linked(self, one: Card, other: Card, index: int) -> int:
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        reached = other.uuid in self._some(one.links)
        return int(pynvml.NVML_P2P_STATUS_OK if reached else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)

    def _ecc(self, card: Card, kind: int, counter: int) -> int:
        assert (kind, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return int(self._some(self._alive(card).uncorrected))

    def _event_set(self) -> list[tuple[str, int]]:
        self.event_sets.append([])
        return self.event_sets[-1]

    def _next_event(self, events: list[tuple[str, int]], wait_ms: int) -> Any:
        assert wait_ms == 0, "nobody waits"
        assert events is self.event_sets[-1]
        watched = {uuid for uuid, types in events if types == pynvml.nvmlEventTypeXidCriticalError}
        for card, xid in self.xids:
            if card.uuid in watched:
                self.xids.remove((card, xid))
                return SimpleNamespace(device=card, eventData=xid)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)

    def _rates(self, card: Card) -> Info:
        if card.mig:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return Info(gpu=87)


def h100(number: int, **changes: Any) -> Card:
    return Card("NVIDIA H100 80GB HBM3", f"GPU-{number}aaa-bbb", 81_559, **changes)


def cut_a100() -> Card:
    slices = [
        Card("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-1", 4_864),
        Card("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-2", 19_968),
    ]
    return Card("NVIDIA A100-SXM4-40GB", "GPU-whole", 40_960, limit_mw=400_000, mig=True, slices=slices)


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of those files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The files of a machine with 512 GiB of memory and two processors of 32 threads each."""
    return write(
        tmp_path / "root",
        {
            "etc/machine-id": "0123456789abcdef0123456789abcdef",
            "proc/sys/kernel/random/boot_id": "11111111-2222-3333-4444-555555555555",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 7R32\nprocessor\t: 1\nmodel name\t: AMD EPYC 7R32",
            "proc/meminfo": "MemTotal:       536870912 kB\nMemFree:        1 kB",
            "proc/self/cgroup": "0::/",
            "sys/devices/system/cpu/online": "0-63",
        },
    )


def rapl(root: Path, *packages: tuple[int, int]) -> list[Path]:
    """Counters of processors: micro-joules and where they wrap, each with parts that must not be counted."""
    files = {}
    for number, (energy, span) in enumerate(packages):
        zone = f"sys/class/powercap/intel-rapl:{number}"
        files |= {
            f"{zone}/name": f"package-{number}",
            f"{zone}/energy_uj": str(energy),
            f"{zone}/max_energy_range_uj": str(span),
        }
        files |= {
            f"{zone}:0/name": "core",
            f"{zone}:0/energy_uj": "999999999",
            f"{zone}:0/max_energy_range_uj": str(span),
        }
    files |= {"sys/class/powercap/intel-rapl:9/name": "psys", "sys/class/powercap/intel-rapl:9/energy_uj": "777777777"}
    files |= {
        "sys/class/powercap/intel-rapl-mmio:0/name": "package-0",
        "sys/class/powercap/intel-rapl-mmio:0/energy_uj": "1",
    }
    write(root, files)
    return [root / f"sys/class/powercap/intel-rapl:{number}/energy_uj" for number in range(len(packages))]


def found(root: Path, *cards: Card, visible: str | None = None) -> Node:
    return telemetry.discover_node(SITE, root=root, nvml=Nvml(FakeNvml(*cards), visible=visible))


# ---------------------------------------------------------------------- the node


def test_a_node_is_described_as_it_is(machine: Path) -> None:
    node = found(machine, h100(0), h100(1), Card("NVIDIA TITAN V", "GPU-t", 12_066, limit_mw=250_000))
    assert node.site_id == SITE
    assert node.boot_id == "11111111-2222-3333-4444-555555555555"
    assert node.memory_bytes == 512 * GIB
    assert node.cpu_model == "AMD EPYC 7R32"
    assert (node.cpu_idle_mw, node.cpu_busy_mw) == catalog.cpu_power("AMD EPYC 7R32")
    assert [(device.index, device.model, device.memory_bytes) for device in node.devices] == [
        (0, "H100-SXM", 80 * GIB),
        (1, "H100-SXM", 80 * GIB),
        (2, "TITAN-V", 12 * GIB),
    ]
    assert [(device.idle_mw, device.busy_mw) for device in node.devices] == [(70_000, 700_000)] * 2 + [
        (25_000, 250_000)
    ]
    assert found(machine, name := h100(0)) == found(machine, name), "the same machine looks the same"


def test_cores_that_are_reserved_are_not_offered(machine: Path) -> None:
    whole = found(machine).cpu_milli
    kept = telemetry.discover_node(SITE, root=machine, nvml=Nvml(FakeNvml()), reserve_cpu_milli=whole // 4)
    assert kept.cpu_milli == whole - whole // 4
    none_left = telemetry.discover_node(SITE, root=machine, nvml=Nvml(FakeNvml()), reserve_cpu_milli=10 * whole)
    assert none_left.cpu_milli == 100, "there is always something"


def test_images_need_more_than_a_command_that_is_called_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(tempfile.mkdtemp(prefix="tm", dir="/tmp"))  # the name of a socket has to be short
    write(root, {"bin/docker": "#!/bin/sh", "proc/self/cgroup": "0::/"})
    (root / "bin/docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(root / "bin"))
    try:
        assert not found(root).images, "there is no daemon"
        (root / "var/run").mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.bind(str(root / "var/run/docker.sock"))
            assert not found(root).images, "its socket is left over, and nobody listens"
            daemon.listen()
            assert found(root).images
        assert not found(root).images
    finally:
        shutil.rmtree(root)


def test_a_power_limit_set_in_the_driver_lowers_the_estimate(machine: Path) -> None:
    (device,) = found(machine, h100(0, limit_mw=350_000)).devices
    assert device.busy_mw == 350_000


def test_the_id_is_the_machines_and_does_not_show_the_machine_id(machine: Path, tmp_path: Path) -> None:
    node = found(machine)
    write(machine, {"proc/sys/kernel/random/boot_id": "another"})
    rebooted = telemetry.discover_node(SITE, name="another name", root=machine, nvml=Nvml(FakeNvml()))
    assert (rebooted.id, rebooted.name, rebooted.boot_id) == (node.id, "another name", "another")
    assert "0123456789abcdef" not in node.id
    other = write(tmp_path / "other", {"etc/machine-id": "ffffffffffffffffffffffffffffffff"})
    assert telemetry.node_id(root=other) != node.id
    fresh = write(tmp_path / "fresh", {"etc/machine-id": "uninitialized"})
    assert telemetry.node_id(root=fresh) == telemetry.node_id(root=tmp_path / "nothing")


GB = 10**9


@pytest.mark.parametrize(
    ("files", "cores", "milli", "memory"),
    [
        ({}, 64, 64_000, 512 * GIB),
        ({"sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"}, 8, 8_000, 512 * GIB),
        ({"sys/fs/cgroup/cpu.max": "250000 100000", "sys/fs/cgroup/memory.max": str(GB)}, 8, 2_500, GB),
        ({"sys/fs/cgroup/cpu.max": "1000 100000"}, 8, 100, 512 * GIB),
        (  # the limit stands above the group that this process is in
            {
                "proc/self/cgroup": "0::/user.slice/me.service",
                "sys/fs/cgroup/user.slice/cpu.max": "300000 100000",
                "sys/fs/cgroup/user.slice/me.service/cpu.max": "max 100000",
                "sys/fs/cgroup/user.slice/memory.max": str(7 * GB),
            },
            8, 3_000, 7 * GB,
        ),
        (  # version 1, with the host's path, of which a container shows only the end
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GB),
            },
            8, 1_500, 2 * GB,
        ),
        (  # version 1 without limits
            {
                "proc/self/cgroup": "2:cpu:/\n1:memory:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            8, 8_000, 512 * GIB,
        ),
        ({"sys/fs/cgroup/cpu.max": "rubbish", "sys/fs/cgroup/memory.max": ""}, 8, 8_000, 512 * GIB),
    ],
)  # fmt: skip
def test_cpus_and_memory_are_what_may_be_used(
    machine: Path, files: dict[str, str], cores: int, milli: int, memory: int
) -> None:
    write(machine, files)
    assert telemetry.usable_cpu_milli(root=machine, cores=cores) == milli
    assert telemetry.usable_memory_bytes(root=machine) == memory


def test_this_very_machine_can_be_described() -> None:
    node = telemetry.discover_node(SITE)
    assert node == telemetry.discover_node(SITE)
    assert 0 < node.cpu_milli <= (psutil.cpu_count() or 1) * 1000
    assert 0 < node.memory_bytes <= psutil.virtual_memory().total
    assert node.disk_bytes > 0
    assert node.cpu_model
    stats = telemetry.node_stats()
    assert 0 <= stats.memory_used <= stats.memory_total
    assert bool(node.devices) == (telemetry.why_no_gpu() == "")
    EnergyMeters().sample()


def test_cpus_kept_from_this_process_are_not_offered() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tidemill import telemetry; print(telemetry.usable_cpu_milli())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1_000


# ---------------------------------------------------------------------- GPUs that are not there


def test_a_gpu_that_fell_off_the_bus_is_left_out_and_comes_back(machine: Path) -> None:
    cards = [h100(0), h100(1), h100(2)]
    fake = FakeNvml(*cards)
    nvml, now = Nvml(fake), [SECOND_NS]
    meters = EnergyMeters(NodeId("n"), root=machine, nvml=nvml, clock=lambda: now[0])
    assert len(read(meters)) == 3
    cards[1].lost = True
    assert set(read(meters)) == {cards[0].uuid, cards[2].uuid}
    assert [gpu.uuid for gpu in nvml.gpus()] == [cards[0].uuid, cards[2].uuid]
    assert "GPU 1" in nvml.losses[0]
    node = telemetry.discover_node(SITE, root=machine, nvml=nvml)
    assert [device.id for device in node.devices] == [cards[0].uuid, cards[2].uuid]
    assert [device.index for device in node.devices] == [0, 2], "the others keep their places"
    cards[1].lost = False
    assert len(read(meters)) == 3
    assert nvml.losses == ()


def test_a_driver_that_is_loaded_again_is_asked_again() -> None:
    fake = FakeNvml(h100(0))
    nvml = Nvml(fake)
    assert len(nvml.gpus()) == 1
    fake.dead = True
    assert nvml.gpus() == ()
    assert "stopped answering" in nvml.reason
    assert len(nvml.gpus()) == 1
    assert fake.inits == 2


@pytest.mark.parametrize(
    ("broken", "files", "sentence"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, {}, "This machine has no NVIDIA GPU."),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, {"vendor": "0x10de", "class": "0x030200"}, "0000:01:00.0. The NVIDIA driver is not installed"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, {"vendor": "0x10de", "class": "0x040300"}, "This machine has no NVIDIA GPU."),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, {"vendor": "0x8086", "class": "0x030000"}, "This machine has no NVIDIA GPU."),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, {"vendor": "0x10de", "class": "0x030000"}, "modprobe nvidia"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, {"vendor": "0x10de", "class": "0x030000"}, "reboot"),
        (pynvml.NVML_ERROR_NO_PERMISSION, {"vendor": "0x10de", "class": "0x030000"}, "/dev/nvidia"),
        (pynvml.NVML_ERROR_UNKNOWN, {"vendor": "0x10de", "class": "0x030000"}, "does not answer"),
        (0, {"vendor": "0x10de", "class": "0x030000"}, "shows no GPU"),
    ],
)  # fmt: skip
def test_why_there_is_no_gpu_is_told(machine: Path, broken: int, files: dict[str, str], sentence: str) -> None:
    write(machine, {f"sys/bus/pci/devices/0000:01:00.0/{name}": text for name, text in files.items()})
    nvml = Nvml(FakeNvml(broken=broken))
    assert sentence in telemetry.why_no_gpu(nvml, root=machine)
    assert telemetry.discover_node(SITE, root=machine, nvml=nvml).devices == ()


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        (None, [0, 1, 2]), ("0,1,2", [0, 1, 2]), ("2,0", [0, 2]), ("1", [1]), ("GPU-1aaa", [1]), ("GPU-2aaa-bbb,0", [0, 2]),
        ("0,9,1", [0]), ("", []), ("-1", []), ("NoDevFiles", []),
    ],
)  # fmt: skip
def test_gpus_hidden_from_the_control_plane_are_not_offered(
    machine: Path, visible: str | None, indexes: list[int]
) -> None:
    cards = [h100(0), h100(1), h100(2)]
    assert [device.index for device in found(machine, *cards, visible=visible).devices] == indexes
    nvml = Nvml(FakeNvml(*cards), visible=visible)
    assert ("hides all 3 GPUs" in telemetry.why_no_gpu(nvml, root=machine)) is (not indexes)


def test_a_gpu_in_mig_mode_is_offered_with_its_slices(machine: Path) -> None:
    node = found(machine, h100(0), cut_a100())
    assert [device.mig for device in node.devices] == [Mig.OFF, Mig.FIXED]
    cut = node.devices[1]
    assert (cut.id, cut.model, cut.memory_bytes) == ("GPU-whole", "A100-40GB-SXM", 40 * GIB)
    assert cut.slices == (("1g.5gb", 0, "MIG-1"), ("3g.20gb", 1, "MIG-2")), "nobody may say where they are: in a row"
    card = cut_a100()
    card.slices[0].start, card.slices[1].start = 6, 0
    assert found(machine, card).devices[0].slices == (("3g.20gb", 0, "MIG-2"), ("1g.5gb", 6, "MIG-1"))


@pytest.mark.parametrize(
    ("marked", "kinds"),
    [
        ((), ["off", "fixed"]), (("1",), ["off", "dynamic"]), (("all",), ["off", "dynamic"]),
        (("GPU-whole",), ["off", "dynamic"]), (("0", ""), ["off", "fixed"]),
    ],
)  # fmt: skip
def test_slices_are_made_only_where_a_setting_says_so(machine: Path, marked: tuple[str, ...], kinds: list[str]) -> None:
    nvml = Nvml(FakeNvml(h100(0), cut_a100()))
    node = telemetry.discover_node(SITE, root=machine, nvml=nvml, mig_dynamic=marked)
    assert [device.mig.value for device in node.devices] == kinds
    assert bool(node.devices[1].slices) == (kinds[1] == "fixed")


@pytest.mark.parametrize(
    ("visible", "slices"),
    [("0", ["MIG-1", "MIG-2"]), ("MIG-2", ["MIG-2"]), ("MIG-2,MIG-1", ["MIG-1", "MIG-2"]), ("MIG-9,0", None)],
)
def test_slices_hidden_from_the_control_plane_are_not_offered(
    machine: Path, visible: str, slices: list[str] | None
) -> None:
    devices = found(machine, cut_a100(), visible=visible).devices
    assert [[uuid for _, _, uuid in device.slices] for device in devices] == ([] if slices is None else [slices])


@pytest.mark.parametrize(
    ("links", "islands"),
    [
        ([None, None, None, None], [0, 0, 0, 0]),
        ([(), (), (), ()], [0, 1, 2, 3]),
        ([("0", "1", "2", "3")] * 4, [0, 0, 0, 0]),
        ([("1",), ("0",), ("3",), ("2",)], [0, 0, 1, 1]),
        ([("2",), ("3",), ("0",), ("1",)], [0, 1, 0, 1]),
        ([("1",), ("0", "2"), ("1", "3"), ("2",)], [0, 0, 0, 0]),
        ([("1",), ("0",), None, ()], [0, 0, 0, 0]),
    ],
)
def test_gpus_that_reach_each_other_fast_are_an_island(
    machine: Path, links: list[tuple[str, ...] | None], islands: list[int]
) -> None:
    cards = [
        h100(number, links=None if each is None else tuple(f"GPU-{other}aaa-bbb" for other in each))
        for number, each in enumerate(links)
    ]
    assert [device.island for device in found(machine, *cards).devices] == islands


def test_a_cut_gpu_is_an_island_of_its_own(machine: Path) -> None:
    pair = [h100(0, links=("GPU-1aaa-bbb",)), h100(1, links=("GPU-0aaa-bbb",))]
    assert [device.island for device in found(machine, pair[0], cut_a100(), pair[1]).devices] == [0, 1, 0]


class CutNvml(FakeNvml):
    """A driver whose one GPU, an A100 in MIG mode, can be cut: slices are cards with instances."""

    PROFILES: ClassVar = {
        0: ("1g.5gb", 19, 1, 1, 4_864),
        1: ("2g.10gb", 14, 2, 2, 9_984),
        2: ("3g.20gb", 9, 3, 4, 20_096),
    }

    def __init__(self) -> None:
        super().__init__(Card("NVIDIA A100-SXM4-40GB", "GPU-whole", 40_960, mig=True))
        self.whole = self.cards[0]
        self.busy: set[str] = set()
        self.without_compute: list[Card] = []
        self.no_compute = False
        self._functions |= {
            "nvmlDeviceGetGpuInstanceProfileInfo": self._profile,
            "nvmlDeviceCreateGpuInstanceWithPlacement": self._create,
            "nvmlGpuInstanceGetComputeInstanceProfileInfo": self._compute_profile,
            "nvmlGpuInstanceCreateComputeInstance": self._compute,
            "nvmlGpuInstanceGetComputeInstanceById": lambda card, number: ("compute", card),
            "nvmlDeviceGetComputeInstanceId": lambda card: 0,
            "nvmlDeviceGetGpuInstanceId": lambda card: card.uuid,
            "nvmlDeviceGetGpuInstanceById": lambda whole, uuid: next(c for c in whole.slices if c.uuid == uuid),
            "nvmlGpuInstanceGetInfo": lambda card: SimpleNamespace(
                id=card.uuid, placement=SimpleNamespace(start=card.start, size=self.size(card))
            ),
            "nvmlComputeInstanceDestroy": self._destroy_compute,
            "nvmlGpuInstanceDestroy": lambda card: self.without_compute.remove(card),
        }
        assert all(hasattr(pynvml, name) for name in self._functions), "the real module has all of them"

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name) if name.startswith("c_nvml") else super().__getattr__(name)

    def size(self, card: Card) -> int:
        return next(size for name, _, _, size, _ in self.PROFILES.values() if card.name.endswith(name))

    def _profile(self, whole: Card, number: int) -> Any:
        if number not in self.PROFILES:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        name, identity, count, _, mib = self.PROFILES[number]
        return SimpleNamespace(
            name=f"MIG {name}", id=identity, sliceCount=count, memorySizeMB=mib, instanceCount=7 // count
        )

    def _create(self, whole: Card, profile: int, placement: Any) -> Card:
        name, _, _, size, mib = next(each for each in self.PROFILES.values() if each[1] == profile)
        place = placement._obj
        assert place.size == size, "as the driver's own table of placements says"
        taken = [range(c.start or 0, (c.start or 0) + self.size(c)) for c in (*whole.slices, *self.without_compute)]
        if any(step in each for each in taken for step in range(place.start, place.start + size)):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
        card = Card(f"{whole.name} MIG {name}", f"MIG-{name}-{place.start}", mib, start=place.start)
        self.without_compute.append(card)
        return card

    def _compute_profile(self, card: Card, number: int, engines: int) -> Any:
        assert engines == pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
        if number not in self.PROFILES or self.no_compute:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(id=number, sliceCount=self.PROFILES[number][2])

    def _compute(self, card: Card, profile: int) -> None:
        assert card.name.endswith(self.PROFILES[profile][0])
        self.without_compute.remove(card)
        self.whole.slices.append(card)

    def _destroy_compute(self, instance: tuple[str, Card]) -> None:
        if instance[1].uuid in self.busy:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        self.whole.slices.remove(instance[1])
        self.without_compute.append(instance[1])


def test_a_slice_is_made_where_it_is_needed_and_made_again_only_when_it_is_gone() -> None:
    driver = CutNvml()
    maker = SliceMaker(nvml=Nvml(driver))
    assert maker.make("GPU-whole", "1g.5gb", 6) == "MIG-1g.5gb-6"
    assert maker.make("GPU-whole", "3g.20gb", 0) == "MIG-3g.20gb-0"
    assert maker.make("GPU-whole", "1g.5gb", 6) == "MIG-1g.5gb-6", "it is there"
    assert [card.uuid for card in driver.whole.slices] == ["MIG-1g.5gb-6", "MIG-3g.20gb-0"]
    assert maker.make("GPU-whole", "2g.10gb", 2) == "MIG-2g.10gb-2"
    assert [card.uuid for card in driver.whole.slices] == ["MIG-1g.5gb-6", "MIG-2g.10gb-2"], "what lay there is unmade"
    assert driver.without_compute == []


def test_a_slice_that_is_used_is_not_unmade() -> None:
    driver = CutNvml()
    maker = SliceMaker(nvml=Nvml(driver))
    driver.busy.add(maker.make("GPU-whole", "3g.20gb", 4))
    with pytest.raises(EngineRefused, match="cannot be made on GPU-whole"):
        maker.make("GPU-whole", "1g.5gb", 5)
    assert [card.uuid for card in driver.whole.slices] == ["MIG-3g.20gb-4"]


def test_what_cannot_be_made_leaves_nothing_behind() -> None:
    driver = CutNvml()
    maker = SliceMaker(nvml=Nvml(driver))
    with pytest.raises(EngineRefused, match="cannot have a slice 9g"):
        maker.make("GPU-whole", "9g.80gb", 0)
    with pytest.raises(EngineRefused, match="GPU-other does not answer"):
        maker.make("GPU-other", "1g.5gb", 0)
    driver.no_compute = True
    with pytest.raises(EngineRefused):
        maker.make("GPU-whole", "1g.5gb", 0)
    assert (driver.whole.slices, driver.without_compute) == ([], [])


# ---------------------------------------------------------------------- which fail


class Watch:
    """A watcher over some cards, and the clock's hands."""

    def __init__(self, *cards: Card) -> None:
        self.fake = FakeNvml(*cards)
        self.now = SECOND_NS
        self.watcher = HealthWatcher(
            NodeId("n"), nvml=Nvml(self.fake), recheck_ns=600 * SECOND_NS, hot_ns=120 * SECOND_NS
        )
        assert self.after(0) == [], "sound so far"

    def after(self, seconds: int) -> list[tuple[str, str]]:
        """What is told after that time: the device, and what it fails of (empty: it is well again)."""
        self.now += seconds * SECOND_NS
        facts = self.watcher.health_facts(self.now)
        assert all(fact.node_id == "n" and fact.at_ns == self.now for fact in facts)
        return [(fact.device_id, fact.detail if isinstance(fact, DeviceFailed) else "") for fact in facts]


def test_a_critical_error_is_told_once_and_the_gpu_is_rechecked() -> None:
    bad, good = h100(0), h100(1)
    watch = Watch(bad, good)
    watch.fake.xids += [(bad, 79), (bad, 48)]
    assert watch.after(5) == [(bad.uuid, "XID 79; XID 48")]
    assert watch.after(5) == [], "nothing is told twice"
    assert watch.after(594) == []
    assert watch.after(1) == [(bad.uuid, "")]
    assert watch.after(5) == []
    watch.fake.xids.append((bad, 79))
    assert watch.after(5) == [(bad.uuid, "XID 79")]
    assert watch.after(600) == [], "who failed before has to be without fault for longer"
    assert watch.after(600) == [(bad.uuid, "")]
    assert len(watch.fake.event_sets) == 1


def test_another_error_while_it_fails_is_told_too_and_counts_anew() -> None:
    card = h100(0)
    watch = Watch(card)
    watch.fake.xids.append((card, 48))
    assert watch.after(5) == [(card.uuid, "XID 48")]
    watch.fake.xids.append((card, 95))
    assert watch.after(500) == [(card.uuid, "XID 95")]
    assert watch.after(599) == []
    assert watch.after(1) == [(card.uuid, "")]


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109])
def test_what_a_faulty_program_causes_does_not_fail_the_gpu(xid: int) -> None:
    card = h100(0)
    watch = Watch(card)
    watch.fake.xids.append((card, xid))
    assert watch.after(5) == []
    assert watch.fake.xids == [], "it was looked at"


def test_memory_errors_that_were_not_corrected_are_told_as_they_are_counted() -> None:
    card, old = h100(0), Card("Tesla P40", "GPU-p", 24_000, uncorrected=None)
    watch = Watch(card, old)
    card.uncorrected = 3
    assert watch.after(5) == [(card.uuid, "3 memory errors could not be corrected")]
    assert watch.after(5) == []
    card.uncorrected = 4
    assert watch.after(5) == [(card.uuid, "1 memory errors could not be corrected")]
    card.uncorrected = 0  # the driver was loaded again
    assert watch.after(600) == [(card.uuid, "")]
    card.uncorrected = 1
    assert watch.after(5) == [(card.uuid, "1 memory errors could not be corrected")]


@pytest.mark.parametrize(
    ("rows", "sentence"), [((0, 1, 1, 0), "at the next reset"), ((0, 1, 0, 1), "could not be replaced")]
)
def test_rows_that_are_not_replaced_fail_it_for_as_long_as_that_is_so(
    rows: tuple[int, int, int, int], sentence: str
) -> None:
    card = h100(0)
    watch = Watch(card)
    card.rows = rows
    ((device, told),) = watch.after(5)
    assert device == card.uuid
    assert sentence in told
    assert watch.after(10_000) == [], "it is as it was"
    card.rows = (0, 1, 0, 0)
    assert watch.after(599) == []
    assert watch.after(1) == [(card.uuid, "")]


def test_heat_fails_it_only_when_it_lasts() -> None:
    card = h100(0)
    watch = Watch(card)
    card.slowed = pynvml.nvmlClocksEventReasonSwPowerCap
    assert watch.after(5) == []
    assert watch.after(300) == [], "the power limit is no heat"
    card.slowed |= pynvml.nvmlClocksEventReasonHwThermalSlowdown
    assert watch.after(5) == []
    card.slowed = 0
    assert watch.after(119) == []
    card.slowed = pynvml.nvmlClocksEventReasonSwThermalSlowdown
    assert watch.after(5) == []
    assert watch.after(119) == []
    assert watch.after(1) == [(card.uuid, "slowed by heat for 2m 00s")]
    assert watch.after(60) == []
    card.slowed = 0
    assert watch.after(599) == []
    assert watch.after(1) == [(card.uuid, "")]


def test_a_watcher_goes_on_when_gpus_come_and_go_and_the_driver_is_loaded_again() -> None:
    one, two = h100(0), h100(1)
    watch = Watch(one, two)
    two.lost = True
    assert watch.after(5) == []
    two.lost = False
    watch.fake.xids.append((two, 48))
    assert watch.after(5) == [(two.uuid, "XID 48")]
    watch.fake.dead = True
    assert watch.after(5) == []
    watch.fake.xids.append((one, 48))
    assert watch.after(5) == [(one.uuid, "XID 48")]
    assert watch.fake.inits == 2


def test_without_gpus_nothing_fails() -> None:
    assert Watch().after(5) == []
    nothing = HealthWatcher(NodeId("n"), nvml=Nvml(FakeNvml(broken=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)))
    assert nothing.health_facts(5) == []


# ---------------------------------------------------------------------- energy


def read(meters: EnergyMeters) -> dict[str, int]:
    """What the meters show now."""
    sampled = meters.sample()
    assert isinstance(sampled, Sampled) or sampled is None
    return dict(sampled.energy_mj) if sampled else {}


def meters_of(root: Path, *cards: Card, cores: int = 64, now: list[int] | None = None) -> EnergyMeters:
    ticks = now or [SECOND_NS]
    return EnergyMeters(NodeId("n"), root=root, nvml=Nvml(FakeNvml(*cards)), clock=lambda: ticks[0], cores=cores)


def test_nothing_to_measure_is_no_sample_and_says_why(machine: Path) -> None:
    meters = meters_of(machine)
    assert meters.sample() is None
    assert "RAPL" in meters.unavailable["cpu"]


def test_packages_are_summed_and_their_parts_are_not(machine: Path) -> None:
    rapl(machine, (5_000_000, 10**9), (7_000_500, 10**9))
    meters = meters_of(machine)
    sampled = meters.sample()
    assert sampled == Sampled(at_ns=SECOND_NS, node_id=NodeId("n"), energy_mj=(("cpu", 12_000),))
    assert meters.unavailable == {}


def test_a_counter_that_wraps_around_goes_on_growing(machine: Path) -> None:
    first, second = rapl(machine, (900_000, 1_000_000), (100_000, 1_000_000))
    meters = meters_of(machine)
    shown = [read(meters)["cpu"]]
    for one, two in [(950_000, 400_000), (50_000, 700_000), (100_000, 100_000), (100_000, 100_000)]:
        first.write_text(str(one))
        second.write_text(str(two))
        shown.append(read(meters)["cpu"])
    assert [later - earlier for earlier, later in pairwise(shown)] == [350, 400, 450, 0]


def test_fractions_of_a_millijoule_are_not_lost(machine: Path) -> None:
    (counter,) = rapl(machine, (0, 10**9))
    meters = meters_of(machine)
    for step in range(1, 1_001):
        counter.write_text(str(step * 999))
        shown = read(meters)["cpu"]
    assert shown == 999


@pytest.mark.parametrize("which", [0, 1])
def test_counters_that_only_root_may_read_are_not_half_counted(machine: Path, which: int) -> None:
    """As root nothing is forbidden, so another user looks."""
    counters = rapl(machine, (5_000_000, 10**9), (7_000_000, 10**9))
    counters[which].chmod(0)
    program = (
        "import os, sys; from pathlib import Path; from tidemill.telemetry import EnergyMeters, Nvml\n"
        "class Absent:\n"
        "    NVMLError = OSError\n"
        "    def __getattr__(self, name): return -1\n"
        "    def nvmlInit(self): raise OSError\n"
        "meters = EnergyMeters('n', root=Path('.'), nvml=Nvml(Absent()), cores=64)\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(meters.sample()); print(meters.unavailable['cpu'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=machine, capture_output=True, text=True, check=True)
    shown, reason = done.stdout.splitlines()
    assert shown == "None"
    assert "root only" in reason
    assert f"chmod a+r sys/class/powercap/intel-rapl:{which}/energy_uj" in reason


def test_a_broken_counter_is_left_out_and_said(machine: Path) -> None:
    (counter,) = rapl(machine, (5_000_000, 10**9))
    meters = meters_of(machine, h100(0, energy_mj=42))
    counter.write_text("rubbish")
    assert set(read(meters)) == {"GPU-0aaa-bbb"}
    assert "cannot be read" in meters.unavailable["cpu"]


@pytest.mark.parametrize(("cores", "measured"), [(64, True), (16, False)])
def test_counters_of_whole_processors_say_nothing_about_part_of_them(machine: Path, cores: int, measured: bool) -> None:
    rapl(machine, (5_000_000, 10**9))
    meters = meters_of(machine, cores=cores)
    assert (meters.sample() is not None) is measured
    assert measured or "of all 64 cores, of which 16" in meters.unavailable["cpu"]


def test_a_gpus_counter_is_taken_as_it_is(machine: Path) -> None:
    card = h100(0, energy_mj=123_456_789)
    meters = meters_of(machine, card)
    assert read(meters) == {card.uuid: 123_456_789}
    card.energy_mj = 123_460_000
    assert read(meters) == {card.uuid: 123_460_000}


def test_a_gpus_counter_that_starts_again_does_not_take_energy_back(machine: Path) -> None:
    card = h100(0, energy_mj=5_000)
    meters = meters_of(machine, card)
    assert read(meters)[card.uuid] == 5_000
    card.energy_mj = 200
    assert read(meters)[card.uuid] == 5_200
    card.energy_mj = 300
    assert read(meters)[card.uuid] == 5_300


def test_without_a_counter_power_is_added_up_over_time(machine: Path) -> None:
    card, now = Card("Tesla P100-PCIE-16GB", "GPU-p", 16_280, energy_mj=None, power_mw=100_000), [SECOND_NS]
    meters = meters_of(machine, card, now=now)
    assert read(meters) == {"GPU-p": 0}
    now[0] += 10 * SECOND_NS
    assert read(meters) == {"GPU-p": 1_000_000}
    now[0] += SECOND_NS // 2
    card.power_mw = 300_000
    assert read(meters) == {"GPU-p": 1_100_000}
    now[0] += 3_600 * SECOND_NS
    assert read(meters) == {"GPU-p": 1_100_000}, "an hour without a look is not made up"
    now[0] -= 20 * SECOND_NS
    assert read(meters) == {"GPU-p": 1_100_000}, "a clock set back takes nothing away"


def test_what_cannot_be_measured_is_left_out_and_said(machine: Path) -> None:
    silent = Card("NVIDIA GeForce GTX 1080 Ti", "GPU-g", 11_264, energy_mj=None, power_mw=None)
    meters = meters_of(machine, silent, cut_a100(), h100(0, energy_mj=7))
    assert read(meters) == {"GPU-0aaa-bbb": 7, "GPU-whole": 0}, "a cut GPU is measured as a whole"
    assert set(meters.unavailable) == {"GPU-g", "cpu"}


def test_meters_are_those_of_the_node_that_is_discovered(machine: Path) -> None:
    card = h100(0)
    meters = EnergyMeters(root=machine, nvml=Nvml(FakeNvml(card)))
    sampled = meters.sample()
    assert sampled is not None
    node = found(machine, card)
    assert sampled.node_id == node.id
    assert [meter for meter, _ in sampled.energy_mj] == [device.id for device in node.devices]


# ---------------------------------------------------------------------- how busy it is


def test_how_busy_devices_are() -> None:
    stats = telemetry.device_stats(
        Nvml(FakeNvml(h100(0), Card("NVIDIA TITAN V", "GPU-t", 12_066, power_mw=None), cut_a100()))
    )
    first, titan, part = stats[0], stats[1], stats[2]
    assert (first.model, first.utilization, first.memory_used, first.power_mw, first.temperature_c) == (
        "H100-SXM", 87, 3 * GIB, 100_000, 61,
    )  # fmt: skip
    assert first.memory_total == 81_559 * MIB
    assert (titan.model, titan.power_mw) == ("NVIDIA TITAN V", None)
    assert (part.model, part.utilization) == ("A100-40GB-SXM", None)
    whole = telemetry.node_stats(Nvml(FakeNvml(broken=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)))
    assert whole.devices == ()
    assert 0 <= whole.cpu_percent <= 100
    assert whole.load_1m >= 0
