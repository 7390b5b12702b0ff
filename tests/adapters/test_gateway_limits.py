"""Limits of keys and projects, through gateways and the control plane's own rationing: what is let in, told and kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import uvloop

from tidemill.api.shapes.gateway import SharesIn
from tidemill.control.identity import Directory, Inference
from tidemill.control.projects import Projects
from tidemill.control.rationing import Rationing
from tidemill.control.serving import amounts
from tidemill.core import tokens
from tidemill.core.limits import Pot, Report
from tidemill.gateway.books import Books
from tidemill.gateway.server import Gateway
from tidemill.gateway.table import read_feed
from tidemill.model.ids import JobId, OrganizationId, PrincipalId, ProjectId, TokenId, WorkloadId
from tidemill.model.ledger import TokenPrice, TokenUsage
from tidemill.model.limits import limits_of
from tidemill.model.tenant import Organization, Principal, PrincipalKind, Project, Scope
from tidemill.store.memory import MemoryStore

PEPPER = bytes(range(32))
PRICE = (1_000_000, 10_000_000)
"""A micro-USD for a token in, ten for one out."""


class Mill:
    """A replica that answers with the usage that the request's ``takes`` says, when it may."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.bodies: list[dict[str, Any]] = []
        self.endpoint = ""
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
                self.bodies.append(body)
                await self.go_on.wait()
                prompt, completion = body.get("takes", (1, 1))
                status = b"500 Broken" if body.get("breaks") else b"200 OK"
                usage = {"prompt_tokens": prompt, "completion_tokens": completion}
                answer = json.dumps({"choices": [], "usage": usage}).encode()
                writer.write(
                    b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                    % (status, len(answer), answer)
                )
        writer.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class Yard:
    """A control plane's limits and ledger, and the gateways that ask it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = MemoryStore()
        organization = Organization(id=OrganizationId("o"), name="o", created_ns=1)
        self.principal = Principal(
            id=PrincipalId("u"), organization_id=organization.id, kind=PrincipalKind.USER, name="u", created_ns=1
        )
        self.store.put_organization(organization)
        self.directory = Directory(PEPPER, principals=[self.principal], known=[])
        self.projects = Projects(self.store)
        self.mill = Mill()
        self.gateways: list[Gateway] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.servers: list[asyncio.Server] = []
        self.ports: list[int] = []
        self.is_away = False
        self.restart()

    def restart(self) -> None:
        """The control plane begins anew."""
        self.rationing = Rationing(self.store, self.directory, self.projects, clock=time.time_ns)

    def project(self, name: str, **limits: float) -> None:
        given = limits_of({key.replace("_per_", "/"): value for key, value in limits.items()})
        self.projects.add(
            Project(id=ProjectId(name), organization_id=OrganizationId("o"), name=name, created_ns=1, limits=given)
        )

    def key(self, project: str = "prj_1", models: tuple[str, ...] = (), **limits: float) -> str:
        given = limits_of({key.replace("_per_", "/"): value for key, value in limits.items()})
        token, secret = self.directory.mint(
            None,
            self.principal,
            name="k",
            scopes=(Scope.INFER,),
            project=ProjectId(project),
            expires_ns=0,
            now=1,
            inference=Inference(limits=given, models=models),
        )
        self.directory.remember(token, self.principal)
        return secret

    def feed(self) -> bytes:
        route = {
            "project": "prj_1",
            "service": "m",
            "workload": "wl",
            "price": PRICE,
            "replicas": [{"job": "job", "endpoint": self.mill.endpoint}],
        }
        keys = {
            token.hash: {
                "id": token.id,
                "project": token.project_id,
                "scopes": ["infer"],
                "limits": amounts(token.limits),
                "models": token.models,
            }
            for token in self.directory.all()
        }
        projects = {one.id: {"limits": amounts(one.limits)} for one in self.projects.all()}
        feed = {"version": 1, "tokens": keys, "routes": {"m": route, "other": route}, "projects": projects}
        return json.dumps(feed).encode()

    async def share(self, body: bytes) -> bytes:
        """What ``POST /v1/gateway/shares`` answers."""
        if self.is_away:
            raise ConnectionError("away")
        given = SharesIn.model_validate_json(body)
        reports = {
            (one[0], one[1]): (
                one[2],
                Report(
                    held=one[3],
                    pending=one[4],
                    spent=one[5],
                    recent=one[6],
                    least=one[7],
                    needed=one[8],
                    hoped=one[9],
                ),
            )
            for one in given.shares
        }
        told = self.rationing.share(given.gateway, given.number, reports) or []
        shares = [(*one.key, one.begins_ns, one.granted, one.left, one.elsewhere, one.is_short) for one in told]
        return msgspec.json.encode({"gateways": self.rationing.gateways, "shares": shares})

    async def enter(self, body: bytes) -> None:
        """What ``POST /v1/gateway/usage`` does."""
        if self.is_away:
            raise ConnectionError("away")
        self.rationing.enter(
            [
                TokenUsage(
                    id=one["id"],
                    at_ns=one["at_ns"],
                    project_id=ProjectId(one["project"]),
                    token_id=TokenId(one["token"]),
                    model=one["model"],
                    workload_id=WorkloadId(one["workload"]),
                    job_id=JobId(one["job"]),
                    prompt_tokens=one["prompt_tokens"],
                    completion_tokens=one["completion_tokens"],
                    is_estimated=one["is_estimated"],
                    amount_pico=TokenPrice(input_micro=one["price"][0], output_micro=one["price"][1]).of(
                        one["prompt_tokens"], one["completion_tokens"]
                    ),
                )
                for one in json.loads(body)["usages"]
            ]
        )

    async def open(self, count: int) -> None:
        """That many gateways."""
        await self.mill.listen()
        for number in range(count):
            await self.add(number, count)

    async def add(self, number: int, count: int) -> None:
        loop = asyncio.get_running_loop()
        books = Books(self.folder)
        gateway = Gateway(
            pepper=PEPPER,
            own_token=lambda: "",
            hosts=frozenset({b"127.0.0.1"}),
            books=books,
            place=f"here:{number}",
            workers=count,
        )
        gateway.adopt(read_feed(self.feed()))
        server = await loop.create_server(gateway.connection, "127.0.0.1", 0, backlog=512)
        self.gateways.append(gateway)
        self.servers.append(server)
        self.ports.append(server.sockets[0].getsockname()[1])
        for one in (
            gateway.rations.keep(self.share),
            books.keep(every_s=0.05),
            books.deliver(self.enter, every_s=0.05),
        ):
            self.tasks.append(loop.create_task(one))

    async def close(self) -> None:
        self.mill.go_on.set()
        for task in self.tasks:
            task.cancel()
        for server, gateway in zip(self.servers, self.gateways, strict=True):
            server.close()
            await gateway.drain(within_s=0.5)
            assert gateway.books is not None
            gateway.books.close()
        self.mill.close()

    async def ask(self, key: str, number: int = 0, **body: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Status, headers and body of one request's answer."""
        content = json.dumps({"model": "m", "messages": [], "max_tokens": 1} | body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[number])
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (key.encode(), len(content), content)
        )
        answer = await reader.read()
        writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, json.loads(rest)

    async def statuses(self, key: str, count: int, number: int | None = 0, **body: Any) -> list[int]:
        """The statuses of that many requests at a time; with no number they go to all gateways in turn."""
        asked = [self.ask(key, n % len(self.ports) if number is None else number, **body) for n in range(count)]
        return [status for status, _, _ in await asyncio.gather(*asked)]

    def booked(self) -> int:
        """How many requests are in the ledger."""
        return len(self.store.token_usages(limit=100_000).items)

    async def settled(self, count: int) -> None:
        """When so many requests are in the ledger, and all gateways have said so."""
        until, began_ns = time.monotonic() + 10, time.time_ns()
        while self.booked() < count or any(
            holding.pending or (holding.held and holding.seen_ns < began_ns)
            for pot in self.rationing._pots.values()
            for holding in pot.holdings.values()
        ):
            assert time.monotonic() < until, f"{self.booked()} of {count} are in the ledger"
            await asyncio.sleep(0.01)


