"""Turns are recorded from a cloud that runs, and come out the same when they are taken again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, eventually
from tests.core.history import PROJECTS, RATES, SITE, START, node
from tidemill.api.turns import _MOST, _Lines
from tidemill.control import turns
from tidemill.control.driver import Driver, world_from
from tidemill.control.turns import Recorder, TurnLoop
from tidemill.core.world import World
from tidemill.errors import Unavailable
from tidemill.model.events import Fact, NodeJoined
from tidemill.model.plan import Plan
from tidemill.model.policy import Policy
from tidemill.ports import Batch, Snapshot
from tidemill.store.memory import MemoryStore
from tidemill.twin.recording import Turn, read_recording
from tidemill.twin.replay import replay


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path / "home")
    cloud.up()
    yield cloud
    cloud.down()


def record(cloud: Cloud, file: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "TIDEMILL_URL": f"http://127.0.0.1:{cloud.port}",
        "TIDEMILL_TOKEN": cloud.token,
    }
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("tidemill")), "record", str(file), "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_a_cloud_decides_is_recorded_and_decided_again(cloud: Cloud, tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl.gz"
    recording = record(cloud, file)
    assert recording.stderr is not None
    assert "recording" in recording.stderr.readline()
    second = record(cloud, tmp_path / "second.jsonl.gz")
    _, refused = second.communicate(timeout=120)
    assert second.returncode != 0
    assert "being recorded already" in refused
    jobs = [cloud.submit({"name": f"n{at}", "run": f"exit {at}"}) for at in range(2)]
    for job in jobs:
        cloud.wait(job, "succeeded", "failed")

    def is_kept() -> bool:  # what a kill -9 now would leave
        turns = [part for part in read_recording(file) if isinstance(part, Turn)]
        return any(one.what == "ends" for turn in turns for one in turn.decided)

    eventually(is_kept, within_s=20, what="the recording has the ends")
    recording.send_signal(signal.SIGTERM)
    told, _ = recording.communicate(timeout=120)
    assert recording.returncode == 0
    assert json.loads(told)["turns"] > 2
    turns = [part for part in read_recording(file) if isinstance(part, Turn)]
    decided = {
        (one.job_id, one.value.partition(":")[0]) for turn in turns for one in turn.decided if one.what == "ends"
    }
    assert decided == {(jobs[0], "succeeded"), (jobs[1], "failed")}
    found = replay(file)
    assert found.is_same, found.changed
    assert found.decisions >= 6

    def begins_again() -> bool:  # whoever hung up does not stand in the way
        third = record(cloud, tmp_path / "third.jsonl.gz")
        assert third.stderr is not None
        begun = "recording;" in third.stderr.readline()
        third.send_signal(signal.SIGINT)
        third.communicate(timeout=120)
        (tmp_path / "third.jsonl.gz").unlink(missing_ok=True)
        return begun

    eventually(begins_again, within_s=20, what="another recording")


class Kept:
    """A recorder that keeps what it is told, and fails when it is told to."""

    def __init__(self, fails_at: int = -1) -> None:
        self.begun: list[int] = []
        self.turns: list[tuple[int, int]] = []
        self._fails_at = fails_at

    def begin(self, snapshot: Snapshot, *, now: int, **_: Any) -> None:
        self.begun.append(len(snapshot.nodes))

    def turn(self, inbox: Sequence[Fact], now: int, _plan: Plan) -> None:
        if len(self.turns) == self._fails_at:
            raise OSError("disk full")
        self.turns.append((now, len(inbox)))


class Lockable(MemoryStore):
    """A store whose file somebody else may hold the lock of."""

    is_locked = False

    def commit(self, batch: Batch) -> int:
        if self.is_locked:
            raise Unavailable("The database does not answer: database is locked.")
        return super().commit(batch)


@pytest.fixture
def store() -> Lockable:
    return Lockable()


@pytest.fixture
def loop(store: Lockable) -> Iterator[TurnLoop]:
    epoch, told = store.lead(holder="h"), {"sites": [SITE], "projects": PROJECTS, "rates": RATES, "policy": Policy()}

    def load(recorder: Recorder | None = None) -> World:
        snapshot = store.load()
        if recorder is not None:
            recorder.begin(snapshot, now=START, **told)  # type: ignore[arg-type]
        return world_from(snapshot, now=START, **told)  # type: ignore[arg-type]

    loop = TurnLoop(
        Driver(load(), Policy()),
        store,
        epoch=epoch,
        last_seq=0,
        clock=lambda: START,
        obey=lambda _commands: None,
        reload=load,
        on_fenced=lambda: None,
    )
    loop.start()
    yield loop
    loop.close()


def join(loop: TurnLoop, at: int) -> None:
    loop.put([NodeJoined(at_ns=START, node=node(at, 1))]).result(10)


def test_it_is_known_whether_the_database_takes_anything(
    store: Lockable, loop: TurnLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does when nothing came, when the last came through, and, as far as is known, when that was long ago."""
    loop.check_stores()
    store.is_locked = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            join(loop, 0)
    with pytest.raises(Unavailable, match="database is locked"):
        loop.check_stores()
    store.is_locked = False
    join(loop, 0)
    loop.check_stores()
    store.is_locked = True
    with pytest.raises(Unavailable):
        join(loop, 1)
    monkeypatch.setattr(turns, "_LATELY_S", 0.0)
    loop.check_stores()
    store.is_locked = False


def test_a_recorder_begins_with_a_world_made_anew_and_sees_every_turn(loop: TurnLoop) -> None:
    join(loop, 0)
    kept = Kept()
    loop.record(kept).result(10)
    assert kept.begun == [1]
    join(loop, 1)
    loop.record(None).result(10)
    join(loop, 2)
    assert [count for _, count in kept.turns] == [0, 1]


def test_a_recorder_that_fails_is_told_no_more_and_stops_nothing(loop: TurnLoop) -> None:
    kept = Kept(fails_at=1)
    loop.record(kept).result(10)
    join(loop, 0)
    join(loop, 1)
    assert [count for _, count in kept.turns] == [0]
    assert len(loop.driver.world.nodes) == 2


def test_a_reader_that_falls_behind_is_let_go() -> None:
    async def fall_behind() -> tuple[int, bool]:
        lines = _Lines(asyncio.get_running_loop())
        for _ in range(_MOST + 1):
            lines.write(b"x")
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="behind"):
            lines.write(b"y")
        return lines.queue.qsize(), lines.is_behind

    assert asyncio.run(fall_behind()) == (_MOST, True)
