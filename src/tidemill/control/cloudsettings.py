"""The section ``cloud`` of ``config.yaml``: where machines are rented, which, what waiting is worth, the ceilings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, Final

from tidemill.clouds.booting import BootSettings
from tidemill.clouds.ec2 import Ec2Settings
from tidemill.core.bursting import BurstPolicy
from tidemill.errors import InvalidSetting
from tidemill.model.cloud import Market
from tidemill.model.ids import SiteId
from tidemill.units import MILLI, USD_MICRO, parse_duration, parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSettings:
    """What the section says: of which site the machines are, where they are from, how they boot, when to rent."""

    site: SiteId
    ec2: Ec2Settings
    boot: BootSettings
    policy: BurstPolicy


def cloud_settings(written: object) -> CloudSettings:
    """The settings in a section ``cloud``. Raises: InvalidSetting that names the setting, its value and the mend.

    >>> found = cloud_settings({"site": "burst", "address": "head:7070", "region": "eu-west-1", "image": "ami-1",
    ...     "instance_types": ["g5.xlarge"], "prices": {"g5.xlarge": 1.006}, "max_instances": 2, "max_per_hour": 3})
    >>> found.ec2.prices, found.policy.max_micro_per_hour
    ({'g5.xlarge': 1006000}, 3000000)
    """
    if not isinstance(written, Mapping):
        raise InvalidSetting("It has no settings.", field="cloud", mend="See docs/cloud.md for what goes there.")
    given: dict[str, dict[str, Any]] = {room: {} for room in ("", "ec2", "boot", "policy")}
    for name, value in written.items():
        if name not in _READERS:
            near = difflib.get_close_matches(str(name), _READERS, 1)
            mend = f"Did you mean {near[0]}?" if near else f"Settings are {', '.join(sorted(_READERS))}."
            raise InvalidSetting("There is no such setting.", field=f"cloud.{name}", value=value, mend=mend)
        room, field, read = _READERS[name]
        if value is None:
            continue
        try:
            given[room][field] = read(value)
        except (ValueError, TypeError, InvalidOperation) as error:
            said = "It is not a number." if isinstance(error, InvalidOperation) else str(error)
            mend = "Mend it in the section cloud of config.yaml."
            raise InvalidSetting(said, field=f"cloud.{name}", value=value, mend=mend) from error
    costs = given["policy"].pop("waiting_costs", {})
    needed = {"site": given[""], "region": given["ec2"], "image": given["ec2"], "instance_types": given["ec2"]}
    for name, room_of in needed.items():
        if not room_of.get(name):
            raise InvalidSetting("It has to be set.", field=f"cloud.{name}", mend="See docs/cloud.md.")
    if not given["boot"].get("address"):
        mend = (
            "Write the address under which rented machines reach the control plane, such as https://head.example:7070."
        )
        raise InvalidSetting("It has to be set.", field="cloud.address", mend=mend)
    try:
        policy = BurstPolicy(**given["policy"], **costs)
    except ValueError as error:
        raise InvalidSetting(str(error), field="cloud", mend="Mend it in the section cloud of config.yaml.") from error
    return CloudSettings(
        site=SiteId(given[""]["site"]),
        ec2=Ec2Settings(**given["ec2"]),
        boot=BootSettings(**given["boot"]),
        policy=policy,
    )


def _vendor(value: object) -> str:
    if value != "ec2":
        raise ValueError("the vendor of this version is ec2")
    return "ec2"


def _word(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("it is one word")
    return str(value)


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("it is a list")
    return tuple(_word(each) for each in value)


def _markets(value: object) -> tuple[Market, ...]:
    known = [market.value for market in Market]
    for each in _words(value):
        if each not in known:
            raise ValueError(f"markets are {' and '.join(known)}")
    return tuple(Market(each) for each in dict.fromkeys(_words(value)))


def _usd(value: object) -> int:
    """Micro-USD."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("it is an amount of US dollars, such as 2.50")
    micro = Decimal(str(value).strip().removeprefix("$")) * USD_MICRO
    if not micro.is_finite() or micro < 0:
        raise ValueError("it is an amount of US dollars, zero or more")
    return int(micro.to_integral_value(ROUND_HALF_UP))


def _prices(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError("it is a list of types, each with US dollars for one hour")
    return {str(name): _usd(price) for name, price in value.items()}


def _waiting_costs(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or set(value) - {"job", "gpu"}:
        raise ValueError(
            "it has job and gpu: US dollars for an hour of waiting, of each job and of each GPU it asks for"
        )
    return {f"waiting_{name}_micro_per_hour": _usd(price) for name, price in value.items()}


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("it is a whole number, zero or more")
    return value


def _duration(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("it is a duration, such as 10m")
    return parse_duration(value)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("it is a size, such as 100GB")
    return parse_size(value)


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it is a matter of yes or no: write true or false")
    return value


def _factor(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("it is a number, such as 1.25")
    return round(value * MILLI)


_READERS: Final[Mapping[str, tuple[str, str, Callable[[Any], Any]]]] = {
    "vendor": ("", "vendor", _vendor),
    "site": ("", "site", _word),
    "region": ("ec2", "region", _word),
    "image": ("ec2", "image", _word),
    "instance_types": ("ec2", "instance_types", _words),
    "prices": ("ec2", "prices", _prices),
    "markets": ("ec2", "markets", _markets),
    "subnets": ("ec2", "subnets", _words),
    "security_groups": ("ec2", "security_groups", _words),
    "instance_profile": ("ec2", "instance_profile", _word),
    "disk": ("ec2", "disk_bytes", _size),
    "spot_headroom": ("ec2", "spot_headroom_milli", _factor),
    "country": ("ec2", "country", _word),
    "endpoint_url": ("ec2", "endpoint_url", _word),
    "address": ("boot", "address", _word),
    "package": ("boot", "package", _word),
    "setup": ("boot", "setup", _word),
    "waiting_costs": ("policy", "waiting_costs", _waiting_costs),
    "deadlines": ("policy", "deadlines", _yes_or_no),
    "max_instances": ("policy", "max_instances", _count),
    "max_per_hour": ("policy", "max_micro_per_hour", _usd),
    "max_per_month": ("policy", "max_micro_per_month", _usd),
    "boot": ("policy", "boot_ns", _duration),
    "boot_limit": ("policy", "boot_limit_ns", _duration),
    "idle": ("policy", "idle_ns", _duration),
    "wind_down": ("policy", "wind_down_ns", _duration),
    "horizon": ("policy", "horizon_ns", _duration),
}
"""Where each setting goes, and what reads it."""
