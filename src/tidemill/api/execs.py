"""Commands inside running workers: frames both ways, each way over one streaming body."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.responses import Response

from tidemill.api.bodies import body_of, json_answer, stream
from tidemill.api.follow import Streamed
from tidemill.api.guard import Call, Caller, Routes, blocking, missing
from tidemill.api.jobs import ProjectName
from tidemill.api.refs import find_job
from tidemill.api.runners import own_launch
from tidemill.api.shapes.work import ExecIn, ExecOut
from tidemill.control.relay import Broken, Pipe, Session
from tidemill.errors import Conflict
from tidemill.model.job import Allocation, AllocationState, Job
from tidemill.model.tenant import Scope

routes = Routes("execs")
FRAMES = "application/octet-stream"
_UNLIMITED = 1 << 50


@routes.post("/v1/jobs/{reference}/exec", allow=Scope.EXEC, status=201, body=ExecIn, answer=ExecOut)
async def exec_in_job(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Run a command inside a worker of a running job.

    Connect to the input and the output of the returned command next.
    """
    given = await body_of(call.request, ExecIn)
    row = await blocking(find_job, call, reference, project)
    held = _worker(call, row.job, given.rank)
    request = {
        "command": given.command,
        "rank": given.rank,
        "tty": given.tty,
        "rows": given.rows,
        "cols": given.cols,
        "env": given.env,
    }

    async def begin() -> Response:
        session = call.plane.relay.open(
            held.id,
            request,
            job_id=row.job.id,
            project_id=row.job.project_id,
            organization_id=row.workload.organization_id,
        )
        return json_answer({"exec_id": session.id}, 201)

    whole = f"exec\0{row.job.id}\0{given.model_dump_json()}".encode()
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, whole, begin)


@routes.get("/v1/execs/{exec_id}/output", allow=Scope.EXEC, media=(FRAMES,))
async def exec_output(call: Caller, exec_id: str) -> Response:
    """Receive what a command writes, as frames, until it ends."""
    return _sent(call, _session(call, exec_id), "client/output")


@routes.post("/v1/execs/{exec_id}/input", allow=Scope.EXEC, body=FRAMES, answer=dict[str, str])
async def exec_input(call: Caller, exec_id: str) -> Response:
    """Send frames to a command while it runs."""
    return await _received(call, _session(call, exec_id), "client/input")


@routes.get("/v1/runners/{launch_id}/execs/{exec_id}/input", allow=Scope.RUNNER, media=(FRAMES,), tag="runners")
async def runner_exec_input(call: Caller, launch_id: str, exec_id: str) -> Response:
    """Receive what the client sends to a command."""
    return _sent(call, _launched(call, launch_id, exec_id), "runner/input")


@routes.post(
    "/v1/runners/{launch_id}/execs/{exec_id}/output",
    allow=Scope.RUNNER,
    body=FRAMES,
    answer=dict[str, str],
    tag="runners",
)
async def runner_exec_output(call: Caller, launch_id: str, exec_id: str) -> Response:
    """Send what a command writes."""
    return await _received(call, _launched(call, launch_id, exec_id), "runner/output")


def _sent(call: Call, session: Session, end: str) -> Response:
    pipe = session.to_client if end.startswith("client") else session.to_runner
    session.take(end)
    return Streamed(_pieces(call, session, pipe, end), media_type=FRAMES)


async def _pieces(call: Call, session: Session, pipe: Pipe, end: str) -> AsyncIterator[bytes]:
    try:
        while piece := await pipe.read():
            yield piece
    finally:
        call.plane.relay.leave(session, end)


async def _received(call: Call, session: Session, end: str) -> Response:
    session.take(end)
    try:
        async for piece in stream(call.request, _UNLIMITED):
            await (session.from_runner(piece) if end.startswith("runner") else session.to_runner.write(piece))
    except Broken:
        return json_answer({})
    finally:
        call.plane.relay.leave(session, end)
    return json_answer({})


def _session(call: Call, exec_id: str) -> Session:
    session = call.plane.relay.session(exec_id)
    identity = call.identity
    if session.organization_id != identity.organization_id or not identity.may_see(session.project_id):
        raise missing("exec_id", exec_id)
    return session


def _launched(call: Call, launch_id: str, exec_id: str) -> Session:
    session = call.plane.relay.session(exec_id)
    if session.launch_id != own_launch(call, launch_id):
        raise missing("exec_id", exec_id)
    return session


def _worker(call: Call, job: Job, rank: int) -> Allocation:
    """The running worker of that rank. Raises: NotFound, Conflict when it does not run."""
    world = call.plane.world
    attempt = world.attempts.get(job.id)
    if attempt is None:
        raise Conflict(
            "The job does not run.",
            field="job",
            value=job.id,
            mend="A command needs a running worker; see the job's state.",
        )
    held = next((one for one in world.workers_of(attempt) if one.rank == rank), None)
    if held is None:
        raise missing("rank", str(rank))
    if held.state is not AllocationState.ACTIVE:
        raise Conflict(
            f"The worker is {held.state.value}.", field="rank", value=rank, mend="Try again when the job runs."
        )
    return held
