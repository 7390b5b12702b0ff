"""Commands inside workers: joins what a client and a runner each send over their own two HTTP bodies.

Neither side waits in memory for the other: a full pipe stops its writer, and so, through TCP, the far end. Either
side may come first. Everything here is used from one event loop.
A frame is one byte of type, four bytes of length (big-endian) and the payload; they pass through unread, but for
where they begin, so that the last word can be a frame of our own when a side goes away.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidemill.errors import Conflict, NotFound, Unavailable
from tidemill.model.ids import JobId, LaunchId, ProjectId

PIPE_BYTES: Final = 256 * 1024
PIECE_BYTES: Final = 65_536
ARRIVAL_S: Final = 20.0
"""How long a side has to turn up after the session was opened."""
MAX_WAITING: Final = 64
"""Commands that may wait for one runner."""
_HEAD: Final = struct.Struct(">cI")


class Broken(Exception):
    """Nobody reads the other end any more."""


class Pipe:
    """Octets from one writer to one reader, at most ``limit`` of them on the way."""

    def __init__(self, limit: int = PIPE_BYTES) -> None:
        self._limit = limit
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self.ended = False
        """The writer has written all."""
        self.unread = False
        """The reader is gone."""

    async def write(self, data: bytes) -> None:
        """Nothing, when there was room for it. Raises: Broken."""
        view = memoryview(data)
        while view:
            while self._size >= self._limit and not self.unread:
                await self._change()
            if self.unread or self.ended:
                raise Broken
            piece = bytes(view[: min(PIECE_BYTES, self._limit - self._size)])
            view = view[len(piece) :]
            self._pieces.append(piece)
            self._size += len(piece)
            self._tell()

    async def read(self) -> bytes:
        """The next octets; none at the end."""
        while not self._pieces and not self.ended:
            await self._change()
        if not self._pieces:
            return b""
        piece = self._pieces.popleft()
        self._size -= len(piece)
        self._tell()
        return piece

    def end(self, last: bytes = b"") -> None:
        """Nothing more comes, but for ``last``, for which there is always room; harmless twice."""
        if not self.ended:
            if last:
                self._pieces.append(last)
                self._size += len(last)
            self.ended = True
            self._tell()

    def abandon(self) -> None:
        """Nobody will read the rest; harmless twice."""
        self.unread = True
        self._pieces.clear()
        self._size = 0
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()


class FrameEdge:
    """Where frames begin in octets cut anywhere. ``kinds`` are the types of the frames that were begun."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self.kinds: set[bytes] = set()

    @property
    def between(self) -> bool:
        """Whether the octets so far end where a frame ends."""
        return not self._head and not self._left

    def feed(self, data: bytes) -> None:
        """Go on by these octets."""
        view = memoryview(data)
        while view:
            step = min(self._left, len(view))
            self._left -= step
            view = view[step:]
            if view:
                taken = _HEAD.size - len(self._head)
                self._head += bytes(view[:taken])
                view = view[taken:]
                if len(self._head) == _HEAD.size:
                    kind, self._left = _HEAD.unpack(self._head)
                    self._head = b""
                    self.kinds.add(kind)


@dataclass(slots=True, eq=False)
class Session:
    """One command inside one worker."""

    id: str
    launch_id: LaunchId
    job_id: JobId
    project_id: ProjectId
    organization_id: str
    to_runner: Pipe
    to_client: Pipe
    edge: FrameEdge
    taken: set[str]
    """The ends that have turned up: ``client/input``, ``client/output``, ``runner/input``, ``runner/output``."""
    timer: asyncio.TimerHandle | None = None

    def take(self, end: str) -> None:
        """Nothing; that end is served now. Raises: Conflict when it is served already."""
        if end in self.taken:
            raise Conflict("Somebody is connected there already.", field="exec_id", value=self.id)
        self.taken.add(end)

    async def from_runner(self, data: bytes) -> None:
        """Pass on what the runner sent. Raises: Broken when the client is gone."""
        self.edge.feed(data)
        await self.to_client.write(data)

    def runner_done(self) -> None:
        """The runner sends no more; without an exit status or an error before, the client is told so."""
        complete = self.edge.between and self.edge.kinds & {b"x", b"r"}
        lost = b"" if complete or not self.edge.between else frame(b"r", b"The connection to the worker broke.")
        self.to_client.end(lost)
        self.to_runner.abandon()


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """The octets of one frame."""
    return _HEAD.pack(kind, len(payload)) + payload


