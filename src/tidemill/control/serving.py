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
from tidemill.control.rollouts import Rollouts, variant_of
from tidemill.core.routing import fallbacks
from tidemill.core.world import World
from tidemill.model.fleet import link_between
from tidemill.model.guard import Decision, GuardRule
from tidemill.model.ids import ProjectId, RolloutId, SiteId, WorkloadId
from tidemill.model.job import Allocation
from tidemill.model.ledger import TokenUsage
from tidemill.model.limits import Limit, Priority
from tidemill.model.spec import Affinity, Service, Timeouts
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
        rollouts: Rollouts,
        clock: Callable[[], int],
        home: SiteId,
        guards: Sequence[GuardRule] = (),
    ) -> None:
        """``home`` is the site that the gateways are at; ``guards`` are the settings' rules, for what they name."""
        self._store = store
        self._directory = directory
        self._world = world
        self._projects = projects
        self.scaler = scaler
        self.rollouts = rollouts
        self.rationing = Rationing(store, directory, projects, clock=clock)
        self._rules = tuple(guards)
        self._home = home

    @property
    def stamp(self) -> tuple[object, ...]:
        """Another value whenever the feed changes for another reason than a commit."""
        return (
            self._directory.version,
            self._projects.version,
            self.scaler.leaving,
            tuple(self.rollouts.weights.items()),
        )

    def _start_ms(self, workload_id: WorkloadId) -> int:
        """How long replicas of a service take to start, in whole seconds; zero while that is not known."""
        account = self.scaler.account(workload_id)
        return 0 if account is None else -(-account.lead_ns // SECOND_NS) * 1_000

    def feed(self) -> tuple[str, dict[str, Any]]:
        """Everything the gateway needs: token hashes and where each model's ready replicas are, and its version."""
        world = self._world()
        routes: dict[str, dict[str, Any]] = {}
        leaving = self.scaler.leaving
        chosen = self.fallbacks()
        for workload_id in sorted(world.services.copy()):
            workload = world.workloads.get(workload_id)
            if workload is None or workload.spec.service is None:
                continue
            service = workload.spec.service
            model = service.model or workload.spec.name
            route = routes.setdefault(
                model,
                {
                    "project": workload.project_id,
                    "service": workload.spec.name,
                    "workload": workload.id,
                    "health": service.readiness_path,
                    "concurrency": service.concurrency,
                    "wait_ms": _ms(service.wait_ns),
                    "start_ms": self._start_ms(workload_id),
                    "guards": self._guards(service.guards, workload.project_id, service.model or workload.spec.name),
                    "price": [service.price_input_micro, service.price_output_micro],
                    "is_salted": service.is_salted,
                    "replicas": [],
                    **_routing(service),
                    "fallback": fallbacks(model, chosen),
                },
            )
            if route["project"] != workload.project_id:
                continue
            each = {"health": service.readiness_path}
            rollout = world.rollouts.get(world.updating.get(workload_id, RolloutId("")))
            if rollout is not None:
                each |= {"variant": variant_of(rollout, workload_id), "workload": workload_id}
                if (weights := self.rollouts.weights.get(rollout.id)) is not None:
                    route.setdefault("weights", {})[each["variant"]] = weights[workload_id == rollout.workload_id]
                route["concurrency"] = min(route["concurrency"], service.concurrency)
            route["replicas"] += [
                {
                    "job": held.job_id,
                    "endpoint": held.endpoint,
                    "is_leaving": held.job_id in leaving,
                    "site": _site_of(world, held),
                    **each,
                }
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
                **self._residency(token),
            }
            for token in self._directory.all()
            if not token.revoked_ns
        }
        projects = {one.id: {"limits": amounts(one.limits)} for one in self._projects.all() if one.limits}
        feed = {"tokens": known, "routes": routes, "projects": projects, "sites": _sites(world), "home": self._home}
        version = hashlib.sha256(msgspec.json.encode(feed)).hexdigest()[:16]
        return version, feed

    def _residency(self, token: Token) -> dict[str, Any]:
        """Where a token's requests may be answered, as far as its project says something."""
        project = self._projects.by_id.get(token.project_id)
        return {"countries": list(project.countries)} if project is not None and project.countries else {}

    def fallbacks(self) -> dict[str, tuple[str, ...]]:
        """Which models each model that is served falls back to by its own choice."""
        world = self._world()
        services = [world.workloads.get(workload_id) for workload_id in sorted(world.services.copy())]
        return {
            one.spec.service.model or one.spec.name: one.spec.service.fallback
            for one in services
            if one is not None and one.spec.service is not None
        }

    def enter(self, usages: Sequence[TokenUsage]) -> int:
        """How many of these are in the ledger now that were not before; those of projects that are not known are left.

        It is the same however often they come.
        """
        known = self._projects.by_id
        return self.rationing.enter([usage for usage in usages if usage.project_id in known])

    def note_decisions(self, decisions: Sequence[Decision]) -> int:
        """How many decisions of guardrails are in the books now that were not before; it is the same when repeated."""
        known = self._projects.by_id
        return self._store.put_decisions([one for one in decisions if one.project_id in known])

    def _guards(self, own: Sequence[GuardRule], project_id: ProjectId, model: str) -> list[dict[str, Any]]:
        """The rules for a model: those of the settings first, then its service's own; each with a name of its own."""
        project = self._projects.by_id.get(project_id)
        names = {project_id, project.name} if project is not None else {project_id}
        general = [one for one in self._rules if any(one.concerns(project=name, model=model) for name in names)]
        taken = {rule.name for rule in general}
        return [
            {
                "name": f"{rule.name}.service" if place >= len(general) and rule.name in taken else rule.name,
                "kind": rule.kind,
                "action": rule.action.value,
                "on": [one.value for one in rule.on],
                "options": dict(rule.options),
            }
            for place, rule in enumerate([*general, *own])
        ]


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


def _routing(service: Service) -> dict[str, Any]:
    """How requests are sent to a service's replicas, as far as it is not as usual."""
    told: dict[str, Any] = {"is_open": service.is_open}
    if service.affinity is not Affinity.NONE:
        told["affinity"] = service.affinity.value
    if service.hedge_ns:
        told["hedge_ms"] = _ms(service.hedge_ns)
    if service.timeouts != Timeouts():
        given = service.timeouts
        told["timeouts_ms"] = {
            "connect": _ms(given.connect_ns),
            "first_byte": _ms(given.first_byte_ns),
            "between": _ms(given.between_ns),
            "whole": _ms(given.whole_ns),
        }
    return told


def _sites(world: World) -> dict[str, dict[str, Any]]:
    """Where each site is, and how far it is from the others that it is known to be linked with."""
    sites = dict(world.sites)
    return {
        site.id: {
            "country": site.country,
            "links": {
                other: link.latency_ns for other in sites if (link := link_between(sites, site.id, other)) is not None
            },
        }
        for site in sites.values()
    }


def _site_of(world: World, held: Allocation) -> str:
    node = world.nodes.get(held.node_id)
    return node.site_id if node is not None else ""


def _ms(ns: int) -> int:
    """Whole milliseconds; what is not nothing is at least one."""
    return -(-ns // 1_000_000)
