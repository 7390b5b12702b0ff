"""Submitting work, asking for a quote, and what became of a workload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from tidemill.api.answers import quote_json, workload_json
from tidemill.api.bodies import body_of, checked, json_answer, json_object
from tidemill.api.guard import Call, Caller, Routes, blocking, durable
from tidemill.api.once import request_digest
from tidemill.api.refs import find_workload
from tidemill.api.shapes.common import NothingIn
from tidemill.api.shapes.work import BatchIn, QuoteOut, SubmitIn, WorkloadOut, WorkloadsOut
from tidemill.errors import InvalidSpec
from tidemill.model.ids import JobId, job_id
from tidemill.model.job import Job, Workload
from tidemill.model.spec import WorkloadSpec
from tidemill.model.tenant import Project, Scope
from tidemill.wire import read_request

routes = Routes("workloads")


@routes.post("/v1/workloads", allow=Scope.SUBMIT, status=201, body=SubmitIn, answer=WorkloadOut)
async def submit_workload(call: Caller) -> Response:
    """Submit a workload.

    With an Idempotency-Key, repeating the request gives the first answer again.
    """
    given, raw = await json_object(call.request)
    if len(given) != 1 or type(given.get("spec")) is not dict:
        checked(given, SubmitIn)
    project, specs = _read(call, [given["spec"]], given.get("project", ""), many=False)
    stored = await _submit(call, project, specs, b"one\0" + raw)
    return json_answer(_answer(call, stored[0], project), 201)


@routes.post("/v1/workloads:batch", allow=Scope.SUBMIT, status=201, body=BatchIn, answer=WorkloadsOut)
async def submit_batch(call: Caller) -> Response:
    """Submit up to 1000 workloads, all of them or none."""
    given, raw = await json_object(call.request)
    batch = checked(given, BatchIn)
    project, specs = await blocking(_read, call, batch.specs, batch.project, many=True)
    stored = await _submit(call, project, specs, b"many\0" + raw)
    answers = await blocking(lambda: [_answer(call, workload, project) for workload in stored])
    return json_answer({"items": answers}, 201)


@routes.post("/v1/quotes", allow=(Scope.SUBMIT, Scope.READ), body=SubmitIn, answer=QuoteOut)
async def quote(call: Caller) -> Response:
    """Say whether a workload would start now, where, and what it would cost. Nothing is submitted."""
    given = await body_of(call.request, SubmitIn)
    project, specs = _read(call, [given.spec], given.project, many=False)
    found = await blocking(call.plane.questions.quote, project, specs[0])
    visible = set(call.visible_projects())
    jobs = call.plane.world.jobs

    def is_visible(job: JobId) -> bool:
        return job in jobs and jobs[job].project_id in visible

    return json_answer(quote_json(found, visible=is_visible))


@routes.get("/v1/workloads/{reference}", allow=(Scope.READ, Scope.JOB), answer=WorkloadOut)
async def get_workload(call: Caller, reference: str, project: str = "") -> Response:
    """Get a workload by id, the beginning of one, or name, with its jobs."""
    return json_answer(await blocking(_whole, call, reference, project))


@routes.post("/v1/workloads/{reference}/stop", allow=Scope.SUBMIT, status=202, body=NothingIn, answer=WorkloadOut)
async def stop_workload(call: Caller, reference: str, project: str = "") -> Response:
    """Ask all jobs of a workload to end. Harmless to repeat.

    A service's name means both revisions while it is updated.
    """
    workload = await blocking(find_workload, call, reference, project)
    standing = call.plane.revisions.standing(workload) if reference == workload.spec.name else None
    of = [workload.id] if standing is None else [standing.rollout.workload_id, standing.rollout.before_id]
    jobs = [job for one in of for job in await blocking(call.plane.store.jobs_of, one)]
    await durable(call.plane.jobs.stop(call.identity, [job.id for job in jobs]))
    return json_answer(await blocking(_whole, call, workload.id, ""), 202)


def _whole(call: Call, reference: str, project: str) -> WorkloadOut:
    workload = find_workload(call, reference, project)
    jobs = call.plane.store.jobs_of(workload.id)
    return workload_json(workload, jobs, call.plane.world, project=call.project_name(workload.project_id))


def _read(call: Call, given: Sequence[Any], project: str, *, many: bool) -> tuple[Project, list[WorkloadSpec]]:
    """The project and the checked specs. Raises: InvalidSpec with every mistake in all of them."""
    specs: list[WorkloadSpec] = []
    problems: list[dict[str, Any]] = []
    named: set[str] = set()
    for index, one in enumerate(given):
        try:
            request = read_request(one)
            specs.append(request.to_model(_default_name(request.kind)))
            named.add(request.project or project)
        except InvalidSpec as error:
            found = error.data.get("errors") or [
                {"field": error.field, "value": error.value, "detail": error.detail, "mend": error.mend}
            ]
            if not many:
                raise
            problems += [{**problem, "field": f"specs.{index}.{problem['field']}"} for problem in found]
    if problems:
        first = problems[0]
        raise InvalidSpec(
            first["detail"], field=first["field"], value=first["value"], mend=first["mend"], errors=problems[:100]
        )
    if len(named) > 1:
        raise InvalidSpec(
            "The specs of a batch name several projects.", field="specs.project", value=sorted(named)[:10]
        )
    return call.project(next(iter(named), project)), specs


def _default_name(kind: object) -> str:
    return str(kind) if kind else "task"


async def _submit(call: Call, project: Project, specs: Sequence[WorkloadSpec], request: bytes) -> tuple[Workload, ...]:
    key = call.idempotency_key
    plane, identity = call.plane, call.identity
    if key or plane.acceptance.must_look(project, specs):
        digest = request_digest(request) if key else ""
        future = await blocking(plane.jobs.submit, identity, project, specs, idempotency_key=key, request_digest=digest)
    else:
        future = plane.jobs.submit(identity, project, specs)
    return await durable(future)


def _answer(call: Call, workload: Workload, project: Project) -> WorkloadOut:
    """The workload with its jobs as the world has them, which knows all that are not over."""
    world = call.plane.world
    jobs: list[Job] = []
    for index in range(min(workload.spec.job_count, 1_000)):
        job = world.jobs.get(job_id(workload.id, index))
        if job is None:
            jobs = list(call.plane.store.jobs_of(workload.id))
            break
        jobs.append(job)
    return workload_json(workload, jobs, world, project=project.name)
