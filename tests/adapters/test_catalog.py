"""The catalog knows devices by the names that drivers and people use, and prices and carbon by their sources."""

from __future__ import annotations

import csv
import doctest
import importlib
import statistics
import subprocess
import sys
from decimal import Decimal
from importlib import resources
from typing import Any

import pytest

from tidemill import catalog
from tidemill.core.feasible import model_matches
from tidemill.errors import ErrorKind, InvalidSetting
from tidemill.model.ledger import CPU_METER
from tidemill.model.resources import parse_gpus
from tidemill.units import USD_MICRO

MIB, GIB = 1024**2, 1024**3

DRIVER_NAMES = [
    # what nvmlDeviceGetName says, MiB that nvidia-smi shows, the catalog's model
    ("NVIDIA H100 80GB HBM3", 81_559, "H100-SXM"),
    ("NVIDIA H100 PCIe", 81_559, "H100-PCIe"),
    ("NVIDIA H100 NVL", 95_830, "H100-NVL"),
    ("NVIDIA H200", 143_771, "H200-SXM"),
    ("NVIDIA H200 NVL", 143_771, "H200-NVL"),
    ("NVIDIA GH200 480GB", 97_871, "GH200"),
    ("NVIDIA B200", 183_359, "B200-SXM"),
    ("NVIDIA GB200", 189_471, "GB200-NVL72"),
    ("NVIDIA A100-SXM4-40GB", 40_960, "A100-40GB-SXM"),
    ("A100-SXM4-40GB", 40_536, "A100-40GB-SXM"),
    ("NVIDIA A100-SXM4-80GB", 81_920, "A100-80GB-SXM"),
    ("NVIDIA A100-PCIE-40GB", 40_960, "A100-40GB-PCIe"),
    ("NVIDIA A100 80GB PCIe", 81_920, "A100-80GB-PCIe"),
    ("NVIDIA A10G", 23_028, "A10G"),
    ("NVIDIA A10", 23_028, "A10"),
    ("NVIDIA A40", 46_068, "A40"),
    ("NVIDIA L4", 23_034, "L4"),
    ("NVIDIA L40", 46_068, "L40"),
    ("NVIDIA L40S", 46_068, "L40S"),
    ("Tesla T4", 15_360, "T4"),
    ("Tesla V100-SXM2-16GB", 16_384, "V100-SXM2-16GB"),
    ("Tesla V100-SXM2-32GB", 32_768, "V100-SXM2-32GB"),
    ("Tesla V100-PCIE-16GB", 16_160, "V100-PCIe-16GB"),
    ("NVIDIA RTX A6000", 49_140, "RTX-A6000"),
    ("NVIDIA RTX 6000 Ada Generation", 49_140, "RTX-6000-Ada"),
    ("Quadro RTX 6000", 24_576, "Quadro-RTX-6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_887, "RTX-PRO-6000-Blackwell"),
    ("NVIDIA GeForce RTX 4090", 24_564, "RTX-4090"),
    ("GeForce RTX 3090", 24_268, "RTX-3090"),
    ("NVIDIA GeForce RTX 4080 SUPER", 16_376, "RTX-4080Super"),
    ("NVIDIA GeForce RTX 4060 Ti", 16_380, "RTX-4060Ti"),
]


@pytest.mark.parametrize(("reported", "mib", "model"), DRIVER_NAMES, ids=[name for name, _, _ in DRIVER_NAMES])
def test_a_drivers_name_leads_to_the_model_and_its_nominal_memory(reported: str, mib: int, model: str) -> None:
    spec = catalog.match_device(reported, mib * MIB)
    assert spec is not None
    assert spec.model == model
    nominal = next(each for each in catalog.devices() if each.model == model).memory_bytes
    assert spec.memory_bytes == nominal


@pytest.mark.parametrize(
    "reported",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA TITAN V", "NVIDIA H20", "NVIDIA H100X", "", "NVIDIA", "Tesla"],
)
def test_an_unknown_device_is_not_taken_for_a_known_one(reported: str) -> None:
    assert catalog.match_device(reported, 16 * GIB) is None


def test_a_variant_with_other_memory_keeps_the_model_and_gets_its_own_size() -> None:
    spec = catalog.match_device("NVIDIA GeForce RTX 3080", 12_288 * MIB)
    assert spec is not None
    assert (spec.model, spec.memory_bytes) == ("RTX-3080", 12 * GIB)


@pytest.mark.parametrize(
    ("reported", "model"),
    [
        ("NVIDIA TITAN V", "TITAN-V"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX-4090-Laptop-GPU"),
        ("NVIDIA 9000 series", "GPU-9000-series"),
        ("", "GPU"),
    ],
)
def test_an_unknown_device_is_described_by_its_driver(reported: str, model: str) -> None:
    spec = catalog.derived_device(reported, 12_066 * MIB, power_mw=250_000)
    assert (spec.model, spec.memory_bytes, spec.tdp_mw, spec.bf16_tflops) == (model, 12 * GIB, 250_000, 0)
    assert catalog.rate_card({}).micro_per_hour(spec.model) == 0
    request = parse_gpus(spec.model)
    assert request is not None
    assert request.model == spec.model, "a request can name it"


@pytest.mark.parametrize(
    ("requested", "yes", "no"),
    [
        ("H100", ["H100-SXM", "H100-PCIe", "H100-NVL"], ["GH200", "H200-SXM", "MIG-1g.10gb-H100-SXM"]),
        ("H100-SXM", ["H100-SXM"], ["H100-PCIe", "H100-NVL"]),
        ("h100 sxm", ["H100-SXM"], ["H100-PCIe"]),
        ("a100", ["A100-40GB-SXM", "A100-80GB-SXM", "A100-80GB-PCIe"], ["A10", "A10G", "RTX-A4000"]),
        ("A100-80GB", ["A100-80GB-SXM", "A100-80GB-PCIe"], ["A100-40GB-SXM"]),
        ("rtx4090", ["RTX-4090"], ["RTX-4080", "RTX-5090"]),
        ("RTX 4090", ["RTX-4090"], ["RTX-4080"]),
        ("L4", ["L4"], ["L40", "L40S"]),
        ("L40", ["L40"], ["L4", "L40S"]),
        ("RTX 4060", ["RTX-4060"], ["RTX-4060Ti"]),
        ("MIG-1g.10gb", ["MIG-1g.10gb-H100-SXM", "MIG-1g.10gb-A100-80GB-SXM"], ["H100-SXM", "MIG-1g.20gb-H100-SXM"]),
        ("", [], ["H100-SXM"]),
    ],
)
def test_a_request_names_a_family_or_a_model(requested: str, yes: list[str], no: list[str]) -> None:
    assert [model for model in yes if not catalog.matches_request(model, requested)] == []
    assert [model for model in no if catalog.matches_request(model, requested)] == []
    assert catalog.known_model(requested) is bool(yes)


def test_what_the_catalog_calls_known_the_scheduler_can_place() -> None:
    names = {
        name for spec in catalog.devices() for name in (spec.model, spec.model.lower(), spec.model.replace("-", ""))
    }
    for name in names:
        assert catalog.known_model(name)
        assert any(model_matches(spec.model, name) for spec in catalog.devices()), name


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("H1000", ("H100", "H200")),
        ("H100-SMX", ("H100-SXM", "H200-SXM")),
        ("4090", ("RTX-4090", "RTX-4080")),
        ("A6000", ("RTX-A6000", "RTX-A4000", "RTX-A5000")),
        ("A100-SXM", ("A100-40GB-SXM", "A100-80GB-SXM")),
        ("mi300", ("MI300X",)),
        ("", ()),
        ("a very long name that is none at all", ()),
    ],
)
def test_a_name_that_does_not_exist_leads_to_the_nearest_that_do(wrong: str, near: tuple[str, ...]) -> None:
    assert not catalog.known_model(wrong)
    found = catalog.nearest_names(wrong)
    assert found[: len(near)] == near
    assert bool(found) is bool(near)
    assert all(catalog.known_model(name) for name in found)
    assert len(catalog.nearest_names(wrong, 1)) <= 1


