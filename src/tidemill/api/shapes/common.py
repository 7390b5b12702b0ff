"""What all answers and bodies have in common: pages, problems, and how names and texts may look."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from typing_extensions import TypedDict

Item = TypeVar("Item")
PLAIN_TEXT = r"^[^\x00]*$"
ENDPOINT = r"^([A-Za-z0-9.-]{1,253}:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5})?$"
Plain = Annotated[str, StringConstraints(max_length=4_096, pattern=PLAIN_TEXT)]
NAME = r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME)]


class Problem(TypedDict):
    """An error (RFC 9457). ``code`` is stable; ``errors`` lists every mistake of a spec."""

    type: str
    title: str
    status: int
    code: str
    kind: str
    detail: str
    field: str
    value: Any
    mend: str
    errors: list[dict[str, Any]]


class PageOf(TypedDict, Generic[Item]):
    """Part of a list; ``next_cursor`` is empty when this was the last."""

    items: list[Item]
    next_cursor: str


class Health(TypedDict):
    """The control plane answers."""

    status: Literal["ok"]
    version: str


class Body(BaseModel):
    """What is sent; fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class NothingIn(Body):
    """An empty object, or no body."""


Nanoseconds = Annotated[int, Field(ge=0, lt=2**63)]
