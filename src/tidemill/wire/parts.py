"""The sections that any workload may have: what each worker gets, its data, and when it is tried again."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from tidemill.model.registry import parse_model_reference
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import MAX_ARRAY, MAX_WORKERS, Alternative, Environment, Kind, RetryOn, RetryPolicy
from tidemill.model.storage import DataMode, DataMount, VolumeMount
from tidemill.units import MILLI, SECOND_NS
from tidemill.wire.checks import DATASET, NAME, grace_of, list_of, name_of, size_of, slurm_word_of, volume_of
from tidemill.wire.fields import (
    cpus_of,
    dataset_of,
    gpus_of,
    mode_of,
    model_reference_of,
    mount_of,
    package_of,
    python_of,
    retry_on_of,
)
from tidemill.wire.scheduling import MAX_SPEED, by_speed_of, flag_of, speed_of
from tidemill.wire.section import DURATION_SCHEMA, SIZE_SCHEMA, TEXT, StrictSection, counted, few, taking

_Gpus = Annotated[
    GpuRequest | None,
    *taking(
        gpus_of,
        {
            "type": ["string", "number", "null"],
            "examples": ["H100:80GB:8", "24GB+:2", "A100", 0.5, "share 10GB", "1g.10gb", "none"],
        },
    ),
]
_Cpus = Annotated[int, *taking(cpus_of, {"type": "number", "exclusiveMinimum": 0, "examples": [4, 0.5]})]
_Size = Annotated[int, *taking(size_of, SIZE_SCHEMA)]


class AlternativeIn(StrictSection):
    """Other resources that would do; what is left out is as in `resources`."""

    gpus: _Gpus = Field(default=None, description="GPUs, as in `resources`.", json_schema_extra={"default": ""})
    cpus: _Cpus = Field(default=MILLI, description="CPU cores.", json_schema_extra={"default": ""})
    memory: _Size = Field(default=0, description="Memory.", json_schema_extra={"default": ""})
    disk: _Size = Field(default=0, description="Scratch disk.", json_schema_extra={"default": ""})
    speed: Annotated[
        int,
        *taking(speed_of, {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SPEED, "examples": [0.6]}),
    ] = Field(default=MILLI, description="How fast it is, `resources` being 1.", json_schema_extra={"default": 1})


class ResourcesIn(StrictSection):
    """What each worker gets."""

    gpus: _Gpus = Field(
        default=None,
        description="GPUs: `[MODEL:][MEMORY:]COUNT`, a share of one such as `0.5` or `share 10GB`, a MIG profile, or"
        " `none`.",
    )
    cpus: _Cpus = Field(
        default=MILLI, description="CPU cores; fractions are allowed.", json_schema_extra={"default": 1}
    )
    memory: _Size = Field(default=0, description="Memory; 0 leaves it unlimited.")
    disk: _Size = Field(default=0, description="Scratch disk.")
    any_of: Annotated[list[AlternativeIn], BeforeValidator(lambda value: few(value, "alternatives"))] = Field(
        default_factory=list,
        description="Other resources that would do as well, each with what is different.",
        json_schema_extra={"default": []},
    )
    prefer: Annotated[bool, *taking(by_speed_of, {"type": "string", "enum": ["order", "speed"]})] = Field(
        default=False,
        description="Which of them is taken first: `order` as they are written, `speed` the fastest.",
        json_schema_extra={"default": "order"},
    )


class EnvironmentIn(StrictSection):
    """The job's own Python environment, built by uv once and kept."""

    python: Annotated[str, *taking(python_of, {**TEXT, "examples": ["3.12"]})] = Field(
        default="", description="Version of Python, in quotes; empty takes the node's own."
    )
    packages: Annotated[
        tuple[str, ...],
        *taking(
            list_of(package_of, "packages"), {"type": ["array", "null"], "items": TEXT, "examples": [["torch==2.9.0"]]}
        ),
    ] = Field(default=(), description="Packages, as pip takes them.")


class ArrayIn(StrictSection):
    """How many jobs an array has, and how many of them run at a time."""

    size: Annotated[
        int,
        *counted(1, MAX_ARRAY),
    ] = Field(description="Number of jobs; each finds its own in `TIDEMILL_ARRAY_INDEX`.")
    parallel: Annotated[
        int,
        *counted(0, MAX_ARRAY),
    ] = Field(default=0, description="How many of them run at the same time, at most; 0 for no limit.")


class DataIn(StrictSection):
    """A data set that each worker finds, read-only."""

    dataset: Annotated[str, *taking(dataset_of, {**TEXT, "pattern": DATASET.pattern, "examples": ["imagenet:2"]})] = (
        Field(description="Its name, or name:version; the newest version is meant without.")
    )
    at: Annotated[str, *taking(mount_of, {**TEXT, "examples": ["/data"]})] = Field(
        default="", description="Where; `/data/NAME` when left out."
    )
    mode: Annotated[DataMode, *taking(mode_of, {"type": "string", "enum": [one.value for one in DataMode]})] = Field(
        default=DataMode.AUTO,
        description="`copy` to the machine's own disk, `mount` the folder that it comes from (only where that is), or"
        " `auto`: mounted where that folder is, copied elsewhere.",
        json_schema_extra={"default": "auto"},
    )


