"""Services that are updated, taken back and gone back to, on a real cloud."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cloud import Cloud
from tests.faults import rollout_cases


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("rollouts") / "home")
    made.up()
    yield made
    made.down()


def test_an_update_and_a_rollback_fail_no_request_though_the_control_plane_is_killed(cloud: Cloud) -> None:
    assert "none failed" in rollout_cases.rolling_update(cloud, kills=1)


def test_a_canary_gets_its_part_until_it_is_promoted(cloud: Cloud) -> None:
    assert "canary of 20 %" in rollout_cases.canary(cloud)


def test_a_bad_revision_is_taken_back_by_itself(cloud: Cloud) -> None:
    assert "requests failed on it" in rollout_cases.bad_revisions(cloud)


def test_a_replica_may_be_a_gang(cloud: Cloud) -> None:
    assert "2 endpoints" in rollout_cases.gang_replicas(cloud)


def test_a_replica_that_hangs_for_good_is_replaced(cloud: Cloud) -> None:
    assert "another attempt answered" in rollout_cases.dead_replica(cloud)