def test_every_device_is_whole_and_every_name_leads_to_one() -> None:
    models = [spec.model for spec in catalog.devices()]
    assert len(set(models)) == len(models) > 60
    for spec in catalog.devices():
        assert spec.memory_bytes > 0, spec
        assert spec.vendor, spec
        assert spec.tdp_mw > 0 or spec.vendor == "Google", spec
        assert spec.idle_mw <= spec.busy_mw
        assert bool(spec.mig_profiles) <= bool(spec.slices), spec
        for name in (spec.model, *spec.aliases):
            assert catalog.match_device(name, spec.memory_bytes) == spec, name
        request = parse_gpus(spec.model)
        assert request is not None
        assert request.model == spec.model


def test_a_slice_is_a_device_of_its_own_with_its_share() -> None:
    whole = catalog.match_device("NVIDIA H100 80GB HBM3", 80 * GIB)
    assert whole is not None
    part = catalog.mig_device(whole, "3g.40gb")
    assert (part.model, part.memory_bytes, part.tdp_mw) == ("MIG-3g.40gb-H100-SXM", 40 * GIB, 300_000)
    card = catalog.rate_card({})
    assert card.micro_per_hour(part.model) == card.micro_per_hour("H100-SXM") * 3 // 7
    with pytest.raises(ValueError, match=r"1g\.10gb"):
        catalog.mig_device(whole, "half")


