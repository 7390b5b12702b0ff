"""Cases 1 to 6: the control plane, or a machine's agent, is killed at any step of a launch."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.cloud import eventually
from tests.faults.suite.bed import GPUS, Bed, Beds
from tests.faults.suite.killing import Call, Killer, Role
from tests.faults.suite.registry import case
from tidemill.outpost.main import running_pid

READY_S = 10.0
AGENT_S = 15.0


def _runs_after_restart(bed: Bed, job_id: str) -> float:
    """Seconds from the restart until the job's worker was started, by its own journal."""
    began_ns = time.monotonic_ns()
    bed.up()
    lives = bed.begun(job_id, within_s=READY_S + 20)
    return max(0.0, (lives[0].began_ns - began_ns) / 1e9)


@case(
    1,
    "kill -9 of the control plane right after a submission is acknowledged",
    "it runs <= 10 s after the restart; 1 start",
)
def acknowledged(beds: Beds) -> str:
    bed = beds.make()
    took = []
    for at in range(3):
        bed.govern(f"w{at}")
        job_id = bed.submit(bed.witness(f"w{at}", gpus=GPUS))
        bed.cloud.kill()
        took.append(_runs_after_restart(bed, job_id))
        bed.finish(job_id)
        assert len(bed.lives(job_id)) == 1
    bed.audit()
    assert max(took) <= READY_S, took
    return f"runs {max(took):.1f} s after the restart at most, of {len(took)}; 1 start each"


@case(
    2,
    "kill -9 between the commit of an allocation and its launch",
    "the same allocation is used, or freed, <= 10 s; I2; 1 start",
)
def allocated(beds: Beds) -> str:
    bed = beds.make(starts=False)
    killer = Killer(bed.folder)
    took = []
    for nth in (1, 2):
        bed.up(env=killer.env)
        killer.arm(nth)
        try:
            job_id = bed.submit(bed.witness(f"w{nth}", gpus=GPUS), key=f"k{nth}")
        except (OSError, http.client.HTTPException):
            job_id = ""
        assert bed.cloud.process is not None
        assert bed.cloud.process.wait(timeout=20) == -signal.SIGKILL, "it was to die at that commit"
        killer.disarm()
        began = time.monotonic()
        bed.up()
        job_id = job_id or bed.submit(bed.witness(f"w{nth}", gpus=GPUS), key=f"k{nth}")
        bed.begun(job_id, within_s=READY_S + 20)
        took.append(time.monotonic() - began)
        bed.finish(job_id)
        assert [life.fence for life in bed.lives(job_id)] == [1]
        bed.cloud.kill()
    bed.up()
    bed.audit()
    assert max(took) <= READY_S, took
    return f"started {max(took):.1f} s after the restart at most; attempt 1 each, 1 start"


@case(
    3,
    "kill -9 after a launch was sent, before what came of it is stored",
    "adopted by its launch id; 1 start, 0 restarts",
)
def sent(beds: Beds) -> str:
    bed = beds.make(starts=False)
    killer = Killer(bed.folder)
    adopted = 0
    for nth in (-2, -3, -4):
        bed.up(env=killer.env)
        killer.arm(nth)
        spec, key = bed.witness(f"w{nth}", lines=60, gpus=GPUS), f"k{nth}"
        job_id = bed.submit_surely(spec, key=key)
        eventually(partial(_died_or_began, bed, job_id), within_s=30, what="it died, or the job began")
        killer.disarm()
        bed.revive()
        bed.govern(f"w{-nth}")
        bed.finish(job_id)
        job = bed.cloud.job(job_id)
        assert (job["state"], job["attempts"], len(bed.lives(job_id))) == ("succeeded", 1, 1), job
        adopted += 1
        bed.cloud.kill()
    bed.up()
    bed.audit()
    return f"{adopted} of {adopted} adopted, 1 start each, 0 restarts"


STEPS: tuple[tuple[Role, Call, int], ...] = (
    ("control", "sync", 5),
    ("control", "send", 8),
    ("agent", "sync", 3),
    ("agent", "send", 6),
    ("runner", "send", 5),
)
"""Who is killed at what, and how many of the places are taken in a round that does not take all. A runner syncs nothing."""


def _died_or_began(bed: Bed, job_id: str) -> bool:
    """Whether the control plane died, and was started again, or the job began."""
    return bed.revive() or bool(bed.lives(job_id))


@case(
    4,
    "1 to 3 at syncs and sends of the control plane, the machine's agent and the runner: submit, launch, ready, stop, delete",
    "all invariants at each; no manual step; with --full at every one of them, else at some, which the round chooses",
)
def everywhere(beds: Beds) -> str:
    bed = beds.make(starts=False, engine="none")
    killer = Killer(bed.folder)
    bed.up(env=killer.env)
    home = bed.join("second", env=killer.env)
    dice = random.Random(beds.nth_round)
    told = []
    for role, call, some in STEPS:
        counted = []
        for number in range(2):  # the shorter of two lives has places that any life comes to, or nearly so
            killer.arm(1_000_000, role=role, call=call)
            _life_of_a_service(bed, home, killer, f"{role}-{call}-counted{number}")
            counted.append(killer.disarm())
        total = min(counted)
        places = range(1, total + 1)
        chosen = places if beds.is_full else sorted(dice.sample(places, min(some, total)))
        died = 0
        for nth in chosen:
            for sign in (1, -1) if call == "sync" and role == "control" else (dice.choice((1, -1)),):
                killer.arm(sign * nth, role=role, call=call)
                _life_of_a_service(bed, home, killer, f"{role}-{call}-{nth}-{'ba'[sign > 0]}")
                died += not killer.is_armed
                killer.disarm()
        told.append((role, call, died, len(chosen), total))
    bed.audit()
    assert all(2 * died >= chosen > 0 for *_, died, chosen, _ in told), told
    return "; ".join(
        f"{role} at {call}s: {died} kills, {chosen} of {total} places" for role, call, died, chosen, total in told
    )


