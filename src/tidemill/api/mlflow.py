"""MLflow's registry as its clients know it, over ours: ``MLFLOW_TRACKING_URI=https://…/mlflow`` and a token.

Registered models, their versions, stages, aliases and tags are ours under other names; the project is the token's, or
the one that ``MLFLOW_WORKSPACE`` names. Files go through the proxy of artifacts: what is uploaded there becomes part
of a version when that is made with its path as ``source``, and is looked at then. Runs are not kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final
from urllib.parse import quote, unquote, urlsplit

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from tidemill.api.bodies import check_length, checked, json_answer, json_object, write_draft
from tidemill.api.guard import Call, Caller, Routes, blocking, missing
from tidemill.api.jobs import output_path
from tidemill.api.models import lineage_from
from tidemill.api.problems import problem
from tidemill.api.refs import find_job
from tidemill.control.models import NewVersion
from tidemill.core.modelsearch import Found, filter_of, order_of
from tidemill.errors import ErrorKind, InvalidRequest, NotFound, TidemillError
from tidemill.model.ids import JobId
from tidemill.model.registry import SCHEME, Lineage, Model, ModelReference, ModelVersion, Stage, parse_model_reference
from tidemill.model.storage import DataFile, Manifest, manifest_of
from tidemill.model.tenant import Project, Scope
from tidemill.units import parse_size

_API: Final = "/mlflow/api/2.0/mlflow"
_FILES: Final = "/mlflow/api/2.0/mlflow-artifacts/artifacts"
_WORKSPACE: Final = "x-mlflow-workspace"
_OF_VERSIONS: Final = "models"
"""Below this path are the files of versions, to be read only."""
_STAGES: Final = {stage.value: stage.value.capitalize() for stage in Stage}
_ALLOW_PICKLES: Final = "tidemill.allow_pickle"
_RUN: Final = "runs:/"
_MOST: Final = 200_000
_CODES: Final = {
    ErrorKind.NOT_FOUND: "RESOURCE_DOES_NOT_EXIST",
    ErrorKind.CONFLICT: "RESOURCE_CONFLICT",
    ErrorKind.FORBIDDEN: "PERMISSION_DENIED",
    ErrorKind.UNAUTHORIZED: "UNAUTHENTICATED",
    ErrorKind.UNAVAILABLE: "TEMPORARILY_UNAVAILABLE",
}


def _refused(error: TidemillError) -> Response:
    """The answer to an error, with what MLflow's clients look for in it."""
    answer = problem(error)
    body = orjson.loads(bytes(answer.body))
    known = "RESOURCE_ALREADY_EXISTS" if error.data.get("taken") else _CODES.get(error.kind)
    body["error_code"] = known or ("INVALID_PARAMETER_VALUE" if answer.status_code < 500 else "INTERNAL_ERROR")
    body["message"] = " ".join(filter(None, (str(body["detail"]), str(body["mend"]))))
    headers = {name: value for name, value in answer.headers.items() if name != "content-length"}
    return Response(orjson.dumps(body), answer.status_code, headers=headers)


routes = Routes("mlflow", refused=_refused)


def _text_of(value: object) -> object:
    return str(value) if type(value) is int else value


class MlflowIn(BaseModel):
    """A request; fields that are not known are of later clients, and are passed over."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)


_Text = Annotated[str, Field(max_length=10_000, pattern=r"^[^\x00]*$")]
_Number = Annotated[str, BeforeValidator(_text_of), Field(max_length=20, pattern=r"^[1-9][0-9]{0,8}$")]


class TagIn(MlflowIn):
    """A tag."""

    key: _Text
    value: _Text = ""


class RegisteredModelIn(MlflowIn):
    """A registered model by its name, with what is to be said of it."""

    name: _Text
    description: _Text | None = None
    tags: list[TagIn] = Field(default=[], max_length=1_000)


class RenameIn(MlflowIn):
    """A registered model's next name."""

    name: _Text
    new_name: _Text


class LatestIn(MlflowIn):
    """The stages of which the newest versions are asked for; all of them when there are none."""

    name: _Text
    stages: list[_Text] = Field(default=[], max_length=10)


class ModelTagIn(MlflowIn):
    """A tag of a registered model."""

    name: _Text
    key: _Text
    value: _Text = ""


