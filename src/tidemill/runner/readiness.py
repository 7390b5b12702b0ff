"""Whether a service answers: asked often until it does, then now and then."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

_FIRST_S: Final = 0.05
_OFTEN_S: Final = 0.25
_LATER_S: Final = 2.0
_MISSES: Final = 3
_ANSWER_S: Final = 2.0


def is_ready(port: int, path: str) -> bool:
    """Whether the service answers ``GET path`` with a 2xx status; without a path, whether the port is open."""
    try:
        if not path:
            with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S):
                return True
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
        try:
            connection.request("GET", path)
            return 200 <= connection.getresponse().status < 300
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False


def watch_readiness(
    *,
    port: int,
    path: str,
    timeout_s: float,
    became: Callable[[bool], None],
    failed: Callable[[str], None],
    ending: threading.Event,
) -> None:
    """Tell when the service becomes ready, and each time that this changes; tell of failure at the timeout."""
    deadline_s = time.monotonic() + timeout_s
    pause_s = _FIRST_S
    while not is_ready(port, path):
        if time.monotonic() > deadline_s:
            what = f"GET {path} did not answer with a 2xx status" if path else "nothing listened"
            failed(f"{what} on port {port} within {timeout_s:g} s; see service.readiness")
            return
        if ending.wait(pause_s):
            return
        pause_s = min(_OFTEN_S, pause_s * 1.5)
    became(True)
    ready, misses = True, 0
    while not ending.wait(_LATER_S):
        misses = 0 if is_ready(port, path) else misses + 1
        now_ready = misses == 0 if not ready else misses < _MISSES
        if now_ready != ready:
            ready = now_ready
            became(ready)
