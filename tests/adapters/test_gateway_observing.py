"""What the gateway tells of itself: latencies by OpenTelemetry's names, errors by code, and traces to a collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.test_gateway import GATEWAY, USER, Rig, eventually, get, live, parse, request
from tidemill.gateway.books import Books
from tidemill.gateway.metrics import Histogram
from tidemill.gateway.tracing import Tracer, _head, parent_of

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def series(text: bytes) -> dict[str, float]:
    return {key: float(value) for key, value in re.findall(r"^([^#\s].*) (\S+)$", text.decode(), re.MULTILINE)}


async def metrics_of(rig: Rig) -> dict[str, float]:
    return series(parse(await rig.raw(get("/metrics", token=GATEWAY)))[2])


def label(operation: str, **more: str) -> str:
    named = {
        "gen_ai_operation_name": operation,
        "gen_ai_provider_name": "tidemill",
        "gen_ai_request_model": "m",
        **more,
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in named.items()) + "}"


def test_latencies_and_tokens_are_told_by_model_and_operation(tmp_path: Path) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        rig.gateway.books = Books(tmp_path)
        for stream in (True, False, True):
            await rig.post({"model": "m", "stream": stream})
        await rig.raw(
            request({"model": "m", "mode": "die in stream"}, path="/v1/completions", headers="Connection: close\r\n")
        )
        await rig.raw(request({"model": "m", "mode": "refuses"}, headers="Connection: close\r\n"))
        told = await metrics_of(rig)
        assert told["gen_ai_server_request_duration_seconds_count" + label("chat", error_type="")] == 3
        assert told["gen_ai_server_request_duration_seconds_count" + label("chat", error_type="400")] == 1
        broken = label("text_completion", error_type="replica_failed")
        assert told["gen_ai_server_request_duration_seconds_count" + broken] == 1
        assert told["gen_ai_server_time_to_first_token_seconds_count" + label("chat")] == 2
        assert told["gen_ai_server_time_per_output_token_seconds_count" + label("chat")] == 2
        per_token = told["gen_ai_server_time_per_output_token_seconds_sum" + label("chat")] / 2
        assert 0.004 < per_token < 0.2, "five events, 5 ms apart"
        output = label("chat", gen_ai_token_type="output")
        assert told["gen_ai_client_token_usage_sum" + output] == 10
        assert told['tidemill_gateway_queue_seconds_count{model="m",operation="chat"}'] == 4
        status, _, _ = parse(await rig.raw(get("/v1/models", token="tm_user_wrong")))
        assert (await metrics_of(rig))[
            f'tidemill_gateway_refused_total{{status="{status}",code="invalid_api_key"}}'
        ] == 1
        rig.gateway.books.close()

    scene()


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.note(value)
    assert list(histogram.lines("h", 'a="b"')) == [
        'h_bucket{a="b",le="1"} 2', 'h_bucket{a="b",le="2"} 4', 'h_bucket{a="b",le="+Inf"} 5',
        'h_sum{a="b"} 14', 'h_count{a="b"} 5',
    ]  # fmt: skip


# Traces


class Collector:
    """Takes OTLP over HTTP, when it is not away."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.status = 200
        self.url = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Collector]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None
        body = json.loads(await reader.readexactly(int(length[1])))
        self.heads.append(head)
        if self.status == 200:
            for resource in body["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    self.spans += scope["spans"]
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" % self.status)
        await writer.drain()
        writer.close()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.spans if one["name"] == name]


