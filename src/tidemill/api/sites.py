"""Sites, the outposts that work their engines, and the conversation with those."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Final

import msgspec
from fastapi import Query
from starlette.responses import Response

from tidemill.api.answers import node_json
from tidemill.api.bodies import body_of, json_answer, octets
from tidemill.api.guard import Caller, Routes, blocking, durable, missing, unless_gone
from tidemill.api.shapes.common import NAME, NothingIn, PageOf
from tidemill.api.shapes.fleet import NodeOut
from tidemill.api.shapes.sites import (
    JoiningOut,
    JoiningSiteOut,
    LeaveIn,
    LeavingOut,
    LinkIn,
    OutpostCallsOut,
    OutpostIn,
    OutpostOut,
    RentingOut,
    ReportTakenOut,
    SiteIn,
    SiteOut,
    SiteTokenIn,
)
from tidemill.catalog import carbon_intensity, own_prices
from tidemill.control.capacity import CapacityStatus
from tidemill.control.identity import administer
from tidemill.control.sites import SiteState
from tidemill.control.steering import find_node
from tidemill.errors import InvalidRequest
from tidemill.model.cloud import Rental
from tidemill.model.fleet import Link, Site, SiteKind, link_between
from tidemill.model.ids import NodeId, SiteId
from tidemill.model.tenant import Scope
from tidemill.units import MILLI, USD_MICRO, parse_bandwidth, parse_duration
from tidemill.wire.outposts import OutpostCalls, OutpostReport, ReportTaken

routes = Routes("sites")
_GIVEN: Final = "given"
REPORT_LIMIT: Final = 64 << 20
_REPORT: Final = msgspec.json.Decoder(OutpostReport)
_ANSWERS: Final = msgspec.json.Encoder()


@routes.get("/v1/sites", allow=Scope.READ, answer=PageOf[SiteOut])
async def list_sites(call: Caller) -> Response:
    """List the sites, each with its outposts and how many machines it has."""

    def page() -> dict[str, Any]:
        return {"items": [_site_json(call, state) for state in call.plane.sites.states()], "next_cursor": ""}

    return json_answer(await blocking(page))


@routes.put("/v1/sites/{name}", allow=Scope.ADMIN, body=SiteIn, answer=SiteOut)
async def put_site(call: Caller, name: str) -> Response:
    """Add a site, or describe one anew; what is left out stays as it is."""
    given = await body_of(call.request, SiteIn)

    def put() -> dict[str, Any]:
        administer(call.identity)
        known = next((one for one in call.plane.sites.all() if name in (one.id, one.name)), None)
        site = call.plane.sites.put(_site(name, given, known))
        return _shown(call, site.id)

    return json_answer(await blocking(put))


@routes.put("/v1/sites/{name}/links/{other}", allow=Scope.ADMIN, body=LinkIn, answer=SiteOut)
async def put_link(call: Caller, name: str, other: str) -> Response:
    """Say how far two sites are from each other, and how much gets through; answers the first."""
    given = await body_of(call.request, LinkIn)
    latency_ns = _duration(given.latency, "latency")
    try:
        bits_per_s = parse_bandwidth(given.bandwidth) if given.bandwidth else 0
    except ValueError as error:
        raise InvalidRequest(str(error), field="bandwidth", value=given.bandwidth, mend="Write 10Gbps.") from None

    def put() -> dict[str, Any]:
        administer(call.identity)
        sites = call.plane.sites
        one, two = sites.find(name), sites.find(other)
        sites.link(one, two, Link(to=two.id, latency_ns=latency_ns, bits_per_s=bits_per_s))
        return _shown(call, one.id)

    return json_answer(await blocking(put))


@routes.delete("/v1/sites/{name}/links/{other}", allow=Scope.ADMIN, answer=SiteOut)
async def delete_link(call: Caller, name: str, other: str) -> Response:
    """Forget how far two sites are from each other; answers the first."""

    def delete() -> dict[str, Any]:
        administer(call.identity)
        one, two = call.plane.sites.find(name), call.plane.sites.find(other)
        call.plane.sites.link(one, two, None)
        return _shown(call, one.id)

    return json_answer(await blocking(delete))


@routes.post("/v1/sites/{name}/tokens", allow=Scope.ADMIN, status=201, body=SiteTokenIn, answer=JoiningOut)
async def make_joining_token(call: Caller, name: str) -> Response:
    """Make a token with which machines join a site. It is shown this once."""
    given = await body_of(call.request, SiteTokenIn)
    lasts_ns = _duration(given.expires_in, "expires_in")

    def make() -> dict[str, Any]:
        administer(call.identity)
        site = call.plane.sites.find(name)
        token, secret = call.plane.sites.joining_token(
            call.identity, site, expires_ns=call.plane.now() + lasts_ns if lasts_ns else 0
        )
        made = {"token": secret, "site": site.name, "expires_at_ns": token.expires_ns}
        if (certificate := call.services.certificate) is not None:
            made |= {"url": call.plane.settings.reached_at, "fingerprint": certificate.fingerprint}
        return made

    return json_answer(await blocking(make), 201)


@routes.get("/v1/rentals", allow=Scope.ADMIN, answer=RentingOut)
async def list_rentals(call: Caller) -> Response:
    """List what is rented from a cloud, what it cost this month, and for which jobs nothing is rented and why."""

    def answer() -> dict[str, Any]:
        administer(call.identity)
        renting = call.plane.renting
        status = renting.status if renting is not None else CapacityStatus()
        return {
            "items": [_rental_json(rental) for rental in status.rentals],
            "next_cursor": "",
            "spent_micro": status.spent_micro,
            "not_rented": [
                {"job": job, "code": reason.code, "sentence": reason.sentence} for job, reason in status.refused
            ],
            "problem": status.problem,
        }

    return json_answer(await blocking(answer))


@routes.post("/v1/nodes/{name}/lost", allow=Scope.ADMIN, body=NothingIn, answer=NodeOut)
async def declare_node_lost(call: Caller, name: str) -> Response:
    """Say that a silent machine is gone for good: what it had is started elsewhere."""

    def lose() -> Any:
        administer(call.identity)
        node = find_node(call.plane.world, name)
        call.plane.sites.declare_lost(node, by=call.identity.name)
        return node_json(call.plane.world.nodes[node.id], call.plane.world)

    return json_answer(await blocking(lose))


@routes.get("/v1/joining", allow=Scope.JOIN, answer=JoiningSiteOut)
async def joining(call: Caller) -> Response:
    """Get the site that the token is for, and what a machine needs to know to join it."""

    def answer() -> dict[str, Any]:
        site = call.plane.sites.joined_site(call.identity)
        return {"site": site.name, "engine": site.engine, "settings": call.plane.sites.joining_settings(site)}

    return json_answer(await blocking(answer))


@routes.post("/v1/outposts", allow=Scope.JOIN, status=201, body=OutpostIn, answer=OutpostOut)
async def join(call: Caller) -> Response:
    """Bring an outpost into the token's site. Harmless to repeat with the same key."""
    given = await body_of(call.request, OutpostIn)

    def make() -> dict[str, Any]:
        outpost, site, secret = call.plane.sites.join(
            call.identity, name=given.name, key=given.key, engine=given.engine
        )
        return {
            "id": outpost.id,
            "name": outpost.name,
            "site": site.name,
            "site_id": site.id,
            "engine": site.engine,
            "token": secret,
        }

    return json_answer(await blocking(make), 201)