class ModelAliasIn(MlflowIn):
    """An alias of a registered model."""

    name: _Text
    alias: _Text
    version: _Number | None = None


class CreateVersionIn(MlflowIn):
    """A version to make of what was uploaded, of another version, or of what a job wrote."""

    name: _Text
    source: _Text = Field(
        description="`mlflow-artifacts:/PATH` that was uploaded, `models:/NAME/VERSION`, or `runs:/JOB/PATH` of a job."
    )
    run_id: _Text = ""
    description: _Text = ""
    tags: list[TagIn] = Field(default=[], max_length=1_000)


class VersionIn(MlflowIn):
    """A version, with what is to be said of it."""

    name: _Text
    version: _Number
    description: _Text | None = None


class VersionTagIn(MlflowIn):
    """A tag of a version."""

    name: _Text
    version: _Number
    key: _Text
    value: _Text = ""


class TransitionIn(MlflowIn):
    """The stage that a version is to go into. One at a time is in Staging and Production: another one that was there
    is archived, or with ``archive_existing_versions`` false is in no stage."""

    name: _Text
    version: _Number
    stage: _Text
    archive_existing_versions: bool = False


# -- registered models ----------------------------------------------------------------------------------------------


@routes.post(f"{_API}/registered-models/create", allow=Scope.SUBMIT, body=RegisteredModelIn, answer=dict[str, Any])
async def mlflow_create_registered_model(call: Caller) -> Response:
    """Register a model by name, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], RegisteredModelIn)

    def make() -> dict[str, Any]:
        project, models = _project(call), call.plane.models
        tags = [(tag.key, tag.value) for tag in given.tags]
        made = models.register(
            project, given.name, by=call.identity.name, description=given.description or "", tags=tags
        )
        return {"registered_model": _model(call, made)}

    return json_answer(await blocking(make))


@routes.get(f"{_API}/registered-models/get", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_get_registered_model(call: Caller) -> Response:
    """Get a registered model, as MLflow's clients ask for it: `?name=`."""
    name = _asked(call, "name")
    return json_answer(
        await blocking(lambda: {"registered_model": _model(call, call.plane.models.find(_project(call), name))})
    )


@routes.get(f"{_API}/registered-models/search", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_search_registered_models(call: Caller) -> Response:
    """Search registered models by MLflow's filters: `?filter=&order_by=&max_results=&page_token=`."""

    def search() -> dict[str, Any]:
        models = call.plane.models.all(_project(call))
        named = {model.name: model for model in models}
        things = [
            Found(
                {
                    "name": model.name,
                    "creation_timestamp": _ms(model.created_ns),
                    "last_updated_timestamp": _ms(model.changed_ns),
                },
                dict(model.tags),
            )
            for model in models
        ]
        keys = ("name", "creation_timestamp", "last_updated_timestamp", "timestamp")
        page, token = _searched(call, things, keys, usual=("name ASC",), most=100)
        found = {"registered_models": [_model(call, named[str(one.attributes["name"])]) for one in page]}
        return found | ({"next_page_token": token} if token else {})

    return json_answer(await blocking(search))


@routes.post(f"{_API}/registered-models/rename", allow=Scope.SUBMIT, body=RenameIn, answer=dict[str, Any])
async def mlflow_rename_registered_model(call: Caller) -> Response:
    """Give a registered model another name, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], RenameIn)

    def rename() -> dict[str, Any]:
        project, models = _project(call), call.plane.models
        model = models.rename(project, models.find(project, given.name), given.new_name, by=call.identity.name)
        return {"registered_model": _model(call, model)}

    return json_answer(await blocking(rename))


@routes.patch(f"{_API}/registered-models/update", allow=Scope.SUBMIT, body=RegisteredModelIn, answer=dict[str, Any])
async def mlflow_update_registered_model(call: Caller) -> Response:
    """Describe a registered model anew, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], RegisteredModelIn)

    def update() -> dict[str, Any]:
        models = call.plane.models
        model = models.describe(models.find(_project(call), given.name), description=given.description or "")
        return {"registered_model": _model(call, model)}

    return json_answer(await blocking(update))


