"""NVIDIA's management library, or the reason why it is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_lock = threading.Lock()


class Nvml:
    """The devices that the driver shows. ``reason`` says why there are none; empty when there are some.

    The library is initialized when first needed and stays so. ``module`` is ``pynvml`` or something alike.
    """

    def __init__(self, module: ModuleType | Any | None = None) -> None:
        if module is None:
            import pynvml

            module = pynvml
        self.module = module
        self.reason = "not asked yet"
        self._ready = False

    def handles(self) -> Iterator[tuple[int, Any]]:
        """Index and handle of every device that answers; a device that fell off the bus is left out."""
        if not self._start():
            return
        for index in range(self.module.nvmlDeviceGetCount()):
            try:
                handle = self.module.nvmlDeviceGetHandleByIndex(index)
                self.module.nvmlDeviceGetUUID(handle)
            except self.module.NVMLError:
                continue
            yield index, handle

    def _start(self) -> bool:
        with _lock:
            if self._ready:
                return True
            try:
                self.module.nvmlInit()
            except self.module.NVMLError as error:
                self.reason = f"no NVIDIA driver answers ({error})"
                return False
            self._ready = True
            self.reason = "" if self.module.nvmlDeviceGetCount() else "the NVIDIA driver shows no device"
            return True


def text_of(value: str | bytes) -> str:
    """A name from the library, which older versions give as bytes."""
    return value.decode() if isinstance(value, bytes) else value
