"""Which replica a request really reaches: affinity, weights, countries, other models, second replicas, time-outs."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.adapters.test_gateway import (
    ADMIN,
    OTHER,
    PEPPER,
    USER,
    Rig,
    error_of,
    eventually,
    feed_of,
    live,
    parse,
    request,
)
from tidemill.core import tokens
from tidemill.gateway.books import Books
from tidemill.gateway.table import Route, read_feed

SITES = {
    "here": {"country": "DEU", "links": {"far": 80_000_000, "near": 5_000_000}},
    "near": {"country": "FRA", "links": {"here": 5_000_000}},
    "far": {"country": "USA", "links": {"here": 80_000_000}},
}


def feed_with(
    rig: Rig,
    *,
    version: int = 2,
    models: Mapping[str, Sequence[int]] | None = None,
    sites: Sequence[str] = (),
    variants: Sequence[str] = (),
    countries: Sequence[str] = (),
    routes: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Have the gateway adopt a feed: ``models`` by the engines they have, each with ``options`` and its own."""
    models = models or {"m": range(len(rig.engines))}
    feed = json.loads(feed_of({m: [rig.endpoints[i] for i in found] for m, found in models.items()}, version=version))
    for model, route in feed["routes"].items():
        route |= {"concurrency": 0, "wait_ms": 2_000, **options, **(routes or {}).get(model, {})}
        for number, replica in enumerate(route["replicas"]):
            if sites:
                replica["site"] = sites[number]
            if variants:
                replica["variant"] = variants[number]
    feed |= {"sites": SITES if sites else {}, "home": "here" if sites else ""}
    if countries:
        feed["tokens"][tokens.digest(USER, PEPPER)]["countries"] = list(countries)
    rig.gateway.adopt(read_feed(json.dumps(feed).encode(), rig.gateway.table))


def route_of(rig: Rig, model: str = "m") -> Route:
    assert rig.gateway.table is not None
    return rig.gateway.table.routes[model]


async def ask(
    rig: Rig, body: dict[str, Any], *, token: str = USER, path: str = "/v1/chat/completions", headers: str = ""
) -> tuple[int, dict[str, str], bytes]:
    return parse(await rig.raw(request(body, token=token, path=path, headers=f"Connection: close\r\n{headers}")))


def counts_of(rig: Rig) -> list[int]:
    return [len(engine.bodies) for engine in rig.engines]


# Affinity


@live(engines=4)
async def test_prompts_that_begin_alike_reach_the_same_replica_and_those_of_another_tenant_need_not(rig: Rig) -> None:
    feed_with(rig, affinity="prefix")
    system = {"role": "system", "content": "You are a miller. " * 20}
    for number in range(12):
        said = [system, {"role": "user", "content": f"question {number % 3}"}, {"role": "user", "content": f"{number}"}]
        assert (await ask(rig, {"model": "m", "messages": said}))[0] == 200
    by_question: dict[int, set[int]] = {}
    for index, engine in enumerate(rig.engines):
        for body in engine.bodies:
            question = int(json.loads(body)["messages"][1]["content"].split()[1])
            by_question.setdefault(question, set()).add(index)
    assert {len(where) for where in by_question.values()} == {1}
    spread = set()
    for number in range(8):
        for engine in rig.engines:
            engine.bodies.clear()
        said = [system, {"role": "user", "content": f"another {number}"}]
        await ask(rig, {"model": "m", "messages": said})
        await ask(rig, {"model": "m", "messages": said}, token=ADMIN)
        spread.add(tuple(counts_of(rig)))
    assert any(2 not in found for found in spread), "the tenant is part of the key"