@routes.delete(f"{_API}/registered-models/delete", allow=Scope.SUBMIT, body=RegisteredModelIn, answer=dict[str, Any])
async def mlflow_delete_registered_model(call: Caller) -> Response:
    """Delete a registered model with all its versions, as MLflow's clients ask for it; refused while one is needed."""
    given = checked((await json_object(call.request))[0], RegisteredModelIn)
    models = call.plane.models
    await blocking(lambda: models.delete(models.find(_project(call), given.name), by=call.identity.name))
    return json_answer({})


@routes.post(f"{_API}/registered-models/get-latest-versions", allow=Scope.READ, body=LatestIn, answer=dict[str, Any])
async def mlflow_latest_versions(call: Caller) -> Response:
    """Get the newest version in each stage, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], LatestIn)
    return json_answer(await blocking(_latest, call, given.name, given.stages))


@routes.get(f"{_API}/registered-models/get-latest-versions", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_latest_versions_by_query(call: Caller) -> Response:
    """Get the newest version in each stage, as MLflow's older clients ask for it: `?name=&stages=`."""
    name, stages = _asked(call, "name"), call.request.query_params.getlist("stages")
    return json_answer(await blocking(_latest, call, name, stages))


@routes.post(f"{_API}/registered-models/set-tag", allow=Scope.SUBMIT, body=ModelTagIn, answer=dict[str, Any])
async def mlflow_set_model_tag(call: Caller) -> Response:
    """Set a tag of a registered model, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], ModelTagIn)
    models = call.plane.models
    await blocking(lambda: models.describe(models.find(_project(call), given.name), tags={given.key: given.value}))
    return json_answer({})


@routes.delete(f"{_API}/registered-models/delete-tag", allow=Scope.SUBMIT, body=ModelTagIn, answer=dict[str, Any])
async def mlflow_delete_model_tag(call: Caller) -> Response:
    """Take a tag of a registered model away, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], ModelTagIn)
    models = call.plane.models
    await blocking(lambda: models.describe(models.find(_project(call), given.name), tags={given.key: None}))
    return json_answer({})


@routes.post(f"{_API}/registered-models/alias", allow=Scope.SUBMIT, body=ModelAliasIn, answer=dict[str, Any])
async def mlflow_set_alias(call: Caller) -> Response:
    """Have an alias point to a version, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], ModelAliasIn)

    def point() -> None:
        if given.version is None:
            raise InvalidRequest("It does not say which version.", field="version", mend="Send its number.")
        model, version = _version(call, given.name, given.version)
        call.plane.models.point(model, given.alias, version.number, by=call.identity.name)

    await blocking(point)
    return json_answer({})


@routes.get(f"{_API}/registered-models/alias", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_version_by_alias(call: Caller) -> Response:
    """Get the version that an alias points to, as MLflow's clients ask for it: `?name=&alias=`."""
    name, alias = _asked(call, "name"), _asked(call, "alias")

    def find() -> dict[str, Any]:
        model, version = call.plane.models.version(_project(call), ModelReference(name=name, alias=alias))
        return {"model_version": _version_json(model, version)}

    return json_answer(await blocking(find))


@routes.delete(f"{_API}/registered-models/alias", allow=Scope.SUBMIT, body=ModelAliasIn, answer=dict[str, Any])
async def mlflow_delete_alias(call: Caller) -> Response:
    """Take an alias away, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], ModelAliasIn)
    models = call.plane.models
    await blocking(lambda: models.unpoint(models.find(_project(call), given.name), given.alias, by=call.identity.name))
    return json_answer({})


# -- versions -------------------------------------------------------------------------------------------------------


@routes.post(f"{_API}/model-versions/create", allow=Scope.SUBMIT, body=CreateVersionIn, answer=dict[str, Any])
async def mlflow_create_model_version(call: Caller) -> Response:
    """Make a version of what was uploaded, of another version, or of what a job wrote, as MLflow's clients ask for it.

    All files are looked at. Pickles need the tag `tidemill.allow_pickle` to be `true`, and the project's policy.
    """
    given = checked((await json_object(call.request))[0], CreateVersionIn)

    def make() -> dict[str, Any]:
        project, models = _project(call), call.plane.models
        models.find(project, given.name)
        manifest, lineage = _source(call, given, project)
        tags = {tag.key: tag.value for tag in given.tags}
        allows = tags.pop(_ALLOW_PICKLES, "").lower() == "true"
        model, version = models.add(
            project,
            given.name,
            NewVersion(
                manifest=manifest,
                by=call.identity.name,
                description=given.description,
                tags=tuple(tags.items()),
                lineage=lineage,
                allow_pickles=allows,
                is_admin=call.identity.allows(Scope.ADMIN),
                always=True,
            ),
        )
        return {"model_version": _version_json(model, version)}

    async def answer() -> Response:
        return json_answer(await blocking(make))

    whole = f"mlflow\0{given.model_dump_json()}".encode()
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, whole, answer)


@routes.get(f"{_API}/model-versions/get", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_get_model_version(call: Caller) -> Response:
    """Get a version, as MLflow's clients ask for it: `?name=&version=`."""
    name, number = _asked(call, "name"), _asked(call, "version")
    return json_answer(await blocking(lambda: {"model_version": _version_json(*_version(call, name, number))}))


@routes.get(f"{_API}/model-versions/search", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_search_model_versions(call: Caller) -> Response:
    """Search versions by MLflow's filters: `?filter=&order_by=&max_results=&page_token=`."""

    def search() -> dict[str, Any]:
        models = call.plane.models
        known = {}
        things = []
        for model in models.all(_project(call)):
            for version in models.versions(model):
                key = f"{model.name}\0{version.number}"
                known[key] = (model, version)
                things.append(
                    Found(
                        {
                            "name": model.name,
                            "version_number": version.number,
                            "run_id": version.lineage.run or version.lineage.job_id,
                            "source": version.lineage.source,
                            "creation_timestamp": _ms(version.created_ns),
                            "last_updated_timestamp": _ms(_changed_ns(model, version)),
                            "key": key,
                        },
                        dict(version.tags),
                    )
                )
        keys = ("name", "version_number", "creation_timestamp", "last_updated_timestamp")
        usual = ("last_updated_timestamp DESC", "name ASC", "version_number DESC")
        page, token = _searched(call, things, keys, usual=usual, most=10_000)
        found = {"model_versions": [_version_json(*known[str(one.attributes["key"])]) for one in page]}
        return found | ({"next_page_token": token} if token else {})

    return json_answer(await blocking(search))


@routes.get(f"{_API}/model-versions/get-download-uri", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_download_uri(call: Caller) -> Response:
    """Get where the files of a version are, as MLflow's clients ask for it: `?name=&version=`."""
    name, number = _asked(call, "name"), _asked(call, "version")
    model, version = await blocking(_version, call, name, number)
    base = call.request.url.replace(path=_FILES, query="", fragment="")
    return json_answer({"artifact_uri": f"{base}/{_OF_VERSIONS}/{quote(model.name)}/{version.number}"})


@routes.patch(f"{_API}/model-versions/update", allow=Scope.SUBMIT, body=VersionIn, answer=dict[str, Any])
async def mlflow_update_model_version(call: Caller) -> Response:
    """Describe a version anew, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], VersionIn)

    def update() -> dict[str, Any]:
        model, version = _version(call, given.name, given.version)
        after = call.plane.models.describe_version(version, description=given.description or "")
        return {"model_version": _version_json(model, after)}

    return json_answer(await blocking(update))


@routes.delete(f"{_API}/model-versions/delete", allow=Scope.SUBMIT, body=VersionIn, answer=dict[str, Any])
async def mlflow_delete_model_version(call: Caller) -> Response:
    """Delete a version, as MLflow's clients ask for it; refused while it is needed."""
    given = checked((await json_object(call.request))[0], VersionIn)

    def delete() -> None:
        model, version = _version(call, given.name, given.version)
        call.plane.models.delete_version(model, version, by=call.identity.name)

    await blocking(delete)
    return json_answer({})


@routes.post(f"{_API}/model-versions/transition-stage", allow=Scope.SUBMIT, body=TransitionIn, answer=dict[str, Any])
async def mlflow_transition_stage(call: Caller) -> Response:
    """Put a version into a stage, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], TransitionIn)

    def promote() -> dict[str, Any]:
        model, version = _version(call, given.name, given.version)
        displaced = Stage.ARCHIVED if given.archive_existing_versions else Stage.NONE
        stage = _stage(given.stage)
        after = call.plane.models.promote(model, version.number, stage, by=call.identity.name, displaced=displaced)
        return {"model_version": _version_json(after, version)}

    return json_answer(await blocking(promote))


@routes.post(f"{_API}/model-versions/set-tag", allow=Scope.SUBMIT, body=VersionTagIn, answer=dict[str, Any])
async def mlflow_set_version_tag(call: Caller) -> Response:
    """Set a tag of a version, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], VersionTagIn)
    await blocking(_tag_version, call, given.name, given.version, {given.key: given.value})
    return json_answer({})


