"""What an installation is set to, read from ``config.yaml`` in its home folder, each setting with a default."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import yaml

from tidemill.control.cloudsettings import cloud_settings
from tidemill.errors import InvalidSetting
from tidemill.guards.reading import rules_of
from tidemill.model.guard import GuardRule
from tidemill.model.policy import Policy
from tidemill.units import parse_duration, parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one installation.

    ``database`` empty is SQLite in the home folder. ``rates`` maps a resource (a device model or ``cpu``) to
    US dollars for one hour of one unit, over the catalog's. ``country`` is ISO 3166 alpha-3 and sets the
    carbon intensity unless ``carbon_g_per_kwh`` does, or ``carbon_by_hour`` with 24 of them, by hour of the day in UTC.
    ``tariff`` is US dollars for one kWh, charged on top of the rates; zero: electricity is in them. ``hosts`` are
    names, beside this machine's own loopback names, under which the API may be addressed. ``reserve_cpus`` cores are
    kept from jobs.

    ``lease`` is how long a worker on another machine of this site runs on without a word from the control plane.
    ``address`` is where other machines reach this one; ``ray_port`` and ``ray_redis`` (host:port of a Redis that keeps
    what the cluster's head knows) are for the engine ``ray``. ``cloud`` says what is rented and when, as
    ``control.cloudsettings`` reads it. ``volumes`` is a folder that machines share, for checkpoints and outputs.
    ``model_limit`` is the size that one file of a model may have.
    ``data_cache`` is how much copies of data sets may take on this machine; zero: as much as the disk has.

    ``tls_cert`` and ``tls_key`` are PEM files with the certificate that the API shows to other machines, and its key.

    ``guards`` are guardrails for requests to models, as ``guards.reading`` reads them.

    ``traces`` is a collector of traces that speaks OTLP over HTTP; ``trace_ratio`` is the share of requests that are
    traced where their caller does not say.

    ``shared`` is a folder that several control planes of one PostgreSQL have in common: one of them leads.

    ``labels``, ``taints``, ``rack`` and ``block`` say what this machine is to those who place work. ``mig_dynamic``
    lists GPUs, by number or UUID, whose MIG slices Tidemill may make and unmake; ``all`` means each in MIG mode. A
    device that fails is looked at again after ``device_recheck``; one that was slowed by heat for ``device_hot``
    fails. ``simulated`` describes the fleet of the simulated engine (``engines.simulated.fleet``), whose workers run
    for ``simulated_duration`` when their command does not say how long it sleeps.

    The others, from ``meter_every`` on, are the fields of ``model.policy.Policy``, with durations as text.
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = 7070
    gateway_port: int = 7071
    gateway_workers: int = 1
    database: str = ""
    engine: str = "local"
    site: str = "local"
    site_kind: str = "onprem"
    country: str = ""
    pue: float = 1.0
    carbon_g_per_kwh: float | None = None
    carbon_by_hour: tuple[float, ...] = ()
    tariff: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    reserve_cpus: float = 0.0
    workdir_limit: str = "2GB"
    lease: str = "none"
    address: str = ""
    shared: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    guards: tuple[GuardRule, ...] = ()
    traces: str = ""
    trace_ratio: float = 1.0
    ray_port: int = 6379
    ray_redis: str = ""
    volumes: str = ""
    data_cache: str = "100GB"
    model_limit: str = "1TB"
    cloud: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[str, ...] = ()
    rack: str = ""
    block: str = ""
    mig_dynamic: tuple[str, ...] = ()
    device_recheck: str = "10m"
    device_hot: str = "2m"
    simulated: str = "8xH100:8"
    simulated_duration: str = "1m"
    meter_every: str = "1m"
    retry_backoff: str = "500ms"
    retry_backoff_max: str = "1m"
    retry_forget: str = "10m"
    stop_retry: str = "5s"
    stop_margin: str = "5s"
    starts_per_turn: int = 512
    order: str = "fair"
    score: str = "tide"
    half_life: str = "1d"
    ageing: str = "15m"
    patience: str = "1d"
    backfill: bool = True
    assumed_duration: str = "1h"
    replan: str = "30s"
    preemption: bool = True
    min_run: str = "5m"
    displace_in_project: bool = True
    flap_losses: int = 3
    flap_window: str = "1h"
    flap_hold: str = "10m"

    @property
    def database_url(self) -> str:
        """The database's address."""
        return self.database or f"sqlite:///{self.home / 'control.db'}"

    @property
    def common(self) -> Path:
        """Where the keys, blobs and logs of the installation are."""
        return Path(self.shared) if self.shared else self.home

    @property
    def reached_at(self) -> str:
        """Where the control plane answers, for other machines."""
        if not self.address and not self.tls_cert:
            return self.api_url
        name = _bracketed(self.address) if self.address else self._own_name
        return f"{'https' if self.tls_cert else 'http'}://{name}:{self.port}"

    @property
    def api_url(self) -> str:
        """Where the control plane answers, for this machine."""
        return f"http://{self._own_name}:{self.port}"

    @property
    def gateway_url(self) -> str:
        """Where services answer, for this machine."""
        return f"http://{self._own_name}:{self.gateway_port}"

    @property
    def is_open(self) -> bool:
        """Whether the control plane listens on all addresses of this machine."""
        return self.host in ("0.0.0.0", "::")  # noqa: S104 - it is compared, not listened on

    @property
    def _own_name(self) -> str:
        return _bracketed("127.0.0.1" if self.is_open else self.host)

    @property
    def volume_root(self) -> Path:
        """Where the checkpoint and output folders of jobs are."""
        return Path(self.volumes) if self.volumes else self.home / "local" / "volumes"

    @property
    def lease_ns(self) -> int:
        """The lease of this site's workers elsewhere; zero for none."""
        return 0 if self.lease == "none" else parse_duration(self.lease)

    @property
    def policy(self) -> Policy:
        """The part that steers turns: every field of it is a setting, a duration without its ``_ns``."""
        given: dict[str, Any] = {}
        for item in fields(Policy):
            value = getattr(self, item.name.removesuffix("_ns"))
            given[item.name] = parse_duration(value) if item.name.endswith("_ns") else value
        return Policy(**given)


