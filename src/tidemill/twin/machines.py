"""Machines on virtual time: they answer commands with the facts that real ones would report.

    launch ── start delay ──► Started ── work done ──► Exited
                                 └── stop ── within the grace ──► Exited, work kept up to the last checkpoint

A gang works once all its workers run, and ends as one. With fewer workers than its spec names it goes slower in
proportion, on other resources as fast as their declared speed. Nothing is decided here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from tidemill.model.events import Checkpointed, Exited, Fact, Started
from tidemill.model.ids import JobId, LaunchId
from tidemill.model.job import Allocation, AttemptState, Cause
from tidemill.model.plan import Command, Forget, Launch, Stop
from tidemill.twin.cloud import Cloud, speed_milli
from tidemill.units import MILLI, SECOND_NS

FOREVER_NS: Final = 1 << 62
"""The duration of what runs until it is stopped."""
_TERMINATED: Final = 143
_STOP_TAKES_NS: Final = 5 * SECOND_NS
"""How long a worker writes its checkpoint when it is told to stop, if its grace allows."""


@dataclass(slots=True)
class Work:
    """What a job has to do and has done, in ns with all its workers at full speed. ``lost_ns`` was done twice."""

    total_ns: int
    checkpoint_ns: int
    saves_on_stop: bool
    start_ns: int = 0
    restart_ns: int = 0
    kept_ns: int = 0
    lost_ns: int = 0


@dataclass(slots=True)
class _Gang:
    """One attempt: its workers, False until they run, and its progress at ``since_ns``.

    ``plan`` numbers what it is planned to do next; what was planned before does not count any more.
    """

    job_id: JobId
    fence: int
    work: Work
    wanted: int
    speed_milli: int
    workers: dict[LaunchId, bool] = field(default_factory=dict)
    done_ns: int = 0
    since_ns: int = 0
    plan: int = 0
    saved_ns: int = 0
    has_begun: bool = False
    saving_ns: int = 0
    """When it was told to stop and began to write a checkpoint, until that is reported."""

    @property
    def running(self) -> int:
        """How many workers work: none before all have started for the first time."""
        return sum(self.workers.values()) if self.has_begun else 0


class Machines:
    """All that runs. ``lost_gpu_ns`` adds up the GPU time (milli-GPU x ns) of work that was not kept."""

    def __init__(self, cloud: Cloud, *, start_delay_ns: int) -> None:
        self._cloud = cloud
        self._start_delay_ns = start_delay_ns
        self._work: dict[JobId, Work] = {}
        self._gangs: dict[JobId, _Gang] = {}
        self._due: list[tuple[int, int, str, _Gang, LaunchId, int]] = []
        self._count = 0

    def expect(self, job_id: JobId, work: Work) -> None:
        """What a job will have to do once it runs."""
        self._work[job_id] = work

    def over(self, job_id: JobId) -> Work | None:
        """The job has ended."""
        return self._work.pop(job_id, None)

    def next_ns(self) -> int:
        """When something happens next by itself; zero when nothing does."""
        due = self._due
        while due and not self._counts(due[0]):
            heapq.heappop(due)
        return due[0][0] if due else 0

    def obey(self, commands: Iterable[Command], now: int) -> None:
        """Carry out what a turn commands."""
        for command in commands:
            if isinstance(command, Launch):
                self._launch(command.launch_id, now)
            elif isinstance(command, Stop):
                self._stop(command, now)
            elif isinstance(command, Forget):
                self._forget(command.launch_id, now)

    def facts(self, now: int) -> list[Fact]:
        """What has happened by ``now``."""
        told: list[Fact] = []
        due = self._due
        while due and due[0][0] <= now:
            event = heapq.heappop(due)
            if not self._counts(event):
                continue
            at, _, what, gang, launch, _ = event
            if what == "start":
                self._settle(gang, at)
                gang.workers[launch] = True
                told.append(Started(at_ns=at, launch_id=launch, fence=gang.fence))
                if gang.has_begun or all(gang.workers.values()):
                    gang.has_begun = True
                    self._go_on(gang, at)
            elif what == "save":
                self._settle(gang, at)
                gang.work.kept_ns = gang.saved_ns = gang.done_ns
                told += [Checkpointed(at_ns=at, launch_id=first, fence=gang.fence) for first in list(gang.workers)[:1]]
                self._go_on(gang, at)
            elif what == "stop":
                if gang.saving_ns:
                    told.append(Checkpointed(at_ns=gang.saving_ns, launch_id=launch, fence=gang.fence))
                    gang.saving_ns = 0
                told.append(self._exit(gang, launch, at, _TERMINATED, self._cause(gang.job_id)))
            else:
                self._settle(gang, at)
                gang.work.kept_ns = gang.work.total_ns
                told += [self._exit(gang, each, at, 0, Cause.NONE) for each in list(gang.workers)]
        return told

    def _launch(self, launch_id: LaunchId, now: int) -> None:
        held = self._cloud.held(launch_id)
        if held is None or (work := self._work.get(held.job_id)) is None:
            return
        gang = self._gangs.get(held.job_id)
        if gang is None or gang.fence != held.fence:
            gang = self._gangs[held.job_id] = self._gang(held, work)
        if launch_id not in gang.workers:
            gang.workers[launch_id] = False
            self._plan(
                now + self._start_delay_ns + (work.start_ns if held.fence == 1 else work.restart_ns),
                "start",
                gang,
                launch_id,
            )

    def _gang(self, held: Allocation, work: Work) -> _Gang:
        spec, attempt = self._cloud.spec(held.job_id), self._cloud.attempt(held.job_id)
        speed = speed_milli(spec, attempt.choice if attempt is not None else 0)
        return _Gang(held.job_id, held.fence, work, spec.nodes, speed, done_ns=work.kept_ns, saved_ns=work.kept_ns)

    def _stop(self, command: Stop, now: int) -> None:
        held = self._cloud.held(command.launch_id)
        gang = self._gangs.get(held.job_id) if held is not None else None
        if held is None or gang is None or command.launch_id not in gang.workers:
            return
        started = gang.workers[command.launch_id]
        takes = min(_STOP_TAKES_NS, command.grace_ns) if started else 0
        attempt = self._cloud.attempt(gang.job_id)
        self._settle(gang, now)
        gang.plan += 1
        if attempt is not None and attempt.state is AttemptState.ENDING:
            if gang.work.saves_on_stop and command.grace_ns and gang.done_ns > gang.work.kept_ns:
                gang.work.kept_ns, gang.saving_ns = gang.done_ns, now
            self._lose(gang)
        else:
            self._go_on(gang, now)  # an elastic gang gives up one worker and works on until that one is gone
        self._plan(now + takes, "stop", gang, command.launch_id)

    def _forget(self, launch_id: LaunchId, now: int) -> None:
        """A worker is gone; when not by its own end, its machine was lost."""
        job_id = JobId(f"job_{launch_id.partition('_')[2].rsplit('-', 2)[0]}")
        gang = self._gangs.get(job_id)
        if gang is not None and launch_id in gang.workers:
            self._settle(gang, now)
            gang.plan += 1
            del gang.workers[launch_id]
            self._lose(gang)
            if not gang.workers:
                del self._gangs[job_id]

    def _lose(self, gang: _Gang) -> None:
        """Go back to what was kept."""
        gang.work.lost_ns += max(gang.done_ns - gang.work.kept_ns, 0)
        gang.done_ns = gang.work.kept_ns
        gang.since_ns = 0

    def _settle(self, gang: _Gang, now: int) -> None:
        """Count what was done since ``since_ns``."""
        if gang.since_ns and gang.running:
            elapsed = now - gang.since_ns
            if gang.running != gang.wanted or gang.speed_milli != MILLI:
                elapsed = elapsed * gang.running * gang.speed_milli // (gang.wanted * MILLI)
            gang.done_ns += elapsed
            gang.since_ns = now

    def _go_on(self, gang: _Gang, now: int) -> None:
        """Work from now on, until the next checkpoint or the end."""
        gang.since_ns = now
        gang.plan += 1
        left = max(gang.work.total_ns - gang.done_ns, 0)
        if left >= FOREVER_NS - gang.done_ns:
            return
        every = gang.work.checkpoint_ns
        until_save = gang.saved_ns + every - gang.done_ns if every else left
        what = "save" if until_save < left else "end"
        rate = gang.running * gang.speed_milli
        step = max(until_save, 1) if what == "save" else left
        takes = step if rate == gang.wanted * MILLI else -(-step * gang.wanted * MILLI // rate)
        self._plan(now + takes, what, gang, LaunchId(""))

    def _plan(self, at_ns: int, what: str, gang: _Gang, launch_id: LaunchId) -> None:
        self._count += 1
        heapq.heappush(self._due, (at_ns, self._count, what, gang, launch_id, gang.plan))

    def _counts(self, event: tuple[int, int, str, _Gang, LaunchId, int]) -> bool:
        """Whether a planned event is still to happen."""
        _, _, what, gang, launch, plan = event
        if what == "start":
            return gang.workers.get(launch) is False
        if what == "stop":
            return launch in gang.workers
        return plan == gang.plan and bool(gang.workers)

    def _exit(self, gang: _Gang, launch_id: LaunchId, at_ns: int, exit_code: int, cause: Cause) -> Exited:
        if len(gang.workers) > 1 and cause is not Cause.NONE:
            self._settle(gang, at_ns)
        del gang.workers[launch_id]
        if not gang.workers and self._gangs.get(gang.job_id) is gang:
            del self._gangs[gang.job_id]
        elif cause is Cause.RESIZED and gang.running:
            self._go_on(gang, at_ns)
        return Exited(at_ns=at_ns, launch_id=launch_id, fence=gang.fence, exit_code=exit_code, cause=cause)

    def _cause(self, job_id: JobId) -> Cause:
        """Why a worker of a job was stopped."""
        attempt = self._cloud.attempt(job_id)
        if attempt is None or attempt.state is not AttemptState.ENDING:
            return Cause.RESIZED
        return attempt.cause
