"""The contract that every engine keeps, as checks that anybody can run against theirs: ``check_engine``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Final

from tidemill.errors import Conflict
from tidemill.model.ids import JobId, LaunchId, NodeId, ProjectId
from tidemill.model.plan import LaunchSpec, Observation, ObservedState
from tidemill.ports import Engine
from tidemill.testing.peer import RecordingControlPlane
from tidemill.units import SECOND_NS

BEGIN: Final = "echo start >> $TIDEMILL_OUTPUT_DIR/starts; sync $TIDEMILL_OUTPUT_DIR/starts; echo started-here; "
"""How a worker's script begins that writes down, durably, that it began."""


@dataclass(slots=True)
class EngineBench:
    """What the checks work with.

    ``make`` gives a new engine object over the same machines, as a restarted control plane would have;
    ``control`` is the peer of its runners. ``output`` tells where the files are, as the checks see them, that a
    worker writes into ``$TIDEMILL_OUTPUT_DIR``.
    """

    make: Callable[[], Engine]
    control: RecordingControlPlane
    output: Callable[[LaunchSpec], Path]
    node_id: NodeId = NodeId("node_test")
    _numbers: Any = field(default_factory=count)

    def spec(self, run: str, **changes: Any) -> LaunchSpec:
        """A launch of a new id that runs that script."""
        number = next(self._numbers)
        base = LaunchSpec(
            launch_id=LaunchId(f"run_test{number}-0-1-0"), job_id=JobId(f"job_test{number}-0"),
            project_id=ProjectId("project_test"), node_id=self.node_id, fence=1, rank=0, world_size=1, setup="",
            run=run, environment=None, image="", environment_variables=(), secrets=(), workdir="", inputs=(),
            devices=(), cpu_milli=1_000, memory_bytes=0, disk_bytes=0, ports=(), service=None, rendezvous_port=0,
            max_duration_ns=0, grace_ns=SECOND_NS, api_url=self.control.url, runner_token=f"tm_run_{number}",
            job_token=f"tm_job_{number}",
        )  # fmt: skip
        return replace(base, **changes)

    def starts(self, spec: LaunchSpec) -> int:
        """How many times the worker of that launch began, from the journal that ``BEGIN`` writes."""
        journal = self.output(spec) / "starts"
        return journal.read_text().count("start\n") if journal.exists() else 0


def eventually(ready: Callable[[], bool], *, timeout_s: float = 15.0, what: str = "") -> None:
    """Wait until it is true. Raises: AssertionError when it is not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s} s: {what or ready}")
        time.sleep(0.01)


def observed(engine: Engine, launch_id: str) -> Observation | None:
    """What the engine's own list says of a launch, None when it is not in it."""
    return next((seen for seen in engine.observe().launches if seen.launch_id == launch_id), None)


def state(engine: Engine, launch_id: str) -> ObservedState | None:
    """The observed state of a launch, None when it is not in the engine's list."""
    found = observed(engine, launch_id)
    return found.state if found else None


_OVER = (ObservedState.EXITED, ObservedState.GONE)
_HOLD = BEGIN + "sleep 600 & wait"


def check_launch_runs_once_and_reports_in_order(bench: EngineBench) -> None:
    """A launch runs its worker once; all its output arrives before its exit."""
    engine = bench.make()
    spec = bench.spec(BEGIN + "echo to-stderr >&2; exit 7")
    engine.launch(spec)
    exited = bench.control.wait_for_event(spec.launch_id, "exited")
    record = bench.control.record(spec.launch_id)
    _expect(exited["exit_code"] == 7, str(exited))
    _expect(bytes(record.log) == b"started-here\nto-stderr\n", str(bytes(record.log)))
    _expect(record.arrivals.index("log complete") < record.arrivals.index("exited"), str(record.arrivals))
    _expect(record.kinds() == ["prepared", "started", "exited"], str(record.kinds()))
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, what="it is observed as exited")
    seen = observed(engine, spec.launch_id)
    _expect(seen is not None and seen.exit_code == 7, "its exit status is observed")
    engine.close()


def check_duplicate_launch_starts_nothing(bench: EngineBench) -> None:
    """The same launch again, while it runs, starts nothing."""
    engine = bench.make()
    spec = bench.spec(_HOLD)
    for _ in range(3):
        engine.launch(spec)
    eventually(lambda: bench.starts(spec) > 0)
    engine.launch(spec)
    _stop_and_wait(engine, bench, spec)
    _expect(bench.starts(spec) == 1, str(bench.starts(spec)))
    engine.close()


def check_launch_after_exit_starts_nothing(bench: EngineBench) -> None:
    """The same launch again, after it ended, starts nothing, from a new engine object too."""
    engine = bench.make()
    spec = bench.spec(BEGIN)
    engine.launch(spec)
    bench.control.wait_for_event(spec.launch_id, "exited")
    eventually(lambda: state(engine, spec.launch_id) in _OVER, what="it is over")
    engine.launch(spec)
    engine.close()
    again = bench.make()
    again.launch(spec)
    _expect(state(again, spec.launch_id) in _OVER, "state(again, spec.launch_id) in _OVER")
    _expect(bench.starts(spec) == 1, "bench.starts(spec) == 1")
    again.close()


def check_stop_before_launch_is_remembered(bench: EngineBench) -> None:
    """A launch that arrives after the stop of its id is not started, and is seen as gone."""
    engine = bench.make()
    spec = bench.spec(BEGIN)
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=0)
    engine.close()
    again = bench.make()
    again.launch(spec)
    eventually(lambda: state(again, spec.launch_id) in _OVER, what="it is over")
    _expect(bench.starts(spec) == 0, "bench.starts(spec) == 0")
    again.close()


def check_a_restarted_control_plane_finds_what_runs(bench: EngineBench) -> None:
    """A new engine object sees a running launch, does not start it again, and can stop it."""
    engine = bench.make()
    spec = bench.spec(_HOLD)
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) > 0)
    engine.close()
    again = bench.make()
    _expect(state(again, spec.launch_id) is ObservedState.ALIVE, "state(again, spec.launch_id) is ObservedState.ALIVE")
    again.launch(spec)
    _stop_and_wait(again, bench, spec)
    _expect(bench.starts(spec) == 1, "bench.starts(spec) == 1")
    again.close()


def check_stop_is_harmless_twice_and_when_unknown(bench: EngineBench) -> None:
    """Stopping twice, after the end, or what never was raises nothing."""
    engine = bench.make()
    spec = bench.spec(_HOLD)
    engine.stop(LaunchId("run_never-0-1-0"), node_id=bench.node_id, grace_ns=0)
    engine.launch(spec)
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=SECOND_NS)
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=SECOND_NS)
    eventually(lambda: state(engine, spec.launch_id) in _OVER, what="it is over")
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=0)
    engine.forget(LaunchId("run_never-0-1-0"), node_id=bench.node_id)
    engine.close()


def check_stop_gives_the_grace(bench: EngineBench) -> None:
    """A worker gets SIGTERM, and its program's own time to save its work."""
    engine = bench.make()
    program = (
        "import signal,sys,time\n"
        "def save(*_):\n    time.sleep(0.5); print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('armed', flush=True)\nwhile True: time.sleep(0.1)\n"
    )
    spec = bench.spec(f'{BEGIN}python3 -c "{program}"\necho not reached')
    engine.launch(spec)
    bench.control.wait_for(lambda: b"armed" in bench.control.record(spec.launch_id).log)
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=10 * SECOND_NS)
    exited = bench.control.wait_for_event(spec.launch_id, "exited")
    log = bytes(bench.control.record(spec.launch_id).log)
    _expect(b"saved\n" in log, str(log))
    _expect(b"not reached" not in log, str(log))
    _expect(exited["exit_code"] == 143, str(exited))
    engine.close()