_DURATIONS: Final = {item.name.removesuffix("_ns") for item in fields(Policy) if item.name.endswith("_ns")} | {
    "device_recheck",
    "device_hot",
    "simulated_duration",
}
_NEVER_ZERO: Final = {"meter_every", "retry_backoff", "stop_retry", "replan", "device_recheck", "device_hot"}
_ENGINES: Final = ("local", "ray", "none", "simulated")
_LABEL: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]{0,61}[A-Za-z0-9])?")


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
    if bool(settings.tls_cert) != bool(settings.tls_key):
        missing, there = ("tls_key", settings.tls_cert) if settings.tls_cert else ("tls_cert", settings.tls_key)
        raise InvalidSetting(
            f"There is no {missing} beside {there}.",
            field=missing,
            value="",
            mend="Give both: the certificate and its key; or neither.",
        )
    if settings.shared:
        _check_shares(settings)
    return settings


def _check_shares(settings: Settings) -> None:
    """Raises: InvalidSetting for what control planes that stand in for each other cannot have."""
    if settings.database_url.startswith("sqlite"):
        raise InvalidSetting(
            "Several control planes can share a PostgreSQL, not a file.",
            field="database",
            value=settings.database or None,
            mend="Write postgresql://user:password@host/name, or leave out the setting shared.",
        )
    if settings.engine not in ("none", "simulated"):
        raise InvalidSetting(
            "A control plane that others stand in for works no machine itself.",
            field="engine",
            value=settings.engine,
            mend="Write engine: none, and have its machine join: tidemill join.",
        )
    if settings.is_open and not settings.address:
        raise InvalidSetting(
            "The others have to know where this control plane is reached.",
            field="address",
            value="",
            mend="Write an address of this machine, such as address: 10.0.0.5.",
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _checked(name: str, value: Any, default: object) -> Any:
    """The value, of the default's type."""
    try:
        if isinstance(value, bool) or isinstance(default, bool):
            return _yes_or_no(value, default)
        match name:
            case "port" | "gateway_port" | "ray_port":
                if not 0 <= int(value) <= 65_535:
                    raise ValueError("a port lies between 1 and 65535")
                return int(value)
            case "pue":
                if not 1 <= float(value) < 100:
                    raise ValueError("PUE is total power over IT power: 1.0 or some more")
                return float(value)
            case "carbon_by_hour":
                hours = tuple(float(each) for each in value)
                if len(hours) != 24 or not all(0 <= each < 1_000_000 for each in hours):
                    raise ValueError("it is 24 numbers, one for each hour of the day in UTC")
                return hours
            case "carbon_g_per_kwh" | "reserve_cpus" | "tariff":
                if not 0 <= float(value) < 1_000_000:
                    raise ValueError("it is a number, zero or more")
                return float(value)
            case "rates":
                return {str(resource): float(price) for resource, price in dict(value).items()}
            case "hosts":
                return tuple(str(host) for host in ([value] if isinstance(value, str) else value))
            case "labels":
                labels = {str(label): str(said) for label, said in dict(value).items()}
                return {label: _word(said, of=_word(label)) for label, said in labels.items()}
            case "taints" | "mig_dynamic":
                found = [value] if isinstance(value, str | int) else list(value)
                return tuple(_taint(str(each)) if name == "taints" else str(each) for each in found)
            case "rack" | "block":
                return _word(str(value)) if isinstance(value, str | int) and value != "" else str(value)
            case "gateway_workers":
                if not 1 <= int(value) <= 256 or int(value) != float(value):
                    raise ValueError("it is a whole number of processes from 1 to 256")
                return int(value)
            case "starts_per_turn" | "flap_losses":
                if int(value) < 1 or int(value) != float(value):
                    raise ValueError("it is a whole number, one or more")
                return int(value)
            case _ if name in _DURATIONS:
                if parse_duration(value) <= 0 and name in _NEVER_ZERO:
                    raise ValueError("it has to be longer than nothing")
                return value if isinstance(value, str) else f"{value}s"
            case "volumes" | "shared":
                if value and not Path(str(value)).is_absolute():
                    raise ValueError("a folder that machines share has the same whole path on each")
                return str(value)
            case "guards":
                return rules_of(value, is_general=True)
            case "traces":
                if value and not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", str(value)):
                    raise ValueError("it is the address of a collector, such as http://collector:4318")
                return str(value)
            case "trace_ratio":
                if not 0 <= float(value) <= 1:
                    raise ValueError("it is a share, from 0 to 1")
                return float(value)
            case "tls_cert" | "tls_key":
                if value and not Path(str(value)).is_absolute():
                    raise ValueError("it is the whole path of a PEM file")
                return str(value)
            case "cloud":
                cloud_settings(value)
                return dict(value)
            case "lease":
                if value != "none" and parse_duration(value) <= 0:
                    raise ValueError("it has to be longer than nothing, or none")
                return value if isinstance(value, str) else f"{value}s"
            case "workdir_limit" | "data_cache" | "model_limit":
                parse_size(value)
                return str(value)
            case "engine" if value not in _ENGINES:
                raise ValueError("engines are local, ray and none; simulated is one without machines")
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


def _yes_or_no(value: object, default: object) -> bool:
    if not isinstance(default, bool):
        raise ValueError("it is not a matter of yes or no")
    if not isinstance(value, bool):
        raise ValueError("it is a matter of yes or no: write true or false")
    return value


def _word(text: str, *, of: str = "") -> str:
    """The text, when it can be a label's name or value, or a place's name. ``of`` is the label of a value."""
    if not (of and not text) and not _LABEL.fullmatch(text):
        raise ValueError(
            f"{text!r} needs to be up to 63 letters, digits, - _ . or /{f', as the value of {of}' * bool(of)}"
        )
    return text


def _taint(text: str) -> str:
    """``key`` or ``key=value``."""
    key, equals, value = text.partition("=")
    return f"{_word(key)}{equals}{_word(value, of=key)}"
