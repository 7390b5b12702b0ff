"""The quota tree and who has what of it, the order of the queue, reservations, and what machines are to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import Response

from tidemill.api.answers import node_json, queue_json, queued_json, reservation_json, share_json
from tidemill.api.bodies import json_answer, json_object
from tidemill.api.guard import Call, Caller, Routes, blocking
from tidemill.api.jobs import ProjectName
from tidemill.api.shapes.common import PageOf
from tidemill.api.shapes.fleet import NodeOut
from tidemill.api.shapes.scheduling import QueuedOut, QueueOut, ReservationOut, ShareOut
from tidemill.errors import InvalidRequest
from tidemill.model.ids import ProjectId
from tidemill.model.queue import Queue
from tidemill.model.reservation import Reservation
from tidemill.model.tenant import Scope
from tidemill.wire.requests import MarkIn, QueueIn, ReservationIn, TreeIn, read_body

routes = Routes("scheduling")


@routes.get("/v1/queue", allow=Scope.READ, answer=PageOf[QueuedOut])
async def list_waiting(
    call: Caller,
    project: ProjectName = "",
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many at most.")] = 100,
) -> Response:
    """List waiting jobs in the order in which they would be tried, each with why it waits."""

    def page() -> dict[str, Any]:
        wanted = call.project(project).id if project else ProjectId("")
        now = call.plane.now()
        found = call.plane.questions.waiting(call.identity, project=wanted, limit=limit)
        names = {one.id: one.name for one in call.plane.projects.of(call.identity)}
        items = []
        for one in found:
            user = call.plane.directory.principal(one.workload.principal_id)
            name = user.name if user is not None else one.workload.principal_id
            items.append(queued_json(one, project=names.get(one.job.project_id, ""), user=name, now=now))
        return {"items": items, "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.get("/v1/share", allow=Scope.READ, answer=PageOf[ShareOut])
async def list_shares(call: Caller) -> Response:
    """List who has what: for each queue and project what it holds, borrowed, could have, and took lately."""

    def page() -> dict[str, Any]:
        names = {one.id: one.name for one in call.plane.projects.of(call.identity)}
        rows = call.plane.administration.share(call.identity)
        return {"items": [share_json(row, project=names.get(row.project_id, "")) for row in rows], "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.get("/v1/queues", allow=Scope.READ, answer=PageOf[QueueOut])
async def list_queues(call: Caller) -> Response:
    """List the places in the quota tree, as they can be sent back."""
    return json_answer(await blocking(lambda: _queues(call, call.plane.administration.queues(call.identity))))


@routes.put("/v1/queues", allow=Scope.ADMIN, body=TreeIn, answer=PageOf[QueueOut])
async def put_queues(call: Caller) -> Response:
    """Set many places in the quota tree, all of them or none. Those that are not sent stay as they are."""
    given, _ = await json_object(call.request)
    tree = read_body(TreeIn, given)
    return json_answer(
        await blocking(lambda: _queues(call, call.plane.administration.set_queues(call.identity, tree.queues)))
    )


@routes.put("/v1/queues/{name}", allow=Scope.ADMIN, body=QueueIn, answer=QueueOut)
async def put_queue(call: Caller, name: str) -> Response:
    """Set one place in the quota tree, whole: what is left out is at its default."""
    given, _ = await json_object(call.request)
    queue = read_body(QueueIn, {"name": name} | given)
    if queue.name != name:
        mend = f"Write {name[:63]}, or leave it out."
        raise InvalidRequest("It is not the name in the address.", field="name", value=queue.name, mend=mend)

    def answer() -> dict[str, Any]:
        queues = call.plane.administration.set_queues(call.identity, [queue])
        items: list[dict[str, Any]] = _queues(call, queues)["items"]
        return next(item for item in items if item["name"] == name)

    return json_answer(await blocking(answer))


def _queues(call: Call, queues: tuple[Queue, ...]) -> dict[str, Any]:
    projects = {one.id: one.name for one in call.plane.projects.of(call.identity)}
    names = {queue.id: queue.name for queue in queues}
    items = [
        queue_json(queue, parent=names.get(queue.parent_id, ""), project=projects.get(queue.project_id, ""))
        for queue in queues
    ]
    return {"items": items, "next_cursor": ""}


@routes.get("/v1/reservations", allow=Scope.READ, answer=PageOf[ReservationOut])
async def list_reservations(call: Caller) -> Response:
    """List reservations that have a window to come, the earliest first."""

    def page() -> dict[str, Any]:
        found = call.plane.administration.reservations(call.identity)
        return {"items": [_reservation(call, one) for one in found], "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.post("/v1/reservations", allow=Scope.ADMIN, status=201, body=ReservationIn, answer=ReservationOut)
async def create_reservation(call: Caller) -> Response:
    """Reserve machines for a project, or for nobody, once or again and again."""
    given, raw = await json_object(call.request)
    asked = read_body(ReservationIn, given)
    if asked.maintenance and asked.project:
        raise InvalidRequest(
            "What is for nobody has no project.", field="project", value=asked.project, mend="Leave one of the two out."
        )

    def make() -> Response:
        project = None if asked.maintenance else call.project(asked.project)
        return json_answer(_reservation(call, call.plane.administration.reserve(call.identity, project, asked)), 201)

    return await _once(call, b"reserve\0" + raw, make)


@routes.delete("/v1/reservations/{name}", allow=Scope.ADMIN, answer=ReservationOut)
async def cancel_reservation(call: Caller, name: str) -> Response:
    """Cancel a reservation, by name or id, with all its windows to come."""

    def cancel() -> Response:
        return json_answer(_reservation(call, call.plane.administration.cancel_reservation(call.identity, name)))

    return await _once(call, b"cancel\0" + name.encode(), cancel)


def _reservation(call: Call, reservation: Reservation) -> ReservationOut:
    nodes = call.plane.world.nodes
    project = call.project_name(reservation.project_id) if reservation.project_id else ""
    names = [nodes[node].name if node in nodes else node for node in reservation.node_ids]
    return reservation_json(reservation, project=project, nodes=names, now=call.plane.now())


@routes.post("/v1/nodes/{node}/mark", allow=Scope.ADMIN, body=MarkIn, answer=NodeOut)
async def mark_node(call: Caller, node: str) -> Response:
    """Cordon a machine (nothing new is placed there), drain it (what runs there also leaves), or resume it."""
    given, raw = await json_object(call.request)
    asked = read_body(MarkIn, given)

    def mark() -> Response:
        found = call.plane.administration.mark(call.identity, node, asked.marking, asked.reason)
        return json_answer(node_json(found, call.plane.world))

    return await _once(call, f"mark\0{node}\0".encode() + raw, mark)


async def _once(call: Call, request: bytes, work: Callable[[], Response]) -> Response:
    """What ``work`` answers, in a thread; the same key gives the first answer again."""

    async def make() -> Response:
        return await blocking(work)

    return await call.services.once.answer(call.identity.principal_id, call.idempotency_key, request, make)
