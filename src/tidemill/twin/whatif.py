"""What ``--what-if`` changes: ``nodes=+4xH100:8``, ``policy.half_life=1d``, ``site.north.tariff=0.2`` and the like."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Final

from tidemill.catalog import carbon_intensity, country_codes, own_prices, rate_card
from tidemill.control.steering import check_tree
from tidemill.errors import InvalidRequest, TidemillError
from tidemill.model.fleet import Node, Site, SiteKind
from tidemill.model.ids import ProjectId, QueueId, SiteId, queue_id
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.twin.arrivals import Arrival, Outside, Stream
from tidemill.twin.cloud import ORGANIZATION, Conditions
from tidemill.twin.fleet import parse_fleet
from tidemill.units import MILLI, USD_MICRO, parse_duration, parse_size

FIELD: Final = "--what-if"
_RELATIVE: Final = re.compile(r"(?P<sign>[+-])(?P<rest>.+)")
_QUOTAS: Final = ("guaranteed", "limit", "weight", "max_running", "max_queued", "parent")
_ROOT: Final = "root"
_BOOLEANS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, as it was written and as it is made.

    ``speeds`` is how many times as fast work arrives; ``is_of_tree`` is whether the quota tree is another then.
    """

    text: str
    make: Callable[[Conditions], Conditions]
    speeds: float = 1.0
    is_of_tree: bool = False


def parse_change(text: str) -> Change:
    """The change in ``NAME=VALUE``.

    Raises: InvalidRequest that names what can be changed, or which value is wrong.
    """
    name, equals, value = (piece.strip() for piece in text.partition("="))
    head, _, rest = name.partition(".")
    if not equals or not value:
        raise _wrong(text, f"{text!r} is not NAME=VALUE.")
    if name == "nodes":
        return Change(text=text, make=_nodes(value, text))
    if head == "policy" and rest:
        return Change(text=text, make=_policy(rest, value, text))
    if name in ("order", "score"):
        return Change(text=text, make=_policy(name, value, text))
    if head == "site" and "." in rest:
        site, _, what = rest.partition(".")
        return Change(text=text, make=_site(site, what, value, text))
    if head == "price" and rest:
        return Change(text=text, make=_price(rest, value, text))
    if head == "quota" and "." in rest:
        tenant, _, what = rest.rpartition(".")
        return Change(text=text, make=_quota(tenant, what, value, text), is_of_tree=True)
    if name in ("start_delay", "tick"):
        new: dict[str, Any] = {f"{name}_ns": _duration(value, text)}
        return Change(text=text, make=lambda conditions: replace(conditions, **new))
    if name == "load":
        times = _number(value, text)
        if times <= 0:
            raise _wrong(text, "load is above zero: how many times as fast work arrives.")
        return Change(text=text, make=lambda conditions: conditions, speeds=times)
    raise _wrong(text, f"{name!r} is nothing that can be changed.")


def apply(changes: Iterable[Change], conditions: Conditions) -> Conditions:
    """The conditions with all changes, one after the other.

    Raises: InvalidRequest when they make a quota tree that a control plane would refuse too.
    """
    of_tree = []
    for change in changes:
        conditions = change.make(conditions)
        of_tree += [change.text] if change.is_of_tree else []
    if of_tree:
        _check_tree(conditions, ", ".join(of_tree))
    return conditions


def _check_tree(conditions: Conditions, text: str) -> None:
    known = {project.id for project in conditions.projects}
    others = {queue.project_id for queue in conditions.queues if queue.project_id} - known
    tenants = [Project(id=one, organization_id=ORGANIZATION, name=one, created_ns=0) for one in sorted(others)]
    try:
        check_tree(conditions.queues, (), [*conditions.projects, *tenants], conditions.nodes)
    except InvalidRequest as error:
        raise InvalidRequest(error.detail, field=FIELD, value=text, mend=error.mend) from error


def faster(stream: Stream, times: float) -> Stream:
    """The same work, arriving so many times as fast."""
    if times == 1.0:
        yield from stream
        return
    for item in stream:
        at = round(item.at_ns / times)
        yield replace(item, at_ns=at) if isinstance(item, Arrival) else Outside(at, item.fact)


def _nodes(value: str, text: str) -> Callable[[Conditions], Conditions]:
    match = _RELATIVE.fullmatch(value)

    def make(conditions: Conditions) -> Conditions:
        before = conditions.nodes
        home = conditions.sites[0].id
        if match is None:
            return replace(conditions, nodes=_fleet_at(home, value))
        if match["sign"] == "+":
            return replace(conditions, nodes=(*before, *_fleet_at(home, match["rest"], beside=before)))
        return replace(conditions, nodes=_without(before, parse_fleet(match["rest"], field=FIELD), text))

    return make


