"""Readers of public traces: what they make of rows, and what they say about rows that are wrong."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from tests.twin.small import RATES
from tidemill.errors import InvalidRequest, NotFound
from tidemill.twin.arrivals import Arrival, Stream
from tidemill.twin.cloud import Conditions
from tidemill.twin.fleet import describe, parse_fleet
from tidemill.twin.report import figures
from tidemill.twin.run import run
from tidemill.twin.synthetic import Synthetic, arrivals, parse_synthetic
from tidemill.twin.traces import READERS, SHIPPED, SHIPPED_NODES, Reading, gang_of, openb_nodes, read_trace, shipped
from tidemill.units import DAY_NS, HOUR_NS, SECOND_NS


def read(tmp_path: Path, name: str, text: str, reading: Reading | None = None) -> tuple[list[Arrival], dict[str, int]]:
    path = tmp_path / f"{name}.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    trace = read_trace(name, path, reading or Reading())
    return only_arrivals(trace.arrivals), dict(trace.skipped)


def only_arrivals(stream: Stream) -> list[Arrival]:
    return [item for item in stream if isinstance(item, Arrival)]


def told(one: Arrival) -> tuple[float, float, int, int, str]:
    gpus = one.spec.resources.gpus
    return one.at_ns / SECOND_NS, one.duration_ns / SECOND_NS, one.spec.nodes, gpus.count if gpus else 0, one.tenant


def test_philly(tmp_path: Path) -> None:
    text = (
        "timestamp,duration,num_gpus,gpu_time,cluster\n"
        "2017-10-09 07:01:55,66.5,1,66,a\n2017-10-09 07:00:00,10,16,160,b\n2017-10-09 07:00:01,0,1,0,a\n,,,,\n"
    )
    found, skipped = read(tmp_path, "philly", text)
    assert [told(one) for one in found] == [(0, 10, 2, 8, "b"), (115, 66.5, 1, 1, "a")]
    assert skipped == {"no duration": 1}


def test_muri(tmp_path: Path) -> None:
    text = "job_id,num_gpu,submit_time,iterations,iteration_time\n0,8,2000,100,50\n1,2,1000,10,100\n"
    assert [told(one) for one in read(tmp_path, "muri", text)[0]] == [(0, 1, 1, 2, "muri"), (1, 5, 1, 8, "muri")]


def test_pai_in_hours_and_in_seconds(tmp_path: Path) -> None:
    text = "arrival_time,length,cpus\n0,0.5,1\n1,2,12\n"
    assert [told(one) for one in read(tmp_path, "pai", text)[0]] == [(0, 1800, 1, 1, "pai"), (3600, 7200, 2, 6, "pai")]
    text = "arrival_time,length,cpus\n0,60,1\n"
    assert read(tmp_path, "pai", text)[0][0].duration_ns == 60 * SECOND_NS
    assert read(tmp_path, "pai", text, Reading(unit_ns=HOUR_NS))[0][0].duration_ns == 60 * HOUR_NS


def test_openb(tmp_path: Path) -> None:
    text = (
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
        "a,6000,12288,1,460,V100M16|V100M32,LS,Running,10,110,30\n"
        "b,1000,1024,0,0,,BE,Running,5,6,\nc,1000,1024,2,1000,,LS,Pending,7,7,\nd,1000,1024,1,1000,,LS,Pending,7,,\n"
    )
    found, skipped = read(tmp_path, "openb", text)
    assert [(one.at_ns // SECOND_NS, one.duration_ns // SECOND_NS, one.tenant) for one in found] == [
        (0, 1, "BE"),
        (5, 80, "LS"),
    ]
    gpus = [choice.gpus for choice in found[1].spec.choices]
    assert [(one.milli, one.model) for one in gpus if one] == [(460, "V100-SXM2-16GB"), (460, "V100-SXM2-32GB")]
    assert found[1].spec.resources.memory_bytes == 12 * 1024**3
    assert skipped == {"deleted before it ran": 1, "no deletion_time": 1}


def test_gavel(tmp_path: Path) -> None:
    (tmp_path / "vc1.trace").write_text(
        "ResNet-18 (batch size 32)\tcd %s/x && python3 a.py\t--num_steps\t1\t1000\t5.5\t4\n"
    )
    (tmp_path / "vc2.trace").write_text("A3C\tcd y --n 3\t-n\t1\t10\t0.000000\t1\nNew\tcd y\t-n\t1\t10\t0.0\t1\n")
    table = tmp_path / "throughputs.json"
    table.write_text(
        json.dumps({"v100": {"('ResNet-18 (batch size 32)', 1)": {"null": 25.0}, "('A3C', 1)": {"null": 5.0}}})
    )
    trace = read_trace("gavel", tmp_path, Reading(throughputs=table))
    assert [told(one) for one in only_arrivals(trace.arrivals)] == [(0, 2, 1, 1, "vc2"), (5.5, 10, 1, 4, "vc1")]
    assert trace.skipped == {"no throughput of New": 1}
    with pytest.raises(InvalidRequest, match="throughputs"):
        read_trace("gavel", tmp_path, Reading())
    table.write_text("{}")
    with pytest.raises(InvalidRequest, match="not a table of throughputs"):
        list(read_trace("gavel", tmp_path, Reading(throughputs=table)).arrivals)
    (tmp_path / "vc3.trace").write_text("nothing\n")
    table.write_text('{"v100": {}}')
    with pytest.raises(InvalidRequest, match=r"vc3.trace, line 1"):
        list(read_trace("gavel", tmp_path / "vc3.trace", Reading(throughputs=table)).arrivals)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("philly", "timestamp,duration,num_gpus,cluster\n2017-10-09 07:01:55,x,1,a\n", ("line 2", "duration", "'x'")),
        ("philly", "timestamp,duration,num_gpus,cluster\nlately,5,1,a\n", ("line 2", "timestamp", "'lately'")),
        ("philly", "timestamp,duration,num_gpus,cluster\n2017-10-09 07:01:55,5,0,a\n", ("line 2", "num_gpus", "'0'")),
        ("philly", "timestamp,duration,num_gpus,cluster\n2017-10-09 07:01:55,5,1.5,a\n", ("num_gpus", "whole number")),
        ("muri", "num_gpu,submit_time,iterations\n1,2,3\n", ("no column iteration_time", "another kind")),
        ("muri", "num_gpu,submit_time,iterations,iteration_time\n1,-2,3,4\n", ("submit_time", "'-2'")),
        ("pai", "arrival_time,length,cpus\n0,nan,1\n", ("line 2", "length", "'nan'")),
        ("openb", "name,cpu_milli,memory_mib,num_gpu,gpu_milli,creation_time,deletion_time\na,1,1,1,0,0,5\n", ("gpu_milli",)),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, name: str, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(tmp_path, name, text)
    assert caught.value.field == "--file"
    assert caught.value.mend
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_trace_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no reader"):
        read_trace("helios", tmp_path, Reading())
    with pytest.raises(NotFound):
        read_trace("philly", tmp_path / "absent.csv", Reading())
    with pytest.raises(InvalidRequest, match="No philly trace is shipped"):
        read_trace("philly", None, Reading())
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"\x1f\x8b" + b"nothing" * 20)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        list(read_trace("pai", broken, Reading()).arrivals)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in SHIPPED.items() for file in files])
def test_shipped_traces_can_be_read_whole(name: str, file: str) -> None:
    found = only_arrivals(read_trace(name, Path(file), Reading()).arrivals)
    assert len(found) == {
        "muri-trace1.csv.gz": 1_494, "muri-trace3.csv.gz": 992, "muri-trace4.csv.gz": 2_638, "pai_1k.csv.gz": 1_000,
        "openb_pod_list_default.csv.gz": 8_151,
    }[file]  # fmt: skip
    assert all(a.at_ns <= b.at_ns for a, b in itertools.pairwise(found))
    assert found[0].at_ns == 0
    assert set(SHIPPED) <= set(READERS)


def test_the_openb_fleet_is_the_published_one() -> None:
    nodes = openb_nodes(shipped(SHIPPED_NODES))
    assert (len(nodes), sum(len(node.devices) for node in nodes)) == (1_213, 6_212)
    assert sum(node.cpu_milli for node in nodes) == 107_018_000
    assert "V100-SXM2-32GB:8" in describe(nodes)


def test_a_shipped_trace_runs() -> None:
    trace = read_trace("muri", None, Reading())
    stream = itertools.islice(trace.arrivals, 60)
    found = figures(run(stream, Conditions(nodes=parse_fleet("8xH100:8"), rates=RATES)))
    assert found["jobs"]["succeeded"] == 60


def test_gangs_are_cut_evenly() -> None:
    for gpus in range(1, 130):
        workers, each = gang_of(gpus, 8)
        assert workers * each == gpus
        assert each <= 8
    assert gang_of(3, 0) == (3, 1)


# --- the synthetic mix ---


def sample(mix: Synthetic, gpus: int = 128) -> list[Arrival]:
    return only_arrivals(arrivals(mix, gpus=gpus, per_node=8))


def test_the_same_seed_gives_the_same_jobs_and_another_gives_others() -> None:
    first, again, other = (sample(Synthetic(jobs=500, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 500
    assert all(a.at_ns <= b.at_ns for a, b in itertools.pairwise(first))


def test_the_mix_has_the_load_it_says() -> None:
    mix = Synthetic(jobs=40_000, load=0.7, sigma=1.0, diurnal=0.3)
    found = sample(mix)
    work = sum(one.duration_ns * told(one)[2] * told(one)[3] for one in found)
    assert work / (128 * found[-1].at_ns) == pytest.approx(0.7, rel=0.05)
    assert 0.04 < sum(told(one)[3] == 0 for one in found) / len(found) < 0.06
    assert 0.28 < sum(one.spec.tier == "spot" for one in found) / len(found) < 0.32
    assert all(one.spec.max_duration_ns == 0 or one.spec.max_duration_ns > one.duration_ns for one in found)
    assert len({one.spec for one in found}) < 300, "specs are shared"


def test_days_and_weekends_differ() -> None:
    found = sample(Synthetic(jobs=50_000, span_ns=28 * DAY_NS, diurnal=0.8, weekend=0.4))
    hours = [0] * 24
    for one in found:
        hours[one.at_ns // HOUR_NS % 24] += 1
    assert max(hours) > 4 * min(hours)
    weekend = sum(one.at_ns // DAY_NS % 7 >= 5 for one in found)
    assert weekend / len(found) == pytest.approx(0.8 / 5.8, rel=0.1)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("jobs=x", "'x'"), ("colour=red", "colour"), ("jobs", "jobs"), ("median=soon", "soon"), ("spot=2", "spot"),
        ("sizes=1-2", "sizes"), ("sizes=1.5:2", "whole GPUs"), ("jobs=0", "jobs"), ("load=0", "load"), ("shortest=8d", "longest"),
    ],
)  # fmt: skip
def test_a_mix_that_is_wrong_says_what(text: str, word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_synthetic(text)
    assert caught.value.field == "--synthetic"
    assert word in str(caught.value)
    assert caught.value.mend


def test_a_mix_in_words() -> None:
    mix = parse_synthetic("jobs=5, seed=3,median=2h,sizes=1:1 0.5:1,span=1d")
    assert (mix.jobs, mix.seed, mix.median_ns, mix.span_ns) == (5, 3, 2 * HOUR_NS, DAY_NS)
    assert {told(one)[3] for one in sample(mix)} <= {0, 1}
