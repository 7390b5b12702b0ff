"""Blobs and artifacts: uploaded folders, and named versions of what jobs made."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from tidemill.api.answers import artifact_json
from tidemill.api.bodies import body_of, check_length, json_answer, write_draft
from tidemill.api.guard import Call, Caller, Routes, blocking, missing
from tidemill.api.jobs import Limit, ProjectName, output_path
from tidemill.api.refs import find_job
from tidemill.api.shapes.common import PageOf
from tidemill.api.shapes.data import ArtifactIn, ArtifactOut, BlobOut
from tidemill.model.artifact import Artifact
from tidemill.model.tenant import Scope
from tidemill.units import parse_size

routes = Routes("artifacts")


@routes.put("/v1/blobs/{sha256}", allow=Scope.SUBMIT, status=201, body="application/octet-stream", answer=BlobOut)
async def put_blob(call: Caller, sha256: str) -> Response:
    """Upload a blob. Its SHA-256 is checked; one that is there already is answered with 200."""
    blobs = call.plane.blobs
    limit = parse_size(call.plane.settings.workdir_limit)
    digest = blobs.path(sha256).name
    check_length(call.request, limit)
    known = await blocking(blobs.exists, digest)
    draft = await blocking(blobs.draft(digest).__enter__)
    try:
        size = await write_draft(call.request, draft, limit)
        if not known:
            size = await blocking(draft.commit)
        else:
            await blocking(draft.verify)
    finally:
        await run_in_threadpool(draft.__exit__)
    return json_answer({"digest": digest, "size": size}, 200 if known else 201)


@routes.head("/v1/blobs/{sha256}", allow=Scope.SUBMIT)
async def head_blob(call: Caller, sha256: str) -> Response:
    """Tell whether a blob is there."""
    size = await blocking(call.plane.blobs.size, sha256)
    return Response(headers={"X-Blob-Size": str(size)}, media_type="application/octet-stream")


@routes.post("/v1/artifacts", allow=(Scope.SUBMIT, Scope.JOB), status=201, body=ArtifactIn, answer=ArtifactOut)
async def create_artifact(call: Caller) -> Response:
    """Make a new version of an artifact from what a job wrote into its output folder."""
    given = await body_of(call.request, ArtifactIn)

    async def make() -> Response:
        return json_answer(await blocking(_made, call, given), 201)

    whole = f"artifact\0{given.model_dump_json()}".encode()
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, whole, make)


@routes.get("/v1/artifacts", allow=Scope.READ, answer=PageOf[ArtifactOut])
async def list_artifacts(call: Caller, project: ProjectName = "", cursor: str = "", limit: Limit = 50) -> Response:
    """List a project's artifacts, by name, newest version first."""

    def page() -> dict[str, Any]:
        found = call.project(project)
        everything = call.plane.store.artifacts(found.id)
        start = int(cursor[:9]) if cursor.isascii() and cursor.isdigit() else 0
        items = everything[start : start + limit]
        more = start + limit < len(everything)
        return {
            "items": [artifact_json(artifact, project=found.name) for artifact in items],
            "next_cursor": str(start + limit) if more else "",
        }

    return json_answer(await blocking(page))


@routes.get("/v1/artifacts/{reference}", allow=Scope.READ, answer=ArtifactOut)
async def get_artifact(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Get an artifact by `name`, its newest version, or by `name:version`."""
    artifact, name = await blocking(_find, call, reference, project)
    return json_answer(artifact_json(artifact, project=name))


@routes.get("/v1/artifacts/{reference}/content", allow=Scope.READ, media=("application/gzip",))
async def artifact_content(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Get an artifact's archive (tar.gz)."""
    artifact, _ = await blocking(_find, call, reference, project)
    await blocking(call.plane.blobs.size, artifact.digest)
    return FileResponse(
        call.plane.blobs.path(artifact.digest),
        media_type="application/gzip",
        filename=f"{artifact.name}-{artifact.version}.tar.gz",
    )


def _made(call: Call, given: ArtifactIn) -> ArtifactOut:
    row = find_job(call, given.job, given.project)
    project = call.project(row.job.project_id)
    output_path(call, row.job, given.path)
    return artifact_json(
        call.plane.outputs.create_artifact(project, given.name, row.job, given.path), project=project.name
    )


def _find(call: Call, reference: str, project: str) -> tuple[Artifact, str]:
    found = call.project(project)
    name, _, version = reference.partition(":")
    if "\0" in name or (version and not (version.isascii() and version.isdigit() and len(version) <= 9)):
        raise missing("artifact", reference)
    artifact = call.plane.store.find_artifact(found.id, name, int(version or 0))
    if artifact is None:
        raise missing("artifact", reference)
    return artifact, found.name
