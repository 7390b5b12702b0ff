"""Copies of data sets on a machine: right or not there, shared, resumed, bounded, whatever is killed when."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.model.storage import DataFile, Manifest, manifest_of
from tidemill.runner import datacache
from tidemill.runner.client import Channel, Closing, Unreachable
from tidemill.runner.datacache import DataCache
from tidemill.runner.datasource import ControlPlaneSource
from tidemill.runner.prepare import SetupFailed

NEVER = threading.Event()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(files: dict[str, bytes]) -> Manifest:
    return manifest_of(DataFile(path, len(content), digest(content)) for path, content in files.items())


class Store:
    """Where files come from. ``cut`` is after how many octets a connection breaks, ``away`` how often there is none."""

    def __init__(self, *sets: dict[str, bytes], cut: int = 0, away: int = 0) -> None:
        self.contents = {digest(content): content for files in sets for content in files.values()}
        self.asked: list[tuple[str, int]] = []
        self.cut = cut
        self.away = away
        self.lock = threading.Lock()

    def __call__(self) -> Store:
        return self

    def open(self, file: DataFile, offset: int) -> BinaryIO:
        with self.lock:
            self.asked.append((file.path, offset))
            if self.away:
                self.away -= 1
                raise Unreachable("planted")
        content = self.contents[file.digest][offset:]
        return io.BytesIO(content[: self.cut] if self.cut else content)

    def rest(self, until: threading.Event) -> bool:
        return until.is_set()


def read_back(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def hold(cache: DataCache, files: dict[str, bytes], store: Any = None, project: str = "prj", **named: Any) -> Any:
    source = store or Store(files)
    return cache.hold(project, "the data set images:1", manifest(files), source, stopping=named.get("stopping", NEVER))


FILES = {"a.txt": b"hello", "deep/er/b.bin": bytes(range(256)) * 40, "deep/empty": b"", "copy": b"hello"}


def test_a_set_is_fetched_once_and_its_files_are_those_of_the_manifest(tmp_path: Path) -> None:
    cache, store = DataCache(tmp_path), Store(FILES)
    first = hold(cache, FILES, store)
    again = hold(cache, FILES, store)
    assert read_back(first.tree) == FILES
    assert first.tree == again.tree
    assert sorted(path for path, _ in store.asked) in (["a.txt", "deep/er/b.bin"], ["copy", "deep/er/b.bin"])
    assert cache.present() == (f"prj/{manifest(FILES).digest}",)
    assert (first.tree / "a.txt").stat().st_mode & 0o222 == 0
    first.release()
    again.release()


def test_a_file_in_two_versions_is_fetched_once_but_never_across_projects(tmp_path: Path) -> None:
    cache = DataCache(tmp_path)
    old, new = FILES, FILES | {"new": b"more"}
    hold(cache, old).release()
    store = Store(new)
    hold(cache, new, store).release()
    assert [path for path, _ in store.asked] == ["new"]
    other = Store()
    other.contents = {}
    with pytest.raises(KeyError):  # who only knows the SHA-256 gets nothing from another's copy
        hold(cache, FILES, other, project="prj_other")


def test_a_broken_connection_goes_on_where_it_broke(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(5000)
    store = Store({"f": content}, cut=1000, away=2)
    held = hold(DataCache(tmp_path), {"f": content}, store)
    assert read_back(held.tree) == {"f": content}
    assert [offset for _, offset in store.asked] == [0, 0, 0, 1000, 2000, 3000, 4000]


def test_a_part_that_was_left_is_gone_on_with_and_a_wrong_one_is_begun_anew(tmp_path: Path) -> None:
    files = {"good": b"x" * 900, "bad": b"y" * 900}
    parts = tmp_path / "prj" / "parts"
    parts.mkdir(parents=True)
    (parts / digest(files["good"])).write_bytes(b"x" * 400)
    (parts / digest(files["bad"])).write_bytes(b"z" * 400)
    store = Store(files)
    assert read_back(hold(DataCache(tmp_path), files, store).tree) == files
    assert sorted(store.asked) == [("bad", 0), ("bad", 400), ("good", 400)]


def test_what_is_not_what_was_announced_is_not_there(tmp_path: Path) -> None:
    store = Store(FILES)
    store.contents[digest(b"hello")] = b"HELLO"
    with pytest.raises(SetupFailed, match=r"(a\.txt|copy) of the data set images:1 is not what it was"):
        hold(DataCache(tmp_path), FILES, store)
    assert DataCache(tmp_path).present() == ()
    assert not (tmp_path / "prj" / "files" / digest(b"hello")[:2] / digest(b"hello")).exists()
    assert read_back(hold(DataCache(tmp_path), FILES).tree) == FILES


def test_many_at_once_share_one_fetch(tmp_path: Path) -> None:
    store = Store(FILES)
    held: list[Any] = []
    threads = [threading.Thread(target=lambda: held.append(hold(DataCache(tmp_path), FILES, store))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 6
    assert len(store.asked) == 2


def test_who_waited_for_anothers_fetch_does_not_wait_for_the_end_of_its_use(tmp_path: Path) -> None:
    """The second wanted to fetch as well; the first has fetched, and uses it for as long as its job runs."""

    class Watched(threading.Event):
        def __init__(self) -> None:
            super().__init__()
            self.waits = threading.Event()

        def wait(self, timeout: float | None = None) -> bool:
            self.waits.set()
            return super().wait(timeout)

    place = datacache._Place(tmp_path / "prj", manifest(FILES).digest)
    reading = place.lock(fcntl.LOCK_SH, NEVER)  # so that both find nothing, and wait to fetch it
    held: list[Any] = []
    stopping = [Watched(), Watched()]
    threads = [
        threading.Thread(target=lambda each=each: held.append(hold(DataCache(tmp_path), FILES, stopping=each)))
        for each in stopping
    ]
    for thread in threads:
        thread.start()
    assert all(each.waits.wait(30) for each in stopping)
    os.close(reading)
    for thread in threads:
        thread.join(5)
    for each in stopping:
        each.set()
    assert len(held) == 2, "one waits for the job of the other to end"


def test_who_waits_for_anothers_fetch_can_be_stopped(tmp_path: Path) -> None:
    inside, go, stop = threading.Event(), threading.Event(), threading.Event()

    class Slow(Store):
        def open(self, file: DataFile, offset: int) -> BinaryIO:
            inside.set()
            go.wait(30)
            return super().open(file, offset)

    first = threading.Thread(target=lambda: hold(DataCache(tmp_path), FILES, Slow(FILES)).release())
    first.start()
    inside.wait(30)
    stop.set()
    with pytest.raises(Closing):
        hold(DataCache(tmp_path), FILES, stopping=stop)
    go.set()
    first.join()
    assert len(DataCache(tmp_path).present()) == 1


# ------------------------------------------------------------------ bounds


def test_what_was_not_used_for_longest_goes_and_what_is_used_stays(tmp_path: Path) -> None:
    cache = DataCache(tmp_path, limit_bytes=2_500, margin_bytes=0)
    sets = [{"f": bytes([number]) * 1_000} for number in range(4)]
    used = hold(cache, sets[0])
    hold(cache, sets[1]).release()
    hold(cache, sets[2]).release()  # the first is older, but in use
    assert cache.present() == tuple(sorted(f"prj/{manifest(sets[number]).digest}" for number in (0, 2)))
    used.release()
    os.utime(tmp_path / "prj" / "sets" / manifest(sets[0]).digest / "lock")
    hold(cache, sets[3]).release()
    assert cache.present() == tuple(sorted(f"prj/{manifest(sets[number]).digest}" for number in (0, 3)))
    assert sum(path.stat().st_size for path in (tmp_path / "prj" / "files").rglob("*") if path.is_file()) <= 2_500


def test_when_all_is_in_use_it_is_said_that_there_is_no_room(tmp_path: Path) -> None:
    cache = DataCache(tmp_path, limit_bytes=1_500, margin_bytes=0)
    held = hold(cache, {"f": b"1" * 1_000})
    with pytest.raises(SetupFailed, match=r"no room for the data set images:1 of 1,000 bytes") as refused:
        hold(cache, {"f": b"2" * 1_000})
    assert refused.value.cause == "storage_full"
    with pytest.raises(SetupFailed, match="raise the setting data_cache, or mount it"):
        hold(cache, {"f": b"3" * 2_000})
    assert read_back(held.tree) == {"f": b"1" * 1_000}


def test_a_full_disk_is_a_reason_and_leaves_room(tmp_path: Path) -> None:
    """A real file system of 2 MiB, in a mount namespace of its own."""
    script = """
