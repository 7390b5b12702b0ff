"""Readers of public traces, each as a stream of arrivals by time.

``docs/twin.md`` says where each trace is from. Files may be packed with gzip. A row that cannot be read is an error
that names file, line, column and value; what a trace itself is known to leave open (a pod without an end) is passed
over and counted in ``Trace.skipped``.
"""

from __future__ import annotations

import calendar
import csv
import gzip
import json
import math
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, TextIO

import numpy as np

from tidemill.errors import InvalidRequest, NotFound
from tidemill.model.fleet import Node
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Alternative, Kind, RetryPolicy, WorkloadSpec
from tidemill.twin.arrivals import Arrival, Stream
from tidemill.twin.fleet import find_device, make_node, unknown_device
from tidemill.units import HOUR_NS, MILLI, SECOND_NS

MEBI: Final = 1024**2
_OPENB_MODELS: Final = {"P100": "P100-PCIe-16GB", "V100M16": "V100-SXM2-16GB", "V100M32": "V100-SXM2-32GB"}
"""What the catalog calls the models of openb; G2 and G3 are names that its publishers gave to undisclosed ones."""


@dataclass(slots=True)
class Trace:
    """A trace that is read while it is used: ``skipped`` is complete when ``arrivals`` is used up."""

    name: str
    arrivals: Stream
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader has to know beside the file.

    ``per_node`` are the GPUs of a machine, over which larger jobs are spread. ``throughputs`` is Gavel's table of steps
    a second. ``unit_ns`` is the unit of PAI's times; zero: hours when they have fractions, else seconds.
    ``cores_per_gpu`` goes with each GPU where the trace does not say.
    """

    per_node: int = 8
    throughputs: Path | None = None
    unit_ns: int = 0
    cores_per_gpu: int = 1


SHIPPED: Final = {
    "muri": ("muri-trace1.csv.gz", "muri-trace3.csv.gz", "muri-trace4.csv.gz"),
    "pai": ("pai_1k.csv.gz",),
    "openb": ("openb_pod_list_default.csv.gz",),
}
"""Small traces that come with the product; the first of a kind is read when no file is given. See data/README.md."""
SHIPPED_NODES: Final = "openb_node_list_gpu_node.csv.gz"


def shipped(name: str) -> Path:
    """A file that comes with the product."""
    return Path(str(resources.files("tidemill.twin").joinpath("data", name)))


def find_file(name: str, file: Path | None) -> Path:
    """The file of a trace: the one given, by path or as the name of a shipped one, or the first that is shipped.

    Raises: InvalidRequest, NotFound with what to do.
    """
    own = SHIPPED.get(name, ())
    if file is None:
        if name in READERS and not own:
            raise InvalidRequest(
                f"No {name} trace is shipped.",
                field="--file",
                value="",
                mend="Give --file FILE; docs/twin.md says where to get it.",
            )
        return shipped(own[0]) if own else Path()
    if not file.exists() and str(file) in own:
        return shipped(str(file))
    return file


def read_trace(name: str, file: Path | None, reading: Reading) -> Trace:
    """The trace of that kind in a file, or the shipped one. Raises: InvalidRequest, NotFound with what to do."""
    if name not in READERS:
        raise InvalidRequest(
            f"There is no reader for traces called {name!r}.",
            field="--trace",
            value=name,
            mend=f"Write {', '.join(READERS)}.",
        )
    file = find_file(name, file)
    if not file.exists():
        raise NotFound(
            "There is no such file.", field="--file", value=str(file), mend="See docs/twin.md for where to get it."
        )
    trace = Trace(name, iter(()))
    trace.arrivals = READERS[name](file, reading, trace.skipped)
    return trace


def gang_of(gpus: int, per_node: int) -> tuple[int, int]:
    """How a job of so many GPUs is cut into equal workers, as few as fit on machines: ``(workers, GPUs of each)``.

    >>> gang_of(4, 8), gang_of(16, 8), gang_of(12, 8), gang_of(11, 8)
    ((1, 4), (2, 8), (2, 6), (11, 1))
    """
    workers = -(-gpus // max(per_node, 1))
    while gpus % workers:
        workers += 1
    return workers, gpus // workers


# --- rows ---


class _Row:
    """One row of a table; what is wrong with it is told with its place."""

    __slots__ = ("_file", "_line", "_values")

    def __init__(self, file: Path, line: int, values: dict[str, str]) -> None:
        self._file, self._line, self._values = file, line, values

    def text(self, column: str) -> str:
        """A value as it stands; empty when the table does not have the column."""
        return (self._values.get(column) or "").strip()

    def number(self, column: str, *, least: float = 0.0) -> float:
        """A number that is not below ``least``."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least:
            raise self.wrong(column, f"{text!r} is not a number of {least:g} or more")
        return value

    def whole(self, column: str, *, least: int = 0) -> int:
        """A whole number that is not below ``least``."""
        value = self.number(column, least=least)
        if value != int(value):
            raise self.wrong(column, f"{self.text(column)!r} is not a whole number")
        return int(value)

    def wrong(self, column: str, what: str) -> InvalidRequest:
        """The error for a value of this row."""
        return InvalidRequest(
            f"{self._file.name}, line {self._line}, column {column}: {what}.",
            field="--file",
            value=self.text(column),
            mend="Mend or leave out that line.",
        )


