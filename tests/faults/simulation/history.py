"""Histories: what is done in which order, made of a seed or by Hypothesis; and the shortest of those that break a thing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st

from tests.faults.simulation.auditor import Broken
from tests.faults.simulation.cloud import Op, begun, played
from tests.faults.simulation.disks import Disk, MemoryDisk

_USUAL: Final = (
    ["submit"] * 7 + ["again", "stop", "stop", "mark"] + ["hurry"] * 4 + ["live"] * 7 + ["long"]
    + ["turn"] * 5 + ["work"] * 5 + ["report"] * 4 + ["look"] * 4 + ["tick"] * 4
)  # fmt: skip
"""What happens anyway, in large steps and in small ones."""
_FAULTS: Final = (
    ["crash"] + ["kill"] * 3 + ["store"] * 3 + ["engine"] * 2 + ["wire"] * 3 + ["cut", "silence", "heal", "heal", "hold"]
    + ["lose_worker", "lose_node", "return_node", "return_node", "reboot", "restart_outpost", "nodes"]
)  # fmt: skip
FLAVOURS: Final[dict[str, list[str]]] = {
    "faults": [*_USUAL, *_FAULTS],
    "clocks": [*_USUAL, *_FAULTS, "wall", "wall", "machine_wall"],
    "backups": [*_USUAL, *_FAULTS, "backup", "backup", "restore", "restore", "end_stranger"],
    "leaders": [
        *_USUAL,
        *_FAULTS,
        "pause",
        "pause",
        "resume",
        "resume",
        "dial_old",
        "step_old",
        "step_old",
        "step_old",
    ],
}
"""What histories are made of. A seed has one of them, by its remainder."""


def history(seed: int) -> list[Op]:
    """The history of a seed: the same each time, with this version."""
    dice = random.Random(seed)
    names = list(FLAVOURS.values())[(0, 0, 0, 1, 2, 3)[seed % 6]]
    length = dice.randrange(30, 110)
    return [(dice.choice(names), dice.randrange(32), dice.randrange(32)) for _ in range(length)]


def histories(flavour: str, *, longest: int = 60) -> st.SearchStrategy[list[Op]]:
    """Histories by Hypothesis, which makes short ones of those that break a thing."""
    names = st.sampled_from(FLAVOURS[flavour])
    return st.lists(st.tuples(names, st.integers(0, 31), st.integers(0, 31)), min_size=1, max_size=longest)


def broken_by(ops: list[Op], disk: Callable[[], Disk] = MemoryDisk) -> Broken | None:
    """What a history breaks; None when it breaks nothing."""
    own = disk()
    try:
        played(ops, own)
    except Broken as broken:
        return broken
    finally:
        own.close()
    return None


def shortened(ops: list[Op], disk: Callable[[], Disk] = MemoryDisk, *, tries: int = 2_000) -> list[Op]:
    """A part of the history that breaks the same invariant, and of which no step can be left out."""
    first = broken_by(ops, disk)
    wanted = first.invariant if first is not None else ""
    size = max(len(ops) // 2, 1)
    while tries > 0:
        at, is_shorter = 0, False
        while at < len(ops) and tries > 0:
            tries -= 1
            rest = ops[:at] + ops[at + size :]
            found = broken_by(rest, disk)
            if found is not None and found.invariant == wanted:
                ops, is_shorter = rest, True
            else:
                at += size
        if size == 1 and not is_shorter:
            break
        size = max(size // 2, 1)
    return ops


def told(ops: list[Op], disk: Callable[[], Disk] = MemoryDisk) -> str:
    """The history as it went: what was done, what the journal and the event log have, and what is broken."""
    own = disk()
    cloud = begun(ops, own)
    end = "nothing is broken"
    try:
        cloud.play(ops)
        cloud.settle()
        cloud.auditor.audit()
    except Broken as broken:
        end = str(broken)
    finally:
        lines = cloud.told_story()
        own.close()
    return "\n".join([*lines, end])
