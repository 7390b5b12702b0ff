"""Histories of a store: steps, of which chance can make many, carried out on it and on a model, and compared.

``testing.strategies.histories`` makes them. The model is too simple to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from tidemill.errors import Fenced, TidemillError
from tidemill.model.events import LogEntry
from tidemill.model.ids import (
    JobId,
    PrincipalId,
)
from tidemill.model.job import (
    Allocation,
    Attempt,
    Job,
    JobState,
    Workload,
)
from tidemill.model.ledger import CPU_METER, LedgerLine
from tidemill.model.plan import Change, Reason, Waiting
from tidemill.model.values import replace
from tidemill.ports import Batch, JobFilter, JobRow, Store
from tidemill.testing.samples import (
    BLUE,
    RED,
    a_job,
    a_line,
    a_note,
    a_reason,
    a_record,
    a_workload,
    an_allocation,
    an_attempt,
    holds,
    new,
    same,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One commit of a history. Jobs are named by number, modulo how many there are when the step comes.

    ``submit`` inserts a workload of so many jobs; ``place`` gives jobs an attempt with an allocation; ``move``
    brings a job to the state of that number; ``wait`` gives it the reason of that number; ``meter`` adds
    a ledger line to the meter of that number, that many ns long. What makes a commit fail: ``lag``, how far the
    versions assumed are behind; ``repeat``, inserting a workload again; ``old_epoch``; a ``key`` that was used; a
    line in ``rebook`` that begins where the last one did and ends so much later. ``lead`` and ``reopen`` come
    before the commit.
    """

    submit: int = 0
    place: tuple[int, ...] = ()
    move: tuple[tuple[int, int], ...] = ()
    wait: tuple[tuple[int, int], ...] = ()
    meter: tuple[tuple[int, int], ...] = ()
    rebook: tuple[tuple[int, int], ...] = ()
    notes: int = 0
    key: int | None = None
    lag: int = 0
    repeat: bool = False
    old_epoch: bool = False
    lead: bool = False
    reopen: bool = False


def check_history(open_store: Callable[[], Store], steps: Sequence[Step]) -> None:
    """Nothing, when the store did at every step what the model did. Raises: AssertionError that says where not."""
    store, model = open_store(), _Model()
    store.migrate()
    try:
        model.epoch = store.lead(holder="history")
        for number, step in enumerate(steps):
            if step.reopen:
                store.close()
                store = open_store()
            if step.lead:
                epoch = store.lead(holder=f"history {number}")
                holds(epoch > model.epoch, "epochs grow")
                model.epoch = epoch
            batch = model.batch(step)
            where = f"step {number} of {len(steps)}, {step}"
            same(_outcome(store, batch), model.commit(batch), where)
            model.compare(store, where)
        model.compare_lists(store)
        same(store.integrity(), (), "the store is sound")
    finally:
        store.close()


