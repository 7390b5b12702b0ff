"""Following a job's logs: all its attempts and ranks in one stream, resumable at every event.

A position is the offset, for each attempt and rank, up to which text was sent. Text ends where a character ends:
bytes of one that is not whole are read again with what comes after them, so a position never lies within a
character, and a stream resumed at any position goes on exactly as the whole one would have.
"""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from starlette.concurrency import run_in_threadpool

from tidemill.api.follow import PING, PING_S, Hub, rung, sse
from tidemill.api.shapes.work import JobOut
from tidemill.control.logs import LogStore
from tidemill.errors import InvalidRequest
from tidemill.model.ids import JobId
from tidemill.model.job import Cause

CHUNK_BYTES: Final = 65_536
BATCH_BYTES: Final = 512 * 1024
LOOK_S: Final = 1.0
"""How often a follower looks though nothing woke it."""
LATE_S: Final = 5.0
"""How long after a job's end its logs may still arrive."""
_SILENT: Final = frozenset((Cause.NODE_LOST.value, Cause.LAUNCH_FAILED.value))
_PLACE: Final = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})=(\d{1,18})", re.ASCII)

Position = dict[tuple[int, int], int]
"""(attempt, rank) to the offset up to which it was sent."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text of one rank from ``offset`` to ``end``."""

    attempt: int
    rank: int
    offset: int
    end: int
    text: str


def parse_position(text: str) -> Position:
    """The position in an event's id. Raises: InvalidRequest.

    >>> parse_position("1:0=5,1:1=7")
    {(1, 0): 5, (1, 1): 7}
    """
    position: Position = {}
    attempt = 1
    for part in text.split(",") if text else ():
        match = _PLACE.fullmatch(part.strip())
        if match is None:
            raise InvalidRequest(
                "This is not the id of a log event.", field="Last-Event-ID", value=text[:200], mend="Leave it out."
            )
        attempt = int(match[1]) if match[1] else attempt
        position[attempt, int(match[2])] = int(match[3])
    return position


def format_position(position: Position) -> str:
    """The id of the event after which the logs were sent up to there."""
    return ",".join(f"{attempt}:{rank}={offset}" for (attempt, rank), offset in sorted(position.items()))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which logs: None for all."""

    attempt: int | None = None
    rank: int | None = None

    def takes(self, attempt: int, rank: int) -> bool:
        """Whether that one is among them."""
        return (self.attempt is None or attempt == self.attempt) and (self.rank is None or rank == self.rank)


def next_chunks(logs: LogStore, job: JobId, wanted: Wanted, position: Position, *, last: bool) -> list[Chunk]:
    """What follows the position, up to ``BATCH_BYTES``; the position moves along. ``last``: no more will come.

    Earlier attempts come first.
    """
    chunks: list[Chunk] = []
    size = 0
    for attempt, rank in logs.ranks(job):
        if not wanted.takes(attempt, rank):
            continue
        while size < BATCH_BYTES:
            offset = position.get((attempt, rank), 0)
            over = last or logs.is_complete(job, attempt, rank)
            data = logs.read(job, attempt, rank, offset, CHUNK_BYTES)
            text, taken = decode(data, last=over and len(data) < CHUNK_BYTES)
            if not taken:
                break
            size += taken
            position[attempt, rank] = offset + taken
            chunks.append(Chunk(attempt, rank, offset, offset + taken, text))
    return chunks


def decode(data: bytes, *, last: bool) -> tuple[str, int]:
    """The text in ``data`` and how many bytes it is of: an unfinished character at the end waits unless ``last``."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, final=last)
    return text, len(data) - (0 if last else len(decoder.getstate()[0]))


def start_at(logs: LogStore, job: JobId, wanted: Wanted, lines: int) -> Position:
    """The position before the last lines of each rank of the newest attempt."""
    there = [(attempt, rank) for attempt, rank in logs.ranks(job) if wanted.takes(attempt, rank)]
    newest = max((attempt for attempt, _ in there), default=0)
    return {
        (attempt, rank): (logs.tail(job, attempt, rank, lines) if attempt == newest else logs.end(job, attempt, rank))
        for attempt, rank in there
    }


@dataclass(frozen=True, slots=True)
class Seen:
    """A job as a follower needs it: its JSON, whether it is over and since when, and who writes its logs.

    ``writers`` are (attempt, rank, cause) of every worker that there was.
    """

    json: JobOut
    is_over: bool
    ended_ns: int
    writers: tuple[tuple[int, int, str], ...]


def are_complete(logs: LogStore, job: JobId, seen: Seen, wanted: Wanted, *, now: int) -> bool:
    """Whether nothing more will come into the wanted logs of a job that is over."""
    if now - seen.ended_ns > LATE_S * 1e9:
        return True
    return all(
        cause in _SILENT or logs.is_complete(job, attempt, rank)
        for attempt, rank, cause in seen.writers
        if wanted.takes(attempt, rank)
    )


async def follow_logs(
    logs: LogStore,
    hub: Hub,
    job: JobId,
    look: Callable[[], Seen],
    wanted: Wanted,
    position: Position,
    *,
    follow: bool,
    now: Callable[[], int],
) -> AsyncIterator[bytes]:
    """Server-sent events: the job as it changes, its logs as they grow, and the end. ``now`` gives the plane's time."""
    last_json: JobOut | None = None
    pinged = time.monotonic()
    with hub.job(job) as bell:
        while True:
            seen = await run_in_threadpool(look)
            if seen.json != last_json:
                last_json = seen.json
                yield sse("job", seen.json)
            complete = not follow or (
                seen.is_over and await run_in_threadpool(are_complete, logs, job, seen, wanted, now=now())
            )
            last = seen.is_over and complete
            while chunks := await run_in_threadpool(next_chunks, logs, job, wanted, position, last=last):
                yield _events(chunks, position)
                pinged = time.monotonic()
            if complete:
                yield sse("end", {"state": seen.json["state"], "complete": last})
                return
            if hub.closed:
                return
            if not await rung(bell, LOOK_S) and time.monotonic() - pinged >= PING_S:
                pinged = time.monotonic()
                yield PING


def _events(chunks: list[Chunk], after: Position) -> bytes:
    """Chunks as events, each with the position after it."""
    position = dict(after)
    for chunk in reversed(chunks):
        position[chunk.attempt, chunk.rank] = min(position[chunk.attempt, chunk.rank], chunk.offset)
    pieces = []
    for chunk in chunks:
        position[chunk.attempt, chunk.rank] = chunk.end
        data = {"rank": chunk.rank, "attempt": chunk.attempt, "offset": chunk.offset, "text": chunk.text}
        pieces.append(sse("log", data, identity=format_position(position)))
    return b"".join(pieces)


async def follow_octets(
    logs: LogStore,
    hub: Hub,
    job: JobId,
    look: Callable[[], Seen],
    wanted: Wanted,
    offset: int,
    *,
    follow: bool,
    now: Callable[[], int],
) -> AsyncIterator[bytes]:
    """One rank's log as it is. ``now`` gives the plane's time."""
    attempt, rank = wanted.attempt or 1, wanted.rank or 0
    with hub.job(job) as bell:
        while True:
            seen = await run_in_threadpool(look)
            over = not follow or (
                seen.is_over and await run_in_threadpool(are_complete, logs, job, seen, wanted, now=now())
            )
            while data := await run_in_threadpool(logs.read, job, attempt, rank, offset, CHUNK_BYTES):
                offset += len(data)
                yield data
            if over or hub.closed:
                return
            await rung(bell, LOOK_S)
