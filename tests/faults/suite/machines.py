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
from tidemill.control.leases import DRIFT, MARGIN_NS
from tidemill.outpost.main import running_pid

LEASE_S = 3
GRACE_S = 2
_GRACE = {"grace": f"{GRACE_S}s"}
_BEAT_S = 2.0
"""How long before a cut a runner may have been answered last."""
_WATCHED_S = 62.0
"""How long a machine is watched that is heard and hears nothing: longer than the minute in which it may not flap."""
SILENT_S = 20.0
"""After how long a machine that says nothing is called silent (``control.leases``)."""


def _leased(bed: Bed) -> None:
    """A site whose machines' workers hold a lease."""
    status, answer = bed.cloud.call(
        "PUT", "/v1/sites/edge", {"kind": "edge", "lease": f"{LEASE_S}s", "country": "DEU", "pue": 1.2}
    )
    assert status == 200, answer


def runner_of(home: Path, job_id: str, attempt: int = 1) -> int:
    """The process id of the runner of a job that is on that machine."""
    return int(json.loads((home / "local" / "launches" / _launch(job_id, attempt) / "runner.json").read_text())["pid"])


def _changes(bed: Bed, name: str) -> list[int]:
    """When the state of a machine changed, in ns, by the event log."""
    changes: list[int] = []
    after = 0
    while page := bed.cloud.call("GET", f"/v1/events?limit=500&after={after}")[1]["items"]:
        after = page[-1]["seq"]
        kinds = ("NodeFellSilent", "NodeLost", "NodeJoined", "NodeSuspected")
        changes += [e["data"]["at_ns"] for e in page if e["type"] in kinds and e["data"].get("node") == name]
    return changes


def _launches(home: Path) -> list[str]:
    """What a machine has of launches, also of those that are over."""
    return [path.name for path in (home / "local" / "launches").iterdir() if not path.name.startswith(".")]


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
        bed.begun(job_id)
        home = homes[bed.cloud.job(job_id)["workers"][0]["node"]]
        spec = json.loads((home / "local" / "launches" / _launch(job_id) / "spec.json").read_text())
        stood = [runner_of(home, job_id), *([running_pid(home), running_pid(alone)] if with_agent else [])]
        bed.killed.add(job_id)
        began = time.monotonic()
        for pid in stood:
            os.kill(pid, signal.SIGSTOP)
        bed.begun(job_id, times=2, within_s=90)
        took = time.monotonic() - began
        late = _say_late(bed, spec)
        for pid in stood:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        first, second = bed.lives(job_id)
        gap = (second.began_ns - first.last_ns) / 1e9
        assert gap > 0, gap
        assert late == [(409, "fenced")] * 2, late
        bed.await_ready(home.name)
        assert first.launch not in bed.running()
        job = bed.cloud.job(job_id)
        assert (job["state"], job["attempts"]) == ("running", 2), job
        who = "runner and agent" if with_agent else "runner"
        told.append(
            f"{who}: ended {took - gap:.1f} s after the stop (lease {LEASE_S} s), started again {gap:.1f} s later"
        )
        bed.stop(job_id)
        bed.finish(job_id)
    bed.await_ready(alone.name)
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
    jobs = [bed.submit(bed.witness(f"moved{at}", lines=1200, retry=3, checkpoint=_GRACE)) for at in range(3)]
    stubborn = bed.witness("stubborn", lines=1200, retry=3, checkpoint=_GRACE)
    jobs.append(bed.submit(stubborn | {"run": f"trap '' TERM\n{stubborn['run']}"}))
    for job_id in jobs:
        bed.cloud.wait(job_id, "running")
    for job_id in jobs:
        bed.begun(job_id)
    bed.join("near", site="edge")
    bed.killed |= set(jobs)
    cut_ns = time.monotonic_ns()
    link.cut()
    eventually(lambda: all(len(bed.lives(one)) == 2 for one in jobs), within_s=120, what="they were started again")
    pairs = [bed.lives(job_id) for job_id in jobs]
    assert {first.home for first, _ in pairs} == {far}
    ended = max(first.last_ns - cut_ns for first, _ in pairs) / 1e9
    began = min(second.began_ns - cut_ns for _, second in pairs) / 1e9
    gap = min(second.began_ns - first.last_ns for first, second in pairs) / 1e9
    assert gap > 0, gap
    deadline = (LEASE_S + GRACE_S) * (1 + 1 / DRIFT) + MARGIN_NS / 1e9 - _BEAT_S
    assert began >= max(deadline, SILENT_S), f"started again {began:.1f} s after the cut, which is too soon"
    link.heal()
    link.reset()
    healed = time.monotonic()
    old = {first.launch for first, _ in pairs}
    bed.await_ready("far", within_s=10)
    eventually(lambda: not old & set(bed.running()), within_s=10, what="nothing of the first ones lives")
    eventually(lambda: not _launches(far), within_s=10, what="their machine has nothing of them any more")
    back = time.monotonic() - healed
    assert back <= 10, f"nothing is left of them only {back:.1f} s after the link healed"
    again = bed.submit(bed.witness("again", lines=2, gpus=GPUS))
    bed.finish(again)
    assert bed.cloud.job(again)["workers"][0]["node"] == "far", "its GPUs are whole again"
    for job_id in jobs:
        assert bed.cloud.job(job_id)["attempts"] == 2
        bed.stop(job_id)
    bed.finish(*jobs)
    bed.audit()
    link.close()
    told = [passed("tests/faults/test_spools.py", "-k", beds.store)]
    if beds.store == "sqlite":
        told.append(passed("tests/faults/test_site_cut_off.py"))
    return (
        f"{len(jobs)} workers ended {ended:.1f} s after the cut, started again {began:.1f} s after it ({gap:.1f} s later);"
        f" nothing of them left {back:.1f} s after healing; {'; '.join(told)}"
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
    job_id = bed.submit(bed.witness("there", lines=6000))
    bed.cloud.wait(job_id, "running")
    before = len(_changes(bed, "far"))
    link.cut(up=False, down=True)
    began = time.monotonic()
    eventually(lambda: bed.node("far")["state"] == "silent", within_s=2 * SILENT_S, what="it is silent")
    took = time.monotonic() - began
    waiting = bed.submit(bed.witness("waiting", lines=2))
    heard = len(bed.cloud.logs(job_id))
    while time.monotonic() - began < took + _WATCHED_S:
        assert bed.node("far")["state"] == "silent", "it flaps"
        assert bed.cloud.job(waiting)["state"] == "queued", "something was placed where no command arrives"
        assert (bed.cloud.job(job_id)["state"], bed.cloud.job(job_id)["attempts"]) == ("running", 1)
        time.sleep(0.5)
    assert len(bed.cloud.logs(job_id)) > heard, "what it says does not arrive, so this is no one-way cut"
    link.heal()
    link.reset()
    healed = time.monotonic()
    bed.await_ready("far")
    back = time.monotonic() - healed
    bed.finish(waiting)
    changes = _changes(bed, "far")[before:]
    most = max(sum(0 <= other - at < 60e9 for other in changes) for at in changes)
    bed.stop(job_id)
    bed.finish(job_id)
    assert bed.cloud.job(job_id)["attempts"] == 1
    bed.audit()
    link.close()
    assert most <= 1, f"its state changed {most} times in a minute"
    return (
        f"silent after {took:.1f} s, nothing placed there for {_WATCHED_S:.0f} s, its job untouched, ready {back:.1f} s after"
        f" healing; {len(changes)} changes of state, {most} in a minute"
    )


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
        bed.begun(job_id)
        os.kill(runner_of(home, job_id), signal.SIGKILL)
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
