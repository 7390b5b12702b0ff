"""From what somebody wrote to a spec, or to all that is wrong with it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from time import time_ns
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from tidemill.errors import InvalidSpec
from tidemill.model.spec import WorkloadSpec
from tidemill.wire.checks import MAX_ERRORS, shown
from tidemill.wire.contradictions import contradictions
from tidemill.wire.parts import (
    AlternativeIn,
    ArrayIn,
    CheckpointIn,
    DataIn,
    EnvironmentIn,
    GroupIn,
    ModelIn,
    ResourcesIn,
    RetryIn,
    SlurmIn,
    VolumeIn,
)
from tidemill.wire.placement import PlacementIn
from tidemill.wire.section import fields_of, invalid, problem
from tidemill.wire.service import (
    CanaryIn,
    HoursIn,
    LivenessIn,
    PriceIn,
    ReadinessIn,
    RollbackIn,
    RolloutIn,
    ScalingIn,
    ServiceIn,
    TimeoutsIn,
)
from tidemill.wire.workload import WorkloadSpecIn


def read_spec(given: object, default_name: str, *, now: int | None = None) -> WorkloadSpec:
    """The spec behind a mapping. Raises: InvalidSpec; ``data["errors"]`` lists every mistake.

    Times such as ``in 2h`` count from ``now`` (ns); None: from this moment.

    >>> read_spec({"run": "echo hello"}, "hello").name
    'hello'
    """
    return read_request(given).to_model(default_name, now=now)


def read_request(given: object) -> WorkloadSpecIn:
    """The spec as it was written, every field of it in order. Raises: as ``read_spec``."""
    try:
        return WorkloadSpecIn.model_validate(given)
    except ValidationError as error:
        raise _explain(error, given) from None


class _AsWritten:
    """A spec that is partly wrong, for the checks between fields."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        value = self._given.get(name)
        if name == "kind":
            return value if type(value) is str else None
        return value


def _explain(error: ValidationError, given: object) -> InvalidSpec:
    problems = [_translated(item) for item in error.errors(include_url=False)[:MAX_ERRORS]]
    if type(given) is dict:
        spoken = {told["field"].partition(".")[0] for told in problems}
        problems += [
            found
            for found in contradictions(set(given), _AsWritten(given), time_ns())
            if found["field"].partition(".")[0] not in spoken and "kind" not in spoken
        ]
    return invalid(problems)


def _translated(item: Any) -> dict[str, Any]:
    field = ".".join(str(part) for part in item["loc"])
    value = item["input"]
    match item["type"]:
        case "refused":
            detail, mend = item["ctx"]["detail"], item["ctx"]["mend"]
        case "extra_forbidden":
            detail, mend, value = _unknown(item["loc"])
        case "missing":
            detail, mend, value = "It is needed.", f"Write {field}.", None
        case "model_type" | "dict_type" | "model_attributes_type":
            names = ", ".join(_fields_at(item["loc"]))
            detail, mend = f"{shown(value)} is not a mapping.", f"Write a mapping with {names}."
        case _:
            detail, mend = f"{item['msg']}.", ""
    return problem(field, plain(value), detail, mend)


def plain(value: object) -> Any:
    """The value as it can be shown in an answer."""
    if type(value) is str:
        return value if len(value) <= 200 else value[:200] + "…"
    if value is None or type(value) is bool or (type(value) is int and value.bit_length() <= 63):
        return value
    return value if type(value) is float and math.isfinite(value) else shown(value)


SECTIONS: Final[Mapping[tuple[str, ...], type[BaseModel]]] = {
    (): WorkloadSpecIn,
    ("resources",): ResourcesIn,
    ("env",): EnvironmentIn,
    ("service",): ServiceIn,
    ("service", "readiness"): ReadinessIn,
    ("service", "liveness"): LivenessIn,
    ("service", "rollout"): RolloutIn,
    ("service", "rollout", "canary"): CanaryIn,
    ("service", "rollout", "rollback"): RollbackIn,
    ("service", "timeouts"): TimeoutsIn,
    ("service", "scaling"): ScalingIn,
    ("service", "scaling", "schedule"): HoursIn,
    ("service", "price"): PriceIn,
    ("array",): ArrayIn,
    ("retry",): RetryIn,
    ("checkpoint",): CheckpointIn,
    ("slurm",): SlurmIn,
    ("placement",): PlacementIn,
    ("group",): GroupIn,
    ("resources", "any_of"): AlternativeIn,
    ("data",): DataIn,
    ("model",): ModelIn,
    ("volumes",): VolumeIn,
}


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    section = SECTIONS.get(tuple(part for part in location if isinstance(part, str)))
    return list(fields_of(section)) if section is not None else []


_MISPLACED: Final[Mapping[str, str]] = {
    name: ".".join((*place, name)) for place, section in reversed(list(SECTIONS.items())) for name in fields_of(section)
}
_FOREIGN: Final = {
    "command": "run",
    "cmd": "run",
    "script": "run",
    "num_nodes": "nodes",
    "workers": "nodes",
    "gpu": "resources.gpus",
    "accelerators": "resources.gpus",
    "mem": "resources.memory",
    "cpu": "resources.cpus",
    "timeout": "max_duration",
    "time": "max_duration",
    "environment": "envs",
    "env_vars": "envs",
    "pip": "env.packages",
    "requirements": "env.packages",
    "docker": "image",
    "tags": "labels",
    "replicas": "service.replicas",
    "working_dir": "workdir",
    "tier": "capacity",
    "preemptible": "spot",
    "depends_on": "after",
    "dependencies": "after",
    "dependency": "after",
    "deadline": "start_before",
    "begin": "start_after",
    "min_nodes": "nodes",
    "node_selector": "placement.labels",
    "tolerations": "placement.tolerations",
    "affinity": "placement",
    "topology": "placement.within",
    "alternatives": "resources.any_of",
    "walltime": "max_duration",
    "duration": "expected_duration",
    "datasets": "data",
    "file_mounts": "data",
    "mounts": "volumes",
}


def _unknown(location: tuple[Any, ...]) -> tuple[str, str, None]:
    """Detail and mend for a field that there is not: the nearest name, here or elsewhere."""
    name, here = str(location[-1]), _fields_at(location[:-1])
    where = f" in {'.'.join(str(part) for part in location[:-1])}" if location[:-1] else ""
    near = difflib.get_close_matches(name, here, 1)
    other = None if location[:-1] and near else _MISPLACED.get(name) or _FOREIGN.get(name.lower())
    if not location[:-1] and name.lower() in _FOREIGN:
        near = []
    meant = " or ".join(dict.fromkeys((*near, other) if other else near))
    mend = f"Did you mean {meant}?" if meant else f"Fields are {', '.join(here)}."
    return f"There is no field {shown(name)}{where}.", mend, None
