"""Cases 9 to 14: machines that stand still, that cannot be reached, and that are told something meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.cloud import eventually
from tests.faults.suite.bed import GPUS, Bed, Beds
from tests.faults.suite.proxy import Link
from tests.faults.suite.pytests import passed
from tests.faults.suite.registry import case
from tests.faults.suite.requests import ask
from tidemill.outpost.main import running_pid

LEASE_S = 3
SILENT_S = 20.0
"""After how long a machine that says nothing is called silent (``control.leases``)."""


def _leased(bed: Bed) -> None:
    """A site whose machines' workers hold a lease."""
    status, answer = bed.cloud.call(
        "PUT", "/v1/sites/edge", {"kind": "edge", "lease": f"{LEASE_S}s", "country": "DEU", "pue": 1.2}
    )
    assert status == 200, answer


def _runner(home: Path, job_id: str, attempt: int = 1) -> int:
    return int(json.loads((home / "local" / "launches" / _launch(job_id, attempt) / "runner.json").read_text())["pid"])


def _changes(bed: Bed, name: str) -> int:
    """How often the state of a machine changed, by the event log."""
    changes = after = 0
    while page := bed.cloud.call("GET", f"/v1/events?limit=500&after={after}")[1]["items"]:
        after = page[-1]["seq"]
        kinds = ("NodeFellSilent", "NodeLost", "NodeJoined", "NodeSuspected")
        changes += sum(event["type"] in kinds and event["data"].get("node") == name for event in page)
    return changes


@case(
    9,
    "SIGSTOP for longer than the lease, then SIGCONT: of a runner, of a runner and its machine's agent, of an agent",
    "a worker is ended by its machine or the kernel before another starts; never 2 live; what the old one says then: 409",
)
def stopped_runner(beds: Beds) -> str:
    bed = beds.make(engine="none")
    _leased(bed)
    homes = {name: bed.join(name, site="edge") for name in ("first", "second", "third")}
    kept = bed.submit(bed.witness("kept", lines=1600, gpus=GPUS))
    bed.cloud.wait(kept, "running")
    alone = homes[bed.cloud.job(kept)["workers"][0]["node"]]
    told = []
    for with_agent in (False, True):
        job_id = bed.submit(bed.witness(f"held{with_agent:d}", lines=1600, gpus=GPUS, retry=3))
        bed.cloud.wait(job_id, "running")
        eventually(lambda: bed.lives(job_id), within_s=20, what="it began")  # noqa: B023
        home = homes[bed.cloud.job(job_id)["workers"][0]["node"]]
        spec = json.loads((home / "local" / "launches" / _launch(job_id) / "spec.json").read_text())
        stood = [_runner(home, job_id), *([running_pid(home), running_pid(alone)] if with_agent else [])]
        bed.killed.add(job_id)
        began = time.monotonic()
        for pid in stood:
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: len(bed.lives(job_id)) == 2, within_s=90, what="it was started again")  # noqa: B023
        took = time.monotonic() - began
        late = _say_late(bed, spec)
        for pid in stood:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        first, second = bed.lives(job_id)
        gap = (second.began_ns - first.last_ns) / 1e9
        assert gap > 0, gap
        assert late == [(409, "fenced")] * 2, late
        eventually(lambda: bed.node(home.name)["state"] == "ready", within_s=40, what="it is back")  # noqa: B023
        assert first.launch not in bed.running()
        job = bed.cloud.job(job_id)
        assert (job["state"], job["attempts"]) == ("running", 2), job
        who = "runner and agent" if with_agent else "runner"
        told.append(
            f"{who}: ended {took - gap:.1f} s after the stop (lease {LEASE_S} s), started again {gap:.1f} s later"
        )
        bed.stop(job_id)
        bed.finish(job_id)
    eventually(lambda: bed.node(alone.name)["state"] == "ready", within_s=40, what="the agent alone is back")
    job = bed.cloud.job(kept)
    assert (job["state"], job["attempts"]) == ("running", 1), job
    bed.stop(kept)
    bed.finish(kept)
    bed.audit()
    return (
        "; ".join(told)
        + f"; late reports and beats: 409; an agent that stood still for {took:.0f} s: its job untouched"
    )


