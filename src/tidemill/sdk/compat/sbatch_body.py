"""What an sbatch script runs: its interpreter, the steps that it starts with srun, and how it becomes ``run``.

Slurm runs a batch script once, on the first node, and ``srun`` starts the tasks. Tidemill runs ``run`` once in each
worker. So a script with one task, or with all of them on one node, is run as it is in one worker. A script for several
tasks is run in each of them when it starts them by one ``srun`` and only prepares otherwise; then ``srun COMMAND`` is
COMMAND in each worker. Anything else cannot be told apart from work that must happen once, and is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tidemill.sdk.compat.mapping import AS_BASH
from tidemill.sdk.compat.sbatch_values import Indices

_SHELLS: Final = ("bash", "sh", "dash", "ksh", "zsh")
_STEP: Final = re.compile(r"(?:^|[;&|({]\s*|\b(?:time|exec|then|do|else)\s+)(?:\w+=\S*\s+)*srun\b")
_LAUNCHER: Final = re.compile(r"(?:^|[;&|({]\s*|\b(?:time|exec)\s+)(mpirun|mpiexec|prun)\b")
_ASSIGNMENT: Final = re.compile(r"(?:export\s+|declare\s+-x\s+)?[A-Za-z_][A-Za-z0-9_]*\+?=")
_PREPARES: Final = frozenset(
    (
        "export",
        "source",
        ".",
        "module",
        "ml",
        "cd",
        "echo",
        "printf",
        "set",
        "shopt",
        "ulimit",
        "umask",
        "conda",
        "mamba",
        "micromamba",
        "unset",
        "nvidia-smi",
        "hostname",
        "date",
        "env",
        "printenv",
        "pwd",
        "which",
        "command",
        "true",
        ":",
        "wait",
        "lscpu",
        "free",
        "df",
        "nproc",
        "uname",
        "scontrol",
        "sleep",
        "eval",
        "trap",
        "deactivate",
        "time",
        "mkdir",
    )
)
_SRUN_FLAGS: Final = (
    "label",
    "unbuffered",
    "exact",
    "exclusive",
    "overlap",
    "overcommit",
    "quiet",
    "verbose",
    "no-kill",
    "kill-on-bad-exit",
    "disable-status",
    "oversubscribe",
    "whole",
)
_SRUN_VALUES: Final = frozenset(
    (
        "mpi",
        "cpu-bind",
        "cpu_bind",
        "gpu-bind",
        "mem-bind",
        "mem_bind",
        "accel-bind",
        "cpus-per-task",
        "ntasks-per-node",
        "gpus-per-task",
        "gpus-per-node",
        "gpus",
        "gres",
        "mem",
        "mem-per-cpu",
        "jobid",
        "job-name",
        "wait",
        "time",
        "distribution",
        "hint",
        "export",
        "cpus-per-gpu",
        "threads-per-core",
        "ntasks",
        "nodes",
        "kill-on-bad-exit",
        "exclusive",
        "tres-per-task",
        "ntasks-per-gpu",
    )
)
_SRUN_SHORT: Final = {
    "n": "ntasks",
    "N": "nodes",
    "c": "cpus-per-task",
    "l": "label",
    "u": "unbuffered",
    "K": "kill-on-bad-exit",
    "J": "job-name",
    "W": "wait",
    "t": "time",
    "m": "distribution",
    "O": "overcommit",
    "Q": "quiet",
    "v": "verbose",
    "G": "gpus",
    "s": "oversubscribe",
}
_SHOWS: Final = frozenset(
    ("echo", "printf", "hostname", "date", "nvidia-smi", "env", "printenv", "lscpu", "uname", "df", "free")
)
_SAME: Final = frozenset(
    (
        "scontrol",
        "echo",
        "printf",
        "pwd",
        "head",
        "tail",
        "cut",
        "sed",
        "awk",
        "tr",
        "wc",
        "sort",
        "uniq",
        "expr",
        "basename",
        "dirname",
        "realpath",
        "readlink",
        "cat",
        "grep",
        "which",
        "seq",
        "bc",
        "id",
        "whoami",
        "command",
        "nproc",
        "xargs",
        "paste",
        "rev",
    )
)
"""Commands that say the same in every worker of a job."""
_SUBSTITUTION: Final = re.compile(r"\$\((?!\()([^()]*)\)|`([^`]*)`")
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"")
_SEPARATOR: Final = re.compile(r"&&|;|\|\||\|")
_RANDOM: Final = re.compile(
    r"\$\{?(?:RANDOM|SRANDOM|HOSTNAME|BASHPID|PPID|EPOCH\w+|SECONDS)\b|\bRANDOM\b|\$\$|/dev/u?random"
)
_END: Final = "END_OF_BATCH_SCRIPT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A line with srun: the tasks and nodes that it asks for (zero: does not say) and options that are not known."""

    line: int
    words: str
    tasks: int
    nodes: int
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A batch script. ``interpreter`` is what its first line names; ``other`` are lines that do more than
    prepare, ``modules`` those that call environment modules."""

    text: str
    interpreter: tuple[str, ...]
    steps: tuple[Step, ...]
    launchers: tuple[tuple[int, str], ...]
    other: tuple[tuple[int, str], ...]
    modules: tuple[tuple[int, str], ...] = ()

    @property
    def is_shell(self) -> bool:
        """Whether a shell runs it."""
        return self.interpreter[-1:] != () and any(word.rpartition("/")[2] in _SHELLS for word in self.interpreter[:2])

    @property
    def is_plain(self) -> bool:
        """Whether bash or sh runs it, without options."""
        words = self.interpreter[1:] if self.interpreter[0].endswith("/env") else self.interpreter
        return len(words) == 1 and words[0].rpartition("/")[2] in ("bash", "sh")


def analysed(script: str) -> Body:
    """The script's interpreter and what its lines do."""
    first = script.split("\n", 1)[0]
    words = tuple(first[2:].split()) if first.startswith("#!") else ()
    body = Body(text=script, interpreter=words or ("/bin/bash",), steps=(), launchers=(), other=())
    if not body.is_shell:
        return body
    steps, launchers, other, modules = [], [], [], []
    for number, line in _lines(script):
        if line.split()[0] in ("module", "ml"):
            modules.append((number, line))
        if match := _STEP.search(line):
            steps.append(_step(number, line))
            if not _prepares(line[: match.end() - len("srun")].rstrip(" ;&|({")):
                other.append((number, line))
        elif match := _LAUNCHER.search(line):
            launchers.append((number, match[1]))
            other.append((number, line))
        elif not _prepares(line):
            other.append((number, line))
    return Body(
        text=script,
        interpreter=body.interpreter,
        steps=tuple(steps),
        launchers=tuple(launchers),
        other=tuple(other),
        modules=tuple(modules),
    )


