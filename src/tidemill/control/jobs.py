"""Work as it is submitted and stopped: each request takes effect once, however often it comes.

Before a cloud goes down all its work is ended at once, and none is taken meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Final

import msgspec

from tidemill.control.acceptance import Acceptance
from tidemill.control.identity import Identity, administer
from tidemill.control.turns import TurnLoop
from tidemill.errors import IdempotencyMismatch, Unavailable
from tidemill.model.events import Fact, StopRequested, Submitted
from tidemill.model.ids import JobId, WorkloadId, sortable_id
from tidemill.model.job import Job, Workload
from tidemill.model.spec import WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.ports import IdempotencyRecord, Store
from tidemill.units import SECOND_NS

RECORDED_RESPONSE: Final = msgspec.json.Decoder(list[str])
_NO_NEW_NS: Final = 15 * SECOND_NS
"""How long no work is taken after all of it was last asked to end: who ends a cloud asks again before that."""


class Jobs:
    """Takes submissions and stops. Thread-safe. ``entropy`` is told how many bytes to give, of which ids are made."""

    def __init__(
        self,
        store: Store,
        turns: TurnLoop,
        acceptance: Acceptance,
        *,
        clock: Callable[[], int],
        entropy: Callable[[int], bytes],
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._store = store
        self._turns = turns
        self._acceptance = acceptance
        self._clock = clock
        self._entropy = entropy
        self._monotonic = monotonic
        self._no_new_until_ns = 0
        self._in_flight: dict[tuple[str, str], tuple[str, Future[tuple[Workload, ...]]]] = {}
        self._lock = threading.Lock()

    def submit(
        self,
        identity: Identity,
        project: Project,
        specs: Sequence[WorkloadSpec],
        *,
        idempotency_key: str = "",
        request_digest: str = "",
        as_fact: Callable[[Workload], Fact] | None = None,
    ) -> Future[tuple[Workload, ...]]:
        """The stored workloads, all or none, when they are durable. ``as_fact`` tells what each of them is.

        Raises, from the call: Infeasible, InvalidSpec, IdempotencyMismatch. Through the future: Unavailable, …
        """
        if not idempotency_key:
            return self._submit(identity, project, specs, Future(), as_fact=as_fact)
        answer: Future[tuple[Workload, ...]] = Future()
        key = (str(identity.principal_id), idempotency_key)
        with self._lock:  # whoever comes while this one is on its way gets the same answer
            if key in self._in_flight:
                return self._same(self._in_flight[key], idempotency_key, request_digest)
            self._in_flight[key] = (request_digest, answer)
        answer.add_done_callback(lambda _: self._landed(key))
        try:
            known = self.recorded(identity, idempotency_key, request_digest)
            if known is not None:
                answer.set_result(known)
                return answer
            record = IdempotencyRecord(
                principal_id=identity.principal_id,
                key=idempotency_key,
                request_digest=request_digest,
                response="",
                created_ns=self._clock(),
            )
            return self._submit(identity, project, specs, answer, record, as_fact=as_fact)
        except Exception as error:
            answer.set_exception(error)
            raise

    def recorded(self, identity: Identity, key: str, digest: str) -> tuple[Workload, ...] | None:
        """What was stored for that key before; None when nothing was. Raises: IdempotencyMismatch."""
        record = self._store.idempotent(identity.principal_id, key)
        if record is None:
            return None
        if record.request_digest != digest:
            raise _mismatch(key)
        stored = [self._store.workload(WorkloadId(one)) for one in RECORDED_RESPONSE.decode(record.response)]
        return tuple(workload for workload in stored if workload is not None)

    def stop(self, identity: Identity, job_ids: Sequence[JobId]) -> Future[None]:
        """Nothing, when it is recorded that these jobs are to end."""
        now = self._clock()
        return self._turns.put([StopRequested(at_ns=now, job_id=job, by=identity.name) for job in job_ids])

    def end_all(self, identity: Identity) -> tuple[Job, ...]:
        """The jobs that are not over, now that all of them were asked to end in one turn; blocks until it is stored.

        What waits is over with that turn, so that nothing of it takes the room of what ends. No work is taken until
        some time after this was last asked, which is to be asked again until nothing is left: what was on its way when
        it was asked first is ended then. Raises: Forbidden, Unavailable, …
        """
        administer(identity)
        self._no_new_until_ns = self._monotonic() + _NO_NEW_NS
        live = self._turns.look(lambda world: [job.id for job in world.jobs.values() if not job.stop_requested])
        if live:
            self.stop(identity, live).result()
        return tuple(self._turns.world.jobs.copy().values())

    def _submit(
        self,
        identity: Identity,
        project: Project,
        specs: Sequence[WorkloadSpec],
        answer: Future[tuple[Workload, ...]],
        record: IdempotencyRecord | None = None,
        *,
        as_fact: Callable[[Workload], Fact] | None = None,
    ) -> Future[tuple[Workload, ...]]:
        """``answer``, which is given when the workloads, and ``record`` with their ids, are durable."""
        if self._monotonic() < self._no_new_until_ns:
            raise Unavailable("The cloud is going down, and takes no work.", mend="Submit it once it is up again.")
        now = self._clock()
        specs = [self._acceptance.check(spec, project, now=now) for spec in specs]
        self._acceptance.check_groups(specs, project, now=now)
        self._acceptance.check_room(project, sum(spec.job_count for spec in specs))
        entropy = self._entropy(5 * len(specs))
        ids = [
            WorkloadId(sortable_id("wl", now=now, entropy=int.from_bytes(entropy[at : at + 5], "big")))
            for at in range(0, len(entropy), 5)
        ]
        if any(spec.after for spec in specs):
            specs = self._acceptance.follow(specs, ids, project)
        workloads = tuple(
            Workload(
                id=own_id,
                organization_id=project.organization_id,
                project_id=project.id,
                principal_id=identity.principal_id,
                spec=spec,
                submitted_ns=now,
            )
            for own_id, spec in zip(ids, specs, strict=True)
        )

        def done(stored: Future[None]) -> None:
            if (error := stored.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(workloads)

        records = []
        if record is not None:
            records.append(replace(record, response=msgspec.json.encode(ids).decode()))
        as_fact = as_fact or (lambda workload: Submitted(at_ns=now, workload=workload))
        facts = [as_fact(workload) for workload in workloads]
        self._turns.put(facts, records).add_done_callback(done)
        return answer

    def _landed(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._in_flight.pop(key, None)

    @staticmethod
    def _same(flying: tuple[str, Future[tuple[Workload, ...]]], key: str, digest: str) -> Future[tuple[Workload, ...]]:
        if flying[0] != digest:
            raise _mismatch(key)
        return flying[1]


def _mismatch(key: str) -> IdempotencyMismatch:
    return IdempotencyMismatch(
        "This Idempotency-Key came with another request before.",
        field="Idempotency-Key",
        value=key,
        mend="Use a new key for a new request.",
    )
