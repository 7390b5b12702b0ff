"""Turns as they were taken, in a file: what was there at first, then each turn's facts, instant and decisions.

The file is JSON lines packed with gzip. A control plane that dies leaves a file that ends in the middle of a line; what
is whole before that is read. A world that was loaded anew in between begins anew in the file too.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, get_args

import msgspec

from tidemill import __version__
from tidemill.core.lifecycle import is_terminal
from tidemill.errors import Conflict, InvalidRequest, NotFound
from tidemill.model import events
from tidemill.model.events import Fact
from tidemill.model.fleet import Site
from tidemill.model.ids import JobId
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Cause, Job
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Plan
from tidemill.model.policy import Policy
from tidemill.model.tenant import Project
from tidemill.ports import Snapshot
from tidemill.store.codec import decode, encode

FORMAT: Final = 1
_FLUSH_EVERY: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """All that a world is made of; ``now`` is when it was made."""

    now: int
    snapshot: Snapshot
    sites: tuple[Site, ...]
    projects: tuple[Project, ...]
    rates: RateCard
    policy: Policy


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing that a turn decided about a job: ``what`` names it, ``value`` is how. No job: about the books."""

    job_id: JobId
    what: str
    value: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: its facts, its instant, and what was decided."""

    now: int
    facts: tuple[Fact, ...]
    decided: tuple[Decision, ...]


class Recording:
    """Writes turns down as they are taken. ``write`` is given whole lines.

    The shell that takes turns calls ``begin`` with what it makes its world of (as ``world_from`` is given it), and
    ``turn`` after each turn that was stored; a refused turn never happened and is not written.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._write(_line({"tidemill": __version__, "recording": FORMAT}))

    def begin(
        self,
        snapshot: Snapshot,
        *,
        sites: Iterable[Site],
        projects: Iterable[Project],
        rates: RateCard,
        policy: Policy,
        now: int,
    ) -> None:
        """A world was made of these, for the first time or anew."""
        beginning = Beginning(
            now=now, snapshot=snapshot, sites=tuple(sites), projects=tuple(projects), rates=rates, policy=policy
        )
        self._write(_line({"begin": beginning}))

    def turn(self, inbox: Sequence[Fact], now: int, plan: Plan) -> None:
        """A turn was taken and stored."""
        facts = [(type(fact).__name__, fact) for fact in inbox]
        decided = [(one.job_id, one.what, one.value) for one in decisions(plan)]
        self._write(_line({"now": now, "facts": facts, "decided": decided}))


class RecordingFile:
    """A new file for a ``Recording``; what is written reaches the disk every so many lines and on ``close``."""

    def __init__(self, path: Path) -> None:
        """Raises: Conflict when there is such a file already."""
        try:
            self._raw = path.open("xb")
        except FileExistsError as error:
            raise Conflict(
                "There is such a file already.", field="FILE", value=str(path), mend="Name another file."
            ) from error
        except OSError as error:
            raise InvalidRequest(
                f"The file cannot be made: {error.strerror}.", field="FILE", value=str(path)
            ) from error
        self._file = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, mtime=0)
        self._lines = 0

    def write(self, line: bytes) -> None:
        """Append a line."""
        self._file.write(line)
        self._lines += 1
        if self._lines % _FLUSH_EVERY == 0:
            self._file.flush()

    def close(self) -> None:
        """Write what is left; harmless twice."""
        self._file.close()
        self._raw.close()

    def __enter__(self) -> RecordingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_recording(path: Path) -> Iterator[Beginning | Turn]:
    """What a file holds, in order; an unfinished end is left out.

    Raises: NotFound; InvalidRequest that names the line when it is no recording.
    """
    for number, text in enumerate((line for line in _lines(path) if line.strip()), 1):
        try:
            line = _line_decoder().decode(text)
            if number == 1 and line.recording != FORMAT:
                raise ValueError("it does not begin as one")
            if begin := bytes(line.begin):
                yield decode(Beginning, begin.decode())
            elif number > 1:
                facts = tuple(decode(_fact_types()[name], bytes(fact).decode()) for name, fact in line.facts)
                yield Turn(line.now, facts, tuple(Decision(*one) for one in line.decided))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{path.name} is not a recording that this version can read; line {number}: {error}.",
                field="FILE",
                value=str(path),
                mend="Make one with tidemill record.",
            ) from error


def decisions(plan: Plan) -> Iterator[Decision]:
    """What a turn decided, as far as people and machines notice it: placements, ends, waits, and what was billed."""
    placed: dict[JobId, list[Allocation]] = {}
    ending = {
        change.after.job_id
        for change in plan.changes
        if isinstance(change.after, Attempt) and change.after.state in (AttemptState.ENDING, AttemptState.ENDED)
    }
    for change in plan.changes:
        after = change.after
        if isinstance(after, Allocation):
            if change.assumed is None:
                placed.setdefault(after.job_id, []).append(after)
            elif after.state is AllocationState.DRAINING and after.job_id not in ending:
                yield Decision(after.job_id, f"attempt {after.fence} gives up worker", str(after.rank))
        elif isinstance(after, Attempt) and after.state is AttemptState.ENDING and after.cause is not Cause.NONE:
            yield Decision(after.job_id, f"attempt {after.number} is ended", after.cause.value)
        elif isinstance(after, Job) and is_terminal(after.state):
            cause = f": {after.cause.value}" if after.cause.value else ""
            yield Decision(after.id, "ends", f"{after.state.value}{cause}")
    for job_id, workers in placed.items():
        places = "; ".join(_place(worker) for worker in workers)
        yield Decision(job_id, f"attempt {workers[0].fence} is placed", places)
    for waiting in plan.waiting:
        yield Decision(waiting.job_id, "waits", waiting.reason.code)
    if plan.ledger:
        amount = sum(line.amount_micro for line in plan.ledger)
        energy = sum(line.energy_mj for line in plan.ledger)
        yield Decision(JobId(""), "books", f"{amount} micro-USD, {energy} mJ, {len(plan.ledger)} lines")


def _place(worker: Allocation) -> str:
    devices = " ".join(
        f"{share.device_id}" + (f"/{share.milli}" if share.milli != 1000 else "") for share in worker.devices
    )
    return f"{worker.node_id} {devices}".rstrip()


class _Line(msgspec.Struct):
    recording: int = 0
    begin: msgspec.Raw = msgspec.Raw()
    now: int = 0
    facts: list[tuple[str, msgspec.Raw]] = []
    decided: list[tuple[str, str, str]] = []


@cache
def _line_decoder() -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_Line)


@cache
def _fact_types() -> dict[str, type[Any]]:
    return {kind.__name__: kind for kind in get_args(events.Fact)}


def _line(value: object) -> bytes:
    return encode(value).encode() + b"\n"


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, packed or not; the last is left out when it does not end."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotFound("There is no such file.", field="FILE", value=str(path)) from error
    with file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        source: Iterable[bytes] = _unpacked(file) if packed else file
        for line in source:
            if not line.endswith(b"\n"):
                return
            yield line


def _unpacked(file: Any) -> Iterator[bytes]:
    """Lines out of gzip, as far as it goes."""
    rest = b""
    unpack = zlib.decompressobj(wbits=31)
    while piece := file.read(1 << 16):
        try:
            text = unpack.decompress(piece)
        except zlib.error:
            break
        *lines, rest = (rest + text).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest
