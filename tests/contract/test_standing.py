"""Who may lead, on a real PostgreSQL; and who leads no more can write nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cloud import eventually
from tests.postgres import NoPostgres, Postgres
from tidemill.control.replicas import STALLED_S, SURE_FOR_S, Candidate
from tidemill.errors import Deposed, InvalidSetting, Unavailable
from tidemill.model.ids import OrganizationId, PrincipalId, ProjectId, ReplicaId, TokenId
from tidemill.model.tenant import Organization, Scope, Token
from tidemill.store.sql import SqlStore
from tidemill.store.standing import Standing
from tidemill.testing import samples

pytestmark = pytest.mark.postgres


TOKEN = Token(
    id=TokenId("tok_1"), principal_id=PrincipalId("usr_1"), organization_id=OrganizationId("org_1"), name="t",
    project_id=ProjectId(""), hash="h", display="tm_", scopes=(Scope.READ,), created_ns=1, expires_ns=0,
)  # fmt: skip


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
    made = postgres.url(postgres.database())
    store = SqlStore(made)
    store.migrate()
    store.close()
    return made


@pytest.fixture
def two(url: str) -> Iterator[tuple[Standing, Standing]]:
    made = tuple(Standing(url, own_id=ReplicaId(name), own_url=f"http://{name}:7070") for name in ("a", "b"))
    yield made[0], made[1]
    for each in made:
        each.close()


def test_one_has_the_lock_and_the_next_gets_it_at_once(two: tuple[Standing, Standing]) -> None:
    first, second = two
    assert first.try_to_lead()
    assert not second.try_to_lead()
    assert first.try_to_lead(), "it has it still"
    first.close()
    eventually(second.try_to_lead, within_s=10, what="the lock is free")  # once the server has seen the session's end


def test_replicas_are_listed_with_the_one_that_leads(url: str, two: tuple[Standing, Standing]) -> None:
    first, second = two
    assert [one.id for one in first.beat()] == ["a"]
    assert not first.beat()[0].leads
    SqlStore(url).lead(holder="b")
    found = second.beat()
    assert [(one.id, one.api_url, one.leads) for one in found] == [
        ("a", "http://a:7070", False), ("b", "http://b:7070", True),
    ]  # fmt: skip
    assert [one.beats for one in found] == [2, 1]
    assert all(0 <= one.quiet_ms < 10_000 for one in found)
    second.leave()
    assert [one.id for one in first.beat()] == ["a"]


def test_before_there_is_a_schema_the_lock_works(postgres: Postgres) -> None:
    standing = Standing(postgres.url(postgres.database()), own_id=ReplicaId("a"), own_url="http://a")
    assert standing.beat() == ()
    assert standing.try_to_lead()
    assert standing.beat() == ()
    standing.close()


def test_the_session_of_a_holder_can_be_ended_and_it_notices(two: tuple[Standing, Standing]) -> None:
    first, second = two
    assert first.try_to_lead()
    second.end_holder()
    eventually(second.try_to_lead, within_s=10, what="the lock is free")
    with pytest.raises(Unavailable):
        first.beat()
    assert not first.try_to_lead(), "its new session does not have it"


def test_an_old_leader_can_put_nothing(url: str) -> None:
    old, new = SqlStore(url), SqlStore(url)
    organization = Organization(id=OrganizationId("org_1"), name="one", created_ns=1)
    old.put_organization(organization)  # before anybody leads: how an installation begins
    old.lead(holder="old")
    old.put_organization(organization)
    new.lead(holder="new")
    for put, what in (
        (old.put_organization, organization), (old.put_artifact, samples.an_artifact(1)),
        (old.put_token, TOKEN),
    ):  # fmt: skip
        with pytest.raises(Deposed, match="Another control plane leads"):
            put(what)  # type: ignore[operator]
    assert new.tokens() == ()
    new.put_token(TOKEN)
    assert len(new.tokens()) == 1
    old.close()
    new.close()


def test_sqlite_is_for_one() -> None:
    with pytest.raises(InvalidSetting, match="share a PostgreSQL"):
        Standing("sqlite:////tmp/x.db", own_id=ReplicaId("a"), own_url="")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def candidate(standing: Standing, clock: Clock, deposed: list[str]) -> Candidate:
    return Candidate(standing, on_deposed=lambda: deposed.append(standing.own_id), now=clock)


def tries(one: Candidate) -> bool:
    return bool(one._try())


def test_a_leader_that_does_not_beat_is_followed_only_after_a_while(url: str, two: tuple[Standing, Standing]) -> None:
    clock, deposed = Clock(), list[str]()
    first, second = (candidate(each, clock, deposed) for each in two)
    store = SqlStore(url)
    assert tries(first)
    first.lead(store.lead(holder="a"))
    first._confirm()
    began = clock.s
    while not tries(second):
        assert second.leader_url == "http://a:7070"
        clock.s += 0.5
        if clock.s - began < 20:
            first._confirm()  # it beats for twenty seconds, and nobody follows it
    assert clock.s - began > 20 + STALLED_S - 2
    assert clock.s - began < 20 + STALLED_S + 3
    assert not first.is_sure(), "it knew before anybody followed that it may not lead any more"
    second.lead(store.lead(holder="b"))
    with pytest.raises(Unavailable):
        first._confirm()  # its session was ended
    with pytest.raises(Deposed):
        first._confirm()
    store.close()


def test_a_leader_is_sure_only_as_long_as_the_database_confirms_it(postgres: Postgres, url: str) -> None:
    """A leader is in doubt before the margin of leases is over, which whoever leads next waits for."""
    from tidemill.control.leases import MARGIN_NS

    assert SURE_FOR_S * 1e9 < MARGIN_NS / 2
    clock = Clock()
    standing = Standing(url, own_id=ReplicaId("a"), own_url="http://a")
    one = candidate(standing, clock, [])
    assert tries(one)
    epoch = SqlStore(url).lead(holder="a")
    one.lead(epoch)
    postgres.stop()
    with pytest.raises(Unavailable):
        one._confirm()
    assert one.is_sure(), "not yet"
    clock.s += SURE_FOR_S
    assert not one.is_sure()
    postgres.start()
    until: Any = time.monotonic() + 20
    while not one.is_sure():
        try:
            one._confirm()
        except Unavailable:
            assert time.monotonic() < until
    standing.close()
