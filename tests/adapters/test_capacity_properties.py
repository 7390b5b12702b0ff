"""Whatever breaks in whatever order: ceilings hold, what runs is not ended, and in the end nothing is left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.core.test_bursting import gang, offer
from tidemill.clouds.simulated import SimulatedAccount, SimulatedCloud
from tidemill.control.capacity import Capacity, CapacitySettings, View
from tidemill.core import rentals as rentals_module
from tidemill.core.bursting import BurstPolicy, WaitingJob, cost_micro
from tidemill.core.rentals import Machine, Presence
from tidemill.errors import CloudLost, CloudRefused
from tidemill.model.cloud import Billing, InterruptionNotice, Market, ProvisionRequest, RentalState
from tidemill.model.events import Fact, Marking, NodeMarked, NodeWentAway
from tidemill.model.ids import JobId, NodeId, SiteId
from tidemill.store.memory import MemoryStore
from tidemill.units import HOUR_NS, MINUTE_NS, SECOND_NS, USD_MICRO

BURST = SiteId("burst")
BY_SECOND = Billing(granularity_ns=SECOND_NS, minimum_ns=MINUTE_NS)
POLICY = BurstPolicy(
    max_instances=3,
    max_micro_per_hour=4 * USD_MICRO,
    max_micro_per_month=40 * USD_MICRO,
    idle_ns=MINUTE_NS,
    boot_limit_ns=4 * MINUTE_NS,
)
OFFERS = (offer("one", usd=1), offer("two", usd=1.5, gpus=2), offer("one", usd=0.3, market=Market.SPOT))
OPS = (
    "round", "job", "pair", "gone", "join", "idle", "die before", "die after", "before", "after", "no capacity",
    "refused", "down", "up", "restart", "notice", "taken", "jump on", "jump back", "silent", "heard",
)  # fmt: skip


class Crash(BaseException):
    """The control plane dies here."""


@dataclass
class Play:
    """One site on a simulated cloud, and what an auditor knows who sees both."""

    account: SimulatedAccount = field(default_factory=lambda: SimulatedAccount(offers=OFFERS, lag_ns=45 * SECOND_NS))
    store: MemoryStore = field(default_factory=MemoryStore)
    elapsed: int = SECOND_NS
    shift: int = 0
    waiting: list[WaitingJob] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    numbers: Any = field(default_factory=count)
    dies: str = ""
    violated: str = ""

    def __post_init__(self) -> None:
        self.account.now = 1_700_000_000 * SECOND_NS
        self.restart()

    def restart(self) -> None:
        play = self

        class Fragile(SimulatedCloud):
            def provision(self, request: ProvisionRequest) -> Any:
                dies, play.dies = play.dies, ""
                if dies == "die before":
                    raise Crash
                answer = super().provision(request)
                if dies == "die after":
                    raise Crash
                return answer

            def release(self, instance_id: str) -> None:
                one = play.account.alive().get(instance_id)
                machine = play.machines.get(one.node_name) if one is not None else None
                if machine is not None and machine.running and machine.presence is not Presence.LOST:
                    play.violated = f"{instance_id} was ended while something ran there"
                super().release(instance_id)

        self.dies = ""
        self.capacity = Capacity(
            Fragile(self.account, installation="here"),
            self.store,
            CapacitySettings(site=BURST, policy=POLICY),
            epoch=self.store.lead(holder="test"),
            view=lambda: View(machines=tuple(self.machines.values()), waiting=tuple(self.waiting)),
            tell=self.tell,
            script=lambda rental: f"#!/bin/sh\n# {rental.id}\n",
            clock=lambda: self.account.now + self.shift,
            elapsed=lambda: self.elapsed,
            entropy=lambda: next(self.numbers),
        )

    def tell(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            if isinstance(fact, NodeMarked):
                machine = self.machines[fact.node_id]
                running = 0 if fact.marking is Marking.DRAIN else machine.running
                self.machines[fact.node_id] = replace(machine, is_closed=True, running=running)
            elif isinstance(fact, NodeWentAway):
                machine = self.machines[fact.node_id]
                if fact.node_id in {one.node_name for one in self.account.alive().values()}:
                    self.violated = f"{fact.node_id} was said to be gone, and is there"
                self.machines[fact.node_id] = replace(machine, presence=Presence.LOST, running=0)

    def do(self, op: str) -> None:
        match op:
            case "round":
                self.round(30 * SECOND_NS)
            case "job" | "pair":
                wants = gang(2) if op == "pair" else gang()
                markets = (Market.ON_DEMAND, Market.SPOT) if next(self.numbers) % 2 else (Market.ON_DEMAND,)
                self.waiting.append(
                    WaitingJob(
                        id=JobId(f"j{next(self.numbers)}"), gang=wants, duration_ns=HOUR_NS, forecast_ns=0,
                        waiting_micro_per_hour=5 * USD_MICRO, markets=markets,
                    )
                )  # fmt: skip
            case "gone":
                self.waiting = self.waiting[1:]
            case "join":
                for one in self.account.alive().values():
                    if one.node_name not in self.machines:
                        running = len(self.waiting[:1])
                        self.waiting = self.waiting[1:]
                        node = NodeId(one.node_name)
                        self.machines[node] = Machine(node_id=node, name=one.node_name, running=running)
            case "idle":
                self.machines = {name: replace(one, running=0) for name, one in self.machines.items()}
            case "die before" | "die after":
                self.dies = op
            case "before" | "after" | "no capacity" | "refused":
                self.account.faults.append(op)
            case "down" | "up":
                self.account.is_down = op == "down"
            case "restart":
                self.restart()
            case "notice" | "taken":
                for one in list(self.account.alive().values())[:1]:
                    ends = self.account.now + 2 * MINUTE_NS
                    self.account.notices.append(InterruptionNotice(instance_id=one.id, ends_ns=ends))
                    if op == "taken":
                        self.account.end(one.id)
            case "jump on" | "jump back":
                self.shift += HOUR_NS if op == "jump on" else -HOUR_NS
            case "silent" | "heard":
                there = Presence.SILENT if op == "silent" else Presence.THERE
                self.machines = {
                    name: one if one.presence is Presence.LOST else replace(one, presence=there)
                    for name, one in self.machines.items()
                }

    def round(self, ns: int) -> None:
        self.account.now += ns
        self.elapsed += ns
        try:
            self.capacity.round()
        except (CloudLost, CloudRefused):
            pass
        except Crash:
            self.restart()
        self.audit()

    def audit(self) -> None:
        assert not self.violated, self.violated
        alive = list(self.account.alive().values())
        assert len(alive) <= POLICY.max_instances, "more instances than there may be"
        prices = {one.id: one.offer.most_micro_per_hour for one in self.store.rentals()}
        assert set(prices) >= {one.client_token for one in alive}, "an instance that nobody wrote down"
        over = {one.id for one in self.store.rentals() if one.state is RentalState.OVER}
        assert not over & {one.client_token for one in alive}, "what is said to be over is there"
        assert sum(prices[one.client_token] for one in alive) <= POLICY.max_micro_per_hour, "too much an hour"
        spent = 0
        for _, one, made, ended in self.account._instances.values():
            spent += cost_micro(prices[one.client_token], (ended or self.account.now) - made, BY_SECOND)
        assert spent <= POLICY.max_micro_per_month, "more spent than may be"

    def settle(self) -> None:
        """Everything works again and nobody waits: all of it is given back, and the books say so."""
        self.account.is_down, self.dies, self.waiting = False, "", []
        self.account.faults.clear()
        self.do("heard")
        self.do("join")
        for _ in range(12):
            self.do("idle")
            self.round(6 * MINUTE_NS)
        assert not self.account.alive(), "an orphan"
        assert {one.state for one in self.store.rentals()} <= {RentalState.OVER}, "the books are open"


def play(ops: Sequence[str]) -> None:
    it = Play()
    for op in ops:
        it.do(op)
    it.settle()


HISTORIES = st.lists(st.sampled_from(("round",) * 14 + ("job",) * 4 + ("join",) * 3 + OPS), min_size=12, max_size=60)


@given(HISTORIES)
@settings(max_examples=200, deadline=None)
def test_whatever_breaks_nothing_is_left_over(ops: list[str]) -> None:
    play(ops)


def found_in_histories(attempts: int = 600) -> bool:
    @given(HISTORIES)
    @settings(max_examples=attempts, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def run(ops: list[str]) -> None:
        play(ops)

    try:
        run()
    except (AssertionError, ExceptionGroup, KeyError):
        return True
    return False


def asks_before_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Capacity._commit

    def late(self: Capacity, changes: Any, entries: Any) -> None:
        for change in changes:
            if change.assumed is None:
                self._provisioner.provision(
                    ProvisionRequest(
                        client_token=change.after.id, offer=change.after.offer, site="burst", user_data="",
                        node_name=change.after.node_name,
                    )
                )  # fmt: skip
        commit(self, changes, entries)

    monkeypatch.setattr(Capacity, "_commit", late)


def releases_without_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    rented = rentals_module._rented

    def closed(rental: Any, machine: Any, *rest: Any, **more: Any) -> Any:
        seen = rented(rental, machine, *rest, **more)
        return replace(seen, running=0)

    monkeypatch.setattr(rentals_module, "_rented", closed)


def takes_a_lagging_list_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    lasts = rentals_module.Stopwatch.lasts_ns

    def at_once(self: Any, what: str, whose: str, *, elapsed: int) -> int:
        return HOUR_NS if what == "missing" else lasts(self, what, whose, elapsed=elapsed)

    monkeypatch.setattr(rentals_module.Stopwatch, "lasts_ns", at_once)


def a_new_token_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rent = SimulatedAccount.rent
    numbers = count()

    def anew(self: SimulatedAccount, installation: str, request: ProvisionRequest) -> Any:
        other = replace(request, client_token=f"{request.client_token}-{next(numbers)}")
        return rent(self, installation, other)

    monkeypatch.setattr(SimulatedAccount, "rent", anew)


def gives_up_on_a_lost_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Capacity._rent

    def rent(self: Capacity, rental: Any, *, is_first: bool) -> None:
        original(self, rental, is_first=is_first)
        after = next(one for one in self._store.rentals() if one.id == rental.id)
        if after.state is RentalState.WANTED:
            self._give_up(after, "Lost", "", is_first=True)

    monkeypatch.setattr(Capacity, "_rent", rent)


def never_ends_orphans_nor_leavers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capacity, "_end", lambda *_: None)


@pytest.mark.parametrize(
    "plant",
    [
        asks_before_it_stores,
        releases_without_closing,
        takes_a_lagging_list_at_its_word,
        a_new_token_each_time,
        gives_up_on_a_lost_answer,
        never_ends_orphans_nor_leavers,
    ],
)
def test_each_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert found_in_histories()
