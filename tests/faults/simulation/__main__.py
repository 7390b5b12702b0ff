"""Plays seeds: ``python -m tests.faults.simulation --seeds 2000``. The last line is JSON: passed, failed, seeds."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.simulation.cloud import Op
from tests.faults.simulation.disks import Disk, MemoryDisk, PostgresDisk, SqliteDisk
from tests.faults.simulation.history import broken_by, history, shortened, told


def main(arguments: list[str] | None = None) -> int:
    """Zero when every seed keeps all promises."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2_000, help="how many (2000)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one (0)")
    parser.add_argument("--seed", type=int, help="only this one, told as it goes")
    parser.add_argument(
        "--store", default="memory", help="memory, sqlite, or the address of a PostgreSQL: postgresql://… (memory)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that play beside each other (1)")
    parser.add_argument("--whole", action="store_true", help="tell a failing history as it is, not its shortest part")
    given = parser.parse_args(arguments)
    if given.store not in ("memory", "sqlite") and "://" not in given.store:
        parser.error(f"--store {given.store}: stores are memory, sqlite and postgresql://…")
    if given.seed is not None:
        return _tell(given.seed, given.store, is_whole=given.whole)
    seeds = range(given.first, given.first + given.seeds)
    return _play(seeds, given.store, jobs=given.jobs, is_whole=given.whole)


def _play(seeds: range, store: str, *, jobs: int, is_whole: bool) -> int:
    began_s, shown_s, failed = time.monotonic(), time.monotonic(), 0
    for done, (seed, broken) in enumerate(_checked(seeds, store, jobs), 1):
        if broken:
            failed += 1
            print(f"seed {seed}: {broken}", flush=True)
            if failed <= 3:
                _tell(seed, store, is_whole=is_whole, is_last=False)
        if time.monotonic() - shown_s > 10 or done == len(seeds):
            shown_s = time.monotonic()
            rate = done / max(shown_s - began_s, 1e-9)
            print(f"{done} of {len(seeds)} seeds on {_kind(store)}, {rate:.0f} a second, {failed} failed", flush=True)
    print(json.dumps({"passed": len(seeds) - failed, "failed": failed, "seeds": len(seeds)}))
    return int(bool(failed))


def _checked(seeds: range, store: str, jobs: int) -> Iterator[tuple[int, str]]:
    """Each seed, and what it breaks."""
    check = partial(_check, store=store)
    if jobs <= 1:
        yield from map(check, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(check, seeds, chunksize=4)


def _check(seed: int, *, store: str) -> tuple[int, str]:
    return seed, _outcome(history(seed), store)


def _outcome(ops: list[Op], store: str) -> str:
    """What the history breaks, in words; empty when it breaks nothing."""
    with _quietly(store) as disk:
        broken = broken_by(ops, disk)
    return str(broken) if broken is not None else ""


def _tell(seed: int, store: str, *, is_whole: bool, is_last: bool = True) -> int:
    ops = history(seed)
    broken = _outcome(ops, store)
    with _quietly(store) as disk:
        if broken and not is_whole:
            ops = shortened(ops, disk)
        print(told(ops, disk))
    again = "" if store == "memory" else f" --store {_kind(store)}"
    print(f"again: python -m tests.faults.simulation --seed {seed}{again}", flush=True)
    if is_last:
        failed = int(bool(broken))
        print(json.dumps({"passed": 1 - failed, "failed": failed, "seeds": 1}))
    return int(bool(broken))


def _kind(store: str) -> str:
    """The store without what is secret in its address."""
    return "postgresql://…" if "://" in store else store


@contextmanager
def _quietly(store: str) -> Iterator[Callable[[], Disk]]:
    """What makes disks; what goes wrong on them is meant to, and not logged."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="tidemill-simulation-") as folder:

            def make() -> Disk:
                if store == "memory":
                    return MemoryDisk()
                own = Path(tempfile.mkdtemp(dir=folder))
                return SqliteDisk(own) if store == "sqlite" else PostgresDisk(own, store)

            yield make
    finally:
        logging.disable(before)


if __name__ == "__main__":
    sys.exit(main())
