"""Where the control plane is and which token opens it: arguments, then environment, then the home folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidemill.errors import Unauthorized, Unavailable

URL_VARIABLE = "TIDEMILL_API_URL"
CREDENTIAL_VARIABLE = "TIDEMILL_TOKEN"
HOME_VARIABLE = "TIDEMILL_HOME"


@dataclass(frozen=True)
class Connection:
    """An address and a token. ``is_local`` says that both are of the control plane of this home folder."""

    url: str
    token: str
    is_local: bool


def home() -> Path:
    """The folder where this machine's control plane keeps what it needs."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.tidemill").expanduser().absolute()


def endpoint(folder: Path) -> dict[str, Any] | None:
    """What the control plane of ``folder`` wrote about itself; None when it is not running."""
    try:
        found = json.loads((folder / "endpoint.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("api_url"), str):
        return None
    return found if _is_alive(found.get("pid")) else None


def find(url: str | None, token: str | None) -> Connection:
    """The address and token to use.

    The token in the home folder goes to the home folder's own control plane only, never to another address.
    Raises: Unavailable when no address is known, Unauthorized when there is no token for it.
    """
    url = url or os.environ.get(URL_VARIABLE) or ""
    token = token or os.environ.get(CREDENTIAL_VARIABLE) or ""
    if url and token:
        return Connection(url, token, is_local=False)
    folder = home()
    own = endpoint(folder)
    if own is None and not url:
        raise Unavailable(
            f"Tidemill is not running here (looked in {folder}).",
            mend=f"Start it with: tidemill up — or name another one in {URL_VARIABLE}.",
        )
    if own is not None and url.rstrip("/") in ("", own["api_url"].rstrip("/")):
        return Connection(own["api_url"], token or _admin_token(folder), is_local=True)
    raise Unauthorized(f"there is no token for {url}", mend=f"Put one in {CREDENTIAL_VARIABLE}.")


def _admin_token(folder: Path) -> str:
    path = folder / "admin.token"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise Unauthorized(
            f"cannot read the token in {path}: {error.strerror}", mend=f"Put a token in {CREDENTIAL_VARIABLE}."
        ) from error


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return True  # not known; trying tells
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
