"""Every store keeps the contract: in memory, over SQLite, over PostgreSQL; and the contract catches those that do not."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from sqlalchemy import create_engine, insert

from tests.postgres import NoPostgres, Postgres
from tidemill.core.lifecycle import is_terminal
from tidemill.errors import InvalidSetting, Stale, Unavailable
from tidemill.model.ids import JobId, ProjectId, queue_id
from tidemill.model.job import Job, JobState
from tidemill.model.plan import Change
from tidemill.model.queue import Queue
from tidemill.model.registry import ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.ports import Batch, Snapshot
from tidemill.store import schema
from tidemill.store.codec import decode, encode
from tidemill.store.memory import MemoryStore
from tidemill.store.sql import SqlStore, upgrade
from tidemill.testing import samples
from tidemill.testing.history import Step, check_history
from tidemill.testing.store import CHECKS, OpenStore, check_store
from tidemill.testing.strategies import histories, values

Fresh = Callable[[], OpenStore]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except NoPostgres as error:
        pytest.skip(f"no PostgreSQL can be started here: {error}")
    yield server
    server.remove()


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """A database with the schema, to be copied: quicker than to migrate each."""
    name = postgres.database()
    store = SqlStore(postgres.url(name))
    store.migrate()
    store.close()
    return name


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tm-store-"))
    yield path
    shutil.rmtree(path)


SQLITE, POSTGRES = "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)


@pytest.fixture(params=["memory", SQLITE, POSTGRES])
def fresh(request: pytest.FixtureRequest, folder: Path) -> Fresh:
    """Makes ways to open new databases of one kind."""
    return in_memory if request.param == "memory" else databases(request, folder)


@pytest.fixture(params=[SQLITE, POSTGRES])
def fresh_sql(request: pytest.FixtureRequest, folder: Path) -> Callable[[], Callable[[], SqlStore]]:
    """As ``fresh``, only real databases."""
    return databases(request, folder)


def databases(request: pytest.FixtureRequest, folder: Path) -> Callable[[], Callable[[], SqlStore]]:
    numbers = itertools.count()
    if request.param == "sqlite":
        return lambda: opener(f"sqlite:///{folder / f'{next(numbers)}.db'}")
    server: Postgres = request.getfixturevalue("postgres")
    template: str = request.getfixturevalue("postgres_template")
    return lambda: opener(server.url(server.database(like=template)))


def in_memory() -> OpenStore:
    store = MemoryStore()
    return lambda: store


def opener(url: str) -> Callable[[], SqlStore]:
    return lambda: SqlStore(url)


# The contract


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[OpenStore], None], fresh: Fresh) -> None:
    check(fresh())


def test_any_history_gives_what_the_model_gives(fresh: Fresh, request: pytest.FixtureRequest) -> None:
    many = 20 if "postgres" in request.node.name else 80

    @settings(deadline=None, max_examples=many)
    @given(steps=histories())
    def run(steps: list[Step]) -> None:
        check_history(fresh(), steps)

    run()


@settings(deadline=None, max_examples=300)
@given(value=values())
def test_any_value_survives_being_written_as_text(value: object) -> None:
    again = decode(type(value), encode(value))
    assert again == value
    assert repr(again) == repr(value)


# The contract catches what does not keep it


class IgnoresVersions(MemoryStore):
    def _check(self, batch: Batch, changes: Any) -> None:
        super()._check(replace(batch), [(k, None if a is None else self._now(k, t), t) for k, a, t in changes])

    def _now(self, kind: Any, thing: Any) -> int:
        return int(self._all.things[kind][thing.id].version)


class StoresHalf(MemoryStore):
    """Stores the log of a batch that it refuses."""

    def _check(self, batch: Batch, changes: Any) -> None:
        try:
            super()._check(batch, changes)
        except Stale:
            super().commit(Batch(epoch=batch.epoch, log=batch.log))
            raise


class ForgetsTheEpoch(MemoryStore):
    def commit(self, batch: Batch) -> int:
        return super().commit(replace(batch, epoch=self._all.epoch))


class BooksTwice(MemoryStore):
    def commit(self, batch: Batch) -> int:
        again = [replace(line, id=f"{line.id}'") for line in batch.ledger if line.id in self._all.ledger]
        return super().commit(replace(batch, ledger=[*batch.ledger, *again]))


class KeepsReasons(MemoryStore):
    def commit(self, batch: Batch) -> int:
        before = dict(self._all.reasons)
        seq = super().commit(batch)
        self._all.reasons = before | self._all.reasons
        return seq


class MarksGoBack(MemoryStore):
    def commit(self, batch: Batch) -> int:
        seq = super().commit(batch)
        for line in batch.ledger:
            self._all.marks[line.usage.node_id, line.usage.meter] = line.usage.to_ns
        return seq


class LoadsWhatWasCancelled(MemoryStore):
    def load(self) -> Snapshot:
        booked = sorted(self._all.things[Reservation].values(), key=lambda it: it.id)
        return replace(super().load(), reservations=tuple(booked))


class ForgetsUsage(MemoryStore):
    """Keeps what was taken by project and not by user."""

    def load(self) -> Snapshot:
        found = super().load()
        first = {usage.id.partition("/")[0]: usage for usage in reversed(found.queue_usages)}
        return replace(found, queue_usages=tuple(first[name] for name in sorted(first)))


class KeepsTheFirstQueue(MemoryStore):
    def commit(self, batch: Batch) -> int:
        before = dict(self._all.things[Queue])
        seq = super().commit(batch)
        self._all.things[Queue] |= before
        return seq


class ForgetsWhatItRented(MemoryStore):
    """Gives only what is booting or there: what may or may not have been asked for is forgotten."""

    def rentals(self, *, since_ns: int = 0) -> Any:
        return tuple(one for one in super().rentals(since_ns=since_ns) if one.instance_id)


class LoadsWhatIsRolledOut(MemoryStore):
    def load(self) -> Snapshot:
        found = sorted(self._all.things[Rollout].values(), key=lambda it: it.id)
        return replace(super().load(), rollouts=tuple(found))


class ForgetsBadLuck(MemoryStore):
    def load(self) -> Snapshot:
        return replace(super().load(), unlucky=())


class CountsOnlyFailures(MemoryStore):
    def load(self) -> Snapshot:
        failed = Counter(job.workload_id for job in self._all.things[Job].values() if job.state is JobState.FAILED)
        found = super().load()
        return replace(found, unlucky=tuple((name, failed[name]) for name, _ in found.unlucky if failed[name]))


class CountsAllThatEnded(MemoryStore):
    def load(self) -> Snapshot:
        found = super().load()
        ended = Counter(job.workload_id for job in self._all.things[Job].values() if is_terminal(job.state))
        live = {workload.id for workload in found.workloads}
        return replace(found, unlucky=tuple(sorted((name, count) for name, count in ended.items() if name in live)))


class CountsForTheDead(MemoryStore):
    """Keeps the count of workloads that are over."""

    def load(self) -> Snapshot:
        bad = (JobState.FAILED, JobState.CANCELLED)
        counts = Counter(job.workload_id for job in self._all.things[Job].values() if job.state in bad)
        return replace(super().load(), unlucky=tuple(sorted(counts.items())))


class KeepsDeletedModels(MemoryStore):
    def model_versions_of(self, job_ids: Sequence[JobId]) -> tuple[ModelVersion, ...]:
        return self._sorted(ModelVersion, lambda it: it.lineage.job_id in job_ids, key=lambda it: it.id)


BROKEN = [IgnoresVersions, StoresHalf, ForgetsTheEpoch, BooksTwice, KeepsReasons, MarksGoBack]
BROKEN_POLICIES = [
    LoadsWhatWasCancelled,
    LoadsWhatIsRolledOut,
    ForgetsUsage,
    KeepsTheFirstQueue,
    ForgetsWhatItRented,
    KeepsDeletedModels,
]
"""What histories do not touch."""
BROKEN_LUCK = [ForgetsBadLuck, CountsOnlyFailures, CountsAllThatEnded, CountsForTheDead]


@pytest.mark.parametrize("broken", BROKEN + BROKEN_POLICIES + BROKEN_LUCK)
def test_the_checks_catch_a_store_that(broken: type[MemoryStore]) -> None:
    def fresh() -> OpenStore:
        store = broken()
        return lambda: store

    with pytest.raises(AssertionError):
        check_store(fresh)


@pytest.mark.parametrize("broken", BROKEN)
def test_histories_catch_a_store_that(broken: type[MemoryStore]) -> None:
    @settings(deadline=None, max_examples=500, database=None, phases=[Phase.generate], derandomize=True)
    @given(steps=histories())
    def run(steps: list[Step]) -> None:
        store = broken()
        check_history(lambda: store, steps)

    with pytest.raises(AssertionError):
        run()


# The schema


def migrated(fresh_sql: Callable[[], Callable[[], SqlStore]]) -> SqlStore:
    store = fresh_sql()()
    store.migrate()
    return store


def test_migrations_lead_to_the_schema(fresh_sql: Any) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    import tidemill.store

    store = migrated(fresh_sql)
    with store._database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == schema.HEAD
    scripts = ScriptDirectory(str(Path(tidemill.store.__file__).parent / "migrations"))
    assert scripts.get_current_head() == schema.HEAD
    store.close()


def test_a_difference_between_migrations_and_schema_is_seen(folder: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    path = folder / "control.db"
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP INDEX ix_events_job")
        connection.execute("ALTER TABLE jobs ADD COLUMN extra TEXT")
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    engine.dispose()
    assert len(found) == 2


def test_a_schema_that_is_there_is_not_migrated_again(fresh_sql: Any) -> None:
    store = migrated(fresh_sql)
    url = store._database.writer.url.render_as_string(hide_password=False)
    store.close()
    program = "import sys; from tidemill.store.sql import SqlStore; SqlStore(sys.argv[1]).migrate(); print('alembic' in sys.modules)"
    url = url.replace("sqlite+pysqlite:", "sqlite:")
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_later_schema_is_refused(fresh_sql: Any) -> None:
    store = migrated(fresh_sql)
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(InvalidSetting, match="later version"):
        store.migrate()
    store.close()


@pytest.mark.parametrize("kind", [SQLITE, POSTGRES])
def test_several_migrate_at_once(kind: str, request: pytest.FixtureRequest, folder: Path) -> None:
    if kind == "sqlite":
        open_store = opener(f"sqlite:///{folder / 'control.db'}")
    else:
        server: Postgres = request.getfixturevalue("postgres")
        open_store = opener(server.url(server.database()))
    stores = [open_store() for _ in range(6)]
    ready = threading.Barrier(6)

    def migrate(store: SqlStore) -> None:
        ready.wait()
        store.migrate()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(migrate, stores))
    assert all(store.integrity() == () for store in stores)
    for store in stores:
        store.close()


PROJECTS_0001 = {
    "prj_lab": '{"id":"prj_lab","organization_id":"org","name":"lab","created_ns":5,"limit_gpu_milli":8000,"limit_cpu_milli":0}',
    "prj_both": '{"id":"prj_both","organization_id":"org","name":"both","created_ns":6,"limit_gpu_milli":500,"limit_cpu_milli":64000}',
    "prj_free": '{"id":"prj_free","organization_id":"org","name":"frei-ü","created_ns":7,"limit_gpu_milli":0,"limit_cpu_milli":0}',
    "prj_odd": '{"id":"prj_odd","organization_id":"org","name":"größer","created_ns":8,"limit_gpu_milli":0,"limit_cpu_milli":1}',
}
"""Projects as the first version wrote them."""


@pytest.mark.parametrize("kind", [SQLITE, POSTGRES])
def test_limits_of_projects_become_queues(kind: str, request: pytest.FixtureRequest, folder: Path) -> None:
    if kind == "sqlite":
        open_store = opener(f"sqlite:///{folder / 'control.db'}")
    else:
        server: Postgres = request.getfixturevalue("postgres")
        open_store = opener(server.url(server.database()))
    store = open_store()
    with store._writing() as connection:
        upgrade(connection, "0001")
        for project_id, body in PROJECTS_0001.items():
            connection.execute(insert(schema.projects).values(id=project_id, body=body))
        # What a first version's job looks like: none of the fields that came later.
        job = samples.a_job(samples.a_workload(1))
        known = {
            name: value for name, value in json.loads(encode(job)).items() if name not in ("served_ns", "evictions")
        }
        connection.execute(
            insert(schema.jobs).values(
                id=job.id, workload_id=job.workload_id, position=0, state="queued", version=1, body=json.dumps(known)
            )
        )
    store.migrate()
    queues = {queue.project_id: queue for queue in store.load().queues}
    assert {project: queue.limit for project, queue in queues.items()} == {
        "prj_lab": (("gpu", 8_000),),
        "prj_both": (("cpu", 64_000), ("gpu", 500)),
        "prj_odd": (("cpu", 1),),
    }
    assert all(queue.id == queue_id(project) and queue.version == 1 for project, queue in queues.items())
    assert [queues[ProjectId(f"prj_{name}")].name for name in ("lab", "both", "odd")] == ["lab", "both", "odd"]
    projects = {project.id: project for project in store.projects()}
    assert projects == {each: decode(Project, body) for each, body in PROJECTS_0001.items()}
    assert store.load().jobs == (job,)
    epoch = store.lead(holder="test")
    lab = queues[ProjectId("prj_lab")]
    store.commit(Batch(epoch=epoch, changes=[Change(assumed=1, after=replace(lab, version=2, limit=()))]))
    store.close()
    again = open_store()
    again.migrate()
    assert {queue.limit for queue in again.load().queues if queue.id == lab.id} == {()}
    again.close()


@pytest.mark.parametrize(
    "url", ["", "mysql://host/name", "sqlite://", "sqlite:///", "sqlite:///:memory:", "control.db", "postgresql://host"]
)
def test_an_address_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="not the address"):
        SqlStore(url)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(InvalidSetting) as caught:
        SqlStore("mysql://user:geheim@host/name")
    assert "geheim" not in repr(vars(caught.value))


def test_the_database_file_is_its_owners_alone(folder: Path) -> None:
    path = folder / "a name with ? and % and ü.db"
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {
        path.name + suffix: "0o600" for suffix in ("", "-wal", "-shm")
    }
    store.close()


def test_a_folder_that_is_not_there_is_unavailable(folder: Path) -> None:
    with pytest.raises(Unavailable):
        SqlStore(f"sqlite:///{folder / 'nowhere' / 'control.db'}").migrate()


def test_the_newest_jobs_are_found_without_sorting(folder: Path) -> None:
    """A list shows a page however many jobs there are: the database walks an index and stops."""
    from sqlalchemy import event

    from tidemill.ports import JobFilter

    path = folder / "control.db"
    store = SqlStore(f"sqlite:///{path}")
    store.migrate()
    statements: list[tuple[str, Any]] = []
    event.listen(
        store._database.reader, "before_cursor_execute", lambda c, u, sql, given, *_: statements.append((sql, given))
    )
    for where in (JobFilter(), JobFilter(project_ids=(samples.RED,)), JobFilter(name="train")):
        store.find_jobs(where)
    store.events(job_id=JobId("job_1"))
    with sqlite3.connect(path) as connection:
        for sql, parameters in statements:
            if sql.startswith("SELECT"):
                plan = [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + sql, parameters)]
                assert not any("TEMP B-TREE" in line or line.startswith("SCAN jobs") for line in plan), (sql, plan)
    store.close()


# What PostgreSQL adds


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except NoPostgres as error:
        pytest.skip(f"no PostgreSQL can be started here: {error}")
    yield server
    server.remove()


@pytest.mark.postgres
def test_postgresql_that_crashes_and_comes_back_has_all_that_was_acknowledged(own_postgres: Postgres) -> None:
    store = SqlStore(own_postgres.url(own_postgres.database()), patience_s=2)
    store.migrate()
    epoch = store.lead(holder="test")
    for number in range(20):
        store.commit(Batch(epoch=epoch, changes=samples.new(samples.a_workload(number)), log=[samples.a_note()]))
    own_postgres.stop("immediate")
    with pytest.raises(Unavailable):
        store.commit(Batch(epoch=epoch, log=[samples.a_note()]))
    with pytest.raises(Unavailable):
        store.load()
    own_postgres.start()
    assert store.commit(Batch(epoch=epoch, log=[samples.a_note()])) == 21
    assert len(store.events()) == 21
    assert store.integrity() == ()
    store.close()


@pytest.mark.postgres
def test_a_commit_whose_answer_is_lost_is_told_as_it_is(own_postgres: Postgres) -> None:
    """The connection breaks after the server took the commit, and before its answer came."""
    from sqlalchemy import event

    store = SqlStore(own_postgres.url(own_postgres.database()), patience_s=2)
    store.migrate()
    epoch = store.lead(holder="test")
    job = samples.a_job(samples.a_workload(1))
    store.commit(Batch(epoch=epoch, changes=samples.new(samples.a_workload(1), job)))
    broken: list[str] = []

    def lose_the_answer(dialect_connection: Any) -> None:
        if broken:
            raw = dialect_connection.connection.dbapi_connection
            raw.commit()
            if broken.pop() == "and the server":
                own_postgres.stop("immediate")
            raw.close()

    event.listen(store._database.writer, "commit", lose_the_answer)
    broken.append("the connection")
    assert (
        store.commit(Batch(epoch=epoch, changes=[samples.moved(job, JobState.STARTING)], log=[samples.a_note()])) == 1
    )
    broken.append("and the server")
    started = replace(job, version=2, state=JobState.STARTING)
    with pytest.raises(Unavailable):
        store.commit(Batch(epoch=epoch, changes=[samples.moved(started, JobState.RUNNING)], log=[samples.a_note()]))
    own_postgres.start()
    with pytest.raises(Stale):
        store.commit(Batch(epoch=epoch, log=[samples.a_note()]))
    assert store.commit(Batch(epoch=epoch, log=[samples.a_note()])) == 3
    assert [found.version for found in store.load().jobs] == [3]
    assert store.integrity() == ()
    store.close()


@pytest.mark.postgres
def test_a_lock_that_is_held_too_long_is_unavailable(postgres: Postgres, postgres_template: str) -> None:
    import psycopg

    url = postgres.url(postgres.database(like=postgres_template))
    store = SqlStore(url, patience_s=0.3)
    epoch = store.lead(holder="test")
    with psycopg.connect(url) as other:
        other.execute("SELECT * FROM leadership FOR UPDATE")
        with pytest.raises(Unavailable):
            store.commit(Batch(epoch=epoch, log=[samples.a_note()]))
    assert store.commit(Batch(epoch=epoch, log=[samples.a_note()])) == 1
    store.close()


@pytest.mark.postgres
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become somebody else; an ordinary user ran the tests above"
)
def test_postgresql_starts_for_an_ordinary_user_too(postgres: Postgres) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65_534)
            os.setuid(65_534)
            server = Postgres()
            server.sql("SELECT 1")
            server.remove()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
