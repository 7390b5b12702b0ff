"""Which of several control planes may lead: who holds a lock of the database, on a connection of its own.

PostgreSQL lets go of a session's advisory lock when the session ends, so a leader that dies has a successor at once.
One that is only stopped, or cut off, keeps its session until somebody ends that: what tells the two apart is the
beats that each replica writes. The lock decides who tries; what keeps an old leader from writing is the epoch
(``SqlStore.lead``), which every write is checked against.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, Engine, bindparam, delete, func, literal_column, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from tidemill.errors import InvalidSetting, Unavailable
from tidemill.model.ids import ReplicaId
from tidemill.model.replica import Replica
from tidemill.store import schema
from tidemill.store.connections import failing_clearly, session_of

LEADER_LOCK: Final = 7_203_685_478
_PATIENCE_MS: Final = 2_000
_FRESH_MS: Final = 60_000
_NOW_MS: Final[Any] = literal_column("(extract(epoch from clock_timestamp()) * 1000)::bigint")
_UNDEFINED_TABLE: Final = "42P01"
_BEAT: Final = postgresql.insert(schema.replicas).values(
    id=bindparam("own_id"), api_url=bindparam("own_url"), beats=1, seen_ms=_NOW_MS
)
_PUT_BEAT: Final = _BEAT.on_conflict_do_update(
    index_elements=["id"],
    set_={"beats": schema.replicas.c.beats + 1, "seen_ms": _NOW_MS, "api_url": _BEAT.excluded.api_url},
)
_ALL: Final = (
    select(schema.replicas, _NOW_MS - schema.replicas.c.seen_ms, schema.leadership.c.holder)
    .select_from(schema.replicas.join(schema.leadership, literal_column("true")))
    .where(schema.replicas.c.seen_ms > _NOW_MS - _FRESH_MS)
    .order_by(schema.replicas.c.id)
)
_END_HOLDER: Final = text(
    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"
    " AND pid <> pg_backend_pid() AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND classid = :high AND objid = :low"
).bindparams(high=LEADER_LOCK >> 32, low=LEADER_LOCK & 0xFFFF_FFFF)


class Standing:
    """One replica's place among the control planes of the database at ``url``. For the use of one thread.

    ``own_id`` names the replica, which is reached at ``own_url``.

    Raises: InvalidSetting when the database is not PostgreSQL, which alone several may share.
    """

    def __init__(self, url: str, *, own_id: ReplicaId, own_url: str) -> None:
        if url.startswith("sqlite"):
            raise InvalidSetting(
                "Several control planes can share a PostgreSQL, not a file.",
                field="database",
                value=url,
                mend="Write postgresql://user:password@host/name, or leave out the setting shared.",
            )
        self.own_id = own_id
        self._own_url = own_url
        self._engine: Engine = session_of(url, patience_ms=_PATIENCE_MS)
        self._session: Connection | None = None

    def try_to_lead(self) -> bool:
        """Whether the lock is ours, from now on or still. Raises: Unavailable; then it may be somebody else's."""
        return bool(self._ask(lambda session: session.scalar(select(func.pg_try_advisory_lock(LEADER_LOCK)))))

    def epoch(self) -> int:
        """The newest epoch. Raises: Unavailable."""
        return int(self._ask(lambda session: session.scalar(select(schema.leadership.c.epoch))))

    def beat(self) -> tuple[Replica, ...]:
        """All replicas that were there during the last minute, this one among them, which says so by this.

        None at all while the database's schema has no room for them: who leads next makes it. Raises: Unavailable.
        """

        def beat(session: Connection) -> tuple[Replica, ...]:
            try:
                session.execute(_PUT_BEAT, {"own_id": self.own_id, "own_url": self._own_url})
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", "") == _UNDEFINED_TABLE:
                    return ()
                raise
            return tuple(
                Replica(id=ReplicaId(key), api_url=url, beats=beats, quiet_ms=max(0, quiet), leads=key == holder)
                for key, url, beats, _, quiet, holder in session.execute(_ALL)
            )

        found: tuple[Replica, ...] = self._ask(beat)
        return found

    def end_holder(self) -> None:
        """End the session that has the lock, whose replica does not beat any more. Raises: Unavailable."""
        self._ask(lambda session: session.execute(_END_HOLDER).all())

    def leave(self) -> None:
        """This replica is going: the others need not look for it. Raises: Unavailable."""
        self._ask(lambda session: session.execute(delete(schema.replicas).where(schema.replicas.c.id == self.own_id)))

    def sweep(self) -> None:
        """Forget replicas that were not there for a day. Raises: Unavailable."""
        old = schema.replicas.c.seen_ms < _NOW_MS - 86_400_000
        self._ask(lambda session: session.execute(delete(schema.replicas).where(old)))

    def close(self) -> None:
        """Let go of the lock and the session; harmless twice."""
        session, self._session = self._session, None
        if session is not None:
            session.invalidate()
            session.close()
        self._engine.dispose()

    def _ask(self, ask: Any) -> Any:
        """What ``ask`` finds; a session that broke is given up, and with it the lock."""
        try:
            with failing_clearly():
                if self._session is None:
                    self._session = self._engine.connect()
                return ask(self._session)
        except Unavailable:
            session, self._session = self._session, None
            if session is not None:
                session.invalidate()
                session.close()
            raise
