"""A cloud site rents, adopts, closes and gives back, on EC2 by moto; whatever breaks when, no orphan stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.aws import Aws
from tests.core.history import SITE
from tests.core.test_bursting import gang
from tests.core.yard import CALM, Yard, gpu_node, spec
from tidemill.clouds.booting import BootSettings, boot_script
from tidemill.control.capacity import Capacity, CapacitySettings, View, view_of
from tidemill.control.driver import Driver
from tidemill.control.turns import TurnLoop
from tidemill.core import rentals as rentals_module
from tidemill.core.bursting import BurstPolicy, WaitingJob
from tidemill.core.rentals import Machine, Patience, Presence
from tidemill.errors import CloudLost, Fenced, Unavailable
from tidemill.model.cloud import Instance, InterruptionNotice, Market, ProvisionRequest, Rental, RentalState
from tidemill.model.events import Fact, Marking, NodeMarked, NodeWentAway
from tidemill.model.ids import JobId, NodeId, SiteId
from tidemill.ports import Batch, Provisioner
from tidemill.store.memory import MemoryStore
from tidemill.store.sql import SqlStore
from tidemill.units import DAY_NS, HOUR_NS, MINUTE_NS, SECOND_NS, USD_MICRO

BURST = SiteId("burst")
POLICY = BurstPolicy(
    max_instances=4, max_micro_per_hour=10 * USD_MICRO, max_micro_per_month=500 * USD_MICRO, idle_ns=10 * MINUTE_NS
)
OVER = ("NoCapacity", "Refused")


@pytest.fixture(scope="module")
def account() -> Iterator[Aws]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        aws = Aws()
        yield aws
        aws.close()


@pytest.fixture
def aws(account: Aws) -> Aws:
    account.reset()
    return account


class Crash(BaseException):
    """The control plane dies here."""


class Fragile:
    """A provisioner in a process that dies on request, before or after it asked the cloud to rent."""

    def __init__(self, inner: Provisioner) -> None:
        self.inner = inner
        self.dies = ""
        self.notices: tuple[InterruptionNotice, ...] = ()
        self.is_down = False

    def provision(self, request: ProvisionRequest) -> Any:
        if self.dies == "before":
            raise Crash
        answer = self.inner.provision(request)
        if self.dies == "after":
            raise Crash
        return answer

    def instances(self) -> tuple[Instance, ...]:
        if self.is_down:
            raise CloudLost("down")
        return self.inner.instances()

    def interruptions(self) -> tuple[InterruptionNotice, ...]:
        return self.notices

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Burst:
    """One cloud site: its store, what its world says, and control planes one after the other."""

    aws: Aws
    store: Any = field(default_factory=MemoryStore)
    now: int = 1_700_000_000 * SECOND_NS
    elapsed: int = 5 * SECOND_NS
    waiting: list[WaitingJob] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    told: list[Fact] = field(default_factory=list)
    over: list[Rental] = field(default_factory=list)
    policy: BurstPolicy = POLICY
    offers: dict[str, Any] = field(default_factory=lambda: {"markets": (Market.ON_DEMAND,), "subnets": ()})
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.store.migrate()
        self.restart()

    def restart(self) -> Capacity:
        """A new control plane, which leads from now on and remembers nothing."""
        changes = {"instance_types": ("g4dn.xlarge",), **self.offers}
        if not self.offers.get("subnets"):
            first = self.aws.ec2.describe_subnets()["Subnets"]
            changes["subnets"] = tuple(sorted(one["SubnetId"] for one in first if one["AvailabilityZone"][-1] == "a"))
        self.cloud = Fragile(self.aws.provisioner("here", **changes))
        settings = CapacitySettings(site=BURST, policy=self.policy, patience=Patience())
        self.capacity = Capacity(
            self.cloud,
            self.store,
            settings,
            epoch=self.store.lead(holder="test"),
            view=lambda: View(machines=tuple(self.machines.values()), waiting=tuple(self.waiting)),
            tell=self.tell,
            script=lambda rental: boot_script(
                BootSettings(address="head:7070"), token=f"tm_{rental.id}", node_name=rental.node_name
            ),
            clock=lambda: self.now,
            elapsed=lambda: self.elapsed,
            entropy=lambda: next(self.numbers),
            ended=self.over.append,
        )
        return self.capacity

    def tell(self, facts: Sequence[Fact]) -> None:
        """What the world makes of facts."""
        self.told += facts
        for fact in facts:
            if isinstance(fact, NodeMarked):
                machine = self.machines[fact.node_id]
                running = 0 if fact.marking is Marking.DRAIN else machine.running
                self.machines[fact.node_id] = replace(machine, is_closed=True, running=running)
            elif isinstance(fact, NodeWentAway):
                lost = replace(self.machines[fact.node_id], presence=Presence.LOST, running=0)
                self.machines[fact.node_id] = lost

    def wait(self, *names: str, **more: Any) -> None:
        """Jobs that wait from now on, each worth a machine of its own."""
        known: dict[str, Any] = {
            "gang": gang(),
            "duration_ns": HOUR_NS,
            "forecast_ns": 0,
            "waiting_micro_per_hour": 3 * USD_MICRO,
        }
        self.waiting += [WaitingJob(id=JobId(name), **(known | more)) for name in names]

    def passes(self, ns: int) -> None:
        self.now += ns
        self.elapsed += ns

    def round(self, *, after_ns: int = 10 * SECOND_NS) -> None:
        self.passes(after_ns)
        self.capacity.round()

    def join(self, running: int = 1) -> list[Machine]:
        """Every instance whose machine has not joined does so, and the jobs that wait run there."""
        for instance in self.cloud.inner.instances():
            if instance.id in self.aws.living() and instance.node_name not in self.machines:
                node = NodeId(instance.node_name)
                self.machines[node] = Machine(node_id=node, name=instance.node_name, running=running)
        if running:
            self.waiting.clear()
        return list(self.machines.values())

    def set_running(self, running: int) -> None:
        self.machines = {name: replace(one, running=running) for name, one in self.machines.items()}

    def rentals(self, *states: RentalState) -> list[Rental]:
        return [one for one in self.store.rentals() if not states or one.state in states]

    def states(self) -> list[str]:
        return [f"{one.state}" + (f" {one.cause}" if one.cause else "") for one in self.store.rentals()]

    def events(self) -> list[str]:
        return [event.entry.type for event in self.store.events(limit=1_000)]

    def audit(self) -> None:
        """The account has nothing of ours that is not written down, and nothing twice."""
        living = {one.id: one.client_token for one in self.cloud.inner.instances() if one.id in self.aws.living()}
        known = {one.id for one in self.store.rentals() if one.state is not RentalState.OVER}
        assert set(living.values()) <= known, "an orphan"
        assert len(set(living.values())) == len(living), "one rental has two instances"


@pytest.fixture
def burst(aws: Aws) -> Burst:
    return Burst(aws)


def running(burst: Burst, *jobs: str) -> str:
    """The id of the instance that was rented for these jobs and runs them."""
    burst.wait(*(jobs or ("j1",)))
    burst.round()
    burst.join()
    burst.round()
    (rental,) = burst.rentals(RentalState.JOINED)
    return rental.instance_id


# -- as it should go --------------------------------------------------------------------------------------------------


def test_from_waiting_to_given_back(burst: Burst, aws: Aws) -> None:
    burst.wait("j1")
    burst.round()
    (rental,) = burst.rentals()
    assert (rental.state, rental.jobs, rental.offer.instance_type) == (RentalState.BOOTING, ("j1",), "g4dn.xlarge")
    assert aws.living() == {rental.instance_id}
    for _ in range(3):
        burst.round()
    assert aws.door.count("RunInstances") == 1, "nothing more is rented while it boots"
    burst.join()
    burst.round()
    assert burst.states() == ["joined"]
    burst.passes(DAY_NS // 24)
    burst.round()
    assert burst.states() == ["joined"], "what runs something stays"
    burst.set_running(0)
    burst.round()
    burst.round(after_ns=POLICY.idle_ns)
    assert burst.states() == ["joined IsIdle"]
    assert [fact.marking for fact in burst.told if isinstance(fact, NodeMarked)] == [Marking.CORDON]
    assert aws.living(), "it is closed first"
    burst.round()
    assert burst.states() == ["leaving IsIdle"]
    assert not aws.living()
    burst.round()
    assert burst.states() == ["over IsIdle"]
    assert [type(fact).__name__ for fact in burst.told] == ["NodeMarked", "NodeWentAway"]
    assert burst.told[-1].detail == "shut down"  # type: ignore[union-attr]
    (over,) = burst.over
    assert over.cost_micro == pytest.approx(587_000 * (over.ended_ns - over.created_ns) / HOUR_NS, rel=0.01)
    assert burst.events() == [
        "InstanceWanted", "InstanceRented", "InstanceJoined", "InstanceClosed", "InstanceGivenUp", "InstanceEnded",
    ]  # fmt: skip
    burst.audit()


def test_why_nothing_is_rented_is_said(burst: Burst) -> None:
    burst.wait("j1", waiting_micro_per_hour=0)
    burst.round()
    assert not burst.rentals()
    assert [(job, reason.code) for job, reason in burst.capacity.status.refused] == [("j1", "WaitingIsCheaper")]


def test_a_machine_that_does_not_join_is_ended_and_its_offer_left_out_for_a_while(burst: Burst, aws: Aws) -> None:
    burst.wait("j1")
    burst.round()
    burst.round()
    burst.round(after_ns=POLICY.boot_limit_ns)
    burst.round()
    burst.round()
    assert burst.states() == ["over DidNotJoin"]
    assert not aws.living()
    assert burst.capacity.status.refused[0][1].code == "NoOfferFits"
    burst.round(after_ns=HOUR_NS)
    assert len(burst.rentals(RentalState.BOOTING)) == 1


def test_a_notice_empties_the_machine_in_time(burst: Burst, aws: Aws) -> None:
    instance = running(burst)
    ends = burst.now + 2 * MINUTE_NS
    burst.cloud.notices = (InterruptionNotice(instance_id=instance, ends_ns=ends, detail="marked-for-termination"),)
    burst.round()
    marks = [fact for fact in burst.told if isinstance(fact, NodeMarked)]
    assert [(fact.marking, fact.until_ns) for fact in marks] == [(Marking.DRAIN, ends)]
    burst.round()
    assert len([fact for fact in burst.told if isinstance(fact, NodeMarked)]) == 1, "it is told once"
    assert burst.states() == ["leaving Interrupted"], "once it is empty it need not be paid for"
    burst.round()
    assert burst.states() == ["over Interrupted"]


def test_what_the_cloud_ended_is_known_to_run_nothing(burst: Burst, aws: Aws) -> None:
    instance = running(burst)
    aws.end(instance)
    burst.round()
    assert burst.states() == ["over EndedByCloud"]
    (gone,) = [fact for fact in burst.told if isinstance(fact, NodeWentAway)]
    assert gone.detail == f"the cloud ended {instance}"
    burst.wait("j2")
    burst.round()
    assert len(aws.living()) == 1


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_crash_around_the_call_leaves_no_orphan(burst: Burst, aws: Aws, dies: str) -> None:
    burst.wait("j1")
    burst.cloud.dies = dies
    with pytest.raises(Crash):
        burst.round()
    assert burst.states() == ["wanted"], "the wish is stored before the call"
    assert len(aws.living()) == (dies == "after")
    burst.restart()
    burst.round()
    assert burst.states() == ["booting"]
    assert len(aws.living()) == 1
    burst.audit()


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_crash_and_then_the_job_is_gone(burst: Burst, aws: Aws, dies: str) -> None:
    burst.wait("j1")
    burst.cloud.dies = dies
    with pytest.raises(Crash):
        burst.round()
    burst.waiting.clear()
    burst.restart()
    burst.round()
    for _ in range(6):
        burst.round(after_ns=6 * MINUTE_NS)
    assert burst.states() == ["over NobodyWaits"]
    assert not aws.living()


def test_a_crash_before_the_wish_is_stored_asks_for_nothing(burst: Burst, aws: Aws) -> None:
    class Full(MemoryStore):
        def commit(self, batch: Batch) -> int:
            raise Unavailable("down")

    burst.store = Full()
    burst.restart()
    burst.wait("j1")
    with pytest.raises(Unavailable):
        burst.round()
    assert aws.door.count("RunInstances") == 0


@pytest.mark.parametrize("fault", ["before", "after", "RequestLimitExceeded", "InternalError"])
def test_an_answer_that_is_lost_is_asked_for_again(burst: Burst, aws: Aws, fault: str) -> None:
    burst.wait("j1")
    aws.door.faults["RunInstances"] = [fault, fault]
    burst.round()
    assert burst.states() in (["wanted"], ["booting"])
    for _ in range(3):
        burst.round()
    assert burst.states() == ["booting"]
    assert len(aws.living()) == 1
    burst.audit()


def test_a_cloud_that_is_down_says_nothing(burst: Burst, aws: Aws) -> None:
    instance = running(burst)
    burst.cloud.is_down = True
    for _ in range(5):
        burst.passes(DAY_NS)
        with pytest.raises(CloudLost):
            burst.capacity.round()
    assert burst.states() == ["joined"]
    assert not [fact for fact in burst.told if isinstance(fact, NodeWentAway)]
    burst.cloud.is_down = False
    burst.round()
    assert aws.living() == {instance}


def test_the_next_offer_is_tried_when_there_is_no_capacity(aws: Aws) -> None:
    burst = Burst(aws, offers={"subnets": tuple(one["SubnetId"] for one in aws.ec2.describe_subnets()["Subnets"]),
                               "markets": (Market.ON_DEMAND,)})  # fmt: skip
    burst.wait("j1")
    aws.door.faults["RunInstances"] = ["InsufficientInstanceCapacity"]
    burst.round()
    assert burst.states() == ["over NoCapacity"]
    burst.round()
    first, second = burst.rentals()
    assert (first.state, second.state) == (RentalState.OVER, RentalState.BOOTING)
    assert first.offer.zone != second.offer.zone
    assert "InstanceRefused" in burst.events()


def test_a_refusal_is_told_and_not_repeated_at_once(burst: Burst, aws: Aws) -> None:
    burst.wait("j1")
    aws.door.faults["RunInstances"] = ["VcpuLimitExceeded"]
    burst.round()
    assert burst.states() == ["over Refused"]
    burst.round()
    assert aws.door.count("RunInstances") == 1
    (refused,) = [event.entry for event in burst.store.events() if event.entry.type == "InstanceRefused"]
    assert "quota" in str(dict(refused.body)["detail"])


def test_a_refusal_after_a_lost_answer_is_not_taken_for_the_last_word(burst: Burst, aws: Aws) -> None:
    """The first request made an instance; then the credentials were withdrawn."""
    burst.wait("j1")
    aws.door.faults["RunInstances"] = ["after"]
    burst.round()
    (made,) = aws.living()
    burst.cloud.instances = lambda: ()  # type: ignore[method-assign] - the list is behind
    aws.door.faults["DescribeInstances"] = ["UnauthorizedOperation"]
    burst.round()
    assert burst.states() == ["leaving Refused"]
    del burst.cloud.instances
    burst.round()
    assert not aws.living()
    burst.round()
    assert burst.states() == ["over Refused"]
    assert burst.rentals()[0].instance_id == made


def test_what_has_our_tag_and_no_rental_is_ended_after_a_while(burst: Burst, aws: Aws) -> None:
    offer = burst.cloud.offers()[0]

    def orphan(token: str, site: str, installation: str = "here") -> str:
        request = ProvisionRequest(client_token=token, offer=offer, site=site, node_name=f"n-{token}", user_data="#!")
        made = aws.provisioner(installation).provision(request)
        assert isinstance(made, Instance)
        return made.id

    ours = orphan("ren_lost", "burst")
    others = {orphan("ren_a", "elsewhere"), orphan("ren_b", "burst", "another"), aws.stranger()}
    burst.round()
    burst.round(after_ns=9 * MINUTE_NS)
    assert aws.living() == {ours, *others}
    burst.round(after_ns=2 * MINUTE_NS)
    assert aws.living() == others
    burst.round(after_ns=HOUR_NS)
    assert aws.living() == others, "what is not this site's is never touched"


def test_an_orphan_at_work_is_left_to_people(burst: Burst, aws: Aws) -> None:
    """After an old backup was restored nothing is known of what was rented since."""
    running(burst)
    burst.store = MemoryStore()
    burst.restart()
    for _ in range(4):
        burst.round(after_ns=HOUR_NS)
    assert len(aws.living()) == 1
    burst.set_running(0)
    burst.round()
    assert not aws.living()


def test_a_second_instance_under_one_token_is_an_orphan(burst: Burst, aws: Aws) -> None:
    instance = running(burst)
    tags = aws.described(instance)["Tags"]
    twin = aws.ec2.run_instances(
        ImageId=aws.image, InstanceType="g4dn.xlarge", MinCount=1, MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": [t for t in tags if t["Key"] != "tidemill:node"]}],
    )["Instances"][0]["InstanceId"]  # fmt: skip
    burst.round()
    burst.round(after_ns=11 * MINUTE_NS)
    assert aws.living() == {instance}
    assert twin != instance


@pytest.mark.parametrize("jump", [-40 * DAY_NS, -HOUR_NS, HOUR_NS, DAY_NS])
def test_a_clock_that_jumps_ends_nothing(burst: Burst, aws: Aws, jump: int) -> None:
    """Waiting, booting, idle and orphaned times are by a clock that does not jump."""
    burst.wait("j1", "j2")
    burst.round()
    burst.round()
    burst.now += jump
    burst.round()
    assert len(aws.living()) == 2
    burst.join()
    burst.round()
    burst.set_running(0)
    burst.round()
    burst.now -= jump
    burst.round()
    assert burst.states() == ["joined", "joined"]
    burst.audit()


def test_a_control_plane_that_leads_no_more_rents_nothing(burst: Burst, aws: Aws) -> None:
    older = burst.capacity
    burst.restart()
    burst.wait("j1")
    burst.passes(SECOND_NS)
    with pytest.raises(Fenced):
        older.round()
    assert aws.door.count("RunInstances") == 0


def test_a_list_of_another_account_says_nothing_about_ours(burst: Burst, aws: Aws) -> None:
    instance = running(burst)
    scope = burst.cloud.scope()
    burst.cloud.scope = lambda: "ec2/another/eu-west-1"  # type: ignore[method-assign]
    burst.cloud.inner.instances = lambda: ()  # type: ignore[method-assign]
    for _ in range(3):
        burst.round(after_ns=HOUR_NS)
    assert burst.states() == ["joined"]
    assert scope.startswith("ec2/123456789012/")
    assert aws.living() == {instance}


def test_a_silent_machine_keeps_its_instance_and_a_lost_one_does_not(burst: Burst, aws: Aws) -> None:
    running(burst)
    (name,) = burst.machines
    burst.machines[name] = replace(burst.machines[name], presence=Presence.SILENT)
    burst.round()
    burst.round(after_ns=DAY_NS)
    assert burst.states() == ["joined"]
    burst.machines[name] = replace(burst.machines[name], presence=Presence.LOST, running=0)
    burst.round()
    burst.round(after_ns=11 * MINUTE_NS)
    assert burst.states() == ["leaving MachineLost"]
    assert not aws.living()


def test_the_months_ceiling_empties_machines_that_run_on(aws: Aws) -> None:
    burst = Burst(aws, policy=replace(POLICY, max_micro_per_month=2 * USD_MICRO))
    running(burst)
    for _ in range(40):
        burst.round(after_ns=5 * MINUTE_NS)
    assert burst.states() == ["over MonthIsSpent"]
    assert burst.over[0].cost_micro <= 2 * USD_MICRO
    assert Marking.DRAIN in {fact.marking for fact in burst.told if isinstance(fact, NodeMarked)}
    burst.wait("j2")
    burst.round()
    assert burst.capacity.status.refused[0][1].code == "TooMuchThisMonth"


def test_everything_survives_a_restart_in_a_database(aws: Aws, tmp_path: Path) -> None:
    burst = Burst(aws, store=SqlStore(f"sqlite:///{tmp_path / 'control.db'}"))
    burst.wait("j1")
    burst.cloud.dies = "after"
    with pytest.raises(Crash):
        burst.round()
    burst.store.close()
    burst.store = SqlStore(f"sqlite:///{tmp_path / 'control.db'}")
    burst.restart()
    burst.round()
    burst.join()
    burst.round()
    assert burst.states() == ["joined"]
    assert burst.store.integrity() == ()
    burst.store.close()


# -- planted bugs -----------------------------------------------------------------------------------------------------


def asks_before_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Capacity._commit

    def late(self: Capacity, changes: Any, entries: Any) -> None:
        for change in changes:
            if change.assumed is None:
                self._rent(change.after, is_first=True)
        commit(self, changes, entries)

    monkeypatch.setattr(Capacity, "_commit", late)


def forgets_who_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rentals_module, "_by_rental", lambda instances: {one.id: one for one in instances})
    monkeypatch.setattr(Capacity, "_rent", lambda *_, **__: None)


def takes_missing_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "instances", lambda self: () if self.is_down else self.inner.instances())


def ends_orphans_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = rentals_module._orphan
    monkeypatch.setattr(
        rentals_module, "_orphan", lambda instance, _machine, *rest, **more: orphan(instance, None, *rest, **more)
    )


def measures_by_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capacity, "_elapsed", property(lambda self: self._clock, lambda *_: None), raising=False)


BUGS: tuple[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Burst, Aws], None]], ...] = (
    (asks_before_it_stores, lambda burst, aws: test_a_crash_around_the_call_leaves_no_orphan(burst, aws, "before")),
    (asks_before_it_stores, test_a_control_plane_that_leads_no_more_rents_nothing),
    (forgets_who_was_asked, lambda burst, aws: test_a_crash_around_the_call_leaves_no_orphan(burst, aws, "after")),
    (takes_missing_for_gone, test_a_cloud_that_is_down_says_nothing),
    (ends_orphans_at_work, test_an_orphan_at_work_is_left_to_people),
    (measures_by_the_time_of_day, lambda burst, aws: test_a_clock_that_jumps_ends_nothing(burst, aws, DAY_NS)),
)


@pytest.mark.parametrize(("plant", "test"), BUGS)
def test_each_planted_bug_is_caught(
    aws: Aws, plant: Callable[[pytest.MonkeyPatch], None], test: Callable[[Burst, Aws], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(monkeypatch)
    with pytest.raises((AssertionError, Crash, pytest.fail.Exception)):
        test(Burst(aws), aws)


# -- what the world says ----------------------------------------------------------------------------------------------


def test_a_view_is_of_one_site_with_forecasts_of_all_that_waits() -> None:
    sites = (SITE, replace(SITE, id=BURST, name="burst"))
    yard = Yard(nodes=(gpu_node("a", 2), gpu_node("b", 2, site_id=BURST)), sites=sites)
    runs = yard.submit(spec(2, expected_duration_ns=HOUR_NS), runs_s=3_600)
    other = yard.submit(spec(2, expected_duration_ns=3 * HOUR_NS), runs_s=10_800)
    yard.run(10)
    waits = yard.submit(spec(2, expected_duration_ns=MINUTE_NS), runs_s=60)
    never = yard.submit(spec(8), runs_s=60)
    store = MemoryStore()
    turns = TurnLoop(
        Driver(yard.world, CALM), store, epoch=store.lead(holder="t"), last_seq=0, clock=lambda: yard.now,
        obey=lambda _: None, reload=lambda _: yard.world, on_fenced=lambda: None,
    )  # fmt: skip
    turns.start()
    policy = BurstPolicy(waiting_gpu_micro_per_hour=USD_MICRO)
    view = view_of(turns, BURST, CALM, policy, now=yard.now)
    turns.close()
    (machine,) = view.machines
    placed = next(job for job in (runs, other) if yard.nodes_of(job) == ["b"])
    assert (machine.name, machine.running, machine.presence) == ("b", 1, Presence.THERE)
    assert machine.busy_until_ns == yard.job(placed).started_ns + (HOUR_NS if placed == runs else 3 * HOUR_NS)
    jobs = {job.id: job for job in view.waiting}
    assert jobs[JobId(waits)].forecast_ns == yard.job(runs).started_ns + HOUR_NS
    assert jobs[JobId(waits)].waiting_micro_per_hour == 2 * USD_MICRO
    assert jobs.get(JobId(never)) is None or jobs[JobId(never)].forecast_ns == 0
