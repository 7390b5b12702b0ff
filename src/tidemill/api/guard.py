"""Who may use which route: each is declared with the scopes that open it, and nothing opens without.

``Routes.get`` and its like are the one way to declare a route. A ``GuardedRoute`` asks for the token and its scopes
before anything of the request is read; it cannot be made without a policy. The decision is made on the route
that was matched, never on the text of an address.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

from fastapi import Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from tidemill.api.problems import problem
from tidemill.errors import Forbidden, InvalidRequest, NotFound, TidemillError, Unauthorized
from tidemill.model.ids import ProjectId
from tidemill.model.tenant import Project, Scope

if TYPE_CHECKING:
    from tidemill.api.follow import Hub
    from tidemill.api.once import Once
    from tidemill.api.tls import Certificate
    from tidemill.control.identity import Identity
    from tidemill.control.plane import ControlPlane

Answer = TypeVar("Answer")
Endpoint = Callable[..., Coroutine[Any, Any, Response]]
Refused = Callable[[TidemillError], Response]
OPEN: Final[tuple[Scope, ...]] = ()
"""The policy of a route that needs no token."""
_KEY_LENGTH: Final = 200


@dataclass(frozen=True, slots=True)
class Services:
    """What routes work with."""

    plane: ControlPlane
    hub: Hub
    once: Once
    certificate: Certificate | None = None
    """What the API shows to other machines; None: it speaks HTTP."""


class Call:
    """One request, and who sends it."""

    __slots__ = ("_identity", "plane", "request", "services")

    def __init__(self, request: Request, services: Services, identity: Identity | None) -> None:
        self.request = request
        self.services = services
        self.plane = services.plane
        self._identity = identity

    @property
    def identity(self) -> Identity:
        """Who asks. Raises: Unauthorized on a route that needs no token."""
        if self._identity is None:
            raise Unauthorized
        return self._identity

    @property
    def idempotency_key(self) -> str:
        """The client's Idempotency-Key, empty when there is none. Raises: InvalidRequest when it cannot be one."""
        key = self.request.headers.get("idempotency-key", "")
        if len(key) > _KEY_LENGTH or not (key.isascii() and key.isprintable()):
            raise InvalidRequest(
                "The Idempotency-Key is not 1 to 200 printable characters.",
                field="Idempotency-Key",
                value=key[:200],
                mend="Use for example a UUID.",
            )
        return key

    def project(self, name: str) -> Project:
        """The project of that name or id; without a name the only or the default one. Raises: NotFound."""
        return self.plane.projects.find(self.identity, _clean(name, "project"))

    def visible_projects(self, name: str = "") -> tuple[ProjectId, ...]:
        """The ids of the named project, or of all that the caller may see."""
        if name:
            return (self.project(name).id,)
        return tuple(project.id for project in self.plane.projects.of(self.identity))

    def project_name(self, project_id: ProjectId) -> str:
        """The name of a project that the caller may see; its id when it is gone."""
        for project in self.plane.projects.of(self.identity):
            if project.id == project_id:
                return project.name
        return project_id


def _clean(text: str, field: str) -> str:
    if "\0" in text:
        raise InvalidRequest("It has a NUL character in it.", field=field)
    return text


def _call_of(request: Request) -> Call:
    call: Call = request.scope["tidemill.call"]
    return call


Caller = Annotated[Call, Depends(_call_of)]


async def blocking(function: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
    """What ``function`` returns, computed in a thread so that other requests go on."""
    return await run_in_threadpool(function, *arguments, **named)


async def durable(future: Future[Answer]) -> Answer:
    """The future's value; when the request goes away, what it led to still happens."""
    return await asyncio.shield(asyncio.wrap_future(future))


class GuardedRoute(APIRoute):
    """A route with a policy. ``policy`` lists the scopes any one of which opens it."""

    def __init__(
        self,
        path: str,
        endpoint: Endpoint,
        *,
        policy: tuple[Scope, ...],
        body: Any = None,
        refused: Refused = problem,
        **named: Any,
    ) -> None:
        super().__init__(path, endpoint, **named)
        self.policy = policy
        self.body_model: type[BaseModel] | str | None = body
        parameters = set(inspect.signature(endpoint).parameters)
        in_path = {name for name in parameters if f"{{{name}}}" in path or f"{{{name}:path}}" in path}
        is_plain = parameters - in_path <= {"call"}
        self.app = _guarded(
            self.app, endpoint if is_plain else None, policy, takes_call="call" in parameters, refused=refused
        )


def _guarded(
    framework: ASGIApp, endpoint: Endpoint | None, policy: tuple[Scope, ...], *, takes_call: bool, refused: Refused
) -> ASGIApp:
    """The route behind its policy; ``endpoint`` is called directly when it takes nothing but the path's parts."""

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            services: Services = scope["app"].state.services
            call = Call(request, services, _admitted(scope, services.plane, policy) if policy else None)
            if endpoint is None:
                scope["tidemill.call"] = call
                await framework(scope, receive, send)
                return
            named = {"call": call} if takes_call else {}
            response = await endpoint(**named, **scope["path_params"])
        except TidemillError as error:
            response = refused(error)
        await response(scope, receive, send)

    return app


def _admitted(scope: AsgiScope, plane: ControlPlane, policy: tuple[Scope, ...]) -> Identity:
    identity = plane.directory.authenticate(_token(scope), now=plane.now())
    plane.check_leads()
    for allowed in policy:
        if identity.allows(allowed):
            return identity
    identity.require(policy[0])
    raise Forbidden


def _token(scope: AsgiScope) -> str:
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) == 1:
        kind, _, token = found[0].decode("latin-1").partition(" ")
        if kind.lower() == "bearer" and token.strip():
            return str(token.strip())
    raise Unauthorized(
        "This address needs a token.", field="Authorization", mend="Send the header Authorization: Bearer tm_…"
    )