# ---------------------------------------------------------------------- prices


def test_default_rates_follow_from_the_shipped_rows() -> None:
    """The rule of SOURCES.md, done again in another way, for a model whose offers all name it."""
    with resources.files("tidemill.catalog").joinpath("data/prices.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "H100-SXM" and int(row["year"]) >= 2025]
    by_provider: dict[str, list[Decimal]] = {}
    for row in rows:
        by_provider.setdefault(row["provider"], []).append(Decimal(row["usd_per_gpu_hour"]))
    assert len(by_provider) >= 3
    expected = statistics.median(statistics.median(prices) for prices in by_provider.values())
    rate = next(rate for rate in catalog.default_rates() if rate.resource == "H100-SXM")
    assert rate.micro_per_hour == int(expected * USD_MICRO)
    assert all(provider in rate.source for provider in by_provider)
    assert "2025" in rate.source


def test_every_default_is_the_median_of_shipped_rows() -> None:
    """The same rule over all models that rows name themselves, with nothing of the code that is tested."""
    with resources.files("tidemill.catalog").joinpath("data/prices.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = {rate.resource: rate for rate in catalog.default_rates()}
    named = {row["model"] for row in rows} & {spec.model for spec in catalog.devices()}
    assert len(named) > 20
    for model in named:
        mine = [row for row in rows if row["model"] == model]
        recent = [row for row in mine if int(row["year"]) >= 2025]
        chosen = recent if len({row["provider"] for row in recent}) >= 3 else mine
        medians = [
            statistics.median(Decimal(row["usd_per_gpu_hour"]) for row in chosen if row["provider"] == provider)
            for provider in {row["provider"] for row in chosen}
        ]
        assert abs(rates[model].micro_per_hour - statistics.median(medians) * USD_MICRO) <= 1, model


def test_every_shipped_row_is_whole_and_says_where_it_is_from() -> None:
    folder = resources.files("tidemill.catalog").joinpath("data")
    sources = {"devices.csv": "sources", "prices.csv": "source", "country_carbon_intensity.csv": "year"}
    tables = {}
    for name, column in sources.items():
        with folder.joinpath(name).open(encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file))
        for row in tables[name]:
            assert None not in row, f"{name}: more fields than columns in {row}"
            assert None not in row.values(), f"{name}: fewer fields than columns in {row}"
            assert row[column].strip(), f"{name}: {row}"
    assert all(
        Decimal(row["usd_per_gpu_hour"]) > 0 and 2023 <= int(row["year"]) <= 2027 for row in tables["prices.csv"]
    )
    assert all(0 <= float(row["gco2e_per_kwh"]) < 1_500 for row in tables["country_carbon_intensity.csv"])
    assert len(tables["devices.csv"]) == len(catalog.devices())


def test_default_rates_are_plausible_and_say_where_they_are_from() -> None:
    rates = catalog.default_rates()
    assert len({rate.resource for rate in rates}) == len(rates)
    models = {spec.model for spec in catalog.devices()}
    for rate in rates:
        assert rate.source
        assert rate.resource == CPU_METER or rate.resource.startswith("MIG-") or rate.resource in models
        assert 30_000 <= rate.micro_per_hour <= 10 * USD_MICRO, rate
    assert {"cpu", "H100-SXM", "H100-PCIe", "A100-80GB-SXM", "H200-SXM", "L4", "L40S", "T4", "RTX-4090"} <= {
        rate.resource for rate in rates
    }
    assert next(rate for rate in rates if rate.resource == CPU_METER).micro_per_hour == 44_625


def test_no_row_is_shipped_whose_licence_is_not_named() -> None:
    folder = resources.files("tidemill.catalog").joinpath("data")
    sources = folder.joinpath("SOURCES.md").read_text(encoding="utf-8")
    with folder.joinpath("prices.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for source in {row["source"] for row in rows}:
        assert f"- {source}: " in sources
    shipped = {entry.name for entry in folder.iterdir()} - {"SOURCES.md"}
    assert all(f"## {name}" in sources for name in shipped), shipped


def test_a_cards_id_is_of_its_prices_and_of_nothing_else() -> None:
    default = catalog.rate_card({})
    assert default == catalog.rate_card({})
    changed = catalog.rate_card({"H100-SXM": 2.5, "cpu": "0.01"})
    assert changed.id != default.id
    assert changed.id == catalog.rate_card({"cpu": 0.01, "h100-sxm": "2.50"}).id
    assert (changed.micro_per_hour("H100-SXM"), changed.micro_per_hour("cpu")) == (2_500_000, 10_000)
    assert changed.micro_per_hour("H100-PCIe") == default.micro_per_hour("H100-PCIe")
    assert catalog.rate_card({"H100-SXM": default.micro_per_hour("H100-SXM") / USD_MICRO}).id == default.id


def test_a_family_is_priced_at_once_and_the_longer_name_wins() -> None:
    for order in (["H100", "H100-SXM"], ["H100-SXM", "H100"]):
        card = catalog.rate_card({name: {"H100": 2, "H100-SXM": 7}[name] for name in order})
        assert card.micro_per_hour("H100-SXM") == 7_000_000
        assert card.micro_per_hour("H100-PCIe") == card.micro_per_hour("H100-NVL") == 2_000_000
        assert card.micro_per_hour("MIG-1g.10gb-H100-SXM") == 1_000_000
    card = catalog.rate_card({"H100": 7, "MIG-1g.10gb-H100-SXM": 0.25, "RTX-5090": 0.5})
    assert card.micro_per_hour("MIG-1g.10gb-H100-SXM") == 250_000
    assert card.micro_per_hour("MIG-2g.20gb-H100-SXM") == 2_000_000
    assert card.micro_per_hour("RTX-5090") == 500_000, "a model without a default can be given a rate"


@pytest.mark.parametrize("price", [-1, "-0.01", "free", "", None, True, float("nan"), float("inf"), "1e99", [], "1,5"])
def test_a_price_that_is_none_is_refused(price: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        catalog.rate_card({"H100-SXM": price})
    assert caught.value.field == "rates.H100-SXM"
    assert caught.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize(
    ("name", "near"), [("H1000", "H100"), ("cpus", "cpu"), ("4090", "RTX-4090"), ("?", "H100-SXM")]
)
def test_a_resource_that_does_not_exist_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        catalog.rate_card({name: 1})
    assert caught.value.field == f"rates.{name}"
    assert near in caught.value.mend


# ---------------------------------------------------------------------- carbon and power


@pytest.mark.parametrize(
    ("country", "low", "high"),
    [("DEU", 300, 450), ("deu", 300, 450), ("Germany", 300, 450), ("FRA", 20, 110), ("POL", 500, 800), ("United States", 300, 450)],
)  # fmt: skip
def test_a_country_is_found_by_code_or_name(country: str, low: int, high: int) -> None:
    found = catalog.carbon_intensity(country)
    assert low * 1000 <= found.mg_per_kwh <= high * 1000
    assert str(found.year) in found.source
    assert "Ember" in found.source


@pytest.mark.parametrize("country", ["", "  ", "world"])
def test_without_a_country_it_is_the_worlds_mean_weighted_by_generation(country: str) -> None:
    with (
        resources.files("tidemill.catalog").joinpath("data/country_carbon_intensity.csv").open(encoding="utf-8") as file
    ):
        rows = list(csv.DictReader(file))
    total = sum(float(row["total_twh"]) for row in rows)
    mean = sum(float(row["total_twh"]) * float(row["gco2e_per_kwh"]) for row in rows) / total
    found = catalog.carbon_intensity(country)
    assert abs(found.mg_per_kwh - mean * 1000) < 2
    assert 400_000 < found.mg_per_kwh < 520_000
    assert "world mean" in found.source


@pytest.mark.parametrize(
    ("wrong", "near"), [("Germny", "Germany"), ("DEX", "DEU"), ("Swedn", "Sweden"), ("xxxxxxxxx", "leave it out")]
)
def test_a_country_that_does_not_exist_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        catalog.carbon_intensity(wrong)
    assert caught.value.field == "country"
    assert near in caught.value.mend


@pytest.mark.parametrize(
    ("model", "power"),
    [
        ("Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz", (639, 3_967)),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", (713, 3_685)),
        ("AMD EPYC 7R32", (474, 1_693)),
        ("AMD EPYC 7571", (823, 2_553)),
        ("AMD Ryzen 9 7950X", (740, 3_500)),
        ("", (740, 3_500)),
    ],
)
def test_power_of_a_core_follows_its_architecture_or_is_the_average(model: str, power: tuple[int, int]) -> None:
    assert catalog.cpu_power(model) == power


# ---------------------------------------------------------------------- the package


@pytest.mark.parametrize("module", ["devices", "prices", "carbon"])
def test_examples_in_the_docstrings_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tidemill.catalog.{module}"))
    assert result.failed == 0


def test_importing_the_catalog_reads_no_data() -> None:
    program = (
        "import sys\nopened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import tidemill.catalog\n"
        "print([name for name in opened if 'catalog/data' in name])\n"
        "tidemill.catalog.devices()\n"
        "print(len([name for name in opened if 'catalog/data' in name]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n1\n"