@live(engines=3)
async def test_a_prompt_that_everybody_asks_is_shared_out_when_its_replica_has_half_as_much_again(rig: Rig) -> None:
    feed_with(rig, affinity="prefix")
    body = {"model": "m", "mode": "hang", "messages": [{"role": "user", "content": "the same"}]}
    asking = [asyncio.create_task(ask(rig, body)) for _ in range(12)]
    await eventually(lambda: sum(counts_of(rig)) == 12)
    assert max(counts_of(rig)) <= 6
    for engine in rig.engines:
        engine.go_on.set()
    assert {(await one)[0] for one in asking} == {200}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("X-Session-Id: s{n}\r\n", {}),
        ("Cookie: a=b; tidemill_session=s{n}\r\n", {}),
        ("", {"user": "s{n}"}),
        ("", {"prompt_cache_key": "s{n}", "user": "always the same"}),
    ],
)
def test_a_session_stays_on_its_replica_by_whichever_way_it_is_named(headers: str, body: dict[str, str]) -> None:
    @live(engines=3)
    async def scene(rig: Rig) -> None:
        feed_with(rig, affinity="session")
        where: dict[int, Counter[int]] = {}
        for number in range(18):
            session = number % 6
            before = counts_of(rig)
            said = {key: value.format(n=session) for key, value in body.items()}
            assert (await ask(rig, {"model": "m", "n": number, **said}, headers=headers.format(n=session)))[0] == 200
            [at] = [i for i, count in enumerate(counts_of(rig)) if count > before[i]]
            where.setdefault(session, Counter())[at] += 1
        assert all(len(found) == 1 for found in where.values())
        assert len({next(iter(found)) for found in where.values()}) > 1

    scene()


# Weights


@live(engines=3)
async def test_variants_get_their_shares_and_a_feed_that_comes_between_changes_nothing(rig: Rig) -> None:
    for version in range(2, 7):
        feed_with(rig, version=version, variants=["", "", "canary"], weights={"": 80, "canary": 20})
        for _ in range(8):
            assert (await ask(rig, {"model": "m"}))[0] == 200
    assert counts_of(rig) == [16, 16, 8]


@live(engines=2)
async def test_a_full_variant_is_waited_for_and_one_without_replicas_is_not(rig: Rig) -> None:
    feed_with(rig, variants=["", "canary"], weights={"": 99, "canary": 1}, concurrency=1)
    first = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}))
    await eventually(lambda: counts_of(rig) == [1, 0])
    second = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}))
    await eventually(lambda: rig.gateway.metrics.of("m").waiting == 1)
    assert counts_of(rig) == [1, 0], "the share of the other one is not exceeded because there is room"
    rig.gateway.eject(route_of(rig).replicas[0], "a test says so")
    rig.engines[1].go_on.set()
    assert (await second)[0] == 200
    assert counts_of(rig)[1] == 1
    rig.engines[0].go_on.set()
    assert (await first)[0] == 200


# Where


