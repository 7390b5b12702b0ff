"""Who pays, who shares a quota, who acts, and what a token lets its holder do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tidemill.model.ids import OrganizationId, PrincipalId, ProjectId, TokenId
from tidemill.model.limits import Limit, Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Organization:
    """Who pays."""

    id: OrganizationId
    name: str
    created_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """Who shares a quota; what its jobs may have is said by its ``model.queue.Queue``, ``limits`` is for requests.

    ``allows_pickles``: its models may have pickles in them, where whoever adds them asks for it. ``countries`` are
    where its work runs and its requests are answered, by ISO 3166 alpha-3; empty: anywhere.
    """

    id: ProjectId
    organization_id: OrganizationId
    name: str
    created_ns: int
    limits: tuple[Limit, ...] = ()
    """What all its keys together may ask of models."""
    allows_pickles: bool = False
    countries: tuple[str, ...] = ()


class PrincipalKind(StrEnum):
    """What acts: a person, a service account, or a part of Tidemill itself."""

    USER = "user"
    SERVICE_ACCOUNT = "service_account"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who acts."""

    id: PrincipalId
    organization_id: OrganizationId
    kind: PrincipalKind
    name: str
    created_ns: int


class Scope(StrEnum):
    """What a token allows. ``ADMIN`` implies every other scope of its organization."""

    ADMIN = "admin"
    READ = "read"
    SUBMIT = "submit"
    EXEC = "exec"
    INFER = "infer"
    """Call the services' endpoints through the gateway."""
    JOB = "job"
    """What a running job may do for itself: read itself and its workload, publish its artifacts."""
    RUNNER = "runner"
    """What a runner reports about its one launch."""
    JOIN = "join"
    """Bring a machine, or a cluster, into one site."""
    OUTPOST = "outpost"
    """Carry out and answer an outpost's calls."""
    GATEWAY = "gateway"
    """Read the routes and keys that the gateway serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A credential as it is stored: never the secret, only its keyed hash and the first characters of it.

    ``project_id`` empty means every project of the organization; ``expires_ns`` and ``revoked_ns`` zero mean never.
    """

    id: TokenId
    principal_id: PrincipalId
    organization_id: OrganizationId
    project_id: ProjectId
    name: str
    hash: str
    display: str
    scopes: tuple[Scope, ...]
    created_ns: int
    expires_ns: int = 0
    revoked_ns: int = 0
    models: tuple[str, ...] = ()
    """Names of models, or patterns with ``*``, that it may ask; none: all."""
    limits: tuple[Limit, ...] = ()
    """What it may ask of models."""
    priority: Priority = Priority.NORMAL
    label: str = ""
    """What its requests are booked under when they do not say."""

    def is_valid(self, *, now: int) -> bool:
        """Whether the token still opens anything at ``now`` (ns)."""
        return not self.revoked_ns and (not self.expires_ns or now < self.expires_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A named secret of a project, sealed: only the control plane's key opens it."""

    project_id: ProjectId
    name: str
    sealed: bytes
    updated_ns: int