@routes.delete(f"{_API}/model-versions/delete-tag", allow=Scope.SUBMIT, body=VersionTagIn, answer=dict[str, Any])
async def mlflow_delete_version_tag(call: Caller) -> Response:
    """Take a tag of a version away, as MLflow's clients ask for it."""
    given = checked((await json_object(call.request))[0], VersionTagIn)
    await blocking(_tag_version, call, given.name, given.version, {given.key: None})
    return json_answer({})


# -- files ----------------------------------------------------------------------------------------------------------


@routes.get("/mlflow/api/3.0/mlflow/server-info", allow=Scope.READ, answer=dict[str, Any])
async def mlflow_server_info(call: Caller) -> Response:
    """Say what this is to MLflow's clients: workspaces are projects."""
    del call
    return json_answer({"store_type": "tidemill", "workspaces_enabled": True})


@routes.get(_FILES, allow=Scope.READ, answer=dict[str, Any])
async def mlflow_list_artifacts(call: Caller) -> Response:
    """List files that were uploaded, or those of a version below `models/NAME/VERSION`: `?path=`."""
    path = call.request.query_params.get("path", "").strip("/")

    def look() -> dict[str, Any]:
        return {"files": _entries(_files(call, path), path)}

    return json_answer(await blocking(look))


@routes.get(f"{_FILES}/{{path:path}}", allow=Scope.READ, media=("application/octet-stream",))
async def mlflow_get_artifact(call: Caller, path: str) -> Response:
    """Get a file that was uploaded, or that of a version below `models/NAME/VERSION`."""

    def find() -> str:
        plain = path.strip("/")
        found = _files(call, plain)
        name = plain.rpartition("/")[2]
        if len(found) != 1 or name not in found:
            raise missing("file", path)
        files = call.plane.models.files(_project(call).id)
        files.size(found[name].digest)
        return str(files.path(found[name].digest))

    return FileResponse(await blocking(find), media_type="application/octet-stream")


@routes.put(f"{_FILES}/{{path:path}}", allow=Scope.SUBMIT, body="application/octet-stream", answer=dict[str, Any])
async def mlflow_put_artifact(call: Caller, path: str) -> Response:
    """Upload a file to a path, from which a version can be made; it goes after a week unless one is."""
    limit = parse_size(call.plane.settings.model_limit)
    check_length(call.request, limit)

    def look() -> Project:
        if path.strip("/").partition("/")[0] == _OF_VERSIONS:
            mend = "Choose another path, and make a version with it as source."
            raise InvalidRequest("Files of versions do not change.", field="path", value=path[:200], mend=mend)
        project = _project(call)
        call.plane.models.uploads(project.id, path)
        if not path.strip("/"):
            raise InvalidRequest("It does not say where to.", field="path", mend="Write a path.")
        return project

    project = await blocking(look)
    draft = await blocking(call.plane.models.files(project.id).draft().__enter__)
    try:
        await write_draft(call.request, draft, limit)
        size = await blocking(draft.commit)
    finally:
        await run_in_threadpool(draft.__exit__)
    await blocking(call.plane.models.put_upload, project.id, path, draft.digest, size)
    return json_answer({})


@routes.delete(f"{_FILES}/{{path:path}}", allow=Scope.SUBMIT, answer=dict[str, Any])
async def mlflow_delete_artifact(call: Caller, path: str) -> Response:
    """Remove what was uploaded at or below a path."""
    plain = path.strip("/")
    if plain.partition("/")[0] == _OF_VERSIONS or not plain:
        raise InvalidRequest("Only what was uploaded is removed here.", field="path", value=path[:200])

    def remove() -> None:
        models, project = call.plane.models, _project(call)
        if not models.uploads(project.id, plain):
            raise missing("file", path)
        models.remove_uploads(project.id, plain)

    await blocking(remove)
    return json_answer({})


