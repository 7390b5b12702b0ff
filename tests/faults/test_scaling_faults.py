"""Replicas that follow what users feel and what engines tell, on a real cloud; and what a restart may not do to them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cloud import Cloud, eventually
from tests.faults.serving import Crowd, Journals, replicas, service, serving

METRICS = """# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="m"}} {queued}
vllm:num_requests_running{{engine="0",model_name="m"}} 2.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {cache}
vllm:time_to_first_token_seconds_bucket{{le="0.5",model_name="m"}} {{garbage
vllm:prompt_tokens_total{{model_name="m"}} NaN
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("scaling") / "home")
    made.up()
    yield made
    made.down()


def tell(cloud: Cloud, job: str, *, queued: float, cache: float) -> None:
    """Have the engine of a replica say so from now on."""
    [folder] = (cloud.home / "local" / "volumes").glob(f"*/{job}/output")
    (folder / "metrics.new").write_text(METRICS.format(queued=queued, cache=cache))
    (folder / "metrics.new").replace(folder / "metrics")


def command(cloud: Cloud, *arguments: str) -> str:
    """What the command line prints."""
    environment = os.environ | {"TIDEMILL_HOME": str(cloud.home), "NO_COLOR": "1", "COLUMNS": "160"}
    program = [sys.executable, "-c", "from tidemill.cli.main import main; main()"]
    return subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def counts(cloud: Cloud, job: str) -> dict[str, Any]:
    """How many replicas the service has, as its job's ``why`` tells."""
    status, body = cloud.call("GET", f"/v1/jobs/{job}/why")
    assert status == 200, body
    return dict(body["replicas"])


@contextmanager
def asking(cloud: Cloud, model: str, *, at_a_time: int, **body: Any) -> Iterator[None]:
    """So many requests under way at any time."""
    stop = threading.Event()

    def one_after_another(number: int) -> None:
        crowd, count = Crowd(cloud, model), 0
        while not stop.is_set():
            count += 1
            crowd.ask(f"{number}-{count}", **body)
            crowd.wait(within_s=60)

    threads = [threading.Thread(target=one_after_another, args=(number,)) for number in range(at_a_time)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_first_tokens_that_come_late_bring_another_replica_and_why_says_so(cloud: Cloud) -> None:
    scaling = {"ttft": "250ms", "window": "5s"}
    spec = service("felt", replicas="1..2", concurrency=64, idle="1m", scaling=scaling)
    with serving(cloud, spec) as jobs:
        assert counts(cloud, jobs[0])["wanted"] == 1
        with asking(cloud, "felt", at_a_time=8, stream=True, max_tokens=1, pause=0, think_each=0.1):
            eventually(lambda: replicas(cloud, "felt") == 2, within_s=60, what="another replica is there")
        told = counts(cloud, jobs[0])
        [ask] = [one for one in told["asks"] if one["objective"] == "ttft"]
        assert ask["wants"] >= 2
        assert "a replica bears" in ask["target"]
        printed = command(cloud, "why", "felt")
        assert "2 wanted of 1..2" in printed
        assert "ttft" in printed
        assert "ttft" in command(cloud, "show", "felt")


@pytest.mark.long
def test_a_full_cache_and_a_queue_inside_the_engine_bring_more_replicas(cloud: Cloud) -> None:
    scaling = {"kv_cache": "80%", "engine_queue": 4, "window": "5s"}
    spec = service("cached", replicas="1..3", idle="1s", scaling=scaling)
    with serving(cloud, spec) as jobs:
        tell(cloud, jobs[0], queued=0, cache=0.99)
        eventually(lambda: replicas(cloud, "cached") == 2, within_s=40, what="a second one, for the cache")
        for job in jobs[:2]:
            tell(cloud, job, queued=0, cache=0.1)
        eventually(lambda: replicas(cloud, "cached") == 1, within_s=60, what="one is enough again")
        for job in jobs[:2]:
            tell(cloud, job, queued=9, cache=0.1)
        with asking(cloud, "cached", at_a_time=1, max_tokens=1, pause=0.2):
            eventually(lambda: replicas(cloud, "cached") >= 2, within_s=40, what="a second one, for the queue")


def test_a_control_plane_that_restarts_gives_up_no_replica_of_a_busy_service(cloud: Cloud) -> None:
    spec = service("busy", replicas="0..2", concurrency=2, idle="0s", wait="40s")
    with serving(cloud, spec) as jobs:
        crowd = Crowd(cloud, "busy")
        for number in range(4):
            crowd.ask(f"s{number}", stream=True, max_tokens=600, pause=0.05)
        eventually(lambda: replicas(cloud, "busy") == 2, within_s=40, what="both are there")
        eventually(lambda: all(one.tokens for one in crowd.seen), within_s=20, what="all streams have begun")
        cloud.kill()
        cloud.up()
        looks, until = 0, time.monotonic() + 8
        while time.monotonic() < until:
            _, told = cloud.call("GET", f"/v1/jobs/{jobs[0]}/why")
            if any(one.ended for one in crowd.seen):
                break
            found = told["replicas"]
            assert found is None or (found["wanted"], found["leaving"]) == (2, 0), found
            looks += found is not None
            time.sleep(0.1)
        assert looks
        crowd.wait(within_s=60)
        assert all(one.is_whole for one in crowd.seen), crowd.seen
        assert len({call["job"] for call in Journals(cloud.home).of("call") if call["tag"].startswith("s")}) == 2
        eventually(lambda: replicas(cloud, "busy") <= 0, within_s=60, what="none is left when nobody asks")
