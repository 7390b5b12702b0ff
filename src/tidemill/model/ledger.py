"""Usage, prices, and the append-only lines from which bills are made. Integers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, overload

from msgspec import Struct

from tidemill.model.ids import AttemptId, JobId, LaunchId, NodeId, ProjectId, TokenId, WorkloadId

CPU_METER = "cpu"
"""The meter of a node's processors; every other meter is a device id."""


class Evidence(StrEnum):
    """How a figure of energy was come by."""

    MEASURED = "measured"
    ESTIMATED = "estimated"


class UsageInterval(Struct, frozen=True, kw_only=True, gc=False):
    """``milli`` thousandths of one meter of one node, held from ``from_ns`` until just before ``to_ns``.

    ``launch_id`` empty means that no worker held them: idle, unless ``others``. For a node and a meter, the intervals
    tile time: the sum of ``milli * (to_ns - from_ns)`` is capacity x time, which is what the books are checked with.
    ``energy_mj`` includes neither cooling nor losses; PUE is applied when the line is rated.
    """

    node_id: NodeId
    meter: str
    resource: str
    """What is priced: a device model of the catalog, or ``cpu``."""
    from_ns: int
    to_ns: int
    milli: int
    energy_mj: int
    evidence: Evidence
    launch_id: LaunchId = LaunchId("")
    attempt_id: AttemptId = AttemptId("")
    job_id: JobId = JobId("")
    project_id: ProjectId = ProjectId("")
    included: bool = False
    """The price is part of another line of the same worker (the CPUs that come with a GPU)."""
    others: bool = False
    """Work held them that is not this cloud's: nobody here pays for it, and it was not idle."""

    @property
    def id(self) -> str:
        """The same for the same stretch of usage, however often it is computed."""
        return f"{self.node_id}/{self.meter}/{self.launch_id or ('others' if self.others else 'idle')}/{self.from_ns}"

    @property
    def is_idle(self) -> bool:
        """Whether nobody held it."""
        return not self.launch_id and not self.others


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The price of a whole unit of a resource for one hour, in micro-USD, and where it is from."""

    resource: str
    micro_per_hour: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCard:
    """Prices by resource; ``id`` changes whenever a price does and is written on every line."""

    id: str
    rates: tuple[Rate, ...]

    def micro_per_hour(self, resource: str) -> int:
        """The price of a unit-hour; zero for a resource without a price."""
        return self.by_resource().get(resource, 0)

    def by_resource(self) -> dict[str, int]:
        """The price of a unit-hour by resource."""
        return {rate.resource: rate.micro_per_hour for rate in reversed(self.rates)}


class LedgerLine(Struct, frozen=True, kw_only=True, gc=False):
    """One priced interval; ``id`` is that of the usage, so a line can be written once only.

    ``energy_mj`` includes the site's PUE.
    """

    id: str
    usage: UsageInterval
    rate_card: str
    amount_micro: int
    energy_mj: int
    carbon_mg: int


class Holder(Struct, frozen=True, gc=False):
    """Which worker holds ``milli`` thousandths of a meter, and for whom."""

    milli: int
    launch_id: LaunchId
    attempt_id: AttemptId
    job_id: JobId
    project_id: ProjectId
    included: bool = False
    """The price is part of another line of the same worker (the CPUs that come with a GPU)."""


class Share(Struct, frozen=True, gc=False):
    """What one holder had of a stretch of a meter, priced. Without a ``holder`` nobody had it, or ``others`` had.

    ``used_mj`` is the meter's energy, ``energy_mj`` that with the site's PUE.
    """

    holder: Holder | None
    milli: int
    others: bool
    used_mj: int
    amount_micro: int
    energy_mj: int
    carbon_mg: int


class Entry(Struct, frozen=True, kw_only=True, gc=False):
    """One stretch of one meter, or of several that counted the same: for each a ledger line of every share.

    The shares are together all of a meter.
    """

    node_id: NodeId
    meters: tuple[str, ...]
    resource: str
    from_ns: int
    to_ns: int
    evidence: Evidence
    rate_card: str
    shares: tuple[Share, ...]

    def lines(self) -> Iterator[LedgerLine]:
        """For each meter the line of each share."""
        for meter in self.meters:
            for share in self.shares:
                yield self._line(meter, share)

    def _line(self, meter: str, share: Share) -> LedgerLine:
        holder = share.holder
        usage = UsageInterval(
            node_id=self.node_id,
            meter=meter,
            resource=self.resource,
            from_ns=self.from_ns,
            to_ns=self.to_ns,
            milli=share.milli,
            energy_mj=share.used_mj,
            evidence=self.evidence,
            launch_id=holder.launch_id if holder else LaunchId(""),
            attempt_id=holder.attempt_id if holder else AttemptId(""),
            job_id=holder.job_id if holder else JobId(""),
            project_id=holder.project_id if holder else ProjectId(""),
            included=holder.included if holder else False,
            others=share.others,
        )
        return LedgerLine(
            id=usage.id,
            usage=usage,
            rate_card=self.rate_card,
            amount_micro=share.amount_micro,
            energy_mj=share.energy_mj,
            carbon_mg=share.carbon_mg,
        )


class Sums(Struct):
    """What some ledger lines add up to."""

    lines: int = 0
    amount_micro: int = 0
    energy_mj: int = 0
    carbon_mg: int = 0


@dataclass(frozen=True, slots=True)
class Ledger(Sequence[LedgerLine]):
    """The lines that a turn adds to the books, each made when it is looked at: who wants sums only has them without."""

    entries: tuple[Entry, ...] = ()

    def __len__(self) -> int:
        return sum(len(entry.meters) * len(entry.shares) for entry in self.entries)

    def __iter__(self) -> Iterator[LedgerLine]:
        for entry in self.entries:
            yield from entry.lines()

    @overload
    def __getitem__(self, index: int) -> LedgerLine: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LedgerLine, ...]: ...
    def __getitem__(self, index: int | slice) -> LedgerLine | tuple[LedgerLine, ...]:
        return tuple(self)[index]

    def sums(self) -> dict[ProjectId, Sums]:
        """What the lines of each project add up to; what none of ours held is under the empty id."""
        found: dict[ProjectId, Sums] = {}
        for entry in self.entries:
            lines = len(entry.meters)
            for share in entry.shares:
                project = share.holder.project_id if share.holder else ProjectId("")
                sums = found.get(project)
                if sums is None:
                    sums = found[project] = Sums()
                sums.lines += lines
                sums.amount_micro += lines * share.amount_micro
                sums.energy_mj += lines * share.energy_mj
                sums.carbon_mg += lines * share.carbon_mg
        return found


class TokenUsage(Struct, frozen=True, kw_only=True, gc=False):
    """What one request to a model took; ``id`` is the gateway's, so that it is in the books once however often told.

    ``project_id`` is who asked, ``token_id`` with which key, ``job_id`` the replica that answered. ``is_estimated``:
    the answer did not come to its end or told of no tokens, and its tokens are those that were counted as they passed.
    ``user`` and ``label`` are what the request said. ``amount_pico`` is the price, in millionths of a micro-USD, and so
    exact: tokens are priced in micro-USD for a million of them.
    """

    id: str
    at_ns: int
    project_id: ProjectId
    token_id: TokenId
    model: str
    workload_id: WorkloadId
    job_id: JobId
    prompt_tokens: int
    completion_tokens: int
    is_estimated: bool
    user: str = ""
    label: str = ""
    amount_pico: int = 0


class TokenPrice(Struct, frozen=True, kw_only=True, gc=False):
    """What a model's tokens cost: micro-USD for a million of them, in and out."""

    input_micro: int = 0
    output_micro: int = 0

    def of(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The price of a request, in millionths of a micro-USD.

        >>> TokenPrice(input_micro=150_000, output_micro=600_000).of(1_000, 2)
        151200000
        """
        return self.input_micro * prompt_tokens + self.output_micro * completion_tokens


TOKEN_GROUPS: Final = ("model", "key", "user", "label")
"""What sums over requests can be grouped by."""


class TokenTotals(Struct, frozen=True, kw_only=True, gc=False):
    """Sums over requests; ``estimated`` counts requests. What they are not grouped by is empty."""

    model: str
    token_id: TokenId
    user: str
    label: str
    requests: int
    estimated: int
    prompt_tokens: int
    completion_tokens: int
    amount_pico: int


class ServedTotals(Struct, frozen=True, kw_only=True, gc=False):
    """Sums over the requests that the replicas of one workload answered for one model."""

    workload_id: WorkloadId
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerTotals:
    """Sums over ledger lines. ``held_milli_ns`` maps a resource to milli-units x ns."""

    held_milli_ns: tuple[tuple[str, int], ...]
    amount_micro: int
    energy_mj: int
    carbon_mg: int
    evidence: Evidence
    lines: int
