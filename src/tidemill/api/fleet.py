"""The cloud at a glance: its state, machines, events, and what was used."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Final

import msgspec
from fastapi import Header, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tidemill import __version__
from tidemill.api.answers import (
    event_data,
    event_json,
    ledger_json,
    model_cost_json,
    node_json,
    token_usage_json,
    usage_json,
)
from tidemill.api.bodies import json_answer
from tidemill.api.follow import PING, PING_S, event_stream, rung, sse
from tidemill.api.guard import OPEN, Call, Caller, Routes, blocking
from tidemill.api.jobs import Cursor, Limit, ProjectName
from tidemill.api.refs import find_job
from tidemill.api.shapes.common import Health, NothingIn, PageOf
from tidemill.api.shapes.fleet import NodeOut, ReplicaOut, StatusOut, StrangerOut
from tidemill.api.shapes.money import DecisionOut, LedgerLineOut, ModelCostsOut, TokenUsageOut, UsageOut
from tidemill.api.shapes.work import EventOut
from tidemill.control.enginework import Stranger
from tidemill.control.identity import administer
from tidemill.core.facts import has_left
from tidemill.core.unitcosts import model_costs
from tidemill.errors import InvalidRequest
from tidemill.model.guard import Action
from tidemill.model.ids import JobId, LaunchId, ProjectId
from tidemill.model.ledger import TOKEN_GROUPS
from tidemill.model.tenant import Scope
from tidemill.ports import StoredEvent

routes = Routes("fleet")
_PAGE: Final = 500
_HELLO: Final = b": events\n\n"


@routes.get("/v1/healthz", allow=OPEN, answer=Health)
async def health() -> Response:
    """Tell that the control plane answers. Needs no token."""
    return json_answer({"status": "ok", "version": __version__})


@routes.get("/v1/readyz", allow=OPEN, answer=Health)
async def ready(call: Caller) -> Response:
    """Tell that requests can be served: the database answers, and this control plane leads. Needs no token."""
    await blocking(call.plane.check_serves)
    return json_answer({"status": "ready", "version": __version__})


@routes.get("/v1/status", allow=Scope.READ, answer=StatusOut)
async def status(call: Caller) -> Response:
    """Get the state of the cloud. Jobs are those that the caller may see and that are not over."""

    def answer() -> dict[str, Any]:
        found = call.plane.questions.status()
        visible = set(call.visible_projects())
        jobs = Counter(job.state.value for job in list(call.plane.world.jobs.values()) if job.project_id in visible)
        return {
            "version": found.version,
            "state": "ready" if found.nodes else "waiting for machines",
            "site": found.site.name,
            "nodes": len(found.nodes),
            "devices": [
                {
                    "id": device.id,
                    "node": node.name,
                    "index": device.index,
                    "model": device.model,
                    "memory_bytes": device.memory_bytes,
                }
                for node in found.nodes
                for device in node.devices
            ],
            "cpu_milli": found.cpu_milli,
            "free_cpu_milli": found.free_cpu_milli,
            "gpu_milli": found.gpu_milli,
            "free_gpu_milli": found.free_gpu_milli,
            "jobs": dict(jobs),
            "gateway_url": found.gateway_url,
            "energy": found.energy,
            "rate_card": found.rate_card,
            "strangers": found.strangers,
            "workers": found.workers,
            "heard": found.heard,
        }

    return json_answer(await blocking(answer))


@routes.get("/v1/replicas", allow=Scope.READ, answer=PageOf[ReplicaOut])
async def list_replicas(call: Caller) -> Response:
    """List the control planes that stand in for each other, the one that leads first; none where there is only one."""
    found = sorted(call.plane.replicas(), key=lambda one: (not one.leads, one.id))
    items: list[ReplicaOut] = [
        {"id": one.id, "api_url": one.api_url, "leads": one.leads, "quiet_ms": one.quiet_ms} for one in found
    ]
    return json_answer({"items": items, "next_cursor": ""})


@routes.get("/v1/strangers", allow=Scope.ADMIN, answer=PageOf[StrangerOut])
async def list_strangers(call: Caller) -> Response:
    """List launches that are on the engine and that the database has never heard of: after an old backup was restored.

    Those whose job is known end when a newer attempt of it gets the lease; the others are left alone.
    """
    administer(call.identity)
    found = call.plane.sites.strangers()
    return json_answer({"items": [_stranger(one) for one in found], "next_cursor": ""})


@routes.post("/v1/strangers/{launch_id}/stop", allow=Scope.ADMIN, status=202, body=NothingIn, answer=StrangerOut)
async def stop_stranger(
    call: Caller,
    launch_id: str,
    grace: Annotated[float, Query(ge=0, le=86_400, description="Seconds that its worker gets to end.")] = 30,
) -> Response:
    """End a launch that the database has never heard of; it is forgotten once it is gone."""
    administer(call.identity)
    found = call.plane.sites.end_stranger(LaunchId(launch_id), grace_ns=int(grace * 1e9))
    return json_answer(_stranger(found), 202)


def _stranger(one: Stranger) -> StrangerOut:
    return {
        "launch": one.launch_id,
        "job": one.job_id,
        "job_known": one.is_job_known,
        "state": one.state.value,
        "seen_at_ns": one.seen_ns,
    }


@routes.get("/v1/nodes", allow=Scope.READ, answer=PageOf[NodeOut])
async def list_nodes(call: Caller, cursor: Cursor = "", limit: Limit = 200) -> Response:
    """List the machines, by name, with what is free."""

    def page() -> dict[str, Any]:
        nodes = [node for node in call.plane.store.nodes() if node.name > cursor and not has_left(node)]
        items = nodes[:limit]
        return {
            "items": [node_json(node, call.plane.world) for node in items],
            "next_cursor": items[-1].name if len(nodes) > limit else "",
        }

    return json_answer(await blocking(page))


@routes.get("/v1/events", allow=Scope.READ, answer=PageOf[EventOut])
async def list_events(
    call: Caller,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only events after that one.")] = 0,
    follow: Annotated[bool, Query(description="Go on with what happens, as `text/event-stream`.")] = False,
    job: Annotated[str, Query(max_length=100, description="Only events of that job.")] = "",
    project: ProjectName = "",
    cursor: Annotated[str, Query(max_length=20)] = "",
    limit: Limit = 100,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[str, Header(description="Go on after that event of an earlier stream.")] = "",
) -> Response:
    """Read the event log, oldest first; as a stream when `text/event-stream` is accepted."""
    for text in (cursor, last_event_id):
        if text.isascii() and text.isdigit() and len(text) < 19:
            after = max(after, int(text))
    job_id = (await blocking(find_job, call, job, project)).job.id if job else JobId("")
    visible = await blocking(call.visible_projects, project)
    if call.identity.allows(Scope.ADMIN) and not project:
        visible = (*visible, ProjectId(""))  # what happens to machines is no project's

    def read(after: int, limit: int) -> tuple[StoredEvent, ...]:
        if not visible:
            return ()
        return call.plane.store.events(after=after, limit=limit, project_ids=visible, job_id=job_id)

    if "text/event-stream" in accept:
        return event_stream(_followed(call, read, after, follow=follow))
    events = await blocking(read, after, limit)
    return json_answer(
        {
            "items": [event_json(event) for event in events],
            "next_cursor": str(events[-1].seq) if len(events) == limit else "",
        }
    )


async def _followed(call: Call, read: Any, after: int, *, follow: bool) -> AsyncIterator[bytes]:
    hub = call.services.hub
    pinged = time.monotonic()
    with hub.commits() as bell:
        yield _HELLO
        while True:
            newest = call.plane.last_seq
            events: tuple[StoredEvent, ...] = await run_in_threadpool(read, after, _PAGE)
            if events:
                after = events[-1].seq
                pinged = time.monotonic()
                yield b"".join(sse(event.entry.type, event_data(event), identity=str(event.seq)) for event in events)
            if len(events) == _PAGE:
                continue
            after = max(after, newest)
            if not follow or hub.closed:
                return
            if not await rung(bell, PING_S) and time.monotonic() - pinged >= PING_S:
                pinged = time.monotonic()
                yield PING


@routes.get("/v1/usage", allow=Scope.READ, answer=UsageOut)
async def usage(
    call: Caller,
    job: Annotated[str, Query(max_length=100, description="Only that job.")] = "",
    project: ProjectName = "",
    by: Annotated[
        str, Query(max_length=100, description="What requests to models are summed by: some of model,key,user,label.")
    ] = "model,key",
    since_ns: Annotated[int, Query(ge=0, lt=2**63, description="Only requests to models since then.")] = 0,
) -> Response:
    """Get exact sums of what a job, a project or everything visible used."""
    groups = tuple(part for part in by.split(",") if part)
    for one in groups:
        if one not in TOKEN_GROUPS:
            mend = f"Write some of {','.join(TOKEN_GROUPS)}."
            raise InvalidRequest(f"Requests cannot be summed by {one}.", field="by", value=by, mend=mend)

    def answer() -> UsageOut:
        store = call.plane.store
        if job:
            job_id = find_job(call, job, project).job.id
            totals = store.token_totals(job_id=job_id, since_ns=since_ns, by=groups)
            return usage_json([store.ledger_totals(job_id=job_id)], totals)
        projects = call.visible_projects(project)
        return usage_json(
            [store.ledger_totals(project_id=one) for one in projects],
            [totals for one in projects for totals in store.token_totals(project_id=one, since_ns=since_ns, by=groups)],
        )

    return json_answer(await blocking(answer))


_NO_NUL: Final = r"^[^\x00]*$"


@routes.get("/v1/usage/models", allow=Scope.READ, answer=ModelCostsOut)
async def get_model_costs(call: Caller, project: ProjectName = "") -> Response:
    """Get what a thousand tokens of each model took, in money, energy and carbon: its replicas' lines over them."""

    def answer() -> ModelCostsOut:
        store = call.plane.store
        served = [one for each in call.visible_projects(project) for one in store.served(project_id=each)]
        totals = {one.workload_id: store.ledger_totals(workload_id=one.workload_id) for one in served}
        return {"items": [model_cost_json(cost) for cost in model_costs(served, totals)]}

    return json_answer(await blocking(answer))


