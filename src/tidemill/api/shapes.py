"""The shapes of answers and of bodies, for the OpenAPI document and for checking what is sent.

Answers are typed dictionaries: they are built as such and encoded at once. Instants end in ``_at_ns`` and are ns
since 1970, zero for "not yet"; money is micro-USD, energy mJ, carbon mg of CO2e, shares thousandths.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from typing_extensions import TypedDict

from tidemill.core import buckets
from tidemill.model.limits import LIMITS, Priority
from tidemill.model.spec import MAX_PRICE_MICRO
from tidemill.model.tenant import Scope

Item = TypeVar("Item")
PLAIN_TEXT = r"^[^\x00]*$"
ENDPOINT = r"^([A-Za-z0-9.-]{1,253}:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5})?$"
Plain = Annotated[str, StringConstraints(max_length=4_096, pattern=PLAIN_TEXT)]
NAME = r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME)]


class Problem(TypedDict):
    """An error (RFC 9457). ``code`` is stable; ``errors`` lists every mistake of a spec."""

    type: str
    title: str
    status: int
    code: str
    kind: str
    detail: str
    field: str
    value: Any
    mend: str
    errors: list[dict[str, Any]]


class PageOf(TypedDict, Generic[Item]):
    """Part of a list; ``next_cursor`` is empty when this was the last."""

    items: list[Item]
    next_cursor: str


class Health(TypedDict):
    """The control plane answers."""

    status: Literal["ok"]
    version: str


class ReasonOut(TypedDict):
    """An expected "no": what is missing, how much is needed, how much there is, and what would resolve it."""

    code: str
    subject: str
    needed: str
    available: str
    resolvable_by: str
    sentence: str


class ForecastOut(TypedDict):
    """When a waiting job would start; zero: not within what was looked at. ``basis`` says what it rests on."""

    earliest_at_ns: int
    likely_at_ns: int
    latest_at_ns: int
    basis: str


class HoldingOut(TypedDict):
    """Who holds what is needed, until when at the latest; of others' jobs neither id nor name is told."""

    job: str
    name: str
    project: str
    amount: str
    ends_at_ns: int


class DeviceHeld(TypedDict):
    """A device that a worker holds, a share of it, or a MIG slice: ``profile``, from memory slice ``slice`` on."""

    id: str
    milli: int
    model: str
    index: int
    profile: str
    slice: int


class WorkerOut(TypedDict):
    """One rank of an attempt."""

    rank: int
    attempt: int
    node: str
    devices: list[DeviceHeld]
    cpu_milli: int
    memory_bytes: int
    state: str
    exit_code: int | None
    isolation: list[str]
    ports: dict[str, int]
    endpoint: str
    cause: str
    detail: str
    scheduler: dict[str, str]
    cpu_used_ns: int
    started_at_ns: int
    held_at_ns: int
    released_at_ns: int


class AttemptOut(TypedDict):
    """One try at running a job."""

    id: str
    number: int
    state: str
    cause: str
    detail: str
    exit_code: int | None
    workers: int
    placed_at_ns: int
    started_at_ns: int
    ready_at_ns: int
    ended_at_ns: int
    checkpoint_at_ns: int


class AskOut(TypedDict):
    """How many replicas one objective asks for, where it is at and what is meant, in words."""

    objective: str
    wants: int
    seen: str
    target: str


class ReplicasOut(TypedDict):
    """How many replicas a service has and is to have, why, and which objective asked for how many.

    ``lead_ns`` is how long before they are needed replicas are launched. ``days`` is of how many days is known what is
    usually needed, and ``has_pattern`` whether that can be gone by.
    """

    decided_at_ns: int
    wanted: int
    ready: int
    coming: int
    leaving: int
    least: int
    most: int
    why: str
    asks: list[AskOut]
    lead_ns: int
    days: int
    has_pattern: bool


