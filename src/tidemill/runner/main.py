"""★ The story of one worker: claim, prepare, set up, run, wait, make sure that nothing is left, deliver, end.

The main thread decides; it waits on one queue of happenings, so a stop can come at any time. Others only do:
one empties the pipe into the spool, one ships the spool, one reports and beats, one takes commands, one
prepares, one probes readiness. Processes of the worker are started by the main thread, because they are
killed by the kernel when the thread that started them ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tidemill.model.storage import mount_variable
from tidemill.runner import cgroup, images, processes, sandbox
from tidemill.runner.cell import Cell, Process
from tidemill.runner.client import Channel, Closing, Refused, Unreachable
from tidemill.runner.datacache import DataCache
from tidemill.runner.environment import worker_environment
from tidemill.runner.execs import Commands
from tidemill.runner.folders import LaunchFolder, read_json, write_json
from tidemill.runner.logs import DEFAULT_CAP_BYTES, Shipper, Spool, drain
from tidemill.runner.mounts import Mount, provide, volume
from tidemill.runner.prepare import (
    EnvironmentBuilder,
    SetupFailed,
    extract,
    fetch,
    from_os_error,
    shared_folder,
    tool_message,
)
from tidemill.runner.readiness import Probe, probe_of, watch_liveness, watch_readiness
from tidemill.runner.reports import BEAT_S, Outbox

_SECOND_NS: Final = 1_000_000_000
_DAY_S: Final = 86_400.0
_TERM_TRAP: Final = """trap 'trap "" TERM; wait; exit 143' TERM; """
_BACKSTOP_S: Final = 30.0
_QUIET_S: Final = 10.0
_IDLE: Final = "exec sleep infinity"
_IMAGE_IDLE: Final = "while :; do sleep 3600; done"
_BY_SIGNAL: Final = 128
_MOMENT_S: Final = 0.5
_LATE_S: Final = 2.0
"""How long after its lease and grace a runner is killed that has not ended its worker; less than others wait."""
_MODEL_DIR: Final = "TIDEMILL_MODEL_DIR"
STOPPED: Final = 143


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the worker ended. ``cause`` is empty when its exit status says it all."""

    code: int
    cause: str = ""
    detail: str = ""


class Fenced(Exception):
    """Somebody else holds the lease of this launch."""


def run_launch(path: Path, on_claimed: Callable[[], None]) -> int:
    """Zero when this process ran the launch, one when it is another's or was run before."""
    folder = LaunchFolder(path)
    lock = processes.take_lock(folder.lock)
    spec = read_json(folder.spec)
    if lock is None or spec is None or not folder.claim():
        return 1
    own = {"pid": os.getpid(), "start_ticks": processes.start_ticks(os.getpid()), "boot_id": processes.boot_id()}
    write_json(folder.runner, own)
    runner = Runner(folder, spec)
    on_claimed()
    runner.run()
    os.close(lock)
    return 0


