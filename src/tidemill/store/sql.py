"""The store over SQLite or PostgreSQL.

A commit is one transaction. Its first statement takes the row of ``leadership``, if the epoch is still the
committer's: that fences older leaders, numbers the events without gaps, and puts commits one after the other.
Then come inserts, and updates that name the version they assume; a count of rows that is not as expected means
that somebody was faster, and all of it is undone.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from typing import Any, Final, TypeVar, cast

from sqlalchemy import (
    Connection,
    CursorResult,
    Executable,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    inspect,
    literal_column,
    null,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from tidemill.core.lifecycle import is_terminal
from tidemill.errors import Deposed, InvalidSetting, Stale, TidemillError, Unavailable
from tidemill.model.artifact import Artifact
from tidemill.model.cloud import Rental
from tidemill.model.events import LogEntry
from tidemill.model.fleet import DeliveryMark, Node, Outpost, Site
from tidemill.model.guard import Decision
from tidemill.model.ids import (
    ArtifactId,
    DataSetId,
    JobId,
    LaunchId,
    ModelId,
    NodeId,
    PrincipalId,
    ProjectId,
    TokenId,
    WorkloadId,
)
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Job, JobState, Workload
from tidemill.model.ledger import (
    TOKEN_GROUPS,
    Evidence,
    LedgerLine,
    LedgerTotals,
    ServedTotals,
    TokenTotals,
    TokenUsage,
)
from tidemill.model.plan import Reason, Waiting
from tidemill.model.queue import Queue, QueueUsage
from tidemill.model.registry import Model, ModelVersion
from tidemill.model.reservation import Reservation
from tidemill.model.rollout import Rollout
from tidemill.model.scaling import Habit
from tidemill.model.storage import DataSet, DataSetState, Volume
from tidemill.model.tenant import Organization, Principal, Project, Secret, Token
from tidemill.ports import Batch, IdempotencyRecord, JobFilter, JobRow, Page, Snapshot, StoredEvent
from tidemill.store import schema
from tidemill.store.arrays import insert_all, update_all
from tidemill.store.codec import decode, encode
from tidemill.store.connections import connect, was_undone
from tidemill.store.cursors import from_cursor, to_cursor
from tidemill.store.rows import LOW_BITS, LOW_MASK, Row, Rows, Thing, rows_of

T = TypeVar("T")
_MIGRATION_LOCK: Final = 7_203_685_477
_AGAIN_S: Final = (0.02, 0.06, 0.2)
"""After about how long a commit is tried again that the database undid for the sake of another."""
_DELETED: Final = "deleted"
_BITS: Final[Any] = literal_column(str(LOW_BITS))
_MASK: Final[Any] = literal_column(str(LOW_MASK))
_LAST: Final = "\U0010ffff"
_UNLUCKY: Final = (JobState.FAILED.value, JobState.CANCELLED.value)
_LIVE_JOBS: Final = [state.value for state in JobState if not is_terminal(state)]
_LIVE_ATTEMPTS: Final = [state.value for state in AttemptState if not is_terminal(state)]
_LIVE_ALLOCATIONS: Final = [state.value for state in AllocationState if not is_terminal(state)]
_TABLES: Final[dict[type[Thing], Table]] = {
    Workload: schema.workloads,
    Job: schema.jobs,
    Attempt: schema.attempts,
    Allocation: schema.allocations,
    Node: schema.nodes,
    DeliveryMark: schema.delivery_marks,
    Queue: schema.queues,
    QueueUsage: schema.queue_usage,
    Reservation: schema.reservations,
    Rental: schema.rentals,
    Rollout: schema.rollouts,
    Model: schema.models,
    ModelVersion: schema.model_versions,
}
_NEWEST: Final = (schema.workloads.c.submitted_ns, schema.workloads.c.id, schema.jobs.c.position)
_JOB_ROWS: Final = select(schema.jobs.c.body, schema.jobs.c.reason, schema.workloads.c.body, *_NEWEST).join(
    schema.workloads, schema.workloads.c.id == schema.jobs.c.workload_id
)


def _guarded(table: Table, *columns: str) -> Executable:
    """An update of the row that has the assumed version."""
    return (
        update(table)
        .where(table.c.id == bindparam("key"), table.c.version == bindparam("assumed"))
        .values({name: bindparam(name) for name in columns})
    )


_UPDATES: Final[dict[type[Thing], Executable]] = {
    Job: update(schema.jobs)
    .where(schema.jobs.c.id == bindparam("key"), schema.jobs.c.version == bindparam("assumed"))
    .values(
        state=bindparam("state"),
        version=bindparam("version"),
        body=bindparam("body"),
        reason=case((bindparam("state") == JobState.QUEUED.value, schema.jobs.c.reason), else_=null()),
    ),
    Attempt: _guarded(schema.attempts, "state", "version", "body"),
    Allocation: _guarded(schema.allocations, "state", "version", "body"),
    Node: _guarded(schema.nodes, "name", "version", "body"),
    DeliveryMark: _guarded(schema.delivery_marks, "version", "body"),
    Queue: _guarded(schema.queues, "version", "body"),
    QueueUsage: _guarded(schema.queue_usage, "version", "body"),
    Reservation: _guarded(schema.reservations, "cancelled_ns", "version", "body"),
    Rental: _guarded(schema.rentals, "state", "ended_ns", "version", "body"),
    Rollout: _guarded(schema.rollouts, "ended_ns", "version", "body"),
    Model: _guarded(schema.models, "name", "version", "body"),
    ModelVersion: _guarded(schema.model_versions, "deleted_ns", "version", "body"),
}
_REASON: Final = (
    update(schema.jobs)
    .where(schema.jobs.c.id == bindparam("key"), schema.jobs.c.state == JobState.QUEUED.value)
    .values(reason=bindparam("reason"))
)
_INSERT_LINE: Final = sqlite.insert(schema.ledger).on_conflict_do_nothing(index_elements=["id"])
_MARK: Final = sqlite.insert(schema.meter_marks)
_PUT_MARK: Final = _MARK.on_conflict_do_update(
    index_elements=["node_id", "meter"],
    set_={"until_ns": _MARK.excluded.until_ns},
    where=_MARK.excluded.until_ns > schema.meter_marks.c.until_ns,
)
_KEEP_REASON: Final = "reason = CASE WHEN u.state = 'queued' THEN t.reason END"
_LATER_MARK: Final = (
    " ON CONFLICT (node_id, meter) DO UPDATE SET until_ns = excluded.until_ns"
    " WHERE excluded.until_ns > meter_marks.until_ns"
)


class SqlStore:
    """``ports.Store`` in the database at ``url``. ``patience_s`` is how long a call waits for a locked database.

    Safe to use from several threads: writes are one at a time, reads go beside them and each sees one instant.
    Raises: InvalidSetting when ``url`` is not an address of SQLite or PostgreSQL.
    """

    def __init__(self, url: str, *, patience_s: float = 10.0) -> None:
        self._database = connect(url, patience_s=patience_s)
        self._patience_s = patience_s
        self._turn = threading.Lock()
        self._epoch = 0
        """That of the last ``lead``; zero: nobody leads through this object, and single values are written unfenced."""
        self._doubtful = 0
        """The number of a commit of which it is not known whether the database took it; zero: none."""
        insert_or = sqlite.insert if self._database.is_sqlite else postgresql.insert
        self._put: dict[Table, Executable] = {}
        for table in (
            schema.organizations,
            schema.projects,
            schema.principals,
            schema.tokens,
            schema.secrets,
            schema.sites,
            schema.outposts,
            schema.volumes,
            schema.habits,
        ):
            put = insert_or(table)
            self._put[table] = put.on_conflict_do_update(
                index_elements=list(table.primary_key.columns), set_={"body": put.excluded.body}
            )

    # The schema and the connections

    def migrate(self) -> None:
        """Bring the schema to this version's; harmless when it is there already, whole or not at all.

        Raises: InvalidSetting when the database is of a later version of Tidemill.
        """
        with self._database.reading() as connection:
            if _is_current(connection):
                return
        with self._writing() as connection:
            if not self._database.is_sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            if not _is_current(connection):
                upgrade(connection)

    def close(self) -> None:
        """Release connections; harmless twice."""
        self._database.close()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        if not self._turn.acquire(timeout=self._patience_s):
            raise Unavailable("Other writes are waiting for the database.", mend="Try again in a moment.")
        try:
            with self._database.writing() as connection:
                yield connection
        finally:
            self._turn.release()

    # Commits

    def lead(self, *, holder: str) -> int:
        """A new epoch, larger than any before, that makes ``holder`` the only one whose commits are taken."""
        table = schema.leadership
        with self._writing() as connection:
            taken = update(table).values(epoch=table.c.epoch + 1, holder=holder).returning(table.c.epoch)
            epoch: int = connection.execute(taken).scalar_one()
            self._epoch, self._doubtful = epoch, 0
            return epoch

    def commit(self, batch: Batch) -> int:
        """The sequence number of the newest event after all of ``batch`` is durable. Raises: as ``Store`` says.

        Also Stale: a ledger line is stored already with another end, or a commit whose answer was lost turns
        out to be stored. Then what the caller knows is not what is stored, and it has to load again.
        """
        rows = rows_of(batch)
        for pause_s in _AGAIN_S:
            try:
                return self._commit(batch.epoch, rows)
            except Unavailable as error:
                if not was_undone(error):
                    raise
            time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - so that two do not meet again
        return self._commit(batch.epoch, rows)

    def _commit(self, epoch: int, rows: Rows) -> int:
        number = 0
        try:
            with self._writing() as connection:
                at, seq = self._take_turn(connection, epoch, len(rows.events))
                self._write(connection, rows, first_seq=seq - len(rows.events) + 1)
                number = at
        except Unavailable as error:
            if was_undone(error) or not number or not self._was_stored(epoch, number):
                raise
        return seq

    def _take_turn(self, connection: Connection, epoch: int, events: int) -> tuple[int, int]:
        """The number of this commit in all, and that of its last event. Raises: Fenced, Stale."""
        table = schema.leadership
        taken = connection.execute(
            update(table)
            .where(table.c.epoch == epoch)
            .values(commits=table.c.commits + 1, last_seq=table.c.last_seq + events)
            .returning(table.c.commits, table.c.last_seq)
        ).one_or_none()
        if taken is None:
            raise _fenced(epoch, connection.execute(select(table.c.epoch, table.c.holder)).one_or_none())
        if self._doubtful:
            was_stored, self._doubtful = taken.commits > self._doubtful, 0
            if was_stored:
                raise Stale("A commit whose answer was lost is stored.")
        return taken.commits, taken.last_seq

    def _was_stored(self, epoch: int, number: int) -> bool:
        """Whether the commit of that number is stored, though no answer to it came. Raises: Fenced, Unavailable."""
        table = schema.leadership
        try:
            with self._writing() as connection:
                now = connection.execute(select(table.c.epoch, table.c.commits).with_for_update()).one()
        except TidemillError:
            self._doubtful = number
            raise
        if now.epoch != epoch:
            raise _fenced(epoch, now)
        return bool(now.commits >= number)

    def _write(self, connection: Connection, rows: Rows, *, first_seq: int) -> None:
        write = _write_rows if self._database.is_sqlite else _write_arrays
        for seq, row in enumerate(rows.events, first_seq):
            row["seq"] = seq
        write(connection, rows)
        if rows.idempotency:
            connection.execute(insert(schema.idempotency), rows.idempotency)

    # What is not over

    def load(self) -> Snapshot:
        """All that is not over, at one instant."""
        jobs, attempts, allocations = schema.jobs.c, schema.attempts.c, schema.allocations.c
        live = jobs.state.in_(_LIVE_JOBS)
        with self._database.reading() as connection:
            rows = connection.execute(
                select(jobs.id, jobs.body, jobs.reason).where(live).order_by(jobs.workload_id, jobs.position)
            ).all()
            return Snapshot(
                nodes=_nodes(connection),
                workloads=_values(
                    connection,
                    Workload,
                    select(schema.workloads.c.body)
                    .where(schema.workloads.c.id.in_(select(jobs.workload_id).where(live)))
                    .order_by(schema.workloads.c.id),
                ),
                jobs=tuple(decode(Job, body) for _, body, _ in rows),
                attempts=_values(
                    connection,
                    Attempt,
                    select(attempts.body)
                    .where(attempts.state.in_(_LIVE_ATTEMPTS))
                    .order_by(attempts.job_id, attempts.number),
                ),
                allocations=_values(
                    connection,
                    Allocation,
                    select(allocations.body)
                    .where(allocations.state.in_(_LIVE_ALLOCATIONS))
                    .order_by(allocations.job_id, allocations.fence, allocations.rank),
                ),
                reasons=tuple(
                    Waiting(job_id=JobId(job_id), reason=decode(Reason, reason)) for job_id, _, reason in rows if reason
                ),
                metered_until=tuple(
                    (NodeId(node_id), meter, until)
                    for node_id, meter, until in connection.execute(
                        select(schema.meter_marks).order_by(schema.meter_marks.c.node_id, schema.meter_marks.c.meter)
                    )
                ),
                last_seq=connection.execute(select(schema.leadership.c.last_seq)).scalar_one(),
                queues=_values(connection, Queue, select(schema.queues.c.body).order_by(schema.queues.c.id)),
                unlucky=tuple(
                    (WorkloadId(workload_id), count)
                    for workload_id, count in connection.execute(
                        select(jobs.workload_id, func.count())
                        .where(jobs.state.in_(_UNLUCKY), jobs.workload_id.in_(select(jobs.workload_id).where(live)))
                        .group_by(jobs.workload_id)
                        .order_by(jobs.workload_id)
                    )
                ),
                queue_usages=_values(
                    connection, QueueUsage, select(schema.queue_usage.c.body).order_by(schema.queue_usage.c.id)
                ),
                deliveries=_values(
                    connection, DeliveryMark, select(schema.delivery_marks.c.body).order_by(schema.delivery_marks.c.id)
                ),
                reservations=_values(
                    connection,
                    Reservation,
                    select(schema.reservations.c.body)
                    .where(schema.reservations.c.cancelled_ns == 0)
                    .order_by(schema.reservations.c.id),
                ),
                rollouts=_values(
                    connection,
                    Rollout,
                    select(schema.rollouts.c.body)
                    .where(schema.rollouts.c.ended_ns == 0)
                    .order_by(schema.rollouts.c.id),
                ),
            )

    # Workloads, jobs and what they held

    def workload(self, workload_id: WorkloadId) -> Workload | None:
        return self._one(Workload, select(schema.workloads.c.body).where(schema.workloads.c.id == workload_id))

    def jobs_of(self, workload_id: WorkloadId) -> tuple[Job, ...]:
        """A workload's jobs by index."""
        jobs = schema.jobs.c
        return self._all(Job, select(jobs.body).where(jobs.workload_id == workload_id).order_by(jobs.position))

    def job(self, job_id: JobId) -> JobRow | None:
        query = _JOB_ROWS.where(schema.jobs.c.id == job_id)
        rows = self._database.glance(lambda connection: connection.execute(query).all())
        return next(iter(_job_rows(rows)), None)

    def find_jobs(self, where: JobFilter, *, cursor: str = "", limit: int = 50) -> Page[JobRow]:
        """Jobs, newest submission first; stable under concurrent writes. Raises: InvalidRequest for a bad cursor."""
        jobs, workloads = schema.jobs.c, schema.workloads.c
        query = _JOB_ROWS.order_by(*(column.desc() for column in _NEWEST)).limit(limit + 1)
        if cursor:
            query = query.where(tuple_(*_NEWEST) < tuple_(*from_cursor(cursor, tuple[int, str, int])))
        if where.project_ids:
            query = query.where(workloads.project_id.in_(where.project_ids))
        if where.states:
            query = query.where(jobs.state.in_([state.value for state in where.states]))
        if where.kinds:
            query = query.where(workloads.kind.in_([kind.value for kind in where.kinds]))
        if where.workload_id:
            query = query.where(jobs.workload_id == where.workload_id)
        if where.name:
            query = query.where(workloads.name == where.name)
        if where.text:
            query = query.where(workloads.name >= where.text, workloads.name < where.text + _LAST)
        if where.id_prefix:
            query = query.where(jobs.id >= where.id_prefix, jobs.id < where.id_prefix + _LAST)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        more = len(rows) > limit
        return Page(items=_job_rows(rows[:limit]), next_cursor=to_cursor(rows[limit - 1][-3:]) if more else "")

    def attempts(self, job_id: JobId) -> tuple[Attempt, ...]:
        """A job's attempts by number."""
        attempts = schema.attempts.c
        return self._all(Attempt, select(attempts.body).where(attempts.job_id == job_id).order_by(attempts.number))

    def allocations(self, job_id: JobId) -> tuple[Allocation, ...]:
        """What the job's workers held and hold, by attempt and rank."""
        held = schema.allocations.c
        return self._all(
            Allocation, select(held.body).where(held.job_id == job_id).order_by(held.fence, held.rank, held.id)
        )

    def allocation(self, launch_id: LaunchId) -> Allocation | None:
        return self._one(Allocation, select(schema.allocations.c.body).where(schema.allocations.c.id == launch_id))

    def nodes(self) -> tuple[Node, ...]:
        """Every node ever joined, by name."""
        with self._database.reading() as connection:
            return _nodes(connection)

    # The event log and the books

    def events(
        self,
        *,
        after: int = 0,
        limit: int = 100,
        job_id: JobId = JobId(""),
        workload_id: WorkloadId = WorkloadId(""),
        project_ids: tuple[ProjectId, ...] = (),
    ) -> tuple[StoredEvent, ...]:
        """Events with a sequence number above ``after``, oldest first."""
        events = schema.events.c
        query = select(events.seq, events.body).where(events.seq > after).order_by(events.seq).limit(limit)
        if job_id:
            query = query.where(events.job_id == job_id)
        if workload_id:
            query = query.where(events.workload_id == workload_id)
        if project_ids:
            query = query.where(events.project_id.in_(project_ids))
        rows = self._database.glance(lambda connection: connection.execute(query).all())
        return tuple(StoredEvent(seq=seq, entry=decode(LogEntry, body)) for seq, body in rows)

    def ledger(
        self, *, job_id: JobId = JobId(""), project_id: ProjectId = ProjectId(""), cursor: str = "", limit: int = 100
    ) -> Page[LedgerLine]:
        """Ledger lines in the order in which they were stored. Raises: InvalidRequest for a bad cursor."""
        line = schema.ledger.c.line
        after = from_cursor(cursor, int) if cursor else 0
        query = select(line, schema.ledger.c.body).where(line > after, *_of(job_id, project_id))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(line).limit(limit + 1)).all()
        return Page(
            items=tuple(decode(LedgerLine, body) for _, body in rows[:limit]),
            next_cursor=to_cursor(rows[limit - 1][0]) if len(rows) > limit else "",
        )

    def ledger_totals(
        self,
        *,
        job_id: JobId = JobId(""),
        project_id: ProjectId = ProjectId(""),
        workload_id: WorkloadId = WorkloadId(""),
        idle: bool = False,
    ) -> LedgerTotals:
        """Exact sums of a job's, a workload's or a project's lines, or of idle time when ``idle``; of all otherwise.

        The evidence is "measured" when all of at least one line is. Sums are of halves of the numbers, put
        together here, because a sum can be larger than the database's integers.
        """
        lines = schema.ledger.c
        halves = [
            half
            for column in (lines.amount_micro, lines.energy_mj, lines.carbon_mg)
            for half in (func.sum(column.op(">>")(_BITS)), func.sum(column.op("&")(_MASK)))
        ]
        estimated = func.sum(case((lines.evidence == Evidence.ESTIMATED.value, 1), else_=0))
        query = select(
            lines.resource, func.count(), estimated, func.sum(lines.held_high), func.sum(lines.held_low), *halves
        ).where(*_of(job_id, project_id))
        if idle:
            query = query.where(lines.launch_id == "")
        if workload_id:
            jobs = schema.jobs.c
            query = query.where(lines.job_id.in_(select(jobs.id).where(jobs.workload_id == workload_id)))
        with self._database.reading() as connection:
            rows = connection.execute(query.group_by(lines.resource).order_by(lines.resource)).all()

        def total(column: int) -> int:
            return sum((int(row[column]) << LOW_BITS) + int(row[column + 1]) for row in rows)

        count = sum(row[1] for row in rows)
        all_measured = count > 0 and not any(row[2] for row in rows)
        return LedgerTotals(
            held_milli_ns=tuple((row[0], (int(row[3]) << LOW_BITS) + int(row[4])) for row in rows),
            amount_micro=total(5),
            energy_mj=total(7),
            carbon_mg=total(9),
            evidence=Evidence.MEASURED if all_measured else Evidence.ESTIMATED,
            lines=count,
        )

    def put_token_usages(self, usages: Sequence[TokenUsage]) -> tuple[TokenUsage, ...]:
        """Those of these that were not in the books before; all are there now, each once, or none."""
        if not usages:
            return ()
        once = list({usage.id: usage for usage in usages}.values())
        new = (sqlite.insert if self._database.is_sqlite else postgresql.insert)(schema.token_usages)
        rows = [
            {
                "id": usage.id,
                "project_id": usage.project_id,
                "job_id": usage.job_id,
                "token_id": usage.token_id,
                "model": usage.model,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "estimated": int(usage.is_estimated),
                "at_ns": usage.at_ns,
                "user_name": usage.user,
                "label": usage.label,
                "amount_pico": usage.amount_pico,
                "body": encode(usage),
            }
            for usage in once
        ]
        ids = schema.token_usages.c.id
        with self._writing() as connection:
            self._check_leads(connection)
            known = select(ids).where(ids.in_(bindparam("ids", expanding=True)))
            before = {
                found
                for at in range(0, len(rows), 500)
                for found in connection.execute(known, {"ids": [row["id"] for row in rows[at : at + 500]]}).scalars()
            }
            connection.execute(new.on_conflict_do_nothing(index_elements=["id"]), rows)
        return tuple(usage for usage in once if usage.id not in before)

    def token_usages(
        self, *, project_id: ProjectId = ProjectId(""), cursor: str = "", limit: int = 100
    ) -> Page[TokenUsage]:
        """What requests took, in the order in which they were stored. Raises: InvalidRequest for a bad cursor."""
        usages = schema.token_usages.c
        query = select(usages.line, usages.body).where(usages.line > (from_cursor(cursor, int) if cursor else 0))
        if project_id:
            query = query.where(usages.project_id == project_id)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(usages.line).limit(limit + 1)).all()
        return Page(
            items=tuple(decode(TokenUsage, body) for _, body in rows[:limit]),
            next_cursor=to_cursor(rows[limit - 1][0]) if len(rows) > limit else "",
        )

    def put_decisions(self, decisions: Sequence[Decision]) -> int:
        """How many of these were not in the books before; all are there now, each once, or none."""
        if not decisions:
            return 0
        new = (sqlite.insert if self._database.is_sqlite else postgresql.insert)(schema.guard_decisions)
        rows = [
            {
                "id": one.id,
                "project_id": one.project_id,
                "at_ns": one.at_ns,
                "model": one.model,
                "rule": one.rule,
                "action": one.action,
                "body": encode(one),
            }
            for one in {one.id: one for one in decisions}.values()
        ]
        known = select(func.count()).where(schema.guard_decisions.c.id.in_(bindparam("ids", expanding=True)))
        with self._writing() as connection:
            self._check_leads(connection)
            before = sum(
                connection.execute(known, {"ids": [row["id"] for row in rows[at : at + 500]]}).scalar_one()
                for at in range(0, len(rows), 500)
            )
            connection.execute(new.on_conflict_do_nothing(index_elements=["id"]), rows)
        return len(rows) - before

    def decisions(
        self, *, project_ids: Sequence[ProjectId] = (), model: str = "", rule: str = "", action: str = "",
        cursor: str = "", limit: int = 100,
    ) -> Page[Decision]:  # fmt: skip
        """What guardrails decided, newest first. Raises: InvalidRequest for a bad cursor."""
        table = schema.guard_decisions.c
        query = select(table.line, table.body)
        if cursor:
            query = query.where(table.line < from_cursor(cursor, int))
        if project_ids:
            query = query.where(table.project_id.in_(project_ids))
        for column, value in ((table.model, model), (table.rule, rule), (table.action, action)):
            if value:
                query = query.where(column == value)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(table.line.desc()).limit(limit + 1)).all()
        return Page(
            items=tuple(decode(Decision, body) for _, body in rows[:limit]),
            next_cursor=to_cursor(rows[limit - 1][0]) if len(rows) > limit else "",
        )

    def served(self, *, project_id: ProjectId) -> tuple[ServedTotals, ...]:
        """What the services of a project answered, by service and model, in order; whoever asked."""
        usages, jobs, workloads = schema.token_usages.c, schema.jobs.c, schema.workloads.c
        query = (
            select(
                jobs.workload_id, usages.model, func.count(), func.sum(usages.prompt_tokens),
                func.sum(usages.completion_tokens),
            )
            .join_from(schema.token_usages, schema.jobs, jobs.id == usages.job_id)
            .join(schema.workloads, workloads.id == jobs.workload_id)
            .where(workloads.project_id == project_id)
            .group_by(jobs.workload_id, usages.model)
            .order_by(jobs.workload_id, usages.model)
        )  # fmt: skip
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return tuple(
            ServedTotals(
                workload_id=WorkloadId(workload),
                model=model,
                requests=requests,
                prompt_tokens=int(prompt),
                completion_tokens=int(completion),
            )
            for workload, model, requests, prompt, completion in rows
        )

    def token_totals(
        self,
        *,
        job_id: JobId = JobId(""),
        project_id: ProjectId = ProjectId(""),
        token_id: TokenId = TokenId(""),
        since_ns: int = 0,
        by: Sequence[str] = ("model", "key"),
    ) -> tuple[TokenTotals, ...]:
        """Sums of a replica's, a project's or a key's requests since then, else of all, by some of ``TOKEN_GROUPS``.

        Amounts are summed in halves, because their sum can be larger than the database's integers.
        """
        usages = schema.token_usages.c
        columns = dict(zip(TOKEN_GROUPS, (usages.model, usages.token_id, usages.user_name, usages.label), strict=True))
        groups: list[Any] = [columns[one] for one in TOKEN_GROUPS if one in by]
        query = select(
            func.count(),
            func.sum(usages.estimated),
            func.sum(usages.prompt_tokens),
            func.sum(usages.completion_tokens),
            func.sum(usages.amount_pico.op(">>")(_BITS)),
            func.sum(usages.amount_pico.op("&")(_MASK)),
            *groups,
        )
        for column, wanted in ((usages.job_id, job_id), (usages.project_id, project_id), (usages.token_id, token_id)):
            if wanted:
                query = query.where(column == wanted)
        if since_ns:
            query = query.where(usages.at_ns >= since_ns)
        with self._database.reading() as connection:
            rows = connection.execute(query.group_by(*groups).order_by(*groups)).all()
        found = []
        for requests, estimated, prompt, completion, high, low, *names in rows:
            if not requests:  # a sum without groups is there also over nothing
                continue
            named = dict(zip((one for one in TOKEN_GROUPS if one in by), names, strict=True))
            found.append(
                TokenTotals(
                    model=named.get("model", ""),
                    token_id=TokenId(named.get("key", "")),
                    user=named.get("user", ""),
                    label=named.get("label", ""),
                    requests=requests,
                    estimated=int(estimated),
                    prompt_tokens=int(prompt),
                    completion_tokens=int(completion),
                    amount_pico=(int(high) << LOW_BITS) + int(low),
                )
            )
        return tuple(found)

    def rentals(self, *, since_ns: int = 0) -> tuple[Rental, ...]:
        """Rented instances that are not over, and those that ended at ``since_ns`` or later, by id."""
        rentals = schema.rentals.c
        wanted = (rentals.ended_ns == 0) | (rentals.ended_ns >= since_ns)
        return self._all(Rental, select(rentals.body).where(wanted).order_by(rentals.id))

    def revisions(self, workload_id: WorkloadId) -> tuple[Rollout, ...]:
        """All rollouts of the service of which a workload is a revision, by revision; none: it was never updated."""
        rollouts = schema.rollouts.c
        first = select(rollouts.first_id).where(
            (rollouts.workload_id == workload_id) | (rollouts.first_id == workload_id)
        )
        found = self._all(Rollout, select(rollouts.body).where(rollouts.first_id.in_(first)))
        return tuple(sorted(found, key=lambda one: one.revision))

    def idempotent(self, principal_id: PrincipalId, key: str) -> IdempotencyRecord | None:
        records = schema.idempotency.c
        return self._one(
            IdempotencyRecord, select(records.body).where(records.principal_id == principal_id, records.key == key)
        )

    # Tenants, secrets and artifacts

    def put_organization(self, organization: Organization) -> None:
        self._replace(schema.organizations, {"id": organization.id, "body": encode(organization)})

    def put_project(self, project: Project) -> None:
        self._replace(schema.projects, {"id": project.id, "body": encode(project)})

    def put_principal(self, principal: Principal) -> None:
        self._replace(schema.principals, {"id": principal.id, "body": encode(principal)})

    def put_token(self, token: Token) -> None:
        self._replace(schema.tokens, {"id": token.id, "body": encode(token)})

    def put_site(self, site: Site) -> None:
        self._replace(schema.sites, {"id": site.id, "body": encode(site)})

    def put_outpost(self, outpost: Outpost) -> None:
        self._replace(schema.outposts, {"id": outpost.id, "body": encode(outpost)})

    def put_secret(self, secret: Secret) -> None:
        self._replace(schema.secrets, {"project_id": secret.project_id, "name": secret.name, "body": encode(secret)})

    def delete_secret(self, project_id: ProjectId, name: str) -> bool:
        """Whether there was one."""
        secrets = schema.secrets.c
        gone = delete(schema.secrets).where(secrets.project_id == project_id, secrets.name == name)
        with self._writing() as connection:
            return _execute(connection, gone).rowcount > 0

    def put_artifact(self, artifact: Artifact) -> Artifact:
        """The artifact with the next free version of its name; its own ``version`` is ignored."""
        artifacts = schema.artifacts.c
        newest = select(func.max(artifacts.version)).where(
            artifacts.project_id == artifact.project_id, artifacts.name == artifact.name
        )
        with self._writing() as connection:
            self._check_leads(connection)
            if not self._database.is_sqlite:
                name = f"artifact {artifact.project_id} {artifact.name}"
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
            stored = replace(artifact, version=(connection.execute(newest).scalar_one() or 0) + 1)
            row = {"id": stored.id, "project_id": stored.project_id, "name": stored.name, "version": stored.version}
            connection.execute(insert(schema.artifacts), [row | {"body": encode(stored)}])
        return stored

    def put_volume(self, volume: Volume) -> None:
        self._replace(schema.volumes, {"project_id": volume.project_id, "name": volume.name, "body": encode(volume)})

    def delete_volume(self, project_id: ProjectId, name: str) -> bool:
        """Whether there was one."""
        volumes = schema.volumes.c
        gone = delete(schema.volumes).where(volumes.project_id == project_id, volumes.name == name)
        with self._writing() as connection:
            return _execute(connection, gone).rowcount > 0

    def put_habit(self, habit: Habit) -> None:
        self._replace(schema.habits, {"project_id": habit.project_id, "service": habit.service, "body": encode(habit)})

    def add_dataset(self, dataset: DataSet) -> DataSet:
        """The data set with the next version of its name that was never given; its own ``version`` is ignored."""
        datasets = schema.datasets.c
        newest = select(func.max(datasets.version)).where(
            datasets.project_id == dataset.project_id, datasets.name == dataset.name
        )
        with self._writing() as connection:
            if not self._database.is_sqlite:
                name = f"dataset {dataset.project_id} {dataset.name}"
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
            stored = replace(dataset, version=(connection.execute(newest).scalar_one() or 0) + 1)
            row = {"id": stored.id, "project_id": stored.project_id, "name": stored.name, "version": stored.version}
            connection.execute(insert(schema.datasets), [row | {"state": _state_of(stored), "body": encode(stored)}])
        return stored

    def put_dataset(self, dataset: DataSet) -> None:
        """Replace the one of that id, whose name and version stay."""
        changed = (
            update(schema.datasets)
            .where(schema.datasets.c.id == dataset.id)
            .values(state=_state_of(dataset), body=encode(dataset))
        )
        with self._writing() as connection:
            _execute(connection, changed)

    def organizations(self) -> tuple[Organization, ...]:
        return self._all(Organization, select(schema.organizations.c.body).order_by(schema.organizations.c.id))

    def projects(self) -> tuple[Project, ...]:
        return self._all(Project, select(schema.projects.c.body).order_by(schema.projects.c.id))

    def sites(self) -> tuple[Site, ...]:
        """The sites that were added, by id."""
        return self._all(Site, select(schema.sites.c.body).order_by(schema.sites.c.id))

    def outposts(self) -> tuple[Outpost, ...]:
        """Every outpost ever made, by id."""
        return self._all(Outpost, select(schema.outposts.c.body).order_by(schema.outposts.c.id))

    def principals(self) -> tuple[Principal, ...]:
        return self._all(Principal, select(schema.principals.c.body).order_by(schema.principals.c.id))

    def tokens(self) -> tuple[Token, ...]:
        return self._all(Token, select(schema.tokens.c.body).order_by(schema.tokens.c.id))

    def token(self, token_id: TokenId) -> Token | None:
        return self._one(Token, select(schema.tokens.c.body).where(schema.tokens.c.id == token_id))

    def secret(self, project_id: ProjectId, name: str) -> Secret | None:
        secrets = schema.secrets.c
        return self._one(Secret, select(secrets.body).where(secrets.project_id == project_id, secrets.name == name))

    def secrets(self, project_id: ProjectId) -> tuple[Secret, ...]:
        """A project's secrets, by name."""
        secrets = schema.secrets.c
        return self._all(Secret, select(secrets.body).where(secrets.project_id == project_id).order_by(secrets.name))

    def artifact(self, artifact_id: ArtifactId) -> Artifact | None:
        return self._one(Artifact, select(schema.artifacts.c.body).where(schema.artifacts.c.id == artifact_id))

    def find_artifact(self, project_id: ProjectId, name: str, version: int = 0) -> Artifact | None:
        """That version of the named artifact, or the newest when ``version`` is zero."""
        artifacts = schema.artifacts.c
        query = select(artifacts.body).where(artifacts.project_id == project_id, artifacts.name == name)
        if version:
            query = query.where(artifacts.version == version)
        return self._one(Artifact, query.order_by(artifacts.version.desc()).limit(1))

    def artifacts(self, project_id: ProjectId) -> tuple[Artifact, ...]:
        """A project's artifacts, by name, newest version first."""
        artifacts = schema.artifacts.c
        query = select(artifacts.body).where(artifacts.project_id == project_id)
        return self._all(Artifact, query.order_by(artifacts.name, artifacts.version.desc()))

    def volume(self, project_id: ProjectId, name: str) -> Volume | None:
        volumes = schema.volumes.c
        return self._one(Volume, select(volumes.body).where(volumes.project_id == project_id, volumes.name == name))

    def volumes(self, project_id: ProjectId) -> tuple[Volume, ...]:
        """A project's volumes, by name."""
        volumes = schema.volumes.c
        return self._all(Volume, select(volumes.body).where(volumes.project_id == project_id).order_by(volumes.name))

    def habits(self) -> tuple[Habit, ...]:
        """What is remembered of services, by project and name."""
        habits = schema.habits.c
        return self._all(Habit, select(habits.body).order_by(habits.project_id, habits.service))

    def dataset(self, dataset_id: DataSetId) -> DataSet | None:
        return self._one(DataSet, select(schema.datasets.c.body).where(schema.datasets.c.id == dataset_id))

    def find_dataset(self, project_id: ProjectId, name: str, version: int = 0) -> DataSet | None:
        """That version of the named data set, or the newest when ``version`` is zero; none that was deleted."""
        datasets = schema.datasets.c
        query = select(datasets.body).where(
            datasets.project_id == project_id, datasets.name == name, datasets.state != _DELETED
        )
        if version:
            query = query.where(datasets.version == version)
        return self._one(DataSet, query.order_by(datasets.version.desc()).limit(1))

    def datasets(self, project_id: ProjectId) -> tuple[DataSet, ...]:
        """A project's data sets that were not deleted, by name, newest version first."""
        datasets = schema.datasets.c
        query = select(datasets.body).where(datasets.project_id == project_id, datasets.state != _DELETED)
        return self._all(DataSet, query.order_by(datasets.name, datasets.version.desc()))

    def unscanned_datasets(self) -> tuple[DataSet, ...]:
        """Those of all projects whose files are still to be read, by id."""
        datasets = schema.datasets.c
        query = select(datasets.body).where(datasets.state == DataSetState.SCANNING.value)
        return self._all(DataSet, query.order_by(datasets.id))

    def model(self, project_id: ProjectId, name: str) -> Model | None:
        """The model of that name, also one that was deleted."""
        models = schema.models.c
        return self._one(Model, select(models.body).where(models.project_id == project_id, models.name == name))

    def models(self, project_id: ProjectId) -> tuple[Model, ...]:
        """A project's models, by name, those that were deleted among them."""
        models = schema.models.c
        return self._all(Model, select(models.body).where(models.project_id == project_id).order_by(models.name))

    def model_versions(self, model_id: ModelId) -> tuple[ModelVersion, ...]:
        """A model's versions, newest first, those that were deleted among them."""
        versions = schema.model_versions.c
        query = select(versions.body).where(versions.model_id == model_id)
        return self._all(ModelVersion, query.order_by(versions.number.desc()))

    def project_model_versions(self, project_id: ProjectId, *, digest: str = "") -> tuple[ModelVersion, ...]:
        """The versions of all models of a project that were not deleted, oldest first; with ``digest``, of that."""
        versions = schema.model_versions.c
        query = select(versions.body).where(versions.project_id == project_id, versions.deleted_ns == 0)
        if digest:
            query = query.where(versions.digest == digest)
        return self._all(ModelVersion, query.order_by(versions.id))

    def model_versions_of(self, job_ids: Sequence[JobId]) -> tuple[ModelVersion, ...]:
        """What these jobs made that was not deleted, oldest first."""
        versions = schema.model_versions.c
        query = select(versions.body).where(versions.job_id.in_(job_ids), versions.deleted_ns == 0)
        return self._all(ModelVersion, query.order_by(versions.id))

    # Whether it is sound

    def integrity(self) -> tuple[str, ...]:
        """What is wrong with the database, in sentences; empty when it is sound."""
        wrong: list[str] = []
        try:
            with self._database.reading() as connection:
                if self._database.is_sqlite:
                    found = connection.execute(text("PRAGMA integrity_check")).scalars()
                    wrong += [f"SQLite: {line}" for line in found if line != "ok"]
                wrong += [
                    sentence.format(count)
                    for sentence, query in _ORPHANS
                    if (count := connection.execute(query).scalar_one())
                ]
                wrong += _log_gaps(connection)
        except DBAPIError as error:
            wrong.append(f"The database cannot be read: {error.orig}.")
        return tuple(wrong)

    # Reading and writing single values

    def _one(self, kind: type[T], query: Select[str]) -> T | None:
        body = self._database.glance(lambda connection: connection.execute(query).scalar_one_or_none())
        return None if body is None else decode(kind, body)

    def _all(self, kind: type[T], query: Select[str]) -> tuple[T, ...]:
        return self._database.glance(lambda connection: _values(connection, kind, query))

    def _replace(self, table: Table, row: Row) -> None:
        with self._writing() as connection:
            self._check_leads(connection)
            connection.execute(self._put[table], row)

    def _check_leads(self, connection: Connection) -> None:
        """Nobody else comes to lead while the transaction lasts. Raises: Deposed when somebody does since this did."""
        if not self._epoch:
            return
        table = schema.leadership
        now = connection.execute(select(table.c.epoch, table.c.holder).with_for_update(read=True)).one()
        if now.epoch != self._epoch:
            raise _fenced(self._epoch, now)


