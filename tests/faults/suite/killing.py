"""kill -9 of a process at the nth commit of its database or the nth thing that it sends, from outside of its code."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from tests.faults.suite.registry import Skipped

SHIM: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static int seen, mine = -1;
static __thread int committing;
static int is_mine(void) {
    if (mine < 0) {
        char line[4096]; int file = open("/proc/self/cmdline", O_RDONLY); ssize_t size = read(file, line, sizeof line - 1);
        close(file); for (ssize_t i = 0; i < size; i++) if (!line[i]) line[i] = ' ';
        line[size > 0 ? size : 0] = 0;
        mine = strstr(line, "tidemill.bootstrap") != NULL && getenv("KILL_AT_COMMIT") != NULL;
    }
    return mine;
}
/* The number in the file: at which commit from when the file was there, before it (negative) or after. Zero: not now. */
static int target(void) {
    char text[32] = {0}; int file = open(getenv("KILL_AT_COMMIT"), O_RDONLY);
    if (file < 0) { seen = 0; return 0; }
    if (read(file, text, sizeof text - 1) < 1) text[0] = 0;
    close(file);
    return atoi(text);
}
static int begin(void) {
    if (!is_mine()) return 0;
    int wanted = target();
    if (!wanted) return 0;
    int now = __sync_add_and_fetch(&seen, 1);
    if (now == -wanted) kill(getpid(), SIGKILL);
    return now == wanted;
}
int fdatasync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    int ends = begin();
    int status = real(file);
    if (ends) kill(getpid(), SIGKILL);
    return status;
}
ssize_t send(int file, const void *data, size_t size, int flags) {
    ssize_t (*real)(int, const void *, size_t, int) = dlsym(RTLD_NEXT, "send");
    if (size < 4096 && memmem(data, size, "COMMIT", 6)) committing = begin();
    return real(file, data, size, flags);
}
ssize_t recv(int file, void *data, size_t size, int flags) {
    ssize_t (*real)(int, void *, size_t, int) = dlsym(RTLD_NEXT, "recv");
    ssize_t got = real(file, data, size, flags);
    if (committing && got > 0) kill(getpid(), SIGKILL);
    return got;
}
"""
"""Counts syncs of a SQLite file, and COMMITs sent to a PostgreSQL; of the control plane, not of what it starts."""


@cache
def built(source: str) -> Path:
    """A library of that C source, to be loaded before others. Raises: Skipped without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Skipped("no C compiler to build the shim with: apt install gcc")
    folder = Path(tempfile.mkdtemp(prefix="tm-shim-"))
    (folder / "shim.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


class KillAtCommit:
    """Ends a control plane that was started with ``env`` at a commit that ``arm`` names."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "kill-at"
        self.env = {"LD_PRELOAD": str(built(SHIM)), "KILL_AT_COMMIT": str(self._file)}

    def arm(self, nth: int) -> None:
        """Just after the nth commit from now on, or just before it when ``nth`` is negative."""
        draft = self._file.with_suffix(".new")
        draft.write_text(str(nth))
        draft.rename(self._file)

    def disarm(self) -> None:
        """No more."""
        self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def kill_at_send(pid: int, nth: int) -> Iterator[None]:
    """Within, the process of that id is killed at the nth thing that it sends. Raises: Skipped without strace."""
    strace = shutil.which("strace")
    if strace is None:
        raise Skipped("apt install strace")
    calls = "sendto,sendmsg,write,writev"
    tracer = subprocess.Popen(
        [strace, "-f", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", f"trace={calls}",
         "-e", f"inject={calls}:signal=KILL:when={nth}"],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until = time.monotonic() + 5
        while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                raise Skipped(f"strace cannot attach here: {tracer.stderr.read().decode() if tracer.stderr else ''}")
            assert time.monotonic() < until
            time.sleep(0.01)
        yield
    finally:
        tracer.terminate()
        tracer.wait()
