"""Commits that PostgreSQL undoes for the sake of others are tried again, and are there once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.cloud import eventually
from tests.postgres import NoPostgres, Postgres
from tidemill.errors import Unavailable
from tidemill.model.plan import Change
from tidemill.ports import Batch
from tidemill.store.sql import SqlStore
from tidemill.testing import samples

pytestmark = pytest.mark.postgres
REFUSING = """
CREATE SEQUENCE tries;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('tries') <= {count} THEN RAISE EXCEPTION 'undone' USING ERRCODE = '{code}'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refusing BEFORE UPDATE ON leadership FOR EACH ROW EXECUTE FUNCTION refuse();
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    try:
        server = Postgres()
    except NoPostgres as error:
        pytest.skip(f"no PostgreSQL can be started here: {error}")
    yield server
    server.remove()


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.url(postgres.database())


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    made = SqlStore(url, patience_s=5)
    made.migrate()
    yield made
    made.close()


@pytest.mark.parametrize("code", ["40001", "40P01"])
@pytest.mark.parametrize(("count", "is_taken"), [(3, True), (4, False)])
def test_it_is_tried_three_times_more(store: SqlStore, url: str, code: str, count: int, is_taken: bool) -> None:
    import psycopg

    epoch = store.lead(holder="here")
    node = samples.a_node("n")
    with psycopg.connect(url, autocommit=True) as boss:
        boss.execute(REFUSING.format(count=count, code=code).encode())
        batch = Batch(epoch=epoch, changes=[Change(assumed=None, after=node)])
        if is_taken:
            store.commit(batch)
        else:
            with pytest.raises(Unavailable):
                store.commit(batch)
        assert boss.execute("SELECT last_value FROM tries").fetchall() == [(4,)]
    assert store.nodes() == ((node,) if is_taken else ())


def test_the_loser_of_a_real_deadlock_is_tried_again(store: SqlStore, url: str) -> None:
    import psycopg

    epoch = store.lead(holder="here")
    node = samples.a_node("n")
    store.commit(Batch(epoch=epoch, changes=[Change(assumed=None, after=node)]))
    after = replace(node, version=2)
    with psycopg.connect(url) as other, psycopg.connect(url, autocommit=True) as boss:
        other.execute("SET deadlock_timeout = '60s'")  # so that the commit finds the deadlock, and is undone
        other.execute("SELECT * FROM nodes FOR UPDATE")
        committing = threading.Thread(
            target=store.commit, args=(Batch(epoch=epoch, changes=[Change(assumed=1, after=after)]),)
        )
        committing.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        eventually(lambda: boss.execute(waiting).fetchone() == (1,), within_s=5, what="the commit waits")
        other.execute("SELECT * FROM leadership FOR UPDATE")
        other.rollback()
        committing.join(timeout=20)
        eventually(
            lambda: boss.execute(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            ).fetchone() == (1,), within_s=15, what="the deadlock is counted",
        )  # fmt: skip
    assert store.nodes() == (after,)
