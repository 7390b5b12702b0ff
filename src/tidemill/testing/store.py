"""The contract that every store keeps, as checks that anybody can run against theirs: ``check_store``.

A check is given ``open_store``, which opens a store over one database, at first without a schema; called again,
it opens the same database again, as a restarted or a second control plane would. ``testing.history`` has one more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Final

from tidemill.errors import Fenced, InvalidRequest, Stale
from tidemill.model.artifact import Artifact
from tidemill.model.cloud import RentalState
from tidemill.model.fleet import NodeState, Outpost, Site, SiteKind
from tidemill.model.guard import Decision
from tidemill.model.ids import (
    DataSetId,
    JobId,
    NodeId,
    OrganizationId,
    OutpostId,
    PrincipalId,
    ProjectId,
    SiteId,
    TokenId,
    WorkloadId,
)
from tidemill.model.job import (
    AllocationState,
    AttemptState,
    Cause,
    Job,
    JobState,
)
from tidemill.model.ledger import CPU_METER, Evidence, TokenUsage
from tidemill.model.plan import Change, Reason, Waiting
from tidemill.model.rollout import RolloutState
from tidemill.model.spec import Kind
from tidemill.model.storage import DataSet, DataSetState
from tidemill.model.tenant import Organization, Principal, PrincipalKind, Project, Scope, Secret, Token
from tidemill.model.values import replace
from tidemill.ports import Batch, JobFilter, Page, Snapshot, Store
from tidemill.testing.samples import (
    BLUE,
    LARGE,
    NOW,
    RED,
    a_dataset,
    a_delivery_mark,
    a_habit,
    a_job,
    a_line,
    a_model,
    a_model_version,
    a_node,
    a_note,
    a_queue,
    a_reason,
    a_record,
    a_rental,
    a_reservation,
    a_rollout,
    a_usage,
    a_volume,
    a_workload,
    an_allocation,
    an_artifact,
    an_attempt,
    holds,
    moved,
    new,
    raises,
    same,
)
from tidemill.units import HOUR_NS

OpenStore = Callable[[], Store]


def check_store(fresh: Callable[[], OpenStore]) -> None:
    """Run every check of the contract, each over a new database, which ``fresh`` gives a way to open.

    Raises: AssertionError that says what was not kept.
    """
    for check in CHECKS:
        check(fresh())


def check_migration_is_harmless_twice(open_store: OpenStore) -> None:
    """A schema is made once, and is sound; an empty store has nothing in it."""
    store = open_store()
    store.migrate()
    store.migrate()
    same(store.load(), Snapshot(), "a new store is empty")
    same(store.integrity(), (), "a new store is sound")
    same(store.find_jobs(JobFilter()), Page(), "a new store has no jobs")
    same(store.ledger_totals().lines, 0, "a new store's books are empty")
    same(store.workload(WorkloadId("wl_none")), None, "there is no such workload")
    same(store.job(JobId("job_none")), None, "there is no such job")
    store.close()
    store.close()


def check_values_come_back_as_they_were(open_store: OpenStore) -> None:
    """Whatever is stored is read equal: texts of any script, nested tuples, enums, large numbers, bytes, None."""
    with _Session(open_store) as it:
        workload = a_workload(1, kind=Kind.SERVICE)
        job = replace(a_job(workload), not_before_ns=LARGE, exit_code=None, detail="ä\x00\t\u2028'\"")
        attempt = replace(an_attempt(job), exit_code=-9, cause=Cause.OUT_OF_MEMORY)
        worker = replace(an_allocation(attempt), cpu_used_ns=2**62, exit_code=137)
        entry = a_note(job, "Noted", text="ü", number=2**62, yes=True, no=False, nothing=None)
        line = a_line(0, 2**62, job=job, milli=10**6, amount_micro=-LARGE, energy_mj=LARGE, carbon_mg=0)
        policies = (a_queue(), a_usage(), a_delivery_mark(), a_reservation(1))
        it.commit(changes=new(workload, job, attempt, worker, a_node("b"), *policies), log=[entry], ledger=[line])
        same(it.store.workload(workload.id), workload, "the workload")
        same(it.store.jobs_of(workload.id), (job,), "its jobs")
        same(it.store.attempts(job.id), (attempt,), "its attempts")
        same(it.store.allocations(job.id), (worker,), "its allocations")
        same(it.store.allocation(worker.id), worker, "the allocation")
        same(it.store.nodes(), (a_node("b"),), "the nodes")
        found = it.store.load()
        loaded = (*found.queues, *found.queue_usages, *found.deliveries, *found.reservations)
        same(loaded, policies, "queue, usage, delivery and reservation")
        same([event.entry for event in it.store.events()], [entry], "the event")
        kinds = [type(value) for _, value in it.store.events()[0].entry.body]
        same(kinds, [str, int, bool, bool, type(None)], "the types in the event's body")
        same(it.store.ledger().items, (line,), "the ledger line")
        for sealed in (b"", bytes(range(256)), b"\x00" * 70_000):
            secret = Secret(project_id=RED, name="TOKEN", sealed=sealed, updated_ns=NOW)
            it.store.put_secret(secret)
            same(it.store.secret(RED, "TOKEN"), secret, "the secret")


def check_a_batch_is_whole_or_not_at_all(open_store: OpenStore) -> None:
    """One change that does not hold, wherever it is in a batch, and nothing of the batch is stored."""
    with _Session(open_store) as it:
        workload, other = a_workload(1), a_workload(2)
        job, node = a_job(workload), a_node("b")
        it.commit(changes=new(workload, job, node), log=[a_note(job)])
        before = it.contents()
        good: dict[str, Any] = {
            "log": [a_note(job, "Noted")],
            "ledger": [a_line(0, 5)],
            "waiting": [Waiting(job_id=job.id, reason=a_reason())],
            "idempotency": [a_record("k")],
        }
        wrong = [
            (*new(other, a_job(other)), replace(moved(job, JobState.STARTING), assumed=9)),
            (replace(moved(job, JobState.STARTING), assumed=0), *new(other, a_job(other))),
            (moved(job, JobState.STARTING), Change(assumed=7, after=replace(node, version=8))),
            (*new(other), Change(assumed=1, after=replace(a_job(other), version=2))),
            new(other, a_job(other), job),
            new(other, other),
            (moved(job, JobState.STARTING), moved(job, JobState.CANCELLED)),
        ]
        for changes in wrong:
            raises(Stale, it.commit, changes=changes, **good)
            same(it.contents(), before, "nothing of the batch is stored")
        it.commit(changes=(moved(job, JobState.STARTING), *new(other, a_job(other))), **good)
        raises(Stale, it.commit, **good)


def check_the_version_guard(open_store: OpenStore) -> None:
    """A change is stored only over the version that it assumed, for every kind of thing."""
    with _Session(open_store) as it:
        workload = a_workload(1)
        job = a_job(workload)
        attempt = an_attempt(job)
        things = (job, attempt, an_allocation(attempt), a_node("b"), a_queue(), a_usage(), a_reservation(1))
        it.commit(changes=new(workload, *things))
        for thing in things:
            later: Any = replace(thing, version=2)
            it.commit(changes=[Change(assumed=1, after=later)])
            stored = it.contents()
            for assumed in (0, 1, 3):
                change = Change(assumed=assumed, after=replace(later, version=assumed + 1))
                raises(Stale, it.commit, changes=[change])
            same(it.contents(), stored, "a stale change leaves no trace")
        row = it.store.job(job.id)
        same(row and row.job.version, 2, "the version")


def check_what_exists_is_not_inserted_again(open_store: OpenStore) -> None:
    """Inserting something whose id is taken is stale, and what was there stays."""
    with _Session(open_store) as it:
        workload = a_workload(1)
        job = a_job(workload)
        attempt = an_attempt(job)
        policies = (a_queue(), a_usage(), a_reservation(1))
        things = (workload, job, attempt, an_allocation(attempt), a_node("b"), *policies)
        it.commit(changes=new(*things))
        before = it.contents()
        for thing in things:
            raises(Stale, it.commit, changes=new(thing))
        same(it.contents(), before, "what was there")


def check_changes_of_one_thing_follow_each_other(open_store: OpenStore) -> None:
    """Several changes of one thing in one batch are taken in their order, from its beginning."""
    with _Session(open_store) as it:
        workload = a_workload(1)
        job = a_job(workload)
        second = replace(job, state=JobState.STARTING, version=2)
        third = replace(job, state=JobState.RUNNING, version=3)
        it.commit(changes=(*new(workload, job), Change(assumed=1, after=second), Change(assumed=2, after=third)))
        same(it.store.jobs_of(workload.id), (third,), "the last of the changes")


def check_only_the_leader_commits(open_store: OpenStore) -> None:
    """Each leader's epoch is larger than all before; a commit of an earlier one is refused, whole."""
    first, second = open_store(), open_store()
    first.migrate()
    one = first.lead(holder="one")
    first.commit(Batch(epoch=one, changes=new(a_node("a"))))
    two = second.lead(holder="two")
    holds(two > one, "a later epoch is larger")
    raises(Fenced, first.commit, Batch(epoch=one, changes=new(a_node("b")), log=[a_note()]))
    same(first.nodes(), (a_node("a"),), "nothing of the refused commit")
    same(first.load().last_seq, 0, "no event of the refused commit")
    second.commit(Batch(epoch=two, changes=new(a_node("b"))))
    three = first.lead(holder="one")
    holds(three > two, "an epoch is never given again")
    raises(Fenced, second.commit, Batch(epoch=two))
    same(len(first.nodes()), 2, "the nodes")
    first.close()
    second.close()


