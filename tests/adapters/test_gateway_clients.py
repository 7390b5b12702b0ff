"""The clients that people have work unchanged against the gateway, and what breaks is told to them as they know it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import uvloop

from tests.adapters.test_gateway import (
    GATEWAY,
    PEPPER,
    USER,
    Rig,
    error_of,
    eventually,
    feed_of,
    get,
    live,
    parse,
    request,
)
from tests.adapters.test_gateway_guards import DONE, Talker, chat, delta, guard
from tidemill.gateway.books import Books
from tidemill.gateway.feed import save
from tidemill.gateway.server import Limits

ROOT = Path(__file__).resolve().parents[2]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}


def call(arguments: str, name: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return {"index": 0, **({"id": "call_1", "type": "function"} if name else {}), "function": function}


def whole(message: dict[str, Any], finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    return json.dumps(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    ).encode()


def on(rig: Rig, *, retries: int = 0, token: str = USER) -> Any:
    return {"base_url": f"http://127.0.0.1:{rig.port}/v1", "api_key": token, "max_retries": retries, "timeout": 20}


# The openai client


@live()
async def test_tools_are_offered_called_and_answered_also_in_streams(rig: Rig) -> None:
    tool_call = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": '{"at": "noon"}'}}
    talker = Talker(body=whole({"content": None, "tool_calls": [tool_call]}, "tool_calls"))
    async with talker.serving(rig), openai.AsyncOpenAI(**on(rig)) as client:
        answer = await client.chat.completions.create(
            model="m", messages=MESSAGES, tools=[TOOL], tool_choice="auto", extra_body={"guided_json": {"a": 1}}
        )
        made = answer.choices[0].message.tool_calls
        assert made is not None
        assert json.loads(made[0].function.arguments) == {"at": "noon"}
        assert (talker.asked[0]["tools"], talker.asked[0]["guided_json"]) == ([TOOL], {"a": 1})
    part = delta("").replace(b'"delta": {}', b'"delta": %b')
    calls = [call("", "tide"), call('{"at"'), call(': "noon"}')]
    events = [part % json.dumps({"tool_calls": [one]}).encode() for one in calls]
    talker = Talker([*events, delta("", finish="tool_calls"), DONE])
    async with talker.serving(rig), openai.AsyncOpenAI(**on(rig)) as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL], stream=True)
        arguments = ""
        async for event in stream:
            for one in (event.choices[0].delta.tool_calls or []) if event.choices else []:
                arguments += one.function.arguments or ""
        assert json.loads(arguments) == {"at": "noon"}


@live()
async def test_the_helpers_of_the_client_for_streams_see_usage_only_when_they_ask(rig: Rig) -> None:
    usage = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}\n\n'
    talker = Talker([delta("hello"), delta("", finish="stop"), usage, DONE])
    async with talker.serving(rig), openai.AsyncOpenAI(**on(rig)) as client:
        for options, expected in (({}, None), ({"stream_options": {"include_usage": True}}, 4)):
            async with client.chat.completions.stream(model="m", messages=MESSAGES, **options) as stream:
                final = await stream.get_final_completion()
            assert final.choices[0].message.content == "hello"
            assert (final.usage.total_tokens if final.usage else None) == (expected or 4)
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES, stream=True)
        assert raw.headers["x-request-id"]


@live()
async def test_embeddings_responses_and_models_are_spoken(rig: Rig) -> None:
    vectors = {"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}], "usage": {"prompt_tokens": 2, "total_tokens": 2}}  # fmt: skip
    talker = Talker(body=json.dumps(vectors).encode())
    async with talker.serving(rig), openai.AsyncOpenAI(**on(rig)) as client:
        made = await client.embeddings.create(model="m", input="x", encoding_format="float")
        assert made.data[0].embedding == [0.5, -1.0]
        assert [one.id async for one in await client.models.list()] == ["m"]
        assert (await client.models.retrieve("m")).owned_by == "p1"
    response = {
        "id": "r", "object": "response", "created_at": 1, "model": "m", "status": "completed", "tools": [],
        "parallel_tool_calls": True, "tool_choice": "auto",
        "output": [{"type": "message", "id": "i", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "hello", "annotations": []}]}],
    }  # fmt: skip
    talker = Talker(body=json.dumps(response).encode())
    async with talker.serving(rig), openai.AsyncOpenAI(**on(rig)) as client:
        assert (await client.responses.create(model="m", input="hi")).output_text == "hello"
    kinds = [
        {"type": "response.output_text.delta", "item_id": "i", "output_index": 0, "content_index": 0, "delta": "hello", "sequence_number": 1, "logprobs": []},
        {"type": "response.completed", "response": response, "sequence_number": 2},
    ]  # fmt: skip
    talker = Talker([f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in kinds])
    async with talker.serving(rig), openai.AsyncOpenAI(**on(rig)) as client:
        seen = [event.type async for event in await client.responses.create(model="m", input="hi", stream=True)]
        assert seen == ["response.output_text.delta", "response.completed"]


@live()
async def test_what_is_wrong_is_the_clients_own_kind_of_error(rig: Rig) -> None:
    guard(rig, {"name": "r", "kind": "words", "action": "refuse", "on": ["request"], "options": {"words": ["secret"]}})
    async with openai.AsyncOpenAI(**on(rig)) as client, openai.AsyncOpenAI(**on(rig, token="tm_user_no")) as stranger:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "the secret"}])
        assert (bad.value.code, bad.value.type, bad.value.status_code) == (
            "content_filter",
            "invalid_request_error",
            400,
        )
        assert bad.value.request_id
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(model="m", messages=MESSAGES)
        with pytest.raises(openai.InternalServerError) as dead:
            await client.chat.completions.create(model="m", messages=MESSAGES, extra_body={"mode": "die in body"})
        assert (dead.value.status_code, dead.value.code) == (502, "replica_failed")


@live()
async def test_the_clients_retries_come_through_once_a_replica_is_there(rig: Rig) -> None:
    talker = Talker(body=whole({"content": "hello"}))
    told = json.loads(feed_of({"m": []}, version=3))
    from tidemill.gateway.table import read_feed

    rig.gateway.adopt(read_feed(json.dumps(told).encode(), rig.gateway.table))
    async with openai.AsyncOpenAI(**on(rig, retries=3)) as client:
        asking = asyncio.create_task(client.chat.completions.create(model="m", messages=MESSAGES))
        await eventually(lambda: rig.gateway.metrics.of("m").errors > 0)
        async with talker.serving(rig):
            assert (await asking).choices[0].message.content == "hello"
            assert len(talker.asked) == 1, "it was asked once"


@live()
async def test_a_client_that_is_cancelled_or_closes_its_stream_stops_the_replica(rig: Rig) -> None:
    async with openai.AsyncOpenAI(**on(rig)) as client:
        for how in ("cancel", "close"):
            talker = Talker([delta("one ")] * 500, pause_s=0.005)
            async with talker.serving(rig):
                stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)

                async def read(stream: Any = stream) -> None:
                    async for _ in stream:
                        pass

                if how == "cancel":
                    reading = asyncio.create_task(read())
                    await asyncio.sleep(0.03)
                    reading.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await reading
                await stream.close()
                await asyncio.wait_for(talker.cut_off.wait(), 5)
        await eventually(lambda: rig.gateway.metrics.of("m").in_flight == 0)
        waiting = asyncio.create_task(
            client.chat.completions.create(model="m", messages=MESSAGES, extra_body={"mode": "hang"})
        )
        rig.endpoints = [await rig.engine.listen()]
        guard(rig)
        await asyncio.sleep(0.05)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError, openai.APIError):
            await waiting


@live()
async def test_the_client_without_asyncio_works_from_threads(rig: Rig) -> None:
    talker = Talker([delta("hello"), delta("", finish="stop"), DONE])

    def ask() -> str:
        with openai.OpenAI(**on(rig)) as client:
            stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)

    async with talker.serving(rig):
        assert await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(8))) == ["hello"] * 8


# What breaks


@live(limits=Limits(body=8 * 1024 * 1024))
async def test_a_prompt_of_50_megabytes_is_413_before_it_is_read_and_passes_where_it_may(rig: Rig) -> None:
    size = 50 * 1024 * 1024
    head = request(b"", headers="Connection: close\r\n").replace(b"Content-Length: 0", b"Content-Length: %d" % size)
    status, _, body = parse(await rig.raw(head))
    assert (status, error_of(body)["code"]) == (413, "too_large")
    assert rig.gateway.held == 0
    async with openai.AsyncOpenAI(**on(rig)) as client:
        with pytest.raises(openai.APIStatusError) as large:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * size}])
        assert large.value.status_code == 413
    rig.gateway.limits = Limits(body=64 * 1024 * 1024)
    talker = Talker(body=whole({"content": "hello"}))
    async with talker.serving(rig):
        status, _, body = await rig.post(chat("x" * size))
        assert (status, len(talker.asked[0]["messages"][0]["content"])) == (200, size)
    assert rig.gateway.held == 0


def test_a_socket_that_is_half_closed_or_reset_leaves_nothing_and_is_billed_once_at_most(tmp_path: Path) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        books = rig.gateway.books = Books(tmp_path)
        talker = Talker([delta("one ")] * 300, pause_s=0.005)
        async with talker.serving(rig):
            for how in ("half closed", "reset"):
                talker.cut_off.clear()
                reader, writer = await rig.connect()
                writer.write(request(chat("hi", stream=True)))
                await reader.readuntil(b"data: ")
                if how == "half closed":
                    writer.write_eof()
                else:
                    connected: socket.socket = writer.get_extra_info("socket")
                    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                await asyncio.wait_for(talker.cut_off.wait(), 5)
                await eventually(lambda: rig.gateway.metrics.of("m").in_flight == 0)
                writer.close()
        entered: list[dict[str, Any]] = []

        async def send(body: bytes) -> None:
            entered.extend(json.loads(body)["usages"])

        books.write()
        while await books.hand_on(send):
            pass
        assert len(entered) == 2
        assert all(one["is_estimated"] and one["completion_tokens"] > 0 for one in entered)
        assert len({one["id"] for one in entered}) == 2
        books.close()

    scene()


GARBAGE = [
    b"\x16\x03\x01\x00\x05hello", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x00" * 40_000,
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_a_replica_that_sends_garbage_is_a_502_in_openais_words_and_bills_nothing(
    garbage: bytes, tmp_path: Path
) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        rig.gateway.books = Books(tmp_path)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"}]}")
                writer.write(garbage)
                await writer.drain()
                await reader.read()
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        rig.endpoints = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"]
        guard(rig)
        status, _, body = await rig.post(chat("hi"))
        assert (status, error_of(body)["type"], error_of(body)["code"]) == (502, "server_error", "replica_failed")
        assert rig.gateway.metrics.of("m").prompt_tokens == 0
        server.close()
        rig.gateway.books.close()

    scene()


@live()
async def test_a_stream_of_bytes_that_are_no_events_and_no_utf8_passes_and_ends(rig: Rig) -> None:
    noise = [b"data: \xff\xfe{\n\n", b"\n\n\n\n", b": comment\n\n", b"data: not json\n\n", b"nothing: at all\n\n"]
    talker = Talker([*noise, DONE])
    async with talker.serving(rig):
        answer = await rig.raw(request(chat("hi", stream=True), headers="Connection: close\r\n"))
        assert all(one in re.sub(rb"\r\n[0-9a-f]+\r\n", b"", answer) for one in noise if one.strip())
        assert answer.endswith(b"0\r\n\r\n")
        for bad in (b'{"model": "m", "x": "\xff"}', b'{"model": "\xed\xa0\x80"}'):
            status, _, body = parse(await rig.raw(request(bad, headers="Connection: close\r\n")))
            assert (status, error_of(body)["code"]) == (400, "invalid_json")


# Others' clients, and very many requests: long


@contextlib.asynccontextmanager
async def process(folder: Path, endpoint: str) -> AsyncIterator[tuple[int, int]]:
    """A gateway in a process of its own: its port and process id."""
    folder.mkdir(exist_ok=True)
    (folder / "gateway.token").write_text(GATEWAY)
    key = folder / "secret.key"
    key.write_text(PEPPER.hex())
    key.chmod(0o600)
    save(folder / "gateway-feed.json", feed_of({"m": [endpoint]}))
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidemill.gateway", "--listen", "127.0.0.1:0", "--control", "http://127.0.0.1:1",
        "--token-file", str(folder / "gateway.token"), "--pepper-file", str(key), "--home", str(folder),
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stderr is not None
    line = b""
    while b"serving on" not in line:
        line = await asyncio.wait_for(running.stderr.readline(), 30)
    drain = asyncio.create_task(running.stderr.read())
    try:
        yield int(line.strip().rpartition(b":")[2]), running.pid
    finally:
        running.kill()
        await running.wait()
        drain.cancel()


def scene_of(test: Any) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test)


OTHERS = {
    "langchain-openai": """
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_core.tools import tool
llm = ChatOpenAI(model="m", base_url=URL, api_key=KEY, max_retries=0)
assert llm.invoke("hi").content == "hello there", llm.invoke("hi")
assert "".join(part.content for part in llm.stream("hi")) == "hello there"
@tool
def tide(at: str) -> str:
    "The tide."
    return at
