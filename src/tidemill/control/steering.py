"""What administrators say about the fleet's sharing and its times: quota tree, reservations; pure.

Two recurring reservations can meet for the first time after years, so whether they overlap is worked out, not
tried: window ``i`` of one and ``j`` of the other meet when ``i * p - j * q`` lies between two bounds, and the first
such ``i`` is found by descending as Euclid's algorithm does, in as many steps as the periods have digits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tidemill.core.admission import why_never_together
from tidemill.core.facts import has_left
from tidemill.core.feasible import model_matches
from tidemill.core.quota import why_not_tree
from tidemill.core.world import World
from tidemill.errors import InvalidRequest, InvalidSpec, NotFound
from tidemill.model.fleet import Device, Mig, Node, NodeState
from tidemill.model.ids import NodeId, OrganizationId, ProjectId, QueueId, ReservationId, queue_id
from tidemill.model.job import Job, JobState, Workload
from tidemill.model.plan import Reason
from tidemill.model.queue import CPU, MEMORY, Queue
from tidemill.model.reservation import Reservation
from tidemill.model.resources import GpuRequest
from tidemill.model.spec import Dependency, DependsOn, Group, WorkloadSpec
from tidemill.model.tenant import Project
from tidemill.units import MILLI, format_duration
from tidemill.wire.requests import QueueIn, ReservationIn, amounts_json

_NEVER: Final = 1 << 62

# -- times ----------------------------------------------------------------------------------------------------------


def overlaps(one: Reservation, other: Reservation) -> bool:
    """Whether any window of one reservation overlaps any of the other, however far away; nodes do not matter.

    >>> def windows(start: int, end: int, every: int) -> Reservation:
    ...     return Reservation(
    ...         id=ReservationId("r"), name="r", node_ids=(NodeId("n"),), starts_ns=start, ends_ns=end, every_ns=every
    ...     )
    >>> from tidemill.model.ids import ReservationId
    >>> overlaps(windows(0, 1, 6), windows(3, 4, 10)), overlaps(windows(0, 1, 6), windows(4, 5, 10))
    (False, True)
    """
    first, second = _last_window(one), _last_window(other)
    if first == 0 or second == 0:
        return False
    if not one.every_ns:  # the recurring one, if any, is counted by i
        one, other, first, second = other, one, second, first
    period, interval = one.every_ns, other.every_ns
    low, high = other.starts_ns - one.ends_ns + 1, other.ends_ns - one.starts_ns - 1
    if not period:
        return low <= 0 <= high
    at = max(0, -(-low // period))  # before it, the other begins too late for any i
    end = None if first is None else first - 1
    if not interval:
        return at * period <= high and (end is None or at <= end)
    if second is not None:
        reach = (high + (second - 1) * interval) // period
        end = reach if end is None else min(end, reach)
    offset, width = (at * period - low) % interval, high - low
    if offset <= width or width >= interval:
        steps: int | None = 0
    else:
        steps = _first_within(period, interval, interval - offset, interval - offset + width)
    return steps is not None and (end is None or at + steps <= end)


def _last_window(reservation: Reservation) -> int | None:
    """How many windows it has; None for endlessly many."""
    if reservation.cancelled_ns or (reservation.until_ns and reservation.starts_ns >= reservation.until_ns):
        return 0
    if not reservation.every_ns:
        return 1
    if not reservation.until_ns:
        return None
    return (reservation.until_ns - 1 - reservation.starts_ns) // reservation.every_ns + 1


def _first_within(step: int, modulus: int, low: int, high: int) -> int | None:
    """The least ``k >= 0`` with ``low <= step * k % modulus <= high``, for ``0 <= low <= high < modulus``.

    Source: the well-known descent on (step, modulus), as on quotients in Euclid's algorithm; O(log modulus).
    """
    if low == 0:
        return 0
    step %= modulus
    if step == 0:
        return None
    if 2 * step > modulus:
        return _first_within(modulus - step, modulus, modulus - high, modulus - low)
    count = -(-low // step)
    if count * step <= high:
        return count
    rounds = _first_within(-modulus % step, step, low % step, high % step)
    return None if rounds is None else -(-(low + modulus * rounds) // step)


# -- which nodes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which nodes a reservation is for: ``names``, or ``count`` of those with these GPUs and labels."""

    count: int = 0
    names: tuple[str, ...] = ()
    gpus: GpuRequest | None = None
    labels: tuple[tuple[str, str], ...] = ()


