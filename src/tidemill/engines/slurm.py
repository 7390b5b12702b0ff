"""The engine of centres that keep Slurm: Tidemill admits, budgets and routes; Slurm places, and starts the runner.

Each launch is an ``sbatch`` job of its own, a gang one job of as many nodes: all or nothing is Slurm's then. What it
knows is in ``launches/``, on a file system that the nodes share, and in Slurm's own lists:

=============================================  ==========================================================
the runner holds the launch's lock             ALIVE
``exit.json``                                  EXITED
Slurm has the job, waiting or running          ALIVE, with Slurm's reason
Slurm ended the job, or has it no more         GONE, with how Slurm says that it ended: state, exit code, nodes
written down, and Slurm never had the job      not carried out: no observation
stopped before it was launched                 GONE; the folder stays, so that a late launch finds it
=============================================  ==========================================================

``sbatch`` is not idempotent and its answer can be lost, so a job bears the name of its launch, and is looked for by
that name before it is submitted again. Should Slurm have two of them all the same, the first to run is the one.
Source: slurm-wlm 22.05; https://slurm.schedmd.com.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from tidemill import catalog
from tidemill.engines.slurmending import SACCT_FIELDS, Ending, of_sacct, of_scontrol
from tidemill.errors import Conflict, EngineLost, EngineRefused
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, LaunchId, NodeId, SiteId
from tidemill.model.plan import LaunchSpec, Observation, ObservedState, Sight
from tidemill.ports import EngineCapabilities
from tidemill.runner import processes
from tidemill.runner.folders import LaunchFolder, read_json, write_json
from tidemill.units import MILLI, MINUTE_NS, SECOND_NS

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_GRES: Final = re.compile(r"gpu(?::(?P<type>[^:()=,]+))?[:=](?P<count>\d+)")
_FORM: Final = "%A|%T|%N|%C|%D|%m|%b|%r|%j"
_ASKED_S: Final = 30.0
_SOURCE: Final = Path(__file__).parents[2]
_START: Final = "import sys; sys.path.append(sys.argv.pop(1)); from tidemill.runner.slurmstep import main; main()"
_RECORD: Final = "slurm.json"
"""In a launch's folder: Slurm's number of its job, empty while it is not known whether there is one."""
_LIVE: Final = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING"})
_AWAY: Final = frozenset({"DOWN", "FAIL", "NO_RESPOND", "NOT_RESPONDING"})
_NEVER_THERE: Final = frozenset({"UNKNOWN", "FUTURE"})
_HOLDING: Final = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT"})
_AT_ONCE: Final = 16
_MARGIN_NS: Final = 2 * MINUTE_NS
_BACKSTOP_S: Final = 10.0
_KEPT: Final = ("PATH", "LD_LIBRARY_PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF", "SLURM_CLUSTERS")
_UNKNOWN_JOB: Final = "Invalid job id specified"
_UNREACHABLE: Final = ("Unable to contact slurm controller", "Connection refused", "timed out", "Socket timed out")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSettings:
    """How jobs are submitted that say nothing else: empty words are left to Slurm's own defaults.

    Of the nodes those are known that are in a ``partition`` of the list, with commas; all of them without.
    ``linger_ns`` and ``beat_ns`` are the runner's. ``python`` is the interpreter on the nodes; this one's unless given.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    python: str = ""
    linger_ns: int = 24 * 3600 * SECOND_NS
    beat_ns: int = 2 * SECOND_NS
    spool_cap_bytes: int = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A job as ``squeue`` lists it: what it holds in all (CPUs) and on each node (bytes, GPUs), if it has nodes."""

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    node_count: int
    cpus: int
    memory_bytes: int
    gpus: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What jobs hold of a node."""

    cpus: int = 0
    memory_bytes: int = 0
    gpus: int = 0

    def __add__(self, other: _Held) -> _Held:
        return _Held(
            cpus=self.cpus + other.cpus,
            memory_bytes=self.memory_bytes + other.memory_bytes,
            gpus=self.gpus + other.gpus,
        )


