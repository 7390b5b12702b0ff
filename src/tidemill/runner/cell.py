"""Where the processes of one launch run: sandbox and control groups around each of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tidemill.runner import cgroup, processes, sandbox

_OOM_SCORE: Final = b"500"


class Process:
    """A process of the launch with everything below it. ``leader`` is its group's, as seen from outside."""

    def __init__(self, popen: subprocess.Popen[bytes], info: int | None, groups: cgroup.Groups | None) -> None:
        self.popen = popen
        self._info = info
        self._groups = groups
        self._leader = 0 if info is not None else popen.pid
        self._walled = info is not None
        self._lock = threading.Lock()

    @property
    def walled(self) -> bool:
        """Whether it is in namespaces of its own, which ``leader`` leads to."""
        return self._walled

    @property
    def leader(self) -> int:
        """The first process, which leads the process group; zero when the sandbox did not come up."""
        with self._lock:
            if self._info is not None:
                content = b""
                while chunk := os.read(self._info, 4096):
                    content += chunk
                    with contextlib.suppress(ValueError):
                        self._leader = int(json.loads(content)["child-pid"])
                        break
                os.close(self._info)
                self._info = None
            return self._leader

    def wait(self) -> int:
        """The exit status, 128 and the signal's number when a signal ended it."""
        code = self.popen.wait()
        return 128 - code if code < 0 else code

    def terminate(self) -> None:
        """Ask the process group to end."""
        if self.leader and self.popen.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.leader, signal.SIGTERM)

    def join(self) -> None:
        """Put the calling process into the control groups of this one."""
        if self._groups:
            self._groups.join()

    def variables(self) -> dict[str, str]:
        """Variables that it has beside those that it was given."""
        return {}

    def kill(self) -> None:
        """End it and what is below it at once; what left the process group is found by other means."""
        below = processes.descendants(self.popen.pid) if self.popen.poll() is None else []
        for pid in (self.popen.pid, *below):
            processes.send(pid, signal.SIGKILL)


class Cell:
    """The walls of one launch, and its list of processes."""

    def __init__(self, mark: str, bwrap: str, groups: cgroup.Groups) -> None:
        self.mark = mark
        self.bwrap = bwrap
        self.groups = groups
        self._cpu_before_ns = _children_cpu_ns()
        self._own: set[int] = set()

    def spawn(
        self,
        command: Sequence[str],
        *,
        view: sandbox.View,
        environment: Mapping[str, str],
        cwd: Path,
        output: int,
    ) -> Process:
        """A process inside the walls, its output going to that descriptor. It dies when this thread ends.

        The environment may be a tenant's, so the sandbox program itself does not get it: a preloaded library
        would run outside.
        """
        environment = {**environment, processes.MARKER: self.mark}
        if not self.bwrap:
            return Process(self._popen(command, environment, output, (), cwd=cwd, walled=False), None, self.groups)
        read_end, write_end = os.pipe()
        settings = os.memfd_create("settings")
        try:
            words = [word for name, value in environment.items() for word in ("--setenv", name, value)]
            os.write(settings, b"".join(os.fsencode(word) + b"\0" for word in words))
            os.lseek(settings, 0, os.SEEK_SET)
            line = sandbox.arguments(self.bwrap, view, cwd=cwd, info_fd=write_end)
            line[1:1] = ["--clearenv", "--args", str(settings)]
            outer = {"PATH": "/usr/bin:/bin", processes.MARKER: self.mark}
            popen = self._popen([*line, *command], outer, output, (write_end, settings), cwd=Path("/"), walled=True)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
            os.close(settings)
        return Process(popen, read_end, self.groups)

    def spawn_client(
        self, command: Sequence[str], *, environment: Mapping[str, str], content: bytes, output: int
    ) -> subprocess.Popen[bytes]:
        """A program outside the walls that has the worker made elsewhere, with that content as its input."""
        stdin = os.memfd_create("input")
        try:
            with os.fdopen(os.dup(stdin), "wb") as file:
                file.write(content)
            os.lseek(stdin, 0, os.SEEK_SET)
            return self._popen(command, environment, output, (), cwd=Path("/"), walled=True, stdin=stdin)
        finally:
            os.close(stdin)

    def pids(self) -> list[int]:
        """Every live process of the launch but the runner itself."""
        own = os.getpid()
        if self.groups.paths:
            return [pid for pid in self.groups.pids() if pid != own]
        return processes.descendants(own)

    def kill_all(self, *, within_s: float = 5.0) -> bool:
        """Whether nothing of the launch is left but the runner."""
        done = self.groups.kill(within_s=within_s) if self.groups.paths else True
        return processes.kill_until_gone(self.pids, within_s=within_s) and done

    def cpu_used_ns(self) -> int:
        """CPU time of the launch's processes so far, ended ones included as far as it is known."""
        counted = self.groups.cpu_used_ns()
        if counted is not None:
            return counted
        running = sum(_cpu_ns(pid) for pid in self.pids())
        return running + _children_cpu_ns() - self._cpu_before_ns

    def rss_bytes(self) -> int:
        """Memory that the launch's processes hold now."""
        counted = self.groups.rss_bytes()
        return counted if counted is not None else sum(_rss_bytes(pid) for pid in self.pids())

    def owns(self, pid: int) -> None:
        """Leave the waiting for that child to whoever started it."""
        self._own.add(pid)

    def reap(self) -> None:
        """Take note of ended orphans that were handed to the runner, so that none stays a zombie."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in (int(word) for word in children if int(word) not in self._own):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def _popen(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        fds: tuple[int, ...],
        *,
        cwd: Path,
        walled: bool,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        parent = os.getpid()

        def enter() -> None:
            if not walled:
                processes.die_with_parent(parent)
                processes.refuse_new_privileges()
            _prefer_to_die()
            self.groups.join()

        popen = subprocess.Popen(
            command, stdin=stdin, stdout=output, stderr=output, env=dict(environment), cwd=cwd,
            pass_fds=fds, preexec_fn=enter, start_new_session=True, umask=0o022,
        )  # fmt: skip
        self.owns(popen.pid)
        return popen


def _prefer_to_die() -> None:
    """When the machine runs out of memory, a worker goes before what watches it."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, _OOM_SCORE)
        os.close(fd)


def _cpu_ns(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        ticks = int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
        return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return 0


def _rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _children_cpu_ns() -> int:
    used = os.times()
    return int((used.children_user + used.children_system) * 1e9)
