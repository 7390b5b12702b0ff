"""What the runner tells the control plane, in order, kept in a file until it is told; and its heartbeat.

A report is written to the file before it is sent, and sent again until it is answered: the control plane takes
repeats for what they are. Every answer carries a directive, to run on or to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tidemill.runner.client import Channel, Refused, Unreachable

BEAT_S: Final = 2.0


class Outbox:
    """The thread that reports and beats.

    ``usage`` gives CPU ns and resident bytes for a beat. ``on_stop`` is called with the grace in ns when the
    control plane wants the worker stopped, ``on_fenced`` when the lease is somebody else's now. ``granted`` is where
    it is written down when the lease began to run anew, for whoever has to end a worker whose runner stands still;
    ``on_granted`` is called with that moment, in s of the monotonic clock.
    """

    def __init__(
        self,
        path: Path,
        channel: Channel,
        *,
        fence: int,
        usage: Callable[[], tuple[int, int]],
        on_stop: Callable[[int], None],
        on_fenced: Callable[[], None],
        on_told: Callable[[], None],
        granted: Path | None = None,
        on_granted: Callable[[float], None] = lambda _: None,
        beat_s: float = BEAT_S,
    ) -> None:
        self.last_answer_s = time.monotonic()
        self.granted_s = float("-inf")
        """When the last request was sent that was answered: the lease runs from there."""
        self._granted = (
            os.open(granted, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if granted is not None else None
        )
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._channel = channel
        self._fence = fence
        self._usage = usage
        self._on_stop = on_stop
        self._on_fenced = on_fenced
        self._on_told = on_told
        self._on_granted = on_granted
        self._beat_s = beat_s
        self._changed = threading.Condition()
        self._waiting: list[dict[str, Any]] = []
        self._giving_up = threading.Event()
        self._begun = False
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def start(self) -> None:
        """Begin to report and beat; harmless when it has begun.

        A worker that needs no preparing is started first: sending would only take time from that.
        """
        if not self._begun:
            self._begun = True
            self._thread.start()

    def add(self, kind: str, /, **fields: Any) -> None:
        """Report that something happened just now."""
        event = {"type": kind, "at_ns": time.time_ns(), **fields}
        with contextlib.suppress(OSError):  # a full disk must not keep the report from being sent
            os.write(self._fd, json.dumps(event, separators=(",", ":")).encode() + b"\n")
        with self._changed:
            self._waiting.append(event)
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether everything was told and answered."""
        with self._changed:
            return not self._waiting

    def close(self) -> None:
        """Stop reporting and beating."""
        self._giving_up.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        next_beat_s = time.monotonic() + self._beat_s
        while not self._giving_up.is_set():
            with self._changed:
                if not self._waiting:
                    self._changed.wait(max(0.0, next_beat_s - time.monotonic()))
                batch = list(self._waiting)
            if self._giving_up.is_set():
                break
            if not batch and time.monotonic() < next_beat_s:
                continue
            try:
                self._obey(self._report(batch) if batch else self._beat())
                next_beat_s = time.monotonic() + self._beat_s
            except Unreachable:
                self._channel.rest(self._giving_up)
        self._channel.close()

    def _report(self, batch: list[dict[str, Any]]) -> Mapping[str, Any]:
        try:
            answer = self._post("/report", {"fence": self._fence, "events": batch})
        except Refused as refusal:
            if refusal.status not in (400, 413, 422):
                raise Unreachable(str(refusal)) from refusal
            if len(batch) > 1:
                return self._report(batch[:1])
            answer = {}  # it will never be taken: going on is better than never telling what comes after it
        with self._changed:
            del self._waiting[: len(batch)]
        self._on_told()
        return answer

    def _beat(self) -> Mapping[str, Any]:
        cpu_used_ns, rss_bytes = self._usage()
        try:
            return self._post("/beat", {"fence": self._fence, "cpu_used_ns": cpu_used_ns, "rss_bytes": rss_bytes})
        except Refused as refusal:
            raise Unreachable(str(refusal)) from refusal

    def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        sent_s = time.monotonic()
        try:
            answer = self._channel.call("POST", path, json.dumps(body).encode())
        except Refused as refusal:
            if refusal.fenced:
                self._on_fenced()
                self._giving_up.set()
            raise
        self.last_answer_s = time.monotonic()
        if self._granted is not None:
            with contextlib.suppress(OSError):  # what was there is older, and so ends the worker sooner
                os.pwrite(self._granted, b"%020d" % int(sent_s * 1e9), 0)
        self.granted_s = sent_s
        self._on_granted(sent_s)
        return answer

    def _obey(self, answer: Mapping[str, Any]) -> None:
        if answer.get("directive") == "stop":
            self._on_stop(int(answer.get("grace_ns", 0)))