def check_a_request_is_in_the_books_once(open_store: OpenStore) -> None:
    """What requests took is stored once however often it comes, is listed in order, and adds up by model and key."""
    with _Session(open_store) as it:
        usages = [
            TokenUsage(
                id=f"worker-{number}",
                at_ns=number,
                project_id=BLUE if number == 3 else RED,
                token_id=TokenId("tok_b" if number == 2 else "tok_a"),
                model="m",
                workload_id=WorkloadId("wl_1"),
                job_id=JobId("job_1"),
                prompt_tokens=10,
                completion_tokens=number,
                is_estimated=number == 1,
                user=f"user {number % 2}",
                label="nightly" if number > 1 else "",
                amount_pico=2**61 + number,
            )
            for number in range(4)
        ]
        same(it.store.put_token_usages([]), (), "nothing")
        same(it.store.put_token_usages([*usages[:2], usages[0]]), tuple(usages[:2]), "one comes twice at a time")
        same(it.store.put_token_usages(usages), tuple(usages[2:]), "two of four were there")
        same(it.store.put_token_usages(usages), (), "all were there")
        same(it.store.token_usages().items, tuple(usages), "each is there once, in order")
        first = it.store.token_usages(project_id=RED, limit=2)
        rest = it.store.token_usages(project_id=RED, cursor=first.next_cursor, limit=2)
        same((*first.items, *rest.items), tuple(usages[:3]), "those of one project, page by page")
        same(rest.next_cursor, "", "no further page")
        red = it.store.token_totals(project_id=RED)
        expected = [("tok_a", 2, 1, 20, 1), ("tok_b", 1, 0, 10, 2)]
        same(
            [(it.token_id, it.requests, it.estimated, it.prompt_tokens, it.completion_tokens) for it in red],
            expected,
            "the sums by key",
        )
        same(sum(it.requests for it in it.store.token_totals(job_id=JobId("job_1"))), 4, "what a replica answered")
        same(it.store.token_totals(job_id=JobId("job_2")), (), "nothing")
        same(it.store.token_totals(job_id=JobId("job_2"), by=()), (), "nothing at all, also when it is not grouped")
        by_user = it.store.token_totals(by=("user", "label"))
        same(
            [(it.user, it.label, it.model, it.token_id, it.requests) for it in by_user],
            [(f"user {user}", label, "", "", 1) for user in (0, 1) for label in ("", "nightly")],
            "the sums by user and label",
        )
        [key] = it.store.token_totals(token_id=TokenId("tok_a"), since_ns=1, by=())
        same((key.requests, key.amount_pico), (2, 2**62 + 4), "a key's since then, beyond 63 bits where it has to be")
        [whole] = it.store.token_totals(by=())
        same((whole.requests, whole.amount_pico), (4, 2**63 + 6), "all together")