def _fleet_at(site: SiteId, text: str, *, beside: tuple[Node, ...] = ()) -> tuple[Node, ...]:
    """The machines in words, at a site, numbered after those that are there."""
    first = max((int(found[0]) + 1 for node in beside if (found := re.findall(r"\d+", node.id))), default=0)
    return tuple(replace(node, site_id=site) for node in parse_fleet(text, field=FIELD, first=first))


def _site(name: str, what: str, value: str, text: str) -> Callable[[Conditions], Conditions]:
    """A change of one site, which is added where there is none of that name."""
    head, _, resource = what.partition(".")
    if head == "nodes":
        parse_fleet(value.removeprefix("+"), field=FIELD)
    elif head == "price" and resource:
        _own_prices(resource, value, text)
    elif what not in _OF_A_SITE:
        mend = f"Set site.NAME.{{nodes, price.RESOURCE, {', '.join(_OF_A_SITE)}}}."
        raise _wrong(text, f"A site has no {what!r}.", mend=mend)
    new = _OF_A_SITE[what](value, text) if what in _OF_A_SITE else {}

    def make(conditions: Conditions) -> Conditions:
        sites = {site.id: site for site in conditions.sites}
        known = next((site for site in conditions.sites if name in (site.id, site.name)), None)
        site = known or Site(id=SiteId(name), name=name, kind=SiteKind.ONPREM, engine="simulated")
        nodes = conditions.nodes
        if head == "nodes":
            nodes = (*nodes, *_fleet_at(site.id, value.removeprefix("+"), beside=nodes))
        elif head == "price":
            site = replace(site, prices=tuple(sorted((dict(site.prices) | _own_prices(resource, value, text)).items())))
        sites[site.id] = replace(site, **new)
        return replace(conditions, sites=tuple(sites.values()), nodes=nodes)

    return make


def _tariff(value: str, text: str) -> dict[str, Any]:
    return {"tariff_micro_per_kwh": _at_least(0, _number(value, text), text, USD_MICRO)}


def _carbon(value: str, text: str) -> dict[str, Any]:
    return {
        "carbon_mg_per_kwh": _at_least(0, _number(value, text), text, MILLI),
        "carbon_source": "what-if",
        "carbon_hours": (),
    }


def _pue(value: str, text: str) -> dict[str, Any]:
    return {"pue_milli": _at_least(1, _number(value, text), text, MILLI)}


def _country(value: str, text: str) -> dict[str, Any]:
    try:
        carbon = carbon_intensity(value)
        [code] = country_codes(value)
    except (TidemillError, ValueError) as error:
        raise _wrong(text, f"{value!r} is not a country.", mend="Write an ISO 3166 code such as DEU.") from error
    return {"country": code, "carbon_mg_per_kwh": carbon.mg_per_kwh, "carbon_source": carbon.source, "carbon_hours": ()}


def _site_kind(value: str, text: str) -> dict[str, Any]:
    if value not in SiteKind._value2member_map_:
        raise _wrong(text, f"{value!r} is not a kind of site.", mend="Kinds are onprem, cloud and edge.")
    return {"kind": SiteKind(value)}


_OF_A_SITE: Final[dict[str, Callable[[str, str], dict[str, Any]]]] = {
    "tariff": _tariff,
    "carbon": _carbon,
    "pue": _pue,
    "country": _country,
    "kind": _site_kind,
}


def _at_least(least: float, number: float, text: str, times: int) -> int:
    """The number in whole parts of so many to the unit."""
    if not least <= number < 1_000_000:
        raise _wrong(text, f"It is {least:g} or more.", mend="Write a number.")
    return round(number * times)


def _own_prices(resource: str, value: str, text: str) -> dict[str, int]:
    try:
        return dict(own_prices({resource: value}))
    except TidemillError as error:
        raise InvalidRequest(error.detail, field=FIELD, value=text, mend=error.mend) from error


def _without(nodes: tuple[Node, ...], gone: tuple[Node, ...], text: str) -> tuple[Node, ...]:
    left = list(nodes)
    for node in gone:
        kind = _kind(node)
        last = next((index for index in range(len(left) - 1, -1, -1) if _kind(left[index]) == kind), None)
        if last is None:
            raise _wrong(text, f"The fleet has fewer than {len(gone)} machines of that kind.")
        del left[last]
    if not left:
        raise _wrong(text, "No machine would be left.")
    return tuple(left)


def _kind(node: Node) -> tuple[str, int]:
    return (node.devices[0].model, len(node.devices)) if node.devices else ("cpu", node.cpu_milli)


def _policy(name: str, value: str, text: str) -> Callable[[Conditions], Conditions]:
    known = {item.name.removesuffix("_ns"): item for item in fields(Policy)}
    item = known.get(name)
    if item is None:
        raise _wrong(text, f"The policy has no {name!r}.", mend=f"It has {', '.join(known)}.")
    parsed: int | float | str | bool
    if item.name.endswith("_ns"):
        parsed = _duration(value, text)
    elif isinstance(item.default, bool):
        if value.lower() not in _BOOLEANS:
            raise _wrong(text, f"{value!r} is neither true nor false.", mend="Write true or false.")
        parsed = _BOOLEANS[value.lower()]
    elif isinstance(item.default, int | float):
        number = _number(value, text)
        parsed = int(number) if isinstance(item.default, int) else number
    else:
        parsed = value
    new: dict[str, Any] = {item.name: parsed}
    return lambda conditions: replace(conditions, policy=replace(conditions.policy, **new))