# -- what they have in common ---------------------------------------------------------------------------------------


def _project(call: Call) -> Project:
    """The project that is meant: MLflow calls it the workspace. Raises: NotFound."""
    return call.project(call.request.headers.get(_WORKSPACE, ""))


def _asked(call: Call, name: str) -> str:
    value = call.request.query_params.get(name, "")
    if not value or "\0" in value:
        raise InvalidRequest(f"{name} is needed.", field=name, mend=f"Send {name} in the query.")
    return value


def _version(call: Call, name: str, number: str) -> tuple[Model, ModelVersion]:
    if not (number.isascii() and number.isdigit() and len(number) <= 9 and int(number)):
        raise InvalidRequest("That is no version's number.", field="version", value=number[:20], mend="Write 3.")
    return call.plane.models.version(_project(call), ModelReference(name=name, number=int(number)))


def _tag_version(call: Call, name: str, number: str, tags: dict[str, str | None]) -> None:
    call.plane.models.describe_version(_version(call, name, number)[1], tags=tags)


def _stage(name: str) -> Stage:
    try:
        return Stage(name.lower())
    except ValueError:
        mend = f"Write one of {', '.join(_STAGES.values())}."
        raise InvalidRequest("There is no such stage.", field="stage", value=name[:100], mend=mend) from None


def _latest(call: Call, name: str, stages: Sequence[str]) -> dict[str, Any]:
    models = call.plane.models
    model = models.find(_project(call), name)
    wanted = {_stage(one) for one in stages} or set(Stage)
    found: dict[Stage, ModelVersion] = {}
    for version in models.versions(model):
        found.setdefault(model.placing(version.number).stage, version)
    return {"model_versions": [_version_json(model, it) for stage, it in found.items() if stage in wanted]}


def _searched(
    call: Call, things: list[Found], keys: Sequence[str], *, usual: Sequence[str], most: int
) -> tuple[list[Found], str]:
    """A page of what is asked for, in its order, and the token of the next one. Raises: InvalidRequest."""
    query = call.request.query_params
    try:
        test = filter_of(query.get("filter", ""))
        ordered = order_of([*query.getlist("order_by"), *usual], keys)
    except ValueError as error:
        mend = "Write for example name = 'tiny' AND tags.kind = 'x', and order_by name ASC."
        raise InvalidRequest(f"{error}.", field="filter", mend=mend) from error
    given, token = query.get("max_results", "") or str(most), query.get("page_token", "") or "0"
    for name, value in (("max_results", given), ("page_token", token)):
        if not (value.isascii() and value.isdigit() and len(value) <= 9):
            raise InvalidRequest("That is no number.", field=name, value=value[:40], mend="Leave it out.")
    size, start = int(given), int(token)
    if not 0 < size <= _MOST:
        raise InvalidRequest(f"It is not from 1 to {_MOST:,}.", field="max_results", value=size, mend="Ask for fewer.")
    found = ordered([one for one in things if test(one)])
    return found[start : start + size], str(start + size) if start + size < len(found) else ""


def _files(call: Call, path: str) -> dict[str, DataFile]:
    """The files at or below a path, by their paths below it; one at the path itself by its name."""
    models, project = call.plane.models, _project(call)
    parts = path.split("/", 3)
    if parts[0] != _OF_VERSIONS:
        return models.uploads(project.id, path)
    if len(parts) < 3:
        raise NotFound("There is nothing there.", field="path", value=path[:200], mend="Name models/NAME/VERSION.")
    _, version = _version(call, unquote(parts[1]), parts[2])
    files = {file.path: file for file in models.manifest(version).files}
    if len(parts) < 4:
        return files
    if parts[3] in files:
        return {parts[3].rpartition("/")[2]: files[parts[3]]}
    inner = f"{parts[3]}/"
    return {name.removeprefix(inner): file for name, file in files.items() if name.startswith(inner)}