def yard(gateways: int = 1) -> Callable[[Callable[[Yard], Awaitable[None]]], Callable[[Path], None]]:
    """Run a test on uvloop with a yard of so many gateways, which it opens itself once its keys are made."""

    def decorate(test: Callable[[Yard], Awaitable[None]]) -> Callable[[Path], None]:
        def run(tmp_path: Path) -> None:
            async def scene() -> None:
                made = Yard(tmp_path)
                made.project("prj_1")
                async with asyncio.timeout(30), contextlib.AsyncExitStack() as stack:
                    stack.push_async_callback(made.close)
                    await test(made)

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(scene())

        run.__name__ = test.__name__
        return run

    return decorate


@contextlib.asynccontextmanager
async def client(it: Yard, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{it.ports[0]}/v1", api_key=key, max_retries=0, timeout=10
    ) as made:
        yield made


@yard()
async def test_a_hundred_at_a_time_never_pass_a_limit_by_more_than_one_request(it: Yard) -> None:
    by_requests, by_tokens = it.key(requests_per_minute=30), it.key(tokens_per_minute=1_000)
    unsaid, at_a_time = it.key(tokens_per_minute=1_000), it.key(concurrency=7)
    await it.open(1)
    assert sum(status == 200 for status in await it.statuses(by_requests, 100)) == 30
    admitted = sum(status == 200 for status in await it.statuses(by_tokens, 100, takes=(20, 60), max_tokens=60))
    assert 1_000 - 2 * 110 <= admitted * 80 <= 1_000, "what is reserved is never less than what is taken"
    it.mill.go_on.clear()
    asked = asyncio.ensure_future(it.statuses(unsaid, 100, takes=(20, 60), max_tokens=None))
    for _ in range(40):
        await asyncio.sleep(0.02)
    it.mill.go_on.set()
    admitted = sum(status == 200 for status in await asked)
    assert 0 < admitted * 80 <= 1_000 + 80, "one request may be longer than anybody knew"
    it.mill.go_on.clear()
    refused = it.gateways[0].metrics.refused
    before = sum(refused.values())
    asked = asyncio.ensure_future(it.statuses(at_a_time, 100))
    while sum(refused.values()) - before < 93:
        await asyncio.sleep(0.01)
    it.mill.go_on.set()
    assert sum(status == 200 for status in await asked) == 7
    assert await it.statuses(at_a_time, 7) == [200] * 7, "what is over makes room"


