"""Case 23: the time of day jumps."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Final

from tests.cloud import eventually
from tests.faults.suite.bed import Bed, Beds, environment
from tests.faults.suite.killing import built
from tests.faults.suite.registry import case
from tests.faults.suite.requests import ask, is_served

LEEWAY_S: Final = 60.0
JUMPS: Final = ((3600, 0), (0, 3600), (-3600, 0), (0, -3600), (7200, -3600), (0, 0))
"""The time of day of the control plane, and of the machine, in s from the true one."""
SHIM: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
/* The seconds in the file are added to the time of day; clocks that never jump are left alone. */
static long offset(void) {
    char text[32] = {0}; const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 1) text[0] = 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *found) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, found);
    if (!status && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) found->tv_sec += offset();
    return status;
}
int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int status = real(found, zone);
    if (!status && found) found->tv_sec += offset();
    return status;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


@case(
    23,
    "the time of day jumps by up to two hours, forth and back: of the control plane and its gateway, and of a machine",
    "no lease is over, nothing started again; no negative time in the books; tokens end, and limits begin anew, +- 60 s",
)
def jumps(beds: Beds) -> str:
    bed = beds.make(starts=False, engine="none")
    clock, theirs = bed.folder / "clock", bed.folder / "their-clock"
    for each in (clock, theirs):
        each.write_text("0")
    bed.up(env=_set_by(clock))
    status, answer = bed.cloud.call("PUT", "/v1/sites/edge", {"kind": "edge", "lease": "5s", "pue": 1.2})
    assert status == 200, answer
    with environment(_set_by(theirs)):
        bed.join("far", site="edge")
    bed.submit(bed.service("asked", chunks=1, pause=0.0))
    eventually(lambda: is_served(bed, "asked"), within_s=60, what="the service is routed to")
    wanted = {"name": "tight", "scopes": ["infer"], "limits": {"requests/minute": 3, "requests/day": 1000}}
    tight = bed.cloud.call("POST", "/v1/tokens", wanted)[1]["token"]
    eventually(lambda: _asked(bed, tight)[0] == 200, within_s=20, what="its key is known")
    refused_s: list[float] = []
    held = bed.submit(bed.witness("held", lines=1600))
    bed.cloud.wait(held, "running")
    long, _ = _token(bed, 1800)
    eventually(lambda: _accepts(bed, long) == (True, True), within_s=20, what="the token is known")
    done, late = [], 0.0
    for number, (ours, machine) in enumerate(JUMPS):
        short, until = _token(bed, 6)
        clock.write_text(f"{ours:+}")
        theirs.write_text(f"{machine:+}")
        done.append(bed.submit(bed.witness(f"at{number}", lines=2)))
        answers = [_asked(bed, tight) for _ in range(8)]
        assert {status for status, _ in answers} <= {200, 429}, answers
        refused_s += [after for status, after in answers if status == 429]
        for _ in range(8):
            assert bed.node("far")["state"] == "ready", (ours, machine)
            time.sleep(0.5)
        job = bed.cloud.job(held)
        assert (job["state"], job["attempts"]) == ("running", 1), job
        assert _accepts(bed, long) == (True, True), (ours, machine)
        eventually(partial(_is_refused, bed, short), within_s=LEEWAY_S, what="it is over")
        late = max(late, time.monotonic() - until)
        bed.finish(done[-1])
    assert refused_s, "the key with a limit was never refused"
    assert all(0 < after <= LEEWAY_S for after in refused_s), refused_s
    eventually(lambda: _asked(bed, tight)[0] == 200, within_s=LEEWAY_S + 5, what="the next minute has begun")
    bed.finish(held, within_s=90)
    assert bed.cloud.job(held)["state"] == "succeeded"
    for job_id, name in bed.acknowledged.items():
        if name == "asked":
            bed.stop(job_id)
            bed.finish(job_id)
    bed.audit()
    return (
        f"{len(JUMPS)} jumps of up to two hours: 0 leases over, {len(done) + 1} of {len(done) + 1} jobs ran once; a token of"
        f" half an hour lived on, those of 6 s ended at most {late:.1f} s late;"
        f" a key of 3 requests a minute was refused {len(refused_s)} times, for at most {max(refused_s):.0f} s"
    )


def _asked(bed: Bed, token: str) -> tuple[int, float]:
    """The status of a request to the model, and for how many seconds it was refused."""
    body = {"model": "asked", "stream": True, "prompt": "x"}
    status, headers, _ = ask(bed, "POST", "/v1/completions", body, token=token, port=bed.cloud.gateway_port)
    return status, float(headers.get("retry-after", 0))


def _set_by(clock: Path) -> dict[str, str]:
    """The environment of processes whose time of day is set by that file."""
    return {"LD_PRELOAD": str(built(SHIM)), "CLOCK_OFFSET": str(clock)}


def _token(bed: Bed, seconds: int) -> tuple[str, float]:
    """A token, and when it ends by a clock that does not jump."""
    wanted = {"name": f"t{time.monotonic_ns()}", "scopes": ["read", "infer"], "expires_in": f"{seconds}s"}
    status, made = bed.cloud.call("POST", "/v1/tokens", wanted)
    assert status == 201, made
    return made["token"], time.monotonic() + seconds


def _is_refused(bed: Bed, token: str) -> bool:
    """Whether neither the control plane takes that token any more, nor the gateway."""
    return _accepts(bed, token) == (False, False)


def _accepts(bed: Bed, token: str) -> tuple[bool, bool]:
    """Whether the control plane takes that token, and the gateway."""
    statuses = [
        ask(bed, "GET", "/v1/jobs", token=token)[0],
        ask(bed, "GET", "/v1/models", token=token, port=bed.cloud.gateway_port)[0],
    ]
    assert set(statuses) <= {200, 401}, statuses
    return statuses[0] == 200, statuses[1] == 200
