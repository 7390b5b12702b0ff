"""Engines that are elsewhere: calls wait here until the site's outposts, which dial in, fetch and answer them.

An outpost asks for calls and gets all that are not answered, each with a number; it carries them out and posts the
answers. A reply that is lost is no matter: what was not answered is handed out again, and every call of an engine may
be repeated. Nothing is kept across a restart of the control plane: whoever waited is gone, and looks again.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Final

from tidemill.errors import EngineLost, TidemillError
from tidemill.model.fleet import Node, Outpost
from tidemill.model.ids import LaunchId, NodeId, OutpostId, SiteId
from tidemill.model.plan import LaunchSpec, Observation, Sight
from tidemill.ports import Engine, EngineCapabilities
from tidemill.wire.outposts import EngineAnswer, EngineCall, raise_for

ANSWER_S: Final = 15.0
"""How long a caller waits for an answer."""
THERE_S: Final = 30.0
"""An outpost that did not ask for calls for so long is not there."""


@dataclass(slots=True)
class _Waiting:
    call: EngineCall
    answer: Future[EngineAnswer] = field(default_factory=Future)


class Mailbox:
    """The calls that wait for one outpost."""

    def __init__(self, outpost: Outpost, clock: Callable[[], float] = time.monotonic) -> None:
        self.outpost = outpost
        self.asked_s = float("-inf")
        self._clock = clock
        self._is_closed = False
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._fetchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def is_there(self) -> bool:
        """Whether its outpost asks for calls, now or a moment ago."""
        return not self._is_closed and (bool(self._fetchers) or self._clock() - self.asked_s < THERE_S)

    def send(self, method: str, **given: object) -> _Waiting:
        """A call that waits to be fetched. Raises: EngineLost when nobody serves the outpost any more."""
        call = EngineCall(number=next(self._numbers), method=method, **given)  # type: ignore[arg-type]
        waiting = _Waiting(call)
        with self._lock:
            if self._is_closed:
                raise EngineLost(f"{self.outpost.name} is not served any more")
            self._waiting[call.number] = waiting
            for loop, event in self._fetchers:
                loop.call_soon_threadsafe(event.set)
        return waiting

    def drop(self, waiting: _Waiting) -> None:
        """Nobody waits for that call any more: it is not handed out again."""
        with self._lock:
            self._waiting.pop(waiting.call.number, None)

    def hang_up(self) -> None:
        """Nobody serves the outpost any more: calls get no answer, now and later."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            each.answer.set_exception(EngineLost(f"{self.outpost.name} is not served any more"))

    async def fetch(self, after: int, wait_s: float) -> tuple[EngineCall, ...]:
        """The calls numbered above ``after`` that are not answered, at once when there are any; after ``wait_s``
        none."""
        event = asyncio.Event()
        fetcher = (asyncio.get_running_loop(), event)
        with self._lock:
            self._fetchers.append(fetcher)
        try:
            self.asked_s = self._clock()
            if not (calls := self._after(after)):
                try:
                    await asyncio.wait_for(event.wait(), wait_s)
                except TimeoutError:
                    return ()
                calls = self._after(after)
            return calls
        finally:
            self.asked_s = self._clock()
            with self._lock:
                self._fetchers.remove(fetcher)

    def answer(self, answers: Iterable[EngineAnswer]) -> None:
        """Give answers to whoever waits for them; those for which nobody does are passed over."""
        self.asked_s = self._clock()
        for answer in answers:
            with self._lock:
                waiting = self._waiting.pop(answer.number, None)
            if waiting is not None:
                waiting.answer.set_result(answer)

    def _after(self, number: int) -> tuple[EngineCall, ...]:
        with self._lock:
            return tuple(each.call for at, each in sorted(self._waiting.items()) if at > number)


