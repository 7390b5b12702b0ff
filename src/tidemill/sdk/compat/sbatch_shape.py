"""How many workers an sbatch script is, and what each of them holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from tidemill.sdk.compat.mapping import Draft, Refuse, Said, Surroundings, gpu_request, number, shown
from tidemill.sdk.compat.sbatch_body import Body
from tidemill.sdk.compat.sbatch_values import Gpus, bytes_of, gpus_of, size_text

Value = TypeVar("Value")


_COUNTS: Final = ("--nodes", "--ntasks", "--ntasks-per-node", "--ntasks-per-gpu")


@dataclass(slots=True)
class Shape:
    """The workers of a script. ``tasks``, ``nodes`` are Slurm's; each of ``workers`` has ``tasks_each`` of the tasks.

    ``wrong`` has what is wrong with an option, by its name.
    """

    given: Mapping[str, str]
    nodes: int = 1
    nodes_least: int = 1
    tasks: int = 1
    workers: int = 1
    tasks_each: int = 1
    cpus: int = 1
    gpus: str = ""
    choices: tuple[str, ...] = ()
    memory: int = 0
    wrong: dict[str, Refuse] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, str], body: Body) -> Shape:
        """The shape that the options and the body make together."""
        shape = cls(given=given)
        shape._count(body)
        shape._hold()
        return shape

    def said(self, name: str) -> Said:
        """What an option became. Raises: Refuse."""
        if name in self.wrong:
            raise self.wrong[name]
        is_split = self.tasks > 1 and self.workers == 1
        return {
            "--nodes": Said(f"nodes: {self._span()}"),
            "--ntasks": self._tasks(),
            "--ntasks-per-node": self._tasks(),
            "--ntasks-per-gpu": self._tasks(),
            "--cpus-per-task": Said(
                f"resources.cpus: {self.cpus}", f"For {self.tasks} tasks in one worker." if is_split else ""
            ),
            "--cpus-per-gpu": Said(f"resources.cpus: {self.cpus}"),
            "--mincpus": Said(f"resources.cpus: {self.cpus}"),
            "--constraint": Said(f"resources.gpus: {' or '.join((self.gpus, *self.choices))}"),
        }.get(name) or (
            Said(f"resources.memory: {size_text(self.memory)}")
            if name.startswith("--mem")
            else Said(f"resources.gpus: {self.gpus or 'none'}")
        )

    def _tasks(self) -> Said:
        if self.workers > 1 or self.tasks == 1:
            return Said(f"nodes: {self._span()}", "Each task that srun starts is a worker." if self.tasks > 1 else "")
        return Said(f"resources.cpus: {self.cpus}", f"The script runs once, with what {self.tasks} tasks would hold.")

    def _span(self) -> str:
        return f"{self.nodes_least}..{self.workers}" if self.nodes_least < self.nodes else str(self.workers)

    def put(self, draft: ScriptDraft) -> None:
        """Put the workers and what they hold."""
        draft.reading = self._first(*_COUNTS)
        if self.workers > 1:
            draft.put("nodes", self._span() if self.nodes_least < self.nodes else self.workers)
            if self.nodes == 1:
                draft.put("placement.within", "host")
        draft.reading = self._first("--cpus-per-task", "--cpus-per-gpu", "--mincpus", *_COUNTS)
        draft.put("resources.cpus", self.cpus)
        draft.reading = self._first("--gpus-per-task", "--gres", "--gpus-per-node", "--gpus")
        if self.gpus:
            draft.put("resources.gpus", self.gpus)
        if self.choices:
            draft.put("resources.any_of", [{"gpus": one} for one in self.choices])
        draft.reading = self._first("--mem", "--mem-per-cpu", "--mem-per-gpu")
        if self.memory:
            draft.put("resources.memory", size_text(self.memory))
        draft.reading = ""
        if "--ntasks-per-node" in self.given:
            draft.environment["SLURM_NTASKS_PER_NODE"] = -(-self.tasks // self.nodes) if self.workers == 1 else 1
        if self.tasks_each > 1:
            draft.environment["SLURM_NTASKS"] = self.tasks
            draft.environment["SLURM_CPUS_PER_TASK"] = max(1, self.cpus // self.tasks)

    def _first(self, *names: str) -> str:
        """The first of these options that is given; empty when none is."""
        return next((name for name in names if name in self.given), "")

    # --- counting ---

    def _value(self, name: str, read: Callable[[str], Value]) -> Value | None:
        """An option's value; None when it is not given, or wrong."""
        if name not in self.given:
            return None
        try:
            return read(self.given[name])
        except Refuse as refusal:
            self.wrong[name] = refusal
            return None

    def _number(self, name: str, high: int = 4_096) -> int | None:
        return self._value(name, lambda value: number(value, "a number", low=1, high=high))

    def _count(self, body: Body) -> None:
        span = self._value("--nodes", _span_of)
        per_node, per_gpu = self._number("--ntasks-per-node"), self._number("--ntasks-per-gpu")
        tasks = self._number("--ntasks", 100_000)
        self.nodes_least, self.nodes = span or (1, 1)
        if span is None and tasks and per_node:
            self.nodes_least = self.nodes = -(-tasks // per_node)
        gpus = self._value("--gpus", gpus_of)
        if tasks is None and per_node:
            tasks = self.nodes * per_node
        elif tasks is None and per_gpu and gpus:
            tasks = gpus.count * per_gpu
        self.tasks = max(tasks or self.nodes, 1)
        if self.tasks == 1:
            self.nodes = self.nodes_least = 1
            return
        culprit = next(
            name for name in ("--nodes", "--ntasks", "--ntasks-per-node", "--ntasks-per-gpu") if name in self.given
        )
        if self.nodes_least != self.nodes and self.tasks != self.nodes:
            self.wrong["--nodes"] = Refuse("A range of nodes has one task on each.", "Write one number of nodes.")
        elif not body.steps and self.nodes == 1:
            self.tasks_each = self.tasks
        elif not body.steps:
            self.wrong[culprit] = Refuse(
                "The script runs once, on the first node, and nothing in it starts tasks on the others.",
                "Start them with one srun, or write --nodes=1; mpirun over several machines needs the Slurm engine."
                if body.launchers
                else "Start them with one srun, or write --nodes=1.",
            )
        elif len(body.steps) > 1 or body.other:
            line, words = body.other[0] if body.other else (body.steps[1].line, body.steps[1].words)
            self.wrong[culprit] = Refuse(
                f"Workers run the whole script, and line {line} ({shown(words)}) must happen once.",
                "Keep to settings that are the same everywhere (MASTER_ADDR, MASTER_PORT are set) and one srun; put the"
                " rest into a workload of its own (--dependency).",
            )
        else:
            self.workers = self.tasks

    def _hold(self) -> None:
        tasks_on_node = max(1, -(-self.tasks // self.nodes))
        share = 1 if self.workers == 1 else tasks_on_node
        gpus = self._gpus(share)
        cpus = self._number("--cpus-per-task", 10_000) or 1
        self.cpus = cpus * self.tasks_each
        if per_gpu := self._number("--cpus-per-gpu", 10_000):
            self.cpus = max(self.cpus, per_gpu * max(1, gpus))
        if least := self._number("--mincpus", 10_000):
            self.cpus = max(self.cpus, -(-least // share))
        memory = self._value("--mem", _memory_of)
        per_cpu, per_device = self._value("--mem-per-cpu", bytes_of), self._value("--mem-per-gpu", bytes_of)
        self.memory = -(-(memory or 0) // share) or (per_cpu or 0) * self.cpus or (per_device or 0) * max(1, gpus)

    def _gpus(self, share: int) -> int:
        """How many GPUs a worker holds; the request for them is kept."""
        models = self._value("--constraint", _models_of)
        found: tuple[str, Gpus, int, int] | None = None
        for name, read, times, over in (
            ("--gpus-per-task", gpus_of, self.tasks_each, 1),
            ("--gres", _gres_of, 1, share),
            ("--gpus-per-node", gpus_of, 1, share),
            ("--gpus", gpus_of, 1, self.nodes * share),
        ):
            wanted = self._value(name, read)
            if wanted is not None and wanted.count:
                found = (name, wanted, times, over)
        if found is None:
            if "--constraint" in self.given and "--constraint" not in self.wrong:
                self.wrong["--constraint"] = Refuse("It names a GPU, and none is asked for.", "Add --gpus=1.")
            return 0
        name, wanted, times, over = found
        if wanted.count * times % over:
            self.wrong[name] = Refuse(
                f"{wanted.count} GPUs are not shared out evenly to {over} workers.",
                "Ask for as many GPUs as tasks, or a multiple.",
            )
            return 0
        count = wanted.count * times // over
        try:
            requests = [
                gpu_request(model, count) if model else str(count)
                for model in ((wanted.model,) if wanted.model else models or ("",))
            ]
        except Refuse as refusal:
            self.wrong[name] = refusal
            return 0
        self.gpus, self.choices = requests[0], tuple(requests[1:])
        return count


class ScriptDraft(Draft):
    """A draft of a script: with its shape, and the variables that Slurm would set for its options."""

    def __init__(
        self, surroundings: Surroundings, lines: Mapping[str, int], given: Mapping[str, str], body: Body
    ) -> None:
        super().__init__(surroundings, lines, given)
        self.shape = Shape.of(given, body)
        self.environment: dict[str, Any] = {}


def _span_of(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", value.strip())
    if match is None:
        raise Refuse(f"{shown(value)} is not a number of nodes.", "Write for example 4 or 2-8.")
    least, most = int(match[1]), int(match[2] or match[1])
    if not 1 <= least <= most <= 4_096:
        raise Refuse(f"{shown(value)} is not a number of nodes.", "Write 1 to 4096, the smaller number first.")
    return least, most


def _memory_of(value: str) -> int:
    size = bytes_of(value)
    if not size:
        raise Refuse("A job does not hold all of a machine's memory.", "Write how much it needs, such as --mem=64G.")
    return size


def _gres_of(value: str) -> Gpus:
    """The GPUs of a list of generic resources."""
    if value.lower() in ("none", "help"):
        return Gpus("", 0)
    found = Gpus("", 0)
    for part in value.split(","):
        kind, _, rest = part.removeprefix("gres/").partition(":")
        if kind != "gpu" or found.count:
            what = "shards and MPS are shares of a GPU: gpus: 0.5" if kind in ("shard", "mps") else "Ask for GPUs alone"
            raise Refuse(f"{shown(part)} is not counted here.", f"{what}, in a Tidemill spec.")
        found = gpus_of(rest or "1")
    return found


def _models_of(value: str) -> tuple[str, ...]:
    """Names of GPUs with ``|`` between them."""
    from tidemill import catalog

    names: list[str] = [part.strip() for part in value.strip("[]").split("|")]
    if not all(re.fullmatch(r"[A-Za-z][\w.-]*", name) and catalog.known_model(name) for name in names):
        raise Refuse(
            "Features of machines are labels here.",
            "Name GPUs (a100|h100), or ask for a label: placement.labels in a Tidemill spec.",
        )
    return tuple(names)