def _open(file: Path) -> TextIO:
    with file.open("rb") as start:
        is_packed = start.read(2) == b"\x1f\x8b"
    return gzip.open(file, "rt", encoding="utf-8", newline="") if is_packed else file.open(encoding="utf-8", newline="")


def _rows(file: Path, columns: Iterable[str]) -> Iterator[_Row]:
    """The rows of a CSV file that has these columns. Blank lines are none."""
    try:
        with _open(file) as text:
            reader = csv.DictReader(text)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InvalidRequest(
                    f"{file.name} has no column {missing[0]}.",
                    field="--file",
                    value=str(file),
                    mend=f"Its columns are {', '.join(reader.fieldnames or ())}; is it a trace of another kind?",
                )
            for values in reader:
                if any(values.values()):
                    yield _Row(file, reader.line_num, values)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{file.name} cannot be read: {error}.", field="--file", value=str(file)) from error


def _by_time(rows: Iterable[tuple[int, int, int, str]]) -> Iterator[tuple[int, int, int, str]]:
    """``(arrival, duration, GPUs, tenant)`` in order of time, from rows in any order, 28 bytes each."""
    arrival, duration, gpus, tenant = array("q"), array("q"), array("i"), array("i")
    names: dict[str, int] = {}
    for at, takes, many, name in rows:
        arrival.append(at)
        duration.append(takes)
        gpus.append(many)
        tenant.append(names.setdefault(name, len(names)))
    listed = list(names)
    first = min(arrival, default=0)
    for row in np.argsort(np.frombuffer(arrival, np.int64), kind="stable").tolist() if arrival else ():
        yield arrival[row] - first, duration[row], gpus[row], listed[tenant[row]]


def _whole_gpu_jobs(rows: Iterable[tuple[int, int, int, str]], name: str, reading: Reading) -> Stream:
    for at, takes, gpus, tenant in _by_time(rows):
        yield Arrival(at, tenant, tenant, _spec(name, gpus, reading.per_node, reading.cores_per_gpu), takes)


@cache
def _spec(name: str, gpus: int, per_node: int, cores_per_gpu: int) -> WorkloadSpec:
    workers, each = gang_of(gpus, per_node) if gpus else (1, 0)
    return WorkloadSpec(
        kind=Kind.TASK,
        name=name,
        run=name,
        nodes=workers,
        resources=Resources(
            gpus=GpuRequest(count=each) if each else None, cpu_milli=MILLI * cores_per_gpu * max(each, 1)
        ),
        retry=RetryPolicy(max=1_000),
    )


# --- the traces ---


