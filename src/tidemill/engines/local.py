"""The engine of one machine: no server of its own, no memory of its own.

What it knows is in ``launches/`` and in the process table. A launch's folder is written before anything is
started; a runner claims it, once, and holds its lock for as long as it lives. From these follows what is
observed, whoever asks and after whichever crash:

==================================  =======================================================
lock held                           ALIVE
claimed, lock free, ``exit.json``   EXITED, after what its runner left undone was told (ALIVE meanwhile)
claimed, lock free                  leftovers are killed, then GONE
not claimed                         not carried out: no observation, until it is given up
stopped before it was launched      GONE; the folder stays, so that a late launch finds it
==================================  =======================================================
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.fleet import Mig, Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.plan import LaunchSpec, Observation, ObservedState, Sight
from tidemill.ports import EngineCapabilities
from tidemill.runner import cgroup, images, processes, sandbox
from tidemill.runner.datacache import DataCache
from tidemill.runner.folders import LaunchFolder, read_json, write_json
from tidemill.units import SECOND_NS

log = logging.getLogger(__name__)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SLICE: Final = re.compile(r"(?P<gpu>[^/]+)/(?P<profile>[^@]+)@(?P<start>\d+)")
"""How a launch names a MIG slice: the GPU, the profile, and the first of its memory slices."""
_ABANDONED_S: Final = 60.0
_ANSWER_S: Final = 30.0
_DELIVERED_S: Final = 1.0
"""How long whoever drops a launch waits for its output to be delivered."""
_GUARD_S: Final = 1.0
_GUARD_MARGIN_NS: Final = 2 * SECOND_NS
"""How much later than its runner a worker is ended by the guard; with ``_GUARD_S`` and the killing, less than the
control plane waits beyond a lease."""
_MAX_PIDS: Final = 16_384
_SOURCE: Final = Path(__file__).parents[2]
_START: Final = "import sys; sys.path.append(sys.argv[1]); from tidemill.runner.launcher import main; main()"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    """How runners of this machine behave. ``sandbox`` is ``auto`` (bubblewrap when it works) or ``none``.

    ``spool_cap_bytes`` limits output that waits to be sent, ``linger_ns`` how long a runner goes on trying to
    deliver after its worker ended, ``beat_ns`` is the time between two heartbeats. ``address`` is where others reach
    the ports of workers here. ``volumes`` is where checkpoint and output folders of jobs are: in the engine's own
    folder unless it is given, as it is where machines share a file system. ``data_cache_bytes`` is how much copies of
    data sets may have together; zero: as much as the disk has.
    """

    sandbox: str = "auto"
    spool_cap_bytes: int = 1 << 30
    linger_ns: int = 24 * 3600 * SECOND_NS
    beat_ns: int = 2 * SECOND_NS
    max_pids: int = _MAX_PIDS
    address: str = "127.0.0.1"
    volumes: Path | None = None
    data_cache_bytes: int = 0


class LocalEngine:
    """Starts workers on this machine, as runners that outlive the control plane.

    ``root`` is this engine's folder and nobody else's; ``endpoint_file`` tells runners where the control plane
    is; ``node`` describes this machine and its devices. ``make_slice`` gives the driver's name of a MIG slice of a GPU,
    with that profile and beginning there, on a device whose slices may be made; without it there are none.
    """

    def __init__(
        self,
        root: Path,
        *,
        endpoint_file: Path,
        node: Callable[[], Node],
        settings: LocalSettings | None = None,
        python: Path | None = None,
        make_slice: Callable[[str, str, int], str] | None = None,
    ) -> None:
        self.root = root.resolve()
        self._endpoint_file = endpoint_file
        self._node = node
        self._make_slice = make_slice
        self._settings = settings or LocalSettings()
        self._python = python or Path(getattr(sys, "_base_executable", "") or sys.executable)
        self._launches = self.root / "launches"
        self._launches.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        self._write_accounts()
        self.isolation = sandbox.probe_isolation(self.root / "bwrap-works")
        self._hierarchies = cgroup.find_hierarchies()
        self._tag = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        self._boot_id = processes.boot_id()
        for doomed in self._launches.glob(".forgotten-*"):
            _remove_tree(doomed)
        self._closing = threading.Event()
        self._launcher = _Launcher(self.root)
        self._launching: set[str] = set()
        self._launcher.start()

    @functools.cached_property
    def containers(self) -> images.Runtime:
        """What runs container images here, looked for when it is first asked for."""
        return images.find_runtime(self.root / "container-works")

    @functools.cached_property
    def node_id(self) -> NodeId:
        """The id of this machine."""
        return self._node().id

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do here."""
        return EngineCapabilities(name="local", images=self.containers.works, exec=True, places=True)

    def nodes(self) -> tuple[Node, ...]:
        """This machine."""
        return (dataclasses.replace(self._node(), images=self.containers.works),)

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started; nothing more when its launch id was started before, even if it ended."""
        folder = self._folder(spec.launch_id)
        self._check(spec)
        self._launching.add(spec.launch_id)
        try:
            if folder.is_decided:
                return
            known = read_json(folder.spec)
            if known is None:
                self._write_spec(folder, spec)
            elif known["runner"]["boot_id"] != self._boot_id:
                return
            answer = self._launcher.ask(os.fsencode(folder.path))
            if answer.startswith(b"failed"):
                raise EngineLost(f"the runner could not be started: {answer.decode()[7:]}")
        except OSError as error:
            raise EngineLost(f"the launch could not be written down: {error.strerror}: {error.filename}") from error
        finally:
            self._launching.discard(spec.launch_id)

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:  # noqa: ARG002 - ids are enough
        """Have a worker signalled, and killed with all it started after the grace; remembered when unknown."""
        folder = self._folder(launch_id)
        if folder.gone.exists():
            return
        try:
            folder.write_stop(grace_ns)
        except OSError as error:
            raise EngineLost(f"the stop could not be written down: {error.strerror}") from error
        runner = read_json(folder.runner)
        if (
            runner
            and runner["boot_id"] == self._boot_id
            and processes.start_ticks(runner["pid"]) == runner["start_ticks"]
        ):
            processes.send(runner["pid"], signal.SIGTERM)

    def observe(self) -> Sight:
        """Every launch that it has not forgotten, from its own list; never from what it was told."""
        seen: list[Observation] = []
        lost: list[LaunchFolder] = []
        for folder in self._folders():
            state = self._look(folder)
            if isinstance(state, Observation):
                seen.append(state)
                if state.state is ObservedState.GONE and folder.is_owing:
                    self._have_delivered(folder)
            elif state == "lost":
                lost.append(folder)
            elif state == "owing":
                self._have_delivered(folder)
                seen.append(
                    Observation(
                        launch_id=LaunchId(folder.path.name),
                        node_id=self.node_id,
                        state=ObservedState.ALIVE,
                        detail="its runner was lost; its output is being delivered",
                    )
                )
        return Sight(
            nodes=frozenset({self.node_id}),
            launches=(*seen, *self._clean_up(lost)),
            cached=((self.node_id, DataCache(self.root / "cache" / "data").present()),),
        )

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:  # noqa: ARG002 - ids are enough
        """Drop what is kept of a launch that is gone.

        Raises: Conflict while anything of it lives, or its output is being delivered.
        """
        folder = self._folder(launch_id)
        if not folder.path.exists():
            return
        state = self._look(folder)
        if state == "lost":
            state = self._clean_up([folder])[0]
        if isinstance(state, Observation) and state.state is ObservedState.ALIVE:
            raise Conflict(f"{launch_id} still runs")
        if folder.is_owing and not self._is_delivered_soon(folder):
            raise Conflict(f"the output of {launch_id} is not delivered yet")
        self._groups(folder).remove()
        doomed = self._launches / f".forgotten-{launch_id}-{time.monotonic_ns()}"
        with suppress(FileNotFoundError):
            folder.path.rename(doomed)
        _remove_tree(doomed)

    def guard(self) -> None:
        """From now on, end workers whose runners stand still and so let a lease pass without ending them."""
        threading.Thread(target=self._guard_forever, name="guard", daemon=True).start()

    def end_overdue(self) -> list[LaunchId]:
        """The launches that were ended just now, because their runners had not for too long after their lease."""
        overdue = [folder for folder in self._folders() if self._is_overdue(folder)]
        for folder in overdue:
            runner = read_json(folder.runner) or {}
            if runner and processes.start_ticks(runner["pid"]) == runner["start_ticks"]:
                processes.send(runner["pid"], signal.SIGKILL)
        self._clean_up([folder for folder in overdue if not processes.is_locked(folder.lock)])
        return [LaunchId(folder.path.name) for folder in overdue]

    def close(self) -> None:
        """Let go without touching what runs."""
        self._closing.set()
        self._launcher.close()

    def mark(self, launch_id: str) -> str:
        """What names a launch on this machine, also beside another Tidemill's: processes and control groups bear it."""
        return f"{self._tag}-{launch_id}"

    # ------------------------------------------------------------------ launching

    def _check(self, spec: LaunchSpec) -> None:
        for name in (spec.launch_id, spec.project_id, spec.job_id):
            if not _NAME.fullmatch(name):
                raise EngineRefused(f"{name!r} cannot be the name of a folder")
        if not spec.image:
            return
        if reason := images.refuse_image(spec.image):
            raise EngineRefused(
                f"{spec.image!r} cannot be run: {reason}", field="image", value=spec.image,
                mend="Write for example docker.io/library/python:3.12.",
            )  # fmt: skip
        if not self.containers.works:
            raise EngineRefused(
                f"container images cannot be run on this node: {self.containers.support.detail}", field="image",
                value=spec.image, mend=f"{self.containers.support.mend}. Or use env: with python and packages.",
            )  # fmt: skip

    def _write_spec(self, folder: LaunchFolder, spec: LaunchSpec) -> None:
        visible, gpus = self._visible(spec)
        spec = dataclasses.replace(spec, devices=visible)
        settings = {**self._runner_settings(spec), "gpus": gpus}
        folder.write_spec({**dataclasses.asdict(spec), "runner": settings})

    def _visible(self, spec: LaunchSpec) -> tuple[tuple[tuple[str, int], ...], list[str]]:
        """The devices by the names that CUDA knows, and the GPUs whose files they need. Raises: EngineRefused."""
        visible: list[tuple[str, int]] = []
        gpus: dict[str, None] = {}
        node: Node | None = None
        for name, milli in spec.devices:
            if (part := _SLICE.fullmatch(name)) is None:
                visible.append((name, milli))
                gpus[name] = None
                continue
            node = node or self._node()
            visible.append((self._slice(node, part["gpu"], part["profile"], int(part["start"])), milli))
            gpus[part["gpu"]] = None
        return tuple(visible), list(gpus)

    def _slice(self, node: Node, gpu: str, profile: str, start: int) -> str:
        device = next((device for device in node.devices if device.id == gpu), None)
        if device is not None and device.mig is Mig.DYNAMIC and self._make_slice is not None:
            return self._make_slice(gpu, profile, start)
        for kind, begins, name in device.slices if device is not None else ():
            if (kind, begins) == (profile, start):
                return name
        raise EngineRefused(
            f"{gpu} has no slice {profile} that begins at {start}", field="resources.gpus", value=profile
        )

    def _runner_settings(self, spec: LaunchSpec) -> dict[str, Any]:
        """What the runner needs to know of this machine."""
        bubblewrap = self.isolation.supports[0]
        walled = self._settings.sandbox != "none"
        return {
            "boot_id": self._boot_id,
            "root": str(self.root),
            "endpoint_file": str(self._endpoint_file),
            "uv": _find_uv(),
            "python": str(self._python),
            "bwrap": self.isolation.bwrap if walled else "",
            "sandbox_reason": bubblewrap.detail if walled else "turned off in the settings",
            "container": self.containers.to_json() if spec.image else None,
            "groups": cgroup.plan(self.mark(spec.launch_id), self._hierarchies),
            "mark": self.mark(spec.launch_id),
            "pids": self._settings.max_pids,
            "address": self._settings.address,
            "volumes": str(self._settings.volumes or self.root / "volumes"),
            "spool_cap_bytes": self._settings.spool_cap_bytes,
            "data_cache_bytes": self._settings.data_cache_bytes,
            "linger_s": self._settings.linger_ns / SECOND_NS,
            "beat_s": self._settings.beat_ns / SECOND_NS,
        }

    def _write_accounts(self) -> None:
        """The user names that workers see: their own, and nobody else's of this machine."""
        accounts = self.root / "accounts"
        accounts.mkdir(exist_ok=True)
        uid, user = sandbox.UID, sandbox.USER
        lines = {
            "passwd": f"root:x:0:0:root:/root:/bin/sh\n{user}:x:{uid}:{uid}::/home/{user}:/bin/bash\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            "group": f"root:x:0:\n{user}:x:{uid}:\nnogroup:x:65534:\n",
        }
        for name, content in lines.items():
            if not (accounts / name).exists():
                (accounts / name).write_text(content)

    # ------------------------------------------------------------------ leases

    def _guard_forever(self) -> None:
        while not self._closing.wait(_GUARD_S):
            try:
                if ended := self.end_overdue():
                    log.warning("ended, because their runners stood still beyond their leases: %s", ", ".join(ended))
            except OSError as error:
                log.warning("whether leases passed cannot be seen: %s", error)

    def _is_overdue(self, folder: LaunchFolder) -> bool:
        """Whether the runner would have ended its worker by now, if it ran itself; one that has may linger."""
        if folder.exit.exists() or folder.gone.exists():
            return False
        try:
            granted_ns = int(folder.granted.read_bytes())
        except (OSError, ValueError):
            return False
        spec = read_json(folder.spec) or {}
        allowed_ns = int(spec.get("lease_ns") or 0) + int(spec.get("grace_ns") or 0) + _GUARD_MARGIN_NS
        return time.monotonic_ns() - granted_ns > allowed_ns and processes.is_locked(folder.lock)

    # ------------------------------------------------------------------ observing

    def _folder(self, launch_id: str) -> LaunchFolder:
        if not _NAME.fullmatch(launch_id):
            raise EngineRefused(f"{launch_id!r} cannot be the name of a folder")
        return LaunchFolder(self._launches / launch_id)

    def _folders(self) -> Iterator[LaunchFolder]:
        with os.scandir(self._launches) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        return (LaunchFolder(self._launches / name) for name in names)

    def _look(self, folder: LaunchFolder) -> Observation | str:
        """What is seen of a launch; ``lost`` when its runner is gone without a word, ``owing`` when it is so and the
        worker had ended, ``idle`` when not started."""
        launch_id = LaunchId(folder.path.name)
        if gone := read_json(folder.gone):
            return _gone(launch_id, self.node_id, gone)
        if processes.is_locked(folder.lock):
            return Observation(launch_id=launch_id, node_id=self.node_id, state=ObservedState.ALIVE)
        if ended := read_json(folder.exit):
            if folder.is_owing:
                return "owing"
            return Observation(
                launch_id=launch_id,
                node_id=self.node_id,
                state=ObservedState.EXITED,
                exit_code=int(ended["exit_code"]),
                cause=str(ended["cause"]),
                detail=str(ended["detail"]),
                cpu_used_ns=int(ended["cpu_used_ns"]),
                ended_ns=int(ended["ended_ns"]),
            )
        if folder.claimed.exists():
            return "lost"
        if not folder.spec.exists():
            return (
                _gone(launch_id, self.node_id, {"detail": "stopped before it was launched"})
                if folder.stop.exists()
                else "idle"
            )
        return self._look_unclaimed(folder)

    def _have_delivered(self, folder: LaunchFolder) -> None:
        """Have a process tell what a lost runner did not; nothing more while one does."""
        if processes.is_locked(folder.lock):
            return
        try:
            self._launcher.ask(os.fsencode(folder.path))
        except EngineLost as error:
            log.warning("what %s left undone cannot be told now: %s", folder.path.name, error)

    def _is_delivered_soon(self, folder: LaunchFolder) -> bool:
        """Whether what a lost runner left undone was told; if not, it is tried for a little longer and no more."""
        with suppress(OSError):
            folder.write_stop(0)
        until_s = time.monotonic() + _DELIVERED_S
        while folder.is_owing and time.monotonic() < until_s:
            self._have_delivered(folder)
            time.sleep(0.01)
        return not folder.is_owing

    def _look_unclaimed(self, folder: LaunchFolder) -> str:
        """A launch that was written down and not carried out; after a while, or a reboot, it never will be."""
        if folder.path.name in self._launching:
            return "idle"
        try:
            old = time.time() - folder.spec.stat().st_mtime > _ABANDONED_S
        except FileNotFoundError:
            return "idle"
        known = read_json(folder.spec)
        if old or not known or known["runner"]["boot_id"] != self._boot_id:
            folder.claim()
            return "lost"
        return "idle"

    def _clean_up(self, lost: list[LaunchFolder]) -> list[Observation]:
        """Kill what lost runners left behind, and say that they are gone when nothing is left."""
        if not lost:
            return []
        left = {self.mark(folder.path.name): folder.path.name for folder in lost}
        for folder in lost:
            self._groups(folder).kill(within_s=1.0)
            self._remove_container(folder)
        processes.kill_until_gone(
            lambda: [pid for pids in processes.marked_pids(left).values() for pid in pids], within_s=1.0
        )
        stuck = {folder.path.name for folder in lost if not self._remove_container(folder)}
        alive = stuck | {left[mark] for mark, pids in processes.marked_pids(left).items() if pids}
        return [self._conclude(folder, alive=folder.path.name in alive) for folder in lost]

    def _remove_container(self, folder: LaunchFolder) -> bool:
        """Whether no container of that launch is there any more; podman's monitor outlives the runner."""
        runtime = ((read_json(folder.spec) or {}).get("runner") or {}).get("container")
        if not runtime or not folder.runner.exists():
            return True
        return images.remove(images.from_json(runtime), images.container_name(self.mark(folder.path.name)))

    def _conclude(self, folder: LaunchFolder, *, alive: bool) -> Observation:
        groups = self._groups(folder)
        launch_id = LaunchId(folder.path.name)
        if alive or groups.pids():
            return Observation(
                launch_id=launch_id,
                node_id=self.node_id,
                state=ObservedState.ALIVE,
                detail="its runner is gone; being killed",
            )
        runner = read_json(folder.runner)
        rebooted = runner is not None and runner["boot_id"] != self._boot_id
        record = {
            "detail": "the machine was restarted" if rebooted else "its runner was lost" if runner else "never started",
            "cpu_used_ns": groups.cpu_used_ns() or 0,
            "ended_ns": time.time_ns(),
        }
        groups.remove()
        with suppress(OSError):
            write_json(folder.gone, record)
        return _gone(launch_id, self.node_id, record)

    def _groups(self, folder: LaunchFolder) -> cgroup.Groups:
        return cgroup.from_json(cgroup.plan(self.mark(folder.path.name), self._hierarchies))


