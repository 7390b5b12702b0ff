"""Databases of every released version come to the newest schema, value by value; a migration killed anywhere is undone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, Table, create_engine, event, insert, inspect, text
from sqlalchemy.pool import NullPool

from tests.postgres import NoPostgres, Postgres
from tidemill.control.vault import Vault
from tidemill.core.lifecycle import is_terminal
from tidemill.model.artifact import Artifact
from tidemill.model.events import LogEntry
from tidemill.model.fleet import Node
from tidemill.model.ids import JobId, PrincipalId, ProjectId, queue_id
from tidemill.model.job import Allocation, Attempt, Job, Workload
from tidemill.model.ledger import LedgerLine
from tidemill.model.queue import Queue
from tidemill.model.tenant import Organization, Principal, Project, Secret, Token
from tidemill.ports import Batch, IdempotencyRecord, JobFilter
from tidemill.store import schema
from tidemill.store.codec import decode, encode
from tidemill.store.sql import SqlStore, upgrade
from tidemill.testing.samples import a_job, a_note, a_workload, new

FOLDER = Path(__file__).parents[1] / "released"
REVISIONS = sorted(path.stem for path in FOLDER.glob("*.sql"))
KINDS: dict[str, type[Any]] = {
    "workloads": Workload, "jobs": Job, "attempts": Attempt, "allocations": Allocation, "nodes": Node,
    "events": LogEntry, "ledger": LedgerLine, "idempotency": IdempotencyRecord, "organizations": Organization,
    "projects": Project, "principals": Principal, "tokens": Token, "secrets": Secret, "artifacts": Artifact,
}  # fmt: skip
"""What the ``body`` of each table of a released version is."""
MOVED = {("projects", "limit_cpu_milli"), ("projects", "limit_gpu_milli")}
"""What a migration changes on purpose, and which a test of its own looks at."""
Tables = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except NoPostgres as reason:
        pytest.skip(f"PostgreSQL cannot be run here: {reason}")
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes addresses of empty databases."""
    if request.param == "sqlite":
        names = iter(range(1_000))
        return lambda: f"sqlite:///{tmp_path / f'{next(names)}.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return lambda: server.url(server.database())


def told(revision: str) -> dict[str, Any]:
    """What the released version itself answered."""
    return dict(json.loads((FOLDER / f"{revision}.json").read_text(encoding="utf-8")))


def released(revision: str) -> Tables:
    """Every row that the released version wrote."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript((FOLDER / f"{revision}.sql").read_text(encoding="utf-8"))
        database.row_factory = sqlite3.Row
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: [dict(row) for row in database.execute(f"SELECT * FROM {name} ORDER BY rowid")]
            for name in names
            if name != "alembic_version" and not name.startswith("sqlite_")
        }


def engine_of(url: str) -> Engine:
    return create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)


def put_back(url: str, revision: str) -> None:
    """The database as the released version left it."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            database.executescript((FOLDER / f"{revision}.sql").read_text(encoding="utf-8"))
        return
    with engine_of(url).begin() as connection:
        upgrade(connection, revision)
        for name, rows in released(revision).items():
            table = Table(name, MetaData(), autoload_with=connection)
            connection.execute(table.delete())
            if rows:
                connection.execute(insert(table), rows)
        connection.execute(text("SELECT setval('ledger_line_seq', (SELECT max(line) FROM ledger))"))


def tables_of(url: str) -> Tables:
    with engine_of(url).connect() as connection:
        found = {}
        for name in inspect(connection).get_table_names():
            table = Table(name, MetaData(), autoload_with=connection)
            found[name] = [dict(row._mapping) for row in connection.execute(table.select())]
        return found


