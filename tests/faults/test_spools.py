"""What machines know is kept on their disks: whichever process is killed while nobody can be reached, it comes once.

The machine's outpost, its runners and the control plane are killed with -9. The truth is in the workers' journals, and
in what the stand-in of a GPU's driver was made to say.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cloud import eventually
from tests.faults.suite.bed import Bed, Beds, environment
from tests.faults.suite.machines import runner_of
from tests.faults.suite.proxy import Link
from tests.postgres import NoPostgres, Postgres
from tidemill.outpost.main import running_pid

pytestmark = pytest.mark.long
LINES = 40
WHOLE = "".join(f"line {at} of rank 0\n" for at in range(LINES)).encode()
FELL_OFF = 79
"""The XID of a GPU that fell off the bus."""


class Far:
    """A machine with one GPU, behind a link that can be cut."""

    def __init__(self, beds: Beds) -> None:
        self.bed: Bed = beds.make(engine="none")
        self.link = Link(self.bed.cloud.port)
        self.tells = beds.folder("driver-tells")
        self.counted(1_000)
        with environment({"STANDIN_FOLDER": str(self.tells)}):
            self.home = self.bed.join("far", through=self.link.url)
        if not self.bed.node("far")["devices"]:
            pytest.skip("no C compiler to make the stand-in of a driver with")

    def counted(self, energy_mj: int) -> None:
        """The GPU's energy counter stands there now."""
        staging = self.tells / "new"
        staging.write_text(str(energy_mj))
        staging.replace(self.tells / "0.energy")

    def fail(self) -> None:
        """The driver says once that the GPU fails; return when the outpost was told."""
        alarm = self.tells / "0.xid"
        alarm.write_text(str(FELL_OFF))
        eventually(lambda: not alarm.exists(), within_s=20, what="its outpost was told")

    def kill_outpost(self) -> None:
        os.kill(running_pid(self.home), signal.SIGKILL)
        eventually(lambda: not running_pid(self.home), within_s=10, what="it is gone")

    def start_outpost(self) -> None:
        with environment({"STANDIN_FOLDER": str(self.tells)}):
            self.bed.start_agent(self.home)

    def heal(self) -> None:
        self.link.heal()
        self.link.reset()

    def failing(self) -> list[Any]:
        return list(self.bed.node("far")["failing"])

    def events(self, **wanted: str) -> Counter[str]:
        """How many events there are of each type, with such data."""
        told: Counter[str] = Counter()
        after = 0
        while page := self.bed.cloud.call("GET", f"/v1/events?limit=500&after={after}")[1]["items"]:
            after = page[-1]["seq"]
            for event in page:
                if all(event["data"].get(name) == value for name, value in wanted.items()):
                    told[event["type"]] += 1
        return told

    def check_jobs(self, jobs: list[str]) -> None:
        """Each ended once, with the log that it wrote. Raises: AssertionError."""
        cloud = self.bed.cloud
        for job in jobs:
            shown = cloud.job(job)
            assert (shown["state"], shown["attempts"]) == ("succeeded", 1), shown
            assert [life.ended for life in self.bed.lives(job)] == [True]
            eventually(lambda job=job: len(cloud.logs(job)) >= len(WHOLE), within_s=20, what="its log is here")
            assert cloud.logs(job) == WHOLE
            path = f"/v1/events?job={job}&limit=1000"
            told = Counter(str(one["type"]) for one in cloud.call("GET", path)[1]["items"])
            assert (told["WorkerExited"], told["Succeeded"], told["Placed"]) == (1, 1, 1), told

    def close(self) -> None:
        self.heal()
        self.bed.close()
        self.link.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def far(request: pytest.FixtureRequest) -> Iterator[Far]:
    try:
        server = Postgres() if request.param == "postgres" else None
    except NoPostgres as reason:
        pytest.skip(f"PostgreSQL cannot be run here: {reason}")
    beds = Beds(str(request.param), server)
    try:
        made = Far(beds)
        try:
            yield made
        finally:
            made.close()
    finally:
        beds.close()
        if server is not None:
            server.remove()


def test_a_machine_whose_processes_all_die_behind_a_cut_link_has_told_everything_once(far: Far) -> None:
    """One runner is killed after its worker ended, the other one lives on; the outpost is killed and begins anew."""
    bed = far.bed
    jobs = [bed.submit(bed.witness(f"w{at}", lines=LINES)) for at in range(3)]
    for job in jobs:
        bed.cloud.wait(job, "running")
    eventually(lambda: all(bed.cloud.logs(job) for job in jobs), within_s=20, what="the first lines are here")
    far.link.cut()
    far.link.reset()
    eventually(lambda: all(life.ended for life in bed.lives()), within_s=30, what="all ended behind the cut")
    far.fail()
    assert all(bed.cloud.logs(job) != WHOLE for job in jobs)
    time.sleep(1.5)  # what is to be kept for long is on the disk a second after the end
    for job in jobs[:2]:
        os.kill(runner_of(far.home, job), signal.SIGKILL)
    far.kill_outpost()
    far.start_outpost()
    far.heal()
    bed.finish(*jobs)
    far.check_jobs(jobs)
    eventually(far.failing, within_s=20, what="it is known that its GPU fails")
    assert far.events(node="far")["DeviceFailed"] == 1
    bed.audit()


def test_what_was_taken_and_not_answered_is_told_twice_and_taken_once(far: Far) -> None:
    """The control plane is killed between the two; somebody resumed the machine in between, and that stands."""
    bed = far.bed
    job = bed.submit(bed.witness("told", lines=LINES))
    bed.cloud.wait(job, "running")
    far.link.cut(up=False, down=True)
    far.link.reset()
    far.fail()
    eventually(far.failing, within_s=30, what="it is known that its GPU fails")
    assert bed.cloud.call("POST", "/v1/nodes/far/mark", {"marking": "resume"})[0] == 200
    assert far.failing() == []
    bed.cloud.kill()
    bed.up()
    far.heal()
    eventually(lambda: bed.node("far")["state"] == "ready", within_s=40, what="it is back")
    bed.finish(job)
    time.sleep(7)  # what was told again has arrived: the outpost tells something every 5 s
    assert far.failing() == []
    assert far.events(node="far")["DeviceFailed"] == 1
    far.check_jobs([job])
    bed.audit()
