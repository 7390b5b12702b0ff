"""The specification of a workload, already parsed: what the scheduler and the runner work from.

``wire`` turns what people write into these values; everything here is checked and in base units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tidemill.model.fleet import Level, SiteKind
from tidemill.model.guard import GuardRule
from tidemill.model.ids import SiteId, WorkloadId
from tidemill.model.resources import Resources
from tidemill.model.rollout import Rolling
from tidemill.model.scaling import Scaling
from tidemill.model.storage import DataMode, DataMount, VolumeMount
from tidemill.units import DAY_NS, MILLI, SECOND_NS, USD_MICRO

_EXIT_CODE: Final = re.compile(r"exit:(\d{1,3})")
_LABEL: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
PRIORITY_RANGE: Final = (-1_000, 1_000)
MAX_WORKERS: Final = 8_192
MAX_ARRAY: Final = 100_000
MAX_REPLICAS: Final = 64
MAX_CONCURRENCY: Final = 65_536
MAX_FAILURES: Final = 1_000
MAX_WAIT_NS: Final = 600 * SECOND_NS
MAX_FALLBACKS: Final = 8
MAX_PRICE_MICRO: Final = 1_000 * USD_MICRO
"""Of a million tokens."""
SECRET_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class Kind(StrEnum):
    """What sort of workload it is."""

    TASK = "task"
    ARRAY = "array"
    DEV = "dev"
    SERVICE = "service"
    PIPELINE = "pipeline"


class RetryOn(StrEnum):
    """Causes for which a job may be tried again; exit codes are listed beside them."""

    NODE_LOST = "node_lost"
    PREEMPTED = "preempted"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When an ended attempt is followed by another. ``max`` counts retries, not attempts."""

    on: tuple[RetryOn, ...] = (RetryOn.NODE_LOST, RetryOn.PREEMPTED)
    exit_codes: tuple[int, ...] = ()
    max: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.max <= 1_000:
            raise ValueError("retry.max lies between 0 and 1000")
        if any(not 1 <= code <= 255 for code in self.exit_codes):
            raise ValueError("an exit code to retry on lies between 1 and 255")


