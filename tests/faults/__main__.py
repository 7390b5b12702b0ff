"""``python -m tests.faults``: the fault cases on real processes, and seeds of the simulation; ``make faults``."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.faults.suite.registry import BOTH, Case
from tests.faults.suite.running import CASES, Done, run_all
from tests.postgres import NoPostgres, Postgres

SEEDS = "memory=2000,sqlite=200"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How every case went once. ``failed`` and ``skipped`` are numbers of cases; one that failed somewhere has failed."""

    chosen: frozenset[int]
    failed: frozenset[int]
    skipped: frozenset[int]
    seeds: int
    failed_seeds: int
    took_s: float

    @property
    def passed(self) -> frozenset[int]:
        """The cases that were shown in full, on each of their stores."""
        return self.chosen - self.failed - self.skipped

    def told(self) -> dict[str, int]:
        """What the line of JSON says of it."""
        return {
            "passed": len(self.passed), "failed": len(self.failed), "skipped": len(self.skipped),
            "seeds": self.seeds, "failed_seeds": self.failed_seeds, "seconds": round(self.took_s),
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when every case passed, on every store, every time, and no seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--case", default="", help="numbers, with commas; all, and the seeds, when left out")
    parser.add_argument("--store", default=",".join(BOTH), help="sqlite, postgres, or both")
    parser.add_argument("--times", type=int, default=1, help="rounds, one after the other (1)")
    parser.add_argument("--jobs", type=int, default=2, help="cases that run beside each other (2)")
    parser.add_argument(
        "--seeds", default=SEEDS, help=f"of the simulation, by where they keep their state: memory, sqlite, postgres; 0 for none ({SEEDS})"
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true", help="spare nothing: case 4 at every place, case 18 for 5 minutes"
    )
    parser.add_argument("--allow-skips", action="store_true", help="exit with 0 though something could not be shown")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    given = parser.parse_args(arguments)
    chosen = [CASES[int(number)] for number in given.case.split(",") if number] or [CASES[n] for n in sorted(CASES)]
    if given.list:
        for each in chosen:
            print(f"{each.number:>3}  {each.fault}\n     passes when {each.criterion}")
        return 0
    try:
        seeds = {} if given.case else seeds_by_store(given.seeds)
    except ValueError as error:
        parser.error(str(error))
    rounds: list[Round] = []
    for number in range(1, given.times + 1):
        rounds.append(_round(chosen, given.store.split(","), seeds, jobs=given.jobs, number=number, is_full=given.full))
        print(json.dumps({"round": number} | rounds[-1].told()), flush=True)
    whole = together(rounds)
    print(json.dumps({"rounds": len(rounds)} | whole.told()))
    return status(whole, is_skipping_allowed=given.allow_skips)


def seeds_by_store(written: str) -> dict[str, int]:
    """How many seeds are played on each store; a bare number is of those in memory. Raises: ValueError."""
    found: dict[str, int] = {}
    for part in written.split(","):
        store, _, count = part.rpartition("=")
        if store not in ("", "memory", *BOTH) or not count.isdigit():
            raise ValueError(f"--seeds {part}: write a number, or memory=…, sqlite=…, postgres=… with commas")
        if int(count):
            found[store or "memory"] = int(count)
    return found


def together(rounds: Sequence[Round]) -> Round:
    """All rounds as one: a case passed that passed in each of them."""
    return Round(
        chosen=frozenset().union(*(each.chosen for each in rounds)),
        failed=frozenset().union(*(each.failed for each in rounds)),
        skipped=frozenset().union(*(each.skipped for each in rounds)),
        seeds=sum(each.seeds for each in rounds),
        failed_seeds=sum(each.failed_seeds for each in rounds),
        took_s=sum(each.took_s for each in rounds),
    )


def status(whole: Round, *, is_skipping_allowed: bool) -> int:
    """1 when something failed, 2 when nothing did and something could not be shown, else 0."""
    if whole.failed or whole.failed_seeds:
        return 1
    return 2 if whole.skipped and not is_skipping_allowed else 0


def _round(
    chosen: Sequence[Case], stores: list[str], seeds: Mapping[str, int], *, jobs: int, number: int, is_full: bool
) -> Round:
    began = time.monotonic()
    failed, skipped = outcomes(run_all(list(chosen), stores, jobs=jobs, nth_round=number, is_full=is_full))
    played = bad = 0
    for store, count in seeds.items():
        more, wrong = _simulate(store, count, jobs, first=(number - 1) * count)
        played, bad = played + more, bad + wrong
    return Round(
        chosen=frozenset(each.number for each in chosen), failed=failed, skipped=skipped - failed, seeds=played,
        failed_seeds=bad, took_s=time.monotonic() - began,
    )  # fmt: skip


def outcomes(all_done: Iterable[Done]) -> tuple[frozenset[int], frozenset[int]]:
    """The cases that failed and that were skipped, on a store or more; each is told as it ends, with its reason."""
    failed: set[int] = set()
    skipped: set[int] = set()
    for done in all_done:
        print(f"{done.text}\n     {done.figure}", flush=True)
        if done.detail:
            print(done.detail, file=sys.stderr, flush=True)
        if done.outcome == "FAIL":
            failed.add(done.number)
        elif done.outcome == "skip":
            skipped.add(done.number)
    return frozenset(failed), frozenset(skipped)


def _simulate(store: str, seeds: int, jobs: int, *, first: int) -> tuple[int, int]:
    """How many seeds of the simulation were played on a store, and how many of them failed."""
    try:
        with _address(store) as address:
            command = [
                sys.executable, "-m", "tests.faults.simulation", "--seeds", str(seeds), "--from", str(first),
                "--store", address, "--jobs", str(jobs),
            ]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except NoPostgres as error:
        print(f"seeds on {store} cannot be played here: {error}", flush=True)
        return seeds, seeds
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines if done.returncode else lines[-2:-1]), flush=True)
    told = json.loads(lines[-1])
    return int(told["seeds"]), int(told["failed"])


@contextlib.contextmanager
def _address(store: str) -> Iterator[str]:
    """What the simulation calls a store; a server is started for PostgreSQL, and ended. Raises: NoPostgres."""
    if store != "postgres":
        yield store
        return
    server = Postgres()
    try:
        yield server.url("postgres")
    finally:
        server.remove()


if __name__ == "__main__":
    sys.exit(main())