@live(engines=3)
async def test_the_nearest_site_that_has_room_is_used(rig: Rig) -> None:
    feed_with(rig, sites=["far", "here", "near"], concurrency=2)
    asking = [asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"})) for _ in range(5)]
    await eventually(lambda: sum(counts_of(rig)) == 5)
    assert counts_of(rig) == [1, 2, 2]
    for engine in rig.engines:
        engine.go_on.set()
    assert {(await one)[0] for one in asking} == {200}
    rig.gateway.eject(route_of(rig).replicas[1], "a test says so")
    await ask(rig, {"model": "m"})
    assert counts_of(rig) == [1, 2, 3]


@live(engines=3)
async def test_requests_stay_in_the_countries_of_their_project_and_of_their_own_choice(rig: Rig) -> None:
    sites = ["far", "here", "near"]
    feed_with(rig, sites=sites, countries=["FRA", "USA"])
    for _ in range(6):
        assert (await ask(rig, {"model": "m"}))[0] == 200
    assert counts_of(rig) == [0, 0, 6], "the nearest of those that are allowed"
    for _ in range(3):
        assert (await ask(rig, {"model": "m"}, headers="X-Tidemill-Countries: USA, DEU\r\n"))[0] == 200
    assert counts_of(rig) == [3, 0, 6]
    status, _, body = await ask(rig, {"model": "m"}, headers="X-Tidemill-Countries: DEU\r\n")
    assert (status, error_of(body)["code"]) == (403, "country_not_allowed")
    assert "FRA, USA" in error_of(body)["message"]
    status, _, body = await ask(rig, {"model": "m"}, headers="X-Tidemill-Countries: Germany\r\n")
    assert (status, error_of(body)["param"]) == (400, "X-Tidemill-Countries")
    began = time.monotonic()
    status, headers, body = await ask(rig, {"model": "m"}, token=ADMIN, headers="X-Tidemill-Countries: POL\r\n")
    assert (status, error_of(body)["code"], headers["retry-after"]) == (503, "no_replica_in_countries", "5")
    assert time.monotonic() - began < 1, "what is not there is not waited for"
    assert counts_of(rig) == [3, 0, 6]


@live(engines=2)
async def test_what_waits_for_its_own_country_is_passed_by_what_does_not(rig: Rig) -> None:
    feed_with(rig, sites=["here", "near"], concurrency=1)
    at_home = "X-Tidemill-Countries: DEU\r\n"
    first = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}, headers=at_home))
    await eventually(lambda: counts_of(rig) == [1, 0])
    second = asyncio.create_task(ask(rig, {"model": "m", "n": 2}, headers=at_home))
    await eventually(lambda: rig.gateway.metrics.of("m").waiting == 1)
    third = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}))
    await eventually(lambda: counts_of(rig) == [1, 1])
    fourth = asyncio.create_task(ask(rig, {"model": "m", "n": 4}))
    await eventually(lambda: rig.gateway.metrics.of("m").waiting == 2)
    rig.engines[1].go_on.set()
    assert {(await third)[0], (await fourth)[0]} == {200}
    assert rig.gateway.metrics.of("m").waiting == 1
    rig.engines[0].go_on.set()
    assert {(await first)[0], (await second)[0]} == {200}
    assert [len(engine.bodies) for engine in rig.engines] == [2, 2]
    assert rig.gateway.line("m").picky == 0


@live(engines=2)
async def test_a_country_is_not_left_by_a_retry_a_second_replica_or_another_model(rig: Rig) -> None:
    feed_with(
        rig,
        models={"m": [0, 1], "other": [1]},
        sites=["near", "here"],
        countries=["FRA"],
        hedge_ms=10,
        routes={"m": {"fallback": ["other"]}},
    )
    other = route_of(rig, "other").replicas[0]
    other.country = "DEU"
    status, _, body = await ask(rig, {"model": "m", "mode": "die"})
    assert (status, error_of(body)["code"]) == (502, "replica_failed")
    slow = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}, path="/v1/embeddings"))
    await eventually(lambda: len(rig.engines[0].bodies) == 2)
    await asyncio.sleep(0.05)
    rig.engines[0].go_on.set()
    assert (await slow)[0] == 200
    assert rig.engines[1].bodies == []


# Other models


@live(engines=2)
async def test_another_model_answers_when_none_of_its_own_can_and_the_answer_says_so(rig: Rig) -> None:
    feed_with(rig, models={"big": [], "small": [1]}, routes={"big": {"fallback": ["gone", "small"]}})
    status, headers, _ = await ask(rig, {"model": "big", "messages": [{"role": "user", "content": "héllo"}], "n": 1e0})
    assert (status, headers["x-tidemill-model"]) == (200, "small")
    said = json.loads(rig.engines[1].bodies[0])
    assert said == {"model": "small", "messages": [{"role": "user", "content": "héllo"}], "n": 1.0}
    counts = rig.gateway.metrics
    assert (counts.of("big").in_flight, counts.of("small").requests) == (0, 1)
    _, headers, _ = await ask(rig, {"model": "small"})
    assert "x-tidemill-model" not in headers


