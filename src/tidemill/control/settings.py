"""What an installation is set to, read from ``config.yaml`` in its home folder, each setting with a default."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tidemill.errors import InvalidSetting
from tidemill.model.policy import Policy
from tidemill.units import parse_duration, parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one installation.

    ``database`` empty is SQLite in the home folder. ``rates`` maps a resource (a device model or ``cpu``) to
    US dollars for one hour of one unit, over the catalog's. ``country`` is ISO 3166 alpha-3 and sets the
    carbon intensity unless ``carbon_g_per_kwh`` does. ``hosts`` are names, beside this machine's own
    loopback names, under which the API may be addressed. ``reserve_cpus`` cores are kept from jobs.
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = 7070
    gateway_port: int = 7071
    database: str = ""
    engine: str = "local"
    site: str = "local"
    site_kind: str = "onprem"
    country: str = ""
    pue: float = 1.0
    carbon_g_per_kwh: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    reserve_cpus: float = 0.0
    workdir_limit: str = "2GB"
    meter_every: str = "1m"

    @property
    def database_url(self) -> str:
        """The database's address."""
        return self.database or f"sqlite:///{self.home / 'control.db'}"

    @property
    def api_url(self) -> str:
        """Where the control plane answers."""
        return f"http://{self.host}:{self.port}"

    @property
    def gateway_url(self) -> str:
        """Where services answer."""
        return f"http://{self.host}:{self.gateway_port}"

    @property
    def volume_root(self) -> Path:
        """Where the local engine keeps the checkpoint and output folders of jobs."""
        return self.home / "local" / "volumes"

    @property
    def policy(self) -> Policy:
        """The part that steers turns."""
        return Policy(meter_every_ns=parse_duration(self.meter_every))


def load_settings(home: Path, overrides: Mapping[str, Any]) -> Settings:
    """The settings of the installation in ``home``: defaults, then ``config.yaml``, then ``overrides`` not None.

    Raises: InvalidSetting that names the setting, its value and the mend.
    """
    path = home / "config.yaml"
    written: object = {}
    if path.exists():
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            mend = "Write lines of the form name: value."
            raise InvalidSetting(f"{path} cannot be read: {error}", field=str(path), mend=mend) from error
    if not isinstance(written, dict):
        raise InvalidSetting(f"{path} holds no settings.", field=str(path), mend="Write lines of the form name: value.")
    given = written | {name: value for name, value in overrides.items() if value is not None}
    # A name without a value, as a commented-out line leaves it, is the default.
    settings = Settings(home=home)
    known = {item.name for item in fields(Settings)} - {"home"}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            mend = f"Did you mean {near[0]}?" if near else f"Settings are {', '.join(sorted(known))}."
            raise InvalidSetting("There is no such setting.", field=str(name), value=value, mend=mend)
        if value is None:
            continue
        settings = replace(settings, **{name: _checked(name, value, getattr(settings, name))})
    return settings


def _checked(name: str, value: Any, default: object) -> Any:
    """The value, of the default's type."""
    try:
        if isinstance(value, bool):
            raise ValueError("it is not a matter of yes or no")
        match name:
            case "port" | "gateway_port":
                if not 0 <= int(value) <= 65_535:
                    raise ValueError("a port lies between 1 and 65535")
                return int(value)
            case "pue":
                if not 1 <= float(value) < 100:
                    raise ValueError("PUE is total power over IT power: 1.0 or some more")
                return float(value)
            case "carbon_g_per_kwh" | "reserve_cpus":
                if not 0 <= float(value) < 1_000_000:
                    raise ValueError("it is a number, zero or more")
                return float(value)
            case "rates":
                return {str(resource): float(price) for resource, price in dict(value).items()}
            case "hosts":
                return tuple(str(host) for host in ([value] if isinstance(value, str) else value))
            case "meter_every":
                if parse_duration(value) <= 0:
                    raise ValueError("it has to be longer than nothing")
                return value if isinstance(value, str) else f"{value}s"
            case "workdir_limit":
                parse_size(value)
                return str(value)
            case "engine" if value != "local":
                raise ValueError("the engine of this version is local")
            case "site_kind" if value not in ("onprem", "cloud", "edge"):
                raise ValueError("kinds of site are onprem, cloud and edge")
            case _:
                if not isinstance(value, str | int | float):
                    raise ValueError("it is one word or number")
                return int(value) if isinstance(default, int) else str(value)
    except (ValueError, TypeError) as error:
        raise InvalidSetting(
            str(error), field=name, value=value, mend="Mend it in config.yaml or on the command line."
        ) from error