def _lines(script: str) -> Iterator[tuple[int, str]]:
    """Lines of the script with what continues them, without comments; what here-documents hold is left out."""
    number, pending, start, until = 0, "", 0, ""
    for line in script.splitlines():
        number += 1
        if until:
            until = "" if line.strip() == until else until
            continue
        if not pending:
            start = number
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            pending += line[:-1] + " "
            continue
        whole = (pending + line).strip()
        pending = ""
        if match := re.search(r"<<-?\s*(['\"]?)(\w+)\1", whole):
            until = match[2]
        if whole and not whole.startswith("#"):
            yield start, whole
    if pending.strip():
        yield start, pending.strip()


def _prepares(line: str) -> bool:
    """Whether a line only prepares: it does no harm, and means the same, in every worker."""
    plain, inside = _unfolded(line)
    parts = [part.strip() for part in _SEPARATOR.split(_QUOTED.sub("text", plain))]
    commands = [part for part in parts if part and not part.startswith("#") and not _ASSIGNMENT.match(part)]
    if any(command.split()[0] not in _PREPARES for command in commands):
        return False
    if line.split()[:1] and line.split()[0] in _SHOWS:
        return True
    called = [part.split()[0] for found in inside for part in _SEPARATOR.split(found) if part.strip()]
    return not _RANDOM.search(line) and all(name in _SAME for name in called)


def _unfolded(line: str) -> tuple[str, list[str]]:
    """The line with a word in place of each command whose output it puts in, and those commands."""
    inside: list[str] = []
    while match := _SUBSTITUTION.search(line):
        inside.append(match[1] or match[2] or "")
        line = f"{line[: match.start()]}value{line[match.end() :]}"
    return line, inside


