"""What an outpost knows of itself, in a 0600 file of its home: who it is, whose it is, and what its machine is."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from tidemill.errors import InvalidSetting, NotFound

FILE: Final = "outpost.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutpostConfig:
    """One outpost. ``control_url`` is where the control plane answers, as seen from here.

    ``key`` and ``node_id`` are made once, at the first joining. ``engine`` is ``local`` for one machine that is worked
    from here, ``ray`` for a machine of a Ray cluster, ``ray-head`` for the head of one, ``slurm`` and ``kubernetes``
    for somebody's cluster that is asked from here; ``settings`` are the engine's.
    ``ca`` has certificates, as PEM, that vouch for the control plane; empty: those that this machine trusts.
    The rest describes this machine, as the settings of the same names do.
    """

    control_url: str
    key: str
    node_id: str
    name: str
    engine: str = "local"
    ca: str = ""
    site: str = ""
    site_id: str = ""
    outpost_id: str = ""
    token: str = ""
    address: str = ""
    reserve_cpus: float = 0.0
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[str, ...] = ()
    rack: str = ""
    block: str = ""
    mig_dynamic: tuple[str, ...] = ()
    volumes: str = ""
    data_cache: str = "100GB"
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def setting(self) -> dict[str, str]:
        """The engine's settings by name."""
        return dict(self.settings)


def new_key() -> str:
    """A key for a new outpost."""
    return secrets.token_hex(16)


def read_config(home: Path) -> OutpostConfig:
    """The outpost of that home. Raises: NotFound when none has joined there, InvalidSetting for a damaged file."""
    path = home / FILE
    try:
        written: dict[str, Any] = json.loads(path.read_text())
        known = {item.name for item in fields(OutpostConfig)}
        given = {name: _tuples(value) for name, value in written.items() if name in known}
        return OutpostConfig(**given)
    except FileNotFoundError:
        raise NotFound(
            "No machine has joined a cloud from here.", field="home", value=str(home), mend="Join one: tidemill join."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidSetting(f"{path} is damaged: {error}", field=str(path), mend="Remove it and join again.") from None


def write_config(home: Path, config: OutpostConfig) -> None:
    """Nothing; the file is replaced in one step and durable."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = home / f"{FILE}.new"
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(config), file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(home / FILE)
    folder = os.open(home, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