class JobOut(TypedDict):
    """One schedulable unit of a workload. The last four come with one job only."""

    id: str
    workload_id: str
    name: str
    kind: str
    project: str
    index: int
    state: str
    cause: str
    detail: str
    exit_code: int | None
    priority: int
    submitted_at_ns: int
    first_started_at_ns: int
    started_at_ns: int
    ended_at_ns: int
    attempts: int
    retries: int
    evictions: int
    capacity: str
    nodes: int
    nodes_min: int
    resources: dict[str, Any]
    labels: dict[str, str]
    reason: ReasonOut | None
    endpoint: str
    spec: NotRequired[dict[str, Any]]
    attempt_list: NotRequired[list[AttemptOut]]
    workers: NotRequired[list[WorkerOut]]
    replicas: NotRequired[ReplicasOut | None]


class WorkloadOut(TypedDict):
    """What was submitted, with the first thousand of its jobs; ``job_count`` counts all."""

    id: str
    name: str
    kind: str
    project: str
    submitted_at_ns: int
    state: str
    spec: dict[str, Any]
    jobs: list[JobOut]
    job_count: int


class WorkloadsOut(TypedDict):
    """The workloads of a batch, in its order."""

    items: list[WorkloadOut]


class OptionOut(TypedDict):
    """A nearby spec, by what is different in it, and what it would give; zero instants: not known."""

    change: str
    starts_at_ns: int
    finish_at_ns: int
    amount_micro: int
    energy_mj: int
    carbon_mg: int


class SiteOptionOut(TypedDict):
    """How a job would be at one site.

    ``rank`` counts from 1 in the order in which sites are tried; zero: it is never put there. ``reason`` is why it is
    not put there now; null: nothing stands in its way. ``latency_ns`` is from the site that the spec is near to.
    """

    site: str
    rank: int
    reason: ReasonOut | None
    starts_at_ns: int
    copy_ns: int
    amount_micro: int
    energy_mj: int
    carbon_mg: int
    latency_ns: int | None


class QuoteOut(TypedDict):
    """The answer before submitting; amounts are estimates for ``duration_ns`` of running.

    ``forecast`` is null when it would start now or never; ``displaces`` are jobs that would have to give way. ``sites``
    is empty where there is one site only.
    """

    feasible: bool
    starts_now: bool
    duration_ns: int
    duration_known: bool
    amount_micro: int
    energy_mj: int
    carbon_mg: int
    placement: list[list[str]]
    reasons: list[ReasonOut]
    suggestions: list[str]
    forecast: ForecastOut | None
    finish_at_ns: int
    options: list[OptionOut]
    displaces: list[str]
    copy_ns: int
    copy_bytes: int
    estimated: bool
    rate_card: str
    currency: str
    carbon_source: str
    sites: list[SiteOptionOut]


class WhyOut(TypedDict):
    """Why a job is where it is. ``position`` counts from 1 while it waits; ``lines`` are for people.

    ``site`` is where it runs, ``sites`` how it would be at each while it waits; empty where there is one only.
    ``replicas`` is null unless it is of a service whose number of replicas follows something.
    """

    job: str
    state: str
    cause: str
    detail: str
    reasons: list[ReasonOut]
    holdings: list[HoldingOut]
    forecast: ForecastOut | None
    position: int
    ahead: int
    lines: list[str]
    site: str
    sites: list[SiteOptionOut]
    replicas: ReplicasOut | None


class ReceiptOut(TypedDict):
    """What a job took and cost so far."""

    job: str
    name: str
    state: str
    queue_wait_ns: int
    prepare_ns: int
    run_ns: int
    held_ns: int
    device_seconds: dict[str, float]
    amount_micro: int
    currency: str
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    carbon_source: str
    rate_card: str
    unit_prices: dict[str, int]
    lines: int
    metered_until_ns: int


class StatusOut(TypedDict):
    """The cloud at a glance.

    ``workers`` run; of ``heard`` of them the runner was heard of since the control plane started. ``strangers`` are
    launches that the database has never heard of.
    """

    version: str
    state: str
    site: str
    nodes: int
    devices: list[dict[str, Any]]
    cpu_milli: int
    free_cpu_milli: int
    gpu_milli: int
    free_gpu_milli: int
    jobs: dict[str, int]
    gateway_url: str
    energy: str
    rate_card: str
    strangers: int
    workers: int
    heard: int


class ReplicaOut(TypedDict):
    """A control plane of this installation; ``quiet_ms`` is how long ago it last said that it is there."""

    id: str
    api_url: str
    leads: bool
    quiet_ms: int


