"""The tables of core.lifecycle say all there is: complete, connected, and final where they should be."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest

from tidemill.core.lifecycle import ALLOCATION, ATTEMPT, JOB, NODE, RENTAL, apply, diagram, is_terminal, may
from tidemill.errors import IllegalTransition
from tidemill.model.cloud import RentalState
from tidemill.model.fleet import NodeState
from tidemill.model.job import AllocationState, AttemptState, JobState

TABLES: dict[str, tuple[Mapping[tuple[Any, str], Any], type[StrEnum], StrEnum]] = {
    "job": (JOB, JobState, JobState.QUEUED),
    "attempt": (ATTEMPT, AttemptState, AttemptState.STARTING),
    "allocation": (ALLOCATION, AllocationState, AllocationState.RESERVED),
    "node": (NODE, NodeState, NodeState.READY),
    "rental": (RENTAL, RentalState, RentalState.WANTED),
}


def reachable(table: Mapping[tuple[Any, str], Any], first: StrEnum) -> set[StrEnum]:
    found, front = {first}, [first]
    while front:
        here = front.pop()
        for (before, _), after in table.items():
            if before == here and after not in found:
                found.add(after)
                front.append(after)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_every_state_has_a_row_or_is_terminal(name: str) -> None:
    table, states, _ = TABLES[name]
    for state in states:
        assert is_terminal(state) or any(before == state for before, _ in table), state


@pytest.mark.parametrize("name", TABLES)
def test_every_state_can_be_reached(name: str) -> None:
    table, states, first = TABLES[name]
    assert reachable(table, first) == set(states)


@pytest.mark.parametrize("name", ["job", "attempt", "allocation", "rental"])
def test_every_state_can_end(name: str) -> None:
    table, states, _ = TABLES[name]
    for state in states:
        assert any(is_terminal(end) for end in reachable(table, state)), state


@pytest.mark.parametrize("name", TABLES)
def test_what_is_terminal_stays_terminal(name: str) -> None:
    table, _, _ = TABLES[name]
    assert not [row for row in table if is_terminal(row[0])]


@pytest.mark.parametrize("name", TABLES)
def test_an_illegal_event_is_refused(name: str) -> None:
    table, states, _ = TABLES[name]
    events = {event for _, event in table} | {"nonsense"}
    for state in states:
        for event in events:
            if may(table, state, event):
                assert apply(table, state, event) is table[state, event]
            else:
                with pytest.raises(IllegalTransition):
                    apply(table, state, event)


def test_a_table_with_a_dead_end_is_noticed() -> None:
    planted = {**JOB, (JobState.QUEUED, "lost"): JobState.STOPPING}
    del planted[JobState.STOPPING, "cancelled"]
    assert not any(is_terminal(end) for end in reachable(planted, JobState.STOPPING))


def test_diagrams_name_every_transition() -> None:
    drawn = diagram(JOB)
    assert all(f"{before} --> {after}: {event}" in drawn for (before, event), after in JOB.items())
