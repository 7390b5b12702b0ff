"""What the fields take that say when and where a workload runs, and beside what."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, NamedTuple

from tidemill.errors import InvalidSetting
from tidemill.model.fleet import Level, SiteKind
from tidemill.model.ids import WorkloadId
from tidemill.model.spec import MAX_REPLICAS, MAX_WORKERS, PRIORITY_RANGE, Dependency, DependsOn, Tier, Weight
from tidemill.units import MILLI, SECOND_NS
from tidemill.wire.checks import LABEL, NAME, Refusal, duration_of, label_of, list_of, shown, text_of

MAX_INSTANT_NS: Final = 1 << 62
"""In the year 2116; sums of instants and durations stay below 2^63."""
PRIORITIES: Final = {"low": -100, "normal": 0, "high": 100}
MAX_SPEED: Final = 1_000
MAX_WEIGHT: Final = 1_000
_SPAN: Final = re.compile(r"(\d{1,6})\.\.(\d{1,6})", re.ASCII)
_ISO: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d)?)(\.\d{1,9})?\s*(Z|[+-]\d\d:?\d\d)", re.ASCII | re.IGNORECASE
)
_NO_ZONE: Final = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?(\.\d*)?)?", re.ASCII)
_MOMENT_MEND: Final = "Write for example 2027-03-01T09:00:00Z, 2027-03-01T09:00+01:00, or 2h for two hours from now."


class Span(NamedTuple):
    """How many workers a gang has at least and at most."""

    smallest: int
    largest: int


class Moment(NamedTuple):
    """An instant in ns since 1970, or a length of time after the one at which it is read."""

    ns: int
    is_relative: bool = False

    def at(self, now: int) -> int:
        """The instant, in ns."""
        return now + self.ns if self.is_relative else self.ns


def span_of(value: object) -> Span:
    """Raises: Refusal, as everything here."""
    return _span(value, "workers", least=1, most=MAX_WORKERS)


def replicas_of(value: object) -> Span:
    """How many replicas a service has at least and at most."""
    found = _span(value, "replicas", least=0, most=MAX_REPLICAS)
    if not found.largest:
        raise Refusal(
            f"{shown(value)} is no replica at all.", "Write for example 0..1 to have one when it is asked for."
        )
    return found


def _span(value: object, what: str, *, least: int, most: int) -> Span:
    example = "0..8" if not least else "2..8"
    mend = f"Write 1 to {most}, without quotes, or a range such as {example}."
    if type(value) is str and (match := _SPAN.fullmatch(value.strip())):
        smallest, largest = int(match[1]), int(match[2])
        if smallest > largest:
            raise Refusal(f"{shown(value)} ends before it begins.", "Write the smaller number first, such as 2..8.")
    elif type(value) is int:
        smallest = largest = value
    else:
        raise Refusal(f"{shown(value)} is not a number of {what}.", mend)
    if not least <= smallest <= largest <= most:
        raise Refusal(f"{shown(value)} is out of range.", mend)
    return Span(smallest, largest)


def moment_of(value: object) -> Moment:
    """An ISO 8601 time with its zone, or a duration from now, with ``in`` before it or without."""
    text = text_of(value, limit=64, mend=_MOMENT_MEND).strip()
    if match := _ISO.fullmatch(text):
        day, time, fraction, zone = match.groups()
        try:
            seconds = datetime.fromisoformat(f"{day}T{time}{zone.upper()}").timestamp()
        except (ValueError, OverflowError) as error:
            raise Refusal(f"There is no time {shown(text)}.", _MOMENT_MEND) from error
        ns = int(seconds) * SECOND_NS + (int(fraction[1:].ljust(9, "0")) if fraction else 0)
        if not 0 < ns < MAX_INSTANT_NS:
            raise Refusal(f"{shown(text)} is too far away.", _MOMENT_MEND)
        return Moment(ns)
    if _NO_ZONE.fullmatch(text):
        raise Refusal(
            f"{shown(text)} does not say in which time zone.",
            "Add a time and its zone: 2027-03-01T09:00:00Z or 2027-03-01T09:00:00+01:00.",
        )
    try:
        return Moment(duration_of(text.removeprefix("in ").strip()), is_relative=True)
    except Refusal as refusal:
        is_long = "longer" in str((refusal.context or {}).get("detail"))
        detail = f"{shown(text)} is too far away." if is_long else f"{shown(text)} is not a time."
        raise Refusal(detail, _MOMENT_MEND) from refusal


def instant_text(ns: int) -> str:
    """An instant as ``moment_of`` reads it, in UTC, to the nanosecond.

    >>> instant_text(1_500_000_000)
    '1970-01-01T00:00:01.5Z'
    """
    seconds, part = divmod(ns, SECOND_NS)
    whole = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return whole + (f".{part:09}".rstrip("0") if part else "") + "Z"


def length_of(value: object) -> int:
    """A duration above zero."""
    ns = duration_of(value)
    if not ns:
        raise Refusal("It has no length.", "Write for example 90s, 15m, 2h or 1h30m.")
    return ns


def priority_of(value: object) -> int:
    """A number, or the name of a class."""
    low, high = PRIORITY_RANGE
    mend = f"Write low, normal, high, or {low} to {high} without quotes."
    if type(value) is str and value in PRIORITIES:
        return PRIORITIES[value]
    if type(value) is not int:
        raise Refusal(f"{shown(value)} is not a priority.", mend)
    if not low <= value <= high:
        raise Refusal(f"{shown(value)} is out of range.", mend)
    return value


def tier_of(value: object) -> Tier:
    """What sort of capacity."""
    if type(value) is not str or value not in Tier._value2member_map_:
        raise Refusal(f"{shown(value)} is not a sort of capacity.", "Write spot, on_demand or reserved.")
    return Tier(value)


def flag_of(value: object) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise Refusal(f"{shown(value)} is neither true nor false.", "Write true or false, without quotes.")
    return value


def level_of(*levels: Level) -> Callable[[object], Level]:
    """A check for one of these levels of topology."""

    def check(value: object) -> Level:
        if type(value) is not str or value not in levels:
            raise Refusal(f"{shown(value)} is not a level of topology here.", f"Write {_either(levels)}.")
        return Level(value)

    return check


def _either(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"


def choice_of(value: object) -> str:
    """A label's value, or several with ``|`` between them, any of which does."""
    text = label_of(value)
    if not all(part.strip() for part in text.split("|")):
        raise Refusal(f"{shown(text)} has an empty choice.", "Write for example a, or a|b for either.")
    return text


