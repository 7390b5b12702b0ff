"""The model registry: models, their versions, stages and aliases, and the files of versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from tidemill.api.bodies import body_of, check_length, json_answer, write_draft
from tidemill.api.guard import Call, Caller, Routes, blocking, missing
from tidemill.api.jobs import ProjectName, output_path
from tidemill.api.refs import find_job, job_of_launch
from tidemill.api.shapes.common import PageOf
from tidemill.api.shapes.data import (
    AliasIn,
    BlobOut,
    ModelChangeIn,
    ModelOut,
    ModelPolicyIn,
    ModelPolicyOut,
    ModelVersionIn,
    ModelVersionOut,
    StageIn,
)
from tidemill.control.identity import administer
from tidemill.control.launching import find_input
from tidemill.control.models import NewVersion
from tidemill.errors import InvalidRequest
from tidemill.model.registry import Ancestor, Lineage, Model, ModelVersion, Stage
from tidemill.model.storage import DataFile, Manifest, manifest_of
from tidemill.model.tenant import Project, Scope
from tidemill.ports import JobRow
from tidemill.units import parse_size

routes = Routes("models")
_ADD = (Scope.SUBMIT, Scope.JOB)
_SEE = (Scope.READ, Scope.JOB)


@routes.put("/v1/model-files/{sha256}", allow=_ADD, status=201, body="application/octet-stream", answer=BlobOut)
async def put_model_file(call: Caller, sha256: str, project: ProjectName = "") -> Response:
    """Upload a file of a model. Its SHA-256 is checked; one that the project has already is answered with 200."""
    limit = parse_size(call.plane.settings.model_limit)
    check_length(call.request, limit)
    files = await blocking(lambda: call.plane.models.files(call.project(project).id))
    digest = files.path(sha256).name
    known = await blocking(files.exists, digest)
    draft = await blocking(files.draft(digest).__enter__)
    try:
        size = await write_draft(call.request, draft, limit)
        await blocking(draft.verify if known else draft.commit)
    finally:
        await run_in_threadpool(draft.__exit__)
    return json_answer({"digest": digest, "size": size}, 200 if known else 201)


@routes.head("/v1/model-files/{sha256}", allow=_ADD)
async def head_model_file(call: Caller, sha256: str, project: ProjectName = "") -> Response:
    """Tell whether the project has a file of that content."""
    size = await blocking(lambda: call.plane.models.size(call.project(project).id, sha256))
    return Response(headers={"X-Blob-Size": str(size)}, media_type="application/octet-stream")


@routes.get("/v1/models", allow=_SEE, answer=PageOf[ModelOut])
async def list_models(call: Caller, project: ProjectName = "") -> Response:
    """List a project's models, by name."""

    def page() -> dict[str, Any]:
        found = call.project(project)
        models = call.plane.models
        items = [model_json(model, models.versions(model), project=found.name) for model in models.all(found)]
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.get("/v1/models/{name}", allow=_SEE, answer=ModelOut)
async def get_model(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Get a model."""

    def find() -> ModelOut:
        found = call.project(project)
        model = call.plane.models.find(found, name)
        return model_json(model, call.plane.models.versions(model), project=found.name)

    return json_answer(await blocking(find))


@routes.patch("/v1/models/{name}", allow=Scope.SUBMIT, body=ModelChangeIn, answer=ModelOut)
async def change_model(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Say something else of a model: its description, its tags."""
    given = await body_of(call.request, ModelChangeIn)

    def change() -> ModelOut:
        found, models = call.project(project), call.plane.models
        model = models.describe(models.find(found, name), description=given.description, tags=given.tags)
        return model_json(model, models.versions(model), project=found.name)

    return json_answer(await blocking(change))


@routes.delete("/v1/models/{name}", allow=Scope.SUBMIT, answer=ModelOut)
async def delete_model(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Delete a model with all its versions, once none is in staging or production, has an alias, or is used."""

    def delete() -> ModelOut:
        found, models = call.project(project), call.plane.models
        gone = models.delete(models.find(found, name), by=call.identity.name)
        return model_json(gone, (), project=found.name)

    return json_answer(await blocking(delete))


@routes.get("/v1/models/{name}/versions", allow=_SEE, answer=PageOf[ModelVersionOut])
async def list_model_versions(call: Caller, name: str, project: ProjectName = "") -> Response:
    """List a model's versions, newest first."""

    def page() -> dict[str, Any]:
        found, models = call.project(project), call.plane.models
        model = models.find(found, name)
        items = [version_json(call, model, version, found) for version in models.versions(model)]
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.post("/v1/models/{name}/versions", allow=_ADD, status=201, body=ModelVersionIn, answer=ModelVersionOut)
async def add_model_version(call: Caller, name: str) -> Response:
    """Add a version of a model, which is made when there is none of that name: of files that were uploaded, of what a
    job wrote, or of an artifact. All files are looked at; pickles are refused unless they are allowed.

    The newest version is answered when it has the same files.
    """
    given = await body_of(call.request, ModelVersionIn)

    def make() -> ModelVersionOut:
        project = call.project(given.project)
        model, version = call.plane.models.add(project, name, _new_version(call, given, project))
        return version_json(call, model, version, project)

    async def answer() -> Response:
        return json_answer(await blocking(make), 201)

    whole = f"model\0{name}\0{given.model_dump_json()}".encode()
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, whole, answer)


@routes.get("/v1/models/{name}/versions/{version}", allow=_SEE, answer=ModelVersionOut)
async def get_model_version(call: Caller, name: str, version: str, project: ProjectName = "") -> Response:
    """Get a version of a model: by its number, `latest`, a stage, or `@alias`."""

    def find() -> ModelVersionOut:
        model, version_, found = _find(call, name, version, project)
        return version_json(call, model, version_, found)

    return json_answer(await blocking(find))


@routes.patch("/v1/models/{name}/versions/{version}", allow=_ADD, body=ModelChangeIn, answer=ModelVersionOut)
async def change_model_version(call: Caller, name: str, version: str, project: ProjectName = "") -> Response:
    """Say something else of a version: its description, its tags."""
    given = await body_of(call.request, ModelChangeIn)

    def change() -> ModelVersionOut:
        model, known, found = _find(call, name, version, project)
        after = call.plane.models.describe_version(known, description=given.description, tags=given.tags)
        return version_json(call, model, after, found)

    return json_answer(await blocking(change))


@routes.delete("/v1/models/{name}/versions/{version}", allow=Scope.SUBMIT, answer=ModelVersionOut)
async def delete_model_version(call: Caller, name: str, version: str, project: ProjectName = "") -> Response:
    """Delete a version, once it is not in staging or production, has no alias, and is not used.

    Its files go, unless another version has them; its number is not given again.
    """

    def delete() -> ModelVersionOut:
        model, known, found = _find(call, name, version, project)
        gone = call.plane.models.delete_version(model, known, by=call.identity.name)
        return version_json(call, call.plane.models.find(found, name), gone, found)

    return json_answer(await blocking(delete))


@routes.get("/v1/models/{name}/versions/{version}/manifest", allow=_SEE, media=("application/json",))
async def model_manifest(call: Caller, name: str, version: str, project: ProjectName = "") -> Response:
    """Get the list of a version's files: path, size, SHA-256."""

    def find() -> bytes:
        return call.plane.models.manifest(_find(call, name, version, project)[1]).content()

    return Response(await blocking(find), media_type="application/json")


@routes.get("/v1/models/{name}/versions/{version}/files/{sha256}", allow=_SEE, media=("application/octet-stream",))
async def model_file(call: Caller, name: str, version: str, sha256: str, project: ProjectName = "") -> Response:
    """Get a file of a version by its SHA-256, from an offset with `Range: bytes=N-`."""

    def find() -> str:
        _, known, found = _find(call, name, version, project)
        if not any(file.digest == sha256 for file in call.plane.models.manifest(known).files):
            raise missing("file", sha256)
        call.plane.models.files(found.id).size(sha256)
        return str(call.plane.models.files(found.id).path(sha256))

    return FileResponse(await blocking(find), media_type="application/octet-stream")


@routes.post("/v1/models/{name}/versions/{version}/stage", allow=Scope.SUBMIT, body=StageIn, answer=ModelVersionOut)
async def promote_model(call: Caller, name: str, version: str, project: ProjectName = "") -> Response:
    """Put a version into a stage. What was in staging or production before is archived."""
    given = await body_of(call.request, StageIn)

    def promote() -> ModelVersionOut:
        model, known, found = _find(call, name, version, project)
        after = call.plane.models.promote(model, known.number, Stage(given.stage), by=call.identity.name, why=given.why)
        return version_json(call, after, known, found)

    return json_answer(await blocking(promote))


@routes.put("/v1/models/{name}/aliases/{alias}", allow=Scope.SUBMIT, body=AliasIn, answer=ModelVersionOut)
async def set_model_alias(call: Caller, name: str, alias: str, project: ProjectName = "") -> Response:
    """Have an alias point to a version, and to no other."""
    given = await body_of(call.request, AliasIn)

    def point() -> ModelVersionOut:
        model, known, found = _find(call, name, str(given.version), project)
        after = call.plane.models.point(model, alias, known.number, by=call.identity.name, why=given.why)
        return version_json(call, after, known, found)

    return json_answer(await blocking(point))


@routes.delete("/v1/models/{name}/aliases/{alias}", allow=Scope.SUBMIT, answer=ModelOut)
async def remove_model_alias(call: Caller, name: str, alias: str, project: ProjectName = "") -> Response:
    """Take an alias away. Harmless to repeat."""

    def unpoint() -> ModelOut:
        found, models = call.project(project), call.plane.models
        model = models.unpoint(models.find(found, name), alias, by=call.identity.name)
        return model_json(model, models.versions(model), project=found.name)

    return json_answer(await blocking(unpoint))


@routes.get("/v1/model-policy", allow=Scope.READ, answer=ModelPolicyOut)
async def get_model_policy(call: Caller, project: ProjectName = "") -> Response:
    """Say what a project lets into its models."""
    return json_answer(_policy_json(await blocking(call.project, project)))


@routes.put("/v1/model-policy", allow=Scope.ADMIN, body=ModelPolicyIn, answer=ModelPolicyOut)
async def set_model_policy(call: Caller, project: ProjectName = "") -> Response:
    """Say whether a project's models may have pickles, where whoever adds them asks for it."""
    given = await body_of(call.request, ModelPolicyIn)

    def change() -> ModelPolicyOut:
        administer(call.identity)
        allows = given.pickles == "allow"
        return _policy_json(call.plane.administration.allow_pickles(call.identity, call.project(project), allows))

    return json_answer(await blocking(change))


@routes.get("/v1/jobs/{reference}/models", allow=_SEE, answer=PageOf[ModelVersionOut])
async def job_models(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """List the versions of models that a job made, oldest first."""

    def page() -> dict[str, Any]:
        row = find_job(call, reference, project)
        found = call.project(row.job.project_id)
        items = [
            version_json(call, call.plane.models.find(found, name), version, found)
            for name, version in call.plane.models.made_by([row.job.id])
        ]
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


def _new_version(call: Call, given: ModelVersionIn, project: Project) -> NewVersion:
    """What is asked for, with its files there. Raises: InvalidRequest, NotFound."""
    models, row = call.plane.models, _maker(call, given)
    lineage = models.lineage(row, commit=given.commit) if row is not None else Lineage(commit=given.commit)
    if given.files:
        manifest = _listed(given)
    elif given.artifact:
        artifact = find_input(call.plane.store, project.id, given.artifact)
        manifest = models.take_archive(project.id, artifact.digest)
        origin = call.plane.store.job(artifact.job_id) if artifact.job_id and row is None else None
        if origin is not None:
            lineage = models.lineage(origin, commit=given.commit)
        source = f"artifact {artifact.name}:{artifact.version}"
        lineage = lineage_from(lineage, source, Ancestor(reference=source, digest=artifact.digest))
    elif row is not None:
        manifest = models.take_folder(project.id, output_path(call, row.job, given.path))
        lineage = lineage_from(lineage, f"{row.job.id}:{given.path or '.'}")
    else:
        mend = "Name files that were uploaded, a job and a path in its output folder, or an artifact."
        raise InvalidRequest("It does not say what the version is.", field="files", mend=mend)
    told = (("base_model", given.base_model), ("licence", given.licence), ("framework", given.framework))
    return NewVersion(
        manifest=manifest,
        by=call.identity.name,
        description=given.description,
        tags=tuple(given.tags.items()),
        metrics=tuple(given.metrics.items()),
        told=told,
        lineage=lineage,
        allow_pickles=given.allow_pickles,
        is_admin=call.identity.allows(Scope.ADMIN),
    )


def lineage_from(lineage: Lineage, source: str, artifact: Ancestor | None = None) -> Lineage:
    """The lineage of what was taken from that place."""
    artifacts = (*lineage.artifacts, artifact) if artifact is not None else lineage.artifacts
    return replace(lineage, source=source, artifacts=artifacts)


def _maker(call: Call, given: ModelVersionIn) -> JobRow | None:
    """The job that made it: the one that is named, or that asks. Raises: NotFound, Forbidden for another's token."""
    if given.job:
        return find_job(call, given.job, given.project)
    if call.identity.launch_id:
        own, _, _ = job_of_launch(call.identity.launch_id)
        return call.plane.store.job(own)
    return None


def _listed(given: ModelVersionIn) -> Manifest:
    try:
        return manifest_of(DataFile(file.path, file.size, file.sha256) for file in given.files)
    except ValueError as error:
        raise InvalidRequest(f"That cannot be a model: {error}.", field="files", mend="Mend that first.") from error


def _find(call: Call, name: str, version: str, project: str) -> tuple[Model, ModelVersion, Project]:
    found = call.project(project)
    reference = f"{name}{version}" if version.startswith("@") else f"{name}:{version}"
    model, known = call.plane.models.version(found, reference)
    return model, known, found


def model_json(model: Model, versions: tuple[ModelVersion, ...], *, project: str) -> ModelOut:
    """A model's fields."""
    return {
        "id": model.id,
        "name": model.name,
        "project": project,
        "description": model.description,
        "tags": dict(model.tags),
        "newest": versions[0].number if versions else 0,
        "versions": len(versions),
        "production": model.in_stage(Stage.PRODUCTION),
        "staging": model.in_stage(Stage.STAGING),
        "aliases": [
            {"name": one.name, "version": one.number, "since_at_ns": one.since_ns, "by": one.by, "why": one.why}
            for one in model.aliases
        ],
        "created_at_ns": model.created_ns,
        "created_by": model.created_by,
        "changed_at_ns": model.changed_ns,
    }


def version_json(call: Call, model: Model, version: ModelVersion, project: Project) -> ModelVersionOut:
    """A version's fields."""
    placing, card, lineage = model.placing(version.number), version.card, version.lineage
    return {
        "id": version.id,
        "name": model.name,
        "version": version.number,
        "project": project.name,
        "digest": version.digest,
        "size": version.size,
        "files": version.files,
        "description": version.description,
        "tags": dict(version.tags),
        "stage": {
            "stage": placing.stage.value,
            "since_at_ns": placing.since_ns,
            "by": placing.by,
            "why": placing.why,
        },
        "aliases": list(model.aliases_of(version.number)),
        "format": card.format,
        "framework": card.framework,
        "architecture": card.architecture,
        "base_model": card.base_model,
        "licence": card.licence,
        "parameters": card.parameters,
        "precision": card.precision,
        "precisions": dict(card.precisions),
        "code": list(card.code),
        "metrics": dict(version.metrics),
        "pickles": list(version.pickles),
        "pickles_allowed": version.pickles_allowed,
        "lineage": {
            "job": lineage.job_id,
            "workload_id": lineage.workload_id,
            "workload": lineage.workload,
            "spec_digest": lineage.spec_digest,
            "data": [{"reference": one.reference, "digest": one.digest} for one in lineage.data],
            "artifacts": [{"reference": one.reference, "digest": one.digest} for one in lineage.artifacts],
            "models": [{"reference": one.reference, "digest": one.digest} for one in lineage.models],
            "commit": lineage.commit,
            "run": lineage.run,
            "source": lineage.source,
        },
        "used_by": [
            {"workload_id": one.id, "name": one.spec.name, "kind": one.spec.kind.value}
            for one in call.plane.models.users(model, version)
        ],
        "cached_on": list(call.plane.questions.copies_on(project.id, version.digest)),
        "created_at_ns": version.created_ns,
        "created_by": version.created_by,
    }


def _policy_json(project: Project) -> ModelPolicyOut:
    return {"project": project.name, "pickles": "allow" if project.allows_pickles else "refuse"}
