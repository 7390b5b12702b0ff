"""The relay of commands: both orders of arrival, bounded memory, and a last word when a side goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.control.relay import MAX_WAITING, PIPE_BYTES, Broken, FrameEdge, Pipe, Relay, Session, frame
from tidemill.errors import Conflict, NotFound, Unavailable
from tidemill.model.ids import JobId, LaunchId, ProjectId

LAUNCH = LaunchId("run_a-0-1-0")


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await story

    asyncio.run(bounded())


def opened(relay: Relay) -> Session:
    return relay.open(
        LAUNCH, {"command": ["ls"]}, job_id=JobId("job_a-0"), project_id=ProjectId("p"), organization_id="o"
    )


async def everything(pipe: Pipe) -> bytes:
    data = b""
    while piece := await pipe.read():
        data += piece
    return data


def test_a_waiting_runner_gets_the_command_at_once_and_only_once() -> None:
    async def story() -> None:
        relay = Relay()
        waiting = asyncio.ensure_future(relay.commands(LAUNCH, wait_s=5))
        await asyncio.sleep(0)
        session = opened(relay)
        assert await waiting == [{"type": "exec", "exec_id": session.id, "command": ["ls"]}]
        assert await relay.commands(LAUNCH, wait_s=0) == []

    run(story())


def test_a_command_waits_for_its_runner() -> None:
    async def story() -> None:
        relay = Relay()
        first, second = opened(relay), opened(relay)
        got = await relay.commands(LAUNCH, wait_s=5)
        assert [command["exec_id"] for command in got] == [first.id, second.id]

    run(story())


def test_nothing_comes_when_nothing_is_there() -> None:
    async def story() -> None:
        relay = Relay()
        assert await relay.commands(LAUNCH, wait_s=0.01) == []
        assert await relay.commands(LAUNCH, wait_s=0) == []

    run(story())


def test_octets_pass_both_ways_whoever_comes_first() -> None:
    async def story() -> None:
        relay = Relay()
        session = opened(relay)
        await session.to_runner.write(frame(b"i", b"in"))
        session.to_runner.end()
        assert await everything(session.to_runner) == frame(b"i", b"in")
        reading = asyncio.ensure_future(everything(session.to_client))
        await asyncio.sleep(0)
        await session.from_runner(frame(b"o", b"out")[:3])
        await session.from_runner(frame(b"o", b"out")[3:] + frame(b"x", b"0"))
        relay.leave(session, "runner/output")
        assert await reading == frame(b"o", b"out") + frame(b"x", b"0")
        relay.leave(session, "client/output")
        assert len(relay) == 0
        with pytest.raises(NotFound):
            relay.session(session.id)

    run(story())


def test_a_writer_waits_while_nobody_reads() -> None:
    async def story() -> None:
        pipe = Pipe()
        writing = asyncio.ensure_future(pipe.write(bytes(PIPE_BYTES * 3)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not writing.done()
        read = 0
        while read < PIPE_BYTES * 3:
            read += len(await pipe.read())
        await writing

    run(story())


def test_a_writer_whose_reader_leaves_is_told() -> None:
    async def story() -> None:
        pipe = Pipe()
        writing = asyncio.ensure_future(pipe.write(bytes(PIPE_BYTES * 2)))
        await asyncio.sleep(0)
        pipe.abandon()
        with pytest.raises(Broken):
            await writing
        with pytest.raises(Broken):
            await pipe.write(b"x")

    run(story())


def test_a_runner_that_breaks_off_is_told_of_in_a_frame() -> None:
    async def story() -> None:
        relay = Relay()
        session = opened(relay)
        await session.from_runner(frame(b"o", b"half"))
        relay.leave(session, "runner/output")
        assert await everything(session.to_client) == frame(b"o", b"half") + frame(
            b"r", b"The connection to the worker broke."
        )

    run(story())


def test_a_broken_frame_is_not_followed_by_another() -> None:
    async def story() -> None:
        relay = Relay()
        session = opened(relay)
        await session.from_runner(frame(b"o", b"half")[:-1])
        relay.leave(session, "runner/output")
        assert await everything(session.to_client) == frame(b"o", b"half")[:-1]

    run(story())


def test_a_client_that_leaves_ends_the_command() -> None:
    async def story() -> None:
        relay = Relay()
        session = opened(relay)
        relay.leave(session, "client/output")
        assert await everything(session.to_runner) == b""
        with pytest.raises(Broken):
            await session.from_runner(frame(b"o", b"x"))
        relay.leave(session, "runner/output")
        assert len(relay) == 0
        assert await relay.commands(LAUNCH, wait_s=0) == []

    run(story())


def test_a_runner_that_never_comes_is_told_of() -> None:
    async def story() -> None:
        relay = Relay(arrival_s=0.01)
        session = opened(relay)
        session.take("client/output")
        said = await everything(session.to_client)
        assert said.startswith(b"r")
        assert b"did not take the command" in said

    run(story())


def test_a_session_that_nobody_comes_to_is_forgotten() -> None:
    async def story() -> None:
        relay = Relay(arrival_s=0.01)
        session = opened(relay)
        await everything(session.to_client)
        await asyncio.sleep(0)
        assert len(relay) == 0

    run(story())


def test_an_end_is_served_once() -> None:
    async def story() -> None:
        session = opened(Relay())
        session.take("client/output")
        with pytest.raises(Conflict):
            session.take("client/output")

    run(story())


def test_commands_that_nobody_takes_are_bounded() -> None:
    async def story() -> None:
        relay = Relay()
        for _ in range(MAX_WAITING):
            opened(relay)
        with pytest.raises(Unavailable):
            opened(relay)

    run(story())


def test_closing_ends_everything() -> None:
    async def story() -> None:
        relay = Relay()
        session = opened(relay)
        waiting = asyncio.ensure_future(relay.commands(LaunchId("run_b-0-1-0"), wait_s=60))
        await asyncio.sleep(0)
        relay.close()
        relay.close()
        assert await waiting == []
        assert b"shutting down" in await everything(session.to_client)
        with pytest.raises(Unavailable):
            opened(relay)

    run(story())


@given(
    payloads=st.lists(st.binary(max_size=40), max_size=8), cuts=st.lists(st.integers(1, 20), min_size=1, max_size=50)
)
def test_frame_edges_are_found_however_octets_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(frame(b"o", payload) for payload in payloads)
    ends = {0}
    for payload in payloads:
        ends.add(max(ends) + 5 + len(payload))
    edge, place, turn = FrameEdge(), 0, 0
    while place < len(data):
        piece = data[place : place + cuts[turn % len(cuts)]]
        edge.feed(piece)
        place, turn = place + len(piece), turn + 1
        assert edge.between == (place in ends)
