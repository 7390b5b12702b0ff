"""Logs by offset: nothing twice, nothing missing, whatever is sent again."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.control.logs import LogStore
from tidemill.errors import Conflict, NotFound, StorageFull

JOB = "job_a-0"


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[LogStore]:
    store = LogStore(tmp_path)
    yield store
    store.shut()


def whole(logs: LogStore, rank: int = 0, attempt: int = 1) -> bytes:
    data = b""
    while piece := logs.read(JOB, attempt, rank, len(data), 1_000):
        data += piece
    return data


class KeepsOverlaps(LogStore):
    """The planted bug: bytes that are there already are kept again."""

    def append(self, job_id: str, attempt: int, rank: int, offset: int, data: bytes) -> int:
        return super().append(job_id, attempt, rank, self.size(job_id, attempt, rank), data)


class TakesGaps(LogStore):
    """The planted bug: a gap is not noticed."""

    def append(self, job_id: str, attempt: int, rank: int, offset: int, data: bytes) -> int:
        return super().append(job_id, attempt, rank, min(offset, self.size(job_id, attempt, rank)), data)


def send(kind: type[LogStore], original: bytes, cuts: list[tuple[int, int]]) -> bytes:
    """What is kept after the pieces ``cuts`` of the original were sent in that order, and then the rest."""
    with TemporaryDirectory() as folder:
        logs = kind(Path(folder), open_files=2)
        try:
            for start, length in cuts:
                with contextlib.suppress(Conflict):
                    logs.append(JOB, 1, 0, start, original[start : start + length])
            size = logs.size(JOB, 1, 0)
            logs.append(JOB, 1, 0, size, original[size:])
            return whole(logs)
        finally:
            logs.shut()


CUTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=12)


@given(original=st.binary(min_size=60, max_size=90), cuts=CUTS)
def test_any_resending_gives_exactly_the_original(original: bytes, cuts: list[tuple[int, int]]) -> None:
    assert send(LogStore, original, cuts) == original


@pytest.mark.parametrize("bug", [KeepsOverlaps, TakesGaps])
def test_the_property_catches_planted_bugs(bug: type[LogStore]) -> None:
    original = bytes(range(90))
    assert send(bug, original, [(0, 10), (5, 10), (40, 10)]) != original


def test_a_gap_says_from_where_to_go_on(logs: LogStore) -> None:
    assert logs.append(JOB, 1, 0, 0, b"abc") == 3
    with pytest.raises(Conflict) as gap:
        logs.append(JOB, 1, 0, 5, b"x")
    assert gap.value.data["expected"] == 3


def test_attempts_and_ranks_are_apart_and_listed_in_order(logs: LogStore) -> None:
    logs.append(JOB, 2, 0, 0, b"second")
    logs.append(JOB, 1, 10, 0, b"ten")
    logs.append(JOB, 1, 2, 0, b"two")
    logs.close(JOB, 2, 1)
    assert logs.ranks(JOB) == [(1, 2), (1, 10), (2, 0), (2, 1)]
    assert logs.ranks("job_nobody-0") == []
    assert whole(logs, rank=10) == b"ten"


def test_completeness_outlives_the_process(tmp_path: Path) -> None:
    first = LogStore(tmp_path)
    first.append(JOB, 1, 0, 0, b"abc")
    assert not first.is_complete(JOB, 1, 0)
    first.close(JOB, 1, 0)
    first.shut()
    second = LogStore(tmp_path)
    assert second.is_complete(JOB, 1, 0)
    assert second.size(JOB, 1, 0) == 3
    assert whole(second) == b"abc"


def test_few_files_are_open_however_many_logs_there_are(tmp_path: Path) -> None:
    logs = LogStore(tmp_path, open_files=4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for rank in range(50):
        logs.append(JOB, 1, rank, 0, b"x" * rank)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4
    assert [logs.size(JOB, 1, rank) for rank in range(50)] == list(range(50))
    logs.shut()
    logs.shut()


def test_over_the_cap_offsets_stay_true_and_a_note_says_so(tmp_path: Path) -> None:
    logs = LogStore(tmp_path, cap_bytes=100_000)
    data = os.urandom(150_000)
    for start in range(0, len(data), 30_000):
        assert logs.append(JOB, 1, 0, start, data[start : start + 30_000]) == start + 30_000
    assert logs.append(JOB, 1, 0, 150_000, bytes(50_000_000)) == 50_150_000
    kept = b""
    while piece := logs.read(JOB, 1, 0, len(kept), 1 << 20):
        kept += piece
    assert kept[:100_000] == data[:100_000]
    assert b"reached its limit of 100000 bytes" in kept[100_000:]
    assert len(kept) == logs.end(JOB, 1, 0) < 100_200
    assert (tmp_path / JOB / "1" / "0.log").stat().st_blocks * 512 < 200_000


@pytest.mark.parametrize(
    ("content", "lines", "tail"),
    [
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\nc\n", 0, b""),
        (b"a\nb\nc\n", 9, b"a\nb\nc\n"),
        (b"", 3, b""),
        (b"\n\n\n", 1, b"\n"),
        (b"x" * 200_000 + b"\n" + b"y" * 70_000 + b"\nz\n", 2, b"y" * 70_000 + b"\nz\n"),
    ],
)
def test_the_last_lines(logs: LogStore, content: bytes, lines: int, tail: bytes) -> None:
    logs.append(JOB, 1, 0, 0, content)
    assert content[logs.tail(JOB, 1, 0, lines) :] == tail


def test_watchers_hear_of_every_addition_until_they_stop(logs: LogStore) -> None:
    heard: list[str] = []
    stop = logs.watch(heard.append)
    logs.append(JOB, 1, 0, 0, b"a")
    logs.append(JOB, 1, 0, 0, b"a")
    logs.close(JOB, 1, 0)
    stop()
    logs.append(JOB, 1, 0, 1, b"b")
    assert heard == [JOB, JOB]


def test_names_that_could_leave_the_folder_are_nothing(logs: LogStore) -> None:
    for name in ("../x", "a/b", "", ".", "a\0b"):
        with pytest.raises(NotFound):
            logs.append(name, 1, 0, 0, b"x")


def test_many_writers_and_readers_at_once(tmp_path: Path) -> None:
    logs = LogStore(tmp_path, open_files=2)
    original = bytes(index % 251 for index in range(20_000))

    def write(rank: int) -> None:
        for start in range(0, len(original), 500):
            logs.append(JOB, 1, rank, max(0, start - 100), original[max(0, start - 100) : start + 500])
            assert original.startswith(logs.read(JOB, 1, (rank + 1) % 4, 0, 1 << 20))

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(4):
        assert logs.read(JOB, 1, rank, 0, 1 << 20) == original


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = LogStore(tmp_path)
    logs.append(JOB, 1, 0, 0, b"abc")
    real = os.pwrite
    room = 4

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written = real(fd, memoryview(data)[:room], offset)
        room -= written
        return written

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFull):
        logs.append(JOB, 1, 0, 3, b"defghijkl")
    monkeypatch.undo()
    assert logs.size(JOB, 1, 0) == 3
    assert (tmp_path / JOB / "1" / "0.log").read_bytes() == b"abc"
    assert logs.append(JOB, 1, 0, 3, b"defghijkl") == 12
    assert whole(logs) == b"abcdefghijkl"