def check_values(before: Tables, after: Tables) -> None:
    """Every value that was there is there, can be read, and says what it said. Raises: AssertionError."""
    for name, rows in before.items():
        keys = [column.name for column in schema.metadata.tables[name].primary_key.columns]
        found = {tuple(row[key] for key in keys): row for row in after[name]}
        assert len(found) == len(rows), name
        for row in rows:
            now = found[tuple(row[key] for key in keys)]
            for column, value in row.items():
                if column != "body":
                    assert now[column] == value, (name, column, row)
            if name in KINDS:
                body = json.loads(encode(decode(KINDS[name], now["body"])))
                moved = {field for table, field in MOVED if table == name}
                assert contains(body, {k: v for k, v in json.loads(row["body"]).items() if k not in moved}), (name, row)


def contains(now: Any, before: Any) -> bool:
    """Whether everything of the JSON before is in that of now, which may have fields more."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(key in now and contains(now[key], value) for key, value in before.items())
    if isinstance(before, list):
        return len(now) == len(before) and all(map(contains, now, before))
    return bool(now == before)


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_value_of_a_released_version_is_right_afterwards(fresh: Callable[[], str], revision: str) -> None:
    url = fresh()
    put_back(url, revision)
    before = tables_of(url)
    assert {name: len(rows) for name, rows in before.items() if name in KINDS} == {
        name: len(rows) for name, rows in released(revision).items() if name in KINDS
    }
    assert all(before[name] for name in KINDS), "the fixture has something of everything"
    store = SqlStore(url)
    store.migrate()
    assert store.integrity() == ()
    after = tables_of(url)
    assert after["alembic_version"] == [{"version_num": schema.HEAD}]
    check_values({name: rows for name, rows in before.items() if name != "alembic_version"}, after)
    check_answers(store, told(revision))
    store.close()


def check_answers(store: SqlStore, said: dict[str, Any], *, is_restored: bool = False) -> None:
    """What the new version says of it is what the old one said; fences of live jobs jump in one that was restored."""
    answers = said["answers"]
    jobs = {item["id"]: item for item in answers["/v1/jobs?limit=1000"]["items"]}
    found = store.find_jobs(JobFilter(), limit=1_000).items
    assert {row.job.id for row in found} == set(jobs)
    for row in found:
        item = jobs[row.job.id]
        assert (row.workload.spec.name, row.workload.spec.kind.value) == (item["name"], item["kind"])
        if row.job.id in said["over"]:
            assert row.job.state.value == item["state"]
            assert row.job.cause.value == item["cause"]
            assert (row.job.exit_code, row.job.attempts, row.job.retries) == (
                item["exit_code"], item["attempts"], item["retries"],
            )  # fmt: skip
        assert (row.job.fence_base > 0) == (is_restored and not is_terminal(row.job.state))
    for job in said["over"]:
        receipt = answers[f"/v1/jobs/{job}/receipt"]
        totals = store.ledger_totals(job_id=JobId(job))
        assert (totals.lines, totals.amount_micro, totals.carbon_mg) == (
            receipt["lines"], receipt["amount_micro"], receipt["carbon_mg"],
        )  # fmt: skip
    live = store.load()
    assert {job.id for job in live.jobs} >= set(said["live"])
    assert {held.job_id for held in live.allocations} >= set(said["workers"])
    secret = store.secret(ProjectId("prj_default"), "HF_TOKEN")
    assert secret is not None
    assert Vault(bytes.fromhex(said["secret.key"])).open(secret) == "öffentlich nicht"
    assert {one["name"] for one in answers["/v1/tokens"]["items"]} == {token.name for token in store.tokens()}
    assert store.idempotent(PrincipalId("usr_admin"), "once") is not None
    assert store.find_artifact(ProjectId("prj_default"), "model") is not None
    vision = next(project for project in store.projects() if project.name == "vision")
    queue: Queue = next(one for one in live.queues if one.id == queue_id(vision.id))
    assert dict(queue.limit) == {"cpu": 2_000}, "limits of a project are those of its queue"
    workload = a_workload(0)
    epoch = store.lead(holder="after")
    store.commit(Batch(epoch=epoch, changes=new(workload, a_job(workload)), log=[a_note()]))
    assert store.integrity() == ()


@pytest.mark.parametrize("table", ["jobs", "ledger", "workloads", "tokens", "allocations"])
def test_a_value_that_a_migration_would_change_is_found(tmp_path: Path, table: str) -> None:
    """The planted bug: one character of one value."""
    url = f"sqlite:///{tmp_path / 'control.db'}"
    put_back(url, REVISIONS[0])
    before = {name: rows for name, rows in tables_of(url).items() if name != "alembic_version"}
    store = SqlStore(url)
    store.migrate()
    store.close()
    check_values(before, tables_of(url))
    with contextlib.closing(sqlite3.connect(tmp_path / "control.db")) as database, database:
        key = schema.metadata.tables[table].primary_key.columns.keys()[0]
        name, body = database.execute(f"SELECT {key}, body FROM {table} ORDER BY {key} DESC").fetchone()
        digits = re.search(r":(\d{2,})", body)
        assert digits is not None
        changed = body[: digits.start(1)] + str(int(digits[1]) + 1) + body[digits.end(1) :]
        database.execute(f"UPDATE {table} SET body = ? WHERE {key} = ?", (changed, name))
    with pytest.raises(AssertionError):
        check_values(before, tables_of(url))


# Killed


def migrate_killed_at(url: str, number: int) -> bool:
    """Whether a process of its own was killed before its statement of that number, commits counted, of a migration."""
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def count_down(*_: Any) -> None:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            event.listen(Engine, "before_cursor_execute", count_down)
            event.listen(Engine, "commit", count_down)
            SqlStore(url).migrate()
        except BaseException:  # noqa: BLE001 - nothing of the test's own goes on in here
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the migration failed"
    return os.WIFSIGNALED(status)


def shape_of(url: str) -> dict[str, Any]:
    """The schema and its revision, as the database has it."""
    with engine_of(url).connect() as connection:
        looked = inspect(connection)
        names = sorted(looked.get_table_names())
        found: dict[str, Any] = {
            name: (
                [column["name"] for column in looked.get_columns(name)],
                sorted(str(index["name"]) for index in looked.get_indexes(name)),
            )
            for name in names
        }
        if "alembic_version" in names:
            found["revision"] = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        return found


@pytest.mark.parametrize("revision", ["", *REVISIONS])
def test_a_migration_killed_at_any_statement_is_done_or_not_begun(fresh: Callable[[], str], revision: str) -> None:
    """Each statement on SQLite, one of seven on PostgreSQL, whose schema takes long to read."""
    kill_and_look(fresh, revision, step=1 if fresh().startswith("sqlite") else 7)


@pytest.mark.long
@pytest.mark.parametrize("revision", ["", *REVISIONS])
def test_a_migration_killed_at_each_statement_is_done_or_not_begun(fresh: Callable[[], str], revision: str) -> None:
    kill_and_look(fresh, revision, step=1)


def kill_and_look(fresh: Callable[[], str], revision: str, *, step: int) -> None:
    """The same database is migrated again and again, killed some statements later each time, until it is not killed."""
    url, done = fresh(), fresh()
    if revision:
        put_back(url, revision)
        put_back(done, revision)
    SqlStore(done).migrate()
    old, now = shape_of(url), shape_of(done)
    assert old != now
    rows = tables_of(url)
    killed = 0
    while migrate_killed_at(url, killed + 1):
        killed += step
        assert killed < 500, "it never ends"
        assert shape_of(url) == old, f"half of a migration after statement {killed + 1 - step}"
        assert tables_of(url) == rows
    assert shape_of(url) == now
    assert killed + step > len(set(now) - set(old)), "it was not killed at each statement"
    store = SqlStore(url)
    store.migrate()
    assert store.integrity() == ()
    if revision:
        check_values({name: found for name, found in rows.items() if name != "alembic_version"}, tables_of(url))
        check_answers(store, told(revision))
    store.close()
