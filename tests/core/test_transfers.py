"""What bringing data to a site takes, and that placement goes where the data is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.core.yard import CALM, Yard, gpu_node, spec
from tidemill.control.siteoptions import site_options
from tidemill.core import choosing, transfers
from tidemill.core.transfers import GB, OBJECT_STORE, Need, need_of, transfer
from tidemill.model.events import CopiesSeen
from tidemill.model.fleet import Link, Site, SiteKind
from tidemill.model.ids import DataSetId, NodeId, SiteId
from tidemill.model.job import JobState
from tidemill.model.spec import WorkloadSpec
from tidemill.model.storage import DataMode, DataMount, VolumeMount
from tidemill.model.values import replace
from tidemill.units import MINUTE_NS, SECOND_NS

HERE, THERE = SiteId("here"), SiteId("there")
DIGESTS = [digit * 64 for digit in "abc"]


def needs() -> st.SearchStrategy[Need]:
    return st.builds(
        Need,
        digest=st.sampled_from(DIGESTS),
        size=st.integers(0, 10**15),
        files=st.integers(1, 10**6),
        home=st.sampled_from([HERE, THERE, OBJECT_STORE]),
        mode=st.sampled_from([DataMode.AUTO, DataMode.COPY]),
        node=st.sampled_from(["", "m1"]),
    )


LINKS = st.builds(Link, to=st.just(THERE), latency_ns=st.integers(0, 10**9), bits_per_s=st.integers(1, 10**12))
PRICES = st.fixed_dictionaries({site: st.integers(0, 10**6) for site in (HERE, THERE, OBJECT_STORE)})


def what_is_wrong(
    needed: list[Need], more: Need, link: Link, machines: int, prices: dict[SiteId, int], cached: set[str]
) -> list[str]:
    """The laws of copying that do not hold for these."""

    def ask(which: Iterable[Need], over: Link = link, count: int = machines) -> transfers.Transfer:
        return transfer(
            which, HERE, machines=count, is_cached=lambda need: need.digest in cached,
            link=lambda _: over, egress_micro=prices.__getitem__,
        )  # fmt: skip

    whole, wrong = ask(needed), []
    parts = [ask([need]) for need in needed]
    for name in ("size", "time_ns", "cost_micro"):
        if getattr(whole, name) != sum(getattr(part, name) for part in parts):
            wrong += [f"{name} of all is not the sum of its parts"]
    for need, part in zip(needed, parts, strict=True):
        is_there = need.digest in cached or (need.home == HERE and not need.node and need.mode is not DataMode.COPY)
        if is_there and part != transfers.Transfer():
            wrong.append("what is there is copied")
        if not is_there and part.size != need.size * machines:
            wrong.append("not every machine copies it")
        if need.home == HERE and part.cost_micro:
            wrong.append("what stays within a site is paid for")
        if not is_there and need.home != HERE:
            if part.time_ns * link.bits_per_s < need.size * machines * 8 * SECOND_NS:
                wrong.append("it is faster than its link")
            if part.cost_micro != need.size * machines * prices[need.home] // GB:
                wrong.append("it does not cost what leaves its home")
    faster = ask(needed, replace(link, bits_per_s=2 * link.bits_per_s))
    if faster.time_ns > whole.time_ns:
        wrong.append("a wider link is slower")
    if ask([*needed, more]).time_ns < whole.time_ns or ask(needed, count=machines + 1).time_ns < whole.time_ns:
        wrong.append("more takes less time")
    return wrong


GIVEN = st.tuples(
    st.lists(needs(), max_size=4), needs(), LINKS, st.integers(1, 64), PRICES, st.sets(st.sampled_from(DIGESTS))
)


@settings(max_examples=200, deadline=None)
@given(GIVEN)
def test_the_laws_of_copying(case: Any) -> None:
    assert what_is_wrong(*case) == []


def in_bytes(size: int, files: int, link: Link | None) -> int:
    assert link is not None
    return -(-size * SECOND_NS // link.bits_per_s) + files * link.latency_ns if files else 0


@pytest.mark.parametrize(
    ("name", "bug", "found"),
    [
        ("copy_ns", in_bytes, "faster than its link"),
        ("copy_ns", lambda size, files, link: 10**30 - size, "more takes less"),
        ("GB", 1 << 30, "does not cost"),
    ],
)
def test_planted_bugs_in_copying_are_found(name: str, bug: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, name, bug)
    told: list[str] = []

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, phases=(Phase.generate,))
    @given(GIVEN)
    def look(case: Any) -> None:
        told.extend(what_is_wrong(*case))

    with contextlib.suppress(HypothesisException):
        look()
    assert any(found in one for one in told), told[:3]


def test_a_bug_that_counts_what_is_cached_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Need, "is_at", lambda self, site: site == self.home)
    need = Need(digest=DIGESTS[0], size=5, files=1, home=HERE, mode=DataMode.COPY)
    wrong = what_is_wrong([need], need, Link(to=THERE, latency_ns=0, bits_per_s=1), 1, dict.fromkeys((HERE,), 1), set())
    assert "not every machine copies it" in wrong


@given(needs())
def test_a_need_is_read_back(need: Need) -> None:
    assert need_of(need.written()) == need


# ------------------------------------------------------------------ placing


def site(name: str, **more: Any) -> Site:
    return Site(id=SiteId(name), name=name, kind=SiteKind.ONPREM, engine="simulated", **more)


def images(home: str = "here", mode: DataMode = DataMode.AUTO, **more: Any) -> DataMount:
    known: dict[str, Any] = {"digest": DIGESTS[0], "size": 10**12, "files": 1_000}
    is_bucket = home == "s3"
    known |= {"home": "s3://b/p" if is_bucket else "/d", "site_id": SiteId("" if is_bucket else home)}
    return DataMount(dataset="images:1", at="/data", mode=mode, dataset_id=DataSetId("set_1"), **(known | more))


def two_sites(nodes_each: int = 2, **links: Any) -> Yard:
    names = [(where, f"{where}{at}") for where in ("here", "there") for at in range(nodes_each)]
    nodes = tuple(gpu_node(name, 8, site_id=SiteId(where)) for where, name in names)
    return Yard(nodes=nodes, sites=(site("here", **links), site("there")))


def seen(yard: Yard, node: str, *digests: str) -> None:
    cached = tuple(f"p0/{digest}" for digest in digests)
    yard.turn([CopiesSeen(at_ns=yard.now, node_id=NodeId(node), cached=cached)])


def test_a_job_goes_where_its_data_is_and_elsewhere_when_there_is_no_room() -> None:
    yard = two_sites(1)
    jobs = [yard.submit(spec(8, data=(images("there"),))) for _ in range(2)]
    assert [yard.nodes_of(job) for job in jobs] == [["there0"], ["here0"]]


def test_a_job_prefers_the_machine_that_has_a_copy() -> None:
    yard = two_sites(4)
    seen(yard, "here2", DIGESTS[0])
    jobs = [yard.submit(spec(4, data=(images("s3"),))) for _ in range(3)]
    assert [yard.nodes_of(job) for job in jobs][:2] == [["here2"], ["here2"]]
    assert yard.nodes_of(jobs[2])[0].startswith("here")
    seen(yard, "here2")
    assert yard.world.cached[NodeId("here2")] == frozenset()


def test_a_model_is_copied_everywhere_and_a_machine_that_has_it_is_preferred() -> None:
    yard = two_sites(4)
    model = replace(images("here", DataMode.COPY), home="", dataset="tiny:3", model="models:/tiny/production")
    (need,) = transfers.needs_of(spec(4, data=(model,)))
    assert not need.is_at(HERE), "the files are the control plane's, and machines have copies"
    first = yard.submit(spec(4, data=(model,)))
    assert yard.nodes_of(first)[0].startswith("here")
    seen(yard, "there1", DIGESTS[0])
    assert yard.nodes_of(yard.submit(spec(4, data=(model,)))) == ["there1"]


def test_what_is_mounted_binds_a_job_to_where_that_is() -> None:
    yard = two_sites(1)
    for bound in (
        spec(8, data=(images("there", DataMode.MOUNT),)),
        spec(8, volumes=(VolumeMount(volume="v", at="/v", path="/v", site_id=THERE, node="there0"),)),
    ):
        first, second = yard.submit(bound, runs_s=10), yard.submit(bound, runs_s=10)
        assert yard.nodes_of(first) == ["there0"]
        assert yard.state(second) is JobState.QUEUED
        yard.run()
        assert yard.state(second) is JobState.SUCCEEDED


def test_each_site_says_how_long_copying_takes_there() -> None:
    link = Link(to=THERE, latency_ns=0, bits_per_s=8 * 10**9)
    yard = two_sites(1, links=(link,), prices=(("egress", 20_000),))
    job = yard.submit(spec(1, data=(images("here", size=600 * 10**9, files=8),)))
    line = yard.world.line_of(yard.job(job))
    told = {one.site: one for one in site_options(yard.world, line, now=yard.now, policy=CALM)}
    assert (told["here"].copy_ns, told["there"].copy_ns) == (0, 10 * MINUTE_NS)
    held = told["there"].amount_micro - told["here"].amount_micro
    assert held == 600 * 20_000  # what leaves home; to hold a GPU costs nothing in this yard
    assert (told["here"].rank, told["there"].rank) == (1, 2)


CASES = st.lists(
    st.tuples(
        st.sampled_from(["here", "there", "s3"]), st.sampled_from(DataMode), st.sampled_from(["", "here0", "there1"])
    ),
    min_size=1,
    max_size=6,
)


def misplaced(cases: list[tuple[str, DataMode, str]]) -> list[str]:
    """Jobs that run where what they mount is not."""
    yard = two_sites(2)
    wrong = []
    for home, mode, node in cases:
        if (home == "s3" and mode is DataMode.MOUNT) or (node and not node.startswith(home)):
            continue
        asked: WorkloadSpec = spec(1, data=(images(home, mode, node=node),))
        places = yard.nodes_of(yard.submit(asked)) if mode is DataMode.MOUNT else []
        astray = [one for one in places if not one.startswith(home) or (node and one != node)]
        wrong += [f"{one} does not have what is at {home} {node}" for one in astray]
    return wrong


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_nothing_is_put_where_what_it_mounts_is_not(cases: list[tuple[str, DataMode, str]]) -> None:
    assert misplaced(cases) == []


def test_a_planted_bug_in_binding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkloadSpec, "home", property(lambda _: (SiteId(""), "")))
    monkeypatch.setattr(choosing, "has_data", lambda *_: None)
    monkeypatch.setattr(choosing, "copies_of", lambda *_: {})
    told = misplaced([("there", DataMode.MOUNT, "there1")] * 3 + [("here", DataMode.MOUNT, "here0")] * 3)
    assert told
