"""NVIDIA's management library: the GPUs that jobs may have, or the reason why there are none.

A GPU in MIG mode is not itself among them; its slices are. A GPU that fell off the bus is left out and its
loss is in ``losses``. ``CUDA_VISIBLE_DEVICES`` of the control plane is honoured, so that an operator can keep
GPUs from Tidemill; its numbers count in the library's order, that of the PCI bus.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
_MIG_NAME: Final = re.compile(r"\s+MIG\s+((?:\d+c\.)?\d+g\.\d+gb\S*)$")
_NVIDIA: Final = "0x10de"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one MIG slice (then ``profile`` is its kind), as the driver reports it.

    ``limit_mw`` is the power limit set in the driver, zero when it does not say. ``handle`` is the library's.
    """

    uuid: str
    index: int
    name: str
    memory_bytes: int
    limit_mw: int
    handle: Any
    profile: str = ""


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
        self.reason = ""
        self.losses: tuple[str, ...] = ()

    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU and MIG slice that answers and is not hidden."""
        with self._lock:
            self.losses = ()
            if not self._start():
                return ()
            try:
                found = list(self._all())
            except self._module.NVMLError as error:
                self._ready = False
                self.reason = f"The NVIDIA driver stopped answering: {error}."
                return ()
            shown = [gpu for gpu in found if self._is_visible(gpu, found)]
            if found and not shown:
                self.reason = f"CUDA_VISIBLE_DEVICES={self._visible!r} hides all {len(found)} GPUs."
            elif not found:
                self.reason = " ".join(self.losses) or "The NVIDIA driver shows no GPU."
            else:
                self.reason = ""
            return tuple(shown)

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

    def _all(self) -> Iterator[Gpu]:
        for index in range(self._module.nvmlDeviceGetCount()):
            try:
                yield from self._one(index)
            except self._module.NVMLError as error:
                if _code(error) == self._module.NVML_ERROR_UNINITIALIZED:
                    raise
                self.losses = (*self.losses, f"GPU {index} does not answer: {error}.")

    def _one(self, index: int) -> Iterator[Gpu]:
        """The GPU of that number, or its slices when it is cut into some. Raises: NVMLError."""
        module = self._module
        handle = module.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(module.nvmlDeviceGetUUID(handle))
        name = _text(module.nvmlDeviceGetName(handle))
        limit = self._or(0, lambda: int(module.nvmlDeviceGetPowerManagementLimit(handle)))
        if self._or(0, lambda: int(module.nvmlDeviceGetMigMode(handle)[0])):
            slices = list(self._slices(index, handle, name))
            if not slices:
                self.losses = (
                    *self.losses,
                    f"GPU {index} is in MIG mode and has no slices; nvidia-smi mig makes some.",
                )
            yield from slices
            return
        memory = int(module.nvmlDeviceGetMemoryInfo(handle).total)
        yield Gpu(uuid=uuid, index=index, name=name, memory_bytes=memory, limit_mw=limit, handle=handle)

    def _slices(self, index: int, whole: Any, whole_name: str) -> Iterator[Gpu]:
        module = self._module
        for number in range(self._or(0, lambda: int(module.nvmlDeviceGetMaxMigDeviceCount(whole)))):
            try:
                handle = module.nvmlDeviceGetMigDeviceHandleByIndex(whole, number)
                match = _MIG_NAME.search(_text(module.nvmlDeviceGetName(handle)))
                memory = int(module.nvmlDeviceGetMemoryInfo(handle).total)
                uuid = _text(module.nvmlDeviceGetUUID(handle))
            except module.NVMLError:
                continue
            if match is not None:
                yield Gpu(
                    uuid=uuid, index=index, name=whole_name, memory_bytes=memory, limit_mw=0, handle=handle,
                    profile=match[1],
                )  # fmt: skip

    def _or(self, otherwise: T, ask: Callable[[], T]) -> T:
        """What is asked, or the other when this GPU or driver cannot tell. Raises: NVMLError when it is lost."""
        try:
            return ask()
        except self._module.NVMLError as error:
            if _code(error) == self._module.NVML_ERROR_GPU_IS_LOST:
                raise
            return otherwise

    def _is_visible(self, gpu: Gpu, found: list[Gpu]) -> bool:
        """As CUDA reads the list: numbers or the beginnings of UUIDs, up to the first that names nothing."""
        if self._visible is None:
            return True
        indexes = {str(each.index) for each in found}
        for word in (piece.strip() for piece in self._visible.split(",")):
            named = [each for each in found if word and (each.uuid.startswith(word) or str(each.index) == word)]
            if not named and word not in indexes:
                return False
            if gpu in named:
                return True
        return False


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


def _text(value: str | bytes) -> str:
    """A name from the library, which older versions give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