def parse_retry_on(items: tuple[str, ...]) -> tuple[tuple[RetryOn, ...], tuple[int, ...]]:
    """The causes and exit codes in a list such as ``["node_lost", "exit:33"]``.

    Raises: ValueError that names the item and what is accepted.
    """
    causes: list[RetryOn] = []
    codes: list[int] = []
    for item in items:
        if match := _EXIT_CODE.fullmatch(item):
            codes.append(int(match[1]))
        elif item in RetryOn._value2member_map_:
            causes.append(RetryOn(item))
        else:
            raise ValueError(f"{item!r} is not a cause; use node_lost, preempted, error or exit:CODE")
    return tuple(causes), tuple(codes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The Python environment of a job, built by uv and kept by content. ``python`` empty: the node's own."""

    python: str = ""
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port that a worker listens on. ``number`` zero: Tidemill chooses one and gives it in ``PORT``."""

    name: str
    number: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", self.name):
            raise ValueError(f"port name {self.name!r} needs to be lower-case letters, digits, - or _")
        if self.number and not 1024 <= self.number <= 65_535:
            raise ValueError(f"port {self.number} is out of range; use 1024 to 65535")


class Affinity(StrEnum):
    """What brings requests to the same replica of a service."""

    NONE = "none"
    PREFIX = "prefix"
    """That they begin alike, so that an engine finds what it has computed before."""
    SESSION = "session"
    """That they say that they belong together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long the gateway waits for a replica: to connect, for a response's first byte, for the next one, in all.

    ``whole_ns`` zero: as long as it takes.
    """

    connect_ns: int = 5 * SECOND_NS
    first_byte_ns: int = 600 * SECOND_NS
    between_ns: int = 600 * SECOND_NS
    whole_ns: int = 0

    def __post_init__(self) -> None:
        if any(not 0 < one <= DAY_NS for one in (self.connect_ns, self.first_byte_ns, self.between_ns)):
            raise ValueError("a replica is waited for longer than no time, and for a day at most")
        if not 0 <= self.whole_ns <= DAY_NS:
            raise ValueError("a request takes a day at most")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When a probe is sent: first after ``delay_ns``, then every ``every_ns``, each answered within ``answer_ns``.

    After ``failures`` that follow each other it is taken for failed.
    """

    delay_ns: int = 0
    every_ns: int = 2 * SECOND_NS
    answer_ns: int = 2 * SECOND_NS
    failures: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.delay_ns <= DAY_NS:
            raise ValueError("the first probe is sent after a day at most")
        if not SECOND_NS // 10 <= self.every_ns <= DAY_NS or not SECOND_NS // 10 <= self.answer_ns <= DAY_NS:
            raise ValueError("probes are sent, and answered, within 100 ms to a day")
        if not 1 <= self.failures <= MAX_FAILURES:
            raise ValueError(f"a probe may fail between 1 and {MAX_FAILURES} times")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How a service is reached: its port, its probes, its number of replicas, its model's name.

    ``readiness_path`` empty means that an open port is enough; so does ``liveness_path``. ``liveness_pace`` None: it
    is never ended for not answering. ``concurrency`` is how many requests a replica is sent at a time, ``wait_ns`` how
    long a request may wait for its turn when all are taken, or none is there.
    """

    port: str
    readiness_path: str = ""
    readiness_timeout_ns: int = 120 * SECOND_NS
    readiness_pace: Pace = Pace()
    liveness_path: str = ""
    liveness_pace: Pace | None = None
    replicas: int = 1
    model: str = ""
    replicas_min: int | None = None
    """As many run at least, and up to ``replicas`` as requests need them; None: always ``replicas``."""
    idle_ns: int = 300 * SECOND_NS
    """For how long fewer have to be enough before a replica is given up."""
    concurrency: int = 256
    wait_ns: int = 30 * SECOND_NS
    rollout: Rolling = Rolling()
    """How it takes the place of the revision before it."""
    guards: tuple[GuardRule, ...] = ()
    """What looks at its requests and answers, beside the rules that the settings have for all."""
    affinity: Affinity = Affinity.NONE
    fallback: tuple[str, ...] = ()
    """Models that answer when none of its replicas can, in order."""
    hedge_ns: int = 0
    """After which a request that may be sent twice is sent to a second replica too; zero: never."""
    timeouts: Timeouts = Timeouts()
    http: bool | None = None
    """Whether any of its paths is reached under ``/services/NAME/``; None: when it names no model."""
    scaling: Scaling = Scaling()
    """What the number of replicas follows beside the requests."""
    price_input_micro: int = 0
    """What a million tokens cost in requests, in micro-USD."""
    price_output_micro: int = 0
    """The same of answers."""
    is_salted: bool = True
    """Whether requests say whose prefixes they may share in the engine's cache."""

    def __post_init__(self) -> None:
        if len(self.fallback) > MAX_FALLBACKS or len(set(self.fallback)) != len(self.fallback):
            raise ValueError(f"a service falls back to {MAX_FALLBACKS} models at most, each named once")
        if not 0 <= self.hedge_ns <= MAX_WAIT_NS:
            raise ValueError("a second replica is asked after ten minutes at most")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ValueError(f"replicas lies between 1 and {MAX_REPLICAS}")
        if self.replicas_min is not None and not 0 <= self.replicas_min <= self.replicas:
            raise ValueError("the smallest number of replicas lies between 0 and the largest")
        if not 0 <= self.idle_ns <= DAY_NS:
            raise ValueError("a replica is given up after a day without need at most")
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise ValueError(f"concurrency lies between 1 and {MAX_CONCURRENCY}")
        if not 0 <= self.wait_ns <= MAX_WAIT_NS:
            raise ValueError("a request waits for 10 minutes at most")
        for price in (self.price_input_micro, self.price_output_micro):
            if not 0 <= price <= MAX_PRICE_MICRO:
                raise ValueError(f"a million tokens cost from 0 to {MAX_PRICE_MICRO} micro-USD")
        if any(path and not path.startswith("/") for path in (self.readiness_path, self.liveness_path)):
            raise ValueError("the path of a probe begins with /")
        if self.scaling != Scaling() and not self.is_scaled:
            raise ValueError("only a number of replicas within a range can follow something")
        if any(hours.replicas > self.replicas for hours in self.scaling.hours):
            raise ValueError("no hours have more replicas than there are at most")

    @property
    def is_open(self) -> bool:
        """Whether any of its paths is reached, and not only the API of its model, which alone guardrails look at."""
        return not self.guards and (not self.model if self.http is None else self.http)

    @property
    def is_scaled(self) -> bool:
        """Whether the number of replicas follows the requests."""
        return self.replicas_min is not None and self.replicas_min < self.replicas

    @property
    def smallest(self) -> int:
        """How many replicas there are at least."""
        return self.replicas if self.replicas_min is None else self.replicas_min


class Tier(StrEnum):
    """What sort of capacity a workload wants; a later one may displace those before it."""

    SPOT = "spot"
    """May be displaced at any time, with its checkpoint grace."""
    ON_DEMAND = "on_demand"
    RESERVED = "reserved"
    """Runs in a reservation of its project and is not displaced while that lasts."""


class DependsOn(StrEnum):
    """How a workload has to have ended for another to start."""

    OK = "ok"
    ANY = "any"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependency:
    """Another workload of the project that has to have ended first, by its id."""

    workload_id: WorkloadId
    on: DependsOn = DependsOn.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Other resources that would do. ``speed_milli`` compares with ``resources``, which is 1000."""

    resources: Resources
    speed_milli: int = MILLI

    def __post_init__(self) -> None:
        if self.speed_milli <= 0:
            raise ValueError("a speed is above zero; 1 is that of resources")


class Weight(StrEnum):
    """What may weigh when a site is chosen; less of each is better."""

    START = "start"
    """How soon it can begin there, with the copying of its data."""
    PRICE = "price"
    CARBON = "carbon"
    LATENCY = "latency"
    """How far it is from the site that ``near`` names."""


@dataclass(frozen=True, slots=True)
class Territory:
    """Which sites a job may be put at: by name, by country (ISO 3166 alpha-3), by kind. Empty: all.

    A site whose country is not known is in none.
    """

    sites: tuple[str, ...] = ()
    countries: tuple[str, ...] = ()
    kinds: tuple[SiteKind, ...] = ()

    def words(self) -> tuple[str, ...]:
        """What is asked for, in the spec's own words: ``countries: DEU, FRA``."""
        asked: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("sites", self.sites),
            ("countries", self.countries),
            ("kinds", tuple(kind.value for kind in self.kinds)),
        )
        return tuple(f"{name}: {', '.join(values)}" for name, values in asked if values)