def _launch(job_id: str, attempt: int = 1) -> str:
    return f"run_{job_id.removeprefix('job_')}-{attempt}-0"


def _say_late(bed: Bed, spec: dict[str, Any]) -> list[tuple[int, str]]:
    """What is answered to a beat and to the report of an end, in the name of that launch and under its token."""
    ended = {"type": "exited", "at_ns": time.time_ns(), "exit_code": 0, "cause": "", "detail": "", "cpu_used_ns": 0}
    answers = []
    for path, body in (
        ("beat", {"cpu_used_ns": 0, "rss_bytes": 0}),
        ("report", {"events": [ended]}),
    ):
        status, _, answer = ask(
            bed, "POST", f"/v1/runners/{spec['launch_id']}/{path}", {"fence": spec["fence"], **body},
            token=spec["runner_token"],
        )  # fmt: skip
        answers.append((status, str(answer.get("code", ""))))
    return answers


@case(10, "a link that is cut for less than the lease, and 25 short failures", "0 cancelled, 0 started again")
def scattered_failures(beds: Beds) -> str:
    bed = beds.make(engine="none")
    status, answer = bed.cloud.call("PUT", "/v1/sites/edge", {"kind": "edge", "lease": "20s", "pue": 1.2})
    assert status == 200, answer
    link = Link(bed.cloud.port)
    bed.join("far", site="edge", through=link.url)
    jobs = [bed.submit(bed.witness(f"w{at}", lines=900)) for at in range(3)]
    for job_id in jobs:
        bed.cloud.wait(job_id, "running")
    dice = random.Random(10)
    for number in range(25):
        link.cut(up=dice.random() < 0.7, down=dice.random() < 0.7)
        time.sleep(dice.uniform(0.05, 0.6))
        link.heal()
        if number % 3 == 0:
            link.reset()
        time.sleep(dice.uniform(0.05, 0.4))
    link.cut()
    time.sleep(10)
    link.heal()
    bed.finish(*jobs, within_s=90)
    states = [(bed.cloud.job(job_id)["state"], bed.cloud.job(job_id)["attempts"]) for job_id in jobs]
    assert states == [("succeeded", 1)] * 3, states
    for job_id in jobs:
        assert bed.cloud.logs(job_id) == "".join(f"line {at} of rank 0\n" for at in range(900)).encode()
    bed.audit()
    link.close()
    return "25 failures and a cut of 10 s: 0 cancelled, 0 started again, logs whole"


@case(
    11,
    "a link that is cut for longer than the lease, and heals",
    "started again only when the lease is surely over; no orphan <= 10 s after",
)
def long_cut(beds: Beds) -> str:
    bed = beds.make(engine="none")
    _leased(bed)
    link = Link(bed.cloud.port)
    far = bed.join("far", site="edge", through=link.url)
    job_id = bed.submit(bed.witness("moved", lines=1200, retry=3))
    bed.cloud.wait(job_id, "running")
    eventually(lambda: bed.lives(job_id), within_s=20, what="it began")
    bed.join("near", site="edge")
    bed.killed.add(job_id)
    link.cut()
    began = time.monotonic()
    eventually(lambda: len(bed.lives(job_id)) == 2, within_s=120, what="it was started again")
    took = time.monotonic() - began
    first, second = bed.lives(job_id)
    gap = (second.began_ns - first.last_ns) / 1e9
    assert (first.home, gap > 0) == (far, True), gap
    link.heal()
    link.reset()
    healed = time.monotonic()
    eventually(lambda: bed.node("far")["state"] == "ready", within_s=40, what="it is back")
    back = time.monotonic() - healed
    alive = [launch for launch in bed.running() if launch == first.launch]
    assert not alive, alive
    bed.stop(job_id)
    bed.finish(job_id)
    bed.audit()
    link.close()
    told = passed("tests/faults/test_site_cut_off.py") if beds.store == "sqlite" else "spools: see sqlite"
    return (
        f"its worker ended {took - gap:.1f} s after the cut, started again {gap:.1f} s later; back {back:.1f} s after"
        f" healing, no orphan; {told}"
    )


