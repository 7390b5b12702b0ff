"""How Slurm says that a job ended: read from ``scontrol`` while slurmctld knows the job, from ``sacct`` later.

A runner tells itself how its worker ended. This is for those that could not: their node died, or Slurm killed them. An
exit code is ``CODE:SIGNAL`` in Slurm; here it is as shells have it, 128 and the signal for what a signal ended.
Source: slurm-wlm 22.05; https://slurm.schedmd.com/job_exit_code.html, https://slurm.schedmd.com/squeue.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tidemill.model.job import Cause
from tidemill.units import SECOND_NS

SACCT_FIELDS: Final = "JobName,State,ExitCode,ElapsedRaw,TotalCPU,NodeList"
_SIGNAL_BASE: Final = 128
_KILLED: Final = _SIGNAL_BASE + 9
_OUT_OF_MEMORY: Final = "OUT_OF_MEMORY"
_CAUSES: Final = {_OUT_OF_MEMORY: Cause.OUT_OF_MEMORY, "PREEMPTED": Cause.PREEMPTED}
_TIMES: Final = ("TIMEOUT", "DEADLINE")
_NOTHING: Final = ("", "None", "(null)", "None assigned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A job's end. ``code`` is Slurm's ``CODE:SIGNAL``, ``nodes`` is as Slurm writes lists of nodes: ``n[1-3,7]``.

    ``ran_s`` and ``cpu_used_ns`` are None where they were not told.
    """

    job: str
    state: str
    code: str
    nodes: str = ""
    reason: str = ""
    ran_s: int | None = None
    cpu_used_ns: int | None = None

    @property
    def exit_code(self) -> int | None:
        """As a shell has it; None when the job itself has none, as after its node died."""
        if self.state == _OUT_OF_MEMORY:  # Slurm puts a number there that is no signal
            return _KILLED
        code, _, signal = self.code.partition(":")
        if signal.isdigit() and int(signal):
            return _SIGNAL_BASE + int(signal)
        return int(code) if code.isdigit() and int(code) else None

    def cause(self, *, is_limited: bool) -> Cause:
        """Why the worker is gone. ``is_limited``: the spec says how long it may take, and Slurm was told."""
        if self.state in _TIMES and is_limited:
            return Cause.TIMED_OUT
        return _CAUSES.get(self.state, Cause.NODE_LOST)

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else ""
        why = f": {self.reason}" if self.reason else ""
        return f"ended as {self.state.lower()} with exit code {self.code}{where}{why}"

    def words(self) -> tuple[tuple[str, str], ...]:
        """Name and value of all that is known."""
        found = {"name": "slurm", "job": self.job, "state": self.state, "exit": self.code, "nodes": self.nodes}
        found |= {"reason": self.reason, "ran_s": "" if self.ran_s is None else str(self.ran_s)}
        return tuple((name, value) for name, value in found.items() if value)


def of_scontrol(line: str, name: str) -> Ending | None:
    """The end of the job of that name, from ``scontrol --oneliner show job``; None when the line is of another job."""
    said = dict(word.split("=", 1) for word in line.split() if "=" in word)
    if said.get("JobName") != name or "JobState" not in said:
        return None
    return Ending(
        job=said.get("JobId", ""), state=said["JobState"], code=said.get("ExitCode", "0:0"),
        nodes=_told(said.get("NodeList", "")), reason=_told(said.get("Reason", "")),
        ran_s=_seconds(said.get("RunTime", "")),
    )  # fmt: skip


def of_sacct(lines: str, job: str, name: str) -> Ending | None:
    """The end of the job of that name, from ``sacct -X -n -P`` with ``SACCT_FIELDS``; None when it is not among them.

    Numbers of jobs are given anew when slurmctld has lost its state, so the name has to be the job's, too.
    """
    for known, state, code, ran, used, nodes in _fields(lines):
        if known == name:
            cpu_s = _seconds(used)
            return Ending(
                job=job, state=state.split()[0] if state.split() else "", code=code, nodes=_told(nodes),
                ran_s=int(ran) if ran.isdigit() else None, cpu_used_ns=None if cpu_s is None else cpu_s * SECOND_NS,
            )  # fmt: skip
    return None


def _fields(lines: str) -> Iterator[list[str]]:
    count = SACCT_FIELDS.count(",")
    for line in lines.splitlines():
        if line.count("|") >= count:
            yield line.rsplit("|", count)


def _told(value: str) -> str:
    return "" if value in _NOTHING else value


def _seconds(text: str) -> int | None:
    """The whole seconds of ``[DAYS-][HOURS:]MINUTES:SECONDS[.PART]``; None for something else."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)(?:\.\d+)?", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
