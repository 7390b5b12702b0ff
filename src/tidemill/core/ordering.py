"""② In which order jobs should hold GPUs, and when a waiting job may displace a running one: policies as plug-ins.

A policy sees facts about one job and gives it a rank, a positive number; the smallest goes first. What the turn does
with ranks is the same for every policy. Waiting jobs are tried in the order of their ranks; who does not fit is skipped
(greedy backfill). Where a policy ``preempts``, a waiting job that does not fit may displace running jobs that rank
after it by the policy's ``margin`` (``rank of the running > margin x rank of the waiting``) when it provably fits
afterwards; of all sets of such jobs the turn takes the one of least worth, ``sum of GPUs / rank``. The margin is what
keeps two jobs from taking turns for ever. Displaced jobs keep their work (a checkpoint) and wait with their rank.

Two kinds of time bound how often running jobs are compared with waiting ones: not again within ``quantum_ns``, and,
where ranks of running jobs worsen by themselves while they run, every ``drift_ns`` even if nothing else happened.

Sources: shortest remaining service first (SRSF) and least attained service as in Gu et al., Tiresias, NSDI'19; the
Gittins index for unknown durations as in Aalto, Ayesta, Righter, Queueing Systems 63 (2009); survival with jobs that
have not ended yet as in Kaplan and Meier (1958).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tidemill.units import MINUTE_NS, SECOND_NS

_LEAST_GPU_MILLI = 100
"""What a job without GPUs counts as, so that its service is not nothing."""
_SLOWER_PER_BUCKET = math.log(1e9) / 128
_BUCKETS = 128
_EDGES_S: NDArray[np.float64] = np.exp(_SLOWER_PER_BUCKET * np.arange(_BUCKETS + 1))
_EDGES_S[0] = 0.0
_WIDTHS_S: NDArray[np.float64] = np.diff(_EDGES_S)
_POOL = 8
"""The row of all jobs together, after the rows of jobs with 1, 2-3, 4-7, … GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What a policy may know about one job.

    ``kin`` names jobs that tend to last alike: one submitter's jobs of one shape. ``gpu_milli`` is of all workers
    together. ``attained_ns`` is the time run so far in all attempts. ``since_ns`` is when it began to run or to wait.
    ``expected_ns`` is how long it runs in all, None when nobody said. ``weight`` is its tenant's.
    """

    id: str
    kin: str
    tenant: str
    submitted_ns: int
    gpu_milli: int
    attained_ns: int
    running: bool
    since_ns: int
    expected_ns: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.attained_ns < 0 or self.gpu_milli < 0:
            raise ValueError("a job cannot have run, or hold, less than nothing")
        if self.weight <= 0:
            raise ValueError("a weight is above zero")

    @property
    def gpus(self) -> float:
        """GPUs, at least a tenth of one."""
        return max(self.gpu_milli, _LEAST_GPU_MILLI) / 1000

    @property
    def service_s(self) -> float:
        """GPU-seconds used so far."""
        return self.attained_ns / SECOND_NS * self.gpus

    @property
    def remaining_ns(self) -> int | None:
        """Time still to run, never below a second; None when nobody said how long it takes."""
        return None if self.expected_ns is None else max(self.expected_ns - self.attained_ns, SECOND_NS)


class OrderPolicy(Protocol):
    """How jobs are ranked. ``margin`` is at least one. Policies have no clock and no dice."""

    @property
    def name(self) -> str: ...
    @property
    def knows_durations(self) -> bool:
        """Whether it reads ``expected_ns``."""
        ...

    @property
    def preempts(self) -> bool: ...
    @property
    def quantum_ns(self) -> int: ...
    @property
    def drift_ns(self) -> int:
        """Zero where ranks of running jobs only improve while they run."""
        ...

    @property
    def margin(self) -> float: ...

    def rank(self, facts: JobFacts, *, now: int) -> float:
        """A positive, finite number; smaller goes first. Ties are broken by submission, then id."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A policy that learns from jobs seen: its memory is a fold over these calls and over nothing else."""

    def note(self, facts: JobFacts, *, finished: bool = False) -> None:
        """Tell it of a job: when submitted, while it runs (before ranks are compared), displaced, and ended."""
        ...


@runtime_checkable
class Forgets(Protocol):
    """A policy that remembers jobs and is told which are gone without having run to their own end."""

    def forget(self, job_id: str) -> None:
        """The job failed or was cancelled, whether it ran or not; harmless when it is not known."""
        ...


