"""Specs as people write them: what they become, what is said of their mistakes, and the way back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill import catalog
from tidemill.errors import InvalidSpec, TidemillError
from tidemill.model.fleet import Level, SiteKind
from tidemill.model.ids import WorkloadId
from tidemill.model.resources import GpuRequest, Resources, parse_gpus
from tidemill.model.rollout import CanaryStep, Comparison, Rolling
from tidemill.model.spec import (
    Alternative,
    Dependency,
    DependsOn,
    Environment,
    Group,
    Kind,
    Pace,
    Placement,
    Port,
    RetryOn,
    RetryPolicy,
    Service,
    Territory,
    Tier,
    Weight,
    WorkloadSpec,
)
from tidemill.model.storage import DataMode, DataMount, VolumeMount
from tidemill.units import DAY_NS, HOUR_NS, SECOND_NS
from tidemill.wire import (
    MAX_BYTES,
    MAX_DURATION_NS,
    WorkloadSpecIn,
    gpus_text,
    json_schema,
    read_spec,
    spec_reference_markdown,
    spec_to_json,
)

GIB = 1024**3
DIGEST = "0123456789abcdef" * 4


def read(**fields: Any) -> WorkloadSpec:
    return read_spec({"run": "true"} | fields, "task")


def mistakes(**fields: Any) -> dict[str, dict[str, Any]]:
    """The mistakes in a spec, by field."""
    with pytest.raises(InvalidSpec) as refused:
        read(**fields)
    assert refused.value.data["errors"][0]["field"] == refused.value.field
    for problem in refused.value.data["errors"]:
        assert problem["detail"], problem
        assert problem["mend"], problem
    return {problem["field"]: problem for problem in refused.value.data["errors"]}


def test_the_least_spec() -> None:
    assert read() == WorkloadSpec(kind=Kind.TASK, name="task", run="true")


def test_everything_at_once() -> None:
    spec = read(
        kind="service",
        name="chat",
        nodes=2,
        resources={"gpus": "H100:80GB:8", "cpus": 0.5, "memory": "2GB", "disk": "1.5TB"},
        env={"python": "3.12", "packages": ["vllm==0.20"]},
        workdir=f"sha256:{DIGEST}",
        envs={"A": "text", "B": 1, "C": 0.5, "D": True},
        secrets=["HF_TOKEN"],
        inputs={"model": "gpt:2"},
        data=["images", {"dataset": "texts:3", "at": "/mnt/texts", "mode": "copy"}],
        volumes=["scratch", {"name": "team", "at": "/team", "read_only": True}],
        setup="pip list",
        run="serve",
        ports=["http", 8000, "metrics:9100", {"name": "grpc", "port": 50051}],
        service={"port": 8000, "readiness": {"path": "/health", "timeout": "5m"}, "replicas": 3, "model": "gpt"},
        max_duration="1h30m",
        retry={"on": ["node_lost", "exit:75"], "max": 2},
        checkpoint={"grace": "30s"},
        priority=-5,
        labels={"team": "a", "n": 3},
    )
    assert spec == WorkloadSpec(
        kind=Kind.SERVICE,
        name="chat",
        nodes=2,
        resources=Resources(
            gpus=parse_gpus("H100:80GB:8"), cpu_milli=500, memory_bytes=2 * GIB, disk_bytes=1_536 * GIB
        ),
        environment=Environment(python="3.12", packages=("vllm==0.20",)),
        workdir=DIGEST,
        envs=(("A", "text"), ("B", "1"), ("C", "0.5"), ("D", "true")),
        secrets=("HF_TOKEN",),
        inputs=(("model", "gpt:2"),),
        data=(
            DataMount(dataset="images", at="/data/images"),
            DataMount(dataset="texts:3", at="/mnt/texts", mode=DataMode.COPY),
        ),
        volumes=(
            VolumeMount(volume="scratch", at="/volumes/scratch"),
            VolumeMount(volume="team", at="/team", read_only=True),
        ),
        setup="pip list",
        run="serve",
        ports=(
            Port(name="http"),
            Port(name="port-8000", number=8000),
            Port(name="metrics", number=9100),
            Port(name="grpc", number=50051),
        ),
        service=Service(
            port="port-8000", readiness_path="/health", readiness_timeout_ns=300 * SECOND_NS, replicas=3, model="gpt"
        ),
        max_duration_ns=5_400 * SECOND_NS,
        retry=RetryPolicy(on=(RetryOn.NODE_LOST,), exit_codes=(75,), max=2),
        checkpoint_grace_ns=30 * SECOND_NS,
        priority=-5,
        labels=(("team", "a"), ("n", "3")),
    )


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"array": 10}, {"kind": "array", "array": {"size": 10}}),
        ({"retry": 5}, {"retry": {"on": ["node_lost", "preempted"], "max": 5}}),
        ({"service": {}}, {"kind": "service", "ports": ["http"], "service": {"port": "http"}}),
        ({"kind": "service"}, {"kind": "service", "ports": ["http"], "service": {"port": "http"}}),
        ({"service": {"port": 8000}}, {"kind": "service", "ports": [8000], "service": {"port": "port-8000"}}),
        ({"service": {"readiness": "/up"}}, {"service": {"readiness": {"path": "/up"}}}),
        ({"service": {"rollout": {"canary": "10%"}}}, {"service": {"rollout": {"canary": [{"weight": 10}]}}}),
        (
            {"service": {"rollout": {"canary": [10, {"weight": "50%", "for": "5m"}]}}},
            {"service": {"rollout": {"canary": [{"weight": 10, "for": 0}, {"weight": 50, "for": "5m"}]}}},
        ),
        ({"service": {"rollout": {"rollback": True}}}, {"service": {}}),
        ({"service": {"liveness": "/up"}}, {"service": {"liveness": {"path": "/up", "every": "10s", "failures": 3}}}),
        ({"ports": 8000}, {"ports": [8000]}),
        ({"ports": ["a:8000"]}, {"ports": [{"name": "a", "port": 8000}]}),
        ({"resources": {"gpus": None}}, {"resources": {"gpus": "none"}}),
        ({"resources": {"gpus": 0.5}}, {"resources": {"gpus": "0.5"}}),
        ({"resources": {"gpus": 2.0}}, {"resources": {"gpus": 2}}),
        ({"workdir": DIGEST}, {"workdir": f"sha256:{DIGEST}"}),
        ({"max_duration": 90}, {"max_duration": "90s"}),
        ({"retry": {"on": "error"}}, {"retry": {"on": ["error"]}}),
        ({"envs": None, "secrets": None, "ports": None}, {}),
        ({"nodes": "4..4"}, {"nodes": 4}),
        ({"array": 10}, {"array": {"size": 10, "parallel": 0}}),
        ({"priority": "high"}, {"priority": 100}),
        ({"priority": "low"}, {"priority": -100}),
        ({"spot": True}, {"capacity": "spot"}),
        ({"spot": False}, {"capacity": "on_demand"}),
        ({"reservation": "night"}, {"capacity": "reserved", "reservation": "night"}),
        ({"after": "train"}, {"after": {"ok": ["train"]}}),
        ({"after": ["a", "b"]}, {"after": {"ok": ["a", "b"], "any": [], "failed": None}}),
        ({"after": {"any": "a"}}, {"after": {"any": ["a"]}}),
        ({"start_after": "2027-03-01T09:00:00Z"}, {"start_after": "2027-03-01T10:00+01:00"}),
        ({"start_after": "2027-03-01 09:00:00.5 z"}, {"start_after": "2027-03-01T09:00:00.500000000+0000"}),
        (
            {"resources": {"cpus": 4, "memory": "8GB", "any_of": [{"gpus": "A100", "speed": 0.5}]}},
            {
                "resources": {
                    "cpus": 4,
                    "memory": "8GB",
                    "any_of": [{"gpus": "A100", "cpus": 4, "memory": "8GB", "disk": 0, "speed": 0.5}],
                }
            },
        ),
        ({"placement": {}, "resources": {"any_of": None}}, {}),
    ],
)
def test_short_forms_mean_their_long_forms(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert read(**short) == read(**long)


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"nmae": "x"}, "nmae", "Did you mean name?"),
        ({"resources": {"gpu": 1}}, "resources.gpu", "Did you mean gpus?"),
        ({"gpus": 1}, "gpus", "resources.gpus?"),
        ({"command": "x"}, "command", "Did you mean run?"),
        ({"replicas": 2}, "replicas", "Did you mean service.replicas?"),
        ({"xyzzy": 2}, "xyzzy", "Fields are kind, name,"),
        ({"resources": {"memory": "2 parsecs"}}, "resources.memory", "512MB, 16GB or 1.5TB"),
        ({"resources": {"memory": -1}}, "resources.memory", "512MB"),
        ({"resources": {"memory": "9" * 60 + "TB"}}, "resources.memory", "512MB"),
        ({"resources": {"cpus": "4"}}, "resources.cpus", "4, or 0.5"),
        ({"resources": {"cpus": 0}}, "resources.cpus", "4, or 0.5"),
        ({"resources": {"cpus": float("nan")}}, "resources.cpus", "4, or 0.5"),
        ({"resources": {"cpus": float("inf")}}, "resources.cpus", "4, or 0.5"),
        ({"resources": {"cpus": 10**400}}, "resources.cpus", "4, or 0.5"),
        ({"resources": {"cpus": True}}, "resources.cpus", "4, or 0.5"),
        ({"resources": {"gpus": "H10"}}, "resources.gpus", "H100"),
        ({"resources": {"gpus": 1.5}}, "resources.gpus", "1g.10gb or none"),
        ({"resources": {"gpus": -1}}, "resources.gpus", "1g.10gb or none"),
        ({"resources": {"gpus": "H100:H200"}}, "resources.gpus", "H100:80GB:8"),
        ({"resources": {"gpus": []}}, "resources.gpus", "H100:80GB:8"),
        ({"resources": 3}, "resources", "gpus, cpus, memory, disk"),
        ({"max_duration": "1 fortnight"}, "max_duration", "90s, 15m"),
        ({"max_duration": 1.5}, "max_duration", "90s, 15m"),
        ({"max_duration": "99999999d"}, "max_duration", "90s, 15m"),
        ({"checkpoint": {"grace": "2d"}}, "checkpoint.grace", "30s"),
        ({"nodes": 0}, "nodes", "1 to 8192"),
        ({"nodes": "2"}, "nodes", "without quotes"),
        ({"array": 0}, "array.size", "1 to 100000"),
        ({"array": 2, "kind": "task"}, "array", "kind: array"),
        ({"kind": "array"}, "array", "array: 10"),
        ({"kind": "pipeline"}, "kind", "steps as tasks"),
        ({"kind": "tsk"}, "kind", "Did you mean task?"),
        ({"kind": "task", "service": {}}, "service", "kind: service"),
        ({"env": {}, "image": "x"}, "image", "Leave one of them out"),
        ({"env": {"python": 3.1}}, "env.python", 'in quotes: "3.1"'),
        ({"env": {"packages": ["-r /etc/passwd"]}}, "env.packages", "torch"),
        ({"env": {"packages": "torch"}}, "env.packages", "list"),
        ({"run": " "}, "run", "command"),
        ({"run": "a\0b"}, "run", "Take it out"),
        ({"run": "x" * 200_000}, "run", "workdir"),
        ({"run": ["a"]}, "run", "quotes"),
        ({"run": "\ud800"}, "run", "UTF-8"),
        ({"envs": {"1A": "x"}}, "envs", "not beginning with a digit"),
        ({"envs": {"A": None}}, "envs", "text, a number"),
        ({"envs": {"A": ["x"]}}, "envs", "text, a number"),
        ({"envs": ["A=b"]}, "envs", "NAME: value"),
        ({"secrets": ["a-b"]}, "secrets", "letters, digits"),
        ({"inputs": {"../x": "a"}}, "inputs", "letters, digits"),
        ({"inputs": {"x": "a:b"}}, "inputs", "name:version"),
        ({"data": [{"dataset": "a:b"}]}, "data.0.dataset", "name:version"),
        ({"data": [{"at": "/x"}]}, "data.0.dataset", "Write"),
        ({"data": [{"dataset": "a", "mode": "stream"}]}, "data.0.mode", "auto, copy and mount"),
        ({"data": [{"dataset": "a", "at": "x"}]}, "data.0.at", "/data"),
        ({"data": [{"dataset": "a", "at": "/etc/x"}]}, "data.0.at", "/mnt/x"),
        ({"data": [{"dataset": "a", "at": "/x/../etc"}]}, "data.0.at", "/data"),
        ({"data": [{"dataset": "a", "at": "/x:ro"}]}, "data.0.at", "colons"),
        ({"data": ["a", {"dataset": "b", "at": "/data/a/b"}]}, "data", "not within another's"),
        ({"data": ["a:1", {"dataset": "a:2", "at": "/old"}]}, "data", "Leave one of them out"),
        ({"volumes": [{"name": "a", "at": "/x"}, {"name": "b", "at": "/x"}]}, "volumes", "not within another's"),
        ({"volumes": [{"name": "a", "read_only": "yes"}]}, "volumes.0.read_only", "true"),
        ({"volumes": "a"}, "volumes", "list"),
        ({"volumes": [{"name": "s3://bucket/data"}]}, "volumes.0.name", "tidemill dataset"),
        ({"ports": [80]}, "ports", "1024 to 65535"),
        ({"ports": ["8000"]}, "ports", "without quotes"),
        ({"ports": ["a:99999"]}, "ports", "1024 to 65535"),
        ({"ports": ["Http"]}, "ports", "lower-case"),
        ({"ports": ["a", "a"]}, "ports", "once"),
        ({"ports": [8000, "x:8000"]}, "ports", "once"),
        ({"ports": [{"nmae": "x"}]}, "ports", "name: http"),
        ({"ports": ["a"], "service": {"port": "b"}}, "service.port", "Ports are a"),
        ({"service": {"port": "B!"}}, "service.port", "1024 to 65535"),
        ({"service": {"readiness": "health"}}, "service.readiness.path", "/health"),
        ({"service": {"replicas": 65}}, "service.replicas", "1 to 64"),
        ({"service": {"liveness": {"path": "x"}}}, "service.liveness.path", "/health"),
        ({"service": {"rollout": {"surge": 0}}}, "service.rollout.surge", "unavailable: 1"),
        ({"service": {"rollout": {"canary": [50, 10]}}}, "service.rollout.canary", "10, then 50"),
        ({"service": {"rollout": {"canary": 100}}}, "service.rollout.canary.0.weight", "10%"),
        ({"service": {"rollout": {"canary": [{"weight": 5, "hold": "5m"}]}}}, "service.rollout.canary.0.hold", "for"),
        ({"service": {"rollout": {"rollback": {"slower": 0.5}}}}, "service.rollout.rollback.slower", "1.5"),
        ({"service": {"liveness": {"every": "10ms"}}}, "service.liveness.every", "2s or 1m"),
        ({"service": {"liveness": {"failures": 0}}}, "service.liveness.failures", "1 to 1000"),
        ({"retry": {"on": ["bad_luck"]}}, "retry.on", "node_lost"),
        ({"retry": {"on": ["exit:0"]}}, "retry.on", "exit:75"),
        ({"retry": {"max": -1}}, "retry.max", "0 to 1000"),
        ({"priority": 1001}, "priority", "-1000 to 1000"),
        ({"labels": {"a b": "x"}}, "labels", "letters"),
        ({"name": "a b"}, "name", "1 to 63"),
        ({"name": "x" * 64}, "name", "1 to 63"),
        ({"name": "x\n"}, "name", "1 to 63"),
        ({"workdir": "."}, "workdir", "/v1/blobs"),
        ({"image": "--privileged"}, "image", "python:3.12"),
        ({"nodes": "8..2"}, "nodes", "such as 2..8"),
        ({"nodes": "2.."}, "nodes", "such as 2..8"),
        ({"nodes": "0..4"}, "nodes", "1 to 8192"),
        ({"nodes": "2..8", "group": {"name": "g", "size": 2}}, "nodes", "Write 8."),
        ({"nodes": "2..8", "service": {}}, "nodes", "Write 8."),
        ({"priority": "urgent"}, "priority", "low, normal, high"),
        ({"capacity": "cheap"}, "capacity", "spot, on_demand or reserved"),
        ({"spot": "yes"}, "spot", "true or false"),
        ({"spot": True, "capacity": "on_demand"}, "spot", "Leave one of them out"),
        ({"spot": True, "reservation": "r"}, "reservation", "is reserved"),
        ({"capacity": "spot", "reservation": "r"}, "reservation", "is reserved"),
        ({"capacity": "reserved"}, "capacity", "reservation: NAME"),
        ({"tier": "spot"}, "tier", "Did you mean capacity?"),
        ({"depends_on": ["a"]}, "depends_on", "Did you mean after?"),
        ({"within": "rack"}, "within", "Did you mean placement.within?"),
        ({"resources": {"gpus": "share 0.5"}}, "resources.gpus", "share 10GB"),
        ({"resources": {"gpus": "share 10GB:2"}}, "resources.gpus", "share 10GB"),
        ({"resources": {"gpus": "1g.10gb:0.5"}}, "resources.gpus", "1g.10gb"),
        ({"resources": {"any_of": {"gpus": 1}}}, "resources.any_of", "list of alternatives"),
        ({"resources": {"any_of": [{}] * 33}}, "resources.any_of", "at most 32"),
        ({"resources": {"any_of": [{"gpus": "H10"}]}}, "resources.any_of.0.gpus", "H100"),
        ({"resources": {"any_of": [{"gpu": 1}]}}, "resources.any_of.0.gpu", "Did you mean gpus?"),
        ({"resources": {"any_of": [{"gpus": 1, "speed": 0}]}}, "resources.any_of.0.speed", "0.6"),
        ({"resources": {"any_of": [{"gpus": 1, "speed": True}]}}, "resources.any_of.0.speed", "0.6"),
        ({"resources": {"any_of": [3]}}, "resources.any_of.0", "gpus, cpus"),
        ({"resources": {"prefer": "speed"}}, "resources.prefer", "Add any_of"),
        ({"resources": {"prefer": "price"}}, "resources.prefer", "order or speed"),
        ({"placement": {"within": "room"}}, "placement.within", "site, block, rack, host or nvlink"),
        ({"placement": {"spread": "nvlink"}}, "placement.spread", "site, block, rack or host"),
        ({"placement": {"within": "rack", "spread": "block"}}, "placement.spread", "narrower"),
        ({"placement": {"within": "rack", "spread": "rack"}}, "placement.spread", "narrower"),
        ({"placement": {"labels": {"zone": "a||b"}}}, "placement.labels", "a|b"),
        ({"placement": {"labels": {"zone": ""}}}, "placement.labels", "a|b"),
        ({"placement": {"tolerations": ["a b"]}}, "placement.tolerations", "key=value"),
        ({"placement": {"tolerations": ["a="]}}, "placement.tolerations", "key=value"),
        ({"placement": {"countries": ["GER"]}}, "placement.countries", "ISO 3166"),
        ({"placement": {"kinds": ["space"]}}, "placement.kinds", "onprem, cloud and edge"),
        ({"placement": {"sites": ["a b"]}}, "placement.sites", "tidemill site list"),
        ({"placement": {"weigh": "cost"}}, "placement.weigh", "price, carbon, start or latency"),
        ({"placement": {"weigh": {"price": 0}}}, "placement.weigh", "above 0"),
        ({"placement": {"weigh": "latency"}}, "placement.weigh", "near"),
        ({"placement": {"within": "site", "across_sites": True}}, "placement.across_sites", "Leave one"),
        ({"placement": "rack"}, "placement", "labels, tolerations"),
        ({"group": {"name": "g"}}, "group.size", "group.size"),
        ({"group": {"name": "g", "size": 1}}, "group.size", "2 to 8192"),
        ({"after": {"done": ["a"]}}, "after", "ok, any or failed"),
        ({"after": ["a b"]}, "after", "tidemill ps"),
        ({"after": {"ok": ["a"], "any": ["a"]}}, "after", "once"),
        ({"after": 3}, "after", "names or ids"),
        ({"start_after": "tomorrow"}, "start_after", "2027-03-01T09:00:00Z"),
        ({"start_after": 3600}, "start_after", "2h"),
        ({"start_after": "2027-03-01T09:00:00"}, "start_after", "zone"),
        ({"start_after": "2027-03-01"}, "start_after", "zone"),
        ({"start_after": "2027-13-01T09:00:00Z"}, "start_after", "2027-03-01T09:00:00Z"),
        ({"start_after": "9999-12-31T09:00:00Z"}, "start_after", "2027"),
        ({"start_after": "in 99999w"}, "start_after", "2027"),
        ({"start_after": "2h", "start_before": "1h"}, "start_before", "later"),
        ({"expected_duration": "a while"}, "expected_duration", "90s"),
        ({"array": {"size": 3, "parallel": -1}}, "array.parallel", "0 to 100000"),
    ],
)
def test_a_mistake_is_named_with_its_field_and_the_mend(fields: dict[str, Any], field: str, said: str) -> None:
    found = mistakes(**fields)
    assert field in found, found
    assert said in found[field]["mend"], found[field]


def test_times_from_now_count_from_when_it_is_read() -> None:
    now = 1_800_000_000 * SECOND_NS
    spec = read_spec({"run": "x", "start_after": "in 2h", "start_before": "1d"}, "x", now=now)
    assert (spec.start_after_ns, spec.start_before_ns) == (now + 2 * HOUR_NS, now + DAY_NS)
    mixed = {"run": "x", "start_after": "in 2h", "start_before": "2027-01-15T08:00:01Z"}
    with pytest.raises(InvalidSpec):
        read_spec(mixed, "x", now=now)
    assert read_spec(mixed, "x", now=now - 3 * HOUR_NS).start_before_ns == now + SECOND_NS


def test_an_alternative_is_as_resources_in_what_it_leaves_out() -> None:
    spec = read(
        resources={
            "gpus": "H100:8",
            "cpus": 16,
            "any_of": [{"gpus": "A100:8", "speed": 0.6}, {"gpus": "none", "cpus": 96, "speed": 2}],
            "prefer": "speed",
        }
    )
    assert [one.cpu_milli for one in spec.choices] == [96_000, 16_000, 16_000]
    assert [str(one.gpus) for one in spec.choices] == ["None", "H100:8", "A100:8"]


def test_all_mistakes_are_reported_at_once() -> None:
    found = mistakes(
        nmae="x",
        resources={"gpus": "H10", "memory": "2 parsecs", "cpus": "x"},
        env={},
        image="x",
        retry={"max": "3"},
        kind="array",
        run="",
    )
    assert set(found) == {
        "nmae", "resources.gpus", "resources.memory", "resources.cpus", "image", "retry.max", "array", "run",
    }  # fmt: skip


@pytest.mark.parametrize("given", [None, [], "run", 3, {1: 2}, {"run": {}}, {"retry": [[[]]]}])
def test_what_is_no_mapping_is_refused_kindly(given: Any) -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_spec(given, "x")
    json.dumps(refused.value.data["errors"])


GPU_MODELS = sorted(device.model for device in catalog.devices())[:20]
TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30)
SCRIPT = TEXT.filter(lambda text: bool(text.strip()))
NAME = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?", fullmatch=True)
SIZE = st.one_of(st.just(0), st.integers(0, MAX_BYTES), st.integers(1, 512).map(lambda count: count * GIB))
WEIGHTS = st.lists(st.integers(1, 99), unique=True, max_size=3).map(sorted)
ROLLING = st.builds(
    Rolling,
    surge=st.integers(1, 64),
    unavailable=st.integers(0, 64),
    drain_ns=st.integers(0, DAY_NS),
    progress_ns=st.integers(SECOND_NS, DAY_NS),
    steps=WEIGHTS.map(lambda found: tuple(CanaryStep(weight=weight, hold_ns=weight * SECOND_NS) for weight in found)),
    comparison=st.none()
    | st.builds(
        Comparison,
        errors_milli=st.integers(0, 1_000),
        slower_milli=st.just(0) | st.integers(1_000, 100_000),
        requests=st.integers(1, 1_000),
        window_ns=st.integers(5 * SECOND_NS, 3_600 * SECOND_NS),
    ),
)
MOMENT = st.integers(SECOND_NS // 10, DAY_NS)
PACE = st.builds(
    Pace, delay_ns=st.integers(0, DAY_NS), every_ns=MOMENT, answer_ns=MOMENT, failures=st.integers(1, 1_000)
)
DURATION = st.one_of(st.integers(0, MAX_DURATION_NS), st.integers(0, 10_000).map(lambda count: count * SECOND_NS))


@st.composite
def gpu_requests(draw: st.DrawFn) -> GpuRequest:
    low = draw(SIZE)
    high = draw(st.one_of(st.just(0), st.just(low), st.integers(low, MAX_BYTES)))
    share = draw(st.one_of(st.just(1_000), st.integers(1, 999)))
    how = draw(st.sampled_from(["whole", "profile", "memory"]))
    if how != "whole":
        return GpuRequest(
            model=draw(st.sampled_from(["", *GPU_MODELS])),
            memory_min_bytes=low,
            memory_max_bytes=high,
            count=draw(st.integers(1, 1_000)) if how == "profile" else 1,
            profile=draw(st.sampled_from(["1g.5gb", "3g.40gb", "1g.10gb+me"])) if how == "profile" else "",
            share_bytes=draw(st.integers(1, MAX_BYTES)) if how == "memory" else 0,
        )
    return GpuRequest(
        model=draw(st.sampled_from(["", *GPU_MODELS])),
        memory_min_bytes=low,
        memory_max_bytes=high,
        milli=share,
        count=draw(st.integers(1, 1_000)) if share == 1_000 else 1,
    )


INSTANT = st.integers(1, (1 << 62) - 1) | st.integers(1, 4_000_000_000).map(lambda seconds: seconds * SECOND_NS)


@st.composite
def resources(draw: st.DrawFn) -> Resources:
    return Resources(
        gpus=draw(st.none() | gpu_requests()),
        cpu_milli=draw(st.integers(1, 1_000_000)),
        memory_bytes=draw(SIZE),
        disk_bytes=draw(SIZE),
    )


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    levels = [*Level]
    within = draw(st.none() | st.sampled_from(levels))
    narrower = [level for level in levels[(levels.index(within) + 1 if within else 0) :] if level is not Level.NVLINK]
    words = st.dictionaries(NAME, NAME, max_size=2)
    return Placement(
        labels=tuple(draw(st.dictionaries(NAME, st.sampled_from(["a", "a|b", "x y"]), max_size=2)).items()),
        tolerations=tuple(draw(st.lists(st.sampled_from(["maintenance", "team=a", "x/y=z=1"]), max_size=2))),
        within=within,
        prefer=draw(st.none() | st.sampled_from(levels)),
        spread=draw(st.none() | st.sampled_from(narrower)) if narrower else None,
        apart=tuple(draw(words).items()),
        across_sites=within is None and draw(st.booleans()),
        where=Territory(
            sites=tuple(draw(st.lists(NAME, max_size=2, unique=True))),
            countries=tuple(draw(st.lists(st.sampled_from(["DEU", "FRA", "ISL"]), max_size=2, unique=True))),
            kinds=tuple(draw(st.lists(st.sampled_from([*SiteKind]), max_size=2, unique=True))),
        ),
        weigh=tuple(
            sorted(draw(st.dictionaries(st.sampled_from([*Weight]), st.integers(1, 5_000), max_size=3)).items())
        ),
        near=draw(NAME),
    )


@st.composite
def dependencies(draw: st.DrawFn) -> tuple[Dependency, ...]:
    names = draw(st.lists(NAME, max_size=4, unique=True))
    ends = sorted(
        draw(st.lists(st.sampled_from([*DependsOn]), min_size=len(names), max_size=len(names))), key=[*DependsOn].index
    )
    return tuple(Dependency(workload_id=WorkloadId(name), on=on) for name, on in zip(names, ends, strict=True))


@st.composite
def specs(draw: st.DrawFn) -> WorkloadSpec:
    kind = draw(st.sampled_from([Kind.TASK, Kind.ARRAY, Kind.DEV, Kind.SERVICE]))
    ports = draw(
        st.lists(
            st.builds(
                Port, name=st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), number=st.sampled_from([0, *range(2_000, 2_020)])
            ),
            max_size=4,
            unique_by=(lambda port: port.name, lambda port: port.number or port.name),
        )
    )  # fmt: skip
    if kind is Kind.SERVICE and not ports:
        ports = [Port(name="http")]
    pairs = st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True), TEXT, max_size=3)
    has_image = draw(st.booleans())
    nodes = draw(st.integers(1, 4_096))
    group = draw(st.none() | st.builds(Group, name=NAME, size=st.integers(2, 4_096)))
    starts = sorted(draw(st.lists(INSTANT, min_size=2, max_size=2, unique=True)))
    tier = draw(st.sampled_from(Tier))
    pace = draw(st.none() | PACE)
    any_of = tuple(
        draw(st.lists(st.builds(Alternative, resources=resources(), speed_milli=st.integers(1, 999_999)), max_size=3))
    )
    return WorkloadSpec(
        kind=kind,
        name=draw(NAME),
        run=draw(st.one_of(st.just(""), SCRIPT) if kind is Kind.DEV else SCRIPT),
        setup=draw(TEXT),
        nodes=nodes,
        nodes_min=0 if kind is Kind.SERVICE or group or nodes == 1 else draw(st.just(0) | st.integers(1, nodes - 1)),
        resources=draw(resources()),
        any_of=any_of,
        by_speed=bool(any_of) and draw(st.booleans()),
        tier=tier,
        reservation=draw(NAME) if tier is Tier.RESERVED else "",
        placement=draw(placements()),
        group=group,
        after=draw(dependencies()),
        expected_duration_ns=draw(DURATION),
        start_after_ns=draw(st.sampled_from([0, starts[0]])),
        start_before_ns=draw(st.sampled_from([0, starts[1]])),
        environment=None
        if has_image
        else draw(
            st.none()
            | st.builds(
                Environment,
                python=st.sampled_from(["", "3.12", "3.10"]),
                packages=st.lists(st.sampled_from(["a", "b==1", "c[x]>=2"])).map(tuple),
            )
        ),
        image="docker.io/library/python:3" if has_image else "",
        workdir=draw(st.sampled_from(["", DIGEST])),
        envs=tuple(draw(pairs).items()),
        secrets=tuple(draw(st.lists(st.sampled_from(["A", "B_1"]), max_size=2))),
        inputs=tuple(draw(st.dictionaries(NAME, st.sampled_from(["a", "b:3"]), max_size=2)).items()),
        data=tuple(
            DataMount(dataset=f"set-{number}{version}", at=f"/d/{number}", mode=draw(st.sampled_from(DataMode)))
            for number, version in enumerate(draw(st.lists(st.sampled_from(["", ":3"]), max_size=2)))
        ),
        volumes=tuple(
            VolumeMount(volume=f"v{number}", at=f"/v/{number}", read_only=flag)
            for number, flag in enumerate(draw(st.lists(st.booleans(), max_size=2)))
        ),
        ports=tuple(ports),
        service=Service(
            port=draw(st.sampled_from(ports)).name,
            readiness_path=draw(st.sampled_from(["", "/", "/health"])),
            readiness_timeout_ns=draw(DURATION),
            replicas=draw(st.integers(1, 64)),
            model=draw(st.sampled_from(["", "gpt", "a/b"])),
            idle_ns=draw(st.integers(0, DAY_NS)),
            concurrency=draw(st.integers(1, 65_536)),
            wait_ns=draw(st.integers(0, 600 * SECOND_NS)),
            readiness_pace=draw(PACE),
            liveness_path="" if pace is None else draw(st.sampled_from(["", "/alive"])),
            liveness_pace=pace,
            rollout=draw(ROLLING),
        )
        if kind is Kind.SERVICE
        else None,
        array_size=draw(st.integers(1, 100_000)) if kind is Kind.ARRAY else 1,
        array_parallel=draw(st.integers(0, 100_000)) if kind is Kind.ARRAY else 0,
        max_duration_ns=draw(DURATION),
        retry=RetryPolicy(
            on=tuple(draw(st.lists(st.sampled_from(RetryOn), max_size=3))),
            exit_codes=tuple(draw(st.lists(st.integers(1, 255), max_size=3))),
            max=draw(st.integers(0, 1_000)),
        ),
        checkpoint_grace_ns=draw(st.integers(0, DAY_NS)),
        priority=draw(st.integers(-1_000, 1_000)),
        labels=tuple(draw(st.dictionaries(NAME, TEXT, max_size=3)).items()),
    )


@settings(max_examples=300, deadline=None)
@given(spec=specs())
def test_what_is_written_reads_back_as_the_same(spec: WorkloadSpec) -> None:
    written = json.loads(json.dumps(spec_to_json(spec)))
    assert WorkloadSpecIn.model_validate(written).to_model("other") == spec


@given(request=gpu_requests())
def test_gpu_requests_read_back_to_the_byte(request: GpuRequest) -> None:
    assert parse_gpus(gpus_text(request)) == request


def test_the_planted_bug_of_rounded_sizes_is_caught() -> None:
    request = GpuRequest(model="", memory_min_bytes=24 * GIB + 1)
    assert parse_gpus(str(request)) != request
    assert parse_gpus(gpus_text(request)) == request


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [*WorkloadSpecIn.model_fields]


@settings(max_examples=400, deadline=None)
@given(given=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), ANY_JSON, max_size=6))
def test_no_input_does_anything_but_become_a_spec_or_be_refused(given: dict[str, Any]) -> None:
    try:
        spec = read_spec(given, "x")
    except InvalidSpec as refused:
        json.dumps([refused.data["errors"][0], *refused.data["errors"]])
        return
    assert isinstance(spec, WorkloadSpec)


def test_the_schema_describes_every_field() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"].endswith("2020-12/schema")
    assert list(schema["properties"]) == FIELDS
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), name


def test_the_reference_has_a_row_for_every_field() -> None:
    page = spec_reference_markdown()
    for name in (
        *FIELDS,
        "resources.gpus",
        "service.readiness.timeout",
        "retry.on",
        "array.size",
        "env.packages",
        "resources.any_of.speed",
        "placement.within",
        "group.size",
    ):
        assert f"| `{name}` |" in page
    assert "None" not in page
    assert "{}" not in page


def test_errors_are_our_own() -> None:
    with pytest.raises(TidemillError):
        read_spec({"run": "x", "service": {"port": 1}}, "x")
