"""What the gateway serves by: keys and routes, whole, whenever they change."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import Response

from tidemill.api.bodies import body_of, json_answer
from tidemill.api.follow import rung
from tidemill.api.guard import Call, Caller, Routes, blocking, unless_gone
from tidemill.api.shapes.gateway import (
    EnteredOut,
    FeedOut,
    LoadIn,
    ModelLoadIn,
    RequestUsagesIn,
    RulingsIn,
    SharesIn,
    SharesOut,
)
from tidemill.control.loads import FeltCounts, Load, ModelLoad, ReplicaLoad
from tidemill.control.rollouts import Counted
from tidemill.core.limits import Report
from tidemill.errors import Stale
from tidemill.model.guard import Decision
from tidemill.model.ids import JobId, ProjectId, TokenId, WorkloadId
from tidemill.model.ledger import TokenPrice, TokenUsage
from tidemill.model.tenant import Scope

routes = Routes("gateway")
_LOOK_S = 0.2
"""How soon a new or revoked token, or a replica that is to leave, is noticed: these are no events."""


@routes.get("/v1/gateway/feed", allow=Scope.GATEWAY, answer=FeedOut)
async def gateway_feed(
    call: Caller,
    since: Annotated[int, Query(ge=-1, lt=2**63, description="The version that is known.")] = -1,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for another version.")] = 0,
) -> Response:
    """Get all keys and routes, when their version is another than `since` or after `wait` seconds."""
    return json_answer(await unless_gone(call, _changed(call, since, wait)))


@routes.post("/v1/gateway/usage", allow=Scope.GATEWAY, body=RequestUsagesIn, answer=EnteredOut)
async def enter_usage(call: Caller) -> Response:
    """Enter what requests took into the ledger. Harmless to repeat: each is entered once."""
    given = await body_of(call.request, RequestUsagesIn)
    usages = [
        TokenUsage(
            id=one.id,
            at_ns=one.at_ns,
            project_id=ProjectId(one.project),
            token_id=TokenId(one.token),
            model=one.model,
            workload_id=WorkloadId(one.workload),
            job_id=JobId(one.job),
            prompt_tokens=one.prompt_tokens,
            completion_tokens=one.completion_tokens,
            is_estimated=one.is_estimated,
            user=one.user,
            label=one.label,
            amount_pico=TokenPrice(input_micro=one.price[0], output_micro=one.price[1]).of(
                one.prompt_tokens, one.completion_tokens
            ),
        )
        for one in given.usages
    ]
    return json_answer({"entered": await blocking(call.plane.serving.enter, usages)})


@routes.post("/v1/gateway/rulings", allow=Scope.GATEWAY, body=RulingsIn, answer=EnteredOut)
async def note_rulings(call: Caller) -> Response:
    """Note what guardrails decided. Harmless to repeat: each decision is noted once."""
    given = await body_of(call.request, RulingsIn)
    decisions = [
        Decision(
            id=one.id,
            at_ns=one.at_ns,
            request_id=one.request,
            project_id=ProjectId(one.project),
            token_id=TokenId(one.token),
            model=one.model,
            rule=one.rule,
            kind=one.kind,
            stage=one.stage,
            action=one.action,
            found=dict(one.found),
        )
        for one in given.rulings
    ]
    return json_answer({"entered": await blocking(call.plane.serving.note_decisions, decisions)})


@routes.post("/v1/gateway/load", allow=Scope.GATEWAY, body=LoadIn, status=204)
async def hear_load(call: Caller) -> Response:
    """Tell how many requests there are, from which the number of replicas follows."""
    given = await body_of(call.request, LoadIn)
    call.plane.serving.scaler.hear(
        given.worker,
        Load(
            models={model: _model_load(one) for model, one in given.models.items()},
            replicas={JobId(job): ReplicaLoad(**one.model_dump()) for job, one in given.replicas.items()},
        ),
    )
    call.plane.rollouts.hear(
        given.worker,
        {
            (model, variant): Counted(
                requests=one.requests,
                errors=one.errors,
                slow={int(bucket): count for bucket, count in one.slow.items()},
            )
            for model, variants in given.variants.items()
            for variant, one in variants.items()
        },
    )
    return Response(status_code=204)


@routes.post("/v1/gateway/shares", allow=Scope.GATEWAY, body=SharesIn, answer=SharesOut)
async def share_limits(call: Caller) -> Response:
    """Say what a gateway has of what keys and projects may ask, and get more where it is needed."""
    given = await body_of(call.request, SharesIn)
    reports = {
        (subject, name): (
            begins_ns,
            Report(
                held=held,
                pending=pending,
                spent=spent,
                recent=recent,
                least=least,
                needed=needed,
                hoped=hoped,
            ),
        )
        for subject, name, begins_ns, held, pending, spent, recent, least, needed, hoped in given.shares
    }
    rationing = call.plane.serving.rationing
    told = await blocking(rationing.share, given.gateway, given.number, reports)
    if told is None:
        raise Stale("This gateway said newer things since.", field="number", value=given.number)
    shares = [(*one.key, one.begins_ns, one.granted, one.left, one.elsewhere, one.is_short) for one in told]
    return json_answer({"gateways": rationing.gateways, "shares": shares})


def _model_load(one: ModelLoadIn) -> ModelLoad:
    felt = one.felt
    if felt is None:
        return ModelLoad(in_flight=one.in_flight, waiting=one.waiting)
    ttft, latency, queue = (
        {int(bucket): count for bucket, count in counts.items()} for counts in (felt.ttft, felt.latency, felt.queue)
    )
    counts = FeltCounts(ttft=ttft, latency=latency, queue=queue, tokens=felt.tokens)
    return ModelLoad(in_flight=one.in_flight, waiting=one.waiting, felt=counts)


async def _changed(call: Call, since: int, wait_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + wait_s
    with call.services.hub.commits() as bell:
        while True:
            stamp = call.plane.serving.stamp
            feed = await blocking(_feed, call)
            if feed["version"] != since:
                return feed
            while not await rung(bell, max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
                if time.monotonic() >= deadline or call.services.hub.closed:
                    return feed
                if call.plane.serving.stamp != stamp:
                    break


def _feed(call: Call) -> dict[str, Any]:
    version, feed = call.plane.serving.feed()
    return {"version": number_of(version), **feed}


def number_of(version: str | int) -> int:
    """A version as a whole number that every JSON reader keeps exactly."""
    return version if isinstance(version, int) else int(version, 16) & (2**53 - 1)
