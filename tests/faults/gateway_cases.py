"""Fault cases of serving, on a real cloud with real replicas: what each does to requests, and by when it is over.

A case takes a running cloud and returns its figures in words. It raises AssertionError when one is outside its bound.
"""

from __future__ import annotations

import os
import signal
import time

from tests.cloud import Cloud, eventually
from tests.faults.serving import Crowd, Journals, percentile, pid_of, replicas, service, serving, watch


def case_7(cloud: Cloud, *, streams: int = 10, whole: int = 20) -> str:
    """kill -9 of a replica's engine while it streams and while it thinks about what it has not answered at all."""
    journals = Journals(cloud.home)
    with serving(cloud, service("case7", replicas=2, wait="20s")) as jobs:
        crowd = Crowd(cloud, "case7")
        open_streams = [crowd.ask(f"s{n}", stream=True, max_tokens=400, pause=0.05) for n in range(2 * streams)]
        eventually(lambda: all(one.tokens for one in open_streams), within_s=20, what="all streams have begun")
        unanswered = [crowd.ask(f"w{n}", think=1.5, max_tokens=2) for n in range(2 * whole)]
        eventually(
            lambda: sum(line["tag"].startswith("w") for line in journals.of("call")) == 2 * whole,
            within_s=20,
            what="every replica works on what it got",
        )
        victim = jobs[0]
        on_victim = {line["tag"] for line in journals.of("call") if line["job"] == victim}
        starts = len(journals.of("start"))
        os.kill(pid_of(victim), signal.SIGKILL)
        killed_at = time.monotonic()
        ejected_s = watch(lambda: replicas(cloud, "case7") == 1, within_s=5, what="it is ejected")
        during = [crowd.ask(f"d{n}", max_tokens=2) for n in range(20)]
        eventually(lambda: len(journals.of("start")) > starts, within_s=10, what="another one started")
        replaced_s = watch(lambda: replicas(cloud, "case7") == 2, within_s=10, what="it is replaced") and (
            time.monotonic() - killed_at
        )
        crowd.wait(within_s=60)
        calls = {one.tag: journals.calls(one.tag) for one in unanswered}
        broken = [one for one in open_streams if one.tag in on_victim]
        assert len(broken) >= streams // 2, f"only {len(broken)} streams were on it"
        late = [one.tag for one in broken if one.is_whole or not one.error or one.ended - killed_at > 1]
        assert not late, f"streams that did not end with an error event within 1 s: {late}"
        assert {one.error for one in broken} == {"replica_failed"}
        others = [one for one in open_streams if one.tag not in on_victim]
        assert all(one.is_whole and one.tokens == 400 for one in others), "streams elsewhere were disturbed"
        failed = [(one.tag, one.status, one.error) for one in [*unanswered, *during] if not one.is_whole]
        assert not failed, f"requests of which nothing was answered were not tried elsewhere: {failed[:5]}"
        retried = sum(len(made) == 2 for made in calls.values())
        assert all(1 <= len(made) <= 2 for made in calls.values()), "a request was sent more than twice"
        assert retried >= whole // 2, f"only {retried} requests were under way on it"
        assert ejected_s <= 1, f"ejected after {ejected_s:.2f} s"
        assert replaced_s <= 10, f"replaced after {replaced_s:.2f} s"
    return (
        f"ejected after {ejected_s:.2f} s, replaced after {replaced_s:.2f} s; {retried} unanswered requests were tried "
        f"elsewhere with at most one more call each, all answered; {len(broken)} open streams ended with an error event "
        f"within {max(one.ended for one in broken) - killed_at:.2f} s; {len(others)} elsewhere were undisturbed"
    )


def case_8(cloud: Cloud, *, requests: int = 150) -> str:
    """SIGSTOP of a replica's engine: its port stays open, connections succeed, and nothing is ever answered."""
    with serving(cloud, service("case8", replicas=2, wait="30s")) as jobs:

        def load(phase: str) -> list[float]:
            crowd = Crowd(cloud, "case8")
            for number in range(requests):
                crowd.ask(f"{phase}{number}", max_tokens=2, pause=0.02)
                time.sleep(0.02)
            crowd.wait(within_s=40)
            failed = [(one.tag, one.status, one.error) for one in crowd.seen if not one.is_whole]
            assert not failed, f"{phase}: {failed[:5]}"
            return [one.took_s for one in crowd.seen]

        before_s = percentile(load("before"), 0.99)
        crowd = Crowd(cloud, "case8")
        streams = [crowd.ask(f"s{n}", stream=True, max_tokens=1500, pause=0.01) for n in range(4)]
        eventually(lambda: all(one.tokens for one in streams), within_s=20, what="all streams have begun")
        pid = pid_of(jobs[0])
        os.kill(pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        try:
            meanwhile = [crowd.ask(f"m{n}", max_tokens=2, pause=0.02) for n in range(10)]
            ejected_s = watch(lambda: replicas(cloud, "case8") == 1, within_s=20, what="it is ejected")
            after_s = percentile(load("after"), 0.99)
            crowd.wait(within_s=30)
            answered_s = max(one.ended for one in meanwhile) - stopped_at
        finally:
            os.kill(pid, signal.SIGCONT)
        back_s = watch(lambda: _is_back(cloud), within_s=30, what="it is sent requests again")
        assert ejected_s <= 15, f"ejected after {ejected_s:.1f} s"
        lost = [(one.tag, one.status, one.error) for one in meanwhile if not one.is_whole]
        assert not lost, f"requests that it held were not tried elsewhere: {lost[:5]}"
        ended = [one for one in streams if not one.is_whole]
        assert ended, "no stream was on it"
        assert all(one.error == "replica_failed" for one in ended)
        # a fifth, and what two shared cores add to a few ms by themselves
        assert after_s <= before_s * 1.2 + 0.03, f"p99 of the others rose from {before_s:.3f} to {after_s:.3f} s"
    return (
        f"ejected after {ejected_s:.1f} s; p99 of the others {before_s * 1000:.0f} ms before and {after_s * 1000:.0f} ms "
        f"after; what it held was answered elsewhere after {answered_s:.1f} s at most, {len(ended)} streams on it ended "
        f"with an error event; sent requests again {back_s:.1f} s after it went on"
    )


def _is_back(cloud: Cloud) -> bool:
    """Whether both replicas are sent requests; one that is on trial needs one for that."""
    crowd = Crowd(cloud, "case8")
    crowd.ask("trial", max_tokens=1)
    crowd.wait(within_s=40)
    return replicas(cloud, "case8") == 2