def _step(number: int, line: str) -> Step:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return Step(line=number, words=line, tasks=0, nodes=0, unknown=("quotes that do not end",))
    found: dict[str, str] = {}
    unknown: list[str] = []
    rest = words[words.index("srun") + 1 :] if "srun" in words else []
    while rest and rest[0].startswith("-") and rest[0] != "--":
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("--"):
            name, value = _SRUN_SHORT.get(word[1], word[:2]), word[2:]
            equals = value
        if name in _SRUN_FLAGS and not equals:
            continue
        if name not in _SRUN_VALUES:
            unknown.append(word)
            continue
        found[name] = value if equals else (rest.pop(0) if rest else "")
    tasks, nodes = (
        int(found.get(name, "0")) if found.get(name, "0").isdecimal() else 0 for name in ("ntasks", "nodes")
    )
    return Step(line=number, words=line, tasks=tasks, nodes=nodes, unknown=tuple(unknown))


def run_text(body: Body, *, array: Indices | None) -> str:
    """The script as ``run``, with what it expects to find around it."""
    before = [
        AS_BASH,
        'export SLURM_SUBMIT_DIR="$PWD"',
    ]
    if array is not None:
        before += _array_lines(array)
    tools = _tools(body) if body.is_shell else []
    if body.is_plain:
        return "\n".join([*before, *tools, body.text])
    end = _END
    while end in body.text:
        end += "_"
    first, _, rest = body.text.partition("\n")
    whole = "\n".join([first, *tools, rest]).rstrip("\n")
    script = '"$TIDEMILL_SCRATCH_DIR/slurm_script"'
    interpreter = " ".join(shlex.quote(word) for word in body.interpreter)
    return "\n".join([*before, f"cat > {script} <<'{end}'", whole, end, f"exec {interpreter} {script}"])


def _array_lines(array: Indices) -> list[str]:
    """The ids of the array's tasks, where they are not those that Tidemill counts."""
    first, last, step = array.ids[0], array.ids[-1], array.step
    if step:
        here = f"$(({first} + {step} * TIDEMILL_ARRAY_INDEX))"
    else:
        here = f"$(echo {' '.join(map(str, array.ids))} | cut -d ' ' -f $((TIDEMILL_ARRAY_INDEX + 1)))"
    return [
        f"export SLURM_ARRAY_TASK_ID={here}",
        f"export SLURM_ARRAY_TASK_MIN={first} SLURM_ARRAY_TASK_MAX={last} SLURM_ARRAY_TASK_STEP={step or 1}",
    ]


def _tools(body: Body) -> list[str]:
    """Shell variables and functions that the script expects, as far as it names them."""
    # not exported: mpirun takes these for a sign that it may start its processes through Slurm
    older = {"SLURM_JOBID": "SLURM_JOB_ID", "SLURM_NODELIST": "SLURM_JOB_NODELIST", "SLURM_NPROCS": "SLURM_NTASKS"}
    lines = [f'{name}="${now}"' for name, now in older.items() if name in body.text]
    return lines + [text for name, text in (("srun", _srun()), ("scontrol", _SCONTROL)) if name in body.text]


def _srun() -> str:
    flags = "|".join(f"--{name}" for name in _SRUN_FLAGS)
    short = "|".join(f"-{letter}" for letter, name in _SRUN_SHORT.items() if name in _SRUN_FLAGS)
    return (
        "srun() {\n"
        '  while [ $# -gt 0 ]; do case "$1" in\n'
        f"    --) shift; break;; --*=*|{flags}|{short}) shift;; --*|-?) shift 2;; -*) shift;; *) break;;\n"
        '  esac; done\n  "$@"\n}'
    )


_SCONTROL: Final = (
    'scontrol() {\n  case "$1 ${2%s}" in\n'
    '    "show hostname") printf "%s\\n" "${3:-$SLURM_JOB_NODELIST}" | tr "," "\\n";;\n'
    '    *) echo "scontrol: only show hostnames is there" >&2; return 1;;\n  esac\n}'
)