class StrangerOut(TypedDict):
    """A launch that runs, or ran, and that the database has never heard of: it is newer than the backup restored.

    With ``job_known`` it ends by itself when a newer attempt of that job gets the lease; else it is left alone.
    """

    launch: str
    job: str
    job_known: bool
    state: str
    seen_at_ns: int


class LiveJobOut(TypedDict):
    """A job that is not over."""

    id: str
    name: str
    state: str


class LiveJobsOut(TypedDict):
    """How many jobs are not over, and the first of them."""

    live: int
    jobs: list[LiveJobOut]


class FailingOut(TypedDict):
    """A device that nothing is placed on, and what it fails of."""

    device: str
    detail: str


class NodeOut(TypedDict):
    """A machine: what it has, what of it is free, and what is wrong with it.

    ``marking`` is the cordon or drain that stands; ``workers`` counts those that hold something there. ``others_`` is
    what work holds there that another scheduler than ours started.
    """

    id: str
    name: str
    site: str
    state: str
    state_cause: str
    marking: str
    failing: list[FailingOut]
    taints: list[str]
    block: str
    rack: str
    workers: int
    held_until_at_ns: int
    cpu_model: str
    cpu_milli: int
    free_cpu_milli: int
    memory_bytes: int
    free_memory_bytes: int
    disk_bytes: int
    others_cpu_milli: int
    others_memory_bytes: int
    others_gpus: int
    devices: list[dict[str, Any]]
    images: bool
    labels: dict[str, str]
    joined_at_ns: int


class OutpostStateOut(TypedDict):
    """A process at a site that works its engine. ``is_there``: it asked for work a moment ago."""

    id: str
    name: str
    engine: str
    is_there: bool


class LinkOut(TypedDict):
    """The way to another site. ``bits_per_s`` zero: not known."""

    site: str
    latency_ns: int
    bits_per_s: int


class SiteOut(TypedDict):
    """A place with its machines. ``silent`` counts those that cannot be reached; ``lease_ns`` zero: none is given.

    ``prices`` are micro-USD an hour where the site has its own.
    """

    id: str
    name: str
    kind: str
    engine: str
    country: str
    pue: float
    carbon_g_per_kwh: float
    carbon_source: str
    lease_ns: int
    carbon_g_by_hour: list[float]
    prices: dict[str, int]
    tariff_micro_per_kwh: int
    rate_card: str
    links: list[LinkOut]
    nodes: int
    silent: int
    outposts: list[OutpostStateOut]


class RentalOut(TypedDict):
    """A machine that is or was rented. ``cost_micro`` is what it cost, once it is over; ``jobs`` those it is for."""

    id: str
    site: str
    state: str
    machine: str
    instance: str
    type: str
    market: str
    micro_per_hour: int
    cost_micro: int
    cause: str
    jobs: list[str]
    created_at_ns: int
    ended_at_ns: int


class NotRentedOut(TypedDict):
    """A waiting job for which nothing is rented, and why."""

    job: str
    code: str
    sentence: str


class RentingOut(TypedDict):
    """What is rented: as of the last look. ``spent_micro`` is this month's; ``problem`` says why it could not look."""

    items: list[RentalOut]
    next_cursor: str
    spent_micro: int
    not_rented: list[NotRentedOut]
    problem: str


class JoiningOut(TypedDict):
    """A token that lets machines join a site, shown this once.

    ``url`` is there when the API has a certificate; ``fingerprint`` is that one's when no authority vouches for it.
    """

    token: str
    site: str
    expires_at_ns: int
    url: NotRequired[str]
    fingerprint: NotRequired[str]


class JoiningSiteOut(TypedDict):
    """The site that a token is for. ``settings`` are those of the cluster that a machine of its engine joins."""

    site: str
    engine: str
    settings: dict[str, str]


class OutpostOut(TypedDict):
    """An outpost, with the token that is its own from now on."""

    id: str
    name: str
    site: str
    site_id: str
    engine: str
    token: str


class OutpostCallsOut(TypedDict):
    """Calls of the site's engine to carry out, by number. Numbers begin anew with each ``session``."""

    session: str
    calls: list[dict[str, Any]]