def choose_nodes(
    world: World, planned: Reservation, wanted: Wanted, *, visible: Collection[ReservationId], now: int
) -> tuple[NodeId, ...]:
    """The nodes for a reservation, whose own ``node_ids`` do not count; only ``visible`` ones are told by name.

    Never one that is reserved at the same time. First those whose running work ends before it starts, among them
    those that are ready, then by name.
    Raises: InvalidRequest that names the field and says who is in the way.
    """
    taken = _taken(world, planned, now=now)
    if wanted.names:
        found = [find_node(world, name) for name in wanted.names]
        if len({node.id for node in found}) < len(found):
            raise InvalidRequest(
                "A node is named twice.", field="node", value=", ".join(wanted.names), mend="Name each node once."
            )
        for node in found:
            if (other := taken.get(node.id)) is not None:
                who = f"Reservation {other.name}" if other.id in visible else "Another reservation"
                raise InvalidRequest(
                    f"{who} has {node.name} at an overlapping time.",
                    field="node",
                    value=node.name,
                    mend="Choose another time or node; see tidemill reserve list.",
                )
        return tuple(node.id for node in found)
    fitting = [node for node in list(world.nodes.values()) if node.state is not NodeState.LOST and _has(node, wanted)]
    free = [node for node in fitting if node.id not in taken]
    if len(free) < wanted.count:
        others = [other for node in fitting if (other := taken.get(node.id)) is not None]
        names = sorted({other.name if other.id in visible else "another's" for other in others})
        in_the_way = f" Reservations overlap: {', '.join(names)}." if names else ""
        raise InvalidRequest(
            f"{len(free)} of the {len(world.nodes)} nodes can be reserved for that at that time.{in_the_way}",
            field="nodes",
            value=wanted.count,
            mend="Ask for fewer, for less of each, or for another time; see tidemill nodes.",
        )
    ends = _ends(world, now=now)
    free.sort(
        key=lambda node: (
            ends.get(node.id, 0) > planned.starts_ns,
            node.state is not NodeState.READY,
            node.name,
            node.id,
        )
    )
    return tuple(sorted((node.id for node in free[: wanted.count]), key=lambda one: world.nodes[one].name))


def find_node(world: World, name: str) -> Node:
    """The node of that id or name. Raises: NotFound."""
    nodes = world.nodes.copy()
    found = nodes.get(NodeId(name)) or next((node for node in nodes.values() if node.name == name), None)
    if found is None:
        raise NotFound(
            f"There is no node {name[:100]}.",
            field="node",
            value=name[:100],
            mend="See tidemill nodes for their names.",
        )
    return found


def _taken(world: World, planned: Reservation, *, now: int) -> dict[NodeId, Reservation]:
    """Who has which node at a time that overlaps the planned one's."""
    found: dict[NodeId, Reservation] = {}
    for other in list(world.reservations.values()):
        if other.id != planned.id and other.window(after=now) is not None and overlaps(planned, other):
            for node in other.node_ids:
                found.setdefault(node, other)
    return found


def _has(node: Node, wanted: Wanted) -> bool:
    if not set(wanted.labels) <= set(node.labels):
        return False
    failing = {device for device, _ in node.failing}
    request = wanted.gpus
    if request is None:
        return True
    return sum(device.id not in failing and _answers(device, request) for device in node.devices) >= request.count


def _answers(device: Device, request: GpuRequest) -> bool:
    return (
        (not request.model or model_matches(device.model, request.model))
        and device.memory_bytes >= request.memory_min_bytes
        and (not request.memory_max_bytes or device.memory_bytes <= request.memory_max_bytes)
        and (device.mig is Mig.OFF) != bool(request.profile)
    )


def _ends(world: World, *, now: int) -> dict[NodeId, int]:
    """When what runs on each node is over at the latest, in ns."""
    found: dict[NodeId, int] = {}
    for held in list(world.allocations.values()):
        attempt, job = world.attempts.get(held.job_id), world.jobs.get(held.job_id)
        workload = world.workloads.get(job.workload_id) if job is not None else None
        limit = workload.spec.max_duration_ns if workload is not None else 0
        begun = attempt.started_ns if attempt is not None else 0
        ends = (begun or now) + limit if limit else _NEVER
        found[held.node_id] = max(found.get(held.node_id, 0), ends)
    return found


