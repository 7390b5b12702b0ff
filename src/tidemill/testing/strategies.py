"""Hypothesis strategies: model values with all that their types allow, and histories for ``testing.history``."""

from __future__ import annotations

from typing import Any, Final, get_type_hints

from hypothesis import strategies as st
from msgspec import Struct

from tidemill.model.artifact import Artifact
from tidemill.model.cloud import Rental
from tidemill.model.events import LogEntry
from tidemill.model.fleet import DeliveryMark, Device, Level, Node
from tidemill.model.job import Allocation, Attempt, DeviceShare, Job, Workload
from tidemill.model.ledger import LedgerLine, UsageInterval
from tidemill.model.limits import LIMITS, Limit, limits_of
from tidemill.model.plan import Reason
from tidemill.model.queue import Queue, QueueUsage
from tidemill.model.registry import Alias, Lineage, Model, ModelCard, ModelVersion, Placing
from tidemill.model.reservation import Reservation
from tidemill.model.resources import GpuRequest, Resources
from tidemill.model.rollout import Rollout
from tidemill.model.spec import (
    MAX_WORKERS,
    Alternative,
    Dependency,
    Environment,
    Group,
    Kind,
    Placement,
    Port,
    RetryOn,
    RetryPolicy,
    Service,
    Tier,
    WorkloadSpec,
)
from tidemill.model.storage import DataMount, VolumeMount
from tidemill.model.tenant import Organization, Principal, Project, Secret, Token
from tidemill.ports import IdempotencyRecord
from tidemill.testing.history import Step
from tidemill.testing.samples import a_rental

TEXTS: Final = st.text(st.characters(codec="utf-8"), max_size=20)
"""Any text that can be written as UTF-8."""
NUMBERS: Final = st.integers(-(2**63), 2**63 - 1)
COUNTS: Final = st.integers(1, 2**63 - 1)
PAIRS: Final = st.lists(st.tuples(TEXTS, TEXTS), max_size=3).map(tuple)
NAMES: Final = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,8}[A-Za-z0-9])?", fullmatch=True)


def _built(kind: type[Any], **known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of a kind: fields by their types, with any texts and numbers where those are asked for."""
    names = kind.__struct_fields__ if issubclass(kind, Struct) else kind.__dataclass_fields__
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: known.get(name, st.from_type(hints[name])) for name in names})


def _tuples(of: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=size).map(tuple)


def workload_specs() -> st.SearchStrategy[WorkloadSpec]:
    """Specs of every kind."""
    gpus = st.one_of(
        st.none(),
        st.builds(GpuRequest, count=st.integers(1, 64), model=NAMES, memory_min_bytes=COUNTS),
        st.builds(GpuRequest, milli=st.integers(1, 999), model=NAMES),
        st.builds(GpuRequest, share_bytes=COUNTS, memory_max_bytes=COUNTS),
        st.builds(GpuRequest, count=st.integers(1, 7), profile=st.sampled_from(("1g.10gb", "3g.40gb", "1g.5gb+me"))),
    )
    resources = st.builds(Resources, gpus=gpus, cpu_milli=COUNTS, memory_bytes=COUNTS, disk_bytes=st.just(0) | COUNTS)
    placement = st.builds(
        Placement,
        labels=PAIRS,
        tolerations=_tuples(TEXTS),
        within=st.none() | st.sampled_from((Level.RACK, Level.BLOCK)),
        prefer=st.none() | st.sampled_from(Level),
        spread=st.none() | st.just(Level.HOST),
        apart=PAIRS,
    )
    service = Service(port="http", readiness_path="/health", model="m")
    return st.sampled_from(Kind).flatmap(
        lambda kind: st.builds(
            WorkloadSpec,
            kind=st.just(kind),
            name=NAMES,
            run=TEXTS.map(lambda text: "run " + text),
            setup=TEXTS,
            nodes=st.integers(1, MAX_WORKERS),
            resources=resources,
            environment=st.none() | st.builds(Environment, python=TEXTS, packages=_tuples(TEXTS)),
            envs=PAIRS,
            secrets=_tuples(NAMES),
            inputs=PAIRS,
            data=_tuples(st.builds(DataMount, dataset=NAMES, at=TEXTS, size=COUNTS), 2),
            volumes=_tuples(st.builds(VolumeMount, volume=NAMES, at=TEXTS, path=TEXTS), 2),
            ports=st.just((Port(name="http"), Port(name="debug", number=8_080))),
            service=st.just(service) if kind is Kind.SERVICE else st.none(),
            array_size=st.integers(1, 100_000),
            max_duration_ns=COUNTS,
            retry=st.builds(
                RetryPolicy,
                on=_tuples(st.sampled_from(RetryOn)),
                exit_codes=_tuples(st.integers(1, 255)),
                max=st.integers(0, 1_000),
            ),
            priority=st.integers(-1_000, 1_000),
            labels=PAIRS,
            any_of=_tuples(st.builds(Alternative, resources=resources, speed_milli=COUNTS), 2),
            by_speed=st.booleans(),
            tier=st.sampled_from((Tier.SPOT, Tier.ON_DEMAND)),
            placement=placement,
            group=st.none() | st.builds(Group, name=NAMES, size=st.integers(2, MAX_WORKERS)),
            after=_tuples(_built(Dependency)),
            expected_duration_ns=st.just(0) | COUNTS,
            start_after_ns=st.integers(0, 2**62),
            start_before_ns=st.just(0) | st.integers(2**62 + 1, 2**63 - 1),
            array_parallel=st.integers(0, 100_000),
        )
    )


def limits() -> st.SearchStrategy[tuple[Limit, ...]]:
    """Limits of requests to models."""
    amounts = st.dictionaries(st.sampled_from(LIMITS), st.integers(0, 10**6), max_size=4)
    return amounts.map(limits_of)


def queues() -> st.SearchStrategy[Queue]:
    """Places in a quota tree, each by itself."""
    classes = st.sampled_from(("cpu", "memory", "gpu", "gpu:H100", "gpu:RTX 4090"))
    amounts = st.dictionaries(classes, st.integers(0, 2**63 - 1), max_size=3)
    return st.builds(
        lambda limit, **fields: Queue(
            limit=tuple(sorted(limit.items())),
            guaranteed=tuple((name, amount // 2) for name, amount in sorted(limit.items())),
            **fields,
        ),
        limit=amounts,
        id=TEXTS.map(lambda text: "que_" + text),
        name=NAMES,
        version=COUNTS,
        parent_id=TEXTS,
        project_id=TEXTS,
        weight_milli=COUNTS,
        max_running=st.just(0) | COUNTS,
        max_queued=st.just(0) | COUNTS,
    ).filter(lambda queue: queue.id != queue.parent_id)


def reservations() -> st.SearchStrategy[Reservation]:
    """Reservations, once and recurring."""
    return _built(
        Reservation,
        node_ids=st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        starts_ns=st.integers(0, 2**62),
        ends_ns=st.integers(2**62 + 1, 2**63 - 1),
        every_ns=st.sampled_from((0, 2**63 - 1)),
    )


def values() -> st.SearchStrategy[Any]:
    """Values of every kind that a store keeps."""
    devices = st.lists(_built(Device), max_size=3, unique_by=lambda device: device.id).map(tuple)
    return st.one_of(
        st.builds(
            Workload,
            id=TEXTS, organization_id=TEXTS, project_id=TEXTS, principal_id=TEXTS, spec=workload_specs(),
            submitted_ns=NUMBERS,
        ),
        _built(Job),
        _built(Attempt),
        _built(Allocation, devices=_tuples(_built(DeviceShare)), ports=_tuples(st.tuples(TEXTS, NUMBERS))),
        _built(Node, cpu_milli=COUNTS, memory_bytes=COUNTS, devices=devices, labels=PAIRS),
        _built(DeliveryMark),
        queues(),
        _built(QueueUsage, taken=_tuples(st.tuples(TEXTS, st.floats(allow_nan=False, allow_infinity=False)))),
        reservations(),
        _built(Model, tags=PAIRS, placings=_tuples(_built(Placing), 2), aliases=_tuples(_built(Alias), 2)),
        _built(ModelVersion, tags=PAIRS, metrics=PAIRS, card=_built(ModelCard), lineage=_built(Lineage)),
        _built(Rental, offer=st.just(a_rental(1).offer)),
        _built(Rollout),
        _built(LogEntry, body=_tuples(st.tuples(TEXTS, st.none() | st.booleans() | NUMBERS | TEXTS))),
        _built(LedgerLine, usage=_built(UsageInterval)),
        _built(Reason),
        _built(Artifact, metadata=PAIRS),
        _built(Secret, sealed=st.binary(max_size=64)),
        _built(Token, limits=limits()),
        _built(Organization),
        _built(Project, limits=limits()),
        _built(Principal),
        _built(IdempotencyRecord),
    )  # fmt: skip


def histories(*, max_steps: int = 12) -> st.SearchStrategy[list[Step]]:
    """Histories for ``testing.history.check_history``: mostly of commits that hold, some that must be refused."""
    rarely = st.integers(0, 9).map(lambda number: number == 9)
    few = st.integers(0, 4)
    return st.lists(
        st.builds(
            Step,
            submit=st.integers(0, 3),
            place=_tuples(few),
            move=_tuples(st.tuples(few, st.integers(0, 6))),
            wait=_tuples(st.tuples(few, st.integers(0, 2))),
            meter=_tuples(st.tuples(few, st.integers(1, 2**40))),
            rebook=st.just(()) | _tuples(st.tuples(few, st.integers(0, 1)), 1),
            notes=st.integers(0, 3),
            key=st.none() | few,
            lag=st.sampled_from((0, 0, 0, 0, 1, -1)),
            repeat=rarely,
            old_epoch=rarely,
            lead=rarely,
            reopen=rarely,
        ),
        max_size=max_steps,
    )