class ReportTakenOut(TypedDict):
    """Up to which number what the outpost brought was taken; zero: nothing with a number."""

    taken: int


class LeavingOut(TypedDict):
    """The jobs that run still on machines that leave; ``left`` once there are none."""

    running: list[str]
    left: bool


class QueueOut(TypedDict):
    """A place in the quota tree, as it can be sent back: GPUs and cores as numbers, memory as a size."""

    name: str
    parent: str
    project: str
    weight: float
    guaranteed: dict[str, Any]
    limit: dict[str, Any]
    max_running: int
    max_queued: int


class ShareOut(TypedDict):
    """Who has what, by resource class, in milli-GPU, milli-CPU and bytes.

    ``borrowed`` is held above what is guaranteed, ``entitled`` what it could have now, ``models`` what it holds by
    device model. ``share`` is the largest part of the fleet that it holds, or lately held, of any resource.
    """

    name: str
    parent: str
    project: str
    depth: int
    weight: float
    guaranteed: dict[str, int]
    limit: dict[str, int]
    held: dict[str, int]
    borrowed: dict[str, int]
    entitled: dict[str, int]
    models: dict[str, int]
    share: float
    running: int
    queued: int


class QueuedOut(TypedDict):
    """A waiting job. ``position`` counts from 1 among all jobs, also those that the caller may not see.

    It is zero while something else than its turn is waited for. ``starts_by_at_ns`` is by when it starts at the latest,
    for the one job that others may not delay.
    """

    position: int
    job: str
    name: str
    kind: str
    project: str
    user: str
    nodes: int
    nodes_min: int
    resources: dict[str, Any]
    capacity: str
    priority: int
    submitted_at_ns: int
    waited_ns: int
    evictions: int
    starts_by_at_ns: int
    sites: list[str]
    reason: ReasonOut | None


class WindowOut(TypedDict):
    """One time during which a reservation holds."""

    from_ns: int
    to_ns: int


class ReservationOut(TypedDict):
    """Machines kept for a project, or for nobody without one. ``state`` is ``open``, ``planned`` or ``over``.

    ``window`` is the one that is open or comes next, null when none will.
    """

    id: str
    name: str
    project: str
    nodes: list[str]
    state: str
    window: WindowOut | None
    starts_at_ns: int
    ends_at_ns: int
    every_ns: int
    until_at_ns: int
    created_by: str


class EventOut(TypedDict):
    """A line of the event log."""

    seq: int
    type: str
    data: dict[str, Any]


class TokenTotalsOut(TypedDict):
    """Sums over requests to models; ``estimated`` of them did not come to their end.

    What they are not grouped by is empty.
    """

    model: str
    token_id: str
    user: str
    label: str
    requests: int
    estimated: int
    prompt_tokens: int
    completion_tokens: int
    amount_micro: int


class TokenUsageOut(TypedDict):
    """What one request to a model took; ``estimated`` when it did not come to its end. ``amount_pico``: millionths of a
    micro-USD."""

    id: str
    at_ns: int
    project_id: str
    token_id: str
    model: str
    workload_id: str
    job_id: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    user: str
    label: str
    amount_pico: int


class UsageOut(TypedDict):
    """Exact sums over ledger lines. ``held_milli_ns`` maps a resource to milli-units x ns.

    ``amount_micro`` is for machines, ``tokens_amount_micro`` for tokens of requests to models.
    """

    held_milli_ns: dict[str, int]
    device_seconds: dict[str, float]
    amount_micro: int
    currency: str
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    lines: int
    tokens: list[TokenTotalsOut]
    tokens_amount_micro: int


class ModelCostOut(TypedDict):
    """What the replicas of a model took for the tokens that they answered with, idle time among it."""

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    amount_micro: int
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    amount_micro_per_1k_tokens: int
    energy_mj_per_1k_tokens: int
    carbon_mg_per_1k_tokens: int


class ModelCostsOut(TypedDict):
    """Models, in order."""

    items: list[ModelCostOut]


class DecisionOut(TypedDict):
    """What a guardrail decided about a request; ``found`` counts what it found, by label."""

    id: str
    at_ns: int
    request_id: str
    project_id: str
    token_id: str
    model: str
    rule: str
    kind: str
    stage: str
    action: str
    found: dict[str, int]


