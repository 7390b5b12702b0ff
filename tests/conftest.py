"""What holds for all tests: no test touches the home folder, or the cloud, of whoever runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

_OURS = (
    "TIDEMILL_API_URL",
    "TIDEMILL_API_URLS",
    "TIDEMILL_API_CA",
    "TIDEMILL_TOKEN",
    "TIDEMILL_PROJECT",
    "TIDEMILL_DEBUG",
    "TIDEMILL_WORKDIR_LIMIT",
)


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home folder that is the test's own, and no address or token from outside."""
    for name in _OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIDEMILL_HOME", str(tmp_path / "home"))
