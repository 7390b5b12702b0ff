"""④ A job that fits is started: devices are leased, ports chosen, and the launch of every worker commanded."""

from __future__ import annotations

from zlib import crc32

from tidemill.core.lifecycle import JOB, apply
from tidemill.core.meter import meters_held
from tidemill.core.outcome import Outcome
from tidemill.core.place import Place, Placed
from tidemill.core.world import World
from tidemill.model.ids import NodeId, attempt_id, launch_id
from tidemill.model.job import Allocation, AllocationState, Attempt, AttemptState, Job
from tidemill.model.plan import Launch

RENDEZVOUS_PORTS = range(20_000, 30_000)
SERVICE_PORTS = range(30_000, 32_768)


def start(world: World, job: Job, placed: Placed, out: Outcome) -> None:
    """Lease the places, whose room is taken already, to a new attempt of the job."""
    attempts = job.attempts + 1
    number = job.fence_base + attempts
    places = placed.places
    attempt = Attempt(
        id=attempt_id(job.id, number),
        job_id=job.id,
        number=number,
        state=AttemptState.STARTING,
        version=1,
        placed_ns=out.now,
        workers=len(places),
        rendezvous_port=_free_port(world, places[0].node_id, f"{job.id}/{number}", RENDEZVOUS_PORTS),
        choice=placed.choice,
        next_rank=len(places),
    )
    world.add(world.attempts, job.id, attempt)
    _lease(world, job, attempt, places, 0, out)
    world.update(world.jobs, job.id, job, state=apply(JOB, job.state, "placed"), attempts=attempts)
    world.drop(world.reasons, job.id)
    world.line_up(job.project_id, -1)
    _remember_growable(world, job, len(places))
    nodes = dict.fromkeys(world.nodes[place.node_id].name for place in places)
    where: dict[str, str] = {}
    if len(world.fleet.site_ids) > 1:  # the evidence of where it was
        at = dict.fromkeys(world.sites[world.nodes[place.node_id].site_id].name for place in places)
        where = {"sites": ",".join(at)}
    out.note("Placed", job, attempt=number, workers=len(places), nodes=",".join(nodes), **where)


def grow(world: World, job: Job, attempt: Attempt, places: tuple[Place, ...], out: Outcome) -> None:
    """Lease more places to a running elastic gang. Ranks go on counting: none is given twice in an attempt."""
    first, workers = attempt.next_rank, attempt.workers + len(places)
    after = world.update(world.attempts, job.id, attempt, next_rank=first + len(places), workers=workers)
    _lease(world, job, after, places, first, out)
    _remember_growable(world, job, workers)
    out.note("Grew", job, attempt=attempt.number, workers=workers)


def _remember_growable(world: World, job: Job, workers: int) -> None:
    if workers < world.workloads[job.workload_id].spec.nodes:
        world.set(world.growable, job.id, None)
    else:
        world.drop(world.growable, job.id)


def _lease(world: World, job: Job, attempt: Attempt, places: tuple[Place, ...], first_rank: int, out: Outcome) -> None:
    spec = world.workloads[job.workload_id].spec
    resources = spec.choices[attempt.choice]
    launches = list(world.workers.get(attempt.id, ()))
    for rank, place in enumerate(places, first_rank):
        launch = launch_id(attempt.id, rank)
        ports = tuple(
            (port.name, port.number or _free_port(world, place.node_id, f"{launch}/{port.name}", SERVICE_PORTS))
            for port in spec.ports
        )
        allocation = Allocation(
            id=launch,
            attempt_id=attempt.id,
            job_id=job.id,
            project_id=job.project_id,
            rank=rank,
            node_id=place.node_id,
            state=AllocationState.RESERVED,
            version=1,
            fence=attempt.number,
            cpu_milli=resources.cpu_milli,
            memory_bytes=resources.memory_bytes,
            held_ns=out.now,
            devices=place.devices,
            ports=(*ports, ("rendezvous", attempt.rendezvous_port)) if rank == 0 else ports,
        )
        out.cut(world, place.node_id, meters_held(allocation))
        world.add(world.allocations, launch, allocation)
        world.hold(allocation)
        if world.nodes[place.node_id].has_others:
            out.count_others(world, place.node_id)
        out.commands.append(Launch(launch_id=launch, node_id=place.node_id))
        launches.append(launch)
    world.set(world.workers, attempt.id, tuple(launches))


def _free_port(world: World, node: NodeId, key: str, ports: range) -> int:
    """A port of the range that no live worker of the node was given; the same for the same question.

    Whether something else on the machine has it is found out by the runner, and the attempt is then repeated
    with another.
    """
    taken = world.ports.get(node, {})
    first = crc32(key.encode()) % len(ports)
    if ports[first] not in taken:
        return ports[first]
    return next(port for step in range(len(ports)) if (port := ports[(first + step) % len(ports)]) not in taken)
