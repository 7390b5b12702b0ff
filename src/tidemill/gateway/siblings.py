"""The figures of all processes that listen at one address: whichever is asked tells of each.

Every worker leaves its own figures in a file of its number, once a second. The label ``worker`` keeps series apart, so
that one that began anew is a counter that was reset, and not a sum that fell.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_EVERY_S: Final = 1.0
_FRESH_S: Final = 5.0
"""Of a worker whose file is older nothing is told: it is gone."""
_log = logging.getLogger("tidemill.gateway")


class Siblings:
    """The figures of this worker, which has that number, and of those beside it; ``own`` gives this one's."""

    def __init__(self, folder: Path, number: int, own: Callable[[], bytes]) -> None:
        folder.mkdir(mode=0o700, exist_ok=True, parents=True)
        self._folder = folder
        self._number = number
        self._own = own

    async def keep(self) -> None:
        """Leave this one's figures for the others, for ever."""
        while True:
            try:
                await asyncio.to_thread(self._write, self._own())
            except OSError as error:
                _log.warning("this worker's figures could not be left for the others: %s", error)
            await asyncio.sleep(_EVERY_S)

    def text(self) -> bytes:
        """All workers' figures, each series with the number of its worker."""
        found = {self._number: self._own()}
        for path in self._folder.glob("*.prom"):
            number = path.stem
            if number.isdigit() and int(number) not in found:
                try:
                    if time.time() - path.stat().st_mtime < _FRESH_S:
                        found[int(number)] = path.read_bytes()
                except FileNotFoundError:
                    continue
        return together(found)

    def _write(self, text: bytes) -> None:
        draft = self._folder / f".{self._number}.{os.getpid()}"
        draft.write_bytes(text)
        draft.replace(self._folder / f"{self._number}.prom")


def together(texts: dict[int, bytes]) -> bytes:
    """Prometheus texts as one, metric by metric, with the label ``worker``.

    >>> together({0: b"# TYPE a gauge\\na 1\\n", 1: b"# TYPE a gauge\\na{x=\\"y\\"} 2\\n"}).decode().splitlines()
    ['# TYPE a gauge', 'a{worker="0"} 1', 'a{worker="1",x="y"} 2']
    """
    about: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for number, text in sorted(texts.items()):
        metric = ""
        for line in text.decode().splitlines():
            if line.startswith("#"):
                metric = line.split(" ", 3)[2]
                said = about.setdefault(metric, [])
                if line not in said:
                    said.append(line)
            elif line:
                samples.setdefault(metric, []).append(_labelled(line, number))
    return "".join(f"{line}\n" for name, said in about.items() for line in (*said, *samples.get(name, ()))).encode()


def _labelled(line: str, number: int) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f'{name}{{worker="{number}",{rest}'
    name, _, rest = line.partition(" ")
    return f'{name}{{worker="{number}"}} {rest}'
