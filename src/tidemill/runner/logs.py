"""The worker's output on its way: pipe, spool file, control plane; no byte twice, none left out in silence.

The reader empties the pipe into the spool as fast as it can, so that a worker never waits for the network. The
shipper sends what lies in the spool from the offset that the control plane has; the control plane skips what
it has already, so sending again after a lost answer is harmless. Memory is bounded whatever a line's length.
When more than the cap waits to be sent, output is dropped, counted, and the count written where it is missing.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tidemill.runner.client import Channel, Refused, Unreachable
from tidemill.runner.processes import punch_hole

BATCH_BYTES: Final = 256 * 1024
_HOLE_BYTES: Final = 8 * 1024 * 1024
DEFAULT_CAP_BYTES: Final = 1 << 30


class Spool:
    """Output kept in a file until it is sent. One thread writes, one reads; ``cap_bytes`` limits what waits."""

    def __init__(self, path: Path, *, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._cap = cap_bytes
        self._changed = threading.Condition()
        self._written = os.fstat(self._fd).st_size
        self._sent = 0
        self._holed = 0
        self._dropped = 0
        self._full = False
        self._closed = False

    def append(self, data: bytes) -> None:
        """Keep it, or count it as dropped when there is no room for it."""
        with self._changed:
            room = self._written - self._sent < self._cap and not self._closed
            if room and self._dropped:
                self._note_dropped()
            if room and self._write(data):
                self._changed.notify_all()
            else:
                self._dropped += len(data)

    def close(self) -> None:
        """No more comes: say how much was dropped at the end, if something was."""
        with self._changed:
            if self._dropped:
                self._note_dropped()
            self._closed = True
            self._changed.notify_all()

    @property
    def size(self) -> int:
        """How many bytes there are in all, sent or not."""
        return self._written

    @property
    def storage_full(self) -> bool:
        """Whether output was lost because the disk was full."""
        return self._full

    def wait(self, timeout_s: float) -> tuple[int, int, bool]:
        """Offset sent, offset written and whether more may come, when there is something to send or a timeout."""
        with self._changed:
            if self._sent >= self._written and not self._closed:
                self._changed.wait(timeout_s)
            return self._sent, self._written, not self._closed

    def read(self, offset: int, limit: int) -> bytes:
        """Up to ``limit`` bytes of the output from ``offset``."""
        return os.pread(self._fd, min(limit, max(0, self._written - offset)), offset)

    def sync(self) -> None:
        """Have all of it on the disk. Raises: OSError."""
        os.fdatasync(self._fd)

    def mark_sent(self, offset: int) -> None:
        """The control plane has everything below ``offset``; their disk space is given back."""
        with self._changed:
            self._sent = min(offset, self._written)
            start, self._holed = self._holed, self._sent // _HOLE_BYTES * _HOLE_BYTES
        if self._holed > start:
            punch_hole(self._fd, start, self._holed - start)

    def _write(self, data: bytes) -> bool:
        try:
            view = memoryview(data)
            while view:
                done = os.pwrite(self._fd, view, self._written)
                self._written += done
                view = view[done:]
        except OSError as error:
            self._full = self._full or error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._dropped += len(view) - len(data)
            return False
        return True

    def _note_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        why = "the disk was full" if self._full else "it could not be sent in time"
        note = f"\n[tidemill] {dropped} bytes of output were dropped here because {why}\n".encode()
        if not self._write(note):
            self._dropped += dropped


class Shipper:
    """The thread that sends a spool's content. ``on_delivered`` is called when all of it has arrived."""

    def __init__(
        self,
        spool: Spool,
        channel: Channel,
        *,
        giving_up: threading.Event,
        on_fenced: Callable[[], None],
        on_delivered: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._channel = channel
        self._giving_up = giving_up
        self._on_fenced = on_fenced
        self._on_delivered = on_delivered
        self._thread = threading.Thread(target=self._run, name="ship", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def send_next(self) -> bool:
        """Whether all of it has arrived, now that the next batch was sent. Raises: Unreachable."""
        sent, written, open_ = self._spool.wait(5.0)
        if sent >= written and open_:
            return False
        return self._send(sent, last=not open_ and written - sent <= BATCH_BYTES)

    def _run(self) -> None:
        while not self._giving_up.is_set():
            try:
                if self.send_next():
                    self._on_delivered()
                    break
            except Unreachable:
                if self._channel.rest(self._giving_up):
                    break
        self._channel.close()

    def _send(self, offset: int, *, last: bool) -> bool:
        """Whether this was the last batch and the control plane has it."""
        data = self._spool.read(offset, BATCH_BYTES)
        path = f"/logs?offset={offset}" + ("&complete=1" if last else "")
        try:
            answer = self._channel.call("POST", path, data, content_type="application/octet-stream")
        except Refused as refusal:
            if refusal.fenced:
                self._on_fenced()
            elif refusal.status == 409 and (expected := _expected(refusal)) not in (None, offset):
                self._spool.mark_sent(expected or 0)
                return False
            raise Unreachable(str(refusal)) from refusal
        self._spool.mark_sent(int(answer.get("offset", offset + len(data))))
        return last


def _expected(refusal: Refused) -> int | None:
    """The offset that the control plane wants to go on from."""
    found = refusal.body.get("offset", refusal.body.get("expected"))
    return found if isinstance(found, int) else None


def drain(pipe: int, spool: Spool) -> None:
    """Everything from the pipe into the spool, until nobody holds its other end."""
    while True:
        try:
            data = os.read(pipe, BATCH_BYTES)
        except InterruptedError:
            continue
        except OSError:
            return
        if not data:
            return
        spool.append(data)