@live(engines=2)
async def test_while_another_model_answers_its_own_is_told_to_be_wanted(rig: Rig) -> None:
    feed_with(rig, models={"big": [], "small": [0]}, routes={"big": {"fallback": ["small"]}})
    asking = asyncio.create_task(ask(rig, {"model": "big", "mode": "hang"}))
    await eventually(lambda: counts_of(rig)[0] == 1)
    models = json.loads(rig.gateway.load(with_felt=False))["models"]
    assert (models["big"]["in_flight"], models["big"]["waiting"], models["small"]["in_flight"]) == (0, 1, 1)
    rig.engines[0].go_on.set()
    assert (await asking)[0] == 200
    assert "big" not in json.loads(rig.gateway.load(with_felt=False))["models"]


@live(engines=3)
async def test_it_falls_back_after_failures_and_out_of_a_full_line_but_not_to_what_the_key_may_not_use(
    rig: Rig,
) -> None:
    models = {"m": [0], "next": [1], "last": [2]}
    feed_with(rig, models=models, routes={"m": {"fallback": ["next", "last"]}})
    status, headers, _ = await ask(rig, {"model": "m", "mode": "die"})
    assert status == 502
    assert counts_of(rig) == [1, 1, 1], "each once, in order"
    feed_with(rig, version=3, models=models, concurrency=1, wait_ms=0, routes={"m": {"fallback": ["next"]}})
    busy = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}))
    await eventually(lambda: counts_of(rig)[0] == 2)
    status, headers, _ = await ask(rig, {"model": "m"})
    assert (status, headers.get("x-tidemill-model")) == (200, "next")
    rig.engines[0].go_on.set()
    assert (await busy)[0] == 200
    feed_with(rig, version=4, models={"m": [], "next": [1]}, wait_ms=0, routes={"m": {"fallback": ["next"]}})
    feed = json.loads(rig.gateway.table.raw)  # type: ignore[union-attr]
    feed["routes"]["next"]["project"] = "p2"
    rig.gateway.adopt(read_feed(json.dumps(feed).encode()))
    assert (await ask(rig, {"model": "m"}))[0] == 503
    assert (await ask(rig, {"model": "m"}, token=OTHER))[0] == 404


# A second replica


@live(engines=2)
async def test_a_second_replica_is_asked_when_the_first_takes_long_and_the_slower_one_is_told_to_stop(
    rig: Rig,
) -> None:
    feed_with(rig, hedge_ms=30)
    slow = route_of(rig).replicas[0]
    slow.turn, route_of(rig).replicas[1].turn = 0, 9
    rig.engines[1].go_on.set()
    status, _, _ = await ask(rig, {"model": "m", "mode": "hang"}, path="/v1/embeddings")
    assert (status, counts_of(rig)) == (200, [1, 1])
    await asyncio.wait_for(rig.engines[0].left.wait(), 5)
    assert rig.gateway.metrics.of("m").hedges == 1
    status, _, _ = await ask(rig, {"model": "m"}, path="/v1/rerank")
    assert (status, rig.gateway.metrics.of("m").hedges) == (200, 1), "who answers in time is asked alone"


@live(engines=2)
async def test_what_generates_is_never_asked_of_two(rig: Rig) -> None:
    feed_with(rig, hedge_ms=10)
    asking = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}))
    await eventually(lambda: sum(counts_of(rig)) == 1)
    await asyncio.sleep(0.05)
    assert sum(counts_of(rig)) == 1
    for engine in rig.engines:
        engine.go_on.set()
    assert (await asking)[0] == 200


