"""Guardrails: rules for what models are asked and answer, and what was decided by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct

from tidemill.model.ids import ProjectId, TokenId

MOST_RULES: Final = 32


class Action(StrEnum):
    """What is done where a rule finds something; the later ones go before the earlier."""

    ALLOW = "allow"
    """Nothing but to note it."""
    FLAG = "flag"
    """It passes, and the answer says so in ``X-Tidemill-Guard``."""
    REDACT = "redact"
    """What was found is replaced by what it is, or set to what is within the limits."""
    REFUSE = "refuse"
    """The request is not answered, or its answer ends."""


class Stage(StrEnum):
    """Where a rule looks."""

    REQUEST = "request"
    RESPONSE = "response"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRule:
    """``kind`` names the plug-in that looks, ``options`` are its own. ``name`` is the rule's, for those who read of it.

    ``projects`` and ``models`` empty: all of them.
    """

    name: str
    kind: str
    action: Action = Action.REFUSE
    on: tuple[Stage, ...] = (Stage.REQUEST,)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    projects: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.on:
            raise ValueError("a rule looks at requests, at responses, or at both")

    def concerns(self, *, project: str, model: str) -> bool:
        """Whether it is for that project's model."""
        return (not self.projects or project in self.projects) and (not self.models or model in self.models)


class Decision(Struct, frozen=True, kw_only=True, gc=False):
    """What one rule decided about one request; ``found`` counts what it found, by label, and has no word of it.

    ``id`` is the gateway's, so that it is in the books once however often told.
    """

    id: str
    at_ns: int
    request_id: str
    project_id: ProjectId
    token_id: TokenId
    model: str
    rule: str
    kind: str
    stage: str
    action: str
    found: dict[str, int]
