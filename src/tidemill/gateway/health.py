"""Looks at replicas from outside their work: a small request every while, and at once when something broke.

A replica that refuses connections is gone. One that leaves probes unanswered is hung only when it was silent
altogether meanwhile: an engine that is too busy for its health check, but goes on answering requests, works.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable
from typing import Final

from tidemill.gateway.circuit import State
from tidemill.gateway.messages import ResponseHead, write_head
from tidemill.gateway.table import Replica, Route
from tidemill.gateway.upstream import Pool

OWN_TROUBLE: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM}
)
"""What keeps us from connecting without saying anything about the replica."""
_STALL_S: Final = 0.75
_AGAIN_S: Final = 0.25


class Prober:
    """Probes all replicas for as long as ``run`` runs.

    ``routes`` are those to look at; ``hung`` and ``gone`` are told of replicas that are to be ejected, ``well`` of
    those that answered. A replica is hung after ``misses`` probes in a row that took longer than ``patience_s``.
    """

    def __init__(
        self,
        routes: Callable[[], Iterable[Route]],
        *,
        hung: Callable[[Replica, str], None],
        gone: Callable[[Replica, str], None],
        well: Callable[[Replica], None],
        every_s: float = 2.0,
        patience_s: float = 2.5,
        misses: int = 2,
    ) -> None:
        self._routes = routes
        self._hung = hung
        self._gone = gone
        self._well = well
        self._every_s = every_s
        self._patience_s = patience_s
        self._misses = misses
        self._pool = Pool(connect_timeout_s=patience_s)
        self._due: dict[Replica, float] = {}
        self._missed: dict[Replica, int] = {}
        self._looking: dict[Replica, asyncio.Task[None]] = {}
        self._stalled_at = float("-inf")

    async def run(self, *, step_s: float = 0.1) -> None:
        """Probe for ever."""
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(step_s)
            now = loop.time()
            if now - before > step_s + _STALL_S:  # it was this process that hung
                self._stalled_at = now
            present: set[Replica] = set()
            for route in self._routes():
                for replica in route.replicas:
                    present.add(replica)
                    if now >= self._due.setdefault(replica, now):
                        self.look(replica, route.health if replica.health is None else replica.health)
            for gone in self._due.keys() - present:
                del self._due[gone]
                self._missed.pop(gone, None)

    def look(self, replica: Replica, path: str) -> None:
        """Probe now, unless a probe is under way."""
        if replica in self._looking:
            return
        loop = asyncio.get_running_loop()
        pause = self._every_s if replica.circuit.state is State.CLOSED else min(_AGAIN_S, self._every_s)
        self._due[replica] = loop.time() + pause
        task = self._looking[replica] = loop.create_task(self._probe(replica, path))
        task.add_done_callback(lambda _: self._looking.pop(replica, None))

    async def _probe(self, replica: Replica, path: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            status = await self._ask(replica, path or "/health")
        except TimeoutError:
            self._miss(replica, began)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                self._missed.pop(replica, None)
                self._gone(replica, "it refuses connections")
            elif error.errno not in OWN_TROUBLE:
                self._due[replica] = loop.time() + _AGAIN_S
                self._miss(replica, began)
        else:
            if path and status >= 500:  # where no path was agreed, any answer will do
                if self._count(replica) >= self._misses:
                    self._gone(replica, f"it says itself that it is not well: {path} answers {status}")
            else:
                self._missed.pop(replica, None)
                self._well(replica)

    async def _ask(self, replica: Replica, path: str) -> int:
        """The status of one probe's answer. Raises: OSError, TimeoutError."""
        async with asyncio.timeout(self._patience_s):
            connection = await self._pool.connect(replica.address)
            try:
                first = _First()
                target = replica.prefix + path.encode()
                headers = [(b"host", replica.authority), (b"connection", b"close")]
                connection.send(first, write_head(b"GET " + target + b" HTTP/1.1", headers))
                return await first.status
            finally:
                connection.abandon()

    def _miss(self, replica: Replica, began: float) -> None:
        if began <= self._stalled_at or replica.heard_at >= began:
            return
        missed = self._count(replica)
        if missed >= self._misses:
            self._hung(replica, f"{missed} probes were not answered within {self._patience_s:g} s, nor anything else")

    def _count(self, replica: Replica) -> int:
        """How many probes in a row were not answered well, with this one."""
        missed = self._missed[replica] = self._missed.get(replica, 0) + 1
        return missed


class _First:
    """Gets the status of a response and no more."""

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def response_started(self, head: ResponseHead) -> None:
        if not self.status.done():
            self.status.set_result(head.status)

    def response_data(self, data: bytes) -> None:
        pass

    def response_ended(self) -> None:
        pass

    def response_failed(self, reason: str, *, started: bool) -> None:
        if self.status.done():
            return
        if started:  # something answered, if not in HTTP
            self.status.set_result(0)
        else:
            self.status.set_exception(ConnectionResetError(errno.ECONNRESET, reason))