def philly(file: Path, reading: Reading, skipped: Counter[str]) -> Stream:
    """Microsoft's Philly as prepared for Sia and Pollux: ``timestamp,duration,num_gpus,gpu_time,cluster``."""

    def rows() -> Iterator[tuple[int, int, int, str]]:
        for row in _rows(file, ("timestamp", "duration", "num_gpus", "cluster")):
            if not row.text("num_gpus"):
                skipped["no num_gpus"] += 1
                continue
            takes = row.number("duration")
            if not takes:
                skipped["no duration"] += 1
                continue
            try:
                at = calendar.timegm(time.strptime(row.text("timestamp"), "%Y-%m-%d %H:%M:%S"))
            except ValueError as error:
                raise row.wrong(
                    "timestamp", f"{row.text('timestamp')!r} is not a time such as 2017-10-09 07:01:55"
                ) from error
            yield (
                at * SECOND_NS,
                int(takes * SECOND_NS),
                row.whole("num_gpus", least=1),
                row.text("cluster") or "philly",
            )

    return _whole_gpu_jobs(rows(), "philly", reading)


def muri(file: Path, reading: Reading, skipped: Counter[str]) -> Stream:
    """The traces of Muri: times in ms; a job's work is ``iterations`` x ``iteration_time``."""

    def rows() -> Iterator[tuple[int, int, int, str]]:
        for row in _rows(file, ("num_gpu", "submit_time", "iterations", "iteration_time")):
            takes = row.number("iterations") * row.number("iteration_time")
            if not takes:
                skipped["no work"] += 1
                continue
            yield round(row.number("submit_time") * 1e6), round(takes * 1e6), row.whole("num_gpu", least=1), "muri"

    return _whole_gpu_jobs(rows(), "muri", reading)


def pai(file: Path, reading: Reading, skipped: Counter[str]) -> Stream:
    """Alibaba's PAI as resampled for GAIA: ``arrival_time,length,cpus``; its resource units are taken for GPUs."""
    columns = ("arrival_time", "length", "cpus")
    unit = reading.unit_ns
    if not unit:
        sample = [row.number("length") for row, _ in zip(_rows(file, columns), range(200), strict=False)]
        unit = HOUR_NS if any(value != int(value) for value in sample) else SECOND_NS

    def rows() -> Iterator[tuple[int, int, int, str]]:
        for row in _rows(file, columns):
            takes = round(row.number("length") * unit)
            if not takes:
                skipped["no length"] += 1
                continue
            yield round(row.number("arrival_time") * unit), takes, row.whole("cpus", least=1), "pai"

    return _whole_gpu_jobs(rows(), "pai", reading)


_GAVEL_TAIL: Final = re.compile(r"^(?P<type>[^\t]+)\t.*?(?P<steps>\d+)\s+(?P<at>\d+(?:\.\d+)?)\s+(?P<gpus>\d+)\s*$")


def gavel(file: Path, reading: Reading, skipped: Counter[str]) -> Stream:
    """A trace of Gavel, or a folder of them, each a virtual cluster: steps, arrival in s and GPUs are the last columns.

    How long steps take is in Gavel's table of throughputs, for V100s, which has to be given.
    """
    if reading.throughputs is None:
        raise InvalidRequest(
            "Gavel's traces count steps; how long one takes is in its table of throughputs.",
            field="--throughputs",
            value="",
            mend="Give scheduler/oracle_throughputs_v3.json (or another such table) of Gavel's repository.",
        )
    speeds = _throughputs(reading.throughputs)
    files = sorted(file.glob("*.trace*")) if file.is_dir() else [file]

    def rows() -> Iterator[tuple[int, int, int, str]]:
        for each in files:
            tenant = each.name.partition(".")[0]
            with _open(each) as text:
                for number, line in enumerate(text, 1):
                    if not line.strip():
                        continue
                    match = _GAVEL_TAIL.match(line)
                    if match is None:
                        raise InvalidRequest(
                            f"{each.name}, line {number}: it does not end in steps, arrival and GPUs.",
                            field="--file", value=line.strip()[-60:], mend="Mend or leave out that line.",
                        )  # fmt: skip
                    gpus = int(match["gpus"])
                    speed = speeds.get((match["type"], gpus)) or speeds.get((match["type"], 1), 0.0) * gpus
                    if not speed:
                        skipped[f"no throughput of {match['type']}"] += 1
                        continue
                    yield (
                        round(float(match["at"]) * SECOND_NS),
                        round(int(match["steps"]) / speed * SECOND_NS),
                        gpus,
                        tenant,
                    )

    return _whole_gpu_jobs(rows(), "gavel", reading)