def standing(reservations: Iterable[Reservation], name: str, *, now: int) -> Reservation | None:
    """The reservation of that name or id that has a window to come."""
    found = (one for one in reservations if name in (one.name, one.id) and one.window(after=now) is not None)
    return next(found, None)


def planned_reservation(
    given: ReservationIn, *, identity: ReservationId, project: ProjectId, by: str, now: int
) -> Reservation:
    """The reservation as it was asked for, with the nodes still to be chosen. Raises: InvalidRequest."""
    if given.nodes and given.node:
        mend = "Leave one of the two out."
        raise InvalidRequest("Give the number of nodes or their names.", field="nodes", value=given.nodes, mend=mend)
    if not given.nodes and not given.node:
        raise InvalidRequest(
            "It does not say which nodes.", field="nodes", value=0, mend="Give their number, or name each as node."
        )
    if given.node and (given.gpus is not None or given.labels):
        field = "gpus" if given.gpus is not None else "labels"
        mend = f"Leave {field} out, or give a number of nodes."
        raise InvalidRequest("Nodes that are named are not chosen.", field=field, mend=mend)
    start = given.start.at(now)
    check_times(start, start + given.duration, every=given.every, until=given.until.at(now), now=now)
    return Reservation(
        id=identity,
        name=given.name,
        project_id=project,
        node_ids=(NodeId("*"),),
        starts_ns=start,
        ends_ns=start + given.duration,
        every_ns=given.every,
        until_ns=given.until.at(now),
        created_by=by,
    )


def check_times(start: int, end: int, *, every: int, until: int, now: int) -> None:
    """Nothing for times of a reservation, in ns, that can be kept. Raises: InvalidRequest that names the field."""
    if start < now:
        raise InvalidRequest(
            f"It would have started {format_duration(now - start)} ago.",
            field="start",
            mend="Write a time to come, or now.",
        )
    if every and every < end - start:
        raise InvalidRequest(
            f"A window of {format_duration(end - start)} would still be open when it comes again.",
            field="every",
            value=format_duration(every),
            mend=f"Write {format_duration(end - start).replace(' ', '')} or longer, or make the window shorter.",
        )
    if until and not every:
        raise InvalidRequest(
            "Only what comes again has an end to that.", field="until", mend="Add every, or leave it out."
        )
    if until and until <= start:
        raise InvalidRequest("It is over before it starts.", field="until", mend="Write a time after the start.")


# -- what a spec waits for ------------------------------------------------------------------------------------------


def check_reservation(spec: WorkloadSpec, project: Project, reservations: Iterable[Reservation], *, now: int) -> None:
    """Nothing for a spec that names a reservation of its project that it fits into. Raises: InvalidSpec."""
    own = [one for one in reservations if one.project_id == project.id]
    found = next((one for one in own if one.name == spec.reservation and one.window(after=now) is not None), None)
    if found is None:
        raise InvalidSpec(
            f"Project {project.name} has no reservation {spec.reservation} with a window to come.",
            field="reservation",
            value=spec.reservation,
            mend="See tidemill reserve list.",
        )
    length = found.ends_ns - found.starts_ns
    if spec.max_duration_ns > length:
        raise InvalidSpec(
            f"A window of reservation {found.name} is {format_duration(length)} long.",
            field="max_duration",
            value=format_duration(spec.max_duration_ns),
            mend="Write a max_duration that fits into it, or leave it out.",
        )


def check_group(group: Group, project: Project, workloads: Iterable[Workload]) -> None:
    """Nothing for a group of which others say the same size. Raises: InvalidSpec."""
    for workload in workloads:
        other = workload.spec.group
        if workload.project_id == project.id and other and other.name == group.name and other.size != group.size:
            raise InvalidSpec(
                f"{workload.spec.name} says that group {group.name} has {other.size} jobs.",
                field="group.size",
                value=group.size,
                mend=f"Write {other.size}, or name another group.",
            )


