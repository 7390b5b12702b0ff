"""Jobs: lists, one with all that is known of it, why, its receipt, its logs and outputs."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Header, Query
from starlette.responses import Response

from tidemill.api.answers import (
    TERMINAL,
    endpoint_of,
    forecast_json,
    holding_json,
    job_json,
    reason_json,
    replicas_json,
    site_option_json,
    whole_job_json,
)
from tidemill.api.bodies import json_answer, json_object
from tidemill.api.follow import Streamed, event_stream, in_threads
from tidemill.api.guard import Call, Caller, Routes, blocking, durable, missing
from tidemill.api.joblogs import Seen, Wanted, follow_logs, follow_octets, parse_position, start_at
from tidemill.api.refs import find_job, find_workload
from tidemill.api.shapes.common import NothingIn, PageOf
from tidemill.api.shapes.work import JobOut, LiveJobOut, LiveJobsOut, ReceiptOut, WhyOut
from tidemill.control.blobs import walk
from tidemill.errors import Conflict, InvalidRequest, NotFound
from tidemill.model.ids import JobId, WorkloadId
from tidemill.model.job import Job, JobState
from tidemill.model.spec import Kind
from tidemill.model.tenant import Scope
from tidemill.ports import JobFilter, JobRow
from tidemill.wire.requests import CheckpointedIn, StopAllIn, read_body

routes = Routes("jobs")
Limit = Annotated[int, Query(ge=1, le=1_000, description="How many at most.")]
Cursor = Annotated[str, Query(max_length=500, description="`next_cursor` of the page before.")]
ProjectName = Annotated[str, Query(max_length=100, description="Project, by name or id.")]
_NUMBER_LIMIT: Final = 10**6
_SHOWN: Final = 10


@routes.get("/v1/jobs", allow=Scope.READ, answer=PageOf[JobOut])
async def list_jobs(
    call: Caller,
    state: Annotated[str, Query(max_length=200, description="States, separated by commas.")] = "",
    kind: Annotated[str, Query(max_length=200, description="Kinds, separated by commas.")] = "",
    project: ProjectName = "",
    name: Annotated[str, Query(max_length=63, description="The workload's name.")] = "",
    workload: Annotated[str, Query(max_length=100, description="The workload, by id or name.")] = "",
    cursor: Cursor = "",
    limit: Limit = 50,
) -> Response:
    """List jobs, newest first."""
    states = tuple(_choice(JobState, word, "state") for word in _words(state))
    kinds = tuple(_choice(Kind, word, "kind") for word in _words(kind))

    def page() -> dict[str, Any]:
        visible = call.visible_projects(project)
        if not visible:
            return {"items": [], "next_cursor": ""}
        where = JobFilter(
            project_ids=visible,
            states=states,
            kinds=kinds,
            name=_plain(name, "name"),
            workload_id=find_workload(call, workload, project).id if workload else WorkloadId(""),
        )
        found = call.plane.store.find_jobs(where, cursor=_plain(cursor, "cursor"), limit=limit)
        names = {one.id: one.name for one in call.plane.projects.of(call.identity)}
        world = call.plane.world
        return {
            "items": [
                job_json(
                    row.job,
                    row.workload,
                    project=names.get(row.job.project_id, row.job.project_id),
                    reason=row.reason,
                    endpoint=endpoint_of(world, row.workload, row.job),
                )
                for row in found.items
            ],
            "next_cursor": found.next_cursor,
        }

    return json_answer(await blocking(page))


@routes.get("/v1/jobs/{reference}", allow=(Scope.READ, Scope.JOB), answer=JobOut)
async def get_job(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Get a job with its spec, attempts and workers.

    By id, the beginning of one that is unique, or a workload's name (its newest).
    """
    return json_answer(await blocking(lambda: _whole(call, find_job(call, reference, project))))