ANYWHERE: Final = Territory()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where workers may be put, and how they should lie to each other.

    ``labels`` are those a node needs to have; a value ``a|b`` accepts either, and a node's ``a|b`` is both.
    ``tolerations`` are taints (``key`` or ``key=value``) that are put up with. ``within`` keeps all workers in one
    domain of that level, ``prefer`` tries to; ``spread`` puts no two workers into the same domain of that level.
    ``apart`` keeps workers off nodes where work of the project with one of these labels runs.

    A job stays within one site unless it may lie ``across_sites``. ``where`` says which sites may have it; of these
    the one is chosen that is best by ``weigh``, parts in thousandths or any other measure; empty: soonest, then
    cheapest, then cleanest. ``near`` is the site that latency is measured from.
    """

    labels: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[str, ...] = ()
    within: Level | None = None
    prefer: Level | None = None
    spread: Level | None = None
    apart: tuple[tuple[str, str], ...] = ()
    across_sites: bool = False
    where: Territory = ANYWHERE
    weigh: tuple[tuple[Weight, int], ...] = ()
    near: str = ""

    def __post_init__(self) -> None:
        if any(part <= 0 for _, part in self.weigh) or len({what for what, _ in self.weigh}) != len(self.weigh):
            raise ValueError("what weighs is named once, with a part above zero")
        if (Weight.LATENCY in dict(self.weigh)) and not self.near:
            raise ValueError("latency weighs from somewhere: near names the site")
        if self.across_sites and self.within:
            raise ValueError(f"workers cannot stay within one {self.within} and lie across sites")
        if self.spread is Level.NVLINK:
            raise ValueError("workers are spread over host, rack, block or site")
        if self.within and self.spread and _WIDTH[self.spread] >= _WIDTH[self.within]:
            raise ValueError(f"workers cannot stay within one {self.within} and be spread over {self.spread}s")


_WIDTH: Final = {Level.NVLINK: 0, Level.HOST: 1, Level.RACK: 2, Level.BLOCK: 3, Level.SITE: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A gang of jobs: ``size`` jobs of the project that name the same group start together or not at all."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.name):
            raise ValueError(f"group name {self.name!r} needs to be letters, digits, - _ or .")
        if not 2 <= self.size <= MAX_WORKERS:
            raise ValueError(f"a group has between 2 and {MAX_WORKERS} jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """Everything that a user says about a workload.

    ``nodes`` is the size of the gang: workers, each of which gets ``resources``; they may share a machine.
    ``array_size`` is the number of jobs of an array, ``replicas`` that of a service. ``workdir`` is the
    SHA-256 of the uploaded folder or empty. ``inputs`` maps a name to an artifact reference
    ``name[:version]``, ``secrets`` lists names of the project's secrets. ``max_duration_ns`` zero: no limit.

    ``nodes_min`` below ``nodes`` makes the gang elastic; zero: as many as ``nodes``. ``any_of`` are other resources
    that would do, in order of preference, or by speed with ``by_speed``. ``expected_duration_ns`` is what the user
    expects, ``start_after_ns`` and ``start_before_ns`` are instants; zero: not said. ``array_parallel`` bounds how
    many jobs of an array run at the same time; zero: no bound. ``reservation`` is the name of one to run in. ``data``
    and ``volumes`` are what each worker finds at paths of its choice. ``slurm`` is what a site with Slurm is told when
    it is submitted there: ``account``, ``qos``; others pay no heed to it.
    """

    kind: Kind
    name: str
    run: str = ""
    setup: str = ""
    nodes: int = 1
    resources: Resources = Resources()
    environment: Environment | None = None
    image: str = ""
    workdir: str = ""
    envs: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()
    ports: tuple[Port, ...] = ()
    service: Service | None = None
    array_size: int = 1
    max_duration_ns: int = 0
    retry: RetryPolicy = RetryPolicy()
    checkpoint_grace_ns: int = 10 * SECOND_NS
    priority: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    nodes_min: int = 0
    any_of: tuple[Alternative, ...] = ()
    by_speed: bool = False
    tier: Tier = Tier.ON_DEMAND
    reservation: str = ""
    placement: Placement = Placement()
    group: Group | None = None
    after: tuple[Dependency, ...] = ()
    expected_duration_ns: int = 0
    start_after_ns: int = 0
    start_before_ns: int = 0
    array_parallel: int = 0
    data: tuple[DataMount, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    slurm: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} needs to be 1 to 63 letters, digits, - _ or ., with a letter or digit at both ends"
            )
        if not 1 <= self.nodes <= MAX_WORKERS:
            raise ValueError(f"nodes lies between 1 and {MAX_WORKERS}")
        if not 0 <= self.nodes_min <= self.nodes:
            raise ValueError("an elastic gang's smallest size lies between 1 and its largest")
        if self.is_elastic and (self.group or self.kind is Kind.SERVICE):
            raise ValueError("a gang in a group, and a service, cannot be elastic")
        if self.start_before_ns and self.start_before_ns <= self.start_after_ns:
            raise ValueError("start_before comes after start_after")
        if (self.tier is Tier.RESERVED) != bool(self.reservation):
            raise ValueError("tier reserved and the name of a reservation go together")
        if self.array_parallel < 0 or self.expected_duration_ns < 0:
            raise ValueError("array.parallel and expected_duration are zero (not said) or more")
        if not 1 <= self.array_size <= MAX_ARRAY:
            raise ValueError(f"an array has between 1 and {MAX_ARRAY} jobs")
        if not PRIORITY_RANGE[0] <= self.priority <= PRIORITY_RANGE[1]:
            raise ValueError(f"priority lies between {PRIORITY_RANGE[0]} and {PRIORITY_RANGE[1]}")
        if not 0 <= self.checkpoint_grace_ns <= DAY_NS:
            raise ValueError("checkpoint.grace lies between 0 and 1 day")
        if self.kind is Kind.SERVICE and self.service is None:
            raise ValueError("a service needs a service section with its port")
        if not self.run.strip() and self.kind is not Kind.DEV:
            raise ValueError(f"a {self.kind} needs run: the command to execute")
        if self.service and self.service.port not in {port.name for port in self.ports}:
            raise ValueError(f"service.port {self.service.port!r} is not among ports")

    @property
    def home(self) -> tuple[SiteId, str]:
        """The site, and the machine there by name, that its volumes and mounted data sets bind it to; empty: none."""
        if not self.volumes and not self.data:
            return SiteId(""), ""
        bound: list[VolumeMount | DataMount] = [*self.volumes]
        bound += [one for one in self.data if one.mode is DataMode.MOUNT]
        site = next((one.site_id for one in bound if one.site_id), SiteId(""))
        return site, next((one.node for one in bound if one.node), "")

    @property
    def is_elastic(self) -> bool:
        """Whether the gang may be smaller than ``nodes``."""
        return 0 < self.nodes_min < self.nodes

    @property
    def smallest(self) -> int:
        """With how many workers the gang is content."""
        return self.nodes_min or self.nodes

    @property
    def choices(self) -> tuple[Resources, ...]:
        """The resources that would do, best first."""
        if not self.any_of:
            return (self.resources,)
        all_of = (Alternative(resources=self.resources), *self.any_of)
        if self.by_speed:
            all_of = tuple(sorted(all_of, key=lambda one: -one.speed_milli))
        return tuple(one.resources for one in all_of)

    @property
    def job_count(self) -> int:
        """How many jobs the workload consists of."""
        if self.kind is Kind.ARRAY:
            return self.array_size
        return self.service.replicas if self.service else 1
