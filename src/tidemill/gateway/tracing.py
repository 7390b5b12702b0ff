"""Traces: W3C's context in and out, spans of what the gateway does with a request, and their way to a collector.

A request's spans are times that the exchange notes anyway; they become OTLP in a thread of the exporter, which sends
them a second apart. While the collector is away the newest wait, up to a bound, and the others are counted as dropped.
Sources: W3C, "Trace Context"; OpenTelemetry, "OTLP/HTTP" in its JSON encoding.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from tidemill import __version__
from tidemill.gateway.messages import RequestHead
from tidemill.gateway.metrics import Metrics

_PARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED: Final = 1
_MOST_WAITING: Final = 4096
_BATCH: Final = 256
_SERVER: Final = 2
_INTERNAL: Final = 1
_ERROR: Final = 2
_log = logging.getLogger("tidemill.gateway")


@dataclass(frozen=True, slots=True)
class Parent:
    """Who called, in the caller's trace."""

    trace_id: bytes
    span_id: bytes
    is_sampled: bool


def parent_of(head: RequestHead) -> Parent | None:
    """What the header ``traceparent`` says; None when there is none that is valid, or more than one.

    >>> parent_of(_head(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")).is_sampled
    True
    >>> parent_of(_head(b"00-00000000000000000000000000000000-b7ad6b7169203331-01"))
    """
    found = [value for name, value in head.headers if name == b"traceparent"]
    match = _PARENT.fullmatch(found[0]) if len(found) == 1 else None
    if match is None or match[1] == b"ff" or not match[2].strip(b"0") or not match[3].strip(b"0"):
        return None
    if match[1] == b"00" and len(found[0]) != 55:
        return None
    return Parent(match[2], match[3], bool(int(match[4], 16) & _SAMPLED))


@dataclass(slots=True)
class Trace:
    """One request's span, with what it is made of: times are the loop's, in seconds."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    is_sampled: bool
    began_at: float
    steps: list[tuple[str, float, float]] = field(default_factory=list)
    """Name, from, to."""
    ended_at: float = 0.0
    name: str = ""
    error: str = ""
    attributes: dict[str, str | int] = field(default_factory=dict)

    @property
    def header(self) -> bytes:
        """``traceparent`` for the replica."""
        return b"00-%b-%b-%02x" % (self.trace_id, self.span_id, self.is_sampled)

    def step(self, name: str, since: float, until: float) -> None:
        """Something took from ``since`` to ``until``."""
        if self.is_sampled:
            self.steps.append((name, since, until))


class Tracer:
    """Begins traces, and hands those that are sampled to a collector at ``endpoint``, such as http://collector:4318.

    ``ratio`` of the requests whose caller does not say are sampled. ``headers`` go with what is sent.
    """

    def __init__(
        self, endpoint: str, *, metrics: Metrics, ratio: float = 1.0, headers: Mapping[str, str] | None = None,
        instance: str = "", timeout_s: float = 10.0,
    ) -> None:  # fmt: skip
        self._url = endpoint.rstrip("/") + "/v1/traces"
        self._ratio = ratio
        self._headers = {**(headers or {}), "Content-Type": "application/json"}
        self._instance = instance
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._over: deque[Trace] = deque()
        self._dice = random.Random()  # noqa: S311 - ids are no secrets
        self._is_away = False

    def begin(self, head: RequestHead, now: float) -> Trace:
        """The span of a request."""
        parent = parent_of(head)
        span_id = b"%016x" % (self._dice.getrandbits(64) or 1)
        if parent is not None:
            return Trace(parent.trace_id, span_id, parent.span_id, parent.is_sampled, now)
        trace_id = b"%032x" % (self._dice.getrandbits(128) or 1)
        return Trace(trace_id, span_id, b"", self._dice.random() < self._ratio, now)

    def end(self, trace: Trace, now: float) -> None:
        """It is over, and is to be sent."""
        if not trace.is_sampled:
            return
        trace.ended_at = now
        if len(self._over) >= _MOST_WAITING:
            self._drop([self._over.popleft()])
        self._over.append(trace)

    async def run(self, *, every_s: float = 1.0) -> None:
        """Send what is over, for ever."""
        while True:
            await asyncio.sleep(every_s)
            while self._over and await self.flush():
                pass

    async def flush(self) -> bool:
        """Whether the collector took the oldest ones, or there were none."""
        batch = [self._over.popleft() for _ in range(min(_BATCH, len(self._over)))]
        if not batch:
            return True
        offset_ns = time.time_ns() - round(asyncio.get_running_loop().time() * 1e9)
        try:
            await asyncio.to_thread(self._send, batch, offset_ns)
        except (OSError, ValueError) as error:
            if not self._is_away:
                _log.warning("the collector of traces takes nothing: %s", error)
            self._is_away = True
            kept = max(0, _MOST_WAITING - len(self._over))
            self._drop(batch[: len(batch) - kept] if kept < len(batch) else [])
            self._over.extendleft(reversed(batch[len(batch) - kept :] if kept < len(batch) else batch))
            return False
        self._is_away = False
        self._metrics.spans += sum(1 + len(one.steps) for one in batch)
        return True

    def _drop(self, traces: Sequence[Trace]) -> None:
        self._metrics.spans_dropped += sum(1 + len(one.steps) for one in traces)

    def _send(self, batch: Sequence[Trace], offset_ns: int) -> None:
        body = orjson.dumps(document(batch, offset_ns=offset_ns, instance=self._instance))
        request = urllib.request.Request(self._url, body, self._headers, method="POST")  # noqa: S310 - checked: http(s)
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
            answer.read(65_536)


def document(traces: Sequence[Trace], *, offset_ns: int, instance: str) -> dict[str, Any]:
    """What OTLP/HTTP sends; ``offset_ns`` is added to the loop's time to give that of day."""
    spans = [span for one in traces for span in _spans(one, offset_ns)]
    resource = {
        "service.name": "tidemill-gateway",
        "service.version": __version__,
        "service.instance.id": instance or str(os.getpid()),
    }
    scope = {"name": "tidemill.gateway", "version": __version__}
    return {
        "resourceSpans": [
            {"resource": {"attributes": _attributes(resource)}, "scopeSpans": [{"scope": scope, "spans": spans}]}
        ]
    }


