"""Models by name: versions known by their content, where each came from, and which is meant by a stage or an alias."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tidemill.model.ids import JobId, ModelId, ModelVersionId, ProjectId, WorkloadId

MODEL_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
ALIAS_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,63}", re.ASCII)
_NOT_ALIASES: Final = re.compile(r"latest|[vV]?[0-9]+", re.ASCII)
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
SCHEME: Final = "models:/"
LATEST: Final = "latest"


class Stage(StrEnum):
    """How far a version of a model has come. One at a time is in staging, and one in production."""

    NONE = "none"
    STAGING = "staging"
    PRODUCTION = "production"
    ARCHIVED = "archived"
    """Out of use; it is kept, and can be named by its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """The stage of a version: since when, who put it there, and what they said why."""

    number: int
    stage: Stage
    since_ns: int
    by: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name that points to one version at a time: since when, who pointed it there, and why."""

    name: str
    number: int
    since_ns: int
    by: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A registered model of a project: its name, and what is meant by its stages and aliases.

    ``placings`` are of versions in another stage than none. ``deleted_ns`` not zero: it and its versions are gone; the
    numbers of these are not given again.
    """

    id: ModelId
    project_id: ProjectId
    name: str
    version: int = 1
    description: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    placings: tuple[Placing, ...] = ()
    aliases: tuple[Alias, ...] = ()
    created_ns: int = 0
    created_by: str = ""
    changed_ns: int = 0
    deleted_ns: int = 0

    def placing(self, number: int) -> Placing:
        """The stage of a version; none when nobody said anything."""
        found = next((one for one in self.placings if one.number == number), None)
        return found or Placing(number=number, stage=Stage.NONE, since_ns=0)

    def in_stage(self, stage: Stage) -> int:
        """The number of the version in staging or in production; zero: there is none."""
        return next((one.number for one in self.placings if one.stage is stage), 0)

    def aliases_of(self, number: int) -> tuple[str, ...]:
        """The aliases that point to a version, by name."""
        return tuple(one.name for one in self.aliases if one.number == number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of a model's files; what was found in their headers, and what somebody said.

    ``format`` is ``safetensors``, ``gguf``, ``onnx``, ``pickle`` or empty. ``precisions`` has the number of parameters
    in each data type, most first. ``framework``, ``architecture``, ``base_model`` and ``licence`` are empty when
    nothing says so. ``code`` are files of Python in it, which whoever loads it may come to run.
    """

    format: str = ""
    framework: str = ""
    architecture: str = ""
    base_model: str = ""
    licence: str = ""
    parameters: int = 0
    precisions: tuple[tuple[str, int], ...] = ()
    code: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The data type of most of its parameters; empty when it is not known."""
        return self.precisions[0][0] if self.precisions else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """What a model was made of: the ``reference`` by which it was named, and the digest of its content."""

    reference: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a version came from. Empty fields are not known.

    ``spec_digest`` is the SHA-256 of the job's spec, as it was pinned; ``data`` the data sets, ``artifacts`` and
    ``models`` the others that the job was given. ``commit`` is a git commit. ``run`` is the id of a run of a tracking
    server and ``source`` what was named as the place of the files.
    """

    job_id: JobId = JobId("")
    workload_id: WorkloadId = WorkloadId("")
    workload: str = ""
    spec_digest: str = ""
    data: tuple[Ancestor, ...] = ()
    artifacts: tuple[Ancestor, ...] = ()
    models: tuple[Ancestor, ...] = ()
    commit: str = ""
    run: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One version of a model: its files by their manifest, and where they came from.

    ``digest`` is the SHA-256 of its manifest, ``size`` the bytes of all its ``files``. ``metrics`` are what its job
    measured, as text so that they stay what they were. ``pickles`` are files that can run code when they are loaded;
    ``pickles_allowed`` says who let them in, and by what. ``deleted_ns`` not zero: its files are gone.
    """

    id: ModelVersionId
    model_id: ModelId
    project_id: ProjectId
    number: int
    digest: str
    size: int
    files: int
    version: int = 1
    description: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    card: ModelCard = ModelCard()
    lineage: Lineage = Lineage()
    metrics: tuple[tuple[str, str], ...] = ()
    pickles: tuple[str, ...] = ()
    pickles_allowed: str = ""
    created_ns: int = 0
    created_by: str = ""
    changed_ns: int = 0
    deleted_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """Which version of a model is meant: by ``number``, ``alias`` or ``stage``; by none of them: the newest."""

    name: str
    number: int = 0
    alias: str = ""
    stage: Stage | None = None

    def __str__(self) -> str:
        if self.alias:
            return f"{SCHEME}{self.name}@{self.alias}"
        if self.stage is not None:
            return f"{SCHEME}{self.name}/{self.stage.value}"
        return f"{SCHEME}{self.name}/{self.number or LATEST}"


def parse_model_reference(text: str) -> ModelReference:
    """The version that is meant by ``models:/NAME/VERSION``, ``models:/NAME/STAGE``, ``models:/NAME@ALIAS``, or in
    short ``NAME``, ``NAME:VERSION``, ``NAME:STAGE``, ``NAME@ALIAS``. Raises: ValueError that says what is wrong.

    >>> str(parse_model_reference("models:/greeter/Production")), str(parse_model_reference("greeter:3"))
    ('models:/greeter/production', 'models:/greeter/3')
    >>> parse_model_reference("greeter@champion").alias
    'champion'
    """
    is_long = text.startswith(SCHEME)
    rest = text.removeprefix(SCHEME)
    name, at, alias = rest.partition("@")
    if at:
        check_alias(alias)
        which = ""
    else:
        name, _, which = rest.partition("/" if is_long else ":")
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(f"{name[:100]!r} cannot be the name of a model")
    if at:
        return ModelReference(name=name, alias=alias)
    if which == LATEST or (not which and not rest.endswith(("/", ":"))):
        return ModelReference(name=name)
    if _NUMBER.fullmatch(which):
        return ModelReference(name=name, number=int(which))
    try:
        return ModelReference(name=name, stage=Stage(which.lower()))
    except ValueError:
        raise ValueError(f"{which[:100]!r} is neither a version's number, nor staging, production or latest") from None


def check_alias(name: str) -> None:
    """Raises: ValueError when that cannot be an alias: what reads like a version cannot be one."""
    if not ALIAS_NAME.fullmatch(name) or _NOT_ALIASES.fullmatch(name):
        raise ValueError(
            f"{name[:100]!r} cannot be an alias: it has letters, digits, - and _, and is not latest or a number"
        )
