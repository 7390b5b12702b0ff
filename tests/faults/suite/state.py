"""Cases 16, 17, 21, 22: what is said twice or late, who leads, which version acts, and what a backup knows."""

from __future__ import annotations

import random
import shutil
import threading
import time

from tests.cloud import eventually
from tests.faults.suite.bed import Beds
from tests.faults.suite.proxy import Link
from tests.faults.suite.pytests import passed
from tests.faults.suite.registry import case
from tidemill import bootstrap
from tidemill.errors import Conflict

RESTORED_S = 60.0


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
    job_id = bed.submit(bed.witness("held", lines=60))
    try:
        bootstrap.run_foreground(bed.cloud.home, {"port": 0, "gateway_port": 0})
        raise AssertionError("a second control plane runs in one home")
    except Conflict as error:
        said = error.detail
    bed.finish(job_id)
    bed.audit()
    return f"a second one in the home is refused: {said}"


@case(
    21,
    "kill -9 at every statement of each migration; runners of the version before",
    "old schema or new, never half; what runs is untouched",
)
def migrations(beds: Beds) -> str:
    which = "sqlite" if beds.store == "sqlite" else "postgres"
    figures = [passed("tests/contract/test_migrations.py", "-k", which)]
    if beds.store == "sqlite":
        figures.append(passed("tests/faults/test_store_faults.py", "-k", "migrat"))
        figures.append(passed("tests/faults/test_upgrade.py", "-k", "released or killed"))
    return "; ".join(figures)


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
    kind = "sqlite" if beds.store == "sqlite" else "postgresql"
    figure = passed(
        "tests/faults/test_backup_faults.py",
        "-k",
        f"{kind} or old_backup or lost_attempt" if kind == "sqlite" else kind,
    )
    return f"back in {took:.1f} s, {kept} of {before} acknowledged under load there, running job adopted; {figure}"
