"""Where the control plane is and which token opens it: arguments, then environment, then the home folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidemill.errors import InvalidRequest, Unauthorized, Unavailable

URL_VARIABLE = "TIDEMILL_API_URL"
URLS_VARIABLE = "TIDEMILL_API_URLS"
CA_VARIABLE = "TIDEMILL_API_CA"
CREDENTIAL_VARIABLE = "TIDEMILL_TOKEN"
HOME_VARIABLE = "TIDEMILL_HOME"


@dataclass(frozen=True)
class Connection:
    """An address and a token. ``is_local`` says that both are of the control plane of this home folder.

    ``others`` are addresses at which the same cloud answers as well, to be asked when that one does not.
    """

    url: str
    token: str
    is_local: bool
    others: tuple[str, ...] = ()
    ca: str = ""
    """Certificates, as PEM, that vouch for addresses with https; empty: those that this machine trusts."""


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

    The token in the home folder goes to the home folder's own control plane only, never to another address. The
    addresses of ``TIDEMILL_API_URLS`` are used when no address is given, or one of them: so a job that names another
    cloud does not send that one's token to its own.
    Raises: Unavailable when no address is known, Unauthorized when there is no token for it.
    """
    several = [one.strip() for one in os.environ.get(URLS_VARIABLE, "").split(",") if one.strip()]
    url = url or os.environ.get(URL_VARIABLE) or (several[0] if several else "")
    others = _others(url, several)
    token = token or os.environ.get(CREDENTIAL_VARIABLE) or ""
    if url and token:
        return Connection(url, token, is_local=False, others=others, ca=_authority())
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


def _authority() -> str:
    """What the variable has, which is PEM or a file with it. Raises: InvalidRequest."""
    given = os.environ.get(CA_VARIABLE, "")
    if not given or "-----BEGIN" in given:
        return given
    try:
        return Path(given).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        mend = "Write the path of a PEM file, or its content."
        raise InvalidRequest(f"It cannot be read: {error}.", field=CA_VARIABLE, value=given, mend=mend) from None


def _others(url: str, several: Sequence[str]) -> tuple[str, ...]:
    """The other addresses of the cloud that answers at ``url``; none when it is not one of them."""
    rest = tuple(one for one in several if one.rstrip("/") != url.rstrip("/"))
    return rest if len(rest) < len(several) else ()


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