class Relay:
    """All sessions, and the commands that wait for their runners."""

    def __init__(self, *, arrival_s: float = ARRIVAL_S, make_id: Callable[[], str] | None = None) -> None:
        self._arrival_s = arrival_s
        self._make_id = make_id or (lambda: "exec_" + secrets.token_hex(16))
        self._sessions: dict[str, Session] = {}
        self._queues: dict[LaunchId, deque[dict[str, Any]]] = {}
        self._bells: dict[LaunchId, asyncio.Event] = {}
        self._closed = False

    def __len__(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def open(
        self,
        launch_id: LaunchId,
        request: Mapping[str, Any],
        *,
        job_id: JobId,
        project_id: ProjectId,
        organization_id: str,
    ) -> Session:
        """A new session, whose request waits for the launch's runner.

        Raises: Unavailable when too many wait for it, or when the relay is closed.
        """
        queue = self._queues.setdefault(launch_id, deque())
        if len(queue) >= MAX_WAITING or self._closed:
            raise Unavailable("The worker's runner does not take commands now.", mend="Try again in a moment.")
        session = Session(
            id=self._make_id(),
            launch_id=launch_id,
            job_id=job_id,
            project_id=project_id,
            organization_id=organization_id,
            to_runner=Pipe(),
            to_client=Pipe(),
            edge=FrameEdge(),
            taken=set(),
        )
        self._sessions[session.id] = session
        queue.append({"type": "exec", "exec_id": session.id, **request})
        self._ring(launch_id)
        session.timer = asyncio.get_running_loop().call_later(self._arrival_s, self._late, session)
        return session

    def session(self, exec_id: str) -> Session:
        """Raises: NotFound."""
        try:
            return self._sessions[exec_id]
        except KeyError:
            raise NotFound("There is no such command; it may be over.", field="exec_id", value=exec_id) from None

    def leave(self, session: Session, end: str) -> None:
        """That end went away. When both outputs are done with, the session is over."""
        match end:
            case "client/input":
                session.to_runner.end()
            case "client/output":
                session.to_client.abandon()
                session.to_runner.end()
                self._forget(session)
            case "runner/input":
                session.to_runner.abandon()
            case "runner/output":
                session.runner_done()
                if session.to_client.unread:
                    self._forget(session)

    async def commands(self, launch_id: LaunchId, *, wait_s: float) -> list[dict[str, Any]]:
        """What waits for that launch's runner, each given once; empty when nothing came in ``wait_s`` seconds."""
        if launch_id not in self._queues and wait_s > 0 and not self._closed:
            bell = self._bells.setdefault(launch_id, asyncio.Event())
            try:
                async with asyncio.timeout(wait_s):
                    await bell.wait()
            except TimeoutError:
                self._ring(launch_id)
        queue = self._queues.pop(launch_id, deque())
        return [command for command in queue if command["exec_id"] in self._sessions]

    def close(self) -> None:
        """End every session and every wait; harmless twice."""
        self._closed = True
        for session in list(self._sessions.values()):
            session.to_client.end(frame(b"r", b"The control plane is shutting down.") if session.edge.between else b"")
            session.to_runner.end()
            self._forget(session)
        for launch_id in list(self._bells):
            self._ring(launch_id)

    def _ring(self, launch_id: LaunchId) -> None:
        bell = self._bells.pop(launch_id, None)
        if bell is not None:
            bell.set()

    def _late(self, session: Session) -> None:
        if not {"runner/input", "runner/output"} & session.taken:
            session.to_client.end(frame(b"r", b"The worker did not take the command; it may be starting or ending."))
            session.to_runner.end()
        if not {"client/input", "client/output"} & session.taken:
            self.leave(session, "client/output")
        elif session.to_client.ended and "client/output" not in session.taken:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.id, None)
        if session.timer is not None:
            session.timer.cancel()