def _fenced(epoch: int, now: Any) -> Deposed:
    return Deposed("Another control plane leads.", epoch=epoch, leads=now and now.epoch)


def _write_rows(connection: Connection, rows: Rows) -> None:
    """Write a batch to SQLite, where a statement costs little. Raises: Stale."""
    for kind, table in _TABLES.items():
        if inserts := rows.inserts.get(kind):
            connection.execute(insert(table), inserts)
        if updates := rows.updates.get(kind):
            changed = _execute(connection, _UPDATES[kind], updates).rowcount
            if changed != len(updates):
                raise Stale("The state changed since it was read.", field=table.name)
    if rows.reasons:
        connection.execute(_REASON, rows.reasons)
    if rows.events:
        connection.execute(insert(schema.events), rows.events)
    if rows.ledger:
        written = _execute(connection, _INSERT_LINE, rows.ledger).rowcount
        if written != len(rows.ledger):
            _check_skipped(connection, rows.ledger)
        connection.execute(_PUT_MARK, rows.marks)


def _write_arrays(connection: Connection, rows: Rows) -> None:
    """Write a batch to PostgreSQL, in a statement for each table. Raises: Stale."""
    for kind, table in _TABLES.items():
        if inserts := rows.inserts.get(kind):
            insert_all(connection, table, inserts)
        if updates := rows.updates.get(kind):
            sets = _KEEP_REASON if kind is Job else ""
            changed = update_all(connection, table, updates, where="t.version = u.assumed", sets=sets)
            if changed != len(updates):
                raise Stale("The state changed since it was read.", field=table.name)
    if rows.reasons:
        update_all(connection, schema.jobs, rows.reasons, where="t.state = 'queued'")
    if rows.events:
        insert_all(connection, schema.events, rows.events)
    if rows.ledger:
        written = insert_all(connection, schema.ledger, rows.ledger, otherwise=" ON CONFLICT (id) DO NOTHING")
        if written != len(rows.ledger):
            _check_skipped(connection, rows.ledger)
        insert_all(connection, schema.meter_marks, rows.marks, otherwise=_LATER_MARK)


