"""Cases 16, 17, 21, 22: what is said twice or late, who leads, which version acts, and what a backup knows."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

from tests.cloud import eventually
from tests.faults.suite.bed import GPUS, Bed, Beds, environment
from tests.faults.suite.proxy import Link
from tests.faults.suite.pytests import passed
from tests.faults.suite.registry import case
from tests.faults.suite.requests import ask
from tests.faults.test_upgrade import version
from tidemill import bootstrap
from tidemill.cli.upgrading import upgrade
from tidemill.errors import Conflict
from tidemill.outpost import joining
from tidemill.outpost.main import running_pid
from tidemill.store.backup import FENCE_STRIDE
from tidemill.store.sql import SqlStore

RESTORED_S = 60.0
FOLLOWED_S = 20.0


@case(
    16,
    "calls and answers between control plane and machine that are lost, repeated, late",
    "1 life or 0, by the final wish",
)
def repeated(beds: Beds) -> str:
    bed = beds.make(engine="none")
    link = Link(bed.cloud.port)
    bed.join("far", through=link.url)
    dice, calm, broken = random.Random(16), threading.Event(), [0]

    def disturb() -> None:
        while not calm.wait(dice.uniform(0.02, 0.25)):
            if dice.random() < 0.3:  # what is asked arrives, what is answered does not: it is asked again
                link.cut(up=False, down=True)
                time.sleep(dice.uniform(0.01, 0.1))
                link.reset()
                link.heal()
            else:
                link.reset()
            broken[0] += 1

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    wanted: list[str] = []
    for number in range(30):
        job_id = bed.submit(bed.witness(f"w{number}", lines=30, cpus=0.05, gpus=1, checkpoint={"grace": "1s"}))
        time.sleep(dice.uniform(0, 0.3))
        if number % 3:
            wanted.append(job_id)
        else:
            assert bed.stop(job_id)
    time.sleep(3)
    calm.set()
    disturbing.join()
    bed.finish(*wanted, *bed.stopped, within_s=120)
    assert {bed.cloud.job(job_id)["state"] for job_id in wanted} == {"succeeded"}
    assert all(len(bed.lives(job_id)) == 1 for job_id in wanted)
    assert all(len(bed.lives(job_id)) <= 1 for job_id in bed.stopped)
    bed.audit()
    link.close()
    return f"{broken[0]} breaks: {len(wanted)} of {len(wanted)} ran once, {len(bed.stopped)} stopped ones at most once"


@case(
    17,
    "two control planes; the leader stands still, is followed, and goes on",
    "followed <= 20 s, <= 5 s when killed; the old one writes nothing; I1, I2",
    is_alone=True,
)
def two_leaders(beds: Beds) -> str:
    if beds.store == "postgres":
        return passed("tests/faults/test_replicas.py", "tests/contract/test_standing.py")
    bed = beds.make()
    job_id = bed.submit(bed.witness("held", lines=200, gpus=GPUS))
    bed.cloud.wait(job_id, "running")
    process = bed.cloud.process
    assert process is not None
    os.kill(bed.cloud.pid, signal.SIGSTOP)
    try:
        try:
            bootstrap.run_foreground(bed.cloud.home, {"port": 0, "gateway_port": 0})
            raise AssertionError("a second control plane runs in one home")
        except Conflict as error:
            said = error.detail
        store = SqlStore(bed.url)  # as one would that is started over a copy of the lock's folder
        store.lead(holder="another")
        before = store.load().last_seq
    finally:
        os.kill(bed.cloud.pid, signal.SIGCONT)
    late: Counter[int | str] = Counter()
    for number in range(5):
        try:
            late[bed.cloud.call("POST", "/v1/workloads", {"spec": bed.witness(f"late{number}")})[0]] += 1
        except (OSError, http.client.HTTPException) as error:
            late[type(error).__name__] += 1
    assert not {200, 201, 202} & set(late), late
    process.wait(timeout=20)
    assert store.load().last_seq == before, "the old leader wrote"
    store.close()
    began = time.monotonic()
    bed.up()
    took = time.monotonic() - began
    bed.finish(job_id)
    assert (bed.cloud.job(job_id)["attempts"], len(bed.lives(job_id))) == (1, 1)
    bed.audit()
    assert took <= FOLLOWED_S, took
    return (
        f"a second one in the home is refused ({said}); the old one was answered {dict(late)}, wrote 0 events under its old"
        f" epoch and ended itself; followed in {took:.1f} s, the job untouched"
    )


@case(
    21,
    "kill -9 at every statement of each migration; runners, and then an agent, of another version than the control plane",
    "old schema or new, never half; what runs is untouched; each pair of versions places, runs and stops work",
)
def migrations(beds: Beds) -> str:
    which = "sqlite" if beds.store == "sqlite" else "postgres"
    figures = [passed("tests/contract/test_migrations.py", "-k", which)]
    if beds.store == "sqlite":
        figures.append(passed("tests/faults/test_store_faults.py", "-k", "migrat"))
        figures.append(passed("tests/faults/test_upgrade.py", "-k", "released or killed"))
    return "; ".join([_two_versions(beds), *figures])


def _two_versions(beds: Beds) -> str:
    """The figure of an agent and a control plane of different versions, each of them once the newer one."""
    bed = beds.make(engine="none")
    home = bed.join("far")
    runs = bed.submit(bed.witness("runs", lines=3000))
    bed.cloud.wait(runs, "running")
    python = version(beds.folder("next"), "99.0.0")
    worked = []

    def works(which: str) -> None:
        """A job is placed, runs and ends there, and another one is stopped."""
        done = bed.submit(bed.witness(f"done-{len(worked)}", lines=3))
        ended = bed.submit(bed.witness(f"stopped-{len(worked)}", lines=3000, checkpoint={"grace": "1s"}))
        bed.finish(done)
        bed.cloud.wait(ended, "running")
        assert bed.stop(ended)
        bed.finish(ended)
        states = [bed.cloud.job(job_id)["state"] for job_id in (done, ended)]
        assert states == ["succeeded", "cancelled"], (which, states)
        assert bed.cloud.job(runs)["state"] == "running", which
        worked.append(which)

    _start_with(bed, home, python)
    works("agent of the next version, control plane of this one")
    joining.stop_outpost(home)
    bed.start_agent(home)
    done = upgrade(bed.cloud.home, python, timeout_s=60)
    assert (done.after, done.unheard) == ("99.0.0", 0), done
    eventually(lambda: bed.node("far")["state"] == "ready", within_s=40, what="it is ready")
    works("agent of this version, control plane of the next one")
    _start_with(bed, home, python)
    works("both of the next version")
    bed.stop(runs)
    bed.finish(runs)
    job = bed.cloud.job(runs)
    assert (job["attempts"], len(bed.lives(runs))) == (1, 1), job
    bed.audit()
    return f"{len(worked)} of 3 pairs of versions worked, a job lived through all of them"


def _start_with(bed: Bed, home: Path, python: str) -> None:
    """Have the agent of a machine replaced by that of another version."""
    joining.stop_outpost(home)
    reading, writing = os.pipe()
    with environment(bed.devices(home.name)), (home / "outpost.log").open("ab") as log:
        subprocess.Popen(
            [python, "-m", "tidemill.outpost.main", str(home), str(writing)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writing,), start_new_session=True, cwd="/",
        )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert json.loads(pipe.read()) == {"ready": True}
    assert running_pid(home)


@case(
    22,
    "a backup under load, the home lost, restored; and an old backup restored",
    "nothing acknowledged before it is lost; <= 60 s; adopted",
)
def restored(beds: Beds) -> str:
    bed = beds.make()
    done = [bed.submit(bed.witness(f"done{at}", lines=1)) for at in range(10)]
    bed.finish(*done)
    runs = bed.submit(bed.witness("runs", lines=800))
    bed.cloud.wait(runs, "running")
    stop, during = threading.Event(), []

    def load() -> None:
        while not stop.wait(0.05):
            during.append(bed.cloud.submit(bed.witness(f"during{len(during)}", lines=1, cpus=0.01)))

    loading = threading.Thread(target=load)
    loading.start()
    path = bed.folder / "backup.tar.gz"
    database = bed.url if beds.store == "postgres" else ""
    eventually(lambda: len(during) > 20, within_s=60, what="it is under load")
    before, then = len(during), bed.record.copy()
    bootstrap.backup(bed.cloud.home, path, database=database)
    stop.set()
    loading.join()
    bed.cloud.kill()
    for piece in bed.cloud.home.iterdir():
        if piece.name != "local":
            shutil.rmtree(piece) if piece.is_dir() else piece.unlink()
    began = time.monotonic()
    bootstrap.restore(path, bed.cloud.home, database=database, is_replaced=True)
    bed.up()
    bed.record = then
    assert bed.cloud.job(runs)["state"] == "running"
    took = time.monotonic() - began
    kept = sum(bed.cloud.call("GET", f"/v1/jobs/{job_id}")[0] == 200 for job_id in during[:before])
    assert kept == before, f"{before - kept} of {before} submissions that came before the backup are gone"
    bed.finish(runs)
    job = bed.cloud.job(runs)
    assert (job["state"], job["attempts"], len(bed.lives(runs))) == ("succeeded", 1, 1), job
    for job_id in done:
        assert bed.cloud.job(job_id)["state"] == "succeeded"
    assert took <= RESTORED_S, took
    known = {item["id"] for item in bed.cloud.call("GET", "/v1/jobs?limit=1000")[1]["items"]}
    bed.finish(*(job_id for job_id in during if job_id in known))
    bed.forgotten |= set(during) - known
    bed.killed |= set(during)  # what came to its end after the backup is not known to have, and runs again
    old = _old_backup(bed, database)
    bed.audit()
    kind = "sqlite" if beds.store == "sqlite" else "postgresql"
    figure = passed(
        "tests/faults/test_backup_faults.py",
        "-k",
        f"{kind} or old_backup or lost_attempt" if kind == "sqlite" else kind,
    )
    return (
        f"back in {took:.1f} s, {kept} of {before} acknowledged under load there, running job adopted; {old}; {figure}"
    )


def _old_backup(bed: Bed, database: str) -> str:
    """The figure of an old backup that is restored: it does not know of work that runs, which then is left alone."""
    known = bed.submit(bed.witness("known", lines=1200))
    gate = bed.submit(bed.witness("gate", lines=60))
    waits = bed.submit(bed.witness("waits", lines=1200, after=["gate"], checkpoint={"grace": "1s"}))
    for job_id in (known, gate):
        bed.cloud.wait(job_id, "running")
    path, then = bed.folder / "old.tar.gz", bed.record.copy()
    bootstrap.backup(bed.cloud.home, path, database=database)
    unknown = bed.cloud.submit(bed.witness("unknown", lines=6000, checkpoint={"grace": "1s"}))
    for job_id in (unknown, waits):
        bed.cloud.wait(job_id, "running")
    bed.forgotten |= {unknown, waits}
    bed.killed |= {gate, waits}
    eventually(lambda: bed.lives(waits), within_s=20, what="it began, which the backup does not know")
    launch = eventually(lambda: bed.lives(unknown), within_s=20, what="it began")[0].launch
    bed.cloud.kill()
    bootstrap.restore(path, bed.cloud.home, database=database, is_replaced=True)
    bed.up()
    bed.record = then
    eventually(
        lambda: launch in [one["launch"] for one in bed.cloud.call("GET", "/v1/strangers")[1]["items"]],
        within_s=30, what="what it does not know is seen",
    )  # fmt: skip
    assert bed.cloud.call("GET", f"/v1/jobs/{unknown}")[0] == 404
    bed.finish(known, waits, within_s=120)
    assert (bed.cloud.job(known)["attempts"], len(bed.lives(known))) == (1, 1)
    first, second = bed.lives(waits)
    assert first.fence == 1
    assert second.fence > FENCE_STRIDE, second.fence
    assert first.last_ns < second.began_ns
    assert (first.ended, second.ended) == (False, True)
    assert launch in bed.running(), "what it did not know was killed"
    assert ask(bed, "POST", f"/v1/strangers/{launch}/stop?grace=1")[0] == 202
    eventually(lambda: launch not in bed.running(), within_s=30, what="it is ended when somebody says so")
    return f"an old one: 1 launch that it does not know left alone and listed, a lost attempt fenced by {second.fence}"
