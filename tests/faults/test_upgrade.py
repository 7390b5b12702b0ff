"""Upgrades of a running cloud: jobs go on, and what does not come up leaves the old version running.

The new version is this one's source with another number and one migration more; the oldest one that is tried is the
released one, from the history of the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.test_backup import postgres
from tests.cloud import Cloud, eventually
from tests.faults.test_backup_faults import WITNESS, journal_of, let_go, task
from tests.postgres import Postgres
from tidemill import __version__
from tidemill.cli.upgrading import upgrade
from tidemill.control.archive import verify_backup
from tidemill.errors import Conflict, InvalidRequest, InvalidSetting, Unavailable
from tidemill.store import backup, schema
from tidemill.store.sql import SqlStore

__all__ = ["postgres"]

ROOT = Path(__file__).parents[2]
RELEASED = "57fa48109c2f0295c1e34c38b00314302ed2ceff"
NEXT = "9001"
MIGRATION = f'''"""One table more."""

import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{schema.HEAD}"


def upgrade() -> None:
    op.create_table("novelties", sa.Column("id", sa.Text, primary_key=True, nullable=False))
'''


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "home")
    made.up()
    yield made
    made.down()


def version(folder: Path, number: str, *, source: Path = ROOT / "src") -> str:
    """A python whose Tidemill has that number and a migration more."""
    shutil.copytree(source, folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    package = folder / "src" / "tidemill"
    change(package / "__init__.py", f'"{__version__}"', f'"{number}"')
    change(package / "store" / "schema.py", f'HEAD: Final = "{schema.HEAD}"', f'HEAD: Final = "{NEXT}"')
    (package / "store" / "migrations" / "versions" / f"r{NEXT}.py").write_text(MIGRATION)
    return python_of(folder)


def python_of(folder: Path) -> str:
    """A python that finds Tidemill there."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "src"} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, path
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def revision_of(url: str) -> str:
    store = SqlStore(url)
    try:
        with store._database.reading() as connection:
            return backup.revision_of(connection)
    finally:
        store.close()


def check_witness(cloud: Cloud, job_id: str) -> None:
    """It was started once, and ends well now."""
    let_go(cloud, job_id)
    job = cloud.wait(job_id)
    assert (job["state"], job["attempts"]) == ("succeeded", 1)
    assert journal_of(cloud, job_id) == ["start 1", "end 1"]
    assert cloud.logs(job_id) == b"done\n"


def test_jobs_go_on_under_the_new_version(cloud: Cloud, tmp_path: Path) -> None:
    python = version(tmp_path / "next", "99.0.0")
    jobs = [cloud.submit(task(WITNESS, name=f"runs-{number}")) for number in range(3)]
    for job_id in jobs:
        cloud.wait(job_id, "running")
    said: list[str] = []
    done = upgrade(cloud.home, python, timeout_s=60, tell=said.append)
    assert (done.before, done.after, done.revision) == (__version__, "99.0.0", NEXT)
    assert (done.workers, done.unheard) == (3, 0)
    assert said[-1] == "waiting for the runners"
    status = cloud.call("GET", "/v1/status")[1]
    assert (status["version"], status["workers"], status["heard"]) == ("99.0.0", 3, 3)
    assert verify_backup(done.backup).database.revision == schema.HEAD
    assert [path.name for path in (cloud.home / "backups").iterdir()] == [done.backup.name]
    for job_id in jobs:
        check_witness(cloud, job_id)
    with pytest.raises(InvalidSetting, match="of a later version of Tidemill"):
        upgrade(cloud.home, sys.executable, timeout_s=60)
    assert cloud.call("GET", "/v1/status")[1]["version"] == "99.0.0", "the one that runs was not touched"


