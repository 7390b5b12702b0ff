"""``python -m tests.faults``: the fault cases on real processes, and seeds of the simulation; ``make faults``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from tests.faults.suite.registry import BOTH
from tests.faults.suite.running import CASES, run_all


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
        for done in run_all(chosen, given.store.split(","), jobs=given.jobs):
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
