"""What has to be true whatever happens: the machines' journal, the disk and what users were told, held against each other.

I1  at most one attempt of a job runs at any instant, and nothing is started twice
I2  never is more of a device or a machine held than there is of it, by the journal
I3  what a user was told is done stays done, and the same request always gets the same answer
I4  nothing runs for long that nobody owns
I5  what is healthy is not ended by a fault of ours
I6  what was held is paid for, all of it, once; used and idle add up to what was there
I7  the event log has no gap, and tells of each job a story that can be true
I8  once nothing goes wrong any more, everything comes to its end in time

I1 and I2 are looked at after each step; the others when all is over, or in the time until then.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from tests.faults.simulation.machines import START, Line, capacity_of
from tidemill.core.lifecycle import is_terminal
from tidemill.model.fleet import Node
from tidemill.model.ids import JobId, LaunchId, WorkloadId
from tidemill.model.job import Allocation, AllocationState, Cause, JobState
from tidemill.model.ledger import CPU_METER
from tidemill.ports import JobFilter, JobRow
from tidemill.units import MILLI, SECOND_NS

if TYPE_CHECKING:
    from tests.faults.simulation.cloud import Order, SmallCloud

EXPECTED: Final = {
    "ok": (JobState.SUCCEEDED, Cause.COMPLETED),
    "flaky": (JobState.SUCCEEDED, Cause.COMPLETED),
    "error": (JobState.FAILED, Cause.ERROR),
    "oom": (JobState.FAILED, Cause.OUT_OF_MEMORY),
    "refused": (JobState.FAILED, Cause.LAUNCH_FAILED),
    "endless": (JobState.FAILED, Cause.TIMED_OUT),
}
"""How a job of each fate ends, whatever goes wrong around it, unless it is stopped."""
UNOWNED_NS: Final = 30 * SECOND_NS
_HURT: Final = frozenset({"its runner was killed", "its machine lost power", "no answer for the length of the lease"})
"""Ends of workers, by the journal, for which an attempt may end as lost; and those whose lease ran out."""
_ONE_END: Final = frozenset({"Succeeded", "Failed", "Cancelled"})


class Broken(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, what: str) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {what}")


class Auditor:
    """Looks at one cloud."""

    def __init__(self, cloud: SmallCloud) -> None:
        self._cloud = cloud
        self._read = 0
        self._held: Counter[tuple[str, str]] = Counter()
        self._attempts: dict[str, Counter[str]] = {}
        self._starts_before: Counter[LaunchId] = Counter()
        self._unowned: dict[LaunchId, int] = {}
        self._strangers: set[LaunchId] = set()
        self._restored_ns = 0
        self._capacity = {one.node.id: capacity_of(one.node) for one in cloud.machines.values()}
        self.faults_end_ns = 0

    # -- after each step ------------------------------------------------------------------------------------------

    def audit_machines(self) -> None:
        """I1 and I2, for what was written into the journal since they were last looked at."""
        for machine in self._cloud.machines.values():
            machine.advance()
        lines = self._cloud.journal.lines
        for line in sorted(lines[self._read :], key=lambda line: (line.at_ns, line.what == "start")):
            run, attempt, _ = line.launch_id.rsplit("-", 2)
            sign = 1 if line.what == "start" else -1
            running = self._attempts.setdefault(run, Counter())
            running[attempt] += sign
            if sign > 0:
                self._check_start(line.launch_id, run, running)
                if self._restored_ns and self._cloud.disk.look.allocation(line.launch_id) is None:
                    self._strangers.add(line.launch_id)
            for what, amount in self._amounts(line) if line.launch_id not in self._strangers else ():
                held = self._held[line.node_id, what] = self._held[line.node_id, what] + sign * amount
                capacity = self._capacity[line.node_id].get(what, 0)
                if held > capacity:
                    raise Broken("I2", f"{line.launch_id}: {held} of {capacity} {what} of {line.node_id} are held")
        self._read = len(lines)

    def _check_start(self, launch: LaunchId, run: str, running: Counter[str]) -> None:
        if self._cloud.journal.starts[launch] - self._starts_before[launch] > 1:
            raise Broken("I1", f"{launch} was started more than once")
        if len(both := sorted(attempt for attempt, count in running.items() if count > 0)) > 1:
            raise Broken("I1", f"attempts {' and '.join(both)} of {run} run at the same time")

    @staticmethod
    def _amounts(line: Any) -> list[tuple[str, int]]:
        devices = [(name.partition("/")[0], milli) for name, milli in line.devices]
        return [("cpu", line.cpu_milli), ("memory", line.memory_bytes), *devices]

    def restored(self) -> None:
        """An older state counts from now on: what it knows may be started anew."""
        self.audit_machines()
        for launch, line in self._cloud.journal.live.items():  # what strangers hold is not counted
            held = self._cloud.disk.look.allocation(launch)
            if launch not in self._strangers and (held is None or held.state is AllocationState.RELEASED):
                self._strangers.add(launch)
                for what, amount in self._amounts(line):
                    self._held[line.node_id, what] -= amount
        self._starts_before = self._cloud.journal.starts.copy()
        self._restored_ns = self._cloud.now

    # -- what users are told ------------------------------------------------------------------------------------------

    def promised(self, verb: str, thing: str) -> None:
        """I3: a user was told that it is done: from now on it has to be so."""
        cloud = self._cloud
        if verb == "submit":
            if cloud.disk.look.workload(WorkloadId(thing)) is None:
                raise Broken("I3", f"{thing} was acknowledged and is not stored")
            cloud.submitted.add(WorkloadId(thing))
            return
        row = cloud.disk.look.job(JobId(thing))
        if row is None or not (is_terminal(row.job.state) or row.job.state is JobState.STOPPING):
            raise Broken("I3", f"the stop of {thing} was acknowledged and is not stored")
        if row.job.state in (JobState.STOPPING, JobState.CANCELLED):
            cloud.stopped.add(JobId(thing))

    def acknowledged(self, order: Order, ids: tuple[WorkloadId, ...]) -> None:
        """I3: a user got an answer to a request with a key."""
        for one in ids:
            self.promised("submit", one)
        order.got.add(ids)
        if len(order.got) > 1:
            raise Broken("I3", f"{order.key} was answered with {sorted(order.got)}")

    # -- until all is over ----------------------------------------------------------------------------------------------

    def audit_orphans(self) -> None:
        """I4: what runs belongs to an allocation that is not released, or is about to end."""
        cloud = self._cloud
        for launch in cloud.journal.live:
            held = cloud.disk.look.allocation(launch)
            if held is not None and held.state is not AllocationState.RELEASED:
                self._unowned.pop(launch, None)
            elif cloud.now - self._unowned.setdefault(launch, cloud.now) > UNOWNED_NS:
                whose = "released" if held is not None else "unknown"
                raise Broken("I4", f"{launch} runs and is {whose}, for more than {UNOWNED_NS // SECOND_NS} s")

    def stuck(self) -> None:
        """I8: there was time enough. Raises."""
        cloud = self._cloud
        found = cloud.disk.look.load()
        jobs = [f"{job.id} {job.state} {job.cause} {job.detail}" for job in found.jobs]
        held = [f"{one.id} {one.state} on {one.node_id}" for one in found.allocations]
        nodes = [f"{one.id} {one.state} {one.state_cause}" for one in found.nodes if one.state.value != "ready"]
        kept = [
            f"{folder.launch_id} {folder.runner.phase if folder.runner else 'stopped'}"
            for machine in cloud.machines.values()
            for folder in machine.folders.values()
        ]
        asked = [one.what for one in cloud.asked] + [order.key for order in cloud.orders if order.futures]
        after_s = (cloud.now - self.faults_end_ns) // SECOND_NS
        raise Broken(
            "I8",
            f"not over {after_s} s after the last fault: jobs {jobs}; allocations {held}; nodes {nodes}; "
            f"on machines {kept}; unanswered {asked}; to tell {cloud.told}",
        )

    # -- when all is over -----------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Every promise about jobs, books and the log."""
        cloud = self._cloud
        self.audit_machines()
        rows = cloud.disk.look.find_jobs(JobFilter(), limit=1_000).items
        lost = cloud.submitted - {row.workload.id for row in rows}
        if lost:
            raise Broken("I3", f"acknowledged and gone: {sorted(lost)}")
        for order in cloud.orders:
            self._audit_order(order)
        held = []
        for row in rows:
            self._audit_end(row)
            held += cloud.disk.look.allocations(row.job.id)
            if row.job.submitted_ns > self._restored_ns + cloud.wall_ns or not self._restored_ns:
                self._audit_causes(row)
        if left := [one.id for one in held if one.state is not AllocationState.RELEASED]:
            raise Broken("I8", f"all is over and these are held: {left}")
        if cloud.journal.live:
            raise Broken("I4", f"all is over and these run: {sorted(cloud.journal.live)}")
        self.audit_books(held)
        self._audit_log(rows)
        if cloud.plane.world.jobs or cloud.plane.world.allocations:
            raise Broken("I8", "the control plane knows of jobs that the disk says are over")

    def _audit_order(self, order: Order) -> None:
        record = self._cloud.disk.look.idempotent(_user(self._cloud), order.key)
        if order.got and record is None:
            raise Broken("I3", f"{order.key} was acknowledged and its answer is not stored")
        if not order.got and not order.is_given_up:
            raise Broken("I8", f"{order.key} was never answered")

    def _audit_end(self, row: JobRow) -> None:
        """I3 and I5: a job ends as its user was told, and as its work ends when it is left alone."""
        job, fate = row.job, row.workload.spec.run.split()[0]
        wanted = {EXPECTED[fate]}
        if job.stop_requested or job.cause is Cause.CANCELLED:
            wanted.add((JobState.CANCELLED, Cause.CANCELLED))
        if job.id in self._cloud.stopped:
            wanted = {(JobState.CANCELLED, Cause.CANCELLED)}
        if (job.state, job.cause) not in wanted:
            which = "I3" if job.id in self._cloud.stopped else "I5"
            told = sorted(f"{state} {cause}" for state, cause in wanted)
            raise Broken(which, f"{job.id} is to be {told} and is {job.state} {job.cause}: {job.detail}")
        if job.cause is Cause.ERROR and job.exit_code != 3:
            raise Broken("I5", f"{job.id} exited with 3 and not {job.exit_code}")

    def _audit_causes(self, row: JobRow) -> None:
        """I5: where an attempt ended as lost, a machine or a worker was; where it timed out, its time was over."""
        lines = self._cloud.journal.lines
        for attempt in self._cloud.disk.look.attempts(row.job.id):
            mine = [line for line in lines if line.launch_id.startswith(attempt.id.replace("att_", "run_") + "-")]
            if attempt.cause is Cause.NODE_LOST and not self._was_hurt(mine, row, attempt.id):
                raise Broken("I5", f"{attempt.id} ended as lost, and nothing happened to it: {attempt.detail}")
            early = self._cloud.has_leapt
            if attempt.cause is Cause.TIMED_OUT and not early and not any(line.why in _HURT for line in mine):
                began = min(line.at_ns for line in mine if line.what == "start")
                ended = max(line.at_ns for line in mine if line.what == "stop")
                if ended - began < row.workload.spec.max_duration_ns - 5 * SECOND_NS:
                    raise Broken("I5", f"{attempt.id} timed out after {(ended - began) // SECOND_NS} s")

    def _was_hurt(self, lines: list[Line], row: JobRow, attempt: str) -> bool:
        """Whether a worker of an attempt was killed or let its lease pass, or a machine of it was away."""
        if any(line.why in _HURT or "lease" in line.why for line in lines):
            return True
        held = self._cloud.disk.look.allocations(row.job.id)
        return any(one.node_id in self._cloud.hurt for one in held if one.attempt_id == attempt)

    def _audit_log(self, rows: tuple[JobRow, ...]) -> None:
        """I7: no gap, and of each job one beginning and one end, with nothing after it."""
        events = self._cloud.disk.look.events(limit=100_000)
        if [event.seq for event in events] != list(range(1, len(events) + 1)):
            raise Broken("I7", "the event log has a gap")
        over: set[str] = set()
        for event in events:
            job, kind = event.entry.job_id, event.entry.type
            if job and job in over:
                raise Broken("I7", f"{kind} of {job} is told after its end")
            if kind in _ONE_END:
                over.add(job)
        if missing := {row.job.id for row in rows} - over:
            raise Broken("I7", f"the log does not tell how these ended: {sorted(missing)}")

    def audit_books(self, held: list[Allocation]) -> None:
        """I6: usage + idle = capacity at each instant that a machine was there, and who held pays for all of it."""
        cloud = self._cloud
        lines = cloud.disk.look.ledger(limit=100_000).items
        paid: dict[tuple[str, str], int] = {}
        edges: dict[tuple[str, str], dict[int, int]] = {}
        for line in lines:
            use = line.usage
            edge = edges.setdefault((use.node_id, use.meter), {})
            edge[use.from_ns] = edge.get(use.from_ns, 0) + use.milli
            edge[use.to_ns] = edge.get(use.to_ns, 0) - use.milli
            key = (use.launch_id, use.meter)
            paid[key] = paid.get(key, 0) + use.milli * (use.to_ns - use.from_ns)
        presence, reboots = self._presence()
        for machine in cloud.machines.values():
            name = machine.node.name
            self._audit_tiles(machine.node, edges, presence.get(name, []), reboots.get(name, set()))
        for one in held:
            booted = any(one.held_ns <= at <= one.released_ns for at in reboots.get(str(one.node_id), ()))
            for name, milli in [(CPU_METER, one.cpu_milli), *((share.device_id, share.milli) for share in one.devices)]:
                due, pays = milli * (one.released_ns - one.held_ns), paid.get((one.id, str(name)), 0)
                if due < 0 or pays > due or (pays < due and not booted):
                    raise Broken("I6", f"{one.id} pays {pays} of {due}")

    @staticmethod
    def _audit_tiles(
        node: Node, edges: dict[tuple[str, str], dict[int, int]], there: list[tuple[int, int]], reboots: set[int]
    ) -> None:
        for meter, capacity in [(CPU_METER, node.cpu_milli), *((str(gpu.id), MILLI) for gpu in node.devices)]:
            booked = edges.get((node.id, meter), {})
            level, tiles = 0, []
            for at in sorted(booked):
                before, level = level, level + booked[at]
                if level not in (0, capacity):
                    raise Broken("I6", f"{meter} of {node.name}: {level} of {capacity} are booked at {at - START}")
                if before == 0 and level:
                    tiles.append([at, at])
                if before and not level:
                    tiles[-1][1] = at
            until = tiles[-1][1] if tiles else 0
            wanted = [(since, min(end or until, until)) for since, end in there if since < until and since != end]
            if not _tile(tiles, wanted, reboots):
                raise Broken("I6", f"{meter} of {node.name} has gaps: {tiles} and not {wanted}")

    def _presence(self) -> tuple[dict[str, list[tuple[int, int]]], dict[str, set[int]]]:
        """When each machine was there, by the event log: from, until (zero: still); and when it was found rebooted."""
        there: dict[str, list[tuple[int, int]]] = {}
        reboots: dict[str, set[int]] = {}
        for event in self._cloud.disk.look.events(limit=100_000):
            entry = event.entry
            if entry.type not in ("NodeJoined", "NodeLost"):
                continue
            name = str(dict(entry.body).get("node"))
            found = there.setdefault(name, [])
            if entry.type == "NodeJoined" and not (found and not found[-1][1]):
                if found and found[-1][1] == entry.at_ns:
                    found[-1] = (found[-1][0], 0)
                else:
                    found.append((entry.at_ns, 0))
            elif entry.type == "NodeJoined":
                reboots.setdefault(name, set()).add(entry.at_ns)
            elif found:
                found[-1] = (found[-1][0], entry.at_ns)
        return there, reboots


def _tile(tiles: list[list[int]], wanted: list[tuple[int, int]], reboots: set[int]) -> bool:
    """Whether the tiles are what is wanted. Before a reboot something may be missing: for how long it was off is not
    known."""
    left = [tuple(tile) for tile in tiles]
    for since, end in wanted:
        at = since
        while at < end:
            if not left or left[0][0] >= end:
                if end not in reboots:
                    return False
                break
            if left[0][1] > end:
                return False
            began, ended = left.pop(0)
            if began != at and not (began > at and began in reboots):
                return False
            at = ended
    return not left


def _user(cloud: Any) -> Any:
    from tests.faults.simulation.cloud import USER

    del cloud
    return USER.principal_id
