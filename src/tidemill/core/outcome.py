"""What a turn has decided so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from tidemill.core.meter import Stretch, cut_together, others_on
from tidemill.core.rating import rate_all
from tidemill.core.world import World
from tidemill.model.events import LogEntry
from tidemill.model.ids import JobId, NodeId
from tidemill.model.job import Job
from tidemill.model.ledger import Entry
from tidemill.model.plan import Command, Reason, Waiting
from tidemill.model.policy import Policy


@dataclass(slots=True)
class Outcome:
    """Collects the parts of a plan. ``fresh`` are the jobs that began to wait in this turn."""

    now: int
    policy: Policy
    log: list[LogEntry] = field(default_factory=list)
    usage: list[Stretch] = field(default_factory=list)
    ledger: list[Entry] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    fresh: list[JobId] = field(default_factory=list)

    def note(self, event: str, job: Job | None = None, **body: str | int | bool | None) -> None:
        """Add a line to the event log."""
        if job is None:
            self.log.append(LogEntry(at_ns=self.now, type=event, body=tuple(body.items())))
            return
        self.log.append(
            LogEntry(
                at_ns=self.now,
                type=event,
                project_id=job.project_id,
                workload_id=job.workload_id,
                job_id=job.id,
                body=tuple(body.items()),
            )
        )

    def cut(self, world: World, node_id: NodeId, meters: Iterable[str]) -> None:
        """Close the open stretches of some meters of a node, because what they count is about to change."""
        known = world.meters
        found = [meter for name in meters if (meter := known.get((node_id, name))) is not None]
        if stretches := cut_together(found, self.now):
            world.on_undo(partial(_join, stretches))
            self.usage += stretches

    def count_others(self, world: World, node_id: NodeId) -> None:
        """Note on a node's meters what others hold there now, because that or what is ours has changed."""
        node = world.nodes.get(node_id)
        for meter, milli in others_on(node, world.meters) if node is not None else ():
            self.cut(world, node_id, [meter.name])
            world.watch_meters([meter])
            meter.others_milli = milli

    def wait(self, world: World, job_id: JobId, reason: Reason) -> None:
        """A job waits for this reason; stored when the reason is another one than before."""
        before = world.reasons.get(job_id)
        if before is None or before.code != reason.code:
            world.set(world.reasons, job_id, reason)
            self.waiting.append(Waiting(job_id=job_id, reason=reason))


def rate_so_far(world: World, out: Outcome) -> None:
    """Price the usage of this turn so far, by what each node's site charges now."""
    if out.usage:
        nodes, sites = world.nodes, world.sites
        out.ledger += rate_all(out.usage, world.card_and_prices, lambda node_id: sites[nodes[node_id].site_id])
        out.usage.clear()


def _join(stretches: list[Stretch]) -> None:
    for stretch in reversed(stretches):
        stretch.join()
