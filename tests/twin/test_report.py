"""How a run is told: figures, tables, CSV, and a page that needs nothing else."""

from __future__ import annotations

import csv
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.twin.small import RATES, conditions, job
from tidemill.twin.cloud import Conditions
from tidemill.twin.fleet import parse_fleet
from tidemill.twin.page import page
from tidemill.twin.report import LINES, figures, rows, write_csv
from tidemill.twin.run import Result, run
from tidemill.twin.synthetic import Synthetic, arrivals


@pytest.fixture(scope="module")
def results() -> list[tuple[str, Result]]:
    def made(nodes: str) -> Result:
        stream = arrivals(Synthetic(jobs=400, load=1.1, tenants=14, sizes="1:70 4:20 8:10"), gpus=32, per_node=8)
        return run(stream, Conditions(nodes=parse_fleet(nodes), rates=RATES))

    return [("as it is", made("4xH100:8")), ("what if <b>", made("6xH100:8"))]


def test_figures_are_plain_and_complete(results: list[tuple[str, Result]]) -> None:
    found = figures(results[0][1])
    assert json.loads(json.dumps(found)) == found
    assert found["fleet"] == "4xH100-SXM:8"
    assert found["jobs"]["submitted"] == 400
    assert 0 < found["utilization"] <= found["utilization_while_work_arrives"] <= 1
    assert found["cost_micro"] == sum(who["cost_micro"] for who in found["tenants"].values())
    assert sum(who["share"] for who in found["tenants"].values()) == pytest.approx(1, abs=0.01)
    assert found["energy_mj"] > found["idle_energy_mj"] > 0
    spread = found["wait_s"]
    assert spread["p50"] <= spread["p95"] <= spread["p99"] <= spread["max"] * 1.01


def test_rows_compare_the_last_run_with_the_first(results: list[tuple[str, Result]]) -> None:
    found = {name: (values, difference, verdict) for name, values, difference, verdict in rows([figures(r) for _, r in results])}  # fmt: skip
    values, difference, verdict = found["wait, mean"]
    assert len(values) == 2
    assert difference.startswith("-")
    assert verdict == 1
    assert found["GPUs in use"][2] == -1
    assert found["jobs"][1:] == ("", 0)
    assert len(rows([figures(results[0][1])])) >= len(LINES) - 2


def test_csv_has_series_and_tenants(results: list[tuple[str, Result]], tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    write_csv(path, results)
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert {row["run"] for row in table} == {"as it is", "what if <b>"}
    assert {row["kind"] for row in table} == {"series", "tenant_gpus", "tenant"}
    mine = [row for row in table if row["run"] == "as it is"]
    held = [row for row in mine if row["name"] == "held" and row["kind"] == "series"]
    assert all(float(a["to_s"]) == float(b["from_s"]) for a, b in itertools.pairwise(held))
    by_tenant = sum(float(row["value"]) for row in mine if row["kind"] == "tenant_gpus")
    assert by_tenant == pytest.approx(sum(float(row["value"]) for row in held), rel=1e-4)


class _Reader(HTMLParser):
    """Notes what a page asks from elsewhere, and whether what it opens it closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asks: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asks += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "line", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        del attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(results: list[tuple[str, Result]]) -> None:
    text = page(results, title="A & B")
    reader = _Reader()
    reader.feed(text)
    assert not reader.open
    assert not reader.asks
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert "http" not in text
    assert "<b>" not in text
    assert "A &amp; B" in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 6, "in use, waiting, waits, fragments, and the tenants of each run"
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        for path in root.iter("path"):
            numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.attrib["d"])]
            assert numbers
            assert all(0 <= x <= 760 for x in numbers[::2])
            assert all(0 <= y <= 250 for y in numbers[1::2])


def test_runs_of_nothing_and_of_moments_can_be_drawn() -> None:
    for items in ([], [job(0, 0.001)], [job(0, 1, 0)]):
        text = page([("run", run(iter(items), conditions()))], title="t")
        assert "nan" not in text.lower().replace("tenan", "")
