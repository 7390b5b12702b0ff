"""Backups: rows of either database come back as they were, what is damaged is named, and old fences cannot win."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_store_faults import PER_BATCH, batch
from tests.postgres import NoPostgres, Postgres
from tidemill import bootstrap
from tidemill.cli.main import run
from tidemill.control.archive import MANIFEST, verify_backup
from tidemill.control.blobs import BlobStore
from tidemill.control.logs import LogStore
from tidemill.errors import Conflict, DamagedBackup, Fenced, InvalidRequest, InvalidSetting, NotFound
from tidemill.ports import Batch
from tidemill.store import backup, schema
from tidemill.store.sql import SqlStore
from tidemill.testing.samples import a_note

COMMITS = 7


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except NoPostgres as reason:
        pytest.skip(f"PostgreSQL cannot be run here: {reason}")
    yield server
    server.remove()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with something of everything, in which no cloud runs."""
    made = tmp_path / "old"
    make_home(made)
    return made


def make_home(home: Path, url: str = "") -> None:
    home.mkdir(mode=0o700)
    for name, content in (("secret.key", "ab" * 32), ("admin.token", "tm_user_x\n"), ("config.yaml", "pue: 1.25\n")):
        (home / name).write_text(content)
        (home / name).chmod(0o600)
    fill(url or f"sqlite:///{home / 'control.db'}")
    for room, content in (("blobs", b"a folder of work"), ("models/prj_red", b"weights")):
        with BlobStore(home / room).draft() as draft:
            draft.write(content)
            draft.commit()
    LogStore(home / "logs").append("job_a", 1, 0, 0, b"line 1\n")


def fill(url: str) -> None:
    store = SqlStore(url)
    store.migrate()
    epoch = store.lead(holder="old")
    for number in range(COMMITS):
        store.commit(batch(epoch, number))
    store.close()


def rows(url: str, folder: Path) -> dict[str, bytes]:
    """Every table of the database, as text."""
    folder.mkdir()
    backup.export(url, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def member_of(path: Path, name: str) -> tuple[int, int]:
    """Where in the tar the content of a member begins, and its size."""
    with tarfile.open(path) as archive:
        found = archive.getmember(name)
        return found.offset_data, found.size


def rewrite(path: Path, target: Path, change: dict[str, bytes | None]) -> None:
    """The archive with members changed, left out (None) or added."""
    with tarfile.open(path) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = change.pop(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if content is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        for name, added in change.items():
            member = tarfile.TarInfo(name)
            member.size = len(added or b"")
            new.addfile(member, io.BytesIO(added or b""))


# There and back


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz"])
def test_what_was_in_the_home_is_in_the_new_one(home: Path, tmp_path: Path, name: str) -> None:
    before = rows(f"sqlite:///{home / 'control.db'}", tmp_path / "before")
    made = bootstrap.backup(home, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert made == verify_backup(tmp_path / name)
    assert made.database.last_seq == COMMITS * PER_BATCH
    assert made.database.tables["jobs"] == COMMITS * PER_BATCH
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "before", "old"]), "something was left"

    done = bootstrap.restore(tmp_path / name, tmp_path / "new")
    new = tmp_path / "new"
    assert done.aside is None
    for kept in ("secret.key", "admin.token", "config.yaml"):
        assert (new / kept).read_bytes() == (home / kept).read_bytes()
        assert (new / kept).stat().st_mode & 0o077 == 0
    kept = [*home.glob("blobs/sha256/*/*"), *home.glob("models/*/sha256/*/*"), *home.glob("logs/*/*/*")]
    assert len(kept) == 3
    for path in kept:
        assert (new / path.relative_to(home)).read_bytes() == path.read_bytes()
    after = rows(f"sqlite:///{new / 'control.db'}", tmp_path / "after")
    jumped = {"leadership.jsonl", "jobs.jsonl"}
    assert {n: after[n] for n in after if n not in jumped} == {n: before[n] for n in before if n not in jumped}
    assert not (new / "restoring").exists()


def test_logs_can_be_left_out(home: Path, tmp_path: Path) -> None:
    made = bootstrap.backup(home, tmp_path / "b.tar", logs=False)
    assert not [name for name in made.files if name.startswith("logs/")]
    bootstrap.restore(tmp_path / "b.tar", tmp_path / "new")
    assert not (tmp_path / "new" / "logs").exists()


def test_blobs_that_rows_name_and_the_home_has_not_are_told(home: Path, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "control.db")) as database, database:
        database.execute("UPDATE workloads SET body = json_set(body, '$.spec.workdir', ?)", ("0f" * 32,))
    assert bootstrap.backup(home, tmp_path / "b.tar").missing == ("0f" * 32,)


