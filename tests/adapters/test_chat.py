"""``tidemill chat``: what is asked, what is kept of an answer, and how it looks."""

from __future__ import annotations

import asyncio
import doctest
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tidemill.cli.chat
from tests.adapters.test_gateway import USER, Rig, live
from tests.adapters.test_gateway_guards import DONE, Talker, delta
from tidemill.cli.chat import _paragraphs
from tidemill.errors import InvalidRequest, NotFound, TidemillError, Unauthorized, Unavailable
from tidemill.sdk.chatting import Chat

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'


def chat(rig: Rig, model: str = "m", token: str = USER) -> Chat:
    return Chat(url=f"http://127.0.0.1:{rig.port}", token=token, model=model)


@live()
async def test_a_conversation_goes_on_from_what_was_said(rig: Rig) -> None:
    talker = Talker([delta("Hello"), delta(" there"), delta("", finish="stop"), USAGE, DONE])
    async with talker.serving(rig):
        talk = chat(rig)
        talk.system = "be brief"
        talk.options["max_tokens"] = 9
        assert await asyncio.to_thread(lambda: list(talk.ask("Hi"))) == ["Hello", " there"]
        reply = talk.reply
        assert (reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens) == ("Hello there", "stop", 7, 3)
        assert reply.request_id.startswith("req_")
        assert 0 < reply.first_s <= reply.whole_s
        await asyncio.to_thread(lambda: list(talk.ask("And?")))
        assert [one["content"] for one in talker.asked[1]["messages"]] == ["be brief", "Hi", "Hello there", "And?"]
        assert talker.asked[1]["max_tokens"] == 9
        talk.system = ""
        talk.system = "be long"
        talk.clear()
        assert talk.messages == [{"role": "system", "content": "be long"}]
        assert await asyncio.to_thread(talk.models) == ("m",)


@live()
async def test_who_stops_an_answer_keeps_what_came_and_the_model_stops(rig: Rig) -> None:
    talker = Talker([delta("one "), *[delta("more ")] * 500], pause_s=0.005)
    async with talker.serving(rig):
        talk = chat(rig)

        def stop() -> None:
            asking = talk.ask("Hi")
            next(asking)
            asking.close()

        await asyncio.to_thread(stop)
        await asyncio.wait_for(talker.cut_off.wait(), 5)
        assert [one["role"] for one in talk.messages] == ["user", "assistant"]
        assert talk.messages[1]["content"].startswith("one ")


@live()
async def test_errors_say_what_the_gateway_said_and_leave_the_conversation_as_it_was(rig: Rig) -> None:
    for talk, kind, word in (
        (chat(rig, "nothing"), NotFound, "does not exist"),
        (chat(rig, token="tm_user_wrong"), Unauthorized, "API key"),
        (chat(rig, "empty"), Unavailable, "No replica"),
        (Chat(url="http://127.0.0.1:1", token=USER, model="m"), Unavailable, "does not answer"),
        (Chat(url="ftp://x", token=USER, model="m"), InvalidRequest, "address"),
    ):
        with pytest.raises(TidemillError, match=word) as told:
            await asyncio.to_thread(lambda talk=talk: list(talk.ask("Hi")))
        assert isinstance(told.value, kind)
        assert talk.messages == [] or isinstance(told.value, InvalidRequest)
    talker = Talker([delta("half")])
    async with talker.serving(rig):
        talk = chat(rig)
        with pytest.raises(Unavailable, match="too early"):
            await asyncio.to_thread(lambda: list(talk.ask("Hi")))
        assert talk.messages == []


def test_the_command_asks_once_from_a_script_and_stops_answers_in_a_terminal(tmp_path: Path) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        talker = Talker([delta("**Hello** "), delta("there"), delta("", finish="stop"), USAGE, DONE])
        slow = Talker([delta("one "), *[delta("more ")] * 2000, DONE], pause_s=0.01)
        environment = {
            **os.environ, "TIDEMILL_TOKEN": USER, "TIDEMILL_API_URL": "http://127.0.0.1:1", "TIDEMILL_HOME": str(tmp_path),
            "TERM": "xterm",
        }  # fmt: skip
        command = [
            str(Path(sys.executable).with_name("tidemill")),
            "chat",
            "m",
            "--url",
            f"http://127.0.0.1:{rig.port}/v1",
        ]

        def run(*more: str, text: str = "") -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *more], input=text, env=environment, capture_output=True, text=True, timeout=60, check=False
            )

        async with talker.serving(rig):
            done = await asyncio.to_thread(run, "--json", text="the text")
            answer = json.loads(done.stdout)
            assert (answer["content"], answer["usage"]) == (
                "**Hello** there",
                {"prompt_tokens": 7, "completion_tokens": 3},
            )
            done = await asyncio.to_thread(run, "-m", "sum up:", text="the text")
            assert done.stdout == "**Hello** there\n"
            assert talker.asked[-1]["messages"] == [{"role": "user", "content": "sum up:\n\nthe text"}]
            done = await asyncio.to_thread(run, text="")
            assert (done.returncode, "nothing to ask" in done.stderr) == (2, True)
        async with slow.serving(rig):
            await asyncio.to_thread(in_a_terminal, command, environment)
            await asyncio.wait_for(slow.cut_off.wait(), 5)

    def in_a_terminal(command: list[str], environment: dict[str, str]) -> None:
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(command[0], command, environment)
        seen = b""

        def until(wanted: bytes) -> None:
            nonlocal seen
            deadline = time.monotonic() + 60
            while wanted not in seen:
                assert time.monotonic() < deadline, seen
                if select.select([terminal], [], [], 0.1)[0]:
                    seen += os.read(terminal, 65536)

        try:
            until(b"/help")
            os.write(terminal, b"go on\n")
            until(b"more more")
            os.write(terminal, b"\x03")
            until(b"stopped")
            os.write(terminal, b"/system be brief\n")
            until(b"from now on")
            os.write(terminal, b"/exit\n")
            until(b"1 answer, ")
            assert os.waitpid(pid, 0)[1] == 0
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            os.close(terminal)

    scene()


TEXTS = st.lists(
    st.sampled_from(["a", "\n", "\n\n", "```", "```\n", "- x\n", "1. y\n", "| t |\n", "  z", " "]), max_size=25
)


def _loses_nothing(text: str, cut: int, split: object = _paragraphs) -> bool:
    """Whether what is printed, piece by piece, is all of the text but for empty lines between."""
    rest, printed = "", []
    for piece in (text[:cut], text[cut:]):
        rest += piece
        whole, rest = split(rest)  # type: ignore[operator]
        printed.append(whole)
    return "".join("".join([*printed, rest]).split()) == "".join(text.split())


@settings(max_examples=150, deadline=None)
@given(TEXTS.map("".join), st.integers(0, 60))
def test_what_is_shown_by_paragraphs_is_all_of_the_text(text: str, cut: int) -> None:
    assert _loses_nothing(text, cut)


def test_the_property_above_finds_paragraphs_that_lose_what_follows() -> None:
    assert not _loses_nothing("a\n\nb\n\nc", 4, lambda text: (text.partition("\n\n")[0], ""))
    assert not doctest.testmod(tidemill.cli.chat).failed
