"""From a spec back to what somebody could have written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from tidemill.guards import reading as guards
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.spec import Dependency, DependsOn, Kind, Pace, Placement, Port, Service, Tier, WorkloadSpec
from tidemill.units import MILLI, SECOND_NS, USD_MICRO
from tidemill.wire.parts import default_retry
from tidemill.wire.rolling import rolling_json
from tidemill.wire.scaling import scaling_json
from tidemill.wire.scheduling import instant_text

_DEFAULT_RESOURCES: Final = Resources()
_DEFAULT_GRACE_NS: Final = 10 * SECOND_NS
_ANYWHERE: Final = Placement()
_SERVICE: Final = Service(port="")


def spec_to_json(spec: WorkloadSpec) -> dict[str, Any]:
    """The mapping that ``read_spec`` turns into ``spec`` again; what is at its default is left out."""
    written: dict[str, Any] = {"kind": spec.kind.value, "name": spec.name}
    if spec.nodes != 1:
        written["nodes"] = f"{spec.nodes_min}..{spec.nodes}" if spec.is_elastic else spec.nodes
    if spec.resources != _DEFAULT_RESOURCES or spec.any_of:
        written["resources"] = _resources_json(spec.resources)
    if spec.any_of:
        written["resources"]["any_of"] = [
            {**_resources_json(one.resources, whole=True), "speed": milli_json(one.speed_milli)} for one in spec.any_of
        ]
    if spec.by_speed and spec.any_of:
        written["resources"]["prefer"] = "speed"
    if spec.environment is not None:
        written["env"] = {"python": spec.environment.python, "packages": list(spec.environment.packages)}
    for name in ("image", "workdir", "setup", "run"):
        if value := getattr(spec, name):
            written[name] = value
    for name in ("envs", "inputs", "labels"):
        if pairs := getattr(spec, name):
            written[name] = dict(pairs)
    if data := [one for one in spec.data if not one.model]:
        written["data"] = [{"dataset": one.dataset, "at": one.at, "mode": one.mode.value} for one in data]
    for one in spec.data:
        if one.model:
            pinned = f"models:/{one.dataset.replace(':', '/')}" if one.dataset else one.model
            written["model"] = {"from": pinned, "at": one.at}
    if spec.volumes:
        written["volumes"] = [{"name": one.volume, "at": one.at, "read_only": one.read_only} for one in spec.volumes]
    if spec.secrets:
        written["secrets"] = list(spec.secrets)
    if spec.ports:
        written["ports"] = [_port_json(port) for port in spec.ports]
    if spec.service is not None:
        written["service"] = _service_json(spec.service)
    if spec.kind is Kind.ARRAY:
        written["array"] = {"size": spec.array_size}
        if spec.array_parallel:
            written["array"]["parallel"] = spec.array_parallel
    if spec.max_duration_ns:
        written["max_duration"] = _duration_json(spec.max_duration_ns)
    if spec.retry != default_retry(spec.kind):
        causes = [cause.value for cause in spec.retry.on]
        written["retry"] = {"on": [*causes, *(f"exit:{code}" for code in spec.retry.exit_codes)], "max": spec.retry.max}
    if spec.checkpoint_grace_ns != _DEFAULT_GRACE_NS:
        written["checkpoint"] = {"grace": _duration_json(spec.checkpoint_grace_ns)}
    if spec.slurm:
        written["slurm"] = dict(spec.slurm)
    if spec.priority:
        written["priority"] = spec.priority
    _write_schedule(spec, written)
    return written


def _routing_json(service: Service) -> dict[str, Any]:
    """How the gateway treats a service's requests, as far as it is not as usual."""
    written: dict[str, Any] = {}
    if service.affinity is not _SERVICE.affinity:
        written["affinity"] = service.affinity.value
    if service.fallback:
        written["fallback"] = list(service.fallback)
    if service.hedge_ns:
        written["hedge"] = _duration_json(service.hedge_ns)
    if service.timeouts != _SERVICE.timeouts:
        told = service.timeouts
        phases = {
            "connect": told.connect_ns, "first_byte": told.first_byte_ns, "between": told.between_ns,
            "whole": told.whole_ns,
        }  # fmt: skip
        written["timeouts"] = {name: _duration_json(length) for name, length in phases.items()}
    if service.http is not None:
        written["http"] = service.http
    return written


def _write_schedule(spec: WorkloadSpec, written: dict[str, Any]) -> None:
    if spec.expected_duration_ns:
        written["expected_duration"] = _duration_json(spec.expected_duration_ns)
    if spec.start_after_ns:
        written["start_after"] = instant_text(spec.start_after_ns)
    if spec.start_before_ns:
        written["start_before"] = instant_text(spec.start_before_ns)
    if spec.after:
        written["after"] = _after_json(spec.after)
    if spec.group is not None:
        written["group"] = {"name": spec.group.name, "size": spec.group.size}
    if spec.placement != _ANYWHERE:
        written["placement"] = _placement_json(spec.placement)
    if spec.reservation:
        written["reservation"] = spec.reservation
    elif spec.tier is not Tier.ON_DEMAND:
        written["capacity"] = spec.tier.value


def _after_json(after: tuple[Dependency, ...]) -> dict[str, list[str]]:
    by_end = {on: [str(one.workload_id) for one in after if one.on is on] for on in DependsOn}
    return {on.value: names for on, names in by_end.items() if names}


def _placement_json(placement: Placement) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for name in ("labels", "apart"):
        if pairs := getattr(placement, name):
            written[name] = dict(pairs)
    if placement.tolerations:
        written["tolerations"] = list(placement.tolerations)
    for name in ("within", "prefer", "spread"):
        if (level := getattr(placement, name)) is not None:
            written[name] = level.value
    if placement.across_sites:
        written["across_sites"] = True
    for name in ("sites", "countries", "kinds"):
        if values := getattr(placement.where, name):
            written[name] = [str(value) for value in values]
    if placement.weigh:
        written["weigh"] = {what.value: milli_json(part) for what, part in placement.weigh}
    if placement.near:
        written["near"] = placement.near
    return written


@lru_cache(maxsize=1_024)
def resources_json(resources: Resources) -> Mapping[str, Any]:
    """What a worker holds, as people write it; one shared mapping, to be read only."""
    return _resources_json(resources)


def _resources_json(resources: Resources, *, whole: bool = False) -> dict[str, Any]:
    """``whole``: also what is zero."""
    written: dict[str, Any] = {"gpus": gpus_text(resources.gpus), "cpus": milli_json(resources.cpu_milli)}
    if resources.memory_bytes or whole:
        written["memory"] = size_json(resources.memory_bytes)
    if resources.disk_bytes or whole:
        written["disk"] = size_json(resources.disk_bytes)
    return written


def milli_json(milli: int) -> int | float:
    whole, part = divmod(milli, MILLI)
    return milli / MILLI if part else whole


def gpus_text(request: GpuRequest | None) -> str:
    """The request in the mini-language, to the byte.

    >>> from tidemill.model.resources import parse_gpus
    >>> gpus_text(parse_gpus("24GB+:2"))
    '24GB+:2'
    """
    if request is None:
        return "none"
    low, high = request.memory_min_bytes, request.memory_max_bytes
    parts = [request.model] if request.model else []
    if low and low == high and request.model:
        parts.append(_size_text(low))
    elif high:
        parts.append(f"{_size_text(low)}..{_size_text(high)}")
    elif low:
        parts.append(f"{_size_text(low)}+")
    if request.profile:
        parts.append(request.profile)
    if request.share_bytes:
        parts.append(f"share {_size_text(request.share_bytes)}")
    else:
        parts.append(str(request.count) if request.milli == MILLI else f"0.{request.milli:03}".rstrip("0"))
    return ":".join(parts)


def size_json(size: int) -> str | int:
    return _size_text(size) if not size % 1024 else size


def _size_text(size: int) -> str:
    """A size with its unit, to the byte."""
    for unit, power in (("T", 4), ("G", 3), ("M", 2), ("K", 1)):
        if size and not size % 1024**power:
            return f"{size // 1024**power}{unit}B"
    whole, part = divmod(size, 1024)
    return f"{whole}.{part * 9_765_625:010}".rstrip("0").rstrip(".") + "KB"


def _duration_json(ns: int) -> str:
    for unit, factor in (("h", 3_600 * SECOND_NS), ("m", 60 * SECOND_NS), ("s", SECOND_NS), ("ms", 1_000_000)):
        if not ns % factor:
            return f"{ns // factor}{unit}"
    return f"{ns}ns"


def _service_json(service: Service) -> dict[str, Any]:
    readiness = {"path": service.readiness_path, "timeout": _duration_json(service.readiness_timeout_ns)}
    if service.readiness_pace != _SERVICE.readiness_pace:
        readiness |= _pace_json(service.readiness_pace)
    written: dict[str, Any] = {
        "port": service.port,
        "readiness": readiness,
        "replicas": f"{service.smallest}..{service.replicas}" if service.is_scaled else service.replicas,
        "model": service.model,
    }
    if service.liveness_pace is not None:
        written["liveness"] = {"path": service.liveness_path, **_pace_json(service.liveness_pace)}
    if service.idle_ns != _SERVICE.idle_ns:
        written["idle"] = _duration_json(service.idle_ns)
    if service.concurrency != _SERVICE.concurrency:
        written["concurrency"] = service.concurrency
    if service.wait_ns != _SERVICE.wait_ns:
        written["wait"] = _duration_json(service.wait_ns)
    if service.guards:
        written["guards"] = [guards.written(rule) for rule in service.guards]
    written |= _routing_json(service)
    if scaling := scaling_json(service.scaling, _duration_json):
        written["scaling"] = scaling
    if service.price_input_micro or service.price_output_micro:
        written["price"] = {
            "input": service.price_input_micro / USD_MICRO,
            "output": service.price_output_micro / USD_MICRO,
        }
    if not service.is_salted:
        written["cache_salt"] = False
    if service.rollout != _SERVICE.rollout:
        written["rollout"] = rolling_json(service.rollout, _duration_json)
    return written


def _pace_json(pace: Pace) -> dict[str, Any]:
    return {
        "delay": _duration_json(pace.delay_ns),
        "every": _duration_json(pace.every_ns),
        "answer": _duration_json(pace.answer_ns),
        "failures": pace.failures,
    }


def _port_json(port: Port) -> str | int | dict[str, Any]:
    if not port.number:
        return port.name
    return port.number if port.name == f"port-{port.number}" else {"name": port.name, "port": port.number}