class LedgerLineOut(TypedDict):
    """One priced interval of use; without a launch, of idle time or of ``others``: work that is not this cloud's."""

    id: str
    node_id: str
    meter: str
    resource: str
    from_ns: int
    to_ns: int
    milli: int
    amount_micro: int
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    rate_card: str
    included: bool
    others: bool
    launch_id: str
    attempt_id: str
    job_id: str
    project_id: str


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


class SecretOut(TypedDict):
    """A secret's name; its value is never shown."""

    name: str
    updated_at_ns: int


class ProjectOut(TypedDict):
    """A project and its limits; zero does not limit what jobs hold. ``limits`` is for requests to models."""

    id: str
    name: str
    created_at_ns: int
    limit_gpu_milli: int
    limit_cpu_milli: int
    limits: dict[str, int | float]
    countries: list[str]


class TokenOut(TypedDict):
    """A token. ``token`` is there only in the answer that makes it."""

    id: str
    name: str
    display: str
    scopes: list[str]
    project: str
    created_at_ns: int
    expires_at_ns: int
    revoked_at_ns: int
    models: list[str]
    limits: dict[str, int | float]
    priority: str
    label: str
    token: NotRequired[str]


class ExecOut(TypedDict):
    """A command that was handed to a worker's runner."""

    exec_id: str


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


class RevisionOut(TypedDict):
    """A revision of a service: `running`, `coming`, `going`, `replaced`, `taken back` or `stopped`."""

    revision: int
    workload: str
    state: str
    submitted_ns: int
    ready: int
    weight: int | None
    back_to: int
    by: str
    detail: str
    spec: dict[str, Any]


class RolloutOut(TypedDict):
    """How far a service is on the way from the revision `before` to `revision`."""

    state: str
    revision: int
    before: int
    step: int
    steps: list[dict[str, int]]
    began_ns: int
    watched_ns: int
    needed: int
    ready_old: int
    ready_new: int
    answers: dict[str, Any]
    detail: str
    by: str


class RevisionsOut(TypedDict):
    """All revisions of a service, newest first; `rollout` is null while none is under way."""

    name: str
    items: list[RevisionOut]
    rollout: RolloutOut | None


class FeedOut(TypedDict):
    """Everything that the gateway needs."""

    version: int
    tokens: dict[str, Any]
    routes: dict[str, Any]
    sites: dict[str, Any]
    home: str
    projects: dict[str, Any]


class Body(BaseModel):
    """What is sent; fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


_Name = Annotated[str, Field(max_length=300, pattern=r"^[^\x00]*$")]


class RequestUsageIn(Body):
    """What one request took, as the gateway tells."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}-[0-9a-f]{1,16}$")]
    at_ns: Annotated[int, Field(ge=0, lt=2**63)]
    project: _Name
    token: _Name
    model: _Name
    workload: _Name
    job: _Name
    prompt_tokens: Annotated[int, Field(ge=0, lt=2**31)]
    completion_tokens: Annotated[int, Field(ge=0, lt=2**31)]
    is_estimated: bool
    user: _Name = ""
    label: _Name = ""
    price: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_PRICE_MICRO)]],
        Field(min_length=2, max_length=2, description="Micro-USD for a million tokens, in and out."),
    ] = [0, 0]