def _gone(launch_id: LaunchId, node_id: NodeId, record: dict[str, Any]) -> Observation:
    return Observation(
        launch_id=launch_id,
        node_id=node_id,
        state=ObservedState.GONE,
        detail=str(record.get("detail", "")),
        cpu_used_ns=int(record.get("cpu_used_ns", 0)),
        ended_ns=int(record.get("ended_ns", 0)),
    )


class _Launcher:
    """The process that forks runners, started again when it is gone; requests are made one at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> None:
        """Have it there before it is needed."""
        with self._lock:
            self._ensure()

    @property
    def pid(self) -> int:
        """Its process id, zero when it does not run."""
        return self._process.pid if self._process else 0

    def ask(self, request: bytes) -> bytes:
        """Its answer. Raises: EngineLost when it did not answer, though it was started again once."""
        with self._lock:
            for last in (False, True):
                try:
                    channel = self._ensure()
                    channel.send(request)
                    if answer := channel.recv(4096):
                        return answer
                except OSError as error:
                    if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EAGAIN, errno.ENOTCONN) or last:
                        self._drop()
                        raise EngineLost(f"the launcher did not answer: {error}") from error
                self._drop()
        raise EngineLost("the launcher ended twice without an answer")

    def close(self) -> None:
        """Let it end; runners go on."""
        with self._lock:
            self._drop()

    def _ensure(self) -> socket.socket:
        if self._channel and self._process and self._process.poll() is None:
            return self._channel
        self._drop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER_S)
        log = (self._root / "launcher.log").open("ab")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, str(_SOURCE), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        finally:
            theirs.close()
            log.close()
        self._channel = ours
        if not ours.recv(64):
            raise ConnectionResetError(errno.ECONNRESET, "it ended at once; see launcher.log")
        return ours

    def _drop(self) -> None:
        if self._channel:
            self._channel.close()
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self._channel = self._process = None


@functools.cache
def _find_uv() -> str:
    try:
        import uv
    except ImportError:
        return shutil.which("uv") or ""
    try:
        return str(uv.find_uv_bin())
    except FileNotFoundError:
        return shutil.which("uv") or ""


def _remove_tree(folder: Path) -> None:
    """Remove a folder with everything in it, read-only folders included, and following no links."""

    def retry(function: Callable[..., Any], path: str, _: object) -> None:
        with suppress(OSError):
            Path(path).parent.chmod(0o700)
            Path(path).chmod(0o700, follow_symlinks=True) if not Path(path).is_symlink() else None
            function(path)

    shutil.rmtree(folder, onerror=retry)