def _life_of_a_service(bed: Bed, home: Path, killer: Killer, name: str) -> None:
    """A service is submitted, comes up, is stopped, and is gone, and something is governed meanwhile; whoever was killed
    is started again, as whatever looks after it would."""
    until = time.monotonic() + 90

    def look(job_id: str, *states: str) -> bool:
        bed.revive(env=killer.env)
        if not running_pid(home):
            bed.start_agent(home, env=killer.env)
        time.sleep(0.05)
        try:
            return bed.cloud.job(job_id)["state"] in states
        except (OSError, http.client.HTTPException, AssertionError):
            return False

    spec = bed.service(name, cpus=0.05, gpus=GPUS, retry=3, checkpoint={"grace": "1s"})
    job_id = bed.submit_surely(spec, key=name, env=killer.env)
    if name.startswith("runner"):
        bed.killed.add(job_id)
    bed.govern(name, env=killer.env)
    eventually(lambda: look(job_id, "running"), within_s=60, what=f"{name} runs")
    while not bed.stop(job_id):
        look(job_id)
        assert time.monotonic() < until, f"the stop of {name} is not taken"
    eventually(lambda: look(job_id, "cancelled"), within_s=60, what=f"{name} is gone")
    eventually(lambda: look(job_id, "cancelled") and not bed.running(), within_s=AGENT_S + 15, what=f"{name} is away")


@case(
    5,
    "kill -9 of a machine's agent at the moment when it has a worker's runner forked, and soon after",
    "adopted, or ended, <= 15 s; 1 lives",
)
def agent_after_start(beds: Beds) -> str:
    bed = beds.make(engine="none")
    killer = Killer(bed.folder)
    home = bed.join("second", env=killer.env)
    took = []
    for moment in (-1, 1, 0, 2, 5, 10, 20, 40, 80, 160):
        if abs(moment) == 1:  # before it asks for the fork, or when it asked and knows nothing of it
            killer.arm(moment, role="agent", call="fork")
        job_id = bed.submit(bed.witness(f"w{moment}", lines=30, gpus=GPUS))
        if abs(moment) == 1:
            eventually(lambda: not killer.is_armed, within_s=20, what="it died at that fork")
        else:
            time.sleep(moment / 1000)
            os.kill(running_pid(home), signal.SIGKILL)
        eventually(lambda: not running_pid(home), within_s=10, what="it is gone")
        began = time.monotonic()
        bed.start_agent(home, env=killer.env)
        bed.cloud.wait(job_id, "running", "succeeded", within_s=AGENT_S + 20)
        took.append(time.monotonic() - began)
        bed.finish(job_id)
        assert len(bed.lives(job_id)) == 1
    bed.audit()
    assert max(took) <= AGENT_S, took
    return f"known to run {max(took):.1f} s after the agent was back at most, of {len(took)}; 1 life each"


@case(
    6,
    "kill -9 of the agent, and of the control plane, under a service with 10 open streams",
    "streams unbroken; adopted; 0 restarts",
)
def agent_under_streams(beds: Beds) -> str:
    bed = beds.make(engine="none")
    home = bed.join("second")
    chunks = 80
    job_id = bed.submit(bed.service("streams", chunks=chunks, pause=0.1))
    bed.cloud.wait(job_id, "running")
    eventually(lambda: bed.cloud.job(job_id)["endpoint"], within_s=30, what="it is ready")
    begun = threading.Barrier(11)
    with ThreadPoolExecutor(10) as pool:
        streams = [pool.submit(_stream, bed, begun) for _ in range(10)]
        begun.wait(timeout=30)
        os.kill(running_pid(home), signal.SIGKILL)
        bed.cloud.kill()
        time.sleep(1)
        bed.start_agent(home)
        bed.up()
        got = [stream.result(timeout=60) for stream in streams]
    whole = list(range(chunks))
    assert all(each == whole for each in got), [len(each) for each in got]
    assert bed.cloud.job(job_id)["attempts"] == 1
    assert len(bed.lives(job_id)) == 1
    bed.stop(job_id)
    bed.finish(job_id)
    bed.audit()
    return f"10 of 10 streams whole ({chunks} chunks each), 0 restarts"


def _stream(bed: Bed, begun: threading.Barrier) -> list[int]:
    """The numbers of the chunks that came through the gateway."""
    numbers: list[int] = []
    until = time.monotonic() + 20
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", bed.cloud.gateway_port, timeout=60)
        body = json.dumps({"model": "streams", "stream": True, "prompt": "x"})
        connection.request("POST", "/v1/completions", body, {
            "Authorization": f"Bearer {bed.cloud.token}", "Content-Type": "application/json",
        })  # fmt: skip
        answer = connection.getresponse()
        if answer.status == 200:
            break
        answer.read()
        connection.close()
        assert time.monotonic() < until, answer.status
        time.sleep(0.2)
    for line in answer:
        if line.startswith(b"data: {"):
            if not numbers:
                begun.wait(timeout=30)
            numbers.append(json.loads(line[6:])["number"])
    return numbers
