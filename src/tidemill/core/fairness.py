"""② Who is behind with what: dominant shares with a memory, at every level of the tree.

A *party* is a queue, a project or one user of a project. Its share is the largest part that it has of any resource,
counting what it holds now and the average of what it held lately, divided by its weight; the party with the smallest
share among its siblings goes first. Only what the party's next job needs is compared: who holds every H100 does not
wait for an A100 until all others have as much, nor does a colleague in the same department. Where everybody needs the
same kinds of things, that is dominant resource fairness.

Averages follow ``d taken / dt = (held - taken) ln 2 / half_life``, which is linear, so a queue's average is the sum of
its children's without a walk through them, and it is brought up to date only where something changes.

Sources: dominant resource fairness, Ghodsi et al., NSDI 2011; weights and half-life as Slurm's fair tree has them.
Shares of parents are plain sums. The rescaling of hierarchical DRF (Bhattacharya et al., SoCC 2013) is for
infinitesimal tasks: with whole jobs a child that holds nothing would make its parent's share zero, and a department
would get ahead by opening projects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tidemill.core.feasible import model_matches
from tidemill.model.ids import ProjectId, QueueId
from tidemill.model.queue import CPU, GPU, MEMORY, Amounts
from tidemill.units import MILLI

Capacity = Mapping[str, int]
"""What the fleet has of each resource: device models in milli-GPU, ``cpu`` in milli-CPU, ``memory`` in bytes."""

_GONE = 1e-6
"""An average below this, in the resource's unit, counts as nothing."""


@lru_cache(maxsize=4096)
def covers(name: str, resource: str) -> bool:
    """Whether an amount of a resource counts in a resource class.

    A resource is a device model, ``cpu`` or ``memory``; or, of a request that is not placed yet, ``gpu`` for any model
    and ``gpu:NAME`` for any that answers to the name.

    >>> covers("gpu", "H100-SXM"), covers("gpu:H100", "H100-SXM"), covers("gpu:H100", "gpu"), covers("cpu", "A100")
    (True, True, False, False)
    """
    if name == resource:
        return True
    if name in (CPU, MEMORY) or resource in (CPU, MEMORY):
        return False
    if name == GPU:
        return True
    return resource != GPU and model_matches(resource.removeprefix(f"{GPU}:"), name.removeprefix(f"{GPU}:"))


def total_in(name: str, amounts: Mapping[str, int]) -> int:
    """How much of ``amounts`` counts in a resource class."""
    if name in (CPU, MEMORY):
        return amounts.get(name, 0)
    return sum(amount for resource, amount in amounts.items() if covers(name, resource))


