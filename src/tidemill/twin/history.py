"""A recording as a stream: the same work at the same times, to be scheduled under other conditions.

What was decided is left out; what came from outside stays: submissions, stops, machines, quotas, reservations. How
long a job takes is read from its last attempt and from the checkpoints of those before. What runs or waits when the
recording begins arrives at once, with what was then left to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tidemill.control.recording import Beginning
from tidemill.errors import InvalidRequest
from tidemill.model import events
from tidemill.model.ids import JobId, LaunchId, WorkloadId, job_id
from tidemill.model.job import Cause, Workload
from tidemill.model.policy import Policy
from tidemill.model.spec import Kind
from tidemill.twin.arrivals import Arrival, Outside, Stream
from tidemill.twin.cloud import Conditions
from tidemill.twin.machines import FOREVER_NS
from tidemill.twin.recording import read_recording

_SIGNALLED: Final = 128
"""Exit statuses from here on are a signal's: a worker that was stopped."""
_FROM_OUTSIDE: Final = (
    events.StopRequested,
    events.NodeJoined,
    events.NodeWentAway,
    events.NodeMarked,
    events.DeviceFailed,
    events.DeviceRecovered,
    events.ProjectOpened,
    events.QueueSet,
    events.SiteSet,
    events.ReservationMade,
    events.ReservationCancelled,
)


@dataclass(slots=True)
class _Seen:
    """What is known of a job's work: done in attempts that are over, since when it runs, in all once it ended."""

    kept_ns: int = 0
    since_ns: int = 0
    saved_ns: int = 0
    total_ns: int = -1
    saves: bool = True
    """Whether it kept what it did when it was stopped; not known of one that never was, and then it does."""


@dataclass(slots=True)
class _Look:
    """What a recording tells of the work in it."""

    seen: dict[JobId, _Seen] = field(default_factory=dict)
    placed: dict[JobId, int] = field(default_factory=dict)
    delays_ns: list[int] = field(default_factory=list)
    end_ns: int = 0


def recorded_conditions(path: Path) -> Conditions:
    """The fleet, policy, prices and quotas with which a recording begins."""
    beginning = _beginning(path)
    delays = sorted(_look(path).delays_ns)
    return Conditions(
        nodes=beginning.snapshot.nodes,
        rates=beginning.rates,
        policy=beginning.policy,
        queues=beginning.snapshot.queues,
        projects=beginning.projects,
        sites=beginning.sites,
        start_ns=beginning.now,
        start_delay_ns=delays[len(delays) // 2] if delays else 0,
    )


def recorded_stream(path: Path) -> Stream:
    """All that came from outside, by time, with how long each job took. The file is read twice."""
    beginning = _beginning(path)
    found = _look(path)
    known: set[WorkloadId] = set()

    def arrival(workload: Workload, at_ns: int) -> Arrival:
        known.add(workload.id)
        jobs = [job_id(workload.id, index) for index in range(workload.spec.job_count)]
        durations = tuple(_takes(found.seen.get(one), workload, found.end_ns, beginning.policy) for one in jobs)
        return Arrival(
            at_ns,
            workload.project_id,
            workload.principal_id,
            workload.spec,
            durations[0],
            saves_on_stop=all(found.seen[one].saves for one in jobs if one in found.seen),
            name=workload.id,
            durations_ns=durations,
        )

    for workload in sorted(beginning.snapshot.workloads, key=lambda one: (one.submitted_ns, one.id)):
        yield arrival(workload, 0)
    for part in read_recording(path):
        if isinstance(part, Beginning):
            continue
        for fact in part.facts:
            if isinstance(fact, events.Submitted | events.RolloutBegan) and fact.workload.id not in known:
                yield arrival(fact.workload, part.now - beginning.now)
            elif isinstance(fact, _FROM_OUTSIDE):
                yield Outside(part.now - beginning.now, fact)


def _beginning(path: Path) -> Beginning:
    first = next(read_recording(path), None)
    if not isinstance(first, Beginning):
        raise InvalidRequest("The recording holds nothing.", field="--recorded", value=str(path))
    return first


def _look(path: Path) -> _Look:
    """What each job did, how long workers took to start, and when the recording ends."""
    found = _Look()
    for part in read_recording(path):
        found.end_ns = part.now
        if isinstance(part, Beginning):
            for attempt in part.snapshot.attempts:
                job = found.seen.setdefault(attempt.job_id, _Seen())
                job.since_ns = job.saved_ns = part.now if attempt.started_ns else 0
            continue
        for fact in part.facts:
            if isinstance(fact, events.Started | events.Exited | events.Checkpointed | events.Vanished):
                _happened(found, fact, part.now)
        for one in part.decided:
            if one.what.endswith(" is placed"):
                found.placed[one.job_id] = part.now
            elif one.what == "ends":
                found.placed.pop(one.job_id, None)
    return found


def _happened(
    found: _Look, fact: events.Started | events.Exited | events.Checkpointed | events.Vanished, now: int
) -> None:
    job_id = _job_of(fact.launch_id)
    job = found.seen.setdefault(job_id, _Seen())
    if isinstance(fact, events.Started):
        job.since_ns = job.saved_ns = now
        if job_id in found.placed:
            found.delays_ns.append(now - found.placed[job_id])
    elif isinstance(fact, events.Checkpointed):
        job.saved_ns = max(job.saved_ns, fact.at_ns)
    elif job.since_ns and isinstance(fact, events.Exited) and fact.cause is Cause.NONE and fact.exit_code < _SIGNALLED:
        job.total_ns = job.kept_ns + now - job.since_ns
    elif job.since_ns:
        job.saves = job.saves and job.saved_ns > job.since_ns
        job.kept_ns += job.saved_ns - job.since_ns
        job.since_ns = 0


def _takes(seen: _Seen | None, workload: Workload, end_ns: int, policy: Policy) -> int:
    """How long a job runs; one that did not end by itself goes on as long as its spec, or else the policy, expects."""
    spec = workload.spec
    if seen is not None and seen.total_ns >= 0:
        return seen.total_ns
    if spec.kind in (Kind.SERVICE, Kind.DEV):
        return FOREVER_NS
    so_far = seen.kept_ns + (end_ns - seen.since_ns if seen.since_ns else 0) if seen is not None else 0
    return max(so_far, spec.expected_duration_ns or spec.max_duration_ns or policy.assumed_duration_ns)


def _job_of(launch_id: LaunchId) -> JobId:
    return JobId(f"job_{launch_id.partition('_')[2].rsplit('-', 2)[0]}")
