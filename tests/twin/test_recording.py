"""Turns saved and taken again: the project's own regression test of what the scheduler decides."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.core.history import POLICY, History
from tests.twin.make_recording import RECORDED, happenings, record, setting
from tests.twin.small import conditions, job
from tidemill.control.driver import Driver, world_from
from tidemill.control.recording import Beginning, Recording
from tidemill.core import ending, rating
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.outcome import Outcome
from tidemill.errors import Conflict, InvalidRequest, NotFound
from tidemill.model.events import Fact, NodeJoined, SiteSet
from tidemill.model.ids import OrganizationId, ProjectId, QueueId
from tidemill.model.job import Attempt
from tidemill.model.plan import Plan
from tidemill.model.queue import Queue
from tidemill.model.tenant import Project
from tidemill.model.values import replace
from tidemill.ports import Snapshot
from tidemill.twin.arrivals import Arrival, Outside
from tidemill.twin.cloud import Conditions, beginning_of
from tidemill.twin.fleet import parse_fleet
from tidemill.twin.history import recorded_conditions, recorded_stream
from tidemill.twin.measure import weights_in
from tidemill.twin.recording import RecordingFile, Turn, read_recording
from tidemill.twin.replay import replay, replay_turns
from tidemill.twin.report import figures
from tidemill.twin.run import run
from tidemill.twin.whatif import apply, parse_change
from tidemill.units import SECOND_NS


def test_the_committed_recording_is_decided_as_it_was() -> None:
    found = replay(RECORDED)
    assert found.is_same, found.changed[:5]
    assert found.turns > 500
    assert found.decisions > 800
    assert RECORDED.stat().st_size < 100_000


def frees_nothing_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    give = FleetArrays.give

    def less(self: FleetArrays, node: str, **amounts: object) -> None:
        amounts["devices"] = tuple(share for share in amounts["devices"] if not share.device_id.endswith("n00002-g3"))  # type: ignore[attr-defined]
        give(self, node, **amounts)  # type: ignore[arg-type]

    monkeypatch.setattr(FleetArrays, "give", less)


def bills_one_micro_dollar_more(monkeypatch: pytest.MonkeyPatch) -> None:
    amount = rating.amount_micro
    monkeypatch.setattr(rating, "amount_micro", lambda *args: amount(*args) + 1)


def waits_longer_before_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    backoff = ending.backoff_ns
    monkeypatch.setattr(ending, "backoff_ns", lambda retries, policy: 50_000 * backoff(retries, policy))


def gives_another_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Outcome.wait
    monkeypatch.setattr(
        Outcome, "wait", lambda self, world, job_id, reason: original(self, world, job_id, replace(reason, code="Tired"))
    )  # fmt: skip


CHANGES: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (frees_nothing_of_one_device, "is placed"),
    (bills_one_micro_dollar_more, "books"),
    (waits_longer_before_a_retry, "is placed"),
    (gives_another_reason, "waits"),
]


@pytest.mark.parametrize(("plant", "what"), CHANGES, ids=lambda one: getattr(one, "__name__", ""))
def test_a_planted_change_is_shown(
    plant: Callable[[pytest.MonkeyPatch], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = replay(RECORDED)
    assert not found.is_same
    assert any(what in one.what for one in found.changed)
    assert all(a.at_ns <= b.at_ns for a, b in itertools.pairwise(found.changed))
    for one in found.changed:
        assert one.before != one.after


def test_what_the_twin_records_it_replays(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    result = record(path)
    assert replay(path).is_same
    assert path.read_bytes()[4:8] == bytes(4), "the same turns give the same file"
    with pytest.raises(Conflict):
        record(path)
    again = run(recorded_stream(path), recorded_conditions(path))
    first, second = figures(result), figures(again)
    assert first["jobs"]["submitted"] == second["jobs"]["submitted"]
    assert second["jobs"]["succeeded"] == pytest.approx(first["jobs"]["succeeded"], abs=3)
    assert second["jct_s"]["mean"] == pytest.approx(first["jct_s"]["mean"], rel=0.01)


def test_a_recording_under_other_conditions() -> None:
    before = figures(run(recorded_stream(RECORDED), recorded_conditions(RECORDED)))
    bigger = replace(recorded_conditions(RECORDED), nodes=parse_fleet("6xH100:8,1xL4:4,1xcpu:64"))
    after = figures(run(recorded_stream(RECORDED), bigger))
    assert after["wait_s"]["mean"] < before["wait_s"]["mean"]


def test_the_recording_holds_what_happened() -> None:
    parts = list(read_recording(RECORDED))
    assert isinstance(parts[0], Beginning)
    assert parts[0].snapshot.nodes == setting().nodes
    turns = [part for part in parts if isinstance(part, Turn)]
    assert len(turns) == len(parts) - 1
    assert {type(fact).__name__ for one in turns for fact in one.facts} >= {
        "Submitted", "Started", "Exited", "StopRequested", "NodeWentAway", "NodeJoined",
    }  # fmt: skip
    assert sum(1 for one in turns for fact in one.facts if type(fact).__name__ == "Submitted") <= len(
        list(happenings())
    )


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = len(list(read_recording(RECORDED)))
    raw = RECORDED.read_bytes()
    for share in (0.2, 0.5, 0.9):
        cut = tmp_path / f"cut-{share}.gz"
        cut.write_bytes(raw[: int(len(raw) * share)])
        parts = list(read_recording(cut))
        assert 1 <= len(parts) < whole
        assert replay(cut).is_same
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(raw)[:-5])
    assert len(list(read_recording(plain))) == whole - 1


def test_what_was_written_before_a_crash_can_be_read(tmp_path: Path) -> None:
    """The file is never closed: all but the last lines are on the disk."""
    path = tmp_path / "crash.jsonl.gz"
    file = RecordingFile(path)
    recording = Recording(file.write)
    made = beginning_of(conditions())
    recording.begin(made.snapshot, sites=made.sites, projects=(), rates=made.rates, policy=made.policy, now=made.now)
    run((job(at, 5) for at in range(0, 1_000, 10)), conditions(), watch=recording.turn)
    assert len(list(read_recording(path))) > 200
    file.close()


@pytest.mark.parametrize(
    "text",
    [b"", b"{}\n", b"nothing\n", b'{"recording":99}\n', b'{"recording":1}\n{"now":1,"facts":[["Unknown",{}]]}\n'],
)
def test_what_is_no_recording_is_told(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "no.jsonl"
    path.write_bytes(text)
    if not text:
        assert replay(path).turns == 0
        with pytest.raises(InvalidRequest, match="holds nothing"):
            recorded_conditions(path)
        return
    with pytest.raises(InvalidRequest, match="is not a recording"):
        replay(path)
    with pytest.raises(NotFound):
        replay(tmp_path / "absent")


def test_facts_wait_for_a_worker_that_is_placed_later_now() -> None:
    """Under a policy that starts one job a turn some start a turn later; their facts wait, and every job still ends."""
    first, *turns = read_recording(RECORDED)
    assert isinstance(first, Beginning)
    found = replay_turns([replace(first, policy=replace(first.policy, starts_per_turn=1)), *turns])
    later = [one for one in found.changed if one.before and one.after and one.after.at_ns > one.before.at_ns]
    assert [one for one in later if one.what.endswith("is placed")]
    middle = turns[len(turns) // 2].now  # type: ignore[union-attr]
    assert not [one for one in found.changed if one.what == "ends" and one.after is None and one.at_ns < middle]


# --- around a live driver ---


def test_a_driver_that_is_recorded_while_it_plays_any_history() -> None:
    """Whatever facts come in whatever order, the same facts at the same instants give the same decisions."""
    lines: list[bytes] = []
    recording = Recording(lines.append)
    names = ["submit"] * 5 + ["started"] * 4 + ["exit0"] * 3 + ["exit1", "stop", "vanish", "join", "away", "tick"]

    class Recorded(History):
        def take(self, facts: list[Fact]) -> Plan:
            plan = super().take(facts)
            recording.turn(facts, self.now, plan)
            return plan

    history = Recorded()
    recording.begin(
        Snapshot(),
        sites=history.world.sites.values(),
        projects=history.world.projects.values(),
        rates=history.world.rates,
        policy=POLICY,
        now=0,
    )
    history.play([(names[i * 7 % len(names)], i * 11 % 50, i * 13 % 50, i % 12) for i in range(200)])
    assert replay_turns(_parsed(lines)).is_same
    assert replay_turns(_parsed(lines)).turns > 100


def _parsed(lines: list[bytes]) -> list[Beginning | Turn]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        path.write_bytes(b"".join(lines))
        return list(read_recording(path))


def test_a_world_loaded_anew_begins_anew(tmp_path: Path) -> None:
    """As after a restart: the second beginning has what the first part left."""
    path = tmp_path / "twice.jsonl.gz"
    made = beginning_of(conditions("1xH100:2"))
    with RecordingFile(path) as file:
        recording = Recording(file.write)
        for _ in range(2):
            recording.begin(
                made.snapshot, sites=made.sites, projects=(), rates=made.rates, policy=made.policy, now=made.now
            )
            world = world_from(
                made.snapshot, sites=made.sites, projects=(), rates=made.rates, policy=made.policy, now=made.now
            )
            driver = Driver(world, made.policy)
            facts: list[Fact] = [NodeJoined(at_ns=made.now, node=made.snapshot.nodes[0])]
            recording.turn(facts, made.now, driver.step(facts, now=made.now))
            driver.accepted()
    found = replay(path)
    assert (found.turns, found.is_same) == (2, True)


def test_a_world_with_sites_replays_with_what_was_said_of_them(tmp_path: Path) -> None:
    """Prices change on the way; leaving that out of the recording changes where work goes and what is billed."""
    path = tmp_path / "sites.jsonl.gz"
    setting = apply(
        [parse_change(text) for text in ("site.north.nodes=2xH100:2", "site.north.price.H100=9", "tick=1s")],
        conditions("2xH100:2"),
    )
    north = replace(setting.sites[1], prices=(("H100-SXM", 1),))
    items = [job(at, 30, 1 + at % 2, nodes=1 + at % 3 // 2) for at in range(60)]
    stream = sorted([*items, Outside(25 * SECOND_NS, SiteSet(at_ns=0, site=north))], key=lambda one: one.at_ns)
    made = beginning_of(setting)
    with RecordingFile(path) as file:
        recording = Recording(file.write)
        recording.begin(
            made.snapshot, sites=made.sites, projects=(), rates=made.rates, policy=made.policy, now=made.now
        )
        result = run(iter(stream), setting, watch=recording.turn)
    parts = list(read_recording(path))
    assert replay_turns(parts).is_same
    without = [
        part
        if isinstance(part, Beginning)
        else replace(part, facts=tuple(f for f in part.facts if type(f) is not SiteSet))
        for part in parts
    ]
    changed = replay_turns(without).changed
    assert any(one.what.endswith("is placed") for one in changed)
    again = figures(run(recorded_stream(path), recorded_conditions(path)))
    assert again["jobs"]["succeeded"] == figures(result)["jobs"]["succeeded"] == 60


def limited_cloud(path: Path) -> None:
    """Two projects whose ids are not their names, below a department; one of them may have 8 of 16 GPUs."""
    vision, audio = (
        Project(id=ProjectId(f"prj_{n}"), organization_id=OrganizationId("org_1"), name=name, created_ns=0)
        for n, name in enumerate(("vision", "audio"))
    )
    research = Queue(id=QueueId("que_1/research"), name="research")
    queues = (
        research,
        Queue(id=QueueId("que_2"), name="vision", parent_id=research.id, project_id=vision.id, limit=(("gpu", 8_000),)),
        Queue(id=QueueId("que_3"), name="audio", parent_id=research.id, project_id=audio.id, weight_milli=3_000),
    )
    under = conditions("2xH100:8", queues=queues, projects=(vision, audio))
    work = [job(at, 600, 8, tenant=tenant.id) for at, tenant in ((0, vision), (1, vision), (2, audio))]
    made = beginning_of(under)
    with RecordingFile(path) as kept:
        recording = Recording(kept.write)
        recording.begin(
            made.snapshot, sites=made.sites, projects=made.projects, rates=made.rates, policy=made.policy, now=made.now
        )
        run(iter(work), under, watch=recording.turn)


def starts_of(stream: Iterable[Arrival | Outside], under: Conditions) -> dict[str, int]:
    """When each workload started, in seconds."""
    found: dict[str, int] = {}

    def watch(_inbox: object, now: int, plan: Plan) -> None:
        for change in plan.changes:
            if isinstance(change.after, Attempt) and change.assumed is None:
                found.setdefault(change.after.job_id, (now - under.start_ns) // SECOND_NS)

    run(iter(stream), under, watch=watch)
    return found


def test_quotas_of_a_recording_hold_in_the_twin(tmp_path: Path) -> None:
    path = tmp_path / "limited.jsonl.gz"
    limited_cloud(path)
    under = recorded_conditions(path)
    first, second, third = starts_of(recorded_stream(path), under).values()
    assert (first, second, third) == (0, 2, 600), "vision's second job waits for its first, and audio passes it"
    told = figures(run(recorded_stream(path), under))
    assert set(told["tenants"]) == {"vision", "audio"}
    freed = apply([parse_change("quota.vision.limit=gpu:16")], under)
    assert [queue.name for queue in freed.queues] == ["research", "vision", "audio"], "the tree is whole"
    assert sorted(starts_of(recorded_stream(path), freed).values()) == [0, 1, 600], "both of vision's run at once"


def test_a_twin_that_forgets_whose_work_it_is_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "limited.jsonl.gz"
    limited_cloud(path)
    whole = list(recorded_stream(path))
    nameless = [replace(one, tenant="vision") if isinstance(one, Arrival) else one for one in whole]
    assert starts_of(nameless, recorded_conditions(path)) != starts_of(whole, recorded_conditions(path))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("quota.visoin.limit=gpu:4",), "There is no project or queue 'visoin'. There are vision"),
        (("quota.research.guaranteed=gpu:64",), "the whole fleet has 16"),
        (("quota.audio.guaranteed=gpu:4",), "research above it is guaranteed none"),
        (("quota.audio.parent=vision",), "cannot have queues below it"),
        (("quota.research.parent=research",), "its own parent"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(texts: tuple[str, ...], says: str, tmp_path: Path) -> None:
    path = tmp_path / "limited.jsonl.gz"
    limited_cloud(path)
    with pytest.raises(InvalidRequest) as caught:
        apply([parse_change(text) for text in texts], recorded_conditions(path))
    assert says in f"{caught.value.detail} {caught.value.mend}"
    assert caught.value.value == ", ".join(texts)


def test_departments_come_and_projects_move(tmp_path: Path) -> None:
    path = tmp_path / "limited.jsonl.gz"
    limited_cloud(path)
    found = apply(
        [
            parse_change(text)
            for text in ("quota.audio.parent=speech", "quota.speech.weight=2", "quota.research.guaranteed=gpu:8",
                         "quota.vision.max_queued=5", "quota.vision.parent=root")
        ],
        recorded_conditions(path),
    )  # fmt: skip
    queues = {queue.name: queue for queue in found.queues}
    assert queues["audio"].parent_id == queues["speech"].id
    assert (queues["speech"].weight_milli, queues["vision"].max_queued, queues["vision"].parent_id) == (2_000, 5, "")
    assert weights_in(found.queues) == {"prj_0": 1_000, "prj_1": 2_000}