BROKEN = {
    "ends": ("bootstrap.py", "        app = create_app(plane, certificate)\n", "        raise Conflict('worn out')\n"),
    "hangs": ("bootstrap.py", "        def started() -> None:\n", "        def started() -> None:\n            time.sleep(600)\n"),
    "is deaf": ("control/runners.py", "        self.beats[launch_id] = ", "        raise Unavailable\n        self.beats[launch_id] = "),
    "ends after it acted": (
        "bootstrap.py",
        "            log.info(\"ready at %s, gateway at %s\", settings.api_url, settings.gateway_url)\n            tell()\n",
        "            time.sleep(0.3)\n            os._exit(1)\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how == "ends" else pytest.mark.long) for how in BROKEN])
def test_a_version_that_does_not_come_up_gives_way_to_the_old_one(cloud: Cloud, tmp_path: Path, how: str) -> None:
    python = version(tmp_path / "next", "99.0.0")
    name, old, new = BROKEN[how]
    change(tmp_path / "next" / "src" / "tidemill" / name, old, new)
    job_id = cloud.submit(task(WITNESS))
    cloud.wait(job_id, "running")
    url = f"sqlite:///{cloud.home / 'control.db'}"
    with pytest.raises(Unavailable, match=f"database is as it was, and version {__version__} runs again") as said:
        upgrade(cloud.home, python, timeout_s=5)
    assert said.value.data == {"went_back": True, "is_running": True}
    assert cloud.call("GET", "/v1/status")[1]["version"] == __version__
    assert revision_of(url) == schema.HEAD
    store = SqlStore(url)
    assert store.integrity() == ()
    store.close()
    check_witness(cloud, job_id)


def test_a_migration_that_fails_is_found_before_anything_is_stopped(cloud: Cloud, tmp_path: Path) -> None:
    python = version(tmp_path / "next", "99.0.0")
    path = tmp_path / "next" / "src" / "tidemill" / "store" / "migrations" / "versions" / f"r{NEXT}.py"
    path.write_text(MIGRATION + "    raise ValueError('no good')\n")
    pid = cloud.pid
    with pytest.raises(Conflict, match=r"cannot use a copy of this installation(.|\n)*no good"):
        upgrade(cloud.home, python, timeout_s=60)
    assert cloud.pid == pid
    assert cloud.call("GET", "/v1/healthz")[0] == 200


KILLED = """
import os, sys
from pathlib import Path
from tidemill import bootstrap
from tidemill.cli.upgrading import upgrade
bootstrap.start_daemon = lambda *_, **__: os._exit(9)
upgrade(Path(sys.argv[1]), sys.argv[2], timeout_s=60)
"""


@pytest.mark.long
def test_an_upgrade_killed_before_the_new_version_started_is_finished_by_up(cloud: Cloud, tmp_path: Path) -> None:
    python = version(tmp_path / "next", "99.0.0")
    job_id = cloud.submit(task(WITNESS))
    cloud.wait(job_id, "running")
    done = subprocess.run([sys.executable, "-c", KILLED, str(cloud.home), python], check=False)
    assert done.returncode == 9
    left = list((cloud.home / "backups").glob(".last-state-*"))
    assert len(left) == 1
    cloud.up()
    assert cloud.job(job_id)["state"] == "running"
    assert upgrade(cloud.home, python, timeout_s=60).after == "99.0.0"
    assert not list((cloud.home / "backups").glob(".last-state-*"))
    check_witness(cloud, job_id)


def test_what_cannot_be_upgraded_is_said(cloud: Cloud, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no Tidemill that it could run"):
        upgrade(cloud.home, "/bin/false", timeout_s=60)
    with pytest.raises(Unavailable, match="No cloud is running"):
        upgrade(tmp_path / "nothing", sys.executable, timeout_s=60)


@pytest.mark.postgres
def test_a_cloud_on_postgresql_is_upgraded_and_goes_back(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.url(postgres.database())
    cloud = Cloud(tmp_path / "home", database=url)
    cloud.up()
    try:
        job_id = cloud.submit(task(WITNESS))
        cloud.wait(job_id, "running")
        bad = version(tmp_path / "bad", "98.0.0")
        change(
            tmp_path / "bad" / "src" / "tidemill" / "bootstrap.py",
            "        app = create_app(plane, certificate)\n",
            "        raise Conflict\n",
        )
        with pytest.raises(Unavailable, match="runs again"):
            upgrade(cloud.home, bad, timeout_s=20)
        assert revision_of(url) == schema.HEAD
        done = upgrade(cloud.home, version(tmp_path / "good", "99.0.0"), timeout_s=60)
        assert (done.after, done.unheard) == ("99.0.0", 0)
        assert revision_of(url) == NEXT
        check_witness(cloud, job_id)
    finally:
        cloud.down()


def test_the_released_version_is_upgraded_to_this_one_under_its_own_runners(tmp_path: Path) -> None:
    """Its runners, one version older than the control plane, go on: beats, logs, ends, and a stop that is asked for."""
    old = tmp_path / "released"
    old.mkdir()
    made = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--output", str(tmp_path / "released.tar"), RELEASED, "src"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("the released version is not in the history here")
    with tarfile.open(tmp_path / "released.tar") as archive:
        archive.extractall(old, filter="data")
    cloud = Cloud(tmp_path / "home")
    settings = json.dumps(cloud.settings)
    start = (
        "import json, sys; from pathlib import Path; from tidemill.bootstrap import start_daemon;"
        " start_daemon(Path(sys.argv[1]), json.loads(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONPATH": str(old / "src")}
    subprocess.run([sys.executable, "-c", start, str(cloud.home), settings], env=environment, cwd="/", check=True)
    try:
        assert "strangers" not in cloud.call("GET", "/v1/status")[1], "that is not the released version"
        jobs = [cloud.submit(task(WITNESS, name=f"runs-{number}")) for number in range(2)]
        stopped = cloud.submit(task("trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done", name="stopped"))
        for job_id in (*jobs, stopped):
            cloud.wait(job_id, "running")
        done = upgrade(cloud.home, sys.executable, timeout_s=60)
        assert (done.workers, done.unheard, done.revision) == (3, 0, schema.HEAD)
        for job_id in jobs:
            check_witness(cloud, job_id)
        assert cloud.call("POST", f"/v1/jobs/{stopped}/stop")[0] == 202
        assert cloud.wait(stopped)["state"] == "cancelled"
        eventually(lambda: b"bye\n" in cloud.logs(stopped), within_s=10, what="its last words")
        assert cloud.wait(cloud.submit(task("echo new")))["state"] == "succeeded"
    finally:
        cloud.down()
