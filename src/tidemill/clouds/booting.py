"""The script that a rented machine runs when it boots: install Tidemill, join the cloud, or end itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tidemill import __version__
from tidemill.errors import InvalidSetting

LIMIT_BYTES: Final = 16_384
"""The longest script that EC2 takes."""
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9.]{0,61}[A-Za-z0-9])?")
_SCRIPT: Final = """\
#!/bin/sh
# Joins this machine to a Tidemill cloud. A machine that cannot join is of no use and ends itself.
set -eu
umask 077
ended() {{
    status=$?
    [ "$status" -eq 0 ] && return
    echo "tidemill: this machine could not join (status $status) and ends itself" >&2
    shutdown -h now || poweroff -f
}}
trap ended EXIT
TIDEMILL_JOIN_TOKEN={token}
export TIDEMILL_JOIN_TOKEN
HOME=${{HOME:-/root}}
export HOME
{setup}
tidemill=/opt/tidemill/bin/tidemill
[ -x "$tidemill" ] || tidemill=$(command -v tidemill || true)
if [ -z "$tidemill" ]; then
    python3 -m venv /opt/tidemill
    /opt/tidemill/bin/python -m pip install --quiet --disable-pip-version-check {package}
    tidemill=/opt/tidemill/bin/tidemill
fi
"$tidemill" join {address} --name {name}{words}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootSettings:
    """What a rented machine is told. ``address`` is where it reaches the control plane.

    ``package`` is what pip installs where the image does not have Tidemill; empty: this version. ``setup`` are lines of
    shell that come before, for example to mount a disk.
    """

    address: str
    package: str = ""
    setup: str = ""


def boot_script(
    settings: BootSettings,
    *,
    token: str,
    node_name: str,
    labels: Sequence[tuple[str, str]] = (),
    taints: Sequence[str] = (),
) -> str:
    """The script with which a machine of that name joins. The token is the only secret in it.

    Raises: InvalidSetting when a part cannot be used, or all of it is too long.

    >>> "--name burst-1 --label region=eu" in boot_script(
    ...     BootSettings(address="head:7070"), token="t", node_name="burst-1", labels=[("region", "eu")])
    True
    """
    if not _NAME.fullmatch(node_name):
        mend = "Use up to 63 letters, digits, - and ."
        raise InvalidSetting("A machine cannot be called that.", field="node_name", value=node_name, mend=mend)
    if not settings.address or settings.address.startswith("-"):
        mend = (
            "Write the address under which rented machines reach the control plane, such as https://head.example:7070."
        )
        raise InvalidSetting("There is no address to join.", field="cloud.address", value=settings.address, mend=mend)
    words = [f"--label {shlex.quote(f'{key}={value}')}" for key, value in labels]
    words += [f"--taint {shlex.quote(taint)}" for taint in taints]
    script = _SCRIPT.format(
        token=shlex.quote(token),
        setup=settings.setup.strip() or ":",
        package=shlex.quote(settings.package or f"tidemill=={__version__}"),
        address=shlex.quote(settings.address),
        name=shlex.quote(node_name),
        words="".join(f" {word}" for word in words),
    )
    if len(script.encode()) > LIMIT_BYTES:
        raise InvalidSetting(
            f"The script that machines boot with is {len(script.encode())} bytes long, and {LIMIT_BYTES} may be.",
            field="cloud.setup",
            mend="Put what it does into the image, or have it fetched.",
        )
    return script