class Runner:
    """One launch from its claim to its end."""

    def __init__(self, folder: LaunchFolder, spec: Mapping[str, Any]) -> None:
        self.folder = folder
        self.spec = spec
        self.settings: Mapping[str, Any] = spec["runner"]
        self.root = Path(self.settings["root"])
        self.launch_id = str(spec["launch_id"])
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ending = threading.Event()
        self._kill_at_s: float | None = None
        self._times_out_s: float | None = None
        self._lease_s = int(spec.get("lease_ns") or 0) / _SECOND_NS
        self._deadline = processes.Deadline() if self._lease_s else None
        self._fault: Outcome | None = None
        self._process: Process | None = None
        self.mounts: list[Mount] = []
        limits = cgroup.Limits(
            memory_bytes=int(spec["memory_bytes"]), cpu_milli=int(spec["cpu_milli"]), pids=int(self.settings["pids"])
        )
        runtime = self.settings.get("container")
        self._runtime = images.from_json(runtime) if runtime else None
        groups = cgroup.create({} if runtime else self.settings["groups"], limits)
        self.cell = Cell(str(self.settings["mark"]), "" if runtime else str(self.settings["bwrap"]), groups)
        endpoint = str(self.settings["endpoint_file"])
        self.channel = Channel(
            api_url=str(spec["api_url"]),
            endpoint_file=Path(endpoint) if endpoint else None,
            token=str(spec["runner_token"]),
            prefix=f"/v1/runners/{self.launch_id}",
            ca=str(dict(spec["environment_variables"]).get("TIDEMILL_API_CA", "")),
        )
        self.spool = Spool(folder.output, cap_bytes=int(self.settings.get("spool_cap_bytes") or DEFAULT_CAP_BYTES))
        self.shipper = Shipper(
            self.spool,
            self.channel.copy(),
            giving_up=self._ending,
            on_fenced=lambda: self._inbox.put(("fenced", None)),
            on_delivered=lambda: self._inbox.put(("delivered", None)),
        )
        self.outbox = Outbox(
            folder.reports,
            self.channel.copy(),
            fence=int(spec["fence"]),
            usage=lambda: (self.cell.cpu_used_ns(), self.cell.rss_bytes()),
            on_stop=lambda grace_ns: self._inbox.put(("stop", grace_ns)),
            on_fenced=lambda: self._inbox.put(("fenced", None)),
            on_told=lambda: self._inbox.put(("told", None)),
            granted=folder.granted if self._lease_s else None,
            on_granted=self._put_off,
            beat_s=float(self.settings.get("beat_s") or BEAT_S),
        )

    def _put_off(self, granted_s: float) -> None:
        """The lease runs anew: so long, and its grace, the worker may live, even if this process stands still."""
        if self._deadline is not None:
            until_s = granted_s + self._lease_s + int(self.spec.get("grace_ns") or 0) / _SECOND_NS + _LATE_S
            self._deadline.put_off(until_s - time.monotonic())

    # ------------------------------------------------------------------ the story

    def run(self) -> None:
        """Everything, from the first report to the last."""
        signal.signal(signal.SIGTERM, lambda *_: self._inbox.put(("stop", None)))
        processes.adopt_orphans()
        read_end, self._pipe = os.pipe()
        reader = threading.Thread(target=drain, args=(read_end, self.spool), name="drain", daemon=True)
        self.outbox.add("prepared")
        reader.start()
        self.shipper.start()
        try:
            outcome = self._attempt()
        except Fenced:
            outcome = None
        except Closing:
            outcome = Outcome(STOPPED, detail="stopped before it started")
        except SetupFailed as failure:
            outcome = Outcome(failure.code, failure.cause, str(failure))
        except OSError as error:
            traceback.print_exc()
            translated = from_os_error(error)
            outcome = Outcome(translated.code, translated.cause, str(translated))
        self._finish(outcome, reader)

    def _attempt(self) -> Outcome:
        self._check_stop_file()
        self._check_ports()
        self._make_folders()
        self._await_lease()
        secrets, virtual_env = self._prepare()
        if self._runtime:
            return self._attempt_image(self._runtime, secrets)
        environment, view = self._surroundings(secrets, virtual_env)
        if str(self.spec.get("setup") or "").strip():
            self.outbox.start()
            code = self._wait_for(self._script(str(self.spec["setup"]), environment, view))
            if self._stopping.is_set():
                return Outcome(STOPPED, detail="stopped during its setup")
            if code:
                raise SetupFailed(f"the setup script exited with status {code}; its output is in the log", code=code)
        process = self._script(str(self.spec.get("run") or "") or _IDLE, environment, view)
        self._began(process, environment, self._isolation())
        return self._judge(self._wait_for(process), process)

    def _await_lease(self) -> None:
        """Begin only when the control plane says that this launch holds the lease still: it may have come late."""
        if not self._lease_s:
            return
        self.outbox.start()
        until_s = time.monotonic() + self._lease_s
        while self.outbox.granted_s < 0:
            if time.monotonic() > until_s:
                raise SetupFailed("the control plane did not answer for the length of the lease", cause="node_lost")
            self._next()
            if self._stopping.is_set():
                raise Closing

    def _attempt_image(self, runtime: images.Runtime, secrets: Mapping[str, str]) -> Outcome:
        """The same in a container, which is one for setup and run."""
        environment, box = self._box(secrets)
        self.outbox.start()
        start = self.spool.size
        script = images.script_for(
            box, environment, str(self.spec.get("setup") or ""), str(self.spec.get("run") or "") or _IMAGE_IDLE
        )
        popen = self.cell.spawn_client(
            images.arguments(runtime, box), environment=images.client_variables(self.cell.mark), content=script,
            output=self._pipe,
        )  # fmt: skip
        process = images.ContainerProcess(popen, runtime, images.container_name(self.cell.mark))
        isolation = images.describe(runtime, box)

        def watch() -> None:
            while popen.poll() is None and not self._ending.is_set():
                if box.ready:
                    self._inbox.put(("ready", None))
                    return
                time.sleep(0.02)

        threading.Thread(target=watch, name="watch", daemon=True).start()
        began: list[bool] = []

        def note() -> None:
            if not began:
                began.append(True)
                self._began(process, environment, isolation)

        code = self._wait_for(process, on_ready=note)
        if box.ready:
            note()
            return self._judge(code, process)
        if self._stopping.is_set():
            return Outcome(STOPPED, detail="stopped during its setup")
        if box.begun:
            raise SetupFailed(f"the setup script exited with status {code}; its output is in the log", code=code)
        time.sleep(0.05)  # the last of its output is on its way through the pipe
        message = self.spool.read(max(start, self.spool.size - 4096), 4096).decode(errors="replace")
        raise SetupFailed(
            f"{runtime.kind} could not run the image {box.image}: {tool_message(message)}", code=code or 1
        )

    def _began(self, process: Process, environment: Mapping[str, str], isolation: tuple[str, ...]) -> None:
        """The worker runs: say so, and begin with what goes on beside it."""
        self.outbox.add("started", isolation=list(isolation))
        self.outbox.start()
        if limit_ns := int(self.spec.get("max_duration_ns") or 0):
            grace_ns = int(self.spec.get("grace_ns") or 0)
            self._times_out_s = time.monotonic() + (limit_ns + grace_ns) / _SECOND_NS + _BACKSTOP_S
        commands = Commands(self.channel, self.cell, process, environment, self.folder.work, self._ending)
        commands.start()
        self._watch_service()

    def _finish(self, outcome: Outcome | None, reader: threading.Thread) -> None:
        """Leave nothing running, then tell, in this order: all output, then the exit."""
        self.outbox.start()
        self._kill_all()
        if self._deadline is not None:
            self._deadline.cancel()
        cpu_used_ns = self.cell.cpu_used_ns()
        os.close(self._pipe)
        reader.join(5.0)
        self.spool.close()
        if outcome is not None:
            ended = {
                "exit_code": outcome.code, "cause": outcome.cause, "detail": outcome.detail,
                "cpu_used_ns": cpu_used_ns,
            }  # fmt: skip
            with contextlib.suppress(OSError):
                write_json(self.folder.exit, {**ended, "ended_ns": time.time_ns()})
            self.cell.groups.remove()
            if self._linger_until("delivered"):
                self.outbox.add("exited", **ended)
                self._linger_until("told")
        else:
            self.cell.groups.remove()
        self._ending.set()
        self.outbox.close()

    # ------------------------------------------------------------------ waiting

    def _wait_for(self, process: Process, *, on_ready: Callable[[], None] = lambda: None) -> int:
        """The exit status of a process, which is stopped when somebody asks for it."""
        self._process = process
        threading.Thread(target=lambda: self._inbox.put(("ended", process.wait())), name="wait", daemon=True).start()
        if self._stopping.is_set():
            process.terminate()
        while True:
            kind, value = self._next()
            if kind == "ended":
                self._process = None
                if int(value) > _BY_SIGNAL and self.settings.get("scheduler"):
                    self._hear_of_a_stop()
                return int(value)
            if kind == "ready":
                on_ready()

    def _hear_of_a_stop(self) -> None:
        """A scheduler signals the worker's processes and this one, in any order: give its signal to us a moment."""
        until_s = time.monotonic() + _MOMENT_S
        while not self._stopping.is_set() and (left_s := until_s - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                kind, value = self._inbox.get(timeout=left_s)
                if kind == "stop":
                    self._stop(value)
                elif kind == "fenced":
                    raise Fenced

    def _next(self) -> tuple[str, Any]:
        """The next happening; stops, fences, timeouts and leftovers are dealt with on the way."""
        beat_s = float(self.settings.get("beat_s") or BEAT_S)
        deadlines = [moment for moment in (self._kill_at_s, self._times_out_s) if moment is not None]
        if self._lease_s and self.outbox.granted_s >= 0 and not self._stopping.is_set():
            deadlines.append(self.outbox.granted_s + self._lease_s + 0.01)
        wait_s = min([beat_s, *(moment - time.monotonic() for moment in deadlines)])
        try:
            kind, value = self._inbox.get(timeout=max(0.0, wait_s))
        except queue.Empty:
            kind, value = "tick", None
            self._look_around()
        if kind == "stop":
            self._stop(value)
        elif kind == "fenced":
            raise Fenced
        elif kind == "failed" and self._fault is None:
            self._fault = value
            self._stop(int(self.spec.get("grace_ns") or 0))
        now_s = time.monotonic()
        if self._times_out_s is not None and now_s >= self._times_out_s:
            self._times_out_s = None
            self._fault = Outcome(STOPPED, "timed_out", "its max_duration is over, and it was not stopped in time")
            self._stop(int(self.spec.get("grace_ns") or 0))
        if self._lease_s and not self._stopping.is_set() and 0 <= self.outbox.granted_s < now_s - self._lease_s:
            self._fault = Outcome(STOPPED, "node_lost", "the control plane did not answer for the length of the lease")
            self._stop(int(self.spec.get("grace_ns") or 0))
        if self._kill_at_s is not None and now_s >= self._kill_at_s:
            self._kill_at_s = None
            self._kill_all()
        return kind, value

    def _kill_all(self) -> None:
        """Leave nothing of the worker running; a container goes first, while podman's monitor is there to say so."""
        if self._runtime:
            images.remove(self._runtime, images.container_name(self.cell.mark))
        self.cell.kill_all()

    def _stop(self, grace_ns: int | None) -> None:
        """Ask the worker to end, and set the moment at which it is killed; a later one never extends it."""
        if grace_ns is None:
            told = read_json(self.folder.stop)
            grace_ns = int((told or {}).get("grace_ns", self.spec.get("grace_ns") or 0))
            scheduler = self.settings.get("scheduler")
            if told is None and scheduler and self._fault is None:  # a signal that the control plane did not send
                self._fault = Outcome(STOPPED, "node_lost", f"{scheduler} ended the job that it ran in")
        kill_at_s = time.monotonic() + grace_ns / _SECOND_NS
        if not self._stopping.is_set():
            self._stopping.set()
            self._kill_at_s = kill_at_s
            if self._process:
                self._process.terminate()
        elif self._kill_at_s is not None:
            self._kill_at_s = min(self._kill_at_s, kill_at_s)

    def _look_around(self) -> None:
        """What is due now and then: a stop whose signal was missed, orphans that ended."""
        if not self._stopping.is_set():
            self._check_stop_file()
        if not self.cell.bwrap:
            self.cell.reap()

    def _check_stop_file(self) -> None:
        if self.folder.stop.exists():
            self._stop(None)
            if self._process is None:
                raise Closing

    def _linger_until(self, wanted: str) -> bool:
        """Whether it came, before the linger time ended or a stop found the control plane silent."""
        limit_s = time.monotonic() + float(self.settings.get("linger_s") or _DAY_S)
        while True:
            now_s = time.monotonic()
            if now_s > limit_s:
                return False
            if self._stopping.is_set() and now_s - self.outbox.last_answer_s > _QUIET_S:
                return False
            try:
                kind, value = self._inbox.get(timeout=min(2.0, max(0.01, limit_s - now_s)))
            except queue.Empty:
                if not self._stopping.is_set() and self.folder.stop.exists():
                    self._stopping.set()
                continue
            if kind == wanted and (wanted != "told" or self.outbox.idle):
                return True
            if kind == "stop":
                self._stopping.set()
            elif kind == "fenced":
                return False
            del value

    # ------------------------------------------------------------------ preparing

    def _check_ports(self) -> None:
        wanted = {
            int(port["number"]): f"port {port['number']} ({port['name']})" for port in self.spec.get("ports") or ()
        }
        if int(self.spec["rank"]) == 0 and self.spec.get("rendezvous_port"):
            wanted[int(self.spec["rendezvous_port"])] = f"the rendezvous port {self.spec['rendezvous_port']}"
        for number, name in wanted.items():
            if number and not _is_free(number):
                raise SetupFailed(
                    f"{name} is taken on this machine. End what listens there, or leave the number out of "
                    "`ports` to have a free one chosen.",
                    cause="port_taken",
                )

    def _make_folders(self) -> None:
        project, job = str(self.spec["project_id"]), str(self.spec["job_id"])
        volumes = self.settings.get("volumes") or self.root / "volumes"
        volume = Path(str(volumes)) / project / job
        self.folders = {
            "home": self.folder.home,
            "cache": self.root / "cache" / project / "home",
            "checkpoint": volume / "checkpoint",
            "output": volume / "output",
            "scratch": self.folder.scratch,
            "input": self.folder.inputs,
        }
        self.temporary = self.folder.path / "tmp"
        for path in (*self.folders.values(), self.folder.work, self.temporary):
            path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self.folder.home / ".cache").symlink_to(self.folders["cache"])

    def _prepare(self) -> tuple[dict[str, str], Path | None]:
        """Secrets and environment, after fetching and building what is missing, in a thread of its own."""
        spec = self.spec
        builder = self._builder()
        environment = spec.get("environment")
        ready = environment is None or builder.path(environment).is_dir()
        wanted = ("secrets", "workdir", "inputs", "data", "volumes")
        if ready and not any(spec.get(name) for name in wanted):
            return {}, builder.path(environment) if environment is not None else None

        def work() -> tuple[dict[str, str], Path | None]:
            return self._fetch_all(), builder.build(environment) if environment is not None else None

        self.outbox.start()
        preparing = ThreadPoolExecutor(1, "prepare").submit(work)
        preparing.add_done_callback(lambda _: self._inbox.put(("prepared", None)))
        while self._next()[0] != "prepared":
            if self._stopping.is_set():
                raise Closing
        return preparing.result()

    def _fetch_all(self) -> dict[str, str]:
        channel = self.channel.copy()
        if digest := str(self.spec.get("workdir") or ""):
            archive = self.folder.path / "workdir.tar"
            fetch(channel, digest, archive, stopping=self._stopping)
            extract(archive, self.folder.work)
            archive.unlink()
        store = self.root / "cache" / str(self.spec["project_id"]) / "inputs"
        for name, digest in self.spec.get("inputs") or ():
            content = shared_folder(channel, str(digest), store, stopping=self._stopping)
            link = self.folder.inputs / str(name)
            if link.parent != self.folder.inputs:
                raise SetupFailed(f"the input name {name!r} is not a plain name")
            link.symlink_to(content)
        self._mount_all(channel)
        while self.spec.get("secrets"):
            try:
                values = channel.call("GET", "/secrets")
            except Refused as refusal:
                raise SetupFailed(f"the secrets could not be had: {refusal}") from refusal
            except Unreachable:
                if channel.rest(self._stopping):
                    raise Closing from None
                continue
            return {str(name): str(value) for name, value in values.items()}
        return {}

    def _mount_all(self, channel: Channel) -> None:
        """Have the folders of data sets and volumes; a set that is copied is held until this process ends."""
        cache = DataCache(self.root / "cache" / "data", limit_bytes=int(self.settings.get("data_cache_bytes") or 0))
        project = str(self.spec["project_id"])
        for mount in self.spec.get("data") or ():
            folder, is_copy = provide(mount, project, cache, channel, stopping=self._stopping)
            variable = _MODEL_DIR if mount.get("model") else mount_variable("DATA", _name(mount["dataset"]))
            self.mounts.append(Mount(folder, str(mount["at"]), variable, False, is_copy))
        for mount in self.spec.get("volumes") or ():
            variable = mount_variable("VOLUME", str(mount["volume"]))
            self.mounts.append(Mount(volume(mount), str(mount["at"]), variable, not mount.get("read_only")))
        own = (self.root, self.folder.path, *(path.resolve() for path in self.folders.values()))
        for mount in self.mounts:
            mount.check(own)

    def _mounted(self, environment: dict[str, str]) -> dict[str, str]:
        """The variables with those that tell where data sets and volumes are."""
        is_placed = bool(self.cell.bwrap or self._runtime)
        return environment | {one.variable: one.at if is_placed else str(one.source) for one in self.mounts}

    def _builder(self) -> EnvironmentBuilder:
        return EnvironmentBuilder(
            root=self.root,
            project=str(self.spec["project_id"]),
            uv=str(self.settings["uv"]),
            base_python=str(self.settings["python"]),
            run=self._run_tool,
        )

    def _run_tool(
        self,
        command: list[str],
        cwd: Path,
        variables: Mapping[str, str],
        writable: tuple[Path, ...],
        readable: tuple[Path, ...],
    ) -> tuple[int, str]:
        """Run a tool in the walls while preparing; its output goes to the log and its end comes back."""
        view = replace(self._base_view(), writable=writable, readable=readable)
        start = self.spool.size
        process = self.cell.spawn(command, view=view, environment=variables, cwd=cwd, output=self._pipe)
        done = threading.Event()

        def end_early() -> None:
            while not done.wait(0.1):
                if self._stopping.is_set():
                    process.kill()
                    return

        threading.Thread(target=end_early, daemon=True).start()
        code = process.wait()
        done.set()
        if self._stopping.is_set():
            raise Closing
        if code:
            time.sleep(0.05)  # the last of its output is on its way through the pipe
        return code, self.spool.read(max(start, self.spool.size - 4096), 4096).decode(errors="replace") if code else ""

    # ------------------------------------------------------------------ running

    def _base_view(self) -> sandbox.View:
        accounts = self.root / "accounts"
        host = f"{str(self.spec['job_id'])[-40:].replace('_', '-')}-{self.spec.get('rank', 0)}"
        return sandbox.View(
            placed=(
                (accounts / "passwd", "/etc/passwd"),
                (accounts / "group", "/etc/group"),
                (self._hosts_file(host), "/etc/hosts"),
            ),
            temporary=self.temporary,
            devices=sandbox.private_devices((), self.folder.path / "dev"),
            host=host,
        )

    def _hosts_file(self, host: str) -> Path:
        """The machine's own names and the worker's, which libraries look up to learn their address."""
        path = self.folder.path / "hosts"
        known = Path("/etc/hosts")
        own = known.read_text(errors="replace") if known.exists() else "127.0.0.1 localhost\n"
        path.write_text(f"{own.rstrip()}\n127.0.0.1 {host}\n")
        return path

    def _surroundings(
        self, secrets: Mapping[str, str], virtual_env: Path | None
    ) -> tuple[dict[str, str], sandbox.View]:
        """What the worker finds: variables and files."""
        base = Path(str(self.settings["python"]))
        prefixes = sandbox.python_prefixes(base, *((virtual_env / "bin" / "python",) if virtual_env else ()))
        inputs = [link.resolve() for link in self.folder.inputs.iterdir()]
        gpus = self.settings.get("gpus") or [device for device, _ in self.spec.get("devices") or ()]
        nodes = sandbox.device_nodes(str(gpu) for gpu in gpus)
        view = replace(
            self._base_view(),
            writable=(self.folder.work, *(path for name, path in self.folders.items() if name != "input")),
            readable=(self.folder.inputs, *inputs, *((virtual_env,) if virtual_env else ()), *prefixes),
            devices=sandbox.private_devices(nodes, self.folder.path / "dev"),
            placed=(*self._base_view().placed, *((one.source, one.at) for one in self.mounts if not one.is_writable)),
            volumes=tuple((one.source, one.at) for one in self.mounts if one.is_writable),
        )
        environment = worker_environment(
            self.spec,
            folders=self.folders,
            temporary=sandbox.TMP if self.cell.bwrap else str(self.temporary),
            secrets=secrets,
            virtual_env=virtual_env,
            python_bin=base.resolve().parent,
        )
        return self._mounted(environment), view

    def _box(self, secrets: Mapping[str, str]) -> tuple[dict[str, str], images.Box]:
        """What a container finds: variables and files."""
        control = self.folder.path / "container"
        control.mkdir(exist_ok=True)
        box = images.Box(
            image=str(self.spec["image"]),
            mark=self.cell.mark,
            cwd=self.folder.work,
            control=control,
            writable=(self.folder.work, *(path for name, path in self.folders.items() if name != "input")),
            readable=(self.folder.inputs, *(link.resolve() for link in self.folder.inputs.iterdir())),
            placed=tuple((one.source, one.at) for one in self.mounts if not one.is_writable),
            volumes=tuple((one.source, one.at) for one in self.mounts if one.is_writable),
            temporary=self.temporary,
            devices=tuple(str(device) for device, _ in self.spec.get("devices") or ()),
            memory_bytes=int(self.spec["memory_bytes"]),
            cpu_milli=int(self.spec["cpu_milli"]),
            pids=int(self.settings["pids"]),
        )
        environment = worker_environment(
            self.spec, folders=self.folders, temporary=sandbox.TMP, secrets=secrets, virtual_env=None, python_bin=None
        )
        environment = self._mounted(environment)
        given = [str(name) for name, _ in self.spec.get("environment_variables") or ()]
        return images.variables(environment, (*given, *secrets)), box

    def _script(self, script: str, environment: Mapping[str, str], view: sandbox.View) -> Process:
        if Path("/bin/bash").exists():
            command = ["/bin/bash", "-euo", "pipefail", "-c", _TERM_TRAP + script]
        else:
            command = ["/bin/sh", "-eu", "-c", _TERM_TRAP + script]
        return self.cell.spawn(command, view=view, environment=environment, cwd=self.folder.work, output=self._pipe)

    def _isolation(self) -> tuple[str, ...]:
        return sandbox.describe(
            self.cell.bwrap, str(self.settings["sandbox_reason"]), self.cell.groups, len(self.spec.get("devices") or ())
        )

    def _watch_service(self) -> None:
        service = self.spec.get("service")
        if not service or int(self.spec["rank"]):  # the first of a gang answers for all
            return
        port = next(int(port["number"]) for port in self.spec["ports"] if port["name"] == service["port"])
        ready = probe_of(port, str(service.get("readiness_path") or ""), service.get("readiness_pace") or {})
        alive = service.get("liveness_pace")
        address = str(self.settings.get("address") or "127.0.0.1")
        begun: list[threading.Thread] = []

        def failed(cause: str) -> Callable[[str], None]:
            return lambda detail: self._inbox.put(("failed", Outcome(STOPPED, cause, detail)))

        def became(is_ready: bool) -> None:
            self.outbox.add("became", ready=is_ready, endpoint=f"{address}:{port}" if is_ready else "")
            if is_ready and alive is not None and not begun:  # while it loads, its readiness has its own time
                probe = probe_of(port, str(service.get("liveness_path") or ""), alive)
                begun.append(self._beside("alive", watch_liveness, probe, failed=failed("not_alive")))

        timeout_s = int(service.get("readiness_timeout_ns") or 0) / _SECOND_NS
        self._beside("ready", watch_readiness, ready, timeout_s=timeout_s, became=became, failed=failed("not_ready"))

    def _beside(self, name: str, watch: Callable[..., None], probe: Probe, **told: Any) -> threading.Thread:
        """A thread that probes the worker until this launch ends."""
        thread = threading.Thread(
            target=watch, args=(probe,), kwargs={**told, "ending": self._ending}, name=name, daemon=True
        )
        thread.start()
        return thread

    def _judge(self, code: int, process: Process) -> Outcome:
        """Why the worker ended with that status."""
        if self._fault:
            return replace(self._fault, code=code or self._fault.code)
        memory = int(self.spec["memory_bytes"])
        if code and memory and not self._stopping.is_set():
            if self.cell.groups.oom_kills():
                detail = f"it needed more than its memory limit of {_size(memory)}; ask for more in resources.memory"
                return Outcome(code, "out_of_memory", detail)
            if code == 137 and "memory" not in self.cell.groups.paths:
                return Outcome(
                    code, "out_of_memory", f"it was killed, probably for memory (it asked for {_size(memory)})"
                )
        if code and (self.spool.storage_full or shutil.disk_usage(self.folder.path).free < 1 << 20):
            return Outcome(code, "storage_full", "the disk of its folders is full")
        if self._stopping.is_set():
            return Outcome(code, detail="stopped")
        if code and not process.leader:
            return Outcome(code, "setup_failed", "the sandbox did not come up; its message is in the log")
        return Outcome(code)


def _size(size: int) -> str:
    return f"{size / 1e9:g} GB" if size >= 10**9 else f"{size / 1e6:g} MB"


def _name(reference: object) -> str:
    return str(reference).partition(":")[0]


def _is_free(port: int) -> bool:
    """Whether a server can listen on that port here."""
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
                probe.listen(1)
        except OSError as error:
            if family == socket.AF_INET or error.errno in (98, 13):
                return False
    return True


def prepare_process(diary: Path) -> None:
    """Make this forked process a runner: its own session, its notes in a file, signals as they were."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not ignored: the worker would inherit that
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        notes = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        notes = os.dup(null)
    for source, target in ((null, 0), (notes, 1), (notes, 2)):
        os.dup2(source, target)
    for fd in (null, notes):
        if fd > 2:
            os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))
    sys.stdout.flush()
