"""What administrators send: places in the quota tree, reservations; checked all at once, as specs are."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tidemill.errors import InvalidRequest
from tidemill.model.events import Marking
from tidemill.model.queue import MEMORY, Amounts
from tidemill.model.resources import GpuRequest
from tidemill.units import MILLI
from tidemill.wire.checks import (
    LABEL,
    MAX_ERRORS,
    MAX_ITEMS,
    NAME,
    Refusal,
    label_of,
    list_of,
    mapping_of,
    name_of,
    shown,
    size_of,
    text_of,
)
from tidemill.wire.fields import check_model, gpus_of
from tidemill.wire.reading import plain
from tidemill.wire.scheduling import Moment, flag_of, length_of, moment_of
from tidemill.wire.section import TEXT, StrictSection, counted, problem, taking
from tidemill.wire.writing import milli_json, size_json

Request = TypeVar("Request", bound=BaseModel)
_CLASS: Final = re.compile(r"(cpu|memory|gpu)|gpu:([A-Za-z0-9][A-Za-z0-9 ._-]{0,63})", re.ASCII)
_CLASS_MEND: Final = "Resource classes are gpu, gpu:MODEL, cpu and memory."
_MOST: Final = 10**6
_AMOUNTS_SCHEMA: Final = {
    "type": ["object", "null"],
    "propertyNames": {"pattern": "^(cpu|memory|gpu(:.+)?)$"},
    "additionalProperties": {"type": ["number", "string"]},
    "examples": [{"gpu": 8, "gpu:H100": 4, "cpu": 64, "memory": "512GB"}],
}


def amounts_of(value: object) -> Amounts:
    """GPUs and cores as numbers, memory as a size, by resource class. Raises: Refusal."""
    if value is None:
        return ()
    if type(value) is not dict:
        raise Refusal(f"{shown(value)} is not a mapping.", "Write for example {gpu: 8, cpu: 64, memory: 512GB}.")
    if len(value) > MAX_ITEMS:
        raise Refusal(f"It has {len(value):,} entries.", f"Write at most {MAX_ITEMS:,}.")
    found = []
    for name, amount in value.items():
        match = _CLASS.fullmatch(name) if type(name) is str else None
        if match is None:
            raise Refusal(f"{shown(name)} is not a resource class.", _CLASS_MEND)
        if match[2]:
            check_model(match[2])
        found.append((str(name), size_of(amount) if name == MEMORY else _units(str(name), amount)))
    return tuple(sorted(found))


def _units(name: str, value: object) -> int:
    mend = "Write a number, such as 8 or 0.5."
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{name}: {shown(value)} is not a number.", mend)
    if not 0 <= value <= _MOST:
        raise Refusal(f"{name}: {shown(value)} is out of range.", mend)
    return round(value * MILLI)


def amounts_json(amounts: Amounts) -> dict[str, Any]:
    """The inverse of ``amounts_of``."""
    return {name: size_json(amount) if name == MEMORY else milli_json(amount) for name, amount in amounts}


def weight_of(value: object) -> int:
    """Thousandths of a weight."""
    mend = "Write a number above zero, such as 1 or 2.5; to give a queue nothing, limit it."
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{shown(value)} is not a weight.", mend)
    if not 0 < value <= _MOST or not (milli := round(value * MILLI)):
        raise Refusal(f"{shown(value)} is not a weight: it has to be above zero.", mend)
    return milli


def _name_or_none(value: object) -> str:
    return "" if value in (None, "") else name_of(value)


_NAME_SCHEMA: Final = {**TEXT, "pattern": NAME.pattern, "maxLength": 63}
_OTHER_SCHEMA: Final = {"type": ["string", "null"], "maxLength": 63}


class QueueIn(StrictSection):
    """A place in the quota tree, whole: what is left out is at its default."""

    name: Annotated[str, *taking(name_of, _NAME_SCHEMA)] = Field(description="Its name.")
    parent: Annotated[str, *taking(_name_or_none, _OTHER_SCHEMA)] = Field(
        default="", description="Name of the queue above it; right under the fleet when left out."
    )
    project: Annotated[str, *taking(_name_or_none, _OTHER_SCHEMA)] = Field(
        default="", description="The project whose jobs wait in it; such a queue has none below it."
    )
    weight: Annotated[int, *taking(weight_of, {"type": "number", "exclusiveMinimum": 0, "maximum": _MOST})] = Field(
        default=MILLI, description="By what is not guaranteed is shared.", json_schema_extra={"default": 1}
    )
    guaranteed: Annotated[Amounts, *taking(amounts_of, _AMOUNTS_SCHEMA)] = Field(
        default=(), description="What it can take back from those who borrowed it.", json_schema_extra={"default": {}}
    )
    limit: Annotated[Amounts, *taking(amounts_of, _AMOUNTS_SCHEMA)] = Field(
        default=(), description="What it never holds more of.", json_schema_extra={"default": {}}
    )
    max_running: Annotated[int, *counted(0, 10**9)] = Field(
        default=0, description="How many jobs run at the same time, at most; 0 for no cap."
    )
    max_queued: Annotated[int, *counted(0, 10**9)] = Field(
        default=0, description="How many jobs wait at the same time, at most; 0 for no cap."
    )


class TreeIn(StrictSection):
    """Many places in the quota tree, all of them or none."""

    queues: list[QueueIn] = Field(min_length=1, max_length=10_000, description="The queues.")


_NOW: Final = Moment(0, is_relative=True)


def _start_of(value: object) -> Moment:
    return _NOW if value == "now" else moment_of(value)


_MOMENT_SCHEMA: Final = {**TEXT, "examples": ["2027-03-01T09:00:00Z", "in 2h"]}
_DURATION_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["4h", "7d"]}


class ReservationIn(StrictSection):
    """Whole machines for a project, or for nobody, at a time that is known before."""

    name: Annotated[str, *taking(name_of, _NAME_SCHEMA)] = Field(
        description="Its name, which workloads say in `reservation`."
    )
    nodes: Annotated[int, *counted(0, 100_000)] = Field(
        default=0, description="How many machines, of those that fit `gpus` and `labels`; Tidemill chooses them."
    )
    node: Annotated[
        tuple[str, ...],
        *taking(list_of(lambda item: text_of(item, limit=200), "machines"), {"type": ["array", "null"], "items": TEXT}),
    ] = Field(default=(), description="The machines, by name or id, instead of a number of them.")
    gpus: Annotated[
        GpuRequest | None, *taking(gpus_of, {"type": ["string", "number", "null"], "examples": ["H100:8"]})
    ] = Field(default=None, description="What each machine has at least.")
    labels: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(LABEL, label_of, "label: value", "Use letters, digits, - _ . or /."),
            {"type": ["object", "null"], "additionalProperties": {"type": ["string", "number", "boolean"]}},
        ),
    ] = Field(default=(), description="Labels that each machine has.", json_schema_extra={"default": {}})
    start: Annotated[Moment, *taking(_start_of, _MOMENT_SCHEMA)] = Field(
        description="When the (first) window opens: `now`, a time with its zone, or so long from now."
    )
    duration: Annotated[int, *taking(length_of, _DURATION_SCHEMA)] = Field(description="How long a window is open.")
    every: Annotated[int, *taking(length_of, _DURATION_SCHEMA)] = Field(
        default=0, description="After how long it comes again; once when left out."
    )
    until: Annotated[Moment, *taking(moment_of, _MOMENT_SCHEMA)] = Field(
        default=Moment(0), description="When it stops coming again.", json_schema_extra={"default": ""}
    )
    project: Annotated[str, *taking(_name_or_none, _OTHER_SCHEMA)] = Field(
        default="", description="Whose it is; the only or default project when left out."
    )
    maintenance: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False, description="For nobody: nothing runs there then.", json_schema_extra={"default": False}
    )


def _marking_of(value: object) -> Marking:
    if type(value) is not str or value not in Marking._value2member_map_:
        raise Refusal(f"{shown(value)} cannot be done to a machine.", "Write cordon, drain or resume.")
    return Marking(value)


class MarkIn(StrictSection):
    """What is wanted of a machine."""

    marking: Annotated[Marking, *taking(_marking_of, {**TEXT, "enum": [one.value for one in Marking]})] = Field(
        description="`cordon`, `drain` or `resume`."
    )
    reason: Annotated[str, *taking(lambda value: text_of(value, limit=1_000), {**TEXT, "maxLength": 1_000})] = Field(
        default="", description="Why, for those who wonder."
    )


class CheckpointedIn(StrictSection):
    """A job's word that its work up to now is safe."""

    detail: Annotated[str, *taking(lambda value: text_of(value, limit=1_000), {**TEXT, "maxLength": 1_000})] = Field(
        default="", description="Where it is, or which step it was."
    )


