"""What outposts keep until it was taken: over kills, torn lines, full disks and lost answers, each fact once."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.api_peer import Peer, PuppetEngine, eventually
from tests.faults.suite.proxy import Link as Way
from tidemill.errors import Conflict
from tidemill.model.events import Brought, Delivered, DeviceFailed, DeviceRecovered, Marking, NodeMarked, Sampled
from tidemill.model.fleet import Device, Node, NodeState
from tidemill.model.ids import DeviceId, NodeId, SiteId
from tidemill.outpost import link as linking
from tidemill.outpost.link import Link
from tidemill.outpost.spool import Spool
from tidemill.runner.client import Channel

NODE = NodeId("node_far")
GPU = DeviceId("GPU-far-0")
XID = "XID 79"


def sampled(energy_mj: int, node: NodeId = NODE) -> Sampled:
    return Sampled(at_ns=energy_mj, node_id=node, energy_mj=((GPU, energy_mj),))


def failed(at_ns: int = 1) -> DeviceFailed:
    return DeviceFailed(at_ns=at_ns, node_id=NODE, device_id=GPU, detail=XID)


def recovered() -> DeviceRecovered:
    return DeviceRecovered(at_ns=2, node_id=NODE, device_id=GPU)


def facts(spool: Spool) -> list[Brought]:
    return [one.fact for one in spool.first(1_000)]


def numbers(spool: Spool) -> list[int]:
    return [one.number for one in spool.first(1_000)]


# ---------------------------------------------------------------- the file


def test_what_was_kept_is_there_again_and_what_was_taken_is_not(tmp_path: Path) -> None:
    told = [sampled(5), failed(), recovered(), NodeMarked(at_ns=3, node_id=NODE, marking=Marking.DRAIN, until_ns=9)]
    spool = Spool(tmp_path / "facts")
    spool.append(told)
    before = numbers(spool)
    spool.close()  # as kill -9 does: nothing more is written
    again = Spool(tmp_path / "facts")
    assert (facts(again), numbers(again)) == (told, before)
    again.taken(before[1])
    again.close()
    last = Spool(tmp_path / "facts")
    assert facts(last) == told[2:]
    last.taken(before[3])
    assert (len(last), facts(last)) == (0, [])
    last.append([sampled(6)])
    assert numbers(last)[0] > before[3]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_a_crash_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path / "facts")
    spool.append([sampled(1)])
    spool.append([failed()])
    spool.close()
    os.truncate(tmp_path / "facts", (tmp_path / "facts").stat().st_size - cut)
    again = Spool(tmp_path / "facts")
    assert facts(again) == [sampled(1)]
    again.append([recovered()])
    again.close()
    assert facts(Spool(tmp_path / "facts")) == [sampled(1), recovered()]


def test_a_damaged_line_takes_no_other_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path / "facts")
    spool.append([sampled(1), failed(), recovered()])
    spool.close()
    lines = (tmp_path / "facts").read_bytes().splitlines(keepends=True)
    (tmp_path / "facts").write_bytes(lines[0] + b"\x00" * 40 + b"\n" + lines[2])
    assert facts(Spool(tmp_path / "facts")) == [sampled(1), recovered()]
    assert "line 2 is damaged" in caplog.text


def test_numbers_grow_though_the_clock_goes_back(tmp_path: Path) -> None:
    now = iter([1_000, 900, 900, 5])
    spool = Spool(tmp_path / "facts", clock=lambda: next(now))
    spool.append([sampled(1), sampled(2), sampled(3)])
    spool.taken(1_002)
    spool.close()
    again = Spool(tmp_path / "facts", clock=lambda: next(now))
    again.append([sampled(4)])
    assert numbers(again) == [1_003]


def test_a_file_that_is_older_than_what_was_told_from_it_does_not_swallow_what_is_new(tmp_path: Path) -> None:
    """It was lost, and the clock went back: the control plane passes over the numbers, and says which it knows."""
    spool = Spool(tmp_path / "facts", clock=lambda: 10)
    spool.append([failed()])
    spool.close()
    again = Spool(tmp_path / "facts", clock=lambda: 10)
    again.append([sampled(1), recovered()])
    again.taken(5_000)
    assert (facts(again), numbers(again)) == ([sampled(1), recovered()], [5_001, 5_002])
    again.close()
    assert numbers(Spool(tmp_path / "facts")) == [5_001, 5_002]


def test_too_many_counters_are_thinned_out_and_nothing_else_is(tmp_path: Path) -> None:
    other = NodeId("node_other")
    spool = Spool(tmp_path / "facts", cap_bytes=20_000)
    spool.append([failed()])
    spool.append([sampled(7, other)])
    for at in range(500):
        spool.append([sampled(at)])
    spool.append([recovered()])
    kept = facts(spool)
    assert (tmp_path / "facts").stat().st_size < 21_000
    assert (kept[0], kept[-1]) == (failed(), recovered())
    assert sampled(7, other) in kept
    assert sampled(499) in kept
    spool.close()
    assert facts(Spool(tmp_path / "facts")) == kept


def test_the_file_does_not_grow_with_what_was_taken(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "facts")
    for at in range(30):
        spool.append([DeviceFailed(at_ns=at, node_id=NODE, device_id=GPU, detail="x" * 100_000)])
        spool.taken(numbers(spool)[-1])
    assert (tmp_path / "facts").stat().st_size < 1_200_000
    highest = spool._last
    spool.close()
    assert Spool(tmp_path / "facts")._last == highest


def test_two_processes_do_not_keep_in_one_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "facts")
    with pytest.raises(Conflict, match="Another process"):
        Spool(tmp_path / "facts")
    spool.close()
    Spool(tmp_path / "facts").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_on_a_full_disk_what_is_new_waits_in_memory_and_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    try:
        spool = Spool(folder / "facts")
        spool.append([sampled(1)])
        filler = folder / "filler"
        with pytest.raises(OSError, match="space"):
            filler.write_bytes(bytes(1 << 20))
        told: list[Brought] = [sampled(1), *(failed(at) for at in range(200)), recovered()]
        spool.append(told[1:-1])
        spool.append(told[-1:])
        assert facts(spool) == told
        assert caplog.text.count("waits in memory") == 1
        spool.taken(numbers(spool)[0])
        filler.unlink()
        spool.append([])
        assert "can be written again" in caplog.text
        spool.close()
        again = Spool(folder / "facts")
        assert [fact for fact in facts(again) if fact != told[0]] == told[1:]
        again.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


# ---------------------------------------------------------------- over the wire


class Far:
    """An outpost of one machine behind a link that can be cut, in this process."""

    def __init__(self, folder: Path) -> None:
        self.peer = Peer(folder / "head")
        plane = self.peer.plane
        assert self.peer.call("PUT", "/v1/sites/far", {"kind": "edge"})[0] == 200
        organization = plane.store.organizations()[0].id
        _, _, self._token = plane.sites.adopt(
            plane.sites.find("far"), organization, name="far", key="k" * 32, engine="local"
        )
        self.way = Way(self.peer.port)
        self.home = folder / "far"
        self.home.mkdir()
        device = Device(
            id=GPU, index=0, model="H100-SXM", reported="NVIDIA H100", memory_bytes=1 << 36, idle_mw=70_000, busy_mw=700_000
        )  # fmt: skip
        self.engine = PuppetEngine([
            Node(
                id=NODE, site_id=SiteId("far"), name="far", state=NodeState.READY, version=1, boot_id="b",
                address="127.0.0.1", cpu_milli=8_000, memory_bytes=32 << 30, disk_bytes=1 << 40, devices=(device,),
            )
        ])  # fmt: skip
        self.tells: list[Brought] = []
        self.start()
        eventually(lambda: NODE in plane.world.nodes, what="it joined")

    def start(self) -> None:
        """A process of the outpost begins."""
        channel = Channel(api_url=self.way.url, endpoint_file=None, token=self._token, prefix="/v1/outposts/self")
        self.spool = Spool(self.home / "facts.jsonl")
        self.link = Link(self.engine, channel, api_url=self.way.url, facts=self._facts, spool=self.spool)
        for thread in self.link._threads:
            thread.start()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self.link._closing.is_set():
            try:
                self.link._fetch()
            except Exception:  # noqa: BLE001 - as Link.run does
                self.link._channel.rest(self.link._closing)

    def _facts(self) -> list[Brought]:
        told, self.tells = self.tells, []
        return told

    def tell(self, *told: Brought) -> None:
        """The machine has that to tell; return when it is kept."""
        before = self.spool._last
        self.tells = [*told]
        eventually(lambda: self.spool._last > before, what="it is kept")

    def crash(self) -> None:
        """The outpost's process is gone, with what it had in memory."""
        self.link.close()
        self.link._posting.abort()
        for thread in [*self.link._threads, self._thread]:
            thread.join(20)
        self.spool.close()

    def failing(self) -> list[str]:
        return [device for device, _ in self.peer.plane.world.nodes[NODE].failing]

    def events(self, kind: str) -> int:
        return sum(one.entry.type == kind for one in self.peer.plane.store.events(limit=1_000))

    def resume(self) -> None:
        status, _ = self.peer.call("POST", "/v1/nodes/far/mark", {"marking": "resume"})
        assert status == 200

    def close(self) -> None:
        self.way.heal()
        self.way.reset()
        self.crash()
        self.way.close()
        self.peer.close()


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    monkeypatch.setattr(linking, "_FACTS_S", 0.05)
    monkeypatch.setattr(linking, "_WAIT_S", 0.5)
    (tmp_path / "head").mkdir()
    made = Far(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_what_an_outpost_knew_when_it_was_killed_is_told_by_the_next_one(far: Far) -> None:
    far.way.cut()
    far.way.reset()
    far.tell(failed())
    far.crash()
    far.start()
    assert far.failing() == []
    far.way.heal()
    far.way.reset()
    eventually(far.failing, what="it is told")
    eventually(lambda: not len(far.spool), what="it is taken")
    assert far.events("DeviceFailed") == 1


def test_what_was_taken_is_passed_over_when_its_answer_was_lost(far: Far) -> None:
    """An operator resumed the machine in between: that is not undone by what is told once more."""
    far.tell(sampled(10))
    eventually(lambda: not len(far.spool), what="it is taken")
    far.way.cut(up=False, down=True)
    far.tell(failed(), NodeMarked(at_ns=5, node_id=NODE, marking=Marking.DRAIN, by="the cloud"))
    eventually(far.failing, what="it is told")
    far.resume()
    far.crash()
    far.start()
    far.way.heal()
    far.way.reset()
    eventually(lambda: not len(far.spool), what="it is taken")
    node = far.peer.plane.world.nodes[NODE]
    assert (far.failing(), node.marking) == ([], "")
    assert (far.events("DeviceFailed"), far.events("NodeDrained")) == (1, 1)
    mark = far.peer.plane.store.load().deliveries
    assert [one.number for one in mark] == [far.spool._last]


def test_what_is_told_before_the_first_look_after_a_restart_is_not_lost(far: Far) -> None:
    """The control plane does not yet know which outpost works a machine, and takes it from whoever tells of it."""
    sites = far.peer.plane.sites
    outpost = next(one for one in sites._outposts.values() if one.name == "far")
    engine = sites._engines[SiteId("far")]
    report: Any = linking.report_of([failed()], [2**60])
    engine._where.clear()
    [delivered] = sites.facts_of(outpost, report)
    assert isinstance(delivered, Delivered)
    assert (delivered.last, delivered.numbers, delivered.failed) == (2**60, (2**60,), (failed(),))
    strange: Any = linking.report_of([sampled(1, NodeId("node_a"))], [2**60])
    [passed] = sites.facts_of(outpost, strange)
    assert isinstance(passed, Delivered)
    assert (passed.last, passed.sampled) == (2**60, ()), "a machine of another site is not its to speak of"


def test_a_report_that_is_refused_loses_only_what_is_wrong_with_it(far: Far, caplog: pytest.LogCaptureFixture) -> None:
    far.way.cut()
    nonsense: Any = "soon"
    far.tell(failed(), failed(nonsense), NodeMarked(at_ns=5, node_id=NODE, marking=Marking.DRAIN, by="the cloud"))
    far.way.heal()
    far.way.reset()
    eventually(lambda: not len(far.spool), what="it is taken, or dropped")
    assert caplog.text.count("was refused and is dropped") == 1
    assert "soon" in caplog.text
    assert (far.failing(), far.peer.plane.world.nodes[NODE].marking) == ([GPU], "drain")
