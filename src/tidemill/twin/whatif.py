"""What ``--what-if`` changes: ``nodes=+4xH100:8``, ``policy.half_life=1d``, ``price.H100=1.9`` and the like."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from tidemill.catalog import rate_card
from tidemill.errors import InvalidRequest, TidemillError
from tidemill.model.fleet import Node
from tidemill.model.ids import ProjectId, queue_id
from tidemill.model.policy import Policy
from tidemill.model.queue import Queue
from tidemill.twin.arrivals import Arrival, Outside, Stream
from tidemill.twin.cloud import Conditions
from tidemill.twin.fleet import parse_fleet
from tidemill.units import MILLI, parse_duration, parse_size

FIELD: Final = "--what-if"
_RELATIVE: Final = re.compile(r"(?P<sign>[+-])(?P<rest>.+)")
_QUOTAS: Final = ("guaranteed", "limit", "weight", "max_running")
_BOOLEANS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, as it was written and as it is made. ``speeds`` is how many times as fast work arrives."""

    text: str
    make: Callable[[Conditions], Conditions]
    speeds: float = 1.0


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
    if head == "price" and rest:
        return Change(text=text, make=_price(rest, value, text))
    if head == "quota" and "." in rest:
        tenant, _, what = rest.rpartition(".")
        return Change(text=text, make=_quota(tenant, what, value, text))
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
    """The conditions with all changes, one after the other."""
    for change in changes:
        conditions = change.make(conditions)
    return conditions


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
        if match is None:
            return replace(conditions, nodes=parse_fleet(value, field=FIELD))
        if match["sign"] == "+":
            first = max((int(found[0]) + 1 for node in before if (found := re.findall(r"\d+", node.id))), default=0)
            return replace(conditions, nodes=(*before, *parse_fleet(match["rest"], field=FIELD, first=first)))
        return replace(conditions, nodes=_without(before, parse_fleet(match["rest"], field=FIELD), text))

    return make


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


def _quota(tenant: str, what: str, value: str, text: str) -> Callable[[Conditions], Conditions]:
    if what not in _QUOTAS:
        raise _wrong(text, f"A quota has no {what!r}.", mend=f"Set quota.TENANT.{{{', '.join(_QUOTAS)}}}.")
    new: dict[str, Any]
    if what == "weight":
        new = {"weight_milli": round(_number(value, text) * MILLI)}
    elif what == "max_running":
        new = {"max_running": int(_number(value, text))}
    else:
        new = {what: _amounts(value, text)}

    def make(conditions: Conditions) -> Conditions:
        project = ProjectId(tenant)
        queues = {queue.project_id: queue for queue in conditions.queues}
        queue = queues.get(project) or Queue(id=queue_id(project), name=_plain(tenant), project_id=project)
        try:
            queues[project] = replace(queue, **new)
        except ValueError as error:
            raise _wrong(text, f"{error}.") from error
        return replace(conditions, queues=tuple(queues.values()))

    return make


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
        or "Change nodes, policy.NAME, order, score, price.RESOURCE, quota.TENANT.NAME, start_delay, tick or load,"
        " such as nodes=+4xH100:8 or policy.half_life=1d.",
    )
