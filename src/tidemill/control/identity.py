"""Who is asking: tokens turned into identities without touching the database, and who may grant what."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tidemill.core import tokens
from tidemill.errors import Forbidden, InvalidSetting, NotFound, Unauthorized
from tidemill.model.ids import LaunchId, OrganizationId, PrincipalId, ProjectId, TokenId, sortable_id
from tidemill.model.limits import Limit, Priority
from tidemill.model.tenant import Principal, Scope, Token

PEPPER_BYTES: Final = 32
_REMEMBERED_LAUNCHES: Final = 100_000
_PRIVATE: Final = frozenset({Scope.JOB, Scope.RUNNER, Scope.GATEWAY, Scope.JOIN, Scope.OUTPOST})


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who asks, and what they may do. ``project_ids`` empty: all projects of the organization.

    ``expires_ns`` is when the token ends, zero: never. ``launch_id`` is set for the tokens of runners and of
    running jobs.
    """

    principal_id: PrincipalId
    organization_id: OrganizationId
    name: str
    scopes: frozenset[Scope]
    project_ids: tuple[ProjectId, ...] = ()
    launch_id: LaunchId = LaunchId("")
    expires_ns: int = 0

    def allows(self, scope: Scope) -> bool:
        """Whether ``scope`` is granted. ``ADMIN`` implies all that people may have."""
        return scope in self.scopes or (Scope.ADMIN in self.scopes and scope not in _PRIVATE)

    def require(self, scope: Scope) -> None:
        """Nothing. Raises: Forbidden when ``scope`` is not granted."""
        if not self.allows(scope):
            have = ", ".join(sorted(self.scopes))
            raise Forbidden(
                f"This token lacks the scope {scope.value}.", field="scope", value=have, mend="Use a token that has it."
            )

    def may_see(self, project_id: ProjectId) -> bool:
        """Whether things of that project exist for this identity."""
        return not self.project_ids or project_id in self.project_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What a token says of requests to models; see ``Token``."""

    models: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    priority: Priority = Priority.NORMAL
    label: str = ""


def read_pepper(path: Path, *, create: bool) -> bytes:
    """The installation's secret key from its 0600 file; made when ``create`` and there is none.

    Raises: InvalidSetting when it is missing though tokens were made with it, too short, or readable by others.
    """
    if not path.exists():
        if not create:
            raise InvalidSetting(
                "The key that tokens and secrets were made with is missing.",
                field=str(path),
                mend="Restore secret.key from a backup; without it no token of this installation can be checked.",
            )
        draft = path.with_suffix(".new")  # so that there is never half a key, whatever happens now
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(PEPPER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    if path.stat().st_mode & 0o077:
        raise InvalidSetting("The key is readable by others.", field=str(path), mend=f"Run chmod 600 {path}.")
    try:
        pepper = bytes.fromhex(path.read_text().strip())
    except ValueError as error:
        raise InvalidSetting("The key is damaged.", field=str(path), mend="Restore it from a backup.") from error
    if len(pepper) < PEPPER_BYTES:
        raise InvalidSetting("The key is too short.", field=str(path), mend="Restore it from a backup.")
    return pepper


def administer(identity: Identity) -> None:
    """Raises: Forbidden when the identity may not change what all projects share."""
    identity.require(Scope.ADMIN)
    if identity.project_ids:
        raise Forbidden(
            "A token of one project cannot change what all share.",
            field="project",
            value=identity.project_ids[0],
            mend="Use an administrator's token that is not bound to a project.",
        )


def gateway_token(pepper: bytes) -> str:
    """The token of the gateways of the installation that has that key."""
    return tokens.derive("gw", "gateway", pepper)


class Directory:
    """All tokens in memory. Thread-safe; every look-up is by keyed hash."""

    def __init__(self, pepper: bytes, *, principals: Iterable[Principal], known: Iterable[Token]) -> None:
        self.pepper = pepper
        self.version = 1
        self._principals = {principal.id: principal for principal in principals}
        self._tokens = {token.hash: token for token in known}
        self._launches: OrderedDict[str, Identity] = OrderedDict()
        self._gateway = gateway_token(pepper)
        self._lock = threading.Lock()

    def authenticate(self, secret: str, *, now: int) -> Identity:
        """Whose token this is. Raises: Unauthorized with the same sentence for every kind of wrong token."""
        kind = tokens.parse(secret)
        if kind == "user":
            token = self._tokens.get(tokens.digest(secret, self.pepper))
            principal = self._principals.get(token.principal_id) if token is not None else None
            if token is not None and principal is not None and token.is_valid(now=now):
                return Identity(
                    principal_id=principal.id,
                    organization_id=token.organization_id,
                    name=principal.name,
                    scopes=frozenset(token.scopes),
                    project_ids=(token.project_id,) if token.project_id else (),
                    expires_ns=token.expires_ns,
                )
        elif kind in ("run", "job"):
            identity = self._launches.get(secret)
            if identity is not None:
                return identity
        elif kind == "gw" and secrets.compare_digest(secret, self._gateway):
            return Identity(
                principal_id=PrincipalId("system"),
                organization_id=OrganizationId(""),
                name="gateway",
                scopes=frozenset({Scope.GATEWAY}),
            )
        raise Unauthorized(
            "This token is not valid.",
            field="Authorization",
            mend="Send a token of this installation that has not expired: Authorization: Bearer tm_…",
        )

    @property
    def gateway_token(self) -> str:
        """The token of the gateway process."""
        return self._gateway

    def launch_tokens(
        self, launch: LaunchId, *, organization: OrganizationId, project: ProjectId, principal: PrincipalId
    ) -> tuple[str, str]:
        """The tokens of a launch's runner and of its worker; the same whenever asked, and valid from now on."""
        made = []
        for kind, scope in (("run", Scope.RUNNER), ("job", Scope.JOB)):
            secret = tokens.derive(kind, launch, self.pepper)
            identity = Identity(
                principal_id=principal,
                organization_id=organization,
                name=launch,
                scopes=frozenset({scope}),
                project_ids=(project,),
                launch_id=launch,
            )
            with self._lock:
                self._launches[secret] = identity
                self._launches.move_to_end(secret)
                while len(self._launches) > _REMEMBERED_LAUNCHES:
                    self._launches.popitem(last=False)
            made.append(secret)
        return made[0], made[1]

    def mint(
        self,
        granter: Identity | None,
        principal: Principal,
        *,
        name: str,
        scopes: tuple[Scope, ...],
        project: ProjectId,
        expires_ns: int,
        now: int,
        entropy: bytes = b"",
        inference: Inference = Inference(),
    ) -> tuple[Token, str]:
        """A new token and its secret, shown this once. A granter gives at most what it has, for at most as long.

        The same ``entropy`` gives the same secret; without it, it is random.

        Raises: Forbidden when it asks for more.
        """
        if granter is not None:
            for scope in scopes:
                if scope in _PRIVATE or not granter.allows(scope):
                    raise Forbidden(
                        f"A token cannot grant {scope.value}, which it does not have.",
                        field="scopes",
                        value=scope.value,
                    )
            if granter.project_ids and project not in granter.project_ids:
                raise Forbidden("A token of one project cannot grant access beyond it.", field="project", value=project)
            if granter.expires_ns:
                expires_ns = min(expires_ns or granter.expires_ns, granter.expires_ns)
        secret = tokens.mint("user", entropy or secrets.token_bytes(32))
        token = Token(
            id=TokenId(sortable_id("tok", now=now, entropy=secrets.randbits(40))),
            principal_id=principal.id,
            organization_id=principal.organization_id,
            project_id=project,
            name=name,
            hash=tokens.digest(secret, self.pepper),
            display=secret[:12],
            scopes=scopes,
            created_ns=now,
            expires_ns=expires_ns,
            models=inference.models,
            limits=inference.limits,
            priority=inference.priority,
            label=inference.label,
        )
        return token, secret

    def derived(self, subject: str) -> bytes:
        """Entropy that belongs to ``subject`` and to nobody who does not have this installation's key."""
        return hashlib.blake2b(subject.encode(), key=self.pepper[:64], digest_size=32, person=b"tidemill").digest()

    def remember(self, token: Token, principal: Principal) -> None:
        """Let a stored token be used from now on, or see that it was revoked."""
        with self._lock:
            self._principals[principal.id] = principal
            self._tokens[token.hash] = token
            self.version += 1

    def revoked(self, token_id: TokenId, organization: OrganizationId, *, now: int) -> Token:
        """The token with that id, revoked. Raises: NotFound."""
        token = self.token(token_id, organization)
        return replace(token, revoked_ns=token.revoked_ns or now)

    def token(self, token_id: TokenId, organization: OrganizationId) -> Token:
        """The token with that id. Raises: NotFound."""
        for token in list(self._tokens.values()):
            if token.id == token_id and token.organization_id == organization:
                return token
        raise NotFound("There is no such token.", field="token", value=token_id)

    def principal(self, principal_id: PrincipalId) -> Principal | None:
        """The principal of that id."""
        return self._principals.get(principal_id)

    def all(self) -> tuple[Token, ...]:
        """Every token, valid or not, oldest first."""
        return tuple(sorted(self._tokens.values(), key=lambda token: token.id))