def headers_of(text: str) -> dict[str, str]:
    """Headers as OTEL_EXPORTER_OTLP_HEADERS writes them: name=value,name=value.

    >>> headers_of("api-key=abc, x=1")
    {'api-key': 'abc', 'x': '1'}
    """
    pairs = (one.partition("=") for one in text.split(",") if "=" in one)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _spans(trace: Trace, offset_ns: int) -> list[dict[str, Any]]:
    root: dict[str, Any] = {
        "traceId": trace.trace_id.decode(),
        "spanId": trace.span_id.decode(),
        "name": trace.name,
        "kind": _SERVER,
        **_times(trace.began_at, trace.ended_at, offset_ns),
        "attributes": _attributes(trace.attributes),
    }
    if trace.parent_id:
        root["parentSpanId"] = trace.parent_id.decode()
    if trace.error:
        root["status"] = {"code": _ERROR, "message": trace.error}
    number = int(trace.span_id, 16)
    return [
        root,
        *(
            {
                "traceId": root["traceId"],
                "spanId": f"{(number ^ (0x9E3779B97F4A7C15 * place)) & (2**64 - 1):016x}",
                "parentSpanId": root["spanId"],
                "name": name,
                "kind": _INTERNAL,
                **_times(since, until, offset_ns),
            }
            for place, (name, since, until) in enumerate(trace.steps, 1)
        ),
    ]


def _times(since: float, until: float, offset_ns: int) -> dict[str, str]:
    return {
        "startTimeUnixNano": str(round(since * 1e9) + offset_ns),
        "endTimeUnixNano": str(round(max(since, until) * 1e9) + offset_ns),
    }


def _attributes(values: Mapping[str, str | int]) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
    ]


def _head(traceparent: bytes) -> RequestHead:
    """A request with that header, for examples."""
    return RequestHead(
        method=b"POST", target=b"/", http_1_0=False, headers=[(b"traceparent", traceparent)], host=b"", length=0,
        keep_alive=True, expects_continue=False,
    )  # fmt: skip
