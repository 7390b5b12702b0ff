"""The simulation as part of the tests: some histories by Hypothesis, seeds that failed before, and every planted bug."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.core.history import node
from tests.faults.simulation.__main__ import main
from tests.faults.simulation.cloud import Op, SmallCloud, played
from tests.faults.simulation.disks import SqliteDisk
from tests.faults.simulation.history import histories, history, told
from tests.faults.simulation.machines import Journal, Machine, MachineEngine
from tests.faults.simulation.planted import PLANTED, SEEDS, Plant, found
from tidemill.model.events import Exited, Prepared, Started
from tidemill.model.ids import NodeId
from tidemill.model.values import replace
from tidemill.ports import Engine, JobFilter
from tidemill.testing import engine as contract
from tidemill.testing.engine import EngineBench
from tidemill.testing.peer import RecordingControlPlane
from tidemill.units import SECOND_NS

FAILED_ONCE = (2797, 2902)
"""Seeds that showed a bug, of the code or of the simulation, with the version of then."""

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(name="quiet")
def _quiet() -> Iterator[None]:
    """What goes wrong here is meant to; its tracebacks are not for reading."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("flavour", ["faults", "clocks", "backups", "leaders"])
def test_whatever_happens_the_promises_are_kept(flavour: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(histories(flavour))
    def keeps_them(ops: list[Op]) -> None:
        played(ops)

    keeps_them()


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_what_failed_once_does_not_fail_again(seed: int) -> None:
    played(history(seed))


def test_one_seed_is_one_history() -> None:
    first, again = told(history(7)), told(history(7))
    assert first == again
    assert first.endswith("nothing is broken")


def test_histories_go_the_same_way_in_a_database(tmp_path: Path) -> None:
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        disk = SqliteDisk(folder)
        ends = _ends(played(history(seed), disk))
        disk.close()
        assert ends == _ends(played(history(seed)))


def _ends(cloud: SmallCloud) -> list[tuple[str, str, str]]:
    rows = cloud.disk.look.find_jobs(JobFilter(), limit=1_000).items
    return sorted((row.job.id, row.job.state.value, row.job.cause.value) for row in rows)


def test_the_command_says_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '{"passed": 2, "failed": 0, "seeds": 2}'


# -- planted bugs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", [plant for _, plant in PLANTED], ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    assert found(plant) is not None


def test_every_invariant_has_a_planted_bug() -> None:
    assert {invariant for invariant, _ in PLANTED} == {f"I{number}" for number in range(1, 9)}
    assert SEEDS.keys() == {plant.__name__ for _, plant in PLANTED}


# -- the machines keep the contract of engines --------------------------------------------------------------------------

OF_PROCESSES = {
    "check_launch_runs_once_and_reports_in_order",
    "check_stop_gives_the_grace",
    "check_kill_reaches_everything",
    "check_a_worker_outlives_the_control_plane",
}
"""Checks of the shared contract that are about real scripts."""


class _Peer(RecordingControlPlane):
    """Whoever answers the runners of one machine at once, as a control plane would that is always there."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        super().__init__(folder / "endpoint.json")
        self.endpoint_file.write_text('{"api_url": "http://127.0.0.1:1"}')
        self._machine = machine

    def wait_for_event(self, launch_id: str, kind: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
        del timeout_s
        for _ in range(1_000):
            self.hear()
            if event := self.record(launch_id).event(kind) or {}:
                return event
        raise AssertionError(f"no {kind} of {launch_id}")

    def hear(self) -> None:
        """Take what there is to tell."""
        self._machine.advance()
        for runner in list(self._machine.runners()):
            for fact in list(runner.outbox):
                assert isinstance(fact, Prepared | Started | Exited)
                exit_code = fact.exit_code if isinstance(fact, Exited) else None
                event = {"type": type(fact).__name__.lower(), "exit_code": exit_code}
                self.record(fact.launch_id).events.append(event)
            self._machine.answered(runner, sent_ns=0, told=len(runner.outbox), stop=False, grace_ns=0)


class _Bench(EngineBench):
    """The bench of the contract, where the truth about starts is the journal."""

    journal: Journal

    def starts(self, spec: Any) -> int:
        assert isinstance(self.control, _Peer)
        self.control.hear()
        return self.journal.starts[spec.launch_id]

    def spec(self, run: str, **changes: Any) -> Any:
        return super().spec("ok 3600 0" if "sleep 600" in run else "ok 1 0", **changes)


@pytest.mark.parametrize(
    "check", [one for one in contract.CHECKS if one.__name__ not in OF_PROCESSES], ids=lambda check: check.__name__
)
def test_machines_keep_the_contract(check: Callable[[EngineBench], None], tmp_path: Path) -> None:
    ticks, journal = count(1), Journal()
    machine = Machine(replace(node(0, 2), id=NodeId("node_test")), journal, lambda: next(ticks) * SECOND_NS // 20)
    peer = _Peer(tmp_path, machine)

    class Heard(MachineEngine):
        """Whoever looks lets the peer hear first, so that what is waited for comes."""

        def observe(self) -> Any:
            peer.hear()
            return super().observe()

    def make() -> Engine:
        return Heard([machine])

    bench = _Bench(make=make, control=peer, output=lambda _: tmp_path)
    bench.journal = journal
    check(bench)
