"""Contracts as checks that the author of a plug-in can run: ``testing.store``, ``testing.engine``, ``testing.policy``.

The first two need nothing but what they check. ``check_policy`` and ``testing.strategies`` need Hypothesis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidemill.testing.policy import check_policy

__all__ = ["check_policy"]


def __getattr__(name: str) -> Any:
    """``check_policy``, imported when it is asked for: the other checks do without Hypothesis."""
    if name == "check_policy":
        return import_module("tidemill.testing.policy").check_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
