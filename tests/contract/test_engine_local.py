"""The local engine keeps the contract of engines, with and without a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapters.local_bench import local_bench
from tidemill.testing.engine import CHECKS, EngineBench


@pytest.fixture(params=["auto", "none"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path, sandbox=request.param) as made:
        yield made


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[EngineBench], None], bench: EngineBench) -> None:
    check(bench)