@live(engines=2)
async def test_when_the_first_breaks_off_the_second_is_waited_for_and_when_both_do_it_is_said(rig: Rig) -> None:
    feed_with(rig, hedge_ms=20)
    asking = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}, path="/v1/embeddings"))
    await eventually(lambda: counts_of(rig) == [1, 1])
    for task in list(rig.engines[0].tasks):
        task.cancel()
    await eventually(lambda: route_of(rig).replicas[0].outstanding == 0)
    rig.engines[1].go_on.set()
    assert (await asking)[0] == 200
    for engine in rig.engines:
        engine.go_on.clear()
    asking = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}, path="/v1/embeddings"))
    await eventually(lambda: counts_of(rig) == [2, 2])
    for engine in rig.engines:
        for task in list(engine.tasks):
            task.cancel()
    status, _, body = await asking
    assert (status, error_of(body)["code"]) == (502, "replica_failed")


@live(engines=2)
async def test_a_client_that_leaves_stops_both(rig: Rig) -> None:
    feed_with(rig, hedge_ms=10)
    _, writer = await rig.connect()
    writer.write(request({"model": "m", "mode": "hang"}, path="/v1/embeddings"))
    await eventually(lambda: counts_of(rig) == [1, 1])
    writer.close()
    for engine in rig.engines:
        await asyncio.wait_for(engine.left.wait(), 5)


@live(engines=2)
async def test_second_tries_are_bounded_by_the_models_budget(rig: Rig) -> None:
    feed_with(rig, hedge_ms=10)
    route_of(rig).course.budget.left = 0
    asking = asyncio.create_task(ask(rig, {"model": "m", "mode": "hang"}, path="/v1/embeddings"))
    await eventually(lambda: sum(counts_of(rig)) == 1)
    await asyncio.sleep(0.05)
    assert rig.gateway.metrics.of("m").hedges == 0
    for engine in rig.engines:
        engine.go_on.set()
    assert (await asking)[0] == 200
    status, _, body = await ask(rig, {"model": "m", "mode": "die"})
    assert (status, error_of(body)["code"]) == (502, "replica_failed")
    assert sum(counts_of(rig)) == 2, "nor is it sent again"


@live(engines=2)
async def test_all_that_a_lost_replica_takes_with_it_is_sent_elsewhere(rig: Rig) -> None:
    """Many more than are saved up; each of them once."""
    feed_with(rig)
    watching = asyncio.create_task(rig.gateway.watch_replicas().run(step_s=0.01))
    asking = [asyncio.create_task(ask(rig, {"model": "m", "mode": "hang", "n": n})) for n in range(60)]
    await eventually(lambda: sum(counts_of(rig)) == 60)
    lost, left = rig.engines
    held = len(lost.bodies)
    assert held > 15
    assert lost.server is not None
    lost.server.close()
    for task in lost.tasks:
        task.cancel()
    await eventually(lambda: len(left.bodies) == 60)
    left.go_on.set()
    assert [(await one)[0] for one in asking] == [200] * 60
    assert rig.gateway.metrics.of("m").retries == held
    watching.cancel()


def test_a_request_with_two_replicas_is_metered_once(tmp_path: Any) -> None:
    @live(engines=2)
    async def scene(rig: Rig) -> None:
        rig.gateway.books = Books(tmp_path)
        feed_with(rig, hedge_ms=1)
        for engine in rig.engines:
            engine.usage = {"prompt_tokens": 7, "total_tokens": 7}
        rig.gateway.table.routes["m"].course.budget.left = 10**9  # type: ignore[union-attr]
        asking = [
            asyncio.create_task(ask(rig, {"model": "m", "mode": "late", "n": n}, path="/v1/embeddings"))
            for n in range(40)
        ]
        assert {(await one)[0] for one in asking} == {200}
        counts = rig.gateway.metrics.of("m")
        assert counts.hedges >= 20
        assert counts.prompt_tokens == 7 * 40
        rig.gateway.books.close()

    scene()


# Replicas that are far off their peers


