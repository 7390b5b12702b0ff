"""What work holds on a machine that is not ours is not free, and why says so."""

from __future__ import annotations

from dataclasses import replace

from tests.core.yard import Yard, gpu_node, spec
from tidemill.core.admission import why_never, why_not_now
from tidemill.core.place import gang_of
from tidemill.model.events import NodeJoined
from tidemill.model.fleet import Node


def seen(yard: Yard, node: Node, gpus: int) -> None:
    """The machine is looked at again: others hold so many of its GPUs."""
    yard.turn([NodeJoined(at_ns=yard.now, node=replace(node, others_gpus=gpus))])


def test_a_machine_full_of_others_work_is_not_chosen_and_is_again_when_they_end() -> None:
    node = gpu_node("a", 4)
    yard = Yard((node,))
    seen(yard, node, 3)
    first, second = yard.submit(spec(1)), yard.submit(spec(2))
    held = {worker.job_id for worker in yard.world.allocations.values()}
    assert held == {first}
    reason = why_not_now(yard.world.fleet, gang_of(spec(2)))
    assert reason.sentence == "2 GPUs needed, 0 GPUs free now; work of others that is not this cloud's holds 3 GPUs."
    assert why_never(yard.world.fleet, spec(4)) is None, "others end: it is not refused for ever"
    seen(yard, node, 0)
    assert {worker.job_id for worker in yard.world.allocations.values()} == {first, second}


def test_what_others_hold_never_takes_from_what_ours_hold() -> None:
    node = gpu_node("a", 2)
    yard = Yard((node,))
    yard.submit(spec(2))
    seen(yard, node, 2)
    assert yard.world.fleet.gpu_free.min() == 0
    assert yard.world.fleet.others_gpus.tolist() == [0]