def _execute(connection: Connection, statement: Executable, rows: Sequence[Row] | None = None) -> CursorResult[Any]:
    return cast("CursorResult[Any]", connection.execute(statement, rows))


def _values(connection: Connection, kind: type[T], query: Select[str]) -> tuple[T, ...]:
    return tuple(decode(kind, body) for body in connection.execute(query).scalars())


def _nodes(connection: Connection) -> tuple[Node, ...]:
    nodes = schema.nodes.c
    return _values(connection, Node, select(nodes.body).order_by(nodes.name, nodes.id))


def _job_rows(rows: Iterable[Any]) -> tuple[JobRow, ...]:
    workloads: dict[str, Workload] = {}
    found = []
    for body, reason, workload_body, _, workload_id, _ in rows:
        if workload_id not in workloads:
            workloads[workload_id] = decode(Workload, workload_body)
        found.append(
            JobRow(
                job=decode(Job, body),
                workload=workloads[workload_id],
                reason=decode(Reason, reason) if reason else None,
            )
        )
    return tuple(found)


def _of(job_id: JobId, project_id: ProjectId) -> list[Any]:
    conditions = []
    if job_id:
        conditions.append(schema.ledger.c.job_id == job_id)
    if project_id:
        conditions.append(schema.ledger.c.project_id == project_id)
    return conditions