def _throughputs(file: Path) -> dict[tuple[str, int], float]:
    """Steps a second of each job type and number of V100s, from Gavel's table: ``v100 -> "('TYPE', GPUS)" -> null``."""
    try:
        with _open(file) as text:
            table = json.load(text)["v100"]
        found = {}
        for key, value in table.items():
            match = re.fullmatch(r"\('(.*)', (\d+)\)", key)
            if match is not None and isinstance(value, dict):
                found[match[1], int(match[2])] = float(value["null"])
            elif not isinstance(value, dict):
                raise ValueError(f"{key} has no throughput alone")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{file.name} is not a table of throughputs: {error}.",
            field="--throughputs", value=str(file), mend="Give one of Gavel's oracle_throughputs*.json.",
        ) from error  # fmt: skip
    return found


def openb(file: Path, _reading: Reading, skipped: Counter[str]) -> Stream:
    """Alibaba's openb pods: share of a GPU, whole ones or none, GPU models, CPU and memory, creation and deletion in s.

    A pod runs from when it was scheduled, or else created, until it was deleted.
    """
    columns = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "creation_time", "deletion_time")
    found = []
    for row in _rows(file, columns):
        if not row.text("deletion_time"):
            skipped["no deletion_time"] += 1
            continue
        at, ends = row.number("creation_time"), row.number("deletion_time")
        begins = row.number("scheduled_time") if row.text("scheduled_time") else at
        if ends <= begins:
            skipped["deleted before it ran"] += 1
            continue
        gpus = row.whole("num_gpu")
        milli = min(row.whole("gpu_milli"), MILLI) if gpus == 1 else MILLI
        if gpus and not milli:
            raise row.wrong("gpu_milli", "a pod with a GPU has no share of it")
        spec = _pod(
            gpus,
            milli,
            row.whole("cpu_milli"),
            row.whole("memory_mib"),
            row.text("gpu_spec"),
            row.text("qos") or "pods",
        )
        found.append((round(at * SECOND_NS), round((ends - begins) * SECOND_NS), spec, row.text("qos") or "pods"))
    found.sort(key=lambda one: one[0])
    first = found[0][0] if found else 0
    return (Arrival(at - first, tenant, tenant, spec, takes) for at, takes, spec, tenant in found)


@cache
def _pod(gpus: int, milli: int, cpu_milli: int, memory_mib: int, models: str, qos: str) -> WorkloadSpec:
    def resources(model: str) -> Resources:
        request = GpuRequest(count=gpus, milli=milli, model=model) if gpus else None
        return Resources(gpus=request, cpu_milli=max(cpu_milli, 1), memory_bytes=memory_mib * MEBI)

    first, *others = [_OPENB_MODELS.get(name, name) for name in models.split("|")] if models else [""]
    return WorkloadSpec(
        kind=Kind.TASK,
        name="pod",
        run=qos,
        resources=resources(first),
        any_of=tuple(Alternative(resources=resources(name)) for name in others) if gpus else (),
        retry=RetryPolicy(max=1_000),
    )


def openb_nodes(file: Path) -> tuple[Node, ...]:
    """The machines of openb: ``sn,cpu_milli,memory_mib,gpu,model``."""
    if not file.exists():
        raise NotFound("There is no such file.", field="--nodes", value=str(file))
    nodes = []
    for index, row in enumerate(_rows(file, ("sn", "cpu_milli", "memory_mib", "gpu", "model"))):
        gpus, model = row.whole("gpu"), row.text("model")
        if gpus and not model:
            raise row.wrong("model", "a machine with GPUs has no model")
        name = _OPENB_MODELS.get(model, model)
        device = (find_device(name) or unknown_device(name)) if gpus else None
        nodes.append(
            make_node(
                index,
                device,
                gpus,
                cpu_milli=row.whole("cpu_milli", least=1),
                memory_bytes=row.whole("memory_mib", least=1) * MEBI,
                name=row.text("sn"),
            )
        )
    return tuple(nodes)


READERS: Final[dict[str, Callable[[Path, Reading, Counter[str]], Stream]]] = {
    "openb": openb,
    "philly": philly,
    "muri": muri,
    "gavel": gavel,
    "pai": pai,
}
