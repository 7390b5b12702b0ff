"""Contracts as checks that the author of a plug-in can run: those of stores, engines, policies and guardrails.

``testing.store`` and ``testing.engine`` need nothing but what they check. ``check_policy``, ``check_guard`` and
``testing.strategies`` need Hypothesis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidemill.testing.guard import check_guard
    from tidemill.testing.policy import check_policy

__all__ = ["check_guard", "check_policy"]


def __getattr__(name: str) -> Any:
    """Checks, imported when they are asked for: the other ones do without Hypothesis."""
    if name in __all__:
        return getattr(import_module(f"tidemill.testing.{name.removeprefix('check_')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
