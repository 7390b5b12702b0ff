"""kill -9 of a process at the nth time that it syncs to disk, commits, or sends, from outside of its code."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final, Literal

from tests.faults.suite.registry import Skipped

Role = Literal["control", "agent", "runner"]
Call = Literal["sync", "send", "fork"]
SHIM: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>
static int seen, order;
static pid_t born;
static const char *role = "";
static __thread int committing;
__attribute__((constructor)) static void look(void) {
    char line[4096]; int file = open("/proc/self/cmdline", O_RDONLY); ssize_t size = read(file, line, sizeof line - 1);
    close(file); for (ssize_t i = 0; i < size; i++) if (!line[i]) line[i] = ' ';
    line[size > 0 ? size : 0] = 0;
    born = getpid();
    if (!getenv("KILL_AT")) return;
    if (strstr(line, "tidemill.bootstrap")) role = "control";
    else if (strstr(line, "tidemill.outpost")) role = "agent";
    else if (strstr(line, "tidemill.runner.launcher")) role = "launcher";
}
/* Whether this is the call at which to die. The file says who, at what, at which from now on (before it when
   negative, else after), and the number of this order. Whoever dies takes the file away first. Each call that counts is a mark in a second file. */
static int begin(const char *what) {
    const char *path = getenv("KILL_AT"), *me = role;
    char text[64] = {0}, who[16], at[16], marks[4096]; int wanted, given;
    if (!*me) return 0;
    if (me[0] == 'l') { if (getpid() == born) return 0; me = "runner"; }
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    if (size < 1 || sscanf(text, "%15s %15s %d %d", who, at, &wanted, &given) != 4 || strcmp(who, me) || strcmp(at, what)) return 0;
    if (order != given) { order = given; seen = 0; }
    snprintf(marks, sizeof marks, "%s.seen", path);
    file = open(marks, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (file >= 0) {
        ssize_t (*note)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
        (void)!note(file, ".", 1);
        close(file);
    }
    int now = __sync_add_and_fetch(&seen, 1);
    if (now != abs(wanted)) return 0;
    if (unlink(path)) return 0;
    if (wanted < 0) kill(getpid(), SIGKILL);
    return 1;
}
static void die(void) { kill(getpid(), SIGKILL); }
/* Whether it goes to another process, by a network or a named socket. */
static int is_sent(int file) {
    struct stat found; struct sockaddr_un peer; socklen_t size = sizeof peer;
    if (!*role || fstat(file, &found) || !S_ISSOCK(found.st_mode)) return 0;
    if (getpeername(file, (struct sockaddr *)&peer, &size)) return 0;
    return peer.sun_family == AF_INET || peer.sun_family == AF_INET6 || size > sizeof peer.sun_family;
}
/* Whether it asks the launcher for a runner: they share a pair of sockets that keep messages apart. */
static int is_for_launcher(int file) {
    int type = 0; socklen_t size = sizeof type;
    return *role == 'a' && !getsockopt(file, SOL_SOCKET, SO_TYPE, &type, &size) && type == SOCK_SEQPACKET;
}
#define WRAP(kind, name, what, when, parameters, arguments) \
    kind name parameters { \
        static kind (*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        int ends = (when) && begin(what); \
        kind done = real arguments; \
        if (ends) die(); \
        return done; \
    }
WRAP(int, fsync, "sync", 1, (int file), (file))
WRAP(int, fdatasync, "sync", 1, (int file), (file))
WRAP(ssize_t, write, "send", is_sent(file), (int file, const void *data, size_t size), (file, data, size))
WRAP(ssize_t, writev, "send", is_sent(file), (int file, const struct iovec *data, int count), (file, data, count))
WRAP(ssize_t, sendmsg, "send", is_sent(file), (int file, const struct msghdr *data, int flags), (file, data, flags))
WRAP(ssize_t, sendto, "send", is_sent(file), (int file, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length), (file, data, size, flags, to, length))
ssize_t send(int file, const void *data, size_t size, int flags) {
    static ssize_t (*real)(int, const void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "send");
    if (*role && size < 4096 && memmem(data, size, "COMMIT", 6)) committing = begin("sync");
    int ends = is_for_launcher(file) ? begin("fork") : is_sent(file) && begin("send");
    ssize_t done = real(file, data, size, flags);
    if (ends) die();
    return done;
}
/* A commit that was sent is done when it is answered. */
ssize_t recv(int file, void *data, size_t size, int flags) {
    static ssize_t (*real)(int, void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "recv");
    ssize_t got = real(file, data, size, flags);
    if (committing && got > 0) die();
    return got;
}
"""
"""Counts syncs of files and COMMITs sent to a PostgreSQL as the one, all that goes to other processes as the other, and
apart from that how often an agent had its launcher fork a runner."""


@cache
def built(source: str) -> Path:
    """A library of that C source, to be loaded before others. Raises: Skipped without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Skipped("no C compiler to build the shim with: apt install gcc")
    folder = Path(tempfile.mkdtemp(prefix="tm-shim-"))
    folder.chmod(0o755)  # the database runs as somebody else
    (folder / "shim.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


class Killer:
    """Ends a process that was started with ``env`` when ``arm`` says; of its kind, whichever comes to that first."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "kill-at"
        self._marks = folder / "kill-at.seen"
        self._orders = 0
        self.env = {"LD_PRELOAD": str(built(SHIM)), "KILL_AT": str(self._file)}

    def arm(self, nth: int, *, role: Role = "control", call: Call = "sync") -> None:
        """Just after the nth sync or send from now on, or just before it when ``nth`` is negative."""
        self._marks.unlink(missing_ok=True)
        self._orders += 1
        draft = self._file.with_suffix(".new")
        draft.write_text(f"{role} {call} {nth} {self._orders}")
        draft.rename(self._file)

    @property
    def is_armed(self) -> bool:
        """Whether nobody died yet."""
        return self._file.exists()

    def disarm(self) -> int:
        """No more; how many calls were counted."""
        self._file.unlink(missing_ok=True)
        return self._marks.stat().st_size if self._marks.exists() else 0