def _entries(files: dict[str, DataFile], path: str) -> list[dict[str, Any]]:
    """What is right below a path, as MLflow lists it; nothing for a file."""
    if set(files) == {path.rpartition("/")[2]}:
        return []
    found: dict[str, dict[str, Any]] = {}
    for name, file in sorted(files.items()):
        first, slash, _ = name.partition("/")
        size = {} if slash else {"file_size": file.size}
        found.setdefault(first, {"path": first, "is_dir": bool(slash), **size})
    return list(found.values())


def _source(call: Call, given: CreateVersionIn, project: Project) -> tuple[Manifest, Lineage]:
    """The files that a version is to be made of, and where they come from. Raises: InvalidRequest, NotFound."""
    models, lineage = call.plane.models, _lineage(call, given)
    source = given.source
    if source.startswith(SCHEME):
        try:
            reference = parse_model_reference(source)
        except ValueError as error:
            raise InvalidRequest(f"{error}.", field="source", value=source[:200]) from error
        model, version = models.version(project, reference)
        named = f"{SCHEME}{model.name}/{version.number}"
        return models.manifest(version), lineage_from(lineage if given.run_id else version.lineage, named)
    if source.startswith(_RUN):
        job, _, path = source.removeprefix(_RUN).partition("/")
        row = find_job(call, job, project.name)
        folder = output_path(call, row.job, path)
        return models.take_folder(project.id, folder), models.lineage(row, run=row.job.id, source=source)
    parts = urlsplit(source)
    path = unquote(parts.path)
    if parts.scheme in ("http", "https") and f"{_FILES}/" in path:
        path = path.partition(f"{_FILES}/")[2]
    elif parts.scheme != "mlflow-artifacts":
        mend = "Upload the files first, to mlflow-artifacts:/PATH, and name that; or tidemill model push."
        raise InvalidRequest("Its files are not here.", field="source", value=source[:200], mend=mend)
    files = _files(call, path.strip("/"))
    if not files:
        mend = "Upload the files there first."
        raise InvalidRequest("There is nothing at that path.", field="source", value=source[:200], mend=mend)
    try:
        manifest = manifest_of(DataFile(name, file.size, file.digest) for name, file in files.items())
    except ValueError as error:
        raise InvalidRequest(f"That cannot be a model: {error}.", field="source", value=source[:200]) from error
    return manifest, lineage_from(lineage, source)


def _lineage(call: Call, given: CreateVersionIn) -> Lineage:
    """The job that the run is, when it is one."""
    if given.run_id.startswith("job_"):
        row = call.plane.store.job(JobId(given.run_id))
        if row is not None and row.job.project_id == _project(call).id:
            return call.plane.models.lineage(row, run=given.run_id)
    return Lineage(run=given.run_id)


def _ms(instant_ns: int) -> int:
    return instant_ns // 1_000_000


def _changed_ns(model: Model, version: ModelVersion) -> int:
    return max(version.changed_ns, version.created_ns, model.placing(version.number).since_ns)


def _tags(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in pairs]


def _model(call: Call, model: Model) -> dict[str, Any]:
    newest: dict[Stage, ModelVersion] = {}
    for version in call.plane.models.versions(model):
        newest.setdefault(model.placing(version.number).stage, version)
    return {
        "name": model.name,
        "creation_timestamp": _ms(model.created_ns),
        "last_updated_timestamp": _ms(model.changed_ns),
        "user_id": model.created_by,
        "description": model.description,
        "latest_versions": [_version_json(model, version) for version in newest.values()],
        "tags": _tags(model.tags),
        "aliases": [{"alias": one.name, "version": str(one.number)} for one in model.aliases],
    }


def _version_json(model: Model, version: ModelVersion) -> dict[str, Any]:
    return {
        "name": model.name,
        "version": str(version.number),
        "creation_timestamp": _ms(version.created_ns),
        "last_updated_timestamp": _ms(_changed_ns(model, version)),
        "user_id": version.created_by,
        "current_stage": _STAGES[model.placing(version.number).stage.value],
        "description": version.description,
        "source": version.lineage.source,
        "run_id": version.lineage.run or version.lineage.job_id,
        "status": "READY",
        "tags": _tags(version.tags),
        "aliases": list(model.aliases_of(version.number)),
    }
