"""The shape of a workload file: sections, fields, their defaults, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from time import time_ns
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic.fields import FieldInfo

from tidemill.errors import InvalidRequest, InvalidSpec
from tidemill.guards.reading import rules_of
from tidemill.model.fleet import Level, SiteKind
from tidemill.model.guard import Action, GuardRule
from tidemill.model.registry import parse_model_reference
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.rollout import MAX_REQUESTS, MAX_SURGE, CanaryStep, Comparison, Rolling
from tidemill.model.scaling import DAYS, MAX_WINDOWS, Hours, Scaling
from tidemill.model.spec import (
    MAX_ARRAY,
    MAX_CONCURRENCY,
    MAX_FAILURES,
    MAX_REPLICAS,
    MAX_WORKERS,
    PRIORITY_RANGE,
    Affinity,
    Alternative,
    Dependency,
    Environment,
    Group,
    Kind,
    Pace,
    Placement,
    Port,
    RetryOn,
    RetryPolicy,
    Service,
    Territory,
    Tier,
    Timeouts,
    Weight,
    WorkloadSpec,
)
from tidemill.model.storage import DataMode, DataMount, VolumeMount, mount_variable
from tidemill.units import MILLI, SECOND_NS
from tidemill.wire.checks import (
    DATASET,
    HIGHEST_PORT,
    INPUT,
    LABEL,
    LOWEST_PORT,
    NAME,
    PORT_NAME,
    VARIABLE,
    Refusal,
    duration_of,
    grace_of,
    label_of,
    list_of,
    mapping_of,
    name_of,
    period_of,
    scalar,
    shown,
    size_of,
    slurm_word_of,
    text_of,
    volume_of,
    wait_of,
    whole_number,
)
from tidemill.wire.fields import (
    PORT_MEND,
    affinity_of,
    artifact_of,
    cpus_of,
    dataset_of,
    fallback_of,
    gpus_of,
    hedge_of,
    image_of,
    kind_of,
    mode_of,
    model_of,
    model_reference_of,
    mount_of,
    package_of,
    path_of,
    patience_of,
    port_of,
    port_reference,
    ports_of,
    price_of,
    python_of,
    retry_on_of,
    secret_of,
    workdir_of,
)
from tidemill.wire.rolling import (
    errors_of,
    hold_of,
    progress_of,
    rollback_of,
    slower_of,
    steps_of,
    watch_of,
    weight_of,
)
from tidemill.wire.scaling import (
    days_of,
    objective_of,
    share_of,
    time_of,
    tolerance_of,
    window_of,
    zone_of,
)
from tidemill.wire.scheduling import (
    MAX_SPEED,
    MAX_WEIGHT,
    PRIORITIES,
    Moment,
    Span,
    after_of,
    by_speed_of,
    choice_of,
    countries_of,
    flag_of,
    kind_of_site,
    level_of,
    moment_of,
    priority_of,
    replicas_of,
    site_of,
    span_of,
    speed_of,
    tier_of,
    toleration_of,
    weights_of,
)


def _wrapped(field: str, *kinds: type) -> BeforeValidator:
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
_SIZE_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["512MB", "16GB", "1.5TB"]}
_DURATION_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["90s", "15m", "1h30m"]}


def _string_map(values: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    return {"type": ["object", "null"], "additionalProperties": values, "propertyNames": {"pattern": pattern}}


_MOST_CHOICES: Final = 32


def _few(value: object, what: str) -> object:
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


def _shared(section: Callable[[], Section]) -> Callable[[], Section]:
    """What gives one and the same section, with its defaults: sections cannot change."""
    made = section()
    return lambda: made


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
_Size = Annotated[int, *taking(size_of, _SIZE_SCHEMA)]


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
    any_of: Annotated[list[AlternativeIn], BeforeValidator(lambda value: _few(value, "alternatives"))] = Field(
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


class ReadinessIn(StrictSection):
    """How it is told that a service's replica can be used."""

    path: Annotated[str, *taking(path_of, {**TEXT, "examples": ["/health"]})] = Field(
        default="", description="Path that answers 200 once it is ready; without it an open port is enough."
    )
    timeout: Annotated[int, *taking(duration_of, _DURATION_SCHEMA)] = Field(
        default=120 * SECOND_NS,
        description="How long it may take until it is ready, its model loaded.",
        json_schema_extra={"default": "2m"},
    )
    delay: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=0, description="How long after its start it is asked first.", json_schema_extra={"default": "0s"}
    )
    every: Annotated[int, *taking(period_of, _DURATION_SCHEMA)] = Field(
        default=2 * SECOND_NS,
        description="How often it is asked once it is ready; before that, four times a second.",
        json_schema_extra={"default": "2s"},
    )
    answer: Annotated[int, *taking(period_of, _DURATION_SCHEMA)] = Field(
        default=2 * SECOND_NS, description="Within which time it has to answer.", json_schema_extra={"default": "2s"}
    )
    failures: Annotated[int, *counted(1, MAX_FAILURES)] = Field(
        default=3, description="After how many failures in a row it gets no more requests, until it answers again."
    )


