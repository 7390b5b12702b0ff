"""What holds for all tests: no test touches the home folder, or the cloud, of whoever runs them.

Tests that start processes and wait for them depend on how busy the machine is. One of them that fails is tried once
more, and both its name and why it failed the first time are printed at the end. What only computes is never tried
again. Searches for counter-examples (Hypothesis) try the same ones each time, so that a commit that passed passes again;
``make test-long`` tries others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

_OURS = (
    "TIDEMILL_API_URL",
    "TIDEMILL_API_URLS",
    "TIDEMILL_API_CA",
    "TIDEMILL_TOKEN",
    "TIDEMILL_PROJECT",
    "TIDEMILL_DEBUG",
    "TIDEMILL_WORKDIR_LIMIT",
)
settings.register_profile("others", settings())
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

_WITH_PROCESSES = ("adapters", "contract", "e2e", "examples", "faults", "scenario")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One second try for each test in the folders that start processes, but for searches for counter-examples."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        searches = hasattr(getattr(item, "obj", None), "hypothesis")
        if folder in _WITH_PROCESSES and not searches:
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why each test failed that passed, or failed again, at its second try."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"first try of {report.nodeid}", sep="_")
        terminalreporter.line(report.longreprtext)


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home folder that is the test's own, and no address or token from outside."""
    for name in _OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIDEMILL_HOME", str(tmp_path / "home"))
