"""``python -m tests.faults``: the fault cases on real processes, and seeds of the simulation; ``make faults``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from tests.faults.suite import clocks, crashes, machines, requests, serving, state  # noqa: F401 - they register their cases
from tests.faults.suite.bed import Beds
from tests.faults.suite.registry import BOTH, CASES, Case, Skipped
from tests.postgres import NoPostgres, Postgres


def main() -> int:
    """The exit status: 0 when every case passed, on every store, every time, and no seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--case", default="", help="numbers, with commas; all when left out")
    parser.add_argument("--store", default=",".join(BOTH), help="sqlite, postgres, or both")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cases that run beside each other (2)")
    parser.add_argument("--seeds", type=int, default=2000, help="of the simulation; 0 for none")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    given = parser.parse_args()
    chosen = [CASES[int(number)] for number in given.case.split(",") if number] or [CASES[n] for n in sorted(CASES)]
    if given.list:
        for each in chosen:
            print(f"{each.number:>3}  {each.fault}\n     passes when {each.criterion}")
        return 0
    failed: set[int] = set()
    skipped: set[int] = set()
    for _ in range(given.times):
        for done in _run_all(chosen, given.store.split(","), jobs=given.jobs):
            print(f"{done.text}\n     {done.figure}", flush=True)
            if done.detail:
                print(done.detail, file=sys.stderr, flush=True)
            failed |= {done.number} if done.outcome == "FAIL" else set()
            skipped |= {done.number} if done.outcome == "skip" else set()
    seeds, bad_seeds = _simulate(given.seeds, given.jobs) if given.seeds and not given.case else (0, 0)
    passed = {each.number for each in chosen} - failed - skipped
    if skipped - failed:
        print(f"not shown here: {', '.join(map(str, sorted(skipped - failed)))}")
    print(json.dumps({"passed": len(passed), "failed": len(failed), "seeds": seeds, "failed_seeds": bad_seeds}))
    return 1 if failed or bad_seeds else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How one case went on one store. ``outcome`` is pass, skip or FAIL; ``detail`` is empty unless it failed."""

    number: int
    outcome: str
    text: str
    figure: str
    detail: str


def _run_all(chosen: list[Case], stores: list[str], *, jobs: int) -> Iterator[Done]:
    """Each case on each of its stores: first those that may run beside others, then the rest."""
    runs = [(each, store) for each in chosen for store in each.stores if store in stores]
    beside = [(each.number, store) for each, store in runs if jobs > 1 and not each.is_alone]
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as lanes:
        for done in as_completed([lanes.submit(_run, number, store) for number, store in beside]):
            yield done.result()
    for each, store in runs:
        if (each.number, store) not in beside:
            yield _run(each.number, store)


def _run(number: int, store: str) -> Done:
    case = CASES[number]
    began = time.monotonic()
    postgres: Postgres | None = None
    beds: Beds | None = None
    detail = ""
    try:
        postgres = Postgres() if store == "postgres" else None
        beds = Beds(store, postgres)
        figure, outcome = case.run(beds), "pass"
    except (Skipped, NoPostgres) as reason:
        figure, outcome = str(reason), "skip"
    except Exception as error:  # noqa: BLE001 - the next case is to run
        figure, outcome = f"{type(error).__name__}: {str(error)[:300]}", "FAIL"
        detail = traceback.format_exc() + (beds.logs() if beds is not None else "")
    finally:
        if beds is not None:
            beds.close()
        if postgres is not None:
            postgres.remove()
    took = time.monotonic() - began
    text = f"{number:>3}  {store:<8}  {outcome}  {took:6.1f} s  {case.fault}"
    return Done(number=number, outcome=outcome, text=text, figure=figure, detail=detail)


def _simulate(seeds: int, jobs: int) -> tuple[int, int]:
    """How many seeds of the simulation were run, and how many of them failed."""
    command = [sys.executable, "-m", "tests.faults.simulation", "--seeds", str(seeds), "--jobs", str(jobs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-5:]), flush=True)
    told = json.loads(lines[-1])
    return int(told["seeds"]), int(told["failed"])


if __name__ == "__main__":
    sys.exit(main())