@routes.get("/v1/outposts/self/calls", allow=Scope.OUTPOST, answer=OutpostCallsOut)
async def outpost_calls(
    call: Caller,
    after: Annotated[int, Query(ge=0, lt=2**53, description="Only calls numbered above that.")] = 0,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for one.")] = 20,
) -> Response:
    """Wait for calls to carry out at the outpost."""
    box = call.plane.sites.box(call.identity)
    found = await unless_gone(call, box.fetch(after, wait))
    call.plane.check_leads()
    sites = call.plane.sites
    replicas = sorted(call.plane.replicas(), key=lambda one: (not one.leads, one.id))
    calls = OutpostCalls(
        session=sites.session,
        epoch=sites.epoch,
        replicas=tuple(one.api_url for one in replicas),
        calls=tuple(found or ()),
    )
    return Response(_ANSWERS.encode(calls), media_type="application/json")


@routes.post("/v1/outposts/self/report", allow=Scope.OUTPOST, body="application/json", answer=ReportTakenOut)
async def outpost_report(call: Caller) -> Response:
    """Answer calls, and tell what the outpost's machines have to tell. What has a number is taken once."""
    box = call.plane.sites.box(call.identity)
    try:
        report = _REPORT.decode(await octets(call.request, REPORT_LIMIT))
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The report cannot be read: {error}.", field="body") from None
    if report.session == call.plane.sites.session:
        box.answer(report.answers)
    facts = call.plane.sites.facts_of(box.outpost, report)
    if facts:
        await durable(call.plane.tell(facts))
    return Response(
        _ANSWERS.encode(ReportTaken(taken=call.plane.sites.taken(box.outpost))), media_type="application/json"
    )


@routes.post("/v1/outposts/self/leave", allow=Scope.OUTPOST, body=LeaveIn, answer=LeavingOut)
async def leave(call: Caller) -> Response:
    """Drain the outpost's machines; once nothing runs there they leave. Ask again until nothing does."""
    given = await body_of(call.request, LeaveIn)
    outpost = call.plane.sites.outpost(call.identity)
    running = await blocking(call.plane.sites.leave, outpost, by=call.identity.name, node_id=NodeId(given.node))
    return json_answer({"running": list(running), "left": not running})


