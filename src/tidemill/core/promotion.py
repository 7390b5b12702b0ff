"""Which version of a model is meant: stages and aliases, as they are moved by people. Pure.

A stage other than none and archived has one version at a time, and so has an alias: what moves there takes the place
of what was there. So a name such as ``models:/greeter/production`` never means two things.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tidemill.model.registry import Alias, Model, ModelReference, Placing, Stage

_FOR_ONE: Final = (Stage.STAGING, Stage.PRODUCTION)


def placed(
    model: Model, number: int, stage: Stage, *, now: int, by: str, why: str = "", displaced: Stage = Stage.ARCHIVED
) -> Model:
    """The model with that version in that stage; the same when it is there. ``displaced`` is where another one goes
    that was there.

    >>> from tidemill.model.ids import ModelId, ProjectId
    >>> one = Model(id=ModelId("m"), project_id=ProjectId("p"), name="greeter")
    >>> for number in (1, 2):
    ...     one = placed(one, number, Stage.PRODUCTION, now=number, by="ann")
    >>> [(it.number, it.stage.value) for it in one.placings]
    [(1, 'archived'), (2, 'production')]
    """
    if model.placing(number).stage is stage:
        return model
    before = model.in_stage(stage) if stage in _FOR_ONE else 0
    kept = [one for one in model.placings if one.number not in (number, before)]
    if before and displaced is not Stage.NONE:
        told = f"version {number} took its place"
        kept.append(Placing(number=before, stage=displaced, since_ns=now, by=by, why=told))
    if stage is not Stage.NONE:
        kept.append(Placing(number=number, stage=stage, since_ns=now, by=by, why=why))
    return replace(model, placings=tuple(sorted(kept, key=lambda one: one.number)), changed_ns=now)


def pointed(model: Model, name: str, number: int, *, now: int, by: str, why: str = "") -> Model:
    """The model whose alias points to that version, and to no other; the same when it does."""
    if name in model.aliases_of(number):
        return model
    kept = [one for one in model.aliases if one.name != name]
    kept.append(Alias(name=name, number=number, since_ns=now, by=by, why=why))
    return replace(model, aliases=tuple(sorted(kept, key=lambda one: one.name)), changed_ns=now)


def unpointed(model: Model, name: str, *, now: int) -> Model:
    """The model without that alias; the same when there was none."""
    kept = tuple(one for one in model.aliases if one.name != name)
    return model if len(kept) == len(model.aliases) else replace(model, aliases=kept, changed_ns=now)


def forgotten(model: Model, number: int, *, now: int) -> Model:
    """The model that knows nothing more of a version."""
    kept = tuple(one for one in model.placings if one.number != number)
    aliases = tuple(one for one in model.aliases if one.number != number)
    return replace(model, placings=kept, aliases=aliases, changed_ns=now)


def why_needed(model: Model, number: int) -> str:
    """Why a version may not be deleted now, in a sentence; empty when nothing speaks against it."""
    stage = model.placing(number).stage
    if stage in _FOR_ONE:
        return f"{model.name}:{number} is in {stage.value}."
    if aliases := model.aliases_of(number):
        return f"{', '.join(aliases)} {'points' if len(aliases) == 1 else 'point'} to {model.name}:{number}."
    return ""


def meant(model: Model, reference: ModelReference, newest: int) -> int:
    """The number of the version that is meant, which there may not be; zero when the stage or alias has none."""
    if reference.alias:
        return next((one.number for one in model.aliases if one.name == reference.alias), 0)
    if reference.stage is not None:
        return model.in_stage(reference.stage)
    return reference.number or newest