class LivenessIn(StrictSection):
    """How it is told that a replica does not work any more and has to be replaced."""

    path: Annotated[str, *taking(path_of, {**TEXT, "examples": ["/health"]})] = Field(
        default="", description="Path that answers 200 while it works; without it an open port is enough."
    )
    delay: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=0,
        description="How long after it became ready it is asked first; until it is ready, `readiness` counts.",
        json_schema_extra={"default": "0s"},
    )
    every: Annotated[int, *taking(period_of, _DURATION_SCHEMA)] = Field(
        default=10 * SECOND_NS, description="How often it is asked.", json_schema_extra={"default": "10s"}
    )
    answer: Annotated[int, *taking(period_of, _DURATION_SCHEMA)] = Field(
        default=2 * SECOND_NS, description="Within which time it has to answer.", json_schema_extra={"default": "2s"}
    )
    failures: Annotated[int, *counted(1, MAX_FAILURES)] = Field(
        default=3, description="After how many failures in a row the replica is ended and another attempt made."
    )


class CanaryIn(StrictSection):
    """A part of the requests, for a while."""

    weight: Annotated[int, *taking(weight_of, {"type": ["integer", "string"], "examples": [10, "10%"]})] = Field(
        description="How many of a hundred requests go to the new revision."
    )
    hold: Annotated[int, *taking(hold_of, _DURATION_SCHEMA)] = Field(
        default=0,
        alias="for",
        description="For how long, once its replicas are ready; until `tidemill promote` when left out.",
        json_schema_extra={"default": ""},
    )


class RollbackIn(StrictSection):
    """When a new revision is taken back by itself, compared with the one before."""

    errors: Annotated[int, *taking(errors_of, {"type": ["string", "number"], "examples": ["5%", 0.05]})] = Field(
        default=50,
        description="How many more of its requests may fail: answers of 500 or more, and those that broke off.",
        json_schema_extra={"default": "5%"},
    )
    slower: Annotated[float, *taking(slower_of, {"type": "number", "examples": [1.5]})] = Field(
        default=0,
        description="How many times as long 95 of 100 answers may take; 0 for no bound.",
        json_schema_extra={"default": 0},
    )
    requests: Annotated[int, *counted(1, MAX_REQUESTS)] = Field(
        default=50, description="Fewer requests than these say nothing."
    )
    window: Annotated[int, *taking(watch_of, _DURATION_SCHEMA)] = Field(
        default=60 * SECOND_NS,
        description="Over how long requests are compared.",
        json_schema_extra={"default": "1m"},
    )


class RolloutIn(StrictSection):
    """How a changed service takes the place of the one that runs."""

    surge: Annotated[int, *counted(0, MAX_SURGE)] = Field(
        default=1, description="How many replicas there may be beyond those needed, whatever is still ending."
    )
    unavailable: Annotated[int, *counted(0, MAX_SURGE)] = Field(
        default=0, description="How many fewer than needed may be ready; for machines without room for one more."
    )
    drain: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=600 * SECOND_NS,
        description="How long a replica that leaves may go on with what is under way on it.",
        json_schema_extra={"default": "10m"},
    )
    progress: Annotated[int, *taking(progress_of, _DURATION_SCHEMA)] = Field(
        default=1_800 * SECOND_NS,
        description="After how long without getting further it is taken back.",
        json_schema_extra={"default": "30m"},
    )
    canary: Annotated[list[CanaryIn], BeforeValidator(steps_of)] = Field(
        default_factory=list,
        description="Parts of the requests that it gets first, each a weight or a section.",
        json_schema_extra={"default": ""},
    )
    rollback: Annotated[RollbackIn | None, BeforeValidator(rollback_of)] = Field(
        default_factory=_shared(RollbackIn),
        description="When it is taken back by itself; `false`: only when its replicas do not come up.",
        json_schema_extra={"default": {}},
    )


class TimeoutsIn(StrictSection):
    """How long the gateway waits for a service's replica, in each phase of a request."""

    connect: Annotated[int, *taking(patience_of, _DURATION_SCHEMA)] = Field(
        default=5 * SECOND_NS,
        description="To be connected; then another one is tried.",
        json_schema_extra={"default": "5s"},
    )
    first_byte: Annotated[int, *taking(patience_of, _DURATION_SCHEMA)] = Field(
        default=600 * SECOND_NS,
        description="For a response to begin, once the request is sent.",
        json_schema_extra={"default": "10m"},
    )
    between: Annotated[int, *taking(patience_of, _DURATION_SCHEMA)] = Field(
        default=600 * SECOND_NS,
        description="For the next part of a response; on a WebSocket for anything, from either side.",
        json_schema_extra={"default": "10m"},
    )
    whole: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=0, description="For a whole response, from when a replica is chosen; 0 for as long as it takes."
    )


_Objective = Annotated[int, *taking(objective_of, {"type": ["string", "integer"], "examples": ["500ms", "2s"]})]
_Share = Annotated[int, *taking(share_of, {"type": ["string", "number"], "examples": ["80%", 0.8]})]
_TimeOfDay = Annotated[int, *taking(time_of, {"type": ["string", "integer"], "examples": ["08:30"]})]


