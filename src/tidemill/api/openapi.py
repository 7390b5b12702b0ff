"""The OpenAPI document: complete, made from the routes themselves."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from tidemill import __version__
from tidemill.api.guard import GuardedRoute
from tidemill.api.problems import MEDIA_TYPE
from tidemill.api.shapes.common import Problem
from tidemill.api.shapes.work import SubmitIn
from tidemill.wire import json_schema

_REFERENCE: Final = "#/components/schemas/{model}"
_TAGS: Final = {
    "workloads": "Submitting work, and asking what it would cost.",
    "jobs": "What is scheduled: states, reasons, receipts, logs, outputs.",
    "execs": "Commands inside running workers.",
    "artifacts": "Uploaded folders, and named versions of what jobs made.",
    "fleet": "Machines, events, usage.",
    "scheduling": "The quota tree and who has what, the order of the queue, reservations.",
    "accounts": "Projects, tokens, secrets.",
    "runners": "What runners report and fetch.",
    "gateway": "What the gateway serves by.",
}
_ERRORS: Final = {
    "400": "The body is not what its type says.",
    "401": "A valid token is needed.",
    "403": "The token does not allow this.",
    "404": "There is nothing by that name or id.",
    "409": "The state of the thing does not allow this now.",
    "413": "The content is over the limit.",
    "415": "The body is of another type than this address takes.",
    "421": "The request is addressed to another host.",
    "422": "The request cannot be accepted as it is written.",
    "503": "The control plane cannot answer now; try again.",
    "507": "There is no space left on the disk.",
}
_DESCRIPTION: Final = """Tidemill's control plane.

Errors are `application/problem+json` with a stable `code`, the `field`, its `value` and the `mend`. Instants end
in `_at_ns` and are nanoseconds since 1970, zero for "not yet"; money is micro-USD, energy mJ, carbon mg of CO2e,
shares of devices and cores are thousandths. Writes take an `Idempotency-Key`."""


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the app."""
    guarded = [route for route in app.routes if isinstance(route, GuardedRoute)]
    made: dict[str, Any] = get_openapi(
        title="Tidemill",
        version=__version__,
        description=_DESCRIPTION,
        routes=guarded,
        tags=[{"name": name, "description": text} for name, text in _TAGS.items()],
    )
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    models = sorted(
        {route.body_model for route in guarded if isinstance(route.body_model, type)}, key=lambda model: model.__name__
    )
    schemas |= models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)[1]["$defs"]
    schemas["Problem"] = TypeAdapter(Problem).json_schema(ref_template=_REFERENCE)
    _add_spec(schemas)
    made["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "A token that begins with `tm_`."}
    }
    for route in guarded:
        for method in route.methods or ():
            _complete(made["paths"][route.path_format][method.lower()], route, method)
    return made


def _add_spec(schemas: dict[str, Any]) -> None:
    """The workload's own schema, in the place of "any object"."""
    spec = json_schema()
    for name, section in spec.pop("$defs").items():
        schemas[name] = _moved(section)
    schemas["WorkloadSpec"] = _moved({key: value for key, value in spec.items() if not key.startswith("$")})
    reference = {"$ref": _REFERENCE.format(model="WorkloadSpec")}
    schemas[SubmitIn.__name__]["properties"]["spec"] = reference
    schemas["BatchIn"]["properties"]["specs"]["items"] = reference


def _moved(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: inner.replace("#/$defs/", "#/components/schemas/") if key == "$ref" else _moved(inner)
            for key, inner in value.items()
        }
    return [_moved(inner) for inner in value] if isinstance(value, list) else value


def _complete(operation: dict[str, Any], route: GuardedRoute, method: str) -> None:
    operation["security"] = [{"token": []}] if route.policy else []
    if route.policy:
        needed = " or ".join(f"`{scope.value}`" for scope in route.policy)
        operation["description"] = (
            f"{operation.get('description', '')}\n\nNeeds a token with the scope {needed}.".strip()
        )
    content = {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(model="Problem")}}}
    responses = operation["responses"]
    responses.pop("422", None)
    for status, text in _ERRORS.items():
        if method == "HEAD":
            responses[status] = {"description": text}
        else:
            responses[status] = {"description": text, "content": content}
    if route.body_model is not None:
        is_json = isinstance(route.body_model, type) and issubclass(route.body_model, BaseModel)
        name = route.body_model.__name__ if isinstance(route.body_model, type) else str(route.body_model)
        schema = {"$ref": _REFERENCE.format(model=name)} if is_json else {"type": "string", "format": "binary"}
        operation["requestBody"] = {
            "required": is_json and name != "NothingIn",
            "content": {"application/json" if is_json else name: {"schema": schema}},
        }
    if method != "GET" and method != "HEAD" and "runners" not in operation["tags"]:
        operation.setdefault("parameters", []).append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "The same key with the same request gives the first answer again.",
                "schema": {"type": "string", "maxLength": 200, "pattern": "^[ -~]*$"},
            }
        )
