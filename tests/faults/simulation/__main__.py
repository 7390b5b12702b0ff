"""Plays seeds: ``python -m tests.faults.simulation --seeds 2000``. The last line is JSON: passed, failed, seeds."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
    parser.add_argument(
        "--whole", action="store_true", help="tell a failing history as it is, and not its shortest part"
    )
    given = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # what goes wrong here is meant to
    with tempfile.TemporaryDirectory(prefix="tidemill-simulation-") as folder:
        disk = _disks(given.store, Path(folder))
        if given.seed is not None:
            return _tell(given.seed, given.store, disk, is_whole=given.whole)
        return _play(range(given.first, given.first + given.seeds), given.store, disk, is_whole=given.whole)


def _play(seeds: range, store: str, disk: Callable[[], Disk], *, is_whole: bool) -> int:
    began_s, shown_s, failed = time.monotonic(), time.monotonic(), []
    for done, seed in enumerate(seeds, 1):
        if (broken := broken_by(history(seed), disk)) is not None:
            failed.append(seed)
            print(f"seed {seed}: {broken}", flush=True)
            if len(failed) <= 3:
                _tell(seed, store, disk, is_whole=is_whole, is_short=True)
        if time.monotonic() - shown_s > 10 or done == len(seeds):
            shown_s = time.monotonic()
            rate = done / max(shown_s - began_s, 1e-9)
            print(
                f"{done} of {len(seeds)} seeds on {_kind(store)}, {rate:.0f} a second, {len(failed)} failed", flush=True
            )
    print(json.dumps({"passed": len(seeds) - len(failed), "failed": len(failed), "seeds": len(seeds)}))
    return int(bool(failed))


def _tell(seed: int, store: str, disk: Callable[[], Disk], *, is_whole: bool, is_short: bool = False) -> int:
    ops = history(seed)
    broken = broken_by(ops, disk)
    if broken is not None and not is_whole:
        ops = shortened(ops, disk)
    print(told(ops, disk))
    again = "" if store == "memory" else f" --store {_kind(store)}"
    print(f"again: python -m tests.faults.simulation --seed {seed}{again}", flush=True)
    if not is_short:
        failed = int(broken is not None)
        print(json.dumps({"passed": 1 - failed, "failed": failed, "seeds": 1}))
    return int(broken is not None)


def _kind(store: str) -> str:
    """The store without what is secret in its address."""
    return "postgresql://…" if "://" in store else store


def _disks(store: str, folder: Path) -> Callable[[], Disk]:
    if store == "memory":
        return MemoryDisk

    def new_folder() -> Path:
        shutil.rmtree(folder / "seed", ignore_errors=True)
        (folder / "seed").mkdir()
        return folder / "seed"

    if store == "sqlite":
        return lambda: SqliteDisk(new_folder())
    if "://" in store:
        return lambda: PostgresDisk(new_folder(), store)
    raise SystemExit(f"--store {store}: stores are memory, sqlite and postgresql://…")


if __name__ == "__main__":
    sys.exit(main())
