"""The control plane keeps its promises in whatever order things happen, and whatever of it fails."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests.scenario.small_cloud import OPS, Op, played


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPS)
def test_whatever_happens_the_promises_are_kept(ops: list[Op]) -> None:
    played(ops)