def check_a_decision_is_in_the_books_once(open_store: OpenStore) -> None:
    """What guardrails decided is stored once however often it comes, and listed newest first, page by page."""
    with _Session(open_store) as it:
        decisions = [
            Decision(
                id=f"worker-{number}",
                at_ns=number,
                request_id=f"req_{number}",
                project_id=BLUE if number == 3 else RED,
                token_id=TokenId("tok_a"),
                model="m",
                rule="mail" if number % 2 else "names",
                kind="pii",
                stage="request",
                action="redact" if number else "refuse",
                found={"EMAIL": number},
            )
            for number in range(4)
        ]
        same(it.store.put_decisions([]), 0, "nothing")
        same(it.store.put_decisions([*decisions[:2], decisions[0]]), 2, "one comes twice at a time")
        same(it.store.put_decisions(decisions), 2, "two of four were there")
        same(it.store.put_decisions(decisions), 0, "all were there")
        same(it.store.decisions().items, tuple(decisions[::-1]), "each is there once, newest first")
        first = it.store.decisions(project_ids=[RED], limit=2)
        rest = it.store.decisions(project_ids=[RED], cursor=first.next_cursor, limit=2)
        same((*first.items, *rest.items), tuple(decisions[2::-1]), "those of one project, page by page")
        same(rest.next_cursor, "", "no further page")
        same(it.store.decisions(rule="mail", action="redact", model="m").items, (decisions[3], decisions[1]), "some")
        same(it.store.decisions(model="other").items, (), "none")


def check_what_a_service_answered_adds_up(open_store: OpenStore) -> None:
    """Tokens are summed by service and model, whoever asked; ledger lines by the workload whose jobs they are of."""
    with _Session(open_store) as it:
        workloads = [a_workload(1), a_workload(2, project=BLUE)]
        jobs = [a_job(workloads[0]), a_job(workloads[1])]
        lines = [a_line(0, 10, job=jobs[0]), a_line(10, 20, job=jobs[0]), a_line(0, 10, job=jobs[1], node="node_b")]
        it.commit(changes=new(*workloads, *jobs), ledger=lines)
        it.store.put_token_usages(
            [
                TokenUsage(
                    id=f"worker-{number}", at_ns=number, project_id=BLUE, token_id=TokenId("tok_a"),
                    model="m" if number < 2 else "n", workload_id=WorkloadId(""), job_id=jobs[number == 3].id,
                    prompt_tokens=10, completion_tokens=number, is_estimated=False,
                )
                for number in range(4)
            ]
        )  # fmt: skip
        red = it.store.served(project_id=RED)
        same(
            [(one.workload_id, one.model, one.requests, one.prompt_tokens, one.completion_tokens) for one in red],
            [(workloads[0].id, "m", 2, 20, 1), (workloads[0].id, "n", 1, 10, 2)],
            "what red's service answered to blue",
        )
        same(it.store.ledger_totals(workload_id=workloads[0].id).lines, 2, "its replicas' lines")
        same(it.store.ledger_totals(workload_id=WorkloadId("wl_none")).lines, 0, "none")


def check_a_ledger_line_is_written_once(open_store: OpenStore) -> None:
    """A line whose id is stored is skipped; one that has another end shows that the books moved on: stale."""
    with _Session(open_store) as it:
        job = a_job(a_workload(1))
        line, idle = a_line(0, 10, job=job), a_line(0, 10, resource="H100-SXM")
        it.commit(ledger=[line, idle, line])
        it.commit(ledger=[line, a_line(10, 20, job=job)])
        totals = it.store.ledger_totals()
        same((totals.lines, totals.amount_micro, totals.energy_mj, totals.carbon_mg), (3, 15, 21, 33), "the sums")
        same(it.store.ledger().items, (line, idle, a_line(10, 20, job=job)), "the lines")
        before = it.contents()
        longer = a_line(10, 30, job=job)
        raises(Stale, it.commit, ledger=[a_line(20, 30, job=job), longer], log=[a_note()])
        same(it.contents(), before, "nothing of the stale batch")


def check_meter_marks_only_move_forward(open_store: OpenStore) -> None:
    """How far a meter is in the books is the largest end of its lines, whatever their order."""
    with _Session(open_store) as it:
        it.commit(ledger=[a_line(0, 10), a_line(0, 40, node="node_b"), a_line(10, 20), a_line(0, 7, resource="gpu")])
        it.commit(ledger=[a_line(5, 6), a_line(0, 10)])
        marks = it.store.load().metered_until
        expected = {("node_a", "cpu"): 20, ("node_a", "gpu"): 7, ("node_b", "cpu"): 40}
        same({(node, meter): until for node, meter, until in marks}, expected, "the marks")


def check_sums_are_exact_beyond_64_bits(open_store: OpenStore) -> None:
    """Sums of money, energy, carbon and milli-units x ns are exact however large, and negative where they are."""
    with _Session(open_store) as it:
        job, blue = a_job(a_workload(1)), a_job(a_workload(2, project=BLUE))
        day = 24 * HOUR_NS
        lines = [
            a_line(
                n * day, (n + 1) * day, job=job, milli=256_000, amount_micro=LARGE, energy_mj=LARGE - n,
                carbon_mg=2**62,
            )
            for n in range(5)
        ]  # fmt: skip
        lines += [a_line(n, n + 1, job=blue, resource="H100-SXM", amount_micro=-LARGE) for n in range(3)]
        lines += [a_line(0, 10, evidence=Evidence.ESTIMATED, amount_micro=0)]
        lines += [a_line(0, 10, others=True, milli=3, amount_micro=0)]
        it.commit(ledger=lines)
        red = it.store.ledger_totals(project_id=RED)
        same(red.held_milli_ns, ((CPU_METER, 5 * day * 256_000),), "milli-units x ns")
        same((red.amount_micro, red.energy_mj), (5 * LARGE, 5 * LARGE - 10), "money and energy")
        same((red.carbon_mg, red.lines, red.evidence), (5 * 2**62, 5, Evidence.MEASURED), "carbon")
        same(it.store.ledger_totals(job_id=blue.id).amount_micro, -3 * LARGE, "what is negative")
        idle = it.store.ledger_totals(idle=True)
        same((idle.lines, idle.held_milli_ns), (1, ((CPU_METER, 10_000),)), "idle time, without what others hold")
        everything = it.store.ledger_totals()
        same((everything.lines, everything.amount_micro), (10, 2 * LARGE), "everything")
        same(everything.evidence, Evidence.ESTIMATED, "one estimate makes the sum an estimate")
        same(it.store.ledger_totals(job_id=JobId("job_none")).held_milli_ns, (), "nothing")


