"""Volumes and data sets, and the files of data sets for runners."""

from __future__ import annotations

import re
from typing import Any, Final

from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from tidemill.api.bodies import body_of, json_answer
from tidemill.api.guard import Call, Caller, Routes, blocking, missing
from tidemill.api.jobs import ProjectName
from tidemill.api.runners import own_launch
from tidemill.api.shapes.common import PageOf
from tidemill.api.shapes.data import DataSetIn, DataSetOut, VolumeIn, VolumeOut
from tidemill.control.datasets import Content
from tidemill.control.identity import administer
from tidemill.errors import InvalidRequest
from tidemill.model.storage import DataSet, Volume
from tidemill.model.tenant import Project, Scope

routes = Routes("datasets")
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-")


@routes.get("/v1/volumes", allow=Scope.READ, answer=PageOf[VolumeOut])
async def list_volumes(call: Caller, project: ProjectName = "") -> Response:
    """List a project's volumes, by name."""

    def page() -> dict[str, Any]:
        found = call.project(project)
        items = [_volume_json(call, volume, found) for volume in call.plane.store.volumes(found.id)]
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.post("/v1/volumes", allow=Scope.ADMIN, status=201, body=VolumeIn, answer=VolumeOut)
async def create_volume(call: Caller) -> Response:
    """Give a folder of a site a name, by which jobs of a project have it mounted. Harmless to repeat."""
    given = await body_of(call.request, VolumeIn)

    def make() -> VolumeOut:
        administer(call.identity)
        project = call.project(given.project)
        volume = call.plane.data.create_volume(
            project,
            given.name,
            given.path,
            site=given.site,
            node=given.node,
            read_only=given.read_only,
            by=call.identity.name,
        )
        return _volume_json(call, volume, project)

    return json_answer(await blocking(make), 201)


@routes.get("/v1/volumes/{name}", allow=Scope.READ, answer=VolumeOut)
async def get_volume(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Get a volume."""

    def find() -> VolumeOut:
        found = call.project(project)
        return _volume_json(call, call.plane.data.volume(found, _plain(name, "volume")), found)

    return json_answer(await blocking(find))


@routes.delete("/v1/volumes/{name}", allow=Scope.ADMIN, answer=VolumeOut)
async def delete_volume(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Take a volume's name away, once no job uses it. Its files stay."""

    def delete() -> VolumeOut:
        administer(call.identity)
        found = call.project(project)
        return _volume_json(call, call.plane.data.delete_volume(found, _plain(name, "volume")), found)

    return json_answer(await blocking(delete))


@routes.get("/v1/datasets", allow=Scope.READ, answer=PageOf[DataSetOut])
async def list_datasets(call: Caller, project: ProjectName = "") -> Response:
    """List a project's data sets, by name, newest version first."""

    def page() -> dict[str, Any]:
        found = call.project(project)
        items = [_dataset_json(call, dataset, found) for dataset in call.plane.store.datasets(found.id)]
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.post("/v1/datasets", allow=Scope.SUBMIT, status=201, body=DataSetIn, answer=DataSetOut)
async def add_dataset(call: Caller) -> Response:
    """Add a version of a data set: a folder of a site, with its manifest uploaded as a blob, or a place in S3.

    A folder, and an S3 other than Amazon's, need the scope `admin`. What is in S3 is read once before it can be used.
    """
    given = await body_of(call.request, DataSetIn)

    def make() -> DataSetOut:
        project = call.project(given.project)
        if given.home.startswith("s3://"):
            if given.site or given.node or given.manifest:
                field = "site" if given.site else "node" if given.node else "manifest"
                mend = "Leave it out: S3 is of no site, and is read by the control plane."
                raise InvalidRequest("What is in S3 does not have that.", field=field, mend=mend)
            if given.endpoint:
                administer(call.identity)
            dataset = call.plane.data.add_bucket(
                project,
                given.name,
                given.home,
                endpoint=given.endpoint,
                region=given.region,
                secret=given.secret,
                by=call.identity.name,
            )
        else:
            administer(call.identity)
            if given.endpoint or given.region or given.secret:
                field = "endpoint" if given.endpoint else "region" if given.region else "secret"
                raise InvalidRequest("A folder does not have that.", field=field, mend="Write home as s3://bucket/….")
            dataset = call.plane.data.add_folder(
                project,
                given.name,
                given.home,
                site=given.site,
                node=given.node,
                digest=given.manifest,
                by=call.identity.name,
            )
        return _dataset_json(call, dataset, project)

    async def answer() -> Response:
        return json_answer(await blocking(make), 201)

    whole = f"dataset\0{given.model_dump_json()}".encode()
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, whole, answer)