@live(engines=3)
async def test_a_replica_whose_answers_fail_is_left_out_for_a_while_and_comes_back_by_a_trial(rig: Rig) -> None:
    feed_with(rig)
    prober = rig.gateway.watch_replicas()
    prober._every_s = 0.02
    watching = asyncio.create_task(prober.run(step_s=0.01))
    bad = route_of(rig).replicas[0]
    rig.engines[0].status = 500
    for _ in range(600):
        await ask(rig, {"model": "m"})
        if not bad.circuit.allows:
            break
    await eventually(lambda: not bad.circuit.allows)  # it is looked at once a second
    assert bad.circuit.why == "100 % of its answers fail, 0 % of the others'"
    assert bad.circuit.until - bad.circuit.since == pytest.approx(5), "longer than after a refused connection"
    bad.circuit.until += 60
    before = len(rig.engines[0].bodies)
    for _ in range(9):
        assert (await ask(rig, {"model": "m"}))[0] == 200
    assert len(rig.engines[0].bodies) == before
    for status, state in ((503, "open"), (200, "closed")):
        rig.engines[0].status = status
        bad.circuit.until = 0.0
        await eventually(lambda: bad.circuit.allows)
        assert (await ask(rig, {"model": "m"}))[0] == status, "the next request is its trial"
        assert bad.circuit.state.value == state
    assert rig.gateway.metrics.of("m").ejections == 2
    watching.cancel()


@live(engines=3)
async def test_when_all_fail_alike_all_stay(rig: Rig) -> None:
    feed_with(rig)
    for engine in rig.engines:
        engine.status = 500
    for _ in range(75):
        await ask(rig, {"model": "m"})
    before = [one.answered for one in route_of(rig).replicas]
    rig.gateway.peers.look([route_of(rig)], 10.0**9)
    assert all(one.circuit.allows for one in route_of(rig).replicas)
    after = [one.answered for one in route_of(rig).replicas]
    assert after == [count // 2 for count in before], "what is long ago counts less and less"


# Time-outs


@pytest.mark.parametrize(
    ("timeouts", "mode", "says"),
    [
        ({"first_byte": 80}, "hang", "did not begin to answer within 0.08 s"),
        ({"between": 80}, "hang in stream", "sent nothing more for 0.08 s"),
        ({"whole": 200}, "slow flood", "did not finish within 0.2 s"),
    ],
)
def test_each_phase_has_its_own_time(timeouts: dict[str, int], mode: str, says: str) -> None:
    @live()
    async def scene(rig: Rig) -> None:
        feed_with(rig, timeouts_ms=timeouts)
        answer = await rig.raw(request({"model": "m", "mode": mode, "stream": True}, headers="Connection: close\r\n"))
        assert says.encode() in answer
        assert b'"code":"replica_timeout"' in answer
        await asyncio.wait_for(rig.engine.left.wait(), 5)
        if mode == "hang":
            assert parse(answer)[0] == 504

    scene()


@live()
async def test_a_replica_that_takes_no_connection_is_left_after_the_time_for_that(rig: Rig) -> None:
    full = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0, backlog=1, start_serving=False)
    port = full.sockets[0].getsockname()[1]
    full.sockets[0].dup().listen(0)
    held = [asyncio.create_task(asyncio.open_connection("127.0.0.1", port)) for _ in range(3)]
    await asyncio.sleep(0.05)
    rig.endpoints.insert(0, f"http://127.0.0.1:{port}")
    feed_with(rig, models={"m": [0, 1]}, timeouts_ms={"connect": 100})
    route_of(rig).replicas[1].turn = 5
    began = time.monotonic()
    assert (await ask(rig, {"model": "m"}))[0] == 200
    assert 0.09 < time.monotonic() - began < 2
    feed_with(rig, version=3, models={"m": [0]}, timeouts_ms={"connect": 100}, wait_ms=0)
    route_of(rig).replicas[0].circuit.state = type(route_of(rig).replicas[0].circuit.state).CLOSED
    status, _, body = await ask(rig, {"model": "m"})
    assert (status, error_of(body)["code"]) == (503, "replica_refused")
    assert "no connection within 0.1 s" in error_of(body)["message"]
    for task in held:
        task.cancel()
    full.close()