@pytest.mark.postgres
def test_rows_go_from_sqlite_to_postgresql_and_back_unchanged(postgres: Postgres, tmp_path: Path) -> None:
    here = f"sqlite:///{tmp_path / 'here.db'}"
    there, again = postgres.url(postgres.database()), f"sqlite:///{tmp_path / 'again.db'}"
    fill(here)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    copy = backup.export(here, first)
    backup.load(there, first, copy, now_ns=None)
    back = backup.export(there, second)
    assert (copy.kind, back.kind) == ("sqlite", "postgresql")
    assert copy.tables == back.tables
    backup.load(again, second, back, now_ns=None)
    names = sorted(path.name for path in first.iterdir())
    assert [first.joinpath(name).read_bytes() for name in names] == [second.joinpath(n).read_bytes() for n in names]
    assert rows(again, tmp_path / "third") == {name: (first / name).read_bytes() for name in names}
    for url in (there, again):
        store = SqlStore(url)
        assert store.integrity() == ()
        store.commit(batch(store.lead(holder="new"), COMMITS))
        assert store.ledger_totals().lines == COMMITS + 1, "the ledger's own numbers go on after those put in"
        store.close()


@pytest.mark.postgres
def test_a_home_moves_to_postgresql_and_its_tables_are_kept_when_replaced(
    postgres: Postgres, home: Path, tmp_path: Path
) -> None:
    url = postgres.url(postgres.database())
    bootstrap.backup(home, tmp_path / "b.tar")
    done = bootstrap.restore(tmp_path / "b.tar", tmp_path / "new", database=url)
    assert "config.yaml" in done.notes[0]
    assert not (tmp_path / "new" / "control.db").exists()
    assert url in (tmp_path / "new" / "config.yaml").read_text()
    assert "1.25" in (tmp_path / "new" / "config.yaml").read_text()
    store = SqlStore(url)
    assert store.integrity() == ()
    leads = store.lead(holder="first")
    assert leads == done.epoch + 1

    with pytest.raises(Conflict, match="in that database already"):
        bootstrap.restore(tmp_path / "b.tar", tmp_path / "other", database=url)
    assert not (tmp_path / "other" / "secret.key").exists()
    again = bootstrap.backup(tmp_path / "new", tmp_path / "c.tar")
    assert again.database.kind == "postgresql"
    done = bootstrap.restore(tmp_path / "b.tar", tmp_path / "new", database=url, is_replaced=True)
    assert done.epoch > leads + backup.EPOCH_STRIDE // 2
    with pytest.raises(Fenced):
        store.commit(Batch(epoch=leads, log=[a_note()]))
    import psycopg

    with psycopg.connect(url) as connection:
        kept = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'replaced%'").fetchall()
        assert len(kept) == 1
        count = connection.execute(f'SELECT count(*) FROM "{kept[0][0]}".jobs'.encode()).fetchone()
        assert count == (COMMITS * PER_BATCH,)
    store.close()

    bootstrap.restore(tmp_path / "c.tar", tmp_path / "third", database="sqlite")
    store = SqlStore(f"sqlite:///{tmp_path / 'third' / 'control.db'}")
    assert store.integrity() == ()
    assert store.load().last_seq == COMMITS * PER_BATCH
    store.close()