@routes.get("/v1/decisions", allow=Scope.READ, answer=PageOf[DecisionOut])
async def list_decisions(
    call: Caller,
    project: ProjectName = "",
    model: Annotated[str, Query(max_length=300, pattern=_NO_NUL, description="Only of that model.")] = "",
    rule: Annotated[str, Query(max_length=100, pattern=_NO_NUL, description="Only of that rule.")] = "",
    action: Annotated[str, Query(max_length=20, description="Only allow, flag, redact or refuse.")] = "",
    cursor: Cursor = "",
    limit: Limit = 100,
) -> Response:
    """List what guardrails decided about requests to models, newest first. Nothing of the requests' words is kept."""
    if action and action not in {one.value for one in Action}:
        mend = f"Actions are {', '.join(one.value for one in Action)}."
        raise InvalidRequest(f"There is no action {action!r}.", field="action", value=action, mend=mend)

    def page() -> dict[str, Any]:
        projects = call.visible_projects(project)
        if not projects:
            return {"items": [], "next_cursor": ""}
        found = call.plane.store.decisions(
            project_ids=projects, model=model, rule=rule, action=action, cursor=cursor, limit=limit
        )
        return {"items": [msgspec.to_builtins(one) for one in found.items], "next_cursor": found.next_cursor}

    return json_answer(await blocking(page))


