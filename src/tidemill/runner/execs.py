"""Commands that people run inside a worker: asked for by long poll, streamed as frames both ways.

A frame is a byte for its type, four bytes for its length (big-endian) and its content. Types: ``o`` standard
output, ``e`` standard error, ``i`` standard input, ``c`` its end, ``w`` window size as ``rows cols``, ``x`` exit
status in digits, ``r`` an error in words.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from tidemill.runner import processes
from tidemill.runner.cell import Cell, Process
from tidemill.runner.client import Channel, Refused, Unreachable

_POLL_S: Final = 20
_FIRST_S: Final = 0.2
"""After so long is asked for the first time: a worker that ends sooner costs the control plane no connection for it."""
_PIECE: Final = 32 * 1024
_WAITING: Final = 64
_ENTER: Final = Path(__file__).with_name("enter.py")
_HEADER: Final = struct.Struct(">cI")


def frame(kind: bytes, content: bytes = b"") -> bytes:
    """One frame.

    >>> frame(b"x", b"0")
    b'x\\x00\\x00\\x00\\x010'
    """
    return _HEADER.pack(kind, len(content)) + content


class FrameReader:
    """Frames out of octets that arrive in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The frames that are whole now."""
        self._rest += data
        while len(self._rest) >= _HEADER.size:
            kind, size = _HEADER.unpack_from(self._rest)
            if len(self._rest) < _HEADER.size + size:
                return
            yield kind, self._rest[_HEADER.size : _HEADER.size + size]
            self._rest = self._rest[_HEADER.size + size :]


class Commands:
    """The thread that asks for commands, and a few threads for each command that runs."""

    def __init__(
        self,
        channel: Channel,
        cell: Cell,
        process: Process,
        environment: Mapping[str, str],
        cwd: Path,
        ending: threading.Event,
    ) -> None:
        self._channel = channel
        self._cell = cell
        self._process = process
        self._environment = environment
        self._cwd = cwd
        self._ending = ending
        self._seen: set[str] = set()

    def start(self) -> None:
        """Begin to ask."""
        threading.Thread(target=self._ask, name="commands", daemon=True).start()

    def _ask(self) -> None:
        channel = self._channel.copy()
        self._ending.wait(_FIRST_S)
        while not self._ending.is_set():
            try:
                answer = channel.call("GET", f"/commands?wait={_POLL_S}", timeout_s=_POLL_S + 15.0)
            except (Unreachable, Refused):
                channel.rest(self._ending)
                continue
            for command in answer.get("commands", ()):
                if command.get("type") == "exec" and command["exec_id"] not in self._seen:
                    self._seen.add(command["exec_id"])
                    threading.Thread(target=self._run, args=(command,), name="exec", daemon=True).start()

    def _run(self, command: Mapping[str, Any]) -> None:
        Exec(self._channel, self._cell, self._process, self._environment, self._cwd, command).run()


class Exec:
    """One command inside the worker, from its start to its exit status."""

    def __init__(
        self,
        channel: Channel,
        cell: Cell,
        process: Process,
        environment: Mapping[str, str],
        cwd: Path,
        request: Mapping[str, Any],
    ) -> None:
        self._channel = channel
        self._cell = cell
        self._worker = process
        self._environment = {**environment, **{str(k): str(v) for k, v in (request.get("env") or {}).items()}}
        self._cwd = cwd
        self._request = request
        self._frames: queue.Queue[bytes] = queue.Queue(_WAITING)
        self._cut = threading.Event()

    def run(self) -> None:
        """Start the command, stream until it ended or nobody listens any more; then nothing of it is left."""
        path = f"/execs/{self._request['exec_id']}"
        output = self._channel.copy()
        try:
            popen, stdin, sources = self._start()
        except OSError as error:
            self._say(output, path, frame(b"r", f"the command could not be started: {error.strerror}".encode()))
            return
        for kind, fd in sources:
            threading.Thread(target=self._pump, args=(kind, fd), daemon=True).start()
        threading.Thread(target=self._take_input, args=(path, stdin, popen), daemon=True).start()
        threading.Thread(target=self._finish, args=(popen,), daemon=True).start()
        try:
            output.open("POST", f"{path}/output", self._stream(len(sources)), timeout_s=60.0).read()
        except (Unreachable, Refused, OSError, HTTPException):
            pass
        finally:
            self._cut.set()
            _end(popen)
            output.close()

    def _say(self, channel: Channel, path: str, message: bytes) -> None:
        with contextlib.suppress(Unreachable, Refused, OSError):
            channel.open("POST", f"{path}/output", iter((message,))).read()
        channel.close()

    def _start(self) -> tuple[subprocess.Popen[bytes], int, list[tuple[bytes, int]]]:
        """The process, where its input goes, and where its output comes from."""
        if self._request.get("tty"):
            ours, theirs = os.openpty()
            _resize(ours, int(self._request.get("rows") or 24), int(self._request.get("cols") or 80))
            popen = self._popen(theirs, theirs, theirs)
            os.close(theirs)
            return popen, ours, [(b"o", ours)]
        pairs = [os.pipe() for _ in range(3)]
        popen = self._popen(pairs[0][0], pairs[1][1], pairs[2][1])
        for fd in (pairs[0][0], pairs[1][1], pairs[2][1]):
            os.close(fd)
        return popen, pairs[0][1], [(b"o", pairs[1][0]), (b"e", pairs[2][0])]

    def _popen(self, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
        leader = self._worker.leader if self._worker.walled else 0
        if self._worker.walled and not leader:
            raise ProcessLookupError(errno.ESRCH, "the worker is not there to be entered")
        request = {
            "pid": leader,
            "command": self._request["command"],
            "environment": {**self._worker.variables(), **self._environment, processes.MARKER: self._cell.mark},
            "cwd": str(self._cwd),
            "tty": bool(self._request.get("tty")),
        }
        settings = os.memfd_create("exec")
        parent = os.getpid()

        def enter() -> None:
            processes.die_with_parent(parent)
            self._worker.join()

        try:
            os.write(settings, json.dumps(request).encode())
            os.lseek(settings, 0, os.SEEK_SET)
            popen = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_ENTER), str(settings)], stdin=stdin, stdout=stdout, stderr=stderr,
                env={"PATH": "/usr/bin:/bin", processes.MARKER: self._cell.mark}, pass_fds=(settings,),
                preexec_fn=enter, start_new_session=True, cwd="/", umask=0o022,
            )  # fmt: skip
        finally:
            os.close(settings)
        self._cell.owns(popen.pid)
        return popen

    def _pump(self, kind: bytes, fd: int) -> None:
        """Output into frames, until its end."""
        with contextlib.suppress(OSError):
            while (data := os.read(fd, _PIECE)) and not self._cut.is_set():
                self._put(frame(kind, data))
        self._put(b"")

    def _put(self, message: bytes) -> None:
        while not self._cut.is_set():
            with contextlib.suppress(queue.Full):
                self._frames.put(message, timeout=0.5)
                return

    def _finish(self, popen: subprocess.Popen[bytes]) -> None:
        """The exit status as the last frame; a little after the end, so that output in the pipes comes first."""
        code = popen.wait()
        self._put(b"exit %d" % (128 - code if code < 0 else code))

    def _stream(self, sources: int) -> Iterator[bytes]:
        """Frames until the command ended and its output was read, or a moment later when others hold its pipes."""
        code: bytes | None = None
        while sources or code is None:
            try:
                message = self._frames.get(timeout=None if code is None else 1.0)
            except queue.Empty:
                break
            if message.startswith(b"exit "):
                code = message[5:]
            elif message:
                yield message
            else:
                sources -= 1
        yield frame(b"x", code or b"1")

    def _take_input(self, path: str, stdin: int, popen: subprocess.Popen[bytes]) -> None:
        """Frames into the command's input; what it does not read is dropped with it."""
        channel = self._channel.copy()
        frames = FrameReader()
        tty = bool(self._request.get("tty"))
        try:
            response = channel.open("GET", f"{path}/input", timeout_s=None)
            while (data := response.read1(_PIECE)) and not self._cut.is_set():
                for kind, content in frames.feed(data):
                    if kind == b"i":
                        _write_all(stdin, content)
                    elif kind == b"w" and tty:
                        rows, _, cols = content.partition(b" ")
                        _resize(stdin, int(rows), int(cols))
                    elif kind == b"c":
                        if not tty:
                            os.close(stdin)
                        return
            if not self._cut.is_set():
                _end(popen)  # the client went away without saying that its input ended
        except (Unreachable, Refused, OSError, HTTPException, ValueError):
            return
        finally:
            channel.close()


def _resize(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _end(popen: subprocess.Popen[bytes]) -> None:
    """Kill a command that still runs, with what it started."""
    if popen.poll() is None:
        for pid in (*processes.descendants(popen.pid), popen.pid):
            processes.send(pid, signal.SIGKILL)
