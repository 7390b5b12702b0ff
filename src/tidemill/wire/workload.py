"""A workload file as it is written: its fields, their defaults, and what is said of them."""

from __future__ import annotations

from time import time_ns
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from tidemill.errors import InvalidSpec
from tidemill.model.spec import (
    MAX_WORKERS,
    PRIORITY_RANGE,
    Dependency,
    Group,
    Kind,
    Port,
    Tier,
    WorkloadSpec,
)
from tidemill.wire.checks import (
    HIGHEST_PORT,
    INPUT,
    LABEL,
    LOWEST_PORT,
    NAME,
    VARIABLE,
    duration_of,
    label_of,
    list_of,
    mapping_of,
    name_of,
    scalar,
    text_of,
)
from tidemill.wire.contradictions import contradictions, implied_kind
from tidemill.wire.fields import artifact_of, image_of, kind_of, ports_of, secret_of, workdir_of
from tidemill.wire.parts import (
    ArrayIn,
    CheckpointIn,
    DataIn,
    EnvironmentIn,
    GroupIn,
    ModelIn,
    ResourcesIn,
    RetryIn,
    SlurmIn,
    VolumeIn,
    alternative_of,
    data_mount_of,
    default_retry,
    environment_of,
    model_mounts_of,
    resources_of,
    retry_of,
    volume_mount_of,
)
from tidemill.wire.placement import PlacementIn, placement_of
from tidemill.wire.scheduling import (
    PRIORITIES,
    Moment,
    Span,
    after_of,
    flag_of,
    moment_of,
    priority_of,
    span_of,
    tier_of,
)
from tidemill.wire.section import (
    DURATION_SCHEMA,
    TEXT,
    StrictSection,
    few,
    invalid,
    shared,
    string_map,
    taking,
    wrapped,
)
from tidemill.wire.service import ServiceIn, with_port

_Model = Annotated[ModelIn, wrapped("from", str)]
_Data = Annotated[DataIn, wrapped("dataset", str)]
_Volume = Annotated[VolumeIn, wrapped("name", str)]
_MOMENT_SCHEMA: Final = {**TEXT, "examples": ["2027-03-01T09:00:00Z", "in 2h"]}
_Moment = Annotated[Moment, *taking(moment_of, _MOMENT_SCHEMA)]
_NEVER: Final = Moment(0)


