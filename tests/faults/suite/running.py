"""Runs cases, some beside each other, each in a process and with a database of its own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from tests.faults.suite import clocks, crashes, machines, requests, serving, state  # noqa: F401 - they register their cases
from tests.faults.suite.bed import Beds
from tests.faults.suite.registry import CASES, Case, Skipped
from tests.postgres import NoPostgres, Postgres

__all__ = ["CASES", "Done", "run_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How one case went on one store. ``outcome`` is pass, skip or FAIL; ``detail`` is empty unless it failed."""

    number: int
    outcome: str
    text: str
    figure: str
    detail: str


def run_all(
    chosen: list[Case], stores: list[str], *, jobs: int, nth_round: int = 1, is_full: bool = False
) -> Iterator[Done]:
    """Each case on each of its stores: first those that may run beside others, then the rest."""
    runs = [(each, store) for each in chosen for store in each.stores if store in stores]
    beside = [(each.number, store) for each, store in runs if jobs > 1 and not each.is_alone]
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as lanes:
        for done in as_completed([lanes.submit(_run, number, store, nth_round, is_full) for number, store in beside]):
            yield done.result()
    for each, store in runs:
        if (each.number, store) not in beside:
            yield _run(each.number, store, nth_round, is_full)


def _run(number: int, store: str, nth_round: int, is_full: bool) -> Done:
    case = CASES[number]
    began = time.monotonic()
    postgres: Postgres | None = None
    beds: Beds | None = None
    detail = ""
    try:
        postgres = Postgres() if store == "postgres" else None
        beds = Beds(store, postgres, nth_round=nth_round, is_full=is_full)
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