@live()
async def test_a_request_is_traced_from_its_caller_to_the_replica(rig: Rig) -> None:
    async with Collector().listening() as collector:
        tracer = rig.gateway.tracer = Tracer(
            collector.url, metrics=rig.gateway.metrics, headers={"X-Collector-Key": "k"}
        )
        headers = f"Connection: close\r\ntraceparent: {PARENT}\r\ntracestate: a=1\r\nX-Request-Id: mine\r\n"
        await rig.raw(request({"model": "m", "stream": True}, headers=headers))
        assert await tracer.flush()
        (root,) = collector.named("chat m")
        assert (root["traceId"], root["parentSpanId"], root["kind"]) == (PARENT[3:35], PARENT[36:52], 2)
        assert f"traceparent: 00-{root['traceId']}-{root['spanId']}-01\r\n".encode() in rig.engine.heads[0]
        assert rig.engine.heads[0].count(b"traceparent") == 1
        assert b"tracestate: a=1" in rig.engine.heads[0]
        told = {one["key"]: next(iter(one["value"].values())) for one in root["attributes"]}
        assert told["gen_ai.request.model"] == "m"
        assert told["tidemill.request.id"] == "mine"
        assert told["http.response.status_code"] == "200"
        steps = [one for one in collector.spans if one is not root]
        assert sorted(one["name"] for one in steps) == ["admit", "connect", "first byte", "stream", "wait"]
        assert len({one["spanId"] for one in collector.spans}) == 6
        for one in steps:
            assert one["parentSpanId"] == root["spanId"]
            assert int(root["startTimeUnixNano"]) <= int(one["startTimeUnixNano"])
            assert int(one["startTimeUnixNano"]) <= int(one["endTimeUnixNano"]) <= int(root["endTimeUnixNano"])
        (stream,) = collector.named("stream")
        assert int(stream["endTimeUnixNano"]) - int(stream["startTimeUnixNano"]) > 10_000_000
        assert b"X-Collector-Key: k" in collector.heads[0]
        assert rig.gateway.metrics.spans == 6


@live()
async def test_a_trace_begins_here_when_the_caller_has_none_and_follows_what_the_caller_decided(rig: Rig) -> None:
    async with Collector().listening() as collector:
        tracer = rig.gateway.tracer = Tracer(collector.url, metrics=rig.gateway.metrics)
        bad = "traceparent: 00-zz-yy-01\r\ntracestate: evil=1\r\n"
        await rig.raw(request({"model": "m"}, headers="Connection: close\r\n" + bad))
        await rig.raw(request({"model": "m"}, headers=f"Connection: close\r\ntraceparent: {PARENT[:-1]}0\r\n"))
        assert await tracer.flush()
        (root,) = collector.named("chat m")
        assert "parentSpanId" not in root
        assert b"evil" not in rig.engine.heads[0]
        assert re.search(rb"traceparent: 00-[0-9a-f]{32}-[0-9a-f]{16}-01\r\n", rig.engine.heads[0])
        assert re.search(rb"traceparent: 00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-00\r\n", rig.engine.heads[1])


@live()
async def test_without_a_collector_the_callers_trace_passes_unchanged(rig: Rig) -> None:
    await rig.raw(request({"model": "m"}, headers=f"Connection: close\r\ntraceparent: {PARENT}\r\n"))
    assert f"traceparent: {PARENT}\r\n".encode() in rig.engine.heads[0]


@live()
async def test_a_collector_that_is_away_holds_nothing_up_and_what_is_too_much_is_counted(rig: Rig) -> None:
    async with Collector().listening() as collector:
        collector.status = 503
        tracer = rig.gateway.tracer = Tracer(collector.url, metrics=rig.gateway.metrics)
        status, _, _ = await rig.post({"model": "m"})
        assert status == 200
        assert not await tracer.flush()
        for _ in range(4100):
            trace = tracer.begin(_head(b""), 0.0)
            trace.name = "other"
            tracer.end(trace, 1.0)
        assert rig.gateway.metrics.spans_dropped == 6 + 4, "the request's, and as many as were too much"
        collector.status = 200
        running = asyncio.get_running_loop().create_task(tracer.run(every_s=0.01))
        await eventually(lambda: rig.gateway.metrics.spans == 4096)
        running.cancel()
        assert len(collector.spans) == 4096


@pytest.mark.parametrize(
    "value",
    [
        b"", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", PARENT.encode() + b"-more",
        b"ff" + PARENT[2:].encode(), PARENT.upper().encode(), b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01",
    ],
)  # fmt: skip
def test_what_is_no_trace_parent_is_none(value: bytes) -> None:
    assert parent_of(_head(value)) is None


def test_a_later_version_of_the_header_is_read_as_far_as_it_is_known() -> None:
    parent = parent_of(_head(b"01" + PARENT[2:].encode() + b"-more"))
    assert parent is not None
    assert parent.is_sampled
    assert USER.encode() not in parent.trace_id