class _Model:
    """A store that is too simple to be wrong: dictionaries, copied whole for each commit."""

    def __init__(self) -> None:
        self.epoch = 0
        self.things: dict[str, Any] = {}
        self.reasons: dict[str, Reason] = {}
        self.events: list[LogEntry] = []
        self.lines: dict[str, LedgerLine] = {}
        self.keys: set[str] = set()
        self._numbers = count(1)

    def batch(self, step: Step) -> Batch:
        """The commit that a step means, now."""
        changes: list[Change] = []
        if step.submit:
            workload = a_workload(next(self._numbers), project=(RED, BLUE)[step.submit % 2])
            changes += new(workload, *(a_job(workload, index) for index in range(step.submit)))
        if step.repeat and (known := self._of(Workload)):
            changes += new(known[-1])
        jobs, touched = self._of(Job), set[JobId]()
        for number, state in step.move if jobs else ():
            job = jobs[number % len(jobs)]
            if job.id not in touched:
                touched.add(job.id)
                after = replace(job, version=job.version + 1, state=list(JobState)[state % len(JobState)])
                changes.append(Change(assumed=job.version - step.lag, after=after))
        for number in set(step.place) if jobs else ():
            job = jobs[number % len(jobs)]
            attempt = an_attempt(job, 1 + sum(known.job_id == job.id for known in self._of(Attempt)))
            if all(change.after.id != attempt.id for change in changes):
                changes += new(attempt, an_allocation(attempt))
        return Batch(
            epoch=self.epoch - step.old_epoch,
            changes=changes,
            log=[a_note(jobs[number % len(jobs)] if jobs else None, f"N{number}") for number in range(step.notes)],
            ledger=self._lines(step, jobs),
            waiting=[
                Waiting(job_id=jobs[number % len(jobs)].id, reason=a_reason(f"R{code}"))
                for number, code in (step.wait if jobs else ())
            ],
            idempotency=[] if step.key is None else [a_record(str(step.key))],
        )

    def _lines(self, step: Step, jobs: Sequence[Job]) -> list[LedgerLine]:
        found, ends = [], dict(self._marks())
        for meter, length in step.meter:
            key = (f"node_{meter}", CPU_METER)
            start = ends.get(key, 0)
            ends[key] = start + length
            job = jobs[meter % len(jobs)] if jobs and length % 2 else None
            found.append(a_line(start, start + length, node=key[0], job=job, milli=10**6, amount_micro=10**15 + length))
        stored = list(self.lines.values())
        for number, longer in step.rebook if stored else ():
            line = stored[number % len(stored)]
            found.append(replace(line, usage=replace(line.usage, to_ns=line.usage.to_ns + longer)))
        return found

    def commit(self, batch: Batch) -> int | str:
        """The newest event's number, or the name of the error."""
        things, reasons, lines = dict(self.things), dict(self.reasons), dict(self.lines)
        if batch.epoch != self.epoch:
            return "Deposed"
        for change in batch.changes:
            known = things.get(change.after.id)
            if (None if known is None else getattr(known, "version", None)) != change.assumed or (
                known is not None and change.assumed is None
            ):
                return "Stale"
            things[change.after.id] = change.after
            if isinstance(change.after, Job) and change.after.state is not JobState.QUEUED:
                reasons.pop(change.after.id, None)
        for line in batch.ledger:
            if lines.setdefault(line.id, line).usage.to_ns != line.usage.to_ns:
                return "Stale"
        keys = {record.key for record in batch.idempotency}
        if keys & self.keys:
            return "Stale"
        for waiting in batch.waiting:
            job = things.get(waiting.job_id)
            if job is not None and job.state is JobState.QUEUED:
                reasons[waiting.job_id] = waiting.reason
        self.things, self.reasons, self.lines = things, reasons, lines
        self.events = [*self.events, *batch.log]
        self.keys |= keys
        return len(self.events)

    def compare(self, store: Store, where: str) -> None:
        """Raises: AssertionError when the store's snapshot is another."""
        over = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
        jobs = {job for job in self._of(Job) if job.state not in over}
        owners = {job.workload_id for job in jobs}
        found = store.load()
        same(set(found.jobs), jobs, f"jobs after {where}")
        same(set(found.workloads), {it for it in self._of(Workload) if it.id in owners}, f"workloads after {where}")
        same(set(found.attempts), set(self._of(Attempt)), f"attempts after {where}")
        same(set(found.allocations), set(self._of(Allocation)), f"allocations after {where}")
        same({it.job_id: it.reason for it in found.reasons}, self.reasons, f"reasons after {where}")
        same({(node, meter): until for node, meter, until in found.metered_until}, self._marks(), f"marks, {where}")
        same(found.last_seq, len(self.events), f"the newest event after {where}")

    def compare_lists(self, store: Store) -> None:
        """Raises: AssertionError when what the store lists is not what it was given."""
        events = store.events(limit=len(self.events) + 1)
        same([(event.seq, event.entry) for event in events], list(enumerate(self.events, 1)), "the log")
        for project in (RED, BLUE):
            rows: list[JobRow] = []
            cursor = ""
            while True:
                page = store.find_jobs(JobFilter(project_ids=(project,)), cursor=cursor, limit=2)
                rows += page.items
                if not (cursor := page.next_cursor):
                    break
            jobs = [job for job in self._of(Job) if job.project_id == project]
            jobs.sort(key=lambda job: (job.submitted_ns, job.index), reverse=True)
            same([row.job for row in rows], jobs, f"jobs of {project}")
            same([row.reason for row in rows], [self.reasons.get(job.id) for job in jobs], "their reasons")
            same([row.workload for row in rows], [self.things[job.workload_id] for job in jobs], "their workloads")
            lines = [line for line in self.lines.values() if line.usage.project_id == project]
            totals = store.ledger_totals(project_id=project)
            same(totals.amount_micro, sum(line.amount_micro for line in lines), f"what {project} pays")
            held = sum(line.usage.milli * (line.usage.to_ns - line.usage.from_ns) for line in lines)
            same(sum(one for _, one in totals.held_milli_ns), held, f"what {project} held")
        same(set(store.ledger(limit=len(self.lines) + 1).items), set(self.lines.values()), "the ledger")
        for key in map(str, range(5)):
            same(store.idempotent(PrincipalId("usr_test"), key) is not None, key in self.keys, f"key {key}")

    def _of(self, kind: type[Any]) -> list[Any]:
        return [thing for thing in self.things.values() if isinstance(thing, kind)]

    def _marks(self) -> dict[tuple[str, str], int]:
        ends: dict[tuple[str, str], int] = {}
        for line in self.lines.values():
            key = (line.usage.node_id, line.usage.meter)
            ends[key] = max(ends.get(key, 0), line.usage.to_ns)
        return ends


def _outcome(store: Store, batch: Batch) -> int | str:
    try:
        return store.commit(batch)
    except TidemillError as error:
        return "Deposed" if isinstance(error, Fenced) else type(error).__name__
