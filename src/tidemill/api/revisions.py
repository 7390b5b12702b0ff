"""Services that are updated: their revisions, and the rollout from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from tidemill.api.answers import workload_json
from tidemill.api.bodies import body_of, checked, json_answer, json_object
from tidemill.api.guard import Call, Caller, Routes, blocking, durable
from tidemill.api.once import request_digest
from tidemill.api.refs import find_workload
from tidemill.api.shapes.common import NothingIn
from tidemill.api.shapes.work import PromoteIn, RevisionOut, RevisionsOut, RollbackIn, RolloutOut, UpdateIn, WorkloadOut
from tidemill.control.revisions import Revision, Standing
from tidemill.errors import InvalidSpec
from tidemill.model.job import Workload
from tidemill.model.rollout import RolloutState
from tidemill.model.spec import WorkloadSpec
from tidemill.model.tenant import Scope
from tidemill.wire import read_request
from tidemill.wire.writing import spec_to_json

routes = Routes("workloads")


@routes.post("/v1/workloads/{reference}/update", allow=Scope.SUBMIT, status=201, body=UpdateIn, answer=WorkloadOut)
async def update_service(call: Caller, reference: str, project: str = "") -> Response:
    """Update a service that runs: replicas of the new spec take the place of the old ones, and no request fails.

    With an Idempotency-Key, repeating the request gives the first answer again.
    """
    given, raw = await json_object(call.request)
    asked = checked(given, UpdateIn)
    before = await blocking(find_workload, call, reference, asked.project or project)
    request = read_request(asked.spec)
    spec = request.to_model(before.spec.name)
    if request.project and call.project(request.project).id != before.project_id:
        raise InvalidSpec("A service stays in its project.", field="project", value=request.project)
    made = await blocking(_update, call, before, spec, b"update\0" + raw, restarts=asked.restart)
    return json_answer(await blocking(_whole, call, made), 201)


@routes.get("/v1/workloads/{reference}/revisions", allow=Scope.READ, answer=RevisionsOut)
async def list_revisions(call: Caller, reference: str, project: str = "") -> Response:
    """List the revisions of a service, newest first, with the rollout that is under way."""
    return json_answer(await blocking(_listed, call, reference, project))


@routes.post("/v1/workloads/{reference}/promote", allow=Scope.SUBMIT, status=202, body=PromoteIn, answer=RevisionsOut)
async def promote_revision(call: Caller, reference: str, project: str = "") -> Response:
    """Go on to the next step of a canary, or with `all` to the whole service."""
    given = await body_of(call.request, PromoteIn)
    workload = await blocking(find_workload, call, reference, project)
    await durable(call.plane.revisions.promote(call.identity, workload, to_all=given.all))
    return json_answer(await blocking(_listed, call, workload.id, ""), 202)


@routes.post("/v1/workloads/{reference}/abort", allow=Scope.SUBMIT, status=202, body=NothingIn, answer=RevisionsOut)
async def abort_rollout(call: Caller, reference: str, project: str = "") -> Response:
    """Abort the rollout of a service: the revision before takes its place again."""
    workload = await blocking(find_workload, call, reference, project)
    await durable(call.plane.revisions.abort(call.identity, workload))
    return json_answer(await blocking(_listed, call, workload.id, ""), 202)


@routes.post("/v1/workloads/{reference}/rollback", allow=Scope.SUBMIT, status=202, body=RollbackIn, answer=RevisionsOut)
async def roll_back(call: Caller, reference: str, project: str = "") -> Response:
    """Go back to an earlier revision of a service, without a canary; what is being rolled out is aborted."""
    given, raw = await json_object(call.request)
    asked = checked(given, RollbackIn)
    workload = await blocking(find_workload, call, reference, project)
    plane = call.plane
    if plane.revisions.standing(workload) is not None and not asked.revision:
        await durable(plane.revisions.abort(call.identity, workload))
        return json_answer(await blocking(_listed, call, workload.id, ""), 202)
    number, spec = await blocking(plane.revisions.spec_of, workload, asked.revision)
    made = await blocking(_update, call, workload, spec, b"rollback\0" + raw, back_to=number)
    return json_answer(await blocking(_listed, call, made.id, ""), 202)


def _update(
    call: Call, before: Workload, spec: WorkloadSpec, request: bytes, *, restarts: bool = False, back_to: int = 0
) -> Workload:
    key = call.idempotency_key
    return call.plane.revisions.update(
        call.identity,
        call.project(before.project_id),
        before,
        spec,
        restarts=restarts,
        back_to=back_to,
        idempotency_key=key,
        request_digest=request_digest(before.id.encode() + request) if key else "",
    )


def _whole(call: Call, workload: Workload) -> WorkloadOut:
    jobs = call.plane.store.jobs_of(workload.id)
    return workload_json(workload, jobs, call.plane.world, project=call.project_name(workload.project_id))


def _listed(call: Call, reference: str, project: str) -> RevisionsOut:
    workload = find_workload(call, reference, project)
    known, standing = call.plane.revisions.listing(workload)
    found = [_revision_json(one, _state_of(one, standing, known)) for one in reversed(known)]
    rollout = _rollout_json(standing) if standing is not None else None
    return {"name": workload.spec.name, "items": found, "rollout": rollout}


def _revision_json(revision: Revision, state: str) -> RevisionOut:
    rollout, workload = revision.rollout, revision.workload
    return {
        "revision": revision.number,
        "workload": workload.id,
        "state": state,
        "submitted_ns": workload.submitted_ns,
        "ready": revision.ready,
        "weight": revision.weight,
        "back_to": rollout.back_to if rollout is not None else 0,
        "by": rollout.by if rollout is not None else "",
        "detail": rollout.detail if rollout is not None else "",
        "spec": spec_to_json(workload.spec),
    }


def _state_of(revision: Revision, standing: Standing | None, known: Sequence[Revision]) -> str:
    """``running``, ``coming``, ``going``, ``replaced``, ``taken back`` or ``stopped``."""
    if revision.is_live:
        if standing is None:
            return "running"
        is_new = revision.workload.id == standing.rollout.workload_id
        return "going" if is_new == (standing.rollout.state is RolloutState.RETURNING) else "coming"
    if revision.rollout is not None and revision.rollout.state is RolloutState.REVERTED:
        return "taken back"
    later = (one.rollout for one in known if one.rollout is not None)
    is_replaced = any((one.before_id, one.state) == (revision.workload.id, RolloutState.COMPLETE) for one in later)
    return "replaced" if is_replaced else "stopped"


def _rollout_json(standing: Standing) -> RolloutOut:
    rollout, rolling, seen = standing.rollout, standing.rolling, standing.seen
    steps = rolling.steps
    answers: dict[str, Any] = {}
    if seen is not None:
        answers = {
            name: {"requests": one.requests, "errors": one.errors, "slow_ns": one.slow_ns}
            for name, one in (("old", seen.old_answers), ("new", seen.new_answers))
        }
    return {
        "state": rollout.state.value,
        "revision": rollout.revision,
        "before": rollout.before_revision,
        "step": rollout.step,
        "steps": [{"weight": step.weight, "for_ns": step.hold_ns} for step in steps],
        "began_ns": rollout.began_ns,
        "watched_ns": rollout.watched_ns,
        "needed": seen.needed if seen is not None else 0,
        "ready_old": seen.old.ready if seen is not None else 0,
        "ready_new": seen.new.ready if seen is not None else 0,
        "answers": answers,
        "detail": rollout.detail,
        "by": rollout.by,
    }
