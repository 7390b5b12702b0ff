"""Projects, tokens and secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from tidemill import catalog
from tidemill.api.bodies import body_of, json_answer
from tidemill.api.guard import Call, Caller, Routes, blocking, missing
from tidemill.api.jobs import ProjectName
from tidemill.api.shapes.access import ProjectIn, ProjectOut, SecretIn, SecretOut, TokenChangeIn, TokenIn, TokenOut
from tidemill.api.shapes.common import PageOf
from tidemill.control.identity import Inference
from tidemill.errors import InvalidRequest, InvalidSetting
from tidemill.model.ids import ProjectId, TokenId, queue_id
from tidemill.model.limits import Limit, limits_of
from tidemill.model.queue import CPU, GPU
from tidemill.model.tenant import Project, Scope, Token
from tidemill.units import parse_duration

routes = Routes("accounts")
_LONGEST_NS = 3_660 * 86_400 * 1_000_000_000


@routes.get("/v1/projects", allow=Scope.READ, answer=PageOf[ProjectOut])
async def list_projects(call: Caller) -> Response:
    """List the projects that the caller may see."""
    found = await blocking(call.plane.projects.of, call.identity)
    return json_answer({"items": [_project_json(call, project) for project in found], "next_cursor": ""})


@routes.post("/v1/projects", allow=Scope.ADMIN, status=201, body=ProjectIn, answer=ProjectOut)
async def create_project(call: Caller) -> Response:
    """Make a project, or give the one of that name new limits."""
    given = await body_of(call.request, ProjectIn)
    if call.identity.project_ids:
        raise InvalidRequest("A token of one project cannot make others.", field="name", value=given.name)
    made = await blocking(
        call.plane.administration.create_project,
        call.identity,
        given.name,
        limit_gpu_milli=given.limit_gpu_milli,
        limit_cpu_milli=given.limit_cpu_milli,
        limits=None if given.limits is None else _limits(given.limits),
        countries=None if given.countries is None else _countries(given.countries),
    )
    return json_answer(_project_json(call, made), 201)


@routes.get("/v1/tokens", allow=Scope.ADMIN, answer=PageOf[TokenOut])
async def list_tokens(call: Caller) -> Response:
    """List the organization's tokens, without their secret part."""

    def page() -> dict[str, Any]:
        return {"items": [_token_json(call, token) for token in _own_tokens(call)], "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.post("/v1/tokens", allow=Scope.ADMIN, status=201, body=TokenIn, answer=TokenOut)
async def create_token(call: Caller) -> Response:
    """Make a token. The secret is in this answer only."""
    given = await body_of(call.request, TokenIn)
    expires_ns = _expiry(given.expires_in, now=call.plane.now())
    project = call.project(given.project).id if given.project else ProjectId("")
    if not project and call.identity.project_ids:
        project = call.identity.project_ids[0]
    inference = Inference(
        models=tuple(given.models), limits=_limits(given.limits), priority=given.priority, label=given.label
    )

    async def make() -> Response:
        token, secret = await blocking(
            call.plane.access.create_token,
            call.identity,
            name=given.name,
            scopes=tuple(dict.fromkeys(given.scopes)),
            project=project,
            expires_ns=expires_ns,
            inference=inference,
        )
        return json_answer({**_token_json(call, token), "token": secret}, 201)

    whole = f"token\0{given.model_dump_json()}".encode()
    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, whole, make)


@routes.put("/v1/tokens/{token_id}", allow=Scope.ADMIN, body=TokenChangeIn, answer=TokenOut)
async def change_token(call: Caller, token_id: str) -> Response:
    """Change what a token says of requests to models: which it may ask, how much, and when it is its turn."""
    given = await body_of(call.request, TokenChangeIn)
    known = next((token for token in _own_tokens(call) if token.id == token_id), None)
    if known is None:
        raise missing("token", token_id)
    inference = Inference(
        models=known.models if given.models is None else tuple(given.models),
        limits=known.limits if given.limits is None else _limits(given.limits),
        priority=known.priority if given.priority is None else given.priority,
        label=known.label if given.label is None else given.label,
    )
    changed = await blocking(call.plane.access.change_token, call.identity, known.id, inference)
    return json_answer(_token_json(call, changed))