class SiteEngine:
    """The engine of a site: that of this process if it is ``own``, and those of the outposts that dial in.

    Keeps the contract of engines. ``answer_s`` is how long a call waits for an outpost's answer, by ``clock``, which
    is in s and never jumps; ``wait`` does so, and raises TimeoutError when none comes.
    ``site_of`` tells where a node is known to be: an outpost speaks only for nodes of its own site that no other
    outpost works.
    """

    def __init__(
        self,
        site_id: SiteId,
        *,
        own: Engine | None = None,
        site_of: Callable[[NodeId], SiteId | None] = lambda _: None,
        answer_s: float = ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[Future[EngineAnswer], float], EngineAnswer] = Future.result,
    ) -> None:
        self.site_id = site_id
        self._site_of = site_of
        self._own = own
        self._own_nodes = frozenset(node.id for node in own.nodes()) if own is not None else frozenset[NodeId]()
        self._answer_s = answer_s
        self._clock = clock
        self._wait = wait
        self._boxes: dict[OutpostId, Mailbox] = {}
        self._where: dict[NodeId, OutpostId] = {}

    @property
    def capabilities(self) -> EngineCapabilities:
        """What can be done here; whether there can be images depends on the node, which says so itself."""
        if self._own is not None:
            return self._own.capabilities
        return EngineCapabilities(name="outposts", images=True, exec=True, places=True)

    @property
    def boxes(self) -> Mapping[OutpostId, Mailbox]:
        """The mailbox of each outpost of the site."""
        return self._boxes

    def add(self, outpost: Outpost) -> Mailbox:
        """The mailbox of an outpost of this site."""
        box = self._boxes.get(outpost.id) or Mailbox(outpost, self._clock)
        self._boxes = {**self._boxes, outpost.id: box}
        return box

    def remove(self, outpost_id: OutpostId) -> None:
        """An outpost does not belong to the site any more."""
        self._boxes = {key: box for key, box in self._boxes.items() if key != outpost_id}
        self._where = {node: key for node, key in self._where.items() if key != outpost_id}

    def is_own(self, node_id: NodeId) -> bool:
        """Whether that node is worked from this process."""
        return node_id in self._own_nodes

    def nodes_of(self, outpost_id: OutpostId) -> tuple[NodeId, ...]:
        """The nodes that an outpost was seen to work."""
        return tuple(sorted(node for node, outpost in self._where.items() if outpost == outpost_id))

    def nodes(self) -> tuple[Node, ...]:
        """The machines of this process and of the outposts that answer."""
        found = {node.id: node for node in self._own.nodes()} if self._own is not None else {}
        self._own_nodes |= frozenset(found)
        for box, answer in self._ask_all("nodes"):
            for node in answer.nodes:
                if self._claim(node.id, box):
                    found[node.id] = replace(node, site_id=self.site_id)
        return tuple(found.values())

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started; nothing more when its launch id was started before, even if it ended."""
        if self._own is not None and self.is_own(spec.node_id):
            self._own.launch(spec)
        else:
            self._ask(spec.node_id, "launch", spec=spec)

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        """Have a worker signalled, and killed with all it started after the grace; remembered when unknown."""
        if self._own is not None and self.is_own(node_id):
            self._own.stop(launch_id, node_id=node_id, grace_ns=grace_ns)
        else:
            self._ask(node_id, "stop", launch_id=launch_id, grace_ns=grace_ns)

    def observe(self) -> Sight:
        """What this process sees, and the outposts that answer; of the others nothing is said."""
        seen: list[Observation] = []
        nodes: set[NodeId] = set()
        cached: list[tuple[NodeId, tuple[str, ...]]] = []
        if self._own is not None:
            sight = self._own.observe()
            self._own_nodes |= sight.nodes
            seen, nodes, cached = list(sight.launches), set(sight.nodes), list(sight.cached)
        for box, answer in self._ask_all("observe"):
            seen += answer.seen
            its = {node for node in answer.looked_at if self._claim(node, box)}
            nodes |= its
            cached += [(node, copies) for node, copies in answer.cached if node in its]
        return Sight(nodes=frozenset(nodes), launches=tuple(seen), cached=tuple(cached))

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:
        """Drop what is kept of a launch that is gone; refused while anything of it lives; harmless twice."""
        if self._own is not None and self.is_own(node_id):
            self._own.forget(launch_id, node_id=node_id)
        else:
            self._ask(node_id, "forget", launch_id=launch_id)

    def read_file(self, path: str, offset: int, size: int, *, node_id: NodeId | None) -> bytes:
        """Part of a file of an outpost's machine: of the one that works that node, or of any that can read it.

        Raises: EngineLost when none answers, EngineRefused when none has it.
        """
        where = self._where.get(node_id, OutpostId("")) if node_id is not None else ""
        boxes = [box for key, box in self._boxes.items() if box.is_there and (node_id is None or key == where)]
        refusal: TidemillError = EngineLost(f"no outpost of {self.site_id} answers that could read {path}")
        for box in boxes:
            try:
                return self._await(box, box.send("read", path=path, offset=offset, size=size)).content
            except TidemillError as error:
                refusal = error
        raise refusal

    def close(self) -> None:
        """Let go without touching what runs: whoever waits for an outpost's answer gets none."""
        for box in self._boxes.values():
            box.hang_up()

    def speaks_for(self, outpost_id: OutpostId, node_id: NodeId) -> bool:
        """Whether an outpost may tell of a node, which is known, of this site, and no other outpost works it."""
        box = self._boxes.get(outpost_id)
        return box is not None and self._site_of(node_id) == self.site_id and self._claim(node_id, box)

    def _claim(self, node_id: NodeId, box: Mailbox) -> bool:
        """Whether an outpost may speak for a node: it is of this site, and no other outpost that is there works it."""
        other = self._boxes.get(self._where.get(node_id, box.outpost.id))
        if self._site_of(node_id) not in (None, self.site_id) or node_id in self._own_nodes:
            return False
        if other is not None and other is not box and other.is_there:
            return False
        self._where[node_id] = box.outpost.id
        return True

    def _ask(self, node_id: NodeId, method: str, **given: object) -> EngineAnswer:
        box = self._boxes.get(self._where.get(node_id, OutpostId("")))
        if box is None or not box.is_there:
            raise EngineLost(f"no outpost of {self.site_id} answers for {node_id}")
        return self._await(box, box.send(method, node_id=node_id, **given))

    def _ask_all(self, method: str) -> Sequence[tuple[Mailbox, EngineAnswer]]:
        """The answers that come; each call is made after this one began."""
        sent = [(box, box.send(method)) for box in self._boxes.values() if box.is_there]
        answers: list[tuple[Mailbox, EngineAnswer]] = []
        until_s = self._clock() + self._answer_s
        for box, waiting in sent:
            try:
                answers.append((box, self._await(box, waiting, max(0.0, until_s - self._clock()))))
            except TidemillError:
                continue
        return answers

    def _await(self, box: Mailbox, waiting: _Waiting, within_s: float | None = None) -> EngineAnswer:
        try:
            answer = self._wait(waiting.answer, self._answer_s if within_s is None else within_s)
        except TimeoutError:
            box.drop(waiting)
            raise EngineLost(f"{box.outpost.name} did not answer in time") from None
        raise_for(answer)
        return answer