import sys, threading
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.adapters import test_datacache as t
root = Path(sys.argv[1])
cache = t.DataCache(root, margin_bytes=-(1 << 30))  # as if another filled the disk meanwhile
files = {str(n): bytes([n]) * 400_000 for n in range(8)}
try:
    t.hold(cache, files)
except t.SetupFailed as failure:
    print(failure.cause, failure)
print(sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != "lock"))
small = {"s": b"s" * 1_000_000}
print(t.read_back(t.hold(cache, small).tree) == small)
"""
    import sys

    mount = f'mount -t tmpfs -o size=2m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path} {Path.cwd()}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount, script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"mounts are not permitted here: {done.stderr.strip()}")
    first, left, works = done.stdout.splitlines()
    assert first.startswith("storage_full there is no room for the data set images:1 of 3,200,000 bytes"), done.stderr
    assert (left, works) == ("0", "True"), done.stderr


# ------------------------------------------------------------------ killed at any point

STEPS = ("rename", "link", "mkdir", "fsync", "unlink", "pwrite", "ftruncate", "open", "utime", "chmod", "rmdir")


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Whether a process that did ``work`` was killed before its file operation number ``step``, without a word."""
    child = os.fork()
    if child == 0:
        count, lock = 0, threading.Lock()

        def counted(call: Any) -> Any:
            def wrapped(*given: Any, **named: Any) -> Any:
                nonlocal count
                with lock:
                    count += 1
                    if count > step:
                        os.kill(os.getpid(), signal.SIGKILL)
                return call(*given, **named)

            return wrapped

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:  # noqa: BLE001 - it is a process of its own
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def sound(root: Path, sets: list[dict[str, bytes]], limit: int) -> list[str]:
    """What is wrong with a cache in which nobody is."""
    wrong = []
    known = {manifest(files).digest: files for files in sets}
    for name in DataCache(root).present():
        tree = root / name.replace("/", "/sets/") / "tree"
        if read_back(tree) != known[tree.parent.name]:
            wrong.append(f"{name} is not what it should be")
    files = [file for file in (root / "prj" / "files").rglob("*") if file.is_file()]
    wrong += [f"{file} is not what its name says" for file in files if digest(file.read_bytes()) != file.name]
    size = sum(file.stat().st_size for file in files)
    if limit and size > limit:
        wrong.append(f"{size} bytes are kept, and {limit} may be")
    return wrong


