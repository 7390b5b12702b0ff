"""Event streams that survive broken connections: no gap, no repeat.

A server-sent event counts only once its closing blank line is there, so what a broken connection leaves
half-sent is dropped and asked for again: the id of the last whole event goes back as ``Last-Event-ID``. Log
events name the end offset of every worker's log so far; a chunk below it is one that was seen already.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tidemill.errors import Unavailable
from tidemill.sdk.results import Event, Job, JobUpdate, LogChunk
from tidemill.sdk.transport import Attempts, OnRetry, Stream, Transport

SILENCE_S = 35.0
"""The control plane pings every 10 s; after more than three missed pings the connection is taken for dead."""


@dataclass(frozen=True)
class ServerEvent:
    """One server-sent event."""

    type: str
    data: str
    id: str


class EventParser:
    """Server-sent events out of octets cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[ServerEvent]:
        """The events that ``piece`` completes."""
        *blocks, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            fields: dict[str, list[str]] = {}
            for line in block.decode("utf-8", "replace").split("\n"):
                name, _, value = line.partition(":")
                if name:
                    fields.setdefault(name, []).append(value.removeprefix(" "))
            if "data" in fields or "event" in fields:
                yield ServerEvent(
                    fields.get("event", ["message"])[-1], "\n".join(fields.get("data", [])), fields.get("id", [""])[-1]
                )


class EventFeed:
    """An endless iterator of events that connects again whenever the connection breaks.

    ``give_up_s`` is how long the control plane may be unreachable at a stretch. An exception from outside
    (Ctrl-C) leaves it usable: the next ``next()`` goes on after the last event that was handed out.
    """

    def __init__(
        self,
        open_stream: Callable[[Mapping[str, str]], Stream],
        *,
        give_up_s: float,
        on_retry: OnRetry | None = None,
        last_id: str = "",
    ) -> None:
        self.last_id = last_id
        self._open_stream = open_stream
        self._give_up_s = give_up_s
        self._on_retry = on_retry
        self._stream: Stream | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._parser = EventParser()
        self._ready: list[ServerEvent] = []
        self._heard = time.monotonic()

    def __iter__(self) -> EventFeed:
        return self

    def __next__(self) -> ServerEvent:
        """Raises: Unavailable when the control plane stays away for too long, or what it answers instead."""
        try:
            while not self._ready:
                self._receive()
        except BaseException:
            self.close()
            raise
        event = self._ready.pop(0)
        if event.id:
            self.last_id = event.id
        return event

    def close(self) -> None:
        """Hang up; harmless twice, and ``next()`` would connect again."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._ready = None, []

    def _receive(self) -> None:
        for attempt in Attempts(self._give_up_s, self._on_retry):
            with attempt:
                if self._stream is None:
                    self._connect()
                piece = next(self._pieces, None)
                if piece is None:  # ended without an ``end`` event: as good as broken
                    self.close()
                    raise Unavailable("the control plane ended the stream early")
                self._ready.extend(self._parser.feed(piece))
                return
            self.close()

    def _connect(self) -> None:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self.last_id:
            headers["Last-Event-ID"] = self.last_id
        self._stream = self._open_stream(headers)
        self._pieces = iter(self._stream)
        self._parser = EventParser()


class LogFollower:
    """A job's log as it grows, with the job's changes between, until the job ended and its log is complete."""

    def __init__(self, feed: EventFeed) -> None:
        self._feed = feed
        self._ends: dict[tuple[int, int], int] = {}
        self._job: Job | None = None
        self._is_over = False

    def __iter__(self) -> LogFollower:
        return self

    def __next__(self) -> LogChunk | JobUpdate:
        while not self._is_over:
            event = next(self._feed)
            if event.type == "end":
                self._is_over = True
                break
            read = self._read(event)
            if read is not None:
                return read
        self._feed.close()
        raise StopIteration

    def close(self) -> None:
        """Hang up; harmless twice."""
        self._feed.close()

    def _read(self, event: ServerEvent) -> LogChunk | JobUpdate | None:
        if event.type == "job":
            job = Job.from_json(json.loads(event.data))
            if job == self._job:
                return None  # what a new connection begins with
            self._job = job
            return JobUpdate(job=job)
        if event.type != "log":
            return None
        chunk = LogChunk.from_json(json.loads(event.data))
        key = chunk.attempt, chunk.rank
        seen = self._ends.get(key, 0)
        end = offsets_of(event.id).get(key, chunk.offset + len(chunk.text.encode()))
        if end <= seen:
            return None
        self._ends[key] = end
        if chunk.offset < seen:
            kept = chunk.text.encode()[seen - chunk.offset :].decode("utf-8", "replace")
            return LogChunk(rank=chunk.rank, attempt=chunk.attempt, offset=seen, text=kept)
        return chunk


def offsets_of(event_id: str) -> dict[tuple[int, int], int]:
    """The end offsets by (attempt, rank) in a log event's id such as ``2:0=123,1=456``.

    >>> offsets_of("2:0=123,1=456")[2, 1]
    456
    """
    found: dict[tuple[int, int], int] = {}
    attempt = "0"
    for part in event_id.split(","):
        where, _, offset = part.partition("=")
        before, colon, rank = where.rpartition(":")
        attempt = before if colon else attempt
        if attempt.isdigit() and rank.isdigit() and offset.isdigit():
            found[int(attempt), int(rank)] = int(offset)
    return found


def follow_log(
    transport: Transport,
    path: str,
    *,
    query: Mapping[str, Any],
    give_up_s: float,
    on_retry: OnRetry | None = None,
) -> LogFollower:
    """The log at ``path`` as it grows."""
    return LogFollower(
        EventFeed(
            lambda headers: transport.open("GET", path, query=query, headers=headers, timeout_s=SILENCE_S),
            give_up_s=give_up_s,
            on_retry=on_retry,
        )
    )


def follow_events(transport: Transport, *, after: int, give_up_s: float) -> Iterator[Event]:
    """The event log as it grows."""
    feed = EventFeed(
        lambda headers: transport.open(
            "GET",
            "/v1/events",
            query={"after": after or None, "follow": True},
            headers=headers,
            timeout_s=SILENCE_S,
        ),
        give_up_s=give_up_s,
    )
    seen = after
    for event in feed:
        seq = int(event.id) if event.id.isdigit() else 0
        if seq > seen:
            seen = seq
            data = json.loads(event.data)
            yield Event(seq=seq, type=event.type, data=data if isinstance(data, dict) else {"value": data})