def check_load_is_what_is_not_over(open_store: OpenStore) -> None:
    """A snapshot has the jobs that are not terminal with their workloads, and what they hold; nothing else."""
    with _Session(open_store) as it:
        over, live, mixed = (a_workload(n) for n in (1, 2, 3))
        jobs = [a_job(over), a_job(live), a_job(mixed), a_job(mixed, 1)]
        held = [an_allocation(an_attempt(job)) for job in jobs]
        things: list[Any] = [
            over,
            live,
            mixed,
            *jobs,
            *(an_attempt(job) for job in jobs),
            *held,
            a_node("b"),
            a_node("a"),
        ]
        it.commit(changes=new(*things), log=[a_note(), a_note()], ledger=[a_line(0, 5)])
        ended = [jobs[0], jobs[2]]
        it.commit(
            changes=[
                *(moved(job, state) for job, state in zip(ended, (JobState.FAILED, JobState.CANCELLED), strict=True)),
                *(
                    Change(assumed=1, after=replace(an_attempt(job), state=AttemptState.ENDED, version=2))
                    for job in ended
                ),
                *(
                    Change(assumed=1, after=replace(one, state=AllocationState.RELEASED, version=2))
                    for one in (held[0], held[2])
                ),
                Change(assumed=1, after=replace(a_node("b"), state=NodeState.LOST, version=2)),
            ]
        )
        found = it.store.load()
        same({one.id for one in found.workloads}, {live.id, mixed.id}, "the workloads")
        same({one.id for one in found.jobs}, {jobs[1].id, jobs[3].id}, "the jobs")
        same({one.job_id for one in found.attempts}, {jobs[1].id, jobs[3].id}, "the attempts")
        same({one.id for one in found.allocations}, {held[1].id, held[3].id}, "the allocations")
        same([one.name for one in found.nodes], ["a", "b"], "the nodes")
        same(found.metered_until, ((NodeId("node_a"), CPU_METER, 5),), "the marks")
        same(found.last_seq, 2, "the newest event")


def check_load_counts_jobs_that_ended_badly(open_store: OpenStore) -> None:
    """A snapshot says how many jobs of each workload that is not over ended other than well, also after reopening."""
    with _Session(open_store) as it:
        mixed, well, over, fresh = (a_workload(n) for n in (1, 2, 3, 4))
        many = [a_job(mixed, index) for index in range(4)]
        fine = [a_job(well, index) for index in range(2)]
        it.commit(changes=new(mixed, well, over, fresh, *many, *fine, a_job(over), a_job(fresh)))
        same(it.store.load().unlucky, (), "nobody's bad luck while all jobs wait")
        it.commit(
            changes=[
                moved(many[0], JobState.FAILED),
                moved(many[1], JobState.CANCELLED),
                moved(many[2], JobState.SUCCEEDED),
                moved(fine[0], JobState.SUCCEEDED),
                moved(a_job(over), JobState.FAILED),
            ]
        )
        same(it.store.load().unlucky, ((mixed.id, 2),), "jobs that failed or were cancelled, where others still live")
        again = open_store()
        same(again.load().unlucky, ((mixed.id, 2),), "the same after reopening")
        it.commit(changes=[moved(many[3], JobState.FAILED), moved(fine[1], JobState.CANCELLED)])
        same(it.store.load().unlucky, (), "nobody's bad luck when the workloads are over")


def check_policies_are_loaded(open_store: OpenStore) -> None:
    """All queues and usages are loaded as they last were, and the reservations that stand, each by its id."""
    with _Session(open_store) as it:
        queues, usages = [a_queue(BLUE), a_queue()], [a_usage(user="b"), a_usage(BLUE), a_usage(user="a")]
        booked = [a_reservation(number) for number in (3, 1, 2)]
        it.commit(changes=new(*queues, *usages, *booked))
        wider = replace(a_queue(), version=2, limit=(), weight_milli=2_500)
        more = replace(usages[0], version=2, at_ns=NOW + HOUR_NS, taken=(("H100-SXM", 0.1),))
        over = replace(booked[1], version=2, cancelled_ns=NOW)
        it.commit(changes=[Change(assumed=1, after=thing) for thing in (wider, more, over)])
        found = it.store.load()
        same(found.queues, (queues[0], wider), "the queues")
        same(found.queue_usages, (usages[1], usages[2], more), "the usages")
        same(found.reservations, (booked[2], booked[0]), "the reservations that stand")
        raises(Stale, it.commit, changes=new(booked[1]))


def check_deliveries_are_taken_once(open_store: OpenStore) -> None:
    """How far what an outpost brought was taken is stored with what followed from it, or both are not."""
    with _Session(open_store) as it:
        marks = [a_delivery_mark("b", number=3), a_delivery_mark("a", number=7)]
        it.commit(changes=new(*marks))
        further = replace(marks[0], version=2, number=5)
        it.commit(changes=[Change(assumed=1, after=further)], log=[a_note()])
        again = Change(assumed=1, after=replace(further, number=6))
        raises(Stale, it.commit, changes=[again], log=[a_note()])
        raises(Stale, it.commit, changes=new(marks[1]), log=[a_note()])
        same(open_store().load().deliveries, (marks[1], further), "how far, by outpost")
        same(len(it.store.events()), 1, "what followed from what was taken")