class HoursIn(StrictSection):
    """Hours in which a service has so many replicas at least."""

    replicas: Annotated[int, *counted(1, MAX_REPLICAS)] = Field(description="How many there are at least.")
    days: Annotated[
        tuple[int, ...], *taking(days_of, {"type": ["string", "array"], "examples": ["mon-fri", ["sat", "sun"]]})
    ] = Field(default=tuple(range(len(DAYS))), description="On which days.", json_schema_extra={"default": "mon-sun"})
    starts: _TimeOfDay = Field(
        default=0, description="From when; they are ready by then.", json_schema_extra={"default": "00:00"}
    )
    ends: _TimeOfDay = Field(
        default=86_400,
        description="Until when; on the next day where that is not after `starts`.",
        json_schema_extra={"default": "24:00"},
    )
    zone: Annotated[str, *taking(zone_of, {**TEXT, "examples": ["Europe/Berlin"]})] = Field(
        default="UTC", description="The time zone of these times."
    )


class ScalingIn(StrictSection):
    """What the number of replicas follows beside the requests that there are; what needs most of them wins."""

    ttft: _Objective = Field(
        default=0, description="95 of 100 streams are to begin within this time.", json_schema_extra={"default": ""}
    )
    latency: _Objective = Field(
        default=0, description="95 of 100 answers are to be whole within this time.", json_schema_extra={"default": ""}
    )
    queue: _Objective = Field(
        default=0,
        description="95 of 100 requests are to wait in the gateway no longer than this.",
        json_schema_extra={"default": ""},
    )
    engine_queue: Annotated[int, *counted(0, MAX_CONCURRENCY)] = Field(
        default=0,
        description="How many requests may wait inside a replica, as vLLM, SGLang, TGI or llama.cpp tell; 0 for no"
        " objective.",
    )
    in_flight: Annotated[int, *counted(0, MAX_CONCURRENCY)] = Field(
        default=0, description="How many requests a replica is to have on average; 0: `concurrency`."
    )
    tokens: Annotated[int, *counted(0, 10_000_000)] = Field(
        default=0, description="How many tokens of answers a second a replica is to give; 0 for no objective."
    )
    gpu: _Share = Field(
        default=0, description="How busy its GPUs are to be on average.", json_schema_extra={"default": ""}
    )
    kv_cache: _Share = Field(
        default=0,
        description="How full a replica's KV cache is to be on average, as vLLM or SGLang tell.",
        json_schema_extra={"default": ""},
    )
    window: Annotated[int, *taking(window_of, _DURATION_SCHEMA)] = Field(
        default=60 * SECOND_NS,
        description="Over how long is looked at what was felt.",
        json_schema_extra={"default": "1m"},
    )
    tolerance: Annotated[int, *taking(tolerance_of, {"type": ["string", "number"], "examples": ["10%"]})] = Field(
        default=100,
        description="Within this part of an objective the number of replicas stays.",
        json_schema_extra={"default": "10%"},
    )
    up_after: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=0,
        description="For how long more have to be needed before replicas are added; the first one comes at once.",
        json_schema_extra={"default": "0s"},
    )
    up_step: Annotated[int, *counted(0, MAX_REPLICAS)] = Field(
        default=0, description="How many replicas may be starting at a time; 0 for any number."
    )
    down_step: Annotated[int, *counted(0, MAX_REPLICAS)] = Field(
        default=0, description="How many are given up in `down_every` at most; 0 for any number."
    )
    down_every: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=60 * SECOND_NS, description="How long `down_step` is for.", json_schema_extra={"default": "1m"}
    )
    predict: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False, description="Have there what was needed at this time of day, before it is needed again."
    )
    schedule: Annotated[list[HoursIn], Field(max_length=MAX_WINDOWS)] = Field(
        default_factory=list,
        description="Hours with a number of replicas at least.",
        json_schema_extra={"default": ""},
    )


_PRICE_SCHEMA: Final = {"type": "number", "minimum": 0, "maximum": 1000, "examples": [0.15]}


class PriceIn(StrictSection):
    """What requests to a model cost whoever asks."""

    input: Annotated[int, *taking(price_of, _PRICE_SCHEMA)] = Field(
        default=0, description="US dollars for a million tokens of requests."
    )
    output: Annotated[int, *taking(price_of, _PRICE_SCHEMA)] = Field(
        default=0, description="US dollars for a million tokens of answers."
    )


def _guards_of(value: object) -> tuple[GuardRule, ...]:
    try:
        return rules_of(value)
    except InvalidRequest as error:
        raise Refusal(f"{error.field}: {error.detail}", error.mend) from None


