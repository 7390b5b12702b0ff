"""Tests of the project that show a case, or a part of one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.faults.suite.registry import Skipped

_ROOT: Final = Path(__file__).parents[3]


def passed(*arguments: str) -> str:
    """How many tests passed. Raises: AssertionError with those that did not, Skipped when none could be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, f"{last}\n{done.stdout[-8000:]}"
    found = re.search(r"(\d+) passed", last)
    if found is None:
        raise Skipped(last)
    return f"{found[1]} tests of {arguments[0].rsplit('/', 1)[-1].removesuffix('.py')} passed"
