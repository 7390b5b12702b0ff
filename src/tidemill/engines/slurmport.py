"""What the engine asks of Slurm, and what it is told: the same through Slurm's commands and through slurmrestd.

Source: slurm-wlm 22.05; https://slurm.schedmd.com.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, Protocol

from tidemill.engines.slurmending import Ending

OPTIONS: Final = ("partition", "account", "qos", "reservation", "constraint")
"""What a job may be told beside its resources, as Slurm's commands name it."""
LIVE: Final = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING"})
_KEPT: Final = ("PATH", "LD_LIBRARY_PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF", "SLURM_CLUSTERS")
_GRES: Final = re.compile(r"gpu(?::(?P<type>[^:()=,]+))?[:=](?P<count>\d+)")
_PIECE: Final = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
_PART: Final = re.compile(r"\[(?P<ranges>[^\]]*)\]|(?P<text>[^\[\]]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A batch job. Of each of its nodes: ``cpus``, ``memory_mib`` and ``gpus``. Zero leaves it to Slurm.

    ``warning_s`` is how long before its time limit SIGTERM comes to the batch script, or to its steps where the port
    ``warns_steps_only``. ``options`` are some of ``OPTIONS`` with their values. Its variables are ``surroundings()``.
    """

    name: str
    comment: str
    script: str
    folder: str
    nodes: int
    cpus: int
    memory_mib: int = 0
    gpus: int = 0
    gpu_kind: str = ""
    minutes: int = 0
    warning_s: int = 0
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What jobs hold of a node."""

    cpus: int = 0
    memory_bytes: int = 0
    gpus: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(
            cpus=self.cpus + other.cpus,
            memory_bytes=self.memory_bytes + other.memory_bytes,
            gpus=self.gpus + other.gpus,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """A job in Slurm's list: what it holds in all (CPUs) and on each node (bytes, GPUs), if it has nodes.

    ``state`` is one word, as ``squeue`` has it. ``nodes`` is as Slurm writes lists of nodes: ``n[1-3,7]``.
    """

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    node_count: int
    cpus: int
    memory_bytes: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmNode:
    """A node in Slurm's list. ``states`` are all words that Slurm has for it; ``boot`` changes when it boots."""

    name: str
    states: frozenset[str]
    partitions: tuple[str, ...]
    address: str
    boot: str
    cpus: int
    memory_mib: int
    disk_mib: int
    gres: str
    held: Held


class SlurmPort(Protocol):
    """One way to a cluster, as the user whose jobs they are. Raises, from all: EngineLost when there is no answer."""

    @property
    def warns_steps_only(self) -> bool:
        """Whether the warning before a job's time limit reaches its steps, and not its batch script."""
        ...

    def submit(self, submission: Submission) -> str:
        """Slurm's number of the new job. Raises: EngineRefused with Slurm's words."""
        ...

    def cancel(self, job: str) -> None:
        """Have Slurm end the job."""
        ...

    def terminate(self, job: str) -> None:
        """Have SIGTERM sent to its batch script, or nothing where that alone cannot be signalled."""
        ...

    def jobs(self, name: str = "") -> tuple[SlurmJob, ...]:
        """The user's jobs, of that name if one is given; those that ended a moment ago are among them."""
        ...

    def nodes(self) -> tuple[SlurmNode, ...]:
        """All of the cluster's nodes."""
        ...

    def ended(self, job: str, name: str) -> Ending | None:
        """How the job ended, from slurmctld; None when it does not know it, or the number is another job's by now."""
        ...

    def accounted(self, job: str, name: str) -> Ending | None:
        """How the job ended, from the accounting; None where there is none, or the job is not in it."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


def surroundings() -> dict[str, str]:
    """The variables of Slurm's commands, which are also those of our jobs' scripts: nobody's habits are among them.

    ``--export=NONE`` would do the latter too, and have slurmd run a login shell first, which takes a second or more.
    """
    return {name: value for name in _KEPT if (value := os.environ.get(name))}


def host_names(nodes: str) -> list[str]:
    """The nodes of a list as Slurm writes it: ``n[01-03,7],m1``; of several ranges in one name the last runs first."""
    found: list[str] = []
    for piece in _PIECE.findall(nodes):
        parts = [
            list(_ranges(part["ranges"])) if part["text"] is None else [part["text"]] for part in _PART.finditer(piece)
        ]
        found += ["".join(each) for each in product(*parts)]
    return found


def gpus_of(text: str) -> int:
    """How many GPUs a list of gres has: ``gpu:h100:2(IDX:0-1)``, ``gres:gpu:2``, ``gres/gpu=2``."""
    return sum(count for _, count in gpu_kinds(text))


def gpu_kinds(text: str) -> Iterator[tuple[str, int]]:
    """Type and number of the GPUs in a list of gres; the type is empty where there is none."""
    for found in _GRES.finditer(text):
        yield found["type"] or "", int(found["count"])


def _ranges(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))