class ServiceIn(StrictSection):
    """How a service is reached."""

    port: Annotated[
        str | int | None, *taking(port_reference, {"type": ["string", "integer"], "examples": ["http", 8000]})
    ] = Field(default=None, description="Name or number of its port; the first of `ports`, or `http`, when left out.")
    readiness: Annotated[ReadinessIn, _wrapped("path", str)] = Field(
        default_factory=_shared(ReadinessIn), description="A path, or a section.", json_schema_extra={"default": {}}
    )
    liveness: Annotated[LivenessIn | None, _wrapped("path", str)] = Field(
        default=None, description="A path, or a section; a replica that fails it is replaced. Left out: none is."
    )
    replicas: Annotated[
        Span,
        *taking(
            replicas_of,
            {"type": ["integer", "string"], "minimum": 0, "maximum": MAX_REPLICAS, "examples": [2, "0..8"]},
        ),
    ] = Field(
        default=Span(1, 1),
        description="How many run: a number, or a range within which the number follows the requests.",
        json_schema_extra={"default": 1},
    )
    idle: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
        default=300 * SECOND_NS,
        description="For how long fewer replicas have to be enough before one is given up.",
        json_schema_extra={"default": "5m"},
    )
    model: Annotated[str, *taking(model_of, {**TEXT, "examples": ["llama-3.1-8b"]})] = Field(
        default="", description="Name under which the gateway serves it; its own name when left out."
    )
    concurrency: Annotated[int, *counted(1, MAX_CONCURRENCY)] = Field(
        default=256, description="How many requests a replica is sent at a time; the rest wait in the gateway."
    )
    wait: Annotated[int, *taking(wait_of, _DURATION_SCHEMA)] = Field(
        default=30 * SECOND_NS,
        description="How long a request may wait for a replica, unless it says so itself (`X-Tidemill-Wait`).",
        json_schema_extra={"default": "30s"},
    )
    rollout: RolloutIn = Field(
        default_factory=_shared(RolloutIn),
        description="How it takes the place of the revision before, when it is updated.",
        json_schema_extra={"default": {}},
    )
    guards: Annotated[
        tuple[GuardRule, ...],
        *taking(
            _guards_of,
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "kind": {"type": "string"},
                        "name": {"type": "string"},
                        "action": {"type": "string", "enum": [one.value for one in Action]},
                        "on": {"enum": ["request", "response", "both"]},
                    },
                    "required": ["kind"],
                },
                "examples": [[{"kind": "pii", "action": "redact", "on": "both"}]],
            },
        ),
    ] = Field(default=(), description="What looks at its requests and answers in the gateway: guardrails, in order.")
    affinity: Annotated[Affinity, *taking(affinity_of, {"type": "string", "enum": [one.value for one in Affinity]})] = (
        Field(
            default=Affinity.NONE,
            description="What comes to the same replica: requests that begin alike (`prefix`), or of one `session`.",
            json_schema_extra={"default": "none"},
        )
    )
    fallback: Annotated[
        tuple[str, ...],
        *taking(
            fallback_of,
            {"type": ["array", "string", "null"], "items": TEXT, "examples": [["llama-3.1-8b", "llama-3.2-1b"]]},
        ),
    ] = Field(default=(), description="Models that answer when none of its replicas can, in order.")
    hedge: Annotated[int, *taking(hedge_of, {**_DURATION_SCHEMA, "examples": ["200ms"]})] = Field(
        default=0,
        description="After how long without an answer a second replica is asked too, where that does no harm:"
        " embeddings, reranking, GET and HEAD. 0 for never.",
    )
    timeouts: TimeoutsIn = Field(
        default_factory=_shared(TimeoutsIn),
        description="How long a replica may take, in each phase of a request.",
        json_schema_extra={"default": {}},
    )
    http: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False,
        description="Whether all its paths are reached, under `/services/NAME/` of the gateway. When left out: if it"
        " names no `model`.",
    )
    scaling: ScalingIn = Field(
        default_factory=_shared(ScalingIn),
        description="What the number of replicas follows within its range.",
        json_schema_extra={"default": ""},
    )
    price: PriceIn = Field(
        default_factory=_shared(PriceIn),
        description="What tokens cost; nothing unless it says so. Machines are paid for by the service's project.",
        json_schema_extra={"default": {}},
    )
    cache_salt: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=True,
        description="Send `cache_salt` along, so that no project can find out what another one asked by how soon"
        " the engine's prefix cache answers; false for an engine that refuses fields that it does not know.",
    )


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

    grace: Annotated[int, *taking(grace_of, _DURATION_SCHEMA)] = Field(
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


_Labels = {"type": ["string", "number", "boolean"]}


def _level_schema(*levels: Level) -> dict[str, Any]:
    return {"type": "string", "enum": [level.value for level in levels]}


_ANY_LEVEL: Final = tuple(Level)
_SPREAD: Final = tuple(level for level in Level if level is not Level.NVLINK)


def _one_or_more(check: Callable[[object], Any], what: str) -> Callable[[object], tuple[Any, ...]]:
    """A check for a list, or for its only item."""
    listed = list_of(check, what)
    return lambda value: tuple(dict.fromkeys(listed([value] if type(value) is str else value)))


def _names_schema(examples: list[Any]) -> dict[str, Any]:
    return {"type": ["array", "string", "null"], "items": TEXT, "examples": examples}


class PlacementIn(StrictSection):
    """Where workers may be put, and how they should lie to each other."""

    labels: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(LABEL, choice_of, "label: value", "Use letters, digits, - _ . or /."),
            _string_map(_Labels, "^[A-Za-z0-9]"),
        ),
    ] = Field(
        default=(),
        description="Labels that the machines need to have; `a|b` accepts either.",
        json_schema_extra={"default": {}, "examples": [{"zone": "a|b"}]},
    )
    tolerations: Annotated[
        tuple[str, ...],
        *taking(
            list_of(toleration_of, "taints"),
            {"type": ["array", "null"], "items": TEXT, "examples": [["maintenance", "team=a"]]},
        ),
    ] = Field(default=(), description="Taints of machines that are put up with: `key`, or `key=value`.")
    within: Annotated[Level | None, *taking(level_of(*_ANY_LEVEL), _level_schema(*_ANY_LEVEL))] = Field(
        default=None,
        description="All workers of a job stay within one `site`, `block`, `rack`, `host` or `nvlink` island.",
    )
    prefer: Annotated[Level | None, *taking(level_of(*_ANY_LEVEL), _level_schema(*_ANY_LEVEL))] = Field(
        default=None, description="The same where it can be had, and as near to it as it goes where not."
    )
    spread: Annotated[Level | None, *taking(level_of(*_SPREAD), _level_schema(*_SPREAD))] = Field(
        default=None, description="No two workers of a job share a `host`, `rack`, `block` or `site`."
    )
    apart: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(LABEL, label_of, "label: value", "Use letters, digits, - _ . or /."),
            _string_map(_Labels, "^[A-Za-z0-9]"),
        ),
    ] = Field(
        default=(),
        description="Not on machines where work of the project with one of these labels runs.",
        json_schema_extra={"default": {}, "examples": [{"app": "web"}]},
    )
    across_sites: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False, description="Whether the workers of a job may lie at several sites; else it stays within one."
    )
    sites: Annotated[tuple[str, ...], *taking(_one_or_more(site_of, "sites"), _names_schema([["berlin", "paris"]]))] = (
        Field(default=(), description="At these sites only.")
    )
    countries: Annotated[tuple[str, ...], *taking(countries_of, _names_schema([["DEU", "FRA"], ["EU"]]))] = Field(
        default=(),
        description="At sites in these countries only: ISO 3166 codes or English names; `EU` stands for its members."
        " A site whose country is not known is in none.",
    )
    kinds: Annotated[
        tuple[SiteKind, ...],
        *taking(
            _one_or_more(kind_of_site, "kinds of site"),
            {
                "type": ["array", "string", "null"],
                "items": {"type": "string", "enum": [kind.value for kind in SiteKind]},
                "examples": [["edge"]],
            },
        ),
    ] = Field(default=(), description="At sites of these kinds only: `onprem`, `cloud`, `edge`.")
    weigh: Annotated[
        tuple[tuple[Weight, int], ...],
        *taking(
            weights_of,
            {
                "type": ["string", "object", "null"],
                "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_WEIGHT},
                "propertyNames": {"enum": [what.value for what in Weight]},
                "examples": ["price", {"price": 2, "carbon": 1}],
            },
        ),
    ] = Field(
        default=(),
        description="What weighs when a site is chosen: `price`, `carbon`, `start` or `latency`, or several with their"
        " parts. Unless it is said: the soonest, then the cheapest, then the cleanest.",
        json_schema_extra={"default": ""},
    )
    near: Annotated[str, *taking(site_of, TEXT)] = Field(
        default="", description="The site that `latency` is measured from; said alone, latency weighs."
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


_Model = Annotated[ModelIn, _wrapped("from", str)]
_Data = Annotated[DataIn, _wrapped("dataset", str)]
_Volume = Annotated[VolumeIn, _wrapped("name", str)]
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
        default_factory=_shared(ResourcesIn), description="What each worker gets.", json_schema_extra={"default": {}}
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
            _string_map({"type": ["string", "number", "boolean"]}, "^[A-Za-z_][A-Za-z0-9_]*$"),
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
            _string_map(TEXT, "^[A-Za-z0-9_][A-Za-z0-9._-]*$"),
        ),
    ] = Field(
        default=(),
        description="Artifacts, found read-only in `$TIDEMILL_INPUT_DIR/<name>`.",
        json_schema_extra={"default": {}, "examples": [{"model": "quickstart-gpt:2"}]},
    )
    data: Annotated[list[_Data], BeforeValidator(lambda value: _few(value, "data sets"))] = Field(
        default_factory=list,
        description="Data sets, each a name or a section; the path of each is in `$TIDEMILL_DATA_<NAME>`.",
        json_schema_extra={"default": [], "examples": [[{"dataset": "imagenet", "at": "/data"}]]},
    )
    model: _Model | None = Field(
        default=None,
        description="A model of the registry, by reference or as a section; its path is in `$TIDEMILL_MODEL_DIR`.",
    )
    volumes: Annotated[list[_Volume], BeforeValidator(lambda value: _few(value, "volumes"))] = Field(
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
    array: Annotated[ArrayIn | None, _wrapped("size", int)] = Field(default=None, description="A size, or a section.")
    max_duration: Annotated[int, *taking(duration_of, _DURATION_SCHEMA)] = Field(
        default=0, description="How long an attempt may run; 0 for no limit."
    )
    retry: Annotated[RetryIn, _wrapped("max", int)] = Field(
        default_factory=_shared(RetryIn),
        description="A number of retries, or a section. A service without one is tried again whatever ended it.",
        json_schema_extra={"default": {}},
    )
    checkpoint: CheckpointIn = Field(
        default_factory=_shared(CheckpointIn),
        description="What a worker gets before it is ended.",
        json_schema_extra={"default": {}},
    )
    slurm: SlurmIn = Field(
        default_factory=_shared(SlurmIn),
        description="What Slurm is told, at a site that has it.",
        json_schema_extra={"default": {}},
    )
    expected_duration: Annotated[int, *taking(duration_of, _DURATION_SCHEMA)] = Field(
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
        default_factory=_shared(PlacementIn),
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
            _string_map({"type": ["string", "number", "boolean"]}, "^[A-Za-z0-9]"),
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
        ports, service = _reached(kind, self.ports, self.service)
        try:
            return WorkloadSpec(
                kind=kind,
                name=self.name or default_name,
                run=self.run,
                setup=self.setup,
                nodes=self.nodes.largest,
                nodes_min=self.nodes.smallest if self.nodes.smallest < self.nodes.largest else 0,
                resources=_resources(resources.gpus, resources.cpus, resources.memory, resources.disk),
                environment=_environment(self.env.python, self.env.packages) if self.env is not None else None,
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
                    _retry(self.retry.on[0], self.retry.on[1], self.retry.max)
                    if "retry" in self.model_fields_set
                    else default_retry(kind)
                ),
                checkpoint_grace_ns=self.checkpoint.grace,
                priority=self.priority,
                labels=self.labels,
                any_of=tuple([_alternative(one, resources) for one in resources.any_of]),
                by_speed=resources.prefer,
                tier=self._tier(),
                reservation=self.reservation,
                placement=_placed(self.placement),
                group=Group(name=self.group.name, size=self.group.size) if self.group is not None else None,
                after=self.after,
                expected_duration_ns=self.expected_duration,
                start_after_ns=self.start_after.at(now),
                start_before_ns=self.start_before.at(now),
                data=(*_model_mounts(self.model), *[_data_mount(one) for one in self.data]),
                volumes=tuple([_volume_mount(one) for one in self.volumes]),
                slurm=tuple([(what, word) for what in ("account", "qos") if (word := getattr(self.slurm, what))]),
            )
        except ValueError as error:
            raise InvalidSpec(f"{error}.") from error

    def _tier(self) -> Tier:
        if self.reservation:
            return Tier.RESERVED
        return self.capacity or (Tier.SPOT if self.spot else Tier.ON_DEMAND)


def _alternative(given: AlternativeIn, usual: ResourcesIn) -> Alternative:
    """An alternative with what it leaves out as in ``resources``."""
    gpus, cpus, memory, disk = (
        getattr(given if name in given.model_fields_set else usual, name) for name in ("gpus", "cpus", "memory", "disk")
    )
    return Alternative(resources=_resources(gpus, cpus, memory, disk), speed_milli=given.speed)


def _data_mount(given: DataIn) -> DataMount:
    return DataMount(dataset=given.dataset, at=given.at or default_data_path(given.dataset), mode=given.mode)


def _model_mounts(given: ModelIn | None) -> tuple[DataMount, ...]:
    if given is None:
        return ()
    return (
        DataMount(
            dataset="", model=given.reference, at=given.at or default_model_path(given.reference), mode=DataMode.COPY
        ),
    )


def _volume_mount(given: VolumeIn) -> VolumeMount:
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


def _placed(given: PlacementIn) -> Placement:
    if not given.model_fields_set:
        return _ANYWHERE
    where = Territory(given.sites, given.countries, given.kinds)
    return _placement(
        given.labels,
        given.tolerations,
        given.within,
        given.prefer,
        given.spread,
        given.apart,
        given.across_sites,
        where,
        given.weigh,
        given.near,
    )


_ANYWHERE: Final = Placement()
_placement = lru_cache(maxsize=1_024)(
    lambda labels, tolerations, within, prefer, spread, apart, across_sites, where, weigh, near: Placement(
        labels=labels,
        tolerations=tolerations,
        within=within,
        prefer=prefer,
        spread=spread,
        apart=apart,
        across_sites=across_sites,
        where=where,
        weigh=weigh,
        near=near,
    )
)
_resources = lru_cache(maxsize=4_096)(
    lambda gpus, cpus, memory, disk: Resources(gpus=gpus, cpu_milli=cpus, memory_bytes=memory, disk_bytes=disk)
)
_environment = lru_cache(maxsize=1_024)(lambda python, packages: Environment(python=python, packages=packages))
_retry = lru_cache(maxsize=1_024)(lambda on, codes, most: RetryPolicy(on=on, exit_codes=codes, max=most))


def implied_kind(has_array: bool, has_service: bool) -> Kind:
    """The kind of a workload that says none."""
    return Kind.ARRAY if has_array else Kind.SERVICE if has_service else Kind.TASK


def contradictions(given: set[str], spec: Any, now: int) -> Iterator[dict[str, Any]]:
    """What is wrong between fields. ``spec`` has the fields as attributes; of a wrong one, only that it is given."""
    kind = spec.kind or implied_kind(spec.array is not None, spec.service is not None)
    if spec.env is not None and spec.image:
        yield problem("image", spec.image, "A job has an env or an image, not both.", "Leave one of them out.")
    if kind != "dev" and ("run" not in given or (type(spec.run) is str and not spec.run.strip())):
        yield problem("run", "", f"A workload of kind {kind} needs run.", "Write the command to execute.")
    if spec.array is not None and kind != "array":
        yield problem("array", None, f"A workload of kind {kind} has no array.", "Write kind: array.")
    if spec.array is None and kind == "array":
        yield problem("array", None, "An array needs its size.", "Write for example array: 10.")
    if spec.service is not None and kind != "service":
        yield problem("service", None, f"A workload of kind {kind} has no service.", "Write kind: service.")
    if isinstance(spec.service, ServiceIn) and type(spec.ports) is tuple:
        wanted = spec.service.port
        known = [port.name for port in spec.ports] + [port.number for port in spec.ports if port.number]
        if known and wanted is not None and wanted not in known:
            names = ", ".join(str(port.name) for port in spec.ports)
            yield problem("service.port", wanted, f"{shown(wanted)} is not among ports.", f"Ports are {names}.")
        elif not known and isinstance(wanted, str) and not PORT_NAME.fullmatch(wanted):
            yield problem("service.port", wanted, f"{shown(wanted)} is not a name of a port.", PORT_MEND)
    if isinstance(spec.service, ServiceIn) and isinstance(spec.service.rollout, RolloutIn):
        yield from _impossible_rollouts(spec.service.rollout)
    if isinstance(spec.service, ServiceIn):
        if spec.service.guards and spec.service.http is True:
            mend = "Leave one of them out."
            yield problem("service.http", True, "Guardrails look at requests to its model, not at all paths.", mend)
        own = spec.service.model or spec.name
        if own and own in spec.service.fallback:
            yield problem("service.fallback", own, "It would fall back to itself.", "Leave that one out.")
        yield from _impossible_scaling(spec.service)
    yield from _clashing_mounts(spec)
    yield from _impossible_schedules(spec, kind, now)


def _impossible_scaling(service: ServiceIn) -> Iterator[dict[str, Any]]:
    replicas, scaling = service.replicas, service.scaling
    if not isinstance(replicas, Span) or not isinstance(scaling, ScalingIn):
        return
    if scaling != ScalingIn() and replicas.smallest == replicas.largest:
        mend = f"Write replicas: 1..{max(2, replicas.largest)}, or leave scaling out."
        yield problem("service.scaling", None, f"There are always {replicas.largest} replicas.", mend)
    for hours in scaling.schedule if isinstance(scaling.schedule, list) else ():
        if isinstance(hours, HoursIn) and hours.replicas > replicas.largest:
            mend = f"Write {replicas.largest} at most, or a larger range of replicas."
            sentence = f"There are never more than {replicas.largest} replicas."
            yield problem("service.scaling.schedule.replicas", hours.replicas, sentence, mend)


def _clashing_mounts(spec: Any) -> Iterator[dict[str, Any]]:
    """Paths that are within each other, and names that would have the same variable."""
    data = [one for one in spec.data if isinstance(one, DataIn)] if type(spec.data) is list else []
    volumes = [one for one in spec.volumes if isinstance(one, VolumeIn)] if type(spec.volumes) is list else []
    mounts = [("data", one.at or default_data_path(one.dataset)) for one in data]
    if isinstance(spec.model, ModelIn):
        mounts.append(("model", spec.model.at or default_model_path(spec.model.reference)))
    mounts += [("volumes", one.at or default_volume_path(one.name)) for one in volumes]
    for index, (field, path) in enumerate(mounts):
        for _, other in mounts[:index]:
            if path == other or path.startswith(other + "/") or other.startswith(path + "/"):
                mend = "Give each a path that is not within another's."
                yield problem(field, path, f"{path} and {other} are in each other's way.", mend)
    named = [("data", mount_variable("DATA", one.dataset.partition(":")[0])) for one in data]
    named += [("volumes", mount_variable("VOLUME", one.name)) for one in volumes]
    for index, (field, variable) in enumerate(named):
        if (field, variable) in named[:index]:
            mend = "Leave one of them out, or submit another workload with it."
            yield problem(field, variable, f"Two would have their paths in {variable}.", mend)


def _impossible_schedules(spec: Any, kind: str, now: int) -> Iterator[dict[str, Any]]:
    nodes, placement = spec.nodes, spec.placement
    if isinstance(nodes, Span) and nodes.smallest < nodes.largest and (spec.group is not None or kind == "service"):
        what = "service" if kind == "service" else "gang in a group"
        yield problem(
            "nodes", f"{nodes.smallest}..{nodes.largest}", f"A {what} cannot be elastic.", f"Write {nodes.largest}."
        )
    after, before = spec.start_after, spec.start_before
    if isinstance(after, Moment) and isinstance(before, Moment) and before.ns and before.at(now) <= after.at(now):
        yield problem("start_before", None, "It is not after start_after.", "Write a later time.")
    if spec.spot is True and spec.capacity not in (None, Tier.SPOT):
        yield problem("spot", True, f"It is spot, and capacity is {spec.capacity}.", "Leave one of them out.")
    if spec.reservation and (spec.spot is True or spec.capacity not in (None, Tier.RESERVED)):
        mend = "Leave capacity and spot out: what names a reservation is reserved."
        yield problem(
            "reservation", spec.reservation, "What runs in a reservation is neither spot nor on_demand.", mend
        )
    if spec.capacity == Tier.RESERVED and not spec.reservation:
        mend = "Write reservation: NAME; see tidemill reserve list."
        yield problem("capacity", "reserved", "It does not say in which reservation.", mend)
    if isinstance(spec.resources, ResourcesIn) and spec.resources.prefer and not spec.resources.any_of:
        mend = "Add any_of, or leave prefer out."
        yield problem("resources.prefer", "speed", "There is nothing to choose from.", mend)
    if isinstance(placement, PlacementIn):
        yield from _impossible_sites(placement)
    if isinstance(placement, PlacementIn) and placement.within and placement.spread:
        order = [*Level]
        if order.index(placement.spread) <= order.index(placement.within):
            yield problem(
                "placement.spread",
                placement.spread.value,
                f"Workers cannot stay within one {placement.within} and be spread over several {placement.spread}s.",
                "Spread them over a narrower level, or leave within out.",
            )


def _impossible_sites(placement: PlacementIn) -> Iterator[dict[str, Any]]:
    if placement.across_sites and placement.within:
        sentence = f"Workers cannot stay within one {placement.within} and lie across sites."
        yield problem("placement.across_sites", True, sentence, "Leave one of them out.")
    if Weight.LATENCY in dict(placement.weigh) and not placement.near:
        mend = "Write near: SITE; see tidemill site list."
        yield problem("placement.weigh", "latency", "It does not say from where latency is measured.", mend)


def _reached(kind: Kind, ports: tuple[Port, ...], service: ServiceIn | None) -> tuple[tuple[Port, ...], Service | None]:
    """The ports and the service section, with the port that is meant when none is named."""
    if kind is not Kind.SERVICE:
        return ports, None
    section = service or ServiceIn()
    if not ports:
        ports = (port_of(section.port if section.port is not None else "http"),)
    name = next((port.name for port in ports if section.port in (port.name, port.number)), ports[0].name)
    return ports, Service(
        port=name,
        readiness_path=section.readiness.path,
        readiness_timeout_ns=section.readiness.timeout,
        readiness_pace=_pace(section.readiness),
        liveness_path=section.liveness.path if section.liveness is not None else "",
        liveness_pace=_pace(section.liveness) if section.liveness is not None else None,
        replicas=section.replicas.largest,
        replicas_min=section.replicas.smallest if section.replicas.smallest < section.replicas.largest else None,
        idle_ns=section.idle,
        model=section.model,
        concurrency=section.concurrency,
        wait_ns=section.wait,
        rollout=_rolling(section.rollout),
        guards=section.guards,
        affinity=section.affinity,
        fallback=section.fallback,
        hedge_ns=section.hedge,
        timeouts=_timeouts(section.timeouts),
        http=section.http if "http" in section.model_fields_set else None,
        scaling=_scaling(section.scaling),
        price_input_micro=section.price.input,
        price_output_micro=section.price.output,
        is_salted=section.cache_salt,
    )


def _rolling(section: RolloutIn) -> Rolling:
    told = section.rollback
    return Rolling(
        surge=section.surge,
        unavailable=section.unavailable,
        drain_ns=section.drain,
        progress_ns=section.progress,
        steps=tuple(CanaryStep(weight=step.weight, hold_ns=step.hold) for step in section.canary),
        comparison=Comparison(
            errors_milli=told.errors,
            slower_milli=int(told.slower),
            requests=told.requests,
            window_ns=told.window,
        )
        if told is not None
        else None,
    )


def _impossible_rollouts(rollout: RolloutIn) -> Iterator[dict[str, Any]]:
    if not rollout.surge and not rollout.unavailable:
        sentence = "With neither surge nor unavailable no replica can be exchanged."
        yield problem("service.rollout.surge", 0, sentence, "Write surge: 1, or unavailable: 1.")
    weights = [step.weight for step in rollout.canary]
    if weights != sorted(set(weights)):
        sentence = "Each step of a canary has a larger weight than the one before."
        yield problem("service.rollout.canary", weights, sentence, "Write for example 10, then 50.")


def _pace(probe: ReadinessIn | LivenessIn) -> Pace:
    return Pace(delay_ns=probe.delay, every_ns=probe.every, answer_ns=probe.answer, failures=probe.failures)


def _timeouts(given: TimeoutsIn) -> Timeouts:
    return Timeouts(
        connect_ns=given.connect, first_byte_ns=given.first_byte, between_ns=given.between, whole_ns=given.whole
    )


def _scaling(given: ScalingIn) -> Scaling:
    return Scaling(
        ttft_ns=given.ttft,
        latency_ns=given.latency,
        queue_ns=given.queue,
        engine_queue=given.engine_queue,
        in_flight=given.in_flight,
        tokens=given.tokens,
        gpu_milli=given.gpu,
        kv_cache_milli=given.kv_cache,
        window_ns=given.window,
        tolerance_milli=given.tolerance,
        up_after_ns=given.up_after,
        up_step=given.up_step,
        down_step=given.down_step,
        down_every_ns=given.down_every,
        predicts=given.predict,
        hours=tuple(
            Hours(replicas=one.replicas, days=one.days, from_s=one.starts, until_s=one.ends, zone=one.zone)
            for one in given.schedule
        ),
    )


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


_DEFAULT_RETRY: Final = RetryPolicy()
_SERVICE_RETRY: Final = RetryPolicy(on=tuple(RetryOn), max=1_000)


def default_retry(kind: Kind) -> RetryPolicy:
    """When a job is tried again though its spec says nothing of it: a service always, others when they were lost."""
    return _SERVICE_RETRY if kind is Kind.SERVICE else _DEFAULT_RETRY
