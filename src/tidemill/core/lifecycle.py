"""★ The lives of a job, an attempt, an allocation, a node, a rental and a rollout, as literal tables.

Theory. A *job* wants to end well; it is queued, has attempts, and ends in one of three ways. An *attempt* is one
try: it ends only when every worker is confirmed gone, so between the decision to end it (``ENDING``) and its end
its devices are still taken and nothing else may start in its place. An *allocation* is the lease of one worker's
share of a node. It goes forward only: late or repeated reports of a worker that is being drained change nothing.
A *node* that falls silent may still run what it has; it is lost only
when that can be known to be over. One that is lost or silent comes back by joining: ready, under the cordon or
drain that still stands, or as a suspect when it was lost too often. A *rental* is written down before the cloud is
asked for the instance, and is over only when the cloud confirms that there is none. A *rollout* ends with one of its
two revisions running alone: the new one, or, from wherever it was reversed, the old one.

States say where a thing is; why it is there is its ``cause``, stored beside the state. ``apply`` is the only way
from one state to the next. An event that has no row here is a mistake of the caller and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from tidemill.errors import IllegalTransition
from tidemill.model.cloud import RentalState
from tidemill.model.fleet import NodeState
from tidemill.model.job import AllocationState, AttemptState, JobState
from tidemill.model.rollout import RolloutState

State = TypeVar("State", bound=StrEnum)
Table = Mapping[tuple[State, str], State]

JOB: Final[Table[JobState]] = {
    (JobState.QUEUED, "placed"): JobState.STARTING,
    (JobState.QUEUED, "cancelled"): JobState.CANCELLED,
    (JobState.STARTING, "started"): JobState.RUNNING,
    (JobState.STARTING, "stop_requested"): JobState.STOPPING,
    (JobState.STARTING, "requeued"): JobState.QUEUED,
    (JobState.STARTING, "succeeded"): JobState.SUCCEEDED,
    (JobState.STARTING, "failed"): JobState.FAILED,
    (JobState.RUNNING, "stop_requested"): JobState.STOPPING,
    (JobState.RUNNING, "requeued"): JobState.QUEUED,
    (JobState.RUNNING, "succeeded"): JobState.SUCCEEDED,
    (JobState.RUNNING, "failed"): JobState.FAILED,
    (JobState.STOPPING, "cancelled"): JobState.CANCELLED,
}

ATTEMPT: Final[Table[AttemptState]] = {
    (AttemptState.STARTING, "started"): AttemptState.RUNNING,
    (AttemptState.STARTING, "ending"): AttemptState.ENDING,
    (AttemptState.RUNNING, "ending"): AttemptState.ENDING,
    (AttemptState.ENDING, "ended"): AttemptState.ENDED,
}

ALLOCATION: Final[Table[AllocationState]] = {
    (AllocationState.RESERVED, "prepared"): AllocationState.PREPARING,
    (AllocationState.RESERVED, "started"): AllocationState.ACTIVE,
    (AllocationState.RESERVED, "drained"): AllocationState.DRAINING,
    (AllocationState.RESERVED, "released"): AllocationState.RELEASED,
    (AllocationState.PREPARING, "started"): AllocationState.ACTIVE,
    (AllocationState.PREPARING, "drained"): AllocationState.DRAINING,
    (AllocationState.PREPARING, "released"): AllocationState.RELEASED,
    (AllocationState.ACTIVE, "drained"): AllocationState.DRAINING,
    (AllocationState.ACTIVE, "released"): AllocationState.RELEASED,
    (AllocationState.DRAINING, "released"): AllocationState.RELEASED,
}

NODE: Final[Table[NodeState]] = {
    (NodeState.READY, "joined"): NodeState.READY,
    (NodeState.READY, "cordoned"): NodeState.CORDONED,
    (NodeState.READY, "drained"): NodeState.DRAINING,
    (NodeState.READY, "lost"): NodeState.LOST,
    (NodeState.CORDONED, "joined"): NodeState.CORDONED,
    (NodeState.CORDONED, "drained"): NodeState.DRAINING,
    (NodeState.CORDONED, "resumed"): NodeState.READY,
    (NodeState.CORDONED, "lost"): NodeState.LOST,
    (NodeState.DRAINING, "joined"): NodeState.DRAINING,
    (NodeState.DRAINING, "cordoned"): NodeState.CORDONED,
    (NodeState.DRAINING, "resumed"): NodeState.READY,
    (NodeState.DRAINING, "lost"): NodeState.LOST,
    (NodeState.SUSPECT, "joined"): NodeState.SUSPECT,
    (NodeState.SUSPECT, "cordoned"): NodeState.CORDONED,
    (NodeState.SUSPECT, "drained"): NodeState.DRAINING,
    (NodeState.SUSPECT, "resumed"): NodeState.READY,
    (NodeState.SUSPECT, "lost"): NodeState.LOST,
    (NodeState.READY, "silenced"): NodeState.SILENT,
    (NodeState.CORDONED, "silenced"): NodeState.SILENT,
    (NodeState.DRAINING, "silenced"): NodeState.SILENT,
    (NodeState.SUSPECT, "silenced"): NodeState.SILENT,
    (NodeState.SILENT, "joined"): NodeState.READY,
    (NodeState.SILENT, "suspected"): NodeState.SUSPECT,
    (NodeState.SILENT, "cordoned"): NodeState.CORDONED,
    (NodeState.SILENT, "drained"): NodeState.DRAINING,
    (NodeState.SILENT, "lost"): NodeState.LOST,
    (NodeState.LOST, "joined"): NodeState.READY,
    (NodeState.LOST, "suspected"): NodeState.SUSPECT,
    (NodeState.LOST, "cordoned"): NodeState.CORDONED,
    (NodeState.LOST, "drained"): NodeState.DRAINING,
}

RENTAL: Final[Table[RentalState]] = {
    (RentalState.WANTED, "provisioned"): RentalState.BOOTING,
    (RentalState.WANTED, "refused"): RentalState.OVER,
    (RentalState.WANTED, "given_up"): RentalState.LEAVING,
    (RentalState.BOOTING, "joined"): RentalState.JOINED,
    (RentalState.BOOTING, "given_up"): RentalState.LEAVING,
    (RentalState.BOOTING, "gone"): RentalState.OVER,
    (RentalState.JOINED, "given_up"): RentalState.LEAVING,
    (RentalState.JOINED, "gone"): RentalState.OVER,
    (RentalState.LEAVING, "found"): RentalState.LEAVING,
    (RentalState.LEAVING, "gone"): RentalState.OVER,
}

ROLLOUT: Final[Table[RolloutState]] = {
    (RolloutState.CANARY, "watched"): RolloutState.CANARY,
    (RolloutState.CANARY, "advanced"): RolloutState.CANARY,
    (RolloutState.CANARY, "promoted"): RolloutState.ROLLING,
    (RolloutState.CANARY, "reversed"): RolloutState.RETURNING,
    (RolloutState.ROLLING, "reversed"): RolloutState.RETURNING,
    (RolloutState.ROLLING, "completed"): RolloutState.COMPLETE,
    (RolloutState.RETURNING, "reverted"): RolloutState.REVERTED,
}

TERMINAL: Final = frozenset(
    {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
        AttemptState.ENDED,
        AllocationState.RELEASED,
        RentalState.OVER,
        RolloutState.COMPLETE,
        RolloutState.REVERTED,
    }
)


def apply(table: Table[State], state: State, event: str) -> State:
    """The state after ``event``.

    Raises: IllegalTransition when the table has no such row.

    >>> apply(JOB, JobState.QUEUED, "placed")
    <JobState.STARTING: 'starting'>
    """
    after = table.get((state, event))
    if after is None:
        raise IllegalTransition(f"{event!r} does not apply to something {state}", field="event", value=event)
    return after


def may(table: Table[State], state: State, event: str) -> bool:
    """Whether ``event`` applies in ``state``."""
    return (state, event) in table


def is_terminal(state: StrEnum) -> bool:
    """Whether nothing can happen any more to something in ``state``."""
    return state in TERMINAL


def diagram(table: Table[State]) -> str:
    """The table as a Mermaid state diagram."""
    rows = [f"    {before} --> {after}: {event}" for (before, event), after in table.items()]
    ends = [f"    {state} --> [*]" for state in dict.fromkeys(table.values()) if is_terminal(state)]
    first = next(iter(table))[0]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {first}", *rows, *ends])