assert llm.bind_tools([tide]).invoke("hi").content == "hello there"
import asyncio
assert asyncio.run(llm.ainvoke("hi")).content == "hello there"
try:
    ChatOpenAI(model="other", base_url=URL, api_key=KEY, max_retries=0).invoke("hi")
except Exception as error:
    assert "does not exist" in str(error), error
else:
    raise AssertionError("no error")
""",
    "litellm": """
import asyncio, litellm
litellm.suppress_debug_info = True
def ask(model="openai/m", **more):
    return litellm.completion(model=model, api_base=URL, api_key=KEY, messages=[{"role": "user", "content": "hi"}], **more)
assert ask().choices[0].message.content == "hello there"
assert ask().usage.total_tokens == 11
assert "".join(part.choices[0].delta.content or "" for part in ask(stream=True)) == "hello there"
async def later():
    made = await litellm.acompletion(model="openai/m", api_base=URL, api_key=KEY, messages=[{"role": "user", "content": "hi"}])
    return made.choices[0].message.content
assert asyncio.run(later()) == "hello there"
try:
    ask("openai/other")
except litellm.NotFoundError as error:
    assert "does not exist" in str(error)
else:
    raise AssertionError("no error")
""",
}


class Both(Talker):
    """Answers whole or in a stream, as it is asked."""

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                asked = json.loads(await reader.readexactly(int(length[1])))
                if asked.get("stream"):
                    body = b"".join([delta("hello"), delta(" there"), delta("", finish="stop"), DONE])
                    kind = b"text/event-stream"
                else:
                    body, kind = whole({"content": "hello there"}), b"application/json"
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)) + body
                )
                await writer.drain()
        writer.close()


@pytest.mark.long
@pytest.mark.parametrize("package", OTHERS)
def test_other_clients_work_unchanged(package: str, tmp_path: Path) -> None:
    """The client is installed into ``.bench``, on first use."""
    folder = ROOT / ".bench" / package
    if not (folder / "ready").exists():
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", str(folder)], check=True)
        command = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), package]
        subprocess.run(command, check=True, timeout=600)
        (folder / "ready").touch()

    async def scene() -> None:
        server = await asyncio.start_server(Both()._accept, "127.0.0.1", 0)
        async with process(tmp_path / "home", f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as (port, _):
            script = f"URL, KEY = 'http://127.0.0.1:{port}/v1', '{USER}'\n{OTHERS[package]}"
            done = await asyncio.to_thread(
                subprocess.run, [str(folder / "bin" / "python"), "-c", script], capture_output=True, text=True,
                timeout=300, check=False, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        server.close()

    scene_of(scene())


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_a_million_requests(tmp_path: Path) -> None:
    """Whole answers and streams, some of them given up by their client, on connections that are kept."""
    total = int(os.environ.get("TIDEMILL_SOAK_REQUESTS", "1000000"))
    batches, connections = 10, 16
    whole_ask, stream_ask = request(chat("hi")), request(chat("hi", stream=True))

    async def ask(port: int, count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(count):
            writer.write(stream_ask if number % 4 == 3 else whole_ask)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            if number % 500 == 499:  # given up
                writer.transport.abort()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await (reader.readexactly(int(length[1])) if length else reader.readuntil(b"0\r\n\r\n"))
        writer.close()

    async def scene() -> None:
        server = await asyncio.start_server(Both()._accept, "127.0.0.1", 0)
        async with process(tmp_path / "home", f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as (port, pid):
            sizes, began = [], time.monotonic()
            for _ in range(batches):
                each = total // batches // connections
                await asyncio.gather(*(ask(port, each) for _ in range(connections)))
                sizes.append(psutil.Process(pid).memory_info().rss)
            await asyncio.sleep(1)
            _, _, text = parse(await _ask(port, get("/metrics", token=GATEWAY)))
            served = batches * (total // batches // connections) * connections
            assert f'tidemill_gateway_requests_total{{model="m"}} {served}\n'.encode() in text
            assert b'tidemill_gateway_in_flight{model="m"} 0\n' in text
            late = sizes[batches // 2 :]
            slope = (late[-1] - late[0]) / (len(late) - 1) / (total / batches) * 1_000_000
            rate = served / (time.monotonic() - began)
            print(
                f"{served:,} requests at {rate:,.0f}/s, RSS MiB {[size >> 20 for size in sizes]}, {slope / 2**20:.2f} MiB a million"
            )
            assert slope < 4 * 2**20 or late[-1] - late[0] < 2**20
        server.close()

    scene_of(scene())


async def _ask(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer
