"""What the gateway serves by, and what it tells: routes and keys go out, what requests took comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tidemill.control.identity import Directory
from tidemill.control.projects import Projects
from tidemill.control.rationing import Rationing
from tidemill.control.replicating import Scaler, endpoints
from tidemill.core.world import World
from tidemill.model.ids import JobId
from tidemill.model.ledger import TokenUsage
from tidemill.model.limits import Limit, Priority
from tidemill.model.tenant import Token
from tidemill.ports import Store
from tidemill.units import SECOND_NS


class Serving:
    """The gateway's side of one control plane. Thread-safe: it reads the world and writes to the store."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        *,
        world: Callable[[], World],
        projects: Projects,
        scaler: Scaler,
        clock: Callable[[], int],
    ) -> None:
        self._store = store
        self._directory = directory
        self._world = world
        self._projects = projects
        self.scaler = scaler
        self.rationing = Rationing(store, directory, projects, clock=clock)

    @property
    def stamp(self) -> tuple[int, int, frozenset[JobId]]:
        """Another value whenever the feed changes for another reason than a commit."""
        return self._directory.version, self._projects.version, self.scaler.leaving

    def feed(self) -> tuple[str, dict[str, Any]]:
        """Everything the gateway needs: token hashes and where each model's ready replicas are, and its version."""
        world = self._world()
        routes: dict[str, dict[str, Any]] = {}
        leaving = self.scaler.leaving
        for workload_id in sorted(world.services.copy()):
            workload = world.workloads.get(workload_id)
            if workload is None or workload.spec.service is None:
                continue
            service = workload.spec.service
            route = routes.setdefault(
                service.model or workload.spec.name,
                {
                    "project": workload.project_id,
                    "service": workload.spec.name,
                    "workload": workload.id,
                    "health": service.readiness_path,
                    "concurrency": service.concurrency,
                    "wait_ms": service.wait_ns * 1000 // SECOND_NS,
                    "price": [service.price_input_micro, service.price_output_micro],
                    "is_salted": service.is_salted,
                    "replicas": [],
                },
            )
            if route["project"] == workload.project_id:
                route["replicas"] += [
                    {"job": held.job_id, "endpoint": held.endpoint, "is_leaving": held.job_id in leaving}
                    for held in endpoints(world, workload)
                ]
        known = {
            token.hash: {
                "id": token.id,
                "project": token.project_id,
                "organization": token.organization_id,
                "scopes": [scope.value for scope in token.scopes],
                "expires_ns": token.expires_ns,
                **_inference(token),
            }
            for token in self._directory.all()
            if not token.revoked_ns
        }
        projects = {one.id: {"limits": amounts(one.limits)} for one in self._projects.all() if one.limits}
        feed = {"tokens": known, "routes": routes, "projects": projects}
        version = hashlib.sha256(msgspec.json.encode(feed)).hexdigest()[:16]
        return version, feed

    def enter(self, usages: Sequence[TokenUsage]) -> int:
        """How many of these are in the ledger now that were not before; those of projects that are not known are left.

        It is the same however often they come.
        """
        known = self._projects.by_id
        return self.rationing.enter([usage for usage in usages if usage.project_id in known])


def amounts(limits: Sequence[Limit]) -> dict[str, int]:
    """Limits as the gateway reads them: exact, money in micro-USD."""
    return {limit.name: limit.amount for limit in limits}


def _inference(token: Token) -> dict[str, Any]:
    """What a token says of requests to models, as far as it says something."""
    said: dict[str, Any] = {}
    if token.models:
        said["models"] = list(token.models)
    if token.limits:
        said["limits"] = amounts(token.limits)
    if token.priority is not Priority.NORMAL:
        said["band"] = token.priority.band
    if token.label:
        said["label"] = token.label
    return said
