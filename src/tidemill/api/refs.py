"""What a reference means: an id, the beginning of one that is unique, or a workload's name (its newest, or the
revision of a service that runs).

What another organization or project has is not there. Everything here asks the store and may wait for it.
"""

from __future__ import annotations

import re
from typing import Final

from tidemill.api.guard import Call, missing
from tidemill.errors import Conflict, Forbidden
from tidemill.model.ids import JobId, LaunchId, ProjectId, WorkloadId
from tidemill.model.job import Workload
from tidemill.model.tenant import Scope
from tidemill.ports import JobFilter, JobRow

_JOB: Final = re.compile(r"job_[0-9a-z]{1,40}(-[0-9]{1,6})?", re.ASCII)
_WORKLOAD: Final = re.compile(r"wl_[0-9a-z]{1,40}", re.ASCII)
_WHOLE: Final = 18
_SHORTEST: Final = 6
_SEARCHED: Final = 200


def find_job(call: Call, reference: str, project: str = "") -> JobRow:
    """Raises: NotFound, Conflict when the beginning of an id is not unique, Forbidden for another's job token."""
    row = _job(call, reference, project)
    _own_launch(call, row.job.id, row.workload.id)
    return row


def find_workload(call: Call, reference: str, project: str = "") -> Workload:
    """Raises: as ``find_job``."""
    workload = _workload(call, reference, project)
    if workload is None:
        raise missing("workload", reference)
    _own_launch(call, JobId(""), workload.id)
    return workload


def job_of_launch(launch: LaunchId) -> tuple[JobId, int, int]:
    """The job, attempt number and rank that a launch's id is made of."""
    whole, attempt, rank = launch.rpartition("_")[2].rsplit("-", 2)
    return JobId(f"job_{whole}"), int(attempt), int(rank)


def _own_launch(call: Call, job: JobId, workload: WorkloadId) -> None:
    identity = call.identity
    if not identity.launch_id or not identity.allows(Scope.JOB):
        return
    own, _, _ = job_of_launch(identity.launch_id)
    if (job and job != own) or workload.partition("_")[2] != own.partition("_")[2].rpartition("-")[0]:
        raise Forbidden("This token is for one job only.", field="job", value=job or workload)


def _job(call: Call, reference: str, project: str) -> JobRow:
    store = call.plane.store
    if _JOB.fullmatch(reference):
        row = store.job(JobId(reference))
        if row is None and len(reference) >= len("job_") + _SHORTEST:
            row = _by_beginning(call, reference, project)
        if row is not None and _may_see(call, row.workload):
            return row
        raise missing("job", reference)
    workload = _workload(call, reference, project)
    if workload is not None:
        first = next(iter(store.jobs_of(workload.id)), None)
        row = store.job(first.id) if first is not None else None
        if row is not None:
            return row
    raise missing("job", reference)


def _workload(call: Call, reference: str, project: str) -> Workload | None:
    store = call.plane.store
    if _WORKLOAD.fullmatch(reference):
        workload = store.workload(WorkloadId(reference))
        if workload is None and _SHORTEST + len("wl_") <= len(reference) < len("wl_") + _WHOLE:
            row = _by_beginning(call, "job_" + reference.partition("_")[2], project, whole_workload=True)
            workload = row.workload if row is not None else None
        return workload if workload is not None and _may_see(call, workload) else None
    if not reference or "\0" in reference or len(reference) > 63:
        return None
    for row in _newest(call, project, name=reference):
        if row.workload.spec.name == reference and _may_see(call, row.workload):
            return _live(call, row.workload)
    return None


def _live(call: Call, newest: Workload) -> Workload:
    """The revision of a service that runs, where the newest was taken back; else the newest."""
    world, spec = call.plane.world, newest.spec
    if spec.service is None or newest.id in world.live_jobs:
        return newest
    found = (world.workloads.get(one) for one in world.services.copy())
    same = [one for one in found if one and (one.project_id, one.spec.name) == (newest.project_id, spec.name)]
    return max(same, key=lambda one: (one.submitted_ns, one.id), default=newest)


def _by_beginning(call: Call, beginning: str, project: str, *, whole_workload: bool = False) -> JobRow | None:
    found: dict[str, JobRow] = {}
    for row in _newest(call, project, id_prefix=beginning):
        if row.job.id.startswith(beginning) and _may_see(call, row.workload):
            found.setdefault(row.workload.id if whole_workload else row.job.id, row)
            if len(found) > 1:
                names = " and ".join(sorted(found))
                raise Conflict(
                    f"{beginning} is the beginning of several ids.",
                    field="id",
                    value=beginning,
                    mend=f"Such as {names}.",
                )
    return next(iter(found.values()), None)


def _newest(call: Call, project: str, *, name: str = "", id_prefix: str = "") -> tuple[JobRow, ...]:
    visible = call.visible_projects(project)
    if not visible:
        return ()
    where = JobFilter(project_ids=visible, name=name, id_prefix=id_prefix)
    return call.plane.store.find_jobs(where, limit=_SEARCHED).items


def _may_see(call: Call, workload: Workload) -> bool:
    identity = call.identity
    return workload.organization_id == identity.organization_id and identity.may_see(ProjectId(workload.project_id))
