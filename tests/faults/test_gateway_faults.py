"""The fault cases of serving, short: the same as `make faults` runs whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cloud import Cloud
from tests.faults import gateway_cases

SLACK = 20.0
"""Other tests run beside these; the bounds themselves hold where the cases run alone."""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("serving") / "home")
    made.up()
    yield made
    made.down()


def test_a_killed_replica_is_ejected_and_replaced_and_what_it_had_not_answered_is_tried_elsewhere(cloud: Cloud) -> None:
    assert "replaced" in gateway_cases.case_7(cloud, streams=3, whole=4, length=80, slack=SLACK)


def test_a_hung_replica_is_ejected_and_what_it_held_is_tried_elsewhere(cloud: Cloud) -> None:
    assert "ejected" in gateway_cases.case_8(cloud, requests=15, length=200, slack=SLACK)


def test_a_killed_gateway_settles_streams_and_overload_and_leaving_clients_cost_no_slot(cloud: Cloud) -> None:
    assert "slots free" in gateway_cases.case_24(cloud, streams=8, seconds=2, leaving=40, slack=SLACK)


def test_a_service_comes_up_from_nothing_once_asked_and_goes_without_ending_a_stream(cloud: Cloud) -> None:
    assert "whole" in gateway_cases.case_25(
        cloud, requests=40, start_s=0.3, rounds=0, idle_s=0.6, length=50, slack=SLACK
    )