@routes.delete("/v1/tokens/{token_id}", allow=Scope.ADMIN, answer=TokenOut)
async def revoke_token(call: Caller, token_id: str) -> Response:
    """Make a token worthless. Harmless to repeat."""
    if not any(token.id == token_id for token in _own_tokens(call)):
        raise missing("token", token_id)
    await blocking(call.plane.access.revoke_token, call.identity, TokenId(token_id))
    return json_answer(next(_token_json(call, token) for token in _own_tokens(call) if token.id == token_id))


@routes.get("/v1/secrets", allow=Scope.READ, answer=PageOf[SecretOut])
async def list_secrets(call: Caller, project: ProjectName = "") -> Response:
    """List the names of a project's secrets."""

    def page() -> dict[str, Any]:
        found = call.plane.store.secrets(call.project(project).id)
        items = [{"name": secret.name, "updated_at_ns": secret.updated_ns} for secret in found]
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.put("/v1/secrets/{name}", allow=Scope.SUBMIT, body=SecretIn, answer=SecretOut)
async def put_secret(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Store a secret, or replace its value."""
    given = await body_of(call.request, SecretIn)
    await blocking(call.plane.access.put_secret, call.project(project), name, given.value)
    return json_answer({"name": name, "updated_at_ns": call.plane.now()})


@routes.delete("/v1/secrets/{name}", allow=Scope.SUBMIT, status=204)
async def delete_secret(call: Caller, name: str, project: ProjectName = "") -> Response:
    """Delete a secret."""
    if "\0" in name or not await blocking(call.plane.store.delete_secret, call.project(project).id, name):
        raise missing("secret", name)
    return Response(status_code=204)


def _expiry(given: str | int, *, now: int) -> int:
    if given in ("never", "", 0):
        return 0
    try:
        length = parse_duration(given if isinstance(given, int) or len(given) < 65 else "")
    except ValueError as error:
        raise InvalidRequest(
            "That is not a duration.", field="expires_in", value=given, mend="Write for example 90d, or never."
        ) from error
    if not 0 < length <= _LONGEST_NS:
        raise InvalidRequest(
            "A token lives up to 10 years.", field="expires_in", value=given, mend="Write for example 90d, or never."
        )
    return now + length


def _limits(given: Mapping[str, float]) -> tuple[Limit, ...]:
    try:
        return limits_of(given)
    except ValueError as error:
        mend = 'Write for example {"requests/minute": 60, "usd/month": 50}.'
        raise InvalidRequest(f"{error}.", field="limits", value=dict(given), mend=mend) from error


def _countries(given: Sequence[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in given:
        try:
            found.update(dict.fromkeys(catalog.country_codes(text)))
        except InvalidSetting as error:
            raise InvalidRequest(f"{text} is not a country.", field="countries", value=text, mend=error.mend) from error
    return tuple(found)


def limits_json(limits: Sequence[Limit]) -> dict[str, int | float]:
    """Limits as they are written."""
    return {limit.name: limit.written for limit in limits}


def _own_tokens(call: Call) -> list[Token]:
    identity = call.identity
    return [
        token
        for token in call.plane.directory.all()
        if token.organization_id == identity.organization_id
        and (not identity.project_ids or token.project_id in identity.project_ids)
    ]


def _project_json(call: Call, project: Project) -> ProjectOut:
    queue = call.plane.world.queues.get(queue_id(project.id))
    limit = dict(queue.limit) if queue is not None else {}
    return {
        "id": project.id,
        "name": project.name,
        "created_at_ns": project.created_ns,
        "limit_gpu_milli": limit.get(GPU, 0),
        "limit_cpu_milli": limit.get(CPU, 0),
        "limits": limits_json(project.limits),
        "countries": list(project.countries),
    }


def _token_json(call: Call, token: Token) -> TokenOut:
    return {
        "id": token.id,
        "name": token.name,
        "display": token.display,
        "scopes": [scope.value for scope in token.scopes],
        "project": call.project_name(token.project_id) if token.project_id else "",
        "created_at_ns": token.created_ns,
        "expires_at_ns": token.expires_ns,
        "revoked_at_ns": token.revoked_ns,
        "models": list(token.models),
        "limits": limits_json(token.limits),
        "priority": token.priority.value,
        "label": token.label,
    }
