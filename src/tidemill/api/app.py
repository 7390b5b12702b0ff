"""The HTTP application: every route, what guards them, and how errors are answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import override

from tidemill import __version__
from tidemill.api import (
    accounts,
    artifacts,
    datasets,
    execs,
    fleet,
    gatewayfeed,
    jobs,
    mlflow,
    models,
    revisions,
    runners,
    scheduling,
    sites,
    turns,
    workloads,
)
from tidemill.api.bodies import json_answer
from tidemill.api.door import Door
from tidemill.api.follow import Hub
from tidemill.api.guard import OPEN, GuardedRoute, Routes, Services
from tidemill.api.once import Once
from tidemill.api.openapi import document
from tidemill.api.problems import from_validation, on_http_error, on_tidemill_error, problem
from tidemill.errors import TidemillError

if TYPE_CHECKING:
    from tidemill.api.tls import Certificate
    from tidemill.control.plane import ControlPlane
    from tidemill.control.settings import Settings

_NOUNS = (
    workloads,
    revisions,
    runners,
    jobs,
    execs,
    artifacts,
    datasets,
    models,
    mlflow,
    fleet,
    scheduling,
    accounts,
    sites,
    gatewayfeed,
    turns,
)
"""The busiest first: routes are tried in order."""


class App(FastAPI):
    """FastAPI with our own description, which is complete."""

    @override
    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            self.openapi_schema = document(self)
        return self.openapi_schema


def create_app(plane: ControlPlane, certificate: Certificate | None = None) -> FastAPI:
    """The application in front of a control plane. ``close_streams`` ends what goes on without end."""
    services = Services(plane, Hub(plane), Once(), certificate)

    @contextlib.asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        served.state.loop = asyncio.get_running_loop()
        yield
        services.hub.close()
        plane.relay.close()

    settings = plane.settings

    def others() -> list[str]:
        """The names of control planes that stand by, which hand on what they are asked."""
        return [_bracketed(urlsplit(one.api_url).hostname or "").lower() for one in plane.replicas()]

    app = App(
        title="Tidemill",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Door, hosts=(*_own_names(settings), *settings.hosts), others=others)],
        exception_handlers={
            TidemillError: on_tidemill_error,
            HTTPException: on_http_error,
            RequestValidationError: _on_validation_error,
        },
    )
    app.state.services = services
    for noun in _NOUNS:
        app.router.routes.extend(noun.routes.items)
    app.router.routes.extend(_own_description(app).items)
    return app


def close_streams(app: FastAPI) -> None:
    """End all streams and long polls, from any thread, so that a server that is told to stop need not wait for them."""
    services: Services = app.state.services
    services.hub.close()
    loop: asyncio.AbstractEventLoop | None = getattr(app.state, "loop", None)
    if loop is not None and not loop.is_closed():
        loop.call_soon_threadsafe(services.plane.relay.close)


def _own_description(app: FastAPI) -> Routes:
    described = Routes("fleet")

    @described.get("/v1/openapi.json", allow=OPEN, answer=dict[str, Any])
    async def openapi() -> Response:
        """Get this description. Needs no token."""
        return json_answer(app.openapi())

    return described


def policies(app: FastAPI) -> dict[tuple[str, str], tuple[str, ...]]:
    """For every method and path, the scopes any one of which opens it."""
    return {
        (method, route.path): tuple(scope.value for scope in route.policy)
        for route in app.routes
        if isinstance(route, GuardedRoute)
        for method in sorted(route.methods or ())
    }


def _own_names(settings: Settings) -> list[str]:
    """The names by which this machine may be addressed: those on which it listens."""
    if not settings.is_open:
        return [_bracketed(settings.host)]
    addresses = [each.address.partition("%")[0] for found in psutil.net_if_addrs().values() for each in found]
    return [_bracketed(each) for each in (*addresses, socket.gethostname())]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _on_validation_error(_: Request, error: Exception) -> Response:
    return problem(from_validation(list(error.errors()) if isinstance(error, RequestValidationError) else []))
