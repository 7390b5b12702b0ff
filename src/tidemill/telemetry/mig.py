"""MIG slices made where and when they are needed, on GPUs whose slices Tidemill may make and unmake.

A slice that is there already, of that profile in that place, is used again. Slices that lie where a new one has to be
are unmade first; the driver refuses that while a program uses them, so nobody loses what they have. Needs root, and a
GPU in MIG mode (``nvidia-smi -mig 1``), which is not changed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from tidemill.errors import EngineRefused
from tidemill.telemetry.nvml import MIG_NAME, Nvml, text_of, the_nvml

_SHARED_ENGINES: Final = 0
"""NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A slice that is there: its driver's name, profile, place, and its two instances."""

    uuid: str
    profile: str
    start: int
    size: int
    gpu_instance: Any
    compute_instance: Any


class SliceMaker:
    """Makes slices on this machine."""

    def __init__(self, *, nvml: Nvml | None = None) -> None:
        self._nvml = nvml or the_nvml()
        self._lock = threading.Lock()

    def make(self, gpu: str, profile: str, start: int) -> str:
        """The driver's name of a slice of that profile, which begins at memory slice ``start`` of the GPU.

        Raises: EngineRefused that says what the driver says.
        """
        with self._lock:
            whole = next((each.handle for each in self._nvml.gpus() if each.uuid == gpu), None)
            if whole is None:
                raise EngineRefused(f"{gpu} does not answer")
            module = self._nvml.module
            try:
                return self._make(module, whole, profile, start)
            except module.NVMLError as error:
                raise EngineRefused(
                    f"a slice {profile} cannot be made on {gpu}: {error}", field="resources.gpus", value=profile,
                    mend="Run Tidemill as root on this machine, or make slices yourself and leave mig_dynamic out.",
                ) from error  # fmt: skip

    def _make(self, module: Any, whole: Any, profile: str, start: int) -> str:
        info = _profile_info(module, whole, profile)
        size = _size(module, whole, int(info.memorySizeMB) << 20)
        for there in list(_slices(module, whole)):
            if there.start == start and there.profile == profile:
                return there.uuid
            if there.start < start + size and start < there.start + there.size:
                module.nvmlComputeInstanceDestroy(there.compute_instance)
                module.nvmlGpuInstanceDestroy(there.gpu_instance)
        place = module.c_nvmlGpuInstancePlacement_t()
        place.start, place.size = start, size
        made = module.nvmlDeviceCreateGpuInstanceWithPlacement(whole, info.id, ctypes.byref(place))
        try:
            module.nvmlGpuInstanceCreateComputeInstance(made, _compute_profile(module, made, int(info.sliceCount)))
        except module.NVMLError:
            module.nvmlGpuInstanceDestroy(made)
            raise
        number = module.nvmlGpuInstanceGetInfo(made).id
        for handle in _handles(module, whole):
            if module.nvmlDeviceGetGpuInstanceId(handle) == number:
                return text_of(module.nvmlDeviceGetUUID(handle))
        raise EngineRefused(f"the driver made a slice {profile} and does not show it")


def _profile_info(module: Any, whole: Any, profile: str) -> Any:
    for number in range(module.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            info = module.nvmlDeviceGetGpuInstanceProfileInfo(whole, number)
        except module.NVMLError:
            continue
        if text_of(info.name).removeprefix("MIG ") == profile:
            return info
    raise EngineRefused(f"this GPU cannot have a slice {profile}")


def _compute_profile(module: Any, gpu_instance: Any, slices: int) -> int:
    """The compute profile that takes the whole of the instance. Raises: NVMLError."""
    for number in range(module.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            info = module.nvmlGpuInstanceGetComputeInstanceProfileInfo(gpu_instance, number, _SHARED_ENGINES)
        except module.NVMLError:
            continue
        if info.sliceCount == slices:
            return int(info.id)
    raise module.NVMLError(module.NVML_ERROR_NOT_SUPPORTED)


def _slices(module: Any, whole: Any) -> Iterator[_Made]:
    for handle in _handles(module, whole):
        match = MIG_NAME.search(text_of(module.nvmlDeviceGetName(handle)))
        gpu_instance = module.nvmlDeviceGetGpuInstanceById(whole, module.nvmlDeviceGetGpuInstanceId(handle))
        place = module.nvmlGpuInstanceGetInfo(gpu_instance).placement
        number = module.nvmlDeviceGetComputeInstanceId(handle)
        yield _Made(
            uuid=text_of(module.nvmlDeviceGetUUID(handle)),
            profile=match[1] if match else "",
            start=int(place.start),
            size=int(place.size),
            gpu_instance=gpu_instance,
            compute_instance=module.nvmlGpuInstanceGetComputeInstanceById(gpu_instance, number),
        )


def _handles(module: Any, whole: Any) -> Iterator[Any]:
    for number in range(int(module.nvmlDeviceGetMaxMigDeviceCount(whole))):
        try:
            yield module.nvmlDeviceGetMigDeviceHandleByIndex(whole, number)
        except module.NVMLError:
            continue


def _size(module: Any, whole: Any, memory_bytes: int) -> int:
    """How many of its GPU's memory slices a slice with that much memory has: of 8, or of 4 where only 4 fit."""
    most = int(module.nvmlDeviceGetGpuInstanceProfileInfo(whole, 0).instanceCount)
    total = int(module.nvmlDeviceGetMemoryInfo(whole).total)
    return max(round((8 if most >= 7 else most) * memory_bytes / total), 1)
