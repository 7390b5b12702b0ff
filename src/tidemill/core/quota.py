"""① A project's limits: how much it may hold at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.resources import Resources
from tidemill.model.tenant import Project
from tidemill.units import MILLI


@dataclass(slots=True)
class Held:
    """What a project's jobs hold now, in milli-GPU and milli-CPU."""

    gpu_milli: int = 0
    cpu_milli: int = 0


def exceeds_limit(project: Project, resources: Resources, workers: int, held: Held | None = None) -> Reason | None:
    """Why a gang does not fit under the project's limits beside what it holds; None when it does.

    Without ``held``, why it never will.
    """
    need_gpu = (resources.gpus.total_milli if resources.gpus else 0) * workers
    need_cpu = resources.cpu_milli * workers
    for name, limit, need, has in (
        ("GPUs", project.limit_gpu_milli, need_gpu, held.gpu_milli if held else 0),
        ("CPU cores", project.limit_cpu_milli, need_cpu, held.cpu_milli if held else 0),
    ):
        if limit and need + has > limit:
            in_use = f", {has / MILLI:g} in use" if held else ""
            return Reason(
                code="ProjectLimit",
                subject=project.name,
                needed=f"{need / MILLI:g} {name}",
                available=f"{max(limit - has, 0) / MILLI:g} of {limit / MILLI:g}",
                resolvable_by=ResolvableBy.TIME if held and need <= limit else ResolvableBy.POLICY,
                sentence=(
                    f"Project {project.name} may hold {limit / MILLI:g} {name} at once{in_use}; "
                    f"{need / MILLI:g} are asked for."
                ),
            )
    return None
