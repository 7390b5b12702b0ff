"""Whether a service answers: asked often until it does, then now and then; and whether it still works at all.

Requests are held until a service is ready, so what notices it late keeps all of them waiting. A port that is not open
costs next to nothing to try and writes no line into anybody's log; a service that says that it still loads does, and is
asked ever more seldom.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

_OPEN_S: Final = 0.05
"""Between tries of a port that nothing listens on."""
_OFTEN_S: Final = 0.25
"""Between questions to a service that answers and is not ready, at most."""
_SECOND_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked of a service, and when: first after ``delay_s``, then every ``every_s``.

    Without a ``path`` an open port is enough. It failed when ``failures`` in a row were not answered within
    ``answer_s``.
    """

    port: int
    path: str = ""
    delay_s: float = 0.0
    every_s: float = 2.0
    answer_s: float = 2.0
    failures: int = 3

    def ask(self) -> bool:
        """Whether the service answers ``GET path`` with a 2xx status; without a path, whether the port is open."""
        try:
            if not self.path:
                with socket.create_connection(("127.0.0.1", self.port), timeout=self.answer_s):
                    return True
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.answer_s)
            try:
                connection.request("GET", self.path)
                return 200 <= connection.getresponse().status < 300
            finally:
                connection.close()
        except (OSError, http.client.HTTPException):
            return False

    def __str__(self) -> str:
        what = f"GET {self.path} did not answer with a 2xx status" if self.path else "nothing listened"
        return f"{what} on port {self.port}"


def probe_of(port: int, path: str, pace: Mapping[str, Any]) -> Probe:
    """The probe of a launch's spec, which has its lengths of time in ns."""
    return Probe(
        port,
        path,
        delay_s=int(pace.get("delay_ns", 0)) / _SECOND_NS,
        every_s=int(pace.get("every_ns", 2 * _SECOND_NS)) / _SECOND_NS,
        answer_s=int(pace.get("answer_ns", 2 * _SECOND_NS)) / _SECOND_NS,
        failures=int(pace.get("failures", 3)),
    )


def watch_readiness(
    probe: Probe,
    *,
    timeout_s: float,
    became: Callable[[bool], None],
    failed: Callable[[str], None],
    ending: threading.Event,
) -> None:
    """Tell when the service becomes ready, and each time that this changes; tell of failure at the timeout."""
    deadline_s = time.monotonic() + timeout_s
    if ending.wait(probe.delay_s):
        return
    for asked, slower in ((replace(probe, path=""), 1.0), (probe, 1.5)):
        pause_s = _OPEN_S
        while not asked.ask():
            if time.monotonic() > deadline_s:
                failed(f"{probe} within {timeout_s:g} s; see service.readiness")
                return
            if ending.wait(pause_s):
                return
            pause_s = min(_OFTEN_S, pause_s * slower)
    became(True)
    ready, misses = True, 0
    while not ending.wait(probe.every_s):
        misses = 0 if probe.ask() else misses + 1
        now_ready = misses == 0 if not ready else misses < probe.failures
        if now_ready != ready:
            ready = now_ready
            became(ready)


def watch_liveness(probe: Probe, *, failed: Callable[[str], None], ending: threading.Event) -> None:
    """Tell once that a service which was ready does not work any more; it had ``delay_s`` after that."""
    misses = 0
    pause_s = probe.delay_s
    while not ending.wait(pause_s):
        misses = 0 if probe.ask() else misses + 1
        if misses >= probe.failures:
            failed(f"{probe}, {misses} times in a row; see service.liveness")
            return
        pause_s = probe.every_s
