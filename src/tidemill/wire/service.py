"""The section ``service``: probes, rollouts, time-outs, scaling and prices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from tidemill.errors import InvalidRequest
from tidemill.guards.reading import rules_of
from tidemill.model.guard import Action, GuardRule
from tidemill.model.rollout import MAX_REQUESTS, MAX_SURGE, CanaryStep, Comparison, Rolling
from tidemill.model.scaling import DAYS, MAX_WINDOWS, Hours, Scaling
from tidemill.model.spec import (
    MAX_CONCURRENCY,
    MAX_FAILURES,
    MAX_REPLICAS,
    Affinity,
    Kind,
    Pace,
    Port,
    Service,
    Timeouts,
)
from tidemill.units import SECOND_NS
from tidemill.wire.checks import Refusal, duration_of, grace_of, period_of, wait_of
from tidemill.wire.fields import (
    affinity_of,
    fallback_of,
    hedge_of,
    model_of,
    path_of,
    patience_of,
    port_of,
    port_reference,
    price_of,
)
from tidemill.wire.rolling import errors_of, hold_of, progress_of, rollback_of, slower_of, steps_of, watch_of, weight_of
from tidemill.wire.scaling import days_of, objective_of, share_of, time_of, tolerance_of, window_of, zone_of
from tidemill.wire.scheduling import Span, flag_of, replicas_of
from tidemill.wire.section import DURATION_SCHEMA, TEXT, StrictSection, counted, problem, shared, taking, wrapped


class ReadinessIn(StrictSection):
    """How it is told that a service's replica can be used."""

    path: Annotated[str, *taking(path_of, {**TEXT, "examples": ["/health"]})] = Field(
        default="", description="Path that answers 200 once it is ready; without it an open port is enough."
    )
    timeout: Annotated[int, *taking(duration_of, DURATION_SCHEMA)] = Field(
        default=120 * SECOND_NS,
        description="How long it may take until it is ready, its model loaded.",
        json_schema_extra={"default": "2m"},
    )
    delay: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
        default=0, description="How long after its start it is asked first.", json_schema_extra={"default": "0s"}
    )
    every: Annotated[int, *taking(period_of, DURATION_SCHEMA)] = Field(
        default=2 * SECOND_NS,
        description="How often it is asked once it is ready; before that, four times a second.",
        json_schema_extra={"default": "2s"},
    )
    answer: Annotated[int, *taking(period_of, DURATION_SCHEMA)] = Field(
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
    delay: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
        default=0,
        description="How long after it became ready it is asked first; until it is ready, `readiness` counts.",
        json_schema_extra={"default": "0s"},
    )
    every: Annotated[int, *taking(period_of, DURATION_SCHEMA)] = Field(
        default=10 * SECOND_NS, description="How often it is asked.", json_schema_extra={"default": "10s"}
    )
    answer: Annotated[int, *taking(period_of, DURATION_SCHEMA)] = Field(
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
    hold: Annotated[int, *taking(hold_of, DURATION_SCHEMA)] = Field(
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
    window: Annotated[int, *taking(watch_of, DURATION_SCHEMA)] = Field(
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
    drain: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
        default=600 * SECOND_NS,
        description="How long a replica that leaves may go on with what is under way on it.",
        json_schema_extra={"default": "10m"},
    )
    progress: Annotated[int, *taking(progress_of, DURATION_SCHEMA)] = Field(
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
        default_factory=shared(RollbackIn),
        description="When it is taken back by itself; `false`: only when its replicas do not come up.",
        json_schema_extra={"default": {}},
    )


class TimeoutsIn(StrictSection):
    """How long the gateway waits for a service's replica, in each phase of a request."""

    connect: Annotated[int, *taking(patience_of, DURATION_SCHEMA)] = Field(
        default=5 * SECOND_NS,
        description="To be connected; then another one is tried.",
        json_schema_extra={"default": "5s"},
    )
    first_byte: Annotated[int, *taking(patience_of, DURATION_SCHEMA)] = Field(
        default=600 * SECOND_NS,
        description="For a response to begin, once the request is sent.",
        json_schema_extra={"default": "10m"},
    )
    between: Annotated[int, *taking(patience_of, DURATION_SCHEMA)] = Field(
        default=600 * SECOND_NS,
        description="For the next part of a response; on a WebSocket for anything, from either side.",
        json_schema_extra={"default": "10m"},
    )
    whole: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
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
    window: Annotated[int, *taking(window_of, DURATION_SCHEMA)] = Field(
        default=60 * SECOND_NS,
        description="Over how long is looked at what was felt.",
        json_schema_extra={"default": "1m"},
    )
    tolerance: Annotated[int, *taking(tolerance_of, {"type": ["string", "number"], "examples": ["10%"]})] = Field(
        default=100,
        description="Within this part of an objective the number of replicas stays.",
        json_schema_extra={"default": "10%"},
    )
    up_after: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
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
    down_every: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
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
    readiness: Annotated[ReadinessIn, wrapped("path", str)] = Field(
        default_factory=shared(ReadinessIn), description="A path, or a section.", json_schema_extra={"default": {}}
    )
    liveness: Annotated[LivenessIn | None, wrapped("path", str)] = Field(
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
    idle: Annotated[int, *taking(grace_of, DURATION_SCHEMA)] = Field(
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
    wait: Annotated[int, *taking(wait_of, DURATION_SCHEMA)] = Field(
        default=30 * SECOND_NS,
        description="How long a request may wait for a replica, unless it says so itself (`X-Tidemill-Wait`).",
        json_schema_extra={"default": "30s"},
    )
    rollout: RolloutIn = Field(
        default_factory=shared(RolloutIn),
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
    hedge: Annotated[int, *taking(hedge_of, {**DURATION_SCHEMA, "examples": ["200ms"]})] = Field(
        default=0,
        description="After how long without an answer a second replica is asked too, where that does no harm:"
        " embeddings, reranking, GET and HEAD. 0 for never.",
    )
    timeouts: TimeoutsIn = Field(
        default_factory=shared(TimeoutsIn),
        description="How long a replica may take, in each phase of a request.",
        json_schema_extra={"default": {}},
    )
    http: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False,
        description="Whether all its paths are reached, under `/services/NAME/` of the gateway. When left out: if it"
        " names no `model`.",
    )
    scaling: ScalingIn = Field(
        default_factory=shared(ScalingIn),
        description="What the number of replicas follows within its range.",
        json_schema_extra={"default": ""},
    )
    price: PriceIn = Field(
        default_factory=shared(PriceIn),
        description="What tokens cost; nothing unless it says so. Machines are paid for by the service's project.",
        json_schema_extra={"default": {}},
    )
    cache_salt: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=True,
        description="Send `cache_salt` along, so that no project can find out what another one asked by how soon"
        " the engine's prefix cache answers; false for an engine that refuses fields that it does not know.",
    )


def impossible_scaling(service: ServiceIn) -> Iterator[dict[str, Any]]:
    """What its scaling says against its replicas."""
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


def with_port(
    kind: Kind, ports: tuple[Port, ...], service: ServiceIn | None
) -> tuple[tuple[Port, ...], Service | None]:
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


def impossible_rollouts(rollout: RolloutIn) -> Iterator[dict[str, Any]]:
    """What its rollout says against itself."""
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