def check_rollouts_are_kept(open_store: OpenStore) -> None:
    """Those that are not over are loaded; all revisions of a service are found by any of them."""
    with _Session(open_store) as it:
        made = [a_rollout(number) for number in (3, 2)] + [a_rollout(9, first=8)]
        it.commit(changes=new(*made))
        raises(Stale, it.commit, changes=new(made[0]))
        over = replace(made[1], version=2, state=RolloutState.COMPLETE, ended_ns=NOW, detail="done")
        it.commit(changes=(Change(assumed=1, after=over),))
        raises(Stale, it.commit, changes=(Change(assumed=1, after=over),))
        same(it.store.load().rollouts, (made[0], made[2]), "those that are not over, by id")
        for one in ("wl_1", "wl_2", "wl_3"):
            same(it.store.revisions(WorkloadId(one)), (over, made[0]), f"all of the service of {one}, by revision")
        same(it.store.revisions(WorkloadId("wl_7")), (), "a workload that was never updated")


def check_rentals_are_kept(open_store: OpenStore) -> None:
    """Rented instances are found while they are not over, and after that by when they ended."""
    with _Session(open_store) as it:
        rentals = [a_rental(number) for number in (3, 1, 2)]
        it.commit(changes=new(*rentals))
        raises(Stale, it.commit, changes=new(rentals[0]))
        same(it.store.rentals(), (rentals[1], rentals[2], rentals[0]), "all rentals, by id")
        booted = replace(rentals[0], version=2, state=RentalState.BOOTING, instance_id="i-1", launched_ns=NOW)
        over = replace(rentals[1], version=2, state=RentalState.OVER, ended_ns=NOW, cost_micro=9)
        it.commit(changes=[Change(assumed=1, after=thing) for thing in (booted, over)])
        same(it.store.rentals(since_ns=NOW), (over, rentals[2], booted), "one that ended is found by when it did")
        same(it.store.rentals(since_ns=NOW + 1), (rentals[2], booted), "and is not when that is too long ago")
        raises(Stale, it.commit, changes=[Change(assumed=1, after=replace(booted, version=2))])
        older = it.epoch
        it.epoch = it.store.lead(holder="another")
        raises(Fenced, it.store.commit, Batch(epoch=older, changes=new(a_rental(4))))
        same(len(it.store.rentals()), 3, "what an older leader wants is not stored")


def check_models_are_kept(open_store: OpenStore) -> None:
    """Models are found by name and their versions by number, by content and by the job that made them."""
    with _Session(open_store) as it:
        one, two, other = a_model(1), a_model(2), a_model(3, BLUE)
        versions = [a_model_version(number, one, job="job_1" if number > 1 else "") for number in (2, 3, 1)]
        more = a_model_version(2, two, job="job_2")
        it.commit(changes=new(two, one, other, *versions, more), log=[a_note(None, "ModelRegistered")])
        for again in (one, more):
            raises(Stale, it.commit, changes=new(again))
        same(it.store.models(RED), (one, two), "a project's models, by name")
        same((it.store.model(RED, "model-3"), it.store.model(BLUE, "model-3")), (None, other), "by name")
        same(it.store.model_versions(one.id), (versions[1], versions[0], versions[2]), "newest first")
        same(it.store.model_versions_of([JobId("job_1")]), (versions[0], versions[1]), "what a job made")
        same(it.store.model_versions_of([]), (), "what no job made")
        same(it.store.project_model_versions(RED, digest=more.digest), (versions[0], more), "by content")
        renamed = replace(one, version=2, name="other", deleted_ns=NOW)
        gone = replace(versions[0], version=2, deleted_ns=NOW)
        it.commit(changes=[Change(assumed=1, after=thing) for thing in (renamed, gone)])
        raises(Stale, it.commit, changes=[Change(assumed=1, after=replace(gone, number=9))])
        same((it.store.model(RED, "model-1"), it.store.model(RED, "other")), (None, renamed), "by its new name")
        same(it.store.model_versions(one.id), (versions[1], gone, versions[2]), "deleted, and kept")
        same(it.store.model_versions_of([JobId("job_1")]), (versions[1],), "what is left of what a job made")
        same(it.store.project_model_versions(RED), (versions[2], versions[1], more), "what is left in the project")
        same(it.store.project_model_versions(BLUE), (), "another project's")


def check_reasons_stay_while_a_job_waits(open_store: OpenStore) -> None:
    """The newest reason of a waiting job is stored; it goes when the job is placed, and does not come back."""
    with _Session(open_store) as it:
        workload = a_workload(1)
        job = a_job(workload)
        it.commit(changes=new(workload, job), waiting=[Waiting(job_id=job.id, reason=a_reason("A"))])
        same(it.reason(job), a_reason("A"), "a reason that came with its job")
        it.commit(waiting=[Waiting(job_id=job.id, reason=a_reason("B"))])
        same(it.reason(job), a_reason("B"), "a later reason")
        same(it.store.load().reasons, (Waiting(job_id=job.id, reason=a_reason("B")),), "it is loaded")
        it.commit(changes=[Change(assumed=1, after=replace(job, version=2, priority=3))])
        same(it.reason(job), a_reason("B"), "it stays while the job waits")
        placed = replace(job, version=3, state=JobState.STARTING)
        it.commit(changes=[Change(assumed=2, after=placed)])
        same((it.reason(job), it.store.load().reasons), (None, ()), "it goes when the job is placed")
        it.commit(changes=[Change(assumed=3, after=replace(job, version=4))])
        same(it.reason(job), None, "it does not come back")
        it.commit(waiting=[Waiting(job_id=JobId("job_none-0"), reason=a_reason())])
        same(it.store.load().reasons, (), "a reason of nothing is nothing")


