"""The launch spec of a worker, made from the world's values when its command is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tidemill.control.identity import Directory
from tidemill.core.environment import worker_environment
from tidemill.core.world import World
from tidemill.errors import InvalidSpec, NotFound
from tidemill.model.artifact import Artifact
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId, ProjectId
from tidemill.model.job import Allocation, Attempt, Cause, DeviceShare
from tidemill.model.plan import GangPlace, LaunchSpec
from tidemill.model.spec import Port, WorkloadSpec
from tidemill.model.storage import DataMount
from tidemill.ports import Store


def build_launch(
    launch_id: LaunchId,
    *,
    world: World,
    store: Store,
    directory: Directory,
    api_url: str,
    is_leased: Callable[[NodeId], bool],
) -> LaunchSpec:
    """All that the engine needs to start that worker. Raises: NotFound when it is over."""
    held = world.allocations.get(launch_id)
    if held is None or (attempt := world.attempts.get(held.job_id)) is None or attempt.id != held.attempt_id:
        raise NotFound("That launch is over.", field="launch", value=launch_id)
    job = world.jobs[held.job_id]
    workload = world.workloads[job.workload_id]
    spec = workload.spec
    gang = [held] if attempt.workers == 1 else _gang(world, store, attempt, is_elastic=spec.is_elastic)
    nodes = [world.nodes[worker.node_id] for worker in gang]
    runner_token, job_token = directory.launch_tokens(
        launch_id,
        organization=workload.organization_id,
        project=workload.project_id,
        principal=workload.principal_id,
    )
    chosen = dict(held.ports)
    return LaunchSpec(
        launch_id=launch_id,
        job_id=job.id,
        project_id=job.project_id,
        node_id=held.node_id,
        fence=held.fence,
        rank=held.rank,
        world_size=attempt.workers,
        setup=spec.setup,
        run=spec.run,
        environment=spec.environment,
        image=spec.image,
        environment_variables=worker_environment(workload, job, attempt, held, nodes, api_url=api_url),
        secrets=spec.secrets,
        workdir=spec.workdir,
        inputs=tuple((name, find_input(store, job.project_id, ref).digest) for name, ref in spec.inputs),
        devices=tuple((_named(share), share.milli) for share in held.devices),
        cpu_milli=held.cpu_milli,
        memory_bytes=held.memory_bytes,
        disk_bytes=spec.choices[attempt.choice].disk_bytes,
        ports=tuple(Port(name=port.name, number=chosen[port.name]) for port in spec.ports),
        service=spec.service,
        rendezvous_port=attempt.rendezvous_port,
        max_duration_ns=spec.max_duration_ns,
        grace_ns=spec.checkpoint_grace_ns,
        api_url=api_url,
        runner_token=runner_token,
        job_token=job_token,
        gang=tuple(_place(worker) for worker in gang) if len(gang) > 1 else (),
        data=tuple(_here(mount, world.nodes[held.node_id]) for mount in spec.data),
        volumes=spec.volumes,
        slurm=_for_slurm(spec),
        lease_ns=world.sites[world.nodes[held.node_id].site_id].lease_ns if is_leased(held.node_id) else 0,
    )


def _for_slurm(spec: WorkloadSpec) -> tuple[tuple[str, str], ...]:
    """What Slurm is told: the partitions are those of the nodes that may have it."""
    partitions = dict(spec.placement.labels).get("partition", "").replace("|", ",")
    return (*spec.slurm, ("partition", partitions)) if partitions else spec.slurm


def _gang(world: World, store: Store, attempt: Attempt, *, is_elastic: bool) -> list[Allocation]:
    """The workers of an attempt by rank, those that have ended too; the store is asked when some have."""
    live = [world.allocations.get(one) for one in world.workers.get(attempt.id, ())]
    gang = [worker for worker in live if worker is not None]
    if is_elastic or len(gang) != attempt.workers:
        gang = [worker for worker in store.allocations(attempt.job_id) if worker.attempt_id == attempt.id]
        gang = [worker for worker in gang if worker.cause is not Cause.RESIZED]
    return sorted(gang, key=lambda worker: worker.rank)


def _here(mount: DataMount, node: Node) -> DataMount:
    """The data set as that node gets it: its home is told only where that is."""
    is_here = mount.home.startswith("/") and mount.site_id == node.site_id and mount.node in ("", node.name)
    return mount if is_here else replace(mount, home="")


def _place(worker: Allocation) -> GangPlace:
    return GangPlace(
        node_id=worker.node_id,
        cpu_milli=worker.cpu_milli,
        gpu_milli=sum(share.milli for share in worker.devices),
        memory_bytes=worker.memory_bytes,
    )


def _named(share: DeviceShare) -> str:
    """How a launch names a device: by its id, a MIG slice of one as ``GPU/PROFILE@FIRST``."""
    return f"{share.device_id}/{share.profile}@{share.slice}" if share.profile else share.device_id


def find_input(store: Store, project_id: ProjectId, reference: str) -> Artifact:
    """The artifact behind ``name[:version]``, the newest without a version.

    Raises: InvalidSpec when there is none or the version is not a number.
    """
    name, _, version = reference.partition(":")
    if version and not version.isdigit():
        raise InvalidSpec(
            f"{version!r} is not a version number.", field="inputs", value=reference, mend="Write name:3."
        )
    artifact = store.find_artifact(project_id, name, int(version or 0))
    if artifact is None:
        raise InvalidSpec(
            f"There is no artifact {reference}.", field="inputs", value=reference, mend="See tidemill artifact list."
        )
    return artifact
