"""Makes ``turns.jsonl.gz``, the recording that ``test_recording`` replays: python -m tests.twin.make_recording

To be made anew when decisions are meant to change; the change of its figures belongs into the commit's message.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.twin.small import away, conditions, stop
from tidemill.control.recording import Recording
from tidemill.model.events import NodeJoined
from tidemill.model.values import replace
from tidemill.twin.arrivals import Arrival, Outside
from tidemill.twin.cloud import Conditions, beginning_of
from tidemill.twin.recording import RecordingFile
from tidemill.twin.run import Result, run
from tidemill.twin.synthetic import arrivals, parse_synthetic
from tidemill.units import SECOND_NS

RECORDED = Path(__file__).with_name("turns.jsonl.gz")
MIX = "jobs=220,seed=7,load=1.5,median=20m,sigma=1.2,longest=6h,sizes=0.5:15 1:40 2:15 4:15 8:8 12:7,tenants=3,cpu_only=0.1"


def setting() -> Conditions:
    return conditions("3xH100:8,1xL4:4,1xcpu:64", start_delay_ns=15 * SECOND_NS)


def happenings() -> Iterator[Arrival | Outside]:
    """A mix on a small fleet; two users change their mind, a machine is lost and comes back."""
    mine = setting()
    lost = mine.nodes[1]
    items: list[Arrival | Outside] = [
        replace(item, name=f"wl_{number:04d}") if isinstance(item, Arrival) else item
        for number, item in enumerate(arrivals(parse_synthetic(MIX), gpus=28, per_node=8))
    ]
    third, half = items[70].at_ns / SECOND_NS, items[110].at_ns / SECOND_NS
    items += [
        stop(third, "wl_0069"),
        stop(third + 60, "wl_0070"),
        away(half, lost.id),
        Outside(round((half + 900) * SECOND_NS), NodeJoined(at_ns=0, node=replace(lost, boot_id="again"))),
    ]
    yield from sorted(items, key=lambda item: item.at_ns)


def record(path: Path) -> Result:
    """Run it and keep its turns."""
    made = beginning_of(setting())
    with RecordingFile(path) as file:
        recording = Recording(file.write)
        recording.begin(
            made.snapshot, sites=made.sites, projects=made.projects, rates=made.rates, policy=made.policy, now=made.now
        )
        return run(happenings(), setting(), watch=recording.turn)


if __name__ == "__main__":
    RECORDED.unlink(missing_ok=True)
    result = record(RECORDED)
    print(f"{RECORDED}: {result.measures.turns} turns, {dict(result.measures.states)}, {RECORDED.stat().st_size} bytes")