@yard()
async def test_what_is_refused_and_what_is_let_in_say_how_much_there_is(it: Yard) -> None:
    key = it.key(requests_per_minute=2, tokens_per_day=100_000, usd_per_month=0.001)
    await it.open(1)
    status, headers, _ = await it.ask(key, takes=(50, 10), max_tokens=10)
    assert status == 200
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert headers["x-ratelimit-limit-tokens"] == "100000"
    await it.settled(1)
    status, headers, _ = await it.ask(key, takes=(50, 10), max_tokens=10)
    assert int(headers["x-ratelimit-remaining-tokens"]) <= 100_000 - 60
    async with client(it, key) as asking:
        with pytest.raises(openai.RateLimitError) as limited:
            await asking.chat.completions.create(model="m", messages=[], max_tokens=1)
    assert limited.value.code == "rate_limit_exceeded"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 30
    assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    dear = it.key(usd_per_month=0.0005)
    it.gateways[0].adopt(read_feed(it.feed()))
    assert [await it.statuses(dear, 1, takes=(100, 20), max_tokens=20) for _ in range(2)] == [[200], [429]]
    status, headers, body = await it.ask(dear, takes=(100, 20), max_tokens=20)
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "insufficient_quota", "insufficient_quota")
    assert (headers["x-should-retry"], int(headers["retry-after"]) > 1) == ("false", True)
    status, _, body = await it.ask(dear, max_tokens=1_000_000)
    assert (status, "smaller max_tokens" in body["error"]["message"]) == (429, True)


@yard()
async def test_a_projects_limit_holds_for_its_keys_together_and_a_keys_for_itself(it: Yard) -> None:
    it.project("prj_1", requests_per_day=10)
    one, other, third = it.key(requests_per_day=4), it.key(), it.key("prj_2")
    it.project("prj_2")
    scoped = it.key("prj_1", models=("o*",))
    await it.open(1)
    assert (await it.statuses(one, 8)).count(200) == 4
    assert (await it.statuses(other, 8)).count(200) == 6
    assert await it.statuses(third, 1) == [404], "another project's model is not there"
    assert await it.statuses(scoped, 1) == [404], "nor is one that the key does not name"
    assert await it.statuses(scoped, 1, model="other") == [429]


@yard()
async def test_what_was_reserved_comes_back_when_nothing_came_of_it(it: Yard) -> None:
    key = it.key(tokens_per_day=400, concurrency=3, requests_per_day=100)
    await it.open(1)
    for _ in range(30):
        assert await it.statuses(key, 1, breaks=True, max_tokens=100) == [500]
    assert await it.statuses(key, 1, max_tokens=100) == [200]
    it.mill.go_on.clear()
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", it.ports[0])
        body = b'{"model":"m","max_tokens":100}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (key.encode(), len(body), body)
        )
        asked = len(it.mill.bodies)
        while len(it.mill.bodies) == asked:
            await asyncio.sleep(0.005)
        writer.transport.abort()
        del reader
    it.mill.go_on.set()
    await asyncio.sleep(0.05)
    assert await it.statuses(key, 1, max_tokens=100) == [200], "who goes away leaves nothing taken"