def check_kill_reaches_everything(bench: EngineBench) -> None:
    """After the grace nothing is left: not what ignores SIGTERM, not what left its session, not their children."""
    engine = bench.make()
    spec = bench.spec(
        f"{BEGIN}\ntrap '' TERM\n"
        "JOURNAL=$TIDEMILL_OUTPUT_DIR/journal\n"
        "export JOURNAL; setsid sh -c 'trap \"\" TERM; while :; do sleep 0.05; echo x >> $JOURNAL; done' &\n"
        "(setsid sh -c '(trap \"\" TERM HUP; while :; do sleep 0.05; echo y >> $JOURNAL; done) &' &)\n"
        "while :; do sleep 1; done\n"
    )
    journal = bench.output(spec) / "journal"
    engine.launch(spec)
    eventually(lambda: journal.exists() and {"x", "y"} <= set(journal.read_text()), what="both children write")
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=SECOND_NS // 5)
    eventually(lambda: state(engine, spec.launch_id) in _OVER, what="it is over")
    size = journal.stat().st_size
    time.sleep(0.3)
    _expect(journal.stat().st_size == size, "something still writes")
    engine.close()


def check_forget_refuses_what_lives(bench: EngineBench) -> None:
    """Forgetting is refused while something lives, drops the rest, and is harmless twice."""
    engine = bench.make()
    spec = bench.spec(_HOLD)
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) > 0)
    try:
        engine.forget(spec.launch_id, node_id=bench.node_id)
    except Conflict:
        pass
    else:
        raise AssertionError("a running launch was forgotten")
    _stop_and_wait(engine, bench, spec)
    engine.forget(spec.launch_id, node_id=bench.node_id)
    engine.forget(spec.launch_id, node_id=bench.node_id)
    _expect(observed(engine, spec.launch_id) is None, "observed(engine, spec.launch_id) is None")
    engine.close()


def check_a_look_says_which_nodes_it_is_about(bench: EngineBench) -> None:
    """What is seen is about the engine's own nodes, all of them while all can be reached."""
    engine = bench.make()
    nodes = {node.id for node in engine.nodes()}
    _expect(engine.observe().nodes == nodes, f"a look at {sorted(engine.observe().nodes)}, nodes are {sorted(nodes)}")
    engine.close()


def check_a_worker_outlives_the_control_plane(bench: EngineBench) -> None:
    """With nobody to report to a worker runs on and ends; everything is told later, once and in order."""
    engine = bench.make()
    spec = bench.spec(BEGIN + "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.1; done")
    engine.launch(spec)
    eventually(lambda: bench.starts(spec) > 0)
    bench.control.stop()
    engine.close()
    time.sleep(1.0)
    bench.control.start()
    bench.control.wait_for_event(spec.launch_id, "exited")
    record = bench.control.record(spec.launch_id)
    _expect(bytes(record.log).split(b"\n")[1:-1] == [b"line %d" % i for i in range(1, 7)], str(bytes(record.log)))
    _expect(record.kinds() == ["prepared", "started", "exited"], 'record.kinds() == ["prepared", "started", "exited"]')


CHECKS: tuple[Callable[[EngineBench], None], ...] = (
    check_launch_runs_once_and_reports_in_order,
    check_duplicate_launch_starts_nothing,
    check_launch_after_exit_starts_nothing,
    check_stop_before_launch_is_remembered,
    check_a_restarted_control_plane_finds_what_runs,
    check_stop_is_harmless_twice_and_when_unknown,
    check_stop_gives_the_grace,
    check_kill_reaches_everything,
    check_forget_refuses_what_lives,
    check_a_look_says_which_nodes_it_is_about,
    check_a_worker_outlives_the_control_plane,
)


def check_engine(bench: EngineBench) -> None:
    """Run every check of the contract. Raises: AssertionError that says what was not kept."""
    for check in CHECKS:
        check(bench)


def _stop_and_wait(engine: Engine, bench: EngineBench, spec: LaunchSpec) -> None:
    engine.stop(spec.launch_id, node_id=bench.node_id, grace_ns=SECOND_NS)
    bench.control.wait_for_event(spec.launch_id, "exited")
    eventually(lambda: state(engine, spec.launch_id) in _OVER, what="it is over")


def _expect(kept: bool, what: str) -> None:
    """Raises: AssertionError when a promise was not kept; also where Python leaves out assert statements."""
    if not kept:
        raise AssertionError(what)