class StopAllIn(StrictSection):
    """That every job is meant: nobody asks for that by leaving something out."""

    all: Annotated[bool, *taking(flag_of, {"const": True})] = Field(default=False, description="True: all of them.")

    def model_post_init(self, _: Any) -> None:
        """Refuse whatever does not say so."""
        if not self.all:
            raise InvalidRequest("It ends every job.", field="all", value=self.all, mend='Say so: {"all": true}.')


def read_body(model: type[Request], given: object) -> Request:
    """What was sent, as ``model``. Raises: InvalidRequest; ``data["errors"]`` lists every mistake."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems = [_told(item, model) for item in error.errors(include_url=False)[:MAX_ERRORS]]
        raise _refused(problems) from None


def _told(item: Any, model: type[BaseModel]) -> dict[str, Any]:
    place = item["loc"]
    field, value = ".".join(str(part) for part in place), plain(item["input"])
    known = [*(QueueIn if place[:1] == ("queues",) and len(place) > 1 else model).model_fields]
    match item["type"]:
        case "refused":
            detail, mend = item["ctx"]["detail"], item["ctx"]["mend"]
        case "extra_forbidden":
            near = difflib.get_close_matches(str(place[-1]), known, 1)
            detail, value = f"There is no field {shown(place[-1])}.", None
            mend = f"Did you mean {near[0]}?" if near else f"Fields are {', '.join(known)}."
        case "missing":
            detail, mend, value = "It is needed.", f"Write {place[-1]}.", None
        case "model_type" | "dict_type" | "model_attributes_type":
            detail, mend = f"{shown(item['input'])} is not a mapping.", f"Write a mapping with {', '.join(known)}."
        case "list_type":
            detail, mend = f"{shown(item['input'])} is not a list.", "Write a list."
        case _:
            detail, mend = f"{item['msg']}.", "See the REST reference."
    return problem(field, value, detail, mend)


def _refused(problems: list[dict[str, Any]]) -> InvalidRequest:
    first, rest = problems[0], len(problems) - 1
    more = "" if not rest else f" ({rest} more mistake{'s' if rest > 1 else ''}.)"
    return InvalidRequest(
        first["detail"] + more, field=first["field"], value=first["value"], mend=first["mend"], errors=problems
    )