class SlurmEngine:
    """Starts workers through ``sbatch`` of the cluster that this machine submits to. Keeps the contract of engines.

    ``root`` is a folder that the nodes share, this engine's and nobody else's. ``endpoint_file`` tells runners where
    the control plane is. Raises, from its methods: EngineLost when Slurm does not answer.
    """

    def __init__(
        self, root: Path, *, site_id: SiteId, endpoint_file: Path, settings: SlurmSettings | None = None
    ) -> None:
        self.root = root.resolve()
        self._site_id = site_id
        self._endpoint_file = endpoint_file
        self._settings = settings or SlurmSettings()
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
        except OSError as error:
            raise EngineLost(f"the launch could not be written down: {error.strerror}: {error.filename}") from error
        ranks = range(len(spec.gang))
        gang = [self._folder(_sibling(spec.launch_id, rank)) for rank in ranks] or [folder]
        if all(one.spec.exists() for one in gang):
            with self._submitting[crc32(gang[0].path.name.encode()) % len(self._submitting)]:
                self._submit(spec, gang)

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
        for job in self._jobs_named(self._name(launch_id)):
            since_s = (time.time_ns() - int((read_json(folder.stop) or {}).get("at_ns", 0))) / SECOND_NS
            if job.state == "PENDING" or (not grace_ns and since_s > _BACKSTOP_S):
                self._ask("scancel", job.id)
            elif job.state in _LIVE:
                self._ask("scancel", "--batch", "--signal=TERM", job.id)

    def observe(self) -> Sight:
        """Every launch that it has not forgotten, from its folders and Slurm's list."""
        if not self._nodes:
            self.nodes()
        listed = {job.name: job for job in self._jobs()}
        folders = [LaunchFolder(path) for path in sorted(self._launches.iterdir()) if not path.name.startswith(".")]
        seen = [found for folder in folders if (found := self._look(folder, lambda: listed)) is not None]
        return Sight(nodes=self._nodes, launches=tuple(seen))

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:  # noqa: ARG002 - ids are enough
        """Drop what is kept of a launch that is gone. Raises: Conflict while anything of it lives."""
        folder = self._folder(launch_id)
        if not folder.path.exists():
            return
        seen = self._look(folder, lambda: {job.name: job for job in self._jobs()})
        if seen is not None and seen.state is ObservedState.ALIVE:
            raise Conflict(f"{launch_id} still runs")
        doomed = self._launches / f".forgotten-{launch_id}-{time.monotonic_ns()}"
        with suppress(FileNotFoundError):
            folder.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def close(self) -> None:
        """Let go without touching what runs."""

    # ------------------------------------------------------------------ submitting

    def _submit(self, spec: LaunchSpec, gang: Sequence[LaunchFolder]) -> None:
        """Have the gang's job submitted, once: that it may have been is on the disk before it is."""
        name = self._name(spec.launch_id)
        record = gang[0].path / _RECORD
        if (before := read_json(record)) is not None:
            if before["job"]:
                return
            if known := self._jobs_named(name):
                write_json(record, {"job": known[0].id, "name": name})
                return
        write_json(record, {"job": "", "name": name}, durable=True)
        command = [self._settings.python or sys.executable, "-I", "-S", "-c", _START]
        words = [*command, str(_SOURCE), *(str(folder.path) for folder in gang)]
        if len(gang) > 1:
            words = [
                "srun",
                f"--nodes={len(gang)}",
                f"--ntasks={len(gang)}",
                "--overlap",
                "--kill-on-bad-exit=0",
                *words,
            ]
        script = "#!/bin/sh\nexec " + shlex.join(words) + "\n"
        answer = self._ask("sbatch", *self._options(spec, name, len(gang)), input_text=script)
        write_json(record, {"job": answer.strip().partition(";")[0], "name": name})

    def _options(self, spec: LaunchSpec, name: str, nodes: int) -> Iterator[str]:
        yield from ("--parsable", f"--job-name={name}", f"--comment={spec.job_id}", "--no-requeue", "--export=ALL")
        yield from (f"--nodes={nodes}", "--ntasks-per-node=1", "--output=/dev/null", f"--chdir={self.root}")
        yield f"--cpus-per-task={max(1, math.ceil(spec.cpu_milli / MILLI))}"
        if spec.memory_bytes:
            yield f"--mem={math.ceil(spec.memory_bytes / 2**20)}M"
        if spec.devices:
            kinds = {device.split("/")[1] for device, _ in spec.devices if device.count("/") == 2}
            kind = f"{kinds.pop()}:" if len(kinds) == 1 and kinds != {""} else ""
            yield f"--gres=gpu:{kind}{len(spec.devices)}"
        if spec.max_duration_ns:
            yield f"--time={math.ceil((spec.max_duration_ns + spec.grace_ns + _MARGIN_NS) / MINUTE_NS)}"
        if spec.grace_ns:
            yield f"--signal=B:TERM@{math.ceil(spec.grace_ns / SECOND_NS)}"
        asked = dict(spec.slurm)
        for option in ("partition", "account", "qos", "reservation", "constraint"):
            if value := asked.get(option) or getattr(self._settings, option):
                yield f"--{option}={value}"

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

    def _look(self, folder: LaunchFolder, jobs: Callable[[], dict[str, _Job]]) -> Observation | None:
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
        if job is not None and job.state in _LIVE:
            return seen(ObservedState.ALIVE, detail=f"Slurm job {job.id} is {job.state.lower()} ({job.reason})")
        first = self._folder(_sibling(launch_id, 0)) if spec.get("gang") else folder
        number = str((read_json(first.path / _RECORD) or {}).get("job", ""))
        if job is None and not number:
            return None
        if job is None and any(one.state in _LIVE for one in self._jobs_named(name)):  # since the list was asked for
            return seen(ObservedState.ALIVE)
        record = _record(self._ending(job.id if job is not None else number, name), spec)
        with suppress(OSError):
            folder.claim()  # no runner may begin on it any more
            write_json(folder.gone, record)
        return seen(ObservedState.GONE, **_as_recorded(record))

    def _ending(self, number: str, name: str) -> Ending | None:
        """How the job ended: of slurmctld, or when that has forgotten it of the accounting, if there is one."""
        try:
            if ended := of_scontrol(self._ask("scontrol", "--oneliner", "show", "job", number), name):
                return ended
        except EngineLost as error:
            if not error.detail.endswith(_UNKNOWN_JOB):  # it did not answer: that is no news of the job
                raise
        with suppress(EngineLost, EngineRefused):
            words = ("-X", "-n", "-P", "-j", number, f"--format={SACCT_FIELDS}")
            return of_sacct(self._ask("sacct", *words), number, name)
        return None

    def _jobs(self) -> tuple[_Job, ...]:
        return tuple(self._listed())

    def _jobs_named(self, name: str) -> list[_Job]:
        return list(self._listed(f"--name={name}"))

    def _listed(self, *options: str) -> Iterator[_Job]:
        """Our user's jobs, those that ended a moment ago among them."""
        for line in self._ask("squeue", "-h", "-a", "--me", "-t", "all", "-o", _FORM, *options).splitlines():
            number, state, nodes, cpus, count, memory, gres, reason, name = line.split("|", 8)
            yield _Job(
                id=number, name=name, state=state, reason=reason, nodes=nodes, node_count=max(1, int(count)),
                cpus=int(cpus), memory_bytes=_memory(memory), gpus=_gpus(gres),
            )  # fmt: skip

    def _held_by_us(self) -> dict[str, _Held]:
        """What our launches hold, by Slurm's name of the node."""
        held: dict[str, _Held] = {}
        for job in self._jobs():
            if job.state not in _HOLDING or not job.nodes or self._folder_of(job.name) is None:
                continue
            share = _Held(cpus=job.cpus // job.node_count, memory_bytes=job.memory_bytes, gpus=job.gpus)
            for name in self._names(job.nodes):
                held[name] = held.get(name, _Held()) + share
        return held

    def _names(self, nodes: str) -> list[str]:
        """The nodes of a list as Slurm writes it: ``n[1-3,7]``."""
        return self._ask("scontrol", "show", "hostnames", nodes).split() if set(nodes) & set("[,") else [nodes]

    def _list_nodes(self, ours: dict[str, _Held]) -> Iterator[Node]:
        for line in self._ask("scontrol", "--oneliner", "--details", "show", "node").splitlines():
            said = dict(word.split("=", 1) for word in line.split() if "=" in word)
            states = set(said.get("State", "UNKNOWN").replace("*", "+NO_RESPOND").split("+"))
            if not said.get("NodeName") or states & _NEVER_THERE or not self._is_ours(_partitions(said)):
                continue
            taint = "slurm=down" if states & _AWAY else "slurm=draining" if "DRAIN" in states else ""
            yield self._node(said, ours.get(said["NodeName"], _Held()), (taint,) if taint else ())

    def _is_ours(self, partitions: Sequence[str]) -> bool:
        """Whether jobs of ours may come to a node of these partitions."""
        wanted = {name for name in self._settings.partition.split(",") if name}
        return not wanted or not wanted.isdisjoint(partitions)

    def _node(self, said: dict[str, str], ours: _Held, taints: tuple[str, ...]) -> Node:
        """A node as ``scontrol`` tells of it. The type of its gres is taken for the first model that answers to it."""
        held = _Held(
            cpus=int(said.get("CPUAlloc", "0")),
            memory_bytes=int(said.get("AllocMem", "0")) * 2**20,
            gpus=_gpus(said.get("GresUsed", "")),
        )
        name = said["NodeName"]
        devices: list[Device] = []
        for found in _GRES.finditer(said.get("Gres", "")):
            kind = found["type"] or ""
            spec = next((one for one in catalog.devices() if catalog.matches_request(one.model, kind)), None)
            spec = spec or catalog.derived_device(kind or "gpu", 0, power_mw=0)
            devices += [
                Device(
                    id=DeviceId(f"{name}/{kind}/{index}"),
                    index=index,
                    model=spec.model,
                    reported=kind,
                    memory_bytes=spec.memory_bytes,
                    idle_mw=spec.idle_mw,
                    busy_mw=spec.busy_mw,
                )
                for index in range(len(devices), len(devices) + int(found["count"]))
            ]
        return Node(
            id=self._node_id(name),
            site_id=self._site_id,
            name=name,
            state=NodeState.READY,
            version=1,
            boot_id=said.get("BootTime", ""),
            address=said.get("NodeAddr", name),
            cpu_milli=int(said.get("CPUTot", "1")) * MILLI,
            memory_bytes=max(1, int(said.get("RealMemory", "1"))) * 2**20,
            disk_bytes=int(said.get("TmpDisk", "0")) * 2**20,
            devices=tuple(devices),
            labels=(("partition", "|".join(partitions)),) if (partitions := _partitions(said)) else (),
            taints=taints,
            others_cpu_milli=max(0, held.cpus - ours.cpus) * MILLI,
            others_memory_bytes=max(0, held.memory_bytes - ours.memory_bytes),
            others_gpus=max(0, held.gpus - ours.gpus),
        )

    def _node_id(self, name: str) -> NodeId:
        return NodeId(f"node_{self._site_id}_{name}")

    # ------------------------------------------------------------------ names and calls

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

    def _ask(self, *command: str, input_text: str | None = None) -> str:
        """What the command printed. Raises: EngineLost, EngineRefused as Slurm says."""
        try:
            done = subprocess.run(
                command, input=input_text, env=_surroundings(), capture_output=True, text=True, timeout=_ASKED_S,
                check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise EngineRefused(
                f"{command[0]} is not installed here.", field="engine", value="slurm",
                mend="Run the outpost where jobs are submitted from.",
            ) from None  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EngineLost(f"{command[0]} did not answer within {_ASKED_S:g} s") from None
        said = done.stderr.strip().removeprefix(f"{command[0]}: error: ")
        if not done.returncode:
            return done.stdout
        if command[0] != "sbatch" or any(sign in said for sign in _UNREACHABLE):
            raise EngineLost(f"{command[0]}: {said}")
        raise EngineRefused(
            f"Slurm refused it: {said}", field="slurm", mend="See the site's partition, account and qos."
        )


def _surroundings() -> dict[str, str]:
    """The variables of Slurm's commands, which are also those of our jobs' scripts: nobody's habits are among them.

    ``--export=NONE`` would do the latter too, and have slurmd run a login shell first, which takes a second or more.
    """
    return {name: value for name in _KEPT if (value := os.environ.get(name))}


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


def _partitions(said: Mapping[str, str]) -> list[str]:
    """The partitions that a node is in, as ``scontrol`` tells of it."""
    return [name for name in said.get("Partitions", "").split(",") if name]


def _gpus(text: str) -> int:
    """How many GPUs a list of gres has: ``gpu:h100:2(IDX:0-1)``, ``gres:gpu:2``."""
    return sum(int(found["count"]) for found in _GRES.finditer(text))


def _memory(text: str) -> int:
    units: dict[str, int] = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.fullmatch(r"([\d.]+)([KMGT]?)[nc]?", text)
    return int(float(found[1]) * units.get(found[2], 2**20)) if found else 0
