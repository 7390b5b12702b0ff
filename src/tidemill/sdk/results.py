"""What the client returns: frozen values made from the control plane's JSON.

Fields that a newer control plane adds are ignored, fields that an older one lacks take their defaults.
Units are those of ``tidemill.units``; zero instants mean "not yet".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

TERMINAL_STATES = frozenset(("succeeded", "failed", "cancelled"))


class Record:
    """A value that is read from JSON and written back as JSON. ``nested`` names the fields that are records."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]
    nested: ClassVar[Mapping[str, type[Record]]] = {}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The value behind a JSON object; unknown fields are ignored."""
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        for name, kind in cls.nested.items():
            if isinstance(known.get(name), Mapping):
                known[name] = kind.from_json(known[name])
            elif isinstance(known.get(name), list):
                known[name] = tuple(kind.from_json(item) for item in known[name])
        for name, value in known.items():
            if isinstance(value, list):  # a mapping may come as a list of pairs, which keeps its order
                known[name] = dict(value) if cls.__dataclass_fields__[name].default_factory is dict else tuple(value)
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that ``from_json`` reads; the stable shape of ``--json``."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class Reason(Record):
    """Why something is not so: an expected "no"."""

    code: str = ""
    subject: str = ""
    needed: str = ""
    available: str = ""
    resolvable_by: str = ""
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Worker(Record):
    """One rank of a job's attempt."""

    rank: int = 0
    attempt: int = 0
    node: str = ""
    devices: tuple[Any, ...] = ()
    cpu_milli: int = 0
    memory_bytes: int = 0
    state: str = ""
    exit_code: int | None = None
    isolation: tuple[str, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    endpoint: str = ""
    cause: str = ""
    detail: str = ""
    scheduler: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ask(Record):
    """How many replicas one objective asks for, where it is at and what is meant, in words."""

    objective: str = ""
    wants: int = 0
    seen: str = ""
    target: str = ""


@dataclass(frozen=True, kw_only=True)
class Replicas(Record):
    """How many replicas a service has and is to have, why, and which objective asked for how many."""

    nested: ClassVar[Mapping[str, type[Record]]] = {"asks": Ask}

    decided_at_ns: int = 0
    wanted: int = 0
    ready: int = 0
    coming: int = 0
    leaving: int = 0
    least: int = 0
    most: int = 0
    why: str = ""
    asks: tuple[Ask, ...] = ()
    lead_ns: int = 0
    days: int = 0
    has_pattern: bool = False


@dataclass(frozen=True, kw_only=True)
class Job(Record):
    """One schedulable unit of a workload. ``spec``, ``attempt_list``, ``workers`` and ``replicas`` come with one only.

    ``replicas`` is of its service; None unless their number follows something.
    """

    nested: ClassVar[Mapping[str, type[Record]]] = {"reason": Reason, "workers": Worker, "replicas": Replicas}

    id: str = ""
    workload_id: str = ""
    name: str = ""
    kind: str = ""
    project: str = ""
    index: int = 0
    state: str = ""
    cause: str = ""
    detail: str = ""
    exit_code: int | None = None
    priority: int = 0
    submitted_at_ns: int = 0
    first_started_at_ns: int = 0
    started_at_ns: int = 0
    ended_at_ns: int = 0
    attempts: int = 0
    retries: int = 0
    evictions: int = 0
    capacity: str = ""
    nodes: int = 1
    nodes_min: int = 0
    resources: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    reason: Reason | None = None
    endpoint: str = ""
    spec: Mapping[str, Any] | None = None
    attempt_list: tuple[Mapping[str, Any], ...] = ()
    workers: tuple[Worker, ...] = ()
    replicas: Replicas | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended for good."""
        return self.state in TERMINAL_STATES

    @property
    def exit_status(self) -> int:
        """The exit status of a command that stands for the job: its own, and 1 when it failed without one."""
        if self.state == "succeeded":
            return 0
        if self.exit_code is None or self.exit_code == 0:
            return 1
        return self.exit_code if 0 < self.exit_code < 256 else 128 - self.exit_code if -128 < self.exit_code < 0 else 1


@dataclass(frozen=True, kw_only=True)
class Workload(Record):
    """What was submitted, with the first thousand of its ``job_count`` jobs."""

    nested: ClassVar[Mapping[str, type[Record]]] = {"jobs": Job}

    id: str = ""
    name: str = ""
    kind: str = ""
    project: str = ""
    submitted_at_ns: int = 0
    spec: Mapping[str, Any] = field(default_factory=dict)
    jobs: tuple[Job, ...] = ()
    job_count: int = 0
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class Revision(Record):
    """A revision of a service: ``running``, ``coming``, ``going``, ``replaced``, ``taken back`` or ``stopped``.

    ``weight`` is how many of a hundred requests it gets, None where that is not told. ``back_to`` is the revision
    whose spec it has, when somebody went back to that; else zero.
    """

    revision: int = 0
    workload: str = ""
    state: str = ""
    submitted_ns: int = 0
    ready: int = 0
    weight: int | None = None
    back_to: int = 0
    by: str = ""
    detail: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollout(Record):
    """The way from the revision ``before`` to ``revision``: ``canary``, ``rolling`` or ``returning``.

    ``steps`` are those of the canary, ``weight`` and ``for_ns`` of each; ``answers`` are what became of requests to
    the ``old`` and the ``new`` one of late.
    """

    state: str = ""
    revision: int = 0
    before: int = 0
    step: int = 0
    steps: tuple[Mapping[str, int], ...] = ()
    began_ns: int = 0
    watched_ns: int = 0
    needed: int = 0
    ready_old: int = 0
    ready_new: int = 0
    answers: Mapping[str, Any] = field(default_factory=dict)
    detail: str = ""
    by: str = ""


@dataclass(frozen=True, kw_only=True)
class Revisions(Record):
    """All revisions of a service, newest first, and the rollout under way; None: there is none."""

    nested: ClassVar[Mapping[str, type[Record]]] = {"items": Revision, "rollout": Rollout}

    name: str = ""
    items: tuple[Revision, ...] = ()
    rollout: Rollout | None = None


@dataclass(frozen=True, kw_only=True)
class LogChunk(Record):
    """A piece of one worker's log. ``offset`` is its first byte's place in that worker's log."""

    rank: int = 0
    attempt: int = 0
    offset: int = 0
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class JobUpdate(Record):
    """The job as it became while its log was followed."""

    nested: ClassVar[Mapping[str, type[Record]]] = {"job": Job}

    job: Job = Job()


@dataclass(frozen=True, kw_only=True)
class Event(Record):
    """A line of the event log. ``data`` is what the control plane recorded."""

    seq: int = 0
    type: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Forecast(Record):
    """When a waiting job would start; zero: not within what was looked at. ``basis`` says what it rests on."""

    earliest_at_ns: int = 0
    likely_at_ns: int = 0
    latest_at_ns: int = 0
    basis: str = ""


@dataclass(frozen=True, kw_only=True)
class Holding(Record):
    """Who holds what is needed, until when at the latest; of others' jobs neither id nor name is told."""

    job: str = ""
    name: str = ""
    project: str = ""
    amount: str = ""
    ends_at_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class Option(Record):
    """A nearby spec, by what is different in it, and what it would give."""

    change: str = ""
    starts_at_ns: int = 0
    finish_at_ns: int = 0
    amount_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0


@dataclass(frozen=True, kw_only=True)
class SiteOption(Record):
    """How a job would be at one site. ``rank`` zero: it is never put there; ``reason`` is why not, or not now."""

    nested: ClassVar[Mapping[str, type[Record]]] = {"reason": Reason}

    site: str = ""
    rank: int = 0
    reason: Reason | None = None
    starts_at_ns: int = 0
    copy_ns: int = 0
    amount_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0
    latency_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class Quote(Record):
    """The answer before submitting; amounts are estimates for ``duration_ns`` of running."""

    nested: ClassVar[Mapping[str, type[Record]]] = {
        "reasons": Reason,
        "forecast": Forecast,
        "options": Option,
        "sites": SiteOption,
    }

    feasible: bool = False
    starts_now: bool = False
    duration_ns: int = 0
    duration_known: bool = False
    amount_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0
    placement: tuple[Any, ...] = ()
    reasons: tuple[Reason, ...] = ()
    suggestions: tuple[str, ...] = ()
    forecast: Forecast | None = None
    finish_at_ns: int = 0
    options: tuple[Option, ...] = ()
    displaces: tuple[str, ...] = ()
    copy_ns: int = 0
    copy_bytes: int = 0
    estimated: bool = True
    rate_card: str = ""
    currency: str = "USD"
    carbon_source: str = ""
    sites: tuple[SiteOption, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Why(Record):
    """Why a job is where it is. ``position`` counts from 1 in its queue; zero when it does not wait."""

    nested: ClassVar[Mapping[str, type[Record]]] = {
        "reasons": Reason,
        "holdings": Holding,
        "forecast": Forecast,
        "sites": SiteOption,
        "replicas": Replicas,
    }

    job: str = ""
    state: str = ""
    cause: str = ""
    detail: str = ""
    reasons: tuple[Reason, ...] = ()
    holdings: tuple[Holding, ...] = ()
    forecast: Forecast | None = None
    position: int = 0
    ahead: int = 0
    lines: tuple[str, ...] = ()
    site: str = ""
    sites: tuple[SiteOption, ...] = ()
    replicas: Replicas | None = None


@dataclass(frozen=True, kw_only=True)
class RequestUsage(Record):
    """What one request to a model took; ``estimated`` when it did not come to its end."""

    id: str = ""
    at_ns: int = 0
    project_id: str = ""
    token_id: str = ""
    model: str = ""
    workload_id: str = ""
    job_id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False


@dataclass(frozen=True, kw_only=True)
class Receipt(Record):
    """What a job used and what that costs."""

    job: str = ""
    name: str = ""
    state: str = ""
    queue_wait_ns: int = 0
    prepare_ns: int = 0
    run_ns: int = 0
    held_ns: int = 0
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    amount_micro: int = 0
    energy_mj: int = 0
    energy_evidence: str = ""
    carbon_mg: int = 0
    carbon_source: str = ""
    rate_card: str = ""
    lines: int = 0
    unit_prices: Mapping[str, Any] = field(default_factory=dict)
    metered_until_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class Status(Record):
    """The state of the cloud."""

    version: str = ""
    state: str = ""
    site: Any = ""
    nodes: Any = 0
    devices: tuple[Any, ...] = ()
    cpu_milli: int = 0
    free_cpu_milli: int = 0
    gpu_milli: int = 0
    free_gpu_milli: int = 0
    rate_card: str = ""
    jobs: Mapping[str, int] = field(default_factory=dict)
    gateway_url: str = ""
    energy: str = ""
    strangers: int = 0
    workers: int = 0
    heard: int = 0


@dataclass(frozen=True, kw_only=True)
class Replica(Record):
    """One of several control planes; ``quiet_ms`` is how long ago it last said that it is there."""

    id: str = ""
    api_url: str = ""
    leads: bool = False
    quiet_ms: int = 0


@dataclass(frozen=True, kw_only=True)
class Stranger(Record):
    """A launch on the engine that the database has never heard of: it is newer than the backup that was restored.

    With ``job_known`` it ends by itself when a newer attempt of that job gets the lease.
    """

    launch: str = ""
    job: str = ""
    job_known: bool = False
    state: str = ""
    seen_at_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class NodeInfo(Record):
    """A machine: what it has, what of it is free, and what is wrong with it.

    ``marking`` is the cordon or drain that stands; ``workers`` counts those that hold something there. ``others_`` is
    what work holds there that another scheduler than ours started.
    """

    id: str = ""
    name: str = ""
    site: str = ""
    state: str = ""
    state_cause: str = ""
    marking: str = ""
    failing: tuple[Mapping[str, Any], ...] = ()
    taints: tuple[str, ...] = ()
    block: str = ""
    rack: str = ""
    workers: int = 0
    held_until_at_ns: int = 0
    others_cpu_milli: int = 0
    others_memory_bytes: int = 0
    others_gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    cpu_model: str = ""
    cpu_milli: int = 0
    free_cpu_milli: int = 0
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    devices: tuple[Mapping[str, Any], ...] = ()
    images: bool = False
    joined_at_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class SiteInfo(Record):
    """A place with its machines and outposts. ``silent`` counts machines that cannot be reached."""

    id: str = ""
    name: str = ""
    kind: str = ""
    engine: str = ""
    country: str = ""
    pue: float = 1.0
    carbon_g_per_kwh: float = 0.0
    carbon_source: str = ""
    lease_ns: int = 0
    carbon_g_by_hour: tuple[float, ...] = ()
    prices: Mapping[str, int] = field(default_factory=dict)
    tariff_micro_per_kwh: int = 0
    rate_card: str = ""
    links: tuple[Mapping[str, Any], ...] = ()
    nodes: int = 0
    silent: int = 0
    outposts: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class QueueInfo(Record):
    """A place in the quota tree: GPUs and cores as numbers, memory as a size, by resource class."""

    name: str = ""
    parent: str = ""
    project: str = ""
    weight: float = 1
    guaranteed: Mapping[str, Any] = field(default_factory=dict)
    limit: Mapping[str, Any] = field(default_factory=dict)
    max_running: int = 0
    max_queued: int = 0


@dataclass(frozen=True, kw_only=True)
class Share(Record):
    """Who has what, by resource class, in milli-GPU, milli-CPU and bytes.

    ``borrowed`` is held above what is guaranteed, ``entitled`` what it could have now, ``models`` what it holds by
    device model. ``share`` is the largest part of the fleet that it holds, or lately held, of any resource.
    """

    name: str = ""
    parent: str = ""
    project: str = ""
    depth: int = 0
    weight: float = 1
    guaranteed: Mapping[str, int] = field(default_factory=dict)
    limit: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    borrowed: Mapping[str, int] = field(default_factory=dict)
    entitled: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[str, int] = field(default_factory=dict)
    share: float = 0.0
    running: int = 0
    queued: int = 0


@dataclass(frozen=True, kw_only=True)
class QueuedJob(Record):
    """A waiting job. ``position`` counts from 1 among all jobs, also those that one may not see.

    It is zero while something else than its turn is waited for. ``starts_by_at_ns`` is by when it starts at the latest,
    for the one job that others may not delay.
    """

    nested: ClassVar[Mapping[str, type[Record]]] = {"reason": Reason}

    position: int = 0
    job: str = ""
    name: str = ""
    kind: str = ""
    project: str = ""
    user: str = ""
    nodes: int = 1
    nodes_min: int = 1
    resources: Mapping[str, Any] = field(default_factory=dict)
    capacity: str = ""
    priority: int = 0
    submitted_at_ns: int = 0
    waited_ns: int = 0
    evictions: int = 0
    starts_by_at_ns: int = 0
    sites: tuple[str, ...] = ()
    reason: Reason | None = None


@dataclass(frozen=True, kw_only=True)
class ReservationInfo(Record):
    """Machines kept for a project, or for nobody without one, at a time. ``state``: open, planned or over."""

    id: str = ""
    name: str = ""
    project: str = ""
    nodes: tuple[str, ...] = ()
    state: str = ""
    window: Mapping[str, int] | None = None
    starts_at_ns: int = 0
    ends_at_ns: int = 0
    every_ns: int = 0
    until_at_ns: int = 0
    created_by: str = ""


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo(Record):
    """One version of a named artifact."""

    id: str = ""
    name: str = ""
    version: int = 0
    project: str = ""
    digest: str = ""
    size: int = 0
    created_at_ns: int = 0
    job: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VolumeInfo(Record):
    """A folder of a site that jobs may have mounted. ``node`` is the one machine that has it; empty: all there have."""

    id: str = ""
    name: str = ""
    project: str = ""
    site: str = ""
    node: str = ""
    path: str = ""
    read_only: bool = False
    created_at_ns: int = 0
    created_by: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSetInfo(Record):
    """One version of a data set; ``detail`` says what came of the last look at its home."""

    id: str = ""
    name: str = ""
    version: int = 0
    project: str = ""
    home: str = ""
    site: str = ""
    node: str = ""
    endpoint: str = ""
    region: str = ""
    secret: str = ""
    state: str = ""
    detail: str = ""
    digest: str = ""
    size: int = 0
    files: int = 0
    cached_on: tuple[str, ...] = ()
    checked_at_ns: int = 0
    created_at_ns: int = 0
    created_by: str = ""


@dataclass(frozen=True, kw_only=True)
class AliasInfo(Record):
    """A name that points to one version of a model at a time."""

    name: str = ""
    version: int = 0
    since_at_ns: int = 0
    by: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelInfo(Record):
    """A model of the registry. ``production`` and ``staging`` are numbers of versions; zero: none is there."""

    id: str = ""
    name: str = ""
    project: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    newest: int = 0
    versions: int = 0
    production: int = 0
    staging: int = 0
    aliases: tuple[AliasInfo, ...] = ()
    nested: ClassVar[Mapping[str, type[Record]]] = {"aliases": AliasInfo}
    created_at_ns: int = 0
    created_by: str = ""
    changed_at_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class StageInfo(Record):
    """The stage of a version: since when, who put it there and why."""

    stage: str = ""
    since_at_ns: int = 0
    by: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class AncestorInfo(Record):
    """What a model was made of."""

    reference: str = ""
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class LineageInfo(Record):
    """Where a version of a model came from; what is empty is not known."""

    job: str = ""
    workload_id: str = ""
    workload: str = ""
    spec_digest: str = ""
    data: tuple[AncestorInfo, ...] = ()
    artifacts: tuple[AncestorInfo, ...] = ()
    models: tuple[AncestorInfo, ...] = ()
    commit: str = ""
    run: str = ""
    source: str = ""
    nested: ClassVar[Mapping[str, type[Record]]] = {
        "data": AncestorInfo,
        "artifacts": AncestorInfo,
        "models": AncestorInfo,
    }


@dataclass(frozen=True, kw_only=True)
class ModelUserInfo(Record):
    """What is not over and was given a version of a model."""

    workload_id: str = ""
    name: str = ""
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelVersionInfo(Record):
    """One version of a model; ``digest`` is that of the list of its files."""

    id: str = ""
    name: str = ""
    version: int = 0
    project: str = ""
    digest: str = ""
    size: int = 0
    files: int = 0
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    stage: StageInfo = field(default_factory=StageInfo)
    aliases: tuple[str, ...] = ()
    format: str = ""
    framework: str = ""
    architecture: str = ""
    base_model: str = ""
    licence: str = ""
    parameters: int = 0
    precision: str = ""
    precisions: Mapping[str, int] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    pickles: tuple[str, ...] = ()
    pickles_allowed: str = ""
    lineage: LineageInfo = field(default_factory=LineageInfo)
    used_by: tuple[ModelUserInfo, ...] = ()
    cached_on: tuple[str, ...] = ()
    created_at_ns: int = 0
    created_by: str = ""

    nested: ClassVar[Mapping[str, type[Record]]] = {
        "stage": StageInfo,
        "lineage": LineageInfo,
        "used_by": ModelUserInfo,
    }

    @property
    def reference(self) -> str:
        """``name:version``."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class ProjectInfo(Record):
    """A project and its limits; zero means no limit."""

    id: str = ""
    name: str = ""
    created_at_ns: int = 0
    limit_gpu_milli: int = 0
    limit_cpu_milli: int = 0
    limits: Mapping[str, float] = field(default_factory=dict)
    countries: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class GuardDecision(Record):
    """What a guardrail decided about a request; ``found`` counts what it found, by label."""

    id: str = ""
    at_ns: int = 0
    request_id: str = ""
    project_id: str = ""
    token_id: str = ""
    model: str = ""
    rule: str = ""
    kind: str = ""
    stage: str = ""
    action: str = ""
    found: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenInfo(Record):
    """A token as it is listed. ``token`` is filled only in the answer that creates it."""

    id: str = ""
    name: str = ""
    display: str = ""
    scopes: tuple[str, ...] = ()
    project: str = ""
    created_at_ns: int = 0
    expires_at_ns: int = 0
    revoked_at_ns: int = 0
    models: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    priority: str = "normal"
    label: str = ""
    token: str = ""


@dataclass(frozen=True)
class ExecResult:
    """How a command inside a worker ended, and what it wrote."""

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
