"""Identifiers as distinct types; ids of parts are derived from the id of the whole.

A workload's id is made once, from a time and entropy that the caller gives, and sorts by time. The ids of
its jobs, attempts and launches follow from it, so the pure core can name what it creates without dice, and
a command repeated after a crash names the same thing.
"""

from __future__ import annotations

from typing import Final, NewType

OrganizationId = NewType("OrganizationId", str)
ProjectId = NewType("ProjectId", str)
PrincipalId = NewType("PrincipalId", str)
TokenId = NewType("TokenId", str)
SiteId = NewType("SiteId", str)
OutpostId = NewType("OutpostId", str)
ReplicaId = NewType("ReplicaId", str)
NodeId = NewType("NodeId", str)
DeviceId = NewType("DeviceId", str)
WorkloadId = NewType("WorkloadId", str)
JobId = NewType("JobId", str)
AttemptId = NewType("AttemptId", str)
LaunchId = NewType("LaunchId", str)
"""One worker of one attempt: the idempotency key of starting it."""
ArtifactId = NewType("ArtifactId", str)
VolumeId = NewType("VolumeId", str)
DataSetId = NewType("DataSetId", str)
ModelId = NewType("ModelId", str)
ModelVersionId = NewType("ModelVersionId", str)
QueueId = NewType("QueueId", str)
ReservationId = NewType("ReservationId", str)
RentalId = NewType("RentalId", str)
RolloutId = NewType("RolloutId", str)
"""One instance rented from a cloud: the client token of renting it."""

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"


def sortable_id(prefix: str, *, now: int, entropy: int) -> str:
    """``prefix_`` and 18 characters that sort by time: 48 bits of milliseconds, then 40 bits of entropy.

    ``now`` is in ns. Source: the layout of ULID, shortened.
    """
    number = ((now // 1_000_000) & (2**48 - 1)) << 42 | (entropy & (2**40 - 1)) << 2
    return f"{prefix}_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(85, -1, -5))


def rollout_id(workload: WorkloadId) -> RolloutId:
    """The id of the rollout that leads to a workload."""
    return RolloutId(f"rol_{workload.partition('_')[2]}")


def job_id(workload: WorkloadId, index: int) -> JobId:
    """The id of a workload's job number ``index``."""
    return JobId(f"job_{workload.partition('_')[2]}-{index}")


def attempt_id(job: JobId, number: int) -> AttemptId:
    """The id of a job's attempt ``number``, counted from 1."""
    return AttemptId(f"att_{job.partition('_')[2]}-{number}")


def launch_id(attempt: AttemptId, rank: int) -> LaunchId:
    """The id of the launch of worker ``rank`` of an attempt."""
    return LaunchId(f"run_{attempt.partition('_')[2]}-{rank}")


def job_of_launch(launch: LaunchId) -> JobId:
    """The id of the job that a launch's id is made of; whatever the id looks like."""
    return JobId(f"job_{launch.partition('_')[2].rsplit('-', 2)[0]}")


def queue_id(project: ProjectId) -> QueueId:
    """The id of a project's own queue."""
    return QueueId(f"que_{project.partition('_')[2] or project}")


def job_number(job: JobId) -> int:
    """A job's id as a number below 2^63, for programs that calculate with the numbers of other systems' jobs.

    Jobs of an array have numbers that follow each other. Two jobs have the same with the odds of their random parts.
    """
    text, _, index = job.partition("_")[2].rpartition("-")
    number = 0
    for letter in text:
        number = number << 5 | max(_ALPHABET.find(letter), 0)
    # 44 bits of milliseconds reach the year 2527; 18 bits of entropy remain
    return (number >> 24 & (2**62 - 1)) + (int(index) if index.isdecimal() else 0)