def _check_skipped(connection: Connection, rows: Sequence[Row]) -> None:
    """Nothing, when each line is stored as it was given or with the same end. Raises: Stale.

    With another end, whoever counts did not know of the stored one, and goes on from a wrong instant.
    """
    ends = {row["id"]: row["to_ns"] for row in reversed(rows)}
    ids, lines = list(ends), schema.ledger.c
    for start in range(0, len(ids), 500):
        query = select(lines.id, lines.to_ns).where(lines.id.in_(ids[start : start + 500]))
        for line_id, to_ns in connection.execute(query):
            if to_ns != ends[line_id]:
                raise Stale("This usage is in the books with another end.", field="ledger", value=line_id)


def _orphans(child: Table, column: str, parent: Table) -> Select[int]:
    known = select(parent.c.id).where(parent.c.id == child.c[column])
    return select(func.count()).select_from(child).where(~known.exists())


_ORPHANS: Final = (
    ("{} jobs belong to no workload.", _orphans(schema.jobs, "workload_id", schema.workloads)),
    ("{} attempts belong to no job.", _orphans(schema.attempts, "job_id", schema.jobs)),
    ("{} allocations belong to no attempt.", _orphans(schema.allocations, "attempt_id", schema.attempts)),
)


def _log_gaps(connection: Connection) -> list[str]:
    seq = schema.events.c.seq
    first, last, count = connection.execute(select(func.min(seq), func.max(seq), func.count())).one()
    promised = connection.execute(select(schema.leadership.c.last_seq)).scalar_one()
    if (last or 0) != promised:
        return [f"The event log ends at {last or 0} and not at {promised}."]
    if count and count != last - first + 1:
        return [f"The event log has {count} events from {first} to {last}."]
    return []


def _state_of(dataset: DataSet) -> str:
    return _DELETED if dataset.deleted_ns else dataset.state.value


def _is_current(connection: Connection) -> bool:
    """Whether the schema is this version's. Raises: InvalidSetting when it is a later version's."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if version is not None and version > schema.HEAD:
        raise InvalidSetting(
            f"The database is of a later version of Tidemill (schema {version}, this one knows {schema.HEAD}).",
            field="database",
            mend="Upgrade Tidemill, or restore a backup made before the upgrade.",
        )
    return bool(version == schema.HEAD)


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Carry out the migrations that are missing up to that revision, inside the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.files("tidemill.store") / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
