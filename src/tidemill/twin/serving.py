"""Services under recorded traffic on virtual time, with the live decisions and a model of an engine.

How many replicas there are is decided by ``core.scaling.decide`` from what ``control.loads`` makes of reports, as it
is live. Which replica a request goes to and how it waits is decided by the gateway's own ``Line`` and ``Route``, which
the caller brings along. What is modelled is the engine, in few numbers: a replica reads prompts one after the other,
``prefill`` tokens a second, and then gives each request a token at a time, ``decode`` a second at most, ``batch`` a
second for all together. It is ready ``start_ns`` after its launch. Nothing fails, and nobody goes away.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tidemill.control.loads import FeltCounts, Load, Loads, ModelLoad
from tidemill.control.replicating import bounds_of
from tidemill.core.buckets import bucket_of
from tidemill.core.scaling import Decision, Memory, Signals, decide
from tidemill.model.spec import Service
from tidemill.twin.sketch import Sketch
from tidemill.twin.traffic import Request
from tidemill.units import DAY_NS, HOUR_NS, MILLI, SECOND_NS

MONDAY_NS: Final = 4 * DAY_NS + 2_900 * 7 * DAY_NS
"""Virtual time begins on a Monday; the days of a pattern and of hours are those of the traffic."""
_LOOK_NS: Final = SECOND_NS
_LONGEST_LOOK_NS: Final = 5 * SECOND_NS
_LOOKS: Final = 20_000
"""In long traffic it is looked less often than each second, for about as many looks."""
_IDLE_LOOK_NS: Final = 10 * SECOND_NS
"""How often it is looked when nothing is asked."""
_BINS: Final = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a replica can do, and costs. Rates in tokens a second; ``cache`` is how many tokens its KV cache holds."""

    prefill: float = 8_000.0
    decode: float = 60.0
    batch: float = 2_500.0
    cache: int = 400_000
    start_ns: int = 60 * SECOND_NS
    price_micro: int = 0
    """Of a replica's hour."""
    idle_mw: int = 0
    busy_mw: int = 0

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.batch) <= 0 or self.cache < 1 or self.start_ns < 0:
            raise ValueError("rates and the cache are above zero, and time is not negative")


class Line(Protocol):
    """The gateway's line of one model."""

    count: int

    def join(self, waiter: Any, tenant: str) -> None: ...

    def leave(self, waiter: Any, tenant: str) -> None: ...

    def of(self, tenant: str) -> int: ...

    def advance(self) -> None: ...

    def served_in(self, taken_s: float) -> None: ...

    def expected_s(self, route: Any, tenant: str) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The gateway's own parts: what makes a line, a replica by its name, and a route of replicas with a concurrency.

    A request that would wait ``caution`` times as long as it may is refused at once; so is one when ``most_waiting``
    wait.
    """

    line: Callable[[], Line]
    replica: Callable[[str], Any]
    route: Callable[[str, Sequence[Any], int], Any]
    caution: float
    most_waiting: int


@dataclass(slots=True, eq=False)
class _Copy:
    """A replica: ``seat`` is the gateway's picture of it."""

    number: int
    seat: Any
    launched_ns: int
    ready_ns: int
    is_ready: bool = False
    ended_ns: int = 0
    prefill_free_ns: int = 0
    reading: int = 0
    """Requests whose prompt is not read yet."""
    progress: float = 0.0
    """Tokens that a request would have which was there all the time."""
    at_ns: int = 0
    giving: list[tuple[float, int, _Asked]] = field(default_factory=list)
    version: int = 0
    held: int = 0
    """Tokens in its cache, at their most."""
    busy_ns: int = 0


@dataclass(slots=True, eq=False)
class _Asked:
    """A request under way."""

    run: _Run
    request: Request
    at_ns: int
    until_ns: int
    is_waiting: bool = False
    is_cold: bool = False
    taken_ns: int = 0
    is_picky: bool = False
    """Whether it may not go to any replica; here all may."""

    def go(self) -> bool:
        """Whether it was sent to a replica."""
        return self.run.send(self)

    def ejected(self, why: str) -> None:
        """No replica ever fails here."""


