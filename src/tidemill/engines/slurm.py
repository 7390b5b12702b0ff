"""The engine of centres that keep Slurm: Tidemill admits, budgets and routes; Slurm places, and starts the runner.

Each launch is a batch job of its own, a gang one job of as many nodes: all or nothing is Slurm's then. What it
knows is in ``launches/``, on a file system that the nodes share, and in Slurm's own lists:

=============================================  ==========================================================
the runner holds the launch's lock             ALIVE
``exit.json``                                  EXITED
Slurm has the job, waiting or running          ALIVE, with Slurm's reason
Slurm ended the job, or has it no more         GONE, with how Slurm says that it ended: state, exit code, nodes
written down, and Slurm never had the job      not carried out: no observation
stopped before it was launched                 GONE; the folder stays, so that a late launch finds it
=============================================  ==========================================================

Submitting is not idempotent and its answer can be lost, so a job bears the name of its launch, and is looked for by
that name before it is submitted again. Should Slurm have two of them all the same, the first to run is the one.
Source: slurm-wlm 22.05; https://slurm.schedmd.com.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from tidemill import catalog
from tidemill.engines.slurmcommands import SlurmCommands
from tidemill.engines.slurmending import Ending
from tidemill.engines.slurmport import (
    LIVE,
    OPTIONS,
    Held,
    SlurmJob,
    SlurmNode,
    SlurmPort,
    Submission,
    gpu_kinds,
    host_names,
)
from tidemill.engines.slurmrest import SlurmRest
from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, LaunchId, NodeId, SiteId
from tidemill.model.plan import LaunchSpec, Observation, ObservedState, Sight
from tidemill.ports import EngineCapabilities
from tidemill.runner import processes
from tidemill.runner.folders import LaunchFolder, read_json, write_json
from tidemill.units import MILLI, MINUTE_NS, SECOND_NS

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SOURCE: Final = Path(__file__).parents[2]
_START: Final = "import sys; sys.path.append(sys.argv.pop(1)); from tidemill.runner.slurmstep import main; main()"
_RECORD: Final = "slurm.json"
"""In a launch's folder: Slurm's number of its job, empty while it is not known whether there is one."""
_AWAY: Final = frozenset({"DOWN", "FAIL", "NO_RESPOND", "NOT_RESPONDING"})
_NEVER_THERE: Final = frozenset({"UNKNOWN", "FUTURE"})
_HOLDING: Final = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT"})
_AT_ONCE: Final = 16
_MARGIN_NS: Final = 2 * MINUTE_NS
_BACKSTOP_S: Final = 10.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSettings:
    """How jobs are submitted that say nothing else: empty words are left to Slurm's own defaults.

    Of the nodes those are known that are in a ``partition`` of the list, with commas; all of them without.
    ``linger_ns`` and ``beat_ns`` are the runner's. ``python`` is the interpreter on the nodes; this one's unless given.
    ``rest`` is where slurmrestd answers, ``unix:/PATH`` or a URL; empty: Slurm's commands are used. ``rest_token`` is a
    file with a JSON web token of ``rest_user``, who is this process's user unless given.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    python: str = ""
    rest: str = ""
    rest_user: str = ""
    rest_token: str = ""
    linger_ns: int = 24 * 3600 * SECOND_NS
    beat_ns: int = 2 * SECOND_NS
    spool_cap_bytes: int = 1 << 30