@case(
    12,
    "a link that passes what a machine says and nothing that it is told",
    "silent <= 2 x 20 s; nothing is placed there; <= 1 change a minute",
)
def one_way(beds: Beds) -> str:
    bed = beds.make(engine="none")
    link = Link(bed.cloud.port)
    bed.join("far", through=link.url)
    job_id = bed.submit(bed.witness("there", lines=3000))
    bed.cloud.wait(job_id, "running")
    before = _changes(bed, "far")
    link.cut(up=False, down=True)
    began = time.monotonic()
    eventually(lambda: bed.node("far")["state"] == "silent", within_s=2 * SILENT_S, what="it is silent")
    took = time.monotonic() - began
    waiting = bed.submit(bed.witness("waiting", lines=2))
    for _ in range(20):
        assert bed.node("far")["state"] == "silent", "it flaps"
        time.sleep(0.5)
    assert bed.cloud.job(waiting)["state"] == "queued"
    assert bed.cloud.job(job_id)["state"] == "running"
    changes = _changes(bed, "far") - before
    link.heal()
    link.reset()
    eventually(lambda: bed.node("far")["state"] == "ready", within_s=40, what="it is back")
    bed.finish(waiting)
    bed.stop(job_id)
    bed.finish(job_id)
    assert bed.cloud.job(job_id)["attempts"] == 1
    bed.audit()
    link.close()
    assert changes <= 1, changes
    return f"silent after {took:.1f} s, {changes} change of state, nothing placed there, its job untouched"


@case(
    13,
    "a stop while the machine cannot be reached, and a crash of the control plane",
    "not forgotten; not over before it is confirmed; done <= 10 s after",
)
def stop_while_away(beds: Beds) -> str:
    bed = beds.make(engine="none")
    link = Link(bed.cloud.port)
    bed.join("far", through=link.url)
    job_id = bed.submit(bed.witness("far", lines=3000, checkpoint={"grace": "1s"}))
    bed.cloud.wait(job_id, "running")
    link.cut()
    assert bed.stop(job_id)
    bed.cloud.kill()
    bed.up()
    for _ in range(10):
        assert bed.cloud.job(job_id)["state"] == "stopping", bed.cloud.job(job_id)["state"]
        time.sleep(0.3)
    assert bed.running(), "nothing could have ended it yet"
    link.heal()
    link.reset()
    healed = time.monotonic()
    bed.cloud.wait(job_id, "cancelled", within_s=30)
    took = time.monotonic() - healed
    assert took <= 10, took
    assert not bed.running()
    bed.audit()
    link.close()
    return f"stopping until it healed, cancelled {took:.1f} s after"


@case(14, "a cancellation during a launch, and during the start after a loss", "cancelled; 0 processes <= 30 s")
def cancelled(beds: Beds) -> str:
    bed = beds.make(engine="none")
    home = bed.join("second")
    count = 0
    for delay_ms in (0, 1, 3, 8, 20, 50, 120, 300):
        job_id = bed.submit(bed.witness(f"launch{delay_ms}", lines=600, gpus=1, checkpoint={"grace": "1s"}))
        time.sleep(delay_ms / 1000)
        assert bed.stop(job_id)
        count += 1
    for delay_ms in (0, 10, 60, 200):
        job_id = bed.submit(bed.witness(f"again{delay_ms}", lines=600, gpus=GPUS, retry=5, checkpoint={"grace": "1s"}))
        bed.cloud.wait(job_id, "running")
        bed.killed.add(job_id)
        eventually(lambda: bed.lives(job_id), within_s=20, what="it began")  # noqa: B023
        os.kill(_runner(home, job_id), signal.SIGKILL)
        time.sleep(delay_ms / 1000)
        if delay_ms == 60:
            os.kill(running_pid(home), signal.SIGKILL)
            eventually(lambda: not running_pid(home), within_s=10, what="it is gone")
            bed.start_agent(home)
        assert bed.stop(job_id)
        count += 1
    began = time.monotonic()
    bed.finish(*bed.stopped, within_s=40)
    states = {bed.cloud.job(job_id)["state"] for job_id in bed.stopped}
    assert states == {"cancelled"}, states
    eventually(lambda: not bed.running(), within_s=30, what="no process is left")
    took = time.monotonic() - began
    bed.audit()
    return f"{count} of {count} cancelled, no process {took:.1f} s later"
