"""Artifacts, models, volumes, data sets and blobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from tidemill.api.shapes.common import PLAIN_TEXT, Body, Name, Plain


class ArtifactOut(TypedDict):
    """One version of a named artifact."""

    id: str
    name: str
    version: int
    project: str
    digest: str
    size: int
    created_at_ns: int
    job: str
    metadata: dict[str, str]


class StageOut(TypedDict):
    """The stage of a version: since when, who put it there and why."""

    stage: str
    since_at_ns: int
    by: str
    why: str


class AliasOut(TypedDict):
    """A name that points to one version at a time."""

    name: str
    version: int
    since_at_ns: int
    by: str
    why: str


class ModelOut(TypedDict):
    """A model of the registry. ``production`` and ``staging`` are numbers of versions; zero: none is there."""

    id: str
    name: str
    project: str
    description: str
    tags: dict[str, str]
    newest: int
    versions: int
    production: int
    staging: int
    aliases: list[AliasOut]
    created_at_ns: int
    created_by: str
    changed_at_ns: int


class AncestorOut(TypedDict):
    """What a model was made of."""

    reference: str
    digest: str


class LineageOut(TypedDict):
    """Where a version came from; what is empty is not known. ``spec_digest`` is the SHA-256 of the job's spec."""

    job: str
    workload_id: str
    workload: str
    spec_digest: str
    data: list[AncestorOut]
    artifacts: list[AncestorOut]
    models: list[AncestorOut]
    commit: str
    run: str
    source: str


class ModelUserOut(TypedDict):
    """What is not over and was given this version."""

    workload_id: str
    name: str
    kind: str


class ModelVersionOut(TypedDict):
    """One version of a model. ``digest`` is its manifest's; ``precisions`` has the parameters by data type.

    ``pickles`` are files that can run code when they are loaded, and ``pickles_allowed`` says who let them in.
    """

    id: str
    name: str
    version: int
    project: str
    digest: str
    size: int
    files: int
    description: str
    tags: dict[str, str]
    stage: StageOut
    aliases: list[str]
    format: str
    framework: str
    architecture: str
    base_model: str
    licence: str
    parameters: int
    precision: str
    precisions: dict[str, int]
    code: list[str]
    metrics: dict[str, str]
    pickles: list[str]
    pickles_allowed: str
    lineage: LineageOut
    used_by: list[ModelUserOut]
    cached_on: list[str]
    created_at_ns: int
    created_by: str


class ModelPolicyOut(TypedDict):
    """What a project lets into its models. ``pickles`` is ``allow`` or ``refuse``."""

    project: str
    pickles: str


class VolumeOut(TypedDict):
    """A folder of a site that jobs may have mounted. ``node`` is the one machine that has it; empty: all there have."""

    id: str
    name: str
    project: str
    site: str
    node: str
    path: str
    read_only: bool
    created_at_ns: int
    created_by: str


class DataSetOut(TypedDict):
    """One version of a data set. ``state`` is ``scanning``, ``ready`` or ``failed``; ``digest`` is its manifest's.

    ``detail`` says what came of the last look at its home; ``cached_on`` lists machines that have a copy.
    """

    id: str
    name: str
    version: int
    project: str
    home: str
    site: str
    node: str
    endpoint: str
    region: str
    secret: str
    state: str
    detail: str
    digest: str
    size: int
    files: int
    cached_on: list[str]
    checked_at_ns: int
    created_at_ns: int
    created_by: str


class BlobOut(TypedDict):
    """A stored blob."""

    digest: str
    size: int


class ArtifactIn(Body):
    """A new version of an artifact, from a job's output folder."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    job: Plain
    path: Plain = ""
    project: Plain = ""


class VolumeIn(Body):
    """A volume to make."""

    name: Name
    path: Plain = Field(description="The folder's whole path on the site's machines.")
    site: Plain = Field("", description="Name of the site that has it; this installation's own when left out.")
    node: Plain = Field("", description="The one machine that has it; all of the site when left out.")
    read_only: bool = False
    project: Plain = ""


class DataSetIn(Body):
    """A version of a data set to add."""

    name: Name
    home: Plain = Field(description="A folder's whole path, or s3://bucket/prefix.")
    site: Plain = Field("", description="Name of the site that has the folder; this installation's own when left out.")
    node: Plain = Field("", description="The one machine that has the folder; all of the site when left out.")
    manifest: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = Field(
        "", description="SHA-256 of the folder's manifest, which is uploaded as a blob before."
    )
    endpoint: Plain = Field("", description="Which S3, such as https://minio.example.org; Amazon's when left out.")
    region: Plain = ""
    secret: Plain = Field("", description="The project's secret with KEY_ID:SECRET_KEY; none for a public bucket.")
    project: Plain = ""


_Texts = dict[Annotated[str, StringConstraints(max_length=250)], Annotated[str, StringConstraints(max_length=10_000)]]


class ModelFileIn(Body):
    """A file of a version, which was uploaded before."""

    path: Plain
    size: int = Field(ge=0, lt=2**60)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ModelVersionIn(Body):
    """A version of a model to add: of files that were uploaded, of a job's output, or of an artifact."""

    files: list[ModelFileIn] = Field(default=[], max_length=100_000)
    job: Plain = Field("", description="The job that made it; from inside a job that job, when left out.")
    path: Plain = Field("", description="What of the job's output folder it is, when there are no files.")
    artifact: Plain = Field("", description="The artifact that it is, as name or name:version.")
    description: Annotated[str, StringConstraints(max_length=10_000, pattern=PLAIN_TEXT)] = ""
    tags: _Texts = Field({})
    metrics: _Texts = Field({})
    base_model: Plain = ""
    licence: Plain = ""
    framework: Plain = ""
    commit: Plain = Field("", description="The git commit that it was made from.")
    allow_pickles: bool = Field(
        False, description="Let pickles in; the project's policy has to allow it, or an administrator asks."
    )
    project: Plain = ""


class StageIn(Body):
    """The stage that a version is put into."""

    stage: Literal["none", "staging", "production", "archived"]
    why: Annotated[str, StringConstraints(max_length=10_000, pattern=PLAIN_TEXT)] = ""


class AliasIn(Body):
    """What an alias points to."""

    version: int = Field(ge=1, lt=10**9)
    why: Annotated[str, StringConstraints(max_length=10_000, pattern=PLAIN_TEXT)] = ""


class ModelChangeIn(Body):
    """What is said of a model, or of a version of one. A tag that is null goes."""

    description: Annotated[str, StringConstraints(max_length=10_000, pattern=PLAIN_TEXT)] | None = None
    tags: dict[Annotated[str, StringConstraints(max_length=250)], str | None] = Field({})


class ModelPolicyIn(Body):
    """What a project lets into its models."""

    pickles: Literal["allow", "refuse"]
