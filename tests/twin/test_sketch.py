"""Quantiles of a stream in little memory."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.twin import sketch as module
from tidemill.twin.sketch import Sketch

NUMBERS = st.lists(st.floats(0, 1e9, allow_nan=False).map(lambda value: value if value > 1e-6 else 0.0), min_size=1)


def is_near(numbers: list[float], share: float) -> bool:
    sketch = Sketch()
    for number in numbers:
        sketch.add(number)
    exact = sorted(numbers)[max(math.ceil(share * len(numbers)) - 1, 0)]
    return sketch.quantile(share) == pytest.approx(exact, rel=0.0101) and sketch.mean == pytest.approx(
        sum(numbers) / len(numbers)
    )


@given(NUMBERS, st.floats(0.01, 1))
def test_quantiles_are_within_one_percent(numbers: list[float], share: float) -> None:
    assert is_near(numbers, share)


def test_a_coarser_sketch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GAMMA", 1.05)
    monkeypatch.setattr(module, "_SCALE", 1 / math.log(1.05))
    assert not all(is_near([1.3**step], 0.5) and is_near([1.3**step, 1.3 ** (step + 2)], 0.5) for step in range(40))


def test_its_memory_is_bounded_by_the_range_not_the_count() -> None:
    sketch = Sketch()
    for number in range(1, 50_000):
        sketch.add(number)
    assert len(sketch._counts) < 600
    steps = sketch.steps()
    assert steps[-1][1] == 1.0
    assert all(a[0] <= b[0] and a[1] < b[1] for a, b in itertools.pairwise(steps))


def test_of_nothing() -> None:
    assert (Sketch().mean, Sketch().quantile(0.5), Sketch().steps()) == (0.0, 0.0, [])
