"""What runners are told and what they report: the live launch and its fence decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tidemill.control.enginework import Stranger
from tidemill.control.identity import Directory, Identity
from tidemill.control.launching import build_launch
from tidemill.control.sites import Sites
from tidemill.control.turns import TurnLoop
from tidemill.control.vault import Vault
from tidemill.errors import Fenced, NotFound, Unavailable
from tidemill.model.events import Checkpointed, Fact
from tidemill.model.ids import JobId, LaunchId, job_of_launch
from tidemill.model.job import Allocation, AllocationState, Attempt, Cause, Job, Workload
from tidemill.model.plan import LaunchSpec
from tidemill.ports import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """What a runner should do: go on, or stop its worker with that grace."""

    stop: bool
    grace_ns: int


class Runners:
    """The control plane's side of the runners. Thread-safe."""

    def __init__(
        self,
        store: Store,
        turns: TurnLoop,
        sites: Sites,
        directory: Directory,
        vault: Vault,
        *,
        api_url: str,
        clock: Callable[[], int],
    ) -> None:
        self._store = store
        self._turns = turns
        self._sites = sites
        self._directory = directory
        self._vault = vault
        self._api_url = api_url
        self._clock = clock
        self.beats: dict[LaunchId, tuple[int, int, int]] = {}
        """The last beat of each launch: when, CPU time used (ns), resident memory (bytes)."""

    def launch(self, launch_id: LaunchId) -> tuple[Allocation, Attempt, Job, Workload]:
        """A live launch and what it belongs to. Raises: NotFound when it is over or was never."""
        world = self._turns.world
        held = world.allocations.get(launch_id)
        if held is not None:
            attempt, job = world.attempts.get(held.job_id), world.jobs.get(held.job_id)
            workload = world.workloads.get(job.workload_id) if job is not None else None
            if attempt is not None and job is not None and workload is not None and attempt.id == held.attempt_id:
                return held, attempt, job, workload
        raise NotFound("That launch is over.", field="launch", value=launch_id)

    def report(self, launch_id: LaunchId, fence: int, facts: Sequence[Fact]) -> Future[Directive]:
        """What the runner should do, when what it reported is durable. Raises through the future: Fenced."""
        answer: Future[Directive] = Future()
        self._sites.leases.answered(launch_id)

        def done(stored: Future[None]) -> None:
            try:
                stored.result()
                answer.set_result(self._directive(launch_id, fence))
            except Exception as error:  # noqa: BLE001 - handed on to whoever asked
                answer.set_exception(error)

        try:
            self._directive(launch_id, fence)
        except Fenced as error:
            answer.set_exception(error)
            return answer
        self._turns.put(facts).add_done_callback(done)
        return answer

    def beat(self, launch_id: LaunchId, fence: int, *, cpu_used_ns: int, rss_bytes: int) -> Directive:
        """What the runner should do. Raises: Fenced when a newer attempt holds the lease."""
        self.beats[launch_id] = (self._clock(), cpu_used_ns, rss_bytes)
        self._sites.leases.answered(launch_id)
        return self._directive(launch_id, fence)

    def checkpointed(self, identity: Identity, job_id: JobId, detail: str) -> Future[None]:
        """Nothing, when it is recorded that the job's work up to now is safe.

        Raises: NotFound when nothing of it runs, Fenced for a token of an earlier attempt.
        """
        attempt = self._turns.world.attempts.get(job_id)
        held = self._turns.world.workers_of(attempt) if attempt is not None else ()
        if not held:
            raise NotFound("Nothing of that job runs.", field="job", value=job_id)
        if identity.launch_id and identity.launch_id not in {worker.id for worker in held}:
            raise Fenced("A newer attempt of the job runs.", field="job", value=job_id)
        first = min(held, key=lambda worker: worker.rank)
        fact = Checkpointed(at_ns=self._clock(), launch_id=first.id, fence=first.fence, detail=detail)
        return self._turns.put([fact])

    def secret_values(self, launch_id: LaunchId) -> dict[str, str]:
        """The values of the secrets that a live launch's spec names. Raises: NotFound."""
        _, _, job, workload = self.launch(launch_id)
        values = {}
        for name in workload.spec.secrets:
            secret = self._store.secret(job.project_id, name)
            if secret is None:
                raise NotFound(f"There is no secret {name}.", field="secrets", value=name)
            values[name] = self._vault.open(secret)
        return values

    def build(self, launch_id: LaunchId) -> LaunchSpec:
        """What the engine is told to start. Raises: NotFound when the launch is over."""
        return build_launch(
            launch_id,
            world=self._turns.world,
            store=self._store,
            directory=self._directory,
            api_url=self._api_url,
            is_leased=self._sites.is_leased,
        )

    def remember(self) -> None:
        """Let the runners that outlived the last control plane in: their tokens follow from their launch ids."""
        for held in self._turns.world.allocations.values():
            workload = self._turns.world.workloads[self._turns.world.jobs[held.job_id].workload_id]
            self._directory.launch_tokens(
                held.id,
                organization=workload.organization_id,
                project=workload.project_id,
                principal=workload.principal_id,
            )

    def let_in(self, stranger: Stranger) -> None:
        """Let the runner of a known job's launch ask what to do: it is told when a newer attempt has the lease."""
        row = self._store.job(stranger.job_id)
        if row is not None:
            self._directory.launch_tokens(
                stranger.launch_id,
                organization=row.workload.organization_id,
                project=row.workload.project_id,
                principal=row.workload.principal_id,
            )

    def _directive(self, launch_id: LaunchId, fence: int) -> Directive:
        held = self._turns.world.allocations.get(launch_id)
        if held is None:
            stored = self._store.allocation(launch_id)
            if stored is None:
                self._check_superseded(launch_id, fence)
            elif stored.fence == fence and stored.cause is Cause.COMPLETED:
                return Directive(stop=True, grace_ns=0)
            raise Fenced("This launch is over.", field="launch", value=launch_id)
        if held.fence != fence:
            raise Fenced("A newer attempt holds the lease.", field="fence", value=fence)
        if held.state is not AllocationState.DRAINING:
            return Directive(stop=False, grace_ns=0)
        job = self._turns.world.jobs.get(held.job_id)
        workload = self._turns.world.workloads.get(job.workload_id) if job is not None else None
        return Directive(stop=True, grace_ns=workload.spec.checkpoint_grace_ns if workload else 0)

    def _check_superseded(self, launch_id: LaunchId, fence: int) -> None:
        """Raises: Unavailable for a stranger, which is to go on, unless a newer attempt of its job has the lease."""
        attempt = self._turns.world.attempts.get(job_of_launch(launch_id))
        if attempt is None or attempt.number <= fence:
            raise Unavailable("This launch is not known here.", field="launch", value=launch_id)
