"""Turns written down as they are taken: what was there at first, then each turn's facts, instant and decisions.

Each is a line of JSON; ``tidemill.twin`` reads them back and takes the turns again. A world that was loaded anew in
between begins anew in the recording too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tidemill import __version__
from tidemill.core.lifecycle import is_terminal
from tidemill.model.events import Fact
from tidemill.model.fleet import Site
from tidemill.model.ids import JobId
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Cause, Job
from tidemill.model.ledger import RateCard
from tidemill.model.plan import Plan
from tidemill.model.policy import Policy
from tidemill.model.tenant import Project
from tidemill.ports import Snapshot
from tidemill.store.codec import encode

FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """All that a world is made of; ``now`` is when it was made."""

    now: int
    snapshot: Snapshot
    sites: tuple[Site, ...]
    projects: tuple[Project, ...]
    rates: RateCard
    policy: Policy


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing that a turn decided about a job: ``what`` names it, ``value`` is how. No job: about the books."""

    job_id: JobId
    what: str
    value: str


class Recording:
    """Writes turns down as they are taken. ``write`` is given whole lines.

    The shell that takes turns calls ``begin`` with what it makes its world of (as ``world_from`` is given it), and
    ``turn`` after each turn that was stored; a refused turn never happened and is not written.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._write(_line({"tidemill": __version__, "recording": FORMAT}))

    def begin(
        self,
        snapshot: Snapshot,
        *,
        sites: Iterable[Site],
        projects: Iterable[Project],
        rates: RateCard,
        policy: Policy,
        now: int,
    ) -> None:
        """A world was made of these, for the first time or anew."""
        beginning = Beginning(
            now=now, snapshot=snapshot, sites=tuple(sites), projects=tuple(projects), rates=rates, policy=policy
        )
        self._write(_line({"begin": beginning}))

    def turn(self, inbox: Sequence[Fact], now: int, plan: Plan) -> None:
        """A turn was taken and stored."""
        facts = [(type(fact).__name__, fact) for fact in inbox]
        decided = [(one.job_id, one.what, one.value) for one in decisions(plan)]
        self._write(_line({"now": now, "facts": facts, "decided": decided}))


def decisions(plan: Plan) -> Iterator[Decision]:
    """What a turn decided, as far as people and machines notice it: placements, ends, waits, and what was billed."""
    placed: dict[JobId, list[Allocation]] = {}
    ending = {
        change.after.job_id
        for change in plan.changes
        if isinstance(change.after, Attempt) and change.after.state in (AttemptState.ENDING, AttemptState.ENDED)
    }
    for change in plan.changes:
        after = change.after
        if isinstance(after, Allocation):
            if change.assumed is None:
                placed.setdefault(after.job_id, []).append(after)
            elif after.state is AllocationState.DRAINING and after.job_id not in ending:
                yield Decision(after.job_id, f"attempt {after.fence} gives up worker", str(after.rank))
        elif isinstance(after, Attempt) and after.state is AttemptState.ENDING and after.cause is not Cause.NONE:
            yield Decision(after.job_id, f"attempt {after.number} is ended", after.cause.value)
        elif isinstance(after, Job) and is_terminal(after.state):
            cause = f": {after.cause.value}" if after.cause.value else ""
            yield Decision(after.id, "ends", f"{after.state.value}{cause}")
    for job_id, workers in placed.items():
        places = "; ".join(_place(worker) for worker in workers)
        yield Decision(job_id, f"attempt {workers[0].fence} is placed", places)
    for waiting in plan.waiting:
        yield Decision(waiting.job_id, "waits", waiting.reason.code)
    if plan.ledger:
        sums = plan.ledger.sums().values()
        amount, energy = sum(one.amount_micro for one in sums), sum(one.energy_mj for one in sums)
        yield Decision(JobId(""), "books", f"{amount} micro-USD, {energy} mJ, {len(plan.ledger)} lines")


def _place(worker: Allocation) -> str:
    devices = " ".join(
        f"{share.device_id}" + (f"/{share.milli}" if share.milli != 1000 else "") for share in worker.devices
    )
    return f"{worker.node_id} {devices}".rstrip()


def _line(value: object) -> bytes:
    return encode(value).encode() + b"\n"