class ModelIn(StrictSection):
    """A model of the registry that each worker finds, read-only."""

    reference: Annotated[
        str,
        *taking(
            model_reference_of,
            {**TEXT, "examples": ["models:/greeter/production", "models:/greeter@champion", "models:/greeter/3"]},
        ),
    ] = Field(
        alias="from",
        description="Which: by stage, alias or version, or `greeter` for its newest. It is settled when the workload is"
        " submitted, so that all its replicas have the same.",
    )
    at: Annotated[str, *taking(mount_of, {**TEXT, "examples": ["/model"]})] = Field(
        default="", description="Where; `/models/NAME` when left out. The path is in `$TIDEMILL_MODEL_DIR`."
    )


class VolumeIn(StrictSection):
    """A volume that each worker finds."""

    name: Annotated[str, *taking(volume_of, {**TEXT, "pattern": NAME.pattern, "maxLength": 63})] = Field(
        description="Its name; see `tidemill volume list`."
    )
    at: Annotated[str, *taking(mount_of, {**TEXT, "examples": ["/scratch"]})] = Field(
        default="", description="Where; `/volumes/NAME` when left out."
    )
    read_only: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False, description="Nothing is written there.", json_schema_extra={"default": "false"}
    )


_RETRY_ON: Final = ((RetryOn.NODE_LOST, RetryOn.PREEMPTED), ())


class RetryIn(StrictSection):
    """When a job that ended is tried again."""

    on: Annotated[
        tuple[tuple[RetryOn, ...], tuple[int, ...]],
        *taking(
            retry_on_of,
            {
                "type": ["array", "string"],
                "items": {"type": "string", "pattern": "^(node_lost|preempted|error|exit:[0-9]{1,3})$"},
                "examples": [["node_lost", "preempted", "exit:75"]],
            },
        ),
    ] = Field(
        default_factory=lambda: _RETRY_ON,
        description="Causes: `node_lost`, `preempted`, `error`, `exit:CODE`.",
        json_schema_extra={"default": ["node_lost", "preempted"]},
    )
    max: Annotated[int, *counted(0, 1_000)] = Field(default=3, description="How often, at most.")


class CheckpointIn(StrictSection):
    """What a worker gets before it is ended."""

    grace: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
        default=10 * SECOND_NS,
        description="Time between SIGTERM and SIGKILL, in which to save a checkpoint.",
        json_schema_extra={"default": "10s"},
    )


class SlurmIn(StrictSection):
    """What Slurm is told, at a site that has it; other sites pay no heed. Its partition is a label of the placement."""

    account: Annotated[str, *taking(slurm_word_of, {**TEXT, "examples": ["physics"]})] = Field(
        default="", description="Whom Slurm accounts it to, instead of the site's own account."
    )
    qos: Annotated[str, *taking(slurm_word_of, {**TEXT, "examples": ["fast"]})] = Field(
        default="", description="Its quality of service there, instead of the site's own."
    )


class GroupIn(StrictSection):
    """A gang of jobs: they start together or not at all."""

    name: Annotated[str, *taking(name_of, {**TEXT, "pattern": NAME.pattern, "maxLength": 63})] = Field(
        description="Name of the group; workloads of the project with the same name belong together."
    )
    size: Annotated[
        int,
        *counted(2, MAX_WORKERS),
    ] = Field(description="How many jobs it has.")


def alternative_of(given: AlternativeIn, usual: ResourcesIn) -> Alternative:
    """An alternative with what it leaves out as in ``resources``."""
    gpus, cpus, memory, disk = (
        getattr(given if name in given.model_fields_set else usual, name) for name in ("gpus", "cpus", "memory", "disk")
    )
    return Alternative(resources=resources_of(gpus, cpus, memory, disk), speed_milli=given.speed)


def data_mount_of(given: DataIn) -> DataMount:
    """A data set and where it is found."""
    return DataMount(dataset=given.dataset, at=given.at or default_data_path(given.dataset), mode=given.mode)


def model_mounts_of(given: ModelIn | None) -> tuple[DataMount, ...]:
    """A model from the registry and where it is found; none when there is no such section."""
    if given is None:
        return ()
    return (
        DataMount(
            dataset="", model=given.reference, at=given.at or default_model_path(given.reference), mode=DataMode.COPY
        ),
    )


def volume_mount_of(given: VolumeIn) -> VolumeMount:
    """A volume and where it is found."""
    return VolumeMount(volume=given.name, at=given.at or default_volume_path(given.name), read_only=given.read_only)


def default_data_path(reference: str) -> str:
    """Where a data set is found when its spec does not say."""
    return f"/data/{reference.partition(':')[0]}"


def default_model_path(reference: str) -> str:
    """Where a model is found when its spec does not say."""
    return f"/models/{parse_model_reference(reference).name}"


def default_volume_path(name: str) -> str:
    """Where a volume is found when its spec does not say."""
    return f"/volumes/{name}"


resources_of = lru_cache(maxsize=4_096)(
    lambda gpus, cpus, memory, disk: Resources(gpus=gpus, cpu_milli=cpus, memory_bytes=memory, disk_bytes=disk)
)
environment_of = lru_cache(maxsize=1_024)(lambda python, packages: Environment(python=python, packages=packages))
retry_of = lru_cache(maxsize=1_024)(lambda on, codes, most: RetryPolicy(on=on, exit_codes=codes, max=most))
_DEFAULT_RETRY: Final = RetryPolicy()
_SERVICE_RETRY: Final = RetryPolicy(on=tuple(RetryOn), max=1_000)


def default_retry(kind: Kind) -> RetryPolicy:
    """When a job is tried again though its spec says nothing of it: a service always, others when they were lost."""
    return _SERVICE_RETRY if kind is Kind.SERVICE else _DEFAULT_RETRY