def why_group_never(world: World, asked: Sequence[Workload]) -> Reason | None:
    """Why a group can never start, as far as its jobs are known, if these workloads are submitted one after the other;
    None when it may, or when they are of no group."""
    before: dict[str, list[Workload]] = {}
    for workload in asked:
        group = workload.spec.group
        if group is None:
            continue
        if group.name not in before:
            before[group.name] = waiting_of_group(world, workload.project_id, group.name)
        members = before[group.name]
        for _ in range(workload.spec.job_count):
            members.append(workload)
            if len(members) == group.size and (reason := why_never_together(world, members)) is not None:
                return reason
            if len(members) == group.size:
                members.clear()
        if members and (reason := why_never_together(world, members)) is not None:
            return reason
    return None


def waiting_of_group(world: World, project: ProjectId, name: str) -> list[Workload]:
    """The workload of each job of a group that has not started, as far as they begin one that is not complete."""
    jobs = [
        job
        for job in world.jobs.values()
        if job.project_id == project
        and job.state is JobState.QUEUED
        and not job.attempts
        and (group := world.workloads[job.workload_id].spec.group) is not None
        and group.name == name
    ]
    if not jobs:
        return []
    jobs.sort(key=lambda job: (job.submitted_ns, job.id))
    found = [world.workloads[job.workload_id] for job in jobs]
    size = found[0].spec.group.size if found[0].spec.group is not None else 1
    return found[len(found) // size * size :]


def check_dependency(dependency: Dependency, workload: Workload, jobs: Sequence[Job]) -> None:
    """Nothing for a workload that may still end as it has to. Raises: InvalidSpec."""
    states = {job.state for job in jobs}
    is_over = states <= {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    name = workload.spec.name
    if dependency.on is DependsOn.OK and states & {JobState.FAILED, JobState.CANCELLED}:
        raise InvalidSpec(
            f"{name} did not end well.",
            field="after",
            value=name,
            mend="Run it again first, or write after: {any: [" + name + "]}.",
        )
    if dependency.on is DependsOn.FAILED and is_over and states == {JobState.SUCCEEDED}:
        raise InvalidSpec(
            f"{name} ended well.",
            field="after",
            value=name,
            mend="Leave it out: what was to follow its failure need not.",
        )


# -- the quota tree -------------------------------------------------------------------------------------------------


def queues_from(
    given: Sequence[QueueIn],
    *,
    known: Iterable[Queue],
    projects: Iterable[Project],
    organization: OrganizationId,
) -> tuple[Queue, ...]:
    """The queues that an organization's administrator describes, with what they call by name found.

    ``known`` are the organization's queues as they are. Raises: InvalidRequest that names the field.
    """
    by_project = {project.name: project for project in projects} | {project.id: project for project in projects}
    by_name = {queue.name: queue for queue in known}
    ids: dict[str, QueueId] = {queue.name: queue.id for queue in by_name.values()}
    seen: set[str] = set()
    for one in given:
        if one.name in seen:
            field, mend = f"queues.{one.name}.name", "Give each queue a name of its own."
            raise InvalidRequest("A queue of that name is there twice.", field=field, value=one.name, mend=mend)
        seen.add(one.name)
        ids[one.name] = _own_id(one, by_project, by_name, organization)
    made = []
    for one in given:
        if one.parent and one.parent not in ids:
            raise InvalidRequest(
                f"There is no queue {one.parent}.",
                field=f"queues.{one.name}.parent",
                value=one.parent,
                mend=_names(ids, one.name),
            )
        _check_amounts(one)
        try:
            made.append(
                Queue(
                    id=ids[one.name],
                    name=one.name,
                    parent_id=ids[one.parent] if one.parent else QueueId(""),
                    project_id=by_project[one.project].id if one.project else ProjectId(""),
                    weight_milli=one.weight,
                    guaranteed=one.guaranteed,
                    limit=one.limit,
                    max_running=one.max_running,
                    max_queued=one.max_queued,
                )
            )
        except ValueError as error:
            raise InvalidRequest(_sentence(error), field=f"queues.{one.name}", mend="Change one of the two.") from error
    return tuple(made)


def _check_amounts(one: QueueIn) -> None:
    limits = dict(one.limit)
    for name, amount in one.guaranteed:
        if amount > limits.get(name, amount):
            raise InvalidRequest(
                f"{one.name} would be guaranteed more than it may hold.",
                field=f"queues.{one.name}.guaranteed.{name}",
                value=amounts_json(((name, amount),))[name],
                mend="Guarantee less, or raise the limit.",
            )


def _own_id(
    one: QueueIn, projects: Mapping[str, Project], known: Mapping[str, Queue], organization: OrganizationId
) -> QueueId:
    """The id of a queue: its project's own, or one made of its organization and name."""
    before = known.get(one.name)
    if not one.project:
        if before is not None and before.project_id:
            raise InvalidRequest(
                f"{one.name} is the queue of a project.",
                field=f"queues.{one.name}.project",
                value="",
                mend="Name that project, or call this queue otherwise.",
            )
        return QueueId(f"que_{organization.partition('_')[2] or organization}/{one.name}")
    project = projects.get(one.project)
    if project is None:
        raise InvalidRequest(
            f"There is no project {one.project}.",
            field=f"queues.{one.name}.project",
            value=one.project,
            mend=_names({name: None for name, each in projects.items() if name == each.name}, ""),
        )
    mine = queue_id(project.id)
    if before is not None and before.id != mine:
        raise InvalidRequest(
            f"{one.name} is not the queue of project {project.name}.",
            field=f"queues.{one.name}.project",
            value=one.project,
            mend="Call the project's queue otherwise.",
        )
    return mine


def is_of(queue: Queue, organization: OrganizationId, projects: Iterable[Project]) -> bool:
    """Whether a queue belongs to an organization, whose projects these are."""
    if queue.project_id:
        return any(project.id == queue.project_id for project in projects)
    return queue.id.startswith(f"que_{organization.partition('_')[2] or organization}/")


def check_tree(
    queues: Iterable[Queue], others: Iterable[Queue], projects: Iterable[Project], nodes: Iterable[Node]
) -> None:
    """Nothing for a tree that can be used. ``others`` are another organization's queues, whose names are not told.

    Raises: InvalidRequest that names field, value and mend.
    """
    hidden = [replace(queue, name=f"another-{number}") for number, queue in enumerate(others, 1)]
    capacity = capacity_of(nodes)
    reason = why_not_tree([*queues, *hidden], projects, capacity or None)
    if reason is not None:
        raise InvalidRequest(
            reason.sentence,
            field=reason.subject,
            value=reason.needed or None,
            mend=_TREE_MENDS.get(reason.code, "Change the tree, and apply it again."),
            reason=reason.code,
        )


def capacity_of(nodes: Iterable[Node]) -> dict[str, int]:
    """What machines have together, by device model, ``cpu`` and ``memory``; those that left the cloud have nothing."""
    found: dict[str, int] = {}
    for node in nodes:
        if has_left(node):
            continue
        found[CPU] = found.get(CPU, 0) + node.cpu_milli
        found[MEMORY] = found.get(MEMORY, 0) + node.memory_bytes
        for device in node.devices:
            found[device.model] = found.get(device.model, 0) + MILLI
    return found


def with_limits(queue: Queue, *, gpu_milli: int, cpu_milli: int) -> Queue:
    """A project's queue with these limits of GPUs and CPU; zero does not limit. Other limits stay."""
    kept = [(name, amount) for name, amount in queue.limit if name not in ("gpu", CPU)]
    new = [(name, amount) for name, amount in (("gpu", gpu_milli), (CPU, cpu_milli)) if amount]
    return replace(queue, limit=tuple(sorted([*kept, *new])))


_TREE_MENDS: Final = {
    "QueueNameTaken": "Give each queue a name of its own.",
    "UnknownParentQueue": "Name a queue that is there, or leave parent out.",
    "UnknownProject": "Make it first: tidemill project create NAME.",
    "ProjectHasTwoQueues": "Leave one of them out.",
    "ProjectQueueHasChildren": "Give them the same parent.",
    "QueueCycle": "Leave the parent of one of them out.",
    "GuaranteesAboveParent": "Guarantee less below, or more above.",
    "GuaranteesAboveFleet": "Guarantee less; see tidemill nodes for what there is.",
}


def limits_told(reason: Reason) -> str:
    """What to do about too many waiting jobs."""
    return f"Wait until some have started, or have it raised: tidemill share set {reason.subject} --max-queued N."


def _names(known: Mapping[str, object], besides: str) -> str:
    names = sorted(name for name in known if name != besides)
    return f"There are {', '.join(names[:20])}." if names else "There is none yet."


def _sentence(error: ValueError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + "."