@routes.get("/v1/datasets/{reference}", allow=Scope.READ, answer=DataSetOut)
async def get_dataset(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Get a data set by `name`, its newest version, or by `name:version`."""

    def find() -> DataSetOut:
        found = call.project(project)
        return _dataset_json(call, call.plane.data.find(found, reference), found)

    return json_answer(await blocking(find))


@routes.get("/v1/datasets/{reference}/manifest", allow=Scope.READ, media=("application/json",))
async def dataset_manifest(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Get the list of a data set's files: path, size, SHA-256."""

    def find() -> str:
        return str(call.plane.data.manifest_path(call.plane.data.find(call.project(project), reference)))

    return FileResponse(await blocking(find), media_type="application/json")


@routes.post("/v1/datasets/{reference}/verify", allow=Scope.SUBMIT, answer=DataSetOut)
async def verify_dataset(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Have a data set in S3 read again. It is in state `scanning` until then, and what came of it in `detail`."""

    def verify() -> DataSetOut:
        found = call.project(project)
        return _dataset_json(call, call.plane.data.verify(found, reference), found)

    return json_answer(await blocking(verify))


@routes.delete("/v1/datasets/{reference}", allow=Scope.SUBMIT, answer=DataSetOut)
async def delete_dataset(call: Caller, reference: str, project: ProjectName = "") -> Response:
    """Delete a version of a data set, once no job uses it. Its files stay, and its number is not given again."""

    def delete() -> DataSetOut:
        found = call.project(project)
        return _dataset_json(call, call.plane.data.delete(found, reference), found)

    return json_answer(await blocking(delete))


@routes.get("/v1/runners/{launch_id}/data/{manifest}/{digest}", allow=Scope.RUNNER, media=("application/octet-stream",))
async def launch_file(call: Caller, launch_id: str, manifest: str, digest: str, relay: bool = False) -> Response:
    """Get a file of a data set or model that the worker's spec names, from an offset with `Range: bytes=N-`.

    Answered with 307 and an address that is good for an hour when the file is in S3; with `relay` never.
    """
    launch = own_launch(call, launch_id)

    def find() -> Content:
        _, _, job, workload = call.plane.runners.launch(launch)
        mount = next((one for one in workload.spec.data if one.digest == manifest), None)
        if mount is None:
            raise missing("data set", manifest)
        return call.plane.data.content(mount, digest, project=job.project_id, relay=relay)

    return await _content(call, await blocking(find))


async def _content(call: Call, content: Content) -> Response:
    if content.path is not None:
        return FileResponse(content.path, media_type="application/octet-stream")
    if content.address:
        return RedirectResponse(content.address, 307)
    asked = _RANGE.fullmatch(call.request.headers.get("range", ""))
    start = int(asked[1]) if asked else 0
    headers = {"Content-Length": str(max(0, content.size - start))}
    if asked:
        headers["Content-Range"] = f"bytes {start}-{max(start, content.size - 1)}/{content.size}"
    pieces = content.pieces(start) if content.pieces is not None else iter(())
    status = 206 if asked else 200
    return StreamingResponse(pieces, status, headers=headers, media_type="application/octet-stream")


def _plain(name: str, what: str) -> str:
    if "\0" in name:
        raise missing(what, name)
    return name


def _volume_json(call: Call, volume: Volume, project: Project) -> VolumeOut:
    return {
        "id": volume.id,
        "name": volume.name,
        "project": project.name,
        "site": _site_name(call, volume.site_id),
        "node": volume.node,
        "path": volume.path,
        "read_only": volume.read_only,
        "created_at_ns": volume.created_ns,
        "created_by": volume.created_by,
    }


def _dataset_json(call: Call, dataset: DataSet, project: Project) -> DataSetOut:
    return {
        "id": dataset.id,
        "name": dataset.name,
        "version": dataset.version,
        "project": project.name,
        "home": dataset.home,
        "site": _site_name(call, dataset.site_id),
        "node": dataset.node,
        "endpoint": dataset.endpoint,
        "region": dataset.region,
        "secret": dataset.secret,
        "state": dataset.state.value,
        "detail": dataset.detail,
        "digest": dataset.digest,
        "size": dataset.size,
        "files": dataset.files,
        "cached_on": list(call.plane.questions.copies_on(project.id, dataset.digest)),
        "checked_at_ns": dataset.checked_ns,
        "created_at_ns": dataset.created_ns,
        "created_by": dataset.created_by,
    }


def _site_name(call: Call, site_id: str) -> str:
    return next((site.name for site in call.plane.sites.all() if site.id == site_id), site_id)