def may_displace(policy: OrderPolicy, *, waiting: float, running: float) -> bool:
    """Whether a job of rank ``waiting`` may take the place of one of rank ``running``.

    >>> may_displace(LeastAttained(margin=8), waiting=1.0, running=8.0)
    False
    >>> may_displace(LeastAttained(margin=8), waiting=1.0, running=8.1)
    True
    """
    return policy.preempts and running > policy.margin * waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Fifo:
    """First come, first served; never preempts."""

    name: str = "fifo"
    knows_durations: bool = False
    preempts: bool = False
    quantum_ns: int = 0
    drift_ns: int = 0
    margin: float = 1.0

    def rank(self, facts: JobFacts, *, now: int) -> float:  # noqa: ARG002
        """Seconds since the epoch at which the job was submitted, counted from one."""
        return 1.0 + max(facts.submitted_ns, 0) / SECOND_NS


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastAttained:
    """Who has had least service goes first: ``(attained + 1 s) x GPUs^gpu_exponent``. Knows no durations.

    With an exponent of one this is least attained service in GPU-seconds. Above one, wide jobs give way earlier:
    they block more than they hold.
    """

    gpu_exponent: float = 2.0
    margin: float = 8.0
    name: str = "least-attained"
    knows_durations: bool = False
    preempts: bool = True
    quantum_ns: int = 10 * SECOND_NS
    drift_ns: int = 30 * MINUTE_NS

    def rank(self, facts: JobFacts, *, now: int) -> float:  # noqa: ARG002
        """Seconds run, weighted by width."""
        return float((1.0 + facts.attained_ns / SECOND_NS) * facts.gpus**self.gpu_exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortestRemaining:
    """Who needs least to be done goes first: ``remaining x GPUs^gpu_exponent``.

    An exponent of zero is shortest remaining time, one is shortest remaining service. Slightly below one is better
    than either on machines of whole nodes: a narrow long job keeps a whole node from wide ones. A job that nobody gave
    a duration is taken to need as long again as it has run, and at least ``unknown_ns``.
    """

    gpu_exponent: float = 0.85
    margin: float = 1.0
    unknown_ns: int = 60 * MINUTE_NS
    name: str = "shortest-remaining"
    knows_durations: bool = True
    preempts: bool = True
    quantum_ns: int = 0
    drift_ns: int = 0

    def rank(self, facts: JobFacts, *, now: int) -> float:  # noqa: ARG002
        """Seconds left, weighted by width."""
        left_ns = facts.remaining_ns
        if left_ns is None:
            left_ns = max(facts.attained_ns, self.unknown_ns)
        return float(left_ns / SECOND_NS * facts.gpus**self.gpu_exponent)


@dataclass(slots=True, kw_only=True)
class _Kin:
    """Jobs that tend to last alike, in the order in which they came. ``start`` counts those forgotten in front."""

    start: int = 0
    ids: list[str] = field(default_factory=list)
    submitted_s: list[float] = field(default_factory=list)
    service_s: list[float] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    gone: list[bool] = field(default_factory=list)
    """Failed or cancelled: that much service was not enough, and there will be no more."""

    def forget(self, keep: int) -> None:
        """Drop jobs in front that are over, beyond ``keep`` in all."""
        gone = 0
        while len(self.ids) - gone > keep and (self.ended[gone] or self.gone[gone]):
            gone += 1
        for column in (self.ids, self.submitted_s, self.service_s, self.ended, self.gone):
            del column[:gone]
        self.start += gone


@dataclass(slots=True, kw_only=True)
class KinGittins:
    """For unknown durations: the Gittins index, learned from what like jobs took, where near relatives count most.

    People submit in bursts, and jobs of a burst last alike. So the chance that a job ends in the next stretch of
    service is estimated (Kaplan-Meier over 128 logarithmic buckets of GPU-seconds, 1 s to 1e9 s) from three sources,
    each shrunk to the next: its kin, weighted ``exp(-places apart / reach) x (0.3 + exp(-seconds apart / burst))``;
    all jobs of its size class; all jobs. Relatives that still run count as "not ended up to here".

    ``rank = min over stretches of (expected GPU-seconds spent / chance to end in it) x GPUs^wide / (1 + curiosity)``

    ``curiosity = 2 x weight of waiting relatives behind this job / (1 + weight of ended relatives)``: running one of
    a burst to its end tells how long the others take. For its first ``first_ns`` of running a job's rank is at most
    the GPU-seconds that it had (plus a minute), so a short job never waits behind a wrong guess.
    """

    reach: float = 6.0
    burst_s: float = 600.0
    far: float = 0.3
    trust: float = 0.1
    """How many ended relatives weigh as much as what is known of the size class."""
    class_trust: float = 10.0
    curiosity: float = 2.0
    wide: float = 0.2
    first_ns: int = 30 * MINUTE_NS
    relearn: int = 10
    """Jobs that end before the size classes are estimated anew (one in a hundred of all ended, if that is more)."""
    keep: int = 1024
    margin: float = 6.0
    name: str = "kin-gittins"
    knows_durations: bool = False
    preempts: bool = True
    quantum_ns: int = 10 * SECOND_NS
    drift_ns: int = 30 * MINUTE_NS
    _kin: dict[str, _Kin] = field(default_factory=dict)
    _where: dict[str, tuple[str, int]] = field(default_factory=dict)
    _live: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Size class and GPU-seconds of jobs that have not ended."""
    _ended: NDArray[np.float64] = field(default_factory=lambda: np.zeros((_POOL + 1, _BUCKETS)))
    _hazard: NDArray[np.float64] | None = None
    _ended_count: int = 0
    _learned_at: int = 0
    _known: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Bucket and rank of jobs, until something changes them."""

    def note(self, facts: JobFacts, *, finished: bool = False) -> None:
        """Take in where a job is; ``finished`` when it ran to its own end. Unknown jobs are new."""
        service_s = facts.service_s
        if facts.id not in self._where:
            if finished:
                return
            kin = self._kin.setdefault(facts.kin, _Kin())
            self._where[facts.id] = (facts.kin, kin.start + len(kin.ids))
            kin.ids.append(facts.id)
            kin.submitted_s.append(facts.submitted_ns / SECOND_NS)
            kin.service_s.append(service_s)
            kin.ended.append(False)
            kin.gone.append(False)
        name, place = self._where[facts.id]
        kin = self._kin[name]
        at = place - kin.start
        kin.service_s[at] = service_s
        self._live[facts.id] = (_size_class(facts.gpus), service_s)
        if finished:
            self._end(facts, kin, at)

    def forget(self, job_id: str) -> None:
        """The job will not end by itself any more; what it had says only that it was not enough."""
        where = self._where.pop(job_id, None)
        if where is None:
            return
        self._live.pop(job_id, None)
        self._known.pop(job_id, None)
        kin = self._kin[where[0]]
        kin.gone[where[1] - kin.start] = True
        if len(kin.ids) > 2 * self.keep:
            kin.forget(self.keep)

    def rank(self, facts: JobFacts, *, now: int) -> float:  # noqa: ARG002
        """Expected GPU-seconds per job ended, at the best moment to look again."""
        service_s = facts.service_s
        bucket = _bucket(service_s)
        known = self._known.get(facts.id)
        if known is None or known[0] != bucket:
            known = (bucket, self._index(facts, bucket))
            self._known[facts.id] = known
        if facts.attained_ns < self.first_ns:
            return min(known[1], service_s + 60.0)
        return known[1]

    def _end(self, facts: JobFacts, kin: _Kin, at: int) -> None:
        kin.ended[at] = True
        size, service_s = self._live.pop(facts.id)
        del self._where[facts.id]
        self._known.pop(facts.id, None)
        self._ended[[size, _POOL], _bucket(service_s)] += 1
        self._ended_count += 1
        for relative in kin.ids[max(0, at - self._span) : at + self._span + 1]:
            self._known.pop(relative, None)
        if len(kin.ids) > 2 * self.keep:
            kin.forget(self.keep)
        if self._ended_count >= self._learned_at + max(self.relearn, self._ended_count // 100):
            self._hazard = None

    @property
    def _span(self) -> int:
        return int(4 * self.reach) + 1

    def _hazards(self) -> NDArray[np.float64]:
        """Chance to end in each bucket, having reached it, by size class. Shape (9, 128)."""
        if self._hazard is None:
            self._learned_at = self._ended_count
            self._known.clear()
            live = np.zeros_like(self._ended)
            for size, service_s in self._live.values():
                live[[size, _POOL], _bucket(service_s)] += 1
            at_risk = _from_here_on(self._ended + live) - live / 2
            pool = (self._ended[_POOL] + 2.0 * 0.02) / (at_risk[_POOL] + 2.0)
            self._hazard = (self._ended + self.class_trust * pool) / (at_risk + self.class_trust)
            self._hazard[_POOL] = pool
        return self._hazard

    def _index(self, facts: JobFacts, bucket: int) -> float:
        hazard = self._hazards()[_size_class(facts.gpus)][bucket:]
        ended: NDArray[np.float64] = np.zeros(_BUCKETS)
        live = ended
        behind = over = 0.0
        where = self._where.get(facts.id)
        if where is not None:
            kin = self._kin[where[0]]
            at = where[1] - kin.start
            low, high = max(0, at - self._span), min(len(kin.ids), at + self._span + 1)
            apart = np.abs(np.arange(low, high) - at)
            since = np.abs(np.array(kin.submitted_s[low:high]) - kin.submitted_s[at])
            weight = np.exp(-apart / self.reach) * (self.far + np.exp(-since / self.burst_s))
            weight[(weight < 0.01) | (apart == 0)] = 0.0
            has_ended = np.array(kin.ended[low:high])
            buckets = np.log(np.maximum(np.array(kin.service_s[low:high]), 1.0)) / _SLOWER_PER_BUCKET
            buckets = np.minimum(buckets.astype(np.int64), _BUCKETS - 1)
            ended = np.asarray(np.bincount(buckets, weight * has_ended, _BUCKETS), dtype=np.float64)
            live = np.asarray(np.bincount(buckets, weight * ~has_ended, _BUCKETS), dtype=np.float64)
            later = np.arange(low, high) > at
            waits = ~has_ended & ~np.array(kin.gone[low:high])
            behind = float(weight[waits & ((buckets < bucket) | ((buckets == bucket) & later))].sum())
            over = float(weight[has_ended].sum())
        at_risk = _from_here_on(ended + live) - live / 2
        hazard = (ended[bucket:] + self.trust * hazard) / (at_risk[bucket:] + self.trust)
        reach = np.concatenate(([1.0], np.cumprod(1.0 - hazard)))
        spent = np.cumsum(reach[:-1] * _WIDTHS_S[bucket:] * (1.0 - hazard / 2))
        best = float(((1.0 - reach[1:]) / spent).max())
        eager = 1.0 + self.curiosity * behind / (1.0 + over)
        return float(facts.gpus**self.wide / max(best, 1e-12) / eager)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """Another policy whose ranks are divided by the tenant's weight: twice the weight, half the rank."""

    inner: OrderPolicy

    @property
    def name(self) -> str:
        return f"weighted {self.inner.name}"

    @property
    def knows_durations(self) -> bool:
        return self.inner.knows_durations

    @property
    def preempts(self) -> bool:
        return self.inner.preempts

    @property
    def quantum_ns(self) -> int:
        return self.inner.quantum_ns

    @property
    def drift_ns(self) -> int:
        return self.inner.drift_ns

    @property
    def margin(self) -> float:
        return self.inner.margin

    def note(self, facts: JobFacts, *, finished: bool = False) -> None:
        """Pass on what the other policy may learn from."""
        if isinstance(self.inner, Learns):
            self.inner.note(facts, finished=finished)

    def forget(self, job_id: str) -> None:
        """Pass on what the other policy need not remember."""
        if isinstance(self.inner, Forgets):
            self.inner.forget(job_id)

    def rank(self, facts: JobFacts, *, now: int) -> float:
        """The other policy's rank by weight."""
        return self.inner.rank(facts, now=now) / facts.weight


def advanced(facts: JobFacts, *, now: int) -> JobFacts:
    """The facts of a running job brought up to ``now``: what it ran since ``since_ns`` is added."""
    if not facts.running or now <= facts.since_ns:
        return facts
    return replace(facts, attained_ns=facts.attained_ns + now - facts.since_ns, since_ns=now)


def _bucket(service_s: float) -> int:
    return 0 if service_s <= 1.0 else min(int(math.log(service_s) / _SLOWER_PER_BUCKET), _BUCKETS - 1)


def _size_class(gpus: float) -> int:
    return min(max(int(math.log2(gpus)), 0), _POOL - 1)


def _from_here_on(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many reach each bucket. Shape as given, summed along the last axis from the end."""
    return np.flip(np.cumsum(np.flip(counts, -1), -1), -1)
