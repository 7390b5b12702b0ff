"""Tests of the project that show a case, or a part of one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.faults.suite.registry import Skipped

_ROOT: Final = Path(__file__).parents[3]
_NOTHING_CHOSEN: Final = 5
"""What pytest exits with when no test was left to run."""


def passed(*arguments: str) -> str:
    """How many tests passed. Raises: AssertionError with those that did not at the first try, Skipped with the reasons
    when one of them, or none at all, could be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-m", "", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return judged(arguments[0].rsplit("/", 1)[-1].removesuffix(".py"), done.returncode, done.stdout)


def judged(name: str, code: int, output: str) -> str:
    """The same, of what pytest wrote."""
    last = output.strip().splitlines()[-1]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped|rerun)", last)}
    if code == _NOTHING_CHOSEN:
        raise Skipped(f"{name}: {last}")
    assert code == 0, f"{last}\n{output[-8000:]}"
    assert not counts.get("rerun"), f"{counts['rerun']} failed at their first try\n{output[-8000:]}"
    if counts.get("skipped") or not counts.get("passed"):
        reasons = sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", output, re.MULTILINE)))
        raise Skipped(f"{counts.get('skipped', 0)} tests of {name} were skipped: {'; '.join(reasons) or last}")
    return f"{counts['passed']} tests of {name} passed"
