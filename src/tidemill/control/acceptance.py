"""What a spec has to pass before its workload is recorded; what it names is found, and pinned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tidemill.control.answers import mend_for
from tidemill.control.blobs import BlobStore
from tidemill.control.datasets import DataSets
from tidemill.control.launching import find_input
from tidemill.control.renting import Renting
from tidemill.control.steering import (
    check_dependency,
    check_group,
    check_reservation,
    limits_told,
    why_group_never,
)
from tidemill.control.turns import TurnLoop
from tidemill.core.admission import why_refused
from tidemill.core.routing import loop_through
from tidemill.errors import Conflict, Infeasible, InvalidSpec
from tidemill.model.ids import PrincipalId, WorkloadId, queue_id
from tidemill.model.job import Workload
from tidemill.model.spec import Dependency, Service, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.ports import JobFilter, Store
from tidemill.wire import instant_text


class Acceptance:
    """Checks specs against what is stored and what the fleet has. Thread-safe.

    ``renting`` gives what rents machines, and None where nothing does: what is rented counts as what there could be.
    ``fallbacks`` gives which models each one that is served falls back to.
    """

    def __init__(
        self,
        store: Store,
        turns: TurnLoop,
        data: DataSets,
        blobs: BlobStore,
        *,
        renting: Callable[[], Renting | None],
        fallbacks: Callable[[], Mapping[str, tuple[str, ...]]],
    ) -> None:
        self._store = store
        self._turns = turns
        self._data = data
        self._blobs = blobs
        self._renting = renting
        self._fallbacks = fallbacks

    def check(self, spec: WorkloadSpec, project: Project, *, now: int) -> WorkloadSpec:
        """The spec with its inputs pinned to versions. Raises: Infeasible, InvalidSpec."""
        spec = self.pin(spec, project)
        self.check_times(spec, project, now=now)
        if spec.workdir and not self._blobs.exists(spec.workdir):
            raise InvalidSpec(
                "The workdir was not uploaded.", field="workdir", value=spec.workdir, mend="Upload it first."
            )
        for name in spec.secrets:
            if self._store.secret(project.id, name) is None:
                raise InvalidSpec(
                    f"Project {project.name} has no secret {name}.",
                    field="secrets",
                    value=name,
                    mend=f"Set it: tidemill secret set {name}.",
                )
        if spec.service is not None and spec.service.fallback:
            self.check_fallback(spec.service, spec.service.model or spec.name)
        never = why_refused(self._turns.world, _asked(spec, project, now=now))
        renting = self._renting()
        if never is not None and not (renting is not None and renting.may_serve(spec)):
            raise Infeasible(
                never.sentence, field=never.subject, value=never.needed, mend=mend_for(never), reason=never.code
            )
        return spec

    def check_groups(self, specs: Sequence[WorkloadSpec], project: Project, *, now: int) -> None:
        """Raises: Infeasible when a group of which some are submitted together could never start; InvalidSpec when
        they do not agree about its size."""
        sizes: dict[str, int] = {}
        for spec in specs:
            if spec.group is not None and sizes.setdefault(spec.group.name, spec.group.size) != spec.group.size:
                raise InvalidSpec(
                    f"Another says that group {spec.group.name} has {sizes[spec.group.name]} jobs.",
                    field="group.size",
                    value=spec.group.size,
                    mend=f"Write {sizes[spec.group.name]}, or name another group.",
                )
        renting = self._renting()
        if not sizes or (renting is not None and all(renting.may_serve(spec) for spec in specs if spec.group)):
            return
        asked = [_asked(spec, project, now=now) for spec in specs]
        never = self._turns.look(lambda world: why_group_never(world, asked))
        if never is not None:
            raise Infeasible(
                never.sentence, field=never.subject, value=never.needed, mend=mend_for(never), reason=never.code
            )

    def must_look(self, project: Project, specs: Sequence[WorkloadSpec]) -> bool:
        """Whether submitting these waits for the store or for a turn, so that it is not for an event loop."""
        return (
            self._renting() is not None
            or self._is_capped(project)
            or any(spec.inputs or spec.secrets or spec.workdir or spec.after or spec.group for spec in specs)
            or any(spec.data or spec.volumes for spec in specs)
        )

    def check_room(self, project: Project, jobs: int) -> None:
        """Raises: Conflict when a queue of the project has as many jobs waiting as it may."""
        if not self._is_capped(project):
            return
        reason = self._turns.look(lambda world: world.quota.too_many_queued(project.id, jobs))
        if reason is not None:
            raise Conflict(
                reason.sentence, field="project", value=project.name, mend=limits_told(reason), reason=reason.code
            )

    def check_times(self, spec: WorkloadSpec, project: Project, *, now: int) -> None:
        """Raises: InvalidSpec for what waits for a time, a window or a group that will not come."""
        if spec.start_before_ns and spec.start_before_ns <= now:
            raise InvalidSpec(
                "That time is over.",
                field="start_before",
                value=instant_text(spec.start_before_ns),
                mend="Write a time to come, such as 2h.",
            )
        if spec.reservation:
            check_reservation(spec, project, self._turns.world.reservations.copy().values(), now=now)
        if spec.group is not None:
            check_group(spec.group, project, self._turns.world.workloads.copy().values())

    def check_fallback(self, service: Service, model: str) -> None:
        """Raises: InvalidSpec when a request could come back to ``model`` by falling back."""
        loop = loop_through(model, {**self._fallbacks(), model: service.fallback})
        if loop:
            raise InvalidSpec(
                f"Requests would go round in a loop: {' → '.join(loop)}.",
                field="service.fallback",
                value=loop[1],
                mend=f"Leave {loop[1]} out, or stop the service {loop[-2]} and submit it without {model}.",
            )

    def follow(self, specs: Sequence[WorkloadSpec], ids: Sequence[WorkloadId], project: Project) -> list[WorkloadSpec]:
        """The specs with the ids of the workloads that they come after; earlier ones of a batch count.

        Raises: InvalidSpec for one that there is not, or that has ended otherwise already.
        """
        found: list[WorkloadSpec] = []
        batch: dict[str, WorkloadId] = {}
        for own_id, spec in zip(ids, specs, strict=True):
            after = tuple(
                replace(one, workload_id=batch.get(one.workload_id) or self._before(one, project)) for one in spec.after
            )
            found.append(replace(spec, after=after) if after else spec)
            batch[spec.name] = own_id
        return found

    def pin(self, spec: WorkloadSpec, project: Project) -> WorkloadSpec:
        """The spec with its inputs and data at the versions that they have now, and within its project's countries.

        Raises: NotFound, InvalidSpec.
        """
        spec = _within(spec, project)
        if spec.inputs:
            found = [(name, find_input(self._store, project.id, reference)) for name, reference in spec.inputs]
            spec = replace(spec, inputs=tuple((name, f"{one.name}:{one.version}") for name, one in found))
        return self._data.resolve(spec, project) if spec.data or spec.volumes else spec

    def _is_capped(self, project: Project) -> bool:
        queues = self._turns.world.queues
        at = queues.get(queue_id(project.id))
        for _ in range(len(queues)):
            if at is None or at.max_queued:
                break
            at = queues.get(at.parent_id)
        return at is not None and bool(at.max_queued)

    def _before(self, dependency: Dependency, project: Project) -> WorkloadId:
        """The id of the workload that is meant by its id, or by a name that is its project's newest of that name."""
        named = str(dependency.workload_id)
        workload = self._store.workload(dependency.workload_id) if named.startswith("wl_") else None
        if workload is None:
            rows = self._store.find_jobs(JobFilter(project_ids=(project.id,), name=named), limit=1).items
            workload = rows[0].workload if rows else None
        if workload is None or workload.project_id != project.id:
            raise InvalidSpec(
                f"Project {project.name} has no workload {named}.",
                field="after",
                value=named,
                mend="Submit that one first, and name it as tidemill ps shows it.",
            )
        check_dependency(dependency, workload, self._store.jobs_of(workload.id))
        return workload.id


def _asked(spec: WorkloadSpec, project: Project, *, now: int) -> Workload:
    """A workload as it would be submitted, to be looked at only."""
    return Workload(
        id=WorkloadId(""),
        organization_id=project.organization_id,
        project_id=project.id,
        principal_id=PrincipalId(""),
        spec=spec,
        submitted_ns=now,
    )


def _within(spec: WorkloadSpec, project: Project) -> WorkloadSpec:
    """The spec, kept in the countries of its project. Raises: InvalidSpec when it asks for others only."""
    if not project.countries:
        return spec
    where = spec.placement.where
    kept = tuple(country for country in project.countries if not where.countries or country in where.countries)
    if not kept:
        raise InvalidSpec(
            f"Project {project.name} is kept in {', '.join(project.countries)}.",
            field="placement.countries",
            value=list(where.countries),
            mend=f"Leave it out, or write some of {', '.join(project.countries)}.",
        )
    return replace(spec, placement=replace(spec.placement, where=replace(where, countries=kept)))