def check_lists_filter(open_store: OpenStore) -> None:
    """Each field of a filter keeps what it says, alone and together with others."""
    with _Session(open_store) as it:
        workloads = [
            a_workload(1, name="train"),
            a_workload(2, name="train-2", project=BLUE),
            a_workload(3, name="Train", kind=Kind.DEV),
            a_workload(4, name="serve", kind=Kind.SERVICE, project=BLUE),
        ]
        jobs = [a_job(workload) for workload in workloads]
        it.commit(changes=new(*workloads, *jobs))
        it.commit(changes=[moved(jobs[0], JobState.STARTING), moved(jobs[3], JobState.CANCELLED)])
        cases = [
            (JobFilter(), [4, 3, 2, 1]),
            (JobFilter(project_ids=(BLUE,)), [4, 2]),
            (JobFilter(project_ids=(BLUE, RED)), [4, 3, 2, 1]),
            (JobFilter(project_ids=(ProjectId("prj_none"),)), []),
            (JobFilter(states=(JobState.QUEUED, JobState.CANCELLED)), [4, 3, 2]),
            (JobFilter(kinds=(Kind.DEV, Kind.SERVICE)), [4, 3]),
            (JobFilter(workload_id=workloads[1].id), [2]),
            (JobFilter(name="train"), [1]),
            (JobFilter(text="train"), [2, 1]),
            (JobFilter(text="%"), []),
            (JobFilter(id_prefix=jobs[2].id[:-3]), [3]),
            (JobFilter(id_prefix="job_"), [4, 3, 2, 1]),
            (JobFilter(text="train", project_ids=(BLUE,), states=(JobState.QUEUED,)), [2]),
        ]
        for where, expected in cases:
            found = [workloads.index(row.workload) + 1 for row in it.store.find_jobs(where).items]
            same(found, expected, f"the jobs for {where}")


def check_pages_are_stable(open_store: OpenStore) -> None:
    """Going through a list page by page shows each thing once, though others are added meanwhile."""
    with _Session(open_store) as it:
        workloads = [a_workload(n) for n in range(1, 6)]
        jobs = [a_job(workload, index) for workload in workloads for index in range(3)]
        it.commit(changes=new(*workloads, *jobs), ledger=[a_line(n, n + 1) for n in range(10)])
        seen: list[JobId] = []
        cursor, later = "", count(100)
        while True:
            page = it.store.find_jobs(JobFilter(), cursor=cursor, limit=4)
            seen += [row.job.id for row in page.items]
            added = a_workload(next(later))
            it.commit(changes=new(added, a_job(added)))
            if not (cursor := page.next_cursor):
                break
        expected = [job.id for job in sorted(jobs, key=lambda job: (job.submitted_ns, job.index), reverse=True)]
        same(seen, expected, "all jobs, once, newest first")
        lines: list[str] = []
        while True:
            books = it.store.ledger(cursor=cursor, limit=3)
            lines += [line.id for line in books.items]
            if not (cursor := books.next_cursor):
                break
            last = len(lines) + 100
            it.commit(ledger=[a_line(last, last + 1, node="node_z", job=jobs[0])])
        same(lines[:10], [a_line(n, n + 1).id for n in range(10)], "all lines, once, oldest first")
        same(len(set(lines)), len(lines), "no line twice")
        raises(InvalidRequest, it.store.find_jobs, JobFilter(), cursor="no cursor")
        raises(InvalidRequest, it.store.ledger, cursor="no cursor")


def check_events_are_numbered_without_gaps(open_store: OpenStore) -> None:
    """Events come in the order of commits, numbered one by one; refused commits leave no gap."""
    with _Session(open_store) as it:
        red, blue = a_workload(1), a_workload(2, project=BLUE)
        one, two = a_job(red), a_job(blue)
        same(it.commit(changes=new(red, one, blue, two), log=[a_note(one, "A"), a_note(two, "B")]), 2, "the newest")
        raises(Stale, it.commit, changes=new(red), log=[a_note(one, "No")])
        raises(Fenced, it.store.commit, Batch(epoch=it.epoch - 1, log=[a_note(one, "No")]))
        same(it.commit(ledger=[a_line(0, 1)]), 2, "a commit without events")
        same(it.commit(log=[a_note(one, "C"), a_note(None, "D"), a_note(two, "E")]), 5, "the newest")
        same([(event.seq, event.entry.type) for event in it.store.events()], list(enumerate("ABCDE", 1)), "all")
        cases: list[tuple[dict[str, Any], str]] = [
            ({"after": 2}, "CDE"),
            ({"after": 5}, ""),
            ({"after": 1, "limit": 2}, "BC"),
            ({"job_id": one.id}, "AC"),
            ({"workload_id": blue.id, "after": 2}, "E"),
            ({"project_ids": (RED,)}, "AC"),
            ({"project_ids": (RED, BLUE), "limit": 3}, "ABC"),
        ]
        for where, expected in cases:
            same("".join(event.entry.type for event in it.store.events(**where)), expected, f"events {where}")


def check_followers_miss_no_event(open_store: OpenStore) -> None:
    """Whoever follows the log while it is written sees every event once and in order."""
    with _Session(open_store) as it:
        total, done = 60, threading.Event()

        def follow() -> list[int]:
            reader, seen = open_store(), list[int]()
            try:
                while len(seen) < total:
                    over = done.is_set()
                    found = reader.events(after=seen[-1] if seen else 0, limit=7)
                    seen += [event.seq for event in found]
                    if over and not found:
                        break
                return seen
            finally:
                reader.close()

        with ThreadPoolExecutor(3) as threads:
            followers = [threads.submit(follow) for _ in range(3)]
            try:
                for _ in range(total // 3):
                    it.commit(log=[a_note(), a_note(), a_note()])
            finally:
                done.set()
            for follower in followers:
                same(follower.result(), list(range(1, total + 1)), "what a follower saw")


def check_readers_see_one_instant(open_store: OpenStore) -> None:
    """Readers beside a writer are not kept waiting and never see half of a commit."""
    with _Session(open_store) as it:
        pair = [a_workload(n) for n in (1, 2)]
        jobs = [a_job(workload) for workload in pair]
        it.commit(changes=new(*pair, *jobs))
        done = threading.Event()

        def read() -> int:
            looks = 0
            while not done.is_set() or not looks:
                found = it.store.load()
                versions = {job.version for job in found.jobs}
                same(len(versions), 1, f"both jobs have one version: {versions}")
                same(found.last_seq, versions.pop() - 1, "the log is of the same instant")
                looks += 1
            return looks

        with ThreadPoolExecutor(3) as threads:
            readers = [threads.submit(read) for _ in range(3)]
            try:
                for version in range(1, 40):
                    changes = [Change(assumed=version, after=replace(job, version=version + 1)) for job in jobs]
                    it.commit(changes=changes, log=[a_note()])
            finally:
                done.set()
            for reader in readers:
                holds(reader.result() > 0, "a reader was kept waiting")


def check_a_repeated_write_finds_its_answer(open_store: OpenStore) -> None:
    """An idempotency record is stored with its write or not at all, and never replaced."""
    with _Session(open_store) as it:
        workload = a_workload(1)
        record = a_record("schlüssel")
        it.commit(changes=new(workload), idempotency=[record])
        same(it.store.idempotent(record.principal_id, record.key), record, "the record")
        same(it.store.idempotent(PrincipalId("usr_other"), record.key), None, "a key is its principal's")
        other = replace(record, response="another")
        raises(Stale, it.commit, changes=new(a_workload(2)), idempotency=[other])
        same(it.store.workload(a_workload(2).id), None, "nothing of a repeated write")
        raises(Stale, it.commit, changes=new(workload), idempotency=[a_record("new")])
        same(it.store.idempotent(record.principal_id, "new"), None, "no record of a refused write")
        same(it.store.idempotent(record.principal_id, record.key), record, "the record is not replaced")


def check_one_of_many_committers_wins(open_store: OpenStore) -> None:
    """Of several that change the same version at the same time, one is stored and the others are stale."""
    with _Session(open_store) as it:
        node = a_node("a")
        it.commit(changes=new(node))

        def change(number: int) -> bool:
            try:
                it.commit(changes=[Change(assumed=1, after=replace(node, version=2, boot_id=str(number)))])
            except Stale:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(change, range(8)))
        same(won.count(True), 1, "commits that were taken")
        same(it.store.nodes()[0].boot_id, str(won.index(True)), "what is stored")