@routes.get("/v1/ledger/tokens", allow=Scope.READ, answer=PageOf[TokenUsageOut])
async def list_token_usages(
    call: Caller, project: ProjectName = "", cursor: Cursor = "", limit: Limit = 100
) -> Response:
    """List what requests of a project to models took, in the order in which they were entered."""

    def page() -> dict[str, Any]:
        found = call.plane.store.token_usages(project_id=call.project(project).id, cursor=cursor, limit=limit)
        return {"items": [token_usage_json(usage) for usage in found.items], "next_cursor": found.next_cursor}

    return json_answer(await blocking(page))


@routes.get("/v1/ledger", allow=Scope.READ, answer=PageOf[LedgerLineOut])
async def list_ledger(
    call: Caller,
    job: Annotated[str, Query(max_length=100, description="Only that job.")] = "",
    project: ProjectName = "",
    cursor: Cursor = "",
    limit: Limit = 100,
) -> Response:
    """List the ledger lines of a job or a project, oldest first.

    An administrator who names neither gets all of the organization's, of idle time and of what others hold.
    """

    def page() -> dict[str, Any]:
        store = call.plane.store
        if job:
            found = store.ledger(job_id=find_job(call, job, project).job.id, cursor=cursor, limit=limit)
        elif not project and call.identity.allows(Scope.ADMIN) and not call.identity.project_ids:
            everything = store.ledger(cursor=cursor, limit=limit)
            visible = {*call.visible_projects(), ProjectId("")}
            own = tuple(line for line in everything.items if line.usage.project_id in visible)
            found = replace(everything, items=own)
        else:
            found = store.ledger(project_id=call.project(project).id, cursor=cursor, limit=limit)
        return {"items": [ledger_json(line) for line in found.items], "next_cursor": found.next_cursor}

    return json_answer(await blocking(page))
