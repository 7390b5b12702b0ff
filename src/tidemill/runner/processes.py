"""What the process table says: start times, environments, descendants, and killing all of a launch."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

MARKER: Final = "TIDEMILL_LAUNCH_MARK"
"""The environment variable that every process of a launch inherits; its value is unique on the machine."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_CHILD_SUBREAPER: Final = 36
_FLOCK: Final = "hhqqi4x"
_CLOCK_BOOTTIME: Final = 7
_SECOND_NS: Final = 1_000_000_000


def boot_id() -> str:
    """The id that changes when the machine restarts; empty when the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; zero when there is no such process or a zombie.

    With the pid this names a process for as long as the machine is up, though pids are used again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def die_with_parent(parent: int) -> None:
    """Have this process killed when the thread that forked it ends; exits when that happened already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(137)


def refuse_new_privileges() -> None:
    """Make set-user-id programs powerless in this process and what it starts."""
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none gets out of sight."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Deadline:
    """The kernel kills this process, even one that stands still, unless ``put_off`` is called again in time.

    It counts the time for which the machine sleeps too. Where the C library has no such timers it does nothing.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._timer = ctypes.c_void_p()
        wanted = _Event(signo=signal.SIGKILL)
        try:
            failed = _LIBC.timer_create(_CLOCK_BOOTTIME, ctypes.byref(wanted), ctypes.byref(self._timer))
        except AttributeError:
            failed = -1
        self._is_open = not failed

    def put_off(self, for_s: float) -> None:
        """It ends ``for_s`` from now, at once when that is past; nothing when it was cancelled."""
        length_ns = max(1, round(for_s * _SECOND_NS))
        with self._changing:
            if self._is_open:
                until = _Interval(value_s=length_ns // _SECOND_NS, value_ns=length_ns % _SECOND_NS)
                _LIBC.timer_settime(self._timer, 0, ctypes.byref(until), None)

    def cancel(self) -> None:
        """For good."""
        with self._changing:
            if self._is_open:
                self._is_open = False
                _LIBC.timer_delete(self._timer)


class _Event(ctypes.Structure):
    """What the kernel calls a sigevent: a signal to this process."""

    _fields_ = (
        ("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int), ("rest", ctypes.c_char * 48),
    )  # fmt: skip


class _Interval(ctypes.Structure):
    """What the kernel calls an itimerspec: once, after so long."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("again_s", "again_ns", "value_s", "value_ns"))


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Whether the disk space of that part of a file was given back."""
    keep_size_and_punch = 3
    arguments = (ctypes.c_int(fd), ctypes.c_int(keep_size_and_punch), ctypes.c_long(offset), ctypes.c_long(length))
    return bool(_LIBC.fallocate(*arguments) == 0)


def take_lock(path: Path) -> int | None:
    """An open descriptor that holds the exclusive lock of ``path``, None when another process holds it.

    An open-file-description lock: it ends with the process, and ``is_locked`` can look without touching it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        os.close(fd)
        return None
    return fd


def wait_for_lock(path: Path) -> int:
    """An open descriptor that holds the exclusive lock of ``path``, after waiting for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return fd


def is_locked(path: Path | str) -> bool:
    """Whether some process holds the lock; looking does not disturb who takes it at the same moment."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(fd)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def all_pids() -> list[int]:
    """Every process that this one can see."""
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]


def marked_pids(marks: Iterable[str]) -> dict[str, list[int]]:
    """For each mark, the live processes that carry it in the environment they were started with."""
    wanted = {f"{MARKER}={mark}".encode(): mark for mark in marks}
    found: dict[str, list[int]] = {mark: [] for mark in wanted.values()}
    for pid in all_pids():
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        for entry in content.split(b"\0") if MARKER.encode() in content else ():
            if entry in wanted:
                found[wanted[entry]].append(pid)
    return found


def descendants(root: int) -> list[int]:
    """Live processes below ``root``, nearest first; ``root`` itself is not among them."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[0] not in (b"Z", b"X"):
            children.setdefault(int(fields[1]), []).append(pid)
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(0), [])
        found += below
        todo += below
    return found


def send(pid: int, number: int) -> bool:
    """Whether the signal was delivered."""
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def kill_until_gone(list_pids: Callable[[], Iterable[int]], *, within_s: float) -> bool:
    """Whether nothing is left; kills again and again what ``list_pids`` finds, so that forking does not help."""
    deadline = time.monotonic() + within_s
    while True:
        pids = [pid for pid in list_pids() if start_ticks(pid)]
        if not pids:
            return True
        for pid in pids:
            send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)


def rename(name: str) -> None:
    """Show this process under that name in lists; fifteen characters at most."""
    pr_set_name = 15
    _LIBC.prctl(pr_set_name, ctypes.create_string_buffer(name.encode()[:15]), 0, 0, 0)
