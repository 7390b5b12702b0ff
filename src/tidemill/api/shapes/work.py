"""Jobs and workloads: what is asked for, where it stands, what it will take, and why it waits."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from tidemill.api.shapes.common import PLAIN_TEXT, Body, Plain


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


class LiveJobOut(TypedDict):
    """A job that is not over."""

    id: str
    name: str
    state: str


class LiveJobsOut(TypedDict):
    """How many jobs are not over, and the first of them."""

    live: int
    jobs: list[LiveJobOut]


class EventOut(TypedDict):
    """A line of the event log."""

    seq: int
    type: str
    data: dict[str, Any]


class ExecOut(TypedDict):
    """A command that was handed to a worker's runner."""

    exec_id: str


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
