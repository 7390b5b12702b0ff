"""What runners are told, and what they tell."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints
from typing_extensions import TypedDict

from tidemill.api.shapes.common import Nanoseconds, Plain


class DirectiveOut(TypedDict):
    """What the runner should do."""

    directive: Literal["run", "stop"]
    grace_ns: int


class OffsetOut(TypedDict):
    """From where the log goes on."""

    offset: int


class CommandsOut(TypedDict):
    """What waits for the runner."""

    commands: list[dict[str, Any]]


class PreparedIn(BaseModel):
    """The runner is there and prepares."""

    type: Literal["prepared"]
    at_ns: Nanoseconds


class StartedIn(BaseModel):
    """The worker's process runs."""

    type: Literal["started"]
    at_ns: Nanoseconds
    isolation: list[Plain] = Field(default=[], max_length=100)


class BecameIn(BaseModel):
    """A service's worker became ready, or not."""

    type: Literal["became"]
    at_ns: Nanoseconds
    ready: bool
    endpoint: Annotated[
        str, StringConstraints(pattern=r"^([A-Za-z0-9.-]{1,253}:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5})?$")
    ] = ""


class ExitedIn(BaseModel):
    """The worker ended."""

    type: Literal["exited"]
    at_ns: Nanoseconds
    exit_code: int = Field(ge=-1_000, le=100_000)
    cause: str = ""
    detail: Annotated[str, StringConstraints(max_length=100_000)] = ""
    cpu_used_ns: Nanoseconds = 0


RunnerEvent = Annotated[PreparedIn | StartedIn | BecameIn | ExitedIn, Field(discriminator="type")]


class ReportIn(BaseModel):
    """What happened, in order; harmless to repeat."""

    fence: int = Field(ge=0, lt=2**63)
    events: list[RunnerEvent] = Field(max_length=1_000)


class BeatIn(BaseModel):
    """The runner lives."""

    fence: int = Field(ge=0, lt=2**63)
    cpu_used_ns: Nanoseconds = 0
    rss_bytes: Nanoseconds = 0