class WorkloadSpecIn(StrictSection):
    """A workload, as people write it."""

    kind: Annotated[Kind | None, *taking(kind_of, {"type": "string", "enum": ["task", "array", "dev", "service"]})] = (
        Field(
            default=None,
            description="What sort of workload; `array` or `service` when there is that section, else `task`.",
            json_schema_extra={"default": "task"},
        )
    )
    name: Annotated[str, *taking(name_of, {**TEXT, "pattern": NAME.pattern, "maxLength": 63})] = Field(
        default="", description="Its name; made from the file's name when left out."
    )
    project: Annotated[str, *taking(lambda value: text_of(value, limit=100), TEXT)] = Field(
        default="", description="Project whose quota it uses; the request's project when left out."
    )
    nodes: Annotated[
        Span,
        *taking(
            span_of, {"type": ["integer", "string"], "minimum": 1, "maximum": MAX_WORKERS, "examples": [4, "2..8"]}
        ),
    ] = Field(
        default=Span(1, 1),
        description="Workers of each job; they start together or not at all, and may share a machine. A range is"
        " elastic: at least and at most so many, as there is room.",
        json_schema_extra={"default": 1},
    )
    resources: ResourcesIn = Field(
        default_factory=shared(ResourcesIn), description="What each worker gets.", json_schema_extra={"default": {}}
    )
    env: EnvironmentIn | None = Field(default=None, description="Python environment; not together with `image`.")
    image: Annotated[str, *taking(image_of, {**TEXT, "examples": ["docker.io/library/python:3.12"]})] = Field(
        default="", description="Container image; not together with `env`."
    )
    workdir: Annotated[str, *taking(workdir_of, {**TEXT, "examples": ["."]})] = Field(
        default="", description="Folder that workers start in; the client uploads it and sends its SHA-256."
    )
    envs: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(VARIABLE, scalar, "NAME: value", "Use letters, digits and _, not beginning with a digit."),
            string_map({"type": ["string", "number", "boolean"]}, "^[A-Za-z_][A-Za-z0-9_]*$"),
        ),
    ] = Field(default=(), description="Environment variables.", json_schema_extra={"default": {}})
    secrets: Annotated[
        tuple[str, ...],
        *taking(list_of(secret_of, "names of secrets"), {"type": ["array", "null"], "items": TEXT}),
    ] = Field(default=(), description="Names of the project's secrets; each becomes an environment variable.")
    inputs: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(INPUT, artifact_of, "name: artifact[:version]", "Use letters, digits, - _ or ."),
            string_map(TEXT, "^[A-Za-z0-9_][A-Za-z0-9._-]*$"),
        ),
    ] = Field(
        default=(),
        description="Artifacts, found read-only in `$TIDEMILL_INPUT_DIR/<name>`.",
        json_schema_extra={"default": {}, "examples": [{"model": "quickstart-gpt:2"}]},
    )
    data: Annotated[list[_Data], BeforeValidator(lambda value: few(value, "data sets"))] = Field(
        default_factory=list,
        description="Data sets, each a name or a section; the path of each is in `$TIDEMILL_DATA_<NAME>`.",
        json_schema_extra={"default": [], "examples": [[{"dataset": "imagenet", "at": "/data"}]]},
    )
    model: _Model | None = Field(
        default=None,
        description="A model of the registry, by reference or as a section; its path is in `$TIDEMILL_MODEL_DIR`.",
    )
    volumes: Annotated[list[_Volume], BeforeValidator(lambda value: few(value, "volumes"))] = Field(
        default_factory=list,
        description="Volumes, each a name or a section; the path of each is in `$TIDEMILL_VOLUME_<NAME>`.",
        json_schema_extra={"default": [], "examples": [[{"name": "scratch", "at": "/scratch"}]]},
    )
    setup: Annotated[str, *taking(text_of, TEXT)] = Field(
        default="", description="Shell script that prepares each worker."
    )
    run: Annotated[str, *taking(text_of, {**TEXT, "examples": ["python train.py"]})] = Field(
        default="", description="Shell script that each worker runs; `dev` workloads may leave it out."
    )
    ports: Annotated[
        tuple[Port, ...],
        *taking(
            ports_of,
            {
                "type": ["array", "integer", "string", "null"],
                "items": {
                    "anyOf": [
                        {"type": "integer", "minimum": LOWEST_PORT, "maximum": HIGHEST_PORT},
                        {"type": "string"},
                        {
                            "type": "object",
                            "properties": {"name": TEXT, "port": {"type": "integer"}},
                            "additionalProperties": False,
                        },
                    ]
                },
                "examples": [["http", 8000, "metrics:9100", {"name": "grpc", "port": 50051}]],
            },
        ),
    ] = Field(
        default=(), description="Ports: a name (`PORT` and `TIDEMILL_PORT_<NAME>` tell the number), a number, or both."
    )
    service: ServiceIn | None = Field(default=None, description="How a service is reached.")
    array: Annotated[ArrayIn | None, wrapped("size", int)] = Field(default=None, description="A size, or a section.")
    max_duration: Annotated[int, *taking(duration_of, DURATION_SCHEMA)] = Field(
        default=0, description="How long an attempt may run; 0 for no limit."
    )
    retry: Annotated[RetryIn, wrapped("max", int)] = Field(
        default_factory=shared(RetryIn),
        description="A number of retries, or a section. A service without one is tried again whatever ended it.",
        json_schema_extra={"default": {}},
    )
    checkpoint: CheckpointIn = Field(
        default_factory=shared(CheckpointIn),
        description="What a worker gets before it is ended.",
        json_schema_extra={"default": {}},
    )
    slurm: SlurmIn = Field(
        default_factory=shared(SlurmIn),
        description="What Slurm is told, at a site that has it.",
        json_schema_extra={"default": {}},
    )
    expected_duration: Annotated[int, *taking(duration_of, DURATION_SCHEMA)] = Field(
        default=0, description="How long it is expected to run; for forecasts and for the order, it ends nothing."
    )
    start_after: _Moment = Field(
        default=_NEVER,
        description="Not before that time: with its zone, or so long after it is submitted.",
        json_schema_extra={"default": ""},
    )
    start_before: _Moment = Field(
        default=_NEVER,
        description="Given up when it has not started by then.",
        json_schema_extra={"default": ""},
    )
    after: Annotated[
        tuple[Dependency, ...],
        *taking(
            after_of,
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": TEXT},
                    {
                        "type": "object",
                        "properties": {
                            one: {"type": ["array", "string"], "items": TEXT} for one in ("ok", "any", "failed")
                        },
                        "additionalProperties": False,
                    },
                ],
                "examples": [["prepare"], {"ok": ["prepare"], "any": ["cleanup"]}],
            },
        ),
    ] = Field(
        default=(),
        description="Workloads of the project, by name or id, that have to have ended before: in a list, or by how:"
        " `ok`, `any`, `failed`.",
    )
    group: GroupIn | None = Field(default=None, description="The gang of jobs that it starts together with.")
    placement: PlacementIn = Field(
        default_factory=shared(PlacementIn),
        description="Where workers may be put.",
        json_schema_extra={"default": {}},
    )
    capacity: Annotated[Tier | None, *taking(tier_of, {"type": "string", "enum": [tier.value for tier in Tier]})] = (
        Field(
            default=None,
            description="`spot` may have to give way at any time, `on_demand` to guarantees and to higher priority in"
            " its own project, `reserved` runs in a reservation.",
            json_schema_extra={"default": "on_demand"},
        )
    )
    spot: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False, description="Short for `capacity: spot`.", json_schema_extra={"default": "false"}
    )
    reservation: Annotated[str, *taking(name_of, {**TEXT, "pattern": NAME.pattern, "maxLength": 63})] = Field(
        default="", description="Name of the project's reservation to run in; implies `capacity: reserved`."
    )
    priority: Annotated[
        int,
        *taking(
            priority_of,
            {
                "anyOf": [
                    {"type": "integer", "minimum": PRIORITY_RANGE[0], "maximum": PRIORITY_RANGE[1]},
                    {"type": "string", "enum": [*PRIORITIES]},
                ],
                "examples": ["high", 50],
            },
        ),
    ] = Field(
        default=0,
        description="Higher goes first within the project: `low` (-100), `normal` (0), `high` (100) or a number.",
    )
    labels: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(LABEL, label_of, "name: value", "Use letters, digits, - _ . or /."),
            string_map({"type": ["string", "number", "boolean"]}, "^[A-Za-z0-9]"),
        ),
    ] = Field(default=(), description="Free words to find it by.", json_schema_extra={"default": {}})

    def to_model(self, default_name: str, *, now: int | None = None) -> WorkloadSpec:
        """The checked spec. Raises: InvalidSpec with every contradiction between fields.

        Times such as ``in 2h`` count from ``now`` (ns); None: from this moment. Of ``after`` the names are kept.
        """
        now = time_ns() if now is None else now
        if problems := list(contradictions(self.model_fields_set, self, now)):
            raise invalid(problems)
        kind = self.kind or implied_kind(self.array is not None, self.service is not None)
        resources = self.resources
        ports, service = with_port(kind, self.ports, self.service)
        try:
            return WorkloadSpec(
                kind=kind,
                name=self.name or default_name,
                run=self.run,
                setup=self.setup,
                nodes=self.nodes.largest,
                nodes_min=self.nodes.smallest if self.nodes.smallest < self.nodes.largest else 0,
                resources=resources_of(resources.gpus, resources.cpus, resources.memory, resources.disk),
                environment=environment_of(self.env.python, self.env.packages) if self.env is not None else None,
                image=self.image,
                workdir=self.workdir,
                envs=self.envs,
                secrets=self.secrets,
                inputs=self.inputs,
                ports=ports,
                service=service,
                array_size=self.array.size if self.array is not None else 1,
                array_parallel=self.array.parallel if self.array is not None else 0,
                max_duration_ns=self.max_duration,
                retry=(
                    retry_of(self.retry.on[0], self.retry.on[1], self.retry.max)
                    if "retry" in self.model_fields_set
                    else default_retry(kind)
                ),
                checkpoint_grace_ns=self.checkpoint.grace,
                priority=self.priority,
                labels=self.labels,
                any_of=tuple([alternative_of(one, resources) for one in resources.any_of]),
                by_speed=resources.prefer,
                tier=self._tier(),
                reservation=self.reservation,
                placement=placement_of(self.placement),
                group=Group(name=self.group.name, size=self.group.size) if self.group is not None else None,
                after=self.after,
                expected_duration_ns=self.expected_duration,
                start_after_ns=self.start_after.at(now),
                start_before_ns=self.start_before.at(now),
                data=(*model_mounts_of(self.model), *[data_mount_of(one) for one in self.data]),
                volumes=tuple([volume_mount_of(one) for one in self.volumes]),
                slurm=tuple([(what, word) for what in ("account", "qos") if (word := getattr(self.slurm, what))]),
            )
        except ValueError as error:
            raise InvalidSpec(f"{error}.") from error

    def _tier(self) -> Tier:
        if self.reservation:
            return Tier.RESERVED
        return self.capacity or (Tier.SPOT if self.spot else Tier.ON_DEMAND)
