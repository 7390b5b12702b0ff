"""What opens things: the tokens that people make, and the secrets of projects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from tidemill.control.identity import Directory, Identity, Inference
from tidemill.control.vault import Vault
from tidemill.errors import InvalidRequest, NotFound
from tidemill.model.ids import ProjectId, TokenId
from tidemill.model.spec import SECRET_NAME
from tidemill.model.tenant import Project, Scope, Token
from tidemill.ports import Store


class Access:
    """Makes and ends tokens, and keeps secrets sealed. Thread-safe."""

    def __init__(self, store: Store, directory: Directory, vault: Vault, *, clock: Callable[[], int]) -> None:
        self._store = store
        self._directory = directory
        self._vault = vault
        self._clock = clock
        self._changing = threading.Lock()

    def create_token(
        self,
        identity: Identity,
        *,
        name: str,
        scopes: tuple[Scope, ...],
        project: ProjectId,
        expires_ns: int,
        inference: Inference = Inference(),
    ) -> tuple[Token, str]:
        """A new token of the same principal and its secret, shown this once. Raises: Forbidden."""
        principal = self._directory.principal(identity.principal_id)
        if principal is None:
            raise NotFound("This token's principal is not known.", field="principal", value=identity.principal_id)
        token, secret = self._directory.mint(
            identity,
            principal,
            name=name,
            scopes=scopes,
            project=project,
            expires_ns=expires_ns,
            now=self._clock(),
            inference=inference,
        )
        self._store.put_token(token)
        self._directory.remember(token, principal)
        return token, secret

    def revoke_token(self, identity: Identity, token_id: TokenId) -> None:
        """Nothing; the token opens nothing from now on. Raises: NotFound."""
        identity.require(Scope.ADMIN)
        with self._changing:
            self._replace(self._directory.revoked(token_id, identity.organization_id, now=self._clock()))

    def change_token(self, identity: Identity, token_id: TokenId, inference: Inference) -> Token:
        """The token, with something else to say of requests to models from now on. Raises: NotFound."""
        identity.require(Scope.ADMIN)
        with self._changing:
            token = replace(
                self._directory.token(token_id, identity.organization_id),
                models=inference.models,
                limits=inference.limits,
                priority=inference.priority,
                label=inference.label,
            )
            self._replace(token)
        return token

    def _replace(self, token: Token) -> None:
        principal = self._directory.principal(token.principal_id)
        self._store.put_token(token)
        if principal is not None:
            self._directory.remember(token, principal)

    def put_secret(self, project: Project, name: str, value: str) -> None:
        """Nothing; the secret is stored sealed. Raises: InvalidRequest for a name that no variable could have."""
        if not SECRET_NAME.fullmatch(name):
            raise InvalidRequest(
                "A secret's name is letters, digits and _, not beginning with a digit.", field="name", value=name
            )
        self._store.put_secret(self._vault.seal(project.id, name, value, now=self._clock()))