@dataclass(slots=True)
class Series:
    """What there was over time, by bins of equal width."""

    width_ns: int
    asked: list[float]
    replicas: list[float]
    waiting: list[float]
    late: list[float]
    """Seconds to the first token of the slowest one in twenty."""


@dataclass(slots=True)
class Result:
    """What came of one service's traffic."""

    name: str
    service: Service
    engine: Engine
    ttft: Sketch = field(default_factory=Sketch)
    latency: Sketch = field(default_factory=Sketch)
    wait: Sketch = field(default_factory=Sketch)
    requests: int = 0
    answered: int = 0
    refused: int = 0
    tokens: int = 0
    objective_ns: int = 0
    met: int = 0
    """Requests whose first token came within the objective."""
    replica_ns: int = 0
    busy_ns: int = 0
    ready_ns: int = 0
    launches: int = 0
    changes: int = 0
    """How often another number of replicas was wanted."""
    most: int = 0
    span_ns: int = 0
    series: Series = field(default_factory=lambda: Series(0, [], [], [], []))

    @property
    def cost_micro(self) -> int:
        """What its replicas cost."""
        return self.replica_ns * self.engine.price_micro // HOUR_NS

    @property
    def energy_mj(self) -> int:
        """What they drew: as idle ones while they start and wait, as busy ones while they work."""
        idle = self.replica_ns - self.busy_ns
        return (idle * self.engine.idle_mw + self.busy_ns * self.engine.busy_mw) // SECOND_NS


def play(
    requests: Iterable[Request],
    services: dict[str, Service],
    engines: dict[str, Engine],
    rules: Rules,
    *,
    load: float = 1.0,
    span_ns: int = 0,
    objectives: Mapping[str, int] | None = None,
) -> list[Result]:
    """What comes of each service's traffic, by the name of its model. ``load`` is how many times as fast it comes.

    ``objectives`` are times to the first token by which all runs are measured, where not each service has its own.
    """
    of: dict[str, list[Request]] = {model: [] for model in services}
    for one in requests:
        if one.model in of:
            of[one.model].append(one)
    ends = span_ns or round(max((some[-1].at_ns for some in of.values() if some), default=0) / load) + 1
    results = []
    for model, service in services.items():
        run = _Run(model, service, engines[model], rules, ends)
        run.result.objective_ns = (objectives or {}).get(model, 0) or service.scaling.ttft_ns
        results.append(run.play(of[model], load))
    return results