def _price(resource: str, value: str, text: str) -> Callable[[Conditions], Conditions]:
    try:
        named = rate_card({resource: value})
    except TidemillError as error:
        raise InvalidRequest(error.detail, field=FIELD, value=text, mend=error.mend) from error
    own = {rate.resource: rate for rate in named.rates if rate.source == "config.yaml"}

    def make(conditions: Conditions) -> Conditions:
        rates = {rate.resource: rate for rate in conditions.rates.rates} | own
        return replace(
            conditions, rates=replace(conditions.rates, id=f"{conditions.rates.id}+", rates=tuple(rates.values()))
        )

    return make


def _quota(name: str, what: str, value: str, text: str) -> Callable[[Conditions], Conditions]:
    """A change of one queue: that of a tenant, or a department by its own name."""
    if what not in _QUOTAS:
        raise _wrong(text, f"A quota has no {what!r}.", mend=f"Set quota.NAME.{{{', '.join(_QUOTAS)}}}.")
    new: dict[str, Any] = {}
    if what == "weight":
        new = {"weight_milli": round(_number(value, text) * MILLI)}
    elif what in ("max_running", "max_queued"):
        new = {what: int(_number(value, text))}
    elif what != "parent":
        new = {what: _amounts(value, text)}

    def make(conditions: Conditions) -> Conditions:
        queues = {queue.id: queue for queue in conditions.queues}
        queue = _queue_called(name, conditions, text)
        more = dict(new)
        if what == "parent":
            more["parent_id"] = QueueId("")
            if value != _ROOT:
                above = _named(value, conditions.queues) or Queue(id=_department_id(value), name=_plain(value))
                queues[above.id] = above
                more["parent_id"] = above.id
        try:
            queues[queue.id] = replace(queue, **more)
        except ValueError as error:
            raise _wrong(text, f"{error}.") from error
        return replace(conditions, queues=tuple(queues.values()))

    return make


def _queue_called(name: str, conditions: Conditions, text: str) -> Queue:
    """The queue of that name, or of the project of that name, which may have none yet."""
    queue = _named(name, conditions.queues)
    if queue is not None:
        return queue
    project = next((one.id for one in conditions.projects if name in (one.name, one.id)), None)
    if project is None and conditions.projects:
        known = sorted({one.name for one in conditions.projects} | {one.name for one in conditions.queues})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:8]
        raise _wrong(text, f"There is no project or queue {name!r}.", mend=f"There are {', '.join(near)}.")
    project = project or ProjectId(name)  # a tenant of a trace, of whom nothing is known before
    own = next((one for one in conditions.queues if one.project_id == project), None)
    return own or Queue(id=queue_id(project), name=_plain(name), project_id=project)


def _named(name: str, queues: Iterable[Queue]) -> Queue | None:
    return next((queue for queue in queues if name in (queue.name, queue.id)), None)


def _department_id(name: str) -> QueueId:
    return QueueId(f"que_twin/{_plain(name)}")


def _amounts(value: str, text: str) -> tuple[tuple[str, int], ...]:
    """Amounts per resource class in ``gpu:64`` or ``gpu:H100:32+cpu:500``."""
    found = []
    for part in value.split("+"):
        resource, _, amount = part.rpartition(":")
        if not resource:
            raise _wrong(
                text, f"{part!r} is not RESOURCE:AMOUNT.", mend="Write gpu:64, gpu:H100:32, cpu:500 or memory:4TB."
            )
        try:
            found.append((resource, parse_size(amount) if resource == "memory" else round(float(amount) * MILLI)))
        except ValueError as error:
            raise _wrong(text, f"{amount!r} is not an amount of {resource}.") from error
    return tuple(sorted(found))


def _plain(tenant: str) -> str:
    """A tenant's name as that of a queue."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", tenant).strip("-_.")[:63] or "tenant"


def _duration(value: str, text: str) -> int:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise _wrong(text, f"{value!r} is not a time.", mend="Write a time such as 90s, 2h or 1d.") from error


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise _wrong(text, f"{value!r} is not a number.", mend="Write a number.") from error


def _wrong(text: str, what: str, mend: str = "") -> InvalidRequest:
    return InvalidRequest(
        what,
        field=FIELD,
        value=text,
        mend=mend
        or "Change nodes, policy.NAME, order, score, price.RESOURCE, site.NAME.WHAT, quota.NAME.WHAT, start_delay,"
        " tick or load,"
        " such as nodes=+4xH100:8 or policy.half_life=1d.",
    )
