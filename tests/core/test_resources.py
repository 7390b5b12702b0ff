"""The GPU mini-language and the units, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill import units
from tidemill.core.feasible import model_matches
from tidemill.model.resources import GpuRequest, parse_gpus

GB = 1024**3

READ = [
    ("H100:80GB:8", GpuRequest(model="H100", memory_min_bytes=80 * GB, memory_max_bytes=80 * GB, count=8)),
    ("24GB+:2", GpuRequest(memory_min_bytes=24 * GB, count=2)),
    ("24GB..40GB:2", GpuRequest(memory_min_bytes=24 * GB, memory_max_bytes=40 * GB, count=2)),
    ("24GB..", GpuRequest(memory_min_bytes=24 * GB)),
    ("24GB", GpuRequest(memory_min_bytes=24 * GB)),
    ("A100", GpuRequest(model="A100")),
    ("A100:0.5", GpuRequest(model="A100", milli=500)),
    ("0.5", GpuRequest(milli=500)),
    (".25", GpuRequest(milli=250)),
    (0.5, GpuRequest(milli=500)),
    (4, GpuRequest(count=4)),
    ("RTX 4090:2", GpuRequest(model="RTX 4090", count=2)),
    ("none", None),
    (None, None),
    (0, None),
]


@pytest.mark.parametrize(("text", "meaning"), READ)
def test_a_request_is_read(text: object, meaning: GpuRequest | None) -> None:
    assert parse_gpus(text) == meaning  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["H100:80XB", "H100::8", "8:8", "H100:A100", "-1", "40GB..24GB", "0.0001", "1.5", True, []]
)
def test_a_wrong_request_says_what_is_accepted(text: object) -> None:
    with pytest.raises(ValueError, match=r"write|lies between|too small|smaller size"):
        parse_gpus(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "asked", "answer"),
    [
        ("H100-SXM", "H100", True),
        ("H100-SXM", "h100-sxm", True),
        ("H100-PCIe", "H100-SXM", False),
        ("L40S", "L40", False),
        ("L40", "L4", False),
        ("RTX-4090", "rtx4090", True),
        ("A100-80GB-SXM", "A100", True),
        ("GB200-NVL72", "B200", False),
        ("T4", "", True),
    ],
)
def test_a_model_answers_to_its_name(device: str, asked: str, answer: bool) -> None:
    assert model_matches(device, asked) is answer


@pytest.mark.parametrize(
    ("text", "ns"),
    [("90s", 90 * 10**9), ("1h30m", 5400 * 10**9), ("1.5m", 90 * 10**9), (5, 5 * 10**9), ("250ms", 25 * 10**7)],
)
def test_a_duration_is_read(text: str | int, ns: int) -> None:
    assert units.parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "m", "5 parsecs", "1h-3m", -1, True, "1h30"])
def test_a_wrong_duration_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="duration"):
        units.parse_duration(text)


@given(st.integers(0, 10**6), st.sampled_from(["B", "KB", "MB", "GB", "TB"]))
def test_sizes_survive_being_written(number: int, unit: str) -> None:
    size = units.parse_size(f"{number}{unit}")
    assert size == number * 1024 ** ["B", "KB", "MB", "GB", "TB"].index(unit)
    if number < 1024:
        assert units.parse_size(units.format_size(size)) == size


@given(st.integers(1, 64), st.sampled_from(["", "H100", "A100-SXM"]), st.integers(0, 200))
def test_a_request_survives_being_written(count: int, model: str, memory: int) -> None:
    request = GpuRequest(count=count, model=model, memory_min_bytes=memory * GB)
    assert parse_gpus(str(request)) == request
