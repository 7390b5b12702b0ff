"""Projects, tokens and secrets."""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from tidemill.api.shapes.common import PLAIN_TEXT, Body, Name, Plain
from tidemill.model.limits import LIMITS, Priority
from tidemill.model.tenant import Scope


class SecretOut(TypedDict):
    """A secret's name; its value is never shown."""

    name: str
    updated_at_ns: int


class ProjectOut(TypedDict):
    """A project and its limits; zero does not limit what jobs hold. ``limits`` is for requests to models."""

    id: str
    name: str
    created_at_ns: int
    limit_gpu_milli: int
    limit_cpu_milli: int
    limits: dict[str, int | float]
    countries: list[str]


class TokenOut(TypedDict):
    """A token. ``token`` is there only in the answer that makes it."""

    id: str
    name: str
    display: str
    scopes: list[str]
    project: str
    created_at_ns: int
    expires_at_ns: int
    revoked_at_ns: int
    models: list[str]
    limits: dict[str, int | float]
    priority: str
    label: str
    token: NotRequired[str]


class SecretIn(Body):
    """A secret's value."""

    value: Annotated[str, StringConstraints(max_length=65_536, pattern=PLAIN_TEXT)]


Limits = Annotated[dict[Annotated[str, StringConstraints(max_length=40)], float], Field(max_length=len(LIMITS))]
Label = Annotated[str, StringConstraints(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]


class ProjectIn(Body):
    """A project, made or given new limits."""

    name: Name
    limit_gpu_milli: int = Field(0, ge=0, le=10**12)
    limit_cpu_milli: int = Field(0, ge=0, le=10**12)
    limits: Limits | None = Field(None, description="Of requests to models; left as they are when left out.")
    countries: list[Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)]] | None = Field(
        None,
        max_length=300,
        description="Where its work runs and its requests are answered, by ISO 3166 code or English name, or `EU`;"
        " none: anywhere. Left as they are when left out.",
    )


Models = Annotated[list[Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,200}$")]], Field(max_length=200)]


class TokenIn(Body):
    """A token to make. It gets at most what its maker may do."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=PLAIN_TEXT)]
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(min_length=1, max_length=10)
    project: Plain = ""
    expires_in: str | int = Field("90d", description="A duration such as 90d, or never.")
    models: Models = Field(default=[], description="What it may ask, `*` standing for anything; none: all.")
    limits: Limits = Field(default={}, description="Of requests to models, such as `requests/minute` or `usd/month`.")
    priority: Annotated[Priority, Field(strict=False)] = Priority.NORMAL
    label: Label = Field("", description="What its requests are booked under when they do not say.")


class TokenChangeIn(Body):
    """What a token is to say of requests to models from now on; what is left out stays as it is."""

    models: Models | None = None
    limits: Limits | None = None
    priority: Annotated[Priority | None, Field(strict=False)] = None
    label: Label | None = None