class RulingIn(Body):
    """What a guardrail decided about one request, as the gateway tells."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}-[0-9a-f]{1,16}$")]
    at_ns: Annotated[int, Field(ge=0, lt=2**63)]
    request: _Name
    project: _Name
    token: _Name
    model: _Name
    rule: _Name
    kind: _Name
    stage: _Name
    action: _Name
    found: dict[_Name, Annotated[int, Field(ge=0, lt=2**53)]]


class RulingsIn(Body):
    """What guardrails decided."""

    rulings: list[RulingIn] = Field(max_length=10_000)


class RequestUsagesIn(Body):
    """What requests took."""

    usages: list[RequestUsageIn] = Field(max_length=10_000)


_Count = Annotated[int, Field(ge=0, lt=2**31)]


_Total = Annotated[int, Field(ge=0, lt=2**53)]
_Counts = Annotated[
    dict[Annotated[str, Field(pattern=r"^([0-9]|[1-7][0-9]|8[0-3])$")], _Total], Field(max_length=buckets.COUNT)
]


class FeltIn(Body):
    """What users of a model felt since the gateway began: counts of times by bucket, and tokens of answers.

    Bucket `n` has what took up to 2^(n/4) ms and longer than that of the one before.
    """

    ttft: _Counts
    latency: _Counts
    queue: _Counts
    tokens: _Total


class ModelLoadIn(Body):
    """Requests under way on replicas of a model, and waiting for one; now and then what users felt."""

    in_flight: _Count
    waiting: _Count
    felt: FeltIn | None = None


class ReplicaLoadIn(Body):
    """Requests under way on a replica, whether it gets no more, and what its engine tells of itself."""

    in_flight: _Count
    is_leaving: bool
    queued: _Count | None = None
    running: _Count | None = None
    cache_milli: Annotated[int, Field(ge=0, le=1000)] | None = None
    first_token_ms: _Total | None = None


class VariantLoadIn(Body):
    """What became of requests to a variant of a model since the gateway started; times of answers in buckets."""

    requests: _Total
    errors: _Total
    slow: _Counts = {}


class LoadIn(Body):
    """What a gateway has on its hands, by model and by replica's job."""

    worker: _Name
    models: Annotated[dict[_Name, ModelLoadIn], Field(max_length=10_000)]
    replicas: Annotated[dict[_Name, ReplicaLoadIn], Field(max_length=100_000)]
    variants: Annotated[dict[_Name, dict[_Name, VariantLoadIn]], Field(max_length=10_000)] = {}


_Amount = Annotated[int, Field(ge=-(2**63), lt=2**63)]


_Share = Annotated[
    tuple[_Name, _Name, _Amount, _Amount, _Amount, _Amount, _Amount, _Amount, _Amount, _Amount], Field(strict=False)
]


class SharesIn(Body):
    """What a gateway has of limits, and what it needs. ``number`` grows with each of its calls."""

    gateway: _Name
    number: Annotated[int, Field(ge=0, lt=2**53)]
    shares: Annotated[
        list[_Share],
        Field(
            max_length=1_000_000,
            description="Of each a key's or project's id, a limit's name, when its window began (ns), what is held,"
            " pending, spent in all, spent of late, needed for one request, needed for all, and hoped for.",
        ),
    ]


class SharesOut(TypedDict):
    """What a gateway gets more of limits.

    ``shares`` has of each a key's or project's id, a limit's name, when its window began (ns), what is given, what
    nobody holds, what others hold, and whether others wait for some.
    """

    gateways: int
    shares: list[tuple[str, str, int, int, int, int, bool]]


class EnteredOut(TypedDict):
    """How many of them were not known before."""

    entered: int


class SubmitIn(Body):
    """A workload to submit, or to quote."""

    spec: dict[str, Any] = Field(description="The workload; see the workload schema.")
    project: Plain = ""


class UpdateIn(SubmitIn):
    """A service as it is to be from now on."""

    restart: bool = Field(False, description="Exchange its replicas though nothing is different.")


class PromoteIn(Body):
    """How far a canary is to go."""

    all: bool = Field(False, description="To the whole service, whatever steps there are.")


class RollbackIn(Body):
    """Where to go back to."""

    revision: Annotated[int, Field(ge=0, lt=2**31, description="The revision; 0: the one before.")] = 0


class BatchIn(Body):
    """Workloads to submit, all or none."""

    specs: list[dict[str, Any]] = Field(min_length=1, max_length=1_000)
    project: Plain = ""


class NothingIn(Body):
    """An empty object, or no body."""


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
    tags: _Texts = {}
    metrics: _Texts = {}
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
    tags: dict[Annotated[str, StringConstraints(max_length=250)], str | None] = {}


class ModelPolicyIn(Body):
    """What a project lets into its models."""

    pickles: Literal["allow", "refuse"]


class SecretIn(Body):
    """A secret's value."""

    value: Annotated[str, StringConstraints(max_length=65_536, pattern=PLAIN_TEXT)]