@routes.post("/v1/jobs/{reference}/stop", allow=Scope.SUBMIT, status=202, body=NothingIn, answer=JobOut)
async def stop_job(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Ask a job to end; its workers get their grace. Harmless to repeat."""
    row = await blocking(find_job, call, reference, project)
    await durable(call.plane.jobs.stop(call.identity, [row.job.id]))
    return json_answer(await blocking(lambda: _whole(call, find_job(call, row.job.id))), 202)


@routes.post("/v1/jobs/stop", allow=Scope.ADMIN, status=202, body=StopAllIn, answer=LiveJobsOut)
async def stop_all_jobs(call: Caller) -> Response:
    """Ask every job to end, before the cloud goes down, and say which are not over yet.

    No work is taken for 15 s after this was last asked: ask again until nothing is left.
    """
    given, _ = await json_object(call.request)
    read_body(StopAllIn, given)

    def answer() -> LiveJobsOut:
        live = sorted(call.plane.jobs.end_all(call.identity), key=lambda job: job.id)
        workloads = call.plane.world.workloads
        shown: list[LiveJobOut] = [
            {"id": job.id, "name": workloads[job.workload_id].spec.name, "state": job.state.value}
            for job in live[:_SHOWN]
            if job.workload_id in workloads
        ]
        return {"live": len(live), "jobs": shown}

    return json_answer(await blocking(answer), 202)


@routes.get("/v1/jobs/{reference}/why", allow=Scope.READ, answer=WhyOut)
async def why(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Say why a job is where it is."""

    def answer() -> dict[str, Any]:
        row = find_job(call, reference, project)
        found = call.plane.questions.why(row.job.id)
        visible, jobs = set(call.visible_projects()), call.plane.world.jobs
        lines = dict.fromkeys((found.sentence, *(reason.sentence for reason in found.reasons)))
        return {
            "job": found.job_id,
            "state": found.state,
            "cause": found.cause,
            "detail": found.detail,
            "reasons": [reason_json(reason) for reason in found.reasons],
            "holdings": [
                holding_json(one, is_visible=one.job_id in jobs and jobs[one.job_id].project_id in visible)
                for one in found.holdings
            ],
            "forecast": forecast_json(found.forecast),
            "position": found.position,
            "ahead": max(0, found.position - 1),
            "lines": [line for line in lines if line],
            "site": found.site,
            "sites": [site_option_json(option) for option in found.sites],
            "replicas": replicas_json(call.plane.serving.scaler.account(row.workload.id)),
        }

    return json_answer(await blocking(answer))


@routes.post("/v1/jobs/{reference}/checkpoint", allow=Scope.JOB, status=202, body=CheckpointedIn, answer=JobOut)
async def checkpointed(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Say that the job's work up to now is safe in a checkpoint, so that little is lost if it is displaced."""
    given, raw = await json_object(call.request)
    asked = read_body(CheckpointedIn, given)
    row = await blocking(find_job, call, reference, project)

    async def record() -> Response:
        await durable(call.plane.runners.checkpointed(call.identity, row.job.id, asked.detail))
        return json_answer(await blocking(lambda: _whole(call, find_job(call, row.job.id))), 202)

    request = f"checkpoint\0{row.job.id}\0".encode() + raw
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, request, record)


@routes.get("/v1/jobs/{reference}/receipt", allow=Scope.READ, answer=ReceiptOut)
async def receipt(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Say what a job took and cost so far."""

    def answer() -> dict[str, Any]:
        found = call.plane.questions.receipt(find_job(call, reference, project).job.id)
        return {
            "job": found.job,
            "name": found.name,
            "state": found.state,
            "queue_wait_ns": found.queue_wait_ns,
            "prepare_ns": found.prepare_ns,
            "run_ns": found.run_ns,
            "held_ns": found.held_ns,
            "device_seconds": dict(found.device_seconds),
            "amount_micro": found.amount_micro,
            "currency": "USD",
            "energy_mj": found.energy_mj,
            "energy_evidence": found.energy_evidence,
            "carbon_mg": found.carbon_mg,
            "carbon_source": found.carbon_source,
            "rate_card": found.rate_card,
            "unit_prices": dict(found.unit_prices),
            "lines": found.lines,
            "metered_until_ns": found.metered_until_ns,
        }

    return json_answer(await blocking(answer))


@routes.get("/v1/jobs/{reference}/logs", allow=Scope.READ, media=("text/plain", "text/event-stream"))
async def logs(
    call: Caller,
    reference: str,
    rank: Annotated[int | None, Query(ge=0, le=_NUMBER_LIMIT, description="Only this rank.")] = None,
    attempt: Annotated[int | None, Query(ge=1, le=_NUMBER_LIMIT, description="Only this attempt.")] = None,
    follow: Annotated[bool, Query(description="Go on until the job is over and its logs are complete.")] = False,
    tail: Annotated[int | None, Query(ge=0, le=_NUMBER_LIMIT, description="Begin at the last lines.")] = None,
    project: ProjectName = "",
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[str, Header(description="Go on after that event of an earlier stream.")] = "",
) -> Response:
    """Read a job's logs.

    As `text/event-stream`: all attempts and ranks as they grow, with the job's changes between. Each event's id
    is the position after it. Otherwise one rank's octets: rank 0 of the newest attempt unless asked otherwise.
    """
    row = await blocking(find_job, call, reference, project)
    job, store, hub = row.job.id, call.plane.logs, call.services.hub

    def look() -> Seen:
        return _seen(call, job)

    if "text/event-stream" in accept:
        wanted = Wanted(attempt, rank)
        position = parse_position(last_event_id)
        if not last_event_id and tail is not None:
            position = await blocking(start_at, store, job, wanted, tail)
        return event_stream(follow_logs(store, hub, job, look, wanted, position, follow=follow, now=call.plane.now))
    default = row.job.fence_base + max(1, row.job.attempts)
    newest = attempt or max((one for one, _ in await blocking(store.ranks, job)), default=default)
    one = Wanted(newest, rank or 0)
    offset = await blocking(store.tail, job, newest, rank or 0, tail) if tail is not None else 0
    return Streamed(
        follow_octets(store, hub, job, look, one, offset, follow=follow, now=call.plane.now),
        media_type="text/plain; charset=utf-8",
    )


@routes.get("/v1/jobs/{reference}/outputs", allow=Scope.READ, media=("application/x-tar",))
async def outputs(
    call: Caller,
    reference: str,
    path: Annotated[str, Query(max_length=4_096, description="A file or folder in the output folder.")] = "",
    project: ProjectName = "",
) -> Response:
    """Get files of a job's output folder as a tar archive; also after the job ended."""
    row = await blocking(find_job, call, reference, project)
    folder = await blocking(output_path, call, row.job, path)
    pieces = tar_pieces(folder)
    first = await blocking(next, pieces, b"")
    return Streamed(in_threads(pieces, first), media_type="application/x-tar")


def output_path(call: Call, job: Job, path: str) -> Path:
    """The resolved path of something in a job's output folder. Raises: NotFound, InvalidRequest when it is outside."""
    root = call.plane.outputs.folder(job).resolve()
    try:
        found = (root / _plain(path, "path")).resolve()
    except (OSError, RuntimeError) as error:
        raise InvalidRequest("The path cannot be followed.", field="path", value=path) from error
    if not found.is_relative_to(root):
        raise InvalidRequest("The path leaves the job's output folder.", field="path", value=path)
    if not found.exists():
        raise NotFound(
            "The job's output folder has nothing there.",
            field="path",
            value=path,
            mend=call.plane.outputs.where(job),
        )
    return found


def tar_pieces(folder: Path) -> Iterator[bytes]:
    """A tar archive of what is there, in pieces. Raises: as ``blobs.walk``, Conflict when a file got shorter."""
    for member, content in walk(folder):
        yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        left = member.size if content is not None else 0
        while content is not None and left:
            piece = content.read(min(left, 256 * 1024))
            if not piece:
                raise Conflict(f"{member.name} changed while it was read.", field="path", value=member.name)
            left -= len(piece)
            yield piece
        if content is not None and member.size % 512:
            yield bytes(512 - member.size % 512)
    yield bytes(1_024)


def _whole(call: Call, row: JobRow) -> JobOut:
    store = call.plane.store
    found = whole_job_json(
        row.job,
        row.workload,
        project=call.project_name(row.job.project_id),
        reason=row.reason,
        attempts=store.attempts(row.job.id),
        workers=store.allocations(row.job.id),
        nodes=call.plane.world.nodes,
    )
    found["replicas"] = replicas_json(call.plane.serving.scaler.account(row.workload.id))
    return found


def _seen(call: Call, job: JobId) -> Seen:
    store = call.plane.store
    row = store.job(job)
    if row is None:
        raise missing("job", job)
    attempts = {attempt.id: attempt.number for attempt in store.attempts(job)}
    is_over = row.job.state in TERMINAL
    held = store.allocations(job) if is_over else ()
    return Seen(
        json=job_json(
            row.job,
            row.workload,
            project=call.project_name(row.job.project_id),
            reason=row.reason,
            endpoint=endpoint_of(call.plane.world, row.workload, row.job),
        ),
        is_over=is_over,
        ended_ns=row.job.ended_ns,
        writers=tuple((attempts.get(one.attempt_id, 0), one.rank, one.cause.value) for one in held),
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _choice(kind: Any, word: str, field: str) -> Any:
    if word not in kind._value2member_map_:
        raise InvalidRequest(
            f"There is no such {field}.", field=field, value=word, mend=f"Use {', '.join(kind._value2member_map_)}."
        )
    return kind(word)


def _plain(text: str, field: str) -> str:
    if "\0" in text:
        raise InvalidRequest("It has a NUL character in it.", field=field)
    return text