@routes.delete("/v1/outposts/{outpost_id}", allow=Scope.ADMIN, answer=LeavingOut)
async def remove_outpost(call: Caller, outpost_id: str) -> Response:
    """Have an outpost leave, from here: its machines are drained, and once nothing runs there they are gone."""

    def remove() -> dict[str, Any]:
        administer(call.identity)
        for state in call.plane.sites.states():
            for outpost, _ in state.outposts:
                if outpost_id in (outpost.id, outpost.name):
                    running = call.plane.sites.leave(outpost, by=call.identity.name)
                    return {"running": list(running), "left": not running}
        raise missing("outpost", outpost_id)

    return json_answer(await blocking(remove))


def _site(name: str, given: SiteIn, known: Site | None) -> Site:
    if not re.fullmatch(NAME, name):
        mend = "Use up to 63 letters, digits, -, _ and dots."
        raise InvalidRequest("A site cannot have that name.", field="name", value=name[:100], mend=mend)
    new: dict[str, Any] = {}
    if given.kind is not None:
        new["kind"] = SiteKind(given.kind)
    if given.engine is not None:
        new["engine"] = given.engine
    if given.pue is not None:
        new["pue_milli"] = round(given.pue * MILLI)
    if given.carbon_g_per_kwh is not None:
        new |= {"carbon_mg_per_kwh": round(given.carbon_g_per_kwh * MILLI), "carbon_source": _GIVEN}
    elif given.country is not None or known is None:
        carbon = carbon_intensity(given.country or "")
        if known is None or known.carbon_source != _GIVEN:
            new |= {"carbon_mg_per_kwh": carbon.mg_per_kwh, "carbon_source": carbon.source}
    if given.country is not None:
        new["country"] = given.country
    if given.carbon_by_hour is not None:
        new["carbon_hours"] = tuple(round(each * MILLI) for each in given.carbon_by_hour)
    if given.lease is not None:
        new["lease_ns"] = _duration(given.lease, "lease")
    if given.prices is not None:
        new["prices"] = own_prices(given.prices)
    if given.tariff is not None:
        new["tariff_micro_per_kwh"] = round(given.tariff * USD_MICRO)
    fresh = Site(id=SiteId(name), name=name, kind=SiteKind.ONPREM, engine="local")
    try:
        return replace(known or fresh, **new)
    except ValueError as error:
        raise InvalidRequest(str(error), field="site", value=name) from None


def _duration(text: str, field: str) -> int:
    if text in ("never", "none", ""):
        return 0
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field=field, value=text, mend="Write for example 30m, or none.") from None


def _rental_json(rental: Rental) -> dict[str, Any]:
    return {
        "id": rental.id,
        "site": rental.site_id,
        "state": rental.state.value,
        "machine": rental.node_name,
        "instance": rental.instance_id,
        "type": rental.offer.instance_type,
        "market": rental.offer.market.value,
        "micro_per_hour": rental.offer.price_micro_per_hour,
        "cost_micro": rental.cost_micro,
        "cause": rental.cause,
        "jobs": list(rental.jobs),
        "created_at_ns": rental.created_ns,
        "ended_at_ns": rental.ended_ns,
    }


def _shown(call: Caller, site_id: SiteId) -> dict[str, Any]:
    return next(_site_json(call, state) for state in call.plane.sites.states() if state.site.id == site_id)


def _site_json(call: Caller, state: SiteState) -> dict[str, Any]:
    site, sites = state.site, {one.id: one for one in call.plane.sites.all()}
    links = {other: link for other in sites if other != site.id and (link := link_between(sites, site.id, other))}
    return {
        "id": site.id,
        "name": site.name,
        "kind": site.kind.value,
        "engine": site.engine,
        "country": site.country,
        "pue": site.pue_milli / MILLI,
        "carbon_g_per_kwh": site.carbon_mg_per_kwh / MILLI,
        "carbon_source": site.carbon_source,
        "lease_ns": site.lease_ns,
        "carbon_g_by_hour": [each / MILLI for each in site.carbon_hours],
        "prices": dict(site.prices),
        "tariff_micro_per_kwh": site.tariff_micro_per_kwh,
        "rate_card": call.plane.world.card_of(site.id).id,
        "links": [
            {"site": sites[other].name, "latency_ns": link.latency_ns, "bits_per_s": link.bits_per_s}
            for other, link in links.items()
        ],
        "nodes": len(state.nodes),
        "silent": sum(node.state.value in ("silent", "lost") for node in state.nodes),
        "outposts": [
            {"id": outpost.id, "name": outpost.name, "engine": outpost.engine, "is_there": is_there}
            for outpost, is_there in state.outposts
        ],
    }
