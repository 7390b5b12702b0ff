"""Secrets at rest: sealed with the installation's key, bound to their project and name."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tidemill.errors import InvalidSetting
from tidemill.model.ids import ProjectId
from tidemill.model.tenant import Secret

_NONCE_BYTES = 12


class Vault:
    """Seals and opens secrets: AES-256-GCM, key by HKDF-SHA256 from the installation's key."""

    def __init__(self, pepper: bytes) -> None:
        key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"tidemill secrets v1").derive(pepper)
        self._cipher = AESGCM(key)

    def seal(self, project_id: ProjectId, name: str, value: str, *, now: int) -> Secret:
        """The secret as it may be stored."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, value.encode(), _binding(project_id, name))
        return Secret(project_id=project_id, name=name, sealed=sealed, updated_ns=now)

    def open(self, secret: Secret) -> str:
        """The secret's value. Raises: InvalidSetting when it was sealed with another key, moved or damaged."""
        nonce, sealed = secret.sealed[:_NONCE_BYTES], secret.sealed[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, sealed, _binding(secret.project_id, secret.name)).decode()
        except (InvalidTag, ValueError) as error:
            raise InvalidSetting(
                "The secret was sealed with another key.", field=secret.name, mend="Set it again: tidemill secret set."
            ) from error


def _binding(project_id: ProjectId, name: str) -> bytes:
    return f"{project_id}|{name}".encode()