class Routes:
    """The routes of one noun."""

    def __init__(self, tag: str, *, refused: Refused = problem) -> None:
        """``refused`` makes the answer to an error."""
        self.tag = tag
        self._refused = refused
        self.items: list[GuardedRoute] = []

    def get(self, path: str, *, allow: Scope | tuple[Scope, ...], **named: Any) -> Callable[[Endpoint], Endpoint]:
        """Declare what answers GET at ``path``; likewise the others."""
        return self._declare("GET", path, allow, **named)

    def head(self, path: str, *, allow: Scope | tuple[Scope, ...], **named: Any) -> Callable[[Endpoint], Endpoint]:
        """See ``get``."""
        return self._declare("HEAD", path, allow, **named)

    def post(self, path: str, *, allow: Scope | tuple[Scope, ...], **named: Any) -> Callable[[Endpoint], Endpoint]:
        """See ``get``."""
        return self._declare("POST", path, allow, **named)

    def put(self, path: str, *, allow: Scope | tuple[Scope, ...], **named: Any) -> Callable[[Endpoint], Endpoint]:
        """See ``get``."""
        return self._declare("PUT", path, allow, **named)

    def patch(self, path: str, *, allow: Scope | tuple[Scope, ...], **named: Any) -> Callable[[Endpoint], Endpoint]:
        """See ``get``."""
        return self._declare("PATCH", path, allow, **named)

    def delete(self, path: str, *, allow: Scope | tuple[Scope, ...], **named: Any) -> Callable[[Endpoint], Endpoint]:
        """See ``get``."""
        return self._declare("DELETE", path, allow, **named)

    def _declare(
        self,
        method: str,
        path: str,
        allow: Scope | tuple[Scope, ...],
        *,
        answer: Any = None,
        status: int = 200,
        body: type[BaseModel] | str | None = None,
        media: Sequence[str] = (),
        responses: Mapping[int | str, dict[str, Any]] | None = None,
        tag: str = "",
    ) -> Callable[[Endpoint], Endpoint]:
        """``answer`` is the shape of the answer, ``media`` its types when it is not JSON, ``body`` what is sent."""
        policy = allow if isinstance(allow, tuple) else (allow,)

        def declared(endpoint: Endpoint) -> Endpoint:
            documented = dict(responses or {})
            if media:
                documented[status] = {
                    "description": "Octets",
                    "content": {kind: {"schema": {"type": "string"}} for kind in media},
                }
            self.items.append(
                GuardedRoute(
                    path,
                    endpoint,
                    policy=policy,
                    body=body,
                    refused=self._refused,
                    methods=[method],
                    response_model=answer,
                    response_class=Response if answer is None else _Json,
                    status_code=status,
                    tags=[tag or self.tag],
                    operation_id=endpoint.__name__,
                    summary=(endpoint.__doc__ or "").strip().split("\n")[0].rstrip("."),
                    responses=documented or None,
                )
            )
            return endpoint

        return declared


class _Json(Response):
    media_type = "application/json"


async def unless_gone(call: Call, awaited: Awaitable[Answer]) -> Answer | None:
    """What is awaited; None when the client hung up first, and then it is cancelled."""
    work = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(hung_up(call.request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def hung_up(request: Request) -> None:
    """Nothing, once the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def missing(what: str, reference: str) -> NotFound:
    """The answer for what is not there, and equally for what is another's."""
    return NotFound(f"There is no {what} {reference[:100]}.", field=what, value=reference[:100])