def toleration_of(value: object) -> str:
    """A taint that is put up with."""
    text = text_of(value, limit=330)
    key, equals, setting = text.partition("=")
    if not LABEL.fullmatch(key) or (equals and not setting):
        raise Refusal(f"{shown(text)} is not a taint.", "Write its key, or key=value.")
    return text


def site_of(value: object) -> str:
    """The name of a site."""
    text = text_of(value, limit=100)
    if not NAME.fullmatch(text):
        raise Refusal(f"{shown(text)} is not the name of a site.", "See tidemill site list for their names.")
    return text


def kind_of_site(value: object) -> SiteKind:
    """What sort of site."""
    if type(value) is not str or value not in SiteKind._value2member_map_:
        raise Refusal(f"{shown(value)} is not a kind of site.", "Kinds are onprem, cloud and edge.")
    return SiteKind(value)


def countries_of(value: object) -> tuple[str, ...]:
    """Countries by ISO 3166 alpha-3 code, each once; EU stands for its members."""
    from tidemill import catalog

    found: dict[str, None] = {}
    for text in list_of(lambda item: text_of(item, limit=100), "countries")([value] if type(value) is str else value):
        try:
            found.update(dict.fromkeys(catalog.country_codes(text)))
        except InvalidSetting as error:
            raise Refusal(f"{shown(text)} is not a country.", error.mend) from error
    return tuple(found)


def weights_of(value: object) -> tuple[tuple[Weight, int], ...]:
    """What weighs when a site is chosen: one thing, or several with their parts in thousandths."""
    mend = "Write price, carbon, start or latency, or parts such as {price: 2, carbon: 1}."
    if value is None:
        return ()
    given = {value: 1} if type(value) is str else value
    if type(given) is not dict:
        raise Refusal(f"{shown(value)} is nothing that weighs.", mend)
    found = []
    for what, part in given.items():
        if type(what) is not str or what not in Weight._value2member_map_:
            raise Refusal(f"{shown(what)} is nothing that weighs.", mend)
        if type(part) not in (int, float) or not 0 < part <= MAX_WEIGHT or not (milli := round(part * MILLI)):
            raise Refusal(f"{shown(part)} is not a part.", f"Write a number above 0 and up to {MAX_WEIGHT}.")
        found.append((Weight(what), milli))
    return tuple(sorted(found))


def speed_of(value: object) -> int:
    """Thousandths of the speed of ``resources``."""
    mend = "Write for example 0.6 when it is slower than resources, or 2 when it is twice as fast."
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{shown(value)} is not a speed.", mend)
    if not 0 < value <= MAX_SPEED or not (milli := round(value * MILLI)):
        raise Refusal(f"{shown(value)} is out of range.", mend)
    return milli


def by_speed_of(value: object) -> bool:
    """Whether the fastest of several resources is preferred, not the first."""
    if value not in ("order", "speed"):
        raise Refusal(f"{shown(value)} is not an order of preference.", "Write order or speed.")
    return value == "speed"


def after_of(value: object) -> tuple[Dependency, ...]:
    """What has to have ended first, by how it has to have ended; a workload's name stands where its id will."""
    if value is None:
        return ()
    if type(value) is not dict:
        value = {DependsOn.OK.value: value}
    for how in value:
        if how not in DependsOn._value2member_map_:
            raise Refusal(f"{shown(how)} is not a way to end.", "Write ok, any or failed, each with a list.")
    found: dict[str, Dependency] = {}
    for on in DependsOn:
        given = value.get(on.value)
        for name in list_of(_workload, "names or ids of workloads")([given] if type(given) is str else given):
            if name in found:
                raise Refusal(f"{shown(name)} is there twice.", "Name each workload once.")
            found[name] = Dependency(workload_id=WorkloadId(name), on=on)
    return tuple(found.values())


def _workload(value: object) -> str:
    text = text_of(value, limit=1_000)
    if not NAME.fullmatch(text):
        raise Refusal(f"{shown(text)} is neither a workload's name nor its id.", "See tidemill ps for their names.")
    return text
