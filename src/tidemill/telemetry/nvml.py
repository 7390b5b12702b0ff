"""NVIDIA's management library: the GPUs that jobs may have, or the reason why there are none.

A GPU in MIG mode has its slices with it. A GPU that fell off the bus is left out and its loss is in ``losses``. GPUs
that reach each other over NVLink are of one island. ``CUDA_VISIBLE_DEVICES`` of the control plane is honoured, so that
an operator can keep GPUs from Tidemill; its numbers count in the library's order, that of the PCI bus.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
MIG_NAME: Final = re.compile(r"\s+MIG\s+((?:\d+c\.)?\d+g\.\d+gb\S*)$")
_NVIDIA: Final = "0x10de"
_MEMORY_SLICES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A MIG slice of a GPU: its profile, ``1g.10gb``, and the first of its GPU's memory slices that it has."""

    uuid: str
    profile: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, as the driver reports it. ``slices`` are those of a GPU in MIG mode, by where they begin.

    ``limit_mw`` is the power limit set in the driver, zero when it does not say. ``island`` numbers the NVLink domain,
    zero for all when the driver does not tell. ``handle`` is the library's.
    """

    uuid: str
    index: int
    name: str
    memory_bytes: int
    limit_mw: int
    handle: Any
    is_cut: bool = False
    """Whether it is in MIG mode."""
    slices: tuple[Slice, ...] = ()
    island: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A critical error that the driver told of: the GPU's UUID and the XID."""

    uuid: str
    xid: int