class SlurmEngine:
    """Starts workers as batch jobs of a cluster, through Slurm's commands or slurmrestd. Keeps the contract of engines.

    ``root`` is a folder that the nodes share, this engine's and nobody else's. ``endpoint_file`` tells runners where
    the control plane is. Raises, from its methods: EngineLost when Slurm does not answer.
    """

    def __init__(
        self, root: Path, *, site_id: SiteId, endpoint_file: Path, settings: SlurmSettings | None = None
    ) -> None:
        """Raises: InvalidSetting for a ``rest`` that is no address."""
        self.root = root.resolve()
        self._site_id = site_id
        self._endpoint_file = endpoint_file
        self._settings = settings or SlurmSettings()
        self._slurm = _port(self._settings)
        self._launches = self.root / "launches"
        self._launches.mkdir(mode=0o700, parents=True, exist_ok=True)
        accounts = self.root / "accounts"
        accounts.mkdir(exist_ok=True)
        self._submitting = tuple(threading.Lock() for _ in range(_AT_ONCE))
        self._nodes: frozenset[NodeId] = frozenset()

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do: the nodes and devices are Slurm's choice."""
        return EngineCapabilities(name="slurm", images=False, exec=True, places=False)

    def nodes(self) -> tuple[Node, ...]:
        """The cluster's nodes with the GPUs that are configured there and with what jobs of others hold. Those that are
        down or drained are tainted: what ran there is Slurm's to tell."""
        ours = self._held_by_us()
        found = tuple(self._list_nodes(ours))
        self._nodes = frozenset(node.id for node in found)
        return found

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker's job submitted; nothing more when its launch id was before, even if it ended."""
        folder = self._folder(spec.launch_id)
        if spec.image:
            raise EngineRefused(
                "Slurm sites run no container images yet.", field="image", value=spec.image, mend="Use env:."
            )
        try:
            if folder.is_decided:
                return
            if read_json(folder.spec) is None:
                folder.write_spec({**dataclasses.asdict(spec), "runner": self._runner_settings(spec)})
            ranks = range(len(spec.gang))
            gang = [self._folder(_sibling(spec.launch_id, rank)) for rank in ranks] or [folder]
            if all(one.spec.exists() for one in gang):
                with self._submitting[crc32(gang[0].path.name.encode()) % len(self._submitting)]:
                    self._submit(spec, gang)
        except OSError as error:
            raise EngineLost(f"the launch could not be written down: {error.strerror}: {error.filename}") from error

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:  # noqa: ARG002 - ids are enough
        """Have a worker signalled, and killed with all it started after the grace; remembered when unknown."""
        folder = self._folder(launch_id)
        if folder.gone.exists():
            return
        try:
            folder.write_stop(grace_ns)
        except OSError as error:
            raise EngineLost(f"the stop could not be written down: {error.strerror}") from error
        if not folder.spec.exists():
            return
        for job in self._slurm.jobs(self._name(launch_id)):
            since_s = (time.time_ns() - int((read_json(folder.stop) or {}).get("at_ns", 0))) / SECOND_NS
            if job.state == "PENDING" or (not grace_ns and since_s > _BACKSTOP_S):
                self._slurm.cancel(job.id)
            elif job.state in LIVE:
                self._slurm.terminate(job.id)

    def observe(self) -> Sight:
        """Every launch that it has not forgotten, from its folders and Slurm's list."""
        if not self._nodes:
            self.nodes()
        listed = {job.name: job for job in self._slurm.jobs()}
        folders = [LaunchFolder(path) for path in sorted(self._launches.iterdir()) if not path.name.startswith(".")]
        seen = [found for folder in folders if (found := self._look(folder, lambda: listed)) is not None]
        return Sight(nodes=self._nodes, launches=tuple(seen))

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:  # noqa: ARG002 - ids are enough
        """Drop what is kept of a launch that is gone. Raises: Conflict while anything of it lives."""
        folder = self._folder(launch_id)
        if not folder.path.exists():
            return
        seen = self._look(folder, lambda: {job.name: job for job in self._slurm.jobs()})
        if seen is not None and seen.state is ObservedState.ALIVE:
            raise Conflict(f"{launch_id} still runs")
        doomed = self._launches / f".forgotten-{launch_id}-{time.monotonic_ns()}"
        with suppress(FileNotFoundError):
            folder.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def close(self) -> None:
        """Let go without touching what runs."""
        self._slurm.close()

    # ------------------------------------------------------------------ submitting

    def _submit(self, spec: LaunchSpec, gang: Sequence[LaunchFolder]) -> None:
        """Have the gang's job submitted, once: that it may have been is on the disk before it is."""
        name = self._name(spec.launch_id)
        record = gang[0].path / _RECORD
        if (before := read_json(record)) is not None:
            if before["job"]:
                return
            if known := self._slurm.jobs(name):
                write_json(record, {"job": known[0].id, "name": name})
                return
        write_json(record, {"job": "", "name": name}, durable=True)
        number = self._slurm.submit(self._submission(spec, name, gang))
        write_json(record, {"job": number, "name": name})

    def _submission(self, spec: LaunchSpec, name: str, gang: Sequence[LaunchFolder]) -> Submission:
        kinds = {device.split("/")[1] for device, _ in spec.devices if device.count("/") == 2}
        asked = dict(spec.slurm)
        longest_ns = spec.max_duration_ns + spec.grace_ns + _MARGIN_NS if spec.max_duration_ns else 0
        return Submission(
            name=name,
            comment=spec.job_id,
            script=self._script(gang, is_warned=bool(spec.grace_ns)),
            folder=str(self.root),
            nodes=len(gang),
            cpus=max(1, math.ceil(spec.cpu_milli / MILLI)),
            memory_mib=math.ceil(spec.memory_bytes / 2**20),
            gpus=len(spec.devices),
            gpu_kind=kinds.pop() if len(kinds) == 1 else "",
            minutes=math.ceil(longest_ns / MINUTE_NS),
            warning_s=math.ceil(spec.grace_ns / SECOND_NS),
            options=tuple(
                (option, value) for option in OPTIONS if (value := asked.get(option) or getattr(self._settings, option))
            ),
        )

    def _script(self, gang: Sequence[LaunchFolder], *, is_warned: bool) -> str:
        """What Slurm runs on the first node: the runner itself, or ``srun`` of it where it has to be a step."""
        command = [self._settings.python or sys.executable, "-I", "-S", "-c", _START]
        words = [*command, str(_SOURCE), *(str(folder.path) for folder in gang)]
        if len(gang) > 1 or (is_warned and self._slurm.warns_steps_only):
            size = (f"--nodes={len(gang)}", f"--ntasks={len(gang)}")
            words = ["srun", *size, "--overlap", "--kill-on-bad-exit=0", *words]
        return "#!/bin/sh\nexec " + shlex.join(words) + "\n"

    def _runner_settings(self, spec: LaunchSpec) -> dict[str, Any]:
        """What the runner needs to know; limits and walls are Slurm's own."""
        return {
            "boot_id": "",
            "root": str(self.root),
            "endpoint_file": str(self._endpoint_file),
            "uv": shutil.which("uv") or "",
            "python": self._settings.python or getattr(sys, "_base_executable", "") or sys.executable,
            "bwrap": "",
            "scheduler": "Slurm",
            "sandbox_reason": "Slurm's own limits hold",
            "container": None,
            "groups": {},
            "mark": f"slurm-{spec.launch_id}",
            "pids": 0,
            "spool_cap_bytes": self._settings.spool_cap_bytes,
            "linger_s": self._settings.linger_ns / SECOND_NS,
            "beat_s": self._settings.beat_ns / SECOND_NS,
        }

    # ------------------------------------------------------------------ observing

    def _look(self, folder: LaunchFolder, jobs: Callable[[], dict[str, SlurmJob]]) -> Observation | None:
        launch_id = LaunchId(folder.path.name)
        spec = read_json(folder.spec)
        node_id = NodeId(str((spec or {}).get("node_id", "")))

        def seen(state: ObservedState, **more: Any) -> Observation:
            return Observation(launch_id=launch_id, node_id=node_id, state=state, **more)

        if processes.is_locked(folder.lock):
            return seen(ObservedState.ALIVE)
        if ended := read_json(folder.exit):
            return seen(
                ObservedState.EXITED,
                exit_code=int(ended["exit_code"]),
                cause=str(ended["cause"]),
                detail=str(ended["detail"]),
                cpu_used_ns=int(ended["cpu_used_ns"]),
                ended_ns=int(ended["ended_ns"]),
            )
        if gone := read_json(folder.gone):
            return seen(ObservedState.GONE, **_as_recorded(gone))
        if spec is None:
            return seen(ObservedState.GONE, detail="stopped before it was launched") if folder.stop.exists() else None
        name = self._name(launch_id)
        job = jobs().get(name)
        if job is not None and job.state in LIVE:
            return seen(ObservedState.ALIVE, detail=f"Slurm job {job.id} is {job.state.lower()} ({job.reason})")
        first = self._folder(_sibling(launch_id, 0)) if spec.get("gang") else folder
        number = str((read_json(first.path / _RECORD) or {}).get("job", ""))
        if job is None and not number:
            return None
        if job is None and any(one.state in LIVE for one in self._slurm.jobs(name)):  # since the list was asked for
            return seen(ObservedState.ALIVE)
        record = _record(self._ending(job.id if job is not None else number, name), spec)
        with suppress(OSError):
            folder.claim()  # no runner may begin on it any more
            write_json(folder.gone, record)
        return seen(ObservedState.GONE, **_as_recorded(record))

    def _ending(self, number: str, name: str) -> Ending | None:
        """How the job ended: of slurmctld, or when that has forgotten it of the accounting, if there is one."""
        return self._slurm.ended(number, name) or self._slurm.accounted(number, name)

    def _held_by_us(self) -> dict[str, Held]:
        """What our launches hold, by Slurm's name of the node."""
        held: dict[str, Held] = {}
        for job in self._slurm.jobs():
            if job.state not in _HOLDING or not job.nodes or self._folder_of(job.name) is None:
                continue
            share = Held(cpus=job.cpus // job.node_count, memory_bytes=job.memory_bytes, gpus=job.gpus)
            for name in host_names(job.nodes):
                held[name] = held.get(name, Held()) + share
        return held

    def _list_nodes(self, ours: dict[str, Held]) -> Iterator[Node]:
        for found in self._slurm.nodes():
            if found.states & _NEVER_THERE or not self._is_ours(found.partitions):
                continue
            taint = "slurm=down" if found.states & _AWAY else "slurm=draining" if "DRAIN" in found.states else ""
            yield self._node(found, ours.get(found.name, Held()), (taint,) if taint else ())

    def _is_ours(self, partitions: Sequence[str]) -> bool:
        """Whether jobs of ours may come to a node of these partitions."""
        wanted = {name for name in self._settings.partition.split(",") if name}
        return not wanted or not wanted.isdisjoint(partitions)

    def _node(self, found: SlurmNode, ours: Held, taints: tuple[str, ...]) -> Node:
        """A node as Slurm tells of it. The type of its gres is taken for the first model that answers to it."""
        devices: list[Device] = []
        for kind, count in gpu_kinds(found.gres):
            spec = next((one for one in catalog.devices() if catalog.matches_request(one.model, kind)), None)
            spec = spec or catalog.derived_device(kind or "gpu", 0, power_mw=0)
            devices += [
                Device(
                    id=DeviceId(f"{found.name}/{kind}/{index}"),
                    index=index,
                    model=spec.model,
                    reported=kind,
                    memory_bytes=spec.memory_bytes,
                    idle_mw=spec.idle_mw,
                    busy_mw=spec.busy_mw,
                )
                for index in range(len(devices), len(devices) + count)
            ]
        held = found.held
        return Node(
            id=self._node_id(found.name),
            site_id=self._site_id,
            name=found.name,
            state=NodeState.READY,
            version=1,
            boot_id=found.boot,
            address=found.address,
            cpu_milli=found.cpus * MILLI,
            memory_bytes=max(1, found.memory_mib) * 2**20,
            disk_bytes=found.disk_mib * 2**20,
            devices=tuple(devices),
            labels=(("partition", "|".join(found.partitions)),) if found.partitions else (),
            taints=taints,
            others_cpu_milli=max(0, held.cpus - ours.cpus) * MILLI,
            others_memory_bytes=max(0, held.memory_bytes - ours.memory_bytes),
            others_gpus=max(0, held.gpus - ours.gpus),
        )

    def _node_id(self, name: str) -> NodeId:
        return NodeId(f"node_{self._site_id}_{name}")

    # ------------------------------------------------------------------ names

    def _folder(self, launch_id: str) -> LaunchFolder:
        if not _NAME.fullmatch(launch_id):
            raise EngineRefused(f"{launch_id!r} cannot be the name of a folder")
        return LaunchFolder(self._launches / launch_id)

    def _name(self, launch_id: str) -> str:
        """What the Slurm job of a launch is called: a gang's is called after its first rank."""
        spec = read_json(self._folder(launch_id).spec) or {}
        return f"tidemill-{_sibling(launch_id, 0) if spec.get('gang') else launch_id}"

    def _folder_of(self, name: str) -> LaunchFolder | None:
        folder = LaunchFolder(self._launches / name.removeprefix("tidemill-"))
        return folder if name.startswith("tidemill-") and folder.path.exists() else None


def _port(settings: SlurmSettings) -> SlurmPort:
    if not settings.rest:
        return SlurmCommands()
    return SlurmRest(settings.rest, user=settings.rest_user, token_file=settings.rest_token)


def _record(ended: Ending | None, spec: Mapping[str, Any]) -> dict[str, Any]:
    """What is written down of a launch that is gone: when that was seen, and all that Slurm says of it."""
    seen: dict[str, Any] = {"ended_ns": time.time_ns()}
    if ended is None:
        return {**seen, "detail": "its Slurm job is not known to Slurm any more"}
    cause = ended.cause(is_limited=bool(spec.get("max_duration_ns")))
    seen |= {"detail": f"its Slurm job {ended}", "exit_code": ended.exit_code, "cause": cause.value}
    return {**seen, "cpu_used_ns": ended.cpu_used_ns or 0, "scheduler": dict(ended.words())}


def _as_recorded(gone: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an observation that were written down; those of an older version are fewer."""
    code = gone.get("exit_code")
    return {
        "detail": str(gone["detail"]),
        "ended_ns": int(gone["ended_ns"]),
        "exit_code": None if code is None else int(code),
        "cause": str(gone.get("cause") or ""),
        "cpu_used_ns": int(gone.get("cpu_used_ns") or 0),
        "scheduler": tuple((str(name), str(value)) for name, value in (gone.get("scheduler") or {}).items()),
    }


def _sibling(launch_id: str, rank: int) -> LaunchId:
    """The launch of another rank of the same attempt."""
    return LaunchId(f"{launch_id.rpartition('-')[0]}-{rank}")