SETS = [{"a": b"1" * 700, "b/c": b"2" * 300}, {"a": b"1" * 700, "d": b"3" * 500}, {"e": b"4" * 900}]


def crash_everywhere(root: Path, stride: int = 1) -> list[str]:
    """What was wrong after a kill at any of the steps of filling a cache past its bound."""
    wrong: list[str] = []

    def work(place: Path) -> None:
        for files in SETS:
            hold(DataCache(place, limit_bytes=1_700, margin_bytes=0), files).release()

    step = 0
    while True:
        place = root / str(step)
        killed = killed_at(step, lambda place=place: work(place))  # type: ignore[misc]
        wrong += [f"step {step}: {what}" for what in sound(place, SETS, 0)]
        work(place)
        wrong += [f"step {step}, afterwards: {what}" for what in sound(place, SETS, 1_700)]
        if manifest(SETS[-1]).digest not in "".join(DataCache(place).present()):
            wrong.append(f"step {step}: the last set is not there")
        shutil.rmtree(place, ignore_errors=True)
        if not killed:
            assert step > 60
            return wrong
        step += stride


def test_a_kill_at_any_step_leaves_a_cache_that_is_right_and_goes_on(tmp_path: Path) -> None:
    assert crash_everywhere(tmp_path) == []


def test_a_planted_bug_is_found_by_killing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that writes at the file's own place is caught: its half is taken for the whole."""

    def careless(place: Any, file: DataFile, name: str, source: Any, stopping: threading.Event) -> None:
        target = place.file(file.digest)
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            held = os.open(target, os.O_RDWR | os.O_CREAT)
            for at in range(0, file.size, 100):
                os.pwrite(held, source.open(file, at).read(100), at)

    monkeypatch.setattr(datacache, "_fetch_file", careless)
    assert any("is not what" in what for what in crash_everywhere(tmp_path, stride=3))


