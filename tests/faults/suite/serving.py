"""Cases 7, 8, 24 to 26: what replicas, gateways, crowds and updates do to requests, from ``gateway_cases`` and ``rollout_cases``."""

from __future__ import annotations

from collections.abc import Callable

from tests.cloud import Cloud
from tests.faults import gateway_cases, rollout_cases
from tests.faults.suite.bed import Beds
from tests.faults.suite.registry import case


def _on(beds: Beds, run: Callable[[Cloud], str]) -> str:
    bed = beds.make()
    figure = run(bed.cloud)
    jobs = bed.cloud.call("GET", "/v1/jobs?limit=1000")[1]["items"]
    bed.killed |= {job["id"] for job in jobs}
    for job in jobs:
        bed.stop(job["id"])
    bed.finish(*(job["id"] for job in jobs))
    bed.audit()
    return figure


@case(
    7,
    "kill -9 of a replica under streams and requests",
    "ejected <= 1 s; tried elsewhere once; streams end with an error; replaced <= 10 s",
)
def killed_replica(beds: Beds) -> str:
    return _on(beds, gateway_cases.case_7)


@case(
    8,
    "SIGSTOP of a replica: its port is open and nothing is answered",
    "ejected <= 15 s; p99 of the other, while it hangs and after, at most a fifth and 30 ms above that before",
    is_alone=True,
)
def hung_replica(beds: Beds) -> str:
    return _on(beds, gateway_cases.case_8)


@case(
    24,
    "kill -9 of a gateway with 256 streams; ten times too many requests beside readers of 1 B/s; 1,000 who leave",
    "tokens to within 1 s; goodput >= 90 %; refused <= 50 ms (p99); no slot lost; memory <= 2 x",
    is_alone=True,
)
def gateway_under_pressure(beds: Beds) -> str:
    return _on(beds, gateway_cases.case_24)


@case(
    25,
    "200 requests to a service of which nothing runs; a first launch that fails, a slow second; idleness",
    "<= 1 launch at a time; each answered or 503 by its deadline; no stream ended by scaling down",
)
def from_nothing(beds: Beds) -> str:
    return _on(beds, gateway_cases.case_25)


@case(
    26,
    "a service is updated and goes back under requests all the time; kill -9 of the control plane at three points of it",
    "no request fails, streams among them; the next control plane goes on where it was",
)
def updated_service(beds: Beds) -> str:
    return _on(beds, lambda cloud: rollout_cases.rolling_update(cloud, kills=3))
