"""Case 23: the time of day jumps."""

from __future__ import annotations

import time
from typing import Final

from tests.faults.suite.bed import Beds
from tests.faults.suite.killing import built
from tests.faults.suite.registry import case

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
    "the control plane's time of day jumps by an hour, forth and back",
    "no lease is over, nothing started again; no negative time in the books",
)
def jumps(beds: Beds) -> str:
    bed = beds.make(starts=False, engine="none")
    clock = bed.folder / "clock"
    clock.write_text("0")
    bed.up(env={"LD_PRELOAD": str(built(SHIM)), "CLOCK_OFFSET": str(clock)})
    status, answer = bed.cloud.call("PUT", "/v1/sites/edge", {"kind": "edge", "lease": "5s", "pue": 1.2})
    assert status == 200, answer
    bed.join("far", site="edge")
    held = bed.submit(bed.witness("held", lines=900))
    bed.cloud.wait(held, "running")
    done = []
    for jump in ("+3600", "-3600", "+0", "+7200", "+0"):
        clock.write_text(jump)
        done.append(bed.submit(bed.witness(f"at{len(done)}", lines=2)))
        for _ in range(12):
            assert bed.node("far")["state"] == "ready", f"at {jump}"
            time.sleep(0.5)
        job = bed.cloud.job(held)
        assert (job["state"], job["attempts"]) == ("running", 1), job
        bed.finish(done[-1])
    bed.finish(held, within_s=90)
    assert bed.cloud.job(held)["state"] == "succeeded"
    assert all(end >= start for _, _, start, end, _, _ in bed.cloud.books())
    bed.audit()
    return f"5 jumps of up to two hours: 0 leases over, {len(done) + 1} of {len(done) + 1} jobs ran once"
