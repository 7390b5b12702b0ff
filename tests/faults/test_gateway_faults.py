"""The fault cases of serving, short: the same as `make faults` runs whole."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cloud import Cloud, eventually
from tests.faults import gateway_cases
from tests.faults.serving import gateway_pids, metered, metric, service

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


def test_processes_of_one_gateway_share_limits_and_one_that_is_killed_is_replaced_and_loses_nothing(
    tmp_path: Path,
) -> None:
    cloud = Cloud(tmp_path / "home", gateway_workers=2)
    cloud.up()
    try:
        assert cloud.call("POST", "/v1/workloads", {"spec": service("shared", replicas=1)})[0] == 201
        limits = {"requests/day": 60}
        key = cloud.call("POST", "/v1/tokens", {"name": "key", "scopes": ["infer"], "limits": limits})[1]["token"]

        answered: list[int] = []

        def ask(_: int) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", cloud.gateway_port, timeout=20)
            try:
                body = json.dumps({"model": "shared", "messages": [], "max_tokens": 1})
                connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
                answered.append(connection.getresponse().status)
                return answered[-1]
            except OSError:
                return 0
            finally:
                connection.close()

        def told(worker: str) -> bool:
            return metric(cloud, "replicas", worker=worker, model="shared", state="closed") == 1

        def served(worker: str) -> bool:
            return metric(cloud, "requests_total", worker=worker, model="shared") > 0

        eventually(lambda: told("0") and told("1"), within_s=60, what="both route to the replica")
        eventually(lambda: all(ask(0) == 200 for _ in range(4)), within_s=20, what="both know the key")
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(100)))
        assert set(answered) <= {200, 401, 429}
        eventually(lambda: served("0") and served("1"), within_s=10, what="both had a part")
        before = answered.count(200)
        assert 50 <= before <= 60, "what one of them holds is not the other's at once, and never more than the limit"
        # a gateway that is killed loses what it saw in its last fifth of a second, so that is let pass
        eventually(lambda: len(metered(cloud, "shared")) == before, within_s=20, what="all is in the ledger")
        pids = gateway_pids(cloud)
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        eventually(lambda: len(set(gateway_pids(cloud)) - {pids[0]}) == 2, within_s=20, what="it is replaced")
        eventually(lambda: told("0") and told("1"), within_s=20, what="both route to the replica again")
        assert len(metered(cloud, "shared")) == before, "nothing is entered twice by whoever takes its books over"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(40)))
        in_all = answered.count(200)
        assert in_all <= 61, "the limit is known to the one that is new"
        usages = eventually(
            lambda: found if len(found := metered(cloud, "shared")) >= in_all else None,
            within_s=20,
            what="all is in the ledger",
        )
        assert len(usages) == in_all
        assert len({usage["id"] for usage in usages}) == len(usages)
    finally:
        cloud.down()