class Nvml:
    """The library, initialized when first needed. ``module`` is ``pynvml`` or what has its functions.

    ``reason`` says in a sentence why the last call of ``gpus`` gave none, and is empty when it gave some.
    """

    def __init__(self, module: Any = None, *, visible: str | None = None) -> None:
        """``visible`` is the value of ``CUDA_VISIBLE_DEVICES``, None when it is not set."""
        self._module = module
        self._visible = visible
        self._ready = False
        self._lock = threading.Lock()
        self._events: Any = None
        self._watched: tuple[str, ...] | None = None
        self.reason = ""
        self.losses: tuple[str, ...] = ()

    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU that answers and is not hidden, with its slices that are not."""
        with self._lock:
            self.losses = ()
            if not self._start():
                return ()
            try:
                found = list(self._all())
            except self._module.NVMLError as error:
                self._ready, self._events, self._watched = False, None, None
                self.reason = f"The NVIDIA driver stopped answering: {error}."
                return ()
            shown = self._with_islands([seen for gpu in found if (seen := self._seen_of(gpu, found)) is not None])
            if found and not shown:
                self.reason = f"CUDA_VISIBLE_DEVICES={self._visible!r} hides all {len(found)} GPUs."
            elif not found:
                self.reason = " ".join(self.losses) or "The NVIDIA driver shows no GPU."
            else:
                self.reason = ""
            return tuple(shown)

    @property
    def module(self) -> Any:
        """The library's functions; only after ``gpus`` gave some."""
        return self._module

    def ask(self, function: str, handle: Any, *arguments: Any) -> Any:
        """What the library's function answers about a GPU; None when it cannot or the GPU is gone."""
        try:
            return getattr(self._module, function)(handle, *arguments)
        except self._module.NVMLError:
            return None

    def _start(self) -> bool:
        if self._ready:
            return True
        try:
            if self._module is None:
                self._module = importlib.import_module("pynvml")
            self._module.nvmlInit()
        except ImportError:
            self.reason = "nvidia-ml-py is not installed."
            return False
        except self._module.NVMLError as error:
            self.reason = _why_no_driver(self._module, error)
            return False
        self._ready = True
        return True

    def alarms(self, gpus: Sequence[Gpu]) -> tuple[Alarm, ...]:
        """The critical errors that the driver told of since this was last asked; the first time, those from then on.

        Empty when the driver cannot tell of any.
        """
        with self._lock:
            if not self._ready or not gpus:
                return ()
            module = self._module
            try:
                if self._watched != tuple(gpu.uuid for gpu in gpus):
                    self._watch(gpus)
                return tuple(self._told())
            except module.NVMLError:
                self._watched = None
                return ()

    def _watch(self, gpus: Sequence[Gpu]) -> None:
        """Have the driver tell of critical errors of these GPUs. Raises: NVMLError."""
        module = self._module
        if self._events is not None:
            module.nvmlEventSetFree(self._events)
            self._events = None
        self._events = module.nvmlEventSetCreate()
        for gpu in gpus:
            can = self.ask("nvmlDeviceGetSupportedEventTypes", gpu.handle) or 0
            if wanted := int(can) & module.nvmlEventTypeXidCriticalError:
                self.ask("nvmlDeviceRegisterEvents", gpu.handle, wanted, self._events)
        self._watched = tuple(gpu.uuid for gpu in gpus)

    def _told(self) -> Iterator[Alarm]:
        module = self._module
        while True:
            try:
                event = module.nvmlEventSetWait_v2(self._events, 0)
            except module.NVMLError as error:
                if _code(error) == module.NVML_ERROR_TIMEOUT:
                    return
                raise
            yield Alarm(uuid=text_of(module.nvmlDeviceGetUUID(event.device)), xid=int(event.eventData))

    def _all(self) -> Iterator[Gpu]:
        for index in range(self._module.nvmlDeviceGetCount()):
            try:
                yield self._one(index)
            except self._module.NVMLError as error:
                if _code(error) == self._module.NVML_ERROR_UNINITIALIZED:
                    raise
                self.losses = (*self.losses, f"GPU {index} does not answer: {error}.")

    def _one(self, index: int) -> Gpu:
        """The GPU of that number. Raises: NVMLError."""
        module = self._module
        handle = module.nvmlDeviceGetHandleByIndex(index)
        memory = int(module.nvmlDeviceGetMemoryInfo(handle).total)
        is_cut = bool(self._or(0, lambda: int(module.nvmlDeviceGetMigMode(handle)[0])))
        return Gpu(
            uuid=text_of(module.nvmlDeviceGetUUID(handle)),
            index=index,
            name=text_of(module.nvmlDeviceGetName(handle)),
            memory_bytes=memory,
            limit_mw=self._or(0, lambda: int(module.nvmlDeviceGetPowerManagementLimit(handle))),
            handle=handle,
            is_cut=is_cut,
            slices=tuple(self._slices(handle, memory)) if is_cut else (),
        )

    def _slices(self, whole: Any, memory: int) -> Iterator[Slice]:
        """The slices of a GPU, by where they begin. Only root may ask where; for others they are laid in a row."""
        module, found, end = self._module, list[Slice](), 0
        for number in range(self._or(0, lambda: int(module.nvmlDeviceGetMaxMigDeviceCount(whole)))):
            try:
                handle = module.nvmlDeviceGetMigDeviceHandleByIndex(whole, number)
                match = MIG_NAME.search(text_of(module.nvmlDeviceGetName(handle)))
                size = int(module.nvmlDeviceGetMemoryInfo(handle).total)
                uuid = text_of(module.nvmlDeviceGetUUID(handle))
            except module.NVMLError:
                continue
            if match is not None:
                start = self._start_of(whole, handle)
                found.append(Slice(uuid=uuid, profile=match[1], start=end if start is None else start))
                end += max(round(_MEMORY_SLICES * size / memory), 1) if memory else 1
        yield from sorted(found, key=lambda each: (each.start, each.uuid))

    def _start_of(self, whole: Any, part: Any) -> int | None:
        """Where a slice begins; None when the driver does not tell us."""
        module = self._module
        try:
            number = module.nvmlDeviceGetGpuInstanceId(part)
            return int(
                module.nvmlGpuInstanceGetInfo(module.nvmlDeviceGetGpuInstanceById(whole, number)).placement.start
            )
        except module.NVMLError:
            return None

    def _with_islands(self, gpus: list[Gpu]) -> list[Gpu]:
        """The GPUs with the numbers of their NVLink domains. A GPU in MIG mode is one of its own."""
        module = self._module
        island = {gpu.uuid: number for number, gpu in enumerate(gpus)}
        for number, one in enumerate(gpus):
            for other in gpus[:number]:
                if one.is_cut or other.is_cut:
                    continue
                linked = self.ask("nvmlDeviceGetP2PStatus", one.handle, other.handle, module.NVML_P2P_CAPS_INDEX_NVLINK)
                if linked is None:
                    return gpus
                if linked == module.NVML_P2P_STATUS_OK:
                    joined, gone = sorted((island[one.uuid], island[other.uuid]))
                    island = {uuid: joined if domain == gone else domain for uuid, domain in island.items()}
        numbers = {domain: number for number, domain in enumerate(dict.fromkeys(island.values()))}
        return [replace(gpu, island=numbers[island[gpu.uuid]]) for gpu in gpus]

    def _or(self, otherwise: T, ask: Callable[[], T]) -> T:
        """What is asked, or the other when this GPU or driver cannot tell. Raises: NVMLError when it is lost."""
        try:
            return ask()
        except self._module.NVMLError as error:
            if _code(error) == self._module.NVML_ERROR_GPU_IS_LOST:
                raise
            return otherwise

    def _seen_of(self, gpu: Gpu, found: list[Gpu]) -> Gpu | None:
        """What of the GPU is not hidden, as CUDA reads the list: numbers or the beginnings of UUIDs, of GPUs or of
        slices, up to the first that names nothing."""
        if self._visible is None:
            return gpu
        indexes = {str(each.index) for each in found}
        slices: set[str] = set()
        for word in (piece.strip() for piece in self._visible.split(",")):
            whole = [each for each in found if word and (each.uuid.startswith(word) or str(each.index) == word)]
            parts = {part.uuid for each in found for part in each.slices if word and part.uuid.startswith(word)}
            if not whole and not parts and word not in indexes:
                break
            if gpu in whole:
                return gpu
            slices |= parts & {part.uuid for part in gpu.slices}
        return replace(gpu, slices=tuple(part for part in gpu.slices if part.uuid in slices)) if slices else None


