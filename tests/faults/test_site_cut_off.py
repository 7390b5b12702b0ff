"""The only way to another site is cut for long while work there writes and ends: nothing lost, nothing twice.

The way is a process of its own that carries octets between the site's outpost, its runners, and the control plane. It
is stopped (what is sent vanishes from sight, and nobody is told), let go for moments in which things get through in
part, then killed, which breaks every connection, and begun anew. The truth is in a journal that the worker syncs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, eventually, free_port
from tests.faults.test_control_plane_faults import audit_books
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig

WAY = """
import asyncio, sys
async def carry(reader, writer):
    try:
        while octets := await reader.read(1 << 14):
            writer.write(octets)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def meet(reader, writer):
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    except OSError:
        writer.close()
        return
    await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))
async def main():
    server = await asyncio.start_server(meet, "127.0.0.1", int(sys.argv[1]))
    async with server:
        await server.serve_forever()
asyncio.run(main())
"""
LINES = 2_500
JOB = f"""python3 - <<'END'
import os, time
journal = os.open(os.environ["TIDEMILL_OUTPUT_DIR"] + "/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(what):
    os.write(journal, what + b"\\n")
    os.fsync(journal)
note(b"start")
for number in range({LINES}):
    print(f"line {{number}}", flush=True)
    time.sleep(0.002)
note(b"end")
END"""


class Way:
    """What leads from a site to the control plane."""

    def __init__(self, to: int) -> None:
        self.port, self._to = free_port(), to
        self.open()

    def open(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WAY, str(self.port), str(self._to)])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(timeout=10)


class Far:
    """A cloud with a site behind such a way."""

    def __init__(self, folder: Path) -> None:
        self.cloud = Cloud(folder / "head")
        self.cloud.up()
        self.way = Way(self.cloud.port)
        self.home = folder / "far"
        assert self.cloud.call("PUT", "/v1/sites/far", {"kind": "edge", "country": "DEU"})[0] == 200
        token = str(self.cloud.call("POST", "/v1/sites/far/tokens", {})[1]["token"])
        asked = OutpostConfig(
            control_url=f"http://127.0.0.1:{self.way.port}", key="", node_id="", name="edge", address="127.0.0.1"
        )
        eventually(lambda: joined(self.home, token, asked), within_s=30, what="it joins")
        joining.start_outpost(self.home)
        eventually(lambda: self.state() == "ready", within_s=60, what="the site is there")

    def state(self) -> str:
        nodes = self.cloud.call("GET", "/v1/nodes")[1]["items"]
        return next((str(node["state"]) for node in nodes if node["name"] == "edge"), "")

    def journal(self, job: str) -> list[str]:
        """What the job's worker wrote down itself, wherever it ran."""
        found = self.home.glob(f"local/volumes/*/{job}/output/journal")
        return [line for path in found for line in path.read_text().splitlines()]

    def events(self, job: str) -> list[str]:
        items = self.cloud.call("GET", f"/v1/events?job={job}&limit=1000")[1]["items"]
        return [str(one["type"]) for one in items]

    def close(self) -> None:
        if self.way.process.poll() is None:
            self.way.signal(signal.SIGCONT)
        joining.stop_outpost(self.home)
        self.cloud.down()
        self.way.close()


def joined(home: Path, token: str, asked: OutpostConfig) -> bool:
    """Whether it joined; the way may not be open yet."""
    from tidemill.errors import TidemillError

    try:
        joining.join(home, token, asked)
    except TidemillError:
        return False
    return True


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    made = Far(tmp_path)
    try:
        yield made
    finally:
        made.close()


def at_far(name: str, run: str) -> dict[str, Any]:
    return {"name": name, "run": run, "resources": {"cpus": 0.5}, "placement": {"sites": ["far"], "countries": ["DEU"]}}


def reason_at(answer: dict[str, Any], site: str) -> str:
    return next(str((one["reason"] or {}).get("code")) for one in answer["sites"] if one["site"] == site)


@pytest.mark.long
def test_what_ended_behind_a_cut_link_is_told_once_and_whole(far: Far) -> None:
    cloud = far.cloud
    job = cloud.submit(at_far("writes", JOB))
    cloud.wait(job, "running")
    eventually(lambda: b"line 9\n" in cloud.logs(job), within_s=30, what="its first lines are here")
    far.way.signal(signal.SIGSTOP)
    for _ in range(3):  # moments in which some of it gets through
        time.sleep(0.3)
        far.way.signal(signal.SIGCONT)
        time.sleep(0.03)
        far.way.signal(signal.SIGSTOP)
    assert "end" not in far.journal(job), "it still writes"
    eventually(lambda: far.journal(job) == ["start", "end"], within_s=60, what="it ended behind the cut")
    eventually(lambda: far.state() == "silent", within_s=60, what="it is missed")
    later = cloud.submit(at_far("later", "true"))
    site = cloud.call("GET", f"/v1/jobs/{job}/why")[1]["site"]
    assert site == "far (edge, DEU), as asked: sites: far; countries: DEU"
    why = cloud.call("GET", f"/v1/jobs/{later}/why")[1]
    assert (why["state"], reason_at(why, "far"), reason_at(why, "local")) == ("queued", "SiteCutOff", "SiteNotAllowed")
    quote = cloud.call("POST", "/v1/quotes", {"spec": {"name": "any", "run": "true"}})[1]
    assert quote["starts_now"]
    assert (reason_at(quote, "far"), reason_at(quote, "local")) == ("SiteCutOff", "None")
    elsewhere = cloud.submit({"name": "elsewhere", "run": "true", "resources": {"cpus": 0.5}})
    assert cloud.wait(elsewhere)["state"] == "succeeded"
    before = cloud.job(job)
    assert (before["state"], before["attempts"]) == ("running", 1), "it is not known that it ended, nor that it did not"
    far.way.close()
    far.way.open()
    assert cloud.wait(job, within_s=60)["state"] == "succeeded"
    assert cloud.wait(later, within_s=60)["state"] == "succeeded"
    assert far.state() == "ready"
    assert far.journal(job) == ["start", "end"], "it ran once"
    whole = "".join(f"line {number}\n" for number in range(LINES)).encode()
    eventually(lambda: len(cloud.logs(job)) >= len(whole), within_s=30, what="its log is here")
    assert cloud.logs(job) == whole
    told = far.events(job)
    assert (told.count("WorkerExited"), told.count("Succeeded"), told.count("Placed")) == (1, 1, 1), told
    audit_books(cloud, job, workers=1, was_away=False)
    assert cloud.integrity() == "ok"