@yard()
async def test_four_gateways_hold_to_a_limit_together_within_two_percent(it: Yard) -> None:
    per_day, project = it.key(requests_per_day=200), it.key("prj_3")
    it.project("prj_3", requests_per_day=150)
    await it.open(4)
    admitted, until = 0, time.monotonic() + 5
    while admitted < 196 and time.monotonic() < until:  # what one holds too much comes to the others with its next tick
        admitted += (await it.statuses(per_day, 80, number=None)).count(200)
    admitted += (await it.statuses(per_day, 80, number=None)).count(200)
    assert 196 <= admitted <= 200
    assert (await it.statuses(project, 4, number=None)).count(404) == 4
    await it.settled(admitted)
    booked = it.store.token_totals(by=())[0].requests
    assert booked == admitted, "each is in the ledger once"


@yard()
async def test_what_was_used_is_known_after_the_control_plane_began_anew(it: Yard) -> None:
    """Quotas go on from the ledger, and a restart gives nobody anything twice."""
    key = it.key(requests_per_month=20, usd_per_day=1)
    await it.open(2)
    assert (await it.statuses(key, 12, number=None)).count(200) == 12
    it.restart()
    assert (await it.statuses(key, 20, number=None)).count(200) == 8
    await it.settled(20)
    it.restart()
    pots: list[Pot] = []
    while not pots:  # what was heard of the one before is good for a tenth of a second
        assert (await it.statuses(key, 5, number=None)).count(200) == 0
        pots = [pot for (_, name), pot in it.rationing._pots.items() if name == "requests/month"]
    assert pots[0].booked == 20


@yard()
async def test_a_control_plane_that_is_away_stops_nothing_and_loses_nothing(it: Yard) -> None:
    rate, quota = it.key(requests_per_minute=600), it.key(requests_per_day=100)
    await it.open(2)
    assert (await it.statuses(quota, 40, number=None)).count(200) == 40
    await it.settled(40)
    it.is_away = True
    while not all(gateway.rations._is_alone for gateway in it.gateways):
        await asyncio.sleep(0.01)
    began = time.monotonic()
    assert (await it.statuses(rate, 40, number=None)).count(200) == 40
    got = (await it.statuses(quota, 120, number=None)).count(200)
    assert 50 <= got <= 60, "what was left, each gateway its half"
    assert time.monotonic() - began < 2, "nobody waits for what does not come"
    it.is_away = False
    while any(gateway.rations._is_alone for gateway in it.gateways):
        await asyncio.sleep(0.01)
    await it.settled(40 + 40 + got)
    assert 40 + got + (await it.statuses(quota, 40, number=None)).count(200) == 100


@yard()
async def test_a_gateway_that_is_killed_is_in_the_ledger_once_and_in_no_ones_way(it: Yard) -> None:
    """What it took is pending until its files are adopted; then the quota is what the ledger says."""
    key = it.key(requests_per_day=50)
    await it.open(2)
    assert (await it.statuses(key, 10, number=0)).count(200) == 10
    assert (await it.statuses(key, 10, number=1)).count(200) == 10
    it.is_away = True
    assert (await it.statuses(key, 5, number=0)).count(200) == 5
    books = it.gateways[0].books
    assert books is not None
    books.write()
    for task in it.tasks[:3]:  # kill -9: nothing more of it, and its locks are gone
        task.cancel()
    await asyncio.sleep(0)
    books.close()
    it.is_away = False
    survivor = it.gateways[1].books
    assert survivor is not None
    survivor.adopt()
    until = time.monotonic() + 10
    while it.booked() < 25:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    name = it.gateways[0]._name
    for pot in it.rationing._pots.values():  # as after 30 s
        pot.holdings.pop(name, None)
    assert (await it.statuses(key, 40, number=1)).count(200) == 25
    await it.settled(50)
    assert it.store.token_totals(token_id=TokenId(it.directory.all()[0].id), by=())[0].requests == 50


def test_salts_are_a_tenants_own_and_cannot_be_guessed() -> None:
    from tidemill.gateway.wishes import Salts

    mine, others = Salts(PEPPER), Salts(bytes(32))
    assert mine.of("a") == Salts(PEPPER).of("a"), "the same in every process"
    assert len({mine.of("a"), mine.of("b"), others.of("a"), tokens.digest("a", PEPPER)}) == 4
    assert len(mine.of("a")) >= 32