@cache
def the_nvml() -> Nvml:
    """The library of this process, with the ``CUDA_VISIBLE_DEVICES`` that it was started with."""
    return Nvml(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def why_no_gpu(nvml: Nvml | None = None, *, root: Path = Path("/")) -> str:
    """A sentence or two on why this machine has no GPU for jobs, and what to do; empty when it has one."""
    nvml = nvml or the_nvml()
    if nvml.gpus():
        return ""
    cards = _nvidia_cards(root)
    if nvml.reason and not cards and not (root / "proc/driver/nvidia").exists() and "hides" not in nvml.reason:
        return "This machine has no NVIDIA GPU."
    seen = f"An NVIDIA GPU is on the PCI bus at {', '.join(cards)}. " if cards else ""
    return seen + nvml.reason


def _nvidia_cards(root: Path) -> tuple[str, ...]:
    cards = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(("0x0300", "0x0302")):
            cards.append(device.name)
    return tuple(cards)


def _why_no_driver(module: Any, error: Exception) -> str:
    mends = {
        module.NVML_ERROR_LIBRARY_NOT_FOUND: "The NVIDIA driver is not installed; nvidia-smi has to list the GPU.",
        module.NVML_ERROR_DRIVER_NOT_LOADED: "The NVIDIA driver is installed but not loaded; try modprobe nvidia.",
        module.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "The NVIDIA driver was updated while it is loaded; reboot.",
        module.NVML_ERROR_NO_PERMISSION: "This user may not use the NVIDIA driver; look at who may read /dev/nvidia*.",
    }
    return mends.get(_code(error), f"The NVIDIA driver does not answer: {error}.")


def _code(error: Exception) -> int:
    return int(getattr(error, "value", 0))


def text_of(value: str | bytes) -> str:
    """A name from the library, which older versions give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