@pytest.mark.parametrize("into", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_a_backup_of_a_released_version_is_migrated(tmp_path: Path, into: str, request: pytest.FixtureRequest) -> None:
    from tests.contract.test_migrations import REVISIONS, check_answers, check_values, put_back, tables_of, told

    home = tmp_path / "old"
    make_home(home)
    (home / "control.db").unlink()
    url = f"sqlite:///{home / 'control.db'}"
    put_back(url, REVISIONS[0])
    before = {name: rows for name, rows in tables_of(url).items() if name != "alembic_version"}
    assert bootstrap.backup(home, tmp_path / "b.tar").database.revision == REVISIONS[0]
    server = request.getfixturevalue("postgres") if into == "postgresql" else None
    given = server.url(server.database()) if server else ""
    done = bootstrap.restore(tmp_path / "b.tar", tmp_path / "new", database=given)
    after = tables_of(done.database)
    assert after["alembic_version"] == [{"version_num": schema.HEAD}]
    del before["leadership"]
    check_values(before, after)
    store = SqlStore(done.database)
    check_answers(store, told(REVISIONS[0]), is_restored=True)
    store.close()


# Epochs and fences


def test_epochs_and_fences_jump_over_all_that_the_lost_one_gave(home: Path, tmp_path: Path) -> None:
    bootstrap.backup(home, tmp_path / "b.tar")
    lost = SqlStore(f"sqlite:///{home / 'control.db'}")
    after = [lost.lead(holder=f"lost {number}") for number in range(100)]
    lost.close()
    seen = set(after)
    for number in range(2):
        new = tmp_path / f"new{number}"
        bootstrap.restore(tmp_path / "b.tar", new)
        store = SqlStore(f"sqlite:///{new / 'control.db'}")
        epoch = store.lead(holder="new")
        assert epoch > max(seen), "the same backup restored twice gives two ranges"
        seen.add(epoch)
        with pytest.raises(Fenced):
            store.commit(Batch(epoch=after[-1]))
        live = store.load().jobs
        assert live
        assert all(job.fence_base >= backup.FENCE_STRIDE for job in live)
        assert all(job.attempts == 0 for job in live), "what people see goes on counting"
        store.close()


def test_fences_jump_even_where_the_clock_is_wrong(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    copy = backup.export(f"sqlite:///{home / 'control.db'}", folder)
    url = f"sqlite:///{tmp_path / 'new.db'}"
    epoch = backup.load(url, folder, copy, now_ns=1)
    assert epoch == copy.epoch + backup.EPOCH_STRIDE
    store = SqlStore(url)
    bases: set[int] = {job.fence_base for job in store.load().jobs}
    store.close()
    assert bases == {backup.FENCE_STRIDE}


# What is damaged is named


def test_a_flipped_byte_is_found_and_named(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.tar"
    made = bootstrap.backup(home, path)
    whole = path.read_bytes()
    for name, (_, size) in made.files.items():
        if not size:
            continue
        at = member_of(path, name)[0] + size // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedBackup, match="not as it was written") as told:
            verify_backup(path)
        assert told.value.value == name
    path.write_bytes(whole)
    verify_backup(path)


def test_a_flipped_byte_anywhere_is_found(home: Path, tmp_path: Path) -> None:
    """Of headers and compressed octets too; only the filling at the end of a tar says nothing."""
    for name in ("b.tar", "b.tar.gz"):
        path = tmp_path / name
        bootstrap.backup(home, path)
        whole = path.read_bytes()
        end = len(whole.rstrip(b"\0"))
        found = 0
        for at in range(0, end, max(1, end // 60)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            try:
                changed = verify_backup(path)
            except (DamagedBackup, InvalidRequest):
                found += 1
            else:
                path.write_bytes(whole)
                assert changed == verify_backup(path), f"octet {at} changed what it says"
        assert found > 40


def test_a_backup_that_is_cut_short_is_refused(home: Path, tmp_path: Path) -> None:
    for name in ("b.tar", "b.tar.gz"):
        path = tmp_path / name
        bootstrap.backup(home, path)
        whole = path.read_bytes()
        start = 0 if name.endswith("gz") else member_of(path, MANIFEST)[0]
        for length in (0, 1, 511, len(whole) // 3, start, start + 100):
            path.write_bytes(whole[:length])
            with pytest.raises((DamagedBackup, NotFound)):
                verify_backup(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"../outside": b"x"}, "does not belong"),
        ({"home/.ssh": b"x"}, "does not belong"),
        ({"logs/job_a/1/1.log": b"x"}, "comes after the manifest"),
        ({"home/secret.key": None}, "is missing"),
        ({MANIFEST: b"{}"}, "manifest cannot be read"),
        ({MANIFEST: None}, "ends before its manifest"),
    ],
)
def test_what_does_not_belong_is_refused(
    home: Path, tmp_path: Path, change: dict[str, bytes | None], words: str
) -> None:
    bootstrap.backup(home, tmp_path / "b.tar")
    rewrite(tmp_path / "b.tar", tmp_path / "c.tar", dict(change))
    with pytest.raises(DamagedBackup, match=words):
        bootstrap.restore(tmp_path / "c.tar", tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["control.lock"]


def test_rows_that_are_not_sound_are_refused_though_every_digest_is_right(home: Path, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "control.db")) as database, database:
        database.execute("DELETE FROM events WHERE seq = 5")
    with pytest.raises(DamagedBackup, match="not sound: The event log has 20 events from 1 to 21"):
        bootstrap.backup(home, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_a_backup_of_a_later_version_is_refused_with_the_mend(home: Path, tmp_path: Path) -> None:
    bootstrap.backup(home, tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar") as archive:
        told: dict[str, Any] = json.loads(archive.extractfile(MANIFEST).read())  # type: ignore[union-attr]
    later = told | {"tidemill": "9.0.0", "database": told["database"] | {"revision": "9999"}}
    rewrite(tmp_path / "b.tar", tmp_path / "c.tar", {MANIFEST: json.dumps(later).encode()})
    with pytest.raises(InvalidSetting, match=r"of a later version, Tidemill 9\.0\.0") as said:
        bootstrap.restore(tmp_path / "c.tar", tmp_path / "new")
    assert "pip install -U tidemill" in said.value.mend
    rewrite(tmp_path / "b.tar", tmp_path / "d.tar", {MANIFEST: json.dumps(told | {"format": 2}).encode()})
    with pytest.raises(InvalidRequest, match="format 2"):
        bootstrap.restore(tmp_path / "d.tar", tmp_path / "new")


# What is there is kept


def test_a_home_that_has_data_is_left_alone_unless_replaced(home: Path, tmp_path: Path) -> None:
    bootstrap.backup(home, tmp_path / "b.tar")
    (home / "local").mkdir()
    (home / "local" / "runs").write_text("on")
    was = (home / "local").stat()
    (home / "config.yaml").write_text("pue: 2\n")
    with pytest.raises(Conflict, match=r"admin\.token, blobs, control\.db") as said:
        bootstrap.restore(tmp_path / "b.tar", home)
    assert "--replace" in said.value.mend
    done = bootstrap.restore(tmp_path / "b.tar", home, is_replaced=True)
    assert done.aside is not None
    assert done.aside.parent == tmp_path
    assert done.aside.name.startswith("old.replaced-20")
    assert (done.aside / "config.yaml").read_text() == "pue: 2\n"
    store = SqlStore(f"sqlite:///{done.aside / 'control.db'}")
    assert store.load().last_seq == COMMITS * PER_BATCH
    store.close()
    assert (home / "config.yaml").read_text() == "pue: 1.25\n"
    assert (home / "local").stat().st_ino == was.st_ino, "what runs there goes on"


def test_a_home_in_which_a_cloud_runs_is_refused(home: Path, tmp_path: Path) -> None:
    bootstrap.backup(home, tmp_path / "b.tar")
    with bootstrap.locked(home), pytest.raises(Conflict, match="is running in this home"):
        bootstrap.restore(tmp_path / "b.tar", home, is_replaced=True)


def test_a_backup_never_writes_over_another(home: Path, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("mine")
    with pytest.raises(Conflict, match="a file of that name"):
        bootstrap.backup(home, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_text() == "mine"
    with pytest.raises(NotFound, match="no installation"):
        bootstrap.backup(tmp_path / "nothing", tmp_path / "c.tar")


# By command


def test_the_commands(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIDEMILL_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert run(["backup", "b.tar.gz", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(tmp_path / "b.tar.gz")
    assert told["database"]["revision"] == schema.HEAD
    assert run(["backup", "verify", "b.tar.gz"]) == 0
    assert "b.tar.gz is whole and sound" in capsys.readouterr().out
    assert run(["restore", "b.tar.gz"]) == 5
    assert "--replace" in capsys.readouterr().err
    assert run(["restore", "b.tar.gz", "--replace"]) == 0
    assert "old.replaced-" in capsys.readouterr().out
    assert run(["backup", "one", "two"]) == 2
    assert run(["backup", "verify", "nothing.tar"]) == 3
    shutil.rmtree(home)
    assert run(["restore", "b.tar.gz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is None
