"""Slurm through its commands: ``sbatch``, ``scancel``, ``squeue``, ``scontrol``, ``sacct``, each a short process.

Source: slurm-wlm 22.05; https://slurm.schedmd.com/man_index.html.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final

from tidemill.engines.slurmending import SACCT_FIELDS, Ending, of_sacct, of_scontrol
from tidemill.engines.slurmport import Held, SlurmJob, SlurmNode, Submission, gpus_of, surroundings
from tidemill.errors import EngineLost, EngineRefused

_FORM: Final = "%A|%T|%N|%C|%D|%m|%b|%r|%j"
_ASKED_S: Final = 30.0
_UNKNOWN_JOB: Final = "Invalid job id specified"
_OVER: Final = ("", _UNKNOWN_JOB)
"""What scancel says of a job that has ended: nothing while Slurm clears up after it, later that it knows none."""
_UNREACHABLE: Final = ("Unable to contact slurm controller", "Connection refused", "timed out", "Socket timed out")


class SlurmCommands:
    """The cluster that this machine submits to, as the user that this process runs as."""

    warns_steps_only = False

    def submit(self, submission: Submission) -> str:
        answer = self._ask("sbatch", *_words(submission), input_text=submission.script)
        return answer.strip().partition(";")[0]

    def cancel(self, job: str) -> None:
        self._ask("scancel", job, ignored=_OVER)

    def terminate(self, job: str) -> None:
        self._ask("scancel", "--batch", "--signal=TERM", job, ignored=_OVER)

    def jobs(self, name: str = "") -> tuple[SlurmJob, ...]:
        options = [f"--name={name}"] if name else []
        lines = self._ask("squeue", "-h", "-a", "--me", "-t", "all", "-o", _FORM, *options).splitlines()
        return tuple(_job(line) for line in lines)

    def nodes(self) -> tuple[SlurmNode, ...]:
        lines = self._ask("scontrol", "--oneliner", "--details", "show", "node").splitlines()
        said = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return tuple(_node(each) for each in said if each.get("NodeName"))

    def ended(self, job: str, name: str) -> Ending | None:
        try:
            return of_scontrol(self._ask("scontrol", "--oneliner", "show", "job", job), name)
        except EngineLost as error:
            if not error.detail.endswith(_UNKNOWN_JOB):  # it did not answer: that is no news of the job
                raise
        return None

    def accounted(self, job: str, name: str) -> Ending | None:
        with suppress(EngineLost, EngineRefused):
            words = ("-X", "-n", "-P", "-j", job, f"--format={SACCT_FIELDS}")
            return of_sacct(self._ask("sacct", *words), job, name)
        return None

    def close(self) -> None:
        """Nothing is held."""

    def _ask(self, *command: str, input_text: str | None = None, ignored: tuple[str, ...] = ()) -> str:
        """What the command printed. Raises: EngineLost, EngineRefused as Slurm says, but for reasons ``ignored``."""
        try:
            done = subprocess.run(
                command, input=input_text, env=surroundings(), capture_output=True, text=True,
                timeout=_ASKED_S, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise EngineRefused(
                f"{command[0]} is not installed here.", field="engine", value="slurm",
                mend="Run the outpost where jobs are submitted from, or use slurmrestd: --slurm rest=….",
            ) from None  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EngineLost(f"{command[0]} did not answer within {_ASKED_S:g} s") from None
        said = done.stderr.strip().removeprefix(f"{command[0]}: error: ")
        if not done.returncode or (done.returncode > 0 and said.rpartition(": ")[2] in ignored):
            return done.stdout
        if command[0] != "sbatch" or any(sign in said for sign in _UNREACHABLE):
            raise EngineLost(f"{command[0]}: {said}")
        raise EngineRefused(
            f"Slurm refused it: {said}", field="slurm", mend="See the site's partition, account and qos."
        )


def _words(job: Submission) -> Iterator[str]:
    yield from ("--parsable", f"--job-name={job.name}", f"--comment={job.comment}", "--no-requeue", "--export=ALL")
    yield from (f"--nodes={job.nodes}", "--ntasks-per-node=1", "--output=/dev/null", f"--chdir={job.folder}")
    yield f"--cpus-per-task={job.cpus}"
    if job.memory_mib:
        yield f"--mem={job.memory_mib}M"
    if job.gpus:
        yield f"--gres=gpu:{job.gpu_kind}{':' if job.gpu_kind else ''}{job.gpus}"
    if job.minutes:
        yield f"--time={job.minutes}"
    if job.warning_s:
        yield f"--signal=B:TERM@{job.warning_s}"
    for option, value in job.options:
        yield f"--{option}={value}"


def _job(line: str) -> SlurmJob:
    number, state, nodes, cpus, count, memory, gres, reason, name = line.split("|", 8)
    return SlurmJob(
        id=number, name=name, state=state, reason=reason, nodes=nodes, node_count=max(1, int(count)),
        cpus=int(cpus), memory_bytes=_memory(memory), gpus=gpus_of(gres),
    )  # fmt: skip


def _node(said: Mapping[str, str]) -> SlurmNode:
    return SlurmNode(
        name=said["NodeName"],
        states=frozenset(said.get("State", "UNKNOWN").replace("*", "+NO_RESPOND").split("+")),
        partitions=tuple(name for name in said.get("Partitions", "").split(",") if name),
        address=said.get("NodeAddr", said["NodeName"]),
        boot=said.get("BootTime", ""),
        cpus=int(said.get("CPUTot", "1")),
        memory_mib=int(said.get("RealMemory", "1")),
        disk_mib=int(said.get("TmpDisk", "0")),
        gres=said.get("Gres", ""),
        held=Held(
            cpus=int(said.get("CPUAlloc", "0")),
            memory_bytes=int(said.get("AllocMem", "0")) * 2**20,
            gpus=gpus_of(said.get("GresUsed", "")),
        ),
    )


def _memory(text: str) -> int:
    units: dict[str, int] = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.fullmatch(r"([\d.]+)([KMGT]?)[nc]?", text)
    return int(float(found[1]) * units.get(found[2], 2**20)) if found else 0
