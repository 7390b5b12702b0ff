"""Services under traffic: files that are read, conservation of requests and replica time, what-ifs, the command."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.twin.test_cli import call
from tidemill.cli.traffic import _engine, _rules, _service
from tidemill.errors import InvalidRequest, TidemillError
from tidemill.model.spec import Service
from tidemill.twin.serving import Engine, Result, Rules, bins, play
from tidemill.twin.traffic import Mix, Request, made, parse_mix, read_traffic
from tidemill.units import HOUR_NS, MINUTE_NS, SECOND_NS

# Files


@pytest.mark.parametrize(
    "text",
    [
        (
            '{"at_ns": 1800000000000000000, "model": "m", "prompt_tokens": 5, "completion_tokens": 7}\n\n'
            '{"at_ns": 1800000001500000000, "model": "m", "prompt_tokens": 1, "completion_tokens": 2}\n'
        ),
        "arrival,prompt_tokens,completion_tokens,model\n86401.5,1,2,m\n86400,5,7,m\n",
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens,model\n2024-05-10 00:00:00.0099590+00:00,5,7,m\n"
            "2024-05-10 00:00:01.5099590+00:00,1,2,m\n"
        ),
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,m,5,7,12,x\n6.5,m,1,2,3,x\n",
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 7, "model": "m", "hash_ids": [1]}\n'
            '{"timestamp": 1500, "input_length": 1, "output_length": 2, "model": "m"}\n'
        ),
    ],
)
def test_recordings_and_public_traces_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "traffic"
    path.write_bytes(gzip.compress(text.encode()) if "arrival" in text else text.encode())
    first, second = read_traffic(path)
    assert (first.model, first.prompt, first.completion) == ("m", 5, 7)
    assert (second.prompt, second.completion) == (1, 2)
    assert second.at_ns - first.at_ns == 1_500_000_000
    assert read_traffic(path, limit=1)[0].model == "m"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("arrival,prompt_tokens\n1,2\n", "line 2: it has no completion_tokens"),
        ("arrival,prompt_tokens,completion_tokens\nsoon,2,3\n", "line 2: 'soon' is not an instant"),
        ("arrival,prompt_tokens,completion_tokens\n1,-2,3\n", "line 2: '-2' is not a number of tokens"),
        ('{"at_ns": 1}\n{"', "line 1: it has no prompt_tokens"),
        ('{"at_ns": 1, "prompt_tokens": 1, "completion_tokens": 1}\n{"', "line 2: it does not say when"),
        ("arrival,prompt_tokens,completion_tokens\n", "has no request"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r".") as caught:
        read_traffic(path)
    assert told in caught.value.detail


def test_a_mix_has_its_rate_and_is_the_same_for_the_same_seed() -> None:
    mix = parse_mix("rate=4,span=1h,seed=3,diurnal=0,burst=2,model=m")
    asked = list(made(mix))
    assert asked == list(made(mix))
    assert [one.at_ns for one in asked] == sorted(one.at_ns for one in asked)
    assert 4 * 3600 * 0.9 < len(asked) < 4 * 3600 * 1.2
    assert list(made(replace(mix, seed=4)))[:5] != asked[:5]
    for wrong in ("rate=0", "speed=3", "rate=fast", "burst=0.5", "span=long"):
        with pytest.raises(InvalidRequest):
            parse_mix(wrong)
    with pytest.raises(ValueError, match="million"):
        Mix(rate=10_000, span_ns=365 * 24 * HOUR_NS)


# What comes of traffic


def served(asked: list[Request], section: dict[str, Any], engine: str = "", rules: Rules | None = None) -> Result:
    service = {"m": _service("m", section)}
    return play(asked, service, {"m": _engine(engine)}, rules or _rules())[0]


def crowd(count: int, *, every_s: float, prompt: int = 800, completion: int = 120) -> list[Request]:
    return [Request(round(n * every_s * SECOND_NS), "m", prompt, completion) for n in range(count)]


def test_one_request_takes_what_the_engine_says() -> None:
    result = served(crowd(1, every_s=1), {"replicas": "1..2"}, "prefill=8000,decode=60,batch=600,start=30s")
    assert result.ttft.highest == pytest.approx(0.1, rel=1e-3)
    assert result.latency.highest == pytest.approx(0.1 + 120 / 60, rel=1e-3)
    many = served(crowd(20, every_s=0), {"replicas": 1, "concurrency": 20}, "prefill=8000,decode=60,batch=600")
    assert many.ttft.highest == pytest.approx(2.0, rel=1e-3), "prompts are read one after the other"
    assert 20 * 120 / 600 < many.latency.highest < 2 + 20 * 120 / 600


def test_from_nothing_the_first_request_waits_for_the_start_and_others_are_refused_after_their_time() -> None:
    started = served(crowd(3, every_s=1), {"replicas": "0..1", "wait": "60s", "idle": "20s"}, "start=30s")
    assert started.refused == 0
    assert 28 < started.ttft.highest < 33
    assert started.replica_ns < 90 * SECOND_NS, "and it goes when nobody asks"
    late = served(crowd(3, every_s=1), {"replicas": "0..1", "wait": "10s"}, "start=30s")
    assert (late.refused, late.answered) == (3, 0)


def test_an_objective_has_first_tokens_come_sooner_for_more_replica_hours() -> None:
    asked = crowd(2_400, every_s=0.25, prompt=2_400)
    section = {"replicas": "1..6", "concurrency": 32, "idle": "2m"}
    before = served(asked, section, "start=20s,gpu=H100")
    after = served(asked, {**section, "scaling": {"ttft": "600ms", "window": "20s"}}, "start=20s,gpu=H100")
    assert after.ttft.quantile(0.9) < 0.7 < before.ttft.quantile(0.9)
    assert before.replica_ns < after.replica_ns <= 6 * after.span_ns + MINUTE_NS
    assert after.cost_micro > before.cost_micro > 0
    assert after.changes < 12, "and it does not flap"
    assert sum(row[2] for row in bins(after)) > sum(row[2] for row in bins(before))


def check_conservation(rules: Rules, phases: tuple[Phase, ...] = tuple(Phase), examples: int = 25) -> None:
    @settings(max_examples=examples, deadline=None, report_multiple_bugs=False, phases=phases)
    @given(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4_000), st.integers(0, 300)), min_size=1, max_size=40),
        st.integers(0, 2),
        st.integers(0, 3),
        st.integers(1, 4),
        st.sampled_from(["0s", "5s", "60s"]),
        st.sampled_from([{}, {"ttft": "200ms", "window": "5s"}, {"kv_cache": "50%", "up_step": 1, "down_step": 1}]),
    )
    def run(
        course: list[tuple[int, int, int]], least: int, more: int, concurrency: int, wait: str, scaling: dict[str, Any]
    ) -> None:
        at, asked = 0, []
        for later, prompt, completion in course:
            at += later * SECOND_NS
            asked.append(Request(at, "m", prompt, completion, f"t{prompt % 3}"))
        most = max(1, least + more)
        section: dict[str, Any] = {"replicas": f"{least}..{most}", "concurrency": concurrency, "wait": wait}
        section |= {"idle": "10s"} | ({"scaling": scaling} if scaling and least < most else {})
        seats: list[Any] = []

        def watched(name: str) -> Any:
            seats.append(rules.replica(name))
            seats[-1].under_way = Counted()
            return seats[-1]

        result = served(asked, section, "start=7s,cache=4000", replace(rules, replica=watched))
        assert all(seat.under_way.most <= concurrency for seat in seats), "a replica has more than it takes"
        assert result.answered + result.refused == result.requests == len(asked), "no request is lost or counted twice"
        assert result.tokens <= sum(one.completion for one in asked)
        assert result.ttft.count == result.answered
        assert result.wait.highest <= {"0s": 0, "5s": 5, "60s": 60}[wait] + 1e-6, "nobody waits longer than they may"
        assert result.latency.highest >= result.ttft.highest or not result.answered
        assert result.busy_ns <= result.ready_ns <= result.replica_ns
        assert least <= result.most <= 2 * most, "those that leave are still there while others come"

    run()


def test_requests_and_time_are_conserved() -> None:
    check_conservation(_rules())


class Counted(set[Any]):
    """What is under way on a replica, and the most that ever was."""

    most = 0

    def add(self, one: Any) -> None:
        """As a set does, counted."""
        super().add(one)
        self.most = max(self.most, len(self))


def without_limit(rules: Rules) -> Rules:
    return replace(rules, route=lambda model, seats, concurrency: rules.route(model, seats, 0))


def test_the_check_of_conservation_finds_rules_without_a_limit() -> None:
    with pytest.raises((AssertionError, ExceptionGroup)):
        check_conservation(without_limit(_rules()), (Phase.generate,), 1_000)


def test_an_engine_and_a_service_that_cannot_be_are_refused() -> None:
    assert isinstance(_engine("gpu=H100,gpus=2"), Engine)
    assert _engine("gpu=H100,gpus=2").price_micro == 2 * _engine("gpu=H100").price_micro
    assert isinstance(_service("m", {}), Service)
    for wrong in ("speed=3", "prefill=-1", "gpu=H1000", "start=soon"):
        with pytest.raises(InvalidRequest):
            _engine(wrong)
    with pytest.raises(TidemillError):
        _service("m", {"replicas": "9..2"})


# The command


def run(*arguments: str) -> int:
    return call("twin", "--traffic", "synthetic:rate=0.5,span=5m,model=chat-3.1", *arguments)


def test_the_command_compares_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    html, table = tmp_path / "page.html", tmp_path / "table.csv"
    changes = ("service.chat-3.1.replicas=2..4", "engine.start=5s", "load=2")
    what_if = [part for change in changes for part in ("--what-if", change)]
    assert run("--json", "--html", str(html), "--csv", str(table), *what_if) == 0
    told = json.loads(capsys.readouterr().out)
    before, after = (one["services"][0] for one in told["runs"])
    assert (before["service"], before["replicas"], after["replicas"]) == ("chat-3.1", "0..8", "2..4")
    assert before["requests"] == after["requests"] > 50
    assert after["virtual_s"] == pytest.approx(before["virtual_s"] / 2)
    assert after["launches"] == 2
    assert "<svg" in html.read_text()
    assert "what if,chat-3.1,replicas," in table.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--what-if", "service.other.replicas=2"), "There is no service of that name"),
        (("--what-if", "service.chat-3.1.replicas=many"), "is not a number of replicas"),
        (("--what-if", "service.chat-3.1.scaling.tftt=1s"), "There is no field"),
        (("--what-if", "nodes=4"), "is nothing that can be changed of services"),
        (("--what-if", "load=0"), "is not a number above zero"),
        (("--nodes", "4xH100:8"), "cannot go together with --traffic"),
    ],
)
def test_what_cannot_be_done_says_why(arguments: tuple[str, str], told: str) -> None:
    with pytest.raises(InvalidRequest, match=r".") as caught:
        run(*arguments)
    assert told in caught.value.detail
    assert caught.value.field == arguments[0]
    with pytest.raises(InvalidRequest, match="needs --traffic"):
        call("twin", "--synthetic", "jobs=5", "--engine", "gpu=H100")