# ------------------------------------------------------------------ any order of use


def operations() -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from(("hold", "release")), st.integers(0, 4)), max_size=14)


def run_operations(given_ops: list[tuple[str, int]], limit: int) -> list[str]:
    """What was wrong at any time while sets were used and let go in that order, in a bounded cache."""
    sets = [{"own": bytes([48 + number]) * (100 + 50 * number), "shared": b"s" * 100} for number in range(5)]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cache = DataCache(root, limit_bytes=limit, margin_bytes=0)
        held: dict[int, list[Any]] = {}
        for kind, number in given_ops:
            if kind == "hold":
                needs = {digest(c): len(c) for other in {*held, number} for c in sets[other].values()}
                try:
                    held.setdefault(number, []).append(hold(cache, sets[number]))
                except SetupFailed:
                    if sum(needs.values()) <= limit:
                        wrong.append(f"{number} was refused though there is room")
                    if not held[number]:
                        del held[number]
            elif held.get(number):
                held[number].pop().release()
                if not held[number]:
                    del held[number]
            gone = [one for one in held if not (root / "prj/sets" / manifest(sets[one]).digest / "tree").is_dir()]
            wrong += [f"{one} is in use, and gone" for one in gone]
            wrong += sound(root, sets, limit)
        for each in held.values():
            for one in each:
                one.release()
    return wrong


@settings(max_examples=60, deadline=None)
@given(operations(), st.integers(300, 1_200))
def test_the_bound_is_kept_and_nothing_in_use_goes(given_ops: list[tuple[str, int]], limit: int) -> None:
    assert run_operations(given_ops, limit) == []


def test_a_planted_bug_is_found_by_using(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing without asking for the lock is caught."""
    real = fcntl.flock

    def careless(held: int, kind: int) -> None:
        if kind != fcntl.LOCK_EX | fcntl.LOCK_NB or Path(f"/proc/self/fd/{held}").resolve().name != "lock":
            real(held, kind)

    monkeypatch.setattr(fcntl, "flock", careless)
    ops = [("hold", 0), ("hold", 1), ("hold", 2), ("hold", 3)]
    assert any("in use, and gone" in what for what in run_operations(ops, 500))


def test_errors_that_are_no_lack_of_room_stay_what_they_are(tmp_path: Path) -> None:
    class Broken(Store):
        def open(self, file: DataFile, offset: int) -> BinaryIO:
            raise PermissionError(errno.EACCES, "planted")

    with pytest.raises(PermissionError):
        hold(DataCache(tmp_path), FILES, Broken(FILES))


# ------------------------------------------------------------------ where files come from


def test_what_an_address_does_not_give_twice_comes_through_the_control_plane(tmp_path: Path) -> None:
    """The control plane points to where nobody listens; asked to pass the file on itself, it does, from the offset."""
    content, asked = b"0123456789", []
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}/bucket/f?signed"

    class ControlPlane(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append((self.path.rpartition("/")[2][64:], self.headers.get("Range"), self.headers["Authorization"]))
            if not self.path.endswith("?relay=true"):
                self.send_response(307)
                self.send_header("Location", nowhere)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), ControlPlane) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        channel = Channel(
            api_url=f"http://127.0.0.1:{server.server_address[1]}",
            endpoint_file=None,
            token="t",
            prefix="/v1/runners/l",
        )
        part = tmp_path / "prj" / "parts" / digest(content)
        part.parent.mkdir(parents=True)
        part.write_bytes(content[:4])
        files = {"f": content}
        wanted = manifest(files).digest
        held = hold(DataCache(tmp_path), files, lambda: ControlPlaneSource(channel.copy(), wanted, "images:1"))
        server.shutdown()
    assert read_back(held.tree) == files
    assert asked == [
        ("", "bytes=4-", "Bearer t"),
        ("", "bytes=4-", "Bearer t"),
        ("?relay=true", "bytes=4-", "Bearer t"),
    ]