class _Run:
    """One service's virtual time."""

    def __init__(self, model: str, service: Service, engine: Engine, rules: Rules, ends_ns: int) -> None:
        self.now = MONDAY_NS
        self.result = Result(name=model, service=service, engine=engine, span_ns=ends_ns)
        self._model, self._service, self._engine, self._rules = model, service, engine, rules
        self._line = rules.line()
        self._copies: list[_Copy] = []
        self._leaving: list[_Copy] = []
        self._route = rules.route(model, (), service.concurrency)
        self._loads = Loads(monotonic=lambda: self.now / SECOND_NS)
        self._loads.longest_s = max(60.0, service.scaling.window_ns / SECOND_NS)
        self._memory = Memory()
        self._wanted = -1
        self._looks_at = 0
        self._look_ns = min(_LONGEST_LOOK_NS, max(_LOOK_NS, ends_ns // _LOOKS))
        self._started: list[int] = []
        self._counts: dict[str, dict[int, int]] = {"ttft": {}, "latency": {}, "queue": {}}
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self._in_flight = self._tokens = 0
        self._turn = 0
        width = max(ends_ns // _BINS, SECOND_NS)
        bins = ends_ns // width + 1
        self.result.series = Series(width, *([0.0] * bins for _ in range(4)))
        self._late = [Sketch() for _ in range(bins)]
        self._bin_ns = MONDAY_NS

    def play(self, requests: Sequence[Request], load: float) -> Result:
        """Everything until the last answer."""
        arrivals = deque(requests)
        for _ in range(self._service.smallest):  # they are there from before
            self._launch(ready_ns=self.now)
            self._is_up(self._copies[-1])
        self._look()
        while True:
            due = self._events[0][0]
            if arrivals and MONDAY_NS + round(arrivals[0].at_ns / load) <= due:
                request = arrivals.popleft()
                self._advance_to(MONDAY_NS + round(request.at_ns / load))
                self._arrive(request)
                continue
            if not arrivals and not self._in_flight and not self._line.count and due > MONDAY_NS + self.result.span_ns:
                break
            _, _, call = heapq.heappop(self._events)
            self._advance_to(due)
            call()
        self._advance_to(MONDAY_NS + max(self.result.span_ns, self.now - MONDAY_NS))
        for copy in [*self._copies, *self._leaving]:
            self._settle(copy)
        series = self.result.series
        series.late[:] = [one.quantile(0.95) for one in self._late]
        series.asked[:] = [count * SECOND_NS / series.width_ns for count in series.asked]
        return self.result

    # Time

    def _advance_to(self, now: int) -> None:
        """Let time go by, with what there is of replicas and of those who wait."""
        series, copies = self.result.series, len(self._copies) + len(self._leaving)
        while self._bin_ns < now:
            index = (self._bin_ns - MONDAY_NS) // series.width_ns
            end = min(now, MONDAY_NS + (index + 1) * series.width_ns)
            if index < len(series.replicas):
                share = (end - self._bin_ns) / series.width_ns
                series.replicas[index] += copies * share
                series.waiting[index] += self._line.count * share
            self._bin_ns = end
        self.now = now

    def _at(self, when: int, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, call))

    # Requests

    def _arrive(self, request: Request) -> None:
        self.result.requests += 1
        self._look_in(self._look_ns)
        bin_ = (self.now - MONDAY_NS) // self.result.series.width_ns
        if bin_ < len(self.result.series.asked):
            self.result.series.asked[bin_] += 1
        asked = _Asked(self, request, self.now, self.now + self._service.wait_ns)
        if self._line.count or not self.send(asked):
            self._wait(asked)

    def _wait(self, asked: _Asked) -> None:
        left = (asked.until_ns - self.now) / SECOND_NS
        tenant, most = asked.request.tenant, self._rules.most_waiting
        if (
            left <= 0
            or self._line.count >= most
            or self._line.of(tenant) >= max(1, most // 2)
            or self._line.expected_s(self._route, tenant) * self._rules.caution > left
        ):
            self.result.refused += 1
            return
        asked.is_waiting = True
        asked.is_cold = not any(not copy.seat.is_leaving for copy in self._copies if copy.is_ready)
        self._line.join(asked, tenant)
        self._at(asked.until_ns, lambda: self._run_out(asked))

    def _run_out(self, asked: _Asked) -> None:
        if asked.is_waiting:
            asked.is_waiting = False
            self._line.leave(asked, asked.request.tenant)
            self.result.refused += 1

    def send(self, asked: _Asked) -> bool:
        """Whether a replica takes it now."""
        seat = self._route.choose()
        if seat is None:
            return False
        if asked.is_waiting:
            asked.is_waiting = False
            self._line.leave(asked, asked.request.tenant)
        self._turn += 1
        seat.turn = self._turn
        seat.under_way.add(asked)
        self._in_flight += 1
        copy = next(one for one in self._copies if one.seat is seat)
        asked.taken_ns = self.now
        waited = self.now - asked.at_ns
        self.result.wait.add(waited / SECOND_NS)
        if not asked.is_cold:
            self._count("queue", waited)
        if len(seat.under_way) == 1:
            copy.at_ns = self.now
        begins = max(self.now, copy.prefill_free_ns)
        copy.prefill_free_ns = begins + math.ceil(asked.request.prompt / self._engine.prefill * SECOND_NS)
        copy.reading += 1
        copy.held += asked.request.prompt + asked.request.completion
        self._at(copy.prefill_free_ns, lambda: self._read(copy, asked))
        return True

    def _read(self, copy: _Copy, asked: _Asked) -> None:
        """The prompt is read, and its first token is there."""
        self._progress(copy)
        copy.reading -= 1
        took = self.now - asked.at_ns
        self.result.ttft.add(took / SECOND_NS)
        self.result.met += took <= self.result.objective_ns
        bin_ = (asked.at_ns - MONDAY_NS) // self.result.series.width_ns
        if bin_ < len(self._late):
            self._late[bin_].add(took / SECOND_NS)
        self._count("ttft", self.now - (asked.taken_ns if asked.is_cold else asked.at_ns))
        self._number += 1
        heapq.heappush(copy.giving, (copy.progress + asked.request.completion, self._number, asked))
        self._next_end(copy)

    def _rate(self, copy: _Copy) -> float:
        """Tokens a second of each request that a replica gives tokens."""
        return min(self._engine.decode, self._engine.batch / max(1, len(copy.giving)))

    def _progress(self, copy: _Copy) -> None:
        gone = self.now - copy.at_ns
        if copy.giving or copy.reading:
            copy.busy_ns += gone
        if copy.giving:
            more = gone / SECOND_NS * self._rate(copy)
            copy.progress += more
            self._tokens += round(more * len(copy.giving) * MILLI)
        copy.at_ns = self.now

    def _next_end(self, copy: _Copy) -> None:
        copy.version += 1
        if copy.giving:
            left = max(0.0, copy.giving[0][0] - copy.progress) / self._rate(copy)
            version = copy.version
            self._at(self.now + math.ceil(left * SECOND_NS), lambda: self._ends(copy, version))

    def _ends(self, copy: _Copy, version: int) -> None:
        if version != copy.version:
            return
        self._progress(copy)
        while copy.giving and copy.giving[0][0] <= copy.progress + 1e-6:
            _, _, asked = heapq.heappop(copy.giving)
            copy.seat.under_way.discard(asked)
            copy.held -= asked.request.prompt + asked.request.completion
            self._in_flight -= 1
            took = self.now - asked.at_ns
            self.result.answered += 1
            self.result.tokens += asked.request.completion
            self.result.latency.add(took / SECOND_NS)
            self._count("latency", self.now - (asked.taken_ns if asked.is_cold else asked.at_ns))
            self._line.served_in((self.now - asked.taken_ns) / SECOND_NS)
        self._next_end(copy)
        self._line.advance()

    def _count(self, what: str, ns: int) -> None:
        counts = self._counts[what]
        bucket = bucket_of(ns)
        counts[bucket] = counts.get(bucket, 0) + 1

    # Replicas

    def _look(self) -> None:
        """Decide how many replicas there are to be, as the control plane does, and have them."""
        for copy in [one for one in self._leaving if not one.seat.under_way]:
            self._leaving.remove(copy)
            self._settle(copy)
        decision = self._decide()
        if decision.wanted != self._wanted:
            self.result.changes += self._wanted >= 0
            self._wanted = decision.wanted
        while len(self._copies) < decision.wanted:
            if not self._stay():
                self._launch()
        spare = len(self._copies) - decision.wanted
        for copy in sorted(self._copies, key=lambda one: (one.is_ready, len(one.seat.under_way), -one.number))[:spare]:
            copy.seat.is_leaving = True
            self._copies.remove(copy)
            self._leaving.append(copy)
            self._lay_route()
        self.result.most = max(self.result.most, len(self._copies) + len(self._leaving))
        self._looks_at = 0
        self._look_in(self._look_ns if self._in_flight or self._line.count else _IDLE_LOOK_NS)

    def _look_in(self, ns: int) -> None:
        """Look again after so long, unless it is looked before."""
        if not self.now <= self._looks_at <= self.now + ns:
            self._looks_at = due = self.now + ns
            self._at(due, lambda: self._look() if due == self._looks_at else None)

    def _decide(self) -> Decision:
        ready = [copy for copy in self._copies if copy.is_ready]
        for copy in ready:
            self._progress(copy)
        felt = FeltCounts(
            ttft=dict(self._counts["ttft"]),
            latency=dict(self._counts["latency"]),
            queue=dict(self._counts["queue"]),
            tokens=self._tokens // MILLI,
        )
        self._loads.hear("twin/1", Load(models={self._model: ModelLoad(felt=felt)}))
        seen = self._loads.felt(self._model, window_s=self._service.scaling.window_ns / SECOND_NS)
        started, self._started = tuple(self._started), []
        caches = [min(MILLI, copy.held * MILLI // self._engine.cache) for copy in ready]
        busy = [MILLI * bool(copy.giving or copy.reading) for copy in ready]
        signals = Signals(
            in_flight=self._in_flight,
            waiting=self._line.count,
            ready=len(ready),
            coming=len(self._copies) - len(ready),
            ttft_ns=seen.ttft_ns,
            latency_ns=seen.latency_ns,
            queue_ns=seen.queue_ns,
            tokens_milli=seen.tokens_milli,
            engine_queue=sum(max(0, copy.reading - 1) for copy in ready),
            kv_cache_milli=sum(caches) // len(caches) if caches else None,
            gpu_milli=sum(busy) // len(busy) if busy else None,
            starts_ns=started,
        )
        if not self._service.is_scaled:
            return Decision(wanted=self._service.replicas, why="always as many")
        decision, self._memory = decide(bounds_of(self._service), signals, self._memory, now=self.now)
        return decision

    def _stay(self) -> bool:
        """Whether one that was to leave stays after all."""
        copy = next((one for one in reversed(self._leaving) if one.is_ready), None)
        if copy is None:
            return False
        copy.seat.is_leaving = False
        self._leaving.remove(copy)
        self._copies.append(copy)
        self._lay_route()
        self._line.advance()
        return True

    def _launch(self, *, ready_ns: int = 0) -> None:
        self.result.launches += 1
        copy = _Copy(
            number=self.result.launches,
            seat=self._rules.replica(f"{self._model}-{self.result.launches}"),
            launched_ns=self.now,
            ready_ns=ready_ns or self.now + self._engine.start_ns,
            at_ns=self.now,
        )
        self._copies.append(copy)
        if not ready_ns:
            self._at(copy.ready_ns, lambda: self._is_up(copy))

    def _is_up(self, copy: _Copy) -> None:
        if copy in self._copies:
            copy.is_ready = True
            copy.at_ns = self.now
            self._started += [self.now - copy.launched_ns] if self.now > copy.launched_ns else []
            self._lay_route()
            self._line.advance()

    def _lay_route(self) -> None:
        seats = [copy.seat for copy in self._copies if copy.is_ready]
        self._route = self._rules.route(self._model, seats, self._service.concurrency)

    def _settle(self, copy: _Copy) -> None:
        """Enter what a replica took that ends."""
        self._progress(copy)
        copy.ended_ns = self.now
        self.result.replica_ns += self.now - copy.launched_ns
        self.result.busy_ns += copy.busy_ns
        if copy.is_ready:
            self.result.ready_ns += self.now - copy.ready_ns


def bins(result: Result) -> Iterator[tuple[float, float, float, float, float]]:
    """Rows of a series: seconds since the beginning, requests a second, replicas, waiting, late first tokens in s."""
    series = result.series
    for index, row in enumerate(zip(series.asked, series.replicas, series.waiting, series.late, strict=True)):
        yield (index * series.width_ns / SECOND_NS, *row)
