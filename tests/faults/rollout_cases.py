"""Services that are updated on a real cloud while requests come all the time: none may fail, whatever is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.cloud import Cloud, eventually
from tests.faults.serving import Crowd, Journals, Seen, ask, on_gpus, pid_of, replicas, service


@dataclass(slots=True)
class Traffic:
    """Requests to a model that follow each other without a pause, whole answers and streams, until it is stopped."""

    cloud: Cloud
    model: str
    whole: int = 3
    streams: int = 2
    seen: list[Seen] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        bodies: list[dict[str, Any]] = [{"max_tokens": 2, "pause": 0.01}] * self.whole
        bodies += [{"max_tokens": 25, "pause": 0.04, "stream": True}] * self.streams
        for number, body in enumerate(bodies):
            thread = threading.Thread(target=self._go_on, args=(number, body), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _go_on(self, number: int, body: dict[str, Any]) -> None:
        for count in range(100_000):
            if self._stopping.is_set():
                return
            seen = Seen(tag=f"{self.model}-{number}-{count}", began=time.monotonic())
            self.seen.append(seen)
            ask(self.cloud, self.model, seen, **body)
            time.sleep(0.02)

    def stop(self) -> list[Seen]:
        """All requests, after the last has its answer."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "requests hang"
        return self.seen

    def check(self) -> str:
        """How many there were. Raises: AssertionError when one was not answered whole."""
        seen = self.stop()
        failed = [(one.tag, one.status, one.error) for one in seen if not one.is_whole]
        assert not failed, f"{len(failed)} of {len(seen)} requests failed: {failed[:5]}"
        streams = sum(one.tokens == 25 for one in seen)
        return f"{len(seen)} requests, {streams} of them streams, none failed"


