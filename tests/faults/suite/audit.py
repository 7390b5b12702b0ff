"""The auditor: holds the workers' own journal, the database and the API's answers against each other."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.suite.journal import Life

TERMINAL = ("succeeded", "failed", "cancelled")
_WHOLE = 1000
"""A GPU, in thousandths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was found. ``acknowledged`` maps a job that was answered with 2xx to its name; ``stopped`` were told to stop.

    ``jobs`` are as the API shows them. ``books`` are (node, meter, from, to, milli, launch). ``running`` are launch ids
    of processes that live. ``capacity`` is the CPUs of a machine in milli. ``unsound`` is what the store says of itself.
    ``witnesses`` are the acknowledged jobs whose workers write into the journal.
    ``may_restart`` are jobs of which a worker was killed on purpose, ``may_run`` those that are meant to run on.
    ``things`` are what else was acknowledged, by kind and key, ``there`` what is there of those kinds, and ``unknown``
    are writes that were acknowledged and that nobody can look for. ``forgotten`` are jobs that a restored backup does not
    know, or some attempts of which: they may have lived, and may live until somebody ends them.
    """

    lives: Sequence[Life]
    acknowledged: Mapping[str, str]
    stopped: frozenset[str] = frozenset()
    jobs: Mapping[str, Mapping[str, Any]]
    books: Sequence[tuple[str, str, int, int, int, str]]
    running: frozenset[str] = frozenset()
    capacity: int
    unsound: Sequence[str] = ()
    witnesses: frozenset[str] = field(default_factory=frozenset)
    may_restart: frozenset[str] = field(default_factory=frozenset)
    may_run: frozenset[str] = field(default_factory=frozenset)
    things: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    there: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()
    forgotten: frozenset[str] = frozenset()


def violations(found: Evidence) -> list[str]:
    """Every promise that is broken, in words that begin with its number; empty when all hold."""
    return [
        *_started_once(found),
        *_within_capacity(found),
        *_acknowledged_is_there(found),
        *_nothing_without_owner(found),
        *_never_restarted_by_us(found),
        *_books(found),
        *(f"I7: {sentence}" for sentence in found.unsound),
        *_progress(found),
    ]


def _started_once(found: Evidence) -> Iterable[str]:
    """I1: at most one live worker for each rank of a job, and each with a later fencing token than the one before."""
    for launch, count in Counter(life.launch for life in found.lives).items():
        if count > 1:
            yield f"I1: {launch} was started {count} times"
    by_rank: dict[tuple[str, int], list[Life]] = defaultdict(list)
    for life in found.lives:
        by_rank[life.job, life.rank].append(life)
    for mine in by_rank.values():
        for before, after in itertools.pairwise(mine):
            if before.launch != after.launch and after.began_ns < before.last_ns:
                late = (before.last_ns - after.began_ns) / 1e9
                yield f"I1: {after.launch} began {late:.2f} s before the last sign of {before.launch}"
            if before.launch != after.launch and after.fence <= before.fence:
                yield f"I1: {after.launch} began after {before.launch} with the token {after.fence} after {before.fence}"


def _within_capacity(found: Evidence) -> Iterable[str]:
    """I2: what lives at one time on a machine fits into it, and on a GPU into that."""
    machines: dict[str, list[tuple[int, int]]] = defaultdict(list)
    devices: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for life in found.lives:
        machines[str(life.home)] += [(life.began_ns, life.milli), (life.last_ns, -life.milli)]
        for device in life.devices:
            devices[device] += [(life.began_ns, life.gpu_milli), (life.last_ns, -life.gpu_milli)]
    for home, changes in machines.items():
        if (most := _most(changes)) > found.capacity:
            yield f"I2: {most} milli-CPUs lived at once on {home}, which has {found.capacity}"
    for device, changes in devices.items():
        if (most := _most(changes)) > _WHOLE:
            yield f"I2: {most} thousandths of {device} were used at once"


def _most(changes: Iterable[tuple[int, int]]) -> int:
    """The most that was held at one time; what is let go at an instant makes room for what comes at it."""
    held = most = 0
    for _, milli in sorted(changes):
        held += milli
        most = max(most, held)
    return most


def _acknowledged_is_there(found: Evidence) -> Iterable[str]:
    """I3: what was answered with 2xx is there, and what is said to be done was done."""
    for job_id, name in found.acknowledged.items():
        job = found.jobs.get(job_id)
        if job is None or job["name"] != name:
            yield f"I3: {job_id} ({name}) was acknowledged and is not there"
    for job_id in found.stopped:
        job = found.jobs.get(job_id)
        if job is None or job["state"] not in (*TERMINAL, "stopping"):
            yield f"I3: the stop of {job_id} was acknowledged and forgotten"
    for sort, key in found.things:
        wanted, there = found.things[sort, key], found.there.get((sort, key))
        if there is None:
            yield f"I3: the {sort} {key} was acknowledged and is not there"
        elif there != wanted:
            wrong = [
                f"{name} {there.get(name)!r}, not {value!r}"
                for name, value in wanted.items()
                if there.get(name) != value
            ]
            yield f"I3: the {sort} {key} was acknowledged and has {', '.join(wrong)}"
    yield from (f"I3: {write} was acknowledged, and nobody can look for it" for write in sorted(found.unknown))
    ended = {(life.job, life.fence) for life in found.lives if life.ended}
    tries = Counter(job for job, _ in {(life.job, life.fence) for life in found.lives})
    for job_id in found.witnesses:
        job = found.jobs.get(job_id)
        if job is not None and job["state"] == "succeeded":
            last = max((life.fence for life in found.lives if life.job == job_id), default=0)
            if (job_id, last) not in ended:
                yield f"I3: {job_id} is said to have succeeded; its worker began {tries[job_id]} times and did not end"


def _nothing_without_owner(found: Evidence) -> Iterable[str]:
    """I4: nothing lives whose job is over, or lived whose job is unknown."""
    for launch in sorted(found.running):
        job_id = "job_" + launch.removeprefix("run_").rsplit("-", 2)[0]
        job = found.jobs.get(job_id)
        if job_id not in found.forgotten and (job is None or job["state"] in TERMINAL):
            yield f"I4: {launch} lives, and its job is {job['state'] if job else 'unknown'}"
    for life in found.lives:
        if life.job not in found.jobs and life.job not in found.forgotten:
            yield f"I4: {life.launch} lived, and its job is unknown"


def _never_restarted_by_us(found: Evidence) -> Iterable[str]:
    """I5: no job is tried again of which nothing was killed, nor without saying so."""
    for job_id, job in found.jobs.items():
        if job_id not in found.may_restart and job["attempts"] > 1:
            ends = [f"{one['cause']} ({one['detail']})" for one in job.get("attempt_list", ()) if one.get("cause")]
            yield f"I5: {job_id} was healthy and was started {job['attempts']} times: {'; '.join(ends)}"
    attempts: dict[str, set[int]] = defaultdict(set)
    for life in found.lives:
        attempts[life.job].add(life.fence)
    for job_id, numbers in attempts.items():
        known = found.jobs.get(job_id)
        if known is not None and job_id not in found.forgotten and len(numbers) > known["attempts"]:
            yield f"I5: {job_id} lived {len(numbers)} times, and the API says {known['attempts']}"


def _books(found: Evidence) -> Iterable[str]:
    """I6: no stretch of a meter is booked twice or backwards, and a job that is over paid for what it held."""
    by_meter: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    paid: Counter[str] = Counter()
    for node, meter, start, end, milli, launch in found.books:
        by_meter[node, meter].append((start, end, milli))
        if end <= start:
            yield f"I6: {meter} of {node} is booked from {start} to {end}, which is no time"
        if meter == "cpu" and launch:
            paid[launch] += end - start
    for (node, meter), stretches in by_meter.items():
        changes: Counter[int] = Counter()
        for start, end, milli in stretches:
            changes[start] += milli
            changes[end] -= milli
        total, totals = 0, set()
        for at in sorted(changes):
            total += changes[at]
            totals.add(total)
        if len(totals - {0}) > 1:
            yield f"I6: {meter} of {node} is booked as {sorted(totals)} milli at different times"
    for job in found.jobs.values():
        if job["state"] not in TERMINAL:
            continue
        for worker in job["workers"]:
            held = worker["released_at_ns"] - worker["held_at_ns"]
            launch = worker["launch"]
            if paid[launch] != held:
                yield f"I6: {launch} held its place for {held} ns and paid for {paid[launch]}"


def _progress(found: Evidence) -> Iterable[str]:
    """I8: everything comes to its end."""
    for job_id, job in found.jobs.items():
        if job["state"] not in TERMINAL and job_id not in found.may_run:
            yield f"I8: {job_id} is {job['state']} still"