Limits = Annotated[dict[Annotated[str, StringConstraints(max_length=40)], float], Field(max_length=len(LIMITS))]
Label = Annotated[str, StringConstraints(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]


class ProjectIn(Body):
    """A project, made or given new limits."""

    name: Name
    limit_gpu_milli: int = Field(0, ge=0, le=10**12)
    limit_cpu_milli: int = Field(0, ge=0, le=10**12)
    limits: Limits | None = Field(None, description="Of requests to models; left as they are when left out.")
    countries: list[Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)]] | None = Field(
        None,
        max_length=300,
        description="Where its work runs and its requests are answered, by ISO 3166 code or English name, or `EU`;"
        " none: anywhere. Left as they are when left out.",
    )


Models = Annotated[list[Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,200}$")]], Field(max_length=200)]


class TokenIn(Body):
    """A token to make. It gets at most what its maker may do."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=PLAIN_TEXT)]
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(min_length=1, max_length=10)
    project: Plain = ""
    expires_in: str | int = Field("90d", description="A duration such as 90d, or never.")
    models: Models = Field(default=[], description="What it may ask, `*` standing for anything; none: all.")
    limits: Limits = Field(default={}, description="Of requests to models, such as `requests/minute` or `usd/month`.")
    priority: Annotated[Priority, Field(strict=False)] = Priority.NORMAL
    label: Label = Field("", description="What its requests are booked under when they do not say.")


class TokenChangeIn(Body):
    """What a token is to say of requests to models from now on; what is left out stays as it is."""

    models: Models | None = None
    limits: Limits | None = None
    priority: Annotated[Priority | None, Field(strict=False)] = None
    label: Label | None = None


_Resource = Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)]


class SiteIn(Body):
    """A site to add, or what of one is to be described anew; what is left out stays as it is."""

    kind: Literal["onprem", "cloud", "edge"] | None = None
    engine: Literal["local", "ray", "slurm", "kubernetes"] | None = None
    country: Annotated[str, StringConstraints(pattern=r"^([A-Z]{3})?$")] | None = None
    pue: float | None = Field(None, ge=1, lt=100)
    carbon_g_per_kwh: float | None = Field(None, ge=0, lt=1_000_000)
    carbon_by_hour: list[Annotated[float, Field(ge=0, lt=1_000_000)]] | None = Field(
        None, max_length=24, description="24 intensities, by hour of the day in UTC; none: the same all day."
    )
    lease: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] | None = Field(
        None, description="How long a worker runs on without a word from the control plane, such as 1h; or none."
    )
    prices: (
        dict[
            Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)],
            Annotated[float, Field(ge=0, le=1_000_000)],
        ]
        | None
    ) = Field(
        None,
        max_length=1_000,
        description="US dollars an hour by device model, or for cpu, where they differ from the installation's rates.",
    )
    tariff: float | None = Field(
        None, ge=0, lt=1_000, description="US dollars for a kWh, charged on top of the prices; 0: it is in them."
    )


class LinkIn(Body):
    """The way between two sites."""

    latency: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] = Field(
        "0s", description="There and back, such as 20ms."
    )
    bandwidth: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] = Field(
        "", description="Such as 1Gbps; not known when left out."
    )


class SiteTokenIn(Body):
    """A token with which machines join a site."""

    expires_in: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] = "1h"


class LeaveIn(Body):
    """What leaves: that machine, or all of the outpost's."""

    node: Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)] = ""


class OutpostIn(Body):
    """An outpost that joins. ``key`` is made by it once and kept, so that joining again is the same outpost."""

    name: Name
    key: Annotated[str, StringConstraints(pattern=r"^[0-9a-z]{16,40}$")]
    engine: Literal["local", "ray", "slurm", "kubernetes"] = "local"


class ExecIn(Body):
    """A command to run inside a worker."""

    command: list[Annotated[str, StringConstraints(max_length=131_000, pattern=PLAIN_TEXT)]] = Field(
        min_length=1, max_length=1_000
    )
    rank: int = Field(0, ge=0, le=100_000)
    tty: bool = False
    rows: int = Field(24, ge=1, le=10_000)
    cols: int = Field(80, ge=1, le=10_000)
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,255}$")], Plain] = Field(
        default={}, max_length=1_000
    )


Nanoseconds = Annotated[int, Field(ge=0, lt=2**63)]


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