@contextlib.contextmanager
def running(cloud: Cloud, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The workload of a service, once one of its replicas is routed to; all its revisions are stopped afterwards."""
    status, body = cloud.call("POST", "/v1/workloads", {"spec": on_gpus(cloud, spec)})
    assert status == 201, body
    name = spec["name"]
    try:
        eventually(lambda: replicas(cloud, name) >= 1, within_s=60, what=f"{name} is routed to")
        yield body
    finally:
        for _ in range(2):  # also the one that comes back because the other one was stopped
            cloud.call("POST", f"/v1/workloads/{name}/stop")
        eventually(lambda: not _live(cloud, name), within_s=60, what=f"{name} is gone")


def _live(cloud: Cloud, name: str) -> bool:
    status, body = cloud.call("GET", f"/v1/jobs?name={name}&state=queued,starting,running,stopping")
    assert status == 200, body
    return bool(body["items"])


def update(cloud: Cloud, spec: dict[str, Any]) -> dict[str, Any]:
    """The workload of the new revision."""
    status, body = cloud.call("POST", f"/v1/workloads/{spec['name']}/update", {"spec": on_gpus(cloud, spec)})
    assert status == 201, body
    return dict(body)


def revisions(cloud: Cloud, name: str) -> dict[str, Any]:
    """All revisions of a service, and the rollout."""
    status, body = cloud.call("GET", f"/v1/workloads/{name}/revisions")
    assert status == 200, body
    return dict(body)


def states(cloud: Cloud, name: str) -> dict[int, str]:
    """The state of each revision by its number."""
    return {one["revision"]: one["state"] for one in revisions(cloud, name)["items"]}


def wait_until_over(cloud: Cloud, name: str, *, within_s: float = 90) -> dict[int, str]:
    """The state of each revision once no rollout is under way."""
    eventually(lambda: revisions(cloud, name)["rollout"] is None, within_s=within_s, what=f"the rollout of {name} ends")
    return states(cloud, name)


def version(spec: dict[str, Any], number: int, **rollout: Any) -> dict[str, Any]:
    """The spec with something different about it."""
    section = {**spec["service"], **({"rollout": rollout} if rollout else {})}
    return {**spec, "envs": {**spec.get("envs", {}), "VERSION": str(number)}, "service": section}


def rolling_update(cloud: Cloud, *, kills: int = 0) -> str:
    """An update and a rollback under requests all the time; the control plane is killed at different points of it."""
    spec = service("roll", replicas=2, wait="30s")
    journals = Journals(cloud.home)
    with running(cloud, spec) as first:
        eventually(lambda: replicas(cloud, "roll") == 2, within_s=60, what="both are routed to")
        traffic = Traffic(cloud, "roll")
        traffic.start()
        time.sleep(0.5)
        second = update(cloud, version(spec, 2))
        points = [
            lambda: True,
            lambda: revisions(cloud, "roll")["rollout"]["ready_new"] == 1,
            lambda: revisions(cloud, "roll")["rollout"]["ready_old"] == 1,
        ]
        for point in points[:kills]:
            with contextlib.suppress(TypeError):  # it was over sooner
                eventually(point, within_s=60, what="the rollout comes further")
            cloud.kill()
            time.sleep(0.3)
            cloud.up()
        assert wait_until_over(cloud, "roll") == {1: "replaced", 2: "running"}
        ids = {job["id"] for job in second["jobs"]}
        assert all(cloud.job(job["id"])["state"] == "cancelled" for job in first["jobs"])
        assert all(cloud.job(one)["state"] == "running" for one in ids)
        began = len(journals.of("call"))
        eventually(lambda: len(journals.of("call")) > began + 5, within_s=20, what="the new revision is asked")
        assert {line["job"] for line in journals.of("call")[began:]} <= ids
        status, body = cloud.call("POST", "/v1/workloads/roll/rollback", {})
        assert status == 202, body
        assert wait_until_over(cloud, "roll") == {1: "replaced", 2: "replaced", 3: "running"}
        back = revisions(cloud, "roll")["items"][0]
        assert (back["back_to"], back["spec"].get("envs")) == (1, None), "it is what the first one was"
        told = traffic.check()
    return f"{told}; the control plane was killed {kills} times"


def canary(cloud: Cloud) -> str:
    """A canary that is held until it is promoted, and gets about its part of the requests."""
    spec = service("canary", replicas=2)
    journals = Journals(cloud.home)
    with running(cloud, spec):
        second = update(cloud, version(spec, 2, canary=["20%", 50]))
        ids = {job["id"] for job in second["jobs"]}
        eventually(lambda: revisions(cloud, "canary")["rollout"]["watched_ns"], within_s=60, what="the canary is ready")
        assert states(cloud, "canary") == {1: "going", 2: "coming"}
        items = revisions(cloud, "canary")["items"]
        assert [one["weight"] for one in items] == [20, 80]
        crowd = Crowd(cloud, "canary")
        for number in range(100):
            crowd.ask(f"canary-{number}", max_tokens=1, pause=0.01)
            time.sleep(0.01)
        crowd.wait(within_s=60)
        assert all(one.is_whole for one in crowd.seen)
        calls = [line["job"] for line in journals.of("call") if line["tag"].startswith("canary-")]
        part = sum(job in ids for job in calls)
        assert 15 <= part <= 25, f"{part} of {len(calls)} requests went to a canary of 20 %"
        assert cloud.call("POST", "/v1/workloads/canary/promote", {})[0] == 202
        eventually(lambda: _weights(cloud, "canary") == [50, 50], within_s=60, what="it has half of the requests")
        status, body = cloud.call("POST", "/v1/workloads/canary/update", {"spec": version(spec, 3)})
        assert (status, body.get("field", "")) == (409, ""), body
        assert "tidemill promote canary" in body["mend"]
        assert cloud.call("POST", "/v1/workloads/canary/promote", {"all": True})[0] == 202
        assert wait_until_over(cloud, "canary") == {1: "replaced", 2: "running"}
        assert cloud.call("POST", "/v1/workloads/canary/promote", {})[0] == 409
    return f"{part} of {len(calls)} requests went to a canary of 20 %"


def _weights(cloud: Cloud, name: str) -> list[int | None]:
    return [one["weight"] for one in revisions(cloud, name)["items"]]


def bad_revisions(cloud: Cloud) -> str:
    """A revision that answers with errors is taken back by itself, and so is one that does not come up; one is aborted."""
    spec = service("bad", replicas=2, envs={})
    with running(cloud, spec):
        traffic = Traffic(cloud, "bad", streams=0)
        judged = {"requests": 10, "window": "20s"}
        update(cloud, version({**spec, "envs": {"ENGINE_FAILS": "1"}}, 2, canary="50%", rollback=judged))
        eventually(lambda: revisions(cloud, "bad")["rollout"]["watched_ns"], within_s=60, what="the canary is ready")
        traffic.start()
        assert wait_until_over(cloud, "bad") == {1: "running", 2: "taken back"}
        begun = len(traffic.seen)
        eventually(lambda: len(traffic.seen) > begun + 20, within_s=30, what="requests go on")
        seen = traffic.stop()
        detail = revisions(cloud, "bad")["items"][0]["detail"]
        assert "requests failed on it" in detail, detail
        failed = [one for one in seen if not one.is_whole]
        assert all(one.status == 500 for one in failed)
        late = [one for one in seen[begun:] if not one.is_whole]
        assert not late, "requests fail on after it was taken back"
        update(cloud, {**spec, "run": "exit 7"})
        assert wait_until_over(cloud, "bad") == {1: "running", 2: "taken back", 3: "taken back"}
        why = revisions(cloud, "bad")["items"][0]["detail"]
        assert "failed 3 times before one was ready" in why, why
        update(cloud, version(spec, 4, canary=10))
        assert cloud.call("POST", "/v1/workloads/bad/abort")[0] == 202
        assert wait_until_over(cloud, "bad")[4] == "taken back"
        assert replicas(cloud, "bad") == 2
        first = revisions(cloud, "bad")["items"][-1]["workload"]
        status, body = cloud.call("GET", "/v1/workloads/bad")
        assert (status, body["id"]) == (200, first), "its name is that of the revision that runs"
    return f"{len(failed)} of {len(seen)} requests failed before it was taken back: {detail}; {why}"


def gang_replicas(cloud: Cloud) -> str:
    """Replicas of two workers each: the first answers, the second only works; ready when both run."""
    spec = {**service("gang", replicas=2), "nodes": 2}
    spec["run"] = 'if [ "$RANK" != 0 ]; then exec sleep 600; fi\n' + spec["run"]
    with running(cloud, spec) as made:
        eventually(lambda: replicas(cloud, "gang") == 2, within_s=60, what="both gangs are routed to")
        workers = [worker for job in made["jobs"] for worker in cloud.job(job["id"])["workers"]]
        assert sorted((worker["rank"], bool(worker["endpoint"])) for worker in workers) == [
            (0, True), (0, True), (1, False), (1, False),
        ]  # fmt: skip
        seen = Seen(tag="gang", began=time.monotonic())
        ask(cloud, "gang", seen, max_tokens=2)
        assert seen.is_whole
        update(cloud, version(spec, 2))
        assert wait_until_over(cloud, "gang") == {1: "replaced", 2: "running"}
        assert replicas(cloud, "gang") == 2
    return f"{len(workers)} workers, 2 endpoints"


def dead_replica(cloud: Cloud) -> str:
    """A replica that hangs for good does not pass its liveness probe: it is ended, and another attempt answers."""
    alive = {"path": "/health", "every": "200ms", "answer": "500ms", "failures": 3}
    spec = {**service("alive", replicas=1, liveness=alive, wait="30s"), "retry": {"on": ["error"], "max": 1}}
    with running(cloud, spec) as made:
        job = made["jobs"][0]["id"]
        os.kill(pid_of(job), signal.SIGSTOP)
        eventually(lambda: cloud.job(job)["attempts"] == 2, within_s=60, what="there is another attempt")
        first = cloud.job(job)["attempt_list"][0]
        assert first["cause"] == "not_alive", first
        assert "3 times in a row; see service.liveness" in first["detail"]
        seen = Seen(tag="alive", began=time.monotonic())
        ask(cloud, "alive", seen, max_tokens=2)
        assert seen.is_whole, seen
    return f"{first['detail']}; another attempt answered"