def check_artifact_versions_are_given_once(open_store: OpenStore) -> None:
    """Versions of a name count from 1 without gaps, though many are put at once, from two stores."""
    with _Session(open_store) as it:
        second = open_store()
        stores = (it.store, second)

        def put(number: int) -> Artifact:
            return stores[number % 2].put_artifact(an_artifact(number, name="modèle" if number < 12 else "other"))

        with ThreadPoolExecutor(6) as threads:
            stored = list(threads.map(put, range(16)))
        second.close()
        same(sorted(one.version for one in stored[:12]), list(range(1, 13)), "versions of one name")
        same(sorted(one.version for one in stored[12:]), [1, 2, 3, 4], "versions of another")
        found = it.store.artifacts(RED)
        same([(one.name, one.version) for one in found][:2], [("modèle", 12), ("modèle", 11)], "newest first")
        same(set(found), set(stored), "what was answered is what is stored")
        newest = next(one for one in stored if one.version == 12)
        same(it.store.find_artifact(RED, "modèle"), newest, "the newest")
        same(it.store.find_artifact(RED, "modèle", 12), newest, "by version")
        same(it.store.find_artifact(RED, "modèle", 13), None, "no such version")
        same(it.store.find_artifact(BLUE, "modèle"), None, "another project's")
        same(it.store.artifact(newest.id), newest, "by id")
        raises(Stale, it.store.put_artifact, newest)


def check_habits_are_kept(open_store: OpenStore) -> None:
    """What services usually need is replaced by project and name."""
    with _Session(open_store) as it:
        for milli in (1, 2):
            it.store.put_habit(a_habit(milli=milli))
        it.store.put_habit(a_habit("modèle"))
        same(it.store.habits(), (a_habit(milli=2), a_habit("modèle")), "the habits, by service")
        same(open_store().habits(), it.store.habits(), "those that another store has")


def check_volumes_and_data_sets_are_kept(open_store: OpenStore) -> None:
    """Volumes are replaced by name; versions of data sets are never given twice, also when some were deleted."""
    with _Session(open_store) as it:
        second = open_store()
        stores = (it.store, second)
        for path in ("/a", "/b"):
            it.store.put_volume(replace(a_volume(), path=path))
        it.store.put_volume(a_volume("other"))
        same(it.store.volumes(RED), (a_volume("other"), replace(a_volume(), path="/b")), "the volumes, by name")
        same(
            (it.store.volume(RED, "scratch"), it.store.volume(BLUE, "scratch")), (it.store.volumes(RED)[1], None), "one"
        )
        same((it.store.delete_volume(RED, "other"), it.store.delete_volume(RED, "other")), (True, False), "twice")

        def add(number: int) -> DataSet:
            return stores[number % 2].add_dataset(a_dataset(number, name="bilder" if number < 6 else "other"))

        with ThreadPoolExecutor(6) as threads:
            stored = list(threads.map(add, range(8)))
        second.close()
        same(sorted(one.version for one in stored[:6]), list(range(1, 7)), "versions of one name")
        same(it.store.unscanned_datasets(), tuple(sorted(stored, key=lambda one: one.id)), "all are to be scanned")
        newest = next(one for one in stored if one.version == 6)
        ready = replace(newest, state=DataSetState.READY, digest="ab", files=3)
        it.store.put_dataset(ready)
        same(it.store.find_dataset(RED, "bilder"), ready, "the newest, as it was changed")
        same((it.store.dataset(ready.id), it.store.dataset(DataSetId("set_none"))), (ready, None), "by id")
        same(len(it.store.unscanned_datasets()), 7, "those that are still to be scanned")
        it.store.put_dataset(replace(ready, deleted_ns=NOW))
        same(it.store.find_dataset(RED, "bilder", 6), None, "deleted")
        same([one.version for one in it.store.datasets(RED)], [5, 4, 3, 2, 1, 2, 1], "by name, newest first")
        same(it.store.datasets(BLUE), (), "another project's")
        same(it.store.add_dataset(a_dataset(9, name="bilder")).version, 7, "a version is not given again")
        raises(Stale, it.store.add_dataset, a_dataset(9, name="bilder"))


