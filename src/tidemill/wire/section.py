"""What sections are made of: how a field is checked, described and defaulted, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, WithJsonSchema
from pydantic.fields import FieldInfo

from tidemill.errors import InvalidSpec
from tidemill.wire.checks import Refusal, list_of, shown, whole_number


def wrapped(field: str, *kinds: type) -> BeforeValidator:
    """A section that may be written as the value of its main field."""
    return BeforeValidator(lambda value: {field: value} if type(value) in kinds else value)


def taking(check: Callable[[object], Any], schema: Mapping[str, Any]) -> tuple[PlainValidator, WithJsonSchema]:
    """A field that is checked by a function and described by a schema."""
    return PlainValidator(check), WithJsonSchema(dict(schema))


def counted(low: int, high: int) -> tuple[PlainValidator, WithJsonSchema]:
    """A field that takes whole numbers in a range."""
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return taking(whole_number(low, high, f"{low} to {high}"), schema)


TEXT: Final = {"type": "string"}
Section = TypeVar("Section", bound=BaseModel)
SIZE_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["512MB", "16GB", "1.5TB"]}
DURATION_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["90s", "15m", "1h30m"]}


def string_map(values: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The schema of names and values; of names that match ``pattern``."""
    return {"type": ["object", "null"], "additionalProperties": values, "propertyNames": {"pattern": pattern}}


_MOST_CHOICES: Final = 32


def few(value: object, what: str) -> object:
    """A list that is not too long; nothing is an empty one."""
    if value is None:
        return []
    if type(value) is not list:
        raise Refusal(f"{shown(value)} is not a list.", f"Write a list of {what}.")
    if len(value) > _MOST_CHOICES:
        raise Refusal(f"It has {len(value):,} items.", f"Write at most {_MOST_CHOICES}.")
    return value


class StrictSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """A section's fields by the names under which they are written."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def shared(section: Callable[[], Section]) -> Callable[[], Section]:
    """What gives one and the same section, with its defaults: sections cannot change."""
    made = section()
    return lambda: made


def one_or_more(check: Callable[[object], Any], what: str) -> Callable[[object], tuple[Any, ...]]:
    """A check for a list, or for its only item."""
    listed = list_of(check, what)
    return lambda value: tuple(dict.fromkeys(listed([value] if type(value) is str else value)))


def names_schema(examples: list[Any]) -> dict[str, Any]:
    """The schema of one name or several."""
    return {"type": ["array", "string", "null"], "items": TEXT, "examples": examples}


def problem(field: str, value: object, detail: str, mend: str) -> dict[str, Any]:
    """One mistake."""
    return {"field": field, "value": value, "detail": detail, "mend": mend}


def invalid(problems: list[dict[str, Any]]) -> InvalidSpec:
    """One error for all problems; the first speaks for them."""
    first, rest = problems[0], len(problems) - 1
    more = "" if not rest else f" ({rest} more mistake{'s' if rest > 1 else ''} in this spec.)"
    return InvalidSpec(
        first["detail"] + more, field=first["field"], value=first["value"], mend=first["mend"], errors=problems
    )
