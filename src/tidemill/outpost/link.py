"""The conversation with the control plane: fetch calls, carry them out, post the answers. Everything is dialled out.

Calls about one launch are carried out in order, those about different launches side by side, looks beside all of them.
What could not be posted is posted again; a call that comes twice is carried out twice, which is harmless.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from http.client import HTTPException
from typing import Final
from zlib import crc32

import msgspec

from tidemill.model.events import Fact
from tidemill.model.plan import LaunchSpec
from tidemill.outpost.carrying import carry_out
from tidemill.ports import Engine
from tidemill.runner.client import Channel, Refused, Unreachable
from tidemill.wire.outposts import EngineAnswer, EngineCall, OutpostCalls, report_of

log = logging.getLogger(__name__)
_LANES: Final = 4
_WAIT_S: Final = 10.0
_FACTS_S: Final = 5.0
_KEPT: Final = 10_000
"""Facts that are kept while the control plane cannot be reached; the oldest go first."""
_CALLS: Final = msgspec.json.Decoder(OutpostCalls)
_REPORTS: Final = msgspec.json.Encoder()


class Removed(Exception):
    """This outpost does not belong to the cloud any more."""


class Link:
    """One outpost at work. ``channel`` leads to the control plane, ``api_url`` is where workers here reach it,
    ``ca`` what vouches for it, as PEM, where that is not what all trust.

    ``facts`` gives what the machines have to tell since it was last asked; ``offer`` what those need to know that join
    the cluster which this outpost heads; ``moved`` takes the addresses of all control planes, first the one that
    answers, when they change.
    """

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        *,
        api_url: str,
        ca: str = "",
        facts: Callable[[], Iterable[Fact]] = tuple,
        offer: Callable[[], tuple[tuple[str, str], ...]] = tuple,
        moved: Callable[[tuple[str, ...]], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._api_url = api_url
        self._ca = ca
        self._facts = facts
        self._offer = offer
        self._moved = moved
        self._session = ""
        self._epoch = 0
        self._replicas: tuple[str, ...] = ()
        self._last = 0
        self._closing = threading.Event()
        self._lanes: list[queue.SimpleQueue[tuple[str, EngineCall] | None]] = [
            queue.SimpleQueue() for _ in range(_LANES + 2)
        ]
        self._to_post = threading.Condition()
        self._answers: list[tuple[str, EngineAnswer]] = []
        self._told: deque[Fact] = deque(maxlen=_KEPT)
        self._offered: tuple[tuple[str, str], ...] = ()
        self._posting = channel.copy()
        self._threads = [
            *(threading.Thread(target=self._work, args=(lane,), name="call", daemon=True) for lane in self._lanes),
            threading.Thread(target=self._post_forever, name="post", daemon=True),
            threading.Thread(target=self._gather, name="gather", daemon=True),
        ]

    def run(self) -> None:
        """Serve until ``close``. Raises: Removed when the control plane does not know this outpost any more."""
        for thread in self._threads:
            thread.start()
        try:
            while not self._closing.is_set():
                try:
                    self._fetch()
                except Unreachable as error:
                    log.debug("the control plane cannot be reached: %s", error)
                    self._channel.rest(self._closing)
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving; what runs goes on."""
        self._closing.set()
        for lane in self._lanes:
            lane.put(None)
        with self._to_post:
            self._to_post.notify_all()
        self._channel.abort()

    def _fetch(self) -> None:
        try:
            response = self._channel.open("GET", f"/calls?after={self._last}&wait={_WAIT_S:g}", timeout_s=_WAIT_S + 5.0)
            found = _CALLS.decode(response.read())
        except Refused as refusal:
            if refusal.status in (401, 403, 404):
                raise Removed(str(refusal)) from refusal
            raise Unreachable(str(refusal)) from refusal
        except (OSError, HTTPException, msgspec.MsgspecError) as error:  # also one that broke off in the middle
            self._channel.turn_away(is_silent=isinstance(error, TimeoutError))
            raise Unreachable(str(error)) from error
        if found.epoch < self._epoch:
            self._channel.turn_away()
            raise Unreachable(f"a control plane that does not lead any more answered: its epoch is {found.epoch}")
        self._epoch = found.epoch
        replicas = tuple(dict.fromkeys((self._channel.asks, *found.replicas))) if found.replicas else ()
        if replicas != self._replicas:
            self._replicas = replicas
            self._moved(replicas)
        if found.session != self._session:
            if self._session and self._last:
                self._session, self._last = found.session, 0
                return  # calls of the new session were filtered by a number of the old one: ask again
            self._session = found.session
        for call in found.calls:
            self._last = max(self._last, call.number)
            at = crc32(str(call.spec.launch_id if call.spec else call.launch_id).encode()) % _LANES
            at = {"observe": _LANES, "nodes": _LANES, "read": _LANES + 1}.get(call.method, at)
            self._lanes[at].put((found.session, call))

    def _work(self, lane: queue.SimpleQueue[tuple[str, EngineCall] | None]) -> None:
        while (taken := lane.get()) is not None:
            session, call = taken
            if session != self._session:
                continue  # whoever asked for it is gone
            if call.spec is not None:
                call = replace(call, spec=self._seen_from_here(call.spec))
            answer = carry_out(self._engine, call)
            if answer.outcome != "done":
                log.info("%s %s: %s: %s", call.method, call.node_id, answer.outcome, answer.detail)
            with self._to_post:
                self._answers.append((session, answer))
                self._to_post.notify_all()

    def _seen_from_here(self, spec: LaunchSpec) -> LaunchSpec:
        """The launch with the addresses of the control planes as they are from here."""
        variables = dict(spec.environment_variables)
        if variables.get("TIDEMILL_API_URL") == spec.api_url:
            variables["TIDEMILL_API_URL"] = self._api_url
            variables["TIDEMILL_API_URLS"] = ",".join(dict.fromkeys((self._api_url, *self._replicas)))
            if self._ca:
                variables["TIDEMILL_API_CA"] = self._ca
        return replace(spec, api_url=self._api_url, environment_variables=tuple(variables.items()))

    def _gather(self) -> None:
        while not self._closing.wait(_FACTS_S):
            try:
                facts = list(self._facts())
                offer = self._offer()
            except Exception:
                log.exception("what the machines report cannot be taken")
                continue
            with self._to_post:
                self._told.extend(facts)
                if offer != self._offered:
                    self._offered = offer
                    self._answers.append(("", EngineAnswer(number=0)))
                self._to_post.notify_all()

    def _post_forever(self) -> None:
        while not self._closing.is_set():
            with self._to_post:
                while not (self._answers or self._told or self._closing.is_set()):
                    self._to_post.wait()
                answers, told = list(self._answers), list(self._told)
            while not self._closing.is_set():
                try:
                    self._post(answers, told)
                    break
                except Unreachable as error:
                    log.debug("answers could not be posted: %s", error)
                    self._posting.rest(self._closing)
            with self._to_post:
                del self._answers[: len(answers)]
                for fact in told:
                    if self._told and self._told[0] is fact:
                        self._told.popleft()
        self._posting.close()

    def _post(self, answers: list[tuple[str, EngineAnswer]], told: list[Fact]) -> None:
        session = self._session
        report = replace(
            report_of(told),
            session=session,
            answers=tuple(answer for asked, answer in answers if asked == session),
            offer=self._offered,
        )
        try:
            self._posting.call("POST", "/report", _REPORTS.encode(report))
        except Refused as refusal:
            if refusal.status in (400, 413, 422):
                log.error("a report was refused and is dropped: %s", refusal)
                return
            raise Unreachable(str(refusal)) from refusal
