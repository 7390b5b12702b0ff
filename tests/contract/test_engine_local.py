"""The local engine keeps the contract of engines, with and without a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapters.local_bench import a_node, local_bench
from tests.contract.test_engine_simulated import launch_spec
from tidemill.engines.local import LocalEngine
from tidemill.errors import EngineRefused
from tidemill.model.fleet import Device, Mig
from tidemill.model.ids import DeviceId
from tidemill.model.values import replace
from tidemill.testing.engine import CHECKS, EngineBench


@pytest.fixture(params=["auto", "none"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineBench]:
    with local_bench(tmp_path, sandbox=request.param) as made:
        yield made


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[EngineBench], None], bench: EngineBench) -> None:
    check(bench)


def _gpu(name: str, mig: Mig, *slices: tuple[str, int, str]) -> Device:
    return Device(
        id=DeviceId(name), index=0, model="H100-SXM", reported="", memory_bytes=80 << 30, idle_mw=0, busy_mw=0, mig=mig,
        slices=slices,
    )  # fmt: skip


def test_workers_see_slices_by_their_drivers_names_and_need_the_files_of_their_gpus(tmp_path: Path) -> None:
    made: list[tuple[str, str, int]] = []

    def make(gpu: str, profile: str, start: int) -> str:
        made.append((gpu, profile, start))
        return f"MIG-made-{start}"

    devices = (
        _gpu("GPU-whole", Mig.OFF),
        _gpu("GPU-fixed", Mig.FIXED, ("1g.10gb", 0, "MIG-a"), ("3g.40gb", 4, "MIG-b")),
        _gpu("GPU-cut", Mig.DYNAMIC),
    )
    engine = LocalEngine(
        tmp_path / "local", endpoint_file=tmp_path / "endpoint.json", make_slice=make,
        node=lambda: replace(a_node(), devices=devices),
    )  # fmt: skip
    try:
        wanted = (
            ("GPU-whole", 500),
            ("GPU-fixed/3g.40gb@4", 500),
            ("GPU-cut/1g.10gb@3", 125),
            ("GPU-cut/1g.10gb@5", 125),
        )
        visible, gpus = engine._visible(launch_spec(devices=wanted))
        assert visible == (("GPU-whole", 500), ("MIG-b", 500), ("MIG-made-3", 125), ("MIG-made-5", 125))
        assert gpus == ["GPU-whole", "GPU-fixed", "GPU-cut"]
        assert made == [("GPU-cut", "1g.10gb", 3), ("GPU-cut", "1g.10gb", 5)]
        for wrong in ("GPU-fixed/3g.40gb@0", "GPU-whole/1g.10gb@0", "GPU-none/1g.10gb@0"):
            with pytest.raises(EngineRefused, match="has no slice"):
                engine.launch(launch_spec(devices=((wrong, 125),)))
        assert engine.observe().launches == ()
    finally:
        engine.close()