class Party:
    """One place in the tree with what it holds (``held``), held on average (``taken``), and how much it may."""

    __slots__ = (
        "_classes_of",
        "_in_class",
        "_is_limited",
        "at_ns",
        "children",
        "guaranteed",
        "held",
        "id",
        "limit",
        "max_queued",
        "max_running",
        "name",
        "parent",
        "project_id",
        "queued",
        "running",
        "taken",
        "version",
        "weight_milli",
    )

    def __init__(self, identity: str, name: str, *, at_ns: int = 0, project_id: ProjectId = ProjectId("")) -> None:
        self.id, self.name, self.project_id = identity, name, project_id
        self.parent: Party | None = None
        self.children: dict[str, Party] = {}
        self.weight_milli = MILLI
        self.guaranteed: dict[str, int] = {}
        self.limit: dict[str, int] = {}
        self.max_running = self.max_queued = 0
        self.running = self.queued = 0
        self.held: dict[str, int] = {}
        self.taken: dict[str, float] = {}
        self.at_ns = at_ns
        self._in_class: dict[str, int] = {}
        self._classes_of: dict[str, tuple[str, ...]] = {}
        self._is_limited: bool | None = None
        self.version = 0
        """Of the stored average of a user; 0 while none is stored."""

    def change(self, amounts: Mapping[str, int], sign: int, *, now: int, half_life_ns: int) -> None:
        """Hold ``amounts`` more (``sign`` 1) or less (-1) from ``now`` on; the reverse at once takes it back.

        With a half-life of zero there is no memory: the average is what is held.
        """
        if half_life_ns and now > self.at_ns:
            self.taken, self.at_ns = self.taken_at(now, half_life_ns), now
        held, taken = self.held, self.taken
        for resource, amount in amounts.items():
            if not amount:
                continue
            if self._in_class:
                self._count(resource, sign * amount)
            after = held.get(resource, 0) + sign * amount
            if after:
                held[resource] = after
                if not half_life_ns:
                    taken[resource] = float(after)
                elif resource not in taken:
                    taken[resource] = 0.0
            else:
                held.pop(resource, None)
                if not half_life_ns or not taken.get(resource):
                    taken.pop(resource, None)

    def in_class(self, name: str) -> int:
        """How much is held of a resource class, which is added up once and then kept up."""
        found = self._in_class.get(name)
        if found is None:
            found = self._in_class[name] = total_in(name, self.held)
            self._classes_of.clear()
        return found

    def taken_at(self, now: int, half_life_ns: int) -> dict[str, float]:
        """The averages at ``now``. Reading them changes nothing, so that who looks does not decide what follows."""
        held, fade = self.held, self.fade(now, half_life_ns)
        found = {}
        for resource, taken in self.taken.items():
            has = held.get(resource, 0)
            after = has + (taken - has) * fade
            if has or after >= _GONE:
                found[resource] = after
        return found

    def fade(self, now: int, half_life_ns: int) -> float:
        """How much of the gap between average and holding, as it was at ``at_ns``, is left at ``now``."""
        return 0.5 ** (max(now - self.at_ns, 0) / half_life_ns) if half_life_ns else 0.0

    def weigh(self, resources: Iterable[str], fade: float) -> float:
        """What is held of some resources and what was held on average, added up."""
        total = 0.0
        for resource in resources:
            taken = self.taken.get(resource)
            if taken is not None:
                has = self.held.get(resource, 0)
                total += has + has + (taken - has) * fade
        return total

    def share(self, capacity: Capacity, *, now: int, half_life_ns: int) -> float:
        """The largest part of anything that it holds and held on average, divided by its weight.

        A fraction: 2 is a party of weight 1 that holds, and has held for long, all there is of something.
        """
        fade = self.fade(now, half_life_ns)
        parts = (self.weigh((name,), fade) / capacity[name] for name in self.taken if capacity.get(name))
        return max(parts, default=0.0) * MILLI / self.weight_milli

    def _count(self, resource: str, amount: int) -> None:
        classes = self._classes_of.get(resource)
        if classes is None:
            classes = tuple(name for name in self._in_class if covers(name, resource))
            self._classes_of[resource] = classes
        for name in classes:
            self._in_class[name] += amount

    @property
    def is_limited(self) -> bool:
        """Whether anything bounds what it may hold; found out once, for limits change only with the whole tree."""
        if self._is_limited is None:
            self._is_limited = any(party.limit or party.max_running for party in self.upwards())
        return self._is_limited

    def upwards(self) -> Iterator[Party]:
        """This party and those above it, the root last."""
        party: Party | None = self
        while party is not None:
            yield party
            party = party.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one of several siblings may have of an amount. ``wants`` None: as much as it can get."""

    guaranteed: int = 0
    weight_milli: int = MILLI
    wants: int | None = None


def could_have(total: int, claims: Sequence[Claim], limits: Sequence[int | None]) -> tuple[int, ...]:
    """How much each would have if it wanted as much as it can get, up to its limit, and the others what they claim.

    First everybody gets what is guaranteed to it and wanted; the rest is shared by weight among those that want
    more, and what one leaves goes to the others. Where the guarantees alone are more than there is, each gets the same
    part of its own. O(n log n) for all together: the level to which the water rises is found among those at which
    somebody has enough.

    >>> could_have(10, [Claim(guaranteed=4, wants=1), Claim(), Claim(weight_milli=2000)], [None, None, 3])
    (5, 3, 3)
    """
    base = [claim.guaranteed if claim.wants is None else min(claim.guaranteed, claim.wants) for claim in claims]
    left = total - sum(base)
    thirst = [_thirst(claim, part) for claim, part in zip(claims, base, strict=True)]
    order = sorted(range(len(claims)), key=thirst.__getitem__)
    levels = [thirst[at] for at in order if thirst[at] != _INFINITE]
    poured, weights = [0.0], [float(sum(claim.weight_milli for claim in claims))]
    for at in order[: len(levels)]:
        poured.append(poured[-1] + thirst[at] * claims[at].weight_milli)
        weights.append(weights[-1] - claims[at].weight_milli)
    found: list[int] = []
    for at, claim in enumerate(claims):
        weight, mine = claim.weight_milli, thirst[at]
        own_left = left + base[at] - claim.guaranteed
        if own_left <= 0:
            asked = sum(base) - base[at] + claim.guaranteed
            found.append(_at_most(claim.guaranteed * total // asked if asked else 0, limits[at]))
            continue
        low, high = 0, len(levels)  # the last level that is reached when this one never has enough
        while low < high:
            middle = (low + high + 1) // 2
            level = levels[middle - 1]
            if poured[middle] + level * weights[middle] + max(level - mine, 0.0) * weight <= own_left:
                low = middle
            else:
                high = middle - 1
        reached = levels[low - 1] if low else 0.0
        is_full = mine <= reached
        open_weight = weights[low] + (weight if is_full else 0)
        rest = own_left - poured[low] + (mine * weight if is_full else 0.0)
        found.append(_at_most(claim.guaranteed + int(rest / open_weight * weight + _ROUNDING), limits[at]))
    return tuple(found)


_INFINITE = float("inf")
_ROUNDING = 1e-6


def _thirst(claim: Claim, base: int) -> float:
    """The level of water, amount for weight, at which a claim has enough."""
    return _INFINITE if claim.wants is None else (claim.wants - base) / claim.weight_milli


def _at_most(amount: int, limit: int | None) -> int:
    return amount if limit is None else min(amount, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueShare:
    """One row of who has what. Amounts are per resource class, in milli-GPU, milli-CPU and bytes.

    ``entitled`` is what the queue could have now: what is guaranteed to it, and its part by weight of what its siblings
    leave. ``borrowed`` is what it holds above its guarantee. ``models`` is what it holds by device model. ``share`` is
    its dominant share of the fleet with its memory, before weight: 1 holds, and has held for long, all there is of some
    resource. ``depth`` is zero right under the fleet.
    """

    id: QueueId
    name: str
    parent: str
    project_id: ProjectId
    depth: int
    weight_milli: int
    guaranteed: Amounts
    limit: Amounts
    held: Amounts
    borrowed: Amounts
    entitled: Amounts
    models: Amounts
    share: float
    running: int
    queued: int
