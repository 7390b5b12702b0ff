"""What administrators change for all: projects and their limits, the quota tree, reservations, and nodes."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from tidemill.control.identity import Identity, administer
from tidemill.control.projects import Projects
from tidemill.control.steering import (
    Wanted,
    check_tree,
    choose_nodes,
    find_node,
    is_of,
    planned_reservation,
    queues_from,
    standing,
    with_limits,
)
from tidemill.control.turns import TurnLoop
from tidemill.core.fairness import QueueShare
from tidemill.errors import InvalidRequest, NotFound
from tidemill.model.events import (
    Fact,
    Marking,
    ModelPolicySet,
    NodeMarked,
    ProjectOpened,
    QueueSet,
    ReservationCancelled,
    ReservationMade,
)
from tidemill.model.fleet import Node
from tidemill.model.ids import ProjectId, ReservationId, queue_id, sortable_id
from tidemill.model.limits import Limit
from tidemill.model.queue import Queue
from tidemill.model.reservation import Reservation
from tidemill.model.tenant import Project, Scope
from tidemill.wire.requests import QueueIn, ReservationIn


class Administration:
    """Changes of what projects share, each checked against what is there before it is made. Thread-safe."""

    def __init__(self, projects: Projects, turns: TurnLoop, *, clock: Callable[[], int]) -> None:
        self._projects = projects
        self._turns = turns
        self._clock = clock
        self._steering = threading.Lock()
        """Held while a change of the quota tree or of reservations is checked and made, one at a time."""

    def create_project(
        self,
        identity: Identity,
        name: str,
        *,
        limit_gpu_milli: int = 0,
        limit_cpu_milli: int = 0,
        limits: tuple[Limit, ...] | None = None,
        countries: tuple[str, ...] | None = None,
    ) -> Project:
        """A new project, or the one of that name; its queue has these limits from now on, zero being none.

        ``limits`` is for what it asks of models, ``countries`` where it is kept; None leaves that as it is.

        Raises: Forbidden, InvalidRequest when another queue has that name.
        """
        identity.require(Scope.ADMIN)
        with self._steering:
            known = next((p for p in self._projects.of(identity) if p.name == name), None)
            now = self._clock()
            project = known or Project(
                id=ProjectId(sortable_id("prj", now=now, entropy=secrets.randbits(40))),
                organization_id=identity.organization_id,
                name=name,
                created_ns=now,
            )
            facts: list[Fact] = [ProjectOpened(at_ns=now, project=project)] if known is None else []
            queue = self._turns.world.queues.get(queue_id(project.id))
            if queue is not None or limit_gpu_milli or limit_cpu_milli:
                before = queue or Queue(id=queue_id(project.id), name=name, project_id=project.id)
                limited = with_limits(before, gpu_milli=limit_gpu_milli, cpu_milli=limit_cpu_milli)
                self._check_tree(identity, [limited], [project])
                facts.append(QueueSet(at_ns=now, queue=limited))
            if limits is not None:
                project = replace(project, limits=limits)
            if countries is not None:
                project = replace(project, countries=countries)
            if project != known:
                self._projects.add(project)
            if facts:
                self._turns.put(facts).result(timeout=30)
        return project

    def allow_pickles(self, identity: Identity, project: Project, allows: bool) -> Project:
        """The project, whose models may have pickles from now on, or not. Raises: Forbidden."""
        administer(identity)
        with self._steering:
            known = self._projects.by_id.get(project.id, project)
            if known.allows_pickles == allows:
                return known
            changed = replace(known, allows_pickles=allows)
            self._projects.add(changed)
            self._turns.put([ModelPolicySet(at_ns=self._clock(), project=changed, by=identity.name)]).result(timeout=30)
        return changed

    def queues(self, identity: Identity) -> tuple[Queue, ...]:
        """The queues of the identity's organization, by name; those of its projects when it is bound to some."""
        mine = [queue for queue in self._turns.world.queues.copy().values() if self._is_mine(identity, queue)]
        return tuple(sorted(mine, key=lambda queue: (queue.name, queue.id)))

    def share(self, identity: Identity) -> tuple[QueueShare, ...]:
        """Who has what, a row for each queue and project that the identity may see, parents before children."""
        projects = {project.id for project in self._projects.of(identity)}
        mine = {queue.id for queue in self.queues(identity)}
        rows = self._turns.look(lambda world: world.quota.report())
        return tuple(row for row in rows if row.id in mine or row.project_id in projects)

    def set_queues(self, identity: Identity, given: Sequence[QueueIn]) -> tuple[Queue, ...]:
        """The organization's queues after these were added, or replaced those of their names: all or none.

        Raises: InvalidRequest that names the field, its value and the mend.
        """
        administer(identity)
        with self._steering:
            made = queues_from(
                given,
                known=self.queues(identity),
                projects=self._projects.of(identity),
                organization=identity.organization_id,
            )
            self._check_tree(identity, made, [])
            now = self._clock()
            self._turns.put([QueueSet(at_ns=now, queue=queue) for queue in made]).result(timeout=30)
        return self.queues(identity)

    def reserve(self, identity: Identity, project: Project | None, given: ReservationIn) -> Reservation:
        """A new reservation, for nobody without a project. Raises: InvalidRequest that names the field."""
        administer(identity)
        with self._steering:
            now, world = self._clock(), self._turns.world
            if standing(self.reservations(identity), given.name, now=now) is not None:
                mend = "Choose another name, or cancel that one: tidemill reserve cancel."
                raise InvalidRequest("A reservation of that name stands.", field="name", value=given.name, mend=mend)
            planned = planned_reservation(
                given,
                identity=ReservationId(sortable_id("rsv", now=now, entropy=secrets.randbits(40))),
                project=project.id if project is not None else ProjectId(""),
                by=identity.name,
                now=now,
            )
            wanted = Wanted(count=given.nodes, names=given.node, gpus=given.gpus, labels=given.labels)
            mine = {one.id for one in self.reservations(identity)}
            made = replace(planned, node_ids=choose_nodes(world, planned, wanted, visible=mine, now=now))
            self._turns.put([ReservationMade(at_ns=now, reservation=made)]).result(timeout=30)
        return made

    def reservations(self, identity: Identity) -> tuple[Reservation, ...]:
        """Reservations with a window to come that the identity may see: those for nobody concern all."""
        now, visible = self._clock(), {project.id for project in self._projects.of(identity)}
        found = [
            one
            for one in self._turns.world.reservations.copy().values()
            if (not one.project_id or one.project_id in visible) and one.window(after=now) is not None
        ]
        return tuple(sorted(found, key=lambda one: (one.starts_ns, one.name, one.id)))

    def cancel_reservation(self, identity: Identity, name: str) -> Reservation:
        """The reservation of that name or id as it was, which does not stand any more. Raises: NotFound."""
        administer(identity)
        now = self._clock()
        found = standing(self.reservations(identity), name, now=now)
        if found is None:
            raise NotFound(
                f"There is no reservation {name[:100]}.",
                field="reservation",
                value=name[:100],
                mend="See tidemill reserve list.",
            )
        self._turns.put([ReservationCancelled(at_ns=now, reservation_id=found.id)]).result(timeout=30)
        return replace(found, cancelled_ns=now)

    def mark(self, identity: Identity, name: str, marking: Marking, detail: str) -> Node:
        """The node after it was cordoned, drained or resumed. Raises: NotFound."""
        administer(identity)
        node = find_node(self._turns.world, name)
        fact = NodeMarked(at_ns=self._clock(), node_id=node.id, marking=marking, by=identity.name, detail=detail)
        self._turns.put([fact]).result(timeout=30)
        return self._turns.world.nodes.get(node.id, node)

    def _is_mine(self, identity: Identity, queue: Queue) -> bool:
        projects = self._projects.of(identity)
        if identity.project_ids and not queue.project_id:
            return False
        return is_of(queue, identity.organization_id, projects)

    def _check_tree(self, identity: Identity, changed: Sequence[Queue], opened: Sequence[Project]) -> None:
        """Raises: InvalidRequest when the tree cannot be used with the changed queues in it."""
        world, new = self._turns.world, {queue.id for queue in changed}
        rest = [queue for queue in world.queues.copy().values() if queue.id not in new]
        mine = [queue for queue in rest if self._is_mine(identity, queue)]
        others = [queue for queue in rest if queue not in mine]
        projects = [*self._projects.all(), *(one for one in opened if one.id not in self._projects.by_id)]
        check_tree([*mine, *changed], others, projects, world.nodes.copy().values())
