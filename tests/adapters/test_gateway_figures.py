"""Engines' own figures: by the names of each engine, whatever else they say; and the report that all of it goes into."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.test_gateway import GATEWAY, PEPPER, feed_of
from tidemill.api.shapes.gateway import LoadIn
from tidemill.control.loads import FeltCounts, Load, Loads, ModelLoad
from tidemill.core.buckets import bucket_of
from tidemill.gateway.scraping import Figures, Scraper, first_token_s, read_figures
from tidemill.gateway.server import Gateway
from tidemill.gateway.table import read_feed
from tidemill.units import SECOND_NS

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 8.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m\\"} 9{"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 77.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.8125
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 33.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 90.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"} 96.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 100.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 100.0
"""
SGLANG = b"""sglang:num_running_reqs{model_name="m",tp_rank="0"} 5.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 11.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
sglang:gen_throughput{model_name="m"} 120.0
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (VLLM, (12, 5, 812)),
        (b'vllm:num_requests_waiting{model_name="m"} 1.0\nvllm:gpu_cache_usage_perc{model_name="m"} 0.5\n', (None, 1, 500)),
        (SGLANG, (5, 11, 280)),
        (b"tgi_queue_size 4\ntgi_batch_current_size 3\n", (3, 4, None)),
        (b"llamacpp:requests_processing 1\nllamacpp:requests_deferred 6\n", (1, 6, None)),
        (b"vllm:num_requests_waiting NaN\nvllm:kv_cache_usage_perc 17.0\nvllm:num_requests_running -1\n", (None,) * 3),
        (b"vllm:num_requests_waiting 1e300\nvllm:num_requests_running abc\nvllm:kv_cache_usage_perc", (None,) * 3),
        (b"process_cpu_seconds_total 3.0\n", (None,) * 3),
        (b'{"status": "ok"}', (None,) * 3),
    ],
)  # fmt: skip
def test_engines_are_read_by_their_own_names(text: bytes, found: tuple[int | None, ...]) -> None:
    figures = read_figures(text)
    assert (figures.running, figures.queued, figures.cache_milli) == found
    assert figures.is_engine == any(one is not None for one in found)


def test_first_tokens_are_told_between_two_looks() -> None:
    first = read_figures(VLLM).first_token
    assert first == {0.1: 90, 0.5: 96, 1e9: 100}
    assert first_token_s(first, {}) == 0.5
    assert first_token_s(first, {0.1: 90, 0.5: 90, 1e9: 90}) == 1e9
    assert first_token_s(first, first) is None
    assert first_token_s(first, {0.1: 91, 0.5: 96, 1e9: 99}) is None, "it began anew"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([*VLLM.splitlines(True), *SGLANG.splitlines(True), b"\xff\x00{", b'le="', b"\n"])),
       st.binary(max_size=60), st.integers(0, 400))  # fmt: skip
def test_no_garbage_breaks_the_reading(lines: list[bytes], noise: bytes, at: int) -> None:
    text = b"".join(lines)
    figures = read_figures(text[:at] + noise + text[at:])
    for value, most in ((figures.running, 10**9), (figures.queued, 10**9), (figures.cache_milli, 1000)):
        assert value is None or (type(value) is int and 0 <= value <= most)


def test_replicas_that_are_engines_are_asked_others_ever_more_seldom_and_the_report_says_it() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask_and_report())


async def ask_and_report() -> None:
    asked = {"engine": 0, "other": 0}
    answers = {"engine": VLLM, "other": b"{}"}

    async def listen(name: str) -> asyncio.Server:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                asked[name] += 1
                body = answers[name]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
            writer.close()

        return await asyncio.start_server(answer, "127.0.0.1", 0)

    servers = {name: await listen(name) for name in asked}
    urls = {name: f"http://127.0.0.1:{one.sockets[0].getsockname()[1]}" for name, one in servers.items()}
    gateway = Gateway(pepper=PEPPER, own_token=lambda: GATEWAY, hosts=frozenset({b"127.0.0.1"}), place="here:1")
    gateway.adopt(read_feed(feed_of({"m": [urls["engine"], urls["other"]]})))
    assert gateway.table is not None
    table = gateway.table
    scraper = Scraper(lambda: table.routes.values(), every_s=0.02, longest_pause_s=30)
    running = asyncio.create_task(scraper.run(step_s=0.01))
    async with asyncio.timeout(20):
        while asked["engine"] < 12:
            await asyncio.sleep(0.01)
    running.cancel()
    assert asked["other"] < 6, "each pause is twice the one before"
    engine, other = table.routes["m"].replicas
    assert (engine.queued, engine.running, engine.cache_milli) == (5, 12, 812)
    assert (other.queued, other.cache_milli) == (0, None)
    gateway.desk("m").felt.began(0.3)
    gateway.desk("m").felt.ended(900.0)
    gateway.desk("m").felt.waited(0.0)
    gateway.desk("m").felt.gave(7)
    gateway.metrics.of("m")
    told = json.loads(gateway.load())
    LoadIn.model_validate(told)
    assert told["replicas"]["m-0"] == {
        "in_flight": 0, "is_leaving": False, "queued": 5, "running": 12, "cache_milli": 812
    }  # fmt: skip
    assert told["replicas"]["m-1"] == {"in_flight": 0, "is_leaving": False}
    assert told["models"]["m"]["felt"]["tokens"] == 7
    assert json.loads(gateway.load(with_felt=False))["models"] == {}
    for one in servers.values():
        one.close()


# What the control plane makes of reports


class Watch:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def felt(fast: int, slow: int, tokens: int = 0) -> Load:
    counts = {bucket_of(0.1 * SECOND_NS): fast, bucket_of(2 * SECOND_NS): slow}
    return Load(models={"m": ModelLoad(in_flight=1, felt=FeltCounts(ttft=counts, tokens=tokens))})


def test_what_was_felt_is_of_the_window_and_of_all_gateways() -> None:
    watch = Watch()
    loads = Loads(monotonic=watch)
    for second in range(60):
        watch.now = 100.0 + second
        loads.hear("a/1", felt(fast=100 * second, slow=0, tokens=50 * second))
        loads.hear("b/1", felt(fast=0, slow=0))
    calm = loads.felt("m", window_s=10).ttft_ns
    assert calm is not None
    assert calm < 0.13 * SECOND_NS
    assert loads.felt("m", window_s=10).tokens_milli == 50_000
    assert loads.felt("m", window_s=10).latency_ns is None, "too few to say"
    watch.now += 1
    loads.hear("b/1", felt(fast=0, slow=1000))
    late = loads.felt("m", window_s=10).ttft_ns
    assert late is not None
    assert late > 1.9 * SECOND_NS, "what one gateway's users feel counts among all"
    for _ in range(40):
        watch.now += 1
        loads.hear("a/1", felt(fast=5900 + 30 * round(watch.now), slow=0))
        loads.hear("b/1", felt(fast=0, slow=1000))
    again = loads.felt("m", window_s=10).ttft_ns
    assert again is not None
    assert again < 0.13 * SECOND_NS, "and is forgotten after the window"
    assert len(loads._felt["a/1", "m"]) < 40, "what is kept is bounded"


def test_a_gateway_that_is_silent_is_not_forgotten_at_once_and_its_successor_takes_its_place() -> None:
    watch = Watch()
    loads = Loads(monotonic=watch)
    assert not loads.is_whole, "nobody was heard yet"
    loads.hear("a/1", Load(models={"m": ModelLoad(in_flight=3, waiting=2)}))
    loads.hear("b/1", Load(models={"m": ModelLoad(in_flight=1)}))
    assert (loads.of_model("m"), loads.is_whole) == ((4, 2), True)
    watch.now += 5
    loads.hear("b/1", Load(models={"m": ModelLoad(in_flight=1)}))
    assert (loads.of_model("m"), loads.is_whole) == ((4, 2), False)
    loads.hear("a/2", Load())
    assert (loads.of_model("m"), loads.is_whole) == ((1, 0), True)
    watch.now += 31
    assert (loads.of_model("m"), loads.is_whole) == ((0, 0), False)


def test_a_figure_of_an_engine_costs_no_more_than_its_size() -> None:
    text = b"vllm:num_requests_waiting{" * 90_000 + b"\n" + VLLM
    began = time.process_time()
    assert read_figures(text).queued is None, "only the first two MiB are read"
    assert time.process_time() - began < 2.0
    assert read_figures(re.sub(rb"\n", b"\n\n", VLLM)) == read_figures(VLLM)
    assert Figures().is_engine is False
