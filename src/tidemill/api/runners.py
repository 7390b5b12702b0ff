"""What runners report and fetch. A runner's token opens its own launch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Query
from starlette.responses import FileResponse, Response

from tidemill.api.bodies import body_of, json_answer, octets
from tidemill.api.guard import Call, Caller, Routes, blocking, durable, missing, unless_gone
from tidemill.api.refs import job_of_launch
from tidemill.api.shapes.runners import (
    BeatIn,
    BecameIn,
    CommandsOut,
    DirectiveOut,
    ExitedIn,
    OffsetOut,
    PreparedIn,
    ReportIn,
    StartedIn,
)
from tidemill.control.launching import find_input
from tidemill.model.events import Became, Exited, Fact, Prepared, Started
from tidemill.model.ids import LaunchId
from tidemill.model.job import Cause
from tidemill.model.tenant import Scope

routes = Routes("runners")
LOG_LIMIT = 8 << 20
_DETAIL = 4_000


@routes.post("/v1/runners/{launch_id}/report", allow=Scope.RUNNER, body=ReportIn, answer=DirectiveOut)
async def report(call: Caller, launch_id: str) -> Response:
    """Report what happened to a worker. Harmless to repeat."""
    launch = own_launch(call, launch_id)
    given = await body_of(call.request, ReportIn)
    directive = await durable(call.plane.runners.report(launch, given.fence, _facts(launch, given.fence, given.events)))
    return json_answer(_directive(stop=directive.stop, grace_ns=directive.grace_ns))


@routes.post("/v1/runners/{launch_id}/beat", allow=Scope.RUNNER, body=BeatIn, answer=DirectiveOut)
async def beat(call: Caller, launch_id: str) -> Response:
    """Say that the runner lives. Its absence alone ends nothing."""
    launch = own_launch(call, launch_id)
    given = await body_of(call.request, BeatIn)
    directive = call.plane.runners.beat(launch, given.fence, cpu_used_ns=given.cpu_used_ns, rss_bytes=given.rss_bytes)
    return json_answer(_directive(stop=directive.stop, grace_ns=directive.grace_ns))


@routes.post("/v1/runners/{launch_id}/logs", allow=Scope.RUNNER, body="application/octet-stream", answer=OffsetOut)
async def append_log(
    call: Caller,
    launch_id: str,
    offset: Annotated[int, Query(ge=0, lt=2**50, description="Where these octets begin.")],
    complete: Annotated[bool, Query(description="No more will come after these.")] = False,
) -> Response:
    """Add to the worker's log. What it has already is skipped, so repeating is harmless.

    A gap is refused with 409 and the offset to go on from.
    """
    job, attempt, rank = job_of_launch(own_launch(call, launch_id))
    data = await octets(call.request, LOG_LIMIT)
    store = call.plane.logs

    def append() -> int:
        size = store.append(job, attempt, rank, offset, data)
        if complete:
            store.close(job, attempt, rank)
        return size

    return json_answer({"offset": await blocking(append)})


@routes.get("/v1/runners/{launch_id}/commands", allow=Scope.RUNNER, answer=CommandsOut)
async def commands(
    call: Caller, launch_id: str, wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait.")] = 20
) -> Response:
    """Wait for commands to carry out inside the worker."""
    launch = own_launch(call, launch_id)
    found = await unless_gone(call, call.plane.relay.commands(launch, wait_s=wait))
    return json_answer({"commands": found or []})


@routes.get("/v1/runners/{launch_id}/secrets", allow=Scope.RUNNER, answer=dict[str, str])
async def launch_secrets(call: Caller, launch_id: str) -> Response:
    """Get the values of the secrets that the worker's spec names."""
    return json_answer(await blocking(call.plane.runners.secret_values, own_launch(call, launch_id)))


@routes.get("/v1/runners/{launch_id}/blobs/{digest}", allow=Scope.RUNNER, media=("application/octet-stream",))
async def launch_blob(call: Caller, launch_id: str, digest: str) -> Response:
    """Get a blob that the worker's spec names: its workdir, one of its inputs, or a manifest."""
    launch = own_launch(call, launch_id)

    def find() -> str:
        _, _, job, workload = call.plane.runners.launch(launch)
        spec, store = workload.spec, call.plane.store
        wanted = digest.removeprefix("sha256:")
        named = wanted in (spec.workdir, *(one.digest for one in spec.data)) or any(
            find_input(store, job.project_id, reference).digest == wanted for _, reference in spec.inputs
        )
        if not named:
            raise missing("blob", digest)
        call.plane.blobs.size(wanted)
        return str(call.plane.blobs.path(wanted))

    return FileResponse(await blocking(find), media_type="application/octet-stream")


def own_launch(call: Call, launch_id: str) -> LaunchId:
    """The launch in the address, which is the token's. Raises: NotFound."""
    if call.identity.launch_id != launch_id or not launch_id:
        raise missing("launch", launch_id)
    return LaunchId(launch_id)


def _facts(launch: LaunchId, fence: int, events: Sequence[PreparedIn | StartedIn | BecameIn | ExitedIn]) -> list[Fact]:
    facts: list[Fact] = []
    for event in events:
        match event:
            case PreparedIn():
                facts.append(Prepared(at_ns=event.at_ns, launch_id=launch, fence=fence))
            case StartedIn():
                facts.append(
                    Started(at_ns=event.at_ns, launch_id=launch, fence=fence, isolation=tuple(event.isolation))
                )
            case BecameIn():
                facts.append(
                    Became(at_ns=event.at_ns, launch_id=launch, fence=fence, ready=event.ready, endpoint=event.endpoint)
                )
            case ExitedIn():
                facts.append(
                    Exited(
                        at_ns=event.at_ns,
                        launch_id=launch,
                        fence=fence,
                        exit_code=event.exit_code,
                        cause=Cause(event.cause) if event.cause in Cause._value2member_map_ else Cause.ERROR,
                        detail=event.detail.replace("\0", "")[:_DETAIL],
                        cpu_used_ns=event.cpu_used_ns,
                    )
                )
    return facts


def _directive(*, stop: bool, grace_ns: int) -> DirectiveOut:
    return {"directive": "stop" if stop else "run", "grace_ns": grace_ns}