def check_tenants_are_replaced_whole(open_store: OpenStore) -> None:
    """Putting stores or replaces by id; secrets belong to a project and can be deleted."""
    with _Session(open_store) as it:
        store = it.store
        organization = Organization(id=OrganizationId("org_1"), name="Ä", created_ns=NOW)
        project = Project(id=RED, organization_id=organization.id, name="red", created_ns=NOW)
        person = Principal(
            id=PrincipalId("usr_1"), organization_id=organization.id, kind=PrincipalKind.USER, name="ada", created_ns=1
        )
        token = Token(
            id=TokenId("tok_1"), principal_id=person.id, organization_id=organization.id, project_id=RED, name="laptop",
            hash="00ff", display="tm_user_ab", scopes=(Scope.READ, Scope.SUBMIT), created_ns=NOW,
        )  # fmt: skip
        site = Site(id=SiteId("north"), name="north", kind=SiteKind.EDGE, engine="local")
        outpost = Outpost(id=OutpostId("out_1"), site_id=site.id, name="a", engine="local", created_ns=NOW)
        for version in (1, 2):
            store.put_site(replace(site, lease_ns=version))
            store.put_outpost(replace(outpost, removed_ns=version))
            store.put_organization(replace(organization, name=f"v{version}"))
            store.put_project(replace(project, name=f"red-{version}"))
            store.put_principal(replace(person, name=f"v{version}"))
            store.put_token(replace(token, revoked_ns=version))
            store.put_secret(Secret(project_id=RED, name="KEY", sealed=bytes([version]), updated_ns=version))
        same(store.organizations(), (replace(organization, name="v2"),), "the organization")
        same(store.projects(), (replace(project, name="red-2"),), "the project")
        same(store.sites(), (replace(site, lease_ns=2),), "the site")
        same(store.outposts(), (replace(outpost, removed_ns=2),), "the outpost")
        same(store.principals(), (replace(person, name="v2"),), "the principal")
        same((store.tokens(), store.token(token.id)), ((replace(token, revoked_ns=2),), store.tokens()[0]), "the token")
        same(store.token(TokenId("tok_none")), None, "no such token")
        same(store.secrets(BLUE), (), "secrets of another project")
        same([secret.sealed for secret in store.secrets(RED)], [b"\x02"], "the secret")
        same((store.delete_secret(RED, "KEY"), store.delete_secret(RED, "KEY")), (True, False), "deleting twice")
        same(store.secret(RED, "KEY"), None, "the secret is gone")


def check_everything_is_there_after_reopening(open_store: OpenStore) -> None:
    """What was acknowledged is there when the database is opened again, and epochs go on."""
    it = _Session(open_store)
    workload = a_workload(1)
    job = a_job(workload)
    it.commit(
        changes=new(workload, job, a_node("a"), a_queue(), a_usage(), a_reservation(1)),
        log=[a_note(job)],
        ledger=[a_line(0, 9, job=job)],
        waiting=[Waiting(job_id=job.id, reason=a_reason())],
        idempotency=[a_record("k")],
    )
    it.store.put_artifact(an_artifact(1))
    before, artifacts = it.contents(), it.store.artifacts(RED)
    it.store.close()
    again = _Session(open_store)
    same(again.contents(), before, "what was committed")
    same(again.store.artifacts(RED), artifacts, "the artifacts")
    holds(again.epoch > it.epoch, "epochs go on")
    same(again.store.idempotent(PrincipalId("usr_test"), "k"), a_record("k"), "the idempotency record")
    again.store.close()


def check_large_batches(open_store: OpenStore) -> None:
    """A batch of thousands of things is one commit like any other."""
    with _Session(open_store) as it:
        workload = a_workload(1)
        jobs = [a_job(workload, index) for index in range(3_000)]
        lines = [a_line(n, n + 1) for n in range(3_000)]
        it.commit(changes=new(workload, *jobs), log=[a_note(job) for job in jobs], ledger=lines)
        changes = [moved(job, JobState.STARTING) for job in jobs]
        raises(Stale, it.commit, changes=[*changes, *new(workload)], ledger=[a_line(9_000, 9_001), *lines])
        it.commit(changes=changes, ledger=[*lines, a_line(9_000, 9_001)])
        same({job.version for job in it.store.load().jobs}, {2}, "every job changed")
        same(it.store.ledger_totals().lines, 3_001, "lines are skipped one by one")
        same(it.store.jobs_of(workload.id), tuple(change.after for change in changes), "jobs by index")


CHECKS: Final[tuple[Callable[[OpenStore], None], ...]] = (
    check_migration_is_harmless_twice,
    check_values_come_back_as_they_were,
    check_a_request_is_in_the_books_once,
    check_a_decision_is_in_the_books_once,
    check_what_a_service_answered_adds_up,
    check_a_batch_is_whole_or_not_at_all,
    check_the_version_guard,
    check_what_exists_is_not_inserted_again,
    check_changes_of_one_thing_follow_each_other,
    check_only_the_leader_commits,
    check_a_ledger_line_is_written_once,
    check_meter_marks_only_move_forward,
    check_sums_are_exact_beyond_64_bits,
    check_load_is_what_is_not_over,
    check_load_counts_jobs_that_ended_badly,
    check_policies_are_loaded,
    check_rentals_are_kept,
    check_deliveries_are_taken_once,
    check_rollouts_are_kept,
    check_models_are_kept,
    check_reasons_stay_while_a_job_waits,
    check_lists_filter,
    check_pages_are_stable,
    check_events_are_numbered_without_gaps,
    check_followers_miss_no_event,
    check_readers_see_one_instant,
    check_a_repeated_write_finds_its_answer,
    check_one_of_many_committers_wins,
    check_artifact_versions_are_given_once,
    check_habits_are_kept,
    check_volumes_and_data_sets_are_kept,
    check_tenants_are_replaced_whole,
    check_everything_is_there_after_reopening,
    check_large_batches,
)


# What the checks are written with


class _Session:
    """A migrated store of which we are the leader."""

    def __init__(self, open_store: OpenStore) -> None:
        self.store = open_store()
        self.store.migrate()
        self.epoch = self.store.lead(holder="check")

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def commit(self, **parts: Any) -> int:
        return self.store.commit(Batch(epoch=self.epoch, **parts))

    def reason(self, job: Job) -> Reason | None:
        row = self.store.job(job.id)
        return row.reason if row else None

    def contents(self) -> tuple[Any, ...]:
        """What can be read of everything that commits write."""
        rows = self.store.find_jobs(JobFilter(), limit=1_000).items
        things = [(self.store.attempts(row.job.id), self.store.allocations(row.job.id)) for row in rows]
        books = self.store.ledger(limit=1_000).items
        return self.store.load(), rows, things, self.store.nodes(), self.store.events(limit=1_000), books
