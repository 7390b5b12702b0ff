"""A program of its own: becomes a command inside the namespaces of a sandboxed process.

Run as ``python -I -S enter.py FD``, where the descriptor holds JSON with ``pid``, ``command``, ``environment``,
``cwd`` and ``tty``. It is a program because namespaces can only be entered by a process with one thread. The
user namespaces are entered from the outside in, the others between the outermost and the next, as that is
where bubblewrap made them and where entering gives the right to enter them.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import termios
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_GET_PARENT = 0xB702
_PDEATHSIG = 1
_NO_NEW_PRIVS = 38
_CAPBSET_DROP = 24
_CAP_AMBIENT = 47
_CAP_AMBIENT_CLEAR_ALL = 4


def enter(pid: int) -> None:
    """Be where that process is. Raises: OSError."""
    root = f"/proc/{pid}/ns/"
    users = _user_namespaces(root)
    others = [os.open(root + name, os.O_RDONLY | os.O_CLOEXEC) for name in ("mnt", "ipc", "uts", "pid")]
    for namespace in users[:1] if os.geteuid() else ():
        _set(namespace)
    for namespace in others:
        _set(namespace)
    for namespace in users[1:] if os.geteuid() and len(users) > 1 else users[-1:]:
        _set(namespace)


def _user_namespaces(root: str) -> list[int]:
    """The process's user namespaces, the outermost that is not ours first."""
    own = Path("/proc/self/ns/user").stat().st_ino
    chain = [os.open(root + "user", os.O_RDONLY | os.O_CLOEXEC)]
    if os.fstat(chain[0]).st_ino == own:
        return []
    while True:
        try:
            parent = fcntl.ioctl(chain[0], _GET_PARENT)
        except OSError:
            return chain
        if os.fstat(parent).st_ino == own:
            return chain
        chain.insert(0, parent)


def _set(namespace: int) -> None:
    if _LIBC.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Enter, start the command, and end as it ends."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        request = json.loads(file.read())
    if request["pid"]:
        enter(int(request["pid"]))
    child = os.fork()
    if not child:
        _become(request)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(128 - code if code < 0 else code)


def _become(request: dict[str, Any]) -> None:
    _LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if request["pid"]:
        _drop_capabilities()
    command = [str(word) for word in request["command"]]
    environment = {str(k): str(v) for k, v in request["environment"].items()}
    try:
        os.setsid()
        if request["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.chdir(str(request["cwd"]))
        os.environ.clear()
        os.environ.update(environment)
        _execute(command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _drop_capabilities() -> None:
    """Have no rights but a user's, also as root: a container of root's has no user namespace that takes them.

    Ambient and bounding set, then the rest (version 3 of the header: twice three words of 32 capabilities).
    """
    _LIBC.prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(64):
        _LIBC.prctl(_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if _LIBC.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _execute(command: list[str]) -> None:
    """Become the command, found on the worker's PATH."""
    arguments = (ctypes.c_char_p * (len(command) + 1))(*(os.fsencode(word) for word in command), None)
    _LIBC.execvp(os.fsencode(command[0]), arguments)
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
